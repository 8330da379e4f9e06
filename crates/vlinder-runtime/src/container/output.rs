//! What a container prints, as the engine keeps it: read from where it was read last.

use super::engine::Engine;
use crate::launcher::LaunchSpec;
use crate::logs::{AgentLogs, Stream};
use crate::output::Sink;
use bollard::container::LogOutput;
use bollard::query_parameters::LogsOptionsBuilder;
use futures::StreamExt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio_util::task::AbortOnDropHandle;

/// Pause before the output is asked for again after the engine went away.
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Follows a container's output until it has ended. `from_start`: what it printed before, too. Also gives
/// the bytes that are dropped, as they grow.
pub(super) fn follow(
    engine: &Engine,
    logs: &Arc<AgentLogs>,
    spec: &LaunchSpec,
    name: &str,
    from_start: bool,
) -> (AbortOnDropHandle<()>, Arc<AtomicU64>) {
    let since = match from_start {
        true => 0,
        false => now_s(),
    };
    let flood = Arc::<AtomicU64>::default();
    let out = Sink::new(logs, spec, Stream::Stdout, flood.clone());
    let err = Sink::new(logs, spec, Stream::Stderr, flood.clone());
    let reading = read(engine.clone(), name.to_owned(), since, out, err);
    (AbortOnDropHandle::new(tokio::spawn(reading)), flood)
}

async fn read(engine: Engine, name: String, mut since: i32, mut out: Sink, mut err: Sink) {
    loop {
        let options = LogsOptionsBuilder::new()
            .follow(true)
            .stdout(true)
            .stderr(true)
            .since(since)
            .build();
        let mut lines = engine.docker.logs(&name, Some(options));
        let is_over = loop {
            match lines.next().await {
                Some(Ok(LogOutput::StdErr { message })) => {
                    err.take(&message);
                    err.pace().await;
                }
                Some(Ok(LogOutput::StdOut { message } | LogOutput::Console { message })) => {
                    out.take(&message);
                    out.pace().await;
                }
                Some(Ok(LogOutput::StdIn { .. })) => {}
                Some(Err(_)) => break false,
                None => break true,
            }
        };
        // The engine ends the answer when the container has ended, and breaks it off when it ends itself.
        let known = engine.inspect(&name).await;
        let runs = match known {
            Ok(None) => false,
            Ok(Some(known)) => known.state.is_some_and(|state| state.running == Some(true)),
            Err(_) => true,
        };
        if !runs {
            break;
        }
        if is_over {
            since = now_s();
        }
        engine.returned(RETRY_MAX).await;
    }
    out.end();
    err.end();
}

fn now_s() -> i32 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i32::try_from(since.as_secs()).unwrap_or(i32::MAX)
}
