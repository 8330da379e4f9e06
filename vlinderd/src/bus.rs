//! From configuration to bus.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use vlinder_bus::local::{LocalBus, LocalOptions, Sync};
use vlinder_bus::nats::{self, NatsOptions};
use vlinder_bus::{Bus, Error};
use vlinder_config::{Config, QueueBackend, QueueSync, Secret};
use vlinder_core::Namespace;

/// The connection options of the `nats` backend.
pub fn nats_options(config: &Config, name: &str) -> NatsOptions {
    let queue = &config.queue;
    NatsOptions {
        urls: queue
            .nats_url
            .iter()
            .map(|url| url.expose().to_owned())
            .collect(),
        creds: queue.nats_creds.clone(),
        nkey: queue
            .nats_nkey
            .as_ref()
            .map(|seed| seed.expose().to_owned()),
        token: queue
            .nats_token
            .as_ref()
            .map(Secret::expose)
            .map(ToOwned::to_owned),
        ca: queue.nats_ca.clone(),
        cert: queue.nats_cert.clone(),
        key: queue.nats_key.clone(),
        replicas: queue.replicas as usize,
        max_bytes: queue.max_bytes,
        keep_replicas: !queue.written.replicas,
        keep_max_bytes: !queue.written.max_bytes,
        sync_always: queue.sync == QueueSync::Always,
        name: name.to_owned(),
    }
}

/// Connects to NATS, trying until `deadline` has passed.
pub async fn connect(config: &Config, name: &str, deadline: Duration) -> Result<Bus, Error> {
    Ok(Bus::new(
        nats::connect(nats_options(config, name), deadline).await?,
    ))
}

/// The bus of the daemon itself.
pub struct Opened {
    /// The bus.
    pub bus: Bus,
    /// The embedded store, whose failure ends the process.
    pub local: Option<Arc<LocalBus>>,
}

impl Opened {
    /// Returns the reason when the embedded store has broken; never for NATS.
    pub async fn failed(&self) -> String {
        match &self.local {
            Some(local) => local.failed().await,
            None => std::future::pending().await,
        }
    }
}

/// Opens the bus of the daemon itself: the embedded log, or a connection to NATS; makes streams
/// and buckets where they are missing.
pub async fn open(config: &Config, data_dir: &Path, deadline: Duration) -> Result<Opened, Error> {
    let opened = match config.queue.backend {
        QueueBackend::Nats => {
            let name = format!("vlinderd {}", config.node.name);
            Opened {
                bus: connect(config, &name, deadline).await?,
                local: None,
            }
        }
        QueueBackend::Local => {
            let always = config.queue.sync == QueueSync::Always;
            let options = LocalOptions {
                max_bytes: config.queue.max_bytes,
                sync: if always { Sync::Always } else { Sync::Interval },
                ..LocalOptions::new(data_dir.join("bus.db"))
            };
            let local = LocalBus::open(options).await?;
            Opened {
                bus: Bus::new(local.clone()),
                local: Some(local),
            }
        }
    };
    opened.bus.prepare(&Namespace::default_ns()).await?;
    Ok(opened)
}
