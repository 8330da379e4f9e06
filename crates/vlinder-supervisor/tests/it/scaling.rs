//! Live changes and drains with work in flight.

use std::io::Read as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;
use vlinder_supervisor::{
    Blame, Error, NodePhase, Plan, Policy, RolePlan, SharedListener, WorkerState,
};

use crate::bed::{
    Bed, HARNESS, OLLAMA, PATIENCE, SECRET, is_alive, key, policy, role, signal, stop,
};

#[tokio::test]
async fn scaling_down_finishes_the_jobs_and_keeps_the_others() {
    let config = json!({"hold": ["job"], "drain_ms": 200});
    let bed = Bed::start(policy(), vec![role(OLLAMA, 1, config)]);
    bed.wait_up().await;
    bed.handle.scale(OLLAMA, 3).await.unwrap();
    let three = bed
        .wait_for("three up", |s| s.is_up() && s.workers.len() == 3)
        .await;
    bed.handle.scale(OLLAMA, 1).await.unwrap();
    let draining = |w: &vlinder_supervisor::WorkerStatus| w.state == WorkerState::Draining;
    bed.wait_worker(key(OLLAMA, 2), "draining", draining).await;
    let one = bed.wait_for("one left", |s| s.workers.len() == 1).await;
    assert_eq!(one.workers[0].pid, three.workers[0].pid);
    assert_eq!(one.workers[0].restarts, 0);
    assert_eq!(bed.deaths(), [], "every job was finished");
    let gone: Vec<_> = three.workers[1..].iter().map(|w| w.pid.unwrap()).collect();
    assert!(gone.iter().all(|&pid| !is_alive(pid)));
    assert!(bed.drain().await.is_clean());
}

#[tokio::test]
async fn impossible_orders_are_refused() {
    let bed = Bed::start(policy(), vec![role(OLLAMA, 0, json!({}))]);
    let refused = bed.handle.scale(HARNESS, 1).await;
    assert!(
        matches!(refused, Err(Error::UnknownRole(HARNESS))),
        "{refused:?}"
    );
    let refused = bed.handle.scale(OLLAMA, 1_000_000).await;
    assert!(
        matches!(refused, Err(Error::CountTooHigh { .. })),
        "{refused:?}"
    );
    let twice = Plan {
        roles: vec![role(OLLAMA, 1, json!({})), role(OLLAMA, 2, json!({}))],
    };
    let refused = bed.handle.reload(twice).await;
    assert!(
        matches!(refused, Err(Error::DuplicateRole(OLLAMA))),
        "{refused:?}"
    );
    let huge = "x".repeat(5 * 1024 * 1024);
    let plan = Plan {
        roles: vec![role(OLLAMA, 1, json!({"text": huge}))],
    };
    let refused = bed.handle.reload(plan).await;
    assert!(
        matches!(refused, Err(Error::ConfigTooLarge { .. })),
        "{refused:?}"
    );
    let handle = bed.handle.clone();
    assert!(bed.drain().await.is_clean());
    assert!(matches!(
        handle.scale(OLLAMA, 1).await,
        Err(Error::Stopping)
    ));
}

#[tokio::test]
async fn a_drain_waits_for_work_in_flight() {
    let config = json!({"hold": ["job"], "drain_ms": 300});
    let roles = vec![role(OLLAMA, 2, config), role(SECRET, 1, json!({}))];
    let bed = Bed::start_in_order(policy(), roles, vec![vec![SECRET]]);
    bed.wait_up().await;
    let status = bed.handle.status();
    let seen = bed.seen.clone();
    let report = bed.drain().await;
    assert!(report.is_clean(), "{report:?}");
    assert!(seen.deaths.lock().unwrap().is_empty());
    let status = status.borrow().clone();
    assert_eq!(status.phase, NodePhase::Stopped);
    for worker in &status.workers {
        assert_eq!(worker.state, WorkerState::Stopped);
        assert_eq!(
            worker.last_exit.as_ref().unwrap().exit.to_string(),
            "drained"
        );
    }
}

#[tokio::test]
async fn who_does_not_drain_is_killed_and_its_job_handed_back_without_blame() {
    let config = json!({"hold": ["job"], "deaf": true});
    let bed = Bed::start(policy(), vec![role(OLLAMA, 1, config)]);
    let pid = bed.wait_up().await.workers[0].pid.unwrap();
    let seen = bed.seen.clone();
    bed.handle.drain(Duration::from_millis(300)).await.unwrap();
    let report = bed.run.await.unwrap();
    assert_eq!((report.killed, report.left), (1, 0));
    let death = seen.deaths.lock().unwrap()[0].0.clone();
    assert_eq!(
        (death.blame, death.deliveries),
        (Blame::Nobody, vec!["job".to_owned()])
    );
    assert!(!is_alive(pid));
}

#[tokio::test]
async fn a_second_drain_ends_everything_now() {
    let bed = Bed::start(policy(), vec![role(OLLAMA, 2, json!({"deaf": true}))]);
    bed.wait_up().await;
    let asked = Instant::now();
    bed.handle.drain(PATIENCE * 10).await.unwrap();
    bed.handle.drain(PATIENCE * 10).await.unwrap();
    let report = bed.run.await.unwrap();
    assert_eq!((report.killed, report.left), (2, 0));
    assert!(asked.elapsed() < PATIENCE);
}

#[tokio::test]
async fn a_reload_changes_only_what_changed() {
    let roles = |ollama: &str, harness: u32| {
        let mut harness = role(HARNESS, harness, json!({}));
        harness.reloads_live = false;
        vec![role(OLLAMA, 1, json!({"endpoint": ollama})), harness]
    };
    let mut first = roles("a", 1);
    first.push(role(SECRET, 1, json!({})));
    let bed = Bed::start(policy(), first);
    let before = bed.wait_up().await;
    let pid = |status: &vlinder_supervisor::NodeStatus, role| status.role(role).next().unwrap().pid;

    bed.handle
        .reload(Plan {
            roles: roles("b", 2),
        })
        .await
        .unwrap();
    let has_new = |w: &vlinder_supervisor::WorkerStatus| {
        w.notes
            .get("config")
            .is_some_and(|config| config.contains("\"b\""))
    };
    bed.wait_worker(key(OLLAMA, 0), "told of the new configuration", has_new)
        .await;
    let after = bed
        .wait_for("secret gone, harness two", |s| {
            s.is_up() && s.workers.len() == 3
        })
        .await;
    assert_eq!(pid(&before, OLLAMA), pid(&after, OLLAMA));
    assert_eq!(pid(&before, HARNESS), pid(&after, HARNESS));
    assert_eq!(after.role(SECRET).count(), 0);

    // A role that cannot take a new configuration live is replaced, one by one.
    let mut changed = roles("b", 2);
    changed[1].config = json!({"changed": true});
    bed.handle.reload(Plan { roles: changed }).await.unwrap();
    let replaced =
        |s: &vlinder_supervisor::NodeStatus| s.is_up() && s.role(HARNESS).all(|w| w.restarts == 1);
    let last = bed.wait_for("harness replaced", replaced).await;
    assert_eq!(pid(&before, OLLAMA), pid(&last, OLLAMA));
    // A live scale outlives a reload that says nothing new about the count.
    bed.handle.scale(OLLAMA, 2).await.unwrap();
    bed.wait_for("scaled", |s| s.is_up() && s.role(OLLAMA).count() == 2)
        .await;
    let mut same = roles("b", 2);
    same[1].config = json!({"changed": true});
    bed.handle.reload(Plan { roles: same }).await.unwrap();
    assert_eq!(bed.handle.status().borrow().desired[&OLLAMA], 2);
    assert!(bed.drain().await.is_clean());
}

/// One client: who answers.
fn ask(address: SocketAddr) -> std::io::Result<(u32, u64)> {
    let mut client = TcpStream::connect_timeout(&address, PATIENCE)?;
    client.set_read_timeout(Some(PATIENCE))?;
    let mut reply = String::new();
    client.read_to_string(&mut reply)?;
    let (pid, incarnation) = reply
        .trim()
        .split_once(' ')
        .ok_or(std::io::ErrorKind::UnexpectedEof)?;
    Ok((pid.parse().unwrap(), incarnation.parse().unwrap()))
}

#[tokio::test]
async fn a_client_that_comes_during_a_restart_is_served() {
    // A port by number, as in a configuration.
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let socket = TcpListener::bind(free).unwrap();
    let listener = SharedListener::new("http", socket).unwrap();
    let address = listener.local_addr().unwrap();
    let patient = Policy {
        backoff_first: Duration::from_millis(500),
        ..policy()
    };
    let plan = RolePlan {
        listeners: vec![listener],
        ..role(HARNESS, 1, json!({"does": "answer"}))
    };
    let bed = Bed::start(patient, vec![plan]);
    let old = bed.wait_up().await.workers[0].pid.unwrap();
    assert_eq!(ask_in_background(address).await, (old, 1));

    // Stopped, the worker accepts nobody: the client is in the backlog when the worker dies.
    stop(old);
    let waiting = tokio::task::spawn_blocking(move || ask(address));
    tokio::task::spawn_blocking(move || TcpStream::connect_timeout(&address, PATIENCE).unwrap())
        .await
        .unwrap();
    signal(old, Signal::KILL);
    let (new, incarnation) = waiting.await.unwrap().unwrap();
    assert_ne!(new, old);
    assert_eq!(incarnation, 2);

    // Several workers share the port; with none left, clients are refused at once.
    bed.handle.scale(HARNESS, 3).await.unwrap();
    bed.wait_for("three up", |s| s.is_up() && s.workers.len() == 3)
        .await;
    ask_in_background(address).await;
    bed.handle.scale(HARNESS, 0).await.unwrap();
    bed.wait_for("none left", |s| s.workers.is_empty()).await;
    let refused = tokio::task::spawn_blocking(move || ask(address))
        .await
        .unwrap()
        .unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    // The port was kept all the time.
    assert!(TcpListener::bind(address).is_err());
    bed.handle.scale(HARNESS, 1).await.unwrap();
    bed.wait_for("one up", |s| s.is_up() && s.workers.len() == 1)
        .await;
    ask_in_background(address).await;
    assert!(bed.drain().await.is_clean());
}

/// This runtime is the supervisor's, so a blocking client must not run on it.
async fn ask_in_background(address: SocketAddr) -> (u32, u64) {
    tokio::task::spawn_blocking(move || ask(address))
        .await
        .unwrap()
        .unwrap()
}
