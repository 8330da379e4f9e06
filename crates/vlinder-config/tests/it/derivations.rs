//! What follows from what.

use vlinder_config::{QueueBackend, Service, StateBackend};
use vlinder_core::WorkerRole;

use crate::Home;

#[test]
fn nothing_configured_is_embedded() {
    let home = Home::new();
    let loaded = home.loaded();
    let config = &loaded.config;
    assert!(config.is_embedded());
    assert_eq!(config.state.backend, StateBackend::Local);
    assert_eq!(config.node.name.as_str(), "this.example.org");
    assert_eq!(loaded.data_dir, home.data_dir());
    assert_eq!(loaded.config_file, None);
    assert_eq!(loaded.warnings, [] as [&str; 0]);
    assert_eq!(config.auth.token, None);
    for role in WorkerRole::ALL {
        let off = [
            WorkerRole::AgentLambda,
            WorkerRole::InferenceOpenrouter,
            WorkerRole::InferenceOpenai,
            WorkerRole::InferenceAnthropic,
            WorkerRole::InferenceLocal,
        ];
        assert_eq!(
            config.workers.count(role),
            u32::from(!off.contains(&role)),
            "{role}"
        );
    }
    for service in Service::ALL {
        let port = service.default_port();
        assert_eq!(config.distributed.ports.of(service), port);
        let url = format!("http://127.0.0.1:{port}/");
        assert_eq!(config.distributed.addresses(service)[0].as_str(), url);
    }
    assert_eq!(
        (
            config.distributed.ports.http,
            config.distributed.ports.bridge
        ),
        (7777, 3544)
    );
}

#[test]
fn a_nats_url_alone_means_nats() {
    let loaded = Home::new()
        .var("VLINDER_QUEUE_NATS_URL", "nats://a:1,nats://b")
        .loaded();
    let config = &loaded.config;
    assert_eq!(config.queue.backend, QueueBackend::Nats);
    assert_eq!(config.state.backend, StateBackend::Grpc);
    assert_eq!(config.workers.count(WorkerRole::AgentProcess), 0);
    let urls: Vec<_> = config
        .queue
        .nats_url
        .iter()
        .map(|url| url.expose())
        .collect();
    assert_eq!(urls, ["nats://a:1", "nats://b:4222"]);
    assert_eq!(
        loaded.origin("queue.backend").unwrap().to_string(),
        "derived from queue.nats_url"
    );

    let stays = Home::new()
        .config("[queue]\nbackend = \"local\"\nnats_url = \"nats://a\"\n")
        .loaded();
    assert!(stays.config.is_embedded());
    assert_eq!(
        stays.warnings,
        ["queue.nats_url: has no effect with queue.backend \"local\""]
    );
}

#[test]
fn the_gpu_node_of_the_manual() {
    let home = [
        ("QUEUE_NATS_URL", "nats://hub:4222"),
        ("DISTRIBUTED_REGISTRY_ADDR", "http://hub:9090"),
        ("AUTH_TOKEN", "0123456789abcdef0123"),
        ("WORKERS_REGISTRY", "0"),
        ("WORKERS_HARNESS", "0"),
        ("WORKERS_AGENT_CONTAINER", "0"),
        ("WORKERS_DAG_GIT", "0"),
        ("WORKERS_SESSION_VIEWER", "0"),
        ("WORKERS_STORAGE_OBJECT_SQLITE", "0"),
        ("WORKERS_STORAGE_VECTOR_SQLITE", "0"),
        ("WORKERS_INFERENCE_OLLAMA", "4"),
    ]
    .iter()
    .fold(Home::new(), |home, (name, value)| {
        home.var(&format!("VLINDER_{name}"), value)
    });
    let loaded = home.loaded();
    assert_eq!(loaded.warnings, [] as [&str; 0]);
    let config = loaded.config;
    let running: Vec<_> = config
        .workers
        .iter()
        .filter(|(_, count)| *count > 0)
        .collect();
    assert_eq!(running, [(WorkerRole::InferenceOllama, 4)]);
    assert_eq!(
        config.distributed.harness_addr[0].as_str(),
        "http://hub:9091/"
    );
    assert_eq!(config.distributed.ports.registry, 9090);
    assert_eq!(config.auth.token.unwrap().expose(), "0123456789abcdef0123");
}

/// What a file below `[distributed]` says about the harness: where to connect, where to listen.
fn check(distributed: &str, addresses: &str, port: u16) {
    let text = format!("auth.token = \"0123456789abcdef\"\n[distributed]\n{distributed}");
    let config = Home::new().config(&text).loaded().config;
    let found: Vec<_> = config
        .distributed
        .harness_addr
        .iter()
        .map(|url| url.as_str())
        .collect();
    assert_eq!(found.join(","), addresses, "{distributed}");
    assert_eq!(config.distributed.ports.harness, port, "{distributed}");
}

#[test]
fn addresses_and_ports() {
    let own = "http://127.0.0.1:9091/";
    for (distributed, addresses, port) in [
        ("", own, 9091),
        // A registry elsewhere lends its host; ports stay the usual ones.
        ("registry_addr = 'http://hub:1'", "http://hub:9091/", 9091),
        (
            "registry_addr = 'https://a,https://b:2'",
            "https://a:9091/,https://b:9091/",
            9091,
        ),
        (
            "registry_addr = 'http://[::1]:1'",
            "http://[::1]:9091/",
            9091,
        ),
        // Named itself, it is as named.
        (
            "registry_addr = 'http://hub:1'\nharness_addr = 'http://x:5'",
            "http://x:5/",
            9091,
        ),
        // Ports follow addresses of this node, by whatever name.
        (
            "harness_addr = 'http://localhost:5'",
            "http://localhost:5/",
            5,
        ),
        (
            "harness_addr = 'http://this.example.org:5'",
            "http://this.example.org:5/",
            5,
        ),
        ("harness_addr = 'http://THIS:5'", "http://this:5/", 5),
        (
            "harness_addr = 'http://x:5,http://127.0.0.1:6'",
            "http://x:5/,http://127.0.0.1:6/",
            6,
        ),
        // Listen elsewhere than where to connect.
        (
            "harness_addr = 'http://localhost:5'\nports.harness = 6",
            "http://localhost:5/",
            6,
        ),
        // A port alone moves the own address along, an address elsewhere not.
        ("ports.harness = 6", "http://127.0.0.1:6/", 6),
        ("ports.harness = 0", "http://127.0.0.1:0/", 0),
        (
            "registry_addr = 'http://hub:1'\nports.harness = 6",
            "http://hub:9091/",
            6,
        ),
        (
            "registry_addr = 'http://localhost:1'\nports.harness = 6",
            "http://localhost:6/",
            6,
        ),
        // A node that listens on one address only is found there.
        ("bind = '0.0.0.0'", own, 9091),
        ("bind = '::'", "http://[::1]:9091/", 9091),
        ("bind = '10.1.2.3'", "http://10.1.2.3:9091/", 9091),
        (
            "bind = '10.1.2.3'\nharness_addr = 'http://10.1.2.3:5'",
            "http://10.1.2.3:5/",
            5,
        ),
    ] {
        check(distributed, addresses, port);
    }
}

#[test]
fn services_follow_the_registry() {
    let counts = |config: &str| {
        let config = Home::new().config(config).loaded().config;
        [
            WorkerRole::Infra,
            WorkerRole::State,
            WorkerRole::Secret,
            WorkerRole::Catalog,
        ]
        .map(|role| config.workers.count(role))
    };
    assert_eq!(counts(""), [1, 1, 1, 1]);
    assert_eq!(counts("distributed.workers.registry = 0"), [0, 0, 0, 0]);
    assert_eq!(counts("distributed.workers.registry = 2"), [2, 2, 2, 2]);
    assert_eq!(
        counts("distributed.workers = { registry = 2, state = 1 }"),
        [2, 1, 2, 2]
    );
}

#[test]
fn paths_and_secrets_expand() {
    let home = Home::new()
        .var("KEY", "sk-1")
        .file("key", "sk-2\n")
        .config(
            "[queue]\nbackend = \"nats\"\nnats_creds = \"~/c\"\n\
             [openrouter]\napi_key = \"${KEY}\"\n[openai]\napi_key = { file = \"key\" }\n\
             [local]\nmodel = \"models/${KEY}.gguf\"\n",
        )
        .var("VLINDER_LOCAL_EMBEDDING_MODEL", "e.gguf");
    let config = home.loaded().config;
    assert_eq!(config.queue.nats_creds, Some(home.dir.path().join("c")));
    assert_eq!(config.openrouter.api_key.unwrap().expose(), "sk-1");
    assert_eq!(config.openai.api_key.unwrap().expose(), "sk-2");
    // Beside the file that names it; in the working directory for a variable.
    assert_eq!(
        config.local.model,
        Some(home.data_dir().join("models/sk-1.gguf"))
    );
    assert_eq!(
        config.local.embedding_model,
        Some(home.dir.path().join("e.gguf"))
    );
}

#[test]
fn host_names_that_are_no_node_names() {
    let name = |host: &str| {
        let env = vlinder_config::Env::bare("/nonexistent", host);
        vlinder_config::load(&vlinder_config::Sources::new(&env))
            .unwrap()
            .config
            .node
            .name
    };
    assert_eq!(name("ünï/x").as_str(), "-n--x");
    assert_eq!(name("").as_str(), "node");
    assert_eq!(name(&"a".repeat(300)).as_str().len(), 63);
}

#[test]
fn the_data_directory() {
    let here = Home::new().var("VLINDER_DIR", "~/d");
    assert_eq!(here.loaded().data_dir, here.dir.path().join("d"));
    let relative = Home::new().var("VLINDER_DIR", "d");
    assert_eq!(relative.loaded().data_dir, relative.dir.path().join("d"));
    let flag = std::path::Path::new("/flag");
    assert_eq!(
        vlinder_config::data_dir(&here.env, Some(flag)).unwrap(),
        flag
    );
}

#[test]
fn what_has_no_effect_is_said() {
    for (config, key) in [
        (
            "distributed.registry_addr = \"http://hub:9090\"",
            "distributed.registry_addr",
        ),
        ("queue.replicas = 3", "queue.replicas"),
        (
            "supervisor.memory_limit = \"64MiB\"",
            "supervisor.memory_limit",
        ),
        (
            "queue.nats_creds = \"/c\"\nqueue.backend = \"local\"",
            "queue.nats_creds",
        ),
        ("auth.token = \"short\"", "auth.token"),
    ] {
        let warnings = Home::new().config(config).loaded().warnings;
        assert_eq!(warnings.len(), 1, "{config}: {warnings:?}");
        assert!(warnings[0].starts_with(key), "{warnings:?}");
    }
    let own = "distributed.registry_addr = \"http://localhost:9190\"";
    assert_eq!(Home::new().config(own).loaded().warnings, [] as [&str; 0]);
}

#[test]
fn the_environment_of_this_process_loads() {
    // Whatever machine this runs on: real variables, home and host name are no mistake.
    let env = vlinder_config::Env::from_process();
    let dir = tempfile::tempdir().unwrap();
    let data_dir = Some(dir.path().to_owned());
    let sources = vlinder_config::Sources {
        data_dir,
        ..vlinder_config::Sources::new(&env)
    };
    let loaded = vlinder_config::load(&sources).unwrap();
    assert_eq!(loaded.data_dir, dir.path());
}
