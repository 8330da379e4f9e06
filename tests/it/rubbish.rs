//! Clients that send rubbish to every port: the service survives, and serves the next one.

use crate::support::{Node, faces};
use futures::StreamExt;
use rand::RngCore;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use vlinder_testkit::{CURRENT, NatsServer};

/// How long a server may keep a hopeless connection before the test leaves.
const PATIENCE: Duration = Duration::from_millis(300);
/// A gRPC message may have 64 MiB of body and 1 MiB around it; this is well beyond.
const TOO_LARGE: usize = 80 * 1024 * 1024;
/// gRPC codes for what a client did wrong.
const INVALID: [&str; 5] = ["3", "8", "11", "13", "5"];

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What is sent, byte for byte.
fn rubbish() -> Vec<(&'static str, Vec<u8>)> {
    let mut noise = vec![0; 64 * 1024];
    rand::rng().fill_bytes(&mut noise);
    let frame = |kind: u8, flags: u8, stream: u32, length: usize, body: &[u8]| {
        let mut frame = PREFACE.to_vec();
        frame.extend([0, 0, 0, 4, 0, 0, 0, 0, 0]);
        frame.extend(&(length as u32).to_be_bytes()[1..]);
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(body);
        frame
    };
    vec![
        ("nothing", vec![]),
        ("noise", noise.clone()),
        ("HTTP/1.1", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        (
            "half a request",
            b"POST /x HTTP/1.1\r\nContent-Length: 1000\r\n\r\nabc".to_vec(),
        ),
        (
            "endless header",
            [b"GET / HTTP/1.1\r\nX: ".to_vec(), vec![b'a'; 1 << 20]].concat(),
        ),
        ("TLS", [&[0x16, 3, 1, 2, 0, 1][..], &noise[..500]].concat()),
        ("preface and noise", [PREFACE, &noise].concat()),
        ("a frame of 16 MiB", frame(0, 0, 1, 0xff_ffff, &noise)),
        ("data without headers", frame(0, 1, 1, 5, &[0; 5])),
        (
            "headers that are no HPACK",
            frame(1, 5, 1, 100, &noise[..100]),
        ),
        (
            "settings that are too many",
            frame(4, 0, 0, 6 * 1000, &noise[..6000]),
        ),
        ("window update of nothing", frame(8, 0, 0, 4, &[0; 4])),
        ("go away", frame(7, 0, 0, 8, &[0; 8])),
    ]
}

async fn throw(address: &str, bytes: &[u8]) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // It may close at any point; that is its right.
    let _ = tokio::time::timeout(PATIENCE, stream.write_all(bytes)).await;
    let mut answer = Vec::new();
    let _ =
        tokio::time::timeout(PATIENCE, (&mut stream).take(65536).read_to_end(&mut answer)).await;
}

async fn post(client: &reqwest::Client, url: &str, token: &str, body: Vec<u8>) -> Option<String> {
    let request = client
        .post(url)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .bearer_auth(token)
        .body(body);
    let answer = request.send().await.ok()?;
    let status = answer.headers().get("grpc-status")?;
    Some(status.to_str().unwrap().to_owned())
}

async fn survives(node: &Node) {
    let before = node.workers().await;
    let addresses = node.addresses();
    let throws = addresses.values().flat_map(|address| {
        rubbish()
            .into_iter()
            .map(move |(_, bytes)| (address.trim_start_matches("http://"), bytes))
    });
    let throws =
        futures::stream::iter(throws).map(async |(address, bytes)| throw(address, &bytes).await);
    throws.buffer_unordered(16).collect::<Vec<()>>().await;

    let methods = [
        ("registry", "/vlinder.registry.v1.Registry/GetAgent"),
        ("registry", "/vlinder.registry.v1.Registry/DeployAgent"),
        ("harness", "/vlinder.harness.v1.Harness/Run"),
        ("state", "/vlinder.state.v1.State/GetSession"),
        ("secret", "/vlinder.secret.v1.Secret/Put"),
        ("catalog", "/vlinder.catalog.v1.Catalog/Available"),
    ];
    let client = faces::client(true);
    let token = node.token();
    let framed = |body: Vec<u8>| {
        let length = (body.len() as u32).to_be_bytes();
        [&[0][..], &length, &body].concat()
    };
    let mut noise = vec![0xff; 200];
    rand::rng().fill_bytes(&mut noise[100..]);
    for (service, path) in methods {
        let url = format!("{}{path}", addresses[service]);
        for (what, body) in [
            ("not protobuf", framed(noise.clone())),
            (
                "not UTF-8 in every field",
                framed([[0x0a, 2, 0xff, 0xfe], [0x12, 2, 0xff, 0xfe]].concat()),
            ),
            (
                "says 4 GiB",
                [&[0, 0xff, 0xff, 0xff, 0xff][..], &noise].concat(),
            ),
            (
                "compressed it is not",
                [&[1, 0, 0, 0, 5][..], b"abcde"].concat(),
            ),
            ("an unknown flag", [&[7, 0, 0, 0, 5][..], b"abcde"].concat()),
            ("cut off", vec![0, 0, 0, 1, 0, 1, 2, 3]),
        ] {
            if let Some(status) = post(&client, &url, &token, body).await {
                assert!(
                    INVALID.contains(&status.as_str()),
                    "{path}, {what}: status {status}"
                );
            }
        }
        // A message beyond the limit is refused by its length; what follows need not be read.
        let mut large = vec![0; 5];
        large[1..].copy_from_slice(&(TOO_LARGE as u32).to_be_bytes());
        large.resize(TOO_LARGE + 5, 0);
        if let Some(status) = post(&client, &url, &token, large).await {
            assert!(
                INVALID.contains(&status.as_str()),
                "{path}, too large: status {status}"
            );
        }
    }

    // Everyone still serves, and nobody had to be replaced for it.
    for list in [
        ["agent", "list"],
        ["session", "list"],
        ["secret", "list"],
        ["worker", "list"],
    ] {
        node.cli(&list).await.code(0);
    }
    assert_eq!(node.get("/readyz").await.unwrap().0, 200);
    let after = node.workers().await;
    let pids = |workers: &[crate::support::Worker]| {
        workers
            .iter()
            .map(|worker| (worker.pid, worker.restarts))
            .collect::<Vec<_>>()
    };
    assert_eq!(pids(&before), pids(&after));
    assert!(!node.log().contains("panicked"), "{}", node.log());
}

#[tokio::test]
async fn every_port_survives_rubbish_embedded() {
    let node = Node::embedded().await;
    survives(&node).await;
    node.stop_cleanly().await;
}

#[tokio::test]
async fn every_port_survives_rubbish_on_nats() {
    let nats = NatsServer::start(CURRENT).await;
    let node = Node::on(&nats).await;
    survives(&node).await;
    node.stop_cleanly().await;
}

#[tokio::test]
async fn idle_connections_do_not_keep_others_out() {
    let node = Node::embedded().await;
    let mut idle = vec![];
    for address in node.addresses().values() {
        let address = address.trim_start_matches("http://");
        for _ in 0..50 {
            idle.push(TcpStream::connect(address).await.unwrap());
        }
    }
    node.cli(&["worker", "list"]).await.code(0);
    assert_eq!(node.get("/readyz").await.unwrap().0, 200);
    node.stop_cleanly().await;
}
