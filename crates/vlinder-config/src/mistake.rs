//! What a wrong setting looks like to the person who wrote it, and where a setting is from.

use std::fmt;
use std::path::PathBuf;

use crate::elements::Raw;
use crate::secret::{MASK, mask_url};

/// Longest part of a wrong value that a message repeats, in characters.
const SHOWN_VALUE_CHARS_MAX: usize = 80;

/// Below this likeness (0 to 1, Damerau-Levenshtein over the longer length) a name is no near match.
const LIKENESS_MIN: f64 = 0.6;

/// Where a value is from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The default of the key.
    Default,
    /// Follows from another key or from the machine; the text names it.
    Derived(String),
    /// A line of a configuration file. Line 0: the file as a whole.
    File {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// An environment variable, by name.
    Env(String),
    /// A command-line flag, by name.
    Flag(String),
    /// A change made while the node ran (`worker scale`, `node label`), kept in `run/live.toml`.
    Live {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
}

impl Origin {
    /// Whether somebody wrote the value, as opposed to a default or a derivation.
    pub fn is_explicit(&self) -> bool {
        !matches!(self, Origin::Default | Origin::Derived(_))
    }

    /// The place to look at when the value is wrong.
    fn place(&self) -> String {
        match self {
            Origin::File { path, line: 0 } | Origin::Live { path, line: 0 } => {
                path.display().to_string()
            }
            Origin::File { path, line } | Origin::Live { path, line } => {
                format!("{}:{line}", path.display())
            }
            Origin::Env(name) | Origin::Flag(name) => name.escape_debug().to_string(),
            Origin::Default => "default".into(),
            Origin::Derived(from) => format!("derived from {from}"),
        }
    }
}

/// How `config show --origin` names it.
impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Live { .. } => f.write_str("live"),
            Origin::File { .. } => write!(f, "file {}", self.place()),
            Origin::Env(name) => write!(f, "environment {name}"),
            Origin::Flag(name) => write!(f, "flag {name}"),
            Origin::Default | Origin::Derived(_) => f.write_str(&self.place()),
        }
    }
}

/// One wrong setting: where, which key, what it holds, what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Mistake {
    /// File and line, variable or flag.
    pub origin: Origin,
    /// The key as it was written; empty when the file as a whole is meant.
    pub key: String,
    /// The value as it was written (text in quotes), cut to 80 characters, `***` for secrets;
    /// `None` where it does not matter.
    pub value: Option<String>,
    /// What is wrong and what was expected.
    pub expected: String,
    /// What was probably meant.
    pub near: Option<String>,
}

impl Mistake {
    pub(crate) fn new(origin: Origin, key: &str, expected: impl Into<String>) -> Self {
        let key = key.to_owned();
        Self {
            origin,
            key,
            value: None,
            expected: expected.into(),
            near: None,
        }
    }

    /// Repeats a text, in quotes.
    pub(crate) fn value(self, text: &str) -> Self {
        let cut: String = text.chars().take(SHOWN_VALUE_CHARS_MAX).collect();
        let more = if cut.len() < text.len() { "…" } else { "" };
        self.plain_value(&format!("{cut:?}{more}"))
    }

    /// Repeats a value that is no text.
    pub(crate) fn plain_value(mut self, shown: &str) -> Self {
        // Twice as many: quotes and escapes take some.
        self.value = Some(shown.chars().take(2 * SHOWN_VALUE_CHARS_MAX).collect());
        self
    }

    /// Repeats what somebody wrote, without credentials.
    pub(crate) fn written(self, raw: &Raw, secret: bool) -> Self {
        match raw {
            _ if secret => self.plain_value(MASK),
            Raw::Text(text) | Raw::Argument(text) => self.value(&mask_url(text)),
            other => self.plain_value(&mask_url(&other.to_string())),
        }
    }

    pub(crate) fn near(mut self, near: Option<String>) -> Self {
        self.near = near;
        self
    }

    /// The order in which a reader goes through them: file by file, line by line.
    pub(crate) fn sort(mistakes: &mut [Mistake]) {
        mistakes.sort_by_cached_key(|mistake| {
            let (file, line) = match &mistake.origin {
                Origin::File { path, line } => (format!("0{}", path.display()), *line),
                Origin::Live { path, line } => (format!("3{}", path.display()), *line),
                Origin::Env(name) => (format!("1{name}"), 0),
                other => (format!("2{}", other.place()), 0),
            };
            (file, line, mistake.key.clone())
        });
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.origin.place())?;
        if !self.key.is_empty() && self.key != self.origin.place() {
            // A key of a file may hold anything, terminal escapes included.
            write!(f, ": {}", self.key.escape_debug())?;
        }
        if let Some(value) = &self.value {
            write!(f, " = {value}")?;
        }
        write!(f, ": {}", self.expected)?;
        match &self.near {
            Some(near) => write!(f, "; did you mean {near}?"),
            None => Ok(()),
        }
    }
}

/// The candidate most like `name`, if any is like it at all. A candidate that ends in `.name`
/// (a key written without its section) beats a mere likeness.
pub(crate) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<String> {
    let tail = format!(".{name}");
    let mut best: Option<(f64, &str)> = None;
    for candidate in candidates {
        let likeness = match candidate.ends_with(&tail) {
            true => 1.0,
            false => strsim::normalized_damerau_levenshtein(name, candidate),
        };
        if likeness >= LIKENESS_MIN && best.is_none_or(|(most, _)| likeness > most) {
            best = Some((likeness, candidate));
        }
    }
    best.map(|(_, candidate)| candidate.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_matches() {
        let keys = [
            "queue.nats_url",
            "queue.backend",
            "distributed.workers.harness",
        ];
        let near = |name| nearest(name, keys.into_iter());
        assert_eq!(near("queue.natsurl").as_deref(), Some("queue.nats_url"));
        assert_eq!(near("nats_url").as_deref(), Some("queue.nats_url"));
        assert_eq!(
            near("workers.harness").as_deref(),
            Some("distributed.workers.harness")
        );
        assert_eq!(near("colour"), None);
        assert_eq!(near(""), None);
    }

    #[test]
    fn a_mistake_reads_as_one_line() {
        let origin = Origin::File {
            path: "/c.toml".into(),
            line: 3,
        };
        let mistake = Mistake::new(origin, "queue.replicas", "expected a whole number")
            .value(&"9".repeat(200));
        let text = mistake.to_string();
        assert!(
            text.starts_with("/c.toml:3: queue.replicas = \"999"),
            "{text}"
        );
        assert!(text.len() < 200, "{text}");
    }
}
