//! Pulling from a queue, and what can be said of a delivery.

use super::queue::Tried;
use super::read::poll_fairly;
use super::shared::Shared;
use super::state::State;
use super::writer::Op;
use crate::backend::{RawDelivery, RawPuller, Verdict};
use crate::error::Error;
use async_trait::async_trait;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

/// One worker's pull. Sleeps until it is woken; what it took and did not return goes back when it is
/// dropped, stopped, or asked again, and does not count as delivered.
pub(super) struct LocalPuller {
    shared: Arc<Shared>,
    stream: usize,
    queue: i64,
    name: String,
    waiter: u64,
    taken: Vec<Tried>,
    stopped: bool,
}

impl LocalPuller {
    /// Begins to pull from a queue.
    pub(super) fn new(shared: &Arc<Shared>, stream: usize, name: &str) -> Result<Self, Error> {
        let mut state = shared.lock();
        let id = state.queue_by_name.get(&(stream, name.to_owned())).copied();
        let queue = id.and_then(|id| state.queue(id));
        let (queue, ..) = queue.ok_or_else(|| missing(name))?;
        Ok(Self {
            shared: shared.clone(),
            stream,
            queue: queue.id,
            name: name.to_owned(),
            waiter: queue.new_waiter(),
            taken: vec![],
            stopped: false,
        })
    }

    /// Finds the queue again if it was deleted and made anew.
    fn find_queue(&mut self) {
        let shared = self.shared.clone();
        let mut state = shared.lock();
        if state.queue(self.queue).is_some() {
            return;
        }
        let key = (self.stream, self.name.clone());
        let id = state.queue_by_name.get(&key).copied();
        if let Some((queue, ..)) = id.and_then(|id| state.queue(id)) {
            (self.queue, self.waiter) = (queue.id, queue.new_waiter());
        }
    }

    fn poll_take(&self, max: usize, cx: &mut Context<'_>) -> Poll<Result<Vec<Tried>, Error>> {
        let mut state = self.shared.lock();
        if let Err(error) = state.check() {
            return Poll::Ready(Err(error));
        }
        let Some((queue, timers, ops)) = state.queue(self.queue) else {
            return Poll::Ready(Err(missing(&self.name)));
        };
        let now = Instant::now();
        let taken = ready!(queue.poll_take(self.waiter, max, now, timers, cx));
        // Repeats are written down, so that work which ends the process each time is counted across
        // its restarts. First deliveries are not: that would be one more write for each message.
        for again in taken.iter().filter(|taken| taken.delivered > 1) {
            ops.push(Op::Tried {
                queue: self.queue,
                seq: again.seq,
                delivered: again.delivered,
            });
        }
        Poll::Ready(Ok(taken))
    }

    /// Stops waiting and gives back what was not returned.
    fn leave(&mut self) {
        let mut state = self.shared.lock();
        let Some((queue, timers, _)) = state.queue(self.queue) else {
            return;
        };
        for taken in self.taken.drain(..) {
            queue.undo(taken, timers);
        }
        queue.leave(self.waiter);
    }
}

fn missing(queue: &str) -> Error {
    Error::Missing {
        what: format!("queue {queue}"),
    }
}

/// Leaves the queue when a wait is given up, so that nothing stays reserved for it.
struct Waiting<'a>(&'a mut LocalPuller);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

#[async_trait]
impl RawPuller for LocalPuller {
    async fn next(&mut self, max: usize) -> Result<Vec<RawDelivery>, Error> {
        if self.stopped {
            return Err(Error::Closed);
        }
        self.find_queue();
        let waiting = Waiting(self);
        let taken =
            std::future::poll_fn(|cx| poll_fairly(cx, |cx| waiting.0.poll_take(max, cx))).await?;
        // From here until the bodies are read, dropping the future gives the messages back.
        waiting.0.taken = taken;
        let puller = &*waiting.0;
        let seqs = puller.taken.iter().map(|taken| taken.seq);
        let found = puller.shared.lock().find(puller.stream, seqs);
        let messages = puller.shared.fetch(puller.stream, found).await?;
        let taken = std::mem::take(&mut waiting.0.taken);
        let deliveries = taken.into_iter().zip(messages).map(|(taken, stored)| {
            debug_assert_eq!(taken.seq, stored.seq);
            RawDelivery {
                stored,
                delivered: taken.delivered,
                token: format!("{}.{}.{}", waiting.0.queue, taken.seq, taken.delivered),
            }
        });
        Ok(deliveries.collect())
    }

    async fn stop(&mut self) {
        self.stopped = true;
        self.leave();
    }
}

impl Drop for LocalPuller {
    fn drop(&mut self) {
        self.leave();
    }
}

/// What a token says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Token {
    queue: i64,
    seq: u64,
    delivered: u64,
}

impl Token {
    /// Reads a token.
    pub(super) fn parse(text: &str) -> Result<Self, Error> {
        let mut numbers = text.split('.').map(str::parse::<u64>);
        let mut next = || numbers.next().and_then(Result::ok);
        let token = (|| {
            Some(Self {
                queue: i64::try_from(next()?).ok()?,
                seq: next()?,
                delivered: next()?,
            })
        })();
        let parsed = token.filter(|_| numbers.next().is_none());
        parsed.ok_or_else(|| Error::Refused {
            operation: "verdict",
            reason: "that is not the token of a delivery".to_owned(),
        })
    }
}

impl State {
    /// Says something about a delivery. Returns whether an acknowledgement was queued.
    pub(super) fn verdict(&mut self, token: Token, verdict: Verdict) -> Result<bool, Error> {
        self.check()?;
        let Token {
            queue: id,
            seq,
            delivered,
        } = token;
        let Some((queue, timers, ops)) = self.queue(id) else {
            // Fire and forget for those that are; an acknowledgement is owed an answer.
            return match verdict {
                Verdict::Progress | Verdict::Nak(_) => Ok(false),
                Verdict::Ack | Verdict::Terminate => Err(missing(&format!("number {id}"))),
            };
        };
        let now = Instant::now();
        let tried = match verdict {
            Verdict::Ack | Verdict::Terminate => {
                let news = queue.ack(seq, timers);
                if news {
                    ops.push(Op::Acked {
                        queue: id,
                        seq,
                        floor: queue.floor(),
                    });
                }
                return Ok(news);
            }
            Verdict::Progress => queue.progress(seq, delivered, now, timers),
            Verdict::Nak(delay) => queue.nak(seq, delivered, delay, now, timers),
        };
        if let Some(Tried { seq, delivered }) = tried {
            ops.push(Op::Tried {
                queue: id,
                seq,
                delivered,
            });
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn hostile_tokens_are_errors_or_numbers(text in "\\PC{0,40}|[0-9.]{0,40}") {
            if let Ok(token) = Token::parse(&text) {
                let back = format!("{}.{}.{}", token.queue, token.seq, token.delivered);
                prop_assert_eq!(Token::parse(&back).unwrap(), token);
            }
        }
    }

    #[test]
    fn tokens_have_three_numbers() {
        for bad in ["", "1", "1.2", "1.2.3.4", "a.b.c", "-1.2.3", "1..3"] {
            assert!(Token::parse(bad).is_err(), "{bad}");
        }
    }
}
