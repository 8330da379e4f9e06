//! One worker's pull from one durable queue.
//!
//! A task owns the inbox, so that a message that arrives while nobody waits for it can be handed
//! back: at once when the puller was stopped or dropped, otherwise after [`PARK_MAX`], which gives a
//! worker that only went round its loop the time to call `next` again.
//!
//! A request that reached the server cannot be called back without losing what is under way, so a
//! stopped puller lives on in the background and hands back whatever its last request still brings.

use super::link::Link;
use super::message;
use super::pull::{EXPIRES, Got, Pull};
use super::queue;
use crate::backend::{RawDelivery, RawPuller, Verdict};
use crate::error::Error;
use crate::streams::StreamName;
use async_nats::Message;
use async_trait::async_trait;
use std::collections::VecDeque;
use std::future::pending;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// How long a delivery waits for the next call before it is handed back.
const PARK_MAX: Duration = Duration::from_millis(20);
/// Pauses between two attempts to go on after the server or the consumer went away.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// Calls under way: one `next` or `stop` at a time, one more that replaces a dropped `next`.
const CALLS_MAX: usize = 2;

enum Call {
    Next {
        max: usize,
        answer: oneshot::Sender<Result<Vec<RawDelivery>, Error>>,
    },
    Stop {
        done: oneshot::Sender<()>,
    },
}

/// The worker's end.
pub(super) struct NatsPuller {
    calls: mpsc::Sender<Call>,
}

#[async_trait]
impl RawPuller for NatsPuller {
    async fn next(&mut self, max: usize) -> Result<Vec<RawDelivery>, Error> {
        let (answer, answered) = oneshot::channel();
        let max = max.max(1);
        let call = Call::Next { max, answer };
        self.calls.send(call).await.map_err(|_| Error::Closed)?;
        answered.await.unwrap_or(Err(Error::Closed))
    }

    async fn stop(&mut self) {
        let (done, is_done) = oneshot::channel();
        if self.calls.send(Call::Stop { done }).await.is_ok() {
            // An error means that the task has ended, which is as good.
            let _ = is_done.await;
        }
    }
}

/// Begins to pull; the queue must exist.
pub(super) async fn start(
    link: &Link,
    stream: &StreamName,
    queue: &str,
) -> Result<NatsPuller, Error> {
    let stream = stream.as_text();
    queue::info(link, &stream, queue).await?;
    let pull = Pull::open(link, &stream, queue).await?;
    let (calls, inbox) = mpsc::channel(CALLS_MAX);
    let task = Task {
        link: link.clone(),
        stream,
        queue: queue.to_owned(),
        pull: Some(pull),
        waiting: None,
        parked: VecDeque::new(),
        hand_back_at: None,
        retry_at: None,
        pause: RETRY_PAUSE.0,
    };
    link.tasks.spawn(task.run(inbox));
    Ok(NatsPuller { calls })
}

struct Waiting {
    max: usize,
    answer: oneshot::Sender<Result<Vec<RawDelivery>, Error>>,
}

struct Task {
    link: Link,
    stream: String,
    queue: String,
    pull: Option<Pull>,
    waiting: Option<Waiting>,
    parked: VecDeque<RawDelivery>,
    hand_back_at: Option<Instant>,
    retry_at: Option<Instant>,
    pause: Duration,
}

impl Task {
    async fn run(mut self, mut calls: mpsc::Receiver<Call>) {
        let stop = self.link.stop.clone();
        let done = loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break None,
                call = calls.recv() => match call {
                    Some(Call::Next { max, answer }) => {
                        self.waiting = Some(Waiting { max, answer });
                        self.serve().await;
                    }
                    Some(Call::Stop { done }) => break Some(done),
                    None => break None,
                },
                () = given_up(&mut self.waiting) => {
                    self.waiting = None;
                    self.hand_back_at = (!self.parked.is_empty()).then(|| Instant::now() + PARK_MAX);
                }
                got = next_of(&mut self.pull) => self.take(got).await,
                () = back(self.retry_at, &self.link) => {
                    self.retry_at = None;
                    self.resume().await;
                }
                () = at(self.hand_back_at) => {
                    self.hand_back_at = None;
                    self.hand_back().await;
                }
            }
        };
        self.waiting = None;
        self.hand_back().await;
        // What the server sent before it could know is handed back while it lasts. When the bus
        // closes there is no time for that.
        if let Some(done) = done {
            let _ = done.send(());
        }
        drop(calls);
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(EXPIRES) => {}
            () = self.bounce() => {}
        }
    }

    /// Gives the waiting call what is parked, or sees to it that enough is asked for.
    async fn serve(&mut self) {
        self.give();
        let Some(waiting) = &self.waiting else { return };
        let max = waiting.max;
        let Some(pull) = &mut self.pull else {
            if self.retry_at.is_none() {
                self.resume().await;
            }
            return;
        };
        // Topping up at half saves a request per message.
        let outstanding = pull.outstanding();
        if outstanding * 2 <= max && pull.ask(max - outstanding).await.is_err() {
            self.broken();
        }
    }

    fn give(&mut self) {
        if self.parked.is_empty() {
            return;
        }
        let Some(waiting) = self.waiting.take() else {
            return;
        };
        let count = waiting.max.min(self.parked.len());
        let batch: Vec<_> = self.parked.drain(..count).collect();
        if let Err(Ok(batch)) = waiting.answer.send(Ok(batch)) {
            // The caller gave up at this moment.
            for delivery in batch.into_iter().rev() {
                self.parked.push_front(delivery);
            }
        }
        let now = Instant::now();
        self.hand_back_at = (!self.parked.is_empty()).then_some(now + PARK_MAX);
    }

    async fn take(&mut self, got: Got) {
        match got {
            Got::Message(message) => {
                self.pause = RETRY_PAUSE.0;
                self.park(message);
                while let Some(got) = self.pull.as_mut().and_then(Pull::now) {
                    match got {
                        Got::Message(message) => self.park(message),
                        Got::Ended => {}
                        Got::Broken => {
                            self.broken();
                            break;
                        }
                    }
                }
                if self.waiting.is_some() {
                    self.give();
                }
                if self.hand_back_at.is_none() && !self.parked.is_empty() {
                    self.hand_back_at = Some(Instant::now() + PARK_MAX);
                }
            }
            Got::Ended => self.pause = RETRY_PAUSE.0,
            Got::Broken => self.broken(),
        }
        if self.waiting.is_some() && self.pull.is_some() {
            self.serve().await;
        }
    }

    fn park(&mut self, message: Message) {
        match message::from_consumer(&self.link.context, message) {
            Ok((delivery, _)) => self.parked.push_back(delivery),
            Err(error) => tracing::warn!(%error, queue = %self.queue, "left out"),
        }
    }

    fn broken(&mut self) {
        self.pull = None;
        self.retry_at = Some(Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(RETRY_PAUSE.1);
    }

    /// Opens an inbox again if somebody waits; tells them if the queue is gone.
    async fn resume(&mut self) {
        let Some(waiting) = &self.waiting else { return };
        let max = waiting.max;
        match self.reopen(max).await {
            Ok(pull) => self.pull = Some(pull),
            Err(error @ (Error::Missing { .. } | Error::Closed)) => {
                if let Some(waiting) = self.waiting.take() {
                    let _ = waiting.answer.send(Err(error));
                }
            }
            Err(error) => {
                tracing::debug!(%error, queue = %self.queue, "cannot pull yet");
                self.broken();
            }
        }
    }

    async fn reopen(&self, max: usize) -> Result<Pull, Error> {
        // Asking first tells a queue that is gone from one whose server is away.
        queue::info(&self.link, &self.stream, &self.queue).await?;
        let mut pull = Pull::open(&self.link, &self.stream, &self.queue).await?;
        pull.ask(max).await?;
        Ok(pull)
    }

    async fn hand_back(&mut self) {
        self.hand_back_at = None;
        for delivery in std::mem::take(&mut self.parked) {
            let handed = queue::verdict(&self.link, &delivery.token, Verdict::Nak(Duration::ZERO));
            if let Err(error) = handed.await {
                tracing::debug!(%error, "a delivery will be handed on only after its ack wait");
            }
        }
    }

    async fn bounce(&mut self) {
        while let Some(pull) = &mut self.pull {
            if pull.outstanding() == 0 {
                return;
            }
            match pull.next().await {
                Got::Message(message) => {
                    self.park(message);
                    self.hand_back().await;
                }
                Got::Ended => {}
                Got::Broken => return,
            }
        }
    }
}

async fn given_up(waiting: &mut Option<Waiting>) {
    match waiting {
        Some(waiting) => waiting.answer.closed().await,
        None => pending().await,
    }
}

async fn next_of(pull: &mut Option<Pull>) -> Got {
    match pull {
        Some(pull) => pull.next().await,
        None => pending().await,
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => pending().await,
    }
}

/// The pause is over and there is a connection.
async fn back(time: Option<Instant>, link: &Link) {
    at(time).await;
    if link.connected().await.is_err() {
        // Closing: the task is told otherwise.
        pending().await
    }
}
