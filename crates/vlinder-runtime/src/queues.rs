//! Queues of services that are known to exist. They are made before the first request is published
//! (design.md rule 10), usually by somebody else, and once made they stay.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use vlinder_bus::{QueueSpec, Subject, subjects};
use vlinder_core::Selector;
use vlinder_worker::WorkerCx;

/// Queues that are remembered; beyond them they are made sure of again, which is harmless.
const KNOWN_MAX: usize = 10_000;

/// Names of queues that exist.
#[derive(Default)]
pub(crate) struct KnownQueues(Mutex<HashSet<String>>);

impl KnownQueues {
    /// Makes sure that the queue of a service exists.
    pub async fn ensure(
        &self,
        cx: &WorkerCx,
        service: &str,
        backend: &str,
        selector: &Selector,
    ) -> Result<(), vlinder_bus::Error> {
        let name = subjects::service_queue(service, backend, selector);
        if self.lock().contains(&name) {
            return Ok(());
        }
        let subject = Subject::Req {
            ns: cx.ns.clone(),
            service: service.to_owned(),
            backend: backend.to_owned(),
            selector: selector.clone(),
        };
        let queue = QueueSpec {
            stream: cx.log(),
            name: name.clone(),
            filter: subject.to_string(),
            from_start: true,
        };
        cx.bus.ensure_queue(&queue).await?;
        let mut known = self.lock();
        if known.len() >= KNOWN_MAX {
            known.clear();
        }
        known.insert(name);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
