//! The digest of a projection: SHA-256 over every projected row in a canonical order.
//!
//! Left out is what is local: row ids (rows name each other by hash, submission or sequence instead),
//! cursors, and the words of reasons. A projection rebuilt from the same log has the same digest,
//! however the two streams interleaved while it was built.

use crate::error::Error;
use rusqlite::Connection;
use rusqlite::types::ValueRef;
use vlinder_core::hash::FrameHasher;

/// Every table, each row spelled without local ids, in an order that the log decides:
/// within one stream, ids grow with the sequence.
const DUMPS: [(&str, &str); 9] = [
    (
        "log nodes",
        "SELECT n.ns, n.seq, n.hash, n.kind, n.time_ms, t.submission, n.session, n.parents,
            n.body_hash, n.body_len, n.body, n.emitter, n.attempt, n.took_us, n.reached
         FROM nodes n LEFT JOIN turns t ON t.id = n.turn WHERE n.stream = 0 ORDER BY n.id",
    ),
    (
        "ctl nodes",
        "SELECT n.ns, n.seq, n.hash, n.kind, n.time_ms, t.submission, n.session, n.parents,
            n.body_hash, n.body_len, n.body, n.emitter, n.attempt, n.took_us, n.reached
         FROM nodes n LEFT JOIN turns t ON t.id = n.turn WHERE n.stream = 1 ORDER BY n.id",
    ),
    (
        "set_aside",
        "SELECT ns, stream, seq, duplicate, hash FROM set_aside ORDER BY ns, stream, seq",
    ),
    (
        "sessions",
        "SELECT ns, id, agent, name, started_ms, default_branch, turns, open, active_ms
         FROM sessions ORDER BY ns, id",
    ),
    (
        "branches",
        "SELECT b.ns, b.session, b.name, b.made_seq, b.fork_of, b.forked_from, b.fork_submission,
            t.submission, b.sealed
         FROM branches b LEFT JOIN turns t ON t.id = b.last_turn ORDER BY b.ns, b.session, b.name",
    ),
    (
        "turns",
        "SELECT t.ns, t.submission, t.agent, t.session, t.branch, t.number, p.submission, t.timeout_ms,
            t.state, t.source, i.hash, e.hash
         FROM turns t LEFT JOIN turns p ON p.id = t.previous LEFT JOIN nodes i ON i.id = t.invoke
            LEFT JOIN nodes e ON e.id = t.end_node
         ORDER BY t.ns, t.submission",
    ),
    (
        "requests",
        "SELECT n.ns, n.hash, t.submission, r.key, r.service, r.backend, r.operation, r.selector, r.label
         FROM requests r JOIN nodes n ON n.id = r.node LEFT JOIN turns t ON t.id = r.turn ORDER BY r.node",
    ),
    (
        "results",
        "SELECT n.ns, n.hash, t.submission, r.key, q.hash, r.won, r.ok, r.http, r.content_type, r.state,
            r.tokens_in, r.tokens_out, r.replayed, r.repaired
         FROM results r JOIN nodes n ON n.id = r.node LEFT JOIN turns t ON t.id = r.turn
            LEFT JOIN nodes q ON q.id = r.request
         ORDER BY r.node",
    ),
    (
        "ends",
        "SELECT n.ns, n.hash, t.submission, x.outcome, x.code, x.state
         FROM ends x JOIN nodes n ON n.id = x.node LEFT JOIN turns t ON t.id = x.turn ORDER BY x.node",
    ),
];

/// The digest, in hexadecimal digits. Reads every row.
pub(crate) fn digest(connection: &Connection) -> Result<String, Error> {
    let mut hasher = FrameHasher::new("vlinder.projection.v1");
    for (table, dump) in DUMPS {
        hasher.frame(table.as_bytes());
        let mut statement = connection.prepare(dump)?;
        let columns = statement.column_count();
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            for at in 0..columns {
                match row.get_ref(at)? {
                    ValueRef::Null => hasher.frame(b"-"),
                    ValueRef::Integer(value) => hasher.frame(b"i").number(value as u64),
                    ValueRef::Real(_) => return Err(Error::Damaged),
                    ValueRef::Text(bytes) => hasher.frame(b"t").frame(bytes),
                    ValueRef::Blob(bytes) => hasher.frame(b"b").frame(bytes),
                };
            }
        }
    }
    let hash = vlinder_core::ContentHash::from_bytes(hasher.finish());
    Ok(hash.to_string())
}
