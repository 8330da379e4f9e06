//! How an agent is doing: its deployment together with what its replicas and the nodes say.

use super::{RegistryService, role_of, runtime_name};
use crate::status;
use tonic::Status;
use vlinder_bus::KvEntry;
use vlinder_proto::registry as proto;
use vlinder_worker::infra::{AgentVersion, Entry};
use vlinder_worker::nodes::NodeReport;
use vlinder_worker::replicas::{self, ReplicaClaim};

impl RegistryService {
    pub(super) async fn describe(
        &self,
        version: &AgentVersion,
        entry: &Entry,
    ) -> Result<proto::Agent, Status> {
        let claims = replicas::read_all(&self.cx.bus)
            .await
            .map_err(status::of_bus)?;
        let name = &version.manifest.name;
        let mut of_agent: Vec<_> = claims
            .into_iter()
            .filter(|(agent, ..)| agent == name)
            .collect();
        of_agent.sort_by_key(|(_, index, ..)| *index);
        let reports = self.reports().await?;
        let instances: Vec<proto::Replica> = of_agent
            .into_iter()
            .filter(|(.., claim)| self.owner_is_up(&reports, claim))
            .map(|(_, index, _, claim)| proto::Replica {
                worker: format!("{}/{}/{}", claim.node, claim.role, claim.index),
                node: claim.node,
                index,
                state: claim.state,
                pid: claim.pid,
                restarts: claim.restarts,
                reason: if claim.version == entry.seq {
                    claim.reason
                } else {
                    "runs the version before".to_owned()
                },
            })
            .collect();
        let ready = instances
            .iter()
            .filter(|replica| replica.state == "ready" && replica.reason.is_empty())
            .count() as u32;
        let problem = instances
            .iter()
            .map(|replica| replica.reason.clone())
            .find(|reason| !reason.is_empty());
        let role = role_of(version.manifest.runtime);
        let has_worker = reports.iter().any(|(entry, report)| {
            self.is_live(entry, report)
                && report
                    .workers
                    .iter()
                    .any(|worker| worker.role == role.as_str() && worker.state == "ready")
        });
        let (state, reason) = if ready > 0 || version.manifest.replicas == 0 {
            ("ready", String::new())
        } else if instances.iter().any(|replica| replica.state == "failed") {
            ("failed", problem.unwrap_or_default())
        } else if !has_worker {
            (
                "waiting",
                format!("no live worker of role {role} can run it"),
            )
        } else {
            ("starting", problem.unwrap_or_default())
        };
        Ok(proto::Agent {
            name: name.to_string(),
            description: version.manifest.description.clone(),
            runtime: runtime_name(version.manifest.runtime).to_owned(),
            executable: version.manifest.executable.clone(),
            version: entry.seq,
            deployed_at: entry.time_ms,
            replicas: version.manifest.replicas,
            concurrency: version.manifest.concurrency,
            ready_replicas: ready,
            status: state.to_owned(),
            reason,
            manifest: serde_json::to_string(&version.manifest).unwrap_or_default(),
            hash: entry.hash.to_string(),
            instances,
        })
    }

    fn owner_is_up(&self, reports: &[(KvEntry, NodeReport)], claim: &ReplicaClaim) -> bool {
        reports
            .iter()
            .any(|(entry, report)| report.node == claim.node && self.is_live(entry, report))
    }
}
