//! Events of sessions, and seals of branches.

use super::{Apply, Found, aside};
use crate::error::Error;
use crate::number::int;
use rusqlite::params;
use vlinder_bus::{Stored, Subject};
use vlinder_core::SubmissionId;
use vlinder_core::record::{BranchStart, SessionEvent, SessionVerb};

impl Apply<'_> {
    pub(super) fn seal(
        &self,
        stored: &Stored,
        session: &str,
        branch: &str,
    ) -> Result<Found, Error> {
        self.insert_node(stored, None, Some(session))?;
        self.cached(
            "INSERT INTO branches (ns, session, name, sealed) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (ns, session, name) DO UPDATE SET sealed = coalesce(sealed, excluded.sealed)",
        )?
        .execute(params![self.ns.as_str(), session, branch, &stored.hash.as_bytes()[..]])?;
        Ok(Found::Kept)
    }

    pub(super) fn session_event(&self, stored: &Stored) -> Result<Found, Error> {
        let event = match SessionEvent::try_from(&stored.node) {
            Ok(event) => event,
            Err(error) => return Ok(aside(&error.to_string())),
        };
        let named = Subject::Session {
            ns: event.namespace.clone(),
            session: event.session.clone(),
        };
        if named.to_string() != stored.subject {
            return Ok(aside("a session event whose fields name another subject"));
        }
        let (ns, session) = (self.ns.as_str(), event.session.as_str());
        match &event.verb {
            SessionVerb::Start => {
                let started = self
                    .cached("SELECT 1 FROM sessions WHERE ns = ?1 AND id = ?2 AND started_ms IS NOT NULL")?
                    .exists([ns, session])?;
                if started {
                    return Ok(aside("another start of a session that the log had before"));
                }
                self.cached(
                    "INSERT INTO sessions (ns, id, agent, name, started_ms, default_branch, active_ms)
                     VALUES (?1, ?2, ?3, ?4, ?5, 'main', ?5)
                     ON CONFLICT (ns, id) DO UPDATE SET agent = excluded.agent, name = excluded.name,
                        started_ms = excluded.started_ms, default_branch = excluded.default_branch,
                        active_ms = max(active_ms, excluded.active_ms)",
                )?
                .execute(params![
                    ns,
                    session,
                    event.agent.as_str(),
                    event.name,
                    int(stored.time_ms)
                ])?;
                self.make_branch(stored, session, "main", None)?;
            }
            SessionVerb::Fork(start) | SessionVerb::Repair(start, _) => {
                if !self.make_branch(stored, session, start.branch.as_str(), Some(start))? {
                    return Ok(aside("another fork to a branch that the log had before"));
                }
            }
            SessionVerb::Promote { branch, sealed } => {
                if let Some(sealed) = sealed {
                    let name = sealed.branch.as_str();
                    if self.make_branch(stored, session, name, Some(sealed))? {
                        self.cached("UPDATE branches SET sealed = ?4 WHERE ns = ?1 AND session = ?2 AND name = ?3")?
                            .execute(params![ns, session, name, &stored.hash.as_bytes()[..]])?;
                    }
                }
                self.cached("UPDATE sessions SET default_branch = ?3 WHERE ns = ?1 AND id = ?2 AND started_ms IS NOT NULL")?
                    .execute([ns, session, branch.as_str()])?;
            }
        }
        self.insert_node(stored, None, Some(session))?;
        Ok(Found::Kept)
    }

    /// `false` when the branch was made before.
    fn make_branch(
        &self,
        stored: &Stored,
        session: &str,
        name: &str,
        fork: Option<&BranchStart>,
    ) -> Result<bool, Error> {
        let changed = self
            .cached(
                "INSERT INTO branches (ns, session, name, made_seq, fork_of, forked_from, fork_submission)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
                 ON CONFLICT (ns, session, name) DO UPDATE SET made_seq = excluded.made_seq, fork_of = excluded.fork_of,
                    forked_from = excluded.forked_from, fork_submission = excluded.fork_submission
                 WHERE made_seq IS NULL",
            )?
            .execute(params![
                self.ns.as_str(),
                session,
                name,
                int(stored.seq),
                fork.map(|fork| fork.of.as_str()),
                fork.map(|fork| &fork.from.as_bytes()[..]),
                fork.and_then(|fork| fork.submission.as_ref())
                    .map(SubmissionId::as_str),
            ])?;
        Ok(changed == 1)
    }
}
