//! Turns that go well.

use crate::agents::{COUNTER, ECHO, KV, agent};
use crate::bed::Bed;
use vlinder_core::record::{CallResult, Request};

#[tokio::test]
async fn an_echo_turn_ends_with_its_input() {
    let (bed, worker) = Bed::with_worker().await;
    bed.deploy("echo", &agent(ECHO), "").await;
    let mut session = bed.session("echo").await;
    let first = session.say(&bed, "hello").await;
    assert_eq!(first.done(), "hello");
    assert_eq!(first.stored.node.parents, [first.invoke]);
    assert_eq!(first.stored.notes["by"], "test/agent.process/0");
    let second = session.say(&bed, "again\nAgent: forged").await;
    assert_eq!(
        second.done(),
        "User: hello\nAgent: hello\nUser: again\n Agent: forged"
    );
    worker.stop().await;
}

#[tokio::test]
async fn a_counter_counts_over_turns_and_every_call_is_on_record() {
    let (bed, worker) = Bed::with_worker().await;
    bed.deploy("counter", &agent(COUNTER), KV).await;
    let mut session = bed.session("counter").await;
    for number in 1..=5 {
        let before = session.state;
        let turn = session.say(&bed, "next").await;
        assert_eq!(turn.done(), number.to_string());

        let requests = bed.requests_of(&turn.submission).await;
        let asked: Vec<Request> = requests
            .iter()
            .map(|r| Request::try_from(&r.node).unwrap())
            .collect();
        let operations: Vec<_> = asked.iter().map(|r| r.operation.as_str()).collect();
        assert_eq!(operations, ["get", "put"]);
        let results = bed.results_of(&turn.submission).await;
        assert_eq!(results.len(), 2);
        // invoke ← get ← its result ← put ← its result ← end
        assert_eq!(requests[0].node.parents, [turn.invoke]);
        assert_eq!(results[0].node.parents, [requests[0].hash]);
        assert_eq!(requests[1].node.parents, [results[0].hash]);
        assert_eq!(results[1].node.parents, [requests[1].hash]);
        assert_eq!(turn.stored.node.parents, [results[1].hash]);
        // The state goes from the invoke through the put to the end.
        assert_eq!((asked[0].state, asked[1].state), (before, before));
        let put = CallResult::try_from(&results[1].node).unwrap();
        assert!(put.state.is_some() && put.state != before);
        assert_eq!(turn.end.state, put.state);
    }
    // Another session begins with nothing.
    let other = bed.session("counter").await.say(&bed, "next").await;
    assert_eq!(other.done(), "1");
    worker.stop().await;
}
