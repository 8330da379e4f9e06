//! Calls whose answer is streamed.
//!
//! The service sends what its upstream says as signals, `offset (8 bytes, big-endian) + which answer
//! (8 bytes) + bytes`, and at the end the whole as the result. Signals may be lost, and come from a
//! worker that died: so pieces are passed on only where they continue what was passed on, and only
//! those of one answer; the rest comes from the result. If the result does not begin with what the
//! agent was given, then what the agent does is not explained by the record: the invocation is void,
//! and the turn is tried again from the record, which has the answer by now.

use super::call::{self, Ask, CallError, Prepared, ask_and_wait, give};
use super::reply::{Broken, Reply, reply, streamed};
use super::with_answer_headers;
use crate::agent::Shared;
use crate::turn::answers::Answered;
use crate::turn::invocation::{Invocation, OpenCall};
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use sha2::{Digest, Sha256};
use std::sync::Arc;
use tokio::sync::mpsc;
use tracing::Instrument;
use vlinder_bus::{Signal, subjects};

/// Pieces on their way to the agent; a slow reader slows only itself.
const PIECES_MAX: usize = 64;
/// Length of each of the two numbers before the bytes of a piece.
const NUMBER_BYTES: usize = 8;

/// A piece of a streamed answer.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Piece {
    /// Where it begins in the answer.
    offset: u64,
    /// Which answer it is of: a call that is made again may be answered otherwise.
    answer: u64,
    bytes: Bytes,
}

impl Piece {
    fn of(signal: &Signal) -> Option<Self> {
        let (offset, rest) = signal.body.split_at_checked(NUMBER_BYTES)?;
        let (answer, _) = rest.split_at_checked(NUMBER_BYTES)?;
        Some(Self {
            offset: u64::from_be_bytes(offset.try_into().ok()?),
            answer: u64::from_be_bytes(answer.try_into().ok()?),
            bytes: signal.body.slice(2 * NUMBER_BYTES..),
        })
    }
}

/// What was passed on so far.
#[derive(Default)]
struct Passed {
    len: u64,
    /// The answer that it is of.
    answer: Option<u64>,
    hasher: Sha256,
}

impl Passed {
    /// What of a piece continues what was passed on.
    fn fresh(&mut self, piece: &Piece) -> Option<Bytes> {
        if self.answer.is_some_and(|answer| answer != piece.answer) {
            return None;
        }
        let known = self.len.checked_sub(piece.offset)?;
        if known >= piece.bytes.len() as u64 {
            return None;
        }
        let fresh = piece.bytes.slice(known as usize..);
        self.answer = Some(piece.answer);
        self.len += fresh.len() as u64;
        self.hasher.update(&fresh);
        Some(fresh)
    }

    /// What of the whole is still to be passed on; `None` if it does not begin with what was.
    fn rest(&self, whole: &Bytes) -> Option<Bytes> {
        let len = usize::try_from(self.len)
            .ok()
            .filter(|len| *len <= whole.len())?;
        let is_same = Sha256::digest(&whole[..len]) == self.hasher.clone().finalize();
        is_same.then(|| whole.slice(len..))
    }
}

/// Does a call and streams its answer. The head of the answer is known with its first piece.
pub(crate) async fn perform(
    shared: Arc<Shared>,
    invocation: Arc<Invocation>,
    ask: Arc<Ask>,
) -> Result<Reply, CallError> {
    let open = invocation.begin()?;
    let begin = async {
        let like = ask.like().await;
        let prepared = ask.prepare(&invocation, like).await;
        if let Some(answered) = call::recorded(&shared, &invocation, &ask, &prepared).await? {
            give(&shared, &invocation, &ask, &prepared, &answered).await?;
            return Ok::<_, CallError>((prepared, None, Some(answered)));
        }
        let cx = &shared.cx;
        let submission = &invocation.turn.invoke.submission;
        let subject = subjects::answer_signal(&cx.ns, submission, &prepared.key);
        let signals = cx.bus.signals(&subject).await?;
        Ok((prepared, Some(signals), None))
    };
    let (prepared, signals, recorded) = tokio::select! {
        begun = begin => begun?,
        () = invocation.closed() => return Err(CallError::Closed),
    };
    if let Some(answered) = recorded {
        return whole(&shared, &answered).await;
    }
    let signals = signals.ok_or(CallError::Closed)?;
    let (pieces_tx, pieces) = mpsc::channel(PIECES_MAX);
    let (head_tx, head) = tokio::sync::oneshot::channel();
    let content_type = content_type_of(ask.operation);
    let streaming = Streaming {
        shared,
        invocation,
        ask,
        prepared,
        signals,
        pieces: pieces_tx,
        head: Some(head_tx),
        open,
    };
    // Ends with the answer, with the agent's connection or with the turn.
    tokio::spawn(streaming.run().in_current_span());
    match head.await {
        Ok(Head::Pieces) => Ok(streamed(200, content_type, pieces)),
        Ok(Head::Whole(outcome)) => outcome,
        Err(_) => Err(CallError::Closed),
    }
}

/// What the upstream's stream looks like.
fn content_type_of(operation: &str) -> &'static str {
    if operation.starts_with("api/") {
        "application/x-ndjson"
    } else {
        "text/event-stream"
    }
}

async fn whole(shared: &Shared, answered: &Answered) -> Result<Reply, CallError> {
    let body = answered.body(&shared.cx.bus, &shared.cx.log()).await?;
    let reply = reply(answered.result.http, &answered.result.content_type, body);
    Ok(with_answer_headers(reply, &answered.result))
}

/// How an answer begins.
enum Head {
    /// With a piece.
    Pieces,
    /// It came as a whole, or not at all.
    Whole(Result<Reply, CallError>),
}

struct Streaming {
    shared: Arc<Shared>,
    invocation: Arc<Invocation>,
    ask: Arc<Ask>,
    prepared: Prepared,
    signals: BoxStream<'static, Signal>,
    pieces: mpsc::Sender<Result<Bytes, Broken>>,
    /// Taken when the answer has begun.
    head: Option<tokio::sync::oneshot::Sender<Head>>,
    open: OpenCall,
}

impl Streaming {
    async fn run(mut self) {
        let invocation = self.invocation.clone();
        let outcome = tokio::select! {
            outcome = self.stream() => outcome,
            () = invocation.closed() => Err(CallError::Closed),
        };
        let Err(error) = outcome else { return };
        match self.head.take() {
            Some(head) => drop(head.send(Head::Whole(Err(error)))),
            None => drop(self.pieces.try_send(Err(Broken("the turn is over")))),
        }
    }

    async fn stream(&mut self) -> Result<(), CallError> {
        let (shared, invocation) = (self.shared.clone(), self.invocation.clone());
        let ask = self.ask.clone();
        let mut passed = Passed::default();
        let answered = {
            let prepared = &self.prepared;
            let answer = ask_and_wait(&shared, &invocation, &ask, prepared);
            tokio::pin!(answer);
            loop {
                tokio::select! {
                    biased;
                    Some(signal) = self.signals.next() => {
                        let Some(piece) = Piece::of(&signal) else { continue };
                        let Some(fresh) = passed.fresh(&piece) else { continue };
                        if let Some(head) = self.head.take() {
                            self.open.streams();
                            let _ = head.send(Head::Pieces);
                        }
                        // Where the agent has hung up, the call still belongs to the record.
                        let _ = self.pieces.send(Ok(fresh)).await;
                    }
                    answered = &mut answer => break answered?,
                }
            }
        };
        give(&shared, &invocation, &ask, &self.prepared, &answered).await?;
        if let Some(head) = self.head.take() {
            let _ = head.send(Head::Whole(whole(&shared, &answered).await));
            return Ok(());
        }
        let body = answered.body(&shared.cx.bus, &shared.cx.log()).await?;
        let len = body.len();
        let rest = crate::blocking_if_large(len, move || passed.rest(&body)).await;
        let last = match rest {
            Some(rest) if rest.is_empty() => return Ok(()),
            Some(rest) => Ok(rest),
            None => {
                let why = "another worker made the call anew and got another answer";
                invocation.make_void(why);
                Err(Broken(why))
            }
        };
        let _ = self.pieces.send(last).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_continue_or_are_skipped() {
        let bytes = |text: &'static str| Bytes::from_static(text.as_bytes());
        let piece = |offset, answer, text| Piece {
            offset,
            answer,
            bytes: bytes(text),
        };
        let mut passed = Passed::default();
        assert_eq!(
            passed.fresh(&piece(3, 8, "xyz")),
            None,
            "its beginning was lost"
        );
        assert_eq!(passed.fresh(&piece(0, 7, "abc")), Some(bytes("abc")));
        assert_eq!(passed.fresh(&piece(0, 7, "abc")), None, "twice");
        assert_eq!(
            passed.fresh(&piece(5, 7, "xyz")),
            None,
            "one before it was lost"
        );
        assert_eq!(passed.fresh(&piece(2, 7, "cde")), Some(bytes("de")));
        assert_eq!(passed.fresh(&piece(5, 8, "fgh")), None, "of another answer");
        assert_eq!(passed.rest(&bytes("abcdefg")), Some(bytes("fg")));
        assert_eq!(passed.rest(&bytes("abcde")), Some(Bytes::new()));
        assert_eq!(
            passed.rest(&bytes("abc")),
            None,
            "shorter than what was passed on"
        );
        assert_eq!(passed.rest(&bytes("aXcdefg")), None, "another answer");
        assert_eq!(passed.fresh(&piece(u64::MAX, 7, "x")), None);
    }

    #[test]
    fn pieces_are_read_from_signals() {
        let of = |body: &[u8]| {
            Piece::of(&Signal {
                subject: String::new(),
                body: Bytes::copy_from_slice(body),
            })
        };
        let whole = [&5u64.to_be_bytes()[..], &9u64.to_be_bytes()[..], b"text"].concat();
        let expected = Piece {
            offset: 5,
            answer: 9,
            bytes: Bytes::from_static(b"text"),
        };
        assert_eq!(of(&whole), Some(expected));
        assert_eq!(of(&whole[..15]), None);
        assert_eq!(of(b"short"), None);
    }
}
