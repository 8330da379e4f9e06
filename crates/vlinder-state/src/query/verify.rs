//! What the verifier reads from the projection.

use super::{NodeRow, node_columns};
use crate::apply::Source;
use crate::error::Error;
use crate::number::int;
use rusqlite::{Connection, params};
use std::collections::HashSet;
use vlinder_core::{Namespace, NodeHash};

/// A turn by its local id.
#[derive(Debug)]
pub(crate) struct TurnToVerify {
    pub id: i64,
    pub submission: String,
    /// `nodes.id` of its end.
    pub end: Option<i64>,
}

/// Turns of a session on every branch, in the order of the log, after local id `after`.
pub(crate) fn turns(
    connection: &Connection,
    ns: &Namespace,
    session: &str,
    after: i64,
    limit: usize,
) -> Result<Vec<TurnToVerify>, Error> {
    let mut statement = connection.prepare_cached(
        "SELECT id, submission, end_node FROM turns WHERE ns = ?1 AND session = ?2 AND id > ?3
         ORDER BY id LIMIT ?4",
    )?;
    let rows = statement.query_map(params![ns.as_str(), session, after, limit as i64], |row| {
        Ok(TurnToVerify {
            id: row.get(0)?,
            submission: row.get(1)?,
            end: row.get(2)?,
        })
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The nodes of a turn in the order of the log.
pub(crate) fn turn_nodes(connection: &Connection, turn: i64) -> Result<Vec<NodeRow>, Error> {
    let sql = concat!(
        "SELECT ",
        node_columns!("n", "n.body"),
        " FROM nodes n WHERE n.turn = ?1 ORDER BY n.id"
    );
    nodes(connection, sql, params![turn])
}

/// The events and seals of a session.
pub(crate) fn session_nodes(
    connection: &Connection,
    ns: &Namespace,
    session: &str,
) -> Result<Vec<NodeRow>, Error> {
    let sql = concat!(
        "SELECT ",
        node_columns!("n", "n.body"),
        " FROM nodes n WHERE n.ns = ?1 AND n.session = ?2 ORDER BY n.id"
    );
    nodes(connection, sql, params![ns.as_str(), session])
}

fn nodes(
    connection: &Connection,
    sql: &str,
    params: impl rusqlite::Params,
) -> Result<Vec<NodeRow>, Error> {
    let mut statement = connection.prepare_cached(sql)?;
    let mut rows = statement.query(params)?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(NodeRow::read(row, 0)?);
    }
    Ok(found)
}

/// Those of `hashes` that are on record.
pub(crate) fn known(
    connection: &Connection,
    ns: &Namespace,
    hashes: Vec<NodeHash>,
) -> Result<HashSet<NodeHash>, Error> {
    let mut statement =
        connection.prepare_cached("SELECT 1 FROM nodes WHERE ns = ?1 AND hash = ?2")?;
    let mut known = HashSet::new();
    for hash in hashes {
        if statement.exists(params![ns.as_str(), &hash.as_bytes()[..]])? {
            known.insert(hash);
        }
    }
    Ok(known)
}

/// Those of `seqs` whose message is a node here, or carries one that the stream had before.
pub(crate) fn known_seqs(
    connection: &Connection,
    ns: &Namespace,
    source: Source,
    seqs: Vec<u64>,
) -> Result<HashSet<u64>, Error> {
    let mut statement = connection.prepare_cached(
        "SELECT 1 FROM nodes WHERE ns = ?1 AND stream = ?2 AND seq = ?3
         UNION ALL
         SELECT 1 FROM set_aside WHERE ns = ?1 AND stream = ?2 AND seq = ?3 AND duplicate",
    )?;
    let mut known = HashSet::new();
    for seq in seqs {
        if statement.exists(params![ns.as_str(), source.code(), int(seq)])? {
            known.insert(seq);
        }
    }
    Ok(known)
}
