//! Processes that dead workers leave behind.
//!
//! As the subreaper the daemon becomes the parent of every descendant whose parent died. Zombies
//! are reaped; what still lives gets a grace (a [`crate::boxed`] program ends its own children
//! then), after that it is killed. Processes of the daemon's own process group are left alone:
//! those it started itself, and no worker's descendant is in that group.

use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use crate::Error;

/// What an adopted process has to end by itself.
const GRACE: Duration = Duration::from_millis(500);
/// Between two looks while some are left after a kill; each look kills one more generation.
const AGAIN: Duration = Duration::from_millis(20);

/// Watches over adopted processes.
pub(crate) struct Orphans {
    died: tokio::signal::unix::Signal,
    kill_at: Option<Instant>,
}

impl Orphans {
    /// Makes this process the subreaper.
    pub fn adopt() -> Result<Self, Error> {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
            .map_err(Error::system("become a subreaper"))?;
        let died = signal(SignalKind::child()).map_err(Error::io("listen for SIGCHLD"))?;
        Ok(Self {
            died,
            kill_at: None,
        })
    }

    /// Waits until there is something to do. Safe to cancel.
    pub async fn due(&mut self) {
        match self.kill_at {
            Some(at) => tokio::select! {
                _ = self.died.recv() => {}
                () = tokio::time::sleep_until(at) => {}
            },
            None => drop(self.died.recv().await),
        }
    }

    /// Reaps, and kills what had its grace. `is_worker` names the children that are no orphans.
    pub fn sweep(&mut self, is_worker: impl Fn(u32) -> bool) {
        let now = Instant::now();
        let kill = self.kill_at.is_some_and(|at| now >= at);
        let left = sweep(kill, is_worker);
        self.kill_at = match (left, self.kill_at) {
            (0, _) => None,
            (_, Some(at)) if !kill => Some(at),
            (_, Some(_)) => Some(now + AGAIN),
            (_, None) => Some(now + GRACE),
        };
    }

    /// At the end: gives what is left its grace, then kills it; returns how many remain after
    /// `limit`.
    pub async fn finish(&mut self, limit: Duration) -> usize {
        let deadline = Instant::now() + limit;
        self.sweep(|_| false);
        while self.kill_at.is_some() && Instant::now() < deadline {
            tokio::select! {
                () = self.due() => {}
                () = tokio::time::sleep_until(deadline) => {}
            }
            self.sweep(|_| false);
        }
        sweep(true, |_| false)
    }
}

/// Returns how many orphans still live.
fn sweep(kill: bool, is_worker: impl Fn(u32) -> bool) -> usize {
    let own_group = rustix::process::getpgrp();
    let mut left = 0;
    for pid in crate::procfs::own_children() {
        let raw = pid.as_raw_nonzero().get().unsigned_abs();
        let own = || rustix::process::getpgid(Some(pid)).is_ok_and(|group| group == own_group);
        if is_worker(raw) || own() || is_reaped(pid) {
            continue;
        }
        left += 1;
        if kill {
            tracing::warn!(
                pid = raw,
                "killing a process that a dead worker left behind"
            );
            // It is our child and not reaped, so the id is still its own.
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
    left
}

fn is_reaped(pid: Pid) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    !matches!(rustix::process::waitid(WaitId::Pid(pid), options), Ok(None))
}
