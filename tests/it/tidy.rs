//! The rules of ARCHITECTURE.md that no compiler checks: which crate may know which, and who may
//! read the environment or name the bus's client.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Crates that may depend on a workspace crate; whoever is not listed may depend on none.
fn allowed() -> BTreeMap<&'static str, &'static [&'static str]> {
    BTreeMap::from([
        ("vlinder-core", &[][..]),
        ("vlinder-config", &["vlinder-core"][..]),
        ("vlinder-proto", &["vlinder-core"][..]),
        ("vlinder-bus", &["vlinder-core"][..]),
        ("vlinder-supervisor", &["vlinder-core"][..]),
        ("vlinder-worker", &["vlinder-core", "vlinder-bus"][..]),
        ("vlinder-state", &["vlinder-core", "vlinder-bus", "vlinder-worker", "vlinder-proto"][..]),
        ("vlinder-git", &["vlinder-core", "vlinder-bus", "vlinder-worker"][..]),
        ("vlinder-objects", &[][..]),
        ("vlinder-store", &["vlinder-core", "vlinder-bus", "vlinder-worker", "vlinder-objects"][..]),
        ("vlinder-inference", &["vlinder-core", "vlinder-bus", "vlinder-worker"][..]),
        ("vlinder-runtime", &["vlinder-core", "vlinder-bus", "vlinder-worker"][..]),
        ("vlinder-services", &["vlinder-core", "vlinder-bus", "vlinder-worker", "vlinder-proto"][..]),
        ("vlinder-client", &["vlinder-core", "vlinder-config", "vlinder-proto"][..]),
        ("vlinder-cli", &["vlinder-core", "vlinder-config", "vlinder-proto", "vlinder-client"][..]),
        ("vlinder-console", &["vlinder-proto", "vlinder-client"][..]),
        ("vlinder-testkit", &[][..]),
    ])
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn manifest(path: &Path) -> toml::Table {
    std::fs::read_to_string(path.join("Cargo.toml")).unwrap().parse().unwrap()
}

#[test]
fn dependencies_point_one_way() {
    let rules = allowed();
    for entry in std::fs::read_dir(root().join("crates")).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let may = rules.get(name.as_str()).unwrap_or_else(|| panic!("{name} is not in ARCHITECTURE.md's rules"));
        let manifest = manifest(&entry.path());
        let none = toml::Table::new();
        let dependencies = manifest.get("dependencies").and_then(toml::Value::as_table).unwrap_or(&none);
        for dependency in dependencies.keys().filter(|key| key.starts_with("vlinder")) {
            assert!(may.contains(&dependency.as_str()), "{name} must not depend on {dependency}");
        }
        if name == "vlinder-core" {
            for banned in ["tokio", "async-nats", "tonic", "rusqlite", "reqwest"] {
                assert!(!dependencies.contains_key(banned), "vlinder-core must not know {banned}");
            }
        }
        let names_nats = dependencies.contains_key("async-nats");
        assert_eq!(names_nats, name == "vlinder-bus", "async-nats belongs to vlinder-bus alone ({name})");
        let names_s3 = dependencies.contains_key("object_store");
        assert_eq!(names_s3, name == "vlinder-objects", "object_store belongs to vlinder-objects alone ({name})");
    }
}

/// Sources of the product, without tests.
fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if path.is_dir() {
            if !matches!(name.as_str(), "tests" | "benches" | "examples" | "target" | "vlinder-testkit") {
                sources(&path, found);
            }
        } else if name.ends_with(".rs") && name != "build.rs" && name != "tests.rs" {
            found.push(path);
        }
    }
}

#[test]
fn only_the_configuration_reads_the_environment() {
    let mut files = Vec::new();
    sources(&root().join("crates"), &mut files);
    sources(&root().join("vlinderd"), &mut files);
    assert!(files.len() > 50, "the sources were not found");
    for file in files {
        let path = file.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
        // The echo agent and the template of new ones are agents: their contract is their environment.
        let agents = ["vlinderd/src/bench_agent.rs", "crates/vlinder-cli/src/scaffold/rust/main.rs"];
        let may = path.starts_with("crates/vlinder-config/") || agents.contains(&path.as_str());
        let text = std::fs::read_to_string(&file).unwrap();
        let product = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        let reads = product.contains("env::var(") || product.contains("env::vars") || product.contains("env::var_os(");
        assert!(may || !reads, "{path} reads the environment; that is vlinder-config's business");
    }
}
