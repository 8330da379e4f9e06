//! Addresses, connections and the policy of tries that every call shares.
//!
//! A connection is made at the first call that needs it and kept. Of several addresses the one
//! that answered last is asked first. A node that is killed and started again may listen elsewhere and
//! ask for another token: a client that can look up where ([`Client::looked_up_by`]) does so when nothing
//! listens any more, or its token is refused.

use crate::error::{Error, innermost};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};
use vlinder_config::{ClientConfig, Service};

/// How long a TCP connect may take before the next address is tried.
const CONNECT: Duration = Duration::from_secs(3);
/// Pings on open streams, so that a dead node is noticed: after this long without a word …
const KEEPALIVE: Duration = Duration::from_secs(10);
/// … and this long without an answer.
const KEEPALIVE_ANSWER: Duration = Duration::from_secs(10);
/// How long one address may keep silent while there is another one to ask.
const SILENCE_MAX: Duration = Duration::from_secs(4);
/// First pause between two rounds over all addresses; each further one is twice as long …
const PAUSE_FIRST: Duration = Duration::from_millis(50);
/// … up to this one.
pub(crate) const PAUSE_MAX: Duration = Duration::from_secs(1);
/// What one stream may have under way towards us, in bytes: bodies are large.
const WINDOW_BYTES: u32 = 4 * 1024 * 1024;

/// How long calls may take.
#[derive(Debug, Clone)]
pub struct Limits {
    /// One try of a call that answers once; also the first word of a stream.
    pub call: Duration,
    /// All tries together of a call that may be repeated. A replicated leader takes up to 9 s to
    /// be replaced, so this is longer.
    pub retry: Duration,
    /// Calls that do much: deploy, verify, redrive.
    pub long: Duration,
    /// How long a turn whose deadline we do not know is looked for after its stream broke.
    pub reattach: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            call: Duration::from_secs(10),
            retry: Duration::from_secs(12),
            long: Duration::from_secs(120),
            reattach: Duration::from_secs(60),
        }
    }
}

/// Whether a call may be sent again when nobody knows if it took effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Repeat {
    /// A read, or a write whose repetition changes nothing.
    Safe,
    /// Only where it certainly never arrived.
    Never,
}

/// A connection that adds the credential to every call.
pub(crate) type Conn = InterceptedService<Channel, Bearer>;

/// Adds `authorization: Bearer …`.
#[derive(Clone)]
pub(crate) struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request
                .metadata_mut()
                .insert("authorization", value.clone());
        }
        Ok(request)
    }
}

struct Address {
    url: String,
    channel: Mutex<Option<Channel>>,
}

/// The addresses of one service.
struct Pool {
    service: &'static str,
    addresses: Vec<Address>,
    /// The one that answered last.
    preferred: AtomicUsize,
}

/// A cluster as it was last looked up: where it is, and the credential it asks for.
struct Cluster {
    pools: BTreeMap<Service, Pool>,
    bearer: Bearer,
}

impl Cluster {
    fn new(
        urls: impl IntoIterator<Item = (Service, Vec<String>)>,
        token: Option<&str>,
    ) -> Result<Self, Error> {
        let bearer = match token {
            None => None,
            Some(token) => {
                let mut value: MetadataValue<Ascii> =
                    format!("Bearer {token}").parse().map_err(|_| {
                        Error::Usage("the token has characters that no header takes".to_owned())
                    })?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        let pools = urls.into_iter().map(|(service, urls)| {
            let addresses = urls.into_iter().map(|url| Address {
                url: url.trim_end_matches('/').to_owned(),
                channel: Mutex::default(),
            });
            let pool = Pool {
                service: service.as_str(),
                addresses: addresses.collect(),
                preferred: AtomicUsize::new(0),
            };
            (service, pool)
        });
        Ok(Self {
            pools: pools.collect(),
            bearer: Bearer(bearer),
        })
    }

    fn of_config(config: &ClientConfig) -> Result<Self, Error> {
        let urls = Service::ALL.map(|service| {
            let urls = config.addresses(service).iter().map(ToString::to_string);
            (service, urls.collect())
        });
        let token = config.token.as_ref().map(|token| token.expose());
        Self::new(urls, token)
    }

    fn pool(&self, service: Service) -> Result<&Pool, Error> {
        let pool = self.pools.get(&service);
        pool.filter(|pool| !pool.addresses.is_empty())
            .ok_or_else(|| {
                Error::Usage(format!(
                    "no address of the {} service is known",
                    service.as_str()
                ))
            })
    }

    /// Whether `other` is at the same addresses and takes the same credential.
    fn is_same(&self, other: &Self) -> bool {
        let urls = |cluster: &Self| -> Vec<(Service, Vec<String>)> {
            let pools = cluster.pools.iter().map(|(service, pool)| {
                let urls = pool.addresses.iter().map(|address| address.url.clone());
                (*service, urls.collect())
            });
            pools.collect()
        };
        self.bearer.0 == other.bearer.0 && urls(self) == urls(other)
    }
}

/// Looks the cluster up again; `None` where it cannot be found now.
type LookUp = dyn Fn() -> Option<ClientConfig> + Send + Sync;

/// A client of the five services; cheap to clone.
#[derive(Clone)]
pub struct Client {
    cluster: Arc<RwLock<Arc<Cluster>>>,
    look_up: Option<Arc<LookUp>>,
    namespace: Arc<str>,
    limits: Limits,
}

impl Client {
    /// A client of the cluster that `config` names. Connects to nothing yet.
    pub fn new(config: &ClientConfig) -> Result<Self, Error> {
        let cluster = Cluster::of_config(config)?;
        Ok(Self::at(cluster, config.namespace.as_str()))
    }

    /// The same client; when nothing listens any more at any address of a service, or the credential
    /// is refused, `look_up` says where the cluster is now. It must not block for long.
    pub fn looked_up_by(
        mut self,
        look_up: impl Fn() -> Option<ClientConfig> + Send + Sync + 'static,
    ) -> Self {
        self.look_up = Some(Arc::new(look_up));
        self
    }

    fn at(cluster: Cluster, namespace: &str) -> Self {
        Self {
            cluster: Arc::new(RwLock::new(Arc::new(cluster))),
            look_up: None,
            namespace: namespace.into(),
            limits: Limits::default(),
        }
    }

    fn cluster(&self) -> Arc<Cluster> {
        let cluster = self.cluster.read().unwrap_or_else(PoisonError::into_inner);
        cluster.clone()
    }

    /// Whether the cluster is elsewhere by now, or takes another credential, than `known`.
    fn has_moved(&self, known: &Arc<Cluster>) -> bool {
        if !Arc::ptr_eq(known, &self.cluster()) {
            // Another call has found that out already.
            return true;
        }
        let found = self.look_up.as_ref().and_then(|look_up| look_up());
        let Some(Ok(found)) = found.as_ref().map(Cluster::of_config) else {
            return false;
        };
        if found.is_same(known) {
            return false;
        }
        let mut cluster = self.cluster.write().unwrap_or_else(PoisonError::into_inner);
        *cluster = Arc::new(found);
        true
    }

    /// A client of explicit addresses (`http://host:port`), at least one for each service that is used.
    pub fn of(
        urls: impl IntoIterator<Item = (Service, Vec<String>)>,
        token: Option<&str>,
        namespace: &str,
    ) -> Result<Self, Error> {
        Ok(Self::at(Cluster::new(urls, token)?, namespace))
    }

    /// The same client with other limits; connections are shared.
    pub fn with_limits(&self, limits: Limits) -> Self {
        Self {
            limits,
            ..self.clone()
        }
    }

    /// The limits in force.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The namespace of all calls.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// One call: `each` try and the `whole` are limited.
    pub(crate) async fn call_within<T, F, R>(
        &self,
        service: Service,
        repeat: Repeat,
        each: Duration,
        whole: Duration,
        op: F,
    ) -> Result<T, Error>
    where
        F: Fn(Conn) -> R,
        R: Future<Output = Result<Response<T>, Status>>,
    {
        let (answer, _) = self
            .call_somewhere(service, repeat, each, whole, op)
            .await?;
        Ok(answer)
    }

    /// The same, with the address that answered. Rounds over all addresses, each round later
    /// than the one before, until one answers or the time is over. Where nothing listens at all
    /// the first round is the last one, unless the cluster has moved: waiting would not start a daemon.
    pub(crate) async fn call_somewhere<T, F, R>(
        &self,
        service: Service,
        repeat: Repeat,
        each: Duration,
        whole: Duration,
        op: F,
    ) -> Result<(T, String), Error>
    where
        F: Fn(Conn) -> R,
        R: Future<Output = Result<Response<T>, Status>>,
    {
        let began = Instant::now();
        let until = began + whole;
        let mut pause = PAUSE_FIRST;
        let mut somebody_listens = false;
        'rounds: loop {
            let cluster = self.cluster();
            let pool = cluster.pool(service)?;
            let moved = || Instant::now() < until && self.has_moved(&cluster);
            let mut refused = Vec::new();
            let mut last = None;
            let count = pool.addresses.len();
            let first = pool.preferred.load(Ordering::Relaxed);
            for step in 0..count {
                let index = (first + step) % count;
                let address = &pool.addresses[index];
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                let limit = match step + 1 < count && repeat == Repeat::Safe {
                    true => each.min(SILENCE_MAX),
                    false => each,
                };
                let outcome = self
                    .one_try(&cluster, pool, address, limit.min(left), &op)
                    .await;
                match outcome {
                    Ok(answer) => {
                        pool.preferred.store(index, Ordering::Relaxed);
                        return Ok((answer, address.url.clone()));
                    }
                    Err(Error::Unreachable { cause, .. }) => {
                        refused.push((address.url.as_str(), cause));
                    }
                    // A call that was refused had no effect.
                    Err(error) if error.is_unauthenticated() && moved() => continue 'rounds,
                    Err(error) if error.is_transient() && repeat == Repeat::Safe => {
                        somebody_listens = true;
                        last = Some(error);
                    }
                    Err(error) => {
                        if error.is_transient() {
                            // Whoever asks again asks somebody else first.
                            let other = (index + 1) % count;
                            pool.preferred.store(other, Ordering::Relaxed);
                        }
                        return Err(error);
                    }
                }
            }
            if last.is_none() && moved() {
                continue;
            }
            let over = until.saturating_duration_since(Instant::now()) <= pause;
            if over || !somebody_listens {
                return Err(match (last, refused.last()) {
                    (Some(Error::NoAnswer { address, .. }), _) => Error::NoAnswer {
                        service: pool.service,
                        address,
                        after: began.elapsed(),
                    },
                    (Some(error), _) => error,
                    (None, Some((_, cause))) => Error::Unreachable {
                        service: pool.service,
                        address: join(refused.iter().map(|(url, _)| *url)),
                        cause: cause.clone(),
                    },
                    (None, None) => Error::NoAnswer {
                        service: pool.service,
                        address: join(pool.addresses.iter().map(|a| a.url.as_str())),
                        after: began.elapsed(),
                    },
                });
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    async fn one_try<T, F, R>(
        &self,
        cluster: &Cluster,
        pool: &Pool,
        address: &Address,
        limit: Duration,
        op: &F,
    ) -> Result<T, Error>
    where
        F: Fn(Conn) -> R,
        R: Future<Output = Result<Response<T>, Status>>,
    {
        let channel = connect(pool.service, address, limit).await?;
        let conn = InterceptedService::new(channel, cluster.bearer.clone());
        match tokio::time::timeout(limit, op(conn)).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => {
                let error = Error::of_status(pool.service, &address.url, &status);
                if matches!(error, Error::Broken { .. }) {
                    // The next try connects anew, and thereby learns whether anybody is there.
                    *address.channel.lock().await = None;
                }
                Err(error)
            }
            Err(_) => Err(Error::NoAnswer {
                service: pool.service,
                address: address.url.clone(),
                after: limit,
            }),
        }
    }
}

fn join<'a>(urls: impl Iterator<Item = &'a str>) -> String {
    urls.collect::<Vec<_>>().join(", ")
}

async fn connect(
    service: &'static str,
    address: &Address,
    limit: Duration,
) -> Result<Channel, Error> {
    let mut slot = address.channel.lock().await;
    if let Some(channel) = &*slot {
        return Ok(channel.clone());
    }
    if address.url.starts_with("https://") {
        let text = format!("{}: this release speaks http:// only", address.url);
        return Err(Error::Usage(text));
    }
    let endpoint = Endpoint::from_shared(address.url.clone())
        .map_err(|error| Error::Usage(format!("{}: {}", address.url, innermost(&error))))?
        .connect_timeout(CONNECT.min(limit))
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE_ANSWER)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES);
    let unreachable = |cause: String| Error::Unreachable {
        service,
        address: address.url.clone(),
        cause,
    };
    match tokio::time::timeout(CONNECT.min(limit), endpoint.connect()).await {
        Ok(Ok(channel)) => {
            *slot = Some(channel.clone());
            Ok(channel)
        }
        Ok(Err(error)) => Err(unreachable(innermost(&error))),
        Err(_) => Err(unreachable("no answer to the connect".to_owned())),
    }
}
