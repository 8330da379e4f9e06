//! What is deployed: an in-memory projection of the infra events, kept current.
//!
//! The events are few and kept for ever, so the view is rebuilt from the first one at every start.
//! Everyone who needs to know agents, models or scale settings holds an [`InfraView`]; the registry
//! serves it to clients.

use crate::{Error, WorkerCx};
use futures::StreamExt;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tracing::Instrument;
use vlinder_bus::{Bus, Message, Stored, StreamName, Subject, subjects};
use vlinder_core::manifest::AgentManifest;
use vlinder_core::record::InfraEvent;
use vlinder_core::{AgentName, ContentHash, Namespace, NodeHash};

/// Event kind: an agent, body [`AgentVersion`].
pub const AGENT: &str = "agent";
/// Event kind: a model that some upstream has offered at least once; name `<backend>/<model>`.
pub const MODEL: &str = "model";
/// Event kind: live worker counts of a node, body `{role: count}`; name = the node.
pub const SCALE: &str = "scale";
/// Event kind: a fleet, body `{entry: alias, agents: {alias: agent}}`.
pub const FLEET: &str = "fleet";
/// Event kind: a secret; body is ciphertext.
pub const SECRET: &str = "secret";

/// Event kind: which image the name in an agent's manifest meant when a version of it was deployed.
pub const IMAGE: &str = "image";

/// How long a change may take to show in a view that waits for it.
const CATCH_UP_DEADLINE: Duration = Duration::from_secs(10);

/// A deployed agent, as the log has it.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct AgentVersion {
    /// Its manifest.
    pub manifest: AgentManifest,
    /// The gzipped tar of its directory, in the blob store; absent for images and functions.
    pub bundle: Option<ContentHash>,
    /// Size of the bundle in bytes.
    pub bundle_len: u64,
}

/// One named thing as it is now.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The event that set it.
    pub hash: NodeHash,
    /// Its sequence in `CTL`: the version that machines compare.
    pub seq: u64,
    /// How often the name was set so far: the version that people see, 1, 2, 3. A delete does not begin
    /// it anew.
    pub number: u64,
    /// When it was set, milliseconds since the Unix epoch, by the log's clock.
    pub time_ms: u64,
    /// The value: a JSON document; `None` after a delete.
    pub value: Option<serde_json::Value>,
    /// The value of an agent, read once.
    agent: Option<Arc<AgentVersion>>,
}

/// Everything that is set, by kind and name. Deleted names stay, without a value, because the next
/// event on them must know its predecessor.
#[derive(Debug, Clone, Default)]
pub struct Infra {
    entries: BTreeMap<(String, String), Entry>,
    /// The last sequence of `CTL` that is in here.
    pub seq: u64,
}

impl Infra {
    /// The entry of a name, deleted or not.
    pub fn entry(&self, what: &str, name: &str) -> Option<&Entry> {
        self.entries.get(&(what.to_owned(), name.to_owned()))
    }

    /// All live entries of a kind, by name.
    pub fn all<'a>(&'a self, what: &'a str) -> impl Iterator<Item = (&'a str, &'a Entry)> {
        let live = self
            .entries
            .iter()
            .filter(move |((kind, _), entry)| kind == what && entry.value.is_some());
        live.map(|((_, name), entry)| (name.as_str(), entry))
    }

    /// A deployed agent.
    pub fn agent(&self, name: &AgentName) -> Option<(Arc<AgentVersion>, &Entry)> {
        let entry = self.entry(AGENT, name.as_str())?;
        Some((entry.agent.clone()?, entry))
    }

    /// All deployed agents.
    pub fn agents(&self) -> Vec<(Arc<AgentVersion>, &Entry)> {
        self.all(AGENT)
            .filter_map(|(_, entry)| Some((entry.agent.clone()?, entry)))
            .collect()
    }

    /// Whether any upstream of `backend` has ever offered `model`.
    pub fn model_known(&self, backend: &str, model: &str) -> bool {
        self.entry(MODEL, &format!("{backend}/{model}"))
            .is_some_and(|entry| entry.value.is_some())
    }

    fn apply(&mut self, stored: &Stored, event: InfraEvent, value: Option<serde_json::Value>) {
        let is_agent = event.what == AGENT;
        let agent = value.clone().filter(|_| is_agent);
        let key = (event.what, event.name);
        let before = self.entries.get(&key).map_or(0, |entry| entry.number);
        let entry = Entry {
            hash: stored.hash,
            seq: stored.seq,
            number: before + u64::from(event.verb == "set"),
            time_ms: stored.time_ms,
            value,
            agent: agent.and_then(|value| Some(Arc::new(serde_json::from_value(value).ok()?))),
        };
        self.entries.insert(key, entry);
        self.seq = stored.seq;
    }
}

/// A live view of what is deployed; cheap to clone.
#[derive(Clone)]
pub struct InfraView {
    rx: watch::Receiver<Arc<Infra>>,
    bus: Bus,
    ns: Namespace,
}

impl InfraView {
    /// Reads everything and keeps following in a task that ends with `cx.drain` or the last view.
    pub async fn start(cx: &WorkerCx) -> Result<Self, Error> {
        let (bus, ns) = (cx.bus.clone(), cx.ns.clone());
        let stream = StreamName::Ctl(ns.clone());
        let mut follow = bus.follow(&stream, &subjects::infra_of(&ns), 1).await?;
        let target = last_infra_seq(&bus, &ns).await?;
        let mut infra = Infra::default();
        let deadline = tokio::time::Instant::now() + CATCH_UP_DEADLINE;
        while infra.seq < target {
            let item = tokio::time::timeout_at(deadline, follow.next()).await;
            let Ok(Some(item)) = item else {
                return Err(Error::Other(
                    "reading the deployments took longer than 10 s".to_owned(),
                ));
            };
            take(&bus, &mut infra, item).await;
        }
        let (tx, rx) = watch::channel(Arc::new(infra.clone()));
        let task_bus = bus.clone();
        let following = async move {
            loop {
                tokio::select! {
                    () = tx.closed() => return,
                    item = follow.next() => match item {
                        Some(item) => {
                            if take(&task_bus, &mut infra, item).await {
                                tx.send_replace(Arc::new(infra.clone()));
                            }
                        }
                        None => return,
                    },
                }
            }
        };
        tokio::spawn(following.in_current_span());
        Ok(Self { rx, bus, ns })
    }

    /// What is deployed now, as far as this view knows.
    pub fn now(&self) -> Arc<Infra> {
        self.rx.borrow().clone()
    }

    /// Waits for the next change. `Err` when the bus is closed.
    pub async fn changed(&mut self) -> Result<(), watch::error::RecvError> {
        self.rx.changed().await
    }

    /// What is deployed, including everything that was confirmed before this call, by anyone.
    pub async fn fresh(&self) -> Result<Arc<Infra>, Error> {
        let target = last_infra_seq(&self.bus, &self.ns).await?;
        self.at_least(target).await
    }

    /// Waits until the view contains sequence `seq`.
    pub async fn at_least(&self, seq: u64) -> Result<Arc<Infra>, Error> {
        let mut rx = self.rx.clone();
        let reached = rx.wait_for(|infra| infra.seq >= seq);
        match tokio::time::timeout(CATCH_UP_DEADLINE, reached).await {
            Ok(Ok(infra)) => Ok(infra.clone()),
            _ => Err(Error::Other(
                "the view of the deployments lags more than 10 s behind".to_owned(),
            )),
        }
    }

    /// Appends an event on a name, after the one that this view knows; `Conflict` if somebody
    /// else's came first. Returns its sequence.
    pub async fn append(
        &self,
        what: &str,
        name: &str,
        value: Option<&serde_json::Value>,
    ) -> Result<u64, vlinder_bus::Error> {
        let infra = self.now();
        let previous = infra.entry(what, name);
        let body = value.map(ToString::to_string).unwrap_or_default();
        let event = InfraEvent {
            namespace: self.ns.clone(),
            what: what.to_owned(),
            name: name.to_owned(),
            verb: if value.is_some() { "set" } else { "delete" }.to_owned(),
        };
        let parents = previous.map(|entry| vec![entry.hash]).unwrap_or_default();
        let node = event.to_node(parents, body.as_bytes());
        let subject = Subject::Infra {
            ns: self.ns.clone(),
            what: what.to_owned(),
            name: name.to_owned(),
        };
        let message = Message::new(StreamName::Ctl(self.ns.clone()), subject, node, body.into())
            .expecting(previous.map_or(0, |entry| entry.seq));
        Ok(self.bus.append(message).await?.seq)
    }
}

async fn take(bus: &Bus, infra: &mut Infra, item: Result<Stored, vlinder_bus::Error>) -> bool {
    let stored = match item {
        Ok(stored) => stored,
        Err(error) => {
            tracing::warn!(%error, "left out of the view of deployments");
            if let vlinder_bus::Error::Undecodable { seq, .. } = error {
                infra.seq = infra.seq.max(seq);
            }
            return false;
        }
    };
    let Ok(event) = InfraEvent::try_from(&stored.node) else {
        return false;
    };
    let value = if event.verb == "set" {
        match bus.load(&stored.body).await {
            Ok(body) => serde_json::from_slice(&body).ok(),
            Err(error) => {
                tracing::warn!(%error, "a deployment's body cannot be read");
                None
            }
        }
    } else {
        None
    };
    infra.apply(&stored, event, value);
    true
}

async fn last_infra_seq(bus: &Bus, ns: &Namespace) -> Result<u64, vlinder_bus::Error> {
    let stream = StreamName::Ctl(ns.clone());
    bus.last_seq(&stream, &subjects::infra_of(ns)).await
}
