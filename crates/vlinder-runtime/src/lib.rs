//! The agent runtimes: workers that run agents, hand them turns, and answer their calls.
//!
//! * [`launcher`] says what differs between runtimes: how an instance is started. [`process`] starts
//!   child processes.
//! * `fleet` brings what runs here toward what is deployed; `claims` decides who runs which replica;
//!   `holder` and `replica` keep one replica alive; `pool` knows which are ready.
//! * `turn` runs one turn from its invoke to its end, from the record where it was begun before.
//! * `bridge` is the agent's face: what the agent calls becomes requests on the bus.
//! * `history` is what was said before; `bundle` the agent's files; `logs` what it prints.
//!
//! It knows nothing of models, stores or gRPC: those are other workers, reached over the bus.

mod agent;
mod bridge;
pub mod bundle;
mod claims;
mod fleet;
mod history;
mod holder;
mod http;
pub mod launcher;
pub mod logs;
mod pool;
pub mod process;
mod queues;
mod replica;
pub mod secrets;
mod surge;
mod turn;

use agent::Shared;
use bytes::Bytes;
use launcher::Launcher;
use process::{ProcessLauncher, ProcessOptions};
use secrets::Secrets;
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};
use vlinder_worker::infra::InfraView;
use vlinder_worker::{Error, WorkerCx};

/// Instances of agents that start at the same time on one worker.
const STARTS_AT_ONCE: usize = 8;
/// Lines of agents that wait for the bus; more are only in the files.
const LIVE_LINES_MAX: usize = 1024;
/// Large bodies of calls that one worker holds at the same time, in bytes. Further ones wait.
const BODIES_BYTES_MAX: usize = 512 * 1024 * 1024;
/// In what pieces they are counted, in bytes; smaller bodies are not.
const BODY_UNIT_BYTES: usize = 64 * 1024;
/// Bodies above this many bytes are hashed and parsed on a thread of their own: a mebibyte takes a
/// few milliseconds, which is what a loop may be held up.
const LARGE_BODY_BYTES: usize = 1024 * 1024;

/// What every runtime worker is told.
pub struct Options {
    /// The labels of this node, for placement.
    pub labels: BTreeMap<String, String>,
    /// The bridge's socket, bound on loopback (or, for containers, where they reach it).
    pub bridge: TcpListener,
    /// How long turns may take to finish when the worker drains; then they are handed back.
    pub drain_within: Duration,
    /// Where agents' secrets come from.
    pub secrets: Arc<dyn Secrets>,
}

/// Runs process agents until the worker drains.
pub async fn run_process(
    cx: WorkerCx,
    options: Options,
    process: ProcessOptions,
) -> Result<(), Error> {
    let (lines, queue) = mpsc::channel(LIVE_LINES_MAX);
    let live: logs::Live = Box::new(move |agent, line| {
        // Whoever follows sees a gap when an agent floods; the file has every line.
        let _ = lines.try_send((agent.to_owned(), Bytes::copy_from_slice(line)));
    });
    let node = cx.id.node.to_string();
    let launcher = ProcessLauncher::new(process, cx.bus.clone(), cx.data_dir.clone(), &node, live);
    let sending = send_lines(cx.clone(), queue);
    tokio::select! {
        ended = run(cx, options, Arc::new(launcher)) => ended,
        never = sending => match never {},
    }
}

/// Sends agents' lines to whoever follows them, from any machine.
async fn send_lines(
    cx: WorkerCx,
    mut queue: mpsc::Receiver<(String, Bytes)>,
) -> std::convert::Infallible {
    while let Some((agent, line)) = queue.recv().await {
        let Ok(agent) = vlinder_core::AgentName::new(&agent) else {
            continue;
        };
        let subject = vlinder_worker::logs::agent_signal(&cx.ns, &agent);
        // Nobody may be listening; the file has the line.
        let _ = cx.bus.signal(&subject, line).await;
    }
    // The launcher is gone and the worker with it.
    std::future::pending().await
}

/// Runs the agents of a launcher's kind until the worker drains.
pub async fn run(cx: WorkerCx, options: Options, launcher: Arc<dyn Launcher>) -> Result<(), Error> {
    let listening = |source| Error::Io {
        what: "cannot use the bridge's socket".to_owned(),
        source,
    };
    options.bridge.set_nonblocking(true).map_err(listening)?;
    let address = options.bridge.local_addr().map_err(listening)?;
    let listener = tokio::net::TcpListener::from_std(options.bridge).map_err(listening)?;
    cx.control.note("bridge", &address.to_string());
    let shared = Arc::new(Shared {
        infra: InfraView::start(&cx).await?,
        launcher,
        callers: bridge::Callers::default(),
        histories: history::Histories::default(),
        queues: queues::KnownQueues::default(),
        secrets: options.secrets,
        bridge: address,
        starts: Semaphore::new(STARTS_AT_ONCE),
        bodies: Semaphore::new(BODIES_BYTES_MAX / BODY_UNIT_BYTES),
        cx,
    });
    let fleet = fleet::Fleet::new(shared.clone(), options.labels);
    tokio::select! {
        outcome = fleet.run(options.drain_within) => outcome,
        () = bridge::serve(listener, shared) => Ok(()),
    }
}

/// Does `work` over `len` bytes here, or on a thread of its own where it would hold up the loop.
async fn blocking_if_large<T: Send + 'static>(
    len: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    if len <= LARGE_BODY_BYTES {
        return work();
    }
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    }
}
