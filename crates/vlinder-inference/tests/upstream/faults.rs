//! An upstream that refuses, fails, breaks off or says nothing.

use crate::model::Model;
use crate::{MODEL, ask, ollama, options, ready};
use serde_json::{Value, json};
use std::time::Duration;
use vlinder_core::record::CallStatus;
use vlinder_inference::Backend;

fn chat(streams: bool) -> Value {
    json!({
        "model": MODEL, "stream": streams, "options": { "num_predict": 8 },
        "messages": [{ "role": "user", "content": "Say hello." }],
    })
}

#[tokio::test]
async fn faults_are_retried_within_bounds_and_then_told() {
    let model = Model::start(&["--model-name", MODEL]).await;
    let mut limits = options(Backend::Ollama, &model.url);
    limits.first_byte_timeout = Duration::from_secs(20);
    // This one is about single calls.
    limits.circuit.failures = 100;
    let (bed, worker) = ready(limits).await;
    let ask_chat = async |streams| {
        bed.ask(ollama("api/chat", &chat(streams)))
            .await
            .answer()
            .await
    };

    // 429 with Retry-After: two refusals, then an answer, and no sooner than asked.
    model
        .faults(json!([{ "kind": "status", "status": 429, "retry_after": "1", "times": 2 }]))
        .await;
    let got = ask_chat(true).await;
    assert_eq!((got.result.http, got.result.status), (200, CallStatus::Ok));
    assert_eq!(got.streamed, got.body);
    let calls = model.log(3, 3).await;
    assert_eq!(calls.len(), 3);
    for pair in calls.windows(2) {
        let apart = pair[1]["at_ms"].as_u64().unwrap() - pair[0]["at_ms"].as_u64().unwrap();
        assert!(
            (990..10_000).contains(&apart),
            "{apart} ms between two tries"
        );
    }
    let keys: Vec<&Value> = calls
        .iter()
        .map(|call| &call["headers"]["idempotency-key"])
        .collect();
    assert!(
        keys[0].is_string() && keys.iter().all(|key| *key == keys[0]),
        "{keys:?}"
    );

    // A Retry-After beyond reason is the agent's to wait for.
    model
        .faults(json!([{ "kind": "status", "status": 429, "retry_after": "3600" }]))
        .await;
    let got = ask_chat(false).await;
    assert_eq!((got.result.http, model.log(1, 1).await.len()), (429, 1));

    // 500, 503, then an answer.
    model
        .faults(json!([{ "kind": "status", "status": 500 }, { "kind": "status", "status": 503 }]))
        .await;
    let got = ask_chat(false).await;
    assert_eq!((got.result.http, model.log(3, 3).await.len()), (200, 3));

    // Always 500: bounded, and the upstream's own words are kept.
    model
        .faults(json!([{ "kind": "status", "status": 500, "times": 100 }]))
        .await;
    let got = ask_chat(true).await;
    assert_eq!(
        (got.result.http, got.result.status),
        (500, CallStatus::Error)
    );
    assert_eq!(got.json()["error"], "a fault asked for on /__control");
    assert_eq!(model.log(4, 4).await.len(), 4);

    // Half a stream: what came is kept, with an error, and not tried again.
    model
        .faults(json!([{ "kind": "cut", "after_chunks": 2 }]))
        .await;
    let got = ask_chat(true).await;
    assert_eq!(
        (got.result.http, got.result.status),
        (502, CallStatus::Error)
    );
    assert!(!got.body.is_empty() && got.streamed == got.body);
    assert!(!String::from_utf8_lossy(&got.body).contains("\"done\": true"));
    assert_eq!(model.log(1, 1).await.len(), 1);

    // Half an answer that is no stream is no answer.
    model.faults(json!([{ "kind": "cut" }])).await;
    let got = ask_chat(false).await;
    assert_eq!(
        (got.result.http, got.result.status),
        (502, CallStatus::Error)
    );
    assert_eq!(got.json()["error"]["code"], "upstream_cut");
    assert_eq!(model.log(1, 1).await.len(), 1);

    // Garbage passes like anything else.
    model.faults(json!([{ "kind": "garbage" }])).await;
    let got = ask_chat(false).await;
    assert_eq!(
        (got.result.http, &got.body[..]),
        (200, &b"\x00<html>this is no JSON"[..])
    );
    assert_eq!(got.result.tokens_out, None);
    bed.wait_until_idle().await;
    worker.drained().await;
}

#[tokio::test]
async fn an_upstream_that_says_nothing_is_left() {
    let model = Model::start(&["--model-name", MODEL]).await;
    let mut limits = options(Backend::Openai, &format!("{}/v1", model.url));
    limits.first_byte_timeout = Duration::from_millis(300);
    limits.idle_timeout = Duration::from_millis(300);
    let (bed, worker) = ready(limits).await;
    let operation = "v1/chat/completions";
    let body = json!({
        "model": MODEL, "stream": true, "max_tokens": 50, "temperature": 0,
        "messages": [{ "role": "user", "content": "Count to twenty." }],
    });

    model
        .faults(json!([{ "kind": "hang", "times": 100 }]))
        .await;
    let got = bed
        .ask(ask("openai", operation, &body))
        .await
        .answer()
        .await;
    assert_eq!(
        (got.result.http, got.result.status),
        (504, CallStatus::Error)
    );
    assert_eq!(got.json()["error"]["code"], "upstream_silent");
    let calls = model.log(4, 4).await;
    assert_eq!(calls.len(), 4);
    assert!(
        calls.iter().all(|call| call["cancelled"] == true),
        "{calls:?}"
    );

    // Silent in the middle of its answer.
    let mut limits = options(Backend::Openai, &format!("{}/v1", model.url));
    limits.idle_timeout = Duration::from_millis(300);
    worker.drained().await;
    let worker = bed.worker("node-1", limits);
    worker.says("ready").await;
    model
        .faults(json!([{ "kind": "tokens", "token_delay_ms": 5000 }]))
        .await;
    let got = bed
        .ask(ask("openai", operation, &body))
        .await
        .answer()
        .await;
    assert_eq!(
        (got.result.http, got.result.status),
        (502, CallStatus::Error)
    );
    assert!(!got.body.is_empty() && got.streamed == got.body);
    let calls = model.log(1, 1).await;
    assert!(calls[0]["cancelled"] == true, "{calls:?}");
    worker.drained().await;
}

#[tokio::test]
async fn a_model_that_keeps_failing_is_left_alone_until_it_answers_again() {
    let model = Model::start(&["--model-name", MODEL]).await;
    let mut limits = options(Backend::Ollama, &model.url);
    limits.circuit.pause = Duration::from_secs(2);
    let (bed, worker) = ready(limits).await;
    let ask_chat = async || {
        bed.ask(ollama("api/chat", &chat(false)))
            .await
            .answer()
            .await
    };
    model
        .faults(json!([{ "kind": "status", "status": 500, "times": 100 }]))
        .await;
    // Four tries; the fifth, of another call, opens the circuit. Both get the upstream's own words.
    for _ in 0..2 {
        let got = ask_chat().await;
        assert_eq!(got.result.http, 500);
        assert_eq!(got.json()["error"], "a fault asked for on /__control");
    }
    let said = worker.says("waiting").await;
    assert!(
        said.contains(MODEL) && said.contains("5 times in a row"),
        "{said}"
    );
    assert!(
        said.contains("it answered 500") && said.contains("UTC"),
        "{said}"
    );
    assert!(
        bed.offers().await[0].models.is_empty(),
        "it is still offered"
    );

    // While it is open nothing is sent, and whoever asks is told at once.
    let asked = std::time::Instant::now();
    let got = ask_chat().await;
    assert!(asked.elapsed() < Duration::from_secs(2));
    let error = &got.json()["error"];
    assert_eq!(
        (got.result.http, &error["code"]),
        (503, &json!("upstream_failing"))
    );
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains(&model.url) && message.contains("tried again in"),
        "{message}"
    );
    assert_eq!(
        model.log(5, 5).await.len(),
        5,
        "something was sent meanwhile"
    );

    // It works again: the next call after the pause is answered, and all is as before.
    model.faults(json!([])).await;
    tokio::time::sleep(Duration::from_millis(2100)).await;
    assert_eq!(ask_chat().await.result.http, 200);
    worker.says("ready").await;
    assert_eq!(ask_chat().await.result.http, 200);
    worker.drained().await;
}
