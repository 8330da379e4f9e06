//! The turns of a line: from the last one of a branch back through `previous`, across forks.
//!
//! `turns.previous` was resolved when the turn was applied, to a turn of the same session that came
//! before it in the log. So the walk ends, and each step is one look into a table by its key.

use super::calls::{self, Call};
use super::{NODE_COLUMNS, NodeRow, node_columns};
use crate::apply::node_hash;
use crate::error::Error;
use crate::number::number;
use rusqlite::{Connection, Row};
use vlinder_core::{Namespace, NodeHash};

/// A turn with its invoke and its end.
#[derive(Debug, Clone)]
pub(crate) struct TurnRow {
    pub id: i64,
    pub submission: String,
    pub agent: String,
    pub session: String,
    pub branch: String,
    pub timeout_ms: u64,
    /// The turn before it on its line.
    pub previous: Option<i64>,
    /// The state that it began with.
    pub state: Option<NodeHash>,
    /// The turn that it runs again.
    pub source: String,
    /// The line leaves it inside, where a branch was forked: at this node, with the state there.
    pub left_at: Option<(NodeHash, Option<NodeHash>)>,
    pub invoke: NodeRow,
    pub end: Option<EndRow>,
}

/// The end of a turn, or one that came too late.
#[derive(Debug, Clone)]
pub(crate) struct EndRow {
    pub node: NodeRow,
    pub outcome: String,
    pub code: String,
    pub state: Option<NodeHash>,
}

/// What [`TurnRow::read`] wants, from `turns t`, `nodes i`, `nodes e` and `ends x`.
pub(crate) const TURN_COLUMNS: &str = concat!(
    "t.id, t.submission, t.agent, t.session, t.branch, t.timeout_ms, t.previous, t.state, coalesce(t.source, ''), ",
    node_columns!("i", "i.body"),
    ", x.outcome, x.code, x.state, ",
    node_columns!("e", "e.body")
);
/// The joins that go with [`TURN_COLUMNS`].
pub(crate) const TURN_JOINS: &str = "JOIN nodes i ON i.id = t.invoke
    LEFT JOIN nodes e ON e.id = t.end_node LEFT JOIN ends x ON x.node = t.end_node";

impl TurnRow {
    pub fn read(row: &Row<'_>) -> Result<Self, Error> {
        let end_at = 9 + NODE_COLUMNS;
        let end = match row.get::<_, Option<String>>(end_at)? {
            Some(outcome) => Some(EndRow {
                outcome,
                code: row.get(end_at + 1)?,
                state: optional_hash(row, end_at + 2)?,
                node: NodeRow::read(row, end_at + 3)?,
            }),
            None => None,
        };
        Ok(Self {
            id: row.get(0)?,
            submission: row.get(1)?,
            agent: row.get(2)?,
            session: row.get(3)?,
            branch: row.get(4)?,
            timeout_ms: number(row, 5)?,
            previous: row.get(6)?,
            state: optional_hash(row, 7)?,
            source: row.get(8)?,
            left_at: None,
            invoke: NodeRow::read(row, 9)?,
            end,
        })
    }

    /// Roughly what it takes in an answer whose texts are cut to `text_max`, in bytes.
    fn weight(&self, text_max: u64) -> u64 {
        let output = self.end.as_ref().map_or(0, |end| end.node.body_len);
        400 + self.invoke.body_len.min(text_max) + output.min(text_max)
    }
}

/// A hash column that may be NULL.
pub(crate) fn optional_hash(row: &Row<'_>, at: usize) -> Result<Option<NodeHash>, Error> {
    let bytes: Option<Vec<u8>> = row.get(at)?;
    bytes.map(|bytes| node_hash(&bytes)).transpose()
}

/// How much of a line is read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub turns: usize,
    /// Of the answer; the first turn is read whatever it takes.
    pub bytes: u64,
    /// Of each text in the answer.
    pub text: u64,
    /// Calls of each turn that are shown.
    pub calls: usize,
}

/// A part of a line.
#[derive(Debug, Default)]
pub(crate) struct Line {
    /// Oldest first, with the calls and how many there are of them.
    pub turns: Vec<(TurnRow, Vec<Call>, u64)>,
    /// There are turns before these.
    pub more: bool,
}

/// The last turn of a line, by its local id, and the node of it that the line goes on from, if it does.
pub(crate) type Tip = (i64, Option<NodeHash>);

/// The last turns of the line that ends there.
pub(crate) fn read(
    connection: &Connection,
    ns: &Namespace,
    (tip, left_at): Tip,
    bounds: Bounds,
) -> Result<Line, Error> {
    let sql = format!("SELECT {TURN_COLUMNS} FROM turns t {TURN_JOINS} WHERE t.id = ?1");
    let mut statement = connection.prepare_cached(&sql)?;
    let mut line = Line::default();
    let mut bytes = 0;
    let (mut next, mut left_at) = (Some(tip), left_at);
    while let Some(id) = next {
        let mut turn = statement.query_row([id], |row| Ok(TurnRow::read(row)))??;
        next = turn.previous.filter(|previous| *previous < id);
        let node = match left_at {
            Some(left_at) => super::node(connection, ns, &left_at)?,
            None => None,
        };
        left_at = turn.invoke.parents.first().copied();
        let (calls, total) = match node.filter(|node| node.kind != "end") {
            Some(node) => {
                let (calls, state) = calls::up_to(connection, &turn, &node)?;
                turn.left_at = Some((node.hash, state));
                turn.end = None;
                let total = calls.len() as u64;
                (calls.into_iter().take(bounds.calls).collect(), total)
            }
            None => calls::of_turn(connection, &turn, bounds.calls)?,
        };
        bytes += turn.weight(bounds.text) + calls.len() as u64 * calls::CALL_WEIGHT;
        let full = line.turns.len() == bounds.turns || bytes > bounds.bytes;
        if full && !line.turns.is_empty() {
            line.more = true;
            break;
        }
        line.turns.push((turn, calls, total));
    }
    line.turns.reverse();
    Ok(line)
}

/// The number of the turns of a line.
pub(crate) fn length(connection: &Connection, tip: i64) -> Result<u64, Error> {
    let before = connection
        .prepare_cached("SELECT number FROM turns WHERE id = ?1")?
        .query_row([tip], |row| number(row, 0))?;
    Ok(before.saturating_add(1))
}
