//! The connection to NATS: made with a deadline, watched, and never waited on without a bound.
//!
//! * [`connect`] tries until the deadline and refuses servers that are not fit.
//! * [`Link::request`] is the only way that requests leave this backend: it waits for a connection
//!   no longer than it may, and when the connection breaks under an open request it says so at once
//!   instead of sitting out the timeout, so that callers retry as soon as the server is back.
//! * [`Link::watch`] tells connected from disconnected; the generation counts connections.
//!
//! It does not retry requests: whoever knows what a repeat would mean does that.

use super::fitness::{self, Probe};
use crate::error::Error;
use async_nats::jetstream;
use async_nats::{Client, ConnectErrorKind, Event, HeaderMap, Message, Request, ServerAddr};
use bytes::Bytes;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A dead peer is noticed after two of these; the client's own default is a minute.
const PING_INTERVAL: Duration = Duration::from_secs(2);
/// One attempt to connect, name resolution and TLS included.
const CONNECT_TRY: Duration = Duration::from_secs(2);
/// Longest pause between two attempts to connect.
const RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(1);
/// The same at first: whoever comes back late keeps those waiting who were faster, and a server that is
/// only restarted is away for a few seconds. A refused attempt costs some microseconds.
const RECONNECT_PAUSE_AT_FIRST: Duration = Duration::from_millis(200);
/// How many attempts are made so quickly, some 20 s.
const RECONNECTS_AT_FIRST: usize = 100;
/// Messages that one subscription may have unread; more are dropped and reported. A waiter that is
/// this far behind must read the log anyway.
const SUBSCRIPTION_CAPACITY: usize = 16 * 1024;
/// Tasks of the backend get this long to hand back what they hold when it closes.
const CLOSE_WAIT: Duration = Duration::from_secs(2);
/// One JetStream API request.
pub(super) const API_WAIT: Duration = Duration::from_secs(5);

/// How to reach NATS, and how the log is to be kept there.
#[derive(Clone, Default)]
pub struct NatsOptions {
    /// Servers, `nats://host:port` or `tls://host:port`; any of them will do.
    pub urls: Vec<String>,
    /// Credentials file (JWT and seed).
    pub creds: Option<PathBuf>,
    /// Seed of a user nkey.
    pub nkey: Option<String>,
    /// Token.
    pub token: Option<String>,
    /// Certificate authority, PEM; the platform's where none is given.
    pub ca: Option<PathBuf>,
    /// Client certificate, PEM.
    pub cert: Option<PathBuf>,
    /// Key of the client certificate, PEM.
    pub key: Option<PathBuf>,
    /// Copies of every stream: 1, 3 or 5 (0 means 1).
    pub replicas: usize,
    /// Limit of a namespace's log in bytes; also of the blob store.
    pub max_bytes: u64,
    /// Streams that exist keep as many copies as they have.
    pub keep_replicas: bool,
    /// Streams that exist keep their limits.
    pub keep_max_bytes: bool,
    /// `queue.sync = "always"` was asked for. That is the server's to keep (`sync_interval: always`);
    /// it cannot be seen over the protocol, so connecting says so once.
    pub sync_always: bool,
    /// Name of this connection in the server's listings.
    pub name: String,
}

/// Whether there is a connection, and the how-manieth it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LinkState {
    pub connected: bool,
    pub generation: u64,
}

/// Why a request has no answer.
#[derive(Debug)]
pub(super) enum Failure {
    /// The server knows nobody who would answer: no such stream or consumer, or its leader is away.
    NoResponders,
    /// Anything else.
    Other(Error),
}

/// The connection, shared by everything in the backend.
#[derive(Clone)]
pub(super) struct Link {
    pub client: Client,
    pub context: jetstream::Context,
    /// What of a stream that exists is left as it is.
    pub kept: &'static [&'static str],
    /// For error messages; carries no credentials.
    pub address: Arc<str>,
    state: watch::Receiver<LinkState>,
    /// The same for those outside: connected or not.
    pub up: watch::Receiver<bool>,
    /// When the present connection was made, by the local clock in milliseconds since the Unix epoch;
    /// changes with each, when subscriptions are in force again.
    pub connections: watch::Receiver<u64>,
    pub dropped: Arc<AtomicU64>,
    pub tasks: TaskTracker,
    pub stop: CancellationToken,
}

/// Connects, trying until `deadline` has passed.
pub(super) async fn connect(
    options: &NatsOptions,
    deadline: Duration,
) -> Result<(Link, Probe), Error> {
    let until = Instant::now() + deadline;
    let mut pause = Duration::from_millis(20);
    loop {
        let attempt = tokio::time::timeout_at(until, try_connect(options)).await;
        let error = match attempt {
            Ok(Err(error)) if error.is_retryable() => error,
            Ok(outcome) => return outcome,
            Err(_) => unreachable(&public_address(&options.urls), "no answer in time"),
        };
        if Instant::now() + pause >= until {
            return Err(match error {
                Error::Timeout { .. } => unreachable(
                    &public_address(&options.urls),
                    "it accepts connections but JetStream does not answer",
                ),
                error => error,
            });
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RECONNECT_PAUSE_MAX);
    }
}

/// What the server is and how far away; connects once and leaves.
pub async fn probe(options: &NatsOptions) -> Result<Probe, Error> {
    let (link, probe) = tokio::time::timeout(CONNECT_TRY + API_WAIT, try_connect(options))
        .await
        .map_err(|_| unreachable(&public_address(&options.urls), "no answer in time"))??;
    link.close().await;
    Ok(probe)
}

async fn try_connect(options: &NatsOptions) -> Result<(Link, Probe), Error> {
    let address = public_address(&options.urls);
    let (state_sender, state) = watch::channel(LinkState {
        connected: false,
        generation: 0,
    });
    let (up_sender, up) = watch::channel(false);
    let (connections_sender, connections) = watch::channel(0);
    let dropped = Arc::new(AtomicU64::new(0));
    let connecting = client_options(options, &address)
        .await?
        .event_callback(event_handler(
            state_sender,
            up_sender,
            connections_sender,
            dropped.clone(),
            address.clone(),
        ));
    let servers = options
        .urls
        .iter()
        .map(|url| url.parse::<ServerAddr>())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| unfit(&address, format!("the address is not valid: {error}")))?;
    let client = connecting
        .connect(servers)
        .await
        .map_err(|error| connect_error(&address, &error))?;
    let link = Link {
        context: jetstream::new(client.clone()),
        client,
        kept: match (options.keep_replicas, options.keep_max_bytes) {
            (false, false) => &[],
            (true, false) => &["num_replicas"],
            (false, true) => &["max_bytes"],
            (true, true) => &["num_replicas", "max_bytes"],
        },
        address: address.into(),
        state,
        up,
        connections,
        dropped,
        tasks: TaskTracker::new(),
        stop: CancellationToken::new(),
    };
    let probe = fitness::check(&link).await?;
    if let Some(warning) = &probe.warning {
        tracing::warn!(address = %link.address, "{warning}");
    }
    if options.sync_always {
        tracing::info!("queue.sync = always rests on `sync_interval: always` in the NATS server");
    }
    Ok((link, probe))
}

fn reconnect_pause(attempts: usize) -> Duration {
    let doublings = attempts.saturating_sub(1).min(10) as u32;
    let pause = Duration::from_millis(5) * 2u32.pow(doublings);
    pause.min(if attempts <= RECONNECTS_AT_FIRST {
        RECONNECT_PAUSE_AT_FIRST
    } else {
        RECONNECT_PAUSE_MAX
    })
}

async fn client_options(
    options: &NatsOptions,
    address: &str,
) -> Result<async_nats::ConnectOptions, Error> {
    let bad_file = |what: &str, path: &PathBuf, error: std::io::Error| {
        unfit(
            address,
            format!("cannot read the {what} {}: {error}", path.display()),
        )
    };
    let mut client = async_nats::ConnectOptions::new()
        .name(&options.name)
        .ping_interval(PING_INTERVAL)
        .connection_timeout(CONNECT_TRY)
        .subscription_capacity(SUBSCRIPTION_CAPACITY)
        .max_reconnects(None)
        .reconnect_delay_callback(reconnect_pause);
    if let Some(path) = &options.creds {
        client = client
            .credentials_file(path)
            .await
            .map_err(|error| bad_file("credentials file", path, error))?;
    }
    if let Some(seed) = &options.nkey {
        client = client.nkey(seed.trim().to_owned());
    }
    if let Some(token) = &options.token {
        client = client.token(token.clone());
    }
    if let Some(path) = &options.ca {
        client = client.add_root_certificates(path.clone());
    }
    if let (Some(cert), Some(key)) = (&options.cert, &options.key) {
        client = client.add_client_certificate(cert.clone(), key.clone());
    }
    Ok(client)
}

/// Turns the client's events into [`LinkState`] and log lines.
fn event_handler(
    state: watch::Sender<LinkState>,
    up: watch::Sender<bool>,
    connections: watch::Sender<u64>,
    dropped: Arc<AtomicU64>,
    address: String,
) -> impl Fn(Event) -> std::future::Ready<()> + Send + Sync + 'static {
    move |event| {
        match event {
            Event::Connected => {
                tracing::info!(%address, "connected to the bus");
                state.send_modify(|state| {
                    state.connected = true;
                    state.generation += 1;
                });
                up.send_replace(true);
                // The client writes all subscriptions before whatever it is asked for from now on.
                connections.send_replace(super::local_ms());
            }
            Event::Disconnected | Event::Closed => {
                tracing::info!(%address, "no connection to the bus");
                state.send_modify(|state| state.connected = false);
                up.send_replace(false);
            }
            Event::SlowConsumer(subscription) => {
                let total = dropped.fetch_add(1, Ordering::Relaxed) + 1;
                if total.is_power_of_two() {
                    tracing::warn!(subscription, total, "a reader is too slow: message dropped");
                }
            }
            other => tracing::debug!(%address, event = %other, "bus event"),
        }
        std::future::ready(())
    }
}

impl Link {
    /// Changes whenever the connection comes or goes.
    pub fn watch(&self) -> watch::Receiver<LinkState> {
        self.state.clone()
    }

    /// Waits for a connection; its generation.
    pub async fn connected(&self) -> Result<u64, Error> {
        let mut state = self.watch();
        tokio::select! {
            state = state.wait_for(|state| state.connected) => match state {
                Ok(state) => Ok(state.generation),
                Err(_) => Err(Error::Closed),
            },
            () = self.stop.cancelled() => Err(Error::Closed),
        }
    }

    /// The same, but gives up after `limit`.
    pub async fn connected_within(&self, limit: Duration) -> Result<u64, Error> {
        tokio::time::timeout(limit, self.connected())
            .await
            .unwrap_or_else(|_| Err(self.unreachable("no connection")))
    }

    /// Fails at once if there is no connection: for what is worth nothing later.
    pub fn require(&self) -> Result<(), Error> {
        match self.state.borrow().connected {
            true => Ok(()),
            false => Err(self.unreachable("no connection")),
        }
    }

    /// Resolves when the connection with this generation is gone.
    pub async fn lost(&self, generation: u64) {
        let mut state = self.watch();
        let gone = |state: &LinkState| !state.connected || state.generation != generation;
        // An error means that the client is gone, and the connection with it.
        let _ = state.wait_for(gone).await;
    }

    /// Asks and waits for the one answer, at most `limit`.
    pub async fn request(
        &self,
        operation: &'static str,
        subject: String,
        headers: Option<HeaderMap>,
        payload: Bytes,
        limit: Duration,
    ) -> Result<Message, Failure> {
        let until = Instant::now() + limit;
        let generation = self.connected_within(limit).await?;
        let len = payload.len();
        let mut request = Request::new().payload(payload).timeout(None);
        if let Some(headers) = headers {
            request = request.headers(headers);
        }
        tokio::select! {
            biased;
            answer = self.client.send_request(subject, request) => answer.map_err(|error| {
                use async_nats::RequestErrorKind as Kind;
                match error.kind() {
                    Kind::NoResponders => Failure::NoResponders,
                    Kind::TimedOut => Failure::Other(Error::Timeout { operation }),
                    Kind::MaxPayloadExceeded => Failure::Other(self.too_large(len)),
                    Kind::InvalidSubject => Failure::Other(refused(operation, "the subject is not valid")),
                    Kind::Other => Failure::Other(self.gone()),
                }
            }),
            () = self.lost(generation) => Err(self.unreachable("the connection broke").into()),
            () = self.stop.cancelled() => Err(Error::Closed.into()),
            () = tokio::time::sleep_until(until) => Err(Error::Timeout { operation }.into()),
        }
    }

    /// Hands a message to the connection; bounded, for while it is down its queue can be full.
    pub async fn publish(
        &self,
        operation: &'static str,
        subject: String,
        reply: Option<String>,
        payload: Bytes,
    ) -> Result<(), Error> {
        let len = payload.len();
        let sending = async {
            match reply {
                Some(reply) => {
                    self.client
                        .publish_with_reply(subject, reply, payload)
                        .await
                }
                None => self.client.publish(subject, payload).await,
            }
        };
        use async_nats::client::PublishErrorKind as Kind;
        match tokio::time::timeout(API_WAIT, sending).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(match error.kind() {
                Kind::MaxPayloadExceeded => self.too_large(len),
                Kind::InvalidSubject => refused(operation, "the subject is not valid"),
                Kind::Send => self.gone(),
            }),
            Err(_) => Err(Error::Timeout { operation }),
        }
    }

    /// Subscribes; in force for everything that this connection sends afterwards.
    pub async fn subscribe(&self, filter: String) -> Result<async_nats::Subscriber, Error> {
        let operation = "subscribe";
        match tokio::time::timeout(API_WAIT, self.client.subscribe(filter)).await {
            Ok(Ok(subscriber)) => Ok(subscriber),
            Ok(Err(error)) if error.to_string().contains("subject") => {
                Err(refused(operation, "the subject is not valid"))
            }
            Ok(Err(_)) => Err(self.gone()),
            Err(_) => Err(Error::Timeout { operation }),
        }
    }

    /// Lets the tasks of the backend end, flushes, closes.
    pub async fn close(&self) {
        self.stop.cancel();
        self.tasks.close();
        let ending = async {
            self.tasks.wait().await;
            let _ = self.client.flush().await;
            let _ = self.client.drain().await;
        };
        if tokio::time::timeout(CLOSE_WAIT, ending).await.is_err() {
            tracing::info!("closed the bus without waiting longer for the last messages");
        }
    }

    pub fn unreachable(&self, reason: &str) -> Error {
        unreachable(&self.address, reason)
    }

    pub fn unfit(&self, reason: String) -> Error {
        unfit(&self.address, reason)
    }

    fn too_large(&self, len: usize) -> Error {
        Error::TooLarge {
            len: len as u64,
            max: self.client.max_payload() as u64,
        }
    }

    /// The client refuses commands only after it was closed.
    fn gone(&self) -> Error {
        if self.stop.is_cancelled() {
            Error::Closed
        } else {
            self.unreachable("the connection broke")
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

impl Failure {
    /// As an error; nobody answering reads as "away just now", to be tried again.
    pub fn or_away(self, link: &Link) -> Error {
        match self {
            Self::NoResponders => link.unreachable("nobody answers for the stream"),
            Self::Other(error) => error,
        }
    }
}

pub(super) fn refused(operation: &'static str, reason: impl ToString) -> Error {
    Error::Refused {
        operation,
        reason: reason.to_string(),
    }
}

fn unreachable(address: &str, reason: &str) -> Error {
    Error::Unreachable {
        address: address.to_owned(),
        reason: reason.lines().next().unwrap_or_default().to_owned(),
    }
}

fn unfit(address: &str, reason: String) -> Error {
    Error::Unfit {
        address: address.to_owned(),
        reason,
    }
}

fn connect_error(address: &str, error: &async_nats::ConnectError) -> Error {
    let cause = std::error::Error::source(error).map(ToString::to_string);
    match error.kind() {
        ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => unfit(
            address,
            "it refuses the credentials: check queue.nats_creds, queue.nats_nkey or queue.nats_token"
                .to_owned(),
        ),
        ConnectErrorKind::ServerParse => unfit(address, format!("the address is not valid: {error}")),
        kind => unreachable(address, &cause.unwrap_or_else(|| kind.to_string())),
    }
}

/// The servers without what must not be printed: user and password.
fn public_address(urls: &[String]) -> String {
    let public = urls.iter().map(|url| match url.rsplit_once('@') {
        Some((front, host)) => match front.split_once("://") {
            Some((scheme, _)) => format!("{scheme}://{host}"),
            None => host.to_owned(),
        },
        None => url.clone(),
    });
    public.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reconnecting_is_quick_at_first_and_then_patient() {
        assert_eq!(reconnect_pause(1), Duration::from_millis(5));
        assert_eq!(reconnect_pause(20), RECONNECT_PAUSE_AT_FIRST);
        assert_eq!(
            reconnect_pause(RECONNECTS_AT_FIRST + 1),
            RECONNECT_PAUSE_MAX
        );
    }

    #[test]
    fn addresses_are_printed_without_credentials() {
        let urls = [
            "nats://user:p@ss@one:1".to_owned(),
            "tok@two".to_owned(),
            "tls://three:3".to_owned(),
        ];
        assert_eq!(public_address(&urls), "nats://one:1,two,tls://three:3");
    }
}
