//! What must hold when the killing is over.

use super::client::{Talk, Told};
use crate::support::{Node, faces, wait_for};
use std::fs;
use std::time::{Duration, Instant};
use vlinder_proto::MESSAGE_BYTES_MAX;
use vlinder_proto::harness::ListDeadRequest;
use vlinder_proto::harness::harness_client::HarnessClient;
use vlinder_proto::state::state_client::StateClient;
use vlinder_proto::state::{
    GetSessionRequest, ListTurnsRequest, Session, StatusRequest, StatusResponse, Turn, TurnSummary,
    VerifySessionRequest,
};

/// Every turn was answered, so nothing is left to do but to read.
const QUIET_DEADLINE: Duration = Duration::from_secs(10);
/// A rebuild of the whole projection in a debug build.
const REBUILD_DEADLINE: Duration = Duration::from_secs(60);

/// To recompute a session of thousands of turns, beside whatever else runs on this machine.
const ANSWER_DEADLINE: Duration = Duration::from_secs(120);

type State = StateClient<faces::Grpc>;

fn state(node: &Node) -> State {
    let channel = faces::grpc_within(&node.address("state"), &node.token(), ANSWER_DEADLINE);
    StateClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

pub async fn all_is_on_record(node: Node, talks: &[Talk]) {
    let began = Instant::now();
    let mut client = state(&node);
    nothing_runs(&client).await;
    for talk in talks {
        as_acknowledged(&mut client, talk).await;
    }
    let dead = HarnessClient::new(node.grpc("harness"))
        .list_dead(ListDeadRequest::default())
        .await
        .expect("the harness answers");
    let dead = dead.into_inner().letters;
    println!("dead letters: {}", dead.len());
    for letter in &dead {
        println!("  {} {}", letter.subject, letter.reason);
    }
    println!("compared with the record in {:?}", began.elapsed());
    let before = followed(&client).await;
    println!(
        "on record: {} nodes in {} messages, {} duplicates, {} skipped",
        before.nodes, before.log_seq, before.duplicates, before.skipped
    );

    // Without its projection the record is still the record.
    let spec = node.stop_cleanly().await;
    let mut thrown_away = 0;
    for entry in fs::read_dir(spec.data_dir()).expect("it is ours").flatten() {
        if entry.file_name().to_string_lossy().starts_with("state") {
            fs::remove_file(entry.path()).expect("it is a file");
            thrown_away += 1;
        }
    }
    assert!(thrown_away > 0, "no projection in {:?}", spec.data_dir());
    let node = spec.start().await;
    let mut client = state(&node);
    let began = Instant::now();
    let after = followed(&client).await;
    println!("the projection came back in {:?}", began.elapsed());
    assert_eq!(after.digest, before.digest, "{before:#?} {after:#?}");
    assert_eq!(after.nodes, before.nodes, "{before:#?} {after:#?}");
    for talk in talks {
        as_acknowledged(&mut client, talk).await;
    }
    node.stop_cleanly().await;
}

/// No turn waits or runs.
async fn nothing_runs(client: &State) {
    let look = || {
        let mut client = client.clone();
        async move {
            let turns = client.list_turns(ListTurnsRequest::default()).await;
            turns.expect("the state service answers").into_inner().turns
        }
    };
    wait_for(
        "no turn runs",
        QUIET_DEADLINE,
        look,
        |turns: &Vec<TurnSummary>| turns.is_empty(),
    )
    .await;
}

/// Where the projection stands when it has read everything.
async fn followed(client: &State) -> StatusResponse {
    let look = |digest| {
        let mut client = client.clone();
        async move {
            let status = client.status(StatusRequest { digest }).await;
            status.expect("the state service answers").into_inner()
        }
    };
    let done = |status: &StatusResponse| {
        status.log_seq == status.log_last_seq && status.ctl_seq == status.ctl_last_seq
    };
    let what = "the projection has read the log";
    wait_for(what, REBUILD_DEADLINE, || look(false), done).await;
    let status = look(true).await;
    assert!(done(&status), "nobody writes any more: {status:#?}");
    status
}

/// Every turn of a conversation is on record once, in order, as the client was told.
async fn as_acknowledged(client: &mut State, talk: &Talk) {
    let request = GetSessionRequest {
        session: talk.session.clone(),
        ..GetSessionRequest::default()
    };
    let session = client
        .get_session(request)
        .await
        .expect("it is on record")
        .into_inner();
    assert_eq!(
        session.turns_total as usize,
        talk.turns.len(),
        "{}",
        difference(&session, talk)
    );
    assert_eq!(
        session.turns.len(),
        talk.turns.len(),
        "{}",
        difference(&session, talk)
    );
    for (turn, told) in session.turns.iter().zip(&talk.turns) {
        is_as_told(turn, told);
    }
    let mut counts = session
        .turns
        .iter()
        .filter(|turn| turn.status == "done")
        .map(|turn| &turn.output);
    let done = counts.clone().count();
    for count in 1..=done {
        assert_eq!(counts.next(), Some(&count.to_string()), "{}", talk.session);
    }
    let request = VerifySessionRequest {
        session: talk.session.clone(),
        ..VerifySessionRequest::default()
    };
    let verified = client
        .verify_session(request)
        .await
        .expect("it can be verified")
        .into_inner();
    assert!(verified.ok && verified.problems_total == 0, "{verified:#?}");
    // Each turn has at least its invoke and its end; each that counted four nodes of two calls more.
    let least = 2 * session.turns.len() + 4 * done;
    assert!(verified.nodes as usize >= least, "{least}: {verified:#?}");
}

fn is_as_told(turn: &Turn, told: &Told) {
    let output = String::from_utf8_lossy(&told.end.output);
    let recorded = (
        &turn.submission,
        &turn.status,
        &turn.output,
        &turn.hash,
        &turn.code,
        &turn.state,
    );
    let end = &told.end;
    let expected = (
        &told.submission,
        &end.outcome,
        &output.into_owned(),
        &end.hash,
        &end.code,
        &end.state,
    );
    assert_eq!(recorded, expected, "recorded, and told");
    assert_eq!(turn.input, turn.submission);
    if turn.status == "done" {
        let calls: Vec<_> = turn
            .calls
            .iter()
            .map(|call| (call.seq, &*call.operation, &*call.status))
            .collect();
        assert_eq!(calls, [(1, "get", "ok"), (2, "put", "ok")], "{turn:#?}");
    }
}

fn difference(session: &Session, talk: &Talk) -> String {
    let recorded: Vec<&String> = session.turns.iter().map(|turn| &turn.submission).collect();
    let told: Vec<&String> = talk.turns.iter().map(|told| &told.submission).collect();
    let lost: Vec<_> = told
        .iter()
        .filter(|name| !recorded.contains(*name))
        .collect();
    let unknown: Vec<_> = recorded
        .iter()
        .filter(|name| !told.contains(*name))
        .collect();
    format!(
        "{}: told but not recorded {lost:?}, recorded but not told {unknown:?}",
        talk.session
    )
}
