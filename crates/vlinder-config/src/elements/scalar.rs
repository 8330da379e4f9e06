//! Numbers, durations, listening addresses, words and labels.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use super::{LIST_LEN_MAX, Raw, Value};

/// Longest secret, in bytes: an HTTP header still takes it.
pub(super) const SECRET_BYTES_MAX: usize = 8 * 1024;

/// Longest free text, in bytes.
pub(super) const TEXT_BYTES_MAX: usize = 1024;

/// Longest word of a list, label key or label value, in bytes.
const WORD_BYTES_MAX: usize = 63;

pub(super) fn number(text: &str, min: u64, max: u64) -> Option<u64> {
    // `u64::from_str` also takes a leading plus, which nobody writes on purpose.
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    digits
        .then(|| text.parse().ok())
        .flatten()
        .filter(|n| (min..=max).contains(n))
}

/// The canonical text of a duration within bounds.
pub(super) fn span(text: &str, min_ms: u64, max_ms: u64) -> Option<String> {
    let span = humantime::parse_duration(text).ok()?;
    let bounds = Duration::from_millis(min_ms)..=Duration::from_millis(max_ms);
    bounds
        .contains(&span)
        .then(|| humantime::format_duration(span).to_string())
}

pub(super) fn format_span(ms: u64) -> String {
    humantime::format_duration(Duration::from_millis(ms)).to_string()
}

/// An IP address; `localhost` stands for 127.0.0.1.
pub(super) fn listen(text: &str) -> Option<String> {
    if text == "localhost" {
        return Some(Ipv4Addr::LOCALHOST.to_string());
    }
    text.parse::<IpAddr>()
        .ok()
        .map(|address| address.to_string())
}

fn is_word(text: &str) -> bool {
    let ok = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    text.len() <= WORD_BYTES_MAX && text.bytes().all(ok)
}

pub(super) fn words(items: &[Raw]) -> Option<Value> {
    let words = items.iter().map(|item| match item {
        Raw::Text(word) if !word.is_empty() && is_word(word) => Some(word.clone()),
        _ => None,
    });
    let words: Vec<String> = words.collect::<Option<_>>()?;
    (words.len() <= LIST_LEN_MAX).then_some(Value::List(words))
}

pub(super) fn words_of_text(text: &str) -> Option<Value> {
    let parts = text
        .split(',')
        .map(str::trim)
        .filter(|_| !text.trim().is_empty());
    let raw: Vec<Raw> = parts.map(|word| Raw::Text(word.to_owned())).collect();
    words(&raw)
}

pub(super) fn labels(pairs: Vec<(String, String)>) -> Option<Value> {
    let key_ok = |key: &str| !key.is_empty() && is_word(&key.replace('/', "."));
    if pairs.len() > LIST_LEN_MAX || !pairs.iter().all(|(k, v)| key_ok(k) && is_word(v)) {
        return None;
    }
    let count = pairs.len();
    let map: BTreeMap<String, String> = pairs.into_iter().collect();
    // The same key twice with `a=1,a=2`: nothing is ignored in silence.
    (map.len() == count).then_some(Value::Map(map))
}

pub(super) fn labels_of_text(text: &str) -> Option<Value> {
    let parts = text.split(',').filter(|_| !text.trim().is_empty());
    let pairs = parts.map(|part| {
        let (key, value) = part.split_once('=')?;
        Some((key.trim().to_owned(), value.trim().to_owned()))
    });
    labels(pairs.collect::<Option<Vec<_>>>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        for (text, expected) in [
            ("0", Some(0)),
            ("64", Some(64)),
            ("65", None),
            ("-1", None),
            ("+1", None),
            ("", None),
            ("1.0", None),
            ("99999999999999999999999", None),
        ] {
            assert_eq!(number(text, 0, 64), expected, "{text:?}");
        }
    }

    #[test]
    fn durations() {
        for (text, expected) in [
            ("30s", Some("30s")),
            ("90s", Some("1m 30s")),
            ("100ms", Some("100ms")),
            ("5", None),
            ("2h", None),
            ("1ms", None),
            ("soon", None),
        ] {
            assert_eq!(span(text, 10, 3_600_000).as_deref(), expected, "{text:?}");
        }
    }

    #[test]
    fn label_texts() {
        let one = BTreeMap::from([("gpu".to_owned(), "yes".to_owned())]);
        assert_eq!(labels_of_text("gpu=yes"), Some(Value::Map(one)));
        assert_eq!(labels_of_text(""), Some(Value::Map(BTreeMap::new())));
        for bad in ["gpu", "=x", "a=1,a=2", "a=b c", "a=1,", "ä=1"] {
            assert_eq!(labels_of_text(bad), None, "{bad:?}");
        }
        assert_eq!(
            words_of_text(" a, b"),
            Some(Value::List(vec!["a".into(), "b".into()]))
        );
        assert_eq!(words_of_text("a,,b"), None);
    }
}
