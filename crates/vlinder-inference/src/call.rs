//! One request, one answer: forwards the bytes, retries what may be retried, ends with the turn.
//!
//! Safe to see twice: the answer in the log decides, and `ServiceHandler` looks for it before a
//! second try. Between the upstream's answer and the log a worker can die; then the call is made
//! again, under the same `Idempotency-Key`.
//!
//! The turn's end is watched live; an end that a lost connection to the bus hid is not noticed, and
//! the call then lasts until it is answered or its deadline passes.

use crate::circuit::{self, Circuits};
use crate::discovery::{Health, is_named};
use crate::relay::{self, ANSWER_BYTES_MAX, Broken, Patience};
use crate::upstream::{self, Upstream};
use crate::{Options, operations, retry, usage};
use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use reqwest::header::{CONTENT_TYPE, HeaderMap, RETRY_AFTER};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use vlinder_bus::{Stored, Subject, subjects};
use vlinder_core::Selector;
use vlinder_core::record::{CallStatus, Request};
use vlinder_worker::serving::Serving;
use vlinder_worker::{Answer, Service, ServiceOutcome, WorkerCx};

/// Pause before a call is tried again whose turn could not be looked at on the bus.
const BUS_PAUSE: Duration = Duration::from_millis(500);
/// Pause before a call whose upstream is away goes to another worker, or to this one again once it
/// pulls again.
const AWAY_PAUSE: Duration = Duration::from_secs(1);
/// Longest `Content-Type` that is handed on.
const CONTENT_TYPE_MAX: usize = 256;

/// The calls of one upstream.
pub struct Calls {
    cx: WorkerCx,
    upstream: Arc<Upstream>,
    health: Arc<Health>,
    circuits: Arc<Circuits>,
    options: Options,
    /// Bounds the calls at the upstream, however many queues the worker pulls from.
    at_upstream: Semaphore,
}

/// Why one try gave no answer to keep.
enum Failure {
    /// Somebody else, or this worker later, shall do it.
    HandBack(Duration, String),
    /// No connection.
    Away(String),
    /// Connected, but not one byte of an answer.
    NoAnswer(String),
    /// Its circuit is open: nothing was sent.
    Refused(circuit::Refused),
    /// 429 or 5xx: the answer to keep if it stays like that, and when to come again.
    Busy(Answer, Option<Duration>),
}

impl Calls {
    /// Calls to `upstream`, as many at once as `options.slots`.
    pub fn new(
        cx: WorkerCx,
        upstream: Arc<Upstream>,
        health: Arc<Health>,
        circuits: Arc<Circuits>,
        options: Options,
    ) -> Arc<Self> {
        let at_upstream = Semaphore::new(options.slots);
        Arc::new(Self {
            cx,
            upstream,
            health,
            circuits,
            options,
            at_upstream,
        })
    }

    /// Waits for what must be true before anything leaves for the upstream; the future it returns
    /// is ready when the turn has ended.
    async fn watch_turn(
        &self,
        request: &Request,
        stored: &Stored,
    ) -> Result<impl Future<Output = ()> + use<>, vlinder_bus::Error> {
        let (ns, submission) = (request.namespace.clone(), request.submission.clone());
        let log = self.cx.log();
        let bus = self.cx.bus.clone();
        let mut gaps = bus.gaps();
        let mut ends = self.cx.bus.seen_end(&ns, &submission).await?;
        // Whoever subscribes after the end was stored does not see it.
        let end = Subject::End { ns, submission };
        let has_ended = self.cx.bus.last(&log, &end).await?.is_some();
        self.cx.bus.settled(&log, stored.seq).await?;
        Ok(async move {
            if has_ended {
                return;
            }
            loop {
                tokio::select! {
                    ended = ends.next() => match ended {
                        Some(_) => return,
                        // The bus is closing; the worker is about to end anyway.
                        None => std::future::pending::<()>().await,
                    },
                    // An end that came while the connection was lost will not be seen any more.
                    () = gaps.next() => match bus.last(&log, &end).await {
                        Ok(Some(_)) => return,
                        Ok(None) => {}
                        Err(error) => tracing::warn!(%error, "cannot look whether a turn has ended"),
                    },
                }
            }
        })
    }

    async fn answer(&self, request: &Request, stored: &Stored, body: Bytes) -> ServiceOutcome {
        let mut tried = 0;
        let mut earlier = None;
        loop {
            tried += 1;
            let failure = match self.one_try(request, stored, body.clone()).await {
                Ok(answer) => return ServiceOutcome::Answer(answer),
                Err(Failure::Refused(refused)) => {
                    // What the upstream itself has said to this call says more.
                    return match earlier {
                        Some(earlier) => outcome_of(earlier),
                        None => self.refused(request, &refused).await,
                    };
                }
                Err(failure) => failure,
            };
            if matches!(failure, Failure::Away(_)) {
                self.health.look_now();
            }
            let Some(pause) = self.pause_before_next(&failure, tried, request.deadline_ms) else {
                return outcome_of(failure);
            };
            tokio::select! {
                biased;
                reason = self.hand_back() => return ServiceOutcome::RetryAfter(pause, reason),
                () = tokio::time::sleep(pause) => {}
            }
            earlier = Some(failure);
        }
    }

    /// What becomes of a call that is not sent because its model keeps failing here.
    async fn refused(&self, request: &Request, refused: &circuit::Refused) -> ServiceOutcome {
        let (backend, model) = (self.options.backend, &request.selector);
        let (failures, reason) = (refused.failures, &refused.reason);
        let again = circuit::again(refused.again_in);
        let upstream = self.upstream.shown();
        let message = format!(
            "{backend} at {upstream} failed {failures} times in a row with {model} (the last time: {reason}); \
             {again}"
        );
        if self.is_offered_elsewhere(model).await {
            return ServiceOutcome::RetryAfter(AWAY_PAUSE, message);
        }
        let answer = Answer::error(503, "upstream_failing", &message);
        ServiceOutcome::Answer(answer)
    }

    /// Whether another upstream of this kind offers the model now.
    async fn is_offered_elsewhere(&self, model: &Selector) -> bool {
        let backend = self.options.backend;
        let (node, endpoint) = (self.cx.id.node.as_str(), self.upstream.shown());
        let serving = match Serving::read(&self.cx.bus).await {
            Ok(serving) => serving,
            Err(error) => {
                tracing::warn!(%error, "cannot look who else offers a model");
                return false;
            }
        };
        serving.offers().iter().any(|offer| {
            let is_other = offer.node != node || offer.endpoint != endpoint;
            let mut models = offer.models.iter();
            is_other
                && offer.backend == backend.as_str()
                && models.any(|offered| is_named(backend, &offered.name, model))
        })
    }

    /// `None`: there is no next try.
    fn pause_before_next(
        &self,
        failure: &Failure,
        tried: u32,
        deadline_ms: u64,
    ) -> Option<Duration> {
        let asked = match failure {
            Failure::HandBack(..) | Failure::Refused(_) => return None,
            Failure::Away(_) | Failure::NoAnswer(_) => None,
            Failure::Busy(_, asked) => *asked,
        };
        let pause = retry::pause(tried, asked, self.options.retry_floor)?;
        let next_ms = self.cx.bus.now_ms() + pause.as_millis() as u64;
        (next_ms < deadline_ms).then_some(pause)
    }

    /// Ready when waiting work belongs elsewhere: the upstream is away, or the worker drains.
    async fn hand_back(&self) -> String {
        tokio::select! {
            reason = self.health.away() => reason,
            () = self.cx.drain.cancelled() => "the worker drains".to_owned(),
        }
    }

    async fn one_try(
        &self,
        request: &Request,
        stored: &Stored,
        body: Bytes,
    ) -> Result<Answer, Failure> {
        let _permit = match self.at_upstream.try_acquire() {
            Ok(permit) => permit,
            Err(_) => tokio::select! {
                biased;
                reason = self.hand_back() => return Err(Failure::HandBack(AWAY_PAUSE, reason)),
                permit = self.at_upstream.acquire() => permit.expect("the semaphore is never closed"),
            },
        };
        let pass = self.circuits.admit(&request.selector);
        let pass = pass.map_err(Failure::Refused)?;
        let tried = self.send(request, stored, body).await;
        match &tried {
            Ok(answer) if answer.http == 502 => pass.failed("its answer broke off or had no end"),
            Ok(_) => pass.succeeded(),
            Err(Failure::NoAnswer(reason)) => pass.failed(reason),
            Err(Failure::Busy(answer, _)) if answer.http >= 500 => {
                pass.failed(&format!("it answered {}", answer.http));
            }
            // It works, and asks for less.
            Err(Failure::Busy(..)) => pass.succeeded(),
            // Says nothing about the model.
            Err(Failure::HandBack(..) | Failure::Away(_) | Failure::Refused(_)) => drop(pass),
        }
        tried
    }

    /// Sends the call and reads its answer.
    async fn send(
        &self,
        request: &Request,
        stored: &Stored,
        body: Bytes,
    ) -> Result<Answer, Failure> {
        let began = Instant::now();
        let first_byte = self.options.first_byte_timeout;
        let sent = self.upstream.post(&request.operation, body, &stored.hash);
        let response = match tokio::time::timeout(first_byte, sent).await {
            Ok(Ok(response)) => response,
            Ok(Err(error @ upstream::Error::Away { .. })) => {
                return Err(Failure::Away(error.to_string()));
            }
            Ok(Err(error)) => return Err(Failure::NoAnswer(error.to_string())),
            Err(_) => {
                let error = self
                    .upstream
                    .no_answer(format!("nothing within {first_byte:?}"));
                return Err(Failure::NoAnswer(error.to_string()));
            }
        };
        let head = Head::of(
            response.status().as_u16(),
            response.headers(),
            self.cx.bus.now_ms(),
        );
        let signal = head.is_stream().then(|| {
            subjects::answer_signal(&request.namespace, &request.submission, &request.key)
        });
        let patience = Patience {
            first_byte: first_byte.saturating_sub(began.elapsed()),
            idle: self.options.idle_timeout,
        };
        let chunks = response.bytes_stream();
        let received = relay::receive(&self.cx.bus, signal.as_deref(), chunks, patience).await;
        if head.http == 404 && !self.health.still_offers(request.selector.as_str()).await {
            let reason = format!("the upstream no longer has {}", request.selector);
            return Err(Failure::HandBack(AWAY_PAUSE, reason));
        }
        head.judge(received.body, received.broken, &self.upstream)
            .await
    }
}

#[async_trait]
impl Service for Calls {
    async fn call(&self, request: &Request, stored: &Stored, body: Bytes) -> ServiceOutcome {
        let backend = self.options.backend;
        if !operations::known(backend, &request.operation) {
            let message = format!(
                "{backend} serves no {:?}: expected one of {}",
                request.operation,
                operations::of(backend).join(", ")
            );
            return ServiceOutcome::Answer(Answer::error(404, "unknown_operation", &message));
        }
        let turn_ended = match self.watch_turn(request, stored).await {
            Ok(turn_ended) => turn_ended,
            Err(error) => return ServiceOutcome::RetryAfter(BUS_PAUSE, error.to_string()),
        };
        let left_ms = request.deadline_ms.saturating_sub(self.cx.bus.now_ms());
        // Whichever comes first: the other futures are dropped, and with them the HTTP request.
        tokio::select! {
            biased;
            () = turn_ended => ServiceOutcome::Abandoned,
            () = pass(left_ms) => {
                let message = "the turn's deadline passed before the upstream had answered";
                ServiceOutcome::Answer(Answer::error(504, "deadline", message))
            }
            outcome = self.answer(request, stored, body) => outcome,
        }
    }
}

/// Waits; no time at all passes at once, while a timer would let others begin.
async fn pass(ms: u64) {
    if ms > 0 {
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
}

/// What is left to do when no further try is made.
fn outcome_of(failure: Failure) -> ServiceOutcome {
    match failure {
        Failure::HandBack(pause, reason) => ServiceOutcome::RetryAfter(pause, reason),
        Failure::Away(reason) => ServiceOutcome::RetryAfter(AWAY_PAUSE, reason),
        Failure::NoAnswer(reason) => {
            ServiceOutcome::Answer(Answer::error(504, "upstream_silent", &reason))
        }
        Failure::Busy(answer, _) => ServiceOutcome::Answer(answer),
        Failure::Refused(refused) => {
            ServiceOutcome::RetryAfter(AWAY_PAUSE.max(refused.again_in), refused.reason)
        }
    }
}

/// What the head of an answer says.
struct Head {
    http: u16,
    content_type: String,
    retry_after: Option<Duration>,
}

impl Head {
    fn of(http: u16, headers: &HeaderMap, now_ms: u64) -> Self {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let content_type = text(CONTENT_TYPE).filter(|text| text.len() <= CONTENT_TYPE_MAX);
        Self {
            http,
            content_type: content_type
                .unwrap_or("application/octet-stream")
                .to_owned(),
            retry_after: text(RETRY_AFTER).and_then(|value| retry::retry_after(value, now_ms)),
        }
    }

    fn is_success(&self) -> bool {
        (200..300).contains(&self.http)
    }

    /// Whether pieces are worth sending on. The upstream's word counts, not the request's: it alone
    /// knows its defaults.
    fn is_stream(&self) -> bool {
        self.is_success() && !self.content_type.starts_with("application/json")
    }

    /// Turns what came into an answer or into a reason to try again. Nothing is tried again once a
    /// byte of a good answer has come: the agent may have it already.
    async fn judge(
        self,
        body: Bytes,
        broken: Option<Broken>,
        upstream: &Upstream,
    ) -> Result<Answer, Failure> {
        let is_stream = self.is_stream();
        match broken {
            Some(Broken::TooLarge) => {
                let message = format!("the answer exceeds {ANSWER_BYTES_MAX} bytes");
                return Ok(Answer::error(502, "upstream_too_large", &message));
            }
            Some(Broken::Cut(reason)) if self.is_success() => {
                let reason = upstream.no_answer(reason).to_string();
                if body.is_empty() {
                    return Err(Failure::NoAnswer(reason));
                }
                let error = Answer::error(502, "upstream_cut", &reason);
                return Ok(if is_stream {
                    // What came is what the agent has seen.
                    Answer {
                        content_type: self.content_type,
                        body,
                        ..error
                    }
                } else {
                    error
                });
            }
            // Of a refusal the status says the most; a part of its text is better than none.
            Some(Broken::Cut(_)) | None => {}
        }
        let usage = usage::of(&body, is_stream).await;
        let answer = Answer {
            status: if self.is_success() {
                CallStatus::Ok
            } else {
                CallStatus::Error
            },
            http: self.http,
            tokens_in: usage.tokens_in,
            tokens_out: usage.tokens_out,
            ..Answer::ok(&self.content_type, body)
        };
        if retry::is_transient(self.http) {
            return Err(Failure::Busy(answer, self.retry_after));
        }
        Ok(answer)
    }
}
