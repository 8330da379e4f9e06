//! Turns: submitted once, one after another, ended by deadline or by hand (features B7, B8, B13, C7).

use crate::support::agents::{PUPPET, deploy_puppet, output, run, turn};
use crate::support::bins::{clean, finish, vlinder};
use crate::support::{Node, NodeSpec, proc, wait_for};
use rustix::process::Signal;
use serde_json::Value;
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::ChildStdout;
use vlinder_testkit::{CURRENT, NatsServer};

/// Exit codes of the command line.
const DEADLINE: i32 = 7;
const CONFLICT: i32 = 9;
const CANCELLED: i32 = 10;
/// The end of a turn is felt everywhere within 1 s; tests share two cores.
const ENDED: Duration = Duration::from_secs(4);

async fn node_with_puppet(spec: NodeSpec, lines: &str) -> Node {
    let node = spec.start().await;
    deploy_puppet(&node, lines).await;
    node
}

async fn turns(node: &Node) -> Vec<Value> {
    let listed = node
        .cli(&["turn", "list", "-o", "json"])
        .await
        .code(0)
        .json();
    listed.as_array().expect("a list").clone()
}

/// Waits until the turn of a submission is being worked on.
async fn running(node: &Node, submission: &str) -> Value {
    let of = |turns: &Vec<Value>| {
        let mut turns = turns.iter();
        turns.find(|turn| turn["submission"] == submission).cloned()
    };
    let seen = wait_for(
        "the turn runs",
        Duration::from_secs(10),
        || turns(node),
        |turns| of(turns).is_some_and(|turn| turn["status"] == "running"),
    );
    of(&seen.await).unwrap()
}

async fn submitted_once(spec: NodeSpec) {
    // The same ports after a restart, so that a client finds the daemon again by itself.
    let node = node_with_puppet(spec.fixed_ports(), "").await;
    let args = ["--session", "s", "--submission", "once"];
    let first = run(&node, PUPPET, "count", &args).await.code(0).json();
    let again = run(&node, PUPPET, "count", &args).await.code(0).json();
    assert_eq!(output(&first), "1");
    for field in ["output", "session", "branch", "submission", "state"] {
        assert_eq!(first[field], again[field], "{field}");
    }
    // Other words, another session, another agent: that is another turn under this name.
    for (said, session) in [("count ", "s"), ("pid", "s"), ("count", "t")] {
        let args = ["--session", session, "--submission", "once"];
        let refused = run(&node, PUPPET, said, &args).await;
        assert_eq!(
            refused.code,
            Some(CONFLICT),
            "{said:?} in {session}: {refused:#?}"
        );
        assert!(refused.stderr.contains("once"), "{refused:#?}");
    }

    // Five at the same time.
    let args = ["--session", "s", "--submission", "five"];
    let five = (0..5).map(|_| run(&node, PUPPET, "count; sleep 0.3", &args));
    for finished in futures::future::join_all(five).await {
        assert_eq!(output(&finished.code(0).json()), "2");
    }

    // Across the death of the daemon, in mid-turn: the one who waits is answered, and so is the one
    // who asks again.
    let args = ["--session", "s", "--submission", "across"];
    let caller = node.spec().clone();
    let all = [
        &["agent", "run", PUPPET, "-p", "count; sleep 1", "-o", "json"][..],
        &args,
    ]
    .concat();
    let (node, waited) = tokio::join!(
        async {
            running(&node, "across").await;
            node.kill9().await.start().await
        },
        async { caller.cli(&all).await },
    );
    assert_eq!(output(&waited.code(0).json()), "3");
    let again = run(&node, PUPPET, "count; sleep 1", &args)
        .await
        .code(0)
        .json();
    assert_eq!(output(&again), "3");
    assert_eq!(output(&turn(&node, PUPPET, "s", "count").await), "4");
    let session = node
        .cli(&["session", "get", "s", "-o", "json"])
        .await
        .code(0)
        .json();
    let submissions: Vec<&Value> = session["turns"]
        .as_array()
        .unwrap()
        .iter()
        .map(|turn| &turn["submission"])
        .collect();
    assert_eq!(submissions[..3], ["once", "five", "across"], "{session:#}");
    assert_eq!(submissions.len(), 4, "{session:#}");
    node.stop_cleanly().await;
}

#[tokio::test]
async fn a_turn_submitted_twice_is_one_turn_embedded() {
    submitted_once(NodeSpec::embedded()).await;
}

#[tokio::test]
async fn a_turn_submitted_twice_is_one_turn_on_nats() {
    let nats = NatsServer::start(CURRENT).await;
    submitted_once(NodeSpec::on(&nats).workers("agent.process", 1)).await;
}

async fn strictly_one_after_another(spec: NodeSpec) {
    let node = node_with_puppet(spec, "replicas = 2").await;
    turn(&node, PUPPET, "s", "count").await;
    let mut done = vec!["1".to_owned()];
    for _ in 0..3 {
        let racers = (0..4).map(|_| run(&node, PUPPET, "count; sleep 0.2", &["--session", "s"]));
        for finished in futures::future::join_all(racers).await {
            match finished.code {
                Some(0) => done.push(output(&finished.json()).to_owned()),
                Some(CONFLICT) => {
                    assert!(finished.stderr.contains("session s"), "{finished:#?}");
                }
                _ => panic!("{finished:#?}"),
            }
        }
    }
    assert!(done.len() >= 4, "in each race somebody wins: {done:?}");
    done.sort_by_key(|number| number.parse::<u32>().unwrap());
    let wanted: Vec<String> = (1..=done.len()).map(|number| number.to_string()).collect();
    assert_eq!(done, wanted, "every turn saw the one before it");
    let verified = node.cli(&["session", "verify", "s"]).await;
    verified.code(0);
    node.stop_cleanly().await;
}

#[tokio::test]
async fn turns_of_a_session_are_strictly_one_after_another_embedded() {
    strictly_one_after_another(NodeSpec::embedded()).await;
}

#[tokio::test]
async fn turns_of_a_session_are_strictly_one_after_another_on_nats() {
    let nats = NatsServer::start(CURRENT).await;
    let spec = NodeSpec::on(&nats)
        .workers("agent.process", 2)
        .workers("harness", 2);
    strictly_one_after_another(spec).await;
}

async fn ends(spec: NodeSpec) {
    let node = node_with_puppet(spec, "").await;
    let pid = output(&turn(&node, PUPPET, "s", "pid").await).to_owned();

    // A deadline.
    let began = Instant::now();
    let late = run(
        &node,
        PUPPET,
        "count; sleep 60",
        &["--session", "s", "--timeout", "1s"],
    )
    .await;
    assert_eq!(late.code, Some(DEADLINE), "{late:#?}");
    assert!(
        began.elapsed() < Duration::from_secs(1) + ENDED,
        "{late:#?}"
    );
    assert_eq!(late.json()["status"], "deadline", "{late:#?}");
    // The replica that was at it is replaced, so the next turn meets another one, at once.
    let next = turn(&node, PUPPET, "s", "pid").await;
    assert_ne!(output(&next), pid);

    // By hand, from elsewhere. What the list says of it meanwhile is true.
    let (cancelled, ()) = tokio::join!(
        run(
            &node,
            PUPPET,
            "count; sleep 60",
            &["--session", "s", "--submission", "slow"]
        ),
        async {
            let listed = running(&node, "slow").await;
            assert_eq!(listed["agent"], PUPPET, "{listed:#}");
            assert_eq!(listed["session"], "s", "{listed:#}");
            assert_eq!(listed["node"], node.spec().name(), "{listed:#}");
            assert_eq!(listed["attempt"], 1, "{listed:#}");
            assert!(
                listed["worker"].as_str().unwrap().contains("agent.process"),
                "{listed:#}"
            );
            assert!(listed["deadline_ms"].as_u64().unwrap() > 0, "{listed:#}");
            assert!(listed["age_ms"].as_u64().unwrap() < 60_000, "{listed:#}");
            let began = Instant::now();
            node.cli(&["turn", "cancel", "slow"]).await.code(0);
            wait_for(
                "nothing runs",
                ENDED,
                || turns(&node),
                |turns| turns.is_empty(),
            )
            .await;
            println!("cancelled after {:?}", began.elapsed());
        },
    );
    assert_eq!(cancelled.code, Some(CANCELLED), "{cancelled:#?}");
    // A second time it says so and changes nothing.
    node.cli(&["turn", "cancel", "slow"]).await;
    let shown = node
        .cli(&["turn", "get", "slow", "-o", "json"])
        .await
        .code(0)
        .json();
    assert_eq!(shown["status"], "cancelled", "{shown:#}");

    // Ctrl-C at the command.
    let mut command = clean(vlinder());
    command
        .args([
            "agent",
            "run",
            PUPPET,
            "--session",
            "s",
            "--submission",
            "ctrl-c",
        ])
        .args(["-p", "sleep 60"])
        .env("VLINDER_DIR", node.spec().data_dir())
        .env("VLINDER_TEST_CTRL_C", node.spec().name());
    let name = node.spec().name();
    let (interrupted, ()) = tokio::join!(finish(command), async {
        running(&node, "ctrl-c").await;
        let own = proc::with_variable("VLINDER_TEST_CTRL_C", name);
        proc::send(own[0].pid, Signal::INT);
    });
    assert_eq!(interrupted.code, Some(CANCELLED), "{interrupted:#?}");
    let shown = node
        .cli(&["turn", "get", "ctrl-c", "-o", "json"])
        .await
        .code(0)
        .json();
    assert_eq!(shown["status"], "cancelled", "{shown:#}");

    // What ended turns wrote is not in the branch: their state was never taken over.
    assert_eq!(output(&turn(&node, PUPPET, "s", "count").await), "1");
    assert!(turns(&node).await.is_empty());
    node.cli(&["session", "verify", "s"]).await.code(0);
    node.stop_cleanly().await;
}

#[tokio::test]
async fn deadline_cancel_and_ctrl_c_end_a_turn_embedded() {
    ends(NodeSpec::embedded()).await;
}

#[tokio::test]
async fn deadline_cancel_and_ctrl_c_end_a_turn_on_nats() {
    let nats = NatsServer::start(CURRENT).await;
    ends(NodeSpec::on(&nats).workers("agent.process", 1)).await;
}

#[tokio::test]
async fn a_killed_client_leaves_its_turn_to_end() {
    let node = node_with_puppet(NodeSpec::embedded(), "").await;
    let mut command = clean(vlinder());
    command
        .args([
            "agent",
            "run",
            PUPPET,
            "--session",
            "s",
            "--submission",
            "left",
            "-p",
            "count; sleep 0.5",
        ])
        .env("VLINDER_DIR", node.spec().data_dir());
    let mut client = command.spawn().unwrap();
    running(&node, "left").await;
    client.kill().unwrap();
    client.wait().unwrap();
    let args = ["--session", "s", "--submission", "left"];
    let attached = run(&node, PUPPET, "count; sleep 0.5", &args)
        .await
        .code(0)
        .json();
    assert_eq!(output(&attached), "1");
    node.stop_cleanly().await;
}

/// Within it an event is told.
const QUIET: Duration = Duration::from_secs(1);

/// `vlinder events` as it runs on, with what it prints.
fn events_of(spec: &NodeSpec) -> (tokio::process::Child, Lines<BufReader<ChildStdout>>) {
    let mut command = clean(vlinder());
    command
        .args(["events", "--prefix", "turn.ended"])
        .env("HOME", spec.home())
        .env("VLINDER_DIR", spec.data_dir())
        .stdout(std::process::Stdio::piped());
    let mut command = tokio::process::Command::from(command);
    let mut child = command.kill_on_drop(true).spawn().unwrap();
    let stdout = child.stdout.take().unwrap();
    (child, BufReader::new(stdout).lines())
}

#[tokio::test]
async fn who_waits_finds_a_node_that_came_back_on_other_ports() {
    let node = node_with_puppet(NodeSpec::embedded(), "").await;
    let before = node.address("harness");
    let (_child, mut events) = events_of(node.spec());
    next_event(&node, &mut events).await;

    let spec = node.spec().clone();
    let args = [
        "agent",
        "run",
        PUPPET,
        "-p",
        "count; sleep 2; echo back",
        "-o",
        "json",
        "--timeout",
        "30s",
        "--submission",
        "x",
        "--session",
        "s",
    ];
    let (finished, node) = tokio::join!(spec.cli(&args), async {
        wait_for(
            "its first call is on record",
            Duration::from_secs(10),
            async || node.cli(&["turn", "get", "x", "-o", "json"]).await.stdout,
            |shown| shown.contains("\"put\""),
        )
        .await;
        node.kill9().await.start().await
    });
    assert_ne!(before, node.address("harness"), "the ports are free ones");
    let finished = finished.code(0).says("taking the turn up again");
    assert_eq!(output(&finished.json()), "1 back", "{finished:#?}");

    // So is who only listens.
    while let Ok(line) = tokio::time::timeout(QUIET, events.next_line()).await {
        assert!(line.unwrap().is_some(), "it ended with the first daemon");
    }
    next_event(&node, &mut events).await;
    node.stop_cleanly().await;
}

/// Turns end until one is told of.
async fn next_event(node: &Node, events: &mut Lines<BufReader<ChildStdout>>) {
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        turn(node, PUPPET, "t", "echo").await;
        match tokio::time::timeout(QUIET, events.next_line()).await {
            Ok(line) => {
                let line = line.unwrap().expect("it listens on");
                return assert!(line.contains("turn.ended"), "{line}");
            }
            Err(_) => assert!(Instant::now() < deadline, "nobody tells of turns"),
        }
    }
}
