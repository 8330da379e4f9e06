//! What only NATS can do to us: servers that are not fit, answers lost on the wire, restored stores.

use crate::fixture::{CONNECT_WAIT, LOG_BYTES, nats_options};
use crate::support::*;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use vlinder_bus::backend::{Backend, Verdict};
use vlinder_bus::nats::{NatsBus, NatsOptions, connect, probe};
use vlinder_bus::streams::BUCKET_NODES;
use vlinder_bus::{Bus, Error, KvEvent};
use vlinder_testkit::{CURRENT, NatsServer, OLDEST, TcpProxy, free_port};

const WORK: &str = "vlinder.v1.default.req.kv.local._";
const ALL: &str = "vlinder.v1.default.>";

fn options(url: String) -> NatsOptions {
    nats_options(vec![url], LOG_BYTES, 1)
}

async fn connected(url: String) -> Arc<dyn Backend> {
    let bus = connect(options(url), CONNECT_WAIT).await.unwrap();
    let backend: Arc<dyn Backend> = bus;
    prepare(&backend).await;
    backend
}

async fn refusal(options: NatsOptions, deadline: Duration) -> Error {
    let refused = within(PATIENCE, connect(options, deadline)).await;
    refused.err().expect("it must be refused")
}

/// A server that greets with that version and then answers nothing but pings.
async fn greeting(info: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("nats://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                client.write_all(info.as_bytes()).await?;
                let mut buffer = [0; 4096];
                while client.read(&mut buffer).await? > 0 {
                    client.write_all(b"PONG\r\n").await?;
                }
                std::io::Result::Ok(())
            });
        }
    });
    url
}

#[tokio::test]
async fn a_current_server_is_taken_and_described() {
    for (version, level) in [(OLDEST, 1), (CURRENT, 3)] {
        let server = NatsServer::start(version).await;
        let bus = connect(options(server.url()), CONNECT_WAIT).await.unwrap();
        let probe = probe(&options(server.url())).await.unwrap();
        assert_eq!(bus.server().version, version);
        assert_eq!((probe.version.as_str(), probe.cluster), (version, None));
        assert!(probe.api_level >= level, "{}", probe.api_level);
        assert_eq!(probe.warning.is_some(), version == OLDEST);
        assert!(*bus.connected().borrow());
        bus.close().await;
        let after = bus.append(&log(), &raw(WORK, "x")).await.unwrap_err();
        assert!(matches!(after, Error::Closed), "{after}");
    }
}

#[tokio::test]
async fn an_old_server_is_refused_at_once() {
    let url = greeting(
        "INFO {\"server_id\":\"x\",\"version\":\"2.9.10\",\"jetstream\":true,\"headers\":true,\"max_payload\":1048576}\r\n",
    )
    .await;
    let started = Instant::now();
    let error = refusal(options(url), PATIENCE).await;
    assert!(matches!(error, Error::Unfit { .. }), "{error}");
    let said = error.to_string();
    assert!(said.contains("2.9.10") && said.contains("2.11"), "{said}");
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn what_is_no_nats_is_unreachable() {
    for greeted in [
        "HTTP/1.1 400 Bad Request\r\n\r\n",
        "INFO not json\r\n",
        "-ERR 'no'\r\n",
        "",
    ] {
        let url = greeting(greeted).await;
        let error = refusal(options(url), Duration::from_millis(500)).await;
        assert!(
            matches!(error, Error::Unreachable { .. }),
            "{greeted:?}: {error}"
        );
    }
    let url = greeting("INFO {\"version\":\"banana\",\"max_payload\":10}\r\n").await;
    let error = refusal(options(url), Duration::from_millis(500)).await;
    assert!(matches!(error, Error::Unfit { .. }), "{error}");
}

#[tokio::test]
async fn a_missing_server_is_named_after_the_deadline() {
    let port = free_port();
    let mut options = options(format!("nats://user:secret@127.0.0.1:{port}"));
    options.token = Some("very-secret".to_owned());
    let started = Instant::now();
    let error = refusal(options, Duration::from_millis(700)).await;
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains(&port.to_string()));
    assert!(!error.to_string().contains("secret"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(3));
}

#[tokio::test]
async fn connecting_waits_for_a_server_that_is_being_started() {
    let mut server = NatsServer::start(CURRENT).await;
    server.kill().await;
    let connecting = connect(options(server.url()), PATIENCE);
    let starting = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        server.restart().await;
    };
    let (connected, ()) = tokio::join!(connecting, starting);
    connected.unwrap().ping().await.unwrap();
}

#[tokio::test]
async fn a_server_without_jetstream_is_refused() {
    let server = NatsServer::start_core(CURRENT).await;
    let error = refusal(options(server.url()), PATIENCE).await;
    assert!(matches!(error, Error::Unfit { .. }), "{error}");
    assert!(error.to_string().contains("JetStream"), "{error}");
}

#[tokio::test]
async fn credentials_decide() {
    let server = NatsServer::start_with(CURRENT, "authorization { token: \"s3cret\" }").await;
    let error = refusal(options(server.url()), PATIENCE).await;
    assert!(matches!(error, Error::Unfit { .. }), "{error}");
    let with = |token: &str| NatsOptions {
        token: Some(token.to_owned()),
        ..options(server.url())
    };
    let error = refusal(with("wrong"), PATIENCE).await;
    assert!(matches!(error, Error::Unfit { .. }), "{error}");
    assert!(!error.to_string().contains("wrong"), "{error}");
    connect(with("s3cret"), PATIENCE).await.unwrap();
    let missing_file = NatsOptions {
        creds: Some("/no/such/file.creds".into()),
        ..options(server.url())
    };
    let error = refusal(missing_file, PATIENCE).await;
    assert!(error.to_string().contains("/no/such/file.creds"), "{error}");
}

#[tokio::test]
async fn an_nkey_opens() {
    // Made for this test and for nothing else.
    const PUBLIC: &str = "UBF7GFPIFBSPXMXZNCDZEWQ5RPWQUG5KNAOLA4QSZGOTN5LTVXQXRS3X";
    const SEED: &str = "SUAPL37GT2ZHGKR2KQF46DDDB7B3VIVJDHVXVVEKLOZ2TIANTPRCJD2HHY";
    let users = format!("authorization {{ users: [{{ nkey: {PUBLIC} }}] }}");
    let server = NatsServer::start_with(CURRENT, &users).await;
    let with = |seed: &str| NatsOptions {
        nkey: Some(seed.to_owned()),
        ..options(server.url())
    };
    connect(with(SEED), PATIENCE).await.unwrap();
    for bad in ["", "SUA", "not a seed"] {
        let error = refusal(with(bad), PATIENCE).await;
        assert!(matches!(error, Error::Unfit { .. }), "{bad}: {error}");
    }
}

#[tokio::test]
async fn tls_with_certificates_on_both_sides() {
    let file = |name: &str| {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/contract/tls")
            .join(name)
    };
    let tls = format!(
        "tls {{ cert_file: {:?}, key_file: {:?}, ca_file: {:?}, verify: true }}",
        file("server.pem"),
        file("server.key"),
        file("ca.pem")
    );
    let server = NatsServer::start_with(CURRENT, &tls).await;
    let url = format!("tls://127.0.0.1:{}", server.port());
    let complete = NatsOptions {
        ca: Some(file("ca.pem")),
        cert: Some(file("client.pem")),
        key: Some(file("client.key")),
        ..options(url.clone())
    };
    connect(complete.clone(), PATIENCE)
        .await
        .unwrap()
        .ping()
        .await
        .unwrap();
    let no_certificate = NatsOptions {
        cert: None,
        key: None,
        ..complete.clone()
    };
    let unknown_authority = NatsOptions {
        ca: None,
        ..complete.clone()
    };
    let missing_file = NatsOptions {
        ca: Some(file("nothing.pem")),
        ..complete
    };
    for refused in [no_certificate, unknown_authority, missing_file] {
        let error = refusal(refused, Duration::from_millis(700)).await;
        assert!(matches!(error, Error::Unreachable { .. }), "{error}");
        println!("{error}");
    }
}

/// While there is no connection, what may be lost fails at once and nothing piles up.
#[tokio::test]
async fn without_a_connection_nothing_piles_up() {
    let mut server = NatsServer::start(CURRENT).await;
    let backend = connected(server.url()).await;
    let mut puller = pulling(&backend, &queue("q", WORK)).await;
    append(&backend, WORK, "job").await;
    let held = one(&mut puller).await;
    server.kill().await;
    eventually(
        "noticed",
        async || backend.ping().await.is_err(),
        |failed| *failed,
    )
    .await;
    let started = Instant::now();
    for _ in 0..5000 {
        let _ = backend.signal("sig.v1.default.x", "lost".into()).await;
        let _ = backend.verdict(&held.token, Verdict::Progress).await;
    }
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "{:?}",
        started.elapsed()
    );
    // A puller that waits goes on waiting, and can be stopped.
    silence(Duration::from_millis(300), puller.next(1)).await;
    within(AT_ONCE, puller.stop()).await;
    let error = backend.append(&log(), &raw(WORK, "x")).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    within(Duration::from_secs(3), backend.close()).await;
}

#[tokio::test]
async fn replicas_need_a_cluster() {
    let server = NatsServer::start(CURRENT).await;
    let options = nats_options(vec![server.url()], LOG_BYTES, 3);
    let bus = connect(options, PATIENCE).await.unwrap();
    let error = bus.ensure_stream(&log()).await.unwrap_err();
    assert!(matches!(error, Error::Unfit { .. }), "{error}");
    assert!(error.to_string().contains("queue.replicas"), "{error}");
}

#[tokio::test]
async fn a_reservation_beyond_the_server_is_explained() {
    let server = NatsServer::start(CURRENT).await;
    let options = nats_options(vec![server.url()], 1 << 50, 1);
    let bus = connect(options, PATIENCE).await.unwrap();
    let error = bus.ensure_stream(&log()).await.unwrap_err();
    assert!(matches!(error, Error::Unfit { .. }), "{error}");
    assert!(error.to_string().contains("queue.max_bytes"), "{error}");
}

/// The answer to an append is lost on the wire: the message is stored, the retry finds that out.
#[tokio::test]
async fn an_append_whose_answer_was_lost_is_a_success() {
    for version in [OLDEST, CURRENT] {
        let server = NatsServer::start(version).await;
        let proxy = TcpProxy::start(server.port()).await;
        let direct = connected(server.url()).await;
        let bus = Bus::new(connected(proxy.url()).await);
        let head = crate::dead::call_subject("turn");
        let mut last = 0;
        for round in 0..4 {
            proxy.lose_answers(true);
            let message = crate::dead::message(&head, &format!("round {round}")).expecting(last);
            let hash = message.node.hash();
            let appending = tokio::spawn({
                let bus = bus.clone();
                async move { bus.append(message).await }
            });
            let stored = eventually(
                "stored",
                async || direct.last(&log(), &head.to_string()).await.unwrap(),
                |stored| stored.as_ref().is_some_and(|stored| stored.seq > last),
            )
            .await
            .unwrap();
            if round % 2 == 0 {
                // Another message comes after ours before the retry: still our success.
                if round == 2 {
                    let other = crate::dead::message(&head, "later").expecting(stored.seq);
                    Bus::new(direct.clone()).append(other).await.unwrap();
                }
                proxy.cut();
            }
            // In the other rounds nothing is cut: the try times out and is repeated.
            proxy.lose_answers(false);
            if round % 2 == 1 {
                proxy.cut();
            }
            let done = within(PATIENCE, appending).await.unwrap().unwrap();
            assert_eq!(
                (done.seq, done.hash),
                (stored.seq, hash),
                "{version} round {round}"
            );
            last = direct
                .last(&log(), &head.to_string())
                .await
                .unwrap()
                .unwrap()
                .seq;
        }
        let all = bus.range(&log(), ALL, 1, 100).await.unwrap();
        assert_eq!(all.len(), 5, "four rounds and one message between");
    }
}

/// A wire that is silent but not cut is noticed by pings, and everything goes on over a new one.
#[tokio::test]
async fn a_silent_wire_is_replaced() {
    let server = NatsServer::start(CURRENT).await;
    let proxy = TcpProxy::start(server.port()).await;
    let direct = connected(server.url()).await;
    let bus = connect(options(proxy.url()), PATIENCE).await.unwrap();
    let backend: Arc<dyn Backend> = bus.clone();
    let mut follow = backend.follow(&log(), ALL, 1).await.unwrap();
    let mut puller = pulling(&backend, &queue("q", WORK)).await;
    silence(Duration::from_millis(100), puller.next(1)).await;
    proxy.hold_answers(true);
    append(&direct, WORK, "job").await;
    let mut up = bus.connected();
    within(PATIENCE, up.wait_for(|up| !up)).await.unwrap();
    proxy.hold_answers(false);
    proxy.cut();
    within(PATIENCE, up.wait_for(|up| *up)).await.unwrap();
    assert_eq!(text(&next(&mut follow).await.unwrap()), "job");
    let got = one(&mut puller).await;
    backend.verdict(&got.token, Verdict::Ack).await.unwrap();
}

/// Cuts at random moments: nothing is lost, nothing comes twice in the log.
#[tokio::test]
async fn a_wire_that_is_cut_again_and_again() {
    let server = NatsServer::start(CURRENT).await;
    let proxy = TcpProxy::start(server.port()).await;
    let direct = connected(server.url()).await;
    let backend = connected(proxy.url()).await;
    let mut follow = backend.follow(&log(), ALL, 1).await.unwrap();
    let mut watch = backend.kv_watch(BUCKET_NODES).await.unwrap();
    let cutting = async {
        for n in 0..15u64 {
            tokio::time::sleep(Duration::from_millis(20 + n * 37 % 150)).await;
            proxy.cut();
        }
    };
    let bus = Bus::new(backend.clone());
    let appending = async {
        for n in 0..1500 {
            let message = crate::dead::message(&crate::dead::call_subject("turn"), &n.to_string());
            bus.append(message).await.unwrap();
        }
    };
    tokio::join!(appending, cutting);
    let followed = take_followed(&mut follow, 1500).await;
    for (n, stored) in followed.iter().enumerate() {
        assert_eq!(
            (stored.seq, text(stored)),
            (n as u64 + 1, n.to_string().as_str())
        );
    }
    assert_eq!(direct.stream_info(&log()).await.unwrap().last_seq, 1500);
    // Deleted while nobody could tell: told as gone when the watch is back.
    direct
        .kv_put(BUCKET_NODES, "a", "1".into(), None)
        .await
        .unwrap();
    loop {
        if let KvEvent::Put(entry) = next(&mut watch).await.unwrap() {
            assert_eq!(entry.key, "a");
            break;
        }
    }
    proxy.refuse(true);
    proxy.cut();
    direct.kv_delete(BUCKET_NODES, "a", None).await.unwrap();
    proxy.refuse(false);
    loop {
        match next(&mut watch).await.unwrap() {
            KvEvent::Gone { key } => break assert_eq!(key, "a"),
            KvEvent::Current => {}
            KvEvent::Put(entry) => panic!("{entry:?}"),
        }
    }
}

/// A store restored from an older copy stands before its queues: 2.11 would skip new work in silence.
#[tokio::test]
async fn a_queue_past_the_end_of_a_restored_stream_is_made_again() {
    for version in [OLDEST, CURRENT] {
        let mut server = NatsServer::start(version).await;
        let backend = connected(server.url()).await;
        for n in 0..5 {
            append(&backend, WORK, &format!("old {n}")).await;
        }
        // The copy has the stream of then, and no queue.
        server.kill().await;
        let messages = server
            .store()
            .join("jetstream/$G/streams/VLINDER_LOG_default/msgs");
        let copy = tempfile::tempdir().unwrap();
        copy_files(&messages, copy.path());
        server.restart().await;
        let mut puller = pulling(&backend, &queue("q", WORK)).await;
        for n in 0..10 {
            retried(async || {
                backend
                    .append(&log(), &raw(WORK, &format!("lost {n}")))
                    .await
            })
            .await;
        }
        for _ in 0..15 {
            let got = one(&mut puller).await;
            backend.verdict(&got.token, Verdict::Ack).await.unwrap();
        }
        puller.stop().await;
        server.kill().await;
        std::fs::remove_dir_all(&messages).unwrap();
        std::fs::create_dir(&messages).unwrap();
        copy_files(copy.path(), &messages);
        server.restart().await;
        let info = retried(async || backend.stream_info(&log()).await).await;
        assert_eq!(info.last_seq, 5, "the surgery did not take");
        backend.ensure_queue(&queue("q", WORK)).await.unwrap();
        let done = append(&backend, WORK, "new").await;
        assert_eq!(done.seq, 6);
        let mut puller = self::puller(&backend, "q").await;
        loop {
            let got = one(&mut puller).await;
            backend.verdict(&got.token, Verdict::Ack).await.unwrap();
            if got.stored.seq == 6 {
                break;
            }
        }
    }
}

fn copy_files(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// A node that says nothing about the shape of the log takes it as it is.
#[tokio::test]
async fn defaults_change_no_log_that_exists() {
    let server = NatsServer::start(CURRENT).await;
    let first: Arc<NatsBus> = connect(options(server.url()), PATIENCE).await.unwrap();
    first.ensure_stream(&log()).await.unwrap();
    let joining = |keep| NatsOptions {
        keep_max_bytes: keep,
        keep_replicas: keep,
        ..nats_options(vec![server.url()], LOG_BYTES / 2, 1)
    };
    let joined = connect(joining(true), PATIENCE).await.unwrap();
    joined.ensure_stream(&log()).await.unwrap();
    let max_bytes = async || first.stream_info(&log()).await.unwrap().max_bytes;
    assert_eq!(max_bytes().await, LOG_BYTES);
    let told = connect(joining(false), PATIENCE).await.unwrap();
    told.ensure_stream(&log()).await.unwrap();
    assert_eq!(max_bytes().await, LOG_BYTES / 2);
}

/// Operators change streams; what is ours is put right, what is theirs stays.
#[tokio::test]
async fn limits_are_brought_up_to_date() {
    let server = NatsServer::start(CURRENT).await;
    let bus: Arc<NatsBus> = connect(options(server.url()), PATIENCE).await.unwrap();
    bus.ensure_stream(&log()).await.unwrap();
    let client = async_nats::connect(server.url()).await.unwrap();
    let context = async_nats::jetstream::new(client);
    let mut stream = context.get_stream("VLINDER_LOG_default").await.unwrap();
    let mut config = stream.info().await.unwrap().config.clone();
    assert!(config.max_consumers >= 10_000 && config.allow_direct);
    config.max_bytes = 12_345_678;
    config.description = Some("ours".to_owned());
    config.republish = None;
    context.update_stream(config).await.unwrap();
    bus.ensure_stream(&log()).await.unwrap();
    let config = stream.info().await.unwrap().config.clone();
    assert_eq!(config.max_bytes as u64, LOG_BYTES);
    assert_eq!(config.description.as_deref(), Some("ours"));
    let republish = config.republish.unwrap();
    assert_eq!(
        (republish.source.as_str(), republish.destination.as_str()),
        (ALL, "seen.v1.default.>")
    );
}
