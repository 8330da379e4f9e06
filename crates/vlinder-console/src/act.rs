//! What one can do from a page: fork, promote, cancel, run a turn. Each goes back to where it shows.

use crate::Console;
use crate::page::{Failure, segment};
use axum::extract::{Form, Path, State};
use axum::response::Redirect;
use serde::Deserialize;
use vlinder_proto::harness::{CancelRequest, ForkRequest, PromoteRequest, RunRequest};

#[derive(Deserialize)]
pub struct ForkForm {
    from: String,
    name: String,
}

/// `POST /sessions/{session}/fork`
pub async fn fork(
    State(console): State<Console>,
    Path(session): Path<String>,
    Form(form): Form<ForkForm>,
) -> Result<Redirect, Failure> {
    let request = ForkRequest {
        session: session.clone(),
        from: form.from,
        name: form.name,
        ..ForkRequest::default()
    };
    console.client()?.fork(request).await?;
    Ok(back(&session))
}

#[derive(Deserialize)]
pub struct PromoteForm {
    branch: String,
}

/// `POST /sessions/{session}/promote`
pub async fn promote(
    State(console): State<Console>,
    Path(session): Path<String>,
    Form(form): Form<PromoteForm>,
) -> Result<Redirect, Failure> {
    let request = PromoteRequest {
        session: session.clone(),
        branch: form.branch,
        ..PromoteRequest::default()
    };
    console.client()?.promote(request).await?;
    Ok(back(&session))
}

/// `POST /turns/{submission}/cancel`
pub async fn cancel(
    State(console): State<Console>,
    Path(submission): Path<String>,
) -> Result<Redirect, Failure> {
    let request = CancelRequest {
        submission: submission.clone(),
        ..CancelRequest::default()
    };
    console.client()?.cancel(request).await?;
    Ok(Redirect::to(&format!("/turns/{}", segment(&submission))))
}

#[derive(Deserialize)]
pub struct RunForm {
    agent: String,
    branch: String,
    input: String,
}

/// `POST /sessions/{session}/run`: begins a turn and shows it; it goes on by itself.
pub async fn run(
    State(console): State<Console>,
    Path(session): Path<String>,
    Form(form): Form<RunForm>,
) -> Result<Redirect, Failure> {
    if form.input.trim().is_empty() {
        return Err(Failure::bad("There is nothing to say to the agent."));
    }
    let mut turn = console.client()?.run(RunRequest {
        agent: form.agent,
        session,
        branch: form.branch,
        input: form.input.into_bytes(),
        cancel_on_disconnect: false,
        ..RunRequest::default()
    });
    // The first event says that the turn is stored.
    turn.next().await?;
    Ok(Redirect::to(&format!(
        "/turns/{}",
        segment(turn.submission())
    )))
}

fn back(session: &str) -> Redirect {
    Redirect::to(&format!("/sessions/{}", segment(session)))
}
