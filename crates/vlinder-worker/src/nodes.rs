//! What each node says about itself and its workers: one kv entry a node, written every second and
//! at every change by the node's supervisor. Whoever reads it judges liveness by its age.

use bytes::Bytes;
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use vlinder_bus::streams::BUCKET_NODES;
use vlinder_bus::{Bus, KvEntry, KvEvent, subjects};

/// After so long a silence a node counts as dead, unless its own report names another time, in
/// milliseconds.
pub const DEAD_AFTER_MS: u64 = 5000;

/// What a node says about itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeReport {
    /// Its name.
    pub node: String,
    /// Made anew at every start of the daemon.
    pub incarnation: String,
    /// The daemon's version.
    pub version: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// When the daemon started, milliseconds since the Unix epoch.
    pub started_at_ms: u64,
    /// The daemon left on purpose; its workers are gone.
    pub left: bool,
    /// After so long a silence it wants to be counted as dead, in milliseconds; 0: [`DEAD_AFTER_MS`].
    /// The node says it itself, because it also decides how often it reports.
    pub dead_after_ms: u64,
    /// Its workers.
    pub workers: Vec<WorkerReport>,
}

impl NodeReport {
    /// Whether the node is up, as far as this report, which is `entry`, tells.
    pub fn is_live(&self, bus: &Bus, entry: &KvEntry) -> bool {
        self.is_live_at(bus.now_ms(), entry.time_ms)
    }

    fn is_live_at(&self, now_ms: u64, written_ms: u64) -> bool {
        let dead_after_ms = match self.dead_after_ms {
            0 => DEAD_AFTER_MS,
            own => own,
        };
        !self.left && now_ms.saturating_sub(written_ms) <= dead_after_ms
    }
}

/// What a node says about one of its workers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkerReport {
    /// Role, as in the config.
    pub role: String,
    /// Its place among the workers of that role, from 0.
    pub index: u32,
    /// Process id; that of the daemon when embedded, 0 when there is none.
    pub pid: u32,
    /// `starting ready waiting draining backoff crash-looping stopped`.
    pub state: String,
    /// Why it waits or backs off.
    pub reason: String,
    /// How often it was restarted.
    pub restarts: u64,
    /// How long it has been up, in milliseconds.
    pub uptime_ms: u64,
    /// How it ended last.
    pub last_exit: String,
    /// Its last lines before that.
    pub last_lines: Vec<String>,
    /// Where it listens.
    pub address: String,
    /// Free notes of the worker.
    pub notes: BTreeMap<String, String>,
    /// What it holds.
    pub jobs: Vec<HeldJob>,
}

impl WorkerReport {
    /// Whether it can do its job: `waiting` counts as up.
    pub fn is_up(&self) -> bool {
        matches!(self.state.as_str(), "ready" | "waiting")
    }
}

/// A delivery that a worker holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldJob {
    /// `STREAM:seq` of the message.
    pub job: String,
    /// Its delivery count, from 1.
    pub attempt: u64,
}

/// The kv key of a node.
pub fn node_key(node: &str) -> String {
    subjects::encode(node)
}

/// Writes a node's report.
pub async fn publish(bus: &Bus, report: &NodeReport) -> Result<(), vlinder_bus::Error> {
    let value = serde_json::to_vec(report).unwrap_or_default();
    bus.kv_put(
        BUCKET_NODES,
        &node_key(&report.node),
        Bytes::from(value),
        None,
    )
    .await?;
    Ok(())
}

/// Reads all reports, fresh and stale.
pub async fn read_all(bus: &Bus) -> Result<Vec<(KvEntry, NodeReport)>, vlinder_bus::Error> {
    let mut watch = bus.kv_watch(BUCKET_NODES).await?;
    let mut reports = Vec::new();
    while let Some(event) = watch.next().await {
        match event? {
            KvEvent::Put(entry) => {
                if let Ok(report) = serde_json::from_slice::<NodeReport>(&entry.value) {
                    reports.retain(|(_, known): &(KvEntry, NodeReport)| known.node != report.node);
                    reports.push((entry, report));
                }
            }
            KvEvent::Gone { .. } => {}
            KvEvent::Current => break,
        }
    }
    Ok(reports)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_lives_as_long_as_it_says() {
        let mut report = NodeReport::default();
        assert!(report.is_live_at(5_000, 0));
        assert!(!report.is_live_at(5_001, 0));
        assert!(report.is_live_at(0, 7), "clocks may differ a little");
        report.dead_after_ms = 60_000;
        assert!(report.is_live_at(60_000, 0));
        report.left = true;
        assert!(!report.is_live_at(0, 0));
    }
}
