//! Several nodes, and inference end to end with a real model (features E1, E2, E6, E9, G1, G2, C4, D11,
//! J8).

mod anthropic;
pub mod bed;
pub mod model;
mod models;
mod sdks;
mod topologies;
mod two_nodes;
