//! One turn with everything that it asked and was answered.

use crate::Console;
use crate::page::{Failure, HEADERS, Place, hash, lasted, page, segment, state, when};
use crate::text::{brief, pretty, visible};
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderName, header};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use maud::{Markup, html};
use vlinder_proto::state::{Call, CallDetail, GetBodyRequest, GetTurnRequest, TurnDetail};

/// Calls that are shown of one turn.
const CALLS_MAX: usize = 1000;
/// Up to so many calls are open from the start.
const OPEN_MAX: usize = 3;

/// `GET /turns/{submission}`
pub async fn show(
    State(console): State<Console>,
    Path(submission): Path<String>,
) -> Result<Response, Failure> {
    let request = GetTurnRequest {
        submission,
        ..GetTurnRequest::default()
    };
    let detail = console.client()?.get_turn(request).await?;
    let turn = detail.turn.clone().unwrap_or_default();
    let session = format!("/sessions/{}", segment(&detail.session));
    let runs = ["waiting", "running"].contains(&turn.status.as_str());
    let content = html! {
        p.back { a href={ (session) "#t-" (turn.submission) } data-key="ArrowLeft" { "← Session " (detail.session) } }
        h1 { (brief(&turn.input, 60)) }
        dl.facts {
            div { dt { "State" } dd { (state(&turn.status)) @if !turn.code.is_empty() { " " code { (turn.code) } } } }
            div { dt { "Submission" } dd { code { (turn.submission) } } }
            div { dt { "Branch" } dd { (turn.branch) } }
            div { dt { "Began" } dd { (when(turn.started_at)) } }
            div { dt { "Took" } dd { (lasted(turn.duration_ms)) } }
            div { dt { "Ended by" } dd { @if turn.by.is_empty() { "–" } @else { (turn.by) } } }
            div { dt { "End" } dd { @if turn.hash.is_empty() { "–" } @else { (hash(&turn.hash)) } } }
        }
        @if runs {
            form.inline method="post" action={ "/turns/" (segment(&turn.submission)) "/cancel" } { button { "Cancel this turn" } }
        } @else if !turn.hash.is_empty() {
            form.fork method="post" action={ (session) "/fork" } {
                input type="hidden" name="from" value=(turn.hash);
                label for="name" { "Fork after this turn, as branch" }
                input id="name" name="name" required pattern="[A-Za-z0-9_-]{1,64}" placeholder="name" ;
                button { "Fork" }
            }
        }
        (said("Input", &turn.input, turn.input_len, &turn.invoke))
        (calls(&detail))
        (said("Output", &turn.output, turn.output_len, &turn.hash))
        @if detail.ends.len() > 1 {
            h2 { "Ends that came too late" }
            ul { @for end in &detail.ends[1..] { li { (state(&end.outcome)) " by " (end.by) " " (when(end.time_ms)) } } }
        }
    };
    Ok(page(&brief(&turn.input, 40), Place::Sessions, content))
}

fn said(title: &str, text: &str, len: u64, node: &str) -> Markup {
    html! {
        section {
            h2 { (title) }
            (shown(&visible(text), text.len(), len, node))
        }
    }
}

/// A text with a way to the whole of it.
fn shown(text: &str, has: usize, len: u64, node: &str) -> Markup {
    html! {
        @if len == 0 { p.empty { "empty" } } @else { pre tabindex="0" { (text) } }
        @if (has as u64) < len && !node.is_empty() {
            p { "The first part of " (len) " bytes. " a href={ "/bodies/" (segment(node)) } { "The whole" } }
        }
    }
}

fn calls(detail: &TurnDetail) -> Markup {
    let count = detail.calls.len();
    html! {
        h2 { "Calls (" (count) ")" }
        @if count == 0 { p.empty { "The agent called nothing." } }
        div.calls data-walk="call" {
            @for call in detail.calls.iter().take(CALLS_MAX) { (call_of(call, count <= OPEN_MAX)) }
        }
        @if count > CALLS_MAX { p { "… and " (count - CALLS_MAX) " more; " code { "vlinder turn get" } " shows all." } }
    }
}

fn call_of(detail: &CallDetail, open: bool) -> Markup {
    let call = detail.call.clone().unwrap_or_default();
    html! {
        details.call id={ "c-" (call.seq) } open[open] {
            summary {
                span.number { (call.seq) } " "
                strong { (call.service) "." (call.operation) } " "
                @if !call.model.is_empty() { (call.model) " " }
                @if !call.label.is_empty() { span.label { (call.label) } " " }
                (state(&call.status)) " " (lasted(call.duration_ms)) (tokens(&call))
            }
            div.sides {
                section {
                    h3 { "Request " (hash(&call.request_hash)) }
                    (body_text(&detail.request, detail.request_base64, detail.request_len, &call.request_hash))
                }
                section {
                    h3 { "Response " (hash(&call.hash)) " " span.faint { (detail.content_type) } }
                    (body_text(&detail.response, detail.response_base64, detail.response_len, &call.hash))
                }
            }
            dl.facts {
                div { dt { "Asked" } dd { (when(detail.requested_at)) } }
                div { dt { "Answered" } dd { (when(detail.answered_at)) } }
                div { dt { "By" } dd { (detail.by) @if detail.attempt > 1 { ", attempt " (detail.attempt) } } }
                @if !call.state.is_empty() { div { dt { "State after it" } dd { (hash(&call.state)) } } }
                div { dt { "Follows" } dd { @for parent in &detail.parents { (hash(parent)) " " } } }
            }
        }
    }
}

fn tokens(call: &Call) -> Markup {
    html! {
        @if let (Some(read), Some(written)) = (call.tokens_in, call.tokens_out) {
            span.number { " · " (read) " → " (written) " tokens" }
        }
    }
}

fn body_text(text: &str, is_base64: bool, len: u64, node: &str) -> Markup {
    if is_base64 {
        return html! {
            p { (len) " bytes that are no text. " a href={ "/bodies/" (segment(node)) } { "Download" } }
        };
    }
    shown(&pretty(text), text.len(), len, node)
}

/// `GET /bodies/{hash}`: the bytes of a node's body, never as anything that a browser would run.
pub async fn body(
    State(console): State<Console>,
    Path(hash): Path<String>,
) -> Result<Response, Failure> {
    let request = GetBodyRequest {
        hash,
        ..GetBodyRequest::default()
    };
    let mut chunks = console.client()?.get_body(request).await?;
    // What is wrong with the request shows with the first piece.
    let first = chunks.next().await.transpose()?.unwrap_or_default();
    let rest = chunks.map(|chunk| chunk.map(|chunk| chunk.data));
    let bytes = futures::stream::once(async { Ok(first.data) }).chain(rest);
    let kind: [(HeaderName, &str); 2] = [
        (header::CONTENT_TYPE, "application/octet-stream"),
        (header::CONTENT_DISPOSITION, "attachment; filename=\"body\""),
    ];
    Ok((HEADERS, kind, Body::from_stream(bytes)).into_response())
}
