//! The tail of each stream: its last messages as they came.
//!
//! A log can lose what it confirmed last: JetStream syncs every two minutes by default, so a power cut
//! can take so much, and somebody can put back an older copy. What is kept here is given back then
//! ([`crate::heal`]). It is written in the transaction that applies the messages, so it always reaches to the
//! cursor, and it goes with the file.
//!
//! Bodies that are in the blob store are not kept: a node that is given back names its body by hash, and the
//! healer counts those whose body was lost too.

use crate::apply::{Item, Source, node_hash};
use crate::error::Error;
use crate::number::{int, number};
use rusqlite::{Connection, OptionalExtension, Transaction, params};
use std::time::Duration;
use vlinder_bus::backend::{Headers, RawStored};
use vlinder_bus::{Body, Stored, wire};
use vlinder_core::{Namespace, NodeHash};

/// How far back the tail reaches: five times what JetStream may lose by default, so that a state
/// worker that lagged a little still has all of it.
const AGE_MAX: Duration = Duration::from_secs(600);
/// Its size in bytes for each stream; at 2 KiB a message, some 32,000.
const BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Its messages for each stream: what ten minutes at 160 a second make.
const MESSAGES_MAX: u64 = 100_000;

/// Keeps the messages of a batch, in order, and lets go of what is beyond the bounds.
pub(crate) fn keep<'a>(
    tx: &Transaction<'_>,
    ns: &Namespace,
    source: Source,
    now_ms: u64,
    batch: impl Iterator<Item = &'a Item>,
) -> Result<(), Error> {
    let horizon = now_ms.saturating_sub(AGE_MAX.as_millis() as u64);
    let mut total = tx
        .prepare_cached(
            "SELECT total FROM tail WHERE ns = ?1 AND stream = ?2 ORDER BY seq DESC LIMIT 1",
        )?
        .query_row(params![ns.as_str(), source.code()], |row| number(row, 0))
        .optional()?
        .unwrap_or(0);
    let mut last_seq = 0;
    for item in batch {
        let Item::Node(_, stored) = item else {
            continue;
        };
        if stored.time_ms < horizon {
            // A rebuild goes through all there ever was.
            continue;
        }
        let (in_blob, body) = match &stored.body {
            Body::Inline(bytes) => (false, &bytes[..]),
            Body::Blob { .. } => (true, &[][..]),
        };
        let headers = wire::encode(&stored.node, &stored.hash, &stored.notes, in_blob);
        let headers = serde_json::to_string(&headers).expect("pairs of strings are always JSON");
        total += (headers.len() + body.len() + stored.subject.len()) as u64;
        last_seq = stored.seq;
        tx.prepare_cached(
            "INSERT OR REPLACE INTO tail (ns, stream, seq, time_ms, total, hash, subject, headers, body)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
        )?
        .execute(params![
            ns.as_str(),
            source.code(),
            int(stored.seq),
            int(stored.time_ms),
            int(total),
            &stored.hash.as_bytes()[..],
            stored.subject,
            headers,
            body
        ])?;
    }
    if last_seq == 0 {
        return Ok(());
    }
    // The scan ends at the first that stays, so it costs what it deletes.
    tx.prepare_cached(
        "DELETE FROM tail WHERE ns = ?1 AND stream = ?2 AND seq < (SELECT seq FROM tail
             WHERE ns = ?1 AND stream = ?2 AND time_ms >= ?3 AND total > ?4 AND seq > ?5 ORDER BY seq LIMIT 1)",
    )?
    .execute(params![
        ns.as_str(),
        source.code(),
        int(horizon),
        // SQLite has no unsigned numbers; below the bound everything fits.
        int(total.saturating_sub(BYTES_MAX)),
        int(last_seq.saturating_sub(MESSAGES_MAX)),
    ])?;
    Ok(())
}

/// Sequence and hash of everything that is kept of a stream, in order.
pub(crate) fn index(
    connection: &Connection,
    ns: &Namespace,
    source: Source,
) -> Result<Vec<(u64, NodeHash)>, Error> {
    let mut statement = connection
        .prepare_cached("SELECT seq, hash FROM tail WHERE ns = ?1 AND stream = ?2 ORDER BY seq")?;
    let rows = statement.query_map(params![ns.as_str(), source.code()], |row| {
        Ok((number(row, 0)?, row.get::<_, Vec<u8>>(1)?))
    })?;
    rows.map(|row| {
        let (seq, hash) = row?;
        Ok((seq, node_hash(&hash)?))
    })
    .collect()
}

/// Up to `max` messages that are kept behind `after`, in order.
pub(crate) fn read(
    connection: &Connection,
    ns: &Namespace,
    source: Source,
    after: u64,
    max: usize,
) -> Result<Vec<Stored>, Error> {
    let mut statement = connection.prepare_cached(
        "SELECT seq, time_ms, subject, headers, body FROM tail
         WHERE ns = ?1 AND stream = ?2 AND seq > ?3 ORDER BY seq LIMIT ?4",
    )?;
    let rows = statement.query_map(
        params![ns.as_str(), source.code(), int(after), max as i64],
        |row| {
            Ok(Kept {
                seq: number(row, 0)?,
                time_ms: number(row, 1)?,
                subject: row.get(2)?,
                headers: row.get(3)?,
                body: row.get(4)?,
            })
        },
    )?;
    rows.map(|row| row?.decode()).collect()
}

struct Kept {
    seq: u64,
    time_ms: u64,
    subject: String,
    headers: String,
    body: Vec<u8>,
}

impl Kept {
    /// Checks its hash, too: what is damaged here is not given back.
    fn decode(self) -> Result<Stored, Error> {
        let headers: Headers = serde_json::from_str(&self.headers).map_err(|_| Error::Damaged)?;
        let raw = RawStored {
            subject: self.subject,
            headers,
            body: self.body.into(),
            seq: self.seq,
            time_ms: self.time_ms,
            previous_on_subject: 0,
        };
        wire::decode(&raw).map_err(|_| Error::Damaged)
    }
}
