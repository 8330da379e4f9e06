//! `vlinderd doctor`: each broken thing is one line with its cause and remedy (features J10).

use crate::support::{Finished, Node, NodeSpec};
use serde_json::Value;
use std::net::TcpListener;
use std::time::Duration;
use vlinder_testkit::{CURRENT, NatsServer, free_port};

/// Whatever is broken, it says so within this.
const DEADLINE: Duration = Duration::from_secs(10);

async fn findings(node: &NodeSpec, code: i32) -> Vec<Value> {
    let finished: Finished = node.run(&["doctor", "-o", "json"]).await.code(code);
    assert!(finished.took < DEADLINE, "{finished:#?}");
    finished.json().as_array().expect("a list").clone()
}

/// The findings about one thing.
fn about<'a>(findings: &'a [Value], what: &str) -> Vec<&'a Value> {
    findings
        .iter()
        .filter(|finding| finding["what"] == what)
        .collect()
}

/// Doctor must name exactly this problem, with these words and some remedy.
async fn finds(node: &NodeSpec, what: &str, words: &[&str]) {
    let findings = findings(node, 1).await;
    let problems: Vec<&Value> = findings
        .iter()
        .filter(|f| f["level"] == "problem")
        .collect();
    assert_eq!(problems.len(), 1, "{findings:#?}");
    let problem = problems[0];
    assert_eq!(problem["what"], what, "{problem:#}");
    let found = problem["found"].as_str().unwrap();
    for word in words {
        assert!(found.contains(word), "no {word:?} in {problem:#}");
    }
    assert!(!found.contains('\n'), "{problem:#}");
    assert!(
        !problem["remedy"].as_str().unwrap().is_empty(),
        "{problem:#}"
    );
    // The table says the same, and stdout carries it.
    let table = node.run(&["doctor"]).await.code(1);
    let lines: Vec<&str> = table
        .stdout
        .lines()
        .filter(|line| line.contains("PROBLEM"))
        .collect();
    assert_eq!(lines.len(), 1, "{table:#?}");
    assert!(lines[0].contains(found), "{table:#?}");
    assert!(table.stdout.contains("1 problem"), "{table:#?}");
}

#[tokio::test]
async fn a_fresh_machine_lacks_nothing_that_is_needed() {
    let node = NodeSpec::embedded();
    let findings = findings(&node, 0).await;
    for what in [
        "vlinderd",
        "bus",
        "credential",
        "disk",
        "ports",
        "docker",
        "ollama",
        "gpu",
    ] {
        assert_eq!(about(&findings, what).len(), 1, "{what}: {findings:#?}");
    }
    assert!(
        about(&findings, "bus")[0]["found"]
            .as_str()
            .unwrap()
            .contains("embedded")
    );
    let ollama = about(&findings, "ollama")[0];
    assert!(
        ollama["found"].as_str().unwrap().contains("127.0.0.1:9"),
        "{ollama:#}"
    );
    assert!(!ollama["remedy"].as_str().unwrap().is_empty(), "{ollama:#}");
    let table = node.run(&["doctor"]).await.code(0);
    assert!(
        table
            .stdout
            .contains("nothing that this node needs is missing"),
        "{table:#?}"
    );
    // Looking changes nothing.
    assert!(!node.data_dir().exists());
}

#[tokio::test]
async fn nats() {
    let nats = NatsServer::start(CURRENT).await;
    let findings = findings(&NodeSpec::on(&nats), 0).await;
    let bus = about(&findings, "bus")[0];
    assert!(bus["found"].as_str().unwrap().contains(CURRENT), "{bus:#}");

    let port = free_port();
    let url = format!("nats://127.0.0.1:{port}");
    let away = NodeSpec::embedded().var("VLINDER_QUEUE_NATS_URL", url);
    finds(&away, "bus", &[&port.to_string()]).await;

    let core = NatsServer::start_core(CURRENT).await;
    finds(&NodeSpec::on(&core), "bus", &["JetStream"]).await;

    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = mute.local_addr().unwrap().to_string();
    let silent = NodeSpec::embedded().var("VLINDER_QUEUE_NATS_URL", format!("nats://{address}"));
    finds(&silent, "bus", &[&address]).await;
}

#[tokio::test]
async fn a_refused_credential_of_nats() {
    let nats = NatsServer::start_with(CURRENT, "authorization { token: \"right\" }").await;
    let right = NodeSpec::on(&nats).var("VLINDER_QUEUE_NATS_TOKEN", "right");
    findings(&right, 0).await;
    let wrong = NodeSpec::on(&nats).var("VLINDER_QUEUE_NATS_TOKEN", "mistaken");
    finds(&wrong, "bus", &["credentials"]).await;
    let finished = wrong.run(&["doctor"]).await;
    assert!(!finished.stdout.contains("mistaken"), "{finished:#?}");
}

#[tokio::test]
async fn ports() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let node = NodeSpec::embedded().var("VLINDER_DISTRIBUTED_PORTS_HARNESS", port);
    finds(&node, "ports", &[&format!("{port} (harness)")]).await;
}

#[tokio::test]
async fn a_data_directory_that_cannot_be() {
    let node = NodeSpec::embedded();
    std::fs::write(node.data_dir(), "a file").unwrap();
    // Before anything else can be looked at.
    let finished = node.run(&["doctor"]).await.code(2);
    finished
        .says(&node.data_dir().display().to_string())
        .says("Not a directory");
}

#[tokio::test]
async fn services_elsewhere() {
    let port = free_port();
    let mut node = NodeSpec::embedded()
        .var(
            "VLINDER_DISTRIBUTED_STATE_ADDR",
            format!("http://127.0.0.1:{port}"),
        )
        .workers("state", 0);
    let nats = NatsServer::start(CURRENT).await;
    node = node.var("VLINDER_QUEUE_NATS_URL", nats.url());
    finds(&node, "state", &[&port.to_string()]).await;
}

#[tokio::test]
async fn an_upstream_that_is_needed() {
    let port = free_port();
    let node = NodeSpec::embedded().workers("inference.openai", 1).var(
        "VLINDER_OPENAI_ENDPOINT",
        format!("http://127.0.0.1:{port}/v1"),
    );
    finds(&node, "openai", &[&port.to_string()]).await;
}

#[tokio::test]
async fn beside_a_running_daemon() {
    let node = Node::embedded().await;
    let findings = findings(node.spec(), 0).await;
    let daemon = about(&findings, "vlinderd")[0];
    assert!(
        daemon["found"]
            .as_str()
            .unwrap()
            .contains(&node.pid().to_string()),
        "{daemon:#}"
    );
    for service in ["registry", "harness", "state", "secret", "catalog"] {
        assert_eq!(about(&findings, service)[0]["level"], "ok", "{findings:#?}");
    }
    node.stop_cleanly().await;
}
