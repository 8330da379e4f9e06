//! What the tests of this module share.

use crate::backend::{Backend, Raw, RawDelivery, RawPuller};
use crate::local::{LocalBus, LocalOptions};
use crate::streams::StreamName;
use crate::{BucketSpec, QueueSpec};
use bytes::Bytes;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use vlinder_core::Namespace;

/// Deadline of anything that a test waits for.
pub(super) const SOON: Duration = Duration::from_secs(20);
/// A bucket without a time to live.
pub(super) const BUCKET: BucketSpec = BucketSpec {
    name: "things",
    ttl: None,
};
/// The subject of the tests' requests.
pub(super) const REQ: &str = "vlinder.v1.default.req.a.b._";

pub(super) fn log() -> StreamName {
    StreamName::Log(Namespace::default_ns())
}

pub(super) fn options(dir: &Path) -> LocalOptions {
    LocalOptions::new(dir.join("bus.db"))
}

/// Opens a bus with the log, the queue `work` on all requests, and a bucket.
pub(super) async fn open_with(options: LocalOptions) -> Arc<LocalBus> {
    let bus = LocalBus::open(options).await.unwrap();
    bus.ensure_stream(&log()).await.unwrap();
    bus.ensure_queue(&work()).await.unwrap();
    bus.ensure_bucket(&BUCKET).await.unwrap();
    bus
}

pub(super) async fn open(dir: &Path) -> Arc<LocalBus> {
    open_with(options(dir)).await
}

pub(super) fn work() -> QueueSpec {
    QueueSpec {
        stream: log(),
        name: "work".into(),
        filter: "vlinder.v1.default.req.>".into(),
        from_start: true,
    }
}

pub(super) fn raw(subject: &str, id: impl ToString, body: impl Into<Bytes>) -> Raw {
    Raw {
        subject: subject.to_owned(),
        headers: vec![("Vlinder-Kind".into(), "request".into())],
        body: body.into(),
        id: id.to_string(),
        expect_last: None,
    }
}

/// Appends a request whose id and body are `n`; returns its sequence.
pub(super) async fn request(bus: &LocalBus, n: u64) -> u64 {
    let message = raw(REQ, n, n.to_string());
    bus.append(&log(), &message).await.unwrap().seq
}

pub(super) async fn puller(bus: &LocalBus) -> Box<dyn RawPuller> {
    bus.puller(&log(), "work").await.unwrap()
}

pub(super) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    let outcome = tokio::time::timeout(SOON, future).await;
    outcome.unwrap_or_else(|_| panic!("{what} did not happen within {SOON:?}"))
}

/// The next delivery.
pub(super) async fn pull(puller: &mut Box<dyn RawPuller>) -> RawDelivery {
    soon("a delivery", puller.next(1)).await.unwrap().remove(0)
}

/// Whether a future is still waiting after everything that can happen now has happened.
pub(super) async fn waits<F: Future + Unpin>(future: &mut F) -> bool {
    for _ in 0..50 {
        tokio::task::yield_now().await;
        if futures::poll!(&mut *future).is_ready() {
            return false;
        }
    }
    true
}
