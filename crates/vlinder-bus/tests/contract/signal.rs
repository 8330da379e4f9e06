//! Signals: to whoever listens now.

use crate::fixture::Fixture;
use crate::support::*;
use bytes::Bytes;
use futures::StreamExt;
use std::time::Duration;

pub async fn signals_reach_who_listens<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let other = fixture.connect().await;
    backend
        .signal("sig.v1.default.chunk.t", "nobody listens".into())
        .await
        .unwrap();
    // It has left our connection before the other one subscribes.
    backend.ping().await.unwrap();
    let mut exact = other.signals("sig.v1.default.chunk.t").await.unwrap();
    let mut wide = other.signals("sig.v1.default.>").await.unwrap();
    other.ping().await.unwrap();
    for n in 0..100 {
        let body = Bytes::from(n.to_string());
        backend
            .signal("sig.v1.default.chunk.t", body)
            .await
            .unwrap();
    }
    backend
        .signal("sig.v1.default.chunk.u", "other".into())
        .await
        .unwrap();
    for n in 0..100 {
        for listener in [&mut exact, &mut wide] {
            let signal = next(listener).await;
            assert_eq!(
                (signal.subject.as_str(), signal.body),
                ("sig.v1.default.chunk.t", n.to_string().into())
            );
        }
    }
    assert_eq!(next(&mut wide).await.body, "other");
    silence(Duration::from_millis(100), exact.next()).await;
    // Nothing of it was stored.
    assert_eq!(backend.stream_info(&log()).await.unwrap().messages, 0);
}

pub async fn a_slow_listener_loses_the_oldest<F: Fixture>() {
    const SENT: usize = 60_000;
    let (_fixture, backend) = prepared::<F>().await;
    let mut slow = backend.signals("sig.v1.default.chunk.*").await.unwrap();
    for n in 0..SENT {
        backend
            .signal("sig.v1.default.chunk.t", n.to_string().into())
            .await
            .unwrap();
        if n % 500 == 0 {
            // Let the backend's own tasks run, as any program does; it must not keep all of it.
            backend.ping().await.unwrap();
        }
    }
    let mut kept = 0;
    let mut before = None;
    loop {
        let signal = next(&mut slow).await;
        let n: usize = std::str::from_utf8(&signal.body).unwrap().parse().unwrap();
        assert!(
            before.is_none_or(|before| n > before),
            "{n} after {before:?}"
        );
        before = Some(n);
        kept += 1;
        if n == SENT - 1 {
            break;
        }
    }
    assert!(
        kept < SENT / 2,
        "{kept} of {SENT} were kept for one who does not listen"
    );
}
