//! The calls of a turn: requests with their answers, and what became of each.

use super::line::{TurnRow, optional_hash};
use super::{NODE_COLUMNS, NodeRow, node_columns};
use crate::error::Error;
use crate::number::optional_number;
use rusqlite::{Connection, params};
use std::collections::{HashMap, HashSet};
use vlinder_core::NodeHash;
use vlinder_core::record::may_change_state;

/// Roughly what a call takes in an answer without its bodies, in bytes.
pub(crate) const CALL_WEIGHT: u64 = 400;

/// Services among the unanswered calls of one turn that are looked at: one that is away is enough to
/// say why the turn waits.
const NEEDED_MAX: i64 = 16;

/// What became of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CallStatus {
    Ok,
    Error,
    /// Nobody has answered yet.
    Waiting,
    /// Not part of the turn: another attempt's, or too late.
    Abandoned,
}

impl CallStatus {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Error => "error",
            Self::Waiting => "waiting",
            Self::Abandoned => "abandoned",
        }
    }
}

/// A request with one answer to it, or either alone.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    /// From 1, in the order of the log; further answers to one request share its number.
    pub seq: u32,
    pub key: Vec<u8>,
    pub request: Option<RequestRow>,
    pub result: Option<ResultRow>,
    pub status: CallStatus,
}

#[derive(Debug, Clone)]
pub(crate) struct RequestRow {
    pub id: i64,
    pub key: Vec<u8>,
    pub service: String,
    pub backend: String,
    pub operation: String,
    pub selector: String,
    pub label: String,
    pub node: NodeRow,
}

#[derive(Debug, Clone)]
pub(crate) struct ResultRow {
    pub request: Option<i64>,
    pub key: Vec<u8>,
    /// The first answer to its key.
    pub won: bool,
    pub ok: bool,
    pub http: u32,
    pub content_type: String,
    pub state: Option<NodeHash>,
    pub tokens_in: Option<u64>,
    pub tokens_out: Option<u64>,
    /// The result of another turn that it was taken from.
    pub replayed: Option<NodeHash>,
    /// And it was replaced.
    pub repaired: bool,
    pub node: NodeRow,
}

/// The first `max` calls of a turn in the order of the log, and how many it has.
pub(crate) fn of_turn(
    connection: &Connection,
    turn: &TurnRow,
    max: usize,
) -> Result<(Vec<Call>, u64), Error> {
    let requests = requests(connection, turn.id)?;
    let results = results(connection, turn.id)?;
    let mut calls = join(requests, results, turn.end.is_some());
    let total = calls.len() as u64;
    calls.truncate(max);
    Ok((calls, total))
}

/// The calls of a turn that led to one of its nodes, and the state there.
pub(crate) fn up_to(
    connection: &Connection,
    turn: &TurnRow,
    node: &NodeRow,
) -> Result<(Vec<Call>, Option<NodeHash>), Error> {
    let mut requests = requests(connection, turn.id)?;
    let mut results = results(connection, turn.id)?;
    let of_turn: HashMap<NodeHash, &[NodeHash]> = requests
        .iter()
        .map(|request| &request.node)
        .chain(results.iter().map(|result| &result.node))
        .map(|node| (node.hash, node.parents.as_slice()))
        .collect();
    let mut led = HashSet::new();
    let mut to_visit = vec![node.hash];
    while let Some(hash) = to_visit.pop() {
        if let Some(parents) = of_turn.get(&hash)
            && led.insert(hash)
        {
            to_visit.extend(*parents);
        }
    }
    requests.retain(|request| led.contains(&request.node.hash));
    results.retain(|result| led.contains(&result.node.hash));
    let mut calls = join(requests, results, false);
    for call in &mut calls {
        // On this line nobody will answer it.
        if call.status == CallStatus::Waiting {
            call.status = CallStatus::Abandoned;
        }
    }
    let moved = calls.iter().filter_map(|call| {
        let (request, result) = (call.request.as_ref()?, call.result.as_ref()?);
        let moves = result.ok && may_change_state(&request.service, &request.operation);
        moves.then_some(result)
    });
    // They follow each other, so that the last one in the log has it.
    let state = match moved.max_by_key(|result| result.node.id) {
        Some(result) => result.state,
        None => turn.state,
    };
    Ok((calls, state))
}

/// What somebody must serve so that a call is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Needed {
    pub service: String,
    pub backend: String,
    pub selector: String,
}

/// What the unanswered calls of a turn need, each once.
pub(crate) fn needed(connection: &Connection, turn: i64) -> Result<Vec<Needed>, Error> {
    let mut statement = connection.prepare_cached(
        "SELECT DISTINCT q.service, q.backend, q.selector FROM requests q WHERE q.turn = ?1 AND NOT EXISTS
         (SELECT 1 FROM results s WHERE s.turn = q.turn AND s.key = q.key) LIMIT ?2",
    )?;
    let mut rows = statement.query(params![turn, NEEDED_MAX])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(Needed {
            service: row.get(0)?,
            backend: row.get(1)?,
            selector: row.get(2)?,
        });
    }
    Ok(found)
}

fn requests(connection: &Connection, turn: i64) -> Result<Vec<RequestRow>, Error> {
    let mut statement = connection.prepare_cached(concat!(
        "SELECT r.node, r.key, r.service, r.backend, r.operation, r.selector, r.label, ",
        node_columns!("n", "NULL"),
        " FROM requests r JOIN nodes n ON n.id = r.node WHERE r.turn = ?1 ORDER BY r.node"
    ))?;
    let mut rows = statement.query(params![turn])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(RequestRow {
            id: row.get(0)?,
            key: row.get(1)?,
            service: row.get(2)?,
            backend: row.get(3)?,
            operation: row.get(4)?,
            selector: row.get(5)?,
            label: row.get(6)?,
            node: NodeRow::read(row, 7)?,
        });
    }
    Ok(found)
}

fn results(connection: &Connection, turn: i64) -> Result<Vec<ResultRow>, Error> {
    let mut statement = connection.prepare_cached(concat!(
        "SELECT ",
        node_columns!("n", "NULL"),
        ", r.request, r.key, r.won, r.ok, r.http, r.content_type, r.state, r.tokens_in, r.tokens_out,
            r.replayed, r.repaired
         FROM results r JOIN nodes n ON n.id = r.node WHERE r.turn = ?1 ORDER BY r.node"
    ))?;
    let mut rows = statement.query(params![turn])?;
    let mut found = Vec::new();
    let at = NODE_COLUMNS;
    while let Some(row) = rows.next()? {
        found.push(ResultRow {
            node: NodeRow::read(row, 0)?,
            request: row.get(at)?,
            key: row.get(at + 1)?,
            won: row.get(at + 2)?,
            ok: row.get(at + 3)?,
            http: row.get(at + 4)?,
            content_type: row.get(at + 5)?,
            state: optional_hash(row, at + 6)?,
            tokens_in: optional_number(row, at + 7)?,
            tokens_out: optional_number(row, at + 8)?,
            replayed: optional_hash(row, at + 9)?,
            repaired: row.get(at + 10)?,
        });
    }
    Ok(found)
}

/// Pairs requests with their answers. Pure.
fn join(requests: Vec<RequestRow>, results: Vec<ResultRow>, ended: bool) -> Vec<Call> {
    let answered: HashSet<Vec<u8>> = results.iter().map(|result| result.key.clone()).collect();
    let mut by_request: HashMap<Option<i64>, Vec<ResultRow>> = HashMap::new();
    for result in results {
        by_request.entry(result.request).or_default().push(result);
    }
    let mut calls = Vec::new();
    let mut seq = 0;
    for request in requests {
        seq += 1;
        let answers = by_request.remove(&Some(request.id)).unwrap_or_default();
        if answers.is_empty() {
            let status = if ended || answered.contains(&request.key) {
                CallStatus::Abandoned
            } else {
                CallStatus::Waiting
            };
            calls.push(Call {
                seq,
                key: request.key.clone(),
                request: Some(request),
                result: None,
                status,
            });
            continue;
        }
        for result in answers {
            calls.push(answered_call(seq, Some(request.clone()), result, ended));
        }
    }
    // Answers to no request of this turn.
    for result in by_request.remove(&None).unwrap_or_default() {
        seq += 1;
        calls.push(answered_call(seq, None, result, ended));
    }
    calls
}

fn answered_call(seq: u32, request: Option<RequestRow>, result: ResultRow, ended: bool) -> Call {
    // Of a turn that has ended, what its end reaches; before, the first answer to each key.
    let counts = if ended {
        result.node.reached
    } else {
        result.won
    };
    let status = match (counts, result.ok) {
        (false, _) => CallStatus::Abandoned,
        (true, true) => CallStatus::Ok,
        (true, false) => CallStatus::Error,
    };
    Call {
        seq,
        key: result.key.clone(),
        request,
        result: Some(result),
        status,
    }
}
