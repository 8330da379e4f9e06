//! The life of one replica: start, health, service, end, and again.
//!
//! [`run`] follows the deployed version: the new one is started first, and when it is ready the old
//! one gets no more turns, finishes those it has, and is stopped. [`keep`] keeps one version alive.

use crate::agent::{Agent, Shared};
use crate::bridge;
use crate::http::{AgentClient, Whole};
use crate::launcher::{Deployment, Instance, LaunchSpec};
use crate::pool::{Gone, Replica};
use hyper::Request;
use hyper::header::HOST;
use rand::Rng;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

/// How long an instance may take from its start until it answers `GET /health`.
const START_MAX: Duration = Duration::from_secs(60);
/// After this it is said of an instance that it has not answered yet.
const SLOW_START: Duration = Duration::from_secs(2);
/// First and longest pause between two questions for its health.
const HEALTH_PAUSE: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(200));
/// How long one answer to such a question may take.
const HEALTH_MAX: Duration = Duration::from_secs(5);
/// What is read of the body of `/health`, in bytes, to keep the connection.
const HEALTH_BYTES_MAX: usize = 64 * 1024;
/// Shortest pause before a restart that is not the first, and longest.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));
/// How long the last lines of an instance that has ended may take through its pipes.
const LAST_LINES_WAIT: Duration = Duration::from_millis(20);
/// An instance that served so long was good: its end is the first one again.
const GOOD_STRETCH: Duration = Duration::from_secs(10);
/// Ends in a row after which a replica is called crash-looping.
const CRASH_LOOP_AFTER: u32 = 3;

/// What can be said of a replica.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Status {
    pub version: u64,
    /// `starting ready backoff crash-looping draining`.
    pub state: &'static str,
    pub pid: u32,
    pub restarts: u64,
    pub reason: String,
    /// Starts in a row that never got as far as being ready.
    pub failed_starts: u32,
}

impl Status {
    /// Whether it shows no sign of ever being ready.
    pub fn is_hopeless(&self) -> bool {
        self.failed_starts >= CRASH_LOOP_AFTER
    }
}

/// Runs replica `index` in whatever version is wanted, until `stop`. Then it finishes its turns.
pub(crate) async fn run(
    agent: Arc<Agent>,
    index: u32,
    mut wanted: watch::Receiver<Arc<Deployment>>,
    status: watch::Sender<Status>,
    stop: CancellationToken,
) {
    let mut lives = JoinSet::new();
    let mut current: Option<(CancellationToken, watch::Receiver<Status>)> = None;
    loop {
        let deployment = wanted.borrow_and_update().clone();
        let (tx, mut rx) = watch::channel(Status::default());
        let end = CancellationToken::new();
        let life = keep(agent.clone(), index, deployment, tx, end.clone());
        lives.spawn(life.in_current_span());
        let mut old = current.take();
        if let Some((end, status)) = &old
            && status.borrow().state != "ready"
        {
            end.cancel();
            old = None;
        }
        let is_over = loop {
            tokio::select! {
                () = stop.cancelled() => break true,
                changed = wanted.changed() => break changed.is_err(),
                changed = rx.changed() => {
                    if changed.is_err() {
                        break true;
                    }
                    let now = rx.borrow_and_update().clone();
                    if now.state == "ready" && let Some((end, _)) = old.take() {
                        end.cancel();
                    }
                    status.send_replace(now);
                }
                Some(_) = lives.join_next() => {}
            }
        };
        if let Some((end, _)) = old {
            end.cancel();
        }
        if is_over {
            status.send_modify(|status| status.state = "draining");
            end.cancel();
            while lives.join_next().await.is_some() {}
            return;
        }
        current = Some((end, rx));
    }
}

/// Why an instance no longer serves.
enum End {
    Stop,
    Gone(Gone),
}

async fn keep(
    agent: Arc<Agent>,
    index: u32,
    deployment: Arc<Deployment>,
    status: watch::Sender<Status>,
    stop: CancellationToken,
) {
    let mut now = Status {
        version: deployment.version,
        ..Status::default()
    };
    let mut ends = 0;
    loop {
        // It is not well again because it is tried again.
        now.state = match ends >= CRASH_LOOP_AFTER {
            true => "crash-looping",
            false => "starting",
        };
        now.pid = 0;
        status.send_replace(now.clone());
        let started = tokio::select! {
            started = start(&agent.shared, index, &deployment, &status) => started,
            () = stop.cancelled() => return,
        };
        let why = match started {
            Err(why) => {
                now.failed_starts += 1;
                ends += 1;
                why
            }
            Ok((replica, instance)) => {
                now.state = "ready";
                now.pid = instance.pid();
                now.reason.clear();
                now.failed_starts = 0;
                status.send_replace(now.clone());
                let began = Instant::now();
                let end = serve(&agent, replica, instance, &stop).await;
                if began.elapsed() >= GOOD_STRETCH {
                    ends = 0;
                }
                match end {
                    End::Stop => return,
                    End::Gone(gone) => {
                        ends += u32::from(gone.by_itself);
                        gone.why
                    }
                }
            }
        };
        tracing::info!(agent = %agent.name, replica = index, why, "an agent's instance ended");
        now.restarts += 1;
        now.reason = why;
        now.pid = 0;
        if let Some(pause) = pause_after(ends) {
            now.state = if ends >= CRASH_LOOP_AFTER {
                "crash-looping"
            } else {
                "backoff"
            };
            status.send_replace(now.clone());
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => return,
            }
        }
    }
}

/// The first restart comes at once, the others after growing pauses with jitter.
fn pause_after(ends: u32) -> Option<Duration> {
    let doublings = ends.checked_sub(2)?.min(16);
    let pause = (BACKOFF.0 * 2u32.pow(doublings)).min(BACKOFF.1);
    Some(pause.mul_f64(rand::rng().random_range(0.75..1.25)))
}

/// Starts an instance and waits until it is healthy. `Err` says in words why it is not.
async fn start(
    shared: &Arc<Shared>,
    index: u32,
    deployment: &Arc<Deployment>,
    status: &watch::Sender<Status>,
) -> Result<(Arc<Replica>, Box<dyn Instance>), String> {
    let _turn = shared.starts.acquire().await;
    let admitted = shared.callers.admit(deployment.clone());
    let admitted = admitted.map_err(|error| format!("no secret for the agent: {error}"))?;
    let spec = LaunchSpec {
        deployment: deployment.clone(),
        replica: index,
        secret: admitted.secret.clone(),
        bridge: shared.bridge,
        face: bridge::face(shared, &admitted.caller),
    };
    let launched = shared.launcher.launch(&spec).await;
    let mut instance = launched.map_err(|error| error.to_string())?;
    status.send_modify(|status| status.pid = instance.pid());
    let client = AgentClient::new(instance.connector());
    let takes_json = tokio::select! {
        biased;
        exit = instance.exited() => {
            tokio::time::sleep(LAST_LINES_WAIT).await;
            return Err(with_last_lines(shared, &spec, &exit.0));
        }
        never = tell_if_slow(shared, &spec, status) => match never {},
        healthy = tokio::time::timeout(START_MAX, healthy(&client)) => match healthy {
            Ok(takes_json) => takes_json,
            Err(_) => {
                let why = format!("it did not answer GET /health with 200 within {} s", START_MAX.as_secs());
                return Err(with_last_lines(shared, &spec, &why));
            }
        },
    };
    let replica = Replica::new(
        deployment.clone(),
        client,
        takes_json,
        admitted,
        instance.marker(),
    );
    let replica = replica.printing(instance.flood());
    Ok((Arc::new(replica), instance))
}

/// An instance that runs and does not become healthy is told of long before it is given up.
async fn tell_if_slow(
    shared: &Shared,
    spec: &LaunchSpec,
    status: &watch::Sender<Status>,
) -> Infallible {
    tokio::time::sleep(SLOW_START).await;
    let why = "it runs, but has not answered GET /health with 200 yet";
    let why = with_last_lines(shared, spec, why);
    status.send_modify(|status| status.reason = why);
    std::future::pending().await
}

/// Starts an instance that no claim stands for.
pub(crate) async fn start_one(
    shared: &Arc<Shared>,
    index: u32,
    deployment: &Arc<Deployment>,
) -> Result<(Arc<Replica>, Box<dyn Instance>), String> {
    start(shared, index, deployment, &watch::Sender::default()).await
}

fn with_last_lines(shared: &Shared, spec: &LaunchSpec, why: &str) -> String {
    let lines = shared.launcher.last_lines(spec);
    if lines.is_empty() {
        why.to_owned()
    } else {
        format!("{why}; it said: {}", lines.join(" | "))
    }
}

/// Asks until it answers 200; whether it wants its input as JSON.
async fn healthy(client: &AgentClient) -> bool {
    let mut pause = HEALTH_PAUSE.0;
    loop {
        if let Ok(Some(takes_json)) = tokio::time::timeout(HEALTH_MAX, ask_health(client)).await {
            return takes_json;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(HEALTH_PAUSE.1);
    }
}

async fn ask_health(client: &AgentClient) -> Option<bool> {
    let request = Request::get("/health")
        .header(HOST, "localhost")
        .body(Whole::default())
        .ok()?;
    let mut answering = client.send(request).await.ok()?;
    let head = answering.head();
    if head.status() != 200 {
        return None;
    }
    let wanted = head.headers().get("vlinder-input");
    let takes_json = wanted.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"json"));
    let mut len = 0;
    while let Ok(Some(chunk)) = answering.chunk().await {
        len += chunk.len();
        if len > HEALTH_BYTES_MAX {
            break;
        }
    }
    Some(takes_json)
}

/// Lets a replica serve until it is gone or no longer wanted.
async fn serve(
    agent: &Agent,
    replica: Arc<Replica>,
    mut instance: Box<dyn Instance>,
    stop: &CancellationToken,
) -> End {
    agent.pool.add(replica.clone());
    let gone = tokio::select! {
        exit = instance.exited() => Some(Gone { why: exit.0, by_itself: true }),
        gone = replica.gone() => Some(gone),
        () = stop.cancelled() => None,
    };
    agent.pool.remove(&replica);
    if let Some(gone) = gone {
        replica.meet(gone.clone());
        // Dropping the instance ends it at once.
        return End::Gone(gone);
    }
    // Its turns end by themselves, at the latest at their deadlines.
    tokio::select! {
        () = replica.idle() => instance.stop().await,
        exit = instance.exited() => replica.meet(Gone { why: exit.0, by_itself: true }),
        _ = replica.gone() => {}
        () = agent.deleted.cancelled() => {
            replica.meet(Gone { why: "the agent was deleted".to_owned(), by_itself: false });
        }
    }
    End::Stop
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_back_off() {
        assert_eq!(pause_after(0), None);
        assert_eq!(pause_after(1), None, "the first restart comes at once");
        assert!(pause_after(2).unwrap() <= BACKOFF.0.mul_f64(1.25));
        assert!(pause_after(4).unwrap() >= BACKOFF.0 * 3);
        assert!(pause_after(1000).unwrap() <= BACKOFF.1.mul_f64(1.25));
    }
}
