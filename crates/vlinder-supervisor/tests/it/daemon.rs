//! A whole daemon process that is killed with -9, and workers that leave orphans.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;
use vlinder_supervisor::{Deps, Options, Plan, Supervisor};

use crate::bed::{HARNESS, OLLAMA, Seen, is_alive, policy, role, signal, to_pid, wait_gone};

/// A6.
const LIMIT: Duration = Duration::from_secs(2);
/// The family of a "descend" worker: itself, near, far, box.
const FAMILY: usize = 4;
/// Its box's command and that one's two children.
const BOXED: usize = 3;

/// Prints `status PID…` whenever all are up: the workers', then those of their descendants.
#[test]
#[ignore = "entry point of the daemon that other tests kill"]
fn entry() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let options = Options {
            node: "doomed".into(),
            plan: Plan {
                roles: vec![
                    role(HARNESS, 2, json!({})),
                    role(OLLAMA, 1, json!({"does": "descend"})),
                ],
            },
            start_order: vec![],
            drain_order: vec![],
            policy: policy(),
            adopt_orphans: true,
            seed: 1,
        };
        let seen = Arc::new(Seen::default());
        let deps = Deps {
            held: seen.clone(),
            log: seen,
        };
        let (supervisor, handle) = Supervisor::new(options, deps).unwrap();
        let mut status = handle.status();
        let run = tokio::spawn(supervisor.run());
        while !run.is_finished() {
            let up = status
                .wait_for(|status| status.is_up())
                .await
                .unwrap()
                .clone();
            let mut pids = Vec::new();
            for worker in up.role(OLLAMA) {
                pids.push(worker.pid.unwrap().to_string());
                pids.extend(["near", "far", "box"].map(|name| worker.notes[name].clone()));
            }
            pids.extend(
                up.role(HARNESS)
                    .map(|worker| worker.pid.unwrap().to_string()),
            );
            println!("\nstatus {}", pids.join(" "));
            std::io::stdout().flush().unwrap();
            status.wait_for(|status| !status.is_up()).await.unwrap();
        }
    });
}

struct Daemon {
    child: Child,
    /// What the tests themselves have to end: without a box nobody promises anything about a
    /// worker's children once the daemon is killed.
    strays: Vec<u32>,
    lines: Box<dyn Iterator<Item = Vec<u32>>>,
}

impl Daemon {
    fn start() -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["daemon::entry", "--exact", "--ignored", "--nocapture"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let lines = lines.filter_map(|line| {
            let line = line.unwrap();
            let pids = line.strip_prefix("status ")?;
            Some(pids.split(' ').map(|pid| pid.parse().unwrap()).collect())
        });
        Self {
            child,
            strays: Vec::new(),
            lines: Box::new(lines),
        }
    }

    fn pids(&mut self) -> Vec<u32> {
        let pids = self.lines.next().expect("the daemon comes up");
        self.strays = pids[1..3].to_vec();
        pids
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for &stray in &self.strays {
            let _ = rustix::process::kill_process(to_pid(stray), Signal::KILL);
        }
    }
}

/// Everything below a process, itself included.
fn descendants(pid: u32) -> Vec<u32> {
    let mut all = vec![pid];
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
    {
        // A thread that has just ended has no children.
        let children = std::fs::read_to_string(thread.unwrap().path().join("children"));
        for child in children.unwrap_or_default().split_whitespace() {
            all.extend(descendants(child.parse().unwrap()));
        }
    }
    all
}

#[test]
fn nothing_outlives_a_killed_daemon() {
    let mut daemon = Daemon::start();
    let workers = daemon.pids();
    let mut all = descendants(daemon.child.id());
    assert!(
        workers.iter().all(|pid| all.contains(pid)),
        "{workers:?} in {all:?}"
    );
    assert_eq!(all.len(), 1 + 2 + FAMILY + BOXED, "{all:?}");
    all.retain(|pid| !daemon.strays.contains(pid));
    daemon.kill();
    let begun = std::time::Instant::now();
    for pid in all {
        wait_gone(pid, LIMIT.saturating_sub(begun.elapsed()));
    }
}

#[test]
fn a_dead_workers_descendants_are_swept_up() {
    let mut daemon = Daemon::start();
    let before = daemon.pids();
    let family = descendants(before[0]);
    assert_eq!(family.len(), FAMILY + BOXED, "{family:?}");
    signal(before[0], Signal::KILL);
    let after = daemon.pids();
    assert_ne!(after[0], before[0]);
    assert_eq!(
        after[FAMILY..],
        before[FAMILY..],
        "the others were not touched"
    );
    for pid in family {
        wait_gone(pid, LIMIT);
    }
    assert!(after.iter().all(|&pid| is_alive(pid)));
    // What a killed box leaves behind is swept up too, while the worker lives on.
    let boxed = after[3];
    let below = descendants(boxed);
    signal(boxed, Signal::KILL);
    for pid in below.into_iter().skip(1) {
        wait_gone(pid, LIMIT);
    }
    assert!(is_alive(after[0]));
}
