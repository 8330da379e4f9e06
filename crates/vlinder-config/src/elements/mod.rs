//! The kinds of values that keys hold: how each is written, checked and shown.
//!
//! A [`Raw`] value is what somebody wrote; a [`Value`] is checked and canonical. [`Kind`] leads
//! from one to the other and says in words what it expects.

mod scalar;
mod urls;

use std::collections::BTreeMap;
use std::fmt;

use crate::addresses::Service;
use crate::mistake::nearest;

pub(crate) use urls::service_url;

/// Most entries of a list or a map.
pub(crate) const LIST_LEN_MAX: usize = 64;

/// A value as it was written.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Raw {
    /// A string of a file.
    Text(String),
    /// A variable or a flag: text that may stand for any kind.
    Argument(String),
    /// A whole number, in decimal.
    Integer(String),
    /// Anything that no key takes: a float, a truth value, a date.
    Other(String),
    /// An array.
    List(Vec<Raw>),
    /// A table that is a value: labels, or `{ file = "…" }`.
    Table(BTreeMap<String, Raw>),
}

impl fmt::Display for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Raw::Text(text) | Raw::Argument(text) | Raw::Integer(text) | Raw::Other(text) => {
                f.write_str(text)
            }
            Raw::List(items) => f
                .debug_list()
                .entries(items.iter().map(Raw::to_string))
                .finish(),
            Raw::Table(items) => f
                .debug_map()
                .entries(items.iter().map(|(k, v)| (k, v.to_string())))
                .finish(),
        }
    }
}

/// A checked value, canonical per kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Value {
    /// Text, choices, durations (as `1m 30s`), paths, secrets, single URLs.
    Text(String),
    /// Counts, ports, sizes in bytes.
    Number(u64),
    /// Comma lists of URLs, arrays of text.
    List(Vec<String>),
    /// Labels.
    Map(BTreeMap<String, String>),
}

/// Why a value was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// What is wrong and what was expected.
    pub expected: String,
    /// What was probably meant.
    pub near: Option<String>,
}

impl Refusal {
    fn new(expected: impl Into<String>) -> Self {
        Self {
            expected: expected.into(),
            near: None,
        }
    }
}

/// What a key holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A name of a node, see `vlinder_core::NodeName`.
    NodeName,
    /// One of a few words.
    Choice(&'static [&'static str]),
    /// A whole number within bounds, both included.
    Number { min: u64, max: u64 },
    /// A size in bytes, at least `min`; an integer or text with a unit.
    Size { min: u64 },
    /// A duration with a unit, within bounds in milliseconds.
    Span { min_ms: u64, max_ms: u64 },
    /// One http or https URL of an upstream.
    Url,
    /// A comma list of http or https addresses of a service of ours.
    ServiceUrls(Service),
    /// A comma list of NATS servers.
    NatsUrls,
    /// An IP address to listen on.
    Listen,
    /// A file.
    Path,
    /// A credential.
    Secret,
    /// Free text on one line.
    Text,
    /// `auto`, a socket or a URL of a container engine.
    DockerHost,
    /// A list of words.
    Words,
    /// `key = "value"` pairs.
    Labels,
}

impl Kind {
    /// What a value of this kind looks like, in words that finish "expected …".
    pub fn expectation(self) -> String {
        match self {
            Kind::NodeName => "1 to 63 of A-Z, a-z, 0-9, -, _ and .".into(),
            Kind::Choice(choices) => format!("one of {}", choices.join(", ")),
            Kind::Number { min, max } => format!("a whole number from {min} to {max}"),
            Kind::Size { min } => {
                format!(
                    "a size such as \"10GiB\", at least {}",
                    vlinder_core::size::format(min)
                )
            }
            Kind::Span { min_ms, max_ms } => format!(
                "a duration with a unit such as \"30s\", from {} to {}",
                scalar::format_span(min_ms),
                scalar::format_span(max_ms)
            ),
            Kind::Url => "a URL such as \"http://host:8000/v1\"".into(),
            Kind::ServiceUrls(service) => format!(
                "http://HOST:{} (or https), several separated by commas",
                service.default_port()
            ),
            Kind::NatsUrls => {
                "nats://HOST:4222 (or tls, ws, wss), several separated by commas".into()
            }
            Kind::Listen => "an IP address such as 127.0.0.1 or 0.0.0.0".into(),
            Kind::Path => "the path of a file".into(),
            Kind::Secret => "printable ASCII without spaces, or { file = \"PATH\" }".into(),
            Kind::Text => "text on one line".into(),
            Kind::DockerHost => {
                "auto, an absolute path of a socket, or a unix, tcp, http or https URL".into()
            }
            Kind::Words => "a list of words such as [\"a\", \"b\"] (a,b in a variable)".into(),
            Kind::Labels => {
                "labels such as { zone = \"a\" } (zone=a,gpu=yes in a variable), of A-Z, a-z, 0-9, \
                 ., _, -, and / in keys, at most 63 characters each"
                    .into()
            }
        }
    }

    /// Whether a value must be masked wherever it is shown.
    pub fn is_secret(self) -> bool {
        self == Kind::Secret
    }

    /// Whether `~` and `${NAME}` expand (`~` not in secrets).
    pub fn expands(self) -> bool {
        matches!(self, Kind::Path | Kind::Secret | Kind::DockerHost)
    }

    /// Checks what was written. Expansion and `{ file = … }` are done before.
    pub fn check(self, raw: &Raw) -> Result<Value, Refusal> {
        match (self, raw) {
            (_, Raw::Argument(text)) => self.check_text(text, true),
            (Kind::Number { .. } | Kind::Size { .. }, Raw::Integer(number)) => {
                self.check_text(number, false)
            }
            (Kind::Number { .. }, Raw::Text(_)) => Err(self.refusal(", without quotes")),
            (Kind::Words | Kind::Labels, Raw::Text(_)) => Err(self.refusal("")),
            (_, Raw::Text(text)) => self.check_text(text, false),
            (Kind::Words, Raw::List(items)) => scalar::words(items).ok_or_else(|| self.refusal("")),
            (Kind::Labels, Raw::Table(items)) => {
                let pairs = items.iter().map(|(key, value)| match value {
                    Raw::Text(value) => Some((key.clone(), value.clone())),
                    _ => None,
                });
                let pairs: Option<Vec<_>> = pairs.collect();
                pairs
                    .and_then(scalar::labels)
                    .ok_or_else(|| self.refusal(""))
            }
            (Kind::Span { .. }, Raw::Integer(_)) => Err(self.refusal(" (the unit is missing)")),
            _ => Err(self.refusal("")),
        }
    }

    /// `argument`: from a variable or a flag, where lists and maps are text too.
    fn check_text(self, text: &str, argument: bool) -> Result<Value, Refusal> {
        if text.is_empty() && !matches!(self, Kind::Words | Kind::Labels) {
            return Err(Refusal::new(format!(
                "is empty; expected {}, or leave it out",
                self.expectation()
            )));
        }
        let refused = || self.refusal("");
        let own = |ok: bool| ok.then(|| Value::Text(text.to_owned())).ok_or_else(refused);
        match self {
            Kind::NodeName => own(vlinder_core::NodeName::new(text).is_ok()),
            Kind::Choice(choices) => own(choices.contains(&text)).map_err(|refusal| Refusal {
                near: nearest(&text.to_ascii_lowercase(), choices.iter().copied()),
                ..refusal
            }),
            Kind::Number { min, max } => scalar::number(text, min, max)
                .map(Value::Number)
                .ok_or_else(refused),
            Kind::Size { min } => vlinder_core::size::parse(text)
                .filter(|n| *n >= min)
                .map(Value::Number)
                .ok_or_else(refused),
            Kind::Span { min_ms, max_ms } => scalar::span(text, min_ms, max_ms)
                .map(Value::Text)
                .ok_or_else(refused),
            Kind::Url => urls::endpoint(text).map(Value::Text),
            Kind::ServiceUrls(service) => urls::services(text, service).map(Value::List),
            Kind::NatsUrls => urls::nats(text).map(Value::List),
            Kind::Listen => scalar::listen(text).map(Value::Text).ok_or_else(refused),
            Kind::Path => own(!text.contains(['\0', '\n'])),
            Kind::Secret => own(text.len() <= scalar::SECRET_BYTES_MAX
                && text.bytes().all(|b| b.is_ascii_graphic())),
            Kind::Text => {
                own(text.len() <= scalar::TEXT_BYTES_MAX && !text.contains(char::is_control))
            }
            Kind::DockerHost => own(urls::is_docker_host(text)),
            Kind::Words if argument => scalar::words_of_text(text).ok_or_else(refused),
            Kind::Labels if argument => scalar::labels_of_text(text).ok_or_else(refused),
            Kind::Words | Kind::Labels => Err(refused()),
        }
    }

    fn refusal(self, more: &str) -> Refusal {
        Refusal::new(format!("expected {}{more}", self.expectation()))
    }

    /// The value as it would be written in `config.toml`.
    pub fn to_toml(self, value: &Value) -> toml::Value {
        match (self, value) {
            (Kind::Size { .. }, Value::Number(bytes)) => {
                toml::Value::String(vlinder_core::size::format(*bytes))
            }
            (Kind::Path | Kind::Secret | Kind::DockerHost, Value::Text(text)) => {
                toml::Value::String(text.replace("${", "$${"))
            }
            (_, Value::Text(text)) => toml::Value::String(text.clone()),
            // Every number is bounded far below i64::MAX.
            (_, Value::Number(number)) => {
                toml::Value::Integer(i64::try_from(*number).unwrap_or(i64::MAX))
            }
            (Kind::Words, Value::List(items)) => {
                toml::Value::Array(items.iter().cloned().map(toml::Value::String).collect())
            }
            (_, Value::List(items)) => toml::Value::String(items.join(",")),
            (_, Value::Map(items)) => toml::Value::Table(
                items
                    .iter()
                    .map(|(k, v)| (k.clone(), toml::Value::String(v.clone())))
                    .collect(),
            ),
        }
    }
}

impl Value {
    /// The value as JSON: sizes as bytes, lists as arrays.
    pub fn to_json(&self) -> serde_json::Value {
        match self {
            Value::Text(text) => text.as_str().into(),
            Value::Number(number) => (*number).into(),
            Value::List(items) => items.clone().into(),
            Value::Map(items) => items
                .iter()
                .map(|(k, v)| (k.clone(), v.as_str().into()))
                .collect::<serde_json::Map<_, _>>()
                .into(),
        }
    }
}
