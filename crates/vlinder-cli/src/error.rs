//! How a command can end other than well, and the exit code of each way (interfaces.md §1, §3).

use serde_json::{Value, json};

/// Why a command did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A service refused, failed or cannot be reached.
    #[error(transparent)]
    Client(#[from] vlinder_client::Error),
    /// The command line or a file that it names is wrong.
    #[error("{0}")]
    Usage(String),
    /// It is there already, or in another state than it must be.
    #[error("{0}")]
    Conflict(String),
    /// What was named does not exist.
    #[error("{0}")]
    NotFound(String),
    /// A turn, or the start of an agent, failed on the agent's side.
    #[error("the agent failed ({code}): {message}")]
    AgentFailed {
        /// What kind of failure, as recorded.
        code: String,
        /// What the agent or the runtime said.
        message: String,
    },
    /// It was not done in time.
    #[error("{0}")]
    Deadline(String),
    /// No live worker can serve it.
    #[error("{0}")]
    NoWorker(String),
    /// Somebody ended it.
    #[error("{0}")]
    Cancelled(String),
    /// Something was found to be wrong.
    #[error("{0}")]
    Failed(String),
    /// A file or stream of this machine failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it did not work.
        source: std::io::Error,
    },
    /// Whoever read our output went away.
    #[error("the reader of the output went away")]
    OutputClosed,
}

impl Error {
    /// An I/O error with what was tried.
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| match source.kind() {
            std::io::ErrorKind::BrokenPipe => Self::OutputClosed,
            _ => Self::Io { what, source },
        }
    }

    /// The exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Client(error) => error.exit_code(),
            Self::OutputClosed => 0,
            Self::Failed(_) | Self::Io { .. } => 1,
            Self::Usage(_) => 2,
            Self::NoWorker(_) => 3,
            Self::NotFound(_) => 5,
            Self::AgentFailed { .. } => 6,
            Self::Deadline(_) => 7,
            Self::Conflict(_) => 9,
            Self::Cancelled(_) => 10,
        }
    }

    /// A stable name for programs.
    pub fn code(&self) -> &str {
        match self {
            Self::Client(error) => error.code(),
            Self::OutputClosed => "output_closed",
            Self::Failed(_) => "failed",
            Self::Io { .. } => "io",
            Self::Usage(_) => "invalid_argument",
            Self::NoWorker(_) => "no_worker",
            Self::NotFound(_) => "not_found",
            Self::AgentFailed { .. } => "agent_failed",
            Self::Deadline(_) => "deadline",
            Self::Conflict(_) => "conflict",
            Self::Cancelled(_) => "cancelled",
        }
    }

    /// What programs read: `{code, message, exit}`. Also where another value of the same command
    /// carries it, as its field `error`.
    pub fn json(&self) -> Value {
        json!({ "code": self.code(), "message": self.to_string(), "exit": self.exit_code() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_the_interface() {
        let text = || "x".to_owned();
        let failed = Error::AgentFailed {
            code: text(),
            message: text(),
        };
        for (error, code) in [
            (Error::Failed(text()), 1),
            (Error::Usage(text()), 2),
            (Error::NoWorker(text()), 3),
            (Error::NotFound(text()), 5),
            (failed, 6),
            (Error::Deadline(text()), 7),
            (Error::Conflict(text()), 9),
            (Error::Cancelled(text()), 10),
        ] {
            assert_eq!(error.exit_code(), code, "{error:?}");
            assert_eq!(error.json()["code"], error.code());
            assert_eq!(error.json()["exit"], code);
        }
    }
}
