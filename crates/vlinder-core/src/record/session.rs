//! What happens to a session as a whole: it begins, gets branches, and one of them becomes the default.

use super::{DecodeError, Kind, Node};
use crate::hash::NodeHash;
use crate::ids::{AgentName, BranchName, Namespace, SessionId, SubmissionId};

/// Where a branch begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BranchStart {
    /// The branch.
    pub branch: BranchName,
    /// The branch that `from` is on.
    pub of: BranchName,
    /// What its first turn follows: the end of a turn; another node of a turn, of which the branch then
    /// holds what led to that node; or, where no turn is named, an event of the session.
    pub from: NodeHash,
    /// The turn that `from` is a node of; `None`: the branch begins where the session does.
    pub submission: Option<SubmissionId>,
}

/// A recorded answer that is replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair {
    /// The turn whose call it is.
    pub turn: SubmissionId,
    /// The request that is answered otherwise.
    pub request: NodeHash,
    /// The HTTP status that the agent sees instead; absent: that of the recorded answer.
    pub http: Option<u16>,
    /// The content type that it sees instead; absent: that of the recorded answer.
    pub content_type: Option<String>,
}

/// What happened to a session as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionVerb {
    /// It began, with its `main` branch.
    Start,
    /// A branch was made.
    Fork(BranchStart),
    /// A branch was made on which one recorded answer is replaced. The body is the new answer.
    Repair(BranchStart, Repair),
    /// A branch became the default one.
    Promote {
        /// The new default.
        branch: BranchName,
        /// The line that was the default, under the dated name that it is kept by; absent in what was
        /// written before there were such names.
        sealed: Option<BranchStart>,
    },
}

impl SessionVerb {
    /// The branch that it makes, if it makes one.
    pub fn starts(&self) -> Option<&BranchStart> {
        match self {
            Self::Start => None,
            Self::Fork(start) | Self::Repair(start, _) => Some(start),
            Self::Promote { sealed, .. } => sealed.as_ref(),
        }
    }
}

/// A session began, got a branch, or had one promoted. The body is empty, but for a repair.
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
    pub fn to_node(&self, parents: Vec<NodeHash>, body: &[u8]) -> Node {
        let node = Node::new(Kind::Session, parents, body)
            .with("namespace", &self.namespace)
            .with("session", &self.session)
            .with("agent", &self.agent)
            .with("name", &self.name);
        match &self.verb {
            SessionVerb::Start => node.with("verb", "start"),
            SessionVerb::Fork(start) => start.on(node.with("verb", "fork"), "branch"),
            SessionVerb::Repair(start, repair) => start
                .on(node.with("verb", "repair"), "branch")
                .with("turn", &repair.turn)
                .with("request", repair.request)
                .with_some("http", repair.http)
                .with_some("content_type", repair.content_type.as_ref()),
            SessionVerb::Promote { branch, sealed } => {
                let node = node.with("verb", "promote").with("branch", branch);
                match sealed {
                    Some(sealed) => sealed.on(node, "sealed"),
                    None => node,
                }
            }
        }
    }
}

impl BranchStart {
    /// Its fields, with the branch under `name`.
    fn on(&self, node: Node, name: &'static str) -> Node {
        node.with(name, &self.branch)
            .with("of", &self.of)
            .with("from", self.from)
            .with_some("submission", self.submission.as_ref())
    }

    fn read(node: &Node, name: &'static str) -> Result<Self, DecodeError> {
        Ok(Self {
            branch: node.parse(name)?,
            of: node.parse("of")?,
            from: node.parse("from")?,
            submission: node.parse_some("submission")?,
        })
    }
}

impl TryFrom<&Node> for SessionEvent {
    type Error = DecodeError;
    fn try_from(node: &Node) -> Result<Self, DecodeError> {
        node.expect_kind(Kind::Session)?;
        let verb = match node.field("verb") {
            Some("start") => SessionVerb::Start,
            Some("fork") => SessionVerb::Fork(BranchStart::read(node, "branch")?),
            Some("repair") => SessionVerb::Repair(
                BranchStart::read(node, "branch")?,
                Repair {
                    turn: node.parse("turn")?,
                    request: node.parse("request")?,
                    http: node.parse_some("http")?,
                    content_type: node.parse_some("content_type")?,
                },
            ),
            Some("promote") => SessionVerb::Promote {
                branch: node.parse("branch")?,
                sealed: match node.field("sealed") {
                    Some(_) => Some(BranchStart::read(node, "sealed")?),
                    None => None,
                },
            },
            Some(other) => {
                let reason = format!("expected start, fork, repair or promote, found {other:?}");
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_the_node_form() {
        let branch = |name: &str| BranchName::new(name).unwrap();
        let turn = SubmissionId::new("t-1").unwrap();
        let start = |submission| BranchStart {
            branch: branch("other"),
            of: branch("main"),
            from: NodeHash::from_bytes([3; 32]),
            submission,
        };
        let repair = Repair {
            turn: turn.clone(),
            request: NodeHash::from_bytes([5; 32]),
            http: Some(200),
            content_type: None,
        };
        for verb in [
            SessionVerb::Start,
            SessionVerb::Fork(start(Some(turn.clone()))),
            SessionVerb::Fork(start(None)),
            SessionVerb::Repair(start(None), repair),
            SessionVerb::Promote {
                branch: branch("other"),
                sealed: None,
            },
            SessionVerb::Promote {
                branch: branch("other"),
                sealed: Some(BranchStart {
                    branch: branch("main-2026-11-25"),
                    ..start(Some(turn))
                }),
            },
        ] {
            let event = SessionEvent {
                namespace: Namespace::default_ns(),
                session: SessionId::new("s-1").unwrap(),
                agent: AgentName::new("echo").unwrap(),
                name: "s-1".to_owned(),
                verb,
            };
            let node = event.to_node(vec![], b"");
            assert_eq!(SessionEvent::try_from(&node), Ok(event));
            let mut broken = node.clone();
            broken.fields.insert("verb".into(), "explode".into());
            assert!(SessionEvent::try_from(&broken).is_err());
        }
    }
}
