//! Who may call: every RPC and every route asks for the token (features I1).

use crate::support::agents::deploy_puppet;
use crate::support::{Node, NodeSpec, faces};
use futures::StreamExt;
use prost::Message;
use std::time::{Duration, Instant};
use vlinder_testkit::{CURRENT, NatsServer};

/// The routes of the HTTP face, and some that do not exist.
const ROUTES: [&str; 9] = [
    "/",
    "/healthz",
    "/readyz",
    "/metrics",
    "/events",
    "/state/cluster",
    "/v1/models",
    "/v1/chat/completions",
    "/no/such/route",
];
/// gRPC status codes.
const UNAUTHENTICATED: &str = "16";
const UNIMPLEMENTED: &str = "12";
/// Calls under way at a time; refusals are delayed, so one after another would take minutes.
const AT_ONCE: usize = 32;
/// Bytes of a message without content: not compressed, length 0.
const EMPTY_MESSAGE: [u8; 5] = [0; 5];

/// Every method of every service, `(service name, "/package.Service/Method")`.
fn methods() -> Vec<(String, String)> {
    let set = prost_types::FileDescriptorSet::decode(vlinder_proto::DESCRIPTORS).unwrap();
    let mut methods = vec![];
    for file in &set.file {
        for service in &file.service {
            for method in &service.method {
                let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                methods.push((service.name().to_lowercase(), path));
            }
        }
    }
    assert!(methods.len() > 30, "{methods:?}");
    for service in ["registry", "harness", "state", "secret", "catalog"] {
        for path in [
            "/grpc.health.v1.Health/Check",
            "/grpc.health.v1.Health/Watch",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        ] {
            methods.push((service.to_owned(), path.to_owned()));
        }
    }
    methods
}

/// Calls a method with an empty message; gives the status of an answer that has no message.
async fn call(client: &reqwest::Client, url: String, credential: Option<&str>) -> Option<String> {
    let mut request = client
        .post(&url)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(EMPTY_MESSAGE.to_vec());
    if let Some(credential) = credential {
        request = request.header("authorization", credential);
    }
    let answer = request
        .send()
        .await
        .unwrap_or_else(|error| panic!("{url}: {error:?}"));
    assert_eq!(answer.status(), 200, "{url}");
    let status = answer.headers().get("grpc-status");
    status.map(|status| status.to_str().unwrap().to_owned())
}

async fn every_method_asks(node: &Node) {
    let client = faces::client(true);
    let wrong = format!(
        "Bearer {}",
        node.token().replace(|c: char| c.is_ascii_digit(), "x")
    );
    let bare = node.token();
    let basic = format!("Basic {}", node.token());
    let refused = [
        None,
        Some(wrong.as_str()),
        Some(bare.as_str()),
        Some(&basic),
        Some("Bearer "),
    ];
    let addresses = node.addresses();
    let attempts = methods().into_iter().flat_map(|(service, path)| {
        let url = format!("{}{path}", addresses[&service]);
        refused.map(|credential| (url.clone(), credential))
    });
    let answers = futures::stream::iter(attempts).map(|(url, credential)| {
        let client = &client;
        async move {
            let status = call(client, url.clone(), credential).await;
            assert_eq!(
                status.as_deref(),
                Some(UNAUTHENTICATED),
                "{url} with {credential:?}"
            );
        }
    });
    answers.buffer_unordered(AT_ONCE).collect::<Vec<()>>().await;

    // After all those failures the right one opens at once, and every method exists.
    let right = format!("Bearer {}", node.token());
    for (service, path) in methods() {
        if path.ends_with("/Bench") {
            // It needs no argument and would measure for seconds.
            continue;
        }
        let began = Instant::now();
        let url = format!("{}{path}", addresses[&service]);
        let status = call(&client, url, Some(&right)).await;
        let status = status.as_deref();
        assert!(
            ![Some(UNAUTHENTICATED), Some(UNIMPLEMENTED)].contains(&status),
            "{path}"
        );
        assert!(
            began.elapsed() < Duration::from_secs(2),
            "{path}: {:?}",
            began.elapsed()
        );
    }
}

#[tokio::test]
async fn every_method_asks_for_the_token_embedded() {
    let node = Node::embedded().await;
    every_method_asks(&node).await;
    let log = node.log();
    assert!(
        log.contains("refused: wrong or missing credential"),
        "audited: {log}"
    );
    assert!(!log.contains(&node.token()), "the token is in the log");
    assert!(!log.contains("panicked"), "{log}");
    node.stop_cleanly().await;
}

#[tokio::test]
async fn every_method_asks_for_the_token_on_nats() {
    let nats = NatsServer::start(CURRENT).await;
    let node = Node::on(&nats).await;
    every_method_asks(&node).await;
    let workers = node.workers().await;
    assert!(
        workers.iter().all(|worker| worker.restarts == 0),
        "{workers:#?}"
    );
    // It is no argument and no variable of any process either.
    for process in node.spec().processes() {
        let environment = std::fs::read(format!("/proc/{}/environ", process.pid)).unwrap();
        let environment = String::from_utf8_lossy(&environment).into_owned();
        assert!(!process.command.contains(&node.token()), "{process:?}");
        assert!(!environment.contains(&node.token()), "{process:?}");
    }
    node.stop_cleanly().await;
}

#[tokio::test]
async fn every_route_asks_for_the_token() {
    let node = Node::embedded().await;
    let client = faces::client(false);
    let base = node.address("http");
    let refused = ["", "Bearer wrong", "Basic dTpw"].into_iter();
    let attempts = refused.flat_map(|credential| ROUTES.map(|route| (route, credential)));
    let asked = attempts.map(|(route, credential)| {
        let request = client.get(format!("{base}{route}"));
        async move {
            let answer = request
                .header("authorization", credential)
                .send()
                .await
                .unwrap();
            assert_eq!(answer.status(), 401, "{route} with {credential:?}");
            assert_eq!(answer.headers()["www-authenticate"], "Bearer", "{route}");
            let body: serde_json::Value = answer.json().await.unwrap();
            assert_eq!(body["error"]["code"], "unauthenticated", "{route}: {body}");
        }
    });
    futures::future::join_all(asked).await;
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "TRACE"] {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let answer = client
            .request(method.clone(), format!("{base}/state/cluster"))
            .send();
        assert_eq!(answer.await.unwrap().status(), 401, "{method}");
    }
    // A token in the address would be in every log on the way.
    let url = format!("{base}/state/cluster?token={}", node.token());
    assert_eq!(client.get(url).send().await.unwrap().status(), 401);
    for (route, status) in [
        ("/", 200),
        ("/healthz", 200),
        ("/state/cluster", 200),
        ("/no/such/route", 404),
    ] {
        let began = Instant::now();
        assert_eq!(node.get(route).await.unwrap().0, status, "{route}");
        assert!(
            began.elapsed() < Duration::from_secs(1),
            "the right one is never delayed"
        );
    }
    // The index names what is there, and nothing else.
    let (_, index) = node.get("/").await.unwrap();
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    assert_eq!(index["node"], node.spec().name(), "{index:#}");
    for route in index["routes"].as_array().unwrap() {
        let url = format!("{base}{}", route["path"].as_str().unwrap());
        let answer = client.get(url).bearer_auth(node.token()).send();
        assert_ne!(answer.await.unwrap().status(), 404, "{route}");
    }
    let (_, metrics) = node.get("/metrics").await.unwrap();
    assert!(
        metrics.contains("vlinder_worker_up{role=\"harness\",index=\"0\"} 1"),
        "{metrics}"
    );
    node.stop_cleanly().await;
}

#[tokio::test]
async fn a_configured_token_is_the_only_one() {
    let token = "this-one-was-configured";
    let spec = NodeSpec::embedded();
    let made = spec.start().await;
    let old = made.token();
    let node = made
        .stop_cleanly()
        .await
        .var("VLINDER_AUTH_TOKEN", token)
        .start()
        .await;
    assert_eq!(node.get("/healthz").await.unwrap().0, 200);
    let client = faces::client(false);
    let url = format!("{}/healthz", node.address("http"));
    let answer = client.get(url).bearer_auth(old).send().await.unwrap();
    assert_eq!(answer.status(), 401);
    node.stop_cleanly().await;
}

#[tokio::test]
async fn the_command_line_is_refused_like_everyone() {
    let node = Node::embedded().await;
    let stranger = NodeSpec::embedded();
    let harness = node.address("harness");
    let refused = stranger
        .cli(&["queue", "list", "--addr", &harness])
        .await
        .code(8);
    assert!(refused.stderr.contains("token"), "{refused:#?}");
    node.cli(&["queue", "list"]).await.code(0);
    node.stop_cleanly().await;
}

#[tokio::test]
async fn the_bridge_asks_for_the_secret_of_a_replica() {
    let node = Node::embedded().await;
    deploy_puppet(&node, "").await;
    let workers = node
        .cli(&["worker", "list", "-o", "json"])
        .await
        .code(0)
        .json();
    let list = workers.as_array().unwrap();
    let runtime = list
        .iter()
        .find(|worker| worker["role"] == "agent.process")
        .unwrap();
    let bridge = runtime["notes"]["bridge"]
        .as_str()
        .unwrap_or_else(|| panic!("{runtime:#}"));
    let client = faces::client(false);
    let token = node.token();
    for path in [
        "",
        "/sqlite-kv/get",
        "/0123456789abcdef/sqlite-kv/get",
        "/../sqlite-kv/get",
    ] {
        let url = format!("http://{bridge}{path}");
        // The token of the cluster is not an agent's, and the host name alone is nobody's.
        for host in ["sqlite-kv.vlinder.local", "x"] {
            let request = client.post(&url).header("host", host).bearer_auth(&token);
            let answer = request.body("{\"path\": \"x\"}").send().await.unwrap();
            let status = answer.status().as_u16();
            assert!(
                [401, 403, 404].contains(&status),
                "{path} as {host}: {status}"
            );
        }
    }
    node.stop_cleanly().await;
}
