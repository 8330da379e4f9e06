//! `ListSessions`, `GetSession`, `ListBranches`.

use super::{ANSWER_BYTES_MAX, LIST_ROWS, StateService, invalid, parse_session, rows_of};
use crate::bodies::TEXT_BYTES_MAX;
use crate::convert;
use crate::error::Error;
use crate::query;
use crate::query::line::{self, Bounds, Line};
use crate::query::sessions::{self, BranchRow, Page, SessionRow};
use rusqlite::Connection;
use vlinder_core::{AgentName, BranchName, Namespace, SessionId, SubmissionId};
use vlinder_proto::state as proto;

/// Most turns of one `GetSession`. Earlier ones are asked for with `before`.
pub const SESSION_TURNS_MAX: usize = 10_000;
/// Calls that `GetSession` shows of one turn. `GetTurn` shows more.
pub const SESSION_CALLS_MAX: usize = 1000;

impl StateService {
    pub(super) async fn sessions(
        &self,
        request: proto::ListSessionsRequest,
    ) -> Result<proto::ListSessionsResponse, Error> {
        self.check_namespace(&request.namespace)?;
        if !request.agent.is_empty() {
            AgentName::new(&request.agent).map_err(|error| invalid("agent", error))?;
        }
        let page = match request.before.as_str() {
            "" => None,
            text => Some(parse_page(text)?),
        };
        let limit = rows_of(request.limit, LIST_ROWS);
        let mut found = self
            .query(move |connection, ns| {
                sessions::list(connection, ns, &request.agent, limit + 1, page.as_ref())
            })
            .await?;
        let more = found.len() > limit;
        found.truncate(limit);
        let next = match found.last() {
            Some(last) if more => format!("{}:{}", last.active_ms, last.id),
            _ => String::new(),
        };
        let sessions = found.into_iter().map(convert::session_summary).collect();
        Ok(proto::ListSessionsResponse { sessions, next })
    }

    pub(super) async fn session(
        &self,
        request: proto::GetSessionRequest,
    ) -> Result<proto::Session, Error> {
        self.check_namespace(&request.namespace)?;
        let wanted = parse_session(&request.session)?;
        if !request.branch.is_empty() {
            BranchName::new(&request.branch).map_err(|error| invalid("branch", error))?;
        }
        if !request.before.is_empty() {
            SubmissionId::new(&request.before).map_err(|error| invalid("before", error))?;
        }
        let bounds = Bounds {
            turns: rows_of(request.limit, (SESSION_TURNS_MAX, SESSION_TURNS_MAX)),
            bytes: ANSWER_BYTES_MAX,
            text: TEXT_BYTES_MAX as u64,
            calls: SESSION_CALLS_MAX,
        };
        let (branch, before) = (request.branch, request.before);
        let found = self
            .query(move |connection, ns| {
                read_session(connection, ns, &wanted, &branch, &before, bounds)
            })
            .await?;
        let earlier = match found.line.turns.first() {
            Some((turn, _, _)) if found.line.more => turn.submission.clone(),
            _ => String::new(),
        };
        Ok(proto::Session {
            turns: self.turns_with_texts(found.line).await?,
            id: found.session.id,
            name: found.session.name,
            agent: found.session.agent,
            default_branch: found.session.default_branch,
            started_at: found.session.started_ms,
            branch: found.branch.name,
            sealed: found.branch.sealed,
            turns_total: found.turns_total,
            earlier,
        })
    }

    pub(super) async fn branches(
        &self,
        request: proto::ListBranchesRequest,
    ) -> Result<proto::ListBranchesResponse, Error> {
        self.check_namespace(&request.namespace)?;
        let wanted = parse_session(&request.session)?;
        let branches = self
            .query(move |connection, ns| {
                let session = sessions::find(connection, ns, &wanted)?;
                sessions::branches(connection, ns, &session.id)
            })
            .await?;
        let branches = branches.into_iter().map(convert::branch).collect();
        Ok(proto::ListBranchesResponse { branches })
    }
}

/// A session with a part of the line of one of its branches.
struct FoundSession {
    session: SessionRow,
    branch: BranchRow,
    line: Line,
    turns_total: u64,
}

fn read_session(
    connection: &Connection,
    ns: &Namespace,
    wanted: &str,
    branch: &str,
    before: &str,
    bounds: Bounds,
) -> Result<FoundSession, Error> {
    let session = sessions::find(connection, ns, wanted)?;
    let mut branches = sessions::branches(connection, ns, &session.id)?;
    let name = match branch {
        "" => session.default_branch.as_str(),
        name => name,
    };
    let Some(at) = branches.iter().position(|branch| branch.name == name) else {
        let names: Vec<&str> = branches.iter().map(|branch| branch.name.as_str()).collect();
        return Err(Error::NotFound {
            what: format!("branch {name} of session {}", session.id),
            hint: format!("; it has: {}", names.join(", ")),
        });
    };
    let branch = branches.swap_remove(at);
    let turns_total = match branch.tip() {
        Some(tip) => line::length(connection, tip)?,
        None => 0,
    };
    let last = match before {
        // A branch without turns of its own begins inside or behind the turn that it was forked from.
        "" => branch.tip().map(|tip| {
            (
                tip,
                branch.forked_from.filter(|_| branch.last_turn.is_none()),
            )
        }),
        before => turn_before(connection, ns, &session.id, before)?,
    };
    let line = match last {
        Some(last) => line::read(connection, ns, last, bounds)?,
        None => Line::default(),
    };
    Ok(FoundSession {
        session,
        branch,
        line,
        turns_total,
    })
}

/// The turn before `submission` on its line, and the node of it that the line goes on from.
fn turn_before(
    connection: &Connection,
    ns: &Namespace,
    session: &str,
    submission: &str,
) -> Result<Option<line::Tip>, Error> {
    match query::previous_turn(connection, ns, session, submission)? {
        Some(previous) => Ok(previous),
        None => Err(Error::NotFound {
            what: format!("turn {submission} of session {session}"),
            hint: String::new(),
        }),
    }
}

/// What `ListSessions` gave as `next`: `<milliseconds>:<session id>`.
fn parse_page(text: &str) -> Result<Page, Error> {
    let parsed = text.split_once(':').and_then(|(active_ms, id)| {
        let active_ms: i64 = active_ms.parse().ok().filter(|ms| *ms >= 0)?;
        let id = SessionId::new(id).ok()?.to_string();
        Some(Page { active_ms, id })
    });
    parsed.ok_or_else(|| invalid("before", "expected `next` of an earlier answer"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_what_we_gave_or_nothing() {
        let page = parse_page("12:s-1").unwrap();
        assert_eq!(
            page,
            Page {
                active_ms: 12,
                id: "s-1".into()
            }
        );
        for bad in ["12", "x:s", "-1:s", "1:", "1:a b", "1:s' OR 1=1", ":"] {
            assert!(parse_page(bad).is_err(), "{bad:?}");
        }
    }
}
