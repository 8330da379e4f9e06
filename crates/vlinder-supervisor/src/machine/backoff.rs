//! The policy of restarts and deadlines.

use std::time::Duration;

use rand::Rng;
use rand::rngs::SmallRng;

/// Backoff, budgets and deadlines of a node's workers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Pause before the second restart in a row; the first comes at once, each later pause is
    /// twice as long.
    pub backoff_first: Duration,
    /// Longest pause of the fast retries.
    pub backoff_max: Duration,
    /// This many failures in a row, without a good stretch, and the worker counts as crash-looping.
    pub budget: u32,
    /// Pause between the retries of a crash-looping worker.
    pub slow_retry: Duration,
    /// Having been up for this long makes earlier failures forgotten.
    pub good_stretch: Duration,
    /// After this long the start goes on without a worker that is not up.
    pub start_deadline: Duration,
    /// A worker that is scaled away or restarted has this long to finish.
    pub drain_deadline: Duration,
    /// A worker process whose loop stands still for this long is killed.
    pub unresponsive: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            backoff_first: Duration::from_millis(100),
            backoff_max: Duration::from_secs(5),
            budget: 8,
            slow_retry: Duration::from_secs(30),
            good_stretch: Duration::from_secs(5),
            start_deadline: Duration::from_secs(30),
            drain_deadline: Duration::from_secs(30),
            unresponsive: Duration::from_secs(5),
        }
    }
}

impl Policy {
    /// The pause after so many failures in a row, from 1. Half of it is chance, so that workers
    /// that died of the same cause do not come back in the same instant.
    pub(crate) fn pause(&self, failures: u32, rng: &mut SmallRng) -> Duration {
        let full = if failures >= self.budget {
            self.slow_retry
        } else if failures <= 1 {
            return Duration::ZERO;
        } else {
            let doubled = self
                .backoff_first
                .saturating_mul(2u32.saturating_pow(failures - 2));
            doubled.min(self.backoff_max)
        };
        full.mul_f64(rng.random_range(0.5..=1.0))
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn pauses_grow_to_a_limit_and_vary() {
        let policy = Policy::default();
        let mut rng = SmallRng::seed_from_u64(7);
        // Failures in a row → the longest pause in ms.
        let table = [
            (1, 0),
            (2, 100),
            (3, 200),
            (4, 400),
            (5, 800),
            (6, 1600),
            (7, 3200),
            (8, 30_000),
        ];
        for (failures, full) in table {
            let mut pauses: Vec<_> = (0..50).map(|_| policy.pause(failures, &mut rng)).collect();
            let full = Duration::from_millis(full);
            assert!(
                pauses
                    .iter()
                    .all(|&pause| pause >= full / 2 && pause <= full),
                "{failures}"
            );
            pauses.sort();
            pauses.dedup();
            assert!(full.is_zero() || pauses.len() > 40, "{failures}");
        }
        let patient = Policy {
            budget: 1000,
            ..policy
        };
        assert!(patient.pause(999, &mut rng) <= patient.backoff_max);
    }
}
