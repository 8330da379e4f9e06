//! What `/proc` says about processes. Synchronous and small; used by the daemon and by
//! [`crate::boxed`].

use std::fs;

use rustix::process::{Pid, RawPid};

/// The children of this process, zombies included.
pub(crate) fn own_children() -> Vec<Pid> {
    let Ok(threads) = fs::read_dir("/proc/self/task") else {
        return Vec::new();
    };
    let mut children = Vec::new();
    for thread in threads.flatten() {
        match fs::read_to_string(thread.path().join("children")) {
            Ok(list) => children.extend(list.split_whitespace().filter_map(parse_pid)),
            // The kernel was built without these files; a thread that ended meanwhile has none.
            Err(_) => return children_by_scan(),
        }
    }
    children
}

/// Looks at every process of the machine.
fn children_by_scan() -> Vec<Pid> {
    let own = rustix::process::getpid();
    let Ok(processes) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = processes
        .flatten()
        .filter_map(|entry| parse_pid(entry.file_name().to_str()?));
    pids.filter(|&pid| parent_of(pid) == Some(own)).collect()
}

fn parent_of(pid: Pid) -> Option<Pid> {
    // "pid (name) state ppid …"; the name may contain anything, a ')' included.
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    let (_, after_name) = stat.rsplit_once(')')?;
    parse_pid(after_name.split_whitespace().nth(1)?)
}

fn parse_pid(text: &str) -> Option<Pid> {
    Pid::from_raw(text.parse::<RawPid>().ok()?)
}

/// How often the kernel has killed for want of memory: in our control group if it counts,
/// otherwise on the machine. Only differences mean something.
pub(crate) fn oom_kills() -> Option<u64> {
    group_oom_kills().or_else(|| field(&fs::read_to_string("/proc/vmstat").ok()?, "oom_kill"))
}

fn group_oom_kills() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let events = fs::read_to_string(format!("/sys/fs/cgroup{path}/memory.events")).ok()?;
    field(&events, "oom_kill")
}

fn field(text: &str, name: &str) -> Option<u64> {
    let values = text.lines().filter_map(|line| line.split_once(' '));
    values
        .into_iter()
        .find(|(key, _)| *key == name)?
        .1
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_child_both_ways() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = Pid::from_child(&child);
        assert!(own_children().contains(&pid));
        assert!(children_by_scan().contains(&pid));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!own_children().contains(&pid));
    }

    #[test]
    fn reads_counters() {
        assert_eq!(
            field("low 0\noom_kill 3\noom_group_kill 9\n", "oom_kill"),
            Some(3)
        );
        assert_eq!(field("low 0\n", "oom_kill"), None);
    }
}
