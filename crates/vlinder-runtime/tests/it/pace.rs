//! How fast calls and turns are: only what would be off by an order of magnitude fails here; the
//! budgets are `vlinder bench`'s.

use crate::agents::{KV, agent};
use crate::bed::Bed;
use std::time::{Duration, Instant};
use vlinder_testkit::{CURRENT, NatsServer};

/// Makes calls on one kept connection, as a standard-library client does: head and body apart.
const CALLS: &str = r#"
def turn(body, request):
    connection = http.client.HTTPConnection(BRIDGE.hostname, BRIDGE.port)
    times = []
    for n in range(300):
        began = time.perf_counter()
        data = json.dumps({"path": f"x{n}"}).encode()
        connection.request("POST", f"{BRIDGE.path}/sqlite-kv/get", data, {"X-Vlinder-Invocation": request.invocation})
        response = connection.getresponse()
        response.read()
        assert response.status == 200
        times.append(time.perf_counter() - began)
    times.sort()
    return str(int(times[len(times) // 2] * 1e6))
"#;

/// Without quick acknowledgements each of these would wait 40 ms for the kernel.
const CALL_MAX_US: u64 = 20_000;

async fn pace(bed: Bed, what: &str) {
    let worker = bed.worker("test", 0);
    bed.deploy("calls", &agent(CALLS), KV).await;
    let mut session = bed.session("calls").await;
    let call: u64 = session.say(&bed, "go").await.done().parse().unwrap();
    // Not an echo: that would double the conversation with every turn.
    bed.deploy(
        "ok",
        &agent("def turn(body, request):\n    return b'ok'\n"),
        "",
    )
    .await;
    let mut times = Vec::new();
    let mut agent_us = Vec::new();
    let mut session = bed.session("ok").await;
    for _ in 0..200 {
        let began = Instant::now();
        let turn = session.say(&bed, "x").await;
        times.push(began.elapsed());
        agent_us.push(turn.stored.notes["agent_us"].parse::<u64>().unwrap());
    }
    times.sort();
    agent_us.sort();
    println!(
        "{what}: call p50 {call} us, turn p50 {:?}, of which the agent {} us",
        times[100], agent_us[100]
    );
    assert!(call < CALL_MAX_US, "a call takes {call} us");
    assert!(
        times[100] < Duration::from_millis(100),
        "a turn takes {:?}",
        times[100]
    );
    worker.stop().await;
}

#[tokio::test]
async fn calls_and_turns_are_not_held_up_when_embedded() {
    pace(Bed::new().await, "embedded").await;
}

#[tokio::test]
async fn calls_and_turns_are_not_held_up_over_nats() {
    let server = NatsServer::start(CURRENT).await;
    pace(Bed::over_nats(&server).await, "nats").await;
}
