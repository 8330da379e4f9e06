//! How an agent is doing: its deployment together with what its replicas and the nodes say.

use super::{RegistryService, role_of, runtime_name};
use crate::status;
use tonic::Status;
use vlinder_bus::KvEntry;
use vlinder_proto::registry as proto;
use vlinder_worker::infra::{AgentVersion, Entry};
use vlinder_worker::nodes::NodeReport;
use vlinder_worker::replicas::{self, ReplicaClaim};

/// What is said of a replica that is about to be replaced.
const VERSION_BEFORE: &str = "runs the version before";

/// How the deployed version of an agent is doing, and why not better: as well as its best replica,
/// where one serves; else as badly as its worst one, which is what somebody must look at.
fn state_of(instances: &[proto::Replica], wanted: u32) -> (&'static str, String) {
    let current = || {
        instances
            .iter()
            .filter(|replica| replica.reason != VERSION_BEFORE)
    };
    let worst = ["crash-looping", "backoff"]
        .into_iter()
        .find(|state| current().any(|replica| replica.state == *state));
    let why = |state: &str| {
        let mut reasons = current()
            .filter(|replica| state.is_empty() || replica.state == state)
            .map(|replica| replica.reason.clone());
        reasons.find(|reason| !reason.is_empty())
    };
    let reason = why(worst.unwrap_or_default()).or_else(|| why(""));
    let is_served = current().any(|replica| replica.state == "ready");
    if is_served || wanted == 0 {
        // Those that do not serve are told of where there are others.
        return ("ready", reason.unwrap_or_default());
    }
    (worst.unwrap_or("starting"), reason.unwrap_or_default())
}

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
                    VERSION_BEFORE.to_owned()
                },
            })
            .collect();
        let ready = instances
            .iter()
            .filter(|replica| replica.state == "ready" && replica.reason.is_empty())
            .count() as u32;
        let role = role_of(version.manifest.runtime);
        let has_worker = reports.iter().any(|(entry, report)| {
            self.is_live(entry, report)
                && report
                    .workers
                    .iter()
                    .any(|worker| worker.role == role.as_str() && worker.state == "ready")
        });
        let (state, reason) = if ready == 0 && version.manifest.replicas > 0 && !has_worker {
            (
                "waiting",
                format!("no live worker of role {role} can run it"),
            )
        } else {
            state_of(&instances, version.manifest.replicas)
        };
        Ok(proto::Agent {
            name: name.to_string(),
            description: version.manifest.description.clone(),
            runtime: runtime_name(version.manifest.runtime).to_owned(),
            executable: version.manifest.executable.clone(),
            version: entry.number,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn replica(state: &str, reason: &str) -> proto::Replica {
        proto::Replica {
            state: state.into(),
            reason: reason.into(),
            ..Default::default()
        }
    }

    #[test]
    fn an_agent_is_what_its_replicas_are() {
        let before = || replica("ready", VERSION_BEFORE);
        for (replicas, state, reason) in [
            (vec![], "starting", ""),
            (vec![replica("starting", "")], "starting", ""),
            (
                vec![replica("starting", "no answer yet")],
                "starting",
                "no answer yet",
            ),
            (vec![replica("draining", "")], "starting", ""),
            (vec![replica("backoff", "exit 7")], "backoff", "exit 7"),
            (
                vec![
                    replica("starting", "exit 1"),
                    replica("backoff", "exit 2"),
                    replica("crash-looping", "exit 3"),
                ],
                "crash-looping",
                "exit 3",
            ),
            (vec![replica("ready", "")], "ready", ""),
            (
                vec![replica("ready", ""), replica("crash-looping", "exit 3")],
                "ready",
                "exit 3",
            ),
            // That the one before still serves says nothing of this one.
            (
                vec![before(), replica("backoff", "exit 7")],
                "backoff",
                "exit 7",
            ),
            (vec![before()], "starting", ""),
        ] {
            let wanted = replicas.len().max(1) as u32;
            let (is, why) = state_of(&replicas, wanted);
            assert_eq!((is, why.as_str()), (state, reason), "{replicas:#?}");
        }
        assert_eq!(state_of(&[], 0).0, "ready");
    }
}
