//! Values that must not be shown by accident.

use std::fmt;

use serde::{Deserialize, Serialize};
use url::Url;

/// What stands in place of a secret.
pub(crate) const MASK: &str = "***";

/// A secret. `Debug` masks it; serialization does not, since a daemon hands its configuration to
/// its own children (see [`crate::Config::masked`] for everything that people read).
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a value that is already checked.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The secret itself.
    pub fn expose(&self) -> &str {
        &self.0
    }

    pub(crate) fn masked() -> Self {
        Self(MASK.into())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASK)
    }
}

/// The address of a NATS server. It may carry a user and a password or a token, which `Debug` and
/// `Display` mask.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NatsUrl(Url);

impl NatsUrl {
    /// The address with its credential, for the bus client only.
    pub fn expose(&self) -> &str {
        self.0.as_str()
    }

    /// Host and port, as in `localhost:4222`.
    pub fn host_port(&self) -> String {
        let port = self.0.port().unwrap_or(4222);
        format!("{}:{port}", self.0.host_str().unwrap_or_default())
    }

    pub(crate) fn masked(&self) -> Self {
        // Our own mask in a URL that parsed always parses again.
        Self(Url::parse(&mask_url(self.expose())).unwrap_or_else(|_| self.0.clone()))
    }
}

impl fmt::Display for NatsUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&mask_url(self.expose()))
    }
}

impl fmt::Debug for NatsUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `text` with whatever stands between `://` and `@` replaced. Works on text that is no URL too,
/// since mistakes repeat what was written.
pub(crate) fn mask_url(text: &str) -> String {
    let mut masked = String::with_capacity(text.len());
    for (index, part) in text.split(',').enumerate() {
        if index > 0 {
            masked.push(',');
        }
        let start = part.find("://").map_or(0, |at| at + 3);
        // The last `@` before the path ends the credential.
        let authority_end = part[start..]
            .find(['/', '?', '#'])
            .map_or(part.len(), |at| start + at);
        match part[start..authority_end].rfind('@') {
            Some(at) => {
                masked.push_str(&part[..start]);
                masked.push_str(MASK);
                masked.push_str(&part[start + at..]);
            }
            None => masked.push_str(part),
        }
    }
    masked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_secret_in_debug() {
        let url = NatsUrl(Url::parse("nats://me:pa55@hub:4222").unwrap());
        assert_eq!(
            format!("{url:?} {:?}", Secret::new("pa55")),
            "nats://***@hub:4222 ***"
        );
        assert_eq!(url.masked().expose(), "nats://***@hub:4222");
        assert_eq!(url.host_port(), "hub:4222");
        assert!(url.expose().contains("pa55"));
    }

    #[test]
    fn urls_are_masked_even_when_they_are_none() {
        assert_eq!(
            mask_url("nats://a:b@c,nats://t@d"),
            "nats://***@c,nats://***@d"
        );
        assert_eq!(mask_url("u:p@host"), "***@host");
        assert_eq!(mask_url("http://h/a@b"), "http://h/a@b");
    }
}
