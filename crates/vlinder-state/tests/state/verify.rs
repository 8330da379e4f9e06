//! Verification finds and names what is wrong, wherever it is.

use crate::bed::{Bed, Ended, Line, ctl, log};
use rusqlite::{Connection, params};
use std::sync::Arc;
use vlinder_core::record::Outcome;

struct Written {
    ended: Ended,
    asked: vlinder_core::NodeHash,
    answered: vlinder_core::NodeHash,
    line: Line,
}

async fn write(bed: &Bed) -> Written {
    let mut line = bed.session("s-1", "").await;
    bed.turn(&mut line, "t-1").await;
    let mut turn = bed.begin(&mut line, "t-2", b"question").await;
    let asked = bed.ask(&turn, "chat", b"asked").await;
    let answered = bed.answer(&mut turn, &asked, &vec![b'z'; 200_000]).await;
    let ended = bed.end(&mut line, &turn, b"answer").await;
    Written {
        ended,
        asked: asked.hash,
        answered,
        line,
    }
}

#[tokio::test]
async fn a_sound_session_verifies() {
    let bed = Bed::start().await;
    write(&bed).await;
    let verified = bed.verify("s-1").await;
    assert!(verified.ok, "{:?}", verified.problems);
    assert_eq!((verified.nodes, verified.problems_total), (11, 0));
}

/// Changes the log's file by `change` and verifies with a projection made before (`keep`) or after.
async fn after_change(
    change: &str,
    values: &[&dyn rusqlite::ToSql],
    keep: bool,
) -> (Written, Vec<String>) {
    let bed = Bed::start().await;
    let written = write(&bed).await;
    assert!(bed.verify("s-1").await.ok);
    let (bus_path, db_path) = (bed.bus_path(), bed.db_path());
    let dir: Arc<_> = bed.stop().await;
    let changed = Connection::open(bus_path)
        .unwrap()
        .execute(change, values)
        .unwrap();
    assert_eq!(changed, 1, "{change}");
    if !keep {
        std::fs::remove_file(db_path).unwrap();
    }
    let bed = Bed::on(dir).await;
    let verified = bed.verify("s-1").await;
    assert_eq!(verified.ok, verified.problems.is_empty());
    (written, verified.problems)
}

#[tokio::test]
async fn a_changed_body_in_the_log_is_located() {
    let change =
        "UPDATE message SET body = CAST('Asked' AS BLOB) WHERE body = CAST('asked' AS BLOB)";
    let (written, problems) = after_change(change, &[], true).await;
    assert_eq!(problems.len(), 1, "{problems:?}");
    let expected = format!("request {} at LOG:8: is damaged in the log", written.asked);
    assert!(problems[0].starts_with(&expected), "{problems:?}");
    // A projection made afterwards cannot know the request; its result shows that it is missing.
    let (written, problems) = after_change(change, &[], false).await;
    let missing = format!("its parent {} is not on record", written.asked);
    assert!(
        problems.iter().any(|problem| problem.ends_with(&missing)),
        "{problems:?}"
    );
}

#[tokio::test]
async fn a_changed_header_in_the_log_is_located() {
    let change = "UPDATE message SET headers = replace(headers, 'done', 'Done') WHERE body = CAST('answer' AS BLOB)";
    for keep in [true, false] {
        let (written, problems) = after_change(change, &[], keep).await;
        assert!(!problems.is_empty());
        if keep {
            let expected = format!(
                "end {} at LOG:10: is damaged in the log",
                written.ended.hash
            );
            assert!(problems[0].starts_with(&expected), "{problems:?}");
        } else {
            assert!(
                problems.iter().any(|problem| problem.starts_with(
                    "the message at LOG:10 on vlinder.v1.default.res.t-2.end is damaged"
                )),
                "{problems:?}"
            );
        }
    }
}

#[tokio::test]
async fn a_flipped_bit_in_a_blob_is_located() {
    let change = "UPDATE blob_part SET bytes = CAST(substr(bytes, 1, 4711) || x'7b' || substr(bytes, 4713) AS BLOB) WHERE number = 0";
    for keep in [true, false] {
        let (written, problems) = after_change(change, &[], keep).await;
        assert_eq!(problems.len(), 1, "{problems:?}");
        let expected = format!(
            "result {} at LOG:9: its body cannot be read",
            written.answered
        );
        assert!(problems[0].starts_with(&expected), "{problems:?}");
    }
}

#[tokio::test]
async fn a_changed_row_of_the_projection_is_located() {
    let bed = Bed::start().await;
    let written = write(&bed).await;
    assert!(bed.verify("s-1").await.ok);
    let db = Connection::open(bed.db_path()).unwrap();
    let hash = written.ended.hash;
    let raw = hash.as_bytes().to_vec();
    for (change, back, what) in [
        (
            "body = CAST('Answer' AS BLOB)",
            "body = CAST('answer' AS BLOB)",
            "body",
        ),
        ("body_len = 7", "body_len = 6", "body"),
        ("time_ms = time_ms + 1", "time_ms = time_ms - 1", "time"),
        (
            "parents = CAST(parents || parents AS BLOB)",
            "parents = substr(parents, 1, 32)",
            "parents",
        ),
        ("kind = 'result'", "kind = 'end'", "kind"),
    ] {
        let set = |values: &str| {
            let sql = format!("UPDATE nodes SET {values} WHERE hash = ?1");
            assert_eq!(db.execute(&sql, params![raw]).unwrap(), 1);
        };
        set(change);
        let problems = bed.verify("s-1").await.problems;
        let expected =
            format!("at LOG:10: the projection's row differs from the log in its {what}");
        assert!(
            problems
                .iter()
                .any(|problem| problem.contains(&expected) && problem.contains(&hash.to_string())),
            "{problems:?}"
        );
        set(back);
        assert!(bed.verify("s-1").await.ok, "{back}");
    }
    // A row that is gone, and one at another place.
    db.execute(
        "UPDATE turns SET end_node = NULL WHERE submission = 't-2'",
        [],
    )
    .unwrap();
    let problems = bed.verify("s-1").await.problems;
    assert_eq!(
        problems,
        ["turn t-2: the projection does not have its first end as the end"]
    );
    db.execute("UPDATE turns SET end_node = (SELECT id FROM nodes WHERE hash = ?1) WHERE submission = 't-2'", params![raw]).unwrap();
    db.execute("DELETE FROM nodes WHERE hash = ?1", params![raw])
        .unwrap();
    let problems = bed.verify("s-1").await.problems;
    let expected = format!("end {hash} at LOG:10: is not in the projection");
    assert!(problems.contains(&expected), "{problems:?}");
}

#[tokio::test]
async fn parents_that_do_not_fit_are_located() {
    let bed = Bed::start().await;
    let mut written = write(&bed).await;
    let mut turn = bed.begin(&mut written.line, "t-3", b"?").await;
    // A request after another turn's end, a result to the invoke, an end after nothing.
    let foreign = bed
        .ask_after(&turn, vec![written.ended.hash], "put", b"{}")
        .await;
    let mut to_invoke = bed.ask(&turn, "chat", b"?").await;
    to_invoke.hash = turn.invoke;
    let result = bed.answer_unheard(&turn, &to_invoke, b"!").await;
    turn.maximal = vec![vlinder_core::NodeHash::from_bytes([9; 32])];
    let end = bed.end_as(&turn, Outcome::Done, None, b"!").await.hash;
    let problems = bed.verify("s-1").await.problems;
    let has = |node: &str, what: &str| {
        let found = problems
            .iter()
            .any(|problem| problem.contains(node) && problem.contains(what));
        assert!(found, "{node} {what}: {problems:?}");
    };
    has(&format!("request {}", foreign.hash), "is not of its turn");
    has(&format!("result {result}"), "expected request");
    has(&format!("end {end}"), "is not on record");
}

#[tokio::test]
async fn events_of_the_session_are_verified_too() {
    let bed = Bed::start().await;
    let written = write(&bed).await;
    let stored = bed.bus.get(&ctl(), 1).await.unwrap().unwrap();
    assert_eq!(stored.hash, written.line.event.hash);
    assert!(bed.verify("s-1").await.ok);
    let db = Connection::open(bed.db_path()).unwrap();
    db.execute("UPDATE nodes SET seq = 5 WHERE stream = 1", [])
        .unwrap();
    let problems = bed.verify("s-1").await.problems;
    let missing = format!("session {} at CTL:5: is missing from the log", stored.hash);
    let unknown = format!("session {} at CTL:1: is not in the projection", stored.hash);
    assert_eq!(problems, [missing, unknown]);
    assert!(bed.bus.get(&log(), 5).await.unwrap().is_some());
}
