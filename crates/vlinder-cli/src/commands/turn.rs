//! `vlinder turn`.

use super::Cx;
use super::session::{show_turn, status, tokens};
use crate::args::Turn;
use crate::error::Error;
use crate::table::{Column, Table};
use crate::{json, text};
use serde_json::json;
use vlinder_proto::harness::CancelRequest;
use vlinder_proto::state as proto;

/// How much of a request or response is shown to people, in characters.
const BODY_CHARS: usize = 4000;

/// Runs one of them.
pub async fn run(cx: &Cx<'_>, command: Turn) -> Result<(), Error> {
    match command {
        Turn::List { all, limit } => list(cx, all, limit).await,
        Turn::Get { submission } => get(cx, submission).await,
        Turn::Cancel { submission } => cancel(cx, submission).await,
    }
}

async fn list(cx: &Cx<'_>, all: bool, limit: u32) -> Result<(), Error> {
    let request = proto::ListTurnsRequest {
        all,
        limit,
        ..Default::default()
    };
    let turns = cx.client.list_turns(request).await?.turns;
    let none = if all {
        "no turn is on record"
    } else {
        "no turn runs or waits; --all shows ended ones"
    };
    cx.out.list(|| json::of(&turns), table(&turns), none)
}

/// Turns as `turn list` and `status` show them.
pub fn table(turns: &[proto::TurnSummary]) -> Table {
    let mut table = Table::new(&[
        ("submission", Column::Whole),
        ("agent", Column::Whole),
        ("status", Column::State),
        ("age", Column::Number),
        ("try", Column::Number),
        ("where", Column::Cut),
        ("reason", Column::Cut),
    ]);
    for turn in turns {
        let place = match turn.worker.is_empty() {
            true => turn.node.clone(),
            false => format!("{}/{}", turn.node, turn.worker),
        };
        table.row([
            turn.submission.clone(),
            turn.agent.clone(),
            turn.status.clone(),
            text::span(turn.age_ms),
            turn.attempt.to_string(),
            place,
            turn.reason.clone(),
        ]);
    }
    table
}

async fn get(cx: &Cx<'_>, submission: String) -> Result<(), Error> {
    let request = proto::GetTurnRequest {
        submission,
        ..Default::default()
    };
    let detail = cx.client.get_turn(request).await?;
    if cx.out.json {
        return cx.out.value(&json::turn(&detail));
    }
    let turn = detail.turn.clone().unwrap_or_default();
    let head = format!(
        "agent {} · session {} · branch {}",
        detail.agent, detail.session, turn.branch
    );
    cx.out.line(&text::safe_line(&head))?;
    show_turn(cx, &turn, true)?;
    show_calls(cx, &detail)?;
    for late in detail.ends.iter().skip(1) {
        let line = format!(
            "  late end {} by {} ({})",
            late.outcome,
            late.by,
            text::short(&late.hash, 16)
        );
        cx.out.line(&text::safe_line(&line))?;
    }
    Ok(())
}

/// Every call with what was asked and answered.
pub fn show_calls(cx: &Cx<'_>, detail: &proto::TurnDetail) -> Result<(), Error> {
    for detail in &detail.calls {
        let call = detail.call.clone().unwrap_or_default();
        let tokens = tokens(&call);
        let head = format!(
            "  call {}  {}/{} {} {}  {}  {}{}  {}",
            call.seq,
            call.service,
            call.backend,
            call.operation,
            call.model,
            status(&call),
            text::span(call.duration_ms),
            if tokens.is_empty() {
                String::new()
            } else {
                format!("  {tokens} tokens")
            },
            text::short(&call.hash, 16),
        );
        cx.out.line(&text::safe_line(&head))?;
        let sides = [
            (
                "asked",
                detail.requested_at,
                &detail.request,
                detail.request_base64,
                detail.request_len,
            ),
            (
                "answered",
                detail.answered_at,
                &detail.response,
                detail.response_base64,
                detail.response_len,
            ),
        ];
        for (what, at, body, is_base64, len) in sides {
            if at == 0 {
                continue;
            }
            let body = match is_base64 {
                true => format!("({len} bytes, binary)"),
                false => shortened(body, len),
            };
            let body = text::safe(&body).replace('\n', "\n      ");
            cx.out
                .line(&format!("    {what} {}\n      {body}", text::timestamp(at)))?;
        }
    }
    Ok(())
}

fn shortened(body: &str, len: u64) -> String {
    let mut shown: String = body.trim_end().chars().take(BODY_CHARS).collect();
    if shown.len() < body.trim_end().len() || (body.len() as u64) < len {
        shown.push_str(&format!("… ({len} bytes)"));
    }
    shown
}

async fn cancel(cx: &Cx<'_>, submission: String) -> Result<(), Error> {
    let request = CancelRequest {
        submission: submission.clone(),
        ..Default::default()
    };
    let answer = cx.client.cancel(request).await?;
    let sentence = match answer.already_ended {
        true => format!("turn {submission} had ended before: {}", answer.outcome),
        false => format!("cancelled turn {submission}"),
    };
    let value = json!({
        "submission": submission,
        "outcome": answer.outcome,
        "already_ended": answer.already_ended,
    });
    cx.out.done(value, &sentence)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_bodies_are_cut_and_say_so() {
        assert_eq!(shortened("short\n", 6), "short");
        let long = "x".repeat(BODY_CHARS + 1);
        assert!(shortened(&long, long.len() as u64).ends_with("… (4001 bytes)"));
        assert_eq!(
            shortened("cut by the service", 99),
            "cut by the service… (99 bytes)"
        );
    }

    #[test]
    fn a_list_of_turns_fits_and_keeps_the_names_of_turns() {
        let turn = proto::TurnSummary {
            submission: "t-".to_owned() + &"a".repeat(32),
            agent: "notes".into(),
            status: "waiting".into(),
            node: "a-node-with-a-long-name".into(),
            worker: "agent.process/0".into(),
            reason: "no live worker of role agent.process can run it; none is configured anywhere"
                .into(),
            ..Default::default()
        };
        let text = table(std::slice::from_ref(&turn)).render(true, false);
        assert!(text.contains(&turn.submission));
        assert!(
            text.lines().all(|line| line.chars().count() <= 100),
            "{text}"
        );
    }
}
