//! How the supervisor's state looks from outside.

use super::{Supervisor, Worker};
use crate::machine::{Phase, Slot, Up};
use crate::{NodePhase, NodeStatus, WorkerKey, WorkerState, WorkerStatus};

impl Supervisor {
    pub(super) fn snapshot(&self) -> NodeStatus {
        let phase = match self.machine.starting_stage() {
            _ if self.machine.is_draining() => NodePhase::Draining,
            Some(stage) => NodePhase::Starting { stage },
            None => NodePhase::Running,
        };
        let workers = self
            .machine
            .slots()
            .map(|(key, slot)| self.worker_status(key, slot));
        NodeStatus {
            node: self.node.clone(),
            phase,
            late: self.late.clone(),
            desired: self.machine.desired().clone(),
            endings: self.endings.clone(),
            workers: workers.collect(),
        }
    }

    fn worker_status(&self, key: WorkerKey, slot: &Slot) -> WorkerStatus {
        let unknown = Worker::default();
        let worker = self.workers.get(&key).unwrap_or(&unknown);
        let (state, reason) = self.state_of(slot);
        let since = match slot.phase {
            Phase::Running { since, .. } => Some(since),
            Phase::Idle | Phase::Resting { .. } => None,
        };
        WorkerStatus {
            key,
            pid: worker.pid,
            state,
            reason,
            restarts: slot.incarnation.saturating_sub(1),
            started_at: worker.started_at,
            since,
            last_exit: worker.last_exit.clone(),
            tail: worker.tail.clone(),
            addresses: worker.addresses.clone(),
            notes: worker.notes.clone(),
        }
    }

    fn state_of(&self, slot: &Slot) -> (WorkerState, Option<String>) {
        let died = || slot.last_exit.as_ref().map(ToString::to_string);
        match &slot.phase {
            Phase::Idle if self.machine.is_draining() => (WorkerState::Stopped, None),
            Phase::Idle => (
                WorkerState::Starting,
                Some("waits for its turn in the start order".into()),
            ),
            Phase::Resting {
                crash_looping: false,
                ..
            } => (WorkerState::Backoff, died()),
            Phase::Resting {
                crash_looping: true,
                ..
            } => (WorkerState::CrashLooping, died()),
            Phase::Running {
                leaving: Some(_), ..
            } => (WorkerState::Draining, None),
            Phase::Running { up: Up::Ready, .. } => (WorkerState::Ready, None),
            Phase::Running {
                up: Up::Waiting { reason },
                ..
            } => (WorkerState::Waiting, Some(reason.clone())),
            Phase::Running {
                up: Up::Starting,
                since,
                ..
            } => {
                let limit = self.machine.policy().start_deadline;
                let late = since.elapsed() >= limit;
                (
                    WorkerState::Starting,
                    late.then(|| format!("not ready after {} s", limit.as_secs())),
                )
            }
        }
    }
}
