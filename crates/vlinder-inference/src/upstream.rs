//! The HTTP client of one upstream: which models it has, and one try of one call.
//!
//! It reads no proxy from the environment, follows no redirect (the key would travel along), and
//! repeats nothing by itself.

use crate::{ApiKey, Backend, Options};
use bytes::{Bytes, BytesMut};
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Client, Url};
use serde::Deserialize;
use std::error::Error as _;
use std::io;
use std::time::Duration;
use vlinder_core::NodeHash;
use vlinder_worker::offers::OfferedModel;

/// How long an upstream may take to list its models.
const LIST_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest list of models, in bytes: OpenRouter's several hundred are below 1 MiB.
const LIST_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Most models of one upstream; more are left out with a warning.
pub const MODELS_MAX: usize = 4096;
/// The version of Anthropic's format that agents speak here; every client of theirs sends this one.
const ANTHROPIC_VERSION: &str = "2023-06-01";
/// Idle connections that are kept for the next call.
const IDLE_CONNECTIONS_MAX: usize = 8;

/// Why an upstream cannot be used or did not answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The client could not be made: a bad key, no certificates on this machine.
    #[error("cannot make a client for {endpoint}: {reason}")]
    Client {
        /// The upstream, without credentials.
        endpoint: String,
        /// What is wrong.
        reason: String,
    },
    /// No connection: nobody listens, the name is unknown, the network is cut.
    #[error("no {what} at {endpoint}: {reason}")]
    Away {
        /// What was expected there.
        what: &'static str,
        /// The upstream, without credentials.
        endpoint: String,
        /// The first cause.
        reason: String,
    },
    /// Connected, but no answer came.
    #[error("{endpoint} did not answer: {reason}")]
    NoAnswer {
        /// The upstream, without credentials.
        endpoint: String,
        /// The first cause.
        reason: String,
    },
    /// An answer came that says no, or says nothing that can be read.
    #[error("{endpoint} does not list its models: {reason}")]
    NoList {
        /// The upstream, without credentials.
        endpoint: String,
        /// What came instead.
        reason: String,
    },
}

/// One upstream.
pub struct Upstream {
    client: Client,
    backend: Backend,
    endpoint: Url,
    api_key: ApiKey,
}

impl Upstream {
    /// A client for the endpoint in `options`. Connects to nothing yet.
    pub fn new(options: &Options) -> Result<Self, Error> {
        let endpoint = options.endpoint.clone();
        let failed = |reason: String| Error::Client {
            endpoint: shown(&options.endpoint),
            reason,
        };
        let key = options.api_key.now();
        key_headers(options.backend, key.as_deref()).map_err(|reason| failed(reason.to_owned()))?;
        let mut builder = Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .referer(false)
            .user_agent(concat!("vlinder/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(options.connect_timeout)
            .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
            .tcp_nodelay(true);
        match endpoint.scheme() {
            // Without TLS no certificates are needed, and machines without any work too.
            "http" => builder = builder.tls_certs_only([]),
            "https" => {}
            other => return Err(failed(format!("expected http or https, found {other}"))),
        }
        // Fails only where a provider is installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = builder.build().map_err(|error| failed(cause(&error)))?;
        Ok(Self {
            client,
            backend: options.backend,
            endpoint,
            api_key: options.api_key.clone(),
        })
    }

    /// The kind of upstream.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Its address for people, without credentials.
    pub fn shown(&self) -> String {
        shown(&self.endpoint)
    }

    /// Which models it has now.
    pub async fn list(&self) -> Result<Vec<OfferedModel>, Error> {
        match tokio::time::timeout(LIST_TIMEOUT, self.list_slowly()).await {
            Ok(listed) => listed,
            Err(_) => Err(self.no_answer(format!("nothing within {LIST_TIMEOUT:?}"))),
        }
    }

    async fn list_slowly(&self) -> Result<Vec<OfferedModel>, Error> {
        let path = match self.backend {
            Backend::Ollama => "api/tags",
            Backend::Openai | Backend::Openrouter | Backend::Anthropic => "v1/models",
        };
        let sent = self
            .client
            .get(address(self.backend, &self.endpoint, path))
            .headers(self.key_headers()?)
            .send()
            .await;
        let mut response = sent.map_err(|error| self.failed(&error))?;
        let refused = |reason: String| Error::NoList {
            endpoint: self.shown(),
            reason,
        };
        let status = response.status();
        if !status.is_success() {
            let hint = match status.as_u16() {
                401 | 403 => format!(
                    ": check {0}.api_key, or the secret {0}.api_key where that is not set",
                    self.backend
                ),
                404 => format!(": check {}.endpoint", self.backend),
                _ => String::new(),
            };
            return Err(refused(format!("it answered {status}{hint}")));
        }
        let mut body = BytesMut::new();
        while let Some(chunk) = response.chunk().await.map_err(|e| self.failed(&e))? {
            body.extend_from_slice(&chunk);
            if body.len() > LIST_BYTES_MAX {
                return Err(refused(format!("more than {LIST_BYTES_MAX} bytes came")));
            }
        }
        models_in(self.backend, &body).map_err(refused)
    }

    /// Makes one call and returns its answer as soon as its head is there. Dropping the future or
    /// the answer closes the connection.
    pub async fn post(
        &self,
        operation: &str,
        body: Bytes,
        request: &NodeHash,
    ) -> Result<reqwest::Response, Error> {
        let sent = self
            .client
            .post(address(self.backend, &self.endpoint, operation))
            .headers(self.key_headers()?)
            .header(CONTENT_TYPE, HeaderValue::from_static("application/json"))
            .header("Idempotency-Key", request.to_string())
            .body(body)
            .send();
        sent.await.map_err(|error| self.failed(&error))
    }

    /// The credential as it is now.
    fn key_headers(&self) -> Result<HeaderMap, Error> {
        key_headers(self.backend, self.api_key.now().as_deref()).map_err(|reason| Error::Client {
            endpoint: self.shown(),
            reason: reason.to_owned(),
        })
    }

    /// Ready when the credential is another one.
    pub async fn key_changed(&self) {
        self.api_key.clone().changed().await;
    }

    fn failed(&self, error: &reqwest::Error) -> Error {
        if error.is_connect() {
            return Error::Away {
                what: self.backend.title(),
                endpoint: self.shown(),
                reason: cause(error),
            };
        }
        self.no_answer(cause(error))
    }

    /// The error for an answer that did not come.
    pub fn no_answer(&self, reason: String) -> Error {
        Error::NoAnswer {
            endpoint: self.shown(),
            reason,
        }
    }
}

fn key_headers(backend: Backend, key: Option<&str>) -> Result<HeaderMap, &'static str> {
    let mut headers = HeaderMap::new();
    if backend == Backend::Anthropic {
        let version = HeaderValue::from_static(ANTHROPIC_VERSION);
        headers.insert("anthropic-version", version);
    }
    if let Some(key) = key {
        let (name, text) = match backend {
            Backend::Anthropic => (HeaderName::from_static("x-api-key"), key.to_owned()),
            Backend::Ollama | Backend::Openai | Backend::Openrouter => {
                (AUTHORIZATION, format!("Bearer {key}"))
            }
        };
        let mut value = HeaderValue::from_str(&text)
            .map_err(|_| "the key has characters that no header can carry")?;
        value.set_sensitive(true);
        headers.insert(name, value);
    }
    Ok(headers)
}

/// Where an operation lives.
fn address(backend: Backend, endpoint: &Url, operation: &str) -> Url {
    let base = endpoint.path().trim_end_matches('/');
    // An OpenAI endpoint is configured with its `/v1`; the bare root is understood too.
    let has_version = backend != Backend::Ollama && !base.is_empty();
    let below = match operation.strip_prefix("v1/") {
        Some(rest) if has_version => rest,
        _ => operation,
    };
    let mut address = endpoint.clone();
    address.set_path(&format!("{base}/{below}"));
    // A page of theirs has 20 unless asked for more.
    let is_paged = backend == Backend::Anthropic && operation == "v1/models";
    address.set_query(is_paged.then_some("limit=1000"));
    address.set_fragment(None);
    address
}

/// An address without user and password.
pub fn shown(endpoint: &Url) -> String {
    let mut shown = endpoint.clone();
    // Both fail only for addresses that cannot have any.
    let _ = shown.set_username("");
    let _ = shown.set_password(None);
    shown.set_query(None);
    shown.as_str().trim_end_matches('/').to_owned()
}

/// The innermost cause, which says most in the fewest words; never an address with credentials.
pub fn cause(error: &reqwest::Error) -> String {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    if let Some(kind) = innermost.downcast_ref::<io::Error>().map(io::Error::kind) {
        match kind {
            io::ErrorKind::ConnectionRefused => return "connection refused".to_owned(),
            io::ErrorKind::ConnectionReset => return "connection reset".to_owned(),
            io::ErrorKind::TimedOut => return "timed out".to_owned(),
            _ => {}
        }
    }
    if error.source().is_none() {
        return "the request failed".to_owned();
    }
    innermost.to_string()
}

#[derive(Deserialize)]
struct Tags {
    models: Vec<Tag>,
}

#[derive(Deserialize)]
struct Tag {
    name: String,
    size: Option<u64>,
}

#[derive(Deserialize)]
struct Models {
    data: Vec<ModelId>,
}

#[derive(Deserialize)]
struct ModelId {
    id: String,
}

/// The models in a list as `backend` writes it.
fn models_in(backend: Backend, body: &[u8]) -> Result<Vec<OfferedModel>, String> {
    let unreadable = |error: serde_json::Error| format!("unreadable list: {error}");
    let mut models: Vec<OfferedModel> = match backend {
        Backend::Ollama => {
            let tags: Tags = serde_json::from_slice(body).map_err(unreadable)?;
            let offered = |tag: Tag| OfferedModel {
                name: tag.name,
                size: tag.size,
            };
            tags.models.into_iter().map(offered).collect()
        }
        Backend::Openai | Backend::Openrouter | Backend::Anthropic => {
            let models: Models = serde_json::from_slice(body).map_err(unreadable)?;
            let offered = |model: ModelId| OfferedModel {
                name: model.id,
                size: None,
            };
            models.data.into_iter().map(offered).collect()
        }
    };
    // In one order, so that a list that only changed its order is no news.
    models.sort_by(|a, b| a.name.cmp(&b.name));
    models.dedup_by(|a, b| a.name == b.name);
    let had = models.len();
    models.retain(|model| vlinder_core::Selector::new(&model.name).is_ok());
    models.truncate(MODELS_MAX);
    if models.len() < had {
        let left_out = had - models.len();
        tracing::warn!(%backend, left_out, "models with unusable names, or too many of them");
    }
    Ok(models)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn operations_are_found_below_the_endpoint() {
        let check = |backend, endpoint: &str, operation: &str, expected: &str| {
            let address = address(backend, &endpoint.parse().unwrap(), operation);
            assert_eq!(address.as_str(), expected);
        };
        use Backend::{Anthropic, Ollama, Openai, Openrouter};
        check(Ollama, "http://h:1", "api/chat", "http://h:1/api/chat");
        check(
            Ollama,
            "http://h:1/",
            "v1/embeddings",
            "http://h:1/v1/embeddings",
        );
        check(Ollama, "http://h:1/o/", "api/chat", "http://h:1/o/api/chat");
        check(Openai, "http://h:1/v1", "v1/models", "http://h:1/v1/models");
        check(
            Openai,
            "http://h:1/v1/",
            "v1/models",
            "http://h:1/v1/models",
        );
        check(Openai, "http://h:1", "v1/models", "http://h:1/v1/models");
        check(
            Anthropic,
            "https://api.anthropic.com",
            "v1/messages",
            "https://api.anthropic.com/v1/messages",
        );
        check(
            Anthropic,
            "http://h:1/v1",
            "v1/models",
            "http://h:1/v1/models?limit=1000",
        );
        check(
            Openrouter,
            "https://openrouter.ai/api/v1",
            "v1/chat/completions",
            "https://openrouter.ai/api/v1/chat/completions",
        );
    }

    #[test]
    fn credentials_are_never_shown() {
        let options = Options::new(
            Backend::Openai,
            "http://user:secret@h:1/v1?key=secret".parse().unwrap(),
            Some("secret".to_owned()),
        );
        let upstream = Upstream::new(&options).unwrap();
        assert_eq!(upstream.shown(), "http://h:1/v1");
        assert!(!format!("{options:?}").contains("secret"));
        let bad = Options {
            api_key: Some("secret\nkey".to_owned()).into(),
            ..options.clone()
        };
        let error = Upstream::new(&bad).err().unwrap().to_string();
        assert!(
            error.contains("http://h:1/v1") && !error.contains("secret"),
            "{error}"
        );
        let other = Options {
            endpoint: "ftp://h".parse().unwrap(),
            ..options
        };
        let error = Upstream::new(&other).err().unwrap().to_string();
        assert!(
            error.contains("expected http or https, found ftp"),
            "{error}"
        );
    }

    #[test]
    fn lists_are_read_sorted_and_without_hostile_names() {
        let names = |backend, body: &str| {
            let models = models_in(backend, body.as_bytes())?;
            let names = models.into_iter().map(|model| model.name);
            Ok::<Vec<String>, String>(names.collect())
        };
        let tags = r#"{"models":[{"name":"b:latest","size":7},{"name":"a:1","x":{}},{"name":"a\nb"},{"name":""}]}"#;
        assert_eq!(names(Backend::Ollama, tags).unwrap(), ["a:1", "b:latest"]);
        let models = r#"{"object":"list","data":[{"id":"org/m"},{"id":"org/m"}]}"#;
        assert_eq!(names(Backend::Openai, models).unwrap(), ["org/m"]);
        assert!(names(Backend::Openai, tags).is_err());
        assert!(names(Backend::Ollama, "<html>").is_err());
    }

    proptest! {
        #[test]
        fn hostile_lists_do_not_panic(body in any::<Vec<u8>>()) {
            let _ = models_in(Backend::Ollama, &body);
            let _ = models_in(Backend::Openai, &body);
        }
    }
}
