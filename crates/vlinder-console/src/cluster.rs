//! Nodes, workers and queues as they are now, and the agents with their replicas.

use crate::Console;
use crate::page::{Failure, Place, lasted, page, state, when};
use crate::text::visible;
use axum::extract::State;
use axum::response::Response;
use maud::html;
use vlinder_proto::harness::ListQueuesRequest;
use vlinder_proto::registry::{ListAgentsRequest, ListNodesRequest, ListWorkersRequest};

/// `GET /cluster`; the script asks again when an event comes.
pub async fn show(State(console): State<Console>) -> Result<Response, Failure> {
    let client = console.client()?;
    let (nodes, workers, queues) = futures::try_join!(
        client.list_nodes(ListNodesRequest {}),
        client.list_workers(ListWorkersRequest::default()),
        client.list_queues(ListQueuesRequest::default()),
    )?;
    let content = html! {
        h1 { "Cluster" }
        p.hint id="live" role="status" { "Reload to see changes." }
        div id="now" data-live="/events" {
            h2 { "Nodes" }
            table.rows {
                thead { tr { th { "Node" } th { "State" } th { "Version" } th.number { "Workers" } th.number { "Last seen" } th { "Labels" } } }
                tbody {
                    @for node in &nodes.nodes {
                        tr {
                            td { (node.name) }
                            td { (state(&node.state)) }
                            td { (node.version) }
                            td.number { (node.workers) }
                            td.number { (lasted(node.last_seen_ms)) " ago" }
                            td { @for (key, value) in &node.labels { code { (key) "=" (value) } " " } }
                        }
                    }
                }
            }
            h2 { "Workers" }
            table.rows {
                thead { tr { th { "Worker" } th { "Node" } th { "State" } th.number { "Pid" } th.number { "Up" } th.number { "Restarts" } th { "Last exit" } } }
                tbody {
                    @for worker in &workers.workers {
                        tr {
                            td { (worker.role) "/" (worker.index) }
                            td { (worker.node) }
                            td { (state(&worker.state)) @if !worker.reason.is_empty() { div.reason { (visible(&worker.reason)) } } }
                            td.number { (worker.pid) }
                            td.number { (lasted(worker.uptime_ms)) }
                            td.number { (worker.restarts) }
                            td {
                                (visible(&worker.last_exit))
                                @if !worker.last_lines.is_empty() && worker.state != "ready" {
                                    details { summary { "last lines" } pre { @for line in &worker.last_lines { (visible(line)) "\n" } } }
                                }
                            }
                        }
                    }
                }
            }
            h2 { "Queues" }
            table.rows {
                thead { tr { th { "Queue" } th.number { "Waiting" } th.number { "Held" } th.number { "Oldest" } } }
                tbody {
                    @for queue in &queues.queues {
                        tr {
                            td { (queue.name) }
                            td.number { (queue.waiting) }
                            td.number { (queue.held) }
                            td.number { @match queue.oldest_ms { Some(ms) => (lasted(ms)), None => "–" } }
                        }
                    }
                }
            }
        }
    };
    Ok(page("Cluster", Place::Cluster, content))
}

/// `GET /agents`
pub async fn agents(State(console): State<Console>) -> Result<Response, Failure> {
    let agents = console
        .client()?
        .list_agents(ListAgentsRequest::default())
        .await?
        .agents;
    let content = html! {
        h1 { "Agents" }
        @if agents.is_empty() { p.empty { "None is deployed. " code { "vlinder agent deploy -p DIR" } " deploys one." } }
        @for agent in &agents {
            section.agent {
                h2 { (agent.name) " " (state(&agent.status)) }
                p { (visible(&agent.description)) }
                @if !agent.reason.is_empty() { p.problem { (visible(&agent.reason)) } }
                dl.facts {
                    div { dt { "Version" } dd { (agent.version) } }
                    div { dt { "Deployed" } dd { (when(agent.deployed_at)) } }
                    div { dt { "Runs as" } dd { (agent.runtime) " " code { (visible(&agent.executable)) } } }
                    div { dt { "Replicas ready" } dd { (agent.ready_replicas) " of " (agent.replicas) } }
                }
                @if !agent.instances.is_empty() {
                    table.rows {
                        thead { tr { th.number { "Replica" } th { "Node" } th { "State" } th.number { "Pid" } th.number { "Restarts" } th { "Reason" } } }
                        tbody {
                            @for replica in &agent.instances {
                                tr {
                                    td.number { (replica.index) }
                                    td { (replica.node) }
                                    td { (state(&replica.state)) }
                                    td.number { (replica.pid) }
                                    td.number { (replica.restarts) }
                                    td { (visible(&replica.reason)) }
                                }
                            }
                        }
                    }
                }
            }
        }
    };
    Ok(page("Agents", Place::Agents, content))
}
