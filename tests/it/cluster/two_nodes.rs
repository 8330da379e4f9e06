//! A hub without inference, and a node with nothing else: interfaces.md §2.

use super::bed::{Client, DEAD, example, gpu_node, hub, inference_node, request, said, smollm};
use super::model::Model;
use crate::support::{Node, NodeSpec, Worker, proc, wait_for};
use rustix::process::Signal;
use std::time::{Duration, Instant};
use vlinder_testkit::{CURRENT, NatsServer};

/// A restarted hub has every node ready again by then (features G2).
const HUB_BACK: Duration = Duration::from_secs(10);

/// What the asking agent is told.
const CALL: &str = r#"ollama/api/generate {"model": "smollm2:135m", "prompt": "Hi", "options": {"num_predict": 4}}"#;

/// NATS, a model, a hub with the chat agent, and the GPU node beside it.
struct Two {
    nats: NatsServer,
    model: Model,
    hub: Node,
    gpu: Node,
}

impl Two {
    async fn start() -> Self {
        let nats = NatsServer::start(CURRENT).await;
        let model = smollm().await;
        let hub = hub(&nats).start().await;
        let gpu = gpu_node(&nats, &hub, &model.url).start().await;
        Client(&hub).deploy(&example("chat-agent")).await;
        Self {
            nats,
            model,
            hub,
            gpu,
        }
    }

    fn names(&self) -> [&str; 2] {
        [self.hub.spec().name(), self.gpu.spec().name()]
    }
}

async fn wait_ready_nodes(client: &Client<'_>, names: &[&str], within: Duration) {
    let mut wanted: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    wanted.sort();
    let look = async || client.ready_nodes().await;
    wait_for("these nodes are ready", within, look, |ready| {
        *ready == wanted
    })
    .await;
}

#[tokio::test]
async fn a_turn_on_the_hub_is_answered_by_the_gpu_node() {
    let two = Two::start().await;
    let client = Client(&two.hub);
    wait_ready_nodes(&client, &two.names(), Duration::from_secs(2)).await;
    let nodes = client.nodes().await;
    let of = |name: &str| nodes.iter().find(|node| node.name == name).unwrap();
    let [hub, gpu] = two.names();
    assert_eq!(of(gpu).workers, 4);
    assert!(of(hub).workers > 8, "{nodes:#?}");
    assert_eq!(of(gpu).version, of(hub).version);
    // What runs is what was configured: nothing but inference there, no inference here.
    let workers = two.gpu.workers().await;
    assert!(
        workers
            .iter()
            .all(|worker| worker.role == "inference.ollama"),
        "{workers:#?}"
    );
    let children = proc::children(two.gpu.pid());
    assert_eq!(children.len(), 4, "{children:#?}");
    let workers = two.hub.workers().await;
    assert!(
        !workers
            .iter()
            .any(|worker| worker.role.starts_with("inference")),
        "{workers:#?}"
    );

    let mut asked = request("chat", "first", "What is the capital of France?");
    asked.stream = true;
    let turn = client.run(asked).await;
    let submission = turn.submission.clone();
    let (end, text, pieces) = turn.end_with_text().await;
    assert_eq!(text, said(&end));
    assert!(pieces > 3, "the reply came in {pieces} pieces");
    assert_eq!(end.node, hub);
    let detail = client.turn(&submission).await;
    let [called] = &detail.calls[..] else {
        panic!("expected one call: {detail:#?}");
    };
    let call = called.call.as_ref().unwrap();
    assert_eq!(
        (call.service.as_str(), call.backend.as_str()),
        ("infer", "ollama")
    );
    assert_eq!(
        (call.model.as_str(), call.status.as_str()),
        ("smollm2:135m", "ok")
    );
    assert!(
        call.tokens_in > Some(0) && call.tokens_out > Some(0),
        "{call:#?}"
    );
    assert!(
        called.by.starts_with(&format!("{gpu}/inference.ollama/")),
        "{}",
        called.by
    );
    // The session goes on, and the model is shown what was said before.
    said(&client.say("chat", "first", "And of Italy?").await);
    let calls = client.last_calls("first").await;
    assert!(
        calls[0].request.contains("What is the capital of France?"),
        "{calls:#?}"
    );
    let listed = two
        .hub
        .cli(&["node", "list", "-o", "json"])
        .await
        .code(0)
        .json();
    assert_eq!(listed.as_array().unwrap().len(), 2, "{listed}");
    two.gpu.stop_cleanly().await;
    // One that left is no longer listed.
    let look = async || client.nodes().await.len();
    wait_for("the node has left", Duration::from_secs(2), look, |count| {
        *count == 1
    })
    .await;
    two.hub.stop_cleanly().await;
}

#[tokio::test]
async fn without_the_gpu_node_a_turn_waits_says_why_and_goes_on_when_it_returns() {
    let Two {
        nats,
        model,
        hub,
        gpu,
    } = Two::start().await;
    let client = Client(&hub);
    let name = gpu.spec().name().to_owned();
    let killed = Instant::now();
    let spec: NodeSpec = gpu.kill9().await;
    wait_ready_nodes(&client, &[hub.spec().name()], DEAD).await;
    println!("not ready after {:?}", killed.elapsed());
    assert_eq!(
        client.catalog().await.models,
        vec![],
        "a dead node offers nothing"
    );
    client.deploy_ask().await;

    let (asked, reason) = tokio::join!(
        hub.cli(&[
            "agent",
            "run",
            "chat",
            "-p",
            "Say hi.",
            "--session",
            "waits",
            "-o",
            "json"
        ]),
        async {
            let open = async || client.open_turns().await;
            let known = wait_for(
                "a turn says why it waits",
                Duration::from_secs(5),
                open,
                |turns| turns.len() == 1 && turns[0].reason.starts_with("no live worker"),
            );
            let reason = known.await.remove(0).reason;
            let mut second = client.run(request("ask", "", CALL)).await;
            let mut third = client.run(request("chat", "", "Say hello.")).await;
            let (told, took) = second.waits().await;
            assert!(took < Duration::from_secs(3), "told after {took:?}");
            assert_eq!(told, reason);
            let (told, _) = third.waits().await;
            assert_eq!(told, "every replica of agent chat is busy");
            let gpu = spec.start().await;
            wait_ready_nodes(&client, &[hub.spec().name(), &name], Duration::from_secs(2)).await;
            said(&second.end().await);
            said(&third.end().await);
            (reason, gpu)
        }
    );
    let (reason, gpu) = reason;
    assert!(
        reason.starts_with("no live worker offers the ollama model smollm2:135m"),
        "{reason}"
    );
    assert!(reason.contains(&name), "{reason}");
    let asked = asked.code(0).says(&reason);
    assert_ne!(asked.json()["output"], "");
    assert_eq!(client.last_calls("waits").await.len(), 1);
    gpu.stop_cleanly().await;
    hub.stop_cleanly().await;
    drop((nats, model));
}

#[tokio::test]
async fn killed_while_it_generates_the_turn_completes_with_one_answer_on_record() {
    let Two {
        nats,
        model,
        hub,
        gpu,
    } = Two::start().await;
    let client = Client(&hub);
    model.slow_once(50).await;
    let mut asked = request("chat", "", "What is the capital of France?");
    asked.stream = true;
    let mut turn = client.run(asked).await;
    let submission = turn.submission.clone();
    turn.chunks(5).await;
    let spec = gpu.kill9().await;
    let gpu = spec.start().await;
    let (end, text, _) = turn.end_with_text().await;
    let detail = client.turn(&submission).await;
    let [called] = &detail.calls[..] else {
        panic!("expected one call: {detail:#?}");
    };
    let call = called.call.as_ref().unwrap();
    assert_eq!(call.status, "ok", "{detail:#?}");
    assert_eq!(detail.ends.len(), 1, "{detail:#?}");
    assert!(called.attempt > 1, "{called:#?}");
    // The reply is what the record explains, not a mix of two answers.
    let lines = called.response.lines().map(|line| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        line["message"]["content"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    });
    assert_eq!(said(&end), lines.collect::<String>());
    assert_eq!(text, said(&end), "the client saw each piece once");
    // The first answer was given up at the model, too.
    let calls = model.calls().await;
    let given_up: Vec<bool> = calls.iter().map(|call| call["cancelled"] == true).collect();
    assert_eq!(given_up, [true, false], "{calls:#?}");
    gpu.stop_cleanly().await;
    hub.stop_cleanly().await;
    drop(nats);
}

#[tokio::test]
async fn a_restarted_hub_has_the_gpu_node_again() {
    let Two {
        nats,
        model,
        hub,
        gpu,
    } = Two::start().await;
    let gpu_workers = gpu.workers().await;
    let spec = hub.kill9().await;
    let began = Instant::now();
    let hub = spec.start().await;
    let client = Client(&hub);
    let names = [spec.name(), gpu.spec().name()];
    wait_ready_nodes(&client, &names, HUB_BACK.saturating_sub(began.elapsed())).await;
    println!("all ready after {:?}", began.elapsed());
    said(&client.say("chat", "", "Say hi.").await);
    hub.stop_cleanly().await;
    let hub = spec.start().await;
    said(&Client(&hub).say("chat", "", "Say hello.").await);
    let pids = |workers: &[Worker]| workers.iter().map(|w| w.pid).collect::<Vec<_>>();
    assert_eq!(
        pids(&gpu_workers),
        pids(&gpu.workers().await),
        "the GPU node went on"
    );
    gpu.stop_cleanly().await;
    hub.stop_cleanly().await;
    drop((nats, model));
}

#[tokio::test]
async fn another_node_with_the_model_takes_over_from_one_that_dies() {
    let nats = NatsServer::start(CURRENT).await;
    let (first, second) = tokio::join!(smollm(), smollm());
    let models = [first, second];
    let hub = hub(&nats).start().await;
    let specs = models
        .each_ref()
        .map(|model| inference_node(&nats, &hub, &model.url));
    let (one, two) = tokio::join!(specs[0].start(), specs[1].start());
    let mut nodes = vec![one, two];
    let client = Client(&hub);
    client.deploy(&example("chat-agent")).await;
    for model in &models {
        model.slow_once(50).await;
    }
    let mut asked = request("chat", "", "What is the capital of France?");
    asked.stream = true;
    let mut turn = client.run(asked).await;
    let submission = turn.submission.clone();
    turn.chunks(5).await;
    let asked_first = usize::from(models[0].calls().await.is_empty());
    let victim = nodes.remove(asked_first);
    let other = nodes.remove(0);
    models[1 - asked_first].slow_once(0).await;
    let killed = Instant::now();
    victim.kill9().await;
    // The work of a dead node is at another within 10 s (design.md §9).
    let look = async || models[1 - asked_first].calls().await.len();
    wait_for(
        "the other node works on it",
        Duration::from_secs(10),
        look,
        |calls| *calls == 1,
    )
    .await;
    println!("taken over after {:?}", killed.elapsed());
    let (end, text, _) = turn.end_with_text().await;
    assert_eq!(text, said(&end));
    let detail = client.turn(&submission).await;
    let [called] = &detail.calls[..] else {
        panic!("expected one call: {detail:#?}");
    };
    assert_eq!(called.call.as_ref().unwrap().status, "ok", "{detail:#?}");
    assert!(
        called.by.starts_with(&format!("{}/", other.spec().name())),
        "{}",
        called.by
    );
    other.stop_cleanly().await;
    hub.stop_cleanly().await;
}

#[tokio::test]
async fn a_frozen_node_is_not_ready_until_it_goes_on() {
    let nats = NatsServer::start(CURRENT).await;
    let hub = hub(&nats).start().await;
    let gpu = gpu_node(&nats, &hub, "http://127.0.0.1:9").start().await;
    let client = Client(&hub);
    let both = [hub.spec().name(), gpu.spec().name()];
    wait_ready_nodes(&client, &both, Duration::from_secs(2)).await;
    let before = gpu.workers().await;
    gpu.signal(Signal::STOP);
    wait_ready_nodes(&client, &both[..1], DEAD).await;
    let nodes = client.nodes().await;
    let frozen = nodes.iter().find(|node| node.name == both[1]).unwrap();
    assert_eq!(frozen.state, "not-ready");
    assert!(frozen.last_seen_ms > 4_000, "{frozen:?}");
    gpu.signal(Signal::CONT);
    wait_ready_nodes(&client, &both, Duration::from_secs(2)).await;
    let pids = |workers: &[Worker]| workers.iter().map(|worker| worker.pid).collect::<Vec<_>>();
    assert_eq!(
        pids(&before),
        pids(&gpu.workers().await),
        "nobody was replaced for it"
    );
    gpu.stop_cleanly().await;
    hub.stop_cleanly().await;
}
