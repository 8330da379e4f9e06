//! The state service: the record as a projection into SQLite, and the queries over it.
//!
//! [`Projection`] holds the file and the barrier; [`Follower`] reads `LOG` and `CTL` and applies what
//! comes; [`StateService`] answers over gRPC; [`StateWorker`] puts the three together.
//!
//! Guarantees: a read sees everything that was confirmed before it began, by whomever, or fails and
//! says by how much the projection lags. The file can be deleted at any time and comes back equal
//! ([`StatusResponse::digest`](vlinder_proto::state::StatusResponse)). The first invoke, result and
//! end in the order of the log win; the others stay visible. No query blocks the runtime, and every
//! answer is bounded.
//!
//! It does not decide anything: nobody but the follower writes here, and nothing is written to the
//! log from here, but for one case: a log that lost its tail is given back what is kept of it here
//! (`tail`, `heal`). It knows no credentials, and of infra events only their messages, sealed as they are.

mod apply;
mod bodies;
mod convert;
mod db;
mod error;
mod follow;
mod heal;
mod number;
mod projection;
mod query;
mod running;
mod schema;
mod service;
mod tail;
mod verify;
mod worker;

pub use error::Error;
pub use follow::Follower;
pub use projection::{Applied, BARRIER_DEADLINE, Projection};
pub use service::StateService;
pub use worker::{START_CATCH_UP, StateWorker};
