//! Streams: made and kept up to date, appended to, read.
//!
//! Reads that must see every confirmed append ask the leader. With one replica the direct get is
//! the leader; with more, followers serve it too, so a batch that came to its end is confirmed by
//! asking the leader for the next message.

use super::api::{self, ApiError};
use super::link::{Failure, Link, refused};
use super::message::{self, MsgGet};
use crate::backend::{Raw, RawAppended, RawStored, StreamInfo};
use crate::error::Error;
use crate::streams::{DEDUP_WINDOW, StreamName};
use crate::subjects;
use async_nats::{HeaderName, StatusCode, header};
use bytes::Bytes;
use futures::StreamExt;
use serde::Deserialize;
use serde_json::{Value, json};
use std::time::Duration;

/// One try to append. Above any pause of a healthy server; below the time a caller would rather
/// spend on the next try (with the same message id) after an answer was lost.
const APPEND_TRY: Duration = Duration::from_secs(2);
/// Between two messages of a batch.
const BATCH_IDLE: Duration = Duration::from_secs(2);
/// Messages and bytes asked for at once: a batch must not overrun the connection's buffers.
const BATCH: usize = 256;
const BATCH_BYTES: usize = 8 * 1024 * 1024;
/// Status that ends a batch, and the header that then says how much more there is.
const END_OF_BATCH: u16 = 204;
const NUM_PENDING: HeaderName = HeaderName::from_static("Nats-Num-Pending");
/// From 2.15 on a stream without a number takes 1,000 consumers; agents and models can be more.
const MAX_CONSUMERS: i64 = 100_000;

/// What the server answers about a stream.
#[derive(Deserialize)]
pub(super) struct StreamAnswer {
    pub config: Value,
    created: String,
    pub state: StreamState,
}

#[derive(Deserialize)]
pub(super) struct StreamState {
    #[serde(default)]
    messages: u64,
    #[serde(default)]
    bytes: u64,
    #[serde(default)]
    first_seq: u64,
    #[serde(default)]
    pub last_seq: u64,
}

/// The answer to an append.
#[derive(Deserialize)]
struct PubAck {
    seq: u64,
    #[serde(default)]
    duplicate: bool,
}

/// The configuration of one of our streams.
pub(super) fn config(stream: &StreamName, max_bytes: u64, replicas: usize) -> Value {
    let all = match stream {
        StreamName::Log(ns) | StreamName::Ctl(ns) => subjects::all_of(ns),
        StreamName::Sys => "vlinder.v1._sys.>".to_owned(),
    };
    let mut config = common(&stream.as_text(), stream.subjects(), max_bytes, replicas);
    config["republish"] = json!({ "src": all, "dest": subjects::seen(&all) });
    config
}

/// What all our streams have in common: kept in files, nothing ages out, a full one refuses.
pub(super) fn common(name: &str, subjects: Vec<String>, max_bytes: u64, replicas: usize) -> Value {
    json!({
        "name": name,
        "subjects": subjects,
        "retention": "limits",
        "storage": "file",
        "discard": "new",
        "max_bytes": max_bytes,
        "max_consumers": MAX_CONSUMERS,
        "duplicate_window": DEDUP_WINDOW.as_nanos() as u64,
        "num_replicas": replicas,
        "allow_direct": true,
    })
}

/// Creates a stream, or brings what differs up to date.
pub(super) async fn ensure(link: &Link, wanted: Value) -> Result<(), Error> {
    let name = wanted["name"].as_str().unwrap_or_default().to_owned();
    let operation = "set up a stream";
    let endpoint = format!("STREAM.INFO.{name}");
    let found: Result<StreamAnswer, ApiError> = link.api(operation, &endpoint, &json!({})).await?;
    let (endpoint, config) = match found {
        Ok(found) => match differing(&found.config, &wanted, link.kept) {
            None => return Ok(()),
            Some(merged) => {
                let (had, has) = (&found.config["max_bytes"], &merged["max_bytes"]);
                tracing::info!(stream = name, %had, %has, "the settings of a stream are brought up to date");
                (format!("STREAM.UPDATE.{name}"), merged)
            }
        },
        Err(error) if error.is_missing() => (format!("STREAM.CREATE.{name}"), wanted),
        Err(error) => return Err(error.into_error(link, operation, &name)),
    };
    let done: Result<StreamAnswer, ApiError> = link.api(operation, &endpoint, &config).await?;
    done.map(|_| ()).map_err(|error| {
        if error.is_full() {
            let max = &config["max_bytes"];
            let reason = format!(
                "{}: {name} reserves {max} bytes; lower queue.max_bytes or raise max_file_store of the server",
                error.description
            );
            return link.unfit(reason);
        }
        error.into_error(link, operation, &name)
    })
}

/// The found configuration with what we want changed, but for what is kept; `None` if nothing has to
/// change.
fn differing(found: &Value, wanted: &Value, kept: &[&str]) -> Option<Value> {
    let mut merged = found.clone();
    let mut differs = false;
    for (key, value) in wanted.as_object()? {
        // Cannot be changed after creation.
        if key == "max_consumers" || kept.contains(&key.as_str()) {
            continue;
        }
        let same = found.get(key).is_some_and(|found| match value {
            Value::Object(fields) => fields
                .iter()
                .all(|(name, value)| found.get(name) == Some(value)),
            value => found == value,
        });
        if !same {
            merged[key] = value.clone();
            differs = true;
        }
    }
    differs.then_some(merged)
}

/// How many copies a stream has, if it exists.
pub(super) async fn replicas(link: &Link, name: &str) -> Result<Option<usize>, Error> {
    let operation = "ask for a stream";
    let endpoint = format!("STREAM.INFO.{name}");
    let found: Result<StreamAnswer, ApiError> = link.api(operation, &endpoint, &json!({})).await?;
    match found {
        Ok(found) => Ok(found.config["num_replicas"].as_u64().map(|n| n as usize)),
        Err(error) if error.is_missing() => Ok(None),
        Err(error) => Err(error.into_error(link, operation, name)),
    }
}

pub(super) async fn answer(link: &Link, name: &str) -> Result<StreamAnswer, Error> {
    let operation = "ask for a stream";
    let endpoint = format!("STREAM.INFO.{name}");
    let answer: Result<StreamAnswer, ApiError> = link.api(operation, &endpoint, &json!({})).await?;
    answer.map_err(|error| error.into_error(link, operation, name))
}

pub(super) async fn info(link: &Link, name: &str) -> Result<StreamInfo, Error> {
    let answer = answer(link, name).await?;
    let state = answer.state;
    Ok(StreamInfo {
        created_ms: message::time_ms(&answer.created).unwrap_or(0),
        first_seq: match state.messages {
            0 => state.last_seq + 1,
            _ => state.first_seq,
        },
        last_seq: state.last_seq,
        messages: state.messages,
        bytes: state.bytes,
        max_bytes: answer.config["max_bytes"].as_u64().unwrap_or(u64::MAX),
    })
}

/// One try to append. Also used for kv entries and blobs, with other headers.
pub(super) async fn append(link: &Link, stream: &str, raw: &Raw) -> Result<RawAppended, Error> {
    let headers = message::encode_headers(stream, raw)?;
    match publish(link, &raw.subject, headers, raw.body.clone()).await? {
        Ok(done) => Ok(done),
        Err(error) if error.is_conflict() => Err(Error::Conflict {
            subject: raw.subject.clone(),
        }),
        Err(error) => Err(error.into_error(link, "append", stream)),
    }
}

pub(super) async fn publish(
    link: &Link,
    subject: &str,
    headers: async_nats::HeaderMap,
    body: Bytes,
) -> Result<Result<RawAppended, ApiError>, Error> {
    let answer = link
        .request(
            "append",
            subject.to_owned(),
            Some(headers),
            body,
            APPEND_TRY,
        )
        .await
        .map_err(|failure| failure.or_away(link))?;
    let ack: Result<PubAck, ApiError> = api::read("append", &answer.payload)?;
    Ok(ack.map(|ack| RawAppended {
        seq: ack.seq,
        duplicate: ack.duplicate,
    }))
}

/// A message by its sequence.
pub(super) async fn get(
    link: &Link,
    name: &str,
    replicas: usize,
    seq: u64,
) -> Result<Option<RawStored>, Error> {
    if seq == 0 {
        return Ok(None);
    }
    match direct(link, name, json!({ "seq": seq })).await? {
        Some(found) => Ok(Some(found)),
        None if replicas > 1 => from_leader(link, name, json!({ "seq": seq })).await,
        None => Ok(None),
    }
}

/// The last message whose subject matches, from the leader, with every header.
pub(super) async fn last(
    link: &Link,
    name: &str,
    replicas: usize,
    filter: &str,
) -> Result<Option<RawStored>, Error> {
    let request = json!({ "last_by_subj": filter });
    if replicas > 1 {
        from_leader(link, name, request).await
    } else {
        direct(link, name, request).await
    }
}

/// A direct get: any replica may answer.
async fn direct(link: &Link, name: &str, request: Value) -> Result<Option<RawStored>, Error> {
    match direct_message(link, name, request).await? {
        Some(found) => message::from_headers(found, false).map(Some),
        None => Ok(None),
    }
}

pub(super) async fn direct_message(
    link: &Link,
    name: &str,
    request: Value,
) -> Result<Option<async_nats::Message>, Error> {
    let subject = format!("$JS.API.DIRECT.GET.{name}");
    let found = link
        .request(
            "read",
            subject,
            None,
            request.to_string().into(),
            BATCH_IDLE,
        )
        .await
        .map_err(|failure| failure.or_away(link))?;
    match found.status {
        None => Ok(Some(found)),
        Some(StatusCode::NOT_FOUND) => Ok(None),
        Some(_) => Err(refused("read", found.description.unwrap_or_default())),
    }
}

/// A get that only the leader answers.
async fn from_leader(link: &Link, name: &str, request: Value) -> Result<Option<RawStored>, Error> {
    let found = leader_message(link, name, request).await?;
    found
        .map(|got| got.read().map(|(stored, _)| stored))
        .transpose()
}

pub(super) async fn leader_message(
    link: &Link,
    name: &str,
    request: Value,
) -> Result<Option<MsgGet>, Error> {
    let endpoint = format!("STREAM.MSG.GET.{name}");
    let answer: Result<MsgGet, ApiError> = link.api("read", &endpoint, &request).await?;
    match answer {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.is_no_message() => Ok(None),
        Err(error) => Err(error.into_error(link, "read", name)),
    }
}

/// Up to `max` messages that match `filter`, from `from` on.
pub(super) async fn range(
    link: &Link,
    name: &str,
    replicas: usize,
    filter: &str,
    from: u64,
    max: usize,
) -> Result<Vec<RawStored>, Error> {
    let mut found: Vec<RawStored> = Vec::new();
    let mut next = from.max(1);
    while found.len() < max {
        let want = BATCH.min(max - found.len());
        let more = batch(link, name, filter, next, want, &mut found).await?;
        next = found.last().map_or(next, |last| last.seq + 1);
        if more || found.len() >= max {
            continue;
        }
        if replicas <= 1 {
            break;
        }
        // A follower may lag: the end is where the leader says it is.
        let request = json!({ "seq": next, "next_by_subj": filter });
        match from_leader(link, name, request).await? {
            Some(missed) => {
                next = missed.seq + 1;
                found.push(missed);
            }
            None => break,
        }
    }
    Ok(found)
}

/// One batch direct get, pushed to `found`; whether the replica that answered has more.
async fn batch(
    link: &Link,
    name: &str,
    filter: &str,
    from: u64,
    want: usize,
    found: &mut Vec<RawStored>,
) -> Result<bool, Error> {
    let operation = "read";
    let generation = link.connected_within(BATCH_IDLE).await?;
    let inbox = link.client.new_inbox();
    let mut answers = link.subscribe(inbox.clone()).await?;
    let request = json!({
        "seq": from, "next_by_subj": filter, "batch": want, "max_bytes": BATCH_BYTES,
    });
    link.publish(
        operation,
        format!("$JS.API.DIRECT.GET.{name}"),
        Some(inbox),
        request.to_string().into(),
    )
    .await?;
    let mut before = 0;
    loop {
        let answer = tokio::select! {
            answer = answers.next() => answer.ok_or(Error::Closed)?,
            () = link.lost(generation) => return Err(link.unreachable("the connection broke")),
            () = tokio::time::sleep(BATCH_IDLE) => return Err(Error::Timeout { operation }),
        };
        match answer.status.map(|status| status.as_u16()) {
            None => {
                // Names the message before it in this batch, so a dropped one shows.
                let said = message::header_number(&answer, &header::NATS_LAST_SEQUENCE);
                if said.is_some_and(|said| said != before) {
                    return Err(Error::Timeout { operation });
                }
                let stored = message::from_headers(answer, false)?;
                before = stored.seq;
                found.push(stored);
            }
            Some(END_OF_BATCH) => {
                let pending = message::header_number(&answer, &NUM_PENDING);
                return Ok(pending.unwrap_or(0) > 0);
            }
            Some(404) => return Ok(false),
            Some(503) => return Err(Failure::NoResponders.or_away(link)),
            Some(_) => return Err(refused(operation, answer.description.unwrap_or_default())),
        }
    }
}
