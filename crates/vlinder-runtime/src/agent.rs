//! What the parts of a runtime worker share: for the worker as a whole, and for each agent.

use crate::bridge::Callers;
use crate::history::Histories;
use crate::launcher::Launcher;
use crate::pool::Pool;
use crate::queues::KnownQueues;
use crate::secrets::Secrets;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use vlinder_core::AgentName;
use vlinder_worker::WorkerCx;
use vlinder_worker::infra::InfraView;

/// Shared by everything in one runtime worker.
pub(crate) struct Shared {
    pub cx: WorkerCx,
    pub infra: InfraView,
    pub launcher: Arc<dyn Launcher>,
    pub callers: Callers,
    pub histories: Histories,
    pub queues: KnownQueues,
    pub secrets: Arc<dyn Secrets>,
    /// Where the bridge listens for all agents, if it does.
    pub bridge: Option<SocketAddr>,
    /// Bounds how many instances start at the same time: starting is heavy, and all at once would
    /// make each of them slow.
    pub starts: tokio::sync::Semaphore,
    /// Bounds the bodies of calls that are held at the same time, in units of 64 KiB.
    pub bodies: tokio::sync::Semaphore,
}

/// An agent that this worker runs replicas of.
pub(crate) struct Agent {
    pub shared: Arc<Shared>,
    pub name: AgentName,
    pub pool: Arc<Pool>,
    /// Cancelled when the agent is no longer deployed.
    pub deleted: CancellationToken,
}
