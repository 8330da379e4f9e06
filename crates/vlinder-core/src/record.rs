//! The record: what happened, as content-addressed nodes.
//!
//! A [`Node`] is the form that is hashed: a kind, named fields, parents, and the hash of a body.
//! [`Invoke`], [`Request`], [`CallResult`], [`End`], [`SessionEvent`] and [`InfraEvent`] are the typed views of it.
//! Who emitted a node, when and at which attempt is an annotation of the message that carries it,
//! and outside the hash.
//!
//! Parents (design.md §5): an invoke points at the end before it on its branch, or at the session
//! event the branch began with; a request at the invoke or at the maximal results that the agent
//! had already been given; a result at its request; an end at all maximal results, or the invoke.

mod place;
mod session;
mod views;

pub use place::Place;
pub use session::{BranchStart, Repair, SessionEvent, SessionVerb};
pub use views::{
    CallResult, CallStatus, End, InfraEvent, Invoke, Origin, Outcome, Request, Source,
    may_change_state,
};

use crate::hash::{ContentHash, FrameHasher, NodeHash};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// Most parents of one node. A turn has at most as many calls in flight.
pub const PARENTS_MAX: usize = 1024;
/// Most fields of one node.
pub const FIELDS_MAX: usize = 64;
/// Longest value of a field, in bytes.
pub const FIELD_BYTES_MAX: usize = 4096;

/// What a node says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A turn begins.
    Invoke,
    /// An agent asked a service for something.
    Request,
    /// The answer to a request.
    Result,
    /// A turn ended.
    End,
    /// A branch is closed to new turns.
    Seal,
    /// A session began, was forked, or had a branch promoted.
    Session,
    /// Something was deployed, deleted, scaled.
    Infra,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 7] = [
        Self::Invoke,
        Self::Request,
        Self::Result,
        Self::End,
        Self::Seal,
        Self::Session,
        Self::Infra,
    ];

    /// The name on the wire and in hashes; frozen.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Invoke => "invoke",
            Self::Request => "request",
            Self::Result => "result",
            Self::End => "end",
            Self::Seal => "seal",
            Self::Session => "session",
            Self::Infra => "infra",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = DecodeError;
    fn from_str(value: &str) -> Result<Self, DecodeError> {
        let found = Self::ALL.into_iter().find(|kind| kind.as_str() == value);
        found.ok_or_else(|| DecodeError::UnknownKind(value.chars().take(40).collect()))
    }
}

/// Why a node cannot be read as what it claims to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The kind is not one that this release knows.
    #[error("unknown node kind {0:?}")]
    UnknownKind(String),
    /// The node is of another kind than the reader expects.
    #[error("expected a node of kind {expected}, found {found}")]
    WrongKind {
        /// What the reader wanted.
        expected: Kind,
        /// What it got.
        found: Kind,
    },
    /// A field that this kind must have is not there.
    #[error("field {0:?} is missing")]
    MissingField(&'static str),
    /// A field is there but says nothing that the reader understands.
    #[error("field {field:?} is invalid: {reason}")]
    BadField {
        /// Which field.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The stated hash is not the hash of the content.
    #[error("node says it is {stated} but its content hashes to {actual}")]
    HashMismatch {
        /// The hash that came with the node.
        stated: NodeHash,
        /// The hash computed from its content.
        actual: NodeHash,
    },
    /// More fields, longer values or more parents than a node may have.
    #[error("node exceeds its limits: {0}")]
    TooLarge(&'static str),
}

/// A node of the Merkle DAG, in the form that is hashed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// What it says.
    pub kind: Kind,
    /// Named values, sorted by name.
    pub fields: BTreeMap<String, String>,
    /// Hashes of the nodes this one follows from. Order carries no meaning; it is sorted when hashed.
    pub parents: Vec<NodeHash>,
    /// SHA-256 of the body.
    pub body_hash: ContentHash,
    /// Length of the body, in bytes.
    pub body_len: u64,
}

impl Node {
    /// A node without fields over `body`.
    pub fn new(kind: Kind, parents: Vec<NodeHash>, body: &[u8]) -> Self {
        Self {
            kind,
            fields: BTreeMap::new(),
            parents,
            body_hash: ContentHash::of(body),
            body_len: body.len() as u64,
        }
    }

    /// Sets a field.
    pub fn with(mut self, field: &'static str, value: impl fmt::Display) -> Self {
        self.fields.insert(field.to_owned(), value.to_string());
        self
    }

    /// Sets a field when there is a value.
    pub fn with_some(self, field: &'static str, value: Option<impl fmt::Display>) -> Self {
        match value {
            Some(value) => self.with(field, value),
            None => self,
        }
    }

    /// The Merkle identity. See `docs/record-format.md` for the encoding.
    pub fn hash(&self) -> NodeHash {
        let mut hasher = FrameHasher::new("vlinder.node.v1");
        hasher.frame(self.kind.as_str().as_bytes());
        hasher.number(self.fields.len() as u64);
        for (name, value) in &self.fields {
            hasher.frame(name.as_bytes()).frame(value.as_bytes());
        }
        let mut parents = self.parents.clone();
        parents.sort_unstable();
        parents.dedup();
        hasher.number(parents.len() as u64);
        for parent in &parents {
            hasher.digest(parent.as_bytes());
        }
        hasher
            .number(self.body_len)
            .digest(self.body_hash.as_bytes());
        NodeHash::from_bytes(hasher.finish())
    }

    /// Checks the limits on fields and parents.
    pub fn check_limits(&self) -> Result<(), DecodeError> {
        if self.fields.len() > FIELDS_MAX {
            return Err(DecodeError::TooLarge("more than 64 fields"));
        }
        if self
            .fields
            .values()
            .any(|value| value.len() > FIELD_BYTES_MAX)
        {
            return Err(DecodeError::TooLarge("a field longer than 4096 bytes"));
        }
        if self.parents.len() > PARENTS_MAX {
            return Err(DecodeError::TooLarge("more than 1024 parents"));
        }
        Ok(())
    }

    /// A field's text, if it is there.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.get(name).map(String::as_str)
    }

    /// A field that must be there, parsed.
    pub fn parse<T>(&self, name: &'static str) -> Result<T, DecodeError>
    where
        T: FromStr,
        T::Err: fmt::Display,
    {
        self.parse_some(name)?
            .ok_or(DecodeError::MissingField(name))
    }

    /// A field that may be absent, parsed.
    pub fn parse_some<T>(&self, name: &'static str) -> Result<Option<T>, DecodeError>
    where
        T: FromStr,
        T::Err: fmt::Display,
    {
        let Some(text) = self.field(name) else {
            return Ok(None);
        };
        match text.parse() {
            Ok(value) => Ok(Some(value)),
            Err(error) => Err(DecodeError::BadField {
                field: name,
                reason: format!("{error}"),
            }),
        }
    }

    /// Fails unless the node is of `expected` kind.
    pub fn expect_kind(&self, expected: Kind) -> Result<(), DecodeError> {
        if self.kind == expected {
            return Ok(());
        }
        Err(DecodeError::WrongKind {
            expected,
            found: self.kind,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_covers_every_part() {
        let parent = NodeHash::from_bytes([7; 32]);
        let base = Node::new(Kind::Request, vec![parent], b"body").with("service", "kv");
        let mut seen = vec![base.hash()];
        seen.push(
            Node::new(Kind::Result, vec![parent], b"body")
                .with("service", "kv")
                .hash(),
        );
        seen.push(
            Node::new(Kind::Request, vec![], b"body")
                .with("service", "kv")
                .hash(),
        );
        seen.push(
            Node::new(Kind::Request, vec![parent], b"other")
                .with("service", "kv")
                .hash(),
        );
        seen.push(
            Node::new(Kind::Request, vec![parent], b"body")
                .with("service", "vec")
                .hash(),
        );
        seen.push(base.clone().with("extra", "1").hash());
        let count = seen.len();
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), count);
    }

    #[test]
    fn hash_ignores_the_order_of_parents() {
        let (a, b) = (NodeHash::from_bytes([1; 32]), NodeHash::from_bytes([2; 32]));
        let one = Node::new(Kind::End, vec![a, b], b"");
        let two = Node::new(Kind::End, vec![b, a, a], b"");
        assert_eq!(one.hash(), two.hash());
    }
}
