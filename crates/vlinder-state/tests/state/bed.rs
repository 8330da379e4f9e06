//! A bus, a state worker, and emitters that append what harness, bridge, services and runtime append.

use bytes::Bytes;
use futures::StreamExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tonic::{Request as Rpc, Status};
use vlinder_bus::backend::Raw;
use vlinder_bus::local::{LocalBus, LocalOptions};
use vlinder_bus::wire::{NOTE_ATTEMPT, NOTE_BY};
use vlinder_bus::{Appended, Bus, Message, StreamName, Subject};
use vlinder_core::hash::call_key;
use vlinder_core::record::{
    BranchStart, CallResult, CallStatus, End, Invoke, Outcome, Request, SessionEvent, SessionVerb,
};
use vlinder_core::{
    AgentName, BranchName, CallKey, Kind, Namespace, Node, NodeHash, Selector, SessionId,
    SubmissionId, WorkerRole,
};
use vlinder_proto::state as proto;
use vlinder_proto::state::state_server::State;
use vlinder_state::{StateService, StateWorker};
use vlinder_worker::cx::NoControl;
use vlinder_worker::{WorkerCx, WorkerId};

/// How long a test waits for a condition.
pub const DEADLINE: Duration = Duration::from_secs(20);

pub struct Bed {
    pub dir: Arc<tempfile::TempDir>,
    pub bus: Bus,
    pub cx: WorkerCx,
    pub state: StateService,
    worker: Option<StateWorker>,
}

impl Bed {
    pub async fn start() -> Self {
        Self::on(Arc::new(tempfile::tempdir().unwrap())).await
    }

    /// A bus and a state worker on the files in `dir`.
    pub async fn on(dir: Arc<tempfile::TempDir>) -> Self {
        let local = LocalBus::open(LocalOptions::new(dir.path().join("bus.db"))).await;
        let bus = Bus::new(local.unwrap());
        bus.prepare(&ns()).await.unwrap();
        let id = WorkerId {
            node: "here".parse().unwrap(),
            role: WorkerRole::State,
            index: 0,
        };
        let cx = WorkerCx::new(
            id,
            bus.clone(),
            ns(),
            Arc::from(dir.path()),
            Arc::new(NoControl),
            CancellationToken::new(),
        );
        let worker = StateWorker::start(&cx, StateWorker::db_path(dir.path(), 0))
            .await
            .unwrap();
        Self {
            dir,
            bus,
            cx,
            state: worker.service(),
            worker: Some(worker),
        }
    }

    /// A second state worker on a file of its own.
    pub async fn another(&self, index: u32) -> StateWorker {
        let path = StateWorker::db_path(self.dir.path(), index);
        StateWorker::start(&self.cx, path).await.unwrap()
    }

    pub fn db_path(&self) -> PathBuf {
        StateWorker::db_path(self.dir.path(), 0)
    }

    pub fn bus_path(&self) -> PathBuf {
        self.dir.path().join("bus.db")
    }

    /// Ends the worker in good order and closes the bus; the files stay.
    pub async fn stop(mut self) -> Arc<tempfile::TempDir> {
        self.stop_worker().await;
        self.bus.close().await;
        self.dir.clone()
    }

    pub async fn stop_worker(&mut self) {
        let stop = CancellationToken::new();
        stop.cancel();
        let worker = self.worker.take().unwrap();
        tokio::time::timeout(DEADLINE, worker.run(stop))
            .await
            .expect("the worker stops")
            .unwrap();
    }

    /// Runs the worker again on the same file.
    pub async fn start_worker(&mut self) {
        let worker = StateWorker::start(&self.cx, self.db_path()).await.unwrap();
        self.state = worker.service();
        self.worker = Some(worker);
    }

    pub async fn append(&self, message: Message) -> Appended {
        self.bus.append(message).await.unwrap()
    }

    /// Appends bytes that are no node of ours.
    pub async fn append_raw(&self, stream: StreamName, subject: &str, body: &[u8]) -> u64 {
        let raw = Raw {
            subject: subject.to_owned(),
            headers: vec![("Vlinder-Version".into(), "1".into())],
            body: Bytes::copy_from_slice(body),
            id: format!("raw:{subject}:{}", body.len()),
            expect_last: None,
        };
        self.bus.backend().append(&stream, &raw).await.unwrap().seq
    }

    pub async fn session(&self, id: &str, name: &str) -> Line {
        let event = SessionEvent {
            namespace: ns(),
            session: session_id(id),
            agent: agent(),
            name: if name.is_empty() { id } else { name }.to_owned(),
            verb: SessionVerb::Start,
        };
        let done = self.session_event(&event, vec![], 0).await;
        Line {
            session: session_id(id),
            branch: BranchName::main(),
            parent: done.hash,
            previous: None,
            turns: 0,
            head: 0,
            event: done,
            name: event.name,
        }
    }

    async fn session_event(
        &self,
        event: &SessionEvent,
        parents: Vec<NodeHash>,
        last: u64,
    ) -> Appended {
        let subject = Subject::Session {
            ns: ns(),
            session: event.session.clone(),
        };
        let message = Message::new(ctl(), subject, event.to_node(parents, b""), Bytes::new());
        self.append(message.expecting(last)).await
    }

    /// A branch that begins after `ended`, which is a turn of `line`.
    pub async fn fork(&self, line: &mut Line, ended: &Ended, name: &str) -> Line {
        let branch = BranchName::new(name).unwrap();
        let event = SessionEvent {
            namespace: ns(),
            session: line.session.clone(),
            agent: agent(),
            name: line.name.clone(),
            verb: SessionVerb::Fork(BranchStart {
                branch: branch.clone(),
                of: line.branch.clone(),
                from: ended.hash,
                submission: Some(ended.submission.clone()),
            }),
        };
        line.event = self
            .session_event(&event, vec![line.event.hash], line.event.seq)
            .await;
        Line {
            session: line.session.clone(),
            branch,
            parent: ended.hash,
            previous: Some(ended.submission.clone()),
            turns: ended.number + 1,
            head: 0,
            event: line.event,
            name: line.name.clone(),
        }
    }

    /// Seals `line` and makes `branch` the default.
    pub async fn promote(&self, line: &mut Line, branch: &str) {
        let seal = Node::new(Kind::Seal, vec![line.parent], b"").with("branch", &line.branch);
        let message = Message::new(log(), line.subject(), seal, Bytes::new());
        self.append(message.expecting(line.head)).await;
        let event = SessionEvent {
            namespace: ns(),
            session: line.session.clone(),
            agent: agent(),
            name: line.name.clone(),
            verb: SessionVerb::Promote {
                branch: BranchName::new(branch).unwrap(),
                sealed: None,
            },
        };
        line.event = self
            .session_event(&event, vec![line.event.hash], line.event.seq)
            .await;
    }

    /// The harness begins a turn.
    pub async fn begin(&self, line: &mut Line, submission: &str, input: &[u8]) -> OpenTurn {
        let (message, mut turn) = line.invoke(submission, input);
        let done = self.append(message.expecting(line.head)).await;
        turn.seq = done.seq;
        line.head = done.seq;
        turn
    }

    /// The bridge asks a service for the agent.
    pub async fn ask(&self, turn: &OpenTurn, operation: &str, body: &[u8]) -> Asked {
        self.ask_after(turn, turn.maximal.clone(), operation, body)
            .await
    }

    /// The same, where other results had been given to the agent.
    pub async fn ask_after(
        &self,
        turn: &OpenTurn,
        parents: Vec<NodeHash>,
        operation: &str,
        body: &[u8],
    ) -> Asked {
        let (message, asked) = turn.request(parents, operation, body);
        self.append(message).await;
        asked
    }

    /// A service answers; the agent is given the answer.
    pub async fn answer(&self, turn: &mut OpenTurn, asked: &Asked, body: &[u8]) -> NodeHash {
        let hash = self.answer_unheard(turn, asked, body).await;
        turn.maximal = vec![hash];
        hash
    }

    /// A service answers; the agent is not given the answer.
    pub async fn answer_unheard(&self, turn: &OpenTurn, asked: &Asked, body: &[u8]) -> NodeHash {
        let message = turn.result(asked, body);
        self.append(message).await.hash
    }

    /// The runtime ends the turn.
    pub async fn end(&self, line: &mut Line, turn: &OpenTurn, reply: &[u8]) -> Ended {
        let done = self.end_as(turn, Outcome::Done, None, reply).await;
        line.parent = done.hash;
        line.previous = Some(turn.submission.clone());
        line.turns += 1;
        Ended {
            hash: done.hash,
            submission: turn.submission.clone(),
            number: turn.number,
        }
    }

    /// Somebody ends the turn, somehow.
    pub async fn end_as(
        &self,
        turn: &OpenTurn,
        outcome: Outcome,
        code: Option<&str>,
        reply: &[u8],
    ) -> Appended {
        self.append(turn.end(outcome, code, reply)).await
    }

    /// A turn with a kv call and an inference call.
    pub async fn turn(&self, line: &mut Line, submission: &str) -> Ended {
        let mut turn = self.begin(line, submission, b"hello").await;
        for (operation, answer) in [("put", &b"{}"[..]), ("chat", b"hi")] {
            let asked = self.ask(&turn, operation, submission.as_bytes()).await;
            self.answer(&mut turn, &asked, answer).await;
        }
        self.end(line, &turn, b"hi").await
    }

    pub async fn get_session(&self, session: &str) -> Result<proto::Session, Status> {
        let request = proto::GetSessionRequest {
            session: session.into(),
            ..Default::default()
        };
        self.session_page(request).await
    }

    pub async fn session_page(
        &self,
        request: proto::GetSessionRequest,
    ) -> Result<proto::Session, Status> {
        let answer = self.state.get_session(Rpc::new(request)).await?;
        Ok(answer.into_inner())
    }

    pub async fn get_turn(&self, submission: &str) -> Result<proto::TurnDetail, Status> {
        turn_of(&self.state, submission).await
    }

    pub async fn list_turns(&self, all: bool) -> Vec<proto::TurnSummary> {
        let request = proto::ListTurnsRequest {
            all,
            ..Default::default()
        };
        let answer = self.state.list_turns(Rpc::new(request)).await.unwrap();
        answer.into_inner().turns
    }

    pub async fn branches(&self, session: &str) -> Vec<proto::Branch> {
        let request = proto::ListBranchesRequest {
            session: session.into(),
            ..Default::default()
        };
        let answer = self.state.list_branches(Rpc::new(request)).await.unwrap();
        answer.into_inner().branches
    }

    pub async fn verify(&self, session: &str) -> proto::VerifySessionResponse {
        let request = proto::VerifySessionRequest {
            session: session.into(),
            ..Default::default()
        };
        let answer = self.state.verify_session(Rpc::new(request)).await.unwrap();
        answer.into_inner()
    }

    pub async fn body(&self, hash: &str) -> Result<Vec<u8>, Status> {
        let request = proto::GetBodyRequest {
            hash: hash.into(),
            ..Default::default()
        };
        let mut pieces = self.state.get_body(Rpc::new(request)).await?.into_inner();
        let mut body = Vec::new();
        while let Some(piece) = pieces.next().await {
            body.extend(piece?.data);
        }
        Ok(body)
    }

    /// How the projection stands once it has caught up.
    pub async fn status(&self) -> proto::StatusResponse {
        caught_up_status(&self.state).await
    }
}

pub async fn turn_of(state: &StateService, submission: &str) -> Result<proto::TurnDetail, Status> {
    let request = proto::GetTurnRequest {
        submission: submission.into(),
        ..Default::default()
    };
    Ok(state.get_turn(Rpc::new(request)).await?.into_inner())
}

/// Waits until the projection has everything, then says how it stands, with its digest.
pub async fn caught_up_status(state: &StateService) -> proto::StatusResponse {
    let until = tokio::time::Instant::now() + DEADLINE;
    loop {
        // A list waits for the barrier, so this does not spin while nothing happens.
        let list = state
            .list_turns(Rpc::new(proto::ListTurnsRequest::default()))
            .await;
        let status = state
            .status(Rpc::new(proto::StatusRequest { digest: true }))
            .await;
        if let (Ok(_), Ok(status)) = (&list, &status) {
            let status = status.get_ref();
            if (status.log_seq, status.ctl_seq) == (status.log_last_seq, status.ctl_last_seq) {
                return status.clone();
            }
        }
        assert!(
            tokio::time::Instant::now() < until,
            "not caught up: {list:?} {status:?}"
        );
        tokio::task::yield_now().await;
    }
}

/// Where the next turn of a branch goes.
pub struct Line {
    pub session: SessionId,
    pub branch: BranchName,
    pub parent: NodeHash,
    pub previous: Option<SubmissionId>,
    pub turns: u64,
    pub head: u64,
    pub event: Appended,
    pub name: String,
}

impl Line {
    pub fn subject(&self) -> Subject {
        Subject::Invoke {
            ns: ns(),
            agent: agent(),
            session: self.session.clone(),
            branch: self.branch.clone(),
        }
    }

    pub fn invoke(&self, submission: &str, input: &[u8]) -> (Message, OpenTurn) {
        let invoke = Invoke {
            namespace: ns(),
            agent: agent(),
            session: self.session.clone(),
            branch: self.branch.clone(),
            submission: submission_id(submission),
            turn: self.turns,
            previous: self.previous.clone(),
            state: None,
            timeout_ms: 60_000,
            origin: None,
            source: None,
        };
        let node = invoke.to_node(vec![self.parent], input);
        let hash = node.hash();
        let message = Message::new(log(), self.subject(), node, Bytes::copy_from_slice(input));
        let turn = OpenTurn {
            submission: invoke.submission,
            session: invoke.session,
            branch: invoke.branch,
            invoke: hash,
            seq: 0,
            maximal: vec![hash],
            number: self.turns,
        };
        (message, turn)
    }
}

#[derive(Clone)]
pub struct OpenTurn {
    pub submission: SubmissionId,
    pub session: SessionId,
    pub branch: BranchName,
    pub invoke: NodeHash,
    pub seq: u64,
    pub maximal: Vec<NodeHash>,
    pub number: u64,
}

impl OpenTurn {
    pub fn request(
        &self,
        parents: Vec<NodeHash>,
        operation: &str,
        body: &[u8],
    ) -> (Message, Asked) {
        let (service, backend, selector) = match operation {
            "chat" => ("infer", "openai", "small-1"),
            _ => ("kv", "sqlite", "_"),
        };
        let key = call_key(service, operation, backend, selector, body, 0);
        let request = Request {
            namespace: ns(),
            submission: self.submission.clone(),
            agent: agent(),
            service: service.into(),
            backend: backend.into(),
            operation: operation.into(),
            selector: Selector::new(selector).unwrap(),
            key,
            k: 0,
            state: None,
            label: (operation == "put").then(|| "before".to_owned()),
            deadline_ms: u64::MAX,
        };
        let node = request.to_node(parents, body);
        let hash = node.hash();
        let subject = Subject::Req {
            ns: ns(),
            service: service.into(),
            backend: backend.into(),
            selector: request.selector,
        };
        let message = Message::new(log(), subject, node, Bytes::copy_from_slice(body));
        (message, Asked { hash, key })
    }

    pub fn result(&self, asked: &Asked, body: &[u8]) -> Message {
        let result = CallResult {
            submission: self.submission.clone(),
            key: asked.key,
            status: CallStatus::Ok,
            http: 200,
            content_type: "text/plain".into(),
            state: None,
            found: None,
            tokens_in: Some(7),
            tokens_out: Some(u64::MAX),
        };
        let subject = Subject::Call {
            ns: ns(),
            submission: self.submission.clone(),
        };
        let node = result.to_node(asked.hash, body);
        Message::new(log(), subject, node, Bytes::copy_from_slice(body))
            .note(NOTE_BY, "gpu/inference.openai/0")
            .note(NOTE_ATTEMPT, 2)
    }

    pub fn end(&self, outcome: Outcome, code: Option<&str>, reply: &[u8]) -> Message {
        let end = End {
            namespace: ns(),
            agent: agent(),
            session: self.session.clone(),
            branch: self.branch.clone(),
            submission: self.submission.clone(),
            outcome,
            state: None,
            code: code.map(str::to_owned),
        };
        let subject = Subject::End {
            ns: ns(),
            submission: self.submission.clone(),
        };
        let node = end.to_node(self.maximal.clone(), reply);
        Message::new(log(), subject, node, Bytes::copy_from_slice(reply))
            .note(NOTE_BY, "here/agent.process/1")
            .note(NOTE_ATTEMPT, 1)
    }
}

#[derive(Clone, Copy)]
pub struct Asked {
    pub hash: NodeHash,
    pub key: CallKey,
}

pub struct Ended {
    pub hash: NodeHash,
    pub submission: SubmissionId,
    pub number: u64,
}

pub fn ns() -> Namespace {
    Namespace::default_ns()
}

pub fn log() -> StreamName {
    StreamName::Log(ns())
}

pub fn ctl() -> StreamName {
    StreamName::Ctl(ns())
}

pub fn agent() -> AgentName {
    AgentName::new("echo").unwrap()
}

pub fn session_id(text: &str) -> SessionId {
    SessionId::new(text).unwrap()
}

pub fn submission_id(text: &str) -> SubmissionId {
    SubmissionId::new(text).unwrap()
}

/// The submissions of turns, in order.
pub fn submissions(turns: &[proto::Turn]) -> Vec<&str> {
    turns.iter().map(|turn| turn.submission.as_str()).collect()
}
