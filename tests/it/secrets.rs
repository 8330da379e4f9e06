//! Secrets of agents and of model providers (features C3): who gets them, and where they are never seen.

use crate::cluster::bed::Client;
use crate::cluster::model::Model;
use crate::support::agents::{deploy, output, run, turn};
use crate::support::bins::{Finished, clean, finish, vlinder};
use crate::support::{Node, NodeSpec, wait_for};
use serde_json::json;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use vlinder_core::ContentHash;
use vlinder_testkit::{CURRENT, NatsServer};

/// A new value is in use within 5 s; tests share two cores.
const IN_USE: Duration = Duration::from_secs(8);
const VALUE: &str = "correct-horse-battery-staple";

/// Says what reading a secret gave, without the value.
const READER: &str = r#"
import hashlib, json, os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.request import Request, urlopen

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply("ok")

    def do_POST(self):
        name = self.rfile.read(int(self.headers["Content-Length"])).decode().rsplit("User: ", 1)[-1]
        url = os.environ["VLINDER_BRIDGE_URL"] + "/runtime/secret"
        try:
            answer = urlopen(Request(url, json.dumps({"name": name}).encode()))
            self.reply(f"{answer.status} {hashlib.sha256(answer.read()).hexdigest()}")
        except HTTPError as error:
            self.reply(f"{error.code} {json.load(error)['error']['message']}")

    def reply(self, text):
        self.send_response(200)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass

ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"#;

async fn put(spec: &NodeSpec, name: &str, value: &str) -> Finished {
    let file = spec.home().join("value");
    fs::write(&file, value).unwrap();
    let mut command: Command = clean(vlinder());
    command
        .args(["secret", "put", name])
        .env("HOME", spec.home())
        .env("VLINDER_DIR", spec.data_dir())
        .stdin(File::open(&file).unwrap());
    let done = finish(command).await;
    fs::remove_file(file).unwrap();
    done
}

fn reader(node: &Node) -> PathBuf {
    let directory = node.spec().home().join("reader");
    fs::create_dir_all(&directory).unwrap();
    let manifest = "name = 'reader'\ndescription = 'For a test.'\nruntime = 'process'\nexecutable = 'python3 agent.py'\n\
        [requirements]\nsecrets = ['door.code', 'other_one']\n";
    fs::write(directory.join("agent.toml"), manifest).unwrap();
    fs::write(directory.join("agent.py"), READER).unwrap();
    directory
}

/// Files below a directory that hold the bytes.
fn holding(directory: &Path, bytes: &[u8], found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            holding(&path, bytes, found);
        } else if kind.is_file() {
            let content = fs::read(&path).unwrap_or_default();
            if content.windows(bytes.len()).any(|window| window == bytes) {
                found.push(path);
            }
        }
    }
}

async fn agents_read_what_their_manifest_names(spec: NodeSpec) {
    let node = spec.start().await;
    let directory = reader(&node);
    let shown = directory.display().to_string();
    let refused = node.cli(&["agent", "deploy", "-p", &shown]).await.code(9);
    assert!(
        refused.stderr.contains("door.code, other_one"),
        "{refused:#?}"
    );
    put(node.spec(), "door.code", VALUE).await.code(0);
    put(node.spec(), "other_one", "x").await.code(0);
    put(node.spec(), "not-named", "y").await.code(0);
    deploy(&node, &directory).await;

    let read = turn(&node, "reader", "s", "door.code").await;
    let hash = format!("200 {}", ContentHash::of(VALUE.as_bytes()));
    assert_eq!(output(&read), hash);
    // The record says that it was read, in which version, and not what it says.
    let submission = read["submission"].as_str().unwrap();
    let told = node
        .cli(&["turn", "get", submission, "-o", "json"])
        .await
        .code(0)
        .json();
    let call = &told["calls"][0];
    assert_eq!(
        (&call["service"], &call["model"]),
        (&json!("secret"), &json!("door.code")),
        "{call}"
    );
    assert!(
        call["response"].as_str().unwrap().contains("version"),
        "{call}"
    );

    let said =
        async |name: &str| output(&run(&node, "reader", name, &[]).await.code(0).json()).to_owned();
    assert!(said("not-named").await.starts_with("403 "));
    assert!(said("../secret.key").await.starts_with("403 "));
    node.cli(&["secret", "delete", "other_one"]).await.code(0);
    let gone = said("other_one").await;
    assert!(
        gone.starts_with("404 ") && gone.contains("vlinder secret put"),
        "{gone}"
    );
    // A new value is read at once.
    put(node.spec(), "door.code", "another").await.code(0);
    assert_eq!(
        said("door.code").await,
        format!("200 {}", ContentHash::of(b"another"))
    );
    // A listing has names only.
    let listed = node.cli(&["secret", "list", "-o", "json"]).await.code(0);
    assert!(
        listed.stdout.contains("door.code") && !listed.stdout.contains("another"),
        "{listed:#?}"
    );

    let spec = node.stop_cleanly().await;
    let mut found = Vec::new();
    holding(spec.home(), VALUE.as_bytes(), &mut found);
    assert_eq!(
        found,
        Vec::<PathBuf>::new(),
        "the value stands in these files"
    );
}

#[tokio::test]
async fn agents_read_what_their_manifest_names_embedded() {
    agents_read_what_their_manifest_names(NodeSpec::embedded()).await;
}

#[tokio::test]
async fn agents_read_what_their_manifest_names_on_nats() {
    let nats = NatsServer::start(CURRENT).await;
    agents_read_what_their_manifest_names(NodeSpec::on(&nats).workers("agent.process", 1)).await;
}

/// The key of a provider comes from the secret that is called like its key in the configuration.
#[tokio::test]
async fn keys_of_providers_are_secrets() {
    let model = Model::with_key(&["smollm2:135m"], "the-key").await;
    let node = NodeSpec::embedded()
        .workers("inference.ollama", 0)
        .workers("inference.openai", 1)
        .var("VLINDER_OPENAI_ENDPOINT", format!("{}/v1", model.url))
        .start()
        .await;
    let client = Client(&node);
    client.deploy_ask().await;
    let reason = async || {
        let workers = node.workers().await;
        let worker = workers
            .iter()
            .find(|worker| worker.role == "inference.openai");
        worker
            .map(|worker| worker.reason.clone())
            .unwrap_or_default()
    };
    wait_for("the worker says what it lacks", IN_USE, reason, |why| {
        why.contains("openai.api_key")
    })
    .await;
    put(node.spec(), "openai.api_key", "the-key\n")
        .await
        .code(0);
    wait_for("the key is in use", IN_USE, reason, |why| why.is_empty()).await;
    let body = json!({ "model": "smollm2:135m", "max_tokens": 3, "messages": [{ "role": "user", "content": "Hi" }] });
    let (status, answer) = client.ask("openai/v1/chat/completions", &body).await;
    assert_eq!(status, 200, "{answer}");
    put(node.spec(), "openai.api_key", "a-wrong-one")
        .await
        .code(0);
    wait_for("the new key is in use", IN_USE, reason, |why| {
        why.contains("401")
    })
    .await;
    node.stop_cleanly().await;
}
