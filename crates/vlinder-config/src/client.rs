//! How the command line finds a daemon: addresses, credential, namespace.
//!
//! Addresses come from the first of these that names any: `--addr`, the variables
//! `VLINDER_DISTRIBUTED_*_ADDR`, the current context of `client.toml`, `run/addresses.json` of a
//! daemon on this data directory, the defaults. That one decides all five, so that a client never
//! speaks to two clusters at once; a service that it leaves out is looked for on the host of the
//! registry (else of the harness) at its usual port.
//!
//! The token is `VLINDER_AUTH_TOKEN`, else the context's if the addresses are from it; else, when
//! this machine is addressed, that of `run/token` or `config.toml`; else the context's, else that of
//! `config.toml`. `run/token` is never sent to another machine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use url::Url;
use vlinder_core::Namespace;

use crate::addresses::{NodeAddresses, Service};
use crate::client_file::{ClientFile, Context};
use crate::elements::{Kind, Raw, Value, service_url};
use crate::keys::find;
use crate::layers::{CONFIG_BYTES_MAX, data_dir, unknown_variable_warnings};
use crate::mistake::{Mistake, Origin};
use crate::secret::{MASK, Secret};
use crate::toml_file::{self, FileKind, Written};
use crate::{Env, expand, files, token};

/// Where console, events and the other HTTP routes are unless a node says otherwise.
const HTTP_PORT: u16 = 7777;

/// What decided the addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AddressSource {
    /// `--addr`.
    Flag,
    /// `VLINDER_DISTRIBUTED_*_ADDR`.
    Env,
    /// A context of `client.toml`, by name.
    Context(String),
    /// `run/addresses.json` of this data directory.
    Node,
    /// Nobody said anything.
    Default,
}

/// What a client needs to speak to a cluster.
#[derive(Debug, Clone, PartialEq)]
pub struct ClientConfig {
    /// Where each service is; at least one address each, tried in turn.
    services: BTreeMap<Service, Vec<Url>>,
    /// Where console, events and the OpenAI-compatible routes are; at least one, tried in turn.
    pub http: Vec<Url>,
    /// The credential, if one was found.
    pub token: Option<Secret>,
    /// The namespace of the current context, else `default`.
    pub namespace: Namespace,
    /// What decided the addresses.
    pub source: AddressSource,
    /// The data directory of this user, absolute; it may not exist.
    pub data_dir: PathBuf,
    /// What is not wrong but should be known; one sentence each.
    pub warnings: Vec<String>,
}

impl ClientConfig {
    /// Finds addresses and credential. `addr` is `--addr`: addresses of the harness, separated by
    /// commas, with or without `http://`. Reports all mistakes at once.
    pub fn load(env: &Env, addr: Option<&str>) -> Result<Self, Vec<Mistake>> {
        let data_dir = data_dir(env, None).map_err(|mistake| vec![*mistake])?;
        let mut mistakes = Vec::new();
        let mut warnings = unknown_variable_warnings(env);
        let file = ClientFile::load(&data_dir.join("client.toml"), &mut mistakes);
        let context = file.current();
        let node = NodeAddresses::read(&data_dir).unwrap_or_else(|error| {
            let path = NodeAddresses::path(&data_dir);
            warnings.push(format!("{} is ignored: {error}", path.display()));
            None
        });

        let flag = addr.and_then(|addr| of_flag(addr, &mut mistakes));
        let variables = of_variables(env, &mut mistakes);
        let (found, source) = match (flag, variables, context, &node) {
            (Some(flag), ..) => (same_node(flag, node.as_ref()), AddressSource::Flag),
            (None, variables, ..) if !variables.is_empty() => (
                Found {
                    services: variables,
                    http: None,
                },
                AddressSource::Env,
            ),
            (None, _, Some((name, context)), _) if !context.services.is_empty() => {
                let services = context.services.clone();
                (
                    Found {
                        services,
                        http: None,
                    },
                    AddressSource::Context(name.to_owned()),
                )
            }
            (None, _, _, Some(node)) if has_services(node) => {
                (Found::of_node(node), AddressSource::Node)
            }
            _ => (Found::default(), AddressSource::Default),
        };
        let (services, http) = found.complete();
        let context = context.map(|(_, context)| context);
        let here = services.values().flatten().all(|url| is_here(url, env));
        let from_context = matches!(source, AddressSource::Context(_));
        let finder = TokenFinder {
            env,
            data_dir: &data_dir,
            context,
            here,
            from_context,
        };
        let token = finder.find(&mut mistakes, &mut warnings);
        if !mistakes.is_empty() {
            Mistake::sort(&mut mistakes);
            return Err(mistakes);
        }
        let namespace = context.and_then(|context| context.namespace.clone());
        let namespace = namespace.unwrap_or_else(Namespace::default_ns);
        Ok(Self {
            services,
            http,
            token,
            namespace,
            source,
            data_dir,
            warnings,
        })
    }

    /// Where a service is; at least one address, tried in turn.
    pub fn addresses(&self, service: Service) -> &[Url] {
        self.services.get(&service).map_or(&[], Vec::as_slice)
    }
}

/// What one source says.
#[derive(Debug, Default)]
struct Found {
    services: BTreeMap<Service, Vec<Url>>,
    http: Option<Vec<Url>>,
}

impl Found {
    fn of_node(node: &NodeAddresses) -> Self {
        let pairs = Service::ALL
            .into_iter()
            .filter_map(|s| Some((s, vec![node.get(s)?.clone()])));
        Self {
            services: pairs.collect(),
            http: node.http.clone().map(|url| vec![url]),
        }
    }

    /// Lends the host of the registry, else of the harness, else of any, to whatever is missing.
    fn complete(self) -> (BTreeMap<Service, Vec<Url>>, Vec<Url>) {
        let Self { mut services, http } = self;
        let lender = services
            .get(&Service::Registry)
            .or(services.get(&Service::Harness));
        let lender = lender
            .or(services.values().next())
            .cloned()
            .unwrap_or_else(|| {
                let local = service_url("http://127.0.0.1", Service::Registry.default_port());
                local.into_iter().collect()
            });
        let at_port = |port: u16| -> Vec<Url> {
            let lent = lender.iter().cloned().map(|mut url| {
                // Only a URL without a host refuses a port, and addresses have one.
                let _ = url.set_port(Some(port));
                url
            });
            lent.collect()
        };
        for service in Service::ALL {
            services
                .entry(service)
                .or_insert_with(|| at_port(service.default_port()));
        }
        let http = http.unwrap_or_else(|| at_port(HTTP_PORT));
        (services, http)
    }
}

fn has_services(node: &NodeAddresses) -> bool {
    Service::ALL
        .into_iter()
        .any(|service| node.get(service).is_some())
}

fn is_here(url: &Url, env: &Env) -> bool {
    url.host_str().is_some_and(|host| env.is_this_host(host))
}

/// `--addr` names only the harness. When that is the harness of the node of this data directory,
/// the rest is known too, whatever its ports.
fn same_node(harness: Vec<Url>, node: Option<&NodeAddresses>) -> Found {
    match node {
        Some(node)
            if node
                .harness
                .as_ref()
                .is_some_and(|own| harness.contains(own)) =>
        {
            Found::of_node(node)
        }
        _ => Found {
            services: [(Service::Harness, harness)].into(),
            http: None,
        },
    }
}

fn of_flag(addr: &str, mistakes: &mut Vec<Mistake>) -> Option<Vec<Url>> {
    let parts = addr
        .split(',')
        .map(str::trim)
        .map(|part| match part.contains("://") {
            true => part.to_owned(),
            false => format!("http://{part}"),
        });
    let text = parts.collect::<Vec<_>>().join(",");
    match checked_urls(Service::Harness, &Raw::Argument(text)) {
        Ok(urls) => Some(urls),
        Err(expected) => {
            let mistake = Mistake::new(Origin::Flag("--addr".into()), "", expected);
            mistakes.push(mistake.value(&crate::secret::mask_url(addr)));
            None
        }
    }
}

fn of_variables(env: &Env, mistakes: &mut Vec<Mistake>) -> BTreeMap<Service, Vec<Url>> {
    let mut services = BTreeMap::new();
    for service in Service::ALL {
        let Some(key) = find(service.addr_key()) else {
            continue;
        };
        for name in key.variables() {
            let Some(text) = env.get(&name) else { continue };
            match checked_urls(service, &Raw::Argument(text.to_owned())) {
                Ok(urls) => drop(services.insert(service, urls)),
                Err(expected) => {
                    let mistake = Mistake::new(Origin::Env(name), key.path, expected);
                    mistakes.push(mistake.value(&crate::secret::mask_url(text)));
                }
            }
        }
    }
    services
}

/// A list of addresses of a service, or what was expected.
pub(crate) fn checked_urls(service: Service, raw: &Raw) -> Result<Vec<Url>, String> {
    match Kind::ServiceUrls(service).check(raw) {
        Ok(Value::List(urls)) => {
            // Checked and canonical, so they parse.
            Ok(urls.iter().filter_map(|url| Url::parse(url).ok()).collect())
        }
        Ok(_) => Err(format!(
            "expected {}",
            Kind::ServiceUrls(service).expectation()
        )),
        Err(refusal) => Err(refusal.expected),
    }
}

/// The places where a credential may be, and the order to look in.
struct TokenFinder<'a> {
    env: &'a Env,
    data_dir: &'a Path,
    context: Option<&'a Context>,
    /// Whether all addresses are of this machine.
    here: bool,
    /// Whether the addresses are from the context.
    from_context: bool,
}

impl TokenFinder<'_> {
    fn find(&self, mistakes: &mut Vec<Mistake>, warnings: &mut Vec<String>) -> Option<Secret> {
        if let Some(text) = self.env.get("VLINDER_AUTH_TOKEN") {
            let origin = Origin::Env("VLINDER_AUTH_TOKEN".into());
            return token_of(Raw::Argument(text.to_owned()), origin, self.env, mistakes);
        }
        let of_context = |mistakes: &mut Vec<Mistake>| {
            self.context
                .and_then(|context| context.token(self.env, mistakes))
        };
        if self.from_context
            && let Some(token) = of_context(mistakes)
        {
            return Some(token);
        }
        if self.here {
            match token::read(self.data_dir) {
                Ok(Some(token)) => return Some(token),
                Ok(None) => {}
                Err(error) => warnings.push(format!("no token from run/token: {}", chain(&error))),
            }
            if let Some(token) = self.of_config(warnings) {
                return Some(token);
            }
        }
        of_context(mistakes).or_else(|| self.of_config(warnings))
    }

    /// `auth.token` of the daemon's file. Whatever else is wrong there is the daemon's to say.
    fn of_config(&self, warnings: &mut Vec<String>) -> Option<Secret> {
        let named = self
            .env
            .get("VLINDER_CONFIG")
            .and_then(|path| expand::path(path, self.env).ok());
        let path = match named {
            Some(path) => self.env.working_dir().join(path),
            None => self.data_dir.join("config.toml"),
        };
        let text = files::read(&path, CONFIG_BYTES_MAX).ok().flatten()?;
        let written = toml_file::settings(&path, &text, FileKind::Config, &mut Vec::new());
        let written = written
            .into_iter()
            .find(|written| written.key.path == "auth.token")?;
        let mut mistakes = Vec::new();
        let token = token_of(written.raw, written.origin, self.env, &mut mistakes);
        warnings.extend(mistakes.iter().map(Mistake::to_string));
        token
    }
}

/// The chain of an error on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

/// A credential as it was written anywhere.
pub(crate) fn token_of(
    raw: Raw,
    origin: Origin,
    env: &Env,
    mistakes: &mut Vec<Mistake>,
) -> Option<Secret> {
    let key = find("auth.token")?;
    match expand::check(
        &Written {
            key,
            raw,
            origin: origin.clone(),
        },
        env,
    ) {
        Ok(Value::Text(token)) => Some(Secret::new(token)),
        Ok(_) => {
            mistakes.push(Mistake::new(origin, key.path, "is no token").plain_value(MASK));
            None
        }
        Err(mistake) => {
            mistakes.push(*mistake);
            None
        }
    }
}
