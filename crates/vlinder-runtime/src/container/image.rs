//! From the manifest's image reference to an image on this machine.
//!
//! `mutable`: whatever the reference means when a container is started. `pinned`: what it meant to the
//! first worker that saw the version, which says so in the log; then that image, here and elsewhere.

use super::engine::{Engine, in_words};
use crate::launcher::{Deployment, LaunchError};
use bollard::errors::Error as DockerError;
use bollard::models::{ImageConfig, ImageInspect};
use bollard::query_parameters::CreateImageOptionsBuilder;
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use vlinder_worker::infra::{IMAGE, InfraView};

/// How long an image may take to be fetched.
const FETCH_MAX: Duration = Duration::from_secs(600);
/// Tries to say first what a version's image is.
const PIN_TRIES: usize = 5;

/// An image that is here.
#[derive(Debug, Clone)]
pub(super) struct Image {
    /// `sha256:…`
    pub id: String,
    /// What its author set.
    pub config: ImageConfig,
}

/// What a version's image reference meant when it was deployed: the body of the infra event.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Pin {
    version: u64,
    reference: String,
    id: String,
    /// By which a registry knows it, if it came from one.
    digests: Vec<String>,
}

#[derive(Clone)]
pub(super) struct Images {
    engine: Engine,
    infra: InfraView,
    pinned: bool,
}

impl Images {
    pub fn new(engine: Engine, infra: InfraView, pinned: bool) -> Self {
        Self {
            engine,
            infra,
            pinned,
        }
    }

    /// The image that a version runs.
    pub async fn find(&self, deployment: &Deployment) -> Result<Image, LaunchError> {
        let reference = deployment.manifest().executable.trim();
        if reference.starts_with('-')
            || reference.contains(|c: char| c.is_whitespace() || "?#%".contains(c))
        {
            return Err(LaunchError::Image(format!(
                "{reference:?} is not the name of an image"
            )));
        }
        if !self.pinned {
            return self.here_or_fetched(reference).await?.checked(reference);
        }
        let mut pin = self.pin(deployment);
        for _ in 0..PIN_TRIES {
            if let Some(pin) = pin {
                return self.pinned_image(&pin).await;
            }
            let found = self.here_or_fetched(reference).await?;
            let meant = Pin {
                version: deployment.version,
                reference: reference.to_owned(),
                id: found.id.clone().unwrap_or_default(),
                digests: found.repo_digests.clone().unwrap_or_default(),
            };
            let value = serde_json::to_value(&meant).unwrap_or_default();
            let name = deployment.name().as_str();
            if let Err(error) = self.infra.append(IMAGE, name, Some(&value)).await {
                tracing::debug!(agent = name, %error, "what an image means was not noted at once");
            }
            let fresh = self.infra.fresh().await;
            fresh.map_err(|error| LaunchError::Engine(error.to_string()))?;
            pin = self.pin(deployment);
        }
        Err(LaunchError::Image(format!(
            "what {reference} means could not be noted in the log; trying again"
        )))
    }

    fn pin(&self, deployment: &Deployment) -> Option<Pin> {
        let infra = self.infra.now();
        let entry = infra.entry(IMAGE, deployment.name().as_str())?;
        let pin: Pin = serde_json::from_value(entry.value.clone()?).ok()?;
        (pin.version == deployment.version).then_some(pin)
    }

    async fn pinned_image(&self, pin: &Pin) -> Result<Image, LaunchError> {
        if let Some(found) = self.here(&pin.id).await? {
            return found.checked(&pin.reference);
        }
        for digest in &pin.digests {
            if let Ok(found) = self.here_or_fetched(digest).await {
                return found.checked(&pin.reference);
            }
        }
        Err(LaunchError::Image(format!(
            "the image {} is not on this node: {} meant it when this version was deployed, and the image policy is pinned",
            pin.id, pin.reference
        )))
    }

    async fn here(&self, reference: &str) -> Result<Option<ImageInspect>, LaunchError> {
        match self.engine.docker.inspect_image(reference).await {
            Ok(found) => Ok(Some(found)),
            Err(DockerError::DockerResponseServerError {
                status_code: 404, ..
            }) => Ok(None),
            Err(error) => Err(LaunchError::Image(format!(
                "the image {reference} cannot be looked up: {}",
                in_words(&error)
            ))),
        }
    }

    async fn here_or_fetched(&self, reference: &str) -> Result<ImageInspect, LaunchError> {
        if let Some(found) = self.here(reference).await? {
            return Ok(found);
        }
        let absent = |why: &str| {
            LaunchError::Image(format!(
                "the image {reference} does not exist on this node and cannot be fetched: {why}"
            ))
        };
        if is_id(reference) {
            return Err(absent("an image id is known only where the image is"));
        }
        let mut options = CreateImageOptionsBuilder::new().from_image(reference);
        let last = reference.rsplit('/').next().unwrap_or(reference);
        if !last.contains([':', '@']) {
            // Without a tag the engine would fetch all.
            options = options.tag("latest");
        }
        let mut fetching = self
            .engine
            .docker
            .create_image(Some(options.build()), None, None);
        let fetched = async {
            while let Some(step) = fetching.next().await {
                step.map_err(|error| in_words(&error))?;
            }
            Ok::<_, String>(())
        };
        match tokio::time::timeout(FETCH_MAX, fetched).await {
            Ok(Ok(())) => {}
            Ok(Err(why)) => return Err(absent(&why)),
            Err(_) => {
                return Err(absent(&format!(
                    "it took longer than {} s",
                    FETCH_MAX.as_secs()
                )));
            }
        }
        self.here(reference)
            .await?
            .ok_or_else(|| absent("the engine does not have it afterwards"))
    }
}

/// Whether it names an image by what it is, rather than by what it is called.
fn is_id(reference: &str) -> bool {
    let hex = reference.strip_prefix("sha256:").unwrap_or(reference);
    hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit())
}

trait Checked {
    fn checked(self, reference: &str) -> Result<Image, LaunchError>;
}

impl Checked for ImageInspect {
    /// An image that says what to run.
    fn checked(self, reference: &str) -> Result<Image, LaunchError> {
        let config = self.config.unwrap_or_default();
        let says =
            |words: &Option<Vec<String>>| words.as_ref().is_some_and(|words| !words.is_empty());
        if !says(&config.entrypoint) && !says(&config.cmd) {
            return Err(LaunchError::Image(format!(
                "the image {reference} does not say what to run: it has neither ENTRYPOINT nor CMD"
            )));
        }
        let id = self.id.filter(|id| !id.is_empty());
        let id =
            id.ok_or_else(|| LaunchError::Image(format!("the image {reference} has no id")))?;
        Ok(Image { id, config })
    }
}
