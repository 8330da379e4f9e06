//! The vocabulary of Vlinder: ids, worker roles, the nodes of the record and their hashes,
//! manifests, conversations.
//!
//! Everything here is a plain value or a pure function. The crate knows nothing of tokio, NATS,
//! tonic, files or the environment, so that every other crate may depend on it.

pub mod conversation;
pub mod egress;
pub mod hash;
pub mod ids;
pub mod manifest;
pub mod merkle;
pub mod record;
pub mod role;
pub mod size;

pub use hash::{CallKey, ContentHash, NodeHash, StateRoot};
pub use ids::{
    AgentName, BranchName, IdError, Namespace, NodeName, Selector, SessionId, SubmissionId,
};
pub use record::{Kind, Node};
pub use role::WorkerRole;

/// Largest body of one message, in bytes: an invoke input, an answer, a stored value.
/// Larger ones are refused at the edge where they enter.
pub const BODY_BYTES_MAX: u64 = 64 * 1024 * 1024;
