//! The documented sample, `config/vlinderd.toml`: every key with its meaning and its default.

use crate::elements::Raw;
use crate::keys::{KEYS, Key, Standard};

/// Widest line of a comment, in characters.
const LINE_CHARS_MAX: usize = 100;

const HEAD: &str = "\
# Every key of vlinderd's configuration. Copy this file to ~/.vlinder/config.toml (or name it by
# --config) and remove the # before a key to change it: as it stands it changes nothing.
#
# A commented key shows its default, unless its comment gives another one.
# Defaults < this file < environment < flags < live changes (`vlinder worker scale`).
# The variable of a key is VLINDER_ and its path in capitals, joined by _, as in
# VLINDER_QUEUE_NATS_URL; worker counts also answer to VLINDER_WORKERS_INFERENCE_OLLAMA and so on.
# ~ and ${NAME} expand in paths and secrets ($${ is a literal ${); a value { file = \"PATH\" } is
# read from that file.
#
#   vlinderd config check     every mistake at once
#   vlinderd config show      the effective configuration; --origin says where each value is from
";

/// The text of `config/vlinderd.toml`.
pub fn sample_toml() -> String {
    let mut out = HEAD.to_owned();
    let mut section = "";
    for key in KEYS {
        if key.section() != section {
            section = key.section();
            out.push_str(&format!("\n[{section}]\n"));
        }
        comment(&mut out, &about(key));
        out.push_str(&format!("# {} = {}\n", key.name(), example(key)));
    }
    out
}

fn about(key: &Key) -> String {
    match key.standard {
        Standard::Is(_) => key.about.to_owned(),
        Standard::Follows { rule, .. } => format!("{} Default: {rule}.", key.about),
        Standard::Unset { .. } => format!("{} Default: not set.", key.about),
    }
}

fn example(key: &Key) -> String {
    let text = match key.standard {
        Standard::Is(text) => text,
        Standard::Follows { example, .. } | Standard::Unset { example } => example,
    };
    if text.starts_with("{ file") {
        return text.to_owned();
    }
    if key.kind.expands() {
        return toml::Value::String(text.to_owned()).to_string();
    }
    match key.kind.check(&Raw::Argument(text.to_owned())) {
        Ok(value) => key.kind.to_toml(&value).to_string(),
        Err(refusal) => panic!(
            "the example of {} is our own and {}",
            key.path, refusal.expected
        ),
    }
}

/// Appends `text` as comment lines of bounded width.
fn comment(out: &mut String, text: &str) {
    let mut line = String::from("#");
    for word in text.split_whitespace() {
        if line.len() + 1 + word.len() > LINE_CHARS_MAX {
            out.push_str(&line);
            out.push('\n');
            line = String::from("#");
        }
        line.push(' ');
        line.push_str(word);
    }
    out.push_str(&line);
    out.push('\n');
}
