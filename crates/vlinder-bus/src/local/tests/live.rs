//! What is seen when: before and after the commit, live and followed, kv watches, signals.

use super::support::*;
use crate::backend::{Backend, Verdict};
use crate::local::LocalBus;
use crate::{BucketSpec, Error, KvEvent};
use bytes::Bytes;
use futures::StreamExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Keeps the writer from committing, as a person with the `sqlite3` command could.
fn hold_the_file(dir: &Path) -> rusqlite::Connection {
    let conn = rusqlite::Connection::open(dir.join("bus.db")).unwrap();
    conn.execute_batch("BEGIN IMMEDIATE").unwrap();
    conn
}

#[tokio::test]
async fn work_is_delivered_before_it_is_committed_but_followed_only_after() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(dir.path()).await;
    let mut seen = bus.seen("vlinder.v1.default.req.>").await.unwrap();
    let mut follow = bus.follow(&log(), ">", 1).await.unwrap();
    let mut worker = puller(&bus).await;
    let holder = hold_the_file(dir.path());
    let (stream, message) = (log(), raw(REQ, "a", "1"));
    let mut append = bus.append(&stream, &message);
    assert!(waits(&mut append).await);
    let delivery = pull(&mut worker).await;
    assert_eq!(soon("seen", seen.next()).await.unwrap().seq, 1);
    assert_eq!(bus.last(&log(), REQ).await.unwrap().unwrap().seq, 1);
    bus.verdict(&delivery.token, Verdict::Ack).await.unwrap();
    let mut settled = bus.settled(&stream, 1);
    let mut followed = follow.next();
    assert!(waits(&mut settled).await);
    assert!(waits(&mut followed).await);
    assert!(waits(&mut append).await);
    holder.execute_batch("COMMIT").unwrap();
    let released = Instant::now();
    assert!(!soon("the commit", append).await.unwrap().duplicate);
    soon("the commit", settled).await.unwrap();
    assert_eq!(soon("the commit", followed).await.unwrap().unwrap().seq, 1);
    assert!(released.elapsed() < Duration::from_secs(3));
    assert!(matches!(
        bus.settled(&stream, 2).await,
        Err(Error::Missing { .. })
    ));
}

#[tokio::test]
async fn an_append_that_cannot_commit_is_unknown_and_its_repeat_finds_it() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(dir.path()).await;
    let holder = hold_the_file(dir.path());
    let message = raw(REQ, "a", "1");
    let unknown = bus.append(&log(), &message).await;
    assert!(
        matches!(&unknown, Err(error) if error.is_retryable()),
        "{unknown:?}"
    );
    assert!(matches!(bus.ping().await, Err(Error::Timeout { .. })));
    holder.execute_batch("COMMIT").unwrap();
    let repeated = soon("the commit", bus.append(&log(), &message))
        .await
        .unwrap();
    assert_eq!((repeated.seq, repeated.duplicate), (1, true));
}

#[tokio::test]
async fn a_follower_gets_everything_once_whatever_is_cached() {
    let dir = tempfile::tempdir().unwrap();
    let mut small = options(dir.path());
    small.cache_bytes = 2000;
    let bus = open_with(small).await;
    for n in 0..300 {
        let subject = format!("vlinder.v1.default.res.t{}.call", n % 100);
        bus.append(&log(), &raw(&subject, n, n.to_string()))
            .await
            .unwrap();
    }
    let filter = "vlinder.v1.default.res.*.call";
    let mut follow = bus.follow(&log(), filter, 51).await.unwrap();
    let mut one = bus
        .follow(&log(), "vlinder.v1.default.res.t7.*", 1)
        .await
        .unwrap();
    for seq in 51..=300 {
        let message = soon("a message", follow.next()).await.unwrap().unwrap();
        assert_eq!(
            (message.seq, &message.body[..]),
            (seq, (seq - 1).to_string().as_bytes())
        );
        assert_eq!(message.previous_on_subject, seq.saturating_sub(100));
    }
    let mut next = follow.next();
    assert!(waits(&mut next).await);
    request(&bus, 999).await;
    let subject = "vlinder.v1.default.res.t7.call";
    bus.append(&log(), &raw(subject, "new", "")).await.unwrap();
    assert_eq!(soon("a message", next).await.unwrap().unwrap().seq, 302);
    for seq in [8, 108, 208, 302] {
        assert_eq!(
            soon("a message", one.next()).await.unwrap().unwrap().seq,
            seq
        );
    }
    let range = bus.range(&log(), filter, 299, 10).await.unwrap();
    assert_eq!(
        range.iter().map(|m| m.seq).collect::<Vec<_>>(),
        [299, 300, 302]
    );
    assert!(bus.range(&log(), filter, 303, 10).await.unwrap().is_empty());
    assert_eq!(bus.get(&log(), 42).await.unwrap().unwrap().body, "41");
    assert!(bus.get(&log(), 0).await.unwrap().is_none());
    assert!(bus.get(&log(), u64::MAX).await.unwrap().is_none());
}

#[tokio::test]
async fn a_slow_subscriber_sees_the_gap_and_a_dropped_one_costs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(dir.path()).await;
    let mut slow = bus.seen("vlinder.v1.default.res.a.call").await.unwrap();
    let stream = log();
    let count = 9000;
    let messages: Vec<_> = (0..count)
        .map(|n| raw("vlinder.v1.default.res.a.call", n, ""))
        .collect();
    let appends = messages.iter().map(|message| bus.append(&stream, message));
    for done in futures::future::join_all(appends).await {
        done.unwrap();
    }
    let first = slow.next().await.unwrap();
    assert_eq!(first.seq, count - 8192 + 1);
    assert_eq!(first.previous_on_subject, first.seq - 1);
    drop(slow);
    let begun = Instant::now();
    for n in 0..5000 {
        drop(
            bus.seen(&format!("vlinder.v1.default.res.t{n}.*"))
                .await
                .unwrap(),
        );
    }
    assert!(
        begun.elapsed() < Duration::from_secs(2),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test]
async fn signals_reach_who_listens_and_no_one_else() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(dir.path()).await;
    let mut all = bus.signals("sig.v1.default.>").await.unwrap();
    let mut other = bus.signals("sig.v1.default.chunk.b").await.unwrap();
    let body = Bytes::from_static(b"hi");
    for _ in 0..10_000 {
        bus.signal("sig.v1.default.chunk.a", body.clone())
            .await
            .unwrap();
    }
    assert_eq!(bus.signals_dropped(), 10_000 - 8192);
    let signal = soon("a signal", all.next()).await.unwrap();
    assert_eq!(
        (&signal.subject[..], signal.body),
        ("sig.v1.default.chunk.a", body)
    );
    let mut none = other.next();
    assert!(waits(&mut none).await);
    bus.close().await;
    assert!(soon("the end", none).await.is_none());
}

async fn put(bus: &LocalBus, key: &str, expect: Option<u64>) -> Result<u64, Error> {
    bus.kv_put(
        "things",
        key,
        Bytes::copy_from_slice(key.as_bytes()),
        expect,
    )
    .await
}

#[tokio::test]
async fn kv_entries_are_compared_watched_and_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(dir.path()).await;
    let first = put(&bus, "a", Some(0)).await.unwrap();
    assert!(matches!(
        put(&bus, "a", Some(0)).await,
        Err(Error::KvConflict { .. })
    ));
    let second = put(&bus, "a", Some(first)).await.unwrap();
    assert!(second > first);
    let stale = bus.kv_delete("things", "a", Some(first)).await;
    assert!(matches!(stale, Err(Error::KvConflict { .. })));
    let mut watch = bus.kv_watch("things").await.unwrap();
    let entry = bus.kv_get("things", "a").await.unwrap().unwrap();
    assert_eq!(watch.next().await.unwrap().unwrap(), KvEvent::Put(entry));
    assert_eq!(watch.next().await.unwrap().unwrap(), KvEvent::Current);
    bus.kv_delete("things", "a", Some(second)).await.unwrap();
    bus.kv_delete("things", "a", None).await.unwrap();
    assert_eq!(
        watch.next().await.unwrap().unwrap(),
        KvEvent::Gone { key: "a".into() }
    );
    let third = put(&bus, "a", Some(0)).await.unwrap();
    bus.close().await;
    let mut rest: Vec<_> = watch.collect().await;
    assert!(matches!(rest.pop(), Some(Err(Error::Closed))));
    let bus = open(dir.path()).await;
    assert_eq!(
        bus.kv_get("things", "a").await.unwrap().unwrap().revision,
        third
    );
    assert!(put(&bus, "a", Some(third)).await.unwrap() > third);
}

#[tokio::test]
async fn entries_with_a_time_to_live_go_in_time_also_across_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let ttl = Duration::from_millis(400);
    let spec = BucketSpec {
        name: "leases",
        ttl: Some(ttl),
    };
    let bus = open(dir.path()).await;
    bus.ensure_bucket(&spec).await.unwrap();
    let mut watch = bus.kv_watch("leases").await.unwrap();
    assert_eq!(watch.next().await.unwrap().unwrap(), KvEvent::Current);
    let begun = Instant::now();
    let key = |key: &str| KvEvent::Gone { key: key.into() };
    bus.kv_put("leases", "short", Bytes::new(), None)
        .await
        .unwrap();
    let revision = bus
        .kv_put("leases", "kept", Bytes::new(), None)
        .await
        .unwrap();
    tokio::time::sleep(ttl / 2).await;
    bus.kv_put("leases", "kept", Bytes::new(), Some(revision))
        .await
        .unwrap();
    let mut gone = vec![];
    while gone.is_empty() {
        match soon("the end of a lease", watch.next())
            .await
            .unwrap()
            .unwrap()
        {
            KvEvent::Put(_) | KvEvent::Current => {}
            event => gone.push(event),
        }
    }
    assert_eq!(gone, [key("short")]);
    assert!(begun.elapsed() >= ttl);
    bus.close().await;
    let bus = open(dir.path()).await;
    let mut watch = bus.kv_watch("leases").await.unwrap();
    while soon("the end of a lease", watch.next())
        .await
        .unwrap()
        .unwrap()
        != key("kept")
    {}
    assert!(begun.elapsed() >= ttl + ttl / 2);
    assert!(bus.kv_get("leases", "kept").await.unwrap().is_none());
    bus.kv_put("leases", "kept", Bytes::new(), Some(0))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_slow_watcher_is_told_everything_again() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(dir.path()).await;
    let mut watch = bus.kv_watch("things").await.unwrap();
    assert_eq!(watch.next().await.unwrap().unwrap(), KvEvent::Current);
    let bus: &LocalBus = &bus;
    let puts = (0..9000).map(|n| async move { put(bus, &format!("k{}", n % 10), None).await });
    for done in futures::future::join_all(puts).await {
        done.unwrap();
    }
    let mut told = vec![];
    loop {
        match watch.next().await.unwrap().unwrap() {
            KvEvent::Current => break,
            event => told.push(event),
        }
    }
    assert_eq!(told.len(), 10);
    let mut next = watch.next();
    assert!(waits(&mut next).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_racing_appends_exactly_one_wins_each_place() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(dir.path()).await;
    let mut tasks = tokio::task::JoinSet::new();
    for who in 0..8 {
        let bus: Arc<LocalBus> = bus.clone();
        tasks.spawn(async move {
            let mut won = 0;
            for n in 0..125 {
                let subject = "vlinder.v1.default.invoke.a.s.main";
                let last = bus.last(&log(), subject).await.unwrap();
                let mut message = raw(subject, format!("{who}.{n}"), "");
                message.expect_last = Some(last.map_or(0, |message| message.seq));
                match bus.append(&log(), &message).await {
                    Ok(_) => won += 1,
                    Err(Error::Conflict { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            won
        });
    }
    let won: u64 = tasks.join_all().await.into_iter().sum();
    assert_eq!(bus.stream_info(&log()).await.unwrap().messages, won);
    let all = bus.range(&log(), ">", 1, 2000).await.unwrap();
    let chain = all
        .windows(2)
        .all(|pair| pair[1].previous_on_subject == pair[0].seq);
    assert!(chain && won >= 125);
}
