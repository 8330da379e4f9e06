//! Standard output and error of a worker process.

use std::io;
use std::os::fd::AsFd as _;
use std::process::{ChildStderr, ChildStdout};

use std::os::fd::OwnedFd;
use tokio::net::unix::pipe::Receiver;

use crate::Error;
use crate::exit::Words;
use crate::lines::{LineSplitter, LogLine, LogStream};
use crate::runner::Incarnation;

/// Read in one go, in bytes: small, so that a flood from one worker leaves the loop to others.
const CHUNK_BYTES: usize = 8 * 1024;
/// Read from each pipe after a death, in bytes. A pipe holds 64 KiB; more can only come from a
/// stray heir.
const LAST_BYTES_MAX: usize = 128 * 1024;

/// Both streams.
pub(super) struct Outputs {
    stdout: Output,
    stderr: Output,
    /// What was said on stderr about the ending.
    pub words: Words,
}

struct Output {
    stream: LogStream,
    /// None after its end.
    pipe: Option<Receiver>,
    lines: LineSplitter,
}

/// Which stream has something.
pub(super) struct Ready(LogStream);

impl Outputs {
    pub fn new(stdout: ChildStdout, stderr: ChildStderr) -> Result<Self, Error> {
        let output = |stream, pipe: OwnedFd| {
            let pipe =
                Receiver::from_owned_fd(pipe).map_err(Error::io("read a worker's output"))?;
            Ok::<_, Error>(Output {
                stream,
                pipe: Some(pipe),
                lines: LineSplitter::default(),
            })
        };
        Ok(Self {
            stdout: output(LogStream::Stdout, stdout.into())?,
            stderr: output(LogStream::Stderr, stderr.into())?,
            words: Words::default(),
        })
    }

    /// Waits for output; for ever once both have ended. Safe to cancel.
    pub async fn ready(&self) -> Ready {
        tokio::select! {
            () = self.stdout.ready() => Ready(LogStream::Stdout),
            () = self.stderr.ready() => Ready(LogStream::Stderr),
        }
    }

    pub fn read(&mut self, ready: Ready, from: &Incarnation, pid: u32) {
        let output = match ready.0 {
            LogStream::Stdout => &mut self.stdout,
            LogStream::Stderr => &mut self.stderr,
        };
        let words = &mut self.words;
        let mut chunk = [0; CHUNK_BYTES];
        let Some(pipe) = &output.pipe else { return };
        match pipe.try_read(&mut chunk) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Ok(count @ 1..) => output.take(&chunk[..count], from, pid, words),
            Ok(0) | Err(_) => output.end(from, pid, words),
        }
    }

    /// Takes what a dead process has left in the pipes.
    pub fn finish(&mut self, from: &Incarnation, pid: u32) {
        let words = &mut self.words;
        for output in [&mut self.stdout, &mut self.stderr] {
            let mut chunk = [0; CHUNK_BYTES];
            let mut total = 0;
            // Asks the kernel itself: the runtime may not have noticed the last bytes yet.
            while let Some(pipe) = &output.pipe
                && total < LAST_BYTES_MAX
                && let Ok(count @ 1..) = rustix::io::read(pipe.as_fd(), &mut chunk)
            {
                total += count;
                output.take(&chunk[..count], from, pid, words);
            }
            output.end(from, pid, words);
        }
    }
}

impl Output {
    async fn ready(&self) {
        match &self.pipe {
            // An error shows again when the pipe is read.
            Some(pipe) => drop(pipe.readable().await),
            None => std::future::pending().await,
        }
    }

    fn take(&mut self, bytes: &[u8], from: &Incarnation, pid: u32, words: &mut Words) {
        self.lines
            .feed(bytes, |text| hand_on(self.stream, from, pid, words, text));
    }

    fn end(&mut self, from: &Incarnation, pid: u32, words: &mut Words) {
        self.pipe = None;
        self.lines
            .finish(|text| hand_on(self.stream, from, pid, words, text));
    }
}

fn hand_on(stream: LogStream, from: &Incarnation, pid: u32, words: &mut Words, text: &str) {
    if stream == LogStream::Stderr {
        words.hear(text);
    }
    from.tail.push(text);
    let worker = from.key;
    from.context.log.line(LogLine {
        worker,
        pid,
        stream,
        text,
    });
}
