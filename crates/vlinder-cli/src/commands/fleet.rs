//! `vlinder fleet`: agents that belong together.

use super::{Cx, agent, repl, run as turns};
use crate::args::{Fleet, RunArgs};
use crate::error::Error;
use crate::out::Out;
use crate::table::{Column, Table};
use crate::{scaffold, text};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;
use vlinder_core::manifest::FleetManifest;
use vlinder_proto::registry as proto;

/// Runs one of them.
pub async fn run(cx: &Cx<'_>, command: Fleet) -> Result<(), Error> {
    match command {
        Fleet::New { name, dir } => new(cx.out, &name, &dir),
        Fleet::Deploy {
            path,
            wait,
            wait_timeout,
        } => deploy(cx, &path, wait.then_some(wait_timeout)).await,
        Fleet::List => list(cx).await,
        Fleet::Get { name } => get(cx, name).await,
        Fleet::Delete { name } => delete(cx, name).await,
        Fleet::Run(args) => talk(cx, args).await,
    }
}

/// `fleet new`: needs no daemon.
pub fn new(out: &Out, name: &str, parent: &Path) -> Result<(), Error> {
    let (dir, files) = scaffold::write_fleet(name, parent)?;
    let shown = dir.display().to_string();
    let sentence = format!(
        "made {shown} ({}); try: vlinder fleet deploy -p {shown} --wait",
        files.join(", ")
    );
    out.done(
        json!({ "name": name, "path": shown, "files": files }),
        &sentence,
    )
}

async fn deploy(cx: &Cx<'_>, path: &Path, wait: Option<Duration>) -> Result<(), Error> {
    let file = path.join("fleet.toml");
    let hint = "`vlinder fleet new NAME` makes a fleet, -p names its directory";
    let text = agent::read_toml(&file, hint)?;
    let fleet = FleetManifest::parse(&text)
        .map_err(|error| Error::Usage(format!("{}: {error}", file.display())))?;
    // Every mistake in a manifest shows before anything is deployed.
    let mut members = Vec::new();
    for (alias, member) in &fleet.agents {
        let dir = path.join(&member.path);
        let (_, manifest) = agent::read_manifest(&dir)?;
        members.push((alias, dir, manifest.name.to_string()));
    }
    let mut agents = Vec::new();
    for (alias, dir, name) in members {
        agent::deploy_one(cx, &dir, wait).await?;
        agents.push(proto::FleetAgent {
            alias: alias.to_string(),
            agent: name,
        });
    }
    let request = proto::PutFleetRequest {
        name: fleet.name.to_string(),
        entry: fleet.entry.to_string(),
        agents,
        ..Default::default()
    };
    let fleet = cx.client.put_fleet(request).await?;
    let sentence = format!(
        "fleet {} version {} has {} agents; try: vlinder fleet run {} -p \"hello\"",
        fleet.name,
        fleet.version,
        fleet.agents.len(),
        fleet.name
    );
    cx.out.done(shown(&fleet), &sentence)
}

fn shown(fleet: &proto::Fleet) -> Value {
    let agents = fleet.agents.iter();
    let agents: serde_json::Map<String, Value> = agents
        .map(|member| (member.alias.clone(), member.agent.clone().into()))
        .collect();
    json!({
        "name": fleet.name,
        "entry": fleet.entry,
        "agents": agents,
        "version": fleet.version,
        "deployed_at": fleet.deployed_at,
    })
}

fn entry_of(fleet: &proto::Fleet) -> Result<&str, Error> {
    let entry = fleet
        .agents
        .iter()
        .find(|member| member.alias == fleet.entry);
    entry.map(|member| member.agent.as_str()).ok_or_else(|| {
        Error::Usage(format!(
            "fleet {} has no entry agent; deploy it again",
            fleet.name
        ))
    })
}

async fn list(cx: &Cx<'_>) -> Result<(), Error> {
    let listed = cx.client.list_fleets(proto::ListFleetsRequest::default());
    let fleets = listed.await?.fleets;
    let mut table = Table::new(&[
        ("name", Column::Whole),
        ("entry", Column::Whole),
        ("agents", Column::Cut),
        ("version", Column::Number),
        ("deployed", Column::Whole),
    ]);
    let now = text::now_ms();
    for fleet in &fleets {
        let agents: Vec<&str> = fleet
            .agents
            .iter()
            .map(|member| member.agent.as_str())
            .collect();
        table.row([
            fleet.name.clone(),
            entry_of(fleet).unwrap_or_default().to_owned(),
            agents.join(", "),
            fleet.version.to_string(),
            text::ago(fleet.deployed_at, now),
        ]);
    }
    let value = || fleets.iter().map(shown).collect::<Value>();
    cx.out.list(
        value,
        table,
        "no fleet is deployed; `vlinder fleet deploy -p DIR` deploys one",
    )
}

async fn find(cx: &Cx<'_>, name: String) -> Result<proto::Fleet, Error> {
    let request = proto::GetFleetRequest {
        name,
        ..Default::default()
    };
    Ok(cx.client.get_fleet(request).await?)
}

async fn get(cx: &Cx<'_>, name: String) -> Result<(), Error> {
    let fleet = find(cx, name).await?;
    let mut table = Table::new(&[
        ("alias", Column::Whole),
        ("agent", Column::Whole),
        ("", Column::Whole),
    ]);
    for member in &fleet.agents {
        let entry = if member.alias == fleet.entry {
            "entry"
        } else {
            ""
        };
        table.row([member.alias.clone(), member.agent.clone(), entry.to_owned()]);
    }
    cx.out
        .list(|| shown(&fleet), table, "the fleet has no agents")
}

async fn delete(cx: &Cx<'_>, name: String) -> Result<(), Error> {
    let request = proto::DeleteFleetRequest {
        name: name.clone(),
        ..Default::default()
    };
    let version = cx.client.delete_fleet(request).await?.version;
    let sentence = format!("deleted fleet {name}; its agents stay deployed");
    cx.out
        .done(json!({ "name": name, "version": version }), &sentence)
}

async fn talk(cx: &Cx<'_>, mut args: RunArgs) -> Result<(), Error> {
    let fleet = find(cx, args.name).await?;
    args.name = entry_of(&fleet)?.to_owned();
    match args.prompt {
        None => repl::run(cx, args).await,
        Some(_) => turns::run(cx, args).await,
    }
}
