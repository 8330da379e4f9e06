//! The hashes are frozen: a difference here is a bug in the code, not in the fixture
//! (`tests/fixtures/record-v1.json`, described in `docs/record-format.md`).

use serde_json::{Value, json};
use std::collections::BTreeMap;
use vlinder_core::hash::{call_key, canonical_body};
use vlinder_core::{ContentHash, Kind, Node, NodeHash};

const FIXTURE: &str = include_str!("../../../tests/fixtures/record-v1.json");

fn node_of(value: &Value) -> Node {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let fields = value["fields"].as_object().unwrap();
    let fields: BTreeMap<String, String> = fields
        .iter()
        .map(|(name, value)| (name.clone(), text(value)))
        .collect();
    let parents = value["parents"].as_array().unwrap();
    let parents: Vec<NodeHash> = parents
        .iter()
        .map(|hash| text(hash).parse().unwrap())
        .collect();
    let kind: Kind = text(&value["kind"]).parse().unwrap();
    let body = text(&value["body"]);
    Node {
        fields,
        ..Node::new(kind, parents, body.as_bytes())
    }
}

#[test]
fn node_hashes_are_those_of_the_fixture() {
    let fixture: Value = serde_json::from_str(FIXTURE).unwrap();
    let nodes = fixture["nodes"].as_array().unwrap();
    assert!(nodes.len() >= 7, "one of each kind at least");
    for vector in nodes {
        let node = node_of(vector);
        assert_eq!(
            json!(node.body_hash.to_string()),
            vector["body_sha256"],
            "{vector}"
        );
        assert_eq!(json!(node.hash().to_string()), vector["hash"], "{vector}");
    }
}

#[test]
fn call_keys_are_those_of_the_fixture() {
    let fixture: Value = serde_json::from_str(FIXTURE).unwrap();
    for vector in fixture["call_keys"].as_array().unwrap() {
        let text = |name: &str| vector[name].as_str().unwrap();
        let body = text("body").as_bytes();
        let key = call_key(
            text("service"),
            text("operation"),
            text("backend"),
            text("model"),
            body,
            vector["k"].as_u64().unwrap(),
        );
        assert_eq!(json!(key.to_string()), vector["key"], "{vector}");
        let canonical = String::from_utf8(canonical_body(body)).unwrap();
        assert_eq!(json!(canonical), vector["canonical_body"], "{vector}");
    }
}

#[test]
fn content_hashes_are_plain_sha256() {
    let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    assert_eq!(ContentHash::of(b"").to_string(), empty);
}
