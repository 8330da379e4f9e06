//! Which model is where: each request goes to a node that has its model (features E6, E9, C4).

use super::bed::{Client, DEAD, FRESH, hub, inference_node, request};
use super::model::Model;
use crate::support::node::free_ports;
use crate::support::{Node, wait_for};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use vlinder_testkit::{CURRENT, NatsServer};

const ALPHA: &str = "alpha:1b";
const BETA: &str = "beta:7b";
const GAMMA: &str = "gamma:latest";

fn chat(model: &str) -> Value {
    json!({
        "model": model,
        "messages": [{"role": "user", "content": "Say hi."}],
        "stream": false,
        "options": {"num_predict": 4},
    })
}

/// Asks a model and checks who answered.
async fn answered_by(client: &Client<'_>, model: &str, node: &Node) {
    let mut asked = request("ask", "", &format!("ollama/api/chat {}", chat(model)));
    asked.timeout_ms = 30_000;
    let turn = client.run(asked).await;
    let submission = turn.submission.clone();
    let said = super::bed::said(&turn.end().await);
    assert!(said.starts_with("200 "), "{model}: {said}");
    let by = client.turn(&submission).await.calls[0].by.clone();
    let name = node.spec().name();
    assert!(
        by.starts_with(&format!("{name}/")),
        "{model} was answered by {by}, not {name}"
    );
}

async fn wait_available(client: &Client<'_>, wanted: &[String], within: Duration) {
    let look = async || client.available().await;
    wait_for("these models can be had", within, look, |models| {
        *models == wanted
    })
    .await;
}

fn at(model: &str, node: &Node) -> String {
    format!("{model}@{}", node.spec().name())
}

#[tokio::test]
async fn each_request_goes_where_its_model_is() {
    let nats = NatsServer::start(CURRENT).await;
    let (alpha, mut beta) = tokio::join!(Model::named(&[ALPHA]), Model::named(&[BETA]));
    let hub = hub(&nats).start().await;
    let client = Client(&hub);
    let gamma_port = free_ports(1)[0];
    let gamma_url = format!("http://127.0.0.1:{gamma_port}");
    let specs = [&alpha.url, &beta.url, &gamma_url].map(|url| inference_node(&nats, &hub, url));
    let (a, b, c) = tokio::join!(specs[0].start(), specs[1].start(), specs[2].start());
    client.deploy_ask().await;
    wait_available(&client, &[at(ALPHA, &a), at(BETA, &b)], FRESH).await;
    answered_by(&client, ALPHA, &a).await;
    answered_by(&client, BETA, &b).await;
    answered_by(&client, ALPHA, &a).await;

    // Nobody ever offered these: an error at once, with names that are near.
    for (asked, near) in [("alfa:1b", ALPHA), ("gamma", "vlinder model available")] {
        let began = Instant::now();
        let (status, body) = client.ask("ollama/api/chat", &chat(asked)).await;
        assert_eq!(status, 404, "{body}");
        assert!(body.contains(asked) && body.contains(near), "{body}");
        assert!(
            began.elapsed() < Duration::from_secs(2),
            "after {:?}",
            began.elapsed()
        );
    }

    // An upstream that comes later is used as soon as it is there.
    let waiting = c.workers().await;
    assert_eq!(waiting[0].state, "waiting", "{waiting:#?}");
    assert!(waiting[0].reason.contains(&gamma_url), "{waiting:#?}");
    let gamma = Model::at(gamma_port, &[GAMMA]).await;
    let all = [at(ALPHA, &a), at(BETA, &b), at(GAMMA, &c)];
    wait_available(&client, &all, FRESH).await;
    answered_by(&client, "gamma", &c).await;
    let (status, tags) = client.ask("ollama/api/tags", &Value::Null).await;
    let tags: Value = serde_json::from_str(&tags).unwrap();
    let names: Vec<&str> = tags["models"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["name"].as_str().unwrap())
        .collect();
    assert_eq!((status, &names[..]), (200, &[ALPHA, BETA, GAMMA][..]));

    // An upstream that goes: its worker waits and says why, its models are not offered, others work on.
    beta.kill().await;
    let gone = b.wait_workers("the worker waits", FRESH, |workers| {
        workers[0].state == "waiting"
    });
    let gone = gone.await;
    assert!(gone[0].reason.contains(&beta.url), "{gone:#?}");
    wait_available(
        &client,
        &[at(ALPHA, &a), at(GAMMA, &c)],
        Duration::from_secs(1),
    )
    .await;
    let upstreams = client.catalog().await.upstreams;
    let of_b = upstreams
        .iter()
        .find(|upstream| upstream.node == b.spec().name())
        .unwrap();
    assert!(
        of_b.problem.contains("connection refused"),
        "{upstreams:#?}"
    );
    answered_by(&client, ALPHA, &a).await;
    waits_in_vain(
        &client,
        BETA,
        &format!("node {}: no Ollama at", b.spec().name()),
    )
    .await;

    // A node that dies: its models are not offered any more, but known.
    let name = c.spec().name().to_owned();
    c.kill9().await;
    wait_available(&client, &[at(ALPHA, &a)], DEAD).await;
    let known = client.known_models().await;
    let nodes = |model: &str| {
        known
            .iter()
            .find(|known| known.name == model)
            .unwrap()
            .nodes
            .clone()
    };
    assert_eq!(nodes(ALPHA), [a.spec().name()]);
    assert_eq!(nodes(GAMMA), [""; 0]);
    waits_in_vain(
        &client,
        "gamma",
        &format!("node {name}, which had it, is away"),
    )
    .await;

    // And back again, elsewhere: what waited there is answered here.
    let mut asked = request("ask", "", &format!("ollama/api/chat {}", chat(BETA)));
    asked.timeout_ms = 30_000;
    let mut turn = client.run(asked).await;
    turn.waits().await;
    let beta = Model::named(&[BETA]).await;
    let d = inference_node(&nats, &hub, &beta.url).start().await;
    assert!(super::bed::said(&turn.end().await).starts_with("200 "));
    answered_by(&client, BETA, &d).await;
    for node in [a, b, d, hub] {
        node.stop_cleanly().await;
    }
    drop((alpha, gamma));
}

/// A call to a model that is known but away waits, says why, and ends at its deadline.
async fn waits_in_vain(client: &Client<'_>, model: &str, why: &str) {
    let mut asked = request("ask", "", &format!("ollama/api/chat {}", chat(model)));
    asked.timeout_ms = 2_000;
    let mut turn = client.run(asked).await;
    let (reason, _) = turn.waits().await;
    assert!(reason.contains(model) && reason.contains(why), "{reason}");
    let end = turn.end().await;
    assert_eq!(
        (end.outcome.as_str(), end.code.as_str()),
        ("deadline", "no_worker")
    );
}
