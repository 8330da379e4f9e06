//! The box, as a process of its own, and what it leaves behind: nothing.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use crate::bed::{is_alive, signal, wait_gone};

const LIMIT: Duration = Duration::from_secs(10);

/// A box around a shell script, with its lifeline on descriptor 0.
fn boxed(script: &str) -> (Child, ChildStdin) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "entry::boxed",
            "--exact",
            "--ignored",
            "--nocapture",
            "box",
            "fd",
            "0",
            "--",
        ])
        .args(["sh", "-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lifeline = child.stdin.take().unwrap();
    (child, lifeline)
}

/// The process ids that the script prints, as `pid N`.
fn pids(child: &mut Child, count: usize) -> Vec<u32> {
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let numbers = lines.filter_map(|line| line.unwrap().strip_prefix("pid ")?.trim().parse().ok());
    let pids: Vec<u32> = numbers.take(count).collect();
    assert_eq!(pids.len(), count);
    pids
}

fn code(child: &mut Child) -> i32 {
    child.wait().unwrap().code().unwrap()
}

/// Prints the ids of itself, of a child in its group, of one that left the session, and of one
/// whose parent is gone already.
const FAMILY: &str = "echo pid $$; \
    sleep 600 & echo pid $!; \
    setsid sh -c 'echo pid $$; exec sleep 600' & \
    setsid sh -c 'sleep 600 & echo pid $!' & \
    wait; sleep 600";

#[test]
fn codes_are_those_of_the_command() {
    let table = [
        ("exit 0", 0),
        ("exit 7", 7),
        ("kill -9 $$", 137),
        ("kill -15 $$", 143),
    ];
    for (script, expected) in table {
        let (mut child, _lifeline) = boxed(script);
        assert_eq!(code(&mut child), expected, "{script}");
    }
}

#[test]
fn a_command_that_cannot_run_and_wrong_arguments_have_their_own_codes() {
    for (args, expected) in [
        (&["fd", "0", "--", "/nonexistent/command"][..], 127),
        (&["fd", "0", "--", "/etc/passwd"][..], 126),
        (&["fd", "0"][..], 2),
        (&["fd", "999", "--", "true"][..], 1),
    ] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["entry::boxed", "--exact", "--ignored", "--nocapture", "box"])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let _lifeline = child.stdin.take();
        assert_eq!(code(&mut child), expected, "{args:?}");
    }
}

#[test]
fn the_end_of_the_lifeline_ends_the_whole_family() {
    let (mut child, lifeline) = boxed(FAMILY);
    let family = pids(&mut child, 4);
    assert!(family.iter().all(|&pid| is_alive(pid)));
    drop(lifeline);
    assert_eq!(code(&mut child), 137);
    // The box has waited for them: they are gone, not just about to go.
    assert!(family.iter().all(|&pid| !is_alive(pid)), "{family:?}");
}

#[test]
fn sigterm_ends_the_whole_family() {
    let (mut child, _lifeline) = boxed(FAMILY);
    let family = pids(&mut child, 4);
    signal(child.id(), Signal::TERM);
    assert_eq!(code(&mut child), 137);
    assert!(family.iter().all(|&pid| !is_alive(pid)), "{family:?}");
}

#[test]
fn what_the_command_leaves_behind_goes_with_it() {
    let (mut child, _lifeline) = boxed("setsid sleep 600 & echo pid $!; exit 5");
    let left = pids(&mut child, 1);
    assert_eq!(code(&mut child), 5);
    assert!(!is_alive(left[0]));
}

#[test]
fn the_command_dies_with_a_killed_box() {
    let (mut child, _lifeline) = boxed("echo pid $$; exec sleep 600");
    let command = pids(&mut child, 1)[0];
    signal(child.id(), Signal::KILL);
    child.wait().unwrap();
    wait_gone(command, LIMIT);
}

#[test]
fn a_box_is_small() {
    let (mut child, _lifeline) = boxed("echo pid $$; exec sleep 600");
    pids(&mut child, 1);
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let field = |name: &str| -> u64 {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    // Pages of the executable are shared among all boxes and the daemon; what is its own counts.
    let (own_kib, all_kib) = (field("RssAnon:"), field("VmRSS:"));
    println!("own {own_kib} KiB, with shared pages {all_kib} KiB");
    assert!(own_kib < 4 * 1024, "{own_kib} KiB");
}
