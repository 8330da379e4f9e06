//! What is due when. One thread sleeps until the earliest; nothing polls.

use std::collections::BTreeSet;
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

/// Longest time that something is put off; longer delays are cut to it.
const DELAY_MAX: Duration = Duration::from_secs(24 * 3600);

/// Something that happens at its time unless it is disarmed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Due {
    /// A delivery was neither acknowledged nor reported in progress, or its delay is over.
    Delivery { queue: i64, seq: u64 },
    /// A kv entry reaches the end of its life.
    Entry { bucket: usize, key: Arc<str> },
}

/// The set of everything that is due.
#[derive(Default)]
pub(super) struct Timers {
    due: BTreeSet<(Instant, Due)>,
    /// When the thread wakes; `None`: not by itself. It may be earlier than anything due: taking the
    /// earliest away does not wake the thread, so that short work costs it at most one wake per
    /// ack wait.
    planned: Option<Instant>,
    wake: Arc<Condvar>,
}

impl Timers {
    /// What the thread waits on, together with the lock around the timers.
    pub(super) fn condvar(&self) -> Arc<Condvar> {
        self.wake.clone()
    }

    /// Arms `due` in `delay` from `now`; returns when that is.
    pub(super) fn arm(&mut self, now: Instant, delay: Duration, due: Due) -> Instant {
        let at = now + delay.min(DELAY_MAX);
        self.due.insert((at, due));
        if self.planned.is_none_or(|planned| at < planned) {
            self.planned = Some(at);
            self.wake.notify_one();
        }
        at
    }

    /// Takes back what was armed.
    pub(super) fn disarm(&mut self, at: Instant, due: Due) {
        self.due.remove(&(at, due));
    }

    /// Takes the next thing whose time has come.
    pub(super) fn pop(&mut self, now: Instant) -> Option<Due> {
        if self.due.first()?.0 > now {
            return None;
        }
        self.due.pop_first().map(|(_, due)| due)
    }

    /// When the thread is to wake next; it will.
    pub(super) fn plan(&mut self) -> Option<Instant> {
        self.planned = self.due.first().map(|(at, _)| *at);
        self.planned
    }

    /// Ends the thread's wait.
    pub(super) fn wake(&self) {
        self.wake.notify_one();
    }
}
