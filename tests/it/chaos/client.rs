//! A client that holds one conversation and never gives a turn up before it has its end.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use vlinder_proto::harness::harness_client::HarnessClient;
use vlinder_proto::harness::run_event::Event;
use vlinder_proto::harness::{End, RunRequest};

/// A turn without an end after this long hangs. Outages last seconds; the agent's own limit is 2 min.
const TURN_DEADLINE: Duration = Duration::from_secs(60);
/// A connection whose other side is frozen is noticed after these together.
const PING_EVERY: Duration = Duration::from_secs(1);
const PING_DEADLINE: Duration = Duration::from_secs(2);
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);
/// A harness that has not accepted a turn by then may be waiting for a bus that is away: ask again.
const ACCEPT_DEADLINE: Duration = Duration::from_secs(10);
/// Pause between two tries.
const RETRY: Duration = Duration::from_millis(50);
/// Failed tries that are shown when a turn hangs.
const TRIES_SHOWN: usize = 20;

/// A turn with the end that the client was told.
#[derive(Debug, Clone)]
pub struct Told {
    pub submission: String,
    pub end: End,
    pub sent: Instant,
    pub ended: Instant,
    pub tries: u32,
    /// The session's count after it.
    pub count: u64,
}

/// What one client was told, in order.
#[derive(Debug)]
pub struct Talk {
    pub session: String,
    pub turns: Vec<Told>,
}

/// One client with a session of its own.
pub struct Client {
    data_dir: PathBuf,
    session: String,
    connection: Option<(String, Channel)>,
}

impl Client {
    pub fn new(data_dir: PathBuf, seed: u64, number: usize) -> Self {
        Self {
            data_dir,
            session: format!("chaos-{seed}-{number}"),
            connection: None,
        }
    }

    /// Takes turns until it is told to stop, then one more: that one must work.
    pub async fn converse(mut self, stop: Arc<AtomicBool>) -> Talk {
        let mut turns: Vec<Told> = Vec::new();
        let mut count = 0;
        loop {
            let is_last = stop.load(Ordering::Relaxed);
            let submission = format!("{}-{}", self.session, turns.len() + 1);
            let told = self.take_turn(submission, count).await;
            count = told.count;
            let outcome = told.end.outcome.clone();
            turns.push(told);
            if is_last {
                assert_eq!(outcome, "done", "after the killing: {:#?}", turns.last());
                return Talk {
                    session: self.session,
                    turns,
                };
            }
        }
    }

    /// One turn, sent again under its name until it has an end.
    async fn take_turn(&mut self, submission: String, before: u64) -> Told {
        let sent = Instant::now();
        let mut failures: Vec<String> = Vec::new();
        loop {
            let first_try = failures.is_empty();
            let tried = tokio::time::timeout_at(
                (sent + TURN_DEADLINE).into(),
                self.try_turn(&submission, first_try),
            );
            let at = sent.elapsed();
            let failure = match tried.await {
                Ok(Ok(end)) => {
                    let mut told = Told {
                        submission,
                        end,
                        sent,
                        ended: Instant::now(),
                        tries: failures.len() as u32 + 1,
                        count: before,
                    };
                    told.count += u64::from(told.end.outcome == "done");
                    told.check();
                    return told;
                }
                Ok(Err(failure)) => failure,
                Err(_) => "no end came".to_owned(),
            };
            failures.push(format!("at {at:?}: {failure}"));
            let shown = &failures[failures.len().saturating_sub(TRIES_SHOWN)..];
            assert!(
                sent.elapsed() < TURN_DEADLINE,
                "turn {submission} hangs; the last tries: {shown:#?}"
            );
            self.connection = None;
            tokio::time::sleep(RETRY).await;
        }
    }

    /// One try. `Err`: in words why it is worth another.
    async fn try_turn(&mut self, submission: &str, first_try: bool) -> Result<End, String> {
        let token = fs::read_to_string(self.data_dir.join("run").join("token"));
        let token = token.map_err(|error| format!("no token: {error}"))?;
        let mut request = Request::new(RunRequest {
            agent: "counter".to_owned(),
            input: submission.as_bytes().to_vec(),
            session: self.session.clone(),
            submission: submission.to_owned(),
            first_try,
            ..RunRequest::default()
        });
        let bearer = format!("Bearer {}", token.trim()).parse();
        let bearer = bearer.map_err(|_| "the token is half written".to_owned())?;
        request.metadata_mut().insert("authorization", bearer);
        let channel = self.channel().await?;
        let mut harness = HarnessClient::new(channel);
        let accepting = async {
            let mut stream = harness.run(request).await?.into_inner();
            let first = stream.message().await?;
            Ok::<_, Status>((stream, first))
        };
        let accepted = tokio::time::timeout(ACCEPT_DEADLINE, accepting).await;
        let (mut stream, mut next) = match accepted {
            Ok(Ok(accepted)) => accepted,
            Ok(Err(status)) => return Err(worth_another(status)),
            Err(_) => return Err(format!("not accepted within {ACCEPT_DEADLINE:?}")),
        };
        loop {
            let event =
                next.unwrap_or_else(|| panic!("{submission}: the stream ended without an end"));
            match event.event {
                Some(Event::Accepted(accepted)) => {
                    assert_eq!(accepted.submission, submission);
                    assert_eq!(accepted.session, self.session);
                }
                Some(Event::End(end)) => return Ok(end),
                _ => {}
            }
            next = stream.message().await.map_err(worth_another)?;
        }
    }

    /// The connection to the harness, wherever it listens by now.
    async fn channel(&mut self) -> Result<Channel, String> {
        let path = self.data_dir.join("run").join("addresses.json");
        let text = fs::read_to_string(path).map_err(|error| format!("no addresses: {error}"))?;
        let addresses: serde_json::Value = serde_json::from_str(&text)
            .map_err(|error| format!("addresses.json is half written: {error}"))?;
        let address = addresses["harness"].as_str().unwrap_or_default().to_owned();
        if let Some((known, channel)) = &self.connection
            && *known == address
        {
            return Ok(channel.clone());
        }
        let endpoint = Endpoint::from_shared(address.clone()).map_err(|error| error.to_string())?;
        let channel = endpoint
            .connect_timeout(CONNECT_DEADLINE)
            .http2_keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_DEADLINE)
            .connect()
            .await
            .map_err(|error| format!("cannot connect to {address}: {error}"))?;
        self.connection = Some((address, channel.clone()));
        Ok(channel)
    }
}

/// What a client may hear while things die: that the service is away, or that its connection broke.
/// Anything else is wrong.
fn worth_another(status: Status) -> String {
    let is_broken_connection = std::error::Error::source(&status).is_some();
    assert!(
        is_broken_connection || matches!(status.code(), Code::Unavailable),
        "the harness answered {status:#?}"
    );
    format!("{}: {}", status.code(), status.message())
}

impl Told {
    /// The answer must be the session's count, or a failure that says why.
    fn check(&self) {
        match self.end.outcome.as_str() {
            "done" => {
                let said = String::from_utf8_lossy(&self.end.output);
                assert_eq!(said, self.count.to_string(), "{self:#?}");
            }
            "failed" => assert!(
                !self.end.code.is_empty() && !self.end.output.is_empty(),
                "{self:#?}"
            ),
            other => panic!("{other}: nobody cancels, and no deadline passed: {self:#?}"),
        }
        assert_eq!(self.end.hash.len(), 64, "{self:#?}");
    }
}
