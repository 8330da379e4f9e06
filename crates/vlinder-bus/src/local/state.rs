//! What the embedded bus holds in memory, behind one short lock: streams, queues, buckets, live
//! subscribers, timers. Every change is queued for the writer under the same lock.

use super::dedup::Dedup;
use super::disk::Disk;
use super::filter::{Filter, FilterIndex};
use super::index::Index;
use super::kv::Bucket;
use super::live::Mailbox;
use super::queue::Queue;
use super::timers::{Due, Timers};
use super::writer::{Op, OpQueue};
use crate::backend::{Raw, RawAppended, RawStored};
use crate::error::Error;
use crate::streams::{DEDUP_WINDOW, StreamName};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{Notify, oneshot};

/// What a cached message costs beside its body and headers, in bytes.
const CACHED_OVERHEAD: usize = 256;

/// Why nothing works any more.
#[derive(Debug, Clone)]
pub(super) enum Down {
    /// Closed by this process.
    Closed,
    /// The store broke.
    Failed(String),
}

impl Down {
    pub(super) fn error(&self) -> Error {
        match self {
            Self::Closed => Error::Closed,
            Self::Failed(reason) => Error::Storage {
                reason: format!("{reason}; restart to go on from what was stored"),
            },
        }
    }
}

/// One stream.
pub(super) struct Stream {
    pub(super) id: i64,
    pub(super) name: StreamName,
    pub(super) created_ms: u64,
    /// What it stores.
    subjects: Vec<Filter>,
    pub(super) max_bytes: u64,
    pub(super) bytes: u64,
    pub(super) index: Index,
    pub(super) dedup: Dedup,
    /// Time of the last message; the log's clock never goes back.
    pub(super) last_ms: u64,
    /// Everything up to here is on disk.
    pub(super) committed: u64,
    /// Who waits until a sequence is on disk.
    pub(super) waits: BTreeMap<u64, Vec<oneshot::Sender<()>>>,
    /// Recent messages. All that are not committed are here.
    pub(super) cached: HashMap<u64, Arc<RawStored>>,
    /// Queues by what they want.
    pub(super) queues: FilterIndex<i64>,
    /// Followers by what they want: told of what is on disk.
    pub(super) followers: FilterIndex<Arc<Notify>>,
}

impl Stream {
    /// A stream without messages.
    pub(super) fn new(
        id: i64,
        name: StreamName,
        created_ms: u64,
        max_bytes: u64,
        index: Index,
    ) -> Result<Self, Error> {
        let subjects = name.subjects();
        let subjects = subjects.iter().map(|text| Filter::parse(text));
        Ok(Self {
            id,
            subjects: subjects.collect::<Result<_, _>>()?,
            name,
            created_ms,
            max_bytes,
            bytes: 0,
            index,
            dedup: Dedup::new(DEDUP_WINDOW.as_millis() as u64),
            last_ms: 0,
            committed: 0,
            waits: BTreeMap::new(),
            cached: HashMap::new(),
            queues: FilterIndex::default(),
            followers: FilterIndex::default(),
        })
    }
}

/// Messages in the order in which they were cached, over all streams.
#[derive(Default)]
pub(super) struct CacheOrder {
    order: VecDeque<(usize, u64, usize)>,
    bytes: usize,
}

/// A queue in the registry, with the key of its filter in its stream.
pub(super) struct QueueSlot {
    pub(super) queue: Queue,
    pub(super) key: super::filter::EntryKey,
}

/// See the module.
pub(super) struct State {
    pub(super) down: Option<Down>,
    pub(super) streams: Vec<Stream>,
    pub(super) stream_by_name: HashMap<StreamName, usize>,
    pub(super) queues: HashMap<i64, QueueSlot>,
    pub(super) queue_by_name: HashMap<(usize, String), i64>,
    pub(super) next_queue: i64,
    pub(super) buckets: Vec<Bucket>,
    pub(super) bucket_by_name: HashMap<String, usize>,
    pub(super) seen: FilterIndex<Arc<Mailbox<Arc<RawStored>>>>,
    pub(super) timers: Timers,
    pub(super) cache: CacheOrder,
    pub(super) cache_bytes_max: usize,
    pub(super) ops: Arc<OpQueue>,
    pub(super) disk: Arc<Disk>,
}

impl State {
    /// Nothing but the way to the writer.
    pub(super) fn new(ops: Arc<OpQueue>, disk: Arc<Disk>, cache_bytes_max: usize) -> Self {
        Self {
            down: None,
            streams: vec![],
            stream_by_name: HashMap::new(),
            queues: HashMap::new(),
            queue_by_name: HashMap::new(),
            next_queue: 1,
            buckets: vec![],
            bucket_by_name: HashMap::new(),
            seen: FilterIndex::default(),
            timers: Timers::default(),
            cache: CacheOrder::default(),
            cache_bytes_max,
            ops,
            disk,
        }
    }

    /// Fails when nothing works any more.
    pub(super) fn check(&self) -> Result<(), Error> {
        self.down.as_ref().map_or(Ok(()), |down| Err(down.error()))
    }

    /// The index of a stream.
    pub(super) fn stream(&self, name: &StreamName) -> Result<usize, Error> {
        self.check()?;
        let found = self.stream_by_name.get(name).copied();
        found.ok_or_else(|| Error::Missing {
            what: format!("stream {name}"),
        })
    }

    /// Adds a stream.
    pub(super) fn add_stream(&mut self, stream: Stream) {
        let index = self.streams.len();
        self.stream_by_name.insert(stream.name.clone(), index);
        self.streams.push(stream);
    }

    /// Appends in memory: from here on everybody in the process can see the message, and it is on
    /// its way to the disk.
    pub(super) fn append(
        &mut self,
        stream: usize,
        raw: &Raw,
        size: u64,
    ) -> Result<RawAppended, Error> {
        let target = &mut self.streams[stream];
        if let Some(seq) = target.dedup.find(&raw.id, now_ms().max(target.last_ms)) {
            return Ok(RawAppended {
                seq,
                duplicate: true,
            });
        }
        if !target.subjects.iter().any(|own| own.matches(&raw.subject)) {
            return Err(Error::Refused {
                operation: "append",
                reason: format!("{} does not store {}", target.name, raw.subject),
            });
        }
        let previous = target.index.last_on(&raw.subject);
        if raw.expect_last.is_some_and(|last| last != previous) {
            return Err(Error::Conflict {
                subject: raw.subject.clone(),
            });
        }
        if target.bytes + size > target.max_bytes {
            return Err(Error::Full {
                stream: target.name.to_string(),
            });
        }
        self.disk.admit()?;
        let subject = target.index.subject(&raw.subject).unwrap_or_else(|| {
            let number = target.index.add_subject(&raw.subject);
            self.ops.push(Op::Subject {
                stream: target.id,
                number,
                text: raw.subject.as_str().into(),
            });
            number
        });
        target.last_ms = target.last_ms.max(now_ms());
        let seq = target.index.push(subject, target.last_ms);
        target.bytes += size;
        target.dedup.insert(&raw.id, seq, target.last_ms);
        let message = Arc::new(RawStored {
            subject: raw.subject.clone(),
            headers: raw.headers.clone(),
            body: raw.body.clone(),
            seq,
            time_ms: target.last_ms,
            previous_on_subject: previous,
        });
        self.ops.push(Op::Append {
            stream: target.id,
            subject,
            message: message.clone(),
            id: raw.id.clone(),
            size,
        });
        self.tell(stream, message, size as usize);
        Ok(RawAppended {
            seq,
            duplicate: false,
        })
    }

    /// Gives a new message to the queues and live subscribers that want it, and keeps it at hand.
    fn tell(&mut self, stream: usize, message: Arc<RawStored>, size: usize) {
        let target = &mut self.streams[stream];
        let (queues, seq) = (&mut self.queues, message.seq);
        target.queues.for_each_match(&message.subject, |id| {
            if let Some(slot) = queues.get_mut(id) {
                slot.queue.push(seq);
            }
        });
        self.seen.for_each_match(&message.subject, |mailbox| {
            mailbox.push(message.clone(), size);
        });
        target.cached.insert(seq, message);
        let cost = size + CACHED_OVERHEAD;
        self.cache.order.push_back((stream, seq, cost));
        self.cache.bytes += cost;
        self.evict();
    }

    /// Forgets the oldest messages beyond the cache's bound, but none that is not on disk.
    fn evict(&mut self) {
        while self.cache.bytes > self.cache_bytes_max {
            let Some((stream, seq, cost)) = self.cache.order.front().copied() else {
                return;
            };
            if seq > self.streams[stream].committed {
                return;
            }
            self.streams[stream].cached.remove(&seq);
            self.cache.bytes -= cost;
            self.cache.order.pop_front();
        }
    }

    /// A batch is on disk.
    pub(super) fn committed(&mut self, batch: Vec<Op>) {
        for op in batch {
            match op {
                Op::Append {
                    stream, message, ..
                } => self.committed_message(stream, &message),
                // The receiver may be gone: its task was cancelled.
                Op::Then(waiter) => {
                    let _ = waiter.send(());
                }
                _ => {}
            }
        }
        for stream in &mut self.streams {
            if stream.waits.is_empty() {
                continue;
            }
            let later = stream.waits.split_off(&(stream.committed + 1));
            let done = std::mem::replace(&mut stream.waits, later);
            for waiter in done.into_values().flatten() {
                let _ = waiter.send(());
            }
        }
        self.evict();
    }

    fn committed_message(&mut self, stream_id: i64, message: &RawStored) {
        // Streams are numbered from 1 as they are made.
        let stream = &mut self.streams[stream_id as usize - 1];
        stream.committed = message.seq;
        stream
            .followers
            .for_each_match(&message.subject, |follower| follower.notify_one());
    }

    /// A receiver that is told when everything up to `seq` is on disk; `None` if it is.
    pub(super) fn wait_committed(
        &mut self,
        stream: usize,
        seq: u64,
    ) -> Option<oneshot::Receiver<()>> {
        let stream = &mut self.streams[stream];
        if seq <= stream.committed {
            return None;
        }
        let (sender, receiver) = oneshot::channel();
        stream.waits.entry(seq).or_default().push(sender);
        Some(receiver)
    }

    /// A receiver that is told when everything queued until now is on disk.
    pub(super) fn wait_all(&mut self) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        self.ops.push(Op::Then(sender));
        receiver
    }

    /// Adds a queue that is filled already.
    pub(super) fn add_queue(&mut self, queue: Queue) {
        let key = self.streams[queue.stream]
            .queues
            .insert(queue.filter.clone(), queue.id);
        self.next_queue = self.next_queue.max(queue.id + 1);
        self.queue_by_name
            .insert((queue.stream, queue.name.clone()), queue.id);
        self.queues.insert(queue.id, QueueSlot { queue, key });
    }

    /// Deletes a queue; its pullers are told.
    pub(super) fn drop_queue(&mut self, stream: usize, name: &str) {
        let Some(id) = self.queue_by_name.remove(&(stream, name.to_owned())) else {
            return;
        };
        if let Some(mut slot) = self.queues.remove(&id) {
            self.streams[stream].queues.remove(&slot.key);
            slot.queue.disarm_all(&mut self.timers);
            slot.queue.rouse_all();
        }
        self.ops.push(Op::DropQueue { id });
    }

    /// A queue with what it needs to change.
    pub(super) fn queue(&mut self, id: i64) -> Option<(&mut Queue, &mut Timers, &OpQueue)> {
        let slot = self.queues.get_mut(&id)?;
        Some((&mut slot.queue, &mut self.timers, &self.ops))
    }

    /// Matching sequences of a stream after `floor`, ascending, for a queue that is to be filled.
    pub(super) fn matching_after(&self, stream: usize, filter: &Filter, floor: u64) -> Vec<u64> {
        let mut seqs = Vec::new();
        for (subject, list) in self.streams[stream].index.subjects() {
            if filter.matches(subject) {
                let start = list.partition_point(|seq| *seq <= floor);
                seqs.extend_from_slice(&list[start..]);
            }
        }
        seqs.sort_unstable();
        seqs
    }

    /// Does what is due.
    pub(super) fn fire_due(&mut self, now: Instant) {
        while let Some(due) = self.timers.pop(now) {
            match due {
                Due::Delivery { queue: id, seq } => {
                    let Some((queue, _, ops)) = self.queue(id) else {
                        continue;
                    };
                    if let Some(tried) = queue.expire(seq) {
                        ops.push(Op::Tried {
                            queue: id,
                            seq,
                            delivered: tried.delivered,
                        });
                    }
                }
                Due::Entry { bucket, key } => {
                    let ops = self.ops.clone();
                    self.buckets[bucket].expire(&key, &ops);
                }
            }
        }
    }

    /// Ends everything: whoever waits is told, subscriptions end.
    pub(super) fn end(&mut self, down: Down) {
        if self.down.is_some() {
            return;
        }
        self.down = Some(down);
        for slot in self.queues.values_mut() {
            slot.queue.rouse_all();
        }
        for mailbox in self.seen.values() {
            mailbox.close();
        }
        for bucket in &self.buckets {
            bucket.close();
        }
        for stream in &self.streams {
            for follower in stream.followers.values() {
                follower.notify_one();
            }
        }
        self.timers.wake();
    }

    /// Tells those who wait for the disk that it will not happen.
    pub(super) fn abandon_waits(&mut self) {
        for stream in &mut self.streams {
            stream.waits.clear();
        }
    }
}

/// The log's clock: milliseconds since the Unix epoch.
pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    since.as_millis() as u64
}
