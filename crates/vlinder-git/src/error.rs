//! What can go wrong while the repository is written.

/// An error of the git projection.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bus failed.
    #[error("the bus failed")]
    Bus(#[from] vlinder_bus::Error),
    /// Git objects or refs could not be read or written.
    #[error("{what}: {reason}")]
    Git {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        reason: String,
    },
    /// The index of the repository failed.
    #[error("the index of the repository failed")]
    Index(#[from] rusqlite::Error),
    /// A file could not be written.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The repository is gone, or another one stands in its place.
    #[error("the repository was deleted")]
    Deleted,
    /// Another writer has begun.
    #[error("another writer has taken over")]
    Fenced,
    /// The log has changed in a way that the repository must be made anew.
    #[error("{0}")]
    StartOver(&'static str),
    /// A thread panicked.
    #[error("a thread of the git projection panicked")]
    Panicked,
}

/// Makes an error of what a library of git says.
pub(crate) fn git<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::Git {
        what,
        reason: error.to_string(),
    }
}
