//! A node in a test: the embedded bus, the kv worker, a runtime worker, and clients.

use bytes::Bytes;
use futures::StreamExt;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use vlinder_bus::local::{LocalBus, LocalOptions};
use vlinder_bus::nats::NatsOptions;
use vlinder_bus::{Bus, Message, QueueSpec, Stored, StreamName, Subject, subjects};
use vlinder_core::manifest::AgentManifest;
use vlinder_core::record::{End, Invoke, Outcome, SessionEvent, SessionVerb};
use vlinder_core::{
    AgentName, BranchName, Namespace, NodeHash, NodeName, SessionId, StateRoot, SubmissionId,
    WorkerRole,
};
use vlinder_runtime::process::ProcessOptions;
use vlinder_runtime::secrets::{SecretError, SecretValue, Secrets};
use vlinder_runtime::{Options, run_process};
use vlinder_testkit::NatsServer;
use vlinder_worker::cx::NoControl;
use vlinder_worker::infra::{AGENT, AgentVersion, InfraView};
use vlinder_worker::replicas::{self, ReplicaClaim};
use vlinder_worker::{Error, WorkerCx, WorkerId};

/// How long anything may take that a test waits for.
pub const DEADLINE: Duration = Duration::from_secs(30);

pub struct Bed {
    pub dir: tempfile::TempDir,
    pub bus: Bus,
    pub cx: WorkerCx,
    pub infra: InfraView,
}

/// The secret `known`, and one that cannot be had now.
struct TestSecrets;

#[async_trait::async_trait]
impl Secrets for TestSecrets {
    async fn get(&self, name: &str) -> Result<SecretValue, SecretError> {
        match name {
            "known" => Ok(SecretValue {
                value: SECRET_VALUE.into(),
                version: 7,
            }),
            "away" => Err(SecretError::Unavailable("nobody answers".to_owned())),
            _ => Err(SecretError::Missing(name.to_owned())),
        }
    }
}

/// What the secret `known` says.
pub const SECRET_VALUE: &str = "hush-hush-4711";

/// A runtime worker.
pub struct Worker {
    pub drain: CancellationToken,
    pub task: JoinHandle<Result<(), Error>>,
}

impl Worker {
    /// Drains it and waits for its end.
    pub async fn stop(self) {
        self.drain.cancel();
        within("the worker's drain", self.task)
            .await
            .unwrap()
            .unwrap();
    }

    /// Ends it as a crash would: without finishing anything.
    pub async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

pub async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, work).await {
        Ok(done) => done,
        Err(_) => panic!("{what} took longer than {DEADLINE:?}"),
    }
}

impl Bed {
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = LocalOptions::new(dir.path().join("bus.db"));
        let local = LocalBus::open(options).await.unwrap();
        Self::over(Bus::new(local), dir).await
    }

    /// A bed over a NATS server.
    pub async fn over_nats(server: &NatsServer) -> Self {
        let options = NatsOptions {
            urls: vec![server.url()],
            ..NatsOptions::default()
        };
        let nats = vlinder_bus::nats::connect(options, DEADLINE).await.unwrap();
        Self::over(Bus::new(nats), tempfile::tempdir().unwrap()).await
    }

    async fn over(bus: Bus, dir: tempfile::TempDir) -> Self {
        let ns = Namespace::default_ns();
        bus.prepare(&ns).await.unwrap();
        let cx = WorkerCx::new(
            WorkerId {
                node: NodeName::new("test").unwrap(),
                role: WorkerRole::Harness,
                index: 0,
            },
            bus.clone(),
            ns,
            Arc::from(dir.path()),
            Arc::new(NoControl),
            CancellationToken::new(),
        );
        let infra = InfraView::start(&cx).await.unwrap();
        let kv = worker_cx(&cx, WorkerRole::StorageObjectSqlite, "test", 0);
        tokio::spawn(vlinder_store::run(
            kv,
            vlinder_store::Service::Kv,
            Default::default(),
        ));
        Self {
            dir,
            bus,
            cx,
            infra,
        }
    }

    /// A bed with one runtime worker.
    pub async fn with_worker() -> (Self, Worker) {
        let bed = Self::new().await;
        let worker = bed.worker("test", 0);
        (bed, worker)
    }

    /// Starts a runtime worker.
    pub fn worker(&self, node: &str, index: u32) -> Worker {
        self.worker_with(node, index, &[])
    }

    pub fn worker_with(&self, node: &str, index: u32, labels: &[(&str, &str)]) -> Worker {
        let cx = worker_cx(&self.cx, WorkerRole::AgentProcess, node, index);
        let drain = cx.drain.clone();
        let options = Options {
            labels: labels
                .iter()
                .map(|(k, v)| (k.to_string(), v.to_string()))
                .collect::<BTreeMap<_, _>>(),
            bridge: Some(std::net::TcpListener::bind("127.0.0.1:0").unwrap()),
            drain_within: Duration::from_secs(10),
            secrets: Arc::new(TestSecrets),
        };
        let process = ProcessOptions {
            path: std::env::var_os("PATH").unwrap(),
            ..ProcessOptions::default()
        };
        Worker {
            drain,
            task: tokio::spawn(run_process(cx, options, process)),
        }
    }

    /// Deploys an agent with one file and waits until it is ready.
    pub async fn deploy(&self, name: &str, source: &str, manifest: &str) -> u64 {
        let version = self.deploy_only(name, source, manifest).await;
        self.ready(name, version).await;
        version
    }

    pub async fn deploy_only(&self, name: &str, source: &str, more: &str) -> u64 {
        let text = format!(
            "name = '{name}'\ndescription = 'a test'\nruntime = 'process'\n{}{more}",
            if more.contains("executable") {
                ""
            } else {
                "executable = 'python3 agent.py'\n"
            }
        );
        let manifest = AgentManifest::parse(&text).unwrap();
        let bundle = bundle(&[("agent.py", source)]);
        let version = AgentVersion {
            bundle_len: bundle.len() as u64,
            bundle: Some(self.bus.blob_put(bundle).await.unwrap()),
            manifest,
        };
        let agent = version.manifest.name.clone();
        let queue = QueueSpec {
            stream: self.log(),
            name: subjects::agent_queue(&agent),
            filter: subjects::invokes_of(&self.cx.ns, &agent),
            from_start: true,
        };
        self.bus.ensure_queue(&queue).await.unwrap();
        self.infra.fresh().await.unwrap();
        let value = serde_json::to_value(&version).unwrap();
        self.infra.append(AGENT, name, Some(&value)).await.unwrap()
    }

    pub async fn delete(&self, name: &str) {
        self.infra.fresh().await.unwrap();
        self.infra.append(AGENT, name, None).await.unwrap();
    }

    pub fn log(&self) -> StreamName {
        self.cx.log()
    }

    /// Waits until the claims on an agent are as wanted.
    pub async fn claims_until(
        &self,
        name: &str,
        what: &str,
        done: impl Fn(&BTreeMap<u32, ReplicaClaim>) -> bool,
    ) -> BTreeMap<u32, ReplicaClaim> {
        let mut watch = self
            .bus
            .kv_watch(vlinder_bus::streams::BUCKET_REPLICAS)
            .await
            .unwrap();
        let mut claims = BTreeMap::new();
        let mut is_current = false;
        let wait = async {
            loop {
                match watch.next().await.unwrap().unwrap() {
                    vlinder_bus::KvEvent::Put(entry) => {
                        let (agent, index) = replicas::parse_key(&entry.key).unwrap();
                        if agent.as_str() == name {
                            claims.insert(index, serde_json::from_slice(&entry.value).unwrap());
                        }
                    }
                    vlinder_bus::KvEvent::Gone { key } => {
                        let (agent, index) = replicas::parse_key(&key).unwrap();
                        if agent.as_str() == name {
                            claims.remove(&index);
                        }
                    }
                    vlinder_bus::KvEvent::Current => is_current = true,
                }
                if is_current && done(&claims) {
                    return;
                }
            }
        };
        let waited = tokio::time::timeout(DEADLINE, wait).await;
        assert!(waited.is_ok(), "{what}: the claims are {claims:?}");
        claims
    }

    /// Waits until every replica of a version is ready.
    pub async fn ready(&self, name: &str, version: u64) -> BTreeMap<u32, ReplicaClaim> {
        let agent = AgentName::new(name).unwrap();
        let infra = self.infra.at_least(version).await.unwrap();
        let wanted = infra.agent(&agent).unwrap().0.manifest.replicas as usize;
        self.claims_until(name, "not ready", |claims| {
            claims.len() == wanted
                && claims
                    .values()
                    .all(|claim| claim.state == "ready" && claim.version == version)
        })
        .await
    }

    pub async fn session(&self, agent: &str) -> Session {
        let agent = AgentName::new(agent).unwrap();
        let session = SessionId::fresh();
        let event = SessionEvent {
            namespace: self.cx.ns.clone(),
            session: session.clone(),
            agent: agent.clone(),
            name: session.to_string(),
            verb: SessionVerb::Start,
        };
        let node = event.to_node(vec![], b"");
        let subject = Subject::Session {
            ns: self.cx.ns.clone(),
            session: session.clone(),
        };
        let appended = self
            .bus
            .append(Message::new(self.cx.ctl(), subject, node, Bytes::new()))
            .await
            .unwrap();
        Session {
            agent,
            session,
            branch: BranchName::main(),
            parent: appended.hash,
            previous: None,
            state: None,
            turn: 0,
            head: 0,
            timeout_ms: 20_000,
        }
    }

    /// The calls of a turn: (operation or status, node) in log order, requests and results.
    pub async fn requests_of(&self, submission: &SubmissionId) -> Vec<Stored> {
        let filter = format!("vlinder.v1.{}.req.>", self.cx.ns);
        let all = self
            .bus
            .range(&self.log(), &filter, 1, 10_000)
            .await
            .unwrap();
        all.into_iter()
            .filter(|stored| stored.node.field("submission") == Some(submission.as_str()))
            .collect()
    }

    pub async fn results_of(&self, submission: &SubmissionId) -> Vec<Stored> {
        let subject = Subject::Call {
            ns: self.cx.ns.clone(),
            submission: submission.clone(),
        };
        self.bus
            .all_on(&self.log(), &subject, 10_000)
            .await
            .unwrap()
    }
}

pub fn worker_cx(cx: &WorkerCx, role: WorkerRole, node: &str, index: u32) -> WorkerCx {
    let id = WorkerId {
        node: NodeName::new(node).unwrap(),
        role,
        index,
    };
    WorkerCx::new(
        id,
        cx.bus.clone(),
        cx.ns.clone(),
        cx.data_dir.clone(),
        Arc::new(NoControl),
        CancellationToken::new(),
    )
}

/// A gzipped tar of some files.
pub fn bundle(files: &[(&str, &str)]) -> Bytes {
    let gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut tar = tar::Builder::new(gz);
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, content.as_bytes())
            .unwrap();
    }
    tar.into_inner().unwrap().finish().unwrap().into()
}

/// A conversation, as a client leads it.
#[derive(Clone)]
pub struct Session {
    pub agent: AgentName,
    pub session: SessionId,
    pub branch: BranchName,
    pub parent: NodeHash,
    pub previous: Option<SubmissionId>,
    pub state: Option<StateRoot>,
    pub turn: u64,
    /// The last message on the branch.
    pub head: u64,
    pub timeout_ms: u64,
}

/// A turn that was sent.
pub struct Sent {
    pub submission: SubmissionId,
    pub hash: NodeHash,
    seen: vlinder_bus::Seen,
}

/// A turn that has ended.
pub struct Ended {
    pub end: End,
    pub stored: Stored,
    pub body: Bytes,
    pub submission: SubmissionId,
    pub invoke: NodeHash,
}

impl Ended {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The output of a turn that ended well.
    #[track_caller]
    pub fn done(&self) -> String {
        assert_eq!(
            self.end.outcome,
            Outcome::Done,
            "{:?}: {}",
            self.end.code,
            self.text()
        );
        self.text()
    }

    #[track_caller]
    pub fn failed(&self, code: &str) -> String {
        let found = (self.end.outcome, self.end.code.as_deref());
        assert_eq!(found, (Outcome::Failed, Some(code)), "{}", self.text());
        self.text()
    }
}

impl Session {
    pub async fn send(&mut self, bed: &Bed, input: impl Into<Bytes>) -> Sent {
        let submission = SubmissionId::fresh();
        let filter = subjects::answers_of(&bed.cx.ns, &submission);
        let seen = bed.bus.seen(&filter).await.unwrap();
        let invoke = Invoke {
            namespace: bed.cx.ns.clone(),
            agent: self.agent.clone(),
            session: self.session.clone(),
            branch: self.branch.clone(),
            submission: submission.clone(),
            turn: self.turn,
            previous: self.previous.clone(),
            state: self.state,
            timeout_ms: self.timeout_ms,
            origin: None,
            source: None,
        };
        let input = input.into();
        let node = invoke.to_node(vec![self.parent], &input);
        let subject = Subject::Invoke {
            ns: bed.cx.ns.clone(),
            agent: self.agent.clone(),
            session: self.session.clone(),
            branch: self.branch.clone(),
        };
        let message = Message::new(bed.log(), subject, node, input).expecting(self.head);
        let appended = bed.bus.append(message).await.unwrap();
        self.head = appended.seq;
        Sent {
            submission,
            hash: appended.hash,
            seen,
        }
    }

    /// Waits for the end of a turn and goes on from there.
    pub async fn end(&mut self, bed: &Bed, mut sent: Sent) -> Ended {
        let subject = Subject::End {
            ns: bed.cx.ns.clone(),
            submission: sent.submission.clone(),
        };
        let wait = async {
            loop {
                let next = tokio::time::timeout(Duration::from_secs(1), sent.seen.next()).await;
                let stored = match next {
                    Ok(Some(stored)) => Some(stored),
                    // The connection may have lost it.
                    _ => bed.bus.last(&bed.log(), &subject).await.unwrap(),
                };
                if let Some(stored) = stored
                    && let Ok(end) = End::try_from(&stored.node)
                {
                    return (end, stored);
                }
            }
        };
        let (end, stored) = within("a turn", wait).await;
        let body = bed.bus.load(&stored.body).await.unwrap();
        self.parent = stored.hash;
        self.previous = Some(sent.submission.clone());
        self.state = end.state;
        self.turn += 1;
        Ended {
            end,
            stored,
            body,
            submission: sent.submission,
            invoke: sent.hash,
        }
    }

    pub async fn say(&mut self, bed: &Bed, input: impl Into<Bytes>) -> Ended {
        let sent = self.send(bed, input).await;
        self.end(bed, sent).await
    }
}

/// Waits until a file has at least so many bytes; what is in it.
pub async fn file_of(path: PathBuf, len: usize) -> String {
    let what = format!("writing {}", path.display());
    let read = async {
        loop {
            if let Ok(text) = std::fs::read_to_string(&path)
                && text.len() >= len
            {
                return text;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within(&what, read).await
}

/// Whether a process lives.
pub fn lives(pid: u32) -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

pub async fn gone(pid: u32) {
    let wait = async {
        while lives(pid) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within(&format!("the end of process {pid}"), wait).await;
}
