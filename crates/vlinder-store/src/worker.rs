//! The workers `storage.object.sqlite` and `storage.vector.sqlite`: pull the requests to every
//! store that a deployed agent names, of whatever kind. Each kind is SQLite here, with a home elsewhere
//! or without. A worker that has no access to S3 leaves the requests to `s3://` stores to those that have.

use crate::home::{NATS, S3, SQLITE};
use crate::{Position, Service, Stores};
use async_trait::async_trait;
use bytes::Bytes;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tracing::Instrument;
use vlinder_bus::{QueueSpec, Stored, Subject, subjects};
use vlinder_core::Selector;
use vlinder_core::record::{CallStatus, Request};
use vlinder_objects::Access;
use vlinder_worker::infra::{Infra, InfraView};
use vlinder_worker::serving::NOTE_STORES;
use vlinder_worker::{Answer, Error, ServiceHandler, ServiceOutcome, WorkerCx, serve_queue};

/// Calls to one store that a worker has in hand at once. They take turns at the file; a few more
/// hide the way to the bus.
const SLOTS_PER_STORE: usize = 16;
/// Pause before a call is tried again whose file or log failed.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

impl Service {
    const fn name(self) -> &'static str {
        match self {
            Self::Kv => "kv",
            Self::Vec => "vec",
        }
    }

    /// The stores of this service and of these kinds that deployed agents name.
    fn stores(self, infra: &Infra, kinds: &[&'static str]) -> HashSet<(&'static str, Selector)> {
        let mut stores = HashSet::new();
        for (version, _) in infra.agents() {
            let uri = match self {
                Self::Kv => version.manifest.object_store(),
                Self::Vec => version.manifest.vector_store(),
            };
            let Some(uri) = uri else { continue };
            let kind = kinds.iter().copied().find(|kind| uri.scheme == *kind);
            stores.extend(kind.zip(Selector::new(uri.path).ok()));
        }
        stores
    }
}

/// Serves `service` until the worker drains. A store is served from its deployment on; one that
/// nobody names any more is served until the worker ends, for turns that still run.
pub async fn run(cx: WorkerCx, service: Service, s3: Access) -> Result<(), Error> {
    let mut infra = InfraView::start(&cx).await?;
    let kinds = match s3.is_set() {
        true => &[SQLITE, NATS, S3][..],
        false => &[SQLITE, NATS],
    };
    cx.control.note(NOTE_STORES, &kinds.join(" "));
    let stores = Stores::new(cx.bus.clone(), cx.ns.clone(), &cx.data_dir);
    let stores = Arc::new(stores.with_s3(s3));
    stores
        .check()
        .await
        .map_err(|error| Error::Other(chain(&error)))?;
    let handler = ServiceHandler::new(cx.clone(), Arc::new(Served { stores }));

    let mut served = HashSet::new();
    let mut queues = JoinSet::new();
    let mut is_ready = false;
    loop {
        for (kind, store) in service.stores(&infra.now(), kinds) {
            if served.insert((kind, store.clone())) {
                let queue = queue_of(&cx, service, kind, &store);
                let (cx, handler) = (cx.clone(), handler.clone());
                let serving =
                    async move { serve_queue(&cx, queue, SLOTS_PER_STORE, handler).await };
                queues.spawn(serving.in_current_span());
            }
        }
        if !is_ready {
            cx.control.ready();
            is_ready = true;
        }
        tokio::select! {
            () = cx.drain.cancelled() => break,
            changed = infra.changed() => {
                if changed.is_err() {
                    return Err(Error::Other("the view of the deployments ended".to_owned()));
                }
            }
            Some(ended) = queues.join_next() => joined(ended)?,
        }
    }
    while let Some(ended) = queues.join_next().await {
        joined(ended)?;
    }
    Ok(())
}

fn joined(ended: Result<Result<(), Error>, tokio::task::JoinError>) -> Result<(), Error> {
    ended.unwrap_or_else(|panic| Err(Error::Other(format!("a queue's task ended: {panic}"))))
}

/// The queue of a store. It is made at the deployment, before anybody can ask; where that was cut
/// short it begins with what comes, because a history of answered requests is nobody's work.
fn queue_of(cx: &WorkerCx, service: Service, kind: &str, store: &Selector) -> QueueSpec {
    let subject = Subject::Req {
        ns: cx.ns.clone(),
        service: service.name().to_owned(),
        backend: kind.to_owned(),
        selector: store.clone(),
    };
    QueueSpec {
        stream: cx.log(),
        name: subjects::service_queue(service.name(), kind, store),
        filter: subject.to_string(),
        from_start: false,
    }
}

/// The stores as a service.
struct Served {
    stores: Arc<Stores>,
}

#[async_trait]
impl vlinder_worker::Service for Served {
    async fn call(&self, request: &Request, stored: &Stored, body: Bytes) -> ServiceOutcome {
        let at = Position {
            seq: stored.seq,
            request: stored.hash,
        };
        match self.stores.serve(request, at, body).await {
            Ok(Some(answer)) => ServiceOutcome::Answer(Answer {
                status: if answer.is_ok() {
                    CallStatus::Ok
                } else {
                    CallStatus::Error
                },
                http: answer.http,
                content_type: answer.content_type.to_owned(),
                state: answer.state,
                found: answer.found,
                tokens_in: None,
                tokens_out: None,
                body: answer.body.into(),
            }),
            Ok(None) => {
                let message = format!("no store serves {:?}", request.service);
                ServiceOutcome::Answer(Answer::error(400, "unknown_service", &message))
            }
            Err(error @ crate::Error::State(_)) => {
                let message = chain(&error);
                tracing::error!(
                    seq = stored.seq,
                    message,
                    "a call works on a state that nobody has"
                );
                ServiceOutcome::Answer(Answer::error(500, "state_lost", &message))
            }
            Err(crate::Error::Home(error)) => {
                // It was tried again already, as long as the client of the home found that right.
                let message = chain(&error);
                tracing::warn!(seq = stored.seq, message, "a store's home cannot be used");
                let (http, code) = error.told();
                ServiceOutcome::Answer(Answer::error(http, code, &message))
            }
            Err(error) => ServiceOutcome::RetryAfter(RETRY_PAUSE, chain(&error)),
        }
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
