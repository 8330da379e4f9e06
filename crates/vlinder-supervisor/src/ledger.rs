//! Which deliveries a worker holds.
//!
//! Tokens are opaque here; the bus gave them out and takes them back ([`crate::HeldDeliveries`]).

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::WorkerKey;

/// Most deliveries one worker may hold at a time. Far above any number of slots; what comes on top
/// is not recorded, and moves on by the bus's own redelivery.
pub(crate) const HELD_MAX: usize = 65_536;
/// Longest token in bytes; an acknowledgement subject has some 150.
pub(crate) const TOKEN_BYTES_MAX: usize = 1024;

/// A ledger that its worker's attendant writes and the status reads.
pub(crate) type SharedLedger = Arc<Mutex<Ledger>>;

/// The ledgers of all workers, for whoever shows them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ledgers {
    all: Arc<Mutex<BTreeMap<WorkerKey, SharedLedger>>>,
    changed: Arc<Notify>,
}

impl Ledgers {
    /// The ledger of a new incarnation; empty.
    pub fn open(&self, key: WorkerKey) -> SharedLedger {
        let ledger = Ledger {
            changed: self.changed.clone(),
            ..Ledger::default()
        };
        let ledger = Arc::new(Mutex::new(ledger));
        lock(&self.all).insert(key, ledger.clone());
        ledger
    }

    /// What each worker holds, oldest first.
    pub fn show(&self) -> Vec<(WorkerKey, Vec<String>)> {
        let ledgers = lock(&self.all);
        let shown = ledgers
            .iter()
            .map(|(key, ledger)| (*key, lock(ledger).show()));
        shown.collect()
    }

    /// Waits for a change since the last call. For one caller at a time.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}

/// A ledger is consistent at every point where a holder of the lock could panic.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The held deliveries, in order of receipt.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// Token → when it came, as a running number.
    held: HashMap<String, u64>,
    next: u64,
    changed: Arc<Notify>,
}

impl Ledger {
    /// Returns false if it was not recorded, for want of room or because the token is too long.
    pub fn hold(&mut self, token: &str) -> bool {
        if self.held.len() >= HELD_MAX || token.len() > TOKEN_BYTES_MAX {
            return false;
        }
        self.held.insert(token.to_owned(), self.next);
        self.next += 1;
        self.changed.notify_one();
        true
    }

    /// Returns whether it was held.
    pub fn release(&mut self, token: &str) -> bool {
        let held = self.held.remove(token).is_some();
        if held {
            self.changed.notify_one();
        }
        held
    }

    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Everything held, oldest first.
    pub fn show(&self) -> Vec<String> {
        let mut held: Vec<_> = self.held.iter().collect();
        held.sort_by_key(|(_, received)| **received);
        held.into_iter().map(|(token, _)| token.clone()).collect()
    }

    /// Everything held, oldest first; nothing is held afterwards.
    pub fn take(&mut self) -> Vec<String> {
        let held = self.show();
        self.held.clear();
        self.changed.notify_one();
        held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_order_and_bounds() {
        let mut ledger = Ledger::default();
        for token in ["c", "a", "b"] {
            assert!(ledger.hold(token));
        }
        assert!(ledger.release("a"));
        assert!(!ledger.release("a"));
        assert!(!ledger.hold(&"x".repeat(TOKEN_BYTES_MAX + 1)));
        assert_eq!(ledger.take(), ["c", "b"]);
        assert_eq!(ledger.len(), 0);
        for n in 0..HELD_MAX {
            assert!(ledger.hold(&n.to_string()));
        }
        assert!(!ledger.hold("one too many"));
    }
}
