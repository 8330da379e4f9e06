//! What to run: the plan of a node, as values made by whoever reads the configuration.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt;
use std::future::Future;
use std::net::TcpListener;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use rustix::net::{Shutdown, sockopt};
use vlinder_core::WorkerRole;

use crate::control::TO_CHILD_BYTES_MAX;
use crate::control::{ControlEvents, ControlHandle, Start, WorkerFailure};
use crate::{Error, Policy};

/// Most workers of one role on a node.
pub(crate) const COUNT_MAX: u32 = 256;
/// Most sockets that one worker inherits: they take the descriptors from 4 on.
const LISTENERS_MAX: usize = 16;
/// Largest configuration of one worker, in bytes of JSON: the rest of the start message, names of
/// node and listeners, has room beside it.
const CONFIG_BYTES_MAX: usize = TO_CHILD_BYTES_MAX - 64 * 1024;
/// Connections that wait while no worker accepts: a restart takes some 10 ms, a burst may be large.
/// The system caps it (`net.core.somaxconn`).
const BACKLOG: i32 = 1024;

/// What a worker does, as a task. Called anew for every start; everything it spawns must end when
/// the returned future is dropped (use a `JoinSet`).
pub type TaskFactory = Arc<dyn Fn(Start, ControlHandle, ControlEvents) -> TaskFuture + Send + Sync>;
/// A running task worker.
pub type TaskFuture = Pin<Box<dyn Future<Output = Result<(), WorkerFailure>> + Send>>;

/// How a worker is run.
#[derive(Clone)]
pub enum Program {
    /// As a child process.
    Process(ProcessProgram),
    /// As a task on the supervisor's runtime. It cannot be killed while it blocks; see
    /// [`crate::watchdog`].
    Task(TaskFactory),
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(process) => process.fmt(f),
            Self::Task(_) => f.write_str("Task"),
        }
    }
}

/// The command of a worker process: `program args… ROLE INDEX`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessProgram {
    /// The executable; `/proc/self/exe` is this one, also after it was replaced on disk.
    pub program: PathBuf,
    /// What is shown as its name in process lists.
    pub name: OsString,
    /// Arguments before role and index.
    pub args: Vec<OsString>,
    /// Variables added to this process's environment.
    pub env: Vec<(OsString, OsString)>,
}

/// Limits of one worker process. Tasks share the limits of the daemon.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Private writable memory in bytes (`RLIMIT_DATA`). Not the address space: that would count
    /// the program text and reserved but unused ranges, and say little about use.
    pub memory_bytes: Option<u64>,
    /// Processor time in seconds, over the whole life of the process (`RLIMIT_CPU`).
    pub cpu_seconds: Option<u64>,
    /// Open files (`RLIMIT_NOFILE`).
    pub open_files: Option<u64>,
}

/// A listening socket that workers of a role share and that outlives them.
#[derive(Debug, Clone)]
pub struct SharedListener {
    name: String,
    socket: Arc<TcpListener>,
}

impl SharedListener {
    /// Takes over a socket that listens. The name is how workers ask for it.
    pub fn new(name: impl Into<String>, socket: TcpListener) -> Result<Self, Error> {
        socket
            .set_nonblocking(true)
            .map_err(Error::io("prepare a listener"))?;
        let listener = Self {
            name: name.into(),
            socket: Arc::new(socket),
        };
        listener.open()?;
        Ok(listener)
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it listens.
    pub fn local_addr(&self) -> Result<std::net::SocketAddr, Error> {
        self.socket
            .local_addr()
            .map_err(Error::io("ask a listener for its address"))
    }

    pub(crate) fn socket(&self) -> &TcpListener {
        &self.socket
    }

    /// Connections wait in the backlog from now on.
    pub(crate) fn open(&self) -> Result<(), Error> {
        sockopt::set_socket_reuseaddr(&self.socket, true)
            .and_then(|()| rustix::net::listen(&self.socket, BACKLOG))
            .map_err(Error::system("listen"))
    }

    /// Connections are refused from now on. For a role scaled to 0: nobody would ever accept, and
    /// clients would wait for nothing. A port that was asked for by number stays ours; one that the
    /// system chose is free, and taken again by `open` unless someone else was faster.
    pub(crate) fn close(&self) -> Result<(), Error> {
        let close = || -> rustix::io::Result<()> {
            // Shut down a second time, a socket stays shut down when it listens again: every
            // connection would be broken at birth.
            if !sockopt::socket_acceptconn(&self.socket)? {
                return Ok(());
            }
            // A socket that does not listen holds its port only against those it does not share
            // with.
            sockopt::set_socket_reuseaddr(&self.socket, false)?;
            rustix::net::shutdown(&self.socket, Shutdown::Read)
        };
        close().map_err(Error::system("close a listener"))
    }
}

/// Everything about the workers of one role.
#[derive(Debug, Clone)]
pub struct RolePlan {
    /// The role.
    pub role: WorkerRole,
    /// How many workers; 0 to have the role ready for a later `scale`. At most 256.
    pub count: u32,
    /// How they run.
    pub program: Program,
    /// What they are told in [`Start`].
    pub config: serde_json::Value,
    /// Sockets they share.
    pub listeners: Vec<SharedListener>,
    /// Limits of each.
    pub limits: Limits,
    /// Whether a changed `config` is sent to the running workers
    /// ([`crate::control::ControlEvent::Reload`]); if not, they are restarted one by one.
    pub reloads_live: bool,
}

impl RolePlan {
    fn check(&self) -> Result<(), Error> {
        let (role, count) = (self.role, self.listeners.len());
        if count > LISTENERS_MAX {
            let max = LISTENERS_MAX;
            return Err(Error::TooManyListeners { role, count, max });
        }
        let bytes = self.config.to_string().len();
        if bytes > CONFIG_BYTES_MAX {
            let max = CONFIG_BYTES_MAX;
            return Err(Error::ConfigTooLarge { role, bytes, max });
        }
        Ok(())
    }

    /// Whether running workers must be replaced to follow `new`.
    pub(crate) fn needs_restart(&self, new: &Self) -> bool {
        let program_changed = match (&self.program, &new.program) {
            (Program::Process(old), Program::Process(new)) => old != new,
            // Factories cannot be compared; what they depend on is in the configuration.
            (Program::Task(_), Program::Task(_)) => false,
            (Program::Process(_), Program::Task(_)) | (Program::Task(_), Program::Process(_)) => {
                true
            }
        };
        let sockets = |plan: &Self| -> Vec<(String, Option<std::net::SocketAddr>)> {
            let each = plan.listeners.iter();
            each.map(|listener| (listener.name.clone(), listener.local_addr().ok()))
                .collect()
        };
        program_changed
            || self.limits != new.limits
            || sockets(self) != sockets(new)
            || (self.config != new.config && !new.reloads_live)
    }
}

/// The plan of a node.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// One entry for each role that this node may run.
    pub roles: Vec<RolePlan>,
}

impl Plan {
    pub(crate) fn check(&self) -> Result<(), Error> {
        let mut seen = BTreeSet::new();
        for plan in &self.roles {
            if !seen.insert(plan.role) {
                return Err(Error::DuplicateRole(plan.role));
            }
            check_count(plan.role, plan.count)?;
            plan.check()?;
        }
        Ok(())
    }
}

pub(crate) fn check_count(role: WorkerRole, count: u32) -> Result<(), Error> {
    if count > COUNT_MAX {
        return Err(Error::CountTooHigh {
            role,
            count,
            max: COUNT_MAX,
        });
    }
    Ok(())
}

/// What a supervisor is made of, besides its edges.
#[derive(Debug, Clone)]
pub struct Options {
    /// Name of the node, for workers and status.
    pub node: String,
    /// What to run.
    pub plan: Plan,
    /// Stages of the start, each begun when the one before is up. Roles not named come last.
    pub start_order: Vec<Vec<WorkerRole>>,
    /// Stages of the drain, each begun when the one before is gone: intake first. Empty means the
    /// reverse of the start; roles not named come last.
    pub drain_order: Vec<Vec<WorkerRole>>,
    /// Backoff, budgets and deadlines.
    pub policy: Policy,
    /// Whether this process adopts, kills and reaps processes that dead workers leave behind. For
    /// process workers; with tasks it must be off, because their own children look the same.
    pub adopt_orphans: bool,
    /// Where jitter comes from; any number.
    pub seed: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpStream;

    #[test]
    fn a_listener_serves_again_however_often_it_was_closed() {
        // By its number: the system takes back a port that it chose itself.
        let chosen = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let socket = TcpListener::bind(chosen).unwrap();
        let listener = SharedListener::new("test", socket).unwrap();
        for closings in [1, 2, 3] {
            for _ in 0..closings {
                listener.close().unwrap();
                TcpStream::connect(chosen).unwrap_err();
            }
            listener.open().unwrap();
            listener.open().unwrap();
            let mut client = TcpStream::connect(chosen).unwrap();
            client.write_all(b"hello").unwrap();
            let (mut server, _) = loop {
                match listener.socket().accept() {
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                        std::thread::yield_now();
                    }
                    accepted => break accepted.unwrap(),
                }
            };
            server.set_nonblocking(false).unwrap();
            let mut text = [0; 5];
            server.read_exact(&mut text).unwrap();
            assert_eq!(&text, b"hello");
        }
    }
}
