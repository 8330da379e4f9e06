//! The node as a client of the cluster's services, its own among them: for the gateway, for the console,
//! for agents' secrets, and for the keys of model providers.

use async_trait::async_trait;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use url::Url;
use vlinder_client::{Client, Error, Limits};
use vlinder_config::{Config, NodeAddresses, Service};
use vlinder_core::Namespace;
use vlinder_proto::secret::GetRequest;
use vlinder_runtime::secrets::{SecretError, SecretValue, Secrets};
use vlinder_worker::WorkerCx;
use vlinder_worker::infra::{InfraView, SECRET};

/// How long the secret service may take altogether, while an agent or an upstream waits for a value.
const SECRET_DEADLINE: Duration = Duration::from_secs(5);
/// Pause before a secret is asked for again that could not be had.
const SECRET_RETRY: Duration = Duration::from_secs(1);

/// Where to connect to a service: at `own` first, where this node serves it itself.
fn addresses_of(config: &Config, own: Option<&Url>, service: Service) -> Vec<String> {
    let text = |url: &Url| url.as_str().trim_end_matches('/').to_owned();
    let is_elsewhere = |url: &&Url| {
        let host = url.host_str().unwrap_or_default();
        // Beside an own one a loopback address is that one, or a default that nobody meant.
        let is_loopback = host == "localhost" || host.starts_with("127.") || host == "[::1]";
        own.is_none() || !is_loopback
    };
    let others = config.distributed.addresses(service).iter();
    let others = others.filter(is_elsewhere).map(text);
    let mut urls: Vec<String> = own.map(text).into_iter().chain(others).collect();
    let first = urls.first().cloned();
    let mut index = 0;
    urls.retain(|url| {
        index += 1;
        index == 1 || Some(url) != first.as_ref()
    });
    urls
}

/// A client of some services, made anew when they are elsewhere than before.
pub struct Peers {
    services: &'static [Service],
    /// The client of the addresses beside it.
    client: Mutex<Option<(Addresses, Client)>>,
}

type Addresses = Vec<(Service, Vec<String>)>;

impl Peers {
    pub fn new(services: &'static [Service]) -> Self {
        Self {
            services,
            client: Mutex::default(),
        }
    }

    /// A client of where they are now: at `own`, where this node serves one itself, then where `config`
    /// says.
    pub fn client(
        &self,
        config: &Config,
        token: Option<&str>,
        own: impl Fn(Service) -> Option<Url>,
    ) -> Result<Client, Error> {
        let addresses: Addresses = self
            .services
            .iter()
            .map(|&service| {
                let own = own(service);
                (service, addresses_of(config, own.as_ref(), service))
            })
            .collect();
        let mut known = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, client)) = &*known
            && *of == addresses
        {
            return Ok(client.clone());
        }
        let namespace = Namespace::default_ns();
        let client = Client::of(addresses.clone(), token, namespace.as_str())?;
        *known = Some((addresses, client.clone()));
        Ok(client)
    }
}

/// The same for a worker, which reads in the data directory where its node serves what.
pub struct WorkerPeers {
    peers: Peers,
    config: Arc<Config>,
    data_dir: PathBuf,
    token: String,
}

impl WorkerPeers {
    pub fn new(
        config: Arc<Config>,
        cx: &WorkerCx,
        token: &str,
        services: &'static [Service],
    ) -> Self {
        Self {
            peers: Peers::new(services),
            config,
            data_dir: cx.data_dir.to_path_buf(),
            token: token.to_owned(),
        }
    }

    /// A client of where they are now.
    pub fn client(&self) -> Result<Client, Error> {
        let own = NodeAddresses::read(&self.data_dir).ok().flatten();
        // A node without the service writes there what its configuration says.
        let own = |service| own.as_ref().and_then(|own| own.get(service)).cloned();
        self.peers.client(&self.config, Some(&self.token), own)
    }
}

/// Reads secrets from the secret service, wherever it is at the time.
pub struct SecretReader(WorkerPeers);

impl SecretReader {
    pub fn new(config: Arc<Config>, cx: &WorkerCx, token: &str) -> Self {
        Self(WorkerPeers::new(config, cx, token, &[Service::Secret]))
    }

    fn client(&self) -> Result<Client, Error> {
        let client = self.0.client()?;
        Ok(client.with_limits(Limits {
            call: SECRET_DEADLINE,
            retry: SECRET_DEADLINE,
            ..Limits::default()
        }))
    }
}

#[async_trait]
impl Secrets for SecretReader {
    async fn get(&self, name: &str) -> Result<SecretValue, SecretError> {
        let request = GetRequest {
            name: name.to_owned(),
            ..GetRequest::default()
        };
        let got = match self.client() {
            Ok(client) => client.get_secret(request).await,
            Err(error) => Err(error),
        };
        match got {
            Ok(secret) => Ok(SecretValue {
                value: secret.value,
                version: secret.version,
            }),
            Err(error) if error.is_not_found() => Err(SecretError::Missing(name.to_owned())),
            Err(error) => Err(SecretError::Unavailable(error.to_string())),
        }
    }
}

/// Keeps the value of a secret current: whoever holds the receiver has a new one moments after it was
/// stored. `None`: there is no such secret.
pub struct FollowedSecret {
    name: &'static str,
    reader: SecretReader,
    infra: InfraView,
    /// The version whose value stands in `value`.
    version: u64,
    value: watch::Sender<Option<String>>,
}

impl FollowedSecret {
    /// Reads it for the first time; as long as that fails, the worker waits and says why.
    pub async fn start(
        cx: &WorkerCx,
        reader: SecretReader,
        name: &'static str,
    ) -> Result<(Self, watch::Receiver<Option<String>>), vlinder_worker::Error> {
        let (value, receiver) = watch::channel(None);
        let mut followed = Self {
            name,
            reader,
            infra: InfraView::start(cx).await?,
            version: 0,
            value,
        };
        while let Err(why) = followed.look().await {
            cx.control.waiting(&why);
            tokio::select! {
                () = cx.drain.cancelled() => break,
                () = tokio::time::sleep(SECRET_RETRY) => {}
            }
        }
        Ok((followed, receiver))
    }

    /// Follows changes for as long as anybody polls this.
    pub async fn follow(mut self) -> std::convert::Infallible {
        loop {
            match self.look().await {
                Ok(()) => {
                    if self.infra.changed().await.is_err() {
                        // The bus is closing, and with it the worker.
                        std::future::pending::<()>().await;
                    }
                }
                Err(why) => {
                    tracing::warn!(secret = self.name, why, "the old value stays in use");
                    tokio::time::sleep(SECRET_RETRY).await;
                }
            }
        }
    }

    /// Reads the value if there is a new one. `Err` says in words why that cannot be done.
    async fn look(&mut self) -> Result<(), String> {
        let infra = self.infra.now();
        let entry = infra.entry(SECRET, self.name);
        let version = entry.map_or(0, |entry| entry.seq);
        if version == self.version {
            return Ok(());
        }
        let value = if entry.is_some_and(|entry| entry.value.is_some()) {
            match self.reader.get(self.name).await {
                Ok(secret) => Some(
                    String::from_utf8(secret.value)
                        .map_err(|_| format!("secret {} is not text", self.name))?,
                ),
                Err(SecretError::Missing(_)) => None,
                Err(SecretError::Unavailable(why)) => {
                    return Err(format!("secret {} cannot be read: {why}", self.name));
                }
            }
        } else {
            None
        };
        self.version = version;
        self.value.send_replace(value);
        Ok(())
    }
}
