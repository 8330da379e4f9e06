//! How things look to people: safe text, times, sizes, states.

use time::OffsetDateTime;
use time::macros::format_description;

/// Whether a character could move the cursor, change colours or turn the direction of the text:
/// controls (C0, DEL, C1) and the bidirectional overrides.
fn acts_on_a_terminal(c: char) -> bool {
    c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Text that somebody else wrote, for a terminal: characters that would act on it are shown as
/// escapes; line ends and tabs stay.
pub fn safe(text: &str) -> String {
    escape(text, |c| matches!(c, '\n' | '\t'))
}

/// The same on one line: line ends and tabs are shown as escapes, too.
pub fn safe_line(text: &str) -> String {
    escape(text, |_| false)
}

fn escape(text: &str, keep: impl Fn(char) -> bool) -> String {
    if !text.chars().any(acts_on_a_terminal) {
        return text.to_owned();
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if acts_on_a_terminal(c) && !keep(c) {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// At most `max` characters of the first line, with an ellipsis where something was left out.
pub fn brief(text: &str, max: usize) -> String {
    let text = text.trim();
    let first = text.lines().next().unwrap_or_default();
    let cut: String = first.chars().take(max).collect();
    if cut.len() == text.len() {
        return cut;
    }
    let mut shorter: String = cut.chars().take(max.saturating_sub(1)).collect();
    shorter.push('…');
    shorter
}

/// A span of time: `840ms`, `3.2s`, `4m 05s`, `3h 12m`, `5d 2h`.
pub fn span(ms: u64) -> String {
    let (s, m, h) = (ms / 1000, ms / 60_000, ms / 3_600_000);
    match ms {
        0..1000 => format!("{ms}ms"),
        1000..10_000 => format!("{}.{}s", s, ms % 1000 / 100),
        10_000..60_000 => format!("{s}s"),
        60_000..3_600_000 => format!("{m}m {:02}s", s % 60),
        3_600_000..86_400_000 => format!("{h}h {:02}m", m % 60),
        _ => format!("{}d {}h", h / 24, h % 24),
    }
}

/// How long ago something was: `3m ago`. `now` or later is `now`; 0 is never.
pub fn ago(then_ms: u64, now_ms: u64) -> String {
    if then_ms == 0 {
        return "-".to_owned();
    }
    let ms = now_ms.saturating_sub(then_ms);
    let (n, unit) = match ms {
        0..1000 => return "now".to_owned(),
        1000..60_000 => (ms / 1000, "s"),
        60_000..3_600_000 => (ms / 60_000, "m"),
        3_600_000..86_400_000 => (ms / 3_600_000, "h"),
        _ => (ms / 86_400_000, "d"),
    };
    format!("{n}{unit} ago")
}

/// Milliseconds since the Unix epoch as `2026-03-01T12:00:00.123Z`.
pub fn timestamp(ms: u64) -> String {
    let format =
        format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000)
        .ok()
        .and_then(|time| time.format(&format).ok())
        .unwrap_or_else(|| ms.to_string())
}

/// The clock of this machine, in milliseconds since the Unix epoch.
pub fn now_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

/// A size: `512 B`, `4.2 KiB`, `1.5 GiB`; 0 is unknown.
pub fn size(bytes: u64) -> String {
    if bytes == 0 {
        return "-".to_owned();
    }
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return match unit {
                "B" => format!("{bytes} B"),
                _ => format!("{value:.1} {unit}"),
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// The beginning of a hash or an id that is enough to name it.
pub fn short(id: &str, digits: usize) -> &str {
    id.get(..digits).unwrap_or(id)
}

/// A number of things: `1 turn`, `2 turns`.
pub fn count(n: u64, thing: &str) -> String {
    match n {
        1 => format!("1 {thing}"),
        _ => format!("{n} {thing}s"),
    }
}

/// The text, or a dash for none.
pub fn or_dash(text: &str) -> &str {
    match text.is_empty() {
        true => "-",
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_acts_on_the_terminal() {
        assert_eq!(safe("plain äöü 日本\n\tx"), "plain äöü 日本\n\tx");
        assert_eq!(safe("a\u{1b}[31mred\u{7}"), "a\\u{1b}[31mred\\u{7}");
        assert_eq!(safe("one\rtwo\u{9b}2J"), "one\\rtwo\\u{9b}2J");
        assert_eq!(safe("abc\u{202e}txt"), "abc\\u{202e}txt");
        assert_eq!(safe_line("a\nb\tc"), "a\\nb\\tc");
    }

    #[test]
    fn times_and_sizes() {
        for (ms, shown) in [
            (0, "0ms"),
            (999, "999ms"),
            (3_240, "3.2s"),
            (59_999, "59s"),
            (245_000, "4m 05s"),
            (11_520_000, "3h 12m"),
            (439_200_000, "5d 2h"),
        ] {
            assert_eq!(span(ms), shown);
        }
        assert_eq!(ago(1_000, 181_000), "3m ago");
        assert_eq!(ago(5_000, 1_000), "now");
        assert_eq!(ago(0, 1_000), "-");
        assert_eq!(timestamp(1_772_366_400_123), "2026-03-01T12:00:00.123Z");
        assert_eq!(timestamp(u64::MAX), u64::MAX.to_string());
        assert_eq!(
            [size(0), size(12), size(4300), size(1 << 31)],
            ["-", "12 B", "4.2 KiB", "2.0 GiB"]
        );
    }

    #[test]
    fn one_is_not_many() {
        let shown = [0, 1, 2].map(|n| count(n, "turn"));
        assert_eq!(shown, ["0 turns", "1 turn", "2 turns"]);
    }

    #[test]
    fn brief_text() {
        assert_eq!(brief(" one\ntwo ", 10), "one…");
        assert_eq!(brief("abcdef", 6), "abcdef");
        assert_eq!(brief("abcdefg", 6), "abcde…");
        assert_eq!(brief("", 6), "");
        assert_eq!(short("0123456789", 4), "0123");
        assert_eq!(short("01", 4), "01");
    }
}
