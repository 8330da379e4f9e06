//! What was said before: the turns that lead to an end, as messages.
//!
//! Only `done` turns speak; a failed or cancelled one leaves nothing in the conversation. Of a turn that a
//! branch was forked inside of, that branch has the input alone. A worker that served the turn before has its history in memory, so that a turn costs no extra read however
//! long the session is. Otherwise the invokes of the branch are read, and where the branch was forked
//! from, those of the branches before it.

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use serde_json::json;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use vlinder_bus::{Body, Stored, Subject};
use vlinder_core::conversation::{Speaker, push_message};
use vlinder_core::record::{End, Invoke, Outcome};
use vlinder_core::{NodeHash, SubmissionId};
use vlinder_worker::WorkerCx;
use vlinder_worker::turns::{self, LineError, Step};

/// Histories kept in memory, in bytes of text.
const CACHE_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Text of one history that an agent is given, in bytes; the oldest messages beyond are left out.
const HISTORY_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Turns read at once.
const READS_AT_ONCE: usize = 16;
/// Ends of one turn that are read: one, and those that lost a race with it.
const ENDS_MAX: usize = 1000;

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
        self.say(Speaker::User, input);
        self.say(Speaker::Agent, output);
        self.forget();
    }

    /// Adds what nobody has answered.
    pub fn push_input(&mut self, input: &[u8]) {
        self.say(Speaker::User, input);
        self.forget();
    }

    fn say(&mut self, speaker: Speaker, bytes: &[u8]) {
        let text: Arc<str> = String::from_utf8_lossy(bytes).into();
        self.bytes += text.len();
        self.messages.push_back(Message { speaker, text });
    }

    /// Leaves out the oldest messages beyond the bound.
    fn forget(&mut self) {
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
        let history = Arc::new(load(cx, facts, previous, end).await?);
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

/// Reads the history that ends with turn `last` of the branch of `facts`, or of one before it, which the
/// turn of `facts` follows from at `left_at`.
async fn load(
    cx: &WorkerCx,
    facts: &Invoke,
    last: &SubmissionId,
    left_at: Option<NodeHash>,
) -> Result<History, Error> {
    let line = turns::line(
        cx,
        &facts.agent,
        &facts.session,
        &facts.branch,
        last,
        left_at,
    )
    .await
    .map_err(|error| match error {
        LineError::Bus(error) => Error::Bus(error),
        LineError::Broken(why) => Error::Broken(why),
    })?;
    told(cx, line).await
}

/// What those turns said.
async fn told(cx: &WorkerCx, line: Vec<Step>) -> Result<History, Error> {
    let said: Vec<Said> = futures::stream::iter(line)
        .map(|step| said_in(cx, step))
        .buffered(READS_AT_ONCE)
        .try_collect()
        .await?;
    let mut history = History::default();
    for said in said {
        match said {
            Said::Both(input, output) => history.push(&input, &output),
            Said::Input(input) => history.push_input(&input),
            Said::Nothing => {}
        }
    }
    Ok(history)
}

/// What a turn left in the conversation.
enum Said {
    Both(Bytes, Bytes),
    /// The line leaves it before it has replied.
    Input(Bytes),
    /// It did not end well.
    Nothing,
}

async fn said_in(cx: &WorkerCx, step: Step) -> Result<Said, Error> {
    let load = async |body: &Body| cx.bus.load(body).await;
    let subject = Subject::End {
        ns: cx.ns.clone(),
        submission: step.invoke.submission.clone(),
    };
    // After a loss of the log's tail the line may go on from an end that is not the one that counts.
    let ends = cx.bus.all_on(&cx.log(), &subject, ENDS_MAX).await?;
    if let Some(left_at) = step.left_at
        && !ends.iter().any(|end| end.hash == left_at)
    {
        return Ok(Said::Input(load(&step.stored.body).await?));
    }
    let Some(end) = ends.into_iter().min_by_key(Stored::rank) else {
        let why = format!("turn {} has no end", step.invoke.submission);
        return Err(Error::Broken(why));
    };
    let read = End::try_from(&end.node).map_err(|error| Error::Broken(error.to_string()))?;
    if read.outcome != Outcome::Done {
        return Ok(Said::Nothing);
    }
    let (input, output) = (load(&step.stored.body).await?, load(&end.body).await?);
    Ok(Said::Both(input, output))
}
