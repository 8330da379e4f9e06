//! The credential that every RPC and route asks for, on loopback too, since agents live there.
//!
//! A wrong credential is answered late, the later the more of them came from the same address, and
//! is logged. The right one is never delayed: throttling counts failures only, and looks at them
//! only when the credential is wrong.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Delay of the first refusal; it doubles with each further one.
const DELAY_FIRST: Duration = Duration::from_millis(50);
/// Longest delay of a refusal.
const DELAY_MAX: Duration = Duration::from_secs(2);
/// Failures older than this are forgotten.
const MEMORY: Duration = Duration::from_secs(60);
/// Addresses that are remembered at once; beyond that the memory is cleared.
const ADDRESSES_MAX: usize = 10_000;

/// Checks bearer tokens.
#[derive(Clone)]
pub struct Gate {
    token: Arc<str>,
    failures: Arc<Mutex<HashMap<IpAddr, (u32, Instant)>>>,
}

/// Why a caller was refused, and how long to wait before telling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What to say.
    pub message: &'static str,
    /// When to say it.
    pub delay: Duration,
}

impl Gate {
    /// A gate that opens to `token`.
    pub fn new(token: &str) -> Self {
        Self {
            token: token.into(),
            failures: Arc::default(),
        }
    }

    /// Checks the value of an `Authorization` header.
    pub fn check(&self, header: Option<&str>, from: Option<IpAddr>) -> Result<(), Refusal> {
        let given = header.map(str::trim);
        let bearer = given.and_then(|value| {
            let (scheme, token) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
        });
        match bearer {
            Some(token) if same(token.as_bytes(), self.token.as_bytes()) => Ok(()),
            Some(_) => Err(self.refuse("the token is not the one of this cluster; see run/token in its data directory", from)),
            None => Err(self.refuse("a token is needed: send `Authorization: Bearer …`; see run/token in the data directory", from)),
        }
    }

    fn refuse(&self, message: &'static str, from: Option<IpAddr>) -> Refusal {
        let Some(address) = from else {
            return Refusal {
                message,
                delay: DELAY_FIRST,
            };
        };
        let now = Instant::now();
        let mut failures = self
            .failures
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if failures.len() >= ADDRESSES_MAX {
            failures.clear();
        }
        let entry = failures.entry(address).or_insert((0, now));
        if now.duration_since(entry.1) > MEMORY {
            entry.0 = 0;
        }
        entry.0 += 1;
        entry.1 = now;
        let doublings = (entry.0 - 1).min(10);
        let delay = (DELAY_FIRST * 2u32.pow(doublings)).min(DELAY_MAX);
        tracing::warn!(%address, failures = entry.0, "refused: wrong or missing credential");
        Refusal { message, delay }
    }
}

/// Compares in a time that depends on the length of `given` alone.
fn same(given: &[u8], wanted: &[u8]) -> bool {
    let mut difference = given.len() ^ wanted.len();
    for (index, byte) in given.iter().enumerate() {
        difference |= usize::from(byte ^ wanted[index % wanted.len().max(1)]);
    }
    difference == 0 && !wanted.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_token_opens() {
        let gate = Gate::new("secret-token");
        assert!(gate.check(Some("Bearer secret-token"), None).is_ok());
        assert!(gate.check(Some("bearer  secret-token "), None).is_ok());
        for bad in [
            "",
            "secret-token",
            "Basic secret-token",
            "Bearer ",
            "Bearer secret-tokeN",
            "Bearer secret-token-x",
            "Bearer secret",
        ] {
            assert!(
                gate.check(Some(bad), None).is_err(),
                "{bad:?} opened the gate"
            );
        }
        assert!(gate.check(None, None).is_err());
        assert!(Gate::new("x").check(Some("Bearer "), None).is_err());
    }

    #[test]
    fn failures_slow_down_failures_only() {
        let gate = Gate::new("right");
        let from = Some(IpAddr::from([127, 0, 0, 1]));
        let first = gate.check(Some("Bearer wrong"), from).unwrap_err().delay;
        for _ in 0..20 {
            let _ = gate.check(Some("Bearer wrong"), from);
        }
        let later = gate.check(Some("Bearer wrong"), from).unwrap_err().delay;
        assert_eq!((first, later), (DELAY_FIRST, DELAY_MAX));
        assert!(gate.check(Some("Bearer right"), from).is_ok());
    }
}
