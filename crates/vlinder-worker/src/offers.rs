//! Which models every node's upstreams offer: small kv entries, one for each inference worker, which
//! may vanish and are written again by whoever offers. A worker that was killed leaves its offer
//! behind: [`crate::serving`] tells which offers are good now.

use crate::WorkerCx;
use bytes::Bytes;
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use vlinder_bus::streams::BUCKET_OFFERS;
use vlinder_bus::{Bus, KvEntry, KvEvent, subjects};

/// What one worker's upstream offers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The node.
    pub node: String,
    /// `ollama`, `openai` ….
    pub backend: String,
    /// The upstream's address.
    pub endpoint: String,
    /// The models.
    pub models: Vec<OfferedModel>,
    /// Why there are none, when the upstream is away.
    pub problem: Option<String>,
}

/// One model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferedModel {
    /// Its name, as the upstream spells it.
    pub name: String,
    /// Its size in bytes, where known.
    pub size: Option<u64>,
}

/// The kv key of a worker's offer.
pub fn offer_key(cx: &WorkerCx, backend: &str) -> String {
    format!(
        "{}.{}.{}",
        subjects::encode(cx.id.node.as_str()),
        subjects::encode(backend),
        cx.id.index
    )
}

/// Publishes what this worker's upstream offers now.
pub async fn publish(cx: &WorkerCx, offer: &Offer) -> Result<(), vlinder_bus::Error> {
    let value = serde_json::to_vec(offer).unwrap_or_default();
    cx.bus
        .kv_put(
            BUCKET_OFFERS,
            &offer_key(cx, &offer.backend),
            Bytes::from(value),
            None,
        )
        .await?;
    Ok(())
}

/// Which worker of its node wrote the offer under this key.
pub(crate) fn index_of(key: &str) -> Option<u32> {
    key.rsplit('.').next()?.parse().ok()
}

/// All offers with their kv entries, of live and dead workers; [`crate::serving::Serving`] tells them
/// apart.
pub async fn read_entries(bus: &Bus) -> Result<Vec<(KvEntry, Offer)>, vlinder_bus::Error> {
    let mut watch = bus.kv_watch(BUCKET_OFFERS).await?;
    let mut offers: BTreeMap<String, (KvEntry, Offer)> = BTreeMap::new();
    while let Some(event) = watch.next().await {
        match event? {
            KvEvent::Put(entry) => {
                if let Ok(offer) = serde_json::from_slice::<Offer>(&entry.value) {
                    offers.insert(entry.key.clone(), (entry, offer));
                }
            }
            KvEvent::Gone { key } => drop(offers.remove(&key)),
            KvEvent::Current => break,
        }
    }
    Ok(offers.into_values().collect())
}

/// All offers of live and dead workers.
pub async fn read_all(bus: &Bus) -> Result<Vec<Offer>, vlinder_bus::Error> {
    let entries = read_entries(bus).await?;
    Ok(entries.into_iter().map(|(_, offer)| offer).collect())
}
