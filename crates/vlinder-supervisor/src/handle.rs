//! The verbs of the supervisor.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use vlinder_core::WorkerRole;

use crate::ledger::Ledgers;
use crate::plan::Plan;
use crate::{Error, NodeStatus, WorkerKey};

/// Orders from handles that wait for the loop; callers wait for room.
pub(crate) const COMMANDS_MAX: usize = 64;

pub(crate) enum Command {
    Scale {
        role: WorkerRole,
        count: u32,
        done: oneshot::Sender<Result<(), Error>>,
    },
    Restart {
        role: WorkerRole,
        done: oneshot::Sender<Result<(), Error>>,
    },
    Reload {
        plan: Plan,
        done: oneshot::Sender<Result<(), Error>>,
    },
    Drain {
        within: Duration,
    },
}

/// How a drain went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrainReport {
    /// Workers that were killed because they did not finish in time, or on a second drain.
    pub killed: usize,
    /// Processes that could not be ended at all (stuck in the kernel).
    pub left: usize,
}

impl DrainReport {
    /// Whether everyone finished in time.
    pub const fn is_clean(&self) -> bool {
        self.killed == 0 && self.left == 0
    }
}

/// Gives orders to a running supervisor. Cheap to clone.
#[derive(Debug, Clone)]
pub struct SupervisorHandle {
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) status: watch::Receiver<Arc<NodeStatus>>,
    pub(crate) ledgers: Ledgers,
}

impl SupervisorHandle {
    /// Sets the number of workers of a role. Returns when the number is taken over; the status
    /// shows the rest. Workers that go are drained and lose no job.
    pub async fn scale(&self, role: WorkerRole, count: u32) -> Result<(), Error> {
        self.ask(|done| Command::Scale { role, count, done }).await
    }

    /// Replaces the workers of a role one by one, each drained first; a crash-looping one is
    /// started at once.
    pub async fn restart(&self, role: WorkerRole) -> Result<(), Error> {
        self.ask(|done| Command::Restart { role, done }).await
    }

    /// Takes over a new plan, changing only what differs: counts are scaled, changed
    /// configuration is sent or leads to a restart, roles that are gone are drained.
    pub async fn reload(&self, plan: Plan) -> Result<(), Error> {
        self.ask(|done| Command::Reload { plan, done }).await
    }

    /// Begins to stop everything; [`crate::Supervisor::run`] returns when it is done. A second
    /// call ends everything now.
    pub async fn drain(&self, within: Duration) -> Result<(), Error> {
        self.commands
            .send(Command::Drain { within })
            .await
            .map_err(|_| Error::Stopping)
    }

    /// What each worker holds at this moment, oldest first: the texts it gave to
    /// [`crate::control::ControlHandle::held`].
    pub fn held(&self) -> Vec<(WorkerKey, Vec<String>)> {
        self.ledgers.show()
    }

    /// Waits until what workers hold has changed since the last call. For one caller at a time; at
    /// work it returns at once, so that the caller must pace itself.
    pub async fn held_changed(&self) {
        self.ledgers.changed().await;
    }

    /// The present state and its changes.
    pub fn status(&self) -> watch::Receiver<Arc<NodeStatus>> {
        self.status.clone()
    }

    async fn ask(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<(), Error>>) -> Command,
    ) -> Result<(), Error> {
        let (done, answer) = oneshot::channel();
        self.commands
            .send(command(done))
            .await
            .map_err(|_| Error::Stopping)?;
        answer.await.map_err(|_| Error::Stopping)?
    }
}
