//! `vlinder session replay` and `vlinder session repair`: turns again, and what they did differently.

use super::Cx;
use super::session::{full_id, some};
use crate::args::{Repair, Replay};
use crate::error::Error;
use crate::table::{Column, Table};
use crate::{json, text};
use futures::StreamExt;
use serde_json::{Value, json};
use std::io::Read;
use std::path::Path;
use std::time::Duration;
use tokio::time::Instant;
use vlinder_proto::harness::replay_event::Event;
use vlinder_proto::harness::{
    RepairAnswer, ReplayBegun, ReplayReport, ReplayRequest, ReplayedTurn,
};

/// First pause before a stream that broke is opened again; each further one is twice as long …
const PAUSE_FIRST: Duration = Duration::from_millis(50);
/// … up to this one.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Largest answer that is put in the place of another one, in bytes; the service takes no larger one.
const ANSWER_BYTES_MAX: u64 = vlinder_core::BODY_BYTES_MAX;
/// Sessions of one `--all`.
const SESSIONS_MAX: u32 = 10_000;
/// Sessions that are run at once.
const SESSIONS_AT_ONCE: usize = 4;
/// What the ids of sessions begin with that a replay made: they are no traffic to test with.
const REPLAY_PREFIX: &str = "replay-";
/// What the ids of sessions begin with that agents began; they are part of the turns that did.
const DELEGATED_PREFIX: &str = "delegated-";

/// What came of a replay.
struct Ran {
    begun: ReplayBegun,
    turns: Vec<ReplayedTurn>,
    report: ReplayReport,
}

/// `session replay`.
pub async fn replay(cx: &Cx<'_>, args: Replay) -> Result<(), Error> {
    if args.all {
        return all(cx, args).await;
    }
    let id = args.id.as_deref().ok_or_else(|| {
        Error::Usage(
            "which session? `vlinder session list` shows them; --all runs every one".to_owned(),
        )
    })?;
    let request = ReplayRequest {
        session: full_id(cx, id).await?,
        branch: args.branch.unwrap_or_default(),
        turn: args.turn.unwrap_or_default(),
        from: args.from.unwrap_or_default(),
        until: args.until.unwrap_or_default(),
        live: args.live,
        model: args.model.unwrap_or_default(),
        name: args.name.unwrap_or_default(),
        agent: args.agent.unwrap_or_default(),
        ..Default::default()
    };
    show(cx, request).await
}

/// `session repair`.
pub async fn repair(cx: &Cx<'_>, args: Repair) -> Result<(), Error> {
    let answer = read(&args.with)?;
    let request = ReplayRequest {
        session: full_id(cx, &args.id).await?,
        branch: args.branch.unwrap_or_default(),
        model: args.model.unwrap_or_default(),
        name: args.name.unwrap_or_default(),
        repair: Some(RepairAnswer {
            node: args.node,
            answer,
            http: args.http.map_or(0, u32::from),
            content_type: args.content_type.unwrap_or_default(),
            only: args.only,
        }),
        ..Default::default()
    };
    show(cx, request).await
}

/// The bytes of a file, or of stdin.
fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let what = format!("cannot read {}", path.display());
    let mut bytes = Vec::new();
    let read = match path.to_str() {
        Some("-") => std::io::stdin()
            .take(ANSWER_BYTES_MAX + 1)
            .read_to_end(&mut bytes),
        _ => std::fs::File::open(path)
            .and_then(|file| file.take(ANSWER_BYTES_MAX + 1).read_to_end(&mut bytes)),
    };
    match read {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(Error::Usage(format!("{what}: there is no such file")))
        }
        Err(error) => Err(Error::io(what)(error)),
        Ok(_) if bytes.len() as u64 > ANSWER_BYTES_MAX => Err(Error::Usage(format!(
            "{what}: an answer has at most {ANSWER_BYTES_MAX} bytes"
        ))),
        Ok(_) => Ok(bytes),
    }
}

/// Runs one and shows it.
async fn show(cx: &Cx<'_>, request: ReplayRequest) -> Result<(), Error> {
    let ran = run(cx, request, true).await?;
    if cx.out.json {
        return cx.out.value(&value(&ran));
    }
    let repaired = ran.begun.repair.is_empty() || ran.turns.iter().any(|turn| turn.repaired);
    if !repaired {
        cx.out
            .note("the turn did not make the repaired call again, so the new answer was not given");
    }
    cx.out.line(&text::safe_line(&sentence(&ran)))
}

fn sentence(ran: &Ran) -> String {
    let report = &ran.report;
    let first = match report.first_different {
        0 => String::new(),
        index => format!("; the first difference is in turn {index}"),
    };
    format!(
        "{} on branch {} of session {}: {} the same, {} different; {} from the record, {} live ({} changed, {} missing){first}",
        text::count(u64::from(report.turns), "turn"),
        ran.begun.branch,
        ran.begun.session,
        report.same,
        report.different,
        text::count(report.recorded, "call"),
        report.live,
        report.changed,
        report.missing,
    )
}

/// Runs one to its report. A stream that breaks is opened again, while the node is back within
/// `Limits::reattach`; what was run before is not run again. `tells`: a line for each turn.
async fn run(cx: &Cx<'_>, mut request: ReplayRequest, tells: bool) -> Result<Ran, Error> {
    let mut begun: Option<ReplayBegun> = None;
    let mut turns: Vec<ReplayedTurn> = Vec::new();
    let mut pause = PAUSE_FIRST;
    let mut until: Option<Instant> = None;
    loop {
        let cause = match cx.client.replay(request.clone()).await {
            Err(error) => error,
            Ok(mut events) => loop {
                let event = match events.next().await {
                    Some(Ok(event)) => event.event,
                    Some(Err(error)) => break error,
                    None => {
                        break vlinder_client::Error::Usage(
                            "the harness ended the stream before the replay was over".to_owned(),
                        );
                    }
                };
                (pause, until) = (PAUSE_FIRST, None);
                match event {
                    Some(Event::Begun(now)) => {
                        if begun.is_none() && tells {
                            let line = format!(
                                "{} of session {} again, on branch {} of session {} ({}); --name {} goes on with it",
                                text::count(u64::from(now.turns), "turn"),
                                now.source_session,
                                now.branch,
                                now.session,
                                now.agent,
                                now.name
                            );
                            cx.out.note(&text::safe_line(&line));
                        }
                        // From here on it is known by its name, whoever made that.
                        request.name.clone_from(&now.name);
                        begun = Some(now);
                    }
                    // What was told before the stream broke is told again.
                    Some(Event::Turn(turn)) if turn.index as usize > turns.len() => {
                        if tells && !cx.out.json {
                            tell(cx, &turn, begun.as_ref().map_or(0, |begun| begun.turns))?;
                        }
                        turns.push(turn);
                    }
                    Some(Event::Waiting(waiting)) if tells => {
                        cx.out.note(&format!("waiting: {}", waiting.reason));
                    }
                    Some(Event::Report(report)) => {
                        let begun = begun.unwrap_or_default();
                        return Ok(Ran {
                            begun,
                            turns,
                            report,
                        });
                    }
                    _ => {}
                }
            },
        };
        // A harness that drains ends its streams. Where nothing listens at first there is nothing to wait for.
        let drained = matches!(cause, vlinder_client::Error::Usage(_)) && begun.is_some();
        let give_up = *until.get_or_insert_with(|| Instant::now() + cx.client.limits().reattach);
        if begun.is_none() || !(cause.is_transient() || drained) || Instant::now() >= give_up {
            return Err(cause.into());
        }
        cx.out.note(&format!("waiting: {cause}"));
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// One line for a turn.
fn tell(cx: &Cx<'_>, turn: &ReplayedTurn, of: u32) -> Result<(), Error> {
    let verdict = if turn.same { "same" } else { "different" };
    let repaired = if turn.repaired { ", one repaired" } else { "" };
    let mut line = format!(
        "{:>4}/{of}  {}  {verdict:<9}  {}  {} from the record, {} live{repaired}",
        turn.index,
        turn.source,
        turn.status,
        text::count(u64::from(turn.recorded), "call"),
        turn.live,
    );
    if turn.changed + turn.missing > 0 {
        line.push_str(&format!(
            " ({} changed, {} missing)",
            turn.changed, turn.missing
        ));
    }
    cx.out.line(&text::safe_line(&line))?;
    if let Some(first) = &turn.first {
        let node = |hash: &str| match hash {
            "" => "-".to_owned(),
            hash => text::short(hash, 16).to_owned(),
        };
        let line = format!(
            "           first difference: {}  was {}  is {}",
            first.what,
            node(&first.source),
            node(&first.replay)
        );
        cx.out.line(&text::safe_line(&line))?;
    }
    Ok(())
}

/// `{session, branch, agent, source: {session, branch}, name, repair, turns: […], summary: {…}}`
fn value(ran: &Ran) -> Value {
    let turns = ran.turns.iter().map(|turn| {
        let mut value = json::of(turn);
        json::put_bytes(&mut value, "output", &turn.output);
        value
    });
    json!({
        "session": ran.begun.session,
        "branch": ran.begun.branch,
        "agent": ran.begun.agent,
        "name": ran.begun.name,
        "repair": ran.begun.repair,
        "source": { "session": ran.begun.source_session, "branch": ran.begun.source_branch },
        "turns": turns.collect::<Vec<_>>(),
        "summary": json::of(&ran.report),
    })
}

/// `session replay --agent NEW --all`: every session of an agent, in new sessions of another one.
async fn all(cx: &Cx<'_>, args: Replay) -> Result<(), Error> {
    let new = args.agent.clone().unwrap_or_default();
    let since = args.since.map_or(0, |since| {
        text::now_ms().saturating_sub(since.as_millis() as u64)
    });
    let listed = some(cx, args.id.as_deref().unwrap_or_default(), SESSIONS_MAX).await?;
    let mut sessions: Vec<_> = listed
        .into_iter()
        .filter(|session| {
            let made = [REPLAY_PREFIX, DELEGATED_PREFIX];
            session.last_active_at >= since
                && session.turns > 0
                && !made.iter().any(|prefix| session.id.starts_with(prefix))
        })
        .collect();
    if args.id.is_none() {
        let mut agents: Vec<String> = sessions
            .iter()
            .map(|session| session.agent.clone())
            .filter(|agent| *agent != new)
            .collect();
        agents.sort();
        agents.dedup();
        match agents.as_slice() {
            // Its own sessions, with the version of it that is deployed now.
            [] => {}
            [only] => sessions.retain(|session| session.agent == *only),
            several => {
                return Err(Error::Usage(format!(
                    "sessions of which agent? `vlinder session replay AGENT --agent {new} --all`; there are some of {}",
                    several.join(", ")
                )));
            }
        }
    }
    // The oldest first, as they happened.
    sessions.reverse();
    let name = args.name.clone().unwrap_or_else(|| {
        let now = text::now_ms();
        format!("all-{now:x}")
    });
    cx.out.note(&text::safe_line(&format!(
        "{} with {new}; --name {name} goes on with it",
        text::count(sessions.len() as u64, "session")
    )));
    let runs = sessions.into_iter().map(|session| {
        let request = ReplayRequest {
            session: session.id.clone(),
            live: args.live,
            model: args.model.clone().unwrap_or_default(),
            name: name.clone(),
            agent: new.clone(),
            ..Default::default()
        };
        async move { (session, run(cx, request, false).await) }
    });
    let ran: Vec<_> = futures::stream::iter(runs)
        .buffered(SESSIONS_AT_ONCE)
        .collect()
        .await;
    let mut table = Table::new(&[
        ("session", Column::Whole),
        ("turns", Column::Number),
        ("same", Column::Number),
        ("different", Column::Number),
        ("record", Column::Number),
        ("live", Column::Number),
        ("verdict", Column::State),
        ("first difference", Column::Cut),
        ("replay", Column::Whole),
    ]);
    let mut sum = ReplayReport::default();
    let (mut same, mut different, mut failed) = (0u64, 0u64, 0u64);
    let mut rows = Vec::new();
    for (session, ran) in ran {
        let ran = match ran {
            Ok(ran) => ran,
            Err(error @ Error::Client(_)) if error.exit_code() == 3 => return Err(error),
            Err(error) if error.exit_code() == 5 || error.exit_code() == 8 => return Err(error),
            // One session that cannot be run says nothing about the others.
            Err(error) => {
                failed += 1;
                cx.out.note(&text::safe_line(&format!(
                    "session {}: {error}",
                    session.id
                )));
                rows.push(json!({ "source": { "session": session.id }, "error": error.json() }));
                let mut cells = [const { String::new() }; 9];
                cells[0] = session.id;
                cells[6] = "not run".to_owned();
                table.row(cells);
                continue;
            }
        };
        let report = &ran.report;
        let is_same = report.different == 0;
        same += u64::from(is_same);
        different += u64::from(!is_same);
        sum.turns += report.turns;
        sum.same += report.same;
        sum.different += report.different;
        sum.recorded += report.recorded;
        sum.live += report.live;
        sum.changed += report.changed;
        sum.missing += report.missing;
        let first = ran.turns.iter().find_map(|turn| {
            let first = turn.first.as_ref()?;
            Some(format!("turn {}: {}", turn.index, first.what))
        });
        table.row([
            session.id.clone(),
            report.turns.to_string(),
            report.same.to_string(),
            report.different.to_string(),
            report.recorded.to_string(),
            report.live.to_string(),
            if is_same { "same" } else { "different" }.to_owned(),
            first.unwrap_or_default(),
            ran.begun.session.clone(),
        ]);
        rows.push(value(&ran));
    }
    if cx.out.json {
        return cx.out.value(&json!({
            "agent": new,
            "name": name,
            "sessions": rows,
            "summary": {
                "sessions": same + different + failed,
                "same": same,
                "different": different,
                "not_run": failed,
                "turns": json::of(&sum),
            },
        }));
    }
    cx.out.table(&table, "no session to run again")?;
    let not_run = match failed {
        0 => String::new(),
        failed => format!(", {failed} not run"),
    };
    cx.out.line(&format!(
        "{}: {same} the same, {different} different{not_run}; {} ({} the same), {} from the record, {} live",
        text::count(same + different + failed, "session"),
        text::count(u64::from(sum.turns), "turn"),
        sum.same,
        text::count(sum.recorded, "call"),
        sum.live,
    ))
}
