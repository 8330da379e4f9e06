//! Dead letters and deliveries, as the bus gives them out.

use crate::fixture::Fixture;
use crate::support::*;
use bytes::Bytes;
use vlinder_bus::{Bus, Message, QueueSpec, StreamName, Subject};
use vlinder_core::{Kind, Namespace, Node, Selector, SubmissionId};

pub fn call_subject(turn: &str) -> Subject {
    Subject::Call {
        ns: Namespace::default_ns(),
        submission: SubmissionId::new(turn).unwrap(),
    }
}

pub fn message(subject: &Subject, body: &str) -> Message {
    let body = Bytes::from(body.to_owned());
    let node = Node::new(Kind::Result, vec![], &body).with("status", "ok");
    Message::new(log(), subject.clone(), node, body)
}

fn work() -> Subject {
    Subject::Req {
        ns: Namespace::default_ns(),
        service: "kv".to_owned(),
        backend: "local".to_owned(),
        selector: Selector::none(),
    }
}

fn spec() -> QueueSpec {
    queue("svc-kv-local-_", &work().to_string())
}

async fn one_of(puller: &mut vlinder_bus::Puller) -> vlinder_bus::Delivery {
    let mut got = soon(puller.next(1)).await.expect("work comes");
    got.pop().expect("asked for one")
}

pub async fn dead_letters_are_kept_and_driven_again<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let bus = Bus::new(backend);
    bus.ensure_queue(&spec()).await.unwrap();
    let mut puller = bus.puller(&log(), &spec().name).await.unwrap();
    assert!(bus.dead_letters(1).await.unwrap().is_empty());
    let sent = message(&work(), "killer").note("by", "test");
    let done = bus.append(sent.clone()).await.unwrap();
    let delivery = one_of(&mut puller).await;
    let reason = "killed its worker\r\nthree times";
    delivery.dead_letter(reason).await.unwrap();
    // Never again, but on record with its bytes, for another process too.
    let other = Bus::new(fixture.connect().await);
    let letters = other.dead_letters(1).await.unwrap();
    assert_eq!(letters.len(), 1);
    let letter = &letters[0];
    assert_eq!((letter.id, letter.seq, letter.deliveries), (1, done.seq, 1));
    assert_eq!(
        (letter.stream.as_str(), letter.subject.clone()),
        ("VLINDER_LOG_default", work().to_string())
    );
    assert!(
        letter.reason.starts_with("killed its worker"),
        "{}",
        letter.reason
    );
    assert_eq!(letter.body, "killer");
    assert_eq!(other.dead_letter(1).await.unwrap().as_ref(), Some(letter));
    assert_eq!(other.dead_letter(2).await.unwrap(), None);
    // Driven again it is the same node, once more, as often as one likes.
    for _ in 0..2 {
        let seq = other.redrive(letter).await.unwrap();
        let again = one_of(&mut puller).await;
        assert_eq!((again.raw().seq, again.attempt()), (seq, 1));
        let decoded = again.decode().unwrap();
        assert_eq!(decoded.hash, sent.node.hash());
        assert_eq!(decoded.notes.get("by").map(String::as_str), Some("test"));
        again.ack().await.unwrap();
    }
    // What nobody can decode is dead-lettered just so.
    let garbage = raw(&work().to_string(), "garbage");
    bus.backend().append(&log(), &garbage).await.unwrap();
    let delivery = one_of(&mut puller).await;
    let error = delivery.decode().unwrap_err();
    delivery.dead_letter(&error.to_string()).await.unwrap();
    let letters = other.dead_letters(1).await.unwrap();
    assert_eq!(letters.len(), 2);
    assert_eq!(letters[1].body, "garbage");
    assert_eq!(other.dead_letters(2).await.unwrap().len(), 1);
    let sys = other.stream_info(&StreamName::Sys).await.unwrap();
    assert_eq!(sys.messages, 2);
}

pub async fn a_dropped_delivery_goes_to_another_worker<F: Fixture>() {
    let (fixture, backend) = prepared::<F>().await;
    let bus = Bus::new(backend);
    bus.ensure_queue(&spec()).await.unwrap();
    let mut puller = bus.puller(&log(), &spec().name).await.unwrap();
    bus.append(message(&work(), "job")).await.unwrap();
    let delivery = one_of(&mut puller).await;
    let other = Bus::new(fixture.connect().await);
    let mut second = other.puller(&log(), &spec().name).await.unwrap();
    // A worker that panics drops what it holds.
    drop(delivery);
    let mut got = within(AT_ONCE, second.next(1)).await.unwrap();
    let moved = got.pop().unwrap();
    assert_eq!(moved.attempt(), 2);
    moved.ack().await.unwrap();
}
