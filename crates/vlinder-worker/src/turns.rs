//! Turns as the log has them: which follow each other on a line, and what one asked and was answered.
//!
//! A request stands on the subject of whoever serves it, among those of all turns; that of a replayed call
//! stands on its turn's own subject, where no worker looks. A result tells where its request stands
//! ([`NOTE_REQUEST`]), a hint that the request's hash proves; where it is wrong or missing (a healed log, an
//! old one) the requests of that time are looked through.

use crate::WorkerCx;
use crate::service::{TURN_MESSAGES_MAX, call_subject};
use futures::{StreamExt, TryStreamExt};
use std::collections::{HashMap, HashSet};
use vlinder_bus::wire::NOTE_REQUEST;
use vlinder_bus::{Error, Stored, Subject, subjects};
use vlinder_core::record::{CallResult, CallStatus, End, Invoke, Request, SessionEvent};
use vlinder_core::{
    AgentName, BranchName, CallKey, ContentHash, Kind, NodeHash, SessionId, StateRoot, SubmissionId,
};

/// Turns of one branch that are read.
pub const TURNS_MAX: usize = 1_000_000;
/// Session events (forks, promotions) that are read.
pub const SESSION_EVENTS_MAX: usize = 100_000;
/// Forks of forks that are followed.
const FORKS_MAX: usize = 1000;
/// Messages read at once.
const READS_AT_ONCE: usize = 16;
/// Requests of other turns that are looked through at once, and altogether.
const SCAN_BATCH: usize = 500;
const SCAN_MAX: usize = 200_000;

/// Why a line cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The bus failed.
    #[error("the bus failed")]
    Bus(#[from] Error),
    /// The log does not have all of it.
    #[error("{0}")]
    Broken(String),
}

/// A turn of a line.
#[derive(Debug, Clone)]
pub struct Step {
    /// Its invoke.
    pub stored: Stored,
    /// The same, read.
    pub invoke: Invoke,
    /// What the line goes on from: the turn's end, or another node of it where a branch was forked inside
    /// the turn. `None` for a last turn of which nothing is said.
    pub left_at: Option<NodeHash>,
}

/// Turns of one branch, in log order.
pub async fn on_branch(
    cx: &WorkerCx,
    agent: &AgentName,
    session: &SessionId,
    branch: &BranchName,
) -> Result<Vec<(Stored, Invoke)>, Error> {
    let subject = Subject::Invoke {
        ns: cx.ns.clone(),
        agent: agent.clone(),
        session: session.clone(),
        branch: branch.clone(),
    };
    let stored = cx.bus.all_on(&cx.log(), &subject, TURNS_MAX).await?;
    let turns = stored.into_iter().filter_map(|stored| {
        let invoke = Invoke::try_from(&stored.node).ok()?;
        Some((stored, invoke))
    });
    Ok(turns.collect())
}

/// The line that ends with turn `last`, which is on `branch` or before it; oldest first.
pub async fn line(
    cx: &WorkerCx,
    agent: &AgentName,
    session: &SessionId,
    branch: &BranchName,
    last: &SubmissionId,
    left_at: Option<NodeHash>,
) -> Result<Vec<Step>, LineError> {
    let mut steps = Vec::new();
    let mut branch = branch.clone();
    let mut wanted = Some(last.clone());
    let mut left_at = left_at;
    let mut forks: Option<HashMap<BranchName, BranchName>> = None;
    for _ in 0..FORKS_MAX {
        // Each turn names the one before it. Not all that stand on the subject are of the line: after a
        // loss of the log's tail a turn can be there that another one had taken the place of.
        let mut on_branch_by_name: HashMap<SubmissionId, (Stored, Invoke)> = HashMap::new();
        for (stored, invoke) in on_branch(cx, agent, session, &branch).await? {
            on_branch_by_name
                .entry(invoke.submission.clone())
                .or_insert((stored, invoke));
        }
        while let Some((stored, invoke)) = wanted
            .as_ref()
            .and_then(|wanted| on_branch_by_name.remove(wanted))
        {
            wanted = invoke.previous.clone();
            let before = stored.node.parents.first().copied();
            steps.push(Step {
                stored,
                invoke,
                left_at,
            });
            left_at = before;
        }
        let Some(submission) = &wanted else {
            steps.reverse();
            return Ok(steps);
        };
        let forks = match &mut forks {
            Some(forks) => forks,
            None => forks.insert(forks_of(cx, session).await?),
        };
        branch = forks.get(&branch).cloned().ok_or_else(|| {
            LineError::Broken(format!(
                "turn {submission} is neither on branch {branch} nor before it"
            ))
        })?;
    }
    Err(LineError::Broken(format!(
        "more than {FORKS_MAX} forks of forks"
    )))
}

/// Which branch each branch of a session was forked from.
async fn forks_of(
    cx: &WorkerCx,
    session: &SessionId,
) -> Result<HashMap<BranchName, BranchName>, Error> {
    let subject = Subject::Session {
        ns: cx.ns.clone(),
        session: session.clone(),
    };
    let events = cx
        .bus
        .all_on(&cx.ctl(), &subject, SESSION_EVENTS_MAX)
        .await?;
    let mut forks = HashMap::new();
    for stored in events {
        if let Ok(event) = SessionEvent::try_from(&stored.node)
            && let Some(start) = event.verb.starts()
        {
            forks
                .entry(start.branch.clone())
                .or_insert_with(|| start.of.clone());
        }
    }
    Ok(forks)
}

/// The invoke of a turn. `hint`: where it most likely stands; without a right one only turns that have ended
/// are found.
pub async fn find(
    cx: &WorkerCx,
    submission: &SubmissionId,
    hint: Option<u64>,
) -> Result<Option<(Stored, Invoke)>, Error> {
    let is_it = |stored: Stored| {
        let invoke = Invoke::try_from(&stored.node).ok()?;
        (invoke.submission == *submission).then_some((stored, invoke))
    };
    if let Some(seq) = hint
        && let Some(found) = cx.bus.get(&cx.log(), seq).await?.and_then(is_it)
    {
        return Ok(Some(found));
    }
    let subject = Subject::End {
        ns: cx.ns.clone(),
        submission: submission.clone(),
    };
    let Some(end) = cx.bus.first(&cx.log(), &subject).await? else {
        return Ok(None);
    };
    let Ok(end) = End::try_from(&end.node) else {
        return Ok(None);
    };
    let turns = on_branch(cx, &end.agent, &end.session, &end.branch).await?;
    let mut turns = turns.into_iter();
    Ok(turns.find(|(_, invoke)| invoke.submission == *submission))
}

/// A request of a turn.
#[derive(Debug, Clone)]
pub struct Asked {
    /// The request node.
    pub hash: NodeHash,
    /// Where it stands in the log.
    pub seq: u64,
    /// What it says.
    pub request: Request,
    /// What it follows from.
    pub parents: Vec<NodeHash>,
    /// Hash of what was asked.
    pub body: ContentHash,
}

impl Asked {
    fn of(stored: &Stored) -> Option<Self> {
        Some(Self {
            hash: stored.hash,
            seq: stored.seq,
            request: Request::try_from(&stored.node).ok()?,
            parents: stored.node.parents.clone(),
            body: stored.node.body_hash,
        })
    }
}

/// An answer that a turn got.
#[derive(Debug, Clone)]
pub struct Given {
    /// The result node.
    pub stored: Stored,
    /// What it says.
    pub result: CallResult,
}

impl Given {
    /// The request that it answers.
    pub fn request(&self) -> Option<NodeHash> {
        self.stored.node.parents.first().copied()
    }
}

/// What a turn asked and was answered.
#[derive(Debug)]
pub struct TurnRecord {
    /// The turn.
    pub invoke: Invoke,
    /// Its invoke node.
    pub hash: NodeHash,
    requests: HashMap<NodeHash, Asked>,
    /// In the order of the log.
    results: Vec<Given>,
    /// Where in `results`.
    by_hash: HashMap<NodeHash, usize>,
}

impl TurnRecord {
    /// Reads the answers of a turn with the requests that they answer. `unanswered`: those that nobody
    /// answered, too; for them the requests of all turns since its beginning are looked through.
    pub async fn read(
        cx: &WorkerCx,
        stored: &Stored,
        invoke: Invoke,
        unanswered: bool,
    ) -> Result<Self, Error> {
        let subject = call_subject(&cx.ns, &invoke.submission);
        let mut requests = HashMap::new();
        let mut results = Vec::new();
        for stored in cx
            .bus
            .all_on(&cx.log(), &subject, TURN_MESSAGES_MAX)
            .await?
        {
            match stored.node.kind {
                Kind::Request => {
                    requests.extend(Asked::of(&stored).map(|asked| (asked.hash, asked)))
                }
                Kind::Result => {
                    if let Ok(result) = CallResult::try_from(&stored.node) {
                        results.push(Given { stored, result });
                    }
                }
                _ => {}
            }
        }
        results.sort_by_key(|given| given.stored.rank());
        let by_hash = results
            .iter()
            .enumerate()
            .map(|(index, given)| (given.stored.hash, index));
        let mut record = Self {
            hash: stored.hash,
            by_hash: by_hash.collect(),
            invoke,
            requests,
            results,
        };
        record.look_where_told(cx).await?;
        record.look_through(cx, stored.seq, unanswered).await?;
        Ok(record)
    }

    /// Reads the requests that the results tell of.
    async fn look_where_told(&mut self, cx: &WorkerCx) -> Result<(), Error> {
        let log = &cx.log();
        let told = self.results.iter().filter_map(|given| {
            let wanted = given.request()?;
            let seq: u64 = given.stored.notes.get(NOTE_REQUEST)?.parse().ok()?;
            (!self.requests.contains_key(&wanted)).then_some((wanted, seq))
        });
        let reads: Vec<_> = told
            .map(|(wanted, seq)| async move {
                let found = cx.bus.get(log, seq).await?;
                Ok::<_, Error>(found.filter(|stored| stored.hash == wanted))
            })
            .collect();
        let found: Vec<Option<Stored>> = futures::stream::iter(reads)
            .buffered(READS_AT_ONCE)
            .try_collect()
            .await?;
        let found = found.iter().flatten().filter_map(Asked::of);
        self.requests.extend(found.map(|asked| (asked.hash, asked)));
        Ok(())
    }

    /// Looks for what is still missing among the requests of all turns.
    async fn look_through(
        &mut self,
        cx: &WorkerCx,
        from: u64,
        unanswered: bool,
    ) -> Result<(), Error> {
        let missing = |this: &Self| {
            let mut wanted = this.results.iter().filter_map(Given::request);
            wanted.any(|hash| !this.requests.contains_key(&hash))
        };
        let last = self.results.iter().map(|given| given.stored.seq).max();
        let filter = subjects::all_requests(&cx.ns);
        let (mut from, mut seen) = (from, 0);
        while (unanswered || missing(self)) && seen < SCAN_MAX {
            let batch = cx.bus.range(&cx.log(), &filter, from, SCAN_BATCH).await?;
            seen += batch.len();
            let Some(newest) = batch.last() else {
                return Ok(());
            };
            from = newest.seq + 1;
            let ours = batch.iter().filter_map(Asked::of);
            let ours = ours.filter(|asked| asked.request.submission == self.invoke.submission);
            self.requests.extend(ours.map(|asked| (asked.hash, asked)));
            if !unanswered && last.is_none_or(|last| from > last) {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Every answer, in the order of the log.
    pub fn results(&self) -> &[Given] {
        &self.results
    }

    /// Every request that is known, in no order.
    pub fn requests(&self) -> impl Iterator<Item = &Asked> {
        self.requests.values()
    }

    /// The request that a result answers, if it is known.
    pub fn asked(&self, given: &Given) -> Option<&Asked> {
        self.requests.get(&given.request()?)
    }

    /// The first answer to each call among those that `counts` says yes to, in the order of the log.
    pub fn answers(&self, counts: impl Fn(&NodeHash) -> bool) -> Vec<&Given> {
        let mut seen: HashSet<CallKey> = HashSet::new();
        let results = self.results.iter();
        let counted = results.filter(|given| counts(&given.stored.hash));
        counted
            .filter(|given| seen.insert(given.result.key))
            .collect()
    }

    /// Whether it is the invoke, a request or a result of the turn.
    pub fn has(&self, node: &NodeHash) -> bool {
        *node == self.hash || self.requests.contains_key(node) || self.by_hash.contains_key(node)
    }

    /// A node of the turn with everything of the turn that it follows from.
    pub fn ancestors(&self, node: NodeHash) -> HashSet<NodeHash> {
        let mut found = HashSet::new();
        let mut to_visit = vec![node];
        while let Some(hash) = to_visit.pop() {
            if !self.has(&hash) || !found.insert(hash) {
                continue;
            }
            if let Some(asked) = self.requests.get(&hash) {
                to_visit.extend(&asked.parents);
            } else if let Some(index) = self.by_hash.get(&hash) {
                to_visit.extend(&self.results[*index].stored.node.parents);
            }
        }
        found
    }

    /// The state that the calls among `nodes` led to. Those that change it follow each other, so that the
    /// last of them in the log has it.
    pub fn state_after(&self, nodes: &HashSet<NodeHash>) -> Option<StateRoot> {
        let results = self.results.iter().rev();
        let mut moved = results.filter(|given| {
            nodes.contains(&given.stored.hash)
                && given.result.status == CallStatus::Ok
                && self
                    .asked(given)
                    .is_some_and(|asked| asked.request.may_change_state())
        });
        match moved.next() {
            Some(last) => last.result.state,
            None => self.invoke.state,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vlinder_bus::Body;
    use vlinder_core::hash::call_key;
    use vlinder_core::record::Source;
    use vlinder_core::{Namespace, Selector};

    struct Bench {
        record: TurnRecord,
        seq: u64,
    }

    impl Bench {
        fn new() -> Self {
            let submission = SubmissionId::new("t-1").unwrap();
            let invoke = Invoke {
                namespace: Namespace::default_ns(),
                agent: AgentName::new("a").unwrap(),
                session: SessionId::new("s").unwrap(),
                branch: BranchName::main(),
                submission: submission.clone(),
                turn: 0,
                previous: None,
                state: Some(StateRoot::from_bytes([1; 32])),
                timeout_ms: 1000,
                origin: None,
                source: Some(Source::whole(submission)),
            };
            let record = TurnRecord {
                hash: invoke.to_node(vec![], b"hi").hash(),
                invoke,
                requests: HashMap::new(),
                results: Vec::new(),
                by_hash: HashMap::new(),
            };
            Self { record, seq: 1 }
        }

        /// A call that follows `parents`; `state` after it. Gives its request and its result.
        fn call(
            &mut self,
            operation: &str,
            parents: &[NodeHash],
            state: Option<u8>,
        ) -> (NodeHash, NodeHash) {
            let body = self.seq.to_be_bytes();
            let state = state.map(|byte| StateRoot::from_bytes([byte; 32]));
            let key = call_key("kv", operation, "sqlite", "notes", &body, 0);
            let request = Request {
                namespace: Namespace::default_ns(),
                submission: self.record.invoke.submission.clone(),
                agent: self.record.invoke.agent.clone(),
                service: "kv".to_owned(),
                backend: "sqlite".to_owned(),
                operation: operation.to_owned(),
                selector: Selector::new("notes").unwrap(),
                key,
                k: 0,
                state: None,
                label: None,
                deadline_ms: 1,
            };
            let result = CallResult {
                submission: request.submission.clone(),
                key,
                status: CallStatus::Ok,
                http: 200,
                content_type: "text/plain".to_owned(),
                state,
                found: None,
                tokens_in: None,
                tokens_out: None,
            };
            let asked = self.stored(request.to_node(parents.to_vec(), &body));
            let given = self.stored(result.to_node(asked.hash, b""));
            let (question, answer) = (asked.hash, given.hash);
            self.record
                .requests
                .insert(question, Asked::of(&asked).unwrap());
            self.record
                .by_hash
                .insert(answer, self.record.results.len());
            self.record.results.push(Given {
                stored: given,
                result,
            });
            (question, answer)
        }

        fn stored(&mut self, node: vlinder_core::Node) -> Stored {
            self.seq += 1;
            Stored {
                subject: String::new(),
                seq: self.seq,
                time_ms: self.seq,
                previous_on_subject: 0,
                hash: node.hash(),
                node,
                notes: Default::default(),
                body: Body::Inline(Default::default()),
            }
        }

        fn state_at(&self, node: NodeHash) -> Option<u8> {
            let state = self.record.state_after(&self.record.ancestors(node));
            state.map(|root| root.as_bytes()[0])
        }
    }

    #[test]
    fn the_state_at_a_node_is_that_of_what_led_there_and_not_of_what_came_before() {
        let mut bench = Bench::new();
        let invoke = bench.record.hash;
        let (first, one) = bench.call("put", &[invoke], Some(2));
        // Two at once: the read was asked before the write was answered, and answered after it.
        let (_, two) = bench.call("put", &[one], Some(3));
        let (asked, read) = bench.call("get", &[one], Some(2));
        let (last, gone) = bench.call("delete", &[two, read], None);
        assert_eq!(bench.state_at(invoke), Some(1));
        assert_eq!(bench.state_at(first), Some(1), "nobody has answered yet");
        assert_eq!(bench.state_at(one), Some(2));
        assert_eq!(bench.state_at(two), Some(3));
        assert_eq!(bench.state_at(asked), Some(2));
        assert_eq!(bench.state_at(read), Some(2));
        assert_eq!(bench.state_at(last), Some(3));
        assert_eq!(bench.state_at(gone), None, "everything was deleted");
        assert_eq!(bench.record.ancestors(gone).len(), 9);
        let foreign = NodeHash::from_bytes([9; 32]);
        assert!(bench.record.ancestors(foreign).is_empty() && !bench.record.has(&foreign));
        let until = bench.record.ancestors(read);
        let counted = bench.record.answers(|hash| until.contains(hash));
        let counted: Vec<NodeHash> = counted.iter().map(|given| given.stored.hash).collect();
        assert_eq!(counted, [one, read]);
    }
}
