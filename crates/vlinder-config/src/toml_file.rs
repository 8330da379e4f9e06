//! Reads a file of the shape of `config.toml` into single settings, each with its line. Knows
//! which keys exist, not what they mean.

use std::path::Path;

use toml::de::{DeTable, DeValue};

use crate::elements::Raw;
use crate::keys::{self, KEYS, Key};
use crate::mistake::{Mistake, Origin, nearest};

/// One setting as somebody wrote it, in whichever layer.
#[derive(Debug)]
pub(crate) struct Written {
    pub key: &'static Key,
    pub raw: Raw,
    pub origin: Origin,
}

/// Which file it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileKind {
    /// `config.toml`.
    Config,
    /// `run/live.toml`.
    Live,
}

/// The settings of a file; whatever is wrong with its shape goes to `mistakes`.
pub(crate) fn settings(
    path: &Path,
    text: &str,
    kind: FileKind,
    mistakes: &mut Vec<Mistake>,
) -> Vec<Written> {
    let mut walk = Walk {
        path,
        text,
        kind,
        mistakes,
        broken: false,
        found: Vec::new(),
    };
    let (table, errors) = DeTable::parse_recoverable(text);
    walk.broken = !errors.is_empty();
    for error in &errors {
        let origin = walk.origin(error.span().map_or(0, |span| span.start));
        let message = error.message().replace('\n', ", ");
        walk.mistakes
            .push(Mistake::new(origin, "", format!("is not TOML: {message}")));
    }
    walk.table("", table.get_ref());
    walk.found
}

/// The mistake of a key that does not exist. Its value is left out: it may be a secret.
pub(crate) fn unknown_key(path: &str, origin: Origin) -> Mistake {
    let candidates = KEYS.iter().map(|key| key.path).chain(keys::sections());
    Mistake::new(origin, path, "is not a key").near(nearest(path, candidates))
}

/// The line of a byte offset, from 1.
pub(crate) fn line(text: &str, offset: usize) -> usize {
    let before = &text.as_bytes()[..offset.min(text.len())];
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

struct Walk<'a> {
    path: &'a Path,
    text: &'a str,
    kind: FileKind,
    mistakes: &'a mut Vec<Mistake>,
    /// The parser has complained, and made up what it could not read.
    broken: bool,
    found: Vec<Written>,
}

impl Walk<'_> {
    fn origin(&self, offset: usize) -> Origin {
        let line = line(self.text, offset);
        let path = self.path.to_owned();
        match self.kind {
            FileKind::Config => Origin::File { path, line },
            FileKind::Live => Origin::Live { path, line },
        }
    }

    fn table(&mut self, section: &str, table: &DeTable<'_>) {
        for (name, value) in table {
            if name.get_ref().is_empty() && self.broken {
                continue; // what the parser made of `= x`, and has complained of
            }
            let origin = self.origin(name.span().start);
            let path = match section {
                "" => name.get_ref().to_string(),
                _ => format!("{section}.{}", name.get_ref()),
            };
            if let Some(key) = keys::find(&path) {
                self.found.push(Written {
                    key,
                    raw: raw(value.get_ref()),
                    origin,
                });
            } else if !keys::sections().any(|known| known == path) {
                self.mistakes.push(unknown_key(&path, origin));
            } else if let Some(inner) = value.get_ref().as_table() {
                self.table(&path, inner);
            } else {
                self.mistakes.push(not_a_section(&path, origin));
            }
        }
    }
}

fn not_a_section(path: &str, origin: Origin) -> Mistake {
    let start = format!("{path}.");
    let mut names: Vec<&str> = Vec::new();
    for rest in KEYS.iter().filter_map(|key| key.path.strip_prefix(&start)) {
        let name = rest.split('.').next().unwrap_or(rest);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    Mistake::new(
        origin,
        path,
        format!("expected a table with {}", names.join(", ")),
    )
}

/// A value as it was written.
pub(crate) fn raw(value: &DeValue<'_>) -> Raw {
    match value {
        DeValue::String(text) => Raw::Text(text.to_string()),
        DeValue::Integer(number) => {
            // Beyond 128 bits it stays as it was written and is out of every bound.
            let decimal = i128::from_str_radix(number.as_str(), number.radix());
            Raw::Integer(decimal.map_or_else(|_| number.to_string(), |n| n.to_string()))
        }
        DeValue::Float(number) => Raw::Other(number.to_string()),
        DeValue::Boolean(value) => Raw::Other(value.to_string()),
        DeValue::Datetime(date) => Raw::Other(date.to_string()),
        DeValue::Array(items) => Raw::List(items.iter().map(|item| raw(item.get_ref())).collect()),
        DeValue::Table(items) => {
            let pairs = items
                .iter()
                .map(|(k, v)| (k.get_ref().to_string(), raw(v.get_ref())));
            Raw::Table(pairs.collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Vec<Written>, Vec<String>) {
        let mut mistakes = Vec::new();
        let found = settings(Path::new("/c.toml"), text, FileKind::Config, &mut mistakes);
        (found, mistakes.iter().map(Mistake::to_string).collect())
    }

    #[test]
    fn lines_and_near_matches() {
        let text = "[queue]\nbackend = \"nats\"\nnatsurl = \"x\"\n[loging]\nlevel = 1\nx = 2\n";
        let (found, mistakes) = read(text);
        assert_eq!(found.len(), 1);
        assert_eq!(
            found[0].origin,
            Origin::File {
                path: "/c.toml".into(),
                line: 2
            }
        );
        assert_eq!(
            mistakes,
            [
                "/c.toml:4: loging: is not a key; did you mean logging?",
                "/c.toml:3: queue.natsurl: is not a key; did you mean queue.nats_url?",
            ]
        );
    }

    #[test]
    fn a_section_is_a_table() {
        let (_, mistakes) = read("queue = \"nats\"\n[distributed.workers]\nagent = 3\n");
        assert_eq!(
            mistakes,
            [
                "/c.toml:3: distributed.workers.agent: expected a table with container, process, lambda",
                "/c.toml:1: queue: expected a table with backend, nats_url, nats_creds, nats_nkey, \
                 nats_token, nats_ca, nats_cert, nats_key, replicas, max_bytes, sync",
            ]
        );
    }

    #[test]
    fn broken_toml_names_its_line_and_the_rest_is_still_read() {
        let (found, mistakes) = read("[queue]\nbackend = \n[logging]\nlevel = \"info\"\n");
        assert!(
            mistakes
                .iter()
                .any(|m| m.starts_with("/c.toml:2: is not TOML: ")),
            "{mistakes:?}"
        );
        assert!(
            found
                .iter()
                .any(|written| written.key.path == "logging.level")
        );
    }

    #[test]
    fn a_missing_key_is_one_kind_of_mistake() {
        let (_, mistakes) = read("= [\n");
        assert!(!mistakes.is_empty());
        assert!(
            mistakes.iter().all(|m| m.contains("is not TOML: ")),
            "{mistakes:?}"
        );
    }

    #[test]
    fn hostile_text_is_refused_without_a_panic() {
        let deep = format!("queue = {}", "[".repeat(50_000));
        for text in [
            "\0",
            "=",
            "[[queue]]",
            "[queue",
            "a.b.c = 1",
            "\"\" = 1",
            &deep,
        ] {
            let (_, mistakes) = read(text);
            assert!(!mistakes.is_empty(), "{:?}", &text[..text.len().min(20)]);
        }
    }
}
