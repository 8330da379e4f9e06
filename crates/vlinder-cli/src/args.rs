//! What can be typed: every command, its arguments and its help. No behaviour.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;
use vlinder_core::WorkerRole;
use vlinder_core::manifest::TIMEOUT_MAX;

/// Talk to a Vlinder cluster: agents, sessions, turns, workers.
#[derive(Debug, Parser)]
#[command(
    name = "vlinder",
    version,
    propagate_version = true,
    max_term_width = 100
)]
#[command(after_help = "\
Examples:
  vlinder agent deploy -p examples/notes-agent --wait
  vlinder agent run notes -p 'remember the key is under the pot'
  vlinder session list
  vlinder status

Exit codes: 0 done · 1 other failure · 2 bad usage · 3 cannot be reached, or no live worker ·
5 not found · 6 the agent failed · 7 deadline · 8 refused (credential) · 9 conflict · 10 cancelled")]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Args)]
pub struct Global {
    /// What to print: a table for people, or one JSON value (one a line where a command streams)
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    pub output: Format,
    /// Where the harness is, e.g. hub:9091; several, separated by commas, are tried in turn
    #[arg(long, global = true, value_name = "HARNESS")]
    pub addr: Option<String>,
    /// The data directory of the node here, for its addresses and its token
    #[arg(long, global = true, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// No colours, even on a terminal
    #[arg(long, global = true)]
    pub no_color: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make, deploy, run and look at agents
    #[command(subcommand)]
    Agent(Agent),
    /// Agents that belong together: make, deploy, run
    #[command(subcommand)]
    Fleet(Fleet),
    /// Conversations on record: look, fork, promote, verify
    #[command(subcommand)]
    Session(Session),
    /// Turns that run or ran
    #[command(subcommand)]
    Turn(Turn),
    /// Workers of the nodes: list, scale, restart, read their logs
    #[command(subcommand)]
    Worker(Worker),
    /// Machines of the cluster
    #[command(subcommand)]
    Node(Node),
    /// Queues of the bus, and what was given up
    #[command(subcommand)]
    Queue(Queue),
    #[command(subcommand, hide = true)]
    Dead(Dead),
    /// Models that can be used
    #[command(subcommand)]
    Model(Model),
    /// Secrets, encrypted at rest
    #[command(subcommand)]
    Secret(Secret),
    /// One screen: nodes, workers that are not up, agents, turns, queues
    #[command(after_help = "Ends with 3 when the hub cannot be reached.")]
    Status,
    /// Node, worker, agent and turn changes as they happen
    #[command(
        after_help = "With -o json every event is one JSON value on one line.\n\n\
Example:\n  vlinder events --prefix turn. -o json"
    )]
    Events {
        /// Only events whose name begins so, e.g. turn. or worker.ready
        #[arg(long, default_value = "", value_name = "P")]
        prefix: String,
    },
    /// Measure this installation against its own bus
    Bench {
        /// Samples of each measure
        #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
        hops: u32,
        /// Turns in flight at once
        #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
        in_flight: u32,
    },
    /// Print the completion script of a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    #[command(hide = true)]
    Why(Later),
}

/// A command that a later release brings.
#[derive(Debug, Args)]
pub struct Later {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub rest: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum Agent {
    /// Write a new agent that works at once
    #[command(
        after_help = "Example:\n  vlinder agent new python greeter && vlinder agent deploy -p greeter --wait"
    )]
    New {
        /// Its language: python, go, js, ts or rust
        lang: String,
        /// Its name; also the directory that is made
        name: String,
        /// Where to make the directory
        #[arg(long, value_name = "DIR", default_value = ".")]
        dir: PathBuf,
    },
    /// Deploy the agent of a directory; a name that exists is replaced
    #[command(after_help = "\
The directory is packed whole, but for .git, __pycache__ and what its .vlinderignore names
(one pattern a line: `*.log`, `data/`, `/top-only`, `!keep.log`). At most 64 MiB packed.

Example:
  vlinder agent deploy -p examples/notes-agent --wait")]
    Deploy {
        /// The directory with agent.toml
        #[arg(short, long, value_name = "DIR", default_value = ".")]
        path: PathBuf,
        /// Wait until a replica is ready
        #[arg(long)]
        wait: bool,
        /// How long to wait
        #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
        wait_timeout: Duration,
    },
    /// All agents
    List,
    /// One agent with its replicas
    Get {
        /// Its name
        name: String,
    },
    /// Delete an agent; its sessions stay on record
    Delete {
        /// Its name
        name: String,
    },
    /// What an agent printed
    Logs {
        /// Its name
        name: String,
        #[command(flatten)]
        tail: Tail,
    },
    /// Talk to an agent: one turn with -p, else line by line
    #[command(after_help = "\
Ctrl-C cancels the turn. Without -p every line of stdin is a turn of one session; Ctrl-D leaves.
The same --submission again attaches to the same turn instead of beginning another one.
With -o json one value is printed for the turn, also when it fails: its `status` says how it ended.

Examples:
  vlinder agent run notes -p 'list'
  vlinder agent run notes -p - < question.txt
  vlinder agent run notes --session s-0198… --branch other -p 'and now?' -o json")]
    Run(RunArgs),
}

#[derive(Debug, Subcommand)]
pub enum Fleet {
    /// Write a new fleet of two agents that works at once
    #[command(
        after_help = "Example:\n  vlinder fleet new support && vlinder fleet deploy -p support --wait"
    )]
    New {
        /// Its name; also the directory that is made
        name: String,
        /// Where to make the directory
        #[arg(long, value_name = "DIR", default_value = ".")]
        dir: PathBuf,
    },
    /// Deploy every agent of a fleet, then the fleet; a name that exists is replaced
    Deploy {
        /// The directory with fleet.toml
        #[arg(short, long, value_name = "DIR", default_value = ".")]
        path: PathBuf,
        /// Wait until a replica of each agent is ready
        #[arg(long)]
        wait: bool,
        /// How long to wait for each
        #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
        wait_timeout: Duration,
    },
    /// All fleets
    List,
    /// One fleet with its agents
    Get {
        /// Its name
        name: String,
    },
    /// Forget a fleet; its agents stay deployed
    Delete {
        /// Its name
        name: String,
    },
    /// Talk with its entry agent; the options are those of `agent run`
    Run(RunArgs),
}

#[derive(Debug, Args)]
pub struct RunArgs {
    /// Which one
    pub name: String,
    /// What to say; - reads it from stdin
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// Go on with this session; one that does not exist begins with this id
    #[arg(long, value_name = "S")]
    pub session: Option<String>,
    /// On this branch of it, instead of its default one
    #[arg(long, value_name = "B")]
    pub branch: Option<String>,
    /// How long the turn may take, e.g. 60s; else what the agent's manifest says
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub timeout: Option<Duration>,
    /// Print the answer while it is made
    #[arg(long)]
    pub stream: bool,
    /// The name of the turn: sent twice, it is one turn
    #[arg(long, value_name = "ID", requires = "prompt")]
    pub submission: Option<String>,
}

#[derive(Debug, Args)]
pub struct Tail {
    /// Go on with new lines as they come; with -o json one value a line
    #[arg(short, long)]
    pub follow: bool,
    /// How many past lines
    #[arg(short = 'n', long, value_name = "N", default_value_t = 100)]
    pub lines: u32,
}

#[derive(Debug, Subcommand)]
pub enum Session {
    /// Sessions, the last active first
    List {
        /// Only those of this agent
        agent: Option<String>,
        /// At most so many
        #[arg(long, value_name = "N", default_value_t = 100)]
        limit: u32,
    },
    /// The turns of a session with their calls
    Get {
        /// Its id, its name, or the beginning of its id
        id: String,
        /// The turns of this branch, instead of the default one
        #[arg(long, value_name = "B")]
        branch: Option<String>,
        /// With the request and the response of every call
        #[arg(long)]
        full: bool,
    },
    /// The branches of a session
    Branches {
        /// Its id, its name, or the beginning of its id
        id: String,
    },
    /// Begin a branch at the end of an earlier turn, or inside of it
    #[command(after_help = "\
A branch that is forked inside a turn holds the calls up to that node: their state, and the turn's input
without a reply.

Example:
  vlinder session get s-0198…            # shows the hashes of every turn and call
  vlinder session fork s-0198… --from 3f9a2c --name other
  vlinder agent run notes --session s-0198… --branch other -p 'what if?'")]
    Fork {
        /// Its id, its name, or the beginning of its id
        id: String,
        /// The hash of a turn's end, of a call's request or result, or the beginning of it
        #[arg(long, value_name = "HASH")]
        from: String,
        /// The name of the new branch
        #[arg(long, value_name = "B")]
        name: String,
    },
    /// Make a branch the default one; the old one is sealed, nothing is deleted
    Promote {
        /// The branch
        branch: String,
        /// The session; may be left out where only one has a branch of this name
        #[arg(long, value_name = "ID")]
        session: Option<String>,
    },
    /// Recompute every hash of a session; ends with 1 when something is wrong
    Verify {
        /// Its id, its name, or the beginning of its id
        id: String,
    },
    /// Run turns again on a new branch: from the record while calls are the same, live from there on
    #[command(after_help = "\
Nothing that is on record is asked or paid for again. Calls to hosts outside and for secrets always run. The same
command with the same --name goes on where it stopped. Ends with 0 when it ran, whatever differed.

Examples:
  vlinder session replay s-0198…                          # the default branch, from its first turn
  vlinder session replay s-0198… --turn t-0198… --until 3f9a2c   # live behind that call
  vlinder session replay s-0198… --model qwen3:8b         # what would another model have said?
  vlinder session replay notes --agent notes-2 --all --since 7d  # last week's sessions of notes, with notes-2")]
    Replay(Replay),
    /// Replace one recorded answer, and run on from there on a new branch
    #[command(after_help = "\
What the turn did before that call is answered from the record; what depends on the new answer runs live. The turns
behind it are run again, too. A call to a store keeps what it did to the state: only what the agent is told changes.

Example:
  vlinder turn get t-0198…                                # shows the hash of every call
  vlinder session repair s-0198… --node 3f9a2c --with answer.json --name fixed
  vlinder session promote fixed --session s-0198…")]
    Repair(Repair),
    #[command(hide = true)]
    Diff(Later),
    #[command(hide = true)]
    Export(Later),
}

#[derive(Debug, Args)]
pub struct Replay {
    /// The session: its id, its name, or the beginning of its id; with --all the agent whose sessions are run
    pub id: Option<String>,
    /// The line of this branch, instead of the default one
    #[arg(long, value_name = "B", conflicts_with = "all")]
    pub branch: Option<String>,
    /// This turn alone
    #[arg(long, value_name = "SUBMISSION", conflicts_with_all = ["from", "agent", "all"])]
    pub turn: Option<String>,
    /// Begin with the turn that has the node of this hash
    #[arg(long, value_name = "HASH", conflicts_with_all = ["agent", "all"])]
    pub from: Option<String>,
    /// What comes after the node of this hash runs live
    #[arg(long, value_name = "HASH", conflicts_with_all = ["live", "all"])]
    pub until: Option<String>,
    /// Everything runs live
    #[arg(long)]
    pub live: bool,
    /// The model that answers instead of those that the agent asks
    #[arg(long, value_name = "M")]
    pub model: Option<String>,
    /// The name of the new branch; with --agent, of the run
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Run the turns with this agent, each line in a new session of it
    #[arg(long, value_name = "NEW")]
    pub agent: Option<String>,
    /// Every session of the agent that is named, or of the only other one that has any
    #[arg(long, requires = "agent")]
    pub all: bool,
    /// With --all: only sessions that were active in the last, e.g. 7d, 12h
    #[arg(long, value_name = "TIME", requires = "all", value_parser = age)]
    pub since: Option<Duration>,
}

#[derive(Debug, Args)]
pub struct Repair {
    /// The session: its id, its name, or the beginning of its id
    pub id: String,
    /// The hash of the call's request or result, or the beginning of it
    #[arg(long, value_name = "HASH")]
    pub node: String,
    /// The file with the new answer; - for stdin
    #[arg(long, value_name = "FILE")]
    pub with: PathBuf,
    /// The name of the new branch
    #[arg(long, value_name = "B")]
    pub name: Option<String>,
    /// The line of this branch, instead of the default one
    #[arg(long, value_name = "B")]
    pub branch: Option<String>,
    /// The HTTP status that the agent sees, instead of the recorded one
    #[arg(long, value_name = "STATUS", value_parser = clap::value_parser!(u16).range(200..600))]
    pub http: Option<u16>,
    /// The content type that the agent sees, instead of the recorded one
    #[arg(long, value_name = "TYPE")]
    pub content_type: Option<String>,
    /// The model that answers what runs live, instead of those that the agent asks
    #[arg(long, value_name = "M")]
    pub model: Option<String>,
    /// Run the repaired turn alone, not those behind it
    #[arg(long)]
    pub only: bool,
}

#[derive(Debug, Subcommand)]
pub enum Turn {
    /// Turns that run or wait
    List {
        /// Ended ones too, the newest first
        #[arg(long)]
        all: bool,
        /// At most so many
        #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
        limit: u32,
    },
    /// One turn with every request and response, and their times
    Get {
        /// Its submission id
        submission: String,
    },
    /// End a turn, as Ctrl-C would
    Cancel {
        /// Its submission id
        submission: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum Worker {
    /// All workers with their state
    List {
        /// Only those of this node
        #[arg(long, value_name = "N")]
        node: Option<String>,
    },
    /// Set how many workers of a role a node has; outlives its restart
    #[command(after_help = "Example:\n  vlinder worker scale agent.process=4")]
    Scale {
        /// The role and its count
        #[arg(value_name = "ROLE=N", value_parser = scale)]
        to: ScaleTo,
        /// On this node, instead of the one that answers
        #[arg(long, value_name = "N")]
        node: Option<String>,
    },
    /// Restart the workers of a role
    Restart {
        /// The role
        #[arg(value_parser = role)]
        role: WorkerRole,
        /// On this node, instead of the one that answers
        #[arg(long, value_name = "N")]
        node: Option<String>,
    },
    /// What the workers of a role printed
    Logs {
        /// The role
        #[arg(value_parser = role)]
        role: WorkerRole,
        /// Only on this node
        #[arg(long, value_name = "N")]
        node: Option<String>,
        #[command(flatten)]
        tail: Tail,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScaleTo {
    pub role: WorkerRole,
    pub count: u32,
}

#[derive(Debug, Subcommand)]
pub enum Node {
    /// All nodes
    List,
    #[command(hide = true)]
    Describe(Later),
    #[command(hide = true)]
    Cordon(Later),
    #[command(hide = true)]
    Uncordon(Later),
    #[command(hide = true)]
    Drain(Later),
}

#[derive(Debug, Subcommand)]
pub enum Queue {
    /// All queues with what waits and what is held
    List,
    /// Messages that were given up
    #[command(subcommand)]
    Dead(Dead),
}

#[derive(Debug, Subcommand)]
pub enum Dead {
    /// All of them
    List,
    /// One of them with its bytes
    Show {
        /// Its id
        id: u64,
    },
    /// Send them again to where they came from
    #[command(group = clap::ArgGroup::new("which").required(true).args(["ids", "all"]))]
    Redrive {
        /// Their ids
        #[arg(value_name = "ID")]
        ids: Vec<u64>,
        /// All of them
        #[arg(long)]
        all: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum Model {
    /// What every upstream of every node offers now
    Available {
        /// Only names that contain this
        #[arg(default_value = "", hide_default_value = true)]
        filter: String,
        /// Only from this one, e.g. ollama
        #[arg(long, value_name = "C", default_value = "", hide_default_value = true)]
        catalog: String,
    },
    /// Models by backend, with the nodes that offer them
    List,
    #[command(hide = true)]
    Add(Later),
    #[command(hide = true)]
    Remove(Later),
}

#[derive(Debug, Subcommand)]
pub enum Secret {
    /// Store a secret; the value comes from stdin
    #[command(after_help = "\
One line end after a value of one line is taken off; --exact keeps it.

Example:
  printf %s \"$KEY\" | vlinder secret put openai-key")]
    Put {
        /// Its name
        name: String,
        /// Store the bytes of stdin as they are
        #[arg(long)]
        exact: bool,
    },
    /// Print a secret
    Get {
        /// Its name
        name: String,
    },
    /// The names of all secrets
    List,
    /// Delete a secret
    Delete {
        /// Its name
        name: String,
    },
}

fn age(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|_| "expected a time with a unit, e.g. 7d or 12h".to_owned())
}

fn duration(text: &str) -> Result<Duration, String> {
    let rule = "expected a time such as 90s, 5m or 1h30m";
    let value = humantime::parse_duration(text).map_err(|_| rule.to_owned())?;
    if value < Duration::from_millis(1) || value > TIMEOUT_MAX {
        return Err("expected at least 1ms and at most 24h".to_owned());
    }
    Ok(value)
}

fn role(text: &str) -> Result<WorkerRole, String> {
    text.parse().map_err(|_| {
        let names: Vec<&str> = WorkerRole::ALL.iter().map(|role| role.as_str()).collect();
        format!("expected one of {}", names.join(", "))
    })
}

fn scale(text: &str) -> Result<ScaleTo, String> {
    let (name, count) = text
        .split_once('=')
        .ok_or("expected ROLE=N, e.g. agent.process=2")?;
    let count = count
        .trim()
        .parse()
        .map_err(|_| format!("{count:?}: expected a whole number"))?;
    Ok(ScaleTo {
        role: role(name.trim())?,
        count,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_definitions_hold_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_of_the_interface_is_taken() {
        for line in [
            "vlinder agent new python hi",
            "vlinder agent deploy",
            "vlinder agent deploy -p dir --wait",
            "vlinder agent list -o json",
            "vlinder -o json agent get notes",
            "vlinder agent delete notes",
            "vlinder agent logs notes -f",
            "vlinder agent run notes",
            "vlinder agent run notes -p hi --session s --branch b --timeout 60s --stream --submission t",
            "vlinder agent run notes -p -",
            "vlinder agent run notes -p -5",
            "vlinder model available",
            "vlinder model available smol --catalog ollama",
            "vlinder model list",
            "vlinder secret put k",
            "vlinder secret get k",
            "vlinder secret list",
            "vlinder secret delete k",
            "vlinder session list",
            "vlinder session list notes",
            "vlinder session get s --full",
            "vlinder session branches s",
            "vlinder session fork s --from abcd --name b",
            "vlinder session promote b",
            "vlinder session promote b --session s",
            "vlinder session verify s",
            "vlinder session replay s",
            "vlinder session replay s --branch b --until abcd --model m --name n",
            "vlinder session replay s --turn t --live",
            "vlinder session replay --agent new --all --since 7d",
            "vlinder session replay notes --agent new --all",
            "vlinder session repair s --node h --with f",
            "vlinder session repair s --node h --with - --http 200 --content-type text/plain --only --name n",
            "vlinder turn list --all",
            "vlinder turn cancel t",
            "vlinder turn get t",
            "vlinder worker list --node n",
            "vlinder worker scale storage.object.sqlite=0 --node n",
            "vlinder worker restart harness",
            "vlinder worker logs agent.process -f --node n",
            "vlinder node list",
            "vlinder queue list",
            "vlinder queue dead list",
            "vlinder queue dead show 3",
            "vlinder queue dead redrive 3 4",
            "vlinder queue dead redrive --all",
            "vlinder dead list",
            "vlinder status --addr hub:9091 --data-dir /d --no-color",
            "vlinder events --prefix turn.",
            "vlinder bench --hops 100 --in-flight 8",
            "vlinder completions bash",
            // Not in this release, but known:
            "vlinder session diff s a b",
            "vlinder node drain n --stop",
        ] {
            if let Err(error) = parse(line) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn nonsense_is_refused_as_usage() {
        for line in [
            "vlinder",
            "vlinder fly",
            "vlinder agent run",
            "vlinder agent run a --timeout soon",
            "vlinder agent run a --timeout 0s",
            "vlinder agent run a --timeout 99days",
            "vlinder agent run a --submission t",
            "vlinder worker scale harness",
            "vlinder worker scale harness=-1",
            "vlinder worker scale harness=many",
            "vlinder worker scale captain=1",
            "vlinder worker restart captain",
            "vlinder session replay s --turn t --from abcd",
            "vlinder session replay s --live --until abcd",
            "vlinder session replay s --all",
            "vlinder session replay s --agent a --since 7d",
            "vlinder session replay s --agent a --turn t",
            "vlinder session replay --agent a --all --since yesterday",
            "vlinder session repair s --node h",
            "vlinder session repair s --node h --with f --http 99",
            "vlinder queue dead redrive",
            "vlinder queue dead redrive 3 --all",
            "vlinder queue dead show x",
            "vlinder turn list --limit 0",
            "vlinder agent list -o xml",
        ] {
            let error = parse(line).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn a_wrong_role_names_the_right_ones() {
        let error = parse("vlinder worker restart captain").unwrap_err();
        assert!(
            error.to_string().contains("storage.object.sqlite"),
            "{error}"
        );
    }
}
