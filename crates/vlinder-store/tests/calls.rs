//! The calls of interfaces.md §5 as functions of a state, without a file or a bus.

use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use vlinder_core::merkle::{self, MemoryChunks};
use vlinder_core::{Selector, StateRoot};
use vlinder_store::{Answer, Call, Service, apply, vec};

/// A client with one state, as a session has.
struct Client {
    chunks: MemoryChunks,
    vectors: vec::Cache,
    state: Option<StateRoot>,
    store: Selector,
}

impl Client {
    fn new() -> Self {
        let store = Selector::new("notes").unwrap();
        Self {
            chunks: MemoryChunks::default(),
            vectors: vec::Cache::default(),
            state: None,
            store,
        }
    }

    fn raw(&mut self, service: Service, operation: &str, body: &[u8]) -> Answer {
        let call = Call {
            service,
            operation,
            store: &self.store,
            state: self.state,
            body,
        };
        let answer = apply(&mut self.chunks, &call, &mut self.vectors).unwrap();
        assert!(call.may_change_state() || answer.state == self.state);
        self.state = answer.state;
        answer
    }

    fn kv(&mut self, operation: &str, body: Value) -> Answer {
        self.raw(Service::Kv, operation, body.to_string().as_bytes())
    }

    fn vec(&mut self, operation: &str, body: Value) -> Answer {
        self.raw(Service::Vec, operation, body.to_string().as_bytes())
    }

    fn search(&mut self, vector: &[f32], limit: usize) -> Vec<(String, f64, Value)> {
        let answer = self.vec("search", json!({"vector": vector, "limit": limit}));
        assert_eq!(answer.http, 200, "{}", text(&answer));
        let Value::Array(found) = parsed(&answer) else {
            panic!("not a list: {}", text(&answer))
        };
        let hit = |hit: Value| {
            (
                hit["key"].as_str().unwrap().to_owned(),
                hit["distance"].as_f64().unwrap(),
                hit["metadata"].clone(),
            )
        };
        found.into_iter().map(hit).collect()
    }
}

fn text(answer: &Answer) -> String {
    String::from_utf8_lossy(&answer.body).into_owned()
}

fn parsed(answer: &Answer) -> Value {
    serde_json::from_slice(&answer.body).unwrap()
}

/// The answer is a refusal of this kind with a message.
fn assert_refused(answer: &Answer, http: u16, code: &str) {
    let error = parsed(answer)["error"].clone();
    assert_eq!(
        (answer.http, error["code"].as_str()),
        (http, Some(code)),
        "{}",
        text(answer)
    );
    assert!(
        error["message"]
            .as_str()
            .is_some_and(|message| message.len() > 5)
    );
    assert_eq!(answer.content_type, "application/json");
    assert!(!answer.is_ok());
}

#[test]
fn what_is_put_is_got_listed_and_deleted() {
    let mut client = Client::new();
    let absent = client.kv("get", json!({"path": "a"}));
    assert_eq!(
        (absent.http, absent.found, absent.body.len()),
        (200, Some(false), 0)
    );

    let put = client.kv("put", json!({"path": "notes/ä", "content": "text ü"}));
    assert_eq!(
        parsed(&put),
        json!({"state": put.state.unwrap().to_string()})
    );
    client.kv(
        "put",
        json!({"path": "notes/b", "content_base64": "AP/+gA=="}),
    );
    client.kv("put", json!({"path": "other", "content": ""}));

    let got = client.kv("get", json!({"path": "notes/ä"}));
    assert_eq!((text(&got).as_str(), got.found), ("text ü", Some(true)));
    assert_eq!(got.content_type, "text/plain; charset=utf-8");
    let got = client.kv("get", json!({"path": "notes/b"}));
    assert_eq!(got.body, [0, 0xff, 0xfe, 0x80]);
    assert_eq!(got.content_type, "application/octet-stream");
    let got = client.kv("get", json!({"path": "other"}));
    assert_eq!((got.body.len(), got.found), (0, Some(true)));

    assert_eq!(
        parsed(&client.kv("list", json!({"path": "notes/"}))),
        json!(["notes/b", "notes/ä"])
    );
    assert_eq!(
        parsed(&client.kv("list", json!({}))),
        json!(["notes/b", "notes/ä", "other"])
    );
    assert_eq!(parsed(&client.kv("list", json!({"path": "x"}))), json!([]));

    let before = client.state;
    client.kv(
        "put",
        json!({"path": "passing", "content": "x".repeat(5000)}),
    );
    assert_ne!(client.state, before);
    client.kv("delete", json!({"path": "passing"}));
    assert_eq!(client.state, before);
    for path in ["notes/ä", "notes/b", "other", "never there"] {
        client.kv("delete", json!({"path": path}));
    }
    assert_eq!(client.state, None);
}

#[test]
fn an_old_state_stays_as_it_was() {
    let mut client = Client::new();
    client.kv("put", json!({"path": "n", "content": "1"}));
    let past = client.state;
    client.kv("put", json!({"path": "n", "content": "2"}));
    let present = client.state;
    client.state = past;
    assert_eq!(text(&client.kv("get", json!({"path": "n"}))), "1");
    client.kv("put", json!({"path": "n", "content": "2"}));
    assert_eq!(client.state, present);
}

#[test]
fn stores_and_services_do_not_meet() {
    let mut client = Client::new();
    client.kv("put", json!({"path": "k", "content": "kv"}));
    client.vec("store", json!({"key": "k", "vector": [1.0]}));
    client.store = Selector::new("notes2").unwrap();
    assert_eq!(client.kv("get", json!({"path": "k"})).found, Some(false));
    assert_eq!(parsed(&client.kv("list", json!({}))), json!([]));
    assert_eq!(client.search(&[1.0, 2.0], 5), []);
    client.store = Selector::new("notes").unwrap();
    assert_eq!(parsed(&client.kv("list", json!({}))), json!(["k"]));
    assert_eq!(client.search(&[1.0], 5).len(), 1);
}

#[test]
fn hostile_kv_bodies_are_refused() {
    let mut client = Client::new();
    client.kv("put", json!({"path": "keep", "content": "me"}));
    let before = client.state;
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let bodies: &[&[u8]] = &[
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"{\"path\": 3}",
        b"{\"path\": \"a\", \"path\": \"b\"}",
        b"{\"path\": \"a\", \"extra\": 1}",
        b"{\"path\": \"\\ud800\"}",
        deep.as_bytes(),
    ];
    for operation in ["get", "put", "delete"] {
        for body in bodies {
            assert_refused(
                &client.raw(Service::Kv, operation, body),
                400,
                "bad_request",
            );
        }
        for path in ["", "a\nb", "\0", "a\u{7f}", "\u{85}", &"x".repeat(1025)] {
            assert_refused(
                &client.kv(operation, json!({"path": path, "content": "c"})),
                400,
                if operation == "put" {
                    "bad_path"
                } else {
                    "bad_request"
                },
            );
            if operation != "put" {
                assert_refused(
                    &client.kv(operation, json!({"path": path})),
                    400,
                    "bad_path",
                );
            }
        }
    }
    for body in [
        json!({"path": "a"}),
        json!({"path": "a", "content": null}),
        json!({"path": "a", "content": "x", "content_base64": "eA=="}),
        json!({"path": "a", "content_base64": "%%%"}),
    ] {
        assert_refused(&client.kv("put", body), 400, "bad_content");
    }
    assert_refused(&client.kv("list", json!({"path": "a\tb"})), 400, "bad_path");
    assert_refused(&client.kv("drop", json!({})), 400, "unknown_operation");
    assert!(
        client
            .kv("put", json!({"path": "ä".repeat(512), "content": "c"}))
            .is_ok()
    );
    client.kv("delete", json!({"path": "ä".repeat(512)}));
    assert_eq!(client.state, before);
}

#[test]
fn a_list_that_is_too_long_is_refused_not_cut() {
    let mut client = Client::new();
    let name = "n".repeat(1000);
    for i in 0..17_000 {
        // Straight into the tree: what is tested is the list.
        let key = merkle::keys::key(
            merkle::keys::Space::Kv,
            &client.store,
            format!("{i:05}{name}").as_bytes(),
        );
        client.state = Some(merkle::put(&mut client.chunks, client.state, &key, b"").unwrap());
    }
    assert_refused(&client.kv("list", json!({})), 413, "too_large");
    let part = client.kv("list", json!({"path": "1"}));
    assert_eq!(parsed(&part).as_array().unwrap().len(), 7_000);
}

#[test]
fn vectors_are_stored_found_and_deleted() {
    let mut client = Client::new();
    assert_eq!(client.search(&[1.0, 2.0, 3.0], 5), []);
    client.vec(
        "store",
        json!({"key": "origin", "vector": [0, 0], "metadata": {"b": 1, "a": [2]}}),
    );
    client.vec("store", json!({"key": "far", "vector": [30, 40]}));
    client.vec(
        "store",
        json!({"key": "near", "vector": [3, 4], "metadata": "x"}),
    );
    let found = client.search(&[0.0, 0.0], 2);
    assert_eq!(
        found,
        [
            ("origin".into(), 0.0, json!({"b": 1, "a": [2]})),
            ("near".into(), 5.0, json!("x"))
        ]
    );

    client.vec(
        "store",
        json!({"key": "far", "vector": [0, 1], "metadata": null}),
    );
    let found = client.search(&[0.0, 0.0], 3);
    assert_eq!(found[1], ("far".into(), 1.0, Value::Null));
    client.vec("delete", json!({"key": "far"}));
    assert_eq!(client.search(&[0.0, 0.0], 3).len(), 2);

    // An emptied store leaves no trace, its dimension included.
    for key in ["origin", "near", "never there"] {
        client.vec("delete", json!({"key": key}));
    }
    assert_eq!(client.state, None);
    assert!(
        client
            .vec("store", json!({"key": "k", "vector": [1, 2, 3]}))
            .is_ok()
    );
}

#[test]
fn hostile_vectors_are_refused() {
    let mut client = Client::new();
    client.vec("store", json!({"key": "k", "vector": [1.0, 2.0]}));
    let before = client.state;
    let mut check = |operation: &str, body: &str, code: &str| {
        let answer = client.raw(Service::Vec, operation, body.as_bytes());
        assert_refused(&answer, if code == "too_large" { 413 } else { 400 }, code);
    };
    for bad in ["NaN", "1e999", "\"1\"", "null", "[1]"] {
        check(
            "store",
            &format!(r#"{{"key":"a","vector":[1,{bad}]}}"#),
            "bad_request",
        );
        check(
            "search",
            &format!(r#"{{"vector":[1,{bad}]}}"#),
            "bad_request",
        );
    }
    check("store", r#"{"key":"a","vector":[1e300, 1]}"#, "bad_vector");
    check("search", r#"{"vector":[1e39, 1]}"#, "bad_vector");
    check("store", r#"{"key":"a","vector":[]}"#, "bad_vector");
    check("store", r#"{"key":"a","vector":[1]}"#, "dimension_mismatch");
    check("search", r#"{"vector":[1,2,3]}"#, "dimension_mismatch");
    check("search", r#"{"vector":[1,2],"limit":0}"#, "bad_limit");
    check("search", r#"{"vector":[1,2],"limit":1001}"#, "bad_limit");
    check("search", r#"{"vector":[1,2],"limit":-1}"#, "bad_request");
    check("search", r#"{"vector":[1,2],"filter":[]}"#, "bad_filter");
    check(
        "search",
        r#"{"vector":[1,2],"filter":{"a":{"$near":1}}}"#,
        "bad_filter",
    );
    check("store", r#"{"key":"","vector":[1,2]}"#, "bad_key");
    check("delete", r#"{"key":"a\u0000"}"#, "bad_key");
    check(
        "store",
        &format!(r#"{{"key":"{}","vector":[1,2]}}"#, "x".repeat(1025)),
        "bad_key",
    );
    check(
        "store",
        &format!(r#"{{"key":"a","vector":{:?}}}"#, vec![1; 65_537]),
        "bad_vector",
    );
    check(
        "store",
        &format!(
            r#"{{"key":"a","vector":[1,2],"metadata":"{}"}}"#,
            "x".repeat(65_535)
        ),
        "too_large",
    );
    check("get", "{}", "unknown_operation");
    assert_eq!(client.state, before);
}

fn small_vector() -> impl Strategy<Value = Vec<f32>> {
    // Whole numbers make ties, which must be in the order of keys.
    prop::collection::vec((-3i8..=3).prop_map(f32::from), 11)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn search_is_exact_also_after_changes_and_in_the_past(
        rounds in prop::collection::vec(
            prop::collection::vec((0..40u8, prop::option::weighted(0.8, small_vector())), 1..30), 1..5),
        to in small_vector(),
        limit in 1..20usize,
    ) {
        let mut client = Client::new();
        let mut model = BTreeMap::new();
        let mut past = Vec::new();
        for round in rounds {
            for (key, vector) in round {
                let key = format!("key-{key}");
                match vector {
                    Some(vector) => {
                        client.vec("store", json!({"key": key, "vector": vector, "metadata": {"of": key}}));
                        model.insert(key, vector);
                    }
                    None => {
                        client.vec("delete", json!({"key": key}));
                        model.remove(&key);
                    }
                }
            }
            past.push((client.state, model.clone()));
            // The present, then the past again: the cache must lie about neither.
            for (state, model) in past.iter().rev() {
                client.state = *state;
                let mut expected: Vec<_> = model.iter().map(|(key, vector)| {
                    let squared: f64 = vector.iter().zip(&to).map(|(a, b)| f64::from(a - b).powi(2)).sum();
                    (key.clone(), squared.sqrt(), json!({"of": key}))
                }).collect();
                expected.sort_by(|a, b| a.1.total_cmp(&b.1).then_with(|| a.0.cmp(&b.0)));
                expected.truncate(limit);
                let found = client.search(&to, limit);
                prop_assert_eq!(found.len(), expected.len());
                for (found, expected) in found.iter().zip(&expected) {
                    prop_assert_eq!((&found.0, &found.2), (&expected.0, &expected.2));
                    // The JSON reader of this test may be off by the last digit.
                    prop_assert!((found.1 - expected.1).abs() < 1e-12);
                }
            }
            client.state = past.last().unwrap().0;
        }
    }

    #[test]
    fn no_body_makes_a_panic(body in prop::collection::vec(any::<u8>(), 0..60), text in "\\PC{0,60}",
                             key in "[a-z]{0,8}", value in "\\PC{0,20}") {
        let mut client = Client::new();
        client.vec("store", json!({"key": "k", "vector": [1.0]}));
        let object = json!({key: value}).to_string();
        for (service, operations) in [(Service::Kv, ["get", "put", "list", "delete"]),
                                      (Service::Vec, ["store", "search", "delete", "get"])] {
            for operation in operations {
                for body in [body.as_slice(), text.as_bytes(), object.as_bytes()] {
                    client.raw(service, operation, body);
                }
            }
        }
    }
}
