//! Which runtime worker runs which replica of which agent: small kv entries, claimed by
//! compare-and-set, that may vanish and are claimed again.

use futures::StreamExt;
use serde::{Deserialize, Serialize};
use vlinder_bus::streams::BUCKET_REPLICAS;
use vlinder_bus::{Bus, KvEntry, KvEvent};
use vlinder_core::AgentName;

/// A claim on one replica and how it is doing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReplicaClaim {
    /// The node that runs it.
    pub node: String,
    /// The role of the worker that runs it.
    pub role: String,
    /// The index of that worker.
    pub index: u32,
    /// The deployment's version.
    pub version: u64,
    /// `starting ready backoff crash-looping draining`.
    pub state: String,
    /// Process id, 0 when there is none.
    pub pid: u32,
    /// How often it was restarted.
    pub restarts: u64,
    /// Why it is not ready.
    pub reason: String,
}

/// The kv key of a replica.
pub fn replica_key(agent: &AgentName, index: u32) -> String {
    format!("{agent}.{index}")
}

/// Agent and replica index of a kv key.
pub fn parse_key(key: &str) -> Option<(AgentName, u32)> {
    let (agent, index) = key.rsplit_once('.')?;
    Some((AgentName::new(agent).ok()?, index.parse().ok()?))
}

/// All claims, with their kv entries.
pub async fn read_all(
    bus: &Bus,
) -> Result<Vec<(AgentName, u32, KvEntry, ReplicaClaim)>, vlinder_bus::Error> {
    let mut watch = bus.kv_watch(BUCKET_REPLICAS).await?;
    let mut claims = Vec::new();
    while let Some(event) = watch.next().await {
        match event? {
            KvEvent::Put(entry) => {
                let claim = serde_json::from_slice::<ReplicaClaim>(&entry.value);
                if let (Some((agent, index)), Ok(claim)) = (parse_key(&entry.key), claim) {
                    claims.push((agent, index, entry, claim));
                }
            }
            KvEvent::Gone { .. } => {}
            KvEvent::Current => break,
        }
    }
    Ok(claims)
}
