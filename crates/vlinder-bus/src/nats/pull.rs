//! Asking a pull consumer for messages, on one inbox: the part that workers' pullers and log
//! followers share.
//!
//! A [`Pull`] belongs to one connection. It keeps count of what it asked for and tells messages from
//! the end of a request, a lost connection, a silent server and a consumer that is gone. It never
//! asks by itself. Whoever owns it makes a new one (a new inbox) after [`Got::Broken`], so that
//! answers to requests from before cannot be counted twice.

use super::link::{API_WAIT, Link};
use super::message;
use crate::error::Error;
use async_nats::{HeaderName, Message, Subscriber};
use futures::{FutureExt, StreamExt};
use serde_json::json;
use std::time::Duration;
use tokio::time::Instant;

/// How long a request stays with the server when there is nothing.
pub(super) const EXPIRES: Duration = Duration::from_secs(30);
/// How often the server shows that it still holds a request. A hundred pullers at one second cost
/// it 1.6% of a core.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// Two heartbeats missed, and a little for a busy machine.
const SILENCE_MAX: Duration = Duration::from_secs(11);
/// Bytes asked for at once.
const BYTES_MAX: usize = 4 * 1024 * 1024;
/// Ends of a request that pass by themselves or are told otherwise.
const PASSING: [&str; 4] = [
    "Consumer Deleted",
    "Leadership Change",
    "Server Shutdown",
    "Interest Expired",
];
const PENDING_MESSAGES: HeaderName = HeaderName::from_static("Nats-Pending-Messages");

const _: () = assert!(SILENCE_MAX.as_millis() > 2 * HEARTBEAT.as_millis());
const _: () = assert!(SILENCE_MAX.as_millis() < EXPIRES.as_millis());

/// What came.
pub(super) enum Got {
    /// A message.
    Message(Message),
    /// A request came to its end; more must be asked for.
    Ended,
    /// Nothing more will come here: the connection is lost, the server silent, the consumer gone.
    Broken,
}

/// Requests to one consumer over one connection.
pub(super) struct Pull {
    link: Link,
    next_subject: String,
    inbox: String,
    answers: Subscriber,
    generation: u64,
    /// Requests that were not answered to their end, by number.
    open: Vec<u64>,
    requests: u64,
    /// Messages that open requests may still bring.
    outstanding: usize,
    heard: Instant,
}

impl Pull {
    /// Opens an inbox on the present connection.
    pub async fn open(link: &Link, stream: &str, consumer: &str) -> Result<Self, Error> {
        let generation = link.connected_within(API_WAIT).await?;
        let inbox = link.client.new_inbox();
        let answers = link.subscribe(format!("{inbox}.*")).await?;
        Ok(Self {
            link: link.clone(),
            next_subject: format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"),
            inbox,
            answers,
            generation,
            open: Vec::new(),
            requests: 0,
            outstanding: 0,
            heard: Instant::now(),
        })
    }

    /// Messages that were asked for and have not come.
    pub fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// Asks for `count` more messages.
    pub async fn ask(&mut self, count: usize) -> Result<(), Error> {
        self.requests += 1;
        let request = json!({
            "batch": count,
            "max_bytes": BYTES_MAX,
            "expires": EXPIRES.as_nanos() as u64,
            "idle_heartbeat": HEARTBEAT.as_nanos() as u64,
        });
        let inbox = format!("{}.{}", self.inbox, self.requests);
        let subject = self.next_subject.clone();
        let payload = request.to_string().into();
        self.link
            .publish("pull", subject, Some(inbox), payload)
            .await?;
        self.open.push(self.requests);
        self.outstanding += count;
        self.heard = Instant::now();
        Ok(())
    }

    /// What comes next. Cancel-safe. Waits for ever if nothing was asked for.
    pub async fn next(&mut self) -> Got {
        loop {
            let silent = tokio::time::sleep_until(self.heard + SILENCE_MAX);
            let answer = tokio::select! {
                biased;
                answer = self.answers.next() => answer,
                () = self.link.lost(self.generation) => None,
                () = silent, if self.outstanding > 0 => {
                    tracing::debug!(subject = %self.next_subject, "the server is silent");
                    None
                }
            };
            let Some(answer) = answer else {
                return Got::Broken;
            };
            if let Some(got) = self.take(answer) {
                return got;
            }
        }
    }

    /// What is here already.
    pub fn now(&mut self) -> Option<Got> {
        loop {
            let answer = self.answers.next().now_or_never()?;
            let Some(answer) = answer else {
                return Some(Got::Broken);
            };
            if let Some(got) = self.take(answer) {
                return Some(got);
            }
        }
    }

    fn take(&mut self, answer: Message) -> Option<Got> {
        self.heard = Instant::now();
        let Some(status) = answer.status.map(|status| status.as_u16()) else {
            self.outstanding = self.outstanding.saturating_sub(1);
            if self.outstanding == 0 {
                self.open.clear();
            }
            return Some(Got::Message(answer));
        };
        match status {
            100 => None,
            // Nobody answers for the consumer: it is gone, or its leader is away.
            503 => Some(Got::Broken),
            status => {
                let text = answer.description.as_deref().unwrap_or_default();
                tracing::trace!(status, text, "a pull request ended");
                let normal = matches!(status, 404 | 408)
                    || text.eq_ignore_ascii_case("Batch Completed")
                    || text.starts_with("Message Size Exceeds");
                if !normal {
                    if !PASSING
                        .iter()
                        .any(|passing| text.eq_ignore_ascii_case(passing))
                    {
                        tracing::warn!(status, text, subject = %self.next_subject, "the server refuses to be asked");
                    }
                    return Some(Got::Broken);
                }
                self.close_request(&answer).then_some(Got::Ended)
            }
        }
    }

    /// A status names its request by the inbox and says how much of it will not come. What else is
    /// outstanding still comes: a replicated consumer says "Batch Completed" before the messages,
    /// which wait for the other replicas. Whether it was news.
    fn close_request(&mut self, answer: &Message) -> bool {
        let number = answer
            .subject
            .rsplit_once('.')
            .and_then(|(_, number)| number.parse().ok());
        let Some(at) = self.open.iter().position(|open| Some(*open) == number) else {
            return false;
        };
        self.open.swap_remove(at);
        let left = message::header_number(answer, &PENDING_MESSAGES);
        self.outstanding = match left {
            Some(left) => self.outstanding.saturating_sub(left as usize),
            None if self.open.is_empty() => 0,
            None => self.outstanding,
        };
        true
    }
}
