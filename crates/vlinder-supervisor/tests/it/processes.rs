//! Deaths of worker processes.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;
use vlinder_supervisor::{
    Blame, Limits, Policy, ProcessProgram, Program, RolePlan, WorkerExit, WorkerState,
};

use crate::bed::{Bed, HARNESS, OLLAMA, SECRET, entry, key, policy, role, signal, stop, wait_gone};

#[tokio::test]
async fn workers_start_in_order_and_say_where_they_are() {
    let roles = vec![
        role(OLLAMA, 2, json!({"does": "wait"})),
        role(HARNESS, 0, json!({})),
        role(SECRET, 1, json!({})),
    ];
    let bed = Bed::start_in_order(policy(), roles, vec![vec![SECRET]]);
    let status = bed.wait_up().await;
    let seen: Vec<_> = status
        .workers
        .iter()
        .map(|w| (w.key, w.state, w.restarts))
        .collect();
    let expected = [
        (key(SECRET, 0), WorkerState::Ready, 0),
        (key(OLLAMA, 0), WorkerState::Waiting, 0),
        (key(OLLAMA, 1), WorkerState::Waiting, 0),
    ];
    assert_eq!(seen, expected);
    assert_eq!(status.workers[0].addresses["http"], "127.0.0.1:1");
    assert_eq!(status.workers[0].notes["incarnation"], "1");
    assert_eq!(status.workers[1].reason.as_deref(), Some("no Ollama"));
    assert!(status.workers[0].started_at <= status.workers[1].started_at);
    assert!(bed.drain().await.is_clean());
}

#[tokio::test]
async fn a_killed_worker_is_replaced_and_what_it_held_moves_at_once() {
    let config = json!({"hold": ["one", "two", "three"], "release": ["two"]});
    let bed = Bed::start(policy(), vec![role(OLLAMA, 1, config)]);
    let worker = key(OLLAMA, 0);
    let old = bed.wait_up().await.workers[0].pid.unwrap();
    let killed = Instant::now();
    signal(old, Signal::KILL);
    let new = bed
        .wait_worker(worker, "replaced", |w| w.restarts == 1 && w.state.is_up())
        .await;
    assert_ne!(new.pid, Some(old));
    let exit = new.last_exit.unwrap().exit;
    assert_eq!(
        exit,
        WorkerExit::Signalled {
            signal: 9,
            core_dumped: false
        }
    );

    let (death, at) = bed.seen.deaths.lock().unwrap()[0].clone();
    assert_eq!(
        (death.worker, death.pid, death.incarnation),
        (worker, Some(old), 1)
    );
    assert_eq!(death.deliveries, ["one", "three"]);
    assert_eq!(death.blame, Blame::Job);
    let took = at - killed;
    println!(
        "given back after {took:?}, replaced and ready after {:?}",
        killed.elapsed()
    );
    // The aim is 1-2 ms; the bound leaves room for a busy machine.
    assert!(took < Duration::from_millis(500), "{took:?}");
    assert!(bed.drain().await.is_clean());
}

#[tokio::test]
async fn a_stopped_worker_is_noticed_and_killed() {
    let quick = Policy {
        unresponsive: Duration::from_secs(1),
        ..policy()
    };
    let roles = vec![
        role(OLLAMA, 1, json!({"hold": ["job"]})),
        role(HARNESS, 1, json!({})),
    ];
    let bed = Bed::start(quick, roles);
    let status = bed.wait_up().await;
    let old = status.role(OLLAMA).next().unwrap().pid.unwrap();
    stop(old);
    let new = bed.wait_worker(key(OLLAMA, 0), "replaced", |w| {
        w.restarts == 1 && w.state.is_up()
    });
    let exit = new.await.last_exit.unwrap();
    assert!(
        matches!(exit.exit, WorkerExit::Unresponsive { .. }),
        "{:?}",
        exit.exit
    );
    assert_eq!(bed.deaths()[0].blame, Blame::Job);
    wait_gone(old, Duration::ZERO);
    let status = bed.handle.status().borrow().clone();
    assert_eq!(status.role(HARNESS).next().unwrap().restarts, 0);
    assert!(bed.drain().await.is_clean());
}

#[tokio::test]
async fn a_blocked_loop_is_noticed() {
    let quick = Policy {
        unresponsive: Duration::from_secs(1),
        ..policy()
    };
    let bed = Bed::start(quick, vec![role(OLLAMA, 1, json!({"does": "block"}))]);
    let unresponsive = |exit: &WorkerExit| matches!(exit, WorkerExit::Unresponsive { .. });
    bed.wait_worker(key(OLLAMA, 0), "found out", |worker| {
        worker
            .last_exit
            .as_ref()
            .is_some_and(|last| unresponsive(&last.exit))
    })
    .await;
}

#[tokio::test]
async fn a_process_that_never_connects_is_noticed() {
    let quick = Policy {
        unresponsive: Duration::from_millis(500),
        start_deadline: Duration::from_millis(500),
        ..policy()
    };
    let program = Program::Process(entry("entry::deaf"));
    let bed = Bed::start(
        quick,
        vec![RolePlan {
            program,
            ..role(OLLAMA, 1, json!({}))
        }],
    );
    let worker = bed
        .wait_worker(key(OLLAMA, 0), "found out", |w| w.last_exit.is_some())
        .await;
    assert!(matches!(
        worker.last_exit.unwrap().exit,
        WorkerExit::Unresponsive { .. }
    ));
}

#[tokio::test]
async fn a_configuration_error_is_named_and_not_retried_fast() {
    let roles = vec![
        role(OLLAMA, 1, json!({"does": "misconfigured"})),
        role(HARNESS, 1, json!({})),
    ];
    let bed = Bed::start_in_order(policy(), roles, vec![vec![OLLAMA]]);
    bed.wait_worker(key(HARNESS, 0), "the others go on", |w| {
        w.state == WorkerState::Ready
    })
    .await;
    let looping = |w: &vlinder_supervisor::WorkerStatus| w.state == WorkerState::CrashLooping;
    let worker = bed.wait_worker(key(OLLAMA, 0), "shown", looping).await;
    assert_eq!(worker.restarts, 0);
    let reason = worker.reason.unwrap();
    assert_eq!(
        reason,
        "configuration error (exit 78): configuration error: no such key"
    );
    let last = worker.last_exit.unwrap();
    assert!(
        last.last_lines
            .iter()
            .any(|line| line.contains("no such key")),
        "{last:?}"
    );
    assert!(bed.drain().await.is_clean());
}

#[tokio::test]
async fn a_crash_loop_is_shown_and_a_restart_tries_again() {
    let roles = vec![
        role(OLLAMA, 1, json!({"does": "panic"})),
        role(HARNESS, 1, json!({})),
    ];
    let bed = Bed::start(policy(), roles);
    let looping = |w: &vlinder_supervisor::WorkerStatus| w.state == WorkerState::CrashLooping;
    let worker = bed.wait_worker(key(OLLAMA, 0), "looping", looping).await;
    assert_eq!(worker.restarts, 2, "budget 3");
    assert_eq!(worker.reason.as_deref(), Some("panicked: boom"));
    bed.handle.restart(OLLAMA).await.unwrap();
    bed.wait_worker(key(OLLAMA, 0), "looping again", |w| {
        looping(w) && w.restarts == 5
    })
    .await;
    let status = bed.handle.status().borrow().clone();
    assert_eq!(
        status.role(HARNESS).next().unwrap().state,
        WorkerState::Ready
    );
    assert!(bed.drain().await.is_clean());
}

#[tokio::test]
async fn a_worker_that_takes_too_much_memory_is_ended_with_the_reason() {
    let limits = Limits {
        memory_bytes: Some(64 * 1024 * 1024),
        ..Limits::default()
    };
    let greedy = RolePlan {
        limits,
        ..role(OLLAMA, 1, json!({"does": "grow", "hold": ["big"]}))
    };
    let modest = RolePlan {
        limits,
        ..role(HARNESS, 1, json!({}))
    };
    let bed = Bed::start(policy(), vec![greedy, modest]);
    let worker = bed
        .wait_worker(key(OLLAMA, 0), "ended", |w| w.restarts > 0)
        .await;
    let exit = worker.last_exit.unwrap().exit;
    assert_eq!(
        exit.to_string(),
        "out of memory: reached its limit of 64 MiB"
    );
    assert_eq!(bed.deaths()[0].blame, Blame::Job);
    bed.wait_worker(key(HARNESS, 0), "the modest one lives", |w| w.state.is_up())
        .await;
}

#[tokio::test]
async fn rubbish_on_the_control_channel_ends_its_sender() {
    let config = json!({"does": "rubbish", "hold": ["job"]});
    let bed = Bed::start(policy(), vec![role(OLLAMA, 1, config)]);
    let worker = bed
        .wait_worker(key(OLLAMA, 0), "ended", |w| w.restarts > 0)
        .await;
    let exit = worker.last_exit.unwrap().exit;
    assert!(matches!(exit, WorkerExit::BrokenControl { .. }), "{exit:?}");
    assert_eq!(bed.deaths()[0].deliveries, ["job"]);
}

#[tokio::test]
async fn a_flood_of_output_is_bounded_and_hinders_nobody() {
    let roles = vec![
        role(OLLAMA, 1, json!({"does": "flood"})),
        role(HARNESS, 1, json!({})),
    ];
    let bed = Bed::start(policy(), roles);
    let status = bed.wait_up().await;
    let tail = status.role(OLLAMA).next().unwrap().tail.clone();
    assert!(bed.drain().await.is_clean());
    let lines = tail.lines();
    assert_eq!(lines.len(), 50);
    assert!(lines.iter().all(|line| line.len() <= 8 * 1024));
    assert_eq!(lines.last().unwrap(), "finished");
}

#[tokio::test]
async fn output_carries_role_index_and_pid() {
    let bed = Bed::start(policy(), vec![role(OLLAMA, 1, json!({}))]);
    let pid = bed.wait_up().await.workers[0].pid.unwrap();
    let seen = bed.seen.clone();
    assert!(bed.drain().await.is_clean());
    let line = format!("inference.ollama 0 {pid} finished");
    assert!(seen.lines.lock().unwrap().contains(&line));
}

#[tokio::test]
async fn a_program_that_does_not_exist_is_shown_as_such() {
    let program = ProcessProgram {
        program: "/nonexistent/vlinderd".into(),
        ..entry("none")
    };
    let broken = RolePlan {
        program: Program::Process(program),
        ..role(OLLAMA, 1, json!({}))
    };
    let bed = Bed::start(policy(), vec![broken, role(HARNESS, 1, json!({}))]);
    let looping = |w: &vlinder_supervisor::WorkerStatus| w.state == WorkerState::CrashLooping;
    let worker = bed.wait_worker(key(OLLAMA, 0), "given up", looping).await;
    assert!(worker.reason.unwrap().contains("No such file"));
    bed.wait_worker(key(HARNESS, 0), "the others go on", |w| w.state.is_up())
        .await;
    assert!(bed.drain().await.is_clean());
}

#[tokio::test]
async fn a_worker_that_takes_too_much_time_is_ended_with_the_reason() {
    let limits = Limits {
        cpu_seconds: Some(1),
        ..Limits::default()
    };
    let busy = RolePlan {
        limits,
        ..role(OLLAMA, 1, json!({"does": "spin"}))
    };
    let bed = Bed::start(policy(), vec![busy]);
    let worker = bed
        .wait_worker(key(OLLAMA, 0), "ended", |w| w.restarts > 0)
        .await;
    let exit = worker.last_exit.unwrap().exit;
    assert_eq!(exit.to_string(), "used up its processor time of 1 s");
}

#[tokio::test]
async fn a_failing_edge_costs_its_worker_and_nothing_else() {
    let roles = vec![
        role(OLLAMA, 1, json!({"does": "burn"})),
        role(HARNESS, 1, json!({})),
    ];
    let bed = Bed::start(policy(), roles);
    let worker = bed
        .wait_worker(key(OLLAMA, 0), "given up", |w| {
            w.state == WorkerState::CrashLooping
        })
        .await;
    assert_eq!(worker.last_exit.unwrap().exit, WorkerExit::Lost);
    let status = bed
        .wait_for("harness up", |s| s.role(HARNESS).all(|w| w.state.is_up()))
        .await;
    assert_eq!(status.endings, [((OLLAMA, "lost"), 3)].into());
    assert!(bed.drain().await.is_clean());
}
