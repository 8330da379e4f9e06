//! The follower: reads both streams from their cursors and applies what comes, in batches.
//!
//! A batch is what comes within a few milliseconds, up to a bound, or what is ready where somebody waits
//! for it; while one commits, the next one gathers. Before it
//! follows, and whenever a lost connection is back, it compares its cursors with the log (created, last
//! sequence, node there): if they do not fit, the log lost its tail, which is given back, or it is another
//! one; the projection begins anew. It goes on through outages of
//! the bus and a full disk; meanwhile reads say by how much the projection lags.

use crate::apply::{Cursor, Item, Source, apply_again, apply_batch, read_cursor};
use crate::db::Writer;
use crate::error::{Error, chain};
use crate::projection::{Applied, Projection};
use futures::stream::{self, BoxStream};
use futures::{FutureExt, StreamExt};
use rusqlite::Connection;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Messages applied in one transaction: a few milliseconds of work.
const BATCH_ITEMS_MAX: usize = 512;
/// Bytes of messages gathered for one transaction.
const BATCH_BYTES_MAX: usize = 4 * 1024 * 1024;
/// How long a batch gathers while nobody waits for it: a transaction for every message would take
/// from the turns that make them most of what they need themselves on a small machine.
const LINGER: Duration = Duration::from_millis(5);
/// First and longest pause after a failure.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Keeps a [`Projection`] current while it runs.
pub struct Follower {
    pub(crate) projection: Projection,
    /// Absent while a thread has it, and after that thread panicked.
    writer: Option<Writer>,
}

type Items = BoxStream<'static, Result<Item, Error>>;

impl Follower {
    pub(crate) fn new(projection: Projection, writer: Writer) -> Self {
        Self {
            projection,
            writer: Some(writer),
        }
    }

    /// Follows until `drain` is cancelled, or the bus is closed.
    pub async fn run(mut self, drain: CancellationToken) -> Result<(), Error> {
        let mut pause = PAUSE.0;
        loop {
            let before = self.projection.applied();
            let round = tokio::select! {
                biased;
                () = drain.cancelled() => return Ok(()),
                round = self.round() => round,
            };
            match round {
                Ok(()) => continue,
                Err(Error::Bus(vlinder_bus::Error::Closed)) => {
                    return Err(Error::Bus(vlinder_bus::Error::Closed));
                }
                Err(error) => {
                    tracing::warn!(error = chain(&error), ?pause, "the projection stands still");
                    if error.is_damage() {
                        let generation = self.projection.0.db.generation();
                        self.projection
                            .0
                            .damaged
                            .store(generation, Ordering::SeqCst);
                    }
                }
            }
            if self.projection.applied() != before {
                pause = PAUSE.0;
            }
            tokio::select! {
                () = drain.cancelled() => return Ok(()),
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    /// Follows until the cursors must be compared with the log again.
    async fn round(&mut self) -> Result<(), Error> {
        let damaged = self.projection.0.damaged.load(Ordering::SeqCst);
        if damaged == self.projection.0.db.generation() {
            self.start_over("its file is damaged").await?;
        }
        let mut gaps = self.projection.0.bus.gaps();
        let (created_ms, from) = self.fit().await?;
        let mut items = self.items(from).await?;
        let projection = self.projection.clone();
        loop {
            let mut batch = Vec::new();
            let gathered = tokio::select! {
                biased;
                () = projection.0.recheck.notified() => None,
                // The server was away, and may have come back with less than it had.
                () = gaps.next() => None,
                gathered = gather(&mut items, &mut batch, &projection) => Some(gathered),
            };
            // Whatever ended it: what was read is kept, since the log may have lost it by now.
            if !batch.is_empty() {
                self.apply(created_ms, batch).await?;
            }
            match gathered {
                Some(gathered) => gathered?,
                None => return Ok(()),
            }
        }
    }

    /// Makes sure that the projection is one of this log. Returns when the streams were created,
    /// and up to where they are applied.
    async fn fit(&mut self) -> Result<([u64; 2], Applied), Error> {
        let mut created_ms = [0; 2];
        let mut applied = Applied::default();
        let mut unfit = None;
        // Sessions and deployments first: turns follow from them.
        for source in [Source::Ctl, Source::Log] {
            let ns = self.projection.0.ns.clone();
            let stream = source.stream(&ns);
            let info = self.projection.0.bus.stream_info(&stream).await?;
            created_ms[source.code() as usize] = info.created_ms;
            let cursor = self
                .write(move |connection| read_cursor(connection, &ns, source))
                .await?;
            let Some(cursor) = cursor else { continue };
            if let Some(reason) = self.misfit(source, &info, &cursor).await? {
                if info.created_ms == cursor.created_ms {
                    self.heal(source, &info, &cursor).await?;
                }
                unfit = Some(reason);
            }
            applied.set(source, cursor.seq);
        }
        if let Some(reason) = unfit {
            // Only now: what both streams may have lost is in this file.
            self.start_over(reason).await?;
            return Box::pin(self.fit()).await;
        }
        self.projection.0.applied.send_replace(applied);
        Ok((created_ms, applied))
    }

    /// Why a cursor is not one of this log, if so.
    // `&mut`, as below: a connection is `Send`, a reference to one is not.
    async fn misfit(
        &mut self,
        source: Source,
        info: &vlinder_bus::StreamInfo,
        cursor: &Cursor,
    ) -> Result<Option<&'static str>, Error> {
        if info.created_ms != cursor.created_ms {
            return Ok(Some("the log was made anew"));
        }
        if info.last_seq < cursor.seq {
            return Ok(Some("the log is shorter than what was read from it"));
        }
        if cursor.seq < info.first_seq {
            // Trimmed since. What is here cannot be read again, and must not be thrown away.
            return Ok(None);
        }
        let stream = source.stream(&self.projection.0.ns);
        let there = match self.projection.0.bus.get(&stream, cursor.seq).await {
            Ok(stored) => stored.map(|stored| stored.hash),
            // Damaged since, or it always was: no sign of another log, and what is here is the better copy.
            Err(vlinder_bus::Error::Undecodable { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let same = there == cursor.hash;
        Ok((!same).then_some("the log has another node at the cursor"))
    }

    async fn start_over(&mut self, reason: &str) -> Result<(), Error> {
        tracing::warn!(reason, "the projection is rebuilt from the log");
        self.writer = None;
        let db = self.projection.0.db.clone();
        let writer = tokio::task::spawn_blocking(move || db.start_over()).await;
        self.writer = Some(writer.map_err(|_| Error::Panicked)??);
        self.projection.0.rebuilds.fetch_add(1, Ordering::Relaxed);
        self.projection.0.applied.send_replace(Applied::default());
        Ok(())
    }

    async fn items(&mut self, from: Applied) -> Result<Items, Error> {
        let log = self.follow(Source::Log, from.log + 1).await?;
        let ctl = self.follow(Source::Ctl, from.ctl + 1).await?;
        Ok(stream::select(log, ctl).boxed())
    }

    async fn follow(&mut self, source: Source, from: u64) -> Result<Items, Error> {
        let inner = &self.projection.0;
        let filter = vlinder_bus::subjects::all_of(&inner.ns);
        let nodes = inner
            .bus
            .follow(&source.stream(&inner.ns), &filter, from)
            .await?;
        let items = nodes.map(move |node| match node {
            Ok(stored) => Ok(Item::Node(source, Box::new(stored))),
            Err(vlinder_bus::Error::Undecodable { seq, reason, .. }) => Ok(Item::Unreadable {
                source,
                seq,
                reason,
            }),
            Err(error) => Err(Error::Bus(error)),
        });
        // One stream that ends must not leave the other one followed alone.
        let ended = stream::once(async { Err(stream_ended()) });
        Ok(items.chain(ended).boxed())
    }

    async fn apply(&mut self, created_ms: [u64; 2], batch: Vec<Item>) -> Result<(), Error> {
        let mut applied = self.projection.applied();
        for item in &batch {
            applied.set(item.source(), item.seq());
        }
        let ns = self.projection.0.ns.clone();
        for source in [Source::Log, Source::Ctl] {
            // The embedded log delivers before it commits. What it loses in a crash must not be here.
            let last = batch.iter().rfind(|item| item.source() == source);
            if let Some(last) = last {
                let stream = source.stream(&ns);
                self.projection.0.bus.settled(&stream, last.seq()).await?;
            }
        }
        let now_ms = self.projection.0.bus.now_ms();
        let orphans = self
            .write(move |connection| apply_batch(connection, &ns, created_ms, now_ms, &batch))
            .await?;
        if !orphans.is_empty() {
            self.apply_again(orphans).await?;
        }
        self.projection.0.applied.send_replace(applied);
        Ok(())
    }

    /// Applies messages of `LOG` again that were set aside because their turn was lost at the time.
    async fn apply_again(&mut self, seqs: Vec<u64>) -> Result<(), Error> {
        let ns = self.projection.0.ns.clone();
        let stream = Source::Log.stream(&ns);
        let mut items = Vec::with_capacity(seqs.len());
        for seq in seqs {
            if let Some(stored) = self.projection.0.bus.get(&stream, seq).await? {
                items.push(Item::Node(Source::Log, Box::new(stored)));
            }
        }
        self.write(move |connection| apply_again(connection, &ns, &items))
            .await
    }

    /// Works on the writing connection in a thread.
    pub(crate) async fn write<T, F>(&mut self, work: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&mut Connection) -> Result<T, Error> + Send + 'static,
    {
        let taken = self.writer.take();
        let db = self.projection.0.db.clone();
        let done = tokio::task::spawn_blocking(move || {
            let mut writer = match taken {
                Some(writer) => writer,
                None => db.reopen()?,
            };
            let outcome = work(&mut writer.0);
            Ok::<_, Error>((writer, outcome))
        });
        let (writer, outcome) = done.await.map_err(|_| Error::Panicked)??;
        self.writer = Some(writer);
        outcome
    }
}

/// Waits for a message and takes what else comes before the batch is full, [`LINGER`] has passed, or
/// somebody waits for it. Cancel-safe: what was taken stands in `batch`, also after a failure.
async fn gather(
    items: &mut Items,
    batch: &mut Vec<Item>,
    projection: &Projection,
) -> Result<(), Error> {
    let first = items.next().await.ok_or_else(stream_ended)??;
    let mut bytes = first.weight();
    batch.push(first);
    let inner = &projection.0;
    let linger = tokio::time::sleep(LINGER);
    tokio::pin!(linger);
    while batch.len() < BATCH_ITEMS_MAX && bytes < BATCH_BYTES_MAX {
        let next = match items.next().now_or_never() {
            Some(next) => next,
            None if inner.applied.receiver_count() > 0 => return Ok(()),
            None => tokio::select! {
                biased;
                next = items.next() => next,
                () = inner.hurry.notified() => continue,
                () = &mut linger => return Ok(()),
            },
        };
        let item = next.ok_or_else(stream_ended)??;
        bytes += item.weight();
        batch.push(item);
    }
    Ok(())
}

/// A stream of the log that ended without saying why is followed again.
fn stream_ended() -> Error {
    Error::Bus(vlinder_bus::Error::Timeout {
        operation: "following the log",
    })
}
