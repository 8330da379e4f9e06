//! Worker counts: what is configured is what runs (features A1).

use crate::support::{Node, NodeSpec, Worker, proc, wait_for};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, TestRunner};
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::time::Duration;
use vlinder_core::WorkerRole;
use vlinder_proto::registry::ListAgentsRequest;
use vlinder_proto::registry::registry_client::RegistryClient;
use vlinder_testkit::{CURRENT, NatsServer};

/// Nodes that the property test starts.
const CASES: usize = 6;
/// Most workers of a role that it draws.
const COUNT_MAX: u32 = 2;

/// The roles that this release runs. The others are refused, see [`roles_that_this_release_lacks`].
fn supported() -> Vec<WorkerRole> {
    let lacks = [WorkerRole::AgentLambda, WorkerRole::InferenceLocal];
    let all = WorkerRole::ALL.into_iter();
    all.filter(|role| !lacks.contains(role)).collect()
}

type Counts = BTreeMap<WorkerRole, u32>;

fn drawn() -> impl Strategy<Value = Counts> {
    let roles = supported();
    let counts = proptest::collection::vec(0..=COUNT_MAX, roles.len());
    counts.prop_map(move |counts| roles.iter().copied().zip(counts).collect())
}

/// By variables, by the longer variables, by file: all of them mean the same.
fn configured(spec: NodeSpec, counts: &Counts) -> NodeSpec {
    let mut file = String::new();
    let mut spec = spec
        .var("VLINDER_OPENAI_ENDPOINT", "http://127.0.0.1:9/v1")
        .var("VLINDER_OPENROUTER_ENDPOINT", "http://127.0.0.1:9/v1")
        .var("VLINDER_OPENROUTER_API_KEY", "none");
    for (place, (role, count)) in counts.iter().enumerate() {
        match place % 3 {
            0 => spec = spec.workers(role.as_str(), *count),
            1 => {
                let name = role.as_str().replace('.', "_").to_uppercase();
                spec = spec.var(&format!("VLINDER_DISTRIBUTED_WORKERS_{name}"), count);
            }
            _ => file += &format!("distributed.workers.{role} = {count}\n"),
        }
    }
    spec.config(&file)
}

fn counted(workers: &[Worker]) -> Counts {
    let mut counts = Counts::new();
    for worker in workers {
        *counts.entry(worker.role.parse().unwrap()).or_default() += 1;
    }
    counts
}

fn without_zeros(counts: &Counts) -> Counts {
    let some = counts.iter().filter(|(_, count)| **count > 0);
    some.map(|(role, count)| (*role, *count)).collect()
}

#[tokio::test]
async fn exactly_the_configured_workers_run() {
    let seed: [u8; 32] = rand::random();
    println!("seed: {seed:?}");
    let rng = proptest::test_runner::TestRng::from_seed(
        proptest::test_runner::RngAlgorithm::ChaCha,
        &seed,
    );
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let nats = NatsServer::start(CURRENT).await;
    for case in 0..CASES {
        let counts = drawn().new_tree(&mut runner).unwrap().current();
        println!("case {case}: {counts:?}");
        let node = configured(NodeSpec::on(&nats), &counts).start().await;
        let wanted = without_zeros(&counts);
        let workers = node
            .wait_workers(
                "the report is complete",
                Duration::from_secs(5),
                |workers| counted(workers) == wanted && workers.iter().all(Worker::is_up),
            )
            .await;
        for role in wanted.keys() {
            let own = workers.iter().filter(|worker| worker.role == role.as_str());
            let indices: Vec<u32> = own.map(|worker| worker.index).collect();
            assert_eq!(indices, (0..counts[role]).collect::<Vec<_>>(), "{role}");
        }
        // The processes themselves say the same as the list.
        let mut listed: Vec<u32> = workers.iter().map(|worker| worker.pid).collect();
        let mut real: Vec<u32> = proc::children(node.pid())
            .iter()
            .map(|child| child.pid)
            .collect();
        listed.sort_unstable();
        real.sort_unstable();
        assert_eq!(listed, real);
        for worker in &workers {
            let command = &proc::all()[&worker.pid].command;
            assert!(
                command.contains(&worker.role),
                "{worker:?} runs {command:?}"
            );
        }
        node.stop_cleanly().await;
    }
}

#[tokio::test]
async fn embedded_the_counts_hold_too() {
    let counts: Counts = supported().into_iter().map(|role| (role, 2)).collect();
    let node = configured(NodeSpec::embedded(), &counts).start().await;
    node.wait_workers("two of each", Duration::from_secs(5), |workers| {
        counted(workers) == counts && workers.iter().all(Worker::is_up)
    })
    .await;
    assert_eq!(node.spec().processes().len(), 1);
    node.stop_cleanly().await;
}

#[tokio::test]
async fn roles_that_this_release_lacks() {
    for role in ["agent.lambda", "inference.local"] {
        let node = NodeSpec::embedded()
            .workers(role, 1)
            .var("VLINDER_LOCAL_MODEL", "/m.gguf");
        node.run(&[]).await.code(2).says(role);
    }
}

#[tokio::test]
async fn two_registry_workers_share_the_port_and_each_answers() {
    let nats = NatsServer::start(CURRENT).await;
    let node = NodeSpec::on(&nats).workers("registry", 2).start().await;
    let workers = node.workers().await;
    let registry = |index| {
        workers
            .iter()
            .find(|w| w.key() == ("registry".into(), index))
            .unwrap()
    };
    assert_eq!(registry(0).address, registry(1).address);
    assert_ne!(registry(0).pid, registry(1).pid);
    for (frozen, answers) in [(0, 1), (1, 0)] {
        // With the other one frozen, whoever answers a new connection is this one.
        proc::send(registry(frozen).pid, Signal::STOP);
        let asked = wait_for(
            "an answer",
            Duration::from_secs(4),
            async || {
                let mut client = RegistryClient::new(node.grpc("registry"));
                let call = client.list_agents(ListAgentsRequest::default());
                let answer = tokio::time::timeout(Duration::from_millis(500), call).await;
                answer.map(|answer| answer.map(|_| ())).map_err(|_| answers)
            },
            |answer| matches!(answer, Ok(Ok(()))),
        );
        asked.await.unwrap().unwrap();
        proc::send(registry(frozen).pid, Signal::CONT);
    }
    let after = node.workers().await;
    let pids = |workers: &[Worker]| workers.iter().map(|worker| worker.pid).collect::<Vec<_>>();
    assert_eq!(pids(&workers), pids(&after), "nobody was replaced for it");
    node.stop_cleanly().await;
}

#[tokio::test]
async fn a_node_with_only_one_worker_is_a_node() {
    let nats = NatsServer::start(CURRENT).await;
    let mut spec = NodeSpec::on(&nats);
    for role in supported() {
        spec = spec.workers(role.as_str(), 0);
    }
    let node: Node = spec.workers("storage.object.sqlite", 1).start().await;
    let workers = node.workers().await;
    assert_eq!(workers.len(), 1, "{workers:#?}");
    node.stop_cleanly().await;
}
