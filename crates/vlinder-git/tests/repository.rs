//! The repository, as the real `git` program sees it.

use bytes::Bytes;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use vlinder_bus::local::{LocalBus, LocalOptions};
use vlinder_bus::{Bus, Message, StreamName, Subject};
use vlinder_core::hash::call_key;
use vlinder_core::record::{
    BranchStart, CallResult, CallStatus, End, Invoke, Outcome, Repair, Request, SessionEvent,
    SessionVerb,
};
use vlinder_core::{
    AgentName, BranchName, Namespace, Node, NodeHash, Selector, SessionId, SubmissionId, WorkerRole,
};
use vlinder_git::REPOSITORY;
use vlinder_worker::{Control, WorkerCx, WorkerId};

const DEADLINE: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Said(Mutex<Vec<String>>);

impl Control for Said {
    fn ready(&self) {
        self.0.lock().unwrap().push("ready".into());
    }
    fn waiting(&self, reason: &str) {
        self.0.lock().unwrap().push(format!("waiting: {reason}"));
    }
    fn held(&self, _: &str) {}
    fn released(&self, _: &str) {}
    fn note(&self, _: &str, _: &str) {}
}

struct Bed {
    dir: tempfile::TempDir,
    bus: Bus,
}

struct Worker {
    path: PathBuf,
    said: Arc<Said>,
    drain: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), vlinder_worker::Error>>,
}

/// The end of a line of turns.
#[derive(Clone)]
struct Line {
    session: SessionId,
    branch: BranchName,
    parent: NodeHash,
    previous: Option<SubmissionId>,
    turns: u64,
}

fn ns() -> Namespace {
    Namespace::default_ns()
}

/// A branch that begins at the end of a line.
fn start_of(line: &Line, name: &str) -> BranchStart {
    BranchStart {
        branch: BranchName::new(name).unwrap(),
        of: line.branch.clone(),
        from: line.parent,
        submission: line.previous.clone(),
    }
}

fn agent() -> AgentName {
    AgentName::new("echo").unwrap()
}

impl Bed {
    async fn start() -> Self {
        // What the worker warns of is shown when a test fails.
        let log = tracing_subscriber::fmt().with_test_writer().try_init();
        drop(log);
        let dir = tempfile::tempdir().unwrap();
        let local = LocalBus::open(LocalOptions::new(dir.path().join("bus.db"))).await;
        let bus = Bus::new(local.unwrap());
        bus.prepare(&ns()).await.unwrap();
        Self { dir, bus }
    }

    fn worker(&self, name: &str, index: u32) -> Worker {
        let data_dir = self.dir.path().join(name);
        std::fs::create_dir_all(&data_dir).unwrap();
        let (said, drain) = (Arc::new(Said::default()), CancellationToken::new());
        let id = WorkerId {
            node: name.parse().unwrap(),
            role: WorkerRole::DagGit,
            index,
        };
        let cx = WorkerCx::new(
            id,
            self.bus.clone(),
            ns(),
            data_dir.clone().into(),
            said.clone(),
            drain.clone(),
        );
        let task = tokio::spawn(vlinder_git::run(cx));
        Worker {
            path: data_dir.join(REPOSITORY),
            said,
            drain,
            task,
        }
    }

    async fn append(
        &self,
        stream: StreamName,
        subject: Subject,
        node: Node,
        body: &[u8],
    ) -> NodeHash {
        let message = Message::new(stream, subject, node, Bytes::copy_from_slice(body));
        self.bus.append(message).await.unwrap().hash
    }

    async fn event(
        &self,
        session: &SessionId,
        name: &str,
        verb: SessionVerb,
        parents: Vec<NodeHash>,
    ) -> NodeHash {
        let event = SessionEvent {
            namespace: ns(),
            session: session.clone(),
            agent: agent(),
            name: name.into(),
            verb,
        };
        let subject = Subject::Session {
            ns: ns(),
            session: session.clone(),
        };
        self.append(
            StreamName::Ctl(ns()),
            subject,
            event.to_node(parents, b""),
            b"",
        )
        .await
    }

    async fn session(&self, id: &str, name: &str) -> Line {
        let session = SessionId::new(id).unwrap();
        let parent = self.event(&session, name, SessionVerb::Start, vec![]).await;
        Line {
            session,
            branch: BranchName::main(),
            parent,
            previous: None,
            turns: 0,
        }
    }

    async fn fork(&self, line: &Line, name: &str) -> Line {
        let branch = BranchName::new(name).unwrap();
        let verb = SessionVerb::Fork(start_of(line, name));
        self.event(&line.session, "x", verb, vec![]).await;
        Line {
            branch,
            ..line.clone()
        }
    }

    /// A turn with calls: (operation, request, response). Returns its invoke.
    async fn turn(
        &self,
        line: &mut Line,
        submission: &str,
        input: &[u8],
        calls: &[(&str, &[u8], &[u8])],
        reply: &[u8],
    ) -> NodeHash {
        let (log, submission) = (
            StreamName::Log(ns()),
            SubmissionId::new(submission).unwrap(),
        );
        let invoke = Invoke {
            namespace: ns(),
            agent: agent(),
            session: line.session.clone(),
            branch: line.branch.clone(),
            submission: submission.clone(),
            turn: line.turns,
            previous: line.previous.clone(),
            state: None,
            timeout_ms: 60_000,
            origin: None,
            source: None,
        };
        let subject = Subject::Invoke {
            ns: ns(),
            agent: agent(),
            session: line.session.clone(),
            branch: line.branch.clone(),
        };
        let first = self
            .append(
                log.clone(),
                subject,
                invoke.to_node(vec![line.parent], input),
                input,
            )
            .await;
        let mut last = first;
        for (k, (operation, body, answer)) in calls.iter().enumerate() {
            let key = call_key("kv", operation, "sqlite", "_", body, k as u64);
            let request = Request {
                namespace: ns(),
                submission: submission.clone(),
                agent: agent(),
                service: "kv".into(),
                backend: "sqlite".into(),
                operation: (*operation).into(),
                selector: Selector::none(),
                key,
                k: k as u64,
                state: None,
                label: None,
                deadline_ms: 1,
            };
            let subject = Subject::Req {
                ns: ns(),
                service: "kv".into(),
                backend: "sqlite".into(),
                selector: Selector::none(),
            };
            let asked = self
                .append(
                    log.clone(),
                    subject,
                    request.to_node(vec![last], body),
                    body,
                )
                .await;
            let result = CallResult {
                submission: submission.clone(),
                key,
                status: CallStatus::Ok,
                http: 200,
                content_type: "application/json".into(),
                state: None,
                found: None,
                tokens_in: Some(3),
                tokens_out: Some(4),
            };
            let subject = Subject::Call {
                ns: ns(),
                submission: submission.clone(),
            };
            last = self
                .append(log.clone(), subject, result.to_node(asked, answer), answer)
                .await;
        }
        let end = End {
            namespace: ns(),
            agent: agent(),
            session: line.session.clone(),
            branch: line.branch.clone(),
            submission: submission.clone(),
            outcome: Outcome::Done,
            state: None,
            code: None,
        };
        let subject = Subject::End {
            ns: ns(),
            submission: submission.clone(),
        };
        line.parent = self
            .append(log, subject, end.to_node(vec![last], reply), reply)
            .await;
        line.previous = Some(submission);
        line.turns += 1;
        first
    }
}

impl Worker {
    async fn stop(self) {
        self.drain.cancel();
        tokio::time::timeout(DEADLINE, self.task)
            .await
            .expect("it drains")
            .unwrap()
            .unwrap();
    }

    /// Waits until a ref has so many commits.
    async fn has(&self, name: &str, commits: usize) {
        let name = format!("refs/heads/{name}");
        wait_for(&format!("{name} with {commits} commits"), || {
            let count = try_git(&self.path, &["rev-list", "--count", &name]).unwrap_or_default();
            (count.trim() == commits.to_string(), count)
        })
        .await;
    }
}

async fn wait_for(what: &str, mut check: impl FnMut() -> (bool, String)) {
    let until = Instant::now() + DEADLINE;
    loop {
        let (done, seen) = check();
        if done {
            return;
        }
        assert!(Instant::now() < until, "no {what}; last seen: {seen}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn try_git(dir: &Path, args: &[&str]) -> Result<String, String> {
    let mut command = Command::new("git");
    command
        .args(["-c", "safe.directory=*", "-C"])
        .arg(dir)
        .args(args);
    let output = command
        .output()
        .expect("git is installed: apt-get install git");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(text(&output.stdout) + &text(&output.stderr)),
    }
}

fn git(dir: &Path, args: &[&str]) -> String {
    try_git(dir, args).unwrap_or_else(|error| panic!("git {args:?}: {error}"))
}

/// Every ref with its commit, and `HEAD`.
fn dump(dir: &Path) -> String {
    git(dir, &["for-each-ref"]) + &git(dir, &["symbolic-ref", "HEAD"])
}

#[tokio::test]
async fn a_clone_shows_sessions_as_branches_and_turns_as_commits() {
    let bed = Bed::start().await;
    let worker = bed.worker("here", 0);
    let mut line = bed.session("s-1", "demo").await;
    let put = [(
        "put",
        &br#"{"path":"/n","content":"1"}"#[..],
        &br#"{"state":"aa"}"#[..],
    )];
    bed.turn(
        &mut line,
        "t-1",
        b"hello there",
        &put,
        b"hi, you are visitor 1",
    )
    .await;
    let mut fork = bed.fork(&line, "what-if").await;
    bed.turn(&mut line, "t-2", b"again", &put, b"visitor 2")
        .await;
    bed.turn(&mut fork, "t-3", b"otherwise", &[], b"other")
        .await;
    let bare = bed.fork(&fork, "untouched").await;
    assert_eq!(bare.turns, 2);
    worker.has("demo/main", 2).await;
    worker.has("demo/what-if", 2).await;
    worker.has("demo/untouched", 2).await;

    let clone = bed.dir.path().join("clone");
    git(
        bed.dir.path(),
        &["clone", "-q", worker.path.to_str().unwrap(), "clone"],
    );
    let log = git(&clone, &["log", "--format=%an|%s", "origin/demo/main"]);
    assert_eq!(log, "echo|again\necho|hello there\n");
    let base = git(
        &clone,
        &["merge-base", "origin/demo/main", "origin/demo/what-if"],
    );
    assert_eq!(
        base,
        git(&clone, &["rev-parse", "origin/demo/main~1"]),
        "forks share history"
    );
    let trailers = git(
        &clone,
        &[
            "log",
            "-1",
            "--format=%(trailers:key=Tokens,valueonly)%(trailers:key=Session,valueonly)",
            "origin/demo/main",
        ],
    );
    assert_eq!(trailers, "3 in, 4 out\ns-1\n\n");
    let files = git(
        &clone,
        &["ls-tree", "-r", "--name-only", "origin/demo/main"],
    );
    for file in [
        "session.json",
        "turns/0001/input.md",
        "turns/0002/output.md",
        "turns/0002/turn.json",
        "turns/0001/calls/001-kv-put/request.json",
        "turns/0001/calls/001-kv-put/response.json",
        "turns/0001/calls/001-kv-put/call.json",
    ] {
        assert!(
            files.lines().any(|line| line == file),
            "{file} is not in {files}"
        );
    }
    let request = git(
        &clone,
        &[
            "show",
            "origin/demo/main:turns/0001/calls/001-kv-put/request.json",
        ],
    );
    assert_eq!(request, "{\n  \"path\": \"/n\",\n  \"content\": \"1\"\n}\n");
    let diff = git(
        &clone,
        &[
            "diff",
            "origin/demo/main",
            "origin/demo/what-if",
            "--",
            "turns/*/output.md",
        ],
    );
    assert!(
        diff.contains("-visitor 2") && diff.contains("+other"),
        "{diff}"
    );
    git(&worker.path, &["fsck", "--strict", "--full"]);
    // What was cloned is checked out: the line on which a turn ended last.
    assert!(clone.join("turns/0002/input.md").exists());
    worker.stop().await;
}

/// Forks inside of a turn, repairs and promotions are refs too, and a line that leaves a turn before its
/// end does not show what that turn said.
#[tokio::test]
async fn every_event_that_makes_a_branch_makes_a_ref() {
    let bed = Bed::start().await;
    let worker = bed.worker("here", 0);
    let mut line = bed.session("s-1", "demo").await;
    let beginning = line.clone();
    bed.turn(&mut line, "t-1", b"one", &[], b"first").await;
    let before = line.clone();
    let invoke = bed.turn(&mut line, "t-2", b"two", &[], b"second").await;

    // Inside of the second turn: without turns of its own, and with one.
    let cut = Line {
        parent: invoke,
        ..line.clone()
    };
    bed.fork(&cut, "inside").await;
    let mut on = bed.fork(&cut, "inside-on").await;
    bed.turn(&mut on, "t-3", b"three", &[], b"third").await;
    // Where the session began.
    let mut anew = bed.fork(&beginning, "anew").await;
    bed.turn(&mut anew, "t-4", b"one, again", &[], b"other")
        .await;
    let repair = Repair {
        turn: SubmissionId::new("t-2").unwrap(),
        request: invoke,
        http: None,
        content_type: None,
    };
    let verb = SessionVerb::Repair(start_of(&before, "fixed"), repair);
    bed.event(&line.session, "demo", verb, vec![]).await;
    let verb = SessionVerb::Promote {
        branch: BranchName::new("fixed").unwrap(),
        sealed: Some(start_of(&line, "main-2026-11-25")),
    };
    bed.event(&line.session, "demo", verb, vec![]).await;

    worker.has("demo/main", 2).await;
    worker.has("demo/inside", 1).await;
    worker.has("demo/inside-on", 2).await;
    worker.has("demo/anew", 1).await;
    worker.has("demo/fixed", 1).await;
    worker.has("demo/main-2026-11-25", 2).await;
    let files = git(
        &worker.path,
        &["ls-tree", "-r", "--name-only", "demo/inside-on"],
    );
    assert!(files.contains("turns/0003/output.md"), "{files}");
    assert!(!files.contains("turns/0002"), "{files}");
    let same = git(&worker.path, &["rev-parse", "demo/main"]);
    assert_eq!(
        git(&worker.path, &["rev-parse", "demo/main-2026-11-25"]),
        same
    );
    git(&worker.path, &["fsck", "--strict", "--full"]);
    let live = git(&worker.path, &["for-each-ref"]);
    worker.stop().await;
    let fresh = bed.worker("there", 0);
    fresh.has("demo/inside-on", 2).await;
    fresh.has("demo/main-2026-11-25", 2).await;
    fresh.has("demo/fixed", 1).await;
    assert_eq!(git(&fresh.path, &["for-each-ref"]), live);
    fresh.stop().await;
}

#[tokio::test]
async fn hostile_content_is_only_content() {
    let bed = Bed::start().await;
    let worker = bed.worker("here", 0);
    let names = [
        "../../etc",
        "a\0b\n",
        "",
        "twin",
        "twin",
        "s-7",
        ".git",
        "x.lock",
    ];
    for (index, name) in names.iter().enumerate() {
        let mut line = bed.session(&format!("s-{index}"), name).await;
        let huge = vec![b'z'; 2_000_000];
        let deep = "[".repeat(60_000);
        let calls: [(&str, &[u8], &[u8]); 4] = [
            ("../../..", b"\xff\xfe\0", b"\x1b[31m\0"),
            (".git", &huge, b"{\"a\":"),
            ("put\n/", b"", deep.as_bytes()),
            ("", b"Hash: 00\n\nSession: forged", b"{}"),
        ];
        let input = b"\0\xff<script>\x1b[2J\r\n\nSession: forged\nauthor evil <e@x> 0 +0000";
        bed.turn(&mut line, &format!("t-{index}"), input, &calls, &huge)
            .await;
    }
    for name in ["s-0", "s-1", "s-2", "twin", "s-4", "s-7", "s-6", "s-7-2"] {
        // The session called "s-7" has the name; the one with that id is called otherwise.
        worker.has(&format!("{name}/main"), 1).await;
    }
    let refs = git(&worker.path, &["for-each-ref", "--format=%(refname)"]);
    assert_eq!(refs.lines().count(), names.len(), "{refs}");
    git(&worker.path, &["fsck", "--strict", "--full"]);
    let files = git(&worker.path, &["ls-tree", "-r", "--name-only", "twin/main"]);
    assert!(files.contains("output.elsewhere.json"), "{files}");
    assert!(
        files
            .lines()
            .all(|line| !line.contains("..") && !line.contains(".git")),
        "{files}"
    );
    let session = git(
        &worker.path,
        &[
            "log",
            "-1",
            "--format=%(trailers:key=Session,valueonly)",
            "twin/main",
        ],
    );
    assert_eq!(session.trim(), "s-3");
    worker.stop().await;
}

#[tokio::test]
async fn a_deleted_repository_comes_back_equal_under_load() {
    let bed = Bed::start().await;
    let worker = bed.worker("here", 0);
    let mut lines = Vec::new();
    for session in 0..4 {
        lines.push(
            bed.session(&format!("s-{session}"), &format!("chat-{session}"))
                .await,
        );
    }
    for turn in 0..60 {
        for (index, line) in lines.iter_mut().enumerate() {
            let call = [("put", &b"{\"a\":1}"[..], &b"{}"[..])];
            bed.turn(
                line,
                &format!("t-{index}-{turn}"),
                format!("input {turn}").as_bytes(),
                &call,
                b"ok",
            )
            .await;
        }
        if turn == 20 {
            worker.has("chat-0/main", 21).await;
            std::fs::remove_dir_all(&worker.path).unwrap();
        }
        if turn == 40 {
            // While it writes; `rm` says so when new files come under it, and removes the others.
            let _ = Command::new("rm").arg("-rf").arg(&worker.path).output();
        }
    }
    for index in 0..4 {
        worker.has(&format!("chat-{index}/main"), 60).await;
    }
    let path = worker.path.clone();
    git(&path, &["fsck", "--strict", "--full"]);
    let live = dump(&path);
    worker.stop().await;
    let fresh = bed.worker("there", 0);
    for index in 0..4 {
        fresh.has(&format!("chat-{index}/main"), 60).await;
    }
    assert_eq!(dump(&fresh.path), live);
    fresh.stop().await;
}

#[tokio::test]
async fn a_killed_writer_leaves_a_valid_repository_and_the_next_goes_on() {
    let bed = Bed::start().await;
    let mut line = bed.session("s-1", "demo").await;
    for round in 0..8 {
        let worker = bed.worker("here", 0);
        for turn in 0..10 {
            bed.turn(
                &mut line,
                &format!("t-{round}-{turn}"),
                b"hello",
                &[("get", b"{}", b"{}")],
                b"ok",
            )
            .await;
        }
        tokio::time::sleep(Duration::from_millis(13 * round)).await;
        // Aborted wherever it is; the threads it started finish on their own.
        worker.task.abort();
        let _ = worker.task.await;
        if worker.path.join("HEAD").exists() {
            let locks = worker.path.join("refs/heads/demo");
            std::fs::create_dir_all(&locks).unwrap();
            std::fs::write(locks.join("main.lock"), "").unwrap();
            git(&worker.path, &["fsck", "--strict", "--full"]);
        }
    }
    let worker = bed.worker("here", 0);
    worker.has("demo/main", 80).await;
    let live = dump(&worker.path);
    git(&worker.path, &["fsck", "--strict", "--full"]);
    worker.stop().await;
    let fresh = bed.worker("there", 0);
    fresh.has("demo/main", 80).await;
    assert_eq!(dump(&fresh.path), live);
    fresh.stop().await;
}

#[tokio::test]
async fn one_writes_and_the_other_waits_for_it() {
    let bed = Bed::start().await;
    let one = bed.worker("here", 0);
    wait_for("writer", || {
        (
            one.said.0.lock().unwrap().contains(&"ready".to_owned()),
            String::new(),
        )
    })
    .await;
    let two = bed.worker("here", 1);
    let waits = "waiting: here/dag_git/0 writes the git repository".to_owned();
    wait_for("one who waits", || {
        (two.said.0.lock().unwrap().contains(&waits), String::new())
    })
    .await;
    one.stop().await;
    wait_for("successor", || {
        (
            two.said.0.lock().unwrap().contains(&"ready".to_owned()),
            String::new(),
        )
    })
    .await;
    two.stop().await;
}

/// `cargo test -p vlinder-git -- --ignored --nocapture cost`
#[tokio::test]
#[ignore = "a measurement: two minutes"]
async fn cost_of_a_turn_does_not_grow() {
    const TURNS: u64 = 2000;
    let bed = Bed::start().await;
    let mut line = bed.session("s-1", "long").await;
    let calls = [
        ("put", &b"{\"a\":1}"[..], &b"{}"[..]),
        ("get", &b"{}"[..], &b"x"[..]),
    ];
    for turn in 0..TURNS {
        bed.turn(
            &mut line,
            &format!("t-{turn}"),
            format!("question {turn}").as_bytes(),
            &calls,
            b"answer",
        )
        .await;
    }
    let worker = bed.worker("here", 0);
    let began = Instant::now();
    for part in 1..=4 {
        let wanted = TURNS / 4 * part;
        wait_for("commits", || {
            let count = try_git(
                &worker.path,
                &["rev-list", "--count", "refs/heads/long/main"],
            )
            .unwrap_or_default();
            (count.trim().parse::<u64>().unwrap_or(0) >= wanted, count)
        })
        .await;
        eprintln!("{wanted} turns after {:?}", began.elapsed());
    }
    let objects = git(&worker.path, &["count-objects", "-v"]);
    eprintln!("{objects}");
    worker.stop().await;
}
