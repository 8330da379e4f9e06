//! The OpenAI-compatible gateway on the HTTP face (interfaces.md §6): each agent is a model.
//!
//! It is a client like any other: it speaks gRPC with the harness, the registry and the state
//! service, so that the HTTP face of every node can serve it, also of one that runs none of them.
//! A request is a turn. A client that leaves ends its turn, unless it gave it a name
//! (`Idempotency-Key`) under which it can ask for it again.

#![expect(
    clippy::result_large_err,
    reason = "the refusal is the answer itself, made once a request"
)]

mod stream;
mod wire;

use crate::listeners::Listeners;
use crate::node::{NodeFace, now_ms};
use crate::peers::Peers;
use axum::Router;
use axum::body::to_bytes;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Code;
use vlinder_client::{Client, Error, Turn, TurnEvent};
use vlinder_config::Service;
use vlinder_core::{BODY_BYTES_MAX, BranchName, SessionId, SubmissionId};
use vlinder_proto::harness::{Accepted, End, RunRequest};
use vlinder_proto::registry::{Agent, GetAgentRequest, ListAgentsRequest};
use vlinder_proto::state::GetTurnRequest;
use wire::{Asked, ChatRequest, Head, Refusal, Usage};

/// Turns that are waited for here at once; further ones are refused until some have ended.
const TURNS_MAX: usize = 1024;
/// Bodies of requests that are read at the same time, in bytes. Further ones are refused.
const BODIES_BYTES_MAX: usize = 512 * 1024 * 1024;
/// In what pieces they are counted, in bytes.
const BODY_UNIT_BYTES: usize = 64 * 1024;
/// Larger bodies are parsed on a thread of their own.
const PARSE_HERE_MAX: usize = 256 * 1024;
/// How long the tokens of a turn are asked for; then the answer goes out without them.
const USAGE_DEADLINE: Duration = Duration::from_secs(3);
/// The services that it is a client of.
static SERVICES: [Service; 3] = [Service::Harness, Service::Registry, Service::State];

const SESSION_HEADER: HeaderName = HeaderName::from_static("x-vlinder-session");
const BRANCH_HEADER: HeaderName = HeaderName::from_static("x-vlinder-branch");
const SUBMISSION_HEADER: HeaderName = HeaderName::from_static("x-vlinder-submission");
const IDEMPOTENCY_HEADER: HeaderName = HeaderName::from_static("idempotency-key");
/// Official clients repeat what failed with 5xx. A turn that ran and failed is not to be repeated
/// by a machine: they heed this header.
const RETRY_HEADER: HeaderName = HeaderName::from_static("x-should-retry");

/// What the routes share; cheap to clone.
#[derive(Clone)]
struct Gateway(Arc<Shared>);

struct Shared {
    node: Arc<NodeFace>,
    listeners: Arc<Listeners>,
    peers: Peers,
    turns: Arc<Semaphore>,
    bodies: Arc<Semaphore>,
}

/// The routes of the gateway. They do not check the credential: whoever nests them does.
pub fn routes<S: Clone + Send + Sync + 'static>(
    node: Arc<NodeFace>,
    listeners: Arc<Listeners>,
) -> Router<S> {
    let gateway = Gateway(Arc::new(Shared {
        node,
        listeners,
        peers: Peers::new(&SERVICES),
        turns: Arc::new(Semaphore::new(TURNS_MAX)),
        bodies: Arc::new(Semaphore::new(BODIES_BYTES_MAX / BODY_UNIT_BYTES)),
    }));
    Router::new()
        .route("/v1/models", get(models).fallback(other_method))
        .route("/v1/models/{agent}", get(model).fallback(other_method))
        .route("/v1/chat/completions", post(chat).fallback(other_method))
        .route("/v1/{*rest}", axum::routing::any(no_route))
        .with_state(gateway)
}

/// Whether a path is answered in OpenAI's shapes.
pub fn is_below(path: &str) -> bool {
    path == "/v1" || path.starts_with("/v1/")
}

/// An error in OpenAI's shape.
pub fn error(status: StatusCode, code: &str, param: Option<&str>, message: &str) -> Response {
    let kind = match status.as_u16() {
        401 | 403 => "authentication_error",
        429 => "rate_limit_error",
        400..500 => "invalid_request_error",
        _ => "server_error",
    };
    (status, Json(wire::error(kind, code, param, message))).into_response()
}

async fn no_route() -> Response {
    let message = "there is /v1/chat/completions and /v1/models; each agent is a model";
    error(StatusCode::NOT_FOUND, "unknown_url", None, message)
}

async fn other_method() -> Response {
    let message = "this path takes another method";
    error(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        None,
        message,
    )
}

impl From<Refusal> for Response {
    fn from(refusal: Refusal) -> Self {
        let Refusal {
            param,
            code,
            message,
        } = refusal;
        error(StatusCode::BAD_REQUEST, code, param, &message)
    }
}

/// What an error of a service is to a client of OpenAI's.
fn refused(failed: &Error) -> Response {
    let (status, code) = match failed {
        Error::Unreachable { .. } | Error::Broken { .. } => (503, "unavailable"),
        Error::NoAnswer { .. } | Error::TurnLost { .. } => (504, "no_answer"),
        Error::Usage(_) => (500, "misconfigured"),
        Error::Service { code, .. } => match code {
            Code::InvalidArgument | Code::OutOfRange => (400, "invalid_value"),
            Code::NotFound => (404, "model_not_found"),
            Code::Aborted | Code::AlreadyExists | Code::FailedPrecondition => (409, "conflict"),
            Code::ResourceExhausted => (429, "exhausted"),
            Code::Unavailable => (503, "unavailable"),
            Code::DeadlineExceeded => (504, "deadline"),
            _ => (500, "internal"),
        },
    };
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = error(status, code, None, &failed.to_string());
    // A submission that was used otherwise stays so; a turn that runs will end.
    let is_final = matches!(
        failed,
        Error::Service {
            code: Code::AlreadyExists | Code::FailedPrecondition,
            ..
        } | Error::TurnLost { .. }
    );
    if is_final {
        response
            .headers_mut()
            .insert(RETRY_HEADER, HeaderValue::from_static("false"));
    }
    response
}

impl Gateway {
    /// A client of where the services are now: that may change with the configuration.
    fn client(&self) -> Result<Client, Error> {
        let config = self.0.node.config.borrow().clone();
        let token = config.auth.token.as_ref().map(|token| token.expose());
        let listening = self.0.listeners.addresses();
        let own = |service: Service| {
            let runs_here = self.0.listeners.of(service.role()).is_some();
            listening.get(service).filter(|_| runs_here).cloned()
        };
        self.0.peers.client(&config, token, own)
    }

    /// Reads a body, if it has room.
    async fn read(&self, request: Request) -> Result<(Bytes, OwnedSemaphorePermit), Response> {
        let max = BODY_BYTES_MAX as usize;
        let too_large = || {
            let message = format!("a request may have {max} bytes");
            error(StatusCode::PAYLOAD_TOO_LARGE, "too_large", None, &message)
        };
        let stated = request.headers().get(header::CONTENT_LENGTH);
        let stated = stated.and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
        let len = stated.unwrap_or(max);
        if len > max {
            return Err(too_large());
        }
        let units = len.div_ceil(BODY_UNIT_BYTES).max(1) as u32;
        let room = self.0.bodies.clone().try_acquire_many_owned(units);
        let room = room.map_err(|_| overloaded("too many large requests are being read"))?;
        let body = to_bytes(request.into_body(), max)
            .await
            .map_err(|_| too_large())?;
        Ok((body, room))
    }
}

fn overloaded(message: &str) -> Response {
    let mut response = error(StatusCode::TOO_MANY_REQUESTS, "overloaded", None, message);
    response
        .headers_mut()
        .insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

fn model_of(agent: &Agent) -> Value {
    json!({
        "id": agent.name, "object": "model", "created": agent.deployed_at / 1000, "owned_by": "vlinder"
    })
}

async fn models(State(gateway): State<Gateway>) -> Response {
    let listed = match gateway.client() {
        Ok(client) => client.list_agents(ListAgentsRequest::default()).await,
        Err(error) => Err(error),
    };
    match listed {
        Ok(listed) => {
            let models: Vec<Value> = listed.agents.iter().map(model_of).collect();
            Json(json!({ "object": "list", "data": models })).into_response()
        }
        Err(error) => refused(&error),
    }
}

async fn model(State(gateway): State<Gateway>, Path(agent): Path<String>) -> Response {
    let request = GetAgentRequest {
        name: agent,
        ..GetAgentRequest::default()
    };
    let found = match gateway.client() {
        Ok(client) => client.get_agent(request).await,
        Err(error) => Err(error),
    };
    match found {
        Ok(agent) => Json(model_of(&agent)).into_response(),
        Err(error) => refused(&error),
    }
}

async fn chat(State(gateway): State<Gateway>, request: Request) -> Response {
    answer(gateway, request)
        .await
        .unwrap_or_else(|refusal| refusal)
}

async fn answer(gateway: Gateway, request: Request) -> Result<Response, Response> {
    let place = gateway.0.turns.clone().try_acquire_owned();
    let place = place.map_err(|_| overloaded("too many turns are waited for on this node"))?;
    let headers = request.headers().clone();
    let (body, room) = gateway.read(request).await?;
    let asked = parse(body).await?;
    drop(room);
    let client = gateway.client().map_err(|error| refused(&error))?;
    let request = run_request(&headers, &asked)?;
    let mut turn = client.run(request);
    let accepted = begun(&mut turn).await.map_err(|error| refused(&error))?;
    let head = Head {
        id: format!("chatcmpl-{}", accepted.submission),
        created: now_ms() / 1000,
        model: asked.model,
    };
    let mut response = if asked.stream {
        let usage = asked.include_usage.then_some(client);
        stream::response(turn, head, usage, place)
    } else {
        whole(&client, &mut turn, &head).await
    };
    let names = [
        (SESSION_HEADER, accepted.session),
        (BRANCH_HEADER, accepted.branch),
        (SUBMISSION_HEADER, accepted.submission),
    ];
    for (name, value) in names {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(name, value);
        }
    }
    Ok(response)
}

async fn parse(body: Bytes) -> Result<Asked, Response> {
    let len = body.len();
    let parse = move || ChatRequest::parse(&body).and_then(ChatRequest::asked);
    let parsed = if len <= PARSE_HERE_MAX {
        parse()
    } else {
        match tokio::task::spawn_blocking(parse).await {
            Ok(parsed) => parsed,
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        }
    };
    parsed.map_err(Response::from)
}

/// A header's value, if it is there.
fn named<T>(
    headers: &HeaderMap,
    name: &HeaderName,
    read: impl Fn(&str) -> Result<T, vlinder_core::IdError>,
) -> Result<Option<T>, Response> {
    let Some(value) = headers.get(name) else {
        return Ok(None);
    };
    let text = value.to_str().unwrap_or_default();
    let read = read(text).map_err(|wrong| {
        let message = format!("header {name}: {wrong}");
        error(StatusCode::BAD_REQUEST, "invalid_header", None, &message)
    })?;
    Ok(Some(read))
}

fn run_request(headers: &HeaderMap, asked: &Asked) -> Result<RunRequest, Response> {
    let session = named(headers, &SESSION_HEADER, |text| SessionId::new(text))?;
    let branch = named(headers, &BRANCH_HEADER, |text| BranchName::new(text))?;
    let submission = named(headers, &IDEMPOTENCY_HEADER, |text| SubmissionId::new(text))?;
    let (session, session_name) = match (session, &asked.session) {
        (Some(session), _) => (Some(session), String::new()),
        (None, Some((session, name))) => (Some(session.clone()), name.clone()),
        (None, None) => (None, String::new()),
    };
    if branch.is_some() && session.is_none() {
        let message = "header x-vlinder-branch needs a session: name one with x-vlinder-session";
        return Err(error(
            StatusCode::BAD_REQUEST,
            "invalid_header",
            None,
            message,
        ));
    }
    let input = match &session {
        Some(_) => asked.news.clone(),
        None => asked.whole.clone(),
    };
    Ok(RunRequest {
        agent: asked.model.clone(),
        input: input.into_bytes(),
        session: session.map(|id| id.to_string()).unwrap_or_default(),
        branch: branch.map(|name| name.to_string()).unwrap_or_default(),
        // Who can ask again under the same name may leave; nobody else will ever see the answer.
        cancel_on_disconnect: submission.is_none(),
        submission: submission.map(|id| id.to_string()).unwrap_or_default(),
        stream: asked.stream,
        session_name,
        ..RunRequest::default()
    })
}

/// Waits until the turn is stored.
async fn begun(turn: &mut Turn) -> Result<Accepted, Error> {
    loop {
        match turn.next().await? {
            Some(TurnEvent::Accepted(accepted)) => return Ok(accepted),
            Some(_) => {}
            None => {
                let cause = "the harness ended the stream before it began".to_owned();
                let submission = turn.submission().to_owned();
                return Err(Error::TurnLost { submission, cause });
            }
        }
    }
}

/// Waits for the end and answers with it.
async fn whole(client: &Client, turn: &mut Turn, head: &Head) -> Response {
    let end = loop {
        match turn.next().await {
            Ok(Some(TurnEvent::End(end))) => break end,
            Ok(Some(_)) => {}
            Ok(None) => {
                let message = "the turn ended without an end";
                return error(StatusCode::INTERNAL_SERVER_ERROR, "internal", None, message);
            }
            Err(error) => return refused(&error),
        }
    };
    match failure(&end) {
        None => {
            let text = String::from_utf8_lossy(&end.output);
            let usage = usage_of(client, turn.submission()).await;
            Json(head.completion(&text, usage)).into_response()
        }
        Some((status, code, message)) => {
            let mut response = error(status, &code, None, &message);
            response
                .headers_mut()
                .insert(RETRY_HEADER, HeaderValue::from_static("false"));
            response
        }
    }
}

/// Why a turn brought no reply: status, code and message.
fn failure(end: &End) -> Option<(StatusCode, String, String)> {
    let status = match end.outcome.as_str() {
        "done" => return None,
        "deadline" => StatusCode::GATEWAY_TIMEOUT,
        "cancelled" => StatusCode::CONFLICT,
        _ => StatusCode::BAD_GATEWAY,
    };
    let code = match end.code.as_str() {
        "" => end.outcome.clone(),
        code => code.to_owned(),
    };
    let message = String::from_utf8_lossy(&end.output).into_owned();
    Some((status, code, message))
}

/// The tokens that a turn's calls took, as the record has them.
async fn usage_of(client: &Client, submission: &str) -> Option<Usage> {
    let request = GetTurnRequest {
        submission: submission.to_owned(),
        ..GetTurnRequest::default()
    };
    let asked = tokio::time::timeout(USAGE_DEADLINE, client.get_turn(request)).await;
    let turn = match asked {
        Ok(Ok(turn)) => turn,
        Ok(Err(error)) => {
            tracing::debug!(%error, "the tokens of a turn are not known");
            return None;
        }
        Err(_) => return None,
    };
    let calls = turn.calls.iter().filter_map(|detail| detail.call.as_ref());
    Some(calls.fold(Usage::default(), |sum, call| Usage {
        tokens_in: sum.tokens_in + call.tokens_in.unwrap_or(0),
        tokens_out: sum.tokens_out + call.tokens_out.unwrap_or(0),
    }))
}
