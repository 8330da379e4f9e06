//! `.vlinderignore`: which files of an agent's directory stay behind.
//!
//! One pattern a line; blank lines and lines that begin with `#` say nothing. `*` and `?` match
//! within a name, `**` across names. A pattern with a `/` in it (other than at its end) is meant from
//! the top, any other at every depth. One that ends in `/` means directories only. `!` takes an
//! earlier match back; what lies in a directory that is left out stays out. The last match decides.

/// Names that are left out wherever they are.
const ALWAYS: [&str; 2] = [".git", "__pycache__"];
/// Most patterns of one file.
const PATTERNS_MAX: usize = 1000;
/// Longest pattern, in bytes.
const PATTERN_BYTES_MAX: usize = 1024;

struct Pattern {
    glob: Vec<u8>,
    from_top: bool,
    directories_only: bool,
    take_back: bool,
}

/// The patterns of one directory.
#[derive(Default)]
pub struct Ignore(Vec<Pattern>);

impl Ignore {
    /// Reads the text of a `.vlinderignore`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut patterns = Vec::new();
        for line in text.lines() {
            let line = line.trim_end();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if patterns.len() == PATTERNS_MAX || line.len() > PATTERN_BYTES_MAX {
                return Err(format!(
                    "expected at most {PATTERNS_MAX} patterns of {PATTERN_BYTES_MAX} bytes each"
                ));
            }
            let (take_back, line) = match line.strip_prefix('!') {
                Some(rest) => (true, rest),
                None => (false, line),
            };
            let (directories_only, line) = match line.strip_suffix('/') {
                Some(rest) => (true, rest),
                None => (false, line),
            };
            let from_top = line.contains('/');
            let glob = line.strip_prefix('/').unwrap_or(line).as_bytes().to_vec();
            if glob.is_empty() {
                return Err(format!("the pattern {line:?} names nothing"));
            }
            patterns.push(Pattern {
                glob,
                from_top,
                directories_only,
                take_back,
            });
        }
        Ok(Self(patterns))
    }

    /// Whether a path (from the top, names separated by `/`) stays behind.
    pub fn leaves_out(&self, path: &[u8], is_directory: bool) -> bool {
        let name = path.rsplit(|b| *b == b'/').next().unwrap_or(path);
        if ALWAYS.iter().any(|always| always.as_bytes() == name) {
            return true;
        }
        let fits = |pattern: &&Pattern| {
            let whole = if pattern.from_top { path } else { name };
            (is_directory || !pattern.directories_only) && matches(&pattern.glob, whole)
        };
        let last = self.0.iter().rev().find(fits);
        last.is_some_and(|pattern| !pattern.take_back)
    }
}

/// Whether a glob matches the whole of a text. Its time is at most the product of both lengths for
/// each `**`: one star at a time is tried longer, an earlier one of its kind never again.
fn matches(glob: &[u8], text: &[u8]) -> bool {
    // reachable[j]: the pattern so far matches the first j bytes of the text.
    let mut reachable = vec![false; text.len() + 1];
    reachable[0] = true;
    let mut rest = glob;
    while let Some((&symbol, tail)) = rest.split_first() {
        let double = symbol == b'*' && tail.first() == Some(&b'*');
        let mut next = vec![false; text.len() + 1];
        for at in 0..=text.len() {
            next[at] = match symbol {
                b'*' => {
                    reachable[at] || (at > 0 && next[at - 1] && (double || text[at - 1] != b'/'))
                }
                b'?' => at > 0 && reachable[at - 1] && text[at - 1] != b'/',
                literal => at > 0 && reachable[at - 1] && text[at - 1] == literal,
            };
        }
        // `**/` also matches no directory at all.
        if double && tail.get(1) == Some(&b'/') {
            let mut after = vec![false; text.len() + 1];
            for at in 0..=text.len() {
                after[at] = reachable[at] || (at > 0 && next[at - 1] && text[at - 1] == b'/');
            }
            next = after;
            rest = &tail[2..];
        } else {
            rest = if double { &tail[1..] } else { tail };
        }
        reachable = next;
    }
    reachable[text.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs() {
        for (glob, text, fits) in [
            ("*.log", "a.log", true),
            ("*.log", "a/b.log", false),
            ("a?c", "abc", true),
            ("a?c", "a/c", false),
            ("**", "a/b/c", true),
            ("**/x", "x", true),
            ("**/x", "a/b/x", true),
            ("**/x", "ax", false),
            ("a/**/z", "a/z", true),
            ("a/**/z", "a/b/c/z", true),
            ("a/**", "a/b/c", true),
            ("", "", true),
            ("a", "", false),
            ("*", "", true),
        ] {
            assert_eq!(
                matches(glob.as_bytes(), text.as_bytes()),
                fits,
                "{glob} {text}"
            );
        }
    }

    #[test]
    fn a_nasty_pattern_is_quick() {
        let glob = "*a".repeat(500);
        let text = "a".repeat(4000) + "b";
        assert!(!matches(glob.as_bytes(), text.as_bytes()));
    }

    #[test]
    fn patterns() {
        let ignore = Ignore::parse("# mine\n\n*.log\n!keep.log\n/top\ndata/\nsub/x.txt\n").unwrap();
        for (path, is_directory, out) in [
            ("a.log", false, true),
            ("deep/er/a.log", false, true),
            ("keep.log", false, false),
            ("top", false, true),
            ("deep/top", false, false),
            ("data", true, true),
            ("data", false, false),
            ("deep/data", true, true),
            ("sub/x.txt", false, true),
            ("deep/sub/x.txt", false, false),
            (".git", true, true),
            ("deep/__pycache__", true, true),
            (".gitignore", false, false),
            (".venv", true, false),
            ("target", true, false),
        ] {
            assert_eq!(
                ignore.leaves_out(path.as_bytes(), is_directory),
                out,
                "{path}"
            );
        }
        assert!(Ignore::parse("/").is_err());
        assert!(Ignore::parse(&"x\n".repeat(PATTERNS_MAX + 1)).is_err());
    }
}
