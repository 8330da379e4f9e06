//! Starting: embedded, on NATS, detached, refused (features A3, A10, A13).

use crate::support::{Finished, Node, NodeSpec, proc, wait_for};
use rustix::process::Signal;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};
use vlinder_proto::secret::secret_client::SecretClient;
use vlinder_proto::secret::{GetRequest, PutRequest};
use vlinder_testkit::{CURRENT, NatsServer, free_port};

/// A start that cannot succeed says so within this.
const REFUSAL_DEADLINE: Duration = Duration::from_secs(12);
/// The budget of an embedded start is 0.3 s for a release build alone on the machine; this is a
/// debug build beside other tests.
const EMBEDDED_READY_MAX: Duration = Duration::from_secs(3);

fn refused(finished: Finished, code: i32, texts: &[&str]) {
    let finished = finished.code(code);
    for text in texts {
        assert!(
            finished.stderr.contains(text),
            "no {text:?} in {finished:#?}"
        );
    }
    assert!(finished.took < REFUSAL_DEADLINE, "{finished:#?}");
}

#[tokio::test]
async fn an_embedded_node_is_one_process_and_ready_at_once() {
    let mut node = NodeSpec::embedded().spawn();
    node.wait_ready().await;
    let took = node.began().elapsed();
    println!("ready after {took:?}");
    assert!(took < EMBEDDED_READY_MAX, "{took:?}");
    let processes = node.spec().processes();
    assert_eq!(processes.len(), 1, "{processes:#?}");
    let mode = std::fs::metadata(node.spec().data_dir())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o700, "what people said is their own");
    node.wait_workers("its workers", Duration::from_secs(5), |workers| {
        workers.len() > 8 && workers.iter().all(|worker| worker.pid == node.pid())
    })
    .await;
    let log = node.log();
    for line in ["bus: embedded", "harness: http", "authentication: on"] {
        assert!(log.contains(line), "no {line:?} in {log}");
    }
    node.stop_cleanly().await;
}

#[tokio::test]
async fn what_an_embedded_node_confirmed_survives_a_kill() {
    let node = Node::embedded().await;
    let mut secrets = SecretClient::new(node.grpc("secret"));
    let put = PutRequest {
        name: "key".into(),
        value: b"of the cellar".to_vec(),
        ..Default::default()
    };
    let version = secrets.put(put).await.unwrap().into_inner().version;
    let token = node.token();
    let node = node.kill9().await.start().await;
    assert_eq!(node.token(), token);
    let mut secrets = SecretClient::new(node.grpc("secret"));
    let got = secrets
        .get(GetRequest {
            name: "key".into(),
            ..Default::default()
        })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (got.value.as_slice(), got.version),
        (&b"of the cellar"[..], version)
    );
    node.stop_cleanly().await;
}

#[tokio::test]
async fn a_second_daemon_on_the_same_directory_is_refused() {
    let node = Node::embedded().await;
    let pid = format!("pid {}", node.pid());
    let second = node.spec().run(&[]).await;
    refused(
        second,
        1,
        &["in use by another vlinderd", &pid, "--data-dir"],
    );
    // The first goes on, and can still be found.
    assert_eq!(node.get("/readyz").await.unwrap().0, 200);
    node.stop_cleanly().await;
}

#[tokio::test]
async fn a_second_daemon_on_the_same_ports_is_refused() {
    let nats = NatsServer::start(CURRENT).await;
    let first = NodeSpec::on(&nats).fixed_ports().start().await;
    for face in ["http", "registry", "state"] {
        let address = first.address(face);
        let port = address.rsplit_once(':').unwrap().1;
        let variable = format!("VLINDER_DISTRIBUTED_PORTS_{}", face.to_uppercase());
        let second = NodeSpec::embedded().var(&variable, port);
        let holder = format!("(pid {})", first.pid());
        refused(second.run(&[]).await, 1, &[port, &holder, &variable]);
        assert!(second.processes().is_empty());
    }
    assert_eq!(first.get("/readyz").await.unwrap().0, 200);
    first.stop_cleanly().await;
}

#[tokio::test]
async fn without_nats_the_start_ends_with_the_address() {
    let port = free_port();
    let url = format!("nats://127.0.0.1:{port}");
    let node = NodeSpec::embedded().var("VLINDER_QUEUE_NATS_URL", &url);
    refused(
        node.run(&[]).await,
        3,
        &[&format!("127.0.0.1:{port}"), "doctor"],
    );
}

#[tokio::test]
async fn a_nats_that_accepts_and_says_nothing_ends_the_start_too() {
    let mute = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("nats://{}", mute.local_addr().unwrap());
    let node = NodeSpec::embedded().var("VLINDER_QUEUE_NATS_URL", &url);
    let address = mute.local_addr().unwrap().to_string();
    refused(node.run(&[]).await, 3, &[&address]);
}

#[tokio::test]
async fn without_jetstream_the_start_ends_with_the_reason() {
    let nats = NatsServer::start_core(CURRENT).await;
    let node = NodeSpec::on(&nats);
    refused(node.run(&[]).await, 3, &["JetStream"]);
}

#[tokio::test]
async fn detached_it_returns_once_ready() {
    let spec = NodeSpec::embedded();
    let began = Instant::now();
    let finished = spec.run(&["--detach"]).await.code(0);
    println!("returned after {:?}", began.elapsed());
    let pid = finished
        .stdout
        .split("pid ")
        .nth(1)
        .and_then(|rest| rest.split(')').next());
    let pid: u32 = pid
        .and_then(|pid| pid.parse().ok())
        .unwrap_or_else(|| panic!("{finished:?}"));
    assert!(proc::lives(pid), "{finished:?}");
    // Its own session: a closed terminal does not end it.
    let session = rustix::process::getsid(rustix::process::Pid::from_raw(pid as i32)).unwrap();
    assert_eq!(session.as_raw_nonzero().get() as u32, pid);
    let second = spec.run(&["--detach"]).await;
    refused(
        second,
        1,
        &["in use by another vlinderd", &format!("pid {pid}")],
    );
    proc::send(pid, Signal::TERM);
    wait_for(
        "the detached daemon ends",
        Duration::from_secs(10),
        async || spec.processes(),
        |left| left.is_empty(),
    )
    .await;
}

#[tokio::test]
async fn detached_a_failed_start_gives_its_exit_code() {
    let port = free_port();
    let url = format!("nats://127.0.0.1:{port}");
    let node = NodeSpec::embedded().var("VLINDER_QUEUE_NATS_URL", &url);
    let finished = node.run(&["--detach"]).await;
    refused(finished, 3, &[&format!("127.0.0.1:{port}")]);
    let wrong = NodeSpec::embedded().config("[queue]\nbackend = \"natz\"\n");
    refused(wrong.run(&["--detach"]).await, 2, &["natz"]);
    assert!(node.processes().is_empty() && wrong.processes().is_empty());
}
