//! The command line of the daemon (interfaces.md §1).

use crate::{EXIT_OK, EXIT_USAGE, commands, daemon};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use vlinder_config::{Env, LiveChange, Loaded, Sources};

/// Runs this node of Vlinder: one daemon that supervises the configured workers.
///
/// Without a configured queue it is a whole installation in one process; with `queue.nats_url`
/// its workers are processes that share work with other nodes over NATS JetStream.
#[derive(Debug, Parser)]
#[command(name = "vlinderd", version, about, long_about, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    places: Places,
    /// Check the configuration and stop.
    #[arg(long)]
    check: bool,
    /// Go to the background; return when ready (0) or with the exit code of the failed start.
    #[arg(long)]
    detach: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

const EXAMPLES: &str = "Examples:
  vlinderd                                        embedded: nothing else is needed
  vlinderd --config config/hub.toml               a hub for other nodes
  VLINDER_QUEUE_NATS_URL=nats://hub:4222 vlinderd a node of a cluster
  vlinderd config show --origin                   what is in force, and why
  vlinderd doctor                                 what this machine has and lacks";

#[derive(Debug, Clone, Args)]
struct Places {
    /// The configuration file; default: config.toml in the data directory, if there is one.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The data directory; default: $VLINDER_DIR, else ~/.vlinder.
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The configuration: show, check, schema.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// What this machine has and lacks: bus, services, ports, disk, Docker, Ollama, GPU.
    Doctor {
        /// table or json.
        #[arg(short, long, value_enum, default_value_t = DoctorFormat::Table)]
        output: DoctorFormat,
    },
    /// Whether the daemon of this data directory is ready: 0, else 1 with the reason; 3 without a daemon.
    Health {
        /// Only whether it turns, not whether its workers and the bus are there.
        #[arg(long)]
        live: bool,
    },
    /// The version of this binary.
    Version,
}

/// How `doctor` prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DoctorFormat {
    /// For people.
    Table,
    /// For programs.
    Json,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// The effective configuration, secrets masked.
    Show {
        /// Also where each value is from.
        #[arg(long)]
        origin: bool,
        /// toml or json.
        #[arg(short, long, value_enum, default_value_t = ShowFormat::Toml)]
        output: ShowFormat,
    },
    /// Every mistake at once, with file, key, value and what was expected.
    Check {
        /// The file; default: the one the daemon would read.
        file: Option<PathBuf>,
    },
    /// JSON Schema of config.toml.
    Schema,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ShowFormat {
    Toml,
    Json,
}

/// Reads the arguments, does what they say, returns the exit code.
pub fn run() -> u8 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() {
                EXIT_USAGE
            } else {
                EXIT_OK
            };
        }
    };
    let env = Env::from_process();
    match cli.command {
        None => start(&env, &cli.places, cli.check, cli.detach),
        Some(Command::Version) => {
            println!("vlinderd {}", env!("CARGO_PKG_VERSION"));
            EXIT_OK
        }
        Some(Command::Doctor { output }) => {
            with_config(&env, &cli.places, |loaded| commands::doctor(loaded, output))
        }
        Some(Command::Health { live }) => {
            with_config(&env, &cli.places, |loaded| commands::health(loaded, live))
        }
        Some(Command::Config(ConfigCommand::Schema)) => {
            println!("{}", vlinder_config::json_schema());
            EXIT_OK
        }
        Some(Command::Config(ConfigCommand::Check { file })) => {
            let places = Places {
                config: file.or(cli.places.config),
                ..cli.places
            };
            with_config(&env, &places, commands::checked)
        }
        Some(Command::Config(ConfigCommand::Show { origin, output })) => {
            with_config(&env, &cli.places, |loaded| {
                if output == ShowFormat::Json {
                    println!("{}", loaded.effective_json(origin, true));
                } else {
                    print!("{}", loaded.effective_toml(origin, true));
                }
                EXIT_OK
            })
        }
    }
}

fn sources<'a>(env: &'a Env, places: &Places) -> Sources<'a> {
    Sources {
        config_file: places.config.clone(),
        data_dir: places.data_dir.clone(),
        supported: &crate::roles::SUPPORTED,
        ..Sources::new(env)
    }
}

/// Loads the configuration, or prints all of its mistakes.
fn with_config(env: &Env, places: &Places, then: impl FnOnce(Loaded) -> u8) -> u8 {
    match vlinder_config::load(&sources(env, places)) {
        Ok(loaded) => then(loaded),
        Err(mistakes) => {
            commands::print_mistakes(&mistakes);
            EXIT_USAGE
        }
    }
}

fn start(env: &Env, places: &Places, check: bool, detach: bool) -> u8 {
    with_config(env, places, |loaded| {
        if check {
            return commands::checked(loaded);
        }
        if detach {
            return daemon::detach(&loaded);
        }
        let (env, places) = (env.clone(), places.clone());
        let reload = move |change: Option<&LiveChange>| match change {
            Some(change) => vlinder_config::change_live(&sources(&env, &places), change),
            None => vlinder_config::load(&sources(&env, &places)),
        };
        daemon::run(loaded, Box::new(reload))
    })
}
