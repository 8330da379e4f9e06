//! `ListTurns`, `GetTurn`, and turns as they are shown everywhere.

use super::{ANSWER_BYTES_MAX, LIST_ROWS, StateService, invalid, rows_of};
use crate::bodies::{BodyRef, READS_AT_ONCE, TEXT_BYTES_MAX, text, text_or_base64};
use crate::convert;
use crate::error::Error;
use crate::query::calls::{self, Call};
use crate::query::line::{Line, TurnRow};
use crate::query::{self, turns};
use crate::running::Holders;
use bytes::Bytes;
use futures::stream;
use futures::{StreamExt, TryStreamExt};
use rusqlite::Connection;
use vlinder_bus::StreamName;
use vlinder_core::SubmissionId;
use vlinder_proto::state as proto;
use vlinder_worker::serving::Serving;

/// Calls that `GetTurn` shows.
pub const TURN_CALLS_MAX: usize = 10_000;

impl StateService {
    pub(super) async fn turns_with_texts(&self, line: Line) -> Result<Vec<proto::Turn>, Error> {
        let rows = line.turns.iter().map(|(turn, _, _)| turn);
        let open = self.open_statuses(rows.clone()).await?;
        let wanted = rows
            .flat_map(|turn| {
                let output = turn.end.as_ref().map(|end| BodyRef::from(&end.node));
                [Some(BodyRef::from(&turn.invoke)), output]
            })
            .collect();
        let mut texts = self.excerpts(wanted).await?.into_iter();
        let mut turns = Vec::with_capacity(line.turns.len());
        for ((row, calls, total), status) in line.turns.iter().zip(open) {
            let mut turn = convert::turn(row, calls, *total, status);
            let (input, output) = (texts.next(), texts.next());
            turn.input = text(&input.unwrap_or_default(), turn.input_len);
            turn.output = text(&output.unwrap_or_default(), turn.output_len);
            turns.push(turn);
        }
        Ok(turns)
    }

    /// What each turn's status is if it has no end.
    async fn open_statuses<'a>(
        &self,
        turns: impl Iterator<Item = &'a TurnRow> + Clone,
    ) -> Result<Vec<&'static str>, Error> {
        if turns.clone().all(|turn| turn.end.is_some()) {
            return Ok(turns.map(|_| "").collect());
        }
        let holders = Holders::read(&self.projection.0.bus).await?;
        let log = StreamName::Log(self.ns().clone());
        Ok(turns
            .map(|turn| match holders.of_message(&log, turn.invoke.seq) {
                Some(_) => "running",
                None => "waiting",
            })
            .collect())
    }

    /// The beginnings of bodies, in order; empty where none is wanted.
    async fn excerpts(&self, wanted: Vec<Option<BodyRef>>) -> Result<Vec<Bytes>, Error> {
        let reads = wanted.into_iter().map(|body| {
            let bodies = self.bodies.clone();
            async move {
                match body {
                    Some(body) => bodies.excerpt(&body).await,
                    None => Ok(Bytes::new()),
                }
            }
        });
        stream::iter(reads)
            .buffered(READS_AT_ONCE)
            .try_collect()
            .await
    }

    pub(super) async fn turns(
        &self,
        request: proto::ListTurnsRequest,
    ) -> Result<proto::ListTurnsResponse, Error> {
        self.check_namespace(&request.namespace)?;
        let limit = rows_of(request.limit, LIST_ROWS);
        let all = request.all;
        let rows = self
            .query(move |connection, ns| {
                let rows = turns::list(connection, ns, all, limit)?.into_iter();
                let with_needs = rows.map(|turn| {
                    let needed = match turn.end {
                        Some(_) => vec![],
                        None => calls::needed(connection, turn.id)?,
                    };
                    Ok((turn, needed))
                });
                with_needs.collect::<Result<Vec<_>, Error>>()
            })
            .await?;
        let bus = &self.projection.0.bus;
        let holders = if rows.iter().any(|(turn, _)| turn.end.is_none()) {
            Holders::read(bus).await?
        } else {
            Holders::default()
        };
        let serving = if rows.iter().any(|(_, needed)| !needed.is_empty()) {
            Serving::read(bus).await?
        } else {
            Serving::default()
        };
        let now_ms = bus.now_ms();
        let turns = rows
            .into_iter()
            .map(|(turn, needed)| {
                let mut summary = self.turn_summary(turn, &holders, now_ms);
                // Only a turn that somebody works on has calls, whatever the reports say yet.
                let mut reasons = needed.iter().filter_map(|needed| {
                    serving.why_call_waits(&needed.service, &needed.backend, &needed.selector)
                });
                if let Some(reason) = reasons.next() {
                    summary.reason = reason;
                }
                summary
            })
            .collect();
        Ok(proto::ListTurnsResponse { turns })
    }

    fn turn_summary(&self, turn: TurnRow, holders: &Holders, now_ms: u64) -> proto::TurnSummary {
        let log = StreamName::Log(self.ns().clone());
        let holder = holders.of_message(&log, turn.invoke.seq);
        let mut summary = proto::TurnSummary {
            age_ms: now_ms.saturating_sub(turn.invoke.time_ms),
            deadline_ms: turn.invoke.time_ms.saturating_add(turn.timeout_ms),
            submission: turn.submission,
            session: turn.session,
            branch: turn.branch,
            ..proto::TurnSummary::default()
        };
        match (turn.end, holder) {
            (Some(end), _) => {
                // The emitter is `node/role/index`.
                let (node, worker) = end.node.by.split_once('/').unwrap_or((&end.node.by, ""));
                summary.status = end.outcome;
                summary.node = node.to_owned();
                summary.worker = worker.to_owned();
                summary.attempt = end.node.attempt;
                summary.reason = end.code;
            }
            (None, Some(holder)) => {
                summary.status = "running".to_owned();
                summary.node = holder.node.clone();
                summary.worker = holder.worker.clone();
                summary.attempt = holder.attempt;
            }
            (None, None) => {
                summary.status = "waiting".to_owned();
                summary.reason = holders.reason(&turn.agent);
            }
        }
        summary.agent = turn.agent;
        summary
    }

    pub(super) async fn turn(
        &self,
        request: proto::GetTurnRequest,
    ) -> Result<proto::TurnDetail, Error> {
        self.check_namespace(&request.namespace)?;
        let submission =
            SubmissionId::new(&request.submission).map_err(|error| invalid("submission", error))?;
        let (row, calls, total, ends) = self
            .query(move |connection, ns| {
                let turn = turns::get(connection, ns, submission.as_str())?;
                let (mut calls, total) = calls::of_turn(connection, &turn, TURN_CALLS_MAX)?;
                fill_bodies(connection, &mut calls)?;
                let ends = turns::ends(connection, turn.id)?;
                Ok((turn, calls, total, ends))
            })
            .await?;
        let details = self.call_details(&calls).await?;
        let line = Line {
            turns: vec![(row.clone(), calls, total)],
            more: false,
        };
        Ok(proto::TurnDetail {
            turn: self.turns_with_texts(line).await?.pop(),
            session: row.session,
            agent: row.agent,
            calls: details,
            parents: convert::texts(&row.invoke.parents),
            ends: ends.into_iter().map(convert::end).collect(),
        })
    }

    async fn call_details(&self, calls: &[Call]) -> Result<Vec<proto::CallDetail>, Error> {
        let mut left = ANSWER_BYTES_MAX;
        let wanted = calls
            .iter()
            .flat_map(bodies_of)
            .map(|body| body.filter(|body| spend(&mut left, body.len)))
            .collect();
        let mut texts = self.excerpts(wanted).await?.into_iter();
        let mut details = Vec::with_capacity(calls.len());
        for call in calls {
            let mut detail = convert::call_detail(call);
            let (request, response) = (texts.next(), texts.next());
            (detail.request, detail.request_base64) =
                text_or_base64(&request.unwrap_or_default(), detail.request_len);
            (detail.response, detail.response_base64) =
                text_or_base64(&response.unwrap_or_default(), detail.response_len);
            details.push(detail);
        }
        Ok(details)
    }
}

/// Reads what is kept of the bodies of calls, as far as the answer has room.
fn fill_bodies(connection: &Connection, calls: &mut [Call]) -> Result<(), Error> {
    let mut left = ANSWER_BYTES_MAX;
    for call in calls {
        let request = call.request.as_mut().map(|request| &mut request.node);
        let result = call.result.as_mut().map(|result| &mut result.node);
        for node in [request, result].into_iter().flatten() {
            if spend(&mut left, node.body_len) {
                query::fill_body(connection, node)?;
            }
        }
    }
    Ok(())
}

/// The bodies of a call's request and answer.
fn bodies_of(call: &Call) -> [Option<BodyRef>; 2] {
    [
        call.request
            .as_ref()
            .map(|request| BodyRef::from(&request.node)),
        call.result
            .as_ref()
            .map(|result| BodyRef::from(&result.node)),
    ]
}

/// Takes the text of a body of `len` bytes from what an answer has left; `false` when it does not fit.
fn spend(left: &mut u64, len: u64) -> bool {
    // As base64, which takes four bytes for three.
    let needed = len.min(TEXT_BYTES_MAX as u64) * 4 / 3;
    match left.checked_sub(needed) {
        Some(rest) => {
            *left = rest;
            true
        }
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_runs_out_of_room() {
        let mut left = 100;
        assert!(spend(&mut left, 30));
        assert!(!spend(&mut left, 60));
        assert!(spend(&mut left, 30));
    }
}
