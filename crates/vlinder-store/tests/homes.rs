//! One contract for every kind of store: `sqlite://`, `nats://` (on the embedded bus and on a NATS
//! server) and `s3://` (on an S3 server). What a session sees, and its state roots, do not depend on
//! where the chunks are; and where they have a home, a node that never saw a state needs no log.

use bytes::Bytes;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use vlinder_bus::local::{LocalBus, LocalOptions};
use vlinder_bus::nats::{NatsOptions, connect};
use vlinder_bus::{Bus, Message, StreamName, Subject};
use vlinder_core::record::Request;
use vlinder_core::{AgentName, Namespace, Selector, StateRoot, SubmissionId, hash::call_key};
use vlinder_objects::Access;
use vlinder_store::{Answer, ChunkDb, Error, Position, Stores};
use vlinder_testkit::{AwsServer, CURRENT, NatsServer};

const BUCKET: &str = "chunks";

struct Bed {
    bus: Bus,
    dir: TempDir,
    kind: &'static str,
    store: &'static str,
    access: Access,
}

impl Bed {
    async fn local(kind: &'static str, store: &'static str, access: Access) -> Self {
        let dir = TempDir::new().unwrap();
        let backend = LocalBus::open(LocalOptions::new(dir.path().join("bus.db")))
            .await
            .unwrap();
        Self::of(Bus::new(backend), dir, kind, store, access).await
    }

    async fn of(
        bus: Bus,
        dir: TempDir,
        kind: &'static str,
        store: &'static str,
        access: Access,
    ) -> Self {
        bus.prepare(&Namespace::default_ns()).await.unwrap();
        Self {
            bus,
            dir,
            kind,
            store,
            access,
        }
    }

    async fn in_s3(server: &AwsServer) -> Self {
        Self::local("s3", "chunks/of/agents", access(server)).await
    }

    fn node(&self, name: &str) -> Arc<Stores> {
        let data_dir = self.dir.path().join(name);
        let stores = Stores::new(self.bus.clone(), Namespace::default_ns(), &data_dir);
        Arc::new(stores.with_s3(self.access.clone()))
    }

    /// How far a node has read the log; `None`: not at all.
    fn has_read_log(&self, node: &str) -> bool {
        let file = self.dir.path().join(node).join("stores/default.db");
        ChunkDb::open(&file).unwrap().cursor().unwrap().is_some()
    }

    async fn ask(
        &self,
        node: &Stores,
        (service, operation): (&str, &str),
        state: Option<StateRoot>,
        body: Value,
    ) -> Result<Answer, Error> {
        self.ask_of(
            node,
            (service, operation),
            self.kind,
            self.store,
            state,
            body,
        )
        .await
    }

    async fn ask_of(
        &self,
        node: &Stores,
        (service, operation): (&str, &str),
        kind: &str,
        store: &str,
        state: Option<StateRoot>,
        body: Value,
    ) -> Result<Answer, Error> {
        let body = Bytes::from(body.to_string());
        let selector = Selector::new(store).unwrap();
        let request = Request {
            namespace: Namespace::default_ns(),
            submission: SubmissionId::new("t-1").unwrap(),
            agent: AgentName::new("a").unwrap(),
            service: service.to_owned(),
            backend: kind.to_owned(),
            operation: operation.to_owned(),
            selector: selector.clone(),
            key: call_key(service, operation, kind, store, &body, 0),
            k: 0,
            state,
            label: None,
            deadline_ms: u64::MAX,
        };
        let subject = Subject::Req {
            ns: Namespace::default_ns(),
            service: service.to_owned(),
            backend: kind.to_owned(),
            selector,
        };
        let log = StreamName::Log(Namespace::default_ns());
        let node_of = request.to_node(vec![], &body);
        let message = Message::new(log, subject, node_of, body.clone());
        let at = self.bus.append(message).await.unwrap();
        let at = Position {
            seq: at.seq,
            request: at.hash,
        };
        node.serve(&request, at, body).await.map(Option::unwrap)
    }

    async fn put(
        &self,
        node: &Stores,
        state: Option<StateRoot>,
        path: &str,
        content: &str,
    ) -> Option<StateRoot> {
        let body = json!({"path": path, "content": content});
        let answer = self.ask(node, ("kv", "put"), state, body).await.unwrap();
        assert!(answer.is_ok());
        answer.state
    }

    async fn get(&self, node: &Stores, state: Option<StateRoot>, path: &str) -> Option<String> {
        let answer = self
            .ask(node, ("kv", "get"), state, json!({"path": path}))
            .await
            .unwrap();
        answer
            .found
            .unwrap()
            .then(|| String::from_utf8(answer.body).unwrap())
    }
}

fn access(server: &AwsServer) -> Access {
    Access::of([
        ("AWS_ENDPOINT_URL_S3", server.url()),
        ("AWS_ACCESS_KEY_ID", "test".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "test".to_owned()),
    ])
}

/// What any kind of store must do; everything that it showed, to be compared with the others.
async fn contract(bed: &Bed) -> Vec<String> {
    let (a, b) = (bed.node("a"), bed.node("b"));
    let mut shown = Vec::new();
    let long = "long ".repeat(200);
    let mut state = None;
    let mut states = Vec::new();
    // Two nodes in turn, so that each builds on what the other made.
    for i in 0..40 {
        let node = if i % 2 == 0 { &a } else { &b };
        let content = if i % 3 == 0 { &long } else { "short" };
        state = bed
            .put(node, state, &format!("dir/{i}"), &format!("{i} {content}"))
            .await;
        states.push(state);
        let vector = json!({"key": format!("v{i}"), "vector": [i, 1.5], "metadata": {"i": i}});
        let stored = bed
            .ask(node, ("vec", "store"), state, vector)
            .await
            .unwrap();
        state = stored.state;
        states.push(state);
    }
    let gone = bed
        .ask(&b, ("kv", "delete"), state, json!({"path": "dir/7"}))
        .await
        .unwrap();
    assert_ne!(gone.state, state);
    states.push(gone.state);
    // A node that has seen nothing: the last state, the past, and a fork from the past.
    let c = bed.node("c");
    assert_eq!(bed.get(&c, gone.state, "dir/7").await, None);
    assert_eq!(
        bed.get(&c, state, "dir/7").await.as_deref(),
        Some("7 short")
    );
    assert_eq!(bed.get(&c, states[2], "dir/7").await, None);
    assert_eq!(bed.get(&c, None, "dir/0").await, None);
    assert_eq!(
        bed.get(&c, states[0], "dir/0").await,
        Some(format!("0 {long}"))
    );
    let fork = bed.put(&c, states[10], "dir/0", "of the fork").await;
    assert_eq!(
        bed.get(&a, fork, "dir/0").await.as_deref(),
        Some("of the fork")
    );
    assert_eq!(bed.get(&a, state, "dir/0").await, Some(format!("0 {long}")));
    states.push(fork);

    let list = bed
        .ask(&c, ("kv", "list"), gone.state, json!({"path": "dir/"}))
        .await
        .unwrap();
    assert_eq!(
        serde_json::from_slice::<Vec<String>>(&list.body)
            .unwrap()
            .len(),
        39
    );
    shown.push(String::from_utf8(list.body).unwrap());
    let search = json!({"vector": [20.2, 1.5], "limit": 3});
    let found = bed
        .ask(&c, ("vec", "search"), gone.state, search)
        .await
        .unwrap();
    shown.push(String::from_utf8(found.body).unwrap());
    let refused = bed
        .ask(&c, ("kv", "put"), state, json!({"path": ""}))
        .await
        .unwrap();
    assert_eq!((refused.http, refused.state), (400, state));
    shown.extend(states.iter().map(|state| format!("{state:?}")));
    shown
}

#[tokio::test]
async fn every_kind_of_store_keeps_one_contract() {
    let sqlite = Bed::local("sqlite", "chunks/of/agents", Access::default()).await;
    let expected = contract(&sqlite).await;
    assert!(sqlite.has_read_log("c"), "only the log leads to the states");

    // The id of a store is in its keys, so equal ids make equal roots.
    let embedded = Bed::local("nats", "chunks/of/agents", Access::default()).await;
    assert_eq!(contract(&embedded).await, expected);

    let nats = NatsServer::start(CURRENT).await;
    let options = NatsOptions {
        urls: vec![nats.url()],
        ..NatsOptions::default()
    };
    let backend = connect(options, Duration::from_secs(20)).await.unwrap();
    let dir = TempDir::new().unwrap();
    let on_nats = Bed::of(
        Bus::new(backend),
        dir,
        "nats",
        "chunks/of/agents",
        Access::default(),
    )
    .await;
    assert_eq!(contract(&on_nats).await, expected);

    let server = AwsServer::start().await;
    server.make_bucket(BUCKET).await;
    let in_s3 = Bed::in_s3(&server).await;
    assert_eq!(contract(&in_s3).await, expected);

    for bed in [&embedded, &on_nats, &in_s3] {
        for node in ["a", "b", "c"] {
            assert!(
                !bed.has_read_log(node),
                "{} {node}: the home has all",
                bed.kind
            );
        }
    }
}

#[tokio::test]
async fn what_the_home_has_lost_the_log_brings_back() {
    let mut server = AwsServer::start().await;
    server.make_bucket(BUCKET).await;
    let bed = Bed::in_s3(&server).await;
    let a = bed.node("a");
    let mut state = None;
    for i in 0..20 {
        state = bed.put(&a, state, &format!("p{i}"), &"x".repeat(400)).await;
    }
    assert!(server.count(BUCKET).await > 20);
    // Emptied, bucket and all.
    server.restart().await;
    let b = bed.node("b");
    assert_eq!(bed.get(&b, state, "p3").await.unwrap().len(), 400);
    assert!(bed.has_read_log("b"));
    // And away.
    server.kill().await;
    let c = bed.node("c");
    assert_eq!(bed.get(&c, state, "p3").await.unwrap().len(), 400);
}

#[tokio::test]
async fn failures_of_the_home_are_told_and_lose_nothing() {
    let mut server = AwsServer::start().await;
    let bed = Bed::in_s3(&server).await;
    let a = bed.node("a");
    let put = |content: &str| json!({"path": "p", "content": content});
    let told = |error: Error| match error {
        Error::Home(error) => error.to_string(),
        other => panic!("{other}"),
    };
    let absent = bed
        .ask(&a, ("kv", "put"), None, put("1"))
        .await
        .map(|_| ())
        .unwrap_err();
    assert!(told(absent).contains("no such bucket"));
    server.make_bucket(BUCKET).await;
    let state = bed.put(&a, None, "p", "1").await;
    server.kill().await;
    let away = bed
        .ask(&a, ("kv", "put"), state, put("2"))
        .await
        .map(|_| ())
        .unwrap_err();
    assert!(told(away).contains("away"), "the server is away");
    // What was there stays readable; and when the server is back, also empty, all goes on.
    assert_eq!(bed.get(&a, state, "p").await.as_deref(), Some("1"));
    server.restart().await;
    server.make_bucket(BUCKET).await;
    let after = bed.put(&a, state, "p", "2").await;
    assert_eq!(
        bed.get(&bed.node("b"), after, "p").await.as_deref(),
        Some("2")
    );

    let without = Stores::new(bed.bus.clone(), Namespace::default_ns(), bed.dir.path());
    let error = bed
        .ask(&without, ("kv", "put"), None, put("3"))
        .await
        .map(|_| ())
        .unwrap_err();
    assert!(told(error).contains("s3.access_key_id"));
}

#[tokio::test]
async fn a_store_that_moves_takes_its_past_along() {
    let server = AwsServer::start().await;
    server.make_bucket(BUCKET).await;
    let bed = Bed::in_s3(&server).await;
    let a = bed.node("a");
    let mut state = None;
    for i in 0..50 {
        let body = json!({"path": format!("p{i}"), "content": "y".repeat(300)});
        let made = bed
            .ask_of(&a, ("kv", "put"), "sqlite", bed.store, state, body)
            .await;
        state = made.unwrap().state;
    }
    assert_eq!(server.count(BUCKET).await, 0);
    let state = bed.put(&a, state, "new", "z").await;
    let b = bed.node("b");
    for i in [0, 25, 49] {
        assert_eq!(
            bed.get(&b, state, &format!("p{i}")).await.unwrap().len(),
            300
        );
    }
    assert!(!bed.has_read_log("b"));
    // A node whose file is lost brings nothing twice.
    let before = server.count(BUCKET).await;
    std::fs::remove_dir_all(bed.dir.path().join("a")).unwrap();
    let state = bed.put(&bed.node("a"), state, "newer", "z").await;
    let after = server.count(BUCKET).await;
    assert!(after > before && after - before < 8, "{before} {after}");
    assert_eq!(bed.get(&b, state, "newer").await.as_deref(), Some("z"));
}
