//! Typed views of nodes. Each turns into a [`Node`] and is read back from one; field names are
//! part of the hash and therefore frozen.

use super::{DecodeError, Kind, Node};
use crate::hash::{CallKey, NodeHash, StateRoot};
use crate::ids::{AgentName, BranchName, Namespace, Selector, SessionId, SubmissionId};
use std::fmt;
use std::str::FromStr;

/// A turn begins. The body is the new input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invoke {
    /// Tenant.
    pub namespace: Namespace,
    /// Who is asked.
    pub agent: AgentName,
    /// In which conversation.
    pub session: SessionId,
    /// On which branch of it.
    pub branch: BranchName,
    /// The name that the client gave the turn.
    pub submission: SubmissionId,
    /// How many turns came before it on this line, counting those before a fork.
    pub turn: u64,
    /// The turn before it on this line; its end is this node's parent.
    pub previous: Option<SubmissionId>,
    /// The state that the turn starts from; absent when nothing was ever stored.
    pub state: Option<StateRoot>,
    /// How long the turn may take from the moment it was stored, in milliseconds.
    pub timeout_ms: u64,
    /// Who delegated it, if an agent did.
    pub origin: Option<Origin>,
    /// The turn that it runs again, if it is a replay.
    pub source: Option<Source>,
}

/// The turn that a turn runs again. Its calls are answered from that turn's record as far as they are the
/// same, and live from there on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The turn that is run again; of any session and agent of the namespace.
    pub submission: SubmissionId,
    /// A node of that turn: only this one and its ancestors count as its record. Its invoke: nothing does.
    pub until: Option<NodeHash>,
    /// The session event that replaces one recorded answer of that turn.
    pub repair: Option<NodeHash>,
    /// The model that answers instead of those that the agent asks.
    pub model: Option<Selector>,
}

impl Source {
    /// All that `submission` has on record.
    pub fn whole(submission: SubmissionId) -> Self {
        Self {
            submission,
            until: None,
            repair: None,
            model: None,
        }
    }
}

/// Where a delegated turn comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The turn that delegated it. When that ends without a reply, so does this.
    pub caller: SubmissionId,
    /// The turn that a client asked for, at the beginning of all.
    pub trace: SubmissionId,
    /// How many delegations lead from there to here, from 1.
    pub depth: u32,
}

impl Invoke {
    /// The turn that a client asked for: this one, or the one that it was delegated for.
    pub fn trace(&self) -> &SubmissionId {
        match &self.origin {
            Some(origin) => &origin.trace,
            None => &self.submission,
        }
    }

    /// How many delegations lead here from what a client asked for.
    pub fn depth(&self) -> u32 {
        self.origin.as_ref().map_or(0, |origin| origin.depth)
    }

    /// The node, with the end before it (or the session event) as parent.
    pub fn to_node(&self, parents: Vec<NodeHash>, input: &[u8]) -> Node {
        Node::new(Kind::Invoke, parents, input)
            .with("namespace", &self.namespace)
            .with("agent", &self.agent)
            .with("session", &self.session)
            .with("branch", &self.branch)
            .with("submission", &self.submission)
            .with("turn", self.turn)
            .with_some("previous", self.previous.as_ref())
            .with_some("state", self.state)
            .with("timeout_ms", self.timeout_ms)
            .with_some("caller", self.origin.as_ref().map(|origin| &origin.caller))
            .with_some("trace", self.origin.as_ref().map(|origin| &origin.trace))
            .with_some("depth", self.origin.as_ref().map(|origin| origin.depth))
            .with_some(
                "source",
                self.source.as_ref().map(|source| &source.submission),
            )
            .with_some(
                "until",
                self.source.as_ref().and_then(|source| source.until),
            )
            .with_some(
                "repair",
                self.source.as_ref().and_then(|source| source.repair),
            )
            .with_some(
                "replay_model",
                self.source
                    .as_ref()
                    .and_then(|source| source.model.as_ref()),
            )
    }
}

impl TryFrom<&Node> for Invoke {
    type Error = DecodeError;
    fn try_from(node: &Node) -> Result<Self, DecodeError> {
        node.expect_kind(Kind::Invoke)?;
        let origin = match node.parse_some("caller")? {
            Some(caller) => Some(Origin {
                caller,
                trace: node.parse("trace")?,
                depth: node.parse("depth")?,
            }),
            None => None,
        };
        let source = match node.parse_some("source")? {
            Some(submission) => Some(Source {
                submission,
                until: node.parse_some("until")?,
                repair: node.parse_some("repair")?,
                model: node.parse_some("replay_model")?,
            }),
            None => None,
        };
        Ok(Self {
            namespace: node.parse("namespace")?,
            agent: node.parse("agent")?,
            session: node.parse("session")?,
            branch: node.parse("branch")?,
            submission: node.parse("submission")?,
            turn: node.parse("turn")?,
            previous: node.parse_some("previous")?,
            state: node.parse_some("state")?,
            timeout_ms: node.parse("timeout_ms")?,
            origin,
            source,
        })
    }
}

/// An agent asked a service for something. The body is the request as the service gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Tenant.
    pub namespace: Namespace,
    /// The turn that asks.
    pub submission: SubmissionId,
    /// The agent that asks.
    pub agent: AgentName,
    /// `kv`, `vec`, `infer`, `embed`, `delegate`.
    pub service: String,
    /// `sqlite`, `ollama`, `openai` ….
    pub backend: String,
    /// `get`, `put`, `chat` …: the call below the service.
    pub operation: String,
    /// The model or store; `_` for none.
    pub selector: Selector,
    /// Identity within the turn.
    pub key: CallKey,
    /// How many equal calls the turn made before this one.
    pub k: u64,
    /// The state that the call works on, for storage.
    pub state: Option<StateRoot>,
    /// `X-Vlinder-Checkpoint` of the agent.
    pub label: Option<String>,
    /// When the turn must have ended: bus time, milliseconds since the Unix epoch.
    pub deadline_ms: u64,
}

impl Request {
    /// Whether the call can lead to another state.
    pub fn may_change_state(&self) -> bool {
        may_change_state(&self.service, &self.operation)
    }

    /// The node, with the invoke or the maximal results as parents.
    pub fn to_node(&self, parents: Vec<NodeHash>, body: &[u8]) -> Node {
        Node::new(Kind::Request, parents, body)
            .with("namespace", &self.namespace)
            .with("submission", &self.submission)
            .with("agent", &self.agent)
            .with("service", &self.service)
            .with("backend", &self.backend)
            .with("operation", &self.operation)
            .with("selector", &self.selector)
            .with("key", self.key)
            .with("k", self.k)
            .with_some("state", self.state)
            .with_some("label", self.label.as_ref())
            .with("deadline_ms", self.deadline_ms)
    }
}

impl TryFrom<&Node> for Request {
    type Error = DecodeError;
    fn try_from(node: &Node) -> Result<Self, DecodeError> {
        node.expect_kind(Kind::Request)?;
        Ok(Self {
            namespace: node.parse("namespace")?,
            submission: node.parse("submission")?,
            agent: node.parse("agent")?,
            service: node.parse("service")?,
            backend: node.parse("backend")?,
            operation: node.parse("operation")?,
            selector: node.parse("selector")?,
            key: node.parse("key")?,
            k: node.parse("k")?,
            state: node.parse_some("state")?,
            label: node.parse_some("label")?,
            deadline_ms: node.parse("deadline_ms")?,
        })
    }
}

/// Whether a call of this kind can lead to another state.
pub fn may_change_state(service: &str, operation: &str) -> bool {
    matches!(
        (service, operation),
        ("kv", "put" | "delete") | ("vec", "store" | "delete")
    )
}

/// Whether a call worked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallStatus {
    /// The service did it.
    Ok,
    /// The service refused or failed; the body is `{error: {code, message}}` or the upstream's own.
    Error,
}

/// The answer to a request; its parent is the request. The body is the answer as the agent gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallResult {
    /// The turn that asked.
    pub submission: SubmissionId,
    /// The request's identity within the turn.
    pub key: CallKey,
    /// Whether it worked.
    pub status: CallStatus,
    /// The HTTP status that the agent sees.
    pub http: u16,
    /// The `Content-Type` that the agent sees.
    pub content_type: String,
    /// The state after the call, for storage.
    pub state: Option<StateRoot>,
    /// Whether a `kv get` found something; absent for other calls.
    pub found: Option<bool>,
    /// Tokens read by a model.
    pub tokens_in: Option<u64>,
    /// Tokens written by a model.
    pub tokens_out: Option<u64>,
}

impl CallResult {
    /// The node, with its request as the one parent.
    pub fn to_node(&self, request: NodeHash, body: &[u8]) -> Node {
        Node::new(Kind::Result, vec![request], body)
            .with("submission", &self.submission)
            .with("key", self.key)
            .with(
                "status",
                if self.status == CallStatus::Ok {
                    "ok"
                } else {
                    "error"
                },
            )
            .with("http", self.http)
            .with("content_type", &self.content_type)
            .with_some("state", self.state)
            .with_some("found", self.found)
            .with_some("tokens_in", self.tokens_in)
            .with_some("tokens_out", self.tokens_out)
    }
}

impl TryFrom<&Node> for CallResult {
    type Error = DecodeError;
    fn try_from(node: &Node) -> Result<Self, DecodeError> {
        node.expect_kind(Kind::Result)?;
        let status = match node.field("status") {
            Some("ok") => CallStatus::Ok,
            Some("error") => CallStatus::Error,
            Some(other) => {
                let reason = format!("expected ok or error, found {other:?}");
                return Err(DecodeError::BadField {
                    field: "status",
                    reason,
                });
            }
            None => return Err(DecodeError::MissingField("status")),
        };
        Ok(Self {
            submission: node.parse("submission")?,
            key: node.parse("key")?,
            status,
            http: node.parse("http")?,
            content_type: node.parse("content_type")?,
            state: node.parse_some("state")?,
            found: node.parse_some("found")?,
            tokens_in: node.parse_some("tokens_in")?,
            tokens_out: node.parse_some("tokens_out")?,
        })
    }
}

/// How a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The agent answered; the body is its reply.
    Done,
    /// The agent or something it needs failed; the body says why.
    Failed,
    /// Somebody ended it.
    Cancelled,
    /// It took longer than it may.
    Deadline,
}

impl Outcome {
    /// The name on the wire and in lists.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Deadline => "deadline",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Outcome {
    type Err = String;
    fn from_str(value: &str) -> Result<Self, String> {
        [Self::Done, Self::Failed, Self::Cancelled, Self::Deadline]
            .into_iter()
            .find(|outcome| outcome.as_str() == value)
            .ok_or_else(|| "expected done, failed, cancelled or deadline".to_owned())
    }
}

/// The end of a turn. The first one in the log wins. The body is the reply, or why there is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// Tenant.
    pub namespace: Namespace,
    /// The agent.
    pub agent: AgentName,
    /// The conversation.
    pub session: SessionId,
    /// The branch.
    pub branch: BranchName,
    /// The turn.
    pub submission: SubmissionId,
    /// How it ended.
    pub outcome: Outcome,
    /// The state after it. Only a `done` turn changes the state; others end with what they began.
    pub state: Option<StateRoot>,
    /// A stable word for why a turn failed, e.g. `agent_status`, `agent_died`, `agent_unreachable`.
    pub code: Option<String>,
}

impl End {
    /// The node, with all maximal results (or the invoke) as parents.
    pub fn to_node(&self, parents: Vec<NodeHash>, body: &[u8]) -> Node {
        Node::new(Kind::End, parents, body)
            .with("namespace", &self.namespace)
            .with("agent", &self.agent)
            .with("session", &self.session)
            .with("branch", &self.branch)
            .with("submission", &self.submission)
            .with("outcome", self.outcome)
            .with_some("state", self.state)
            .with_some("code", self.code.as_ref())
    }
}

impl TryFrom<&Node> for End {
    type Error = DecodeError;
    fn try_from(node: &Node) -> Result<Self, DecodeError> {
        node.expect_kind(Kind::End)?;
        Ok(Self {
            namespace: node.parse("namespace")?,
            agent: node.parse("agent")?,
            session: node.parse("session")?,
            branch: node.parse("branch")?,
            submission: node.parse("submission")?,
            outcome: node.parse("outcome")?,
            state: node.parse_some("state")?,
            code: node.parse_some("code")?,
        })
    }
}

/// Something of the installation changed. The body is a JSON document whose shape `what` decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfraEvent {
    /// Tenant.
    pub namespace: Namespace,
    /// `agent`, `fleet`, `model`, `scale`, `secret`, `node`.
    pub what: String,
    /// The name of the agent, fleet, model ….
    pub name: String,
    /// `set` (the body is the whole new value) or `delete`.
    pub verb: String,
}

impl InfraEvent {
    /// The node; its parent is the event before it on the same name.
    pub fn to_node(&self, parents: Vec<NodeHash>, body: &[u8]) -> Node {
        Node::new(Kind::Infra, parents, body)
            .with("namespace", &self.namespace)
            .with("what", &self.what)
            .with("name", &self.name)
            .with("verb", &self.verb)
    }
}

impl TryFrom<&Node> for InfraEvent {
    type Error = DecodeError;
    fn try_from(node: &Node) -> Result<Self, DecodeError> {
        node.expect_kind(Kind::Infra)?;
        Ok(Self {
            namespace: node.parse("namespace")?,
            what: node.parse("what")?,
            name: node.parse("name")?,
            verb: node.parse("verb")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_survive_the_node_form() {
        let invoke = Invoke {
            namespace: Namespace::default_ns(),
            agent: AgentName::new("echo").unwrap(),
            session: SessionId::new("s-1").unwrap(),
            branch: BranchName::main(),
            submission: SubmissionId::new("t-1").unwrap(),
            turn: 3,
            previous: Some(SubmissionId::new("t-0").unwrap()),
            state: Some(StateRoot::from_bytes([9; 32])),
            timeout_ms: 60_000,
            origin: None,
            source: Some(Source {
                until: Some(NodeHash::from_bytes([4; 32])),
                model: Some(Selector::new("smollm2:135m").unwrap()),
                ..Source::whole(SubmissionId::new("t-9").unwrap())
            }),
        };
        let node = invoke.to_node(vec![], b"hello");
        assert_eq!(Invoke::try_from(&node), Ok(invoke));
        assert!(matches!(
            End::try_from(&node),
            Err(DecodeError::WrongKind { .. })
        ));

        let mut broken = node.clone();
        broken.fields.remove("agent");
        assert_eq!(
            Invoke::try_from(&broken),
            Err(DecodeError::MissingField("agent"))
        );
        broken.fields.insert("agent".into(), "../etc".into());
        assert!(matches!(
            Invoke::try_from(&broken),
            Err(DecodeError::BadField { field: "agent", .. })
        ));
    }
}
