//! Kv buckets: streams laid out as NATS lays out its key-value buckets, so that `nats kv` reads them.
//!
//! The last message on `$KV.<bucket>.<key>` is the entry. Deleting leaves a marker that vanishes
//! after [`MARKER_TTL`]; so does expiry, which is how watchers hear of it. Only the leader's word
//! decides a compare-and-set, and only the leader is read.

use super::follow::{Ordered, Resume, Told};
use super::link::{Link, refused};
use super::message;
use super::stream;
use crate::backend::{BucketSpec, KvEntry, KvEvent, RawStored};
use crate::error::Error;
use crate::streams::DEDUP_WINDOW;
use async_nats::{HeaderMap, HeaderValue, header};
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use serde_json::json;
use std::collections::BTreeSet;
use std::time::Duration;

/// How long the fact that an entry is gone stays readable. Watchers that are away for longer hear
/// of it all the same: after an interruption they compare what is there with what they knew.
const MARKER_TTL: Duration = Duration::from_secs(60);
/// A bucket's limit: it holds what nodes and workers say of themselves, a few hundred bytes each.
const BUCKET_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Tries to create an entry over a marker that somebody else may move meanwhile.
const CREATE_TRIES: usize = 3;
/// Longest key in bytes.
const KEY_MAX: usize = 256;

const OPERATION: &str = "KV-Operation";

pub(super) async fn ensure(link: &Link, spec: &BucketSpec, replicas: usize) -> Result<(), Error> {
    let subjects = vec![format!("$KV.{}.>", spec.name)];
    let mut config = stream::common(&stream_of(spec.name), subjects, BUCKET_BYTES_MAX, replicas);
    let window = spec.ttl.map_or(DEDUP_WINDOW, |ttl| ttl.min(DEDUP_WINDOW));
    let more = json!({
        "max_msgs_per_subject": 1,
        "max_age": spec.ttl.unwrap_or_default().as_nanos() as u64,
        "duplicate_window": window.as_nanos() as u64,
        "allow_rollup_hdrs": true,
        "deny_delete": true,
        "allow_msg_ttl": true,
        "subject_delete_marker_ttl": MARKER_TTL.as_nanos() as u64,
    });
    for (key, value) in more.as_object().expect("it is an object") {
        config[key] = value.clone();
    }
    stream::ensure(link, config).await
}

fn stream_of(bucket: &str) -> String {
    format!("KV_{bucket}")
}

fn subject_of(bucket: &str, key: &str) -> Result<String, Error> {
    let clean = |byte: u8| byte.is_ascii_alphanumeric() || b"_=.-".contains(&byte);
    let tokens = key.split('.').all(|token| !token.is_empty());
    if !tokens || key.len() > KEY_MAX || !key.bytes().all(clean) {
        return Err(refused("use a kv entry", format!("{key:?} is no key")));
    }
    Ok(format!("$KV.{bucket}.{key}"))
}

/// The last message of an entry: its value, or a marker.
enum Last {
    Value(KvEntry),
    Marker { revision: u64 },
}

async fn last(
    link: &Link,
    bucket: &str,
    key: &str,
    replicas: usize,
) -> Result<Option<Last>, Error> {
    let name = stream_of(bucket);
    let request = json!({ "last_by_subj": subject_of(bucket, key)? });
    let (stored, gone) = if replicas > 1 {
        let Some(found) = stream::leader_message(link, &name, request).await? else {
            return Ok(None);
        };
        let (stored, headers) = found.read()?;
        let names = headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()));
        let gone = names.into_iter().any(is_marker_header);
        (stored, gone)
    } else {
        let Some(found) = stream::direct_message(link, &name, request).await? else {
            return Ok(None);
        };
        let gone = is_marker(found.headers.as_ref());
        (message::from_headers(found, false)?, gone)
    };
    Ok(Some(if gone {
        Last::Marker {
            revision: stored.seq,
        }
    } else {
        Last::Value(entry(key, stored))
    }))
}

fn entry(key: &str, stored: RawStored) -> KvEntry {
    KvEntry {
        key: key.to_owned(),
        value: stored.body,
        revision: stored.seq,
        time_ms: stored.time_ms,
    }
}

fn is_marker_header((name, value): (&str, &str)) -> bool {
    let removed = name == OPERATION && (value == "DEL" || value == "PURGE");
    removed || name == "Nats-Marker-Reason"
}

fn is_marker(headers: Option<&HeaderMap>) -> bool {
    headers
        .into_iter()
        .flat_map(HeaderMap::iter)
        .any(|(name, values)| {
            let last = values.last().map_or("", |value| value.as_str());
            is_marker_header((name.as_ref(), last))
        })
}

pub(super) async fn get(
    link: &Link,
    bucket: &str,
    key: &str,
    replicas: usize,
) -> Result<Option<KvEntry>, Error> {
    Ok(match last(link, bucket, key, replicas).await? {
        Some(Last::Value(entry)) => Some(entry),
        Some(Last::Marker { .. }) | None => None,
    })
}

pub(super) async fn put(
    link: &Link,
    bucket: &str,
    key: &str,
    value: Bytes,
    expect: Option<u64>,
    replicas: usize,
) -> Result<u64, Error> {
    let mut expected = expect;
    for _ in 0..CREATE_TRIES {
        let headers = HeaderMap::new();
        match write(link, bucket, key, headers, value.clone(), expected).await? {
            Some(revision) => return Ok(revision),
            None if expect != Some(0) => break,
            // A marker counts as "must not exist" to us, but not to the server.
            None => match last(link, bucket, key, replicas).await? {
                Some(Last::Value(_)) => break,
                Some(Last::Marker { revision }) => expected = Some(revision),
                None => expected = Some(0),
            },
        }
    }
    Err(conflict(key))
}

pub(super) async fn delete(
    link: &Link,
    bucket: &str,
    key: &str,
    expect: Option<u64>,
    replicas: usize,
) -> Result<(), Error> {
    if matches!(expect, None | Some(0)) {
        match last(link, bucket, key, replicas).await? {
            Some(Last::Value(_)) if expect == Some(0) => return Err(conflict(key)),
            Some(Last::Value(_)) => {}
            Some(Last::Marker { .. }) | None => return Ok(()),
        }
    }
    let mut headers = HeaderMap::new();
    headers.insert(OPERATION, "PURGE");
    headers.insert(header::NATS_ROLLUP, "sub");
    headers.insert(
        header::NATS_MESSAGE_TTL,
        HeaderValue::from(MARKER_TTL.as_secs()),
    );
    match write(link, bucket, key, headers, Bytes::new(), expect).await? {
        Some(_) => Ok(()),
        None => Err(conflict(key)),
    }
}

/// Writes; `None` if the expectation does not hold.
async fn write(
    link: &Link,
    bucket: &str,
    key: &str,
    mut headers: HeaderMap,
    value: Bytes,
    expect: Option<u64>,
) -> Result<Option<u64>, Error> {
    let subject = subject_of(bucket, key)?;
    headers.insert(header::NATS_EXPECTED_STREAM, stream_of(bucket));
    if let Some(revision) = expect {
        headers.insert(
            header::NATS_EXPECTED_LAST_SUBJECT_SEQUENCE,
            HeaderValue::from(revision),
        );
    }
    match stream::publish(link, &subject, headers, value).await? {
        Ok(done) => Ok(Some(done.seq)),
        Err(error) if error.is_conflict() => Ok(None),
        Err(error) => Err(error.into_error(link, "write a kv entry", bucket)),
    }
}

fn conflict(key: &str) -> Error {
    Error::KvConflict {
        key: key.to_owned(),
    }
}

/// A watch that survives interruptions. What vanished during one is told as gone before `Current`.
struct Watch {
    ordered: Ordered,
    prefix: String,
    /// Keys that exist as far as was told.
    known: BTreeSet<String>,
    /// While everything is told again: the keys that were not met yet.
    unconfirmed: Option<BTreeSet<String>>,
    queued: Vec<KvEvent>,
}

pub(super) async fn watch(
    link: &Link,
    bucket: &str,
) -> Result<BoxStream<'static, Result<KvEvent, Error>>, Error> {
    let name = stream_of(bucket);
    let prefix = format!("$KV.{bucket}.");
    let filter = format!("{prefix}>");
    let watch = Watch {
        ordered: Ordered::open(link, &name, &filter, 1, Resume::FromStart).await?,
        prefix,
        known: BTreeSet::new(),
        unconfirmed: None,
        queued: Vec::new(),
    };
    let events = futures::stream::unfold(Some(watch), |watch| async move {
        let mut watch = watch?;
        match watch.next().await {
            Ok(event) => Some((Ok(event), Some(watch))),
            Err(Error::Closed) => None,
            Err(error) => Some((Err(error), None)),
        }
    });
    Ok(events.boxed())
}

impl Watch {
    async fn next(&mut self) -> Result<KvEvent, Error> {
        loop {
            if let Some(event) = self.queued.pop() {
                return Ok(event);
            }
            match self.ordered.next().await? {
                Told::Began { pending } => {
                    self.unconfirmed = Some(self.known.clone());
                    if pending == 0 {
                        self.all_told();
                    }
                }
                Told::Message {
                    stored,
                    original,
                    pending,
                } => {
                    let event = self.event(stored, is_marker(original.as_ref()));
                    if pending == 0 && self.unconfirmed.is_some() {
                        self.all_told();
                    }
                    return Ok(event);
                }
            }
        }
    }

    fn event(&mut self, stored: RawStored, gone: bool) -> KvEvent {
        let key = stored.subject.strip_prefix(&self.prefix);
        let key = key.unwrap_or(&stored.subject).to_owned();
        if let Some(unconfirmed) = &mut self.unconfirmed {
            unconfirmed.remove(&key);
        }
        if gone {
            self.known.remove(&key);
            return KvEvent::Gone { key };
        }
        self.known.insert(key.clone());
        KvEvent::Put(entry(&key, stored))
    }

    /// Told last first: the queue is popped from its end.
    fn all_told(&mut self) {
        self.queued.push(KvEvent::Current);
        for key in self.unconfirmed.take().unwrap_or_default() {
            self.known.remove(&key);
            self.queued.push(KvEvent::Gone { key });
        }
    }
}
