//! What an instance prints: read always, so that it never blocks on us, and kept within bounds, so
//! that a flood costs neither memory, disk nor the worker's time.

use crate::launcher::LaunchSpec;
use crate::logs::{AgentLogs, Stream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Child;
use tokio::time::Instant;

/// Longest line that is kept, in bytes; the rest of a longer one is dropped.
const LINE_BYTES_MAX: usize = 16 * 1024;
/// What is read at once, in bytes: as much as a pipe holds.
const READ_BYTES: usize = 64 * 1024;
/// What one stream of an instance may print and have kept at once, in bytes.
const KEPT_BYTES_MAX: usize = 256 * 1024;
/// What it may print in a second in the long run, in bytes.
const KEPT_BYTES_PER_S: usize = 64 * 1024;
/// Pause between two reads of a stream that prints more than it may. Bounds a flood to some 1.3 MB/s,
/// which costs the worker well under 1% of a core.
const FLOOD_PAUSE: Duration = Duration::from_millis(50);

/// Starts reading both streams of a child. The readers end with the pipes: when everything that the
/// child started has ended. Gives the bytes that are dropped, as they grow.
pub(crate) fn capture(
    child: &mut Child,
    logs: &Arc<AgentLogs>,
    spec: &LaunchSpec,
) -> Arc<AtomicU64> {
    let flood = Arc::<AtomicU64>::default();
    let sink = |stream| Sink::new(logs, spec, stream, flood.clone());
    if let Some(pipe) = child.stdout.take() {
        tokio::spawn(read(pipe, sink(Stream::Stdout)));
    }
    if let Some(pipe) = child.stderr.take() {
        tokio::spawn(read(pipe, sink(Stream::Stderr)));
    }
    flood
}

async fn read(mut pipe: impl AsyncRead + Unpin, mut sink: Sink) {
    let mut buffer = Vec::with_capacity(READ_BYTES);
    loop {
        buffer.clear();
        match pipe.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(_) => sink.take(&buffer),
        }
        sink.pace().await;
    }
    sink.end();
}

/// Cuts a stream into lines and hands them to the log, as long as the budget lasts.
pub(crate) struct Sink {
    logs: Arc<AgentLogs>,
    agent: String,
    replica: u32,
    stream: Stream,
    line: Vec<u8>,
    is_cut: bool,
    /// Lines dropped since the last one that was kept.
    dropped: u64,
    /// Bytes dropped since the start.
    flood: Arc<AtomicU64>,
    budget: usize,
    refilled: Instant,
}

impl Sink {
    /// A sink for one stream of an instance.
    pub fn new(
        logs: &Arc<AgentLogs>,
        spec: &LaunchSpec,
        stream: Stream,
        flood: Arc<AtomicU64>,
    ) -> Self {
        Self {
            logs: logs.clone(),
            agent: spec.deployment.name().to_string(),
            replica: spec.replica,
            stream,
            line: Vec::new(),
            is_cut: false,
            dropped: 0,
            flood,
            budget: KEPT_BYTES_MAX,
            refilled: Instant::now(),
        }
    }

    /// Pauses where the stream has printed more than it may.
    pub async fn pace(&self) {
        if self.budget == 0 {
            tokio::time::sleep(FLOOD_PAUSE).await;
        }
    }

    /// Takes what was printed next.
    pub fn take(&mut self, bytes: &[u8]) {
        let seconds = self.refilled.elapsed().as_secs();
        if seconds > 0 {
            self.refilled = Instant::now();
            let more = KEPT_BYTES_PER_S.saturating_mul(seconds as usize);
            self.budget = self.budget.saturating_add(more).min(KEPT_BYTES_MAX);
        }
        if self.budget == 0 {
            // A flood is only counted; the line that goes over its end is dropped with it.
            self.flood.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            self.dropped += bytes.iter().filter(|byte| **byte == b'\n').count() as u64;
            self.line.clear();
            self.is_cut = false;
            return;
        }
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, ends) = match piece.split_last() {
                Some((b'\n', text)) => (text, true),
                _ => (piece, false),
            };
            let room = LINE_BYTES_MAX - self.line.len();
            self.is_cut |= text.len() > room;
            // A line without an end is a flood, too.
            let over = text.len().saturating_sub(room);
            self.budget = self.budget.saturating_sub(over);
            self.flood.fetch_add(over as u64, Ordering::Relaxed);
            self.line.extend_from_slice(&text[..text.len().min(room)]);
            if ends {
                self.flush_line();
            }
        }
    }

    fn flush_line(&mut self) {
        let bytes = std::mem::take(&mut self.line);
        let is_cut = std::mem::take(&mut self.is_cut);
        let cost = bytes.len() + 64;
        if self.budget < cost {
            self.budget = 0;
            self.dropped += 1;
            return;
        }
        self.budget -= cost;
        if self.dropped > 0 {
            let lines = std::mem::take(&mut self.dropped);
            self.write(&format!(
                "[{lines} lines dropped: more than {KEPT_BYTES_PER_S} bytes a second]"
            ));
        }
        let mut text =
            String::from_utf8_lossy(bytes.strip_suffix(b"\r").unwrap_or(&bytes)).into_owned();
        if is_cut {
            text.push_str(" [cut]");
        }
        self.write(&text);
    }

    fn write(&self, line: &str) {
        self.logs
            .write(&self.agent, self.replica, self.stream, line);
    }

    /// Nothing more comes.
    pub fn end(mut self) {
        if !self.line.is_empty() {
            self.flush_line();
        }
        if self.dropped > 0 {
            self.write(&format!("[{} lines dropped]", self.dropped));
        }
    }
}
