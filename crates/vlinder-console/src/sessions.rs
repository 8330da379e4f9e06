//! The list of sessions, and one session as a graph that one can walk.

use crate::Console;
use crate::graph::Graph;
use crate::page::{Failure, Place, hash, lasted, page, segment, state, when};
use crate::text::brief;
use axum::extract::{Path, Query, State};
use axum::response::Response;
use maud::{Markup, html};
use serde::Deserialize;
use vlinder_client::Client;
use vlinder_proto::state::{
    Branch, GetSessionRequest, ListBranchesRequest, ListSessionsRequest, Session, Turn,
};

/// Sessions on one page, and those that a search looks through.
const PAGE: u32 = 50;
const SEARCHED: u32 = 1000;
/// Turns of each branch that the graph shows; earlier ones are behind a link.
const TURNS: u32 = 200;
/// Branches whose turns the graph shows.
pub const BRANCHES_MAX: usize = 24;

#[derive(Deserialize)]
pub struct ListQuery {
    #[serde(default)]
    q: String,
    #[serde(default)]
    before: String,
}

/// `GET /`
pub async fn list(
    State(console): State<Console>,
    Query(query): Query<ListQuery>,
) -> Result<Response, Failure> {
    let searched = query.q.trim().to_lowercase();
    let request = ListSessionsRequest {
        limit: if searched.is_empty() { PAGE } else { SEARCHED },
        before: query.before.clone(),
        ..ListSessionsRequest::default()
    };
    let found = console.client()?.list_sessions(request).await?;
    let shown: Vec<_> = found
        .sessions
        .iter()
        .filter(|session| {
            [&session.id, &session.name, &session.agent, &session.status]
                .iter()
                .any(|text| text.to_lowercase().contains(&searched))
        })
        .collect();
    let more = (!found.next.is_empty())
        .then(|| format!("/?q={}&before={}", segment(&query.q), segment(&found.next)));
    let content = html! {
        h1 { "Sessions" }
        form.search method="get" action="/" role="search" {
            label for="q" { "Search" }
            input id="q" type="search" name="q" value=(query.q) placeholder="name, id, agent or status" data-key="/" ;
            button { "Search" }
        }
        @if shown.is_empty() {
            p.empty {
                @if searched.is_empty() { "No sessions yet. " code { "vlinder agent run NAME -p TEXT" } " begins one." }
                @else { "No session here matches “" (query.q) "”." }
            }
        } @else {
            table.rows data-walk="row" {
                thead { tr { th { "Session" } th { "Agent" } th { "State" } th.number { "Turns" } th { "Last active (UTC)" } } }
                tbody {
                    @for session in shown {
                        tr {
                            td { a href={ "/sessions/" (segment(&session.id)) } { (title(&session.name, &session.id)) } }
                            td { (session.agent) }
                            td { (state(&session.status)) }
                            td.number { (session.turns) }
                            td { (when(session.last_active_at)) }
                        }
                    }
                }
            }
        }
        @if let Some(more) = more { p { a rel="next" href=(more) { "Older sessions" } } }
    };
    Ok(page("Sessions", Place::Sessions, content))
}

fn title<'a>(name: &'a str, id: &'a str) -> &'a str {
    if name.is_empty() { id } else { name }
}

#[derive(Deserialize)]
pub struct ShowQuery {
    #[serde(default)]
    before: String,
}

/// `GET /sessions/{session}`
pub async fn show(
    State(console): State<Console>,
    Path(id): Path<String>,
    Query(query): Query<ShowQuery>,
) -> Result<Response, Failure> {
    let client = console.client()?;
    let request = GetSessionRequest {
        session: id,
        limit: TURNS,
        before: query.before.clone(),
        ..GetSessionRequest::default()
    };
    let (session, branches) = futures::try_join!(
        client.get_session(request.clone()),
        client.list_branches(ListBranchesRequest {
            session: request.session.clone(),
            ..ListBranchesRequest::default()
        }),
    )?;
    let branches = in_order(branches.branches, &session.default_branch);
    let lines = lines(&client, &session, &branches, &query.before).await?;
    let graph = Graph::new(&branches, lines);
    let path = format!("/sessions/{}", segment(&session.id));
    let name = title(&session.name, &session.id);
    let content = html! {
        h1 { (name) }
        dl.facts {
            div { dt { "Id" } dd { code { (session.id) } } }
            div { dt { "Agent" } dd { (session.agent) } }
            div { dt { "Began" } dd { (when(session.started_at)) } }
            div { dt { "Turns on " (session.branch) } dd { (session.turns_total) } }
            div { dt { "Tokens in / out" } dd { (tokens(&graph)) } }
        }
        (branch_list(&path, &branches, &session.default_branch))
        h2 { "Record" }
        p.hint { kbd { "↑" } " " kbd { "↓" } " walk, " kbd { "Enter" } " or " kbd { "→" } " opens a turn with its calls." }
        @if !session.earlier.is_empty() {
            p { a href={ (path) "?before=" (segment(&session.earlier)) } { "Earlier turns" } }
        }
        @if graph.rows.is_empty() { p.empty { "No turns yet." } }
        ol.graph data-walk="row" {
            @for row in &graph.rows {
                li id={ "t-" (row.turn.submission) } {
                    (graph.draw(row))
                    a.turn href={ "/turns/" (segment(&row.turn.submission)) } {
                        span.said { (brief(&row.turn.input, 80)) }
                        span.answered { (brief(&row.turn.output, 80)) }
                    }
                    span.meta {
                        (state(&row.turn.status)) " "
                        @if row.turn.calls_total > 0 { span.number { (row.turn.calls_total) " calls" } " " }
                        (lasted(row.turn.duration_ms))
                    }
                }
            }
        }
        (talk(&path, &session, &branches))
    };
    Ok(page(name, Place::Sessions, content))
}

/// The default branch first, then as they were made.
pub fn in_order(mut branches: Vec<Branch>, default: &str) -> Vec<Branch> {
    branches.sort_by_key(|branch| branch.name != default);
    branches.truncate(BRANCHES_MAX);
    branches
}

async fn lines(
    client: &Client,
    session: &Session,
    branches: &[Branch],
    before: &str,
) -> Result<Vec<Vec<Turn>>, Failure> {
    let mut lines = vec![session.turns.clone()];
    if before.is_empty() {
        let others = branches
            .iter()
            .filter(|branch| branch.name != session.branch)
            .map(|branch| {
                client.get_session(GetSessionRequest {
                    session: session.id.clone(),
                    branch: branch.name.clone(),
                    limit: TURNS,
                    ..GetSessionRequest::default()
                })
            });
        let others = futures::future::try_join_all(others).await?;
        lines.extend(others.into_iter().map(|other| other.turns));
    }
    Ok(lines)
}

fn tokens(graph: &Graph) -> String {
    let calls = || graph.rows.iter().flat_map(|row| &row.turn.calls);
    let read: u64 = calls().filter_map(|call| call.tokens_in).sum();
    let written: u64 = calls().filter_map(|call| call.tokens_out).sum();
    format!("{read} / {written}")
}

fn branch_list(path: &str, branches: &[Branch], default: &str) -> Markup {
    html! {
        h2 { "Branches" }
        ul.branches {
            @for (lane, branch) in branches.iter().enumerate() {
                li {
                    span class={ "swatch lane-" (lane % 6) } aria-hidden="true" {}
                    strong { (branch.name) } " "
                    @if branch.name == default { span.state.good { "default" } " " }
                    @if branch.sealed { (state("sealed")) " " }
                    @if !branch.forked_from.is_empty() { "from " (hash(&branch.forked_from)) " " }
                    @if branch.name != default {
                        a href={ (path) "/compare?a=" (segment(default)) "&b=" (segment(&branch.name)) } { "compare with " (default) }
                        @if !branch.sealed {
                            " "
                            form.inline method="post" action={ (path) "/promote" } {
                                input type="hidden" name="branch" value=(branch.name);
                                button title={ "Makes " (branch.name) " the default and seals " (default) } { "Promote" }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// A form that runs a turn.
fn talk(path: &str, session: &Session, branches: &[Branch]) -> Markup {
    html! {
        h2 { "Say something" }
        form.talk method="post" action={ (path) "/run" } {
            input type="hidden" name="agent" value=(session.agent);
            label for="branch" { "On branch" }
            select id="branch" name="branch" {
                @for branch in branches.iter().filter(|branch| !branch.sealed) {
                    option value=(branch.name) selected[branch.name == session.branch] { (branch.name) }
                }
            }
            label for="input" { "Input" }
            textarea id="input" name="input" rows="3" required {}
            button { "Run a turn" }
        }
    }
}
