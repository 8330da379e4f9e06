//! Waiting for a condition on a value, with a deadline and the last state seen in the message.

use std::fmt::Debug;
use std::future::Future;
use std::time::{Duration, Instant};

/// Between two looks. What is looked at is another process, which cannot wake us.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Looks until `good` says yes to what `look` saw, and gives that.
#[track_caller]
pub fn wait_for<T, F, L, G>(
    what: impl Into<String>,
    within: Duration,
    mut look: L,
    good: G,
) -> impl Future<Output = T>
where
    T: Debug,
    F: Future<Output = T>,
    L: FnMut() -> F,
    G: Fn(&T) -> bool,
{
    let (at, what) = (std::panic::Location::caller(), what.into());
    async move {
        let deadline = Instant::now() + within;
        loop {
            let seen = look().await;
            if good(&seen) {
                return seen;
            }
            assert!(
                Instant::now() < deadline,
                "{at}: {what}: not within {within:?}; seen last: {seen:#?}"
            );
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}

/// The same for a plain question.
#[track_caller]
pub fn wait_until(
    what: impl Into<String>,
    within: Duration,
    mut good: impl FnMut() -> bool,
) -> impl Future<Output = ()> {
    let (at, what) = (std::panic::Location::caller(), what.into());
    async move {
        let deadline = Instant::now() + within;
        while !good() {
            assert!(
                Instant::now() < deadline,
                "{at}: {what}: not within {within:?}"
            );
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}
