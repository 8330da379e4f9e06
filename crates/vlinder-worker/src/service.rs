//! From a request to its result: what all services do the same way.
//!
//! Safe to repeat: a request that was delivered before first looks whether its turn has an answer
//! to that call key; the first answer in the log is the answer, so a second one changes nothing.

use crate::WorkerCx;
use crate::jobs::{Handler, Job, Outcome};
use async_trait::async_trait;
use bytes::Bytes;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vlinder_bus::wire::{NOTE_ATTEMPT, NOTE_BY, NOTE_REQUEST, NOTE_TOOK_US};
use vlinder_bus::{Message, Stored, Subject};
use vlinder_core::record::{CallResult, CallStatus, Request};
use vlinder_core::{CallKey, Kind, Namespace, StateRoot, SubmissionId};

/// Most messages of one turn that are read back. A turn has at most as many calls.
pub const TURN_MESSAGES_MAX: usize = 100_000;

/// What a service answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Whether it worked.
    pub status: CallStatus,
    /// The HTTP status that the agent sees.
    pub http: u16,
    /// The `Content-Type` that the agent sees.
    pub content_type: String,
    /// The state after the call, for storage that changed it.
    pub state: Option<StateRoot>,
    /// Whether a `kv get` found something.
    pub found: Option<bool>,
    /// Tokens read by a model.
    pub tokens_in: Option<u64>,
    /// Tokens written by a model.
    pub tokens_out: Option<u64>,
    /// The body that the agent sees.
    pub body: Bytes,
}

impl Answer {
    /// A good answer.
    pub fn ok(content_type: &str, body: impl Into<Bytes>) -> Self {
        Self {
            status: CallStatus::Ok,
            http: 200,
            content_type: content_type.to_owned(),
            state: None,
            found: None,
            tokens_in: None,
            tokens_out: None,
            body: body.into(),
        }
    }

    /// A good answer in JSON.
    pub fn json(value: &serde_json::Value) -> Self {
        Self::ok("application/json", value.to_string())
    }

    /// A refusal or failure, as `{error: {code, message}}`.
    pub fn error(http: u16, code: &str, message: &str) -> Self {
        let body = serde_json::json!({ "error": { "code": code, "message": message } });
        Self {
            status: CallStatus::Error,
            http,
            ..Self::json(&body)
        }
    }
}

/// What came of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServiceOutcome {
    /// It is answered, well or badly.
    Answer(Answer),
    /// Not now, for this reason; somebody shall try again after the pause.
    RetryAfter(Duration, String),
    /// Its turn has ended; nobody wants the answer.
    Abandoned,
}

/// A service: turns one request into one answer.
#[async_trait]
pub trait Service: Send + Sync + 'static {
    /// Answers `request`. `stored` is the node that carries it, `body` its body.
    async fn call(&self, request: &Request, stored: &Stored, body: Bytes) -> ServiceOutcome;
}

/// Serves requests with a [`Service`]: decodes, checks, answers into the log.
pub struct ServiceHandler<S> {
    cx: WorkerCx,
    service: Arc<S>,
}

impl<S: Service> ServiceHandler<S> {
    /// A handler for [`crate::serve_queue`].
    pub fn new(cx: WorkerCx, service: Arc<S>) -> Arc<Self> {
        Arc::new(Self { cx, service })
    }

    async fn try_handle(&self, job: &Job) -> Result<Outcome, vlinder_bus::Error> {
        let stored = &job.stored;
        let request = match Request::try_from(&stored.node) {
            Ok(request) => request,
            Err(error) => return Ok(Outcome::Reject(error.to_string())),
        };
        let asked_again = stored
            .notes
            .get(NOTE_ATTEMPT)
            .is_some_and(|attempt| attempt != "1");
        let may_be_answered = job.attempt > 1 || asked_again;
        if may_be_answered && answered(&self.cx, &request.submission, &request.key).await? {
            return Ok(Outcome::Done);
        }
        if self.cx.bus.now_ms() > request.deadline_ms {
            let answer = Answer::error(
                504,
                "deadline",
                "the turn's deadline passed before the call was served",
            );
            self.answer(stored, &request, job.attempt, answer, Duration::ZERO)
                .await?;
            return Ok(Outcome::Done);
        }
        let body = self.cx.bus.load(&stored.body).await?;
        let began = Instant::now();
        match self.service.call(&request, stored, body).await {
            ServiceOutcome::Answer(answer) => {
                self.answer(stored, &request, job.attempt, answer, began.elapsed())
                    .await?;
                Ok(Outcome::Done)
            }
            ServiceOutcome::RetryAfter(pause, reason) => {
                tracing::info!(
                    service = request.service,
                    reason,
                    ?pause,
                    "retrying a call later"
                );
                Ok(Outcome::RetryAfter(pause))
            }
            ServiceOutcome::Abandoned => Ok(Outcome::Done),
        }
    }

    async fn answer(
        &self,
        stored: &Stored,
        request: &Request,
        attempt: u64,
        answer: Answer,
        took: Duration,
    ) -> Result<(), vlinder_bus::Error> {
        let result = CallResult {
            submission: request.submission.clone(),
            key: request.key,
            status: answer.status,
            http: answer.http,
            content_type: answer.content_type,
            state: answer.state,
            found: answer.found,
            tokens_in: answer.tokens_in,
            tokens_out: answer.tokens_out,
        };
        let node = result.to_node(stored.hash, &answer.body);
        let subject = call_subject(&request.namespace, &request.submission);
        let message = Message::new(self.cx.log(), subject, node, answer.body)
            .note(NOTE_BY, &self.cx.id)
            .note(NOTE_ATTEMPT, attempt)
            .note(NOTE_REQUEST, stored.seq)
            .note(NOTE_TOOK_US, took.as_micros());
        self.cx.bus.append(message).await?;
        Ok(())
    }
}

#[async_trait]
impl<S: Service> Handler for ServiceHandler<S> {
    async fn handle(&self, job: Job) -> Outcome {
        match self.try_handle(&job).await {
            Ok(outcome) => outcome,
            Err(error) => {
                tracing::warn!(subject = job.stored.subject, %error, "a call could not be served, trying again");
                Outcome::RetryAfter(Duration::from_millis(500))
            }
        }
    }

    async fn give_up(&self, stored: &Stored, reason: &str) {
        let Ok(request) = Request::try_from(&stored.node) else {
            return;
        };
        let answer = Answer::error(
            502,
            "dead_letter",
            &format!("the call was given up: {reason}"),
        );
        if let Err(error) = self
            .answer(stored, &request, 0, answer, Duration::ZERO)
            .await
        {
            tracing::warn!(%error, "could not record that a call was given up");
        }
    }
}

/// Where the answers of a turn are stored.
pub fn call_subject(ns: &Namespace, submission: &SubmissionId) -> Subject {
    Subject::Call {
        ns: ns.clone(),
        submission: submission.clone(),
    }
}

/// The first answer to each call of a turn so far, in log order.
pub async fn answers_of(
    cx: &WorkerCx,
    submission: &SubmissionId,
) -> Result<Vec<(CallResult, Stored)>, vlinder_bus::Error> {
    let subject = call_subject(&cx.ns, submission);
    let mut seen = std::collections::HashSet::new();
    let mut answers = Vec::new();
    let mut all = cx
        .bus
        .all_on(&cx.log(), &subject, TURN_MESSAGES_MAX)
        .await?;
    if all.iter().any(Stored::is_healed) {
        all.sort_by_key(Stored::rank);
    }
    for stored in all {
        if stored.node.kind != Kind::Result {
            continue;
        }
        let Ok(result) = CallResult::try_from(&stored.node) else {
            continue;
        };
        if seen.insert(result.key) {
            answers.push((result, stored));
        }
    }
    Ok(answers)
}

/// The parents of an end that comes from outside the runtime: all results, or the invoke when
/// there are none. Which results a request followed stands in the request, on another subject; every
/// result reaches the invoke, so naming all of them is complete, if not minimal.
pub async fn maximal_results(
    cx: &WorkerCx,
    submission: &SubmissionId,
    invoke: vlinder_core::NodeHash,
) -> Result<Vec<vlinder_core::NodeHash>, vlinder_bus::Error> {
    let answers = answers_of(cx, submission).await?;
    let mut hashes: Vec<_> = answers.iter().map(|(_, stored)| stored.hash).collect();
    hashes.truncate(vlinder_core::record::PARENTS_MAX);
    if hashes.is_empty() {
        hashes.push(invoke);
    }
    Ok(hashes)
}

async fn answered(
    cx: &WorkerCx,
    submission: &SubmissionId,
    key: &CallKey,
) -> Result<bool, vlinder_bus::Error> {
    Ok(answers_of(cx, submission)
        .await?
        .iter()
        .any(|(result, _)| result.key == *key))
}
