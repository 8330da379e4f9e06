//! `agent.toml` (interfaces.md §4), read strictly: an unknown key is an error, and so is a value
//! that says nothing. All mistakes of a file are reported at once.

use crate::ids::{AgentName, NodeName};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Most replicas that one manifest may ask for.
pub const REPLICAS_MAX: u32 = 256;
/// Most invocations that one replica may serve at once.
pub const CONCURRENCY_MAX: u32 = 1024;
/// How long a turn may take where neither the manifest nor the client says.
pub const TIMEOUT_DEFAULT: Duration = Duration::from_secs(300);
/// The longest a turn may take.
pub const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 3600);
/// Longest name of a store, in characters.
pub const STORE_CHARS_MAX: usize = 200;
/// How much of a wrong value a message repeats, in characters.
const SHOWN_CHARS_MAX: usize = 80;
/// Most secrets that one manifest may name.
pub const SECRETS_MAX: usize = 64;
/// What a secret may be called.
pub const SECRET_NAME_RULE: &str = "1 to 128 of A-Z, a-z, 0-9, -, _ and .";

/// Whether a secret may be called so.
pub fn is_secret_name(name: &str) -> bool {
    let ok = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    (1..=128).contains(&name.len()) && name.bytes().all(ok)
}

/// Largest manifest, in bytes.
pub const MANIFEST_BYTES_MAX: usize = 256 * 1024;

/// Least memory that an agent may be given, in bytes: less does not even start.
pub const MEMORY_MIN: u64 = 16 * 1024 * 1024;
/// Most processors that an agent may ask for.
pub const CPUS_MAX: f64 = 1024.0;

/// How an agent is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RuntimeKind {
    /// A Docker container.
    Container,
    /// A child process of the runtime worker.
    Process,
    /// An AWS Lambda function.
    Lambda,
}

/// A checked agent manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentManifest {
    /// Its name; redeploying a name replaces it.
    pub name: AgentName,
    /// What it is for, in a sentence.
    pub description: String,
    /// How it is run.
    pub runtime: RuntimeKind,
    /// Image reference, command line or function, by runtime.
    pub executable: String,
    /// Where its source lives; shown, not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Where its key-value store lives, e.g. `sqlite://notes`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object_storage: Option<String>,
    /// Where its vectors live.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vector_storage: Option<String>,
    /// How many instances run at once.
    #[serde(default = "one")]
    pub replicas: u32,
    /// How many turns one instance serves at once.
    #[serde(default = "one")]
    pub concurrency: u32,
    /// How long a turn may take, e.g. `90s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<String>,
    /// What it needs.
    #[serde(default)]
    pub requirements: Requirements,
    /// Where it may run.
    #[serde(default)]
    pub placement: Placement,
    /// How much it may take.
    #[serde(default)]
    pub resources: Resources,
    /// Named prompts, handed to the agent.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub prompts: BTreeMap<String, String>,
}

/// `[requirements]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Requirements {
    /// Models by alias, or just their names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub models: Option<Models>,
    /// Services by kind: `infer`, `embed`, `kv`, `vec`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub services: BTreeMap<String, ServiceNeed>,
    /// Mounts by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub mounts: BTreeMap<String, Mount>,
    /// Hosts it may reach outside.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub egress: Vec<String>,
    /// Secrets it may read, by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<String>,
}

impl Requirements {
    /// Every model that is named anywhere in them.
    pub fn model_names(&self) -> BTreeSet<&str> {
        let mut names: BTreeSet<&str> = match &self.models {
            Some(Models::Table(models)) => models.values().map(String::as_str).collect(),
            Some(Models::List(models)) => models.iter().map(String::as_str).collect(),
            None => BTreeSet::new(),
        };
        let services = self.services.values();
        names.extend(services.flat_map(|service| service.models.iter().map(String::as_str)));
        names
    }
}

/// `requirements.models`: a table or an array.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Models {
    /// alias = model
    Table(BTreeMap<String, String>),
    /// names alone
    List(Vec<String>),
}

/// `requirements.services.<kind>`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceNeed {
    /// Who serves it: `ollama`, `openai`, `sqlite` ….
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<String>,
    /// Which wire format the agent speaks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// Which models it uses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<String>,
}

/// `requirements.mounts.<name>`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mount {
    /// `bucket/prefix`.
    pub s3: String,
    /// Where it appears in the container.
    pub path: String,
    /// Another S3-compatible server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// The secret with its credentials.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
}

/// `[placement]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Placement {
    /// Labels a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// The one node it may run on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeName>,
}

/// `[resources]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resources {
    /// e.g. `512MiB`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    /// e.g. `1.5`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<f64>,
    /// Most processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pids: Option<u32>,
}

impl Resources {
    /// The memory in bytes, if the manifest says.
    pub fn memory_bytes(&self) -> Option<u64> {
        self.memory.as_deref().and_then(crate::size::parse)
    }

    fn mistakes(&self, found: &mut Vec<String>) {
        if let Some(text) = &self.memory
            && self.memory_bytes().is_none_or(|bytes| bytes < MEMORY_MIN)
        {
            found.push(format!(
                "resources.memory = {text:?}: expected a size of at least {}, such as 512MiB",
                crate::size::format(MEMORY_MIN)
            ));
        }
        if let Some(cpus) = self.cpus
            && !(0.01..=CPUS_MAX).contains(&cpus)
        {
            found.push(format!(
                "resources.cpus = {cpus}: expected 0.01 to {CPUS_MAX}"
            ));
        }
        if self.pids == Some(0) {
            found.push("resources.pids = 0: expected at least 1".to_owned());
        }
    }
}

fn one() -> u32 {
    1
}

/// What is wrong with a manifest: every mistake, one a line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct ManifestError(pub Vec<String>);

impl AgentManifest {
    /// Reads and checks a manifest.
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        if text.len() > MANIFEST_BYTES_MAX {
            return Err(ManifestError(vec![format!(
                "the manifest has {} bytes: expected at most {MANIFEST_BYTES_MAX}",
                text.len()
            )]));
        }
        let manifest: Self = toml::from_str(text)
            .map_err(|error| ManifestError(vec![error.to_string().trim().to_owned()]))?;
        let mistakes = manifest.mistakes();
        if mistakes.is_empty() {
            Ok(manifest)
        } else {
            Err(ManifestError(mistakes))
        }
    }

    /// Everything that is wrong with the values, in words.
    pub fn mistakes(&self) -> Vec<String> {
        let mut found = Vec::new();
        if self.description.trim().is_empty() {
            found.push("description: expected a sentence, found nothing".to_owned());
        }
        if self.executable.trim().is_empty() {
            found.push(
                "executable: expected an image, a command line or a function, found nothing"
                    .to_owned(),
            );
        }
        if self.executable.bytes().any(|b| b == 0 || b == b'\n') {
            found.push("executable: expected one line without NUL".to_owned());
        }
        if self.replicas > REPLICAS_MAX {
            found.push(format!(
                "replicas = {}: expected 0 to {REPLICAS_MAX}",
                self.replicas
            ));
        }
        if self.concurrency == 0 || self.concurrency > CONCURRENCY_MAX {
            found.push(format!(
                "concurrency = {}: expected 1 to {CONCURRENCY_MAX}",
                self.concurrency
            ));
        }
        if let Some(text) = &self.timeout {
            match humantime::parse_duration(text) {
                Ok(value) if value.is_zero() || value > TIMEOUT_MAX => {
                    found.push(format!(
                        "timeout = {text:?}: expected more than 0 and at most 24h"
                    ));
                }
                Ok(_) => {}
                Err(error) => found.push(format!(
                    "timeout = {text:?}: expected a duration such as 90s: {error}"
                )),
            }
        }
        for (key, value) in [
            ("object_storage", &self.object_storage),
            ("vector_storage", &self.vector_storage),
        ] {
            if let Some(text) = value
                && let Err(reason) = StoreUri::parse(text)
            {
                found.push(format!("{key} = {}: {reason}", shown(text)));
            }
        }
        self.resources.mistakes(&mut found);
        for rule in &self.requirements.egress {
            if let Err(reason) = rule.parse::<crate::egress::EgressRule>() {
                found.push(format!("requirements.egress = {rule:?}: {reason}"));
            }
        }
        for kind in self.requirements.services.keys() {
            if !["infer", "embed", "kv", "vec"].contains(&kind.as_str()) {
                found.push(format!(
                    "requirements.services.{kind}: expected infer, embed, kv or vec"
                ));
            }
        }
        if self.requirements.secrets.len() > SECRETS_MAX {
            found.push(format!(
                "requirements.secrets: {} names, expected at most {SECRETS_MAX}",
                self.requirements.secrets.len()
            ));
        }
        for name in &self.requirements.secrets {
            if !is_secret_name(name) {
                found.push(format!(
                    "requirements.secrets: {name:?} is no name of a secret: expected {SECRET_NAME_RULE}"
                ));
            }
        }
        found
    }

    /// Whether the manifest lets the agent read a secret.
    pub fn may_read_secret(&self, name: &str) -> bool {
        self.requirements.secrets.iter().any(|named| named == name)
    }

    /// How long a turn may take.
    pub fn timeout(&self) -> Duration {
        let parsed = self
            .timeout
            .as_deref()
            .and_then(|text| humantime::parse_duration(text).ok());
        parsed.unwrap_or(TIMEOUT_DEFAULT)
    }

    /// Whether the manifest lets the agent use an inference backend.
    pub fn may_infer(&self, backend: &str) -> bool {
        let declared = |kind: &str| self.requirements.services.get(kind);
        let by_service = ["infer", "embed"]
            .into_iter()
            .filter_map(declared)
            .any(|need| {
                need.provider
                    .as_deref()
                    .is_none_or(|provider| provider == backend)
            });
        by_service || (self.requirements.services.is_empty() && self.requirements.models.is_some())
    }

    /// The store behind the agent's kv calls, if it has one.
    pub fn object_store(&self) -> Option<StoreUri> {
        let declared = self
            .object_storage
            .as_deref()
            .and_then(|uri| StoreUri::parse(uri).ok());
        declared.or_else(|| self.default_store("kv"))
    }

    /// The store behind the agent's vector calls, if it has one.
    pub fn vector_store(&self) -> Option<StoreUri> {
        let declared = self
            .vector_storage
            .as_deref()
            .and_then(|uri| StoreUri::parse(uri).ok());
        declared.or_else(|| self.default_store("vec"))
    }

    /// `[requirements.services.kv]` without a store means a SQLite store named after the agent.
    fn default_store(&self, service: &str) -> Option<StoreUri> {
        self.requirements.services.get(service)?;
        Some(StoreUri {
            scheme: "sqlite".to_owned(),
            path: self.name.to_string(),
        })
    }
}

/// Most agents of one fleet.
pub const FLEET_AGENTS_MAX: usize = 64;

/// A checked `fleet.toml`: agents that belong together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FleetManifest {
    /// Its name; called by the same rule as an agent.
    pub name: AgentName,
    /// The alias of the agent that clients talk to.
    pub entry: AgentName,
    /// Its agents by alias: what they call each other when they delegate.
    pub agents: BTreeMap<AgentName, FleetAgent>,
}

/// `[agents.<alias>]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FleetAgent {
    /// The directory with its `agent.toml`, seen from the one of `fleet.toml`.
    pub path: String,
}

impl FleetManifest {
    /// Reads and checks a manifest.
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        if text.len() > MANIFEST_BYTES_MAX {
            return Err(ManifestError(vec![format!(
                "the manifest has {} bytes: expected at most {MANIFEST_BYTES_MAX}",
                text.len()
            )]));
        }
        let fleet: Self = toml::from_str(text)
            .map_err(|error| ManifestError(vec![error.to_string().trim().to_owned()]))?;
        let mut found = Vec::new();
        if fleet.agents.is_empty() || fleet.agents.len() > FLEET_AGENTS_MAX {
            found.push(format!(
                "agents: expected 1 to {FLEET_AGENTS_MAX}, found {}",
                fleet.agents.len()
            ));
        }
        if !fleet.agents.contains_key(&fleet.entry) {
            let aliases: Vec<&str> = fleet.agents.keys().map(AgentName::as_str).collect();
            found.push(format!(
                "entry = {:?}: expected the alias of one of its agents: {}",
                fleet.entry.as_str(),
                aliases.join(", ")
            ));
        }
        for (alias, agent) in &fleet.agents {
            if agent.path.trim().is_empty() || agent.path.contains('\0') {
                found.push(format!("agents.{alias}.path: expected a directory"));
            }
        }
        match found.is_empty() {
            true => Ok(fleet),
            false => Err(ManifestError(found)),
        }
    }
}

/// Where a store lives: `sqlite://path`, `nats://bucket`, `s3://bucket/prefix`, `memory://name`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreUri {
    /// `sqlite`, `nats`, `s3` or `memory`.
    pub scheme: String,
    /// What comes after `://`, 1 to [`STORE_CHARS_MAX`] characters; the id of the store.
    pub path: String,
}

/// A value in a message: quoted, escaped, and not all of it where it is long.
fn shown(text: &str) -> String {
    let mut beginning: String = text.chars().take(SHOWN_CHARS_MAX).collect();
    if beginning.len() < text.len() {
        beginning.push('…');
    }
    format!("{beginning:?}")
}

impl StoreUri {
    /// Reads a store address. What comes after `://` names a store and never a place in a file
    /// system: where a node keeps its stores is the node's business.
    pub fn parse(text: &str) -> Result<Self, String> {
        let rule = "expected sqlite://path, nats://bucket, s3://bucket/prefix or memory://name";
        let (scheme, path) = text.split_once("://").ok_or(rule)?;
        let has_parts = match scheme {
            "sqlite" | "s3" => true,
            "nats" | "memory" => false,
            _ => return Err(rule.to_owned()),
        };
        if path.is_empty() || path.len() > STORE_CHARS_MAX {
            return Err(format!(
                "expected 1 to {STORE_CHARS_MAX} characters after ://, found {}",
                path.chars().count()
            ));
        }
        let is_part = |part: &str| {
            let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            part.chars().all(known) && !part.is_empty() && !part.starts_with('.')
        };
        if !has_parts && path.contains('/') {
            return Err(format!("expected one name after {scheme}://, without /"));
        }
        if !path.split('/').all(is_part) {
            return Err(
                "expected a name after ://, of letters, digits, -, _ and ., in parts divided by /; it is no path \
                 of a file: no part may be empty or begin with a dot"
                    .to_owned(),
            );
        }
        if scheme == "s3" {
            check_bucket(path.split('/').next().unwrap_or_default())?;
        }
        Ok(Self {
            scheme: scheme.to_owned(),
            path: path.to_owned(),
        })
    }

    /// Whether this release has workers that serve such a store.
    pub fn is_served(&self) -> bool {
        matches!(self.scheme.as_str(), "sqlite" | "nats" | "s3")
    }
}

/// Checks the name of an S3 bucket by the rule that AWS has for general purpose buckets.
pub fn check_bucket(name: &str) -> Result<(), String> {
    let is_edge = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = name.as_bytes();
    let fits = (3..=63).contains(&bytes.len())
        && bytes.iter().all(|b| is_edge(b) || matches!(b, b'-' | b'.'))
        && bytes.first().is_some_and(is_edge)
        && bytes.last().is_some_and(is_edge);
    match fits {
        true => Ok(()),
        false => Err(format!(
            "{} is no name of an S3 bucket: expected 3 to 63 of a-z, 0-9, - and .",
            shown(name)
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = r#"
        name = "echo"
        description = "Says it again."
        runtime = "process"
        executable = "python3 agent.py"
    "#;

    #[test]
    fn the_smallest_manifest_has_defaults() {
        let manifest = AgentManifest::parse(MINIMAL).unwrap();
        assert_eq!((manifest.replicas, manifest.concurrency), (1, 1));
        assert_eq!(manifest.timeout(), TIMEOUT_DEFAULT);
        assert_eq!(manifest.object_store(), None);
        assert!(!manifest.may_infer("ollama"));
    }

    #[test]
    fn services_and_stores_are_read() {
        let text = format!(
            "object_storage = \"sqlite://notes\"\ntimeout = \"90s\"\n{MINIMAL}\n\
             [requirements]\nmodels = [\"smollm2\"]\n\
             [requirements.services.infer]\nprovider = \"ollama\"\nmodels = [\"smollm2\"]\n\
             [requirements.services.vec]\n"
        );
        let manifest = AgentManifest::parse(&text).unwrap();
        assert_eq!(manifest.object_store().unwrap().path, "notes");
        assert_eq!(manifest.vector_store().unwrap().path, "echo");
        assert!(manifest.may_infer("ollama"));
        assert!(!manifest.may_infer("openai"));
        assert_eq!(manifest.timeout().as_secs(), 90);
    }

    #[test]
    fn every_mistake_is_named() {
        let text = r#"
            name = "echo"
            description = " "
            runtime = "process"
            executable = ""
            replicas = 1000
            concurrency = 0
            timeout = "soon"
            object_storage = "ftp://x"
            [requirements]
            secrets = ["fine.name", "no/such"]
            [requirements.services.fly]
        "#;
        let error = AgentManifest::parse(text).unwrap_err();
        assert_eq!(error.0.len(), 8, "{error}");
    }

    #[test]
    fn names_of_stores_are_names() {
        for good in [
            "sqlite://notes",
            "sqlite://team/notes.v2",
            "sqlite://A_b-c",
            "memory://x",
            "nats://bucket-1",
            "s3://bucket/some/prefix",
        ] {
            assert!(StoreUri::parse(good).is_ok(), "{good}");
        }
        let most = format!("sqlite://{}", "n".repeat(STORE_CHARS_MAX));
        assert!(StoreUri::parse(&most).is_ok());
    }

    #[test]
    fn hostile_stores_are_refused_by_key_and_briefly() {
        let long = format!("sqlite://{}", "n".repeat(10 * 1024));
        for bad in [
            "",
            "://",
            "sqlite",
            "sqlite:",
            "sqlite:/etc/passwd",
            "sqlite://",
            "sqlite:///etc/passwd",
            "sqlite:///",
            "sqlite://../../x",
            "sqlite://a/../../x",
            "sqlite://a/./b",
            "sqlite://.",
            "sqlite://..",
            "sqlite://.hidden",
            "sqlite://a//b",
            "sqlite://a/",
            "sqlite://~/x",
            "sqlite://$HOME",
            "sqlite://a b",
            "sqlite://a\\b",
            "sqlite://a\0b",
            "sqlite://a\nb",
            "sqlite://a\u{1b}[2Jb",
            "sqlite://a\u{202e}b",
            "sqlite://%2e%2e/x",
            "sqlite://a?mode=memory",
            "sqlite://a#b",
            "sqlite://*",
            "sqlite://>",
            "sqlite://ä",
            "SQLITE://a",
            "file:///etc/passwd",
            "nats://a/b",
            "memory://a/b",
            "s3:///x",
            "s3://Bucket/x",
            "s3://bu/x",
            "s3://bucket-/x",
            &long,
        ] {
            for key in ["object_storage", "vector_storage"] {
                let value = toml::Value::String(bad.to_owned());
                let error = AgentManifest::parse(&format!("{key} = {value}\n{MINIMAL}"));
                let error = error.expect_err(bad).to_string();
                assert!(error.starts_with(&format!("{key} = ")), "{bad:?}: {error}");
                assert!(error.contains("expected"), "{bad:?}: {error}");
                assert!(error.len() < 500, "{bad:?}: {} bytes", error.len());
                assert!(!error.contains(char::is_control), "{bad:?}: {error:?}");
            }
        }
    }

    #[test]
    fn fleets_are_read_and_checked() {
        let good =
            "name='f'\nentry='front'\n[agents.front]\npath='a'\n[agents.back]\npath='../b'\n";
        let fleet = FleetManifest::parse(good).unwrap();
        assert_eq!(fleet.entry.as_str(), "front");
        assert_eq!(fleet.agents.len(), 2);
        for (bad, says) in [
            ("name='f'\nentry='x'\n[agents.front]\npath='a'\n", "entry"),
            (
                "name='f'\nentry='a'\n[agents.a]\npath=' '\n",
                "agents.a.path",
            ),
            ("name='f'\nentry='a'\n[agents]\n", "expected 1 to 64"),
            ("name='F'\nentry='a'\n[agents.a]\npath='a'\n", "agent name"),
            (
                "name='f'\nentry='a'\n[agents.a]\npath='a'\nport=1\n",
                "port",
            ),
            ("", "name"),
        ] {
            let error = FleetManifest::parse(bad).unwrap_err().to_string();
            assert!(error.contains(says), "{bad:?}: {error}");
        }
    }

    #[test]
    fn hostile_manifests_are_refused() {
        for bad in [
            "name = \"../../etc\"\ndescription=\"d\"\nruntime=\"process\"\nexecutable=\"x\"",
            "name = \"a\"\ndescription=\"d\"\nruntime=\"magic\"\nexecutable=\"x\"",
            "name = \"a\"\ndescription=\"d\"\nruntime=\"process\"\nexecutable=\"x\"\nbogus=1",
            "\u{0}",
            "[[[[[",
            "",
        ] {
            assert!(AgentManifest::parse(bad).is_err(), "{bad:?} was accepted");
        }
        assert!(AgentManifest::parse(&"#".repeat(MANIFEST_BYTES_MAX + 1)).is_err());
    }
}
