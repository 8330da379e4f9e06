//! Where agents' secrets come from. The runtime knows neither the service that keeps them nor the key
//! that opens them: whoever starts it brings this.

use async_trait::async_trait;
use std::fmt;

/// A secret that was read.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretValue {
    /// The value; goes to the agent and nowhere else.
    pub value: Vec<u8>,
    /// Which version it is: on record.
    pub version: u64,
}

impl fmt::Debug for SecretValue {
    /// Without the value.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretValue")
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// Why there is no value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// There is no secret of this name.
    #[error("secret {0} does not exist")]
    Missing(String),
    /// It cannot be had now, in words.
    #[error("{0}")]
    Unavailable(String),
}

/// Gives secrets by name. Bounds its own waits.
#[async_trait]
pub trait Secrets: Send + Sync + 'static {
    /// The value as it is now.
    async fn get(&self, name: &str) -> Result<SecretValue, SecretError>;
}

/// No secrets at all: for runtimes that nobody brought any.
pub struct NoSecrets;

#[async_trait]
impl Secrets for NoSecrets {
    async fn get(&self, name: &str) -> Result<SecretValue, SecretError> {
        Err(SecretError::Missing(name.to_owned()))
    }
}
