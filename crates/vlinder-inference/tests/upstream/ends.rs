//! Calls whose turn ends, whose time is up, or whose worker drains.

use crate::model::Model;
use crate::{MODEL, ollama, options, ready};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use vlinder_core::record::CallStatus;
use vlinder_inference::Backend;

/// From a turn's end to the closed connection (features B7).
const CANCEL_WITHIN: Duration = Duration::from_secs(1);

fn chat() -> Value {
    json!({
        "model": MODEL, "options": { "num_predict": 100 },
        "messages": [{ "role": "user", "content": "Tell me a long story." }],
    })
}

#[tokio::test]
async fn a_call_ends_with_its_turn() {
    let model = Model::start(&["--model-name", MODEL]).await;
    let (bed, worker) = ready(options(Backend::Ollama, &model.url)).await;

    // While the upstream hangs.
    model.faults(json!([{ "kind": "hang" }])).await;
    let mut asked = bed.ask(ollama("api/chat", &chat())).await;
    model.log(1, 0).await;
    let ended = Instant::now();
    bed.end(&asked).await;
    let calls = model.log(1, 1).await;
    assert!(
        ended.elapsed() < CANCEL_WITHIN,
        "cancelled after {:?}",
        ended.elapsed()
    );
    assert_eq!(calls[0]["cancelled"], true);
    bed.wait_until_idle().await;
    assert!(
        !asked.is_answered_within(Duration::ZERO).await,
        "nobody waits for this"
    );

    // In the middle of a stream.
    model
        .faults(json!([{ "kind": "tokens", "token_delay_ms": 100 }]))
        .await;
    let mut asked = bed.ask(ollama("api/chat", &chat())).await;
    asked.first_piece().await;
    let ended = Instant::now();
    bed.end(&asked).await;
    let calls = model.log(1, 1).await;
    assert!(
        ended.elapsed() < CANCEL_WITHIN,
        "cancelled after {:?}",
        ended.elapsed()
    );
    assert_eq!(calls[0]["cancelled"], true);

    // In the pause before a next try: no further try is made.
    model
        .faults(json!([{ "kind": "status", "status": 429, "retry_after": "2" }]))
        .await;
    let asked = bed.ask(ollama("api/chat", &chat())).await;
    model.log(1, 1).await;
    let ended = Instant::now();
    bed.end(&asked).await;
    bed.wait_until_idle().await;
    assert!(ended.elapsed() < CANCEL_WITHIN);
    assert_eq!(model.log(1, 1).await.len(), 1);
    worker.drained().await;

    // Before a worker saw it: no call is made.
    model.faults(json!([])).await;
    let asked = bed.ask(ollama("api/chat", &chat())).await;
    bed.end(&asked).await;
    let worker = bed.worker("node-1", options(Backend::Ollama, &model.url));
    worker.says("ready").await;
    bed.wait_until_idle().await;
    assert_eq!(model.log(0, 0).await.len(), 0);
    worker.drained().await;
}

#[tokio::test]
async fn a_deadline_is_an_answer_and_a_drain_lets_calls_finish() {
    let model = Model::start(&["--model-name", MODEL]).await;
    let (bed, worker) = ready(options(Backend::Ollama, &model.url)).await;

    model.faults(json!([{ "kind": "hang" }])).await;
    let mut question = ollama("api/chat", &chat());
    question.timeout = Duration::from_millis(500);
    let began = Instant::now();
    let got = bed.ask(question).await.answer().await;
    assert!(began.elapsed() < Duration::from_millis(500) + CANCEL_WITHIN);
    assert_eq!(
        (got.result.http, got.result.status),
        (504, CallStatus::Error)
    );
    assert_eq!(got.json()["error"]["code"], "deadline");
    assert_eq!(model.log(1, 1).await[0]["cancelled"], true);

    // No pause is begun that the deadline would cut: the agent gets the refusal, and at once.
    model
        .faults(json!([{ "kind": "status", "status": 503, "retry_after": "30" }]))
        .await;
    let mut question = ollama("api/chat", &chat());
    question.timeout = Duration::from_secs(10);
    let began = Instant::now();
    let got = bed.ask(question).await.answer().await;
    assert_eq!(got.result.http, 503);
    assert!(began.elapsed() < Duration::from_secs(5));

    model
        .faults(json!([{ "kind": "tokens", "token_delay_ms": 50 }]))
        .await;
    let mut short = chat();
    short["options"]["num_predict"] = json!(8);
    let mut asked = bed.ask(ollama("api/chat", &short)).await;
    asked.first_piece().await;
    let drained = tokio::spawn(worker.drained());
    let got = tokio::time::timeout(Duration::from_secs(20), async {
        // The pieces before are gone; the result has everything.
        while !asked.is_answered_within(Duration::from_millis(100)).await {}
    });
    got.await.expect("the running call is finished");
    drained.await.unwrap();
    assert!(
        bed.offers().await.is_empty(),
        "a worker that left offers nothing"
    );
    assert_eq!(model.log(1, 1).await[0]["cancelled"], false);
}
