//! `vlinder bench`: this installation against its own bus, in one run.
//!
//! * *raw hop*: publish → pull → publish → seen on the republished subject, nothing else.
//! * *echo turn*: the same through harness and process runtime, less the agent's own HTTP time.
//! * *service hop*: a kv get through the bridge, as the agent measures it.
//! * *at 64 in flight*: turns a second against raw hops a second.
//!
//! The raw hops go through a namespace of their own (`bench`), so that they do not stand in the record
//! of sessions; the turns are real and do.

use super::Shared;
use super::run;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use vlinder_bus::backend::{Raw, Verdict};
use vlinder_bus::{QueueSpec, StreamName};
use vlinder_core::manifest::AgentManifest;
use vlinder_core::{AgentName, ContentHash, Namespace, SessionId};
use vlinder_proto::harness as proto;
use vlinder_worker::infra::{AGENT, AgentVersion};
use vlinder_worker::replicas;

/// Samples of each measure where the caller does not say, and the most.
const HOPS: (u32, u32) = (500, 20_000);
/// In flight where the caller does not say, and the most.
const IN_FLIGHT: (u32, u32) = (64, 512);
/// Samples that are measured and thrown away first.
const WARM_UP: u32 = 50;
/// How long one measure may take as a whole.
const MEASURE_DEADLINE: Duration = Duration::from_secs(120);
/// How long the echo agent may take to start.
const AGENT_DEADLINE: Duration = Duration::from_secs(30);
/// Input that makes the echo agent measure kv gets: the count follows.
const KV_PROBE: &str = "kv-probe ";
const AGENT_NAME: &str = "vlinder-bench";

/// What the bench needs to know of its node.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// The command that runs the built-in echo agent.
    pub agent_command: String,
    /// A gzipped tar without files: the echo agent's directory.
    pub empty_bundle: Bytes,
}

/// Runs the bench; its report is the last event.
pub fn stream(
    shared: Arc<Shared>,
    request: proto::BenchRequest,
) -> Result<impl Stream<Item = Result<proto::BenchEvent, Status>> + Send, Status> {
    let pick = |asked: u32, (default, max): (u32, u32), what: &str| match asked {
        0 => Ok(default),
        n if n <= max => Ok(n),
        n => Err(Status::invalid_argument(format!(
            "{what}: {n}, expected at most {max}"
        ))),
    };
    let hops = pick(request.hops, HOPS, "hops")?;
    let in_flight = pick(request.in_flight, IN_FLIGHT, "in_flight")?;
    let (tx, rx) = mpsc::channel(64);
    tokio::spawn(async move {
        let bench = Bench {
            shared,
            hops,
            in_flight,
            tx: tx.clone(),
        };
        let last = tokio::select! {
            report = bench.run() => report,
            // A client that left is not measured for.
            () = tx.closed() => return,
        };
        let event = last.map(|report| proto::BenchEvent {
            event: Some(proto::bench_event::Event::Report(report.to_string())),
        });
        let _ = tx.send(event).await;
    });
    Ok(ReceiverStream::new(rx))
}

struct Bench {
    shared: Arc<Shared>,
    hops: u32,
    in_flight: u32,
    tx: mpsc::Sender<Result<proto::BenchEvent, Status>>,
}

/// Sorted samples in microseconds.
struct Samples(Vec<u64>);

impl Samples {
    fn new(mut micros: Vec<u64>) -> Self {
        micros.sort_unstable();
        Self(micros)
    }

    fn percentile(&self, percent: usize) -> u64 {
        let index = (self.0.len() * percent / 100).min(self.0.len().saturating_sub(1));
        self.0.get(index).copied().unwrap_or(0)
    }

    fn json(&self) -> Value {
        json!({ "p50_us": self.percentile(50), "p99_us": self.percentile(99), "samples": self.0.len() })
    }
}

impl Bench {
    async fn run(&self) -> Result<Value, Status> {
        let backend = self.shared.cx.bus.backend().name();
        self.say("raw hop, one at a time").await;
        let raw = self.raw_hops(self.hops, 1).await?;
        self.say(&format!("raw hop, {} in flight", self.in_flight))
            .await;
        let raw_many = self.raw_hops(self.hops * 4, self.in_flight).await?;
        self.say("starting the echo agent").await;
        self.deploy().await?;
        let measured = self.turns(&raw.0, raw_many.1).await;
        let removed = self.remove().await;
        let mut report = measured?;
        removed?;
        report["backend"] = backend.into();
        report["raw_hop"] = raw.0.json();
        Ok(report)
    }

    async fn turns(&self, raw: &Samples, raw_per_s: f64) -> Result<Value, Status> {
        self.say("echo turn, one at a time").await;
        let session = SessionId::fresh();
        for _ in 0..WARM_UP {
            self.turn(&session, "warm-up").await?;
        }
        let mut whole = Vec::new();
        let mut http = Vec::new();
        let mut without = Vec::new();
        for _ in 0..self.hops {
            let (total, agent) = self.turn(&session, "hello").await?;
            whole.push(total);
            http.push(agent);
            without.push(total.saturating_sub(agent));
        }
        self.say("service hop: kv get through the bridge").await;
        let service = Samples::new(self.kv_probe().await?);
        self.say(&format!("echo turns, {} in flight", self.in_flight))
            .await;
        let each = (self.hops * 4).div_ceil(self.in_flight);
        let count = each * self.in_flight;
        let began = Instant::now();
        let lanes = (0..self.in_flight).map(|_| self.lane(each));
        let lanes = futures::future::try_join_all(lanes);
        tokio::time::timeout(MEASURE_DEADLINE, lanes)
            .await
            .map_err(|_| {
                Status::deadline_exceeded("the turns in flight took longer than 120 s")
            })??;
        let turns_per_s = f64::from(count) / began.elapsed().as_secs_f64();
        let (whole, http, without) = (
            Samples::new(whole),
            Samples::new(http),
            Samples::new(without),
        );
        let ratio = |value: u64| round2(value as f64 / raw.percentile(50).max(1) as f64);
        Ok(json!({
            "service_hop": service.json(),
            "echo_turn": {
                "p50_us": without.percentile(50), "p99_us": without.percentile(99),
                "agent_http_p50_us": http.percentile(50),
                "whole_p50_us": whole.percentile(50), "whole_p99_us": whole.percentile(99),
                "samples": whole.0.len(),
            },
            "in_flight_64": {
                "turns_per_s": round2(turns_per_s), "raw_per_s": round2(raw_per_s), "in_flight": self.in_flight,
            },
            "ratios": {
                "service_hop": ratio(service.percentile(50)),
                "echo_turn": ratio(without.percentile(50)),
                "in_flight_64": round2(turns_per_s / raw_per_s.max(0.001)),
            },
        }))
    }

    /// Some turns, one after another, in a session of their own.
    async fn lane(&self, turns: u32) -> Result<(), Status> {
        let session = SessionId::fresh();
        for _ in 0..turns {
            self.turn(&session, "hello").await?;
        }
        Ok(())
    }

    /// One turn: its time and the agent's HTTP time, in microseconds.
    async fn turn(&self, session: &SessionId, input: &str) -> Result<(u64, u64), Status> {
        let (took, _, agent_us) = self.turn_with_output(session, input).await?;
        Ok((took, agent_us))
    }

    async fn turn_with_output(
        &self,
        session: &SessionId,
        input: &str,
    ) -> Result<(u64, Vec<u8>, u64), Status> {
        let request = proto::RunRequest {
            agent: AGENT_NAME.to_owned(),
            session: session.to_string(),
            input: input.as_bytes().to_vec(),
            timeout_ms: 20_000,
            ..Default::default()
        };
        let began = Instant::now();
        let turn = run::accept(&self.shared, request).await?;
        let (end, agent_us) = turn.finish(&self.shared).await?;
        let took = began.elapsed().as_micros() as u64;
        if end.outcome != "done" {
            let text = String::from_utf8_lossy(&end.output).into_owned();
            return Err(Status::aborted(format!(
                "a turn of the echo agent ended as {}: {text}",
                end.outcome
            )));
        }
        Ok((took, end.output, agent_us))
    }

    async fn kv_probe(&self) -> Result<Vec<u64>, Status> {
        let (_, output, _) = self
            .turn_with_output(&SessionId::fresh(), &format!("{KV_PROBE}{}", self.hops))
            .await?;
        serde_json::from_slice(&output).map_err(|_| {
            Status::aborted(format!(
                "the echo agent could not measure: {}",
                String::from_utf8_lossy(&output)
            ))
        })
    }

    async fn deploy(&self) -> Result<(), Status> {
        let cx = &self.shared.cx;
        let manifest = format!(
            "name = \"{AGENT_NAME}\"\ndescription = \"Answers what it is told, for vlinder bench.\"\n\
             runtime = \"process\"\nexecutable = {}\nobject_storage = \"sqlite://{AGENT_NAME}\"\n\
             concurrency = {}\n[placement]\nnode = \"{}\"\n",
            Value::from(self.shared.bench.agent_command.clone()),
            self.in_flight.max(1),
            cx.id.node,
        );
        let manifest =
            AgentManifest::parse(&manifest).map_err(|error| Status::internal(error.to_string()))?;
        let bundle = self.shared.bench.empty_bundle.clone();
        let version = AgentVersion {
            bundle_len: bundle.len() as u64,
            bundle: Some(
                cx.bus
                    .blob_put(bundle)
                    .await
                    .map_err(crate::status::of_bus)?,
            ),
            manifest,
        };
        let agent = AgentName::new(AGENT_NAME).map_err(crate::status::of_id)?;
        let queue = QueueSpec {
            stream: cx.log(),
            name: vlinder_bus::subjects::agent_queue(&agent),
            filter: vlinder_bus::subjects::invokes_of(&cx.ns, &agent),
            from_start: true,
        };
        cx.bus
            .ensure_queue(&queue)
            .await
            .map_err(crate::status::of_bus)?;
        let value =
            serde_json::to_value(version).map_err(|error| Status::internal(error.to_string()))?;
        self.shared
            .infra
            .fresh()
            .await
            .map_err(crate::status::of_worker)?;
        let seq = self
            .shared
            .infra
            .append(AGENT, AGENT_NAME, Some(&value))
            .await
            .map_err(crate::status::of_bus)?;
        self.shared
            .infra
            .at_least(seq)
            .await
            .map_err(crate::status::of_worker)?;
        self.wait_for_replica(&agent, seq).await
    }

    async fn wait_for_replica(&self, agent: &AgentName, version: u64) -> Result<(), Status> {
        let key = replicas::replica_key(agent, 0);
        let watch = self
            .shared
            .cx
            .bus
            .kv_watch(vlinder_bus::streams::BUCKET_REPLICAS)
            .await;
        let mut watch = watch.map_err(crate::status::of_bus)?;
        let ready = async {
            while let Some(event) = watch.next().await {
                if let Ok(vlinder_bus::KvEvent::Put(entry)) = event
                    && entry.key == key
                    && let Ok(claim) =
                        serde_json::from_slice::<replicas::ReplicaClaim>(&entry.value)
                    && claim.state == "ready"
                    && claim.version == version
                {
                    return;
                }
            }
        };
        tokio::time::timeout(AGENT_DEADLINE, ready).await.map_err(|_| {
            Status::unavailable("the echo agent did not start within 30 s: does this node run agent.process workers?")
        })
    }

    async fn remove(&self) -> Result<(), Status> {
        self.shared
            .infra
            .fresh()
            .await
            .map_err(crate::status::of_worker)?;
        self.shared
            .infra
            .append(AGENT, AGENT_NAME, None)
            .await
            .map_err(crate::status::of_bus)?;
        Ok(())
    }

    async fn say(&self, text: &str) {
        let event = proto::BenchEvent {
            event: Some(proto::bench_event::Event::Progress(text.to_owned())),
        };
        let _ = self.tx.send(Ok(event)).await;
    }

    /// `count` raw hops with `in_flight` at once: the samples and the rate per second.
    async fn raw_hops(&self, count: u32, in_flight: u32) -> Result<(Samples, f64), Status> {
        let lane = RawLane::open(&self.shared).await?;
        let measured = lane.measure(count, in_flight);
        let measured = tokio::time::timeout(MEASURE_DEADLINE, measured).await;
        lane.close().await;
        measured.map_err(|_| Status::deadline_exceeded("the raw hops took longer than 120 s"))?
    }
}

/// The raw bus: a queue with a worker that answers at once, and nothing else.
struct RawLane {
    backend: Arc<dyn vlinder_bus::backend::Backend>,
    stream: StreamName,
    queue: String,
    subject: String,
    lane: String,
    worker: tokio::task::JoinHandle<()>,
}

const BENCH_NS: &str = "bench";

impl RawLane {
    async fn open(shared: &Shared) -> Result<Self, Status> {
        let ns = Namespace::new(BENCH_NS).map_err(crate::status::of_id)?;
        let bus = &shared.cx.bus;
        bus.prepare(&ns).await.map_err(crate::status::of_bus)?;
        let backend = bus.backend().clone();
        let stream = StreamName::Log(ns);
        let lane = format!("l{:016x}", rand::random::<u64>());
        let subject = format!("vlinder.v1.{BENCH_NS}.req.bench.raw.{lane}");
        let queue = format!("bench-{lane}");
        let spec = QueueSpec {
            stream: stream.clone(),
            name: queue.clone(),
            filter: subject.clone(),
            from_start: true,
        };
        backend
            .ensure_queue(&spec)
            .await
            .map_err(crate::status::of_bus)?;
        let mut puller = backend
            .puller(&stream, &queue)
            .await
            .map_err(crate::status::of_bus)?;
        let (work, into) = (backend.clone(), stream.clone());
        let worker = tokio::spawn(async move {
            while let Ok(deliveries) = puller.next(64).await {
                for delivery in deliveries {
                    let (work, into) = (work.clone(), into.clone());
                    tokio::spawn(async move {
                        let reply = delivery
                            .stored
                            .headers
                            .iter()
                            .find(|(name, _)| name == "Reply");
                        let Some((_, reply)) = reply else { return };
                        let answer = raw(reply.clone(), vec![], delivery.stored.body);
                        let _ = work.append(&into, &answer).await;
                        let _ = work.verdict(&delivery.token, Verdict::Ack).await;
                    });
                }
            }
        });
        Ok(Self {
            backend,
            stream,
            queue,
            subject,
            lane,
            worker,
        })
    }

    async fn measure(&self, count: u32, in_flight: u32) -> Result<(Samples, f64), Status> {
        for index in 0..WARM_UP {
            self.hop(u64::from(index) | 1 << 40).await?;
        }
        let began = Instant::now();
        let hops = futures::stream::iter(0..u64::from(count)).map(|index| self.hop(index));
        let samples: Vec<u64> = hops
            .buffer_unordered(in_flight as usize)
            .try_collect()
            .await?;
        let rate = f64::from(count) / began.elapsed().as_secs_f64();
        Ok((Samples::new(samples), rate))
    }

    async fn hop(&self, index: u64) -> Result<u64, Status> {
        let reply = format!("vlinder.v1.{BENCH_NS}.res.{}-{index}.call", self.lane);
        let began = Instant::now();
        let mut seen = self
            .backend
            .seen(&reply)
            .await
            .map_err(crate::status::of_bus)?;
        let message = raw(
            self.subject.clone(),
            vec![("Reply".to_owned(), reply)],
            Bytes::from_static(b"hello"),
        );
        self.backend
            .append(&self.stream, &message)
            .await
            .map_err(crate::status::of_bus)?;
        let answer = tokio::time::timeout(Duration::from_secs(10), seen.next()).await;
        match answer {
            Ok(Some(_)) => Ok(began.elapsed().as_micros() as u64),
            _ => Err(Status::deadline_exceeded(
                "a raw hop was not answered within 10 s",
            )),
        }
    }

    async fn close(self) {
        self.worker.abort();
        let _ = self.backend.delete_queue(&self.stream, &self.queue).await;
    }
}

fn raw(subject: String, headers: Vec<(String, String)>, body: Bytes) -> Raw {
    let id = format!(
        "bench:{}",
        ContentHash::of(rand::random::<u128>().to_string().as_bytes()).short()
    );
    Raw {
        subject,
        headers,
        body,
        id,
        expect_last: None,
    }
}

fn round2(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}
