//! A lease: who does what only one may do at a time.
//!
//! It lives in a bucket with a time to live, so whoever stalls or dies loses it. It says who shall
//! work, and is no fence: a holder that slept through its end learns so only at its next renewal. What
//! the holder writes to must refuse it itself, by an epoch that each holder raises when it begins.

use crate::bus::Bus;
use crate::error::Error;
use crate::streams::{BUCKET_LEASES, LEASE_TTL};
use bytes::Bytes;
use tokio::time::Instant;

/// What came of asking for a lease.
pub enum Asked {
    /// It is ours.
    Ours(Lease),
    /// Somebody else has it.
    Held {
        /// Who.
        by: String,
    },
}

/// A lease that is held. Renew it every third of [`LEASE_TTL`].
pub struct Lease {
    bus: Bus,
    key: String,
    by: Bytes,
    revision: u64,
    renewed: Instant,
}

impl Lease {
    /// Asks for the lease `key` in the name `by`. A lease of the same name is that of a predecessor
    /// who is gone, and is taken over at once.
    pub async fn ask(bus: &Bus, key: &str, by: &str) -> Result<Asked, Error> {
        let expect = match bus.kv_get(BUCKET_LEASES, key).await? {
            Some(entry) if entry.value != by.as_bytes() => {
                let by = String::from_utf8_lossy(&entry.value).into_owned();
                return Ok(Asked::Held { by });
            }
            Some(entry) => entry.revision,
            None => 0,
        };
        let asked_at = Instant::now();
        let value = Bytes::copy_from_slice(by.as_bytes());
        match bus
            .kv_put(BUCKET_LEASES, key, value.clone(), Some(expect))
            .await
        {
            Ok(revision) => Ok(Asked::Ours(Self {
                bus: bus.clone(),
                key: key.to_owned(),
                by: value,
                revision,
                renewed: asked_at,
            })),
            Err(Error::KvConflict { .. }) => Ok(Asked::Held {
                by: "another worker".to_owned(),
            }),
            Err(error) => Err(error),
        }
    }

    /// Whether nobody else can have it yet, by this process's own clock.
    pub fn is_held(&self) -> bool {
        self.renewed.elapsed() < LEASE_TTL
    }

    /// Renews it; `KvConflict` when somebody else has it.
    pub async fn renew(&mut self) -> Result<(), Error> {
        let asked_at = Instant::now();
        let renewed = self.bus.kv_put(
            BUCKET_LEASES,
            &self.key,
            self.by.clone(),
            Some(self.revision),
        );
        self.revision = renewed.await?;
        self.renewed = asked_at;
        Ok(())
    }

    /// Lets the next one have it. If that fails, it expires.
    pub async fn release(self) {
        let freed = self
            .bus
            .kv_delete(BUCKET_LEASES, &self.key, Some(self.revision));
        if let Err(error) = freed.await {
            tracing::debug!(%error, key = self.key, "the lease will expire");
        }
    }
}
