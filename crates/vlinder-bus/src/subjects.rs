//! Every subject of the bus, built and parsed from typed ids. No other module formats subjects.
//!
//! ```text
//! vlinder.v1.<ns>.invoke.<agent>.<session>.<branch>    LOG   a turn begins; the branch head
//! vlinder.v1.<ns>.invoke.<agent>_.<session>.<branch>   LOG   the same in a session that an agent began
//! vlinder.v1.<ns>.req.<service>.<backend>.<selector>   LOG   work for a service
//! vlinder.v1.<ns>.res.<submission>.call | .end         LOG   answers of a turn; its end. What a replayed
//!                                                            turn asked and the record answered is on .call, too
//! vlinder.v1.<ns>.session.<session>                    CTL   start, fork, repair, promote
//! vlinder.v1.<ns>.infra.<what>.<name>                  CTL   deploy, delete, scale …
//! vlinder.v1._sys.dead                                 SYS   dead letters
//! seen.v1.<ns>.…                                       –     what LOG and CTL stored, republished
//! sig.v1.<ns>.…                                        –     signals: not stored
//! ```
//!
//! A token that may hold anything (model, store, node) is written with every byte outside
//! `A-Za-z0-9-_` as `=XX`; the lone `_` stands for "none".

use std::fmt;
use vlinder_core::{AgentName, BranchName, Namespace, NodeName, Selector, SessionId, SubmissionId};

/// A typed subject of a stored message.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Subject {
    /// A turn begins; also the head of its branch, and where the branch is sealed.
    Invoke {
        ns: Namespace,
        agent: AgentName,
        session: SessionId,
        branch: BranchName,
    },
    /// Work for a service.
    Req {
        ns: Namespace,
        service: String,
        backend: String,
        selector: Selector,
    },
    /// The answers of a turn.
    Call {
        ns: Namespace,
        submission: SubmissionId,
    },
    /// The end of a turn: the first message wins.
    End {
        ns: Namespace,
        submission: SubmissionId,
    },
    /// What happens to a session as a whole.
    Session { ns: Namespace, session: SessionId },
    /// Deploy, delete, scale ….
    Infra {
        ns: Namespace,
        what: String,
        name: String,
    },
    /// Dead letters of every namespace.
    Dead,
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invoke {
                ns,
                agent,
                session,
                branch,
            } => {
                let mark = delegation_mark(session);
                write!(f, "vlinder.v1.{ns}.invoke.{agent}{mark}.{session}.{branch}")
            }
            Self::Req {
                ns,
                service,
                backend,
                selector,
            } => write!(
                f,
                "vlinder.v1.{ns}.req.{}.{}.{}",
                encode(service),
                encode(backend),
                encode_selector(selector)
            ),
            Self::Call { ns, submission } => write!(f, "vlinder.v1.{ns}.res.{submission}.call"),
            Self::End { ns, submission } => write!(f, "vlinder.v1.{ns}.res.{submission}.end"),
            Self::Session { ns, session } => write!(f, "vlinder.v1.{ns}.session.{session}"),
            Self::Infra { ns, what, name } => {
                write!(f, "vlinder.v1.{ns}.infra.{}.{}", encode(what), encode(name))
            }
            Self::Dead => f.write_str("vlinder.v1._sys.dead"),
        }
    }
}

impl Subject {
    /// Reads a stored subject back; `None` for what is not ours.
    pub fn parse(text: &str) -> Option<Self> {
        let tokens: Vec<&str> = text.split('.').collect();
        let ["vlinder", "v1", ns, rest @ ..] = tokens.as_slice() else {
            return None;
        };
        if (*ns, rest) == ("_sys", &["dead"][..]) {
            return Some(Self::Dead);
        }
        let ns = Namespace::new(ns).ok()?;
        match rest {
            ["invoke", agent, session, branch] => {
                let session = SessionId::new(session).ok()?;
                let agent = agent.strip_suffix(delegation_mark(&session))?;
                Some(Self::Invoke {
                    ns,
                    agent: AgentName::new(agent).ok()?,
                    session,
                    branch: BranchName::new(branch).ok()?,
                })
            }
            ["req", service, backend, selector] => Some(Self::Req {
                ns,
                service: decode(service)?,
                backend: decode(backend)?,
                selector: decode_selector(selector)?,
            }),
            ["res", submission, "call"] => Some(Self::Call {
                ns,
                submission: SubmissionId::new(submission).ok()?,
            }),
            ["res", submission, "end"] => Some(Self::End {
                ns,
                submission: SubmissionId::new(submission).ok()?,
            }),
            ["session", session] => Some(Self::Session {
                ns,
                session: SessionId::new(session).ok()?,
            }),
            ["infra", what, name] => Some(Self::Infra {
                ns,
                what: decode(what)?,
                name: decode(name)?,
            }),
            _ => None,
        }
    }
}

/// What stands behind the agent of a delegated turn. Those have a queue of their own, so that turns of
/// clients that wait for them cannot stand before them.
fn delegation_mark(session: &SessionId) -> &'static str {
    if session.is_delegated() { "_" } else { "" }
}

/// Everything stored in a namespace's streams.
pub fn all_of(ns: &Namespace) -> String {
    format!("vlinder.v1.{ns}.>")
}

/// Filters of the `LOG` stream of a namespace.
pub fn log_subjects(ns: &Namespace) -> Vec<String> {
    ["invoke", "req", "res", "delegate"]
        .iter()
        .map(|kind| format!("vlinder.v1.{ns}.{kind}.>"))
        .collect()
}

/// Filters of the `CTL` stream of a namespace.
pub fn ctl_subjects(ns: &Namespace) -> Vec<String> {
    ["session", "infra"]
        .iter()
        .map(|kind| format!("vlinder.v1.{ns}.{kind}.>"))
        .collect()
}

/// Filters of the `SYS` stream.
pub fn sys_subjects() -> Vec<String> {
    vec!["vlinder.v1._sys.>".to_owned()]
}

/// All turns that agents have delegated to an agent.
pub fn delegations_to(ns: &Namespace, agent: &AgentName) -> String {
    format!("vlinder.v1.{ns}.invoke.{agent}_.>")
}

/// All turns that clients have asked of an agent.
pub fn invokes_of(ns: &Namespace, agent: &AgentName) -> String {
    format!("vlinder.v1.{ns}.invoke.{agent}.>")
}

/// All turns of a session, on every branch.
pub fn invokes_of_session(ns: &Namespace, agent: &AgentName, session: &SessionId) -> String {
    let mark = delegation_mark(session);
    format!("vlinder.v1.{ns}.invoke.{agent}{mark}.{session}.*")
}

/// All turns of a namespace.
pub fn all_invokes(ns: &Namespace) -> String {
    format!("vlinder.v1.{ns}.invoke.>")
}

/// The ends of all turns of a namespace.
pub fn all_ends(ns: &Namespace) -> String {
    format!("vlinder.v1.{ns}.res.*.end")
}

/// Everything that the turns of a namespace asked a service for.
pub fn all_requests(ns: &Namespace) -> String {
    format!("vlinder.v1.{ns}.req.>")
}

/// The end of one turn.
pub fn end_of(ns: &Namespace, submission: &SubmissionId) -> String {
    format!("vlinder.v1.{ns}.res.{submission}.end")
}

/// All infra events of a namespace.
pub fn infra_of(ns: &Namespace) -> String {
    format!("vlinder.v1.{ns}.infra.>")
}

/// All answers of a turn and its end.
pub fn answers_of(ns: &Namespace, submission: &SubmissionId) -> String {
    format!("vlinder.v1.{ns}.res.{submission}.*")
}

/// Where the server republishes what it stored under `stored`.
pub fn seen(stored: &str) -> String {
    match stored.strip_prefix("vlinder.") {
        Some(rest) => format!("seen.{rest}"),
        None => stored.to_owned(),
    }
}

/// The stored subject of a republished one.
pub fn unseen(republished: &str) -> Option<String> {
    republished
        .strip_prefix("seen.")
        .map(|rest| format!("vlinder.{rest}"))
}

/// Signal: token chunks and progress of a turn, for whoever watches it.
pub fn chunk_signal(ns: &Namespace, submission: &SubmissionId) -> String {
    format!("sig.v1.{ns}.chunk.{submission}")
}

/// Signal: the streamed body of the answer to one request, for the bridge that asked. Each piece is its
/// offset in the answer, the number of the answer (another for each time that the call is made; both
/// eight bytes, big-endian), and its bytes.
pub fn answer_signal(
    ns: &Namespace,
    submission: &SubmissionId,
    key: &vlinder_core::CallKey,
) -> String {
    format!("sig.v1.{ns}.answer.{submission}.{key}")
}

/// Signal: a command to the supervisor of one node.
pub fn node_signal(node: &NodeName) -> String {
    format!("sig.v1._sys.node.{}", encode(node.as_str()))
}

/// The durable consumer behind an agent.
pub fn agent_queue(agent: &AgentName) -> String {
    format!("agent-{agent}")
}

/// The durable consumer behind what is delegated to an agent.
pub fn delegation_queue(agent: &AgentName) -> String {
    format!("delegate-{agent}")
}

/// The durable consumer behind a service's backend and selector.
pub fn service_queue(service: &str, backend: &str, selector: &Selector) -> String {
    format!(
        "svc-{}-{}-{}",
        encode(service),
        encode(backend),
        encode_selector(selector)
    )
}

/// Writes any text as one subject token.
pub fn encode(text: &str) -> String {
    let mut token = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' => token.push(byte as char),
            b'_' if text != "_" => token.push('_'),
            _ => token.push_str(&format!("={byte:02X}")),
        }
    }
    token
}

fn encode_selector(selector: &Selector) -> String {
    if *selector == Selector::none() {
        "_".to_owned()
    } else {
        encode(selector.as_str())
    }
}

/// Reads a token that [`encode`] wrote; `None` if it is not of that form.
pub fn decode(token: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(token.len());
    let mut rest = token.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'=' => {
                let (high, low) = (hex_digit(rest.next()?)?, hex_digit(rest.next()?)?);
                bytes.push(high << 4 | low);
            }
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => bytes.push(byte),
            _ => return None,
        }
    }
    String::from_utf8(bytes).ok()
}

fn hex_digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'A'..=b'F' => Some(byte - b'A' + 10),
        _ => None,
    }
}

fn decode_selector(token: &str) -> Option<Selector> {
    if token == "_" {
        Some(Selector::none())
    } else {
        Selector::new(decode(token)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn subjects_survive_text(
            service in "[a-z]{1,8}", backend in "\\PC{1,20}", selector in "[ -~]{1,60}",
            agent in "[a-z0-9-]{1,63}", session in "[A-Za-z0-9_-]{1,64}", branch in "[A-Za-z0-9_-]{1,64}",
        ) {
            let ns = Namespace::default_ns();
            let session = SessionId::new(session).unwrap();
            let submission = SubmissionId::new(session.as_str()).unwrap();
            let all = [
                Subject::Req { ns: ns.clone(), service: service.clone(), backend: backend.clone(), selector: Selector::new(selector).unwrap() },
                Subject::Invoke { ns: ns.clone(), agent: AgentName::new(agent).unwrap(), session: session.clone(), branch: BranchName::new(branch).unwrap() },
                Subject::Call { ns: ns.clone(), submission: submission.clone() },
                Subject::End { ns: ns.clone(), submission },
                Subject::Session { ns: ns.clone(), session },
                Subject::Infra { ns, what: service, name: backend },
                Subject::Dead,
            ];
            for subject in all {
                let text = subject.to_string();
                prop_assert!(!text.contains(['*', '>', ' ']));
                prop_assert_eq!(Subject::parse(&text), Some(subject));
            }
        }

        #[test]
        fn hostile_subjects_do_not_panic(text in "\\PC{0,80}") {
            let _ = Subject::parse(&text);
            let _ = Subject::parse(&format!("vlinder.v1.default.req.{text}"));
        }
    }

    #[test]
    fn none_and_underscore_differ() {
        assert_eq!(encode("_"), "=5F");
        assert_eq!(encode("a_b"), "a_b");
        assert_eq!(decode("=5"), None);
        assert_eq!(decode("a.b"), None);
    }
}
