//! Contents by path (interfaces.md §5): get, put, list, delete.

use crate::call::{Answer, Call, Failure, Refusal, parse};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use vlinder_core::BODY_BYTES_MAX;
use vlinder_core::merkle::keys::{self, Space, USER_KEY_BYTES_MAX};
use vlinder_core::merkle::{self, Chunks};

/// Largest content, in bytes: what one message may carry.
pub const CONTENT_BYTES_MAX: u64 = BODY_BYTES_MAX;
/// Most bytes of paths in one list. A longer one is refused rather than cut, so that nobody takes
/// a part for the whole.
pub const LIST_BYTES_MAX: usize = 16 * 1024 * 1024;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ByPath {
    path: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ByPrefix {
    /// Absent means everything.
    #[serde(default)]
    path: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Put {
    path: String,
    content: Option<String>,
    content_base64: Option<String>,
}

type Outcome<C> = Result<Answer, Failure<<C as Chunks>::Error>>;

pub(crate) fn get<C: Chunks>(chunks: &C, call: &Call) -> Outcome<C> {
    let ByPath { path } = parse(call)?;
    let key = key(call, &path)?;
    let content = merkle::get(chunks, call.state, &key)?;
    let found = content.is_some();
    let body = content.unwrap_or_default();
    let is_text = std::str::from_utf8(&body).is_ok();
    let content_type = if is_text {
        "text/plain; charset=utf-8"
    } else {
        "application/octet-stream"
    };
    Ok(Answer {
        http: 200,
        content_type,
        body,
        state: call.state,
        found: Some(found),
    })
}

pub(crate) fn put<C: Chunks>(chunks: &mut C, call: &Call) -> Outcome<C> {
    let put: Put = parse(call)?;
    let key = key(call, &put.path)?;
    let content = match (put.content, put.content_base64) {
        (Some(text), None) => text.into_bytes(),
        (None, Some(encoded)) => STANDARD.decode(encoded).map_err(|error| {
            Refusal::new(
                "bad_content",
                format!("content_base64 is not base64: {error}"),
            )
        })?,
        _ => {
            let message = "give the content either as content or as content_base64";
            return Err(Refusal::new("bad_content", message).into());
        }
    };
    if content.len() as u64 > CONTENT_BYTES_MAX {
        let message = format!(
            "content has {} bytes: at most {CONTENT_BYTES_MAX} are kept",
            content.len()
        );
        return Err(Refusal::too_large(message).into());
    }
    let state = merkle::put(chunks, call.state, &key, &content)?;
    Ok(Answer::moved(call, Some(state)))
}

pub(crate) fn list<C: Chunks>(chunks: &C, call: &Call) -> Outcome<C> {
    let ByPrefix { path } = parse(call)?;
    if !path.is_empty() {
        check_path(&path)?;
    }
    let prefix = keys::key(Space::Kv, call.store, path.as_bytes());
    let mut paths = Vec::new();
    let mut bytes = 0;
    for entry in merkle::scan(chunks, call.state, &prefix)? {
        let (key, _) = entry?;
        let path = keys::user_key(Space::Kv, call.store, &key).unwrap_or_default();
        bytes += path.len();
        if bytes > LIST_BYTES_MAX {
            let message =
                format!("the paths take more than {LIST_BYTES_MAX} bytes: list a longer prefix");
            return Err(Refusal::too_large(message).into());
        }
        // Paths come from JSON strings, so this changes none of them.
        paths.push(String::from_utf8_lossy(path).into_owned());
    }
    Ok(Answer::json(call, &paths))
}

pub(crate) fn delete<C: Chunks>(chunks: &mut C, call: &Call) -> Outcome<C> {
    let ByPath { path } = parse(call)?;
    let key = key(call, &path)?;
    let state = merkle::delete(chunks, call.state, &key)?;
    Ok(Answer::moved(call, state))
}

fn key(call: &Call, path: &str) -> Result<Vec<u8>, Refusal> {
    if path.is_empty() {
        return Err(Refusal::new("bad_path", "path is empty"));
    }
    check_path(path)?;
    Ok(keys::key(Space::Kv, call.store, path.as_bytes()))
}

fn check_path(path: &str) -> Result<(), Refusal> {
    if path.len() > USER_KEY_BYTES_MAX {
        let message = format!(
            "path has {} bytes: at most {USER_KEY_BYTES_MAX} are allowed",
            path.len()
        );
        return Err(Refusal::new("bad_path", message));
    }
    if path.chars().any(char::is_control) {
        return Err(Refusal::new(
            "bad_path",
            "path contains a control character",
        ));
    }
    Ok(())
}
