//! Message ids that were seen within the dedup window.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};

/// Ids that one stream remembers, whatever their age: 100 bytes each. Only bursts of thousands a
/// second reach it within the window; correctness does not rest on old ids (design.md rule 4).
pub(super) const DEDUP_IDS_MAX: usize = 262_144;

/// See the module. Keeps 128-bit keyed hashes instead of the ids: who does not know the keys, which
/// are random, cannot make two ids collide.
pub(super) struct Dedup {
    window_ms: u64,
    seqs: HashMap<u128, u64>,
    order: VecDeque<(u64, u128)>,
    keys: (RandomState, RandomState),
}

impl Dedup {
    /// Remembers ids for so many milliseconds.
    pub(super) fn new(window_ms: u64) -> Self {
        Self {
            window_ms,
            seqs: HashMap::new(),
            order: VecDeque::new(),
            keys: (RandomState::new(), RandomState::new()),
        }
    }

    fn key(&self, id: &str) -> u128 {
        u128::from(self.keys.0.hash_one(id)) << 64 | u128::from(self.keys.1.hash_one(id))
    }

    /// Where the message with this id was stored, if it is remembered.
    pub(super) fn find(&mut self, id: &str, now_ms: u64) -> Option<u64> {
        self.forget(now_ms);
        self.seqs.get(&self.key(id)).copied()
    }

    /// Remembers an id. An empty one means that the sender wants no dedup.
    pub(super) fn insert(&mut self, id: &str, seq: u64, now_ms: u64) {
        if id.is_empty() {
            return;
        }
        let key = self.key(id);
        self.seqs.insert(key, seq);
        self.order.push_back((now_ms, key));
        self.forget(now_ms);
    }

    fn forget(&mut self, now_ms: u64) {
        let horizon = now_ms.saturating_sub(self.window_ms);
        while let Some((time_ms, key)) = self.order.front() {
            if *time_ms >= horizon && self.order.len() <= DEDUP_IDS_MAX {
                return;
            }
            self.seqs.remove(key);
            self.order.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_forgotten_by_age_and_by_number() {
        let mut dedup = Dedup::new(100);
        dedup.insert("a", 1, 1000);
        dedup.insert("", 2, 1000);
        assert_eq!(dedup.find("a", 1100), Some(1));
        assert_eq!(dedup.find("", 1100), None);
        assert_eq!(dedup.find("a", 1101), None);
        for seq in 0..DEDUP_IDS_MAX as u64 + 5 {
            dedup.insert(&format!("id{seq}"), seq, 2000);
        }
        assert_eq!(dedup.find("id4", 2000), None);
        assert_eq!(dedup.find("id5", 2000), Some(5));
        assert_eq!(dedup.seqs.len(), DEDUP_IDS_MAX);
    }
}
