//! What holds for the embedded bus beyond the contract of every backend.

mod crash;
mod live;
mod model;
mod queues;
mod smoke;
mod store;
mod support;
