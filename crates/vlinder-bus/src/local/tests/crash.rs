//! `kill -9` of a process that uses the bus: what it was told is stored is there, in order; nothing
//! follows from what is not.
//!
//! The child is this test binary again, running only `child`, which writes what was confirmed to it
//! to its standard output.

use super::support::*;
use crate::backend::{Backend, Verdict};
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

/// Tells the child where to work.
const DIR_VARIABLE: &str = "VLINDER_TEST_BUS_DIR";
const KILLS: usize = 8;

/// What the child was told.
#[derive(Default)]
struct Told {
    /// Sequence and id of stored requests.
    stored: BTreeMap<u64, String>,
    /// Sequences of answered and acknowledged requests.
    answered: BTreeSet<u64>,
    /// Last confirmed value of the counter.
    counter: u64,
}

/// One task sends requests, another answers them, a third counts in kv.
#[tokio::test]
#[ignore = "the crash test runs it as its child"]
async fn child() {
    let dir = std::env::var(DIR_VARIABLE).unwrap();
    let bus = open(Path::new(&dir)).await;
    let say = |line: String| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{line}").unwrap();
        out.flush().unwrap();
    };
    let run = std::process::id();
    let send = async {
        for n in 0u64.. {
            let id = format!("{run}-{n}");
            let done = bus
                .append(&log(), &raw(REQ, &id, id.clone()))
                .await
                .unwrap();
            say(format!("stored {} {id}", done.seq));
        }
    };
    let answer = async {
        let mut worker = puller(&bus).await;
        loop {
            for delivery in worker.next(8).await.unwrap() {
                let seq = delivery.stored.seq;
                let subject = format!("vlinder.v1.default.res.t{seq}.call");
                bus.append(&log(), &raw(&subject, format!("a{seq}"), seq.to_string()))
                    .await
                    .unwrap();
                bus.verdict(&delivery.token, Verdict::Ack).await.unwrap();
                say(format!("answered {seq}"));
            }
        }
    };
    let count = async {
        loop {
            let entry = bus.kv_get("things", "n").await.unwrap();
            let n = entry
                .as_ref()
                .map_or(0, |e| String::from_utf8_lossy(&e.value).parse().unwrap());
            let (next, revision): (u64, u64) = (n + 1, entry.map_or(0, |e| e.revision));
            bus.kv_put("things", "n", next.to_string().into(), Some(revision))
                .await
                .unwrap();
            say(format!("counter {next}"));
        }
    };
    tokio::join!(send, answer, count);
}

/// Runs the child until it has said `lines` lines, then kills it.
fn run_and_kill(dir: &Path, lines: usize, told: &mut Told) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "local::tests::crash::child",
            "--ignored",
            "--nocapture",
        ])
        .env(DIR_VARIABLE, dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    let mut left = lines;
    // After the kill it reads on to the end: all of that was confirmed as well.
    for line in out.lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["stored", seq, id] => drop(told.stored.insert(seq.parse().unwrap(), (*id).into())),
            ["answered", seq] => drop(told.answered.insert(seq.parse().unwrap())),
            ["counter", n] => told.counter = n.parse().unwrap(),
            _ => continue,
        }
        left = left.saturating_sub(1);
        if left == 0 {
            child.kill().unwrap();
        }
    }
    child.wait().unwrap();
    assert_eq!(left, 0, "the child ended by itself");
}

#[tokio::test]
async fn what_was_confirmed_survives_kill_9() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let mut told = Told::default();
    for _ in 0..KILLS {
        run_and_kill(dir.path(), random.random_range(1..800), &mut told);
        check(dir.path(), &told).await;
    }
}

async fn check(dir: &Path, told: &Told) {
    let bus = open(dir).await;
    let all = bus.range(&log(), ">", 1, usize::MAX).await.unwrap();
    let stored: BTreeMap<u64, _> = all.iter().map(|message| (message.seq, message)).collect();
    assert!(stored.keys().copied().eq(1..=all.len() as u64));
    for (seq, id) in &told.stored {
        assert_eq!(stored[seq].body, id.as_bytes());
    }
    let mut answered = BTreeSet::new();
    for message in all.iter().filter(|message| message.subject != REQ) {
        let request: u64 = std::str::from_utf8(&message.body).unwrap().parse().unwrap();
        // An answer follows from its request, and there is one of them.
        assert!(request < message.seq && stored[&request].subject == REQ);
        assert!(answered.insert(request));
    }
    assert!(told.answered.is_subset(&answered));
    let entry = bus.kv_get("things", "n").await.unwrap();
    let counter = entry.map_or(0, |e| {
        String::from_utf8_lossy(&e.value).parse::<u64>().unwrap()
    });
    assert!(counter >= told.counter, "{counter} < {}", told.counter);
    // Exactly the unacknowledged requests come again, and only answered ones are not among them.
    let mut worker = puller(&bus).await;
    let mut again = BTreeSet::new();
    let waiting = bus.queues(&log()).await.unwrap()[0].waiting as usize;
    while again.len() < waiting {
        for delivery in soon("work", worker.next(100)).await.unwrap() {
            assert_eq!(delivery.stored.subject, REQ);
            assert!(delivery.delivered >= 2);
            again.insert(delivery.stored.seq);
        }
    }
    let requests = all.iter().filter(|message| message.subject == REQ);
    for request in requests.map(|message| message.seq) {
        assert!(
            again.contains(&request) || answered.contains(&request),
            "{request} is lost"
        );
    }
    bus.close().await;
}
