//! What a replay runs again: which turns of which line, how much of each counts as record, and where the new
//! turns go.

use crate::harness::Shared;
use crate::harness::points::Where;
use crate::harness::sessions::Session;
use crate::status;
use futures::{StreamExt, TryStreamExt};
use tonic::Status;
use vlinder_bus::{Stored, Subject};
use vlinder_core::record::{BranchStart, End, Repair, Source};
use vlinder_core::{
    AgentName, BODY_BYTES_MAX, BranchName, ContentHash, NodeHash, Selector, SessionId, SubmissionId,
};
use vlinder_proto::harness as proto;
use vlinder_worker::turns::{self, LineError, Step, TurnRecord};

/// Turns of one replay.
const TURNS_MAX: usize = 10_000;
/// Turns whose ends are read at once.
const READS_AT_ONCE: usize = 16;
/// Ends of one turn that are read: one, and those that lost a race with it.
const ENDS_MAX: usize = 1000;
/// Longest content type of a new answer, in bytes.
const CONTENT_TYPE_MAX: usize = 255;

/// A turn that is run again.
pub struct Again {
    pub step: Step,
    pub end: Option<(End, Stored)>,
    pub source: Source,
}

/// Where the new turns go.
pub enum Target {
    /// To a new branch of the same session.
    Branch(BranchStart),
    /// To a new session of another agent.
    Session { id: SessionId, agent: AgentName },
}

/// A replay, checked.
pub struct Plan {
    pub session: SessionId,
    pub branch: BranchName,
    pub turns: Vec<Again>,
    pub target: Target,
    /// What the same request is to be called to go on.
    pub name: String,
    pub repair: Option<(Repair, Vec<u8>)>,
}

/// Makes the plan of a request; nothing is stored yet.
pub async fn plan(shared: &Shared, request: proto::ReplayRequest) -> Result<Plan, Status> {
    status::namespace(&request.namespace)?;
    let id = SessionId::new(&request.session).map_err(status::of_id)?;
    let agent = match request.agent.as_str() {
        "" => None,
        agent => Some(AgentName::new(agent).map_err(status::of_id)?),
    };
    let model = match request.model.as_str() {
        "" => None,
        model => Some(Selector::new(model).map_err(status::of_id)?),
    };
    check_together(&request)?;
    let session = shared.sessions.need(&id).await?;
    let branch = match request.branch.as_str() {
        "" => session.default_branch.clone(),
        branch => BranchName::new(branch).map_err(status::of_id)?,
    };
    let line = Line::read(shared, &id, &session, &branch).await?;
    let range = line.range(shared, &id, &session, &request).await?;
    let repair = match request.repair {
        Some(asked) => Some(
            line.repair(shared, &id, &session, asked, range.start)
                .await?,
        ),
        None => None,
    };
    let until = match request.until.as_str() {
        "" => None,
        until => Some(line.point(shared, &id, &session, until, "until").await?),
    };
    let mut turns = line.turns;
    let before = range
        .start
        .checked_sub(1)
        .map(|index| turns[index].0.invoke.branch.clone());
    turns.truncate(range.end);
    let turns: Vec<Again> = turns
        .into_iter()
        .enumerate()
        .skip(range.start)
        .map(|(index, (step, end))| {
            let nothing = Some(step.stored.hash);
            let until = match &until {
                _ if request.live => nothing,
                Some((at, _, _)) if index > *at => nothing,
                // An end follows from all that counts of its turn.
                Some((_, _, Where::End | Where::LateEnd)) => None,
                Some((at, node, _)) if index == *at => Some(*node),
                _ => None,
            };
            let source = Source {
                until,
                model: model.clone(),
                ..Source::whole(step.invoke.submission.clone())
            };
            Again { step, end, source }
        })
        .collect();
    let first = &turns[0].step;
    let (target, name) = match agent {
        Some(agent) => {
            let name = named(&request.name, "replay")?;
            let what = format!("vlinder.replay.session.v1/{id}/{branch}/{agent}/{name}");
            let hash = ContentHash::of(what.as_bytes()).to_string();
            let new = SessionId::new(format!("replay-{}", &hash[..32])).map_err(status::of_id)?;
            (Target::Session { id: new, agent }, name)
        }
        None => {
            let kind = if repair.is_some() { "repair" } else { "replay" };
            let name = named(&request.name, kind)?;
            let parent = first.stored.node.parents.first().copied();
            let start = BranchStart {
                branch: BranchName::new(&name).map_err(status::of_id)?,
                of: before.unwrap_or_else(|| first.invoke.branch.clone()),
                from: parent.ok_or_else(|| Status::data_loss("a turn that follows nothing"))?,
                submission: first.invoke.previous.clone(),
            };
            (Target::Branch(start), name)
        }
    };
    Ok(Plan {
        session: id,
        branch,
        turns,
        target,
        name,
        repair,
    })
}

/// What does not go together.
fn check_together(request: &proto::ReplayRequest) -> Result<(), Status> {
    let bad = |message: &str| Err(Status::invalid_argument(message));
    let part = !request.turn.is_empty() || !request.from.is_empty();
    if !request.agent.is_empty() && (part || request.repair.is_some()) {
        return bad(
            "agent: another agent runs whole lines; it cannot begin in the middle of a conversation",
        );
    }
    if !request.turn.is_empty() && !request.from.is_empty() {
        return bad("turn and from: give one of them");
    }
    if request.live && !request.until.is_empty() {
        return bad("live and until: give one of them; with live nothing counts as record");
    }
    let repairs = request.repair.is_some();
    if repairs && (part || request.live || !request.until.is_empty()) {
        return bad(
            "a repair begins with the turn of the repaired call, and all before it counts as record",
        );
    }
    Ok(())
}

/// The name as it was given, or a new one.
fn named(asked: &str, kind: &str) -> Result<String, Status> {
    let name = match asked {
        "" => format!("{kind}-{:08x}", rand::random::<u32>()),
        asked => asked.to_owned(),
    };
    let name = BranchName::new(&name).map_err(status::of_id)?;
    Ok(name.to_string())
}

/// A line with the ends of its turns.
struct Line {
    turns: Vec<(Step, Option<(End, Stored)>)>,
    /// The first turn behind the last place where the line leaves a turn before its end.
    whole_from: usize,
}

impl Line {
    async fn read(
        shared: &Shared,
        id: &SessionId,
        session: &Session,
        branch: &BranchName,
    ) -> Result<Self, Status> {
        let known = session.need_branch(branch)?;
        let own = turns::on_branch(&shared.cx, &session.agent, id, branch).await;
        let own = own.map_err(status::of_bus)?;
        let own = own.into_iter().rfind(|(stored, _)| !stored.is_displaced());
        let start = known.start.as_ref();
        let (last, left_at) = match (own, start.and_then(|start| start.submission.clone())) {
            (Some((_, invoke)), _) => (invoke.submission, None),
            (None, Some(submission)) => (submission, start.map(|start| start.from)),
            (None, None) => {
                return Err(Status::failed_precondition(format!(
                    "branch {branch} of session {id} has no turns yet"
                )));
            }
        };
        let steps = turns::line(&shared.cx, &session.agent, id, branch, &last, left_at).await;
        let steps = steps.map_err(|error| match error {
            LineError::Bus(error) => status::of_bus(error),
            LineError::Broken(why) => Status::data_loss(why),
        })?;
        let looks: Vec<_> = steps.iter().map(|step| ends_of(shared, step)).collect();
        let ends: Vec<Ends> = futures::stream::iter(looks)
            .buffered(READS_AT_ONCE)
            .try_collect()
            .await?;
        let cut = ends.iter().rposition(|ends| ends.is_left_inside);
        Ok(Self {
            turns: steps
                .into_iter()
                .zip(ends.into_iter().map(|ends| ends.first))
                .collect(),
            whole_from: cut.map_or(0, |index| index + 1),
        })
    }

    /// The place of a turn on the line.
    fn position(&self, turn: &SubmissionId) -> Result<usize, Status> {
        let mut turns = self.turns.iter();
        turns
            .position(|(step, _)| step.invoke.submission == *turn)
            .ok_or_else(|| {
                Status::not_found(format!(
                    "turn {turn} is not on this line; name the branch that it is on"
                ))
            })
    }

    /// A node of the line: in which turn, which, and what it is.
    async fn point(
        &self,
        shared: &Shared,
        id: &SessionId,
        session: &Session,
        text: &str,
        field: &str,
    ) -> Result<(usize, NodeHash, Where), Status> {
        let found = shared.sessions.find_node(id, session, text, None).await;
        let point = found
            .map_err(|error| Status::new(error.code(), format!("{field}: {}", error.message())))?;
        let at = self.position(&point.invoke.submission)?;
        Ok((at, point.hash, point.is))
    }

    /// The turns that are run.
    async fn range(
        &self,
        shared: &Shared,
        id: &SessionId,
        session: &Session,
        request: &proto::ReplayRequest,
    ) -> Result<std::ops::Range<usize>, Status> {
        let end = self.turns.len();
        let range = if let Some(repair) = &request.repair {
            let (at, _, _) = self
                .point(shared, id, session, &repair.node, "node")
                .await?;
            at..if repair.only { at + 1 } else { end }
        } else if !request.turn.is_empty() {
            let turn = SubmissionId::new(&request.turn).map_err(status::of_id)?;
            let at = self.position(&turn)?;
            at..at + 1
        } else if !request.from.is_empty() {
            let (at, _, _) = self
                .point(shared, id, session, &request.from, "from")
                .await?;
            at..end
        } else if request.agent.is_empty() {
            self.whole_from..end
        } else {
            0..end
        };
        if range.len() > 1 && range.start < self.whole_from {
            return Err(Status::failed_precondition(
                "the line leaves a turn before its end, where a branch was forked inside of it; it can be run again from behind that place on, or turn by turn",
            ));
        }
        if range.is_empty() {
            return Err(Status::failed_precondition(
                "the line has no turn that can be run again as a whole; name one",
            ));
        }
        if range.len() > TURNS_MAX {
            return Err(Status::invalid_argument(format!(
                "the line has {} turns, a replay at most {TURNS_MAX}; begin later on it",
                range.len()
            )));
        }
        Ok(range)
    }

    /// What is replaced, checked against the record.
    async fn repair(
        &self,
        shared: &Shared,
        id: &SessionId,
        session: &Session,
        asked: proto::RepairAnswer,
        at: usize,
    ) -> Result<(Repair, Vec<u8>), Status> {
        let bad = |message: String| Err(Status::invalid_argument(message));
        if asked.answer.len() as u64 > BODY_BYTES_MAX {
            return bad(format!(
                "answer: {} bytes, expected at most {BODY_BYTES_MAX}",
                asked.answer.len()
            ));
        }
        let http = match asked.http {
            0 => None,
            http @ 200..=599 => Some(http as u16),
            http => return bad(format!("http: {http}, expected a status from 200 to 599")),
        };
        let content_type = Some(asked.content_type).filter(|text| !text.is_empty());
        if content_type.as_ref().is_some_and(|text| {
            text.len() > CONTENT_TYPE_MAX || !text.bytes().all(|b| (0x20..0x7f).contains(&b))
        }) {
            return bad(format!(
                "content_type: expected at most {CONTENT_TYPE_MAX} printable ASCII characters"
            ));
        }
        let (_, node, is) = self.point(shared, id, session, &asked.node, "node").await?;
        let request = match is {
            Where::Request => node,
            Where::Result(Some(request)) => request,
            Where::Result(None) | Where::Invoke | Where::End | Where::LateEnd => {
                return bad("node: expected the hash of a call's request or result".to_owned());
            }
        };
        let step = &self.turns[at].0;
        let read = TurnRecord::read(&shared.cx, &step.stored, step.invoke.clone(), false).await;
        let read = read.map_err(status::of_bus)?;
        // Of several answers to a call the first one counts.
        let answers = read.answers(|_| true);
        if !answers.iter().any(|given| given.request() == Some(request)) {
            return Err(Status::failed_precondition(format!(
                "node: {request} has no answer that the turn went on with, so there is none to replace"
            )));
        }
        let repair = Repair {
            turn: step.invoke.submission.clone(),
            request,
            http,
            content_type,
        };
        Ok((repair, asked.answer))
    }
}

/// The ends of a turn.
struct Ends {
    first: Option<(End, Stored)>,
    /// The line goes on from another node of the turn.
    is_left_inside: bool,
}

async fn ends_of(shared: &Shared, step: &Step) -> Result<Ends, Status> {
    let subject = Subject::End {
        ns: shared.cx.ns.clone(),
        submission: step.invoke.submission.clone(),
    };
    let ends = shared
        .cx
        .bus
        .all_on(&shared.cx.log(), &subject, ENDS_MAX)
        .await;
    let ends = ends.map_err(status::of_bus)?;
    let left_at = step.left_at;
    let is_left_inside = left_at.is_some_and(|left_at| !ends.iter().any(|end| end.hash == left_at));
    let first = ends.into_iter().min_by_key(Stored::rank);
    let first = first.and_then(|stored| Some((End::try_from(&stored.node).ok()?, stored)));
    Ok(Ends {
        first,
        is_left_inside,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_go_together_is_refused() {
        let request = proto::ReplayRequest::default;
        let text = || "aaaa".to_owned();
        assert!(check_together(&request()).is_ok());
        for bad in [
            proto::ReplayRequest {
                agent: text(),
                turn: text(),
                ..request()
            },
            proto::ReplayRequest {
                agent: text(),
                from: text(),
                ..request()
            },
            proto::ReplayRequest {
                turn: text(),
                from: text(),
                ..request()
            },
            proto::ReplayRequest {
                live: true,
                until: text(),
                ..request()
            },
            proto::ReplayRequest {
                live: true,
                repair: Some(proto::RepairAnswer::default()),
                ..request()
            },
            proto::ReplayRequest {
                agent: text(),
                repair: Some(proto::RepairAnswer::default()),
                ..request()
            },
        ] {
            assert!(check_together(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_are_those_of_branches() {
        assert_eq!(named("fix", "replay").unwrap(), "fix");
        assert!(named("../x", "replay").is_err());
        assert_ne!(named("", "replay").unwrap(), named("", "replay").unwrap());
    }
}
