//! `vlinder worker` and `vlinder node`.

use super::{Cx, logs};
use crate::args::{ScaleTo, Worker};
use crate::error::Error;
use crate::table::{Column, Table};
use crate::{json, text};
use vlinder_proto::registry as proto;

/// Runs one of them.
pub async fn run(cx: &Cx<'_>, command: Worker) -> Result<(), Error> {
    match command {
        Worker::List { node } => list(cx, node).await,
        Worker::Scale { to, node } => scale(cx, to, node.unwrap_or_default()).await,
        Worker::Restart { role, node } => {
            let request = proto::RestartWorkersRequest {
                role: role.to_string(),
                node: node.unwrap_or_default(),
            };
            let restarted = cx.client.restart_workers(request).await?.restarted;
            let value = serde_json::json!({ "role": role, "restarted": restarted });
            cx.out.done(
                value,
                &format!("{restarted} workers of {role} are restarted"),
            )
        }
        Worker::Logs { role, node, tail } => {
            let request = proto::WorkerLogsRequest {
                role: role.to_string(),
                node: node.unwrap_or_default(),
                follow: tail.follow,
                lines: tail.lines,
            };
            let lines = cx.client.worker_logs(request).await?;
            logs::print(cx.out, lines, tail.follow).await
        }
    }
}

async fn list(cx: &Cx<'_>, node: Option<String>) -> Result<(), Error> {
    let all = proto::ListWorkersRequest::default();
    let mut workers = cx.client.list_workers(all).await?.workers;
    if let Some(node) = node {
        // Chosen here, so that the workers of a node that is away are shown, too.
        workers.retain(|worker| worker.node == node);
        if workers.is_empty() {
            // The registry says why.
            workers = cx
                .client
                .list_workers(proto::ListWorkersRequest { node })
                .await?
                .workers;
        }
    }
    cx.out.list(
        || json::of(&workers),
        table(&workers),
        "no worker is listed",
    )
}

/// Workers as `worker list` and `status` show them.
pub fn table(workers: &[proto::Worker]) -> Table {
    let mut table = Table::new(&[
        ("node", Column::Whole),
        ("role", Column::Whole),
        ("#", Column::Number),
        ("pid", Column::Number),
        ("state", Column::State),
        ("restarts", Column::Number),
        ("up", Column::Number),
        ("jobs", Column::Number),
        ("remark", Column::Cut),
    ]);
    for worker in workers {
        let last_exit = match worker.last_exit.is_empty() {
            true => String::new(),
            false => format!("last exit: {}", worker.last_exit),
        };
        let remark = [&worker.reason, &worker.address, &last_exit];
        let remark = remark.into_iter().find(|remark| !remark.is_empty());
        table.row([
            worker.node.clone(),
            worker.role.clone(),
            worker.index.to_string(),
            worker.pid.to_string(),
            worker.state.clone(),
            worker.restarts.to_string(),
            text::span(worker.uptime_ms),
            worker.jobs.to_string(),
            remark.cloned().unwrap_or_default(),
        ]);
    }
    table
}

async fn scale(cx: &Cx<'_>, to: ScaleTo, node: String) -> Result<(), Error> {
    let request = proto::ScaleRequest {
        role: to.role.to_string(),
        count: to.count,
        node,
    };
    let scaled = cx.client.scale(request).await?;
    let sentence = format!(
        "{} on {}: {} → {}",
        to.role, scaled.node, scaled.before, scaled.after
    );
    let mut value = json::of(&scaled);
    value["role"] = to.role.as_str().into();
    cx.out.done(value, &sentence)
}

/// `node list`.
pub async fn nodes(cx: &Cx<'_>) -> Result<(), Error> {
    let nodes = cx
        .client
        .list_nodes(proto::ListNodesRequest {})
        .await?
        .nodes;
    cx.out
        .list(|| json::of(&nodes), node_table(&nodes), "no node is listed")
}

/// Nodes as `node list` and `status` show them.
pub fn node_table(nodes: &[proto::Node]) -> Table {
    let mut table = Table::new(&[
        ("node", Column::Whole),
        ("state", Column::State),
        ("workers", Column::Number),
        ("version", Column::Whole),
        ("seen", Column::Number),
        ("started", Column::Number),
        ("labels", Column::Cut),
    ]);
    let now = text::now_ms();
    for node in nodes {
        let mut labels: Vec<String> = node
            .labels
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        labels.sort();
        table.row([
            node.name.clone(),
            node.state.clone(),
            node.workers.to_string(),
            node.version.clone(),
            format!("{} ago", text::span(node.last_seen_ms)),
            text::ago(node.started_at, now),
            labels.join(" "),
        ]);
    }
    table
}
