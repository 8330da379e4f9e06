//! Agents that give work to each other (features D5, D8), and what ends it.

use crate::support::agents::{deploy, output, run, turn};
use crate::support::{Node, NodeSpec, proc, wait_for};
use rustix::process::Signal;
use serde_json::Value;
use std::path::Path;
use std::time::{Duration, Instant};
use vlinder_testkit::{CURRENT, NatsServer};

/// The end of a turn is felt everywhere within 1 s; tests share two cores.
const ENDED: Duration = Duration::from_secs(5);

/// Deploys agents that do what they are told to each other.
async fn deploy_team(node: &Node, names: &[&str]) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/delegate/agent.py");
    for name in names {
        let directory = node.spec().home().join(name);
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::copy(&source, directory.join("agent.py")).unwrap();
        let manifest = format!(
            "name = '{name}'\ndescription = 'For a test.'\nruntime = 'process'\nexecutable = 'python3 agent.py'\n"
        );
        std::fs::write(directory.join("agent.toml"), manifest).unwrap();
        deploy(node, &directory).await;
    }
}

async fn team(spec: NodeSpec, names: &[&str]) -> Node {
    let node = spec.start().await;
    deploy_team(&node, names).await;
    node
}

async fn say(node: &Node, agent: &str, said: &str) -> String {
    let finished = run(node, agent, said, &[]).await.code(0);
    output(&finished.json()).to_owned()
}

/// A turn as the record has it.
async fn turn_of(node: &Node, submission: &str) -> Value {
    let shown = node.cli(&["turn", "get", submission, "-o", "json"]).await;
    shown.code(0).json()
}

async fn fan_out_chain_and_failure(spec: NodeSpec) {
    let node = team(spec, &["a", "b", "c", "d"]).await;
    assert_eq!(
        say(&node, "a", "fan b,c,d echo I am %").await,
        "I am b I am c I am d"
    );
    assert_eq!(say(&node, "a", "to b to c to d echo deep").await, "deep");
    assert_eq!(
        say(&node, "a", "fan b,c to d fan b,c echo %").await,
        "b b c c"
    );
    // Three at once, not one after another.
    let began = Instant::now();
    assert_eq!(
        say(&node, "a", "fan b,c,d sleep 1").await,
        "slept slept slept"
    );
    assert!(
        began.elapsed() < Duration::from_millis(2800),
        "{:?}",
        began.elapsed()
    );
    // One that fails fails only its own wait.
    assert_eq!(
        say(&node, "a", "fan b,c,d to % fail")
            .await
            .matches("[502 agent_status]")
            .count(),
        3
    );
    let mixed = say(&node, "a", "fan b,nobody,c echo %").await;
    assert_eq!(mixed, "b [404 unknown_handle] c");

    // All of it is on record, each as a turn of its own.
    let parent = turn(&node, "a", "shown", "to b echo x").await;
    let calls = turn_of(&node, parent["submission"].as_str().unwrap()).await;
    let calls = calls["calls"].as_array().unwrap().clone();
    let told: Vec<[&str; 4]> = calls
        .iter()
        .map(|call| {
            ["service", "operation", "model", "status"].map(|key| call[key].as_str().unwrap())
        })
        .collect();
    assert_eq!(
        told,
        [
            ["delegate", "delegate", "b", "ok"],
            ["delegate", "wait", "b", "ok"]
        ]
    );
    let handle = calls[0]["response"].as_str().unwrap();
    let handle: Value = serde_json::from_str(handle).unwrap();
    let handle = handle["handle"].as_str().unwrap();
    let child = turn_of(&node, handle).await;
    assert_eq!(
        (&child["agent"], &child["output"]),
        (&"b".into(), &"x".into()),
        "{child:#}"
    );
    for session in ["shown", handle] {
        node.cli(&["session", "verify", session]).await.code(0);
    }
    // A person may go on with it.
    assert_eq!(
        output(&turn(&node, "b", handle, "echo and on").await),
        "and on"
    );
    // But not begin one that is called so.
    let forged = run(&node, "b", "echo x", &["--session", "delegated-forged"]).await;
    assert_eq!(forged.code, Some(5), "{forged:#?}");
    node.stop_cleanly().await;
}

#[tokio::test]
async fn fan_out_chain_and_failure_embedded() {
    fan_out_chain_and_failure(NodeSpec::embedded()).await;
}

#[tokio::test]
async fn fan_out_chain_and_failure_on_nats() {
    let nats = NatsServer::start(CURRENT).await;
    fan_out_chain_and_failure(NodeSpec::on(&nats).workers("agent.process", 1)).await;
}

#[tokio::test]
async fn circles_end_and_limits_are_named() {
    let node = team(NodeSpec::embedded(), &["a", "b"]).await;
    // One replica, and eight of its turns wait for each other.
    assert_eq!(say(&node, "a", "deep a").await, "1+1+1+1+1+1+1+1+too_deep");
    let many = say(&node, "a", "many b 66").await;
    assert_eq!(many, format!("{} 429 429", ["200"; 64].join(" ")));
    for (asked, told) in [
        (
            r#"runtime/delegate {"target": "nobody", "input": "x"}"#,
            "404 agent_not_found",
        ),
        (
            r#"runtime/delegate {"target": "../x", "input": "x"}"#,
            "404 agent_not_found",
        ),
        (
            r#"runtime/delegate {"target": "", "input": "x"}"#,
            "400 bad_request",
        ),
        (r#"runtime/delegate {"target": "b"}"#, "400 bad_request"),
        (
            r#"runtime/delegate {"target": "b", "input": 7}"#,
            "400 bad_request",
        ),
        (
            r#"runtime/delegate {"target": "b", "input": "x", "turn": "y"}"#,
            "400 bad_request",
        ),
        ("runtime/delegate [", "400 bad_request"),
        (
            r#"runtime/wait {"handle": "t-made-up"}"#,
            "404 unknown_handle",
        ),
        (
            r#"runtime/wait {"handle": "no/such"}"#,
            "404 unknown_handle",
        ),
        (r#"runtime/wait {}"#, "400 bad_request"),
    ] {
        let said = say(&node, "a", &format!("ask {asked}")).await;
        let (status, code) = told.split_once(' ').unwrap();
        assert!(
            said.starts_with(status) && said.contains(code),
            "{asked}: {said}"
        );
    }
    // What another turn delegated is not this one's to read.
    let handle = say(&node, "a", "leave b echo secret").await;
    let said = say(
        &node,
        "a",
        &format!(r#"ask runtime/wait {{"handle": "{handle}"}}"#),
    )
    .await;
    assert!(said.starts_with("404"), "{said}");
    node.stop_cleanly().await;
}

/// Two agents with one replica each, and many turns of each that wait for the other.
async fn waiting_gives_the_slot_back(spec: NodeSpec) {
    let node = team(spec, &["a", "b"]).await;
    let turns = (0..12).map(|number| {
        let (agent, other) = if number % 2 == 0 {
            ("a", "b")
        } else {
            ("b", "a")
        };
        let said = format!("to {other} to {agent} to {other} echo {number}");
        let node = &node;
        async move { (number, say(node, agent, &said).await) }
    });
    for (number, said) in futures::future::join_all(turns).await {
        assert_eq!(said, number.to_string());
    }
    // What was started for that goes again, and with it its processes.
    let agents = || proc::working_below(&node.spec().data_dir());
    let before = agents().len();
    assert!(before > 2, "nothing was started");
    wait_for(
        "only the replicas are left",
        Duration::from_secs(15),
        async || agents().len(),
        |left| *left < before,
    )
    .await;
    node.stop_cleanly().await;
}

#[tokio::test]
async fn waiting_gives_the_slot_back_embedded() {
    waiting_gives_the_slot_back(NodeSpec::embedded()).await;
}

#[tokio::test]
async fn waiting_gives_the_slot_back_on_nats() {
    let nats = NatsServer::start(CURRENT).await;
    waiting_gives_the_slot_back(NodeSpec::on(&nats).workers("agent.process", 2)).await;
}

async fn kills(spec: NodeSpec, kill_worker: bool) {
    let node = team(spec, &["a", "b"]).await;
    let file = |name: &str| node.spec().home().join(name).display().to_string();
    // The callee dies in mid-turn: its turn is tried again, and the caller never knows.
    let once = file("once");
    assert_eq!(
        say(&node, "a", &format!("to b once {once}")).await,
        "survived"
    );
    // The caller dies while it waits: it is tried again, and delegates nothing twice.
    let noted = file("noted");
    let said = format!("to b note {noted} 2");
    let killer = async {
        let seen = async || std::fs::metadata(&noted).is_ok();
        wait_for("the callee works", ENDED, seen, |seen| *seen).await;
        if kill_worker {
            let workers = node.workers().await;
            let runtime = workers.iter().find(|worker| worker.role == "agent.process");
            proc::send(runtime.unwrap().pid, Signal::KILL);
        } else {
            let listed = node
                .cli(&["agent", "get", "a", "-o", "json"])
                .await
                .code(0)
                .json();
            let pid = listed["instances"][0]["pid"].as_u64().unwrap() as u32;
            proc::send(pid, Signal::KILL);
        }
    };
    let (said, ()) = tokio::join!(say(&node, "a", &said), killer);
    assert_eq!(said, "noted");
    let times = std::fs::read_to_string(&noted).unwrap().len();
    // Where the worker of both died, the callee's own turn was tried again too: it is one turn.
    assert!(times == 1 || (kill_worker && times == 2), "{times}");
    let listed = node
        .cli(&["session", "list", "b", "-o", "json"])
        .await
        .code(0)
        .json();
    assert_eq!(
        listed.as_array().unwrap().len(),
        2,
        "one session for each delegation"
    );
    node.stop_cleanly().await;
}

#[tokio::test]
async fn delegations_survive_the_death_of_either_agent() {
    kills(NodeSpec::embedded(), false).await;
}

#[tokio::test]
async fn delegations_survive_the_death_of_their_worker() {
    let nats = NatsServer::start(CURRENT).await;
    kills(NodeSpec::on(&nats).workers("agent.process", 1), true).await;
}

#[tokio::test]
async fn what_nobody_waits_for_any_more_ends() {
    let node = team(NodeSpec::embedded(), &["a", "b", "c"]).await;
    let statuses = async || {
        let listed = node
            .cli(&["turn", "list", "-o", "json"])
            .await
            .code(0)
            .json();
        listed.as_array().unwrap().len()
    };
    let args = ["--submission", "top"];
    let cancel = async {
        wait_for("three turns run", ENDED, statuses, |open| *open == 3).await;
        node.cli(&["turn", "cancel", "top"]).await.code(0);
        wait_for("no turn is left", ENDED, statuses, |open| *open == 0).await;
    };
    let (ended, ()) = tokio::join!(run(&node, "a", "to b to c sleep 30", &args), cancel);
    assert_eq!(ended.code, Some(10), "{ended:#?}");
    // A deadline is everybody's.
    let late = run(&node, "a", "to b to c sleep 30", &["--timeout", "1s"]).await;
    // Whoever hears of its delegate's deadline a moment before its own may still say so.
    let heard = late.code == Some(0) && late.stdout.contains("504 deadline");
    assert!(late.code == Some(7) || heard, "{late:#?}");
    wait_for("no turn is left", ENDED, statuses, |open| *open == 0).await;
    // Who has replied has left its work to itself.
    let noted = node.spec().home().join("noted");
    let handle = say(&node, "a", &format!("leave b note {} 1", noted.display())).await;
    let done = async || turn_of(&node, &handle).await["status"].clone();
    wait_for("it is done", ENDED, done, |status| status == "done").await;
    node.stop_cleanly().await;
}
