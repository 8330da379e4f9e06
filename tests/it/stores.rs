//! Stores beyond SQLite on a whole node (features E4; design §5, "Stores with a home"): the same answers
//! whatever the kind, also for a worker that was killed and for a node that lost its own files.

use crate::support::agents::{PUPPET, deploy, output, puppet, run, turn};
use crate::support::{Node, NodeSpec};
use std::fs;
use std::time::Duration;
use vlinder_testkit::{AwsServer, CURRENT, NatsServer};

const OBJECT: &str = "storage.object.sqlite";
const REPLACED: Duration = Duration::from_secs(10);

/// The puppet, with its store elsewhere.
async fn deploy_on(node: &Node, store: &str) {
    let directory = puppet(node, PUPPET, "");
    let path = directory.join("agent.toml");
    let manifest = fs::read_to_string(&path).unwrap();
    let moved = manifest.replace(&format!("sqlite://{PUPPET}"), store);
    assert_ne!(moved, manifest);
    fs::write(&path, moved).unwrap();
    deploy(node, &directory).await;
}

async fn counts(node: &Node, branch: &str) -> String {
    let args = ["--session", "s", "--branch", branch];
    let counted = run(node, PUPPET, "count", &args).await.code(0);
    output(&counted.json()).to_owned()
}

/// Counts through kills and the loss of everything that the node has of the store itself.
async fn keeps_count(node: Node) -> Node {
    let first = turn(&node, PUPPET, "s", "count").await;
    assert_eq!(output(&first), "1");
    assert_eq!(counts(&node, "main").await, "2");
    let worker = node.workers().await;
    let worker = worker.iter().find(|worker| worker.role == OBJECT).unwrap();
    if worker.pid != node.pid() {
        let pid = rustix::process::Pid::from_raw(worker.pid as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        node.wait_replaced(worker, REPLACED).await;
    }
    assert_eq!(counts(&node, "main").await, "3");
    let spec = node.kill9().await;
    fs::remove_dir_all(spec.data_dir().join("stores")).unwrap();
    let node = spec.start().await;
    assert_eq!(counts(&node, "main").await, "4");
    // A fork sees the past there as well.
    let session = ["session", "get", "s", "-o", "json"];
    let session = node.cli(&session).await.code(0).json();
    let turns = session["turns"].as_array().unwrap();
    let then = turns.iter().find(|turn| turn["output"] == "1").unwrap();
    let then = then["hash"].as_str().unwrap();
    let fork = ["session", "fork", "s", "--from", then, "--name", "then"];
    node.cli(&fork).await.code(0);
    assert_eq!(counts(&node, "then").await, "2");
    assert_eq!(counts(&node, "main").await, "5");
    node.cli(&["session", "verify", "s"]).await.code(0);
    node
}

#[tokio::test]
async fn a_store_in_the_bus_keeps_count_embedded() {
    let node = NodeSpec::embedded().start().await;
    deploy_on(&node, "nats://counted").await;
    keeps_count(node).await.stop_cleanly().await;
}

#[tokio::test]
async fn a_store_in_the_bus_keeps_count_on_nats() {
    let nats = NatsServer::start(CURRENT).await;
    let spec = NodeSpec::on(&nats).workers("agent.process", 1);
    let node = spec.start().await;
    deploy_on(&node, "nats://counted").await;
    keeps_count(node).await.stop_cleanly().await;
}

#[tokio::test]
async fn a_store_in_s3_keeps_count_once_its_bucket_is_there() {
    let aws = AwsServer::start().await;
    let spec = NodeSpec::embedded().config(&format!(
        "s3.endpoint = {:?}\ns3.access_key_id = \"key\"\ns3.secret_access_key = \"a-secret\"\n",
        aws.url()
    ));
    let node = spec.start().await;
    deploy_on(&node, "s3://counted/x").await;
    let failed = run(&node, PUPPET, "count", &["--session", "s"]).await;
    assert_eq!(failed.code, Some(6), "{failed:#?}");
    let calls = ["session", "get", "s", "--full", "-o", "json"];
    let calls = node.cli(&calls).await.code(0).stdout;
    assert!(calls.contains("store_bucket_missing"), "{calls}");
    assert!(!calls.contains("a-secret"), "{calls}");
    aws.make_bucket("counted").await;
    let node = keeps_count(node).await;
    assert!(aws.count("counted").await > 0, "nothing is in the bucket");
    node.stop_cleanly().await;
}
