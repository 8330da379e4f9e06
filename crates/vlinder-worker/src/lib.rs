//! What every worker shares: its context, the loop that pulls and settles jobs, the service adapter
//! that turns a request into a result, and the in-memory view of what is deployed.
//!
//! A worker needs only the bus. It reports every delivery to its supervisor before it looks at it,
//! so that the supervisor can hand the work on the moment the worker dies (design.md rule 5).

pub mod cx;
pub mod infra;
pub mod jobs;
pub mod logs;
pub mod nodes;
pub mod offers;
pub mod replicas;
pub mod service;
pub mod serving;
pub mod turns;

pub use cx::{Control, Held, WorkerCx, WorkerId};
pub use jobs::{Handler, Job, Outcome, Slots, serve_queue, serve_queue_in};
pub use service::{Answer, Service, ServiceHandler, ServiceOutcome};

/// Why a worker cannot go on. It ends; the supervisor decides about a restart.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bus failed in a way that retries did not mend.
    #[error("the bus failed")]
    Bus(#[from] vlinder_bus::Error),
    /// The worker's own files or sockets failed.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The configuration cannot work; restarting does not help.
    #[error("configuration: {0}")]
    Config(String),
    /// Anything else, in words.
    #[error("{0}")]
    Other(String),
}
