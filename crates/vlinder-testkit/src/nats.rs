//! Real NATS servers, started, killed and restarted.

use std::collections::VecDeque;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;

/// The oldest server that will do.
pub const OLDEST: &str = "2.11.11";
/// The one that is current.
pub const CURRENT: &str = "2.15.1";

/// Names the directory with `nats-server-<version>`; without it, `.tools` of the workspace.
const DIRECTORY_VARIABLE: &str = "VLINDER_TEST_NATS";
/// A server on a busy machine with a store to recover.
const START_WAIT: Duration = Duration::from_secs(20);
/// Three servers that find each other and choose leaders.
const CLUSTER_WAIT: Duration = Duration::from_secs(40);
/// Where a server keeps its streams, within its store.
const STREAMS: &str = "jetstream";
/// Lines of its log that are kept to explain a failure.
const LOG_LINES_MAX: usize = 200;

/// A port of loopback that nobody uses at this moment.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("loopback has a free port");
    listener.local_addr().expect("it is bound").port()
}

/// The executable of a version: the directory of [`DIRECTORY_VARIABLE`], or `.tools`.
fn binary(version: &str) -> PathBuf {
    let tools = concat!(env!("CARGO_MANIFEST_DIR"), "/../../.tools");
    let directory = std::env::var_os(DIRECTORY_VARIABLE).map_or(tools.into(), PathBuf::from);
    let file = directory.join(format!("nats-server-{version}"));
    let nested = file.join("nats-server");
    let found = if nested.is_file() { nested } else { file };
    assert!(
        found.is_file(),
        "nats-server {version} is not installed: run scripts/tools nats, or let {DIRECTORY_VARIABLE} \
         name a directory with nats-server-{version}"
    );
    found
}

/// One server. Killed when dropped; its store goes with it.
pub struct NatsServer {
    version: String,
    jetstream: bool,
    store: TempDir,
    port: u16,
    extra: String,
    process: Option<Running>,
}

struct Running {
    child: Child,
    log: Arc<Mutex<VecDeque<String>>>,
    progress: watch::Receiver<Progress>,
}

#[derive(Clone, Copy, Default)]
struct Progress {
    port: Option<u16>,
    ready: bool,
    ended: bool,
}

impl NatsServer {
    /// Starts a server of that version with JetStream and an empty store; waits until it is ready.
    pub async fn start(version: &str) -> Self {
        Self::start_with(version, "").await
    }

    /// The same with more lines of configuration.
    pub async fn start_with(version: &str, extra: &str) -> Self {
        let mut server = Self::new(version, 0, extra);
        server.launch().await;
        server.wait_ready(START_WAIT).await;
        server
    }

    /// Starts one without JetStream.
    pub async fn start_core(version: &str) -> Self {
        let mut server = Self::new(version, 0, "");
        server.jetstream = false;
        server.launch().await;
        server.wait_ready(START_WAIT).await;
        server
    }

    fn new(version: &str, port: u16, extra: &str) -> Self {
        Self {
            version: version.to_owned(),
            jetstream: true,
            store: tempfile::tempdir().expect("a temporary directory"),
            port,
            extra: extra.to_owned(),
            process: None,
        }
    }

    /// Where clients find it.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Its client port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref()?.child.id()
    }

    /// Where it keeps streams.
    pub fn store(&self) -> &std::path::Path {
        self.store.path()
    }

    /// `kill -9`; returns when the process is gone.
    pub async fn kill(&mut self) {
        if let Some(mut running) = self.process.take() {
            running.child.kill().await.expect("it can be killed");
        }
    }

    /// Starts it again on the same port with the same store.
    pub async fn restart(&mut self) {
        self.kill().await;
        self.launch().await;
        self.wait_ready(START_WAIT).await;
    }

    /// What it has stored by now, as a killed server leaves it: kills it, copies its store and starts it again.
    pub async fn copy_store(&mut self) -> StoreCopy {
        self.kill().await;
        let copy = self.copy_while_down();
        self.restart().await;
        copy
    }

    /// Loses everything since `copy` was made: kills it, puts the copy in place of its store, starts it again.
    pub async fn roll_back(&mut self, copy: &StoreCopy) {
        self.kill().await;
        self.put_back_while_down(copy);
        self.restart().await;
    }

    fn copy_while_down(&self) -> StoreCopy {
        let copy = tempfile::tempdir().expect("a temporary directory");
        copy_tree(&self.store.path().join(STREAMS), copy.path());
        StoreCopy(copy)
    }

    fn put_back_while_down(&self, copy: &StoreCopy) {
        assert!(
            self.process.is_none(),
            "the store of a running server is its own"
        );
        let streams = self.store.path().join(STREAMS);
        std::fs::remove_dir_all(&streams).expect("the store can be removed");
        std::fs::create_dir(&streams).expect("the store can be made again");
        copy_tree(copy.0.path(), &streams);
    }

    /// Starts it again with other lines of configuration.
    pub async fn restart_with(&mut self, extra: &str) {
        self.extra = extra.to_owned();
        self.restart().await;
    }

    async fn launch(&mut self) {
        let config = self.store.path().join("server.conf");
        let port = if self.port == 0 {
            -1
        } else {
            i32::from(self.port)
        };
        let mut text = format!("listen: \"127.0.0.1:{port}\"\n{}\n", self.extra);
        if self.jetstream {
            text += &format!(
                "jetstream {{ store_dir: {:?}, max_file_store: 200GB, max_memory_store: 1GB }}\n",
                self.store.path()
            );
        }
        std::fs::write(&config, text).expect("the config can be written");
        let mut child = Command::new(binary(&self.version))
            .arg("-c")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("nats-server can be started");
        let (sender, progress) = watch::channel(Progress::default());
        let log = Arc::new(Mutex::new(VecDeque::new()));
        let lines = BufReader::new(child.stderr.take().expect("it is piped")).lines();
        tokio::spawn(read_log(lines, log.clone(), sender));
        self.process = Some(Running {
            child,
            log,
            progress,
        });
    }

    async fn wait_ready(&mut self, limit: Duration) {
        let running = self.process.as_mut().expect("it was started");
        let ready = running
            .progress
            .wait_for(|progress| progress.ready || progress.ended);
        let progress = match tokio::time::timeout(limit, ready).await {
            Ok(Ok(progress)) => *progress,
            _ => Progress::default(),
        };
        assert!(
            progress.ready,
            "nats-server {} did not become ready; its log:\n{}",
            self.version,
            self.log()
        );
        self.port = progress.port.expect("it says its port before it is ready");
    }

    /// The end of its log.
    pub fn log(&self) -> String {
        let Some(running) = &self.process else {
            return String::new();
        };
        let lines = running.log.lock().expect("no holder panics");
        lines.iter().cloned().collect::<Vec<_>>().join("\n")
    }
}

async fn read_log(
    mut lines: tokio::io::Lines<BufReader<tokio::process::ChildStderr>>,
    log: Arc<Mutex<VecDeque<String>>>,
    progress: watch::Sender<Progress>,
) {
    while let Ok(Some(line)) = lines.next_line().await {
        if let Some((_, address)) = line.split_once("Listening for client connections on ") {
            let port = address
                .rsplit_once(':')
                .and_then(|(_, port)| port.trim().parse().ok());
            progress.send_modify(|progress| progress.port = port);
        }
        if line.ends_with("Server is ready") {
            progress.send_modify(|progress| progress.ready = true);
        }
        let mut kept = log.lock().expect("no holder panics");
        if kept.len() == LOG_LINES_MAX {
            kept.pop_front();
        }
        kept.push_back(line);
    }
    progress.send_modify(|progress| progress.ended = true);
}

/// The store of a server at some time.
pub struct StoreCopy(TempDir);

fn copy_tree(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).expect("it is there") {
        let entry = entry.expect("it can be listed");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("it has a type").is_dir() {
            std::fs::create_dir(&target).expect("the copy is ours");
            copy_tree(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("it can be copied");
        }
    }
}

/// Three servers that form a cluster.
pub struct NatsCluster {
    servers: Vec<NatsServer>,
}

impl NatsCluster {
    /// Starts three servers of that version; waits until each is ready. Leaders may take a little
    /// longer, so clients need a deadline of some seconds.
    pub async fn start(version: &str) -> Self {
        let routes: Vec<u16> = (0..3).map(|_| free_port()).collect();
        let urls: Vec<String> = routes
            .iter()
            .map(|port| format!("\"nats://127.0.0.1:{port}\""))
            .collect();
        let mut servers = Vec::new();
        for (index, route) in routes.iter().enumerate() {
            let extra = format!(
                "server_name: n{index}\ncluster {{ name: test, listen: \"127.0.0.1:{route}\", routes: [{}] }}",
                urls.join(", ")
            );
            let mut server = NatsServer::new(version, 0, &extra);
            server.launch().await;
            servers.push(server);
        }
        for server in &mut servers {
            server.wait_ready(CLUSTER_WAIT).await;
        }
        Self { servers }
    }

    /// Where clients find the servers.
    pub fn urls(&self) -> Vec<String> {
        self.servers.iter().map(NatsServer::url).collect()
    }

    /// What all have stored by now, as killed servers leave it. All are killed and started again.
    pub async fn copy_stores(&mut self) -> Vec<StoreCopy> {
        for server in &mut self.servers {
            server.kill().await;
        }
        let copies = self
            .servers
            .iter()
            .map(NatsServer::copy_while_down)
            .collect();
        self.start_again().await;
        copies
    }

    /// Loses everything since the copies were made, everywhere.
    pub async fn roll_back(&mut self, copies: &[StoreCopy]) {
        for server in &mut self.servers {
            server.kill().await;
        }
        for (server, copy) in self.servers.iter().zip(copies) {
            server.put_back_while_down(copy);
        }
        self.start_again().await;
    }

    async fn start_again(&mut self) {
        for server in &mut self.servers {
            server.launch().await;
        }
        for server in &mut self.servers {
            server.wait_ready(CLUSTER_WAIT).await;
        }
    }

    /// One of the three.
    pub fn server(&mut self, index: usize) -> &mut NatsServer {
        &mut self.servers[index]
    }
}
