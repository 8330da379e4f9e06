//! The real model of `tests/tools/model_server.py` as an upstream that comes, goes and misbehaves.

use crate::support::faces;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// Loading the weights on a busy machine takes some seconds.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// The Python that has the model's runtime and the official clients.
pub fn python() -> PathBuf {
    let python = root().join(".tools/venv/bin/python");
    assert!(
        python.exists(),
        "no {}: run scripts/tools",
        python.display()
    );
    python
}

/// The root of the repository.
pub fn root() -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    root.canonicalize()
        .expect("the tests lie in the repository")
}

/// One model server; ends with the test.
pub struct Model {
    pub url: String,
    http: reqwest::Client,
    child: Child,
}

impl Model {
    /// Serves the weights under these names.
    pub async fn named(names: &[&str]) -> Self {
        Self::at(0, names).await
    }

    /// The same, for those who have a key.
    pub async fn with_key(names: &[&str], key: &str) -> Self {
        Self::started(0, names, &["--api-key", key]).await
    }

    /// The same, where containers reach it too.
    pub async fn for_containers(names: &[&str]) -> Self {
        Self::started(0, names, &["--host", "0.0.0.0"]).await
    }

    /// The same on a port of the caller's choice.
    pub async fn at(port: u16, names: &[&str]) -> Self {
        Self::started(port, names, &[]).await
    }

    async fn started(port: u16, names: &[&str], more: &[&str]) -> Self {
        let names = names.iter().flat_map(|name| ["--model-name", name]);
        let mut child = Command::new(python())
            .arg(root().join("tests/tools/model_server.py"))
            .args(["--port", &port.to_string(), "--until-stdin-closes"])
            .args(names)
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the model server can be started");
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().expect("it is piped"));
        let read = tokio::time::timeout(START_DEADLINE, stdout.read_line(&mut line)).await;
        read.expect("the model server is ready within a minute")
            .expect("its output can be read");
        let ready: Value = serde_json::from_str(&line)
            .expect("one JSON line when it is ready; is the model installed? run scripts/tools");
        Self {
            url: ready["base_url"]
                .as_str()
                .expect("it says where")
                .to_owned(),
            http: faces::client(false),
            child,
        }
    }

    /// Ends it, as a crash would.
    pub async fn kill(&mut self) {
        self.child.kill().await.expect("it can be killed");
    }

    /// The next call is answered with so many milliseconds between two tokens.
    pub async fn slow_once(&self, token_delay_ms: u64) {
        self.fault(json!({ "kind": "tokens", "token_delay_ms": token_delay_ms }))
            .await;
    }

    /// The next calls meet this fault.
    pub async fn fault(&self, fault: Value) {
        let order = json!({ "reset": true, "faults": [fault] });
        let url = format!("{}/__control", self.url);
        let said = self.http.post(url).body(order.to_string()).send().await;
        assert!(said.expect("it answers").status().is_success());
    }

    /// Its log of calls so far.
    pub async fn calls(&self) -> Vec<Value> {
        let url = format!("{}/__control/log", self.url);
        let said = self.http.get(url).send().await.expect("it answers");
        let log: Value = serde_json::from_slice(&said.bytes().await.expect("it answers")).unwrap();
        log["calls"].as_array().expect("a list").clone()
    }
}
