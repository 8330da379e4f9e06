//! The loop of a runtime worker: brings the replicas that run here toward what is deployed.
//!
//! It is woken by changes (deployments, claims, nodes) and by the moments at which a claim becomes
//! void; one idempotent pass then does whatever is to be done.

use crate::agent::{Agent, Shared};
use crate::claims::{self, Liveness, Owner, Verdict};
use crate::holder::{self, Held};
use crate::launcher::Deployment;
use crate::pool::Pool;
use crate::replica::Status;
use crate::turn::TurnHandler;
use futures::StreamExt;
use futures::stream::BoxStream;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;
use vlinder_bus::streams::{BUCKET_NODES, BUCKET_REPLICAS};
use vlinder_bus::{KvEntry, KvEvent, QueueSpec, subjects};
use vlinder_core::AgentName;
use vlinder_worker::infra::{Infra, InfraView};
use vlinder_worker::nodes::NodeReport;
use vlinder_worker::replicas::{self, ReplicaClaim};
use vlinder_worker::{Error, serve_queue_in};

/// Pause before a broken watch is begun again.
const WATCH_RETRY: Duration = Duration::from_millis(500);
/// Pause before a replica is claimed again after that failed.
const CLAIM_RETRY: Duration = Duration::from_millis(500);
/// How long claims may take to be read at the start.
const CATCH_UP_MAX: Duration = Duration::from_secs(10);

type Watch = BoxStream<'static, Result<KvEvent, vlinder_bus::Error>>;

/// An agent of which replicas run here.
struct Running {
    agent: Arc<Agent>,
    wanted: watch::Sender<Arc<Deployment>>,
    held: HashMap<u32, Held>,
    /// Ends the pulling of its turns.
    queue: CancellationToken,
}

pub(crate) struct Fleet {
    shared: Arc<Shared>,
    liveness: Liveness,
    claims: BTreeMap<(AgentName, u32), (ReplicaClaim, u64)>,
    /// Since when a replica is seen without a living owner.
    free_since: HashMap<(AgentName, u32), Instant>,
    running: HashMap<AgentName, Running>,
    /// Replicas that run or end here.
    replicas: JoinSet<(AgentName, u32)>,
    /// Agents whose turns are pulled.
    queues: JoinSet<(AgentName, Result<(), Error>)>,
}

impl Fleet {
    pub fn new(shared: Arc<Shared>, labels: BTreeMap<String, String>) -> Self {
        let id = &shared.cx.id;
        let me = Owner {
            node: id.node.to_string(),
            index: id.index,
        };
        let liveness = Liveness::new(me, id.role.to_string(), labels, Instant::now());
        Self {
            shared,
            liveness,
            claims: BTreeMap::new(),
            free_since: HashMap::new(),
            running: HashMap::new(),
            replicas: JoinSet::new(),
            queues: JoinSet::new(),
        }
    }

    /// Runs until the worker drains and all turns are finished.
    pub async fn run(mut self, drain_within: Duration) -> Result<(), Error> {
        let drain = self.shared.cx.drain.clone();
        let mut infra = self.shared.infra.clone();
        let mut nodes = self.watch(BUCKET_NODES).await?;
        let mut claims = self.watch(BUCKET_REPLICAS).await?;
        self.catch_up(&mut nodes, &mut claims).await?;
        let mut is_ready = false;
        let mut wake: Option<Instant>;
        loop {
            wake = self.pass(&infra).await;
            if !is_ready {
                self.shared.cx.control.ready();
                is_ready = true;
            }
            // Node reports come every second and rarely change anything.
            loop {
                let until = wake.unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
                tokio::select! {
                    biased;
                    () = drain.cancelled() => return self.drain(drain_within).await,
                    changed = infra.changed() => {
                        if changed.is_err() {
                            return Err(Error::Other("the view of the deployments ended".to_owned()));
                        }
                        break;
                    }
                    event = claims.next() => {
                        match event {
                            Some(Ok(event)) => self.take_claim(event),
                            other => claims = self.watch_again(BUCKET_REPLICAS, other).await?,
                        }
                        break;
                    }
                    event = nodes.next() => match event {
                        Some(Ok(event)) => {
                            if self.take_node(event) {
                                break;
                            }
                        }
                        other => nodes = self.watch_again(BUCKET_NODES, other).await?,
                    },
                    Some(ended) = self.replicas.join_next() => {
                        let key = joined(ended)?;
                        if let Some(running) = self.running.get_mut(&key.0) {
                            running.held.remove(&key.1);
                        }
                        // It ended with its claim; what stands there now may be told already or not.
                        self.read_claim(&key).await;
                        break;
                    }
                    Some(ended) = self.queues.join_next() => {
                        let (agent, outcome) = joined(ended)?;
                        outcome?;
                        let is_wanted = self.running.contains_key(&agent) || infra.now().agent(&agent).is_some();
                        if !is_wanted {
                            self.shared.launcher.forget(&agent).await;
                        }
                    }
                    () = tokio::time::sleep_until(until), if wake.is_some() => break,
                }
            }
        }
    }

    async fn watch(&self, bucket: &str) -> Result<Watch, Error> {
        Ok(self.shared.cx.bus.kv_watch(bucket).await?)
    }

    async fn watch_again(
        &self,
        bucket: &str,
        ended: Option<Result<KvEvent, vlinder_bus::Error>>,
    ) -> Result<Watch, Error> {
        if let Some(Err(error)) = ended {
            tracing::warn!(bucket, %error, "a watch broke, beginning it again");
        }
        tokio::time::sleep(WATCH_RETRY).await;
        self.watch(bucket).await
    }

    /// Nothing is decided before it is known who runs what.
    async fn catch_up(&mut self, nodes: &mut Watch, claims: &mut Watch) -> Result<(), Error> {
        let all = async {
            while let Some(event) = nodes.next().await {
                match event? {
                    KvEvent::Current => break,
                    event => drop(self.take_node(event)),
                }
            }
            while let Some(event) = claims.next().await {
                match event? {
                    KvEvent::Current => break,
                    event => self.take_claim(event),
                }
            }
            Ok(())
        };
        match tokio::time::timeout(CATCH_UP_MAX, all).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::Other(
                "reading the claims took longer than 10 s".to_owned(),
            )),
        }
    }

    fn take_claim(&mut self, event: KvEvent) {
        match event {
            KvEvent::Put(entry) => self.put_claim(&entry),
            KvEvent::Gone { key } => {
                if let Some(key) = replicas::parse_key(&key) {
                    self.claims.remove(&key);
                }
            }
            KvEvent::Current => {}
        }
    }

    fn put_claim(&mut self, entry: &KvEntry) {
        let claim = serde_json::from_slice::<ReplicaClaim>(&entry.value);
        if let (Some(key), Ok(claim)) = (replicas::parse_key(&entry.key), claim) {
            self.free_since.remove(&key);
            self.claims.insert(key, (claim, entry.revision));
        }
    }

    /// Whether other workers live now than before.
    fn take_node(&mut self, event: KvEvent) -> bool {
        let now = Instant::now();
        let before = self.liveness.live(now);
        match event {
            KvEvent::Put(entry) => {
                let age_ms = self.shared.cx.bus.now_ms().saturating_sub(entry.time_ms);
                let written = now.checked_sub(Duration::from_millis(age_ms));
                if let (Ok(report), Some(written)) =
                    (serde_json::from_slice::<NodeReport>(&entry.value), written)
                {
                    self.liveness.report(&report, written);
                }
            }
            KvEvent::Gone { key } => {
                if let Some(node) = subjects::decode(&key) {
                    self.liveness.forget(&node);
                }
            }
            KvEvent::Current => {}
        }
        before != self.liveness.live(now)
    }

    /// Does whatever is to be done now. When to look again, if nothing happens before.
    async fn pass(&mut self, infra: &InfraView) -> Option<Instant> {
        let infra = infra.now();
        let deployed = self.deployed(&infra);
        self.remove_undeployed(&deployed);
        let now = Instant::now();
        let live = self.liveness.live(now);
        let mut wake: Option<Instant> = None;
        for deployment in deployed.values() {
            for index in 0..self.indexes_of(deployment) {
                let key = (deployment.name().clone(), index);
                let claim = self.claims.get(&key);
                let free_since = self.free_since.get(&key).copied();
                let manifest = deployment.manifest();
                match claims::decide(
                    &self.liveness,
                    &live,
                    manifest,
                    index,
                    claim,
                    free_since,
                    now,
                ) {
                    Verdict::Ours => self.run_here(deployment, index),
                    Verdict::Claim(revision) => {
                        let again = self.claim(deployment, index, revision).await;
                        wake = [wake, again].into_iter().flatten().min();
                    }
                    Verdict::Leave(until) => {
                        self.leave(&key);
                        wake = [wake, until].into_iter().flatten().min();
                        if let Some(until) = until {
                            // It is free from the moment on at which its claim is void.
                            let free = if claim_is_held(&self.claims, &self.liveness, &key, now) {
                                until
                            } else {
                                now
                            };
                            self.free_since.entry(key).or_insert(free);
                        }
                    }
                }
            }
            self.tell_wanted(deployment);
        }
        self.sweep(&deployed, now).await;
        self.free_since
            .retain(|(agent, _), _| deployed.contains_key(agent));
        self.mark_failing();
        wake
    }

    fn deployed(&self, infra: &Infra) -> BTreeMap<AgentName, Arc<Deployment>> {
        let kind = self.shared.launcher.kind();
        let ours = infra
            .agents()
            .into_iter()
            .filter(|(agent, _)| agent.manifest.runtime == kind);
        ours.map(|(agent, entry)| {
            let deployment = Deployment {
                version: entry.seq,
                agent: (*agent).clone(),
            };
            (deployment.name().clone(), Arc::new(deployment))
        })
        .collect()
    }

    /// Replicas to decide about: those wanted, and those that run here from when more were wanted.
    fn indexes_of(&self, deployment: &Deployment) -> u32 {
        let here = self.running.get(deployment.name());
        let held = here
            .into_iter()
            .flat_map(|running| running.held.keys().copied());
        let most = held.max().map_or(0, |index| index + 1);
        most.max(deployment.manifest().replicas)
    }

    fn remove_undeployed(&mut self, deployed: &BTreeMap<AgentName, Arc<Deployment>>) {
        self.running.retain(|name, running| {
            if deployed.contains_key(name) {
                return true;
            }
            running.agent.deleted.cancel();
            running.agent.pool.close();
            running.queue.cancel();
            for held in running.held.values() {
                held.stop.cancel();
            }
            false
        });
    }

    fn tell_wanted(&self, deployment: &Arc<Deployment>) {
        if let Some(running) = self.running.get(deployment.name()) {
            running.wanted.send_if_modified(|wanted| {
                let is_new = wanted.version != deployment.version;
                if is_new {
                    *wanted = deployment.clone();
                }
                is_new
            });
        }
    }

    /// A replica that is not ours (any more).
    fn leave(&mut self, (agent, index): &(AgentName, u32)) {
        let held = self
            .running
            .get(agent)
            .and_then(|running| running.held.get(index));
        if let Some(held) = held {
            held.stop.cancel();
        }
    }

    /// Claims a replica and runs it; if that did not work, when to look again.
    async fn claim(
        &mut self,
        deployment: &Arc<Deployment>,
        index: u32,
        revision: u64,
    ) -> Option<Instant> {
        let key = (deployment.name().clone(), index);
        let running = self.running.get(&key.0);
        if running.is_some_and(|running| running.held.contains_key(&index)) {
            // Its claim has vanished, or it ends already: when it has ended it is claimed anew.
            self.leave(&key);
            return None;
        }
        let id = &self.shared.cx.id;
        let claim = ReplicaClaim {
            node: id.node.to_string(),
            role: id.role.to_string(),
            index: id.index,
            version: deployment.version,
            state: "starting".to_owned(),
            ..ReplicaClaim::default()
        };
        let value = serde_json::to_vec(&claim).unwrap_or_default();
        let name = replicas::replica_key(&key.0, index);
        let bus = &self.shared.cx.bus;
        match bus
            .kv_put(BUCKET_REPLICAS, &name, value.into(), Some(revision))
            .await
        {
            Ok(revision) => {
                self.free_since.remove(&key);
                self.claims.insert(key, (claim, revision));
                self.run_here(deployment, index);
            }
            Err(error) => {
                if !matches!(error, vlinder_bus::Error::KvConflict { .. }) {
                    tracing::warn!(agent = %key.0, replica = index, %error, "a replica cannot be claimed");
                }
                // Somebody was faster, or it is to be tried again.
                self.read_claim(&key).await;
                return Some(Instant::now() + CLAIM_RETRY);
            }
        }
        None
    }

    /// Asks how a claim stands.
    async fn read_claim(&mut self, key: &(AgentName, u32)) {
        let name = replicas::replica_key(&key.0, key.1);
        match self
            .shared
            .cx
            .bus
            .backend()
            .kv_get(BUCKET_REPLICAS, &name)
            .await
        {
            Ok(Some(entry)) => self.put_claim(&entry),
            Ok(None) => drop(self.claims.remove(key)),
            Err(error) => {
                tracing::debug!(agent = %key.0, replica = key.1, %error, "a claim cannot be read")
            }
        }
    }

    /// Removes claims that stand for nothing: ours that we do not hold, and those of dead workers on
    /// replicas that nobody wants.
    async fn sweep(&mut self, deployed: &BTreeMap<AgentName, Arc<Deployment>>, now: Instant) {
        let me = &self.shared.cx.id;
        let is_void = |((agent, index), (claim, _)): &(&(AgentName, u32), &(ReplicaClaim, u64))| {
            let owner = claims::owner_of(claim);
            let is_ours = claim.node == me.node.as_str() && claim.index == me.index;
            let is_held = || {
                let running = self.running.get(agent);
                running.is_some_and(|running| running.held.contains_key(index))
            };
            let is_wanted = || {
                let deployment = deployed.get(agent);
                deployment.is_some_and(|deployment| *index < deployment.manifest().replicas)
            };
            claim.role == me.role.as_str()
                && match is_ours {
                    true => !is_held(),
                    false => !is_wanted() && self.liveness.lives_until(&owner, now).is_none(),
                }
        };
        let void = self.claims.iter().filter(is_void);
        let void: Vec<_> = void
            .map(|(key, (_, revision))| (key.clone(), *revision))
            .collect();
        for (key, revision) in void {
            let name = replicas::replica_key(&key.0, key.1);
            let bus = &self.shared.cx.bus;
            match bus.kv_delete(BUCKET_REPLICAS, &name, Some(revision)).await {
                Ok(()) => drop(self.claims.remove(&key)),
                Err(_) => self.read_claim(&key).await,
            }
        }
    }

    /// Runs a replica that is claimed for us.
    fn run_here(&mut self, deployment: &Arc<Deployment>, index: u32) {
        let name = deployment.name().clone();
        let Some((_, revision)) = self.claims.get(&(name.clone(), index)) else {
            return;
        };
        let revision = *revision;
        if !self.running.contains_key(&name) {
            let running = self.begin(deployment);
            self.running.insert(name.clone(), running);
        }
        let Some(running) = self.running.get_mut(&name) else {
            return;
        };
        if running.held.contains_key(&index) {
            return;
        }
        let (status_tx, status) = watch::channel(Status::default());
        let stop = CancellationToken::new();
        let agent = running.agent.clone();
        let wanted = running.wanted.subscribe();
        let life = holder::hold(agent, index, revision, wanted, status_tx, stop.clone());
        running.held.insert(index, Held { status, stop });
        self.replicas.spawn(life.in_current_span());
    }

    /// The first replica of an agent here: its turns are pulled as soon as one is ready.
    fn begin(&mut self, deployment: &Arc<Deployment>) -> Running {
        let name = deployment.name().clone();
        let agent = Arc::new(Agent {
            shared: self.shared.clone(),
            name: name.clone(),
            pool: Arc::new(Pool::new()),
            deleted: CancellationToken::new(),
        });
        let mut cx = self.shared.cx.clone();
        let queue = cx.drain.child_token();
        cx.drain = queue.clone();
        let spec = QueueSpec {
            stream: cx.log(),
            name: subjects::agent_queue(&name),
            filter: subjects::invokes_of(&cx.ns, &name),
            from_start: true,
        };
        let delegations = QueueSpec {
            name: subjects::delegation_queue(&name),
            filter: subjects::delegations_to(&cx.ns, &name),
            ..spec.clone()
        };
        let handler = Arc::new(TurnHandler(agent.clone()));
        let slots = agent.pool.slots().clone();
        let delegated = agent.pool.delegated_slots().clone();
        let serving = async move {
            let outcome = tokio::try_join!(
                serve_queue_in(&cx, spec, slots, handler.clone()),
                serve_queue_in(&cx, delegations, delegated, handler),
            );
            (name, outcome.map(|_| ()))
        };
        self.queues.spawn(serving.in_current_span());
        Running {
            agent,
            wanted: watch::Sender::new(deployment.clone()),
            held: HashMap::new(),
            queue,
        }
    }

    /// Where no replica of an agent anywhere shows a sign of ever being ready, its turns end with the
    /// reason instead of waiting for their deadlines.
    fn mark_failing(&self) {
        for (name, running) in &self.running {
            let own = running
                .held
                .values()
                .map(|held| held.status.borrow().clone());
            let own: Vec<Status> = own.collect();
            let me = &self.shared.cx.id;
            let mut others = self.claims.iter().filter(|((agent, _), (claim, _))| {
                agent == name && (claim.node != me.node.as_str() || claim.index != me.index)
            });
            let is_hopeless = !own.is_empty()
                && own.iter().all(Status::is_hopeless)
                && others.all(|(_, (claim, _))| claim.state == "crash-looping");
            let why = own
                .iter()
                .map(|status| status.reason.as_str())
                .find(|why| !why.is_empty());
            let why = why.unwrap_or("no reason is known");
            running.agent.pool.set_failing(
                is_hopeless.then(|| format!("no instance of the agent becomes ready: {why}")),
            );
        }
    }

    /// Turns are pulled no more (the queues have the worker's drain); those that run are finished,
    /// then the replicas end and their claims are given up.
    async fn drain(mut self, within: Duration) -> Result<(), Error> {
        let finish = async {
            while let Some(ended) = self.queues.join_next().await {
                joined(ended)?.1?;
            }
            for held in self
                .running
                .values()
                .flat_map(|running| running.held.values())
            {
                held.stop.cancel();
            }
            while self.replicas.join_next().await.is_some() {}
            Ok(())
        };
        match tokio::time::timeout(within, finish).await {
            Ok(outcome) => outcome,
            Err(_) => {
                tracing::warn!(
                    "turns were not finished within the drain deadline; they are handed back"
                );
                self.queues.shutdown().await;
                self.replicas.shutdown().await;
                Ok(())
            }
        }
    }
}

fn joined<T>(ended: Result<T, tokio::task::JoinError>) -> Result<T, Error> {
    ended.map_err(|panic| Error::Other(format!("a task of the runtime ended: {panic}")))
}

fn claim_is_held(
    claims: &BTreeMap<(AgentName, u32), (ReplicaClaim, u64)>,
    liveness: &Liveness,
    key: &(AgentName, u32),
    now: Instant,
) -> bool {
    let claim = claims.get(key);
    claim.is_some_and(|(claim, _)| {
        liveness
            .lives_until(&claims::owner_of(claim), now)
            .is_some()
    })
}
