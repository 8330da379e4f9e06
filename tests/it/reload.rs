//! Changes while the node runs: by SIGHUP and by `worker scale` (features A7).

use crate::support::agents::{PUPPET, deploy_puppet, output, turn};
use crate::support::node::free_ports;
use crate::support::{Node, NodeSpec, Worker, wait_for};
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::time::Duration;
use vlinder_testkit::{CURRENT, NatsServer};

/// A change takes a few processes to start or drain.
const CHANGED: Duration = Duration::from_secs(10);
const OBJECT: &str = "storage.object.sqlite";

fn pids(workers: &[Worker]) -> BTreeMap<(String, u32), (u32, u64)> {
    let pairs = workers.iter();
    pairs
        .map(|worker| (worker.key(), (worker.pid, worker.restarts)))
        .collect()
}

/// Fails if anyone but the workers of `role` was touched.
fn only_changed(role: &str, before: &[Worker], after: &[Worker]) {
    let others = |workers| {
        let mut pids = pids(workers);
        pids.retain(|key, _| key.0 != role);
        pids
    };
    assert_eq!(
        others(before),
        others(after),
        "others than {role} were touched"
    );
}

async fn counted(node: &Node, role: &str, count: usize) -> Vec<Worker> {
    node.wait_workers(format!("{count} of {role}"), CHANGED, |workers| {
        let own = workers.iter().filter(|worker| worker.role == role);
        own.clone().count() == count && own.clone().all(Worker::is_up)
    })
    .await
}

/// Sends SIGHUP and waits until the log says what became of it.
async fn reload(node: &Node, says: &str) {
    let before = node.log().matches(says).count();
    node.signal(Signal::HUP);
    wait_for(
        "the reload is done",
        CHANGED,
        async || node.log(),
        |log| log.matches(says).count() > before,
    )
    .await;
}

const TAKEN: &str = "the configuration was taken over";
const NOT_TAKEN: &str = "the configuration was not taken over";

#[tokio::test]
async fn a_changed_file_changes_only_what_it_changes() {
    let nats = NatsServer::start(CURRENT).await;
    let spec = NodeSpec::on(&nats).config("distributed.workers.storage.object.sqlite = 1\n");
    let node = spec.start().await;
    let first = node.workers().await;

    // Up: the one that is there stays.
    node.spec()
        .clone()
        .config("distributed.workers.storage.object.sqlite = 3\n");
    reload(&node, TAKEN).await;
    let more = counted(&node, OBJECT, 3).await;
    only_changed(OBJECT, &first, &more);
    let zero = (OBJECT.to_owned(), 0);
    assert_eq!(pids(&first)[&zero], pids(&more)[&zero]);

    // Down, and to nothing.
    for count in [2, 0] {
        let text = format!("distributed.workers.storage.object.sqlite = {count}\n");
        node.spec().clone().config(&text);
        reload(&node, TAKEN).await;
        let less = counted(&node, OBJECT, count).await;
        only_changed(OBJECT, &first, &less);
    }
    // The same again is no change.
    let before = node.workers().await;
    reload(&node, TAKEN).await;
    assert_eq!(pids(&before), pids(&node.workers().await));
    assert_eq!(node.get("/readyz").await.unwrap().0, 200);
    node.stop_cleanly().await;
}

#[tokio::test]
async fn a_log_level_changes_without_a_restart() {
    let nats = NatsServer::start(CURRENT).await;
    let node = NodeSpec::on(&nats)
        .config("logging.level = \"warn\"\n")
        .start()
        .await;
    let before = node.workers().await;
    node.spec().clone().config("logging.level = \"debug\"\n");
    // Above `info` even the good news is not logged, so the file of the new level is the sign.
    node.signal(Signal::HUP);
    wait_for(
        "the daemon logs more",
        CHANGED,
        async || node.log(),
        |log| log.contains(TAKEN),
    )
    .await;
    // A worker too: an unauthenticated call is logged there at `warn`, a restart would show.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(pids(&before), pids(&node.workers().await));
    node.stop_cleanly().await;
}

#[tokio::test]
async fn a_setting_of_one_role_restarts_that_role_alone() {
    let nats = NatsServer::start(CURRENT).await;
    let spec = NodeSpec::on(&nats).without("VLINDER_OLLAMA_ENDPOINT");
    let node = spec
        .config("ollama.endpoint = \"http://127.0.0.1:9\"\n")
        .start()
        .await;
    let before = node.workers().await;
    node.spec()
        .clone()
        .config("ollama.endpoint = \"http://127.0.0.1:19\"\n");
    reload(&node, TAKEN).await;
    let role = "inference.ollama";
    let after = node
        .wait_workers("it knows the new endpoint", CHANGED, |workers| {
            let worker = workers.iter().find(|worker| worker.role == role);
            worker.is_some_and(|worker| worker.reason.contains("127.0.0.1:19"))
        })
        .await;
    only_changed(role, &before, &after);
    node.stop_cleanly().await;
}

#[tokio::test]
async fn a_bad_file_leaves_everything_as_it_was_and_says_why() {
    for spec in [NodeSpec::embedded()] {
        let node = spec
            .config("distributed.workers.harness = 2\n")
            .start()
            .await;
        let before = node.workers().await;
        for bad in [
            "distributed.workers.harness = 99\n",
            "not toml at all [",
            "x = 1\n",
        ] {
            node.spec().clone().config(bad);
            reload(&node, NOT_TAKEN).await;
            assert_eq!(pids(&before), pids(&node.workers().await), "{bad:?}");
        }
        let log = node.log();
        assert!(log.contains("distributed.workers.harness = 99"), "{log}");
        assert_eq!(node.get("/readyz").await.unwrap().0, 200);
        // Corrected, it is taken over.
        node.spec()
            .clone()
            .config("distributed.workers.harness = 1\n");
        reload(&node, TAKEN).await;
        counted(&node, "harness", 1).await;
        node.stop_cleanly().await;
    }
}

async fn scaled_lives_on(spec: NodeSpec) {
    let node = spec.start().await;
    let before = node.workers().await;
    let scaled = node
        .cli(&["worker", "scale", "storage.object.sqlite=3", "-o", "json"])
        .await;
    println!("{}", scaled.code(0).stdout);
    let after = counted(&node, OBJECT, 3).await;
    only_changed(OBJECT, &before, &after);
    node.cli(&["worker", "scale", "registry=2"]).await.code(0);
    counted(&node, "registry", 2).await;

    // It outlives both ways to end, and says where it is from.
    let spec = node.kill9().await;
    let shown = spec
        .run(&["config", "show", "--origin"])
        .await
        .code(0)
        .stdout;
    let line = shown
        .lines()
        .find(|line| line.contains("live") && line.contains("= 3"));
    assert!(line.is_some(), "{shown}");
    let node = spec.start().await;
    counted(&node, OBJECT, 3).await;
    counted(&node, "registry", 2).await;
    let node = node.stop_cleanly().await.start().await;
    counted(&node, OBJECT, 3).await;

    // A reload keeps it too.
    reload(&node, TAKEN).await;
    counted(&node, OBJECT, 3).await;
    node.cli(&["worker", "scale", "storage.object.sqlite=1"])
        .await
        .code(0);
    counted(&node, OBJECT, 1).await;
    node.stop_cleanly().await;
}

#[tokio::test]
async fn a_live_scale_outlives_a_restart_embedded() {
    scaled_lives_on(NodeSpec::embedded()).await;
}

#[tokio::test]
async fn a_live_scale_outlives_a_restart_on_nats() {
    let nats = NatsServer::start(CURRENT).await;
    scaled_lives_on(NodeSpec::on(&nats)).await;
}

#[tokio::test]
async fn a_service_can_be_scaled_to_nothing_and_back() {
    let nats = NatsServer::start(CURRENT).await;
    let node = Node::on(&nats).await;
    let list = ["secret", "list"];
    node.cli(&list).await.code(0);
    node.cli(&["worker", "scale", "secret=0"]).await.code(0);
    counted(&node, "secret", 0).await;
    // Refused at once, not left to wait for nobody.
    let refused = node.cli(&list).await.code(3);
    assert!(refused.took < Duration::from_secs(15), "{refused:#?}");
    node.cli(&["worker", "scale", "secret=2"]).await.code(0);
    counted(&node, "secret", 2).await;
    node.cli(&list).await.code(0);
    node.stop_cleanly().await;
}

#[tokio::test]
async fn a_service_that_was_never_there_can_be_added() {
    let nats = NatsServer::start(CURRENT).await;
    let spec = NodeSpec::on(&nats)
        .fixed_ports()
        .workers("catalog", 0)
        .workers("secret", 0);
    let node = spec.start().await;
    // One port is free, the other is somebody else's.
    let taken = free_ports(1)[0];
    let holder = std::net::TcpListener::bind(("127.0.0.1", taken)).unwrap();
    let node = node
        .stop_cleanly()
        .await
        .var("VLINDER_DISTRIBUTED_PORTS_CATALOG", taken)
        .start()
        .await;
    let before = node.workers().await;
    node.cli(&["worker", "scale", "secret=1"]).await.code(0);
    let after = counted(&node, "secret", 1).await;
    only_changed("secret", &before, &after);
    node.cli(&["secret", "list"]).await.code(0);

    node.cli(&["worker", "scale", "catalog=1"]).await.code(0);
    wait_for(
        "the reason is told",
        CHANGED,
        async || node.log(),
        |log| log.contains(NOT_TAKEN) && log.contains(&format!("port {taken} (catalog) is in use")),
    )
    .await;
    only_changed("secret", &before, &node.workers().await);
    // And it does not stand in the way of the next start.
    let node = node.stop_cleanly().await.start().await;
    counted(&node, "secret", 1).await;
    drop(holder);
    node.stop_cleanly().await;
}

/// While one client counts, workers of every kind it needs come and go.
async fn scaling_loses_no_job(spec: NodeSpec) {
    let node = spec.start().await;
    deploy_puppet(&node, "replicas = 2").await;
    let talking = async {
        for number in 1..=40 {
            let said = turn(&node, PUPPET, "s", "count; sleep 0.02").await;
            assert_eq!(output(&said), number.to_string());
        }
    };
    let scaling = async {
        for count in [2, 1, 3, 1] {
            for role in ["agent.process", OBJECT, "harness", "state"] {
                let order = format!("{role}={count}");
                node.cli(&["worker", "scale", &order]).await.code(0);
                counted(&node, role, count).await;
            }
        }
    };
    tokio::join!(talking, scaling);
    let dead = node
        .cli(&["queue", "dead", "list", "-o", "json"])
        .await
        .code(0)
        .json();
    assert_eq!(dead.as_array().map(Vec::len), Some(0), "{dead:#}");
    node.cli(&["session", "verify", "s"]).await.code(0);
    node.stop_cleanly().await;
}

#[tokio::test]
async fn scaling_up_and_down_loses_no_job_embedded() {
    scaling_loses_no_job(NodeSpec::embedded()).await;
}

#[tokio::test]
async fn scaling_up_and_down_loses_no_job_on_nats() {
    let nats = NatsServer::start(CURRENT).await;
    scaling_loses_no_job(NodeSpec::on(&nats).workers("agent.process", 1)).await;
}

#[tokio::test]
async fn a_scale_that_cannot_be_is_refused_with_the_reason() {
    let node = Node::embedded().await;
    let before = node.workers().await;
    for (order, says) in [
        ("harnes=2", "harnes"),
        ("registry=1000", "1000"),
        ("agent.lambda=1", "agent.lambda"),
        ("registry=-1", "-1"),
        ("registry", "registry"),
    ] {
        let refused = node.cli(&["worker", "scale", order]).await;
        assert!(matches!(refused.code, Some(2 | 9)), "{order}: {refused:#?}");
        assert!(refused.stderr.contains(says), "{order}: {refused:#?}");
    }
    let refused = node
        .cli(&["worker", "scale", "registry=1", "--node", "nowhere"])
        .await;
    assert_eq!(refused.code, Some(5), "{refused:#?}");
    assert_eq!(pids(&before), pids(&node.workers().await));
    node.stop_cleanly().await;
}
