//! Exact search: measure every vector, keep the nearest.

use super::cache::{Cache, Vectors};
use super::{
    Outcome, RESULTS_DEFAULT, RESULTS_MAX, check_dimension, check_vector, decode, dimension,
    not_a_vector, user_key,
};
use crate::call::{Answer, Call, Refusal, parse};
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;
use std::collections::BinaryHeap;
use vlinder_core::merkle::keys::{self, Space};
use vlinder_core::merkle::{self, Chunks};

/// Numbers that are summed side by side, so that the compiler can use vector instructions.
const LANES: usize = 8;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Search {
    vector: Vec<f32>,
    limit: Option<usize>,
}

#[derive(Serialize)]
struct Found {
    key: String,
    distance: f64,
    metadata: serde_json::Value,
}

pub(crate) fn search<C: Chunks>(chunks: &C, call: &Call, cache: &mut Cache) -> Outcome<C> {
    let Search { vector, limit } = parse(call)?;
    check_vector(&vector)?;
    let limit = limit.unwrap_or(RESULTS_DEFAULT);
    if !(1..=RESULTS_MAX).contains(&limit) {
        let message = format!("limit is {limit}: expected 1 to {RESULTS_MAX}");
        return Err(Refusal::new("bad_limit", message).into());
    }
    let (Some(state), Some(dimension)) = (call.state, dimension(chunks, call)?) else {
        return Ok(Answer::json(call, &[(); 0]));
    };
    check_dimension(&vector, dimension)?;

    let prefix = keys::prefix(Space::Vec, call.store);
    let mut nearest = Nearest::new(&vector, limit);
    if let Some(vectors) = cache.get(chunks, state, &prefix, dimension)? {
        for (key, numbers, metadata) in vectors.iter() {
            nearest.offer(key, numbers, metadata);
        }
        return Ok(Answer::json(call, &nearest.found()));
    }

    // Read from the tree, and kept for the next search unless there is too much of it.
    let mut kept = Some(Vectors::new(dimension));
    let mut numbers = Vec::with_capacity(dimension);
    for entry in merkle::scan(chunks, Some(state), &prefix)? {
        let (key, value) = entry?;
        let hash = value.hash();
        let bytes = merkle::read(chunks, value)?;
        let metadata = decode(&bytes, dimension, &mut numbers);
        let (Some(key), Some(metadata)) = (user_key(&key, &prefix), metadata) else {
            return Err(not_a_vector(hash).into());
        };
        nearest.offer(key, &numbers, metadata);
        kept = kept.filter(Vectors::may_be_kept);
        if let Some(vectors) = &mut kept {
            vectors.set(key, &numbers, metadata);
        }
    }
    if let Some(vectors) = kept {
        cache.keep(state, prefix, vectors);
    }
    Ok(Answer::json(call, &nearest.found()))
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
fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
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
