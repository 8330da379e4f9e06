//! Signals: plain messages, not stored. A slow listener loses the oldest, and the loss is counted.

use super::link::Link;
use super::message;
use crate::backend::{RawStored, Signal};
use crate::error::Error;
use crate::subjects;
use futures::StreamExt;
use futures::stream::BoxStream;
use std::sync::atomic::Ordering;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

/// Signals that a listener may have unread: some seconds of tokens of many turns.
const UNREAD_MAX: usize = 4096;

pub(super) async fn listen(link: &Link, filter: &str) -> Result<BoxStream<'static, Signal>, Error> {
    let mut arriving = link.subscribe(filter.to_owned()).await?;
    let (sender, unread) = broadcast::channel(UNREAD_MAX);
    let stop = link.stop.clone();
    link.tasks.spawn(async move {
        loop {
            tokio::select! {
                message = arriving.next() => {
                    let Some(message) = message else { return };
                    let signal = Signal {
                        subject: message.subject.into_string(),
                        body: message.payload,
                    };
                    if sender.send(signal).is_err() {
                        return;
                    }
                }
                () = sender.closed() => return,
                () = stop.cancelled() => return,
            }
        }
    });
    let dropped = link.dropped.clone();
    let signals = futures::stream::unfold((unread, dropped), |(mut unread, dropped)| async {
        loop {
            match unread.recv().await {
                Ok(signal) => return Some((signal, (unread, dropped))),
                Err(RecvError::Lagged(count)) => {
                    dropped.fetch_add(count, Ordering::Relaxed);
                    tracing::debug!(count, "a listener is too slow: oldest signals dropped");
                }
                Err(RecvError::Closed) => return None,
            }
        }
    });
    Ok(signals.boxed())
}

/// What streams store on subjects that match `filter`, live.
///
/// In force on return for everything this connection sends afterwards, in a cluster too: interest
/// travels the same way as the messages behind it. What others store in the first moment may be
/// missed; a waiter subscribes before it sends.
pub(super) async fn seen(
    link: &Link,
    filter: &str,
) -> Result<BoxStream<'static, RawStored>, Error> {
    let arriving = link.subscribe(subjects::seen(filter)).await?;
    let stored = arriving.filter_map(|message| {
        let stored = message::from_headers(message, true)
            .inspect_err(|error| tracing::warn!(%error, "left out"));
        futures::future::ready(stored.ok())
    });
    Ok(stored.boxed())
}
