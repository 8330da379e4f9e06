//! Turns, across sessions.

use super::line::{EndRow, TURN_COLUMNS, TURN_JOINS, TurnRow, optional_hash};
use super::{NODE_COLUMNS, NodeRow, after_prefix, node_columns};
use crate::error::Error;
use rusqlite::{Connection, OptionalExtension, params};
use vlinder_core::Namespace;

/// Ends of one turn that are shown. A turn has one, and some that lost a race with it.
const ENDS_MAX: i64 = 100;

/// The newest turns first; `all` includes those that have ended.
pub(crate) fn list(
    connection: &Connection,
    ns: &Namespace,
    all: bool,
    limit: usize,
) -> Result<Vec<TurnRow>, Error> {
    let open = if all { "" } else { "AND t.end_node IS NULL" };
    let sql = format!(
        "SELECT {TURN_COLUMNS} FROM turns t {TURN_JOINS} WHERE t.ns = ?1 {open} ORDER BY t.id DESC LIMIT ?2"
    );
    let mut statement = connection.prepare_cached(&sql)?;
    let mut rows = statement.query(params![ns.as_str(), limit as i64])?;
    let mut turns = Vec::new();
    while let Some(row) = rows.next()? {
        turns.push(TurnRow::read(row)?);
    }
    Ok(turns)
}

/// A turn by its submission.
pub(crate) fn get(
    connection: &Connection,
    ns: &Namespace,
    submission: &str,
) -> Result<TurnRow, Error> {
    let sql = format!(
        "SELECT {TURN_COLUMNS} FROM turns t {TURN_JOINS} WHERE t.ns = ?1 AND t.submission = ?2"
    );
    let mut statement = connection.prepare_cached(&sql)?;
    let mut rows = statement.query([ns.as_str(), submission])?;
    match rows.next()? {
        Some(row) => TurnRow::read(row),
        None => Err(Error::NotFound {
            what: format!("turn {submission:?}"),
            hint: hint(connection, ns, submission)?,
        }),
    }
}

/// A submission that begins like the one that was asked for.
fn hint(connection: &Connection, ns: &Namespace, text: &str) -> Result<String, Error> {
    let found: Option<String> = connection
        .prepare_cached(
            "SELECT submission FROM turns WHERE ns = ?1 AND submission >= ?2 AND submission < ?3 LIMIT 1",
        )?
        .query_row(params![ns.as_str(), text, after_prefix(text)], |row| row.get(0))
        .optional()?;
    Ok(found.map_or(String::new(), |found| format!("; did you mean {found:?}?")))
}

/// Every end of a turn in the order of the log: the first is the end.
pub(crate) fn ends(connection: &Connection, turn: i64) -> Result<Vec<EndRow>, Error> {
    let mut statement = connection.prepare_cached(concat!(
        "SELECT ",
        node_columns!("n", "NULL"),
        ", x.outcome, x.code, x.state FROM ends x JOIN nodes n ON n.id = x.node WHERE x.turn = ?1 ORDER BY x.node LIMIT ?2"
    ))?;
    let mut rows = statement.query([turn, ENDS_MAX])?;
    let mut ends = Vec::new();
    while let Some(row) = rows.next()? {
        ends.push(EndRow {
            node: NodeRow::read(row, 0)?,
            outcome: row.get(NODE_COLUMNS)?,
            code: row.get(NODE_COLUMNS + 1)?,
            state: optional_hash(row, NODE_COLUMNS + 2)?,
        });
    }
    Ok(ends)
}
