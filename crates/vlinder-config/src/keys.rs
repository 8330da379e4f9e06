//! The table of keys: the file form of the configuration.
//!
//! Names of variables, near matches, the sample file and the JSON Schema all come from here.
//! `config.rs` has the checked form; a test holds the two together.

mod table;

use crate::elements::Kind;
pub(crate) use table::KEYS;

/// One key of `config.toml`.
#[derive(Debug)]
pub(crate) struct Key {
    /// The full path, e.g. `queue.nats_url`.
    pub path: &'static str,
    /// What it holds.
    pub kind: Kind,
    /// What it holds when nobody says.
    pub standard: Standard,
    /// What it is for, in sentences.
    pub about: &'static str,
}

/// The default of a key.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Standard {
    /// This, written as in a variable.
    Is(&'static str),
    /// `derive.rs` computes it.
    Follows {
        /// How, in words.
        rule: &'static str,
        /// A value, for the sample.
        example: &'static str,
    },
    /// Nothing.
    Unset {
        /// A value, for the sample.
        example: &'static str,
    },
}

impl Key {
    /// The section of the key: its path without the last part.
    pub fn section(&self) -> &'static str {
        self.path
            .rsplit_once('.')
            .map_or("", |(section, _)| section)
    }

    /// The last part of the path.
    pub fn name(&self) -> &'static str {
        self.path.rsplit('.').next().unwrap_or(self.path)
    }

    /// The variables that set it; the first is the regular one.
    pub fn variables(&self) -> Vec<String> {
        let regular = |path: &str| format!("VLINDER_{}", path.to_uppercase().replace('.', "_"));
        let mut names = vec![regular(self.path)];
        if self.path.starts_with(WORKERS) {
            names.push(regular(self.path.trim_start_matches("distributed.")));
        }
        if self.path == "distributed.ports.http" {
            names.push("VLINDER_SESSION_PORT".into());
        }
        names
    }
}

/// What all worker counts begin with.
pub(crate) const WORKERS: &str = "distributed.workers.";

/// Variables that begin with `VLINDER_` and set no key.
pub(crate) const OTHER_VARIABLES: [&str; 3] =
    ["VLINDER_DIR", "VLINDER_CONFIG", "VLINDER_BRIDGE_URL"];

/// Variables with this prefix belong to tests.
pub(crate) const TEST_PREFIX: &str = "VLINDER_TEST_";

/// The key of a path.
pub(crate) fn find(path: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.path == path)
}

/// Every section with keys or sections below it, e.g. `distributed` and `distributed.workers`.
pub(crate) fn sections() -> impl Iterator<Item = &'static str> {
    KEYS.iter()
        .flat_map(|key| key.path.match_indices('.').map(|(at, _)| &key.path[..at]))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use vlinder_core::WorkerRole;

    use super::*;

    #[test]
    fn paths_and_variables_are_unique() {
        let mut seen = BTreeSet::new();
        for key in KEYS {
            assert!(seen.insert(key.path.to_owned()), "{} twice", key.path);
            for variable in key.variables() {
                assert!(seen.insert(variable.clone()), "{variable} twice");
            }
            assert!(
                !sections().any(|section| section == key.path),
                "{}",
                key.path
            );
        }
    }

    #[test]
    fn every_role_has_a_count() {
        for role in WorkerRole::ALL {
            assert!(find(&format!("{WORKERS}{role}")).is_some(), "{role}");
        }
        let counts = KEYS
            .iter()
            .filter(|key| key.path.starts_with(WORKERS))
            .count();
        assert_eq!(counts, WorkerRole::ALL.len());
    }

    #[test]
    fn sections_are_contiguous() {
        let mut done: Vec<&str> = Vec::new();
        for key in KEYS {
            if done.last() != Some(&key.section()) {
                assert!(!done.contains(&key.section()), "[{}] twice", key.section());
                done.push(key.section());
            }
            assert!(key.about.ends_with('.'), "{}", key.path);
        }
    }
}
