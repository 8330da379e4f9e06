//! The decisions of the supervisor, without any effect: facts go in, actions come out.
//!
//! [`Machine::reconcile`] compares what is desired with what runs and says what to do; it takes no
//! hint about what changed, so it is also the way back after any surprise. Time is an argument.

mod backoff;
mod stages;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::time::Instant;
use vlinder_core::WorkerRole;

use crate::exit::{KillReason, Verdict, WorkerExit};
pub use backoff::Policy;
use stages::{DrainStages, StartStages};

/// One place in the plan: a role and an index from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerKey {
    /// The role.
    pub role: WorkerRole,
    /// The index.
    pub index: u32,
}

impl fmt::Display for WorkerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.role, self.index)
    }
}

/// What the loop is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    Spawn {
        key: WorkerKey,
        incarnation: u64,
    },
    Drain {
        key: WorkerKey,
    },
    Kill {
        key: WorkerKey,
        reason: KillReason,
    },
    /// The budget is spent; to be said once.
    GaveUp {
        key: WorkerKey,
        failures: u32,
    },
    /// A stage of the start is passed though this role is not up.
    StartedLate {
        role: WorkerRole,
    },
}

/// Whether a running worker can do its job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Up {
    Starting,
    Ready,
    Waiting { reason: String },
}

/// A worker that has been asked to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Leaving {
    pub deadline: Instant,
    /// Whether the kill has been ordered; its exit will follow.
    pub killed: bool,
}

/// What runs in a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Nothing; to be started as soon as its stage is open.
    Idle,
    Running {
        since: Instant,
        up: Up,
        up_since: Option<Instant>,
        leaving: Option<Leaving>,
    },
    /// Nothing, until the backoff is over.
    Resting { until: Instant, crash_looping: bool },
}

/// The life of one worker key, over its restarts.
#[derive(Debug)]
pub(crate) struct Slot {
    pub phase: Phase,
    /// Starts so far.
    pub incarnation: u64,
    /// Failures without a good stretch in between.
    pub failures: u32,
    /// To be replaced because someone asked, or because its plan changed.
    pub restart: bool,
    pub last_exit: Option<WorkerExit>,
}

impl Slot {
    fn new() -> Self {
        Self {
            phase: Phase::Idle,
            incarnation: 0,
            failures: 0,
            restart: false,
            last_exit: None,
        }
    }

    pub fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running { .. })
    }

    /// Whether a start that waits for this worker may go on: it is up, or fast retries are over.
    fn is_settled(&self) -> bool {
        match &self.phase {
            Phase::Idle => false,
            Phase::Running { up, .. } => *up != Up::Starting,
            Phase::Resting { crash_looping, .. } => *crash_looping,
        }
    }

    /// Whether it is neither coming nor going.
    fn is_steady(&self, now: Instant, start_deadline: Duration) -> bool {
        match &self.phase {
            Phase::Idle => false,
            Phase::Running {
                leaving: Some(_), ..
            } => false,
            Phase::Running {
                up: Up::Starting,
                since,
                ..
            } => now >= *since + start_deadline,
            Phase::Running { .. } | Phase::Resting { .. } => true,
        }
    }
}

/// The state of all workers of a node.
#[derive(Debug)]
pub(crate) struct Machine {
    policy: Policy,
    rng: SmallRng,
    desired: BTreeMap<WorkerRole, u32>,
    slots: BTreeMap<WorkerKey, Slot>,
    start: StartStages,
    drain_order: Vec<Vec<WorkerRole>>,
    drain: Option<DrainStages>,
}

impl Machine {
    pub fn new(
        policy: Policy,
        start_order: &[Vec<WorkerRole>],
        drain_order: &[Vec<WorkerRole>],
        seed: u64,
    ) -> Self {
        let start_order = stages::complete(start_order);
        let drain_order = match drain_order {
            [] => start_order.iter().rev().cloned().collect(),
            given => stages::complete(given),
        };
        Self {
            policy,
            rng: SmallRng::seed_from_u64(seed),
            desired: BTreeMap::new(),
            slots: BTreeMap::new(),
            start: StartStages::new(start_order),
            drain_order,
            drain: None,
        }
    }

    pub fn slots(&self) -> impl Iterator<Item = (WorkerKey, &Slot)> {
        self.slots.iter().map(|(key, slot)| (*key, slot))
    }

    pub fn slot(&self, key: WorkerKey) -> Option<&Slot> {
        self.slots.get(&key)
    }

    pub fn desired(&self) -> &BTreeMap<WorkerRole, u32> {
        &self.desired
    }

    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The stage of the start that is open now, none once the start is over.
    pub fn starting_stage(&self) -> Option<usize> {
        self.start.open()
    }

    pub fn is_draining(&self) -> bool {
        self.drain.is_some()
    }

    /// Whether the drain is over.
    pub fn is_finished(&self) -> bool {
        self.drain.is_some() && !self.slots.values().any(Slot::is_running)
    }

    // Facts.

    pub fn scale(&mut self, role: WorkerRole, count: u32) {
        self.desired.insert(role, count);
    }

    /// Replaces the running workers of the role one by one, and retries the resting ones now.
    pub fn restart(&mut self, role: WorkerRole) {
        for (_, slot) in self.slots.iter_mut().filter(|(key, _)| key.role == role) {
            slot.failures = 0;
            match &mut slot.phase {
                Phase::Running { leaving, .. } => slot.restart = leaving.is_none(),
                phase @ (Phase::Idle | Phase::Resting { .. }) => *phase = Phase::Idle,
            }
        }
    }

    /// The first call gives the workers until `deadline`; any later one ends them now.
    pub fn begin_drain(&mut self, now: Instant, deadline: Instant) {
        match &mut self.drain {
            Some(drain) => drain.end_now(now),
            None => {
                let order = self.drain_order.clone();
                self.drain = Some(DrainStages::new(order, now, deadline));
            }
        }
    }

    /// The worker says that it can, or cannot yet, do its job.
    pub fn on_up(&mut self, key: WorkerKey, now: Instant, state: Up) {
        let Some(slot) = self.slots.get_mut(&key) else {
            return;
        };
        if let Phase::Running { up, up_since, .. } = &mut slot.phase {
            *up = state;
            up_since.get_or_insert(now);
        }
    }

    /// The worker has ended, however.
    pub fn on_exit(&mut self, key: WorkerKey, exit: WorkerExit, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        if let Some(slot) = self.slots.get_mut(&key)
            && let Phase::Running {
                up_since, leaving, ..
            } = slot.phase
        {
            let asked = leaving.is_some() || std::mem::take(&mut slot.restart);
            slot.restart = false;
            let good = |since: Instant| now.duration_since(since) >= self.policy.good_stretch;
            if up_since.is_some_and(good) {
                slot.failures = 0;
            }
            let verdict = if asked {
                Verdict::Expected
            } else {
                exit.verdict()
            };
            let budget = self.policy.budget;
            let was_looping = slot.failures >= budget;
            slot.failures = match verdict {
                Verdict::Expected => slot.failures,
                Verdict::Retry => slot.failures.saturating_add(1),
                Verdict::RetrySlowly => slot.failures.saturating_add(1).max(budget),
            };
            let looping = slot.failures >= budget;
            slot.phase = match verdict {
                Verdict::Expected => Phase::Idle,
                Verdict::Retry | Verdict::RetrySlowly => {
                    let pause = self.policy.pause(slot.failures, &mut self.rng);
                    Phase::Resting {
                        until: now + pause,
                        crash_looping: looping,
                    }
                }
            };
            slot.last_exit = Some(exit);
            if looping && !was_looping {
                actions.push(Action::GaveUp {
                    key,
                    failures: slot.failures,
                });
            }
        }
        actions.extend(self.reconcile(now));
        actions
    }

    // Decisions.

    /// Says what is to be done now. Idempotent: what has been said counts as done.
    pub fn reconcile(&mut self, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        self.make_slots();
        self.advance_start(now, &mut actions);
        self.advance_drain(now);
        self.begin_restarts(now, &mut actions);
        let at_once = self.drain.as_ref().is_some_and(|drain| drain.at_once);
        let kill_reason = if at_once {
            KillReason::Now
        } else {
            KillReason::DrainDeadline
        };
        let keys: Vec<WorkerKey> = self.slots.keys().copied().collect();
        for key in keys {
            let surplus = self.is_surplus(key);
            if surplus && !self.slots[&key].is_running() {
                self.clear(key);
                continue;
            }
            let may_start = self.start.is_open_for(key.role);
            let leave_by = self.leave_deadline(key.role, now);
            let slot = self
                .slots
                .get_mut(&key)
                .expect("the key was just listed, and not cleared");
            match &mut slot.phase {
                Phase::Idle if may_start => actions.push(start(key, slot, now)),
                Phase::Resting { until, .. } if now >= *until => {
                    actions.push(start(key, slot, now))
                }
                Phase::Running {
                    leaving: Some(leaving),
                    ..
                } => {
                    leaving.deadline = leaving.deadline.min(leave_by);
                    if now >= leaving.deadline && !leaving.killed {
                        leaving.killed = true;
                        actions.push(Action::Kill {
                            key,
                            reason: kill_reason.clone(),
                        });
                    }
                }
                Phase::Running {
                    leaving: leaving @ None,
                    ..
                } if surplus => {
                    *leaving = Some(Leaving {
                        deadline: leave_by,
                        killed: false,
                    });
                    actions.push(Action::Drain { key });
                }
                Phase::Idle | Phase::Resting { .. } | Phase::Running { .. } => {}
            }
        }
        actions
    }

    /// When `reconcile` is to be called again at the latest, if nothing happens before.
    pub fn next_deadline(&self) -> Option<Instant> {
        let slots = self.slots.values().filter_map(|slot| match &slot.phase {
            Phase::Resting { until, .. } => Some(*until),
            Phase::Running {
                leaving:
                    Some(Leaving {
                        deadline,
                        killed: false,
                    }),
                ..
            } => Some(*deadline),
            Phase::Idle | Phase::Running { .. } => None,
        });
        let stage = match &self.drain {
            Some(drain) => drain.next_deadline(),
            None => self.start.next_deadline(self.policy.start_deadline),
        };
        slots.chain(stage).min()
    }

    fn make_slots(&mut self) {
        if self.drain.is_some() {
            return;
        }
        for (&role, &count) in &self.desired {
            for index in 0..count {
                self.slots
                    .entry(WorkerKey { role, index })
                    .or_insert_with(Slot::new);
            }
        }
    }

    fn is_surplus(&self, key: WorkerKey) -> bool {
        let draining = self
            .drain
            .as_ref()
            .is_some_and(|drain| drain.has_reached(key.role));
        draining || key.index >= self.desired.get(&key.role).copied().unwrap_or(0)
    }

    /// A slot that is scaled away vanishes; one that was drained stays, to be shown as stopped.
    fn clear(&mut self, key: WorkerKey) {
        if self.drain.is_some() {
            self.slots
                .get_mut(&key)
                .expect("the key was just listed")
                .phase = Phase::Idle;
        } else {
            self.slots.remove(&key);
        }
    }

    fn leave_deadline(&self, role: WorkerRole, now: Instant) -> Instant {
        let alone = now + self.policy.drain_deadline;
        self.drain
            .as_ref()
            .map_or(alone, |drain| drain.stage_deadline(role))
    }

    fn advance_start(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if self.drain.is_some() {
            return;
        }
        let unsettled: BTreeSet<WorkerRole> = self
            .slots
            .iter()
            .filter(|(_, slot)| !slot.is_settled())
            .map(|(key, _)| key.role)
            .collect();
        let late = self
            .start
            .advance(now, self.policy.start_deadline, &unsettled);
        actions.extend(late.into_iter().map(|role| Action::StartedLate { role }));
    }

    fn advance_drain(&mut self, now: Instant) {
        let running = self.slots.iter().filter(|(_, slot)| slot.is_running());
        let running: BTreeSet<WorkerRole> = running.map(|(key, _)| key.role).collect();
        if let Some(drain) = &mut self.drain {
            drain.advance(now, &running);
        }
    }

    /// One worker of a role at a time, and only while the others of the role are steady.
    fn begin_restarts(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if self.drain.is_some() {
            return;
        }
        let start_deadline = self.policy.start_deadline;
        let unsteady = self.slots.iter().filter(|(_, slot)| {
            // One that is to be restarted holds nobody up by not having come up.
            !slot.restart && !slot.is_steady(now, start_deadline)
        });
        let mut busy: BTreeSet<WorkerRole> = unsteady.map(|(key, _)| key.role).collect();
        for (key, slot) in &mut self.slots {
            let Phase::Running {
                leaving: leaving @ None,
                ..
            } = &mut slot.phase
            else {
                continue;
            };
            if slot.restart && busy.insert(key.role) {
                slot.restart = false;
                let deadline = now + self.policy.drain_deadline;
                *leaving = Some(Leaving {
                    deadline,
                    killed: false,
                });
                actions.push(Action::Drain { key: *key });
            }
        }
    }
}

fn start(key: WorkerKey, slot: &mut Slot, now: Instant) -> Action {
    slot.incarnation += 1;
    slot.phase = Phase::Running {
        since: now,
        up: Up::Starting,
        up_since: None,
        leaving: None,
    };
    Action::Spawn {
        key,
        incarnation: slot.incarnation,
    }
}
