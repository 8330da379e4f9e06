//! Kills and freezes at random what a node consists of, and puts it up again.

use crate::support::node::READY_DEADLINE;
use crate::support::{Node, Worker, proc};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rustix::process::{Pid, Signal, kill_process};
use std::ops::Range;
use std::time::{Duration, Instant};
use vlinder_testkit::NatsServer;

/// Between two deeds, in milliseconds.
const PAUSE_MS: Range<u64> = 500..3000;
/// How long a worker is frozen, in milliseconds: shorter and longer than what makes it count as hung.
const FROZEN_MS: Range<u64> = 500..8000;
/// How long NATS is away, in milliseconds.
const NATS_AWAY_MS: Range<u64> = 0..4000;
/// How long a daemon stays away, in milliseconds.
const DAEMON_AWAY_MS: Range<u64> = 0..1000;
/// One in so many daemons is killed again while it starts.
const KILLED_IN_START: u32 = 3;
/// In the middle of a start, in milliseconds.
const START_MS: Range<u64> = 20..600;

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    KillWorker,
    FreezeWorker,
    KillAgent,
    KillNats,
    KillDaemon,
}

/// When, to whom, and when what was taken away was back (as far as the killer put it back).
#[derive(Debug, Clone)]
pub struct Deed {
    pub kind: Kind,
    pub victim: String,
    pub at: Instant,
    pub over: Instant,
}

/// Sends a signal to a process that may have ended meanwhile.
fn send_if_alive(pid: u32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid as i32).filter(|_| pid > 1) {
        let _ = kill_process(pid, signal);
    }
}

pub struct Killer {
    only: Option<String>,
    rng: StdRng,
    node: Option<Node>,
    nats: Option<NatsServer>,
    deeds: Vec<Deed>,
    /// Roles that are still to be hit before any is hit again.
    roles: Vec<String>,
    /// Frozen processes and when they go on.
    frozen: Vec<(u32, Instant)>,
    began: Instant,
}

impl Killer {
    /// `only`: names of the kinds of deeds to do, for who looks into one of them.
    pub fn new(rng: StdRng, node: Node, nats: Option<NatsServer>, only: Option<String>) -> Self {
        Self {
            only,
            rng,
            node: Some(node),
            nats,
            deeds: vec![],
            roles: vec![],
            frozen: vec![],
            began: Instant::now(),
        }
    }

    fn node(&self) -> &Node {
        self.node.as_ref().expect("there is one between two deeds")
    }

    fn some(&mut self, range: Range<u64>) -> Duration {
        Duration::from_millis(self.rng.random_range(range))
    }

    /// Kills for that long, or until `enough`.
    pub async fn kill_for(&mut self, time: Duration, enough: impl Fn() -> bool) {
        let until = Instant::now() + time;
        while Instant::now() < until && !enough() {
            let next = Instant::now() + self.some(PAUSE_MS);
            self.thaw_until(next).await;
            let kind = self.choose();
            self.act(kind).await;
        }
    }

    fn choose(&mut self) -> Kind {
        use Kind::{FreezeWorker, KillAgent, KillDaemon, KillNats, KillWorker};
        let choices: &[(Kind, u32)] = if self.nats.is_some() {
            &[
                (KillWorker, 50),
                (FreezeWorker, 10),
                (KillAgent, 15),
                (KillNats, 13),
                (KillDaemon, 12),
            ]
        } else {
            &[(KillAgent, 50), (KillDaemon, 50)]
        };
        let weight = |(kind, weight): &(Kind, u32)| match &self.only {
            Some(only) if !only.contains(&format!("{kind:?}")) => 0,
            _ => *weight,
        };
        let chosen = choices.choose_weighted(&mut self.rng, weight);
        chosen.expect("some kind has a weight").0
    }

    async fn act(&mut self, kind: Kind) {
        let at = Instant::now();
        let victim = match kind {
            Kind::KillWorker => self.kill_worker().await,
            Kind::FreezeWorker => self.freeze_worker().await,
            Kind::KillAgent => self.kill_agent(),
            Kind::KillNats => self.kill_nats().await,
            Kind::KillDaemon => self.kill_daemon().await,
        };
        let Some(victim) = victim else { return };
        // Who is frozen is away until he goes on, though that happens while others die.
        let thaws = self.frozen.last().filter(|_| kind == Kind::FreezeWorker);
        let over = thaws.map_or_else(Instant::now, |(_, thaws)| *thaws);
        println!(
            "{:>8.3} s (:{:06.3}) {kind:?} {victim}",
            (at - self.began).as_secs_f64(),
            super::stats::second(at)
        );
        self.deeds.push(Deed {
            kind,
            victim,
            at,
            over,
        });
    }

    /// A running worker of the next role in turn. `None` when the node cannot say what runs.
    async fn victim(&mut self) -> Option<Worker> {
        let (status, body) = self.node().get("/state/cluster").await.ok()?;
        let mut cluster: serde_json::Value = serde_json::from_str(&body).ok()?;
        let own = self.node().spec().name().to_owned();
        let nodes = cluster["nodes"].as_array_mut().filter(|_| status == 200)?;
        let report = nodes.iter_mut().find(|node| node["node"] == own.as_str())?;
        let workers: Vec<Worker> = serde_json::from_value(report["workers"].take()).ok()?;
        // The report may be of a daemon that was killed: only what is this node's is killed.
        let alive = proc::children(self.node().pid());
        let mut running: Vec<Worker> = workers
            .into_iter()
            .filter(|worker| alive.iter().any(|process| process.pid == worker.pid))
            .collect();
        running.sort_by_key(Worker::key);
        if self.roles.is_empty() {
            self.roles = running.iter().map(|worker| worker.role.clone()).collect();
            self.roles.sort();
            self.roles.shuffle(&mut self.rng);
        }
        let role = self.roles.pop()?;
        running.retain(|worker| worker.role == role);
        running.choose(&mut self.rng).cloned()
    }

    async fn kill_worker(&mut self) -> Option<String> {
        let victim = self.victim().await?;
        proc::kill_if_alive(victim.pid);
        Some(format!(
            "{} {} (pid {})",
            victim.role, victim.index, victim.pid
        ))
    }

    async fn freeze_worker(&mut self) -> Option<String> {
        let victim = self.victim().await?;
        send_if_alive(victim.pid, Signal::STOP);
        let time = self.some(FROZEN_MS);
        self.frozen.push((victim.pid, Instant::now() + time));
        Some(format!(
            "{} {} (pid {}) for {time:?}",
            victim.role, victim.index, victim.pid
        ))
    }

    /// Waits until then; who was frozen for long enough goes on.
    async fn thaw_until(&mut self, until: Instant) {
        self.frozen.sort_by_key(|(_, at)| *at);
        while let Some((pid, at)) = self.frozen.first().copied().filter(|(_, at)| *at <= until) {
            tokio::time::sleep_until(at.into()).await;
            self.thaw(pid);
            self.frozen.remove(0);
        }
        tokio::time::sleep_until(until.into()).await;
    }

    fn thaw(&self, pid: u32) {
        // It may have been replaced, and its number given to somebody else.
        let is_ours = self
            .node()
            .spec()
            .processes()
            .iter()
            .any(|process| process.pid == pid);
        if is_ours {
            send_if_alive(pid, Signal::CONT);
        }
    }

    fn kill_agent(&mut self) -> Option<String> {
        let mut agents = self.node().spec().processes();
        agents.retain(|process| {
            process.command.contains("agent.py") && !process.command.contains("vlinderd")
        });
        agents.sort_by_key(|process| process.pid);
        let victim = agents.choose(&mut self.rng)?;
        proc::kill_if_alive(victim.pid);
        Some(format!("(pid {})", victim.pid))
    }

    async fn kill_nats(&mut self) -> Option<String> {
        let away = self.some(NATS_AWAY_MS);
        // Half of the time somebody dies while it is away.
        let also = if self.rng.random() {
            self.victim().await
        } else {
            None
        };
        let nats = self.nats.as_mut()?;
        nats.kill().await;
        tokio::time::sleep(away / 2).await;
        if let Some(victim) = &also {
            proc::kill_if_alive(victim.pid);
        }
        tokio::time::sleep(away / 2).await;
        nats.restart().await;
        let also = also.map(|victim| format!(", meanwhile {} {}", victim.role, victim.index));
        Some(format!("for {away:?}{}", also.unwrap_or_default()))
    }

    async fn kill_daemon(&mut self) -> Option<String> {
        let mut node = self.node.take()?;
        let mut how = String::new();
        loop {
            how += &format!("(pid {})", node.pid());
            let spec = node.kill9().await;
            tokio::time::sleep(self.some(DAEMON_AWAY_MS)).await;
            node = spec.spawn();
            if self.rng.random_range(0..KILLED_IN_START) > 0 {
                break;
            }
            let early = self.some(START_MS);
            tokio::time::sleep(early).await;
            how += &format!(", in its start after {early:?} ");
        }
        let began = Instant::now();
        node.wait_ready().await;
        how += &format!(", ready after {:?}", began.elapsed());
        self.node = Some(node);
        Some(how)
    }

    /// Puts everything up again and waits until the node says that all is well.
    pub async fn make_peace(mut self) -> (Node, Option<NatsServer>, Vec<Deed>) {
        for (pid, _) in std::mem::take(&mut self.frozen) {
            self.thaw(pid);
        }
        let mut node = self.node.take().expect("there is one between two deeds");
        node.wait_ready().await;
        let own = node.pid();
        let is_embedded = self.nats.is_none();
        let good = move |workers: &[Worker]| {
            let true_pid = |worker: &Worker| {
                let lives = proc::children(own)
                    .iter()
                    .any(|process| process.pid == worker.pid);
                if is_embedded {
                    worker.pid == own
                } else {
                    lives
                }
            };
            !workers.is_empty()
                && workers
                    .iter()
                    .all(|worker| worker.is_up() && true_pid(worker))
        };
        node.wait_workers(
            "every worker is up, and is who the list says",
            READY_DEADLINE,
            good,
        )
        .await;
        (node, self.nats, self.deeds)
    }
}
