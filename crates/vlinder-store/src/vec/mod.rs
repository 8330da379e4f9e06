//! Vectors by key (interfaces.md §5): store, search, delete.
//!
//! Vectors lie in the same tree as everything else of a session, one value each, so they are
//! versioned like the rest. The first vector fixes the dimension of its store; with the last one
//! the dimension goes too, so that an emptied store leaves no trace in the state. Search is exact
//! (Euclidean distance), however many there are: what stands in for an index are codes of the vectors
//! with proven errors, cached by state, which rule out most of them without reading them
//! (docs/vectors.md).

mod cache;
mod codes;
mod filter;
mod search;

pub use cache::Cache;
pub(crate) use search::search;

use crate::call::{Answer, Call, Failure, Refusal, parse};
use serde::Deserialize;
use vlinder_core::ContentHash;
use vlinder_core::merkle::keys::{self, Space, USER_KEY_BYTES_MAX};
use vlinder_core::merkle::{self, Chunks};

/// Highest dimension of a vector. The largest embedding models have some ten thousand.
pub const DIMENSION_MAX: usize = 65_536;
/// Largest metadata of one vector, as JSON, in bytes. Larger things belong into kv.
pub const METADATA_BYTES_MAX: usize = 64 * 1024;
/// Most results of one search.
pub const RESULTS_MAX: usize = 1000;
/// Results of a search that names no limit.
const RESULTS_DEFAULT: usize = 10;

/// The key of the dimension, among what a store knows of itself.
const DIMENSION: &[u8] = b"dimension";
/// Version of the encoding of a stored vector.
const VERSION: u8 = 1;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Store {
    key: String,
    vector: Vec<f32>,
    #[serde(default)]
    metadata: serde_json::Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Delete {
    key: String,
}

type Outcome<C> = Result<Answer, Failure<<C as Chunks>::Error>>;

pub(crate) fn store<C: Chunks>(chunks: &mut C, call: &Call) -> Outcome<C> {
    let Store {
        key,
        vector,
        metadata,
    } = parse(call)?;
    let key = tree_key(call, &key)?;
    check_vector(&vector)?;
    let metadata = serde_json::to_vec(&metadata).expect("a JSON value has a JSON form");
    if metadata.len() > METADATA_BYTES_MAX {
        let message = format!(
            "metadata has {} bytes: at most {METADATA_BYTES_MAX} are kept",
            metadata.len()
        );
        return Err(Refusal::too_large(message).into());
    }
    let mut state = call.state;
    match dimension(chunks, call)? {
        Some(dimension) => check_dimension(&vector, dimension)?,
        None => {
            let dimension = (vector.len() as u32).to_be_bytes();
            state = Some(merkle::put(
                chunks,
                state,
                &dimension_key(call),
                &dimension,
            )?);
        }
    }
    let state = merkle::put(chunks, state, &key, &encode(&vector, &metadata))?;
    Ok(Answer::moved(call, Some(state)))
}

pub(crate) fn delete<C: Chunks>(chunks: &mut C, call: &Call) -> Outcome<C> {
    let Delete { key } = parse(call)?;
    let key = tree_key(call, &key)?;
    let mut state = merkle::delete(chunks, call.state, &key)?;
    let prefix = keys::prefix(Space::Vec, call.store);
    let is_empty = merkle::scan(chunks, state, &prefix)?
        .next()
        .transpose()?
        .is_none();
    if is_empty {
        state = merkle::delete(chunks, state, &dimension_key(call))?;
    }
    Ok(Answer::moved(call, state))
}

fn tree_key(call: &Call, key: &str) -> Result<Vec<u8>, Refusal> {
    if key.is_empty() || key.len() > USER_KEY_BYTES_MAX || key.chars().any(char::is_control) {
        let message =
            format!("key must have 1 to {USER_KEY_BYTES_MAX} bytes and no control characters");
        return Err(Refusal::new("bad_key", message));
    }
    Ok(keys::key(Space::Vec, call.store, key.as_bytes()))
}

fn check_vector(vector: &[f32]) -> Result<(), Refusal> {
    if vector.is_empty() || vector.len() > DIMENSION_MAX {
        let message = format!(
            "vector has {} numbers: expected 1 to {DIMENSION_MAX}",
            vector.len()
        );
        return Err(Refusal::new("bad_vector", message));
    }
    if !vector.iter().all(|number| number.is_finite()) {
        return Err(Refusal::new(
            "bad_vector",
            "vector has a number that no 32-bit float can hold",
        ));
    }
    Ok(())
}

fn check_dimension(vector: &[f32], dimension: usize) -> Result<(), Refusal> {
    if vector.len() == dimension {
        return Ok(());
    }
    let message = format!(
        "vector has {} numbers, but the first vector of this store had {dimension}",
        vector.len()
    );
    Err(Refusal::new("dimension_mismatch", message))
}

fn dimension_key(call: &Call) -> Vec<u8> {
    keys::key(Space::VecMeta, call.store, DIMENSION)
}

/// The dimension of the store; `None` while it is empty.
fn dimension<C: Chunks>(chunks: &C, call: &Call) -> Result<Option<usize>, merkle::Error<C::Error>> {
    let Some(value) = merkle::find(chunks, call.state, &dimension_key(call))? else {
        return Ok(None);
    };
    let hash = value.hash();
    let bytes = merkle::read(chunks, value)?;
    match <[u8; 4]>::try_from(bytes.as_slice()) {
        Ok(bytes) => Ok(Some(u32::from_be_bytes(bytes) as usize)),
        Err(_) => Err(merkle::Error::Corrupt {
            hash,
            reason: "it is not a dimension",
        }),
    }
}

/// A stored vector: version, dimension (32 bits, big-endian), the numbers as 32-bit little-endian
/// floats, then the metadata as JSON. Frozen: the bytes decide state roots.
fn encode(vector: &[f32], metadata: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(5 + vector.len() * 4 + metadata.len());
    bytes.push(VERSION);
    bytes.extend((vector.len() as u32).to_be_bytes());
    bytes.extend(vector.iter().flat_map(|number| number.to_le_bytes()));
    bytes.extend(metadata);
    bytes
}

/// Reads the numbers of a stored vector of the given dimension into `numbers` and returns its
/// metadata; `None` for anything else.
fn decode<'a>(bytes: &'a [u8], dimension: usize, numbers: &mut Vec<f32>) -> Option<&'a [u8]> {
    let (&[version, a, b, c, d], rest) = bytes.split_first_chunk()?;
    if version != VERSION || u32::from_be_bytes([a, b, c, d]) as usize != dimension {
        return None;
    }
    let (raw, metadata) = rest.split_at_checked(dimension.checked_mul(4)?)?;
    numbers.clear();
    numbers.extend(
        raw.as_chunks()
            .0
            .iter()
            .map(|number| f32::from_le_bytes(*number)),
    );
    Some(metadata)
}

/// The user's key of a key of the tree.
fn user_key<'a>(key: &'a [u8], prefix: &[u8]) -> Option<&'a str> {
    std::str::from_utf8(key.strip_prefix(prefix)?).ok()
}

fn not_a_vector<E: std::error::Error>(hash: ContentHash) -> merkle::Error<E> {
    merkle::Error::Corrupt {
        hash,
        reason: "it is not a stored vector",
    }
}
