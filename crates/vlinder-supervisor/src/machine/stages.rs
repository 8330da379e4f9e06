//! The order of start and drain.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;
use vlinder_core::WorkerRole;

/// The last part of a drain kept for each later stage, so that one that hangs does not take their
/// whole time; less if the drain is short.
const STAGE_RESERVE: Duration = Duration::from_millis(500);

/// The order with the roles that it does not name as its last stage.
pub(super) fn complete(order: &[Vec<WorkerRole>]) -> Vec<Vec<WorkerRole>> {
    let named: BTreeSet<WorkerRole> = order.iter().flatten().copied().collect();
    let rest = WorkerRole::ALL
        .into_iter()
        .filter(|role| !named.contains(role));
    let mut order = order.to_vec();
    order.push(rest.collect());
    order
}

/// How far the start has come.
#[derive(Debug)]
pub(super) struct StartStages {
    order: Vec<Vec<WorkerRole>>,
    /// The stage that may start now, with all before it; the number of stages once all are passed.
    open: usize,
    begun: Option<Instant>,
}

impl StartStages {
    pub fn new(order: Vec<Vec<WorkerRole>>) -> Self {
        Self {
            order,
            open: 0,
            begun: None,
        }
    }

    pub fn open(&self) -> Option<usize> {
        (self.open < self.order.len()).then_some(self.open)
    }

    pub fn is_open_for(&self, role: WorkerRole) -> bool {
        self.order
            .iter()
            .take(self.open + 1)
            .any(|stage| stage.contains(&role))
            || self.open >= self.order.len()
    }

    /// Passes every stage without unsettled roles or with its time over; returns the roles that
    /// were left behind.
    pub fn advance(
        &mut self,
        now: Instant,
        limit: Duration,
        unsettled: &BTreeSet<WorkerRole>,
    ) -> Vec<WorkerRole> {
        let mut late = Vec::new();
        while let Some(stage) = self.order.get(self.open) {
            let begun = *self.begun.get_or_insert(now);
            let missing: Vec<_> = stage
                .iter()
                .copied()
                .filter(|role| unsettled.contains(role))
                .collect();
            if !missing.is_empty() && now < begun + limit {
                break;
            }
            late.extend(missing);
            self.open += 1;
            self.begun = None;
        }
        late
    }

    pub fn next_deadline(&self, limit: Duration) -> Option<Instant> {
        self.begun.map(|begun| begun + limit)
    }
}

/// How far the drain has come.
#[derive(Debug)]
pub(super) struct DrainStages {
    order: Vec<Vec<WorkerRole>>,
    reached: usize,
    reserve: Duration,
    /// When everything has to be gone.
    deadline: Instant,
    /// Whether someone lost patience.
    pub at_once: bool,
}

impl DrainStages {
    pub fn new(order: Vec<Vec<WorkerRole>>, now: Instant, deadline: Instant) -> Self {
        let stages = u32::try_from(order.len()).expect("there are few stages");
        let reserve = deadline.saturating_duration_since(now) / (4 * stages);
        Self {
            order,
            reached: 0,
            reserve: reserve.min(STAGE_RESERVE),
            deadline,
            at_once: false,
        }
    }

    pub fn end_now(&mut self, now: Instant) {
        self.deadline = self.deadline.min(now);
        self.at_once = true;
    }

    /// When `advance` reaches everyone, unless it has.
    pub fn next_deadline(&self) -> Option<Instant> {
        (self.reached < self.order.len()).then_some(self.deadline)
    }

    pub fn has_reached(&self, role: WorkerRole) -> bool {
        self.stage_of(role) <= self.reached
    }

    /// When a worker of this role is killed.
    pub fn stage_deadline(&self, role: WorkerRole) -> Instant {
        let later = self.order.len().saturating_sub(self.stage_of(role) + 1);
        let later = u32::try_from(later).expect("there are few stages");
        self.deadline
            .checked_sub(self.reserve * later)
            .unwrap_or(self.deadline)
    }

    /// Goes on when the workers of all stages so far are gone; at the deadline everyone is reached.
    pub fn advance(&mut self, now: Instant, running: &BTreeSet<WorkerRole>) {
        let gone = |stage: &Vec<WorkerRole>| !stage.iter().any(|role| running.contains(role));
        while self.reached < self.order.len()
            && (now >= self.deadline || self.order[..=self.reached].iter().all(gone))
        {
            self.reached += 1;
        }
    }

    fn stage_of(&self, role: WorkerRole) -> usize {
        let stage = self.order.iter().position(|stage| stage.contains(&role));
        stage.expect("`complete` put every role somewhere")
    }
}
