//! Content hashes and the canonical, length-framed encoding under them.
//!
//! All hashes are SHA-256 (FIPS 180-4). What is hashed is a domain line, then *frames*: a frame is
//! the length of its bytes as an unsigned 64-bit big-endian number, then the bytes. Framing makes
//! the encoding injective: no two different values have the same encoding. The format is written
//! down in `docs/record-format.md`, with the vectors that `tests/fixtures` holds.

use sha2::{Digest, Sha256};
use std::fmt;
use std::str::FromStr;

/// Why a string is not a hash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid hash: expected 64 hexadecimal digits")]
pub struct HashError;

macro_rules! hash {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name([u8; 32]);

        impl $name {
            /// Wraps 32 bytes that are known to be a SHA-256 value.
            pub const fn from_bytes(bytes: [u8; 32]) -> Self {
                Self(bytes)
            }

            /// The raw 32 bytes.
            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            /// The first 12 hexadecimal digits, for people.
            pub fn short(&self) -> String {
                hex::encode(&self.0[..6])
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.short())
            }
        }

        impl FromStr for $name {
            type Err = HashError;
            fn from_str(value: &str) -> Result<Self, HashError> {
                let mut bytes = [0; 32];
                hex::decode_to_slice(value, &mut bytes).map_err(|_| HashError)?;
                Ok(Self(bytes))
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

hash!(
    /// The Merkle identity of a node: what was asked or answered, with its parents.
    NodeHash
);
hash!(
    /// The identity of a call within its turn: what was asked, without parents, order or emitter.
    CallKey
);
hash!(
    /// The hash of plain bytes: a body, a blob, a chunk of a store.
    ContentHash
);
hash!(
    /// The root of a versioned store: the hash of its topmost tree node.
    StateRoot
);

impl ContentHash {
    /// SHA-256 of `bytes`, without a domain line: what `sha256sum` prints.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }
}

/// Builds a hash over a domain line and frames.
pub struct FrameHasher(Sha256);

impl FrameHasher {
    /// Starts with the domain line, which keeps hashes of different kinds apart.
    pub fn new(domain: &str) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(domain.as_bytes());
        hasher.update(b"\n");
        Self(hasher)
    }

    /// Adds the length of `bytes`, then `bytes`.
    pub fn frame(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.update((bytes.len() as u64).to_be_bytes());
        self.0.update(bytes);
        self
    }

    /// Adds a number as eight big-endian bytes, without a length.
    pub fn number(&mut self, value: u64) -> &mut Self {
        self.0.update(value.to_be_bytes());
        self
    }

    /// Adds 32 bytes of another hash, without a length.
    pub fn digest(&mut self, value: &[u8; 32]) -> &mut Self {
        self.0.update(value);
        self
    }

    /// The 32 bytes of the hash.
    pub fn finish(self) -> [u8; 32] {
        self.0.finalize().into()
    }
}

/// The key under which a call is found again when its turn is resumed, replayed or repaired:
/// service, operation, backend, model, canonical body, and `k`, the number of equal calls that the
/// turn made before it.
pub fn call_key(
    service: &str,
    operation: &str,
    backend: &str,
    model: &str,
    body: &[u8],
    k: u64,
) -> CallKey {
    let body = canonical_body(body);
    let mut hasher = FrameHasher::new("vlinder.call.v1");
    for part in [service, operation, backend, model] {
        hasher.frame(part.as_bytes());
    }
    hasher.frame(&body).number(k);
    CallKey(hasher.finish())
}

/// JSON with its object keys sorted and no insignificant white space; anything else as it is.
/// Two requests that differ only in formatting then have one call key.
pub fn canonical_body(body: &[u8]) -> Vec<u8> {
    let looks_like_json = matches!(body.first(), Some(b'{' | b'['));
    if !looks_like_json {
        return body.to_vec();
    }
    match serde_json::from_slice::<serde_json::Value>(body) {
        Ok(mut value) => {
            value.sort_all_objects();
            serde_json::to_vec(&value).unwrap_or_else(|_| body.to_vec())
        }
        Err(_) => body.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn call_key_ignores_formatting_and_counts_repeats() {
        let key = |body: &str, k| call_key("kv", "put", "sqlite", "_", body.as_bytes(), k);
        assert_eq!(
            key(r#"{"b":1,"a":{"y":2,"x":1}}"#, 0),
            key(r#"{ "a": {"x":1,"y":2}, "b":1 }"#, 0)
        );
        assert_ne!(key("{}", 0), key("{}", 1));
        assert_ne!(
            call_key("ab", "c", "", "", b"", 0),
            call_key("a", "bc", "", "", b"", 0)
        );
    }

    #[test]
    fn hashes_survive_text() {
        let hash = ContentHash::of(b"abc");
        assert_eq!(
            hash.to_string(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(hash.to_string().parse(), Ok(hash));
        assert_eq!("xyz".parse::<ContentHash>(), Err(HashError));
        assert_eq!(
            hash.to_string()[..62].parse::<ContentHash>(),
            Err(HashError)
        );
    }
}
