//! The manifest's command line as words, split as a POSIX shell would, without any expansion.

/// Most words of a command line.
const WORDS_MAX: usize = 256;

/// Splits `line` into words: blanks separate, `'…'` is literal, `"…"` knows `\"` and `\\`, a
/// backslash outside of quotes takes the next character as it is. Nothing is expanded; who wants a
/// shell writes `sh -c '…'`.
pub(crate) fn split(line: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            ' ' | '\t' => words.extend(word.take()),
            '\'' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next() {
                        Some('\'') => break,
                        Some(c) => word.push(c),
                        None => return Err("a ' is never closed".to_owned()),
                    }
                }
            }
            '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next() {
                        Some('"') => break,
                        Some('\\') => match chars.next() {
                            Some(c @ ('"' | '\\' | '$' | '`')) => word.push(c),
                            Some(c) => word.extend(['\\', c]),
                            None => return Err("a \" is never closed".to_owned()),
                        },
                        Some(c) => word.push(c),
                        None => return Err("a \" is never closed".to_owned()),
                    }
                }
            }
            '\\' => {
                let escaped = chars.next().ok_or("a \\ ends the line")?;
                word.get_or_insert_default().push(escaped);
            }
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    match words.first() {
        None => Err("the command is empty".to_owned()),
        Some(program) if program.is_empty() => Err("the program has no name".to_owned()),
        Some(_) if words.len() > WORDS_MAX => Err(format!("more than {WORDS_MAX} words")),
        Some(_) => Ok(words),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_as_a_shell_would() {
        for (line, words) in [
            ("python3 agent.py", vec!["python3", "agent.py"]),
            ("  a\t b  ", vec!["a", "b"]),
            (
                "sh -c 'echo \"$X\" | cat'",
                vec!["sh", "-c", "echo \"$X\" | cat"],
            ),
            (
                r#"a "b \"c\" \d" e\ f '' """#,
                vec!["a", "b \"c\" \\d", "e f", "", ""],
            ),
            ("a'b'\"c\"d", vec!["abcd"]),
            ("a $HOME *.py", vec!["a", "$HOME", "*.py"]),
        ] {
            assert_eq!(split(line).unwrap(), words, "{line}");
        }
        for bad in ["", "   ", "'a", "\"a", "\"a\\", "a\\", "'' x"] {
            assert!(split(bad).is_err(), "{bad:?} was accepted");
        }
        assert!(split(&"x ".repeat(WORDS_MAX + 1)).is_err());
    }
}
