//! Subject filters with the wildcards of NATS (`*` = one token, `>` = one or more at the end), and an
//! index that finds the filters that match a subject without looking at the others.

use crate::error::Error;
use std::collections::HashMap;

/// Longest subject or filter in bytes. Ours stay below 400; longer ones are a mistake or an attack.
pub(super) const SUBJECT_BYTES_MAX: usize = 1024;

/// A checked filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Filter {
    text: Box<str>,
    /// Length of the literal tokens before the first wildcard, without the dot after them.
    prefix_len: usize,
    /// How many tokens these are.
    prefix_tokens: usize,
}

impl Filter {
    /// Checks a filter.
    pub(super) fn parse(text: &str) -> Result<Self, Error> {
        check_tokens(text)?;
        let (mut prefix_len, mut prefix_tokens, mut at) = (0, 0, 0);
        let mut wild = false;
        for token in text.split('.') {
            if token == ">" && at + 1 != text.len() {
                return Err(refused(text, "'>' is only possible at the end"));
            }
            wild |= matches!(token, "*" | ">");
            if !wild {
                prefix_len = at + token.len();
                prefix_tokens += 1;
            }
            at += token.len() + 1;
        }
        Ok(Self {
            text: text.into(),
            prefix_len,
            prefix_tokens,
        })
    }

    /// The filter as it was written.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// The subject, if the filter has no wildcard.
    pub(super) fn exact(&self) -> Option<&str> {
        (self.prefix_len == self.text.len()).then_some(&self.text)
    }

    /// The literal tokens before the first wildcard.
    pub(super) fn prefix(&self) -> &str {
        &self.text[..self.prefix_len]
    }

    /// Whether a subject matches.
    pub(super) fn matches(&self, subject: &str) -> bool {
        if self.exact().is_some() {
            return *self.text == *subject;
        }
        if !subject.starts_with(self.prefix()) {
            return false;
        }
        let mut tokens = subject.split('.');
        for wanted in self.text.split('.') {
            match (wanted, tokens.next()) {
                (">", Some(_)) => return true,
                ("*", Some(_)) => {}
                (literal, Some(token)) if literal == token => {}
                _ => return false,
            }
        }
        tokens.next().is_none()
    }
}

/// Checks the subject of a message: a filter without wildcards.
pub(super) fn check_subject(text: &str) -> Result<(), Error> {
    check_tokens(text)?;
    if text.split('.').any(|token| matches!(token, "*" | ">")) {
        return Err(refused(text, "a message's subject has no wildcards"));
    }
    Ok(())
}

fn check_tokens(text: &str) -> Result<(), Error> {
    if text.len() > SUBJECT_BYTES_MAX {
        let start: String = text.chars().take(60).collect();
        return Err(refused(&start, "longer than a subject may be"));
    }
    let mut at_token_start = true;
    for byte in text.bytes() {
        match byte {
            b'.' if at_token_start => return Err(refused(text, "a token is empty")),
            b'.' => at_token_start = true,
            0..=b' ' | 0x7f => return Err(refused(text, "blanks and controls are not possible")),
            _ => at_token_start = false,
        }
    }
    if at_token_start {
        return Err(refused(text, "a token is empty"));
    }
    Ok(())
}

fn refused(text: &str, why: &str) -> Error {
    Error::Refused {
        operation: "subject",
        reason: format!("{text:?}: {why}"),
    }
}

/// What hangs on filters. Insert, remove and match cost a hash of each literal prefix of the
/// subject, whatever else hangs there.
pub(super) struct FilterIndex<T> {
    by_prefix: HashMap<Box<str>, Vec<Entry<T>>>,
    /// How many filters have a literal prefix of so many tokens: skips needless look-ups.
    depths: Vec<usize>,
    next_id: u64,
}

struct Entry<T> {
    id: u64,
    filter: Filter,
    value: T,
}

/// Names an entry of a [`FilterIndex`].
#[derive(Debug, Clone)]
pub(super) struct EntryKey {
    prefix: Box<str>,
    tokens: usize,
    id: u64,
}

impl<T> Default for FilterIndex<T> {
    fn default() -> Self {
        Self {
            by_prefix: HashMap::new(),
            depths: Vec::new(),
            next_id: 0,
        }
    }
}

impl<T> FilterIndex<T> {
    /// Hangs a value on a filter.
    pub(super) fn insert(&mut self, filter: Filter, value: T) -> EntryKey {
        let key = EntryKey {
            prefix: filter.prefix().into(),
            tokens: filter.prefix_tokens,
            id: self.next_id,
        };
        self.next_id += 1;
        if self.depths.len() <= key.tokens {
            self.depths.resize(key.tokens + 1, 0);
        }
        self.depths[key.tokens] += 1;
        let entry = Entry {
            id: key.id,
            filter,
            value,
        };
        self.by_prefix
            .entry(key.prefix.clone())
            .or_default()
            .push(entry);
        key
    }

    /// Takes a value off.
    pub(super) fn remove(&mut self, key: &EntryKey) -> Option<T> {
        let entries = self.by_prefix.get_mut(&key.prefix)?;
        let index = entries.iter().position(|entry| entry.id == key.id)?;
        let entry = entries.swap_remove(index);
        if entries.is_empty() {
            self.by_prefix.remove(&key.prefix);
        }
        self.depths[key.tokens] -= 1;
        Some(entry.value)
    }

    /// Calls `with` for every value whose filter matches the subject.
    pub(super) fn for_each_match(&self, subject: &str, mut with: impl FnMut(&T)) {
        if self.by_prefix.is_empty() {
            return;
        }
        let mut visit = |tokens: usize, prefix: &str| {
            if self.depths.get(tokens).is_none_or(|count| *count == 0) {
                return;
            }
            for entry in self.by_prefix.get(prefix).into_iter().flatten() {
                if entry.filter.matches(subject) {
                    with(&entry.value);
                }
            }
        };
        visit(0, "");
        let mut tokens = 1;
        for (at, _) in subject.match_indices('.') {
            visit(tokens, &subject[..at]);
            tokens += 1;
        }
        visit(tokens, subject);
    }

    /// Every value.
    pub(super) fn values(&self) -> impl Iterator<Item = &T> {
        self.by_prefix.values().flatten().map(|entry| &entry.value)
    }

    /// Whether nothing hangs here.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.by_prefix.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn wildcards_match_as_in_nats() {
        #[rustfmt::skip]
        let table = [
            ("a.b.c", "a.b.c", true), ("a.b.c", "a.b", false), ("a.b", "a.b.c", false),
            ("a.*.c", "a.b.c", true), ("a.*.c", "a.b.d", false), ("a.*", "a", false),
            ("a.*", "a.b.c", false), ("a.>", "a.b", true), ("a.>", "a.b.c.d", true),
            ("a.>", "a", false), (">", "a", true), ("*", "a", true), ("*", "a.b", false),
            ("a.*.>", "a.b", false), ("a.*.>", "a.b.c", true), ("ab.>", "abc.d", false),
        ];
        for (filter, subject, expected) in table {
            let parsed = Filter::parse(filter).unwrap();
            assert_eq!(parsed.matches(subject), expected, "{filter} on {subject}");
            let mut index = FilterIndex::default();
            let key = index.insert(parsed, ());
            let mut hits = 0;
            index.for_each_match(subject, |()| hits += 1);
            assert_eq!(hits == 1, expected, "{filter} on {subject} by index");
            index.remove(&key).unwrap();
            assert!(index.is_empty());
        }
    }

    #[test]
    fn malformed_subjects_are_refused() {
        let long = "x".repeat(SUBJECT_BYTES_MAX + 1);
        for bad in ["", ".", "a.", ".a", "a..b", "a b", "a\r\nb", "a\0", &long] {
            assert!(Filter::parse(bad).is_err(), "{bad:?}");
            assert!(check_subject(bad).is_err(), "{bad:?}");
        }
        for bad in ["a.*.b", ">", "a.>"] {
            assert!(check_subject(bad).is_err(), "{bad:?}");
        }
        assert!(Filter::parse("a.>.b").is_err());
    }

    proptest! {
        #[test]
        fn index_and_filter_agree(
            filters in proptest::collection::vec("(a|b|\\*)(\\.(a|b|\\*)){0,3}(\\.>)?", 0..20),
            subject in "(a|b|c)(\\.(a|b|c)){0,4}",
        ) {
            let mut index = FilterIndex::default();
            let mut keys = Vec::new();
            for (number, text) in filters.iter().enumerate() {
                keys.push(index.insert(Filter::parse(text).unwrap(), number));
            }
            let mut found = Vec::new();
            index.for_each_match(&subject, |number| found.push(*number));
            found.sort_unstable();
            let expected: Vec<usize> = (0..filters.len())
                .filter(|n| Filter::parse(&filters[*n]).unwrap().matches(&subject))
                .collect();
            prop_assert_eq!(found, expected);
            for key in &keys {
                prop_assert!(index.remove(key).is_some());
            }
            prop_assert!(index.is_empty());
        }

        #[test]
        fn hostile_text_does_not_panic(text in "\\PC{0,80}|[\\x00-\\x7f]{0,80}") {
            if let Ok(filter) = Filter::parse(&text) {
                let _ = filter.matches(&text);
            }
            let _ = check_subject(&text);
        }
    }
}
