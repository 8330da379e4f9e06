//! The control protocol between the supervisor and a worker.
//!
//! To a worker process it is length-framed JSON over an inherited socket pair, to a task the same
//! verbs over shared memory; a worker's code sees [`Start`], [`ControlHandle`] and
//! [`ControlEvents`] in both cases.
//!
//! It guarantees that a delivery reported with [`ControlHandle::held`] is known to the supervisor
//! even if the worker is killed at the next instruction (a process: the bytes are in the kernel),
//! that reports never block the worker, and that pings are answered by the worker's own runtime,
//! so that an answer proves that its loop turns. It does not carry work or results.

mod child;
mod frames;
mod outbox;

use std::collections::BTreeMap;
use std::net::TcpListener;

use serde::{Deserialize, Serialize};
use vlinder_core::WorkerRole;

pub use child::connect_from_fd;
pub(crate) use frames::{FrameReader, encode};
pub(crate) use outbox::Mailbox;
pub(crate) use outbox::MemoryOutbox;
pub use outbox::{ControlEvents, ControlHandle};

/// Version of the protocol. Parent and child are the same binary, except during an upgrade.
pub const CONTROL_VERSION: u32 = 1;
/// The control socket in a worker process; inherited listeners follow it.
pub const CONTROL_FD: i32 = 3;
/// Largest frame to a worker, in bytes: its configuration.
pub(crate) const TO_CHILD_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Largest frame from a worker, in bytes: a batch of held deliveries.
pub(crate) const TO_PARENT_BYTES_MAX: usize = 256 * 1024;

/// What the supervisor tells a worker.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ToChild {
    Start(StartFrame),
    Ping { n: u64 },
    Drain,
    Reload { config: serde_json::Value },
}

/// The first frame.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StartFrame {
    pub version: u32,
    pub role: WorkerRole,
    pub index: u32,
    pub node: String,
    pub incarnation: u64,
    pub config: serde_json::Value,
    /// Names of the inherited listeners, in the order of their descriptors.
    pub listeners: Vec<String>,
}

/// What a worker tells the supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ToParent {
    Ready { addresses: BTreeMap<String, String> },
    Waiting { reason: String },
    Held { deliveries: Vec<String> },
    Released { deliveries: Vec<String> },
    Pong { n: u64 },
    Note { key: String, value: String },
}

/// What a worker learns at its start.
#[derive(Debug)]
pub struct Start {
    /// What the worker is.
    pub role: WorkerRole,
    /// Which of the workers of this role on the node, from 0.
    pub index: u32,
    /// Name of the node.
    pub node: String,
    /// How often this slot has been started since the daemon began, from 1.
    pub incarnation: u64,
    /// The worker's part of the configuration.
    pub config: serde_json::Value,
    /// Sockets that already listen, with their names. Non-blocking. They outlive the worker, so
    /// that connections wait in the backlog while it is replaced.
    pub listeners: Vec<(String, TcpListener)>,
}

impl Start {
    /// Takes the listener of this name out.
    pub fn take_listener(&mut self, name: &str) -> Option<TcpListener> {
        let at = self.listeners.iter().position(|(own, _)| own == name)?;
        Some(self.listeners.swap_remove(at).1)
    }
}

/// What the supervisor asks of a running worker.
#[derive(Debug, Clone, PartialEq)]
pub enum ControlEvent {
    /// Take no more work, finish or hand back what runs, then end with success. After the drain
    /// deadline the worker is killed.
    Drain,
    /// The worker's part of the configuration has changed; only the latest is delivered.
    Reload(serde_json::Value),
}

/// Why a worker ends without having been asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WorkerFailure {
    /// The configuration cannot work; retrying soon is useless.
    #[error("configuration error: {0}")]
    Configuration(String),
    /// Anything else.
    #[error("{0}")]
    Failed(String),
}

impl WorkerFailure {
    /// The exit code of a worker process that ends like this.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Configuration(_) => crate::EXIT_CONFIGURATION as u8,
            Self::Failed(_) => 1,
        }
    }
}
