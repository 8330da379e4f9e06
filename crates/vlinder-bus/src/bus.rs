//! [`Bus`]: nodes in, nodes out, over any backend. Retries, read-back and blobs live here, once.

use crate::backend::{
    Backend, KvEntry, KvEvent, QueueInfo, QueueSpec, Raw, RawStored, Signal, StreamInfo, Verdict,
};
use crate::delivery::Puller;
use crate::ends::Ends;
use crate::error::Error;
use crate::heal::Heights;
use crate::streams::{BUCKETS, INLINE_BODY_MAX, StreamName};
use crate::subjects::Subject;
use crate::wire::{self, Body, Notes, Stored};
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use rand::Rng;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use vlinder_core::{BODY_BYTES_MAX, ContentHash, Namespace, Node, NodeHash, SubmissionId};

/// How long an append tries before it reports that the outcome is unknown: longer than a
/// replicated log needs to choose a new leader (4 to 9 s) or a server to be restarted.
pub const APPEND_DEADLINE: Duration = Duration::from_secs(30);
/// First and longest pause between two tries of one operation.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// Messages on one subject among which the first is looked for. More than one is there only after a
/// loss, or where writers that knew nothing of each other raced.
const RIVALS_MAX: usize = 64;
/// Messages read at once when a subject is read whole.
const RANGE_BATCH: usize = 256;

/// What must hold for an append to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Nothing; repeats of the message id within the dedup window are swallowed.
    Any,
    /// The last message on the subject has this sequence; 0 = the subject is empty.
    Last(u64),
}

/// A node to append.
#[derive(Debug, Clone)]
pub struct Message {
    /// Which stream stores it.
    pub stream: StreamName,
    /// Where.
    pub subject: Subject,
    /// What it says.
    pub node: Node,
    /// Its body; must hash to `node.body_hash`.
    pub body: Bytes,
    /// Annotations.
    pub notes: Notes,
    /// Message id: `<kind>:<node hash>[:attempt]` unless there is a reason.
    pub id: String,
    /// What must hold.
    pub expect: Expect,
}

impl Message {
    /// A message with the usual id and no expectation.
    pub fn new(stream: StreamName, subject: Subject, node: Node, body: Bytes) -> Self {
        let id = format!("{}:{}", node.kind, node.hash());
        Self {
            stream,
            subject,
            node,
            body,
            notes: Notes::new(),
            id,
            expect: Expect::Any,
        }
    }

    /// Stores only if the last message on the subject has this sequence.
    pub fn expecting(mut self, last: u64) -> Self {
        self.expect = Expect::Last(last);
        self
    }

    /// Adds an annotation.
    pub fn note(mut self, name: &str, value: impl ToString) -> Self {
        self.notes.insert(name.to_owned(), value.to_string());
        self
    }
}

/// The confirmation of an append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// Where it is stored; for a duplicate, where the first one is.
    pub seq: u64,
    /// The node's hash.
    pub hash: NodeHash,
    /// Nothing new was stored: the message id was known.
    pub duplicate: bool,
}

/// Nodes in log order. An undecodable message is an `Err` item; the stream goes on after it.
pub type Follow = BoxStream<'static, Result<Stored, Error>>;
/// Nodes as they are stored; live, can miss some when the connection is lost.
pub type Seen = BoxStream<'static, Stored>;

/// Moments from which on live messages are heard again that may have been missed before.
pub struct Gaps(Option<watch::Receiver<u64>>);

impl Gaps {
    /// Waits for the next one: whoever waits for a live message looks into the log now. For ever
    /// where nothing live is ever lost. Cancel-safe.
    pub async fn next(&mut self) {
        if let Some(connections) = &mut self.0
            && connections.changed().await.is_ok()
        {
            return;
        }
        std::future::pending().await
    }
}

/// A handle on the bus; cheap to clone.
#[derive(Clone)]
pub struct Bus {
    pub(crate) backend: Arc<dyn Backend>,
    /// Log clock minus local clock, in milliseconds, as last seen.
    skew_ms: Arc<AtomicI64>,
    /// How far each stream was seen to reach.
    pub(crate) heights: Arc<Heights>,
    ends: Arc<Ends>,
}

impl Bus {
    /// A bus over a connected backend.
    pub fn new(backend: Arc<dyn Backend>) -> Self {
        Self {
            backend,
            skew_ms: Arc::new(AtomicI64::new(0)),
            heights: Arc::default(),
            ends: Arc::default(),
        }
    }

    /// The backend, for what is not about nodes.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// Makes the streams of a namespace, the common ones and the buckets, where missing.
    pub async fn prepare(&self, ns: &Namespace) -> Result<(), Error> {
        for stream in [
            StreamName::Ctl(ns.clone()),
            StreamName::Log(ns.clone()),
            StreamName::Sys,
        ] {
            self.retry(|| self.backend.ensure_stream(&stream)).await?;
        }
        for (name, ttl) in BUCKETS {
            let spec = crate::BucketSpec { name, ttl };
            self.retry(|| self.backend.ensure_bucket(&spec)).await?;
        }
        Ok(())
    }

    /// Bus time: milliseconds since the Unix epoch by the log's clock, as far as it is known here.
    pub fn now_ms(&self) -> u64 {
        local_ms().saturating_add_signed(self.skew_ms.load(Ordering::Relaxed))
    }

    pub(crate) fn learn_time(&self, stored_ms: u64) {
        let skew = stored_ms as i64 - local_ms() as i64;
        // A fresh message is at most a little older than now; an old one says nothing.
        if skew > self.skew_ms.load(Ordering::Relaxed) || skew.abs() < 1000 {
            self.skew_ms.store(skew, Ordering::Relaxed);
        }
    }

    /// Appends a node. Retries through outages up to [`APPEND_DEADLINE`], and finds out by reading
    /// back whether an earlier try whose answer was lost had succeeded (design.md rule 8).
    pub async fn append(&self, message: Message) -> Result<Appended, Error> {
        let hash = message.node.hash();
        let len = message.body.len() as u64;
        if len > BODY_BYTES_MAX {
            return Err(Error::TooLarge {
                len,
                max: BODY_BYTES_MAX,
            });
        }
        debug_assert_eq!(message.node.body_len, len);
        let in_blob = message.body.len() > INLINE_BODY_MAX;
        if in_blob {
            let name = message.node.body_hash.to_string();
            self.retry(|| self.backend.blob_put(&name, message.body.clone()))
                .await?;
        }
        let raw = Raw {
            subject: message.subject.to_string(),
            headers: wire::encode(&message.node, &hash, &message.notes, in_blob),
            body: if in_blob { Bytes::new() } else { message.body },
            id: message.id,
            expect_last: match message.expect {
                Expect::Any => None,
                Expect::Last(seq) => Some(seq),
            },
        };
        self.append_raw(&message.stream, &raw, hash).await
    }

    pub(crate) async fn append_raw(
        &self,
        stream: &StreamName,
        raw: &Raw,
        hash: NodeHash,
    ) -> Result<Appended, Error> {
        let mut earlier_try_may_have_succeeded = false;
        let mut pauses = Pauses::new();
        loop {
            match self.backend.append(stream, raw).await {
                Ok(done) if done.duplicate && raw.expect_last.is_some() => {
                    // The id was known: a retry of a success, or somebody else's equal node.
                    return Ok(Appended {
                        seq: done.seq,
                        hash,
                        duplicate: true,
                    });
                }
                Ok(done) => {
                    self.heights.saw(stream, done.seq);
                    return Ok(Appended {
                        seq: done.seq,
                        hash,
                        duplicate: done.duplicate,
                    });
                }
                Err(Error::Conflict { subject }) => {
                    if !earlier_try_may_have_succeeded {
                        return Err(Error::Conflict { subject });
                    }
                    return match self.winner_after(stream, raw).await? {
                        Some(winner) if winner.hash == hash => Ok(Appended {
                            seq: winner.seq,
                            hash,
                            duplicate: true,
                        }),
                        _ => Err(Error::Conflict { subject }),
                    };
                }
                Err(error) if error.is_retryable() => {
                    earlier_try_may_have_succeeded = true;
                    if !pauses.pause().await {
                        return Err(error);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The message that took the place which `raw` wanted: the first one on its subject after the
    /// sequence it expected to be last.
    async fn winner_after(&self, stream: &StreamName, raw: &Raw) -> Result<Option<Stored>, Error> {
        let from = raw.expect_last.unwrap_or(0) + 1;
        let found = self
            .retry(|| self.backend.range(stream, &raw.subject, from, 1))
            .await?;
        found.first().map(wire::decode).transpose()
    }

    /// Retries what is safe to repeat, through outages, up to [`APPEND_DEADLINE`].
    async fn retry<T, F>(&self, mut operation: impl FnMut() -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut pauses = Pauses::new();
        loop {
            match operation().await {
                Err(error) if error.is_retryable() => {
                    if !pauses.pause().await {
                        return Err(error);
                    }
                }
                outcome => return outcome,
            }
        }
    }

    /// Returns when everything up to `seq` is durable. To be awaited before anything that follows
    /// from the message leaves the process: a call to an agent or an upstream, an answer to a
    /// client. Immediate on backends that confirm only what is durable.
    pub async fn settled(&self, stream: &StreamName, seq: u64) -> Result<(), Error> {
        self.backend.settled(stream, seq).await
    }

    /// The last node on a subject, from the leader.
    pub async fn last(
        &self,
        stream: &StreamName,
        subject: &Subject,
    ) -> Result<Option<Stored>, Error> {
        let text = subject.to_string();
        let found = self.retry(|| self.backend.last(stream, &text)).await?;
        found.as_ref().map(wire::decode).transpose()
    }

    /// The sequence of the last message whose subject matches `filter`, from the leader; 0 if there is
    /// none. Whoever has read so far has everything that was confirmed before the call.
    pub async fn last_seq(&self, stream: &StreamName, filter: &str) -> Result<u64, Error> {
        let found = self.retry(|| self.backend.last(stream, filter)).await?;
        Ok(found.map_or(0, |stored| stored.seq))
    }

    /// A node by its sequence.
    pub async fn get(&self, stream: &StreamName, seq: u64) -> Result<Option<Stored>, Error> {
        let found = self.retry(|| self.backend.get(stream, seq)).await?;
        found.as_ref().map(wire::decode).transpose()
    }

    /// Up to `max` nodes that match `filter` from sequence `from` on. Undecodable ones are left out
    /// with a warning.
    pub async fn range(
        &self,
        stream: &StreamName,
        filter: &str,
        from: u64,
        max: usize,
    ) -> Result<Vec<Stored>, Error> {
        let found = self
            .retry(|| self.backend.range(stream, filter, from, max))
            .await?;
        Ok(found.into_iter().filter_map(decode_or_warn).collect())
    }

    /// Every node on a subject, in order, at most `max`.
    pub async fn all_on(
        &self,
        stream: &StreamName,
        subject: &Subject,
        max: usize,
    ) -> Result<Vec<Stored>, Error> {
        let filter = subject.to_string();
        let mut all: Vec<Stored> = Vec::new();
        let mut from = 1;
        loop {
            let want = RANGE_BATCH.min(max - all.len());
            let raw = self
                .retry(|| self.backend.range(stream, &filter, from, want))
                .await?;
            let got = raw.len();
            if let Some(last) = raw.last() {
                from = last.seq + 1;
            }
            all.extend(raw.into_iter().filter_map(decode_or_warn));
            if got < want || all.len() >= max {
                return Ok(all);
            }
        }
    }

    /// The first node on a subject, the one that counts where only one may: first by
    /// [`Stored::rank`], so that what was lost and given back comes before what was made meanwhile.
    pub async fn first(
        &self,
        stream: &StreamName,
        subject: &Subject,
    ) -> Result<Option<Stored>, Error> {
        let rivals = self.all_on(stream, subject, RIVALS_MAX).await?;
        Ok(rivals.into_iter().min_by_key(Stored::rank))
    }

    /// Every node that matches `filter` from sequence `from` on, then what comes.
    pub async fn follow(
        &self,
        stream: &StreamName,
        filter: &str,
        from: u64,
    ) -> Result<Follow, Error> {
        let bus = self.clone();
        let raw = self
            .retry(|| self.backend.follow(stream, filter, from))
            .await?;
        Ok(raw
            .map(move |item| {
                let stored = item?;
                bus.learn_time(stored.time_ms);
                wire::decode(&stored)
            })
            .boxed())
    }

    /// Tells one connection from the next; what was learned on an earlier one may have been lost since.
    pub fn connection(&self) -> u64 {
        let connections = self.backend.connections();
        connections.map_or(0, |connections| *connections.borrow())
    }

    /// When the present connection was made, in bus time; 0 where there is none to lose. A server that was
    /// killed may have forgotten deliveries of what was stored before, and count them from one again.
    pub fn connected_at_ms(&self) -> u64 {
        let connections = self.backend.connections();
        let at = connections.map_or(0, |connections| *connections.borrow());
        match at {
            0 => 0,
            at => at.saturating_add_signed(self.skew_ms.load(Ordering::Relaxed)),
        }
    }

    /// When live messages may have been missed, from now on. To be called before [`Bus::seen`].
    pub fn gaps(&self) -> Gaps {
        let mut connections = self.backend.connections();
        if let Some(connections) = &mut connections {
            connections.mark_unchanged();
        }
        Gaps(connections)
    }

    /// Nodes as they are stored on subjects that match the stored-subject `filter`, from now on.
    pub async fn seen(&self, filter: &str) -> Result<Seen, Error> {
        let bus = self.clone();
        let raw = self.backend.seen(filter).await?;
        Ok(raw
            .filter_map(move |stored| {
                bus.learn_time(stored.time_ms);
                futures::future::ready(decode_or_warn(stored))
            })
            .boxed())
    }

    /// The end of a turn as it is stored, from now on; like [`Bus::seen`], but any number of waits share
    /// one subscription.
    pub async fn seen_end(&self, ns: &Namespace, submission: &SubmissionId) -> Result<Seen, Error> {
        let bus = self.clone();
        let ends = self.ends.of(&*self.backend, ns, submission).await?;
        Ok(ends
            .inspect(move |stored| bus.learn_time(stored.time_ms))
            .boxed())
    }

    /// How a stream is now.
    pub async fn stream_info(&self, stream: &StreamName) -> Result<StreamInfo, Error> {
        self.retry(|| self.backend.stream_info(stream)).await
    }

    /// The body of a node, from the message or the blob store.
    pub async fn load(&self, body: &Body) -> Result<Bytes, Error> {
        match body {
            Body::Inline(bytes) => Ok(bytes.clone()),
            Body::Blob { hash, len } => {
                let name = hash.to_string();
                self.retry(|| self.backend.blob_get(&name, *len)).await
            }
        }
    }

    /// Stores bytes under their hash.
    pub async fn blob_put(&self, bytes: Bytes) -> Result<ContentHash, Error> {
        let hash = ContentHash::of(&bytes);
        let name = hash.to_string();
        self.retry(|| self.backend.blob_put(&name, bytes.clone()))
            .await?;
        Ok(hash)
    }

    /// Reads bytes by their hash; at most `len_max`.
    pub async fn blob_get(&self, hash: &ContentHash, len_max: u64) -> Result<Bytes, Error> {
        let name = hash.to_string();
        self.retry(|| self.backend.blob_get(&name, len_max)).await
    }

    /// Creates a queue if it is missing.
    pub async fn ensure_queue(&self, spec: &QueueSpec) -> Result<(), Error> {
        self.retry(|| self.backend.ensure_queue(spec)).await
    }

    /// Deletes a queue.
    pub async fn delete_queue(&self, stream: &StreamName, name: &str) -> Result<(), Error> {
        self.retry(|| self.backend.delete_queue(stream, name)).await
    }

    /// How the queues of a stream are now.
    pub async fn queues(&self, stream: &StreamName) -> Result<Vec<QueueInfo>, Error> {
        self.retry(|| self.backend.queues(stream)).await
    }

    /// Begins to pull from a queue.
    pub async fn puller(&self, stream: &StreamName, queue: &str) -> Result<Puller, Error> {
        let raw = self.retry(|| self.backend.puller(stream, queue)).await?;
        Ok(Puller::new(self.clone(), stream.clone(), raw))
    }

    /// Hands a delivery back by its token; for a process that never held it.
    pub async fn hand_back(&self, token: &str, delay: Duration) -> Result<(), Error> {
        self.backend.verdict(token, Verdict::Nak(delay)).await
    }

    /// Reads a kv entry.
    pub async fn kv_get(&self, bucket: &str, key: &str) -> Result<Option<KvEntry>, Error> {
        self.retry(|| self.backend.kv_get(bucket, key)).await
    }

    /// Writes a kv entry; see [`Backend::kv_put`]. Not retried when it carries an expectation.
    pub async fn kv_put(
        &self,
        bucket: &str,
        key: &str,
        value: Bytes,
        expect: Option<u64>,
    ) -> Result<u64, Error> {
        if expect.is_some() {
            return self.backend.kv_put(bucket, key, value, expect).await;
        }
        self.retry(|| self.backend.kv_put(bucket, key, value.clone(), None))
            .await
    }

    /// Deletes a kv entry.
    pub async fn kv_delete(
        &self,
        bucket: &str,
        key: &str,
        expect: Option<u64>,
    ) -> Result<(), Error> {
        self.backend.kv_delete(bucket, key, expect).await
    }

    /// Watches a bucket.
    pub async fn kv_watch(
        &self,
        bucket: &str,
    ) -> Result<BoxStream<'static, Result<KvEvent, Error>>, Error> {
        self.retry(|| self.backend.kv_watch(bucket)).await
    }

    /// Sends a signal.
    pub async fn signal(&self, subject: &str, body: Bytes) -> Result<(), Error> {
        self.backend.signal(subject, body).await
    }

    /// Listens to signals.
    pub async fn signals(&self, filter: &str) -> Result<BoxStream<'static, Signal>, Error> {
        self.backend.signals(filter).await
    }

    /// One round trip to the bus.
    pub async fn ping(&self) -> Result<Duration, Error> {
        self.backend.ping().await
    }

    /// Flushes and closes.
    pub async fn close(&self) {
        self.backend.close().await;
    }

    /// Stores a raw message that carries no node, e.g. a dead letter.
    pub(crate) async fn append_plain(&self, stream: &StreamName, raw: &Raw) -> Result<u64, Error> {
        self.retry(|| self.backend.append(stream, raw))
            .await
            .map(|done| done.seq)
    }

    /// Reads raw messages, e.g. dead letters.
    pub(crate) async fn range_plain(
        &self,
        stream: &StreamName,
        filter: &str,
        from: u64,
        max: usize,
    ) -> Result<Vec<RawStored>, Error> {
        self.retry(|| self.backend.range(stream, filter, from, max))
            .await
    }
}

fn decode_or_warn(raw: RawStored) -> Option<Stored> {
    wire::decode(&raw)
        .inspect_err(|error| tracing::warn!(%error, "left out"))
        .ok()
}

fn local_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    since.as_millis() as u64
}

/// Exponential pauses with jitter, under one deadline.
struct Pauses {
    next: Duration,
    until: tokio::time::Instant,
}

impl Pauses {
    fn new() -> Self {
        Self {
            next: RETRY_PAUSE.0,
            until: tokio::time::Instant::now() + APPEND_DEADLINE,
        }
    }

    /// Waits a little; `false` when the deadline has passed.
    async fn pause(&mut self) -> bool {
        if tokio::time::Instant::now() >= self.until {
            return false;
        }
        let jittered = self.next.mul_f64(rand::rng().random_range(0.5..1.0));
        tokio::time::sleep(jittered).await;
        self.next = (self.next * 2).min(RETRY_PAUSE.1);
        true
    }
}
