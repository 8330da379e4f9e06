//! Upstreams and models that come and go.

use crate::bed::Bed;
use crate::front::Front;
use crate::model::Model;
use crate::{MODEL, ollama, options};
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use vlinder_inference::Backend;
use vlinder_testkit::{CURRENT, NatsServer};
use vlinder_worker::cx::NoControl;
use vlinder_worker::infra::InfraView;

/// A change at an upstream shows so soon (features E6, E9).
const SEEN_WITHIN: Duration = Duration::from_secs(5);

fn chat(model: &str) -> serde_json::Value {
    json!({
        "model": model, "stream": false, "options": { "num_predict": 2 },
        "messages": [{ "role": "user", "content": "Hi" }],
    })
}

#[tokio::test]
async fn work_goes_where_its_model_is_and_waits_while_it_is_nowhere() {
    let model = Model::start(&["--model-name", MODEL, "--model-name", "other:latest"]).await;
    let mut front = Front::start(&model.url).await;
    front.list(&[MODEL]);
    front.stop().await;

    // Down at the start.
    let bed = Bed::start().await;
    let worker = bed.worker("node-1", options(Backend::Ollama, &front.url()));
    let said = worker.says("waiting").await;
    let expected = format!("waiting: no Ollama at {}: connection refused", front.url());
    assert_eq!(said, expected);
    let infra = bed.cx("test", Arc::new(NoControl), CancellationToken::new());
    let infra = InfraView::start(&infra).await.unwrap();
    let is_known = async |model| infra.fresh().await.unwrap().model_known("ollama", model);
    assert!(!is_known(MODEL).await);
    let offers = bed.offers().await;
    assert!(offers[0].models.is_empty(), "{offers:?}");
    assert!(
        offers[0]
            .problem
            .as_ref()
            .unwrap()
            .contains("connection refused")
    );
    let mut waits = bed.ask(ollama("api/chat", &chat(MODEL))).await;
    assert!(!waits.is_answered_within(Duration::from_millis(200)).await);

    // Up: the work that waited is done.
    let up = Instant::now();
    front.start_again();
    worker.says("ready").await;
    assert!(up.elapsed() < SEEN_WITHIN, "ready after {:?}", up.elapsed());
    assert_eq!(waits.answer().await.result.http, 200);
    assert!(is_known(MODEL).await && !is_known("other").await);
    let offers = bed.offers().await;
    assert_eq!((offers.len(), &offers[0].problem), (1, &None));
    assert_eq!(offers[0].models[0].name, MODEL);

    // Another model appears, and may be asked for without its tag.
    let mut question = ollama("api/chat", &chat("other"));
    question.model = "other";
    let appears = Instant::now();
    let asked = bed.ask(question).await;
    front.list(&[MODEL, "other:latest"]);
    assert_eq!(asked.answer().await.result.http, 200);
    assert!(appears.elapsed() < SEEN_WITHIN + Duration::from_secs(2));
    assert!(is_known("other").await && is_known("other:latest").await);

    // It vanishes. The upstream refuses it: the worker looks, hands the work back and stops to pull.
    model
        .faults(json!([{ "kind": "status", "status": 404, "times": 100 }]))
        .await;
    front.list(&[MODEL]);
    let mut question = ollama("api/chat", &chat("other"));
    question.model = "other";
    let mut waits = bed.ask(question).await;
    assert!(!waits.is_answered_within(Duration::from_secs(3)).await);
    assert!(
        model.log(0, 0).await.len() <= 1,
        "work was pulled for a model that is gone"
    );

    // A second node has it: the work that waited goes there.
    model.faults(json!([])).await;
    let second = bed.worker("node-2", options(Backend::Ollama, &model.url));
    second.says("ready").await;
    assert_eq!(waits.answer().await.result.http, 200);

    // The first upstream is lost: its worker says so, its models are not offered, work goes on.
    front.stop().await;
    let lost = Instant::now();
    worker.says("waiting").await;
    assert!(
        lost.elapsed() < SEEN_WITHIN,
        "noticed after {:?}",
        lost.elapsed()
    );
    for _ in 0..4 {
        let got = bed
            .ask(ollama("api/chat", &chat(MODEL)))
            .await
            .answer()
            .await;
        assert_eq!(got.result.http, 200);
    }
    let mut offers = bed.offers().await;
    offers.sort_by(|a, b| a.node.cmp(&b.node));
    assert!(offers[0].models.is_empty() && offers[0].problem.is_some());
    assert!(offers[1].models.len() == 2 && offers[1].problem.is_none());
    worker.drained().await;
    second.drained().await;
}

#[tokio::test]
async fn a_call_that_finds_its_upstream_gone_goes_to_another_worker() {
    let model = Model::start(&["--model-name", MODEL]).await;
    let mut front = Front::start(&model.url).await;
    let bed = Bed::start().await;
    let first = bed.worker("node-1", options(Backend::Ollama, &front.url()));
    first.says("ready").await;
    front.stop().await;
    // Its worker does not know yet.
    let asked = bed.ask(ollama("api/chat", &chat(MODEL))).await;
    let lost = Instant::now();
    first.says("waiting").await;
    assert!(lost.elapsed() < SEEN_WITHIN);
    let second = bed.worker("node-2", options(Backend::Ollama, &model.url));
    second.says("ready").await;
    assert_eq!(asked.answer().await.result.http, 200);
    first.drained().await;
    second.drained().await;
}

#[tokio::test]
async fn over_nats_a_dead_workers_call_is_made_again_under_its_key() {
    let model = Model::start(&["--model-name", MODEL]).await;
    let server = NatsServer::start(CURRENT).await;
    let bed = Bed::start_on(&server).await;
    let first = bed.worker("node-1", options(Backend::Ollama, &model.url));
    first.says("ready").await;
    model.faults(json!([{ "kind": "hang" }])).await;
    let asked = bed.ask(ollama("api/chat", &chat(MODEL))).await;
    model.log(1, 0).await;
    let second = bed.worker("node-2", options(Backend::Ollama, &model.url));
    second.says("ready").await;
    first.killed().await;
    let got = asked.answer().await;
    assert_eq!(got.result.http, 200);
    let calls = model.log(2, 2).await;
    assert_eq!(calls[0]["cancelled"], true);
    let key = |call: &serde_json::Value| call["headers"]["idempotency-key"].clone();
    assert_eq!((calls.len(), key(&calls[0])), (2, key(&calls[1])));

    // Streams and ends of turns work there as well.
    let mut streamed = chat(MODEL);
    streamed["stream"] = json!(true);
    let got = bed.ask(ollama("api/chat", &streamed)).await.answer().await;
    assert_eq!((got.result.http, got.streamed), (200, got.body.to_vec()));
    model.faults(json!([{ "kind": "hang" }])).await;
    let asked = bed.ask(ollama("api/chat", &chat(MODEL))).await;
    model.log(1, 0).await;
    let ended = Instant::now();
    bed.end(&asked).await;
    assert_eq!(model.log(1, 1).await[0]["cancelled"], true);
    assert!(ended.elapsed() < Duration::from_secs(1));
    bed.wait_until_idle().await;
    second.drained().await;
}
