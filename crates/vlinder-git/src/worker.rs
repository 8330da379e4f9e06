//! The `dag_git` worker: holds the lease, and follows while it does.

use crate::error::Error;
use crate::follow::Follower;
use std::time::Duration;
use vlinder_bus::lease::{Asked, Lease};
use vlinder_bus::streams::LEASE_TTL;
use vlinder_worker::WorkerCx;

/// The repository in the data directory.
pub const REPOSITORY: &str = "conversations.git";
/// First and longest pause after a failure.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// The lease is renewed, or asked for, this often.
const RENEW_EVERY: Duration = Duration::from_secs(LEASE_TTL.as_secs() / 3);

/// Keeps the repository current until the worker drains. Of all such workers of a namespace one writes; the
/// others wait until its lease is free.
pub async fn run(cx: WorkerCx) -> Result<(), vlinder_worker::Error> {
    let drain = cx.drain.clone();
    let mut pause = PAUSE.0;
    loop {
        let Some(mut lease) = wait_for_lease(&cx).await? else {
            return Ok(());
        };
        let began = tokio::time::Instant::now();
        let ended = tokio::select! {
            biased;
            () = drain.cancelled() => None,
            ended = write(&cx, &mut lease) => Some(ended),
        };
        lease.release().await;
        match ended {
            None => return Ok(()),
            Some(Err(Error::Bus(vlinder_bus::Error::Closed))) => {
                return Err(vlinder_bus::Error::Closed.into());
            }
            Some(Ok(())) => continue,
            Some(Err(error)) => {
                tracing::warn!(error = chain(&error), "the git repository stands still")
            }
        }
        if began.elapsed() > PAUSE.1 {
            pause = PAUSE.0;
        }
        tokio::select! {
            () = drain.cancelled() => return Ok(()),
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(PAUSE.1);
    }
}

/// `None` when the worker drains first.
async fn wait_for_lease(cx: &WorkerCx) -> Result<Option<Lease>, vlinder_worker::Error> {
    let key = format!("git.{}", cx.ns);
    loop {
        match Lease::ask(&cx.bus, &key, &cx.id.to_string()).await {
            Ok(Asked::Ours(lease)) => return Ok(Some(lease)),
            Ok(Asked::Held { by }) => cx
                .control
                .waiting(&format!("{by} writes the git repository")),
            Err(error) if error.is_retryable() => {
                tracing::warn!(%error, "the lease could not be asked for")
            }
            Err(error) => return Err(error.into()),
        }
        tokio::select! {
            () = cx.drain.cancelled() => return Ok(None),
            () = tokio::time::sleep(RENEW_EVERY) => {}
        }
    }
}

/// Writes while the lease lasts.
async fn write(cx: &WorkerCx, lease: &mut Lease) -> Result<(), Error> {
    let mut follower = Follower::open(cx, cx.data_dir.join(REPOSITORY)).await?;
    cx.control.ready();
    loop {
        match follower.round(lease, RENEW_EVERY).await {
            Ok(()) => {}
            Err(Error::Deleted) => follower.start_over("it was deleted").await?,
            Err(Error::StartOver(reason)) => follower.start_over(reason).await?,
            // A write failed because its directory went away under it.
            Err(error @ (Error::Git { .. } | Error::Io { .. } | Error::Index(_))) => {
                match follower.check().await {
                    Err(Error::Deleted) => follower.start_over("it was deleted").await?,
                    _ => return Err(error),
                }
            }
            Err(error) => return Err(error),
        }
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
