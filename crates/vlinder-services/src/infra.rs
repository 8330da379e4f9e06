//! The infra role: ends turns that nobody else ends; and what is known of open turns.
//!
//! Any number of these may run: the first end of a turn wins, so that two of them ending the same
//! turn is harmless, and no lease is needed.

use crate::harness::sessions::end_of;
use crate::status;
use bytes::Bytes;
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;
use tonic::Status;
use vlinder_bus::streams::BUCKET_OPEN_TURNS;
use vlinder_bus::{Stored, subjects};
use vlinder_core::record::Invoke;
use vlinder_core::{Kind, NodeHash, SubmissionId};
use vlinder_worker::{Error, WorkerCx};

/// How long after its deadline a turn is ended by the sweeper: its runtime and harness go first.
const SWEEP_GRACE: Duration = Duration::from_secs(2);
/// How often the checkpoint is written while turns come and go.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(10);
/// Turns read at once when looking for one.
const FIND_BATCH: usize = 1000;
/// The kv key of the checkpoint.
const CHECKPOINT_KEY: &str = "checkpoint";

/// Every turn that began up to `seq` and has no end is in `open`; some there may have one.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Checkpoint {
    seq: u64,
    /// Submission → sequence of its invoke.
    open: BTreeMap<String, u64>,
}

async fn read_checkpoint(cx: &WorkerCx) -> Result<Checkpoint, vlinder_bus::Error> {
    let entry = cx.bus.kv_get(BUCKET_OPEN_TURNS, CHECKPOINT_KEY).await?;
    Ok(entry
        .and_then(|entry| serde_json::from_slice(&entry.value).ok())
        .unwrap_or_default())
}

/// The beginning of a turn that may still run.
pub async fn find_open(
    cx: &WorkerCx,
    submission: &SubmissionId,
) -> Result<Option<(Invoke, NodeHash)>, Status> {
    let checkpoint = read_checkpoint(cx).await.map_err(status::of_bus)?;
    if let Some(seq) = checkpoint.open.get(submission.as_str()) {
        let stored = cx.bus.get(&cx.log(), *seq).await.map_err(status::of_bus)?;
        let found =
            stored.and_then(|stored| Some((Invoke::try_from(&stored.node).ok()?, stored.hash)));
        return Ok(found);
    }
    let filter = subjects::all_invokes(&cx.ns);
    let mut from = checkpoint.seq + 1;
    loop {
        let batch = cx
            .bus
            .range(&cx.log(), &filter, from, FIND_BATCH)
            .await
            .map_err(status::of_bus)?;
        let Some(last) = batch.last() else {
            return Ok(None);
        };
        from = last.seq + 1;
        for stored in &batch {
            if let Ok(invoke) = Invoke::try_from(&stored.node)
                && invoke.submission == *submission
            {
                return Ok(Some((invoke, stored.hash)));
            }
        }
    }
}

/// An open turn, as the sweeper knows it.
struct Open {
    invoke: Invoke,
    hash: NodeHash,
    seq: u64,
    due_ms: u64,
}

/// Ends overdue turns until the worker drains.
pub async fn run(cx: WorkerCx) -> Result<(), Error> {
    let log = cx.log();
    let mut checkpoint = read_checkpoint(&cx).await?;
    let last_seq = cx.bus.stream_info(&log).await?.last_seq;
    if checkpoint.seq > last_seq {
        // The log lost its tail: what the checkpoint says of it is void.
        checkpoint = Checkpoint::default();
    }
    let mut open: BTreeMap<String, Open> = BTreeMap::new();
    for (submission, seq) in &checkpoint.open {
        if let Some(stored) = cx.bus.get(&log, *seq).await? {
            note_invoke(&mut open, &stored);
        } else {
            tracing::warn!(submission, seq, "an open turn is no longer in the log");
        }
    }
    let mut invokes = cx
        .bus
        .follow(&log, &subjects::all_invokes(&cx.ns), checkpoint.seq + 1)
        .await?;
    // Live ends only keep `open` small: whether a turn that is due has one is looked up in the log.
    let mut ends = cx.bus.seen(&subjects::all_ends(&cx.ns)).await?;
    cx.control.ready();
    let mut invoke_seq = checkpoint.seq;
    let mut early_ends: BTreeMap<String, u64> = BTreeMap::new();
    let mut dirty = false;
    let mut save = tokio::time::interval(CHECKPOINT_EVERY);
    loop {
        let next_due = open.values().map(|turn| turn.due_ms).min();
        let wait = next_due.map_or(CHECKPOINT_EVERY, |due| {
            Duration::from_millis(due.saturating_sub(cx.bus.now_ms())) + SWEEP_GRACE
        });
        tokio::select! {
            () = cx.drain.cancelled() => break,
            Some(item) = invokes.next() => {
                let Ok(stored) = item else { continue };
                invoke_seq = stored.seq;
                dirty = true;
                if note_invoke(&mut open, &stored) {
                    let submission = stored.node.field("submission").unwrap_or_default();
                    if early_ends.remove(submission).is_some() {
                        open.remove(submission);
                    }
                }
            }
            Some(stored) = ends.next() => {
                dirty = true;
                let submission = stored.node.field("submission").unwrap_or_default();
                // An end may be seen before its invoke is delivered here.
                if open.remove(submission).is_none() && stored.seq > invoke_seq {
                    early_ends.insert(submission.to_owned(), stored.seq);
                }
                early_ends.retain(|_, seq| *seq > invoke_seq);
            }
            () = tokio::time::sleep(wait), if next_due.is_some() => tokio::select! {
                () = cx.drain.cancelled() => break,
                () = sweep(&cx, &mut open) => {}
            },
            _ = save.tick(), if dirty => {
                let seq = invoke_seq;
                let open = open.iter().map(|(name, turn)| (name.clone(), turn.seq)).collect();
                let value = serde_json::to_vec(&Checkpoint { seq, open }).unwrap_or_default();
                match cx.bus.kv_put(BUCKET_OPEN_TURNS, CHECKPOINT_KEY, Bytes::from(value), None).await {
                    Ok(_) => dirty = false,
                    Err(error) => tracing::warn!(%error, "the checkpoint of open turns was not written"),
                }
            }
            else => return Err(Error::Other("the log cannot be followed any more".to_owned())),
        }
    }
    Ok(())
}

fn note_invoke(open: &mut BTreeMap<String, Open>, stored: &Stored) -> bool {
    if stored.node.kind != Kind::Invoke {
        return false;
    }
    let Ok(invoke) = Invoke::try_from(&stored.node) else {
        return false;
    };
    let due_ms = stored.time_ms.saturating_add(invoke.timeout_ms);
    let name = invoke.submission.to_string();
    open.insert(
        name,
        Open {
            invoke,
            hash: stored.hash,
            seq: stored.seq,
            due_ms,
        },
    );
    true
}

async fn sweep(cx: &WorkerCx, open: &mut BTreeMap<String, Open>) {
    let now = cx.bus.now_ms();
    let due: Vec<String> = open
        .iter()
        .filter(|(_, turn)| turn.due_ms <= now)
        .map(|(name, _)| name.clone())
        .collect();
    for name in due {
        let Some(turn) = open.remove(&name) else {
            continue;
        };
        let ended = match end_of(cx, &turn.invoke.submission).await {
            Ok(Some(_)) => Ok(()),
            Ok(None) => crate::harness::end_overdue(cx, &turn.invoke, turn.hash)
                .await
                .map(|_| ()),
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            tracing::warn!(
                submission = name,
                error = error.message(),
                "an overdue turn could not be ended, trying again"
            );
            open.insert(name, turn);
            tokio::time::sleep(SWEEP_GRACE).await;
        }
    }
}
