//! Typed identifiers. A constructor checks the alphabet and the length, so that an id that exists
//! is safe in a subject, a path and a page.

use std::fmt;
use std::str::FromStr;

/// Why a string is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid {what} {value:?}: expected {expected}")]
pub struct IdError {
    /// Which id was wanted, e.g. `agent name`.
    pub what: &'static str,
    /// The offending value, cut to 80 characters.
    pub value: String,
    /// The rule in words.
    pub expected: &'static str,
}

impl IdError {
    fn new(what: &'static str, value: &str, expected: &'static str) -> Self {
        Self {
            what,
            value: value.chars().take(80).collect(),
            expected,
        }
    }
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $expected:literal, $max:literal, $ok:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Box<str>);

        impl $name {
            /// Longest accepted value, in bytes.
            pub const LEN_MAX: usize = $max;

            /// Checks `value` against the alphabet and the length of this id.
            pub fn new(value: impl AsRef<str>) -> Result<Self, IdError> {
                let value = value.as_ref();
                let ok: fn(u8) -> bool = $ok;
                if value.is_empty() || value.len() > $max || !value.bytes().all(ok) {
                    return Err(IdError::new($what, value, $expected));
                }
                Ok(Self(value.into()))
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(value: &str) -> Result<Self, IdError> {
                Self::new(value)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(&self.0)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let value = String::deserialize(d)?;
                Self::new(value).map_err(serde::de::Error::custom)
            }
        }
    };
}

fn lower(b: u8) -> bool {
    matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-')
}

fn token(b: u8) -> bool {
    matches!(b, b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_')
}

id!(
    /// A tenant. A token of every subject and a column of every table.
    Namespace, "namespace", "1 to 63 of a-z, 0-9 and -", 63, lower
);
id!(
    /// The name of an agent, as in its manifest.
    AgentName, "agent name", "1 to 63 of a-z, 0-9 and -", 63, lower
);
id!(
    /// A session: a conversation with one agent.
    SessionId, "session id", "1 to 64 of A-Z, a-z, 0-9, - and _", 64, token
);
id!(
    /// A branch of one session.
    BranchName, "branch name", "1 to 64 of A-Z, a-z, 0-9, - and _", 64, token
);
id!(
    /// The name of a turn, made by the client before it is sent.
    SubmissionId, "submission id", "1 to 64 of A-Z, a-z, 0-9, - and _", 64, token
);
id!(
    /// A machine of the cluster.
    NodeName, "node name", "1 to 63 of A-Z, a-z, 0-9, -, _ and .", 63,
    |b| token(b) || b == b'.'
);
id!(
    /// What picks the worker within a service: a model, a store id, or `_` for none.
    Selector, "selector", "1 to 256 printable characters", 256, |b| b >= 0x20 && b != 0x7f
);

impl Namespace {
    /// The namespace of whoever names none.
    pub fn default_ns() -> Self {
        Self("default".into())
    }
}

impl BranchName {
    /// The branch every session begins with.
    pub fn main() -> Self {
        Self("main".into())
    }
}

impl Selector {
    /// The selector of a service that needs none.
    pub fn none() -> Self {
        Self("_".into())
    }
}

impl SessionId {
    /// A fresh id that sorts by time of creation (UUID version 7, RFC 9562).
    pub fn fresh() -> Self {
        Self(format!("s-{}", uuid::Uuid::now_v7().simple()).into())
    }

    /// Whether it is the session of a delegation: begun by an agent, not by a client.
    pub fn is_delegated(&self) -> bool {
        self.0.starts_with(DELEGATED_PREFIX)
    }
}

/// What the ids of delegations begin with. Clients begin no sessions that are called so.
const DELEGATED_PREFIX: &str = "delegated-";
/// How many hexadecimal digits follow.
const DELEGATED_DIGITS: usize = 40;

/// The turn and the session of a delegation: the same for the same call of the same turn, so that a
/// turn that is tried again finds what it delegated.
pub fn delegated(caller: &SubmissionId, call: &crate::CallKey) -> (SubmissionId, SessionId) {
    let hash = crate::ContentHash::of(format!("vlinder.delegation.v1/{caller}/{call}").as_bytes());
    let name = format!(
        "{DELEGATED_PREFIX}{}",
        &hash.to_string()[..DELEGATED_DIGITS]
    );
    (SubmissionId(name.as_str().into()), SessionId(name.into()))
}

impl SubmissionId {
    /// A fresh id that sorts by time of creation (UUID version 7, RFC 9562).
    pub fn fresh() -> Self {
        Self(format!("t-{}", uuid::Uuid::now_v7().simple()).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_are_refused() {
        for bad in [
            "",
            "A",
            "a.b",
            "a/b",
            "../x",
            "a b",
            "a*",
            ">",
            "ä",
            "a\n",
            &"a".repeat(64),
        ] {
            assert!(AgentName::new(bad).is_err(), "{bad:?} was accepted");
        }
        assert!(AgentName::new("a-1").is_ok());
        assert!(SessionId::new("s.1").is_err());
        assert!(NodeName::new("gpu-1.example").is_ok());
        assert!(Selector::new("smollm2:135m/x").is_ok());
        assert!(Selector::new("a\nb").is_err());
    }

    #[test]
    fn an_error_names_the_value_and_the_rule() {
        let error = AgentName::new("Bad Name").unwrap_err().to_string();
        assert_eq!(
            error,
            "invalid agent name \"Bad Name\": expected 1 to 63 of a-z, 0-9 and -"
        );
    }

    #[test]
    fn fresh_ids_are_valid_and_differ() {
        let (a, b) = (SessionId::fresh(), SessionId::fresh());
        assert_ne!(a, b);
        assert!(SessionId::new(a.as_str()).is_ok());
        assert!(SubmissionId::new(SubmissionId::fresh().as_str()).is_ok());
    }
}
