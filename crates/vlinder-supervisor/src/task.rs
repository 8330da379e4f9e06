//! Workers that are tasks of this process (embedded mode).
//!
//! A panic is contained and counted like any other ending; killing means dropping the task. A task
//! that blocks its thread blocks this supervisor too: that is [`crate::watchdog`]'s business.

use std::net::TcpListener;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinError, JoinHandle};

use crate::control::{
    ControlEvent, ControlEvents, ControlHandle, Mailbox, MemoryOutbox, Start, WorkerFailure,
};
use crate::exit::{KillReason, WorkerExit, shorten};
use crate::ledger::lock;
use crate::plan::RolePlan;
use crate::runner::{Incarnation, Order, What};
use crate::{Error, TaskFactory};

/// A task worker with its attendant's state.
pub(crate) struct TaskWorker {
    incarnation: Incarnation,
    worker: JoinHandle<Result<(), WorkerFailure>>,
    outbox: Arc<MemoryOutbox>,
    mailbox: Arc<Mailbox>,
    orders: mpsc::Receiver<Order>,
}

/// If the attendant is dropped, its worker goes too.
struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl TaskWorker {
    pub fn start(
        incarnation: Incarnation,
        plan: &RolePlan,
        factory: &TaskFactory,
        orders: mpsc::Receiver<Order>,
    ) -> Result<Self, Error> {
        let mut listeners: Vec<(String, TcpListener)> = Vec::with_capacity(plan.listeners.len());
        for listener in &plan.listeners {
            let own = listener
                .socket()
                .try_clone()
                .map_err(Error::io("share a listener"))?;
            listeners.push((listener.name().to_owned(), own));
        }
        let start = Start {
            role: incarnation.key.role,
            index: incarnation.key.index,
            node: incarnation.context.node.clone(),
            incarnation: incarnation.number,
            config: plan.config.clone(),
            listeners,
        };
        let outbox = Arc::new(MemoryOutbox::new(
            incarnation.context.ledgers.open(incarnation.key),
        ));
        let mailbox = Arc::new(Mailbox::default());
        let handle = ControlHandle::in_memory(outbox.clone());
        let events = ControlEvents(mailbox.clone());
        let factory = factory.clone();
        // The factory runs inside the task, so that its panic is contained too.
        let worker = tokio::spawn(async move { factory(start, handle, events).await });
        Ok(Self {
            incarnation,
            worker,
            outbox,
            mailbox,
            orders,
        })
    }

    /// Serves the worker until it has ended and what it held is given back.
    pub async fn attend(mut self) {
        let _abort = AbortOnDrop(self.worker.abort_handle());
        let mut killed = None;
        let mut draining = false;
        let result = loop {
            tokio::select! {
                result = &mut self.worker => break result,
                message = self.outbox.next() => self.incarnation.tell_said(message).await,
                Some(order) = self.orders.recv() => match order {
                    Order::Drain => {
                        draining = true;
                        self.mailbox.post(ControlEvent::Drain);
                    }
                    Order::Reload(config) => self.mailbox.post(ControlEvent::Reload(config)),
                    Order::Kill(reason) => {
                        killed = Some(reason);
                        self.worker.abort();
                    }
                }
            }
        };
        let exit = ending(result, killed, draining);
        let held = lock(&self.outbox.ledger).take();
        let rest = self
            .incarnation
            .give_back(None, exit.blames_the_job(), held)
            .await;
        self.incarnation
            .tell(What::Exited {
                exit,
                last_lines: Vec::new(),
            })
            .await;
        if let Some(rest) = rest {
            rest.await;
        }
    }
}

fn ending(
    result: Result<Result<(), WorkerFailure>, JoinError>,
    killed: Option<KillReason>,
    draining: bool,
) -> WorkerExit {
    match result {
        Ok(Ok(())) if draining => WorkerExit::Drained,
        Ok(Ok(())) => WorkerExit::Completed,
        Ok(Err(WorkerFailure::Configuration(message))) => WorkerExit::Configuration { message },
        Ok(Err(failure @ WorkerFailure::Failed(_))) => WorkerExit::Failed {
            code: failure.exit_code().into(),
            message: failure.to_string(),
        },
        Err(error) => match error.try_into_panic() {
            Ok(panic) => {
                let text = panic.downcast_ref::<&str>().copied();
                let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
                WorkerExit::Panicked {
                    message: shorten(text.unwrap_or_default()),
                }
            }
            Err(_cancelled) => killed.map_or(WorkerExit::Lost, WorkerExit::from),
        },
    }
}
