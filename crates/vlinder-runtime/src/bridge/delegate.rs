//! Work that an agent gives to another one (features D5).
//!
//! A delegation is a turn of its own: with its own session, which begins at the request that asked for
//! it, and its own state, which begins empty. Its names follow from the call, so that a turn that is
//! tried again finds what it delegated instead of delegating it twice. `/wait` is a call like any other:
//! its answer is on record, and a turn that is tried again does not wait a second time.
//!
//! Whoever waits gives its slot back (see `pool`). Cycles end at [`DEPTH_MAX`]; nothing that a turn
//! delegated outlives its deadline, and where it ends without a reply, so does what it delegated.

use super::call::{self, Answerer, Ask, CallError, Prepared, try_append};
use super::reply::{Reply, error};
use super::{of_answer, of_error};
use crate::agent::Shared;
use crate::turn::answers::Answered;
use crate::turn::invocation::Invocation;
use bytes::Bytes;
use futures::StreamExt;
use serde::Deserialize;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use vlinder_bus::wire::{NOTE_ATTEMPT, NOTE_BY};
use vlinder_bus::{Message, Stored, Subject};
use vlinder_core::ids::delegated;
use vlinder_core::record::{CallStatus, End, Invoke, Origin, Outcome, SessionEvent, SessionVerb};
use vlinder_core::{AgentName, BranchName, Selector, SubmissionId};
use vlinder_worker::Answer;
use vlinder_worker::infra::{FLEET, Infra};

/// How many delegations may lead from what a client asked for to a turn.
pub(crate) const DEPTH_MAX: u32 = 8;
/// How often one turn may delegate.
const DELEGATIONS_MAX: usize = 64;
/// First and longest pause between two looks for an end that the subscription may have lost.
const BACKSTOP: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(15));

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DelegateBody {
    target: String,
    input: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WaitBody {
    handle: String,
}

/// Work for another agent.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Delegation {
    target: AgentName,
    input: Bytes,
    /// How long it may take at most, as its target's manifest says.
    timeout: Duration,
}

/// `POST /delegate {target, input}`.
pub(super) async fn delegate(
    shared: &Arc<Shared>,
    invocation: &Arc<Invocation>,
    body: &[u8],
    label: Option<String>,
) -> Reply {
    let wanted: DelegateBody = match serde_json::from_slice(body) {
        Ok(body) => body,
        Err(cause) => {
            let message = format!("expected {{\"target\": …, \"input\": \"…\"}}: {cause}");
            return error(400, "bad_request", &message);
        }
    };
    let asked: String = wanted.target.chars().take(128).collect();
    let found = find(shared, invocation, &wanted.target).await;
    let answerer = match &found {
        Err(refusal) => Answerer::Bridge(refusal.clone()),
        Ok((target, timeout)) => Answerer::Delegation(Arc::new(Delegation {
            target: target.clone(),
            input: wanted.input.clone().into(),
            timeout: *timeout,
        })),
    };
    let Ok(selector) = Selector::new(&asked) else {
        return error(400, "bad_request", "target: expected the name of an agent");
    };
    let ask = Ask {
        service: "delegate",
        backend: "agent".to_owned(),
        operation: "delegate",
        selector,
        body: Bytes::copy_from_slice(body),
        label,
        answerer,
    };
    let answered = match call::perform(shared, invocation, Arc::new(ask)).await {
        Ok(answered) => answered,
        Err(error) => return of_error(&error),
    };
    if answered.result.status == CallStatus::Ok {
        // Also of a call that was answered from the record, where the handle may be that of another turn.
        let target = found
            .map(|(target, _)| target)
            .or_else(|_| AgentName::new(&asked));
        match (handle_in(shared, &answered).await, target) {
            (Err(error), _) => return of_error(&error),
            (Ok(Some(handle)), Ok(target)) => invocation.delegated(handle, target),
            // A repaired answer may be anything.
            _ => {}
        }
    }
    of_answer(shared, &answered)
        .await
        .unwrap_or_else(|error| of_error(&error))
}

/// The handle that an answer gives.
async fn handle_in(
    shared: &Shared,
    answered: &Answered,
) -> Result<Option<SubmissionId>, CallError> {
    let body = answered.body(&shared.cx.bus, &shared.cx.log()).await?;
    let read: Option<WaitBody> = serde_json::from_slice(&body).ok();
    Ok(read.and_then(|read| SubmissionId::new(&read.handle).ok()))
}

/// The agent behind a name and how long its turns may take, or why this turn may not ask it.
async fn find(
    shared: &Shared,
    invocation: &Invocation,
    target: &str,
) -> Result<(AgentName, Duration), Answer> {
    let caller = &invocation.turn.invoke;
    if caller.depth() >= DEPTH_MAX {
        let message = format!(
            "{DEPTH_MAX} delegations lead to this turn already, which is the most: do agents delegate to each other in a circle?"
        );
        return Err(Answer::error(409, "too_deep", &message));
    }
    if invocation.delegations() >= DELEGATIONS_MAX {
        let message = format!("a turn may delegate {DELEGATIONS_MAX} times");
        return Err(Answer::error(429, "too_many_delegations", &message));
    }
    let mut infra = shared.infra.now();
    if resolve(&infra, &caller.agent, target).is_none()
        && let Ok(fresh) = shared.infra.fresh().await
    {
        infra = fresh;
    }
    resolve(&infra, &caller.agent, target).ok_or_else(|| {
        let shown: String = target.chars().take(128).collect();
        let message =
            format!("no agent {shown:?} is deployed; `vlinder agent list` shows those that are");
        Answer::error(404, "agent_not_found", &message)
    })
}

/// An agent by its name, or by the alias that a fleet of the caller's has for it.
fn resolve(infra: &Infra, caller: &AgentName, target: &str) -> Option<(AgentName, Duration)> {
    let deployed = |name: &str| {
        let name = AgentName::new(name).ok()?;
        let (version, _) = infra.agent(&name)?;
        Some((name, version.manifest.timeout()))
    };
    deployed(target).or_else(|| {
        let fleets = infra
            .all(FLEET)
            .filter_map(|(_, entry)| entry.value.as_ref());
        let mut fleets = fleets.filter_map(|fleet| fleet["agents"].as_object());
        let ours = fleets.find(|agents| {
            agents.contains_key(target) && agents.values().any(|name| name == caller.as_str())
        });
        deployed(ours?.get(target)?.as_str()?)
    })
}

impl Delegation {
    /// Begins the turn, unless it was begun before; the answer to the call.
    pub async fn begin(
        &self,
        shared: &Shared,
        invocation: &Invocation,
        prepared: &Prepared,
    ) -> Result<Answer, CallError> {
        let cx = &shared.cx;
        let caller = &invocation.turn.invoke;
        let (submission, session) = delegated(&caller.submission, &prepared.key);
        let event = SessionEvent {
            namespace: cx.ns.clone(),
            session: session.clone(),
            agent: self.target.clone(),
            name: session.to_string(),
            verb: SessionVerb::Start,
        };
        let subject = Subject::Session {
            ns: cx.ns.clone(),
            session: session.clone(),
        };
        let node = event.to_node(vec![prepared.hash], b"");
        let message = Message::new(cx.ctl(), subject.clone(), node, Bytes::new()).expecting(0);
        let start = match try_append(shared, invocation, message).await {
            Ok(appended) => appended.hash,
            Err(CallError::Bus(vlinder_bus::Error::Conflict { .. })) => {
                let first = cx.bus.range(&cx.ctl(), &subject.to_string(), 1, 1).await?;
                let first = first.into_iter().next();
                first
                    .map(|stored| stored.hash)
                    .ok_or_else(|| vlinder_bus::Error::Missing {
                        what: format!("the beginning of session {session}"),
                    })?
            }
            Err(error) => return Err(error),
        };
        let left = invocation.turn.deadline_ms.saturating_sub(cx.bus.now_ms());
        let invoke = Invoke {
            namespace: cx.ns.clone(),
            agent: self.target.clone(),
            session: session.clone(),
            branch: BranchName::main(),
            submission: submission.clone(),
            turn: 0,
            previous: None,
            state: None,
            timeout_ms: left.min(self.timeout.as_millis() as u64).max(1),
            origin: Some(Origin {
                caller: caller.submission.clone(),
                trace: caller.trace().clone(),
                depth: caller.depth() + 1,
            }),
            source: None,
        };
        let subject = Subject::Invoke {
            ns: cx.ns.clone(),
            agent: self.target.clone(),
            session,
            branch: BranchName::main(),
        };
        let node = invoke.to_node(vec![start], &self.input);
        let mut message = Message::new(cx.log(), subject, node, self.input.clone())
            .expecting(0)
            .note(NOTE_BY, &cx.id)
            .note(NOTE_ATTEMPT, invocation.turn.attempt);
        message.id = format!("invoke:{submission}");
        match try_append(shared, invocation, message).await {
            // An earlier try of this turn was as far.
            Ok(_) | Err(CallError::Bus(vlinder_bus::Error::Conflict { .. })) => {}
            Err(error) => return Err(error),
        }
        Ok(Answer::json(&json!({ "handle": submission })))
    }
}

/// `POST /wait {handle}`.
pub(super) async fn wait(
    shared: &Arc<Shared>,
    invocation: &Arc<Invocation>,
    body: &[u8],
    label: Option<String>,
) -> Reply {
    let handle = match serde_json::from_slice::<WaitBody>(body) {
        Ok(body) => body.handle,
        Err(cause) => {
            let message = format!("expected {{\"handle\": \"…\"}}: {cause}");
            return error(400, "bad_request", &message);
        }
    };
    let known = SubmissionId::new(&handle).ok();
    let known = known.and_then(|handle| Some((invocation.delegate(&handle)?, handle)));
    let Some((target, handle)) = known else {
        let message = "this turn has delegated nothing under that handle";
        return error(404, "unknown_handle", message);
    };
    let Ok(selector) = Selector::new(target.as_str()) else {
        return error(400, "bad_request", "the handle names no agent");
    };
    let ask = Ask {
        service: "delegate",
        backend: "agent".to_owned(),
        operation: "wait",
        selector,
        body: json!({ "handle": handle }).to_string().into(),
        label,
        answerer: Answerer::End(handle),
    };
    let answered = match call::perform(shared, invocation, Arc::new(ask)).await {
        Ok(answered) => answered,
        Err(error) => return of_error(&error),
    };
    of_answer(shared, &answered)
        .await
        .unwrap_or_else(|error| of_error(&error))
}

/// Waits for the end of a delegated turn: the answer to whoever waits. Its deadline is not later than
/// the caller's, which bounds the wait.
pub(super) async fn end_of(
    shared: &Shared,
    invocation: &Invocation,
    handle: &SubmissionId,
) -> Result<Answer, CallError> {
    let _slot = invocation.pool.wait();
    let cx = &shared.cx;
    let subject = Subject::End {
        ns: cx.ns.clone(),
        submission: handle.clone(),
    };
    let mut gaps = cx.bus.gaps();
    let mut seen = cx.bus.seen_end(&cx.ns, handle).await?;
    let mut pause = BACKSTOP.0;
    loop {
        match cx.bus.first(&cx.log(), &subject).await {
            Ok(Some(stored)) => return answer_of(shared, &stored).await,
            Ok(None) => {}
            Err(error) if error.is_retryable() => {
                tracing::warn!(%error, "cannot look for the end of a delegation");
            }
            Err(error) => return Err(error.into()),
        }
        tokio::select! {
            stored = seen.next() => match stored {
                Some(stored) if End::try_from(&stored.node).is_ok() => {
                    return answer_of(shared, &stored).await;
                }
                Some(_) => {}
                None => tokio::time::sleep(pause).await,
            },
            () = gaps.next() => {}
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(BACKSTOP.1),
        }
    }
}

async fn answer_of(shared: &Shared, stored: &Stored) -> Result<Answer, CallError> {
    let end = match End::try_from(&stored.node) {
        Ok(end) => end,
        Err(error) => return Ok(Answer::error(502, "bad_end", &error.to_string())),
    };
    let body = shared.cx.bus.load(&stored.body).await?;
    let http = match end.outcome {
        Outcome::Done => return Ok(Answer::ok("text/plain; charset=utf-8", body)),
        Outcome::Failed => 502,
        Outcome::Cancelled => 409,
        Outcome::Deadline => 504,
    };
    let code = end.code.unwrap_or_else(|| end.outcome.to_string());
    let message = format!("agent {}: {}", end.agent, String::from_utf8_lossy(&body));
    Ok(Answer::error(http, &code, &message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_delegations_follow_from_the_call() {
        let caller = SubmissionId::new("t-1").unwrap();
        let key = |k| vlinder_core::hash::call_key("delegate", "delegate", "agent", "b", b"{}", k);
        let (turn, session) = delegated(&caller, &key(0));
        assert_eq!(turn.as_str(), session.as_str());
        assert!(session.is_delegated());
        assert_eq!(delegated(&caller, &key(0)).0, turn);
        assert_ne!(delegated(&caller, &key(1)).0, turn);
        let other = SubmissionId::new("t-2").unwrap();
        assert_ne!(delegated(&other, &key(0)).0, turn);
        assert_eq!(SubmissionId::new(turn.as_str()).unwrap(), turn);
    }
}
