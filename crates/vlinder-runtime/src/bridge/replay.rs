//! Calls of a replayed turn that the record of its source answers.
//!
//! Such a call gets nodes of its own all the same, so that the turn's record is complete: the request as the
//! agent made it, on the turn's own subject, where no worker waits for it, and a result that says which one
//! it was taken from. What a tunnel carries is not on record and what a secret says must not be, so calls
//! out and for secrets always run.

use super::call::{Answerer, Ask, CallError, Prepared, try_append};
use crate::agent::Shared;
use crate::turn::answers::Answered;
use crate::turn::invocation::Invocation;
use std::sync::Arc;
use vlinder_bus::Message;
use vlinder_bus::wire::{NOTE_ATTEMPT, NOTE_BY, NOTE_REPAIRED, NOTE_REPLAYED, NOTE_REQUEST};
use vlinder_core::record::{CallResult, CallStatus};
use vlinder_worker::service::call_subject;

/// Services whose answers are not taken from the record.
const ALWAYS_LIVE: [&str; 2] = ["egress", "secret"];

/// The answer to a call as the turn's source has it, put on record in this turn; `None` where it runs.
pub(crate) async fn answer(
    shared: &Shared,
    invocation: &Invocation,
    ask: &Ask,
    prepared: &Prepared,
) -> Result<Option<Arc<Answered>>, CallError> {
    let Some(source) = &invocation.source else {
        return Ok(None);
    };
    if ALWAYS_LIVE.contains(&ask.service) {
        return Ok(None);
    }
    let store = match ask.answerer {
        Answerer::Store { changes_state } => Some((prepared.state, changes_state)),
        _ => None,
    };
    let Some(recorded) = source.answer_to(&prepared.key, store) else {
        return Ok(None);
    };
    let cx = &shared.cx;
    let mut result = CallResult {
        submission: invocation.turn.invoke.submission.clone(),
        ..recorded.answered.result.clone()
    };
    let body = match &recorded.repair {
        None => recorded.answered.body(&cx.bus, &cx.log()).await?,
        Some(repair) => {
            if let Some(http) = repair.http {
                result.http = http;
                result.status = match http < 400 {
                    true => CallStatus::Ok,
                    false => CallStatus::Error,
                };
            }
            if let Some(content_type) = &repair.content_type {
                result.content_type.clone_from(content_type);
            }
            cx.bus.load(&repair.body).await?
        }
    };
    let submission = &invocation.turn.invoke.submission;
    invocation.answers.listen(cx, submission).await?;
    let answer = invocation.answers.wait(prepared.key);
    let subject = call_subject(&cx.ns, submission);
    let note = |message: Message| {
        message
            .note(NOTE_BY, &cx.id)
            .note(NOTE_ATTEMPT, invocation.turn.attempt)
    };
    let asked = Message::new(
        cx.log(),
        subject.clone(),
        prepared.node.clone(),
        ask.body.clone(),
    );
    let asked = try_append(shared, invocation, note(asked)).await?;
    let node = result.to_node(prepared.hash, &body);
    let mut given = note(Message::new(cx.log(), subject, node, body))
        .note(NOTE_REQUEST, asked.seq)
        .note(NOTE_REPLAYED, recorded.answered.hash);
    if let Some(repair) = &recorded.repair {
        given = given.note(NOTE_REPAIRED, repair.event);
    }
    try_append(shared, invocation, given).await?;
    Ok(Some(answer.await))
}
