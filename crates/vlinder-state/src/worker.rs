//! The state worker: a projection, its follower, and the service over it.

use crate::error::{Error, chain};
use crate::projection::{Projection, Reporter};
use crate::service::StateService;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;
use vlinder_worker::WorkerCx;

/// How long a start waits for the projection to catch up. After that the worker serves, and reads
/// say by how much it lags, until it has: a large log takes longer to project than a start may.
pub const START_CATCH_UP: Duration = Duration::from_secs(3);

/// A running state worker. Dropping it ends its follower.
pub struct StateWorker {
    service: StateService,
    projection: Projection,
    follower: JoinHandle<Result<(), Error>>,
    stop: CancellationToken,
}

impl StateWorker {
    /// Opens the projection, begins to follow the log and waits a little until it has caught up.
    pub async fn start(cx: &WorkerCx, db_path: impl Into<PathBuf>) -> Result<Self, Error> {
        let (projection, follower) =
            Projection::open(cx.bus.clone(), cx.ns.clone(), db_path).await?;
        let reporter = Reporter {
            name: cx.id.to_string(),
            control: cx.control.clone(),
        };
        // Nobody else has had it yet.
        let _ = projection.0.reporter.set(reporter);
        // Not `cx.drain` itself: while the worker drains, reads that run still need the barrier.
        let stop = CancellationToken::new();
        let follower = tokio::spawn(follower.run(stop.clone()).in_current_span());
        let worker = Self {
            service: StateService::new(projection.clone()),
            projection,
            follower,
            stop,
        };
        if let Err(error) = worker.projection.caught_up_within(START_CATCH_UP).await {
            let lag = chain(&error);
            tracing::info!(lag, "serving before the projection has caught up");
            cx.control.note("projection", &lag);
        }
        Ok(worker)
    }

    /// The file of the `index`-th state worker of a node, from 0: `state.db`, `state-1.db` ….
    pub fn db_path(data_dir: &Path, index: u32) -> PathBuf {
        match index {
            0 => data_dir.join("state.db"),
            index => data_dir.join(format!("state-{index}.db")),
        }
    }

    /// The service, to be put behind the credential check and served.
    pub fn service(&self) -> StateService {
        self.service.clone()
    }

    /// The projection, for others in the process that read it.
    pub fn projection(&self) -> &Projection {
        &self.projection
    }

    /// Returns when the follower has ended: with an error if the bus closed or it panicked, in good
    /// order after `stop` was cancelled. Cancel it when the last request has been served.
    pub async fn run(mut self, stop: CancellationToken) -> Result<(), vlinder_worker::Error> {
        let ended = tokio::select! {
            () = stop.cancelled() => {
                self.stop.cancel();
                (&mut self.follower).await
            }
            ended = &mut self.follower => ended,
        };
        match ended {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(error.into()),
            Err(panic) => Err(vlinder_worker::Error::Other(format!(
                "the projection's follower panicked: {panic}"
            ))),
        }
    }
}

impl Drop for StateWorker {
    fn drop(&mut self) {
        self.stop.cancel();
        self.follower.abort();
    }
}

impl From<Error> for vlinder_worker::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Bus(error) => Self::Bus(error),
            Error::Io { what, source } => Self::Io { what, source },
            error => Self::Other(chain(&error)),
        }
    }
}
