//! The same over NATS JetStream, and what happens when the server goes and comes back.

use crate::agents::{COUNTER, ECHO, KV, agent};
use crate::bed::{Bed, file_of};
use bytes::Bytes;
use std::time::Duration;
use vlinder_core::record::Outcome;
use vlinder_testkit::{CURRENT, NatsServer, OLDEST};

#[tokio::test]
async fn a_conversation_over_the_oldest_server() {
    let server = NatsServer::start(OLDEST).await;
    let bed = Bed::over_nats(&server).await;
    let worker = bed.worker("test", 0);
    bed.deploy("counter", &agent(COUNTER), KV).await;
    let mut session = bed.session("counter").await;
    for number in 1..=10 {
        assert_eq!(session.say(&bed, "next").await.done(), number.to_string());
    }
    bed.deploy("echo", &agent(ECHO), "").await;
    let large = Bytes::from(vec![7; 5 * 1024 * 1024]);
    let turn = bed.session("echo").await.say(&bed, large.clone()).await;
    assert_eq!(turn.end.outcome, Outcome::Done);
    assert!(turn.body == large);
    worker.stop().await;
}

#[tokio::test]
async fn turns_go_on_when_the_server_comes_back() {
    let mut server = NatsServer::start(CURRENT).await;
    let bed = Bed::over_nats(&server).await;
    let worker = bed.worker("test", 0);
    let source = format!(
        r#"{COUNTER}
counted = turn
def turn(body, request):
    answer = counted(body, request)
    open(os.path.join(os.environ["HOME"], "counted"), "a").write("x")
    time.sleep(1.5)
    return answer + " " + get("count", request.invocation)
"#
    );
    bed.deploy("slow", &agent(&source), KV).await;
    let files = bed.dir.path().join("agents/slow");
    let home = std::fs::read_dir(files)
        .unwrap()
        .flatten()
        .next()
        .unwrap()
        .path();
    let mut session = bed.session("slow").await;
    assert_eq!(session.say(&bed, "next").await.done(), "1 1");
    let sent = session.send(&bed, "next").await;
    file_of(home.join("counted"), 2).await;
    server.kill().await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    server.restart().await;
    assert_eq!(session.end(&bed, sent).await.done(), "2 2");
    assert_eq!(session.say(&bed, "next").await.done(), "3 3");
    worker.stop().await;
}
