//! Races: the log is totally ordered, and everybody who reads it agrees who came first.

use crate::fixture::Fixture;
use crate::support::*;
use futures::{StreamExt, stream};
use std::collections::HashMap;
use std::sync::Arc;
use vlinder_bus::Error;
use vlinder_bus::backend::{Backend, Raw, RawStored};

/// Appends under way at once, from each side.
const IN_FLIGHT: usize = 64;

pub async fn one_of_several_appenders_wins<F: Fixture>() {
    const ROUNDS: u64 = 1000;
    const APPENDERS: usize = 3;
    const HEAD: &str = "vlinder.v1.default.invoke.agent.session.main";
    let (fixture, first) = prepared::<F>().await;
    let mut backends = vec![first];
    for _ in 1..APPENDERS {
        backends.push(fixture.connect().await);
    }
    let mut last = 0;
    for round in 0..ROUNDS {
        let tries = backends.iter().enumerate().map(|(who, backend)| {
            let raw = expecting(HEAD, &format!("{round} by {who}"), last);
            async move { (who, until_known(backend, &raw).await) }
        });
        let outcomes = futures::future::join_all(tries).await;
        let winners: Vec<_> = outcomes
            .iter()
            .filter_map(|(who, seq)| Some((*who, (*seq)?)))
            .collect();
        assert_eq!(winners.len(), 1, "round {round}: {outcomes:?}");
        let (who, seq) = winners[0];
        let stored = backends[(who + 1) % APPENDERS]
            .last(&log(), HEAD)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(
            (stored.seq, text(&stored)),
            (seq, format!("{round} by {who}").as_str())
        );
        last = seq;
    }
    let all = backends[0]
        .range(&log(), HEAD, 1, 2 * ROUNDS as usize)
        .await
        .unwrap();
    assert_eq!(
        all.len() as u64,
        ROUNDS,
        "nothing but the winners is stored"
    );
}

/// Appends once; the sequence if it won. An unknown outcome is decided by reading back.
async fn until_known(backend: &Arc<dyn Backend>, raw: &Raw) -> Option<u64> {
    match backend.append(&log(), raw).await {
        Ok(done) => Some(done.seq),
        Err(Error::Conflict { .. }) => None,
        Err(error) if error.is_retryable() => {
            let from = raw.expect_last.unwrap_or(0) + 1;
            let found = retried(async || backend.range(&log(), &raw.subject, from, 1).await).await;
            found
                .into_iter()
                .find(|found| found.body == raw.body)
                .map(|found| found.seq)
        }
        Err(error) => panic!("{error}"),
    }
}

fn result_of(turn: usize) -> String {
    format!("vlinder.v1.default.res.turn-{turn}.end")
}

/// Each of two emitters appends to every subject, the second from the other end.
async fn emit(
    backend: Arc<dyn Backend>,
    who: &'static str,
    turns: usize,
    expect: Option<u64>,
) -> usize {
    let order: Vec<usize> = match who {
        "two" => (0..turns)
            .map(|n| if n % 2 == 0 { n + 1 } else { n - 1 })
            .collect(),
        _ => (0..turns).collect(),
    };
    let tries = order.into_iter().map(|turn| {
        let backend = backend.clone();
        async move {
            let raw = Raw {
                expect_last: expect,
                ..raw(&result_of(turn), &format!("{turn} by {who}"))
            };
            match expect {
                None => Some(
                    retried(async || backend.append(&log(), &raw).await)
                        .await
                        .seq,
                ),
                Some(_) => until_known(&backend, &raw).await,
            }
        }
    });
    let won: Vec<_> = stream::iter(tries)
        .buffer_unordered(IN_FLIGHT)
        .collect()
        .await;
    won.iter().flatten().count()
}

/// The first message on every subject, among messages in log order.
fn firsts(stored: &[RawStored]) -> HashMap<String, String> {
    let mut first = HashMap::new();
    let mut before = 0;
    for stored in stored {
        assert!(
            stored.seq > before,
            "out of order: {} after {before}",
            stored.seq
        );
        before = stored.seq;
        let said = text(stored).to_owned();
        first.entry(stored.subject.clone()).or_insert(said);
    }
    first
}

pub async fn two_results_race_and_all_readers_agree<F: Fixture>() {
    const TURNS: usize = 5000;
    const ALL: &str = "vlinder.v1.default.res.>";
    let (fixture, one) = prepared::<F>().await;
    let two = fixture.connect().await;
    let reader = fixture.connect().await;
    let mut seen = reader.seen(ALL).await.unwrap();
    let mut follow = reader.follow(&log(), ALL, 1).await.unwrap();
    reader.ping().await.unwrap();
    let watching = async { take(&mut seen, 2 * TURNS).await };
    let (first, second, live) = tokio::join!(
        emit(one.clone(), "one", TURNS, None),
        emit(two.clone(), "two", TURNS, None),
        watching
    );
    assert_eq!((first, second), (TURNS, TURNS));
    let followed = take_followed(&mut follow, 2 * TURNS).await;
    let ranged = retried(async || two.range(&log(), ALL, 1, 4 * TURNS).await).await;
    assert_eq!(ranged.len(), 2 * TURNS);
    // Each by its own means, and from its own connection.
    let agreed = firsts(&ranged);
    assert_eq!(agreed.len(), TURNS);
    assert_eq!(firsts(&followed), agreed);
    assert_eq!(firsts(&live), agreed);
    let live_firsts = live.iter().filter(|stored| stored.previous_on_subject == 0);
    let by_previous: HashMap<_, _> = live_firsts
        .map(|stored| (stored.subject.clone(), text(stored).to_owned()))
        .collect();
    assert_eq!(by_previous, agreed);
    for turn in (0..TURNS).step_by(97) {
        let subject = result_of(turn);
        let found = one.range(&log(), &subject, 1, 1).await.unwrap();
        assert_eq!(text(&found[0]), agreed[&subject]);
    }
}

pub async fn the_first_end_wins_and_waiters_never_see_a_loser<F: Fixture>() {
    const TURNS: usize = 2000;
    const ALL: &str = "vlinder.v1.default.res.>";
    let (fixture, one) = prepared::<F>().await;
    let two = fixture.connect().await;
    let waiter = fixture.connect().await;
    let mut seen = waiter.seen(ALL).await.unwrap();
    waiter.ping().await.unwrap();
    let watching = async { take(&mut seen, TURNS).await };
    let (first, second, live) = tokio::join!(
        emit(one.clone(), "one", TURNS, Some(0)),
        emit(two.clone(), "two", TURNS, Some(0)),
        watching
    );
    assert_eq!(
        first + second,
        TURNS,
        "one winner each: {first} and {second}"
    );
    let stored = retried(async || two.range(&log(), ALL, 1, 2 * TURNS).await).await;
    assert_eq!(stored.len(), TURNS, "only winners are stored");
    assert_eq!(firsts(&live), firsts(&stored));
    silence(std::time::Duration::from_millis(100), seen.next()).await;
}

/// The retry of a success whose answer was lost: the id is known, or the expectation fails and
/// reading back shows our own message. Never a second message, never a false conflict.
pub async fn a_retry_of_a_success_is_a_success<F: Fixture>() {
    use vlinder_bus::{Bus, Expect, wire};
    let (_fixture, backend) = prepared::<F>().await;
    let bus = Bus::new(backend.clone());
    let head = crate::dead::call_subject("turn");
    let message = crate::dead::message(&head, "body").expecting(0);
    // What a first try stored, whose answer nobody got.
    let raw = Raw {
        subject: head.to_string(),
        headers: wire::encode(&message.node, &message.node.hash(), &message.notes, false),
        body: message.body.clone(),
        id: message.id.clone(),
        expect_last: Some(0),
    };
    let stored = backend.append(&log(), &raw).await.unwrap();
    // At once, the id is known or the subject is taken. Both are told as what they are.
    match backend.append(&log(), &raw).await {
        Ok(done) => assert_eq!((done.seq, done.duplicate), (stored.seq, true)),
        Err(Error::Conflict { .. }) => {}
        Err(error) => panic!("{error}"),
    }
    let read_back = bus.range(&log(), &raw.subject, 1, 10).await.unwrap();
    assert_eq!(read_back.len(), 1);
    assert_eq!(read_back[0].hash, message.node.hash());
    // Somebody else's message under the same expectation is a conflict.
    let other = crate::dead::message(&head, "other").expecting(0);
    assert_eq!(other.expect, Expect::Last(0));
    let outcome = bus.append(other).await;
    assert!(
        matches!(outcome, Err(Error::Conflict { .. })),
        "{outcome:?}"
    );
}
