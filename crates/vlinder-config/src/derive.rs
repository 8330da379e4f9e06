//! Defaults, and the values that follow from others.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use url::Url;
use vlinder_core::NodeName;

use crate::Env;
use crate::addresses::Service;
use crate::elements::{Value, service_url};
use crate::keys::{KEYS, Standard};
use crate::mistake::Origin;
use crate::settings::Settings;

/// Fills in every key that nobody set and that has a default.
pub(crate) fn derive(settings: &mut Settings, env: &Env) {
    for key in KEYS {
        if let (Standard::Is(text), None) = (key.standard, settings.get(key.path)) {
            settings.set_text(key, text, Origin::Default);
        }
    }
    node_name(settings, env);
    backends(settings);
    workers(settings);
    let own = Own::of(settings, env);
    for service in Service::ALL {
        address(settings, service, &own);
    }
    for service in Service::ALL {
        port(settings, service, &own);
    }
}

fn text(settings: &mut Settings, path: &'static str, value: &str, origin: Origin) {
    if settings.get(path).is_none() {
        settings.set(path, Value::Text(value.to_owned()), origin);
    }
}

/// The host name, with whatever a node name cannot hold replaced.
fn node_name(settings: &mut Settings, env: &Env) {
    let fits = |c: char| {
        if c.is_ascii_alphanumeric() || "-_.".contains(c) {
            c
        } else {
            '-'
        }
    };
    let name: String = env
        .host_name()
        .chars()
        .take(NodeName::LEN_MAX)
        .map(fits)
        .collect();
    let name = if name.is_empty() { "node" } else { &name };
    text(
        settings,
        "node.name",
        name,
        Origin::Derived("the host name".into()),
    );
}

fn backends(settings: &mut Settings) {
    let nats_url = settings.explicit("queue.nats_url").is_some();
    let (backend, origin) = match nats_url {
        true => ("nats", Origin::Derived("queue.nats_url".into())),
        false => ("local", Origin::Default),
    };
    text(settings, "queue.backend", backend, origin);
    if settings.get("queue.nats_url").is_none() {
        let usual = Value::List(vec!["nats://localhost:4222".into()]);
        settings.set("queue.nats_url", usual, Origin::Default);
    }
    let (backend, origin) = match is_embedded(settings) {
        true => ("local", Origin::Default),
        false => ("grpc", Origin::Derived("queue.backend".into())),
    };
    text(settings, "state.backend", backend, origin);
}

pub(crate) fn is_embedded(settings: &Settings) -> bool {
    settings.text("queue.backend") != Some("nats")
}

fn workers(settings: &mut Settings) {
    let registry = settings.number("distributed.workers.registry").unwrap_or(1);
    let explicit = settings.explicit("distributed.workers.registry").is_some();
    let followers = [
        "distributed.workers.infra",
        "distributed.workers.state",
        "distributed.workers.secret",
        "distributed.workers.catalog",
    ];
    for path in followers {
        if settings.get(path).is_none() {
            let origin = match explicit {
                true => Origin::Derived("distributed.workers.registry".into()),
                false => Origin::Default,
            };
            settings.set(path, Value::Number(registry), origin);
        }
    }
    let process = "distributed.workers.agent.process";
    if settings.get(process).is_none() {
        let (count, origin) = match is_embedded(settings) {
            true => (1, Origin::Default),
            false => (0, Origin::Derived("queue.backend".into())),
        };
        settings.set(process, Value::Number(count), origin);
    }
}

/// What tells this node from others in an address.
struct Own<'a> {
    env: &'a Env,
    node_name: String,
    bind: IpAddr,
}

impl<'a> Own<'a> {
    fn of(settings: &Settings, env: &'a Env) -> Self {
        let node_name = settings
            .text("node.name")
            .unwrap_or_default()
            .to_ascii_lowercase();
        let bind = settings
            .text("distributed.bind")
            .and_then(|text| text.parse().ok());
        Self {
            env,
            node_name,
            bind: bind.unwrap_or(Ipv4Addr::LOCALHOST.into()),
        }
    }

    fn is(&self, url: &Url) -> bool {
        let host = url.host_str().unwrap_or_default();
        let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
        self.env.is_this_host(host)
            || host.eq_ignore_ascii_case(&self.node_name)
            || address.is_ok_and(|address| address == self.bind)
    }

    /// Where a client on this node finds what listens on `bind`.
    fn connect_host(&self) -> String {
        match self.bind {
            IpAddr::V4(address) if address.is_unspecified() => Ipv4Addr::LOCALHOST.to_string(),
            IpAddr::V4(address) => address.to_string(),
            IpAddr::V6(address) if address.is_unspecified() => format!("[{}]", Ipv6Addr::LOCALHOST),
            IpAddr::V6(address) => format!("[{address}]"),
        }
    }
}

/// An address that nobody set: the host of `registry_addr` if that was set, else this node; on
/// this node with the port that was asked for.
fn address(settings: &mut Settings, service: Service, own: &Own<'_>) {
    if settings.get(service.addr_key()).is_some() {
        return;
    }
    let own_port = settings
        .explicit(service.port_key())
        .and(settings.number(service.port_key()));
    let own_port = own_port.and_then(|port| u16::try_from(port).ok());
    let lent = settings.explicit(Service::Registry.addr_key()).is_some();
    let (addresses, origin) = if lent {
        let registry = settings.list(Service::Registry.addr_key());
        let urls = registry
            .iter()
            .map(|text| lend_host(text, service, own, own_port));
        (
            urls.collect(),
            Origin::Derived(Service::Registry.addr_key().into()),
        )
    } else {
        let port = own_port.unwrap_or(service.default_port());
        let origin = match (
            own_port.is_some(),
            own.bind.is_loopback() || own.bind.is_unspecified(),
        ) {
            (true, _) => Origin::Derived(service.port_key().into()),
            (false, false) => Origin::Derived("distributed.bind".into()),
            (false, true) => Origin::Default,
        };
        (
            vec![format!("http://{}:{port}", own.connect_host())],
            origin,
        )
    };
    settings.set(service.addr_key(), Value::List(addresses), origin);
}

fn lend_host(registry: &str, service: Service, own: &Own<'_>, own_port: Option<u16>) -> String {
    let usual = service.default_port();
    // Checked when it was read; a port is no reason to refuse it now.
    let Ok(mut url) = service_url(registry, usual) else {
        return registry.to_owned();
    };
    let port = own_port.filter(|_| own.is(&url)).unwrap_or(usual);
    let _ = url.set_port(Some(port));
    url.as_str().trim_end_matches('/').to_owned()
}

/// Where a service listens, if nobody said: on the port of its first address that names this node.
fn port(settings: &mut Settings, service: Service, own: &Own<'_>) {
    if settings.get(service.port_key()).is_some() {
        return;
    }
    let explicit = settings
        .get(service.addr_key())
        .is_some_and(|s| s.origin != Origin::Default);
    let addresses = settings.list(service.addr_key());
    let urls = addresses.iter().filter_map(|text| Url::parse(text).ok());
    let port = urls
        .filter(|url| own.is(url))
        .find_map(|url| url.port_or_known_default());
    let (port, origin) = match port {
        Some(port) if explicit => (port, Origin::Derived(service.addr_key().into())),
        _ => (service.default_port(), Origin::Default),
    };
    settings.set(service.port_key(), Value::Number(port.into()), origin);
}
