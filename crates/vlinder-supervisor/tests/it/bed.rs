//! A supervisor under test, with edges that remember what they saw.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use serde_json::Value;
use tokio::task::JoinHandle;
use vlinder_core::WorkerRole;
use vlinder_supervisor::{
    Death, Deps, DrainReport, HeldDeliveries, Limits, LogLine, LogSink, NodeStatus, Options, Plan,
    Policy, ProcessProgram, Program, RolePlan, Supervisor, SupervisorHandle, WorkerKey,
    WorkerStatus,
};

pub const OLLAMA: WorkerRole = WorkerRole::InferenceOllama;
pub const HARNESS: WorkerRole = WorkerRole::Harness;
pub const SECRET: WorkerRole = WorkerRole::Secret;

/// No test waits longer; a busy machine must not fail one.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Short times, so that tests are short.
pub fn policy() -> Policy {
    Policy {
        backoff_first: Duration::from_millis(10),
        backoff_max: Duration::from_millis(50),
        budget: 3,
        slow_retry: Duration::from_secs(300),
        drain_deadline: PATIENCE,
        start_deadline: PATIENCE,
        ..Policy::default()
    }
}

/// A role whose workers are this binary (`entry::worker`), told what to do by `config`.
pub fn role(role: WorkerRole, count: u32, config: Value) -> RolePlan {
    RolePlan {
        role,
        count,
        program: Program::Process(entry("entry::worker")),
        config,
        listeners: Vec::new(),
        limits: Limits::default(),
        reloads_live: true,
    }
}

/// One of the ignored tests in `entry`, as a command.
pub fn entry(test: &str) -> ProcessProgram {
    ProcessProgram {
        program: std::env::current_exe().unwrap(),
        name: "vlinderd".into(),
        args: [test, "--exact", "--ignored", "--nocapture"]
            .map(Into::into)
            .to_vec(),
        env: Vec::new(),
    }
}

pub fn key(role: WorkerRole, index: u32) -> WorkerKey {
    WorkerKey { role, index }
}

#[derive(Default)]
pub struct Seen {
    pub deaths: Mutex<Vec<(Death, Instant)>>,
    pub lines: Mutex<Vec<String>>,
}

#[async_trait]
impl HeldDeliveries for Seen {
    async fn release(&self, death: Death) {
        self.deaths.lock().unwrap().push((death, Instant::now()));
    }
}

impl LogSink for Seen {
    fn line(&self, line: LogLine<'_>) {
        assert!(!line.text.contains("burn the sink"), "as the test wants");
        let mut lines = self.lines.lock().unwrap();
        if lines.len() < 100_000 {
            lines.push(format!("{} {} {}", line.worker, line.pid, line.text));
        }
    }
}

pub struct Bed {
    pub handle: SupervisorHandle,
    pub seen: Arc<Seen>,
    pub run: JoinHandle<DrainReport>,
}

impl Bed {
    pub fn start(policy: Policy, roles: Vec<RolePlan>) -> Self {
        Self::start_in_order(policy, roles, vec![])
    }

    pub fn start_in_order(
        policy: Policy,
        roles: Vec<RolePlan>,
        start_order: Vec<Vec<WorkerRole>>,
    ) -> Self {
        let options = Options {
            node: "bed".into(),
            plan: Plan { roles },
            start_order,
            drain_order: vec![],
            policy,
            adopt_orphans: false,
            seed: 1,
        };
        let seen = Arc::new(Seen::default());
        let deps = Deps {
            held: seen.clone(),
            log: seen.clone(),
        };
        let (supervisor, handle) = Supervisor::new(options, deps).unwrap();
        Self {
            handle,
            seen,
            run: tokio::spawn(supervisor.run()),
        }
    }

    /// Waits for a condition on the status; the last one seen is in the message.
    pub async fn wait_for(&self, what: &str, met: impl Fn(&NodeStatus) -> bool) -> Arc<NodeStatus> {
        let mut status = self.handle.status();
        let waited = tokio::time::timeout(PATIENCE, status.wait_for(|status| met(status))).await;
        if let Ok(Ok(status)) = waited {
            return status.clone();
        }
        let now = self.handle.status().borrow().clone();
        panic!(
            "never: {what}; last seen: {now:#?}; lines: {:?}",
            self.seen.lines.lock().unwrap()
        );
    }

    pub async fn wait_up(&self) -> Arc<NodeStatus> {
        self.wait_for("all up", NodeStatus::is_up).await
    }

    /// Waits for a condition on one worker.
    pub async fn wait_worker(
        &self,
        key: WorkerKey,
        what: &str,
        met: impl Fn(&WorkerStatus) -> bool,
    ) -> WorkerStatus {
        let of = |status: &NodeStatus| status.workers.iter().find(|w| w.key == key).cloned();
        let status = self.wait_for(what, |status| of(status).is_some_and(|worker| met(&worker)));
        of(&*status.await).unwrap()
    }

    pub fn deaths(&self) -> Vec<Death> {
        self.seen
            .deaths
            .lock()
            .unwrap()
            .iter()
            .map(|(death, _)| death.clone())
            .collect()
    }

    pub async fn drain(self) -> DrainReport {
        self.handle.drain(PATIENCE).await.unwrap();
        self.run.await.unwrap()
    }
}

pub fn signal(pid: u32, signal: Signal) {
    rustix::process::kill_process(to_pid(pid), signal).unwrap();
}

/// Stops a child of this process, and waits until it stands still.
pub fn stop(pid: u32) {
    signal(pid, Signal::STOP);
    let options = WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT;
    rustix::process::waitid(WaitId::Pid(to_pid(pid)), options).unwrap();
}

pub fn to_pid(pid: u32) -> Pid {
    Pid::from_raw(pid.cast_signed()).unwrap()
}

/// Whether the process exists and is no zombie.
pub fn is_alive(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest.chars().next());
    state != Some(Some('Z'))
}

/// Waits until the process is gone, without polling: its handle becomes readable.
pub fn wait_gone(pid: u32, limit: Duration) {
    let flags = rustix::process::PidfdFlags::empty();
    let Ok(pidfd) = rustix::process::pidfd_open(to_pid(pid), flags) else {
        return;
    };
    let mut watched = [rustix::event::PollFd::new(
        &pidfd,
        rustix::event::PollFlags::IN,
    )];
    let timeout = limit.try_into().unwrap();
    let ended = rustix::event::poll(&mut watched, Some(&timeout)).unwrap();
    assert_eq!(ended, 1, "process {pid} lives on after {limit:?}");
}
