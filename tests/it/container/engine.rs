//! `kill -9` of the container engine in mid-turn (issue 3, "What it must show"): on a dockerd of the test's own, with
//! its own data, in a network namespace of its own. That takes root, as Docker's own service does.

use super::{AGENT, said, wait_put, worker, written};
use crate::support::agents::{deploy, output, run};
use crate::support::docker::program;
use crate::support::{Node, NodeSpec, wait_for};
use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A dockerd on a busy machine, whose containerd may have to be tried again.
const UP_DEADLINE: Duration = Duration::from_secs(90);
/// What the node notices of it.
const NOTICED: Duration = Duration::from_secs(20);

struct Engine {
    dir: TempDir,
    child: Option<Child>,
    /// Whether containers outlive it.
    live_restore: bool,
}

impl Engine {
    fn new(live_restore: bool) -> Self {
        let dir = tempfile::Builder::new().prefix("vlinder-engine-").tempdir();
        Self {
            dir: dir.expect("a temporary directory"),
            child: None,
            live_restore,
        }
    }

    fn host(&self) -> String {
        format!("unix://{}", self.dir.path().join("docker.sock").display())
    }

    fn docker(&self, args: &[&str]) -> Option<String> {
        let host = self.host();
        let done = Command::new("docker")
            .args(["-H", &host])
            .args(args)
            .output();
        let done = done.expect("docker can be run");
        let said = String::from_utf8_lossy(&done.stdout).trim().to_owned();
        done.status.success().then_some(said)
    }

    fn spawn(&self) -> Child {
        let at = |name: &str| self.dir.path().join(name).display().to_string();
        fs::write(at("daemon.json"), "{}").expect("the directory is ours");
        let _ = fs::remove_file(at("pid"));
        let log = File::options().create(true).append(true).open(at("log"));
        let log = log.expect("the directory is ours");
        // With --bridge=none it removes the docker0 that it sees: it must not see this machine's.
        let mut command = Command::new("unshare");
        command.args(["--net", "dockerd", "--bridge=none", "--storage-driver=vfs"]);
        command.args([
            "--iptables=false",
            "--ip6tables=false",
            "--ip-forward=false",
            "--ip-masq=false",
        ]);
        for (flag, value) in [
            ("--config-file", at("daemon.json")),
            ("--data-root", at("data")),
            ("--exec-root", at("exec")),
            ("--pidfile", at("pid")),
            ("--host", self.host()),
        ] {
            command.args([flag, &value]);
        }
        if self.live_restore {
            command.arg("--live-restore");
        }
        let err = log.try_clone().expect("a descriptor");
        command.stdin(Stdio::null()).stdout(log).stderr(err);
        command.spawn().expect("unshare, of util-linux, can be run")
    }

    /// Starts it; as a service manager would, again where it ends.
    async fn start(&mut self) {
        let until = Instant::now() + UP_DEADLINE;
        while self.docker(&["version"]).is_none() {
            let ended = self
                .child
                .as_mut()
                .is_none_or(|child| child.try_wait().expect("it is our child").is_some());
            if ended {
                self.child = Some(self.spawn());
            }
            let log = || fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            assert!(Instant::now() < until, "no dockerd of our own: {}", log());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// `kill -9`.
    fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().expect("it is ours");
        child.wait().expect("it is our child");
    }

    fn import(&self, name: &str) {
        let context = self.dir.path().join("image");
        fs::create_dir_all(&context).expect("the directory is ours");
        fs::copy(program(), context.join("agent")).expect("the program is there");
        let tar = self.dir.path().join("image.tar");
        let mut pack = Command::new("tar");
        pack.arg("-C")
            .arg(&context)
            .arg("-cf")
            .arg(&tar)
            .arg("agent");
        assert!(pack.status().expect("tar can be run").success());
        let tar = tar.display().to_string();
        let made = self.docker(&["import", "-c", "CMD [\"/agent\"]", &tar, name]);
        made.expect("the image is made");
    }

    fn containers(&self) -> Vec<String> {
        let listed = self
            .docker(&["ps", "-aq", "--no-trunc"])
            .unwrap_or_default();
        listed.lines().map(str::to_owned).collect()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        for container in self.containers() {
            self.docker(&["rm", "-fv", &container]);
        }
        if let Some(mut child) = self.child.take() {
            // SIGTERM, so that it takes its containerd along.
            if let Some(pid) = rustix::process::Pid::from_raw(child.id() as i32) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            }
            let _ = child.wait();
        }
        // It mounts its own directory over itself, and leaves that behind.
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let targets = mounts.lines().filter_map(|line| line.split(' ').nth(1));
        for target in targets.filter(|target| Path::new(target).starts_with(self.dir.path())) {
            let _ = Command::new("umount").args(["-l", target]).status();
        }
    }
}

async fn state(node: &Node, wanted: &'static str) {
    wait_for(
        format!("the role is {wanted}"),
        NOTICED,
        async || worker(node).await.state,
        |state| state == wanted,
    )
    .await;
}

async fn started(live_restore: bool) -> (Engine, Node) {
    let mut engine = Engine::new(live_restore);
    engine.start().await;
    engine.import("boxed:1");
    let spec = NodeSpec::embedded().var("VLINDER_RUNTIME_DOCKER_HOST", engine.host());
    let node = spec.start().await;
    let directory: &Path = &written(&node, AGENT, "boxed:1", "");
    deploy(&node, directory).await;
    (engine, node)
}

/// The engine dies while a turn runs; gives the turn's reply.
async fn a_turn_through_its_death(node: &Node, engine: &mut Engine) -> String {
    let args = ["--session", "s", "--submission", "x"];
    let (finished, ()) = tokio::join!(run(node, AGENT, "count; sleep 3; host", &args), async {
        wait_put(node, "x").await;
        engine.kill();
        state(node, "waiting").await;
    });
    output(&finished.code(0).json()).to_owned()
}

#[tokio::test]
async fn a_killed_engine_that_keeps_containers_is_not_noticed_by_turns() {
    let (mut engine, node) = started(true).await;
    let before = engine.containers();
    assert_eq!(before.len(), 1);
    let reply = a_turn_through_its_death(&node, &mut engine).await;
    let (count, host) = reply.split_once(' ').unwrap();
    assert_eq!(count, "1");
    assert!(before[0].starts_with(host), "the turn ended where it began");
    assert_eq!(
        said(&node, "count").await,
        "2",
        "and the agent goes on without an engine"
    );
    engine.start().await;
    state(&node, "ready").await;
    assert_eq!(said(&node, "count").await, "3");
    assert_eq!(engine.containers(), before, "neither doubled nor replaced");
    node.cli(&["session", "verify", "s"]).await.code(0);
    node.stop_cleanly().await;
    assert_eq!(engine.containers(), Vec::<String>::new());
}

#[tokio::test]
async fn a_killed_engine_that_ends_containers_at_its_return_costs_no_turn() {
    let (mut engine, node) = started(false).await;
    let before = engine.containers();
    assert_eq!(
        a_turn_through_its_death(&node, &mut engine)
            .await
            .split(' ')
            .next(),
        Some("1")
    );
    // Without live-restore a returning dockerd ends what it finds.
    engine.start().await;
    state(&node, "ready").await;
    assert_eq!(said(&node, "count").await, "2");
    let after = wait_for(
        "one container, another one",
        NOTICED,
        async || engine.containers(),
        |found| found.len() == 1 && *found != before,
    )
    .await;
    println!("{before:?} {after:?}");
    assert_eq!(said(&node, "count").await, "3");
    node.cli(&["session", "verify", "s"]).await.code(0);
    node.stop_cleanly().await;
}
