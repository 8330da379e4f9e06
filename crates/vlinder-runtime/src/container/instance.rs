//! One container, from its start or from where another worker left it, to its removal.

use super::engine::Engine;
use super::files::Files;
use super::link::Link;
use super::{ContainerLauncher, Hold, body, output};
use crate::launcher::{Connect, Exit, Instance, LaunchError, LaunchSpec, Marker};
use async_trait::async_trait;
use bollard::errors::Error as DockerError;
use bollard::models::ContainerState;
use futures::StreamExt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use tokio_util::task::AbortOnDropHandle;

/// Pause before the engine is asked again about a container after it gave no answer.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// How long the last lines of a container that has ended may take to come.
const LAST_LINES_MAX: Duration = Duration::from_millis(500);

pub(super) struct ContainerInstance {
    engine: Engine,
    link: Arc<Link>,
    marker: Arc<dyn Marker>,
    pid: u32,
    memory: u64,
    breaks: u64,
    output: AbortOnDropHandle<()>,
    flood: Arc<AtomicU64>,
    // After everything that uses it.
    remains: Remains,
}

impl ContainerInstance {
    /// A container that has just been started.
    pub async fn with(
        launcher: &ContainerLauncher,
        spec: &LaunchSpec,
        link: Arc<Link>,
        remains: Remains,
    ) -> Result<Self, LaunchError> {
        Self::new(launcher, spec, link, remains, true).await
    }

    /// A container that another worker started.
    pub async fn of(
        launcher: &ContainerLauncher,
        spec: &LaunchSpec,
        link: Arc<Link>,
        remains: Remains,
    ) -> Result<Self, LaunchError> {
        Self::new(launcher, spec, link, remains, false).await
    }

    async fn new(
        launcher: &ContainerLauncher,
        spec: &LaunchSpec,
        link: Arc<Link>,
        remains: Remains,
        is_new: bool,
    ) -> Result<Self, LaunchError> {
        let name = remains.name();
        let engine = launcher.engine.clone();
        let known = engine.inspect(name).await;
        let known = known.map_err(|error| LaunchError::Engine(error.to_string()))?;
        let state = known.and_then(|known| known.state).unwrap_or_default();
        // One that has ended already has none.
        let pid = state
            .pid
            .and_then(|pid| i32::try_from(pid).ok())
            .unwrap_or(0);
        link.expect(pid);
        let marker = launcher
            .files
            .marker(name)
            .map_err(|source| LaunchError::Io {
                what: "the container's mark cannot be opened",
                source,
            })?;
        let (output, flood) = output::follow(&engine, &launcher.logs, spec, name, is_new);
        Ok(Self {
            pid: u32::try_from(pid).unwrap_or(0),
            memory: body::memory(spec),
            breaks: link.state().breaks,
            engine,
            link,
            marker,
            output,
            flood,
            remains,
        })
    }

    /// Waits until the engine says that it has ended, or that it may have.
    async fn wait(&mut self) {
        let mut ending =
            std::pin::pin!(self.engine.docker.wait_container(self.remains.name(), None));
        tokio::select! {
            ended = ending.next() => match ended {
                Some(Ok(_) | Err(DockerError::DockerContainerWaitError { .. })) => {}
                // The engine is away, or the container is.
                _ => self.engine.returned(ASK_AGAIN).await,
            },
            // The first process is gone, or somebody stopped it: the engine knows.
            breaks = self.link.broken(self.breaks) => self.breaks = breaks,
        }
    }

    fn in_words(&self, state: &ContainerState) -> String {
        let error = state.error.as_deref().filter(|error| !error.is_empty());
        if let Some(error) = error {
            return format!("it could not be run: {error}");
        }
        if state.oom_killed == Some(true) {
            let mib = self.memory / (1024 * 1024);
            return format!(
                "it took more memory than its limit of {mib} MiB and was killed (out of memory)"
            );
        }
        match state.exit_code {
            Some(127) => "it exited with code 127: command not found?".to_owned(),
            Some(code) if code > 128 => format!("it was ended by signal {}", code - 128),
            Some(code) => format!("it exited with code {code}"),
            None => "it ended".to_owned(),
        }
    }
}

#[async_trait]
impl Instance for ContainerInstance {
    fn connector(&self) -> Arc<dyn Connect> {
        self.link.clone()
    }

    fn marker(&self) -> Option<Arc<dyn Marker>> {
        Some(self.marker.clone())
    }

    fn pid(&self) -> u32 {
        self.pid
    }

    fn flood(&self) -> Arc<AtomicU64> {
        self.flood.clone()
    }

    async fn exited(&mut self) -> Exit {
        loop {
            match self.engine.inspect(self.remains.name()).await {
                Ok(None) => return Exit("somebody removed its container".to_owned()),
                Ok(Some(known)) => {
                    let state = known.state.unwrap_or_default();
                    if state.running != Some(true) {
                        let _ = tokio::time::timeout(LAST_LINES_MAX, &mut self.output).await;
                        return Exit(self.in_words(&state));
                    }
                }
                Err(error) => {
                    // It lives as long as its line does, whatever became of the engine.
                    if !self.link.state().is_up {
                        return Exit(format!(
                            "it ended while the container engine did not answer: {error}"
                        ));
                    }
                    self.engine.returned(ASK_AGAIN).await;
                    continue;
                }
            }
            self.wait().await;
        }
    }

    async fn stop(self: Box<Self>) {
        self.engine.stop(self.remains.name()).await;
        let _ = tokio::time::timeout(LAST_LINES_MAX, self.output).await;
        self.remains.remove().await;
    }
}

/// What there is of a container, or will be; removed when dropped. It stays ours until it is gone.
pub(super) struct Remains {
    engine: Engine,
    files: Files,
    held: Option<Hold>,
}

impl Remains {
    pub fn new(launcher: &ContainerLauncher, held: Hold) -> Self {
        Self {
            engine: launcher.engine.clone(),
            files: launcher.files.clone(),
            held: Some(held),
        }
    }

    /// The container's name.
    pub fn name(&self) -> &str {
        self.held.as_ref().map_or("", |held| &held.name)
    }

    /// Removes it now.
    pub async fn remove(mut self) {
        if let Some(held) = self.held.take() {
            discard(&self.engine, &self.files, held).await;
        }
    }
}

impl Drop for Remains {
    fn drop(&mut self) {
        let Some(held) = self.held.take() else { return };
        let (engine, files) = (self.engine.clone(), self.files.clone());
        // Ends with the removal. Where there is no runtime any more, the next worker sweeps it up.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { discard(&engine, &files, held).await });
        }
    }
}

async fn discard(engine: &Engine, files: &Files, held: Hold) {
    let name = &held.name;
    if let Err(error) = engine.remove(name).await {
        tracing::warn!(container = name, %error, "a container could not be removed; it is swept up later");
    }
    files.remove(name);
}
