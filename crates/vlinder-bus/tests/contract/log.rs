//! The log: append, read, follow, see.

use crate::fixture::Fixture;
use crate::support::*;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream;
use std::collections::{HashMap, HashSet};
use std::time::Duration;
use vlinder_bus::backend::{Raw, RawStored};
use vlinder_bus::{Error, StreamName};
use vlinder_core::Namespace;

const A: &str = "vlinder.v1.default.req.svc.a.x";
const B: &str = "vlinder.v1.default.req.svc.b.x";
const ALL: &str = "vlinder.v1.default.>";

fn seqs(stored: &[RawStored]) -> Vec<u64> {
    stored.iter().map(|stored| stored.seq).collect()
}

pub async fn what_was_appended_is_read_back<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let empty = backend.stream_info(&log()).await.unwrap();
    assert_eq!((empty.first_seq, empty.last_seq, empty.messages), (1, 0, 0));
    assert!(empty.created_ms > 1_600_000_000_000);

    let all_bytes: Vec<u8> = (0..=255).cycle().take(64 * 1024).collect();
    let bodies = [
        Bytes::new(),
        Bytes::from_static(b"x"),
        Bytes::from(all_bytes),
    ];
    for (index, body) in bodies.iter().enumerate() {
        let raw = Raw {
            subject: A.to_owned(),
            headers: vec![
                ("Vln-z".to_owned(), "1: two = three".to_owned()),
                ("Note-a".to_owned(), "%C3%BC".to_owned()),
                ("vln-Z".to_owned(), "names are case-sensitive".to_owned()),
            ],
            body: body.clone(),
            id: format!("body {index}"),
            expect_last: None,
        };
        let done = backend.append(&log(), &raw).await.unwrap();
        assert_eq!((done.seq, done.duplicate), (index as u64 + 1, false));
    }
    // Another process sees the same.
    let other = fixture.connect().await;
    for (index, body) in bodies.iter().enumerate() {
        let stored = other.get(&log(), index as u64 + 1).await.unwrap().unwrap();
        assert_eq!(stored.subject, A);
        assert_eq!(&stored.body, body);
        let mut headers = stored.headers.clone();
        headers.sort();
        let expected = [
            ("Note-a", "%C3%BC"),
            ("Vln-z", "1: two = three"),
            ("vln-Z", "names are case-sensitive"),
        ];
        assert_eq!(headers, expected.map(|(n, v)| (n.to_owned(), v.to_owned())));
        assert!(stored.time_ms >= empty.created_ms);
    }
    let last = other.last(&log(), A).await.unwrap().unwrap();
    assert_eq!(last.seq, 3);
    assert!(other.last(&log(), B).await.unwrap().is_none());
    for absent in [0, 4, u64::MAX / 2] {
        assert!(
            other.get(&log(), absent).await.unwrap().is_none(),
            "{absent}"
        );
    }
    let info = other.stream_info(&log()).await.unwrap();
    assert_eq!((info.first_seq, info.last_seq, info.messages), (1, 3, 3));
    assert!(info.bytes > 64 * 1024 && info.max_bytes == crate::fixture::LOG_BYTES);
    assert_eq!(info.created_ms, empty.created_ms);
    backend.settled(&log(), 3).await.unwrap();
    assert!(backend.ping().await.unwrap() < PATIENCE);
}

pub async fn the_last_match_of_a_wildcard_is_found_at_once<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let reader = fixture.connect().await;
    let last = async |filter: &str| {
        let found = reader.last(&log(), filter).await.unwrap();
        found.map(|stored| (stored.seq, stored.subject))
    };
    assert_eq!(last(ALL).await, None);
    for (index, subject) in [A, B, A].into_iter().enumerate() {
        let done = append(&backend, subject, &format!("{index}")).await;
        // Whoever reads up to the last match has read what was confirmed before it asked.
        assert_eq!(last(ALL).await, Some((done.seq, subject.to_owned())));
    }
    let (front, _) = B.rsplit_once('.').unwrap();
    assert_eq!(last(B).await.unwrap().0, 2);
    assert_eq!(
        last(&format!("{front}.>")).await.unwrap().1[..front.len()],
        *front
    );
    assert_eq!(last(&format!("{B}.*")).await, None);
}

pub async fn a_known_id_is_swallowed_and_a_repeat_is_not<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let other = fixture.connect().await;
    let first = append(&backend, A, "one").await;
    let again = append(&other, A, "one").await;
    assert_eq!((again.seq, again.duplicate), (first.seq, true));
    // The same words again, said on purpose: another id.
    let repeat = Raw {
        id: "one, again".to_owned(),
        ..raw(A, "one")
    };
    let repeat = backend.append(&log(), &repeat).await.unwrap();
    assert_eq!((repeat.seq, repeat.duplicate), (2, false));
    // The same node on another subject has an id of its own too.
    let elsewhere = Raw {
        id: "one, elsewhere".to_owned(),
        ..raw(B, "one")
    };
    assert_eq!(backend.append(&log(), &elsewhere).await.unwrap().seq, 3);
    let all = backend.range(&log(), ALL, 1, 10).await.unwrap();
    assert_eq!(seqs(&all), [1, 2, 3]);
}

pub async fn an_expectation_holds_or_nothing_is_stored<F: Fixture>() {
    let (_fixture, backend) = prepared::<F>().await;
    let conflict = |outcome: Result<_, Error>| match outcome {
        Err(Error::Conflict { subject }) => assert_eq!(subject, A),
        other => panic!("expected a conflict: {other:?}"),
    };
    conflict(backend.append(&log(), &expecting(A, "too soon", 7)).await);
    let first = backend
        .append(&log(), &expecting(A, "first", 0))
        .await
        .unwrap();
    conflict(backend.append(&log(), &expecting(A, "also first", 0)).await);
    // Other subjects do not count.
    append(&backend, B, "elsewhere").await;
    let second = expecting(A, "second", first.seq);
    let second = backend.append(&log(), &second).await.unwrap();
    assert_eq!(second.seq, 3);
    conflict(
        backend
            .append(&log(), &expecting(A, "late", first.seq))
            .await,
    );
    conflict(backend.append(&log(), &expecting(A, "wrong", 2)).await);
    // An id that was refused is free.
    let again = expecting(A, "late", second.seq);
    assert_eq!(backend.append(&log(), &again).await.unwrap().seq, 4);
    let found = backend.range(&log(), A, 1, 10).await.unwrap();
    assert_eq!(
        found.iter().map(text).collect::<Vec<_>>(),
        ["first", "second", "late"]
    );
}

pub async fn ranges_are_complete_and_in_order<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let reader = fixture.connect().await;
    const COUNT: u64 = 1500;
    let appends = (0..COUNT).map(|n| {
        let backend = backend.clone();
        async move {
            let subject = format!("vlinder.v1.default.res.t{}.call", n % 3);
            retried(async || {
                backend
                    .append(&log(), &raw(&subject, &format!("m{n}")))
                    .await
            })
            .await
        }
    });
    let _: Vec<_> = stream::iter(appends).buffered(64).collect().await;
    let all = reader.range(&log(), ALL, 1, 10_000).await.unwrap();
    assert_eq!(seqs(&all), (1..=COUNT).collect::<Vec<_>>());
    let bodies: HashSet<&str> = all.iter().map(text).collect();
    assert_eq!(bodies.len() as u64, COUNT);
    let third = all.iter().filter(|stored| stored.subject.contains(".t1."));
    let third: Vec<u64> = third.map(|stored| stored.seq).collect();
    assert_eq!(third.len() as u64, COUNT / 3);
    for filter in ["vlinder.v1.default.res.t1.call", "vlinder.v1.*.res.t1.*"] {
        let found = reader.range(&log(), filter, 1, 10_000).await.unwrap();
        assert_eq!(seqs(&found), third, "{filter}");
    }
    let some = reader.range(&log(), ALL, 700, 5).await.unwrap();
    assert_eq!(seqs(&some), [700, 701, 702, 703, 704]);
    assert_eq!(reader.range(&log(), ALL, COUNT, 5).await.unwrap().len(), 1);
    assert!(
        reader
            .range(&log(), ALL, COUNT + 1, 5)
            .await
            .unwrap()
            .is_empty()
    );
    assert!(reader.range(&log(), ALL, 1, 0).await.unwrap().is_empty());
    assert!(reader.range(&log(), A, 1, 5).await.unwrap().is_empty());
    // Read your writes, also through another connection and a wildcard.
    for n in 0..100 {
        let done = append(&backend, A, &format!("own {n}")).await;
        let found = reader
            .range(&log(), "vlinder.v1.default.req.>", done.seq, 9)
            .await;
        assert_eq!(seqs(&found.unwrap()), [done.seq]);
        assert_eq!(reader.last(&log(), A).await.unwrap().unwrap().seq, done.seq);
        assert_eq!(
            reader.get(&log(), done.seq).await.unwrap().unwrap().seq,
            done.seq
        );
    }
}

pub async fn following_has_no_gap_and_no_repeat<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    for n in 0..700 {
        append(
            &backend,
            if n % 2 == 0 { A } else { B },
            &format!("old {n}"),
        )
        .await;
    }
    let other = fixture.connect().await;
    let mut all = other.follow(&log(), ALL, 1).await.unwrap();
    let mut half = other.follow(&log(), B, 600).await.unwrap();
    let mut fresh = other.follow(&log(), ALL, 701).await.unwrap();
    assert_eq!(
        seqs(&take_followed(&mut all, 700).await),
        (1..=700).collect::<Vec<_>>()
    );
    assert_eq!(
        seqs(&take_followed(&mut half, 51).await),
        (300..=350).map(|n| 2 * n).collect::<Vec<_>>()
    );
    for n in 0..200 {
        append(
            &backend,
            if n % 2 == 0 { A } else { B },
            &format!("new {n}"),
        )
        .await;
    }
    let live = take_followed(&mut all, 200).await;
    assert_eq!(seqs(&live), (701..=900).collect::<Vec<_>>());
    assert_eq!(text(&live[199]), "new 199");
    assert_eq!(
        seqs(&take_followed(&mut fresh, 200).await),
        (701..=900).collect::<Vec<_>>()
    );
    assert_eq!(take_followed(&mut half, 100).await.last().unwrap().seq, 900);
    silence(Duration::from_millis(200), all.next()).await;
}

pub async fn a_slow_follower_misses_nothing<F: Fixture>() {
    let (_fixture, backend) = prepared::<F>().await;
    let mut follow = backend.follow(&log(), ALL, 1).await.unwrap();
    append(&backend, A, "begin").await;
    next(&mut follow).await.unwrap();
    // More than any buffer on the way holds, while nobody reads.
    const COUNT: u64 = 5000;
    let body = Bytes::from(vec![7; 8 * 1024]);
    let appends = (0..COUNT).map(|n| {
        let raw = Raw {
            body: body.clone(),
            ..raw(A, &format!("{n}"))
        };
        let backend = backend.clone();
        async move { retried(async || backend.append(&log(), &raw).await).await }
    });
    let done: Vec<_> = stream::iter(appends).buffer_unordered(64).collect().await;
    assert_eq!(done.len() as u64, COUNT);
    let got = take_followed(&mut follow, COUNT as usize).await;
    assert_eq!(seqs(&got), (2..=COUNT + 1).collect::<Vec<_>>());
}

pub async fn seen_is_in_force_when_it_returns<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let other = fixture.connect().await;
    for n in 0..200 {
        let subject = format!("vlinder.v1.default.res.turn{n}.end");
        let waiter = format!("vlinder.v1.default.res.turn{n}.*");
        // The waiter sends, or another process does after the waiter's own message was stored.
        let mut seen = backend.seen(&waiter).await.unwrap();
        let sender = if n % 2 == 0 {
            &backend
        } else {
            let asked = raw(A, &format!("asked {n}"));
            retried(async || backend.append(&log(), &asked).await).await;
            &other
        };
        let done =
            retried(async || sender.append(&log(), &raw(&subject, &format!("{n}"))).await).await;
        let stored = tokio::time::timeout(Duration::from_secs(5), seen.next()).await;
        let stored = stored.unwrap_or_else(|_| panic!("waiter {n} saw nothing"));
        let stored = stored.expect("it goes on");
        assert_eq!(
            (stored.seq, stored.subject.as_str()),
            (done.seq, subject.as_str())
        );
        assert_eq!(text(&stored), n.to_string());
        assert_eq!(stored.previous_on_subject, 0);
        assert_eq!(stored.headers, [("Name".to_owned(), n.to_string())]);
        let read = other.get(&log(), done.seq).await.unwrap().unwrap();
        assert_eq!(read.time_ms, stored.time_ms);
    }
}

pub async fn a_waiter_sees_only_what_was_stored<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let waiter = fixture.connect().await;
    let mut seen = waiter.seen(ALL).await.unwrap();
    waiter.ping().await.unwrap();
    let first = backend
        .append(&log(), &expecting(A, "winner", 0))
        .await
        .unwrap();
    assert!(
        backend
            .append(&log(), &expecting(A, "loser", 0))
            .await
            .is_err()
    );
    assert!(append(&backend, A, "winner").await.duplicate);
    let too_large = Raw {
        body: vec![0; 9 << 20].into(),
        ..raw(A, "refused")
    };
    assert!(backend.append(&log(), &too_large).await.is_err());
    let second = append(&backend, A, "second").await;
    append(&backend, B, "third").await;
    let got = take(&mut seen, 3).await;
    assert_eq!(
        got.iter().map(text).collect::<Vec<_>>(),
        ["winner", "second", "third"]
    );
    assert_eq!(seqs(&got), [first.seq, second.seq, second.seq + 1]);
    let previous: Vec<u64> = got
        .iter()
        .map(|stored| stored.previous_on_subject)
        .collect();
    assert_eq!(previous, [0, first.seq, 0]);
    silence(Duration::from_millis(100), seen.next()).await;
}

pub async fn a_full_log_refuses_and_recovers<F: Fixture>() {
    const LIMIT: u64 = 2 * 1024 * 1024;
    let fixture = F::start().await;
    let backend = fixture.connect_with(LIMIT).await;
    prepare(&backend).await;
    let mut stored = 0;
    let refused = loop {
        let raw = Raw {
            body: vec![0; 60_000].into(),
            ..raw(A, &format!("{stored}"))
        };
        match backend.append(&log(), &raw).await {
            Ok(done) => stored = done.seq,
            Err(error) => break error,
        }
        assert!(stored < 100, "the limit does not hold");
    };
    assert!(matches!(refused, Error::Full { .. }), "{refused}");
    assert!(!refused.is_retryable());
    // It does not forget, it can be read, and other streams take messages.
    let info = backend.stream_info(&log()).await.unwrap();
    assert_eq!(
        (info.first_seq, info.last_seq, info.max_bytes),
        (1, stored, LIMIT)
    );
    assert_eq!(
        backend.range(&log(), ALL, 1, 1000).await.unwrap().len() as u64,
        stored
    );
    let control = StreamName::Ctl(Namespace::default_ns());
    let session = raw("vlinder.v1.default.session.s", "start");
    backend.append(&control, &session).await.unwrap();
    // Raising the limit is all it takes.
    drop(backend);
    let raised = fixture.connect_with(2 * LIMIT).await;
    raised.ensure_stream(&log()).await.unwrap();
    let more = Raw {
        body: vec![0; 60_000].into(),
        ..raw(A, "more")
    };
    assert_eq!(raised.append(&log(), &more).await.unwrap().seq, stored + 1);
    assert_eq!(
        raised.stream_info(&log()).await.unwrap().max_bytes,
        2 * LIMIT
    );
}

pub async fn many_subjects<F: Fixture>() {
    let (_fixture, backend) = prepared::<F>().await;
    const COUNT: usize = 20_000;
    let subject = |n: usize| format!("vlinder.v1.default.res.turn-{n}.end");
    let appends = (0..COUNT).map(|n| {
        let backend = backend.clone();
        async move {
            retried(async || {
                backend
                    .append(&log(), &expecting(&subject(n), &format!("{n}"), 0))
                    .await
            })
            .await
        }
    });
    let done: Vec<_> = stream::iter(appends).buffered(128).collect().await;
    for n in [0, 1, 777, COUNT / 2, COUNT - 1] {
        let last = backend.last(&log(), &subject(n)).await.unwrap().unwrap();
        assert_eq!(
            (last.seq, text(&last)),
            (done[n].seq, n.to_string().as_str())
        );
        let found = backend.range(&log(), &subject(n), 1, 10).await.unwrap();
        assert_eq!(seqs(&found), [done[n].seq]);
    }
    let mut follow = backend.follow(&log(), ALL, 1).await.unwrap();
    let mut met: HashMap<String, u64> = HashMap::new();
    for stored in take_followed(&mut follow, COUNT).await {
        assert!(met.insert(stored.subject, stored.seq).is_none());
    }
    assert_eq!(met.len(), COUNT);
}

pub async fn hostile_appends_are_refused<F: Fixture>() {
    let (_fixture, backend) = prepared::<F>().await;
    let long = format!("vlinder.v1.default.req.{}", "x".repeat(70_000));
    let subjects = [
        "",
        ".",
        "vlinder",
        "vlinder.v1.default.req.>",
        "vlinder.v1.default.req.*.x",
        "vlinder.v1.default.req..x",
        "vlinder.v1.default.req.x.",
        "vlinder.v1.default.req.a b",
        "vlinder.v1.default.req.a\r\nPUB x 0\r\n",
        "vlinder.v1.other.req.x",
        "vlinder.v1.default.session.x",
        "$JS.API.STREAM.DELETE.VLINDER_LOG_default",
        long.as_str(),
    ];
    for subject in subjects {
        let outcome = within(PATIENCE, backend.append(&log(), &raw(subject, "x"))).await;
        let error = outcome.expect_err(subject);
        assert!(!error.is_retryable(), "{subject:.60}: {error}");
    }
    let too_large = Raw {
        body: vec![0; 9 << 20].into(),
        ..raw(A, "large")
    };
    let error = backend.append(&log(), &too_large).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    // None of it was stored, and nothing else suffers.
    append(&backend, A, "fine").await;
    let all = backend.range(&log(), ALL, 1, 100).await.unwrap();
    assert_eq!(all.iter().map(text).collect::<Vec<_>>(), ["fine"]);
}

pub async fn missing_streams_are_errors<F: Fixture>() {
    let fixture = F::start().await;
    let backend = fixture.connect().await;
    let nowhere = StreamName::Log(Namespace::new("nowhere").unwrap());
    let missing = |error: Error| assert!(matches!(error, Error::Missing { .. }), "{error}");
    missing(backend.stream_info(&nowhere).await.unwrap_err());
    missing(
        backend
            .follow(&nowhere, "vlinder.v1.nowhere.>", 1)
            .await
            .err()
            .unwrap(),
    );
    missing(backend.puller(&nowhere, "q").await.err().unwrap());
    missing(backend.queues(&nowhere).await.unwrap_err());
    let message = raw("vlinder.v1.nowhere.req.x", "x");
    assert!(soon(backend.append(&nowhere, &message)).await.is_err());
    // Making it twice, and from two places, is fine.
    let other = fixture.connect().await;
    let (one, two) = tokio::join!(
        backend.ensure_stream(&nowhere),
        other.ensure_stream(&nowhere)
    );
    one.and(two).unwrap();
    backend.ensure_stream(&nowhere).await.unwrap();
    backend.append(&nowhere, &message).await.unwrap();
}
