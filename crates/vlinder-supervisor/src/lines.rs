//! The output of workers: cut into lines, kept as a short tail, handed to a sink.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::WorkerKey;

/// Longest line in bytes. A longer one is cut into several, so that a worker that never writes a
/// line end cannot grow a buffer.
pub(crate) const LINE_BYTES_MAX: usize = 8 * 1024;
/// How many of a worker's last lines are kept.
pub(crate) const TAIL_LINES_MAX: usize = 50;

/// Which stream a line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// One line of a worker's output.
#[derive(Debug, Clone, Copy)]
pub struct LogLine<'a> {
    /// Who wrote it.
    pub worker: WorkerKey,
    /// Its process.
    pub pid: u32,
    /// Where it wrote.
    pub stream: LogStream,
    /// The text without the line end, at most 8 KiB, not UTF-8 replaced.
    pub text: &'a str,
}

/// Takes the output of worker processes.
///
/// Called on the supervisor's own loop: it must not block. Hand the line to a bounded queue, and
/// drop and count when that is full.
pub trait LogSink: Send + Sync + 'static {
    /// Takes one line.
    fn line(&self, line: LogLine<'_>);
}

/// The last lines of one worker, over its restarts. Cheap to clone; always current.
#[derive(Debug, Clone, Default)]
pub struct Tail(Arc<Mutex<TailLines>>);

#[derive(Debug, Default)]
struct TailLines {
    lines: VecDeque<String>,
    /// Lines that were ever pushed.
    total: u64,
}

impl Tail {
    /// The last lines, oldest first, at most 50.
    pub fn lines(&self) -> Vec<String> {
        self.lines_since(0)
    }

    /// How many lines there have been.
    pub(crate) fn total(&self) -> u64 {
        self.lock().total
    }

    /// Those of the last lines that came after the first `total`.
    pub(crate) fn lines_since(&self, total: u64) -> Vec<String> {
        let tail = self.lock();
        let dropped = tail.total - tail.lines.len() as u64;
        let skip = usize::try_from(total.saturating_sub(dropped)).unwrap_or(usize::MAX);
        tail.lines.iter().skip(skip).cloned().collect()
    }

    pub(crate) fn push(&self, line: &str) {
        let mut tail = self.lock();
        if tail.lines.len() == TAIL_LINES_MAX {
            tail.lines.pop_front();
        }
        tail.lines.push_back(line.to_owned());
        tail.total += 1;
    }

    fn lock(&self) -> MutexGuard<'_, TailLines> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Cuts a byte stream into lines.
#[derive(Debug, Default)]
pub(crate) struct LineSplitter {
    partial: Vec<u8>,
}

impl LineSplitter {
    /// Takes the next bytes and hands on every line that is complete.
    pub fn feed(&mut self, mut bytes: &[u8], mut line: impl FnMut(&str)) {
        while !bytes.is_empty() {
            let room = LINE_BYTES_MAX - self.partial.len();
            let window = &bytes[..bytes.len().min(room)];
            match window.iter().position(|&byte| byte == b'\n') {
                Some(end) => {
                    self.partial.extend_from_slice(&window[..end]);
                    bytes = &bytes[end + 1..];
                    self.emit(&mut line);
                }
                None => {
                    self.partial.extend_from_slice(window);
                    bytes = &bytes[window.len()..];
                    if self.partial.len() == LINE_BYTES_MAX {
                        self.emit(&mut line);
                    }
                }
            }
        }
    }

    /// Hands on what came after the last line end.
    pub fn finish(&mut self, mut line: impl FnMut(&str)) {
        if !self.partial.is_empty() {
            self.emit(&mut line);
        }
    }

    fn emit(&mut self, line: &mut impl FnMut(&str)) {
        let bytes = self.partial.strip_suffix(b"\r").unwrap_or(&self.partial);
        line(&String::from_utf8_lossy(bytes));
        self.partial.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(chunks: &[&[u8]]) -> Vec<String> {
        let mut splitter = LineSplitter::default();
        let mut lines = Vec::new();
        for chunk in chunks {
            splitter.feed(chunk, |line| lines.push(line.to_owned()));
        }
        splitter.finish(|line| lines.push(line.to_owned()));
        lines
    }

    #[test]
    fn lines_survive_any_chunking() {
        assert_eq!(
            split(&[b"a\r\nb", b"c\n", b"\n", b"end"]),
            ["a", "bc", "", "end"]
        );
        assert_eq!(split(&[b"\xff\xfe\n"]), ["\u{fffd}\u{fffd}"]);
        assert!(split(&[]).is_empty());
    }

    #[test]
    fn an_endless_line_is_cut() {
        let flood = vec![b'x'; 3 * LINE_BYTES_MAX + 5];
        let lengths: Vec<_> = split(&[&flood]).iter().map(String::len).collect();
        assert_eq!(lengths, [LINE_BYTES_MAX, LINE_BYTES_MAX, LINE_BYTES_MAX, 5]);
    }

    #[test]
    fn the_tail_keeps_the_last_lines() {
        let tail = Tail::default();
        for n in 0..60 {
            tail.push(&n.to_string());
        }
        let lines = tail.lines();
        assert_eq!(
            (lines.len(), lines[0].as_str(), lines[49].as_str()),
            (50, "10", "59")
        );
        assert_eq!(tail.lines_since(58), ["58", "59"]);
        assert_eq!(tail.lines_since(3).len(), 50);
        assert!(tail.lines_since(tail.total()).is_empty());
    }
}
