//! Holds the claim on one replica and runs it: what the claim says is what the replica does.

use crate::agent::Agent;
use crate::launcher::Deployment;
use crate::replica::{self, Status};
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use vlinder_bus::streams::BUCKET_REPLICAS;
use vlinder_core::AgentName;
use vlinder_worker::replicas::{ReplicaClaim, replica_key};

/// Pause before a claim is written again that could not be written.
const WRITE_RETRY: Duration = Duration::from_millis(500);
/// How long the last state of a replica that has ended may take to be written.
const LAST_WRITE_MAX: Duration = Duration::from_secs(2);
/// Longest reason in a claim, in bytes.
const REASON_BYTES_MAX: usize = 2000;

/// A replica that this worker holds.
pub(crate) struct Held {
    pub status: watch::Receiver<Status>,
    /// Ends it: turns are finished, then the claim is given up.
    pub stop: CancellationToken,
}

/// Runs a claimed replica until `stop`, or until the claim is lost. Whose it was.
pub(crate) async fn hold(
    agent: Arc<Agent>,
    index: u32,
    mut revision: u64,
    wanted: watch::Receiver<Arc<Deployment>>,
    status: watch::Sender<Status>,
    stop: CancellationToken,
) -> (AgentName, u32) {
    let mut status_rx = status.subscribe();
    let end = CancellationToken::new();
    let life = replica::run(agent.clone(), index, wanted, status, end.clone());
    tokio::pin!(life);
    let key = replica_key(&agent.name, index);
    let bus = &agent.shared.cx.bus;
    let (mut is_ours, mut is_over) = (true, false);
    loop {
        tokio::select! {
            () = &mut life => break,
            () = stop.cancelled(), if !end.is_cancelled() => end.cancel(),
            Ok(()) = status_rx.changed(), if is_ours => {
                let now = status_rx.borrow_and_update().clone();
                let value = claim_of(&agent, &now);
                let at = Some(revision);
                let written = async {
                    loop {
                        match bus.kv_put(BUCKET_REPLICAS, &key, value.clone(), at).await {
                            Err(error) if error.is_retryable() => tokio::time::sleep(WRITE_RETRY).await,
                            outcome => return outcome,
                        }
                    }
                };
                tokio::pin!(written);
                // Also when the writing takes long, the replica's life goes on; but the claim is
                // given up only when it is known how it stands.
                let written = tokio::select! {
                    written = &mut written => written,
                    () = &mut life => {
                        is_over = true;
                        let last = tokio::time::timeout(LAST_WRITE_MAX, written).await;
                        last.unwrap_or(Ok(revision))
                    }
                };
                match written {
                    Ok(next) => revision = next,
                    Err(error) => {
                        tracing::warn!(agent = %agent.name, replica = index, %error, "the claim on a replica is lost");
                        is_ours = false;
                        end.cancel();
                    }
                }
                if is_over {
                    break;
                }
            }
        }
    }
    if is_ours && let Err(error) = bus.kv_delete(BUCKET_REPLICAS, &key, Some(revision)).await {
        tracing::warn!(agent = %agent.name, replica = index, %error, "the claim on a replica could not be given up");
    }
    (agent.name.clone(), index)
}

/// The claim as it is written.
pub(crate) fn claim_of(agent: &Agent, status: &Status) -> Bytes {
    let id = &agent.shared.cx.id;
    let mut reason = status.reason.clone();
    if let Some((cut, _)) = reason
        .char_indices()
        .find(|(at, _)| *at >= REASON_BYTES_MAX)
    {
        reason.truncate(cut);
    }
    let claim = ReplicaClaim {
        node: id.node.to_string(),
        role: id.role.to_string(),
        index: id.index,
        version: status.version,
        state: status.state.to_owned(),
        pid: status.pid,
        restarts: status.restarts,
        reason,
    };
    serde_json::to_vec(&claim).unwrap_or_default().into()
}
