//! Who wins, who loses, and who runs.

use crate::bed::{Bed, log};
use vlinder_core::record::Outcome;
use vlinder_proto::state as proto;
use vlinder_worker::nodes::{self, HeldJob, NodeReport, WorkerReport};

fn statuses(detail: &proto::TurnDetail) -> Vec<(u32, &str, &str)> {
    let calls = detail.calls.iter().map(|call| call.call.as_ref().unwrap());
    calls
        .map(|call| (call.seq, call.status.as_str(), call.hash.as_str()))
        .collect()
}

#[tokio::test]
async fn the_first_result_wins_and_the_other_stays_visible() {
    let bed = Bed::start().await;
    let mut line = bed.session("s-1", "").await;
    let mut turn = bed.begin(&mut line, "t-1", b"?").await;
    let asked = bed.ask(&turn, "chat", b"?").await;
    let first = bed.answer(&mut turn, &asked, b"one").await.to_string();
    let second = bed.answer_unheard(&turn, &asked, b"two").await.to_string();
    let next = bed.ask(&turn, "put", b"{}").await;
    let expected = |last: &'static str| {
        [
            (1, "ok", first.clone()),
            (1, "abandoned", second.clone()),
            (2, last, next.hash.to_string()),
        ]
    };
    let open = bed.get_turn("t-1").await.unwrap();
    let seen: Vec<_> = statuses(&open)
        .into_iter()
        .map(|(seq, status, hash)| (seq, status, hash.to_owned()))
        .collect();
    assert_eq!(seen, expected("waiting"));
    assert_eq!(open.calls[1].response, "two");
    // The turn ends without an answer to its last call: what has no answer is not part of it.
    bed.end(&mut line, &turn, b"!").await;
    let ended = bed.get_turn("t-1").await.unwrap();
    let seen: Vec<_> = statuses(&ended)
        .into_iter()
        .map(|(seq, status, hash)| (seq, status, hash.to_owned()))
        .collect();
    assert_eq!(seen, expected("abandoned"));
}

#[tokio::test]
async fn calls_of_an_attempt_that_died_are_abandoned() {
    let bed = Bed::start().await;
    let mut line = bed.session("s-1", "").await;
    let mut turn = bed.begin(&mut line, "t-1", b"?").await;
    // The first attempt got one answer, asked on, and died.
    let one = bed.ask(&turn, "put", b"1").await;
    let result = bed.answer_unheard(&turn, &one, b"{}").await;
    let lost = bed.ask_after(&turn, vec![result], "chat", b"lost").await;
    // The second one went another way after the same answer; it asked its last call twice, with
    // other parents, because it did not know of the first try.
    turn.maximal = vec![result];
    let first_try = bed.ask(&turn, "chat", b"kept").await;
    let second_try = bed
        .ask_after(&turn, vec![turn.invoke], "chat", b"kept")
        .await;
    assert_eq!(first_try.key, second_try.key);
    let kept = bed.answer(&mut turn, &second_try, b"!").await;

    let open = bed.get_turn("t-1").await.unwrap();
    assert_eq!(
        statuses(&open)
            .iter()
            .map(|(_, status, _)| *status)
            .collect::<Vec<_>>(),
        ["ok", "waiting", "abandoned", "ok"]
    );
    turn.maximal = vec![result, kept];
    bed.end(&mut line, &turn, b"!").await;
    bed.answer_unheard(&turn, &lost, b"too late").await;
    let ended = bed.get_turn("t-1").await.unwrap();
    let seen: Vec<_> = statuses(&ended)
        .iter()
        .map(|(_, status, _)| *status)
        .collect();
    assert_eq!(seen, ["ok", "abandoned", "abandoned", "ok"]);
    let session = bed.get_session("s-1").await.unwrap();
    let listed: Vec<_> = session.turns[0]
        .calls
        .iter()
        .map(|call| call.status.as_str())
        .collect();
    assert_eq!(listed, seen);
    assert!(bed.verify("s-1").await.ok);
}

#[tokio::test]
async fn a_deadline_leaves_out_what_was_answered_after_it() {
    let bed = Bed::start().await;
    let mut line = bed.session("s-1", "").await;
    let turn = bed.begin(&mut line, "t-1", b"?").await;
    let asked = bed.ask(&turn, "chat", b"?").await;
    let end = bed
        .end_as(
            &turn,
            Outcome::Deadline,
            Some("deadline"),
            b"it took too long",
        )
        .await;
    bed.answer_unheard(&turn, &asked, b"late").await;
    let late = bed.end_as(&turn, Outcome::Done, None, b"late").await;
    let detail = bed.get_turn("t-1").await.unwrap();
    assert_eq!(statuses(&detail)[0].1, "abandoned");
    let ends: Vec<_> = detail
        .ends
        .iter()
        .map(|end| (end.hash.clone(), end.outcome.as_str()))
        .collect();
    assert_eq!(
        ends,
        [
            (end.hash.to_string(), "deadline"),
            (late.hash.to_string(), "done")
        ]
    );
    let turn = detail.turn.unwrap();
    assert_eq!(
        (turn.status.as_str(), turn.code.as_str()),
        ("deadline", "deadline")
    );
    assert_eq!(turn.output, "it took too long");
    assert!(bed.list_turns(false).await.is_empty());
}

#[tokio::test]
async fn a_node_that_comes_again_changes_nothing_and_is_counted() {
    let bed = Bed::start().await;
    let mut line = bed.session("s-1", "").await;
    let mut turn = bed.begin(&mut line, "t-1", b"?").await;
    let asked = bed.ask(&turn, "put", b"{}").await;
    bed.answer(&mut turn, &asked, b"{}").await;
    bed.end(&mut line, &turn, b"!").await;
    let before = bed.get_turn("t-1").await.unwrap();
    let nodes = bed.status().await.nodes;
    // As after a redrive, or when the dedup window has passed.
    for mut message in [
        turn.result(&asked, b"{}"),
        turn.end(Outcome::Done, None, b"!"),
    ] {
        message.id.push_str(":again");
        bed.append(message).await;
    }
    assert_eq!(bed.get_turn("t-1").await.unwrap(), before);
    let status = bed.status().await;
    assert_eq!(
        (status.nodes, status.duplicates, status.skipped),
        (nodes, 2, 0)
    );
    let verified = bed.verify("s-1").await;
    assert!(verified.ok, "{:?}", verified.problems);
}

#[tokio::test]
async fn another_invoke_of_a_submission_loses() {
    let bed = Bed::start().await;
    let mut one = bed.session("s-1", "").await;
    let mut two = bed.session("s-2", "").await;
    let turn = bed.begin(&mut one, "t-1", b"first").await;
    bed.begin(&mut two, "t-1", b"second").await;
    let detail = bed.get_turn("t-1").await.unwrap();
    assert_eq!(
        (detail.session.as_str(), detail.turn.unwrap().input.as_str()),
        ("s-1", "first")
    );
    assert!(bed.get_session("s-2").await.unwrap().turns.is_empty());
    assert_eq!(bed.status().await.skipped, 1);
    bed.end(&mut one, &turn, b"!").await;
    assert!(bed.verify("s-1").await.ok);
    let problems = bed.verify("s-2").await.problems;
    assert!(
        problems[0].ends_with("is not in the projection"),
        "{problems:?}"
    );
}

#[tokio::test]
async fn running_turns_show_who_holds_them() {
    let bed = Bed::start().await;
    let mut line = bed.session("s-1", "").await;
    let turn = bed.begin(&mut line, "t-1", b"?").await;
    let waiting = &bed.list_turns(false).await[0];
    assert_eq!(
        (waiting.status.as_str(), waiting.node.as_str()),
        ("waiting", "")
    );
    assert_eq!(waiting.reason, "no live worker runs agents");
    assert_eq!(
        (waiting.agent.as_str(), waiting.session.as_str()),
        ("echo", "s-1")
    );

    let mut report = NodeReport {
        node: "gpu.example".into(),
        workers: vec![WorkerReport {
            role: "agent.process".into(),
            index: 3,
            state: "ready".into(),
            jobs: vec![HeldJob {
                job: format!("{}:{}", log(), turn.seq),
                attempt: 2,
            }],
            ..WorkerReport::default()
        }],
        ..NodeReport::default()
    };
    nodes::publish(&bed.bus, &report).await.unwrap();
    let running = &bed.list_turns(false).await[0];
    assert_eq!((running.status.as_str(), running.attempt), ("running", 2));
    assert_eq!(
        (running.node.as_str(), running.worker.as_str()),
        ("gpu.example", "agent.process/3")
    );
    assert!(running.deadline_ms >= running.age_ms + 60_000);
    let detail = bed.get_turn("t-1").await.unwrap();
    assert_eq!(detail.turn.unwrap().status, "running");
    assert_eq!(
        bed.get_session("s-1").await.unwrap().turns[0].status,
        "running"
    );

    report.workers[0].jobs.clear();
    nodes::publish(&bed.bus, &report).await.unwrap();
    let waiting = &bed.list_turns(false).await[0];
    assert_eq!(
        (waiting.status.as_str(), waiting.reason.as_str()),
        ("waiting", "no free replica of agent echo")
    );

    bed.end(&mut line, &turn, b"!").await;
    assert!(bed.list_turns(false).await.is_empty());
    let ended = &bed.list_turns(true).await[0];
    assert_eq!(
        (
            ended.status.as_str(),
            ended.node.as_str(),
            ended.worker.as_str()
        ),
        ("done", "here", "agent.process/1")
    );
}
