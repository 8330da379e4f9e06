//! Queues: at least once, at once when somebody lets go, never after it is done.

use crate::fixture::Fixture;
use crate::support::*;
use std::collections::HashSet;
use std::time::{Duration, Instant};
use vlinder_bus::backend::Verdict;
use vlinder_bus::streams::{ACK_WAIT, PROGRESS_EVERY};
use vlinder_bus::{Error, QueueSpec};

const WORK: &str = "vlinder.v1.default.req.kv.local._";
/// Longer than unacknowledged work stays away.
const PAST_ACK_WAIT: Duration = ACK_WAIT.saturating_add(Duration::from_millis(1500));

fn spec() -> QueueSpec {
    queue("svc-kv-local-_", WORK)
}

pub async fn acknowledged_work_is_done<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let mut puller = pulling(&backend, &spec()).await;
    append(&backend, "vlinder.v1.default.req.kv.other._", "not ours").await;
    let done = append(&backend, WORK, "job").await;
    let got = one(&mut puller).await;
    assert_eq!(text(&got.stored), "job");
    assert_eq!((got.stored.seq, got.delivered), (done.seq, 1));
    assert_eq!(got.stored.subject, WORK);
    assert_eq!(got.stored.headers, [("Name".to_owned(), "job".to_owned())]);
    let stored = backend.get(&log(), done.seq).await.unwrap().unwrap();
    assert_eq!(stored.time_ms, got.stored.time_ms);
    backend.verdict(&got.token, Verdict::Ack).await.unwrap();
    // Twice is fine: a worker that missed the confirmation asks again.
    backend.verdict(&got.token, Verdict::Ack).await.unwrap();
    let other = fixture.connect().await;
    let mut second = self::puller_of(&other).await;
    silence(PAST_ACK_WAIT, async {
        tokio::select! {
            got = puller.next(1) => got,
            got = second.next(1) => got,
        }
    })
    .await;
    // The log keeps what was done.
    assert!(backend.get(&log(), done.seq).await.unwrap().is_some());
}

async fn puller_of(
    backend: &std::sync::Arc<dyn vlinder_bus::backend::Backend>,
) -> Box<dyn vlinder_bus::backend::RawPuller> {
    puller(backend, &spec().name).await
}

pub async fn unacknowledged_work_comes_back<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let mut puller = pulling(&backend, &spec()).await;
    append(&backend, WORK, "job").await;
    let lost = one(&mut puller).await;
    let taken = Instant::now();
    let other = fixture.connect().await;
    let mut second = puller_of(&other).await;
    let got = one(&mut second).await;
    let away = taken.elapsed();
    assert!(away >= ACK_WAIT - Duration::from_millis(200), "{away:?}");
    assert!(away < ACK_WAIT * 2, "{away:?}");
    assert_eq!((got.stored.seq, got.delivered), (lost.stored.seq, 2));
    other.verdict(&got.token, Verdict::Ack).await.unwrap();
}

pub async fn progress_keeps_work<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let mut puller = pulling(&backend, &spec()).await;
    append(&backend, WORK, "long job").await;
    let held = one(&mut puller).await;
    let other = fixture.connect().await;
    let mut second = puller_of(&other).await;
    let working = async {
        let mut tick = tokio::time::interval(PROGRESS_EVERY);
        for _ in 0..8 {
            tick.tick().await;
            backend
                .verdict(&held.token, Verdict::Progress)
                .await
                .unwrap();
        }
    };
    tokio::select! {
        got = second.next(1) => panic!("taken away: {got:?}"),
        () = working => {}
    }
    backend.verdict(&held.token, Verdict::Ack).await.unwrap();
    silence(PAST_ACK_WAIT, second.next(1)).await;
}

pub async fn work_is_handed_back_by_token_at_once<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    backend.ensure_queue(&spec()).await.unwrap();
    let mut dying = puller_of(&backend).await;
    for n in 0..3 {
        append(&backend, WORK, &format!("job {n}")).await;
    }
    let mut held = Vec::new();
    while held.len() < 3 {
        held.extend(soon(dying.next(3)).await.unwrap());
    }
    let elsewhere = fixture.connect().await;
    let supervisor = fixture.connect().await;
    let mut worker = puller_of(&elsewhere).await;
    silence(Duration::from_millis(100), worker.next(3)).await;
    // The supervisor never held the work; it has the tokens, as text.
    let handed_back = Instant::now();
    for delivery in &held {
        supervisor
            .verdict(&delivery.token, Verdict::Nak(Duration::ZERO))
            .await
            .unwrap();
    }
    let mut moved = HashSet::new();
    while moved.len() < 3 {
        for got in within(AT_ONCE, worker.next(3)).await.unwrap() {
            assert!(got.delivered >= 2);
            moved.insert(got.stored.seq);
            elsewhere.verdict(&got.token, Verdict::Ack).await.unwrap();
        }
    }
    assert!(handed_back.elapsed() < AT_ONCE);
}

pub async fn a_delayed_hand_back_waits<F: Fixture>() {
    let (_fixture, backend) = prepared::<F>().await;
    let mut puller = pulling(&backend, &spec()).await;
    append(&backend, WORK, "later").await;
    let got = one(&mut puller).await;
    let delay = Duration::from_millis(1200);
    let handed_back = Instant::now();
    backend
        .verdict(&got.token, Verdict::Nak(delay))
        .await
        .unwrap();
    // Other work goes on meanwhile.
    append(&backend, WORK, "now").await;
    let now = one(&mut puller).await;
    assert_eq!(text(&now.stored), "now");
    backend.verdict(&now.token, Verdict::Ack).await.unwrap();
    let later = one(&mut puller).await;
    let away = handed_back.elapsed();
    assert_eq!((text(&later.stored), later.delivered), ("later", 2));
    assert!(
        away >= delay - Duration::from_millis(50) && away < delay + AT_ONCE,
        "{away:?}"
    );
}

pub async fn terminated_work_never_comes_back<F: Fixture>() {
    let (_fixture, backend) = prepared::<F>().await;
    let mut puller = pulling(&backend, &spec()).await;
    let done = append(&backend, WORK, "poison").await;
    let got = one(&mut puller).await;
    backend
        .verdict(&got.token, Verdict::Terminate)
        .await
        .unwrap();
    silence(PAST_ACK_WAIT, puller.next(1)).await;
    assert!(backend.get(&log(), done.seq).await.unwrap().is_some());
}

pub async fn a_late_acknowledgement_still_counts<F: Fixture>() {
    let (_fixture, backend) = prepared::<F>().await;
    let mut puller = pulling(&backend, &spec()).await;
    append(&backend, WORK, "job").await;
    let stale = one(&mut puller).await;
    let fresh = one(&mut puller).await;
    assert_eq!(fresh.delivered, 2);
    backend.verdict(&stale.token, Verdict::Ack).await.unwrap();
    silence(PAST_ACK_WAIT, puller.next(1)).await;
}

pub async fn workers_share_a_queue<F: Fixture>() {
    const JOBS: usize = 600;
    let (fixture, backend) = prepared::<F>().await;
    backend.ensure_queue(&spec()).await.unwrap();
    let mut workers = Vec::new();
    for n in 0..3 {
        let backend = fixture.connect().await;
        let mut puller = puller_of(&backend).await;
        workers.push(tokio::spawn(async move {
            let mut mine = Vec::new();
            // Two quiet seconds: everything is done.
            while let Ok(got) =
                tokio::time::timeout(Duration::from_secs(2), puller.next(1 + n)).await
            {
                for delivery in got.unwrap() {
                    // Every ninth is handed back the first time.
                    if delivery.stored.seq % 9 == 0 && delivery.delivered == 1 {
                        backend
                            .verdict(&delivery.token, Verdict::Nak(Duration::ZERO))
                            .await
                            .unwrap();
                        continue;
                    }
                    backend
                        .verdict(&delivery.token, Verdict::Ack)
                        .await
                        .unwrap();
                    mine.push(delivery.stored.seq);
                }
            }
            puller.stop().await;
            mine
        }));
    }
    for n in 0..JOBS {
        append(&backend, WORK, &format!("{n}")).await;
    }
    let mut all = Vec::new();
    for worker in workers {
        let mine = within(PATIENCE * 2, worker).await.unwrap();
        assert!(!mine.is_empty(), "one worker got nothing");
        all.extend(mine);
    }
    all.sort_unstable();
    assert_eq!(all, (1..=JOBS as u64).collect::<Vec<_>>(), "each job once");
}

pub async fn a_late_queue_does_not_replay<F: Fixture>() {
    let (_fixture, backend) = prepared::<F>().await;
    for n in 0..50 {
        append(&backend, WORK, &format!("history {n}")).await;
    }
    let late = QueueSpec {
        from_start: false,
        ..queue("late", WORK)
    };
    let mut late = pulling(&backend, &late).await;
    let mut replay = pulling(&backend, &queue("replay", WORK)).await;
    append(&backend, WORK, "fresh").await;
    assert_eq!(text(&one(&mut late).await.stored), "fresh");
    assert_eq!(text(&one(&mut replay).await.stored), "history 0");
}

pub async fn a_queue_keeps_its_position<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let mut puller = pulling(&backend, &spec()).await;
    for n in 0..4 {
        append(&backend, WORK, &format!("{n}")).await;
    }
    for _ in 0..2 {
        let got = one(&mut puller).await;
        backend.verdict(&got.token, Verdict::Ack).await.unwrap();
    }
    puller.stop().await;
    // Every worker of that capability makes sure of the queue when it starts, on any node.
    let other = fixture.connect().await;
    for from_start in [true, false] {
        let same = QueueSpec {
            from_start,
            ..spec()
        };
        other.ensure_queue(&same).await.unwrap();
    }
    let (a, b) = (spec(), spec());
    let (a, b) = tokio::join!(backend.ensure_queue(&a), other.ensure_queue(&b));
    a.and(b).unwrap();
    let mut again = puller_of(&other).await;
    assert_eq!(text(&one(&mut again).await.stored), "2");
    // Another filter under the same name is a mistake that is told.
    let wrong = queue(&spec().name, "vlinder.v1.default.req.kv.>");
    let error = other.ensure_queue(&wrong).await.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
}

pub async fn a_missing_queue_says_so<F: Fixture>() {
    let (_fixture, backend) = prepared::<F>().await;
    let missing = |error: Error| assert!(matches!(error, Error::Missing { .. }), "{error}");
    missing(backend.puller(&log(), "nobody").await.err().unwrap());
    backend.delete_queue(&log(), "nobody").await.unwrap();
    // Deleted under a puller that waits: it says so once, and goes on when the queue is back.
    let mut puller = pulling(&backend, &spec()).await;
    silence(Duration::from_millis(100), puller.next(1)).await;
    backend.delete_queue(&log(), &spec().name).await.unwrap();
    missing(soon(puller.next(1)).await.unwrap_err());
    backend.ensure_queue(&spec()).await.unwrap();
    append(&backend, WORK, "job").await;
    assert_eq!(text(&one(&mut puller).await.stored), "job");
}

pub async fn no_more_than_asked_for<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let mut puller = pulling(&backend, &spec()).await;
    for n in 0..20 {
        append(&backend, WORK, &format!("{n}")).await;
    }
    let mut got = Vec::new();
    for max in [1, 3, 2, 5] {
        let batch = soon(puller.next(max)).await.unwrap();
        assert!((1..=max).contains(&batch.len()), "{} of {max}", batch.len());
        got.extend(batch);
    }
    let order: Vec<u64> = got.iter().map(|got| got.stored.seq).collect();
    assert_eq!(order, (1..=got.len() as u64).collect::<Vec<_>>());
    // What was not asked for is another worker's, at once.
    let other = fixture.connect().await;
    let mut second = puller_of(&other).await;
    let mut rest = HashSet::new();
    let started = Instant::now();
    while rest.len() + got.len() < 20 {
        rest.extend(
            soon(second.next(20))
                .await
                .unwrap()
                .iter()
                .map(|got| got.stored.seq),
        );
    }
    assert!(started.elapsed() < ACK_WAIT / 2, "it aged in a buffer");
}

pub async fn an_abandoned_call_loses_nothing<F: Fixture>() {
    let (_fixture, backend) = prepared::<F>().await;
    let mut puller = pulling(&backend, &spec()).await;
    let mut waiting: HashSet<u64> = HashSet::new();
    // A worker whose select loop drops the call again and again, at every moment of a delivery.
    for n in 0..300u64 {
        waiting.insert(append(&backend, WORK, &format!("{n}")).await.seq);
        let patience = Duration::from_micros(n * 7 % 1500);
        if let Ok(got) = tokio::time::timeout(patience, puller.next(2)).await {
            for delivery in got.unwrap() {
                waiting.remove(&delivery.stored.seq);
                backend
                    .verdict(&delivery.token, Verdict::Ack)
                    .await
                    .unwrap();
            }
        }
    }
    let started = Instant::now();
    while !waiting.is_empty() {
        for delivery in soon(puller.next(2)).await.unwrap() {
            waiting.remove(&delivery.stored.seq);
            backend
                .verdict(&delivery.token, Verdict::Ack)
                .await
                .unwrap();
        }
    }
    assert!(
        started.elapsed() < ACK_WAIT / 2,
        "some waited for the ack wait"
    );
    // Nobody waits any more: late work is somebody else's at once.
    silence(Duration::from_millis(100), puller.next(1)).await;
    let mut other = puller_of(&backend).await;
    let late = append(&backend, WORK, "late").await;
    let got = within(AT_ONCE, other.next(1)).await.unwrap();
    assert_eq!(got[0].stored.seq, late.seq);
}

pub async fn stopping_hands_back_at_once<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let mut puller = pulling(&backend, &spec()).await;
    // It has asked, and then stops: what comes for it must not wait for the ack wait.
    silence(Duration::from_millis(50), puller.next(4)).await;
    soon(puller.stop()).await;
    soon(puller.stop()).await;
    handed_on(&fixture.connect().await, &backend).await;
    assert!(matches!(soon(puller.next(1)).await, Err(Error::Closed)));
}

pub async fn dropping_hands_back_at_once<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let mut puller = pulling(&backend, &spec()).await;
    silence(Duration::from_millis(50), puller.next(4)).await;
    drop(puller);
    handed_on(&fixture.connect().await, &backend).await;
}

async fn handed_on(
    to: &std::sync::Arc<dyn vlinder_bus::backend::Backend>,
    backend: &std::sync::Arc<dyn vlinder_bus::backend::Backend>,
) {
    let mut other = puller_of(to).await;
    let mut missing = HashSet::new();
    for n in 0..8 {
        missing.insert(append(backend, WORK, &format!("{n}")).await.seq);
    }
    let started = Instant::now();
    while !missing.is_empty() {
        for delivery in within(AT_ONCE, other.next(8)).await.unwrap() {
            missing.remove(&delivery.stored.seq);
            to.verdict(&delivery.token, Verdict::Ack).await.unwrap();
        }
    }
    assert!(started.elapsed() < AT_ONCE, "{:?}", started.elapsed());
}

pub async fn queues_tell_how_full_they_are<F: Fixture>() {
    let (_fixture, backend) = prepared::<F>().await;
    let mut puller = pulling(&backend, &spec()).await;
    backend
        .ensure_queue(&queue("idle", "vlinder.v1.default.req.idle.>"))
        .await
        .unwrap();
    // A follower is no queue.
    let _follow = backend
        .follow(&log(), "vlinder.v1.default.>", 1)
        .await
        .unwrap();
    for n in 0..5 {
        append(&backend, WORK, &format!("{n}")).await;
    }
    let first = one(&mut puller).await;
    let second = one(&mut puller).await;
    let queues = eventually(
        "two held and three waiting",
        async || backend.queues(&log()).await.unwrap(),
        |queues| {
            queues
                .iter()
                .any(|queue| (queue.held, queue.waiting) == (2, 3))
        },
    )
    .await;
    let names: HashSet<_> = queues.iter().map(|queue| queue.name.clone()).collect();
    assert_eq!(names, HashSet::from(["idle".to_owned(), spec().name]));
    let busy = queues
        .iter()
        .find(|queue| queue.name == spec().name)
        .unwrap();
    assert_eq!(busy.filter, WORK);
    assert!(busy.oldest_ms.is_none_or(|age| age < 60_000));
    let idle = queues.iter().find(|queue| queue.name == "idle").unwrap();
    assert_eq!((idle.waiting, idle.held, idle.oldest_ms), (0, 0, None));
    for delivery in [first, second] {
        backend
            .verdict(&delivery.token, Verdict::Ack)
            .await
            .unwrap();
    }
    for _ in 0..3 {
        let got = one(&mut puller).await;
        backend.verdict(&got.token, Verdict::Ack).await.unwrap();
    }
    eventually(
        "empty",
        async || backend.queues(&log()).await.unwrap(),
        |queues| {
            queues
                .iter()
                .all(|queue| (queue.held, queue.waiting) == (0, 0))
        },
    )
    .await;
}

pub async fn hostile_tokens_are_refused<F: Fixture>() {
    let (_fixture, backend) = prepared::<F>().await;
    let mut puller = pulling(&backend, &spec()).await;
    append(&backend, WORK, "job").await;
    let held = one(&mut puller).await;
    let twisted = format!("{}.>", held.token);
    let blank = format!("{} x", held.token);
    for token in [
        "",
        "x",
        ".",
        WORK,
        "$JS.API.STREAM.DELETE.VLINDER_LOG_default",
        "$JS.ACK.>",
        "$JS.ACK.a.b.c.d.e.f.g",
        &twisted,
        &blank,
        &"$JS.ACK.".repeat(1000),
    ] {
        for verdict in [
            Verdict::Ack,
            Verdict::Nak(Duration::ZERO),
            Verdict::Progress,
        ] {
            let outcome = within(AT_ONCE, backend.verdict(token, verdict)).await;
            assert!(outcome.is_err(), "{token:.60} was taken for {verdict:?}");
        }
    }
    backend.verdict(&held.token, Verdict::Ack).await.unwrap();
}
