//! The real model of `tests/tools/model_server.py`, with the faults that it makes on demand.

use serde_json::{Value, json};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// Loading the weights on a busy machine takes some seconds.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// One model server; ends with the test.
pub struct Model {
    pub url: String,
    http: reqwest::Client,
    _child: Child,
}

impl Model {
    pub async fn start(more: &[&str]) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let python = root.join(".tools/venv/bin/python");
        let weights = root.join(".tools/models");
        assert!(
            python.exists() && weights.exists(),
            "the model is not installed: run scripts/tools"
        );
        let mut child = Command::new(python)
            .arg(root.join("tests/tools/model_server.py"))
            .args(["--port", "0", "--until-stdin-closes"])
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let read = stdout.read_line(&mut line);
        tokio::time::timeout(START_DEADLINE, read)
            .await
            .expect("the model server is ready within a minute")
            .unwrap();
        let ready: Value = serde_json::from_str(&line).expect("one JSON line when it is ready");
        Self {
            url: ready["base_url"].as_str().unwrap().to_owned(),
            http: client(),
            _child: child,
        }
    }

    /// Asks for faults; forgets earlier ones and the log.
    pub async fn faults(&self, faults: Value) {
        let order = json!({ "reset": true, "faults": faults });
        let url = format!("{}/__control", self.url);
        let said = self.http.post(url).body(order.to_string()).send().await;
        assert!(said.unwrap().status().is_success());
    }

    /// The log of calls, as soon as so many have started and finished.
    pub async fn log(&self, started: usize, finished: usize) -> Vec<Value> {
        let url = format!(
            "{}/__control/log?started={started}&finished={finished}&wait_ms=20000",
            self.url
        );
        let said = self.http.get(url).send().await.unwrap();
        let log: Value = serde_json::from_slice(&said.bytes().await.unwrap()).unwrap();
        let calls = log["calls"].as_array().unwrap().clone();
        assert!(
            log["started"].as_u64() >= Some(started as u64)
                && log["finished"].as_u64() >= Some(finished as u64),
            "expected {started} calls started and {finished} finished: {calls:?}"
        );
        calls
    }

    /// A call past the worker.
    pub async fn direct(&self, path: &str, body: &Value) -> Vec<u8> {
        let url = format!("{}/{path}", self.url);
        let said = self.http.post(url).body(body.to_string()).send().await;
        said.unwrap().bytes().await.unwrap().to_vec()
    }
}

pub fn client() -> reqwest::Client {
    use_ring();
    reqwest::Client::builder()
        .no_proxy()
        .tls_certs_only([])
        .build()
        .unwrap()
}

fn use_ring() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}
