//! `vlinder agent run` without a prompt: every line of stdin is a turn of one session.

use super::Cx;
use super::run::{Interrupts, follow, outcome, request_of, show};
use crate::args::RunArgs;
use crate::error::Error;
use std::io::{BufRead, IsTerminal, Write};
use tokio::sync::mpsc;

/// Runs until stdin ends. On a terminal a failed turn is reported and the next line is read; from a
/// pipe the first failure ends it, with its exit code.
pub async fn run(cx: &Cx<'_>, mut args: RunArgs) -> Result<(), Error> {
    let people = std::io::stdin().is_terminal();
    let mut interrupts = Interrupts::catch()?;
    let mut lines = stdin_lines();
    loop {
        if people {
            prompt();
        }
        let line = tokio::select! {
            line = lines.recv() => line,
            () = interrupts.next() => {
                cx.out.note(if people { "\n(Ctrl-D leaves)" } else { "interrupted" });
                match people {
                    true => continue,
                    false => return Err(Error::Cancelled("interrupted between two turns".to_owned())),
                }
            }
        };
        let Some(line) = line else {
            if people {
                cx.out.note("");
            }
            return Ok(());
        };
        let line = line.map_err(Error::io("cannot read stdin"))?;
        if line.trim().is_empty() {
            continue;
        }
        let hint = args.session.is_none();
        let turn = one(cx, &mut args, line, &mut interrupts, hint).await;
        match turn {
            Ok(()) => {}
            Err(error) if people && !matches!(error, Error::OutputClosed) => cx.out.error(&error),
            Err(error) => return Err(error),
        }
    }
}

async fn one(
    cx: &Cx<'_>,
    args: &mut RunArgs,
    line: String,
    interrupts: &mut Interrupts,
    hint: bool,
) -> Result<(), Error> {
    let ended = follow(cx, request_of(args, line.into_bytes()), interrupts, hint).await?;
    // The next line goes on where this one ended.
    args.session = Some(ended.accepted.session.clone());
    show(cx, &ended, true)?;
    outcome(&ended.end)
}

fn prompt() {
    let mut stderr = std::io::stderr();
    let _ = write!(stderr, "> ");
    let _ = stderr.flush();
}

/// The lines of stdin, read by a thread of their own: a read cannot be interrupted, and the process
/// does not wait for it when it ends. One line is read ahead.
fn stdin_lines() -> mpsc::Receiver<std::io::Result<String>> {
    let (tx, rx) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            if tx.blocking_send(line).is_err() {
                return;
            }
        }
    });
    rx
}
