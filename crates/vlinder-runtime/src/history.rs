//! What was said before: the turns that lead to an end, as messages.
//!
//! Only `done` turns speak; a failed or cancelled one leaves nothing in the conversation. A worker
//! that served the turn before has its history in memory, so that a turn costs no extra read however
//! long the session is. Otherwise the invokes of the branch are read, and where the branch was forked
//! from, those of the branches before it.

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use serde_json::json;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use vlinder_bus::{Body, Stored, Subject};
use vlinder_core::conversation::{Speaker, push_message};
use vlinder_core::record::{End, Invoke, Outcome, SessionEvent, SessionVerb};
use vlinder_core::{BranchName, Kind, NodeHash, SubmissionId};
use vlinder_worker::WorkerCx;

/// Histories kept in memory, in bytes of text.
const CACHE_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Text of one history that an agent is given, in bytes; the oldest messages beyond are left out.
const HISTORY_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Turns of one branch that are read.
const TURNS_MAX: usize = 1_000_000;
/// Session events (forks, promotions) that are read.
const SESSION_EVENTS_MAX: usize = 100_000;
/// Forks of forks that are followed.
const FORKS_MAX: usize = 1000;
/// Turns read at once.
const READS_AT_ONCE: usize = 16;

/// Why a history cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the bus failed")]
    Bus(#[from] vlinder_bus::Error),
    #[error("the conversation before this turn is not in the log: {0}")]
    Broken(String),
}

/// One thing that was said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    pub speaker: Speaker,
    pub text: Arc<str>,
}

/// What was said up to some end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct History {
    messages: VecDeque<Message>,
    bytes: usize,
}

impl History {
    /// Adds what a turn said.
    pub fn push(&mut self, input: &[u8], output: &[u8]) {
        for (speaker, bytes) in [(Speaker::User, input), (Speaker::Agent, output)] {
            let text: Arc<str> = String::from_utf8_lossy(bytes).into();
            self.bytes += text.len();
            self.messages.push_back(Message { speaker, text });
        }
        while self.bytes > HISTORY_BYTES_MAX {
            let Some(oldest) = self.messages.pop_front() else {
                break;
            };
            self.bytes -= oldest.text.len();
        }
    }

    /// The body of `/invoke` as text (interfaces.md §5). The very first turn is the bare input.
    pub fn as_text(&self, input: &Bytes) -> Bytes {
        if self.messages.is_empty() {
            return input.clone();
        }
        let mut text =
            String::with_capacity(self.bytes + self.messages.len() * 8 + input.len() + 8);
        for message in &self.messages {
            push_message(&mut text, message.speaker, &message.text);
        }
        push_message(&mut text, Speaker::User, &String::from_utf8_lossy(input));
        text.into()
    }

    /// The body of `/invoke` for an agent that asked for JSON.
    pub fn as_json(&self, input: &[u8], invoke: &Invoke) -> Bytes {
        let history: Vec<_> = self
            .messages
            .iter()
            .map(|message| json!({ "role": message.speaker.role(), "content": &*message.text }))
            .collect();
        let body = json!({
            "input": String::from_utf8_lossy(input),
            "history": history,
            "session": invoke.session,
            "branch": invoke.branch,
            "submission": invoke.submission,
        });
        body.to_string().into()
    }
}

/// The histories that this worker knows, by the end they lead to; the least recently used go first.
#[derive(Default)]
pub(crate) struct Histories {
    cache: Mutex<Cache>,
}

#[derive(Default)]
struct Cache {
    known: HashMap<NodeHash, (u64, Arc<History>)>,
    bytes: usize,
    clock: u64,
}

impl Histories {
    /// The history of a turn: what was said before it.
    pub async fn before(
        &self,
        cx: &WorkerCx,
        invoke: &Stored,
        facts: &Invoke,
    ) -> Result<Arc<History>, Error> {
        let Some(previous) = &facts.previous else {
            return Ok(Arc::default());
        };
        let end = invoke.node.parents.first().copied();
        if let Some(known) = end.and_then(|end| self.get(&end)) {
            return Ok(known);
        }
        let history = Arc::new(load(cx, facts, previous).await?);
        if let Some(end) = end {
            self.put(end, history.clone());
        }
        Ok(history)
    }

    /// Remembers what a turn made of the history before it; `said` is its input and output if it
    /// ended well. The one before it is forgotten: the branch goes on from here.
    pub fn extend(
        &self,
        before: Option<NodeHash>,
        end: NodeHash,
        mut history: Arc<History>,
        said: Option<(&[u8], &[u8])>,
    ) {
        if let Some(before) = before {
            self.lock().remove(&before);
        }
        if let Some((input, output)) = said {
            Arc::make_mut(&mut history).push(input, output);
        }
        self.put(end, history);
    }

    fn get(&self, end: &NodeHash) -> Option<Arc<History>> {
        let mut cache = self.lock();
        cache.clock += 1;
        let now = cache.clock;
        let (used, history) = cache.known.get_mut(end)?;
        *used = now;
        Some(history.clone())
    }

    fn put(&self, end: NodeHash, history: Arc<History>) {
        let mut cache = self.lock();
        cache.clock += 1;
        cache.remove(&end);
        cache.bytes += cost(&history);
        let now = cache.clock;
        cache.known.insert(end, (now, history));
        if cache.bytes > CACHE_BYTES_MAX {
            cache.evict();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cache {
    /// Drops the least recently used ones until a quarter is free, so that this is rarely done.
    fn evict(&mut self) {
        let mut by_use: Vec<_> = self
            .known
            .iter()
            .map(|(end, (used, _))| (*used, *end))
            .collect();
        by_use.sort_unstable();
        for (_, end) in by_use {
            if self.bytes <= CACHE_BYTES_MAX / 4 * 3 {
                return;
            }
            self.remove(&end);
        }
    }

    fn remove(&mut self, end: &NodeHash) {
        if let Some((_, history)) = self.known.remove(end) {
            self.bytes -= cost(&history);
        }
    }
}

fn cost(history: &History) -> usize {
    history.bytes + history.messages.len() * 64 + 256
}

/// Reads the history that ends with turn `last` of the branch of `facts`, or of one before it.
async fn load(cx: &WorkerCx, facts: &Invoke, last: &SubmissionId) -> Result<History, Error> {
    let mut turns: VecDeque<Stored> = VecDeque::new();
    let mut branch = facts.branch.clone();
    let mut wanted = Some(last.clone());
    let mut forks: Option<HashMap<BranchName, BranchName>> = None;
    for _ in 0..FORKS_MAX {
        let Some(submission) = wanted.clone() else {
            return told(cx, turns).await;
        };
        let invokes = invokes_of(cx, facts, &branch).await?;
        // Each turn names the one before it. Not all that stand on the subject are of the line: after a
        // loss of the log's tail a turn can be there that another one had taken the place of.
        let mut on_branch: HashMap<SubmissionId, (Stored, Invoke)> = HashMap::new();
        for (stored, invoke) in invokes {
            on_branch
                .entry(invoke.submission.clone())
                .or_insert((stored, invoke));
        }
        let mut next = Some(submission.clone());
        while let Some((stored, invoke)) = next.as_ref().and_then(|next| on_branch.remove(next)) {
            next = invoke.previous;
            turns.push_front(stored);
        }
        wanted = next;
        if let Some(submission) = &wanted {
            let forks = match &mut forks {
                Some(forks) => forks,
                None => forks.insert(forks_of(cx, facts).await?),
            };
            branch = forks.get(&branch).cloned().ok_or_else(|| {
                Error::Broken(format!(
                    "turn {submission} is neither on branch {branch} nor before it"
                ))
            })?;
        }
    }
    Err(Error::Broken(format!(
        "more than {FORKS_MAX} forks of forks"
    )))
}

/// The turns of a branch, oldest first.
async fn invokes_of(
    cx: &WorkerCx,
    facts: &Invoke,
    branch: &BranchName,
) -> Result<Vec<(Stored, Invoke)>, Error> {
    let subject = Subject::Invoke {
        ns: cx.ns.clone(),
        agent: facts.agent.clone(),
        session: facts.session.clone(),
        branch: branch.clone(),
    };
    let stored = cx.bus.all_on(&cx.log(), &subject, TURNS_MAX).await?;
    let turns = stored
        .into_iter()
        .filter(|stored| stored.node.kind == Kind::Invoke);
    Ok(turns
        .filter_map(|stored| {
            let invoke = Invoke::try_from(&stored.node).ok()?;
            Some((stored, invoke))
        })
        .collect())
}

/// Which branch each branch of the session was forked from.
async fn forks_of(cx: &WorkerCx, facts: &Invoke) -> Result<HashMap<BranchName, BranchName>, Error> {
    let subject = Subject::Session {
        ns: cx.ns.clone(),
        session: facts.session.clone(),
    };
    let events = cx
        .bus
        .all_on(&cx.ctl(), &subject, SESSION_EVENTS_MAX)
        .await?;
    let mut forks = HashMap::new();
    for stored in events {
        if let Ok(event) = SessionEvent::try_from(&stored.node)
            && let SessionVerb::Fork { branch, of, .. } = event.verb
        {
            forks.insert(branch, of);
        }
    }
    Ok(forks)
}

/// What those turns said.
async fn told(cx: &WorkerCx, turns: VecDeque<Stored>) -> Result<History, Error> {
    let said: Vec<Option<(Bytes, Bytes)>> = futures::stream::iter(turns)
        .map(|stored| said_in(cx, stored))
        .buffered(READS_AT_ONCE)
        .try_collect()
        .await?;
    let mut history = History::default();
    for (input, output) in said.into_iter().flatten() {
        history.push(&input, &output);
    }
    Ok(history)
}

/// Input and output of a turn; `None` where it did not end well.
async fn said_in(cx: &WorkerCx, stored: Stored) -> Result<Option<(Bytes, Bytes)>, Error> {
    let broken = |error: vlinder_core::record::DecodeError| Error::Broken(error.to_string());
    let invoke = Invoke::try_from(&stored.node).map_err(broken)?;
    let subject = Subject::End {
        ns: cx.ns.clone(),
        submission: invoke.submission.clone(),
    };
    let Some(end) = cx.bus.first(&cx.log(), &subject).await? else {
        return Err(Error::Broken(format!(
            "turn {} has no end",
            invoke.submission
        )));
    };
    if End::try_from(&end.node).map_err(broken)?.outcome != Outcome::Done {
        return Ok(None);
    }
    let load = async |body: &Body| cx.bus.load(body).await;
    Ok(Some((load(&stored.body).await?, load(&end.body).await?)))
}
