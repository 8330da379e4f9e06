//! A turn, from its messages to its commit.
//!
//! Nodes are read generically: fields of later releases land in the files as they are. What counts is what the
//! winning end reaches through parents; other calls that were made before it are shown as abandoned.

use crate::error::{Error, git};
use crate::files::{Dir, graft};
use crate::repo::{Objects, TurnCommit};
use crate::{names, text};
use bytes::Bytes;
use gix_hash::ObjectId;
use gix_object::tree::EntryKind;
use gix_object::{Commit, Kind as ObjectKind};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashSet};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use vlinder_bus::wire::{NOTE_ATTEMPT, NOTE_BY, NOTE_TOOK_US};
use vlinder_bus::{Body, Stored};
use vlinder_core::record::Place;
use vlinder_core::{ContentHash, Kind, NodeHash};

/// A body beyond this many bytes is not put into the repository; a file says where it is.
pub(crate) const BODY_BYTES_MAX: u64 = 1024 * 1024;

/// A node of a turn, without a body that is large.
pub(crate) struct Part {
    pub stored: Stored,
    rank: (Place, u64),
}

/// A turn that has no commit yet.
#[derive(Default)]
pub(crate) struct OpenTurn {
    pub invoke: Option<Part>,
    pub parts: BTreeMap<NodeHash, Part>,
    /// The end that counts, once it was read.
    pub end: Option<Part>,
}

impl Part {
    pub fn new(stored: Stored) -> Self {
        let rank = stored.rank();
        Self { stored, rank }
    }

    pub fn field(&self, name: &str) -> &str {
        self.stored.node.field(name).unwrap_or_default()
    }
}

/// The bytes of a body, or why they are not here.
pub(crate) enum Loaded {
    Bytes(Bytes),
    TooLarge,
    Missing,
}

/// Where the files of a body go and what they are called.
pub(crate) struct Wanted {
    pub path: Vec<String>,
    pub stem: &'static str,
    pub body: Body,
    pub hash: ContentHash,
    pub len: u64,
    /// Of the message in the log.
    pub seq: u64,
    /// Kept as it is, whatever it is.
    pub verbatim: bool,
}

impl Wanted {
    fn new(path: Vec<String>, stem: &'static str, part: &Part, verbatim: bool) -> Self {
        Self {
            path,
            stem,
            body: part.stored.body.clone(),
            hash: part.stored.node.body_hash,
            len: part.stored.node.body_len,
            seq: part.stored.seq,
            verbatim,
        }
    }
}

impl OpenTurn {
    /// The sequence of the first message that is known of it.
    pub fn first_seq(&self) -> Option<u64> {
        let known = self.parts.values().chain(&self.invoke).chain(&self.end);
        known.map(|part| part.stored.seq).min()
    }

    /// Requests with their answers in the order in which they were made: those that the end follows
    /// from, and those that it does not.
    fn calls(&self, end: &Part) -> [Vec<(&Part, Option<&Part>)>; 2] {
        let mut reached = HashSet::new();
        let mut to_visit = end.stored.node.parents.clone();
        while let Some(hash) = to_visit.pop() {
            if let Some(part) = self.parts.get(&hash)
                && reached.insert(hash)
            {
                to_visit.extend_from_slice(&part.stored.node.parents);
            }
        }
        let mut requests: Vec<&Part> = self
            .of_kind(Kind::Request)
            .filter(|part| part.rank < end.rank)
            .collect();
        requests.sort_by(|a, b| a.rank.cmp(&b.rank));
        let answer = |request: &Part, counts: bool| {
            self.of_kind(Kind::Result)
                .filter(|part| {
                    part.rank < end.rank && reached.contains(&part.stored.hash) == counts
                })
                .filter(|part| part.stored.node.parents.contains(&request.stored.hash))
                .min_by(|a, b| a.rank.cmp(&b.rank))
        };
        let (mut made, mut abandoned) = (Vec::new(), Vec::new());
        for request in requests {
            match reached.contains(&request.stored.hash) {
                true => made.push((request, answer(request, true))),
                false => abandoned.push((request, answer(request, false))),
            }
        }
        [made, abandoned]
    }

    fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &Part> {
        self.parts
            .values()
            .filter(move |part| part.stored.node.kind == kind)
    }

    /// The bodies that its files need.
    pub fn wanted(&self, invoke: &Part, end: &Part) -> Vec<Wanted> {
        let mut wanted = vec![Wanted::new(vec![], "input.md", invoke, true)];
        let done = end.field("outcome") == "done";
        let reply = if done { "output.md" } else { "error.txt" };
        wanted.push(Wanted::new(vec![], reply, end, true));
        for (dir, calls) in ["calls", "abandoned"].into_iter().zip(self.calls(end)) {
            for (index, (request, result)) in calls.into_iter().enumerate() {
                let path = vec![dir.to_owned(), call_name(index, request)];
                wanted.push(Wanted::new(path.clone(), "request", request, false));
                if let Some(result) = result {
                    wanted.push(Wanted::new(path, "response", result, false));
                }
            }
        }
        wanted
    }

    /// Writes the commit. `dir` holds the bodies' files; `input` and `output` are what its message quotes.
    pub fn commit(
        &self,
        objects: &Objects,
        mut dir: Dir,
        said: [&[u8]; 2],
        session_name: &str,
        parent: Option<ObjectId>,
    ) -> Result<TurnCommit, Error> {
        let (Some(invoke), Some(end)) = (&self.invoke, &self.end) else {
            return Err(Error::StartOver("a turn has no beginning or no end"));
        };
        let [made, abandoned] = self.calls(end);
        let mut tokens = [0u64; 2];
        for (name, calls) in [("calls", &made), ("abandoned", &abandoned)] {
            for (index, (request, result)) in calls.iter().enumerate() {
                let path = [
                    name.to_owned(),
                    call_name(index, request),
                    "call.json".to_owned(),
                ];
                dir.put(&path, json_file(objects, &call_json(request, *result))?);
            }
        }
        for (_, result) in &made {
            for (sum, field) in tokens.iter_mut().zip(["tokens_in", "tokens_out"]) {
                let count = result.and_then(|result| result.field(field).parse::<u64>().ok());
                *sum = sum.saturating_add(count.unwrap_or(0));
            }
        }
        let number = invoke
            .field("turn")
            .parse::<u64>()
            .unwrap_or(0)
            .saturating_add(1);
        let about = self.about(invoke, end, number, made.len(), tokens);
        dir.put(&["turn.json".to_owned()], json_file(objects, &about)?);
        let turn = dir.write(objects)?;

        let session = json!({
            "session": invoke.field("session"), "name": session_name,
            "agent": invoke.field("agent"), "namespace": invoke.field("namespace"),
        });
        let base = parent.map(|parent| objects.tree_of(parent)).transpose()?;
        let mut path = vec!["turns".to_owned()];
        path.extend(names::turn_path(number));
        let tree = graft(objects, base, &path, EntryKind::Tree, turn)?;
        let session = json_file(objects, &session)?;
        let tree = graft(
            objects,
            Some(tree),
            &["session.json".to_owned()],
            EntryKind::Blob,
            session,
        )?;

        let agent = names::word(invoke.field("agent"));
        let time = gix_date::Time {
            seconds: (end.stored.time_ms / 1000) as i64,
            offset: 0,
        };
        let commit = Commit {
            tree,
            parents: parent.into_iter().collect(),
            author: gix_actor::Signature {
                name: agent.clone().into(),
                email: format!("{agent}@agents.vlinder").into(),
                time,
            },
            committer: gix_actor::Signature {
                name: "Vlinder".into(),
                email: "record@vlinder".into(),
                time,
            },
            encoding: None,
            message: message(invoke, end, said, number, made.len(), tokens).into(),
            extra_headers: vec![],
        };
        let id = objects.write(ObjectKind::Commit, &commit)?;
        Ok(TurnCommit {
            end: end.stored.hash.to_string(),
            id,
            parent,
        })
    }

    fn about(
        &self,
        invoke: &Part,
        end: &Part,
        number: u64,
        calls: usize,
        tokens: [u64; 2],
    ) -> Value {
        let mut about = Map::new();
        about.insert("turn".into(), json!(number));
        let mut fields = fields_of(invoke);
        fields.remove("turn");
        fields.remove("namespace");
        about.append(&mut fields);
        about.insert("outcome".into(), json!(end.field("outcome")));
        if !end.field("code").is_empty() {
            about.insert("code".into(), json!(end.field("code")));
        }
        if !end.field("state").is_empty() {
            about.insert("state_after".into(), json!(end.field("state")));
        }
        about.insert("calls".into(), json!(calls));
        about.insert("tokens_in".into(), json!(tokens[0]));
        about.insert("tokens_out".into(), json!(tokens[1]));
        about.insert("began".into(), json!(time_text(invoke.stored.time_ms)));
        about.insert("ended".into(), json!(time_text(end.stored.time_ms)));
        about.insert(
            "took_ms".into(),
            json!(end.stored.time_ms.saturating_sub(invoke.stored.time_ms)),
        );
        about.insert(
            "nodes".into(),
            json!({"invoke": node_json(invoke), "end": node_json(end)}),
        );
        Value::Object(about)
    }
}

/// Turns a body into a file, and the name it gets.
pub(crate) fn file_of(
    objects: &Objects,
    wanted: &Wanted,
    loaded: &Loaded,
) -> Result<(Vec<String>, ObjectId), Error> {
    let (name, blob) = match loaded {
        Loaded::Bytes(bytes) if wanted.verbatim => (wanted.stem.to_owned(), objects.blob(bytes)?),
        Loaded::Bytes(bytes) => match text::pretty(bytes) {
            Some(pretty) => (format!("{}.json", wanted.stem), objects.blob(&pretty)?),
            None if std::str::from_utf8(bytes).is_ok() => {
                (format!("{}.txt", wanted.stem), objects.blob(bytes)?)
            }
            None => (format!("{}.bin", wanted.stem), objects.blob(bytes)?),
        },
        Loaded::TooLarge | Loaded::Missing => {
            let why = match loaded {
                Loaded::TooLarge => {
                    "larger than what is kept in git; read it with `vlinder turn get --full`"
                }
                _ => "missing from the blob store",
            };
            let stem = wanted.stem.split('.').next().unwrap_or_default();
            (
                format!("{stem}.elsewhere.json"),
                json_file(
                    objects,
                    &json!({"sha256": wanted.hash.to_string(), "bytes": wanted.len, "why": why}),
                )?,
            )
        }
    };
    let mut path = wanted.path.clone();
    path.push(name);
    Ok((path, blob))
}

fn call_name(index: usize, request: &Part) -> String {
    let (service, operation) = (request.field("service"), request.field("operation"));
    format!(
        "{:03}-{}-{}",
        index + 1,
        names::word(service),
        names::word(operation)
    )
}

fn call_json(request: &Part, result: Option<&Part>) -> Value {
    let mut call = Map::new();
    let mut asked = fields_of(request);
    asked.remove("namespace");
    call.append(&mut asked);
    call.insert("asked".into(), json!(time_text(request.stored.time_ms)));
    let mut nodes = Map::new();
    nodes.insert("request".into(), node_json(request));
    if let Some(result) = result {
        let mut fields = fields_of(result);
        for same in ["submission", "key"] {
            fields.remove(same);
        }
        if let Some(state) = fields.remove("state") {
            call.insert("state_after".into(), state);
        }
        call.append(&mut fields);
        call.insert("answered".into(), json!(time_text(result.stored.time_ms)));
        nodes.insert("result".into(), node_json(result));
    }
    call.insert("nodes".into(), Value::Object(nodes));
    Value::Object(call)
}

fn fields_of(part: &Part) -> Map<String, Value> {
    let fields = part.stored.node.fields.iter();
    fields
        .map(|(name, value)| (name.clone(), json!(value)))
        .collect()
}

/// Identity and annotations of a node.
fn node_json(part: &Part) -> Value {
    let stored = &part.stored;
    let parents: Vec<String> = stored
        .node
        .parents
        .iter()
        .map(NodeHash::to_string)
        .collect();
    let mut node = Map::new();
    node.insert("hash".into(), json!(stored.hash.to_string()));
    node.insert("parents".into(), json!(parents));
    node.insert(
        "body_sha256".into(),
        json!(stored.node.body_hash.to_string()),
    );
    node.insert("body_bytes".into(), json!(stored.node.body_len));
    for note in [NOTE_BY, NOTE_ATTEMPT, NOTE_TOOK_US] {
        if let Some(value) = stored.notes.get(note) {
            node.insert(note.into(), json!(value));
        }
    }
    Value::Object(node)
}

fn json_file(objects: &Objects, value: &Value) -> Result<ObjectId, Error> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(git("cannot write JSON"))?;
    bytes.push(b'\n');
    objects.blob(&bytes)
}

fn time_text(ms: u64) -> String {
    let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000);
    at.ok()
        .and_then(|at| at.format(&Rfc3339).ok())
        .unwrap_or_else(|| ms.to_string())
}

fn message(
    invoke: &Part,
    end: &Part,
    [input, output]: [&[u8]; 2],
    number: u64,
    calls: usize,
    tokens: [u64; 2],
) -> String {
    let outcome = end.field("outcome");
    let mut message = text::subject(input);
    if outcome != "done" {
        message = format!("[{outcome}] {message}");
    }
    message.push_str("\n\n");
    let excerpt = text::excerpt(output);
    if !excerpt.is_empty() {
        message.push_str(&excerpt);
        message.push_str("\n\n");
    }
    let line = |name: &str, value: &str| format!("{name}: {}\n", text::subject(value.as_bytes()));
    for (name, field) in [
        ("Session", "session"),
        ("Branch", "branch"),
        ("Submission", "submission"),
    ] {
        message.push_str(&line(name, invoke.field(field)));
    }
    message.push_str(&line("Turn", &number.to_string()));
    message.push_str(&line("Outcome", outcome));
    message.push_str(&line("Calls", &calls.to_string()));
    if tokens != [0, 0] {
        message.push_str(&line(
            "Tokens",
            &format!("{} in, {} out", tokens[0], tokens[1]),
        ));
    }
    message.push_str(&format!("Hash: {}\n", end.stored.hash));
    message
}
