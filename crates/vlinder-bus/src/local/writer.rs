//! The one writer of `bus.db`: a thread that takes everything queued, writes it in one transaction,
//! commits, and then tells whoever waits (group commit).
//!
//! Operations are queued under the lock of the state, so that disk and memory see one order: what
//! follows from a message can only be committed with it or after it.
//!
//! A full disk, or somebody else's lock, is waited out: the batch is kept and tried again, nothing new is accepted meanwhile,
//! and nothing of it counts as durable. Any other failure ends the bus, because memory is ahead of
//! the disk then and must not be acted upon.

use super::disk::{Disk, Trouble};
use super::store;
use crate::backend::RawStored;
use bytes::Bytes;
use rusqlite::Connection;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::oneshot;

/// Bytes written in one transaction, beyond which it is committed: bounds how long others wait.
const BATCH_BYTES_MAX: usize = 8 * 1024 * 1024;
/// First and longest pause between two tries to write, while the disk is full or the file locked.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(1000));

/// Something to write, or somebody to tell.
pub(super) enum Op {
    Stream {
        id: i64,
        name: String,
        created_ms: u64,
    },
    Subject {
        stream: i64,
        number: u32,
        text: Arc<str>,
    },
    Append {
        stream: i64,
        subject: u32,
        message: Arc<RawStored>,
        id: String,
        size: u64,
    },
    Queue {
        id: i64,
        stream: i64,
        name: String,
        filter: String,
        floor: u64,
    },
    DropQueue {
        id: i64,
    },
    Acked {
        queue: i64,
        seq: u64,
        floor: u64,
    },
    Tried {
        queue: i64,
        seq: u64,
        delivered: u64,
    },
    Bucket {
        id: i64,
        name: String,
        ttl_ms: Option<u64>,
    },
    KvPut {
        bucket: i64,
        key: Arc<str>,
        value: Bytes,
        revision: u64,
        time_ms: u64,
    },
    KvGone {
        bucket: i64,
        key: Arc<str>,
        revision: u64,
    },
    BlobPart {
        blob: i64,
        number: i64,
        bytes: Bytes,
    },
    BlobDone {
        blob: i64,
        hash: String,
        len: u64,
    },
    BlobDropped {
        blob: i64,
    },
    /// Tell when everything before is committed.
    Then(oneshot::Sender<()>),
}

impl Op {
    /// Its share of the bound on what waits to be written, in bytes; taken when it was admitted.
    pub(super) fn cost(&self) -> usize {
        match self {
            Self::Append { size, .. } => *size as usize,
            Self::KvPut { value, .. } => value.len() + SMALL_COST,
            Self::BlobPart { bytes, .. } => bytes.len(),
            Self::Acked { .. } => SMALL_COST,
            _ => 0,
        }
    }
}

/// What a small operation counts, in bytes.
pub(super) const SMALL_COST: usize = 128;

/// Operations on their way to the writer. Bounded by the admission of those who queue.
#[derive(Default)]
pub(super) struct OpQueue {
    inner: Mutex<Inner>,
    wake: Condvar,
}

#[derive(Default)]
struct Inner {
    ops: VecDeque<Op>,
    writer_sleeps: bool,
    stop: bool,
}

impl OpQueue {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner
            .lock()
            .expect("nothing panics while it holds the write queue")
    }

    /// Queues an operation.
    pub(super) fn push(&self, op: Op) {
        let mut inner = self.inner();
        inner.ops.push_back(op);
        if std::mem::take(&mut inner.writer_sleeps) {
            self.wake.notify_one();
        }
    }

    /// Lets the writer end when all is written.
    pub(super) fn stop(&self) {
        let mut inner = self.inner();
        inner.stop = true;
        self.wake.notify_one();
    }

    /// Everything queued, up to [`BATCH_BYTES_MAX`]; `None` when stopped and empty.
    fn take(&self) -> Option<Vec<Op>> {
        let mut inner = self.inner();
        while inner.ops.is_empty() {
            if inner.stop {
                return None;
            }
            inner.writer_sleeps = true;
            inner = self
                .wake
                .wait(inner)
                .expect("nothing panics while it holds the write queue");
        }
        let mut bytes = 0;
        let count = inner.ops.iter().take_while(|op| {
            let fits = bytes < BATCH_BYTES_MAX;
            bytes += op.cost();
            fits
        });
        let count = count.count();
        Some(inner.ops.drain(..count).collect())
    }

    /// Sleeps unless it is time to stop; returns whether it is.
    fn pause(&self, pause: Duration) -> bool {
        let inner = self.inner();
        let waited = self
            .wake
            .wait_timeout_while(inner, pause, |inner| !inner.stop);
        waited
            .expect("nothing panics while it holds the write queue")
            .0
            .stop
    }

    /// Throws everything away, which tells those who wait.
    pub(super) fn clear(&self) {
        let ops = std::mem::take(&mut self.inner().ops);
        drop(ops);
    }
}

/// What the writer reports.
pub(super) trait Listener: Send {
    /// A batch is durable.
    fn committed(&self, batch: Vec<Op>);
    /// The store is broken; nothing more will be written.
    fn broken(&self, reason: String);
}

/// Writes until the queue is stopped or the store breaks.
pub(super) fn run(mut conn: Connection, queue: &OpQueue, disk: &Disk, listener: &dyn Listener) {
    while let Some(batch) = queue.take() {
        let mut pause = RETRY_PAUSE.0;
        while let Err(error) = write(&mut conn, &batch) {
            let trouble = disk.trouble(&error);
            report(disk, trouble, &error);
            if trouble == Trouble::Broken || queue.pause(pause) {
                listener.broken(error.to_string());
                return;
            }
            pause = (pause * 2).min(RETRY_PAUSE.1);
        }
        disk.wrote(batch.iter().map(Op::cost).sum());
        if disk.set_stuck(false) {
            tracing::info!("the disk has space again");
        }
        listener.committed(batch);
    }
    // A clean stop leaves one file. Failing here costs nothing: the next start reads the WAL.
    let _ = conn.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)");
}

fn report(disk: &Disk, trouble: Trouble, error: &rusqlite::Error) {
    let path = disk.path().display();
    match trouble {
        Trouble::NoSpace => {
            if disk.set_stuck(true) {
                tracing::error!(%path, "the disk is full: nothing is stored until there is space");
            }
        }
        Trouble::Busy => tracing::warn!(%path, "another program writes to the log: waiting for it"),
        Trouble::Broken => tracing::error!(%path, %error, "the log cannot be written"),
    }
}

/// Writes a batch in one transaction.
fn write(conn: &mut Connection, batch: &[Op]) -> rusqlite::Result<()> {
    if batch.iter().all(|op| matches!(op, Op::Then(_))) {
        return Ok(());
    }
    let tx = conn.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    store::apply(&tx, batch)?;
    tx.commit()
}
