//! A worker process finds its control channel.

use std::net::TcpListener;
use std::os::fd::{BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::io::FdFlags;
use rustix::net::{AddressFamily, sockopt};
use tokio::net::UnixStream;

use super::outbox::{Mailbox, SocketOutbox};
use super::{
    CONTROL_FD, CONTROL_VERSION, ControlEvent, ControlEvents, ControlHandle, FrameReader, Start,
    StartFrame, TO_CHILD_BYTES_MAX, ToChild, ToParent,
};
use crate::Error;

/// The supervisor writes the start message right after the fork; this only bounds the wait if it
/// was stopped in between.
const START_DEADLINE: Duration = Duration::from_secs(10);
/// Exit code of a worker whose supervisor is gone. Nobody is left to read it.
const EXIT_ALONE: i32 = 1;
/// Read in one go, in bytes.
const CHUNK_BYTES: usize = 16 * 1024;

/// Whether the descriptors have been taken: they can be owned only once.
static CONNECTED: AtomicBool = AtomicBool::new(false);

/// Takes over the control channel and the listeners that this process inherited, and reads the
/// start message.
///
/// Call it once, at the start, on the runtime that does the worker's work. From then on pings are
/// answered there, and the process exits at once when the supervisor is gone.
pub async fn connect_from_fd() -> Result<(Start, ControlHandle, ControlEvents), Error> {
    let socket = inherited_control()?;
    let (frame, handle, events) = connect(socket, || std::process::exit(EXIT_ALONE)).await?;
    let listeners = inherited_listeners(&frame.listeners)?;
    let StartFrame {
        role,
        index,
        node,
        incarnation,
        config,
        ..
    } = frame;
    let start = Start {
        role,
        index,
        node,
        incarnation,
        config,
        listeners,
    };
    Ok((start, handle, events))
}

fn inherited_control() -> Result<StdUnixStream, Error> {
    let is_control = |fd: BorrowedFd<'_>| {
        sockopt::socket_domain(fd).is_ok_and(|domain| domain == AddressFamily::UNIX)
    };
    if !inherited(CONTROL_FD, is_control) || CONNECTED.swap(true, Ordering::Relaxed) {
        return Err(Error::NotSupervised);
    }
    let socket = StdUnixStream::from(own(CONTROL_FD)?);
    socket
        .set_nonblocking(true)
        .map_err(Error::io("use the control socket"))?;
    Ok(socket)
}

fn inherited_listeners(names: &[String]) -> Result<Vec<(String, TcpListener)>, Error> {
    let is_listener = |fd: BorrowedFd<'_>| sockopt::socket_acceptconn(fd).is_ok_and(|is| is);
    let mut listeners = Vec::with_capacity(names.len());
    for (fd, name) in (CONTROL_FD + 1..).zip(names) {
        if !inherited(fd, is_listener) {
            return Err(Error::Control(format!(
                "the listener {name:?} was not inherited"
            )));
        }
        let listener = TcpListener::from(own(fd)?);
        listener
            .set_nonblocking(true)
            .map_err(Error::io("use an inherited listener"))?;
        listeners.push((name.clone(), listener));
    }
    Ok(listeners)
}

fn inherited(fd: i32, is_expected: impl Fn(BorrowedFd<'_>) -> bool) -> bool {
    // SAFETY: Borrowed for two system calls that only ask; a number that is not open makes them
    // fail, and nothing in this process closes low descriptors while it starts.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_getfd(fd).is_ok() && is_expected(fd)
}

/// Takes an inherited descriptor, and keeps it from this process's own children.
fn own(fd: i32) -> Result<OwnedFd, Error> {
    // SAFETY: It is open and of the expected kind (`inherited`), was put there by the supervisor
    // for this purpose, and `CONNECTED` lets only one caller get here.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC).map_err(Error::system("mark a descriptor"))?;
    Ok(fd)
}

/// Reads the start message and leaves two tasks behind that live as long as the process: one reads
/// (and calls `on_alone` at the end of the stream), one writes what the socket did not take.
async fn connect(
    socket: StdUnixStream,
    on_alone: impl FnOnce() + Send + 'static,
) -> Result<(StartFrame, ControlHandle, ControlEvents), Error> {
    let socket = UnixStream::from_std(socket).map_err(Error::io("use the control socket"))?;
    let outbox = Arc::new(SocketOutbox::new(socket));
    let mut reader = Reader {
        outbox: outbox.clone(),
        frames: FrameReader::new(TO_CHILD_BYTES_MAX),
    };
    let first = tokio::time::timeout(START_DEADLINE, reader.next());
    let start = match first.await.map_err(|_| Error::NoStart(START_DEADLINE))?? {
        Some(ToChild::Start(start)) if start.version == CONTROL_VERSION => start,
        Some(ToChild::Start(StartFrame {
            version: theirs, ..
        })) => {
            return Err(Error::ControlVersion {
                ours: CONTROL_VERSION,
                theirs,
            });
        }
        Some(other) => return Err(Error::Control(format!("expected start, got {other:?}"))),
        None => return Err(Error::NotSupervised),
    };
    let mailbox = Arc::new(Mailbox::default());
    let posted = mailbox.clone();
    tokio::spawn(async move {
        if let Err(error) = reader.serve(&posted).await {
            tracing::error!(%error, "the control channel is broken; exiting");
        }
        on_alone();
    });
    let flusher = outbox.clone();
    tokio::spawn(async move { flusher.flush_when_possible().await });
    Ok((
        start,
        ControlHandle::over_socket(outbox),
        ControlEvents(mailbox),
    ))
}

struct Reader {
    outbox: Arc<SocketOutbox>,
    frames: FrameReader,
}

impl Reader {
    /// Returns `Ok` when the supervisor has closed its end.
    async fn serve(&mut self, mailbox: &Mailbox) -> Result<(), Error> {
        while let Some(message) = self.next().await? {
            match message {
                ToChild::Ping { n } => self.outbox.say(&ToParent::Pong { n }),
                ToChild::Drain => mailbox.post(ControlEvent::Drain),
                ToChild::Reload { config } => mailbox.post(ControlEvent::Reload(config)),
                ToChild::Start(_) => return Err(Error::Control("a second start".into())),
            }
        }
        Ok(())
    }

    async fn next(&mut self) -> Result<Option<ToChild>, Error> {
        loop {
            if let Some(message) = self.frames.next()? {
                return Ok(Some(message));
            }
            let socket = self.outbox.socket();
            socket
                .readable()
                .await
                .map_err(Error::io("read the control socket"))?;
            let mut chunk = [0; CHUNK_BYTES];
            match socket.try_read(&mut chunk) {
                Ok(0) => return Ok(None),
                Ok(count) => self.frames.push(&chunk[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                    return Ok(None);
                }
                Err(source) => return Err(Error::io("read the control socket")(source)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use vlinder_core::WorkerRole;

    use super::super::encode;
    use super::*;

    fn start(version: u32) -> ToChild {
        ToChild::Start(StartFrame {
            version,
            role: WorkerRole::Harness,
            index: 1,
            node: "hub".into(),
            incarnation: 4,
            config: serde_json::json!({"bind": "127.0.0.1"}),
            listeners: vec![],
        })
    }

    fn pair(messages: &[ToChild]) -> (StdUnixStream, StdUnixStream) {
        let (ours, mut theirs) = StdUnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut bytes = Vec::new();
        for message in messages {
            encode(message, &mut bytes);
        }
        theirs.write_all(&bytes).unwrap();
        (ours, theirs)
    }

    #[tokio::test]
    async fn a_worker_starts_answers_and_leaves_with_its_supervisor() {
        let reload = ToChild::Reload { config: 7.into() };
        let (ours, mut theirs) = pair(&[start(1), ToChild::Ping { n: 9 }, reload, ToChild::Drain]);
        let (alone, left) = tokio::sync::oneshot::channel();
        let on_alone = move || alone.send(()).unwrap();
        let (start, _handle, mut events) = connect(ours, on_alone).await.unwrap();
        assert_eq!(
            (start.role, start.index, start.incarnation),
            (WorkerRole::Harness, 1, 4)
        );
        assert_eq!(events.next().await, ControlEvent::Reload(7.into()));
        assert_eq!(events.next().await, ControlEvent::Drain);
        let mut pong = [0; 4 + 16];
        theirs.read_exact(&mut pong).unwrap();
        assert_eq!(&pong[4..], br#"{"pong":{"n":9}}"#);
        drop(theirs);
        tokio::time::timeout(Duration::from_secs(5), left)
            .await
            .unwrap()
            .unwrap();
    }

    #[tokio::test]
    async fn another_version_or_a_wrong_first_message_is_refused() {
        let (ours, _theirs) = pair(&[start(2)]);
        let error = connect(ours, || {}).await.unwrap_err();
        assert!(matches!(
            error,
            Error::ControlVersion { ours: 1, theirs: 2 }
        ));
        let (ours, _theirs) = pair(&[ToChild::Drain]);
        assert!(matches!(
            connect(ours, || {}).await.unwrap_err(),
            Error::Control(_)
        ));
        let (ours, theirs) = pair(&[]);
        drop(theirs);
        assert!(matches!(
            connect(ours, || {}).await.unwrap_err(),
            Error::NotSupervised
        ));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_supervisor_is_not_waited_for() {
        let (ours, _theirs) = pair(&[]);
        assert!(matches!(
            connect(ours, || {}).await.unwrap_err(),
            Error::NoStart(_)
        ));
    }
}
