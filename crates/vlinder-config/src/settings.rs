//! All settings of one load, while it goes on: values with their origins, what is wrong, what is
//! worth a warning.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde_json::{Map, json};

use crate::elements::{Raw, Value};
use crate::keys::{KEYS, Key, WORKERS, find};
use crate::mistake::{Mistake, Origin};
use crate::{Config, Env};

/// A checked value and where it is from.
#[derive(Clone, PartialEq)]
pub(crate) struct Setting {
    pub value: Value,
    pub origin: Origin,
}

/// Without the value: it may be a secret.
impl fmt::Debug for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.origin, f)
    }
}

#[derive(Debug, Default)]
pub(crate) struct Settings {
    values: BTreeMap<&'static str, Setting>,
    /// Keys that were refused somewhere: rules that span several keys leave them alone, so that
    /// one slip makes one message.
    broken: BTreeSet<&'static str>,
    pub mistakes: Vec<Mistake>,
    pub warnings: Vec<String>,
}

impl Settings {
    pub fn set(&mut self, path: &'static str, value: Value, origin: Origin) {
        self.values.insert(path, Setting { value, origin });
    }

    /// Sets what `text` means for the key, which is known to be fine.
    pub fn set_text(&mut self, key: &'static Key, text: &str, origin: Origin) {
        let checked = key.kind.check(&Raw::Argument(text.to_owned()));
        let value = checked.unwrap_or_else(|refusal| {
            panic!(
                "{} = {text:?} is our own and {}",
                key.path, refusal.expected
            )
        });
        self.set(key.path, value, origin);
    }

    pub fn refuse(&mut self, path: &'static str, mistake: Mistake) {
        self.broken.insert(path);
        self.mistakes.push(mistake);
    }

    pub fn is_broken(&self, path: &str) -> bool {
        self.broken.contains(path)
    }

    pub fn get(&self, path: &str) -> Option<&Setting> {
        self.values.get(path)
    }

    pub fn text(&self, path: &str) -> Option<&str> {
        match &self.values.get(path)?.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub fn number(&self, path: &str) -> Option<u64> {
        match self.values.get(path)?.value {
            Value::Number(number) => Some(number),
            _ => None,
        }
    }

    pub fn list(&self, path: &str) -> &[String] {
        match self.values.get(path).map(|setting| &setting.value) {
            Some(Value::List(items)) => items,
            _ => &[],
        }
    }

    /// The setting, if somebody wrote it.
    pub fn explicit(&self, path: &str) -> Option<&Setting> {
        self.values
            .get(path)
            .filter(|setting| setting.origin.is_explicit())
    }

    /// A mistake of a rule that spans several keys, at one of them.
    pub fn mistake_at(&mut self, path: &'static str, expected: impl Into<String>) {
        let Some(setting) = self.values.get(path) else {
            return;
        };
        let secret = find(path).is_some_and(|key| key.kind.is_secret());
        let mistake = Mistake::new(setting.origin.clone(), path, expected);
        let mistake = match (&setting.value, secret) {
            (Value::Text(text), false) => mistake.value(text),
            (Value::Number(number), _) => mistake.plain_value(&number.to_string()),
            _ => mistake,
        };
        self.mistakes.push(mistake);
    }

    /// Every key that has a value, in the order of the table.
    pub fn in_order(&self) -> impl Iterator<Item = (&'static Key, Option<&Setting>)> {
        KEYS.iter().map(|key| (key, self.values.get(key.path)))
    }

    /// The checked form. Call only when there are no mistakes.
    pub fn config(&self, env: &Env) -> Config {
        let mut root = Map::new();
        for (key, setting) in self.in_order() {
            let Some(setting) = setting else { continue };
            let value = setting.value.to_json();
            match key.path.strip_prefix(WORKERS) {
                Some(role) => insert(&mut root, &["workers", role], value),
                None => insert(&mut root, &key.path.split('.').collect::<Vec<_>>(), value),
            }
        }
        for section in ["auth", "local", "openai", "s3"] {
            root.entry(section).or_insert_with(|| json!({}));
        }
        for (key, name) in [
            ("queue.replicas", "replicas"),
            ("queue.max_bytes", "max_bytes"),
        ] {
            let is_written = self.explicit(key).is_some();
            insert(&mut root, &["queue", "written", name], is_written.into());
        }
        if let Some(filter) = env.get("RUST_LOG").filter(|filter| !filter.is_empty()) {
            insert(&mut root, &["logging", "rust_log"], filter.into());
        }
        serde_json::from_value(root.into())
            .expect("the table of keys and the checked form agree, as the tests of both prove")
    }
}

/// Puts a value at a path of nested objects.
pub(crate) fn insert(
    root: &mut Map<String, serde_json::Value>,
    path: &[&str],
    value: serde_json::Value,
) {
    match path {
        [] => {}
        [name] => drop(root.insert((*name).to_owned(), value)),
        [name, rest @ ..] => {
            let inner = root.entry(*name).or_insert_with(|| json!({}));
            if let Some(inner) = inner.as_object_mut() {
                insert(inner, rest, value);
            }
        }
    }
}
