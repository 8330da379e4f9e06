//! The queue's state machine against a plain model, over random histories.

use crate::local::filter::Filter;
use crate::local::queue::{Queue, Tried};
use crate::local::timers::{Due, Timers};
use crate::streams::ACK_WAIT;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

#[derive(Debug, Clone)]
enum Step {
    Push,
    Take(usize),
    /// The next four: of the n-th delivery that ever was, modulo.
    Ack(usize),
    Nak(usize, u64),
    Progress(usize),
    Undo(usize),
    Pass(u64),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Push),
        3 => (1usize..4).prop_map(Step::Take),
        3 => any::<usize>().prop_map(Step::Ack),
        2 => (any::<usize>(), prop_oneof![Just(0), 1u64..5000]).prop_map(|(n, d)| Step::Nak(n, d)),
        1 => any::<usize>().prop_map(Step::Progress),
        1 => any::<usize>().prop_map(Step::Undo),
        2 => (1u64..4000).prop_map(Step::Pass),
        1 => Just(Step::Restart),
    ]
}

/// What is true of an unacknowledged message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Waits for its first delivery, or for another.
    New,
    Again,
    Held(Tried, Instant),
    Delayed(Instant),
}

impl Place {
    fn is_ready(self) -> bool {
        matches!(self, Self::New | Self::Again)
    }
}

struct Bed {
    queue: Queue,
    timers: Timers,
    me: u64,
    now: Instant,
    unacked: BTreeMap<u64, Place>,
    counts: BTreeMap<u64, u64>,
    last: u64,
    handed: Vec<Tried>,
}

impl Bed {
    fn new() -> Self {
        let mut queue = Queue::new(1, 0, "q".into(), Filter::parse(">").unwrap(), 0);
        Self {
            me: queue.new_waiter(),
            queue,
            timers: Timers::default(),
            now: Instant::now(),
            unacked: BTreeMap::new(),
            counts: BTreeMap::new(),
            last: 0,
            handed: vec![],
        }
    }

    fn pick(&self, n: usize) -> Option<(Tried, bool)> {
        let index = n.checked_rem(self.handed.len())?;
        let one = self.handed[index];
        let place = self.unacked.get(&one.seq);
        let held = matches!(place, Some(Place::Held(holder, _)) if *holder == one);
        Some((one, held))
    }

    fn take(&mut self, max: usize) -> Result<(), TestCaseError> {
        let ready = |wanted: Place| {
            let of_kind = self
                .unacked
                .iter()
                .filter(move |(_, place)| **place == wanted);
            of_kind.map(|(seq, _)| *seq)
        };
        let expected: Vec<u64> = ready(Place::Again)
            .chain(ready(Place::New))
            .take(max)
            .collect();
        let mut cx = Context::from_waker(Waker::noop());
        let (now, timers) = (self.now, &mut self.timers);
        let taken = match self.queue.poll_take(self.me, max, now, timers, &mut cx) {
            Poll::Pending => vec![],
            Poll::Ready(taken) => taken,
        };
        let seqs: Vec<u64> = taken.iter().map(|one| one.seq).collect();
        prop_assert_eq!(seqs, expected);
        for one in taken {
            let count = self.counts.entry(one.seq).or_insert(0);
            *count += 1;
            prop_assert_eq!(one.delivered, *count);
            self.unacked
                .insert(one.seq, Place::Held(one, now + ACK_WAIT));
            self.handed.push(one);
        }
        Ok(())
    }

    fn pass(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
        while let Some(due) = self.timers.pop(self.now) {
            if let Due::Delivery { seq, .. } = due {
                self.queue.expire(seq);
            }
        }
        for place in self.unacked.values_mut() {
            if let Place::Held(_, until) | Place::Delayed(until) = *place
                && until <= self.now
            {
                *place = Place::Again;
            }
        }
    }

    /// What a new process finds: the positions and some counts.
    fn restart(&mut self) -> Result<(), TestCaseError> {
        let floor = self.queue.floor();
        prop_assert!(self.unacked.keys().all(|seq| *seq > floor));
        let filter = Filter::parse(">").unwrap();
        self.queue = Queue::new(1, 0, "q".into(), filter, floor);
        self.timers = Timers::default();
        self.me = self.queue.new_waiter();
        let known: Vec<Tried> = self
            .counts
            .iter()
            .filter(|(seq, _)| *seq % 2 == 0)
            .map(|(seq, delivered)| Tried {
                seq: *seq,
                delivered: *delivered,
            })
            .collect();
        let waiting: Vec<u64> = self.unacked.keys().copied().collect();
        self.queue.fill(waiting, &known, self.last);
        self.handed.clear();
        for (seq, place) in &mut self.unacked {
            let is_known = known.iter().any(|one| one.seq == *seq);
            *place = if is_known { Place::Again } else { Place::New };
            if !is_known {
                self.counts.insert(*seq, 1);
            }
        }
        Ok(())
    }

    fn step(&mut self, step: Step) -> Result<(), TestCaseError> {
        let now = self.now;
        match step {
            Step::Push => {
                // Other subjects' messages lie between.
                self.last += 1 + self.last % 3;
                self.queue.push(self.last);
                self.unacked.insert(self.last, Place::New);
            }
            Step::Take(max) => self.take(max)?,
            Step::Ack(n) => {
                let Some((one, _)) = self.pick(n) else {
                    return Ok(());
                };
                let news = self.queue.ack(one.seq, &mut self.timers);
                prop_assert_eq!(news, self.unacked.remove(&one.seq).is_some());
            }
            Step::Nak(n, ms) => {
                let Some((one, held)) = self.pick(n) else {
                    return Ok(());
                };
                let delay = Duration::from_millis(ms);
                let timers = &mut self.timers;
                let naked = self.queue.nak(one.seq, one.delivered, delay, now, timers);
                prop_assert_eq!(naked.is_some(), held);
                if held {
                    let delayed = Place::Delayed(now + delay);
                    let place = if ms == 0 { Place::Again } else { delayed };
                    self.unacked.insert(one.seq, place);
                }
            }
            Step::Progress(n) => {
                let Some((one, held)) = self.pick(n) else {
                    return Ok(());
                };
                self.queue
                    .progress(one.seq, one.delivered, now, &mut self.timers);
                if held {
                    let place = Place::Held(one, now + ACK_WAIT);
                    self.unacked.insert(one.seq, place);
                }
            }
            Step::Undo(n) => {
                let Some((one, held)) = self.pick(n) else {
                    return Ok(());
                };
                self.queue.undo(one, &mut self.timers);
                if held {
                    self.unacked.insert(one.seq, Place::Again);
                    self.counts.insert(one.seq, one.delivered - 1);
                }
            }
            Step::Pass(ms) => self.pass(ms),
            Step::Restart => self.restart()?,
        }
        let ready = self
            .unacked
            .values()
            .filter(|place| place.is_ready())
            .count();
        prop_assert_eq!(self.queue.waiting(), ready);
        prop_assert_eq!(self.queue.out(), self.unacked.len() - ready);
        prop_assert_eq!(self.queue.oldest(), self.unacked.keys().next().copied());
        Ok(())
    }
}

proptest! {
    #[test]
    fn every_message_is_in_one_place_until_it_is_acknowledged(
        steps in proptest::collection::vec(step(), 0..200),
    ) {
        let mut bed = Bed::new();
        for step in steps {
            bed.step(step)?;
        }
    }
}
