//! What reads show of a record that is as it should be.

use crate::bed::{Bed, DEADLINE, log, submissions, turn_of};
use futures::StreamExt;
use tonic::{Code, Request as Rpc};
use vlinder_core::Kind;
use vlinder_core::record::Outcome;
use vlinder_proto::state as proto;
use vlinder_proto::state::state_server::State;

#[tokio::test]
async fn a_turn_shows_its_calls_with_bodies_times_and_tokens() {
    let bed = Bed::start().await;
    let mut line = bed.session("s-1", "shopping").await;
    let mut turn = bed.begin(&mut line, "t-1", "grüße".as_bytes()).await;
    let small = bed.ask(&turn, "put", br#"{"path":"a"}"#).await;
    bed.answer(&mut turn, &small, b"\xff\x00").await;
    // One body that the log holds and the projection does not, and one in the blob store.
    let in_log = "é".repeat(5000).into_bytes();
    let in_blob = "é".repeat(50_000).into_bytes();
    let asked = bed.ask(&turn, "chat", &in_log).await;
    let answered = bed.answer(&mut turn, &asked, &in_blob).await;
    let ended = bed.end(&mut line, &turn, b"done").await;

    let session = bed.get_session("s-1").await.unwrap();
    assert_eq!(
        (session.name.as_str(), session.agent.as_str()),
        ("shopping", "echo")
    );
    assert_eq!(
        (session.branch.as_str(), session.default_branch.as_str()),
        ("main", "main")
    );
    assert_eq!((session.turns_total, session.earlier.as_str()), (1, ""));
    let shown = &session.turns[0];
    assert_eq!(
        (shown.input.as_str(), shown.output.as_str()),
        ("grüße", "done")
    );
    assert_eq!(
        (shown.status.as_str(), shown.by.as_str()),
        ("done", "here/agent.process/1")
    );
    assert_eq!(shown.hash, ended.hash.to_string());
    assert_eq!(shown.invoke, turn.invoke.to_string());
    assert!(shown.started_at > 1_600_000_000_000);
    assert_eq!(shown.calls.len(), 2);
    let call = &shown.calls[1];
    assert_eq!((call.seq, call.status.as_str()), (2, "ok"));
    assert_eq!(
        (call.service.as_str(), call.backend.as_str()),
        ("infer", "openai")
    );
    assert_eq!(
        (call.operation.as_str(), call.model.as_str()),
        ("chat", "small-1")
    );
    assert_eq!(
        (call.tokens_in, call.tokens_out),
        (Some(7), Some(i64::MAX as u64))
    );
    assert_eq!(call.hash, answered.to_string());
    assert_eq!(call.key, asked.key.to_string());
    assert_eq!(
        (shown.calls[0].label.as_str(), shown.calls[0].model.as_str()),
        ("before", "")
    );

    let detail = bed.get_turn("t-1").await.unwrap();
    assert_eq!(detail.turn.unwrap().input, "grüße");
    assert_eq!(detail.parents, [line.event.hash.to_string()]);
    let first = &detail.calls[0];
    assert_eq!(
        (first.response.as_str(), first.response_base64),
        ("/wA=", true)
    );
    let second = &detail.calls[1];
    assert_eq!((second.request.len(), second.request_len), (10_000, 10_000));
    assert_eq!(
        (second.response.len(), second.response_len),
        (64 * 1024, 100_000)
    );
    assert!(second.response.chars().all(|c| c == 'é') && !second.response_base64);
    assert_eq!(
        (second.by.as_str(), second.attempt),
        ("gpu/inference.openai/0", 2)
    );
    assert_eq!(
        second.parents,
        [detail.calls[0].call.as_ref().unwrap().hash.clone()]
    );
    assert!(second.answered_at >= second.requested_at);
    assert_eq!(detail.ends.len(), 1);

    assert_eq!(bed.body(&answered.to_string()).await.unwrap(), in_blob);
    assert_eq!(bed.body(&asked.hash.to_string()).await.unwrap(), in_log);
    assert_eq!(bed.body(&ended.hash.to_string()).await.unwrap(), b"done");
    assert!(
        bed.body(&line.event.hash.to_string())
            .await
            .unwrap()
            .is_empty()
    );
}

#[tokio::test]
async fn a_read_sees_every_write_confirmed_before_it_through_any_worker() {
    let bed = Bed::start().await;
    let other = bed.another(1).await;
    let mut line = bed.session("s-1", "").await;
    for n in 0..100 {
        let name = format!("t-{n}");
        let turn = bed.begin(&mut line, &name, b"?").await;
        let seen = turn_of(&other.service(), &name).await.unwrap();
        assert_eq!(seen.turn.unwrap().status, "waiting");
        bed.end(&mut line, &turn, b"!").await;
        let seen = bed.get_turn(&name).await.unwrap();
        assert_eq!(seen.turn.unwrap().output, "!");
    }
}

#[tokio::test]
async fn a_session_is_found_by_id_name_and_unique_prefix() {
    let bed = Bed::start().await;
    bed.session("s-abc1", "Groceries").await;
    bed.session("s-abd2", "twice").await;
    bed.session("s-abd3", "twice").await;
    for text in ["s-abc1", "Groceries", "s-abc"] {
        assert_eq!(bed.get_session(text).await.unwrap().id, "s-abc1", "{text}");
    }
    for text in ["s-abd", "twice"] {
        let error = bed.get_session(text).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(
            error.message().ends_with("it fits s-abd2, s-abd3"),
            "{}",
            error.message()
        );
    }
    let error = bed.get_session("groceires").await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    assert!(
        error.message().contains("did you mean \"Groceries\"?"),
        "{}",
        error.message()
    );
    let error = bed.get_session("something else").await.unwrap_err();
    assert_eq!(error.message(), "session \"something else\" does not exist");
    for n in 0..10 {
        bed.session(&format!("x-{n}"), "").await;
    }
    let error = bed.get_session("x-").await.unwrap_err();
    assert!(
        error.message().contains("x-4, and more"),
        "{}",
        error.message()
    );
}

#[tokio::test]
async fn a_branch_shows_the_turns_before_its_fork() {
    let bed = Bed::start().await;
    let mut main = bed.session("s-1", "").await;
    bed.turn(&mut main, "m-1").await;
    let point = bed.turn(&mut main, "m-2").await;
    bed.turn(&mut main, "m-3").await;
    let mut side = bed.fork(&mut main, &point, "side").await;

    // Before its first turn, the branch ends where it begins.
    let at_fork = branch(&bed, "side").await;
    assert_eq!(submissions(&at_fork.turns), ["m-1", "m-2"]);
    assert_eq!(at_fork.turns_total, 2);

    let end = bed.turn(&mut side, "s-3").await;
    let mut nested = bed.fork(&mut main, &end, "nested").await;
    bed.turn(&mut nested, "n-4").await;
    assert_eq!(
        submissions(&branch(&bed, "nested").await.turns),
        ["m-1", "m-2", "s-3", "n-4"]
    );
    let main_turns = branch(&bed, "").await;
    assert_eq!(submissions(&main_turns.turns), ["m-1", "m-2", "m-3"]);
    assert_eq!(branch(&bed, "side").await.turns[2].branch, "side");

    bed.promote(&mut main, "nested").await;
    let promoted = branch(&bed, "").await;
    assert_eq!(
        (promoted.branch.as_str(), promoted.turns.len()),
        ("nested", 4)
    );
    assert!(branch(&bed, "main").await.sealed && !promoted.sealed);
    let branches = bed.branches("s-1").await;
    let seen: Vec<_> = branches
        .iter()
        .map(|branch| {
            (
                branch.name.as_str(),
                branch.sealed,
                branch.forked_from.clone(),
            )
        })
        .collect();
    let expected = [
        ("main", true, String::new()),
        ("side", false, point.hash.to_string()),
        ("nested", false, end.hash.to_string()),
    ];
    assert_eq!(seen, expected);
    assert_eq!(branches[1].head, end.hash.to_string());

    // While a turn runs, the head is the end before it.
    bed.begin(&mut side, "s-4", b"?").await;
    assert_eq!(bed.branches("s-1").await[1].head, end.hash.to_string());
    assert!(bed.verify("s-1").await.ok);
    let error = bed
        .session_page(proto::GetSessionRequest {
            session: "s-1".into(),
            branch: "sied".into(),
            ..Default::default()
        })
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    assert!(
        error.message().ends_with("it has: main, side, nested"),
        "{}",
        error.message()
    );
}

async fn branch(bed: &Bed, name: &str) -> proto::Session {
    let request = proto::GetSessionRequest {
        session: "s-1".into(),
        branch: name.into(),
        ..Default::default()
    };
    bed.session_page(request).await.unwrap()
}

#[tokio::test]
async fn sessions_are_listed_by_activity_in_pages() {
    let bed = Bed::start().await;
    let mut first = bed.session("s-0", "").await;
    for n in 1..25 {
        bed.session(&format!("s-{n}"), "").await;
    }
    // Activity is told in milliseconds.
    tokio::time::sleep(std::time::Duration::from_millis(3)).await;
    bed.begin(&mut first, "t-1", b"?").await;
    let mut seen = Vec::new();
    let mut before = String::new();
    loop {
        let request = proto::ListSessionsRequest {
            agent: "echo".into(),
            limit: 10,
            before,
            ..Default::default()
        };
        let answer = bed.state.list_sessions(Rpc::new(request)).await.unwrap();
        let answer = answer.into_inner();
        assert!(answer.sessions.len() <= 10);
        seen.extend(answer.sessions);
        before = answer.next;
        if before.is_empty() {
            break;
        }
    }
    assert_eq!(seen.len(), 25);
    assert_eq!(
        (seen[0].id.as_str(), seen[0].status.as_str(), seen[0].turns),
        ("s-0", "running", 1)
    );
    assert!(
        seen[1..]
            .iter()
            .all(|session| session.status == "idle" && session.turns == 0)
    );
    let mut ids: Vec<_> = seen.iter().map(|session| session.id.clone()).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 25);
    let request = proto::ListSessionsRequest {
        agent: "other".into(),
        ..Default::default()
    };
    let answer = bed.state.list_sessions(Rpc::new(request)).await.unwrap();
    assert!(answer.into_inner().sessions.is_empty());
}

#[tokio::test]
async fn a_session_too_large_for_one_answer_comes_in_parts() {
    let bed = Bed::start().await;
    let mut line = bed.session("s-1", "").await;
    let input = vec![b'x'; 60_000];
    for n in 0..500 {
        let turn = bed.begin(&mut line, &format!("t-{n}"), &input).await;
        bed.end(&mut line, &turn, b"!").await;
    }
    let mut parts = Vec::new();
    let mut before = String::new();
    loop {
        let request = proto::GetSessionRequest {
            session: "s-1".into(),
            before,
            ..Default::default()
        };
        let part = bed.session_page(request).await.unwrap();
        assert_eq!(part.turns_total, 500);
        assert!(!part.turns.is_empty());
        before = part.earlier.clone();
        parts.push(part.turns);
        if before.is_empty() {
            break;
        }
    }
    assert!(parts.len() > 1);
    let all: Vec<proto::Turn> = parts.into_iter().rev().flatten().collect();
    assert_eq!(all.len(), 500);
    assert!(
        all.iter()
            .enumerate()
            .all(|(n, turn)| turn.submission == format!("t-{n}"))
    );
    let last = proto::GetSessionRequest {
        session: "s-1".into(),
        limit: 2,
        ..Default::default()
    };
    let last = bed.session_page(last).await.unwrap();
    assert_eq!(submissions(&last.turns), ["t-498", "t-499"]);
    assert_eq!(last.earlier, "t-498");
}

#[tokio::test]
async fn a_session_of_ten_thousand_turns_opens() {
    const TURNS: u64 = 10_000;
    let bed = Bed::start().await;
    let mut line = bed.session("s-1", "").await;
    // The hashes are known before anything is stored, so appends need not wait for each other.
    let mut messages = Vec::new();
    for n in 0..TURNS {
        let (invoke, mut turn) = line.invoke(&format!("t-{n}"), b"question");
        let (request, asked) = turn.request(turn.maximal.clone(), "chat", b"?");
        let result = turn.result(&asked, b"!");
        turn.maximal = vec![result.node.hash()];
        let end = turn.end(Outcome::Done, None, b"answer");
        line.parent = end.node.hash();
        line.previous = Some(turn.submission);
        line.turns += 1;
        messages.extend([invoke, request, result, end]);
    }
    let began = std::time::Instant::now();
    let stored = futures::stream::iter(messages)
        .map(|message| bed.append(message))
        .buffered(500)
        .count()
        .await;
    println!("{stored} messages stored in {:?}", began.elapsed());

    let began = std::time::Instant::now();
    let status = tokio::time::timeout(DEADLINE * 3, bed.status())
        .await
        .unwrap();
    println!(
        "projected {} nodes, {:?} later",
        status.nodes,
        began.elapsed()
    );
    let began = std::time::Instant::now();
    let session = bed.get_session("s-1").await.unwrap();
    println!("all {} turns in {:?}", session.turns.len(), began.elapsed());
    assert_eq!(session.turns.len() as u64, TURNS);
    assert!(
        session
            .turns
            .iter()
            .all(|turn| turn.output == "answer" && turn.calls[0].status == "ok")
    );
    let began = std::time::Instant::now();
    let last = proto::GetSessionRequest {
        session: "s-1".into(),
        limit: 1,
        ..Default::default()
    };
    let last = bed.session_page(last).await.unwrap();
    println!("the last turn in {:?}", began.elapsed());
    assert_eq!((last.turns.len(), last.turns_total), (1, TURNS));
    let began = std::time::Instant::now();
    let verified = bed.verify("s-1").await;
    println!("verified {} nodes in {:?}", verified.nodes, began.elapsed());
    assert!(verified.ok, "{:?}", verified.problems);
    assert_eq!(verified.nodes, TURNS * 4 + 1);
}

#[tokio::test]
async fn a_large_body_comes_whole() {
    let bed = Bed::start().await;
    let mut line = bed.session("s-1", "").await;
    let input: Vec<u8> = (0..20 * 1024 * 1024u32)
        .map(|n| n as u8 ^ (n >> 8) as u8)
        .collect();
    let turn = bed.begin(&mut line, "t-1", &input).await;
    assert!(bed.body(&turn.invoke.to_string()).await.unwrap() == input);
    let shown = bed.get_turn("t-1").await.unwrap().turn.unwrap();
    assert_eq!(shown.input_len, input.len() as u64);
    assert!(bed.verify("s-1").await.ok);
    let stored = bed.bus.get(&log(), turn.seq).await.unwrap().unwrap();
    assert_eq!(stored.node.kind, Kind::Invoke);
}
