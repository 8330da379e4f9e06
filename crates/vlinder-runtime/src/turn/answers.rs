//! The answers to a turn's calls, as they come in, and its end.
//!
//! The first answer to a call key in the log is the answer, first by [`Stored::rank`]; later ones are
//! skipped. One that was lost and is given back while the turn runs replaces what was made meanwhile for
//! whoever asks from then on. Subscriptions can
//! lose messages when the connection does, so whoever feeds this also reads the log now and then.

use futures::StreamExt;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use tokio::sync::{OnceCell, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use vlinder_bus::{Body, Bus, Stored, StreamName};
use vlinder_core::record::{CallResult, Place};
use vlinder_core::{CallKey, Kind, NodeHash, SubmissionId};
use vlinder_worker::WorkerCx;
use vlinder_worker::service::call_subject;

/// Inline bodies up to this many bytes are held until they are asked for; larger ones are read again
/// then. A turn may have 100,000 answers.
const HELD_BYTES_MAX: u64 = 4096;

/// An answer in the log.
#[derive(Debug, Clone)]
pub(crate) struct Answered {
    pub result: CallResult,
    /// The result node.
    pub hash: NodeHash,
    /// The request node that it answers.
    pub request: Option<NodeHash>,
    pub seq: u64,
    rank: (Place, u64),
    body: Option<Body>,
}

impl Answered {
    pub fn new(result: CallResult, stored: Stored, hold: bool) -> Self {
        let is_small = stored.body.len() <= HELD_BYTES_MAX;
        Self {
            result,
            hash: stored.hash,
            request: stored.node.parents.first().copied(),
            seq: stored.seq,
            rank: stored.rank(),
            body: (hold || is_small).then_some(stored.body),
        }
    }

    /// Reads the body.
    pub async fn body(
        &self,
        bus: &Bus,
        log: &StreamName,
    ) -> Result<bytes::Bytes, vlinder_bus::Error> {
        if let Some(body) = &self.body {
            return bus.load(body).await;
        }
        match bus.get(log, self.seq).await? {
            Some(stored) if stored.hash == self.hash => bus.load(&stored.body).await,
            _ => Err(vlinder_bus::Error::Missing {
                what: format!("the answer at {} of {log}", self.seq),
            }),
        }
    }
}

/// The answers of one turn; shared by all tries of it on this worker.
#[derive(Default)]
pub(crate) struct Answers {
    state: Mutex<State>,
    end: OnceLock<NodeHash>,
    ended: CancellationToken,
    listening: OnceCell<AbortOnDropHandle<()>>,
}

#[derive(Default)]
struct State {
    known: HashMap<CallKey, Arc<Answered>>,
    waiting: HashMap<CallKey, Vec<oneshot::Sender<Arc<Answered>>>>,
}

impl Answers {
    /// Hears every answer that is stored after this returned, until the last of `self` is dropped. To be
    /// called before a request is sent; a turn without calls needs no subscription for them.
    pub async fn listen(
        self: &Arc<Self>,
        cx: &WorkerCx,
        submission: &SubmissionId,
    ) -> Result<(), vlinder_bus::Error> {
        let listen = || async {
            let subject = call_subject(&cx.ns, submission).to_string();
            let mut seen = cx.bus.seen(&subject).await?;
            let answers = Arc::downgrade(self);
            let task = tokio::spawn(async move {
                while let Some(stored) = seen.next().await {
                    let Some(answers) = answers.upgrade() else {
                        return;
                    };
                    answers.take(stored);
                }
            });
            Ok(AbortOnDropHandle::new(task))
        };
        self.listening.get_or_try_init(listen).await.map(|_| ())
    }

    /// Takes a message from the turn's subscription, or one that was read back.
    pub fn take(&self, stored: Stored) {
        match stored.node.kind {
            Kind::Result => self.take_result(stored),
            Kind::End => {
                let _ = self.end.set(stored.hash);
                self.ended.cancel();
            }
            _ => {}
        }
    }

    fn take_result(&self, stored: Stored) {
        let Ok(result) = CallResult::try_from(&stored.node) else {
            tracing::warn!(seq = stored.seq, "a result that cannot be read is skipped");
            return;
        };
        let mut state = self.lock();
        let key = result.key;
        if let Some(known) = state.known.get(&key)
            && known.rank <= stored.rank()
        {
            return;
        }
        let waiting = state.waiting.remove(&key).unwrap_or_default();
        let answered = Arc::new(Answered::new(result, stored, !waiting.is_empty()));
        state.known.insert(key, answered.clone());
        for waiter in waiting {
            // A waiter that has gone needs nothing.
            let _ = waiter.send(answered.clone());
        }
    }

    /// The answer to a call, if it is here.
    pub fn get(&self, key: &CallKey) -> Option<Arc<Answered>> {
        self.lock().known.get(key).cloned()
    }

    /// Waits for the answer to a call. Registered when this returns; bound the wait.
    pub fn wait(&self, key: CallKey) -> impl Future<Output = Arc<Answered>> + use<> {
        let (tx, rx) = oneshot::channel();
        let mut state = self.lock();
        match state.known.get(&key) {
            Some(answered) => {
                let _ = tx.send(answered.clone());
            }
            None => state.waiting.entry(key).or_default().push(tx),
        }
        async move {
            match rx.await {
                Ok(answered) => answered,
                // The turn is over and with it all its waits.
                Err(_) => std::future::pending().await,
            }
        }
    }

    /// The end of the turn, if it has one.
    pub fn end(&self) -> Option<NodeHash> {
        self.end.get().copied()
    }

    /// Returns when the turn has an end.
    pub async fn ended(&self) {
        self.ended.cancelled().await;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
