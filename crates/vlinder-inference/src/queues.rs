//! The queues that a worker pulls from: two for each model that it serves, one for inference and
//! one for embeddings, since no upstream says reliably which of the two a model is for.

use crate::Backend;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;
use vlinder_bus::{QueueSpec, Subject, subjects};
use vlinder_core::Selector;
use vlinder_worker::{Error, Handler, Slots, WorkerCx, serve_queue_in};

/// The services of an inference upstream.
const SERVICES: [&str; 2] = ["infer", "embed"];

/// Queues in service, by model.
pub struct Queues {
    cx: WorkerCx,
    backend: Backend,
    handler: Arc<dyn Handler>,
    slots: Arc<Slots>,
    serving: HashMap<Selector, CancellationToken>,
    tasks: JoinSet<Result<(), Error>>,
}

impl Queues {
    /// No queues yet. All of them together take `slots` jobs at once.
    pub fn new(cx: WorkerCx, backend: Backend, handler: Arc<dyn Handler>, slots: usize) -> Self {
        Self {
            cx,
            backend,
            handler,
            slots: Slots::new(slots),
            serving: HashMap::new(),
            tasks: JoinSet::new(),
        }
    }

    /// From now on these models are served, and no others. What runs is finished.
    pub fn serve(&mut self, models: &BTreeSet<Selector>) {
        self.serving.retain(|model, pulling| {
            let stays = models.contains(model);
            if !stays {
                pulling.cancel();
            }
            stays
        });
        for model in models {
            if self.serving.contains_key(model) {
                continue;
            }
            let pulling = self.cx.drain.child_token();
            for service in SERVICES {
                let queue = queue_of(&self.cx, service, self.backend, model);
                let cx = WorkerCx {
                    drain: pulling.clone(),
                    ..self.cx.clone()
                };
                let (slots, handler) = (self.slots.clone(), self.handler.clone());
                let serving = async move { serve_queue_in(&cx, queue, slots, handler).await };
                self.tasks.spawn(serving.in_current_span());
            }
            self.serving.insert(model.clone(), pulling);
        }
    }

    /// Waits for a queue's task to end; for ever where there is none. `Err` when it failed.
    pub async fn ended(&mut self) -> Result<(), Error> {
        match self.tasks.join_next().await {
            Some(ended) => joined(ended),
            None => std::future::pending().await,
        }
    }

    /// Waits until everything that runs is finished. Nothing is pulled any more.
    pub async fn finish(mut self) -> Result<(), Error> {
        self.serve(&BTreeSet::new());
        while let Some(ended) = self.tasks.join_next().await {
            joined(ended)?;
        }
        Ok(())
    }
}

fn joined(ended: Result<Result<(), Error>, JoinError>) -> Result<(), Error> {
    ended.unwrap_or_else(|panic| Err(Error::Other(format!("a queue's task ended: {panic}"))))
}

/// The queue of a model. It begins with the first request that was ever sent to the model: one may
/// have come between the moment the model became known and the first pull.
fn queue_of(cx: &WorkerCx, service: &str, backend: Backend, model: &Selector) -> QueueSpec {
    let filter = Subject::Req {
        ns: cx.ns.clone(),
        service: service.to_owned(),
        backend: backend.to_string(),
        selector: model.clone(),
    };
    QueueSpec {
        stream: cx.log(),
        name: subjects::service_queue(service, backend.as_str(), model),
        filter: filter.to_string(),
        from_start: true,
    }
}
