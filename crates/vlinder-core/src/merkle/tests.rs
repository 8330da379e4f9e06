//! The tree against a `BTreeMap`, against permutations of itself, and against damaged chunks.

use super::*;
use proptest::prelude::*;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashSet};

type Model = BTreeMap<Vec<u8>, Vec<u8>>;

/// Chunks whose reads are counted, and which can be damaged.
#[derive(Default)]
struct TestChunks {
    memory: MemoryChunks,
    reads: Cell<usize>,
    seen: RefCell<HashSet<ContentHash>>,
}

impl Chunks for TestChunks {
    type Error = Infallible;

    fn get(&self, hash: &ContentHash) -> Result<Option<Vec<u8>>, Infallible> {
        self.reads.set(self.reads.get() + 1);
        self.seen.borrow_mut().insert(*hash);
        self.memory.get(hash)
    }

    fn put(&mut self, hash: ContentHash, bytes: &[u8]) -> Result<(), Infallible> {
        assert_eq!(
            hash,
            ContentHash::of(bytes),
            "a chunk was stored under a wrong hash"
        );
        self.memory.put(hash, bytes)
    }
}

fn build(chunks: &mut TestChunks, model: &Model) -> Option<StateRoot> {
    let mut root = None;
    for (key, value) in model {
        root = Some(put(chunks, root, key, value).unwrap());
    }
    root
}

/// The tree as its definition has it, made from above without any edit: an oracle for the edits,
/// and a quick way to large trees. `entries` are sorted, each with the level of its key.
fn defined(chunks: &mut TestChunks, entries: &[(u8, node::Entry)]) -> Option<node::Link> {
    let level = entries.iter().map(|(level, _)| *level).max()?;
    let mut children = Vec::new();
    for run in entries.split(|(its, _)| *its == level) {
        children.push(defined(chunks, run));
    }
    let tops = entries.iter().filter(|(its, _)| *its == level);
    let entries = tops.map(|(_, entry)| entry.clone()).collect();
    Some(
        node::store(
            chunks,
            &node::Node {
                level,
                entries,
                children,
            },
        )
        .unwrap(),
    )
}

/// The root of the tree that `entries`, which have short values, must have.
fn defined_root<'a>(
    chunks: &mut TestChunks,
    entries: impl Iterator<Item = (&'a [u8], &'a [u8])>,
) -> Option<StateRoot> {
    let entries = entries.map(|(key, value)| {
        let entry = node::Entry {
            key: key.to_vec(),
            value: Value::Inline(value.to_vec()),
        };
        (level_of(key), entry)
    });
    let entries: Vec<_> = entries.collect();
    defined(chunks, &entries).map(|link| StateRoot::from_bytes(*link.hash.as_bytes()))
}

fn contents(chunks: &TestChunks, root: Option<StateRoot>, prefix: &[u8]) -> Model {
    let entries = scan(chunks, root, prefix).unwrap();
    entries
        .map(|entry| {
            entry
                .map(|(key, value)| (key, read(chunks, value).unwrap()))
                .unwrap()
        })
        .collect()
}

/// Keys that collide often and share prefixes, and some that are spread out.
fn key() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        3 => prop::collection::vec(prop::sample::select(b"ab/".to_vec()), 0..5),
        2 => any::<u16>().prop_map(|n| format!("dir/{}", n % 400).into_bytes()),
        1 => prop::collection::vec(any::<u8>(), 0..40),
    ]
}

fn value() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 0..8),
        1 => (any::<u8>(), INLINE_BYTES_MAX - 1..INLINE_BYTES_MAX + 3).prop_map(|(b, n)| vec![b; n]),
    ]
}

fn model(most: usize) -> impl Strategy<Value = Model> {
    prop::collection::btree_map(key(), value(), 0..most)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_edits_agree_with_a_map(
        edits in prop::collection::vec((key(), prop::option::weighted(0.7, value())), 0..300),
        prefix in prop_oneof![Just(b"".to_vec()), Just(b"dir/".to_vec()), key()],
    ) {
        let (mut chunks, mut model, mut root) = (TestChunks::default(), Model::new(), None);
        for (key, value) in edits {
            match value {
                Some(value) => {
                    root = Some(put(&mut chunks, root, &key, &value).unwrap());
                    prop_assert_eq!(get(&chunks, root, &key).unwrap(), Some(value.clone()));
                    model.insert(key, value);
                }
                None => {
                    root = delete(&mut chunks, root, &key).unwrap();
                    prop_assert_eq!(get(&chunks, root, &key).unwrap(), None);
                    model.remove(&key);
                }
            }
            prop_assert_eq!(count(&chunks, root).unwrap(), model.len() as u64);
        }
        prop_assert_eq!(contents(&chunks, root, b""), model.clone());
        let below: Model = model.iter().filter(|(key, _)| key.starts_with(&prefix))
            .map(|(key, value)| (key.clone(), value.clone())).collect();
        prop_assert_eq!(contents(&chunks, root, &prefix), below);
        prop_assert_eq!(build(&mut chunks, &model), root);
        if model.values().all(|value| value.len() <= INLINE_BYTES_MAX) {
            let entries = model.iter().map(|(key, value)| (key.as_slice(), value.as_slice()));
            prop_assert_eq!(defined_root(&mut chunks, entries), root);
        }
        for key in model.keys() {
            root = delete(&mut chunks, root, key).unwrap();
        }
        prop_assert_eq!(root, None);
    }

    #[test]
    fn the_order_of_edits_leaves_no_trace(
        entries in model(200).prop_map(|model| model.into_iter().collect::<Vec<_>>()).prop_shuffle(),
        passing in model(30),
    ) {
        let mut chunks = TestChunks::default();
        let sorted = build(&mut chunks, &entries.iter().cloned().collect());
        let mut shuffled = None;
        for (key, value) in &entries {
            shuffled = Some(put(&mut chunks, shuffled, key, value).unwrap());
        }
        prop_assert_eq!(sorted, shuffled);

        // Keys that come and go leave no trace either.
        let new = passing.iter().filter(|(key, _)| entries.iter().all(|(known, _)| known != *key));
        let new: Vec<_> = new.collect();
        for (key, value) in &new {
            shuffled = Some(put(&mut chunks, shuffled, key, value).unwrap());
        }
        for (key, _) in &new {
            shuffled = delete(&mut chunks, shuffled, key).unwrap();
        }
        prop_assert_eq!(sorted, shuffled);
    }

    #[test]
    fn a_diff_agrees_with_that_of_maps(
        common in model(200), only_old in model(20), only_new in model(20),
    ) {
        let mut chunks = TestChunks::default();
        let (mut old, mut new) = (common.clone(), common);
        old.extend(only_old);
        new.extend(only_new);
        let (a, b) = (build(&mut chunks, &old), build(&mut chunks, &new));

        let mut expected = BTreeMap::new();
        for key in old.keys().chain(new.keys()) {
            let pair = (old.get(key).cloned(), new.get(key).cloned());
            if pair.0 != pair.1 {
                expected.insert(key.clone(), pair);
            }
        }
        let bytes = |value| read(&chunks, value).unwrap();
        let found: Vec<_> = diff(&chunks, a, b).unwrap().map(Result::unwrap).map(|(key, change)| {
            (key, match change {
                Change::Added(new) => (None, Some(bytes(new))),
                Change::Removed(old) => (Some(bytes(old)), None),
                Change::Changed { old, new } => (Some(bytes(old)), Some(bytes(new))),
            })
        }).collect();
        prop_assert_eq!(found, expected.into_iter().collect::<Vec<_>>());
    }

    #[test]
    fn any_damage_is_an_error(model in model(120), pick in any::<prop::sample::Index>(),
                              at in any::<prop::sample::Index>(), bit in 0..8u8, cut in any::<bool>()) {
        prop_assume!(!model.is_empty());
        let mut chunks = TestChunks::default();
        let root = build(&mut chunks, &model);
        chunks.seen.borrow_mut().clear();
        prop_assert_eq!(contents(&chunks, root, b""), model);
        let mut used: Vec<_> = chunks.seen.borrow().iter().copied().collect();
        used.sort();
        let victim = used[pick.index(used.len())];

        let good = chunks.memory.chunks[&victim].clone();
        let mut bad = good.clone();
        let at = at.index(good.len());
        if cut { bad.truncate(at) } else { bad[at] ^= 1 << bit }
        chunks.memory.chunks.insert(victim, bad);
        let named = match walk_all(&chunks, root) {
            Err(Error::Corrupt { hash, .. }) => Some(hash),
            _ => None,
        };
        prop_assert_eq!(named, Some(victim));
        chunks.memory.chunks.remove(&victim);
        prop_assert_eq!(walk_all(&chunks, root), Err(Error::Missing(victim)));
    }

    #[test]
    fn a_decoded_node_is_encoded_as_it_was(bytes in prop::collection::vec(any::<u8>(), 0..200),
                                           level in 0..3u8, entries in 0..4u8) {
        // Random bytes behind a plausible head reach deeper than random bytes alone.
        let plausible = [&[1, level, 0, 0, 0, entries], bytes.as_slice()].concat();
        for bytes in [bytes, plausible] {
            if let Ok(node) = node::Node::decode(&bytes) {
                prop_assert_eq!(node.encode(), bytes);
            }
        }
    }

    #[test]
    fn a_mutated_node_has_no_second_encoding(model in model(60), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        prop_assume!(!model.is_empty());
        let mut chunks = TestChunks::default();
        let root = build(&mut chunks, &model).unwrap();
        let mut bytes = chunks.memory.chunks[&ContentHash::from_bytes(*root.as_bytes())].clone();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(node) = node::Node::decode(&bytes) {
            prop_assert_eq!(node.encode(), bytes);
        }
    }
}

/// Reads every entry and every value.
fn walk_all(chunks: &TestChunks, root: Option<StateRoot>) -> Result<usize, Error<Infallible>> {
    let mut sum = 0;
    for entry in scan(chunks, root, b"")? {
        sum += read(chunks, entry?.1)?.len();
    }
    Ok(sum)
}

/// `n` keys as an agent might choose them.
fn numbered(n: usize) -> impl Iterator<Item = Vec<u8>> {
    (0..n).map(|i| format!("notes/{:08}", i).into_bytes())
}

/// New chunks per put of a fresh key into a tree of `n`, on average, and the tree's height.
fn new_chunks_per_put(n: usize) -> (f64, usize) {
    const PROBES: usize = 500;
    let mut chunks = TestChunks::default();
    let keys: Vec<_> = numbered(n).collect();
    let root = defined_root(
        &mut chunks,
        keys.iter().map(|key| (key.as_slice(), &b"v"[..])),
    );
    let before = chunks.memory.len();
    for probe in 0..PROBES {
        // Each probe starts from the same tree; keys land all over it.
        let key = format!("notes/{:08}+", probe * n / PROBES).into_bytes();
        put(&mut chunks, root, &key, format!("probe {probe}").as_bytes()).unwrap();
    }
    let mut height = 0;
    let mut at = node::load_root(&chunks, root).unwrap();
    while let Some(loaded) = at {
        height += 1;
        at = node::load(
            &chunks,
            loaded.node.children.iter().flatten().next().copied(),
        )
        .unwrap();
    }
    (
        (chunks.memory.len() - before) as f64 / PROBES as f64,
        height,
    )
}

#[test]
fn a_put_costs_one_path_of_chunks() {
    let (small, small_height) = new_chunks_per_put(100);
    let (large, large_height) = new_chunks_per_put(100_000);
    // log16: a thousand times the keys is two and a half levels more.
    assert!(
        large_height <= small_height + 4,
        "heights {small_height} and {large_height}"
    );
    // One in sixteen new keys splits a node, which adds half a path.
    assert!(
        large <= large_height as f64 + 0.5,
        "{large} chunks per put at height {large_height}"
    );
    println!("{small} chunks per put at 100 keys, {large} at 100,000 (height {large_height})");
    let growth = (100_000f64).ln() / (100f64).ln();
    assert!(
        large / small <= 1.3 * growth,
        "{small} chunks at 100 keys, {large} at 100,000"
    );
}

#[test]
fn reads_and_diffs_touch_little() {
    let mut chunks = TestChunks::default();
    let keys: Vec<_> = numbered(20_000).collect();
    let root = defined_root(
        &mut chunks,
        keys.iter().map(|key| (key.as_slice(), &b"v"[..])),
    );
    let mut changed = root;
    for i in [0, 7_000, 19_999] {
        changed = Some(
            put(
                &mut chunks,
                changed,
                format!("notes/{i:08}").as_bytes(),
                b"w",
            )
            .unwrap(),
        );
    }
    chunks.reads.set(0);
    assert_eq!(diff(&chunks, root, changed).unwrap().count(), 3);
    assert!(
        chunks.reads.get() <= 60,
        "{} reads for three changes",
        chunks.reads.get()
    );

    chunks.reads.set(0);
    assert_eq!(diff(&chunks, root, root).unwrap().count(), 0);
    assert_eq!(count(&chunks, root).unwrap(), 20_000);
    assert!(chunks.reads.get() <= 1);

    chunks.reads.set(0);
    assert_eq!(scan(&chunks, root, b"notes/0000123").unwrap().count(), 10);
    assert!(
        chunks.reads.get() <= 12,
        "{} reads for ten keys",
        chunks.reads.get()
    );

    chunks.reads.set(0);
    assert_eq!(scan(&chunks, root, b"").unwrap().take(5).count(), 5);
    assert!(
        chunks.reads.get() <= 10,
        "{} reads for five keys",
        chunks.reads.get()
    );
}

#[test]
fn the_format_is_frozen() {
    // These roots are stored in records: if this fails, the code is wrong and not the test.
    let mut chunks = TestChunks::default();
    let mut root = None;
    for key in numbered(300) {
        root = Some(put(&mut chunks, root, &key, &key).unwrap());
    }
    root = Some(put(&mut chunks, root, b"large", &[7; 300]).unwrap());
    assert_eq!(
        root.unwrap().to_string(),
        "f5b91e85d8e2ee8fda3235bbd9045c76cdd5b0553b0a496e5dfc99831a719d78"
    );
    let one = put(&mut chunks, None, b"ab", b"c").unwrap();
    let node = chunks
        .get(&ContentHash::from_bytes(*one.as_bytes()))
        .unwrap()
        .unwrap();
    assert_eq!(hex::encode(node), "01000000000100000002616200000163");
}

#[test]
fn impossible_keys_and_nodes_are_refused() {
    let mut chunks = TestChunks::default();
    let long = vec![b'x'; KEY_BYTES_MAX + 1];
    assert_eq!(
        put(&mut chunks, None, &long, b""),
        Err(Error::KeyTooLong(KEY_BYTES_MAX + 1))
    );
    assert!(put(&mut chunks, None, &long[1..], b"").is_ok());

    let forged = |chunks: &mut TestChunks, bytes: &[u8]| {
        chunks.memory.put(ContentHash::of(bytes), bytes).unwrap();
        Some(StateRoot::from_bytes(*ContentHash::of(bytes).as_bytes()))
    };
    let nodes: [&[u8]; 8] = [
        b"",
        b"\x02\0\0\0\0\x01\0\0\0\x01a\0\0\0",       // version 2
        b"\x01\0\0\0\0\0",                          // no entries
        b"\x01\0\xff\xff\xff\xff\0\0\0\x01a\0\0\0", // more entries than bytes
        b"\x01\0\0\0\0\x02\0\0\0\x01b\0\0\0\0\0\0\x01a\0\0\0", // keys fall
        b"\x01\0\0\0\0\x02\0\0\0\x01a\0\0\0\0\0\0\x01a\0\0\0", // the same key twice
        b"\x01\0\0\0\0\x01\0\x01\0\x01a\0\0\0",     // shares with nothing
        b"\x01\0\0\0\0\x01\0\0\0\x01a\0\0\0more",   // bytes after the end
    ];
    for bytes in nodes {
        let root = forged(&mut chunks, bytes);
        let found = [
            find(&chunks, root, b"a").err(),
            count(&chunks, root).err(),
            put(&mut chunks, root, b"a", b"b").err(),
            delete(&mut chunks, root, b"a").err(),
            scan(&chunks, root, b"").err(),
            diff(&chunks, root, None).err(),
        ];
        for error in found {
            assert!(
                matches!(error, Some(Error::Corrupt { .. })),
                "{bytes:?} gave {error:?}"
            );
        }
    }
}

#[test]
fn a_forged_tree_is_not_walked_for_ever() {
    // Each level names the level below it twice: 2^40 keys, if one followed it.
    let mut chunks = TestChunks::default();
    let entry = |key: &[u8]| node::Entry {
        key: key.to_vec(),
        value: Value::Inline(vec![]),
    };
    let leaf = node::Node {
        level: 0,
        entries: vec![entry(b"k")],
        children: vec![None; 2],
    };
    let mut link = node::store(&mut chunks, &leaf).unwrap();
    for level in 1..=40 {
        let node = node::Node {
            level,
            entries: vec![entry(b"k")],
            children: vec![Some(link); 2],
        };
        link = node::store(&mut chunks, &node).unwrap();
    }
    let root = Some(StateRoot::from_bytes(*link.hash.as_bytes()));
    assert!(matches!(
        walk_all(&chunks, root),
        Err(Error::Corrupt { .. })
    ));
    let mut changes = diff(&chunks, None, root).unwrap();
    assert!(changes.any(|change| matches!(change, Err(Error::Corrupt { .. }))));
}

#[test]
fn an_unchanged_put_and_a_vain_delete_write_nothing() {
    let mut chunks = TestChunks::default();
    let mut root = None;
    for key in numbered(500) {
        root = Some(put(&mut chunks, root, &key, &[1; 400]).unwrap());
    }
    let before = chunks.memory.len();
    assert_eq!(
        put(&mut chunks, root, b"notes/00000123", &[1; 400]).ok(),
        root
    );
    assert_eq!(delete(&mut chunks, root, b"notes/00000123x").unwrap(), root);
    assert_eq!(delete(&mut chunks, None, b"x").unwrap(), None);
    assert_eq!(chunks.memory.len(), before);
}
