//! `vlinder agent`: everything but `run`.

use super::{Cx, logs, repl, run as turns};
use crate::args::{Agent, Tail};
use crate::error::Error;
use crate::out::Out;
use crate::table::{Column, Table};
use crate::{json, pack, scaffold, text};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;
use tokio::time::Instant;
use vlinder_core::ContentHash;
use vlinder_core::manifest::{AgentManifest, MANIFEST_BYTES_MAX, RuntimeKind};
use vlinder_proto::registry as proto;

/// The registry has no call that waits for readiness, so it is asked again: first after this long …
const LOOK_FIRST: Duration = Duration::from_millis(30);
/// … then ever less often, at most this far apart.
const LOOK_MAX: Duration = Duration::from_millis(500);
/// A replica that failed is tried again by its runtime; it has failed for good for us when it stands so
/// for this long.
const FAILED_FOR: Duration = Duration::from_secs(3);

/// Ends of a replica after which its start counts as failed: the first may be bad luck.
const ENDS_MAX: u64 = 2;
/// How much of a reason is shown while waiting, in characters.
const REASON_CHARS: usize = 400;
/// What the registry says of a replica that is about to be replaced.
const OF_VERSION_BEFORE: &str = "runs the version before";

/// Runs one of them.
pub async fn run(cx: &Cx<'_>, command: Agent) -> Result<(), Error> {
    match command {
        Agent::New { lang, name, dir } => new(cx.out, &lang, &name, &dir),
        Agent::Deploy {
            path,
            wait,
            wait_timeout,
        } => deploy(cx, &path, wait.then_some(wait_timeout)).await,
        Agent::List => list(cx).await,
        Agent::Get { name } => get(cx, name).await,
        Agent::Delete { name } => delete(cx, name).await,
        Agent::Logs { name, tail } => agent_logs(cx, name, &tail).await,
        Agent::Run(args) if args.prompt.is_none() => repl::run(cx, args).await,
        Agent::Run(args) => turns::run(cx, args).await,
    }
}

/// `agent new`: needs no daemon.
pub fn new(out: &Out, lang: &str, name: &str, parent: &Path) -> Result<(), Error> {
    let (dir, files) = scaffold::write(lang, name, parent)?;
    let shown = dir.display().to_string();
    let sentence = format!(
        "made {shown} ({}); try: vlinder agent deploy -p {shown} --wait",
        files.join(", ")
    );
    out.done(
        json!({ "name": name, "path": shown, "files": files }),
        &sentence,
    )
}

async fn deploy(cx: &Cx<'_>, path: &Path, wait: Option<Duration>) -> Result<(), Error> {
    let agent = deploy_one(cx, path, wait).await?;
    let mut sentence = format!(
        "{} version {} is {}",
        agent.name, agent.version, agent.status
    );
    if !agent.reason.is_empty() {
        sentence.push_str(&format!(": {}", agent.reason));
    }
    cx.out.done(json::agent(&agent), &sentence)
}

/// Deploys the agent of a directory and waits until it is ready, if asked to.
pub async fn deploy_one(
    cx: &Cx<'_>,
    path: &Path,
    wait: Option<Duration>,
) -> Result<proto::Agent, Error> {
    let (text, manifest) = read_manifest(path)?;
    let agent = if manifest.runtime == RuntimeKind::Process {
        let bundle = pack::pack(path)?;
        cx.out.note(&format!(
            "packed {}, {}",
            text::count(bundle.entries as u64, "file"),
            text::size(bundle.bytes.len() as u64)
        ));
        let hash = ContentHash::of(&bundle.bytes).to_string();
        cx.client
            .deploy_agent(&text, Some(bundle.bytes), &hash)
            .await?
    } else {
        cx.client.deploy_agent(&text, None, "").await?
    };
    match wait {
        None => Ok(agent),
        Some(limit) => {
            cx.out.note(&format!(
                "deployed {} version {}",
                agent.name, agent.version
            ));
            wait_until_ready(cx, agent, limit).await
        }
    }
}

/// The manifest of the agent in a directory: its text, and what it says.
pub fn read_manifest(dir: &Path) -> Result<(String, AgentManifest), Error> {
    let text = read_toml(
        &dir.join("agent.toml"),
        "`vlinder agent new python NAME` makes an agent, -p names its directory",
    )?;
    let shown = dir.join("agent.toml");
    let manifest = AgentManifest::parse(&text)
        .map_err(|error| Error::Usage(format!("{}: {error}", shown.display())))?;
    Ok((text, manifest))
}

/// The text of a manifest; `hint` says what to do where there is none.
pub fn read_toml(path: &Path, hint: &str) -> Result<String, Error> {
    let shown = path.display();
    let meta = std::fs::metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Error::Usage(format!("{shown} does not exist; {hint}")),
        _ => Error::io(format!("cannot read {shown}"))(error),
    })?;
    if meta.len() > MANIFEST_BYTES_MAX as u64 {
        return Err(Error::Usage(format!(
            "{shown} has {} bytes: expected at most {MANIFEST_BYTES_MAX}",
            meta.len()
        )));
    }
    std::fs::read_to_string(path).map_err(Error::io(format!("cannot read {shown}")))
}

async fn wait_until_ready(
    cx: &Cx<'_>,
    deployed: proto::Agent,
    limit: Duration,
) -> Result<proto::Agent, Error> {
    let until = Instant::now() + limit;
    let (name, version) = (deployed.name.clone(), deployed.version);
    let mut agent = deployed;
    let mut told = String::new();
    let mut watch = StartWatch::default();
    let mut failed_since = None;
    let mut pause = LOOK_FIRST;
    loop {
        if agent.status == "ready" {
            return Ok(agent);
        }
        if agent.version != version {
            let now = agent.version;
            return Err(Error::Conflict(format!(
                "agent {name} was deployed again meanwhile: version {now} replaced {version}"
            )));
        }
        let now = Instant::now();
        failed_since = watch.fails(&agent).then(|| failed_since.unwrap_or(now));
        if failed_since.is_some_and(|since| now - since >= FAILED_FOR)
            || (failed_since.is_some() && now >= until)
        {
            return Err(Error::AgentFailed {
                code: "start".to_owned(),
                message: format!(
                    "{}; `vlinder agent logs {name}` shows what it printed",
                    reason_of(&agent)
                ),
            });
        }
        let reason = text::brief(reason_of(&agent), REASON_CHARS);
        let state = format!("{}: {reason}", agent.status);
        if state != told {
            cx.out.note(&state);
            told = state;
        }
        if now >= until {
            let text = format!(
                "agent {name} was not ready within {} ({})",
                text::span(limit.as_millis() as u64),
                told
            );
            return Err(match agent.status.as_str() {
                "waiting" => Error::NoWorker(text),
                _ => Error::Deadline(text),
            });
        }
        tokio::time::sleep(pause.min(until - now)).await;
        pause = (pause * 2).min(LOOK_MAX);
        let request = proto::GetAgentRequest {
            name: name.clone(),
            ..Default::default()
        };
        agent = cx.client.get_agent(request).await?;
    }
}

/// Finds out whether an agent fails to start, from what the registry says of it again and again.
#[derive(Default)]
struct StartWatch {
    /// How often each replica of the version had ended when it was first seen.
    before: HashMap<u32, u64>,
}

impl StartWatch {
    /// Whether a replica of the very version fails: it was given up, or ended again and again since
    /// it was first seen. Those of the version before are listed until they are replaced.
    fn fails(&mut self, agent: &proto::Agent) -> bool {
        let mut fails = false;
        for replica in &agent.instances {
            if replica.reason == OF_VERSION_BEFORE {
                continue;
            }
            let before = *self.before.entry(replica.index).or_insert(replica.restarts);
            let given_up = matches!(replica.state.as_str(), "failed" | "crash-looping");
            let ends = replica.restarts.saturating_sub(before);
            let loops = ends >= ENDS_MAX && replica.state != "ready" && !replica.reason.is_empty();
            fails |= given_up || loops;
        }
        fails
    }
}

fn reason_of(agent: &proto::Agent) -> &str {
    match (agent.reason.as_str(), agent.status.as_str()) {
        ("", "starting") => "its replicas are being started",
        ("", _) => "no reason was given",
        (reason, _) => reason,
    }
}

async fn list(cx: &Cx<'_>) -> Result<(), Error> {
    let agents = cx
        .client
        .list_agents(proto::ListAgentsRequest::default())
        .await?
        .agents;
    let mut table = Table::new(&[
        ("name", Column::Whole),
        ("status", Column::State),
        ("replicas", Column::Number),
        ("runtime", Column::Whole),
        ("version", Column::Number),
        ("deployed", Column::Whole),
        ("description", Column::Cut),
    ]);
    let now = text::now_ms();
    for agent in &agents {
        let says = match agent.reason.is_empty() {
            true => agent.description.clone(),
            false => agent.reason.clone(),
        };
        table.row([
            agent.name.clone(),
            agent.status.clone(),
            format!("{}/{}", agent.ready_replicas, agent.replicas),
            agent.runtime.clone(),
            agent.version.to_string(),
            text::ago(agent.deployed_at, now),
            says,
        ]);
    }
    let value = || agents.iter().map(json::agent).collect::<Value>();
    cx.out.list(
        value,
        table,
        "no agent is deployed; `vlinder agent deploy -p DIR` deploys one",
    )
}

async fn get(cx: &Cx<'_>, name: String) -> Result<(), Error> {
    let request = proto::GetAgentRequest {
        name,
        ..Default::default()
    };
    let agent = cx.client.get_agent(request).await?;
    if cx.out.json {
        return cx.out.value(&json::agent(&agent));
    }
    for (what, value) in [
        ("name", agent.name.clone()),
        ("description", agent.description.clone()),
        ("status", agent.status.clone()),
        ("reason", agent.reason.clone()),
        ("runtime", agent.runtime.clone()),
        ("executable", agent.executable.clone()),
        ("version", agent.version.to_string()),
        ("deployed", text::timestamp(agent.deployed_at)),
        (
            "replicas",
            format!("{} of {} ready", agent.ready_replicas, agent.replicas),
        ),
        ("concurrency", agent.concurrency.to_string()),
        ("hash", agent.hash.clone()),
    ] {
        if !value.is_empty() {
            cx.out
                .line(&format!("{what:<13}{}", text::safe_line(&value)))?;
        }
    }
    let mut table = Table::new(&[
        ("replica", Column::Number),
        ("state", Column::State),
        ("worker", Column::Whole),
        ("pid", Column::Number),
        ("restarts", Column::Number),
        ("reason", Column::Cut),
    ]);
    for replica in &agent.instances {
        table.row([
            replica.index.to_string(),
            replica.state.clone(),
            replica.worker.clone(),
            replica.pid.to_string(),
            replica.restarts.to_string(),
            replica.reason.clone(),
        ]);
    }
    if table.is_empty() {
        return Ok(());
    }
    cx.out.line("")?;
    cx.out.table(&table, "")
}

async fn delete(cx: &Cx<'_>, name: String) -> Result<(), Error> {
    let request = proto::DeleteAgentRequest {
        name: name.clone(),
        ..Default::default()
    };
    let version = cx.client.delete_agent(request).await?.version;
    let sentence = format!("deleted agent {name}; its sessions stay on record");
    cx.out.done(
        json!({ "name": name, "deleted": true, "version": version }),
        &sentence,
    )
}

async fn agent_logs(cx: &Cx<'_>, name: String, tail: &Tail) -> Result<(), Error> {
    let request = proto::AgentLogsRequest {
        name,
        follow: tail.follow,
        lines: tail.lines,
        ..Default::default()
    };
    let lines = cx.client.agent_logs(request).await?;
    logs::print(cx.out, lines, tail.follow).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(replicas: &[(&str, u64, &str)]) -> proto::Agent {
        let replicas = replicas
            .iter()
            .map(|(state, restarts, reason)| proto::Replica {
                state: (*state).into(),
                restarts: *restarts,
                reason: (*reason).into(),
                ..Default::default()
            });
        proto::Agent {
            instances: replicas.collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_replica_that_ends_again_and_again_fails() {
        let mut watch = StartWatch::default();
        // The count goes on over versions; only what is added to it speaks of this one.
        assert!(!watch.fails(&seen(&[("starting", 7, "")])));
        assert!(!watch.fails(&seen(&[("starting", 8, "it exited with code 2")])));
        assert!(watch.fails(&seen(&[("backoff", 9, "it exited with code 2")])));
        assert!(!watch.fails(&seen(&[("ready", 9, "")])));
    }

    #[test]
    fn a_replica_that_was_given_up_fails_unless_it_is_of_the_version_before() {
        let mut watch = StartWatch::default();
        assert!(!watch.fails(&seen(&[("failed", 0, OF_VERSION_BEFORE)])));
        assert!(watch.fails(&seen(&[("failed", 0, "no such command")])));
        assert!(watch.fails(&seen(&[("crash-looping", 0, "")])));
    }

    #[test]
    fn a_directory_without_a_good_manifest_is_bad_usage() {
        let dir = tempfile::tempdir().unwrap();
        let missing = read_manifest(dir.path()).unwrap_err();
        assert_eq!(missing.exit_code(), 2);
        assert!(missing.to_string().contains("agent new"), "{missing}");
        std::fs::write(dir.path().join("agent.toml"), "name = 7").unwrap();
        let wrong = read_manifest(dir.path()).unwrap_err();
        assert_eq!(wrong.exit_code(), 2);
        assert!(wrong.to_string().contains("agent.toml"), "{wrong}");
    }
}
