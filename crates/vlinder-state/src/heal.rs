//! What the follower does when the log has lost its tail: it gives back what it has kept.
//!
//! Any state worker may do it with what it has; one at a time ([`vlinder_bus::heal`]), and what one has given
//! back the next one leaves alone. When it dies in between, its cursor still does not fit at its next
//! start, and it goes on. The projection is rebuilt afterwards, for the sequences have changed.

use crate::apply::{Cursor, Source};
use crate::error::Error;
use crate::follow::Follower;
use crate::tail;
use vlinder_bus::StreamInfo;
use vlinder_bus::heal::{Healing, Loss};
use vlinder_core::NodeHash;

/// Messages read from the tail at once.
const BATCH: usize = 256;

impl Follower {
    /// Gives back what the stream has lost, as far as it is kept here. `None` when nothing is.
    pub(crate) async fn heal(
        &mut self,
        source: Source,
        info: &StreamInfo,
        cursor: &Cursor,
    ) -> Result<Option<Healing>, Error> {
        let inner = self.projection.0.clone();
        let (ns, stream) = (inner.ns.clone(), source.stream(&inner.ns));
        let kept = {
            let ns = ns.clone();
            self.write(move |connection| tail::index(connection, &ns, source))
                .await?
        };
        if kept.is_empty() {
            tracing::error!(%stream, last = info.last_seq, read_to = cursor.seq,
                "the log lost its tail, and nothing of it is kept here");
            return Ok(None);
        }
        let common = self.last_common(source, info, &kept).await?;
        let kept_behind = kept.iter().filter(|(seq, _)| *seq > common).count() as u64;
        let loss = Loss {
            common,
            to: cursor.seq,
            gone: (cursor.seq - common.min(cursor.seq)).saturating_sub(kept_behind),
        };
        tracing::warn!(%stream, from = common + 1, to = loss.to, kept = kept_behind,
            "the log lost its tail: giving back what is kept");
        let mut healer = inner.bus.heal(&stream, &ns, &inner.name(), loss).await?;
        let mut after = common;
        loop {
            let batch = {
                let ns = ns.clone();
                self.write(move |connection| tail::read(connection, &ns, source, after, BATCH))
                    .await?
            };
            let Some(last) = batch.last() else { break };
            after = last.seq;
            for stored in &batch {
                healer.give_back(stored).await?;
            }
        }
        let healing = healer.finish().await?;
        tracing::warn!(epoch = healing.epoch, "{}", healing.describe());
        inner.report("healed", &healing.describe());
        Ok(Some(healing))
    }

    /// The last message that the log has as it is kept here. A log that lost its tail is the same up to some
    /// message and another one from there on, so the place is found by halving.
    async fn last_common(
        &mut self,
        source: Source,
        info: &StreamInfo,
        kept: &[(u64, NodeHash)],
    ) -> Result<u64, Error> {
        let there = kept.partition_point(|(seq, _)| *seq <= info.last_seq);
        let (mut same, mut other) = (0, there);
        while same < other {
            let middle = (same + other) / 2;
            let (seq, hash) = kept[middle];
            if self.is_there(source, seq, hash).await? {
                same = middle + 1;
            } else {
                other = middle;
            }
        }
        Ok(match same {
            // All that is kept is lost, and perhaps what was before it.
            0 => info.last_seq.min(kept[0].0 - 1),
            same => kept[same - 1].0,
        })
    }

    async fn is_there(&mut self, source: Source, seq: u64, hash: NodeHash) -> Result<bool, Error> {
        let inner = self.projection.0.clone();
        match inner.bus.get(&source.stream(&inner.ns), seq).await {
            Ok(stored) => Ok(stored.is_some_and(|stored| stored.hash == hash)),
            // Damaged there since.
            Err(vlinder_bus::Error::Undecodable { .. }) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }
}
