//! A small program that runs one command and leaves nothing of it behind: `box --fd N -- CMD…`.
//!
//! A worker that runs foreign commands (agents, tools) puts this between itself and the command,
//! with the read end of a pipe as descriptor N (0 is fine) and the write end kept to itself. The
//! box sits in a session of its own, so that the worker's end does not take it along, and adopts
//! whatever the command leaves. When the pipe closes, by whatever death of the worker, or on
//! SIGTERM, SIGINT or SIGHUP, or when the command ends by itself, everything below the box is
//! killed, and the box exits with the command's code (128 + signal if one ended it).
//!
//! It uses no runtime and little memory, since there is one for every command. It does not confine
//! what the command may do. If the box itself is killed, the command dies with it, and what the
//! command had started goes to the next subreaper.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, FdFlags};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus};

use crate::procfs::own_children;

/// Wrong arguments, as everywhere in Vlinder.
const EXIT_USAGE: u8 = 2;
/// The box itself could not do its work.
const EXIT_INTERNAL: u8 = 1;
/// The command exists but cannot be run, as in a shell.
const EXIT_NOT_EXECUTABLE: u8 = 126;
/// The command does not exist, as in a shell.
const EXIT_NOT_FOUND: u8 = 127;
/// Added to the number of the signal that ended the command, as in a shell.
const EXIT_SIGNAL_BASE: i32 = 128;
/// Killed processes are gone in well under a millisecond, unless the kernel holds them (a dead
/// network file system); the box does not wait for those for ever.
const KILL_DEADLINE: Duration = Duration::from_secs(2);

const USAGE: &str = "usage: box --fd N -- COMMAND [ARGUMENT…]";

/// Runs the box; `args` are those after the word `box`. Does not return before everything below
/// has ended. To be called early in `main`, before a runtime or a thread exists.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    ExitCode::from(exit_code(args))
}

/// [`run`] with the code as a number.
pub fn exit_code(args: impl IntoIterator<Item = OsString>) -> u8 {
    let Some((fd, command)) = parse(args.into_iter()) else {
        eprintln!("{USAGE}");
        return EXIT_USAGE;
    };
    match supervise(fd, &command) {
        Ok(code) => code,
        Err(Failure::Spawn(error)) => {
            eprintln!("cannot run {:?}: {error}", command[0]);
            match error.kind() {
                io::ErrorKind::NotFound => EXIT_NOT_FOUND,
                _ => EXIT_NOT_EXECUTABLE,
            }
        }
        Err(Failure::Own(error)) => {
            eprintln!("cannot box {:?}: {error}", command[0]);
            EXIT_INTERNAL
        }
    }
}

fn parse(mut args: impl Iterator<Item = OsString>) -> Option<(i32, Vec<OsString>)> {
    if args.next()? != "--fd" {
        return None;
    }
    let fd = args.next()?.to_str()?.parse().ok().filter(|fd| *fd >= 0)?;
    if args.next()? != "--" {
        return None;
    }
    let command: Vec<OsString> = args.collect();
    (!command.is_empty()).then_some((fd, command))
}

enum Failure {
    Spawn(io::Error),
    Own(io::Error),
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self::Own(errno.into())
    }
}

fn supervise(fd: i32, command: &[OsString]) -> Result<u8, Failure> {
    let lifeline = take_lifeline(fd)?;
    // It fails if the one who started us made us the leader of a group already; that will do too.
    let _ = rustix::process::setsid();
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let signals = Signals::listen().map_err(Failure::Own)?;
    let command = spawn(command)?;
    wait_for_an_end(&lifeline, &signals, command)?;
    Ok(end_everything(command))
}

/// The descriptor whose end is the end, kept from the command.
fn take_lifeline(fd: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: Only asked about; if it is not open, the call fails.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    // SAFETY: It is open, and was handed to this program for this purpose; nothing else here uses
    // it. Closing descriptor 0 at the end does no harm.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn spawn(command: &[OsString]) -> Result<Pid, Failure> {
    let own = rustix::process::getpid();
    let mut builder = Command::new(&command[0]);
    builder
        .args(&command[1..])
        .stdin(Stdio::null())
        .process_group(0);
    // SAFETY: Only system calls between fork and exec; nothing is allocated.
    unsafe {
        builder.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            match rustix::process::getppid() {
                Some(parent) if parent == own => Ok(()),
                _ => Err(Errno::SRCH.into()),
            }
        });
    }
    let child = builder.spawn().map_err(Failure::Spawn)?;
    Ok(Pid::from_child(&child))
}

/// Signals as bytes on a socket: 0 for a child's death, 1 for a wish to end.
struct Signals {
    received: UnixStream,
}

const CHILD_DIED: u8 = 0;
const END: u8 = 1;

impl Signals {
    fn listen() -> io::Result<Self> {
        let (received, sender) = UnixStream::pair()?;
        received.set_nonblocking(true)?;
        sender.set_nonblocking(true)?;
        // The handlers live as long as the process.
        let sender = leak(sender);
        let wishes = [Signal::TERM, Signal::INT, Signal::HUP].map(|signal| (signal, END));
        for (signal, byte) in wishes.into_iter().chain([(Signal::CHILD, CHILD_DIED)]) {
            let handler = move || {
                // A full socket holds enough of these already.
                let _ = rustix::io::write(sender, &[byte]);
            };
            // SAFETY: The handler makes one write to a descriptor that stays open, which is
            // allowed in a signal handler.
            unsafe { signal_hook_registry::register(signal.as_raw(), handler)? };
        }
        Ok(Self { received })
    }

    /// Takes all that came; whether one of them was a wish to end.
    fn take(&self) -> bool {
        let mut bytes = [0; 64];
        let mut end = false;
        while let Ok(count @ 1..) = rustix::io::read(&self.received, &mut bytes) {
            end |= bytes[..count].contains(&END);
        }
        end
    }
}

/// The descriptor of a socket that is never closed.
fn leak(socket: UnixStream) -> BorrowedFd<'static> {
    let fd = std::mem::ManuallyDrop::new(socket).as_raw_fd();
    // SAFETY: Nobody owns it any more, so it stays open for the rest of the process.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// Returns when the command has ended (it is not reaped then), or is to end.
fn wait_for_an_end(lifeline: &OwnedFd, signals: &Signals, command: Pid) -> Result<(), Errno> {
    loop {
        let mut watched = [
            PollFd::new(lifeline, PollFlags::IN),
            PollFd::new(&signals.received, PollFlags::IN),
        ];
        match poll(&mut watched, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno),
        }
        let lifeline_moved = !watched[0].revents().is_empty();
        if signals.take() || (lifeline_moved && is_at_end(lifeline)) {
            return Ok(());
        }
        // Adopted ones are reaped as they die; the command stays, so that its id and that of its
        // group remain its own.
        for child in own_children() {
            let keep = if child == command {
                WaitIdOptions::NOWAIT
            } else {
                WaitIdOptions::empty()
            };
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | keep;
            let ended = rustix::process::waitid(WaitId::Pid(child), options);
            if child == command && matches!(ended, Ok(Some(_))) {
                return Ok(());
            }
        }
    }
}

/// Reads and forgets what is there; nobody has anything to say on this pipe.
fn is_at_end(lifeline: &OwnedFd) -> bool {
    let mut bytes = [0; 256];
    !matches!(
        rustix::io::read(lifeline, &mut bytes),
        Ok(1..) | Err(Errno::INTR | Errno::AGAIN)
    )
}

/// Kills the command's group and every other descendant, and returns the command's exit code.
fn end_everything(command: Pid) -> u8 {
    let deadline = Instant::now() + KILL_DEADLINE;
    let mut code = None;
    let _ = rustix::process::kill_process_group(command, Signal::KILL);
    loop {
        // Whoever dies leaves its children to us, so this goes down the tree one level at a time.
        let children = own_children();
        if children.is_empty() {
            break;
        }
        for &child in &children {
            let _ = rustix::process::kill_process(child, Signal::KILL);
        }
        for &child in &children {
            match reap_by(child, deadline) {
                Some(status) if child == command => code = Some(code_of(&status)),
                Some(_) => {}
                None if Instant::now() >= deadline => {
                    eprintln!("process {} does not die", child.as_raw_nonzero());
                    return code.unwrap_or(EXIT_INTERNAL);
                }
                None => {}
            }
        }
    }
    code.unwrap_or(EXIT_INTERNAL)
}

fn reap_by(child: Pid, deadline: Instant) -> Option<WaitIdStatus> {
    let pidfd = rustix::process::pidfd_open(child, PidfdFlags::empty()).ok()?;
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = Timespec::try_from(left).ok()?;
    // An interrupted wait is repeated by the caller, who finds the child again.
    let _ = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout));
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    rustix::process::waitid(WaitId::Pid(child), options).ok()?
}

fn code_of(status: &WaitIdStatus) -> u8 {
    let signal = || {
        status
            .terminating_signal()
            .map(|signal| EXIT_SIGNAL_BASE + signal)
    };
    let code = status.exit_status().or_else(signal);
    code.and_then(|code| u8::try_from(code).ok())
        .unwrap_or(EXIT_INTERNAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments() {
        let parse = |line: &str| parse(line.split_whitespace().map(OsString::from));
        let command = ["sh", "-c", "true"].map(OsString::from).to_vec();
        assert_eq!(parse("--fd 5 -- sh -c true"), Some((5, command)));
        for wrong in [
            "",
            "--fd",
            "--fd 5",
            "--fd 5 --",
            "--fd -1 -- sh",
            "--fd x -- sh",
            "sh",
            "--fd 5 sh",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
