//! Log lines for clients: the last ones from this node's files, then live ones from every node.

use crate::status;
use futures::StreamExt;
use futures::stream::BoxStream;
use std::path::PathBuf;
use tonic::Status;
use vlinder_core::{AgentName, WorkerRole};
use vlinder_proto::registry::LogLine;
use vlinder_worker::WorkerCx;
use vlinder_worker::logs::{self, LogRecord};

/// Most past lines that one call returns.
const LINES_MAX: u32 = 10_000;
/// Past lines where the caller does not say.
const LINES_DEFAULT: u32 = 100;

type Lines = BoxStream<'static, Result<LogLine, Status>>;

/// An agent's lines.
pub async fn of_agent(
    cx: &WorkerCx,
    agent: &AgentName,
    count: u32,
    follow: bool,
) -> Result<Lines, Status> {
    let signal = logs::agent_signal(&cx.ns, agent);
    stream(
        cx,
        logs::agent_file(&cx.data_dir, agent),
        signal,
        String::new(),
        count,
        follow,
    )
    .await
}

/// A role's lines; `node` empty: of all nodes.
pub async fn of_role(
    cx: &WorkerCx,
    role: WorkerRole,
    node: &str,
    count: u32,
    follow: bool,
) -> Result<Lines, Status> {
    let file = logs::role_file(&cx.data_dir, role);
    stream(
        cx,
        file,
        logs::role_signal(role),
        node.to_owned(),
        count,
        follow,
    )
    .await
}

async fn stream(
    cx: &WorkerCx,
    file: PathBuf,
    signal: String,
    node: String,
    count: u32,
    follow: bool,
) -> Result<Lines, Status> {
    let count = if count == 0 {
        LINES_DEFAULT
    } else {
        count.min(LINES_MAX)
    } as usize;
    // Listen before reading, so that no line falls between.
    let live = if follow {
        Some(cx.bus.signals(&signal).await.map_err(status::of_bus)?)
    } else {
        None
    };
    let past = tokio::task::spawn_blocking(move || logs::tail(&file, count)).await;
    let past = past.map_err(|error| Status::internal(error.to_string()))?;
    let past =
        past.map_err(|error| Status::internal(format!("the log file cannot be read: {error}")))?;
    let last_ms = past.last().map_or(0, |record| record.time_ms);
    let past = futures::stream::iter(past);
    let live = live.map_or_else(
        || futures::stream::empty().boxed(),
        |signals| {
            let records = signals.filter_map(move |signal| async move {
                let record = serde_json::from_slice::<LogRecord>(&signal.body).ok()?;
                (record.time_ms >= last_ms).then_some(record)
            });
            records.map(Ok).boxed()
        },
    );
    let live = status::until(live, cx.drain.clone());
    let wanted = move |record: &Result<LogRecord, Status>| {
        let record = record.as_ref().ok();
        let wanted = record.is_none_or(|record| node.is_empty() || record.node == node);
        futures::future::ready(wanted)
    };
    Ok(past
        .map(Ok)
        .chain(live)
        .filter(wanted)
        .map(|record| record.map(line))
        .boxed())
}

fn line(record: LogRecord) -> LogLine {
    LogLine {
        time_ms: record.time_ms,
        node: record.node,
        source: record.source,
        line: record.line,
    }
}
