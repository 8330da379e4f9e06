//! Reading: one message, a range, a follower, a live subscriber.

use super::filter::{EntryKey, Filter};
use super::live::Mailbox;
use super::shared::Shared;
use super::state::State;
use super::store;
use crate::backend::{RawStored, Signal};
use crate::error::Error;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::sync::Notify;

/// Index entries that one selection looks at while it holds the lock: a millisecond or so.
const SCAN_SLICE: usize = 16_384;
/// Messages that a follower reads at once: at most 4 MiB of bodies.
const FOLLOW_BATCH: usize = 64;

/// A message that is wanted, in memory or on disk.
pub(super) enum Found {
    Cached(Arc<RawStored>),
    OnDisk {
        seq: u64,
        subject: String,
        previous: u64,
    },
}

impl State {
    /// Looks where messages are.
    pub(super) fn find(&self, stream: usize, seqs: impl IntoIterator<Item = u64>) -> Vec<Found> {
        let stream = &self.streams[stream];
        let find = |seq| {
            if let Some(message) = stream.cached.get(&seq) {
                return Some(Found::Cached(message.clone()));
            }
            let subject = stream.index.subject_of(seq)?;
            Some(Found::OnDisk {
                seq,
                subject: subject.to_string(),
                previous: stream.index.previous(seq),
            })
        };
        seqs.into_iter().filter_map(find).collect()
    }
}

impl Shared {
    /// Completes what was found. Reads the disk off the runtime's threads.
    pub(super) async fn fetch(
        self: &Arc<Self>,
        stream: usize,
        found: Vec<Found>,
    ) -> Result<Vec<RawStored>, Error> {
        let all_cached = found.iter().all(|one| matches!(one, Found::Cached(_)));
        if all_cached {
            let cached = found.into_iter().filter_map(|one| match one {
                Found::Cached(message) => Some(RawStored::clone(&message)),
                Found::OnDisk { .. } => None,
            });
            return Ok(cached.collect());
        }
        let stream_id = stream as i64 + 1;
        self.read_disk(move |conn| {
            let read = |one| match one {
                Found::Cached(message) => Ok(RawStored::clone(&message)),
                Found::OnDisk {
                    seq,
                    subject,
                    previous,
                } => store::read_message(conn, stream_id, seq, subject, previous),
            };
            found.into_iter().map(read).collect()
        })
        .await
    }

    /// Up to `max` messages that match, from sequence `from` on.
    pub(super) async fn range(
        self: &Arc<Self>,
        stream: usize,
        filter: &Filter,
        from: u64,
        max: usize,
    ) -> Result<Vec<RawStored>, Error> {
        let mut messages = Vec::new();
        let mut next = from;
        loop {
            let (found, resume) = {
                let state = self.lock();
                state.check()?;
                let want = max - messages.len();
                let index = &state.streams[stream].index;
                let part = index.select(filter, next, u64::MAX, want, SCAN_SLICE);
                (state.find(stream, part.seqs), part.resume)
            };
            messages.extend(self.fetch(stream, found).await?);
            match resume {
                Some(resume) => next = resume,
                None => return Ok(messages),
            }
            tokio::task::yield_now().await;
        }
    }

    /// Everything on disk that matches, from sequence `from` on, then what comes. Unlike live
    /// subscribers, followers are only told of what is committed: they are projections, whose own
    /// files outlive this process and must not know more than the log.
    pub(super) fn follow(
        self: &Arc<Self>,
        stream: usize,
        filter: Filter,
        from: u64,
    ) -> BoxStream<'static, Result<RawStored, Error>> {
        let wake = Arc::new(Notify::new());
        let key = self.lock().streams[stream]
            .followers
            .insert(filter.clone(), wake.clone());
        let follower = Follower {
            shared: self.clone(),
            stream,
            filter,
            next: from.max(1),
            ready: VecDeque::new(),
            wake,
            key,
            ended: false,
        };
        futures::stream::unfold(follower, |mut follower| async move {
            let item = follower.next().await?;
            Some((item, follower))
        })
        .boxed()
    }

    /// What is appended from now on, live.
    pub(super) fn seen(
        self: &Arc<Self>,
        filter: Filter,
    ) -> Result<BoxStream<'static, RawStored>, Error> {
        let mailbox = Arc::<Mailbox<Arc<RawStored>>>::default();
        let mut state = self.lock();
        state.check()?;
        let key = state.seen.insert(filter, mailbox.clone());
        drop(state);
        let shared = self.clone();
        let leave = OnDrop(move || drop(shared.lock().seen.remove(&key)));
        Ok(items(mailbox, leave)
            .map(|message| RawStored::clone(&message))
            .boxed())
    }

    /// Signals from now on.
    pub(super) fn listen(
        self: &Arc<Self>,
        filter: Filter,
    ) -> Result<BoxStream<'static, Signal>, Error> {
        let mailbox = Arc::<Mailbox<Signal>>::default();
        let key = self.signals().insert(filter, mailbox.clone());
        let shared = self.clone();
        let leave = OnDrop(move || drop(shared.signals().remove(&key)));
        // After the insertion: whoever ends the bus closes what is there.
        self.lock().check()?;
        Ok(items(mailbox, leave).boxed())
    }
}

/// What comes into a mailbox, until it is closed. `leave` is dropped with the stream.
fn items<T: Send + 'static, F: FnMut() + Send + 'static>(
    mailbox: Arc<Mailbox<T>>,
    leave: OnDrop<F>,
) -> impl Stream<Item = T> + Send {
    futures::stream::poll_fn(move |cx| {
        let _owned_by_the_stream = &leave;
        poll_fairly(cx, |cx| mailbox.poll_pop(cx))
    })
}

/// Does something when it is dropped.
pub(super) struct OnDrop<F: FnMut()>(pub(super) F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Polls within the runtime's budget, so that a full mailbox does not keep the thread.
pub(super) fn poll_fairly<T>(
    cx: &mut Context<'_>,
    poll: impl FnOnce(&mut Context<'_>) -> Poll<T>,
) -> Poll<T> {
    let budget = ready!(tokio::task::coop::poll_proceed(cx));
    let polled = poll(cx);
    if polled.is_ready() {
        budget.made_progress();
    }
    polled
}

struct Follower {
    shared: Arc<Shared>,
    stream: usize,
    filter: Filter,
    next: u64,
    ready: VecDeque<RawStored>,
    wake: Arc<Notify>,
    key: EntryKey,
    ended: bool,
}

impl Follower {
    /// The next message; `None` after an error.
    async fn next(&mut self) -> Option<Result<RawStored, Error>> {
        loop {
            if self.ended {
                return None;
            }
            if let Some(message) = self.ready.pop_front() {
                tokio::task::coop::consume_budget().await;
                return Some(Ok(message));
            }
            match self.read().await {
                Ok(true) => {}
                Ok(false) => self.wake.notified().await,
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error));
                }
            }
        }
    }

    /// Reads on; `false` if there is nothing more now.
    async fn read(&mut self) -> Result<bool, Error> {
        let (found, next) = {
            let state = self.shared.lock();
            state.check()?;
            let stream = &state.streams[self.stream];
            let to = stream.committed;
            let part = stream
                .index
                .select(&self.filter, self.next, to, FOLLOW_BATCH, SCAN_SLICE);
            let next = match (part.resume, part.seqs.last()) {
                (Some(resume), _) => resume,
                (None, Some(last)) if part.seqs.len() == FOLLOW_BATCH => last + 1,
                (None, _) => self.next.max(to + 1),
            };
            if next == self.next {
                return Ok(false);
            }
            (state.find(self.stream, part.seqs), next)
        };
        self.ready = self.shared.fetch(self.stream, found).await?.into();
        self.next = next;
        if self.ready.is_empty() {
            tokio::task::yield_now().await;
        }
        Ok(true)
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.streams[self.stream].followers.remove(&self.key);
    }
}
