//! Reads an answer of the upstream and, when it is a stream, sends it on as it comes.
//!
//! The pieces go out as signals, which may be lost and say where they belong; the whole answer is
//! the result in the log. Form of a piece: its offset in the answer as eight big-endian bytes, eight
//! bytes that are the same in all pieces of one answer and in those of no other (a call that is made
//! again may be answered otherwise), then at most [`PIECE_BYTES_MAX`] bytes of the answer.

use crate::upstream::cause;
use bytes::{BufMut, Bytes, BytesMut};
use futures::{FutureExt, Stream, StreamExt};
use std::time::Duration;
use vlinder_bus::Bus;
use vlinder_core::BODY_BYTES_MAX;

/// What stands before the bytes of a piece: the offset, and which answer it belongs to.
const HEAD_BYTES: usize = 16;
/// Most bytes of an answer in one signal.
pub const PIECE_BYTES_MAX: usize = 32 * 1024;
/// Largest answer, in bytes: what one message of the record holds.
pub const ANSWER_BYTES_MAX: usize = BODY_BYTES_MAX as usize;

/// Why an answer is not whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Broken {
    /// The connection broke, or nothing came for too long.
    Cut(String),
    /// It is larger than [`ANSWER_BYTES_MAX`].
    TooLarge,
}

/// What came of an answer's body.
pub struct Received {
    /// What came, complete or not.
    pub body: Bytes,
    /// Why it is not complete.
    pub broken: Option<Broken>,
}

/// How long to wait for what.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For the first byte.
    pub first_byte: Duration,
    /// For each further one.
    pub idle: Duration,
}

/// Reads `chunks` to the end; sends them on to `subject` where there is one. What is there already
/// travels together.
pub async fn receive<S>(bus: &Bus, subject: Option<&str>, chunks: S, patience: Patience) -> Received
where
    S: Stream<Item = reqwest::Result<Bytes>>,
{
    let mut chunks = std::pin::pin!(chunks);
    let mut body = BytesMut::new();
    let mut sent = 0;
    let answer = rand::random::<u64>();
    let broken = loop {
        let limit = if body.is_empty() {
            patience.first_byte
        } else {
            patience.idle
        };
        let ended = match tokio::time::timeout(limit, chunks.next()).await {
            Err(_) => Some(Some(Broken::Cut(format!("nothing came for {limit:?}")))),
            Ok(first) => gather(&mut body, sent, first, chunks.as_mut()),
        };
        if let Some(subject) = subject {
            sent = send(bus, subject, answer, &body, sent).await;
        } else {
            sent = body.len();
        }
        if let Some(broken) = ended {
            break broken;
        }
    };
    Received {
        body: body.freeze(),
        broken,
    }
}

/// Takes `next` and whatever else is there, up to about a piece. `Some` at the end, with the reason
/// where it is no good end.
fn gather<S>(
    body: &mut BytesMut,
    sent: usize,
    mut next: Option<reqwest::Result<Bytes>>,
    mut chunks: std::pin::Pin<&mut S>,
) -> Option<Option<Broken>>
where
    S: Stream<Item = reqwest::Result<Bytes>>,
{
    loop {
        match next {
            None => return Some(None),
            Some(Err(error)) => return Some(Some(Broken::Cut(cause(&error)))),
            Some(Ok(chunk)) if body.len() + chunk.len() > ANSWER_BYTES_MAX => {
                return Some(Some(Broken::TooLarge));
            }
            Some(Ok(chunk)) => body.extend_from_slice(&chunk),
        }
        if body.len() - sent >= PIECE_BYTES_MAX {
            return None;
        }
        next = chunks.next().now_or_never()?;
    }
}

/// Sends everything from `sent` on; where the next piece begins.
async fn send(bus: &Bus, subject: &str, answer: u64, body: &[u8], mut sent: usize) -> usize {
    for piece in body[sent..].chunks(PIECE_BYTES_MAX) {
        let mut framed = BytesMut::with_capacity(HEAD_BYTES + piece.len());
        framed.put_u64(sent as u64);
        framed.put_u64(answer);
        framed.extend_from_slice(piece);
        if let Err(error) = bus.signal(subject, framed.freeze()).await {
            tracing::debug!(%error, "a piece of an answer was not sent on; the result will have it");
        }
        sent += piece.len();
    }
    sent
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::stream;
    use vlinder_bus::local::{LocalBus, LocalOptions};

    const PATIENCE: Patience = Patience {
        first_byte: Duration::from_secs(10),
        idle: Duration::from_secs(10),
    };

    async fn bus() -> (Bus, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let options = LocalOptions::new(directory.path().join("bus.db"));
        (Bus::new(LocalBus::open(options).await.unwrap()), directory)
    }

    #[tokio::test]
    async fn pieces_are_small_in_order_and_say_where_they_belong() {
        let (bus, _directory) = bus().await;
        let mut signals = bus.signals("sig.v1.default.answer.t.k").await.unwrap();
        let whole: Vec<u8> = (0..100_000u32).map(|n| n as u8).collect();
        let mut answers = std::collections::BTreeSet::new();
        for size in [1_000, 70_000, 100_000] {
            let chunks = whole
                .chunks(size)
                .map(|chunk| Ok(Bytes::copy_from_slice(chunk)));
            let chunks = stream::iter(chunks.collect::<Vec<_>>());
            let subject = Some("sig.v1.default.answer.t.k");
            let received = receive(&bus, subject, chunks, PATIENCE).await;
            assert_eq!((&received.body[..], received.broken), (&whole[..], None));
            let mut together = Vec::new();
            let mut pieces = 0;
            while together.len() < whole.len() {
                let piece = signals.next().await.unwrap().body;
                assert!(piece.len() <= HEAD_BYTES + PIECE_BYTES_MAX);
                assert_eq!(piece[..8], (together.len() as u64).to_be_bytes());
                answers.insert((size, piece.slice(8..HEAD_BYTES)));
                together.extend_from_slice(&piece[HEAD_BYTES..]);
                pieces += 1;
            }
            assert_eq!(together, whole);
            // The last chunk of a gathering may reach beyond a piece: at most two for each.
            assert!(
                pieces <= 2 * whole.len().div_ceil(PIECE_BYTES_MAX),
                "{pieces} pieces: small chunks should travel together"
            );
        }
        let marks: std::collections::BTreeSet<_> = answers.iter().map(|(_, mark)| mark).collect();
        assert_eq!(
            (answers.len(), marks.len()),
            (3, 3),
            "one mark for each answer"
        );
    }

    #[tokio::test]
    async fn an_answer_without_end_is_refused() {
        let (bus, _directory) = bus().await;
        let chunk = Bytes::from(vec![b'x'; 1024 * 1024]);
        let chunks = stream::repeat_with(|| Ok(chunk.clone()));
        let received = receive(&bus, None, chunks, PATIENCE).await;
        assert_eq!(received.broken, Some(Broken::TooLarge));
        assert_eq!(received.body.len(), ANSWER_BYTES_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_an_answer() {
        let (bus, _directory) = bus().await;
        let chunks = stream::iter([Ok(Bytes::from_static(b"a"))]).chain(stream::pending());
        let received = receive(&bus, None, chunks, PATIENCE).await;
        assert_eq!(received.body, "a");
        assert!(matches!(received.broken, Some(Broken::Cut(reason)) if reason.contains("10s")));
    }
}
