//! Everything that is wrong is said at once, with place, key, value and expectation.

use vlinder_config::{Flag, Sources, load};
use vlinder_core::WorkerRole;

use crate::{Home, lines};

#[test]
fn ten_mistakes_in_one_file_give_ten_messages() {
    let home = Home::new().config(
        r#"[queue]
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
"#,
    );
    let config = "~/.vlinder/config.toml";
    let expected = [
        ":2: queue.backend = \"natz\": expected one of local, nats; did you mean nats?",
        ":3: queue.natsurl: is not a key; did you mean queue.nats_url?",
        ":4: queue.replicas = \"3\": expected a whole number from 1 to 5, without quotes",
        ":5: queue.max_bytes = \"ten\": expected a size such as \"10GiB\", at least 1MiB",
        ":7: distributed.registry_addr = \"hub:9090\": expected http://HOST:9090 (or https), without \
         path or credential, several separated by commas; did you mean http://hub:9090?",
        ":8: distributed.bind = \"everywhere\": expected an IP address such as 127.0.0.1 or 0.0.0.0",
        ":10: distributed.workers.registry = 65: expected a whole number from 0 to 64",
        ":12: ollama.endpoint = \"localhost:11434\": expected a URL such as \
         \"http://host:8000/v1\", without credential or query",
        ":14: supervisor.drain_deadline = 20: expected a duration with a unit such as \"30s\", \
         from 100ms to 1h (the unit is missing)",
        ":15: loging: is not a key; did you mean logging?",
    ];
    assert_eq!(
        home.mistakes(),
        expected.map(|rest| format!("{config}{rest}"))
    );
}

#[test]
fn mistakes_of_all_layers_come_together() {
    let home = Home::new()
        .config("x = 1\n")
        .file("run/live.toml", "[distributed.workers]\nharness = -1\n")
        .var("VLINDER_QUEU_NATS_URL", "nats://hub")
        .var("VLINDER_QUEUE_BAKEND", "nats")
        .var("VLINDER_QUEUE_REPLICAS", "")
        .var("VLINDER_WORKERS_HARNES", "1")
        .var("VLINDER_TEST_ANYTHING", "1")
        .var("VLINDER_BRIDGE_URL", "x");
    let flag = |key: &str| Flag {
        name: "--set".into(),
        key: key.into(),
        value: "x".into(),
    };
    let flags = vec![flag("queue.bakend"), flag("queue.sync")];
    let mistakes = load(&Sources {
        flags,
        ..Sources::new(&home.env)
    })
    .unwrap_err();
    assert_eq!(
        lines(&mistakes, home.dir.path()),
        [
            "~/.vlinder/config.toml:1: x: is not a key",
            "VLINDER_QUEUE_BAKEND: is not a variable of Vlinder; did you mean VLINDER_QUEUE_BACKEND?",
            "VLINDER_QUEUE_REPLICAS: queue.replicas = \"\": is empty; expected a whole number from \
             1 to 5, or leave it out",
            "VLINDER_QUEU_NATS_URL: is not a variable of Vlinder; did you mean VLINDER_QUEUE_NATS_URL?",
            "VLINDER_WORKERS_HARNES: is not a variable of Vlinder; did you mean \
             VLINDER_WORKERS_HARNESS?",
            "--set: queue.bakend: is not a key; did you mean queue.backend?",
            "--set: queue.sync = \"x\": expected one of interval, always",
            "~/.vlinder/run/live.toml:2: distributed.workers.harness = -1: expected a whole \
             number from 0 to 64",
        ]
    );
}

#[test]
fn two_spellings_must_agree() {
    let (short, long) = (
        "VLINDER_WORKERS_INFERENCE_OLLAMA",
        "VLINDER_DISTRIBUTED_WORKERS_INFERENCE_OLLAMA",
    );
    let loaded = Home::new().var(short, "3").var(long, "3").loaded();
    assert_eq!(loaded.config.workers.count(WorkerRole::InferenceOllama), 3);
    let mistakes = Home::new().var(short, "3").var(long, "4").mistakes();
    assert_eq!(mistakes.len(), 1, "{mistakes:?}");
    assert!(
        mistakes[0].contains(short) && mistakes[0].contains(long),
        "{mistakes:?}"
    );
    let ports = Home::new()
        .var("VLINDER_SESSION_PORT", "1")
        .var("VLINDER_DISTRIBUTED_PORTS_HTTP", "2")
        .mistakes();
    assert_eq!(ports.len(), 1, "{ports:?}");
}

/// One setup, one mistake: its start.
fn check(config: &str, start: &str) {
    let mistakes = Home::new().config(config).mistakes();
    assert_eq!(mistakes.len(), 1, "{config:?} gave {mistakes:#?}");
    let rest = mistakes[0]
        .strip_prefix("~/.vlinder/config.toml:")
        .unwrap_or(&mistakes[0]);
    assert!(rest.starts_with(start), "{config:?} gave {rest:?}");
}

#[test]
fn rules_across_keys() {
    let token = "auth.token = \"0123456789abcdef\"\n";
    for (config, start) in [
        (
            "distributed.bind = \"0.0.0.0\"",
            "1: distributed.bind = \"0.0.0.0\": to listen beyond",
        ),
        ("distributed.bind = \"10.0.0.1\"", "1: distributed.bind"),
        ("distributed.bind = \"::\"", "1: distributed.bind"),
        (
            "distributed.bind = \"0.0.0.0\"\nauth.token = \"short\"",
            "2: auth.token: is too short",
        ),
        ("auth.token = \"\"", "1: auth.token = ***: is empty"),
        (
            "auth.token = \"two words\"",
            "1: auth.token = ***: expected printable",
        ),
        (
            "queue.backend = \"nats\"\nstate.backend = \"local\"",
            "2: state.backend = \"local\"",
        ),
        (
            "state.backend = \"grpc\"",
            "1: state.backend = \"grpc\": does not fit",
        ),
        (
            "[queue]\nbackend = \"nats\"\nnats_token = \"a\"\nnats_creds = \"/b\"",
            "3: queue.nats_token",
        ),
        (
            "[queue]\nbackend = \"nats\"\nnats_cert = \"/b\"",
            "3: queue.nats_cert = \"/b\": needs",
        ),
        (
            "[queue]\nbackend = \"nats\"\nnats_nkey = \"SAX\"",
            "3: queue.nats_nkey: expected the seed",
        ),
        (
            "distributed.ports.state = 7777",
            "1: distributed.ports.state = 7777",
        ),
        (
            "distributed.registry_addr = \"http://127.0.0.1:7777\"",
            "derived from",
        ),
        (
            "distributed.ports.http = 9090",
            "1: distributed.ports.http = 9090",
        ),
        (
            "supervisor.restart_initial = \"31s\"",
            "1: supervisor.restart_initial",
        ),
        (
            "supervisor.restart_max = \"10ms\"",
            "1: supervisor.restart_max",
        ),
        (
            "distributed.workers.inference.openai = 1",
            "1: distributed.workers.inference.openai",
        ),
        (
            "distributed.workers.inference.local = 1",
            "1: distributed.workers.inference.local",
        ),
        ("node.labels = { a = 1 }", "1: node.labels"),
        (
            "node.name = \"a/b\"",
            "1: node.name = \"a/b\": expected 1 to 63",
        ),
        (
            "openai.endpoint = { file = \"/none/such\" }",
            "1: openai.endpoint",
        ),
        ("openai.endpoint = { fil = \"x\" }", "1: openai.endpoint"),
        (
            "openai.api_key = \"${NO_SUCH}\"",
            "1: openai.api_key = ***: the variable NO_SUCH",
        ),
        ("queue = 1", "1: queue: expected a table with backend"),
    ] {
        check(config, start);
    }
    let fine = format!("{token}distributed.bind = \"0.0.0.0\"");
    Home::new().config(&fine).loaded();
}

#[test]
fn nothing_secret_is_repeated() {
    let home = Home::new()
        .config(
            "auth.tokn = \"s3cret\"\nauth.token = \"s3cret s3cret\"\n\
             queue.nats_url = \"nats://me:s3cret@hub/x\"\nopenai.endpoint = \"http://s3cret@h\"\n\
             openai.api_key = [\"s3cret\"]\n",
        )
        .var("VLINDER_AUTH_TOKE", "s3cret");
    let text = home.mistakes().join("\n");
    assert_eq!(text.lines().count(), 6, "{text}");
    assert!(!text.contains("s3cret"), "{text}");
}

#[test]
fn hostile_names_cannot_write_to_the_terminal() {
    let home = Home::new().config("\"\\u001b[2J\" = 1\nnode.name = \"\\u001b[2J\\n\"\n");
    let text = home.var("VLINDER_\u{1b}[2J", "x").mistakes();
    assert_eq!(text.len(), 3, "{text:?}");
    assert!(
        text.iter().all(|line| !line.contains(char::is_control)),
        "{text:?}"
    );
}

#[test]
fn files_that_were_named_must_exist() {
    let env = Home::new().var("VLINDER_CONFIG", "~/none.toml");
    assert_eq!(
        env.mistakes(),
        ["VLINDER_CONFIG: there is no file ~/none.toml"]
    );
    let home = Home::new();
    let config_file = Some("none.toml".into());
    let mistakes = load(&Sources {
        config_file,
        ..Sources::new(&home.env)
    })
    .unwrap_err();
    assert_eq!(
        lines(&mistakes, home.dir.path()),
        ["--config: there is no file ~/none.toml"]
    );
    let dir = Home::new().file("config.toml/x", "");
    assert!(
        dir.mistakes()[0].contains("cannot be read"),
        "{:?}",
        dir.mistakes()
    );
    let huge = Home::new().config(&"#".repeat(1024 * 1024 + 1));
    assert!(
        huge.mistakes()[0].contains("larger than"),
        "{:?}",
        huge.mistakes()
    );
    let empty = Home::new().var("VLINDER_DIR", "");
    assert!(
        empty.mistakes()[0].starts_with("VLINDER_DIR = \"\": is empty"),
        "{:?}",
        empty.mistakes()
    );
}

#[test]
fn roles_that_this_build_lacks() {
    let supported = [WorkerRole::Registry, WorkerRole::Harness];
    let home = Home::new();
    let loaded = load(&Sources {
        supported: &supported,
        ..Sources::new(&home.env)
    })
    .unwrap();
    for role in WorkerRole::ALL {
        let expected = u32::from(supported.contains(&role));
        assert_eq!(loaded.config.workers.count(role), expected, "{role}");
    }
    let key = "distributed.workers.agent.container";
    let warned = loaded
        .warnings
        .iter()
        .any(|warning| warning.starts_with(key));
    assert!(warned, "{:?}", loaded.warnings);
    assert_eq!(
        loaded.origin(key).unwrap().to_string(),
        "derived from what this build has"
    );

    let home = Home::new()
        .var("VLINDER_WORKERS_AGENT_CONTAINER", "1")
        .config("[distributed.workers]\ndag_git = 0\nstate = 2\ninference.openai = 1\n");
    let mistakes = load(&Sources {
        supported: &supported,
        ..Sources::new(&home.env)
    })
    .unwrap_err();
    assert_eq!(
        lines(&mistakes, home.dir.path()),
        [
            "~/.vlinder/config.toml:3: distributed.workers.state = 2: this build has no state \
             worker; expected 0",
            "~/.vlinder/config.toml:4: distributed.workers.inference.openai = 1: this build has \
             no inference.openai worker; expected 0",
            "VLINDER_WORKERS_AGENT_CONTAINER: distributed.workers.agent.container = 1: this \
             build has no agent.container worker; expected 0",
        ]
    );
}
