//! Kv buckets: in memory, written through the one writer. Entries with a time to live go at their
//! time, driven by the timers.

use super::live::Mailbox;
use super::read::{OnDrop, poll_fairly};
use super::shared::Shared;
use super::state::{State, now_ms};
use super::timers::{Due, Timers};
use super::writer::{Op, OpQueue};
use crate::backend::{BucketSpec, KvEntry, KvEvent};
use crate::error::Error;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::{Duration, Instant};

/// Longest key in bytes.
const KEY_BYTES_MAX: usize = 512;
/// Longest value in bytes: what a NATS server takes in one message.
pub(super) const VALUE_BYTES_MAX: usize = 1024 * 1024;
/// Keys and values of one bucket in bytes: a bucket is held in memory.
const BUCKET_BYTES_MAX: usize = 64 * 1024 * 1024;

/// One entry.
struct Entry {
    value: Bytes,
    revision: u64,
    time_ms: u64,
    expires: Option<Instant>,
}

/// One bucket.
pub(super) struct Bucket {
    /// Index in the state; the number on disk is one more.
    index: usize,
    name: String,
    ttl: Option<Duration>,
    revision: u64,
    bytes: usize,
    entries: BTreeMap<Arc<str>, Entry>,
    watchers: HashMap<u64, Arc<Mailbox<KvEvent>>>,
    next_watcher: u64,
}

impl Bucket {
    /// A bucket as it was on disk (or a new one). `entries`: key, value, revision, time.
    pub(super) fn load(
        index: usize,
        name: String,
        ttl: Option<Duration>,
        revision: u64,
        entries: Vec<(String, Bytes, u64, u64)>,
        timers: &mut Timers,
    ) -> Self {
        let mut bucket = Self {
            index,
            name,
            ttl,
            revision,
            bytes: 0,
            entries: BTreeMap::new(),
            watchers: HashMap::new(),
            next_watcher: 0,
        };
        for (key, value, revision, time_ms) in entries {
            let key: Arc<str> = key.into();
            bucket.bytes += key.len() + value.len();
            let expires = bucket.arm(&key, time_ms, timers);
            let entry = Entry {
                value,
                revision,
                time_ms,
                expires,
            };
            bucket.entries.insert(key, entry);
        }
        bucket
    }

    fn id(&self) -> i64 {
        self.index as i64 + 1
    }

    fn arm(&self, key: &Arc<str>, written_ms: u64, timers: &mut Timers) -> Option<Instant> {
        let age = Duration::from_millis(now_ms().saturating_sub(written_ms));
        let left = self.ttl?.saturating_sub(age);
        Some(timers.arm(Instant::now(), left, self.due(key)))
    }

    fn due(&self, key: &Arc<str>) -> Due {
        Due::Entry {
            bucket: self.index,
            key: key.clone(),
        }
    }

    /// Takes another time to live for what is written from now on.
    fn set_ttl(&mut self, ttl: Option<Duration>) -> bool {
        std::mem::replace(&mut self.ttl, ttl) != ttl
    }

    fn get(&self, key: &str) -> Option<KvEntry> {
        self.entries.get(key).map(|entry| KvEntry {
            key: key.to_owned(),
            value: entry.value.clone(),
            revision: entry.revision,
            time_ms: entry.time_ms,
        })
    }

    fn check(&self, key: &str, expect: Option<u64>) -> Result<(), Error> {
        let current = self.entries.get(key).map_or(0, |entry| entry.revision);
        if expect.is_some_and(|revision| revision != current) {
            return Err(Error::KvConflict {
                key: key.to_owned(),
            });
        }
        Ok(())
    }

    fn put(
        &mut self,
        key: &str,
        value: Bytes,
        expect: Option<u64>,
        timers: &mut Timers,
        ops: &OpQueue,
    ) -> Result<u64, Error> {
        self.check(key, expect)?;
        let replaced = self.entries.get(key).map(|old| key.len() + old.value.len());
        let bytes = self.bytes - replaced.unwrap_or(0) + key.len() + value.len();
        if bytes > BUCKET_BYTES_MAX {
            return Err(Error::Full {
                stream: format!("bucket {}", self.name),
            });
        }
        self.take(key, timers);
        self.bytes = bytes;
        self.revision += 1;
        let (key, time_ms): (Arc<str>, u64) = (key.into(), now_ms());
        let expires = self.arm(&key, time_ms, timers);
        let entry = Entry {
            value: value.clone(),
            revision: self.revision,
            time_ms,
            expires,
        };
        self.entries.insert(key.clone(), entry);
        self.tell(|| {
            KvEvent::Put(KvEntry {
                key: key.to_string(),
                value: value.clone(),
                revision: self.revision,
                time_ms,
            })
        });
        ops.push(Op::KvPut {
            bucket: self.id(),
            key,
            value,
            revision: self.revision,
            time_ms,
        });
        Ok(self.revision)
    }

    fn delete(
        &mut self,
        key: &str,
        expect: Option<u64>,
        timers: &mut Timers,
        ops: &OpQueue,
    ) -> Result<(), Error> {
        self.check(key, expect)?;
        if self.take(key, timers).is_some() {
            self.gone(key, ops);
        }
        Ok(())
    }

    /// The life of an entry is over.
    pub(super) fn expire(&mut self, key: &str, ops: &OpQueue) {
        if let Some(entry) = self.entries.remove(key) {
            self.bytes -= key.len() + entry.value.len();
            self.gone(key, ops);
        }
    }

    fn take(&mut self, key: &str, timers: &mut Timers) -> Option<Entry> {
        let (key, entry) = self.entries.remove_entry(key)?;
        self.bytes -= key.len() + entry.value.len();
        if let Some(at) = entry.expires {
            timers.disarm(at, self.due(&key));
        }
        Some(entry)
    }

    fn gone(&mut self, key: &str, ops: &OpQueue) {
        self.revision += 1;
        self.tell(|| KvEvent::Gone {
            key: key.to_owned(),
        });
        ops.push(Op::KvGone {
            bucket: self.id(),
            key: key.into(),
            revision: self.revision,
        });
    }

    fn tell(&self, event: impl Fn() -> KvEvent) {
        for watcher in self.watchers.values() {
            let event = event();
            let bytes = match &event {
                KvEvent::Put(entry) => entry.key.len() + entry.value.len(),
                KvEvent::Gone { key } => key.len(),
                KvEvent::Current => 0,
            };
            watcher.push(event, bytes);
        }
    }

    /// Everything there is, then `Current`.
    fn snapshot(&self) -> Vec<KvEvent> {
        let entries = self.entries.keys().filter_map(|key| self.get(key));
        let mut events: Vec<KvEvent> = entries.map(KvEvent::Put).collect();
        events.push(KvEvent::Current);
        events
    }

    /// Ends every watch.
    pub(super) fn close(&self) {
        for watcher in self.watchers.values() {
            watcher.close();
        }
    }
}

/// Checks a key: as NATS wants them.
pub(super) fn check_key(key: &str) -> Result<(), Error> {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"_=.-".contains(&byte);
    let empty_token = key.split('.').any(str::is_empty);
    if key.len() > KEY_BYTES_MAX || empty_token || !key.bytes().all(fine) {
        let start: String = key.chars().take(60).collect();
        return Err(Error::Refused {
            operation: "kv",
            reason: format!(
                "{start:?} is not a key: expected 1 to {KEY_BYTES_MAX} of A-Za-z0-9_=- in tokens parted by dots"
            ),
        });
    }
    Ok(())
}

impl State {
    fn bucket(&self, name: &str) -> Result<usize, Error> {
        self.check()?;
        let found = self.bucket_by_name.get(name).copied();
        found.ok_or_else(|| Error::Missing {
            what: format!("bucket {name}"),
        })
    }

    /// Makes a bucket, or brings its time to live up to date. Returns whether anything changed.
    pub(super) fn ensure_bucket(&mut self, spec: &BucketSpec) -> Result<bool, Error> {
        self.check()?;
        let index = match self.bucket_by_name.get(spec.name) {
            Some(index) => {
                if !self.buckets[*index].set_ttl(spec.ttl) {
                    return Ok(false);
                }
                *index
            }
            None => {
                let index = self.buckets.len();
                let name = spec.name.to_owned();
                let bucket =
                    Bucket::load(index, name.clone(), spec.ttl, 0, vec![], &mut self.timers);
                self.buckets.push(bucket);
                self.bucket_by_name.insert(name, index);
                index
            }
        };
        self.ops.push(Op::Bucket {
            id: self.buckets[index].id(),
            name: spec.name.to_owned(),
            ttl_ms: spec.ttl.map(|ttl| ttl.as_millis() as u64),
        });
        Ok(true)
    }

    /// Reads an entry.
    pub(super) fn kv_get(&self, bucket: &str, key: &str) -> Result<Option<KvEntry>, Error> {
        let index = self.bucket(bucket)?;
        Ok(self.buckets[index].get(key))
    }

    /// Writes an entry.
    pub(super) fn kv_put(
        &mut self,
        bucket: &str,
        key: &str,
        value: Bytes,
        expect: Option<u64>,
    ) -> Result<u64, Error> {
        let index = self.bucket(bucket)?;
        self.buckets[index].put(key, value, expect, &mut self.timers, &self.ops)
    }

    /// Deletes an entry.
    pub(super) fn kv_delete(
        &mut self,
        bucket: &str,
        key: &str,
        expect: Option<u64>,
    ) -> Result<(), Error> {
        let index = self.bucket(bucket)?;
        self.buckets[index].delete(key, expect, &mut self.timers, &self.ops)
    }

    /// Begins a watch: what exists, and where changes will come.
    pub(super) fn kv_watch(&mut self, bucket: &str) -> Result<(Watch, Vec<KvEvent>), Error> {
        let index = self.bucket(bucket)?;
        let bucket = &mut self.buckets[index];
        bucket.next_watcher += 1;
        let watch = Watch {
            bucket: index,
            id: bucket.next_watcher,
            mailbox: Arc::default(),
        };
        bucket.watchers.insert(watch.id, watch.mailbox.clone());
        Ok((watch, bucket.snapshot()))
    }

    /// Begins a watch anew, because its reader was too slow.
    pub(super) fn kv_rewatch(&mut self, watch: &Watch) -> Vec<KvEvent> {
        watch.mailbox.clear();
        self.buckets[watch.bucket].snapshot()
    }

    /// Ends a watch.
    pub(super) fn kv_unwatch(&mut self, watch: &Watch) {
        self.buckets[watch.bucket].watchers.remove(&watch.id);
    }
}

/// A watch on a bucket.
pub(super) struct Watch {
    bucket: usize,
    id: u64,
    pub(super) mailbox: Arc<Mailbox<KvEvent>>,
}

/// The events of a watch: the snapshot, then changes; the snapshot again if the reader was too slow.
pub(super) fn events(
    shared: Arc<Shared>,
    watch: Watch,
    snapshot: Vec<KvEvent>,
) -> BoxStream<'static, Result<KvEvent, Error>> {
    let mut told: VecDeque<KvEvent> = snapshot.into();
    let mut ended = false;
    let (watch, ending) = (Arc::new(watch), shared.clone());
    let leaving = watch.clone();
    let leave = OnDrop(move || ending.lock().kv_unwatch(&leaving));
    futures::stream::poll_fn(move |cx| {
        let _owned_by_the_stream = &leave;
        if ended {
            return Poll::Ready(None);
        }
        if watch.mailbox.take_dropped() > 0 {
            told = shared.lock().kv_rewatch(&watch).into();
        }
        if let Some(event) = told.pop_front() {
            return Poll::Ready(Some(Ok(event)));
        }
        let event = ready!(poll_fairly(cx, |cx| watch.mailbox.poll_pop(cx)));
        Poll::Ready(Some(event.ok_or_else(|| {
            ended = true;
            shared.lock().check().err().unwrap_or(Error::Closed)
        })))
    })
    .boxed()
}
