//! Queues through the backend: order, fairness, cancellation, restarts.

use super::support::*;
use crate::backend::{Backend, Verdict};
use crate::streams::ACK_PENDING_MAX;
use crate::{Error, QueueSpec};
use rand::Rng;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

#[tokio::test]
async fn handed_back_work_goes_before_new_work_and_a_late_hand_back_counts_for_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(dir.path()).await;
    for n in 1..=3 {
        request(&bus, n).await;
    }
    let mut worker = puller(&bus).await;
    let first = pull(&mut worker).await;
    assert_eq!((first.stored.seq, first.delivered), (1, 1));
    bus.verdict(&first.token, Verdict::Nak(Duration::ZERO))
        .await
        .unwrap();
    let again = pull(&mut worker).await;
    assert_eq!((again.stored.seq, again.delivered), (1, 2));
    bus.verdict(&first.token, Verdict::Nak(Duration::ZERO))
        .await
        .unwrap();
    assert_eq!(pull(&mut worker).await.stored.seq, 2);
    // A late acknowledgement of the first delivery does count.
    bus.verdict(&first.token, Verdict::Ack).await.unwrap();
    bus.verdict(&again.token, Verdict::Nak(Duration::ZERO))
        .await
        .unwrap();
    assert_eq!(pull(&mut worker).await.stored.seq, 3);
    let info = bus.queues(&log()).await.unwrap().remove(0);
    assert_eq!((info.waiting, info.held), (0, 2));
}

#[tokio::test]
async fn a_delayed_hand_back_waits_its_time_and_silence_moves_work_on() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(dir.path()).await;
    request(&bus, 1).await;
    let mut worker = puller(&bus).await;
    let first = pull(&mut worker).await;
    let begun = Instant::now();
    let delay = Duration::from_millis(150);
    bus.verdict(&first.token, Verdict::Nak(delay))
        .await
        .unwrap();
    let second = pull(&mut worker).await;
    assert!(begun.elapsed() >= delay);
    assert_eq!(second.delivered, 2);
    // Said nothing: the work moves after the ack wait, but not before if progress was reported.
    tokio::time::sleep(Duration::from_millis(500)).await;
    bus.verdict(&second.token, Verdict::Progress).await.unwrap();
    let reported = Instant::now();
    let third = pull(&mut worker).await;
    assert_eq!(third.delivered, 3);
    assert!(reported.elapsed() >= crate::streams::ACK_WAIT);
}

#[tokio::test]
async fn waiting_pullers_are_served_in_turn() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(dir.path()).await;
    let (sender, mut served) = tokio::sync::mpsc::channel(100);
    let mut tasks = tokio::task::JoinSet::new();
    for who in 0..4 {
        let (mut worker, sender, bus) = (puller(&bus).await, sender.clone(), bus.clone());
        tasks.spawn(async move {
            loop {
                let delivery = worker.next(8).await.unwrap().remove(0);
                bus.verdict(&delivery.token, Verdict::Ack).await.unwrap();
                sender.send(who).await.unwrap();
            }
        });
    }
    let mut counts = [0; 4];
    for n in 0..40 {
        request(&bus, n).await;
        counts[soon("work", served.recv()).await.unwrap()] += 1;
    }
    // The first messages come while some still begin to wait.
    assert!(
        counts.iter().all(|count| (9..=11).contains(count)),
        "{counts:?}"
    );
}

#[tokio::test]
async fn a_cancelled_pull_loses_nothing_and_counts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut small = options(dir.path());
    small.cache_bytes = 0;
    let bus = open_with(small).await;
    let mut gone = puller(&bus).await;
    let mut stays = puller(&bus).await;
    {
        let mut first = gone.next(1);
        assert!(waits(&mut first).await);
        let mut second = stays.next(1);
        assert!(waits(&mut second).await);
        // The message is reserved for the first one, which then gives up.
        request(&bus, 1).await;
        drop(first);
        let delivery = soon("the message", second).await.unwrap().remove(0);
        assert_eq!(delivery.delivered, 1);
        bus.verdict(&delivery.token, Verdict::Ack).await.unwrap();
    }
    // Taken, but its body is still being read from the disk.
    request(&bus, 2).await;
    let mut reading = gone.next(1);
    {
        let _nobody_reads = bus.shared.reader.lock().unwrap();
        let mut cx = Context::from_waker(Waker::noop());
        assert!(reading.as_mut().poll(&mut cx).is_pending());
        drop(reading);
    }
    let delivery = pull(&mut stays).await;
    assert_eq!(
        (delivery.delivered, &delivery.stored.body[..]),
        (1, &b"2"[..])
    );
    assert_eq!(delivery.stored.previous_on_subject, 1);
}

#[tokio::test]
async fn unacknowledged_work_comes_again_after_a_restart_and_acknowledged_work_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(dir.path()).await;
    for n in 1..=6 {
        request(&bus, n).await;
    }
    let mut worker = puller(&bus).await;
    let deliveries = worker.next(6).await.unwrap();
    assert_eq!(deliveries.len(), 6);
    for done in [0, 2, 5] {
        bus.verdict(&deliveries[done].token, Verdict::Ack)
            .await
            .unwrap();
    }
    // Its count is known exactly; of the others it is only known that they may have been out.
    for _ in 0..2 {
        bus.verdict(&deliveries[3].token, Verdict::Progress)
            .await
            .unwrap();
    }
    bus.verdict(
        &deliveries[4].token,
        Verdict::Nak(Duration::from_secs(3600)),
    )
    .await
    .unwrap();
    drop(worker);
    bus.close().await;
    let bus = open(dir.path()).await;
    request(&bus, 7).await;
    let mut worker = puller(&bus).await;
    let mut again = soon("work", worker.next(10)).await.unwrap();
    again.sort_by_key(|delivery| delivery.stored.seq);
    let counts: Vec<_> = again.iter().map(|d| (d.stored.seq, d.delivered)).collect();
    assert_eq!(counts, [(2, 2), (4, 2), (5, 2), (7, 1)]);
    for delivery in again {
        bus.verdict(&delivery.token, Verdict::Ack).await.unwrap();
    }
    bus.close().await;
    let bus = open(dir.path()).await;
    let info = bus.queues(&log()).await.unwrap().remove(0);
    assert_eq!((info.waiting, info.held), (0, 0));
}

#[tokio::test]
async fn no_more_than_the_bound_is_out_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(dir.path()).await;
    let bound = ACK_PENDING_MAX as u64;
    let messages: Vec<_> = (0..bound + 10).map(|n| raw(REQ, n, "")).collect();
    let stream = log();
    let appends = messages.iter().map(|message| bus.append(&stream, message));
    for done in futures::future::join_all(appends).await {
        done.unwrap();
    }
    let mut worker = puller(&bus).await;
    let out = worker.next(usize::MAX).await.unwrap();
    assert_eq!(out.len() as u64, bound);
    let mut more = worker.next(usize::MAX);
    assert!(waits(&mut more).await);
    bus.verdict(&out[7].token, Verdict::Ack).await.unwrap();
    let next = soon("a free place", more).await.unwrap();
    assert_eq!(next.len(), 1);
    assert_eq!(next[0].stored.seq, bound + 1);
}

#[tokio::test]
async fn queues_begin_where_they_are_told_and_end_when_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(dir.path()).await;
    request(&bus, 1).await;
    let late = QueueSpec {
        name: "late".into(),
        from_start: false,
        ..work()
    };
    bus.ensure_queue(&late).await.unwrap();
    bus.ensure_queue(&late).await.unwrap();
    let mut worker = bus.puller(&log(), "late").await.unwrap();
    let mut pull_late = worker.next(1);
    assert!(waits(&mut pull_late).await);
    request(&bus, 2).await;
    let delivery = soon("work", pull_late).await.unwrap().remove(0);
    assert_eq!(delivery.stored.seq, 2);
    let mut other = bus.puller(&log(), "late").await.unwrap();
    let mut waiting = other.next(1);
    assert!(waits(&mut waiting).await);
    bus.delete_queue(&log(), "late").await.unwrap();
    bus.delete_queue(&log(), "late").await.unwrap();
    let missing = |outcome: Result<_, Error>| matches!(outcome, Err(Error::Missing { .. }));
    assert!(missing(soon("the end", waiting).await.map(drop)));
    assert!(missing(bus.verdict(&delivery.token, Verdict::Ack).await));
    bus.verdict(&delivery.token, Verdict::Nak(Duration::ZERO))
        .await
        .unwrap();
    assert!(missing(bus.puller(&log(), "late").await.map(drop)));
    bus.close().await;
    let bus = open(dir.path()).await;
    assert_eq!(bus.queues(&log()).await.unwrap().len(), 1);
}

#[tokio::test]
async fn many_queues_each_get_what_they_want() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(dir.path()).await;
    for n in 0..50 {
        let spec = QueueSpec {
            name: format!("q{n}"),
            filter: format!("vlinder.v1.default.req.svc.b{n}.*"),
            ..work()
        };
        bus.ensure_queue(&spec).await.unwrap();
    }
    for n in 0..50 {
        let subject = format!("vlinder.v1.default.req.svc.b{n}.m");
        bus.append(&log(), &raw(&subject, n, "")).await.unwrap();
    }
    let infos = bus.queues(&log()).await.unwrap();
    let of_one = infos.iter().filter(|info| info.waiting == 1);
    assert_eq!(of_one.count(), 50);
    assert!(
        infos
            .iter()
            .any(|info| info.name == "work" && info.waiting == 50)
    );
}

#[tokio::test]
async fn work_that_ends_the_process_each_time_is_counted_across_restarts() {
    let dir = tempfile::tempdir().unwrap();
    for expected in 1..=5 {
        let bus = open(dir.path()).await;
        request(&bus, 1).await;
        let mut worker = puller(&bus).await;
        assert_eq!(pull(&mut worker).await.delivered, expected);
        bus.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn restless_workers_on_many_threads_lose_nothing() {
    const MESSAGES: u64 = 2000;
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let dir = tempfile::tempdir().unwrap();
    let mut small = options(dir.path());
    small.cache_bytes = 20_000;
    let bus = open_with(small).await;
    let done = Arc::new(Mutex::new(BTreeMap::<u64, u64>::new()));
    let mut workers = tokio::task::JoinSet::new();
    for who in 0..8 {
        let (bus, done) = (bus.clone(), done.clone());
        workers.spawn(async move {
            let mut random: rand::rngs::StdRng =
                rand::SeedableRng::seed_from_u64(seed.wrapping_add(who));
            let mut worker = puller(&bus).await;
            loop {
                // Gives up some waits, also while bodies are being read, and some pullers.
                let patience = Duration::from_micros(random.random_range(0..3000));
                let pulled = tokio::time::timeout(patience, worker.next(3)).await;
                if random.random_ratio(1, 20) {
                    worker = puller(&bus).await;
                }
                for delivery in pulled.map(Result::unwrap).unwrap_or_default() {
                    let verdict = match random.random_range(0..10) {
                        0 => Verdict::Nak(Duration::ZERO),
                        1 => Verdict::Nak(Duration::from_millis(2)),
                        _ => Verdict::Ack,
                    };
                    bus.verdict(&delivery.token, verdict).await.unwrap();
                    if verdict == Verdict::Ack {
                        *done.lock().unwrap().entry(delivery.stored.seq).or_default() += 1;
                    }
                }
            }
        });
    }
    let mut senders = tokio::task::JoinSet::new();
    for who in 0..4 {
        let bus = bus.clone();
        senders.spawn(async move {
            for n in 0..MESSAGES / 4 {
                request(&bus, who * MESSAGES + n).await;
            }
        });
    }
    senders.join_all().await;
    soon("the end of the work", async {
        while done.lock().unwrap().len() as u64 != MESSAGES {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    let info = bus.queues(&log()).await.unwrap().remove(0);
    assert_eq!((info.waiting, info.held), (0, 0));
    // Nobody was silent for the ack wait, so nothing was done twice.
    assert!(done.lock().unwrap().values().all(|times| *times == 1));
}
