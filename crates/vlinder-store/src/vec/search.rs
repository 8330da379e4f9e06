//! Search: the nearest vectors that a filter wants, exactly.
//!
//! The first search of a state reads every vector from the tree, measures it, and keeps its codes. Later
//! ones look at the codes, which tell of most vectors that they cannot be among the nearest, and read
//! and measure only the others (see `codes`). Both give the same answer.

use super::cache::{Cache, Vectors};
use super::codes::Query;
use super::filter::Filter;
use super::{
    Outcome, RESULTS_DEFAULT, RESULTS_MAX, check_dimension, check_vector, decode, dimension,
    not_a_vector, user_key,
};
use crate::call::{Answer, Call, Refusal, parse};
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;
use std::collections::BinaryHeap;
use vlinder_core::StateRoot;
use vlinder_core::merkle::keys::{self, Space};
use vlinder_core::merkle::{self, Chunks};

/// Numbers that are summed side by side, so that the compiler can use vector instructions.
const LANES: usize = 8;
/// By how much a bound must exceed a measured distance to rule a vector out: far more than the
/// rounding of 64 bits.
const SLACK: f64 = 1e-9;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Search {
    vector: Vec<f32>,
    limit: Option<usize>,
    filter: Option<serde_json::Value>,
}

#[derive(Serialize)]
struct Found {
    key: String,
    distance: f64,
    metadata: serde_json::Value,
}

/// What is searched for.
struct Wanted {
    vector: Vec<f32>,
    limit: usize,
    filter: Option<Filter>,
}

impl Wanted {
    fn new(call: &Call) -> Result<Self, Refusal> {
        let Search {
            vector,
            limit,
            filter,
        } = parse(call)?;
        check_vector(&vector)?;
        let limit = limit.unwrap_or(RESULTS_DEFAULT);
        if !(1..=RESULTS_MAX).contains(&limit) {
            let message = format!("limit is {limit}: expected 1 to {RESULTS_MAX}");
            return Err(Refusal::new("bad_limit", message));
        }
        let filter = filter.as_ref().map(Filter::parse).transpose();
        let filter = filter.map_err(|problem| Refusal::new("bad_filter", problem))?;
        Ok(Self {
            vector,
            limit,
            filter,
        })
    }

    fn wants(&self, metadata: &[u8]) -> bool {
        let filter = self.filter.as_ref();
        filter.is_none_or(|filter| filter.wants(metadata))
    }
}

type Tree<T, C> = Result<T, merkle::Error<<C as Chunks>::Error>>;

pub(crate) fn search<C: Chunks>(chunks: &C, call: &Call, cache: &mut Cache) -> Outcome<C> {
    let wanted = Wanted::new(call)?;
    let (Some(state), Some(dimension)) = (call.state, dimension(chunks, call)?) else {
        return Ok(Answer::json(call, &[(); 0]));
    };
    check_dimension(&wanted.vector, dimension)?;
    let prefix = keys::prefix(Space::Vec, call.store);
    let nearest = match cache.get(chunks, state, &prefix, dimension)? {
        Some(vectors) => by_codes(chunks, vectors, &wanted)?,
        None => by_reading(chunks, state, prefix, dimension, &wanted, cache)?,
    };
    Ok(Answer::json(call, &nearest.found()))
}

/// Reads and measures every vector; keeps the codes for the next search unless there is too much of it.
fn by_reading<'a, C: Chunks>(
    chunks: &C,
    state: StateRoot,
    prefix: Vec<u8>,
    dimension: usize,
    wanted: &'a Wanted,
    cache: &mut Cache,
) -> Tree<Nearest<'a>, C> {
    let mut nearest = Nearest::new(&wanted.vector, wanted.limit);
    let mut kept = Some(Vectors::new(dimension));
    let mut numbers = Vec::with_capacity(dimension);
    for entry in merkle::scan(chunks, Some(state), &prefix)? {
        let (key, value) = entry?;
        let hash = value.hash();
        let bytes = merkle::read(chunks, value.clone())?;
        let metadata = decode(&bytes, dimension, &mut numbers);
        let (Some(key), Some(metadata)) = (user_key(&key, &prefix), metadata) else {
            return Err(not_a_vector(hash));
        };
        if wanted.wants(metadata) {
            nearest.offer(key, &numbers, metadata);
        }
        kept = kept.filter(Vectors::may_be_kept);
        if let Some(vectors) = &mut kept {
            vectors.set(key, value, &numbers, metadata);
            cache.make_room(vectors.bytes());
        }
    }
    if let Some(vectors) = kept.filter(Vectors::may_be_kept) {
        cache.keep(state, prefix, vectors);
    }
    Ok(nearest)
}

/// Looks at the codes, then reads and measures those that may be among the nearest, the likeliest
/// first, until no other can be.
fn by_codes<'a, C: Chunks>(
    chunks: &C,
    vectors: &Vectors,
    wanted: &'a Wanted,
) -> Tree<Nearest<'a>, C> {
    let mut nearest = Nearest::new(&wanted.vector, wanted.limit);
    let mut numbers = Vec::with_capacity(wanted.vector.len());
    for (lower, at) in candidates(chunks, vectors, wanted)? {
        if nearest
            .farthest()
            .is_some_and(|distance| lower > distance * (1.0 + SLACK))
        {
            break;
        }
        let slot = vectors.slot(at);
        let bytes = merkle::read(chunks, slot.value.clone())?;
        let metadata = decode(&bytes, wanted.vector.len(), &mut numbers);
        let metadata = metadata.ok_or_else(|| not_a_vector(slot.value.hash()))?;
        nearest.offer(&slot.key, &numbers, metadata);
    }
    Ok(nearest)
}

/// Which of the wanted vectors may be among the nearest, by their codes: the least distance that each
/// can have, and its place; nearest first.
fn candidates<C: Chunks>(
    chunks: &C,
    vectors: &Vectors,
    wanted: &Wanted,
) -> Tree<Vec<(f64, usize)>, C> {
    let query = Query::new(&wanted.vector);
    // At least `limit` wanted vectors are not farther than the top.
    let mut uppers: BinaryHeap<Distance> = BinaryHeap::with_capacity(wanted.limit + 1);
    let mut candidates = Vec::new();
    let mut within = f64::INFINITY;
    for (at, bounds) in vectors.bounds(&query).enumerate() {
        if bounds.lower > within || !is_wanted(chunks, vectors, wanted, at)? {
            continue;
        }
        candidates.push((bounds.lower, at));
        uppers.push(Distance(bounds.upper));
        if uppers.len() > wanted.limit {
            uppers.pop();
        }
        if uppers.len() == wanted.limit {
            within = uppers.peek().map_or(within, |upper| upper.0);
        }
    }
    candidates.retain(|(lower, _)| *lower <= within);
    candidates.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    Ok(candidates)
}

fn is_wanted<C: Chunks>(
    chunks: &C,
    vectors: &Vectors,
    wanted: &Wanted,
    at: usize,
) -> Tree<bool, C> {
    if wanted.filter.is_none() {
        return Ok(true);
    }
    let slot = vectors.slot(at);
    if let Some(metadata) = &slot.metadata {
        return Ok(wanted.wants(metadata));
    }
    let bytes = merkle::read(chunks, slot.value.clone())?;
    let metadata = decode(&bytes, wanted.vector.len(), &mut Vec::new());
    let metadata = metadata.ok_or_else(|| not_a_vector(slot.value.hash()))?;
    Ok(wanted.wants(metadata))
}

/// A distance, which is never NaN, in order.
#[derive(PartialEq)]
struct Distance(f64);

impl Eq for Distance {}

impl Ord for Distance {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl PartialOrd for Distance {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The nearest vectors so far.
struct Nearest<'a> {
    to: &'a [f32],
    limit: usize,
    /// The farthest on top, to be replaced first.
    hits: BinaryHeap<Hit>,
}

/// Sorted by distance, then key, so that equal distances have one order.
struct Hit {
    squared: f64,
    key: String,
    metadata: Vec<u8>,
}

impl<'a> Nearest<'a> {
    fn new(to: &'a [f32], limit: usize) -> Self {
        Self {
            to,
            limit,
            hits: BinaryHeap::with_capacity(limit + 1),
        }
    }

    /// The distance beyond which nothing is taken any more, once there are enough.
    fn farthest(&self) -> Option<f64> {
        let farthest = self.hits.peek().filter(|_| self.hits.len() == self.limit);
        farthest.map(|hit| hit.squared.sqrt())
    }

    fn offer(&mut self, key: &str, numbers: &[f32], metadata: &[u8]) {
        let squared = squared_distance(self.to, numbers);
        let is_full = self.hits.len() == self.limit;
        let farthest = self.hits.peek().filter(|_| is_full);
        let is_nearer = farthest.is_none_or(|hit| {
            squared
                .total_cmp(&hit.squared)
                .then_with(|| key.cmp(&hit.key))
                .is_lt()
        });
        if !is_nearer {
            return;
        }
        if is_full {
            self.hits.pop();
        }
        self.hits.push(Hit {
            squared,
            key: key.to_owned(),
            metadata: metadata.to_vec(),
        });
    }

    /// The hits as they are shown, nearest first.
    fn found(self) -> Vec<Found> {
        let shown = |hit: Hit| Found {
            key: hit.key,
            distance: hit.squared.sqrt(),
            // Whatever `store` wrote is JSON. A forged tree may hold something else: shown as text.
            metadata: serde_json::from_slice(&hit.metadata)
                .unwrap_or_else(|_| String::from_utf8_lossy(&hit.metadata).into()),
        };
        self.hits.into_sorted_vec().into_iter().map(shown).collect()
    }
}

/// The square of the Euclidean distance, summed with 64 bits: exact enough that the order is that
/// of the true distances but for differences in the fifteenth digit.
pub(super) fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |a: f32, b: f32| {
        let difference = f64::from(a) - f64::from(b);
        difference * difference
    };
    let (a_lanes, a_rest) = a.as_chunks::<LANES>();
    let (b_lanes, b_rest) = b.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for (a, b) in a_lanes.iter().zip(b_lanes) {
        for lane in 0..LANES {
            sums[lane] += square(a[lane], b[lane]);
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| square(*a, *b)).sum();
    sums.iter().sum::<f64>() + rest
}

impl Ord for Hit {
    fn cmp(&self, other: &Self) -> Ordering {
        self.squared
            .total_cmp(&other.squared)
            .then_with(|| self.key.cmp(&other.key))
    }
}

impl PartialOrd for Hit {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Hit {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Hit {}
