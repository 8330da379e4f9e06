//! A persistent, ordered Merkle map from keys to values: the state of a session.
//!
//! A map is named by its [`StateRoot`]; the empty map has none (`None`). Edits return a new root
//! and leave the old one readable for ever, because chunks are content-addressed and never
//! changed. The tree is a Merkle search tree: the height of a key is decided by its hash alone
//! (one level for each leading zero nibble, so nodes hold about sixteen entries), a node holds a
//! run of keys of one height, and the subtrees between them hold the lower keys.
//!
//! Guarantees:
//! - *History independence.* The root is a function of the contents, whatever edits led there.
//! - An edit reads and writes one path (two where a node splits or merges): O(log n) chunks.
//! - [`diff`] reads nodes in proportion to the difference, [`scan`] to what it returns.
//! - Chunks are data from elsewhere. Each is checked against its hash and decoded strictly (one
//!   encoding for each node); a bad one is an [`Error`], never a panic.
//!
//! It does not do: collection of unreachable chunks, locking, or any I/O of its own (see
//! [`Chunks`]). It does not check the heights of the keys of a tree it is given: a tree that
//! somebody forged with valid hashes is searched wrongly, yet without harm to others.
//!
//! The encoding of a node is written down in `node.rs`; it is frozen.

pub mod keys;

mod edit;
mod node;
#[cfg(test)]
mod tests;
mod walk;

pub use node::{References, references};
pub use walk::{Change, Diff, Scan, diff, scan};

use crate::hash::{ContentHash, FrameHasher, StateRoot};
use node::Loaded;
use std::collections::HashMap;
use std::convert::Infallible;

/// Longest key, in bytes: a user's key of 1024 bytes behind the frame of [`keys`].
pub const KEY_BYTES_MAX: usize = 1536;
/// Longest value that is kept inside its node, in bytes. Longer ones are chunks of their own, so
/// that a neighbour's edit does not write them again.
pub const INLINE_BYTES_MAX: usize = 256;
/// Largest node, in bytes. Sixteen entries of the largest kind take 28 KiB, and the chance of a
/// node of over a hundred times the average is below 1e-43: only keys made for it (by trying many)
/// fill a node this far, and then the edit is refused.
pub const NODE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Where chunks are kept. Implementations need not verify anything: the tree does.
pub trait Chunks {
    /// What can go wrong in the store.
    type Error: std::error::Error + Send + Sync + 'static;

    /// The bytes stored under `hash`, if they are there.
    fn get(&self, hash: &ContentHash) -> Result<Option<Vec<u8>>, Self::Error>;

    /// Stores `bytes` under `hash`, which is their SHA-256. Storing the same again changes nothing.
    fn put(&mut self, hash: ContentHash, bytes: &[u8]) -> Result<(), Self::Error>;
}

/// What a key maps to. Two values are equal exactly when their bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// At most [`INLINE_BYTES_MAX`] bytes, kept in the node.
    Inline(Vec<u8>),
    /// A longer value, kept as one chunk.
    Chunk {
        /// SHA-256 of the value.
        hash: ContentHash,
        /// Its length, in bytes.
        len: u64,
    },
}

impl Value {
    /// The length of the value, in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Inline(bytes) => bytes.len() as u64,
            Self::Chunk { len, .. } => *len,
        }
    }

    /// Whether the value has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// SHA-256 of the value.
    pub fn hash(&self) -> ContentHash {
        match self {
            Self::Inline(bytes) => ContentHash::of(bytes),
            Self::Chunk { hash, .. } => *hash,
        }
    }
}

/// Why an operation on a tree failed. `E` is the error of the chunk store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error<E: std::error::Error + 'static> {
    /// The chunk store failed.
    #[error("the chunk store failed")]
    Chunks(#[source] E),
    /// A chunk that the tree refers to is not in the store.
    #[error("chunk {0} is missing from this store")]
    Missing(ContentHash),
    /// A chunk is not what its hash says, or not a node of this format.
    #[error("chunk {hash} is damaged: {reason}")]
    Corrupt {
        /// The hash it was asked for by.
        hash: ContentHash,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The key is longer than [`KEY_BYTES_MAX`].
    #[error("key has {0} bytes: at most {KEY_BYTES_MAX} are allowed")]
    KeyTooLong(usize),
    /// The edit would make a node larger than [`NODE_BYTES_MAX`].
    #[error("too many keys that hash alike: the tree cannot hold this one beside them")]
    Crowded,
}

/// The value of `key`, or `None` where there is none. Large values are not read.
pub fn find<C: Chunks>(
    chunks: &C,
    root: Option<StateRoot>,
    key: &[u8],
) -> Result<Option<Value>, Error<C::Error>> {
    let mut at = node::load_root(chunks, root)?;
    while let Some(Loaded { node, .. }) = at {
        match node.position(key) {
            Ok(index) => return Ok(node.entries.into_iter().nth(index).map(|entry| entry.value)),
            Err(index) => at = node::load(chunks, node.children[index])?,
        }
    }
    Ok(None)
}

/// The bytes of `key`'s value, or `None` where there is none.
pub fn get<C: Chunks>(
    chunks: &C,
    root: Option<StateRoot>,
    key: &[u8],
) -> Result<Option<Vec<u8>>, Error<C::Error>> {
    match find(chunks, root, key)? {
        Some(value) => Ok(Some(read(chunks, value)?)),
        None => Ok(None),
    }
}

/// The bytes of a value, checked against its hash.
pub fn read<C: Chunks>(chunks: &C, value: Value) -> Result<Vec<u8>, Error<C::Error>> {
    match value {
        Value::Inline(bytes) => Ok(bytes),
        Value::Chunk { hash, len } => {
            let bytes = node::fetch(chunks, &hash)?;
            if bytes.len() as u64 != len {
                return Err(Error::Corrupt {
                    hash,
                    reason: "its length is not the stated one",
                });
            }
            Ok(bytes)
        }
    }
}

/// Maps `key` to `value` and returns the new root. Where it did already, that is the old root.
pub fn put<C: Chunks>(
    chunks: &mut C,
    root: Option<StateRoot>,
    key: &[u8],
    value: &[u8],
) -> Result<StateRoot, Error<C::Error>> {
    if key.len() > KEY_BYTES_MAX {
        return Err(Error::KeyTooLong(key.len()));
    }
    let value = if value.len() <= INLINE_BYTES_MAX {
        Value::Inline(value.to_vec())
    } else {
        let hash = ContentHash::of(value);
        chunks.put(hash, value).map_err(Error::Chunks)?;
        Value::Chunk {
            hash,
            len: value.len() as u64,
        }
    };
    let top = node::load_root(chunks, root)?;
    let link = edit::insert(chunks, top, key, level_of(key), value)?;
    Ok(StateRoot::from_bytes(*link.hash.as_bytes()))
}

/// Removes `key` and returns the new root. Where it was not there, that is the old root.
pub fn delete<C: Chunks>(
    chunks: &mut C,
    root: Option<StateRoot>,
    key: &[u8],
) -> Result<Option<StateRoot>, Error<C::Error>> {
    let Some(top) = node::load_root(chunks, root)? else {
        return Ok(None);
    };
    let link = edit::remove(chunks, top, key, level_of(key))?;
    Ok(link.map(|link| StateRoot::from_bytes(*link.hash.as_bytes())))
}

/// The number of keys. Reads one node.
pub fn count<C: Chunks>(chunks: &C, root: Option<StateRoot>) -> Result<u64, Error<C::Error>> {
    Ok(node::load_root(chunks, root)?.map_or(0, |top| top.link.count))
}

/// The height of a key in the tree: the number of leading zero nibbles of its hash. Frozen.
fn level_of(key: &[u8]) -> u8 {
    let mut hasher = FrameHasher::new("vlinder.merkle.level.v1");
    hasher.frame(key);
    let digest = hasher.finish();
    let mut level = 0;
    for byte in digest {
        if byte == 0 {
            level += 2;
            continue;
        }
        return if byte < 0x10 { level + 1 } else { level };
    }
    level
}

/// Chunks in memory, for tests and for stores that need not last.
#[derive(Debug, Clone, Default)]
pub struct MemoryChunks {
    chunks: HashMap<ContentHash, Vec<u8>>,
}

impl MemoryChunks {
    /// How many chunks there are.
    pub fn len(&self) -> usize {
        self.chunks.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }
}

impl Chunks for MemoryChunks {
    type Error = Infallible;

    fn get(&self, hash: &ContentHash) -> Result<Option<Vec<u8>>, Infallible> {
        Ok(self.chunks.get(hash).cloned())
    }

    fn put(&mut self, hash: ContentHash, bytes: &[u8]) -> Result<(), Infallible> {
        self.chunks.entry(hash).or_insert_with(|| bytes.to_vec());
        Ok(())
    }
}
