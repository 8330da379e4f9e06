//! The main path, through [`Bus`].

use crate::local::{LocalBus, LocalOptions};
use crate::streams::{BUCKET_LEASES, StreamName};
use crate::subjects::Subject;
use crate::{Bus, Error, KvEvent, Message, QueueSpec};
use bytes::Bytes;
use futures::StreamExt;
use std::time::Duration;
use vlinder_core::{Kind, Namespace, Node, Selector, SubmissionId};

/// Deadline of anything that a test waits for.
const SOON: Duration = Duration::from_secs(5);

fn ns() -> Namespace {
    Namespace::default_ns()
}

fn log() -> StreamName {
    StreamName::Log(ns())
}

async fn open(dir: &tempfile::TempDir) -> Bus {
    let options = LocalOptions::new(dir.path().join("bus.db"));
    let bus = Bus::new(LocalBus::open(options).await.unwrap());
    bus.prepare(&ns()).await.unwrap();
    bus
}

fn request(body: &str) -> Message {
    let subject = Subject::Req {
        ns: ns(),
        service: "infer".into(),
        backend: "ollama".into(),
        selector: Selector::none(),
    };
    let node = Node::new(Kind::Request, vec![], body.as_bytes());
    Message::new(
        log(),
        subject,
        node,
        Bytes::copy_from_slice(body.as_bytes()),
    )
}

#[tokio::test]
async fn a_message_is_pulled_answered_and_seen() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(&dir).await;
    let queue = QueueSpec {
        stream: log(),
        name: "svc".into(),
        filter: "vlinder.v1.default.req.infer.ollama.*".into(),
        from_start: true,
    };
    bus.ensure_queue(&queue).await.unwrap();
    let mut puller = bus.puller(&log(), "svc").await.unwrap();
    let worker = tokio::spawn({
        let bus = bus.clone();
        async move {
            let delivery = puller.next(1).await.unwrap().pop().unwrap();
            let asked = delivery.decode().unwrap();
            let answer = Node::new(Kind::Result, vec![asked.hash], b"42");
            let subject = Subject::Call {
                ns: ns(),
                submission: SubmissionId::new("s1").unwrap(),
            };
            let message = Message::new(log(), subject, answer, Bytes::from_static(b"42"));
            bus.append(message).await.unwrap();
            delivery.ack().await.unwrap();
        }
    });
    let mut seen = bus.seen("vlinder.v1.default.res.s1.*").await.unwrap();
    let asked = bus.append(request("?")).await.unwrap();
    let answer = tokio::time::timeout(SOON, seen.next())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(answer.node.parents, [asked.hash]);
    assert_eq!((answer.seq, answer.previous_on_subject), (2, 0));
    worker.await.unwrap();
    bus.settled(&log(), 2).await.unwrap();
    let info = bus.queues(&log()).await.unwrap().remove(0);
    assert_eq!((info.waiting, info.held, info.oldest_ms), (0, 0, None));
    assert!(bus.append(request("?")).await.unwrap().duplicate);
    let stale = request("again").expecting(0);
    assert!(matches!(
        bus.append(stale).await,
        Err(Error::Conflict { .. })
    ));
    bus.close().await;
    assert!(matches!(bus.ping().await, Err(Error::Closed)));

    let bus = open(&dir).await;
    assert_eq!(bus.stream_info(&log()).await.unwrap().last_seq, 2);
    assert!(bus.append(request("?")).await.unwrap().duplicate);
    let all: Vec<_> = bus.range(&log(), ">", 1, 10).await.unwrap();
    assert_eq!(all.len(), 2);
    let mut follow = bus
        .follow(&log(), "vlinder.v1.default.res.>", 1)
        .await
        .unwrap();
    assert_eq!(follow.next().await.unwrap().unwrap().seq, 2);
}

#[tokio::test]
async fn large_bodies_and_kv_survive_a_reopen() {
    let dir = tempfile::tempdir().unwrap();
    let bus = open(&dir).await;
    let body = Bytes::from(vec![7u8; 3_000_000]);
    let node = Node::new(Kind::Request, vec![], &body);
    let mut message = request("");
    (message.node, message.body) = (node, body.clone());
    bus.append(message).await.unwrap();
    let revision = bus
        .kv_put(BUCKET_LEASES, "a", Bytes::from_static(b"1"), Some(0))
        .await
        .unwrap();
    let twice = bus
        .kv_put(BUCKET_LEASES, "a", Bytes::from_static(b"2"), Some(0))
        .await;
    assert!(matches!(twice, Err(Error::KvConflict { .. })));
    bus.close().await;

    let bus = open(&dir).await;
    let stored = bus.get(&log(), 1).await.unwrap().unwrap();
    assert_eq!(bus.load(&stored.body).await.unwrap(), body);
    let entry = bus.kv_get(BUCKET_LEASES, "a").await.unwrap().unwrap();
    assert_eq!(entry.revision, revision);
    let mut watch = bus.kv_watch(BUCKET_LEASES).await.unwrap();
    assert_eq!(watch.next().await.unwrap().unwrap(), KvEvent::Put(entry));
    assert_eq!(watch.next().await.unwrap().unwrap(), KvEvent::Current);
    let gone = tokio::time::timeout(SOON * 2, watch.next()).await.unwrap();
    assert_eq!(gone.unwrap().unwrap(), KvEvent::Gone { key: "a".into() });
}
