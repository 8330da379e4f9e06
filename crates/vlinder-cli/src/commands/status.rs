//! `vlinder status`: one screen of how the cluster is. Answers within two seconds, also when nodes
//! or services are away; ends with 3 when registry or harness are.

use super::{Cx, queue, turn, worker};
use crate::error::Error;
use crate::table::{Column, Table};
use crate::{json, text};
use serde_json::{Value, json};
use std::time::Duration;
use vlinder_client::{Client, Limits};
use vlinder_proto::harness::{DeadLetter, ListQueuesRequest, Queue};
use vlinder_proto::registry::{
    Agent, ListAgentsRequest, ListNodesRequest, ListWorkersRequest, Node, Worker,
};
use vlinder_proto::state::{ListTurnsRequest, TurnSummary};

/// How long one question may take, all tries together: the whole answers within two seconds.
const ANSWER: Duration = Duration::from_millis(1500);

/// What the services said; an error where one did not.
struct Answers {
    nodes: Result<Vec<Node>, vlinder_client::Error>,
    workers: Result<Vec<Worker>, vlinder_client::Error>,
    agents: Result<Vec<Agent>, vlinder_client::Error>,
    turns: Result<Vec<TurnSummary>, vlinder_client::Error>,
    queues: Result<Vec<Queue>, vlinder_client::Error>,
    dead: Result<Vec<DeadLetter>, vlinder_client::Error>,
}

/// Asks everybody at once and prints what is known.
pub async fn run(cx: &Cx<'_>) -> Result<(), Error> {
    let limits = Limits {
        call: ANSWER,
        retry: ANSWER,
        ..Limits::default()
    };
    let quick = Cx {
        client: cx.client.with_limits(limits),
        out: cx.out,
    };
    let answers = ask(&quick).await;
    // Registry and harness are the hub; without either there is no answer worth its name.
    let hub = [answers.nodes.as_ref().err(), answers.queues.as_ref().err()];
    let nothing = hub.iter().all(Option::is_some) && answers.turns.is_err();
    let shown = (!nothing).then(|| value(&answers));
    if !nothing && !cx.out.json {
        show(cx, &answers)?;
    }
    let Answers { nodes, queues, .. } = answers;
    let outcome = nodes.map(drop).and(queues.map(drop)).map_err(Error::from);
    match (shown.filter(|_| cx.out.json), &outcome) {
        (Some(shown), Ok(())) => cx.out.value(&shown)?,
        (Some(shown), Err(error)) => cx.out.failed_value(shown, error.json(), false)?,
        (None, _) => {}
    }
    outcome
}

async fn ask(cx: &Cx<'_>) -> Answers {
    let client: &Client = &cx.client;
    let (nodes, workers, agents, turns, queues, dead) = futures::join!(
        client.list_nodes(ListNodesRequest {}),
        client.list_workers(ListWorkersRequest::default()),
        client.list_agents(ListAgentsRequest::default()),
        client.list_turns(ListTurnsRequest::default()),
        client.list_queues(ListQueuesRequest::default()),
        queue::all_dead(cx),
    );
    let mut queues = queues.map(|answer| answer.queues);
    if let Ok(queues) = &mut queues {
        queues.retain(|queue| queue.waiting + queue.held > 0);
    }
    Answers {
        nodes: nodes.map(|answer| answer.nodes),
        workers: workers.map(|answer| answer.workers),
        agents: agents.map(|answer| answer.agents),
        turns: turns.map(|answer| answer.turns),
        queues,
        dead,
    }
}

/// `waiting` counts as up: the worker is well, something that it needs is away.
fn is_up(worker: &Worker) -> bool {
    matches!(worker.state.as_str(), "ready" | "waiting")
}

fn value(answers: &Answers) -> Value {
    fn or_null<T>(answer: &Result<T, vlinder_client::Error>, of: impl Fn(&T) -> Value) -> Value {
        answer.as_ref().map_or(Value::Null, of)
    }
    let workers = |workers: &Vec<Worker>| {
        let up = workers.iter().filter(|worker| is_up(worker)).count();
        let not_up: Vec<&Worker> = workers.iter().filter(|worker| !is_up(worker)).collect();
        json!({ "total": workers.len(), "up": up, "not_up": json::of(&not_up) })
    };
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "nodes": or_null(&answers.nodes, json::of),
        "workers": or_null(&answers.workers, workers),
        "agents": or_null(&answers.agents, |agents| agents.iter().map(json::agent).collect()),
        "turns": or_null(&answers.turns, json::of),
        "queues": or_null(&answers.queues, json::of),
        "dead_letters": or_null(&answers.dead, |dead| dead.len().into()),
        "problems": problems(answers),
    })
}

fn problems(answers: &Answers) -> Vec<String> {
    let errors = [
        answers.nodes.as_ref().err(),
        answers.workers.as_ref().err(),
        answers.agents.as_ref().err(),
        answers.turns.as_ref().err(),
        answers.queues.as_ref().err(),
        answers.dead.as_ref().err(),
    ];
    let mut said: Vec<String> = errors
        .into_iter()
        .flatten()
        .map(ToString::to_string)
        .collect();
    for worker in answers.workers.iter().flatten() {
        if let Some(healed) = worker.notes.get("healed") {
            said.push(format!("the log lost its tail: {healed}"));
        }
    }
    // Several questions to one service have one reason.
    said.dedup();
    said
}

fn show(cx: &Cx<'_>, answers: &Answers) -> Result<(), Error> {
    let out = cx.out;
    out.line(&format!("vlinder {}", env!("CARGO_PKG_VERSION")))?;
    if let Ok(nodes) = &answers.nodes {
        section(cx, "", &worker::node_table(nodes))?;
    }
    if let Ok(workers) = &answers.workers {
        let odd: Vec<Worker> = workers
            .iter()
            .filter(|worker| worker.state != "ready")
            .cloned()
            .collect();
        let up = workers.iter().filter(|worker| is_up(worker)).count();
        out.line(&format!("\nworkers: {up} of {} up", workers.len()))?;
        section(cx, "", &worker::table(&odd))?;
    }
    if let Ok(agents) = &answers.agents {
        let mut table = Table::new(&[
            ("agent", Column::Whole),
            ("status", Column::State),
            ("replicas", Column::Number),
            ("reason", Column::Cut),
        ]);
        for agent in agents {
            table.row([
                agent.name.clone(),
                agent.status.clone(),
                format!("{}/{}", agent.ready_replicas, agent.replicas),
                agent.reason.clone(),
            ]);
        }
        section(cx, "agents", &table)?;
    }
    if let Ok(turns) = &answers.turns {
        section(cx, "turns that run or wait", &turn::table(turns))?;
    }
    if let Ok(queues) = &answers.queues {
        section(cx, "queues with work", &queue::table(queues))?;
    }
    if let Ok(dead) = &answers.dead
        && !dead.is_empty()
    {
        out.line(&format!(
            "\n{} given up: vlinder queue dead list",
            text::count(dead.len() as u64, "message")
        ))?;
    }
    for problem in problems(answers) {
        out.note(&format!("problem: {}", text::safe_line(&problem)));
    }
    Ok(())
}

fn section(cx: &Cx<'_>, title: &str, table: &Table) -> Result<(), Error> {
    if !title.is_empty() {
        let none = if table.is_empty() { ": none" } else { "" };
        cx.out.line(&format!("\n{title}{none}"))?;
    }
    match table.is_empty() {
        true => Ok(()),
        false => cx.out.table(table, ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn away() -> vlinder_client::Error {
        vlinder_client::Error::Unreachable {
            service: "registry",
            address: "http://127.0.0.1:9".into(),
            cause: "refused".into(),
        }
    }

    #[test]
    fn what_is_unknown_is_null_and_why() {
        let worker = |state: &str| Worker {
            state: state.into(),
            ..Default::default()
        };
        let answers = Answers {
            nodes: Err(away()),
            workers: Ok(vec![worker("ready"), worker("waiting"), worker("backoff")]),
            agents: Err(away()),
            turns: Ok(vec![]),
            queues: Ok(vec![]),
            dead: Ok(vec![]),
        };
        let shown = value(&answers);
        assert_eq!(shown["nodes"], Value::Null);
        let workers = &shown["workers"];
        assert_eq!((&workers["total"], &workers["up"]), (&json!(3), &json!(2)));
        assert_eq!(workers["not_up"][0]["state"], "backoff");
        assert_eq!(shown["dead_letters"], 0);
        assert_eq!(shown["problems"].as_array().unwrap().len(), 1);
    }
}
