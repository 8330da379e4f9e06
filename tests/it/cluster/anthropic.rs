//! Anthropic's format: their official client with only its base URL changed, against a server that
//! speaks it (features E2), and what it is told when that server fails.

use super::bed::{Client, agent_in, said};
use super::model::{Model, python};
use crate::support::NodeSpec;
use serde_json::{Value, json};

const MODEL: &str = "smollm2:135m";

/// An agent that uses the official client; its input names what it does.
const AGENT: &str = r#"
import json, os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import anthropic

CLIENT = anthropic.Anthropic(base_url=os.environ["VLINDER_BRIDGE_URL"] + "/anthropic", api_key="unused", max_retries=0)
ASKED = {"model": "smollm2:135m", "max_tokens": 16, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
TOOL = {"name": "weather", "description": "Says the weather.", "input_schema": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}

def whole(**more):
    answer = CLIENT.messages.create(**{**ASKED, **more})
    return [answer.content[0].text, answer.stop_reason, answer.usage.input_tokens, answer.usage.output_tokens]

def stream():
    with CLIENT.messages.stream(**ASKED) as events:
        texts = list(events.text_stream)
        final = events.get_final_message()
    return ["".join(texts), len(texts), final.usage.output_tokens]

def error(work):
    try:
        return ["no error", work()]
    except anthropic.APIStatusError as failed:
        return [type(failed).__name__, failed.status_code, failed.message]
    except Exception as failed:
        return [type(failed).__name__, None, str(failed)]

def do_good():
    parts = [{"type": "text", "text": "Say hello."}, IMAGE]
    return {"whole": whole(), "stream": stream(), "system": whole(system="Answer in one word."),
            "tools": whole(tools=[TOOL]), "image": whole(messages=[{"role": "user", "content": parts}]),
            "models": [model.id for model in CLIENT.models.list()],
            "unknown": error(lambda: whole(model="smollm3")),
            "refused": error(lambda: whole(messages=[]))}

def do_whole():
    return error(whole)

def do_stream():
    return error(stream)

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply("ok")

    def do_POST(self):
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        what = text.splitlines()[-1].removeprefix("User: ")
        self.reply(json.dumps(globals()[f"do_{what}"]()))

    def reply(self, text):
        self.send_response(200)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass

ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"#;

#[tokio::test]
async fn the_official_client_works_with_another_base_url() {
    let model = Model::with_key(&[MODEL], "the-key").await;
    let node = NodeSpec::embedded()
        .workers("inference.ollama", 0)
        .workers("inference.anthropic", 1)
        .var("VLINDER_ANTHROPIC_ENDPOINT", &model.url)
        .var("VLINDER_ANTHROPIC_API_KEY", "the-key")
        .start()
        .await;
    let client = Client(&node);
    let python = python().display().to_string();
    let dir = agent_in(node.spec().home(), "claude", &python, AGENT);
    client.deploy(&dir).await;
    let ask = async |session: &str, what: &str| -> Value {
        let end = client.say("claude", session, what).await;
        serde_json::from_str(&said(&end)).unwrap()
    };
    let good = ask("good", "good").await;
    println!("{good:#}");
    let text = good["whole"][0].as_str().unwrap();
    assert!(!text.is_empty() && good["whole"][2].as_u64() > Some(5));
    assert_eq!(
        good["stream"][0], text,
        "the same model says the same, streamed or not"
    );
    assert!(good["stream"][1].as_u64() > Some(3), "it came in pieces");
    for what in ["system", "tools", "image"] {
        assert!(!good[what][0].as_str().unwrap().is_empty(), "{what}");
    }
    assert_eq!(good["models"], json!([MODEL]));
    assert_eq!(
        (&good["unknown"][0], &good["unknown"][1]),
        (&json!("NotFoundError"), &json!(404))
    );
    assert_eq!(good["refused"][0], "BadRequestError");
    assert!(
        good["refused"][2]
            .as_str()
            .unwrap()
            .contains("messages: field required")
    );
    // What the agent wrote arrived as it was written: tools and pictures too.
    let calls = client.last_calls("good").await;
    let image = calls
        .iter()
        .find(|detail| detail.request.contains("iVBORw0KGgo="));
    assert!(image.is_some(), "{calls:#?}");
    // And all of it is on record, with its tokens.
    let messages: Vec<_> = calls
        .iter()
        .filter_map(|detail| detail.call.as_ref())
        .filter(|call| call.operation == "v1/messages")
        .collect();
    let answered = messages.iter().filter(|call| call.status == "ok");
    let mut count = 0;
    for call in answered {
        count += 1;
        assert!(
            call.tokens_in > Some(0) && call.tokens_out > Some(0),
            "{call:#?}"
        );
    }
    assert_eq!(count, 5, "{messages:#?}");

    // A server that has too much to do, one that fails, one that breaks off.
    model
        .fault(json!({ "kind": "status", "status": 429, "retry_after": "0", "times": 1 }))
        .await;
    let once = ask("faults", "whole").await;
    assert_eq!(once[0], "no error", "one refusal is waited out: {once}");
    model
        .fault(json!({ "kind": "status", "status": 429, "retry_after": "0", "times": 50 }))
        .await;
    let busy = ask("faults", "whole").await;
    assert_eq!(
        (&busy[0], &busy[1]),
        (&json!("RateLimitError"), &json!(429)),
        "{busy}"
    );
    model
        .fault(json!({ "kind": "status", "status": 500, "times": 50 }))
        .await;
    let failed = ask("faults", "stream").await;
    assert_eq!(
        (&failed[0], &failed[1]),
        (&json!("InternalServerError"), &json!(500)),
        "{failed}"
    );
    model.fault(json!({ "kind": "cut", "times": 50 })).await;
    let cut = ask("faults", "whole").await;
    assert_eq!(
        (&cut[0], &cut[1]),
        (&json!("InternalServerError"), &json!(502)),
        "{cut}"
    );
    assert!(cut[2].as_str().unwrap().contains("upstream_cut"), "{cut}");
    node.stop_cleanly().await;
}
