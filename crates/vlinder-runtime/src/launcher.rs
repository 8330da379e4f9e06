//! How a replica is started: the one thing in which runtimes differ.
//!
//! A launcher brings an agent's files or image to this node and starts instances of it. Everything
//! else (who runs which replica, health, restarts, turns, the bridge) is the same for all runtimes.

use async_trait::async_trait;
use futures::future::BoxFuture;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use vlinder_core::AgentName;
use vlinder_core::manifest::{AgentManifest, RuntimeKind};
use vlinder_worker::infra::AgentVersion;

/// A deployed version of an agent.
#[derive(Debug, Clone, PartialEq)]
pub struct Deployment {
    /// The sequence of its infra event: grows with every deployment.
    pub version: u64,
    /// Manifest and bundle.
    pub agent: AgentVersion,
}

impl Deployment {
    /// The agent's manifest.
    pub fn manifest(&self) -> &AgentManifest {
        &self.agent.manifest
    }

    /// The agent's name.
    pub fn name(&self) -> &AgentName {
        &self.agent.manifest.name
    }
}

/// What a launcher needs to know of one instance.
#[derive(Debug, Clone)]
pub struct LaunchSpec {
    /// What to run.
    pub deployment: Arc<Deployment>,
    /// Which replica of it, from 0.
    pub replica: u32,
    /// The secret by which the bridge knows this instance: one path segment.
    pub secret: String,
    /// Where the bridge listens for all instances, if it does.
    pub bridge: Option<SocketAddr>,
    /// The bridge as this instance alone sees it, for runtimes that have a socket for each.
    pub face: BridgeFace,
}

type Serve = dyn Fn(TcpListener) -> BoxFuture<'static, ()> + Send + Sync;

/// The bridge for one instance: whoever comes through its socket is that instance.
#[derive(Clone)]
pub struct BridgeFace(Arc<Serve>);

impl BridgeFace {
    /// A face that serves with `serve`.
    pub fn new(
        serve: impl Fn(TcpListener) -> BoxFuture<'static, ()> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(serve))
    }

    /// Serves until the future is dropped.
    pub fn serve(&self, listener: TcpListener) -> BoxFuture<'static, ()> {
        (self.0)(listener)
    }
}

impl fmt::Debug for BridgeFace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BridgeFace")
    }
}

/// The manifest's prompts as variables of the environment.
pub(crate) fn prompts(manifest: &AgentManifest) -> impl Iterator<Item = (String, String)> {
    manifest.prompts.iter().map(|(name, text)| {
        // No other character may stand in the name of a variable, and no NUL in its value.
        let upper = |c: char| match c.is_ascii_alphanumeric() {
            true => c.to_ascii_uppercase(),
            false => '_',
        };
        let name: String = name.chars().map(upper).collect();
        (format!("VLINDER_PROMPT_{name}"), text.replace('\0', ""))
    })
}

/// How an instance ended, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit(pub String);

/// Why an instance could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The agent's files cannot be had or are not acceptable.
    #[error("{0}")]
    Bundle(#[from] crate::bundle::Error),
    /// The manifest's command cannot be run.
    #[error("cannot run {command:?}: {reason}")]
    Command {
        /// The command.
        command: String,
        /// Why not.
        reason: String,
    },
    /// The image cannot be had or cannot be run.
    #[error("{0}")]
    Image(String),
    /// The container engine refused or does not answer.
    #[error("{0}")]
    Engine(String),
    /// Something of the node's own failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// Starts instances of agents.
#[async_trait]
pub trait Launcher: Send + Sync + 'static {
    /// Which agents it runs.
    fn kind(&self) -> RuntimeKind;
    /// Starts one instance. It need not listen yet when this returns.
    async fn launch(&self, spec: &LaunchSpec) -> Result<Box<dyn Instance>, LaunchError>;
    /// How long after an instance broke off what it said its end may become known.
    fn end_known_within(&self) -> Duration {
        Duration::ZERO
    }
    /// The last lines that an instance printed, for messages that say why it ended.
    fn last_lines(&self, spec: &LaunchSpec) -> Vec<String>;
    /// The agent is no longer deployed and nothing of it runs here: removes what it left.
    async fn forget(&self, agent: &AgentName);
}

/// A running instance. Dropping it ends it at once, with everything that it started.
#[async_trait]
pub trait Instance: Send + 'static {
    /// How its HTTP server is reached.
    fn connector(&self) -> Arc<dyn Connect>;
    /// Takes how many turns it has, where that must be known after this worker's death.
    fn marker(&self) -> Option<Arc<dyn Marker>> {
        None
    }
    /// Its process id, 0 where there is none on this machine.
    fn pid(&self) -> u32;
    /// What it printed and nobody kept because it was too much, in bytes, as it grows.
    fn flood(&self) -> Arc<AtomicU64> {
        Arc::default()
    }
    /// Waits until it has ended. Cancel-safe.
    async fn exited(&mut self) -> Exit;
    /// Asks it to end, and ends it where it does not do so soon.
    async fn stop(self: Box<Self>);
}

/// Opens connections to an instance's HTTP server.
#[async_trait]
pub trait Connect: Send + Sync + 'static {
    /// Opens one.
    async fn connect(&self) -> io::Result<TcpStream>;
}

#[async_trait]
impl Connect for SocketAddr {
    async fn connect(&self) -> io::Result<TcpStream> {
        TcpStream::connect(self).await
    }
}

/// Keeps how many turns an instance has.
pub trait Marker: Send + Sync + 'static {
    /// It has so many now; called before the first of them reaches it. Must not block.
    fn turns(&self, turns: usize);
    /// It must serve no more, whatever it still does.
    fn spoil(&self);
}
