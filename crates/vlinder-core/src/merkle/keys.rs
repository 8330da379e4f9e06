//! Where the services of a session keep their keys in its one tree.
//!
//! A key is the byte of its [`Space`], the length of the store id (16 bits, big-endian), the store
//! id, then the user's key. The length in front keeps stores apart whose ids begin alike. Frozen:
//! the bytes decide state roots.

use super::KEY_BYTES_MAX;
use crate::ids::Selector;

/// Longest key of a user, in bytes.
pub const USER_KEY_BYTES_MAX: usize = 1024;

// The longest frame and the longest user's key fit the tree.
const _: () = assert!(3 + Selector::LEN_MAX + USER_KEY_BYTES_MAX <= KEY_BYTES_MAX);

/// A service's part of the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// The contents of a key-value store, by path.
    Kv,
    /// The vectors of a vector store, by key.
    Vec,
    /// What a vector store knows of itself, e.g. its dimension.
    VecMeta,
}

impl Space {
    const fn byte(self) -> u8 {
        match self {
            Self::Kv => b'k',
            Self::Vec => b'v',
            Self::VecMeta => b'm',
        }
    }
}

/// What all keys of one store begin with.
pub fn prefix(space: Space, store: &Selector) -> Vec<u8> {
    key(space, store, b"")
}

/// The key in the tree for a user's key (at most [`USER_KEY_BYTES_MAX`] bytes; the tree refuses
/// longer ones).
pub fn key(space: Space, store: &Selector, user: &[u8]) -> Vec<u8> {
    let store = store.as_str().as_bytes();
    let mut key = Vec::with_capacity(3 + store.len() + user.len());
    key.push(space.byte());
    key.extend((store.len() as u16).to_be_bytes());
    key.extend(store);
    key.extend(user);
    key
}

/// The user's key within a key of this store; `None` for a key of another one.
pub fn user_key<'a>(space: Space, store: &Selector, key: &'a [u8]) -> Option<&'a [u8]> {
    key.strip_prefix(prefix(space, store).as_slice())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stores_whose_ids_begin_alike_do_not_meet() {
        let (short, long) = (Selector::new("a").unwrap(), Selector::new("ab").unwrap());
        let in_short = key(Space::Kv, &short, b"bc");
        assert_eq!(user_key(Space::Kv, &short, &in_short), Some(&b"bc"[..]));
        assert_eq!(user_key(Space::Kv, &long, &in_short), None);
        assert_eq!(user_key(Space::Vec, &short, &in_short), None);
        assert_ne!(in_short, key(Space::Kv, &long, b"c"));
        assert_eq!(in_short, b"k\0\x01abc");
    }
}
