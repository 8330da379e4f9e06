//! The worker's side: what it says ([`ControlHandle`]) and what it is told ([`ControlEvents`]).

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use rustix::net::SendFlags;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::Notify;

use super::{ControlEvent, ToParent, encode};
use crate::ledger::{Ledger, SharedLedger, lock};

/// Bytes that wait for a supervisor that does not read. Held reports beyond are dropped: such a
/// supervisor could not act on them, and the bus redelivers by itself.
const OUTBOX_BYTES_MAX: usize = 1024 * 1024;
/// Messages that wait for the supervisor of a task; notes and states replace their predecessor, so
/// this is a bound on distinct keys.
const MESSAGES_MAX: usize = 64;

/// What a worker tells the supervisor. Cheap to clone; no call blocks or awaits.
#[derive(Debug, Clone)]
pub struct ControlHandle(Inner);

#[derive(Debug, Clone)]
enum Inner {
    Socket(Arc<SocketOutbox>),
    Memory(Arc<MemoryOutbox>),
}

impl ControlHandle {
    /// The worker can do its job; `addresses` are where it listens, by name.
    pub fn ready(&self, addresses: BTreeMap<String, String>) {
        self.say(ToParent::Ready { addresses });
    }

    /// The worker is up, but something outside is missing (no Docker, no Ollama …). To be followed
    /// by [`ControlHandle::ready`] when it is there.
    pub fn waiting(&self, reason: impl Into<String>) {
        self.say(ToParent::Waiting {
            reason: reason.into(),
        });
    }

    /// A remark shown in the worker list, the latest of each key.
    pub fn note(&self, key: impl Into<String>, value: impl Into<String>) {
        self.say(ToParent::Note {
            key: key.into(),
            value: value.into(),
        });
    }

    /// Reports deliveries, to be called on receipt and before the job is looked at: if this worker
    /// dies, they move on at once. Returns how many were recorded; the others (none in practice)
    /// move on only when the bus redelivers by itself.
    pub fn held<'a>(&self, tokens: impl IntoIterator<Item = &'a str>) -> usize {
        match &self.0 {
            Inner::Socket(outbox) => outbox.held(tokens.into_iter()),
            Inner::Memory(outbox) => {
                let mut ledger = lock(&outbox.ledger);
                tokens
                    .into_iter()
                    .filter(|token| ledger.hold(token))
                    .count()
            }
        }
    }

    /// Reports that a delivery was acknowledged or handed back. A token never held is ignored.
    pub fn released(&self, token: &str) {
        match &self.0 {
            Inner::Socket(outbox) => outbox.released(token),
            Inner::Memory(outbox) => drop(lock(&outbox.ledger).release(token)),
        }
    }

    pub(super) fn over_socket(outbox: Arc<SocketOutbox>) -> Self {
        Self(Inner::Socket(outbox))
    }

    pub(crate) fn in_memory(outbox: Arc<MemoryOutbox>) -> Self {
        Self(Inner::Memory(outbox))
    }

    fn say(&self, message: ToParent) {
        match &self.0 {
            Inner::Socket(outbox) => outbox.say(&message),
            Inner::Memory(outbox) => outbox.say(message),
        }
    }
}

/// What waits to be written to the control socket.
#[derive(Debug)]
pub(super) struct SocketOutbox {
    socket: UnixStream,
    waiting: Mutex<Waiting>,
    flush: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    bytes: Vec<u8>,
    /// What was reported and not released: releases of the rest need not be sent.
    reported: Ledger,
}

impl SocketOutbox {
    pub fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            waiting: Mutex::default(),
            flush: Notify::new(),
        }
    }

    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Written before it returns, unless the socket is full: then in order, when it has room.
    fn held<'a>(&self, tokens: impl Iterator<Item = &'a str>) -> usize {
        let mut waiting = lock(&self.waiting);
        if waiting.bytes.len() >= OUTBOX_BYTES_MAX {
            return 0;
        }
        let recorded = tokens
            .filter(|token| waiting.reported.hold(token))
            .map(str::to_owned);
        let deliveries: Vec<String> = recorded.collect();
        let count = deliveries.len();
        if count > 0 {
            encode(&ToParent::Held { deliveries }, &mut waiting.bytes);
            self.flush_now(&mut waiting);
        }
        count
    }

    /// Written before it returns, like `held`: a worker that ends right after it has finished its
    /// job must not have the job taken back.
    fn released(&self, token: &str) {
        let mut waiting = lock(&self.waiting);
        if waiting.reported.release(token) {
            let deliveries = vec![token.to_owned()];
            encode(&ToParent::Released { deliveries }, &mut waiting.bytes);
            self.flush_now(&mut waiting);
        }
    }

    /// Written before it returns if the socket has room.
    pub fn say(&self, message: &ToParent) {
        let mut waiting = lock(&self.waiting);
        if waiting.bytes.len() >= OUTBOX_BYTES_MAX {
            tracing::warn!(?message, "the supervisor does not read; message dropped");
            return;
        }
        encode(message, &mut waiting.bytes);
        self.flush_now(&mut waiting);
    }

    /// Asks the kernel itself: the runtime's idea of the socket's readiness may be outdated.
    fn flush_now(&self, waiting: &mut Waiting) {
        if write_out(&self.socket, &mut waiting.bytes).is_err() {
            self.flush.notify_one();
        }
    }

    /// Writes what [`SocketOutbox::flush_now`] could not. Never returns.
    pub async fn flush_when_possible(&self) {
        loop {
            self.flush.notified().await;
            while !lock(&self.waiting).bytes.is_empty() {
                if self.socket.writable().await.is_err() {
                    return;
                }
                let flush = || write_out(&self.socket, &mut lock(&self.waiting).bytes);
                // An error means that the socket is full again; `writable` waits for room.
                let _ = self.socket.try_io(Interest::WRITABLE, flush);
            }
        }
    }
}

/// Writes as much as the socket takes; the error is `WouldBlock` if something is left. A closed
/// socket swallows everything: the supervisor is gone, and the reader ends the process.
fn write_out(socket: &impl AsFd, bytes: &mut Vec<u8>) -> io::Result<()> {
    let mut written = 0;
    let result = loop {
        if written == bytes.len() {
            break Ok(());
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match rustix::net::send(socket, &bytes[written..], flags) {
            Ok(count) => written += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => break Err(io::ErrorKind::WouldBlock.into()),
            Err(_) => written = bytes.len(),
        }
    };
    bytes.drain(..written);
    result
}

/// What a task has said and the supervisor not yet seen.
#[derive(Debug, Default)]
pub(crate) struct MemoryOutbox {
    pub ledger: SharedLedger,
    messages: Mutex<VecDeque<ToParent>>,
    said: Notify,
}

impl MemoryOutbox {
    pub fn new(ledger: SharedLedger) -> Self {
        Self {
            ledger,
            ..Self::default()
        }
    }

    fn say(&self, message: ToParent) {
        let mut messages = lock(&self.messages);
        messages.retain(|earlier| !replaces(&message, earlier));
        if messages.len() >= MESSAGES_MAX {
            tracing::warn!(?message, "too many distinct messages; message dropped");
            return;
        }
        messages.push_back(message);
        self.said.notify_one();
    }

    /// Waits until the task has said something, and takes it.
    pub async fn next(&self) -> ToParent {
        loop {
            if let Some(message) = lock(&self.messages).pop_front() {
                return message;
            }
            self.said.notified().await;
        }
    }
}

fn replaces(new: &ToParent, earlier: &ToParent) -> bool {
    use ToParent::{Note, Ready, Waiting};
    match (new, earlier) {
        (Ready { .. } | Waiting { .. }, Ready { .. } | Waiting { .. }) => true,
        (Note { key, .. }, Note { key: earlier, .. }) => key == earlier,
        _ => false,
    }
}

/// What the supervisor asks of this worker, in order; see [`ControlEvent`].
#[derive(Debug)]
pub struct ControlEvents(pub(crate) Arc<Mailbox>);

impl ControlEvents {
    /// Waits for the next request. Safe to cancel.
    pub async fn next(&mut self) -> ControlEvent {
        loop {
            if let Some(event) = self.0.take() {
                return event;
            }
            self.0.posted.notified().await;
        }
    }
}

/// At most one of each request: a worker that does not look keeps nobody waiting.
#[derive(Debug, Default)]
pub(crate) struct Mailbox {
    requests: Mutex<Requests>,
    posted: Notify,
}

#[derive(Debug, Default)]
struct Requests {
    drain: bool,
    reload: Option<serde_json::Value>,
}

impl Mailbox {
    pub fn post(&self, event: ControlEvent) {
        let mut requests = lock(&self.requests);
        match event {
            ControlEvent::Drain => requests.drain = true,
            ControlEvent::Reload(config) => requests.reload = Some(config),
        }
        self.posted.notify_one();
    }

    fn take(&self) -> Option<ControlEvent> {
        let mut requests = lock(&self.requests);
        let reload = requests.reload.take().map(ControlEvent::Reload);
        reload.or_else(|| std::mem::take(&mut requests.drain).then_some(ControlEvent::Drain))
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::control::{FrameReader, TO_PARENT_BYTES_MAX};

    fn pair() -> (Arc<SocketOutbox>, std::os::unix::net::UnixStream) {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (
            Arc::new(SocketOutbox::new(UnixStream::from_std(ours).unwrap())),
            theirs,
        )
    }

    fn receive(
        socket: &mut std::os::unix::net::UnixStream,
        reader: &mut FrameReader,
    ) -> Vec<ToParent> {
        use std::io::Read as _;
        socket.set_nonblocking(true).unwrap();
        let mut received = Vec::new();
        let mut chunk = [0; 4096];
        while let Ok(count @ 1..) = socket.read(&mut chunk) {
            reader.push(&chunk[..count]);
            while let Some(message) = reader.next().unwrap() {
                received.push(message);
            }
        }
        received
    }

    #[tokio::test]
    async fn held_is_in_the_kernel_before_the_call_returns() {
        let (outbox, mut theirs) = pair();
        let handle = ControlHandle::over_socket(outbox);
        assert_eq!(handle.held(["a", "b"]), 2);
        handle.released("unknown");
        let deliveries = vec!["a".to_owned(), "b".to_owned()];
        let mut reader = FrameReader::new(TO_PARENT_BYTES_MAX);
        assert_eq!(
            receive(&mut theirs, &mut reader),
            [ToParent::Held { deliveries }]
        );
    }

    #[tokio::test]
    async fn a_supervisor_that_does_not_read_never_blocks_the_worker() {
        let (outbox, mut theirs) = pair();
        let handle = ControlHandle::over_socket(outbox.clone());
        let flusher = tokio::spawn(async move { outbox.flush_when_possible().await });
        let begun = Instant::now();
        let tokens: Vec<String> = (0..100_000).map(|n| format!("token-{n:050}")).collect();
        let recorded = tokens
            .iter()
            .filter(|token| handle.held([token.as_str()]) == 1)
            .count();
        assert!(
            recorded > 1_000 && recorded < tokens.len(),
            "recorded {recorded}"
        );
        assert!(begun.elapsed() < Duration::from_secs(20));

        // As soon as it reads, everything recorded arrives, in order.
        let mut received = 0;
        let mut reader = FrameReader::new(TO_PARENT_BYTES_MAX);
        let deadline = Instant::now() + Duration::from_secs(20);
        while received < recorded {
            assert!(
                Instant::now() < deadline,
                "received {received} of {recorded}"
            );
            for message in receive(&mut theirs, &mut reader) {
                let ToParent::Held { deliveries } = message else {
                    panic!("{message:?}")
                };
                assert_eq!(deliveries, [tokens[received].as_str()]);
                received += 1;
            }
            tokio::task::yield_now().await;
        }
        flusher.abort();
    }

    #[tokio::test]
    async fn a_task_that_repeats_itself_fills_nothing() {
        let outbox = Arc::new(MemoryOutbox::default());
        let handle = ControlHandle::in_memory(outbox.clone());
        for n in 0..10_000 {
            handle.note("jobs", n.to_string());
            handle.waiting("no Ollama");
            handle.ready(BTreeMap::new());
        }
        let note = ToParent::Note {
            key: "jobs".into(),
            value: "9999".into(),
        };
        assert_eq!(outbox.next().await, note);
        assert_eq!(
            outbox.next().await,
            ToParent::Ready {
                addresses: BTreeMap::new()
            }
        );
        assert!(lock(&outbox.messages).is_empty());
    }

    #[tokio::test]
    async fn requests_arrive_once_and_the_latest_reload_wins() {
        let mailbox = Arc::new(Mailbox::default());
        let mut events = ControlEvents(mailbox.clone());
        mailbox.post(ControlEvent::Reload(1.into()));
        mailbox.post(ControlEvent::Drain);
        mailbox.post(ControlEvent::Reload(2.into()));
        assert_eq!(events.next().await, ControlEvent::Reload(2.into()));
        assert_eq!(events.next().await, ControlEvent::Drain);
        assert!(mailbox.take().is_none());
    }
}
