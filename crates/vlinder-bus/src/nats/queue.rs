//! Durable queues: pull consumers with explicit acknowledgement, and what can be said of a delivery.

use super::api::ApiError;
use super::link::{API_WAIT, Failure, Link, refused};
use super::message::{self, Token};
use super::stream;
use crate::backend::{QueueInfo, QueueSpec, Verdict};
use crate::error::Error;
use crate::streams::{ACK_PENDING_MAX, ACK_WAIT, StreamName};
use serde::Deserialize;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::time::Instant;

/// One try of a confirmed acknowledgement; a thousand times what it takes, and repeating it is harmless.
const ACK_TRY: Duration = Duration::from_millis(500);
/// After so long an acknowledgement is given up: the server has handed the work on meanwhile, and
/// whoever gets it finds the stored result.
const ACK_DEADLINE: Duration = Duration::from_secs(6);
/// Pause between two tries of an acknowledgement.
const ACK_PAUSE: Duration = Duration::from_millis(50);
/// Pull requests that may wait at one queue: workers of that capability, all nodes together.
const WAITING_MAX: u64 = 4096;
/// Pages of the queue listing; a page has 256.
const PAGES_MAX: usize = 400;

const _: () = assert!(ACK_DEADLINE.as_millis() > ACK_WAIT.as_millis());

/// What the server answers about a consumer.
#[derive(Deserialize)]
pub(super) struct ConsumerAnswer {
    pub name: String,
    config: ConsumerConfig,
    delivered: ConsumerPosition,
    ack_floor: ConsumerPosition,
    #[serde(default)]
    num_ack_pending: u64,
    #[serde(default)]
    pub num_pending: u64,
    #[serde(default)]
    ts: Option<String>,
}

#[derive(Deserialize)]
struct ConsumerConfig {
    #[serde(default)]
    durable_name: String,
    #[serde(default)]
    filter_subject: String,
}

#[derive(Deserialize)]
struct ConsumerPosition {
    #[serde(default)]
    stream_seq: u64,
}

#[derive(Deserialize)]
struct ConsumerPage {
    #[serde(default)]
    total: usize,
    #[serde(default)]
    consumers: Option<Vec<ConsumerAnswer>>,
}

/// How a queue is now. `Missing` if it does not exist.
pub(super) async fn info(link: &Link, stream: &str, queue: &str) -> Result<ConsumerAnswer, Error> {
    let operation = "ask for a queue";
    let endpoint = format!("CONSUMER.INFO.{stream}.{queue}");
    let answer: Result<ConsumerAnswer, ApiError> =
        link.api(operation, &endpoint, &json!({})).await?;
    answer.map_err(|error| error.into_error(link, operation, queue))
}

/// Creates a consumer.
pub(super) async fn create(
    link: &Link,
    stream: &str,
    name: &str,
    config: &Value,
) -> Result<Result<ConsumerAnswer, ApiError>, Error> {
    let endpoint = format!("CONSUMER.CREATE.{stream}.{name}");
    let request = json!({ "stream_name": stream, "config": config, "action": "create" });
    link.api("make a queue", &endpoint, &request).await
}

fn config(spec: &QueueSpec) -> Value {
    json!({
        "name": spec.name,
        "durable_name": spec.name,
        "filter_subject": spec.filter,
        "deliver_policy": if spec.from_start { "all" } else { "new" },
        "ack_policy": "explicit",
        "ack_wait": ACK_WAIT.as_nanos() as u64,
        "max_ack_pending": ACK_PENDING_MAX,
        // How often is ours to count (design.md rule 5).
        "max_deliver": -1,
        "max_waiting": WAITING_MAX,
        "replay_policy": "instant",
    })
}

/// Creates a queue if it is missing; an existing one must read the same filter.
pub(super) async fn ensure(link: &Link, spec: &QueueSpec) -> Result<(), Error> {
    let stream = spec.stream.as_text();
    let found = match info(link, &stream, &spec.name).await {
        Ok(found) => found,
        Err(Error::Missing { .. }) => match create(link, &stream, &spec.name, &config(spec)).await?
        {
            Ok(_) => return Ok(()),
            // Somebody else was faster: with another configuration that is an error here, and
            // their filter is looked at below.
            Err(error) if !error.is_missing() => info(link, &stream, &spec.name)
                .await
                .map_err(|_| error.into_error(link, "make a queue", &spec.name))?,
            Err(error) => return Err(error.into_error(link, "make a queue", &stream)),
        },
        Err(error) => return Err(error),
    };
    if found.config.filter_subject != spec.filter {
        return Err(refused(
            "make a queue",
            format!(
                "{} exists already and reads {}, not {}",
                spec.name, found.config.filter_subject, spec.filter
            ),
        ));
    }
    rebuild_if_past_end(link, spec, found).await
}

/// A queue that stands past the end of its stream (the stream was restored from an older copy) would
/// skip new messages in silence. It is made again where everything acknowledged still is.
async fn rebuild_if_past_end(
    link: &Link,
    spec: &QueueSpec,
    found: ConsumerAnswer,
) -> Result<(), Error> {
    let stream = spec.stream.as_text();
    // Asked after the queue, so a stream that only grows is never behind it.
    let last = stream::answer(link, &stream).await?.state.last_seq;
    if found.delivered.stream_seq <= last {
        return Ok(());
    }
    make_again(link, spec, &found, last, last).await
}

/// Makes every queue of a stream again that stands past its end; their names.
pub(super) async fn mend(
    link: &Link,
    stream: &StreamName,
    common: u64,
) -> Result<Vec<String>, Error> {
    let name = stream.as_text();
    let mut mended = Vec::new();
    for found in durables(link, &name).await? {
        // Asked after the queue, so a stream that only grows is never behind it.
        let last = stream::answer(link, &name).await?.state.last_seq;
        if found.delivered.stream_seq <= last {
            continue;
        }
        let spec = QueueSpec {
            stream: stream.clone(),
            name: found.name.clone(),
            filter: found.config.filter_subject.clone(),
            from_start: true,
        };
        make_again(link, &spec, &found, last, common).await?;
        mended.push(spec.name);
    }
    Ok(mended)
}

/// Makes a queue again behind what was acknowledged and is still there, the last of which is `left`.
async fn make_again(
    link: &Link,
    spec: &QueueSpec,
    found: &ConsumerAnswer,
    last: u64,
    left: u64,
) -> Result<(), Error> {
    let stream = spec.stream.as_text();
    let from = found.ack_floor.stream_seq.min(left) + 1;
    tracing::warn!(
        queue = %spec.name, delivered = found.delivered.stream_seq, last, from,
        "the queue stands past the end of its stream, which lost its tail: making it again"
    );
    delete(link, &stream, &spec.name).await?;
    let mut config = config(spec);
    config["deliver_policy"] = json!("by_start_sequence");
    config["opt_start_seq"] = json!(from);
    let made = create(link, &stream, &spec.name, &config).await?;
    made.map(|_| ())
        .map_err(|error| error.into_error(link, "make a queue", &spec.name))
}

/// Deletes a queue; fine if it does not exist.
pub(super) async fn delete(link: &Link, stream: &str, queue: &str) -> Result<(), Error> {
    let operation = "delete a queue";
    let endpoint = format!("CONSUMER.DELETE.{stream}.{queue}");
    let answer: Result<Value, ApiError> = link.api(operation, &endpoint, &json!({})).await?;
    match answer {
        Ok(_) => Ok(()),
        Err(error) if error.is_missing() => Ok(()),
        Err(error) => Err(error.into_error(link, operation, queue)),
    }
}

/// How the queues of a stream are now; consumers of other kinds are left out.
pub(super) async fn list(link: &Link, stream: &str) -> Result<Vec<QueueInfo>, Error> {
    let mut queues = Vec::new();
    for consumer in durables(link, stream).await? {
        queues.push(describe(link, stream, consumer).await?);
    }
    queues.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(queues)
}

async fn durables(link: &Link, stream: &str) -> Result<Vec<ConsumerAnswer>, Error> {
    let operation = "list queues";
    let endpoint = format!("CONSUMER.LIST.{stream}");
    let mut found = Vec::new();
    let mut seen = 0;
    for _ in 0..PAGES_MAX {
        let request = json!({ "offset": seen });
        let page: Result<ConsumerPage, ApiError> = link.api(operation, &endpoint, &request).await?;
        let page = page.map_err(|error| error.into_error(link, operation, stream))?;
        let consumers = page.consumers.unwrap_or_default();
        seen += consumers.len();
        let last = consumers.is_empty() || seen >= page.total;
        let durable = |consumer: &ConsumerAnswer| !consumer.config.durable_name.is_empty();
        found.extend(consumers.into_iter().filter(durable));
        if last {
            break;
        }
    }
    Ok(found)
}

async fn describe(link: &Link, stream: &str, consumer: ConsumerAnswer) -> Result<QueueInfo, Error> {
    let (waiting, held) = (consumer.num_pending, consumer.num_ack_pending);
    let mut oldest_ms = None;
    if waiting + held > 0 {
        let request = json!({
            "seq": consumer.ack_floor.stream_seq + 1,
            "next_by_subj": consumer.config.filter_subject,
        });
        if let Some(oldest) = stream::direct_message(link, stream, request).await? {
            let now = consumer.ts.as_deref().and_then(message::time_ms);
            let now = now.unwrap_or_else(super::local_ms);
            let stored = message::from_headers(oldest, false)?.time_ms;
            oldest_ms = Some(now.saturating_sub(stored));
        }
    }
    Ok(QueueInfo {
        name: consumer.name,
        filter: consumer.config.filter_subject,
        waiting,
        held,
        oldest_ms,
    })
}

/// Says something about a delivery. The token may come from another process, so it is checked.
pub(super) async fn verdict(link: &Link, token: &str, verdict: Verdict) -> Result<(), Error> {
    let operation = "acknowledge";
    let Some(named) = message::read_token(&link.context, token) else {
        return Err(refused(operation, "the token is none of a delivery"));
    };
    match verdict {
        Verdict::Ack => confirmed(link, operation, token, &named, "+ACK").await,
        Verdict::Terminate => confirmed(link, "terminate", token, &named, "+TERM").await,
        Verdict::Progress => {
            link.require()?;
            tell(link, token, "+WPI".to_owned()).await
        }
        Verdict::Nak(delay) if delay.is_zero() => tell(link, token, "-NAK".to_owned()).await,
        Verdict::Nak(delay) => {
            let request = json!({ "delay": delay.as_nanos() as u64 });
            tell(link, token, format!("-NAK {request}")).await
        }
    }
}

/// The client writes what it is handed as soon as its task runs; nothing has to be flushed.
async fn tell(link: &Link, token: &str, what: String) -> Result<(), Error> {
    link.connected_within(API_WAIT).await?;
    link.publish("acknowledge", token.to_owned(), None, what.into())
        .await
}

/// A server that was killed may have forgotten the delivery; then it says nothing to its
/// acknowledgement and delivers again. That is told as `Missing` instead of waiting for nothing.
async fn confirmed(
    link: &Link,
    operation: &'static str,
    token: &str,
    named: &Token,
    what: &'static str,
) -> Result<(), Error> {
    let until = Instant::now() + ACK_DEADLINE;
    let mut may_be_forgotten = named.stored_ms <= *link.connections.borrow();
    loop {
        if may_be_forgotten {
            check_known(link, named).await?;
        }
        let asked = link
            .request(operation, token.to_owned(), None, what.into(), ACK_TRY)
            .await;
        let error = match asked {
            Ok(_) => return Ok(()),
            Err(Failure::NoResponders) => link.unreachable("nobody answers for the queue"),
            Err(Failure::Other(error)) if error.is_retryable() => error,
            Err(Failure::Other(error)) => return Err(error),
        };
        if Instant::now() + ACK_PAUSE >= until {
            return Err(error);
        }
        tokio::time::sleep(ACK_PAUSE).await;
        may_be_forgotten = true;
    }
}

/// `Missing` if the server knows that it did not make this delivery.
async fn check_known(link: &Link, named: &Token) -> Result<(), Error> {
    match info(link, &named.stream, &named.queue).await {
        Ok(queue) if queue.delivered.stream_seq < named.seq => {
            let what = format!("delivery {} of queue {}", named.seq, named.queue);
            Err(Error::Missing { what })
        }
        Err(missing @ Error::Missing { .. }) => Err(missing),
        // What cannot be asked will show when it is acknowledged.
        Ok(_) | Err(_) => Ok(()),
    }
}
