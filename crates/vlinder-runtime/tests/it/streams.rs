//! Calls to models: streamed answers, listings, and what the watcher of a turn sees.

use crate::agents::agent;
use crate::bed::{Bed, Session, within, worker_cx};
use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use vlinder_bus::{Bus, QueueSpec, Stored, Subject, subjects};
use vlinder_core::record::Request;
use vlinder_core::{Selector, WorkerRole};
use vlinder_worker::infra::MODEL;
use vlinder_worker::nodes::{self, NodeReport, WorkerReport};
use vlinder_worker::offers::{self, Offer, OfferedModel};
use vlinder_worker::{Answer, ServiceHandler, ServiceOutcome, serve_queue};

const LINES: [&str; 4] = ["{\"n\":1}\n", "{\"n\":2}\n", "{\"n\":3}\n", "{\"n\":4}\n"];
/// Another answer than the pieces are of.
const OTHER: &str = "{\"n\":9}\n{\"n\":8}\n{\"n\":7}\n{\"n\":6}\n{}\n";
const MODELS: &str = "[requirements.services.infer]\nprovider = 'ollama'\n";

/// How the responder behaves, by what the request says.
struct Responder {
    bus: Bus,
    /// Where agents leave a file when they have their first line.
    dir: std::path::PathBuf,
    calls: AtomicU32,
}

#[async_trait]
impl vlinder_worker::Service for Responder {
    async fn call(&self, request: &Request, _: &Stored, body: Bytes) -> ServiceOutcome {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        let how = body["how"].as_str().unwrap_or_default();
        let subject =
            subjects::answer_signal(&request.namespace, &request.submission, &request.key);
        let whole = LINES.concat();
        let mut offset = 0u64;
        for (number, line) in LINES.iter().enumerate() {
            let is_lost = how == "lossy" && number == 1;
            if !is_lost && how != "silent" {
                let mut piece = offset.to_be_bytes().to_vec();
                piece.extend_from_slice(&7u64.to_be_bytes());
                piece.extend_from_slice(line.as_bytes());
                self.bus.signal(&subject, piece.into()).await.unwrap();
            }
            offset += line.len() as u64;
            if number == 0 && how == "live" {
                // Goes on only when the agent has seen the first line.
                crate::bed::file_of(self.dir.join("first"), 1).await;
            }
        }
        ServiceOutcome::Answer(match how {
            "other" => Answer::ok("application/x-ndjson", OTHER),
            "error" => Answer::error(503, "overloaded", "too busy"),
            _ => Answer::ok("application/x-ndjson", whole),
        })
    }
}

/// A model `tiny:latest` of an Ollama that answers as asked.
async fn model(bed: &Bed) -> Arc<Responder> {
    let cx = worker_cx(&bed.cx, WorkerRole::InferenceOllama, "test", 0);
    let responder = Arc::new(Responder {
        bus: bed.bus.clone(),
        dir: bed.dir.path().to_owned(),
        calls: AtomicU32::new(0),
    });
    let selector = Selector::new("tiny:latest").unwrap();
    let subject = Subject::Req {
        ns: cx.ns.clone(),
        service: "infer".to_owned(),
        backend: "ollama".to_owned(),
        selector: selector.clone(),
    };
    let queue = QueueSpec {
        stream: cx.log(),
        name: subjects::service_queue("infer", "ollama", &selector),
        filter: subject.to_string(),
        from_start: true,
    };
    let handler = ServiceHandler::new(cx.clone(), responder.clone());
    let offer = Offer {
        node: "test".to_owned(),
        backend: "ollama".to_owned(),
        endpoint: "http://nowhere".to_owned(),
        models: vec![OfferedModel {
            name: "tiny:latest".to_owned(),
            size: Some(7),
        }],
        problem: None,
    };
    offers::publish(&cx, &offer).await.unwrap();
    let report = NodeReport {
        node: offer.node,
        workers: vec![WorkerReport {
            role: WorkerRole::InferenceOllama.to_string(),
            state: "ready".to_owned(),
            ..WorkerReport::default()
        }],
        ..NodeReport::default()
    };
    nodes::publish(&bed.bus, &report).await.unwrap();
    tokio::spawn(async move { serve_queue(&cx, queue, 8, handler).await });
    bed.infra
        .append(MODEL, "ollama/tiny:latest", Some(&serde_json::json!({})))
        .await
        .unwrap();
    responder
}

/// Asks the model as its input says and answers what it got, line by line.
const ASKS: &str = r#"
def turn(body, request):
    how = body.decode().splitlines()[-1].removeprefix("User: ")
    connection = http.client.HTTPConnection(BRIDGE.hostname, BRIDGE.port, timeout=20)
    data = {"model": "tiny", "how": how}
    if how == "whole": data["stream"] = False
    connection.request("POST", f"{BRIDGE.path}/ollama/api/chat", json.dumps(data), {"X-Vlinder-Invocation": request.invocation})
    response = connection.getresponse()
    lines = []
    try:
        if how == "other": lines = response.read().decode().split()  # readline takes a torn chunk for the end
        while line := response.readline():
            lines.append(line.decode().strip())
            if len(lines) == 1 and how == "live":
                open(os.environ["VLINDER_PROMPT_DIR"] + "/first", "w").write("x")
    except (http.client.HTTPException, OSError, ValueError) as error:
        lines.append(type(error).__name__)
    if how == "live" and response.getheader("Transfer-Encoding") != "chunked":
        lines.append("not chunked")
    return f"{response.status} {response.getheader('Content-Type')} {' '.join(lines)}"
"#;

async fn asks(bed: &Bed, how: &str) -> String {
    let mut session = bed.session("asks").await;
    session.say(bed, how.to_owned()).await.done()
}

#[tokio::test]
async fn a_streamed_answer_streams_and_is_whole_in_any_case() {
    let (bed, worker) = Bed::with_worker().await;
    let model = model(&bed).await;
    let prompts = format!("{MODELS}[prompts]\ndir = '{}'\n", bed.dir.path().display());
    bed.deploy("asks", &agent(ASKS), &prompts).await;
    let good = format!(
        "200 application/x-ndjson {}",
        LINES.map(str::trim).join(" ")
    );
    for how in ["live", "lossy", "silent", "whole"] {
        assert_eq!(asks(&bed, how).await, good, "{how}");
    }
    // What was passed on is not how the recorded answer begins: what the agent makes of it does not
    // count, and it is asked again, with the recorded answer.
    let recorded = format!(
        "200 application/x-ndjson {}",
        OTHER.trim().replace('\n', " ")
    );
    assert_eq!(asks(&bed, "other").await, recorded);
    let calls = model.calls.load(Ordering::SeqCst);
    assert_eq!(calls, 5);
    worker.stop().await;
}

#[tokio::test]
async fn an_error_of_the_model_keeps_its_status() {
    let (bed, worker) = Bed::with_worker().await;
    model(&bed).await;
    let source = r#"
def turn(body, request):
    status, headers, content = call("ollama", "api/chat", {"model": "tiny", "how": "error", "stream": False}, request.invocation)
    return f"{status} {content.decode()}"
"#;
    bed.deploy("asks", &agent(source), MODELS).await;
    let answer = asks(&bed, "x").await;
    assert!(
        answer.starts_with("503 ") && answer.contains("overloaded"),
        "{answer}"
    );
    worker.stop().await;
}

#[tokio::test]
async fn a_resumed_turn_does_not_pay_for_a_model_twice() {
    let (bed, worker) = Bed::with_worker().await;
    let model = model(&bed).await;
    let source = r#"
def turn(body, request):
    lines = []
    for n in range(3):
        status, _, content = call("ollama", "api/chat", {"model": "tiny:latest", "how": "silent", "stream": n == 1}, request.invocation)
        lines.append(str(len(content)))
    flag = os.path.join(os.environ["HOME"], "died")
    if not os.path.exists(flag):
        open(flag, "w").write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    return " ".join(lines)
"#;
    bed.deploy("asks", &agent(source), MODELS).await;
    let len = LINES.concat().len();
    assert_eq!(asks(&bed, "x").await, format!("{len} {len} {len}"));
    assert_eq!(model.calls.load(Ordering::SeqCst), 3);
    worker.stop().await;
}

#[tokio::test]
async fn listings_are_answered_from_the_offers_and_recorded() {
    let (bed, worker) = Bed::with_worker().await;
    model(&bed).await;
    let source = r#"
def turn(body, request):
    return json.dumps([json.loads(call("ollama", path, invocation=request.invocation)[2]) for path in ("api/tags", "v1/models", "api/version")])
"#;
    bed.deploy("asks", &agent(source), MODELS).await;
    let mut session: Session = bed.session("asks").await;
    let turn = session.say(&bed, "x").await;
    let answers: serde_json::Value = serde_json::from_str(&turn.done()).unwrap();
    assert_eq!(answers[0]["models"][0]["name"], "tiny:latest");
    assert_eq!(answers[1]["data"][0]["id"], "tiny:latest");
    assert!(answers[2]["version"].is_string());
    assert_eq!(bed.requests_of(&turn.submission).await.len(), 3);
    assert_eq!(bed.results_of(&turn.submission).await.len(), 3);
    worker.stop().await;
}

#[tokio::test]
async fn whoever_watches_a_turn_sees_progress_and_pieces_as_they_come() {
    let (bed, worker) = Bed::with_worker().await;
    let source = r#"
def turn(body, request):
    call("runtime", "progress", {"text": "thinking"}, request.invocation)
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    text = "grün und blau".encode()
    for piece in (text[:3], text[3:8], text[8:]):
        request.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        request.wfile.flush()
        time.sleep(0.05)
    request.wfile.write(b"0\r\n\r\n")
"#;
    bed.deploy("slow", &agent(source), "").await;
    let mut session = bed.session("slow").await;
    let mut chunks = bed.bus.signals("sig.v1.default.chunk.*").await.unwrap();
    let turn = session.say(&bed, "x").await;
    assert_eq!(turn.done(), "grün und blau");
    let mut said = Vec::new();
    let all = async {
        while said.len() < 4 {
            let signal = chunks.next().await.unwrap();
            let value: serde_json::Value = serde_json::from_slice(&signal.body).unwrap();
            said.push(value);
        }
    };
    within("the pieces", all).await;
    assert_eq!(
        said[0],
        serde_json::json!({"kind": "progress", "text": "thinking"})
    );
    let text: String = said[1..]
        .iter()
        .map(|piece| piece["text"].as_str().unwrap())
        .collect();
    assert_eq!(text, "grün und blau");
    assert_eq!(said[1]["text"], "gr", "half a character waits for its rest");
    assert_eq!(said[2]["offset"], 2);
    tokio::time::sleep(Duration::from_millis(1)).await;
    worker.stop().await;
}
