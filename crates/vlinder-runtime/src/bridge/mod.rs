//! The agent's face: an HTTP server that speaks what agents already speak and turns each call into a
//! request on the bus (interfaces.md §5).
//!
//! A caller is known by the secret in its path, per instance; what it may reach stands in its
//! manifest; and it reaches nothing while no invocation of it is open. Everything it gets is on record
//! and durable before it gets it. The bridge itself knows no state beyond the open invocations.

mod call;
mod callers;
mod delegate;
mod egress;
mod listing;
mod replay;
mod reply;
mod route;
mod secret;
mod stream;

pub(crate) use callers::{Admitted, Caller, Callers};
pub(crate) use delegate::DEPTH_MAX;

use crate::BODY_UNIT_BYTES;
use crate::agent::Shared;
use crate::http::QuickAck;
use crate::launcher::BridgeFace;
use crate::turn::INVOCATION_HEADER;
use crate::turn::answers::Answered;
use crate::turn::invocation::Invocation;
use bytes::{Bytes, BytesMut};
use call::{Answerer, Ask, CallError};
use callers::NoInvocation;
use hyper::body::{Body, Incoming};
use hyper::header::{CONTENT_LENGTH, HOST, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use reply::{Reply, ReplyBody, error, reply};
use route::{Refusal, Target};
use serde::Deserialize;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::JoinSet;
use tracing::Instrument;
use vlinder_bus::subjects;
use vlinder_core::record::CallResult;
use vlinder_core::{BODY_BYTES_MAX, Selector};
use vlinder_worker::infra::MODEL;

/// Connections that agents may have open altogether.
const CONNECTIONS_MAX: usize = 4096;
/// How long a connection may be silent between two requests, or within the head of one.
const IDLE_MAX: Duration = Duration::from_secs(600);
/// Pause after the system refused a connection (too many open files).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Longest `X-Vlinder-Checkpoint`, in bytes.
const LABEL_BYTES_MAX: usize = 256;
/// Longest text of `/progress`, in bytes.
const PROGRESS_BYTES_MAX: usize = 16 * 1024;
/// Names a point of the turn, for the record.
const CHECKPOINT_HEADER: &str = "x-vlinder-checkpoint";
/// Whether a `get` found something.
const FOUND_HEADER: &str = "vlinder-found";

/// The bridge for one instance, on a socket that it alone reaches.
pub(crate) fn face(shared: &Arc<Shared>, caller: &Arc<Caller>) -> BridgeFace {
    let (shared, caller) = (shared.clone(), caller.clone());
    BridgeFace::new(move |listener| Box::pin(serve(listener, shared.clone(), Some(caller.clone()))))
}

/// Serves agents until the future is dropped: one whom the socket tells, or any that shows its secret.
pub(crate) async fn serve(listener: TcpListener, shared: Arc<Shared>, caller: Option<Arc<Caller>>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (shared, caller) = (shared.clone(), caller.clone());
                let serving = async move {
                    connection(stream, shared, caller).await;
                    drop(place);
                };
                connections.spawn(serving.in_current_span());
            }
            Err(error) => {
                tracing::warn!(%error, "the bridge cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, shared: Arc<Shared>, caller: Option<Arc<Caller>>) {
    let Ok(stream) = QuickAck::new(stream) else {
        return;
    };
    let service = service_fn(move |request| {
        let (shared, caller) = (shared.clone(), caller.clone());
        async move { Ok::<_, Infallible>(answer(request, shared, caller).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "an agent's connection ended");
    }
}

/// What was asked, when it is known that it may be.
struct Allowed {
    caller: Arc<Caller>,
    invocation: Arc<Invocation>,
    target: Target,
    label: Option<String>,
}

async fn answer(
    request: Request<Incoming>,
    shared: Arc<Shared>,
    caller: Option<Arc<Caller>>,
) -> Reply {
    if let Some(caller) = &caller
        && let Some(to) = egress::outside(request.method(), request.uri())
    {
        return egress::answer(request, &shared, caller, to).await;
    }
    let allowed = match allow(&request, &shared, caller) {
        Ok(allowed) => allowed,
        Err(refusal) => return refusal,
    };
    let invocation = allowed.invocation.clone();
    let work = async {
        let _room = match room_for(&request, &shared).await {
            Ok(room) => room,
            Err(refusal) => return refusal,
        };
        match read(request).await {
            Ok(body) => perform(shared.clone(), allowed, body).await,
            Err(refusal) => refusal,
        }
    };
    tokio::select! {
        biased;
        answer = work => answer,
        () = invocation.closed() => of_error(&CallError::Closed),
    }
}

/// Waits until a large body has room; the room is taken until the call is answered. A body of unknown
/// length takes as much as it may.
async fn room_for<'a>(
    request: &Request<Incoming>,
    shared: &'a Shared,
) -> Result<Option<SemaphorePermit<'a>>, Reply> {
    let len = match stated_len(request) {
        Some(len) if len > BODY_BYTES_MAX => return Err(too_large()),
        Some(len) => len as usize,
        None if request.body().is_end_stream() => 0,
        None => BODY_BYTES_MAX as usize,
    };
    if len <= BODY_UNIT_BYTES {
        return Ok(None);
    }
    // One body is far below the bound, and nobody closes the semaphore.
    let units = (len / BODY_UNIT_BYTES) as u32;
    Ok(shared.bodies.acquire_many(units).await.ok())
}

fn stated_len(request: &Request<Incoming>) -> Option<u64> {
    let stated = request.headers().get(CONTENT_LENGTH)?;
    stated.to_str().ok()?.parse().ok()
}

fn too_large() -> Reply {
    let message = format!("a body may have {BODY_BYTES_MAX} bytes");
    error(413, "too_large", &message)
}

/// Who calls, for which invocation, and what: in the order in which it costs least to refuse.
#[expect(
    clippy::result_large_err,
    reason = "the refusal is the answer itself, made once a call"
)]
fn allow(
    request: &Request<Incoming>,
    shared: &Shared,
    caller: Option<Arc<Caller>>,
) -> Result<Allowed, Reply> {
    let header = |name: &str| {
        request
            .headers()
            .get(name)
            .and_then(|value| value.to_str().ok())
    };
    let host = header(HOST.as_str());
    let (caller, path) = match caller {
        Some(caller) => {
            let path = route::parse_known(request.uri().path(), host);
            let path = path.ok_or_else(|| error(414, "too_long", "the path is too long"))?;
            (caller, path)
        }
        None => by_secret(request.uri().path(), host, shared)?,
    };
    let manifest = caller.deployment.manifest();
    let target = route::target(manifest, request.method(), path.service, path.call)
        .map_err(|refusal| refused(&refusal, &path))?;
    let invocation = caller.find(header(INVOCATION_HEADER)).map_err(|why| match why {
        NoInvocation::NotOpen => {
            error(409, "no_invocation", "no such invocation is open: calls are answered only while /invoke runs")
        }
        NoInvocation::Unnamed => {
            let message = "an agent with a concurrency above 1 must send the X-Vlinder-Invocation that it was given";
            error(400, "invocation_missing", message)
        }
    })?;
    let label = match header(CHECKPOINT_HEADER) {
        Some(label) if label.len() > LABEL_BYTES_MAX => {
            let message = format!("X-Vlinder-Checkpoint has more than {LABEL_BYTES_MAX} bytes");
            return Err(error(400, "bad_checkpoint", &message));
        }
        label => label.map(str::to_owned),
    };
    Ok(Allowed {
        caller,
        invocation,
        target,
        label,
    })
}

/// Who shows a secret that this worker gave out, and what is left of the path.
#[expect(
    clippy::result_large_err,
    reason = "the refusal is the answer itself, made once a call"
)]
fn by_secret<'a>(
    path: &'a str,
    host: Option<&'a str>,
    shared: &Shared,
) -> Result<(Arc<Caller>, route::Path<'a>), Reply> {
    let path = route::parse(path, host).ok_or_else(|| {
        error(
            401,
            "no_secret",
            "the path must begin with the secret of VLINDER_BRIDGE_URL",
        )
    })?;
    let caller = shared.callers.by_secret(path.secret).ok_or_else(|| {
        error(
            401,
            "unknown_secret",
            "use VLINDER_BRIDGE_URL as it is in the environment",
        )
    })?;
    Ok((caller, path))
}

fn refused(refusal: &Refusal, path: &route::Path<'_>) -> Reply {
    let service: String = path.service.chars().take(64).collect();
    match refusal {
        Refusal::UnknownService => error(
            404,
            "unknown_service",
            &format!("there is no service {service:?}"),
        ),
        Refusal::UnknownCall => {
            let call: String = path.call.chars().take(64).collect();
            error(
                404,
                "unknown_call",
                &format!("{service} has no call {call:?}"),
            )
        }
        Refusal::NotDeclared => {
            let message = format!(
                "the agent's manifest does not declare what {service} needs: see requirements.services, object_storage and vector_storage"
            );
            error(403, "not_declared", &message)
        }
        Refusal::Method(wanted) => error(405, "method_not_allowed", &format!("use {wanted}")),
        Refusal::NotBuilt(what) => error(
            501,
            "not_implemented",
            &format!("this release does not have {what}"),
        ),
    }
}

async fn read(request: Request<Incoming>) -> Result<Bytes, Reply> {
    let stated = stated_len(&request);
    let mut incoming = request.into_body();
    let mut first = Bytes::new();
    let mut all = BytesMut::new();
    loop {
        let frame = std::future::poll_fn(|cx| Pin::new(&mut incoming).poll_frame(cx)).await;
        let bytes = match frame {
            None => break,
            Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
            Some(Err(cause)) => {
                return Err(error(
                    400,
                    "bad_request",
                    &format!("the body cannot be read: {cause}"),
                ));
            }
        };
        if (first.len() + all.len() + bytes.len()) as u64 > BODY_BYTES_MAX {
            return Err(too_large());
        }
        if first.is_empty() && all.is_empty() {
            // Most bodies are one piece and need no copy.
            first = bytes;
            continue;
        }
        if all.is_empty() {
            all.reserve(stated.unwrap_or(0) as usize);
            all.extend_from_slice(&std::mem::take(&mut first));
        }
        all.extend_from_slice(&bytes);
    }
    Ok(if all.is_empty() { first } else { all.freeze() })
}

/// What the bridge reads of a request to a model; the rest is the upstream's.
#[derive(Deserialize)]
struct ModelBody {
    model: Option<String>,
    stream: Option<bool>,
}

async fn perform(shared: Arc<Shared>, allowed: Allowed, body: Bytes) -> Reply {
    let Allowed {
        caller,
        invocation,
        target,
        label,
    } = allowed;
    let ask = match target {
        Target::Progress => return progress(&shared, &invocation, &body).await,
        Target::Delegate => {
            return delegate::delegate(&shared, &invocation, &body, label).await;
        }
        Target::Wait => return delegate::wait(&shared, &invocation, &body, label).await,
        Target::Secret => {
            let manifest = caller.deployment.manifest();
            return secret::perform(&shared, &invocation, manifest, &body, label).await;
        }
        Target::Store {
            service,
            store,
            operation,
            changes_state,
        } => {
            let Ok(selector) = Selector::new(&store.path) else {
                return error(
                    500,
                    "bad_store",
                    "the name of the store cannot be addressed",
                );
            };
            Ask {
                service,
                backend: store.scheme,
                operation,
                selector,
                body,
                label,
                answerer: Answerer::Store { changes_state },
            }
        }
        Target::Models { backend, operation } => {
            let offered = match listing::offered(&shared.cx.bus, backend).await {
                Ok(offered) => offered,
                Err(cause) => return of_error(&cause.into()),
            };
            Ask {
                service: "infer",
                backend: backend.to_owned(),
                operation,
                selector: Selector::none(),
                body: Bytes::new(),
                label,
                answerer: Answerer::Bridge(listing::answer(operation, backend, &offered)),
            }
        }
        Target::Model {
            service,
            backend,
            operation,
            streams_by_default,
        } => {
            let wanted: ModelBody = match serde_json::from_slice(&body) {
                Ok(wanted) => wanted,
                Err(cause) => {
                    return error(
                        400,
                        "bad_request",
                        &format!("the body is not a JSON object as {operation} takes it: {cause}"),
                    );
                }
            };
            let replaced = invocation.source.as_ref();
            let replaced = replaced.and_then(|source| source.model.as_ref());
            let (name, body) = match replaced.filter(|_| service == "infer") {
                None => (wanted.model, body),
                Some(model) => (Some(model.to_string()), with_model(&body, model)),
            };
            let model = match known_model(&shared, backend, name.as_deref()).await {
                Ok(model) => model,
                Err(refusal) => return refusal,
            };
            let ask = Ask {
                service,
                backend: backend.to_owned(),
                operation,
                selector: model,
                body,
                label,
                answerer: Answerer::Model,
            };
            if wanted.stream.unwrap_or(streams_by_default) {
                let streamed = stream::perform(shared, invocation, Arc::new(ask)).await;
                return streamed.unwrap_or_else(|error| of_error(&error));
            }
            ask
        }
    };
    let answered = run(&shared, invocation, Arc::new(ask)).await;
    let replied = match answered {
        Ok(answered) => of_answer(&shared, &answered).await,
        Err(error) => Err(error),
    };
    replied.unwrap_or_else(|error| of_error(&error))
}

/// The same request to another model.
fn with_model(body: &Bytes, model: &Selector) -> Bytes {
    match serde_json::from_slice::<serde_json::Map<_, _>>(body) {
        Ok(mut fields) => {
            fields.insert("model".to_owned(), model.as_str().into());
            serde_json::Value::Object(fields).to_string().into()
        }
        // It was read as an object before.
        Err(_) => body.clone(),
    }
}

/// A call that changes state runs to its end even when the agent hangs up: the next one builds on it.
async fn run(
    shared: &Arc<Shared>,
    invocation: Arc<Invocation>,
    ask: Arc<Ask>,
) -> Result<Arc<Answered>, CallError> {
    if ask.answerer
        != (Answerer::Store {
            changes_state: true,
        })
    {
        return call::perform(shared, &invocation, ask).await;
    }
    let shared = shared.clone();
    // Ends with the answer or with the turn.
    let work = async move { call::perform(&shared, &invocation, ask).await };
    let work = tokio::spawn(work.in_current_span());
    work.await.unwrap_or(Err(CallError::Closed))
}

async fn of_answer(shared: &Shared, answered: &Answered) -> Result<Reply, CallError> {
    let body = answered.body(&shared.cx.bus, &shared.cx.log()).await?;
    let reply = reply(answered.result.http, &answered.result.content_type, body);
    Ok(with_answer_headers(reply, &answered.result))
}

fn with_answer_headers(mut reply: Response<ReplyBody>, result: &CallResult) -> Reply {
    if let Some(found) = result.found {
        let found = HeaderValue::from_static(if found { "true" } else { "false" });
        reply.headers_mut().insert(FOUND_HEADER, found);
    }
    reply
}

fn of_error(cause: &CallError) -> Reply {
    match cause {
        CallError::Closed => error(409, "no_invocation", "the invocation is over"),
        CallError::TooManyOpen(_) => error(429, "too_many_calls", &cause.to_string()),
        CallError::TooMany(_) => error(429, "too_many_calls", &cause.to_string()),
        CallError::Bus(reason) => {
            tracing::warn!(error = %reason, "a call failed because the bus did");
            match reason {
                vlinder_bus::Error::Full { .. } => error(507, "log_full", &reason.to_string()),
                vlinder_bus::Error::TooLarge { .. } => error(413, "too_large", &reason.to_string()),
                _ => error(
                    503,
                    "bus_unavailable",
                    "the node's bus did not take the call; try again",
                ),
            }
        }
    }
}

/// The selector of a model that some upstream has offered at least once.
async fn known_model(
    shared: &Shared,
    backend: &str,
    model: Option<&str>,
) -> Result<Selector, Reply> {
    let Some(model) = model.filter(|model| !model.is_empty()) else {
        return Err(error(400, "model_missing", "the body must name a model"));
    };
    let mut names = vec![model.to_owned()];
    if backend == "ollama" && !model.contains(':') {
        names.push(format!("{model}:latest"));
    }
    let find = |infra: &vlinder_worker::infra::Infra| {
        let known = names.iter().find(|name| infra.model_known(backend, name));
        known.and_then(|name| Selector::new(name).ok())
    };
    if let Some(found) = find(&shared.infra.now()) {
        return Ok(found);
    }
    // The view may be a moment behind a model that has just been added.
    let infra = match shared.infra.fresh().await {
        Ok(infra) => infra,
        Err(cause) => {
            tracing::warn!(error = %cause, "which models are known cannot be read");
            shared.infra.now()
        }
    };
    find(&infra).ok_or_else(|| {
        let message = listing::unknown(backend, model, infra.all(MODEL).map(|(name, _)| name));
        error(404, "model_not_found", &message)
    })
}

#[derive(Deserialize)]
struct ProgressBody {
    text: String,
}

/// Tells whoever watches the turn how far it is. Not recorded: it says nothing about what was done.
async fn progress(shared: &Shared, invocation: &Invocation, body: &[u8]) -> Reply {
    let text = match serde_json::from_slice::<ProgressBody>(body) {
        Ok(body) if body.text.len() <= PROGRESS_BYTES_MAX => body.text,
        Ok(_) => {
            return error(
                413,
                "too_large",
                &format!("text may have {PROGRESS_BYTES_MAX} bytes"),
            );
        }
        Err(cause) => {
            return error(
                400,
                "bad_request",
                &format!("expected {{\"text\": …}}: {cause}"),
            );
        }
    };
    let cx = &shared.cx;
    let subject = subjects::chunk_signal(&cx.ns, &invocation.turn.invoke.submission);
    let signal = serde_json::json!({ "kind": "progress", "text": text });
    match cx.bus.signal(&subject, signal.to_string().into()).await {
        Ok(()) => reply(200, "application/json", Bytes::from_static(b"{}")),
        Err(cause) => of_error(&cause.into()),
    }
}
