//! The effective configuration, for people and for scripts.

use serde_json::{Map, json};

use crate::Env;
use crate::elements::{Kind, Value};
use crate::keys::{Key, Standard};
use crate::layers::Loaded;
use crate::secret::{MASK, mask_url};
use crate::settings::{Setting, insert};

impl Loaded {
    /// Every key with its value as TOML that loads again (unless masked). `origins` adds where
    /// each value is from; `masked` replaces secrets by `***`.
    pub fn effective_toml(&self, origins: bool, masked: bool) -> String {
        let mut out = String::new();
        let mut section = "";
        for (key, setting) in self.settings.in_order() {
            if key.section() != section {
                section = key.section();
                let gap = if out.is_empty() { "" } else { "\n" };
                out.push_str(&format!("{gap}[{section}]\n"));
            }
            match setting {
                Some(setting) => {
                    let value = key.kind.to_toml(&shown(key, setting, masked));
                    out.push_str(&format!("{} = {value}", key.name()));
                    if origins {
                        out.push_str(&format!("  # {}", setting.origin));
                    }
                    out.push('\n');
                }
                None => out.push_str(&format!("# {} is not set{}\n", key.name(), unset_note(key))),
            }
        }
        if let Some(filter) = &self.config.logging.rust_log {
            out.push_str(&format!(
                "\n# RUST_LOG={filter} replaces logging.level on stderr\n"
            ));
        }
        out
    }

    /// Every key with its value as JSON, nested as in the file; sizes in bytes, lists as arrays,
    /// keys without a value as null. `origins` makes each leaf `{value, origin}`.
    pub fn effective_json(&self, origins: bool, masked: bool) -> serde_json::Value {
        let mut root = Map::new();
        for (key, setting) in self.settings.in_order() {
            let value = setting.map(|setting| shown(key, setting, masked).to_json());
            let leaf = match origins {
                true => json!({
                    "value": value,
                    "origin": setting.map(|setting| setting.origin.to_string()),
                }),
                false => json!(value),
            };
            insert(&mut root, &key.path.split('.').collect::<Vec<_>>(), leaf);
        }
        root.into()
    }
}

fn unset_note(key: &Key) -> String {
    match key.standard {
        Standard::Follows { rule, .. } => format!(": {rule}"),
        _ => String::new(),
    }
}

fn shown(key: &Key, setting: &Setting, masked: bool) -> Value {
    match (&setting.value, masked) {
        (_, true) if key.kind.is_secret() => Value::Text(MASK.into()),
        (Value::List(urls), true) if key.kind == Kind::NatsUrls => {
            Value::List(urls.iter().map(|url| mask_url(url)).collect())
        }
        (value, _) => value.clone(),
    }
}

/// The configuration of a machine on which nobody configured anything: for tests and tools that
/// need one. The node is called `localhost`.
impl Default for crate::Config {
    fn default() -> Self {
        let mut settings = crate::settings::Settings::default();
        let env = Env::bare("/", "localhost");
        crate::derive::derive(&mut settings, &env);
        settings.config(&env)
    }
}
