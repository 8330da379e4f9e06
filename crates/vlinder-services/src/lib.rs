//! The gRPC services: registry, harness, secret, catalog. (State is in `vlinder-state`.)
//!
//! Each is thin: it parses a request into domain values, asks a view of the log or appends to it,
//! and maps the result. None keeps state of its own that the log does not have, so several
//! replicas on several nodes are correct by construction.

pub mod auth;
pub mod catalog;
pub mod grpc;
pub mod harness;
pub mod infra;
pub mod registry;
pub mod secret;
mod status;
mod waiting;
