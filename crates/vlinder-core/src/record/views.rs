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

/// What happened to a session as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionVerb {
    /// It began, with its `main` branch.
    Start,
    /// A branch was made that begins at `from`: an end, whose turn is the last of the new branch.
    Fork {
        /// The new branch.
        branch: BranchName,
        /// The branch that `from` is on.
        of: BranchName,
        /// The end node that the new branch begins at.
        from: NodeHash,
        /// The turn that `from` ends.
        submission: SubmissionId,
    },
    /// A branch became the default one.
    Promote {
        /// The new default.
        branch: BranchName,
    },
}

/// A session began, was forked, or had a branch promoted. The body is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionEvent {
    /// Tenant.
    pub namespace: Namespace,
    /// The session.
    pub session: SessionId,
    /// The agent it talks to.
    pub agent: AgentName,
    /// A name for people; the id where none was given.
    pub name: String,
    /// What happened.
    pub verb: SessionVerb,
}

impl SessionEvent {
    /// The node; its parent is the session event before it.
    pub fn to_node(&self, parents: Vec<NodeHash>) -> Node {
        let node = Node::new(Kind::Session, parents, b"")
            .with("namespace", &self.namespace)
            .with("session", &self.session)
            .with("agent", &self.agent)
            .with("name", &self.name);
        match &self.verb {
            SessionVerb::Start => node.with("verb", "start"),
            SessionVerb::Fork {
                branch,
                of,
                from,
                submission,
            } => node
                .with("verb", "fork")
                .with("branch", branch)
                .with("of", of)
                .with("from", from)
                .with("submission", submission),
            SessionVerb::Promote { branch } => node.with("verb", "promote").with("branch", branch),
        }
    }
}

impl TryFrom<&Node> for SessionEvent {
    type Error = DecodeError;
    fn try_from(node: &Node) -> Result<Self, DecodeError> {
        node.expect_kind(Kind::Session)?;
        let verb = match node.field("verb") {
            Some("start") => SessionVerb::Start,
            Some("fork") => SessionVerb::Fork {
                branch: node.parse("branch")?,
                of: node.parse("of")?,
                from: node.parse("from")?,
                submission: node.parse("submission")?,
            },
            Some("promote") => SessionVerb::Promote {
                branch: node.parse("branch")?,
            },
            Some(other) => {
                let reason = format!("expected start, fork or promote, found {other:?}");
                return Err(DecodeError::BadField {
                    field: "verb",
                    reason,
                });
            }
            None => return Err(DecodeError::MissingField("verb")),
        };
        Ok(Self {
            namespace: node.parse("namespace")?,
            session: node.parse("session")?,
            agent: node.parse("agent")?,
            name: node.parse("name")?,
            verb,
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
