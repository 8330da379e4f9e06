//! Stopping: asked politely, asked twice, killed (features A5, A6).

use crate::support::agents::{PUPPET, deploy_puppet, output, turn};
use crate::support::node::{NodeSpec, ORPHAN_DEADLINE, STOP_DEADLINE};
use crate::support::{Node, proc, wait_for};
use rustix::process::Signal;
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};
use vlinder_proto::harness::EventsRequest;
use vlinder_proto::harness::harness_client::HarnessClient;
use vlinder_testkit::{CURRENT, NatsServer};

/// A second signal ends everything at once.
const NOW: Duration = Duration::from_secs(2);

async fn stops_on(spec: NodeSpec, signal: Signal) {
    let mut node = spec.fixed_ports().start().await;
    let ports: Vec<String> = node.addresses().into_values().collect();
    node.signal(signal);
    let began = Instant::now();
    let status = node.wait_end(STOP_DEADLINE).await;
    println!("{signal:?}: ended after {:?}", began.elapsed());
    assert_eq!(status.code(), Some(0));
    let left = node.spec().processes();
    assert!(left.is_empty(), "{left:#?}");
    for address in ports {
        let address = address.trim_start_matches("http://");
        TcpListener::bind(address).unwrap_or_else(|error| panic!("{address}: {error}"));
    }
    let log = node.log();
    assert!(log.contains("draining") && log.contains("stopped"), "{log}");
    assert!(!log.contains("killed="), "{log}");
    assert!(!log.contains("panicked"), "{log}");
}

#[tokio::test]
async fn an_embedded_node_drains_on_either_signal() {
    stops_on(NodeSpec::embedded(), Signal::TERM).await;
    stops_on(NodeSpec::embedded(), Signal::INT).await;
}

#[tokio::test]
async fn a_node_on_nats_drains_on_either_signal() {
    let nats = NatsServer::start(CURRENT).await;
    stops_on(NodeSpec::on(&nats), Signal::TERM).await;
    stops_on(NodeSpec::on(&nats), Signal::INT).await;
}

async fn stops_beside_clients(spec: NodeSpec) {
    let node = spec.start().await;
    let url = format!("{}/events", node.address("http"));
    let client = crate::support::faces::client(false);
    let stream = client
        .get(url)
        .bearer_auth(node.token())
        .send()
        .await
        .unwrap();
    assert_eq!(stream.status(), 200);
    // Streams without an end, and connections that never say a word.
    let mut events = HarnessClient::new(node.grpc("harness"));
    let events = events.events(EventsRequest::default()).await.unwrap();
    let silent: Vec<TcpStream> = node
        .addresses()
        .values()
        .map(|address| TcpStream::connect(address.trim_start_matches("http://")).unwrap())
        .collect();
    let began = Instant::now();
    node.stop_cleanly().await;
    println!("stopped after {:?}", began.elapsed());
    assert!(
        began.elapsed() < Duration::from_secs(4),
        "{:?}",
        began.elapsed()
    );
    drop((stream, events, silent));
}

#[tokio::test]
async fn open_streams_and_idle_connections_do_not_hold_up_the_end() {
    stops_beside_clients(NodeSpec::embedded()).await;
    let nats = NatsServer::start(CURRENT).await;
    stops_beside_clients(NodeSpec::on(&nats)).await;
}

#[tokio::test]
async fn a_second_signal_ends_it_now() {
    let nats = NatsServer::start(CURRENT).await;
    let mut node = Node::on(&nats).await;
    let workers = node.workers().await;
    let frozen = workers
        .iter()
        .find(|worker| worker.role == "harness")
        .unwrap();
    // It cannot finish, so the drain would wait for it.
    proc::send(frozen.pid, Signal::STOP);
    node.signal(Signal::TERM);
    wait_for(
        "the drain begins",
        NOW,
        async || node.log(),
        |log| log.contains("draining"),
    )
    .await;
    assert!(node.ended().is_none(), "it did not wait for its workers");
    node.signal(Signal::TERM);
    let began = Instant::now();
    node.wait_end(NOW).await;
    println!("ended after {:?}", began.elapsed());
    wait_for(
        "no child is left",
        ORPHAN_DEADLINE,
        async || node.spec().processes(),
        |left| left.is_empty(),
    )
    .await;
}

#[tokio::test]
async fn no_child_outlives_a_killed_daemon() {
    let nats = NatsServer::start(CURRENT).await;
    let mut spec = NodeSpec::on(&nats).workers("registry", 2).fixed_ports();
    for _ in 0..3 {
        let node = spec.start().await;
        let children = proc::children(node.pid());
        assert!(children.len() > 8, "{children:#?}");
        // Asserts that nothing is left within 2 s; the next start needs the same ports.
        spec = node.kill9().await;
    }
    spec.start().await.stop_cleanly().await;
}

#[tokio::test]
async fn a_daemon_killed_in_mid_start_leaves_nothing() {
    let nats = NatsServer::start(CURRENT).await;
    let spec = NodeSpec::on(&nats).fixed_ports();
    for children in [1, 3, 6] {
        let node = spec.spawn();
        let pid = node.pid();
        wait_for(
            "some children",
            Duration::from_secs(10),
            async || proc::children(pid).len(),
            |count| *count >= children,
        )
        .await;
        node.kill9().await;
    }
    spec.start().await.stop_cleanly().await;
}

async fn running_work_is_finished_or_handed_back(spec: NodeSpec) {
    // The same ports after a restart, so that a client finds the daemon again by itself.
    let mut spec = spec.fixed_ports();
    for (name, seconds, signal) in [("short", 0.5, Signal::TERM), ("long", 1.5, Signal::INT)] {
        let mut node = spec.start().await;
        deploy_puppet(&node, "").await;
        let before = turn(&node, PUPPET, "s", "count").await;
        let said = format!("count; sleep {seconds}");
        let args = ["agent", "run", PUPPET, "-p", &said, "-o", "json"];
        let args = [&args[..], &["--session", "s", "--submission", name]].concat();
        let stopped_and_started = async {
            wait_for(
                "the turn is at work",
                Duration::from_secs(10),
                async || node.cli(&["turn", "get", name, "-o", "json"]).await.stdout,
                |shown| shown.contains("\"put\""),
            )
            .await;
            node.signal(signal);
            let began = Instant::now();
            let status = node.wait_end(Duration::from_secs(25)).await;
            println!(
                "with a turn of {seconds} s: ended after {:?}",
                began.elapsed()
            );
            assert_eq!(status.code(), Some(0));
            drop(node);
            spec.start().await
        };
        let (node, finished) = tokio::join!(stopped_and_started, spec.cli(&args));
        // Answered once, whether it ended before the daemon or after its return.
        let number = |turn: &serde_json::Value| output(turn).parse::<u32>().unwrap();
        assert_eq!(number(&finished.code(0).json()), number(&before) + 1);
        let after = turn(&node, PUPPET, "s", "count").await;
        assert_eq!(number(&after), number(&before) + 2);
        spec = node.stop_cleanly().await;
    }
}

#[tokio::test]
async fn a_drain_loses_no_running_turn_embedded() {
    running_work_is_finished_or_handed_back(NodeSpec::embedded()).await;
}

#[tokio::test]
async fn a_drain_loses_no_running_turn_on_nats() {
    let nats = NatsServer::start(CURRENT).await;
    running_work_is_finished_or_handed_back(NodeSpec::on(&nats).workers("agent.process", 1)).await;
}
