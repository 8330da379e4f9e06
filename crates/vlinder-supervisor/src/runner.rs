//! What the two kinds of runners, [`crate::process`] and [`crate::task`], share: each is one
//! attendant task per worker, takes orders from the loop, tells it what happened, and gives back
//! what a dead worker held.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::control::ToParent;
use crate::exit::{KillReason, WorkerExit, shorten};
use crate::ledger::Ledgers;
use crate::machine::Up;
use crate::{LogSink, Tail, WorkerKey};

/// Longest time to give back what a dead worker held. The bus redelivers by itself after some
/// seconds, so trying longer is useless.
const RELEASE_DEADLINE: Duration = Duration::from_secs(10);
/// Orders that wait for an attendant; it takes them at once.
pub(crate) const ORDERS_MAX: usize = 16;
/// Events that wait for the loop; attendants wait for room.
pub(crate) const EVENTS_MAX: usize = 256;
/// Most addresses and notes of a worker that are shown.
const ENTRIES_MAX: usize = 32;

/// Whether a job that the worker held may have caused its death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blame {
    /// Yes: it crashed, was killed from outside, ran out of memory, stood still.
    Job,
    /// No: it ended on request, or in order.
    Nobody,
}

/// A worker's death, as far as its deliveries are concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    /// Who died.
    pub worker: WorkerKey,
    /// Which start of it, from 1.
    pub incarnation: u64,
    /// Its process; none for a task.
    pub pid: Option<u32>,
    /// Whether to count this death against the deliveries.
    pub blame: Blame,
    /// What it had reported as held and not as released, oldest first; never empty.
    pub deliveries: Vec<String>,
}

/// Gives deliveries of dead workers back to the bus.
#[async_trait]
pub trait HeldDeliveries: Send + Sync + 'static {
    /// Called as soon as a worker's death is seen, before its restart is even decided, and never
    /// while it may still run. Polled at once, and given up after 10 s.
    async fn release(&self, death: Death);
}

/// What the loop asks of an attendant.
#[derive(Debug)]
pub(crate) enum Order {
    Drain,
    Reload(serde_json::Value),
    Kill(KillReason),
}

/// What an attendant tells the loop.
#[derive(Debug)]
pub(crate) struct Event {
    pub key: WorkerKey,
    pub incarnation: u64,
    pub what: What,
}

/// What happened to a worker.
#[derive(Debug)]
pub(crate) enum What {
    Up {
        state: Up,
        addresses: BTreeMap<String, String>,
    },
    Note {
        key: String,
        value: String,
    },
    /// The last event of an incarnation.
    Exited {
        exit: WorkerExit,
        last_lines: Vec<String>,
    },
}

/// What every attendant of a supervisor knows.
pub(crate) struct Context {
    pub node: String,
    pub unresponsive: Duration,
    /// A process has this long until it first answers.
    pub loading: Duration,
    /// Pings of all workers happen together, at whole intervals from here: fewer wake-ups.
    pub epoch: Instant,
    pub held: Arc<dyn HeldDeliveries>,
    pub ledgers: Ledgers,
    pub log: Arc<dyn LogSink>,
    pub events: mpsc::Sender<Event>,
}

/// One start of one worker.
pub(crate) struct Incarnation {
    pub key: WorkerKey,
    pub number: u64,
    pub context: Arc<Context>,
    pub tail: Tail,
}

impl Incarnation {
    pub async fn tell(&self, what: What) {
        let event = Event {
            key: self.key,
            incarnation: self.number,
            what,
        };
        // The loop outlives its attendants, unless it was dropped: then nobody wants to know.
        let _ = self.context.events.send(event).await;
    }

    /// Turns what a worker said into an event for the loop, within bounds.
    pub async fn tell_said(&self, message: ToParent) {
        match message {
            ToParent::Ready { addresses } => {
                let short = |(name, address): (String, String)| (shorten(&name), shorten(&address));
                let addresses = addresses.into_iter().take(ENTRIES_MAX).map(short).collect();
                self.tell(What::Up {
                    state: Up::Ready,
                    addresses,
                })
                .await;
            }
            ToParent::Waiting { reason } => {
                let state = Up::Waiting {
                    reason: shorten(&reason),
                };
                self.tell(What::Up {
                    state,
                    addresses: BTreeMap::new(),
                })
                .await;
            }
            ToParent::Note { key, value } => {
                let (key, value) = (shorten(&key), shorten(&value));
                self.tell(What::Note { key, value }).await;
            }
            // Both are the attendant's own business.
            ToParent::Held { .. } | ToParent::Released { .. } | ToParent::Pong { .. } => {}
        }
    }

    /// Starts to give back what the worker held, and returns what is left to wait for.
    pub async fn give_back(
        &self,
        pid: Option<u32>,
        exit_blames_job: bool,
        deliveries: Vec<String>,
    ) -> Option<impl Future<Output = ()> + use<>> {
        if deliveries.is_empty() {
            return None;
        }
        let blame = if exit_blames_job {
            Blame::Job
        } else {
            Blame::Nobody
        };
        let worker = self.key;
        let count = deliveries.len();
        tracing::info!(%worker, ?blame, count, "a worker died with deliveries; giving them back");
        let death = Death {
            worker,
            incarnation: self.number,
            pid,
            blame,
            deliveries,
        };
        let held = self.context.held.clone();
        let mut release = Box::pin(async move {
            if tokio::time::timeout(RELEASE_DEADLINE, held.release(death))
                .await
                .is_err()
            {
                tracing::error!(%worker, count, "could not give back deliveries in time");
            }
        });
        if futures::poll!(&mut release).is_ready() {
            return None;
        }
        // What the hook has handed to other tasks (the bus's writer) goes out before the fork that
        // the restart brings.
        tokio::task::yield_now().await;
        Some(release)
    }
}

/// Adds a note if there is room or it is known.
pub(crate) fn put_note(notes: &mut BTreeMap<String, String>, key: String, value: String) {
    if notes.len() < ENTRIES_MAX || notes.contains_key(&key) {
        notes.insert(key, value);
    }
}
