//! The first process of an agent's container.
//!
//! It lends the runtime worker the container's own network, and nothing else: it listens where the
//! agent finds the bridge, hands the listening socket to the worker through a Unix socket that is
//! mounted into the container, and makes further sockets when the worker wants to reach the agent.
//! What is said goes through those sockets directly; this program carries none of it. While the worker is
//! away (it was killed and comes again) it keeps the listening socket, so that calls wait, and
//! offers it again.
//!
//! Otherwise it is what a first process has to be: it starts the agent's command, passes signals on,
//! reaps orphans, and ends as the command ended.
//!
//! It has no more rights than the agent, and at the other end is only the bridge. The worker takes
//! sockets from nobody else in the container, and the agent cannot trace it. It is compiled on its own (see `build.rs`), statically, with
//! the standard library alone, since it runs in images that hold nothing.

use std::ffi::{c_int, c_void};
use std::io::{Error, ErrorKind, Read, Result};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

/// Where the worker's socket is mounted.
const WORKER: &str = "/run/vlinder/bridge.sock";
/// Where the agent finds the bridge.
const BRIDGE: &str = "127.0.0.1:3544";
/// First and longest pause between two tries to reach the worker.
const RETRY: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));
/// Stack of the thread that serves the worker, in bytes.
const STACK_BYTES: usize = 64 * 1024;

/// What is said on the worker's socket, one byte at a time: here is the listening socket.
const LISTENER: u8 = b'L';
/// The worker wants a socket, and gets one.
const SOCKET: u8 = b'S';
/// It gets none.
const NONE: u8 = b'N';

const AF_INET: c_int = 2;
const SOCK_STREAM_CLOEXEC: c_int = 1 | 0o2000000;
const SOL_SOCKET: c_int = 1;
const SCM_RIGHTS: c_int = 1;
const MSG_NOSIGNAL: c_int = 0x4000;
const EINTR: c_int = 4;
const PR_SET_DUMPABLE: c_int = 4;
/// HUP, INT, QUIT, USR1, USR2, TERM, WINCH.
const PASSED_ON: [c_int; 7] = [1, 2, 3, 10, 12, 15, 28];

#[repr(C)]
struct IoVec {
    base: *const c_void,
    len: usize,
}

/// `struct msghdr` of 64-bit Linux, in glibc's and musl's form on little-endian machines.
#[repr(C)]
struct MsgHdr {
    name: *const c_void,
    name_len: u32,
    iov: *const IoVec,
    iov_len: usize,
    control: *const c_void,
    control_len: usize,
    flags: c_int,
}

/// A control message that holds one file descriptor, padded as the kernel wants it.
#[repr(C)]
struct OneFd {
    len: usize,
    level: c_int,
    kind: c_int,
    fd: c_int,
    padding: c_int,
}

unsafe extern "C" {
    fn sendmsg(socket: c_int, message: *const MsgHdr, flags: c_int) -> isize;
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn kill(pid: c_int, signal: c_int) -> c_int;
    fn signal(signal: c_int, handler: usize) -> usize;
    fn prctl(option: c_int, ...) -> c_int;
}

/// The agent's process; 0 before it is started.
static AGENT: AtomicI32 = AtomicI32::new(0);

extern "C" fn pass_on(number: c_int) {
    let agent = AGENT.load(Ordering::SeqCst);
    if agent > 0 {
        // SAFETY: a system call that is allowed in a signal handler.
        unsafe { kill(agent, number) };
    }
}

fn main() {
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    let Some((program, arguments)) = words.split_first() else {
        eprintln!("vlinder: no command to run");
        std::process::exit(127);
    };
    // The agent must not get hold of our sockets: it could make the worker block on them.
    // SAFETY: a plain system call.
    unsafe { prctl(PR_SET_DUMPABLE, 0) };
    let listener = match TcpListener::bind(BRIDGE) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("vlinder: cannot listen on {BRIDGE}: {error}");
            std::process::exit(126);
        }
    };
    let serving = std::thread::Builder::new().stack_size(STACK_BYTES);
    if let Err(error) = serving.spawn(move || serve(&listener)) {
        eprintln!("vlinder: cannot start a thread: {error}");
        std::process::exit(126);
    }
    for number in PASSED_ON {
        // SAFETY: the handler does only what a handler may do.
        unsafe { signal(number, pass_on as *const () as usize) };
    }
    match Command::new(program).args(arguments).spawn() {
        Ok(child) => AGENT.store(child.id() as i32, Ordering::SeqCst),
        Err(error) => {
            eprintln!("vlinder: cannot run {}: {error}", program.to_string_lossy());
            let is_absent = error.kind() == ErrorKind::NotFound;
            std::process::exit(if is_absent { 127 } else { 126 });
        }
    }
    std::process::exit(reap(AGENT.load(Ordering::SeqCst)));
}

/// Waits for whatever ends below us, until the agent does; its exit code, as shells give it.
fn reap(agent: c_int) -> i32 {
    loop {
        let mut status = 0;
        // SAFETY: `status` is valid for the call.
        let ended = unsafe { waitpid(-1, &mut status, 0) };
        if ended < 0 && Error::last_os_error().raw_os_error() != Some(EINTR) {
            return 125;
        }
        if ended == agent {
            let signal = status & 0x7f;
            return if signal == 0 { (status >> 8) & 0xff } else { 128 + signal };
        }
    }
}

/// Serves one worker after the other, for ever.
fn serve(listener: &TcpListener) {
    let mut pause = RETRY.0;
    loop {
        if let Ok(worker) = UnixStream::connect(WORKER) {
            pause = RETRY.0;
            let _gone = lend(listener, worker);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(RETRY.1);
    }
}

fn lend(listener: &TcpListener, mut worker: UnixStream) -> Result<()> {
    send(&worker, LISTENER, Some(listener.as_raw_fd()))?;
    loop {
        let mut wanted = [0];
        worker.read_exact(&mut wanted)?;
        if wanted != [SOCKET] {
            return Err(ErrorKind::InvalidData.into());
        }
        // SAFETY: a plain system call.
        let fd = unsafe { socket(AF_INET, SOCK_STREAM_CLOEXEC, 0) };
        if fd < 0 {
            send(&worker, NONE, None)?;
            continue;
        }
        // SAFETY: the descriptor was just made and is nobody else's.
        let made = unsafe { OwnedFd::from_raw_fd(fd) };
        send(&worker, SOCKET, Some(made.as_raw_fd()))?;
    }
}

/// Sends one byte, and with it a file descriptor.
fn send(to: &UnixStream, byte: u8, fd: Option<RawFd>) -> Result<()> {
    let text = IoVec {
        base: (&raw const byte).cast(),
        len: 1,
    };
    let control = OneFd {
        len: size_of::<usize>() + 3 * size_of::<c_int>(),
        level: SOL_SOCKET,
        kind: SCM_RIGHTS,
        fd: fd.unwrap_or(-1),
        padding: 0,
    };
    let message = MsgHdr {
        name: std::ptr::null(),
        name_len: 0,
        iov: &raw const text,
        iov_len: 1,
        control: match fd {
            Some(_) => (&raw const control).cast(),
            None => std::ptr::null(),
        },
        control_len: fd.map_or(0, |_| size_of::<OneFd>()),
        flags: 0,
    };
    loop {
        // SAFETY: everything that `message` points to outlives the call.
        let sent = unsafe { sendmsg(to.as_raw_fd(), &raw const message, MSG_NOSIGNAL) };
        if sent == 1 {
            return Ok(());
        }
        let error = Error::last_os_error();
        if error.kind() != ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
