//! Agents as models: the official OpenAI client against the HTTP face (interfaces.md §6, features L1, B13).

use crate::cluster::bed::{Client, gpu_node, hub, smollm};
use crate::cluster::model::python;
use crate::support::agents::deploy;
use crate::support::bins::{Finished, finish};
use crate::support::{Node, NodeSpec, proc, wait_for};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use vlinder_testkit::{CURRENT, NatsServer};

/// A turn that its client left is over by then.
const ENDED: Duration = Duration::from_secs(5);

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/gateway")
}

/// Deploys the agent that says what it was told.
async fn deploy_teller(node: &Node) {
    let directory = node.spec().home().join("teller");
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::copy(fixtures().join("agent.py"), directory.join("agent.py")).unwrap();
    let manifest = "name = 'teller'\ndescription = 'For a test.'\nruntime = 'process'\nconcurrency = 1\nreplicas = 2\n\
        executable = 'python3 agent.py'\n[requirements.services.infer]\nprovider = 'ollama'\n";
    std::fs::write(directory.join("agent.toml"), manifest).unwrap();
    deploy(node, &directory).await;
}

/// What the official client makes of it.
async fn client(node: &Node, what: &str) -> Finished {
    let mut command = Command::new(python());
    command.arg(fixtures().join("client.py"));
    command.args([&node.address("http"), &node.token(), what]);
    finish(command).await
}

async fn done(node: &Node, what: &str) -> Value {
    let value = client(node, what).await.code(0).json();
    println!("{what}: {value:#}");
    value
}

/// The class, status and code of an error.
fn head(error: &Value) -> Value {
    Value::from(error.as_array().unwrap()[..3].to_vec())
}

/// The turns of a session, as (input, status).
async fn turns(node: &Node, session: &str) -> Vec<(String, String)> {
    let shown = node.cli(&["session", "get", session, "-o", "json"]).await;
    let shown = shown.code(0).json();
    let turns = shown["turns"].as_array().unwrap().iter();
    turns
        .map(|turn| ["input", "status"].map(|key| turn[key].as_str().unwrap().to_owned()))
        .map(|[input, status]| (input, status))
        .collect()
}

#[tokio::test]
async fn agents_are_models_for_the_official_client() {
    let node = Node::embedded().await;
    deploy_teller(&node).await;

    let models = done(&node, "models").await;
    assert_eq!(models["listed"], json!([["teller", "model", "vlinder"]]));
    assert_eq!(
        (&models["one"], &models["fresh"]),
        (&json!("teller"), &json!(true))
    );
    assert_eq!(
        head(&models["missing"]),
        json!(["NotFoundError", 404, "model_not_found"])
    );

    let whole = done(&node, "whole").await;
    assert!(whole["id"].as_str().unwrap().starts_with("chatcmpl-t-"));
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(
        (&whole["model"], &whole["role"]),
        (&json!("teller"), &json!("assistant"))
    );
    assert_eq!(
        (&whole["text"], &whole["finish"]),
        (&json!("hi"), &json!("stop"))
    );
    assert_eq!(whole["usage"]["total_tokens"], 0);
    assert_eq!(whole["told"], "User: Be brief.\n\na\nAgent: b\nUser: c");

    let sessions = done(&node, "sessions").await;
    assert_eq!(sessions["user"][0], "one");
    assert_eq!(sessions["user"][1], "User: one\nAgent: one\nUser: two");
    assert_eq!(sessions["header"], "User: one\nAgent: one\nUser: two");
    assert_eq!(sessions["session"], "named");
    let id = format!("chatcmpl-{}", sessions["submission"].as_str().unwrap());
    assert_eq!(sessions["id"], id);
    assert_eq!(sessions["bad"][1], 400);
    assert_eq!(turns(&node, "named").await.len(), 2);
    // The name of a user who cannot be a session's id is still how people find the session.
    assert_eq!(turns(&node, "alice@example.org").await.len(), 2);

    let stream = done(&node, "stream").await;
    assert_eq!(stream["texts"], json!(["né ", "na ", "nö"]));
    assert!(
        stream["spread"].as_f64().unwrap() > 0.5,
        "the pieces came as they were said"
    );
    assert_eq!(stream["usage"]["total_tokens"], 0);
    assert_eq!(
        (&stream["plain"], &stream["final"]),
        (&json!("hi"), &json!("né na nö"))
    );
    assert_eq!(
        stream["helper"].as_array().unwrap().last(),
        Some(&json!("content.done"))
    );
    node.stop_cleanly().await;
}

#[tokio::test]
async fn failures_are_the_official_clients_errors() {
    let node = Node::embedded().await;
    deploy_teller(&node).await;
    let errors = done(&node, "errors").await;
    let check = |what: &str, class: &str, status: Value, code: &str, param: Value, says: &str| {
        let error = errors[what].as_array().unwrap();
        let expected = [json!(class), status, json!(code), param];
        assert_eq!(error[..4], expected, "{what}: {error:?}");
        assert!(
            error[4].as_str().unwrap().contains(says),
            "{what}: {error:?}"
        );
    };
    let none = Value::Null;
    check(
        "stranger",
        "AuthenticationError",
        json!(401),
        "unauthenticated",
        none.clone(),
        "token",
    );
    check(
        "unknown",
        "NotFoundError",
        json!(404),
        "model_not_found",
        none.clone(),
        "teller",
    );
    check(
        "no_name",
        "BadRequestError",
        json!(400),
        "invalid_value",
        none.clone(),
        "agent name",
    );
    check(
        "two",
        "BadRequestError",
        json!(400),
        "unsupported",
        json!("n"),
        "one answer",
    );
    check(
        "tools",
        "BadRequestError",
        json!(400),
        "unsupported",
        json!("tool_choice"),
        "auto or none",
    );
    check(
        "schema",
        "BadRequestError",
        json!(400),
        "unsupported",
        json!("response_format"),
        "text",
    );
    check(
        "image",
        "BadRequestError",
        json!(400),
        "unsupported",
        json!("messages"),
        "image_url",
    );
    check(
        "failed",
        "InternalServerError",
        json!(502),
        "agent_status",
        none.clone(),
        "I cannot",
    );
    check("died", "APIError", none.clone(), "agent_died", none, "died");
    assert_eq!(errors["impatient"][0], "APITimeoutError");
    // The client repeats what fails with 5xx; this it was told not to.
    assert_eq!(
        turns(&node, "failing").await,
        [("fail now".to_owned(), "failed".to_owned())]
    );
    // Nobody will ever see the answer that its client did not wait for.
    wait_for(
        "the turn is cancelled",
        ENDED,
        || turns(&node, "impatient"),
        |turns| turns.len() == 1 && turns[0].1 == "cancelled",
    )
    .await;
    // What is no client's doing, by hand.
    for (path, status, says) in [
        ("/v1/chat/completions", 405, "method_not_allowed"),
        ("/v1/responses", 404, "/v1/chat/completions"),
        ("/v1/models/..%2f..", 400, "agent name"),
    ] {
        let (found, body) = node.get(path).await.unwrap();
        assert!(
            found == status && body.contains(says),
            "{path}: {found} {body}"
        );
    }
    let http = crate::support::faces::client(false);
    for (body, says) in [
        (vec![], "invalid_json"),
        (vec![b'['; 200_000], "invalid_json"),
        (vec![b'x'; 300_000], "invalid_json"),
    ] {
        let url = format!("{}/v1/chat/completions", node.address("http"));
        let sent = http
            .post(url)
            .bearer_auth(node.token())
            .body(body)
            .send()
            .await
            .unwrap();
        assert_eq!(sent.status(), 400);
        assert!(sent.text().await.unwrap().contains(says));
    }
    node.stop_cleanly().await;
}

#[tokio::test]
async fn a_key_makes_a_request_one_turn() {
    let node = Node::embedded().await;
    deploy_teller(&node).await;
    let once = done(&node, "once").await;
    assert_eq!(
        once["ids"],
        json!(["chatcmpl-only-once", "chatcmpl-only-once"])
    );
    assert_eq!(
        head(&once["other"]),
        json!(["ConflictError", 409, "conflict"])
    );
    assert_eq!(once["left"][0], "APITimeoutError");
    assert_eq!(once["back"], json!(["chatcmpl-taken-up", "awake"]));
    let listed = node.cli(&["session", "list", "teller", "-o", "json"]).await;
    assert_eq!(
        listed.code(0).json().as_array().unwrap().len(),
        2,
        "two turns in all"
    );
    node.stop_cleanly().await;
}

#[tokio::test]
async fn tokens_of_the_agents_calls_are_the_usage() {
    let model = smollm().await;
    let node = NodeSpec::embedded()
        .var("VLINDER_OLLAMA_ENDPOINT", &model.url)
        .start()
        .await;
    deploy_teller(&node).await;
    let usage = done(&node, "tokens").await;
    assert_eq!(usage["completion_tokens"], 5, "{usage}");
    assert!(usage["prompt_tokens"].as_u64() > Some(0), "{usage}");
    node.stop_cleanly().await;
}

/// A node without a harness serves the gateway, and a harness that dies takes no turn with it.
#[tokio::test]
async fn every_node_is_a_gateway() {
    let nats = NatsServer::start(CURRENT).await;
    let hub = hub(&nats).start().await;
    let other = gpu_node(&nats, &hub, "http://127.0.0.1:9")
        .workers("inference.ollama", 1)
        .var("VLINDER_DISTRIBUTED_HARNESS_ADDR", hub.address("harness"))
        .var("VLINDER_DISTRIBUTED_STATE_ADDR", hub.address("state"))
        .start()
        .await;
    deploy_teller(&hub).await;
    let models = done(&other, "models").await;
    assert_eq!(models["one"], "teller");
    let workers = hub.workers().await;
    let harness = workers
        .iter()
        .find(|worker| worker.role == "harness")
        .unwrap();
    let kill = async {
        let runs = wait_for(
            "the turn runs",
            ENDED,
            async || Client(&hub).open_turns().await,
            |turns| !turns.is_empty(),
        );
        runs.await;
        proc::send(harness.pid, Signal::KILL);
    };
    let (said, ()) = tokio::join!(done(&other, "wait"), kill);
    assert_eq!(said, "né na nö");
    // With nobody to ask it says so.
    hub.stop_cleanly().await;
    let gone = other.get("/v1/models").await.unwrap();
    assert!(gone.0 == 503 && gone.1.contains("unavailable"), "{gone:?}");
    other.stop_cleanly().await;
}
