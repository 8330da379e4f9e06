//! From a path to a call: the table of what agents may ask for (interfaces.md §5).

use hyper::Method;
use vlinder_core::manifest::{AgentManifest, StoreUri};

/// Longest path that is looked at, in bytes.
const PATH_BYTES_MAX: usize = 1024;
/// The domain whose names stand for services.
const DOMAIN: &str = ".vlinder.local";

/// A path of the bridge, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Path<'a> {
    /// Who calls; empty where that is known without it.
    pub secret: &'a str,
    /// Which service, by the name that agents use.
    pub service: &'a str,
    /// What is left: the call, without a leading slash.
    pub call: &'a str,
}

/// Reads `/<secret>/<service>/<call…>`, or `/<secret>/<call…>` where the `Host` names the service.
pub(crate) fn parse<'a>(path: &'a str, host: Option<&'a str>) -> Option<Path<'a>> {
    if path.len() > PATH_BYTES_MAX {
        return None;
    }
    let (secret, rest) = path.strip_prefix('/')?.split_once('/')?;
    Some(take_apart(secret, rest, host))
}

/// Reads `/<call…>` where the `Host` names the service, else `/<service>/<call…>`, of a caller who is
/// known by his socket.
pub(crate) fn parse_known<'a>(path: &'a str, host: Option<&'a str>) -> Option<Path<'a>> {
    if path.len() > PATH_BYTES_MAX {
        return None;
    }
    let rest = path.strip_prefix('/').unwrap_or(path);
    Some(take_apart("", rest, host))
}

fn take_apart<'a>(secret: &'a str, rest: &'a str, host: Option<&'a str>) -> Path<'a> {
    let host = host.map(|host| host.split(':').next().unwrap_or(host));
    let by_host = host.and_then(|host| host.strip_suffix(DOMAIN));
    let (service, call) = match by_host {
        Some(service) => (service, rest),
        None => rest.split_once('/').unwrap_or((rest, "")),
    };
    Path {
        secret,
        service,
        call,
    }
}

/// What an agent asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// A call to a store.
    Store {
        /// `kv` or `vec`.
        service: &'static str,
        store: StoreUri,
        operation: &'static str,
        /// Whether it can lead to another state.
        changes_state: bool,
    },
    /// A call to a model.
    Model {
        /// `infer` or `embed`.
        service: &'static str,
        backend: &'static str,
        /// The path at the upstream.
        operation: &'static str,
        /// Whether the answer is streamed where the body does not say.
        streams_by_default: bool,
    },
    /// What models there are: the bridge knows.
    Models {
        backend: &'static str,
        operation: &'static str,
    },
    /// Says how far it is.
    Progress,
    /// Reads a secret.
    Secret,
    /// Gives work to another agent.
    Delegate,
    /// Waits for what was delegated.
    Wait,
}

/// Why a call has no target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refusal {
    UnknownService,
    UnknownCall,
    /// The manifest does not declare the service.
    NotDeclared,
    /// Its path exists, with another method.
    Method(&'static str),
    /// Not yet.
    NotBuilt(&'static str),
}

/// Finds the target of a call, if the manifest allows it.
pub(crate) fn target(
    manifest: &AgentManifest,
    method: &Method,
    service: &str,
    call: &str,
) -> Result<Target, Refusal> {
    match service {
        "sqlite-kv" => store(manifest.object_store(), "kv", method, call),
        "sqlite-vec" => store(manifest.vector_store(), "vec", method, call),
        "ollama" => model(manifest, "ollama", method, call),
        "openai" => model(manifest, "openai", method, call),
        "openrouter" => model(manifest, "openrouter", method, call),
        "local" => model(manifest, "local", method, call),
        "anthropic" => model(manifest, "anthropic", method, call),
        "runtime" => match call {
            "progress" => posted(method).map(|()| Target::Progress),
            "delegate" => posted(method).map(|()| Target::Delegate),
            "wait" => posted(method).map(|()| Target::Wait),
            "secret" => posted(method).map(|()| Target::Secret),
            _ => Err(Refusal::UnknownCall),
        },
        _ => Err(Refusal::UnknownService),
    }
}

fn posted(method: &Method) -> Result<(), Refusal> {
    if method == Method::POST {
        Ok(())
    } else {
        Err(Refusal::Method("POST"))
    }
}

fn store(
    store: Option<StoreUri>,
    service: &'static str,
    method: &Method,
    call: &str,
) -> Result<Target, Refusal> {
    let store = store.ok_or(Refusal::NotDeclared)?;
    let (operation, changes_state) = match (service, call) {
        ("kv", "get") => ("get", false),
        ("kv", "list") => ("list", false),
        ("kv", "put") => ("put", true),
        ("vec", "search") => ("search", false),
        ("vec", "store") => ("store", true),
        (_, "delete") => ("delete", true),
        _ => return Err(Refusal::UnknownCall),
    };
    posted(method)?;
    if !store.is_served() {
        return Err(Refusal::NotBuilt(
            "stores other than sqlite://, nats:// and s3://",
        ));
    }
    Ok(Target::Store {
        service,
        store,
        operation,
        changes_state,
    })
}

/// Calls to models: path, service, whether Ollama's own format streams by default.
const MODEL_CALLS: [(&str, &str, bool); 9] = [
    ("api/chat", "infer", true),
    ("api/generate", "infer", true),
    ("api/embed", "embed", false),
    ("api/embeddings", "embed", false),
    ("v1/chat/completions", "infer", false),
    ("v1/completions", "infer", false),
    ("v1/responses", "infer", false),
    ("v1/messages", "infer", false),
    ("v1/embeddings", "embed", false),
];

/// What an upstream of each kind serves; the same lists as in `vlinder-inference`.
fn serves(backend: &str, operation: &str) -> bool {
    match backend {
        "ollama" => {
            operation.starts_with("api/")
                || ["v1/chat/completions", "v1/embeddings"].contains(&operation)
        }
        "anthropic" => operation == "v1/messages",
        _ => operation.starts_with("v1/") && operation != "v1/messages",
    }
}

fn model(
    manifest: &AgentManifest,
    backend: &'static str,
    method: &Method,
    call: &str,
) -> Result<Target, Refusal> {
    if !manifest.may_infer(backend) {
        return Err(Refusal::NotDeclared);
    }
    let listing = match (backend, call) {
        ("ollama", "api/tags") => Some("api/tags"),
        ("ollama", "api/version") => Some("api/version"),
        (_, "v1/models") => Some("v1/models"),
        _ => None,
    };
    if let Some(operation) = listing {
        if method != Method::GET {
            return Err(Refusal::Method("GET"));
        }
        return Ok(Target::Models { backend, operation });
    }
    let found = MODEL_CALLS
        .iter()
        .find(|(operation, _, _)| *operation == call && serves(backend, operation));
    let Some(&(operation, service, streams_by_default)) = found else {
        return Err(Refusal::UnknownCall);
    };
    posted(method)?;
    Ok(Target::Model {
        service,
        backend,
        operation,
        streams_by_default,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(more: &str) -> AgentManifest {
        let text = format!("name='a'\ndescription='d'\nruntime='process'\nexecutable='x'\n{more}");
        AgentManifest::parse(&text).unwrap()
    }

    #[test]
    fn paths_are_taken_apart() {
        let path = |secret, service, call| {
            Some(Path {
                secret,
                service,
                call,
            })
        };
        assert_eq!(
            parse("/s3/sqlite-kv/get", None),
            path("s3", "sqlite-kv", "get")
        );
        assert_eq!(
            parse("/s/ollama/v1/chat/completions", Some("127.0.0.1:9")),
            path("s", "ollama", "v1/chat/completions")
        );
        assert_eq!(
            parse("/s/api/chat", Some("ollama.vlinder.local:3544")),
            path("s", "ollama", "api/chat")
        );
        assert_eq!(parse("/s/get", Some("127.0.0.1")), path("s", "get", ""));
        let named = Some("sqlite-kv.vlinder.local:3544");
        assert_eq!(parse_known("/get", named), path("", "sqlite-kv", "get"));
        assert_eq!(
            parse_known("/ollama/api/chat", Some("127.0.0.1:3544")),
            path("", "ollama", "api/chat")
        );
        assert_eq!(parse_known("/", named), path("", "sqlite-kv", ""));
        assert_eq!(parse_known("", None), path("", "", ""));
        assert_eq!(parse_known(&"/a".repeat(1000), None), None);
        for bad in ["", "/", "/s", "x/y/z", &format!("/s/{}", "a/".repeat(1000))] {
            assert_eq!(parse(bad, None), None, "{bad:?}");
        }
    }

    #[test]
    fn only_what_is_declared_is_reached() {
        let none = manifest("");
        let kv = manifest("object_storage='sqlite://notes'");
        let infer = manifest("[requirements.services.infer]\nprovider='ollama'");
        let post = |manifest: &AgentManifest, service: &str, call: &str| {
            target(manifest, &Method::POST, service, call)
        };
        assert_eq!(post(&none, "sqlite-kv", "get"), Err(Refusal::NotDeclared));
        assert_eq!(post(&none, "ollama", "api/chat"), Err(Refusal::NotDeclared));
        assert!(matches!(
            post(&kv, "sqlite-kv", "put"),
            Ok(Target::Store {
                changes_state: true,
                ..
            })
        ));
        assert_eq!(post(&kv, "sqlite-vec", "search"), Err(Refusal::NotDeclared));
        assert_eq!(post(&kv, "sqlite-kv", "search"), Err(Refusal::UnknownCall));
        assert_eq!(
            target(&kv, &Method::GET, "sqlite-kv", "get"),
            Err(Refusal::Method("POST"))
        );
        assert!(matches!(
            post(&infer, "ollama", "api/chat"),
            Ok(Target::Model {
                streams_by_default: true,
                ..
            })
        ));
        assert_eq!(
            post(&infer, "ollama", "api/pull"),
            Err(Refusal::UnknownCall)
        );
        assert_eq!(
            post(&infer, "ollama", "../api/pull"),
            Err(Refusal::UnknownCall)
        );
        assert_eq!(
            post(&infer, "openai", "v1/chat/completions"),
            Err(Refusal::NotDeclared)
        );
        assert_eq!(post(&infer, "nothing", "x"), Err(Refusal::UnknownService));
        assert_eq!(post(&none, "runtime", "secret"), Ok(Target::Secret));
        assert_eq!(post(&none, "runtime", "progress"), Ok(Target::Progress));
        for kind in ["nats://bucket", "s3://bucket/prefix"] {
            let elsewhere = manifest(&format!("object_storage='{kind}'"));
            let got = post(&elsewhere, "sqlite-kv", "get");
            assert!(matches!(got, Ok(Target::Store { .. })), "{kind}: {got:?}");
        }
        let memory = manifest("object_storage='memory://notes'");
        assert!(matches!(
            post(&memory, "sqlite-kv", "get"),
            Err(Refusal::NotBuilt(_))
        ));
    }
}
