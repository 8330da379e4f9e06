//! The streams and buckets of the bus, each with its limits and the reason for them.

use crate::subjects;
use std::fmt;
use std::time::Duration;
use vlinder_core::Namespace;

/// Bodies above this many bytes go to the blob store and are named by hash in the message. NATS
/// takes 1 MiB by default; well below it, large messages already cost the server memory.
pub const INLINE_BODY_MAX: usize = 64 * 1024;
/// How long the server remembers message ids. Longer windows cost it memory; correctness does not
/// rest on it (design.md rule 4).
pub const DEDUP_WINDOW: Duration = Duration::from_secs(120);
/// A delivery that is neither acknowledged nor reported in progress for so long goes to another
/// worker. The fallback for a dead node; a dead process is noticed at once.
pub const ACK_WAIT: Duration = Duration::from_secs(3);
/// How often a worker reports progress on work it holds. At least three chances within `ACK_WAIT`.
pub const PROGRESS_EVERY: Duration = Duration::from_millis(800);
/// Deliveries of one queue that may be out at once: its backpressure.
pub const ACK_PENDING_MAX: i64 = 4096;
/// Share of the log's limit from which on no new turn is admitted, so that running ones can end.
pub const ADMISSION_PERCENT: u64 = 90;
/// Reserved for dead letters, in bytes.
pub const SYS_BYTES_MAX: u64 = 256 * 1024 * 1024;
/// Reserved for control messages (sessions, deployments), in bytes.
pub const CTL_BYTES_MAX: u64 = 1024 * 1024 * 1024;

const _: () = assert!(PROGRESS_EVERY.as_millis() * 3 < ACK_WAIT.as_millis());

/// A stream of the bus.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum StreamName {
    /// Turns, requests, answers, ends of a namespace.
    Log(Namespace),
    /// Sessions and deployments of a namespace: small, kept for ever.
    Ctl(Namespace),
    /// Dead letters.
    Sys,
}

impl StreamName {
    /// The name as the server knows it.
    pub fn as_text(&self) -> String {
        match self {
            Self::Log(ns) => format!("VLINDER_LOG_{ns}"),
            Self::Ctl(ns) => format!("VLINDER_CTL_{ns}"),
            Self::Sys => "VLINDER_SYS".to_owned(),
        }
    }

    /// Which subjects it stores.
    pub fn subjects(&self) -> Vec<String> {
        match self {
            Self::Log(ns) => subjects::log_subjects(ns),
            Self::Ctl(ns) => subjects::ctl_subjects(ns),
            Self::Sys => subjects::sys_subjects(),
        }
    }

    /// Its size limit in bytes, given that of the log.
    pub fn max_bytes(&self, log_max_bytes: u64) -> u64 {
        match self {
            Self::Log(_) => log_max_bytes,
            Self::Ctl(_) => CTL_BYTES_MAX,
            Self::Sys => SYS_BYTES_MAX,
        }
    }
}

impl fmt::Display for StreamName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.as_text())
    }
}

/// Kv bucket: what each node and its workers are doing. Key: encoded node name.
pub const BUCKET_NODES: &str = "vlinder_nodes";
/// Kv bucket: leases, with a time to live.
pub const BUCKET_LEASES: &str = "vlinder_leases";
/// Kv bucket: which models each node's upstreams offer now. Key: node and backend, encoded.
pub const BUCKET_OFFERS: &str = "vlinder_offers";
/// Kv bucket: which runtime worker runs which replica of which agent.
pub const BUCKET_REPLICAS: &str = "vlinder_replicas";
/// Kv bucket: how many workers each suspicious message has ended.
pub const BUCKET_DEATHS: &str = "vlinder_deaths";
/// Kv bucket: which turns are open, as a checkpoint of the sweeper; rebuilt from the log if lost.
pub const BUCKET_OPEN_TURNS: &str = "vlinder_open_turns";
/// Kv bucket: what is known of the latest healing of each stream. Key: the stream.
pub const BUCKET_HEALING: &str = "vlinder_healing";
/// How long deaths are remembered; a message is retried within seconds.
pub const DEATHS_TTL: Duration = Duration::from_secs(3600);
/// How long a lease lives without being renewed. Renew at a third of it.
pub const LEASE_TTL: Duration = Duration::from_secs(6);

/// Every bucket with its time to live.
pub const BUCKETS: [(&str, Option<Duration>); 7] = [
    (BUCKET_NODES, None),
    (BUCKET_LEASES, Some(LEASE_TTL)),
    (BUCKET_OFFERS, None),
    (BUCKET_REPLICAS, None),
    (BUCKET_OPEN_TURNS, None),
    (BUCKET_HEALING, None),
    (BUCKET_DEATHS, Some(DEATHS_TTL)),
];
