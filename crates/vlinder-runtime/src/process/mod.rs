//! The process launcher: an instance is a child process with a group of its own, in the directory of
//! its bundle, with an environment that holds only what the contract names.
//!
//! Between the worker and the agent stands a *box* (see `vlinder_supervisor::boxed`), which ends
//! everything below it when the worker dies in whatever way. Without one (tests) the kernel kills the
//! agent when the thread that started it ends, and dropping the instance kills its group.
//!
//! It does not confine what the agent may reach; that is features D6.

mod command;

use crate::launcher::{Connect, Deployment, Exit, Instance, LaunchError, LaunchSpec, Launcher};
use crate::logs::{AgentLogs, Live};
use async_trait::async_trait;
use rustix::process::{Pid, Signal};
use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::process::{Child, ChildStdin, Command};
use vlinder_bus::Bus;
use vlinder_core::AgentName;
use vlinder_core::manifest::RuntimeKind;

/// How long an instance has between SIGTERM and SIGKILL.
const STOP_GRACE: Duration = Duration::from_secs(3);
/// How often another free port is asked for when one was given to another instance before.
const PORT_TRIES: usize = 100;
/// Lines that a message about an instance's end quotes.
const LAST_LINES: usize = 5;
/// Where agents find programs; the worker's own path goes first.
const PATH_DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What the process launcher is told.
#[derive(Debug, Clone, Default)]
pub struct ProcessOptions {
    /// What comes before the agent's command: the box program and its arguments, which takes the
    /// read end of a pipe as its standard input. Empty: the agent is started directly.
    pub box_command: Vec<OsString>,
    /// `PATH` of agents; a usual one when empty.
    pub path: OsString,
}

/// Starts agents as child processes.
pub struct ProcessLauncher {
    options: ProcessOptions,
    bus: Bus,
    data_dir: Arc<Path>,
    logs: Arc<AgentLogs>,
    /// Ports that live instances of this worker were given.
    ports: Arc<Mutex<HashSet<u16>>>,
}

impl ProcessLauncher {
    /// A launcher that keeps files and logs below `data_dir`.
    pub fn new(
        options: ProcessOptions,
        bus: Bus,
        data_dir: Arc<Path>,
        node: &str,
        live: Live,
    ) -> Self {
        let dir = data_dir.join("logs").join("agents");
        let logs = Arc::new(AgentLogs::new(dir, node, live));
        Self {
            options,
            bus,
            data_dir,
            logs,
            ports: Arc::default(),
        }
    }

    fn command(&self, deployment: &Deployment) -> Result<Command, LaunchError> {
        let line = &deployment.manifest().executable;
        let words = command::split(line).map_err(|reason| LaunchError::Command {
            command: line.clone(),
            reason,
        })?;
        let boxed = self.options.box_command.iter().cloned();
        let mut words = boxed.chain(words.into_iter().map(OsString::from));
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words);
        Ok(command)
    }
}

#[async_trait]
impl Launcher for ProcessLauncher {
    fn kind(&self) -> RuntimeKind {
        RuntimeKind::Process
    }

    async fn launch(&self, spec: &LaunchSpec) -> Result<Box<dyn Instance>, LaunchError> {
        let deployment = &spec.deployment;
        let (agent, bundle) = (deployment.name(), deployment.agent.bundle);
        let dir = crate::bundle::ensure(&self.bus, &self.data_dir, agent, bundle).await?;
        let port = Port::free(&self.ports).map_err(|source| LaunchError::Io {
            what: "no free port for the agent",
            source,
        })?;
        let mut command = self.command(deployment)?;
        command
            .current_dir(&dir)
            .env_clear()
            .envs(environment(spec, &dir, &self.options, port.number))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let is_boxed = !self.options.box_command.is_empty();
        if is_boxed {
            // A box must outlive us by the moment in which it ends what is below it.
            command.stdin(Stdio::piped());
        } else {
            command.stdin(Stdio::null()).kill_on_drop(true);
            let parent = rustix::process::getpid();
            // SAFETY: between fork and exec only system calls are made: nothing is allocated and
            // no lock is taken.
            unsafe {
                command.pre_exec(move || die_with(parent));
            }
        }
        let mut child = command.spawn().map_err(|error| LaunchError::Command {
            command: deployment.manifest().executable.clone(),
            reason: error.to_string(),
        })?;
        let group = Group {
            leader: child.id().and_then(|id| Pid::from_raw(id as i32)),
            is_boxed,
        };
        let lifeline = child.stdin.take();
        self.logs.begin(agent.as_str(), spec.replica);
        let flood = crate::output::capture(&mut child, &self.logs, spec);
        Ok(Box::new(ProcessInstance {
            group,
            child,
            port,
            flood,
            _lifeline: lifeline,
        }))
    }

    fn last_lines(&self, spec: &LaunchSpec) -> Vec<String> {
        let agent = spec.deployment.name().as_str();
        self.logs.last_lines(agent, spec.replica, LAST_LINES)
    }

    async fn forget(&self, agent: &AgentName) {
        self.logs.forget(agent.as_str());
        crate::bundle::remove(&self.data_dir, agent).await;
    }
}

/// What an agent finds in its environment; nothing of the worker's own.
fn environment(
    spec: &LaunchSpec,
    dir: &Path,
    options: &ProcessOptions,
    port: u16,
) -> Vec<(OsString, OsString)> {
    let manifest = spec.deployment.manifest();
    let path = if options.path.is_empty() {
        OsString::from(PATH_DEFAULT)
    } else {
        options.path.clone()
    };
    let mut variables: Vec<(OsString, OsString)> = vec![
        ("PATH".into(), path),
        ("HOME".into(), dir.into()),
        ("LANG".into(), "C.UTF-8".into()),
        ("TMPDIR".into(), "/tmp".into()),
        ("PORT".into(), port.to_string().into()),
        ("VLINDER_AGENT".into(), manifest.name.to_string().into()),
    ];
    if let Some(bridge) = spec.bridge {
        let url = format!("http://{bridge}/{}", spec.secret);
        variables.push(("VLINDER_BRIDGE_URL".into(), url.into()));
    }
    for (name, text) in crate::launcher::prompts(manifest) {
        variables.push((name.into(), text.into()));
    }
    variables
}

/// In the child: the kernel kills it when the worker's thread ends; if that has happened already, it
/// does not even start.
fn die_with(parent: Pid) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    if rustix::process::getppid() != Some(parent) {
        return Err(rustix::io::Errno::SRCH.into());
    }
    Ok(())
}

/// A port that no other instance of this worker has. That the agent gets it is not certain: somebody
/// else may take it meanwhile; the agent then fails to listen and is started again with another.
struct Port {
    number: u16,
    all: Arc<Mutex<HashSet<u16>>>,
}

impl Port {
    fn free(all: &Arc<Mutex<HashSet<u16>>>) -> io::Result<Self> {
        for _ in 0..PORT_TRIES {
            let number = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
                .local_addr()?
                .port();
            if lock(all).insert(number) {
                let all = all.clone();
                return Ok(Self { number, all });
            }
        }
        Err(io::ErrorKind::AddrInUse.into())
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        lock(&self.all).remove(&self.number);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The process group of an instance, or its box; ended when dropped.
struct Group {
    leader: Option<Pid>,
    is_boxed: bool,
}

impl Group {
    /// Asks nicely; a box takes it as the wish to end everything below it at once.
    fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Ends everything now.
    fn kill(&self) {
        self.signal(if self.is_boxed {
            Signal::TERM
        } else {
            Signal::KILL
        });
    }

    fn signal(&self, signal: Signal) {
        if let Some(leader) = self.leader {
            // It may be gone already.
            let _ = rustix::process::kill_process_group(leader, signal);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

struct ProcessInstance {
    // First, so that the group is killed before its leader can be reaped.
    group: Group,
    child: Child,
    port: Port,
    flood: Arc<AtomicU64>,
    /// The box ends everything when this closes.
    _lifeline: Option<ChildStdin>,
}

#[async_trait]
impl Instance for ProcessInstance {
    fn connector(&self) -> Arc<dyn Connect> {
        Arc::new(SocketAddr::from((Ipv4Addr::LOCALHOST, self.port.number)))
    }

    fn pid(&self) -> u32 {
        self.child.id().unwrap_or(0)
    }

    fn flood(&self) -> Arc<AtomicU64> {
        self.flood.clone()
    }

    async fn exited(&mut self) -> Exit {
        let status = self.child.wait().await;
        // What the agent started ends with it.
        self.group.kill();
        self.group.leader = None;
        match status {
            Ok(status) => Exit(in_words(status)),
            Err(error) => Exit(format!("it cannot be waited for: {error}")),
        }
    }

    async fn stop(mut self: Box<Self>) {
        self.group.terminate();
        if tokio::time::timeout(STOP_GRACE, self.exited())
            .await
            .is_err()
        {
            self.group.signal(Signal::KILL);
            let _ = tokio::time::timeout(STOP_GRACE, self.child.wait()).await;
        }
    }
}

/// Exit codes as the box and shells give them: 128 + signal where a signal ended the command.
fn in_words(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(127), _) => "it exited with code 127: command not found?".to_owned(),
        (Some(code), _) if code > 128 => format!("it was ended by signal {}", code - 128),
        (Some(code), _) => format!("it exited with code {code}"),
        (None, Some(signal)) => format!("it was ended by signal {signal}"),
        (None, None) => "it ended".to_owned(),
    }
}
