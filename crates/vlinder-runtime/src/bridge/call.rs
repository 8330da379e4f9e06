//! One call of an agent: a request on the bus and its answer.
//!
//! A call that the record answers already is answered from it, by its key. A call to a store must also
//! be the very same request, with the same base state: where a resumed turn took another way, its
//! stores must not be taken back to what the old way made of them. Such a call counts as the next one
//! of its kind, and runs.
//!
//! Message ids make a repeated request harmless: to a store it is the request's own hash, to a model
//! the call key, so that a resumed turn does not pay twice.

use super::delegate::{self, Delegation};
use super::replay;
use crate::agent::Shared;
use crate::turn::answers::Answered;
use crate::turn::invocation::{Invocation, NotNow};
use bytes::Bytes;
use std::sync::Arc;
use vlinder_bus::wire::{NOTE_ATTEMPT, NOTE_BY, NOTE_REQUEST};
use vlinder_bus::{Appended, Message, Subject};
use vlinder_core::hash::call_key;
use vlinder_core::record::Request;
use vlinder_core::{CallKey, Node, NodeHash, Selector, StateRoot, SubmissionId};
use vlinder_worker::Answer;
use vlinder_worker::service::call_subject;

/// Who answers a call.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Answerer {
    /// A store; whether the call can lead to another state.
    Store { changes_state: bool },
    /// A model.
    Model,
    /// The bridge itself, with this.
    Bridge(Answer),
    /// The bridge itself: gives work to another agent.
    Delegation(Arc<Delegation>),
    /// The bridge itself, when what was delegated has ended.
    End(SubmissionId),
}

/// What an agent wants.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    pub service: &'static str,
    pub backend: String,
    pub operation: &'static str,
    pub selector: Selector,
    pub body: Bytes,
    /// `X-Vlinder-Checkpoint`.
    pub label: Option<String>,
    pub answerer: Answerer,
}

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    #[error("the invocation is over")]
    Closed,
    #[error("more than {0} calls at once")]
    TooManyOpen(usize),
    #[error("more than {0} calls in one invocation")]
    TooMany(u64),
    #[error("the bus failed")]
    Bus(#[from] vlinder_bus::Error),
}

impl From<NotNow> for CallError {
    fn from(why: NotNow) -> Self {
        use crate::turn::invocation::{CALLS_MAX, CALLS_OPEN_MAX};
        match why {
            NotNow::Closed => Self::Closed,
            NotNow::TooManyOpen => Self::TooManyOpen(CALLS_OPEN_MAX),
            NotNow::TooMany => Self::TooMany(CALLS_MAX),
        }
    }
}

/// A request that is ready to be sent.
pub(crate) struct Prepared {
    pub key: CallKey,
    pub node: Node,
    pub hash: NodeHash,
    /// What a call to a store works on.
    pub state: Option<StateRoot>,
    parents: Vec<NodeHash>,
}

impl Ask {
    fn is_for_store(&self) -> bool {
        matches!(self.answerer, Answerer::Store { .. })
    }

    fn changes_state(&self) -> bool {
        self.answerer
            == Answerer::Store {
                changes_state: true,
            }
    }

    async fn key(self: &Arc<Self>, k: u64) -> CallKey {
        let ask = self.clone();
        crate::blocking_if_large(self.body.len(), move || {
            let (service, operation) = (ask.service, ask.operation);
            call_key(
                service,
                operation,
                &ask.backend,
                ask.selector.as_str(),
                &ask.body,
                k,
            )
        })
        .await
    }

    /// The key of the call for k = 0, by which equal calls are counted.
    pub async fn like(self: &Arc<Self>) -> CallKey {
        self.key(0).await
    }

    /// The request as it would be made now, as the next one of its kind.
    pub async fn prepare(self: &Arc<Self>, invocation: &Invocation, like: CallKey) -> Prepared {
        let k = invocation.count(like);
        let key = if k == 0 { like } else { self.key(k).await };
        let parents = invocation.parents();
        let turn = &invocation.turn;
        let state = invocation.root().filter(|_| self.is_for_store());
        let request = Request {
            namespace: turn.invoke.namespace.clone(),
            submission: turn.invoke.submission.clone(),
            agent: turn.invoke.agent.clone(),
            service: self.service.to_owned(),
            backend: self.backend.clone(),
            operation: self.operation.to_owned(),
            selector: self.selector.clone(),
            key,
            k,
            state,
            label: self.label.clone(),
            deadline_ms: turn.deadline_ms,
        };
        let (ask, of) = (self.clone(), parents.clone());
        let node =
            crate::blocking_if_large(self.body.len(), move || request.to_node(of, &ask.body)).await;
        Prepared {
            key,
            hash: node.hash(),
            node,
            state,
            parents,
        }
    }

    /// Whether a recorded answer is the answer to this request.
    pub fn is_answered_by(&self, prepared: &Prepared, answered: &Answered) -> bool {
        !self.is_for_store() || answered.request == Some(prepared.hash)
    }
}

/// Does a call: returns its answer when everything that led to it is durable.
pub(crate) async fn perform(
    shared: &Shared,
    invocation: &Arc<Invocation>,
    ask: Arc<Ask>,
) -> Result<Arc<Answered>, CallError> {
    let _open = invocation.begin()?;
    let work = async {
        let like = ask.like().await;
        let _alone = match ask.changes_state() {
            true => Some(invocation.writes.lock().await),
            false => None,
        };
        loop {
            let prepared = ask.prepare(invocation, like).await;
            let answered = match recorded(shared, invocation, &ask, &prepared).await? {
                Some(known) => known,
                None => ask_and_wait(shared, invocation, &ask, &prepared).await?,
            };
            if ask.is_answered_by(&prepared, &answered) {
                give(shared, invocation, &ask, &prepared, &answered).await?;
                return Ok(answered);
            }
        }
    };
    tokio::select! {
        outcome = work => outcome,
        () = invocation.closed() => Err(CallError::Closed),
    }
}

/// The answer to a call as the record of the turn has it, or that of the turn that it runs again.
pub(crate) async fn recorded(
    shared: &Shared,
    invocation: &Invocation,
    ask: &Ask,
    prepared: &Prepared,
) -> Result<Option<Arc<Answered>>, CallError> {
    match invocation.answers.get(&prepared.key) {
        Some(known) => Ok(Some(known)),
        None => replay::answer(shared, invocation, ask, prepared).await,
    }
}

/// Notes that the agent gets an answer, and waits until it is durable.
pub(crate) async fn give(
    shared: &Shared,
    invocation: &Invocation,
    ask: &Ask,
    prepared: &Prepared,
    answered: &Answered,
) -> Result<(), CallError> {
    shared
        .cx
        .bus
        .settled(&shared.cx.log(), answered.seq)
        .await?;
    invocation.given(answered, &prepared.parents, ask.changes_state());
    Ok(())
}

/// Publishes a request and waits for its answer.
pub(crate) async fn ask_and_wait(
    shared: &Shared,
    invocation: &Invocation,
    ask: &Ask,
    prepared: &Prepared,
) -> Result<Arc<Answered>, CallError> {
    let submission = &invocation.turn.invoke.submission;
    invocation.answers.listen(&shared.cx, submission).await?;
    // The answer may be seen before the request is confirmed.
    let answer = invocation.answers.wait(prepared.key);
    tokio::pin!(answer);
    let sent = send(shared, invocation, ask, prepared);
    tokio::select! {
        biased;
        answered = &mut answer => return Ok(answered),
        sent = sent => sent?,
    }
    Ok(answer.await)
}

async fn send(
    shared: &Shared,
    invocation: &Invocation,
    ask: &Ask,
    prepared: &Prepared,
) -> Result<(), CallError> {
    let cx = &shared.cx;
    if matches!(ask.answerer, Answerer::Store { .. } | Answerer::Model) {
        let queues = &shared.queues;
        queues
            .ensure(cx, ask.service, &ask.backend, &ask.selector)
            .await?;
    }
    let subject = Subject::Req {
        ns: cx.ns.clone(),
        service: ask.service.to_owned(),
        backend: ask.backend.clone(),
        selector: ask.selector.clone(),
    };
    let submission = &invocation.turn.invoke.submission;
    let mut message = Message::new(cx.log(), subject, prepared.node.clone(), ask.body.clone())
        .note(NOTE_BY, &cx.id)
        .note(NOTE_ATTEMPT, invocation.turn.attempt);
    if ask.answerer == Answerer::Model {
        message.id = format!("request:{submission}:{}", prepared.key);
    }
    let asked = try_append(shared, invocation, message).await?;
    let answer = match &ask.answerer {
        Answerer::Store { .. } | Answerer::Model => None,
        Answerer::Bridge(answer) => Some(answer.clone()),
        Answerer::Delegation(delegation) => {
            let begun = delegation.begin(shared, invocation, prepared).await;
            Some(begun?)
        }
        Answerer::End(handle) => Some(delegate::end_of(shared, invocation, handle).await?),
    };
    if let Some(answer) = answer {
        let result = vlinder_core::record::CallResult {
            submission: submission.clone(),
            key: prepared.key,
            status: answer.status,
            http: answer.http,
            content_type: answer.content_type.clone(),
            state: None,
            found: None,
            tokens_in: None,
            tokens_out: None,
        };
        let node = result.to_node(prepared.hash, &answer.body);
        let subject = call_subject(&cx.ns, submission);
        let message = Message::new(cx.log(), subject, node, answer.body.clone())
            .note(NOTE_BY, &cx.id)
            .note(NOTE_ATTEMPT, invocation.turn.attempt)
            .note(NOTE_REQUEST, asked.seq);
        try_append(shared, invocation, message).await?;
    }
    Ok(())
}

/// Appends, through outages, as long as the turn may take; tells where it stands.
pub(crate) async fn try_append(
    shared: &Shared,
    invocation: &Invocation,
    message: Message,
) -> Result<Appended, CallError> {
    loop {
        match shared.cx.bus.append(message.clone()).await {
            Ok(appended) => return Ok(appended),
            Err(error)
                if error.is_retryable()
                    && tokio::time::Instant::now() < invocation.turn.deadline =>
            {
                tracing::warn!(%error, "a call waits for the bus");
            }
            Err(error) => return Err(error.into()),
        }
    }
}
