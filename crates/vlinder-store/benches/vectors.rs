//! Many vectors in one store, in a file as a worker keeps it: how long storing and searching take, how
//! much memory, and whether what is found is what measuring every vector finds.
//!
//! `cargo bench -p vlinder-store --bench vectors`, or with a count and a dimension: `… -- 100000 768`.
//! Prints two parts: random directions, where all vectors are about as far from each other as any two
//! and a search has it hardest, and clusters, which embeddings of texts are closer to.

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use vlinder_bus::Bus;
use vlinder_bus::local::{LocalBus, LocalOptions};
use vlinder_core::hash::call_key;
use vlinder_core::record::Request;
use vlinder_core::{AgentName, Namespace, Selector, StateRoot, SubmissionId};
use vlinder_store::{Position, Stores};

const COUNT: usize = 100_000;
const DIMENSION: usize = 768;
const SEARCHES: usize = 200;
/// Of these, so many are compared with measuring every vector.
const COMPARED: usize = 40;
const LIMIT: usize = 10;
const CLUSTERS: u64 = 1000;

#[derive(Clone, Copy)]
struct Data {
    dimension: usize,
    is_clustered: bool,
}

impl Data {
    /// Vector `at`, of length about 1: always the same one.
    fn vector(self, at: u64) -> Vec<f32> {
        let mut rng = StdRng::seed_from_u64(at);
        let mut centre = StdRng::seed_from_u64(u64::MAX - at % CLUSTERS);
        let size = (self.dimension as f32).sqrt().recip();
        let mut number = || {
            let own = normal(&mut rng);
            match self.is_clustered {
                true => size * (0.8 * normal(&mut centre) + 0.6 * own),
                false => size * own,
            }
        };
        (0..self.dimension).map(|_| number()).collect()
    }
}

/// About normally distributed, by the sum of twelve.
fn normal(rng: &mut StdRng) -> f32 {
    (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0
}

/// A session with one store.
struct Session {
    stores: Stores,
    state: Option<StateRoot>,
    calls: u64,
}

impl Session {
    async fn call(&mut self, operation: &str, body: Value) -> Value {
        self.calls += 1;
        let body = Bytes::from(body.to_string());
        let selector = Selector::new("vectors").expect("a name");
        let request = Request {
            namespace: Namespace::default_ns(),
            submission: SubmissionId::new("bench").expect("a name"),
            agent: AgentName::new("bench").expect("a name"),
            service: "vec".to_owned(),
            backend: "sqlite".to_owned(),
            operation: operation.to_owned(),
            key: call_key("vec", operation, "sqlite", "vectors", &body, self.calls),
            selector,
            k: self.calls,
            state: self.state,
            label: None,
            deadline_ms: u64::MAX,
        };
        let at = Position {
            seq: self.calls,
            request: request.to_node(vec![], &body).hash(),
        };
        let served = self.stores.serve(&request, at, body).await;
        let answer = served.expect("serves").expect("is a store's");
        assert_eq!(answer.http, 200);
        self.state = answer.state;
        serde_json::from_slice(&answer.body).expect("is JSON")
    }

    async fn timed(&mut self, operation: &str, body: Value) -> (Duration, Value) {
        let began = Instant::now();
        let answer = self.call(operation, body).await;
        (began.elapsed(), answer)
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut numbers = std::env::args().filter_map(|argument| argument.parse::<usize>().ok());
    let count = numbers.next().unwrap_or(COUNT);
    let dimension = numbers.next().unwrap_or(DIMENSION);
    println!("{count} vectors of {dimension} dimensions, the {LIMIT} nearest");
    for is_clustered in [false, true] {
        let data = Data {
            dimension,
            is_clustered,
        };
        println!("\n{}:", if is_clustered { "clusters" } else { "random" });
        measure(data, count as u64).await;
    }
}

async fn measure(data: Data, count: u64) {
    let directory = tempfile::tempdir().expect("a directory");
    let bus = LocalBus::open(LocalOptions::new(directory.path().join("bus.db"))).await;
    let bus = Bus::new(bus.expect("opens"));
    let ns = Namespace::default_ns();
    bus.prepare(&ns).await.expect("prepares");
    let mut session = Session {
        stores: Stores::new(bus, ns, directory.path()),
        state: None,
        calls: 0,
    };

    let mut took = Vec::new();
    for at in 0..count {
        let metadata = json!({"n": at, "part": at % 100});
        let body = json!({"key": at.to_string(), "vector": data.vector(at), "metadata": metadata});
        took.push(session.timed("store", body).await.0);
    }
    let late = &mut took[count as usize * 9 / 10..];
    print("store, the last tenth", late);
    let file = directory.path().join("stores/default.db");
    let mib = |bytes: u64| bytes as f64 / (1024.0 * 1024.0);
    let bytes = std::fs::metadata(file).map_or(0, |file| file.len());
    println!("  file {:.0} MiB", mib(bytes));
    println!("  memory before the first search {} MiB", resident("VmRSS"));

    let search = |at: u64, filter: Value| json!({"vector": data.vector(at), "limit": LIMIT, "filter": filter});
    let (first, _) = session.timed("search", search(count, Value::Null)).await;
    println!("  first search of a state, nothing kept: {first:.1?}");
    for (name, filter) in [
        ("search", Value::Null),
        ("search, filter that one in 100 fits", json!({"part": 7})),
    ] {
        let mut took = Vec::new();
        for at in 0..SEARCHES as u64 {
            let body = search(count + at, filter.clone());
            took.push(session.timed("search", body).await.0);
        }
        print(name, &mut took);
    }
    let mut took = Vec::new();
    for at in 0..50 {
        let body = json!({"key": at.to_string(), "vector": data.vector(at), "metadata": {"n": at, "again": true}});
        session.call("store", body).await;
        took.push(
            session
                .timed("search", search(count + at, Value::Null))
                .await
                .0,
        );
    }
    print("search right after a store", &mut took);
    println!(
        "  memory now {} MiB, at most {} MiB",
        resident("VmRSS"),
        resident("VmHWM")
    );

    let mut recall = 0;
    let expected = brute_force(data, count);
    for (at, expected) in (0..).zip(&expected) {
        let found = session
            .call("search", search(count + at, Value::Null))
            .await;
        let hits = found.as_array().expect("a list").iter();
        let found: BTreeSet<u64> = hits
            .filter_map(|hit| hit["key"].as_str()?.parse().ok())
            .collect();
        recall += found.intersection(expected).count();
    }
    let recall = recall as f64 / (COMPARED * LIMIT) as f64;
    println!("  recall {recall} in {COMPARED} searches");
}

/// The nearest to each of the compared queries, by measuring all.
fn brute_force(data: Data, count: u64) -> Vec<BTreeSet<u64>> {
    let queries: Vec<Vec<f32>> = (0..COMPARED as u64)
        .map(|at| data.vector(count + at))
        .collect();
    let mut nearest: Vec<Vec<(f64, u64)>> = vec![Vec::new(); COMPARED];
    for at in 0..count {
        let vector = data.vector(at);
        for (query, nearest) in queries.iter().zip(&mut nearest) {
            let pairs = vector.iter().zip(query);
            let squared: f64 = pairs
                .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
                .sum();
            if nearest.len() < LIMIT || nearest.last().is_some_and(|last| squared < last.0) {
                let place = nearest.partition_point(|hit| hit.0 <= squared);
                nearest.insert(place, (squared, at));
                nearest.truncate(LIMIT);
            }
        }
    }
    let keys = |hits: Vec<(f64, u64)>| hits.into_iter().map(|(_, at)| at).collect();
    nearest.into_iter().map(keys).collect()
}

fn print(what: &str, took: &mut [Duration]) {
    took.sort_unstable();
    let at = |part: usize| took[(took.len() * part / 100).min(took.len() - 1)];
    println!("  {what}: p50 {:.2?}, p99 {:.2?}", at(50), at(99));
}

/// What the kernel says of this process's memory, in MiB.
fn resident(what: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(what));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}
