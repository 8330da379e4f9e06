//! The container launcher: an instance is a Docker container that has no network at all but the bridge.
//!
//! A container gets no network interface except its own loopback. What it finds there as the bridge, and
//! how it is reached from here, goes through sockets that its first process lends to this worker
//! ([`link`], docs/adr/0006). So there is no network to make, no gateway, no port of this machine that
//! it could see, and whoever calls through its socket is known without any secret.
//!
//! Containers outlive this worker: after a kill the next one finds them by their labels and goes on with
//! those that had no turn; those that had one are replaced, since what they still do is not on
//! record. A drained worker removes its containers. Whatever nobody claims is swept up.

mod body;
mod engine;
mod files;
mod image;
mod instance;
mod labels;
mod link;
mod output;

use crate::launcher::{Instance, LaunchError, LaunchSpec, Launcher};
use crate::logs::{AgentLogs, Live};
use async_trait::async_trait;
use engine::Engine;
use files::Files;
use image::Images;
use instance::{ContainerInstance, Remains};
use labels::Labels;
use link::Link;
use std::collections::HashSet;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use vlinder_core::AgentName;
use vlinder_core::manifest::RuntimeKind;
use vlinder_worker::infra::InfraView;
use vlinder_worker::{Error, WorkerCx, replicas};

/// Lines that a message about an instance's end quotes.
const LAST_LINES: usize = 5;
/// How long the replicas of this node have to take their containers up again before those that are
/// left are swept up.
const SWEEP_AFTER: Duration = Duration::from_secs(10);
/// How long the engine may take to tell that a container has ended, and why.
const END_KNOWN_WITHIN: Duration = Duration::from_secs(1);
/// How long the first process of a container that is taken up again may take to come.
const ADOPT_MAX: Duration = Duration::from_secs(3);

/// What the container launcher is told.
#[derive(Debug, Clone)]
pub struct ContainerOptions {
    /// `auto`, a socket or a URL.
    pub docker_host: String,
    /// Whether a version runs the image that its name meant when it was deployed, for ever.
    pub pinned: bool,
}

/// Starts agents as containers.
pub struct ContainerLauncher {
    cx: WorkerCx,
    engine: Engine,
    images: Images,
    files: Files,
    labels: Labels,
    logs: Arc<AgentLogs>,
    /// Names of the containers that this worker has or makes.
    ours: Arc<Ours>,
}

impl ContainerLauncher {
    /// Waits for the engine. `None`: the worker drains before it comes.
    pub async fn start(
        cx: &WorkerCx,
        options: ContainerOptions,
        live: Live,
    ) -> Result<Option<Self>, Error> {
        let Some(engine) = Engine::wait(cx, &options.docker_host).await else {
            return Ok(None);
        };
        let node = cx.id.node.to_string();
        let logs = AgentLogs::new(cx.data_dir.join("logs").join("agents"), &node, live);
        let files = Files::prepare(&cx.data_dir).map_err(|source| Error::Io {
            what: "cannot prepare the directory that containers are given".to_owned(),
            source,
        })?;
        let infra = InfraView::start(cx).await?;
        Ok(Some(Self {
            images: Images::new(engine.clone(), infra, options.pinned),
            labels: Labels::of(cx, files.id()),
            engine,
            files,
            logs: Arc::new(logs),
            ours: Arc::default(),
            cx: cx.clone(),
        }))
    }

    /// Watches the engine, and sweeps up what nobody has claimed.
    pub async fn watch(&self) -> Infallible {
        let sweeping = async {
            tokio::time::sleep(SWEEP_AFTER).await;
            if let Err(error) = self.sweep().await {
                tracing::warn!(%error, "containers that nobody has claimed could not be swept up");
            }
            std::future::pending::<Infallible>().await
        };
        tokio::select! {
            never = self.engine.watch(&self.cx, &self.labels) => never,
            never = sweeping => never,
        }
    }

    /// Removes this node's containers that stand for no replica: ours that we do not hold, and those of
    /// other workers whose claim is gone.
    async fn sweep(&self) -> Result<(), Error> {
        let failed =
            |error| Error::Other(format!("the engine does not list its containers: {error}"));
        let found = self
            .engine
            .list(self.labels.of_node())
            .await
            .map_err(failed)?;
        let claims = replicas::read_all(&self.cx.bus).await?;
        for container in &found {
            let is_claimed = claims.iter().any(|(agent, replica, _, claim)| {
                container.is_replica(agent, *replica)
                    && claim.node == self.cx.id.node.as_str()
                    && claim.role == self.cx.id.role.as_str()
                    && claim.index == container.worker
            });
            let is_wanted = match container.worker == self.cx.id.index {
                true => self.ours.has(&container.name),
                false => is_claimed,
            };
            if !is_wanted && !self.ours.has(&container.name) {
                tracing::info!(
                    container = container.name,
                    "removing a container that nobody has claimed"
                );
                self.discard(&container.name).await;
            }
        }
        let known: Vec<_> = found.into_iter().map(|container| container.name).collect();
        self.files
            .sweep(|name| known.iter().any(|known| known == name) || self.ours.has(name));
        Ok(())
    }

    async fn discard(&self, name: &str) {
        if let Err(error) = self.engine.remove(name).await {
            tracing::warn!(container = name, %error, "a container could not be removed");
        }
        self.files.remove(name);
    }

    /// Goes on with a container of this replica that a worker before us left without a turn; removes
    /// the others.
    async fn adopt(&self, spec: &LaunchSpec) -> Result<Option<Box<dyn Instance>>, LaunchError> {
        let found = self.engine.list(self.labels.of_replica(spec)).await;
        let found = found.map_err(|error| LaunchError::Engine(error.to_string()))?;
        let mut adopted: Option<Box<dyn Instance>> = None;
        for container in found {
            let Some(held) = self.ours.take(&container.name) else {
                // It is that of the version before, which ends when we are ready.
                continue;
            };
            let is_fit = adopted.is_none()
                && container.runs
                && container.version == spec.deployment.version
                && self.files.is_idle(&container.name);
            let remains = Remains::new(self, held);
            match is_fit {
                true => adopted = self.take_up(spec, remains).await,
                false => remains.remove().await,
            }
        }
        Ok(adopted)
    }

    async fn take_up(&self, spec: &LaunchSpec, remains: Remains) -> Option<Box<dyn Instance>> {
        let name = remains.name().to_owned();
        let link = Link::open(&self.files.directory(&name), spec.face.clone()).ok()?;
        let instance = ContainerInstance::of(self, spec, link.clone(), remains)
            .await
            .ok()?;
        // One whose first process does not come to us is of no use.
        tokio::time::timeout(ADOPT_MAX, link.up()).await.ok()?;
        tracing::info!(container = name, "going on with a running container");
        Some(Box::new(instance))
    }

    async fn create(&self, spec: &LaunchSpec) -> Result<Box<dyn Instance>, LaunchError> {
        let image = self.images.find(&spec.deployment).await?;
        let name = Labels::fresh_name(spec);
        let io = |what| move |source| LaunchError::Io { what, source };
        let held = self.ours.take(&name);
        let held = held.ok_or_else(|| LaunchError::Engine(format!("{name} exists twice")))?;
        let remains = Remains::new(self, held);
        self.files
            .make(&name)
            .map_err(io("the container's directory cannot be made"))?;
        let link = Link::open(&self.files.directory(&name), spec.face.clone());
        let link = link.map_err(io("the container's socket cannot be made"))?;
        let body = body::of(
            spec,
            &image,
            &self.files,
            &name,
            self.engine.cpus(),
            self.labels.of_new(spec),
        )?;
        self.engine.create(&name, body).await?;
        self.logs
            .begin(spec.deployment.name().as_str(), spec.replica);
        self.engine.start(&name).await?;
        let instance = ContainerInstance::with(self, spec, link, remains).await?;
        Ok(Box::new(instance))
    }
}

#[async_trait]
impl Launcher for ContainerLauncher {
    fn kind(&self) -> RuntimeKind {
        RuntimeKind::Container
    }

    async fn launch(&self, spec: &LaunchSpec) -> Result<Box<dyn Instance>, LaunchError> {
        match self.adopt(spec).await? {
            Some(adopted) => Ok(adopted),
            None => self.create(spec).await,
        }
    }

    fn end_known_within(&self) -> Duration {
        END_KNOWN_WITHIN
    }

    fn last_lines(&self, spec: &LaunchSpec) -> Vec<String> {
        let agent = spec.deployment.name().as_str();
        self.logs.last_lines(agent, spec.replica, LAST_LINES)
    }

    async fn forget(&self, agent: &AgentName) {
        self.logs.forget(agent.as_str());
        let found = match self.engine.list(self.labels.of_agent(agent)).await {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(%agent, %error, "whether the agent left containers is not known");
                return;
            }
        };
        for container in found {
            if container.worker == self.cx.id.index && !self.ours.has(&container.name) {
                self.discard(&container.name).await;
            }
        }
    }
}

/// Which containers this worker holds.
#[derive(Debug, Default)]
struct Ours(Mutex<HashSet<String>>);

impl Ours {
    fn take(self: &Arc<Self>, name: &str) -> Option<Hold> {
        let is_new = self.lock().insert(name.to_owned());
        is_new.then(|| Hold {
            name: name.to_owned(),
            all: self.clone(),
        })
    }

    fn has(&self, name: &str) -> bool {
        self.lock().contains(name)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A container that is ours until this is dropped.
#[derive(Debug)]
struct Hold {
    name: String,
    all: Arc<Ours>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.all.lock().remove(&self.name);
    }
}
