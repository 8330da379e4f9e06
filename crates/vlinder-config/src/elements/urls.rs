//! URLs: services of ours, NATS servers, upstreams, container engines.

use url::Url;

use super::{LIST_LEN_MAX, Refusal};
use crate::addresses::Service;

const NATS_SCHEMES: [&str; 4] = ["nats", "tls", "ws", "wss"];
const NATS_PORT: u16 = 4222;

/// The parts of a comma list, checked one by one.
fn list(text: &str, one: impl Fn(&str) -> Result<Url, Refusal>) -> Result<Vec<String>, Refusal> {
    let parts: Vec<&str> = text.split(',').map(str::trim).collect();
    if parts.len() > LIST_LEN_MAX {
        return Err(Refusal::new(format!("more than {LIST_LEN_MAX} addresses")));
    }
    let urls = parts
        .into_iter()
        .map(|part| one(part).map(|url| plain(&url)));
    urls.collect()
}

/// Without the trailing slash that `Url` adds to a bare address.
fn plain(url: &Url) -> String {
    url.as_str().trim_end_matches('/').to_owned()
}

/// Whether `text` names a port itself; `Url` hides a port that is usual for its scheme.
fn names_port(text: &str) -> bool {
    let rest = text.split_once("://").map_or(text, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = authority.rsplit(['@', ']']).next().unwrap_or_default();
    host.contains(':')
}

fn bare(url: &Url) -> bool {
    matches!(url.path(), "" | "/") && url.query().is_none() && url.fragment().is_none()
}

fn has_host(url: &Url) -> bool {
    let ok = |c: char| c.is_ascii_alphanumeric() || "-._[]:".contains(c);
    url.host_str()
        .is_some_and(|host| !host.is_empty() && host.chars().all(ok))
}

fn has_credential(url: &Url) -> bool {
    !url.username().is_empty() || url.password().is_some()
}

/// An address of one of our services; a missing port is the service's usual one.
pub(crate) fn service_url(text: &str, default_port: u16) -> Result<Url, Refusal> {
    let refusal = || {
        let near = match text.contains("://") || text.is_empty() {
            true => None,
            false => service_url(&format!("http://{text}"), default_port).ok(),
        };
        let expected = format!(
            "expected http://HOST:{default_port} (or https), without path or credential, several \
             separated by commas"
        );
        Refusal {
            expected,
            near: near.map(|url| plain(&url)),
        }
    };
    let mut url = Url::parse(text).map_err(|_| refusal())?;
    let http = matches!(url.scheme(), "http" | "https");
    if !http || !has_host(&url) || has_credential(&url) || !bare(&url) {
        return Err(refusal());
    }
    if !names_port(text) {
        url.set_port(Some(default_port)).map_err(|()| refusal())?;
    }
    Ok(url)
}

pub(super) fn services(text: &str, service: Service) -> Result<Vec<String>, Refusal> {
    list(text, |part| service_url(part, service.default_port()))
}

pub(super) fn nats(text: &str) -> Result<Vec<String>, Refusal> {
    list(text, |part| {
        let refusal = || {
            let near = match part.contains("://") || part.is_empty() {
                true => None,
                false => nats(&format!("nats://{part}"))
                    .ok()
                    .map(|urls| urls.join(",")),
            };
            let expected =
                "expected nats://HOST:4222 (or tls, ws, wss), several separated by commas".into();
            Refusal { expected, near }
        };
        let mut url = Url::parse(part).map_err(|_| refusal())?;
        if !NATS_SCHEMES.contains(&url.scheme()) || !has_host(&url) || !bare(&url) {
            return Err(refusal());
        }
        if !names_port(part) {
            url.set_port(Some(NATS_PORT)).map_err(|()| refusal())?;
        }
        Ok(url)
    })
}

/// The base URL of an upstream; it may have a path, but no credential, query or fragment.
pub(super) fn endpoint(text: &str) -> Result<String, Refusal> {
    let expected = "expected a URL such as \"http://host:8000/v1\", without credential or query";
    let refusal = || Refusal::new(expected);
    let url = Url::parse(text).map_err(|_| refusal())?;
    let http = matches!(url.scheme(), "http" | "https");
    let extra = has_credential(&url) || url.query().is_some() || url.fragment().is_some();
    match http && has_host(&url) && !extra {
        true => Ok(plain(&url)),
        false => Err(refusal()),
    }
}

pub(super) fn is_docker_host(text: &str) -> bool {
    if text == "auto" || text.starts_with('/') {
        return true;
    }
    match Url::parse(text) {
        Ok(url) if url.scheme() == "unix" => url.path().len() > 1,
        Ok(url) => matches!(url.scheme(), "tcp" | "http" | "https") && has_host(&url),
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(text: &str) -> Result<String, Option<String>> {
        services(text, Service::Registry)
            .map(|urls| urls.join(","))
            .map_err(|e| e.near)
    }

    #[test]
    fn service_addresses() {
        for (text, expected) in [
            ("http://hub:9090", Ok("http://hub:9090")),
            ("http://hub", Ok("http://hub:9090")),
            ("http://hub/", Ok("http://hub:9090")),
            ("http://hub:80", Ok("http://hub")),
            ("https://hub:443", Ok("https://hub")),
            ("https://[::1]", Ok("https://[::1]:9090")),
            ("http://a:1, http://b:2", Ok("http://a:1,http://b:2")),
            ("hub:9090", Err(Some("http://hub:9090"))),
            ("hub", Err(Some("http://hub:9090"))),
            ("http://a:1,", Err(None)),
            ("ftp://hub", Err(None)),
            ("http://", Err(None)),
            ("http://hub/path", Err(None)),
            ("http://u:p@hub:1", Err(None)),
            ("http://hub:99999", Err(None)),
            ("http://a b", Err(None)),
        ] {
            let expected = expected
                .map(str::to_owned)
                .map_err(|near: Option<&str>| near.map(str::to_owned));
            assert_eq!(service(text), expected, "{text:?}");
        }
    }

    #[test]
    fn nats_addresses() {
        let good = |text| nats(text).map(|urls| urls.join(","));
        assert_eq!(good("nats://hub"), Ok("nats://hub:4222".into()));
        assert_eq!(
            good("nats://u:p@a:1,tls://b:2"),
            Ok("nats://u:p@a:1,tls://b:2".into())
        );
        assert_eq!(
            nats("hub:4222").unwrap_err().near.as_deref(),
            Some("nats://hub:4222")
        );
        for bad in [
            "",
            "nats://",
            "http://hub:4222",
            "nats://a,,nats://b",
            "nats://a b",
            "nats:x",
        ] {
            assert!(nats(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn upstreams_and_engines() {
        assert_eq!(endpoint("http://h:8000/v1/"), Ok("http://h:8000/v1".into()));
        for bad in [
            "h:8000",
            "http://k:e@h",
            "http://h?x=1",
            "file:///etc/passwd",
            "http://",
        ] {
            assert!(endpoint(bad).is_err(), "{bad:?}");
        }
        for good in [
            "auto",
            "/run/docker.sock",
            "unix:///run/docker.sock",
            "tcp://h:2375",
        ] {
            assert!(is_docker_host(good), "{good:?}");
        }
        for bad in ["docker.sock", "unix://", "ftp://h", ""] {
            assert!(!is_docker_host(bad), "{bad:?}");
        }
    }
}
