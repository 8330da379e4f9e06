//! HTTP towards agents: sockets without delays, and a client that keeps connections open.
//!
//! A standard-library agent sends head and body of a message apart. With delayed acknowledgements
//! its second packet waits 40 ms for the first one's; so every socket towards an agent has
//! `TCP_NODELAY`, and `TCP_QUICKACK` is set again after each read (the kernel forgets it).

use crate::launcher::Connect;
use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Connections to one replica that are kept open while nobody uses them.
const IDLE_CONNECTIONS_MAX: usize = 16;
/// How long they are kept. Servers close silent connections after 2 s and more; a request that meets
/// the closing would be lost, and the turn tried again for nothing.
const IDLE_MAX: Duration = Duration::from_secs(1);

/// Kept connections, with the time since when.
type Idle = Arc<Mutex<Vec<(SendRequest<Whole>, Instant)>>>;

/// A TCP stream that acknowledges at once.
pub(crate) struct QuickAck(TcpStream);

impl QuickAck {
    /// Takes a fresh stream.
    pub(crate) fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        rustix::net::sockopt::set_tcp_quickack(&stream, true)?;
        Ok(Self(stream))
    }
}

impl AsyncRead for QuickAck {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.0).poll_read(cx, buf);
        if polled.is_ready() && buf.filled().len() > before {
            // An acknowledgement that is due leaves now. If this fails, it is only late.
            let _ = rustix::net::sockopt::set_tcp_quickack(&self.0, true);
        }
        polled
    }
}

impl AsyncWrite for QuickAck {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }
}

/// A body that is here as a whole.
#[derive(Debug, Clone, Default)]
pub(crate) struct Whole(Option<Bytes>);

impl Whole {
    pub(crate) fn new(bytes: Bytes) -> Self {
        Self(Some(bytes).filter(|bytes| !bytes.is_empty()))
    }
}

impl Body for Whole {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.take().map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.as_ref().map_or(0, |bytes| bytes.len() as u64))
    }
}

/// Why an agent gave no proper answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Fault {
    /// It does not listen, or hung up before the answer was complete.
    #[error("{0}")]
    Gone(String),
    /// What it says is not HTTP.
    #[error("{0}")]
    Protocol(String),
    /// It says more than a body may hold.
    #[error("the answer is larger than {0} bytes")]
    TooLarge(u64),
}

impl Fault {
    fn of(error: &hyper::Error) -> Self {
        if error.is_parse() {
            return Self::Protocol(format!("the answer is not HTTP: {error}"));
        }
        let said = in_words(error);
        // Hyper reports a bad chunk as an I/O error of its own making.
        let source =
            std::error::Error::source(error).and_then(|source| source.downcast_ref::<io::Error>());
        match source.map(io::Error::kind) {
            Some(io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData) => {
                Self::Protocol(format!("the answer is not HTTP: {said}"))
            }
            _ => Self::Gone(format!(
                "the connection ended before the answer was complete: {said}"
            )),
        }
    }
}

fn in_words(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// Speaks HTTP/1.1 to one replica.
pub(crate) struct AgentClient {
    connector: Arc<dyn Connect>,
    idle: Idle,
    /// Ends the connections' tasks with the client.
    end: CancellationToken,
    _ends_when_dropped: DropGuard,
}

impl AgentClient {
    pub(crate) fn new(connector: Arc<dyn Connect>) -> Self {
        let end = CancellationToken::new();
        Self {
            connector,
            idle: Arc::default(),
            _ends_when_dropped: end.clone().drop_guard(),
            end,
        }
    }

    /// Sends a request and returns the head of the answer. A kept connection that the agent has
    /// closed meanwhile is replaced, as long as nothing of the request had left.
    pub(crate) async fn send(&self, request: Request<Whole>) -> Result<Answering, Fault> {
        let mut request = request;
        while let Some(mut connection) = self.take_idle() {
            if connection.ready().await.is_err() {
                continue;
            }
            match connection.try_send_request(request).await {
                Ok(response) => return Ok(self.answering(response, connection)),
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(Fault::of(error.error())),
                },
            }
        }
        let mut connection = self.connect().await?;
        match connection.send_request(request).await {
            Ok(response) => Ok(self.answering(response, connection)),
            Err(error) => Err(Fault::of(&error)),
        }
    }

    fn take_idle(&self) -> Option<SendRequest<Whole>> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|(connection, since)| !connection.is_closed() && since.elapsed() < IDLE_MAX);
        idle.pop().map(|(connection, _)| connection)
    }

    async fn connect(&self) -> Result<SendRequest<Whole>, Fault> {
        let refused = |error: io::Error| Fault::Gone(format!("it does not listen: {error}"));
        let stream = self.connector.connect().await.map_err(refused)?;
        let stream = QuickAck::new(stream).map_err(refused)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| Fault::of(&error))?;
        let end = self.end.clone();
        // Ends with the connection or with the client.
        tokio::spawn(async move {
            tokio::select! {
                _ = connection => {}
                () = end.cancelled() => {}
            }
        });
        Ok(sender)
    }

    fn answering(&self, response: Response<Incoming>, connection: SendRequest<Whole>) -> Answering {
        Answering {
            response,
            connection: Some(connection),
            idle: self.idle.clone(),
        }
    }
}

/// An answer whose body is still to be read. Dropping it before the end closes the connection.
pub(crate) struct Answering {
    response: Response<Incoming>,
    connection: Option<SendRequest<Whole>>,
    idle: Idle,
}

impl Answering {
    pub(crate) fn head(&self) -> &Response<Incoming> {
        &self.response
    }

    /// The next piece of the body; `None` at its end, when the connection is kept for others.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, Fault> {
        loop {
            let body = Pin::new(self.response.body_mut());
            let mut body = body;
            let frame = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await;
            match frame {
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data() {
                        return Ok(Some(bytes));
                    }
                }
                Some(Err(error)) => return Err(Fault::of(&error)),
                None => {
                    self.keep();
                    return Ok(None);
                }
            }
        }
    }

    fn keep(&mut self) {
        let Some(connection) = self.connection.take() else {
            return;
        };
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if !connection.is_closed() && idle.len() < IDLE_CONNECTIONS_MAX {
            idle.push((connection, Instant::now()));
        }
    }
}
