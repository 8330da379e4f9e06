//! One call of an agent's `/invoke`: what the agent was already given, and the state it works on.
//!
//! A turn that is tried again is a new invocation over the same [`Answers`]: its counters begin at
//! zero, so that the agent's repeated calls get their old keys and are answered from the record.

use super::answers::{Answered, Answers};
use super::source::SourceRecord;
use crate::pool::Pool;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use vlinder_core::record::{CallStatus, Invoke};
use vlinder_core::{AgentName, CallKey, NodeHash, StateRoot, SubmissionId};

/// Calls of one invocation that may be open at once. No node has more parents than one more than
/// these, and a node takes 1024.
pub(crate) const CALLS_OPEN_MAX: usize = 256;
/// Calls of one invocation altogether.
pub(crate) const CALLS_MAX: u64 = 50_000;

const _: () = assert!(CALLS_OPEN_MAX < vlinder_core::record::PARENTS_MAX);

/// What does not change during a turn.
#[derive(Debug)]
pub(crate) struct TurnFacts {
    pub invoke: Invoke,
    /// The invoke node.
    pub hash: NodeHash,
    pub seq: u64,
    /// The delivery, from 1.
    pub attempt: u64,
    /// When it must have ended, in bus time, milliseconds since the Unix epoch.
    pub deadline_ms: u64,
    /// The same on this machine.
    pub deadline: tokio::time::Instant,
}

/// Why a call cannot begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotNow {
    /// The agent has replied, or the turn is over.
    Closed,
    /// Too many calls at once.
    TooManyOpen,
    /// Too many calls altogether.
    TooMany,
}

/// An open invocation.
pub(crate) struct Invocation {
    /// The value of `X-Vlinder-Invocation`.
    pub id: String,
    pub turn: Arc<TurnFacts>,
    pub answers: Arc<Answers>,
    /// What it runs again, if it is a replay.
    pub source: Option<Arc<SourceRecord>>,
    /// Where its instance stands.
    pub pool: Arc<Pool>,
    state: Mutex<State>,
    /// Held by the one call that changes the state.
    pub writes: Arc<tokio::sync::Mutex<()>>,
    /// No call goes on after this.
    over: CancellationToken,
    /// Rung when a streamed call ends.
    stream_ended: Notify,
    /// Why what the agent does now is not explained by the record.
    void: OnceLock<&'static str>,
    voided: CancellationToken,
}

struct State {
    /// How often each call was made, by its key for k = 0.
    counts: HashMap<CallKey, u64>,
    /// The results given to the agent that no other given result follows from.
    maximal: Vec<NodeHash>,
    root: Option<StateRoot>,
    open: usize,
    /// Of the open ones, those of whose answer the agent has a part already.
    streams: usize,
    begun: u64,
    accepts: bool,
    /// What it delegated, by handle: to whom.
    delegated: HashMap<SubmissionId, AgentName>,
}

impl Invocation {
    /// The id is new each time: where the bus forgot that it delivered a turn, another try of it may
    /// run beside this one with the same delivery count, even in the same instance, and the calls of one
    /// must never be taken for calls of the other.
    pub fn new(
        turn: Arc<TurnFacts>,
        answers: Arc<Answers>,
        source: Option<Arc<SourceRecord>>,
        pool: Arc<Pool>,
    ) -> Self {
        let id = format!("{}.{:016x}", turn.invoke.submission, rand::random::<u64>());
        let state = State {
            counts: HashMap::new(),
            maximal: Vec::new(),
            root: turn.invoke.state,
            open: 0,
            streams: 0,
            begun: 0,
            accepts: true,
            delegated: HashMap::new(),
        };
        Self {
            id,
            turn,
            answers,
            source,
            pool,
            state: Mutex::new(state),
            writes: Arc::default(),
            over: CancellationToken::new(),
            stream_ended: Notify::new(),
            void: OnceLock::new(),
            voided: CancellationToken::new(),
        }
    }

    /// How often it has delegated.
    pub fn delegations(&self) -> usize {
        self.lock().delegated.len()
    }

    /// It delegated something.
    pub fn delegated(&self, handle: SubmissionId, to: AgentName) {
        self.lock().delegated.insert(handle, to);
    }

    /// To whom it delegated what `handle` stands for, if it did.
    pub fn delegate(&self, handle: &SubmissionId) -> Option<AgentName> {
        self.lock().delegated.get(handle).cloned()
    }

    /// Admits a call.
    pub fn begin(self: &Arc<Self>) -> Result<OpenCall, NotNow> {
        let mut state = self.lock();
        if !state.accepts {
            return Err(NotNow::Closed);
        }
        if state.open >= CALLS_OPEN_MAX {
            return Err(NotNow::TooManyOpen);
        }
        if state.begun >= CALLS_MAX {
            return Err(NotNow::TooMany);
        }
        state.open += 1;
        state.begun += 1;
        Ok(OpenCall {
            invocation: self.clone(),
            streams: false,
        })
    }

    /// How many calls like this one came before it.
    pub fn count(&self, like: CallKey) -> u64 {
        let mut state = self.lock();
        let count = state.counts.entry(like).or_default();
        *count += 1;
        *count - 1
    }

    /// The parents of a request that is made now.
    pub fn parents(&self) -> Vec<NodeHash> {
        let state = self.lock();
        if state.maximal.is_empty() {
            vec![self.turn.hash]
        } else {
            state.maximal.clone()
        }
    }

    /// The state that a call works on now.
    pub fn root(&self) -> Option<StateRoot> {
        self.lock().root
    }

    /// An answer is given to the agent. `parents` are those of its request: they are no longer
    /// maximal. Whatever precedes them was not maximal when the request was made.
    pub fn given(&self, answered: &Answered, parents: &[NodeHash], changes_state: bool) {
        let mut state = self.lock();
        state.maximal.retain(|hash| !parents.contains(hash));
        if !state.maximal.contains(&answered.hash) {
            state.maximal.push(answered.hash);
        }
        if changes_state && answered.result.status == CallStatus::Ok {
            state.root = answered.result.state;
        }
    }

    /// The agent has replied: takes no more calls and waits until no state is being changed, and until
    /// the answers of which the agent was given a part are on record as a whole. The turn's deadline
    /// bounds the wait.
    pub async fn settle(&self) {
        self.lock().accepts = false;
        drop(self.writes.lock().await);
        loop {
            let ended = self.stream_ended.notified();
            if self.lock().streams == 0 {
                return;
            }
            ended.await;
        }
    }

    /// What the agent was given is not what the record has: what it does from here on counts for
    /// nothing.
    pub fn make_void(&self, why: &'static str) {
        let _ = self.void.set(why);
        self.voided.cancel();
    }

    /// Why it is void, if it is.
    pub fn void(&self) -> Option<&'static str> {
        self.void.get().copied()
    }

    /// Returns when it is void.
    pub async fn voided(&self) {
        self.voided.cancelled().await;
    }

    /// Ends every call that is still open.
    pub fn close(&self) {
        self.lock().accepts = false;
        self.over.cancel();
    }

    /// Returns when the invocation is closed.
    pub async fn closed(&self) {
        self.over.cancelled().await;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call that counts as open until this is dropped.
pub(crate) struct OpenCall {
    invocation: Arc<Invocation>,
    streams: bool,
}

impl OpenCall {
    /// The agent is given a part of the answer, before the whole is on record.
    pub fn streams(&mut self) {
        if !std::mem::replace(&mut self.streams, true) {
            self.invocation.lock().streams += 1;
        }
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        let mut state = self.invocation.lock();
        state.open -= 1;
        state.streams -= usize::from(self.streams);
        drop(state);
        // One waits at most: the turn.
        self.invocation.stream_ended.notify_one();
    }
}
