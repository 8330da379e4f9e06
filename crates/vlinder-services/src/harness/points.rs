//! Nodes of a session by the beginning of their hash, and what stands at them.

use super::sessions::{Session, Sessions};
use crate::status;
use futures::{StreamExt, TryStreamExt};
use std::collections::HashMap;
use tonic::Status;
use vlinder_bus::{Stored, Subject, subjects};
use vlinder_core::record::Invoke;
use vlinder_core::{Kind, NodeHash, SessionId, StateRoot, SubmissionId};
use vlinder_worker::service::{TURN_MESSAGES_MAX, call_subject};
use vlinder_worker::turns::TurnRecord;

/// Most turns of one session that a search for a hash looks through.
const SEARCH_MAX: usize = 100_000;
/// Turns looked through at once.
const LOOKS_AT_ONCE: usize = 16;
/// Ends of one turn that are read: one, and those that lost a race with it.
const ENDS_MAX: usize = 1000;
/// Requests that nobody answered are looked for among so many of all turns, so many at once.
const SCAN_MAX: usize = 200_000;
const SCAN_BATCH: usize = 500;
/// Fewest digits of a hash that are taken for its beginning.
const DIGITS_MIN: usize = 4;

/// What a node is in its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Where {
    /// Its invoke.
    Invoke,
    /// A request.
    Request,
    /// A result; the request that it answers.
    Result(Option<NodeHash>),
    /// The end that counts.
    End,
    /// An end that came too late.
    LateEnd,
}

/// A node of a session.
#[derive(Debug)]
pub struct Point {
    /// Its hash.
    pub hash: NodeHash,
    /// What it is.
    pub is: Where,
    /// The turn that it belongs to.
    pub invoke: Invoke,
}

/// The beginning of a hash.
struct Digits(String);

impl Digits {
    fn parse(text: &str) -> Result<Self, Status> {
        let is_hex = (DIGITS_MIN..=64).contains(&text.len())
            && text.bytes().all(|digit| digit.is_ascii_hexdigit());
        if !is_hex {
            return Err(Status::invalid_argument(format!(
                "expected {DIGITS_MIN} to 64 hexadecimal digits of the hash of a node (see `vlinder session get`)"
            )));
        }
        Ok(Self(text.to_lowercase()))
    }

    fn begin(&self, hash: &NodeHash) -> bool {
        hash.to_string().starts_with(&self.0)
    }

    fn are_all(&self) -> bool {
        self.0.len() == 64
    }
}

impl Sessions {
    /// The one node of a session's turns whose hash begins with `text`; `only`: of this turn.
    pub async fn find_node(
        &self,
        id: &SessionId,
        session: &Session,
        text: &str,
        only: Option<&SubmissionId>,
    ) -> Result<Point, Status> {
        let digits = Digits::parse(text)?;
        let filter = subjects::invokes_of_session(&self.cx.ns, &session.agent, id);
        let all = self
            .cx
            .bus
            .range(&self.cx.log(), &filter, 1, SEARCH_MAX)
            .await;
        let turns: Vec<(Stored, Invoke)> = all
            .map_err(status::of_bus)?
            .into_iter()
            .filter_map(|stored| {
                let invoke = Invoke::try_from(&stored.node).ok()?;
                only.is_none_or(|only| invoke.submission == *only)
                    .then_some((stored, invoke))
            })
            .collect();
        let looks: Vec<_> = turns
            .iter()
            .map(|(stored, invoke)| self.nodes_like(&digits, stored, invoke))
            .collect();
        let mut found: Vec<Point> = Vec::new();
        let mut looks = futures::stream::iter(looks).buffered(LOOKS_AT_ONCE);
        while let Some(points) = looks.try_next().await? {
            found.extend(points);
            if digits.are_all() && !found.is_empty() {
                break;
            }
        }
        if found.is_empty() {
            found.extend(self.unanswered_like(&digits, &turns).await?);
        }
        found.sort_by_key(|point| point.hash);
        found.dedup_by_key(|point| point.hash);
        if found.len() > 1 {
            return Err(Status::invalid_argument(format!(
                "{text} is the beginning of {} hashes; give more digits",
                found.len()
            )));
        }
        found.pop().ok_or_else(|| {
            Status::not_found(format!(
                "no node of session {id} begins with {text}; `vlinder session get {id}` shows the hashes"
            ))
        })
    }

    /// The nodes of one turn whose hashes begin so.
    async fn nodes_like(
        &self,
        digits: &Digits,
        stored: &Stored,
        invoke: &Invoke,
    ) -> Result<Vec<Point>, Status> {
        let (bus, log) = (&self.cx.bus, self.cx.log());
        let mut found: HashMap<NodeHash, Where> = HashMap::new();
        let mut take = |hash: NodeHash, is: Where| {
            if digits.begin(&hash) {
                found.insert(hash, is);
            }
        };
        take(stored.hash, Where::Invoke);
        let subject = Subject::End {
            ns: self.cx.ns.clone(),
            submission: invoke.submission.clone(),
        };
        let ends = bus.all_on(&log, &subject, ENDS_MAX).await;
        let ends = ends.map_err(status::of_bus)?;
        let first = ends.iter().min_by_key(|end| end.rank()).map(|end| end.hash);
        for end in &ends {
            let is = match Some(end.hash) == first {
                true => Where::End,
                false => Where::LateEnd,
            };
            take(end.hash, is);
        }
        let calls = call_subject(&self.cx.ns, &invoke.submission);
        let calls = bus.all_on(&log, &calls, TURN_MESSAGES_MAX).await;
        for stored in calls.map_err(status::of_bus)? {
            match stored.node.kind {
                Kind::Request => take(stored.hash, Where::Request),
                Kind::Result => {
                    let request = stored.node.parents.first().copied();
                    take(stored.hash, Where::Result(request));
                    if let Some(request) = request {
                        take(request, Where::Request);
                    }
                }
                _ => {}
            }
        }
        let points = found.into_iter().map(|(hash, is)| Point {
            hash,
            is,
            invoke: invoke.clone(),
        });
        Ok(points.collect())
    }

    /// Requests of these turns that nobody answered and whose hashes begin so.
    async fn unanswered_like(
        &self,
        digits: &Digits,
        turns: &[(Stored, Invoke)],
    ) -> Result<Vec<Point>, Status> {
        let by_name: HashMap<&str, &Invoke> = turns
            .iter()
            .map(|(_, invoke)| (invoke.submission.as_str(), invoke))
            .collect();
        let Some(mut from) = turns.iter().map(|(stored, _)| stored.seq).min() else {
            return Ok(Vec::new());
        };
        let filter = subjects::all_requests(&self.cx.ns);
        let mut found = Vec::new();
        let mut seen = 0;
        while seen < SCAN_MAX {
            let batch = self
                .cx
                .bus
                .range(&self.cx.log(), &filter, from, SCAN_BATCH)
                .await;
            let batch = batch.map_err(status::of_bus)?;
            let Some(newest) = batch.last() else { break };
            from = newest.seq + 1;
            seen += batch.len();
            for stored in batch {
                let turn = stored.node.field("submission").unwrap_or_default();
                if let Some(invoke) = by_name.get(turn)
                    && digits.begin(&stored.hash)
                {
                    found.push(Point {
                        hash: stored.hash,
                        is: Where::Request,
                        invoke: (*invoke).clone(),
                    });
                }
            }
        }
        Ok(found)
    }

    /// The state that stands at a node of a turn: at an end that which it says, else what the calls that led to
    /// the node made of that which the turn began with.
    pub(super) async fn state_at(
        &self,
        node: &NodeHash,
        stored: &Stored,
        invoke: Invoke,
    ) -> Result<Option<StateRoot>, Status> {
        let subject = Subject::End {
            ns: self.cx.ns.clone(),
            submission: invoke.submission.clone(),
        };
        let ends = self.cx.bus.all_on(&self.cx.log(), &subject, ENDS_MAX).await;
        let ends = ends.map_err(status::of_bus)?;
        if ends.iter().any(|end| end.hash == *node)
            && let Some((end, _)) = self.end_of(&invoke.submission).await?
        {
            return Ok(end.state);
        }
        for unanswered in [false, true] {
            let read = TurnRecord::read(&self.cx, stored, invoke.clone(), unanswered).await;
            let read = read.map_err(status::of_bus)?;
            if read.has(node) {
                return Ok(read.state_after(&read.ancestors(*node)));
            }
        }
        Err(Status::data_loss(format!(
            "{node} is not on record in turn {}",
            invoke.submission
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_given_by_their_beginning() {
        for bad in ["", "abc", "xyz1", "../..", "ab cd", &"a".repeat(65), "ä123"] {
            assert!(Digits::parse(bad).is_err(), "{bad:?}");
        }
        let hash = NodeHash::from_bytes([0xab; 32]);
        assert!(Digits::parse("ABAB").unwrap().begin(&hash));
        assert!(!Digits::parse("abac").unwrap().begin(&hash));
        assert!(Digits::parse(&hash.to_string()).unwrap().are_all());
    }
}
