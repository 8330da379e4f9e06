//! `POST /invoke` and the agent's answer to it.

use super::invocation::Invocation;
use crate::agent::Agent;
use crate::http::{Answering, Fault, Whole};
use crate::pool::Lease;
use bytes::{Bytes, BytesMut};
use hyper::Request;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HOST};
use std::sync::Arc;
use vlinder_bus::subjects;
use vlinder_core::BODY_BYTES_MAX;

/// Carries the invocation to the agent, and back with its calls.
pub(crate) const INVOCATION_HEADER: &str = "x-vlinder-invocation";
/// What is kept of the body of a failed answer, in bytes.
const FAILURE_BYTES_MAX: usize = 64 * 1024;

/// An agent's complete answer.
pub(super) struct Reply {
    pub status: u16,
    pub body: Bytes,
}

impl Reply {
    /// Why the turn failed, in the agent's words.
    pub fn as_failure(&self) -> String {
        let cut = &self.body[..self.body.len().min(FAILURE_BYTES_MAX)];
        let said = String::from_utf8_lossy(cut);
        match said.trim_end() {
            "" => format!("the agent answered {} without a word", self.status),
            said => format!("the agent answered {}: {said}", self.status),
        }
    }
}

/// Asks the agent and reads its answer to the end.
pub(super) async fn invoke(
    agent: &Arc<Agent>,
    lease: &Lease,
    invocation: &Invocation,
    (body, content_type): (Bytes, &'static str),
) -> Result<Reply, Fault> {
    let request = Request::post("/invoke")
        .header(HOST, "localhost")
        .header(CONTENT_TYPE, content_type)
        .header(CONTENT_LENGTH, body.len())
        .header(INVOCATION_HEADER, &invocation.id)
        .body(Whole::new(body))
        .map_err(|error| Fault::Protocol(error.to_string()))?;
    let mut answering = lease.replica().client.send(request).await?;
    let status = answering.head().status().as_u16();
    let is_streamed = !answering.head().headers().contains_key(CONTENT_LENGTH);
    let mut pieces = Pieces::new(
        agent,
        invocation,
        is_streamed && (200..300).contains(&status),
    );
    let body = read(&mut answering, &mut pieces).await?;
    Ok(Reply { status, body })
}

async fn read(answering: &mut Answering, pieces: &mut Pieces<'_>) -> Result<Bytes, Fault> {
    let Some(first) = answering.chunk().await? else {
        return Ok(Bytes::new());
    };
    pieces.pass_on(&first).await;
    let mut body = Body::One(first);
    while let Some(chunk) = answering.chunk().await? {
        pieces.pass_on(&chunk).await;
        body.push(&chunk)?;
    }
    Ok(body.finish())
}

/// Most answers are one piece and need no copy.
enum Body {
    One(Bytes),
    Many(BytesMut),
}

impl Body {
    fn push(&mut self, chunk: &[u8]) -> Result<(), Fault> {
        let so_far = match self {
            Self::One(first) => first.len(),
            Self::Many(all) => all.len(),
        };
        if (so_far + chunk.len()) as u64 > BODY_BYTES_MAX {
            return Err(Fault::TooLarge(BODY_BYTES_MAX));
        }
        match self {
            Self::One(first) => {
                let mut all = BytesMut::with_capacity((first.len() + chunk.len()) * 2);
                all.extend_from_slice(first);
                all.extend_from_slice(chunk);
                *self = Self::Many(all);
            }
            Self::Many(all) => all.extend_from_slice(chunk),
        }
        Ok(())
    }

    fn finish(self) -> Bytes {
        match self {
            Self::One(first) => first,
            Self::Many(all) => all.freeze(),
        }
    }
}

/// Passes a streamed answer on to whoever watches the turn, as signals: `{kind, offset, text}`, the
/// offset in bytes of UTF-8. They may be lost; the end has it all.
struct Pieces<'a> {
    agent: &'a Agent,
    subject: Option<String>,
    offset: usize,
    /// The beginning of a character whose rest is to come: at most 3 bytes.
    rest: Vec<u8>,
}

impl<'a> Pieces<'a> {
    fn new(agent: &'a Agent, invocation: &Invocation, wanted: bool) -> Self {
        let submission = &invocation.turn.invoke.submission;
        let subject = wanted.then(|| subjects::chunk_signal(&agent.shared.cx.ns, submission));
        Self {
            agent,
            subject,
            offset: 0,
            rest: Vec::new(),
        }
    }

    async fn pass_on(&mut self, chunk: &[u8]) {
        let Some(subject) = &self.subject else { return };
        self.rest.extend_from_slice(chunk);
        let whole = match std::str::from_utf8(&self.rest) {
            Ok(_) => self.rest.len(),
            // The last character is not complete yet.
            Err(error) if error.error_len().is_none() => error.valid_up_to(),
            // Not text: what it becomes is shown.
            Err(_) => self.rest.len(),
        };
        let rest = self.rest.split_off(whole);
        let text = String::from_utf8_lossy(&self.rest).into_owned();
        let offset = self.offset;
        self.offset += whole;
        self.rest = rest;
        if text.is_empty() {
            return;
        }
        let signal = serde_json::json!({ "kind": "token", "offset": offset, "text": text });
        if let Err(error) = self
            .agent
            .shared
            .cx
            .bus
            .signal(subject, signal.to_string().into())
            .await
        {
            tracing::debug!(%error, "a piece of an answer was not passed on");
        }
    }
}
