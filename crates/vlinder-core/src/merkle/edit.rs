//! Insertion and removal. A key that rises above its surroundings splits the subtrees below it;
//! one that goes lets them grow together again. Both leave exactly the tree that the contents
//! demand.

use super::node::{self, Entry, Link, Loaded, Node};
use super::{Chunks, Error, Value};

/// The tree with `key` in it. Nodes that do not change are not written.
pub(super) fn insert<C: Chunks>(
    chunks: &mut C,
    at: Option<Loaded>,
    key: &[u8],
    key_level: u8,
    value: Value,
) -> Result<Link, Error<C::Error>> {
    let Loaded { link, mut node } = match at {
        Some(at) if at.link.level >= key_level => at,
        below => {
            let (left, right) = split(chunks, below, key)?;
            let entries = vec![Entry {
                key: key.to_vec(),
                value,
            }];
            let top = Node {
                level: key_level,
                entries,
                children: vec![left, right],
            };
            return node::store(chunks, &top);
        }
    };
    match node.position(key) {
        Ok(index) if node.entries[index].value == value => return Ok(link),
        Ok(index) => node.entries[index].value = value,
        Err(index) if node.level == key_level => {
            let child = node::load(chunks, node.children[index])?;
            let (left, right) = split(chunks, child, key)?;
            node.entries.insert(
                index,
                Entry {
                    key: key.to_vec(),
                    value,
                },
            );
            node.children.splice(index..=index, [left, right]);
        }
        Err(index) => {
            let child = node::load(chunks, node.children[index])?;
            let child = insert(chunks, child, key, key_level, value)?;
            if node.children[index] == Some(child) {
                return Ok(link);
            }
            node.children[index] = Some(child);
        }
    }
    node::store(chunks, &node)
}

/// The tree without `key`, or `None` when nothing is left.
pub(super) fn remove<C: Chunks>(
    chunks: &mut C,
    at: Loaded,
    key: &[u8],
    key_level: u8,
) -> Result<Option<Link>, Error<C::Error>> {
    let Loaded { link, mut node } = at;
    match node.position(key) {
        Ok(index) => {
            node.entries.remove(index);
            let joined = join(chunks, node.children[index], node.children[index + 1])?;
            node.children.splice(index..=index + 1, [joined]);
        }
        Err(index) => {
            let child = node.children[index].filter(|child| child.level >= key_level);
            let Some(child) = node::load(chunks, child)? else {
                return Ok(Some(link));
            };
            let child = remove(chunks, child, key, key_level)?;
            if node.children[index] == child {
                return Ok(Some(link));
            }
            node.children[index] = child;
        }
    }
    store_some(chunks, &node)
}

/// What is before a key and what is after it.
type Halves = (Option<Link>, Option<Link>);

/// The parts of a tree before and after `key`, which is not in it.
fn split<C: Chunks>(
    chunks: &mut C,
    at: Option<Loaded>,
    key: &[u8],
) -> Result<Halves, Error<C::Error>> {
    let Some(Loaded { link, node }) = at else {
        return Ok((None, None));
    };
    let Err(index) = node.position(key) else {
        let reason = "it holds a key that belongs on another level";
        return Err(Error::Corrupt {
            hash: link.hash,
            reason,
        });
    };
    let child = node::load(chunks, node.children[index])?;
    let (before, after) = split(chunks, child, key)?;

    let Node {
        level,
        entries: mut left_entries,
        children: mut left_children,
    } = node;
    let right_entries = left_entries.split_off(index);
    let mut right_children = left_children.split_off(index);
    left_children.push(before);
    right_children[0] = after;

    let left = Node {
        level,
        entries: left_entries,
        children: left_children,
    };
    let right = Node {
        level,
        entries: right_entries,
        children: right_children,
    };
    Ok((store_some(chunks, &left)?, store_some(chunks, &right)?))
}

/// One tree of two; all keys of `left` are before those of `right`.
fn join<C: Chunks>(
    chunks: &mut C,
    left: Option<Link>,
    right: Option<Link>,
) -> Result<Option<Link>, Error<C::Error>> {
    let (Some(left), Some(right)) = (left, right) else {
        return Ok(left.or(right));
    };
    // The higher of the two takes the lower one in at its edge; equals become one node.
    let mut joined = if left.level >= right.level {
        load_here(chunks, left)?
    } else {
        let mut node = load_here(chunks, right)?;
        node.children[0] = join(chunks, Some(left), node.children[0])?;
        return Ok(Some(node::store(chunks, &node)?));
    };
    let last = joined.children.pop().flatten();
    if left.level > right.level {
        let edge = join(chunks, last, Some(right))?;
        joined.children.push(edge);
    } else {
        let mut after = load_here(chunks, right)?;
        after.children[0] = join(chunks, last, after.children[0])?;
        joined.entries.append(&mut after.entries);
        joined.children.append(&mut after.children);
    }
    Ok(Some(node::store(chunks, &joined)?))
}

fn load_here<C: Chunks>(chunks: &C, link: Link) -> Result<Node, Error<C::Error>> {
    let loaded = node::load(chunks, Some(link))?;
    Ok(loaded.ok_or(Error::Missing(link.hash))?.node)
}

/// Stores a node; one without entries is stood for by its only child.
fn store_some<C: Chunks>(chunks: &mut C, node: &Node) -> Result<Option<Link>, Error<C::Error>> {
    if node.entries.is_empty() {
        return Ok(node.children.first().copied().flatten());
    }
    Ok(Some(node::store(chunks, node)?))
}
