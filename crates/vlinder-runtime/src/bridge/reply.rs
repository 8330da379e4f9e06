//! What the bridge answers: bodies and errors.

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc;

/// The body of an answer.
pub(crate) enum ReplyBody {
    /// Here as a whole.
    Whole(Option<Bytes>),
    /// Comes in pieces; an error breaks the connection off.
    Pieces(mpsc::Receiver<Result<Bytes, Broken>>),
    /// Comes from a host outside, as it is.
    Outside(Incoming),
}

/// A streamed answer that cannot be completed. Half an answer must not pass for a whole one.
#[derive(Debug, thiserror::Error)]
#[error("the streamed answer cannot be completed: {0}")]
pub(crate) struct Broken(pub &'static str);

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        match &mut *self {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Pieces(pieces) => pieces
                .poll_recv(cx)
                .map(|piece| piece.map(|piece| piece.map(Frame::data))),
            Self::Outside(body) => Pin::new(body)
                .poll_frame(cx)
                .map(|frame| frame.map(|frame| frame.map_err(super::egress::broken))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_none(),
            Self::Pieces(_) => false,
            Self::Outside(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Self::Pieces(_) => SizeHint::default(),
            Self::Outside(body) => body.size_hint(),
        }
    }
}

/// A complete answer of the bridge.
pub(crate) type Reply = Response<ReplyBody>;

/// An answer with a body.
pub(crate) fn reply(status: u16, content_type: &str, body: Bytes) -> Reply {
    let body = ReplyBody::Whole(Some(body).filter(|body| !body.is_empty()));
    with_head(status, content_type, body)
}

/// An answer in pieces.
pub(crate) fn streamed(
    status: u16,
    content_type: &str,
    pieces: mpsc::Receiver<Result<Bytes, Broken>>,
) -> Reply {
    with_head(status, content_type, ReplyBody::Pieces(pieces))
}

fn with_head(status: u16, content_type: &str, body: ReplyBody) -> Reply {
    let mut response = Response::new(body);
    // What a service answered stands in the record; a status that is none is the service's fault.
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
    let content_type = HeaderValue::from_str(content_type);
    let content_type = content_type.unwrap_or(HeaderValue::from_static("application/octet-stream"));
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

/// An error of the bridge: `{error: {code, message}}`.
pub(crate) fn error(status: u16, code: &str, message: &str) -> Reply {
    let body = serde_json::json!({ "error": { "code": code, "message": message } });
    reply(status, "application/json", body.to_string().into())
}
