//! What can go wrong with the supervisor itself. Endings of workers are no errors but data
//! ([`crate::WorkerExit`]).

use std::io;

use vlinder_core::WorkerRole;

/// An error of the supervisor or of a worker's control channel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The role is not part of the plan, so there is no program for it.
    #[error("this node has no plan for the role {0}; add it to the configuration and reload")]
    UnknownRole(WorkerRole),
    /// The count is above what one node supervises.
    #[error("{role} = {count} is above the limit of {max} workers of one role on a node")]
    CountTooHigh {
        /// The role asked for.
        role: WorkerRole,
        /// The count asked for.
        count: u32,
        /// The limit.
        max: u32,
    },
    /// The plan names a role twice.
    #[error("the plan names the role {0} twice; keep one entry")]
    DuplicateRole(WorkerRole),
    /// The configuration of a role does not fit into a control message.
    #[error(
        "the configuration of {role} has {bytes} bytes as JSON, at most {max} can be sent to a worker"
    )]
    ConfigTooLarge {
        /// The role.
        role: WorkerRole,
        /// Its size.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// The plan gives a role too many sockets.
    #[error("the plan gives {role} {count} listeners, at most {max} can be handed to a worker")]
    TooManyListeners {
        /// The role.
        role: WorkerRole,
        /// How many.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// The supervisor has stopped, or stops now and takes no more orders.
    #[error("the supervisor is stopping and takes no more orders")]
    Stopping,
    /// A child process could not be started.
    #[error("cannot start the process of {role} {index}")]
    Spawn {
        /// Role of the worker.
        role: WorkerRole,
        /// Index of the worker.
        index: u32,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A call to the operating system failed.
    #[error("cannot {doing}")]
    System {
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A worker process was started by hand, or connected twice.
    #[error(
        "no control channel on file descriptor 3; workers are started by vlinderd, not by hand"
    )]
    NotSupervised,
    /// The first message did not come in time.
    #[error("the supervisor sent no start message within {0:?}")]
    NoStart(std::time::Duration),
    /// The other side speaks another version of the control protocol.
    #[error(
        "the supervisor speaks control protocol {theirs}, this worker {ours}; restart the daemon"
    )]
    ControlVersion {
        /// Version of this binary.
        ours: u32,
        /// Version in the message.
        theirs: u32,
    },
    /// A frame breaks the control protocol.
    #[error("broken control message: {0}")]
    Control(String),
}

impl Error {
    pub(crate) fn system(doing: &'static str) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |errno| Self::System {
            doing,
            source: errno.into(),
        }
    }

    pub(crate) fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { doing, source }
    }
}
