//! Sessions and the heads of their branches, read from the log and remembered.
//!
//! A remembered head is a guess: the compare-and-append of the next invoke proves it, and a
//! wrong guess is read again. So any number of harnesses may remember the same branch.

use super::points::Where;
use crate::status;
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::Mutex;
use time::OffsetDateTime;
use tonic::Status;
use vlinder_bus::{Message, Stored, Subject};
use vlinder_core::record::{BranchStart, End, Invoke, Repair, SessionEvent, SessionVerb};
use vlinder_core::{
    AgentName, BranchName, ContentHash, Kind, Node, NodeHash, SessionId, StateRoot, SubmissionId,
};
use vlinder_worker::{WorkerCx, turns};

/// Heads that are remembered; beyond that all are forgotten and read again.
const HEADS_MAX: usize = 20_000;
/// How often an event is tried again that lost a race with another one of its session.
const EVENT_TRIES: usize = 8;
/// Most events of one session (start, forks, promotions).
const SESSION_EVENTS_MAX: usize = 10_000;
/// Most turns of one branch that are looked through.
const SEARCH_MAX: usize = 100_000;

/// A session as its events tell.
#[derive(Debug, Clone)]
pub struct Session {
    /// The agent it talks to.
    pub agent: AgentName,
    /// Its name for people.
    pub name: String,
    /// The branch that turns go to when none is named.
    pub default_branch: BranchName,
    /// All branches in the order in which they were made.
    pub branches: Vec<Branch>,
    /// The last event.
    pub last: NodeHash,
    /// Its sequence in `CTL`.
    pub last_seq: u64,
}

/// A branch as the session's events tell.
#[derive(Debug, Clone)]
pub struct Branch {
    /// Its name.
    pub name: BranchName,
    /// Where it begins; `None` for `main`.
    pub start: Option<BranchStart>,
    /// The event that made it.
    pub event: NodeHash,
    /// The answer that is replaced on it, with the hash of the new one.
    pub repair: Option<(Repair, ContentHash)>,
    /// It is the dated name of a line that was sealed: it never takes a turn.
    pub is_dated: bool,
}

impl Session {
    /// A branch by its name.
    pub fn branch(&self, name: &BranchName) -> Option<&Branch> {
        self.branches.iter().find(|branch| branch.name == *name)
    }

    /// A branch that must exist.
    pub fn need_branch(&self, name: &BranchName) -> Result<&Branch, Status> {
        self.branch(name).ok_or_else(|| {
            let names: Vec<&str> = self
                .branches
                .iter()
                .map(|branch| branch.name.as_str())
                .collect();
            Status::not_found(format!(
                "branch {name} does not exist; this session has: {}",
                names.join(", ")
            ))
        })
    }

    fn begun(agent: AgentName, name: String, last: NodeHash, last_seq: u64) -> Self {
        let main = Branch {
            name: BranchName::main(),
            start: None,
            event: last,
            repair: None,
            is_dated: false,
        };
        Self {
            agent,
            name,
            default_branch: BranchName::main(),
            branches: vec![main],
            last,
            last_seq,
        }
    }
}

/// What the next turn of a branch follows.
#[derive(Debug, Clone)]
pub struct Head {
    /// The last message on the branch's invoke subject; 0 when it is empty.
    pub seq: u64,
    /// Parent of the next invoke.
    pub parent: NodeHash,
    /// The turn before, if any.
    pub previous: Option<SubmissionId>,
    /// The state after it.
    pub state: Option<StateRoot>,
    /// How many turns came before.
    pub turns: u64,
}

impl Head {
    /// Of a line without any turn; `event` is the one of the session that it begins with.
    fn at_the_beginning(event: NodeHash) -> Self {
        Self {
            seq: 0,
            parent: event,
            previous: None,
            state: None,
            turns: 0,
        }
    }
}

/// What stands at the end of a branch.
pub enum BranchEnd {
    /// The next turn may begin.
    Idle(Head),
    /// A turn runs.
    Running(Box<(Invoke, Stored)>),
    /// The branch takes no more turns.
    Sealed,
}

/// Reads sessions and remembers heads.
pub struct Sessions {
    pub(super) cx: WorkerCx,
    /// With the connection that they were learned on: a server that was away may have lost its tail, and
    /// other messages may have the numbers now.
    heads: Mutex<HashMap<(SessionId, BranchName), (u64, Head)>>,
    known: Mutex<HashMap<SessionId, Session>>,
}

impl Sessions {
    /// Sessions over the bus of `cx`.
    pub fn new(cx: WorkerCx) -> Self {
        Self {
            cx,
            heads: Mutex::default(),
            known: Mutex::default(),
        }
    }

    /// A session as remembered, or as the log has it.
    pub async fn get(&self, id: &SessionId) -> Result<Option<Session>, Status> {
        let known = lock(&self.known).get(id).cloned();
        match known {
            Some(session) => Ok(Some(session)),
            None => self.read(id).await,
        }
    }

    /// A session as the log has it now.
    pub async fn read(&self, id: &SessionId) -> Result<Option<Session>, Status> {
        let subject = self.subject(id);
        let events = self
            .cx
            .bus
            .all_on(&self.cx.ctl(), &subject, SESSION_EVENTS_MAX)
            .await;
        let mut session: Option<Session> = None;
        for stored in events.map_err(status::of_bus)? {
            let Ok(event) = SessionEvent::try_from(&stored.node) else {
                continue;
            };
            apply(&mut session, &stored, event);
        }
        if let Some(session) = &session {
            self.remember(id, session.clone());
        }
        Ok(session)
    }

    /// The session `id`, begun now if it does not exist. `fresh`: the id was made just now.
    pub async fn open(
        &self,
        id: &SessionId,
        agent: &AgentName,
        name: &str,
        fresh: bool,
    ) -> Result<Session, Status> {
        if !fresh && let Some(session) = self.get(id).await? {
            return Ok(session);
        }
        if id.is_delegated() {
            return Err(Status::not_found(format!(
                "session {id} does not exist; sessions that are called so are begun by agents"
            )));
        }
        let event = SessionEvent {
            namespace: self.cx.ns.clone(),
            session: id.clone(),
            agent: agent.clone(),
            name: if name.is_empty() {
                id.to_string()
            } else {
                name.to_owned()
            },
            verb: SessionVerb::Start,
        };
        let node = event.to_node(vec![], b"");
        let message =
            Message::new(self.cx.ctl(), self.subject(id), node, Bytes::new()).expecting(0);
        match self.cx.bus.append(message).await {
            Ok(done) => {
                let session = Session::begun(agent.clone(), event.name, done.hash, done.seq);
                self.remember(id, session.clone());
                Ok(session)
            }
            Err(vlinder_bus::Error::Conflict { .. }) => {
                let read = self.read(id).await?;
                read.ok_or_else(|| {
                    Status::aborted(format!(
                        "session {id} was begun by somebody else; try again"
                    ))
                })
            }
            Err(error) => Err(status::of_bus(error)),
        }
    }

    /// The end of a branch; `guess` allows what is remembered.
    pub async fn branch_end(
        &self,
        id: &SessionId,
        session: &Session,
        branch: &BranchName,
        guess: bool,
    ) -> Result<BranchEnd, Status> {
        let connection = self.cx.bus.connection();
        if guess
            && let Some((learned_on, head)) = lock(&self.heads).get(&(id.clone(), branch.clone()))
            && *learned_on == connection
        {
            return Ok(BranchEnd::Idle(head.clone()));
        }
        let subject = self.invoke_subject(id, &session.agent, branch);
        let last = self
            .cx
            .bus
            .last(&self.cx.log(), &subject)
            .await
            .map_err(status::of_bus)?;
        if session.branch(branch).is_some_and(|branch| branch.is_dated) {
            return Ok(BranchEnd::Sealed);
        }
        let Some(newest) = last else {
            return self.first_head(id, session, branch).await;
        };
        let seq = newest.seq;
        let Some(last) = self.on_line(newest, &subject).await? else {
            return Ok(match self.first_head(id, session, branch).await? {
                BranchEnd::Idle(head) => BranchEnd::Idle(Head { seq, ..head }),
                other => other,
            });
        };
        if last.node.kind == Kind::Seal {
            return Ok(BranchEnd::Sealed);
        }
        let invoke =
            Invoke::try_from(&last.node).map_err(|error| Status::data_loss(error.to_string()))?;
        match self.end_of(&invoke.submission).await? {
            Some((end, stored)) => Ok(BranchEnd::Idle(Head {
                seq,
                parent: stored.hash,
                previous: Some(invoke.submission),
                state: end.state,
                turns: invoke.turn + 1,
            })),
            None => Ok(BranchEnd::Running(Box::new((invoke, last)))),
        }
    }

    /// The last turn of a branch that is not displaced, given the last message on its subject.
    async fn on_line(&self, newest: Stored, subject: &Subject) -> Result<Option<Stored>, Status> {
        if !newest.is_displaced() {
            return Ok(Some(newest));
        }
        let turns = self
            .cx
            .bus
            .all_on(&self.cx.log(), subject, SEARCH_MAX)
            .await
            .map_err(status::of_bus)?;
        Ok(turns.into_iter().rfind(|stored| !stored.is_displaced()))
    }

    /// The head of a branch without turns of its own.
    async fn first_head(
        &self,
        id: &SessionId,
        session: &Session,
        branch: &BranchName,
    ) -> Result<BranchEnd, Status> {
        let Some(start) = &session.need_branch(branch)?.start else {
            return Ok(BranchEnd::Idle(Head::at_the_beginning(session.last)));
        };
        let Some(submission) = &start.submission else {
            return Ok(BranchEnd::Idle(Head::at_the_beginning(start.from)));
        };
        let turns = turns::on_branch(&self.cx, &session.agent, id, &start.of).await;
        let mut turns = turns.map_err(status::of_bus)?.into_iter();
        let found = turns.find(|(_, invoke)| invoke.submission == *submission);
        let (stored, invoke) = found.ok_or_else(|| {
            Status::data_loss(format!(
                "the turn {submission} that branch {branch} begins in is not in the log"
            ))
        })?;
        let turns = invoke.turn + 1;
        Ok(BranchEnd::Idle(Head {
            seq: 0,
            parent: start.from,
            previous: Some(submission.clone()),
            state: self.state_at(&start.from, &stored, invoke).await?,
            turns,
        }))
    }

    /// The winning end of a turn, if it has ended.
    pub async fn end_of(&self, submission: &SubmissionId) -> Result<Option<(End, Stored)>, Status> {
        end_of(&self.cx, submission).await
    }

    /// Remembers what the next turn of a branch follows.
    pub fn remember_head(&self, id: &SessionId, branch: &BranchName, head: Head) {
        let mut heads = lock(&self.heads);
        if heads.len() >= HEADS_MAX {
            heads.clear();
        }
        let connection = self.cx.bus.connection();
        heads.insert((id.clone(), branch.clone()), (connection, head));
    }

    /// Forgets a head that proved wrong.
    pub fn forget_head(&self, id: &SessionId, branch: &BranchName) {
        lock(&self.heads).remove(&(id.clone(), branch.clone()));
        lock(&self.known).remove(id);
    }

    /// Makes branch `name` begin at the node whose hash begins with `from`: the end of a turn, or another node
    /// of it, of which the branch then holds what led there. Idempotent.
    pub async fn fork(
        &self,
        id: &SessionId,
        from: &str,
        turn: Option<&SubmissionId>,
        name: &BranchName,
    ) -> Result<NodeHash, Status> {
        let session = self.need(id).await?;
        let point = self.find_node(id, &session, from, turn).await?;
        if let Where::LateEnd = point.is {
            return Err(Status::failed_precondition(format!(
                "{} came after the turn had ended and is not on its line; fork the turn's end instead",
                point.hash
            )));
        }
        let start = BranchStart {
            branch: name.clone(),
            of: point.invoke.branch,
            from: point.hash,
            submission: Some(point.invoke.submission),
        };
        self.make_branch(id, SessionVerb::Fork(start), Bytes::new())
            .await?;
        Ok(point.hash)
    }

    /// Makes a branch as `verb` says, unless it is there already, and returns the event that made it. Idempotent.
    pub async fn make_branch(
        &self,
        id: &SessionId,
        verb: SessionVerb,
        body: Bytes,
    ) -> Result<NodeHash, Status> {
        let wanted = match &verb {
            SessionVerb::Fork(start) => (start.clone(), None),
            SessionVerb::Repair(start, repair) => {
                let repair = (repair.clone(), ContentHash::of(&body));
                (start.clone(), Some(repair))
            }
            _ => return Err(Status::internal("only forks and repairs make branches")),
        };
        for _ in 0..EVENT_TRIES {
            let session = self.need(id).await?;
            if let Some(known) = session.branch(&wanted.0.branch) {
                let is_it = known.start.as_ref() == Some(&wanted.0) && known.repair == wanted.1;
                return match is_it && !known.is_dated {
                    true => Ok(known.event),
                    false => Err(Status::already_exists(format!(
                        "branch {} exists already and begins elsewhere; choose another name",
                        known.name
                    ))),
                };
            }
            let appended = self.append_event(id, &session, verb.clone(), body.clone());
            match appended.await {
                Ok(event) => return Ok(event),
                // Something else happened to the session meanwhile.
                Err(vlinder_bus::Error::Conflict { .. }) => continue,
                Err(error) => return Err(status::of_bus(error)),
            }
        }
        Err(Status::aborted(format!(
            "others keep changing session {id}; try again"
        )))
    }

    /// Seals the default branch, which is kept under a dated name as well as its own, and makes `branch` the
    /// default. Returns the sealed one and that name; `None` when `branch` was the default already.
    pub async fn promote(
        &self,
        id: &SessionId,
        branch: &BranchName,
    ) -> Result<Option<(BranchName, BranchName)>, Status> {
        let session = self.need(id).await?;
        if session.default_branch == *branch {
            return Ok(None);
        }
        session.need_branch(branch)?;
        if let BranchEnd::Sealed = self.branch_end(id, &session, branch, false).await? {
            return Err(Status::failed_precondition(format!(
                "branch {branch} of session {id} is sealed and takes no more turns; fork it and promote the fork"
            )));
        }
        let old = session.default_branch.clone();
        let (from, submission) = match self.branch_end(id, &session, &old, false).await? {
            BranchEnd::Sealed => self.sealed_at(id, &session, &old).await?,
            BranchEnd::Running(turn) => {
                return Err(Status::aborted(format!(
                    "turn {} runs on branch {old}; wait for its end or cancel it",
                    turn.0.submission
                )));
            }
            BranchEnd::Idle(head) => {
                let node = Node::new(Kind::Seal, vec![head.parent], b"")
                    .with("namespace", &self.cx.ns)
                    .with("session", id)
                    .with("branch", &old);
                let subject = self.invoke_subject(id, &session.agent, &old);
                let message =
                    Message::new(self.cx.log(), subject, node, Bytes::new()).expecting(head.seq);
                self.cx.bus.append(message).await.map_err(status::of_bus)?;
                self.forget_head(id, &old);
                (head.parent, head.previous)
            }
        };
        let dated = dated(&old, self.cx.bus.now_ms(), |name| {
            session.branch(name).is_some()
        });
        let verb = SessionVerb::Promote {
            branch: branch.clone(),
            sealed: Some(BranchStart {
                branch: dated.clone(),
                of: old.clone(),
                from,
                submission,
            }),
        };
        self.append_event(id, &session, verb, Bytes::new())
            .await
            .map_err(status::of_bus)?;
        Ok(Some((old, dated)))
    }

    /// Where a line was sealed whose promotion was not finished: its head and its last turn.
    async fn sealed_at(
        &self,
        id: &SessionId,
        session: &Session,
        branch: &BranchName,
    ) -> Result<(NodeHash, Option<SubmissionId>), Status> {
        let subject = self.invoke_subject(id, &session.agent, branch);
        let seal = self.cx.bus.last(&self.cx.log(), &subject).await;
        let seal = seal.map_err(status::of_bus)?;
        let from = seal.and_then(|seal| seal.node.parents.first().copied());
        let own = turns::on_branch(&self.cx, &session.agent, id, branch).await;
        let own = own.map_err(status::of_bus)?;
        let own = own.into_iter().rfind(|(stored, _)| !stored.is_displaced());
        let start = session.need_branch(branch)?.start.as_ref();
        let last = own
            .map(|(_, invoke)| invoke.submission)
            .or_else(|| start.and_then(|start| start.submission.clone()));
        Ok((from.unwrap_or(session.last), last))
    }

    async fn append_event(
        &self,
        id: &SessionId,
        session: &Session,
        verb: SessionVerb,
        body: Bytes,
    ) -> Result<NodeHash, vlinder_bus::Error> {
        let event = SessionEvent {
            namespace: self.cx.ns.clone(),
            session: id.clone(),
            agent: session.agent.clone(),
            name: session.name.clone(),
            verb,
        };
        let node = event.to_node(vec![session.last], &body);
        let message =
            Message::new(self.cx.ctl(), self.subject(id), node, body).expecting(session.last_seq);
        let appended = self.cx.bus.append(message).await?;
        lock(&self.known).remove(id);
        Ok(appended.hash)
    }

    /// A session that must exist, as the log has it now.
    pub async fn need(&self, id: &SessionId) -> Result<Session, Status> {
        let session = self.read(id).await?;
        session.ok_or_else(|| {
            Status::not_found(format!(
                "session {id} does not exist; `vlinder session list` shows all"
            ))
        })
    }

    fn remember(&self, id: &SessionId, session: Session) {
        let mut known = lock(&self.known);
        if known.len() >= HEADS_MAX {
            known.clear();
        }
        known.insert(id.clone(), session);
    }

    fn subject(&self, id: &SessionId) -> Subject {
        Subject::Session {
            ns: self.cx.ns.clone(),
            session: id.clone(),
        }
    }

    /// The subject of a branch's turns.
    pub fn invoke_subject(
        &self,
        id: &SessionId,
        agent: &AgentName,
        branch: &BranchName,
    ) -> Subject {
        Subject::Invoke {
            ns: self.cx.ns.clone(),
            agent: agent.clone(),
            session: id.clone(),
            branch: branch.clone(),
        }
    }
}

/// The winning end of a turn, if it has ended.
pub async fn end_of(
    cx: &WorkerCx,
    submission: &SubmissionId,
) -> Result<Option<(End, Stored)>, Status> {
    let subject = Subject::End {
        ns: cx.ns.clone(),
        submission: submission.clone(),
    };
    let first = cx
        .bus
        .first(&cx.log(), &subject)
        .await
        .map_err(status::of_bus)?;
    let Some(stored) = first else { return Ok(None) };
    let end = End::try_from(&stored.node).map_err(|error| Status::data_loss(error.to_string()))?;
    Ok(Some((end, stored)))
}

/// The name that a line is kept by which was sealed at `now_ms`: `main-2026-11-25`, then `main-2026-11-25-2`.
fn dated(line: &BranchName, now_ms: u64, is_taken: impl Fn(&BranchName) -> bool) -> BranchName {
    let seconds = i64::try_from(now_ms / 1000).unwrap_or(i64::MAX);
    let date = OffsetDateTime::from_unix_timestamp(seconds).map(OffsetDateTime::date);
    let day = date.map_or_else(|_| "sealed".to_owned(), |date| date.to_string());
    let mut number = 1u64;
    loop {
        let tail = match number {
            1 => format!("-{day}"),
            number => format!("-{day}-{number}"),
        };
        let head: String = line
            .as_str()
            .chars()
            .take(BranchName::LEN_MAX.saturating_sub(tail.len()))
            .collect();
        match BranchName::new(format!("{head}{tail}")) {
            Ok(name) if !is_taken(&name) => return name,
            _ => number += 1,
        }
    }
}

fn apply(session: &mut Option<Session>, stored: &Stored, event: SessionEvent) {
    let Some(known) = session.as_mut() else {
        if event.verb == SessionVerb::Start {
            *session = Some(Session::begun(
                event.agent,
                event.name,
                stored.hash,
                stored.seq,
            ));
        }
        return;
    };
    if let Some(start) = event.verb.starts() {
        known.branches.push(Branch {
            name: start.branch.clone(),
            start: Some(start.clone()),
            event: stored.hash,
            repair: match &event.verb {
                SessionVerb::Repair(_, repair) => Some((repair.clone(), stored.node.body_hash)),
                _ => None,
            },
            is_dated: matches!(event.verb, SessionVerb::Promote { .. }),
        });
    }
    match event.verb {
        SessionVerb::Start => return,
        SessionVerb::Promote { branch, .. } => known.default_branch = branch,
        SessionVerb::Fork(_) | SessionVerb::Repair(..) => {}
    }
    known.last = stored.hash;
    known.last_seq = stored.seq;
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dated_names_are_branch_names_and_differ() {
        let main = BranchName::main();
        let at = 1_795_640_000_000;
        let first = dated(&main, at, |_| false);
        assert_eq!(first.as_str(), "main-2026-11-25");
        let second = dated(&main, at, |name| *name == first);
        assert_eq!(second.as_str(), "main-2026-11-25-2");
        let long = BranchName::new("b".repeat(BranchName::LEN_MAX)).unwrap();
        let name = dated(&long, at, |_| false);
        assert!(name.as_str().ends_with("-2026-11-25"));
        assert_eq!(name.as_str().len(), BranchName::LEN_MAX);
        assert!(
            dated(&main, u64::MAX, |_| false)
                .as_str()
                .starts_with("main-")
        );
    }
}
