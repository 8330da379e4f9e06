//! Log lines of workers and agents: one JSON object a line in files below `logs/`, and live signals
//! for whoever follows from another machine.

use serde::{Deserialize, Serialize};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use vlinder_bus::subjects;
use vlinder_core::{AgentName, Namespace, WorkerRole};

/// How much of a file's end is searched for its last lines, in bytes.
const TAIL_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// One line.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LogRecord {
    /// When it was written: milliseconds since the Unix epoch, by the node's clock.
    pub time_ms: u64,
    /// The node.
    pub node: String,
    /// The worker (`role/index`) or replica (`agent/index`).
    pub source: String,
    /// The text.
    pub line: String,
}

/// The file of an agent's lines.
pub fn agent_file(data_dir: &Path, agent: &AgentName) -> PathBuf {
    data_dir
        .join("logs")
        .join("agents")
        .join(format!("{agent}.jsonl"))
}

/// The file of a role's lines.
pub fn role_file(data_dir: &Path, role: WorkerRole) -> PathBuf {
    data_dir.join("logs").join(format!("{role}.jsonl"))
}

/// Signal: an agent's lines as they come.
pub fn agent_signal(ns: &Namespace, agent: &AgentName) -> String {
    format!("sig.v1.{ns}.log.{agent}")
}

/// Signal: a role's lines as they come, from every node.
pub fn role_signal(role: WorkerRole) -> String {
    format!("sig.v1._sys.log.{}", subjects::encode(role.as_str()))
}

/// The last `count` lines of a file; none if there is no file. Lines that are no records are kept as text.
pub fn tail(path: &Path, count: usize) -> std::io::Result<Vec<LogRecord>> {
    let mut file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        Err(error) => return Err(error),
    };
    let len = file.metadata()?.len();
    let skipped = len.saturating_sub(TAIL_BYTES_MAX);
    file.seek(SeekFrom::Start(skipped))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES_MAX).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let whole = text.lines().skip(usize::from(skipped > 0));
    let mut records: Vec<LogRecord> = whole
        .filter(|line| !line.is_empty())
        .map(|line| {
            serde_json::from_str(line).unwrap_or_else(|_| LogRecord {
                line: line.to_owned(),
                ..Default::default()
            })
        })
        .collect();
    records.drain(..records.len().saturating_sub(count));
    Ok(records)
}
