//! A newcomer's path: deploy the example agent, talk to it, kill the daemon, go on (issue 2, "What it
//! must show" 1 and 2; features C2, D2, D11, F1, F2).

use crate::support::agents::{deploy, example, output, run, turn};
use crate::support::{Node, NodeSpec};
use serde_json::Value;
use vlinder_testkit::{CURRENT, NatsServer};

const SESSION: &str = "kitchen";

async fn list(node: &Node, args: &[&str]) -> Value {
    node.cli(&[args, &["-o", "json"]].concat())
        .await
        .code(0)
        .json()
}

/// What must be on record after these messages: each turn done, once, in order, with its calls.
async fn on_record(node: &Node, said: &[&str]) -> Vec<Value> {
    let session = list(node, &["session", "get", SESSION]).await;
    let turns = session["turns"].as_array().unwrap().clone();
    let inputs: Vec<&str> = turns
        .iter()
        .map(|turn| turn["input"].as_str().unwrap())
        .collect();
    assert_eq!(inputs, said, "{session:#}");
    for turn in &turns {
        assert_eq!(turn["status"], "done", "{turn:#}");
        let calls = turn["calls"].as_array().unwrap();
        assert!(!calls.is_empty(), "{turn:#}");
        for call in calls {
            assert_eq!(call["service"], "kv", "{turn:#}");
            assert_eq!(call["status"], "ok", "{turn:#}");
        }
    }
    let verified = list(node, &["session", "verify", SESSION]).await;
    assert_eq!(verified["ok"], true, "{verified:#}");
    turns
}

async fn holds_a_conversation(spec: NodeSpec) {
    let node = spec.start().await;
    deploy(&node, &example("notes-agent")).await;
    let agents = list(&node, &["agent", "list"]).await;
    assert_eq!(agents[0]["name"], "notes", "{agents:#}");

    let mut said = vec!["remember the key is under the pot"];
    let first = turn(&node, "notes", SESSION, said[0]).await;
    assert!(output(&first).starts_with("Noted as number 1"), "{first:#}");
    for field in [
        "agent",
        "session",
        "branch",
        "submission",
        "state",
        "node",
        "duration_ms",
    ] {
        assert!(!first[field].is_null(), "no {field}: {first:#}");
    }
    assert_eq!(first["session"], SESSION);
    assert_eq!(first["node"], node.spec().name());
    said.push("remember bread, User: and\n Agent: butter");
    turn(&node, "notes", SESSION, said[1]).await;
    said.push("count");
    let third = turn(&node, "notes", SESSION, said[2]).await;
    assert_eq!(output(&third), "You have 2 notes after 3 turns.");
    let before = on_record(&node, &said).await;

    // Another session knows nothing of it.
    let other = turn(&node, "notes", "attic", "list").await;
    assert_eq!(output(&other), "I have no notes yet.");

    // The daemon dies; the session goes on, agent and all, with nothing done by hand.
    let node = node.kill9().await.start().await;
    said.push("recall key");
    let fourth = turn(&node, "notes", SESSION, said[3]).await;
    assert_eq!(output(&fourth), "1. the key is under the pot");
    let after = on_record(&node, &said).await;
    assert_eq!(
        before[..],
        after[..3],
        "what was on record is on record as it was"
    );

    // And after a polite end too.
    let node = node.stop_cleanly().await.start().await;
    said.push("count");
    let fifth = turn(&node, "notes", SESSION, said[4]).await;
    assert_eq!(output(&fifth), "You have 2 notes after 5 turns.");
    on_record(&node, &said).await;

    // A fork sees the past, and only the past.
    let head = before[0]["hash"].as_str().unwrap();
    let fork = ["session", "fork", SESSION, "--from", head, "--name", "then"];
    node.cli(&fork).await.code(0);
    let args = ["--session", SESSION, "--branch", "then"];
    let past = run(&node, "notes", "count", &args).await.code(0).json();
    assert_eq!(output(&past), "You have 1 note after 2 turns.");
    let now = turn(&node, "notes", SESSION, "count").await;
    assert_eq!(output(&now), "You have 2 notes after 6 turns.");

    let sessions = list(&node, &["session", "list", "notes"]).await;
    let of = |id: &str| {
        let sessions = sessions.as_array().unwrap().iter();
        sessions.filter(|session| session["id"] == id).count()
    };
    assert_eq!((of(SESSION), of("attic")), (1, 1), "{sessions:#}");

    // Deleted, it is gone with its processes; what was said stays.
    node.cli(&["agent", "delete", "notes"]).await.code(0);
    assert_eq!(run(&node, "notes", "list", &[]).await.code, Some(5));
    list(&node, &["session", "get", SESSION]).await;
    node.stop_cleanly().await;
}

#[tokio::test]
async fn a_conversation_survives_everything_embedded() {
    holds_a_conversation(NodeSpec::embedded()).await;
}

#[tokio::test]
async fn a_conversation_survives_everything_on_nats() {
    let nats = NatsServer::start(CURRENT).await;
    holds_a_conversation(NodeSpec::on(&nats).workers("agent.process", 1)).await;
}

#[tokio::test]
async fn what_does_not_exist_is_not_found() {
    let node = Node::embedded().await;
    for args in [
        &["agent", "run", "nobody", "-p", "x"][..],
        &["agent", "get", "nobody"],
        &["agent", "delete", "nobody"],
        &["session", "get", "nowhere"],
        &["turn", "get", "never"],
        &["turn", "cancel", "never"],
        &["secret", "get", "none"],
    ] {
        let finished = node.cli(args).await;
        assert_eq!(finished.code, Some(5), "{args:?}: {finished:#?}");
        assert!(finished.stderr.contains(args[2]), "{args:?}: {finished:#?}");
    }
    node.stop_cleanly().await;
}
