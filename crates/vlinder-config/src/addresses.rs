//! The five services, and the file in which a running node tells its clients where it listens.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use url::Url;
use vlinder_core::WorkerRole;

use crate::files;

/// A gRPC service of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Service {
    /// Agents, models, fleets, nodes.
    Registry,
    /// Turns: run, cancel, fork.
    Harness,
    /// The record.
    State,
    /// Secrets.
    Secret,
    /// Which upstream offers which model.
    Catalog,
}

impl Service {
    /// Every service, in the order of their ports.
    pub const ALL: [Service; 5] = [
        Self::Registry,
        Self::Harness,
        Self::State,
        Self::Secret,
        Self::Catalog,
    ];

    /// The port where it listens unless told otherwise.
    pub const fn default_port(self) -> u16 {
        match self {
            Self::Registry => 9090,
            Self::Harness => 9091,
            Self::State => 9092,
            Self::Secret => 9093,
            Self::Catalog => 9094,
        }
    }

    /// The name in keys and files.
    pub const fn as_str(self) -> &'static str {
        self.role().as_str()
    }

    /// The worker that serves it.
    pub const fn role(self) -> WorkerRole {
        match self {
            Self::Registry => WorkerRole::Registry,
            Self::Harness => WorkerRole::Harness,
            Self::State => WorkerRole::State,
            Self::Secret => WorkerRole::Secret,
            Self::Catalog => WorkerRole::Catalog,
        }
    }

    /// The service of a role, for the roles that serve one.
    pub fn of_role(role: WorkerRole) -> Option<Self> {
        Self::ALL.into_iter().find(|service| service.role() == role)
    }

    /// The key that says where to connect.
    pub(crate) const fn addr_key(self) -> &'static str {
        match self {
            Self::Registry => "distributed.registry_addr",
            Self::Harness => "distributed.harness_addr",
            Self::State => "distributed.state_addr",
            Self::Secret => "distributed.secret_addr",
            Self::Catalog => "distributed.catalog_addr",
        }
    }

    /// The key that says on which port to listen.
    pub(crate) const fn port_key(self) -> &'static str {
        match self {
            Self::Registry => "distributed.ports.registry",
            Self::Harness => "distributed.ports.harness",
            Self::State => "distributed.ports.state",
            Self::Secret => "distributed.ports.secret",
            Self::Catalog => "distributed.ports.catalog",
        }
    }
}

/// Largest `addresses.json`, in bytes: seven URLs.
const ADDRESSES_BYTES_MAX: u64 = 16 * 1024;

/// Without the slash at the end that a parsed URL has, so that a path can be put behind it.
fn base<S: serde::Serializer>(url: &Option<Url>, s: S) -> Result<S::Ok, S::Error> {
    match url {
        Some(url) => s.serialize_str(url.as_str().trim_end_matches('/')),
        None => s.serialize_none(),
    }
}

/// `<data_dir>/run/addresses.json`: where a client of this node connects. The daemon writes it
/// once everything listens (with the real ports, where 0 was asked for); a node without services
/// of its own writes the addresses of those that it uses. A file of a dead daemon may remain:
/// whoever reads it finds out by connecting.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeAddresses {
    /// The registry.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "base"
    )]
    pub registry: Option<Url>,
    /// The harness.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "base"
    )]
    pub harness: Option<Url>,
    /// The state service.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "base"
    )]
    pub state: Option<Url>,
    /// The secret service.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "base"
    )]
    pub secret: Option<Url>,
    /// The catalog.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "base"
    )]
    pub catalog: Option<Url>,
    /// Console, health, metrics, events, OpenAI-compatible routes.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "base"
    )]
    pub http: Option<Url>,
    /// What agents call.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        serialize_with = "base"
    )]
    pub bridge: Option<Url>,
}

impl NodeAddresses {
    /// Where the file lies.
    pub fn path(data_dir: &Path) -> PathBuf {
        data_dir.join("run").join("addresses.json")
    }

    /// The address of a service.
    pub fn get(&self, service: Service) -> Option<&Url> {
        match service {
            Service::Registry => self.registry.as_ref(),
            Service::Harness => self.harness.as_ref(),
            Service::State => self.state.as_ref(),
            Service::Secret => self.secret.as_ref(),
            Service::Catalog => self.catalog.as_ref(),
        }
    }

    /// Sets the address of a service.
    pub fn set(&mut self, service: Service, url: Url) {
        let slot = match service {
            Service::Registry => &mut self.registry,
            Service::Harness => &mut self.harness,
            Service::State => &mut self.state,
            Service::Secret => &mut self.secret,
            Service::Catalog => &mut self.catalog,
        };
        *slot = Some(url);
    }

    /// Writes the file in one step (readers see the old one or the new one).
    pub fn write(&self, data_dir: &Path) -> std::io::Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(std::io::Error::other)?;
        files::replace(&Self::path(data_dir), text.as_bytes(), 0o600)
    }

    /// Reads the file; `None` when there is none.
    pub fn read(data_dir: &Path) -> std::io::Result<Option<Self>> {
        let Some(text) = files::read(&Self::path(data_dir), ADDRESSES_BYTES_MAX)? else {
            return Ok(None);
        };
        serde_json::from_str(&text)
            .map(Some)
            .map_err(std::io::Error::other)
    }

    /// Removes the file; fine when there is none.
    pub fn remove(data_dir: &Path) -> std::io::Result<()> {
        files::remove(&Self::path(data_dir))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_comes_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(NodeAddresses::read(dir.path()).unwrap(), None);
        let mut addresses = NodeAddresses::default();
        for service in Service::ALL {
            let url = format!("http://127.0.0.1:{}", service.default_port() + 1000);
            addresses.set(service, Url::parse(&url).unwrap());
        }
        addresses.write(dir.path()).unwrap();
        assert_eq!(NodeAddresses::read(dir.path()).unwrap(), Some(addresses));
        std::fs::write(NodeAddresses::path(dir.path()), "{").unwrap();
        assert!(NodeAddresses::read(dir.path()).is_err());
        NodeAddresses::remove(dir.path()).unwrap();
        NodeAddresses::remove(dir.path()).unwrap();
    }

    #[test]
    fn services_and_roles_agree() {
        for role in WorkerRole::ALL {
            assert_eq!(
                Service::of_role(role).is_some(),
                role.is_service(),
                "{role}"
            );
        }
    }
}
