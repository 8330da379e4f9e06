//! The HTTP face (interfaces.md §6): health, readiness, metrics, events, the state of the cluster, and
//! the OpenAI-compatible gateway; all else is the console's.
//! Served by the daemon itself, so that it answers whatever its workers do. Every route asks for the
//! credential.

use crate::door::{self, Door};
use crate::listeners::Listeners;
use crate::node::NodeFace;
use crate::{console, gateway};
use axum::Router;
use axum::extract::{ConnectInfo, Form, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use futures::StreamExt;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use vlinder_core::WorkerRole;
use vlinder_services::auth::Gate;
use vlinder_services::harness::events;
use vlinder_supervisor::NodePhase;
use vlinder_worker::{WorkerCx, nodes};

/// How long a look at the bus may take.
const BUS_DEADLINE: Duration = Duration::from_secs(2);

/// What is served here, and what it is: the index at `/` for programs; browsers get the console there.
const SERVED: [(&str, &str); 7] = [
    ("/healthz", "200 while the daemon turns"),
    (
        "/readyz",
        "200 when every worker is up and the bus answers, else 503 with what is missing",
    ),
    ("/metrics", "figures of this node in Prometheus text format"),
    (
        "/events",
        "changes as they happen, as server-sent events; ?prefix=turn. takes only some",
    ),
    (
        "/state/cluster",
        "nodes and workers as they report themselves, as JSON",
    ),
    ("/v1/models", "the agents, as models in OpenAI's format"),
    (
        "/v1/chat/completions",
        "POST: one turn of an agent, in OpenAI's format",
    ),
];

#[derive(Clone)]
struct Face {
    node: Arc<NodeFace>,
    cx: WorkerCx,
    door: Arc<Door>,
}

/// Serves until the daemon ends.
pub async fn serve(node: Arc<NodeFace>, cx: WorkerCx, listeners: &Arc<Listeners>, gate: Gate) {
    let gateway = gateway::routes(node.clone(), listeners.clone());
    let door = Arc::new(Door::new(gate));
    let face = Face { node, cx, door };
    let routes = Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/events", get(event_stream))
        .route("/state/cluster", get(cluster))
        .merge(gateway)
        .fallback(elsewhere)
        .layer(middleware::from_fn_with_state(face.clone(), check))
        .route("/login", post(log_in))
        .with_state(face);
    let listener = listeners
        .http
        .try_clone()
        .and_then(|socket| socket.set_nonblocking(true).map(|()| socket))
        .and_then(tokio::net::TcpListener::from_std);
    let listener = match listener {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "the HTTP face cannot listen"),
    };
    let service = routes.into_make_service_with_connect_info::<SocketAddr>();
    if let Err(error) = axum::serve(listener, service).await {
        tracing::error!(%error, "the HTTP face ended");
    }
}

/// Every route but the sign-in asks for the credential, as a bearer token or as a browser's sign-in.
async fn check(
    State(face): State<Face>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
    request: Request,
    next: Next,
) -> Response {
    let refusal = match face
        .door
        .check(request.method(), request.headers(), from.ip())
    {
        Ok(()) => return next.run(request).await,
        Err(refusal) => refusal,
    };
    tokio::time::sleep(refusal.delay).await;
    let status = StatusCode::UNAUTHORIZED;
    let is_gateway = gateway::is_below(request.uri().path());
    if !is_gateway && door::wants_a_page(request.headers()) {
        let path = request.uri().path_and_query();
        return door::sign_in(path.map_or("/", |path| path.as_str()), None);
    }
    let mut response = match is_gateway {
        true => gateway::error(status, "unauthenticated", None, refusal.message),
        false => error(status, "unauthenticated", refusal.message),
    };
    response.headers_mut().insert(
        header::WWW_AUTHENTICATE,
        header::HeaderValue::from_static("Bearer"),
    );
    response
}

/// `POST /login`: a browser's sign-in.
async fn log_in(
    State(face): State<Face>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    Form(form): Form<door::SignIn>,
) -> Response {
    face.door.sign_in(&headers, from.ip(), form).await
}

/// What the daemon does not serve itself is the console's, where this node has one that works.
async fn elsewhere(State(face): State<Face>, request: Request) -> Response {
    let is_page = door::wants_a_page(request.headers());
    let path = request.uri().path();
    if path == "/" && !is_page {
        return index(&face);
    }
    let workers = face.node.supervisor.status().borrow().workers.clone();
    let indexes = workers
        .iter()
        .filter(|worker| worker.key.role == WorkerRole::SessionViewer && worker.state.is_up())
        .map(|worker| worker.key.index);
    let is_index = path == "/";
    match console::forward(&face.cx.data_dir, indexes, request).await {
        Ok(response) => response,
        Err(console::Away) if is_index => index(&face),
        Err(console::Away) => nothing_here(),
    }
}

fn error(status: StatusCode, code: &str, message: &str) -> Response {
    (
        status,
        Json(json!({ "error": { "code": code, "message": message } })),
    )
        .into_response()
}

fn nothing_here() -> Response {
    let paths: Vec<&str> = SERVED.iter().map(|(path, _)| *path).collect();
    let message = format!(
        "there is {}; and the console, where a session_viewer worker is ready",
        paths.join(", ")
    );
    error(StatusCode::NOT_FOUND, "not_found", &message)
}

/// What this face serves.
fn index(face: &Face) -> Response {
    let routes: Vec<Value> = SERVED
        .iter()
        .map(|(path, what)| json!({ "path": path, "what": what }))
        .collect();
    let index = json!({
        "service": "vlinderd",
        "version": env!("CARGO_PKG_VERSION"),
        "node": face.cx.id.node.as_str(),
        "console": "/ in a browser, where a session_viewer worker is ready",
        "routes": routes,
    });
    let text = format!("{index:#}\n");
    ([(header::CONTENT_TYPE, "application/json")], text).into_response()
}

/// The daemon turns.
async fn healthz() -> Response {
    Json(json!({ "status": "ok" })).into_response()
}

/// Every worker is up and the bus answers; else 503 with what is missing.
async fn readyz(State(face): State<Face>) -> Response {
    let status = face.node.supervisor.status().borrow().clone();
    let mut missing = Vec::new();
    if status.phase != NodePhase::Running {
        missing.push(format!("the node is {}", phase_name(status.phase)));
    }
    for worker in status.workers.iter().filter(|worker| !worker.state.is_up()) {
        let reason = worker.reason.as_deref().unwrap_or_default();
        missing.push(
            format!("{} is {} {reason}", worker.key, worker.state)
                .trim_end()
                .to_owned(),
        );
    }
    match tokio::time::timeout(BUS_DEADLINE, face.cx.bus.ping()).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => missing.push(error.to_string()),
        Err(_) => missing.push("the bus does not answer".to_owned()),
    }
    let code = if missing.is_empty() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (
        code,
        Json(json!({ "ready": missing.is_empty(), "missing": missing })),
    )
        .into_response()
}

fn phase_name(phase: NodePhase) -> &'static str {
    match phase {
        NodePhase::Starting { .. } => "starting",
        NodePhase::Running => "running",
        NodePhase::Draining => "draining",
        NodePhase::Stopped => "stopped",
    }
}

/// Prometheus text format, version 0.0.4.
async fn metrics(State(face): State<Face>) -> Response {
    let status = face.node.supervisor.status().borrow().clone();
    let mut text = String::new();
    let mut help = |name: &str, kind: &str, what: &str| {
        let _ = writeln!(text, "# HELP {name} {what}\n# TYPE {name} {kind}");
        std::mem::take(&mut text)
    };
    let mut all = String::new();
    all += &help(
        "vlinder_worker_up",
        "gauge",
        "Whether a worker can do its job (1) or not (0).",
    );
    for worker in &status.workers {
        let labels = format!(
            "role=\"{}\",index=\"{}\"",
            worker.key.role, worker.key.index
        );
        let _ = writeln!(
            all,
            "vlinder_worker_up{{{labels}}} {}",
            u8::from(worker.state.is_up())
        );
    }
    all += &help(
        "vlinder_worker_restarts_total",
        "counter",
        "Starts of a worker after the first.",
    );
    for worker in &status.workers {
        let labels = format!(
            "role=\"{}\",index=\"{}\"",
            worker.key.role, worker.key.index
        );
        let _ = writeln!(
            all,
            "vlinder_worker_restarts_total{{{labels}}} {}",
            worker.restarts
        );
    }
    // What inference workers note of their upstreams; others note nothing of that name.
    for (note, name, kind, what) in [
        (
            "circuits_open",
            "vlinder_circuits_open",
            "gauge",
            "Models of the worker's upstream that are left alone because they keep failing.",
        ),
        (
            "circuits_opened_total",
            "vlinder_circuits_opened_total",
            "counter",
            "How often a model was left alone since the worker began.",
        ),
    ] {
        all += &help(name, kind, what);
        for worker in &status.workers {
            let noted = worker.notes.get(note).and_then(|text| text.parse().ok());
            let Some(count): Option<u64> = noted else {
                continue;
            };
            let (role, index) = (worker.key.role, worker.key.index);
            let _ = writeln!(all, "{name}{{role=\"{role}\",index=\"{index}\"}} {count}");
        }
    }
    let log = face.cx.log();
    if let Ok(Ok(info)) = tokio::time::timeout(BUS_DEADLINE, face.cx.bus.stream_info(&log)).await {
        all += &help("vlinder_log_messages", "gauge", "Messages in the log.");
        let _ = writeln!(all, "vlinder_log_messages {}", info.messages);
        all += &help("vlinder_log_bytes", "gauge", "Size of the log in bytes.");
        let _ = writeln!(all, "vlinder_log_bytes {}", info.bytes);
        all += &help(
            "vlinder_log_bytes_max",
            "gauge",
            "Limit of the log in bytes.",
        );
        let _ = writeln!(all, "vlinder_log_bytes_max {}", info.max_bytes);
    }
    all += &help(
        "vlinder_log_healings_total",
        "counter",
        "How often a stream had lost its tail and was healed.",
    );
    let mut healed = help(
        "vlinder_log_healed_messages",
        "gauge",
        "What became of the messages of the latest loss.",
    );
    for stream in [face.cx.log(), face.cx.ctl()] {
        let asked = tokio::time::timeout(BUS_DEADLINE, face.cx.bus.healing(&stream)).await;
        let Ok(Ok(Some(healing))) = asked else {
            continue;
        };
        let _ = writeln!(
            all,
            "vlinder_log_healings_total{{stream=\"{stream}\"}} {}",
            healing.epoch
        );
        for (fate, count) in [
            ("healed", healing.healed),
            ("displaced", healing.displaced),
            ("present", healing.present),
            ("superseded", healing.superseded),
            ("gone", healing.gone),
        ] {
            let _ = writeln!(
                healed,
                "vlinder_log_healed_messages{{stream=\"{stream}\",fate=\"{fate}\"}} {count}"
            );
        }
    }
    all += &healed;
    if let Ok(Ok(queues)) = tokio::time::timeout(BUS_DEADLINE, face.cx.bus.queues(&log)).await {
        all += &help(
            "vlinder_queue_waiting",
            "gauge",
            "Messages that no worker has been given yet.",
        );
        for queue in &queues {
            let _ = writeln!(
                all,
                "vlinder_queue_waiting{{queue=\"{}\"}} {}",
                queue.name, queue.waiting
            );
        }
        all += &help("vlinder_queue_held", "gauge", "Messages that workers hold.");
        for queue in &queues {
            let _ = writeln!(
                all,
                "vlinder_queue_held{{queue=\"{}\"}} {}",
                queue.name, queue.held
            );
        }
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], all).into_response()
}

#[derive(serde::Deserialize)]
struct EventsQuery {
    #[serde(default)]
    prefix: String,
}

/// Changes as they happen, as server-sent events.
async fn event_stream(State(face): State<Face>, Query(query): Query<EventsQuery>) -> Response {
    match events::stream(&face.cx, query.prefix).await {
        Ok(stream) => {
            let events = stream.filter_map(|event| async move {
                let event = event.ok()?;
                let data: Value = serde_json::from_str(&event.data).unwrap_or_default();
                let data = json!({ "name": event.name, "time_ms": event.time_ms, "data": data });
                Some(Ok::<_, std::convert::Infallible>(
                    Event::default()
                        .id(event.id)
                        .event(event.name)
                        .data(data.to_string()),
                ))
            });
            Sse::new(events)
                .keep_alive(KeepAlive::default())
                .into_response()
        }
        Err(status) => error(StatusCode::BAD_REQUEST, "bad_request", status.message()),
    }
}

/// Nodes and workers as they report themselves.
async fn cluster(State(face): State<Face>) -> Response {
    let reports = match tokio::time::timeout(BUS_DEADLINE, nodes::read_all(&face.cx.bus)).await {
        Ok(Ok(reports)) => reports,
        Ok(Err(bus)) => return error(StatusCode::SERVICE_UNAVAILABLE, "bus", &bus.to_string()),
        Err(_) => {
            return error(
                StatusCode::SERVICE_UNAVAILABLE,
                "bus",
                "the bus does not answer",
            );
        }
    };
    let nodes: Vec<Value> = reports
        .iter()
        .filter(|(_, report)| !report.left)
        .map(|(entry, report)| {
            let fresh = report.is_live(&face.cx.bus, entry);
            let mut value = serde_json::to_value(report).unwrap_or_default();
            value["state"] = if fresh { "ready" } else { "not-ready" }.into();
            value["last_seen_ms"] = face.cx.bus.now_ms().saturating_sub(entry.time_ms).into();
            value
        })
        .collect();
    Json(json!({ "nodes": nodes })).into_response()
}
