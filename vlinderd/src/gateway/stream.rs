//! A turn as server-sent events in OpenAI's framing.
//!
//! Pieces of the reply go out as they come. They are signals and may be lost; what goes out is
//! therefore checked against the reply on record before the stream ends well. Progress and reasons to
//! wait are comments, which clients skip.

use super::wire::{self, Head};
use super::{failure, usage_of};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use vlinder_client::{Client, Turn, TurnEvent};
use vlinder_proto::harness::End;

/// A silent stream says that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Longest comment, in characters.
const COMMENT_CHARS_MAX: usize = 1000;

/// Streams a turn that has begun; `usage` asks for its tokens at the end.
pub fn response(
    turn: Turn,
    head: Head,
    usage: Option<Client>,
    place: OwnedSemaphorePermit,
) -> Response {
    let first = data(&head.first_chunk());
    let streaming = Streaming {
        turn,
        head,
        usage,
        sent: Sent::default(),
        ready: VecDeque::from([first]),
        ended: false,
        _place: place,
    };
    let events = futures::stream::unfold(streaming, |mut streaming| async move {
        let event = streaming.next().await?;
        Some((Ok::<_, Infallible>(event), streaming))
    });
    let alive = KeepAlive::new().interval(KEEP_ALIVE);
    Sse::new(events).keep_alive(alive).into_response()
}

fn data(value: &serde_json::Value) -> Event {
    Event::default().data(value.to_string())
}

fn comment(text: &str) -> Event {
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let line: String = words
        .chars()
        .filter(|c| !c.is_control())
        .take(COMMENT_CHARS_MAX)
        .collect();
    Event::default().comment(line)
}

/// What of the reply has gone out.
#[derive(Default)]
struct Sent {
    bytes: usize,
    hasher: Sha256,
    /// A piece may be missing: nothing more goes out before the end.
    stopped: bool,
}

impl Sent {
    fn push(&mut self, text: &[u8]) {
        self.bytes += text.len();
        self.hasher.update(text);
    }

    /// What of the reply is missing; `None` if it does not begin with what has gone out.
    fn rest<'a>(&self, reply: &'a [u8]) -> Option<&'a [u8]> {
        let (begin, rest) = reply.split_at_checked(self.bytes)?;
        (Sha256::digest(begin) == self.hasher.clone().finalize()).then_some(rest)
    }
}

struct Streaming {
    turn: Turn,
    head: Head,
    usage: Option<Client>,
    sent: Sent,
    ready: VecDeque<Event>,
    ended: bool,
    /// Freed when the client has everything or has left.
    _place: OwnedSemaphorePermit,
}

impl Streaming {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            match self.turn.next().await {
                Ok(Some(event)) => self.take(event).await,
                Ok(None) => self.fail("internal", "the turn ended without an end"),
                Err(error) => self.fail(error.code(), &error.to_string()),
            }
        }
    }

    async fn take(&mut self, event: TurnEvent) {
        match event {
            TurnEvent::Accepted(_) => {}
            TurnEvent::Chunk(chunk) if chunk.kind == "token" => {
                if !self.sent.stopped {
                    self.say(&chunk.text);
                }
            }
            TurnEvent::Chunk(chunk) => {
                let text = String::from_utf8_lossy(&chunk.text).into_owned();
                self.ready
                    .push_back(comment(&format!("{}: {text}", chunk.kind)));
            }
            TurnEvent::Waiting(reason) => {
                self.ready.push_back(comment(&format!("waiting: {reason}")));
            }
            TurnEvent::Broken(_) => self.sent.stopped = true,
            TurnEvent::End(end) => self.end(&end).await,
        }
    }

    fn say(&mut self, text: &[u8]) {
        self.sent.push(text);
        let text = String::from_utf8_lossy(text);
        self.ready.push_back(data(&self.head.text_chunk(&text)));
    }

    fn fail(&mut self, code: &str, message: &str) {
        let error = wire::error("server_error", code, None, message);
        self.ready.push_back(data(&error));
        self.ended = true;
    }

    async fn end(&mut self, end: &End) {
        if let Some((_, code, message)) = failure(end) {
            return self.fail(&code, &message);
        }
        match self.sent.rest(&end.output).map(<[u8]>::to_vec) {
            Some(rest) if rest.is_empty() => {}
            Some(rest) => self.say(&rest),
            None => {
                let message = format!(
                    "pieces of the reply were lost on their way; `vlinder turn get {}` has all of it",
                    self.turn.submission()
                );
                return self.fail("incomplete", &message);
            }
        }
        self.ready.push_back(data(&self.head.last_chunk()));
        if let Some(client) = &self.usage {
            let usage = usage_of(client, self.turn.submission()).await;
            self.ready.push_back(data(&self.head.usage_chunk(usage)));
        }
        self.ready.push_back(Event::default().data("[DONE]"));
        self.ended = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_gone_out_is_completed_or_contradicted() {
        let mut sent = Sent::default();
        assert_eq!(sent.rest(b"abc"), Some(&b"abc"[..]));
        sent.push(b"ab");
        assert_eq!(sent.rest(b"abc"), Some(&b"c"[..]));
        assert_eq!(sent.rest(b"ab"), Some(&b""[..]));
        assert_eq!(sent.rest(b"a"), None, "more went out than was said");
        assert_eq!(sent.rest(b"aXc"), None);
    }
}
