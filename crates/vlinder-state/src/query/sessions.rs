//! Sessions and their branches.

use super::after_prefix;
use crate::apply::node_hash;
use crate::error::Error;
use crate::number::number;
use rusqlite::{Connection, OptionalExtension, Row, params};
use vlinder_core::{Namespace, NodeHash};

/// Sessions that are compared with a name that nobody has, for a hint.
const HINT_CANDIDATES_MAX: usize = 1000;
/// How alike a hint must be, from 0 to 1.
const HINT_LIKENESS: f64 = 0.8;
/// Sessions that an ambiguous name lists.
const AMBIGUOUS_SHOWN: usize = 5;
/// Branches of one session that are listed.
const BRANCHES_MAX: usize = 10_000;

/// A session.
#[derive(Debug, Clone)]
pub(crate) struct SessionRow {
    pub id: String,
    pub agent: String,
    pub name: String,
    pub default_branch: String,
    pub started_ms: u64,
    pub active_ms: u64,
    pub turns: u64,
    pub open: u64,
}

const COLUMNS: &str = "id, agent, coalesce(name, id), coalesce(default_branch, 'main'),
    coalesce(started_ms, active_ms), active_ms, turns, open";

impl SessionRow {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get(0)?,
            agent: row.get(1)?,
            name: row.get(2)?,
            default_branch: row.get(3)?,
            started_ms: number(row, 4)?,
            active_ms: number(row, 5)?,
            turns: number(row, 6)?,
            open: number(row, 7)?,
        })
    }
}

/// Where a list of sessions goes on: after the session with this activity and id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Page {
    pub active_ms: i64,
    pub id: String,
}

/// The last active sessions first.
pub(crate) fn list(
    connection: &Connection,
    ns: &Namespace,
    agent: &str,
    limit: usize,
    after: Option<&Page>,
) -> Result<Vec<SessionRow>, Error> {
    let sql = format!(
        "SELECT {COLUMNS} FROM sessions WHERE ns = ?1 AND (?2 = '' OR agent = ?2)
            AND (active_ms, id) < (?3, ?4)
         ORDER BY active_ms DESC, id DESC LIMIT ?5"
    );
    let mut statement = connection.prepare_cached(&sql)?;
    let (active_ms, id) = match after {
        Some(page) => (page.active_ms, page.id.as_str()),
        None => (i64::MAX, "\u{10FFFF}"),
    };
    let rows = statement.query_map(
        params![ns.as_str(), agent, active_ms, id, limit as i64],
        SessionRow::read,
    )?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The session that `text` means: an id, a name, or the beginning of an id.
pub(crate) fn find(
    connection: &Connection,
    ns: &Namespace,
    text: &str,
) -> Result<SessionRow, Error> {
    let by_id = format!("SELECT {COLUMNS} FROM sessions WHERE ns = ?1 AND id = ?2");
    let exact = connection
        .prepare_cached(&by_id)?
        .query_row([ns.as_str(), text], SessionRow::read)
        .optional()?;
    if let Some(session) = exact {
        return Ok(session);
    }
    let by_name = format!("SELECT {COLUMNS} FROM sessions WHERE ns = ?1 AND name = ?2 LIMIT ?3");
    let mut named = several(
        connection,
        &by_name,
        params![ns.as_str(), text, SEVERAL_MAX],
    )?;
    let by_prefix =
        format!("SELECT {COLUMNS} FROM sessions WHERE ns = ?1 AND id >= ?2 AND id < ?3 LIMIT ?4");
    if named.is_empty() {
        let range = params![ns.as_str(), text, after_prefix(text), SEVERAL_MAX];
        named = several(connection, &by_prefix, range)?;
    }
    if named.len() > 1 {
        return Err(ambiguous(text, &named));
    }
    match named.pop() {
        Some(session) => Ok(session),
        None => Err(Error::NotFound {
            what: format!("session {text:?}"),
            hint: hint(connection, ns, text)?,
        }),
    }
}

/// One more than is shown, so that "and more" is known.
const SEVERAL_MAX: i64 = AMBIGUOUS_SHOWN as i64 + 1;

fn several(
    connection: &Connection,
    sql: &str,
    params: impl rusqlite::Params,
) -> Result<Vec<SessionRow>, Error> {
    let mut statement = connection.prepare_cached(sql)?;
    let rows = statement.query_map(params, SessionRow::read)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

fn ambiguous(text: &str, found: &[SessionRow]) -> Error {
    let mut some: Vec<String> = found
        .iter()
        .take(AMBIGUOUS_SHOWN)
        .map(|session| session.id.clone())
        .collect();
    if found.len() > AMBIGUOUS_SHOWN {
        some.push("and more".to_owned());
    }
    Error::Ambiguous {
        what: format!("session {text:?}"),
        some,
    }
}

/// The session whose id or name is most like `text`, among the last active ones.
fn hint(connection: &Connection, ns: &Namespace, text: &str) -> Result<String, Error> {
    let candidates = list(connection, ns, "", HINT_CANDIDATES_MAX, None)?;
    let texts = candidates
        .iter()
        .flat_map(|session| [session.name.as_str(), session.id.as_str()]);
    let text = text.to_lowercase();
    let alike = |name: &&str| strsim::normalized_damerau_levenshtein(&name.to_lowercase(), &text);
    let best = texts.max_by(|a, b| alike(a).total_cmp(&alike(b)));
    Ok(match best {
        Some(name) if alike(&name) >= HINT_LIKENESS => format!("; did you mean {name:?}?"),
        _ => String::new(),
    })
}

/// A branch.
#[derive(Debug, Clone)]
pub(crate) struct BranchRow {
    pub name: String,
    /// The end node it begins at; `None` for the first one.
    pub forked_from: Option<NodeHash>,
    /// The last turn of its own.
    pub last_turn: Option<i64>,
    /// The turn it begins after.
    pub fork_turn: Option<i64>,
    pub sealed: bool,
    /// The last end on its line, or what it begins at.
    pub head: Option<NodeHash>,
}

impl BranchRow {
    /// The last turn of its line, its own or the one before the fork.
    pub fn tip(&self) -> Option<i64> {
        self.last_turn.or(self.fork_turn)
    }
}

/// Every branch of a session, in the order in which they were made.
pub(crate) fn branches(
    connection: &Connection,
    ns: &Namespace,
    session: &str,
) -> Result<Vec<BranchRow>, Error> {
    // While a turn runs the head is its parent: the end before it.
    let mut statement = connection.prepare_cached(
        "SELECT b.name, b.forked_from, b.last_turn, b.sealed IS NOT NULL, coalesce(e.hash, i.parents),
            (SELECT f.id FROM turns f WHERE f.ns = b.ns AND f.submission = b.fork_submission AND f.session = b.session)
         FROM branches b
            LEFT JOIN turns t ON t.id = b.last_turn
            LEFT JOIN nodes e ON e.id = t.end_node
            LEFT JOIN nodes i ON i.id = t.invoke
         WHERE b.ns = ?1 AND b.session = ?2 ORDER BY b.made_seq, b.name LIMIT ?3",
    )?;
    let mut rows = statement.query(params![ns.as_str(), session, BRANCHES_MAX as i64])?;
    let mut branches = Vec::new();
    while let Some(row) = rows.next()? {
        let hash = |at: usize| -> Result<Option<NodeHash>, Error> {
            let bytes: Option<Vec<u8>> = row.get(at)?;
            let first = bytes.as_deref().and_then(|bytes| bytes.get(..32));
            first.map(node_hash).transpose()
        };
        let forked_from = hash(1)?;
        branches.push(BranchRow {
            name: row.get(0)?,
            forked_from,
            last_turn: row.get(2)?,
            fork_turn: row.get(5)?,
            sealed: row.get(3)?,
            head: hash(4)?.or(forked_from),
        });
    }
    Ok(branches)
}
