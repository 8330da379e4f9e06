//! The highest layer wins, and says so.

use proptest::prelude::*;
use vlinder_config::{Flag, Sources, load};

use crate::Home;

/// Keys without a relation to others, with values for each layer.
const KEYS: [(&str, [&str; 4]); 7] = [
    ("node.name", ["\"n0\"", "n1", "n2", "\"n3\""]),
    ("logging.level", ["\"warn\"", "debug", "error", "\"trace\""]),
    ("queue.max_bytes", ["\"1GiB\"", "2GiB", "3GiB", "\"4GiB\""]),
    ("distributed.workers.harness", ["2", "3", "4", "5"]),
    (
        "distributed.workers.storage.object.sqlite",
        ["0", "7", "8", "9"],
    ),
    (
        "ollama.endpoint",
        [
            "\"http://a:1\"",
            "http://b:1",
            "http://c:1",
            "\"http://d:1\"",
        ],
    ),
    (
        "supervisor.start_deadline",
        ["\"1s\"", "2s", "3s", "\"4s\""],
    ),
];

const LAYERS: [&str; 4] = ["file", "environment", "flag", "live"];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_highest_layer_wins(layers in proptest::array::uniform7(0u8..16)) {
        let (mut file, mut live, mut flags) = (String::new(), String::new(), Vec::new());
        let mut home = Home::new();
        for ((key, values), layers) in KEYS.iter().zip(layers) {
            if layers & 1 != 0 {
                file.push_str(&format!("{key} = {}\n", values[0]));
            }
            if layers & 2 != 0 {
                let name = format!("VLINDER_{}", key.to_uppercase().replace('.', "_"));
                home = home.var(&name, values[1]);
            }
            if layers & 4 != 0 {
                let (key, value) = ((*key).into(), values[2].into());
                flags.push(Flag { name: "--set".into(), key, value });
            }
            if layers & 8 != 0 {
                live.push_str(&format!("{key} = {}\n", values[3]));
            }
        }
        let home = home.config(&file).file("run/live.toml", &live);
        let loaded = load(&Sources { flags, ..Sources::new(&home.env) }).unwrap();
        let shown = loaded.effective_json(true, true);
        for ((key, values), layers) in KEYS.iter().zip(layers) {
            let leaf = shown.pointer(&format!("/{}", key.replace('.', "/"))).unwrap();
            let origin = leaf["origin"].as_str().unwrap();
            let Some(top) = (0..4).rev().find(|bit| layers & (1 << bit) != 0) else {
                prop_assert!(origin.starts_with("de"), "{} is from {}", key, origin);
                continue;
            };
            prop_assert!(origin.starts_with(LAYERS[top]), "{} is from {}", key, origin);
            let expected = values[top].trim_matches('"');
            let value = leaf["value"].to_string();
            let bytes = (expected.ends_with("GiB")).then(|| {
                (expected[..1].parse::<u64>().unwrap() << 30).to_string()
            });
            prop_assert_eq!(value.trim_matches('"'), bytes.as_deref().unwrap_or(expected));
        }
    }

    /// Whatever stands in a file: an answer, no panic.
    #[test]
    fn any_text_gets_an_answer(text in "[a-z\\[\\]=\"{}.0-9\\n _$~]{0,200}") {
        let home = Home::new().config(&text);
        if let Err(mistakes) = home.load() {
            prop_assert!(!mistakes.is_empty());
        }
    }

    /// Whatever value a known key gets, from a file or a variable: an answer that names the key.
    #[test]
    fn any_value_gets_an_answer(index in 0..KEYS.len(), value in "\\PC{1,30}") {
        let name = format!("VLINDER_{}", KEYS[index].0.to_uppercase().replace('.', "_"));
        if let Err(mistakes) = Home::new().var(&name, &value).load() {
            prop_assert!(mistakes.iter().all(|mistake| mistake.key == KEYS[index].0));
        }
    }
}
