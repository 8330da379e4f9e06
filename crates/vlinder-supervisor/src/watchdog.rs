//! Notices that the runtime of this process stands still (embedded mode, where a worker that
//! blocks cannot be killed alone).
//!
//! A task on the runtime ticks, a thread of its own looks. It says so once; what follows (the
//! process ends and starts anew) is the caller's decision.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::Error;

/// The thread looks this often per limit. It counts looks without a tick instead of time: a
/// process that was stopped, or a machine that was suspended, gets its chance to tick first.
const LOOKS_PER_LIMIT: u32 = 4;
/// Ticks per look, so that a look without a tick is no accident.
const TICKS_PER_LOOK: u32 = 2;

/// Watches until it is dropped.
#[derive(Debug)]
pub struct Watchdog {
    ticker: JoinHandle<()>,
    /// Closing it ends the thread.
    _stop: mpsc::SyncSender<()>,
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.ticker.abort();
    }
}

/// Calls `on_stall` from a thread of its own once the runtime has not run a task for `limit`.
pub fn spawn(
    runtime: &Handle,
    limit: Duration,
    on_stall: impl FnOnce() + Send + 'static,
) -> Result<Watchdog, Error> {
    let ticks = Arc::new(AtomicU64::new(0));
    let seen = ticks.clone();
    let look = limit / LOOKS_PER_LIMIT;
    let (stop, stopped) = mpsc::sync_channel(0);
    std::thread::Builder::new()
        .name("watchdog".into())
        .spawn(move || watch(&seen, look, &stopped, on_stall))
        .map_err(Error::io("start the watchdog"))?;
    let ticker = runtime.spawn(async move {
        let mut interval = tokio::time::interval(look / TICKS_PER_LOOK);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            ticks.fetch_add(1, Ordering::Relaxed);
        }
    });
    Ok(Watchdog {
        ticker,
        _stop: stop,
    })
}

fn watch(ticks: &AtomicU64, look: Duration, stopped: &mpsc::Receiver<()>, on_stall: impl FnOnce()) {
    let mut last = ticks.load(Ordering::Relaxed);
    let mut without = 0;
    while without < LOOKS_PER_LIMIT {
        match stopped.recv_timeout(look) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
        }
        let now = ticks.load(Ordering::Relaxed);
        without = if now == last { without + 1 } else { 0 };
        last = now;
    }
    tracing::error!("the runtime stands still: a task blocks its thread");
    on_stall();
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Long enough for a busy machine to run a thread now and then.
    const LIMIT: Duration = Duration::from_secs(1);

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    }

    #[test]
    fn a_blocked_runtime_is_noticed_while_it_blocks() {
        let (stalled, noticed) = mpsc::channel();
        let runtime = runtime();
        let stall = move || stalled.send(()).unwrap();
        let _watchdog = spawn(runtime.handle(), LIMIT, stall).unwrap();
        runtime.block_on(async {
            // The runtime's only thread is held up right here.
            noticed
                .recv_timeout(Duration::from_secs(20))
                .expect("noticed within 20 s");
        });
    }

    #[test]
    fn a_turning_runtime_is_left_alone_and_a_dropped_watchdog_is_silent() {
        let (stalled, noticed) = mpsc::channel::<()>();
        let runtime = runtime();
        let stall = move || stalled.send(()).unwrap();
        let watchdog = spawn(runtime.handle(), LIMIT, stall).unwrap();
        runtime.block_on(async { tokio::time::sleep(LIMIT * 2).await });
        drop(watchdog);
        // The thread drops its callback, and with it the sender, without having called it.
        let result = noticed.recv_timeout(Duration::from_secs(20));
        assert_eq!(result, Err(RecvTimeoutError::Disconnected));
    }
}
