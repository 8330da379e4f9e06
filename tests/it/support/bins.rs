//! The binaries under test, and commands that run to their end.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A command that has not ended by then hangs.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(40);

fn built(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("a test knows its own binary");
    // target/<profile>/deps/it-<hash>
    let profile = own.parent().and_then(|deps| deps.parent());
    let path = profile
        .expect("it lies in target/<profile>/deps")
        .join(name);
    assert!(
        path.is_file(),
        "{} is not built: run cargo build -p vlinderd -p vlinder-cli",
        path.display()
    );
    path
}

/// The daemon.
pub fn vlinderd() -> PathBuf {
    built("vlinderd")
}

/// The command line.
pub fn vlinder() -> PathBuf {
    built("vlinder")
}

/// How a command ended.
#[derive(Debug)]
pub struct Finished {
    /// Its exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// What it wrote.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
    /// How long it took.
    pub took: Duration,
}

impl Finished {
    /// Fails unless it ended with that code; gives itself back.
    #[track_caller]
    pub fn code(self, wanted: i32) -> Self {
        assert_eq!(self.code, Some(wanted), "{self:#?}");
        assert!(!self.stderr.contains("panicked"), "{self:#?}");
        self
    }

    /// Fails unless stderr holds the text; gives itself back.
    #[track_caller]
    pub fn says(self, text: &str) -> Self {
        assert!(self.stderr.contains(text), "no {text:?} in {self:#?}");
        self
    }

    /// Its output as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("stdout is not JSON ({error}): {self:#?}"))
    }
}

/// A command whose environment holds nothing of ours.
pub fn clean(program: PathBuf) -> Command {
    let mut command = Command::new(program);
    let ours = |name: &std::ffi::OsString| {
        let name = name.to_string_lossy();
        name.starts_with("VLINDER_") || name == "RUST_LOG"
    };
    for name in std::env::vars_os().map(|(name, _)| name).filter(ours) {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

/// Runs a command to its end; one that passes the deadline is killed and fails the test.
pub async fn finish(command: Command) -> Finished {
    finish_within(command, COMMAND_DEADLINE).await
}

/// The same with another deadline.
pub async fn finish_within(command: Command, deadline: Duration) -> Finished {
    let began = Instant::now();
    let shown = format!("{command:?}");
    let mut command = tokio::process::Command::from(command);
    command.kill_on_drop(true);
    let ended = tokio::time::timeout(deadline, command.output()).await;
    let Output {
        status,
        stdout,
        stderr,
    } = ended
        .unwrap_or_else(|_| panic!("{shown} did not end within {deadline:?}"))
        .unwrap_or_else(|error| panic!("{shown} cannot be run: {error}"));
    Finished {
        code: status.code(),
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
        took: began.elapsed(),
    }
}
