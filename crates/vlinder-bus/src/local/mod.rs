//! The embedded backend: one process, durable in SQLite (`bus.db`).
//!
//! State is in memory behind one short lock; every change is queued, under that lock, for one writer
//! thread that commits in groups. A message gets its sequence, is delivered and is seen at once, before
//! its commit; [`append`](Backend::append) and [`settled`](Backend::settled) return after it. Who acts on
//! something outside of the process awaits `settled` first. Since disk and memory share one order, what
//! follows from a message is never on disk without it.
//!
//! Guarantees: what was confirmed survives the kill of the process, and with [`Sync::Always`] a power
//! cut. After a restart unacknowledged messages are delivered again at once, counted as delivered
//! before. A full log or disk refuses; a store that breaks ends the bus ([`LocalBus::failed`]).
//!
//! It does not serve other processes: a lock keeps them out. It does not poll: idle it does not wake.
//!
//! | bound | |
//! |---|---|
//! | index | 16 bytes a message, 250 bytes a subject, 8 bytes for each message waiting in a queue |
//! | message cache | [`LocalOptions::cache_bytes`] |
//! | write queue | 32 MiB, then appends wait, at most 5 s |
//! | message ids | 2 minutes, at most 262,144 a stream |
//! | live subscriber | 8,192 messages or 64 MiB, then its oldest go |
//! | bucket, blobs | 64 MiB; as much as the log |

mod blob;
mod dedup;
mod disk;
mod filter;
mod index;
mod kv;
mod live;
mod load;
mod lock;
mod puller;
mod queue;
mod read;
mod shared;
mod state;
mod store;
#[cfg(test)]
mod tests;
mod timers;
mod writer;

use crate::backend::{
    Backend, BucketSpec, Headers, KvEntry, KvEvent, QueueInfo, QueueSpec, Raw, RawAppended,
    RawPuller, RawStored, Signal, StreamInfo, Verdict,
};
use crate::error::Error;
use crate::streams::StreamName;
use async_trait::async_trait;
use bytes::Bytes;
use disk::Disk;
use filter::{Filter, check_subject};
use futures::stream::BoxStream;
use puller::{LocalPuller, Token};
use queue::Queue;
use shared::{Parts, Shared};
use state::{Down, State, Stream, now_ms};
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use writer::{Op, OpQueue, SMALL_COST};

/// Largest message in bytes, headers included: what a NATS server takes.
const MESSAGE_BYTES_MAX: u64 = 1024 * 1024;

/// When a confirmed message is safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sync {
    /// From any kill of the process; a power cut can take the last moments.
    Interval,
    /// Also from a power cut: every commit is synced.
    Always,
}

/// How to open the embedded bus.
#[derive(Debug, Clone)]
pub struct LocalOptions {
    /// The file, `bus.db`; its directory is made if it is missing. `bus.lock` lies beside it.
    pub path: PathBuf,
    /// Limit of each namespace's log, and of all blobs, in bytes.
    pub max_bytes: u64,
    /// When a confirmed message is safe.
    pub sync: Sync,
    /// Recent messages that are kept in memory, in bytes; older ones are read from the file. What is
    /// not committed yet (at most 32 MiB) is kept in any case.
    pub cache_bytes: usize,
    /// New messages are refused below so much free disk, in bytes.
    pub disk_reserve: u64,
}

impl LocalOptions {
    /// The defaults: 10 GiB, `interval`, 16 MiB of cache, 32 MiB of reserve.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            max_bytes: 10 * 1024 * 1024 * 1024,
            sync: Sync::Interval,
            cache_bytes: 16 * 1024 * 1024,
            disk_reserve: 32 * 1024 * 1024,
        }
    }
}

/// The embedded bus. Dropping it, or [`Backend::close`], writes what is queued and lets go of the lock.
pub struct LocalBus {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    lock: Mutex<Option<File>>,
}

impl LocalBus {
    /// Opens the bus and restores its state. `Locked` if another process has it.
    pub async fn open(options: LocalOptions) -> Result<Arc<Self>, Error> {
        let opened = shared::off_thread(move || Self::open_blocking(&options)).await?;
        Ok(Arc::new(opened))
    }

    fn open_blocking(options: &LocalOptions) -> Result<Self, Error> {
        let directory = options.path.parent().filter(|p| !p.as_os_str().is_empty());
        if let Some(directory) = directory {
            std::fs::create_dir_all(directory).map_err(|error| Error::Storage {
                reason: format!("{}: {error}", directory.display()),
            })?;
        }
        let lock = lock::acquire(&options.path.with_extension("lock"))?;
        let disk = Arc::new(Disk::new(&options.path, options.disk_reserve));
        let conn = store::open_writer(&options.path, options.sync == Sync::Always);
        // Even to open it, SQLite needs a little space.
        let conn = conn.map_err(|error| if disk.is_empty() { disk.full() } else { error })?;
        let ops = Arc::new(OpQueue::default());
        let mut state = State::new(ops.clone(), disk.clone(), options.cache_bytes);
        load::load(&mut state, &conn, options.max_bytes)?;
        let shared = Arc::new(Shared::new(Parts {
            state,
            reader: store::open_reader(&options.path)?,
            blob_reader: store::open_reader(&options.path)?,
            blobs: store::blob_totals(&conn)?,
            max_bytes: options.max_bytes,
        }));
        let bus = Self {
            shared: shared.clone(),
            threads: Mutex::default(),
            lock: Mutex::new(Some(lock)),
        };
        let writing = shared.clone();
        bus.spawn("bus-writer", move || {
            let mut guard = PanicGuard(Some(&*writing));
            writer::run(conn, &ops, &disk, &*writing);
            guard.0 = None;
        })?;
        bus.spawn("bus-timer", move || shared.run_timers())?;
        Ok(bus)
    }

    fn spawn(&self, name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(run);
        let thread = thread.map_err(|error| Error::Storage {
            reason: format!("cannot start the thread {name}: {error}"),
        })?;
        held(&self.threads).push(thread);
        Ok(())
    }

    /// Resolves, with the reason, when the store broke: memory is ahead of the disk then, every
    /// operation fails, and the process should end and start again.
    pub async fn failed(&self) -> String {
        let mut failed = self.shared.failed.subscribe();
        let reason = failed.wait_for(Option::is_some).await;
        // The sender lives as long as `self`.
        reason
            .ok()
            .and_then(|reason| reason.clone())
            .unwrap_or_default()
    }

    /// Signals that were dropped because their listener was slow, since the start.
    pub fn signals_dropped(&self) -> u64 {
        self.shared.signals_dropped.load(Ordering::Relaxed)
    }

    /// Ends everything; returns what waits for the threads to write what is queued, and lets go of
    /// the lock. It blocks for as long as a commit.
    fn shut_down(&self) -> impl FnOnce() + Send + use<> {
        self.shared.end(Down::Closed);
        self.shared.ops.stop();
        let shared = self.shared.clone();
        let threads = std::mem::take(&mut *held(&self.threads));
        let lock = held(&self.lock).take();
        move || {
            for thread in threads {
                // A panic of the writer has been reported by its guard.
                let _ = thread.join();
            }
            shared.close_readers();
            drop(lock);
        }
    }

    /// Waits until everything that was done until now is on disk.
    async fn flush(&self, operation: &'static str) -> Result<(), Error> {
        let waiting = {
            let mut state = self.shared.lock();
            state.check()?;
            state.wait_all()
        };
        self.shared.durable(waiting, operation).await
    }
}

impl Drop for LocalBus {
    fn drop(&mut self) {
        self.shut_down()();
    }
}

fn held<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .expect("nothing panics while it holds the threads or the lock file")
}

/// Ends the bus when the writer panics.
struct PanicGuard<'a>(Option<&'a Shared>);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if let Some(shared) = self.0 {
            writer::Listener::broken(shared, "its writer panicked".to_owned());
        }
    }
}

/// Checks a message and returns its size in bytes.
fn check_message(raw: &Raw) -> Result<u64, Error> {
    check_subject(&raw.subject)?;
    let headers: usize = raw
        .headers
        .iter()
        .map(|(name, value)| name.len() + value.len() + 4)
        .sum();
    let len = (headers + raw.subject.len() + raw.id.len() + raw.body.len()) as u64;
    if len > MESSAGE_BYTES_MAX {
        return Err(Error::TooLarge {
            len,
            max: MESSAGE_BYTES_MAX,
        });
    }
    check_headers(&raw.headers)?;
    Ok(len)
}

/// Refuses what a header line of the other backend could not carry.
fn check_headers(headers: &Headers) -> Result<(), Error> {
    let control = |byte: u8| matches!(byte, b'\r' | b'\n' | 0);
    for (name, value) in headers {
        let bad_name = name.is_empty() || name.bytes().any(|byte| byte <= b' ' || byte == b':');
        if bad_name || value.bytes().any(control) {
            return Err(Error::Refused {
                operation: "append",
                reason: format!(
                    "header {:?} cannot be sent",
                    name.chars().take(60).collect::<String>()
                ),
            });
        }
    }
    Ok(())
}

#[async_trait]
impl Backend for LocalBus {
    fn name(&self) -> &'static str {
        "local"
    }

    async fn ensure_stream(&self, name: &StreamName) -> Result<(), Error> {
        {
            let mut state = self.shared.lock();
            state.check()?;
            if !state.stream_by_name.contains_key(name) {
                let id = state.streams.len() as i64 + 1;
                let created_ms = now_ms();
                let max_bytes = name.max_bytes(self.shared.max_bytes);
                let index = index::Index::default();
                state.add_stream(Stream::new(id, name.clone(), created_ms, max_bytes, index)?);
                state.ops.push(Op::Stream {
                    id,
                    name: name.as_text(),
                    created_ms,
                });
            }
        }
        self.flush("ensure_stream").await
    }

    async fn stream_info(&self, stream: &StreamName) -> Result<StreamInfo, Error> {
        let state = self.shared.lock();
        let stream = &state.streams[state.stream(stream)?];
        let last_seq = stream.index.last_seq();
        Ok(StreamInfo {
            created_ms: stream.created_ms,
            first_seq: 1,
            last_seq,
            messages: last_seq,
            bytes: stream.bytes,
            max_bytes: stream.max_bytes,
        })
    }

    async fn append(&self, stream: &StreamName, raw: &Raw) -> Result<RawAppended, Error> {
        let size = check_message(raw)?;
        let permit = self.shared.admit(size as usize).await?;
        let (appended, waiting) = {
            let mut state = self.shared.lock();
            let stream = state.stream(stream)?;
            let appended = state.append(stream, raw, size)?;
            (appended, state.wait_committed(stream, appended.seq))
        };
        if !appended.duplicate {
            // The writer gives the place back after the commit.
            permit.forget();
        }
        if let Some(waiting) = waiting {
            self.shared.durable(waiting, "append").await?;
        }
        Ok(appended)
    }

    async fn settled(&self, stream: &StreamName, seq: u64) -> Result<(), Error> {
        let waiting = {
            let mut state = self.shared.lock();
            let index = state.stream(stream)?;
            if seq > state.streams[index].index.last_seq() {
                return Err(Error::Missing {
                    what: format!("message {seq} of {stream}"),
                });
            }
            state.wait_committed(index, seq)
        };
        match waiting {
            Some(waiting) => self.shared.durable(waiting, "settled").await,
            None => Ok(()),
        }
    }

    async fn get(&self, stream: &StreamName, seq: u64) -> Result<Option<RawStored>, Error> {
        let (index, found) = {
            let state = self.shared.lock();
            let index = state.stream(stream)?;
            (index, state.find(index, [seq]))
        };
        Ok(self.shared.fetch(index, found).await?.pop())
    }

    async fn last(&self, stream: &StreamName, filter: &str) -> Result<Option<RawStored>, Error> {
        let filter = Filter::parse(filter)?;
        let (index, found) = {
            let state = self.shared.lock();
            let index = state.stream(stream)?;
            let seq = state.streams[index].index.last_matching(&filter);
            (index, state.find(index, [seq]))
        };
        Ok(self.shared.fetch(index, found).await?.pop())
    }

    async fn range(
        &self,
        stream: &StreamName,
        filter: &str,
        from: u64,
        max: usize,
    ) -> Result<Vec<RawStored>, Error> {
        let filter = Filter::parse(filter)?;
        let index = self.shared.lock().stream(stream)?;
        self.shared.range(index, &filter, from, max).await
    }

    async fn follow(
        &self,
        stream: &StreamName,
        filter: &str,
        from: u64,
    ) -> Result<BoxStream<'static, Result<RawStored, Error>>, Error> {
        let filter = Filter::parse(filter)?;
        let index = self.shared.lock().stream(stream)?;
        Ok(self.shared.follow(index, filter, from))
    }

    async fn seen(&self, filter: &str) -> Result<BoxStream<'static, RawStored>, Error> {
        self.shared.seen(Filter::parse(filter)?)
    }

    async fn ensure_queue(&self, spec: &QueueSpec) -> Result<(), Error> {
        let filter = Filter::parse(&spec.filter)?;
        {
            let mut state = self.shared.lock();
            let stream = state.stream(&spec.stream)?;
            let id = state
                .queue_by_name
                .get(&(stream, spec.name.clone()))
                .copied();
            match id.and_then(|id| state.queue(id)) {
                Some((queue, ..)) if queue.filter != filter => {
                    return Err(Error::Refused {
                        operation: "ensure_queue",
                        reason: format!(
                            "queue {} exists with the filter {}",
                            spec.name,
                            queue.filter.text()
                        ),
                    });
                }
                Some(_) => {}
                None => {
                    let last = state.streams[stream].index.last_seq();
                    let floor = if spec.from_start { 0 } else { last };
                    let (id, name) = (state.next_queue, spec.name.clone());
                    let waiting = state.matching_after(stream, &filter, floor);
                    let mut queue = Queue::new(id, stream, name.clone(), filter, floor);
                    queue.fill(waiting, &[], 0);
                    state.ops.push(Op::Queue {
                        id,
                        stream: stream as i64 + 1,
                        name,
                        filter: spec.filter.clone(),
                        floor,
                    });
                    state.add_queue(queue);
                }
            }
        }
        self.flush("ensure_queue").await
    }

    async fn delete_queue(&self, stream: &StreamName, name: &str) -> Result<(), Error> {
        {
            let mut state = self.shared.lock();
            let stream = state.stream(stream)?;
            state.drop_queue(stream, name);
        }
        self.flush("delete_queue").await
    }

    async fn queues(&self, stream: &StreamName) -> Result<Vec<QueueInfo>, Error> {
        let state = self.shared.lock();
        let index = state.stream(stream)?;
        let stream = &state.streams[index];
        let own = state
            .queues
            .values()
            .filter(|slot| slot.queue.stream == index);
        let mut infos: Vec<QueueInfo> = own
            .map(|slot| {
                let oldest = slot
                    .queue
                    .oldest()
                    .and_then(|seq| match stream.cached.get(&seq) {
                        Some(message) => Some(message.time_ms),
                        None => stream.index.about_time_ms(seq),
                    });
                QueueInfo {
                    name: slot.queue.name.clone(),
                    filter: slot.queue.filter.text().to_owned(),
                    waiting: slot.queue.waiting() as u64,
                    held: slot.queue.out() as u64,
                    oldest_ms: oldest.map(|stored_ms| now_ms().saturating_sub(stored_ms)),
                }
            })
            .collect();
        infos.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(infos)
    }

    /// A log that lost its tail is one that an earlier process left: opening it has put its queues right.
    async fn mend_queues(&self, _stream: &StreamName, _common: u64) -> Result<Vec<String>, Error> {
        Ok(vec![])
    }

    async fn puller(&self, stream: &StreamName, queue: &str) -> Result<Box<dyn RawPuller>, Error> {
        let index = self.shared.lock().stream(stream)?;
        Ok(Box::new(LocalPuller::new(&self.shared, index, queue)?))
    }

    async fn verdict(&self, token: &str, verdict: Verdict) -> Result<(), Error> {
        let token = Token::parse(token)?;
        let permit = match verdict {
            Verdict::Ack | Verdict::Terminate => Some(self.shared.admit(SMALL_COST).await?),
            Verdict::Progress | Verdict::Nak(_) => None,
        };
        let queued = self.shared.lock().verdict(token, verdict)?;
        if let (true, Some(permit)) = (queued, permit) {
            permit.forget();
        }
        Ok(())
    }

    async fn ensure_bucket(&self, spec: &BucketSpec) -> Result<(), Error> {
        self.shared.lock().ensure_bucket(spec)?;
        self.flush("ensure_bucket").await
    }

    async fn kv_get(&self, bucket: &str, key: &str) -> Result<Option<KvEntry>, Error> {
        kv::check_key(key)?;
        self.shared.lock().kv_get(bucket, key)
    }

    async fn kv_put(
        &self,
        bucket: &str,
        key: &str,
        value: Bytes,
        expect: Option<u64>,
    ) -> Result<u64, Error> {
        kv::check_key(key)?;
        if value.len() > kv::VALUE_BYTES_MAX {
            return Err(Error::TooLarge {
                len: value.len() as u64,
                max: kv::VALUE_BYTES_MAX as u64,
            });
        }
        let permit = self.shared.admit(value.len() + SMALL_COST).await?;
        let (revision, waiting) = {
            let mut state = self.shared.lock();
            let revision = state.kv_put(bucket, key, value, expect)?;
            (revision, state.wait_all())
        };
        permit.forget();
        self.shared.durable(waiting, "kv_put").await?;
        Ok(revision)
    }

    async fn kv_delete(&self, bucket: &str, key: &str, expect: Option<u64>) -> Result<(), Error> {
        kv::check_key(key)?;
        self.shared.lock().kv_delete(bucket, key, expect)?;
        self.flush("kv_delete").await
    }

    async fn kv_watch(
        &self,
        bucket: &str,
    ) -> Result<BoxStream<'static, Result<KvEvent, Error>>, Error> {
        let (watch, snapshot) = self.shared.lock().kv_watch(bucket)?;
        Ok(kv::events(self.shared.clone(), watch, snapshot))
    }

    async fn blob_put(&self, hash: &str, bytes: Bytes) -> Result<(), Error> {
        self.shared.blob_put(hash, bytes).await
    }

    async fn blob_get(&self, hash: &str, len_max: u64) -> Result<Bytes, Error> {
        self.shared.blob_get(hash, len_max).await
    }

    async fn signal(&self, subject: &str, body: Bytes) -> Result<(), Error> {
        check_subject(subject)?;
        let len = (subject.len() + body.len()) as u64;
        if len > MESSAGE_BYTES_MAX {
            return Err(Error::TooLarge {
                len,
                max: MESSAGE_BYTES_MAX,
            });
        }
        self.shared.lock().check()?;
        self.shared.signals().for_each_match(subject, |mailbox| {
            let signal = Signal {
                subject: subject.to_owned(),
                body: body.clone(),
            };
            let dropped = mailbox.push(signal, len as usize);
            self.shared
                .signals_dropped
                .fetch_add(dropped, Ordering::Relaxed);
        });
        Ok(())
    }

    async fn signals(&self, filter: &str) -> Result<BoxStream<'static, Signal>, Error> {
        self.shared.listen(Filter::parse(filter)?)
    }

    async fn ping(&self) -> Result<Duration, Error> {
        let begun = Instant::now();
        self.flush("ping").await?;
        Ok(begun.elapsed())
    }

    async fn close(&self) {
        let finish = self.shut_down();
        // A panic in there would be the writer's, which its guard has reported.
        let _ = tokio::task::spawn_blocking(finish).await;
    }
}
