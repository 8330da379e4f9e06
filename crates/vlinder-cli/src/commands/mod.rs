//! The commands, one file each. All of them: ask, then print JSON or a table.

mod agent;
mod bench;
mod events;
mod fleet;
mod logs;
mod model;
mod queue;
mod repl;
mod replay;
mod run;
mod secret;
mod session;
mod status;
mod turn;
mod worker;

use crate::args::{Agent, Cli, Command, Fleet, Global, Model, Node, Session};
use crate::error::Error;
use crate::out::Out;
use clap::CommandFactory;
use vlinder_client::Client;
use vlinder_config::{AddressSource, ClientConfig, Env};

/// What a command works with.
pub struct Cx<'a> {
    /// The cluster.
    pub client: Client,
    /// Where words go.
    pub out: &'a Out,
}

impl<'a> Cx<'a> {
    fn connect(global: &Global, env: &Env, out: &'a Out) -> Result<Self, Error> {
        let env = match &global.data_dir {
            None => env.clone(),
            Some(dir) => {
                let dir = dir.to_str().ok_or_else(|| {
                    Error::Usage("--data-dir: expected a path in UTF-8".to_owned())
                })?;
                env.clone().with("VLINDER_DIR", dir)
            }
        };
        let config = ClientConfig::load(&env, global.addr.as_deref()).map_err(|mistakes| {
            let lines: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
            Error::Usage(lines.join("\n"))
        })?;
        for warning in &config.warnings {
            out.note(&format!("warning: {warning}"));
        }
        let mut client = Client::new(&config)?;
        if matches!(config.source, AddressSource::Node | AddressSource::Default) {
            // A node that was killed and started again may listen on other ports; it says where.
            let addr = global.addr.clone();
            client = client.looked_up_by(move || {
                let found = ClientConfig::load(&env, addr.as_deref()).ok();
                found.filter(|found| found.source == AddressSource::Node)
            });
        }
        Ok(Self { client, out })
    }
}

/// Runs one command to its end.
pub async fn run(cli: Cli, env: &Env, out: &Out) -> Result<(), Error> {
    if let Some(name) = later(&cli.command) {
        return Err(Error::Usage(format!(
            "`vlinder {name}` comes with a later release"
        )));
    }
    match cli.command {
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "vlinder", &mut script);
            return out.raw(&script);
        }
        Command::Agent(Agent::New { lang, name, dir }) => {
            return agent::new(out, &lang, &name, &dir);
        }
        Command::Fleet(Fleet::New { name, dir }) => return fleet::new(out, &name, &dir),
        _ => {}
    }
    let cx = Cx::connect(&cli.global, env, out)?;
    match cli.command {
        Command::Agent(command) => agent::run(&cx, command).await,
        Command::Fleet(command) => fleet::run(&cx, command).await,
        Command::Session(command) => session::run(&cx, command).await,
        Command::Turn(command) => turn::run(&cx, command).await,
        Command::Worker(command) => worker::run(&cx, command).await,
        Command::Node(_) => worker::nodes(&cx).await,
        Command::Queue(command) => queue::run(&cx, command).await,
        Command::Dead(command) => queue::dead(&cx, command).await,
        Command::Model(command) => model::run(&cx, command).await,
        Command::Secret(command) => secret::run(&cx, command).await,
        Command::Status => status::run(&cx).await,
        Command::Events { prefix } => events::run(&cx, prefix).await,
        Command::Bench { hops, in_flight } => bench::run(&cx, hops, in_flight).await,
        // Answered above.
        Command::Completions { .. } | Command::Why(_) => Ok(()),
    }
}

/// The name of a command that this release does not have yet.
pub(crate) fn later(command: &Command) -> Option<&'static str> {
    Some(match command {
        Command::Why(_) => "why",
        Command::Session(Session::Diff(_)) => "session diff",
        Command::Session(Session::Export(_)) => "session export",
        Command::Node(Node::Describe(_)) => "node describe",
        Command::Node(Node::Cordon(_)) => "node cordon",
        Command::Node(Node::Uncordon(_)) => "node uncordon",
        Command::Node(Node::Drain(_)) => "node drain",
        Command::Model(Model::Add(_)) => "model add",
        Command::Model(Model::Remove(_)) => "model remove",
        _ => return None,
    })
}
