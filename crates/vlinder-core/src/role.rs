//! The closed list of worker roles.

use std::fmt;
use std::str::FromStr;

/// What a worker does. The text form is the key below `distributed.workers` in the config.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WorkerRole {
    /// Holds secrets, encrypted at rest (gRPC).
    Secret,
    /// Projects the record into SQLite and answers queries (gRPC).
    State,
    /// Knows agents, models, fleets and nodes (gRPC).
    Registry,
    /// Knows which models every upstream offers (gRPC).
    Catalog,
    /// Takes turns from clients and streams them back (gRPC).
    Harness,
    /// Does what the cluster needs once: ends overdue turns, finishes half-done promotions.
    Infra,
    /// Runs agents in containers.
    AgentContainer,
    /// Runs agents as child processes.
    AgentProcess,
    /// Invokes agents on AWS Lambda.
    AgentLambda,
    /// Inference through an Ollama server.
    InferenceOllama,
    /// Inference through OpenRouter.
    InferenceOpenrouter,
    /// Inference through any OpenAI-compatible server.
    InferenceOpenai,
    /// Inference through a server that speaks Anthropic's format.
    InferenceAnthropic,
    /// Inference inside the worker.
    InferenceLocal,
    /// Key-value storage with versions, in SQLite.
    StorageObjectSqlite,
    /// Vector storage with versions, in SQLite.
    StorageVectorSqlite,
    /// Projects the record into a bare git repository.
    DagGit,
    /// Serves the console.
    SessionViewer,
}

impl WorkerRole {
    /// Every role, in the order in which a node starts them.
    pub const ALL: [WorkerRole; 18] = [
        Self::Secret,
        Self::State,
        Self::Registry,
        Self::Catalog,
        Self::Harness,
        Self::Infra,
        Self::StorageObjectSqlite,
        Self::StorageVectorSqlite,
        Self::InferenceOllama,
        Self::InferenceOpenrouter,
        Self::InferenceOpenai,
        Self::InferenceAnthropic,
        Self::InferenceLocal,
        Self::AgentContainer,
        Self::AgentProcess,
        Self::AgentLambda,
        Self::DagGit,
        Self::SessionViewer,
    ];

    /// The name in config, lists and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Secret => "secret",
            Self::State => "state",
            Self::Registry => "registry",
            Self::Catalog => "catalog",
            Self::Harness => "harness",
            Self::Infra => "infra",
            Self::AgentContainer => "agent.container",
            Self::AgentProcess => "agent.process",
            Self::AgentLambda => "agent.lambda",
            Self::InferenceOllama => "inference.ollama",
            Self::InferenceOpenrouter => "inference.openrouter",
            Self::InferenceOpenai => "inference.openai",
            Self::InferenceAnthropic => "inference.anthropic",
            Self::InferenceLocal => "inference.local",
            Self::StorageObjectSqlite => "storage.object.sqlite",
            Self::StorageVectorSqlite => "storage.vector.sqlite",
            Self::DagGit => "dag_git",
            Self::SessionViewer => "session_viewer",
        }
    }

    /// Whether the role listens on a port of its own (gRPC).
    pub const fn is_service(self) -> bool {
        matches!(
            self,
            Self::Secret | Self::State | Self::Registry | Self::Catalog | Self::Harness
        )
    }
}

impl fmt::Display for WorkerRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A string that names no role.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown worker role {0:?}")]
pub struct UnknownRole(pub String);

impl FromStr for WorkerRole {
    type Err = UnknownRole;
    fn from_str(value: &str) -> Result<Self, UnknownRole> {
        let found = Self::ALL.into_iter().find(|role| role.as_str() == value);
        found.ok_or_else(|| UnknownRole(value.chars().take(80).collect()))
    }
}

impl serde::Serialize for WorkerRole {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(self.as_str())
    }
}

impl<'de> serde::Deserialize<'de> for WorkerRole {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_role_survives_text() {
        for role in WorkerRole::ALL {
            assert_eq!(role.as_str().parse(), Ok(role));
        }
        assert!("agents".parse::<WorkerRole>().is_err());
    }
}
