//! Verifies a session: reads its part of the log again and compares.
//!
//! * Every node that the projection has is read from the log by its sequence: it must be there,
//!   decode (which recomputes its hash and that of its body), and be equal to the row. Blobs are read
//!   and hashed too.
//! * Every message on the session's subjects must be one that the projection has.
//! * Parents must be on record, earlier in the log, and of a kind that fits; the end that wins must
//!   be the first one in the log. Earlier is by [`Stored::rank`]: what was lost and given back counts
//!   where it was.
//!
//! What is wrong is a line of text that names the node and its place. Only a bus that does not
//! answer is an error.

use crate::apply::Source;
use crate::bodies::{Bodies, BodyRef};
use crate::error::Error;
use crate::projection::Projection;
use crate::query::NodeRow;
use crate::query::sessions::SessionRow;
use crate::query::verify::{self as rows, TurnToVerify};
use futures::{StreamExt, TryStreamExt, stream};
use std::collections::{HashMap, HashSet};
use vlinder_bus::{Body, Stored, Subject, subjects, wire};
use vlinder_core::record::{CallResult, Place, Request};
use vlinder_core::{AgentName, NodeHash, SessionId, SubmissionId};
use vlinder_proto::state::VerifySessionResponse;

/// Problems that are listed; beyond that they are counted.
pub const PROBLEMS_LISTED_MAX: usize = 100;
/// Nodes that are read from the log at once.
const READS_AT_ONCE: usize = 16;
/// Turns whose rows are read from the projection at once.
const TURNS_AT_ONCE: usize = 200;
/// Messages of one subject read at once.
const RANGE_BATCH: usize = 256;

/// Verifies one session.
pub(crate) struct Verifier {
    projection: Projection,
    bodies: Bodies,
    nodes: u64,
    problems: Vec<String>,
    problems_total: u64,
}

impl Verifier {
    pub fn new(projection: Projection, bodies: Bodies) -> Self {
        Self {
            projection,
            bodies,
            nodes: 0,
            problems: Vec::new(),
            problems_total: 0,
        }
    }

    /// Verifies what the projection and the log have of a session.
    pub async fn session(mut self, session: &SessionRow) -> Result<VerifySessionResponse, Error> {
        self.events(session).await?;
        let mut after = 0;
        loop {
            let (ns, id) = (self.projection.0.ns.clone(), session.id.clone());
            let turns = self
                .projection
                .read(move |connection| rows::turns(connection, &ns, &id, after, TURNS_AT_ONCE))
                .await?;
            let Some(last) = turns.last() else { break };
            after = last.id;
            for turn in &turns {
                self.turn(turn).await?;
            }
        }
        Ok(VerifySessionResponse {
            ok: self.problems_total == 0,
            nodes: self.nodes,
            problems: self.problems,
            problems_total: self.problems_total,
        })
    }

    fn problem(&mut self, text: String) {
        self.problems_total += 1;
        if self.problems.len() < PROBLEMS_LISTED_MAX {
            self.problems.push(text);
        }
    }

    /// The session's own events, its seals, and that no turn of it is missing.
    async fn events(&mut self, session: &SessionRow) -> Result<(), Error> {
        let ns = self.projection.0.ns.clone();
        let id = session.id.clone();
        let nodes = {
            let ns = ns.clone();
            self.projection
                .read(move |connection| rows::session_nodes(connection, &ns, &id))
                .await?
        };
        self.nodes(&nodes).await?;
        let (Ok(id), Ok(agent)) = (SessionId::new(&session.id), AgentName::new(&session.agent))
        else {
            self.problem(format!("session {:?} has no valid id or agent", session.id));
            return Ok(());
        };
        let events = Subject::Session {
            ns: ns.clone(),
            session: id.clone(),
        };
        self.subject(Source::Ctl, &events.to_string()).await?;
        let turns = subjects::invokes_of_session(&ns, &agent, &id);
        self.subject(Source::Log, &turns).await
    }

    async fn turn(&mut self, turn: &TurnToVerify) -> Result<(), Error> {
        let ns = self.projection.0.ns.clone();
        let id = turn.id;
        let nodes = self
            .projection
            .read(move |connection| rows::turn_nodes(connection, id))
            .await?;
        let stored = self.nodes(&nodes).await?;
        self.structure(&nodes, &stored);
        let Ok(submission) = SubmissionId::new(&turn.submission) else {
            self.problem(format!("turn {:?} has no valid name", turn.submission));
            return Ok(());
        };
        self.subject(Source::Log, &subjects::answers_of(&ns, &submission))
            .await?;
        let first_end = nodes
            .iter()
            .filter(|node| node.kind == "end")
            .min_by_key(|node| {
                let there = stored.get(&node.hash).map(Stored::rank);
                there.unwrap_or_else(|| (Place::at(node.seq), node.seq))
            });
        if first_end.map(|end| end.id) != turn.end {
            self.problem(format!(
                "turn {}: the projection does not have its first end as the end",
                turn.submission
            ));
        }
        Ok(())
    }

    /// Reads nodes from the log again and compares them with their rows. Returns those that are
    /// there and sound, by hash.
    async fn nodes(&mut self, nodes: &[NodeRow]) -> Result<HashMap<NodeHash, Stored>, Error> {
        let this = &*self;
        // Collected, because a lazy map over borrowed rows is not general enough for a `Send` future.
        let checks: Vec<_> = nodes.iter().map(|node| this.node(node)).collect();
        let checked: Vec<(Option<Stored>, Option<String>)> = stream::iter(checks)
            .buffered(READS_AT_ONCE)
            .try_collect()
            .await?;
        let mut sound = HashMap::new();
        for (node, (stored, problem)) in nodes.iter().zip(checked) {
            self.nodes += 1;
            if let Some(problem) = problem {
                let place = place(node.source, node.seq);
                self.problem(format!("{} {} at {place}: {problem}", node.kind, node.hash));
            }
            if let Some(stored) = stored {
                sound.insert(node.hash, stored);
            }
        }
        let parents: Vec<NodeHash> = sound
            .values()
            .flat_map(|stored| stored.node.parents.iter().copied())
            .collect();
        let ns = self.projection.0.ns.clone();
        let known = self
            .projection
            .read(move |connection| rows::known(connection, &ns, parents))
            .await?;
        for node in nodes {
            let Some(stored) = sound.get(&node.hash) else {
                continue;
            };
            for parent in &stored.node.parents {
                if !known.contains(parent) {
                    let place = place(node.source, node.seq);
                    self.problem(format!(
                        "{} {} at {place}: its parent {parent} is not on record",
                        node.kind, node.hash
                    ));
                }
            }
        }
        Ok(sound)
    }

    /// One node: what the log has, and what is wrong.
    async fn node(&self, row: &NodeRow) -> Result<(Option<Stored>, Option<String>), Error> {
        let inner = &self.projection.0;
        let stream = row.source.stream(&inner.ns);
        let stored = match inner.bus.get(&stream, row.seq).await {
            Ok(Some(stored)) => stored,
            Ok(None) => return Ok((None, Some("is missing from the log".to_owned()))),
            Err(vlinder_bus::Error::Undecodable { reason, .. }) => {
                return Ok((None, Some(format!("is damaged in the log: {reason}"))));
            }
            Err(vlinder_bus::Error::Storage { reason }) => {
                return Ok((None, Some(format!("cannot be read from the log: {reason}"))));
            }
            Err(error) => return Err(error.into()),
        };
        if stored.hash != row.hash {
            let problem = format!("the log has {} {} there", stored.node.kind, stored.hash);
            return Ok((None, Some(problem)));
        }
        if let Some(what) = difference(row, &stored) {
            let problem = format!("the projection's row differs from the log in its {what}");
            return Ok((Some(stored), Some(problem)));
        }
        let problem = match &stored.body {
            Body::Inline(_) => None,
            Body::Blob { .. } => self.blob(row).await?,
        };
        Ok((Some(stored), problem))
    }

    /// What is wrong with the body of a node that is in the blob store.
    async fn blob(&self, row: &NodeRow) -> Result<Option<String>, Error> {
        match self.bodies.load(&BodyRef::from(row)).await {
            Ok(_) => Ok(None),
            Err(Error::Bus(
                error @ (vlinder_bus::Error::BlobDamaged { .. }
                | vlinder_bus::Error::Missing { .. }
                | vlinder_bus::Error::TooLarge { .. }
                | vlinder_bus::Error::Storage { .. }),
            )) => Ok(Some(format!("its body cannot be read: {error}"))),
            Err(error) => Err(error),
        }
    }

    /// Whether the parents within a turn fit: by kind, by order, by key.
    fn structure(&mut self, nodes: &[NodeRow], stored: &HashMap<NodeHash, Stored>) {
        let of_turn: HashMap<NodeHash, &NodeRow> =
            nodes.iter().map(|node| (node.hash, node)).collect();
        for node in nodes {
            let Some(there) = stored.get(&node.hash) else {
                continue;
            };
            for problem in misfits(node, there, &of_turn, stored) {
                let place = place(node.source, node.seq);
                self.problem(format!("{} {} at {place}: {problem}", node.kind, node.hash));
            }
        }
    }

    /// Every message on subjects of the session must be in the projection, or set aside with reason.
    async fn subject(&mut self, source: Source, filter: &str) -> Result<(), Error> {
        let ns = self.projection.0.ns.clone();
        let stream = source.stream(&ns);
        let limit = self.projection.applied().of(source);
        let mut from = 1;
        loop {
            let backend = self.projection.0.bus.backend().clone();
            let batch = backend.range(&stream, filter, from, RANGE_BATCH).await?;
            let Some(last) = batch.last() else {
                return Ok(());
            };
            from = last.seq + 1;
            let full = batch.len() == RANGE_BATCH;
            let seqs: Vec<u64> = batch.iter().map(|raw| raw.seq).collect();
            let known: HashSet<u64> = {
                let ns = ns.clone();
                self.projection
                    .read(move |connection| rows::known_seqs(connection, &ns, source, seqs))
                    .await?
            };
            for raw in batch {
                // What came after the barrier may not be applied yet.
                if known.contains(&raw.seq) || raw.seq > limit {
                    continue;
                }
                let place = place(source, raw.seq);
                let subject = raw.subject.clone();
                match wire::decode(&raw) {
                    Ok(stored) => self.problem(format!(
                        "{} {} at {place}: is not in the projection",
                        stored.node.kind, stored.hash
                    )),
                    Err(vlinder_bus::Error::Undecodable { reason, .. }) => self.problem(format!(
                        "the message at {place} on {subject} is damaged in the log: {reason}"
                    )),
                    Err(error) => return Err(error.into()),
                }
            }
            if !full {
                return Ok(());
            }
        }
    }
}

/// `LOG:17`, as people say it.
fn place(source: Source, seq: u64) -> String {
    match source {
        Source::Log => format!("LOG:{seq}"),
        Source::Ctl => format!("CTL:{seq}"),
    }
}

/// Which part of a row is not what the log has.
fn difference(row: &NodeRow, stored: &Stored) -> Option<&'static str> {
    let node = &stored.node;
    let body_differs = match (&row.body, &stored.body) {
        (Some(kept), Body::Inline(bytes)) => kept != bytes,
        (Some(_), Body::Blob { .. }) => true,
        (None, _) => false,
    };
    if row.kind != node.kind.as_str() {
        Some("kind")
    } else if row.parents != node.parents {
        Some("parents")
    } else if row.body_hash != node.body_hash || row.body_len != node.body_len || body_differs {
        Some("body")
    } else if row.time_ms != stored.time_ms {
        Some("time")
    } else {
        None
    }
}

/// What is wrong with the parents of a node of a turn.
fn misfits(
    row: &NodeRow,
    stored: &Stored,
    of_turn: &HashMap<NodeHash, &NodeRow>,
    others: &HashMap<NodeHash, Stored>,
) -> Vec<String> {
    let mut problems = Vec::new();
    let allowed: &[&str] = match row.kind.as_str() {
        "request" | "end" => &["invoke", "result"],
        "result" => &["request"],
        // An invoke follows the turn before it, or a session event.
        _ => return problems,
    };
    if stored.node.parents.is_empty() {
        problems.push("has no parent".to_owned());
    }
    for parent in &stored.node.parents {
        match of_turn.get(parent) {
            None => problems.push(format!("its parent {parent} is not of its turn")),
            Some(parent) if !allowed.contains(&parent.kind.as_str()) => problems.push(format!(
                "its parent is {}; expected {}",
                parent.label(),
                allowed.join(" or ")
            )),
            Some(parent)
                if others
                    .get(&parent.hash)
                    .is_some_and(|parent| parent.rank() >= stored.rank()) =>
            {
                problems.push(format!("its parent {} comes after it", parent.label()));
            }
            Some(_) => {}
        }
    }
    if row.kind == "result"
        && let Some(request) = stored
            .node
            .parents
            .first()
            .and_then(|hash| others.get(hash))
        && let (Ok(request), Ok(result)) = (
            Request::try_from(&request.node),
            CallResult::try_from(&stored.node),
        )
        && request.key != result.key
    {
        problems.push("answers another call key than its request has".to_owned());
    }
    problems
}
