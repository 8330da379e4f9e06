//! What the tests share: messages, namespaces, waits with deadlines.

use crate::fixture::Fixture;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use std::fmt::Debug;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use vlinder_bus::backend::{Backend, Raw, RawAppended, RawDelivery, RawPuller, RawStored};
use vlinder_bus::{Bus, Error, QueueSpec, StreamName};
use vlinder_core::Namespace;

/// Nothing here takes so long unless it is broken.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// "At once", on a busy machine with two cores, and far from any timeout it could be mistaken for.
pub const AT_ONCE: Duration = Duration::from_millis(1000);

pub fn log() -> StreamName {
    StreamName::Log(Namespace::default_ns())
}

/// Sets a backend up for its namespace, trying while a cluster finds its leaders.
pub async fn prepared<F: Fixture>() -> (F, Arc<dyn Backend>) {
    let fixture = F::start().await;
    let backend = fixture.connect().await;
    prepare(&backend).await;
    (fixture, backend)
}

pub async fn prepare(backend: &Arc<dyn Backend>) {
    let bus = Bus::new(backend.clone());
    retried(async || bus.prepare(&Namespace::default_ns()).await).await;
}

/// Repeats what is safe to repeat while the bus is away.
pub async fn retried<T>(mut what: impl AsyncFnMut() -> Result<T, Error>) -> T {
    let until = tokio::time::Instant::now() + PATIENCE + PATIENCE;
    loop {
        match what().await {
            Ok(done) => return done,
            Err(error) if error.is_retryable() && tokio::time::Instant::now() < until => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// A message with that text as its body and its id.
pub fn raw(subject: &str, text: &str) -> Raw {
    Raw {
        subject: subject.to_owned(),
        headers: vec![("Name".to_owned(), text.to_owned())],
        body: Bytes::from(text.to_owned()),
        id: text.to_owned(),
        expect_last: None,
    }
}

pub fn expecting(subject: &str, text: &str, last: u64) -> Raw {
    Raw {
        expect_last: Some(last),
        ..raw(subject, text)
    }
}

pub fn text(stored: &RawStored) -> &str {
    std::str::from_utf8(&stored.body).expect("tests send text")
}

pub async fn append(backend: &Arc<dyn Backend>, subject: &str, text: &str) -> RawAppended {
    backend
        .append(&log(), &raw(subject, text))
        .await
        .expect("it is stored")
}

/// Waits for a value, but not for ever.
pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    within(PATIENCE, what).await
}

pub async fn within<T>(limit: Duration, what: impl Future<Output = T>) -> T {
    match tokio::time::timeout(limit, what).await {
        Ok(value) => value,
        Err(_) => panic!("nothing within {limit:?}"),
    }
}

/// The next item of a stream that must not end.
pub async fn next<T>(stream: &mut (impl Stream<Item = T> + Unpin)) -> T {
    soon(stream.next()).await.expect("the stream goes on")
}

pub async fn take<T>(stream: &mut (impl Stream<Item = T> + Unpin), count: usize) -> Vec<T> {
    let mut taken = Vec::with_capacity(count);
    while taken.len() < count {
        taken.push(next(stream).await);
    }
    taken
}

/// Asserts that nothing comes for so long. The one place where a test has to wait out a time.
pub async fn silence<T: Debug>(limit: Duration, what: impl Future<Output = T>) {
    if let Ok(came) = tokio::time::timeout(limit, what).await {
        panic!("nothing should have come, but {came:?} did");
    }
}

/// Followed messages as far as the log goes.
pub type Followed = BoxStream<'static, Result<RawStored, Error>>;

pub async fn take_followed(follow: &mut Followed, count: usize) -> Vec<RawStored> {
    let taken = take(follow, count).await;
    taken
        .into_iter()
        .map(|item| item.expect("it can be read"))
        .collect()
}

/// A queue on the log.
pub fn queue(name: &str, filter: &str) -> QueueSpec {
    QueueSpec {
        stream: log(),
        name: name.to_owned(),
        filter: filter.to_owned(),
        from_start: true,
    }
}

/// Makes a queue and pulls from it.
pub async fn pulling(backend: &Arc<dyn Backend>, spec: &QueueSpec) -> Box<dyn RawPuller> {
    backend.ensure_queue(spec).await.expect("the queue is made");
    puller(backend, &spec.name).await
}

pub async fn puller(backend: &Arc<dyn Backend>, name: &str) -> Box<dyn RawPuller> {
    backend
        .puller(&log(), name)
        .await
        .expect("the queue can be pulled from")
}

/// One delivery.
pub async fn one(puller: &mut Box<dyn RawPuller>) -> RawDelivery {
    let mut got = soon(puller.next(1)).await.expect("work comes");
    assert_eq!(got.len(), 1, "asked for one");
    got.remove(0)
}

/// Waits until a condition on a value holds; shows the last value if it never does. The value has
/// no way to announce a change, so it is asked for again.
pub async fn eventually<T: Debug>(
    what: &str,
    mut value: impl AsyncFnMut() -> T,
    holds: impl Fn(&T) -> bool,
) -> T {
    let until = tokio::time::Instant::now() + PATIENCE;
    loop {
        let now = value().await;
        if holds(&now) {
            return now;
        }
        assert!(tokio::time::Instant::now() < until, "not {what}: {now:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
