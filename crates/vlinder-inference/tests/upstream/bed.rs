//! A worker over the embedded bus, and a client that asks as the bridge does.

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use serde_json::Value;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use vlinder_bus::local::{LocalBus, LocalOptions};
use vlinder_bus::nats::NatsOptions;
use vlinder_bus::{Bus, Message, Signal, Stored, StreamName, Subject, subjects};
use vlinder_core::hash::call_key;
use vlinder_core::record::{CallResult, End, Outcome, Request};
use vlinder_core::{
    AgentName, BranchName, Namespace, NodeHash, NodeName, Selector, SessionId, SubmissionId,
    WorkerRole,
};
use vlinder_inference::Options;
use vlinder_testkit::NatsServer;
use vlinder_worker::offers::{self, Offer};
use vlinder_worker::{Control, WorkerCx, WorkerId};

/// No test waits longer for anything: a short answer of the model on a busy machine takes seconds.
const DEADLINE: Duration = Duration::from_secs(60);

/// Remembers what the worker last said of itself.
struct Said(watch::Sender<String>);

impl Control for Said {
    fn ready(&self) {
        self.0.send_replace("ready".to_owned());
    }
    fn waiting(&self, reason: &str) {
        self.0.send_replace(format!("waiting: {reason}"));
    }
    fn held(&self, _: &str) {}
    fn released(&self, _: &str) {}
    fn note(&self, _: &str, _: &str) {}
}

pub struct Bed {
    pub bus: Bus,
    ns: Namespace,
    directory: tempfile::TempDir,
    asked: AtomicU64,
}

pub struct Worker {
    said: watch::Receiver<String>,
    drain: CancellationToken,
    task: JoinHandle<Result<(), vlinder_worker::Error>>,
}

/// One question.
pub struct Ask<'a> {
    pub service: &'a str,
    pub backend: &'a str,
    pub operation: &'a str,
    pub model: &'a str,
    pub body: String,
    pub timeout: Duration,
}

/// A question on its way.
pub struct Asked {
    bus: Bus,
    pub submission: SubmissionId,
    pub hash: NodeHash,
    answers: BoxStream<'static, Stored>,
    pieces: BoxStream<'static, Signal>,
}

/// An answer.
pub struct Got {
    pub result: CallResult,
    pub body: Bytes,
    /// The streamed pieces, put together by their offsets.
    pub streamed: Vec<u8>,
    pub pieces: usize,
}

impl Got {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("the answer is JSON")
    }
}

impl Bed {
    pub async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = LocalOptions::new(directory.path().join("bus.db"));
        Self::over(Bus::new(LocalBus::open(options).await.unwrap()), directory).await
    }

    pub async fn start_on(server: &NatsServer) -> Self {
        let options = NatsOptions {
            urls: vec![server.url()],
            max_bytes: 256 * 1024 * 1024,
            name: "test".to_owned(),
            ..NatsOptions::default()
        };
        let nats = vlinder_bus::nats::connect(options, DEADLINE).await.unwrap();
        Self::over(Bus::new(nats), tempfile::tempdir().unwrap()).await
    }

    async fn over(bus: Bus, directory: tempfile::TempDir) -> Self {
        let ns = Namespace::default_ns();
        bus.prepare(&ns).await.unwrap();
        Self {
            bus,
            ns,
            directory,
            asked: AtomicU64::new(0),
        }
    }

    pub fn log(&self) -> StreamName {
        StreamName::Log(self.ns.clone())
    }

    pub fn cx(&self, node: &str, control: Arc<dyn Control>, drain: CancellationToken) -> WorkerCx {
        let id = WorkerId {
            node: NodeName::new(node).unwrap(),
            role: WorkerRole::InferenceOllama,
            index: 0,
        };
        let directory = Arc::from(self.directory.path());
        WorkerCx::new(
            id,
            self.bus.clone(),
            self.ns.clone(),
            directory,
            control,
            drain,
        )
    }

    /// A worker on a node of its own.
    pub fn worker(&self, node: &str, options: Options) -> Worker {
        let (sender, said) = watch::channel("starting".to_owned());
        let drain = CancellationToken::new();
        let cx = self.cx(node, Arc::new(Said(sender)), drain.clone());
        Worker {
            said,
            drain,
            task: tokio::spawn(vlinder_inference::run(cx, options)),
        }
    }

    /// Asks in a turn of its own.
    pub async fn ask(&self, ask: Ask<'_>) -> Asked {
        let k = self.asked.fetch_add(1, Ordering::Relaxed);
        let (service, operation, backend) = (ask.service, ask.operation, ask.backend);
        let body = Bytes::from(ask.body);
        let request = Request {
            namespace: self.ns.clone(),
            submission: SubmissionId::fresh(),
            agent: AgentName::new("tester").unwrap(),
            service: service.to_owned(),
            backend: backend.to_owned(),
            operation: operation.to_owned(),
            selector: Selector::new(ask.model).unwrap(),
            key: call_key(service, operation, backend, ask.model, &body, k),
            k,
            state: None,
            label: None,
            deadline_ms: self.bus.now_ms() + ask.timeout.as_millis() as u64,
        };
        let submission = request.submission.clone();
        let call = Subject::Call {
            ns: self.ns.clone(),
            submission: submission.clone(),
        };
        let answers = self.bus.seen(&call.to_string()).await.unwrap();
        let signal = subjects::answer_signal(&self.ns, &submission, &request.key);
        let pieces = self.bus.signals(&signal).await.unwrap();
        let subject = Subject::Req {
            ns: self.ns.clone(),
            service: service.to_owned(),
            backend: backend.to_owned(),
            selector: request.selector.clone(),
        };
        let node = request.to_node(vec![], &body);
        let message = Message::new(self.log(), subject, node, body);
        let hash = self.bus.append(message).await.unwrap().hash;
        Asked {
            bus: self.bus.clone(),
            submission,
            hash,
            answers,
            pieces,
        }
    }

    /// Ends the turn of a question.
    pub async fn end(&self, asked: &Asked) {
        let end = End {
            namespace: self.ns.clone(),
            agent: AgentName::new("tester").unwrap(),
            session: SessionId::new("s-1").unwrap(),
            branch: BranchName::main(),
            submission: asked.submission.clone(),
            outcome: Outcome::Cancelled,
            state: None,
            code: None,
        };
        let subject = Subject::End {
            ns: self.ns.clone(),
            submission: asked.submission.clone(),
        };
        let node = end.to_node(vec![asked.hash], b"");
        let message = Message::new(self.log(), subject, node, Bytes::new());
        self.bus.append(message).await.unwrap();
    }

    pub async fn offers(&self) -> Vec<Offer> {
        offers::read_all(&self.bus).await.unwrap()
    }

    /// Nothing is held and nothing waits in any queue.
    pub async fn wait_until_idle(&self) {
        let deadline = tokio::time::Instant::now() + DEADLINE;
        loop {
            let queues = self.bus.queues(&self.log()).await.unwrap();
            if queues
                .iter()
                .all(|queue| queue.waiting == 0 && queue.held == 0)
            {
                return;
            }
            assert!(
                tokio::time::Instant::now() < deadline,
                "still busy: {queues:?}"
            );
            tokio::task::yield_now().await;
        }
    }
}

impl Asked {
    /// Waits for the answer and for the rest of its pieces.
    pub async fn answer(mut self) -> Got {
        let stored = tokio::time::timeout(DEADLINE, self.answers.next())
            .await
            .expect("an answer within a minute")
            .expect("the bus is open");
        let result = CallResult::try_from(&stored.node).unwrap();
        assert_eq!(stored.node.parents, [self.hash]);
        let body = self.bus.load(&stored.body).await.unwrap();
        let (mut streamed, mut pieces) = (Vec::new(), 0);
        let patience = Duration::from_millis(200);
        while let Ok(Some(piece)) = tokio::time::timeout(patience, self.pieces.next()).await {
            let offset = u64::from_be_bytes(piece.body[..8].try_into().unwrap());
            assert_eq!(offset, streamed.len() as u64, "a piece out of place");
            assert!(piece.body.len() <= 16 + 32 * 1024);
            streamed.extend_from_slice(&piece.body[16..]);
            pieces += 1;
            if streamed.len() == body.len() {
                break;
            }
        }
        Got {
            result,
            body,
            streamed,
            pieces,
        }
    }

    /// Whether an answer has come by now.
    pub async fn is_answered_within(&mut self, patience: Duration) -> bool {
        tokio::time::timeout(patience, self.answers.next())
            .await
            .is_ok()
    }

    /// Waits for the first streamed piece.
    pub async fn first_piece(&mut self) {
        tokio::time::timeout(DEADLINE, self.pieces.next())
            .await
            .expect("a piece within a minute");
    }
}

impl Worker {
    /// Waits until the worker says something that begins with `wanted`.
    pub async fn says(&self, wanted: &str) -> String {
        let mut said = self.said.clone();
        let found = said.wait_for(|said| said.starts_with(wanted));
        match tokio::time::timeout(DEADLINE, found).await {
            Ok(Ok(said)) => said.clone(),
            Ok(Err(_)) => panic!("expected {wanted:?}, the worker ended"),
            Err(_) => panic!(
                "expected {wanted:?}, the worker says {:?}",
                *self.said.borrow()
            ),
        }
    }

    /// Ends at once, as if its process had died: nothing is finished.
    pub async fn killed(self) {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
    }

    pub async fn drained(self) {
        self.drain.cancel();
        let ended = tokio::time::timeout(DEADLINE, self.task).await;
        ended.expect("drained in time").unwrap().unwrap();
    }
}
