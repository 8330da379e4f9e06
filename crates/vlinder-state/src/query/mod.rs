//! Queries: from rows to plain values. Each runs on one snapshot; none waits, none writes.

pub(crate) mod calls;
pub(crate) mod digest;
pub(crate) mod line;
pub(crate) mod sessions;
pub(crate) mod turns;
pub(crate) mod verify;

use crate::apply::{Source, node_hash, read_cursor};
use crate::error::Error;
use crate::number::{number, optional_number};
use crate::projection::Applied;
use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, Row, params};
use vlinder_core::{ContentHash, Namespace, NodeHash};

/// The columns of a node under an alias, in the order in which [`NodeRow::read`] wants them. `$body`
/// is the column or `NULL`, for lists that show no bodies.
macro_rules! node_columns {
    ($n:literal, $body:expr) => {
        concat!(
            $n,
            ".id, ",
            $n,
            ".stream, ",
            $n,
            ".seq, ",
            $n,
            ".hash, ",
            $n,
            ".kind, ",
            $n,
            ".time_ms, ",
            $n,
            ".parents, ",
            $n,
            ".body_hash, ",
            $n,
            ".body_len, ",
            $n,
            ".emitter, ",
            $n,
            ".attempt, ",
            $n,
            ".took_us, ",
            $n,
            ".reached, ",
            $body
        )
    };
}
pub(crate) use node_columns;

/// How many columns [`node_columns`] names.
pub(crate) const NODE_COLUMNS: usize = 14;

/// A node as the projection has it.
#[derive(Debug, Clone)]
pub(crate) struct NodeRow {
    pub id: i64,
    pub source: Source,
    pub seq: u64,
    pub hash: NodeHash,
    pub kind: String,
    /// Milliseconds since the Unix epoch, by the log's clock.
    pub time_ms: u64,
    pub parents: Vec<NodeHash>,
    pub body_hash: ContentHash,
    pub body_len: u64,
    /// The worker that emitted it.
    pub by: String,
    pub attempt: u64,
    pub took_us: Option<u64>,
    /// The end of its turn reaches it through parents.
    pub reached: bool,
    /// The body, where it is kept here and was asked for.
    pub body: Option<Bytes>,
}

impl NodeRow {
    /// Reads the columns from `at` on.
    pub fn read(row: &Row<'_>, at: usize) -> Result<Self, Error> {
        let parents: Vec<u8> = row.get(at + 6)?;
        let body_hash: Vec<u8> = row.get(at + 7)?;
        let body_hash = body_hash.try_into().map_err(|_| Error::Damaged)?;
        Ok(Self {
            id: row.get(at)?,
            source: Source::of_code(row.get(at + 1)?)?,
            seq: number(row, at + 2)?,
            hash: node_hash(&row.get::<_, Vec<u8>>(at + 3)?)?,
            kind: row.get(at + 4)?,
            time_ms: number(row, at + 5)?,
            parents: parents
                .chunks(32)
                .map(node_hash)
                .collect::<Result<_, _>>()?,
            body_hash: ContentHash::from_bytes(body_hash),
            body_len: number(row, at + 8)?,
            by: row.get(at + 9)?,
            attempt: number(row, at + 10)?,
            took_us: optional_number(row, at + 11)?,
            reached: row.get(at + 12)?,
            body: row.get::<_, Option<Vec<u8>>>(at + 13)?.map(Bytes::from),
        })
    }

    /// Kind and the beginning of the hash, for people.
    pub fn label(&self) -> String {
        format!("{} {}", self.kind, self.hash.short())
    }
}

/// A node by its hash, with its body where that is kept.
pub(crate) fn node(
    connection: &Connection,
    ns: &Namespace,
    hash: &NodeHash,
) -> Result<Option<NodeRow>, Error> {
    let mut statement = connection.prepare_cached(concat!(
        "SELECT ",
        node_columns!("n", "n.body"),
        " FROM nodes n WHERE n.ns = ?1 AND n.hash = ?2"
    ))?;
    let mut rows = statement.query(params![ns.as_str(), &hash.as_bytes()[..]])?;
    rows.next()?.map(|row| NodeRow::read(row, 0)).transpose()
}

/// Reads the kept body of a node that was read without it.
pub(crate) fn fill_body(connection: &Connection, node: &mut NodeRow) -> Result<(), Error> {
    let kept: Option<Vec<u8>> = connection
        .prepare_cached("SELECT body FROM nodes WHERE id = ?1")?
        .query_row([node.id], |row| row.get(0))?;
    node.body = kept.map(Bytes::from);
    Ok(())
}

/// Counters for `Status`.
pub(crate) struct Counts {
    pub nodes: u64,
    pub duplicates: u64,
    pub skipped: u64,
}

/// Counts without a scan of what is large.
pub(crate) fn counts(connection: &Connection) -> Result<Counts, Error> {
    // Nodes are never deleted, so that the largest id counts them.
    let nodes = connection.query_row("SELECT coalesce(max(id), 0) FROM nodes", [], |row| {
        number(row, 0)
    })?;
    let (duplicates, aside) = connection.query_row(
        "SELECT coalesce(sum(duplicate), 0), count(*) FROM set_aside",
        [],
        |row| Ok((number(row, 0)?, number(row, 1)?)),
    )?;
    Ok(Counts {
        nodes,
        duplicates,
        skipped: aside - duplicates,
    })
}

/// The upper end of the range of texts that begin with `prefix`.
pub(crate) fn after_prefix(prefix: &str) -> String {
    format!("{prefix}\u{10FFFF}")
}

/// The turn before `submission` on its line, with the node of it that the line goes on from: the outer `None`
/// when the session has no such turn.
pub(crate) fn previous_turn(
    connection: &Connection,
    ns: &Namespace,
    session: &str,
    submission: &str,
) -> Result<Option<Option<line::Tip>>, Error> {
    let found = connection
        .prepare_cached(
            "SELECT t.previous, i.parents FROM turns t JOIN nodes i ON i.id = t.invoke
             WHERE t.ns = ?1 AND t.submission = ?2 AND t.session = ?3",
        )?
        .query_row([ns.as_str(), submission, session], |row| {
            Ok((row.get::<_, Option<i64>>(0)?, row.get::<_, Vec<u8>>(1)?))
        })
        .optional()?;
    let Some((previous, parents)) = found else {
        return Ok(None);
    };
    let left_at = parents.chunks(32).next().map(node_hash).transpose()?;
    Ok(Some(previous.map(|previous| (previous, left_at))))
}

/// Up to where the rows go, as of this snapshot.
pub(crate) fn applied(connection: &Connection, ns: &Namespace) -> Result<Applied, Error> {
    let mut applied = Applied::default();
    for source in [Source::Log, Source::Ctl] {
        if let Some(cursor) = read_cursor(connection, ns, source)? {
            applied.set(source, cursor.seq);
        }
    }
    Ok(applied)
}
