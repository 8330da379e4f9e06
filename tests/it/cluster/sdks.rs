//! What agents speak: OpenAI's wire format against an OpenAI-compatible server, and the official clients
//! of OpenAI and Ollama with only their base URL changed (features E1, E2).

use super::bed::{Client, agent_in, said, smollm};
use super::model::python;
use crate::support::NodeSpec;
use serde_json::{Value, json};

const MODEL: &str = "smollm2:135m";

/// An agent that uses the official clients; its input names what it does.
const SDKS: &str = r#"
import json, os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import ollama, openai

BRIDGE = os.environ["VLINDER_BRIDGE_URL"]
MODEL = "smollm2:135m"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
OPENAI = openai.OpenAI(base_url=f"{BRIDGE}/openai/v1", api_key="unused")
COMPATIBLE = openai.OpenAI(base_url=f"{BRIDGE}/ollama/v1", api_key="unused")
OLLAMA = ollama.Client(host=f"{BRIDGE}/ollama")

def openai_chat(client):
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=16, seed=1)
    return [answer.choices[0].message.content, answer.usage.completion_tokens]

def openai_stream(client):
    chunks = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=16, seed=1, stream=True)
    texts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    return ["".join(texts), len(texts)]

def openai_embed(client):
    return len(client.embeddings.create(model=MODEL, input="hello").data[0].embedding)

def openai_models(client):
    return [model.id for model in client.models.list()]

def openai_unknown(client):
    try:
        client.chat.completions.create(model="smollm3", messages=MESSAGES)
    except openai.NotFoundError as error:
        return [error.status_code, error.body["code"], error.body["message"]]

OPTIONS = {"num_predict": 16, "seed": 1, "temperature": 0}

def ollama_chat():
    answer = OLLAMA.chat(model=MODEL, messages=MESSAGES, options=OPTIONS)
    return [answer.message.content, answer.eval_count]

def ollama_stream():
    texts = [part.message.content for part in OLLAMA.chat(model=MODEL, messages=MESSAGES, options=OPTIONS, stream=True)]
    return ["".join(texts), len(texts)]

def ollama_generate():
    return OLLAMA.generate(model=MODEL, prompt="Hello", options=OPTIONS).response

def ollama_embed():
    return len(OLLAMA.embed(model=MODEL, input="hello").embeddings[0])

def ollama_list():
    return [model.model for model in OLLAMA.list().models]

def ollama_unknown():
    try:
        OLLAMA.chat(model="smollm3", messages=MESSAGES)
    except ollama.ResponseError as error:
        return [error.status_code, str(error)]

def tried(work, *args):
    try:
        return work(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def answer(what):
    if what == "ollama":
        work = [ollama_chat, ollama_stream, ollama_generate, ollama_embed, ollama_list, ollama_unknown]
        return {each.__name__: tried(each) for each in work}
    client = {"openai": OPENAI, "compatible": COMPATIBLE}[what]
    work = [openai_chat, openai_stream, openai_embed, openai_models, openai_unknown]
    return {each.__name__: tried(each, client) for each in work}

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply("ok")

    def do_POST(self):
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.reply(json.dumps(answer(text.splitlines()[-1].removeprefix("User: "))))

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
async fn official_clients_work_with_another_base_url() {
    let model = smollm().await;
    let node = NodeSpec::embedded()
        .var("VLINDER_OLLAMA_ENDPOINT", &model.url)
        .workers("inference.openai", 1)
        .var("VLINDER_OPENAI_ENDPOINT", format!("{}/v1", model.url))
        .start()
        .await;
    let client = Client(&node);
    let python = python().display().to_string();
    let dir = agent_in(node.spec().home(), "sdks", &python, SDKS);
    client.deploy(&dir).await;
    for what in ["openai", "compatible", "ollama"] {
        let end = client.say("sdks", what, what).await;
        let answers: Value = serde_json::from_str(&said(&end)).unwrap();
        println!("{what}: {answers:#}");
        let of = |name: &str| &answers[format!("{}_{name}", what.replace("compatible", "openai"))];
        let text = of("chat")[0].as_str().unwrap();
        assert!(!text.is_empty() && of("chat")[1].as_u64() > Some(0));
        // The same seed says the same, streamed or not.
        assert_eq!(of("stream")[0], text);
        assert!(of("stream")[1].as_u64() > Some(3), "it came in pieces");
        assert_eq!(of("embed"), 576, "the dimension of this model");
        let listed = if what == "ollama" {
            of("list")
        } else {
            of("models")
        };
        assert_eq!(*listed, json!([MODEL]));
        assert_eq!(of("unknown")[0], 404);
        let unknown = of("unknown").to_string();
        assert!(
            unknown.contains("model_not_found") && unknown.contains(MODEL),
            "{unknown}"
        );
        // Everything that was asked for is on record, with its tokens.
        let calls = client.last_calls(what).await;
        let infer = calls.iter().filter_map(|call| call.call.as_ref());
        let infer: Vec<_> = infer
            .filter(|call| call.service == "infer" && !call.model.is_empty())
            .collect();
        let backend = what.replace("compatible", "ollama");
        assert!(infer.len() >= 2, "{calls:#?}");
        for call in infer
            .iter()
            .filter(|call| call.operation != "v1/models" && call.operation != "api/tags")
        {
            assert_eq!(
                (call.status.as_str(), &call.backend),
                ("ok", &backend),
                "{call:#?}"
            );
        }
    }
    node.stop_cleanly().await;
}

#[tokio::test]
async fn an_openai_compatible_server_is_an_upstream() {
    let model = smollm().await;
    let node = NodeSpec::embedded()
        .workers("inference.ollama", 0)
        .workers("inference.openai", 1)
        .var("VLINDER_OPENAI_ENDPOINT", format!("{}/v1", model.url))
        .start()
        .await;
    let client = Client(&node);
    client.deploy_ask().await;
    let mut body = json!({
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 12,
        "seed": 1,
    });
    let (status, whole) = client.ask("openai/v1/chat/completions", &body).await;
    assert_eq!(status, 200, "{whole}");
    let whole: Value = serde_json::from_str(&whole).unwrap();
    body["stream"] = true.into();
    let (status, streamed) = client.ask("openai/v1/chat/completions", &body).await;
    assert_eq!(status, 200, "{streamed}");
    let events = streamed
        .lines()
        .filter_map(|line| line.strip_prefix("data: "));
    let texts = events.filter(|data| *data != "[DONE]").map(|data| {
        let event: Value = serde_json::from_str(data).unwrap();
        event["choices"][0]["delta"]["content"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    });
    assert_eq!(
        texts.collect::<String>(),
        whole["choices"][0]["message"]["content"]
    );
    assert!(streamed.trim_end().ends_with("data: [DONE]"), "{streamed}");
    // What this agent's node does not have is refused with a reason, not waited for.
    let (status, refused) = client.ask("ollama/api/chat", &body).await;
    assert_eq!(status, 404, "{refused}");
    assert!(
        refused.contains(&format!("{MODEL:?} of openai").replace('"', "\\\"")),
        "{refused}"
    );
    node.stop_cleanly().await;
}
