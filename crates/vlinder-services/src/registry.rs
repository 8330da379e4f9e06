//! The registry service: agents, models, nodes and workers.
//!
//! Agents and live worker counts are events in the log, read through an [`InfraView`]; nodes and workers are
//! what the nodes report. A write returns when it is stored, and every read sees what was
//! confirmed before it, so replicas on several nodes agree.

mod describe;
mod fleets;
mod logs;

use crate::status;
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};
use vlinder_bus::{KvEntry, QueueSpec, Subject, subjects};
use vlinder_core::manifest::{AgentManifest, RuntimeKind};
use vlinder_core::{AgentName, ContentHash, NodeName, Selector, WorkerRole};
use vlinder_proto::registry as proto;
use vlinder_proto::registry::registry_server::Registry;
use vlinder_worker::infra::{AGENT, AgentVersion, InfraView, MODEL, SCALE, SECRET};
use vlinder_worker::nodes::{self, NodeReport};
use vlinder_worker::serving::Serving;
use vlinder_worker::{Error, WorkerCx};

/// Largest bundle of an agent's directory, packed, in bytes: the largest body that the bus takes.
pub const BUNDLE_BYTES_MAX: usize = vlinder_core::BODY_BYTES_MAX as usize;
/// Most workers of one role on one node.
const SCALE_MAX: u32 = 64;
/// How often an append that lost a race is tried again.
const APPEND_TRIES: usize = 5;

type Lines = Pin<Box<dyn Stream<Item = Result<proto::LogLine, Status>> + Send>>;

/// The service.
pub struct RegistryService {
    cx: WorkerCx,
    infra: InfraView,
    supported: Arc<[WorkerRole]>,
}

impl RegistryService {
    /// A registry over the bus of `cx`. `supported`: the roles that this release can run.
    pub async fn start(cx: WorkerCx, supported: &[WorkerRole]) -> Result<Self, Error> {
        let infra = InfraView::start(&cx).await?;
        Ok(Self {
            cx,
            infra,
            supported: supported.into(),
        })
    }

    async fn receive(
        &self,
        mut stream: Streaming<proto::DeployChunk>,
    ) -> Result<(AgentManifest, Option<Bytes>), Status> {
        use proto::deploy_chunk::Part;
        let first = stream.message().await?.and_then(|chunk| chunk.part);
        let Some(Part::Head(head)) = first else {
            return Err(Status::invalid_argument(
                "the first message of a deployment is its head",
            ));
        };
        status::namespace(&head.namespace)?;
        let manifest = AgentManifest::parse(&head.manifest)
            .map_err(|error| Status::invalid_argument(format!("agent.toml: {error}")))?;
        let mut bundle = Vec::new();
        while let Some(chunk) = stream.message().await? {
            let Some(Part::Bundle(piece)) = chunk.part else {
                return Err(Status::invalid_argument(
                    "after the head only pieces of the bundle follow",
                ));
            };
            if bundle.len() + piece.len() > BUNDLE_BYTES_MAX {
                return Err(Status::invalid_argument(format!(
                    "the agent's directory is larger than {} MiB packed; leave out what it does not need",
                    BUNDLE_BYTES_MAX / 1024 / 1024
                )));
            }
            bundle.extend_from_slice(&piece);
        }
        if head.bundle_sha256.is_empty() && bundle.is_empty() {
            return Ok((manifest, None));
        }
        let bundle = Bytes::from(bundle);
        if ContentHash::of(&bundle).to_string() != head.bundle_sha256.to_lowercase() {
            return Err(Status::invalid_argument(
                "bundle_sha256: the bundle does not hash to it; it was cut or changed on the way",
            ));
        }
        Ok((manifest, Some(bundle)))
    }

    fn check_runtime(&self, manifest: &AgentManifest, has_bundle: bool) -> Result<(), Status> {
        let role = role_of(manifest.runtime);
        if !self.supported.contains(&role) {
            return Err(Status::failed_precondition(format!(
                "runtime = {:?}: this release runs process and container agents only",
                runtime_name(manifest.runtime)
            )));
        }
        if manifest.runtime == RuntimeKind::Process && !has_bundle {
            return Err(Status::invalid_argument(
                "a process agent needs its directory; deploy it with `vlinder agent deploy -p DIR`",
            ));
        }
        if let Some(name) = manifest.requirements.mounts.keys().next() {
            return Err(Status::failed_precondition(format!(
                "requirements.mounts.{name}: this release cannot mount anything into agents"
            )));
        }
        for (key, store) in [
            ("object_storage", manifest.object_store()),
            ("vector_storage", manifest.vector_store()),
        ] {
            if let Some(store) = store.filter(|store| !store.is_served()) {
                return Err(Status::failed_precondition(format!(
                    "{key} = {}://…: this release has sqlite://, nats:// and s3:// stores",
                    store.scheme
                )));
            }
        }
        Ok(())
    }

    /// The queues exist before the first turn or call is published (design.md rule 10).
    async fn ensure_queues(&self, manifest: &AgentManifest) -> Result<(), Status> {
        let ns = &self.cx.ns;
        let agent = QueueSpec {
            stream: self.cx.log(),
            name: subjects::agent_queue(&manifest.name),
            filter: subjects::invokes_of(ns, &manifest.name),
            from_start: true,
        };
        let delegations = QueueSpec {
            name: subjects::delegation_queue(&manifest.name),
            filter: subjects::delegations_to(ns, &manifest.name),
            ..agent.clone()
        };
        let mut queues = vec![agent, delegations];
        for (service, store) in [
            ("kv", manifest.object_store()),
            ("vec", manifest.vector_store()),
        ] {
            let Some(store) = store else { continue };
            let selector = Selector::new(&store.path).map_err(status::of_id)?;
            let subject = Subject::Req {
                ns: ns.clone(),
                service: service.to_owned(),
                backend: store.scheme.clone(),
                selector: selector.clone(),
            };
            queues.push(QueueSpec {
                stream: self.cx.log(),
                name: subjects::service_queue(service, &store.scheme, &selector),
                filter: subject.to_string(),
                from_start: false,
            });
        }
        for queue in &queues {
            self.cx
                .bus
                .ensure_queue(queue)
                .await
                .map_err(status::of_bus)?;
        }
        Ok(())
    }

    /// Appends an infra event after whatever is there now, also when others do so at the same time.
    async fn set(
        &self,
        what: &str,
        name: &str,
        value: Option<&serde_json::Value>,
    ) -> Result<u64, Status> {
        for _ in 0..APPEND_TRIES {
            self.infra.fresh().await.map_err(status::of_worker)?;
            match self.infra.append(what, name, value).await {
                Ok(seq) => {
                    self.infra.at_least(seq).await.map_err(status::of_worker)?;
                    return Ok(seq);
                }
                Err(vlinder_bus::Error::Conflict { .. }) => {}
                Err(error) => return Err(status::of_bus(error)),
            }
        }
        Err(Status::aborted(format!(
            "others keep changing {what} {name}; try again"
        )))
    }

    /// An agent that asks for what is not there would fail in its first turn: it is told now.
    async fn check_secrets(&self, manifest: &AgentManifest) -> Result<(), Status> {
        let wanted = &manifest.requirements.secrets;
        if wanted.is_empty() {
            return Ok(());
        }
        let infra = self.infra.fresh().await.map_err(status::of_worker)?;
        let is_missing = |name: &&String| {
            let entry = infra.entry(SECRET, name);
            entry.is_none_or(|entry| entry.value.is_none())
        };
        let missing: Vec<&str> = wanted
            .iter()
            .filter(is_missing)
            .map(String::as_str)
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(Status::failed_precondition(format!(
            "agent {} asks for secrets that do not exist: {}; store each with `vlinder secret put NAME` first",
            manifest.name,
            missing.join(", ")
        )))
    }

    async fn reports(&self) -> Result<Vec<(KvEntry, NodeReport)>, Status> {
        nodes::read_all(&self.cx.bus).await.map_err(status::of_bus)
    }

    fn is_live(&self, entry: &KvEntry, report: &NodeReport) -> bool {
        report.is_live(&self.cx.bus, entry)
    }

    fn node_of(&self, asked: &str) -> Result<NodeName, Status> {
        if asked.is_empty() {
            return Ok(self.cx.id.node.clone());
        }
        NodeName::new(asked).map_err(status::of_id)
    }

    /// The report of a node that exists; the error names those that do.
    async fn live_node(&self, node: &NodeName) -> Result<NodeReport, Status> {
        let reports = self.reports().await?;
        let found = reports
            .iter()
            .find(|(_, report)| report.node == node.as_str());
        let Some((entry, report)) = found else {
            let names: Vec<&str> = reports
                .iter()
                .map(|(_, report)| report.node.as_str())
                .collect();
            return Err(Status::not_found(format!(
                "node {node} does not exist; there is: {}",
                names.join(", ")
            )));
        };
        if !self.is_live(entry, report) {
            return Err(Status::unavailable(format!("node {node} is away")));
        }
        Ok(report.clone())
    }
}

fn role_of(runtime: RuntimeKind) -> WorkerRole {
    match runtime {
        RuntimeKind::Container => WorkerRole::AgentContainer,
        RuntimeKind::Process => WorkerRole::AgentProcess,
        RuntimeKind::Lambda => WorkerRole::AgentLambda,
    }
}

fn runtime_name(runtime: RuntimeKind) -> &'static str {
    match runtime {
        RuntimeKind::Container => "container",
        RuntimeKind::Process => "process",
        RuntimeKind::Lambda => "lambda",
    }
}

fn role(text: &str) -> Result<WorkerRole, Status> {
    text.parse().map_err(|_| {
        let names: Vec<&str> = WorkerRole::ALL.iter().map(|role| role.as_str()).collect();
        Status::invalid_argument(format!(
            "role: {:?} is none; expected one of {}",
            text.chars().take(40).collect::<String>(),
            names.join(", ")
        ))
    })
}

#[tonic::async_trait]
impl Registry for RegistryService {
    type AgentLogsStream = Lines;
    type WorkerLogsStream = Lines;

    async fn deploy_agent(
        &self,
        request: Request<Streaming<proto::DeployChunk>>,
    ) -> Result<Response<proto::Agent>, Status> {
        let (manifest, bundle) = self.receive(request.into_inner()).await?;
        self.check_runtime(&manifest, bundle.is_some())?;
        self.check_secrets(&manifest).await?;
        let mut version = AgentVersion {
            manifest,
            bundle: None,
            bundle_len: 0,
        };
        if let Some(bundle) = bundle {
            version.bundle_len = bundle.len() as u64;
            version.bundle = Some(self.cx.bus.blob_put(bundle).await.map_err(status::of_bus)?);
        }
        let name = version.manifest.name.clone();
        self.ensure_queues(&version.manifest).await?;
        let value =
            serde_json::to_value(&version).map_err(|error| Status::internal(error.to_string()))?;
        let infra = self.infra.fresh().await.map_err(status::of_worker)?;
        let unchanged = infra
            .entry(AGENT, name.as_str())
            .is_some_and(|entry| entry.value.as_ref() == Some(&value));
        if !unchanged {
            self.set(AGENT, name.as_str(), Some(&value)).await?;
        }
        let infra = self.infra.now();
        let (version, entry) = infra
            .agent(&name)
            .ok_or_else(|| Status::aborted(format!("agent {name} was deleted meanwhile")))?;
        Ok(Response::new(self.describe(&version, entry).await?))
    }

    async fn list_agents(
        &self,
        request: Request<proto::ListAgentsRequest>,
    ) -> Result<Response<proto::ListAgentsResponse>, Status> {
        status::namespace(&request.into_inner().namespace)?;
        let infra = self.infra.fresh().await.map_err(status::of_worker)?;
        let mut agents = Vec::new();
        for (version, entry) in infra.agents() {
            agents.push(self.describe(&version, entry).await?);
        }
        Ok(Response::new(proto::ListAgentsResponse { agents }))
    }

    async fn get_agent(
        &self,
        request: Request<proto::GetAgentRequest>,
    ) -> Result<Response<proto::Agent>, Status> {
        let request = request.into_inner();
        status::namespace(&request.namespace)?;
        let name = AgentName::new(&request.name).map_err(status::of_id)?;
        let infra = self.infra.fresh().await.map_err(status::of_worker)?;
        let (version, entry) = infra.agent(&name).ok_or_else(|| no_agent(&name))?;
        Ok(Response::new(self.describe(&version, entry).await?))
    }

    async fn delete_agent(
        &self,
        request: Request<proto::DeleteAgentRequest>,
    ) -> Result<Response<proto::DeleteAgentResponse>, Status> {
        let request = request.into_inner();
        status::namespace(&request.namespace)?;
        let name = AgentName::new(&request.name).map_err(status::of_id)?;
        let infra = self.infra.fresh().await.map_err(status::of_worker)?;
        let (_, entry) = infra.agent(&name).ok_or_else(|| no_agent(&name))?;
        let version = entry.number;
        self.set(AGENT, name.as_str(), None).await?;
        Ok(Response::new(proto::DeleteAgentResponse { version }))
    }

    async fn put_fleet(
        &self,
        request: Request<proto::PutFleetRequest>,
    ) -> Result<Response<proto::Fleet>, Status> {
        self.put(request.into_inner()).await.map(Response::new)
    }

    async fn list_fleets(
        &self,
        request: Request<proto::ListFleetsRequest>,
    ) -> Result<Response<proto::ListFleetsResponse>, Status> {
        let fleets = self.fleets(&request.into_inner().namespace).await?;
        Ok(Response::new(proto::ListFleetsResponse { fleets }))
    }

    async fn get_fleet(
        &self,
        request: Request<proto::GetFleetRequest>,
    ) -> Result<Response<proto::Fleet>, Status> {
        let request = request.into_inner();
        let found = self.fresh_fleet(&request.namespace, &request.name).await;
        found.map(Response::new)
    }

    async fn delete_fleet(
        &self,
        request: Request<proto::DeleteFleetRequest>,
    ) -> Result<Response<proto::DeleteFleetResponse>, Status> {
        let request = request.into_inner();
        let deleted = self.delete_fleet_named(&request.namespace, &request.name);
        let version = deleted.await?;
        Ok(Response::new(proto::DeleteFleetResponse { version }))
    }

    async fn agent_logs(
        &self,
        request: Request<proto::AgentLogsRequest>,
    ) -> Result<Response<Self::AgentLogsStream>, Status> {
        let request = request.into_inner();
        status::namespace(&request.namespace)?;
        let name = AgentName::new(&request.name).map_err(status::of_id)?;
        let infra = self.infra.fresh().await.map_err(status::of_worker)?;
        infra.agent(&name).ok_or_else(|| no_agent(&name))?;
        let lines = logs::of_agent(&self.cx, &name, request.lines, request.follow).await?;
        Ok(Response::new(Box::pin(lines)))
    }

    async fn list_models(
        &self,
        request: Request<proto::ListModelsRequest>,
    ) -> Result<Response<proto::ListModelsResponse>, Status> {
        status::namespace(&request.into_inner().namespace)?;
        let infra = self.infra.fresh().await.map_err(status::of_worker)?;
        let serving = Serving::read(&self.cx.bus).await.map_err(status::of_bus)?;
        let mut models = BTreeMap::new();
        for (name, _) in infra.all(MODEL) {
            let Some((backend, model)) = name.split_once('/') else {
                continue;
            };
            let key = (backend.to_owned(), model.to_owned());
            models.insert(key, (BTreeSet::new(), 0));
        }
        for offer in serving.offers() {
            for model in &offer.models {
                let entry = models
                    .entry((offer.backend.clone(), model.name.clone()))
                    .or_insert((BTreeSet::new(), 0));
                entry.0.insert(offer.node.clone());
                entry.1 = entry.1.max(model.size.unwrap_or(0));
            }
        }
        let models = models
            .into_iter()
            .map(|((backend, name), (nodes, size))| proto::Model {
                name,
                backend,
                nodes: nodes.into_iter().collect(),
                size,
            })
            .collect();
        Ok(Response::new(proto::ListModelsResponse { models }))
    }

    async fn list_nodes(
        &self,
        _: Request<proto::ListNodesRequest>,
    ) -> Result<Response<proto::ListNodesResponse>, Status> {
        let now = self.cx.bus.now_ms();
        let mut nodes = Vec::new();
        for (entry, report) in self.reports().await? {
            if report.left {
                continue;
            }
            let state = if self.is_live(&entry, &report) {
                "ready"
            } else {
                "not-ready"
            };
            nodes.push(proto::Node {
                state: state.to_owned(),
                labels: report.labels.into_iter().collect(),
                version: report.version,
                workers: report
                    .workers
                    .iter()
                    .filter(|worker| worker.state != "stopped")
                    .count() as u32,
                last_seen_ms: now.saturating_sub(entry.time_ms),
                started_at: report.started_at_ms,
                incarnation: report.incarnation,
                name: report.node,
            });
        }
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Response::new(proto::ListNodesResponse { nodes }))
    }

    async fn list_workers(
        &self,
        request: Request<proto::ListWorkersRequest>,
    ) -> Result<Response<proto::ListWorkersResponse>, Status> {
        let asked = request.into_inner().node;
        if !asked.is_empty() {
            self.live_node(&NodeName::new(&asked).map_err(status::of_id)?)
                .await?;
        }
        let mut workers = Vec::new();
        for (entry, report) in self.reports().await? {
            if report.left || !(asked.is_empty() || report.node == asked) {
                continue;
            }
            let live = self.is_live(&entry, &report);
            for worker in report.workers {
                let (state, reason) = if live {
                    (worker.state, worker.reason)
                } else {
                    (
                        "stopped".to_owned(),
                        format!("node {} does not report", report.node),
                    )
                };
                workers.push(proto::Worker {
                    node: report.node.clone(),
                    role: worker.role,
                    index: worker.index,
                    pid: worker.pid,
                    state,
                    restarts: worker.restarts,
                    uptime_ms: worker.uptime_ms,
                    last_exit: worker.last_exit,
                    reason,
                    last_lines: worker.last_lines,
                    address: worker.address,
                    jobs: worker.jobs.len() as u32,
                    notes: worker.notes.into_iter().collect(),
                });
            }
        }
        workers.sort_by(|a, b| (&a.node, &a.role, a.index).cmp(&(&b.node, &b.role, b.index)));
        Ok(Response::new(proto::ListWorkersResponse { workers }))
    }

    async fn scale(
        &self,
        request: Request<proto::ScaleRequest>,
    ) -> Result<Response<proto::ScaleResponse>, Status> {
        let request = request.into_inner();
        let role = role(&request.role)?;
        if request.count > SCALE_MAX {
            return Err(Status::invalid_argument(format!(
                "count: {}, expected 0 to {SCALE_MAX}",
                request.count
            )));
        }
        if request.count > 0 && !self.supported.contains(&role) {
            return Err(Status::failed_precondition(format!(
                "this release cannot run workers of role {role}"
            )));
        }
        let node = self.node_of(&request.node)?;
        let report = self.live_node(&node).await?;
        let before = report
            .workers
            .iter()
            .filter(|w| w.role == role.as_str() && w.state != "stopped")
            .count() as u32;
        let infra = self.infra.fresh().await.map_err(status::of_worker)?;
        let current = infra
            .entry(SCALE, node.as_str())
            .and_then(|entry| entry.value.clone());
        let mut counts = current.unwrap_or_else(|| serde_json::json!({}));
        counts[role.as_str()] = request.count.into();
        self.set(SCALE, node.as_str(), Some(&counts)).await?;
        Ok(Response::new(proto::ScaleResponse {
            node: node.to_string(),
            before,
            after: request.count,
        }))
    }

    async fn restart_workers(
        &self,
        request: Request<proto::RestartWorkersRequest>,
    ) -> Result<Response<proto::RestartWorkersResponse>, Status> {
        let request = request.into_inner();
        let role = role(&request.role)?;
        let node = self.node_of(&request.node)?;
        let report = self.live_node(&node).await?;
        let restarted = report
            .workers
            .iter()
            .filter(|worker| worker.role == role.as_str())
            .count() as u32;
        if restarted == 0 {
            return Err(Status::not_found(format!(
                "node {node} has no worker of role {role}"
            )));
        }
        let command = serde_json::json!({ "restart": role });
        self.cx
            .bus
            .signal(
                &subjects::node_signal(&node),
                Bytes::from(command.to_string()),
            )
            .await
            .map_err(status::of_bus)?;
        Ok(Response::new(proto::RestartWorkersResponse { restarted }))
    }

    async fn worker_logs(
        &self,
        request: Request<proto::WorkerLogsRequest>,
    ) -> Result<Response<Self::WorkerLogsStream>, Status> {
        let request = request.into_inner();
        let role = role(&request.role)?;
        let lines =
            logs::of_role(&self.cx, role, &request.node, request.lines, request.follow).await?;
        Ok(Response::new(Box::pin(lines.map(|line| line))))
    }
}

fn no_agent(name: &AgentName) -> Status {
    Status::not_found(format!(
        "agent {name} does not exist; `vlinder agent list` shows all"
    ))
}
