//! Waiting for the ends of turns: one subscription a namespace, shared by all who wait.
//!
//! A subscription for every turn costs a NATS server more than the turn's messages: each one, when it
//! comes and when it goes, is compared with every subject that the server has cached routes for. The
//! ends of all turns are few and small beside that, and whoever waits for none of them decodes none.

use crate::backend::{Backend, RawStored};
use crate::bus::Seen;
use crate::error::Error;
use crate::subjects;
use crate::wire::{self, Stored};
use futures::StreamExt;
use futures::stream::BoxStream;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use vlinder_core::{Namespace, SubmissionId};

/// Ends of one turn that a waiter may have unread; a turn has one, and a healed one at most.
const UNREAD_MAX: usize = 4;

type Senders = HashMap<String, Vec<(u64, mpsc::Sender<Stored>)>>;

/// Those who wait, by the subject of the end.
#[derive(Default)]
struct Waiting {
    senders: Mutex<(u64, Senders)>,
}

/// All waits for ends of one [`crate::Bus`].
#[derive(Default)]
pub(crate) struct Ends {
    waiting: Arc<Waiting>,
    listening: tokio::sync::Mutex<HashMap<Namespace, AbortOnDropHandle<()>>>,
}

impl Ends {
    /// The end of a turn as it is stored, from now on.
    pub async fn of(
        &self,
        backend: &dyn Backend,
        ns: &Namespace,
        submission: &SubmissionId,
    ) -> Result<Seen, Error> {
        self.listen(backend, ns).await?;
        Ok(self.waiting.clone().add(subjects::end_of(ns, submission)))
    }

    async fn listen(&self, backend: &dyn Backend, ns: &Namespace) -> Result<(), Error> {
        let mut listening = self.listening.lock().await;
        if listening.get(ns).is_some_and(|task| !task.is_finished()) {
            return Ok(());
        }
        let seen = backend.seen(&subjects::all_ends(ns)).await?;
        let task = tokio::spawn(self.waiting.clone().hand_out(seen));
        listening.insert(ns.clone(), AbortOnDropHandle::new(task));
        Ok(())
    }
}

impl Waiting {
    fn add(self: Arc<Self>, subject: String) -> Seen {
        let (tx, rx) = mpsc::channel(UNREAD_MAX);
        let mut senders = self.lock();
        senders.0 += 1;
        let id = senders.0;
        senders.1.entry(subject.clone()).or_default().push((id, tx));
        drop(senders);
        let place = Place {
            waiting: self,
            subject,
            id,
        };
        futures::stream::unfold((rx, place), |(mut rx, place)| async {
            rx.recv().await.map(|stored| (stored, (rx, place)))
        })
        .boxed()
    }

    async fn hand_out(self: Arc<Self>, mut seen: BoxStream<'static, RawStored>) {
        while let Some(raw) = seen.next().await {
            let waits = self.lock().1.contains_key(&raw.subject);
            if !waits {
                continue;
            }
            match wire::decode(&raw) {
                Ok(stored) => self.hand(stored),
                Err(error) => tracing::warn!(%error, "left out"),
            }
        }
        // The bus is closing: nobody will hear any more.
        self.lock().1.clear();
    }

    fn hand(&self, stored: Stored) {
        let senders = self.lock();
        for (_, sender) in senders.1.get(&stored.subject).into_iter().flatten() {
            // A full one has what it waits for.
            let _ = sender.try_send(stored.clone());
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, (u64, Senders)> {
        self.senders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody's place among those who wait; given up when dropped.
struct Place {
    waiting: Arc<Waiting>,
    subject: String,
    id: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut senders = self.waiting.lock();
        if let Some(waiters) = senders.1.get_mut(&self.subject) {
            waiters.retain(|(id, _)| *id != self.id);
            if waiters.is_empty() {
                senders.1.remove(&self.subject);
            }
        }
    }
}
