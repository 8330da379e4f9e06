//! What a turn that was run again did differently. Pure.

use std::collections::{HashMap, HashSet};
use vlinder_bus::wire::{NOTE_REPAIRED, NOTE_REPLAYED};
use vlinder_core::{CallKey, ContentHash, NodeHash, Selector};
use vlinder_worker::turns::TurnRecord;

/// A call with its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    pub key: CallKey,
    /// For people: service, operation, model or store.
    pub what: String,
    /// The result.
    pub hash: NodeHash,
    pub http: u16,
    pub body: ContentHash,
    /// It was taken from the record of another turn.
    pub recorded: bool,
    /// The recorded answer was replaced.
    pub repaired: bool,
}

/// The calls of a turn that led to its end, whose parents are `ended`, each with its first answer, in the order
/// of the log; every call where it has not ended.
pub fn calls_of(record: &TurnRecord, ended: Option<&[NodeHash]>) -> Vec<Call> {
    let reached: Option<HashSet<NodeHash>> = ended.map(|parents| {
        let of = parents.iter().map(|parent| record.ancestors(*parent));
        of.flatten().collect()
    });
    let answers = record.answers(|hash| reached.as_ref().is_none_or(|all| all.contains(hash)));
    let calls = answers.into_iter().map(|given| Call {
        key: given.result.key,
        what: record.asked(given).map_or_else(String::new, |asked| {
            let request = &asked.request;
            let mut what = format!("{} {}", request.service, request.operation);
            if request.selector != Selector::none() {
                what.push(' ');
                what.push_str(request.selector.as_str());
            }
            what
        }),
        hash: given.stored.hash,
        http: given.result.http,
        body: given.stored.node.body_hash,
        recorded: given.stored.notes.contains_key(NOTE_REPLAYED),
        repaired: given.stored.notes.contains_key(NOTE_REPAIRED),
    });
    calls.collect()
}

/// Where a turn first was not what its source was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    pub what: String,
    pub source: Option<NodeHash>,
    pub replay: Option<NodeHash>,
}

/// How the calls of a turn compare with those of its source.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Answered from the record.
    pub recorded: u32,
    /// Not answered from the record.
    pub live: u32,
    /// Of the live ones: not made by the source, or answered otherwise.
    pub changed: u32,
    /// Made by the source alone.
    pub missing: u32,
    pub repaired: bool,
    pub first: Option<Difference>,
}

/// Compares the calls of a turn with those of the turn that it ran again.
pub fn compare(source: &[Call], replay: &[Call]) -> Comparison {
    let by_key: HashMap<CallKey, &Call> = source.iter().map(|call| (call.key, call)).collect();
    let made: HashSet<CallKey> = replay.iter().map(|call| call.key).collect();
    let mut missing = source.iter().filter(|call| !made.contains(&call.key));
    let first_missing = missing.next();
    let mut compared = Comparison {
        missing: (first_missing.iter().count() + missing.count()) as u32,
        ..Comparison::default()
    };
    for call in replay {
        let before = by_key.get(&call.key);
        let differs =
            before.is_none_or(|before| (before.http, before.body) != (call.http, call.body));
        compared.recorded += u32::from(call.recorded);
        compared.live += u32::from(!call.recorded);
        compared.changed += u32::from(!call.recorded && differs);
        compared.repaired |= call.repaired;
        if differs && compared.first.is_none() {
            // A call that the source never made stands in the place of the first that it made alone.
            let before = before.copied().or(first_missing);
            compared.first = Some(Difference {
                what: call.what.clone(),
                source: before.map(|before| before.hash),
                replay: Some(call.hash),
            });
        }
    }
    if compared.first.is_none() {
        compared.first = first_missing.map(|call| Difference {
            what: call.what.clone(),
            source: Some(call.hash),
            replay: None,
        });
    }
    compared
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(key: u8, answer: &str, recorded: bool) -> Call {
        let hash = ContentHash::of(format!("{key}{answer}{recorded}").as_bytes());
        Call {
            key: format!("{key:064x}").parse().unwrap(),
            what: format!("call {key}"),
            hash: NodeHash::from_bytes(*hash.as_bytes()),
            http: 200,
            body: ContentHash::of(answer.as_bytes()),
            recorded,
            repaired: false,
        }
    }

    #[test]
    fn calls_are_compared_by_key_and_answer() {
        let source = [
            call(1, "a", false),
            call(2, "b", false),
            call(3, "c", false),
        ];
        let same: Vec<Call> = source
            .iter()
            .map(|call| Call {
                recorded: true,
                ..call.clone()
            })
            .collect();
        let all = compare(&source, &same);
        assert_eq!(
            (all.recorded, all.live, all.changed, all.missing),
            (3, 0, 0, 0)
        );
        assert_eq!(all.first, None);

        // The second is answered otherwise, the third is another call.
        let other = [same[0].clone(), call(2, "B", false), call(4, "d", false)];
        let found = compare(&source, &other);
        assert_eq!((found.recorded, found.live), (1, 2));
        assert_eq!((found.changed, found.missing), (2, 1));
        let first = found.first.unwrap();
        assert_eq!(first.source, Some(source[1].hash));
        assert_eq!(first.replay, Some(other[1].hash));

        // A new call instead of a known one: it is shown beside the one that is missing.
        let found = compare(
            &source,
            &[same[0].clone(), call(9, "x", false), same[2].clone()],
        );
        assert_eq!((found.changed, found.missing), (1, 1));
        assert_eq!(found.first.unwrap().source, Some(source[1].hash));

        let shorter = compare(&source, &same[..2]);
        assert_eq!((shorter.changed, shorter.missing), (0, 1));
        let first = shorter.first.unwrap();
        assert_eq!((first.source, first.replay), (Some(source[2].hash), None));
        assert_eq!(compare(&[], &[]), Comparison::default());
    }

    #[test]
    fn a_live_call_with_the_same_answer_is_no_difference() {
        let found = compare(&[call(1, "a", false)], &[call(1, "a", false)]);
        assert_eq!((found.live, found.changed, found.first), (1, 0, None));
    }
}
