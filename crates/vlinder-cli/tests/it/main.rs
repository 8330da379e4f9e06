//! The command as a shell sees it, where no daemon runs: exit codes, and what goes to which stream.

use serde_json::Value;
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

struct Shell {
    home: TempDir,
    /// An address where nothing listens.
    nowhere: String,
}

impl Shell {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Self {
            home: tempfile::tempdir().unwrap(),
            nowhere: format!("http://{}", listener.local_addr().unwrap()),
        }
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vlinder"));
        command.env_clear().env("HOME", self.home.path());
        command.current_dir(self.home.path());
        for service in ["REGISTRY", "HARNESS", "STATE", "SECRET", "CATALOG"] {
            command.env(format!("VLINDER_DISTRIBUTED_{service}_ADDR"), &self.nowhere);
        }
        command.stdin(Stdio::null()).args(args).output().unwrap()
    }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn without_a_daemon_every_question_ends_with_3_and_the_address() {
    let shell = Shell::new();
    for args in [
        &["agent", "list"][..],
        &["agent", "run", "notes", "-p", "hi"],
        &["session", "get", "s"],
        &["turn", "list"],
        &["worker", "list"],
        &["queue", "list"],
        &["secret", "list"],
        &["model", "available"],
        &["status"],
        &["events"],
    ] {
        let output = shell.run(args);
        assert_eq!(output.status.code(), Some(3), "{args:?}: {output:?}");
        assert!(output.stdout.is_empty(), "{args:?}: {output:?}");
        let said = text(&output.stderr);
        assert!(said.contains(&shell.nowhere), "{args:?}: {said}");
        assert!(said.contains("is vlinderd running?"), "{args:?}: {said}");
    }
}

#[test]
fn with_json_every_error_is_the_one_value_on_stdout() {
    let shell = Shell::new();
    for (args, exit, code) in [
        (&["agent", "list", "-o", "json"][..], 3, "unavailable"),
        (
            &["agent", "run", "a", "-p", "hi", "-ojson"],
            3,
            "unavailable",
        ),
        (&["session", "verify", "s", "-o", "json"], 3, "unavailable"),
        (&["turn", "cancel", "t", "-o", "json"], 3, "unavailable"),
        (
            &["worker", "logs", "harness", "-o", "json"],
            3,
            "unavailable",
        ),
        (&["queue", "dead", "list", "-o", "json"], 3, "unavailable"),
        (&["secret", "get", "k", "-o", "json"], 3, "unavailable"),
        (&["status", "-o", "json"], 3, "unavailable"),
        (&["events", "-o", "json"], 3, "unavailable"),
        (&["bench", "-o", "json"], 3, "unavailable"),
        (&["-o", "json"], 2, "invalid_argument"),
        (
            &["--addr", "http://", "status", "-ojson"],
            2,
            "invalid_argument",
        ),
        (
            &["agent", "new", "cobol", "x", "-ojson"],
            2,
            "invalid_argument",
        ),
        (&["agent", "fly", "-o", "json"], 2, "invalid_argument"),
        (
            &["-o", "json", "session", "diff", "s", "a", "b"],
            2,
            "invalid_argument",
        ),
        (&["agent", "deploy", "-o", "json"], 2, "invalid_argument"),
    ] {
        let output = shell.run(args);
        assert_eq!(output.status.code(), Some(exit), "{args:?}: {output:?}");
        // One value, and nothing after it.
        let value: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(value["error"]["code"], code, "{args:?}");
        assert_eq!(value["error"]["exit"], exit, "{args:?}");
        let message = value["error"]["message"].as_str().unwrap();
        assert!(!message.is_empty(), "{args:?}");
        // People are told, too, and only in words.
        let said = text(&output.stderr);
        assert!(!said.is_empty() && !said.contains("{\"error\""), "{said}");
    }
}

#[test]
fn what_needs_no_daemon_works_without_one() {
    let shell = Shell::new();
    for args in [
        &["--help"][..],
        &["--version"],
        &["agent", "run", "--help"],
        &["completions", "bash"],
    ] {
        let output = shell.run(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {output:?}");
        assert!(
            !output.stdout.is_empty() && output.stderr.is_empty(),
            "{args:?}"
        );
    }
    let made = shell.run(&["agent", "new", "python", "greeter", "-o", "json"]);
    let value: Value = serde_json::from_slice(&made.stdout).unwrap();
    assert_eq!(value["name"], "greeter");
    assert!(shell.home.path().join("greeter/agent.toml").is_file());
    assert_eq!(
        shell
            .run(&["agent", "new", "python", "greeter"])
            .status
            .code(),
        Some(9)
    );
    assert_eq!(
        shell.run(&["agent", "new", "cobol", "x"]).status.code(),
        Some(2)
    );
}

#[test]
fn commands_of_later_releases_are_neither_listed_nor_unknown() {
    let shell = Shell::new();
    for args in [
        &["session", "diff", "s", "a", "b"][..],
        &["session", "export", "s"],
        &["why", "t"],
    ] {
        let output = shell.run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {output:?}");
        assert!(
            text(&output.stderr).contains("later release"),
            "{args:?}: {output:?}"
        );
        let output = shell.run(&[args, &["-o", "json"]].concat());
        assert!(
            text(&output.stdout).starts_with("{\"error\":"),
            "{args:?}: {output:?}"
        );
    }
    let help = shell.run(&["session", "--help"]);
    for hidden in ["diff", "export"] {
        assert!(!text(&help.stdout).contains(hidden), "{hidden}");
    }
}

#[test]
fn a_wrong_setting_is_bad_usage() {
    let shell = Shell::new();
    let output = shell.run(&["--addr", "http://", "agent", "list"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(text(&output.stderr).contains("--addr"), "{output:?}");
}
