//! Who runs which replica: the decisions, as pure functions over what is known.
//!
//! A replica is claimed by one worker, in kv, by compare-and-set. Of the workers that may run an agent
//! each has its share of the replicas by a fixed rule, so that they need not talk; what its worker
//! does not claim soon, anybody may. A claim is void when its worker has not been seen for a while.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;
use tokio::time::Instant;
use vlinder_core::AgentName;
use vlinder_core::manifest::{AgentManifest, Placement};
use vlinder_worker::nodes::{self, NodeReport};
use vlinder_worker::replicas::ReplicaClaim;

/// A worker whose node was not heard of for so long is dead, unless the node names another time; its
/// claims are void then.
pub(crate) const DEAD_AFTER: Duration = Duration::from_millis(nodes::DEAD_AFTER_MS);
/// How long a replica is left to the worker whose share it is.
pub(crate) const SHARE_GRACE: Duration = Duration::from_secs(1);

/// A worker of our role.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Owner {
    pub node: String,
    pub index: u32,
}

/// What the nodes say about themselves.
pub(crate) struct Liveness {
    me: Owner,
    role: String,
    started: Instant,
    /// Until when each worker is taken to live if nothing more is heard; `None` for one that left.
    until: HashMap<Owner, Option<Instant>>,
    labels: HashMap<String, BTreeMap<String, String>>,
}

impl Liveness {
    pub fn new(me: Owner, role: String, labels: BTreeMap<String, String>, now: Instant) -> Self {
        Self {
            labels: HashMap::from([(me.node.clone(), labels)]),
            me,
            role,
            started: now,
            until: HashMap::new(),
        }
    }

    /// Takes a node's report, written at `at`.
    pub fn report(&mut self, report: &NodeReport, at: Instant) {
        if report.node != self.me.node {
            self.labels
                .insert(report.node.clone(), report.labels.clone());
        }
        if report.left {
            let all = self.until.iter_mut();
            for (_, until) in all.filter(|(owner, _)| owner.node == report.node) {
                *until = None;
            }
        }
        let dead_after = match report.dead_after_ms {
            0 => DEAD_AFTER,
            own => Duration::from_millis(own),
        };
        for worker in report
            .workers
            .iter()
            .filter(|worker| worker.role == self.role)
        {
            let lives = matches!(
                worker.state.as_str(),
                "starting" | "ready" | "waiting" | "draining"
            );
            let owner = Owner {
                node: report.node.clone(),
                index: worker.index,
            };
            if report.left {
                self.until.insert(owner, None);
            } else if lives {
                self.until.insert(owner, Some(at + dead_after));
            }
        }
    }

    /// A node is forgotten.
    pub fn forget(&mut self, node: &str) {
        self.until.retain(|owner, _| owner.node != node);
    }

    /// Until when a claim of `owner` holds if nothing more is heard; `None`: it is void. Whoever was
    /// never heard of gets the time that it would take to be heard.
    pub fn lives_until(&self, owner: &Owner, now: Instant) -> Option<Instant> {
        let until = match self.until.get(owner) {
            Some(until) => (*until)?,
            None => self.started + DEAD_AFTER,
        };
        Some(until).filter(|until| *until > now)
    }

    /// The workers that live, ourselves included, in one order everywhere.
    pub fn live(&self, now: Instant) -> Vec<Owner> {
        let others = self
            .until
            .iter()
            .filter(|(owner, until)| **owner != self.me && until.is_some_and(|until| until > now));
        let mut live: Vec<Owner> = others.map(|(owner, _)| owner.clone()).collect();
        live.push(self.me.clone());
        live.sort();
        live
    }

    /// Those of `live` that may run an agent.
    fn fitting(&self, live: &[Owner], placement: &Placement) -> Vec<Owner> {
        let fits = |owner: &&Owner| {
            let none = BTreeMap::new();
            let labels = self.labels.get(&owner.node).unwrap_or(&none);
            let node_fits = placement
                .node
                .as_ref()
                .is_none_or(|node| node.as_str() == owner.node);
            node_fits
                && placement
                    .labels
                    .iter()
                    .all(|(key, value)| labels.get(key) == Some(value))
        };
        live.iter().filter(fits).cloned().collect()
    }
}

/// What is to be done about one replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is ours: run it.
    Ours,
    /// Nobody's: claim it now, over what stands there at this revision (0: nothing).
    Claim(u64),
    /// Not ours now; look again then, if ever.
    Leave(Option<Instant>),
}

/// Decides about replica `index` of an agent.
pub(crate) fn decide(
    liveness: &Liveness,
    live: &[Owner],
    manifest: &AgentManifest,
    index: u32,
    claim: Option<&(ReplicaClaim, u64)>,
    free_since: Option<Instant>,
    now: Instant,
) -> Verdict {
    let fitting = liveness.fitting(live, &manifest.placement);
    let may_run = fitting.contains(&liveness.me) && index < manifest.replicas;
    if let Some((claim, _)) = claim {
        let owner = owner_of(claim);
        if owner == liveness.me && claim.role == liveness.role {
            return if may_run {
                Verdict::Ours
            } else {
                Verdict::Leave(None)
            };
        }
        let until = liveness.lives_until(&owner, now);
        if until.is_some() && claim.role == liveness.role {
            return Verdict::Leave(until.filter(|_| may_run));
        }
    }
    if !may_run {
        return Verdict::Leave(None);
    }
    let share = (u64::from(index) + offset(&manifest.name)) % fitting.len() as u64;
    let is_our_share = fitting[share as usize] == liveness.me;
    let free_until = free_since.unwrap_or(now) + SHARE_GRACE;
    if is_our_share || now >= free_until {
        Verdict::Claim(claim.map_or(0, |(_, revision)| *revision))
    } else {
        Verdict::Leave(Some(free_until))
    }
}

/// Whose claim it is.
pub(crate) fn owner_of(claim: &ReplicaClaim) -> Owner {
    Owner {
        node: claim.node.clone(),
        index: claim.index,
    }
}

/// Agents begin their rounds at different workers, so that those with one replica spread.
fn offset(agent: &AgentName) -> u64 {
    let hash = vlinder_core::ContentHash::of(agent.as_str().as_bytes());
    u64::from(hash.as_bytes()[0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use vlinder_worker::nodes::WorkerReport;

    const ROLE: &str = "agent.process";

    fn owner(node: &str, index: u32) -> Owner {
        Owner {
            node: node.to_owned(),
            index,
        }
    }

    fn report(node: &str, workers: u32, labels: &[(&str, &str)]) -> NodeReport {
        let worker = |index| WorkerReport {
            role: ROLE.to_owned(),
            index,
            state: "ready".to_owned(),
            ..WorkerReport::default()
        };
        NodeReport {
            node: node.to_owned(),
            labels: labels
                .iter()
                .map(|(k, v)| (k.to_string(), v.to_string()))
                .collect(),
            workers: (0..workers).map(worker).collect(),
            ..NodeReport::default()
        }
    }

    fn seen_by(me: Owner, reports: &[NodeReport], now: Instant) -> Liveness {
        let own = reports.iter().find(|report| report.node == me.node);
        let labels = own.map(|report| report.labels.clone()).unwrap_or_default();
        let mut liveness = Liveness::new(me, ROLE.to_owned(), labels, now);
        for report in reports {
            liveness.report(report, now);
        }
        liveness
    }

    fn manifest(replicas: u32, more: &str) -> AgentManifest {
        let text = format!(
            "name='a'\ndescription='d'\nruntime='process'\nexecutable='x'\nreplicas={replicas}\n{more}"
        );
        AgentManifest::parse(&text).unwrap()
    }

    fn claim(by: &Owner) -> (ReplicaClaim, u64) {
        let claim = ReplicaClaim {
            node: by.node.clone(),
            role: ROLE.to_owned(),
            index: by.index,
            ..ReplicaClaim::default()
        };
        (claim, 7)
    }

    #[test]
    fn shares_are_disjoint_and_fair() {
        let now = Instant::now();
        let reports = [report("n1", 2, &[]), report("n2", 1, &[])];
        let workers = [owner("n1", 0), owner("n1", 1), owner("n2", 0)];
        let manifest = manifest(8, "");
        let mut shares = vec![0; workers.len()];
        for index in 0..8 {
            let takers: Vec<_> = (0..workers.len())
                .filter(|w| {
                    let liveness = seen_by(workers[*w].clone(), &reports, now);
                    let live = liveness.live(now);
                    decide(&liveness, &live, &manifest, index, None, None, now) == Verdict::Claim(0)
                })
                .collect();
            assert_eq!(takers.len(), 1, "replica {index} goes to {takers:?}");
            shares[takers[0]] += 1;
        }
        assert!(
            shares.iter().all(|share| (2..=3).contains(share)),
            "{shares:?}"
        );
    }

    #[test]
    fn a_share_that_nobody_claims_is_anybodys() {
        let now = Instant::now();
        let reports = [report("n1", 1, &[]), report("n2", 1, &[])];
        let manifest = manifest(2, "");
        let liveness = seen_by(owner("n1", 0), &reports, now);
        let live = liveness.live(now);
        let verdicts: Vec<_> = (0..2)
            .map(|index| decide(&liveness, &live, &manifest, index, None, Some(now), now))
            .collect();
        assert!(
            verdicts.contains(&Verdict::Leave(Some(now + SHARE_GRACE))),
            "{verdicts:?}"
        );
        for index in 0..2 {
            let later = now + SHARE_GRACE;
            let verdict = decide(&liveness, &live, &manifest, index, None, Some(now), later);
            assert_eq!(verdict, Verdict::Claim(0));
        }
    }

    #[test]
    fn a_claim_holds_as_long_as_its_worker_lives() {
        let now = Instant::now();
        let reports = [report("n1", 1, &[]), report("n2", 1, &[])];
        let manifest = manifest(1, "");
        let mut liveness = seen_by(owner("n1", 0), &reports, now);
        let theirs = claim(&owner("n2", 0));
        let decide_at = |liveness: &Liveness, claim: &(ReplicaClaim, u64), at| {
            decide(
                liveness,
                &liveness.live(at),
                &manifest,
                0,
                Some(claim),
                Some(now),
                at,
            )
        };
        assert_eq!(
            decide_at(&liveness, &theirs, now),
            Verdict::Leave(Some(now + DEAD_AFTER))
        );
        assert_eq!(
            decide_at(&liveness, &theirs, now + DEAD_AFTER),
            Verdict::Claim(7)
        );
        // Nobody has heard of it yet: it gets as long.
        let unknown = claim(&owner("n3", 4));
        assert_eq!(
            decide_at(&liveness, &unknown, now),
            Verdict::Leave(Some(now + DEAD_AFTER))
        );
        // A node that reports rarely says so.
        let patient = NodeReport {
            dead_after_ms: 60_000,
            ..report("n2", 1, &[])
        };
        let mut waiting = seen_by(owner("n1", 0), &reports, now);
        waiting.report(&patient, now);
        let until = now + Duration::from_secs(60);
        assert_eq!(
            decide_at(&waiting, &theirs, now + DEAD_AFTER),
            Verdict::Leave(Some(until))
        );
        // Our own, from before a restart.
        assert_eq!(
            decide_at(&liveness, &claim(&owner("n1", 0)), now),
            Verdict::Ours
        );
        // One that left is gone at once.
        let left = NodeReport {
            left: true,
            ..report("n2", 1, &[])
        };
        liveness.report(&left, now);
        assert_eq!(decide_at(&liveness, &theirs, now), Verdict::Claim(7));
    }

    #[test]
    fn placement_is_respected() {
        let now = Instant::now();
        let reports = [report("n1", 1, &[("gpu", "yes")]), report("n2", 1, &[])];
        let both: Vec<_> = ["n1", "n2"]
            .map(|node| seen_by(owner(node, 0), &reports, now))
            .into();
        let verdicts = |more: &str| -> Vec<Verdict> {
            let manifest = manifest(1, more);
            let decide = |liveness: &Liveness| {
                decide(liveness, &liveness.live(now), &manifest, 0, None, None, now)
            };
            both.iter().map(decide).collect()
        };
        let (ours, no) = (Verdict::Claim(0), Verdict::Leave(None));
        assert_eq!(verdicts("[placement]\nlabels={gpu='yes'}"), [ours, no]);
        assert_eq!(verdicts("[placement]\nnode='n2'"), [no, ours]);
        assert_eq!(verdicts("[placement]\nnode='n9'"), [no, no]);
        // Where it runs already it must not stay.
        let moved = manifest(1, "[placement]\nnode='n2'");
        let verdict = decide(
            &both[0],
            &both[0].live(now),
            &moved,
            0,
            Some(&claim(&owner("n1", 0))),
            None,
            now,
        );
        assert_eq!(verdict, no);
    }
}
