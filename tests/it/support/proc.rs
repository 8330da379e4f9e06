//! Processes as `/proc` shows them, and signals to those that a test may end.

use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeMap;
use std::fs;

/// A process that is not a zombie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its parent.
    pub parent: u32,
    /// Its arguments, separated by blanks.
    pub command: String,
    /// The letter of its state.
    pub state: char,
}

fn read(pid: u32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, blanks included.
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let command = String::from_utf8_lossy(&command).replace('\0', " ");
    (!matches!(state, 'Z' | 'X')).then(|| Process {
        pid,
        parent,
        command: command.trim().to_owned(),
        state,
    })
}

/// Every process that lives.
pub fn all() -> BTreeMap<u32, Process> {
    let entries = fs::read_dir("/proc").expect("there is a /proc").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid| Some((pid, read(pid)?))).collect()
}

/// Whether it lives (a zombie does not).
pub fn lives(pid: u32) -> bool {
    read(pid).is_some()
}

/// The children of a process.
pub fn children(parent: u32) -> Vec<Process> {
    let all = all().into_values();
    all.filter(|process| process.parent == parent).collect()
}

/// Every process whose environment holds `NAME=value`.
pub fn with_variable(name: &str, value: &str) -> Vec<Process> {
    let wanted = format!("{name}={value}").into_bytes();
    let marked = |pid: u32| {
        fs::read(format!("/proc/{pid}/environ"))
            .is_ok_and(|text| text.split(|byte| *byte == 0).any(|entry| entry == wanted))
    };
    let all = all().into_values();
    all.filter(|process| marked(process.pid)).collect()
}

/// Sends a signal to a process that the test or its node started.
#[track_caller]
pub fn send(pid: u32, signal: Signal) {
    assert!(pid > 1, "there is no process to signal");
    let pid = Pid::from_raw(pid as i32).expect("it is above 1");
    kill_process(pid, signal).unwrap_or_else(|error| panic!("cannot signal {pid:?}: {error}"));
}

/// `kill -9`, whether or not it still lives.
pub fn kill_if_alive(pid: u32) {
    if let Some(pid) = Pid::from_raw(pid as i32).filter(|_| pid > 1) {
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// Every process that works in a directory or below it.
pub fn working_below(directory: &std::path::Path) -> Vec<Process> {
    let there = |pid: u32| {
        fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|path| path.starts_with(directory))
    };
    let all = all().into_values();
    all.filter(|process| there(process.pid)).collect()
}

/// Every file below a directory with what it holds.
pub fn files_below(directory: &std::path::Path) -> Vec<(std::path::PathBuf, String)> {
    let mut found = vec![];
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files_below(&path));
        } else {
            let bytes = fs::read(&path).unwrap_or_default();
            found.push((path, String::from_utf8_lossy(&bytes).into_owned()));
        }
    }
    found
}
