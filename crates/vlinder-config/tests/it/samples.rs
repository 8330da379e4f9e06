//! The files in `config/` load, and the documented one tells the truth.

use std::path::PathBuf;

use vlinder_config::{Env, Loaded, Sources, json_schema, load, sample_toml};
use vlinder_core::WorkerRole;

use crate::Home;

fn sample(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../config")
        .join(name)
}

/// Loads a sample as the user of `home` would.
fn loaded(name: &str, env: &Env) -> Loaded {
    let config_file = Some(sample(name));
    load(&Sources {
        config_file,
        ..Sources::new(env)
    })
    .unwrap_or_else(|mistakes| panic!("{name}: {mistakes:#?}"))
}

#[test]
fn the_documented_sample_is_up_to_date() {
    let path = sample("vlinderd.toml");
    if std::env::var_os("VLINDER_TEST_BLESS").is_some() {
        std::fs::write(&path, sample_toml()).unwrap();
    }
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(
        text == sample_toml(),
        "config/vlinderd.toml is not what the keys say; run this test with VLINDER_TEST_BLESS=1"
    );
}

#[test]
fn the_documented_sample_equals_the_defaults() {
    let home = Home::new();
    let defaults = home.loaded();
    let sample = loaded("vlinderd.toml", &home.env);
    assert_eq!(sample.config, defaults.config);
    assert_eq!(sample.warnings, defaults.warnings);

    // With every plain default written out it still does.
    let mut plain = true;
    let mut uncommented = 0;
    let lines = sample_toml().lines().map(str::to_owned).collect::<Vec<_>>();
    let text = lines.iter().fold(String::new(), |text, line| {
        let assignment = line.strip_prefix("# ").filter(|rest| is_assignment(rest));
        let line = match assignment {
            Some(assignment) if plain => {
                uncommented += 1;
                assignment
            }
            _ => line,
        };
        plain = if assignment.is_some() {
            true
        } else {
            plain && !line.contains("Default:")
        };
        text + line + "\n"
    });
    let written = Home::new().config(&text);
    assert!(uncommented > 30, "{text}");
    assert_eq!(written.loaded().config, defaults.config, "{text}");
}

fn is_assignment(line: &str) -> bool {
    line.split_once(" = ").is_some_and(|(name, _)| {
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
    })
}

/// The paths of all keys of the schema.
fn keys(schema: &serde_json::Value, path: &str, out: &mut Vec<String>) {
    let Some(properties) = schema.get("properties").and_then(|p| p.as_object()) else {
        out.push(path.to_owned());
        return;
    };
    for (name, inner) in properties {
        let path = if path.is_empty() {
            name.clone()
        } else {
            format!("{path}.{name}")
        };
        keys(inner, &path, out);
    }
}

#[test]
fn the_documented_sample_names_every_key_of_the_schema() {
    let mut expected = Vec::new();
    keys(&json_schema(), "", &mut expected);
    assert!(expected.len() > 60, "{expected:?}");

    let mut named = Vec::new();
    let (mut section, mut commented) = (String::new(), false);
    for line in std::fs::read_to_string(sample("vlinderd.toml"))
        .unwrap()
        .lines()
    {
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            section = name.to_owned();
        } else if let Some(rest) = line.strip_prefix("# ").filter(|rest| is_assignment(rest)) {
            assert!(commented, "{line} has no comment");
            named.push(format!("{section}.{}", rest.split_once(" = ").unwrap().0));
            commented = false;
            continue;
        }
        commented = line.starts_with("# ");
    }
    expected.sort();
    named.sort();
    assert_eq!(named, expected);
}

#[test]
fn every_other_sample_loads() {
    let home = Home::new().file("cluster-token", "0123456789abcdef0123456789abcdef\n");
    let mut seen = 0;
    for entry in std::fs::read_dir(sample("")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".toml") {
            loaded(&name, &home.env);
            seen += 1;
        }
    }
    assert!(seen >= 4, "{seen} samples");
}

#[test]
fn the_samples_make_one_cluster() {
    let home = Home::new().file("cluster-token", "0123456789abcdef0123456789abcdef\n");
    let running = |name: &str| -> Vec<WorkerRole> {
        let loaded = loaded(name, &home.env);
        assert!(!loaded.config.is_embedded());
        assert_eq!(loaded.warnings, [] as [&str; 0], "{name}");
        loaded
            .config
            .workers
            .iter()
            .filter(|(_, n)| *n > 0)
            .map(|(role, _)| role)
            .collect()
    };
    assert_eq!(running("gpu-node.toml"), [WorkerRole::InferenceOllama]);
    let storage = [
        WorkerRole::StorageObjectSqlite,
        WorkerRole::StorageVectorSqlite,
    ];
    assert_eq!(running("storage-node.toml"), storage);
    let hub = running("hub.toml");
    assert!(hub.contains(&WorkerRole::Registry) && !hub.contains(&WorkerRole::InferenceOllama));
}
