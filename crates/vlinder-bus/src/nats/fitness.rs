//! Whether a server will do: its version, and that JetStream answers.

use super::api;
use super::link::Link;
use crate::error::Error;
use serde::Deserialize;
use std::time::Duration;
use tokio::time::Instant;

/// Older servers lack per-message time to live, delete markers or batch direct gets.
const OLDEST: (u64, u64, u64) = (2, 11, 0);
/// Below these releases (of the 2.12 line and older, of the 2.14 line) there are published holes.
const SAFE: [(u64, u64, u64); 2] = [(2, 12, 12), (2, 14, 3)];
/// What a server says of itself; see [`probe`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// The server that answered, `host:port`.
    pub address: String,
    /// Its version.
    pub version: String,
    /// Level of its JetStream interface: 1 = 2.11, 2 = 2.12 …
    pub api_level: u64,
    /// Name of the cluster it belongs to.
    pub cluster: Option<String>,
    /// One round trip to JetStream.
    pub rtt: Duration,
    /// Why this version should be replaced, where it should.
    pub warning: Option<String>,
}

/// Refuses what will not do.
pub(super) async fn check(link: &Link) -> Result<Probe, Error> {
    let info = link.client.server_info();
    let version = parse_version(&info.version).ok_or_else(|| {
        link.unfit(format!(
            "it reports the version {:?}, which is none of nats-server",
            info.version
        ))
    })?;
    if version < OLDEST {
        return Err(link.unfit(format!(
            "it is nats-server {}, and 2.11 is the oldest that will do: install 2.12.12, 2.14.3 or newer",
            info.version
        )));
    }
    if !info.jetstream {
        return Err(link.unfit(
            "JetStream is off: start nats-server with -js, or put a jetstream block into its config"
                .to_owned(),
        ));
    }
    let before = Instant::now();
    let account = api::account(link).await?;
    Ok(Probe {
        address: format!("{}:{}", info.host, info.port),
        api_level: account.level,
        cluster: info.cluster,
        rtt: before.elapsed(),
        warning: security_warning(version, &info.version),
        version: info.version,
    })
}

/// `2.11.0` of `2.11.0-RC.3`, `v2.11`.
fn parse_version(text: &str) -> Option<(u64, u64, u64)> {
    let numbers = text.trim_start_matches('v').split(['-', '+']).next()?;
    let mut parts = numbers.split('.').map(str::parse);
    let mut next = || parts.next().transpose().ok();
    Some((next()??, next()??, next()?.unwrap_or(0)))
}

fn security_warning(version: (u64, u64, u64), text: &str) -> Option<String> {
    let [old_line, new_line] = SAFE;
    let floor = if version < (2, 13, 0) {
        old_line
    } else {
        new_line
    };
    (version < floor).then(|| {
        format!(
            "nats-server {text} has published security holes: install {}.{}.{} or newer",
            floor.0, floor.1, floor.2
        )
    })
}

/// What `$JS.API.INFO` tells.
#[derive(Deserialize)]
pub(super) struct Account {
    #[serde(skip)]
    pub level: u64,
    #[serde(default)]
    api: AccountApi,
}

#[derive(Deserialize, Default)]
struct AccountApi {
    #[serde(default)]
    level: u64,
}

impl Account {
    pub fn with_level(mut self) -> Self {
        self.level = self.api.level;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(parse_version("2.11.0-RC.3"), Some((2, 11, 0)));
        assert_eq!(parse_version("v2.15.1"), Some((2, 15, 1)));
        assert_eq!(parse_version("2.12"), Some((2, 12, 0)));
        for bad in ["", "2", "two.eleven", "2.x.1", "-"] {
            assert_eq!(parse_version(bad), None, "{bad}");
        }
    }

    #[test]
    fn old_releases_are_warned_of() {
        let warned = |text: &str| security_warning(parse_version(text).unwrap(), text).is_some();
        for (text, expected) in [
            ("2.11.11", true),
            ("2.12.11", true),
            ("2.12.12", false),
            ("2.14.2", true),
            ("2.14.3", false),
            ("2.15.1", false),
        ] {
            assert_eq!(warned(text), expected, "{text}");
        }
    }
}
