//! The bus: log, queues, kv, blobs and signals behind one interface, with two backends.
//!
//! * [`Bus`] is what everyone holds: cheap to clone, speaks in nodes of the record.
//! * [`backend::Backend`] is what a backend does: it moves raw messages and knows no record.
//!   [`nats`] speaks to NATS JetStream, [`local`] keeps everything in one process, durable in SQLite.
//! * [`subjects`] builds and parses every subject; [`streams`] holds every stream's limits.
//! * [`heal`] gives back what a log has lost.
//! * [`lease`] says who does what only one may do.
//! * [`wire`] is the form of a node on the wire: metadata in headers, the body is the body.
//!
//! Guarantees: an append that returned is stored; with an expectation it is stored only if it came
//! first, and an outcome that a failure hid is found by reading back. A delivery is repeated until
//! it is acknowledged. What a waiter sees was stored, in log order. Nothing here ages out by itself.
//! It does not decide what a message means; that is the workers' and projections' business.

pub mod backend;
mod bus;
pub mod dead;
mod delivery;
mod ends;
pub mod error;
pub mod heal;
pub mod lease;
pub mod local;
pub mod nats;
pub mod streams;
pub mod subjects;
pub mod wire;

pub use backend::{BucketSpec, KvEntry, KvEvent, QueueInfo, QueueSpec, Signal, StreamInfo};
pub use bus::{Appended, Bus, Expect, Follow, Gaps, Message, Seen};
pub use delivery::{Delivery, Puller};
pub use error::Error;
pub use streams::StreamName;
pub use subjects::Subject;
pub use wire::{Body, Notes, Stored};
