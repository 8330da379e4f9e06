//! Workers as tasks (embedded mode). The clock is paused: every wait is exact.

use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::{Value, json};
use vlinder_core::WorkerRole;
use vlinder_supervisor::{
    Blame, NodeStatus, Policy, Program, RolePlan, WorkerExit, WorkerState, WorkerStatus,
};

use crate::bed::{self, Bed, HARNESS, OLLAMA, SECRET, key};
use crate::entry::work;

fn role(role: WorkerRole, count: u32, config: Value) -> RolePlan {
    let program = Program::Task(Arc::new(|start, handle, events| {
        Box::pin(work(start, handle, events))
    }));
    RolePlan {
        program,
        ..bed::role(role, count, config)
    }
}

fn policy() -> Policy {
    Policy {
        slow_retry: Duration::from_secs(30),
        ..bed::policy()
    }
}

#[tokio::test(start_paused = true)]
async fn a_panic_is_contained_and_what_the_task_held_moves() {
    let roles = vec![
        role(
            OLLAMA,
            1,
            json!({"does": "panic", "hold": ["a", "b"], "release": ["a"]}),
        ),
        role(HARNESS, 1, json!({})),
    ];
    let bed = Bed::start(policy(), roles);
    let looping = |w: &WorkerStatus| w.state == WorkerState::CrashLooping;
    let worker = bed.wait_worker(key(OLLAMA, 0), "looping", looping).await;
    assert_eq!(
        worker.last_exit.unwrap().exit,
        WorkerExit::Panicked {
            message: "boom".into()
        }
    );
    let deaths = bed.deaths();
    assert_eq!(deaths.len(), 3, "budget 3");
    assert!(
        deaths
            .iter()
            .all(|death| death.deliveries == ["b"] && death.blame == Blame::Job)
    );
    assert_eq!(deaths[0].pid, None);
    bed.wait_worker(key(HARNESS, 0), "unharmed", |w| {
        w.state.is_up() && w.restarts == 0
    })
    .await;
    // A slow retry comes within half a minute and is one more death.
    bed.wait_worker(key(OLLAMA, 0), "tried again", |w| {
        w.restarts == 3 && looping(w)
    })
    .await;
    assert!(bed.drain().await.is_clean());
}

#[tokio::test(start_paused = true)]
async fn a_short_life_again_and_again_ends_in_a_crash_loop() {
    let bed = Bed::start(
        policy(),
        vec![role(OLLAMA, 1, json!({"does": "die after ready"}))],
    );
    let looping = |w: &WorkerStatus| w.state == WorkerState::CrashLooping;
    let worker = bed.wait_worker(key(OLLAMA, 0), "looping", looping).await;
    assert_eq!(
        worker.reason.as_deref(),
        Some("failed (exit 1): short life")
    );
}

#[tokio::test(start_paused = true)]
async fn a_misconfigured_task_holds_nobody_up() {
    let roles = vec![
        role(SECRET, 1, json!({"does": "misconfigured"})),
        role(OLLAMA, 1, json!({})),
    ];
    let bed = Bed::start_in_order(policy(), roles, vec![vec![SECRET]]);
    bed.wait_worker(key(OLLAMA, 0), "up", |w| w.state.is_up())
        .await;
    let worker = bed
        .wait_worker(key(SECRET, 0), "shown", |w| w.last_exit.is_some())
        .await;
    assert_eq!(worker.restarts, 0);
    assert_eq!(
        worker.reason.as_deref(),
        Some("configuration error (exit 78): no such key")
    );
    assert!(bed.drain().await.is_clean());
}

#[tokio::test(start_paused = true)]
async fn tasks_drain_or_are_dropped_at_the_deadline() {
    let roles = vec![
        role(OLLAMA, 1, json!({"hold": ["job"], "drain_ms": 2_000})),
        role(HARNESS, 1, json!({"hold": ["stuck"], "deaf": true})),
    ];
    let bed = Bed::start(policy(), roles);
    bed.wait_up().await;
    let (seen, status) = (bed.seen.clone(), bed.handle.status());
    bed.handle.drain(Duration::from_secs(5)).await.unwrap();
    let report = bed.run.await.unwrap();
    assert_eq!((report.killed, report.left), (1, 0));
    let deaths = seen.deaths.lock().unwrap();
    assert_eq!(deaths.len(), 1);
    assert_eq!(
        (&deaths[0].0.deliveries[0][..], deaths[0].0.blame),
        ("stuck", Blame::Nobody)
    );
    let exits: Vec<_> = status
        .borrow()
        .workers
        .iter()
        .map(|worker| worker.last_exit.as_ref().unwrap().exit.clone())
        .collect();
    assert_eq!(exits, [WorkerExit::DrainDeadline, WorkerExit::Drained]);
}

#[tokio::test(start_paused = true)]
async fn a_reload_reaches_a_task() {
    let bed = Bed::start(policy(), vec![role(OLLAMA, 1, json!({"n": 1}))]);
    bed.wait_up().await;
    let plan = vlinder_supervisor::Plan {
        roles: vec![role(OLLAMA, 1, json!({"n": 2}))],
    };
    bed.handle.reload(plan).await.unwrap();
    let told = |w: &WorkerStatus| w.notes.get("config").is_some_and(|c| c == "{\"n\":2}");
    bed.wait_worker(key(OLLAMA, 0), "told", told).await;
    assert!(bed.drain().await.is_clean());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// A1: on every combination exactly the configured workers run, and 0 means none.
    #[test]
    fn exactly_the_configured_workers_run(counts in prop::collection::vec(0u32..4, WorkerRole::ALL.len())) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let pairs = || WorkerRole::ALL.into_iter().zip(counts.iter().copied());
            let roles = pairs().map(|(name, count)| role(name, count, json!({}))).collect();
            let order = WorkerRole::ALL[..5].iter().map(|&role| vec![role]).collect();
            let bed = Bed::start_in_order(policy(), roles, order);
            let status = bed.wait_for("all up", NodeStatus::is_up).await;
            for (role, count) in pairs() {
                let indices: Vec<_> = status.role(role).map(|worker| worker.key.index).collect();
                assert_eq!(indices, (0..count).collect::<Vec<_>>(), "{role}");
            }
            assert!(bed.drain().await.is_clean());
        });
    }
}
