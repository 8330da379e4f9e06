//! The job loop: pull as much as there are free slots, report, run, settle.
//!
//! Guarantees: a job is acknowledged only after its handler said [`Outcome::Done`]; whatever else
//! happens, it is handed back, retried later, or recorded as a dead letter. A message that nobody can
//! decode, that failed [`TRIES_MAX`] times, or that killed [`DEATHS_MAX`] workers becomes a dead letter;
//! its handler gives it up first, so that whoever waits gets an answer.
//!
//! Handlers see the same job twice after any failure; what makes that safe is theirs to say. They never
//! see it twice at once on one worker, and the second time they are told that it is not the first, also
//! where the bus has forgotten: a NATS server that is killed loses the last of what it knew about
//! deliveries, and then counts from one again.

use crate::{Error, Held, WorkerCx};
use async_trait::async_trait;
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::Instrument;
use vlinder_bus::streams::{BUCKET_DEATHS, PROGRESS_EVERY};
use vlinder_bus::{Bus, Delivery, QueueSpec, Stored};

/// A message that was delivered so often without success is given up. With the growing pauses of
/// handlers this is minutes of trying; turns end at their deadline long before.
pub const TRIES_MAX: u64 = 50;
/// Workers that one message may kill. After the first death it is retried at once, after the second
/// alone and delayed, after the third it is a dead letter.
pub const DEATHS_MAX: u64 = 3;
/// How long a message waits after its second death.
pub const SECOND_DEATH_DELAY: Duration = Duration::from_secs(1);
/// Pause before a job is tried again when the bus does not say whether the log is whole.
const HEALED_RETRY: Duration = Duration::from_secs(1);
/// Pause before a broken pull is begun again.
const PULL_RETRY: Duration = Duration::from_millis(250);

/// A job as its handler sees it.
pub struct Job {
    /// The message.
    pub stored: Stored,
    /// At which delivery, from 1; a hint. Above 1 the handler looks first whether its result exists.
    /// 1 says for certain that nobody had it before.
    pub attempt: u64,
}

/// What came of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Its result is stored, or there is nothing to do.
    Done,
    /// Not now; somebody shall try again after the pause.
    RetryAfter(Duration),
    /// Never; it becomes a dead letter with this reason. The handler has answered whoever waits.
    Reject(String),
}

/// What a worker does with the jobs of a queue.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Does the job.
    async fn handle(&self, job: Job) -> Outcome;
    /// The job will not be tried again: answers whoever waits for it with a failure.
    async fn give_up(&self, stored: &Stored, reason: &str);
}

/// The kv key under which deaths of a message's workers are counted.
pub fn deaths_key(job: &str) -> String {
    vlinder_bus::subjects::encode(job)
}

/// How many workers the message has killed so far.
pub async fn deaths_of(bus: &Bus, job: &str) -> Result<u64, vlinder_bus::Error> {
    let entry = bus.kv_get(BUCKET_DEATHS, &deaths_key(job)).await?;
    Ok(entry
        .and_then(|entry| String::from_utf8_lossy(&entry.value).parse().ok())
        .unwrap_or(0))
}

/// Counts a death and hands the delivery back: at once, or delayed from the second on.
/// For the supervisor, when a worker died, and for the loop, when a handler panicked.
pub async fn after_death(bus: &Bus, job: &str, token: &str) -> Result<u64, vlinder_bus::Error> {
    let deaths = deaths_of(bus, job).await.unwrap_or(0) + 1;
    let delay = if deaths == 1 {
        Duration::ZERO
    } else {
        SECOND_DEATH_DELAY
    };
    let counted = bus
        .kv_put(
            BUCKET_DEATHS,
            &deaths_key(job),
            Bytes::from(deaths.to_string()),
            None,
        )
        .await;
    bus.hand_back(token, delay).await?;
    counted?;
    Ok(deaths)
}

/// Places for jobs. Their number may change while jobs run: where it falls below what is taken,
/// places vanish as jobs end.
pub struct Slots(watch::Sender<SlotCount>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SlotCount {
    limit: usize,
    taken: usize,
}

impl SlotCount {
    fn free(self) -> usize {
        self.limit.saturating_sub(self.taken)
    }
}

impl Slots {
    /// So many places, all free.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self(watch::Sender::new(SlotCount { limit, taken: 0 })))
    }

    /// From now on there are so many places.
    pub fn set_limit(&self, limit: usize) {
        self.0.send_if_modified(|count| {
            let changed = count.limit != limit;
            count.limit = limit;
            changed
        });
    }

    /// How many jobs hold a place now.
    pub fn taken(&self) -> usize {
        self.0.borrow().taken
    }

    /// Waits until a place is free; how many are.
    async fn free(&self) -> usize {
        let mut count = self.0.subscribe();
        let free = count.wait_for(|count| count.free() > 0).await;
        free.map_or(0, |count| count.free())
    }

    /// Returns when fewer than `asked` places are free.
    async fn fewer_than(&self, asked: usize) {
        let mut count = self.0.subscribe();
        // The sender lives as long as `self`, so this cannot fail.
        let _ = count.wait_for(|count| count.free() < asked).await;
    }

    /// Takes a place, even one that has just vanished: the work is here already.
    fn take(self: &Arc<Self>) -> Slot {
        self.0.send_modify(|count| count.taken += 1);
        Slot(self.clone())
    }
}

/// A place that is taken until this is dropped.
struct Slot(Arc<Slots>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| count.taken -= 1);
    }
}

/// The jobs of one queue that run on this worker, by their sequence.
#[derive(Default)]
struct UnderWay(Mutex<HashMap<u64, Weak<tokio::sync::Mutex<()>>>>);

impl UnderWay {
    /// Waits until no other delivery of the job runs here; as long as the guard lives, none begins.
    /// Whether there was one.
    async fn alone(&self, seq: u64) -> (tokio::sync::OwnedMutexGuard<()>, bool) {
        let job = self.of(seq);
        match job.clone().try_lock_owned() {
            Ok(guard) => (guard, false),
            Err(_) => (job.lock_owned().await, true),
        }
    }

    fn of(&self, seq: u64) -> Arc<tokio::sync::Mutex<()>> {
        let mut jobs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(job) = jobs.get(&seq).and_then(Weak::upgrade) {
            return job;
        }
        // What is left are at most as many as there are slots.
        jobs.retain(|_, job| job.strong_count() > 0);
        let job = Arc::default();
        jobs.insert(seq, Arc::downgrade(&job));
        job
    }
}

/// Pulls from `queue` with `slots` jobs at once until the worker drains; then finishes what runs.
pub async fn serve_queue(
    cx: &WorkerCx,
    queue: QueueSpec,
    slots: usize,
    handler: Arc<dyn Handler>,
) -> Result<(), Error> {
    serve_queue_in(cx, queue, Slots::new(slots), handler).await
}

/// Like [`serve_queue`], with as many jobs at once as there are `slots` at the time.
pub async fn serve_queue_in(
    cx: &WorkerCx,
    queue: QueueSpec,
    slots: Arc<Slots>,
    handler: Arc<dyn Handler>,
) -> Result<(), Error> {
    let mut running = JoinSet::new();
    let under_way = Arc::new(UnderWay::default());
    let mut puller = None;
    loop {
        while running.try_join_next().is_some() {}
        let free = tokio::select! {
            biased;
            () = cx.drain.cancelled() => break,
            free = slots.free() => free,
        };
        let pulled = tokio::select! {
            biased;
            () = cx.drain.cancelled() => break,
            pulled = pull(cx, &queue, &mut puller, free) => pulled,
            () = slots.fewer_than(free) => {
                // What was asked for would find no place. Dropping the puller hands it back.
                puller = None;
                continue;
            }
        };
        let deliveries = match pulled {
            Ok(deliveries) => deliveries,
            Err(error) => {
                tracing::warn!(queue = %queue.name, %error, "cannot pull, trying again");
                puller = None;
                tokio::select! {
                    () = cx.drain.cancelled() => break,
                    () = tokio::time::sleep(PULL_RETRY) => continue,
                }
            }
        };
        for delivery in deliveries {
            let name = job_name(&delivery);
            let held = held_of(&name, &delivery);
            cx.control.held(&held);
            let slot = slots.take();
            let (cx, handler, under_way) = (cx.clone(), handler.clone(), under_way.clone());
            let run = async move {
                run_job(&cx, delivery, &name, handler, under_way).await;
                cx.control.released(&held);
                drop(slot);
            };
            running.spawn(run.in_current_span());
        }
    }
    if let Some(mut puller) = puller {
        puller.stop().await;
    }
    while running.join_next().await.is_some() {}
    Ok(())
}

async fn pull(
    cx: &WorkerCx,
    queue: &QueueSpec,
    puller: &mut Option<vlinder_bus::Puller>,
    free: usize,
) -> Result<Vec<Delivery>, vlinder_bus::Error> {
    let puller = match puller {
        Some(puller) => puller,
        None => {
            cx.bus.ensure_queue(queue).await?;
            puller.insert(cx.bus.puller(&queue.stream, &queue.name).await?)
        }
    };
    puller.next(free).await
}

/// `stream:seq`, the name of a message wherever deaths are counted.
fn job_name(delivery: &Delivery) -> String {
    format!("{}:{}", delivery.stream(), delivery.raw().seq)
}

fn held_of(job: &str, delivery: &Delivery) -> String {
    let (attempt, token) = (delivery.attempt(), delivery.token().to_owned());
    Held {
        job: job.to_owned(),
        attempt,
        token,
    }
    .encode()
}

async fn run_job(
    cx: &WorkerCx,
    delivery: Delivery,
    name: &str,
    handler: Arc<dyn Handler>,
    under_way: Arc<UnderWay>,
) {
    let mut attempt = delivery.attempt();
    let stored = match delivery.decode() {
        Ok(stored) => stored,
        Err(error) => return settle(delivery, Outcome::Reject(error.to_string()), name).await,
    };
    let healed = stored.is_healed();
    let before_connection = stored.time_ms <= cx.bus.connected_at_ms();
    if before_connection || healed {
        attempt = attempt.max(2);
    }
    let deaths = if attempt > 1 {
        deaths_of(&cx.bus, name).await.unwrap_or(0)
    } else {
        0
    };
    let reason_to_give_up = if deaths >= DEATHS_MAX {
        Some(format!("it ended {deaths} workers"))
    } else if attempt > TRIES_MAX {
        Some(format!("it failed {TRIES_MAX} times"))
    } else {
        None
    };
    if let Some(reason) = reason_to_give_up {
        handler.give_up(&stored, &reason).await;
        return settle(delivery, Outcome::Reject(reason), name).await;
    }
    // Suspects run alone, so that no innocent job is counted with them.
    let (_shared, _alone);
    if deaths + 1 >= DEATHS_MAX {
        _alone = cx.gate.write().await;
    } else {
        _shared = cx.gate.read().await;
    }
    let (bus, stream) = (cx.bus.clone(), delivery.stream().clone());
    // A task of its own contains a panic.
    let work = async move {
        let (_guard, was_under_way) = under_way.alone(stored.seq).await;
        if was_under_way {
            attempt = attempt.max(2);
        }
        tracing::debug!(
            seq = stored.seq,
            subject = stored.subject,
            attempt,
            "a job begins"
        );
        // What was lost with the log's tail, its result perhaps, is given back first.
        let waited = match (healed, before_connection) {
            (true, _) => bus.healed(&stream).await,
            (false, true) => bus.whole(&stream).await,
            (false, false) => Ok(()),
        };
        if let Err(error) = waited {
            tracing::warn!(seq = stored.seq, %error, "whether the log is whole cannot be seen, trying again");
            return Outcome::RetryAfter(HEALED_RETRY);
        }
        handler.handle(Job { stored, attempt }).await
    };
    let work = tokio::spawn(work.in_current_span());
    let abort = work.abort_handle();
    let _abort_when_dropped = AbortOnDrop(abort);
    tokio::pin!(work);
    let mut progress = tokio::time::interval(PROGRESS_EVERY);
    progress.tick().await;
    let outcome = loop {
        tokio::select! {
            done = &mut work => break done,
            _ = progress.tick() => {
                if let Err(error) = delivery.progress().await {
                    tracing::debug!(job = name, %error, "progress not reported");
                }
            }
        }
    };
    match outcome {
        Ok(outcome) => settle(delivery, outcome, name).await,
        Err(panic) => {
            tracing::error!(job = name, %panic, "the job's handler panicked");
            if let Err(error) = after_death(&cx.bus, name, delivery.token()).await {
                tracing::warn!(job = name, %error, "could not count the death of a job");
            }
        }
    }
}

/// The one place that turns an outcome into an acknowledgement, a delayed return or a dead letter.
async fn settle(delivery: Delivery, outcome: Outcome, name: &str) {
    tracing::debug!(job = name, ?outcome, "a job ends");
    let said = match outcome {
        Outcome::Done => delivery.ack().await,
        Outcome::RetryAfter(pause) => delivery.hand_back(pause).await,
        Outcome::Reject(reason) => {
            tracing::warn!(job = name, reason, "dead letter");
            delivery.dead_letter(&reason).await
        }
    };
    if let Err(error) = said {
        tracing::warn!(job = name, %error, "could not settle; it will be delivered again");
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[test]
    fn a_job_runs_once_at_a_time() {
        let under_way = UnderWay::default();
        let first = under_way.alone(7).now_or_never().unwrap();
        assert!(!first.1);
        let other = under_way.alone(8).now_or_never();
        assert!(!other.unwrap().1, "another job has nothing to wait for");
        let mut second = Box::pin(under_way.alone(7));
        assert!(second.as_mut().now_or_never().is_none());
        drop(first);
        assert!(
            second.now_or_never().unwrap().1,
            "it is told that it is not the first"
        );
        assert!(!under_way.alone(7).now_or_never().unwrap().1);
        drop(under_way.of(9));
        assert_eq!(
            under_way.0.lock().unwrap().len(),
            1,
            "what has ended is forgotten"
        );
    }

    #[test]
    fn places_come_and_go_while_jobs_run() {
        let slots = Slots::new(0);
        assert_eq!(slots.free().now_or_never(), None);
        slots.set_limit(2);
        assert_eq!(slots.free().now_or_never(), Some(2));
        let (one, two) = (slots.take(), slots.take());
        assert_eq!(slots.free().now_or_never(), None);
        slots.set_limit(1);
        drop(one);
        assert_eq!(
            slots.free().now_or_never(),
            None,
            "a place that is gone was given out"
        );
        drop(two);
        assert_eq!(slots.free().now_or_never(), Some(1));
        assert_eq!(slots.fewer_than(1).now_or_never(), None);
        assert_eq!(slots.fewer_than(2).now_or_never(), Some(()));
    }
}
