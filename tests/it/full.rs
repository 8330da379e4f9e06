//! A log that is full refuses new work and says so; what is on record stays readable, and room brings
//! everything back (features B5; issue 2, "What it must show" 6).

use crate::support::NodeSpec;
use crate::support::agents::{PUPPET, deploy_puppet, output, run, turn};
use vlinder_testkit::{CURRENT, NatsServer};

/// The log of the test, in bytes, and what one turn adds to it.
const LOG_BYTES: usize = 4 * 1024 * 1024;
const LARGE: usize = 256 * 1024;
/// Small enough to be in the log itself, where the large ones are in the store beside it.
const SMALL: usize = 48 * 1024;

async fn refuses_and_recovers(spec: NodeSpec, turn_bytes: usize) {
    let small = spec.clone().var("VLINDER_QUEUE_MAX_BYTES", LOG_BYTES);
    let node = small.start().await;
    deploy_puppet(&node, "").await;
    turn(&node, PUPPET, "s", "count").await;
    // Noise: the log may compress, which is its right.
    let mut full = None;
    for number in 0..2 * LOG_BYTES / turn_bytes {
        let said = format!("large {turn_bytes}; echo {number}");
        let session = format!("filler-{number}");
        let finished = run(
            &node,
            PUPPET,
            &said,
            &["--session", &session, "--timeout", "20s"],
        )
        .await;
        if finished.code != Some(0) {
            full = Some((number, finished));
            break;
        }
    }
    let (number, refused) = full.expect("a log of 4 MiB takes no 8 MiB");
    assert!(number > 4, "refused after {number} turns: {refused:#?}");
    println!("turn {number}: exit {:?}: {}", refused.code, refused.stderr);
    assert!(refused.stderr.contains("full"), "{refused:#?}");
    // Reading goes on, nobody died.
    node.cli(&["session", "get", "s"]).await.code(0);
    node.cli(&["session", "verify", "s"]).await.code(0);
    node.cli(&["status"]).await.code(0);
    let workers = node.workers().await;
    assert!(
        workers
            .iter()
            .all(|worker| worker.restarts == 0 && worker.is_up()),
        "{workers:#?}"
    );

    // More room, and the session goes on.
    let node = node
        .stop_cleanly()
        .await
        .var("VLINDER_QUEUE_MAX_BYTES", 8 * LOG_BYTES)
        .start()
        .await;
    assert_eq!(output(&turn(&node, PUPPET, "s", "count").await), "2");
    node.stop_cleanly().await;
}

#[tokio::test]
async fn a_full_log_refuses_and_recovers_embedded() {
    for bytes in [SMALL, LARGE] {
        refuses_and_recovers(NodeSpec::embedded(), bytes).await;
    }
}

#[tokio::test]
async fn a_full_log_refuses_and_recovers_on_nats() {
    for bytes in [SMALL, LARGE] {
        let nats = NatsServer::start(CURRENT).await;
        refuses_and_recovers(NodeSpec::on(&nats).workers("agent.process", 1), bytes).await;
    }
}
