//! The bridge against agents that ask for what they must not have.

use crate::agents::{KV, agent};
use crate::bed::{Bed, file_of};
use serde_json::{Value, json};

/// Makes the calls that its input lists and answers what came of them.
const PROBE: &str = r#"
def turn(body, request):
    results = []
    for wanted in json.loads(body):
        wanted.setdefault("invocation", request.invocation)
        try:
            status, headers, content = call(**wanted)
            results.append({"status": status, "found": headers.get("Vlinder-Found"),
                            "type": headers.get("Content-Type"), "body": content.decode(errors="replace")})
        except Exception as error:
            results.append({"status": 0, "body": repr(error)})
    return json.dumps(results)
"#;

async fn probe(bed: &Bed, name: &str, calls: Value) -> Vec<Value> {
    let mut session = bed.session(name).await;
    let turn = session.say(bed, calls.to_string()).await;
    serde_json::from_str(&turn.done()).unwrap()
}

fn status_and_code(result: &Value) -> (u64, String) {
    let body: Value = serde_json::from_str(result["body"].as_str().unwrap()).unwrap_or_default();
    assert!(
        body["error"]["message"].is_string() || result["status"] == 200,
        "{result}"
    );
    let code = body["error"]["code"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    (result["status"].as_u64().unwrap(), code)
}

#[tokio::test]
async fn what_is_not_allowed_is_refused_precisely() {
    let (bed, worker) = Bed::with_worker().await;
    let needs = format!(
        "{KV}[requirements]\nsecrets = ['known', 'away', 'gone']\n[requirements.services.infer]\nprovider = 'ollama'\n"
    );
    bed.deploy("probe", &agent(PROBE), &needs).await;
    let get = json!({"path": "x"});
    let wrong = "0".repeat(32);
    for (call, status, code) in [
        (
            json!({"service": "sqlite-kv", "path": "get", "body": get}),
            200,
            "",
        ),
        (
            json!({"service": "", "path": "get", "body": get, "host": "sqlite-kv.vlinder.local"}),
            200,
            "",
        ),
        (
            json!({"service": "sqlite-kv", "path": "get", "body": get, "secret": wrong}),
            401,
            "unknown_secret",
        ),
        (
            json!({"service": "sqlite-kv", "path": "get", "body": get, "secret": ""}),
            401,
            "unknown_secret",
        ),
        (
            json!({"service": "sqlite-kv", "path": "get", "body": get, "invocation": "t-1.1.1"}),
            409,
            "no_invocation",
        ),
        (
            json!({"service": "sqlite-vec", "path": "search", "body": {"vector": [1], "limit": 1}}),
            403,
            "not_declared",
        ),
        (
            json!({"service": "openai", "path": "v1/chat/completions", "body": {"model": "m"}}),
            403,
            "not_declared",
        ),
        (
            json!({"service": "sqlite-kv", "path": "drop", "body": get}),
            404,
            "unknown_call",
        ),
        (
            json!({"service": "sqlite-kv", "path": "../../get", "body": get}),
            404,
            "unknown_call",
        ),
        (
            json!({"service": "postgres", "path": "get", "body": get}),
            404,
            "unknown_service",
        ),
        (
            json!({"service": "sqlite-kv", "path": "get"}),
            405,
            "method_not_allowed",
        ),
        (
            json!({"service": "sqlite-kv", "path": "get", "body": {"no": 1}}),
            400,
            "bad_request",
        ),
        (
            json!({"service": "sqlite-kv", "path": "get", "body": {"path": ""}}),
            400,
            "bad_path",
        ),
        (
            json!({"service": "ollama", "path": "api/chat", "body": {}}),
            400,
            "model_missing",
        ),
        (
            json!({"service": "ollama", "path": "api/chat", "body": {"model": 3}}),
            400,
            "bad_request",
        ),
        (
            json!({"service": "ollama", "path": "api/chat", "body": {"model": "nobody:1b"}}),
            404,
            "model_not_found",
        ),
        (
            json!({"service": "ollama", "path": "api/pull", "body": {"model": "x"}}),
            404,
            "unknown_call",
        ),
        (
            json!({"service": "runtime", "path": "delegate", "body": {"target": "x", "input": ""}}),
            404,
            "agent_not_found",
        ),
        (
            json!({"service": "runtime", "path": "wait", "body": {"handle": "t-x"}}),
            404,
            "unknown_handle",
        ),
        (
            json!({"service": "runtime", "path": "secret", "body": {"name": "known"}}),
            200,
            "",
        ),
        (
            json!({"service": "runtime", "path": "secret", "body": {"name": "other"}}),
            403,
            "not_declared",
        ),
        (
            json!({"service": "runtime", "path": "secret", "body": {"name": "gone"}}),
            404,
            "secret_not_found",
        ),
        (
            json!({"service": "runtime", "path": "secret", "body": {"name": "away"}}),
            503,
            "secret_unavailable",
        ),
        (
            json!({"service": "runtime", "path": "secret", "body": {"key": "known"}}),
            400,
            "bad_request",
        ),
        (
            json!({"service": "runtime", "path": "progress", "body": {"text": "half"}}),
            200,
            "",
        ),
        (
            json!({"service": "runtime", "path": "progress", "body": {"text": 1}}),
            400,
            "bad_request",
        ),
        (
            json!({"service": "sqlite-kv", "path": "get", "body": get, "headers": {"Content-Length": "99999999999"}}),
            413,
            "too_large",
        ),
        (
            json!({"service": "sqlite-kv", "path": "get", "body": get, "headers": {"X-Vlinder-Checkpoint": "x".repeat(300)}}),
            400,
            "bad_checkpoint",
        ),
    ] {
        let results = probe(&bed, "probe", json!([call])).await;
        assert_eq!(
            status_and_code(&results[0]),
            (status, code.to_owned()),
            "{call}: {}",
            results[0]
        );
    }
    worker.stop().await;
}

#[tokio::test]
async fn kv_speaks_as_documented() {
    let (bed, worker) = Bed::with_worker().await;
    bed.deploy("probe", &agent(PROBE), KV).await;
    let kv = |path: &str, body: Value| json!({"service": "sqlite-kv", "path": path, "body": body});
    let results = probe(
        &bed,
        "probe",
        json!([
            kv("get", json!({"path": "a"})),
            kv("put", json!({"path": "a", "content": "héllo"})),
            kv("get", json!({"path": "a"})),
            kv("put", json!({"path": "b", "content_base64": "AAEC"})),
            kv("list", json!({"path": ""})),
            kv("delete", json!({"path": "a"})),
            kv("get", json!({"path": "a"})),
        ]),
    )
    .await;
    assert!(
        results.iter().all(|result| result["status"] == 200),
        "{results:?}"
    );
    assert_eq!(
        (&results[0]["found"], &results[0]["body"]),
        (&json!("false"), &json!(""))
    );
    assert_eq!(
        (&results[2]["found"], &results[2]["body"]),
        (&json!("true"), &json!("héllo"))
    );
    assert_eq!(results[4]["body"], r#"["a","b"]"#);
    assert_eq!(results[6]["found"], "false");
    worker.stop().await;
}

#[tokio::test]
async fn nothing_is_answered_outside_of_an_invocation() {
    let (bed, worker) = Bed::with_worker().await;
    let outcome = bed.dir.path().join("outcome");
    let source = format!(
        r#"
def later(invocation):
    time.sleep(0.3)
    named = call("sqlite-kv", "put", {{"path": "x", "content": "late"}}, invocation)
    unnamed = call("sqlite-kv", "put", {{"path": "x", "content": "late"}})
    open({:?}, "w").write(f"{{named[0]}} {{unnamed[0]}}")
def turn(body, request):
    threading.Thread(target=later, args=(request.invocation,)).start()
    return "done"
"#,
        outcome.display().to_string()
    );
    bed.deploy("late", &agent(&source), KV).await;
    let turn = bed.session("late").await.say(&bed, "hi").await;
    assert_eq!(turn.done(), "done");
    assert_eq!(file_of(outcome, 7).await, "409 409");
    assert!(bed.requests_of(&turn.submission).await.is_empty());
    worker.stop().await;
}

#[tokio::test]
async fn a_write_that_nobody_waits_for_is_in_the_end() {
    let (bed, worker) = Bed::with_worker().await;
    let source = r#"
def turn(body, request):
    if body == b"write":
        # The request leaves, the answer is not waited for.
        data = json.dumps({"path": "x", "content": "written"}).encode()
        connection = http.client.HTTPConnection(BRIDGE.hostname, BRIDGE.port)
        connection.request("POST", f"{BRIDGE.path}/sqlite-kv/put", data, {"X-Vlinder-Invocation": request.invocation})
        time.sleep(0.05)
        connection.close()
        return "sent"
    return get("x", request.invocation) or "nothing"
"#;
    bed.deploy("hasty", &agent(source), KV).await;
    let mut session = bed.session("hasty").await;
    let turn = session.say(&bed, "write").await;
    assert_eq!(turn.done(), "sent");
    let results = bed.results_of(&turn.submission).await;
    assert_eq!(turn.stored.node.parents, [results[0].hash]);
    assert_eq!(session.say(&bed, "read").await.done(), "written");
    worker.stop().await;
}

#[tokio::test]
async fn parallel_calls_have_the_parents_that_were_known_then() {
    let (bed, worker) = Bed::with_worker().await;
    let source = r#"
def turn(body, request):
    threads = [threading.Thread(target=put, args=(f"k{i}", str(i), request.invocation)) for i in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    status, _, body = call("sqlite-kv", "list", {"path": "k"}, request.invocation)
    return body
"#;
    bed.deploy("wide", &agent(source), KV).await;
    let turn = bed.session("wide").await.say(&bed, "go").await;
    let keys: Vec<String> = serde_json::from_str(&turn.done()).unwrap();
    assert_eq!(keys.len(), 8, "writes of one turn build on each other");
    let requests = bed.requests_of(&turn.submission).await;
    let results = bed.results_of(&turn.submission).await;
    assert_eq!((requests.len(), results.len()), (9, 9));
    // The list follows from everything that the agent had been given.
    let list = requests.last().unwrap();
    let mut known: Vec<_> = results.iter().map(|result| result.hash).collect();
    let last = known.pop().unwrap();
    let reached = ancestors(&requests, &results, list.node.parents.clone());
    assert!(known.iter().all(|hash| reached.contains(hash)));
    assert_eq!(turn.stored.node.parents, [last]);
    worker.stop().await;
}

fn ancestors(
    requests: &[vlinder_bus::Stored],
    results: &[vlinder_bus::Stored],
    from: Vec<vlinder_core::NodeHash>,
) -> std::collections::HashSet<vlinder_core::NodeHash> {
    let nodes: std::collections::HashMap<_, _> = requests
        .iter()
        .chain(results)
        .map(|stored| (stored.hash, stored))
        .collect();
    let (mut reached, mut todo) = (std::collections::HashSet::new(), from);
    while let Some(hash) = todo.pop() {
        if reached.insert(hash) {
            todo.extend(
                nodes
                    .get(&hash)
                    .into_iter()
                    .flat_map(|stored| stored.node.parents.clone()),
            );
        }
    }
    reached
}

#[tokio::test]
async fn an_agent_with_several_turns_at_once_must_say_which() {
    let (bed, worker) = Bed::with_worker().await;
    bed.deploy("probe", &agent(PROBE), &format!("{KV}concurrency = 2\n"))
        .await;
    let get = json!({"path": "x"});
    let results = probe(
        &bed,
        "probe",
        json!([
            {"service": "sqlite-kv", "path": "get", "body": get, "invocation": ""},
            {"service": "sqlite-kv", "path": "get", "body": get},
        ]),
    )
    .await;
    assert_eq!(
        status_and_code(&results[0]),
        (400, "invocation_missing".to_owned())
    );
    assert_eq!(results[1]["status"], 200);
    worker.stop().await;
}
