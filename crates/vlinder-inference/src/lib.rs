//! The workers `inference.ollama`, `inference.openai`, `inference.openrouter` and
//! `inference.anthropic`: they offer the models of one upstream to the cluster and forward calls to it.
//!
//! * `discovery` asks the upstream which models it has, tells the cluster, and pulls the work of
//!   those models and of no others; while the upstream is away it pulls nothing, so that the work
//!   goes to other workers or waits (features E6, E9).
//! * `call` answers one request: forwards the bytes as the agent wrote them, retries what may be
//!   retried, ends with the turn. `circuit` decides when a model that keeps failing is left alone. `relay` streams the answer, `retry` and `usage` are pure.
//! * `upstream` is the HTTP client, `operations` the closed list of paths an agent may reach.
//!
//! Guarantees: bodies pass unchanged in both directions, errors of the upstream too. A call that
//! has an answer in the log is not made again. A call whose worker died before its answer was
//! stored **is** made again: towards the upstream a call is at-least-once, and carries the request's
//! hash as `Idempotency-Key` for upstreams that understand it. The streamed pieces of such a second
//! call may differ from those of the first; the result in the log is the answer. When a turn ends,
//! its open HTTP call is dropped at once.
//!
//! It does not translate between wire formats, count budgets or cache answers.

mod call;
mod circuit;
mod discovery;
mod operations;
mod queues;
mod relay;
mod retry;
mod upstream;
mod usage;

pub use circuit::Limits as CircuitLimits;
pub use reqwest::Url;
pub use upstream::Error;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use vlinder_worker::WorkerCx;

/// Calls that one worker has at its upstream at once, unless told otherwise: what an Ollama server
/// takes in parallel by default.
pub const SLOTS_DEFAULT: usize = 4;

/// Which kind of upstream it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// An Ollama server, in its own format and in OpenAI's.
    Ollama,
    /// Any OpenAI-compatible server.
    Openai,
    /// OpenRouter: OpenAI's format behind another address.
    Openrouter,
    /// Anthropic's own format.
    Anthropic,
}

impl Backend {
    /// The name in subjects, offers and the names of models.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ollama => "ollama",
            Self::Openai => "openai",
            Self::Openrouter => "openrouter",
            Self::Anthropic => "anthropic",
        }
    }

    /// The name in messages for people.
    const fn title(self) -> &'static str {
        match self {
            Self::Ollama => "Ollama",
            Self::Openai => "OpenAI-compatible server",
            Self::Openrouter => "OpenRouter",
            Self::Anthropic => "Anthropic-compatible server",
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The credential towards an upstream, which may change while the worker runs.
#[derive(Clone)]
pub struct ApiKey(watch::Receiver<Option<String>>);

impl ApiKey {
    /// The one to use now.
    pub(crate) fn now(&self) -> Option<String> {
        self.0.borrow().clone()
    }

    /// Ready when there is another one; never where there cannot be.
    pub(crate) async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl From<Option<String>> for ApiKey {
    fn from(fixed: Option<String>) -> Self {
        Self(watch::channel(fixed).1)
    }
}

impl From<watch::Receiver<Option<String>>> for ApiKey {
    fn from(followed: watch::Receiver<Option<String>>) -> Self {
        Self(followed)
    }
}

/// What an inference worker works with.
#[derive(Clone)]
pub struct Options {
    /// The kind of upstream.
    pub backend: Backend,
    /// Where it is: for Ollama the root of the server, else the path before `/chat/completions` or
    /// `/messages`.
    pub endpoint: Url,
    /// Sent as `Authorization: Bearer …`, to Anthropic as `x-api-key`; a new one is in use from the next request on.
    pub api_key: ApiKey,
    /// Calls at the upstream at once.
    pub slots: usize,
    /// How long a connection may take to be made.
    pub connect_timeout: Duration,
    /// How long the first byte of an answer may take: a cold model is loaded meanwhile.
    pub first_byte_timeout: Duration,
    /// How long the pause between two pieces of an answer may be.
    pub idle_timeout: Duration,
    /// Never is a call tried again sooner than this.
    pub retry_floor: Duration,
    /// When a model of the upstream that keeps failing is left alone.
    pub circuit: CircuitLimits,
}

impl Options {
    /// The usual limits.
    pub fn new(backend: Backend, endpoint: Url, api_key: impl Into<ApiKey>) -> Self {
        Self {
            backend,
            endpoint,
            api_key: api_key.into(),
            slots: SLOTS_DEFAULT,
            connect_timeout: Duration::from_secs(3),
            first_byte_timeout: Duration::from_secs(120),
            idle_timeout: Duration::from_secs(60),
            retry_floor: Duration::from_millis(250),
            circuit: CircuitLimits::default(),
        }
    }
}

impl fmt::Debug for Options {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("backend", &self.backend)
            .field("endpoint", &upstream::shown(&self.endpoint))
            .field("has_key", &self.api_key.now().is_some())
            .field("slots", &self.slots)
            .finish_non_exhaustive()
    }
}

/// Serves the upstream's models until the worker drains. An upstream that is away is waited for;
/// only a configuration that cannot work, or a broken bus, ends the worker.
pub async fn run(cx: WorkerCx, options: Options) -> Result<(), vlinder_worker::Error> {
    if options.slots == 0 {
        let message = "an inference worker needs at least one slot".to_owned();
        return Err(vlinder_worker::Error::Config(message));
    }
    let upstream = upstream::Upstream::new(&options)
        .map_err(|error| vlinder_worker::Error::Config(error.to_string()))?;
    let upstream = Arc::new(upstream);
    let health = Arc::new(discovery::Health::new());
    let circuits = circuit::Circuits::new(options.circuit, {
        let health = health.clone();
        move || health.look_now()
    });
    let calls = call::Calls::new(
        cx.clone(),
        upstream.clone(),
        health.clone(),
        circuits.clone(),
        options.clone(),
    );
    discovery::run(cx, upstream, health, circuits, calls, options.slots).await
}
