//! The configuration as the binary shows and refuses it (features A2). The rules themselves have
//! their tests in `vlinder-config`.

use crate::support::NodeSpec;

/// Ten mistakes, each of another kind, with the key and the value that its message must repeat.
const TEN_MISTAKES: &str = r#"[queue]
backend = "natz"
natsurl = "nats://hub:4222"
replicas = "3"
max_bytes = "ten"
[distributed]
registry_addr = "hub:9090"
bind = "everywhere"
[distributed.workers]
registry = 65
[ollama]
endpoint = "localhost:11434"
[supervisor]
drain_deadline = 20
[loging]
level = "info"
"#;
const THEIR_MESSAGES: [[&str; 2]; 10] = [
    ["queue.backend", "natz"],
    ["queue.natsurl", "queue.nats_url"],
    ["queue.replicas", "\"3\""],
    ["queue.max_bytes", "ten"],
    ["distributed.registry_addr", "hub:9090"],
    ["distributed.bind", "everywhere"],
    ["distributed.workers.registry", "65"],
    ["ollama.endpoint", "localhost:11434"],
    ["supervisor.drain_deadline", "20"],
    ["loging", "logging"],
];

#[tokio::test]
async fn ten_mistakes_give_ten_messages_and_nothing_starts() {
    let node = NodeSpec::embedded().config(TEN_MISTAKES);
    for args in [
        &[][..],
        &["--check"],
        &["config", "check"],
        &["config", "show"],
        &["doctor"],
    ] {
        let finished = node.run(args).await.code(2).says("10 mistakes");
        let messages: Vec<&str> = finished.stderr.lines().collect();
        assert_eq!(messages.len(), 11, "{args:?}: {finished:#?}");
        for (number, (message, texts)) in messages.iter().zip(THEIR_MESSAGES).enumerate() {
            assert!(
                message.contains("config.toml:"),
                "message {number} names no line: {message}"
            );
            for text in texts {
                assert!(
                    message.contains(text),
                    "message {number} lacks {text:?}: {message}"
                );
            }
        }
        assert!(finished.stdout.is_empty(), "{args:?}: {finished:#?}");
    }
    assert!(
        !node.data_dir().join("run").exists(),
        "something was started"
    );
}

#[tokio::test]
async fn a_file_to_check_may_be_named() {
    let node = NodeSpec::embedded();
    let (bad, good) = (node.home().join("bad.toml"), node.home().join("good.toml"));
    std::fs::write(&bad, TEN_MISTAKES).unwrap();
    std::fs::write(&good, "[ollama]\nendpoint = \"http://gpu:11434\"\n").unwrap();
    let (bad, good) = (bad.display().to_string(), good.display().to_string());
    node.run(&["config", "check", &bad])
        .await
        .code(2)
        .says("bad.toml:2: queue.backend");
    node.run(&["--config", &bad])
        .await
        .code(2)
        .says("10 mistakes");
    let finished = node.run(&["config", "check", &good]).await.code(0);
    assert!(finished.stdout.contains("good.toml"), "{finished:#?}");
    node.run(&["config", "check", "/no/such.toml"])
        .await
        .code(2)
        .says("/no/such.toml");
    node.run(&["--config", "/no/such.toml"])
        .await
        .code(2)
        .says("--config");
}

#[tokio::test]
async fn an_unknown_variable_is_refused_with_a_near_match() {
    let node = NodeSpec::embedded().var("VLINDER_QUEUE_NATSURL", "nats://x:4222");
    let finished = node.run(&[]).await.code(2);
    finished
        .says("VLINDER_QUEUE_NATSURL")
        .says("did you mean VLINDER_QUEUE_NATS_URL?");
}

#[tokio::test]
async fn both_spellings_of_a_count_may_agree_but_not_differ() {
    let node = NodeSpec::embedded().var("VLINDER_WORKERS_HARNESS", 2);
    let same = node.clone().var("VLINDER_DISTRIBUTED_WORKERS_HARNESS", 2);
    same.run(&["--check"]).await.code(0);
    let other = node.var("VLINDER_DISTRIBUTED_WORKERS_HARNESS", 1);
    other
        .run(&["--check"])
        .await
        .code(2)
        .says("VLINDER_WORKERS_HARNESS");
}

#[tokio::test]
async fn the_origin_of_each_value_is_named() {
    let node = NodeSpec::embedded()
        .config("[queue]\nreplicas = 3\nmax_bytes = \"1GiB\"\n")
        .var("VLINDER_QUEUE_MAX_BYTES", "2GiB")
        .var("VLINDER_QUEUE_NATS_URL", "nats://hub:4222")
        .var("VLINDER_DISTRIBUTED_REGISTRY_ADDR", "http://hub:9090")
        .var("VLINDER_AUTH_TOKEN", "a-token-that-nobody-may-see");
    let finished = node.run(&["config", "show", "--origin"]).await.code(0);
    let line = |key: &str| {
        let own = |line: &&str| line.trim_start().starts_with(&format!("{key} ="));
        let found = finished.stdout.lines().find(own);
        found
            .unwrap_or_else(|| panic!("no {key} in {}", finished.stdout))
            .to_owned()
    };
    assert!(
        line("replicas").contains("config.toml:2"),
        "{}",
        line("replicas")
    );
    assert!(line("max_bytes").contains("2GiB"), "{}", line("max_bytes"));
    assert!(line("max_bytes").contains("environment VLINDER_QUEUE_MAX_BYTES"));
    // Following from another key: the queue from its address, four addresses from the fifth.
    assert!(line("backend").contains("nats"), "{}", line("backend"));
    assert!(
        line("harness_addr").contains("http://hub:9091"),
        "{}",
        line("harness_addr")
    );
    assert!(
        line("harness_addr").contains("registry_addr"),
        "{}",
        line("harness_addr")
    );
    assert!(line("sync").contains("default"), "{}", line("sync"));
    assert!(!finished.stdout.contains("nobody-may-see"), "{finished:#?}");

    let json = node
        .run(&["config", "show", "--origin", "-o", "json"])
        .await
        .code(0);
    assert!(json.json().is_object(), "{json:#?}");
    assert!(!json.stdout.contains("nobody-may-see"), "{json:#?}");
    let plain = node.run(&["config", "show"]).await.code(0).stdout;
    // What is shown can be read again.
    let table: toml::Table = plain.parse().unwrap();
    assert_eq!(table["queue"]["replicas"].as_integer(), Some(3), "{plain}");
}

#[tokio::test]
async fn the_schema_is_a_schema() {
    let node = NodeSpec::embedded();
    let schema = node.run(&["config", "schema"]).await.code(0).json();
    assert!(schema["$schema"].is_string(), "{schema}");
    let queue = &schema["properties"]["queue"]["properties"];
    assert!(queue["nats_url"].is_object(), "{schema:#}");
}

#[tokio::test]
async fn usage() {
    let node = NodeSpec::embedded();
    let help = node.run(&["--help"]).await.code(0);
    for word in [
        "--config",
        "--data-dir",
        "--check",
        "--detach",
        "doctor",
        "config",
    ] {
        assert!(help.stdout.contains(word), "no {word} in {}", help.stdout);
    }
    assert!(
        node.run(&["version"])
            .await
            .code(0)
            .stdout
            .starts_with("vlinderd ")
    );
    node.run(&["--no-such-flag"])
        .await
        .code(2)
        .says("--no-such-flag");
    node.run(&["no-such-command"])
        .await
        .code(2)
        .says("no-such-command");
    node.run(&["config", "show", "-o", "yaml"])
        .await
        .code(2)
        .says("yaml");
    // Not for people, but no panic either.
    let worker = std::process::Command::new(crate::support::bins::vlinderd())
        .arg("worker")
        .output();
    let worker = worker.unwrap();
    assert!(!worker.status.success());
    let stderr = String::from_utf8_lossy(&worker.stderr);
    assert!(stderr.contains("started by vlinderd only"), "{stderr}");
}

#[tokio::test]
async fn listening_beyond_loopback_needs_a_token() {
    for bind in ["0.0.0.0", "::", "192.0.2.1"] {
        let node = NodeSpec::embedded().var("VLINDER_DISTRIBUTED_BIND", bind);
        node.run(&[]).await.code(2).says("auth.token");
        node.var("VLINDER_AUTH_TOKEN", "short")
            .run(&[])
            .await
            .code(2)
            .says("auth.token");
    }
    let node = NodeSpec::embedded()
        .var("VLINDER_DISTRIBUTED_BIND", "0.0.0.0")
        .var("VLINDER_AUTH_TOKEN", "long-enough-for-a-token");
    let node = node.start().await;
    assert!(!node.spec().data_dir().join("run").join("token").exists());
    node.stop_cleanly().await;
}

#[tokio::test]
async fn a_data_directory_that_cannot_be_is_an_error_not_a_panic() {
    let node = NodeSpec::embedded();
    std::fs::write(node.data_dir(), "a file").unwrap();
    let finished = node.run(&[]).await.code(2);
    finished
        .says(&node.data_dir().display().to_string())
        .says("Not a directory");
}
