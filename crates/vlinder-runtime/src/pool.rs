//! The replicas of one agent that are ready on this worker, and who has which of them.

use crate::bridge::{Admitted, Caller};
use crate::http::AgentClient;
use crate::launcher::{Deployment, Marker};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;
use vlinder_worker::Slots;

/// Turns of an agent whose replicas all fail to start that are ended at once.
const FAILING_SLOTS: usize = 4;

/// Why a replica serves no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Gone {
    pub why: String,
    /// It ended by itself, rather than at our wish.
    pub by_itself: bool,
}

/// A replica that has shown that it is healthy.
pub(crate) struct Replica {
    pub deployment: Arc<Deployment>,
    pub client: AgentClient,
    /// It asked for its input as JSON.
    pub takes_json: bool,
    /// How the bridge knows it.
    pub caller: Arc<Caller>,
    /// The bridge knows it as long as it is here.
    _admitted: Admitted,
    fate: watch::Sender<Option<Gone>>,
    busy: watch::Sender<usize>,
    /// What it printed beyond what is kept, in bytes.
    flood: Arc<AtomicU64>,
    marker: Option<Arc<dyn Marker>>,
}

impl Replica {
    pub fn new(
        deployment: Arc<Deployment>,
        client: AgentClient,
        takes_json: bool,
        admitted: Admitted,
        marker: Option<Arc<dyn Marker>>,
    ) -> Self {
        Self {
            deployment,
            client,
            takes_json,
            caller: admitted.caller.clone(),
            _admitted: admitted,
            fate: watch::Sender::new(None),
            busy: watch::Sender::new(0),
            flood: Arc::default(),
            marker,
        }
    }

    /// The same replica, with the count of what it prints beyond what is kept.
    pub fn printing(mut self, flood: Arc<AtomicU64>) -> Self {
        self.flood = flood;
        self
    }

    /// What it has printed so far beyond what is kept, in bytes.
    pub fn flood(&self) -> u64 {
        self.flood.load(Ordering::Relaxed)
    }

    /// Asks for it to be ended and replaced.
    pub fn replace(&self, why: &str) {
        self.meet(Gone {
            why: why.to_owned(),
            by_itself: false,
        });
    }

    /// It is gone. The first fate is the fate.
    pub fn meet(&self, gone: Gone) {
        if let Some(marker) = &self.marker {
            marker.spoil();
        }
        self.fate.send_if_modified(|fate| {
            let is_first = fate.is_none();
            if is_first {
                *fate = Some(gone);
            }
            is_first
        });
    }

    /// Why it serves no more, if so.
    pub fn fate(&self) -> Option<Gone> {
        self.fate.borrow().clone()
    }

    /// Waits until it serves no more.
    pub async fn gone(&self) -> Gone {
        let mut fate = self.fate.subscribe();
        loop {
            if let Some(gone) = fate.borrow_and_update().clone() {
                return gone;
            }
            if fate.changed().await.is_err() {
                // The sender is ours, so it is there as long as we are.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Waits until no turn is left.
    pub async fn idle(&self) {
        let mut busy = self.busy.subscribe();
        // The sender is ours, so this cannot fail.
        let _ = busy.wait_for(|busy| *busy == 0).await;
    }

    /// It gets a turn, or is rid of one.
    fn count(&self, change: impl FnOnce(usize) -> usize) {
        self.busy.send_modify(|busy| {
            *busy = change(*busy);
            if let Some(marker) = &self.marker {
                marker.turns(*busy);
            }
        });
    }

    fn places(&self) -> usize {
        self.deployment.manifest().concurrency as usize
    }
}

/// The ready replicas of one agent.
pub(crate) struct Pool {
    state: Mutex<State>,
    changed: watch::Sender<()>,
    slots: Arc<Slots>,
}

#[derive(Default)]
struct State {
    seats: Vec<Seat>,
    clock: u64,
    failing: Option<String>,
    closed: bool,
}

struct Seat {
    replica: Arc<Replica>,
    used: u64,
}

impl Pool {
    pub fn new() -> Self {
        Self {
            state: Mutex::default(),
            changed: watch::Sender::new(()),
            slots: Slots::new(0),
        }
    }

    /// How many turns may be pulled.
    pub fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    /// A replica is ready.
    pub fn add(&self, replica: Arc<Replica>) {
        self.change(|state| state.seats.push(Seat { replica, used: 0 }));
    }

    /// A replica gets no more turns.
    pub fn remove(&self, replica: &Arc<Replica>) {
        self.change(|state| {
            state
                .seats
                .retain(|seat| !Arc::ptr_eq(&seat.replica, replica))
        });
    }

    /// While no replica is ready: turns are pulled to be ended with this reason. `None`: they wait.
    pub fn set_failing(&self, why: Option<String>) {
        self.change(|state| state.failing = why);
    }

    /// The agent is no more: whoever waits is told.
    pub fn close(&self) {
        self.change(|state| state.closed = true);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        let places = state.seats.iter().map(|seat| seat.replica.places()).sum();
        let is_failing = state.failing.is_some() || state.closed;
        self.slots.set_limit(if places == 0 && is_failing {
            FAILING_SLOTS
        } else {
            places
        });
        drop(state);
        self.changed.send_replace(());
    }

    /// The replica with the fewest turns, and among those the one that had none for longest; waits
    /// until there is one. `Err`: there will be none, in words.
    pub async fn lease(&self) -> Result<Lease, String> {
        let mut changed = self.changed.subscribe();
        loop {
            if let Some(outcome) = self.try_lease() {
                return outcome;
            }
            if changed.changed().await.is_err() {
                return Err("the runtime ends".to_owned());
            }
        }
    }

    fn try_lease(&self) -> Option<Result<Lease, String>> {
        let mut state = self.lock();
        state.clock += 1;
        let now = state.clock;
        let free = state.seats.iter_mut().filter_map(|seat| {
            let busy = *seat.replica.busy.borrow();
            (busy < seat.replica.places()).then_some((busy, seat))
        });
        if let Some((_, seat)) = free.min_by_key(|(busy, seat)| (*busy, seat.used)) {
            seat.used = now;
            seat.replica.count(|busy| busy + 1);
            return Some(Ok(Lease {
                replica: seat.replica.clone(),
                changed: self.changed.clone(),
            }));
        }
        if state.closed {
            return Some(Err("the agent was deleted".to_owned()));
        }
        let why = state.failing.clone().filter(|_| state.seats.is_empty())?;
        Some(Err(why))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place on a replica, until dropped.
pub(crate) struct Lease {
    replica: Arc<Replica>,
    changed: watch::Sender<()>,
}

impl Lease {
    pub fn replica(&self) -> &Arc<Replica> {
        &self.replica
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.replica.count(|busy| busy - 1);
        self.changed.send_replace(());
    }
}
