//! Ends of turns that are written from outside the runtime: cancelled by hand, or overdue.
//!
//! The first end in the log is the end, so these may race with the runtime and with each other; whoever
//! asks gets the end that won.

use super::sessions::end_of;
use crate::status;
use bytes::Bytes;
use tonic::Status;
use vlinder_bus::wire::{NOTE_BY, NOTE_REASON};
use vlinder_bus::{Message, Stored, Subject};
use vlinder_core::record::{End, Invoke, Outcome};
use vlinder_core::{NodeHash, SubmissionId};
use vlinder_worker::WorkerCx;

/// Ends a turn as cancelled, unless it has ended; returns its end and whether that came first.
pub async fn cancel(
    cx: &WorkerCx,
    submission: &SubmissionId,
    reason: &str,
) -> Result<(End, bool), Status> {
    if let Some((end, _)) = end_of(cx, submission).await? {
        return Ok((end, true));
    }
    let found = crate::infra::find_open(cx, submission).await?;
    let (invoke, hash) = found.ok_or_else(|| {
        Status::not_found(format!(
            "turn {submission} does not exist; `vlinder turn list` shows what runs"
        ))
    })?;
    let (end, _) = append_end(cx, &invoke, hash, Outcome::Cancelled, reason).await?;
    let already = end.outcome != Outcome::Cancelled;
    Ok((end, already))
}

/// Ends a turn whose deadline has passed.
pub async fn end_overdue(
    cx: &WorkerCx,
    invoke: &Invoke,
    hash: NodeHash,
) -> Result<(End, Stored), Status> {
    let reason = format!("the turn took longer than {} ms", invoke.timeout_ms);
    append_end(cx, invoke, hash, Outcome::Deadline, &reason).await
}

/// Appends an end from outside the runtime. The first end wins: returns whichever that is.
async fn append_end(
    cx: &WorkerCx,
    invoke: &Invoke,
    hash: NodeHash,
    outcome: Outcome,
    reason: &str,
) -> Result<(End, Stored), Status> {
    let end = End {
        namespace: invoke.namespace.clone(),
        agent: invoke.agent.clone(),
        session: invoke.session.clone(),
        branch: invoke.branch.clone(),
        submission: invoke.submission.clone(),
        outcome,
        state: invoke.state,
        code: Some(outcome.to_string()),
    };
    // Parents are all maximal results that stand in the log by now; none: the invoke.
    let parents = vlinder_worker::service::maximal_results(cx, &invoke.submission, hash).await;
    let node = end.to_node(parents.map_err(status::of_bus)?, reason.as_bytes());
    let subject = Subject::End {
        ns: cx.ns.clone(),
        submission: invoke.submission.clone(),
    };
    let message = Message::new(
        cx.log(),
        subject,
        node,
        Bytes::copy_from_slice(reason.as_bytes()),
    )
    .expecting(0)
    .note(NOTE_BY, &cx.id)
    .note(NOTE_REASON, reason);
    match cx.bus.append(message).await {
        Ok(_) | Err(vlinder_bus::Error::Conflict { .. }) => {}
        Err(error) => return Err(status::of_bus(error)),
    }
    let winner = end_of(cx, &invoke.submission).await?;
    winner.ok_or_else(|| Status::data_loss("a confirmed end is not in the log"))
}
