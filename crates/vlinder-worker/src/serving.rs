//! Who can serve what now, as far as the nodes' reports and the offers of models tell; and in words,
//! why a call that nobody answers waits.
//!
//! It is a snapshot, good for telling people and agents. No work is ever routed by it: that the queues
//! do, by who pulls from them (design.md rule 10).

use crate::nodes::{self, NodeReport, WorkerReport};
use crate::offers::{self, Offer};
use vlinder_bus::Bus;
use vlinder_core::WorkerRole;

/// How the reason begins where nobody at all can serve.
pub const NO_WORKER: &str = "no live worker";

/// The note in which a storage worker tells which kinds of stores it serves, divided by spaces.
pub const NOTE_STORES: &str = "stores";

/// The live nodes, and the offers of their workers.
#[derive(Debug, Clone, Default)]
pub struct Serving {
    live: Vec<NodeReport>,
    offers: Vec<Offer>,
    /// What nodes and workers that are away had offered.
    stale: Vec<Offer>,
}

impl Serving {
    /// As it is now.
    pub async fn read(bus: &Bus) -> Result<Self, vlinder_bus::Error> {
        // Reports last: of the two they must be the newer.
        let offers = offers::read_entries(bus).await?;
        let reports = nodes::read_all(bus).await?;
        let live = reports
            .into_iter()
            .filter(|(entry, report)| report.is_live(bus, entry))
            .map(|(_, report)| report);
        let offers = offers
            .into_iter()
            .map(|(entry, offer)| (offers::index_of(&entry.key), offer));
        Ok(Self::of(live.collect(), offers))
    }

    fn of(live: Vec<NodeReport>, offers: impl Iterator<Item = (Option<u32>, Offer)>) -> Self {
        let is_up = |index: &Option<u32>, offer: &Offer| {
            let role = format!("inference.{}", offer.backend);
            let workers = live
                .iter()
                .filter(|report| report.node == offer.node)
                .flat_map(|report| &report.workers);
            workers
                .filter(|worker| worker.is_up() && worker.role == role)
                .any(|worker| Some(worker.index) == *index)
        };
        let (offers, stale): (Vec<_>, Vec<_>) =
            offers.partition(|(index, offer)| is_up(index, offer));
        let only = |offers: Vec<(_, Offer)>| offers.into_iter().map(|(_, offer)| offer).collect();
        let (offers, stale) = (only(offers), only(stale));
        Self {
            live,
            offers,
            stale,
        }
    }

    /// The live nodes.
    pub fn nodes(&self) -> &[NodeReport] {
        &self.live
    }

    /// What the workers that are up offer, or why they offer nothing.
    pub fn offers(&self) -> &[Offer] {
        &self.offers
    }

    /// Whether a live worker holds the message of that name, `STREAM:seq`.
    pub fn holds(&self, job: &str) -> bool {
        let workers = self.live.iter().flat_map(|report| &report.workers);
        workers
            .flat_map(|worker| &worker.jobs)
            .any(|held| held.job == job)
    }

    /// The workers of a role on live nodes, in whatever state.
    pub fn workers(&self, role: WorkerRole) -> impl Iterator<Item = &WorkerReport> {
        let workers = self.live.iter().flat_map(|report| &report.workers);
        workers.filter(move |worker| worker.role == role.as_str())
    }

    /// Why no worker of the role can work now; `None` when one can.
    pub fn why_no_worker(&self, role: WorkerRole) -> Option<String> {
        if self.workers(role).any(|worker| worker.state == "ready") {
            return None;
        }
        let reason = self
            .workers(role)
            .map(|worker| worker.reason.as_str())
            .find(|reason| !reason.is_empty());
        let reason = reason.map_or(String::new(), |reason| format!(" ({reason})"));
        Some(format!("{NO_WORKER} of role {role}{reason}"))
    }

    /// Why a call that nobody has answered waits; `None` when somebody could serve it.
    pub fn why_call_waits(&self, service: &str, backend: &str, selector: &str) -> Option<String> {
        match (service, backend) {
            ("kv", kind) => self.why_no_store(WorkerRole::StorageObjectSqlite, kind),
            ("vec", kind) => self.why_no_store(WorkerRole::StorageVectorSqlite, kind),
            ("infer" | "embed", _) => self.why_no_model(backend, selector),
            _ => None,
        }
    }

    /// Any storage worker serves the kinds that need nothing; `s3` those that were given access.
    fn why_no_store(&self, role: WorkerRole, kind: &str) -> Option<String> {
        let why = self.why_no_worker(role);
        if why.is_some() || kind != "s3" {
            return why;
        }
        let serves = |worker: &WorkerReport| {
            let kinds = worker.notes.get(NOTE_STORES);
            worker.state == "ready"
                && kinds.is_some_and(|kinds| kinds.split(' ').any(|it| it == kind))
        };
        match self.workers(role).any(serves) {
            true => None,
            false => Some(format!(
                "{NO_WORKER} of role {role} has access to S3 (s3.* or the AWS_ variables of its node)"
            )),
        }
    }

    fn why_no_model(&self, backend: &str, model: &str) -> Option<String> {
        let has = |offer: &Offer| {
            offer.backend == backend
                && offer
                    .models
                    .iter()
                    .any(|known| is_named(&known.name, model))
        };
        if self.offers.iter().any(has) {
            return None;
        }
        let mut details: Vec<String> = Vec::new();
        for offer in &self.stale {
            if has(offer) {
                details.push(format!("node {}, which had it, is away", offer.node));
            }
        }
        for offer in self.offers.iter().filter(|offer| offer.backend == backend) {
            if let Some(problem) = &offer.problem {
                details.push(format!("node {}: {problem}", offer.node));
            }
        }
        details.sort();
        details.dedup();
        let details = match details.is_empty() {
            true => String::new(),
            false => format!(" ({})", details.join("; ")),
        };
        Some(format!(
            "{NO_WORKER} offers the {backend} model {model}{details}"
        ))
    }
}

/// Whether a model that is offered as `offered` is meant by `asked`: Ollama lets `:latest` be left out.
fn is_named(offered: &str, asked: &str) -> bool {
    offered == asked || offered.strip_suffix(":latest") == Some(asked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offers::OfferedModel;

    fn node(name: &str, workers: &[(&str, u32, &str)]) -> NodeReport {
        let workers = workers.iter().map(|(role, index, state)| WorkerReport {
            role: (*role).to_owned(),
            index: *index,
            state: (*state).to_owned(),
            reason: if *state == "waiting" { "no disk" } else { "" }.to_owned(),
            ..WorkerReport::default()
        });
        NodeReport {
            node: name.to_owned(),
            workers: workers.collect(),
            ..NodeReport::default()
        }
    }

    fn offer(
        node: &str,
        index: u32,
        models: &[&str],
        problem: Option<&str>,
    ) -> (Option<u32>, Offer) {
        let models = models.iter().map(|name| OfferedModel {
            name: (*name).to_owned(),
            size: None,
        });
        let offer = Offer {
            node: node.to_owned(),
            backend: "ollama".to_owned(),
            endpoint: "http://there".to_owned(),
            models: models.collect(),
            problem: problem.map(str::to_owned),
        };
        (Some(index), offer)
    }

    #[test]
    fn offers_of_workers_that_are_away_do_not_count() {
        let live = vec![
            node("a", &[("inference.ollama", 0, "ready")]),
            node("b", &[("inference.ollama", 0, "waiting")]),
            node("c", &[("inference.openai", 0, "ready")]),
        ];
        let offers = [
            offer("a", 0, &["m:latest"], None),
            offer("a", 1, &["scaled-down"], None),
            offer("b", 0, &[], Some("no Ollama at http://there")),
            offer("c", 0, &["other-role"], None),
            offer("dead", 0, &["gone"], None),
        ];
        let serving = Serving::of(live, offers.into_iter());
        let nodes: Vec<&str> = serving.offers().iter().map(|o| o.node.as_str()).collect();
        assert_eq!(nodes, ["a", "b"]);
        let why = |model| serving.why_call_waits("infer", "ollama", model);
        assert_eq!(why("m:latest"), None);
        assert_eq!(why("m"), None);
        for model in ["scaled-down", "other-role", "gone", "never"] {
            let why = why(model).unwrap();
            assert!(why.starts_with(NO_WORKER) && why.contains(model), "{why}");
            assert!(why.contains("node b: no Ollama at http://there"), "{why}");
            let is_away = why.contains("which had it, is away");
            assert_eq!(is_away, model != "never", "{why}");
        }
        assert!(serving.why_call_waits("embed", "openai", "m").is_some());
    }

    #[test]
    fn stores_need_a_ready_worker() {
        let why = |workers: &[(&str, u32, &str)]| {
            let serving = Serving::of(vec![node("a", workers)], std::iter::empty());
            serving.why_call_waits("kv", "sqlite", "notes")
        };
        let role = "storage.object.sqlite";
        assert_eq!(why(&[(role, 0, "backoff"), (role, 1, "ready")]), None);
        let none = format!("{NO_WORKER} of role {role}");
        assert_eq!(
            why(&[("storage.vector.sqlite", 0, "ready")]),
            Some(none.clone())
        );
        assert_eq!(
            why(&[(role, 0, "waiting")]),
            Some(format!("{none} (no disk)"))
        );
    }

    #[test]
    fn stores_in_s3_need_a_worker_with_access() {
        let role = "storage.object.sqlite";
        let why = |kinds: &str, store: &str| {
            let mut report = node("a", &[(role, 0, "ready")]);
            let notes = &mut report.workers[0].notes;
            notes.insert(NOTE_STORES.to_owned(), kinds.to_owned());
            let serving = Serving::of(vec![report], std::iter::empty());
            serving.why_call_waits("kv", store, "bucket/x")
        };
        assert_eq!(why("sqlite nats", "nats"), None);
        assert_eq!(why("sqlite nats s3", "s3"), None);
        let told = why("sqlite nats", "s3").unwrap();
        assert!(
            told.starts_with(NO_WORKER) && told.contains("access to S3"),
            "{told}"
        );
    }
}
