//! The agent runtimes: workers that run agents, hand them turns, and answer their calls.
//!
//! * [`launcher`] says what differs between runtimes: how an instance is started. [`process`] starts
//!   child processes, [`container`] containers.
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
pub mod container;
mod fleet;
mod history;
mod holder;
mod http;
pub mod launcher;
pub mod logs;
mod output;
mod pool;
pub mod process;
mod queues;
mod replica;
pub mod secrets;
mod surge;
mod turn;

use agent::Shared;
use bytes::Bytes;
use container::{ContainerLauncher, ContainerOptions};
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
    /// The bridge's socket, bound on loopback; none where each instance has one of its own.
    pub bridge: Option<TcpListener>,
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
    let (live, queue) = live_lines();
    let node = cx.id.node.to_string();
    let launcher = ProcessLauncher::new(process, cx.bus.clone(), cx.data_dir.clone(), &node, live);
    let sending = send_lines(cx.clone(), queue);
    tokio::select! {
        ended = run(cx, options, Arc::new(launcher)) => ended,
        never = sending => match never {},
    }
}

/// Runs container agents until the worker drains. Waits for the engine where it is absent.
pub async fn run_container(
    cx: WorkerCx,
    options: Options,
    container: ContainerOptions,
) -> Result<(), Error> {
    let (live, queue) = live_lines();
    let Some(launcher) = ContainerLauncher::start(&cx, container, live).await? else {
        return Ok(());
    };
    let launcher = Arc::new(launcher);
    let sending = send_lines(cx.clone(), queue);
    let watching = launcher.clone();
    tokio::select! {
        ended = run(cx, options, launcher) => ended,
        never = sending => match never {},
        never = watching.watch() => match never {},
    }
}

/// Where agents' lines go for those who follow them, and where they come out.
fn live_lines() -> (logs::Live, mpsc::Receiver<(String, Bytes)>) {
    let (lines, queue) = mpsc::channel(LIVE_LINES_MAX);
    let live: logs::Live = Box::new(move |agent, line| {
        // Whoever follows sees a gap when an agent floods; the file has every line.
        let _ = lines.try_send((agent.to_owned(), Bytes::copy_from_slice(line)));
    });
    (live, queue)
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
    let listener = options.bridge.map(|listener| {
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok((tokio::net::TcpListener::from_std(listener)?, address))
    });
    let listener = listener.transpose().map_err(listening)?;
    let address = listener.as_ref().map(|(_, address)| *address);
    if let Some(address) = address {
        cx.control.note("bridge", &address.to_string());
    }
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
    let bridge = async {
        match listener {
            Some((listener, _)) => bridge::serve(listener, shared, None).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        outcome = fleet.run(options.drain_within) => outcome,
        () = bridge => Ok(()),
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
