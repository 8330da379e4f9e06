//! The only owner of the types generated from `proto/`. They serialize to the JSON shapes of
//! interfaces.md §3 with serde.

/// Takes turns from clients.
pub mod harness {
    tonic::include_proto!("vlinder.harness.v1");
}
/// The record as a projection.
pub mod state {
    tonic::include_proto!("vlinder.state.v1");
}
/// Agents, models, nodes, workers.
pub mod registry {
    tonic::include_proto!("vlinder.registry.v1");
}
/// Secrets.
pub mod secret {
    tonic::include_proto!("vlinder.secret.v1");
}
/// Models that upstreams offer.
pub mod catalog {
    tonic::include_proto!("vlinder.catalog.v1");
}

/// The encoded descriptors of all services, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Largest gRPC message that services and clients take, in bytes: a body and its metadata.
pub const MESSAGE_BYTES_MAX: usize = vlinder_core::BODY_BYTES_MAX as usize + 1024 * 1024;
