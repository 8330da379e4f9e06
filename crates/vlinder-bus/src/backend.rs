//! What a backend does. It moves raw messages and knows nothing of the record; [`crate::Bus`] adds
//! that. One contract suite (`tests/contract`) holds for every backend.

use crate::error::Error;
use crate::streams::StreamName;
use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use std::time::Duration;
use tokio::sync::watch;

/// Headers. Names are case-sensitive; their order is not kept, that of equal names is.
pub type Headers = Vec<(String, String)>;

/// A message as it is sent.
#[derive(Debug, Clone)]
pub struct Raw {
    /// Full subject.
    pub subject: String,
    /// Metadata.
    pub headers: Headers,
    /// The body, at most [`crate::streams::INLINE_BODY_MAX`] bytes (the bus sees to it).
    pub body: Bytes,
    /// Message id: a second message with the same id within the dedup window is not stored.
    pub id: String,
    /// Store only if the last message on the subject has this sequence; 0 = there is none.
    pub expect_last: Option<u64>,
}

/// A message as it was stored.
#[derive(Debug, Clone)]
pub struct RawStored {
    /// Full subject (never the republished form).
    pub subject: String,
    /// Metadata, without the backend's own headers.
    pub headers: Headers,
    /// The body.
    pub body: Bytes,
    /// Sequence in its stream, from 1.
    pub seq: u64,
    /// When it was stored, by the log's clock: milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// On a live subscription: sequence of the message before it on the same subject (0: none).
    pub previous_on_subject: u64,
}

/// The confirmation of an append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawAppended {
    /// Where it was stored; for a duplicate, where the first one was.
    pub seq: u64,
    /// The id had been seen: nothing new was stored.
    pub duplicate: bool,
}

/// A message handed to a worker.
#[derive(Debug, Clone)]
pub struct RawDelivery {
    /// The message.
    pub stored: RawStored,
    /// How often it was delivered, from 1. A hint: it can be wrong after a crash of the server.
    pub delivered: u64,
    /// What acknowledges it. Plain text, so that another process can hand the work back.
    pub token: String,
}

/// What can be said of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Done: never again. Confirmed by the server before the call returns.
    Ack,
    /// Still at it: not to another worker yet. Fire and forget.
    Progress,
    /// Hand it to another worker after the delay. Fire and forget.
    Nak(Duration),
    /// Never again, though not done (a dead letter was stored before). Confirmed.
    Terminate,
}

/// A stream as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamInfo {
    /// When it was created, by the log's clock: tells a restored or re-made stream from the old one.
    pub created_ms: u64,
    /// First sequence that is still there (1 if none ever was trimmed; last + 1 if empty).
    pub first_seq: u64,
    /// Last sequence that was given out.
    pub last_seq: u64,
    /// Stored messages.
    pub messages: u64,
    /// Stored bytes.
    pub bytes: u64,
    /// The limit in bytes.
    pub max_bytes: u64,
}

/// A durable queue: a view on a stream's subjects with an acknowledged position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueSpec {
    /// The stream it reads.
    pub stream: StreamName,
    /// Durable name.
    pub name: String,
    /// One subject filter.
    pub filter: String,
    /// Deliver what the stream holds already (`true`), or only what comes after its creation.
    pub from_start: bool,
}

/// A queue as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueInfo {
    /// Durable name.
    pub name: String,
    /// Its filter.
    pub filter: String,
    /// Messages that nobody has been given yet.
    pub waiting: u64,
    /// Messages given out and not acknowledged.
    pub held: u64,
    /// Age of the oldest unacknowledged message in milliseconds, where known.
    pub oldest_ms: Option<u64>,
}

/// A kv bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BucketSpec {
    /// Its name.
    pub name: &'static str,
    /// Entries vanish so long after their last write.
    pub ttl: Option<Duration>,
}

/// A kv entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvEntry {
    /// Key: `[A-Za-z0-9_=.-]+`.
    pub key: String,
    /// Value.
    pub value: Bytes,
    /// Revision, for compare-and-set; grows with every write to the bucket.
    pub revision: u64,
    /// When it was written, by the log's clock, milliseconds since the Unix epoch.
    pub time_ms: u64,
}

/// What a kv watch tells: first every entry that exists, then `Current`, then changes as they come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvEvent {
    /// Written.
    Put(KvEntry),
    /// Deleted or expired.
    Gone {
        /// Its key.
        key: String,
    },
    /// All that existed when the watch began has been told.
    Current,
}

/// A signal: not stored, may be lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signal {
    /// Its subject.
    pub subject: String,
    /// Its bytes.
    pub body: Bytes,
}

/// One worker's pull from one queue. Dropping it hands back whatever it was given meanwhile.
#[async_trait]
pub trait RawPuller: Send {
    /// Waits until there is work and returns at most `max` deliveries (`max` ≥ 1). Asks the server
    /// for no more than that, so that nothing ages in a buffer. Cancel-safe: if the future is
    /// dropped, what arrives late is handed back at once or returned by the next call.
    async fn next(&mut self, max: usize) -> Result<Vec<RawDelivery>, Error>;
    /// Stops asking and hands back at once what arrived and was not returned.
    async fn stop(&mut self);
}

/// A backend of the bus.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// `nats` or `local`.
    fn name(&self) -> &'static str;

    /// Creates a stream if it is missing and brings its limits up to date if they differ.
    async fn ensure_stream(&self, stream: &StreamName) -> Result<(), Error>;
    /// How a stream is now, from its leader.
    async fn stream_info(&self, stream: &StreamName) -> Result<StreamInfo, Error>;

    /// One try to append. `Conflict` if the expectation does not hold; `Timeout` and `Unreachable`
    /// leave the outcome unknown.
    async fn append(&self, stream: &StreamName, raw: &Raw) -> Result<RawAppended, Error>;
    /// Returns when everything up to `seq` is as durable as it gets. Immediate where an append
    /// is confirmed only then anyway.
    async fn settled(&self, stream: &StreamName, seq: u64) -> Result<(), Error>;
    /// A message by its sequence.
    async fn get(&self, stream: &StreamName, seq: u64) -> Result<Option<RawStored>, Error>;
    /// The last message whose subject matches, from the leader: sees every confirmed append.
    async fn last(&self, stream: &StreamName, filter: &str) -> Result<Option<RawStored>, Error>;
    /// Up to `max` messages that match `filter`, from sequence `from` on, in order. Sees every append confirmed before.
    async fn range(
        &self,
        stream: &StreamName,
        filter: &str,
        from: u64,
        max: usize,
    ) -> Result<Vec<RawStored>, Error>;
    /// Everything that matches `filter` from sequence `from` on, then what comes, in order and
    /// without gaps, across reconnects. Ends only with the bus or with an error. Only what is as
    /// durable as it gets: a projection's file must never know more than the log.
    async fn follow(
        &self,
        stream: &StreamName,
        filter: &str,
        from: u64,
    ) -> Result<BoxStream<'static, Result<RawStored, Error>>, Error>;
    /// What is stored on subjects that match `filter` from now on, in log order: live, made of
    /// no consumer. In force when the call returns, for what follows from anything that is sent
    /// after it; what others send in that moment without knowing of it may be missed where there are
    /// several servers. A lost connection can lose messages; the reader sees it by `previous_on_subject`, by
    /// [`Backend::connections`] or by its own backstop.
    async fn seen(&self, filter: &str) -> Result<BoxStream<'static, RawStored>, Error>;

    /// Creates a queue if it is missing. An existing one keeps its position.
    async fn ensure_queue(&self, spec: &QueueSpec) -> Result<(), Error>;
    /// Deletes a queue; fine if it does not exist.
    async fn delete_queue(&self, stream: &StreamName, name: &str) -> Result<(), Error>;
    /// How the queues of a stream are now.
    async fn queues(&self, stream: &StreamName) -> Result<Vec<QueueInfo>, Error>;
    /// Makes those queues again that stand past the end of a stream which lost everything behind `common`:
    /// they would pass new messages over in silence. Their names. To be called before anything is given back.
    async fn mend_queues(&self, stream: &StreamName, common: u64) -> Result<Vec<String>, Error>;
    /// Begins to pull. `Missing` if the queue does not exist.
    async fn puller(&self, stream: &StreamName, queue: &str) -> Result<Box<dyn RawPuller>, Error>;
    /// Says something about a delivery, by its token: also from a process that never held it.
    async fn verdict(&self, token: &str, verdict: Verdict) -> Result<(), Error>;

    /// Creates a bucket if it is missing.
    async fn ensure_bucket(&self, spec: &BucketSpec) -> Result<(), Error>;
    /// Reads an entry, from the leader.
    async fn kv_get(&self, bucket: &str, key: &str) -> Result<Option<KvEntry>, Error>;
    /// Writes an entry. `expect`: `None` = whatever is there, `Some(0)` = must not exist,
    /// `Some(r)` = must have revision `r`; else `KvConflict`. Returns the new revision.
    async fn kv_put(
        &self,
        bucket: &str,
        key: &str,
        value: Bytes,
        expect: Option<u64>,
    ) -> Result<u64, Error>;
    /// Deletes an entry, under the same expectation; fine if it does not exist and none is given.
    async fn kv_delete(&self, bucket: &str, key: &str, expect: Option<u64>) -> Result<(), Error>;
    /// Watches a bucket, across reconnects (after one it tells everything again, then `Current`).
    async fn kv_watch(
        &self,
        bucket: &str,
    ) -> Result<BoxStream<'static, Result<KvEvent, Error>>, Error>;

    /// Stores bytes under their SHA-256. Returns when they are stored.
    async fn blob_put(&self, hash: &str, bytes: Bytes) -> Result<(), Error>;
    /// Reads bytes by their SHA-256; checked. `Missing` if not there.
    async fn blob_get(&self, hash: &str, len_max: u64) -> Result<Bytes, Error>;

    /// Sends a signal. Returns when it is handed to the connection.
    async fn signal(&self, subject: &str, body: Bytes) -> Result<(), Error>;
    /// Listens to signals that match `filter`; bounded, drops the oldest and counts when the reader is slow.
    async fn signals(&self, filter: &str) -> Result<BoxStream<'static, Signal>, Error>;

    /// When the present connection was made, by the local clock in milliseconds since the Unix epoch;
    /// changes when a lost one is back and all that is live is heard again. `None` where there is
    /// nothing to lose.
    fn connections(&self) -> Option<watch::Receiver<u64>> {
        None
    }

    /// Whether the bus answers now: one round trip. The time it took.
    async fn ping(&self) -> Result<Duration, Error>;
    /// Flushes and closes.
    async fn close(&self);
}
