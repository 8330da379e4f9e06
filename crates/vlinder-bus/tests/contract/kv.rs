//! Kv: compare-and-set, expiry, watching.

use crate::fixture::Fixture;
use crate::support::*;
use bytes::Bytes;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use vlinder_bus::streams::{BUCKET_LEASES, BUCKET_NODES, LEASE_TTL};
use vlinder_bus::{Error, KvEvent};

const NODES: &str = BUCKET_NODES;
const LEASES: &str = BUCKET_LEASES;

fn conflict<T: std::fmt::Debug>(outcome: Result<T, Error>) {
    assert!(
        matches!(outcome, Err(Error::KvConflict { .. })),
        "{outcome:?}"
    );
}

pub async fn entries_are_written_under_expectations<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let other = fixture.connect().await;
    let put = async |value: &str, expect| {
        let value = Bytes::from(value.to_owned());
        backend.kv_put(NODES, "node=2Ea.x_1", value, expect).await
    };
    let get = async || other.kv_get(NODES, "node=2Ea.x_1").await.unwrap();
    assert!(get().await.is_none());
    conflict(put("never", Some(7)).await);
    let first = put("one", Some(0)).await.unwrap();
    conflict(put("two", Some(0)).await);
    let entry = get().await.unwrap();
    assert_eq!(
        (entry.key.as_str(), entry.revision),
        ("node=2Ea.x_1", first)
    );
    assert_eq!(entry.value, "one");
    assert!(entry.time_ms > 1_600_000_000_000);
    let second = put("two", Some(first)).await.unwrap();
    assert!(second > first);
    conflict(put("three", Some(first)).await);
    let third = put("three", None).await.unwrap();
    assert!(third > second);
    assert_eq!(get().await.unwrap().value, "three");
    // Equal values are two writes.
    let fourth = put("three", None).await.unwrap();
    assert!(fourth > third);

    conflict(backend.kv_delete(NODES, "node=2Ea.x_1", Some(third)).await);
    conflict(backend.kv_delete(NODES, "node=2Ea.x_1", Some(0)).await);
    backend
        .kv_delete(NODES, "node=2Ea.x_1", Some(fourth))
        .await
        .unwrap();
    assert!(get().await.is_none());
    conflict(put("stale", Some(fourth)).await);
    backend
        .kv_delete(NODES, "node=2Ea.x_1", None)
        .await
        .unwrap();
    backend.kv_delete(NODES, "never-was", None).await.unwrap();
    let reborn = put("again", Some(0)).await.unwrap();
    assert!(reborn > fourth);
    backend
        .kv_delete(NODES, "node=2Ea.x_1", None)
        .await
        .unwrap();
    assert!(get().await.is_none());
    // An empty value is a value.
    put("", Some(0)).await.unwrap();
    assert_eq!(get().await.unwrap().value, "");
}

pub async fn one_of_several_creators_wins<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let other = fixture.connect().await;
    for round in 0..100 {
        let key = format!("lease{}", round % 5);
        let put = async |backend: &std::sync::Arc<dyn vlinder_bus::backend::Backend>, who: &str| {
            backend
                .kv_put(LEASES, &key, Bytes::from(who.to_owned()), Some(0))
                .await
        };
        let (a, b) = tokio::join!(put(&backend, "a"), put(&other, "b"));
        let held = other.kv_get(LEASES, &key).await.unwrap().unwrap();
        let (winner, revision) = match (a, b) {
            (Ok(revision), Err(Error::KvConflict { .. })) => ("a", revision),
            (Err(Error::KvConflict { .. }), Ok(revision)) => ("b", revision),
            outcome => panic!("round {round}: {outcome:?}"),
        };
        assert_eq!(
            (held.value.as_ref(), held.revision),
            (winner.as_bytes(), revision)
        );
        backend
            .kv_delete(LEASES, &key, Some(revision))
            .await
            .unwrap();
    }
}

pub async fn entries_vanish_and_watchers_hear_of_it<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let other = fixture.connect().await;
    let mut watch = other.kv_watch(LEASES).await.unwrap();
    assert_eq!(next(&mut watch).await.unwrap(), KvEvent::Current);
    let written = Instant::now();
    let revision = backend
        .kv_put(LEASES, "sweeper", "me".into(), Some(0))
        .await
        .unwrap();
    assert!(
        matches!(next(&mut watch).await.unwrap(), KvEvent::Put(entry) if entry.revision == revision)
    );
    let gone = KvEvent::Gone {
        key: "sweeper".to_owned(),
    };
    assert_eq!(next(&mut watch).await.unwrap(), gone);
    let lived = written.elapsed();
    assert!(lived >= LEASE_TTL - Duration::from_millis(300), "{lived:?}");
    assert!(lived <= LEASE_TTL + Duration::from_secs(3), "{lived:?}");
    assert!(other.kv_get(LEASES, "sweeper").await.unwrap().is_none());
    // Free to be taken, by one who expects it to be free.
    let next_one = other
        .kv_put(LEASES, "sweeper", "you".into(), Some(0))
        .await
        .unwrap();
    assert!(next_one > revision);
    conflict(
        backend
            .kv_put(LEASES, "sweeper", "me".into(), Some(revision))
            .await,
    );
}

pub async fn a_renewed_entry_stays<F: Fixture>() {
    let (_fixture, backend) = prepared::<F>().await;
    let mut revision = backend
        .kv_put(LEASES, "held", "me".into(), Some(0))
        .await
        .unwrap();
    let mut watch = backend.kv_watch(LEASES).await.unwrap();
    let mut tick = tokio::time::interval(LEASE_TTL / 3);
    for _ in 0..5 {
        tick.tick().await;
        revision = backend
            .kv_put(LEASES, "held", "me".into(), Some(revision))
            .await
            .unwrap();
    }
    assert_eq!(
        backend
            .kv_get(LEASES, "held")
            .await
            .unwrap()
            .unwrap()
            .revision,
        revision
    );
    loop {
        match next(&mut watch).await.unwrap() {
            KvEvent::Put(entry) if entry.revision == revision => break,
            KvEvent::Gone { key } => panic!("{key} is gone"),
            _ => {}
        }
    }
}

pub async fn a_watch_tells_everything_then_changes<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let other = fixture.connect().await;
    let expected: BTreeSet<String> = (0..300).map(|n| format!("node.{n}")).collect();
    for key in &expected {
        backend
            .kv_put(NODES, key, Bytes::from(key.clone()), None)
            .await
            .unwrap();
        backend
            .kv_put(NODES, key, Bytes::from(format!("{key}!")), None)
            .await
            .unwrap();
    }
    backend
        .kv_put(NODES, "gone", "x".into(), None)
        .await
        .unwrap();
    backend.kv_delete(NODES, "gone", None).await.unwrap();
    let mut watch = other.kv_watch(NODES).await.unwrap();
    let mut told = BTreeSet::new();
    loop {
        match next(&mut watch).await.unwrap() {
            KvEvent::Put(entry) => {
                assert_eq!(entry.value, format!("{}!", entry.key));
                assert!(told.insert(entry.key));
            }
            KvEvent::Gone { key } => assert_eq!(key, "gone"),
            KvEvent::Current => break,
        }
    }
    assert_eq!(told, expected);
    for n in 0..50 {
        let value = Bytes::from(format!("change {n}"));
        let revision = backend
            .kv_put(NODES, "node.7", value.clone(), None)
            .await
            .unwrap();
        match next(&mut watch).await.unwrap() {
            KvEvent::Put(entry) => assert_eq!((entry.value, entry.revision), (value, revision)),
            other => panic!("{other:?}"),
        }
    }
    backend.kv_delete(NODES, "node.7", None).await.unwrap();
    let gone = KvEvent::Gone {
        key: "node.7".to_owned(),
    };
    assert_eq!(next(&mut watch).await.unwrap(), gone);
}

pub async fn hostile_keys_are_refused<F: Fixture>() {
    let (_fixture, backend) = prepared::<F>().await;
    let long = "x".repeat(5000);
    for key in [
        "", ".", "a..b", ".a", "a.", "a b", "a*", ">", "a\r\nb", "ü", "$KV.x", &long,
    ] {
        let put = soon(backend.kv_put(NODES, key, "x".into(), None)).await;
        assert!(put.is_err(), "{key:.30}");
        assert!(soon(backend.kv_get(NODES, key)).await.is_err(), "{key:.30}");
        assert!(
            soon(backend.kv_delete(NODES, key, None)).await.is_err(),
            "{key:.30}"
        );
    }
    assert!(
        soon(backend.kv_put("no_such_bucket", "a", "x".into(), None))
            .await
            .is_err()
    );
    let mut watch = backend.kv_watch(NODES).await.unwrap();
    assert_eq!(next(&mut watch).await.unwrap(), KvEvent::Current);
}
