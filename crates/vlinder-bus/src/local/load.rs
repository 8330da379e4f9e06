//! Builds the state from what is on disk.

use super::dedup::DEDUP_IDS_MAX;
use super::filter::Filter;
use super::index::Index;
use super::kv::Bucket;
use super::queue::{Queue, Tried};
use super::state::{State, Stream, now_ms};
use super::store;
use crate::error::Error;
use crate::streams::{DEDUP_WINDOW, StreamName};
use rusqlite::Connection;
use std::collections::HashSet;
use std::time::Duration;
use vlinder_core::Namespace;

/// Fills an empty state. Reads no bodies: 100,000 messages take some tens of milliseconds.
pub(super) fn load(state: &mut State, conn: &Connection, log_max_bytes: u64) -> Result<(), Error> {
    for row in store::streams(conn)? {
        let foreign = || Error::Storage {
            reason: format!(
                "bus.db holds a stream {} that this release does not know",
                row.name
            ),
        };
        let name = parse_stream(&row.name).ok_or_else(foreign)?;
        if row.id != state.streams.len() as i64 + 1 {
            return Err(foreign());
        }
        let max_bytes = name.max_bytes(log_max_bytes);
        let stream = Stream::new(row.id, name, row.created_ms, max_bytes, Index::default())?;
        state.add_stream(load_stream(stream, conn)?);
    }
    for mut row in store::queues(conn)? {
        clamp_queue(state, conn, &mut row)?;
        load_queue(state, row)?;
    }
    for row in store::buckets(conn)? {
        let index = state.buckets.len();
        if row.id != index as i64 + 1 {
            return Err(Error::Storage {
                reason: format!("bus.db is damaged: bucket {index} is missing"),
            });
        }
        state.bucket_by_name.insert(row.name.clone(), index);
        let ttl = row.ttl_ms.map(Duration::from_millis);
        let timers = &mut state.timers;
        let bucket = Bucket::load(index, row.name, ttl, row.revision, row.entries, timers);
        state.buckets.push(bucket);
    }
    Ok(())
}

fn load_stream(mut stream: Stream, conn: &Connection) -> Result<Stream, Error> {
    let texts = store::subjects(conn, stream.id)?;
    let subject_count = texts.len();
    stream.index = Index::with_subjects(texts);
    let horizon = now_ms().saturating_sub(DEDUP_WINDOW.as_millis() as u64);
    let mut first_remembered = None;
    store::entries(conn, stream.id, subject_count, |subject, time_ms, size| {
        let seq = stream.index.push(subject, time_ms);
        stream.bytes += size;
        stream.last_ms = time_ms;
        if time_ms >= horizon && first_remembered.is_none() {
            first_remembered = Some(seq);
        }
    })?;
    stream.committed = stream.index.last_seq();
    if let Some(first) = first_remembered {
        let first = first.max(stream.committed.saturating_sub(DEDUP_IDS_MAX as u64));
        store::message_ids(conn, stream.id, first, |id, seq, time_ms| {
            stream.dedup.insert(id, seq, time_ms);
        })?;
    }
    Ok(stream)
}

/// Where the log lost its tail (somebody restored or cut `bus.db`), what a queue knows of messages that are
/// no longer there must not be held against those that will have their numbers.
fn clamp_queue(state: &State, conn: &Connection, row: &mut store::QueueRow) -> Result<(), Error> {
    let stream = usize::try_from(row.stream - 1).ok();
    let Some(stream) = stream.and_then(|index| state.streams.get(index)) else {
        // Reported by `load_queue`.
        return Ok(());
    };
    let last = stream.index.last_seq();
    let beyond = row.floor > last
        || row.acked.iter().any(|seq| *seq > last)
        || row.tried.iter().any(|(seq, _)| *seq > last);
    if !beyond {
        return Ok(());
    }
    tracing::warn!(queue = %row.name, last, "the queue stands past the end of its stream, which lost its tail: taking it back");
    row.floor = row.floor.min(last);
    row.acked.retain(|seq| *seq <= last);
    row.tried.retain(|(seq, _)| *seq <= last);
    store::clamp_queue(conn, row.id, last)
}

fn load_queue(state: &mut State, row: store::QueueRow) -> Result<(), Error> {
    let stream = usize::try_from(row.stream - 1)
        .ok()
        .filter(|index| *index < state.streams.len());
    let stream = stream.ok_or_else(|| Error::Storage {
        reason: format!("bus.db is damaged: queue {} has no stream", row.name),
    })?;
    let filter = Filter::parse(&row.filter)?;
    let mut waiting = state.matching_after(stream, &filter, row.floor);
    if !row.acked.is_empty() {
        let acked: HashSet<u64> = row.acked.into_iter().collect();
        waiting.retain(|seq| !acked.contains(seq));
    }
    let tried: Vec<Tried> = row
        .tried
        .into_iter()
        .map(|(seq, delivered)| Tried { seq, delivered })
        .collect();
    let mut queue = Queue::new(row.id, stream, row.name, filter, row.floor);
    let last = state.streams[stream].index.last_seq();
    queue.fill(waiting, &tried, last);
    state.add_queue(queue);
    Ok(())
}

/// Reads what [`StreamName::as_text`] wrote.
fn parse_stream(text: &str) -> Option<StreamName> {
    if text == StreamName::Sys.as_text() {
        return Some(StreamName::Sys);
    }
    let namespace = |ns| Namespace::new(ns).ok();
    match text.strip_prefix("VLINDER_LOG_") {
        Some(ns) => namespace(ns).map(StreamName::Log),
        None => text
            .strip_prefix("VLINDER_CTL_")
            .and_then(namespace)
            .map(StreamName::Ctl),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stream_names_are_read_back() {
        let ns = Namespace::new("team-a").unwrap();
        for name in [
            StreamName::Log(ns.clone()),
            StreamName::Ctl(ns),
            StreamName::Sys,
        ] {
            assert_eq!(parse_stream(&name.as_text()), Some(name));
        }
        for bad in [
            "",
            "VLINDER_LOG_",
            "VLINDER_SYS_x",
            "other",
            "VLINDER_LOG_a.b",
        ] {
            assert_eq!(parse_stream(bad), None, "{bad}");
        }
    }
}
