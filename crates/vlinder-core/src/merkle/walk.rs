//! Walking in key order: scans of a prefix and the difference of two trees.

use super::node::{self, Link, Node};
use super::{Chunks, Error, Value};
use crate::hash::{ContentHash, StateRoot};
use std::cmp::Ordering;

/// What is still to be visited, the next thing last.
enum Step {
    Tree(Link),
    Entry(Vec<u8>, Value),
}

/// A key with something that is said of it.
type Keyed<T> = (Vec<u8>, T);

/// A position in a tree. Holds the decoded rest of one path.
struct Walk<'a, C> {
    chunks: &'a C,
    steps: Vec<Step>,
    /// The last key given out, to refuse a forged tree whose keys do not rise: such a tree could
    /// name one subtree many times over and be walked for ever.
    last: Option<Vec<u8>>,
    /// The node that was opened last, for that error.
    opened: ContentHash,
}

impl<'a, C: Chunks> Walk<'a, C> {
    /// Stands before the first key that is at least `from`.
    fn new(chunks: &'a C, root: Option<StateRoot>, from: &[u8]) -> Result<Self, Error<C::Error>> {
        let opened = ContentHash::from_bytes(root.map_or([0; 32], |root| *root.as_bytes()));
        let mut walk = Self {
            chunks,
            steps: Vec::new(),
            last: None,
            opened,
        };
        let mut at = node::load_root(chunks, root)?;
        while let Some(loaded) = at {
            walk.opened = loaded.link.hash;
            let (index, found) = match loaded.node.position(from) {
                Ok(index) => (index, true),
                Err(index) => (index, false),
            };
            // Where `from` itself is in this node, everything below its left child is smaller.
            let child = if found {
                None
            } else {
                loaded.node.children[index]
            };
            walk.push_from(loaded.node, index);
            at = node::load(chunks, child)?;
        }
        Ok(walk)
    }

    /// Puts the entries of `node` from `index` on, and the children after them, on the stack.
    fn push_from(&mut self, mut node: Node, index: usize) {
        let entries = node.entries.drain(index..);
        let children = node.children.drain(index + 1..);
        for (entry, child) in entries.zip(children).rev() {
            if let Some(link) = child {
                self.steps.push(Step::Tree(link));
            }
            self.steps.push(Step::Entry(entry.key, entry.value));
        }
    }

    /// Replaces the subtree on top by what it consists of.
    fn open(&mut self, link: Link) -> Result<(), Error<C::Error>> {
        self.steps.pop();
        self.opened = link.hash;
        let Some(loaded) = node::load(self.chunks, Some(link))? else {
            return Ok(());
        };
        let first = loaded.node.children[0];
        self.push_from(loaded.node, 0);
        self.steps.extend(first.map(Step::Tree));
        Ok(())
    }

    /// Takes the entry on top, if it is one.
    fn take(&mut self) -> Result<Option<Keyed<Value>>, Error<C::Error>> {
        match self.steps.pop() {
            Some(Step::Entry(key, value)) => {
                if self.last.as_ref().is_some_and(|last| *last >= key) {
                    let reason = "the keys around it do not rise";
                    return Err(Error::Corrupt {
                        hash: self.opened,
                        reason,
                    });
                }
                self.last = Some(key.clone());
                Ok(Some((key, value)))
            }
            Some(tree) => {
                self.steps.push(tree);
                Ok(None)
            }
            None => Ok(None),
        }
    }

    /// The next entry.
    fn next(&mut self) -> Result<Option<Keyed<Value>>, Error<C::Error>> {
        while let Some(&Step::Tree(link)) = self.steps.last() {
            self.open(link)?;
        }
        self.take()
    }
}

/// The entries whose keys begin with a prefix, in key order. Made by [`scan`].
///
/// After an error the iterator has ended. Bound what you take from it: `scan(…)?.take(limit)`.
pub struct Scan<'a, C> {
    walk: Walk<'a, C>,
    prefix: Vec<u8>,
    done: bool,
}

/// Walks the entries whose keys begin with `prefix` (all, if it is empty), in key order. Large
/// values are not read; see [`super::read`].
pub fn scan<'a, C: Chunks>(
    chunks: &'a C,
    root: Option<StateRoot>,
    prefix: &[u8],
) -> Result<Scan<'a, C>, Error<C::Error>> {
    let walk = Walk::new(chunks, root, prefix)?;
    Ok(Scan {
        walk,
        prefix: prefix.to_vec(),
        done: false,
    })
}

impl<C: Chunks> Iterator for Scan<'_, C> {
    type Item = Result<(Vec<u8>, Value), Error<C::Error>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        match self.walk.next() {
            Ok(Some((key, value))) if key.starts_with(&self.prefix) => Some(Ok((key, value))),
            Ok(_) => {
                self.done = true;
                None
            }
            Err(error) => {
                self.done = true;
                Some(Err(error))
            }
        }
    }
}

/// How the value of one key differs between two trees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Only the second tree has the key.
    Added(Value),
    /// Only the first tree has the key.
    Removed(Value),
    /// Both have it, with different values.
    Changed {
        /// The value in the first tree.
        old: Value,
        /// The value in the second tree.
        new: Value,
    },
}

/// The differences of two trees, in key order. Made by [`diff`].
///
/// After an error the iterator has ended.
pub struct Diff<'a, C> {
    old: Walk<'a, C>,
    new: Walk<'a, C>,
    done: bool,
}

/// Walks the differences between two trees. Subtrees that both have are skipped unread, so the
/// cost grows with the difference and not with the trees.
pub fn diff<'a, C: Chunks>(
    chunks: &'a C,
    old: Option<StateRoot>,
    new: Option<StateRoot>,
) -> Result<Diff<'a, C>, Error<C::Error>> {
    let done = old == new;
    let (old, new) = if done { (None, None) } else { (old, new) };
    let (old, new) = (Walk::new(chunks, old, b"")?, Walk::new(chunks, new, b"")?);
    Ok(Diff { old, new, done })
}

impl<C: Chunks> Diff<'_, C> {
    fn advance(&mut self) -> Result<Option<Keyed<Change>>, Error<C::Error>> {
        loop {
            let order = match (self.old.steps.last(), self.new.steps.last()) {
                (None, None) => return Ok(None),
                (Some(&Step::Tree(old)), Some(&Step::Tree(new))) => {
                    self.skip_or_open(old, new)?;
                    continue;
                }
                // Whatever faces a single entry must show its own next entry.
                (Some(&Step::Tree(link)), _) => {
                    self.old.open(link)?;
                    continue;
                }
                (_, Some(&Step::Tree(link))) => {
                    self.new.open(link)?;
                    continue;
                }
                (Some(Step::Entry(..)), None) => Ordering::Less,
                (None, Some(Step::Entry(..))) => Ordering::Greater,
                (Some(Step::Entry(old, _)), Some(Step::Entry(new, _))) => old.cmp(new),
            };
            let old = if order.is_le() {
                self.old.take()?
            } else {
                None
            };
            let new = if order.is_ge() {
                self.new.take()?
            } else {
                None
            };
            match (old, new) {
                (Some((_, old)), Some((_, new))) if old == new => {}
                (Some((key, old)), Some((_, new))) => {
                    return Ok(Some((key, Change::Changed { old, new })));
                }
                (Some((key, old)), None) => return Ok(Some((key, Change::Removed(old)))),
                (None, Some((key, new))) => return Ok(Some((key, Change::Added(new)))),
                (None, None) => return Ok(None),
            }
        }
    }

    /// Both trees are before a subtree: the same one is skipped, else the higher one is opened.
    fn skip_or_open(&mut self, old: Link, new: Link) -> Result<(), Error<C::Error>> {
        if old == new {
            self.old.steps.pop();
            self.new.steps.pop();
            return Ok(());
        }
        if old.level >= new.level {
            self.old.open(old)?;
        }
        if new.level >= old.level {
            self.new.open(new)?;
        }
        Ok(())
    }
}

impl<C: Chunks> Iterator for Diff<'_, C> {
    type Item = Result<(Vec<u8>, Change), Error<C::Error>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let next = self.advance().transpose();
        self.done = !matches!(next, Some(Ok(_)));
        next
    }
}
