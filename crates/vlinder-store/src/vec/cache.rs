//! Decoded vectors of the states searched last. A search after a few changes reads only these,
//! through the difference of the two states.

use super::{decode, not_a_vector, user_key};
use std::collections::{HashMap, VecDeque};
use vlinder_core::StateRoot;
use vlinder_core::merkle::{self, Change, Chunks};

/// Most states whose vectors are kept.
pub const STATES_MAX: usize = 4;
/// Most memory for kept vectors, in bytes. More are searched all the same, straight from the tree.
pub const BYTES_MAX: usize = 256 * 1024 * 1024;
/// Most changes that are followed from a kept state to the one that is asked for; beyond, reading
/// the tree afresh is no dearer.
const CHANGES_MAX: usize = 1000;
/// What an entry takes beside its contents, in bytes: the slot, the index, two allocations.
const ENTRY_OVERHEAD: usize = 128;

/// The vectors of one store in one state.
pub(super) struct Vectors {
    dimension: usize,
    slots: Vec<Slot>,
    /// The numbers of slot `i` are at `i * dimension`.
    numbers: Vec<f32>,
    index: HashMap<String, usize>,
    bytes: usize,
}

struct Slot {
    key: String,
    metadata: Vec<u8>,
}

impl Vectors {
    pub(super) fn new(dimension: usize) -> Self {
        Self {
            dimension,
            slots: Vec::new(),
            numbers: Vec::new(),
            index: HashMap::new(),
            bytes: 0,
        }
    }

    /// Whether they fit into the cache.
    pub(super) fn may_be_kept(&self) -> bool {
        self.bytes <= BYTES_MAX
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &[f32], &[u8])> {
        let numbers = self.numbers.chunks_exact(self.dimension);
        let entries = self.slots.iter().zip(numbers);
        entries.map(|(slot, numbers)| (slot.key.as_str(), numbers, slot.metadata.as_slice()))
    }

    fn cost(&self, key: &str, metadata: &[u8]) -> usize {
        ENTRY_OVERHEAD + 2 * key.len() + metadata.len() + 4 * self.dimension
    }

    /// Adds or replaces a vector, which has the dimension of the others.
    pub(super) fn set(&mut self, key: &str, numbers: &[f32], metadata: &[u8]) {
        self.remove(key);
        self.bytes += self.cost(key, metadata);
        self.index.insert(key.to_owned(), self.slots.len());
        self.slots.push(Slot {
            key: key.to_owned(),
            metadata: metadata.to_vec(),
        });
        self.numbers.extend_from_slice(numbers);
    }

    /// Removes a vector; the last one takes its place.
    fn remove(&mut self, key: &str) {
        let Some(at) = self.index.remove(key) else {
            return;
        };
        let slot = self.slots.swap_remove(at);
        self.bytes -= self.cost(key, &slot.metadata);
        let last = self.slots.len() * self.dimension;
        self.numbers.copy_within(last.., at * self.dimension);
        self.numbers.truncate(last);
        if let Some(moved) = self.slots.get(at) {
            self.index.insert(moved.key.clone(), at);
        }
    }
}

struct Kept {
    state: StateRoot,
    prefix: Vec<u8>,
    vectors: Vectors,
}

/// Vectors of the states that were searched last, at most [`STATES_MAX`] and [`BYTES_MAX`].
#[derive(Default)]
pub struct Cache {
    /// The one used last comes first.
    kept: VecDeque<Kept>,
}

impl Cache {
    /// The vectors under `prefix` in `state`, if they are kept or near to what is kept.
    pub(super) fn get<C: Chunks>(
        &mut self,
        chunks: &C,
        state: StateRoot,
        prefix: &[u8],
        dimension: usize,
    ) -> Result<Option<&Vectors>, merkle::Error<C::Error>> {
        let of_this_store =
            |kept: &Kept| kept.prefix == prefix && kept.vectors.dimension == dimension;
        let exact = |kept: &Kept| of_this_store(kept) && kept.state == state;
        if let Some(at) = self.kept.iter().position(exact) {
            return Ok(self.use_now(at));
        }
        for at in 0..self.kept.len() {
            let kept = &self.kept[at];
            if !of_this_store(kept) {
                continue;
            }
            let Some(changes) = changes(chunks, kept.state, state)? else {
                continue;
            };
            // A kept state that is left half changed by a damaged chunk would lie: take it out first.
            let Some(mut kept) = self.kept.remove(at) else {
                continue;
            };
            follow(chunks, &mut kept, changes)?;
            kept.state = state;
            self.kept.push_front(kept);
            self.shrink();
            return Ok(self.kept.front().map(|kept| &kept.vectors));
        }
        Ok(None)
    }

    pub(super) fn keep(&mut self, state: StateRoot, prefix: Vec<u8>, vectors: Vectors) {
        self.kept.push_front(Kept {
            state,
            prefix,
            vectors,
        });
        self.shrink();
    }

    fn use_now(&mut self, at: usize) -> Option<&Vectors> {
        let kept = self.kept.remove(at)?;
        self.kept.push_front(kept);
        self.kept.front().map(|kept| &kept.vectors)
    }

    /// Forgets what was used longest ago. What is in use stays until the next call.
    fn shrink(&mut self) {
        let bytes =
            |kept: &VecDeque<Kept>| kept.iter().map(|kept| kept.vectors.bytes).sum::<usize>();
        while self.kept.len() > STATES_MAX || (self.kept.len() > 1 && bytes(&self.kept) > BYTES_MAX)
        {
            self.kept.pop_back();
        }
    }
}

type Changes = Vec<(Vec<u8>, Change)>;

/// How `new` differs from `old`; `None` if by too much.
fn changes<C: Chunks>(
    chunks: &C,
    old: StateRoot,
    new: StateRoot,
) -> Result<Option<Changes>, merkle::Error<C::Error>> {
    let mut changes = Changes::new();
    for change in merkle::diff(chunks, Some(old), Some(new))? {
        if changes.len() == CHANGES_MAX {
            return Ok(None);
        }
        changes.push(change?);
    }
    Ok(Some(changes))
}

fn follow<C: Chunks>(
    chunks: &C,
    kept: &mut Kept,
    changes: Changes,
) -> Result<(), merkle::Error<C::Error>> {
    let mut numbers = Vec::with_capacity(kept.vectors.dimension);
    for (key, change) in changes {
        if !key.starts_with(&kept.prefix) {
            continue;
        }
        let (Change::Added(value) | Change::Removed(value) | Change::Changed { new: value, .. }) =
            &change;
        let hash = value.hash();
        let key = user_key(&key, &kept.prefix).ok_or_else(|| not_a_vector(hash))?;
        let (Change::Added(value) | Change::Changed { new: value, .. }) = change else {
            kept.vectors.remove(key);
            continue;
        };
        let bytes = merkle::read(chunks, value)?;
        let metadata = decode(&bytes, kept.vectors.dimension, &mut numbers);
        let metadata = metadata.ok_or_else(|| not_a_vector(hash))?;
        kept.vectors.set(key, &numbers, metadata);
    }
    Ok(())
}
