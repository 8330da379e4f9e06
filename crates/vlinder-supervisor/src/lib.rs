//! Starts, watches, restarts and stops the workers of one node.
//!
//! A worker is a child process or, in embedded mode, a task of this process; both speak the same
//! control protocol ([`control`]) and obey the same state machine. One loop ([`Supervisor::run`])
//! reconciles the desired counts with what runs; the decisions are pure functions (`machine`),
//! the loop only performs them.
//!
//! It guarantees:
//! - what a dead worker held is handed to [`HeldDeliveries`] before anything else is done about
//!   the death;
//! - a worker whose loop stands still is ended, whatever it is stopped by;
//! - restarts back off, and a spent budget shows as `crash-looping` and goes on slowly;
//! - no process outlives the daemon ([`boxed`] covers those that left their worker's group).
//!
//! It knows nothing of NATS, configuration files, environment variables or gRPC: plans, listeners
//! and policies arrive as values, the bus and the log as traits.

pub mod boxed;
pub mod control;
pub mod watchdog;

mod error;
mod exit;
mod handle;
mod ledger;
mod lines;
mod machine;
mod orphans;
mod plan;
mod process;
mod procfs;
mod pulse;
mod runner;
mod status;
mod supervisor;
mod task;

pub use error::Error;
pub use exit::{EXIT_CONFIGURATION, WorkerExit};
pub use handle::{DrainReport, SupervisorHandle};
pub use lines::{LogLine, LogSink, LogStream, Tail};
pub use machine::{Policy, WorkerKey};
pub use plan::{
    Limits, Options, Plan, ProcessProgram, Program, RolePlan, SharedListener, TaskFactory,
    TaskFuture,
};
pub use runner::{Blame, Death, HeldDeliveries};
pub use status::{ExitRecord, NodePhase, NodeStatus, WorkerState, WorkerStatus};
pub use supervisor::{Deps, Supervisor};
