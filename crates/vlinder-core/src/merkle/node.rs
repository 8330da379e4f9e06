//! A node of the tree and its encoding, version 1. Numbers are big-endian.
//!
//! ```text
//! node   = version:u8(1) level:u8 entries:u32(≥ 1) entry* children
//! entry  = shared:u16 rest:u16 key[rest] value        key = first `shared` bytes of the key before it, then `rest` more
//! value  = 0 len:u16(≤ 256) bytes | 1 len:u64(> 256) sha256[32]
//! children (level > 0 only, one more than entries) = 0 | 1 level:u8 keys:u64(≥ 1) sha256[32]
//! ```
//!
//! Keys rise strictly and `shared` is as long as it can be, children are lower than their node:
//! each node has exactly one encoding, and [`Node::decode`] accepts no other.

use super::{Chunks, Error, INLINE_BYTES_MAX, KEY_BYTES_MAX, NODE_BYTES_MAX, Value};
use crate::hash::{ContentHash, StateRoot};

const VERSION: u8 = 1;
/// The highest level: a SHA-256 value has 64 nibbles.
const LEVEL_MAX: u8 = 64;
/// The shortest entry: two lengths, a tag, a length. Bounds what a claimed count may reserve.
const ENTRY_BYTES_MIN: usize = 7;

/// A key and its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) key: Vec<u8>,
    pub(super) value: Value,
}

/// A reference to a node: its hash, and what a parent knows of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) hash: ContentHash,
    pub(super) level: u8,
    /// How many keys the node and all below it hold.
    pub(super) count: u64,
}

/// A node: a run of keys of one level, and the subtrees of lower keys around them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) level: u8,
    pub(super) entries: Vec<Entry>,
    /// Always one more than entries; `children[i]` is before `entries[i]`. All `None` at level 0.
    pub(super) children: Vec<Option<Link>>,
}

/// A node that was read, with the link to it.
pub(super) struct Loaded {
    pub(super) link: Link,
    pub(super) node: Node,
}

impl Node {
    /// Where `key` is, or the index of the child (and of the entry after it) where it belongs.
    pub(super) fn position(&self, key: &[u8]) -> Result<usize, usize> {
        self.entries
            .binary_search_by(|entry| entry.key.as_slice().cmp(key))
    }

    /// How many keys the node and all below it hold; `None` if the stated counts overflow.
    fn count(&self) -> Option<u64> {
        let own = self.entries.len() as u64;
        self.children
            .iter()
            .flatten()
            .try_fold(own, |sum, child| sum.checked_add(child.count))
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION, self.level];
        out.extend((self.entries.len() as u32).to_be_bytes());
        let mut before: &[u8] = &[];
        for entry in &self.entries {
            let shared = shared_len(before, &entry.key);
            let rest = &entry.key[shared..];
            out.extend((shared as u16).to_be_bytes());
            out.extend((rest.len() as u16).to_be_bytes());
            out.extend(rest);
            match &entry.value {
                Value::Inline(bytes) => {
                    out.push(0);
                    out.extend((bytes.len() as u16).to_be_bytes());
                    out.extend(bytes);
                }
                Value::Chunk { hash, len } => {
                    out.push(1);
                    out.extend(len.to_be_bytes());
                    out.extend(hash.as_bytes());
                }
            }
            before = &entry.key;
        }
        if self.level == 0 {
            return out;
        }
        for child in &self.children {
            let Some(link) = child else {
                out.push(0);
                continue;
            };
            out.extend([1, link.level]);
            out.extend(link.count.to_be_bytes());
            out.extend(link.hash.as_bytes());
        }
        out
    }

    /// Reads a node; the error says what is wrong with the bytes.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let mut reader = Reader(bytes);
        if reader.u8()? != VERSION {
            return Err("it is not a node of a version that this release knows");
        }
        let level = reader.u8()?;
        if level > LEVEL_MAX {
            return Err("its level is too high");
        }
        let count = reader.u32()? as usize;
        if count == 0 || count > bytes.len() / ENTRY_BYTES_MIN {
            return Err("its number of entries is impossible");
        }
        let mut entries: Vec<Entry> = Vec::with_capacity(count);
        for index in 0..count {
            let before = entries.last().map_or(&[][..], |entry| &entry.key);
            let key = reader.key(before, index == 0)?;
            let value = reader.value()?;
            entries.push(Entry { key, value });
        }
        let mut children = vec![None; count + 1];
        if level > 0 {
            for child in &mut children {
                *child = reader.child(level)?;
            }
        }
        if !reader.0.is_empty() {
            return Err("it has bytes after its end");
        }
        Ok(Self {
            level,
            entries,
            children,
        })
    }
}

/// How many bytes `a` and `b` have in common at their beginning.
fn shared_len(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

/// What a node refers to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct References {
    /// The nodes below it.
    pub nodes: Vec<ContentHash>,
    /// The values that are chunks of their own, with their length in bytes.
    pub values: Vec<(ContentHash, u64)>,
}

/// What the node in `bytes` refers to, for those who copy a tree from one place to another. The
/// error says why it is no node.
pub fn references(bytes: &[u8]) -> Result<References, &'static str> {
    let node = Node::decode(bytes)?;
    let values = node.entries.iter().filter_map(|entry| match entry.value {
        Value::Chunk { hash, len } => Some((hash, len)),
        Value::Inline(_) => None,
    });
    Ok(References {
        values: values.collect(),
        nodes: node
            .children
            .iter()
            .flatten()
            .map(|link| link.hash)
            .collect(),
    })
}

/// What is left of the bytes of a chunk.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], &'static str> {
        let (head, tail) = self.0.split_at_checked(len).ok_or("it ends too early")?;
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], &'static str> {
        let (head, tail) = self.0.split_first_chunk().ok_or("it ends too early")?;
        self.0 = tail;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8, &'static str> {
        Ok(self.array::<1>()?[0])
    }

    fn u16(&mut self) -> Result<usize, &'static str> {
        Ok(u16::from_be_bytes(self.array()?).into())
    }

    fn u32(&mut self) -> Result<u32, &'static str> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, &'static str> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    fn key(&mut self, before: &[u8], first: bool) -> Result<Vec<u8>, &'static str> {
        let shared = self.u16()?;
        let rest_len = self.u16()?;
        let rest = self.take(rest_len)?;
        let start = before
            .get(..shared)
            .ok_or("a key shares more than there is")?;
        if shared + rest.len() > KEY_BYTES_MAX {
            return Err("a key is too long");
        }
        let key = [start, rest].concat();
        if shared_len(before, &key) != shared {
            return Err("a key is not encoded as it should be");
        }
        if !first && key.as_slice() <= before {
            return Err("its keys do not rise");
        }
        Ok(key)
    }

    fn value(&mut self) -> Result<Value, &'static str> {
        match self.u8()? {
            0 => {
                let len = self.u16()?;
                if len > INLINE_BYTES_MAX {
                    return Err("an inline value is too long");
                }
                Ok(Value::Inline(self.take(len)?.to_vec()))
            }
            1 => {
                let len = self.u64()?;
                if len <= INLINE_BYTES_MAX as u64 {
                    return Err("a short value is not inline");
                }
                Ok(Value::Chunk {
                    hash: ContentHash::from_bytes(self.array()?),
                    len,
                })
            }
            _ => Err("a value is of an unknown kind"),
        }
    }

    fn child(&mut self, parent_level: u8) -> Result<Option<Link>, &'static str> {
        match self.u8()? {
            0 => Ok(None),
            1 => {
                let level = self.u8()?;
                let count = self.u64()?;
                if level >= parent_level || count == 0 {
                    return Err("a child does not fit below it");
                }
                Ok(Some(Link {
                    hash: ContentHash::from_bytes(self.array()?),
                    level,
                    count,
                }))
            }
            _ => Err("a child is of an unknown kind"),
        }
    }
}

/// The bytes under `hash`, verified.
pub(super) fn fetch<C: Chunks>(chunks: &C, hash: &ContentHash) -> Result<Vec<u8>, Error<C::Error>> {
    let bytes = chunks
        .get(hash)
        .map_err(Error::Chunks)?
        .ok_or(Error::Missing(*hash))?;
    if ContentHash::of(&bytes) != *hash {
        return Err(Error::Corrupt {
            hash: *hash,
            reason: "its content has another hash",
        });
    }
    Ok(bytes)
}

fn load_any<C: Chunks>(chunks: &C, hash: ContentHash) -> Result<Loaded, Error<C::Error>> {
    let bytes = fetch(chunks, &hash)?;
    let corrupt = |reason| Error::Corrupt { hash, reason };
    let node = Node::decode(&bytes).map_err(corrupt)?;
    let count = node
        .count()
        .ok_or_else(|| corrupt("its counts are impossible"))?;
    Ok(Loaded {
        link: Link {
            hash,
            level: node.level,
            count,
        },
        node,
    })
}

/// The topmost node, or `None` for the empty tree.
pub(super) fn load_root<C: Chunks>(
    chunks: &C,
    root: Option<StateRoot>,
) -> Result<Option<Loaded>, Error<C::Error>> {
    let hash = root.map(|root| ContentHash::from_bytes(*root.as_bytes()));
    hash.map(|hash| load_any(chunks, hash)).transpose()
}

/// The node that `link` refers to, which must be as its parent describes it.
pub(super) fn load<C: Chunks>(
    chunks: &C,
    link: Option<Link>,
) -> Result<Option<Loaded>, Error<C::Error>> {
    let Some(link) = link else { return Ok(None) };
    let loaded = load_any(chunks, link.hash)?;
    if loaded.link != link {
        return Err(Error::Corrupt {
            hash: link.hash,
            reason: "it is not as its parent says",
        });
    }
    Ok(Some(loaded))
}

/// Stores a node, which has at least one entry.
pub(super) fn store<C: Chunks>(chunks: &mut C, node: &Node) -> Result<Link, Error<C::Error>> {
    debug_assert!(!node.entries.is_empty() && node.children.len() == node.entries.len() + 1);
    let bytes = node.encode();
    if bytes.len() > NODE_BYTES_MAX {
        return Err(Error::Crowded);
    }
    let hash = ContentHash::of(&bytes);
    let count = node.count().ok_or(Error::Corrupt {
        hash,
        reason: "its counts are impossible",
    })?;
    chunks.put(hash, &bytes).map_err(Error::Chunks)?;
    Ok(Link {
        hash,
        level: node.level,
        count,
    })
}
