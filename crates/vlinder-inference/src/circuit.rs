//! When an upstream is left alone: a circuit for each of its models.
//!
//! An upstream that takes connections and then fails, again and again, is not helped by more calls, and
//! whoever waits for them is not either. After [`Limits::failures`] failed tries in a row a circuit
//! *opens*: for a while nothing is sent, and calls are told so at once. Then one call *probes*, and
//! others are still told; if it is answered the circuit closes, if not it opens for twice as long.
//!
//! A circuit belongs to one model, because the failure of one (too large for the GPU, withdrawn by its
//! provider) says nothing about the others. An upstream that cannot be reached at all is none of this
//! module's business: `discovery` notices and pulls nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use tokio::time::Instant;
use vlinder_core::Selector;

/// Most circuits that are remembered: more than a worker serves models. Only those with failures are.
const CIRCUITS_MAX: usize = 256;
/// A try that is given up by its caller counts as a failure when it had waited so long.
const SILENCE: Duration = Duration::from_secs(30);

const CLOCK: &[BorrowedFormatItem<'_>] = format_description!("[hour]:[minute]:[second] UTC");

/// When a circuit opens, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Failed tries in a row that open it; at least 1.
    pub failures: u32,
    /// For how long it opens the first time; doubles with each probe that fails.
    pub pause: Duration,
    /// For how long it opens at most.
    pub pause_max: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            failures: 5,
            pause: Duration::from_secs(5),
            pause_max: Duration::from_secs(60),
        }
    }
}

/// The circuits of one upstream.
pub struct Circuits {
    limits: Limits,
    inner: Mutex<Inner>,
    /// Told of every circuit that opens or closes.
    changed: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct Inner {
    /// Of models without a failure there is none.
    by_model: BTreeMap<Selector, Circuit>,
    /// How often any circuit opened.
    opened: u64,
}

/// A model that failed since it last worked.
#[derive(Debug, Clone)]
struct Circuit {
    /// Failed tries in a row.
    failures: u32,
    /// Why the last one failed.
    reason: String,
    /// Since it opened.
    open: Option<Open>,
}

#[derive(Debug, Clone, Copy)]
struct Open {
    pause: Duration,
    until: Instant,
    /// The same for people.
    until_clock: OffsetDateTime,
    is_probed: bool,
}

/// Why a call is not sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Failed tries in a row.
    pub failures: u32,
    /// Why the last one failed.
    pub reason: String,
    /// When the upstream is tried again; zero while a call tries it.
    pub again_in: Duration,
}

impl Circuits {
    /// All closed. `changed` is called, from wherever a try ends, when that changes.
    pub fn new(limits: Limits, changed: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            limits,
            inner: Mutex::default(),
            changed: Box::new(changed),
        })
    }

    /// May a call to this model be sent now? Say how it went with the pass.
    pub fn admit(self: &Arc<Self>, model: &Selector) -> Result<Pass, Refused> {
        let now = Instant::now();
        let mut inner = self.lock();
        let mut is_probe = false;
        if let Some(circuit) = inner.by_model.get_mut(model)
            && let Some(open) = &mut circuit.open
        {
            if open.is_probed || now < open.until {
                return Err(Refused {
                    failures: circuit.failures,
                    reason: circuit.reason.clone(),
                    again_in: open.until.saturating_duration_since(now),
                });
            }
            open.is_probed = true;
            is_probe = true;
        }
        Ok(Pass {
            circuits: self.clone(),
            model: model.clone(),
            began: now,
            is_probe,
            is_reported: false,
        })
    }

    /// Open circuits: model, and in words why and until when. The words stay the same while it does.
    pub fn open(&self) -> BTreeMap<Selector, String> {
        let inner = self.lock();
        let open = inner.by_model.iter().filter_map(|(model, circuit)| {
            let until = circuit.open?.until_clock.format(CLOCK).unwrap_or_default();
            let (failures, reason) = (circuit.failures, &circuit.reason);
            let text = format!(
                "{model} failed {failures} times in a row ({reason}) and is left alone until {until}"
            );
            Some((model.clone(), text))
        });
        open.collect()
    }

    /// How often any circuit opened, probes that failed counted.
    pub fn opened(&self) -> u64 {
        self.lock().opened
    }

    fn ended(&self, pass: &Pass, failed: Option<String>) {
        let is_changed = self.lock().ended(&self.limits, pass, failed);
        if is_changed {
            (self.changed)();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // Nothing panics while it is held.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Whether a circuit opened or closed.
    fn ended(&mut self, limits: &Limits, pass: &Pass, failed: Option<String>) -> bool {
        let Some(reason) = failed else {
            let was = self.by_model.remove(&pass.model);
            return was.is_some_and(|circuit| circuit.open.is_some());
        };
        if !self.by_model.contains_key(&pass.model) && self.by_model.len() >= CIRCUITS_MAX {
            return false;
        }
        let none = Circuit {
            failures: 0,
            reason: String::new(),
            open: None,
        };
        let circuit = self.by_model.entry(pass.model.clone()).or_insert(none);
        circuit.failures = circuit.failures.saturating_add(1);
        circuit.reason = reason;
        let pause = match circuit.open {
            Some(open) if pass.is_probe => (open.pause * 2).min(limits.pause_max),
            // It was sent before the circuit opened, and says nothing new.
            Some(_) => return false,
            None if circuit.failures >= limits.failures => limits.pause,
            None => return false,
        };
        circuit.open = Some(Open {
            pause,
            until: Instant::now() + pause,
            until_clock: OffsetDateTime::now_utc() + pause,
            is_probed: false,
        });
        self.opened += 1;
        true
    }
}

/// When a model is tried again, in words.
pub fn again(again_in: Duration) -> String {
    match again_in.as_millis().div_ceil(1000) {
        0 => "it is being tried now".to_owned(),
        seconds => format!("it is tried again in {seconds} s"),
    }
}

/// One try that may be made.
pub struct Pass {
    circuits: Arc<Circuits>,
    model: Selector,
    began: Instant,
    is_probe: bool,
    is_reported: bool,
}

impl Pass {
    /// The upstream answered.
    pub fn succeeded(mut self) {
        self.is_reported = true;
        self.circuits.ended(&self, None);
    }

    /// It failed, for this reason.
    pub fn failed(mut self, reason: &str) {
        self.is_reported = true;
        self.circuits.ended(&self, Some(reason.to_owned()));
    }
}

impl Drop for Pass {
    /// Nobody waited for the end of the try: the turn ended, or its deadline passed.
    fn drop(&mut self) {
        if self.is_reported {
            return;
        }
        let waited = self.began.elapsed();
        if waited >= SILENCE {
            let reason = format!("no answer for {} s", waited.as_secs());
            self.circuits.ended(self, Some(reason));
        } else if self.is_probe {
            let mut inner = self.circuits.lock();
            let circuit = inner.by_model.get_mut(&self.model);
            if let Some(open) = circuit.and_then(|circuit| circuit.open.as_mut()) {
                open.is_probed = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn model(name: &str) -> Selector {
        Selector::new(name).unwrap()
    }

    fn circuits() -> (Arc<Circuits>, Arc<AtomicU32>) {
        let changes = Arc::new(AtomicU32::new(0));
        let counted = changes.clone();
        let limits = Limits {
            failures: 3,
            pause: Duration::from_secs(5),
            pause_max: Duration::from_secs(12),
        };
        let changed = move || {
            counted.fetch_add(1, Ordering::SeqCst);
        };
        (Circuits::new(limits, changed), changes)
    }

    fn fail(circuits: &Arc<Circuits>, name: &str, times: usize) {
        for _ in 0..times {
            circuits.admit(&model(name)).ok().unwrap().failed("500");
        }
    }

    fn refused(circuits: &Arc<Circuits>, name: &str) -> Option<u64> {
        let refused = circuits.admit(&model(name)).err();
        refused.map(|refused| refused.again_in.as_secs())
    }

    #[tokio::test(start_paused = true)]
    async fn it_opens_is_probed_by_one_and_closes() {
        let (circuits, changes) = circuits();
        fail(&circuits, "m", 2);
        circuits.admit(&model("m")).ok().unwrap().succeeded();
        fail(&circuits, "m", 2);
        assert_eq!(refused(&circuits, "m"), None);
        fail(&circuits, "m", 1);
        assert_eq!(refused(&circuits, "m"), Some(5));
        assert_eq!(changes.load(Ordering::SeqCst), 1);
        // Another model of the same upstream is none the worse.
        assert_eq!(refused(&circuits, "other"), None);

        // A probe that fails doubles the pause, up to the limit.
        for pause in [10, 12, 12] {
            tokio::time::advance(Duration::from_secs(12)).await;
            let probe = circuits.admit(&model("m")).ok().unwrap();
            assert_eq!(refused(&circuits, "m"), Some(0));
            probe.failed("still 500");
            assert_eq!(refused(&circuits, "m"), Some(pause));
        }
        let open = circuits.open();
        assert!(open[&model("m")].contains("still 500"), "{open:?}");
        assert!(open[&model("m")].contains("alone until"), "{open:?}");
        assert_eq!((open.len(), circuits.opened()), (1, 4));

        // A probe that nobody waits for says nothing; the next call probes.
        tokio::time::advance(Duration::from_secs(12)).await;
        drop(circuits.admit(&model("m")).ok().unwrap());
        let probe = circuits.admit(&model("m")).ok().unwrap();
        probe.succeeded();
        assert_eq!(refused(&circuits, "m"), None);
        assert!(circuits.open().is_empty());
        fail(&circuits, "m", 2);
        assert_eq!(refused(&circuits, "m"), None, "it counts from zero again");
    }

    #[tokio::test(start_paused = true)]
    async fn tries_from_before_it_opened_do_not_lengthen_it() {
        let (circuits, changes) = circuits();
        let early: Vec<Pass> = (0..5)
            .map(|_| circuits.admit(&model("m")).ok().unwrap())
            .collect();
        for pass in early {
            pass.failed("500");
        }
        assert_eq!(refused(&circuits, "m"), Some(5));
        assert_eq!(changes.load(Ordering::SeqCst), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn silence_that_nobody_waits_out_counts() {
        let (circuits, _) = circuits();
        for waited in [29, 30, 31, 40] {
            let pass = circuits.admit(&model("m")).ok().unwrap();
            tokio::time::advance(Duration::from_secs(waited)).await;
            drop(pass);
        }
        assert_eq!(refused(&circuits, "m"), Some(5));
    }
}
