//! One turn, from the request to its end.

use super::Shared;
use super::ends::{cancel, end_overdue};
use super::said::Said;
use super::sessions::{BranchEnd, Head, end_of};
use crate::{status, waiting};
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tracing::Instrument;
use vlinder_bus::wire::{NOTE_AGENT_US, NOTE_BY, NOTE_SOURCE};
use vlinder_bus::{Gaps, Message, Seen, Signal, Stored, subjects};
use vlinder_core::manifest::TIMEOUT_MAX;
use vlinder_core::record::{End, Invoke, Outcome, Source};
use vlinder_core::{
    AgentName, BODY_BYTES_MAX, BranchName, ContentHash, NodeHash, SessionId, SubmissionId,
};
use vlinder_proto::harness as proto;
use vlinder_proto::harness::run_event::Event;
use vlinder_worker::serving::NO_WORKER;

/// Events of one turn that a slow client may be behind; chunks beyond it are dropped, ends never.
const EVENTS_MAX: usize = 256;
/// How often a lost race for the branch head is tried again before it is reported.
const HEAD_TRIES: usize = 4;
/// A live message that was lost is found by reading, first after this long, then ever less often.
const BACKSTOP_FIRST: Duration = Duration::from_secs(1);
const BACKSTOP_MAX: Duration = Duration::from_secs(15);
/// How long after its deadline a turn is ended from here; its runtime worker is given the first go.
const DEADLINE_GRACE: Duration = Duration::from_millis(500);
/// Most turns on one branch that a search for a submission looks through.
const SEARCH_MAX: usize = 100_000;

/// What makes a turn a replay.
pub struct Replayed {
    /// The turn that it runs again.
    pub source: Source,
    /// Where the invoke of that turn stands.
    pub source_seq: u64,
    /// The turn that must stand before it.
    pub follows: Option<SubmissionId>,
}

/// A turn that is stored and will end.
pub struct Turn {
    accepted: proto::Accepted,
    invoke: Invoke,
    invoke_hash: NodeHash,
    invoke_seq: u64,
    /// When it was stored, bus time.
    began_ms: u64,
    ended: Option<(End, Stored)>,
    gaps: Gaps,
    seen: Seen,
    chunks: BoxStream<'static, Signal>,
    cancel_on_disconnect: bool,
    /// The session that the client named, if it did.
    asked_session: Option<SessionId>,
    /// Of a replay: where its source stands, and what must stand before it.
    replayed: Option<(u64, Option<SubmissionId>)>,
}

/// Checks a request and stores its turn, or finds the turn that its submission names.
pub async fn accept(shared: &Shared, request: proto::RunRequest) -> Result<Turn, Status> {
    accept_as(shared, request, None).await
}

/// The same for a turn that may be a replay.
pub async fn accept_as(
    shared: &Shared,
    request: proto::RunRequest,
    replayed: Option<Replayed>,
) -> Result<Turn, Status> {
    let ns = status::namespace(&request.namespace)?;
    let agent = AgentName::new(&request.agent).map_err(status::of_id)?;
    let len = request.input.len() as u64;
    if len > BODY_BYTES_MAX {
        return Err(Status::invalid_argument(format!(
            "input: {len} bytes, expected at most {BODY_BYTES_MAX}"
        )));
    }
    let (submission, first_try) = if request.submission.is_empty() {
        (SubmissionId::fresh(), true)
    } else {
        (
            SubmissionId::new(&request.submission).map_err(status::of_id)?,
            request.first_try,
        )
    };
    let timeout = timeout_of(shared, &agent, request.timeout_ms).await?;
    let (session_id, fresh_session) = session_of(&request.session, &submission, first_try)?;

    let gaps = shared.cx.bus.gaps();
    let seen = shared
        .cx
        .bus
        .seen_end(&ns, &submission)
        .await
        .map_err(status::of_bus)?;
    let chunks = if request.stream {
        shared
            .cx
            .bus
            .signals(&subjects::chunk_signal(&ns, &submission))
            .await
            .map_err(status::of_bus)?
    } else {
        futures::stream::pending().boxed()
    };
    let (source, replayed) = match replayed {
        Some(replayed) => (
            Some(replayed.source),
            Some((replayed.source_seq, replayed.follows)),
        ),
        None => (None, None),
    };
    let mut turn = Turn {
        accepted: proto::Accepted::default(),
        invoke: Invoke {
            namespace: ns,
            agent: agent.clone(),
            session: session_id.clone(),
            branch: BranchName::main(),
            submission,
            turn: 0,
            previous: None,
            state: None,
            timeout_ms: timeout.as_millis() as u64,
            origin: None,
            source,
        },
        invoke_hash: NodeHash::from_bytes([0; 32]),
        invoke_seq: 0,
        began_ms: 0,
        ended: None,
        gaps,
        seen,
        chunks,
        cancel_on_disconnect: request.cancel_on_disconnect,
        asked_session: None,
        replayed,
    };
    let input = Bytes::from(request.input);
    turn.asked_session = (!request.session.is_empty()).then_some(session_id);
    let attached = !first_try && attach_ended(shared, &mut turn, &input).await?;
    if !attached {
        begin_or_attach(
            shared,
            &mut turn,
            &request.branch,
            &request.session_name,
            input,
            fresh_session,
        )
        .await?;
    } else {
        turn.accepted.attached = true;
    }
    turn.accepted.agent = turn.invoke.agent.to_string();
    turn.accepted.session = turn.invoke.session.to_string();
    turn.accepted.branch = turn.invoke.branch.to_string();
    turn.accepted.submission = turn.invoke.submission.to_string();
    Ok(turn)
}

/// The turn's time limit; fails when the agent does not exist.
pub async fn timeout_of(
    shared: &Shared,
    agent: &AgentName,
    asked_ms: u64,
) -> Result<Duration, Status> {
    let mut infra = shared.infra.now();
    if infra.agent(agent).is_none() {
        infra = shared.infra.fresh().await.map_err(status::of_worker)?;
    }
    let Some((version, _)) = infra.agent(agent) else {
        let names: Vec<String> = infra
            .agents()
            .iter()
            .map(|(known, _)| known.manifest.name.to_string())
            .collect();
        let known = if names.is_empty() {
            "none is deployed".to_owned()
        } else {
            format!("deployed: {}", names.join(", "))
        };
        return Err(Status::not_found(format!(
            "agent {agent} does not exist; {known}"
        )));
    };
    let asked = if asked_ms == 0 {
        version.manifest.timeout()
    } else {
        Duration::from_millis(asked_ms)
    };
    Ok(asked.min(TIMEOUT_MAX))
}

/// The session of a turn. Without one a session is begun whose id follows from the submission, so
/// that the same submission sent again finds the same session.
fn session_of(
    asked: &str,
    submission: &SubmissionId,
    first_try: bool,
) -> Result<(SessionId, bool), Status> {
    if !asked.is_empty() {
        return Ok((SessionId::new(asked).map_err(status::of_id)?, false));
    }
    let tail = submission
        .as_str()
        .strip_prefix("t-")
        .unwrap_or(submission.as_str());
    let derived = format!("s-{tail}");
    let id = SessionId::new(&derived).unwrap_or_else(|_| {
        // Too long with the prefix: a hash of it is as good.
        let hash = ContentHash::of(derived.as_bytes()).to_string();
        SessionId::new(&hash[..32]).expect("hexadecimal digits are a session id")
    });
    Ok((id, first_try))
}

/// Attaches to a turn of this submission that has ended, if there is one.
async fn attach_ended(shared: &Shared, turn: &mut Turn, input: &Bytes) -> Result<bool, Status> {
    let Some((end, end_stored)) = end_of(&shared.cx, &turn.invoke.submission).await? else {
        return Ok(false);
    };
    let (log, bus) = (shared.cx.log(), &shared.cx.bus);
    let subject = shared
        .sessions
        .invoke_subject(&end.session, &end.agent, &end.branch);
    // Who asks again asks about the last turn, as good as always.
    let last = bus.last(&log, &subject).await.map_err(status::of_bus)?;
    let mut found = last.and_then(|stored| invoke_of(stored, &turn.invoke.submission));
    if found.is_none() {
        let turns = bus.all_on(&log, &subject, SEARCH_MAX).await;
        let mut turns = turns.map_err(status::of_bus)?.into_iter();
        found = turns.find_map(|stored| invoke_of(stored, &turn.invoke.submission));
    }
    if let Some((invoke, stored)) = found {
        turn.check_same(&invoke, &stored, input)?;
        adopt(turn, invoke, &stored);
        turn.ended = Some((end, end_stored));
        return Ok(true);
    }
    Err(Status::data_loss(format!(
        "turn {} has an end but no beginning",
        turn.invoke.submission
    )))
}

/// The invoke of a submission, if this is it.
fn invoke_of(stored: Stored, submission: &SubmissionId) -> Option<(Invoke, Stored)> {
    let invoke = Invoke::try_from(&stored.node).ok()?;
    (invoke.submission == *submission).then_some((invoke, stored))
}

fn adopt(turn: &mut Turn, invoke: Invoke, stored: &Stored) {
    turn.invoke = invoke;
    turn.invoke_hash = stored.hash;
    turn.invoke_seq = stored.seq;
    turn.began_ms = stored.time_ms;
}

/// Stores the turn behind the head of its branch, or attaches to it if it stands there already.
async fn begin_or_attach(
    shared: &Shared,
    turn: &mut Turn,
    branch: &str,
    session_name: &str,
    input: Bytes,
    fresh_session: bool,
) -> Result<(), Status> {
    let id = turn.invoke.session.clone();
    let agent = turn.invoke.agent.clone();
    for attempt in 0..HEAD_TRIES {
        let session = shared
            .sessions
            .open(&id, &agent, session_name, fresh_session && attempt == 0)
            .await?;
        if session.agent != agent {
            return Err(Status::invalid_argument(format!(
                "session {id} talks to agent {}, not {agent}",
                session.agent
            )));
        }
        turn.invoke.branch = match branch {
            "" => session.default_branch.clone(),
            name => BranchName::new(name).map_err(status::of_id)?,
        };
        let end = shared
            .sessions
            .branch_end(&id, &session, &turn.invoke.branch, attempt == 0)
            .await?;
        let head = match end {
            BranchEnd::Idle(head) => head,
            BranchEnd::Running(running) => {
                let (invoke, stored) = *running;
                if invoke.submission != turn.invoke.submission {
                    return Err(Status::aborted(format!(
                        "turn {} runs on branch {} of session {id}; wait for its end or cancel it",
                        invoke.submission, invoke.branch
                    )));
                }
                turn.check_same(&invoke, &stored, &input)?;
                adopt(turn, invoke, &stored);
                turn.accepted.attached = true;
                return Ok(());
            }
            BranchEnd::Sealed => {
                return Err(Status::failed_precondition(format!(
                    "branch {} of session {id} is sealed and takes no more turns; {} is the default branch, and any node can be forked",
                    turn.invoke.branch, session.default_branch
                )));
            }
        };
        if head.previous.as_ref() == Some(&turn.invoke.submission) {
            // It ended between two looks.
            if attach_ended(shared, turn, &input).await? {
                turn.accepted.attached = true;
                return Ok(());
            }
        }
        if let Some((_, follows)) = &turn.replayed
            && *follows != head.previous
        {
            return Err(Status::already_exists(format!(
                "branch {} of session {id} has turns that are not of this replay; give another name",
                turn.invoke.branch
            )));
        }
        shared.room.admit(&shared.cx).await?;
        turn.invoke.turn = head.turns;
        turn.invoke.previous = head.previous.clone();
        turn.invoke.state = head.state;
        let node = turn.invoke.to_node(vec![head.parent], &input);
        let subject = shared
            .sessions
            .invoke_subject(&id, &agent, &turn.invoke.branch);
        let mut message = Message::new(shared.cx.log(), subject, node, input.clone())
            .expecting(head.seq)
            .note(NOTE_BY, &shared.cx.id);
        // By submission, so that a client's retry is swallowed whichever harness it meets.
        message.id = format!("invoke:{}", turn.invoke.submission);
        if let Some((source_seq, _)) = &turn.replayed {
            message = message.note(NOTE_SOURCE, source_seq);
        }
        match shared.cx.bus.append(message).await {
            Ok(done) if !done.duplicate => {
                turn.invoke_hash = done.hash;
                turn.invoke_seq = done.seq;
                turn.began_ms = shared.cx.bus.now_ms();
                return Ok(());
            }
            Ok(done) => {
                // The id was seen: read what is stored there instead of assuming that it is ours.
                let stored = shared
                    .cx
                    .bus
                    .get(&shared.cx.log(), done.seq)
                    .await
                    .map_err(status::of_bus)?;
                let stored = stored
                    .ok_or_else(|| Status::data_loss("a confirmed turn is not in the log"))?;
                let invoke = Invoke::try_from(&stored.node)
                    .map_err(|error| Status::data_loss(error.to_string()))?;
                if invoke.submission != turn.invoke.submission {
                    return Err(Status::already_exists(format!(
                        "submission {} was used elsewhere",
                        turn.invoke.submission
                    )));
                }
                turn.check_same(&invoke, &stored, &input)?;
                turn.ended = end_of(&shared.cx, &invoke.submission).await?;
                adopt(turn, invoke, &stored);
                turn.accepted.attached = true;
                return Ok(());
            }
            Err(vlinder_bus::Error::Conflict { .. }) => {
                shared.sessions.forget_head(&id, &turn.invoke.branch)
            }
            Err(error) => return Err(status::of_bus(error)),
        }
    }
    Err(Status::aborted(format!(
        "others keep adding turns to session {id}; try again"
    )))
}

impl Turn {
    /// Whether what was stored under this submission is what the client asks for now.
    fn check_same(&self, invoke: &Invoke, stored: &Stored, input: &Bytes) -> Result<(), Status> {
        let other = if stored.node.body_hash != ContentHash::of(input) {
            "another input"
        } else if invoke.agent != self.invoke.agent {
            "another agent"
        } else if self
            .asked_session
            .as_ref()
            .is_some_and(|asked| *asked != invoke.session)
        {
            "another session"
        } else if invoke.source != self.invoke.source {
            "another replay, or as none"
        } else {
            return Ok(());
        };
        Err(Status::already_exists(format!(
            "submission {} was used for {other}; a new turn needs a new submission id",
            invoke.submission
        )))
    }

    /// Streams the turn to its end. `place` is freed when the client has everything or has left.
    pub fn into_stream(
        self,
        shared: Arc<Shared>,
        place: tokio::sync::OwnedSemaphorePermit,
    ) -> impl Stream<Item = Result<proto::RunEvent, Status>> + Send {
        let (tx, rx) = mpsc::channel(EVENTS_MAX);
        let following = async move {
            let last = match self.follow(&shared, &tx).await {
                Ok(Some((event, _))) => Ok(event),
                Ok(None) => return,
                Err(status) => Err(status),
            };
            let _ = tx
                .send(last.map(|end| proto::RunEvent {
                    event: Some(Event::End(end)),
                }))
                .await;
            drop(place);
        };
        tokio::spawn(following.in_current_span());
        ReceiverStream::new(rx)
    }

    /// Waits for the end without a client: the end and the agent's HTTP time in microseconds.
    pub async fn finish(self, shared: &Shared) -> Result<(proto::End, u64), Status> {
        self.finish_telling(shared, |_| ()).await
    }

    /// The same; `waits` is told why nobody can serve the turn at the moment.
    pub async fn finish_telling(
        self,
        shared: &Shared,
        mut waits: impl FnMut(String),
    ) -> Result<(proto::End, u64), Status> {
        let (tx, mut rx) = mpsc::channel(EVENTS_MAX);
        let drain = async {
            while let Some(event) = rx.recv().await {
                if let Ok(proto::RunEvent {
                    event: Some(Event::Waiting(waiting)),
                }) = event
                {
                    waits(waiting.reason);
                }
            }
        };
        let (end, ()) = futures::join!(
            async {
                let end = self.follow(shared, &tx).await;
                drop(tx);
                end
            },
            drain
        );
        end?.ok_or_else(|| Status::cancelled("the turn was not waited for"))
    }

    /// Waits for the end and returns it with the agent's HTTP time; `None` when the client left.
    async fn follow(
        mut self,
        shared: &Shared,
        tx: &mpsc::Sender<Result<proto::RunEvent, Status>>,
    ) -> Result<Option<(proto::End, u64)>, Status> {
        let cx = &shared.cx;
        // Nothing leaves before what it says is durable.
        cx.bus
            .settled(&cx.log(), self.invoke_seq)
            .await
            .map_err(status::of_bus)?;
        let accepted = proto::RunEvent {
            event: Some(Event::Accepted(self.accepted.clone())),
        };
        if tx.send(Ok(accepted)).await.is_err() && self.cancel_on_disconnect {
            cancel(cx, &self.invoke.submission, "its client left").await?;
            return Ok(None);
        }
        let spent = cx.bus.now_ms().saturating_sub(self.began_ms);
        let left = Duration::from_millis(self.invoke.timeout_ms.saturating_sub(spent));
        let deadline = Instant::now() + left + DEADLINE_GRACE;
        let mut backstop = BACKSTOP_FIRST;
        let mut next_look = Instant::now() + backstop;
        let mut told = String::new();
        let mut said = Said::default();
        let (end, stored) = loop {
            if let Some(ended) = self.ended.take() {
                break ended;
            }
            tokio::select! {
                biased;
                Some(stored) = self.seen.next() => {
                    if let Ok(end) = End::try_from(&stored.node) {
                        break (end, stored);
                    }
                }
                Some(signal) = self.chunks.next() => {
                    if let Some(chunk) = said.take(&signal) {
                        let _ = tx.try_send(Ok(proto::RunEvent { event: Some(Event::Chunk(chunk)) }));
                    }
                }
                () = tx.closed() => {
                    if self.cancel_on_disconnect {
                        cancel(cx, &self.invoke.submission, "its client left").await?;
                    }
                    return Ok(None);
                }
                () = tokio::time::sleep_until(deadline) => {
                    let (end, stored) = end_overdue(cx, &self.invoke, self.invoke_hash).await?;
                    break (end, stored);
                }
                // An end that came while the connection was lost will not be seen any more.
                () = self.gaps.next() => next_look = Instant::now(),
                () = tokio::time::sleep_until(next_look) => {
                    self.ended = end_of(cx, &self.invoke.submission).await?;
                    if self.ended.is_none() {
                        let age = Duration::from_millis(cx.bus.now_ms().saturating_sub(self.began_ms));
                        let reason = waiting::why(cx, &shared.infra, &self.invoke, self.invoke_seq, age).await.unwrap_or_default();
                        if !reason.is_empty() && reason != told {
                            let waiting = proto::Waiting { reason: reason.clone() };
                            let _ = tx.try_send(Ok(proto::RunEvent { event: Some(Event::Waiting(waiting)) }));
                        }
                        told = reason;
                    }
                    backstop = (backstop * 2).min(BACKSTOP_MAX);
                    next_look = Instant::now() + backstop;
                }
            }
        };
        // Chunks that came before the end go out before it.
        while let Some(Some(signal)) = self.chunks.next().now_or_never() {
            if let Some(chunk) = said.take(&signal) {
                let _ = tx
                    .send(Ok(proto::RunEvent {
                        event: Some(Event::Chunk(chunk)),
                    }))
                    .await;
            }
        }
        self.remember(shared, &end, &stored);
        cx.bus
            .settled(&cx.log(), stored.seq)
            .await
            .map_err(status::of_bus)?;
        let output = cx.bus.load(&stored.body).await.map_err(status::of_bus)?;
        if end.outcome == Outcome::Done
            && let Some(chunk) = said.rest(&output)
        {
            let event = Some(Event::Chunk(chunk));
            let _ = tx.send(Ok(proto::RunEvent { event })).await;
        }
        let by = stored
            .notes
            .get(NOTE_BY)
            .map(String::as_str)
            .unwrap_or_default();
        let mut code = end.code.clone().unwrap_or_default();
        if end.outcome == Outcome::Deadline && told.starts_with(NO_WORKER) {
            code = "no_worker".to_owned();
        }
        let agent_us = stored
            .notes
            .get(NOTE_AGENT_US)
            .and_then(|text| text.parse().ok())
            .unwrap_or(0);
        let end = proto::End {
            outcome: end.outcome.to_string(),
            output: output.to_vec(),
            code,
            node: by.split('/').next().unwrap_or_default().to_owned(),
            duration_ms: stored.time_ms.saturating_sub(self.began_ms),
            hash: stored.hash.to_string(),
            state: end.state.map(|root| root.to_string()).unwrap_or_default(),
        };
        Ok(Some((end, agent_us)))
    }

    fn remember(&self, shared: &Shared, end: &End, stored: &Stored) {
        let head = Head {
            seq: self.invoke_seq,
            parent: stored.hash,
            previous: Some(self.invoke.submission.clone()),
            state: end.state,
            turns: self.invoke.turn + 1,
        };
        shared
            .sessions
            .remember_head(&self.invoke.session, &self.invoke.branch, head);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_submission_without_a_session_always_finds_the_same_one() {
        let submission = SubmissionId::new("t-abc").unwrap();
        assert_eq!(
            session_of("", &submission, true).unwrap().0.as_str(),
            "s-abc"
        );
        assert_eq!(
            session_of("", &submission, false).unwrap().0.as_str(),
            "s-abc"
        );
        let long = SubmissionId::new("x".repeat(64)).unwrap();
        assert_eq!(
            session_of("", &long, true).unwrap().0,
            session_of("", &long, false).unwrap().0
        );
        assert!(session_of("../x", &submission, true).is_err());
    }
}
