//! What the supervisor shows of itself.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;
use vlinder_core::WorkerRole;

use crate::lines::Tail;
use crate::{WorkerExit, WorkerKey};

/// The state of one worker, named as in `worker list`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WorkerState {
    /// Not up yet, or its turn in the start order has not come.
    Starting,
    /// It can do its job.
    Ready,
    /// It is up, but something outside is missing.
    Waiting,
    /// It was asked to go and finishes.
    Draining,
    /// It died; the next start comes soon.
    Backoff,
    /// It died too often in a row, or of its configuration; the next start comes slowly.
    CrashLooping,
    /// It is not to run.
    Stopped,
}

impl WorkerState {
    /// The name in lists.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Waiting => "waiting",
            Self::Draining => "draining",
            Self::Backoff => "backoff",
            Self::CrashLooping => "crash-looping",
            Self::Stopped => "stopped",
        }
    }

    /// Whether the worker counts as up.
    pub const fn is_up(self) -> bool {
        matches!(self, Self::Ready | Self::Waiting)
    }
}

impl fmt::Display for WorkerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How an earlier incarnation of a worker ended.
#[derive(Debug, Clone)]
pub struct ExitRecord {
    /// The ending; its `Display` is the text for lists.
    pub exit: WorkerExit,
    /// When.
    pub at: SystemTime,
    /// Its last lines, oldest first, at most 50.
    pub last_lines: Arc<[String]>,
}

/// One worker.
#[derive(Debug, Clone)]
pub struct WorkerStatus {
    /// Which.
    pub key: WorkerKey,
    /// Its process; none for a task or when nothing runs.
    pub pid: Option<u32>,
    /// Its state.
    pub state: WorkerState,
    /// Why it is in this state, where that says more than the state: what it waits for, how it
    /// died, what is late.
    pub reason: Option<String>,
    /// Starts after the first.
    pub restarts: u64,
    /// Since when the present incarnation runs.
    pub started_at: Option<SystemTime>,
    pub(crate) since: Option<Instant>,
    /// How the one before ended.
    pub last_exit: Option<ExitRecord>,
    /// Its latest output, over restarts; current at any time.
    pub tail: Tail,
    /// Where it listens, by name, as it said.
    pub addresses: BTreeMap<String, String>,
    /// What it remarked.
    pub notes: BTreeMap<String, String>,
}

impl WorkerStatus {
    /// For how long the present incarnation has been running; zero when nothing runs.
    pub fn uptime(&self) -> Duration {
        self.since.map(|since| since.elapsed()).unwrap_or_default()
    }
}

/// What the node does as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodePhase {
    /// The start has come to this stage, from 0.
    Starting {
        /// The stage.
        stage: usize,
    },
    /// All stages are passed.
    Running,
    /// It drains.
    Draining,
    /// Everything has stopped.
    Stopped,
}

/// The whole node.
#[derive(Debug, Clone)]
pub struct NodeStatus {
    /// Its name.
    pub node: String,
    /// What it does.
    pub phase: NodePhase,
    /// Roles that were not up in their time at the start, though some may be by now.
    pub late: Vec<WorkerRole>,
    /// How many workers of each role are wanted.
    pub desired: BTreeMap<WorkerRole, u32>,
    /// How often workers of each role ended how ([`WorkerExit::kind`]), since the start.
    pub endings: BTreeMap<(WorkerRole, &'static str), u64>,
    /// Every worker, in the order of roles and indices.
    pub workers: Vec<WorkerStatus>,
}

impl NodeStatus {
    /// The workers of one role.
    pub fn role(&self, role: WorkerRole) -> impl Iterator<Item = &WorkerStatus> {
        self.workers
            .iter()
            .filter(move |worker| worker.key.role == role)
    }

    /// Whether the start is over and every worker is up.
    pub fn is_up(&self) -> bool {
        self.phase == NodePhase::Running && self.workers.iter().all(|worker| worker.state.is_up())
    }
}
