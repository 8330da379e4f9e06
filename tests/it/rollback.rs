//! The log loses its last seconds: its store is put back as it was some time ago, and what was lost is
//! given back by the state worker, which had read it (feature B10).

use crate::support::agents::{PUPPET, deploy_puppet, output, run, turn};
use crate::support::{Node, NodeSpec, proc, wait_for};
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::Duration;
use vlinder_testkit::{CURRENT, NatsServer, OLDEST};

/// A healer that dies holds its lease for 6 s, its successor rebuilds the projection; debug build.
const HEALED: Duration = Duration::from_secs(40);
/// How a state worker says that it begins.
const BEGINS: &str = "giving back what is kept";
/// How it says that it is done.
const REPORT: &str = "messages given back";

async fn turns_of(node: &Node, session: &str) -> Vec<Value> {
    let got = node.cli(&["session", "get", session, "-o", "json"]).await;
    if got.code != Some(0) {
        // The projection is being rebuilt.
        return Vec::new();
    }
    got.json()["turns"].as_array().cloned().unwrap_or_default()
}

/// What was acknowledged in a session: submission and answer, in order.
type Acknowledged = Vec<(String, String)>;

async fn count(node: &Node, session: &str, acknowledged: &mut Acknowledged) {
    let done = turn(node, PUPPET, session, "count").await;
    let expected = (acknowledged.len() + 1).to_string();
    assert_eq!(output(&done), expected, "{done:#}");
    let submission = done["submission"].as_str().unwrap().to_owned();
    acknowledged.push((submission, expected));
}

/// All that was acknowledged is on record, once and in order, and verifies.
async fn all_is_on_record(node: &Node, session: &str, acknowledged: &Acknowledged) {
    let told = |turns: &Vec<Value>| -> Acknowledged {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        turns
            .iter()
            .map(|turn| (text(&turn["submission"]), text(&turn["output"])))
            .collect()
    };
    let turns = wait_for(
        "everything is on record again",
        HEALED,
        || turns_of(node, session),
        |turns| told(turns) == *acknowledged,
    )
    .await;
    assert!(
        turns.iter().all(|turn| turn["status"] == "done"),
        "{turns:#?}"
    );
    let verified = node
        .cli(&["session", "verify", session, "-o", "json"])
        .await
        .code(0)
        .json();
    assert_eq!(verified["ok"], true, "{verified:#}");
}

async fn nothing_runs(node: &Node) {
    let running = node
        .cli(&["turn", "list", "-o", "json"])
        .await
        .code(0)
        .json();
    assert_eq!(running.as_array().map(Vec::len), Some(0), "{running:#}");
}

async fn healed_on(version: &str) {
    let mut nats = NatsServer::start(version).await;
    let node = NodeSpec::on(&nats)
        .workers("agent.process", 1)
        .start()
        .await;
    deploy_puppet(&node, "").await;
    let (mut old, mut new) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        count(&node, "old", &mut old).await;
    }
    let copy = nats.copy_store().await;
    for _ in 0..3 {
        count(&node, "old", &mut old).await;
        count(&node, "new", &mut new).await;
    }
    // One turn is under way when the log loses its beginning.
    let args = ["--session", "old", "--submission", "under-way"];
    let spec = node.spec().clone();
    let all = [
        &["agent", "run", PUPPET, "-p", "sleep 2; count", "-o", "json"][..],
        &args,
    ]
    .concat();
    let (waited, ()) = tokio::join!(async { spec.cli(&all).await }, async {
        wait_for(
            "the turn runs",
            Duration::from_secs(10),
            || async { node.cli(&["turn", "list", "-o", "json"]).await.stdout },
            |listed| listed.contains("under-way"),
        )
        .await;
        nats.roll_back(&copy).await;
    });
    assert_eq!(output(&waited.code(0).json()), "7");
    old.push(("under-way".to_owned(), "7".to_owned()));

    all_is_on_record(&node, "old", &old).await;
    all_is_on_record(&node, "new", &new).await;
    nothing_runs(&node).await;
    let log = node.log();
    assert!(log.contains(REPORT), "no report: {log}");
    let status = node.cli(&["status", "-o", "json"]).await.code(0).json();
    let problems = status["problems"].to_string();
    assert!(problems.contains(REPORT), "{status:#}");
    let metrics = node.get("/metrics").await.unwrap().1;
    let counted = "vlinder_log_healings_total{stream=\"VLINDER_LOG_default\"}";
    assert!(metrics.contains(counted), "{metrics}");

    // And it goes on: the counters are exact.
    count(&node, "old", &mut old).await;
    count(&node, "new", &mut new).await;
    all_is_on_record(&node, "old", &old).await;
    all_is_on_record(&node, "new", &new).await;
    node.stop_cleanly().await;
}

#[tokio::test]
async fn a_rolled_back_log_is_healed_on_the_oldest_nats() {
    healed_on(OLDEST).await;
}

#[tokio::test]
async fn a_rolled_back_log_is_healed_on_the_current_nats() {
    healed_on(CURRENT).await;
}

#[tokio::test]
async fn a_healer_that_is_killed_is_followed_by_another() {
    let mut nats = NatsServer::start(CURRENT).await;
    let node = NodeSpec::on(&nats)
        .workers("agent.process", 1)
        .start()
        .await;
    deploy_puppet(&node, "").await;
    let copy = nats.copy_store().await;
    let mut talk = Vec::new();
    for _ in 0..15 {
        count(&node, "talk", &mut talk).await;
    }
    let workers = node.workers().await;
    let state = workers
        .iter()
        .find(|worker| worker.role == "state")
        .unwrap();
    nats.roll_back(&copy).await;
    wait_for(
        "it begins",
        HEALED,
        async || node.log(),
        |log| log.contains(BEGINS),
    )
    .await;
    proc::send(state.pid, Signal::KILL);
    all_is_on_record(&node, "talk", &talk).await;
    count(&node, "talk", &mut talk).await;
    all_is_on_record(&node, "talk", &talk).await;
    nothing_runs(&node).await;
    node.stop_cleanly().await;
}

fn copy_bus(from: &Path, to: &Path) {
    for suffix in ["", "-wal", "-shm"] {
        let name = format!("bus.db{suffix}");
        let _ = fs::remove_file(to.join(&name));
        if from.join(&name).exists() {
            fs::copy(from.join(&name), to.join(&name)).unwrap();
        }
    }
}

#[tokio::test]
async fn a_rolled_back_log_is_healed_embedded() {
    let node = NodeSpec::embedded().start().await;
    deploy_puppet(&node, "").await;
    let (mut old, mut new) = (Vec::new(), Vec::new());
    count(&node, "old", &mut old).await;
    let spec = node.kill9().await;
    let copy = tempfile::tempdir().unwrap();
    copy_bus(&spec.data_dir(), copy.path());
    let node = spec.start().await;
    for _ in 0..3 {
        count(&node, "old", &mut old).await;
        count(&node, "new", &mut new).await;
    }
    // What a state worker has not read yet when its node is killed nobody can give back.
    turns_of(&node, "new").await;
    let spec = node.kill9().await;
    copy_bus(copy.path(), &spec.data_dir());
    let node = spec.start().await;
    all_is_on_record(&node, "old", &old).await;
    all_is_on_record(&node, "new", &new).await;
    assert!(node.log().contains(REPORT), "no report: {}", node.log());
    count(&node, "old", &mut old).await;
    count(&node, "new", &mut new).await;
    all_is_on_record(&node, "old", &old).await;
    nothing_runs(&node).await;
    // The same submission sent again is the same turn still.
    let args = ["--session", "old", "--submission", old[2].0.as_str()];
    let again = run(&node, PUPPET, "count", &args).await.code(0).json();
    assert_eq!(output(&again), "3");
    node.stop_cleanly().await;
}
