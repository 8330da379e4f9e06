//! One manifest, three topologies: the same conversation embedded, on one node with NATS, and with the
//! store on another node (features D11).

use super::bed::{Client, example, gpu_node, hub, said};
use crate::support::{Node, NodeSpec};
use vlinder_testkit::{CURRENT, NatsServer};

const CONVERSATION: [&str; 7] = [
    "remember the door code is 4711",
    "remember milk, \"bread\" and ümläuts",
    "recall code",
    "list",
    "forget 1",
    "list",
    "count",
];

/// What was said to each line, and the root of the state after it.
async fn converse(node: &Node) -> Vec<(String, String)> {
    let client = Client(node);
    client.deploy(&example("notes-agent")).await;
    let mut replies = vec![];
    for line in CONVERSATION {
        let end = client.say("notes", "tour", line).await;
        replies.push((said(&end), end.state));
    }
    replies
}

#[tokio::test]
async fn the_same_manifest_holds_the_same_conversation_everywhere() {
    let node = Node::embedded().await;
    let embedded = converse(&node).await;
    node.stop_cleanly().await;
    assert_eq!(embedded[6].0, "You have 1 note after 7 turns.");

    let nats = NatsServer::start(CURRENT).await;
    let node = NodeSpec::on(&nats)
        .workers("agent.process", 1)
        .start()
        .await;
    assert_eq!(converse(&node).await, embedded, "on one node with NATS");
    node.stop_cleanly().await;

    let nats = NatsServer::start(CURRENT).await;
    let hub = hub(&nats)
        .workers("storage.object.sqlite", 0)
        .workers("storage.vector.sqlite", 0)
        .start()
        .await;
    let store = gpu_node(&nats, &hub, "http://127.0.0.1:9")
        .workers("inference.ollama", 0)
        .workers("storage.object.sqlite", 1)
        .start()
        .await;
    assert_eq!(
        converse(&hub).await,
        embedded,
        "with the store on another node"
    );
    let calls = Client(&hub).last_calls("tour").await;
    let by = format!("{}/storage.object.sqlite/0", store.spec().name());
    assert!(
        calls.len() > 1 && calls.iter().all(|call| call.by == by),
        "{calls:#?}"
    );
    store.stop_cleanly().await;
    hub.stop_cleanly().await;
}
