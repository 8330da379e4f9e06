//! Who holds the turns that have no end yet, as the nodes report it.

use crate::error::Error;
use std::collections::HashMap;
use std::time::Duration;
use vlinder_bus::{Bus, StreamName};
use vlinder_worker::nodes::{self, NodeReport};

/// How long reading the reports of all nodes may take.
const REPORTS_DEADLINE: Duration = Duration::from_secs(5);

/// Who holds a delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holder {
    pub node: String,
    /// `role/index`.
    pub worker: String,
    pub attempt: u64,
}

/// All deliveries that live workers hold.
#[derive(Debug, Default)]
pub(crate) struct Holders {
    by_job: HashMap<String, Holder>,
    agent_workers_up: bool,
}

impl Holders {
    /// As the nodes report it now.
    pub async fn read(bus: &Bus) -> Result<Self, Error> {
        let reports = tokio::time::timeout(REPORTS_DEADLINE, nodes::read_all(bus)).await;
        let reports = reports.map_err(|_| Error::LogSilent)??;
        let fresh = reports
            .into_iter()
            .filter(|(entry, report)| report.is_live(bus, entry))
            .map(|(_, report)| report);
        Ok(Self::of(fresh))
    }

    fn of(reports: impl Iterator<Item = NodeReport>) -> Self {
        let mut holders = Self::default();
        for report in reports.filter(|report| !report.left) {
            for worker in report.workers {
                if worker.is_up() && worker.role.starts_with("agent.") {
                    holders.agent_workers_up = true;
                }
                for held in worker.jobs {
                    let holder = Holder {
                        node: report.node.clone(),
                        worker: format!("{}/{}", worker.role, worker.index),
                        attempt: held.attempt,
                    };
                    // Two may claim one job for a moment after a takeover: the later attempt is true.
                    let known = holders.by_job.get(&held.job);
                    if known.is_none_or(|known| known.attempt < holder.attempt) {
                        holders.by_job.insert(held.job, holder);
                    }
                }
            }
        }
        holders
    }

    /// Who holds the message at `seq` of `stream`.
    pub fn of_message(&self, stream: &StreamName, seq: u64) -> Option<&Holder> {
        self.by_job.get(&format!("{stream}:{seq}"))
    }

    /// Why a turn of `agent` that nobody holds waits, as far as the reports tell.
    pub fn reason(&self, agent: &str) -> String {
        if self.agent_workers_up {
            format!("no free replica of agent {agent}")
        } else {
            "no live worker runs agents".to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vlinder_core::Namespace;
    use vlinder_worker::nodes::{HeldJob, WorkerReport};

    fn report(node: &str, attempt: u64) -> NodeReport {
        NodeReport {
            node: node.into(),
            workers: vec![WorkerReport {
                role: "agent.process".into(),
                index: 1,
                state: "ready".into(),
                jobs: vec![HeldJob {
                    job: "VLINDER_LOG_default:7".into(),
                    attempt,
                }],
                ..WorkerReport::default()
            }],
            ..NodeReport::default()
        }
    }

    #[test]
    fn the_later_attempt_holds_the_turn() {
        let holders = Holders::of([report("a", 2), report("b", 1)].into_iter());
        let log = StreamName::Log(Namespace::default_ns());
        let holder = holders.of_message(&log, 7).unwrap();
        assert_eq!(
            (holder.node.as_str(), holder.worker.as_str()),
            ("a", "agent.process/1")
        );
        assert_eq!(holders.of_message(&log, 8), None);
        assert_eq!(holders.reason("echo"), "no free replica of agent echo");
    }

    #[test]
    fn a_node_that_left_holds_nothing() {
        let mut left = report("a", 1);
        left.left = true;
        let holders = Holders::of([left].into_iter());
        assert!(holders.by_job.is_empty());
        assert_eq!(holders.reason("echo"), "no live worker runs agents");
    }
}
