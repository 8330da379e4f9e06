//! A node on the wire: metadata in headers, the body is the body (or, above a threshold, a blob
//! named by its hash). Version 1; its decoder stays for ever.
//!
//! | header | meaning |
//! |---|---|
//! | `Vlinder-Version` | `1` |
//! | `Vlinder-Kind`, `Vlinder-Node`, `Vlinder-Parents` | kind, hash, parents (hex, by commas) |
//! | `Vlinder-Body` | `<sha256>:<length>`; the body is in the blob store when `Vlinder-Blob` is `1` |
//! | `Vln-<field>` | a field of the node, part of its hash; percent-encoded |
//! | `Note-<name>` | an annotation outside the hash; percent-encoded |

use crate::backend::{Headers, RawStored};
use crate::error::Error;
use bytes::Bytes;
use std::collections::BTreeMap;
use vlinder_core::record::{DecodeError, Place};
use vlinder_core::{ContentHash, Node, NodeHash};

const VERSION: &str = "1";

/// Annotations: who emitted a node, at which attempt … Outside the hash.
pub type Notes = BTreeMap<String, String>;

/// Note: the worker that emitted the node, as `node/role/index`.
pub const NOTE_BY: &str = "by";
/// Note: the delivery at which it was emitted, from 1.
pub const NOTE_ATTEMPT: &str = "attempt";
/// Note: how long the work took, in microseconds.
pub const NOTE_TOOK_US: &str = "took_us";
/// Note on an end: how long the agent's HTTP server took over the turn, in microseconds.
pub const NOTE_AGENT_US: &str = "agent_us";
/// Note on a result: the sequence of the request that it answers. A hint, which the request's hash proves.
pub const NOTE_REQUEST: &str = "request";
/// Note on a result of a replayed turn: the result that it was taken from.
pub const NOTE_REPLAYED: &str = "replayed";
/// Note on a result of a replayed turn: the session event whose body replaces the recorded answer.
pub const NOTE_REPAIRED: &str = "repaired";
/// Note on the invoke of a replayed turn: the sequence of the invoke that it runs again. A hint.
pub const NOTE_SOURCE: &str = "source";
/// Note: why the node exists although nobody did the work (sweeper, dead letter, healer).
pub const NOTE_REASON: &str = "reason";
/// Note on a message that was lost and given back: its [`Place`], which its own sequence no longer tells.
pub const NOTE_HEALED: &str = "healed";
/// Note on a turn that was given back when another one had taken its place on the branch: it stays on
/// record, and the branch goes on without it.
pub const NOTE_DISPLACED: &str = "displaced";

/// A body, here or in the blob store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// Came with the message.
    Inline(Bytes),
    /// In the blob store; read it with [`crate::Bus::load`].
    Blob {
        /// Its name.
        hash: ContentHash,
        /// Its length in bytes.
        len: u64,
    },
}

impl Body {
    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Inline(bytes) => bytes.len() as u64,
            Self::Blob { len, .. } => *len,
        }
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A node as it stands in the log.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Its subject.
    pub subject: String,
    /// Its sequence in the stream.
    pub seq: u64,
    /// When it was stored, by the log's clock: milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// On a live subscription: the sequence before it on its subject.
    pub previous_on_subject: u64,
    /// The node.
    pub node: Node,
    /// Its hash, checked against the content on decoding.
    pub hash: NodeHash,
    /// Annotations.
    pub notes: Notes,
    /// The body.
    pub body: Body,
}

impl Stored {
    /// Where it counts in the order of its stream. Whoever picks the first of several compares this
    /// and not the sequence: what was lost and given back comes before what was appended meanwhile.
    pub fn place(&self) -> Place {
        let healed = self.notes.get(NOTE_HEALED);
        healed
            .and_then(|text| text.parse().ok())
            .unwrap_or_else(|| Place::at(self.seq))
    }

    /// What the least of its kind is picked by: the place, and where two are equal, the sequence.
    pub fn rank(&self) -> (Place, u64) {
        (self.place(), self.seq)
    }

    /// Whether it was lost and given back.
    pub fn is_healed(&self) -> bool {
        self.notes.contains_key(NOTE_HEALED)
    }

    /// Whether it was given back without its place on the branch.
    pub fn is_displaced(&self) -> bool {
        self.notes.contains_key(NOTE_DISPLACED)
    }
}

/// Writes the headers of a node.
pub fn encode(node: &Node, hash: &NodeHash, notes: &Notes, in_blob: bool) -> Headers {
    let mut headers = Vec::with_capacity(node.fields.len() + notes.len() + 6);
    headers.push(("Vlinder-Version".to_owned(), VERSION.to_owned()));
    headers.push(("Vlinder-Kind".to_owned(), node.kind.as_str().to_owned()));
    headers.push(("Vlinder-Node".to_owned(), hash.to_string()));
    if !node.parents.is_empty() {
        let parents: Vec<String> = node.parents.iter().map(NodeHash::to_string).collect();
        headers.push(("Vlinder-Parents".to_owned(), parents.join(",")));
    }
    headers.push((
        "Vlinder-Body".to_owned(),
        format!("{}:{}", node.body_hash, node.body_len),
    ));
    if in_blob {
        headers.push(("Vlinder-Blob".to_owned(), "1".to_owned()));
    }
    for (name, value) in &node.fields {
        headers.push((format!("Vln-{name}"), escape(value)));
    }
    for (name, value) in notes {
        headers.push((format!("Note-{name}"), escape(value)));
    }
    headers
}

/// Reads a stored message as a node and checks its hash.
pub fn decode(raw: &RawStored) -> Result<Stored, Error> {
    decode_inner(raw).map_err(|reason| Error::Undecodable {
        subject: raw.subject.clone(),
        seq: raw.seq,
        reason,
    })
}

fn decode_inner(raw: &RawStored) -> Result<Stored, String> {
    let mut meta = BTreeMap::new();
    let mut fields = BTreeMap::new();
    let mut notes = Notes::new();
    for (name, value) in &raw.headers {
        if let Some(field) = name.strip_prefix("Vln-") {
            fields.insert(field.to_owned(), unescape(value)?);
        } else if let Some(note) = name.strip_prefix("Note-") {
            notes.insert(note.to_owned(), unescape(value)?);
        } else {
            meta.insert(name.as_str(), value.as_str());
        }
    }
    let need = |name: &str| {
        meta.get(name)
            .copied()
            .ok_or(format!("header {name} is missing"))
    };
    let version = need("Vlinder-Version")?;
    if version != VERSION {
        return Err(format!(
            "version {version} is not known here; this release reads version {VERSION}"
        ));
    }
    let stated: NodeHash = need("Vlinder-Node")?
        .parse()
        .map_err(|e| format!("Vlinder-Node: {e}"))?;
    let parents = match meta.get("Vlinder-Parents") {
        Some(list) => list
            .split(',')
            .map(str::parse)
            .collect::<Result<Vec<NodeHash>, _>>(),
        None => Ok(vec![]),
    }
    .map_err(|e| format!("Vlinder-Parents: {e}"))?;
    let (body_hash, body_len) = need("Vlinder-Body")?
        .split_once(':')
        .and_then(|(hash, len)| Some((hash.parse::<ContentHash>().ok()?, len.parse::<u64>().ok()?)))
        .ok_or("Vlinder-Body: expected <sha256>:<length>")?;
    let body = if meta.contains_key("Vlinder-Blob") {
        Body::Blob {
            hash: body_hash,
            len: body_len,
        }
    } else {
        if ContentHash::of(&raw.body) != body_hash || raw.body.len() as u64 != body_len {
            return Err("the body does not hash to what Vlinder-Body says".to_owned());
        }
        Body::Inline(raw.body.clone())
    };
    let kind = need("Vlinder-Kind")?
        .parse()
        .map_err(|e: DecodeError| e.to_string())?;
    let node = Node {
        kind,
        fields,
        parents,
        body_hash,
        body_len,
    };
    node.check_limits().map_err(|e| e.to_string())?;
    let actual = node.hash();
    if actual != stated {
        return Err(DecodeError::HashMismatch { stated, actual }.to_string());
    }
    Ok(Stored {
        subject: raw.subject.clone(),
        seq: raw.seq,
        time_ms: raw.time_ms,
        previous_on_subject: raw.previous_on_subject,
        node,
        hash: actual,
        notes,
        body,
    })
}

/// Percent-encodes what a header line cannot carry: controls, `%`, and anything beyond ASCII; also
/// blanks at either end, which header parsers trim.
fn escape(value: &str) -> String {
    let last = value.len().saturating_sub(1);
    let mut text = String::with_capacity(value.len());
    for (index, byte) in value.bytes().enumerate() {
        let at_an_end = index == 0 || index == last;
        match byte {
            b' ' if !at_an_end => text.push(' '),
            b'%' => text.push_str("%25"),
            0x21..=0x7e => text.push(byte as char),
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

fn unescape(text: &str) -> Result<String, String> {
    let bytes = text.as_bytes();
    let mut value = Vec::with_capacity(bytes.len());
    let mut index = 0;
    while index < bytes.len() {
        if bytes[index] != b'%' {
            value.push(bytes[index]);
            index += 1;
            continue;
        }
        let digits = text
            .get(index + 1..index + 3)
            .ok_or("a header ends within an escape")?;
        value.push(u8::from_str_radix(digits, 16).map_err(|_| "a header has a bad escape")?);
        index += 3;
    }
    String::from_utf8(value).map_err(|_| "a header is not UTF-8".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vlinder_core::Kind;

    fn raw(headers: Headers, body: &[u8]) -> RawStored {
        RawStored {
            subject: "vlinder.v1.default.res.t.call".into(),
            headers,
            body: Bytes::copy_from_slice(body),
            seq: 1,
            time_ms: 1,
            previous_on_subject: 0,
        }
    }

    proptest! {
        #[test]
        fn nodes_survive_the_wire(value in "\\PC{0,40}|[\\x00-\\x7f]{0,40}", note in "\\PC{0,40}", body in any::<Vec<u8>>()) {
            let node = Node::new(Kind::Result, vec![NodeHash::from_bytes([3; 32])], &body).with("status", value);
            let hash = node.hash();
            let notes = Notes::from([("by".to_owned(), note)]);
            let headers = encode(&node, &hash, &notes, false);
            for (name, value) in &headers {
                prop_assert!(name.is_ascii() && value.bytes().all(|b| (0x20..0x7f).contains(&b)));
                prop_assert_eq!(value.trim(), value);
            }
            let back = decode(&raw(headers, &body)).unwrap();
            prop_assert_eq!(back.node, node);
            prop_assert_eq!(back.notes, notes);
        }

        #[test]
        fn hostile_headers_are_errors(name in "[A-Za-z-]{1,20}", value in "\\PC{0,40}") {
            let node = Node::new(Kind::Result, vec![], b"x");
            let mut headers = encode(&node, &node.hash(), &Notes::new(), false);
            headers.push((format!("Vln-{name}"), value));
            prop_assert!(decode(&raw(headers, b"x")).is_err());
        }
    }

    #[test]
    fn a_changed_body_is_noticed() {
        let node = Node::new(Kind::Result, vec![], b"x");
        let headers = encode(&node, &node.hash(), &Notes::new(), false);
        assert!(decode(&raw(headers.clone(), b"x")).is_ok());
        assert!(decode(&raw(headers, b"y")).is_err());
    }
}
