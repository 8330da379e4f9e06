//! What agents print, as JSON lines in `<data>/logs/agents/<agent>.jsonl`, with one old file beside.
//!
//! Also the last lines of each replica, for messages that say why it ended.

use std::collections::{HashMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// Size at which a log file is put aside, in bytes. An agent's logs take at most twice as much.
pub const FILE_BYTES_MAX: u64 = 8 * 1024 * 1024;
/// Lines of a replica that are remembered.
pub const RING_LINES_MAX: usize = 1000;
/// Bytes of a replica's lines that are remembered.
const RING_BYTES_MAX: usize = 256 * 1024;

/// Where a line was printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A line in the file: a [`vlinder_worker::logs::LogRecord`] with more to search by.
#[derive(serde::Serialize)]
struct Entry<'a> {
    time_ms: u64,
    node: &'a str,
    source: String,
    agent: &'a str,
    replica: u32,
    stream: Stream,
    line: &'a str,
}

/// Takes each line, as it stands in the file, for whoever follows it live; must not block.
pub type Live = Box<dyn Fn(&str, &[u8]) + Send + Sync>;

/// The logs of all agents of one worker.
pub struct AgentLogs {
    dir: PathBuf,
    node: String,
    live: Live,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    files: HashMap<String, Option<File>>,
    rings: HashMap<(String, u32), Ring>,
}

#[derive(Default)]
struct Ring {
    lines: VecDeque<String>,
    bytes: usize,
}

impl Ring {
    fn push(&mut self, line: &str) {
        self.bytes += line.len();
        self.lines.push_back(line.to_owned());
        while self.lines.len() > RING_LINES_MAX || self.bytes > RING_BYTES_MAX {
            let gone = self.lines.pop_front();
            self.bytes -= gone.map_or(0, |line| line.len());
        }
    }
}

impl AgentLogs {
    /// Logs of a node's agents below `dir`; `live` gets the agent's name and the line.
    pub fn new(dir: PathBuf, node: &str, live: Live) -> Self {
        Self {
            dir,
            node: node.to_owned(),
            live,
            state: Mutex::default(),
        }
    }

    /// Writes a line. A log that cannot be written is given up until the worker's next start, with
    /// one warning: an agent must not fail because a disk is full.
    pub fn write(&self, agent: &str, replica: u32, stream: Stream, line: &str) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let state = &mut *state;
        state
            .rings
            .entry((agent.to_owned(), replica))
            .or_default()
            .push(line);
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let entry = Entry {
            time_ms: since.as_millis() as u64,
            node: &self.node,
            source: format!("{agent}/{replica}"),
            agent,
            replica,
            stream,
            line,
        };
        let mut text = serde_json::to_vec(&entry).unwrap_or_default();
        (self.live)(agent, &text);
        text.push(b'\n');
        let file = match state.files.get_mut(agent) {
            Some(file) => file,
            None => state
                .files
                .entry(agent.to_owned())
                .or_insert_with(|| self.open(agent)),
        };
        let Some(open) = file else { return };
        let path = self.path(agent);
        let outcome = open.write_all(&text).and_then(|()| rotate(open, &path));
        if let Err(error) = outcome {
            tracing::warn!(agent, %error, "the agent's output is no longer written to its log");
            *file = None;
        }
    }

    /// A new instance of a replica starts: the last lines are its own from here on.
    pub fn begin(&self, agent: &str, replica: u32) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.rings.remove(&(agent.to_owned(), replica));
    }

    /// The last lines of a replica's newest instance, at most `max`.
    pub fn last_lines(&self, agent: &str, replica: u32, max: usize) -> Vec<String> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(ring) = state.rings.get(&(agent.to_owned(), replica)) else {
            return Vec::new();
        };
        let skip = ring.lines.len().saturating_sub(max);
        ring.lines.iter().skip(skip).cloned().collect()
    }

    /// Closes an agent's file and forgets its last lines; the files stay.
    pub fn forget(&self, agent: &str) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.files.remove(agent);
        state.rings.retain(|(name, _), _| name != agent);
    }

    /// The log of an agent.
    pub fn path(&self, agent: &str) -> PathBuf {
        self.dir.join(format!("{agent}.jsonl"))
    }

    fn open(&self, agent: &str) -> Option<File> {
        let path = self.path(agent);
        std::fs::create_dir_all(&self.dir)
            .and_then(|()| append_to(&path))
            .inspect_err(|error| tracing::warn!(agent, %error, "the agent's output is not written to its log"))
            .ok()
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// Puts a full file aside. Another worker of the node may have done so already: then only the new
/// one is opened.
fn rotate(file: &mut File, path: &Path) -> io::Result<()> {
    let meta = file.metadata()?;
    if meta.len() < FILE_BYTES_MAX {
        return Ok(());
    }
    let is_current = std::fs::metadata(path).is_ok_and(|now| now.ino() == meta.ino());
    if is_current {
        std::fs::rename(path, path.with_extension("jsonl.1"))?;
    }
    *file = append_to(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_stay_within_their_bounds() {
        let dir = tempfile::tempdir().unwrap();
        let logs = AgentLogs::new(dir.path().join("agents"), "n", Box::new(|_, _| {}));
        let line = "x".repeat(10_000);
        for _ in 0..(FILE_BYTES_MAX as usize / 10_000 * 3) {
            logs.write("a", 0, Stream::Stdout, &line);
        }
        logs.write("a", 0, Stream::Stderr, "the \"last\" one");
        let total: u64 = std::fs::read_dir(dir.path().join("agents"))
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum();
        assert!(total <= 2 * FILE_BYTES_MAX + 20_000, "{total}");
        let text = std::fs::read_to_string(logs.path("a")).unwrap();
        let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(last["line"], "the \"last\" one");
        assert_eq!(last["stream"], "stderr");
        assert_eq!(logs.last_lines("a", 0, 1), ["the \"last\" one"]);
        assert!(logs.last_lines("a", 0, usize::MAX).len() <= RING_LINES_MAX);
        logs.begin("a", 0);
        assert!(logs.last_lines("a", 0, 1).is_empty());
    }
}
