//! The log loses its tail (the store is rolled back to an older copy), and somebody who has kept it gives
//! it back.

use crate::fixture::Fixture;
use crate::support::*;
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use vlinder_bus::backend::{Backend, Verdict};
use vlinder_bus::heal::{GivenBack, Healer, Loss};
use vlinder_bus::streams::LEASE_TTL;
use vlinder_bus::{Bus, Error, Message, Stored, Subject};
use vlinder_core::record::{End, Invoke, Outcome};
use vlinder_core::{AgentName, BranchName, Namespace, NodeHash, SessionId, SubmissionId};

const ALL: &str = "vlinder.v1.default.>";

fn ns() -> Namespace {
    Namespace::default_ns()
}

fn end(turn: &str, said: &str) -> Message {
    let submission = SubmissionId::new(turn).unwrap();
    let end = End {
        namespace: ns(),
        agent: AgentName::new("echo").unwrap(),
        session: SessionId::new("s").unwrap(),
        branch: BranchName::main(),
        submission: submission.clone(),
        outcome: Outcome::Done,
        state: None,
        code: None,
    };
    let node = end.to_node(vec![NodeHash::from_bytes([1; 32])], said.as_bytes());
    Message::new(log(), end_subject(turn), node, Bytes::from(said.to_owned())).expecting(0)
}

fn end_subject(turn: &str) -> Subject {
    Subject::End {
        ns: ns(),
        submission: SubmissionId::new(turn).unwrap(),
    }
}

fn head() -> Subject {
    Subject::Invoke {
        ns: ns(),
        agent: AgentName::new("echo").unwrap(),
        session: SessionId::new("s").unwrap(),
        branch: BranchName::main(),
    }
}

fn invoke(turn: &str, input: &str, last: u64) -> Message {
    let invoke = Invoke {
        namespace: ns(),
        agent: AgentName::new("echo").unwrap(),
        session: SessionId::new("s").unwrap(),
        branch: BranchName::main(),
        submission: SubmissionId::new(turn).unwrap(),
        turn: 0,
        previous: None,
        state: None,
        timeout_ms: 1000,
        origin: None,
        source: None,
    };
    let node = invoke.to_node(vec![NodeHash::from_bytes([2; 32])], input.as_bytes());
    let mut message =
        Message::new(log(), head(), node, Bytes::from(input.to_owned())).expecting(last);
    message.id = format!("invoke:{turn}");
    message
}

fn result(text: &str) -> Message {
    crate::dead::message(&crate::dead::call_subject("turn"), text)
}

async fn kept_from(bus: &Bus, from: u64) -> Vec<Stored> {
    bus.range(&log(), ALL, from, usize::MAX).await.unwrap()
}

/// A new connection after the store was rolled back. Leaders have to be chosen where there are several.
async fn reconnected<F: Fixture>(fixture: &F, last: u64) -> (Bus, Arc<dyn Backend>) {
    let backend = fixture.connect().await;
    prepare(&backend).await;
    let info = retried(async || backend.stream_info(&log()).await).await;
    assert_eq!(info.last_seq, last, "the surgery did not take");
    (Bus::new(backend.clone()), backend)
}

fn loss(common: u64, lost: &[Stored]) -> Loss {
    Loss {
        common,
        to: lost.last().map_or(common, |last| last.seq),
        gone: 0,
    }
}

async fn healer(bus: &Bus, by: &str, loss: Loss) -> Healer {
    retried(async || bus.heal(&log(), &ns(), by, loss).await).await
}

pub async fn what_was_lost_is_given_back_once_and_counts_where_it_was<F: Fixture>() {
    let (mut fixture, backend) = prepared::<F>().await;
    let bus = Bus::new(backend.clone());
    let spec = queue("heal", ALL);
    let mut puller = pulling(&backend, &spec).await;
    for n in 0..3 {
        bus.append(result(&format!("old {n}"))).await.unwrap();
        let got = one(&mut puller).await;
        backend.verdict(&got.token, Verdict::Ack).await.unwrap();
    }
    drop(puller);
    let copy = fixture.copy().await;
    let backend = if F::SURVIVES_CRASH {
        backend
    } else {
        fixture.connect().await
    };
    let bus = Bus::new(backend.clone());
    let large = Bytes::from(vec![7; 100_000]);
    retried(async || bus.append(result("lost 0")).await).await;
    bus.append(result("lost 1")).await.unwrap();
    bus.append(end("turn", "acknowledged")).await.unwrap();
    let node = vlinder_core::Node::new(vlinder_core::Kind::Result, vec![], &large);
    let of_call = crate::dead::call_subject("turn");
    let with_blob = Message::new(log(), of_call, node, large);
    bus.append(with_blob).await.unwrap();
    bus.append(result("again").note("attempt", 1))
        .await
        .unwrap();
    let lost = kept_from(&bus, 4).await;
    assert_eq!(lost.len(), 5);
    drop((bus, backend));

    fixture.roll_back(&copy).await;
    let (bus, backend) = reconnected(&fixture, 3).await;
    // Others are faster than the healer: a turn that was over runs again and ends otherwise, and one
    // message is made again as it was.
    bus.append(end("turn", "made up")).await.unwrap();
    bus.append(result("again").note("attempt", 2))
        .await
        .unwrap();
    let made_up = bus
        .first(&log(), &end_subject("turn"))
        .await
        .unwrap()
        .unwrap();

    let mut one_healer = healer(&bus, "one", loss(3, &lost)).await;
    let mut given = Vec::new();
    for stored in &lost {
        given.push(one_healer.give_back(stored).await.unwrap());
    }
    use GivenBack::{Healed, Present};
    assert_eq!(given, [Healed, Healed, Healed, Healed, Present]);
    let said = one_healer.finish().await.unwrap();
    assert!(
        said.done && said.common == 3 && said.lost_to == 8,
        "{said:?}"
    );
    assert_eq!(
        (said.healed, said.present, said.displaced, said.gone),
        (4, 1, 0, 0)
    );
    assert_eq!(
        said.bodies_missing, 1,
        "the large body went with the blob store"
    );
    assert_eq!(bus.healing(&log()).await.unwrap(), Some(said));

    // Everything is there once, what was lost in its old order.
    let all = kept_from(&bus, 4).await;
    let expected: Vec<NodeHash> = [made_up.hash, lost[4].hash]
        .into_iter()
        .chain(lost[..4].iter().map(|stored| stored.hash))
        .collect();
    let hashes: Vec<NodeHash> = all.iter().map(|stored| stored.hash).collect();
    assert_eq!(hashes, expected);
    assert!(all[2..].iter().all(Stored::is_healed));
    assert_eq!(all[2].place().first_seq(), 4);
    assert_eq!(all[5].notes.get("healed").map(String::as_str), Some("3.7"));
    // Its places are the old ones.
    let mut ranked = all.clone();
    ranked.sort_by_key(Stored::rank);
    assert_eq!(ranked[0].hash, lost[0].hash);
    let first = bus
        .first(&log(), &end_subject("turn"))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        first.hash, lost[2].hash,
        "the end that was acknowledged is the end"
    );
    // Nobody can end the turn once more.
    let more = bus.append(end("turn", "once more")).await;
    assert!(matches!(more, Err(Error::Conflict { .. })), "{more:?}");

    // A second one with the same memory has nothing to do.
    let mut other = healer(&bus, "two", loss(3, &lost)).await;
    assert_eq!(other.epoch(), 2);
    for stored in &lost {
        assert_eq!(other.give_back(stored).await.unwrap(), Present);
    }
    other.finish().await.unwrap();
    assert_eq!(kept_from(&bus, 4).await.len(), 6);

    // All that is not acknowledged is work: what was made meanwhile and what was given back.
    let mut puller = pulling(&backend, &spec).await;
    let mut worked = Vec::new();
    while worked.len() < 6 {
        let got = one(&mut puller).await;
        backend.verdict(&got.token, Verdict::Ack).await.unwrap();
        // A server that was killed may have forgotten the last acknowledgements.
        if got.stored.seq > 3 {
            worked.push(got.stored.seq);
        }
    }
    worked.sort_unstable();
    worked.dedup();
    assert_eq!(worked, [4, 5, 6, 7, 8, 9]);
}

pub async fn another_healer_goes_on_where_one_died<F: Fixture>() {
    let (mut fixture, _backend) = prepared::<F>().await;
    drop(_backend);
    let copy = fixture.copy().await;
    let backend = fixture.connect().await;
    let bus = Bus::new(backend.clone());
    for n in 0..10 {
        retried(async || bus.append(result(&n.to_string())).await).await;
    }
    let lost = kept_from(&bus, 1).await;
    drop((bus, backend));
    fixture.roll_back(&copy).await;
    let (bus, _backend) = reconnected(&fixture, 0).await;

    let mut stalled = healer(&bus, "stalled", loss(0, &lost)).await;
    for stored in &lost[..4] {
        assert_eq!(stalled.give_back(stored).await.unwrap(), GivenBack::Healed);
    }
    let running = bus.healing(&log()).await.unwrap().unwrap();
    assert!(!running.done);
    // Work that was given back waits meanwhile.
    let waiting = {
        let bus = bus.clone();
        tokio::spawn(async move { bus.healed(&log()).await })
    };
    let began = tokio::time::Instant::now();
    let mut next = healer(&bus, "next", loss(0, &lost)).await;
    assert!(
        began.elapsed() > LEASE_TTL / 3,
        "a lease that lives is respected"
    );
    assert!(!waiting.is_finished());
    let mut healed = 0;
    for stored in &lost {
        healed += u32::from(next.give_back(stored).await.unwrap() == GivenBack::Healed);
    }
    assert_eq!(healed, 6);
    // The stalled one wakes up and learns that it is no more.
    let fenced = loop {
        match stalled.give_back(&lost[9]).await {
            Ok(given) => assert_eq!(given, GivenBack::Healed, "it knows no better"),
            Err(error) => break error,
        }
    };
    assert!(matches!(fenced, Error::KvConflict { .. }), "{fenced:?}");
    let said = next.finish().await.unwrap();
    assert_eq!((said.epoch, said.healed, said.present), (2, 6, 4));
    within(Duration::from_secs(5), waiting)
        .await
        .unwrap()
        .unwrap();
    let hashes: Vec<NodeHash> = kept_from(&bus, 1)
        .await
        .iter()
        .map(|stored| stored.hash)
        .collect();
    let expected: Vec<NodeHash> = lost.iter().map(|stored| stored.hash).collect();
    assert_eq!(hashes, expected);
}

pub async fn a_lost_turn_does_not_take_its_place_back<F: Fixture>() {
    let (mut fixture, _backend) = prepared::<F>().await;
    drop(_backend);
    let copy = fixture.copy().await;
    let backend = fixture.connect().await;
    let bus = Bus::new(backend.clone());
    let first = retried(async || bus.append(invoke("t-1", "one", 0)).await).await;
    bus.append(end("t-1", "one")).await.unwrap();
    bus.append(invoke("t-2", "two", first.seq)).await.unwrap();
    let lost = kept_from(&bus, 1).await;
    drop((bus, backend));
    fixture.roll_back(&copy).await;
    let (bus, _backend) = reconnected(&fixture, 0).await;

    // The client of the second turn sends it again, and another input under the name of the first.
    let again = bus.append(invoke("t-1", "another", 0)).await.unwrap();
    let mut healer = healer(&bus, "one", loss(0, &lost)).await;
    let mut given = Vec::new();
    for stored in &lost {
        given.push(healer.give_back(stored).await.unwrap());
    }
    use GivenBack::{Displaced, Healed};
    assert_eq!(given, [Displaced, Healed, Displaced]);
    let said = healer.finish().await.unwrap();
    assert_eq!((said.healed, said.displaced), (3, 2));
    let on_branch = bus.all_on(&log(), &head(), 10).await.unwrap();
    let displaced: Vec<bool> = on_branch.iter().map(Stored::is_displaced).collect();
    assert_eq!(displaced, [false, true, true]);
    assert_eq!(on_branch[0].hash, again.hash);
    assert_eq!(
        on_branch[1].hash, lost[0].hash,
        "kept beside the other of its name"
    );
}
