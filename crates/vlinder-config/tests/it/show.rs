//! What `config show` prints loads again, and hides what it must.

use vlinder_config::Config;

use crate::Home;

fn busy() -> Home {
    Home::new()
        .config(
            "[node]\nlabels = { zone = \"a\", gpu = \"yes\" }\n\
             [queue]\nnats_url = \"nats://u:p4ss@a:1,nats://b:2\"\nnats_token = \"a$${b}\"\n\
             max_bytes = 1048577\n\
             [runtime]\nlambda_vpc_subnet_ids = [\"s-1\", \"s-2\"]\n\
             [distributed]\nbind = \"0.0.0.0\"\nregistry_addr = \"http://hub:1,http://hub2:1\"\n\
             [supervisor]\nmemory_limit = \"64MiB\"\ndrain_deadline = \"90s\"\n\
             [openai]\nendpoint = \"http://x:1/v1\"\napi_key = \"sk-s3cret\"\n",
        )
        .var("VLINDER_AUTH_TOKEN", "t0ken-t0ken-t0ken")
        .var("RUST_LOG", "debug")
}

#[test]
fn shown_toml_loads_to_the_same() {
    let config = busy().loaded().config;
    for origins in [false, true] {
        let text = busy().loaded().effective_toml(origins, false);
        let again = Home::new()
            .config(&text)
            .var("RUST_LOG", "debug")
            .loaded()
            .config;
        assert_eq!(again, config, "{text}");
    }
    let text = Home::new().loaded().effective_toml(true, true);
    let mut again = Home::new().config(&text).loaded();
    assert_eq!(again.config, Home::new().loaded().config, "{text}");
    // Written down, the address of NATS is a setting without effect.
    assert_eq!(again.warnings.len(), 1, "{:?}", again.warnings);
    again.warnings.clear();
}

#[test]
fn the_config_survives_the_way_to_a_child() {
    let config = busy().loaded().config;
    let json = serde_json::to_string(&config).unwrap();
    assert!(json.contains("sk-s3cret"));
    assert_eq!(serde_json::from_str::<Config>(&json).unwrap(), config);
    let json = serde_json::to_string(&Config::default()).unwrap();
    assert_eq!(
        serde_json::from_str::<Config>(&json).unwrap(),
        Config::default()
    );
}

#[test]
fn masked_forms_hold_no_secret() {
    let loaded = busy().loaded();
    let texts = [
        loaded.effective_toml(true, true),
        loaded.effective_json(true, true).to_string(),
        serde_json::to_string(&loaded.config.masked()).unwrap(),
        format!("{loaded:?}"),
        format!("{:?}", loaded.config),
    ];
    for text in texts {
        for secret in ["p4ss", "a${b}", "sk-s3cret", "t0ken"] {
            assert!(!text.contains(secret), "{secret} in {text}");
        }
        assert!(text.contains("***"), "{text}");
    }
}

#[test]
fn origins_are_named() {
    let home = busy();
    let text = home.loaded().effective_toml(true, true);
    let file = home.data_dir().join("config.toml");
    for line in [
        "level = \"info\"  # default".to_owned(),
        "backend = \"nats\"  # derived from queue.nats_url".to_owned(),
        "token = \"***\"  # environment VLINDER_AUTH_TOKEN".to_owned(),
        format!("bind = \"0.0.0.0\"  # file {}:10", file.display()),
        "# model is not set".to_owned(),
        "# RUST_LOG=debug replaces logging.level on stderr".to_owned(),
    ] {
        assert!(text.lines().any(|l| l == line), "no {line:?} in\n{text}");
    }
    let none = Home::new().loaded().effective_toml(false, true);
    assert!(
        none.contains("# token is not set: made at first start in run/token"),
        "{none}"
    );
}
