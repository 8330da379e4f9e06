//! The projection can be deleted, damaged, or belong to another log: it comes back equal.

use crate::bed::{Bed, DEADLINE, agent, caught_up_status, ctl, log, ns, session_id};
use rusqlite::Connection;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;
use vlinder_bus::{Message, Subject};
use vlinder_core::{Kind, Node, NodeHash};

/// A record with forks, losers, duplicates, blobs, and messages that nobody can read.
async fn fill(bed: &Bed) {
    let mut main = bed.session("s-1", "a name").await;
    bed.turn(&mut main, "m-1").await;
    let point = bed.turn(&mut main, "m-2").await;
    let mut side = bed.fork(&mut main, &point, "side").await;
    let mut turn = bed.begin(&mut side, "x-1", &vec![b'x'; 100_000]).await;
    let asked = bed.ask(&turn, "chat", &vec![b'y'; 9000]).await;
    bed.answer(&mut turn, &asked, b"one").await;
    bed.answer_unheard(&turn, &asked, b"two").await;
    let mut again = turn.result(&asked, b"one");
    again.id.push_str(":again");
    bed.append(again).await;
    bed.end(&mut side, &turn, b"!").await;
    bed.promote(&mut main, "side").await;
    bed.append_raw(log(), &main.subject().to_string(), b"garbage")
        .await;
    bed.append_raw(ctl(), "vlinder.v1.default.session.s-1", b"garbage")
        .await;
    bed.begin(&mut side, "x-2", b"open").await;
}

fn delete(path: &Path) {
    for suffix in ["", "-wal", "-shm"] {
        let mut file = path.as_os_str().to_owned();
        file.push(suffix);
        let _ = std::fs::remove_file(file);
    }
}

#[tokio::test]
async fn a_deleted_projection_comes_back_equal() {
    let mut bed = Bed::start().await;
    fill(&bed).await;
    let before = bed.status().await;
    assert_eq!((before.skipped, before.duplicates), (2, 1));
    let session = bed.get_session("s-1").await.unwrap();

    bed.stop_worker().await;
    delete(&bed.db_path());
    bed.start_worker().await;
    let after = bed.status().await;
    assert_eq!(after, before);
    assert_eq!(bed.get_session("s-1").await.unwrap(), session);
    // The digest does depend on what is there.
    let mut line = bed.session("s-2", "").await;
    let with_session = bed.status().await.digest;
    bed.begin(&mut line, "t-1", b"?").await;
    let with_turn = bed.status().await.digest;
    assert!(before.digest != with_session && with_session != with_turn);
}

#[tokio::test]
async fn a_restart_goes_on_from_its_cursor() {
    let bed = Bed::start().await;
    fill(&bed).await;
    let before = bed.status().await;
    let path = bed.db_path();
    let dir = bed.stop().await;
    // A mark that only a file that was kept still has.
    Connection::open(&path)
        .unwrap()
        .execute_batch("CREATE TABLE mark (x)")
        .unwrap();
    let bed = Bed::on(dir).await;
    let mut line = bed.session("s-2", "").await;
    bed.turn(&mut line, "t-1").await;
    let after = bed.status().await;
    assert_eq!((after.nodes, after.rebuilds), (before.nodes + 7, 0));
    let connection = Connection::open(&path).unwrap();
    connection
        .query_row("SELECT count(*) FROM mark", [], |row| row.get::<_, i64>(0))
        .unwrap();
}

#[tokio::test]
async fn rebuilt_and_followed_projections_agree_while_the_log_grows() {
    let bed = Arc::new(Bed::start().await);
    fill(&bed).await;
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let bed = bed.clone();
            tokio::spawn(async move {
                for n in 0..5 {
                    let mut line = bed.session(&format!("w-{writer}-{n}"), "").await;
                    for turn in 0..5 {
                        bed.turn(&mut line, &format!("t-{writer}-{n}-{turn}")).await;
                    }
                }
            })
        })
        .collect();
    // These begin while the log grows, at different moments.
    let mut others = Vec::new();
    for index in 1..4 {
        others.push(bed.another(index).await);
        bed.get_session("s-1").await.unwrap();
    }
    for writer in writers {
        writer.await.unwrap();
    }
    let expected = bed.status().await;
    for other in others {
        assert_eq!(caught_up_status(&other.service()).await, expected);
    }
}

#[tokio::test]
async fn a_file_that_cannot_be_used_is_rebuilt() {
    let mut bed = Bed::start().await;
    fill(&bed).await;
    let expected = bed.status().await.digest;
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 6] = [
        ("garbage", |path| {
            delete(path);
            std::fs::write(path, vec![0xa5; 100_000]).unwrap();
        }),
        ("empty", |path| {
            delete(path);
            std::fs::write(path, b"").unwrap();
        }),
        ("truncated", |path| {
            let len = std::fs::metadata(path).unwrap().len();
            let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
            file.set_len(len / 2 / 4096 * 4096).unwrap();
        }),
        ("other version", |path| {
            let connection = Connection::open(path).unwrap();
            connection.pragma_update(None, "user_version", 99).unwrap();
        }),
        ("a table is missing", |path| {
            let connection = Connection::open(path).unwrap();
            connection
                .execute_batch("DROP TABLE results; DROP TABLE turns;")
                .unwrap();
        }),
        ("pages overwritten", |path| {
            let len = std::fs::metadata(path).unwrap().len();
            let mut file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
            for page in 3..len / 4096 {
                file.seek(SeekFrom::Start(page * 4096)).unwrap();
                file.write_all(&[0xa5; 4096]).unwrap();
            }
        }),
    ];
    for (what, damage) in damages {
        bed.stop_worker().await;
        damage(&bed.db_path());
        bed.start_worker().await;
        assert_eq!(bed.status().await.digest, expected, "{what}");
    }
}

#[tokio::test]
async fn a_file_damaged_while_it_is_read_is_rebuilt() {
    let bed = Bed::start().await;
    let mut line = bed.session("s-1", "").await;
    for n in 0..300 {
        let turn = bed.begin(&mut line, &format!("t-{n}"), &[b'x'; 3000]).await;
        bed.end(&mut line, &turn, &[b'y'; 3000]).await;
    }
    let expected = bed.status().await;
    let checkpoint = Connection::open(bed.db_path()).unwrap();
    checkpoint
        .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
        .unwrap();
    drop(checkpoint);
    let len = std::fs::metadata(bed.db_path()).unwrap().len();
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .open(bed.db_path())
        .unwrap();
    for page in 2..len / 4096 {
        file.seek(SeekFrom::Start(page * 4096)).unwrap();
        file.write_all(&[0xa5; 4096]).unwrap();
    }
    // Reads fail meanwhile; `status` waits until they work again.
    let after = tokio::time::timeout(DEADLINE, bed.status()).await.unwrap();
    assert_eq!((after.digest, after.rebuilds), (expected.digest, 1));
}

#[tokio::test]
async fn a_projection_of_another_log_is_thrown_away() {
    let bed = Bed::start().await;
    fill(&bed).await;
    bed.status().await;
    let old = bed.stop().await;
    // Another log, made later, in the same place.
    for file in ["bus.db", "bus.db-wal", "bus.db-shm"] {
        let _ = std::fs::remove_file(old.path().join(file));
    }
    let bed = Bed::on(old).await;
    let mut line = bed.session("s-9", "").await;
    bed.turn(&mut line, "t-1").await;
    let status = bed.status().await;
    assert_eq!((status.nodes, status.rebuilds), (7, 1));
    assert!(bed.get_session("s-1").await.is_err());
}

#[tokio::test]
async fn a_cursor_that_does_not_fit_the_log_begins_anew() {
    let mut bed = Bed::start().await;
    fill(&bed).await;
    let expected = bed.status().await.digest;
    for change in [
        "UPDATE cursors SET seq = seq + 1000",
        "UPDATE cursors SET hash = zeroblob(32) WHERE stream = 0",
        "UPDATE cursors SET created_ms = created_ms - 1 WHERE stream = 1",
        // Left out of the rows, though the cursor says that it is there.
        "UPDATE cursors SET seq = seq - 2 WHERE stream = 0",
    ] {
        bed.stop_worker().await;
        Connection::open(bed.db_path())
            .unwrap()
            .execute(change, [])
            .unwrap();
        bed.start_worker().await;
        let status = bed.status().await;
        assert_eq!(
            (status.digest.as_str(), status.rebuilds),
            (expected.as_str(), 1),
            "{change}"
        );
    }
}

#[tokio::test]
async fn what_was_applied_before_is_not_applied_again() {
    let mut bed = Bed::start().await;
    fill(&bed).await;
    let expected = bed.status().await;
    bed.stop_worker().await;
    let hash_of_first = "(SELECT hash FROM nodes WHERE stream = 0 AND seq = 1)";
    let change = format!("UPDATE cursors SET seq = 1, hash = {hash_of_first} WHERE stream = 0");
    let connection = Connection::open(bed.db_path()).unwrap();
    connection.execute(&change, []).unwrap();
    drop(connection);
    bed.start_worker().await;
    assert_eq!(bed.status().await, expected);
}

#[tokio::test]
async fn what_cannot_be_read_or_belongs_to_nothing_is_skipped_and_counted() {
    let bed = Bed::start().await;
    let mut line = bed.session("s-1", "").await;
    let turn = bed.begin(&mut line, "t-1", b"?").await;
    let mut skipped = 0;
    for subject in [
        "vlinder.v1.default.res.t-1.end",
        "vlinder.v1.default.res.t-1.call",
        "vlinder.v1.default.req.kv.sqlite._",
        "vlinder.v1.default.req.odd",
    ] {
        bed.append_raw(log(), subject, b"\xff\x00 not a node").await;
        skipped += 1;
    }
    let end_subject = Subject::End {
        ns: ns(),
        submission: "t-1".parse().unwrap(),
    };
    // Well-formed nodes in the wrong place, without what they need, or of turns that do not exist.
    let parent = NodeHash::from_bytes([7; 32]);
    let wrong_kind = Node::new(Kind::Invoke, vec![parent], b"");
    let no_fields = Node::new(Kind::End, vec![parent], b"");
    for node in [wrong_kind, no_fields] {
        let message = Message::new(log(), end_subject.clone(), node, bytes::Bytes::new());
        bed.append(message).await;
        skipped += 1;
    }
    let mut stray = turn.clone();
    stray.submission = "t-unknown".parse().unwrap();
    let (request, asked) = stray.request(stray.maximal.clone(), "put", b"{}");
    for message in [
        request,
        stray.result(&asked, b"{}"),
        stray.end(vlinder_core::record::Outcome::Done, None, b"!"),
    ] {
        bed.append(message).await;
        skipped += 1;
    }
    // An invoke that claims a branch other than its subject.
    let (mut elsewhere, _) = line.invoke("t-2", b"?");
    elsewhere.subject = Subject::Invoke {
        ns: ns(),
        agent: agent(),
        session: session_id("s-2"),
        branch: "main".parse().unwrap(),
    };
    bed.append(elsewhere).await;
    skipped += 1;

    bed.end(&mut line, &turn, b"still here").await;
    let detail = bed.get_turn("t-1").await.unwrap();
    assert_eq!(detail.turn.unwrap().output, "still here");
    let status = bed.status().await;
    assert_eq!(
        (status.skipped, status.duplicates, status.nodes),
        (skipped, 0, 3)
    );
    let problems = bed.verify("s-1").await.problems;
    // Those on the subjects of the session are named.
    assert_eq!(problems.len(), 4, "{problems:?}");
}
