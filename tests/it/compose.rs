//! `compose/`: from nothing to NATS and three nodes, the network cut between them, a node killed, all of
//! it stopped (features G10).

use crate::cluster::model::Model;
use crate::support::agents::example;
use crate::support::compose::{Cluster, Images, Tool};
use crate::support::docker::{Image, containers, docker};
use crate::support::{Finished, wait_for};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A node that went silent is not ready by then (`node.dead_after`, 5 s), on a busy machine.
const DEAD: Duration = Duration::from_secs(20);
/// A node that came back is ready by then.
const BACK: Duration = Duration::from_secs(30);
/// The work of a dead node is elsewhere by then (features G4: 10 s), on a busy machine.
const MOVED: Duration = Duration::from_secs(40);
/// What a call or a state may take to show.
const SHOWN: Duration = Duration::from_secs(20);

/// Writes the puppet with these lines in its manifest; gives its directory.
fn puppet(home: &Path, name: &str, lines: &str) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/puppet/agent.py");
    let directory = home.join(name);
    fs::create_dir_all(&directory).unwrap();
    fs::copy(source, directory.join("agent.py")).unwrap();
    let manifest = format!(
        "name = {name:?}\ndescription = \"does what it is told\"\nruntime = \"process\"\n\
         executable = \"python3 agent.py\"\nobject_storage = \"sqlite://{name}\"\n{lines}\n"
    );
    fs::write(directory.join("agent.toml"), manifest).unwrap();
    directory
}

async fn deploy(cluster: &Cluster, directory: &Path) {
    let path = directory.display().to_string();
    let args = ["agent", "deploy", "-p", &path, "--wait"];
    cluster.cli(&args).await.code(0);
}

async fn run(cluster: &Cluster, agent: &str, said: &str, args: &[&str]) -> Finished {
    let all = [&["agent", "run", agent, "-p", said, "-o", "json"], args].concat();
    cluster.cli(&all).await
}

async fn output(cluster: &Cluster, agent: &str, said: &str) -> String {
    let finished = run(cluster, agent, said, &["--session", agent]).await;
    let finished = finished.code(0).json();
    finished["output"].as_str().unwrap().to_owned()
}

async fn turn(cluster: &Cluster, submission: &str) -> Value {
    let shown = cluster
        .cli(&["turn", "get", submission, "-o", "json"])
        .await;
    serde_json::from_str(&shown.stdout).unwrap_or_default()
}

/// Exactly one end and so many turns are on record.
async fn ended_once(cluster: &Cluster, session: &str, turns: usize) {
    let shown = cluster
        .cli(&["session", "get", session, "-o", "json"])
        .await;
    let shown = shown.code(0).json();
    let found = shown["turns"].as_array().unwrap();
    assert_eq!(found.len(), turns, "{shown:#}");
    assert!(
        found.iter().all(|turn| turn["status"] == "done"),
        "{shown:#}"
    );
    cluster.cli(&["session", "verify", session]).await.code(0);
}

/// On which node the first replica of an agent is ready.
async fn node_of(cluster: &Cluster, agent: &str) -> String {
    let shown = cluster.cli(&["agent", "get", agent, "-o", "json"]).await;
    let shown: Value = serde_json::from_str(&shown.stdout).unwrap_or_default();
    let instances = shown["instances"].as_array().cloned().unwrap_or_default();
    let ready = instances.iter().find(|replica| replica["state"] == "ready");
    let node = ready.and_then(|replica| replica["node"].as_str());
    node.unwrap_or_default().to_owned()
}

async fn exits_cleanly(cluster: &Cluster, services: &[&str]) {
    for service in services {
        let state = cluster
            .inspect(service, "{{.State.Status}} {{.State.ExitCode}}")
            .await;
        assert_eq!(state, "exited 0", "{service}");
    }
}

#[tokio::test]
async fn three_nodes_by_one_command() {
    let tool = Tool::all().first().copied();
    let tool = tool
        .expect("neither `docker compose` nor `docker-compose` works: run scripts/tools compose");
    println!("with {tool:?}");
    let model = Model::for_containers(&["smollm2:135m"]).await;
    let port = model.url.rsplit(':').next().unwrap();
    let runner = tempfile::Builder::new()
        .prefix("vlinder-runner-")
        .tempdir()
        .unwrap();
    let images = Images::build().await;
    let cluster = Cluster::new(
        tool,
        images,
        &[
            (
                "OLLAMA_ENDPOINT",
                format!("http://host.docker.internal:{port}"),
            ),
            ("RUNNER_DIR", runner.path().display().to_string()),
        ],
    );
    let began = Instant::now();
    cluster.compose(&["up", "-d"]).await.code(0);
    cluster.wait_healthy(&["hub", "worker", "gpu"]).await;
    cluster.wait_ready(&["gpu", "hub", "worker"], BACK).await;
    println!("three nodes after {:?}", began.elapsed());

    inference_is_the_gpu_nodes(&cluster).await;
    a_cut_gpu_node_is_waited_for(&cluster, &model).await;
    a_cut_node_is_waited_for_or_left(&cluster).await;
    a_killed_node_is_left(&cluster).await;
    containers_run_on_the_runner(&cluster).await;

    // Stopped in the middle of a turn, which is finished first.
    let cut_short = async {
        let args = ["--session", "last", "--submission", "last"];
        run(&cluster, "mover", "count; sleep 4; echo done", &args).await
    };
    let stopped = async {
        let look = async || turn(&cluster, "last").await.to_string();
        wait_for("the last turn runs", SHOWN, look, |shown| {
            shown.contains("\"put\"")
        })
        .await;
        cluster
            .compose(&["--profile", "containers", "stop"])
            .await
            .code(0)
    };
    let (finished, _) = tokio::join!(cut_short, stopped);
    println!("the turn in flight: {finished:#?}");
    exits_cleanly(&cluster, &["hub", "worker", "gpu", "runner"]).await;
    assert_eq!(
        containers("runner"),
        vec![],
        "the runner took its containers along"
    );

    // What was confirmed is there when all of it comes up again.
    cluster.compose(&["up", "-d"]).await.code(0);
    cluster.wait_ready(&["gpu", "hub", "worker"], BACK).await;
    let again = run(
        &cluster,
        "mover",
        "count; sleep 4; echo done",
        &["--session", "last", "--submission", "last"],
    )
    .await;
    assert!(
        again.code(0).json()["output"]
            .as_str()
            .unwrap()
            .ends_with(" done")
    );
    ended_once(&cluster, "last", 1).await;
}

async fn inference_is_the_gpu_nodes(cluster: &Cluster) {
    let workers = cluster
        .cli(&["worker", "list", "-o", "json"])
        .await
        .code(0)
        .json();
    let of_gpu = workers
        .as_array()
        .unwrap()
        .iter()
        .filter(|worker| worker["node"] == "gpu");
    let roles: Vec<&Value> = of_gpu.map(|worker| &worker["role"]).collect();
    assert_eq!(roles.len(), 4, "{workers:#}");
    assert!(
        roles.iter().all(|role| **role == "inference.ollama"),
        "{workers:#}"
    );
    // Without the token there is no way in.
    let console = cluster.http();
    let asked = crate::support::faces::client(false).get(format!("{console}/state/cluster"));
    assert_eq!(asked.send().await.unwrap().status().as_u16(), 401);
    deploy(cluster, &example("chat-agent")).await;
    let said = run(cluster, "chat", "Say hi.", &["--submission", "hi"]).await;
    assert_ne!(said.code(0).json()["output"], "");
    let by = turn(cluster, "hi").await["calls"][0]["by"].to_string();
    assert!(by.starts_with("\"gpu/inference.ollama/"), "{by}");
}

/// The only node with the model loses its network in the middle of an answer.
async fn a_cut_gpu_node_is_waited_for(cluster: &Cluster, model: &Model) {
    model.slow_once(100).await;
    let before = model.calls().await.len();
    let args = ["--session", "cut", "--submission", "cut"];
    let turn_ends = run(cluster, "chat", "What is the capital of France?", &args);
    let cut = async {
        let look = async || model.calls().await.len();
        wait_for("the model works", SHOWN, look, |calls| *calls > before).await;
        let began = Instant::now();
        cluster.cut("gpu").await;
        cluster.wait_ready(&["hub", "worker"], DEAD).await;
        println!("the gpu node is missed after {:?}", began.elapsed());
        let look = async || cluster.cli(&["turn", "list", "-o", "json"]).await.stdout;
        wait_for("the turn says why it waits", SHOWN, look, |turns| {
            turns.contains("no live worker offers the ollama model smollm2:135m")
        })
        .await;
        cluster.mend("gpu").await;
        cluster.wait_ready(&["gpu", "hub", "worker"], BACK).await;
    };
    let (finished, ()) = tokio::join!(turn_ends, cut);
    let finished = finished.code(0);
    assert_ne!(finished.json()["output"], "");
    ended_once(cluster, "cut", 1).await;
    let calls = turn(cluster, "cut").await["calls"].clone();
    assert_eq!(calls.as_array().unwrap().len(), 1, "{calls:#}");
}

/// The node that runs an agent loses its network in mid-turn. Pinned to it, the turn waits for it; free
/// to go, it goes elsewhere.
async fn a_cut_node_is_waited_for_or_left(cluster: &Cluster) {
    let pinned = puppet(cluster.home(), "pinned", "[placement]\nnode = \"worker\"");
    deploy(cluster, &pinned).await;
    let scale = async |count: u32| {
        let to = format!("agent.process={count}");
        cluster
            .cli(&["worker", "scale", &to, "--node", "hub"])
            .await
            .code(0);
    };
    scale(0).await;
    deploy(
        cluster,
        &puppet(cluster.home(), "mover", "timeout = \"3m\""),
    )
    .await;
    assert_eq!(node_of(cluster, "mover").await, "worker");
    scale(1).await;
    assert_eq!(output(cluster, "pinned", "count").await, "1");
    assert_eq!(output(cluster, "mover", "count").await, "1");
    let pinned_ends = run(
        cluster,
        "pinned",
        "count; sleep 3; echo done",
        &["--session", "pinned", "--submission", "p"],
    );
    let mover_ends = run(
        cluster,
        "mover",
        "count; sleep 3; echo done",
        &["--session", "mover", "--submission", "m"],
    );
    let cut = async {
        for submission in ["p", "m"] {
            let look = async || turn(cluster, submission).await.to_string();
            wait_for("its call is on record", SHOWN, look, |shown| {
                shown.contains("\"put\"")
            })
            .await;
        }
        let began = Instant::now();
        cluster.cut("worker").await;
        cluster.wait_ready(&["gpu", "hub"], DEAD).await;
        let look = async || turn(cluster, "m").await["status"].to_string();
        wait_for("the mover's turn ended elsewhere", MOVED, look, |status| {
            status.contains("done")
        })
        .await;
        println!("moved and ended {:?} after the cut", began.elapsed());
        let state = turn(cluster, "p").await;
        assert!(!state["status"].to_string().contains("done"), "{state:#}");
        cluster.mend("worker").await;
        cluster.wait_ready(&["gpu", "hub", "worker"], BACK).await;
    };
    let (pinned_ended, mover_ended, ()) = tokio::join!(pinned_ends, mover_ends, cut);
    let pinned_ended = pinned_ended.code(0).json();
    let mover_ended = mover_ended.code(0).json();
    assert_eq!(
        pinned_ended["output"], "2 done",
        "the call before the cut is not made twice"
    );
    assert_eq!(mover_ended["output"], "2 done");
    assert_eq!(pinned_ended["node"], "worker");
    assert_eq!(mover_ended["node"], "hub");
    for agent in ["pinned", "mover"] {
        assert_eq!(output(cluster, agent, "count").await, "3");
        ended_once(cluster, agent, 3).await;
    }
}

/// `docker kill` of a node, in mid-turn.
async fn a_killed_node_is_left(cluster: &Cluster) {
    let look = async || node_of(cluster, "mover").await;
    let here = wait_for("the mover is somewhere", MOVED, look, |node| {
        !node.is_empty()
    })
    .await;
    if here == "hub" {
        // Back to the node that may die.
        cluster
            .cli(&["worker", "scale", "agent.process=0", "--node", "hub"])
            .await
            .code(0);
        let look = async || node_of(cluster, "mover").await;
        wait_for("the mover is on the worker", MOVED, look, |node| {
            node == "worker"
        })
        .await;
        cluster
            .cli(&["worker", "scale", "agent.process=1", "--node", "hub"])
            .await
            .code(0);
    }
    let ends = run(
        cluster,
        "mover",
        "count; sleep 2; echo done",
        &["--session", "mover", "--submission", "k"],
    );
    let kill = async {
        let look = async || turn(cluster, "k").await.to_string();
        wait_for("its call is on record", SHOWN, look, |shown| {
            shown.contains("\"put\"")
        })
        .await;
        docker(&["kill", &cluster.container("worker").await]);
    };
    let (ended, ()) = tokio::join!(ends, kill);
    let ended = ended.code(0).json();
    assert_eq!(ended["output"], "4 done");
    assert_eq!(ended["node"], "hub");
    ended_once(cluster, "mover", 4).await;
    // A container that was killed by hand stays away until it is started.
    cluster.compose(&["up", "-d"]).await.code(0);
    cluster.wait_ready(&["gpu", "hub", "worker"], BACK).await;
}

/// The profile with Docker's socket.
async fn containers_run_on_the_runner(cluster: &Cluster) {
    let socket = Path::new("/var/run/docker.sock");
    assert!(socket.exists(), "the runner needs Docker's socket");
    cluster
        .compose(&["--profile", "containers", "up", "-d"])
        .await
        .code(0);
    cluster.wait_healthy(&["runner"]).await;
    let image = Image::agent();
    let directory = cluster.home().join("boxed");
    fs::create_dir_all(&directory).unwrap();
    let manifest = format!(
        "name = \"boxed\"\ndescription = \"in a box\"\nruntime = \"container\"\nexecutable = {:?}\n\
         object_storage = \"sqlite://boxed\"\n",
        image.name
    );
    fs::write(directory.join("agent.toml"), manifest).unwrap();
    deploy(cluster, &directory).await;
    assert_eq!(node_of(cluster, "boxed").await, "runner");
    assert_eq!(output(cluster, "boxed", "count").await, "1");
    assert_eq!(output(cluster, "boxed", "count").await, "2");
}

/// The other of the two commands does as well.
#[tokio::test]
async fn docker_compose_without_the_plugin_does_as_well() {
    let Some(tool) = Tool::all().into_iter().nth(1) else {
        println!(
            "NOT TESTED: only one of `docker compose` and `docker-compose` is here: {:?}",
            Tool::all()
        );
        return;
    };
    println!("with {tool:?}");
    let cluster = Cluster::new(tool, Images::build().await, &[]);
    cluster.compose(&["up", "-d"]).await.code(0);
    cluster.wait_healthy(&["hub", "worker", "gpu"]).await;
    cluster.wait_ready(&["gpu", "hub", "worker"], BACK).await;
    deploy(&cluster, &example("counter-agent")).await;
    assert_eq!(output(&cluster, "counter", "next").await, "1");
    cluster.compose(&["stop"]).await.code(0);
    exits_cleanly(&cluster, &["hub", "worker", "gpu"]).await;
}
