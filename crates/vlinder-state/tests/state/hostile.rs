//! Hostile input to every RPC, and hostile nodes in the log: a precise error, nothing else changes.

use crate::bed::{Bed, DEADLINE, log};
use std::time::Duration;
use tonic::{Code, Request as Rpc, Status};
use vlinder_bus::Message;
use vlinder_core::record::CallResult;
use vlinder_proto::state as proto;
use vlinder_proto::state::state_server::State;

fn texts() -> Vec<String> {
    let mut texts: Vec<String> = [
        "' OR 1=1 --",
        "\"; DROP TABLE nodes; --",
        "%",
        "_%",
        "*",
        ">",
        "s-1.>",
        "../../etc/passwd",
        "a\0b",
        "\n",
        "\u{7f}",
        "\u{10FFFF}",
        "😀",
        " ",
        "s-1 ",
        "NULL",
        "-1",
        "{}",
        "0x00",
    ]
    .map(str::to_owned)
    .into();
    texts.push("x".repeat(10_000));
    texts.push("\u{202e}".repeat(5000));
    texts.push("f".repeat(63));
    texts.push("g".repeat(64));
    texts.push("0".repeat(64));
    texts.push("0".repeat(65));
    texts
}

/// Calls every RPC that takes text with `text` in one of its fields.
async fn with_everywhere(bed: &Bed, text: &str) -> Vec<(&'static str, Result<(), Status>)> {
    let ok = |answer: Result<(), Status>| answer;
    let text = || text.to_owned();
    let state = &bed.state;
    let session = |session: String, branch: String, before: String, namespace: String| {
        proto::GetSessionRequest {
            namespace,
            session,
            branch,
            before,
            limit: 0,
        }
    };
    let s = || "s-1".to_owned();
    let e = String::new;
    vec![
        (
            "session",
            ok(bed
                .session_page(session(text(), e(), e(), e()))
                .await
                .map(drop)),
        ),
        (
            "session.branch",
            ok(bed
                .session_page(session(s(), text(), e(), e()))
                .await
                .map(drop)),
        ),
        (
            "session.before",
            ok(bed
                .session_page(session(s(), e(), text(), e()))
                .await
                .map(drop)),
        ),
        (
            "session.namespace",
            ok(bed
                .session_page(session(s(), e(), e(), text()))
                .await
                .map(drop)),
        ),
        (
            "sessions.agent",
            state
                .list_sessions(Rpc::new(proto::ListSessionsRequest {
                    agent: text(),
                    ..Default::default()
                }))
                .await
                .map(drop),
        ),
        (
            "sessions.before",
            state
                .list_sessions(Rpc::new(proto::ListSessionsRequest {
                    before: text(),
                    ..Default::default()
                }))
                .await
                .map(drop),
        ),
        (
            "sessions.namespace",
            state
                .list_sessions(Rpc::new(proto::ListSessionsRequest {
                    namespace: text(),
                    ..Default::default()
                }))
                .await
                .map(drop),
        ),
        (
            "branches",
            state
                .list_branches(Rpc::new(proto::ListBranchesRequest {
                    session: text(),
                    ..Default::default()
                }))
                .await
                .map(drop),
        ),
        (
            "branches.namespace",
            state
                .list_branches(Rpc::new(proto::ListBranchesRequest {
                    session: s(),
                    namespace: text(),
                }))
                .await
                .map(drop),
        ),
        (
            "turns.namespace",
            state
                .list_turns(Rpc::new(proto::ListTurnsRequest {
                    namespace: text(),
                    ..Default::default()
                }))
                .await
                .map(drop),
        ),
        ("turn", bed.get_turn(&text()).await.map(drop)),
        (
            "turn.namespace",
            state
                .get_turn(Rpc::new(proto::GetTurnRequest {
                    namespace: text(),
                    submission: "t-1".into(),
                }))
                .await
                .map(drop),
        ),
        (
            "verify",
            state
                .verify_session(Rpc::new(proto::VerifySessionRequest {
                    session: text(),
                    ..Default::default()
                }))
                .await
                .map(drop),
        ),
        (
            "verify.namespace",
            state
                .verify_session(Rpc::new(proto::VerifySessionRequest {
                    session: s(),
                    namespace: text(),
                }))
                .await
                .map(drop),
        ),
        ("body", bed.body(&text()).await.map(drop)),
        (
            "body.namespace",
            state
                .get_body(Rpc::new(proto::GetBodyRequest {
                    hash: "0".repeat(64),
                    namespace: text(),
                }))
                .await
                .map(drop),
        ),
    ]
}

#[tokio::test]
async fn every_rpc_refuses_hostile_text() {
    let bed = Bed::start().await;
    let mut line = bed.session("s-1", "a name").await;
    bed.turn(&mut line, "t-1").await;
    let before = bed.status().await;
    for text in texts() {
        for (rpc, answer) in with_everywhere(&bed, &text).await {
            // An agent that nobody named is a filter that nothing passes.
            let is_filter = rpc == "sessions.agent" && answer.is_ok();
            let Err(error) = answer else {
                assert!(is_filter, "{rpc} accepted {text:?}");
                continue;
            };
            assert!(
                matches!(error.code(), Code::InvalidArgument | Code::NotFound),
                "{rpc} {text:?}: {error:?}"
            );
            assert!(error.message().len() < 30_000, "{rpc}");
        }
    }
    // Nothing where something is needed.
    for (rpc, answer) in with_everywhere(&bed, "").await {
        let needed = ["session", "branches", "turn", "verify", "body"].contains(&rpc);
        let code = answer.err().map(|error| error.code());
        match rpc {
            "body.namespace" => assert_eq!(code, Some(Code::NotFound)),
            _ => assert_eq!(code, needed.then_some(Code::InvalidArgument), "{rpc}"),
        }
    }
    assert_eq!(bed.status().await, before);
}

#[tokio::test]
async fn hostile_numbers_are_bounded() {
    let bed = Bed::start().await;
    let mut line = bed.session("s-1", "").await;
    bed.turn(&mut line, "t-1").await;
    let request = proto::ListSessionsRequest {
        limit: u32::MAX,
        ..Default::default()
    };
    assert_eq!(
        bed.state
            .list_sessions(Rpc::new(request))
            .await
            .unwrap()
            .into_inner()
            .sessions
            .len(),
        1
    );
    let request = proto::ListTurnsRequest {
        all: true,
        limit: u32::MAX,
        ..Default::default()
    };
    assert_eq!(
        bed.state
            .list_turns(Rpc::new(request))
            .await
            .unwrap()
            .into_inner()
            .turns
            .len(),
        1
    );
    let request = proto::GetSessionRequest {
        session: "s-1".into(),
        limit: u32::MAX,
        ..Default::default()
    };
    assert_eq!(bed.session_page(request).await.unwrap().turns.len(), 1);
    for before in [
        format!("{}:s-1", u64::MAX),
        "99999999999999999999:s".into(),
        "-5:s-1".into(),
    ] {
        let request = proto::ListSessionsRequest {
            before,
            ..Default::default()
        };
        let error = bed
            .state
            .list_sessions(Rpc::new(request))
            .await
            .unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
    }
}

#[tokio::test]
async fn hostile_fields_of_nodes_are_only_text() {
    let bed = Bed::start().await;
    let evil = "'); DROP TABLE nodes; --\u{0}\n\u{1b}[31m";
    let mut line = bed.session("s-1", evil).await;
    let mut turn = bed.begin(&mut line, "t-1", evil.as_bytes()).await;
    let asked = bed.ask(&turn, "put", evil.as_bytes()).await;
    let Message {
        node,
        subject,
        body,
        ..
    } = turn.result(&asked, evil.as_bytes());
    let mut result = CallResult::try_from(&node).unwrap();
    result.content_type = evil.into();
    result.tokens_in = Some(u64::MAX);
    let node = result.to_node(asked.hash, &body);
    turn.maximal = vec![node.hash()];
    let message = Message::new(log(), subject, node, body)
        .note("by", evil)
        .note("attempt", "x")
        .note("took_us", u64::MAX);
    bed.append(message).await;
    bed.end(&mut line, &turn, evil.as_bytes()).await;
    let session = bed.get_session("s-1").await.unwrap();
    assert_eq!(session.name, evil);
    let detail = bed.get_turn("t-1").await.unwrap();
    let call = &detail.calls[0];
    assert_eq!(
        (call.by.as_str(), call.content_type.as_str(), call.attempt),
        (evil, evil, 0)
    );
    assert_eq!(
        (call.request.as_str(), call.response.as_str()),
        (evil, evil)
    );
    assert_eq!(detail.turn.unwrap().output, evil);
    assert!(bed.verify("s-1").await.ok);
}

#[tokio::test]
async fn a_bus_that_is_gone_is_an_error_and_not_a_stale_answer() {
    let bed = Bed::start().await;
    let mut line = bed.session("s-1", "").await;
    bed.turn(&mut line, "t-1").await;
    bed.get_session("s-1").await.unwrap();
    bed.bus.close().await;
    let answer = tokio::time::timeout(DEADLINE, bed.get_session("s-1"))
        .await
        .unwrap();
    assert_eq!(answer.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn a_follower_that_stands_still_is_named() {
    let mut bed = Bed::start().await;
    let mut line = bed.session("s-1", "").await;
    let projection = {
        let other = bed.another(1).await;
        other.projection().clone()
        // Dropping the worker ends its follower.
    };
    bed.turn(&mut line, "t-1").await;
    let lag = projection
        .caught_up_within(Duration::from_millis(50))
        .await
        .unwrap_err();
    assert_eq!(lag.to_string(), "projection lags by 6 messages; try again");
    assert_eq!(Status::from(lag).code(), Code::Unavailable);
    bed.stop_worker().await;
}
