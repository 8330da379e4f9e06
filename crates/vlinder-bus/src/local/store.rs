//! `bus.db`: its tables, what is written in one transaction, what is read back.
//!
//! A message is two rows under one key, (stream, sequence) in one integer: a narrow one (`entry`) that
//! the index is rebuilt from, and a wide one (`message`) that is only read when its body is wanted.
//! Headers are JSON, so that the log can be read with the `sqlite3` command.

use super::writer::Op;
use crate::backend::{Headers, RawStored};
use crate::error::Error;
use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, Transaction, params};
use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

/// Version of the tables, in `user_version`. A file of a later version is refused.
const SCHEMA_VERSION: i64 = 1;
/// Bits of a message's key that hold the sequence: 17 trillion messages a stream, 524,287 streams.
const SEQ_BITS: u32 = 44;
/// How long SQLite waits for somebody else's lock, e.g. a person with the `sqlite3` command.
const BUSY_WAIT: Duration = Duration::from_secs(5);
/// Page cache of each connection in KiB; what is hot is in the message cache anyway.
const PAGE_CACHE_KIB: i64 = 2048;
/// Pages of the write-ahead log after which it is folded into the file: 16 MiB.
const CHECKPOINT_PAGES: i64 = 4096;
/// The write-ahead log is cut to this after a large batch, in bytes.
const WAL_KEPT_BYTES: i64 = 32 * 1024 * 1024;

const SCHEMA: &str = "
CREATE TABLE stream(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, created_ms INTEGER NOT NULL);
CREATE TABLE subject(stream INTEGER NOT NULL, number INTEGER NOT NULL, text TEXT NOT NULL,
    PRIMARY KEY(stream, number)) WITHOUT ROWID;
CREATE TABLE entry(pos INTEGER PRIMARY KEY, subject INTEGER NOT NULL, time_ms INTEGER NOT NULL, size INTEGER NOT NULL);
CREATE TABLE message(pos INTEGER PRIMARY KEY, id TEXT NOT NULL, headers TEXT NOT NULL, body BLOB NOT NULL);
CREATE TABLE queue(id INTEGER PRIMARY KEY, stream INTEGER NOT NULL, name TEXT NOT NULL, filter TEXT NOT NULL,
    floor INTEGER NOT NULL);
CREATE TABLE acked(queue INTEGER NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY(queue, seq)) WITHOUT ROWID;
CREATE TABLE tried(queue INTEGER NOT NULL, seq INTEGER NOT NULL, delivered INTEGER NOT NULL,
    PRIMARY KEY(queue, seq)) WITHOUT ROWID;
CREATE TABLE bucket(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, ttl_ms INTEGER, revision INTEGER NOT NULL);
CREATE TABLE kv(bucket INTEGER NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, revision INTEGER NOT NULL,
    time_ms INTEGER NOT NULL, PRIMARY KEY(bucket, key)) WITHOUT ROWID;
CREATE TABLE blob(id INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, len INTEGER NOT NULL);
CREATE TABLE blob_part(blob INTEGER NOT NULL, number INTEGER NOT NULL, bytes BLOB NOT NULL, PRIMARY KEY(blob, number));
";

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        Self::Storage {
            reason: error.to_string(),
        }
    }
}

fn damaged(reason: String) -> Error {
    Error::Storage {
        reason: format!("bus.db is damaged: {reason}"),
    }
}

/// The key of a message.
fn pos(stream: i64, seq: u64) -> i64 {
    (stream << SEQ_BITS) | seq as i64
}

fn configure(conn: &Connection) -> rusqlite::Result<()> {
    conn.busy_timeout(BUSY_WAIT)?;
    conn.set_prepared_statement_cache_capacity(64);
    conn.pragma_update(None, "cache_size", -PAGE_CACHE_KIB)?;
    conn.pragma_update(None, "temp_store", "memory")
}

/// Opens the connection that writes; makes the tables in a new file.
pub(super) fn open_writer(path: &Path, sync_every_commit: bool) -> Result<Connection, Error> {
    let mut conn = Connection::open(path)?;
    configure(&conn)?;
    let mode: String = conn.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0))?;
    if mode != "wal" {
        return Err(Error::Storage {
            reason: format!("{} cannot use a write-ahead log", path.display()),
        });
    }
    let synchronous = if sync_every_commit { "FULL" } else { "NORMAL" };
    conn.pragma_update(None, "synchronous", synchronous)?;
    conn.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES)?;
    conn.pragma_update(None, "journal_size_limit", WAL_KEPT_BYTES)?;
    let version: i64 = conn.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    match version {
        SCHEMA_VERSION => {}
        0 => {
            let tx = conn.transaction()?;
            tx.execute_batch(SCHEMA)?;
            tx.pragma_update(None, "user_version", SCHEMA_VERSION)?;
            tx.commit()?;
        }
        newer => {
            return Err(Error::Storage {
                reason: format!(
                    "{} has format {newer}, this release reads up to {SCHEMA_VERSION}: use the release that wrote it",
                    path.display()
                ),
            });
        }
    }
    // Parts whose blob was never finished: their writer died.
    conn.execute(
        "DELETE FROM blob_part WHERE blob NOT IN (SELECT id FROM blob)",
        [],
    )?;
    Ok(conn)
}

/// Opens a connection that reads.
pub(super) fn open_reader(path: &Path) -> Result<Connection, Error> {
    let conn = Connection::open(path)?;
    configure(&conn)?;
    conn.pragma_update(None, "query_only", true)?;
    Ok(conn)
}

/// Acknowledgements of one queue in one batch.
struct QueueChange {
    floor: u64,
    acked: Vec<u64>,
}

/// Writes a batch, within a transaction.
pub(super) fn apply(tx: &Transaction<'_>, batch: &[Op]) -> rusqlite::Result<()> {
    let mut changes: HashMap<i64, QueueChange> = HashMap::new();
    for op in batch {
        match op {
            Op::Append { .. } => apply_append(tx, op)?,
            Op::Acked { queue, seq, floor } => {
                let change = changes.entry(*queue).or_insert(QueueChange {
                    floor: 0,
                    acked: vec![],
                });
                change.floor = *floor;
                change.acked.push(*seq);
            }
            Op::DropQueue { id } => {
                changes.remove(id);
                for table in ["acked", "tried"] {
                    tx.execute(&format!("DELETE FROM {table} WHERE queue = ?1"), [id])?;
                }
                tx.execute("DELETE FROM queue WHERE id = ?1", [id])?;
            }
            other => apply_small(tx, other)?,
        }
    }
    changes
        .iter()
        .try_for_each(|(queue, change)| apply_acks(tx, *queue, change))
}

fn apply_append(tx: &Transaction<'_>, op: &Op) -> rusqlite::Result<()> {
    let Op::Append {
        stream,
        subject,
        message,
        id,
        size,
    } = op
    else {
        return Ok(());
    };
    let pos = pos(*stream, message.seq);
    let headers =
        serde_json::to_string(&message.headers).expect("a list of pairs of strings is always JSON");
    tx.prepare_cached("INSERT INTO entry(pos, subject, time_ms, size) VALUES(?1, ?2, ?3, ?4)")?
        .execute(params![pos, subject, message.time_ms as i64, *size as i64])?;
    tx.prepare_cached("INSERT INTO message(pos, id, headers, body) VALUES(?1, ?2, ?3, ?4)")?
        .execute(params![pos, id, headers, &message.body[..]])?;
    Ok(())
}

/// Only what lies above the floor is kept one by one.
fn apply_acks(tx: &Transaction<'_>, queue: i64, change: &QueueChange) -> rusqlite::Result<()> {
    let floor = change.floor as i64;
    tx.prepare_cached("UPDATE queue SET floor = ?2 WHERE id = ?1")?
        .execute([queue, floor])?;
    for seq in change.acked.iter().filter(|seq| **seq > change.floor) {
        tx.prepare_cached("INSERT OR IGNORE INTO acked(queue, seq) VALUES(?1, ?2)")?
            .execute([queue, *seq as i64])?;
    }
    tx.prepare_cached("DELETE FROM acked WHERE queue = ?1 AND seq <= ?2")?
        .execute([queue, floor])?;
    tx.prepare_cached("DELETE FROM tried WHERE queue = ?1 AND seq <= ?2")?
        .execute([queue, floor])?;
    Ok(())
}

fn apply_small(tx: &Transaction<'_>, op: &Op) -> rusqlite::Result<()> {
    match op {
        Op::Stream {
            id,
            name,
            created_ms,
        } => tx.execute(
            "INSERT INTO stream(id, name, created_ms) VALUES(?1, ?2, ?3)",
            params![id, name, *created_ms as i64],
        ),
        Op::Subject {
            stream,
            number,
            text,
        } => tx
            .prepare_cached("INSERT INTO subject(stream, number, text) VALUES(?1, ?2, ?3)")?
            .execute(params![stream, number, &text[..]]),
        Op::Queue {
            id,
            stream,
            name,
            filter,
            floor,
        } => tx.execute(
            "INSERT INTO queue(id, stream, name, filter, floor) VALUES(?1, ?2, ?3, ?4, ?5)",
            params![id, stream, name, filter, *floor as i64],
        ),
        Op::Tried {
            queue,
            seq,
            delivered,
        } => tx
            .prepare_cached("INSERT OR REPLACE INTO tried(queue, seq, delivered) VALUES(?1, ?2, ?3)")?
            .execute([*queue, *seq as i64, *delivered as i64]),
        Op::Bucket { id, name, ttl_ms } => tx.execute(
            "INSERT INTO bucket(id, name, ttl_ms, revision) VALUES(?1, ?2, ?3, 0)
             ON CONFLICT(id) DO UPDATE SET ttl_ms = excluded.ttl_ms",
            params![id, name, ttl_ms.map(|ms| ms as i64)],
        ),
        Op::KvPut {
            bucket,
            key,
            value,
            revision,
            time_ms,
        } => {
            tx.prepare_cached(
                "INSERT OR REPLACE INTO kv(bucket, key, value, revision, time_ms) VALUES(?1, ?2, ?3, ?4, ?5)",
            )?
            .execute(params![bucket, &key[..], &value[..], *revision as i64, *time_ms as i64])?;
            set_revision(tx, *bucket, *revision)
        }
        Op::KvGone {
            bucket,
            key,
            revision,
        } => {
            tx.prepare_cached("DELETE FROM kv WHERE bucket = ?1 AND key = ?2")?
                .execute(params![bucket, &key[..]])?;
            set_revision(tx, *bucket, *revision)
        }
        Op::BlobPart {
            blob,
            number,
            bytes,
        } => tx
            .prepare_cached("INSERT INTO blob_part(blob, number, bytes) VALUES(?1, ?2, ?3)")?
            .execute(params![blob, number, &bytes[..]]),
        Op::BlobDone { blob, hash, len } => {
            let added = tx.execute(
                "INSERT OR IGNORE INTO blob(id, hash, len) VALUES(?1, ?2, ?3)",
                params![blob, hash, *len as i64],
            )?;
            if added == 0 {
                // Somebody stored the same bytes meanwhile.
                tx.execute("DELETE FROM blob_part WHERE blob = ?1", [blob])?;
            }
            Ok(added)
        }
        Op::BlobDropped { blob } => {
            tx.execute("DELETE FROM blob_part WHERE blob = ?1", [blob])
        }
        Op::Append { .. } | Op::Acked { .. } | Op::DropQueue { .. } | Op::Then(_) => Ok(0),
    }
    .map(drop)
}

fn set_revision(tx: &Transaction<'_>, bucket: i64, revision: u64) -> rusqlite::Result<usize> {
    tx.prepare_cached("UPDATE bucket SET revision = ?2 WHERE id = ?1")?
        .execute([bucket, revision as i64])
}

/// A stream as it is on disk.
pub(super) struct StreamRow {
    pub(super) id: i64,
    pub(super) name: String,
    pub(super) created_ms: u64,
}

/// Every stream.
pub(super) fn streams(conn: &Connection) -> Result<Vec<StreamRow>, Error> {
    let mut statement = conn.prepare("SELECT id, name, created_ms FROM stream ORDER BY id")?;
    let rows = statement.query_map([], |row| {
        Ok(StreamRow {
            id: row.get(0)?,
            name: row.get(1)?,
            created_ms: row.get::<_, i64>(2)? as u64,
        })
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The subjects of a stream by number.
pub(super) fn subjects(conn: &Connection, stream: i64) -> Result<Vec<String>, Error> {
    let mut statement =
        conn.prepare("SELECT number, text FROM subject WHERE stream = ?1 ORDER BY number")?;
    let mut rows = statement.query([stream])?;
    let mut texts = Vec::new();
    while let Some(row) = rows.next()? {
        let number: i64 = row.get(0)?;
        if number != texts.len() as i64 {
            return Err(damaged(format!(
                "subject {} of stream {stream} is missing",
                texts.len()
            )));
        }
        texts.push(row.get(1)?);
    }
    Ok(texts)
}

/// Calls `with(subject, time_ms, size)` for every message of a stream, in order.
pub(super) fn entries(
    conn: &Connection,
    stream: i64,
    subject_count: usize,
    mut with: impl FnMut(u32, u64, u64),
) -> Result<(), Error> {
    let mut statement = conn.prepare(
        "SELECT pos, subject, time_ms, size FROM entry WHERE pos BETWEEN ?1 AND ?2 ORDER BY pos",
    )?;
    let mut rows = statement.query([pos(stream, 0), pos(stream + 1, 0) - 1])?;
    let mut expected = pos(stream, 1);
    while let Some(row) = rows.next()? {
        let subject: u32 = row.get(1)?;
        if row.get::<_, i64>(0)? != expected || subject as usize >= subject_count {
            let seq = expected - pos(stream, 0);
            return Err(damaged(format!(
                "message {seq} of stream {stream} is missing or has no subject"
            )));
        }
        expected += 1;
        with(
            subject,
            row.get::<_, i64>(2)? as u64,
            row.get::<_, i64>(3)? as u64,
        );
    }
    Ok(())
}

/// Message ids from sequence `from` on, with sequence and time.
pub(super) fn message_ids(
    conn: &Connection,
    stream: i64,
    from: u64,
    mut with: impl FnMut(&str, u64, u64),
) -> Result<(), Error> {
    let mut statement = conn.prepare(
        "SELECT pos, id, time_ms FROM message JOIN entry USING(pos) WHERE pos BETWEEN ?1 AND ?2 ORDER BY pos",
    )?;
    let mut rows = statement.query([pos(stream, from), pos(stream + 1, 0) - 1])?;
    while let Some(row) = rows.next()? {
        let seq = (row.get::<_, i64>(0)? - pos(stream, 0)) as u64;
        let id = row.get_ref(1)?.as_str().map_err(rusqlite::Error::from)?;
        with(id, seq, row.get::<_, i64>(2)? as u64);
    }
    Ok(())
}

/// A queue as it is on disk.
pub(super) struct QueueRow {
    pub(super) id: i64,
    pub(super) stream: i64,
    pub(super) name: String,
    pub(super) filter: String,
    pub(super) floor: u64,
    pub(super) acked: Vec<u64>,
    /// Sequence and count of deliveries.
    pub(super) tried: Vec<(u64, u64)>,
}

/// Every queue.
pub(super) fn queues(conn: &Connection) -> Result<Vec<QueueRow>, Error> {
    let mut statement = conn.prepare("SELECT id, stream, name, filter, floor FROM queue")?;
    let rows = statement.query_map([], |row| {
        Ok(QueueRow {
            id: row.get(0)?,
            stream: row.get(1)?,
            name: row.get(2)?,
            filter: row.get(3)?,
            floor: row.get::<_, i64>(4)? as u64,
            acked: vec![],
            tried: vec![],
        })
    })?;
    let mut queues = rows.collect::<Result<Vec<_>, _>>()?;
    let mut acked = conn.prepare("SELECT seq FROM acked WHERE queue = ?1 ORDER BY seq")?;
    let mut tried = conn.prepare("SELECT seq, delivered FROM tried WHERE queue = ?1")?;
    for queue in &mut queues {
        queue.acked = acked
            .query_map([queue.id], |row| Ok(row.get::<_, i64>(0)? as u64))?
            .collect::<Result<_, _>>()?;
        queue.tried = tried
            .query_map([queue.id], |row| {
                Ok((row.get::<_, i64>(0)? as u64, row.get::<_, i64>(1)? as u64))
            })?
            .collect::<Result<_, _>>()?;
    }
    Ok(queues)
}

/// Forgets what a queue knows of messages behind `last`.
pub(super) fn clamp_queue(conn: &Connection, queue: i64, last: u64) -> Result<(), Error> {
    let last = last as i64;
    conn.execute(
        "UPDATE queue SET floor = min(floor, ?2) WHERE id = ?1",
        [queue, last],
    )?;
    for table in ["acked", "tried"] {
        conn.execute(
            &format!("DELETE FROM {table} WHERE queue = ?1 AND seq > ?2"),
            [queue, last],
        )?;
    }
    Ok(())
}

/// A bucket as it is on disk.
pub(super) struct BucketRow {
    pub(super) id: i64,
    pub(super) name: String,
    pub(super) ttl_ms: Option<u64>,
    pub(super) revision: u64,
    /// Key, value, revision, time.
    pub(super) entries: Vec<(String, Bytes, u64, u64)>,
}

/// Every bucket with its entries.
pub(super) fn buckets(conn: &Connection) -> Result<Vec<BucketRow>, Error> {
    let mut statement =
        conn.prepare("SELECT id, name, ttl_ms, revision FROM bucket ORDER BY id")?;
    let rows = statement.query_map([], |row| {
        Ok(BucketRow {
            id: row.get(0)?,
            name: row.get(1)?,
            ttl_ms: row.get::<_, Option<i64>>(2)?.map(|ms| ms as u64),
            revision: row.get::<_, i64>(3)? as u64,
            entries: vec![],
        })
    })?;
    let mut buckets = rows.collect::<Result<Vec<_>, _>>()?;
    let mut entries =
        conn.prepare("SELECT key, value, revision, time_ms FROM kv WHERE bucket = ?1")?;
    for bucket in &mut buckets {
        bucket.entries = entries
            .query_map([bucket.id], |row| {
                Ok((
                    row.get(0)?,
                    Bytes::from(row.get::<_, Vec<u8>>(1)?),
                    row.get::<_, i64>(2)? as u64,
                    row.get::<_, i64>(3)? as u64,
                ))
            })?
            .collect::<Result<_, _>>()?;
    }
    Ok(buckets)
}

/// Completes a message whose subject and place are known.
pub(super) fn read_message(
    conn: &Connection,
    stream: i64,
    seq: u64,
    subject: String,
    previous: u64,
) -> Result<RawStored, Error> {
    let mut statement = conn.prepare_cached(
        "SELECT time_ms, headers, body FROM message JOIN entry USING(pos) WHERE pos = ?1",
    )?;
    let found = statement.query_row([pos(stream, seq)], |row| {
        Ok((
            row.get::<_, i64>(0)? as u64,
            row.get::<_, String>(1)?,
            row.get::<_, Vec<u8>>(2)?,
        ))
    });
    let (time_ms, headers, body) = found
        .optional()?
        .ok_or_else(|| damaged(format!("message {seq} on {subject} is missing")))?;
    let headers: Headers = serde_json::from_str(&headers)
        .map_err(|error| damaged(format!("headers of message {seq} on {subject}: {error}")))?;
    Ok(RawStored {
        subject,
        headers,
        body: body.into(),
        seq,
        time_ms,
        previous_on_subject: previous,
    })
}

/// The number and length of a blob.
pub(super) fn find_blob(conn: &Connection, hash: &str) -> Result<Option<(i64, u64)>, Error> {
    let mut statement = conn.prepare_cached("SELECT id, len FROM blob WHERE hash = ?1")?;
    let found = statement.query_row([hash], |row| {
        Ok((row.get(0)?, row.get::<_, i64>(1)? as u64))
    });
    Ok(found.optional()?)
}

/// The bytes of a blob, as they are on disk.
pub(super) fn read_blob(conn: &Connection, blob: i64, len: u64) -> Result<Vec<u8>, Error> {
    let mut statement =
        conn.prepare_cached("SELECT bytes FROM blob_part WHERE blob = ?1 ORDER BY number")?;
    let mut rows = statement.query([blob])?;
    let mut bytes = Vec::with_capacity(len as usize);
    while let Some(row) = rows.next()? {
        bytes.extend_from_slice(row.get_ref(0)?.as_blob().map_err(rusqlite::Error::from)?);
    }
    Ok(bytes)
}

/// The highest number of a blob and the bytes of all blobs.
pub(super) fn blob_totals(conn: &Connection) -> Result<(i64, u64), Error> {
    let totals = conn.query_row(
        "SELECT coalesce(max(id), 0), coalesce(sum(len), 0) FROM blob",
        [],
        |row| Ok((row.get(0)?, row.get::<_, i64>(1)? as u64)),
    )?;
    Ok(totals)
}
