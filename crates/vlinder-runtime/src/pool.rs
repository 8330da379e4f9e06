//! The replicas of one agent that are ready on this worker, and who has which of them.
//!
//! A turn that waits for what it delegated gives its slot back: beside the replicas that the manifest
//! asks for there may then be as many more (*surge*) as turns wait, up to [`SURGE_MAX`]. They serve
//! delegated turns only, and each depth of delegation has some that shallower ones cannot take: so of
//! the turns that wait for each other the deepest always find a place, and in the end all of them.

use crate::bridge::{Admitted, Caller, DEPTH_MAX};
use crate::http::AgentClient;
use crate::launcher::{Deployment, Marker};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use vlinder_worker::Slots;

/// Turns of an agent whose replicas all fail to start that are ended at once.
const FAILING_SLOTS: usize = 4;
/// Instances of one agent that one worker runs beyond its replicas while turns wait for delegated ones.
pub(crate) const SURGE_MAX: usize = 16;
/// A delegated turn that has found no place for so long stands in nobody's way: another one, which may
/// be deeper, is pulled beside it.
const PARK_AFTER: Duration = Duration::from_millis(250);
/// Delegated turns that stand beside.
const PARKED_MAX: usize = 1024;

// Each depth has at least one place that shallower ones cannot take.
const _: () = assert!(SURGE_MAX >= DEPTH_MAX as usize);

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

    /// Whether a turn is on it.
    pub fn is_busy(&self) -> bool {
        *self.busy.borrow() > 0
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
    /// The same for delegated turns.
    delegated: Arc<Slots>,
}

#[derive(Default)]
struct State {
    seats: Vec<Seat>,
    clock: u64,
    failing: Option<String>,
    closed: bool,
    /// Turns that wait for what they delegated.
    waiting: usize,
    /// Delegated turns that have found no place for a while.
    parked: usize,
    /// Surge instances that start.
    starting: usize,
}

struct Seat {
    replica: Arc<Replica>,
    used: u64,
    /// Beyond the replicas that the manifest asks for.
    is_surge: bool,
}

impl Seat {
    fn busy(&self) -> usize {
        *self.replica.busy.borrow()
    }
}

/// What comes of looking for a place.
enum Found {
    Place(Lease),
    /// One more instance shall be started; it is counted already.
    Surge(Arc<Deployment>),
    Nothing,
    /// There will be none, in words.
    Never(String),
}

/// How many turns of one depth may be on surge instances.
fn allowance(depth: u32) -> usize {
    SURGE_MAX * depth.min(DEPTH_MAX) as usize / DEPTH_MAX as usize
}

impl Pool {
    pub fn new() -> Self {
        Self {
            state: Mutex::default(),
            changed: watch::Sender::new(()),
            slots: Slots::new(0),
            delegated: Slots::new(0),
        }
    }

    /// How many delegated turns may be pulled.
    pub fn delegated_slots(&self) -> &Arc<Slots> {
        &self.delegated
    }

    /// A turn waits for what it delegated, until the guard is dropped.
    pub fn wait(self: &Arc<Self>) -> Counted {
        self.count(|state| &mut state.waiting)
    }

    fn park(self: &Arc<Self>) -> Counted {
        self.count(|state| &mut state.parked)
    }

    fn count(self: &Arc<Self>, of: fn(&mut State) -> &mut usize) -> Counted {
        self.change(|state| *of(state) += 1);
        Counted {
            pool: self.clone(),
            of,
        }
    }

    /// A surge instance is ready, or will not be.
    pub fn surged(&self, replica: Option<Arc<Replica>>) {
        self.change(|state| {
            state.starting -= 1;
            state.seats.extend(replica.map(|replica| Seat {
                replica,
                used: 0,
                is_surge: true,
            }));
        });
    }

    /// Takes a surge instance away, if no turn is on it. Whether it did.
    pub fn remove_idle(&self, replica: &Arc<Replica>) -> bool {
        let mut is_gone = false;
        self.change(|state| {
            state.seats.retain(|seat| {
                let goes = Arc::ptr_eq(&seat.replica, replica) && seat.busy() == 0;
                is_gone |= goes;
                !goes
            });
        });
        is_gone
    }

    /// How many turns may be pulled.
    pub fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    /// A replica is ready.
    pub fn add(&self, replica: Arc<Replica>) {
        self.change(|state| {
            state.seats.push(Seat {
                replica,
                used: 0,
                is_surge: false,
            })
        });
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
        let regular = state.seats.iter().filter(|seat| !seat.is_surge);
        let places = regular.map(|seat| seat.replica.places()).sum();
        let is_failing = state.failing.is_some() || state.closed;
        let slots = if places == 0 && is_failing {
            FAILING_SLOTS
        } else {
            places
        };
        let surge = state.seats.iter().filter(|seat| seat.is_surge).count() + state.starting;
        // A turn that waits holds its slot, and gives another one for it.
        let given = surge.max(state.waiting.min(SURGE_MAX));
        let beside = given + state.parked.min(PARKED_MAX);
        self.slots.set_limit(slots);
        self.delegated
            .set_limit(if places == 0 { slots } else { slots + beside });
        drop(state);
        self.changed.send_replace(());
    }

    /// The replica with the fewest turns, and among those the one that had none for longest; waits
    /// until there is one. `Err`: there will be none, in words. `depth` is that of the turn, 0 for one
    /// that a client asked for; `surge` starts one more instance.
    pub async fn lease(
        self: &Arc<Self>,
        depth: u32,
        surge: impl Fn(Arc<Deployment>),
    ) -> Result<Lease, String> {
        let mut changed = self.changed.subscribe();
        let mut parked = None;
        let began = tokio::time::Instant::now();
        loop {
            match self.try_lease(depth) {
                Found::Place(lease) => return Ok(lease),
                Found::Never(why) => return Err(why),
                Found::Surge(deployment) => {
                    surge(deployment);
                    continue;
                }
                Found::Nothing => {}
            }
            tokio::select! {
                changed = changed.changed() => if changed.is_err() {
                    return Err("the runtime ends".to_owned());
                },
                () = tokio::time::sleep_until(began + PARK_AFTER), if depth > 0 && parked.is_none() => {
                    parked = Some(self.park());
                }
            }
        }
    }

    fn try_lease(&self, depth: u32) -> Found {
        let mut state = self.lock();
        state.clock += 1;
        let now = state.clock;
        let surge_seats = || state.seats.iter().filter(|seat| seat.is_surge);
        let surging = surge_seats().count() + state.starting;
        let on_surge = surge_seats().map(Seat::busy).sum::<usize>() + state.starting;
        let may_surge = depth > 0 && on_surge < allowance(depth);
        // A surge instance that starts is for whoever asked for it, but anybody who may take it does.
        let may_take_surge = depth > 0 && on_surge - state.starting < allowance(depth);
        let can_surge = may_surge && surging < state.waiting.min(SURGE_MAX);
        let free = state.seats.iter_mut().filter_map(|seat| {
            let busy = seat.busy();
            let may = may_take_surge || !seat.is_surge;
            (may && busy < seat.replica.places()).then_some((busy, seat))
        });
        let best = free.min_by_key(|(busy, seat)| (seat.is_surge, *busy, seat.used));
        if let Some((_, seat)) = best {
            seat.used = now;
            seat.replica.count(|busy| busy + 1);
            return Found::Place(Lease {
                replica: seat.replica.clone(),
                changed: self.changed.clone(),
            });
        }
        if state.closed {
            return Found::Never("the agent was deleted".to_owned());
        }
        if can_surge {
            let regular = state.seats.iter().filter(|seat| !seat.is_surge);
            let newest = regular.max_by_key(|seat| seat.replica.deployment.version);
            if let Some(seat) = newest {
                let deployment = seat.replica.deployment.clone();
                state.starting += 1;
                return Found::Surge(deployment);
            }
        }
        match state.failing.clone().filter(|_| state.seats.is_empty()) {
            Some(why) => Found::Never(why),
            None => Found::Nothing,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts for something in the pool, until dropped.
pub(crate) struct Counted {
    pool: Arc<Pool>,
    of: fn(&mut State) -> &mut usize,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let of = self.of;
        self.pool.change(|state| *of(state) -= 1);
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
