//! Codes of the vectors of the states searched last. A search after a few changes reads only these,
//! through the difference of the two states.
//!
//! What is kept is a cache by state: it can be dropped at any time, and a fork or a state of the past
//! finds its own, or follows from a near one, or is read from the tree.

use super::codes::{Bounds, Coded, Query};
use super::{decode, not_a_vector, user_key};
use std::collections::{HashMap, VecDeque};
use vlinder_core::StateRoot;
use vlinder_core::merkle::{self, Change, Chunks, Value};

/// Most states whose vectors are kept.
pub const STATES_MAX: usize = 4;
/// Most memory for kept vectors, in bytes: some 250,000 of 768 dimensions. More are searched all the
/// same, straight from the tree.
pub const BYTES_MAX: usize = 256 * 1024 * 1024;
/// Changes that are followed at least from a kept state to the one that is asked for.
const CHANGES_MIN: usize = 1000;
/// Beyond this part of the vectors, reading the tree afresh is no dearer than following the changes.
const CHANGES_PART: usize = 4;
/// Metadata of at most so many bytes is kept beside the codes; longer ones are read when asked for.
const METADATA_KEPT_MAX: usize = 1024;
/// What an entry takes beside its contents, in bytes: the slot, the index, three allocations.
const ENTRY_OVERHEAD: usize = 240;

/// The vectors of one store in one state, as codes.
pub(super) struct Vectors {
    dimension: usize,
    slots: Vec<Slot>,
    /// The codes of slot `i` are at `i * dimension`.
    codes: Vec<i8>,
    index: HashMap<Box<str>, usize>,
    bytes: usize,
}

pub(super) struct Slot {
    pub(super) key: Box<str>,
    /// Where the vector itself is.
    pub(super) value: Value,
    /// `None` where it is too long to be kept.
    pub(super) metadata: Option<Box<[u8]>>,
    coded: Coded,
}

impl Slot {
    fn cost(&self, dimension: usize) -> usize {
        let inline = match &self.value {
            Value::Inline(bytes) => bytes.len(),
            Value::Chunk { .. } => 0,
        };
        let metadata = self.metadata.as_ref().map_or(0, |metadata| metadata.len());
        ENTRY_OVERHEAD + 2 * self.key.len() + inline + metadata + dimension
    }
}

impl Vectors {
    pub(super) fn new(dimension: usize) -> Self {
        Self {
            dimension,
            slots: Vec::new(),
            codes: Vec::new(),
            index: HashMap::new(),
            bytes: 0,
        }
    }

    /// Whether they fit into the cache.
    pub(super) fn may_be_kept(&self) -> bool {
        self.bytes <= BYTES_MAX
    }

    /// How much memory they take, about.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn slot(&self, at: usize) -> &Slot {
        &self.slots[at]
    }

    /// How far each vector is from the query, as far as its codes tell; by place.
    pub(super) fn bounds(&self, query: &Query) -> impl Iterator<Item = Bounds> {
        let codes = self.codes.chunks_exact(self.dimension);
        let entries = self.slots.iter().zip(codes);
        entries.map(|(slot, codes)| query.bounds(codes, &slot.coded))
    }

    /// Adds or replaces a vector, which has the dimension of the others.
    pub(super) fn set(&mut self, key: &str, value: Value, numbers: &[f32], metadata: &[u8]) {
        self.remove(key);
        let coded = Coded::encode(numbers, &mut self.codes);
        let slot = Slot {
            key: key.into(),
            value,
            metadata: (metadata.len() <= METADATA_KEPT_MAX).then(|| metadata.into()),
            coded,
        };
        self.bytes += slot.cost(self.dimension);
        self.index.insert(key.into(), self.slots.len());
        self.slots.push(slot);
    }

    /// Removes a vector; the last one takes its place.
    fn remove(&mut self, key: &str) {
        let Some(at) = self.index.remove(key) else {
            return;
        };
        let slot = self.slots.swap_remove(at);
        self.bytes -= slot.cost(self.dimension);
        let last = self.slots.len() * self.dimension;
        self.codes.copy_within(last.., at * self.dimension);
        self.codes.truncate(last);
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
            let most = CHANGES_MIN.max(kept.vectors.slots.len() / CHANGES_PART);
            let Some(changes) = changes(chunks, kept.state, state, most)? else {
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

    /// Forgets as much as it takes to hold `bytes` more.
    pub(super) fn make_room(&mut self, bytes: usize) {
        while !self.kept.is_empty() && self.bytes() + bytes > BYTES_MAX {
            self.kept.pop_back();
        }
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
        while self.kept.len() > STATES_MAX || (self.kept.len() > 1 && self.bytes() > BYTES_MAX) {
            self.kept.pop_back();
        }
    }

    fn bytes(&self) -> usize {
        self.kept.iter().map(|kept| kept.vectors.bytes).sum()
    }
}

type Changes = Vec<(Vec<u8>, Change)>;

/// How `new` differs from `old`; `None` if by more than `most`.
fn changes<C: Chunks>(
    chunks: &C,
    old: StateRoot,
    new: StateRoot,
    most: usize,
) -> Result<Option<Changes>, merkle::Error<C::Error>> {
    let mut changes = Changes::new();
    for change in merkle::diff(chunks, Some(old), Some(new))? {
        if changes.len() == most {
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
        let bytes = merkle::read(chunks, value.clone())?;
        let metadata = decode(&bytes, kept.vectors.dimension, &mut numbers);
        let metadata = metadata.ok_or_else(|| not_a_vector(hash))?;
        kept.vectors.set(key, value, &numbers, metadata);
    }
    Ok(())
}
