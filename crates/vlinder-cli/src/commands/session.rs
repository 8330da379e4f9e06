//! `vlinder session`.

use super::Cx;
use crate::args::Session;
use crate::error::Error;
use crate::table::{Column, Table};
use crate::{json, text};
use futures::{StreamExt, TryStreamExt};
use serde_json::{Value, json};
use vlinder_client::SESSION_LIST_MAX;
use vlinder_proto::harness::{ForkRequest, PromoteRequest};
use vlinder_proto::state as proto;

/// Questions about turns or sessions that are open at once.
const ASKED_AT_ONCE: usize = 8;
/// Sessions that are searched for a branch where none is named.
const SEARCHED_MAX: u32 = SESSION_LIST_MAX;
/// How much of an input or output a table shows, in characters.
const SAID_CHARS: usize = 400;

/// Runs one of them.
pub async fn run(cx: &Cx<'_>, command: Session) -> Result<(), Error> {
    match command {
        Session::List { agent, limit } => list(cx, agent.unwrap_or_default(), limit).await,
        Session::Get { id, branch, full } => get(cx, id, branch.unwrap_or_default(), full).await,
        Session::Branches { id } => branches(cx, id).await,
        Session::Fork { id, from, name } => fork(cx, id, from, name).await,
        Session::Promote { branch, session } => promote(cx, branch, session).await,
        Session::Verify { id } => verify(cx, id).await,
        Session::Replay(args) => super::replay::replay(cx, args).await,
        Session::Repair(args) => super::replay::repair(cx, args).await,
        // Refused before they come here.
        Session::Diff(_) | Session::Export(_) => Ok(()),
    }
}

/// The last active sessions, at most so many.
pub async fn some(
    cx: &Cx<'_>,
    agent: &str,
    limit: u32,
) -> Result<Vec<proto::SessionSummary>, Error> {
    let mut sessions = Vec::new();
    let mut before = String::new();
    loop {
        let left = limit - sessions.len() as u32;
        let request = proto::ListSessionsRequest {
            agent: agent.to_owned(),
            limit: left.min(SESSION_LIST_MAX),
            before: before.clone(),
            ..Default::default()
        };
        let page = cx.client.list_sessions(request).await?;
        sessions.extend(page.sessions);
        if page.next.is_empty() || sessions.len() as u32 >= limit {
            sessions.truncate(limit as usize);
            return Ok(sessions);
        }
        before = page.next;
    }
}

async fn list(cx: &Cx<'_>, agent: String, limit: u32) -> Result<(), Error> {
    let sessions = some(cx, &agent, limit.max(1)).await?;
    let mut table = Table::new(&[
        ("id", Column::Whole),
        ("agent", Column::Whole),
        ("turns", Column::Number),
        ("status", Column::State),
        ("active", Column::Whole),
        ("branch", Column::Cut),
        ("name", Column::Cut),
    ]);
    let now = text::now_ms();
    for session in &sessions {
        let name = match session.name == session.id {
            true => String::new(),
            false => session.name.clone(),
        };
        table.row([
            session.id.clone(),
            session.agent.clone(),
            session.turns.to_string(),
            session.status.clone(),
            text::ago(session.last_active_at, now),
            session.default_branch.clone(),
            name,
        ]);
    }
    cx.out
        .list(|| json::of(&sessions), table, "no session is on record")
}

async fn get(cx: &Cx<'_>, id: String, branch: String, full: bool) -> Result<(), Error> {
    let request = proto::GetSessionRequest {
        session: id,
        branch,
        ..Default::default()
    };
    let session = cx.client.get_session(request).await?;
    let details = match full {
        true => details_of(cx, &session.turns).await?,
        false => Vec::new(),
    };
    if cx.out.json {
        let mut value = json::of(&session);
        for (index, detail) in details.iter().enumerate() {
            value["turns"][index] = json::turn(detail);
        }
        return cx.out.value(&value);
    }
    let sealed = if session.sealed { ", sealed" } else { "" };
    let shown = format!(
        "session {} of {} · branch {}{sealed} (default {}) · {} · begun {}",
        session.id,
        session.agent,
        session.branch,
        session.default_branch,
        text::count(session.turns_total, "turn"),
        text::timestamp(session.started_at),
    );
    cx.out.line(&text::safe_line(&shown))?;
    if !session.earlier.is_empty() {
        cx.out.note(&format!(
            "only the last {} of them shown",
            match session.turns.len() {
                1 => "one is".to_owned(),
                some => format!("{some} are"),
            }
        ));
    }
    for (index, turn) in session.turns.iter().enumerate() {
        cx.out.line("")?;
        show_turn(cx, turn, full)?;
        match details.get(index) {
            Some(detail) => super::turn::show_calls(cx, detail)?,
            None => show_calls(cx, turn)?,
        }
    }
    Ok(())
}

async fn details_of(cx: &Cx<'_>, turns: &[proto::Turn]) -> Result<Vec<proto::TurnDetail>, Error> {
    let asked = turns.iter().map(|turn| {
        let request = proto::GetTurnRequest {
            submission: turn.submission.clone(),
            ..Default::default()
        };
        cx.client.get_turn(request)
    });
    let details = futures::stream::iter(asked).buffered(ASKED_AT_ONCE);
    Ok(details.try_collect().await?)
}

/// The head of a turn with what was said; all of it, or the beginning.
pub fn show_turn(cx: &Cx<'_>, turn: &proto::Turn, full: bool) -> Result<(), Error> {
    let code = match turn.code.is_empty() {
        true => String::new(),
        false => format!(" ({})", turn.code),
    };
    let head = format!(
        "turn {}  {}{code}  {}  {}",
        turn.submission,
        turn.status,
        text::timestamp(turn.started_at),
        text::span(turn.duration_ms),
    );
    cx.out.line(&text::safe_line(&head))?;
    if !turn.source.is_empty() {
        cx.out
            .line(&format!("  again   {}", text::safe_line(&turn.source)))?;
    }
    if !turn.hash.is_empty() {
        cx.out
            .line(&format!("  hash    {}", text::safe_line(&turn.hash)))?;
    }
    if !turn.state.is_empty() {
        cx.out
            .line(&format!("  state   {}", text::safe_line(&turn.state)))?;
    }
    for (who, said) in [("user", &turn.input), ("agent", &turn.output)] {
        let said = match full {
            true => said.replace('\n', "\n          "),
            false => text::brief(said, SAID_CHARS),
        };
        if !said.is_empty() {
            cx.out.line(&format!("  {who:<8}{}", text::safe(&said)))?;
        }
    }
    Ok(())
}

fn show_calls(cx: &Cx<'_>, turn: &proto::Turn) -> Result<(), Error> {
    let mut table = Table::new(&[
        ("  call", Column::Whole),
        ("service", Column::Whole),
        ("operation", Column::Whole),
        ("model", Column::Cut),
        ("time", Column::Number),
        ("tokens", Column::Number),
        ("status", Column::State),
        ("hash", Column::Whole),
    ]);
    for call in &turn.calls {
        table.row([
            format!("  {}", call.seq),
            format!("{}/{}", call.service, call.backend),
            call.operation.clone(),
            call.model.clone(),
            text::span(call.duration_ms),
            tokens(call),
            status(call),
            text::short(&call.hash, 12).to_owned(),
        ]);
    }
    if table.is_empty() {
        return Ok(());
    }
    cx.out.table(&table, "")
}

/// What became of a call, and whether its answer came from the record of another turn.
pub fn status(call: &proto::Call) -> String {
    match (call.replayed.is_empty(), call.repaired) {
        (true, _) => call.status.clone(),
        (false, false) => format!("{} (replayed)", call.status),
        (false, true) => format!("{} (repaired)", call.status),
    }
}

/// `in/out`, where they are known.
pub fn tokens(call: &proto::Call) -> String {
    let shown =
        |count: Option<u64>| count.map_or_else(|| "?".to_owned(), |count| count.to_string());
    match (call.tokens_in, call.tokens_out) {
        (None, None) => String::new(),
        (tokens_in, tokens_out) => format!("{}/{}", shown(tokens_in), shown(tokens_out)),
    }
}

async fn branches(cx: &Cx<'_>, session: String) -> Result<(), Error> {
    let branches = branches_of(cx, session).await?;
    let mut table = Table::new(&[
        ("name", Column::Whole),
        ("head", Column::Whole),
        ("sealed", Column::Whole),
        ("forked from", Column::Whole),
    ]);
    for branch in &branches {
        table.row([
            branch.name.clone(),
            text::short(&branch.head, 16).to_owned(),
            if branch.sealed { "yes" } else { "no" }.to_owned(),
            text::short(&branch.forked_from, 16).to_owned(),
        ]);
    }
    cx.out.list(|| json::of(&branches), table, "no branch")
}

async fn branches_of(cx: &Cx<'_>, session: String) -> Result<Vec<proto::Branch>, Error> {
    let request = proto::ListBranchesRequest {
        session,
        ..Default::default()
    };
    Ok(cx.client.list_branches(request).await?.branches)
}

async fn fork(cx: &Cx<'_>, id: String, from: String, name: String) -> Result<(), Error> {
    let request = |session: String| ForkRequest {
        session,
        from: from.clone(),
        name: name.clone(),
        ..Default::default()
    };
    let session = full_id(cx, &id).await?;
    let forked = cx.client.fork(request(session.clone())).await?;
    let sentence = format!(
        "branch {} of session {session} begins at {}",
        forked.branch,
        text::short(&forked.from, 16)
    );
    let value = json!({ "session": session, "branch": forked.branch, "from": forked.from });
    cx.out.done(value, &sentence)
}

/// The id that a name or the beginning of an id means. Where the record does not know it the harness is
/// asked as it stands: it knows sessions that the record has not seen yet.
pub async fn full_id(cx: &Cx<'_>, id: &str) -> Result<String, Error> {
    let request = proto::GetSessionRequest {
        session: id.to_owned(),
        limit: 1,
        ..Default::default()
    };
    match cx.client.get_session(request).await {
        Ok(session) => Ok(session.id),
        Err(error) if error.is_not_found() => Ok(id.to_owned()),
        Err(error) => Err(error.into()),
    }
}

async fn promote(cx: &Cx<'_>, branch: String, session: Option<String>) -> Result<(), Error> {
    let session = match session {
        Some(id) => full_id(cx, &id).await?,
        None => the_one_with(cx, &branch).await?,
    };
    let request = PromoteRequest {
        session: session.clone(),
        branch,
        ..Default::default()
    };
    let promoted = cx.client.promote(request).await?;
    let sealed = match promoted.sealed.is_empty() {
        true => "it was the default branch already".to_owned(),
        false => format!(
            "{} is sealed, and also kept as {}",
            promoted.sealed, promoted.sealed_as
        ),
    };
    let sentence = format!(
        "{} is the default branch of session {session}; {sealed}",
        promoted.default_branch
    );
    let value = json!({
        "session": session,
        "default_branch": promoted.default_branch,
        "sealed": promoted.sealed,
        "sealed_as": promoted.sealed_as,
    });
    cx.out.done(value, &sentence)
}

/// The only session that has a branch of this name, among the last active ones.
async fn the_one_with(cx: &Cx<'_>, branch: &str) -> Result<String, Error> {
    let sessions = some(cx, "", SEARCHED_MAX).await?;
    let asked = sessions.iter().map(|session| async {
        let branches = branches_of(cx, session.id.clone()).await?;
        let has = branches.iter().any(|known| known.name == branch);
        Ok::<_, Error>(has.then(|| session.id.clone()))
    });
    let found = futures::stream::iter(asked).buffered(ASKED_AT_ONCE);
    let found: Vec<Option<String>> = found.try_collect().await?;
    let found: Vec<String> = found.into_iter().flatten().collect();
    match found.as_slice() {
        [only] => Ok(only.clone()),
        [] => Err(Error::NotFound(format!(
            "none of the last active sessions ({} searched) has a branch {branch}; --session names another",
            sessions.len()
        ))),
        several => {
            let names: Vec<&str> = several.iter().take(5).map(String::as_str).collect();
            Err(Error::Usage(format!(
                "{} sessions have a branch {branch}; choose one by --session: {}",
                several.len(),
                names.join(", ")
            )))
        }
    }
}

async fn verify(cx: &Cx<'_>, id: String) -> Result<(), Error> {
    let request = proto::VerifySessionRequest {
        session: id.clone(),
        ..Default::default()
    };
    let found = cx.client.verify_session(request).await?;
    let mut value = json::of(&found);
    if let Value::Object(fields) = &mut value {
        fields.insert("session".to_owned(), id.clone().into());
    }
    if found.ok {
        let sentence = format!(
            "session {id}: {}, every hash is right",
            text::count(found.nodes, "node")
        );
        return cx.out.done(value, &sentence);
    }
    let error = Error::Failed(format!(
        "session {id}: {} among {}",
        text::count(
            found.problems_total.max(found.problems.len() as u64),
            "problem"
        ),
        text::count(found.nodes, "node")
    ));
    match cx.out.json {
        true => cx.out.failed_value(value, error.json(), false)?,
        false => {
            for problem in &found.problems {
                cx.out.line(&text::safe_line(problem))?;
            }
        }
    }
    Err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_shown_where_they_are_known() {
        let call = |tokens_in, tokens_out| proto::Call {
            tokens_in,
            tokens_out,
            ..Default::default()
        };
        assert_eq!(tokens(&call(None, None)), "");
        assert_eq!(tokens(&call(Some(3), None)), "3/?");
        assert_eq!(tokens(&call(Some(3), Some(0))), "3/0");
    }
}
