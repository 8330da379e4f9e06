//! `requirements.egress`: the hosts outside that an agent may reach.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// Longest name of a host, in bytes.
const HOST_BYTES_MAX: usize = 253;
/// Ports that are meant where none is named.
const PORTS_DEFAULT: [u16; 2] = [80, 443];

/// One entry: `api.example.com`, `*.example.com`, `10.0.0.7:8080`, `[fd00::7]:443`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EgressRule {
    host: Host,
    port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Host {
    Name(String),
    /// Every name below this one, not itself.
    Below(String),
    Address(IpAddr),
}

/// Why an entry cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadRule;

impl fmt::Display for BadRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("expected HOST, *.DOMAIN or an address, each with or without :PORT")
    }
}

/// What a rule says about a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowed {
    /// Reach it by this name, wherever outside that leads.
    ByName,
    /// The very address is named: reach it wherever it is.
    ByAddress,
}

impl EgressRule {
    /// Whether the rule lets an agent reach a port of a host, named as the agent names it.
    pub fn allows(&self, host: &str, port: u16) -> Option<Allowed> {
        let port_fits = match self.port {
            Some(named) => named == port,
            None => PORTS_DEFAULT.contains(&port),
        };
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let found = match &self.host {
            Host::Name(name) => (*name == host).then_some(Allowed::ByName),
            Host::Below(domain) => {
                let above = host.strip_suffix(domain.as_str());
                let is_below = above.is_some_and(|above| above.len() > 1 && above.ends_with('.'));
                is_below.then_some(Allowed::ByName)
            }
            Host::Address(address) => {
                let is_it = host.parse::<IpAddr>().is_ok_and(|host| host == *address);
                is_it.then_some(Allowed::ByAddress)
            }
        };
        found.filter(|_| port_fits)
    }
}

impl FromStr for EgressRule {
    type Err = BadRule;

    fn from_str(text: &str) -> Result<Self, BadRule> {
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (address, port) = rest.split_once(']').ok_or(BadRule)?;
                let port = match port {
                    "" => None,
                    port => Some(port.strip_prefix(':').ok_or(BadRule)?),
                };
                (address, port)
            }
            None if text.parse::<IpAddr>().is_ok() => (text, None),
            None => match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            },
        };
        let port = match port {
            Some(port) => Some(port.parse().ok().filter(|port| *port > 0).ok_or(BadRule)?),
            None => None,
        };
        let host = host.to_ascii_lowercase();
        let host = match (host.parse(), host.strip_prefix("*.")) {
            (Ok(address), _) => Host::Address(address),
            (Err(_), _) if text.starts_with('[') => return Err(BadRule),
            (Err(_), Some(domain)) => Host::Below(name(domain)?),
            (Err(_), None) => Host::Name(name(&host)?),
        };
        Ok(Self { host, port })
    }
}

fn name(text: &str) -> Result<String, BadRule> {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    // What looks like a number is read as an address by some resolvers.
    let last_is_number = |text: &str| {
        text.rsplit('.')
            .next()
            .is_some_and(|last| last.parse::<u64>().is_ok())
    };
    let is_name =
        text.len() <= HOST_BYTES_MAX && text.split('.').all(label) && !last_is_number(text);
    is_name.then(|| text.to_owned()).ok_or(BadRule)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(rule: &str, host: &str, port: u16) -> Option<Allowed> {
        rule.parse::<EgressRule>().unwrap().allows(host, port)
    }

    #[test]
    fn only_what_is_named_is_allowed() {
        let by_name = Some(Allowed::ByName);
        assert_eq!(allows("api.example.com", "API.example.com.", 443), by_name);
        assert_eq!(allows("api.example.com", "api.example.com", 80), by_name);
        assert_eq!(allows("api.example.com", "api.example.com", 22), None);
        assert_eq!(allows("api.example.com", "xapi.example.com", 443), None);
        assert_eq!(allows("api.example.com:22", "api.example.com", 22), by_name);
        assert_eq!(allows("api.example.com:22", "api.example.com", 443), None);
        assert_eq!(allows("*.example.com", "a.b.example.com", 443), by_name);
        assert_eq!(allows("*.example.com", "example.com", 443), None);
        assert_eq!(allows("*.example.com", ".example.com", 443), None);
        assert_eq!(allows("*.example.com", "badexample.com", 443), None);
        let by_address = Some(Allowed::ByAddress);
        assert_eq!(allows("10.0.0.7:8080", "10.0.0.7", 8080), by_address);
        assert_eq!(allows("10.0.0.7", "10.0.0.8", 80), None);
        assert_eq!(allows("[fd00::7]:80", "fd00:0::7", 80), by_address);
        assert_eq!(allows("fd00::7", "fd00::7", 443), by_address);
    }

    #[test]
    fn bad_rules_are_refused() {
        for bad in [
            "",
            "*",
            "*.",
            "a..b",
            "a b",
            "http://a",
            "a/b",
            "a:",
            "a:0",
            "a:70000",
            "a:b",
            "[a]",
            "[::1",
            "[::1]x",
            "1.2.3",
            "0x7f.1",
            "ä.example",
            "a.*.b",
            "*.*.b",
        ] {
            // A hexadecimal label is a name to us and is only ever asked for as a name.
            let is_bad = bad.parse::<EgressRule>().is_err();
            assert!(is_bad, "{bad:?} was accepted");
        }
        assert!(
            format!("{}.a", "x".repeat(64))
                .parse::<EgressRule>()
                .is_err()
        );
    }
}
