//! The line to the first process of a container (`init/main.rs`): sockets of the container's own
//! network, lent to this worker.
//!
//! The bridge is served on a listening socket that comes through it, and the agent is reached through
//! sockets that are asked for. A socket that another process holds too could be made to block, and this
//! loop with it; so nothing is taken from anybody but the first process itself, which gives its copy
//! away and which the agent can neither trace nor replace: the kernel tells who it is.

use crate::launcher::{BridgeFace, Connect};
use async_trait::async_trait;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketType, recvmsg,
    sockopt,
};
use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::task::AbortOnDropHandle;

/// The socket's name in the directory that is mounted into the container.
const SOCKET: &str = "bridge.sock";
/// Where the agent serves, in its own network.
const AGENT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);
/// How long the first process may take to offer its listening socket once it is connected.
const OFFER_MAX: Duration = Duration::from_secs(5);
/// How long a socket may take to come.
const SOCKET_MAX: Duration = Duration::from_secs(5);
/// Sockets that are asked for at the same time.
const ASKED_MAX: usize = 64;
/// Pause after a connection that was not what it should be.
const BAD_PAUSE: Duration = Duration::from_millis(100);

/// What is said, one byte at a time; as in `init/main.rs`.
const SAYS_LISTENER: u8 = b'L';
const SAYS_SOCKET: u8 = b'S';

type Answer = oneshot::Sender<io::Result<TcpSocket>>;

/// The worker's end. Dropping it closes the bridge to the container.
pub(super) struct Link {
    asked: mpsc::Sender<Answer>,
    /// Which process the first one is, once that is known.
    first: watch::Sender<Option<i32>>,
    /// How often the line was up and broke.
    state: watch::Receiver<State>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct State {
    pub is_up: bool,
    pub breaks: u64,
}

impl Link {
    /// Waits for the first process in `dir`, which is mounted into the container.
    pub fn open(dir: &Path, bridge: BridgeFace) -> io::Result<Arc<Self>> {
        let listener = listen(dir)?;
        let (asked, questions) = mpsc::channel(ASKED_MAX);
        let first = watch::Sender::new(None);
        let (state_tx, state) = watch::channel(State::default());
        let serving = serve(listener, bridge, questions, first.subscribe(), state_tx);
        Ok(Arc::new(Self {
            asked,
            first,
            state,
            _task: AbortOnDropHandle::new(tokio::spawn(serving)),
        }))
    }

    /// Says which process the first one is, by its number on this machine.
    pub fn expect(&self, pid: i32) {
        self.first.send_replace(Some(pid));
    }

    /// How the line stands.
    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Waits until it has been up.
    pub async fn up(&self) {
        let mut state = self.state.clone();
        let _ = state
            .wait_for(|state| state.is_up || state.breaks > 0)
            .await;
    }

    /// Waits until it has broken more often than `known` times.
    pub async fn broken(&self, known: u64) -> u64 {
        let mut state = self.state.clone();
        let broken = state.wait_for(|state| state.breaks > known).await;
        if let Ok(breaks) = broken.map(|state| state.breaks) {
            return breaks;
        }
        // The task is ours, so it ends with us.
        std::future::pending().await
    }
}

#[async_trait]
impl Connect for Link {
    async fn connect(&self) -> io::Result<TcpStream> {
        let (answer, answered) = oneshot::channel();
        let asking = async {
            let gone = || io::Error::new(ErrorKind::NotConnected, "the container is gone");
            self.asked.send(answer).await.map_err(|_| gone())?;
            answered.await.map_err(|_| gone())?
        };
        match tokio::time::timeout(SOCKET_MAX, asking).await {
            Ok(socket) => socket?.connect(AGENT).await,
            Err(_) => Err(io::Error::new(
                ErrorKind::TimedOut,
                "the container's first process does not answer",
            )),
        }
    }
}

/// Binds the socket, in place of one that another worker left.
fn listen(dir: &Path) -> io::Result<UnixListener> {
    let path = dir.join(SOCKET);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // An address of a socket holds 107 bytes, a data directory may be further down.
    let open = rustix::fs::open(
        dir,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let listener = UnixListener::bind(format!("/proc/self/fd/{}/{SOCKET}", open.as_raw_fd()))?;
    // Whoever the agent runs as; from outside nobody gets through the directory above.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

async fn serve(
    listener: UnixListener,
    bridge: BridgeFace,
    mut asked: mpsc::Receiver<Answer>,
    mut first: watch::Receiver<Option<i32>>,
    state: watch::Sender<State>,
) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(BAD_PAUSE).await;
            continue;
        };
        let Ok(first) = first.wait_for(Option::is_some).await.map(|pid| *pid) else {
            return;
        };
        let lent = match is_from(&stream, first) {
            true => tokio::time::timeout(OFFER_MAX, receive(&stream)).await,
            false => Ok(Err(io::Error::new(
                ErrorKind::PermissionDenied,
                "not the first process",
            ))),
        };
        let lent = lent.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()));
        let offered = lent.and_then(|(said, fd)| match (said, fd) {
            (SAYS_LISTENER, Some(fd)) => listening(fd),
            _ => Err(ErrorKind::InvalidData.into()),
        });
        match offered {
            Ok(offered) => {
                state.send_modify(|state| state.is_up = true);
                let ended = tokio::select! {
                    ended = lend(&stream, &mut asked) => ended,
                    () = bridge.serve(offered) => Ok(()),
                };
                if let Err(error) = ended {
                    tracing::debug!(%error, "the line to a container broke");
                }
                state.send_modify(|state| {
                    state.is_up = false;
                    state.breaks += 1;
                });
            }
            Err(error) if first == Some(0) => {
                tracing::debug!(%error, "the container ended before it was known");
                tokio::time::sleep(BAD_PAUSE).await;
            }
            Err(error) => {
                tracing::warn!(%error, "somebody else connects in a container to what is the first process's");
                tokio::time::sleep(BAD_PAUSE).await;
            }
        }
    }
}

/// Whether the process at the other end is `first`. A process that this worker's namespace cannot
/// see has the number 0: there the engine runs elsewhere, and it is taken as it comes.
fn is_from(stream: &UnixStream, first: Option<i32>) -> bool {
    let peer = stream.peer_cred().ok().and_then(|peer| peer.pid());
    peer.is_none_or(|pid| pid == 0 || Some(pid) == first)
}

/// Asks for sockets as they are wanted, until the line breaks.
async fn lend(stream: &UnixStream, asked: &mut mpsc::Receiver<Answer>) -> io::Result<()> {
    let mut waiting: VecDeque<Answer> = VecDeque::new();
    loop {
        tokio::select! {
            received = receive(stream) => {
                let (said, fd) = received?;
                let answer = waiting.pop_front().ok_or(ErrorKind::InvalidData)?;
                let socket = match (said, fd) {
                    (SAYS_SOCKET, Some(fd)) => connecting(fd),
                    _ => Err(io::Error::other("the container has no socket left")),
                };
                // Who asked may have gone meanwhile.
                let _ = answer.send(socket);
            }
            Some(answer) = asked.recv(), if waiting.len() < ASKED_MAX => {
                // A byte finds room at once: no more than a few are on their way.
                stream.async_io(Interest::WRITABLE, || stream.try_write(&[SAYS_SOCKET])).await?;
                waiting.push_back(answer);
            }
        }
    }
}

/// The next byte and the descriptor that came with it.
async fn receive(stream: &UnixStream) -> io::Result<(u8, Option<OwnedFd>)> {
    stream
        .async_io(Interest::READABLE, || {
            let mut said = [0];
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let received = recvmsg(
                stream,
                &mut [IoSliceMut::new(&mut said)],
                &mut control,
                flags,
            )?;
            if received.bytes == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            let fd = control.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                _ => None,
            });
            Ok((said[0], fd))
        })
        .await
}

/// Makes sure that it is a TCP socket.
fn checked(fd: OwnedFd, listens: bool) -> io::Result<OwnedFd> {
    let is_tcp = sockopt::socket_domain(&fd)? == AddressFamily::INET
        && sockopt::socket_type(&fd)? == SocketType::STREAM
        && sockopt::socket_protocol(&fd)?
            .is_none_or(|protocol| protocol == rustix::net::ipproto::TCP);
    if !is_tcp || sockopt::socket_acceptconn(&fd)? != listens {
        return Err(Errno::INVAL.into());
    }
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(fd)
}

fn listening(fd: OwnedFd) -> io::Result<TcpListener> {
    TcpListener::from_std(std::net::TcpListener::from(checked(fd, true)?))
}

fn connecting(fd: OwnedFd) -> io::Result<TcpSocket> {
    Ok(TcpSocket::from_std_stream(std::net::TcpStream::from(
        checked(fd, false)?,
    )))
}
