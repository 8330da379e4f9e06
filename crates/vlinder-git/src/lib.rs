//! The git projection: the record as a bare repository that people clone.
//!
//! [`run`] follows `LOG` and `CTL` and writes objects and refs, without a work tree and without the
//! `git` program. A branch of a session is a ref, `refs/heads/<session>/<branch>`; a turn is a commit
//! whose parent is the turn before it on its line; what the turn said and did are files that its commit adds
//! to those of the turns before it. `HEAD` names the branch on which a turn ended last.
//!
//! Guarantees: the same record gives the same commits, so a repository that was deleted comes back
//! equal, and writing a turn twice changes nothing. Objects are written before the refs that lead to
//! them, and the cursor after both: whatever dies in between leaves a valid repository, and the next
//! writer goes on from the cursor. One writer at a time, by lease, fenced by an epoch in the repository.
//! The cost of a turn does not depend on how many came before it.
//!
//! It decides nothing and writes nothing to the log.

mod error;
mod files;
mod follow;
mod names;
mod repo;
mod text;
mod turn;
mod worker;

pub use error::Error;
pub use worker::{REPOSITORY, run};
