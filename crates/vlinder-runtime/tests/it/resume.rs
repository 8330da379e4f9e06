//! Turns that are begun again: their calls are answered from the record.

use crate::agents::{KV, agent};
use crate::bed::{Bed, file_of, gone};
use std::collections::HashSet;
use vlinder_core::record::Request;

/// Counts up twice, and in between dies if it is told to and has not yet.
const DIES_BETWEEN: &str = r#"
def turn(body, request):
    text = body.decode().splitlines()[-1]
    first = int(get("count", request.invocation) or 0) + 1
    put("count", str(first), request.invocation)
    if "die" in text:
        flag = os.path.join(os.environ["HOME"], "died-" + text.split()[-1])
        if not os.path.exists(flag):
            open(flag, "w").write("x")
            if "wait" in text:
                time.sleep(3600)
            os.kill(os.getpid(), signal.SIGKILL)
    second = int(get("count", request.invocation)) + 1
    put("count", str(second), request.invocation)
    return str(second)
"#;

/// The keys of a turn's requests; every request was made once.
async fn calls_of(bed: &Bed, submission: &vlinder_core::SubmissionId) -> Vec<String> {
    let requests = bed.requests_of(submission).await;
    let keys: HashSet<_> = requests
        .iter()
        .map(|stored| Request::try_from(&stored.node).unwrap().key)
        .collect();
    assert_eq!(keys.len(), requests.len(), "a call was made twice");
    assert_eq!(bed.results_of(submission).await.len(), requests.len());
    requests
        .iter()
        .map(|stored| stored.node.field("operation").unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn a_killed_agent_goes_on_from_the_record() {
    let (bed, worker) = Bed::with_worker().await;
    bed.deploy("mortal", &agent(DIES_BETWEEN), KV).await;
    let mut session = bed.session("mortal").await;
    for number in 1..=4 {
        let turn = session.say(&bed, format!("die {number}")).await;
        assert_eq!(turn.done(), (2 * number).to_string());
        assert_eq!(
            calls_of(&bed, &turn.submission).await,
            ["get", "put", "get", "put"]
        );
    }
    worker.stop().await;
}

#[tokio::test]
async fn a_killed_worker_leaves_its_turn_to_the_next_one() {
    let (bed, worker) = Bed::with_worker().await;
    let version = bed.deploy("mortal", &agent(DIES_BETWEEN), KV).await;
    let pid = bed.ready("mortal", version).await[&0].pid;
    let mut session = bed.session("mortal").await;
    assert_eq!(session.say(&bed, "hi").await.done(), "2");
    let sent = session.send(&bed, "die and wait 7").await;
    let files = std::fs::read_dir(bed.dir.path().join("agents/mortal")).unwrap();
    let home = files.flatten().next().unwrap().path();
    file_of(home.join("died-7"), 1).await;
    worker.kill().await;
    gone(pid).await;
    // The same worker again: it takes its old claim at once, and the work with it.
    let worker = bed.worker("test", 0);
    let turn = session.end(&bed, sent).await;
    assert_eq!(turn.done(), "4");
    assert_eq!(turn.stored.notes["attempt"], "2");
    assert_eq!(
        calls_of(&bed, &turn.submission).await,
        ["get", "put", "get", "put"]
    );
    // A cold worker reads what was said before.
    assert_eq!(session.say(&bed, "again").await.done(), "6");
    worker.stop().await;
}

#[tokio::test]
async fn a_turn_that_takes_another_way_keeps_its_stores_consistent() {
    let (bed, worker) = Bed::with_worker().await;
    // First way: a=1, then dies. Second way: b=2, then a=1, then reads both.
    let source = r#"
def turn(body, request):
    flag = os.path.join(os.environ["HOME"], "died")
    if not os.path.exists(flag):
        put("a", "1", request.invocation)
        get("b", request.invocation)
        open(flag, "w").write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    put("b", "2", request.invocation)
    put("a", "1", request.invocation)
    return f"{get('a', request.invocation)} {get('b', request.invocation)}"
"#;
    bed.deploy("fickle", &agent(source), KV).await;
    let mut session = bed.session("fickle").await;
    let turn = session.say(&bed, "go").await;
    assert_eq!(turn.done(), "1 2");
    let source = "def turn(body, request):\n    return f\"{get('a')} {get('b')}\"\n";
    bed.deploy("fickle", &agent(source), KV).await;
    assert_eq!(session.say(&bed, "read").await.done(), "1 2");
    worker.stop().await;
}

#[tokio::test]
async fn history_is_the_same_for_a_cold_worker_and_on_a_fork() {
    let (bed, worker) = Bed::with_worker().await;
    let source = r#"
def turn(body, request):
    if body.endswith(b"fail"):
        request.reply(500, b"failed")
        return None
    return b"<" + body + b">" if len(body) < 10 else body
"#;
    bed.deploy("echo", &agent(source), "").await;
    let mut session = bed.session("echo").await;
    session.say(&bed, "one").await.done();
    let fork_at = session.clone();
    session.say(&bed, "fail").await.failed("agent_status");
    session.say(&bed, "two").await.done();
    let warm = session.clone().say(&bed, "three").await;
    assert!(
        warm.done()
            .starts_with("User: one\nAgent: <one>\nUser: two\nAgent: User: one"),
        "{}",
        warm.text()
    );
    worker.stop().await;

    let worker = bed.worker("test", 0);
    let mut forked = fork_at.clone();
    forked.branch = vlinder_core::BranchName::new("other").unwrap();
    forked.head = 0;
    let event = vlinder_core::record::SessionEvent {
        namespace: bed.cx.ns.clone(),
        session: forked.session.clone(),
        agent: forked.agent.clone(),
        name: "fork".to_owned(),
        verb: vlinder_core::record::SessionVerb::Fork(vlinder_core::record::BranchStart {
            branch: forked.branch.clone(),
            of: fork_at.branch.clone(),
            from: fork_at.parent,
            submission: fork_at.previous.clone(),
        }),
    };
    let subject = vlinder_bus::Subject::Session {
        ns: bed.cx.ns.clone(),
        session: forked.session.clone(),
    };
    let message = vlinder_bus::Message::new(
        bed.cx.ctl(),
        subject,
        event.to_node(vec![], b""),
        bytes::Bytes::new(),
    );
    bed.bus.append(message).await.unwrap();
    assert_eq!(
        forked.say(&bed, "elsewhere").await.done(),
        "User: one\nAgent: <one>\nUser: elsewhere"
    );
    let again = forked.say(&bed, "on").await.done();
    assert!(
        again.ends_with(
            "User: elsewhere\nAgent: User: one\n Agent: <one>\n User: elsewhere\nUser: on"
        ),
        "{again}"
    );
    worker.stop().await;
}

#[tokio::test]
async fn input_as_json_has_the_history_in_roles() {
    let (bed, worker) = Bed::with_worker().await;
    let source = "Handler.json_input = True\ndef turn(body, request):\n    return body\n";
    bed.deploy("json", &agent(source), "").await;
    let mut session = bed.session("json").await;
    session.say(&bed, "one").await.done();
    let turn = session.say(&bed, "two").await;
    let body: serde_json::Value = serde_json::from_str(&turn.done()).unwrap();
    assert_eq!(body["input"], "two");
    assert_eq!(
        body["history"][0],
        serde_json::json!({"role": "user", "content": "one"})
    );
    assert_eq!(body["history"][1]["role"], "agent");
    assert_eq!(body["session"], session.session.as_str());
    assert_eq!(body["submission"], turn.submission.as_str());
    worker.stop().await;
}
