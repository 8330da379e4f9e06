//! The container engine: Docker, or Podman behind the same API. Every question has a deadline.

use super::labels::{Filter, Found, Labels};
use crate::launcher::LaunchError;
use bollard::errors::Error as DockerError;
use bollard::models::{ContainerCreateBody, ContainerInspectResponse, ContainerSummaryStateEnum};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, EventsOptionsBuilder, ListContainersOptionsBuilder,
    RemoveContainerOptionsBuilder, StopContainerOptionsBuilder,
};
use bollard::{API_DEFAULT_VERSION, Docker};
use futures::StreamExt;
use std::collections::HashMap;
use std::convert::Infallible;
use std::path::Path;
use std::time::Duration;
use tokio::sync::watch;
use vlinder_worker::WorkerCx;

/// How long the engine may take to begin an answer, in seconds. Starting a container on a busy
/// machine takes some.
const ANSWER_MAX_S: u64 = 60;
/// How long it may take to say that it is there.
const PING_MAX: Duration = Duration::from_secs(5);
/// First and longest pause between two looks for an engine that is away.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));
/// How long a container has between SIGTERM and SIGKILL, in seconds.
const STOP_GRACE_S: i32 = 3;

/// The engine; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Engine {
    pub docker: Docker,
    address: String,
    cpus: f64,
    /// Counts how often it came back.
    returns: watch::Sender<u64>,
}

impl Engine {
    /// Waits until it answers. `None`: the worker drains before.
    pub async fn wait(cx: &WorkerCx, host: &str) -> Option<Self> {
        let mut pause = LOOK_AGAIN.0;
        let mut told = String::new();
        loop {
            match Self::connect(host).await {
                Ok(engine) => {
                    cx.control.note("engine", &engine.address);
                    return Some(engine);
                }
                Err(why) => {
                    let why = format!("no Docker: {why}");
                    if told != why {
                        cx.control.waiting(&why);
                        told = why;
                    }
                }
            }
            tokio::select! {
                () = cx.drain.cancelled() => return None,
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(LOOK_AGAIN.1),
            }
        }
    }

    async fn connect(host: &str) -> Result<Self, String> {
        let mut why = "no socket of Docker or Podman is there".to_owned();
        for address in addresses(host) {
            let connected = match address.strip_prefix("unix://") {
                Some(path) if !Path::new(path).exists() => {
                    if host != "auto" {
                        why = format!("{path} does not exist");
                    }
                    continue;
                }
                Some(path) => Docker::connect_with_unix(path, ANSWER_MAX_S, API_DEFAULT_VERSION),
                None => Docker::connect_with_http(&address, ANSWER_MAX_S, API_DEFAULT_VERSION),
            };
            let asked = async { connected?.negotiate_version().await };
            match tokio::time::timeout(PING_MAX, asked).await {
                Ok(Ok(docker)) => {
                    let info = tokio::time::timeout(PING_MAX, docker.info()).await;
                    let info = info.map_err(|_| format!("{address} does not answer"))?;
                    let info = info.map_err(|error| format!("{address}: {}", in_words(&error)))?;
                    return Ok(Self {
                        docker,
                        address,
                        cpus: info.ncpu.unwrap_or(1) as f64,
                        returns: watch::Sender::new(0),
                    });
                }
                Ok(Err(error)) => why = format!("{address}: {}", in_words(&error)),
                Err(_) => why = format!("{address} does not answer"),
            }
        }
        Err(why)
    }

    /// Processors that containers may share.
    pub fn cpus(&self) -> f64 {
        self.cpus
    }

    /// Tells the supervisor when the engine goes away and when it is back.
    pub async fn watch(&self, cx: &WorkerCx, labels: &Labels) -> Infallible {
        let filters = HashMap::from([("label", labels.of_node())]);
        loop {
            let options = EventsOptionsBuilder::new().filters(&filters).build();
            let mut events = self.docker.events(Some(options));
            // What happens to containers is seen by their instances; here it counts that it is told.
            while let Some(Ok(_)) = events.next().await {}
            let mut pause = LOOK_AGAIN.0;
            let mut is_away = false;
            while let Err(why) = self.ping().await {
                if !is_away {
                    let why = format!("no Docker: {} went away: {why}", self.address);
                    tracing::warn!("{why}");
                    cx.control.waiting(&why);
                }
                is_away = true;
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LOOK_AGAIN.1);
            }
            if is_away {
                tracing::info!(engine = self.address, "the container engine is back");
                cx.control.ready();
            }
            self.returns.send_modify(|returns| *returns += 1);
            tokio::time::sleep(LOOK_AGAIN.0).await;
        }
    }

    /// Waits until the engine was away and is back, at most `limit`.
    pub async fn returned(&self, limit: Duration) {
        let mut returns = self.returns.subscribe();
        let _ = tokio::time::timeout(limit, returns.changed()).await;
    }

    async fn ping(&self) -> Result<(), String> {
        match tokio::time::timeout(PING_MAX, self.docker.ping()).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(in_words(&error)),
            Err(_) => Err("it does not answer".to_owned()),
        }
    }

    /// Containers with these labels, in whatever state.
    pub async fn list(&self, labels: Filter) -> Result<Vec<Found>, DockerError> {
        let filters = HashMap::from([("label", labels)]);
        let options = ListContainersOptionsBuilder::new()
            .all(true)
            .filters(&filters)
            .build();
        let found = self.docker.list_containers(Some(options)).await?;
        let read = found.into_iter().filter_map(|container| {
            let names = container.names?;
            let name = names.first()?.trim_start_matches('/');
            let runs = container.state == Some(ContainerSummaryStateEnum::RUNNING);
            Found::read(name, &container.labels?, runs)
        });
        Ok(read.collect())
    }

    pub async fn create(&self, name: &str, body: ContainerCreateBody) -> Result<(), LaunchError> {
        let options = CreateContainerOptionsBuilder::new().name(name).build();
        let created = self.docker.create_container(Some(options), body).await;
        created
            .map(|_| ())
            .map_err(|error| refused("create", &error))
    }

    pub async fn start(&self, name: &str) -> Result<(), LaunchError> {
        let started = self.docker.start_container(name, None).await;
        started.map_err(|error| refused("start", &error))
    }

    /// What is known of a container; `None`: there is none.
    pub async fn inspect(
        &self,
        name: &str,
    ) -> Result<Option<ContainerInspectResponse>, DockerError> {
        match self.docker.inspect_container(name, None).await {
            Ok(known) => Ok(Some(known)),
            Err(DockerError::DockerResponseServerError {
                status_code: 404, ..
            }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Asks a container to end, and ends it where it does not do so soon.
    pub async fn stop(&self, name: &str) {
        let options = StopContainerOptionsBuilder::new().t(STOP_GRACE_S).build();
        if let Err(error) = self.docker.stop_container(name, Some(options)).await {
            tracing::debug!(container = name, %error, "a container was not stopped");
        }
    }

    /// Ends a container at once and removes it with what it left; that it is gone already is fine.
    pub async fn remove(&self, name: &str) -> Result<(), DockerError> {
        let options = RemoveContainerOptionsBuilder::new()
            .force(true)
            .v(true)
            .build();
        match self.docker.remove_container(name, Some(options)).await {
            // 409: somebody else removes it already.
            Err(DockerError::DockerResponseServerError {
                status_code: 404 | 409,
                ..
            }) => Ok(()),
            outcome => outcome,
        }
    }
}

fn refused(what: &str, error: &DockerError) -> LaunchError {
    LaunchError::Engine(format!(
        "the container engine did not {what} the container: {}",
        in_words(error)
    ))
}

/// What went wrong, without the library's own words where the engine gave some.
pub(super) fn in_words(error: &DockerError) -> String {
    match error {
        DockerError::DockerResponseServerError { message, .. } => message.trim().to_owned(),
        other => {
            let mut words = other.to_string();
            let mut cause = std::error::Error::source(other);
            while let Some(next) = cause {
                let more = next.to_string();
                if !words.contains(&more) {
                    words = format!("{words}: {more}");
                }
                cause = next.source();
            }
            words
        }
    }
}

/// Where an engine may be, in order.
fn addresses(host: &str) -> Vec<String> {
    if host != "auto" {
        return vec![match host.starts_with('/') {
            true => format!("unix://{host}"),
            false => host.to_owned(),
        }];
    }
    let user = rustix::process::getuid().as_raw();
    vec![
        "unix:///var/run/docker.sock".to_owned(),
        format!("unix:///run/user/{user}/docker.sock"),
        format!("unix:///run/user/{user}/podman/podman.sock"),
        "unix:///run/podman/podman.sock".to_owned(),
    ]
}
