//! `vlinderd`: configure, build, run, drain. No domain logic.
//!
//! The same binary is the daemon, each of its worker processes (`worker`), the box around a
//! process agent (`box`) and the echo agent of `vlinder bench` (`bench-agent`).

mod args;
mod bench_agent;
mod bus;
mod commands;
mod console;
mod control;
mod daemon;
mod door;
mod gateway;
mod http;
mod listeners;
mod logs;
mod node;
mod peers;
mod plan;
mod roles;
mod worker;

use std::process::ExitCode;

/// A clean stop.
pub const EXIT_OK: u8 = 0;
/// Anything that has no code of its own.
pub const EXIT_OTHER: u8 = 1;
/// Bad usage or configuration.
pub const EXIT_USAGE: u8 = 2;
/// A needed dependency cannot be reached.
pub const EXIT_UNREACHABLE: u8 = 3;
/// A start deadline passed.
pub const EXIT_START_DEADLINE: u8 = 4;

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    // Before argument parsing, threads and runtimes: these must stay small.
    match words.next().as_deref().and_then(|word| word.to_str()) {
        Some("box") => return vlinder_supervisor::boxed::run(words),
        Some("worker") => return worker::main(),
        Some("bench-agent") => return bench_agent::main(),
        _ => {}
    }
    ExitCode::from(args::run())
}
