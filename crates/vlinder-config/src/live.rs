//! Changes made while a node runs, kept in `<data_dir>/run/live.toml` so that they outlive a
//! restart. The file has the shape of `config.toml` and is the highest layer.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::{Table, Value};
use vlinder_core::WorkerRole;

use crate::files;
use crate::keys::WORKERS;
use crate::layers::{CONFIG_BYTES_MAX, Loaded, Sources, data_dir, load_with};
use crate::mistake::{Mistake, Origin};

/// What `worker scale` and `node label` change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LiveChange {
    /// New counts; roles that are not named keep theirs.
    pub workers: BTreeMap<WorkerRole, u32>,
    /// All labels of the node from now on, not only the new ones.
    pub labels: Option<BTreeMap<String, String>>,
}

/// Where live changes are kept.
pub(crate) fn path(data_dir: &Path) -> PathBuf {
    data_dir.join("run").join("live.toml")
}

/// Adds a change to those made before, if the configuration is without mistakes then, and gives
/// that configuration. With a mistake nothing is written. The caller makes sure that only one
/// change is under way (the daemon that holds the data directory).
pub fn change_live(sources: &Sources<'_>, change: &LiveChange) -> Result<Loaded, Vec<Mistake>> {
    let data_dir =
        data_dir(sources.env, sources.data_dir.as_deref()).map_err(|mistake| vec![*mistake])?;
    let path = path(&data_dir);
    let refuse = |expected: String| {
        vec![Mistake::new(
            Origin::Live {
                path: path.clone(),
                line: 0,
            },
            "",
            expected,
        )]
    };
    let old = files::read(&path, CONFIG_BYTES_MAX)
        .map_err(|error| refuse(format!("cannot be read: {error}")))?
        .unwrap_or_default();
    let mut table: Table = old
        .parse()
        .map_err(|error: toml::de::Error| refuse(format!("is not TOML: {}", error.message())))?;
    for (role, count) in &change.workers {
        put(
            &mut table,
            &format!("{WORKERS}{role}"),
            Value::Integer((*count).into()),
        );
    }
    if let Some(labels) = &change.labels {
        let labels = labels
            .iter()
            .map(|(k, v)| (k.clone(), Value::String(v.clone())));
        put(&mut table, "node.labels", Value::Table(labels.collect()));
    }
    let text =
        format!("# Changes made while the node ran. Delete this file to forget them.\n{table}");
    let loaded = load_with(sources, Some(&text))?;
    files::replace(&path, text.as_bytes(), 0o600)
        .map_err(|error| refuse(format!("cannot be written: {error}")))?;
    Ok(loaded)
}

fn put(table: &mut Table, path: &str, value: Value) {
    match path.split_once('.') {
        None => drop(table.insert(path.to_owned(), value)),
        Some((name, rest)) => {
            let inner = table
                .entry(name)
                .or_insert_with(|| Value::Table(Table::new()));
            // Whatever else stands there is no section; loading would have refused it.
            if !inner.is_table() {
                *inner = Value::Table(Table::new());
            }
            if let Some(inner) = inner.as_table_mut() {
                put(inner, rest, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Env, load};

    #[test]
    fn changes_add_up_outlive_a_restart_and_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let env = Env::bare(dir.path(), "h").with("VLINDER_WORKERS_INFERENCE_OLLAMA", "1");
        let sources = Sources::new(&env);
        let scale = |role, count| LiveChange {
            workers: [(role, count)].into(),
            labels: None,
        };
        change_live(&sources, &scale(WorkerRole::InferenceOllama, 4)).unwrap();
        let labels = [("zone".to_owned(), "a".to_owned())].into();
        let change = LiveChange {
            labels: Some(labels),
            ..scale(WorkerRole::Harness, 2)
        };
        change_live(&sources, &change).unwrap();

        let loaded = load(&sources).unwrap();
        assert_eq!(loaded.config.workers.count(WorkerRole::InferenceOllama), 4);
        assert_eq!(loaded.config.workers.count(WorkerRole::Harness), 2);
        assert_eq!(loaded.config.node.labels["zone"], "a");
        let key = "distributed.workers.inference.ollama";
        assert_eq!(loaded.origin(key).unwrap().to_string(), "live");
        let warned = loaded.warnings.iter().any(|w| {
            w.starts_with(key) && w.contains("environment VLINDER_WORKERS_INFERENCE_OLLAMA")
        });
        assert!(warned, "{:?}", loaded.warnings);
    }

    #[test]
    fn a_change_that_does_not_fit_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let env = Env::bare(dir.path(), "h");
        let sources = Sources {
            supported: &[WorkerRole::Registry],
            ..Sources::new(&env)
        };
        for (role, count) in [(WorkerRole::Registry, 65), (WorkerRole::AgentLambda, 1)] {
            let change = LiveChange {
                workers: [(role, count)].into(),
                labels: None,
            };
            let mistakes = change_live(&sources, &change).unwrap_err();
            assert_eq!(mistakes.len(), 1, "{mistakes:?}");
            assert!(mistakes[0].key.ends_with(role.as_str()));
        }
        assert!(!path(&dir.path().join(".vlinder")).exists());
        let labels = Some([("bad key".to_owned(), "x".to_owned())].into());
        assert!(
            change_live(
                &sources,
                &LiveChange {
                    labels,
                    ..Default::default()
                }
            )
            .is_err()
        );
    }
}
