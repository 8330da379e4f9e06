//! Work as it comes from a queue: [`Puller`] asks for it, [`Delivery`] is a message and the right to
//! say something about it.

use crate::backend::{RawDelivery, RawPuller, RawStored, Verdict};
use crate::bus::Bus;
use crate::error::Error;
use crate::streams::StreamName;
use crate::wire::{self, Stored};
use std::time::Duration;

/// One worker's pull from one queue.
pub struct Puller {
    bus: Bus,
    stream: StreamName,
    raw: Box<dyn RawPuller>,
}

impl Puller {
    pub(crate) fn new(bus: Bus, stream: StreamName, raw: Box<dyn RawPuller>) -> Self {
        Self { bus, stream, raw }
    }

    /// Waits until there is work and returns at most `max` deliveries. Cancel-safe.
    pub async fn next(&mut self, max: usize) -> Result<Vec<Delivery>, Error> {
        let raw = self.raw.next(max).await?;
        Ok(raw
            .into_iter()
            .map(|raw| {
                self.bus.learn_time(raw.stored.time_ms);
                self.bus.heights.saw(&self.stream, raw.stored.seq);
                Delivery {
                    bus: self.bus.clone(),
                    stream: self.stream.clone(),
                    raw,
                    settled: false,
                }
            })
            .collect())
    }

    /// Stops asking and hands back what arrived meanwhile.
    pub async fn stop(&mut self) {
        self.raw.stop().await;
    }
}

/// A message and the right to say something about it. Dropping it hands the work back.
pub struct Delivery {
    bus: Bus,
    stream: StreamName,
    raw: RawDelivery,
    settled: bool,
}

impl Delivery {
    /// Plain text that acknowledges it, also from another process.
    pub fn token(&self) -> &str {
        &self.raw.token
    }

    /// How often it was delivered, from 1; a hint.
    pub fn attempt(&self) -> u64 {
        self.raw.delivered
    }

    /// The stream it is from.
    pub fn stream(&self) -> &StreamName {
        &self.stream
    }

    /// The message as it came, undecoded.
    pub fn raw(&self) -> &RawStored {
        &self.raw.stored
    }

    /// The node it carries.
    pub fn decode(&self) -> Result<Stored, Error> {
        wire::decode(&self.raw.stored)
    }

    /// Done. Confirmed by the server when the call returns.
    pub async fn ack(mut self) -> Result<(), Error> {
        self.settled = true;
        self.bus
            .backend
            .verdict(&self.raw.token, Verdict::Ack)
            .await
    }

    /// Still at it.
    pub async fn progress(&self) -> Result<(), Error> {
        self.bus
            .backend
            .verdict(&self.raw.token, Verdict::Progress)
            .await
    }

    /// Another worker may have it after `delay`.
    pub async fn hand_back(mut self, delay: Duration) -> Result<(), Error> {
        self.settled = true;
        self.bus
            .backend
            .verdict(&self.raw.token, Verdict::Nak(delay))
            .await
    }

    /// Never again: a dead letter is stored first, confirmed, then the message is terminated.
    pub async fn dead_letter(mut self, reason: &str) -> Result<(), Error> {
        let letter = crate::dead::DeadLetter::of(&self.stream, &self.raw, reason);
        self.bus.append_plain(&StreamName::Sys, &letter).await?;
        self.settled = true;
        self.bus
            .backend
            .verdict(&self.raw.token, Verdict::Terminate)
            .await
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if self.settled {
            return;
        }
        let (backend, token) = (self.bus.backend.clone(), self.raw.token.clone());
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                // If even this fails, the server hands the work on after `ACK_WAIT`.
                let _ = backend.verdict(&token, Verdict::Nak(Duration::ZERO)).await;
            });
        }
    }
}
