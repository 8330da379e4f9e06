//! One durable queue as a state machine: what waits, what is out, what comes again and when. It does
//! no I/O and reads no clock.
//!
//! Order: handed-back messages first, then new ones, each by sequence. Pullers are served in the
//! order in which they began to wait. An acknowledgement counts whoever sends it; a hand-back or a
//! progress report counts only from the latest delivery, so that a late one cannot take the work
//! from its new holder.
//!
//! Memory: 8 bytes for each waiting message and about 100 for each that is out, of which there are
//! at most [`ACK_PENDING_MAX`].

use super::filter::Filter;
use super::timers::{Due, Timers};
use crate::streams::{ACK_PENDING_MAX, ACK_WAIT};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// A message that was delivered at least once and is not acknowledged.
#[derive(Debug, Clone, Copy)]
struct Tracked {
    /// How often it was delivered.
    delivered: u64,
    /// When it goes again; `None`: it waits in `again`.
    due: Option<Instant>,
    /// Whether somebody has it now; else it waits for the end of a delay, or for a puller.
    held: bool,
    /// Whether the count is on disk.
    recorded: bool,
}

/// A puller that found nothing.
struct Waiter {
    id: u64,
    waker: Waker,
    /// Woken for a message and not back yet: that message is reserved for it.
    woken: bool,
}

/// See the module.
pub(super) struct Queue {
    pub(super) id: i64,
    /// Index of its stream.
    pub(super) stream: usize,
    pub(super) name: String,
    pub(super) filter: Filter,
    /// New messages, ascending.
    fresh: VecDeque<u64>,
    tracked: BTreeMap<u64, Tracked>,
    /// Those of `tracked` that anybody may have now.
    again: BTreeSet<u64>,
    /// The last matching sequence, or where the queue begins.
    latest: u64,
    /// Messages up to here may have been delivered by an earlier process: their first delivery here
    /// counts as the second, so that the worker looks whether the result exists.
    delivered_before: u64,
    waiters: VecDeque<Waiter>,
    next_waiter: u64,
}

/// What a step asks to be written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tried {
    pub(super) seq: u64,
    pub(super) delivered: u64,
}

impl Queue {
    /// A queue that begins after sequence `floor`.
    pub(super) fn new(id: i64, stream: usize, name: String, filter: Filter, floor: u64) -> Self {
        Self {
            id,
            stream,
            name,
            filter,
            fresh: VecDeque::new(),
            tracked: BTreeMap::new(),
            again: BTreeSet::new(),
            latest: floor,
            delivered_before: 0,
            waiters: VecDeque::new(),
            next_waiter: 0,
        }
    }

    /// Fills the queue: `waiting` ascending, `tried` what is known of earlier deliveries.
    pub(super) fn fill(&mut self, waiting: Vec<u64>, tried: &[Tried], delivered_before: u64) {
        self.latest = self.latest.max(waiting.last().copied().unwrap_or(0));
        self.delivered_before = delivered_before;
        self.fresh = waiting.into();
        for Tried { seq, delivered } in tried.iter().copied() {
            let Ok(index) = self.fresh.binary_search(&seq) else {
                continue;
            };
            self.fresh.remove(index);
            self.again.insert(seq);
            let tracked = Tracked {
                delivered,
                due: None,
                held: false,
                recorded: true,
            };
            self.tracked.insert(seq, tracked);
        }
    }

    /// A matching message was stored.
    pub(super) fn push(&mut self, seq: u64) {
        self.fresh.push_back(seq);
        self.latest = seq;
        self.rouse();
    }

    /// Every matching message up to here is acknowledged.
    pub(super) fn floor(&self) -> u64 {
        let oldest_tracked = self.tracked.keys().next();
        let oldest = self.fresh.front().into_iter().chain(oldest_tracked).min();
        oldest.map_or(self.latest, |seq| seq - 1)
    }

    /// The oldest unacknowledged message.
    pub(super) fn oldest(&self) -> Option<u64> {
        let oldest_tracked = self.tracked.keys().next();
        self.fresh
            .front()
            .into_iter()
            .chain(oldest_tracked)
            .min()
            .copied()
    }

    /// Messages that nobody has been given yet, or that anybody may have again now.
    pub(super) fn waiting(&self) -> usize {
        self.fresh.len() + self.again.len()
    }

    /// Messages given out or delayed.
    pub(super) fn out(&self) -> usize {
        self.tracked.len() - self.again.len()
    }

    fn ready(&self) -> usize {
        let room = (ACK_PENDING_MAX as usize).saturating_sub(self.out());
        self.waiting().min(room)
    }

    fn due(&self, seq: u64) -> Due {
        Due::Delivery {
            queue: self.id,
            seq,
        }
    }

    /// Names a puller.
    pub(super) fn new_waiter(&mut self) -> u64 {
        self.next_waiter += 1;
        self.next_waiter
    }

    /// Takes up to `max` messages for a puller, or notes that it waits. Newcomers do not overtake
    /// those that were woken for a message.
    pub(super) fn poll_take(
        &mut self,
        waiter: u64,
        max: usize,
        now: Instant,
        timers: &mut Timers,
        cx: &mut Context<'_>,
    ) -> Poll<Vec<Tried>> {
        let place = self.waiters.iter().position(|w| w.id == waiter);
        let others = self.waiters.iter().filter(|w| w.woken && w.id != waiter);
        let free = self.ready().saturating_sub(others.count());
        if free == 0 {
            match place {
                Some(index) => {
                    let mine = &mut self.waiters[index];
                    mine.waker.clone_from(cx.waker());
                    mine.woken = false;
                }
                None => self.waiters.push_back(Waiter {
                    id: waiter,
                    waker: cx.waker().clone(),
                    woken: false,
                }),
            }
            return Poll::Pending;
        }
        if let Some(index) = place {
            self.waiters.remove(index);
        }
        let taken = (0..max.max(1).min(free))
            .filter_map(|_| self.take_one(now, timers))
            .collect();
        self.rouse();
        Poll::Ready(taken)
    }

    fn take_one(&mut self, now: Instant, timers: &mut Timers) -> Option<Tried> {
        let (seq, before) = match self.again.pop_first() {
            Some(seq) => (seq, self.tracked.get(&seq)?.delivered),
            None => {
                let seq = self.fresh.pop_front()?;
                (seq, u64::from(seq <= self.delivered_before))
            }
        };
        let delivered = before + 1;
        let tracked = Tracked {
            delivered,
            due: Some(timers.arm(now, ACK_WAIT, self.due(seq))),
            held: true,
            // The puller writes repeats down.
            recorded: delivered > 1,
        };
        self.tracked.insert(seq, tracked);
        Some(Tried { seq, delivered })
    }

    /// A puller no longer waits.
    pub(super) fn leave(&mut self, waiter: u64) {
        self.waiters.retain(|w| w.id != waiter);
        self.rouse();
    }

    /// Wakes as many waiters as there are messages for them.
    fn rouse(&mut self) {
        let mut spare = self.ready();
        for waiter in &mut self.waiters {
            if spare == 0 {
                return;
            }
            spare -= 1;
            if !waiter.woken {
                waiter.woken = true;
                waiter.waker.wake_by_ref();
            }
        }
    }

    /// Wakes everybody, because the queue or the bus ends.
    pub(super) fn rouse_all(&mut self) {
        for waiter in self.waiters.drain(..) {
            waiter.waker.wake();
        }
    }

    /// Never again. Returns whether that was news.
    pub(super) fn ack(&mut self, seq: u64, timers: &mut Timers) -> bool {
        match self.tracked.remove(&seq) {
            Some(tracked) => {
                match tracked.due {
                    Some(at) => timers.disarm(at, self.due(seq)),
                    None => {
                        self.again.remove(&seq);
                    }
                }
                // A place became free if the queue was at its bound.
                self.rouse();
                true
            }
            None => match self.fresh.binary_search(&seq) {
                Ok(index) => self.fresh.remove(index).is_some(),
                Err(_) => false,
            },
        }
    }

    /// Another puller may have it after `delay`. Returns what to write down.
    pub(super) fn nak(
        &mut self,
        seq: u64,
        delivered: u64,
        delay: Duration,
        now: Instant,
        timers: &mut Timers,
    ) -> Option<Tried> {
        let due = self.due(seq);
        let tracked = self.held(seq, delivered)?;
        if let Some(at) = tracked.due.take() {
            timers.disarm(at, due.clone());
        }
        tracked.held = false;
        tracked.recorded = true;
        if delay.is_zero() {
            self.again.insert(seq);
            self.rouse();
        } else {
            tracked.due = Some(timers.arm(now, delay, due));
        }
        Some(Tried { seq, delivered })
    }

    /// Takes a delivery back that its worker never saw: it does not count.
    pub(super) fn undo(&mut self, taken: Tried, timers: &mut Timers) {
        let due = self.due(taken.seq);
        let Some(tracked) = self.held(taken.seq, taken.delivered) else {
            return;
        };
        if let Some(at) = tracked.due.take() {
            timers.disarm(at, due);
        }
        tracked.held = false;
        tracked.delivered -= 1;
        self.again.insert(taken.seq);
        self.rouse();
    }

    /// Still at it. Returns what to write down: that a delivery takes long enough to be remembered
    /// across a restart.
    pub(super) fn progress(
        &mut self,
        seq: u64,
        delivered: u64,
        now: Instant,
        timers: &mut Timers,
    ) -> Option<Tried> {
        let due = self.due(seq);
        let tracked = self.held(seq, delivered)?;
        if let Some(at) = tracked.due.take() {
            timers.disarm(at, due.clone());
        }
        tracked.due = Some(timers.arm(now, ACK_WAIT, due));
        let first = !std::mem::replace(&mut tracked.recorded, true);
        first.then_some(Tried { seq, delivered })
    }

    /// The time of a message has come: its delay is over, or its worker is silent. Returns what to
    /// write down.
    pub(super) fn expire(&mut self, seq: u64) -> Option<Tried> {
        let tracked = self.tracked.get_mut(&seq)?;
        tracked.due = None;
        tracked.recorded = true;
        let was_held = std::mem::replace(&mut tracked.held, false);
        let delivered = tracked.delivered;
        self.again.insert(seq);
        self.rouse();
        was_held.then_some(Tried { seq, delivered })
    }

    /// Forgets its timers, before it is dropped.
    pub(super) fn disarm_all(&mut self, timers: &mut Timers) {
        for (seq, tracked) in &self.tracked {
            if let Some(at) = tracked.due {
                timers.disarm(at, self.due(*seq));
            }
        }
    }

    fn held(&mut self, seq: u64, delivered: u64) -> Option<&mut Tracked> {
        let tracked = self.tracked.get_mut(&seq)?;
        (tracked.held && tracked.delivered == delivered).then_some(tracked)
    }
}
