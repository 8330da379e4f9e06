//! [`Projection`]: the record as SQLite has it, read only after a barrier.

use crate::apply::Source;
use crate::db::{Db, Writer};
use crate::error::Error;
use crate::follow::Follower;
use rusqlite::Connection;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout, timeout_at};
use vlinder_bus::{Bus, StreamInfo};
use vlinder_core::Namespace;
use vlinder_worker::Control;

/// How long a read waits until the projection has what the log had when the read began.
pub const BARRIER_DEADLINE: Duration = Duration::from_secs(10);

/// No generation of the file.
const NO_FILE: u64 = u64::MAX;

/// Up to where the streams are applied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Applied {
    /// Sequence in `LOG`.
    pub log: u64,
    /// Sequence in `CTL`.
    pub ctl: u64,
}

impl Applied {
    pub(crate) fn set(&mut self, source: Source, seq: u64) {
        match source {
            Source::Log => self.log = seq,
            Source::Ctl => self.ctl = seq,
        }
    }

    pub(crate) fn of(self, source: Source) -> u64 {
        match source {
            Source::Log => self.log,
            Source::Ctl => self.ctl,
        }
    }

    fn behind(self, other: Self) -> u64 {
        other.log.saturating_sub(self.log) + other.ctl.saturating_sub(self.ctl)
    }
}

/// A projection of one namespace's record; cheap to clone.
#[derive(Clone)]
pub struct Projection(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    pub bus: Bus,
    pub ns: Namespace,
    pub db: Arc<Db>,
    pub applied: watch::Sender<Applied>,
    /// Tells the follower that somebody waits for what it gathers.
    pub hurry: Notify,
    /// Tells the follower to compare its cursors with the log again.
    pub recheck: Notify,
    /// The file that was found damaged, by its generation; [`NO_FILE`] for none. A reader that
    /// still had an earlier file says nothing about the present one.
    pub damaged: AtomicU64,
    /// How often the file was thrown away.
    pub rebuilds: AtomicU64,
    /// Who this is, and where it can say something.
    pub reporter: OnceLock<Reporter>,
}

pub(crate) struct Reporter {
    pub name: String,
    pub control: Arc<dyn Control>,
}

impl Inner {
    /// Who this is, for others.
    pub fn name(&self) -> String {
        let name = self.reporter.get().map(|reporter| reporter.name.clone());
        name.unwrap_or_else(|| "state".to_owned())
    }

    /// Says something to be shown beside the worker.
    pub fn report(&self, key: &str, value: &str) {
        if let Some(reporter) = self.reporter.get() {
            reporter.control.note(key, value);
        }
    }
}

impl Projection {
    /// Opens the file at `path`, or begins a new one where it is missing, damaged or of another
    /// release. Nothing is applied until the follower runs.
    pub async fn open(
        bus: Bus,
        ns: Namespace,
        path: impl Into<PathBuf>,
    ) -> Result<(Self, Follower), Error> {
        let path = path.into();
        let opened = tokio::task::spawn_blocking(move || Db::open(&path)).await;
        let (db, writer): (Db, Writer) = opened.map_err(|_| Error::Panicked)??;
        let projection = Self(Arc::new(Inner {
            bus,
            ns,
            db: Arc::new(db),
            applied: watch::Sender::new(Applied::default()),
            hurry: Notify::new(),
            recheck: Notify::new(),
            damaged: AtomicU64::new(NO_FILE),
            rebuilds: AtomicU64::new(0),
            reporter: OnceLock::new(),
        }));
        let follower = Follower::new(projection.clone(), writer);
        Ok((projection, follower))
    }

    /// The namespace it holds.
    pub fn namespace(&self) -> &Namespace {
        &self.0.ns
    }

    /// Up to where the streams are applied now.
    pub fn applied(&self) -> Applied {
        *self.0.applied.borrow()
    }

    /// Waits until everything is applied that was confirmed before this call, by anyone.
    pub async fn caught_up(&self) -> Result<Applied, Error> {
        self.caught_up_within(BARRIER_DEADLINE).await
    }

    /// The same with another deadline.
    pub async fn caught_up_within(&self, limit: Duration) -> Result<Applied, Error> {
        let deadline = Instant::now() + limit;
        let before = self.applied();
        let asked = timeout_at(deadline, self.last_in_log()).await;
        let target = asked.map_err(|_| Error::LogSilent)??;
        if target.log < before.log || target.ctl < before.ctl {
            // The log is shorter than what was read from it: it was restored or made anew.
            self.0.recheck.notify_one();
            return Err(Error::Lagging {
                behind: before.behind(target),
            });
        }
        let mut applied = self.0.applied.subscribe();
        self.0.hurry.notify_one();
        let reached = applied.wait_for(|applied| applied.behind(target) == 0);
        match timeout_at(deadline, reached).await {
            Ok(Ok(applied)) => Ok(*applied),
            _ => Err(Error::Lagging {
                behind: self.applied().behind(target),
            }),
        }
    }

    /// The last message of each stream.
    pub(crate) async fn last_in_log(&self) -> Result<Applied, Error> {
        let asked = timeout(BARRIER_DEADLINE, self.ask_last_in_log()).await;
        asked.map_err(|_| Error::LogSilent)?
    }

    async fn ask_last_in_log(&self) -> Result<Applied, Error> {
        let (log, ctl) = (
            Source::Log.stream(&self.0.ns),
            Source::Ctl.stream(&self.0.ns),
        );
        let (log, ctl) = tokio::join!(self.0.bus.stream_info(&log), self.0.bus.stream_info(&ctl));
        // A stream without messages has nothing to wait for, whatever was purged from it.
        let last = |info: StreamInfo| if info.messages == 0 { 0 } else { info.last_seq };
        Ok(Applied {
            log: last(log?),
            ctl: last(ctl?),
        })
    }

    /// Runs a query on one snapshot of the projection, without a barrier.
    pub(crate) async fn read<T, F>(&self, query: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T, Error> + Send + 'static,
    {
        let generation = self.0.db.generation();
        let outcome = self.0.db.read(query).await;
        if let Err(error) = &outcome
            && error.is_damage()
        {
            tracing::error!(
                error = crate::error::chain(error),
                "the projection is damaged"
            );
            self.0.damaged.store(generation, Ordering::SeqCst);
            self.0.recheck.notify_one();
            return Err(Error::Damaged);
        }
        outcome
    }
}
