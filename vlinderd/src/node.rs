//! The node towards the cluster: what it reports of itself, what it is told, and what becomes of
//! the deliveries of its dead workers.

use crate::logs::set_level;
use crate::plan;
use async_trait::async_trait;
use futures::StreamExt;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use vlinder_bus::{Bus, subjects};
use vlinder_config::{Config, LiveChange, Loaded, Mistake};
use vlinder_core::{NodeName, WorkerRole};
use vlinder_supervisor::{
    Blame, Death, HeldDeliveries, NodeStatus, Plan, SupervisorHandle, WorkerKey,
};
use vlinder_worker::infra::{InfraView, SCALE};
use vlinder_worker::logs::{LogRecord, role_signal};
use vlinder_worker::nodes::{HeldJob, NodeReport, WorkerReport};
use vlinder_worker::{Held, WorkerCx, jobs, nodes};

/// Changes that come in quick succession are reported together.
const SETTLE: Duration = Duration::from_millis(30);
/// Deliveries that come and go within it are not worth a report: most calls take less.
const HELD_SETTLE: Duration = Duration::from_millis(200);
/// How long a report may take before the next is tried.
const REPORT_DEADLINE: Duration = Duration::from_secs(3);

/// Gives back what dead workers held.
pub struct GiveBack {
    /// The daemon's own connection.
    pub bus: Bus,
}

#[async_trait]
impl HeldDeliveries for GiveBack {
    async fn release(&self, death: Death) {
        let held = death.deliveries.iter().filter_map(|text| Held::parse(text));
        let give_back = held.map(|held| async move {
            let done = match death.blame {
                Blame::Job => jobs::after_death(&self.bus, &held.job, &held.token).await.map(|_| ()),
                Blame::Nobody => self.bus.hand_back(&held.token, Duration::ZERO).await,
            };
            if let Err(error) = done {
                tracing::warn!(job = held.job, %error, "a delivery could not be given back; the bus will after its ack wait");
            }
        });
        futures::future::join_all(give_back).await;
    }
}

/// Loads the configuration again, from the same places, after adding a live change if there is one.
pub type Reload = Box<dyn Fn(Option<&LiveChange>) -> Result<Loaded, Vec<Mistake>> + Send + Sync>;

/// Builds the plan of a configuration that takes the place of another.
pub type Replan = Box<dyn Fn(&Arc<Config>, &Config) -> Result<Plan, String> + Send + Sync>;

/// Everything about this node that outlives a single task.
pub struct NodeFace {
    /// The daemon's own connection.
    pub bus: Bus,
    /// Its orders to the supervisor.
    pub supervisor: SupervisorHandle,
    /// The configuration in force.
    pub config: watch::Sender<Arc<Config>>,
    /// Made anew at every start.
    pub incarnation: String,
    /// When this daemon started, milliseconds since the Unix epoch.
    pub started_at_ms: u64,
    /// Reads the configuration again.
    pub reload: Reload,
    /// Builds the plan of a configuration.
    pub plan: Replan,
}

impl NodeFace {
    /// The report of this moment.
    pub async fn report(&self, status: &NodeStatus, left: bool) -> NodeReport {
        let config = self.config.borrow().clone();
        let held = self.supervisor.held();
        let workers = status.workers.iter().map(|worker| {
            let jobs = held
                .iter()
                .filter(|(key, _)| *key == worker.key)
                .flat_map(|(_, held)| held);
            let jobs = jobs.filter_map(|text| Held::parse(text));
            WorkerReport {
                role: worker.key.role.to_string(),
                index: worker.key.index,
                pid: worker.pid.unwrap_or_else(std::process::id),
                state: worker.state.as_str().to_owned(),
                reason: worker.reason.clone().unwrap_or_default(),
                restarts: worker.restarts,
                uptime_ms: worker.uptime().as_millis() as u64,
                last_exit: worker
                    .last_exit
                    .as_ref()
                    .map(|last| last.exit.to_string())
                    .unwrap_or_default(),
                last_lines: worker
                    .last_exit
                    .as_ref()
                    .map(|last| {
                        last.last_lines
                            .iter()
                            .rev()
                            .take(10)
                            .rev()
                            .cloned()
                            .collect()
                    })
                    .unwrap_or_default(),
                address: worker
                    .addresses
                    .values()
                    .next()
                    .cloned()
                    .unwrap_or_default(),
                notes: worker.notes.clone(),
                jobs: jobs
                    .map(|held| HeldJob {
                        job: held.job,
                        attempt: held.attempt,
                    })
                    .collect(),
            }
        });
        NodeReport {
            node: config.node.name.to_string(),
            incarnation: self.incarnation.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            labels: config.node.labels.clone(),
            started_at_ms: self.started_at_ms,
            left,
            dead_after_ms: config.node.dead_after.as_millis() as u64,
            workers: workers.collect(),
        }
    }

    /// Reports at every change and at least four times within the time after which a silent node
    /// counts as dead. Of what workers hold only that is news which they hold for a while.
    pub async fn keep_reporting(&self) {
        let mut status = self.supervisor.status();
        let every = self.config.borrow().node.dead_after / 4;
        loop {
            let due = Instant::now() + every;
            let now = status.borrow_and_update().clone();
            let shown = self.supervisor.held();
            let report = self.report(&now, false).await;
            match tokio::time::timeout(REPORT_DEADLINE, nodes::publish(&self.bus, &report)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "the node could not report"),
                Err(_) => tracing::warn!("the bus took longer than 3 s to take the node's report"),
            }
            tokio::time::sleep(SETTLE).await;
            tokio::select! {
                changed = status.changed() => if changed.is_err() { return },
                () = self.other_held(&shown) => {}
                () = tokio::time::sleep_until(due) => {}
            }
        }
    }

    /// Waits until workers hold something else than was `shown`, for longer than a moment.
    async fn other_held(&self, shown: &[(WorkerKey, Vec<String>)]) {
        loop {
            self.supervisor.held_changed().await;
            tokio::time::sleep(HELD_SETTLE).await;
            if self.supervisor.held() != shown {
                return;
            }
        }
    }

    /// Says that this node has left, so that nobody waits for it to be missed.
    pub async fn report_leaving(&self) {
        let status = self.supervisor.status().borrow().clone();
        let report = self.report(&status, true).await;
        let _ = tokio::time::timeout(REPORT_DEADLINE, nodes::publish(&self.bus, &report)).await;
    }

    /// Follows live scale orders, which stand in the log, and keeps them in `run/live.toml`, so that the
    /// next start has them before it reaches the bus.
    pub async fn follow_orders(&self, cx: WorkerCx) {
        let mut view = match InfraView::start(&cx).await {
            Ok(view) => view,
            Err(error) => return tracing::warn!(%error, "live scale orders cannot be followed"),
        };
        let node = self.config.borrow().node.name.to_string();
        let mut done = 0;
        loop {
            let infra = view.now();
            if let Some(entry) = infra.entry(SCALE, &node).filter(|entry| entry.seq > done) {
                done = entry.seq;
                self.apply_scale(entry.value.as_ref()).await;
            }
            if view.changed().await.is_err() {
                return;
            }
        }
    }

    async fn apply_scale(&self, value: Option<&serde_json::Value>) {
        let counts = value
            .and_then(serde_json::Value::as_object)
            .into_iter()
            .flatten();
        let current = self.config.borrow().clone();
        let wanted = counts.filter_map(|(role, count)| {
            let role: WorkerRole = role.parse().ok()?;
            Some((role, u32::try_from(count.as_u64()?).ok()?))
        });
        let workers: BTreeMap<_, _> = wanted
            .filter(|(role, count)| current.workers.count(*role) != *count)
            .collect();
        if !workers.is_empty() {
            self.take_over(Some(&LiveChange {
                workers,
                labels: None,
            }))
            .await;
        }
    }

    /// Takes over what the configuration says now; a bad one is named and left alone.
    pub async fn reload(&self) {
        self.take_over(None).await;
    }

    async fn take_over(&self, change: Option<&LiveChange>) {
        let loaded = match (self.reload)(change) {
            Ok(loaded) => loaded,
            Err(mistakes) => {
                for mistake in &mistakes {
                    tracing::error!("{mistake}");
                }
                tracing::error!(
                    mistakes = mistakes.len(),
                    "the configuration was not taken over; the old one stays in force"
                );
                return;
            }
        };
        let mut config = loaded.config;
        let old = self.config.borrow().clone();
        // Made at the first start and not in any file that is loaded.
        config.auth.token = config.auth.token.or_else(|| old.auth.token.clone());
        if keep_until_next_start(&mut config, &old) {
            tracing::warn!(
                "changes of queue, token, listeners and node name take effect at the next start"
            );
        }
        set_level(&config);
        let config = Arc::new(config);
        let plan = match (self.plan)(&config, &old) {
            Ok(plan) => plan,
            Err(error) => {
                set_level(&old);
                tracing::error!(error, "the configuration was not taken over");
                return self.forget(change, &old);
            }
        };
        self.config.send_replace(config);
        match self.supervisor.reload(plan).await {
            Ok(()) => tracing::info!("the configuration was taken over"),
            Err(error) => tracing::error!(%error, "the configuration was not taken over"),
        }
    }

    /// Puts back the counts of a live change that cannot be done, so that it does not stand in the
    /// way of the next start.
    fn forget(&self, change: Option<&LiveChange>, old: &Config) {
        let Some(change) = change else { return };
        let roles = change.workers.keys();
        let undo = LiveChange {
            workers: roles
                .map(|role| (*role, old.workers.count(*role)))
                .collect(),
            labels: None,
        };
        for mistake in (self.reload)(Some(&undo)).err().unwrap_or_default() {
            tracing::error!("{mistake}");
        }
    }

    /// Does what signals to this node ask for.
    pub async fn follow_signals(&self, node: NodeName) {
        let signals = self.bus.signals(&subjects::node_signal(&node)).await;
        let mut signals = match signals {
            Ok(signals) => signals,
            Err(error) => return tracing::warn!(%error, "orders to this node cannot be heard"),
        };
        while let Some(signal) = signals.next().await {
            let order: serde_json::Value = serde_json::from_slice(&signal.body).unwrap_or_default();
            let Some(role) = order["restart"].as_str().and_then(|role| role.parse().ok()) else {
                tracing::warn!("an order to this node was not understood");
                continue;
            };
            tracing::info!(%role, "restarting workers, as ordered");
            if let Err(error) = self.supervisor.restart(role).await {
                tracing::warn!(%error, %role, "the workers were not restarted");
            }
        }
    }
}

/// Puts back what the daemon itself took from its start on; returns whether that was different.
fn keep_until_next_start(config: &mut Config, old: &Config) -> bool {
    let wanted = config.clone();
    config.queue = old.queue.clone();
    config.auth = old.auth.clone();
    config.node.name = old.node.name.clone();
    config.distributed.bind = old.distributed.bind;
    config.distributed.ports = old.distributed.ports.clone();
    *config != wanted
}

/// Sends workers' log lines to whoever follows them from another machine.
pub async fn send_logs(bus: Bus, mut lines: mpsc::Receiver<(WorkerRole, LogRecord)>) {
    while let Some((role, record)) = lines.recv().await {
        let body = serde_json::to_vec(&record).unwrap_or_default();
        // Nobody may be listening; the file has the line.
        let _ = bus.signal(&role_signal(role), body.into()).await;
    }
}

/// Milliseconds since the Unix epoch, by this machine's clock.
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_millis() as u64
}

/// The stages of start and drain as the supervisor wants them.
pub fn stages(order: &[&[WorkerRole]]) -> Vec<Vec<WorkerRole>> {
    order.iter().map(|stage| stage.to_vec()).collect()
}

/// The order of the start.
pub fn start_order() -> Vec<Vec<WorkerRole>> {
    stages(&plan::START_ORDER)
}

/// The order of the drain.
pub fn drain_order() -> Vec<Vec<WorkerRole>> {
    stages(&plan::DRAIN_ORDER)
}
