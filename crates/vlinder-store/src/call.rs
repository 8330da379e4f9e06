//! One call to a store as a pure function: base state, operation and body in; answer and new state
//! out. What the agent did wrong is an answer, what the store lacks is an error.

use crate::{kv, vec};
use serde::de::DeserializeOwned;
use vlinder_core::merkle::{self, Chunks};
use vlinder_core::{Selector, StateRoot};

/// The content type of JSON answers.
pub(crate) const JSON: &str = "application/json";

/// Which service a call is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// Contents by path.
    Kv,
    /// Vectors by key.
    Vec,
}

impl Service {
    /// The service of a request, by its name on the wire; `None` if it is none of ours.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "kv" => Some(Self::Kv),
            "vec" => Some(Self::Vec),
            _ => None,
        }
    }
}

/// A call to a store.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// Which service.
    pub service: Service,
    /// `get`, `put`, `list`, `delete`; `store`, `search`, `delete`.
    pub operation: &'a str,
    /// Which store of the service.
    pub store: &'a Selector,
    /// The state that the call works on; `None` is the empty one.
    pub state: Option<StateRoot>,
    /// The JSON of interfaces.md §5.
    pub body: &'a [u8],
}

impl Call<'_> {
    /// Whether the call can lead to another state.
    pub fn may_change_state(&self) -> bool {
        match self.service {
            Service::Kv => matches!(self.operation, "put" | "delete"),
            Service::Vec => matches!(self.operation, "store" | "delete"),
        }
    }
}

/// What the agent gets, and the state after the call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status: 200, or that of a refusal.
    pub http: u16,
    /// The content type of the body.
    pub content_type: &'static str,
    /// The body.
    pub body: Vec<u8>,
    /// The state after the call: the base state unless the call changed it; `None` is the empty one.
    pub state: Option<StateRoot>,
    /// Whether a `kv get` found something; `None` for other calls.
    pub found: Option<bool>,
}

impl Answer {
    /// Whether the call was done and not refused.
    pub fn is_ok(&self) -> bool {
        self.http < 400
    }

    /// A JSON answer that leaves the state as it is.
    pub(crate) fn json(call: &Call, value: &impl serde::Serialize) -> Self {
        let body = serde_json::to_vec(value).expect("answers have string keys and finite numbers");
        Self {
            http: 200,
            content_type: JSON,
            body,
            state: call.state,
            found: None,
        }
    }

    /// The answer of a call that changes the state: `{state}`.
    pub(crate) fn moved(call: &Call, state: Option<StateRoot>) -> Self {
        Self {
            state,
            ..Self::json(call, &serde_json::json!({ "state": state }))
        }
    }
}

/// Why a call was not done.
#[derive(Debug)]
pub(crate) enum Failure<E: std::error::Error + 'static> {
    /// The caller must ask for something else.
    Refused(Refusal),
    /// The tree or its chunks are not there or not right.
    Tree(merkle::Error<E>),
}

impl<E: std::error::Error + 'static> From<Refusal> for Failure<E> {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl<E: std::error::Error + 'static> From<merkle::Error<E>> for Failure<E> {
    fn from(error: merkle::Error<E>) -> Self {
        Self::Tree(error)
    }
}

/// What the caller did wrong.
#[derive(Debug)]
pub(crate) struct Refusal {
    http: u16,
    code: &'static str,
    message: String,
}

impl Refusal {
    pub(crate) fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self {
            http: 400,
            code,
            message: message.into(),
        }
    }

    pub(crate) fn too_large(message: impl Into<String>) -> Self {
        Self {
            http: 413,
            code: "too_large",
            message: message.into(),
        }
    }

    fn answer(self, call: &Call) -> Answer {
        let error = serde_json::json!({ "code": self.code, "message": self.message });
        Answer {
            http: self.http,
            ..Answer::json(call, &serde_json::json!({ "error": error }))
        }
    }
}

/// Reads the body of a call; the refusal says where it is wrong.
pub(crate) fn parse<T: DeserializeOwned>(call: &Call) -> Result<T, Refusal> {
    serde_json::from_slice(call.body).map_err(|error| {
        Refusal::new(
            "bad_request",
            format!("the body is not as it should be: {error}"),
        )
    })
}

/// Does a call. The same call on the same state gives the same answer and the same new state, on
/// any node and at any time; that is what stores are rebuilt by.
///
/// Errors mean that the chunks of the base state are not all here or damaged, or that the chunk
/// store failed; nothing is wrong with the call then.
pub fn apply<C: Chunks>(
    chunks: &mut C,
    call: &Call,
    vectors: &mut vec::Cache,
) -> Result<Answer, merkle::Error<C::Error>> {
    let outcome = match (call.service, call.operation) {
        (Service::Kv, "get") => kv::get(chunks, call),
        (Service::Kv, "put") => kv::put(chunks, call),
        (Service::Kv, "list") => kv::list(chunks, call),
        (Service::Kv, "delete") => kv::delete(chunks, call),
        (Service::Vec, "store") => vec::store(chunks, call),
        (Service::Vec, "search") => vec::search(chunks, call, vectors),
        (Service::Vec, "delete") => vec::delete(chunks, call),
        (Service::Kv, other) => Err(unknown(other, "get, put, list, delete").into()),
        (Service::Vec, other) => Err(unknown(other, "store, search, delete").into()),
    };
    let refusal = match outcome {
        Ok(answer) => return Ok(answer),
        Err(Failure::Refused(refusal)) => refusal,
        // Only the key decides about these two.
        Err(Failure::Tree(error @ (merkle::Error::KeyTooLong(_) | merkle::Error::Crowded))) => {
            Refusal::new("bad_key", error.to_string())
        }
        Err(Failure::Tree(error)) => return Err(error),
    };
    Ok(refusal.answer(call))
}

fn unknown(operation: &str, known: &str) -> Refusal {
    let shown: String = operation.chars().take(40).collect();
    Refusal::new(
        "unknown_operation",
        format!("unknown operation {shown:?}: expected one of {known}"),
    )
}
