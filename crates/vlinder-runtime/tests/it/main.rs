//! The process runtime with real agents (Python's standard library), over the embedded bus.

mod agents;
mod bed;
mod bridge;
mod faults;
mod nats;
mod pace;
mod replicas;
mod resume;
mod streams;
mod turns;
