//! The bus over NATS JetStream.
//!
//! * [`connect`] makes the connection and refuses servers that are not fit; [`probe`] is for `doctor`.
//! * `link` is the connection, `fitness` what a server must be, `api` the JSON interface and its
//!   error codes, `message` the forms.
//! * `stream` appends and reads; `follow` reads for ever; `queue` and `puller` are the work queues;
//!   `pull` is what followers and pullers share; `kv`, `blob` and `signal` are the other facets.
//!
//! Guarantees, beyond those of [`Backend`]: no request waits longer than its named limit; a broken
//! connection ends open requests at once; pullers, followers and watches go on by themselves when
//! the server is back. It keeps no state of its own that a restart would lose.

mod api;
mod blob;
mod fitness;
mod follow;
mod kv;
mod link;
mod message;
mod pull;
mod puller;
mod queue;
mod signal;
mod stream;

pub use fitness::Probe;
pub use link::{NatsOptions, probe};

use crate::backend::{
    Backend, BucketSpec, KvEntry, KvEvent, QueueInfo, QueueSpec, Raw, RawAppended, RawPuller,
    RawStored, Signal, StreamInfo, Verdict,
};
use crate::error::Error;
use crate::streams::StreamName;
use async_trait::async_trait;
use bytes::Bytes;
use follow::{Ordered, Resume, Told};
use futures::StreamExt;
use futures::stream::BoxStream;
use link::Link;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{OnceCell, watch};
use tokio::time::Instant;

/// A connection to JetStream as a backend of the bus.
pub struct NatsBus {
    link: Link,
    replicas: usize,
    max_bytes: u64,
    server: Probe,
    blobs: OnceCell<()>,
}

/// Connects, trying until `deadline` has passed: `Unreachable` if nobody answers, `Unfit` at once if
/// the server is older than 2.11, has no JetStream or refuses the credentials.
pub async fn connect(options: NatsOptions, deadline: Duration) -> Result<Arc<NatsBus>, Error> {
    let (link, server) = link::connect(&options, deadline).await?;
    let found = match options.keep_replicas {
        true => stream::replicas(&link, &StreamName::Sys.as_text()).await?,
        false => None,
    };
    Ok(Arc::new(NatsBus {
        link,
        replicas: found.unwrap_or(options.replicas).max(1),
        max_bytes: options.max_bytes,
        server,
        blobs: OnceCell::new(),
    }))
}

impl NatsBus {
    /// The server as it was when the connection was made.
    pub fn server(&self) -> &Probe {
        &self.server
    }

    /// Whether there is a connection now; changes as it comes and goes.
    pub fn connected(&self) -> watch::Receiver<bool> {
        self.link.up.clone()
    }

    /// Messages and signals that were dropped because a reader was too slow.
    pub fn dropped(&self) -> u64 {
        self.link.dropped.load(Ordering::Relaxed)
    }

    /// The blob stream is made when the first blob is met.
    async fn blob_stream(&self) -> Result<(), Error> {
        let make = || blob::ensure(&self.link, self.max_bytes, self.replicas);
        self.blobs.get_or_try_init(make).await.map(|_| ())
    }
}

fn local_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_millis() as u64
}

#[async_trait]
impl Backend for NatsBus {
    fn name(&self) -> &'static str {
        "nats"
    }

    async fn ensure_stream(&self, stream: &StreamName) -> Result<(), Error> {
        let max_bytes = stream.max_bytes(self.max_bytes);
        let config = stream::config(stream, max_bytes, self.replicas);
        stream::ensure(&self.link, config).await
    }

    async fn stream_info(&self, stream: &StreamName) -> Result<StreamInfo, Error> {
        stream::info(&self.link, &stream.as_text()).await
    }

    async fn append(&self, stream: &StreamName, raw: &Raw) -> Result<RawAppended, Error> {
        message::check_subject(stream, &raw.subject)?;
        stream::append(&self.link, &stream.as_text(), raw).await
    }

    async fn settled(&self, _stream: &StreamName, _seq: u64) -> Result<(), Error> {
        Ok(())
    }

    async fn get(&self, stream: &StreamName, seq: u64) -> Result<Option<RawStored>, Error> {
        stream::get(&self.link, &stream.as_text(), self.replicas, seq).await
    }

    async fn last(&self, stream: &StreamName, filter: &str) -> Result<Option<RawStored>, Error> {
        stream::last(&self.link, &stream.as_text(), self.replicas, filter).await
    }

    async fn range(
        &self,
        stream: &StreamName,
        filter: &str,
        from: u64,
        max: usize,
    ) -> Result<Vec<RawStored>, Error> {
        let name = stream.as_text();
        stream::range(&self.link, &name, self.replicas, filter, from, max).await
    }

    async fn follow(
        &self,
        stream: &StreamName,
        filter: &str,
        from: u64,
    ) -> Result<BoxStream<'static, Result<RawStored, Error>>, Error> {
        let name = stream.as_text();
        let ordered = Ordered::open(&self.link, &name, filter, from, Resume::AfterLast).await?;
        let stored = futures::stream::unfold(Some(ordered), |ordered| async move {
            let mut ordered = ordered?;
            loop {
                match ordered.next().await {
                    Ok(Told::Began { .. }) => {}
                    Ok(Told::Message { stored, .. }) => return Some((Ok(stored), Some(ordered))),
                    Err(Error::Closed) => return None,
                    Err(error @ Error::Undecodable { .. }) => {
                        return Some((Err(error), Some(ordered)));
                    }
                    Err(error) => return Some((Err(error), None)),
                }
            }
        });
        Ok(stored.boxed())
    }

    async fn seen(&self, filter: &str) -> Result<BoxStream<'static, RawStored>, Error> {
        signal::seen(&self.link, filter).await
    }

    async fn ensure_queue(&self, spec: &QueueSpec) -> Result<(), Error> {
        queue::ensure(&self.link, spec).await
    }

    async fn delete_queue(&self, stream: &StreamName, name: &str) -> Result<(), Error> {
        queue::delete(&self.link, &stream.as_text(), name).await
    }

    async fn queues(&self, stream: &StreamName) -> Result<Vec<QueueInfo>, Error> {
        queue::list(&self.link, &stream.as_text()).await
    }

    async fn mend_queues(&self, stream: &StreamName, common: u64) -> Result<Vec<String>, Error> {
        queue::mend(&self.link, stream, common).await
    }

    async fn puller(&self, stream: &StreamName, queue: &str) -> Result<Box<dyn RawPuller>, Error> {
        let puller = puller::start(&self.link, stream, queue).await?;
        Ok(Box::new(puller))
    }

    async fn verdict(&self, token: &str, verdict: Verdict) -> Result<(), Error> {
        queue::verdict(&self.link, token, verdict).await
    }

    async fn ensure_bucket(&self, spec: &BucketSpec) -> Result<(), Error> {
        kv::ensure(&self.link, spec, self.replicas).await
    }

    async fn kv_get(&self, bucket: &str, key: &str) -> Result<Option<KvEntry>, Error> {
        kv::get(&self.link, bucket, key, self.replicas).await
    }

    async fn kv_put(
        &self,
        bucket: &str,
        key: &str,
        value: Bytes,
        expect: Option<u64>,
    ) -> Result<u64, Error> {
        kv::put(&self.link, bucket, key, value, expect, self.replicas).await
    }

    async fn kv_delete(&self, bucket: &str, key: &str, expect: Option<u64>) -> Result<(), Error> {
        kv::delete(&self.link, bucket, key, expect, self.replicas).await
    }

    async fn kv_watch(
        &self,
        bucket: &str,
    ) -> Result<BoxStream<'static, Result<KvEvent, Error>>, Error> {
        kv::watch(&self.link, bucket).await
    }

    async fn blob_put(&self, hash: &str, bytes: Bytes) -> Result<(), Error> {
        self.blob_stream().await?;
        blob::put(&self.link, self.replicas, hash, bytes).await
    }

    async fn blob_get(&self, hash: &str, len_max: u64) -> Result<Bytes, Error> {
        self.blob_stream().await?;
        blob::get(&self.link, self.replicas, hash, len_max).await
    }

    async fn signal(&self, subject: &str, body: Bytes) -> Result<(), Error> {
        self.link.require()?;
        self.link
            .publish("signal", subject.to_owned(), None, body)
            .await
    }

    async fn signals(&self, filter: &str) -> Result<BoxStream<'static, Signal>, Error> {
        signal::listen(&self.link, filter).await
    }

    fn connections(&self) -> Option<watch::Receiver<u64>> {
        Some(self.link.connections.clone())
    }

    async fn ping(&self) -> Result<Duration, Error> {
        let before = Instant::now();
        api::account(&self.link).await?;
        Ok(before.elapsed())
    }

    async fn close(&self) {
        self.link.close().await;
    }
}
