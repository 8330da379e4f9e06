//! `vlinder`, the command line: parse, find the cluster, do one thing, end with its exit code.
//!
//! What it guarantees: stdout carries only what was asked for (with `-o json` one value, or one a line
//! where a command streams; of a command that fails it is or carries the error), everything else goes to
//! stderr; the exit code is one of interfaces.md §1 and §3; nothing that an agent or a service said can act on a terminal.
//!
//! What it does not do: it knows nothing of the bus and holds no state. Whatever it shows it asked a
//! service for, through `vlinder-client`.

mod args;
mod commands;
mod error;
mod ignore;
mod json;
mod out;
mod pack;
mod scaffold;
mod table;
mod text;

use args::{Cli, Format};
use clap::Parser;
use clap::error::ErrorKind;
use error::Error;
use out::Out;
use std::io::Write;
use std::process::ExitCode;
use vlinder_config::Env;

fn main() -> ExitCode {
    let env = Env::from_process();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    let no_colours = cli.global.no_color || env.get("NO_COLOR").is_some_and(|v| !v.is_empty());
    // A command that is not there yet takes whatever follows for its own.
    let is_json = commands::later(&cli.command).is_some() && wants_json(std::env::args());
    let output = if is_json {
        Format::Json
    } else {
        cli.global.output
    };
    let out = Out::new(output, no_colours);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(source) => {
            let what = "cannot start the runtime".to_owned();
            out.error(&Error::Io { what, source });
            return ExitCode::FAILURE;
        }
    };
    let done = runtime.block_on(commands::run(cli, &env, &out));
    // A thread may still wait for a line of stdin that nobody wants any more.
    runtime.shutdown_background();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            out.error(&error);
            ExitCode::from(error.exit_code())
        }
    }
}

/// Help and version go to stdout and are no failure; the rest is bad usage.
fn refuse(error: &clap::Error) -> ExitCode {
    // Where neither stream takes it there is nobody to tell.
    let _ = error.print();
    if error.use_stderr() && wants_json(std::env::args()) {
        let error = serde_json::json!({ "error": Error::Usage(message_of(error)).json() });
        let _ = writeln!(std::io::stdout(), "{error}");
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

/// What is wrong with a command line, in one line. Where a command is missing clap shows the help.
fn message_of(error: &clap::Error) -> String {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "a command is missing; --help shows all".to_owned();
    }
    let text = error.to_string();
    let first = text.lines().next().unwrap_or_default();
    first.strip_prefix("error: ").unwrap_or(first).to_owned()
}

/// Whether a command line that cannot be parsed asks for JSON.
fn wants_json(args: impl Iterator<Item = String>) -> bool {
    let args: Vec<String> = args.collect();
    let json = clap::ValueEnum::to_possible_value(&Format::Json);
    let json = json
        .map(|value| value.get_name().to_owned())
        .unwrap_or_default();
    let alone = args
        .windows(2)
        .any(|pair| matches!(pair[0].as_str(), "-o" | "--output") && pair[1] == json);
    alone
        || args.iter().any(|arg| {
            [
                format!("-o{json}"),
                format!("-o={json}"),
                format!("--output={json}"),
            ]
            .contains(arg)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_recognised_in_a_broken_command_line() {
        let wants = |line: &str| wants_json(line.split(' ').map(str::to_owned));
        assert!(wants("vlinder fly -o json"));
        assert!(wants("vlinder --output=json fly"));
        assert!(wants("vlinder -ojson"));
        assert!(!wants("vlinder fly -o table json"));
    }
}
