//! A node under test: a daemon with a directory, a name and ports of its own.

use super::bins::{self, Finished};
use super::faces::{self, Grpc};
use super::proc::{self, Process};
use super::wait::{wait_for, wait_until};
use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vlinder_testkit::NatsServer;

/// A debug build on a busy machine is far slower than the budgets of the design.
pub const READY_DEADLINE: Duration = Duration::from_secs(30);
/// How long a drain without running work may take.
pub const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// After this no process of a killed daemon may live (features A6).
pub const ORPHAN_DEADLINE: Duration = Duration::from_secs(2);
/// A node's report of itself may lag a little behind what is.
const REPORT_DEADLINE: Duration = Duration::from_secs(5);
/// Marks the processes of a node, whoever their parent is.
const MARK: &str = "VLINDER_TEST_NODE";
/// Lines of a daemon's stderr that explain a failure.
const LOG_LINES_SHOWN: usize = 80;
/// The keys below `distributed.ports`.
const PORTS: [&str; 7] = [
    "registry", "harness", "state", "secret", "catalog", "http", "bridge",
];

/// What a node is to be. Cheap to clone; the directory goes with the last clone.
#[derive(Clone)]
pub struct NodeSpec {
    home: Arc<Home>,
    name: String,
    vars: BTreeMap<String, String>,
}

/// The directory of a node. Dropping it ends whatever process of the node is left.
struct Home {
    mark: String,
    dir: TempDir,
}

impl Home {
    fn processes(&self) -> Vec<Process> {
        let mut found = proc::with_variable(MARK, &self.mark);
        for process in proc::working_below(&self.dir.path().join("data")) {
            if !found.contains(&process) {
                found.push(process);
            }
        }
        found
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        for process in self.processes() {
            proc::kill_if_alive(process.pid);
        }
    }
}

impl NodeSpec {
    /// An embedded node in a new directory.
    pub fn embedded() -> Self {
        let home = tempfile::Builder::new().prefix("vlinder-").tempdir();
        let name = format!("t{:08x}", rand::random::<u32>());
        let home = Arc::new(Home {
            mark: format!("{name}-{:016x}", rand::random::<u64>()),
            dir: home.expect("a temporary directory"),
        });
        let own = [
            ("HOME", home.dir.path().display().to_string()),
            ("VLINDER_NODE_NAME", name.clone()),
            // A port that nothing listens on: whatever runs on this machine is not ours.
            ("VLINDER_OLLAMA_ENDPOINT", "http://127.0.0.1:9".to_owned()),
            (MARK, home.mark.clone()),
        ];
        let own = own.map(|(name, value)| (name.to_owned(), value));
        let ports = PORTS.map(|port| (port_variable(port), "0".to_owned()));
        Self {
            name,
            vars: own.into_iter().chain(ports).collect(),
            home,
        }
    }

    /// A node on a NATS server.
    pub fn on(nats: &NatsServer) -> Self {
        Self::embedded().var("VLINDER_QUEUE_NATS_URL", nats.url())
    }

    /// Sets a variable of its environment.
    pub fn var(mut self, name: &str, value: impl ToString) -> Self {
        self.vars.insert(name.to_owned(), value.to_string());
        self
    }

    /// Unsets one.
    pub fn without(mut self, name: &str) -> Self {
        self.vars.remove(name);
        self
    }

    /// Sets a worker count.
    pub fn workers(self, role: &str, count: u32) -> Self {
        let name = role.replace('.', "_").to_uppercase();
        self.var(&format!("VLINDER_WORKERS_{name}"), count)
    }

    /// Gives it ports that stay the same over restarts.
    pub fn fixed_ports(mut self) -> Self {
        for (port, number) in PORTS.iter().zip(free_ports(PORTS.len())) {
            self = self.var(&port_variable(port), number);
        }
        self
    }

    /// Writes its configuration file.
    pub fn config(self, text: &str) -> Self {
        fs::create_dir_all(self.data_dir()).expect("the directory is ours");
        fs::write(self.data_dir().join("config.toml"), text).expect("the directory is ours");
        self
    }

    /// Its data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.home.dir.path().join("data")
    }

    /// A directory for the files of the test.
    pub fn home(&self) -> &Path {
        self.home.dir.path()
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its processes that live, whoever their parent is: by their environment, or by a working
    /// directory below its own.
    pub fn processes(&self) -> Vec<Process> {
        self.home.processes()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = bins::clean(bins::vlinderd());
        command
            .arg("--data-dir")
            .arg(self.data_dir())
            .args(args)
            .envs(&self.vars)
            .current_dir(self.home());
        command
    }

    /// Runs `vlinderd` with these arguments to its end.
    pub async fn run(&self, args: &[&str]) -> Finished {
        bins::finish(self.command(args)).await
    }

    /// Runs `vlinder` with these arguments to its end.
    pub async fn cli(&self, args: &[&str]) -> Finished {
        let mut command = bins::clean(bins::vlinder());
        command
            .args(args)
            .env("HOME", self.home())
            .env("VLINDER_DIR", self.data_dir())
            .current_dir(self.home());
        // Where the daemon has it from its environment, an operator's shell has it too.
        let token = "VLINDER_AUTH_TOKEN";
        command.envs(self.vars.get(token).map(|value| (token, value)));
        bins::finish(command).await
    }

    /// Starts the daemon and waits until it is ready and says so of each worker.
    pub async fn start(&self) -> Node {
        let mut node = self.spawn();
        node.wait_ready().await;
        node.wait_workers("the report is current", REPORT_DEADLINE, |workers| {
            !workers.is_empty() && workers.iter().all(Worker::is_up)
        })
        .await;
        node
    }

    /// Starts the daemon.
    pub fn spawn(&self) -> Node {
        // Whatever an earlier daemon left there would be taken for this one's.
        let _ = fs::remove_file(self.data_dir().join("run").join("addresses.json"));
        let log = (0..)
            .map(|number| self.home().join(format!("stderr-{number}.log")))
            .find(|path| !path.exists())
            .expect("there are numbers enough");
        let stderr = File::create(&log).expect("the directory is ours");
        let began = Instant::now();
        let child = self
            .command(&[])
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .expect("vlinderd can be started");
        Node {
            spec: self.clone(),
            child,
            log,
            began,
            http: faces::client(false),
        }
    }
}

fn port_variable(port: &str) -> String {
    format!("VLINDER_DISTRIBUTED_PORTS_{}", port.to_uppercase())
}

/// Ports that nobody listens on, below those that the system gives out by itself: between the
/// choice and the use nobody else gets one by chance.
pub fn free_ports(count: usize) -> Vec<u16> {
    let mut ports = Vec::new();
    while ports.len() < count {
        let port = rand::random_range(15_000..32_000);
        let free = std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
        if free && !ports.contains(&port) {
            ports.push(port);
        }
    }
    ports
}

/// What a node says about one of its workers.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
pub struct Worker {
    /// As in the configuration.
    pub role: String,
    pub index: u32,
    pub pid: u32,
    pub state: String,
    pub reason: String,
    pub restarts: u64,
    pub last_exit: String,
    pub address: String,
}

impl Worker {
    /// Role and index.
    pub fn key(&self) -> (String, u32) {
        (self.role.clone(), self.index)
    }

    /// Whether it is up.
    pub fn is_up(&self) -> bool {
        matches!(self.state.as_str(), "ready" | "waiting")
    }
}

/// A daemon that runs. Dropping it kills it and fails the test if a process of it is left.
pub struct Node {
    spec: NodeSpec,
    child: Child,
    log: PathBuf,
    began: Instant,
    http: reqwest::Client,
}

impl Node {
    /// Starts an embedded node.
    pub async fn embedded() -> Self {
        NodeSpec::embedded().start().await
    }

    /// Starts a node on a NATS server.
    pub async fn on(nats: &NatsServer) -> Self {
        NodeSpec::on(nats).start().await
    }

    /// What it was made from.
    pub fn spec(&self) -> &NodeSpec {
        &self.spec
    }

    /// The daemon's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// When it was started.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// What it wrote to stderr.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn run_file(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.spec.data_dir().join("run").join(name)).ok()
    }

    /// Its credential.
    pub fn token(&self) -> String {
        let configured = self.spec.vars.get("VLINDER_AUTH_TOKEN").cloned();
        let token = configured.or_else(|| self.run_file("token"));
        token.expect("a started node has a token").trim().to_owned()
    }

    /// Where it listens, by name.
    pub fn addresses(&self) -> BTreeMap<String, String> {
        let text = self.run_file("addresses.json");
        serde_json::from_str(&text.expect("a started node says where")).expect("it is JSON")
    }

    /// The address of one face.
    #[track_caller]
    pub fn address(&self, face: &str) -> String {
        let addresses = self.addresses();
        let found = addresses.get(face);
        found
            .unwrap_or_else(|| panic!("no {face} in {addresses:?}"))
            .clone()
    }

    /// A channel to one of its services.
    pub fn grpc(&self, service: &str) -> Grpc {
        faces::grpc(&self.address(service), &self.token())
    }

    /// GET of a path of its HTTP face, with the credential: status and body.
    pub async fn get(&self, path: &str) -> Result<(u16, String), String> {
        let url = format!("{}{path}", self.address("http"));
        let asked = self.http.get(url).bearer_auth(self.token()).send().await;
        let answer = asked.map_err(|error| format!("{error:?}"))?;
        let status = answer.status().as_u16();
        let body = answer.text().await.map_err(|error| format!("{error:?}"))?;
        Ok((status, body))
    }

    /// Waits until `/readyz` says yes.
    pub async fn wait_ready(&mut self) {
        let deadline = Instant::now() + READY_DEADLINE;
        let mut last = "it has not said where it listens".to_owned();
        loop {
            if let Some(status) = self.ended() {
                panic!("the daemon ended with {status} before it was ready");
            }
            // Its own file, not one of an earlier daemon.
            let own = self.run_file("vlinderd.pid").as_deref() == Some(&self.pid().to_string());
            if own && self.run_file("addresses.json").is_some() {
                match self.get("/readyz").await {
                    Ok((200, _)) => return,
                    other => last = format!("{other:?}"),
                }
            }
            assert!(
                Instant::now() < deadline,
                "not ready within {READY_DEADLINE:?}; last answer: {last}"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The nodes that `/state/cluster` shows.
    pub async fn cluster(&self) -> Value {
        let (status, body) = self.get("/state/cluster").await.expect("it answers");
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).expect("it is JSON")
    }

    /// Its own workers, as `/state/cluster` shows them.
    pub async fn workers(&self) -> Vec<Worker> {
        let cluster = self.cluster().await;
        let nodes = cluster["nodes"].as_array().cloned().unwrap_or_default();
        let own = nodes
            .into_iter()
            .find(|node| node["node"] == self.spec.name.as_str());
        let workers = own.map(|mut node| node["workers"].take());
        workers.map_or(vec![], |workers| {
            serde_json::from_value(workers).expect("workers have this shape")
        })
    }

    /// Waits for a condition on its workers.
    #[track_caller]
    pub fn wait_workers(
        &self,
        what: impl Into<String>,
        within: Duration,
        good: impl Fn(&[Worker]) -> bool,
    ) -> impl Future<Output = Vec<Worker>> {
        wait_for(
            what,
            within,
            || self.workers(),
            move |workers: &Vec<Worker>| good(workers),
        )
    }

    /// Waits until one worker is up in a process that is not `not`.
    #[track_caller]
    pub fn wait_replaced(&self, old: &Worker, within: Duration) -> impl Future<Output = Worker> {
        let key = old.key();
        let what = format!("{key:?} is replaced");
        let pid = old.pid;
        let found = key.clone();
        let waiting = self.wait_workers(what, within, move |workers| {
            let worker = workers.iter().find(|worker| worker.key() == key);
            worker.is_some_and(|worker| worker.is_up() && worker.pid != pid && worker.pid != 0)
        });
        async move {
            let workers = waiting.await;
            let worker = workers.into_iter().find(|worker| worker.key() == found);
            worker.expect("it was just seen")
        }
    }

    /// Runs `vlinder` with these arguments to its end.
    pub async fn cli(&self, args: &[&str]) -> Finished {
        self.spec.cli(args).await
    }

    /// Sends it a signal.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        proc::send(self.pid(), signal);
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("it is our child")
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait_end(&mut self, within: Duration) -> impl Future<Output = ExitStatus> {
        let at = std::panic::Location::caller();
        let deadline = Instant::now() + within;
        async move {
            loop {
                if let Some(status) = self.ended() {
                    return status;
                }
                assert!(
                    Instant::now() < deadline,
                    "{at}: the daemon did not end within {within:?}; it has {:#?}",
                    self.spec.processes()
                );
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }

    /// `kill -9`; returns when nothing of it is left, which must be soon.
    pub async fn kill9(mut self) -> NodeSpec {
        self.signal(Signal::KILL);
        self.wait_end(ORPHAN_DEADLINE).await;
        let spec = self.spec.clone();
        wait_for(
            "no process outlives the daemon",
            ORPHAN_DEADLINE,
            async || spec.processes(),
            |left| left.is_empty(),
        )
        .await;
        spec
    }

    /// SIGTERM; the end must be clean and soon.
    pub async fn stop_cleanly(mut self) -> NodeSpec {
        self.signal(Signal::TERM);
        let status = self.wait_end(STOP_DEADLINE).await;
        assert_eq!(status.code(), Some(0), "{status}");
        let spec = self.spec.clone();
        wait_until("nothing is left of a stopped node", ORPHAN_DEADLINE, || {
            spec.processes().is_empty()
        })
        .await;
        spec
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.ended().is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let failed = std::thread::panicking();
        if failed {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let from = lines.len().saturating_sub(LOG_LINES_SHOWN);
            eprintln!(
                "stderr of {}:\n{}",
                self.spec.name,
                lines[from..].join("\n")
            );
        }
        // Agents in mid-start may still be on their way out.
        let deadline = Instant::now() + ORPHAN_DEADLINE;
        let mut left = self.spec.processes();
        while !left.is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
            left = self.spec.processes();
        }
        for process in &left {
            proc::kill_if_alive(process.pid);
        }
        assert!(failed || left.is_empty(), "left behind: {left:#?}");
    }
}
