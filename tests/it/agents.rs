//! Agents on a whole node, good and bad: each failure is a clear error where the user looks, and the
//! next turn works (issue 2, "What it must show" 6; features B6, D2, D4, D8).

use crate::support::agents::{PUPPET, deploy, deploy_puppet, output, puppet, run, turn};
use crate::support::bins::{clean, vlinder};
use crate::support::{Finished, Node, NodeSpec, proc, wait_for};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::process::Stdio;
use std::time::{Duration, Instant};
use vlinder_testkit::{CURRENT, NatsServer};

/// Exit code of the command line when the agent failed.
const AGENT_FAILED: i32 = 6;

async fn with_puppet(spec: NodeSpec, lines: &str) -> Node {
    let node = spec.start().await;
    deploy_puppet(&node, lines).await;
    node
}

/// One turn whose message is read from a file.
async fn run_file(node: &Node, text: &[u8]) -> Finished {
    let path = node.spec().home().join("message");
    fs::write(&path, text).unwrap();
    let mut command = clean(vlinder());
    command
        .args(["agent", "run", PUPPET, "-p", "-", "-o", "json"])
        .env("VLINDER_DIR", node.spec().data_dir())
        .stdin(Stdio::from(File::open(&path).unwrap()));
    crate::support::bins::finish(command).await
}

async fn failures_are_told(spec: NodeSpec) {
    let node = with_puppet(spec, "timeout = \"20s\"").await;
    let before = node.workers().await;
    for (said, words) in [
        ("count; status 500", "the agent says 500"),
        ("count; status 404", "the agent says 404"),
        ("count; garbage", "HTTP"),
        ("count; hangup", "agent"),
    ] {
        let failed = run(&node, PUPPET, said, &["--session", "s"]).await;
        assert_eq!(failed.code, Some(AGENT_FAILED), "{said}: {failed:#?}");
        let told = format!("{} {}", failed.stdout, failed.stderr);
        assert!(
            told.contains(words),
            "no {words:?} after {said}: {failed:#?}"
        );
        assert_eq!(failed.json()["status"], "failed", "{said}: {failed:#?}");
        assert!(failed.took < Duration::from_secs(10), "{said}: {failed:#?}");
        // The next one works.
        assert_eq!(
            output(&turn(&node, PUPPET, "t", "echo well").await),
            "well",
            "after {said}"
        );
    }
    // It kills itself at every attempt: the third is the last.
    let dead = run(&node, PUPPET, "die", &["--session", "s"]).await;
    println!("three deaths took {:?}", dead.took);
    assert_eq!(dead.code, Some(AGENT_FAILED), "{dead:#?}");
    assert_eq!(output(&turn(&node, PUPPET, "t", "echo well").await), "well");
    // A flood on stdout slows nobody and is cut, not kept in memory.
    let flood = run(&node, PUPPET, "flood 30000", &[]).await.code(0);
    assert_eq!(output(&flood.json()), "flooded");
    println!("the flood took {:?}", flood.took);
    // One that never ends is why the turn got no answer, with and without ends of lines.
    for said in ["drown", "drown x"] {
        // It died often by now: its next start may be put off for longer than the turn below may take.
        assert_eq!(output(&turn(&node, PUPPET, "t", "echo well").await), "well");
        let drowned = run(&node, PUPPET, said, &["--timeout", "4s"]).await;
        assert_eq!(drowned.code, Some(AGENT_FAILED), "{said}: {drowned:#?}");
        assert_eq!(drowned.json()["error"]["code"], "agent_flooded", "{said}");
        assert!(
            drowned.stderr.contains("flooded its output"),
            "{drowned:#?}"
        );
    }
    // It lost the right to be heard for a moment only.
    wait_for(
        "its log shows a line after the flood",
        Duration::from_secs(10),
        async || {
            turn(&node, PUPPET, "t", "print the last words").await;
            node.cli(&["agent", "logs", PUPPET]).await.stdout
        },
        |log| log.contains("the last words"),
    )
    .await;
    let logs = proc::files_below(&node.spec().data_dir().join("logs"));
    let bytes: usize = logs.iter().map(|(_, text)| text.len()).sum();
    assert!(bytes < 16 * 1024 * 1024, "{bytes} bytes of logs");
    let said = |(_, text): &(_, String)| text.contains("lines dropped");
    assert!(
        logs.iter().any(said),
        "nothing says that lines were dropped"
    );
    // Failed turns left no trace in the state.
    assert_eq!(output(&turn(&node, PUPPET, "s", "count").await), "1");
    node.cli(&["session", "verify", "s"]).await.code(0);
    // Each worker's own log tells of its jobs, tasks of one process though they may be.
    let logs = ["worker", "logs", "agent.process"];
    let said = node.cli(&logs).await.code(0).stdout;
    assert!(said.contains("trying a turn again"), "{said}");
    // None of it was felt by a worker.
    let after = node.workers().await;
    assert_eq!(
        before.iter().map(|worker| worker.pid).collect::<Vec<_>>(),
        after.iter().map(|worker| worker.pid).collect::<Vec<_>>()
    );
    node.stop_cleanly().await;
}

#[tokio::test]
async fn what_an_agent_does_wrong_is_told_embedded() {
    failures_are_told(NodeSpec::embedded()).await;
}

#[tokio::test]
async fn what_an_agent_does_wrong_is_told_on_nats() {
    let nats = NatsServer::start(CURRENT).await;
    failures_are_told(NodeSpec::on(&nats).workers("agent.process", 1)).await;
}

#[tokio::test]
async fn an_agent_that_cannot_start_is_named_at_deploy() {
    let node = Node::embedded().await;
    for (name, executable, words) in [
        ("absent", "no-such-program", "no-such-program"),
        (
            "crashes",
            "python3 -c 'import sys; print(\"the reason\", file=sys.stderr); sys.exit(7)'",
            "the reason",
        ),
        ("mute", "sleep 1000", "has not answered GET /health"),
    ] {
        let directory = puppet(&node, name, "");
        let manifest = fs::read_to_string(directory.join("agent.toml")).unwrap();
        let quoted = toml::Value::String(executable.to_owned()).to_string();
        let manifest = manifest.replace("\"python3 agent.py\"", &quoted);
        fs::write(directory.join("agent.toml"), manifest).unwrap();
        let path = directory.display().to_string();
        let args = [
            "agent",
            "deploy",
            "-p",
            &path,
            "--wait",
            "--wait-timeout",
            "4s",
        ];
        let failed = node.cli(&args).await;
        println!(
            "{name}: {:?} after {:?}: {}",
            failed.code, failed.took, failed.stderr
        );
        assert!(
            matches!(failed.code, Some(6 | 7 | 3)),
            "{name}: {failed:#?}"
        );
        assert!(
            failed.stderr.contains(words),
            "{name}: no {words:?}: {failed:#?}"
        );
        // It is not "starting" for ever: who looks later is told the same.
        let wanted = match name {
            "mute" => "starting",
            _ => "crash-looping",
        };
        let listed = wait_for(
            format!("{name} is listed as {wanted} with the reason"),
            Duration::from_secs(10),
            async || node.cli(&["agent", "list", "-o", "json"]).await.json(),
            |listed| {
                let reason = listed[0]["reason"].as_str().unwrap_or_default();
                listed[0]["status"] == wanted && reason.contains(words)
            },
        )
        .await;
        let replica = &listed[0]["instances"][0];
        assert_eq!(replica["state"], wanted, "{listed:#}");
        node.cli(&["agent", "delete", name]).await.code(0);
    }
    node.stop_cleanly().await;
}

#[tokio::test]
async fn versions_count_from_one_for_each_agent() {
    let node = Node::embedded().await;
    let version = async |name: &str, lines: &str| {
        let path = puppet(&node, name, lines).display().to_string();
        let args = ["agent", "deploy", "-p", &path, "-o", "json"];
        node.cli(&args).await.code(0).json()["version"].clone()
    };
    assert_eq!(version("one", "").await, 1);
    assert_eq!(version("two", "").await, 1);
    assert_eq!(version("one", "").await, 1, "nothing changed");
    assert_eq!(version("one", "timeout = \"30s\"").await, 2);
    assert_eq!(version("two", "timeout = \"30s\"").await, 2);
    // A number is never given twice.
    let deleted = node.cli(&["agent", "delete", "one", "-o", "json"]).await;
    assert_eq!(deleted.code(0).json()["version"], 2);
    assert_eq!(version("one", "").await, 3);
    let list = node.cli(&["agent", "list", "-o", "json"]).await.json();
    let versions: Vec<_> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|a| &a["version"])
        .collect();
    assert_eq!(versions, [3, 2], "{list:#}");
    node.stop_cleanly().await;
}

#[tokio::test]
async fn hostile_manifests_are_refused() {
    let node = Node::embedded().await;
    let directory = puppet(&node, "fine", "");
    let manifest = fs::read_to_string(directory.join("agent.toml")).unwrap();
    let long = "a".repeat(64);
    let names = [
        "../../etc",
        "",
        ".",
        "a/b",
        "A",
        "a b",
        "a.b",
        "a*",
        ">",
        "ä",
        long.as_str(),
        "a\\u0000b",
    ];
    for name in names {
        fs::write(
            directory.join("agent.toml"),
            manifest.replace("\"fine\"", &format!("\"{name}\"")),
        )
        .unwrap();
        let path = directory.display().to_string();
        let refused = node.cli(&["agent", "deploy", "-p", &path]).await;
        assert_eq!(refused.code, Some(2), "{name:?}: {refused:#?}");
        assert!(refused.stderr.contains("name"), "{name:?}: {refused:#?}");
    }
    for (line, word) in [
        ("replicas = 100000", "replicas"),
        ("replicas = -1", "replicas"),
        ("timeout = \"soon\"", "timeout"),
        ("no_such_key = 1", "no_such_key"),
        ("vector_storage = \"file:///etc\"", "vector_storage"),
        (
            "vector_storage = \"sqlite:///etc/passwd\"",
            "vector_storage",
        ),
        ("vector_storage = \"sqlite://../../x\"", "vector_storage"),
        ("vector_storage = \"\"", "vector_storage"),
    ] {
        fs::write(directory.join("agent.toml"), format!("{manifest}{line}\n")).unwrap();
        let path = directory.display().to_string();
        let refused = node.cli(&["agent", "deploy", "-p", &path]).await;
        assert_eq!(refused.code, Some(2), "{line}: {refused:#?}");
        assert!(refused.stderr.contains(word), "{line}: {refused:#?}");
    }
    let agents = node
        .cli(&["agent", "list", "-o", "json"])
        .await
        .code(0)
        .json();
    assert_eq!(agents.as_array().map(Vec::len), Some(0), "{agents:#}");
    node.stop_cleanly().await;
}

#[tokio::test]
async fn large_messages_pass_and_too_large_ones_are_refused() {
    for spec in [NodeSpec::embedded()] {
        let node = with_puppet(spec, "").await;
        let text = format!("back\n{}", "0123456789abcdef".repeat(20 * 65536));
        let back = run_file(&node, text.as_bytes()).await.code(0).json();
        println!("20 MiB took {}", back["duration_ms"]);
        assert!(output(&back) == text, "20 MiB did not come back equal");

        let refused = run_file(&node, &vec![b'x'; 300 * 1024 * 1024]).await;
        assert!(
            matches!(refused.code, Some(1 | 2)),
            "{:?} {}",
            refused.code,
            refused.stderr
        );
        assert!(
            refused.stderr.contains("MiB") || refused.stderr.contains("bytes"),
            "{}",
            refused.stderr
        );
        assert!(refused.took < Duration::from_secs(10), "{:?}", refused.took);

        // So is an answer that is too large; one without an end is cut off.
        for said in ["large 100000000", "endless"] {
            let refused = run(&node, PUPPET, said, &[]).await;
            assert_eq!(refused.code, Some(AGENT_FAILED), "{said}: {refused:?}");
            assert!(
                refused.took < Duration::from_secs(20),
                "{said}: {:?}",
                refused.took
            );
        }
        assert_eq!(output(&turn(&node, PUPPET, "t", "echo well").await), "well");
        node.stop_cleanly().await;
    }
}

async fn replicas_share(spec: NodeSpec) {
    let node = with_puppet(spec, "replicas = 4").await;
    wait_for(
        "four replicas",
        Duration::from_secs(20),
        async || {
            node.cli(&["agent", "get", PUPPET, "-o", "json"])
                .await
                .stdout
        },
        |shown| shown.matches("\"ready\"").count() >= 4,
    )
    .await;
    // Four at once need little more than one.
    let began = Instant::now();
    let four = (0..4).map(|_| run(&node, PUPPET, "pid; sleep 1", &[]));
    let mut pids: Vec<String> = vec![];
    for finished in futures::future::join_all(four).await {
        pids.push(output(&finished.code(0).json()).to_owned());
    }
    println!("four turns took {:?}", began.elapsed());
    assert!(
        began.elapsed() < Duration::from_millis(2800),
        "{:?}",
        began.elapsed()
    );
    pids.sort_unstable();
    pids.dedup();
    assert_eq!(pids.len(), 4, "four replicas: {pids:?}");

    let mut served: BTreeMap<String, usize> = BTreeMap::new();
    for _ in 0..10 {
        let four = (0..4).map(|_| run(&node, PUPPET, "pid; sleep 0.05", &[]));
        for finished in futures::future::join_all(four).await {
            *served
                .entry(output(&finished.code(0).json()).to_owned())
                .or_default() += 1;
        }
    }
    println!("{served:?}");
    assert_eq!(served.len(), 4);
    assert!(
        served.values().all(|turns| (8..=12).contains(turns)),
        "{served:?}"
    );
    node.stop_cleanly().await;
}

#[tokio::test]
async fn four_replicas_share_the_turns_embedded() {
    replicas_share(NodeSpec::embedded()).await;
}

#[tokio::test]
async fn four_replicas_share_the_turns_on_nats() {
    let nats = NatsServer::start(CURRENT).await;
    replicas_share(NodeSpec::on(&nats).workers("agent.process", 2)).await;
}

#[tokio::test]
async fn an_agent_goes_with_its_whole_family() {
    let nats = NatsServer::start(CURRENT).await;
    for spec in [
        NodeSpec::embedded(),
        NodeSpec::on(&nats).workers("agent.process", 1),
    ] {
        let node = with_puppet(spec, "").await;
        let number = |turn: &serde_json::Value| output(turn).parse::<u32>().unwrap();
        let gone = |pid: u32| {
            wait_for(
                "it is gone",
                Duration::from_secs(5),
                move || std::future::ready(proc::lives(pid)),
                |lives| !lives,
            )
        };
        // A child that ignores SIGTERM, and the agent killed: both go, another agent comes.
        let child = number(&turn(&node, PUPPET, "s", "child").await);
        let agent = number(&turn(&node, PUPPET, "s", "pid").await);
        assert!(proc::lives(child) && proc::lives(agent));
        proc::kill_if_alive(agent);
        gone(child).await;
        let next = number(&turn(&node, PUPPET, "s", "pid").await);
        assert_ne!(next, agent);
        // Deleted: likewise.
        let child = number(&turn(&node, PUPPET, "s", "child").await);
        node.cli(&["agent", "delete", PUPPET]).await.code(0);
        gone(next).await;
        gone(child).await;
        node.stop_cleanly().await;
    }
}

#[tokio::test]
async fn a_turn_outlives_the_death_of_its_agent() {
    let nats = NatsServer::start(CURRENT).await;
    for spec in [
        NodeSpec::embedded(),
        NodeSpec::on(&nats).workers("agent.process", 1),
    ] {
        let node = with_puppet(spec, "").await;
        let agent: u32 = output(&turn(&node, PUPPET, "s", "pid").await)
            .parse()
            .unwrap();
        let (finished, ()) = tokio::join!(
            run(
                &node,
                PUPPET,
                "count; sleep 1; pid",
                &["--session", "s", "--submission", "x"]
            ),
            async {
                wait_for(
                    "its first call is on record",
                    Duration::from_secs(5),
                    async || node.cli(&["turn", "get", "x", "-o", "json"]).await.stdout,
                    |shown| shown.contains("\"put\""),
                )
                .await;
                proc::kill_if_alive(agent);
            },
        );
        let finished = finished.code(0).json();
        let (count, pid) = output(&finished).split_once(' ').unwrap();
        assert_eq!(
            count, "1",
            "the call made before the kill is not made twice"
        );
        assert_ne!(pid, agent.to_string());
        assert_eq!(output(&turn(&node, PUPPET, "s", "count").await), "2");
        node.stop_cleanly().await;
    }
}

#[tokio::test]
async fn a_redeployed_agent_replaces_the_old_one() {
    let node = with_puppet(NodeSpec::embedded(), "").await;
    let old = output(&turn(&node, PUPPET, "s", "count; pid").await).to_owned();
    let directory = puppet(&node, PUPPET, "timeout = \"30s\"");
    deploy(&node, &directory).await;
    let new = wait_for(
        "the new version answers",
        Duration::from_secs(10),
        async || output(&turn(&node, PUPPET, "t", "pid").await).to_owned(),
        |pid| !old.ends_with(pid.as_str()),
    )
    .await;
    // Sessions go on with the new one.
    let next = turn(&node, PUPPET, "s", "count; pid").await;
    assert_eq!(output(&next), format!("2 {new}"));
    node.stop_cleanly().await;
}
