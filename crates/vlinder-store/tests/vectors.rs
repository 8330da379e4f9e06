//! Ten thousand vectors: what a search finds is what measuring every one of them finds, in any state.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use vlinder_core::merkle::MemoryChunks;
use vlinder_core::{Selector, StateRoot};
use vlinder_store::{Call, Service, apply, vec};

const COUNT: usize = 10_000;
const DIMENSION: usize = 48;

/// What a store should hold: vector and metadata by key.
type Model = BTreeMap<String, (Vec<f32>, Value)>;

struct Store {
    chunks: MemoryChunks,
    cache: vec::Cache,
    state: Option<StateRoot>,
    selector: Selector,
}

impl Store {
    fn call(&mut self, operation: &str, body: &Value) -> Value {
        let body = body.to_string();
        let call = Call {
            service: Service::Vec,
            operation,
            store: &self.selector,
            state: self.state,
            body: body.as_bytes(),
        };
        let answer = apply(&mut self.chunks, &call, &mut self.cache).unwrap();
        let value: Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(answer.http, 200, "{value}");
        self.state = answer.state;
        value
    }

    fn set(&mut self, model: &mut Model, key: String, vector: Vec<f32>, metadata: Value) {
        let body = json!({"key": key, "vector": vector, "metadata": metadata});
        self.call("store", &body);
        model.insert(key, (vector, metadata));
    }

    /// The search finds what measuring everything in `model` finds.
    fn check(
        &mut self,
        model: &Model,
        to: &[f32],
        limit: usize,
        filter: &Value,
        wants: &dyn Fn(&Value) -> bool,
    ) {
        let mut expected: Vec<(f64, &String, &Value)> = model
            .iter()
            .filter(|(_, (_, metadata))| wants(metadata))
            .map(|(key, (vector, metadata))| {
                let pairs = vector.iter().zip(to);
                let squared: f64 = pairs
                    .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
                    .sum();
                (squared.sqrt(), key, metadata)
            })
            .collect();
        expected.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(b.1)));
        expected.truncate(limit);

        let body = json!({"vector": to, "limit": limit, "filter": filter});
        let Value::Array(found) = self.call("search", &body) else {
            panic!("not a list")
        };
        assert_eq!(found.len(), expected.len(), "{filter}");
        for (found, (distance, key, metadata)) in found.iter().zip(expected) {
            assert_eq!((&found["key"], &found["metadata"]), (&json!(key), metadata));
            assert!((found["distance"].as_f64().unwrap() - distance).abs() < 1e-9);
        }
    }
}

/// Half of them anywhere, half close together around few places, as the embeddings of texts are.
fn vector(rng: &mut StdRng, at: usize) -> Vec<f32> {
    let mut centre = StdRng::seed_from_u64((at % 20) as u64);
    let number = |_| match at % 2 {
        0 => rng.random_range(-1.0f32..1.0),
        _ => centre.random_range(-1.0f32..1.0) + rng.random_range(-0.02f32..0.02),
    };
    (0..DIMENSION).map(number).collect()
}

#[test]
fn search_equals_brute_force_on_ten_thousand_vectors_in_every_state() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut store = Store {
        chunks: MemoryChunks::default(),
        cache: vec::Cache::default(),
        state: None,
        selector: Selector::new("many").unwrap(),
    };
    let mut model = Model::new();
    for at in 0..COUNT {
        // Some metadata is too long to be kept beside the codes.
        let text = "x".repeat(if at % 50 == 0 { 2000 } else { 3 });
        let metadata = json!({"n": at, "group": at % 100, "tags": [at % 3, "t"], "text": text});
        let vector = vector(&mut rng, at);
        store.set(&mut model, format!("k{at}"), vector, metadata);
    }
    let check_all = |store: &mut Store, model: &Model, rng: &mut StdRng| {
        for round in 0..6 {
            // Anywhere, near a cluster, or exactly one that is there.
            let to = match round % 3 {
                2 => model["k777"].0.clone(),
                kind => vector(rng, kind),
            };
            store.check(model, &to, 10, &Value::Null, &|_| true);
            store.check(
                model,
                &to,
                1000,
                &json!({"n": {"$lt": 5000}}),
                &|metadata| metadata["n"].as_u64() < Some(5000),
            );
            store.check(
                model,
                &to,
                7,
                &json!({"group": 50, "tags": 1}),
                &|metadata| metadata["group"] == 50 && metadata["tags"][0] == 1,
            );
            store.check(model, &to, 5, &json!({"group": 100}), &|_| false);
        }
    };
    check_all(&mut store, &model, &mut rng);

    // A fork that goes another way, and back: each state finds its own.
    let (before, model_before) = (store.state, model.clone());
    for at in 0..200 {
        let key = format!("k{}", rng.random_range(0..COUNT));
        if at % 4 == 0 {
            store.call("delete", &json!({"key": key}));
            model.remove(&key);
        } else {
            let vector = vector(&mut rng, at);
            store.set(&mut model, key, vector, json!({"n": at, "group": 50}));
        }
    }
    // The searches ask for this one by name.
    let (vector, metadata) = model_before["k777"].clone();
    store.set(&mut model, "k777".into(), vector, metadata);
    let after = store.state;
    check_all(&mut store, &model, &mut rng);
    store.state = before;
    check_all(&mut store, &model_before, &mut rng);
    // The same without anything that is kept.
    store.state = after;
    store.cache = vec::Cache::default();
    check_all(&mut store, &model, &mut rng);
}
