//! What comes back, byte for byte.

use crate::front::Front;
use crate::model::Model;
use crate::{MODEL, ask, ollama, options, ready};
use serde_json::{Value, json};
use std::time::Duration;
use vlinder_core::record::CallStatus;
use vlinder_inference::Backend;

/// The text of an answer in any of the formats, streamed or not.
fn text_of(body: &[u8]) -> String {
    let text = std::str::from_utf8(body).unwrap();
    let lines = text
        .lines()
        .map(|line| line.strip_prefix("data: ").unwrap_or(line));
    let values = lines.filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let said = values.map(|value| {
        let places = [
            &value["message"]["content"],
            &value["response"],
            &value["choices"][0]["message"]["content"],
            &value["choices"][0]["delta"]["content"],
        ];
        places
            .iter()
            .find_map(|place| place.as_str())
            .unwrap_or_default()
            .to_owned()
    });
    said.collect()
}

fn messages() -> Value {
    json!([{ "role": "user", "content": "Say hello." }])
}

#[tokio::test]
async fn every_format_passes_unchanged_streamed_or_not() {
    let model = Model::start(&["--model-name", MODEL, "--api-key", "key-1"]).await;
    let front = Front::start(&model.url).await;

    let (bed, worker) = ready(options(Backend::Ollama, &front.url())).await;
    let few = json!({ "num_predict": 6 });
    for (operation, streams, body) in [
        (
            "api/chat",
            true,
            json!({ "model": MODEL, "messages": messages(), "options": few }),
        ),
        (
            "api/chat",
            false,
            json!({ "model": MODEL, "messages": messages(), "options": few, "stream": false }),
        ),
        (
            "api/generate",
            true,
            json!({ "model": MODEL, "prompt": "Hi", "options": few, "stream": true }),
        ),
        (
            "api/generate",
            false,
            json!({ "model": MODEL, "prompt": "Hi", "options": few, "stream": false }),
        ),
    ] {
        let direct = model.direct(operation, &body).await;
        let asked = bed.ask(ollama(operation, &body)).await;
        let hash = asked.hash;
        let got = asked.answer().await;
        let passed = front.last();
        assert_eq!(passed.path, format!("/{operation}"));
        assert_eq!(passed.request, body.to_string().into_bytes());
        assert_eq!(passed.key, Some(hash.to_string()));
        assert_eq!((got.result.status, got.result.http), (CallStatus::Ok, 200));
        assert_eq!(got.body, passed.answer, "{operation}");
        assert_eq!(text_of(&got.body), text_of(&direct), "{operation}");
        assert!(!text_of(&got.body).is_empty(), "{operation} said nothing");
        assert!(got.result.tokens_in > Some(5) && got.result.tokens_out <= Some(6));
        assert!(got.result.tokens_out > Some(0));
        if streams {
            assert_eq!(got.result.content_type, "application/x-ndjson");
            assert_eq!(got.streamed, got.body, "{operation}");
            assert!(got.pieces > 1, "{operation} came in one piece");
        } else {
            assert_eq!(got.result.content_type, "application/json");
            assert_eq!(got.pieces, 0);
        }
    }
    let body = json!({ "model": MODEL, "input": ["one", "two"] });
    let got = bed.ask(ollama("api/embed", &body)).await.answer().await;
    assert_eq!(got.body, front.last().answer);
    assert_eq!(got.json()["embeddings"].as_array().unwrap().len(), 2);
    assert!(got.result.tokens_in > Some(0) && got.result.tokens_out.is_none());
    let body = json!({ "model": MODEL, "prompt": "one" });
    let got = bed
        .ask(ollama("api/embeddings", &body))
        .await
        .answer()
        .await;
    assert!(got.json()["embedding"].is_array());
    // This server asks for a key below /v1/, which this worker has not: its refusal is kept.
    let body = json!({ "model": MODEL, "messages": messages() });
    let got = bed
        .ask(ollama("v1/chat/completions", &body))
        .await
        .answer()
        .await;
    assert_eq!(
        (got.result.status, got.result.http),
        (CallStatus::Error, 401)
    );
    assert_eq!(got.body, front.last().answer);
    assert_eq!(got.json()["error"]["code"], "invalid_api_key");
    worker.drained().await;

    let mut openai = options(Backend::Openai, &format!("{}/v1", front.url()));
    openai.api_key = Some("key-1".to_owned()).into();
    let (bed, worker) = ready(openai).await;
    let operation = "v1/chat/completions";
    for streams in [true, false] {
        let body = json!({
            "model": MODEL, "messages": messages(), "max_tokens": 6, "temperature": 0, "stream": streams,
            "stream_options": { "include_usage": true },
        });
        let got = bed
            .ask(ask("openai", operation, &body))
            .await
            .answer()
            .await;
        let passed = front.last();
        assert_eq!(passed.authorization.as_deref(), Some("Bearer key-1"));
        assert_eq!(got.result.http, 200, "{:?}", got.body);
        assert_eq!(got.body, passed.answer);
        assert!(got.result.tokens_in > Some(5), "{:?}", got.result);
        assert!(got.result.tokens_out > Some(0) && got.result.tokens_out <= Some(6));
        if streams {
            assert_eq!(got.streamed, got.body);
            assert!(got.pieces > 1);
            assert!(got.body.ends_with(b"data: [DONE]\n\n"));
        } else {
            assert_eq!(got.pieces, 0);
        }
    }
    let body = json!({ "model": MODEL, "input": "one" });
    let got = bed
        .ask(ask("openai", "v1/embeddings", &body))
        .await
        .answer()
        .await;
    assert!(got.json()["data"][0]["embedding"].is_array());
    assert!(got.result.tokens_in > Some(0));
    worker.drained().await;
}

#[tokio::test]
async fn what_the_worker_does_not_understand_is_the_upstreams_to_judge() {
    let model = Model::start(&["--model-name", MODEL]).await;
    let front = Front::start(&model.url).await;
    let (bed, worker) = ready(options(Backend::Ollama, &front.url())).await;

    // Spaces, key order, tools and unknown fields arrive as they were written.
    let written = r#"{ "tools": [{"type":"function","function":{"name":"now","parameters":{"type":"object","properties":{}}}}],
        "x_unknown": [1, 2.50, null], "model": "smollm2:135m",
        "messages": [{"role":"user","content":"Hi \u00e9"}], "options": {"num_predict": 2}, "stream": false }"#;
    let mut question = ollama("api/chat", &Value::Null);
    question.body = written.to_owned();
    let got = bed.ask(question).await.answer().await;
    assert_eq!(got.result.http, 200, "{:?}", got.body);
    assert_eq!(front.last().request, written.as_bytes());

    // Errors of the upstream are kept.
    let mut question = ollama("api/chat", &Value::Null);
    question.body = "{ no json".to_owned();
    let got = bed.ask(question).await.answer().await;
    assert_eq!(
        (got.result.status, got.result.http),
        (CallStatus::Error, 400)
    );
    assert_eq!(got.body, front.last().answer);
    let body = json!({ "model": "nobody", "messages": [] });
    let got = bed.ask(ollama("api/chat", &body)).await.answer().await;
    assert_eq!(
        (got.result.status, got.result.http),
        (CallStatus::Error, 404)
    );
    assert!(
        got.json()["error"]
            .as_str()
            .unwrap()
            .contains("'nobody' not found")
    );

    // Paths that are no calls never reach it.
    let calls = model.log(0, 0).await.len();
    for operation in ["api/delete", "../api/chat", "api/chat?x", "v1/responses"] {
        let got = bed.ask(ollama(operation, &json!({}))).await.answer().await;
        assert_eq!(
            (got.result.status, got.result.http),
            (CallStatus::Error, 404)
        );
        assert_eq!(got.json()["error"]["code"], "unknown_operation");
    }
    assert_eq!(model.log(0, 0).await.len(), calls);

    // A turn that is over its time is answered without a call.
    let mut question = ollama("api/chat", &json!({ "model": MODEL }));
    question.timeout = Duration::ZERO;
    let got = bed.ask(question).await.answer().await;
    assert_eq!((got.result.http, model.log(0, 0).await.len()), (504, calls));
    worker.drained().await;
}
