//! The file: full disks, full logs, damage, locks, hostile input, the speed of a reopen, idleness.

use super::support::*;
use crate::backend::{Backend, Verdict};
use crate::local::{LocalBus, LocalOptions, MESSAGE_BYTES_MAX};
use crate::streams::StreamName;
use crate::{BucketSpec, Error};
use bytes::Bytes;
use futures::StreamExt;
use sha2::{Digest, Sha256};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use vlinder_core::{ContentHash, Namespace};

/// A small file system of its own, gone with the value.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(size: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(dir.path())
            .status();
        assert!(
            mounted.is_ok_and(|status| status.success()),
            "this test mounts a small tmpfs: run it as root (scripts/test does)"
        );
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(self.path()).status();
        assert!(unmounted.is_ok_and(|status| status.success()));
    }
}

fn call(n: u64, body: &[u8]) -> crate::backend::Raw {
    let subject = format!("vlinder.v1.default.res.t{n}.call");
    raw(&subject, n, body.to_vec())
}

/// Appends until one is refused; returns the number of the refused one and the refusal.
async fn fill(bus: &LocalBus, from: u64) -> (u64, Error) {
    let body = vec![7; 60_000];
    for n in from.. {
        if let Err(error) = bus.append(&log(), &call(n, &body)).await {
            return (n, error);
        }
    }
    unreachable!("the disk has an end")
}

#[tokio::test]
async fn a_disk_that_gets_low_refuses_and_takes_again_when_there_is_space() {
    let disk = SmallDisk::new("64m");
    let ballast = disk.path().join("ballast");
    std::fs::write(&ballast, vec![0; 16 << 20]).unwrap();
    let bus = open(disk.path()).await;
    let (stored, error) = fill(&bus, 0).await;
    assert!(
        matches!(error, Error::DiskFull { .. }) && error.is_full(),
        "{error}"
    );
    // What is small goes on: acknowledgements, leases.
    request_is_refused(&bus).await;
    let key = bus
        .kv_put("things", "a", Bytes::from_static(b"1"), None)
        .await;
    key.unwrap();
    std::fs::remove_file(&ballast).unwrap();
    let (more, error) = fill(&bus, stored).await;
    assert!(matches!(error, Error::DiskFull { .. }), "{error}");
    assert!(more > stored);
    let info = bus.stream_info(&log()).await.unwrap();
    assert_eq!(info.messages, more);
}

async fn request_is_refused(bus: &LocalBus) {
    let refused = bus.append(&log(), &raw(REQ, "r", "")).await;
    assert!(
        matches!(refused, Err(Error::DiskFull { .. })),
        "{refused:?}"
    );
}

#[tokio::test]
async fn a_disk_that_is_full_loses_nothing_and_goes_on_when_there_is_space() {
    let disk = SmallDisk::new("24m");
    let ballast = disk.path().join("ballast");
    std::fs::write(&ballast, vec![0; 12 << 20]).unwrap();
    let mut careless = options(disk.path());
    careless.disk_reserve = 0;
    let bus = open_with(careless).await;
    // The one whose commit fails is unknown, later ones are refused.
    let (unknown, error) = fill(&bus, 0).await;
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    assert!(error.to_string().contains("disk is full"), "{error}");
    request_is_refused(&bus).await;
    let repeated = bus.append(&log(), &call(unknown, b"")).await;
    assert!(
        matches!(repeated, Err(Error::Timeout { .. })),
        "{repeated:?}"
    );
    std::fs::remove_file(&ballast).unwrap();
    let repeated = bus.append(&log(), &call(unknown, b"")).await.unwrap();
    assert_eq!((repeated.seq, repeated.duplicate), (unknown + 1, true));
    request(&bus, u64::MAX).await;
    bus.close().await;
    let bus = open(disk.path()).await;
    let messages = bus
        .range(&log(), "vlinder.v1.default.res.>", 1, 10_000)
        .await
        .unwrap();
    assert_eq!(messages.len() as u64, unknown + 1);
    assert!(
        messages
            .iter()
            .all(|message| message.body == vec![7; 60_000])
    );
}

#[tokio::test]
async fn a_start_on_a_full_disk_says_so() {
    let disk = SmallDisk::new("1m");
    let filled = std::fs::write(disk.path().join("ballast"), vec![0; 2 << 20]);
    assert!(filled.is_err());
    let opened = LocalBus::open(options(disk.path())).await.map(drop);
    assert!(matches!(opened, Err(Error::DiskFull { .. })), "{opened:?}");
}

#[tokio::test]
async fn a_broken_store_ends_the_bus_and_what_was_confirmed_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(dir.path()).await;
    request(&bus, 1).await;
    let mut worker = puller(&bus).await;
    pull(&mut worker).await;
    let mut seen = bus.seen(">").await.unwrap();
    let mut follow = bus.follow(&log(), ">", 2).await.unwrap();
    let mut signals = bus.signals(">").await.unwrap();
    let mut watch = bus.kv_watch("things").await.unwrap().skip(1);
    let conn = rusqlite::Connection::open(dir.path().join("bus.db")).unwrap();
    conn.execute_batch("ALTER TABLE entry RENAME TO away")
        .unwrap();
    let refused = bus.append(&log(), &raw(REQ, "2", "")).await;
    assert!(
        matches!(&refused, Err(Error::Storage { .. })),
        "{refused:?}"
    );
    let reason = soon("the failure", bus.failed()).await;
    assert!(reason.contains("entry"), "{reason}");
    let storage = |error: Error| assert!(matches!(error, Error::Storage { .. }), "{error}");
    storage(soon("the end", worker.next(1)).await.unwrap_err());
    storage(soon("the end", follow.next()).await.unwrap().unwrap_err());
    storage(soon("the end", watch.next()).await.unwrap().unwrap_err());
    assert!(soon("the end", follow.next()).await.is_none());
    // What was appended was seen before it failed; then the stream ends.
    assert_eq!(soon("seen", seen.next()).await.unwrap().seq, 2);
    assert!(soon("the end", seen.next()).await.is_none());
    assert!(soon("the end", signals.next()).await.is_none());
    storage(bus.ping().await.unwrap_err());
    storage(bus.last(&log(), REQ).await.unwrap_err());
    storage(bus.settled(&log(), 2).await.unwrap_err());
    storage(
        bus.kv_put("things", "a", Bytes::new(), None)
            .await
            .unwrap_err(),
    );
    drop((bus, worker, seen, follow, signals, watch));
    conn.execute_batch("ALTER TABLE away RENAME TO entry")
        .unwrap();
    let bus = open(dir.path()).await;
    assert_eq!(bus.stream_info(&log()).await.unwrap().last_seq, 1);
    assert_eq!(pull(&mut puller(&bus).await).await.stored.seq, 1);
}

#[tokio::test]
async fn a_full_log_refuses_until_its_limit_is_raised() {
    let dir = tempfile::tempdir().unwrap();
    let mut small = options(dir.path());
    small.max_bytes = 100_000;
    let bus = open_with(small).await;
    let body = vec![1; 30_000];
    for n in 0..3 {
        bus.append(&log(), &call(n, &body)).await.unwrap();
    }
    let full = bus.append(&log(), &call(3, &body)).await;
    assert!(matches!(full, Err(Error::Full { .. })), "{full:?}");
    // A known id is still answered, a smaller message still fits, other streams are not touched.
    assert!(bus.append(&log(), &call(2, &body)).await.unwrap().duplicate);
    request(&bus, 9).await;
    let ctl = StreamName::Ctl(Namespace::default_ns());
    bus.ensure_stream(&ctl).await.unwrap();
    let deploy = raw("vlinder.v1.default.infra.agent.a", "d", body.clone());
    bus.append(&ctl, &deploy).await.unwrap();
    let blob = vec![0; 200_000];
    let name = ContentHash::of(&blob).to_string();
    let full = bus.blob_put(&name, blob.clone().into()).await;
    assert!(matches!(full, Err(Error::Full { .. })), "{full:?}");
    drop(bus);
    let bus = open(dir.path()).await;
    bus.append(&log(), &call(3, &body)).await.unwrap();
    bus.blob_put(&name, blob.into()).await.unwrap();
}

#[tokio::test]
async fn a_second_process_is_kept_out_until_the_first_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(dir.path()).await;
    let second = LocalBus::open(options(dir.path())).await;
    match second.map(drop) {
        Err(Error::Locked { path, holder }) => {
            assert!(path.ends_with("bus.lock"));
            assert_eq!(holder, format!(" (pid {})", std::process::id()));
        }
        other => panic!("{other:?}"),
    }
    bus.close().await;
    open(dir.path()).await;
}

async fn reason_not_to_open(options: LocalOptions) -> String {
    match LocalBus::open(options).await.map(drop) {
        Err(Error::Storage { reason }) => reason,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn damage_is_named_instead_of_served() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(dir.path()).await;
    for n in 1..=3 {
        request(&bus, n).await;
    }
    let blob = Bytes::from(vec![3; 2_500_000]);
    let name = hex::encode(Sha256::digest(&blob));
    bus.blob_put(&name, blob.clone()).await.unwrap();
    bus.blob_put(&name, blob.clone()).await.unwrap();
    assert_eq!(bus.blob_get(&name, u64::MAX).await.unwrap(), blob);
    let large = bus.blob_get(&name, 1000).await;
    assert!(matches!(large, Err(Error::TooLarge { len: 2_500_000, .. })));
    let wrong = bus.blob_put(&"0".repeat(64), blob.clone()).await;
    assert!(matches!(wrong, Err(Error::BlobDamaged { .. })));
    let none = bus.blob_get(&"0".repeat(64), 1000).await;
    assert!(matches!(none, Err(Error::Missing { .. })));
    let conn = rusqlite::Connection::open(dir.path().join("bus.db")).unwrap();
    conn.execute_batch("UPDATE blob_part SET bytes = zeroblob(10) WHERE number = 1")
        .unwrap();
    let damaged = bus.blob_get(&name, u64::MAX).await;
    assert!(matches!(damaged, Err(Error::BlobDamaged { .. })));
    drop(bus);

    conn.execute_batch("PRAGMA user_version = 2").unwrap();
    let reason = reason_not_to_open(options(dir.path())).await;
    assert!(reason.contains("format 2"), "{reason}");
    conn.execute_batch("PRAGMA user_version = 1; DELETE FROM message WHERE pos & 15 = 2")
        .unwrap();
    let bus = open(dir.path()).await;
    let one = bus.get(&log(), 2).await;
    assert!(
        matches!(&one, Err(Error::Storage { reason }) if reason.contains("damaged")),
        "{one:?}"
    );
    drop(bus);
    conn.execute_batch("DELETE FROM entry WHERE pos & 15 = 2")
        .unwrap();
    let reason = reason_not_to_open(options(dir.path())).await;
    assert!(reason.contains("message 2"), "{reason}");
    drop(conn);
    for file in ["bus.db", "bus.db-wal", "bus.db-shm"] {
        let _ = std::fs::remove_file(dir.path().join(file));
    }
    std::fs::write(dir.path().join("bus.db"), "this is no database".repeat(500)).unwrap();
    let reason = reason_not_to_open(options(dir.path())).await;
    assert!(reason.contains("not a database"), "{reason}");
}

#[tokio::test]
async fn hostile_input_is_refused_and_stores_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(dir.path()).await;
    let bad_subjects = [
        "",
        "a..b",
        "vlinder.v1.default.req.*.b.c",
        "vlinder.v1.default.>",
        "other.v1.x",
        "vlinder.v1.default.session.s",
        "vlinder.v1.other.req.a.b.c",
        "vlinder.v1.default.req.a\r\nb.c",
    ];
    for subject in bad_subjects {
        let refused = bus.append(&log(), &raw(subject, "x", "")).await;
        assert!(
            matches!(refused, Err(Error::Refused { .. })),
            "{subject:?} {refused:?}"
        );
    }
    for header in [
        ("a\r\nb", "x"),
        ("", "x"),
        ("a b", "x"),
        ("a:b", "x"),
        ("a", "x\nInjected: y"),
        ("a", "\0"),
    ] {
        let mut message = raw(REQ, "x", "");
        message.headers.push((header.0.into(), header.1.into()));
        let refused = bus.append(&log(), &message).await;
        assert!(matches!(refused, Err(Error::Refused { .. })), "{header:?}");
    }
    let huge = raw(REQ, "x", vec![0; MESSAGE_BYTES_MAX as usize]);
    assert!(matches!(
        bus.append(&log(), &huge).await,
        Err(Error::TooLarge { .. })
    ));
    let stranger = StreamName::Log(Namespace::new("stranger").unwrap());
    let missing = bus
        .append(&stranger, &raw("vlinder.v1.stranger.req.a.b.c", "x", ""))
        .await;
    assert!(matches!(missing, Err(Error::Missing { .. })));
    for key in [
        "",
        ".",
        "a.",
        ".a",
        "a b",
        "a/b",
        "a*",
        "ü",
        &"k".repeat(1000),
    ] {
        let refused = bus.kv_put("things", key, Bytes::new(), None).await;
        assert!(matches!(refused, Err(Error::Refused { .. })), "{key:?}");
    }
    let value = Bytes::from(vec![0; 2 << 20]);
    assert!(matches!(
        bus.kv_put("things", "a", value, None).await,
        Err(Error::TooLarge { .. })
    ));
    assert!(matches!(
        bus.kv_get("no such", "a").await,
        Err(Error::Missing { .. })
    ));
    for name in [
        "",
        "x",
        &"A".repeat(64),
        "../../etc/passwd",
        &"ü".repeat(32),
    ] {
        assert!(matches!(
            bus.blob_put(name, Bytes::new()).await,
            Err(Error::Refused { .. })
        ));
        assert!(matches!(
            bus.blob_get(name, 1).await,
            Err(Error::Refused { .. })
        ));
    }
    for token in ["", "1.1", "x.y.z", "1.1.1.x", "99999999999999999999.1.1"] {
        let refused = bus.verdict(token, Verdict::Ack).await;
        assert!(matches!(refused, Err(Error::Refused { .. })), "{token:?}");
    }
    bus.verdict("1.18446744073709551615.1", Verdict::Ack)
        .await
        .unwrap();
    bus.verdict("1.0.0", Verdict::Nak(Duration::MAX))
        .await
        .unwrap();
    for filter in ["", "a..b", "a.>.b"] {
        assert!(bus.seen(filter).await.is_err() && bus.signals(filter).await.is_err());
        assert!(bus.range(&log(), filter, 1, 1).await.is_err());
        assert!(bus.follow(&log(), filter, 1).await.is_err());
    }
    assert_eq!(bus.stream_info(&log()).await.unwrap().messages, 0);
    // SQL and JSON carry whatever is left.
    let mut odd = raw(REQ, "'); DROP TABLE entry; --", "\0\u{1f980}");
    odd.headers = vec![
        ("X".into(), "\"\\ü\u{7f}'".into()),
        ("X".into(), String::new()),
    ];
    bus.append(&log(), &odd).await.unwrap();
    bus.close().await;
    let bus = open(dir.path()).await;
    let back = bus.get(&log(), 1).await.unwrap().unwrap();
    assert_eq!(
        (back.headers, back.body),
        (odd.headers.clone(), odd.body.clone())
    );
    assert!(bus.append(&log(), &odd).await.unwrap().duplicate);
}

#[tokio::test]
async fn a_bucket_is_bounded_and_blobs_half_stored_are_cleared() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(dir.path()).await;
    let spec = BucketSpec {
        name: "big",
        ttl: None,
    };
    bus.ensure_bucket(&spec).await.unwrap();
    let value = Bytes::from(vec![0; 1 << 20]);
    let mut stored = 0;
    let full = loop {
        match bus
            .kv_put("big", &format!("k{stored}"), value.clone(), None)
            .await
        {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
    };
    assert!(
        matches!(full, Error::Full { .. }) && stored == 63,
        "{stored}: {full}"
    );
    // Overwriting needs no more room.
    bus.kv_put("big", "k0", value.clone(), None).await.unwrap();
    bus.close().await;
    let conn = rusqlite::Connection::open(dir.path().join("bus.db")).unwrap();
    conn.execute_batch("INSERT INTO blob_part VALUES(77, 0, zeroblob(1000))")
        .unwrap();
    let bus = open(dir.path()).await;
    let parts: i64 = conn
        .query_row("SELECT count(*) FROM blob_part", [], |row| row.get(0))
        .unwrap();
    assert_eq!(parts, 0);
    assert_eq!(
        bus.kv_get("big", "k62").await.unwrap().unwrap().value,
        value
    );
}

#[tokio::test]
async fn a_hundred_thousand_messages_open_fast() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path()).await.close().await;
    let conn = rusqlite::Connection::open(dir.path().join("bus.db")).unwrap();
    conn.execute_batch(
        "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 49999)
         INSERT INTO subject SELECT 1, i, 'vlinder.v1.default.res.' || hex(i * 7919) || '.call' FROM n;
         WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)
         INSERT INTO entry SELECT (1 << 44) | i, i / 2 % 50000, 1000 * i, 500 FROM n;
         INSERT INTO message SELECT pos, 'id' || pos, '[]', zeroblob(500) FROM entry;",
    )
    .unwrap();
    let begun = Instant::now();
    let _: i64 = conn
        .query_row("SELECT sum(length(hex(body))) FROM message", [], |row| {
            row.get(0)
        })
        .unwrap();
    let read = begun.elapsed();
    drop(conn);
    let begun = Instant::now();
    let bus = LocalBus::open(options(dir.path())).await.unwrap();
    let took = begun.elapsed();
    let info = bus.stream_info(&log()).await.unwrap();
    assert_eq!((info.messages, info.bytes), (100_000, 50_000_000));
    // 300 ms is the aim. Against reading all bodies once, since the machine may be busy: what takes
    // time with the square of the messages is far beyond.
    assert!(took < 50 * read, "{took:?}, reading takes {read:?}");
}

/// How often the threads of the bus were put to sleep so far.
fn sleeps_of_the_bus() -> u64 {
    let mut sleeps = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let read = |file| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
        if !read("comm").starts_with("bus-") {
            continue;
        }
        let status = read("status");
        let line = status
            .lines()
            .find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
        sleeps += line.unwrap().trim().parse::<u64>().unwrap();
    }
    sleeps
}

#[tokio::test]
async fn an_idle_bus_does_not_wake() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(dir.path()).await;
    request(&bus, 1).await;
    let mut worker = puller(&bus).await;
    let delivery = pull(&mut worker).await;
    bus.verdict(&delivery.token, Verdict::Ack).await.unwrap();
    let mut idle = worker.next(1);
    assert!(waits(&mut idle).await);
    // The timer may wake once more for the acknowledged delivery.
    tokio::time::sleep(crate::streams::ACK_WAIT + Duration::from_millis(500)).await;
    let before = sleeps_of_the_bus();
    assert!(before > 0);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(sleeps_of_the_bus(), before);
}
