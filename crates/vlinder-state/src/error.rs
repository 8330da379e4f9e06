//! What can go wrong in the state service, and the one place that says so over gRPC.

use tonic::Status;

/// An error of the state service.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field of the request is not what it must be.
    #[error("{field}: {reason}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// What is wrong and what was expected.
        reason: String,
    },
    /// What was asked for is not on record.
    #[error("{what} does not exist{hint}")]
    NotFound {
        /// What, with its name.
        what: String,
        /// `; did you mean …?`, or nothing.
        hint: String,
    },
    /// Several things fit.
    #[error("{what} is ambiguous; it fits {}", some.join(", "))]
    Ambiguous {
        /// What was asked.
        what: String,
        /// Some of those that fit.
        some: Vec<String>,
    },
    /// The projection has not caught up with the log in time.
    #[error("projection lags by {behind} messages; try again")]
    Lagging {
        /// By how many messages.
        behind: u64,
    },
    /// The log did not say in time how far it is.
    #[error("the log did not answer in time; try again")]
    LogSilent,
    /// Too much of this at once.
    #[error("too many {what} at once; try again")]
    Busy {
        /// Of what.
        what: &'static str,
    },
    /// A query took longer than it may.
    #[error("the query took longer than {seconds} s; ask for less at once")]
    Slow {
        /// The bound.
        seconds: u64,
    },
    /// The file of the projection is damaged; it is being rebuilt from the log.
    #[error("the projection's file is damaged and is being rebuilt from the log; try again")]
    Damaged,
    /// A node that the projection knows is not where the log had it.
    #[error("the log lacks {node} at {place}: verify the session")]
    LogLacks {
        /// Kind and hash.
        node: String,
        /// `stream:seq`.
        place: String,
    },
    /// The bus failed.
    #[error("the bus failed")]
    Bus(#[from] vlinder_bus::Error),
    /// SQLite failed.
    #[error("the projection's database failed")]
    Sqlite(#[from] rusqlite::Error),
    /// A file could not be opened or removed.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// A thread of the service panicked.
    #[error("a query of the projection panicked")]
    Panicked,
}

impl Error {
    /// Whether SQLite says that the file is not what it wrote.
    pub(crate) fn is_damage(&self) -> bool {
        use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
        match self {
            Self::Damaged => true,
            Self::Sqlite(error) => {
                matches!(
                    error.sqlite_error_code(),
                    Some(DatabaseCorrupt | NotADatabase)
                ) || is_schema_damage(error)
            }
            _ => false,
        }
    }
}

/// Tables and columns that this release makes are gone, or hold what it never writes there.
fn is_schema_damage(error: &rusqlite::Error) -> bool {
    match error {
        rusqlite::Error::InvalidColumnType(..)
        | rusqlite::Error::FromSqlConversionFailure(..)
        | rusqlite::Error::IntegralValueOutOfRange(..) => true,
        rusqlite::Error::SqliteFailure(_, Some(text)) => {
            text.starts_with("no such table") || text.starts_with("no such column")
        }
        rusqlite::Error::SqlInputError { msg, .. } => {
            msg.starts_with("no such table") || msg.starts_with("no such column")
        }
        _ => false,
    }
}

/// An error with all its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match &error {
            Error::Invalid { .. } | Error::Ambiguous { .. } => Status::invalid_argument(text),
            Error::NotFound { .. } => Status::not_found(text),
            Error::Lagging { .. } | Error::LogSilent | Error::Damaged => Status::unavailable(text),
            Error::Busy { .. } | Error::Slow { .. } => Status::resource_exhausted(text),
            Error::LogLacks { .. } => Status::data_loss(text),
            Error::Bus(bus) => {
                tracing::warn!(error = chain(&error), "a read failed");
                match bus {
                    vlinder_bus::Error::BlobDamaged { .. }
                    | vlinder_bus::Error::Undecodable { .. } => Status::data_loss(bus.to_string()),
                    bus if bus.is_retryable() => Status::unavailable(bus.to_string()),
                    vlinder_bus::Error::Closed => Status::unavailable(bus.to_string()),
                    bus => Status::internal(bus.to_string()),
                }
            }
            Error::Sqlite(_) | Error::Io { .. } | Error::Panicked => {
                tracing::error!(error = chain(&error), "a read failed");
                Status::internal(text)
            }
        }
    }
}
