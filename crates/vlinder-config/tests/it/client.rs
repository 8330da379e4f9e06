//! How a client finds its daemon.

use url::Url;
use vlinder_config::{AddressSource, ClientConfig, NodeAddresses, Service, ensure_token};

use crate::{Home, lines};

const CONTEXTS: &str = "current = \"prod\"\n\
    [contexts.prod]\naddr = [\"http://a:1\", \"http://b:1\"]\ntoken = \"prod-token\"\n\
    namespace = \"team-a\"\n[contexts.dev]\naddr = \"http://dev:1\"\n";

impl Home {
    fn client(&self, addr: Option<&str>) -> ClientConfig {
        ClientConfig::load(&self.env, addr)
            .unwrap_or_else(|mistakes| panic!("{:#?}", lines(&mistakes, self.dir.path())))
    }

    fn client_mistakes(&self, addr: Option<&str>) -> Vec<String> {
        lines(
            &ClientConfig::load(&self.env, addr).unwrap_err(),
            self.dir.path(),
        )
    }

    /// A daemon of this data directory that listens on ports of its own.
    fn with_node(self) -> Self {
        let mut node = NodeAddresses::default();
        for (service, port) in Service::ALL.into_iter().zip(41000..) {
            node.set(
                service,
                Url::parse(&format!("http://127.0.0.1:{port}")).unwrap(),
            );
        }
        node.http = Some(Url::parse("http://127.0.0.1:41009").unwrap());
        node.write(&self.data_dir()).unwrap();
        self
    }
}

fn urls(client: &ClientConfig, service: Service) -> String {
    client
        .addresses(service)
        .iter()
        .map(|url| url.as_str())
        .collect::<Vec<_>>()
        .join(",")
}

#[test]
fn defaults_point_at_this_machine() {
    let client = Home::new().client(None);
    assert_eq!(client.source, AddressSource::Default);
    for service in Service::ALL {
        let expected = format!("http://127.0.0.1:{}/", service.default_port());
        assert_eq!(urls(&client, service), expected);
    }
    assert_eq!(client.http[0].as_str(), "http://127.0.0.1:7777/");
    assert_eq!((client.token, client.namespace.as_str()), (None, "default"));
}

#[test]
fn the_first_source_decides_all_five() {
    let home = Home::new().with_node();
    let client = home.client(None);
    assert_eq!(client.source, AddressSource::Node);
    assert_eq!(urls(&client, Service::Catalog), "http://127.0.0.1:41004/");
    assert_eq!(client.http[0].as_str(), "http://127.0.0.1:41009/");

    let home = home.file("client.toml", CONTEXTS);
    let client = home.client(None);
    assert_eq!(client.source, AddressSource::Context("prod".into()));
    assert_eq!(urls(&client, Service::Harness), "http://a:1/,http://b:1/");
    assert_eq!(
        urls(&client, Service::State),
        "http://a:9092/,http://b:9092/"
    );
    assert_eq!(client.namespace.as_str(), "team-a");

    let home = home.var("VLINDER_DISTRIBUTED_REGISTRY_ADDR", "http://hub:5");
    let client = home.client(None);
    assert_eq!(client.source, AddressSource::Env);
    assert_eq!(urls(&client, Service::Registry), "http://hub:5/");
    assert_eq!(urls(&client, Service::Harness), "http://hub:9091/");

    let client = home.client(Some("x:7"));
    assert_eq!(client.source, AddressSource::Flag);
    assert_eq!(urls(&client, Service::Harness), "http://x:7/");
    assert_eq!(urls(&client, Service::Registry), "http://x:9090/");
    assert_eq!(client.http[0].as_str(), "http://x:7777/");

    // The harness of the node of this data directory: the rest is known.
    let client = home.client(Some("127.0.0.1:41001"));
    assert_eq!(urls(&client, Service::Registry), "http://127.0.0.1:41000/");
}

#[test]
fn the_token_goes_with_the_addresses() {
    let home = Home::new();
    let own = ensure_token(&home.data_dir()).unwrap();
    let home = home
        .file("client.toml", CONTEXTS)
        .config("auth.token = \"config-token\"");
    let token = |home: &Home, addr| home.client(addr).token.map(|t| t.expose().to_owned());
    assert_eq!(token(&home, None).as_deref(), Some("prod-token"));
    assert_eq!(
        token(&home, Some("http://127.0.0.1:1")).as_deref(),
        Some(own.expose())
    );
    assert_eq!(
        token(&home, Some("http://a2:1")).as_deref(),
        Some("prod-token")
    );

    let home = home.file("client.toml", "");
    // What this node made for itself goes to no other machine; a configured one is the cluster's.
    assert_eq!(
        token(&home, Some("http://a2:1")).as_deref(),
        Some("config-token")
    );
    let home = home.config("");
    assert_eq!(token(&home, Some("http://a2:1")), None);
    assert_eq!(token(&home, None).as_deref(), Some(own.expose()));
    let home = home.var("VLINDER_AUTH_TOKEN", "env-token");
    assert_eq!(token(&home, None).as_deref(), Some("env-token"));
}

#[test]
fn a_token_file_is_read_when_it_is_needed() {
    let contexts = "current = \"a\"\n[contexts.a]\naddr = \"http://a\"\ntoken_file = \"a-token\"\n\
                    [contexts.b]\naddr = \"http://b\"\ntoken_file = \"/none/such\"\n";
    let home = Home::new()
        .file("client.toml", contexts)
        .file("a-token", "from-file\n");
    assert_eq!(home.client(None).token.unwrap().expose(), "from-file");
    let home = home.file(
        "client.toml",
        &contexts.replace("current = \"a\"", "current = \"b\""),
    );
    assert!(home.client_mistakes(None)[0].contains("there is no file /none/such"));
}

#[test]
fn all_mistakes_of_the_client_file_at_once() {
    let home = Home::new()
        .file(
            "client.toml",
            "curent = \"x\"\ncurrent = \"prd\"\n[contexts.prod]\nadr = \"http://a\"\n\
             addr = \"a:1\"\ntoken = \"t\"\ntoken_file = \"t\"\nnamespace = \"A\"\n\
             [contexts]\nbad = 1\n",
        )
        .var("VLINDER_DISTRIBUTED_STATE_ADDR", "ftp://x");
    let mistakes = home.client_mistakes(Some("http://"));
    let expected = [
        "~/.vlinder/client.toml:1: curent: is not a key; did you mean current?",
        "~/.vlinder/client.toml:2: current = \"prd\": there is no such context; did you mean prod?",
        "~/.vlinder/client.toml:4: contexts.prod.adr: is not a key; did you mean addr?",
        "~/.vlinder/client.toml:5: contexts.prod.addr = \"a:1\": expected http://HOST:9091",
        "~/.vlinder/client.toml:7: contexts.prod.token_file: token and token_file are both",
        "~/.vlinder/client.toml:8: contexts.prod.namespace = \"A\": expected 1 to 63 of",
        "~/.vlinder/client.toml:10: contexts.bad: expected a table with addr",
        "VLINDER_DISTRIBUTED_STATE_ADDR: distributed.state_addr = \"ftp://x\": expected http://HOST",
        "--addr = \"http://\": expected http://HOST:9091",
    ];
    assert_eq!(mistakes.len(), expected.len(), "{mistakes:#?}");
    for (mistake, start) in mistakes.iter().zip(expected) {
        assert!(mistake.starts_with(start), "{mistake}\nis not\n{start}");
    }
}

#[test]
fn odd_things_are_warnings() {
    let home = Home::new()
        .file("run/addresses.json", "{")
        .var("VLINDER_DISTRIBUTED_HARNES_ADDR", "x");
    let client = home.client(None);
    assert_eq!(client.source, AddressSource::Default);
    assert_eq!(client.warnings.len(), 2, "{:?}", client.warnings);
}
