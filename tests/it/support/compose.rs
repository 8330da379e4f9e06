//! The cluster of `compose/`, brought up by the real commands from images that are made here.
//!
//! Where the registry can be reached the images are built on the official ones; where not, on
//! stand-ins: a Debian that debootstrap made (`scripts/tools compose`), and nothing but the server for NATS.

use super::bins::{self, Finished};
use super::docker::{docker, has_image};
use super::node::free_ports;
use super::wait_for;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// Images and containers are made and started on a busy machine.
const DOCKER_DEADLINE: Duration = Duration::from_secs(180);
/// A registry that does not answer by then is away.
const PULL_S: &str = "60";
/// Nodes are up, listed and checked by then.
const HEALTHY_DEADLINE: Duration = Duration::from_secs(90);
const DEBIAN: &str = "debian:bookworm-slim";
const PORTS: [&str; 6] = ["REGISTRY", "HARNESS", "STATE", "SECRET", "CATALOG", "HTTP"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Which of the two commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    /// `docker compose`
    Plugin,
    /// `docker-compose`
    Standalone,
}

impl Tool {
    /// Those that this machine has.
    pub fn all() -> Vec<Self> {
        let both = [Self::Plugin, Self::Standalone];
        let works = |tool: &Self| {
            let done = tool.command().arg("version").output();
            done.is_ok_and(|done| done.status.success())
        };
        both.into_iter().filter(works).collect()
    }

    fn command(self) -> Command {
        match self {
            Self::Standalone => bins::clean("docker-compose".into()),
            Self::Plugin => {
                let mut command = bins::clean("docker".into());
                // Where the plugin was not installed, `scripts/tools` put it here.
                let ours = root().join(".tools/docker");
                if ours.is_dir() {
                    command.env("DOCKER_CONFIG", ours);
                }
                command.arg("compose");
                command
            }
        }
    }
}

/// An image that goes with its test.
struct Made(String);

impl Made {
    fn named(what: &str) -> Self {
        Self(format!(
            "vlinder-test-{what}-{:016x}:1",
            rand::random::<u64>()
        ))
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        let _ = Command::new("docker")
            .args(["image", "rm", "-f", &self.0])
            .output();
    }
}

/// The official image, if it is here or can be had.
fn official(name: &str) -> bool {
    has_image(name)
        || Command::new("timeout")
            .args([PULL_S, "docker", "pull", "--quiet", name])
            .stdin(Stdio::null())
            .output()
            .is_ok_and(|done| done.status.success())
}

/// The images of a cluster.
pub struct Images {
    node: Made,
    nats: Option<Made>,
    _debian: Option<Made>,
}

impl Images {
    /// Builds `compose/Dockerfile` around the programs under test.
    pub async fn build() -> Self {
        let debian = (!official(DEBIAN)).then(debian);
        let nats = (!official(&nats_name())).then(nats);
        let context = tempfile::tempdir().expect("a temporary directory");
        let programs = context.path().join("programs");
        fs::create_dir(&programs).expect("the directory is ours");
        for program in [bins::vlinderd(), bins::vlinder()] {
            let name = program.file_name().expect("a file");
            let mut strip = Command::new("strip");
            strip.arg("-o").arg(programs.join(name)).arg(&program);
            let stripped = strip.output().expect("strip, of binutils, can be run");
            assert!(stripped.status.success(), "{stripped:?}");
        }
        let node = Made::named("node");
        let dockerfile = root().join("compose/Dockerfile").display().to_string();
        let mut args = vec!["build", "-f", &dockerfile, "-t", &node.0];
        args.extend(["--target", "prebuilt", "--build-arg", "PROGRAMS=programs"]);
        args.extend(["--build-arg", "PACKAGES="]);
        let base = debian.as_ref().map(|made| format!("DEBIAN={}", made.0));
        if let Some(base) = &base {
            args.extend(["--build-arg", base]);
        } else {
            // The official one is without the Python that the test's agents need.
            args.extend(["--build-arg", "PACKAGES=python3"]);
        }
        let place = context.path().display().to_string();
        args.push(&place);
        docker(&args);
        Self {
            node,
            nats,
            _debian: debian,
        }
    }
}

/// Debian as `scripts/tools compose` left it.
fn debian() -> Made {
    let tar = root().join(".tools/debian-bookworm.tar");
    let file = fs::File::open(&tar).unwrap_or_else(|error| {
        panic!(
            "{DEBIAN} cannot be pulled here, and {} cannot be opened ({error}): run scripts/tools compose",
            tar.display()
        )
    });
    let made = Made::named("debian");
    let imported = Command::new("docker")
        .args(["import", "-", &made.0])
        .stdin(file)
        .output();
    let imported = imported.expect("docker can be run");
    assert!(imported.status.success(), "{imported:?}");
    made
}

/// The name that `compose.yaml` has for NATS.
fn nats_name() -> String {
    let text = fs::read_to_string(root().join("compose/compose.yaml")).expect("it is there");
    let (_, rest) = text.split_once("${NATS_IMAGE:-").expect("it names NATS");
    rest.split_once('}').expect("it ends").0.to_owned()
}

/// As the official image: the server and nothing else.
fn nats() -> Made {
    let context = tempfile::tempdir().expect("a temporary directory");
    let server = root().join(".tools/nats-server");
    fs::copy(&server, context.path().join("nats-server"))
        .unwrap_or_else(|error| panic!("{}: {error}: run scripts/tools", server.display()));
    let text = "FROM scratch\nCOPY nats-server /nats-server\nENTRYPOINT [\"/nats-server\"]\n";
    fs::write(context.path().join("Dockerfile"), text).expect("the directory is ours");
    let made = Made::named("nats");
    docker(&[
        "build",
        "-t",
        &made.0,
        &context.path().display().to_string(),
    ]);
    made
}

/// A cluster in its own project, on free ports. Nothing of it is left when it is dropped.
pub struct Cluster {
    tool: Tool,
    project: String,
    home: TempDir,
    token: String,
    ports: Vec<u16>,
    _images: Images,
}

impl Cluster {
    /// A copy of `compose/` after `setup`, with further settings.
    pub fn new(tool: Tool, images: Images, settings: &[(&str, String)]) -> Self {
        let home = tempfile::Builder::new().prefix("vlinder-").tempdir();
        let home = home.expect("a temporary directory");
        let place = home.path().join("compose");
        fs::create_dir(&place).expect("the directory is ours");
        for name in ["compose.yaml", "nats.conf", "setup"] {
            fs::copy(root().join("compose").join(name), place.join(name)).expect("it is there");
        }
        for _twice in 0..2 {
            let set_up = Command::new(place.join("setup")).output();
            let set_up = set_up.expect("it can be run");
            assert!(set_up.status.success(), "{set_up:?}");
        }
        let env = place.join(".env");
        let mut text = fs::read_to_string(&env).expect("it was just written");
        let token = text
            .lines()
            .find_map(|line| line.strip_prefix("VLINDER_AUTH_TOKEN="));
        let token = token.expect("it holds a token").to_owned();
        let ports = free_ports(PORTS.len());
        for (name, port) in PORTS.iter().zip(&ports) {
            text += &format!("{name}_PORT={port}\n");
        }
        text += &format!("VLINDER_IMAGE={}\n", images.node.0);
        if let Some(nats) = &images.nats {
            text += &format!("NATS_IMAGE={}\n", nats.0);
        }
        for (name, value) in settings {
            text += &format!("{name}={value}\n");
        }
        fs::write(&env, text).expect("it is ours");
        Self {
            tool,
            project: format!("vlt{:08x}", rand::random::<u32>()),
            home,
            token,
            ports,
            _images: images,
        }
    }

    /// A directory for the files of the test.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// One command of compose, in the directory, as the documentation has it.
    pub async fn compose(&self, args: &[&str]) -> Finished {
        let mut command = self.tool.command();
        command.args(["-p", &self.project]).args(args);
        command.current_dir(self.home.path().join("compose"));
        bins::finish_within(command, DOCKER_DEADLINE).await
    }

    /// `vlinder` on this machine, against the published ports.
    pub async fn cli(&self, args: &[&str]) -> Finished {
        let mut command = bins::clean(bins::vlinder());
        command
            .args(args)
            .env("HOME", self.home())
            .env("VLINDER_AUTH_TOKEN", &self.token)
            .current_dir(self.home());
        for (name, port) in PORTS
            .iter()
            .zip(&self.ports)
            .filter(|(name, _)| **name != "HTTP")
        {
            let name = format!("VLINDER_DISTRIBUTED_{name}_ADDR");
            command.env(name, format!("http://127.0.0.1:{port}"));
        }
        bins::finish_within(command, DOCKER_DEADLINE).await
    }

    /// Where the console is.
    pub fn http(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[5])
    }

    /// The id of a service's container, whatever its state.
    pub async fn container(&self, service: &str) -> String {
        let project = format!("label=com.docker.compose.project={}", self.project);
        let service = format!("label=com.docker.compose.service={service}");
        let found = docker(&[
            "ps",
            "-aq",
            "--no-trunc",
            "--filter",
            &project,
            "--filter",
            &service,
        ]);
        assert_eq!(found.lines().count(), 1, "{service}: {found:?}");
        found
    }

    /// One thing that Docker knows of a service's container.
    pub async fn inspect(&self, service: &str, format: &str) -> String {
        docker(&["inspect", "-f", format, &self.container(service).await])
    }

    /// Waits until these are healthy by their own check.
    pub async fn wait_healthy(&self, services: &[&str]) {
        for service in services {
            wait_for(
                format!("{service} is healthy"),
                HEALTHY_DEADLINE,
                async || self.inspect(service, "{{json .State}}").await,
                |state| {
                    let state: Value = serde_json::from_str(state).unwrap_or_default();
                    state["Health"]["Status"] == "healthy"
                },
            )
            .await;
        }
    }

    fn network(&self) -> String {
        format!("{}_default", self.project)
    }

    /// Takes a service off the network.
    pub async fn cut(&self, service: &str) {
        let id = self.container(service).await;
        docker(&["network", "disconnect", &self.network(), &id]);
    }

    /// Puts it back.
    pub async fn mend(&self, service: &str) {
        let id = self.container(service).await;
        docker(&[
            "network",
            "connect",
            "--alias",
            service,
            &self.network(),
            &id,
        ]);
    }

    /// The names of the nodes that are ready, sorted; none where nobody can be asked.
    pub async fn ready_nodes(&self) -> Vec<String> {
        let listed = self.cli(&["node", "list", "-o", "json"]).await;
        let listed: Value = serde_json::from_str(&listed.stdout).unwrap_or_default();
        let nodes = listed.as_array().cloned().unwrap_or_default();
        let ready = nodes.iter().filter(|node| node["state"] == "ready");
        let mut names: Vec<String> = ready
            .filter_map(|node| Some(node["name"].as_str()?.to_owned()))
            .collect();
        names.sort();
        names
    }

    /// Waits until exactly these nodes are ready.
    #[track_caller]
    pub fn wait_ready(&self, names: &[&str], within: Duration) -> impl Future<Output = ()> {
        let mut wanted: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        wanted.sort();
        let waiting = wait_for(
            format!("{wanted:?} are ready"),
            within,
            || self.ready_nodes(),
            move |ready: &Vec<String>| *ready == wanted,
        );
        async move {
            waiting.await;
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let run = |args: &[&str]| {
            let mut command = self.tool.command();
            command
                .args(["-p", &self.project, "--profile", "containers"])
                .args(args);
            command.current_dir(self.home.path().join("compose"));
            command.output()
        };
        if std::thread::panicking()
            && let Ok(logs) = run(&["logs", "--no-color", "--tail", "60"])
        {
            eprintln!("{}", String::from_utf8_lossy(&logs.stdout));
        }
        let down = run(&["down", "-v", "--remove-orphans", "-t", "1"]);
        let gone = down.as_ref().is_ok_and(|done| done.status.success());
        assert!(gone || std::thread::panicking(), "left behind: {down:?}");
    }
}
