//! The index of one stream: which subject each sequence is on, and which sequences each subject has.
//!
//! It holds no bodies. Memory: 16 bytes a message (8 in `entries`, 8 in its subject's list) and about
//! 250 bytes a distinct subject; subjects grow with turns, two each.

use super::filter::Filter;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A selection merges the lists of its subjects while there are at most so many; above, it scans the
/// log, which then is dense with matches or large anyway.
const MERGED_SUBJECTS_MAX: usize = 64;

/// Number of a subject within its stream, from 0.
pub(super) type SubjectId = u32;

#[derive(Clone, Copy)]
struct Entry {
    subject: SubjectId,
    /// Seconds since the Unix epoch: enough to tell the age of a backlog.
    time_s: u32,
}

struct Subject {
    text: Arc<str>,
    seqs: Vec<u64>,
}

/// See the module.
#[derive(Default)]
pub(super) struct Index {
    by_text: BTreeMap<Arc<str>, SubjectId>,
    subjects: Vec<Subject>,
    /// Entry `n` has sequence `n + 1`: nothing is ever taken out of a stream.
    entries: Vec<Entry>,
}

/// Part of the answer to a selection.
pub(super) struct Selection {
    /// Matching sequences, ascending.
    pub(super) seqs: Vec<u64>,
    /// Where to go on, if the scan stopped at its budget before it had enough.
    pub(super) resume: Option<u64>,
}

impl Index {
    /// An index over the given subjects, numbered as they come.
    pub(super) fn with_subjects(texts: Vec<String>) -> Self {
        let texts: Vec<Arc<str>> = texts.into_iter().map(Arc::from).collect();
        let by_text = texts.iter().cloned().zip(0..).collect();
        let subjects = texts
            .into_iter()
            .map(|text| Subject {
                text,
                seqs: Vec::new(),
            })
            .collect();
        Self {
            by_text,
            subjects,
            entries: Vec::new(),
        }
    }

    /// The number of a subject; `None` if it is new.
    pub(super) fn subject(&self, text: &str) -> Option<SubjectId> {
        self.by_text.get(text).copied()
    }

    /// Numbers a new subject.
    pub(super) fn add_subject(&mut self, text: &str) -> SubjectId {
        let id = SubjectId::try_from(self.subjects.len())
            .expect("four billion subjects do not fit into memory");
        let text: Arc<str> = text.into();
        self.by_text.insert(text.clone(), id);
        self.subjects.push(Subject {
            text,
            // Most subjects (ends of turns) get one message; the usual first capacity is four.
            seqs: Vec::with_capacity(1),
        });
        id
    }

    /// Adds the next message and returns its sequence.
    pub(super) fn push(&mut self, subject: SubjectId, time_ms: u64) -> u64 {
        let entry = Entry {
            subject,
            time_s: u32::try_from(time_ms / 1000).unwrap_or(u32::MAX),
        };
        self.entries.push(entry);
        let seq = self.last_seq();
        self.subjects[subject as usize].seqs.push(seq);
        seq
    }

    /// The last sequence; 0 if the stream is empty.
    pub(super) fn last_seq(&self) -> u64 {
        self.entries.len() as u64
    }

    /// The last sequence on a subject; 0 if there is none.
    pub(super) fn last_on(&self, subject: &str) -> u64 {
        let list = self
            .subject(subject)
            .map(|id| &self.subjects[id as usize].seqs);
        list.and_then(|seqs| seqs.last()).copied().unwrap_or(0)
    }

    /// The last sequence whose subject matches; 0 if there is none. Looks at every subject that begins
    /// like the filter.
    pub(super) fn last_matching(&self, filter: &Filter) -> u64 {
        if let Some(subject) = filter.exact() {
            return self.last_on(subject);
        }
        let alike = self.subjects_from(filter.prefix());
        let matching = alike.filter(|(text, _)| filter.matches(text));
        let last = matching.filter_map(|(_, seqs)| seqs.last());
        last.max().copied().unwrap_or(0)
    }

    /// Subjects that begin so, in order, with their sequences.
    fn subjects_from<'a>(&'a self, prefix: &str) -> impl Iterator<Item = (&'a str, &'a [u64])> {
        let from = (
            std::ops::Bound::Included(prefix),
            std::ops::Bound::Unbounded,
        );
        let alike = self.by_text.range::<str, _>(from);
        let alike = alike.take_while(move |(text, _)| text.starts_with(prefix));
        alike.map(|(text, id)| (&**text, self.subjects[*id as usize].seqs.as_slice()))
    }

    /// The sequence before `seq` on the same subject; 0 if there is none.
    pub(super) fn previous(&self, seq: u64) -> u64 {
        let Some(entry) = self.entry(seq) else {
            return 0;
        };
        let seqs = &self.subjects[entry.subject as usize].seqs;
        let before = seqs.partition_point(|other| *other < seq);
        before.checked_sub(1).map_or(0, |index| seqs[index])
    }

    /// The subject of a message.
    pub(super) fn subject_of(&self, seq: u64) -> Option<&Arc<str>> {
        let entry = self.entry(seq)?;
        Some(&self.subjects[entry.subject as usize].text)
    }

    /// When a message was stored, in milliseconds, up to a second early.
    pub(super) fn about_time_ms(&self, seq: u64) -> Option<u64> {
        Some(u64::from(self.entry(seq)?.time_s) * 1000)
    }

    fn entry(&self, seq: u64) -> Option<Entry> {
        let index = usize::try_from(seq.checked_sub(1)?).ok()?;
        self.entries.get(index).copied()
    }

    /// Every subject with its sequences.
    pub(super) fn subjects(&self) -> impl Iterator<Item = (&Arc<str>, &[u64])> {
        self.subjects
            .iter()
            .map(|subject| (&subject.text, subject.seqs.as_slice()))
    }

    /// Up to `max` sequences in `from..=to` whose subjects match. Looks at no more than `budget`
    /// messages one by one.
    pub(super) fn select(
        &self,
        filter: &Filter,
        from: u64,
        to: u64,
        max: usize,
        budget: usize,
    ) -> Selection {
        let to = to.min(self.last_seq());
        let from = from.max(1);
        if from > to || max == 0 {
            return Selection {
                seqs: vec![],
                resume: None,
            };
        }
        match self.few_matching(filter) {
            Some(lists) => Selection {
                seqs: merge(&lists, from, to, max),
                resume: None,
            },
            None => self.scan(filter, from, to, max, budget),
        }
    }

    /// The lists of all matching subjects; `None` if there are too many to merge.
    fn few_matching(&self, filter: &Filter) -> Option<Vec<&[u64]>> {
        let seqs = |id: SubjectId| self.subjects[id as usize].seqs.as_slice();
        if let Some(subject) = filter.exact() {
            return Some(self.subject(subject).map(seqs).into_iter().collect());
        }
        let mut lists = Vec::new();
        for (looked_at, (text, seqs)) in self.subjects_from(filter.prefix()).enumerate() {
            if looked_at == MERGED_SUBJECTS_MAX {
                return None;
            }
            if filter.matches(text) {
                lists.push(seqs);
            }
        }
        Some(lists)
    }

    fn scan(&self, filter: &Filter, from: u64, to: u64, max: usize, budget: usize) -> Selection {
        let mut seqs = Vec::new();
        let stop = to.min(from.saturating_add(budget as u64).saturating_sub(1));
        for seq in from..=stop {
            let text = self.subject_of(seq).expect("seq lies below last_seq");
            if filter.matches(text) {
                seqs.push(seq);
                if seqs.len() == max {
                    return Selection { seqs, resume: None };
                }
            }
        }
        let resume = (stop < to).then_some(stop + 1);
        Selection { seqs, resume }
    }
}

/// The first `max` sequences of `from..=to` in sorted lists that share none.
fn merge(lists: &[&[u64]], from: u64, to: u64, max: usize) -> Vec<u64> {
    let mut merged = Vec::new();
    for list in lists {
        let start = list.partition_point(|seq| *seq < from);
        let fit = list[start..].iter().take_while(|seq| **seq <= to);
        merged.extend(fit.take(max));
    }
    merged.sort_unstable();
    merged.truncate(max);
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn index_of(subjects: &[String]) -> Index {
        let mut index = Index::default();
        for text in subjects {
            let id = index
                .subject(text)
                .unwrap_or_else(|| index.add_subject(text));
            index.push(id, 5000);
        }
        index
    }

    proptest! {
        #[test]
        fn selection_equals_a_plain_search(
            subjects in proptest::collection::vec("(a|b)\\.[a-f]\\.(x|y)", 0..300),
            filter in "a\\.b\\.x|a\\.>|>|\\*\\.a\\.x|a\\.\\*\\.y|b\\.c\\.\\*",
            from in 0u64..320, to in 0u64..320, max in 0usize..40, budget in 1usize..50,
        ) {
            let index = index_of(&subjects);
            let filter = Filter::parse(&filter).unwrap();
            let expected: Vec<u64> = (1..).zip(&subjects)
                .filter(|(seq, text)| *seq >= from && *seq <= to && filter.matches(text))
                .map(|(seq, _)| seq)
                .take(max)
                .collect();
            let mut found = Vec::new();
            let mut next = Some(from);
            while let Some(start) = next {
                let part = index.select(&filter, start, to, max - found.len(), budget);
                found.extend(part.seqs);
                next = part.resume;
            }
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn the_last_match_equals_a_plain_search(
            subjects in proptest::collection::vec("(a|b|ab)\\.[a-d](\\.(x|y))?", 0..60),
            filter in "a\\.b\\.x|a\\.>|>|\\*\\.a\\.x|ab\\.\\*|b\\.c\\.\\*",
        ) {
            let index = index_of(&subjects);
            let filter = Filter::parse(&filter).unwrap();
            let expected = subjects.iter().rposition(|text| filter.matches(text));
            prop_assert_eq!(index.last_matching(&filter), expected.map_or(0, |at| at as u64 + 1));
        }

        #[test]
        fn previous_is_the_one_before(subjects in proptest::collection::vec("a|b|c", 0..50)) {
            let index = index_of(&subjects);
            for seq in 1..=subjects.len() {
                let expected = subjects[..seq - 1].iter().rposition(|text| *text == subjects[seq - 1]);
                prop_assert_eq!(index.previous(seq as u64), expected.map_or(0, |at| at as u64 + 1));
            }
        }
    }

    #[test]
    fn many_subjects_are_scanned_in_slices() {
        let subjects: Vec<String> = (0..1000).map(|n| format!("a.{n}")).collect();
        let index = index_of(&subjects);
        let part = index.select(&Filter::parse("a.*").unwrap(), 1, 1000, 500, 100);
        assert_eq!((part.seqs.len(), part.resume), (100, Some(101)));
        assert_eq!(index.previous(0), 0);
        assert_eq!(index.last_on("a.7"), 8);
        assert_eq!(index.about_time_ms(1), Some(5000));
    }
}
