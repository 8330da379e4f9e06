//! The console: the record and the cluster as web pages, rendered here, usable without a build step.
//!
//! It is a client like any other: it reads the state and registry services and acts through the
//! harness. Whatever agents said is shown as text, never as markup; a strict Content-Security-Policy
//! stands behind that. It does not check credentials: the HTTP face in front of it does, and
//! refuses what other sites post.

mod act;
mod cluster;
mod compare;
mod graph;
mod page;
mod sessions;
mod text;
mod turn;

use axum::Router;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use std::path::Path;
use std::sync::Arc;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;
use vlinder_client::{Client, Error};

/// Finds the services as they are now; asked for each page.
pub type Clients = Arc<dyn Fn() -> Result<Client, Error> + Send + Sync>;

/// What the pages share.
#[derive(Clone)]
pub(crate) struct Console {
    clients: Clients,
}

impl Console {
    pub fn client(&self) -> Result<Client, page::Failure> {
        (self.clients)().map_err(page::Failure::from)
    }
}

/// All routes of the console.
pub fn routes(clients: Clients) -> Router {
    Router::new()
        .route("/", get(sessions::list))
        .route("/sessions/{session}", get(sessions::show))
        .route("/sessions/{session}/compare", get(compare::show))
        .route("/sessions/{session}/fork", post(act::fork))
        .route("/sessions/{session}/promote", post(act::promote))
        .route("/sessions/{session}/run", post(act::run))
        .route("/turns/{submission}", get(turn::show))
        .route("/turns/{submission}/cancel", post(act::cancel))
        .route("/bodies/{hash}", get(turn::body))
        .route("/agents", get(cluster::agents))
        .route("/cluster", get(cluster::show))
        .route("/assets/console.css", get(style))
        .route("/assets/console.js", get(script))
        .fallback(page::nothing_here)
        .with_state(Console { clients })
}

/// Serves the console on a socket in the file system until `drain` is cancelled. What an earlier worker
/// left at `path` is replaced.
pub async fn serve(
    path: &Path,
    clients: Clients,
    ready: impl FnOnce(),
    drain: CancellationToken,
) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    ready();
    let stopped = drain.clone();
    let serving = axum::serve(listener, routes(clients))
        .with_graceful_shutdown(async move { drain.cancelled().await });
    tokio::select! {
        served = serving => served,
        // Pages take little; a body that is read slowly does not hold up a stop.
        () = async { stopped.cancelled().await; tokio::time::sleep(DRAIN_WITHIN).await } => Ok(()),
    }
}

/// How long pages that are being answered may take when the worker stops.
const DRAIN_WITHIN: std::time::Duration = std::time::Duration::from_secs(2);

async fn style() -> Response {
    asset(
        "text/css; charset=utf-8",
        include_str!("../assets/console.css"),
    )
}

async fn script() -> Response {
    asset(
        "text/javascript; charset=utf-8",
        include_str!("../assets/console.js"),
    )
}

fn asset(kind: &'static str, body: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CACHE_CONTROL, "no-cache"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (headers, body).into_response()
}
