//! What stores the log is killed with -9 and started again on the same store, under load.

use crate::fixture::Fixture;
use crate::support::*;
use bytes::Bytes;
use futures::StreamExt;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vlinder_bus::backend::{Backend, Verdict};
use vlinder_bus::streams::BUCKET_NODES;
use vlinder_bus::{Bus, KvEvent};

const WORK: &str = "vlinder.v1.default.req.kv.local._";
const ALL: &str = "vlinder.v1.default.>";

/// Appends in a row until told to stop; what was confirmed.
async fn load(bus: Bus, stop: Arc<AtomicBool>) -> BTreeMap<u64, u64> {
    let mut confirmed = BTreeMap::new();
    let mut n = 0;
    while !stop.load(Ordering::Relaxed) {
        let message = crate::dead::message(&crate::dead::call_subject("turn"), &n.to_string());
        let done = bus
            .append(message)
            .await
            .expect("appends go through an outage");
        let earlier = confirmed.insert(done.seq, n);
        assert_eq!(earlier, None, "two messages at {}", done.seq);
        n += 1;
    }
    confirmed
}

/// Works until told to stop; what was acknowledged.
async fn work(backend: Arc<dyn Backend>, stop: Arc<AtomicBool>) -> BTreeSet<u64> {
    let mut puller = puller(&backend, "outage").await;
    let mut done = BTreeSet::new();
    loop {
        match tokio::time::timeout(Duration::from_millis(500), puller.next(8)).await {
            Ok(got) => {
                let got = got.expect("a puller goes on after an outage");
                let acks = got.into_iter().map(async |delivery| {
                    let ack = backend.verdict(&delivery.token, Verdict::Ack).await;
                    ack.ok().map(|()| delivery.stored.seq)
                });
                done.extend(futures::future::join_all(acks).await.into_iter().flatten());
            }
            Err(_) if stop.load(Ordering::Relaxed) => return done,
            Err(_) => {}
        }
    }
}

pub async fn everything_resumes_after_a_kill<F: Fixture>() {
    let (mut fixture, backend) = prepared::<F>().await;
    if !F::SURVIVES_CRASH {
        // Everything is in the one process that was killed: a new one finds what was confirmed.
        return a_new_process_finds_everything(fixture, backend).await;
    }
    backend.ensure_queue(&queue("outage", ALL)).await.unwrap();
    let mut follow = backend.follow(&log(), ALL, 1).await.unwrap();
    let mut watch = backend.kv_watch(BUCKET_NODES).await.unwrap();
    assert_eq!(next(&mut watch).await.unwrap(), KvEvent::Current);
    backend
        .kv_put(BUCKET_NODES, "node", "up".into(), None)
        .await
        .unwrap();
    assert!(matches!(next(&mut watch).await.unwrap(), KvEvent::Put(_)));
    let mut signals = backend.signals("sig.v1.default.>").await.unwrap();

    let stop = Arc::new(AtomicBool::new(false));
    let loader = tokio::spawn(load(Bus::new(backend.clone()), stop.clone()));
    let working = Arc::new(AtomicBool::new(false));
    let worker = tokio::spawn(work(fixture.connect().await, working.clone()));
    for _ in 0..3 {
        // So much is stored between two kills, however fast the machine is.
        let before = retried(async || backend.stream_info(&log()).await)
            .await
            .last_seq;
        eventually(
            "a hundred more appended",
            async || {
                backend
                    .stream_info(&log())
                    .await
                    .map(|info| info.last_seq)
                    .unwrap_or(0)
            },
            |last| *last > before + 100,
        )
        .await;
        fixture.crash().await;
    }
    retried(async || backend.ping().await).await;
    stop.store(true, Ordering::Relaxed);
    let confirmed = within(PATIENCE, loader).await.unwrap();

    // Every confirmed message is there once, under its sequence.
    let all = retried(async || backend.range(&log(), ALL, 1, usize::MAX).await).await;
    let stored: BTreeMap<u64, u64> = all
        .iter()
        .map(|stored| (stored.seq, text(stored).parse().unwrap()))
        .collect();
    assert_eq!(stored, confirmed, "lost, doubled or moved");
    // The follower had no gap and no repeat, and goes on.
    let followed = take_followed(&mut follow, all.len()).await;
    let seqs: Vec<u64> = followed.iter().map(|stored| stored.seq).collect();
    assert_eq!(
        seqs,
        all.iter().map(|stored| stored.seq).collect::<Vec<_>>()
    );
    // All work is done.
    working.store(true, Ordering::Relaxed);
    let done = within(PATIENCE, worker).await.unwrap();
    assert_eq!(done, confirmed.keys().copied().collect());
    // The watch told everything again and goes on with changes.
    backend
        .kv_put(BUCKET_NODES, "node", "still up".into(), None)
        .await
        .unwrap();
    let (mut retold, mut changed) = (!F::CRASH_CUTS_CONNECTIONS, false);
    while !(retold && changed) {
        match next(&mut watch).await.unwrap() {
            KvEvent::Current => retold = true,
            KvEvent::Put(entry) if entry.value == "still up" => changed = true,
            KvEvent::Put(entry) => assert_eq!(entry.value, "up"),
            KvEvent::Gone { key } => panic!("{key} is gone"),
        }
    }
    // Subscriptions are in force again.
    let mut seen = backend.seen(ALL).await.unwrap();
    let done = retried(async || backend.append(&log(), &raw(WORK, "after")).await).await;
    assert_eq!(next(&mut seen).await.seq, done.seq);
    backend
        .signal("sig.v1.default.x", "after".into())
        .await
        .unwrap();
    assert_eq!(next(&mut signals).await.body, "after");
    assert_eq!(next(&mut follow).await.unwrap().seq, done.seq);
}

/// Whoever waits for something live looks into the log when it is told to, and misses nothing.
pub async fn who_waits_is_told_when_something_may_have_been_missed<F: Fixture>() {
    let (mut fixture, backend) = prepared::<F>().await;
    let bus = Bus::new(backend.clone());
    let mut gaps = bus.gaps();
    let mut seen = backend.seen(ALL).await.unwrap();
    silence(Duration::from_millis(50), gaps.next()).await;
    if !F::SURVIVES_CRASH || !F::CRASH_CUTS_CONNECTIONS {
        return;
    }
    for n in 0..3 {
        fixture.crash().await;
        let other = fixture.connect().await;
        let missed = retried(async || {
            other
                .append(&log(), &raw(WORK, &format!("missed {n}")))
                .await
        });
        let missed = missed.await.seq;
        within(PATIENCE, gaps.next()).await;
        // What was stored before is found now, and what comes from now on is heard.
        let last = retried(async || backend.last(&log(), WORK).await).await;
        assert_eq!(last.unwrap().seq, missed);
        let done = append(&other, WORK, &format!("heard {n}")).await;
        let mut heard = next(&mut seen).await.seq;
        if heard == missed {
            // Its connection was back before that was stored.
            heard = next(&mut seen).await.seq;
        }
        assert_eq!(heard, done.seq);
        silence(Duration::from_millis(50), gaps.next()).await;
    }
}

async fn a_new_process_finds_everything<F: Fixture>(mut fixture: F, backend: Arc<dyn Backend>) {
    backend.ensure_queue(&queue("outage", ALL)).await.unwrap();
    let mut puller = puller(&backend, "outage").await;
    for n in 0..200 {
        append(&backend, WORK, &format!("{n}")).await;
    }
    for _ in 0..100 {
        let got = one(&mut puller).await;
        backend.verdict(&got.token, Verdict::Ack).await.unwrap();
    }
    backend
        .kv_put(BUCKET_NODES, "node", "up".into(), None)
        .await
        .unwrap();
    let blob = Bytes::from(vec![9; 1_000_000]);
    let name = vlinder_core::ContentHash::of(&blob).to_string();
    backend.blob_put(&name, blob.clone()).await.unwrap();
    drop((puller, backend));
    fixture.crash().await;
    let backend = fixture.connect().await;
    prepare(&backend).await;
    assert_eq!(
        backend.range(&log(), ALL, 1, 1000).await.unwrap().len(),
        200
    );
    assert!(append(&backend, WORK, "199").await.duplicate);
    let mut puller = self::puller(&backend, "outage").await;
    for n in 100..200 {
        assert_eq!(text(&one(&mut puller).await.stored), n.to_string());
    }
    let entry = backend.kv_get(BUCKET_NODES, "node").await.unwrap().unwrap();
    assert_eq!(entry.value, "up");
    assert!(backend.blob_get(&name, 1 << 26).await.unwrap() == blob);
}

pub async fn a_killed_holders_work_can_be_acknowledged_after_the_restart<F: Fixture>() {
    let (mut fixture, backend) = prepared::<F>().await;
    let spec = queue("outage", WORK);
    let mut puller = pulling(&backend, &spec).await;
    for n in 0..10 {
        append(&backend, WORK, &format!("{n}")).await;
    }
    let mut held = Vec::new();
    while held.len() < 10 {
        held.extend(soon(puller.next(10)).await.unwrap());
    }
    drop(puller);
    let backend = if F::SURVIVES_CRASH {
        fixture.crash().await;
        backend
    } else {
        drop(backend);
        fixture.crash().await;
        let backend = fixture.connect().await;
        prepare(&backend).await;
        backend
    };
    // Half of it was done before anybody noticed; the other half is given to others. The killed one
    // may have forgotten a delivery; then it refuses the acknowledgement, and the work comes back.
    let mut missing = BTreeSet::new();
    for (index, delivery) in held.iter().enumerate() {
        let verdict = match index % 2 {
            0 => Verdict::Ack,
            _ => Verdict::Nak(Duration::ZERO),
        };
        let outcome = backend.verdict(&delivery.token, verdict).await;
        if outcome.is_err() || index % 2 == 1 {
            missing.insert(delivery.stored.seq);
        }
        if let Err(error) = outcome {
            assert!(!error.is_retryable(), "{error}");
        }
    }
    let mut puller = self::puller(&backend, &spec.name).await;
    while !missing.is_empty() {
        for delivery in soon(puller.next(10)).await.unwrap() {
            assert!(missing.remove(&delivery.stored.seq), "done work came back");
            let ack = backend.verdict(&delivery.token, Verdict::Ack).await;
            ack.unwrap();
        }
    }
    let mut follow = backend.follow(&log(), WORK, 1).await.unwrap();
    assert_eq!(take_followed(&mut follow, 10).await.len(), 10);
    silence(Duration::from_millis(50), follow.next()).await;
}
