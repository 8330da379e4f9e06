//! What can go wrong between a client and its cluster, and what that means to a shell.

use std::error::Error as _;
use std::time::Duration;
use tonic::{Code, Status};

/// Longest message of a service that is shown, in characters: a service may repeat what an agent said.
const MESSAGE_CHARS_MAX: usize = 2000;

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No address of the service takes connections.
    #[error(
        "cannot reach the {service} service at {address} ({cause}): is vlinderd running? \
         `vlinderd` starts one, `--addr` names another"
    )]
    Unreachable {
        /// Which service.
        service: &'static str,
        /// Where it was looked for; several are separated by commas.
        address: String,
        /// The last cause.
        cause: String,
    },
    /// The service took the call and said nothing in time.
    #[error(
        "the {service} service at {address} did not answer within {:.1} s; `vlinder worker list` may say why",
        .after.as_secs_f32()
    )]
    NoAnswer {
        /// Which service.
        service: &'static str,
        /// Which address was asked last.
        address: String,
        /// How long was waited, all tries together.
        after: Duration,
    },
    /// The connection broke while the call was open; whether it took effect is unknown.
    #[error("the connection to the {service} service at {address} broke ({cause})")]
    Broken {
        /// Which service.
        service: &'static str,
        /// Which address was asked.
        address: String,
        /// What the transport said.
        cause: String,
    },
    /// The service refused or failed.
    #[error("{message}")]
    Service {
        /// The gRPC code.
        code: Code,
        /// What it said.
        message: String,
    },
    /// A turn's stream could not be taken up again in time. The turn itself goes on.
    #[error(
        "lost sight of turn {submission} ({cause}); it goes on without us: \
         `vlinder turn get {submission}` shows it, `agent run` with `--submission {submission}` attaches"
    )]
    TurnLost {
        /// The turn.
        submission: String,
        /// The last cause.
        cause: String,
    },
    /// An address, token or argument that cannot be used.
    #[error("{0}")]
    Usage(String),
}

impl Error {
    /// What a service's status means: the transport's own errors are told from its answers.
    pub(crate) fn of_status(service: &'static str, address: &str, status: &Status) -> Self {
        // Only what never came from the other side has a source.
        if let Some(source) = status.source() {
            return Self::Broken {
                service,
                address: address.to_owned(),
                cause: innermost(source),
            };
        }
        let message = status.message();
        let message = match message.is_empty() {
            true => format!("the {service} service answered {:?}", status.code()),
            false => message.chars().take(MESSAGE_CHARS_MAX).collect(),
        };
        Self::Service {
            code: status.code(),
            message,
        }
    }

    /// The exit code of a command that ends with this error (interfaces.md §1 and §3).
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Unreachable { .. }
            | Self::NoAnswer { .. }
            | Self::Broken { .. }
            | Self::TurnLost { .. } => 3,
            Self::Usage(_) => 2,
            Self::Service { code, .. } => match code {
                Code::InvalidArgument | Code::OutOfRange => 2,
                Code::Unavailable => 3,
                Code::NotFound => 5,
                Code::DeadlineExceeded => 7,
                Code::Unauthenticated | Code::PermissionDenied => 8,
                Code::Aborted | Code::AlreadyExists | Code::FailedPrecondition => 9,
                Code::Cancelled => 10,
                Code::Ok
                | Code::Unknown
                | Code::ResourceExhausted
                | Code::Unimplemented
                | Code::Internal
                | Code::DataLoss => 1,
            },
        }
    }

    /// A stable name for programs: `{"error": {"code": …}}`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unreachable { .. }
            | Self::NoAnswer { .. }
            | Self::Broken { .. }
            | Self::TurnLost { .. } => "unavailable",
            Self::Usage(_) => "invalid_argument",
            Self::Service { code, .. } => match code {
                Code::InvalidArgument | Code::OutOfRange => "invalid_argument",
                Code::Unavailable => "unavailable",
                Code::NotFound => "not_found",
                Code::DeadlineExceeded => "deadline",
                Code::Unauthenticated | Code::PermissionDenied => "refused",
                Code::Aborted | Code::AlreadyExists | Code::FailedPrecondition => "conflict",
                Code::Cancelled => "cancelled",
                Code::ResourceExhausted => "exhausted",
                Code::Unimplemented => "unsupported",
                Code::Ok | Code::Unknown | Code::Internal | Code::DataLoss => "internal",
            },
        }
    }

    /// Whether the thing that was named does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(
            self,
            Self::Service {
                code: Code::NotFound,
                ..
            }
        )
    }

    /// Whether the credential was refused.
    pub(crate) fn is_unauthenticated(&self) -> bool {
        matches!(
            self,
            Self::Service {
                code: Code::Unauthenticated,
                ..
            }
        )
    }

    /// Whether another try, here or elsewhere, may succeed without anyone doing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::NoAnswer { .. } | Self::Broken { .. } => true,
            // `Unknown` is what a stream cut off before its trailers looks like.
            Self::Service { code, .. } => matches!(code, Code::Unavailable | Code::Unknown),
            Self::TurnLost { .. } | Self::Usage(_) => false,
        }
    }
}

/// The text of the last cause in a chain: the one that says what happened.
pub(crate) fn innermost(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_the_interface() {
        for (code, exit, name) in [
            (Code::InvalidArgument, 2, "invalid_argument"),
            (Code::Unavailable, 3, "unavailable"),
            (Code::NotFound, 5, "not_found"),
            (Code::DeadlineExceeded, 7, "deadline"),
            (Code::Unauthenticated, 8, "refused"),
            (Code::PermissionDenied, 8, "refused"),
            (Code::Aborted, 9, "conflict"),
            (Code::AlreadyExists, 9, "conflict"),
            (Code::FailedPrecondition, 9, "conflict"),
            (Code::Cancelled, 10, "cancelled"),
            (Code::Internal, 1, "internal"),
            (Code::ResourceExhausted, 1, "exhausted"),
        ] {
            let error = Error::of_status("harness", "a", &Status::new(code, "because"));
            assert_eq!((error.exit_code(), error.code()), (exit, name), "{code:?}");
            assert_eq!(error.to_string(), "because");
        }
    }

    #[test]
    fn what_the_transport_says_is_no_answer_of_the_service() {
        let broken = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        let status = Status::from_error(Box::new(broken));
        let error = Error::of_status("state", "http://hub:9092", &status);
        assert!(matches!(error, Error::Broken { .. }), "{error:?}");
        assert!(error.to_string().contains("http://hub:9092"), "{error}");
        assert_eq!(error.exit_code(), 3);
        assert!(error.is_transient());
    }

    #[test]
    fn a_long_message_is_cut() {
        let status = Status::internal("x".repeat(1_000_000));
        let error = Error::of_status("state", "a", &status);
        assert_eq!(error.to_string().len(), MESSAGE_CHARS_MAX);
    }
}
