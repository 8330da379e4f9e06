//! Two branches side by side.

use crate::Console;
use crate::page::{Failure, Place, page, segment, state};
use crate::text::brief;
use axum::extract::{Path, Query, State};
use axum::response::Response;
use maud::{Markup, html};
use serde::Deserialize;
use vlinder_proto::state::{GetSessionRequest, Turn};

/// Turns of each side that are compared: the last ones.
const TURNS: u32 = 200;

#[derive(Deserialize)]
pub struct CompareQuery {
    a: String,
    b: String,
}

/// `GET /sessions/{session}/compare?a=&b=`
pub async fn show(
    State(console): State<Console>,
    Path(id): Path<String>,
    Query(query): Query<CompareQuery>,
) -> Result<Response, Failure> {
    let client = console.client()?;
    let side = |branch: &str| {
        client.get_session(GetSessionRequest {
            session: id.clone(),
            branch: branch.to_owned(),
            limit: TURNS,
            ..GetSessionRequest::default()
        })
    };
    let (a, b) = futures::try_join!(side(&query.a), side(&query.b))?;
    let shared = shared(&a.turns, &b.turns);
    let path = format!("/sessions/{}", segment(&a.id));
    let rows = a.turns.len().max(b.turns.len());
    let content = html! {
        p.back { a href=(path) data-key="ArrowLeft" { "← Session " (a.id) } }
        h1 { (query.a) " and " (query.b) }
        p {
            @match shared {
                0 => "They have no turn in common.",
                1 => "They have their first turn in common.",
                n => { "They have their first " (n) " turns in common." }
            }
        }
        table.compare {
            thead { tr { th { "Turn" } th { (query.a) } th { (query.b) } } }
            tbody {
                @for row in shared..rows {
                    @let (left, right) = (a.turns.get(row), b.turns.get(row));
                    tr class=[differs(left, right).then_some("differs")] {
                        th scope="row" { (row + 1) }
                        td { (turn_of(left)) }
                        td { (turn_of(right)) }
                    }
                }
            }
        }
        @if shared == rows { p.empty { "Nothing differs." } }
    };
    Ok(page("Compare", Place::Sessions, content))
}

/// How many turns at the beginning are the same ones.
fn shared(a: &[Turn], b: &[Turn]) -> usize {
    let same = |(a, b): &(&Turn, &Turn)| a.submission == b.submission;
    a.iter().zip(b).take_while(same).count()
}

fn differs(a: Option<&Turn>, b: Option<&Turn>) -> bool {
    let said = |turn: &Turn| (turn.input.clone(), turn.output.clone(), turn.status.clone());
    a.map(said) != b.map(said)
}

fn turn_of(turn: Option<&Turn>) -> Markup {
    html! {
        @if let Some(turn) = turn {
            a href={ "/turns/" (segment(&turn.submission)) } { (brief(&turn.input, 120)) }
            p { (brief(&turn.output, 400)) }
            p.meta {
                (state(&turn.status)) " " (turn.calls_total) " calls"
                @if !turn.state.is_empty() { " · state " (crate::page::hash(&turn.state)) }
            }
        } @else { span.faint { "–" } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shared_ends_at_the_first_difference() {
        let turn = |id: &str| Turn {
            submission: id.into(),
            input: id.into(),
            ..Turn::default()
        };
        let a = [turn("1"), turn("2"), turn("3")];
        let b = [turn("1"), turn("x"), turn("3")];
        assert_eq!(shared(&a, &b), 1);
        assert_eq!(shared(&a, &a), 3);
        assert_eq!(shared(&a, &[]), 0);
        assert!(differs(a.get(1), b.get(1)));
        assert!(!differs(a.get(2), b.get(2)));
        assert!(differs(a.first(), None));
    }
}
