//! The workers on the embedded bus: a deployed agent's stores are served, on any node, in any turn.

use bytes::Bytes;
use futures::StreamExt;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use vlinder_bus::local::{LocalBus, LocalOptions};
use vlinder_bus::{Bus, Message, QueueSpec, StreamName, Subject, subjects};
use vlinder_core::hash::call_key;
use vlinder_core::manifest::AgentManifest;
use vlinder_core::record::{CallResult, CallStatus, Request};
use vlinder_core::{AgentName, Namespace, NodeName, Selector, StateRoot, SubmissionId, WorkerRole};
use vlinder_store::Service;
use vlinder_worker::cx::NoControl;
use vlinder_worker::infra::{AGENT, AgentVersion, InfraView};
use vlinder_worker::{Error, WorkerCx, WorkerId};

/// No step of these tests takes a tenth of this.
const DEADLINE: Duration = Duration::from_secs(20);

struct Bed {
    bus: Bus,
    ns: Namespace,
    dir: TempDir,
    drain: CancellationToken,
    asked: u64,
}

impl Bed {
    async fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let backend = LocalBus::open(LocalOptions::new(dir.path().join("bus.db")))
            .await
            .unwrap();
        let (bus, ns) = (Bus::new(backend), Namespace::default_ns());
        bus.prepare(&ns).await.unwrap();
        Self {
            bus,
            ns,
            dir,
            drain: CancellationToken::new(),
            asked: 0,
        }
    }

    fn cx(&self, node: &str, role: WorkerRole) -> WorkerCx {
        let id = WorkerId {
            node: NodeName::new(node).unwrap(),
            role,
            index: 0,
        };
        let data_dir: Arc<Path> = self.dir.path().join(node).into();
        let drain = self.drain.clone();
        WorkerCx::new(
            id,
            self.bus.clone(),
            self.ns.clone(),
            data_dir,
            Arc::new(NoControl),
            drain,
        )
    }

    fn start(&self, node: &str, service: Service) -> JoinHandle<Result<(), Error>> {
        let role = match service {
            Service::Kv => WorkerRole::StorageObjectSqlite,
            Service::Vec => WorkerRole::StorageVectorSqlite,
        };
        tokio::spawn(vlinder_store::run(
            self.cx(node, role),
            service,
            Default::default(),
        ))
    }

    /// Deploys an agent with these stores: first their queues, then the event, as the registry does.
    async fn deploy(&self, kv: &str, vec: &str) {
        for (service, store) in [("kv", kv), ("vec", vec)] {
            let selector = Selector::new(store).unwrap();
            let queue = QueueSpec {
                stream: StreamName::Log(self.ns.clone()),
                name: subjects::service_queue(service, "sqlite", &selector),
                filter: self.subject(service, &selector).to_string(),
                from_start: false,
            };
            self.bus.ensure_queue(&queue).await.unwrap();
        }
        let manifest = AgentManifest::parse(&format!(
            "name = \"a\"\ndescription = \"Tests.\"\nruntime = \"process\"\nexecutable = \"./a\"\n\
             object_storage = \"sqlite://{kv}\"\nvector_storage = \"sqlite://{vec}\"\n"
        ));
        let version = AgentVersion {
            manifest: manifest.unwrap(),
            bundle: None,
            bundle_len: 0,
        };
        let cx = self.cx("deployer", WorkerRole::Registry);
        let infra = InfraView::start(&cx).await.unwrap();
        let value = serde_json::to_value(&version).unwrap();
        infra.append(AGENT, "a", Some(&value)).await.unwrap();
    }

    fn subject(&self, service: &str, selector: &Selector) -> Subject {
        Subject::Req {
            ns: self.ns.clone(),
            service: service.to_owned(),
            backend: "sqlite".to_owned(),
            selector: selector.clone(),
        }
    }

    /// Sends a request as the bridge does and returns its answer.
    async fn ask(
        &mut self,
        call: (&str, &str, &str),
        state: Option<StateRoot>,
        body: Value,
    ) -> (CallResult, Bytes) {
        let (service, store, operation) = call;
        let body = Bytes::from(body.to_string());
        let selector = Selector::new(store).unwrap();
        self.asked += 1;
        let submission = SubmissionId::new(format!("t-{}", self.asked)).unwrap();
        let request = Request {
            namespace: self.ns.clone(),
            submission: submission.clone(),
            agent: AgentName::new("a").unwrap(),
            service: service.to_owned(),
            backend: "sqlite".to_owned(),
            operation: operation.to_owned(),
            selector: selector.clone(),
            key: call_key(service, operation, "sqlite", store, &body, 0),
            k: 0,
            state,
            label: None,
            deadline_ms: self.bus.now_ms() + 60_000,
        };
        let answers = Subject::Call {
            ns: self.ns.clone(),
            submission,
        };
        let mut seen = self.bus.seen(&answers.to_string()).await.unwrap();
        let node = request.to_node(vec![], &body);
        let log = StreamName::Log(self.ns.clone());
        let message = Message::new(log, self.subject(service, &selector), node, body);
        let asked = self.bus.append(message).await.unwrap();
        let stored = timeout(DEADLINE, seen.next())
            .await
            .expect("no answer")
            .unwrap();
        assert_eq!(stored.node.parents, [asked.hash]);
        let body = self.bus.load(&stored.body).await.unwrap();
        (CallResult::try_from(&stored.node).unwrap(), body)
    }

    async fn drained(&self, workers: Vec<JoinHandle<Result<(), Error>>>) {
        self.drain.cancel();
        for worker in workers {
            timeout(DEADLINE, worker)
                .await
                .expect("does not drain")
                .unwrap()
                .unwrap();
        }
    }
}

#[tokio::test]
async fn stores_are_served_by_whoever_is_free() {
    let mut bed = Bed::new().await;
    // Stores become known while the workers run. Two nodes serve kv, a third the vectors, so that
    // everybody meets states that somebody else made.
    let mut workers = Vec::new();
    for (node, service) in [("a", Service::Kv), ("b", Service::Kv), ("c", Service::Vec)] {
        workers.push(bed.start(node, service));
    }
    bed.deploy("notes", "memories").await;

    let mut state = None;
    for i in 0..20 {
        let (got, body) = bed
            .ask(("kv", "notes", "get"), state, json!({"path": "count"}))
            .await;
        assert_eq!(
            (got.status, got.http, got.found),
            (CallStatus::Ok, 200, Some(i > 0))
        );
        assert_eq!(std::str::from_utf8(&body).unwrap().parse().unwrap_or(0), i);
        let put = json!({"path": "count", "content": (i + 1).to_string()});
        let (put, body) = bed.ask(("kv", "notes", "put"), state, put).await;
        assert_eq!(
            serde_json::from_slice::<Value>(&body).unwrap()["state"],
            json!(put.state)
        );
        let vector = json!({"key": format!("k{i}"), "vector": [i, 1], "metadata": i});
        let (stored, _) = bed
            .ask(("vec", "memories", "store"), put.state, vector)
            .await;
        assert!(stored.state.is_some() && stored.state != put.state);
        state = stored.state;
    }
    let (found, body) = bed
        .ask(
            ("vec", "memories", "search"),
            state,
            json!({"vector": [7, 1], "limit": 1}),
        )
        .await;
    assert_eq!(
        (found.content_type.as_str(), found.state),
        ("application/json", state)
    );
    assert_eq!(
        serde_json::from_slice::<Value>(&body).unwrap(),
        json!([{"key": "k7", "distance": 0.0, "metadata": 7}])
    );

    let (refused, body) = bed
        .ask(("kv", "notes", "put"), state, json!({"path": ""}))
        .await;
    assert_eq!((refused.status, refused.http), (CallStatus::Error, 400));
    assert_eq!(
        serde_json::from_slice::<Value>(&body).unwrap()["error"]["code"],
        json!("bad_path")
    );
    let nowhere = Some(StateRoot::from_bytes([9; 32]));
    let (lost, _) = bed
        .ask(("kv", "notes", "get"), nowhere, json!({"path": "count"}))
        .await;
    assert_eq!((lost.status, lost.http), (CallStatus::Error, 500));
    bed.drained(workers).await;
}
