//! The context that a worker gets.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use vlinder_bus::Bus;
use vlinder_core::{Namespace, NodeName, WorkerRole};

/// Which worker this is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerId {
    /// Its node.
    pub node: NodeName,
    /// Its role.
    pub role: WorkerRole,
    /// Its place among the workers of that role on that node, from 0.
    pub index: u32,
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.node, self.role, self.index)
    }
}

/// The worker's line to its supervisor. None of these block.
pub trait Control: Send + Sync + 'static {
    /// The worker can do its job now.
    fn ready(&self);
    /// The worker is fine but lacks something it needs; it counts as up.
    fn waiting(&self, reason: &str);
    /// The worker was given this delivery ([`Held::encode`]).
    fn held(&self, held: &str);
    /// The worker has settled this delivery; the same text as for [`Control::held`].
    fn released(&self, held: &str);
    /// Something to show beside the worker.
    fn note(&self, key: &str, value: &str);
}

/// A delivery as it is reported to the supervisor, in one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// `STREAM:seq` of the message.
    pub job: String,
    /// Its delivery count, from 1.
    pub attempt: u64,
    /// What hands it back.
    pub token: String,
}

impl Held {
    /// The line.
    pub fn encode(&self) -> String {
        format!("{} {} {}", self.job, self.attempt, self.token)
    }

    /// Reads the line; `None` if it is not of that form.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, ' ');
        let (job, attempt, token) = (parts.next()?, parts.next()?, parts.next()?);
        Some(Self {
            job: job.to_owned(),
            attempt: attempt.parse().ok()?,
            token: token.to_owned(),
        })
    }
}

/// A control that leads nowhere: for tests and for tools without a supervisor.
pub struct NoControl;

impl Control for NoControl {
    fn ready(&self) {}
    fn waiting(&self, _: &str) {}
    fn held(&self, _: &str) {}
    fn released(&self, _: &str) {}
    fn note(&self, _: &str, _: &str) {}
}

/// What a worker has to work with; cheap to clone.
#[derive(Clone)]
pub struct WorkerCx {
    /// Which worker this is.
    pub id: WorkerId,
    /// The bus.
    pub bus: Bus,
    /// The namespace it serves.
    pub ns: Namespace,
    /// The node's data directory.
    pub data_dir: Arc<Path>,
    /// The line to the supervisor.
    pub control: Arc<dyn Control>,
    /// Cancelled when the worker shall take no new work, finish what it has and return.
    pub drain: CancellationToken,
    /// Normal jobs share it, a job that is suspected of killing workers holds it alone.
    pub gate: Arc<tokio::sync::RwLock<()>>,
}

impl WorkerCx {
    /// A context.
    pub fn new(
        id: WorkerId,
        bus: Bus,
        ns: Namespace,
        data_dir: Arc<Path>,
        control: Arc<dyn Control>,
        drain: CancellationToken,
    ) -> Self {
        Self {
            id,
            bus,
            ns,
            data_dir,
            control,
            drain,
            gate: Arc::default(),
        }
    }

    /// The stream of turns, requests and answers.
    pub fn log(&self) -> vlinder_bus::StreamName {
        vlinder_bus::StreamName::Log(self.ns.clone())
    }

    /// The stream of sessions and deployments.
    pub fn ctl(&self) -> vlinder_bus::StreamName {
        vlinder_bus::StreamName::Ctl(self.ns.clone())
    }
}
