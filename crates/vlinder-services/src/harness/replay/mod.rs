//! `Replay`: turns of a session again, compared with what they were.
//!
//! Safe to repeat: branch, session and submissions follow from the request's name, so the same request goes on
//! where an earlier one stopped, attaches to a turn that runs, and only compares those that have ended.
//! A client that leaves ends the replay after the turn that runs.

mod compare;
mod plan;

use super::Shared;
use super::run::{Replayed, accept_as};
use crate::status;
use compare::{Comparison, Difference};
use plan::{Again, Plan, Target};
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tracing::Instrument;
use vlinder_bus::Stored;
use vlinder_core::record::{End, Invoke, SessionVerb};
use vlinder_core::{AgentName, BranchName, ContentHash, NodeHash, SessionId, SubmissionId};
use vlinder_proto::harness as proto;
use vlinder_proto::harness::replay_event::Event;
use vlinder_worker::turns::{self, TurnRecord};

/// Events that a slow client may be behind.
const EVENTS_MAX: usize = 64;
/// What an event shows of an output, in bytes.
const OUTPUT_BYTES_MAX: usize = 64 * 1024;

/// Plans and runs a replay; the report is the last event.
pub async fn stream(
    shared: Arc<Shared>,
    request: proto::ReplayRequest,
    place: OwnedSemaphorePermit,
) -> Result<impl Stream<Item = Result<proto::ReplayEvent, Status>> + Send, Status> {
    let plan = plan::plan(&shared, request).await?;
    let replay = Replay::begin(shared, plan).await?;
    let (tx, rx) = mpsc::channel(EVENTS_MAX);
    let running = async move {
        let last = tokio::select! {
            report = replay.run(&tx) => report.map(Event::Report),
            // The turn that runs ends by itself.
            () = tx.closed() => return,
        };
        let _ = tx.send(last.map(event)).await;
        drop(place);
    };
    tokio::spawn(running.in_current_span());
    Ok(ReceiverStream::new(rx))
}

fn event(event: Event) -> proto::ReplayEvent {
    proto::ReplayEvent { event: Some(event) }
}

type Events = mpsc::Sender<Result<proto::ReplayEvent, Status>>;

struct Replay {
    shared: Arc<Shared>,
    agent: AgentName,
    session: SessionId,
    branch: BranchName,
    source: (SessionId, BranchName),
    turns: Vec<Again>,
    /// The turn that the first one follows.
    follows: Option<SubmissionId>,
    /// The session event with the replaced answer.
    repair: Option<NodeHash>,
    name: String,
    /// The turns that are there from an earlier request.
    there: HashMap<SubmissionId, (Stored, Invoke)>,
}

impl Replay {
    /// Makes the branch or the session, unless it is there.
    async fn begin(shared: Arc<Shared>, plan: Plan) -> Result<Self, Status> {
        let mut follows = None;
        let mut repair = None;
        let (session, branch, agent) = match plan.target {
            Target::Session { id, agent } => {
                let name = format!("replay of {}", plan.session);
                // Begun only for an agent that exists.
                super::run::timeout_of(&shared, &agent, 0).await?;
                let session = shared.sessions.open(&id, &agent, &name, false).await?;
                (id, session.default_branch, agent)
            }
            Target::Branch(start) => {
                let agent = shared.sessions.need(&plan.session).await?.agent;
                super::run::timeout_of(&shared, &agent, 0).await?;
                follows.clone_from(&start.submission);
                let branch = start.branch.clone();
                match plan.repair {
                    Some((what, answer)) => {
                        let verb = SessionVerb::Repair(start, what);
                        let made = shared
                            .sessions
                            .make_branch(&plan.session, verb, answer.into());
                        repair = Some(made.await?);
                    }
                    None => {
                        let verb = SessionVerb::Fork(start);
                        let made =
                            shared
                                .sessions
                                .make_branch(&plan.session, verb, Default::default());
                        made.await?;
                    }
                }
                (plan.session.clone(), branch, agent)
            }
        };
        let there = turns::on_branch(&shared.cx, &agent, &session, &branch).await;
        let there = there.map_err(status::of_bus)?.into_iter();
        Ok(Self {
            shared,
            agent,
            session,
            branch,
            source: (plan.session, plan.branch),
            turns: plan.turns,
            follows,
            repair,
            name: plan.name,
            there: there
                .map(|(stored, invoke)| (invoke.submission.clone(), (stored, invoke)))
                .collect(),
        })
    }

    async fn run(&self, tx: &Events) -> Result<proto::ReplayReport, Status> {
        let begun = proto::ReplayBegun {
            session: self.session.to_string(),
            branch: self.branch.to_string(),
            agent: self.agent.to_string(),
            source_session: self.source.0.to_string(),
            source_branch: self.source.1.to_string(),
            turns: self.turns.len() as u32,
            name: self.name.clone(),
            repair: self.repair.map(|hash| hash.to_string()).unwrap_or_default(),
        };
        // A client that has left is noticed by whoever runs this.
        let _ = tx.send(Ok(event(Event::Begun(begun)))).await;
        let mut report = proto::ReplayReport::default();
        let mut follows = self.follows.clone();
        for (index, again) in self.turns.iter().enumerate() {
            let submission = self.submission(index);
            let turn_begun = proto::ReplayTurnBegun {
                index: index as u32 + 1,
                source: again.step.invoke.submission.to_string(),
                submission: submission.to_string(),
            };
            let _ = tx.send(Ok(event(Event::TurnBegun(turn_begun)))).await;
            let turn = self.turn(index, again, &submission, follows, tx).await?;
            add(&mut report, &turn);
            let _ = tx.send(Ok(event(Event::Turn(turn)))).await;
            follows = Some(submission);
        }
        Ok(report)
    }

    /// The name of a turn: the same whenever the replay is asked for under its name.
    fn submission(&self, index: usize) -> SubmissionId {
        let what = format!(
            "vlinder.replay.v1/{}/{}/{}/{index}",
            self.shared.cx.ns, self.session, self.branch
        );
        let hash = ContentHash::of(what.as_bytes()).to_string();
        SubmissionId::new(format!("r-{}", &hash[..40])).expect("hexadecimal digits are an id")
    }

    async fn turn(
        &self,
        index: usize,
        again: &Again,
        submission: &SubmissionId,
        follows: Option<SubmissionId>,
        tx: &Events,
    ) -> Result<proto::ReplayedTurn, Status> {
        let mut source = again.source.clone();
        source.repair = self.repair.filter(|_| index == 0);
        if let Some((_, known)) = self.there.get(submission)
            && known.source.as_ref() != Some(&source)
        {
            return Err(Status::already_exists(format!(
                "branch {} of session {} holds another replay; give another name",
                self.branch, self.session
            )));
        }
        let ended = match self.there.contains_key(submission) {
            true => self.shared.sessions.end_of(submission).await?,
            false => None,
        };
        let (end, stored) = match ended {
            Some(ended) => ended,
            None => {
                self.run_turn(again, submission, source, follows, tx)
                    .await?
            }
        };
        self.compared(index, again, submission, &end, &stored).await
    }

    /// Runs the turn, or attaches to it, and waits for its end.
    async fn run_turn(
        &self,
        again: &Again,
        submission: &SubmissionId,
        source: vlinder_core::record::Source,
        follows: Option<SubmissionId>,
        tx: &Events,
    ) -> Result<(End, Stored), Status> {
        let shared = &self.shared;
        let old = &again.step;
        let input = shared.cx.bus.load(&old.stored.body).await;
        let same_agent = old.invoke.agent == self.agent;
        let request = proto::RunRequest {
            namespace: shared.cx.ns.to_string(),
            agent: self.agent.to_string(),
            input: input.map_err(status::of_bus)?.to_vec(),
            session: self.session.to_string(),
            branch: self.branch.to_string(),
            submission: submission.to_string(),
            // Another agent has its own idea of how long it may take.
            timeout_ms: if same_agent { old.invoke.timeout_ms } else { 0 },
            ..proto::RunRequest::default()
        };
        let replayed = Replayed {
            source,
            source_seq: old.stored.seq,
            follows,
        };
        let turn = accept_as(shared, request, Some(replayed)).await?;
        turn.finish_telling(shared, |reason| {
            let waiting = Event::Waiting(proto::Waiting { reason });
            // Told again soon, if this one finds no room.
            let _ = tx.try_send(Ok(event(waiting)));
        })
        .await?;
        let ended = shared.sessions.end_of(submission).await?;
        ended.ok_or_else(|| Status::data_loss(format!("turn {submission} ended without an end")))
    }

    /// The invoke of a turn of this replay.
    async fn invoke_of(&self, submission: &SubmissionId) -> Result<(Stored, Invoke), Status> {
        if let Some(known) = self.there.get(submission) {
            return Ok(known.clone());
        }
        let cx = &self.shared.cx;
        let sessions = &self.shared.sessions;
        let subject = sessions.invoke_subject(&self.session, &self.agent, &self.branch);
        // It was the last one a moment ago.
        let last = cx.bus.last_seq(&cx.log(), &subject.to_string()).await;
        let hint = Some(last.map_err(status::of_bus)?);
        let found = turns::find(cx, submission, hint).await;
        let found = found.map_err(status::of_bus)?;
        found.ok_or_else(|| Status::data_loss(format!("turn {submission} has no beginning")))
    }

    async fn compared(
        &self,
        index: usize,
        again: &Again,
        submission: &SubmissionId,
        end: &End,
        stored: &Stored,
    ) -> Result<proto::ReplayedTurn, Status> {
        let cx = &self.shared.cx;
        let read = async |of: &Stored, invoke: &Invoke, end: Option<&Stored>| {
            let record = TurnRecord::read(cx, of, invoke.clone(), false).await;
            let record = record.map_err(status::of_bus)?;
            let ended = end.map(|end| end.node.parents.as_slice());
            Ok::<_, Status>(compare::calls_of(&record, ended))
        };
        let (new, invoke) = self.invoke_of(submission).await?;
        let before = again.end.as_ref();
        let old = &again.step;
        let was = read(&old.stored, &old.invoke, before.map(|(_, stored)| stored)).await?;
        let is = read(&new, &invoke, Some(stored)).await?;
        let compared = compare::compare(&was, &is);
        let same = before.is_some_and(|(was, at)| {
            was.outcome == end.outcome && at.node.body_hash == stored.node.body_hash
        });
        let output = cx.bus.load(&stored.body).await.map_err(status::of_bus)?;
        let first = compared.first.clone().or_else(|| {
            (!same).then(|| Difference {
                what: "output".to_owned(),
                source: before.map(|(_, stored)| stored.hash),
                replay: Some(stored.hash),
            })
        });
        let text = |hash: Option<NodeHash>| hash.map(|hash| hash.to_string()).unwrap_or_default();
        let Comparison {
            recorded,
            live,
            changed,
            missing,
            repaired,
            ..
        } = compared;
        Ok(proto::ReplayedTurn {
            index: index as u32 + 1,
            source: old.invoke.submission.to_string(),
            submission: submission.to_string(),
            status: end.outcome.to_string(),
            source_status: before
                .map(|(end, _)| end.outcome.to_string())
                .unwrap_or_default(),
            same,
            recorded,
            live,
            changed,
            missing,
            repaired,
            first: first.map(|first| proto::ReplayDifference {
                what: first.what,
                source: text(first.source),
                replay: text(first.replay),
            }),
            hash: stored.hash.to_string(),
            source_hash: text(before.map(|(_, stored)| stored.hash)),
            output: output[..output.len().min(OUTPUT_BYTES_MAX)].to_vec(),
            output_len: output.len() as u64,
            duration_ms: stored.time_ms.saturating_sub(new.time_ms),
        })
    }
}

fn add(report: &mut proto::ReplayReport, turn: &proto::ReplayedTurn) {
    report.turns += 1;
    report.same += u32::from(turn.same);
    report.different += u32::from(!turn.same);
    report.recorded += u64::from(turn.recorded);
    report.live += u64::from(turn.live);
    report.changed += u64::from(turn.changed);
    report.missing += u64::from(turn.missing);
    if report.first_different == 0 && turn.first.is_some() {
        report.first_different = turn.index;
    }
}
