//! Mailboxes of live subscribers: bounded, the oldest goes first when the reader is slow.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::task::{Context, Poll, Waker};

/// Messages that wait in one mailbox.
const MAILBOX_ITEMS_MAX: usize = 8192;
/// Bytes that wait in one mailbox.
const MAILBOX_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Where a live subscriber finds what came. Written under the lock of whoever publishes, read by one.
pub(super) struct Mailbox<T> {
    inner: Mutex<Inner<T>>,
}

struct Inner<T> {
    items: VecDeque<(T, usize)>,
    bytes: usize,
    /// How many were dropped because the reader was slow.
    dropped: u64,
    closed: bool,
    reader: Option<Waker>,
}

impl<T> Default for Mailbox<T> {
    fn default() -> Self {
        let inner = Inner {
            items: VecDeque::new(),
            bytes: 0,
            dropped: 0,
            closed: false,
            reader: None,
        };
        Self {
            inner: Mutex::new(inner),
        }
    }
}

impl<T> Mailbox<T> {
    fn inner(&self) -> std::sync::MutexGuard<'_, Inner<T>> {
        self.inner
            .lock()
            .expect("nothing panics while it holds a mailbox")
    }

    /// Puts an item in; drops the oldest ones if there is no room. Returns how many went.
    pub(super) fn push(&self, item: T, bytes: usize) -> u64 {
        let mut inner = self.inner();
        if inner.closed {
            return 0;
        }
        let mut dropped = 0;
        while inner.items.len() >= MAILBOX_ITEMS_MAX
            || (inner.bytes + bytes > MAILBOX_BYTES_MAX && !inner.items.is_empty())
        {
            let Some((_, freed)) = inner.items.pop_front() else {
                break;
            };
            inner.bytes -= freed;
            dropped += 1;
        }
        if dropped > 0 && inner.dropped == 0 {
            tracing::warn!("a live subscriber is too slow, its oldest messages are dropped");
        }
        inner.dropped += dropped;
        inner.bytes += bytes;
        inner.items.push_back((item, bytes));
        if let Some(reader) = inner.reader.take() {
            reader.wake();
        }
        dropped
    }

    /// The next item; `None` when the mailbox is closed and empty.
    pub(super) fn poll_pop(&self, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let mut inner = self.inner();
        if let Some((item, bytes)) = inner.items.pop_front() {
            inner.bytes -= bytes;
            return Poll::Ready(Some(item));
        }
        if inner.closed {
            return Poll::Ready(None);
        }
        inner.reader = Some(cx.waker().clone());
        Poll::Pending
    }

    /// How many items were dropped since the last call of this or of [`Self::clear`].
    pub(super) fn take_dropped(&self) -> u64 {
        std::mem::take(&mut self.inner().dropped)
    }

    /// Throws away what waits.
    pub(super) fn clear(&self) {
        let mut inner = self.inner();
        inner.items.clear();
        inner.bytes = 0;
        inner.dropped = 0;
    }

    /// No more will come.
    pub(super) fn close(&self) {
        let mut inner = self.inner();
        inner.closed = true;
        if let Some(reader) = inner.reader.take() {
            reader.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(mailbox: &Mailbox<usize>) -> Vec<usize> {
        let mut cx = Context::from_waker(Waker::noop());
        let mut items = Vec::new();
        while let Poll::Ready(Some(item)) = mailbox.poll_pop(&mut cx) {
            items.push(item);
        }
        items
    }

    #[test]
    fn a_slow_reader_loses_the_oldest() {
        let mailbox = Mailbox::default();
        for item in 0..MAILBOX_ITEMS_MAX + 10 {
            mailbox.push(item, 1);
        }
        assert_eq!(mailbox.take_dropped(), 10);
        let items = drain(&mailbox);
        assert_eq!(items.len(), MAILBOX_ITEMS_MAX);
        assert_eq!(items[0], 10);
    }

    #[test]
    fn bytes_are_bounded_too() {
        let mailbox = Mailbox::default();
        for item in 0..5 {
            mailbox.push(item, MAILBOX_BYTES_MAX / 2);
        }
        assert_eq!(drain(&mailbox), [3, 4]);
        mailbox.push(9, MAILBOX_BYTES_MAX * 2);
        assert_eq!(drain(&mailbox), [9]);
        mailbox.close();
        let mut cx = Context::from_waker(Waker::noop());
        assert_eq!(mailbox.poll_pop(&mut cx), Poll::Ready(None));
    }
}
