//! Text for people: pretty JSON, subjects and bodies of commits.

use serde::de::IgnoredAny;

/// Longest subject line of a commit, in characters.
const SUBJECT_CHARS_MAX: usize = 72;
/// Longest excerpt of a reply in a commit, in characters and lines.
const EXCERPT_MAX: (usize, usize) = (2000, 30);
/// How much larger than the original pretty JSON may get: deep nesting is mostly blanks.
const GROWTH_MAX: usize = 4;

/// `bytes` as indented JSON, with every number, string and order as it is; `None` when it is no JSON object
/// or array, or nested so deeply that indenting makes it worse.
pub(crate) fn pretty(bytes: &[u8]) -> Option<Vec<u8>> {
    let first = bytes.iter().find(|byte| !byte.is_ascii_whitespace())?;
    if !matches!(first, b'{' | b'[') || serde_json::from_slice::<IgnoredAny>(bytes).is_err() {
        return None;
    }
    let limit = bytes.len().saturating_mul(GROWTH_MAX).saturating_add(4096);
    let mut out = Vec::with_capacity(bytes.len() * 2);
    let (mut depth, mut in_string, mut escaped, mut opened) = (0usize, false, false, false);
    for &byte in bytes {
        if out.len() > limit {
            return None;
        }
        if in_string {
            out.push(byte);
            in_string = escaped || byte != b'"';
            escaped = !escaped && byte == b'\\';
            continue;
        }
        if byte.is_ascii_whitespace() {
            continue;
        }
        let closes = matches!(byte, b'}' | b']');
        if closes {
            depth = depth.saturating_sub(1);
        }
        if opened != closes {
            // The first element after a bracket, or a bracket after the last one.
            line(&mut out, depth);
        }
        opened = false;
        match byte {
            b'{' | b'[' => {
                depth += 1;
                opened = true;
                out.push(byte);
            }
            b',' => {
                out.push(byte);
                line(&mut out, depth);
            }
            b':' => out.extend_from_slice(b": "),
            _ => {
                in_string = byte == b'"';
                out.push(byte);
            }
        }
    }
    out.push(b'\n');
    Some(out)
}

fn line(out: &mut Vec<u8>, depth: usize) {
    out.push(b'\n');
    out.resize(out.len() + 2 * depth, b' ');
}

/// The first line of `input` that says something, shortened.
pub(crate) fn subject(input: &[u8]) -> String {
    let start = &input[..input.len().min(4096)];
    let text = clean(&String::from_utf8_lossy(start));
    let first = text.lines().map(str::trim).find(|line| !line.is_empty());
    match first {
        Some(first) => shorten(first, SUBJECT_CHARS_MAX),
        None => "(no input)".to_owned(),
    }
}

/// The beginning of a reply.
pub(crate) fn excerpt(output: &[u8]) -> String {
    let start = &output[..output.len().min(4 * EXCERPT_MAX.0)];
    let text = clean(&String::from_utf8_lossy(start));
    let lines: Vec<&str> = text
        .lines()
        .take(EXCERPT_MAX.1)
        .map(str::trim_end)
        .collect();
    let mut short = shorten(lines.join("\n").trim(), EXCERPT_MAX.0);
    if start.len() < output.len() || text.lines().count() > EXCERPT_MAX.1 {
        short.push_str("\n…");
    }
    short
}

/// Without what could steer a terminal, or what git does not take in a message.
fn clean(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' => '\n',
            '\t' => ' ',
            c if c.is_control() => '\u{fffd}',
            c => c,
        })
        .collect()
}

fn shorten(text: &str, chars_max: usize) -> String {
    if text.chars().count() <= chars_max {
        return text.to_owned();
    }
    let kept: String = text.chars().take(chars_max - 1).collect();
    format!("{}…", kept.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_indented_and_otherwise_as_it_was() {
        let text =
            br#"{"b":1.0,"a":[1,{"x":"a,\"{b"}],"e":{},"f":[], "big":12345678901234567890123}"#;
        let out = String::from_utf8(pretty(text).unwrap()).unwrap();
        let expected = "{\n  \"b\": 1.0,\n  \"a\": [\n    1,\n    {\n      \"x\": \"a,\\\"{b\"\n    }\n  ],\n  \"e\": {},\n  \"f\": [],\n  \"big\": 12345678901234567890123\n}\n";
        assert_eq!(out, expected);
        assert_eq!(pretty(b"{}"), Some(b"{}\n".to_vec()));
        let quoted = br#"["\\"]"#;
        assert_eq!(pretty(quoted), Some(b"[\n  \"\\\\\"\n]\n".to_vec()));
        for not in [
            &b"hello"[..],
            b"{",
            b"",
            b"1",
            b"\xff",
            "[".repeat(5000).as_bytes(),
        ] {
            assert_eq!(pretty(not), None);
        }
        let deep = format!(
            "{}{}{}",
            "[".repeat(100),
            "0,".repeat(9999) + "0",
            "]".repeat(100)
        );
        assert_eq!(pretty(deep.as_bytes()), None);
    }

    #[test]
    fn messages_carry_nothing_that_steers_a_terminal() {
        assert_eq!(
            subject(b"\n\n  hi \x1b[31mthere\0\nmore"),
            "hi \u{fffd}[31mthere\u{fffd}"
        );
        assert_eq!(subject(b""), "(no input)");
        assert_eq!(subject("é".repeat(100).as_bytes()).chars().count(), 72);
        assert!(excerpt(&vec![b'x'; 100_000]).len() < 2100);
    }
}
