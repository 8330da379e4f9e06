//! Reading a stream in order and without gaps, for as long as the bus lives.
//!
//! An [`Ordered`] reads through a short-lived consumer that acknowledges nothing, and checks that
//! the consumer's own numbers follow each other. At a gap, a lost connection, a silent server or a
//! lost consumer it makes another one that begins after the last message it gave out (or from the
//! start, as its owner wishes). It pulls, so a slow reader holds up nobody and fills no buffer.

use super::api::ApiError;
use super::link::Link;
use super::message;
use super::pull::{Got, Pull};
use super::queue;
use super::stream;
use crate::backend::RawStored;
use crate::error::Error;
use async_nats::Message;
use serde_json::json;
use std::time::Duration;

/// Messages asked for at once; asked for again when half have come.
const BATCH: usize = 256;
/// A consumer that nobody pulled from for so long is removed by the server.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(120);
/// Pauses between two attempts to make a consumer.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// Where to go on after an interruption.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Resume {
    AfterLast,
    FromStart,
}

/// What an ordered reader tells.
pub(super) enum Told {
    /// It begins, or begins again; so many messages are there already.
    Began { pending: u64 },
    /// A message, and how many more are there already. A marker that a kv entry is gone has no
    /// form of ours, so the message comes as it is.
    Message {
        stored: RawStored,
        original: Option<async_nats::HeaderMap>,
        pending: u64,
    },
}

/// An ordered reader of one stream.
pub(super) struct Ordered {
    link: Link,
    stream: String,
    filter: String,
    resume: Resume,
    start: u64,
    next_seq: u64,
    pull: Option<Pull>,
    consumer_seq: u64,
    pause: Duration,
    first: Option<u64>,
}

impl Ordered {
    /// Makes the first consumer; fails where the stream is missing or nobody answers.
    pub async fn open(
        link: &Link,
        stream: &str,
        filter: &str,
        from: u64,
        resume: Resume,
    ) -> Result<Self, Error> {
        let mut ordered = Self {
            link: link.clone(),
            stream: stream.to_owned(),
            filter: filter.to_owned(),
            resume,
            start: from.max(1),
            next_seq: from.max(1),
            pull: None,
            consumer_seq: 0,
            pause: RETRY_PAUSE.0,
            first: None,
        };
        let pending = ordered.make_consumer().await?;
        ordered.first = Some(pending);
        Ok(ordered)
    }

    /// What comes next. `Err` is the end, but for messages that cannot be read.
    pub async fn next(&mut self) -> Result<Told, Error> {
        if let Some(pending) = self.first.take() {
            return Ok(Told::Began { pending });
        }
        loop {
            let Some(pull) = &mut self.pull else {
                let pending = self.make_again().await?;
                return Ok(Told::Began { pending });
            };
            if pull.outstanding() * 2 <= BATCH {
                let missing = BATCH - pull.outstanding();
                if pull.ask(missing).await.is_err() {
                    self.pull = None;
                    continue;
                }
            }
            match pull.next().await {
                Got::Message(message) => {
                    if let Some(told) = self.take(message)? {
                        return Ok(told);
                    }
                }
                Got::Ended => {}
                Got::Broken => self.pull = None,
            }
        }
    }

    fn take(&mut self, message: Message) -> Result<Option<Told>, Error> {
        let original = message.headers.clone();
        let (delivery, position) = message::from_consumer(&self.link.context, message)?;
        if position.consumer_seq != self.consumer_seq + 1 {
            tracing::debug!(stream = %self.stream, "a message was lost on the way: reading again");
            self.pull = None;
            return Ok(None);
        }
        self.pause = RETRY_PAUSE.0;
        self.consumer_seq = position.consumer_seq;
        self.next_seq = delivery.stored.seq + 1;
        Ok(Some(Told::Message {
            stored: delivery.stored,
            original,
            pending: position.pending,
        }))
    }

    async fn make_again(&mut self) -> Result<u64, Error> {
        loop {
            self.link.connected().await?;
            tokio::select! {
                () = tokio::time::sleep(self.pause) => {}
                () = self.link.stop.cancelled() => return Err(Error::Closed),
            }
            self.pause = (self.pause * 2).min(RETRY_PAUSE.1);
            match self.make_where_it_fits().await {
                Ok(pending) => return Ok(pending),
                Err(error) if error.is_retryable() => {
                    tracing::debug!(%error, stream = %self.stream, "cannot follow yet");
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// A log that lost its tail would be silent until it has grown beyond what was read from it, and
    /// what it grew by would never be read.
    async fn make_where_it_fits(&mut self) -> Result<u64, Error> {
        if self.resume == Resume::AfterLast {
            let last = stream::answer(&self.link, &self.stream)
                .await?
                .state
                .last_seq;
            if self.next_seq > last + 1 {
                tracing::warn!(
                    stream = %self.stream, last, next = self.next_seq,
                    "the log is shorter than what was read from it: following from its end"
                );
                self.next_seq = last + 1;
            }
        }
        self.make_consumer().await
    }

    async fn make_consumer(&mut self) -> Result<u64, Error> {
        if self.resume == Resume::FromStart {
            self.next_seq = self.start;
        }
        let name = format!("follow-{:032x}", rand::random::<u128>());
        let config = json!({
            "name": name,
            "filter_subject": self.filter,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": self.next_seq,
            "ack_policy": "none",
            "max_deliver": 1,
            "mem_storage": true,
            "num_replicas": 1,
            "inactive_threshold": FORGOTTEN_AFTER.as_nanos() as u64,
            "replay_policy": "instant",
        });
        let made: Result<_, ApiError> =
            queue::create(&self.link, &self.stream, &name, &config).await?;
        let made = made.map_err(|error| error.into_error(&self.link, "follow", &self.stream))?;
        self.pull = Some(Pull::open(&self.link, &self.stream, &made.name).await?);
        self.consumer_seq = 0;
        Ok(made.num_pending)
    }
}
