//! The checked form: what the rest of the workspace gets. Every value is within its bounds, every
//! relation between values holds, every derivation is done.
//!
//! It serializes with its secrets, so that a daemon can hand it to its own children over a pipe.
//! For people there are [`Config::masked`] and `Loaded::effective_toml`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use url::Url;
use vlinder_core::{NodeName, WorkerRole};

use crate::addresses::Service;
use crate::secret::{NatsUrl, Secret};

/// The effective configuration of one node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Who this node is.
    pub node: Node,
    /// What is logged, and how.
    pub logging: Logging,
    /// The bus.
    pub queue: Queue,
    /// The record's projection.
    pub state: State,
    /// Where services listen and are found.
    pub distributed: Distributed,
    /// How many workers of each role.
    pub workers: Workers,
    /// The credential of RPCs and routes.
    pub auth: Auth,
    /// The Ollama upstream.
    pub ollama: Ollama,
    /// The OpenRouter upstream.
    pub openrouter: Openrouter,
    /// The OpenAI-compatible upstream.
    pub openai: Openai,
    /// A server that speaks Anthropic's format.
    pub anthropic: Anthropic,
    /// Inference inside the worker.
    pub local: Local,
    /// S3-compatible storage.
    pub s3: S3,
    /// How agents run.
    pub runtime: Runtime,
    /// Restarts and deadlines of workers.
    pub supervisor: Supervisor,
}

/// `node.*`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// How this node is listed.
    pub name: NodeName,
    /// For placement.
    pub labels: BTreeMap<String, String>,
    /// Silence after which a node counts as not ready.
    #[serde(with = "span")]
    pub dead_after: Duration,
}

/// `logging.*`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Logging {
    /// How much.
    pub level: LogLevel,
    /// How stderr is written.
    pub format: LogFormat,
    /// The value of `RUST_LOG`, which replaces `level` on stderr.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rust_log: Option<String>,
}

/// `queue.*`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Queue {
    /// Which bus.
    pub backend: QueueBackend,
    /// The servers of the `nats` backend; at least one.
    pub nats_url: Vec<NatsUrl>,
    /// A credentials file.
    pub nats_creds: Option<PathBuf>,
    /// The seed of a user key.
    pub nats_nkey: Option<Secret>,
    /// A token.
    pub nats_token: Option<Secret>,
    /// Certificates of the authority (PEM).
    pub nats_ca: Option<PathBuf>,
    /// The client certificate (PEM); present exactly when `nats_key` is.
    pub nats_cert: Option<PathBuf>,
    /// Its key (PEM).
    pub nats_key: Option<PathBuf>,
    /// Copies of each message, 1 to 5.
    pub replicas: u32,
    /// Size of the log, in bytes.
    pub max_bytes: u64,
    /// Which of `replicas` and `max_bytes` somebody wrote: only these change an installation that exists.
    #[serde(default)]
    pub written: Written,
    /// What "confirmed" means.
    pub sync: QueueSync,
}

/// What of the log's shape is not a default.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Written {
    /// `queue.replicas`.
    pub replicas: bool,
    /// `queue.max_bytes`.
    pub max_bytes: bool,
}

/// Where a value is from makes no difference between two configurations.
impl PartialEq for Written {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// `state.*`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// How workers reach the projection.
    pub backend: StateBackend,
}

/// `distributed.*` without the worker counts. An address of this node has port 0 where the
/// service listens on any free port; the real one is in `run/addresses.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Distributed {
    /// Where this node's services listen.
    pub bind: IpAddr,
    /// Where to connect to the registry; each list has at least one entry, tried in turn.
    pub registry_addr: Vec<Url>,
    /// Where to connect to the harness.
    pub harness_addr: Vec<Url>,
    /// Where to connect to the state service.
    pub state_addr: Vec<Url>,
    /// Where to connect to the secret service.
    pub secret_addr: Vec<Url>,
    /// Where to connect to the catalog.
    pub catalog_addr: Vec<Url>,
    /// Where to listen.
    pub ports: Ports,
}

/// `distributed.ports.*`; 0 = any free port.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ports {
    /// The registry's.
    pub registry: u16,
    /// The harness's.
    pub harness: u16,
    /// The state service's.
    pub state: u16,
    /// The secret service's.
    pub secret: u16,
    /// The catalog's.
    pub catalog: u16,
    /// Of console, health, metrics, events and the OpenAI-compatible routes.
    pub http: u16,
    /// Of the bridge.
    pub bridge: u16,
}

/// `distributed.workers.*`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Workers(BTreeMap<WorkerRole, u32>);

/// `auth.*`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Auth {
    /// What every RPC and route asks for. `None` after `load` when nobody configured one: the
    /// daemon fills it in by `settle_token` before it starts a worker.
    pub token: Option<Secret>,
}

/// `ollama.*`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ollama {
    /// The server.
    pub endpoint: Url,
}

/// `openrouter.*`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Openrouter {
    /// The server.
    pub endpoint: Url,
    /// The account's key.
    pub api_key: Option<Secret>,
}

/// `openai.*`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Openai {
    /// The server, with the path before `/chat/completions`.
    pub endpoint: Option<Url>,
    /// Its key, if it asks for one.
    pub api_key: Option<Secret>,
}

/// `anthropic.*`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Anthropic {
    /// The server: the root, or the path before `/messages`.
    pub endpoint: Url,
    /// The account's key.
    pub api_key: Option<Secret>,
}

/// `local.*`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Local {
    /// A GGUF file.
    pub model: Option<PathBuf>,
    /// A GGUF file for embeddings.
    pub embedding_model: Option<PathBuf>,
}

/// `s3.*`; what is not set here is looked for in the variables of AWS ([`crate::aws`]).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct S3 {
    /// In place of AWS.
    pub endpoint: Option<Url>,
    /// The region that requests are signed for.
    pub region: Option<String>,
    /// Whose account.
    pub access_key_id: Option<String>,
    /// Its key; present exactly when `access_key_id` is.
    pub secret_access_key: Option<Secret>,
}

/// `runtime.*`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Runtime {
    /// Whether tags are resolved once.
    pub image_policy: ImagePolicy,
    /// `auto`, an absolute socket path or a URL.
    pub docker_host: String,
    /// AWS region.
    pub lambda_region: String,
    /// In MB, 128 to 10240.
    pub lambda_memory_mb: u32,
    /// In seconds, 1 to 900.
    pub lambda_timeout_secs: u32,
    /// Subnets.
    pub lambda_vpc_subnet_ids: Vec<String>,
    /// Security groups.
    pub lambda_vpc_security_group_ids: Vec<String>,
    /// In place of AWS.
    pub lambda_endpoint: Option<Url>,
}

/// `supervisor.*`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Supervisor {
    /// Pause before the second restart (the first is at once); doubles from there.
    #[serde(with = "span")]
    pub restart_initial: Duration,
    /// Longest pause; at least `restart_initial`.
    #[serde(with = "span")]
    pub restart_max: Duration,
    /// Random part of a pause, 0 to 100.
    pub restart_jitter_percent: u32,
    /// Restarts within `restart_window` before a worker counts as crash-looping; at least 1.
    pub restart_budget: u32,
    /// Window of the budget, and the life after which it is full again.
    #[serde(with = "span")]
    pub restart_window: Duration,
    /// Pause between the tries of a crash-looping worker.
    #[serde(with = "span")]
    pub crash_loop_retry: Duration,
    /// From start to ready.
    #[serde(with = "span")]
    pub start_deadline: Duration,
    /// From the request to stop to the end of running work.
    #[serde(with = "span")]
    pub drain_deadline: Duration,
    /// From the kill to the end of the process.
    #[serde(with = "span")]
    pub kill_deadline: Duration,
    /// Longest time without progress of the worker's loop.
    #[serde(with = "span")]
    pub unresponsive_deadline: Duration,
    /// Per worker process, in bytes.
    pub memory_limit: Option<u64>,
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$variant_doc])* #[serde(rename = $word)] $variant,)+
        }

        impl $name {
            /// The word in the configuration.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

words!(
    /// `logging.level`
    LogLevel {
        /// Only what a person must look at.
        Error = "error",
        /// And what is odd.
        Warn = "warn",
        /// And what happens.
        Info = "info",
        /// And how.
        Debug = "debug",
        /// And everything else.
        Trace = "trace",
    }
);
words!(
    /// `logging.format`
    LogFormat {
        /// For people.
        Text = "text",
        /// For machines.
        Json = "json",
    }
);
words!(
    /// `queue.backend`
    QueueBackend {
        /// Embedded: one process, workers as tasks.
        Local = "local",
        /// NATS JetStream: a process for each worker.
        Nats = "nats",
    }
);
words!(
    /// `queue.sync`
    QueueSync {
        /// A confirmed message survives any kill.
        Interval = "interval",
        /// And a power cut.
        Always = "always",
    }
);
words!(
    /// `state.backend`
    StateBackend {
        /// In this process.
        Local = "local",
        /// Through the state service.
        Grpc = "grpc",
    }
);
words!(
    /// `runtime.image_policy`
    ImagePolicy {
        /// Run what the tag names now.
        Mutable = "mutable",
        /// Run the digest that the tag named at deploy.
        Pinned = "pinned",
    }
);

impl Config {
    /// Whether workers are tasks of one process.
    pub fn is_embedded(&self) -> bool {
        self.queue.backend == QueueBackend::Local
    }

    /// The same with every secret replaced by `***`, for display.
    pub fn masked(&self) -> Self {
        let mut masked = self.clone();
        let secrets = [
            &mut masked.queue.nats_nkey,
            &mut masked.queue.nats_token,
            &mut masked.auth.token,
            &mut masked.openrouter.api_key,
            &mut masked.openai.api_key,
            &mut masked.anthropic.api_key,
            &mut masked.s3.secret_access_key,
        ];
        for secret in secrets.into_iter().flatten() {
            *secret = Secret::masked();
        }
        masked.queue.nats_url = self.queue.nats_url.iter().map(NatsUrl::masked).collect();
        masked
    }
}

impl Distributed {
    /// Where to connect to a service; at least one address, tried in turn.
    pub fn addresses(&self, service: Service) -> &[Url] {
        match service {
            Service::Registry => &self.registry_addr,
            Service::Harness => &self.harness_addr,
            Service::State => &self.state_addr,
            Service::Secret => &self.secret_addr,
            Service::Catalog => &self.catalog_addr,
        }
    }
}

impl Ports {
    /// Where a service of this node listens; 0 = any free port.
    pub fn of(&self, service: Service) -> u16 {
        match service {
            Service::Registry => self.registry,
            Service::Harness => self.harness,
            Service::State => self.state,
            Service::Secret => self.secret,
            Service::Catalog => self.catalog,
        }
    }
}

impl Workers {
    /// How many workers of a role this node runs; 0 = none.
    pub fn count(&self, role: WorkerRole) -> u32 {
        self.0.get(&role).copied().unwrap_or(0)
    }

    /// Sets a count.
    pub fn set(&mut self, role: WorkerRole, count: u32) {
        self.0.insert(role, count);
    }

    /// Every role with its count, in the order in which a node starts them.
    pub fn iter(&self) -> impl Iterator<Item = (WorkerRole, u32)> + '_ {
        WorkerRole::ALL
            .into_iter()
            .map(|role| (role, self.count(role)))
    }
}

/// Durations as `1m 30s`, the same text as in `config.toml`.
mod span {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(span: &Duration, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&humantime::format_duration(*span))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(d)?;
        humantime::parse_duration(&text).map_err(serde::de::Error::custom)
    }
}
