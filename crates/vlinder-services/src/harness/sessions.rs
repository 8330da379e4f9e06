//! Sessions and the heads of their branches, read from the log and remembered.
//!
//! A remembered head is a guess: the compare-and-append of the next invoke proves it, and a
//! wrong guess is read again. So any number of harnesses may remember the same branch.

use crate::status;
use std::collections::HashMap;
use std::sync::Mutex;
use tonic::Status;
use vlinder_bus::{Message, Stored, Subject, subjects};
use vlinder_core::record::{End, Invoke, SessionEvent, SessionVerb};
use vlinder_core::{
    AgentName, BranchName, Kind, Node, NodeHash, SessionId, StateRoot, SubmissionId,
};
use vlinder_worker::WorkerCx;

/// Heads that are remembered; beyond that all are forgotten and read again.
const HEADS_MAX: usize = 20_000;
/// Most events of one session (start, forks, promotions).
const SESSION_EVENTS_MAX: usize = 10_000;
/// Most turns of one session that a search for a hash looks through.
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
    /// All branches with where they begin: `None` for `main`.
    pub branches: Vec<(BranchName, Option<ForkPoint>)>,
    /// The last event.
    pub last: NodeHash,
    /// Its sequence in `CTL`.
    pub last_seq: u64,
}

/// Where a forked branch begins.
#[derive(Debug, Clone)]
pub struct ForkPoint {
    /// The end of the turn that comes before the branch's first one.
    pub from: NodeHash,
    /// That turn.
    pub submission: SubmissionId,
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
    cx: WorkerCx,
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
        let node = event.to_node(vec![]);
        let message =
            Message::new(self.cx.ctl(), self.subject(id), node, bytes::Bytes::new()).expecting(0);
        match self.cx.bus.append(message).await {
            Ok(done) => {
                let session = Session {
                    agent: agent.clone(),
                    name: event.name,
                    default_branch: BranchName::main(),
                    branches: vec![(BranchName::main(), None)],
                    last: done.hash,
                    last_seq: done.seq,
                };
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
        let Some(newest) = last else {
            return self.first_head(session, branch).await;
        };
        let seq = newest.seq;
        let Some(last) = self.on_line(newest, &subject).await? else {
            return Ok(match self.first_head(session, branch).await? {
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
        session: &Session,
        branch: &BranchName,
    ) -> Result<BranchEnd, Status> {
        let found = session.branches.iter().find(|(name, _)| name == branch);
        let (_, fork) = found.ok_or_else(|| {
            let names: Vec<&str> = session
                .branches
                .iter()
                .map(|(name, _)| name.as_str())
                .collect();
            Status::not_found(format!(
                "branch {branch} does not exist; this session has: {}",
                names.join(", ")
            ))
        })?;
        let Some(fork) = fork else {
            return Ok(BranchEnd::Idle(Head {
                seq: 0,
                parent: session.last,
                previous: None,
                state: None,
                turns: 0,
            }));
        };
        let end = self.end_of(&fork.submission).await?;
        let (end, _) = end.ok_or_else(|| {
            Status::data_loss(format!(
                "the turn {} that branch {branch} begins at has no end",
                fork.submission
            ))
        })?;
        // How many turns came before is known only to the invoke of that turn; the projection counts.
        Ok(BranchEnd::Idle(Head {
            seq: 0,
            parent: fork.from,
            previous: Some(fork.submission.clone()),
            state: end.state,
            turns: self.turn_number(session, &end, &fork.submission).await? + 1,
        }))
    }

    async fn turn_number(
        &self,
        session: &Session,
        end: &End,
        submission: &SubmissionId,
    ) -> Result<u64, Status> {
        let subject = self.invoke_subject(&end.session, &session.agent, &end.branch);
        let turns = self
            .cx
            .bus
            .all_on(&self.cx.log(), &subject, SEARCH_MAX)
            .await
            .map_err(status::of_bus)?;
        let invokes = turns
            .iter()
            .filter_map(|stored| Invoke::try_from(&stored.node).ok());
        Ok(invokes
            .into_iter()
            .find(|invoke| invoke.submission == *submission)
            .map_or(0, |invoke| invoke.turn))
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

    /// Makes branch `name` begin at the end whose hash begins with `from`. Idempotent.
    pub async fn fork(
        &self,
        id: &SessionId,
        from: &str,
        name: &BranchName,
    ) -> Result<NodeHash, Status> {
        let hex =
            from.len() >= 4 && from.len() <= 64 && from.bytes().all(|b| b.is_ascii_hexdigit());
        if !hex {
            return Err(Status::invalid_argument(
                "from: expected 4 to 64 hexadecimal digits of the hash of a turn's end",
            ));
        }
        let session = self.need(id).await?;
        let end = self.find_end(id, &session, &from.to_lowercase()).await?;
        if let Some((_, fork)) = session.branches.iter().find(|(known, _)| known == name) {
            return match fork {
                Some(fork) if fork.from == end.1 => Ok(end.1),
                _ => Err(Status::already_exists(format!(
                    "branch {name} exists already and begins elsewhere"
                ))),
            };
        }
        let verb = SessionVerb::Fork {
            branch: name.clone(),
            of: end.0.branch.clone(),
            from: end.1,
            submission: end.0.submission.clone(),
        };
        self.append_event(id, &session, verb).await?;
        Ok(end.1)
    }

    /// Seals the default branch and makes `branch` the default. Returns the sealed one; `None` when
    /// `branch` was the default already.
    pub async fn promote(
        &self,
        id: &SessionId,
        branch: &BranchName,
    ) -> Result<Option<BranchName>, Status> {
        let session = self.need(id).await?;
        if session.default_branch == *branch {
            return Ok(None);
        }
        if !session.branches.iter().any(|(name, _)| name == branch) {
            return Err(Status::not_found(format!(
                "branch {branch} does not exist in session {id}"
            )));
        }
        let old = session.default_branch.clone();
        match self.branch_end(id, &session, &old, false).await? {
            BranchEnd::Sealed => {}
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
                let message = Message::new(self.cx.log(), subject, node, bytes::Bytes::new())
                    .expecting(head.seq);
                self.cx.bus.append(message).await.map_err(status::of_bus)?;
                self.forget_head(id, &old);
            }
        }
        self.append_event(
            id,
            &session,
            SessionVerb::Promote {
                branch: branch.clone(),
            },
        )
        .await?;
        Ok(Some(old))
    }

    async fn append_event(
        &self,
        id: &SessionId,
        session: &Session,
        verb: SessionVerb,
    ) -> Result<(), Status> {
        let event = SessionEvent {
            namespace: self.cx.ns.clone(),
            session: id.clone(),
            agent: session.agent.clone(),
            name: session.name.clone(),
            verb,
        };
        let node = event.to_node(vec![session.last]);
        let message = Message::new(self.cx.ctl(), self.subject(id), node, bytes::Bytes::new())
            .expecting(session.last_seq);
        self.cx.bus.append(message).await.map_err(status::of_bus)?;
        lock(&self.known).remove(id);
        Ok(())
    }

    async fn need(&self, id: &SessionId) -> Result<Session, Status> {
        let session = self.read(id).await?;
        session.ok_or_else(|| {
            Status::not_found(format!(
                "session {id} does not exist; `vlinder session list` shows all"
            ))
        })
    }

    /// The one end in a session whose hash begins with `prefix`.
    async fn find_end(
        &self,
        id: &SessionId,
        session: &Session,
        prefix: &str,
    ) -> Result<(End, NodeHash), Status> {
        let filter = subjects::invokes_of_session(&self.cx.ns, &session.agent, id);
        let turns = self
            .cx
            .bus
            .range(&self.cx.log(), &filter, 1, SEARCH_MAX)
            .await
            .map_err(status::of_bus)?;
        let mut found: Option<(End, NodeHash)> = None;
        for invoke in turns
            .iter()
            .filter_map(|stored| Invoke::try_from(&stored.node).ok())
        {
            let Some((end, stored)) = self.end_of(&invoke.submission).await? else {
                continue;
            };
            if stored.hash.to_string().starts_with(prefix) {
                if found.is_some() {
                    return Err(Status::invalid_argument(format!(
                        "{prefix} is the beginning of several hashes; give more digits"
                    )));
                }
                found = Some((end, stored.hash));
            }
        }
        found.ok_or_else(|| {
            Status::not_found(format!("no turn of session {id} ends in {prefix}…; this release forks at the end of a turn (see `vlinder session get {id}`)"))
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

fn apply(session: &mut Option<Session>, stored: &Stored, event: SessionEvent) {
    match (session.as_mut(), event.verb) {
        (None, SessionVerb::Start) => {
            *session = Some(Session {
                agent: event.agent,
                name: event.name,
                default_branch: BranchName::main(),
                branches: vec![(BranchName::main(), None)],
                last: stored.hash,
                last_seq: stored.seq,
            });
            return;
        }
        (
            Some(known),
            SessionVerb::Fork {
                branch,
                from,
                submission,
                ..
            },
        ) => {
            known
                .branches
                .push((branch, Some(ForkPoint { from, submission })));
        }
        (Some(known), SessionVerb::Promote { branch }) => known.default_branch = branch,
        (Some(_), SessionVerb::Start) | (None, _) => return,
    }
    if let Some(known) = session {
        known.last = stored.hash;
        known.last_seq = stored.seq;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}
