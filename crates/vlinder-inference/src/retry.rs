//! When a call is tried again. Pure.

use rand::Rng;
use std::time::Duration;
use time::PrimitiveDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

/// How often a call is made at most while its worker holds it.
pub const TRIES_MAX: u32 = 4;
/// The longest pause of our own between two tries.
const PAUSE_MAX: Duration = Duration::from_secs(8);
/// A longer `Retry-After` is not waited for: the agent gets the refusal and decides itself.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110 §5.6.7, the only form that senders may use).
const HTTP_DATE: &[BorrowedFormatItem<'_>] = format_description!(
    "[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT"
);

/// Whether the same call may succeed a little later (RFC 9110 §15.6, RFC 6585 §4).
pub fn is_transient(status: u16) -> bool {
    matches!(status, 429 | 500 | 502 | 503 | 504 | 529)
}

/// What `Retry-After` asks for: seconds, or a date seen from `now_ms` (milliseconds since the Unix
/// epoch). A date that has passed asks for nothing more. `None` for what is neither.
pub fn retry_after(value: &str, now_ms: u64) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let date = PrimitiveDateTime::parse(value, HTTP_DATE).ok()?;
    let at_ms = u64::try_from(date.assume_utc().unix_timestamp()).ok()? * 1000;
    Some(Duration::from_millis(at_ms.saturating_sub(now_ms)))
}

/// How long to wait after the `tried`-th try (from 1) failed; `None` when it was the last one or the
/// upstream asks for too much. Never below `floor`: jitter only lengthens.
pub fn pause(tried: u32, asked: Option<Duration>, floor: Duration) -> Option<Duration> {
    if tried >= TRIES_MAX || asked.is_some_and(|asked| asked > RETRY_AFTER_MAX) {
        return None;
    }
    let backoff = (floor * 2u32.pow(tried - 1)).min(PAUSE_MAX);
    let jittered = backoff.mul_f64(rand::rng().random_range(1.0..1.5));
    Some(asked.unwrap_or_default().max(jittered).max(floor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let check = |value, expected: Option<u64>| {
            let found = retry_after(value, 784_111_777_000 - 5_000);
            assert_eq!(found, expected.map(Duration::from_secs), "{value:?}");
        };
        check("0", Some(0));
        check(" 120 ", Some(120));
        check("Sun, 06 Nov 1994 08:49:37 GMT", Some(5));
        check("Sun, 06 Nov 1994 08:49:30 GMT", Some(0));
        check("-1", None);
        check("soon", None);
        check("Sun, 06 Nov 1994 08:49:37 +0200", None);
        check("99999999999999999999999", None);
        check("", None);
    }

    #[test]
    fn nothing_is_waited_for_that_takes_too_long() {
        let floor = Duration::from_millis(10);
        assert_eq!(pause(1, Some(RETRY_AFTER_MAX * 2), floor), None);
        assert_eq!(pause(TRIES_MAX, None, floor), None);
        assert!(pause(1, Some(RETRY_AFTER_MAX), floor) >= Some(RETRY_AFTER_MAX));
    }

    proptest! {
        #[test]
        fn no_pause_is_below_the_floor_or_what_was_asked(
            tried in 1..TRIES_MAX, asked in proptest::option::of(0u64..60), floor_ms in 0u64..20_000,
        ) {
            let (asked, floor) = (asked.map(Duration::from_secs), Duration::from_millis(floor_ms));
            let pause = pause(tried, asked, floor).unwrap();
            prop_assert!(pause >= floor);
            prop_assert!(pause >= asked.unwrap_or_default());
            prop_assert!(pause <= asked.unwrap_or_default().max(PAUSE_MAX * 2).max(floor));
        }

        #[test]
        fn hostile_values_do_not_panic(value in "\\PC{0,60}") {
            let _ = retry_after(&value, 0);
        }
    }
}
