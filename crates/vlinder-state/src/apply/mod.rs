//! From messages of the log to rows: the rules of who wins, once.
//!
//! * The subject decides what a message belongs to, as it does for every other reader of the log.
//! * A node that its namespace had before changes nothing; it is counted.
//! * The first invoke of a submission is the turn, the first result to a call key is the answer,
//!   the first end is the end (design.md rule 4), first by [`Stored::rank`]. Later results and ends are
//!   kept as such.
//! * What the end reaches through parents is marked the moment it is applied: nothing that comes
//!   later can be reached by it, but for what was lost and given back, after which it is marked anew.
//! * What belongs to a turn that was lost and is not given back yet is applied again when it is.
//! * A message that cannot be read, or that belongs to nothing, is set aside with the reason.
//!
//! Infra events are not projected here: the registry has its own view of them, and bodies of
//! secrets have no place in this file.

mod session;

use crate::error::Error;
use crate::number::{int, number};
use crate::schema::{BODY_BYTES_KEPT, CTL, LOG};
use crate::tail;
use rusqlite::{CachedStatement, Connection, OptionalExtension, Transaction, params};
use vlinder_bus::wire::{
    NOTE_ATTEMPT, NOTE_BY, NOTE_HEALED, NOTE_REPAIRED, NOTE_REPLAYED, NOTE_TOOK_US,
};
use vlinder_bus::{Body, Stored, Subject};
use vlinder_core::record::{CallResult, CallStatus, End, Invoke, Place, Request};
use vlinder_core::{Kind, Namespace, NodeHash, SubmissionId};

/// Longest reason that is kept beside a message that was set aside, in characters.
const REASON_CHARS_MAX: usize = 200;
/// Messages that are applied again when turns were given back: what a second of a busy log can hold.
const ORPHANS_MAX: i64 = 10_000;

/// Which of the two streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Log,
    Ctl,
}

impl Source {
    pub fn code(self) -> i64 {
        match self {
            Self::Log => LOG,
            Self::Ctl => CTL,
        }
    }

    pub fn of_code(code: i64) -> Result<Self, Error> {
        match code {
            LOG => Ok(Self::Log),
            CTL => Ok(Self::Ctl),
            _ => Err(Error::Damaged),
        }
    }

    pub fn stream(self, ns: &Namespace) -> vlinder_bus::StreamName {
        match self {
            Self::Log => vlinder_bus::StreamName::Log(ns.clone()),
            Self::Ctl => vlinder_bus::StreamName::Ctl(ns.clone()),
        }
    }
}

/// A message of the log.
pub(crate) enum Item {
    /// It carries a node.
    Node(Source, Box<Stored>),
    /// It carries none that can be read.
    Unreadable {
        source: Source,
        seq: u64,
        reason: String,
    },
}

impl Item {
    pub fn source(&self) -> Source {
        match self {
            Self::Node(source, _) | Self::Unreadable { source, .. } => *source,
        }
    }

    pub fn seq(&self) -> u64 {
        match self {
            Self::Node(_, stored) => stored.seq,
            Self::Unreadable { seq, .. } => *seq,
        }
    }

    fn is_healed(&self) -> bool {
        matches!(self, Self::Node(_, stored) if stored.is_healed())
    }

    fn hash(&self) -> Option<NodeHash> {
        match self {
            Self::Node(_, stored) => Some(stored.hash),
            Self::Unreadable { .. } => None,
        }
    }

    /// Roughly what it takes in memory, in bytes.
    pub fn weight(&self) -> usize {
        match self {
            Self::Node(_, stored) => match &stored.body {
                Body::Inline(bytes) => bytes.len() + 1024,
                Body::Blob { .. } => 1024,
            },
            Self::Unreadable { .. } => 1024,
        }
    }
}

/// Where a stream is applied up to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cursor {
    pub created_ms: u64,
    pub seq: u64,
    pub hash: Option<NodeHash>,
}

/// Reads the cursor of a stream.
pub(crate) fn read_cursor(
    connection: &Connection,
    ns: &Namespace,
    source: Source,
) -> Result<Option<Cursor>, Error> {
    let found = connection
        .prepare_cached("SELECT created_ms, seq, hash FROM cursors WHERE ns = ?1 AND stream = ?2")?
        .query_row(params![ns.as_str(), source.code()], |row| {
            Ok((
                number(row, 0)?,
                number(row, 1)?,
                row.get::<_, Option<Vec<u8>>>(2)?,
            ))
        })
        .optional()?;
    let Some((created_ms, seq, hash)) = found else {
        return Ok(None);
    };
    let hash = hash.map(|bytes| node_hash(&bytes)).transpose()?;
    Ok(Some(Cursor {
        created_ms,
        seq,
        hash,
    }))
}

/// A hash as it is stored.
pub(crate) fn node_hash(bytes: &[u8]) -> Result<NodeHash, Error> {
    let bytes: [u8; 32] = bytes.try_into().map_err(|_| Error::Damaged)?;
    Ok(NodeHash::from_bytes(bytes))
}

/// Applies a batch and moves the cursors, in one transaction. `created_ms` are those of `LOG` and `CTL`,
/// `now_ms` is bus time. Returns the sequences in `LOG` of messages whose turn may have been given back with
/// this batch: they are to be applied again.
pub(crate) fn apply_batch(
    connection: &mut Connection,
    ns: &Namespace,
    created_ms: [u64; 2],
    now_ms: u64,
    batch: &[Item],
) -> Result<Vec<u64>, Error> {
    let transaction = connection.transaction()?;
    let mut last: [Option<&Item>; 2] = [None, None];
    for item in batch {
        Apply {
            tx: &transaction,
            ns,
            source: item.source(),
            late: item.is_healed(),
        }
        .item(item)?;
        last[item.source().code() as usize] = Some(item);
    }
    for item in last.into_iter().flatten() {
        let source = item.source();
        let hash = item.hash();
        transaction
            .prepare_cached("INSERT OR REPLACE INTO cursors (ns, stream, created_ms, seq, hash) VALUES (?1, ?2, ?3, ?4, ?5)")?
            .execute(params![
                ns.as_str(),
                source.code(),
                int(created_ms[source.code() as usize]),
                int(item.seq()),
                hash.as_ref().map(|hash| &hash.as_bytes()[..]),
            ])?;
        let of_source = batch.iter().filter(|item| item.source() == source);
        tail::keep(&transaction, ns, source, now_ms, of_source)?;
    }
    let orphans = match batch.iter().any(Item::is_healed) {
        true => orphans(&transaction, ns)?,
        false => Vec::new(),
    };
    transaction.commit()?;
    Ok(orphans)
}

/// Messages of `LOG` that belong to turns which it does not have.
fn orphans(connection: &Connection, ns: &Namespace) -> Result<Vec<u64>, Error> {
    let mut statement = connection.prepare_cached(
        "SELECT seq FROM set_aside WHERE ns = ?1 AND stream = ?2 AND orphan ORDER BY seq DESC LIMIT ?3",
    )?;
    let rows = statement.query_map(params![ns.as_str(), LOG, ORPHANS_MAX], |row| number(row, 0))?;
    let mut seqs: Vec<u64> = rows.collect::<Result<_, _>>()?;
    seqs.reverse();
    Ok(seqs)
}

/// Applies messages again that were set aside before, in one transaction. The cursors stay.
pub(crate) fn apply_again(
    connection: &mut Connection,
    ns: &Namespace,
    items: &[Item],
) -> Result<(), Error> {
    let transaction = connection.transaction()?;
    for item in items {
        let source = item.source();
        transaction
            .prepare_cached("DELETE FROM set_aside WHERE ns = ?1 AND stream = ?2 AND seq = ?3")?
            .execute(params![ns.as_str(), source.code(), int(item.seq())])?;
        let apply = Apply {
            tx: &transaction,
            ns,
            source,
            late: true,
        };
        apply.item(item)?;
    }
    transaction.commit()?;
    Ok(())
}

struct Apply<'a> {
    tx: &'a Transaction<'a>,
    ns: &'a Namespace,
    source: Source,
    /// What came before may not stand: this was given back, or waited for what was.
    late: bool,
}

/// Why a message is set aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Aside {
    /// The stream had its node before.
    Duplicate,
    /// It cannot be read as what it should be, or belongs to nothing.
    Unreadable,
    /// It belongs to a turn that the log does not have.
    Orphan,
}

/// What a message turned out to be.
enum Found {
    /// Part of the record.
    Kept,
    /// Not for this projection.
    Passed,
    /// Belongs to nothing, for this reason.
    Aside(String),
    /// Belongs to a turn that the log does not have.
    Orphan(&'static str),
}

impl Apply<'_> {
    fn item(&self, item: &Item) -> Result<(), Error> {
        let stored = match item {
            Item::Unreadable { seq, reason, .. } => {
                return self.set_aside(*seq, None, Aside::Unreadable, reason);
            }
            Item::Node(_, stored) => stored,
        };
        if stored.node.kind == Kind::Infra {
            return Ok(());
        }
        if let Some(first) = self.node_by_hash(&stored.hash)? {
            if first.seq == stored.seq {
                return Ok(());
            }
            let reason = format!("the node at {} again", first.seq);
            return self.set_aside(stored.seq, Some(&stored.hash), Aside::Duplicate, &reason);
        }
        match self.node(stored)? {
            Found::Kept | Found::Passed => Ok(()),
            Found::Aside(reason) => {
                self.set_aside(stored.seq, Some(&stored.hash), Aside::Unreadable, &reason)
            }
            Found::Orphan(reason) => {
                self.set_aside(stored.seq, Some(&stored.hash), Aside::Orphan, reason)
            }
        }
    }

    fn node(&self, stored: &Stored) -> Result<Found, Error> {
        let Some(subject) = Subject::parse(&stored.subject) else {
            return Ok(aside("its subject is not one of ours"));
        };
        match (stored.node.kind, subject) {
            (Kind::Invoke, Subject::Invoke { .. }) => self.invoke(stored),
            (
                Kind::Seal,
                Subject::Invoke {
                    session, branch, ..
                },
            ) => self.seal(stored, session.as_str(), branch.as_str()),
            (Kind::Request, Subject::Req { .. }) => self.request(stored, None),
            // Of a replayed call, which the record answers.
            (Kind::Request, Subject::Call { submission, .. }) => {
                self.request(stored, Some(&submission))
            }
            (Kind::Result, Subject::Call { submission, .. }) => self.result(stored, &submission),
            (Kind::End, Subject::End { submission, .. }) => self.end(stored, &submission),
            (Kind::Session, Subject::Session { .. }) => self.session_event(stored),
            (Kind::Infra, _) => Ok(Found::Passed),
            (kind, _) => Ok(aside(&format!(
                "no node of kind {kind} belongs on its subject"
            ))),
        }
    }

    fn invoke(&self, stored: &Stored) -> Result<Found, Error> {
        let invoke = match Invoke::try_from(&stored.node) {
            Ok(invoke) => invoke,
            Err(error) => return Ok(aside(&error.to_string())),
        };
        let named = Subject::Invoke {
            ns: invoke.namespace.clone(),
            agent: invoke.agent.clone(),
            session: invoke.session.clone(),
            branch: invoke.branch.clone(),
        };
        if named.to_string() != stored.subject {
            return Ok(aside("an invoke whose fields name another subject"));
        }
        if self.turn(&invoke.submission)?.is_some() {
            return Ok(aside(
                "another invoke of a submission that the log had before",
            ));
        }
        let previous = match &invoke.previous {
            Some(previous) => self.turn_in_session(previous, invoke.session.as_str())?,
            None => None,
        };
        self.cached(
            "INSERT INTO turns (ns, submission, agent, session, branch, number, previous, timeout_ms, state, source, invoke)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, 0)",
        )?
        .execute(params![
            self.ns.as_str(),
            invoke.submission.as_str(),
            invoke.agent.as_str(),
            invoke.session.as_str(),
            invoke.branch.as_str(),
            int(invoke.turn),
            previous,
            int(invoke.timeout_ms),
            invoke.state.as_ref().map(|state| &state.as_bytes()[..]),
            invoke.source.as_ref().map(|source| source.submission.as_str()),
        ])?;
        let turn = self.tx.last_insert_rowid();
        let node = self.insert_node(stored, Some(turn), None)?;
        self.cached("UPDATE turns SET invoke = ?2 WHERE id = ?1")?
            .execute([turn, node])?;
        self.cached(
            "INSERT INTO sessions (ns, id, agent, turns, open, active_ms) VALUES (?1, ?2, ?3, 1, 1, ?4)
             ON CONFLICT (ns, id) DO UPDATE SET turns = turns + 1, open = open + 1,
                active_ms = max(active_ms, excluded.active_ms)",
        )?
        .execute(params![
            self.ns.as_str(),
            invoke.session.as_str(),
            invoke.agent.as_str(),
            int(stored.time_ms)
        ])?;
        self.cached(
            "INSERT INTO branches (ns, session, name, last_turn) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (ns, session, name) DO UPDATE SET last_turn = coalesce(excluded.last_turn, last_turn)",
        )?
        .execute(params![
            self.ns.as_str(),
            invoke.session.as_str(),
            invoke.branch.as_str(),
            // A displaced one stands beside the branch.
            (!stored.is_displaced()).then_some(turn)
        ])?;
        Ok(Found::Kept)
    }

    fn request(&self, stored: &Stored, of: Option<&SubmissionId>) -> Result<Found, Error> {
        let request = match Request::try_from(&stored.node) {
            Ok(request) => request,
            Err(error) => return Ok(aside(&error.to_string())),
        };
        if of.is_some_and(|of| *of != request.submission) {
            return Ok(aside("a request on the subject of another turn"));
        }
        let Some(turn) = self.turn(&request.submission)? else {
            return Ok(Found::Orphan(
                "a request of a turn that the log does not have",
            ));
        };
        let node = self.insert_node(stored, Some(turn.id), None)?;
        self.cached(
            "INSERT INTO requests (node, turn, key, service, backend, operation, selector, label)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        )?
        .execute(params![
            node,
            turn.id,
            &request.key.as_bytes()[..],
            request.service,
            request.backend,
            request.operation,
            request.selector.as_str(),
            request.label.unwrap_or_default(),
        ])?;
        if self.late {
            // Its answer may have come before it was given back.
            self.cached(
                "UPDATE results SET request = ?1 WHERE turn = ?2 AND request IS NULL
                 AND node IN (SELECT id FROM nodes WHERE turn = ?2 AND parents = ?3)",
            )?
            .execute(params![node, turn.id, &stored.hash.as_bytes()[..]])?;
            self.mark_again(turn.id)?;
        }
        Ok(Found::Kept)
    }

    fn result(&self, stored: &Stored, submission: &SubmissionId) -> Result<Found, Error> {
        let result = match CallResult::try_from(&stored.node) {
            Ok(result) => result,
            Err(error) => return Ok(aside(&error.to_string())),
        };
        let Some(turn) = self.turn(submission)? else {
            return Ok(Found::Orphan(
                "a result of a turn that the log does not have",
            ));
        };
        let replayed = stored.notes.get(NOTE_REPLAYED);
        let replayed: Option<NodeHash> = replayed.and_then(|text| text.parse().ok());
        let key = &result.key.as_bytes()[..];
        let answered = self
            .cached("SELECT node FROM results WHERE turn = ?1 AND key = ?2 AND won")?
            .query_row(params![turn.id, key], |row| row.get::<_, i64>(0))
            .optional()?;
        let won = match answered {
            None => true,
            Some(first) => self.is_before(stored, first)?,
        };
        if let (Some(first), true) = (answered, won) {
            self.cached("UPDATE results SET won = 0 WHERE node = ?1")?
                .execute([first])?;
        }
        let request = match stored.node.parents.first() {
            Some(parent) => self
                .node_by_hash(parent)?
                .filter(|parent| parent.turn == Some(turn.id))
                .map(|parent| parent.id),
            None => None,
        };
        let node = self.insert_node(stored, Some(turn.id), None)?;
        self.cached(
            "INSERT INTO results (node, turn, key, request, won, ok, http, content_type, state, tokens_in, tokens_out,
                replayed, repaired)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
        )?
        .execute(params![
            node,
            turn.id,
            key,
            request,
            won,
            result.status == CallStatus::Ok,
            result.http,
            result.content_type,
            result.state.as_ref().map(|state| &state.as_bytes()[..]),
            result.tokens_in.map(int),
            result.tokens_out.map(int),
            replayed.as_ref().map(|hash| &hash.as_bytes()[..]),
            stored.notes.contains_key(NOTE_REPAIRED),
        ])?;
        if self.late {
            self.mark_again(turn.id)?;
        }
        Ok(Found::Kept)
    }

    fn end(&self, stored: &Stored, submission: &SubmissionId) -> Result<Found, Error> {
        let end = match End::try_from(&stored.node) {
            Ok(end) => end,
            Err(error) => return Ok(aside(&error.to_string())),
        };
        let Some(turn) = self.turn(submission)? else {
            return Ok(Found::Orphan("an end of a turn that the log does not have"));
        };
        let node = self.insert_node(stored, Some(turn.id), None)?;
        self.cached(
            "INSERT INTO ends (node, turn, outcome, code, state) VALUES (?1, ?2, ?3, ?4, ?5)",
        )?
        .execute(params![
            node,
            turn.id,
            end.outcome.as_str(),
            end.code.unwrap_or_default(),
            end.state.as_ref().map(|state| &state.as_bytes()[..]),
        ])?;
        if let Some(first) = turn.end {
            if self.is_before(stored, first)? {
                self.cached("UPDATE turns SET end_node = ?2 WHERE id = ?1")?
                    .execute([turn.id, node])?;
                self.mark_again(turn.id)?;
            }
            return Ok(Found::Kept);
        }
        self.cached("UPDATE turns SET end_node = ?2 WHERE id = ?1")?
            .execute([turn.id, node])?;
        self.cached(
            "UPDATE sessions SET open = open - 1, active_ms = max(active_ms, ?3) WHERE ns = ?1 AND id = ?2",
        )?
        .execute(params![self.ns.as_str(), turn.session, int(stored.time_ms)])?;
        self.mark_reached(turn.id, stored.hash)?;
        Ok(Found::Kept)
    }

    /// Marks the nodes of the turn that its end reaches through parents, the end included.
    fn mark_reached(&self, turn: i64, end: NodeHash) -> Result<(), Error> {
        let mut to_visit = vec![end];
        let mut mark = self.cached("UPDATE nodes SET reached = 1 WHERE id = ?1")?;
        let mut parents_of = self.cached("SELECT parents FROM nodes WHERE id = ?1")?;
        while let Some(hash) = to_visit.pop() {
            let Some(node) = self.node_by_hash(&hash)? else {
                continue;
            };
            if node.turn != Some(turn) || node.reached {
                continue;
            }
            mark.execute([node.id])?;
            let parents: Vec<u8> = parents_of.query_row([node.id], |row| row.get(0))?;
            for parent in parents.chunks(32) {
                to_visit.push(node_hash(parent)?);
            }
        }
        Ok(())
    }

    /// Marks anew what the winning end of a turn reaches, if it has ended.
    fn mark_again(&self, turn: i64) -> Result<(), Error> {
        let end: Option<Vec<u8>> = self
            .cached("SELECT n.hash FROM turns t JOIN nodes n ON n.id = t.end_node WHERE t.id = ?1")?
            .query_row([turn], |row| row.get(0))
            .optional()?;
        let Some(end) = end else { return Ok(()) };
        self.cached("UPDATE nodes SET reached = 0 WHERE turn = ?1")?
            .execute([turn])?;
        self.mark_reached(turn, node_hash(&end)?)
    }

    /// Whether a message comes before one that was applied earlier; only what is late can.
    fn is_before(&self, stored: &Stored, applied: i64) -> Result<bool, Error> {
        if !self.late {
            return Ok(false);
        }
        let rank = self
            .cached("SELECT seq, place FROM nodes WHERE id = ?1")?
            .query_row([applied], |row| {
                Ok((number(row, 0)?, row.get::<_, Option<String>>(1)?))
            })?;
        let place = rank.1.and_then(|place| place.parse().ok());
        let place = place.unwrap_or_else(|| Place::at(rank.0));
        Ok(stored.rank() < (place, rank.0))
    }

    fn insert_node(
        &self,
        stored: &Stored,
        turn: Option<i64>,
        session: Option<&str>,
    ) -> Result<i64, Error> {
        let node = &stored.node;
        let parents: Vec<u8> = node
            .parents
            .iter()
            .flat_map(|parent| *parent.as_bytes())
            .collect();
        let body = match &stored.body {
            Body::Inline(bytes) if bytes.len() <= BODY_BYTES_KEPT => Some(&bytes[..]),
            Body::Inline(_) | Body::Blob { .. } => None,
        };
        let note = |name: &str| stored.notes.get(name).map(String::as_str);
        let number_note = |name: &str| note(name).and_then(|text| text.parse().ok()).map(int);
        self.cached(
            "INSERT INTO nodes (ns, stream, seq, hash, kind, time_ms, turn, session, parents,
                body_hash, body_len, body, emitter, attempt, took_us, place)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)",
        )?
        .execute(params![
            self.ns.as_str(),
            self.source.code(),
            int(stored.seq),
            &stored.hash.as_bytes()[..],
            node.kind.as_str(),
            int(stored.time_ms),
            turn,
            session,
            parents,
            &node.body_hash.as_bytes()[..],
            int(node.body_len),
            body,
            note(NOTE_BY).unwrap_or_default(),
            number_note(NOTE_ATTEMPT).unwrap_or(0),
            number_note(NOTE_TOOK_US),
            note(NOTE_HEALED),
        ])?;
        Ok(self.tx.last_insert_rowid())
    }

    fn set_aside(
        &self,
        seq: u64,
        hash: Option<&NodeHash>,
        why: Aside,
        reason: &str,
    ) -> Result<(), Error> {
        if why != Aside::Duplicate {
            tracing::warn!(stream = ?self.source, seq, reason, "set aside");
        }
        let reason: String = reason.chars().take(REASON_CHARS_MAX).collect();
        self.cached(
            "INSERT OR IGNORE INTO set_aside (ns, stream, seq, duplicate, hash, reason, orphan) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute(params![
            self.ns.as_str(),
            self.source.code(),
            int(seq),
            why == Aside::Duplicate,
            hash.map(|hash| &hash.as_bytes()[..]),
            reason,
            why == Aside::Orphan
        ])?;
        Ok(())
    }

    fn turn(&self, submission: &SubmissionId) -> Result<Option<KnownTurn>, Error> {
        let found = self
            .cached("SELECT id, session, end_node FROM turns WHERE ns = ?1 AND submission = ?2")?
            .query_row([self.ns.as_str(), submission.as_str()], |row| {
                Ok(KnownTurn {
                    id: row.get(0)?,
                    session: row.get(1)?,
                    end: row.get(2)?,
                })
            })
            .optional()?;
        Ok(found)
    }

    fn turn_in_session(
        &self,
        submission: &SubmissionId,
        session: &str,
    ) -> Result<Option<i64>, Error> {
        let turn = self.turn(submission)?;
        Ok(turn
            .filter(|turn| turn.session == session)
            .map(|turn| turn.id))
    }

    fn node_by_hash(&self, hash: &NodeHash) -> Result<Option<KnownNode>, Error> {
        let found = self
            .cached("SELECT id, seq, turn, reached FROM nodes WHERE ns = ?1 AND hash = ?2")?
            .query_row(params![self.ns.as_str(), &hash.as_bytes()[..]], |row| {
                Ok(KnownNode {
                    id: row.get(0)?,
                    seq: number(row, 1)?,
                    turn: row.get(2)?,
                    reached: row.get(3)?,
                })
            })
            .optional()?;
        Ok(found)
    }

    fn cached(&self, sql: &str) -> Result<CachedStatement<'_>, Error> {
        Ok(self.tx.prepare_cached(sql)?)
    }
}

struct KnownTurn {
    id: i64,
    session: String,
    /// `nodes.id` of its winning end.
    end: Option<i64>,
}

struct KnownNode {
    id: i64,
    seq: u64,
    turn: Option<i64>,
    reached: bool,
}

fn aside(reason: &str) -> Found {
    Found::Aside(reason.to_owned())
}
