//! One turn: from its invoke to its end.
//!
//! Safe to repeat: the first end in the log is the end, and a turn that has one is not begun again. A
//! turn that was begun before (by a worker that died, or by a replica that did) is run again with the
//! record of its calls, so that the agent gets the same answers and nothing is done or paid for twice.
//!
//! Before the agent is called the turn listens for its own end, whoever writes it; that is how a turn is
//! cancelled. For the answers to its calls it listens from its first call on.

pub(crate) mod answers;
pub(crate) mod invocation;
mod reply;
pub(crate) mod source;

pub(crate) use reply::INVOCATION_HEADER;

use crate::agent::Agent;
use crate::history::{self, History};
use crate::http::Fault;
use crate::pool::{Gone, Lease};
use crate::surge;
use answers::Answers;
use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use invocation::{Invocation, TurnFacts};
use source::SourceRecord;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use vlinder_bus::wire::{NOTE_AGENT_US, NOTE_ATTEMPT, NOTE_BY, NOTE_REASON};
use vlinder_bus::{Gaps, Message, Seen, Stored, Subject};
use vlinder_core::record::{End, Invoke, Outcome};
use vlinder_core::{Kind, NodeHash, SubmissionId};
use vlinder_worker::service::{TURN_MESSAGES_MAX, call_subject};
use vlinder_worker::{Handler, Job, Outcome as JobOutcome};

/// How often a turn is tried again in place after its replica died.
const RETRIES_MAX: u32 = 2;
/// An invoke older than this was perhaps cancelled before it was delivered, in milliseconds.
const STALE_MS: u64 = 50;
/// First and longest pause between two looks into the log for what the subscription may have lost.
const BACKSTOP: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// What an agent may print during a turn beyond what is kept, in bytes, before that is the reason for which
/// the turn got no answer in time.
const FLOOD_BYTES: u64 = 256 * 1024;
/// Pause before a turn is tried again whose reads or writes failed.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// How long the last words of an instance that has ended may take to arrive.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// How long after its deadline a turn's end is still tried to be written, when the bus is away.
const END_GRACE: Duration = Duration::from_secs(60);

/// Serves the turns of one agent.
pub(crate) struct TurnHandler(pub Arc<Agent>);

#[async_trait]
impl Handler for TurnHandler {
    async fn handle(&self, job: Job) -> JobOutcome {
        match job.stored.node.kind {
            Kind::Invoke => {}
            // A branch was sealed: nobody's work.
            Kind::Seal => return JobOutcome::Done,
            other => {
                return JobOutcome::Reject(format!(
                    "expected an invoke, found a node of kind {other}"
                ));
            }
        }
        let invoke = match Invoke::try_from(&job.stored.node) {
            Ok(invoke) => invoke,
            Err(error) => return JobOutcome::Reject(error.to_string()),
        };
        match Turn::new(&self.0, &job, invoke).run().await {
            Ok(()) => JobOutcome::Done,
            Err(error) => {
                tracing::warn!(subject = job.stored.subject, %error, "a turn could not be served, trying again");
                JobOutcome::RetryAfter(RETRY_PAUSE)
            }
        }
    }

    async fn give_up(&self, stored: &Stored, reason: &str) {
        let Ok(invoke) = Invoke::try_from(&stored.node) else {
            return;
        };
        let job = Job {
            stored: stored.clone(),
            attempt: 0,
        };
        let turn = Turn::new(&self.0, &job, invoke);
        let reason = format!("the turn was given up: {reason}");
        if let Err(error) = turn.end(Ending::failed("dead_letter", &reason), None).await {
            tracing::warn!(%error, "could not record that a turn was given up");
        }
    }
}

/// How a turn ends.
#[derive(Debug)]
struct Ending {
    outcome: Outcome,
    code: Option<&'static str>,
    body: Bytes,
    agent_us: u128,
}

impl Ending {
    fn failed(code: &'static str, why: &str) -> Self {
        Self {
            outcome: Outcome::Failed,
            code: Some(code),
            body: Bytes::copy_from_slice(why.as_bytes()),
            agent_us: 0,
        }
    }
}

/// What came of one try.
enum Tried {
    Ending(Ending),
    /// Somebody else ended the turn.
    EndedElsewhere,
    /// The replica is gone; whether that is the agent's fault.
    ReplicaGone {
        why: String,
        by_itself: bool,
    },
}

/// What the turn hears, and when it may have missed something.
struct Live {
    seen: Seen,
    gaps: Gaps,
    /// The end of the turn that delegated this one.
    caller: Option<Seen>,
}

struct Turn<'a> {
    agent: &'a Arc<Agent>,
    invoke: &'a Stored,
    facts: Arc<TurnFacts>,
    answers: Arc<Answers>,
    /// The turn that delegated this one has ended without a reply: nobody wants this one's.
    unwanted: CancellationToken,
}

impl<'a> Turn<'a> {
    fn new(agent: &'a Arc<Agent>, job: &'a Job, invoke: Invoke) -> Self {
        let deadline_ms = job.stored.time_ms.saturating_add(invoke.timeout_ms);
        let left = deadline_ms.saturating_sub(agent.shared.cx.bus.now_ms());
        let facts = TurnFacts {
            invoke,
            hash: job.stored.hash,
            seq: job.stored.seq,
            attempt: job.attempt,
            deadline_ms,
            deadline: Instant::now() + Duration::from_millis(left),
        };
        Self {
            agent,
            invoke: &job.stored,
            facts: Arc::new(facts),
            answers: Arc::default(),
            unwanted: CancellationToken::new(),
        }
    }

    /// How many delegations lead here. What a person says in a session that an agent began counts as
    /// the first: it comes by the same queue.
    fn depth(&self) -> u32 {
        let invoke = &self.facts.invoke;
        let least = u32::from(invoke.session.is_delegated());
        invoke.depth().max(least)
    }

    fn caller(&self) -> Option<&SubmissionId> {
        self.facts
            .invoke
            .origin
            .as_ref()
            .map(|origin| &origin.caller)
    }

    async fn watch_caller(&self) -> Result<Option<Seen>, vlinder_bus::Error> {
        let Some(caller) = self.caller() else {
            return Ok(None);
        };
        let cx = &self.agent.shared.cx;
        cx.bus.seen_end(&cx.ns, caller).await.map(Some)
    }

    /// Reads the end of the turn that delegated this one, if the log has one.
    async fn look_for_caller(&self) -> Result<(), vlinder_bus::Error> {
        let Some(caller) = self.caller() else {
            return Ok(());
        };
        let cx = &self.agent.shared.cx;
        let end = Subject::End {
            ns: cx.ns.clone(),
            submission: caller.clone(),
        };
        if let Some(stored) = cx.bus.first(&cx.log(), &end).await? {
            self.take_end_of_caller(&stored);
        }
        Ok(())
    }

    /// A caller that has replied has left this turn to itself; any other end ends it.
    fn take_end_of_caller(&self, stored: &Stored) {
        let end = End::try_from(&stored.node);
        if end.is_ok_and(|end| end.outcome != Outcome::Done) {
            self.unwanted.cancel();
        }
    }

    async fn run(&self) -> Result<(), vlinder_bus::Error> {
        let cx = &self.agent.shared.cx;
        let bus = &cx.bus;
        let log = cx.log();
        let submission = &self.facts.invoke.submission;
        if self.facts.attempt > 1 && self.read_end().await? {
            // A bus that was killed delivers what it has forgotten, many ended turns in a row: each is
            // passed with one look, while those that wait behind it wait for little.
            return Ok(());
        }
        if self.invoke.is_displaced() {
            let why = "the log lost its tail, and before this turn was given back another one took its place on the branch";
            self.end(Ending::failed("displaced", why), None).await?;
            return Ok(());
        }
        let gaps = bus.gaps();
        let (seen, history, source, input, (), caller) = tokio::try_join!(
            bus.seen_end(&cx.ns, submission),
            self.history(),
            SourceRecord::read(cx, self.invoke, &self.facts.invoke),
            bus.load(&self.invoke.body),
            bus.settled(&log, self.facts.seq),
            self.watch_caller(),
        )?;
        let mut live = Live { seen, gaps, caller };
        self.look_for_caller().await?;
        let age_ms = bus.now_ms().saturating_sub(self.invoke.time_ms);
        if self.facts.attempt > 1 {
            // Calls of an earlier attempt may be answered from now on.
            self.answers.listen(cx, submission).await?;
        }
        if self.facts.attempt > 1 || age_ms > STALE_MS {
            self.read_back().await?;
        }
        let history = match history {
            Ok(history) => history,
            Err(why) => {
                self.end(Ending::failed("history_unreadable", &why), None)
                    .await?;
                return Ok(());
            }
        };
        let source = match source {
            Ok(source) => source,
            Err(why) => {
                let why = format!("what this turn should run again cannot be read: {why}");
                self.end(Ending::failed("source_unreadable", &why), None)
                    .await?;
                return Ok(());
            }
        };
        let mut faults = 0;
        loop {
            if self.answers.end().is_some() {
                return Ok(());
            }
            let (tried, invocation) = self.attempt(&mut live, &history, &source, &input).await;
            let ending = match tried {
                Tried::EndedElsewhere => return Ok(()),
                Tried::Ending(ending) => ending,
                Tried::ReplicaGone { why, by_itself } => {
                    faults += u32::from(by_itself);
                    if self.agent.deleted.is_cancelled() {
                        Ending::failed("agent_deleted", "the agent was deleted while the turn ran")
                    } else if faults <= RETRIES_MAX {
                        tracing::info!(submission = %self.facts.invoke.submission, why, "trying a turn again from its record");
                        self.read_back().await?;
                        continue;
                    } else {
                        let why = format!("the agent died {faults} times during the turn: {why}");
                        Ending::failed("agent_died", &why)
                    }
                }
            };
            let said = (ending.outcome == Outcome::Done).then(|| ending.body.clone());
            // Known before it is written: the next turn may be here before we hear that it was.
            let known = |end| {
                let said = said.as_ref().map(|output| (&*input, &**output));
                let before = self.invoke.node.parents.first().copied();
                let histories = &self.agent.shared.histories;
                histories.extend(before, end, history, said);
            };
            match self.end_as(ending, invocation.as_deref(), known).await {
                // What the agent said finds no room; that it did not still does.
                Err(error) if error.is_full() => {
                    let why = Ending::failed("log_full", &error.to_string());
                    self.end(why, None).await?;
                }
                written => written?,
            }
            return Ok(());
        }
    }

    /// The history, or in words why there is none.
    async fn history(&self) -> Result<Result<Arc<History>, String>, vlinder_bus::Error> {
        let shared = &self.agent.shared;
        let before = shared
            .histories
            .before(&shared.cx, self.invoke, &self.facts.invoke);
        match before.await {
            Ok(history) => Ok(Ok(history)),
            Err(history::Error::Bus(error)) => Err(error),
            Err(error @ history::Error::Broken(_)) => Ok(Err(error.to_string())),
        }
    }

    /// Reads the end of the turn, if the log has one; whether it has.
    async fn read_end(&self) -> Result<bool, vlinder_bus::Error> {
        let cx = &self.agent.shared.cx;
        let first = cx.bus.first(&cx.log(), &self.end_subject()).await?;
        if let Some(stored) = first {
            self.answers.take(stored);
        }
        Ok(self.answers.end().is_some())
    }

    /// Reads what the log has of the turn: its end and the answers to its calls.
    async fn read_back(&self) -> Result<(), vlinder_bus::Error> {
        let cx = &self.agent.shared.cx;
        let submission = &self.facts.invoke.submission;
        if !self.read_end().await? {
            let calls = call_subject(&cx.ns, submission);
            for stored in cx.bus.all_on(&cx.log(), &calls, TURN_MESSAGES_MAX).await? {
                self.answers.take(stored);
            }
        }
        Ok(())
    }

    /// One try: a replica, its answer, and meanwhile whatever else happens to the turn.
    async fn attempt(
        &self,
        live: &mut Live,
        history: &Arc<History>,
        source: &Option<Arc<SourceRecord>>,
        input: &Bytes,
    ) -> (Tried, Option<Arc<Invocation>>) {
        let surge = |deployment| surge::spawn(self.agent, deployment);
        let lease = self.agent.pool.lease(self.depth(), surge);
        let leased = self.beside(live, lease).await;
        let lease = match leased {
            Ok(Ok(lease)) => lease,
            Ok(Err(why)) => {
                return (
                    Tried::Ending(Ending::failed("agent_unreachable", &why)),
                    None,
                );
            }
            Err(over) => return (over, None),
        };
        let facts = &self.facts;
        let pool = self.agent.pool.clone();
        let (answers, source) = (self.answers.clone(), source.clone());
        let invocation = Invocation::new(facts.clone(), answers, source, pool);
        let invocation = Arc::new(invocation);
        let open = lease.replica().caller.open(invocation.clone());
        let body = if lease.replica().takes_json {
            (history.as_json(input, &facts.invoke), "application/json")
        } else {
            (history.as_text(input), "text/plain; charset=utf-8")
        };
        let began = Instant::now();
        let printed = lease.replica().flood();
        let work = async {
            let replied = reply::invoke(self.agent, &lease, &invocation, body).await;
            let agent_us = began.elapsed().as_micros();
            if replied.is_ok() {
                invocation.settle().await;
            }
            (replied, agent_us)
        };
        let replica = lease.replica();
        let work = async {
            tokio::pin!(work);
            tokio::select! {
                biased;
                () = invocation.voided() => (Err(Fault::Gone(String::new())), 0),
                worked = &mut work => worked,
                gone = replica.gone() => {
                    // What it said last may still be on its way through the socket.
                    let last = tokio::time::timeout(LAST_WORDS, work).await;
                    last.unwrap_or((Err(Fault::Gone(gone.why)), 0))
                }
            }
        };
        let worked = self.beside(live, work).await;
        if matches!(worked, Ok((Err(Fault::Gone(_)), _))) && invocation.void().is_none() {
            // Why it hung up is worth a moment: most likely it has ended.
            let within = self.agent.shared.launcher.end_known_within();
            let _ = tokio::time::timeout(within, replica.gone()).await;
        }
        invocation.close();
        drop(open);
        let tried = match (worked, invocation.void()) {
            (Ok(_), Some(why)) => {
                // Whether it has replied or still works: it has seen what is not on record.
                replica.replace(why);
                Tried::ReplicaGone {
                    why: why.to_owned(),
                    by_itself: false,
                }
            }
            (Ok((replied, agent_us)), None) => self.judge(replied, agent_us, &lease),
            (Err(over), _) => {
                // The agent still works on it: only its end ends that.
                replica.replace("its turn was over before it answered");
                self.blame_flood(over, replica.flood() - printed)
            }
        };
        (tried, Some(invocation))
    }

    /// A turn that ran out of time because its agent printed without end failed for that reason: an
    /// agent that floods is slowed down, and one that only floods never answers.
    fn blame_flood(&self, over: Tried, flood: u64) -> Tried {
        match over {
            Tried::Ending(ending) if ending.outcome == Outcome::Deadline && flood > FLOOD_BYTES => {
                let why = format!(
                    "the agent flooded its output and gave no answer within {} ms; {flood} bytes that it printed were dropped",
                    self.facts.invoke.timeout_ms
                );
                Tried::Ending(Ending::failed("agent_flooded", &why))
            }
            over => over,
        }
    }

    fn judge(&self, replied: Result<reply::Reply, Fault>, agent_us: u128, lease: &Lease) -> Tried {
        let failed = |code, why: &str| {
            let mut ending = Ending::failed(code, why);
            ending.agent_us = agent_us;
            Tried::Ending(ending)
        };
        match replied {
            Ok(reply) if (200..300).contains(&reply.status) => Tried::Ending(Ending {
                outcome: Outcome::Done,
                code: None,
                body: reply.body,
                agent_us,
            }),
            Ok(reply) => failed("agent_status", &reply.as_failure()),
            Err(Fault::Gone(why)) => match lease.replica().fate() {
                Some(Gone { why, by_itself }) => Tried::ReplicaGone { why, by_itself },
                None => {
                    lease.replica().replace(&why);
                    Tried::ReplicaGone {
                        why,
                        by_itself: true,
                    }
                }
            },
            Err(Fault::Protocol(why)) => {
                lease.replica().replace(&why);
                failed("agent_protocol", &why)
            }
            Err(fault @ Fault::TooLarge(_)) => {
                lease.replica().replace("its answer was too large");
                failed("agent_output_too_large", &fault.to_string())
            }
        }
    }

    /// Drives `work` and feeds the turn's answers meanwhile; ends with the turn.
    async fn beside<T>(&self, live: &mut Live, work: impl Future<Output = T>) -> Result<T, Tried> {
        let Live { seen, gaps, caller } = live;
        let look = self.keep_looking(gaps);
        tokio::pin!(work, look);
        let mut is_live = true;
        let mut end_of_caller = async || match caller {
            Some(caller) => caller.next().await,
            None => None,
        };
        loop {
            tokio::select! {
                biased;
                () = self.answers.ended() => return Err(Tried::EndedElsewhere),
                stored = seen.next(), if is_live => match stored {
                    Some(stored) => self.answers.take(stored),
                    None => is_live = false,
                },
                () = self.unwanted.cancelled() => {
                    let why = "the turn that delegated this one has ended without a reply";
                    return Err(Tried::Ending(Ending {
                        outcome: Outcome::Cancelled,
                        ..Ending::failed("caller_ended", why)
                    }));
                }
                Some(stored) = end_of_caller() => self.take_end_of_caller(&stored),
                done = &mut work => return Ok(done),
                () = tokio::time::sleep_until(self.facts.deadline) => {
                    let why = format!("the turn took longer than {} ms", self.facts.invoke.timeout_ms);
                    return Err(Tried::Ending(Ending {
                        outcome: Outcome::Deadline,
                        ..Ending::failed("deadline", &why)
                    }));
                }
                never = &mut look => match never {},
            }
        }
    }

    /// Reads back what the subscription may have missed: after every gap, and now and then.
    async fn keep_looking(&self, gaps: &mut Gaps) -> Infallible {
        let mut pause = BACKSTOP.0;
        loop {
            tokio::select! {
                () = gaps.next() => {}
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(BACKSTOP.1),
            }
            let looked = tokio::try_join!(self.read_back(), self.look_for_caller());
            if let Err(error) = looked {
                tracing::warn!(%error, "cannot look for what the turn's subscription may have missed");
            }
        }
    }

    /// Writes the end, unless there is one.
    async fn end(
        &self,
        ending: Ending,
        invocation: Option<&Invocation>,
    ) -> Result<(), vlinder_bus::Error> {
        self.end_as(ending, invocation, |_| ()).await
    }

    /// The same; `known` is told the hash of the end before it is written.
    async fn end_as(
        &self,
        ending: Ending,
        invocation: Option<&Invocation>,
        known: impl FnOnce(NodeHash),
    ) -> Result<(), vlinder_bus::Error> {
        let cx = &self.agent.shared.cx;
        let invoke = &self.facts.invoke;
        let is_done = ending.outcome == Outcome::Done;
        let end = End {
            namespace: invoke.namespace.clone(),
            agent: invoke.agent.clone(),
            session: invoke.session.clone(),
            branch: invoke.branch.clone(),
            submission: invoke.submission.clone(),
            outcome: ending.outcome,
            state: match invocation {
                Some(invocation) if is_done => invocation.root(),
                _ => invoke.state,
            },
            code: ending.code.map(str::to_owned),
        };
        let parents = match invocation {
            Some(invocation) => invocation.parents(),
            None => vec![self.facts.hash],
        };
        let body = ending.body.clone();
        let node = crate::blocking_if_large(body.len(), move || end.to_node(parents, &body)).await;
        let mut message = Message::new(cx.log(), self.end_subject(), node, ending.body.clone())
            .expecting(0)
            .note(NOTE_BY, &cx.id)
            .note(NOTE_ATTEMPT, self.facts.attempt)
            .note(NOTE_AGENT_US, ending.agent_us);
        if !is_done {
            message = message.note(NOTE_REASON, ending.code.unwrap_or("failed"));
        }
        known(message.node.hash());
        let until = self.facts.deadline.max(Instant::now()) + END_GRACE;
        loop {
            match cx.bus.append(message.clone()).await {
                Ok(_) | Err(vlinder_bus::Error::Conflict { .. }) => return Ok(()),
                Err(error) if error.is_retryable() && Instant::now() < until => {
                    tracing::warn!(%error, "the end of a turn cannot be written, trying again");
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn end_subject(&self) -> Subject {
        Subject::End {
            ns: self.agent.shared.cx.ns.clone(),
            submission: self.facts.invoke.submission.clone(),
        }
    }
}
