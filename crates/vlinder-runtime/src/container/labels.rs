//! The labels by which containers are known to be ours, and their names.

use crate::launcher::LaunchSpec;
use std::collections::HashMap;
use vlinder_core::AgentName;
use vlinder_worker::WorkerCx;

const DATA_DIR: &str = "io.vlinder.data-dir";
const NODE: &str = "io.vlinder.node";
const NAMESPACE: &str = "io.vlinder.namespace";
const AGENT: &str = "io.vlinder.agent";
const VERSION: &str = "io.vlinder.version";
const REPLICA: &str = "io.vlinder.replica";
const WORKER: &str = "io.vlinder.worker";

/// The labels that all containers of a worker have.
#[derive(Debug, Clone)]
pub(super) struct Labels {
    data_dir: String,
    node: String,
    namespace: String,
    worker: u32,
}

/// A container of ours, as the engine lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub name: String,
    pub agent: String,
    pub version: u64,
    pub replica: u32,
    pub worker: u32,
    pub runs: bool,
}

impl Found {
    pub fn is_replica(&self, agent: &AgentName, replica: u32) -> bool {
        self.agent == agent.as_str() && self.replica == replica
    }

    /// Reads the labels of one; `None` where they are not as we write them.
    pub fn read(name: &str, labels: &HashMap<String, String>, runs: bool) -> Option<Self> {
        Some(Self {
            name: name.to_owned(),
            agent: labels.get(AGENT)?.clone(),
            version: labels.get(VERSION)?.parse().ok()?,
            replica: labels.get(REPLICA)?.parse().ok()?,
            worker: labels.get(WORKER)?.parse().ok()?,
            runs,
        })
    }
}

/// A condition on labels, in the engine's form.
pub(super) type Filter = Vec<String>;

impl Labels {
    /// Labels of the containers of a worker, whose data directory has this id.
    pub fn of(cx: &WorkerCx, data_dir: &str) -> Self {
        Self {
            data_dir: data_dir.to_owned(),
            node: cx.id.node.to_string(),
            namespace: cx.ns.to_string(),
            worker: cx.id.index,
        }
    }

    /// All of this node.
    pub fn of_node(&self) -> Filter {
        vec![
            format!("{DATA_DIR}={}", self.data_dir),
            format!("{NODE}={}", self.node),
            format!("{NAMESPACE}={}", self.namespace),
        ]
    }

    /// All of an agent.
    pub fn of_agent(&self, agent: &AgentName) -> Filter {
        let mut filter = self.of_node();
        filter.push(format!("{AGENT}={agent}"));
        filter
    }

    /// All of a replica of this worker.
    pub fn of_replica(&self, spec: &LaunchSpec) -> Filter {
        let mut filter = self.of_agent(spec.deployment.name());
        filter.push(format!("{REPLICA}={}", spec.replica));
        filter.push(format!("{WORKER}={}", self.worker));
        filter
    }

    /// The labels of a new container.
    pub fn of_new(&self, spec: &LaunchSpec) -> HashMap<String, String> {
        let pairs = [
            (DATA_DIR, self.data_dir.clone()),
            (NODE, self.node.clone()),
            (NAMESPACE, self.namespace.clone()),
            (AGENT, spec.deployment.name().to_string()),
            (VERSION, spec.deployment.version.to_string()),
            (REPLICA, spec.replica.to_string()),
            (WORKER, self.worker.to_string()),
        ];
        let owned = pairs.map(|(name, value)| (name.to_owned(), value));
        owned.into_iter().collect()
    }

    /// A name that no container has had.
    pub fn fresh_name(spec: &LaunchSpec) -> String {
        let agent = spec.deployment.name();
        let unique = rand::random::<u64>();
        format!("vlinder-{agent}-{}-{unique:016x}", spec.replica)
    }
}
