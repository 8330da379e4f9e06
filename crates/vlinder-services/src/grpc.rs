//! One gRPC server: listener, credential, health, reflection, drain.

use crate::auth::Gate;
use http_body_util::BodyExt;
use std::net::TcpListener;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpConnectInfo;
use tower::{Layer, Service};
use tracing::Instrument;
use vlinder_worker::Error;

/// Requests that one connection may have in flight.
const IN_FLIGHT_PER_CONNECTION: usize = 1024;
/// Pings on idle connections, so that a dead client is noticed.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// How long calls in flight may go on after the drain began.
const DRAIN: Duration = Duration::from_secs(10);

/// What connections without a call get to read that they are to go.
const FAREWELL: Duration = Duration::from_millis(50);

/// Serves `routes` on an inherited listener until `drain` is cancelled.
///
/// `name` is the full service name for the health service.
pub async fn serve(
    listener: TcpListener,
    routes: Routes,
    name: &'static str,
    gate: Gate,
    drain: CancellationToken,
) -> Result<(), Error> {
    let io = |what: &str| {
        let what = what.to_owned();
        move |source| Error::Io { what, source }
    };
    listener
        .set_nonblocking(true)
        .map_err(io("cannot use the inherited listener"))?;
    let listener = tokio::net::TcpListener::from_std(listener)
        .map_err(io("cannot use the inherited listener"))?;
    let (health, health_service) = tonic_health::server::health_reporter();
    health
        .set_service_status(name, tonic_health::ServingStatus::Serving)
        .await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(vlinder_proto::DESCRIPTORS)
        .build_v1()
        .map_err(|error| Error::Other(format!("cannot build the reflection service: {error}")))?;
    let routes = routes.add_service(health_service).add_service(reflection);
    let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
    let stop = drain.clone();
    let calls = TaskTracker::new();
    let server = Server::builder()
        .concurrency_limit_per_connection(IN_FLIGHT_PER_CONNECTION)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .layer(CallsLayer {
            calls: calls.clone(),
            span: tracing::Span::current(),
        })
        .layer(AuthLayer { gate })
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming, async move { stop.cancelled().await });
    tokio::pin!(server);
    tokio::select! {
        ended = &mut server => return ended.map_err(|error| Error::Other(format!("the gRPC server failed: {error}"))),
        () = drain.cancelled() => {}
    }
    // Calls hold up the drain, streams to slow clients not for ever, and connections without a
    // call not at all: one that never said a word would not end by itself.
    calls.close();
    let finished = async {
        calls.wait().await;
        tokio::time::sleep(FAREWELL).await;
    };
    tokio::select! {
        _ = &mut server => {}
        () = finished => {}
        () = tokio::time::sleep(DRAIN) => {
            tracing::info!("calls still open at the end of the drain were cut off");
        }
    }
    Ok(())
}

/// Knows which calls are in flight, from their request to the last byte of their answer.
#[derive(Clone)]
struct CallsLayer {
    calls: TaskTracker,
    /// The worker's: connections are tasks of the server's own.
    span: tracing::Span,
}

impl<S> Layer<S> for CallsLayer {
    type Service = Calls<S>;
    fn layer(&self, inner: S) -> Calls<S> {
        Calls {
            inner,
            calls: self.calls.clone(),
            span: self.span.clone(),
        }
    }
}

/// See [`CallsLayer`].
#[derive(Clone)]
struct Calls<S> {
    inner: S,
    calls: TaskTracker,
    span: tracing::Span,
}

impl<S, B> Service<hyper::Request<B>> for Calls<S>
where
    S: Service<hyper::Request<B>, Response = hyper::Response<tonic::body::Body>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: hyper::Request<B>) -> Self::Future {
        let in_flight = self.calls.token();
        let answered = self.span.in_scope(|| self.inner.call(request));
        let answered = answered.instrument(self.span.clone());
        Box::pin(async move {
            let answer = answered.await?;
            Ok(answer.map(|body| {
                tonic::body::Body::new(body.map_frame(move |frame| {
                    // Goes with the body.
                    let _ = &in_flight;
                    frame
                }))
            }))
        })
    }
}

/// Checks the credential of every call before any service sees it.
#[derive(Clone)]
pub struct AuthLayer {
    /// The check.
    pub gate: Gate,
}

impl<S> Layer<S> for AuthLayer {
    type Service = Auth<S>;
    fn layer(&self, inner: S) -> Auth<S> {
        Auth {
            inner,
            gate: self.gate.clone(),
        }
    }
}

/// See [`AuthLayer`].
#[derive(Clone)]
pub struct Auth<S> {
    inner: S,
    gate: Gate,
}

impl<S, B> Service<hyper::Request<B>> for Auth<S>
where
    S: Service<hyper::Request<B>, Response = hyper::Response<tonic::body::Body>>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
    B: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: hyper::Request<B>) -> Self::Future {
        let header = request
            .headers()
            .get("authorization")
            .and_then(|value| value.to_str().ok());
        let from = request
            .extensions()
            .get::<TcpConnectInfo>()
            .and_then(|info| info.remote_addr())
            .map(|address| address.ip());
        match self.gate.check(header, from) {
            Ok(()) => {
                // The service that was polled ready must be the one that is called.
                let clone = self.inner.clone();
                let mut ready = std::mem::replace(&mut self.inner, clone);
                Box::pin(async move { ready.call(request).await })
            }
            Err(refusal) => Box::pin(async move {
                tokio::time::sleep(refusal.delay).await;
                Ok(Status::unauthenticated(refusal.message).into_http())
            }),
        }
    }
}
