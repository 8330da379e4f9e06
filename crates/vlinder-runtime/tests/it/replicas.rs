//! Replicas: as many as wanted, each once, on whatever workers there are.

use crate::agents::{COUNTER, ECHO, KV, agent};
use crate::bed::{Bed, file_of, gone, lives};
use std::collections::HashMap;
use std::time::Duration;
use vlinder_worker::nodes::{self, NodeReport, WorkerReport};

/// Answers only when as many turns as its input says are under way.
const MEETS: &str = r#"
def turn(body, request):
    here = os.path.join(os.environ["HOME"], "here")
    os.makedirs(here, exist_ok=True)
    open(os.path.join(here, request.invocation), "w")
    until = time.monotonic() + 15
    while len(os.listdir(here)) < int(body) and time.monotonic() < until:
        time.sleep(0.01)
    if time.monotonic() >= until: return "alone"
    return str(os.getpid())
"#;

#[tokio::test]
async fn four_replicas_serve_four_turns_at_once() {
    let (bed, worker) = Bed::with_worker().await;
    bed.deploy("meet", &agent(MEETS), "replicas = 4\n").await;
    let turns = (0..4).map(|_| async {
        let mut session = bed.session("meet").await;
        session.say(&bed, "4").await.done()
    });
    let mut pids = futures::future::join_all(turns).await;
    pids.sort();
    pids.dedup();
    assert_eq!(pids.len(), 4, "{pids:?}");
    worker.stop().await;
}

#[tokio::test]
async fn one_replica_serves_as_many_turns_as_it_says() {
    let (bed, worker) = Bed::with_worker().await;
    let source = format!(
        "{COUNTER}\ncounted = turn\n{MEETS}\nmet = turn\ndef turn(body, request):\n    return met(body, request) + ' ' + counted(body, request)\n"
    );
    bed.deploy("meet", &agent(&source), &format!("{KV}concurrency = 3\n"))
        .await;
    let turns = (0..3).map(|_| async {
        let mut session = bed.session("meet").await;
        session.say(&bed, "3").await.done()
    });
    let answers = futures::future::join_all(turns).await;
    assert!(
        answers
            .iter()
            .all(|answer| answer == &answers[0] && answer.ends_with(" 1")),
        "{answers:?}"
    );
    worker.stop().await;
}

const PID: &str = "def turn(body, request):\n    return str(os.getpid())\n";

#[tokio::test]
async fn forty_turns_are_spread_evenly() {
    let (bed, worker) = Bed::with_worker().await;
    bed.deploy("pid", &agent(PID), "replicas = 4\n").await;
    let mut counts: HashMap<String, u32> = HashMap::new();
    for _ in 0..40 {
        let mut session = bed.session("pid").await;
        *counts
            .entry(session.say(&bed, "hi").await.done())
            .or_default() += 1;
    }
    assert_eq!(counts.len(), 4);
    assert!(
        counts.values().all(|count| (8..=12).contains(count)),
        "{counts:?}"
    );
    worker.stop().await;
}

fn report(node: &str, workers: u32) -> NodeReport {
    let worker = |index| WorkerReport {
        role: "agent.process".to_owned(),
        index,
        state: "ready".to_owned(),
        ..WorkerReport::default()
    };
    NodeReport {
        node: node.to_owned(),
        workers: (0..workers).map(worker).collect(),
        ..NodeReport::default()
    }
}

/// What a node's supervisor does.
fn keep_reporting(bed: &Bed, report: NodeReport) -> tokio::task::JoinHandle<()> {
    let bus = bed.bus.clone();
    tokio::spawn(async move {
        loop {
            nodes::publish(&bus, &report).await.unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    })
}

#[tokio::test]
async fn two_workers_share_the_replicas_and_one_takes_over_all() {
    let bed = Bed::new().await;
    let reports = [
        keep_reporting(&bed, report("one", 1)),
        keep_reporting(&bed, report("two", 1)),
    ];
    tokio::time::sleep(Duration::from_millis(100)).await;
    let (one, two) = (bed.worker("one", 0), bed.worker("two", 0));
    let version = bed.deploy("pid", &agent(PID), "replicas = 4\n").await;
    let claims = bed.ready("pid", version).await;
    let on = |node: &str| claims.values().filter(|claim| claim.node == node).count();
    assert_eq!((on("one"), on("two")), (2, 2), "{claims:?}");

    // One node dies: what it ran runs on the other when it was not seen for 5 s, and not before.
    let began = std::time::Instant::now();
    reports[1].abort();
    two.kill().await;
    let claims = bed
        .claims_until("pid", "taken over", |claims| {
            claims.len() == 4
                && claims
                    .values()
                    .all(|claim| claim.node == "one" && claim.state == "ready")
        })
        .await;
    assert!(
        began.elapsed() >= Duration::from_millis(3500),
        "{:?}",
        began.elapsed()
    );
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
    let pids: std::collections::HashSet<_> = claims.values().map(|claim| claim.pid).collect();
    assert_eq!(pids.len(), 4);
    one.stop().await;
    // Given up in order: nothing is left behind.
    bed.claims_until("pid", "given up", |claims| claims.is_empty())
        .await;
    for pid in pids {
        gone(pid).await;
    }
}

#[tokio::test]
async fn a_pinned_agent_waits_for_its_node() {
    let bed = Bed::new().await;
    let one = bed.worker("one", 0);
    let place = "[placement]\nlabels = { disk = 'fast' }\n";
    let version = bed.deploy_only("picky", &agent(ECHO), place).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    bed.claims_until("picky", "unclaimed", |claims| claims.is_empty())
        .await;
    let two = bed.worker_with("two", 0, &[("disk", "fast")]);
    assert_eq!(bed.ready("picky", version).await[&0].node, "two");
    one.stop().await;
    two.stop().await;
}

#[tokio::test]
async fn a_redeployment_rolls_without_a_failed_turn() {
    let (bed, worker) = Bed::with_worker().await;
    let version = |number: u32| {
        agent(&format!(
            "def turn(body, request):\n    time.sleep(0.02)\n    return 'v{number}'\n"
        ))
    };
    let first = bed.deploy("rolls", &version(1), "replicas = 2\n").await;
    let old = bed.ready("rolls", first).await;
    let mut session = bed.session("rolls").await;
    assert_eq!(session.say(&bed, "hi").await.done(), "v1");
    let second = bed
        .deploy_only("rolls", &version(2), "replicas = 2\n")
        .await;
    let until = tokio::time::Instant::now() + crate::bed::DEADLINE;
    let mut answers = Vec::new();
    // Each of these must be answered, by whichever version.
    while answers
        .iter()
        .rev()
        .take(4)
        .filter(|answer| *answer == "v2")
        .count()
        < 4
    {
        answers.push(session.say(&bed, "hi").await.done());
        assert!(tokio::time::Instant::now() < until, "{answers:?}");
    }
    let switched = answers.iter().position(|answer| answer == "v2").unwrap();
    assert!(
        switched > 0,
        "the old version served on while the new one started"
    );
    let new = bed.ready("rolls", second).await;
    for claim in old.values() {
        gone(claim.pid).await;
    }
    // Fewer replicas: the others end.
    let third = bed.deploy("rolls", &version(3), "").await;
    let left = bed.ready("rolls", third).await;
    assert_eq!(left.len(), 1);
    for claim in new.values() {
        gone(claim.pid).await;
    }
    worker.stop().await;
}

#[tokio::test]
async fn a_broken_version_leaves_the_old_one_at_work() {
    let (bed, worker) = Bed::with_worker().await;
    bed.deploy("rolls", &agent(ECHO), "").await;
    let mut session = bed.session("rolls").await;
    bed.deploy_only("rolls", "import sys\nsys.exit('broken')\n", "")
        .await;
    bed.claims_until("rolls", "crash-looping", |claims| {
        claims
            .get(&0)
            .is_some_and(|claim| claim.state == "crash-looping")
    })
    .await;
    assert_eq!(session.say(&bed, "still here").await.done(), "still here");
    worker.stop().await;
}

#[tokio::test]
async fn a_deleted_agent_leaves_nothing_but_its_data() {
    let (bed, worker) = Bed::with_worker().await;
    let source = "def turn(body, request):\n    open(os.path.join(os.environ['HOME'], 'hanging'), 'w').write('x')\n    time.sleep(3600)\n";
    let version = bed.deploy("gone", &agent(source), "replicas = 2\n").await;
    let claims = bed.ready("gone", version).await;
    let home = bed.dir.path().join("agents/gone");
    let files = std::fs::read_dir(&home)
        .unwrap()
        .flatten()
        .next()
        .unwrap()
        .path();
    std::fs::create_dir(home.join("data")).unwrap();
    let mut session = bed.session("gone").await;
    let sent = session.send(&bed, "hang").await;
    file_of(files.join("hanging"), 1).await;
    bed.delete("gone").await;
    session.end(&bed, sent).await.failed("agent_deleted");
    bed.claims_until("gone", "given up", |claims| claims.is_empty())
        .await;
    for claim in claims.values() {
        gone(claim.pid).await;
    }
    let empty = async {
        while files.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    crate::bed::within("removing the files", empty).await;
    assert!(home.join("data").exists());
    // Deployed again, it runs again.
    bed.deploy("gone", &agent(ECHO), "").await;
    assert_eq!(
        bed.session("gone").await.say(&bed, "back").await.done(),
        "back"
    );
    worker.stop().await;
}

#[tokio::test]
async fn draining_finishes_the_turns_that_run() {
    let (bed, worker) = Bed::with_worker().await;
    let source = "def turn(body, request):\n    open(os.path.join(os.environ['HOME'], 'begun'), 'w').write('x')\n    time.sleep(0.7)\n    return 'finished'\n";
    let version = bed.deploy("slow", &agent(source), "").await;
    let pid = bed.ready("slow", version).await[&0].pid;
    let mut session = bed.session("slow").await;
    let sent = session.send(&bed, "hi").await;
    let files = std::fs::read_dir(bed.dir.path().join("agents/slow")).unwrap();
    file_of(files.flatten().next().unwrap().path().join("begun"), 1).await;
    worker.stop().await;
    assert_eq!(session.end(&bed, sent).await.done(), "finished");
    assert!(!lives(pid), "the agent outlived its worker");
}

#[tokio::test]
async fn what_an_agent_started_ends_with_it() {
    let (bed, worker) = Bed::with_worker().await;
    let source = r#"
import subprocess
child = subprocess.Popen(["sleep", "3600"])
def turn(body, request):
    return str(child.pid)
"#;
    bed.deploy("parent", &agent(source), "").await;
    let child: u32 = bed
        .session("parent")
        .await
        .say(&bed, "hi")
        .await
        .done()
        .parse()
        .unwrap();
    assert!(lives(child));
    worker.stop().await;
    gone(child).await;
}
