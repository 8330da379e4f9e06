//! Instances beyond an agent's replicas, for as long as turns wait for what they delegated.
//!
//! They are nobody's claim: each lives on the worker whose turns wait, serves delegated turns only,
//! and ends when it has had none for a moment.

use crate::agent::Agent;
use crate::launcher::Deployment;
use crate::pool::Gone;
use crate::replica;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::time::Instant;
use tracing::Instrument;

/// How long an instance without a turn stays.
const LINGER: Duration = Duration::from_secs(3);
/// How often it is looked whether it has one.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Pause before another one is started after one failed to.
const FAILED_PAUSE: Duration = Duration::from_secs(1);
/// Where their replica numbers begin: no manifest asks for so many replicas.
const INDEX_FIRST: u32 = 1_000_000;

static NEXT: AtomicU32 = AtomicU32::new(0);

const _: () = assert!(INDEX_FIRST > vlinder_core::manifest::REPLICAS_MAX);

/// Starts one and lets it serve to its end. The pool counts it as starting already.
pub(crate) fn spawn(agent: &Arc<Agent>, deployment: Arc<Deployment>) {
    // Ends with its agent, with the worker, or when nobody needs it.
    tokio::spawn(run(agent.clone(), deployment).in_current_span());
}

async fn run(agent: Arc<Agent>, deployment: Arc<Deployment>) {
    let index = INDEX_FIRST + NEXT.fetch_add(1, Ordering::Relaxed) % INDEX_FIRST;
    let (replica, mut instance) = match replica::start_one(&agent.shared, index, &deployment).await
    {
        Ok(started) => started,
        Err(why) => {
            tracing::warn!(agent = %agent.name, why, "an instance for delegated turns did not start");
            tokio::time::sleep(FAILED_PAUSE).await;
            return agent.pool.surged(None);
        }
    };
    tracing::debug!(agent = %agent.name, "an instance for delegated turns is ready");
    agent.pool.surged(Some(replica.clone()));
    let mut idle_since = Instant::now();
    let mut look = tokio::time::interval(LOOK_EVERY);
    let gone = loop {
        tokio::select! {
            exit = instance.exited() => break Some(Gone { why: exit.0, by_itself: true }),
            gone = replica.gone() => break Some(gone),
            () = agent.deleted.cancelled() => {
                break Some(Gone { why: "the agent was deleted".to_owned(), by_itself: false });
            }
            _ = look.tick() => {
                if replica.is_busy() {
                    idle_since = Instant::now();
                }
                let linger = match agent.shared.cx.drain.is_cancelled() {
                    true => Duration::ZERO,
                    false => LINGER,
                };
                if idle_since.elapsed() >= linger && agent.pool.remove_idle(&replica) {
                    break None;
                }
            }
        }
    };
    match gone {
        None => instance.stop().await,
        Some(gone) => {
            agent.pool.remove(&replica);
            replica.meet(gone);
        }
    }
}
