//! The fork of a worker process: its group, its death with the daemon, its descriptors and limits.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, Signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

use super::output::Outputs;
use crate::control::CONTROL_FD;
use crate::plan::{Limits, ProcessProgram, RolePlan};
use crate::{Error, WorkerKey};

/// A process with its handles. It is not reaped by itself.
pub(super) struct Spawned {
    pub pid: Pid,
    /// Readable once the process has ended.
    pub pidfd: AsyncFd<OwnedFd>,
    pub control: UnixStream,
}

pub(super) fn spawn(
    key: WorkerKey,
    plan: &RolePlan,
    program: &ProcessProgram,
) -> Result<(Spawned, Outputs), Error> {
    let fail = |source| Error::Spawn {
        role: key.role,
        index: key.index,
        source,
    };
    let (control, theirs) = StdUnixStream::pair().map_err(fail)?;
    control.set_nonblocking(true).map_err(fail)?;

    let mut inherited = vec![theirs.as_fd()];
    inherited.extend(
        plan.listeners
            .iter()
            .map(|listener| listener.socket().as_fd()),
    );
    let (sources, reserved) = prepare_descriptors(&inherited).map_err(fail)?;

    let mut command = Command::new(&program.program);
    command
        .arg0(&program.name)
        .args(&program.args)
        .arg(key.role.as_str())
        .arg(key.index.to_string())
        .envs(program.env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let parent = rustix::process::getpid();
    let limits = plan.limits;
    // SAFETY: Between fork and exec only system calls are made: nothing is allocated, no lock is
    // taken, and errors are plain numbers.
    unsafe {
        command.pre_exec(move || {
            die_with(parent)?;
            apply(&limits)?;
            pass_descriptors(&sources)
        });
    }
    let mut child = command.spawn().map_err(fail)?;
    drop((command, reserved, theirs));

    let pid = Pid::from_child(&child);
    let adopted = adopt(pid, control, &mut child);
    if adopted.is_err() {
        // Without its handles it cannot be supervised.
        let _ = child.kill();
        let _ = child.wait();
    }
    adopted
}

fn adopt(
    pid: Pid,
    control: StdUnixStream,
    child: &mut std::process::Child,
) -> Result<(Spawned, Outputs), Error> {
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK).map_err(Error::system(
        "watch a child process (Linux 5.10 or newer is needed)",
    ))?;
    // SAFETY: The `AsyncFd` owns the descriptor, and nothing here takes it out or replaces it.
    let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }
        .map_err(|error| Error::io("watch a child process")(error.into()))?;
    let control = UnixStream::from_std(control).map_err(Error::io("use a control socket"))?;
    let stdout = child.stdout.take().expect("stdout was asked for as a pipe");
    let stderr = child.stderr.take().expect("stderr was asked for as a pipe");
    Ok((
        Spawned {
            pid,
            pidfd,
            control,
        },
        Outputs::new(stdout, stderr)?,
    ))
}

/// Duplicates what the child is to inherit to numbers above their targets (3, 4, …), so that no
/// `dup2` overwrites a source, and occupies all free targets, so that nothing that `Command` opens
/// for itself (its pipe for the exec error) lands there. The second list is to be kept until the
/// fork is over.
fn prepare_descriptors(inherited: &[BorrowedFd<'_>]) -> io::Result<(Vec<OwnedFd>, Vec<OwnedFd>)> {
    let end = CONTROL_FD + i32::try_from(inherited.len()).expect("there are few listeners");
    let mut sources = Vec::with_capacity(inherited.len());
    for fd in inherited {
        sources.push(rustix::io::fcntl_dupfd_cloexec(fd, end)?);
    }
    let mut reserved = Vec::new();
    loop {
        let fd = rustix::io::fcntl_dupfd_cloexec(inherited[0], CONTROL_FD)?;
        if fd.as_raw_fd() >= end {
            return Ok((sources, reserved));
        }
        reserved.push(fd);
    }
}

/// In the child: moves the descriptors to their targets, where they survive the exec.
fn pass_descriptors(sources: &[OwnedFd]) -> io::Result<()> {
    for (target, source) in (CONTROL_FD..).zip(sources) {
        // SAFETY: In this process, which is about to exec, nobody else uses the number: it is
        // either one of the placeholders or a copy that the exec would have closed.
        let mut target = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(target) });
        rustix::io::dup2(source, &mut target)?;
    }
    Ok(())
}

/// In the child: the kernel kills it when the daemon's thread ends; if that has happened already,
/// it does not even start.
fn die_with(parent: Pid) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    if rustix::process::getppid() != Some(parent) {
        return Err(rustix::io::Errno::SRCH.into());
    }
    Ok(())
}

fn apply(limits: &Limits) -> io::Result<()> {
    let set = |resource, value: Option<u64>, more: u64| match value {
        Some(value) => {
            let maximum = Some(value.saturating_add(more));
            rustix::process::setrlimit(
                resource,
                Rlimit {
                    current: Some(value),
                    maximum,
                },
            )
        }
        None => Ok(()),
    };
    set(Resource::Data, limits.memory_bytes, 0)?;
    set(Resource::Nofile, limits.open_files, 0)?;
    // At the first limit comes SIGXCPU, which names the cause; at the second SIGKILL.
    set(Resource::Cpu, limits.cpu_seconds, 5)?;
    Ok(())
}
