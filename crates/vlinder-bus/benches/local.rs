//! The durable hop of the embedded bus: append → pull → append → seen, as `vlinder bench` counts it.
//! `cargo bench -p vlinder-bus --bench local`; prints medians and 99th percentiles.

use bytes::Bytes;
use futures::StreamExt;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vlinder_bus::backend::{Backend, Raw, Verdict};
use vlinder_bus::local::{LocalBus, LocalOptions, Sync};
use vlinder_bus::{QueueSpec, StreamName};
use vlinder_core::Namespace;

const HOPS: usize = 20_000;
const STORED: usize = 100_000;
const BODY: &[u8] = &[b'x'; 256];

fn log() -> StreamName {
    StreamName::Log(Namespace::default_ns())
}

fn raw(subject: String, id: String) -> Raw {
    let header = |name: &str| (format!("Vlinder-{name}"), "0123456789abcdef".repeat(4));
    Raw {
        subject,
        headers: ["Version", "Kind", "Node", "Parents", "Body"]
            .map(header)
            .into(),
        body: Bytes::from_static(BODY),
        id,
        expect_last: None,
    }
}

async fn open(path: &std::path::Path, sync: Sync) -> Arc<LocalBus> {
    let mut options = LocalOptions::new(path);
    options.sync = sync;
    let bus = LocalBus::open(options).await.expect("opens");
    bus.ensure_stream(&log()).await.expect("stream");
    bus
}

/// One worker that answers requests of client `n` on `res.n.call`.
async fn work(bus: Arc<LocalBus>) {
    let mut puller = bus.puller(&log(), "work").await.expect("puller");
    loop {
        for delivery in puller.next(64).await.expect("pulls") {
            let bus = bus.clone();
            tokio::spawn(async move {
                let client = &delivery.stored.headers.last().expect("client").1;
                let answer = raw(
                    format!("vlinder.v1.default.res.{client}.call"),
                    format!("answer{}", delivery.stored.seq),
                );
                bus.append(&log(), &answer).await.expect("answers");
                bus.verdict(&delivery.token, Verdict::Ack)
                    .await
                    .expect("acks");
            });
        }
    }
}

/// Sends requests one after another; returns how long each took until its answer was seen.
async fn ask(bus: Arc<LocalBus>, client: usize, count: usize) -> Vec<Duration> {
    let mut took = Vec::with_capacity(count);
    for n in 0..count {
        let begun = Instant::now();
        let turn = format!("c{client}n{n}");
        let answers = format!("vlinder.v1.default.res.{turn}.*");
        let mut seen = bus.seen(&answers).await.expect("subscribes");
        let mut request = raw(
            "vlinder.v1.default.req.infer.ollama._".to_owned(),
            format!("request{turn}"),
        );
        request.headers.push(("Client".to_owned(), turn));
        let stream = log();
        let (sent, answer) = tokio::join!(bus.append(&stream, &request), async {
            seen.next().await.expect("answer");
            begun.elapsed()
        });
        sent.expect("sends");
        took.push(answer);
    }
    took
}

fn report(what: &str, mut took: Vec<Duration>, wall: Duration) {
    took.sort_unstable();
    let at = |share: f64| took[((took.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
    let rate = took.len() as f64 / wall.as_secs_f64();
    println!(
        "{what}: p50 {:.0} us, p99 {:.0} us, {rate:.0}/s",
        at(0.5),
        at(0.99)
    );
}

async fn hops(sync: Sync) {
    let dir = tempfile::tempdir().expect("temp dir");
    let bus = open(&dir.path().join("bus.db"), sync).await;
    let spec = QueueSpec {
        stream: log(),
        name: "work".to_owned(),
        filter: "vlinder.v1.default.req.>".to_owned(),
        from_start: true,
    };
    bus.ensure_queue(&spec).await.expect("queue");
    let worker = tokio::spawn(work(bus.clone()));
    for clients in [1, 64] {
        let begun = Instant::now();
        let count = if sync == Sync::Always {
            HOPS / 10
        } else {
            HOPS
        } / clients;
        let asking =
            (0..clients).map(|client| tokio::spawn(ask(bus.clone(), client + clients, count)));
        let all = futures::future::join_all(asking).await;
        let took = all
            .into_iter()
            .flat_map(|took| took.expect("asks"))
            .collect();
        report(
            &format!("hop, {sync:?}, {clients} in flight"),
            took,
            begun.elapsed(),
        );
    }
    worker.abort();
    bus.close().await;
}

async fn reopen() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("bus.db");
    let bus = open(&path, Sync::Interval).await;
    let begun = Instant::now();
    for chunk in 0..STORED / 1000 {
        let appends = (0..1000).map(|n| {
            let bus = bus.clone();
            let subject = format!("vlinder.v1.default.res.t{}.call", chunk * 500 + n / 2);
            async move {
                bus.append(&log(), &raw(subject, format!("{chunk}/{n}")))
                    .await
            }
        });
        for done in futures::future::join_all(appends).await {
            done.expect("appends");
        }
    }
    println!(
        "{STORED} appends: {:.0}/s",
        STORED as f64 / begun.elapsed().as_secs_f64()
    );
    bus.close().await;
    drop(bus);
    let begun = Instant::now();
    let bus = open(&path, Sync::Interval).await;
    println!(
        "reopen with {STORED} messages on {} subjects: {:?}",
        STORED / 2,
        begun.elapsed()
    );
    bus.close().await;
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.expect("runtime").block_on(async {
        hops(Sync::Interval).await;
        hops(Sync::Always).await;
        reopen().await;
    });
}
