//! Fleets: agents that belong together, each under an alias, and the one that clients talk to.
//!
//! An alias is what the agents of a fleet call each other in `/delegate`.

use super::RegistryService;
use crate::status;
use std::collections::BTreeMap;
use tonic::Status;
use vlinder_core::AgentName;
use vlinder_core::manifest::FLEET_AGENTS_MAX;
use vlinder_proto::registry as proto;
use vlinder_worker::infra::{Entry, FLEET};

#[derive(serde::Serialize, serde::Deserialize)]
struct Stored {
    entry: String,
    agents: BTreeMap<String, String>,
}

fn fleet_of(name: &str, entry: &Entry) -> Option<proto::Fleet> {
    let stored: Stored = serde_json::from_value(entry.value.clone()?).ok()?;
    let agents = stored.agents.into_iter();
    Some(proto::Fleet {
        name: name.to_owned(),
        entry: stored.entry,
        agents: agents
            .map(|(alias, agent)| proto::FleetAgent { alias, agent })
            .collect(),
        version: entry.seq,
        deployed_at: entry.time_ms,
    })
}

fn name_of(what: &str, text: &str) -> Result<String, Status> {
    // Fleets and aliases are called by the same rule as agents.
    AgentName::new(text)
        .map(|name| name.to_string())
        .map_err(|_| {
            Status::invalid_argument(format!("{what}: expected 1 to 63 of a-z, 0-9 and -"))
        })
}

fn no_fleet(name: &str) -> Status {
    Status::not_found(format!("fleet {name} does not exist"))
}

impl RegistryService {
    pub(super) async fn put(
        &self,
        request: proto::PutFleetRequest,
    ) -> Result<proto::Fleet, Status> {
        status::namespace(&request.namespace)?;
        let name = name_of("name", &request.name)?;
        if request.agents.is_empty() || request.agents.len() > FLEET_AGENTS_MAX {
            return Err(Status::invalid_argument(format!(
                "agents: expected 1 to {FLEET_AGENTS_MAX}"
            )));
        }
        let infra = self.infra.fresh().await.map_err(status::of_worker)?;
        let mut agents = BTreeMap::new();
        for member in &request.agents {
            let alias = name_of("agents.alias", &member.alias)?;
            let agent = AgentName::new(&member.agent).map_err(status::of_id)?;
            if infra.agent(&agent).is_none() {
                return Err(Status::failed_precondition(format!(
                    "agent {agent} of the fleet is not deployed"
                )));
            }
            if agents.insert(alias.clone(), agent.to_string()).is_some() {
                return Err(Status::invalid_argument(format!(
                    "agents: alias {alias} is there twice"
                )));
            }
        }
        if !agents.contains_key(&request.entry) {
            return Err(Status::invalid_argument(
                "entry: expected the alias of one of its agents",
            ));
        }
        let stored = Stored {
            entry: request.entry,
            agents,
        };
        let value =
            serde_json::to_value(stored).map_err(|error| Status::internal(error.to_string()))?;
        let known = infra.entry(FLEET, &name);
        if known.is_none_or(|entry| entry.value.as_ref() != Some(&value)) {
            self.set(FLEET, &name, Some(&value)).await?;
        }
        self.fleet(&name)
    }

    fn fleet(&self, name: &str) -> Result<proto::Fleet, Status> {
        let infra = self.infra.now();
        let entry = infra.entry(FLEET, name);
        entry
            .and_then(|entry| fleet_of(name, entry))
            .ok_or_else(|| no_fleet(name))
    }

    pub(super) async fn fleets(&self, namespace: &str) -> Result<Vec<proto::Fleet>, Status> {
        status::namespace(namespace)?;
        let infra = self.infra.fresh().await.map_err(status::of_worker)?;
        let fleets = infra.all(FLEET);
        Ok(fleets
            .filter_map(|(name, entry)| fleet_of(name, entry))
            .collect())
    }

    pub(super) async fn fresh_fleet(
        &self,
        namespace: &str,
        name: &str,
    ) -> Result<proto::Fleet, Status> {
        status::namespace(namespace)?;
        let name = name_of("name", name)?;
        self.infra.fresh().await.map_err(status::of_worker)?;
        self.fleet(&name)
    }

    pub(super) async fn delete_fleet_named(
        &self,
        namespace: &str,
        name: &str,
    ) -> Result<u64, Status> {
        self.fresh_fleet(namespace, name).await?;
        self.set(FLEET, name, None).await
    }
}
