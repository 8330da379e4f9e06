//! What can go wrong on the bus, named after what it means to the caller.

/// An error of the bus.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody else appended first; nothing was stored.
    #[error("conflict on {subject}: another message came first")]
    Conflict {
        /// Where.
        subject: String,
    },
    /// The kv entry has another revision than expected, or exists already.
    #[error("kv entry {key} was changed by somebody else")]
    KvConflict {
        /// Which entry.
        key: String,
    },
    /// The log refuses more: its limit is reached. Nothing was stored.
    #[error("the log {stream} is full: raise queue.max_bytes or set a retention")]
    Full {
        /// Which stream.
        stream: String,
    },
    /// The disk under the embedded log has no room. Nothing was stored.
    #[error("the disk that holds {path} is full: nothing was stored; free some space")]
    DiskFull {
        /// The file of the log.
        path: String,
    },
    /// The message is larger than the bus takes.
    #[error("message of {len} bytes exceeds the limit of {max} bytes")]
    TooLarge {
        /// Its size in bytes.
        len: u64,
        /// The limit in bytes.
        max: u64,
    },
    /// No answer in time. Whether the operation happened is unknown until read back.
    #[error("the bus did not answer {operation} in time")]
    Timeout {
        /// What was asked.
        operation: &'static str,
    },
    /// The bus cannot be reached.
    #[error("cannot reach the bus at {address}: {reason}")]
    Unreachable {
        /// Where it was looked for.
        address: String,
        /// The first line of the cause.
        reason: String,
    },
    /// The bus is reachable but not fit: too old, without JetStream, credentials refused.
    #[error("the bus at {address} cannot be used: {reason}")]
    Unfit {
        /// Where it is.
        address: String,
        /// What is missing, and what to do.
        reason: String,
    },
    /// A stream, queue or bucket that should exist does not.
    #[error("{what} does not exist on the bus")]
    Missing {
        /// Its name.
        what: String,
    },
    /// What came back cannot be read as a message of ours.
    #[error("undecodable message {subject} at {seq}: {reason}")]
    Undecodable {
        /// Its subject.
        subject: String,
        /// Its sequence number.
        seq: u64,
        /// What is wrong.
        reason: String,
    },
    /// The content does not hash to its name.
    #[error("blob {hash} is damaged or incomplete")]
    BlobDamaged {
        /// Its name.
        hash: String,
    },
    /// The embedded store failed: disk full, damaged file.
    #[error("the embedded log failed: {reason}")]
    Storage {
        /// What SQLite or the file system said.
        reason: String,
    },
    /// Another process holds the data directory.
    #[error("{path} is in use by another vlinderd{holder}")]
    Locked {
        /// The locked file.
        path: String,
        /// ` (pid N)` where known.
        holder: String,
    },
    /// The bus was closed by this process.
    #[error("the bus is closed")]
    Closed,
    /// Anything else that the bus refused, in its words.
    #[error("the bus refused {operation}: {reason}")]
    Refused {
        /// What was asked.
        operation: &'static str,
        /// The server's words.
        reason: String,
    },
}

impl Error {
    /// Whether the same call may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Timeout { .. } | Self::Unreachable { .. })
    }

    /// Whether there is no room: by the log's limit or by the disk's. Nothing was stored.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. } | Self::DiskFull { .. })
    }
}
