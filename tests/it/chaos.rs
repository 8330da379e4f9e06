//! The kill test (issue 2, "What it must show" 3): clients hold conversations that count in the kv
//! store, and meanwhile workers, agents, NATS and the daemon are killed and frozen at random.
//!
//! At the end every count is exact, every acknowledged turn is on record once and as it was
//! acknowledged, every hash holds, the projection comes back equal, and nothing hangs or is left.
//!
//! `VLINDER_TEST_SEED` repeats the choices of a run, which each run prints; `VLINDER_TEST_CHAOS_SECS` sets
//! how long it kills, `VLINDER_TEST_CHAOS_KINDS` what it does (`KillNats,KillAgent` …; everything by
//! itself); `VLINDER_TEST_CHAOS_LOGS` names a directory for the logs of the node, which then are detailed. What the machine does meanwhile is not repeated, so a seed is a hint.

mod check;
mod client;
mod killer;
mod stats;

use crate::support::NodeSpec;
use killer::Killer;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vlinder_testkit::{CURRENT, NatsServer};

/// Conversations at the same time.
const CLIENTS: usize = 4;
/// How long it kills when nobody says how long.
const KILLING: Duration = Duration::from_secs(60);

/// Shapes of the agent: replicas, and turns that one replica takes at once.
const SHAPES: [(u32, u32); 4] = [(1, 1), (2, 1), (1, 4), (3, 2)];

fn number_of(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} is not a number: {text}")),
    )
}

/// The counter agent of the examples, with so many replicas, in the directory of the test.
fn agent_in(home: &Path, (replicas, concurrency): (u32, u32)) -> PathBuf {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/counter-agent");
    let own = home.join("counter-agent");
    fs::create_dir_all(&own).expect("the directory is ours");
    fs::copy(example.join("agent.py"), own.join("agent.py")).expect("the example is there");
    let manifest = fs::read_to_string(example.join("agent.toml")).expect("the example is there");
    let manifest = format!("{manifest}replicas = {replicas}\nconcurrency = {concurrency}\n");
    fs::write(own.join("agent.toml"), manifest).expect("the directory is ours");
    own
}

/// Keeps the logs of a node when it goes.
struct KeepLogs(NodeSpec, PathBuf);

impl Drop for KeepLogs {
    fn drop(&mut self) {
        let _ = fs::create_dir_all(&self.1);
        for directory in [self.0.home().to_owned(), self.0.data_dir().join("logs")] {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                let kind = entry.path().extension().map(ToOwned::to_owned);
                let is_log = kind.is_some_and(|kind| kind == "log" || kind == "jsonl");
                let kept = self.1.join(entry.file_name());
                if is_log && let Err(error) = fs::copy(entry.path(), kept) {
                    eprintln!("{} is not kept: {error}", entry.path().display());
                }
            }
        }
    }
}

async fn hold_conversations_under_fire(mut spec: NodeSpec, nats: Option<NatsServer>) {
    let logs = std::env::var_os("VLINDER_TEST_CHAOS_LOGS").map(PathBuf::from);
    if logs.is_some() {
        spec = spec.var("VLINDER_LOGGING_LEVEL", "trace");
    }
    let _logs = logs.map(|directory| KeepLogs(spec.clone(), directory));
    let seed = number_of("VLINDER_TEST_SEED").unwrap_or_else(|| rand::random_range(0..1_000_000));
    let killing = number_of("VLINDER_TEST_CHAOS_SECS").map_or(KILLING, Duration::from_secs);
    let mut rng = StdRng::seed_from_u64(seed);
    let shape = SHAPES[rng.random_range(0..SHAPES.len())];
    println!(
        "VLINDER_TEST_SEED={seed}, killing for {killing:?}, {} replicas with {} turns at once",
        shape.0, shape.1
    );
    let node = spec.start().await;
    let directory = agent_in(spec.home(), shape);
    let directory = directory.display().to_string();
    node.cli(&["agent", "deploy", "-p", &directory, "--wait"])
        .await
        .code(0);

    let stop = Arc::new(AtomicBool::new(false));
    let talks: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let client = client::Client::new(spec.data_dir(), seed, number);
            tokio::spawn(client.converse(stop.clone()))
        })
        .collect();
    let mut killer = Killer::new(
        rng,
        node,
        nats,
        std::env::var("VLINDER_TEST_CHAOS_KINDS").ok(),
    );
    killer
        .kill_for(killing, || {
            // A client that has given up has found something: no need to go on.
            talks.iter().any(|talk| talk.is_finished())
        })
        .await;
    let (node, nats, deeds) = killer.make_peace().await;
    stop.store(true, Ordering::Relaxed);
    let mut talked = Vec::new();
    for talk in talks {
        talked.push(talk.await.expect("a conversation failed, see above"));
    }
    stats::print(&talked, &deeds);
    stats::print_slowest(&node, &talked, &deeds).await;
    check::all_is_on_record(node, &talked).await;
    drop(nats);
    let left = spec.processes();
    assert!(left.is_empty(), "left behind: {left:#?}");
}

/// A worker that is killed once in a few seconds is no crash loop, though it looks like one.
fn patient(spec: NodeSpec) -> NodeSpec {
    spec.var("VLINDER_SUPERVISOR_RESTART_BUDGET", 1000)
        .var("VLINDER_SUPERVISOR_RESTART_MAX", "500ms")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_stay_exact_when_workers_agents_nats_and_the_daemon_are_killed() {
    let nats = NatsServer::start(CURRENT).await;
    let spec = patient(NodeSpec::on(&nats))
        .workers("agent.process", 2)
        .workers("storage.object.sqlite", 2)
        .workers("harness", 2);
    hold_conversations_under_fire(spec, Some(nats)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_stay_exact_when_an_embedded_daemon_and_its_agents_are_killed() {
    hold_conversations_under_fire(patient(NodeSpec::embedded()), None).await;
}
