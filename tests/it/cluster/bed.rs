//! The nodes of a cluster, and what a client does with it.

use super::model::{Model, root};
use crate::support::{Node, NodeSpec};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tonic::Streaming;
use vlinder_proto::catalog::catalog_client::CatalogClient;
use vlinder_proto::catalog::{AvailableRequest, AvailableResponse};
use vlinder_proto::harness::harness_client::HarnessClient;
use vlinder_proto::harness::run_event::Event;
use vlinder_proto::harness::{End, RunEvent, RunRequest};
use vlinder_proto::registry::registry_client::RegistryClient;
use vlinder_proto::registry::{
    ListModelsRequest, ListNodesRequest, Model as Known, Node as Listed,
};
use vlinder_proto::state::state_client::StateClient;
use vlinder_proto::state::{CallDetail, GetTurnRequest, ListTurnsRequest, TurnDetail, TurnSummary};
use vlinder_testkit::NatsServer;

/// The credential that the nodes share.
const TOKEN: &str = "the-nodes-of-one-cluster-share-it";
/// What a change may take to show everywhere (features C4, E6, E9), with a busy machine's own second.
pub const FRESH: Duration = Duration::from_secs(6);
/// By then a silent node is not ready (`node.dead_after`, 5 s), with a busy machine's own second.
pub const DEAD: Duration = Duration::from_secs(6);
/// The next event of a turn comes within this, however slow the model is.
const EVENT_DEADLINE: Duration = Duration::from_secs(60);

/// The hub of interfaces.md §2: the defaults, a bus and a token. It stays on loopback, on free ports.
pub fn hub(nats: &NatsServer) -> NodeSpec {
    NodeSpec::on(nats)
        .var("VLINDER_AUTH_TOKEN", TOKEN)
        .workers("agent.process", 1)
        .workers("inference.ollama", 0)
        .fixed_ports()
}

/// The GPU node of interfaces.md §2: the variables of the example, and beside them only its name, where
/// the model is, and another port for HTTP, since the hub is on the same machine.
pub fn gpu_node(nats: &NatsServer, hub: &Node, ollama: &str) -> NodeSpec {
    let mut spec = NodeSpec::on(nats);
    for port in [
        "REGISTRY", "HARNESS", "STATE", "SECRET", "CATALOG", "BRIDGE",
    ] {
        spec = spec.without(&format!("VLINDER_DISTRIBUTED_PORTS_{port}"));
    }
    spec.var("VLINDER_DISTRIBUTED_REGISTRY_ADDR", hub.address("registry"))
        .var("VLINDER_AUTH_TOKEN", TOKEN)
        .workers("registry", 0)
        .workers("harness", 0)
        .workers("agent.container", 0)
        .workers("dag_git", 0)
        .workers("session_viewer", 0)
        .workers("storage.object.sqlite", 0)
        .workers("storage.vector.sqlite", 0)
        .workers("inference.ollama", 4)
        .var("VLINDER_OLLAMA_ENDPOINT", ollama)
}

/// A node with one inference worker and nothing else.
pub fn inference_node(nats: &NatsServer, hub: &Node, ollama: &str) -> NodeSpec {
    gpu_node(nats, hub, ollama).workers("inference.ollama", 1)
}

/// An agent that makes the call that its input names and says status and answer.
const ASK: &str = r#"
import http.client, json, os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

BRIDGE = urlsplit(os.environ["VLINDER_BRIDGE_URL"])

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply("ok")

    def do_POST(self):
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        path, _, data = text.splitlines()[-1].removeprefix("User: ").partition(" ")
        connection = http.client.HTTPConnection(BRIDGE.hostname, BRIDGE.port, timeout=120)
        connection.request("POST" if data else "GET", f"{BRIDGE.path}/{path}", data or None)
        response = connection.getresponse()
        self.reply(f"{response.status} {response.read().decode()}")

    def reply(self, text):
        self.send_response(200)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass

ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"#;

/// Writes an agent that may use every model into the directory of the test.
pub fn agent_in(home: &Path, name: &str, python: &str, source: &str) -> PathBuf {
    let dir = home.join(name);
    fs::create_dir_all(&dir).unwrap();
    let manifest = format!(
        "name = '{name}'\ndescription = 'For a test.'\nruntime = 'process'\nexecutable = '{python} agent.py'\n\
         [requirements.services.infer]\n[requirements.services.embed]\n"
    );
    fs::write(dir.join("agent.toml"), manifest).unwrap();
    fs::write(dir.join("agent.py"), source).unwrap();
    dir
}

/// One of the agents in `examples/`.
pub fn example(name: &str) -> PathBuf {
    root().join("examples").join(name)
}

/// A client of one node.
pub struct Client<'a>(pub &'a Node);

impl Client<'_> {
    /// Deploys an agent and waits until it is ready.
    pub async fn deploy(&self, dir: &Path) {
        let dir = dir.to_str().unwrap();
        let done = self.0.cli(&["agent", "deploy", "-p", dir, "--wait"]).await;
        done.code(0);
    }

    /// Deploys the agent that calls what it is told to.
    pub async fn deploy_ask(&self) {
        let dir = agent_in(self.0.spec().home(), "ask", "python3", ASK);
        self.deploy(&dir).await;
    }

    /// Begins a turn.
    pub async fn run(&self, request: RunRequest) -> Turn {
        let mut harness = HarnessClient::new(self.0.grpc("harness"));
        let began = Instant::now();
        let mut events = harness.run(request).await.unwrap().into_inner();
        let first = next_event(&mut events).await;
        let Event::Accepted(accepted) = first else {
            panic!("a turn begins with {first:?}");
        };
        Turn {
            submission: accepted.submission,
            events,
            began,
            chunks: vec![],
        }
    }

    /// A turn of an agent in a session, to its end.
    pub async fn say(&self, agent: &str, session: &str, text: &str) -> End {
        let request = request(agent, session, text);
        self.run(request).await.end().await
    }

    /// What the bridge answers to a call of the asking agent: the status and the body.
    pub async fn ask(&self, path: &str, body: &serde_json::Value) -> (u16, String) {
        let text = match body.is_null() {
            true => path.to_owned(),
            false => format!("{path} {body}"),
        };
        let end = self.say("ask", "", &text).await;
        let output = String::from_utf8(end.output.clone()).unwrap();
        assert_eq!(end.outcome, "done", "{} {output}", end.code);
        let (status, body) = output.split_once(' ').unwrap();
        (status.parse().unwrap(), body.to_owned())
    }

    /// One turn with its calls.
    pub async fn turn(&self, submission: &str) -> TurnDetail {
        let mut state = StateClient::new(self.0.grpc("state"));
        let request = GetTurnRequest {
            submission: submission.to_owned(),
            ..GetTurnRequest::default()
        };
        state.get_turn(request).await.unwrap().into_inner()
    }

    /// The calls of the last turn of a session.
    pub async fn last_calls(&self, session: &str) -> Vec<CallDetail> {
        let shown = self.0.cli(&["session", "get", session, "-o", "json"]).await;
        let shown = shown.code(0).json();
        let turns = shown["turns"].as_array().unwrap();
        let submission = turns.last().unwrap()["submission"].as_str().unwrap();
        self.turn(submission).await.calls
    }

    /// Turns that run or wait.
    pub async fn open_turns(&self) -> Vec<TurnSummary> {
        let mut state = StateClient::new(self.0.grpc("state"));
        let listed = state.list_turns(ListTurnsRequest::default()).await;
        listed.unwrap().into_inner().turns
    }

    /// The nodes, by name.
    pub async fn nodes(&self) -> Vec<Listed> {
        let mut registry = RegistryClient::new(self.0.grpc("registry"));
        let listed = registry.list_nodes(ListNodesRequest {}).await;
        listed.unwrap().into_inner().nodes
    }

    /// `(name, is ready)` of each node; what cannot be had is none.
    pub async fn ready_nodes(&self) -> Vec<String> {
        let mut registry = RegistryClient::new(self.0.grpc("registry"));
        let Ok(listed) = registry.list_nodes(ListNodesRequest {}).await else {
            return vec![];
        };
        let ready = |node: &Listed| node.state == "ready";
        let nodes = listed.into_inner().nodes.into_iter();
        nodes.filter(ready).map(|node| node.name).collect()
    }

    /// What can be had now, as the catalog has it.
    pub async fn catalog(&self) -> AvailableResponse {
        let mut catalog = CatalogClient::new(self.0.grpc("catalog"));
        let available = catalog.available(AvailableRequest::default()).await;
        available.unwrap().into_inner()
    }

    /// `name@node` of each model that can be had now.
    pub async fn available(&self) -> Vec<String> {
        let models = self.catalog().await.models.into_iter();
        models
            .map(|model| format!("{}@{}", model.name, model.node))
            .collect()
    }

    /// The models that the registry knows.
    pub async fn known_models(&self) -> Vec<Known> {
        let mut registry = RegistryClient::new(self.0.grpc("registry"));
        let listed = registry.list_models(ListModelsRequest::default()).await;
        listed.unwrap().into_inner().models
    }
}

/// A request for a turn with a name of its own.
pub fn request(agent: &str, session: &str, text: &str) -> RunRequest {
    RunRequest {
        agent: agent.to_owned(),
        session: session.to_owned(),
        input: text.as_bytes().to_vec(),
        ..RunRequest::default()
    }
}

async fn next_event(events: &mut Streaming<RunEvent>) -> Event {
    let next = tokio::time::timeout(EVENT_DEADLINE, events.message()).await;
    let event = next
        .unwrap_or_else(|_| panic!("no event of the turn within {EVENT_DEADLINE:?}"))
        .expect("the stream does not fail")
        .expect("the stream does not end before the turn");
    event.event.expect("no event is empty")
}

/// A turn that runs.
pub struct Turn {
    pub submission: String,
    events: Streaming<RunEvent>,
    began: Instant,
    chunks: Vec<Vec<u8>>,
}

impl Turn {
    /// Waits for so many pieces of the reply.
    pub async fn chunks(&mut self, count: usize) {
        while self.chunks.len() < count {
            match next_event(&mut self.events).await {
                Event::Chunk(chunk) => self.chunks.push(chunk.text),
                other => panic!("{} pieces, then {other:?}", self.chunks.len()),
            }
        }
    }

    /// Waits until the client is told why the turn waits; the reason, and how long that took.
    pub async fn waits(&mut self) -> (String, Duration) {
        loop {
            match next_event(&mut self.events).await {
                Event::Waiting(waiting) => return (waiting.reason, self.began.elapsed()),
                Event::Chunk(chunk) => self.chunks.push(chunk.text),
                other => panic!("expected a reason to wait, got {other:?}"),
            }
        }
    }

    /// Waits for the end.
    pub async fn end(self) -> End {
        self.end_with_text().await.0
    }

    /// Waits for the end; it, the text of all pieces, and how many there were.
    pub async fn end_with_text(mut self) -> (End, String, usize) {
        loop {
            match next_event(&mut self.events).await {
                Event::End(end) => {
                    let text = String::from_utf8(self.chunks.concat()).unwrap();
                    return (end, text, self.chunks.len());
                }
                Event::Chunk(chunk) => self.chunks.push(chunk.text),
                Event::Waiting(_) | Event::Accepted(_) => {}
            }
        }
    }
}

/// The text of a successful end.
#[track_caller]
pub fn said(end: &End) -> String {
    let text = String::from_utf8_lossy(&end.output).into_owned();
    assert_eq!(end.outcome, "done", "{}: {text}", end.code);
    text
}

/// A model server with the model of the examples.
pub async fn smollm() -> Model {
    Model::named(&["smollm2:135m"]).await
}
