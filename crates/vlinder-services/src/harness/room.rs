//! Whether the log has room for a new turn. A share of it is kept for the turns that run, so that
//! they can end.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tonic::Status;
use vlinder_bus::streams::ADMISSION_PERCENT;
use vlinder_worker::WorkerCx;

/// How old the figure may be: a look costs a request to the server, and the share that is kept is
/// far more than what is written meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How full the log was at the last look.
#[derive(Debug, Default)]
pub(super) struct Room(Mutex<Option<(Instant, u64)>>);

impl Room {
    /// Fails when the log takes no new turn.
    pub async fn admit(&self, cx: &WorkerCx) -> Result<(), Status> {
        let percent = match self.known() {
            Some(percent) => percent,
            None => match cx.bus.stream_info(&cx.log()).await {
                Ok(info) => {
                    let percent = info.bytes.saturating_mul(100) / info.max_bytes.max(1);
                    self.learn(percent);
                    percent
                }
                // Whoever appends next says it better.
                Err(_) => return Ok(()),
            },
        };
        if percent < ADMISSION_PERCENT {
            return Ok(());
        }
        Err(Status::resource_exhausted(format!(
            "the log is full to {percent}%; from {ADMISSION_PERCENT}% on it takes no new turn, so that running \
             ones can end; raise queue.max_bytes"
        )))
    }

    fn known(&self) -> Option<u64> {
        let seen = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.filter(|(at, _)| at.elapsed() < LOOK_EVERY)
            .map(|(_, percent)| percent)
    }

    fn learn(&self, percent: u64) {
        let seen = Some((Instant::now(), percent));
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = seen;
    }
}
