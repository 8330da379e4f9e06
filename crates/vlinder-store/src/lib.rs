//! Versioned storage for agents: contents by path (`kv`) and vectors by key (`vec`), kept in SQLite.
//!
//! A state is a root of the Merkle tree of `vlinder_core::merkle`. Every call is a pure function of
//! its base state and its body ([`apply`]), and every body is in the log. So the files here are a
//! cache that anybody may delete: a worker that meets a state whose chunks it lacks reads the
//! requests that it has not applied yet from the log, applies them in order, and goes on
//! ([`Stores`]). No store has a lease; any worker of any node serves any of them
//! (docs/adr/0003-stores-without-a-home.md). Stores of the kinds `nats://` and `s3://` keep their chunks in
//! a home as well, which spares a node that never saw a state the reading of the log.
//!
//! Safe to repeat: a call that is done twice gives the same answer and the same state.
//!
//! It does not collect unreachable chunks and does not know agents; who may use which store is the
//! bridge's business.

mod call;
mod db;
mod home;
mod kv;
mod replicate;
mod stores;
pub mod vec;
mod worker;

pub use call::{Answer, Call, Service, apply};
pub use db::{ChunkDb, Cursor, DbError, Position};
pub use home::HomeError;
pub use kv::{CONTENT_BYTES_MAX, LIST_BYTES_MAX};
pub use stores::Stores;
pub use worker::run;

use vlinder_core::merkle;

/// Why a store cannot serve a call now.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store's file failed.
    #[error("the store's file failed")]
    Db(#[from] DbError),
    /// The log could not be read.
    #[error("the log could not be read")]
    Bus(#[from] vlinder_bus::Error),
    /// The state is not here and the log does not lead to it either.
    #[error("the state cannot be rebuilt from the log")]
    State(#[source] merkle::Error<DbError>),
    /// The home of the store cannot be used now.
    #[error("{0}")]
    Home(#[from] HomeError),
    /// The file was deleted or replaced while a state was brought home; trying again makes it anew.
    #[error("the store's file was replaced during the call")]
    FileReplaced,
    /// The thread that does the file's work is gone, because it panicked or the process ends.
    #[error("the store's thread ended before it answered")]
    Ended,
}
