//! Text as it may be shown: nothing in it acts, nothing in it hides.

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Deepest JSON that is set out in lines; deeper is shown as it came.
const JSON_BYTES_MAX: usize = 256 * 1024;

/// Makes control characters and those that turn the direction of writing visible.
pub fn visible(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' | '\t' => c,
            '\u{0}'..='\u{1f}' => char::from_u32(0x2400 + c as u32).unwrap_or('\u{fffd}'),
            '\u{7f}' => '\u{2421}',
            '\u{80}'..='\u{9f}'
            | '\u{200e}'
            | '\u{200f}'
            | '\u{202a}'..='\u{202e}'
            | '\u{2066}'..='\u{2069}' => '\u{fffd}',
            c => c,
        })
        .collect()
}

/// JSON in lines, other text as it is; both visible.
pub fn pretty(text: &str) -> String {
    let trimmed = text.trim_start();
    if text.len() <= JSON_BYTES_MAX
        && trimmed.starts_with(['{', '['])
        && let Ok(value) = serde_json::from_str::<serde_json::Value>(text)
        && let Ok(lines) = serde_json::to_string_pretty(&value)
    {
        return visible(&lines);
    }
    visible(text)
}

/// The first line, at most `max` characters.
pub fn brief(text: &str, max: usize) -> String {
    let line = text.trim().lines().next().unwrap_or_default();
    let mut brief: String = line.chars().take(max).collect();
    if brief.len() < text.trim().len() {
        brief.push('…');
    }
    visible(&brief)
}

/// The first digits of a hash or an id.
pub fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// A time in milliseconds since the Unix epoch, in UTC to the second, for people.
pub fn clock(ms: u64) -> String {
    let iso = iso(ms);
    iso.get(..19)
        .map(|text| text.replace('T', " "))
        .unwrap_or(iso)
}

/// The same as RFC 3339, for machines.
pub fn iso(ms: u64) -> String {
    i64::try_from(ms / 1000)
        .ok()
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
        .and_then(|time| time.format(&Rfc3339).ok())
        .unwrap_or_default()
}

/// A span of time.
pub fn span(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{:.1} s", ms as f64 / 1000.0),
        60_000..3_600_000 => format!("{} min {} s", ms / 60_000, ms / 1000 % 60),
        _ => format!("{} h {} min", ms / 3_600_000, ms / 60_000 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_acts_and_nothing_hides() {
        assert_eq!(
            visible("a\u{1b}[31mb\r\n\u{202e}c"),
            "a\u{241b}[31mb\u{240d}\n\u{fffd}c"
        );
        assert_eq!(pretty(r#"{"a":[1]}"#), "{\n  \"a\": [\n    1\n  ]\n}");
        assert_eq!(pretty("{not json"), "{not json");
        let deep = "[".repeat(100_000);
        assert_eq!(pretty(&deep), deep, "depth must not end the program");
        assert_eq!(brief("  one\ntwo", 10), "one…");
        assert_eq!(brief("one", 2), "on…");
    }

    #[test]
    fn times_are_told() {
        assert_eq!(clock(0), "1970-01-01 00:00:00");
        assert_eq!(iso(1_000), "1970-01-01T00:00:01Z");
        assert_eq!(clock(u64::MAX), "");
        assert_eq!(
            [5, 1_500, 61_000, 3_600_000].map(span),
            ["5 ms", "1.5 s", "1 min 1 s", "1 h 0 min"]
        );
    }
}
