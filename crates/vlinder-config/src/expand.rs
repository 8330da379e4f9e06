//! From what was written to a checked value: `{ file = "…" }`, `~`, `${NAME}`, relative paths.

use std::path::{Path, PathBuf};

use crate::Env;
use crate::elements::{Kind, Raw, Refusal, Value};
use crate::files;
use crate::keys::Key;
use crate::mistake::{Mistake, Origin};
use crate::secret::mask_url;
use crate::toml_file::Written;

/// Largest file that a value may be read from, in bytes.
const VALUE_FILE_BYTES_MAX: u64 = 64 * 1024;

/// The checked value of a setting.
pub(crate) fn check(written: &Written, env: &Env) -> Result<Value, Box<Mistake>> {
    let Written { key, raw, origin } = written;
    let base = base_dir(origin, env);
    let checked = read_and_expand(key, raw, env, &base).and_then(|raw| key.kind.check(&raw));
    match checked {
        Ok(Value::Text(path)) if key.kind == Kind::Path => {
            Ok(Value::Text(base.join(path).display().to_string()))
        }
        Ok(value) => Ok(value),
        Err(refusal) => {
            let mistake = Mistake::new(origin.clone(), key.path, refusal.expected);
            let mistake = mistake.written(raw, key.kind.is_secret());
            Err(Box::new(
                mistake.near(refusal.near.map(|near| mask_url(&near))),
            ))
        }
    }
}

/// Where a relative path begins: beside the file that holds it, else in the working directory.
fn base_dir(origin: &Origin, env: &Env) -> PathBuf {
    match origin {
        Origin::File { path, .. } | Origin::Live { path, .. } => env
            .working_dir()
            .join(path.parent().unwrap_or(Path::new("/"))),
        _ => env.working_dir().to_owned(),
    }
}

fn read_and_expand(key: &Key, raw: &Raw, env: &Env, base: &Path) -> Result<Raw, Refusal> {
    let refuse = |expected: String| Refusal {
        expected,
        near: None,
    };
    match raw {
        Raw::Table(items) if key.kind != Kind::Labels => {
            let (Some(Raw::Text(file)), 1) = (items.get("file"), items.len()) else {
                let expected = key.kind.expectation();
                return Err(refuse(format!(
                    "expected {expected}, or {{ file = \"PATH\" }}"
                )));
            };
            let path = base.join(path(file, env).map_err(refuse)?);
            match files::read(&path, VALUE_FILE_BYTES_MAX) {
                Ok(Some(text)) => Ok(Raw::Argument(
                    text.trim_end_matches(['\r', '\n']).to_owned(),
                )),
                Ok(None) => Err(refuse(format!("there is no file {}", path.display()))),
                Err(error) => Err(refuse(format!("cannot read {}: {error}", path.display()))),
            }
        }
        Raw::Text(text) if key.kind.expands() => {
            Ok(Raw::Text(value(key, text, env).map_err(refuse)?))
        }
        Raw::Argument(text) if key.kind.expands() => {
            Ok(Raw::Argument(value(key, text, env).map_err(refuse)?))
        }
        other => Ok(other.clone()),
    }
}

fn value(key: &Key, text: &str, env: &Env) -> Result<String, String> {
    if key.kind.is_secret() {
        variables(text, env)
    } else {
        path(text, env)
    }
}

/// `~`, `~/…` and `${NAME}` in a path.
pub(crate) fn path(text: &str, env: &Env) -> Result<String, String> {
    let expanded = variables(text, env)?;
    match text.strip_prefix('~') {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => {
            let home = env.home().ok_or("~ has no meaning: HOME is not set")?;
            // The tilde was the first character before the expansion and still is.
            Ok(format!("{}{}", home.display(), &expanded[1..]))
        }
        _ => Ok(expanded),
    }
}

/// `${NAME}` becomes the variable; `$${` stands for a literal `${`.
fn variables(text: &str, env: &Env) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        let (before, after) = (&rest[..at], &rest[at + 2..]);
        if let Some(before) = before.strip_suffix('$') {
            out.push_str(before);
            out.push_str("${");
            rest = after;
            continue;
        }
        out.push_str(before);
        let end = after
            .find('}')
            .ok_or("${ has no closing brace (a literal one is $${)")?;
        let name = &after[..end];
        out.push_str(
            env.get(name)
                .ok_or_else(|| format!("the variable {name} is not set"))?,
        );
        rest = &after[end + 1..];
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expansion() {
        let env = Env::bare("/home/ann", "h").with("X", "x1").with("T", "~/t");
        for (text, expected) in [
            ("~", Ok("/home/ann")),
            ("~/a", Ok("/home/ann/a")),
            ("~bob/a", Ok("~bob/a")),
            ("/a/~", Ok("/a/~")),
            ("${X}/${X}", Ok("x1/x1")),
            ("${T}", Ok("~/t")),
            ("~/${X}", Ok("/home/ann/x1")),
            ("a$b", Ok("a$b")),
            ("$${X}", Ok("${X}")),
            ("$${X}${X}", Ok("${X}x1")),
            ("${NOPE}", Err("the variable NOPE is not set")),
            ("${X", Err("${ has no closing brace (a literal one is $${)")),
        ] {
            assert_eq!(
                path(text, &env).as_deref().map_err(String::as_str),
                expected,
                "{text:?}"
            );
        }
    }
}
