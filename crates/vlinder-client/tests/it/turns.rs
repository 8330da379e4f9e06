//! Turns: one submission, whatever happens to the connection.

use crate::fake::{client, nowhere};
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status};
use vlinder_client::{Error, Limits, TurnEvent};
use vlinder_config::Service;
use vlinder_proto::harness::harness_server::{Harness, HarnessServer};
use vlinder_proto::harness::run_event::Event as Said;
use vlinder_proto::harness::*;

type Boxed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What one stream of the harness does after its last event.
#[derive(Clone)]
enum Then {
    Close,
    Fail(Code),
    Hang,
}

/// What one call of `run` sends, and how its stream ends.
type Script = (Vec<Said>, Then);

/// A harness of which only `run` works: every call takes the next script.
#[derive(Clone, Default)]
struct Fake {
    scripts: Arc<Mutex<VecDeque<Script>>>,
    requests: Arc<Mutex<Vec<RunRequest>>>,
}

impl Fake {
    fn new(scripts: impl IntoIterator<Item = Script>) -> Self {
        Self {
            scripts: Arc::new(Mutex::new(scripts.into_iter().collect())),
            requests: Arc::default(),
        }
    }

    fn requests(&self) -> Vec<RunRequest> {
        self.requests.lock().unwrap().clone()
    }

    async fn serve(&self) -> (String, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let service = HarnessServer::new(self.clone());
        let task = tokio::spawn(async move {
            let incoming = TcpListenerStream::new(listener);
            let server = Server::builder().add_service(service);
            server.serve_with_incoming(incoming).await.unwrap();
        });
        (url, task)
    }
}

fn unused<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("not in this test"))
}

#[tonic::async_trait]
impl Harness for Fake {
    type RunStream = Boxed<RunEvent>;
    type EventsStream = Boxed<Event>;
    type BenchStream = Boxed<BenchEvent>;
    type ReplayStream = Boxed<ReplayEvent>;

    async fn run(&self, request: Request<RunRequest>) -> Result<Response<Self::RunStream>, Status> {
        self.requests.lock().unwrap().push(request.into_inner());
        let next = self.scripts.lock().unwrap().pop_front();
        let Some((events, then)) = next else {
            return Err(Status::not_found("the script is over"));
        };
        if let (true, Then::Fail(code)) = (events.is_empty(), &then) {
            return Err(Status::new(*code, "as scripted"));
        }
        let events = events
            .into_iter()
            .map(|event| Ok(RunEvent { event: Some(event) }));
        let events = tokio_stream::iter(events.collect::<Vec<_>>());
        Ok(Response::new(match then {
            Then::Close => Box::pin(events),
            Then::Fail(code) => {
                Box::pin(events.chain(tokio_stream::once(Err(Status::new(code, "as scripted")))))
            }
            Then::Hang => Box::pin(events.chain(tokio_stream::pending())),
        }))
    }

    async fn cancel(&self, _: Request<CancelRequest>) -> Result<Response<CancelResponse>, Status> {
        unused()
    }
    async fn fork(&self, _: Request<ForkRequest>) -> Result<Response<ForkResponse>, Status> {
        unused()
    }
    async fn promote(
        &self,
        _: Request<PromoteRequest>,
    ) -> Result<Response<PromoteResponse>, Status> {
        unused()
    }
    async fn replay(
        &self,
        _: Request<ReplayRequest>,
    ) -> Result<Response<Self::ReplayStream>, Status> {
        unused()
    }
    async fn list_queues(
        &self,
        _: Request<ListQueuesRequest>,
    ) -> Result<Response<ListQueuesResponse>, Status> {
        unused()
    }
    async fn list_dead(
        &self,
        _: Request<ListDeadRequest>,
    ) -> Result<Response<ListDeadResponse>, Status> {
        unused()
    }
    async fn show_dead(
        &self,
        _: Request<ShowDeadRequest>,
    ) -> Result<Response<ShowDeadResponse>, Status> {
        unused()
    }
    async fn redrive_dead(
        &self,
        _: Request<RedriveDeadRequest>,
    ) -> Result<Response<RedriveDeadResponse>, Status> {
        unused()
    }
    async fn events(
        &self,
        _: Request<EventsRequest>,
    ) -> Result<Response<Self::EventsStream>, Status> {
        unused()
    }
    async fn bench(&self, _: Request<BenchRequest>) -> Result<Response<Self::BenchStream>, Status> {
        unused()
    }
}

fn accepted() -> Said {
    Said::Accepted(Accepted {
        session: "s-1".into(),
        branch: "main".into(),
        ..Default::default()
    })
}

fn chunk(text: &str) -> Said {
    Said::Chunk(Chunk {
        text: text.into(),
        kind: "token".into(),
    })
}

fn end() -> Said {
    Said::End(End {
        outcome: "done".into(),
        output: b"hello".to_vec(),
        ..Default::default()
    })
}

fn hello() -> RunRequest {
    RunRequest {
        agent: "a".into(),
        input: b"hi".to_vec(),
        ..Default::default()
    }
}

fn names(events: &[TurnEvent]) -> Vec<&'static str> {
    let name = |event: &TurnEvent| match event {
        TurnEvent::Accepted(_) => "accepted",
        TurnEvent::Chunk(_) => "chunk",
        TurnEvent::Waiting(_) => "waiting",
        TurnEvent::Broken(_) => "broken",
        TurnEvent::End(_) => "end",
    };
    events.iter().map(name).collect()
}

async fn all(turn: &mut vlinder_client::Turn) -> Result<Vec<TurnEvent>, Error> {
    let mut events = Vec::new();
    while let Some(event) = turn.next().await? {
        events.push(event);
    }
    Ok(events)
}

#[tokio::test]
async fn a_turn_from_its_beginning_to_its_end() {
    let fake = Fake::new([(vec![accepted(), chunk("hel"), end()], Then::Close)]);
    let (url, _task) = fake.serve().await;
    let mut turn = client(Service::Harness, &[&url]).run(hello());
    let events = all(&mut turn).await.unwrap();
    assert_eq!(names(&events), ["accepted", "chunk", "end"]);
    let [request] = &fake.requests()[..] else {
        panic!("one call was expected")
    };
    assert!(request.first_try);
    assert_eq!(request.submission, turn.submission());
    assert_eq!(request.namespace, "default");
}

#[tokio::test]
async fn a_broken_stream_is_taken_up_under_the_same_submission() {
    let fake = Fake::new([
        (vec![], Then::Fail(Code::Unavailable)),
        (vec![accepted(), chunk("he")], Then::Fail(Code::Unavailable)),
        (vec![accepted()], Then::Close),
        (vec![accepted(), end()], Then::Close),
    ]);
    let (url, _task) = fake.serve().await;
    let mut turn = client(Service::Harness, &[&url]).run(hello());
    let events = all(&mut turn).await.unwrap();
    let expected = ["broken", "accepted", "chunk", "broken", "broken", "end"];
    assert_eq!(names(&events), expected);
    let requests = fake.requests();
    assert_eq!(requests.len(), 4);
    for (index, request) in requests.iter().enumerate() {
        assert_eq!(request.first_try, index == 0, "call {index}");
        assert_eq!(request.submission, turn.submission());
    }
    // Once the session is known it is named, so that a promotion cannot lead the turn elsewhere.
    assert_eq!(
        (requests[1].session.as_str(), requests[2].session.as_str()),
        ("", "s-1")
    );
}

#[tokio::test]
async fn a_given_submission_may_have_been_sent_before() {
    let fake = Fake::new([(vec![accepted(), end()], Then::Close)]);
    let (url, _task) = fake.serve().await;
    let request = RunRequest {
        submission: "mine".into(),
        first_try: true,
        ..hello()
    };
    let mut turn = client(Service::Harness, &[&url]).run(request);
    all(&mut turn).await.unwrap();
    assert!(!fake.requests()[0].first_try);
}

#[tokio::test]
async fn a_refused_turn_is_not_sent_again() {
    let fake = Fake::new([(vec![], Then::Fail(Code::Aborted))]);
    let (url, _task) = fake.serve().await;
    let mut turn = client(Service::Harness, &[&url]).run(hello());
    let error = all(&mut turn).await.unwrap_err();
    assert_eq!((error.exit_code(), fake.requests().len()), (9, 1));
    assert!(turn.next().await.unwrap().is_none());
}

#[tokio::test]
async fn where_nothing_listens_there_is_no_turn_to_look_after() {
    let url = nowhere().await;
    let mut turn = client(Service::Harness, &[&url]).run(hello());
    let error = all(&mut turn).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
}

/// A way to a harness that can be cut, as when its node dies: connections close, new ones are refused.
async fn bridge_to(url: &str) -> (String, JoinHandle<()>) {
    let target = url.strip_prefix("http://").unwrap().to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let task = tokio::spawn(async move {
        let mut open = JoinSet::new();
        loop {
            let (mut near, _) = listener.accept().await.unwrap();
            let target = target.clone();
            open.spawn(async move {
                let mut far = TcpStream::connect(target).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            });
        }
    });
    (url, task)
}

#[tokio::test]
async fn a_turn_whose_harness_is_gone_moves_to_another_one() {
    let first = Fake::new([(vec![accepted()], Then::Hang)]);
    let second = Fake::new([(vec![accepted(), end()], Then::Close)]);
    let (url, _first) = first.serve().await;
    let (one, bridge) = bridge_to(&url).await;
    let (two, _second) = second.serve().await;
    let dead = nowhere().await;
    let mut turn = client(Service::Harness, &[&dead, &one, &two]).run(hello());
    let began = turn.next().await.unwrap();
    assert!(matches!(began, Some(TurnEvent::Accepted(_))));
    // Nobody says anything: a future that is dropped loses nothing and asks nobody twice.
    let waited = tokio::time::timeout(Duration::from_millis(100), turn.next()).await;
    assert!(waited.is_err(), "an event came from a harness that hangs");
    bridge.abort();
    let events = all(&mut turn).await.unwrap();
    assert_eq!(names(&events), ["broken", "end"]);
    assert_eq!((first.requests().len(), second.requests().len()), (1, 1));
    let taken_up = &second.requests()[0];
    assert_eq!(taken_up.submission, turn.submission());
    assert!(!taken_up.first_try);
}

#[tokio::test]
async fn a_turn_that_nobody_can_be_asked_about_is_named() {
    let fake = Fake::new([(vec![accepted()], Then::Hang)]);
    let (url, _task) = fake.serve().await;
    let (way, bridge) = bridge_to(&url).await;
    let client = client(Service::Harness, &[&way]);
    let short = Limits {
        reattach: Duration::from_millis(500),
        ..client.limits().clone()
    };
    let mut turn = client.with_limits(short).run(hello());
    assert!(matches!(
        turn.next().await,
        Ok(Some(TurnEvent::Accepted(_)))
    ));
    bridge.abort();
    assert!(matches!(turn.next().await, Ok(Some(TurnEvent::Broken(_)))));
    let error = turn.next().await.unwrap_err();
    assert!(matches!(error, Error::TurnLost { .. }), "{error:?}");
    assert!(error.to_string().contains(turn.submission()), "{error}");
    assert_eq!(error.exit_code(), 3);
}
