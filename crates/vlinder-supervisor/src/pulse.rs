//! Liveness of one worker: it is asked, and must answer from the loop that does its work.
//!
//! Pure: the attendant supplies the time and performs what is said here.

use std::time::Duration;

use tokio::time::Instant;

/// A tick that comes later than this after its due time means that the supervisor itself stood
/// still (suspended machine, stopped process): answers may be waiting unread, so nobody is judged.
const OWN_STALL: Duration = Duration::from_millis(500);

/// What to do at a tick.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Beat {
    /// Send this ping.
    Ping(u64),
    /// A ping is out and has time left.
    Wait,
    /// The worker's loop has stood still for this long at least.
    Stalled(Duration),
}

/// The pulse of one worker.
#[derive(Debug)]
pub(crate) struct Pulse {
    /// A ping may stay unanswered for this long; the first one longer, since the worker has to
    /// load first.
    patience: Duration,
    later_patience: Duration,
    outstanding: Option<(u64, Instant)>,
    sent: u64,
}

impl Pulse {
    /// Between two ticks. With a ping every two fifths of the deadline and a patience of the rest,
    /// a loop that stops is found after at most `unresponsive` and one tick's rounding.
    pub fn interval(unresponsive: Duration) -> Duration {
        unresponsive * 2 / 5
    }

    /// The worker has `loading` until its first answer.
    pub fn new(unresponsive: Duration, loading: Duration) -> Self {
        let later_patience = unresponsive - Self::interval(unresponsive);
        Self {
            patience: loading,
            later_patience,
            outstanding: None,
            sent: 0,
        }
    }

    /// To be called at every tick and at [`Pulse::deadline`]; `due` is when the call was due.
    pub fn on_tick(&mut self, due: Instant, now: Instant) -> Beat {
        match &mut self.outstanding {
            Some((_, since)) if now.duration_since(due) > OWN_STALL => {
                *since = now;
                Beat::Wait
            }
            Some((_, since)) if now.duration_since(*since) >= self.patience => {
                Beat::Stalled(now.duration_since(*since))
            }
            Some(_) => Beat::Wait,
            None => {
                self.sent += 1;
                self.outstanding = Some((self.sent, now));
                Beat::Ping(self.sent)
            }
        }
    }

    /// An answer to an older ping proves nothing about now.
    pub fn on_pong(&mut self, n: u64) {
        if self.outstanding.is_some_and(|(sent, _)| sent == n) {
            self.outstanding = None;
            self.patience = self.later_patience;
        }
    }

    /// The worker has said that it is up: the time for loading is over.
    pub fn on_loaded(&mut self, now: Instant) {
        if self.patience != self.later_patience {
            self.patience = self.later_patience;
            self.outstanding = self.outstanding.map(|(n, _)| (n, now));
        }
    }

    /// When the outstanding ping's time is over.
    pub fn deadline(&self) -> Option<Instant> {
        self.outstanding.map(|(_, since)| since + self.patience)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);
    const LOADING: Duration = Duration::from_secs(20);

    #[test]
    fn an_answering_worker_lives_and_a_silent_one_is_found() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut pulse = Pulse::new(LIMIT, LOADING);
        assert_eq!(pulse.on_tick(at(0), at(0)), Beat::Ping(1));
        assert_eq!(pulse.on_tick(at(19), at(19)), Beat::Wait);
        pulse.on_pong(1);
        let at = |seconds: u64| at(seconds + 20);
        assert_eq!(pulse.on_tick(at(4), at(4)), Beat::Ping(2));
        pulse.on_pong(1);
        assert_eq!(pulse.deadline(), Some(at(7)));
        assert_eq!(pulse.on_tick(at(6), at(6)), Beat::Wait);
        assert_eq!(
            pulse.on_tick(at(7), at(7)),
            Beat::Stalled(Duration::from_secs(3))
        );
    }

    #[test]
    fn one_that_never_answers_is_found_too() {
        let start = Instant::now();
        let mut pulse = Pulse::new(LIMIT, LOADING);
        assert_eq!(pulse.on_tick(start, start), Beat::Ping(1));
        let over = start + LOADING;
        assert_eq!(pulse.deadline(), Some(over));
        assert_eq!(pulse.on_tick(over, over), Beat::Stalled(LOADING));
    }

    #[test]
    fn one_that_is_up_has_no_more_time_for_loading() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut pulse = Pulse::new(LIMIT, LOADING);
        assert_eq!(pulse.on_tick(at(0), at(0)), Beat::Ping(1));
        pulse.on_loaded(at(10));
        pulse.on_loaded(at(11));
        assert_eq!(pulse.on_tick(at(12), at(12)), Beat::Wait);
        assert_eq!(
            pulse.on_tick(at(13), at(13)),
            Beat::Stalled(Duration::from_secs(3))
        );
    }

    #[test]
    fn a_supervisor_that_stood_still_judges_nobody() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut pulse = Pulse::new(LIMIT, Duration::from_secs(3));
        assert_eq!(pulse.on_tick(at(2), at(2)), Beat::Ping(1));
        assert_eq!(pulse.on_tick(at(4), at(60)), Beat::Wait);
        assert_eq!(pulse.on_tick(at(62), at(62)), Beat::Wait);
        assert_eq!(
            pulse.on_tick(at(63), at(63)),
            Beat::Stalled(Duration::from_secs(3))
        );
    }
}
