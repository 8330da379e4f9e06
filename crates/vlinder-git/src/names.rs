//! Names of refs, directories and files. What agents and clients chose is never taken as it is.

/// Longest part of a directory's name that comes from the record, in bytes.
const WORD_BYTES_MAX: usize = 32;
/// Longest name of a session that is used for its refs, in bytes.
const REF_BYTES_MAX: usize = 100;

/// Whether a session's name can stand in a ref as it is: one component, plain to type in a shell.
pub(crate) fn is_ref_safe(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    !name.is_empty()
        && name.len() <= REF_BYTES_MAX
        && name.bytes().all(plain)
        && name.as_bytes()[0].is_ascii_alphanumeric()
        && !name.contains("..")
        && !name.ends_with('.')
        && !name.ends_with(".lock")
        && name != "HEAD"
}

/// A word of the record as part of a directory's name.
pub(crate) fn word(text: &str) -> String {
    let mut word: String = text
        .bytes()
        .take(WORD_BYTES_MAX)
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => byte as char,
            _ => '-',
        })
        .collect();
    if word.is_empty() {
        word.push('-');
    }
    word
}

/// The path of turn `number` (from 1) below `turns/`. No directory on it has more than some 300 entries,
/// however long the session is, and paths sort as the turns do.
pub(crate) fn turn_path(number: u64) -> Vec<String> {
    match number {
        0..100 => vec![format!("{number:04}")],
        100..10_000 => vec![format!("{:02}xx", number / 100), format!("{number:04}")],
        _ => vec![
            format!("n{:03}xxxx", number / 10_000),
            format!("{:05}xx", number / 100),
            format!("{number:07}"),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_of_sessions_are_not_used() {
        for bad in [
            "",
            "..",
            "a..b",
            "a/b",
            "a b",
            "-x",
            ".x",
            "x.lock",
            "x.",
            "a\0",
            "a\nb",
            "ü",
            "a~1",
            "a^",
            "a:b",
            "a?b",
            "@{",
            "HEAD",
            &"x".repeat(101),
        ] {
            assert!(!is_ref_safe(bad), "{bad:?}");
        }
        for good in ["demo", "s-1", "v1.2_x"] {
            assert!(is_ref_safe(good), "{good}");
        }
        assert_eq!(word("../../etc\0\n"), "------etc--");
        assert_eq!(word(""), "-");
    }

    #[test]
    fn paths_of_turns_sort_as_the_turns_do() {
        let numbers = [1, 2, 99, 100, 101, 999, 1000, 9999, 10_000, 12_345, 123_456];
        let paths: Vec<String> = numbers.map(|number| turn_path(number).join("/")).into();
        assert_eq!(paths[0], "0001");
        assert_eq!(paths[3], "01xx/0100");
        let mut sorted = paths.clone();
        sorted.sort();
        assert_eq!(sorted, paths);
    }
}
