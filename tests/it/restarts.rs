//! Workers that die or freeze, and the rest of the node that works on (features A4, A9).

use crate::support::{Node, NodeSpec, Worker, proc};
use rustix::process::Signal;
use std::time::{Duration, Instant};
use vlinder_testkit::{CURRENT, NatsServer};

/// The budget is 1 s; tests share two cores.
const REPLACED: Duration = Duration::from_secs(5);
/// `supervisor.unresponsive_deadline` is 5 s, then comes the replacement.
const FROZEN_REPLACED: Duration = Duration::from_secs(10);

fn except(workers: &[Worker], role: &str) -> Vec<((String, u32), u32, u64)> {
    let others = workers.iter().filter(|worker| worker.role != role);
    others
        .map(|worker| (worker.key(), worker.pid, worker.restarts))
        .collect()
}

#[tokio::test]
async fn a_killed_worker_of_any_role_is_replaced_and_nobody_else_notices() {
    let nats = NatsServer::start(CURRENT).await;
    let node = NodeSpec::on(&nats)
        .workers("agent.process", 1)
        .start()
        .await;
    let roles: Vec<Worker> = node.workers().await;
    assert!(roles.len() >= 12, "{roles:#?}");
    for victim in &roles {
        let before = node.workers().await;
        let began = Instant::now();
        proc::send(victim.pid, Signal::KILL);
        let new = node.wait_replaced(victim, REPLACED).await;
        println!("{} was replaced after {:?}", victim.role, began.elapsed());
        assert_eq!(new.restarts, victim.restarts + 1, "{new:?}");
        assert!(
            new.last_exit.contains("SIGKILL") || new.last_exit.contains("signal 9"),
            "{new:?}"
        );
        assert_eq!(new.state, victim.state, "{new:?}");
        assert_eq!(new.address, victim.address, "a service keeps its port");
        let after = node.workers().await;
        assert_eq!(except(&before, &victim.role), except(&after, &victim.role));
    }
    assert_eq!(node.get("/readyz").await.unwrap().0, 200);
    node.stop_cleanly().await;
}

#[tokio::test]
async fn repeated_deaths_back_off_and_end_in_a_crash_loop_that_shows() {
    let nats = NatsServer::start(CURRENT).await;
    let node = NodeSpec::on(&nats)
        .var("VLINDER_SUPERVISOR_RESTART_BUDGET", 3)
        .var("VLINDER_SUPERVISOR_RESTART_INITIAL", "20ms")
        .var("VLINDER_SUPERVISOR_CRASH_LOOP_RETRY", "2s")
        .start()
        .await;
    let role = "storage.vector.sqlite";
    let mut before = node.workers().await;
    let mut states = vec![];
    let deadline = Instant::now() + Duration::from_secs(30);
    // It is killed whenever it runs, until the supervisor has had enough.
    while !states.iter().any(|state| state == "crash-looping") {
        assert!(Instant::now() < deadline, "only {states:?}");
        let workers = node.workers().await;
        let worker = workers
            .into_iter()
            .find(|worker| worker.role == role)
            .unwrap();
        states.push(worker.state.clone());
        states.dedup();
        if worker.is_up() {
            proc::kill_if_alive(worker.pid);
        }
    }
    println!("states: {states:?}");
    let log = node.log();
    let lines: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("crash-loop"))
        .collect();
    assert_eq!(lines.len(), 1, "one clear line: {log}");
    // A node with a crash-looping worker is not ready, and says which one it is.
    let (status, body) = node.get("/readyz").await.unwrap();
    assert_eq!(status, 503, "{body}");
    assert!(
        body.contains(role) && body.contains("crash-looping"),
        "{body}"
    );
    // It goes on slowly: left alone, it comes back.
    let after = node
        .wait_workers("it is tried again", Duration::from_secs(10), |workers| {
            workers
                .iter()
                .any(|worker| worker.role == role && worker.is_up())
        })
        .await;
    before.retain(|worker| worker.role != role);
    assert_eq!(except(&before, role), except(&after, role));
    assert_eq!(node.get("/readyz").await.unwrap().0, 200);
    node.stop_cleanly().await;
}

#[tokio::test]
async fn a_frozen_worker_is_replaced() {
    let nats = NatsServer::start(CURRENT).await;
    let node = Node::on(&nats).await;
    let before = node.workers().await;
    let frozen: Vec<&Worker> = before
        .iter()
        .filter(|worker| ["storage.object.sqlite", "registry"].contains(&worker.role.as_str()))
        .collect();
    let began = Instant::now();
    for worker in &frozen {
        proc::send(worker.pid, Signal::STOP);
    }
    for worker in &frozen {
        let new = node.wait_replaced(worker, FROZEN_REPLACED).await;
        println!("{} was replaced after {:?}", worker.role, began.elapsed());
        assert!(!proc::lives(worker.pid), "{worker:?} must be ended");
        assert!(new.last_exit.contains("unresponsive"), "{new:?}");
    }
    node.stop_cleanly().await;
}

#[tokio::test]
async fn a_worker_that_is_slow_for_a_moment_is_left_alone() {
    let nats = NatsServer::start(CURRENT).await;
    let node = Node::on(&nats).await;
    let before = node.workers().await;
    let worker = before
        .iter()
        .find(|worker| worker.role == "catalog")
        .unwrap();
    proc::send(worker.pid, Signal::STOP);
    // The thing under test is a length of time: shorter than the deadline, it must not count.
    tokio::time::sleep(Duration::from_secs(2)).await;
    proc::send(worker.pid, Signal::CONT);
    tokio::time::sleep(Duration::from_secs(4)).await;
    let after = node.workers().await;
    assert_eq!(except(&before, ""), except(&after, ""));
    node.stop_cleanly().await;
}
