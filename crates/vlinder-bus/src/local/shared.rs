//! What every task and thread of the embedded bus shares: the state and its lock, the way to the
//! writer, the connections that read.

use super::disk::Disk;
use super::filter::FilterIndex;
use super::live::Mailbox;
use super::state::{Down, State};
use super::writer::{Listener, Op, OpQueue};
use crate::backend::Signal;
use crate::error::Error;
use rusqlite::Connection;
use std::sync::atomic::{AtomicI64, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, SemaphorePermit, oneshot, watch};

/// Bytes that may wait for the writer; who wants to add more waits.
pub(super) const WRITE_QUEUE_BYTES_MAX: usize = 32 * 1024 * 1024;
/// How long one operation waits for a place in the write queue, or for its commit: longer than a
/// slow sync, shorter than the patience of [`crate::bus::APPEND_DEADLINE`].
const COMMIT_WAIT: Duration = Duration::from_secs(5);

/// See the module.
pub(super) struct Shared {
    state: Mutex<State>,
    pub(super) ops: Arc<OpQueue>,
    pub(super) disk: Arc<Disk>,
    pub(super) signals: Mutex<FilterIndex<Arc<Mailbox<Signal>>>>,
    pub(super) signals_dropped: AtomicU64,
    /// Reads messages; `None` once closed.
    pub(super) reader: Mutex<Option<Connection>>,
    /// Reads blobs, which takes longer.
    pub(super) blob_reader: Mutex<Option<Connection>>,
    pub(super) next_blob: AtomicI64,
    pub(super) blob_bytes: AtomicU64,
    pub(super) max_bytes: u64,
    admission: Semaphore,
    pub(super) failed: watch::Sender<Option<String>>,
}

/// What [`Shared::new`] needs.
pub(super) struct Parts {
    pub(super) state: State,
    pub(super) reader: Connection,
    pub(super) blob_reader: Connection,
    /// Highest number of a blob and bytes of all blobs.
    pub(super) blobs: (i64, u64),
    pub(super) max_bytes: u64,
}

impl Shared {
    pub(super) fn new(parts: Parts) -> Self {
        Self {
            ops: parts.state.ops.clone(),
            disk: parts.state.disk.clone(),
            state: Mutex::new(parts.state),
            signals: Mutex::default(),
            signals_dropped: AtomicU64::new(0),
            reader: Mutex::new(Some(parts.reader)),
            blob_reader: Mutex::new(Some(parts.blob_reader)),
            next_blob: AtomicI64::new(parts.blobs.0 + 1),
            blob_bytes: AtomicU64::new(parts.blobs.1),
            max_bytes: parts.max_bytes,
            admission: Semaphore::new(WRITE_QUEUE_BYTES_MAX),
            failed: watch::Sender::new(None),
        }
    }

    /// The state. Held for microseconds and never across an await.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("after a panic within the bus its state cannot be trusted")
    }

    /// The live listeners to signals.
    pub(super) fn signals(&self) -> MutexGuard<'_, FilterIndex<Arc<Mailbox<Signal>>>> {
        self.signals
            .lock()
            .expect("nothing panics while it holds the signals")
    }

    /// Takes a place in the write queue. To be forgotten once the operation is queued.
    pub(super) async fn admit(&self, bytes: usize) -> Result<SemaphorePermit<'_>, Error> {
        let bytes = u32::try_from(bytes.min(WRITE_QUEUE_BYTES_MAX)).unwrap_or(u32::MAX);
        if let Ok(permit) = self.admission.try_acquire_many(bytes) {
            return Ok(permit);
        }
        let waiting = self.admission.acquire_many(bytes);
        match tokio::time::timeout(COMMIT_WAIT, waiting).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) => Err(self.down_error()),
            Err(_) => Err(self.late("to take more")),
        }
    }

    /// Waits for a commit.
    pub(super) async fn durable(
        &self,
        waiting: oneshot::Receiver<()>,
        operation: &'static str,
    ) -> Result<(), Error> {
        match tokio::time::timeout(COMMIT_WAIT, waiting).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(self.down_error()),
            Err(_) => Err(self.late(operation)),
        }
    }

    fn late(&self, operation: &'static str) -> Error {
        Error::Timeout {
            operation: if self.disk.is_stuck() {
                "while its disk is full (free some space)"
            } else {
                operation
            },
        }
    }

    fn down_error(&self) -> Error {
        self.lock().check().err().unwrap_or(Error::Closed)
    }

    /// Runs a read of messages off the runtime's threads.
    pub(super) async fn read_disk<T: Send + 'static>(
        self: &Arc<Self>,
        read: impl FnOnce(&Connection) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let shared = self.clone();
        off_thread(move || with_connection(&shared.reader, read)).await
    }

    /// Runs a read of blobs off the runtime's threads.
    pub(super) async fn read_blobs<T: Send + 'static>(
        self: &Arc<Self>,
        read: impl FnOnce(&Connection) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let shared = self.clone();
        off_thread(move || with_connection(&shared.blob_reader, read)).await
    }

    /// Ends everything; the first reason stands.
    pub(super) fn end(&self, down: Down) {
        self.lock().end(down);
        for mailbox in self.signals().values() {
            mailbox.close();
        }
        self.admission.close();
    }

    /// Sleeps until something is due, and does it. Ends with the bus.
    pub(super) fn run_timers(&self) {
        let condvar = self.lock().timers.condvar();
        let mut state = self.lock();
        while state.down.is_none() {
            let now = Instant::now();
            state.fire_due(now);
            state = match state.timers.plan() {
                None => condvar.wait(state),
                Some(at) => condvar
                    .wait_timeout(state, at.saturating_duration_since(now))
                    .map(|(state, _)| state)
                    .map_err(|poisoned| std::sync::PoisonError::new(poisoned.into_inner().0)),
            }
            .expect("after a panic within the bus its state cannot be trusted");
        }
    }

    /// Closes the connections that read.
    pub(super) fn close_readers(&self) {
        for reader in [&self.reader, &self.blob_reader] {
            let mut reader = reader
                .lock()
                .unwrap_or_else(|poisoned| poisoned.into_inner());
            drop(reader.take());
        }
    }
}

impl Listener for Shared {
    fn committed(&self, batch: Vec<Op>) {
        let cost: usize = batch.iter().map(Op::cost).sum();
        self.lock().committed(batch);
        self.admission.add_permits(cost);
    }

    fn broken(&self, reason: String) {
        tracing::error!(%reason, "the embedded log failed, nothing more is stored");
        self.end(Down::Failed(reason.clone()));
        self.lock().abandon_waits();
        self.ops.clear();
        self.failed.send_replace(Some(reason));
    }
}

/// Runs what may wait for the disk on a thread for it.
pub(super) async fn off_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let joined = tokio::task::spawn_blocking(work).await;
    joined.unwrap_or_else(|error| {
        Err(Error::Storage {
            reason: format!("reading stopped: {error}"),
        })
    })
}

fn with_connection<T>(
    reader: &Mutex<Option<Connection>>,
    read: impl FnOnce(&Connection) -> Result<T, Error>,
) -> Result<T, Error> {
    // A reader that panicked left nothing half done: it only reads.
    let guard = reader
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    read(guard.as_ref().ok_or(Error::Closed)?)
}
