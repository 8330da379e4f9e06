//! A worker process: one role, one single-threaded runtime, one line to the supervisor.

use crate::control::Line;
use crate::listeners::GRPC;
use crate::roles::{self, Setup};
use crate::{bus, logs};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use vlinder_config::Config;
use vlinder_core::Namespace;
use vlinder_supervisor::control::{
    self, ControlEvent, ControlEvents, ControlHandle, Start, WorkerFailure,
};
use vlinder_worker::{Error, WorkerCx, WorkerId};

/// What a worker process is told at its start.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WorkerConfig {
    /// The node's configuration.
    pub config: Config,
    /// The node's data directory.
    pub data_dir: PathBuf,
    /// The credential of RPCs.
    pub token: String,
}

/// The entry of `vlinderd worker`.
pub fn main() -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("cannot start a runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(async {
        let (start, handle, events) = control::connect_from_fd().await.map_err(|error| {
            WorkerFailure::Failed(format!(
                "`vlinderd worker` is started by vlinderd only: {error}"
            ))
        })?;
        run(start, handle, events).await
    });
    // Tasks that wait for the network do not hold up the end.
    runtime.shutdown_background();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

async fn run(
    start: Start,
    handle: ControlHandle,
    events: ControlEvents,
) -> Result<(), WorkerFailure> {
    let told: WorkerConfig = serde_json::from_value(start.config.clone()).map_err(|error| {
        WorkerFailure::Configuration(format!("the supervisor's start message: {error}"))
    })?;
    logs::init_worker(&told.config);
    let name = format!(
        "vlinderd {} {}/{}",
        told.config.node.name, start.role, start.index
    );
    let bus = bus::connect(&told.config, &name, roles::BUS_DEADLINE)
        .await
        .map_err(|error| failure(error.into()))?;
    let ended = serve(
        start,
        handle,
        events,
        bus.clone(),
        Arc::new(told.config),
        told.data_dir,
        told.token,
    )
    .await;
    bus.close().await;
    ended
}

/// Runs one worker on a bus, in a process of its own or as a task.
pub async fn serve(
    mut start: Start,
    handle: ControlHandle,
    events: ControlEvents,
    bus: vlinder_bus::Bus,
    config: Arc<Config>,
    data_dir: PathBuf,
    token: String,
) -> Result<(), WorkerFailure> {
    let listener = start.take_listener(GRPC);
    let address = listener
        .as_ref()
        .and_then(|socket| socket.local_addr().ok());
    let addresses: BTreeMap<String, String> = address
        .into_iter()
        .map(|address| (GRPC.to_owned(), address.to_string()))
        .collect();
    let id = WorkerId {
        node: config.node.name.clone(),
        role: start.role,
        index: start.index,
    };
    let drain = CancellationToken::new();
    let line = Line::new(handle, addresses);
    let cx = WorkerCx::new(
        id,
        bus,
        Namespace::default_ns(),
        data_dir.into(),
        line,
        drain.clone(),
    );
    let work = roles::run(
        cx,
        Setup {
            config,
            token,
            listener,
        },
    );
    tokio::pin!(work);
    let mut events = events;
    loop {
        tokio::select! {
            ended = &mut work => return ended.map_err(failure),
            event = events.next() => match event {
                ControlEvent::Drain => drain.cancel(),
                ControlEvent::Reload(value) => {
                    if let Ok(told) = serde_json::from_value::<WorkerConfig>(value) {
                        logs::set_level(&told.config);
                    }
                }
            }
        }
    }
}

/// The error with all of its causes, in one line.
fn failure(error: Error) -> WorkerFailure {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    match error {
        Error::Config(_) => WorkerFailure::Configuration(text),
        _ => WorkerFailure::Failed(text),
    }
}
