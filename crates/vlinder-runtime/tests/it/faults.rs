//! Agents that misbehave, and turns that are ended from outside.

use crate::agents::{ECHO, KV, agent};
use crate::bed::{Bed, Session, file_of, gone};
use bytes::Bytes;
use std::time::{Duration, Instant};
use vlinder_bus::{Message, Subject};
use vlinder_core::record::{End, Outcome};

#[tokio::test]
async fn an_error_of_the_agent_fails_the_turn_in_its_words() {
    let (bed, worker) = Bed::with_worker().await;
    let source =
        "def turn(body, request):\n    request.reply(500, b'no luck today ' + b'x' * 100000)\n";
    bed.deploy("agent", &agent(source), "").await;
    let mut session = bed.session("agent").await;
    let said = session.say(&bed, "hi").await.failed("agent_status");
    assert!(
        said.starts_with("the agent answered 500: no luck today"),
        "{said}"
    );
    assert!(said.len() < 66_000);
    worker.stop().await;
}

/// Answers `/health`, and to everything else what is given, raw.
fn raw_agent(answer: &str) -> String {
    format!(
        r#"
import os, socket, sys, threading, time
server = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
def serve(client):
    data = b""
    while b"\r\n\r\n" not in data:
        piece = client.recv(65536)
        if not piece: return
        data += piece
    if data.startswith(b"GET"):
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    else:
        {answer}
    client.close()
while True:
    client, _ = server.accept()
    threading.Thread(target=serve, args=(client,), daemon=True).start()
"#
    )
}

#[tokio::test]
async fn garbage_fails_the_turn_and_replaces_the_replica() {
    let (bed, worker) = Bed::with_worker().await;
    for (name, answer) in [
        ("noise", r#"client.sendall(os.urandom(4000))"#),
        (
            "badchunk",
            r#"client.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n")"#,
        ),
        (
            "badlength",
            r#"client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nxyz")"#,
        ),
        (
            "headers",
            r#"client.sendall(b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 1000 + b"\r\n")"#,
        ),
    ] {
        let version = bed.deploy(name, &raw_agent(answer), "").await;
        let pid = bed.ready(name, version).await[&0].pid;
        let mut session = bed.session(name).await;
        session.say(&bed, "hi").await.failed("agent_protocol");
        gone(pid).await;
        bed.claims_until(name, "replaced", |claims| {
            claims[&0].state == "ready" && claims[&0].pid != pid
        })
        .await;
    }
    worker.stop().await;
}

#[tokio::test]
async fn an_agent_that_dies_in_every_try_fails_the_turn() {
    let (bed, worker) = Bed::with_worker().await;
    let log = bed.dir.path().join("tries");
    for (name, how) in [
        ("killed", "os.kill(os.getpid(), signal.SIGKILL)".to_owned()),
        ("hangs-up", "request.connection.shutdown(2)".to_owned()),
        ("breaks-off", "request.wfile.write(b'HTTP/1.1 200 OK\\r\\nContent-Length: 99\\r\\n\\r\\nhalf'); request.connection.shutdown(2)".to_owned()),
    ] {
        let source = format!(
            "def turn(body, request):\n    open({:?}, 'a').write('x')\n    {how}\n",
            log.join(name).display().to_string()
        );
        std::fs::create_dir_all(&log).unwrap();
        bed.deploy(name, &agent(&source), "").await;
        let mut session = bed.session(name).await;
        let said = session.say(&bed, "hi").await.failed("agent_died");
        assert!(said.starts_with("the agent died 3 times"), "{said}");
        assert_eq!(std::fs::read_to_string(log.join(name)).unwrap(), "xxx");
    }
    worker.stop().await;
}

#[tokio::test]
async fn an_agent_that_never_starts_fails_its_turns_with_its_own_words() {
    let (bed, worker) = Bed::with_worker().await;
    let source = "import sys\nsys.exit('I need a library that is not here')\n";
    bed.deploy_only("broken", source, "").await;
    let mut session = bed.session("broken").await;
    let said = session.say(&bed, "hi").await.failed("agent_unreachable");
    assert!(said.contains("exited with code 1"), "{said}");
    assert!(said.contains("a library that is not here"), "{said}");
    let claims = bed
        .claims_until("broken", "crash-looping", |claims| {
            claims
                .get(&0)
                .is_some_and(|claim| claim.state == "crash-looping" && claim.restarts >= 3)
        })
        .await;
    assert!(
        claims[&0].reason.contains("a library that is not here"),
        "{claims:?}"
    );

    bed.deploy_only("missing", "", "executable = '/no/such/program --now'\n")
        .await;
    let said = bed
        .session("missing")
        .await
        .say(&bed, "hi")
        .await
        .failed("agent_unreachable");
    assert!(said.contains("/no/such/program"), "{said}");
    // A good version mends it.
    bed.deploy("broken", &agent(ECHO), "").await;
    assert_eq!(session.say(&bed, "hi").await.done(), "hi");
    worker.stop().await;
}

const HANGS_ON_DEMAND: &str = r#"
def turn(body, request):
    if b"hang" in body.splitlines()[-1]:
        open(os.path.join(os.environ["HOME"], "hanging"), "w").write("x")
        time.sleep(3600)
    return "fine"
"#;

async fn hangs(bed: &Bed, name: &str) -> (Session, u32) {
    let version = bed.deploy(name, &agent(HANGS_ON_DEMAND), "").await;
    let pid = bed.ready(name, version).await[&0].pid;
    (bed.session(name).await, pid)
}

#[tokio::test]
async fn a_turn_ends_at_its_deadline_and_the_replica_is_replaced() {
    let (bed, worker) = Bed::with_worker().await;
    let (mut session, pid) = hangs(&bed, "slow").await;
    session.timeout_ms = 700;
    let began = Instant::now();
    let turn = session.say(&bed, "hang").await;
    let took = began.elapsed();
    assert_eq!(turn.end.outcome, Outcome::Deadline, "{}", turn.text());
    assert!(
        took >= Duration::from_millis(600) && took < Duration::from_millis(1700),
        "{took:?}"
    );
    gone(pid).await;
    session.timeout_ms = 20_000;
    // A turn that did not end well leaves nothing in the conversation.
    let next = session.say(&bed, "go on").await;
    assert_eq!(next.done(), "fine");
    worker.stop().await;
}

#[tokio::test]
async fn a_cancelled_turn_ends_at_once_and_its_replica_is_replaced() {
    let (bed, worker) = Bed::with_worker().await;
    let (mut session, pid) = hangs(&bed, "slow").await;
    let sent = session.send(&bed, "hang").await;
    let files = bed.dir.path().join("agents/slow");
    let home = std::fs::read_dir(files)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    file_of(home.join("hanging"), 1).await;
    let end = End {
        namespace: bed.cx.ns.clone(),
        agent: session.agent.clone(),
        session: session.session.clone(),
        branch: session.branch.clone(),
        submission: sent.submission.clone(),
        outcome: Outcome::Cancelled,
        state: None,
        code: None,
    };
    let subject = Subject::End {
        ns: bed.cx.ns.clone(),
        submission: sent.submission.clone(),
    };
    let node = end.to_node(vec![sent.hash], b"");
    let began = Instant::now();
    bed.bus
        .append(Message::new(bed.log(), subject, node, Bytes::new()).expecting(0))
        .await
        .unwrap();
    gone(pid).await;
    assert!(
        began.elapsed() < Duration::from_secs(1),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(
        session.end(&bed, sent).await.end.outcome,
        Outcome::Cancelled
    );
    assert_eq!(session.say(&bed, "go on").await.done(), "fine");
    worker.stop().await;
}

#[tokio::test]
async fn a_turn_that_was_cancelled_while_it_waited_is_not_begun() {
    let bed = Bed::new().await;
    let touched = bed.dir.path().join("touched");
    let source = format!(
        "def turn(body, request):\n    open({:?}, 'w')\n    return 'ran'\n",
        touched.display().to_string()
    );
    bed.deploy_only("late", &agent(&source), "").await;
    let mut session = bed.session("late").await;
    let sent = session.send(&bed, "hi").await;
    let end = End {
        namespace: bed.cx.ns.clone(),
        agent: session.agent.clone(),
        session: session.session.clone(),
        branch: session.branch.clone(),
        submission: sent.submission.clone(),
        outcome: Outcome::Cancelled,
        state: None,
        code: None,
    };
    let subject = Subject::End {
        ns: bed.cx.ns.clone(),
        submission: sent.submission.clone(),
    };
    let node = end.to_node(vec![sent.hash], b"");
    bed.bus
        .append(Message::new(bed.log(), subject, node, Bytes::new()).expecting(0))
        .await
        .unwrap();
    session.end(&bed, sent).await;
    tokio::time::sleep(Duration::from_millis(60)).await;
    let worker = bed.worker("test", 0);
    let mut other = bed.session("late").await;
    assert_eq!(other.say(&bed, "hi").await.done(), "ran");
    std::fs::remove_file(&touched).unwrap();
    assert_eq!(session.say(&bed, "hi").await.done(), "ran");
    worker.stop().await;
}

#[tokio::test]
async fn a_flood_of_output_hurts_nobody() {
    let (bed, worker) = Bed::with_worker().await;
    let flood = r#"
def flood(out):
    line = ("y" * 500 + "\n") * 200
    while True:
        out.write(line)
threading.Thread(target=flood, args=(sys.stdout,), daemon=True).start()
threading.Thread(target=flood, args=(sys.stderr,), daemon=True).start()
def turn(body, request):
    return body
"#;
    bed.deploy("flood", &agent(flood), "").await;
    bed.deploy("echo", &agent(ECHO), "").await;
    // How long turns take says more about the machine than about us; what the flood costs us does not.
    let (began, cpu) = (Instant::now(), own_cpu());
    for number in 0..20 {
        let turn = bed
            .session("echo")
            .await
            .say(&bed, format!("{number}"))
            .await;
        assert_eq!(turn.done(), number.to_string());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let share = (own_cpu() - cpu).as_secs_f64() / began.elapsed().as_secs_f64();
    assert!(share < 0.2, "the flood takes {share:.2} of a core");
    let mut own = bed.session("flood").await;
    assert_eq!(own.say(&bed, "hi").await.done(), "hi");
    let size = std::fs::metadata(bed.dir.path().join("logs/agents/flood.jsonl"))
        .unwrap()
        .len();
    assert!(
        size < 4 * 1024 * 1024,
        "{size} bytes of log after two seconds"
    );
    worker.stop().await;
}

/// What this process has used of the processor (proc(5): user and system time, in 1/100 s).
fn own_cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

#[tokio::test]
async fn twenty_mebibytes_go_in_and_out_unchanged() {
    let (bed, worker) = Bed::with_worker().await;
    bed.deploy("echo", &agent(ECHO), "").await;
    // Not UTF-8, and no two pages alike.
    let body: Vec<u8> = (0..20 * 1024 * 1024u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let body = Bytes::from(body);
    let turn = bed.session("echo").await.say(&bed, body.clone()).await;
    turn.end.outcome.to_string();
    assert_eq!(turn.end.outcome, Outcome::Done, "{:?}", turn.end.code);
    assert!(turn.body == body, "{} bytes came back", turn.body.len());
    worker.stop().await;
}

#[tokio::test]
async fn an_answer_without_end_is_cut_off() {
    let (bed, worker) = Bed::with_worker().await;
    let source = r#"
def turn(body, request):
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    piece = b"100000\r\n" + b"z" * 0x100000 + b"\r\n"
    try:
        while True:
            request.wfile.write(piece)
    except OSError:
        pass
"#;
    bed.deploy("endless", &agent(source), "").await;
    let said = bed
        .session("endless")
        .await
        .say(&bed, "hi")
        .await
        .failed("agent_output_too_large");
    assert!(said.contains("67108864"), "{said}");
    worker.stop().await;
}

#[tokio::test]
async fn an_agent_that_answers_and_dies_has_answered() {
    let (bed, worker) = Bed::with_worker().await;
    let source = r#"
def turn(body, request):
    put("said", "yes", request.invocation)
    request.reply(200, b"my last words")
    request.wfile.flush()
    os._exit(0)
"#;
    bed.deploy("mortal", &agent(source), KV).await;
    let mut session = bed.session("mortal").await;
    for _ in 0..5 {
        assert_eq!(session.say(&bed, "hi").await.done(), "my last words");
    }
    worker.stop().await;
}
