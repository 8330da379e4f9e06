//! How a worker ended, and what that means for its restart.

use std::fmt;
use std::time::Duration;

/// Exit code of a worker whose configuration cannot work (`EX_CONFIG` of sysexits). It is retried
/// only slowly: the same configuration fails the same way.
pub const EXIT_CONFIGURATION: i32 = 78;

/// Exit code of a Rust program whose main thread panicked.
const EXIT_PANIC: i32 = 101;
/// What the Rust runtime writes to stderr before it aborts for want of memory.
const ALLOCATION_FAILED: &str = "memory allocation of";
/// Longest message taken over from a worker's output, in bytes.
const MESSAGE_BYTES_MAX: usize = 300;

const SIGABRT: i32 = 6;
const SIGKILL: i32 = 9;
const SIGXCPU: i32 = 24;

/// Every ending of a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WorkerExit {
    /// It ended by itself with success, though nobody had asked it to.
    Completed,
    /// It was asked to drain and ended with success.
    Drained,
    /// It ended with a code other than 0.
    Failed {
        /// The exit code.
        code: i32,
        /// Its last words, may be empty.
        message: String,
    },
    /// Its configuration cannot work (exit 78).
    Configuration {
        /// Its last words.
        message: String,
    },
    /// It panicked.
    Panicked {
        /// The panic message.
        message: String,
    },
    /// A signal ended it that the supervisor did not send.
    Signalled {
        /// The signal's number.
        signal: i32,
        /// Whether a core was written.
        core_dumped: bool,
    },
    /// It asked for more memory than it may have.
    MemoryLimit {
        /// The limit in bytes, if one was set.
        limit_bytes: Option<u64>,
    },
    /// The kernel killed it because the machine or its control group ran out of memory.
    OutOfMemory,
    /// It used up its processor time.
    CpuLimit {
        /// The limit in seconds, if one was set.
        limit_seconds: Option<u64>,
    },
    /// Its loop made no progress; the supervisor killed it.
    Unresponsive {
        /// For how long it had not answered.
        silent_for: Duration,
    },
    /// It broke the control protocol; the supervisor killed it.
    BrokenControl {
        /// What was wrong.
        detail: String,
    },
    /// It did not finish draining in time; the supervisor killed it.
    DrainDeadline,
    /// It was ended at once, on request.
    Killed,
    /// It could not be started at all.
    CouldNotStart {
        /// Why.
        reason: String,
    },
    /// It is gone, and how it ended cannot be found out.
    Lost,
}

/// What an ending means for the restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// As asked: no failure.
    Expected,
    /// A failure: at once the first time, then with backoff.
    Retry,
    /// A failure that a fast retry cannot mend.
    RetrySlowly,
}

impl WorkerExit {
    /// The kind of ending, as a label for counts.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Drained => "drained",
            Self::Failed { .. } => "failed",
            Self::Configuration { .. } => "configuration",
            Self::Panicked { .. } => "panicked",
            Self::Signalled { .. } => "signalled",
            Self::MemoryLimit { .. } => "memory_limit",
            Self::OutOfMemory => "out_of_memory",
            Self::CpuLimit { .. } => "cpu_limit",
            Self::Unresponsive { .. } => "unresponsive",
            Self::BrokenControl { .. } => "broken_control",
            Self::DrainDeadline => "drain_deadline",
            Self::Killed => "killed",
            Self::CouldNotStart { .. } => "could_not_start",
            Self::Lost => "lost",
        }
    }

    /// What the ending means when nobody had asked for it.
    pub(crate) fn verdict(&self) -> Verdict {
        match self {
            Self::Drained | Self::Killed | Self::DrainDeadline => Verdict::Expected,
            Self::Completed
            | Self::Failed { .. }
            | Self::Panicked { .. }
            | Self::Signalled { .. }
            | Self::MemoryLimit { .. }
            | Self::OutOfMemory
            | Self::CpuLimit { .. }
            | Self::Unresponsive { .. }
            | Self::BrokenControl { .. }
            | Self::CouldNotStart { .. }
            | Self::Lost => Verdict::Retry,
            Self::Configuration { .. } => Verdict::RetrySlowly,
        }
    }

    /// Whether a job that the worker held may have caused the ending.
    pub(crate) fn blames_the_job(&self) -> bool {
        match self {
            Self::Completed
            | Self::Drained
            | Self::DrainDeadline
            | Self::Killed
            | Self::Configuration { .. }
            | Self::CouldNotStart { .. } => false,
            Self::Failed { .. }
            | Self::Panicked { .. }
            | Self::Signalled { .. }
            | Self::MemoryLimit { .. }
            | Self::OutOfMemory
            | Self::CpuLimit { .. }
            | Self::Unresponsive { .. }
            | Self::BrokenControl { .. }
            | Self::Lost => true,
        }
    }
}

impl fmt::Display for WorkerExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Completed => f.write_str("ended unasked (exit 0)"),
            Self::Drained => f.write_str("drained"),
            Self::Failed { code, message } => {
                with_words(f, &format!("failed (exit {code})"), message)
            }
            Self::Configuration { message } => with_words(
                f,
                &format!("configuration error (exit {EXIT_CONFIGURATION})"),
                message,
            ),
            Self::Panicked { message } => with_words(f, "panicked", message),
            Self::Signalled {
                signal,
                core_dumped,
            } => {
                write!(f, "killed by signal {signal} ({})", signal_name(*signal))?;
                if *core_dumped {
                    f.write_str(", core dumped")
                } else {
                    Ok(())
                }
            }
            Self::MemoryLimit {
                limit_bytes: Some(limit),
            } => {
                write!(
                    f,
                    "out of memory: reached its limit of {} MiB",
                    limit / (1024 * 1024)
                )
            }
            Self::MemoryLimit { limit_bytes: None } => {
                f.write_str("out of memory: an allocation was refused")
            }
            Self::OutOfMemory => f.write_str("out of memory: killed by the kernel (OOM)"),
            Self::CpuLimit {
                limit_seconds: Some(limit),
            } => {
                write!(f, "used up its processor time of {limit} s")
            }
            Self::CpuLimit {
                limit_seconds: None,
            } => f.write_str("used up its processor time"),
            Self::Unresponsive { silent_for } => {
                write!(
                    f,
                    "unresponsive: its loop stood still for {:.1} s",
                    silent_for.as_secs_f64()
                )
            }
            Self::BrokenControl { detail } => with_words(f, "broke the control protocol", detail),
            Self::DrainDeadline => f.write_str("killed: did not drain in time"),
            Self::Killed => f.write_str("killed on request"),
            Self::CouldNotStart { reason } => with_words(f, "could not start", reason),
            Self::Lost => f.write_str("gone, with an unknown ending"),
        }
    }
}

fn with_words(f: &mut fmt::Formatter<'_>, what: &str, words: &str) -> fmt::Result {
    if words.is_empty() {
        f.write_str(what)
    } else {
        write!(f, "{what}: {words}")
    }
}

/// Why the supervisor killed a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum KillReason {
    Unresponsive { silent_for: Duration },
    BrokenControl { detail: String },
    DrainDeadline,
    Now,
}

impl From<KillReason> for WorkerExit {
    fn from(reason: KillReason) -> Self {
        match reason {
            KillReason::Unresponsive { silent_for } => Self::Unresponsive { silent_for },
            KillReason::BrokenControl { detail } => Self::BrokenControl { detail },
            KillReason::DrainDeadline => Self::DrainDeadline,
            KillReason::Now => Self::Killed,
        }
    }
}

/// How the kernel says that a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RawExit {
    Code(i32),
    Signal { signal: i32, core_dumped: bool },
    Unknown,
}

/// What is known when a process has ended.
pub(crate) struct Circumstances<'a> {
    pub raw: RawExit,
    /// Set if the supervisor killed it.
    pub killed: Option<KillReason>,
    /// Whether it had been asked to drain.
    pub draining: bool,
    pub memory_limit_bytes: Option<u64>,
    pub cpu_limit_seconds: Option<u64>,
    /// Whether the kernel's count of OOM kills went up during its life.
    pub kernel_oom: bool,
    pub words: &'a Words,
}

/// What the output of a worker says about its ending. Kept apart from the last lines: a backtrace
/// of a hundred lines would push the message out.
#[derive(Debug, Default)]
pub(crate) struct Words {
    last: String,
    panic: Option<String>,
    panic_follows: bool,
    allocation_failed: bool,
}

impl Words {
    pub fn hear(&mut self, line: &str) {
        let line = line.trim();
        if line.is_empty() {
            return;
        }
        self.last = shorten(line);
        // A panic prints `thread … panicked at FILE:LINE:`, and the message on the next line.
        if std::mem::take(&mut self.panic_follows) {
            self.panic = Some(shorten(line));
        }
        self.panic_follows = line.contains("panicked at");
        self.allocation_failed |= line.contains(ALLOCATION_FAILED);
    }

    fn of_a_panic(&self) -> String {
        self.panic.clone().unwrap_or_else(|| self.last.clone())
    }
}

/// Names the ending of a process.
pub(crate) fn classify(seen: Circumstances<'_>) -> WorkerExit {
    match (seen.raw, seen.killed) {
        // Asked to end at the deadline, it may still have made it.
        (RawExit::Code(0), _) if seen.draining => WorkerExit::Drained,
        (
            RawExit::Signal {
                signal: SIGKILL, ..
            },
            Some(reason),
        ) => reason.into(),
        (RawExit::Code(0), _) => WorkerExit::Completed,
        (RawExit::Code(EXIT_CONFIGURATION), _) => WorkerExit::Configuration {
            message: seen.words.last.clone(),
        },
        (RawExit::Code(EXIT_PANIC), _) => WorkerExit::Panicked {
            message: seen.words.of_a_panic(),
        },
        (RawExit::Code(code), _) => WorkerExit::Failed {
            code,
            message: seen.words.last.clone(),
        },
        (
            RawExit::Signal {
                signal: SIGABRT, ..
            },
            _,
        ) if seen.words.allocation_failed => WorkerExit::MemoryLimit {
            limit_bytes: seen.memory_limit_bytes,
        },
        (
            RawExit::Signal {
                signal: SIGXCPU, ..
            },
            _,
        ) => WorkerExit::CpuLimit {
            limit_seconds: seen.cpu_limit_seconds,
        },
        (
            RawExit::Signal {
                signal: SIGKILL, ..
            },
            None,
        ) if seen.kernel_oom => WorkerExit::OutOfMemory,
        (
            RawExit::Signal {
                signal,
                core_dumped,
            },
            _,
        ) => WorkerExit::Signalled {
            signal,
            core_dumped,
        },
        (RawExit::Unknown, Some(reason)) => reason.into(),
        (RawExit::Unknown, None) => WorkerExit::Lost,
    }
}

/// At most [`MESSAGE_BYTES_MAX`] bytes, cut at a character.
pub(crate) fn shorten(text: &str) -> String {
    text[..text.floor_char_boundary(MESSAGE_BYTES_MAX)].to_owned()
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        5 => "SIGTRAP",
        SIGABRT => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        SIGKILL => "SIGKILL",
        10 => "SIGUSR1",
        11 => "SIGSEGV",
        12 => "SIGUSR2",
        13 => "SIGPIPE",
        14 => "SIGALRM",
        15 => "SIGTERM",
        SIGXCPU => "SIGXCPU",
        25 => "SIGXFSZ",
        31 => "SIGSYS",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn named(raw: RawExit, killed: Option<KillReason>, draining: bool, lines: &[&str]) -> String {
        let mut words = Words::default();
        lines.iter().for_each(|line| words.hear(line));
        classify(Circumstances {
            raw,
            killed,
            draining,
            memory_limit_bytes: Some(64 * MIB),
            cpu_limit_seconds: None,
            kernel_oom: false,
            words: &words,
        })
        .to_string()
    }

    #[test]
    fn endings_are_named() {
        let signal = |signal| RawExit::Signal {
            signal,
            core_dumped: false,
        };
        let stalled = KillReason::Unresponsive {
            silent_for: Duration::from_millis(3100),
        };
        let table = [
            (
                named(RawExit::Code(0), None, false, &[]),
                "ended unasked (exit 0)",
            ),
            (named(RawExit::Code(0), None, true, &["bye"]), "drained"),
            (
                named(RawExit::Code(0), Some(KillReason::DrainDeadline), true, &[]),
                "drained",
            ),
            (
                named(RawExit::Code(3), None, false, &["no bus", " "]),
                "failed (exit 3): no bus",
            ),
            (
                named(RawExit::Code(78), None, false, &["bad key"]),
                "configuration error (exit 78): bad key",
            ),
            (
                named(
                    RawExit::Code(101),
                    None,
                    false,
                    &["thread 'main' panicked at a.rs:1:", "boom", "note: run"],
                ),
                "panicked: boom",
            ),
            (
                named(signal(9), None, false, &[]),
                "killed by signal 9 (SIGKILL)",
            ),
            (
                named(signal(9), Some(KillReason::DrainDeadline), true, &[]),
                "killed: did not drain in time",
            ),
            (
                named(signal(9), Some(stalled), false, &[]),
                "unresponsive: its loop stood still for 3.1 s",
            ),
            (
                named(signal(6), None, false, &["assert"]),
                "killed by signal 6 (SIGABRT)",
            ),
            (
                named(
                    signal(6),
                    None,
                    false,
                    &["memory allocation of 209715200 bytes failed"],
                ),
                "out of memory: reached its limit of 64 MiB",
            ),
            (
                named(signal(24), None, false, &[]),
                "used up its processor time",
            ),
            (
                named(RawExit::Unknown, None, false, &[]),
                "gone, with an unknown ending",
            ),
        ];
        for (text, expected) in table {
            assert_eq!(text, expected);
        }
    }

    #[test]
    fn words_of_a_worker_are_cut_at_a_character() {
        assert_eq!(shorten(&"ä".repeat(400)).len(), 300);
        assert_eq!(shorten(&format!("x{}", "ä".repeat(400))).len(), 299);
    }
}
