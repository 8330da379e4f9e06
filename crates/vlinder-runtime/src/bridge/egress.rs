//! The way out: an HTTP proxy to the hosts that the manifest names under `requirements.egress`.
//!
//! It takes `CONNECT` and requests with an absolute address, on the same port as the rest of the bridge.
//! Each attempt is a call of the turn and on record before anything leaves, refused ones too. What goes through a
//! tunnel is not read. No way out outlives the invocation that it was opened in.

use super::call::{self, Answerer, Ask};
use super::callers::{Caller, NoInvocation};
use super::reply::{Broken, Reply, ReplyBody, error, reply};
use crate::agent::Shared;
use crate::turn::INVOCATION_HEADER;
use crate::turn::invocation::Invocation;
use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HOST, HeaderName, HeaderValue};
use hyper::{Method, Request, Uri};
use hyper_util::rt::TokioIo;
use serde_json::json;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use vlinder_core::Selector;
use vlinder_core::egress::{Allowed, EgressRule};
use vlinder_worker::Answer;

/// How long a host outside may take to be found and to accept.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// Headers that are between the agent and the proxy alone.
const HOP_BY_HOP: [&str; 8] = [
    "connection",
    "proxy-connection",
    "proxy-authorization",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];
/// Where agents find the bridge.
const BRIDGE_PORT: u16 = 3544;
/// Longest path that is put on record, in characters.
const PATH_CHARS_MAX: usize = 1024;

/// Where a request wants to go.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Outside {
    host: String,
    port: u16,
}

/// Whether a request is for somewhere outside, rather than for the bridge.
pub(super) fn outside(method: &Method, uri: &Uri) -> Option<Outside> {
    let authority = uri.authority()?;
    let host = authority.host();
    if method != Method::CONNECT && is_ours(host, authority.port_u16()) {
        return None;
    }
    let default = if uri.scheme_str() == Some("https") {
        443
    } else {
        80
    };
    Some(Outside {
        host: host.trim_matches(['[', ']']).to_owned(),
        port: authority.port_u16().unwrap_or(default),
    })
}

/// Names that mean the bridge, for clients that ignore `NO_PROXY`.
fn is_ours(host: &str, port: Option<u16>) -> bool {
    let is_own = host == "127.0.0.1" || host == "localhost";
    host.ends_with(".vlinder.local") || (is_own && port == Some(BRIDGE_PORT))
}

/// Lets a request out, or refuses it.
pub(super) async fn answer(
    request: Request<Incoming>,
    shared: &Arc<Shared>,
    caller: &Caller,
    to: Outside,
) -> Reply {
    let named = request.headers().get(INVOCATION_HEADER);
    let named = named.and_then(|value| value.to_str().ok());
    let invocation = match caller.find(named) {
        Ok(invocation) => invocation,
        Err(NoInvocation::NotOpen) => {
            tracing::info!(agent = %caller.deployment.name(), host = to.host, port = to.port, "an agent tried to get out while no invocation was open");
            return error(
                409,
                "no_invocation",
                "the way out is open only while /invoke runs",
            );
        }
        Err(NoInvocation::Unnamed) => {
            let message = "an agent with a concurrency above 1 must send the X-Vlinder-Invocation that it was given, to the proxy too";
            return error(400, "invocation_missing", message);
        }
    };
    let egress = caller.deployment.manifest().requirements.egress.iter();
    let mut rules = egress.filter_map(|rule| rule.parse::<EgressRule>().ok());
    let allowed = rules.find_map(|rule| rule.allows(&to.host, to.port));
    let decision = decision(&to, allowed.is_some());
    let ask = Ask {
        service: "egress",
        backend: "proxy".to_owned(),
        operation: if request.method() == Method::CONNECT {
            "connect"
        } else {
            "http"
        },
        selector: Selector::none(),
        body: said(&request, &to),
        label: None,
        answerer: Answerer::Bridge(decision.clone()),
    };
    if let Err(cause) = call::perform(shared, &invocation, Arc::new(ask)).await {
        return super::of_error(&cause);
    }
    let Some(allowed) = allowed else {
        return reply(decision.http, &decision.content_type, decision.body);
    };
    let reached = match tokio::time::timeout(CONNECT_MAX, reach(&to, allowed)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(why)) => {
            return error(
                502,
                "unreachable",
                &format!("{} cannot be reached: {why}", to.host),
            );
        }
        Err(_) => return error(504, "unreachable", &format!("{} does not answer", to.host)),
    };
    if request.method() == Method::CONNECT {
        tunnel(request, reached, invocation)
    } else {
        forward(request, reached, invocation).await
    }
}

/// What the record says of it.
fn decision(to: &Outside, allowed: bool) -> Answer {
    if allowed {
        return Answer::json(&json!({ "allowed": true }));
    }
    let message = format!(
        "{}:{} is not among the hosts that the manifest names under requirements.egress",
        to.host, to.port
    );
    Answer::error(403, "egress_refused", &message)
}

fn said(request: &Request<Incoming>, to: &Outside) -> Bytes {
    let mut said = json!({ "host": to.host, "port": to.port });
    if request.method() != Method::CONNECT {
        let path: String = request.uri().path().chars().take(PATH_CHARS_MAX).collect();
        said["method"] = json!(request.method().as_str());
        said["path"] = json!(path);
    }
    said.to_string().into()
}

/// Connects to the first address that may be meant: a name must not lead back to this machine or
/// into its private networks, whatever the name server says.
async fn reach(to: &Outside, allowed: Allowed) -> Result<TcpStream, String> {
    let found = tokio::net::lookup_host((to.host.as_str(), to.port)).await;
    let found: Vec<SocketAddr> = found.map_err(|error| error.to_string())?.collect();
    let fit = |address: &&SocketAddr| allowed == Allowed::ByAddress || is_public(address.ip());
    let mut why =
        "its name leads to no public address; one in a private network must be named by number"
            .to_owned();
    for address in found.iter().filter(fit) {
        match TcpStream::connect(address).await {
            Ok(stream) => {
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Err(error) => why = error.to_string(),
        }
    }
    Err(why)
}

/// Whether an address is out in the world.
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, ..] = address.octets();
    let is_shared = a == 100 && (64..128).contains(&b);
    !(a == 0
        || a >= 224
        || is_shared
        || address.is_loopback()
        || address.is_private()
        || address.is_link_local())
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let first = address.segments()[0];
    // Only what is handed out at all, and neither of the ways to write an IPv4 address.
    let is_6to4_or_teredo = first == 0x2002 || (first == 0x2001 && address.segments()[1] == 0);
    (0x2000..0x4000).contains(&first) && !is_6to4_or_teredo
}

fn tunnel(
    request: Request<Incoming>,
    mut outside: TcpStream,
    invocation: Arc<Invocation>,
) -> Reply {
    // Ends with either side or with the invocation.
    tokio::spawn(async move {
        let Ok(upgraded) = hyper::upgrade::on(request).await else {
            return;
        };
        let mut inside = TokioIo::new(upgraded);
        tokio::select! {
            () = invocation.closed() => {}
            _ = tokio::io::copy_bidirectional(&mut inside, &mut outside) => {}
        }
    });
    let mut established = reply(200, "text/plain", Bytes::new());
    established.headers_mut().clear();
    established
}

async fn forward(
    request: Request<Incoming>,
    outside: TcpStream,
    invocation: Arc<Invocation>,
) -> Reply {
    let failed = |why: &hyper::Error| {
        error(
            502,
            "unreachable",
            &format!("the host outside does not speak HTTP: {why}"),
        )
    };
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(outside)).await;
    let (mut sender, connection) = match handshake {
        Ok(both) => both,
        Err(why) => return failed(&why),
    };
    let until = invocation.clone();
    // Ends with the answer or with the invocation.
    tokio::spawn(async move {
        tokio::select! {
            () = until.closed() => {}
            _ = connection => {}
        }
    });
    let answered = tokio::select! {
        answered = sender.send_request(inner(request)) => answered,
        () = invocation.closed() => return error(409, "no_invocation", "the invocation is over"),
    };
    match answered {
        Ok(answer) => {
            let mut answer = answer.map(ReplyBody::Outside);
            drop_hop_by_hop(answer.headers_mut());
            answer
        }
        Err(why) => failed(&why),
    }
}

/// The request as the host outside is to see it.
fn inner(mut request: Request<Incoming>) -> Request<Incoming> {
    let uri = request.uri();
    let host = uri.authority().map(ToString::to_string).unwrap_or_default();
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let path = path.parse::<Uri>().unwrap_or_default();
    let headers = request.headers_mut();
    drop_hop_by_hop(headers);
    headers.remove(INVOCATION_HEADER);
    if let Ok(host) = HeaderValue::from_str(&host) {
        headers.insert(HOST, host);
    }
    *request.uri_mut() = path;
    request
}

fn drop_hop_by_hop(headers: &mut hyper::HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
}

/// An answer from outside that broke off.
pub(super) fn broken(_: hyper::Error) -> Broken {
    Broken("the host outside broke it off")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_lead_home() {
        for home in [
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "10.1.2.3",
            "172.17.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "fe80::1",
            "fd00::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
        ] {
            assert!(!is_public(home.parse().unwrap()), "{home}");
        }
        for world in [
            "1.1.1.1",
            "93.184.216.34",
            "2606:4700::1111",
            "2001:4860::8888",
        ] {
            assert!(is_public(world.parse().unwrap()), "{world}");
        }
    }

    #[test]
    fn what_is_for_the_bridge_stays() {
        let outside = |method: Method, uri: &str| outside(&method, &uri.parse().unwrap());
        assert_eq!(outside(Method::GET, "/get"), None);
        assert_eq!(
            outside(Method::POST, "http://sqlite-kv.vlinder.local:3544/get"),
            None
        );
        assert_eq!(
            outside(Method::POST, "http://127.0.0.1:3544/sqlite-kv/get"),
            None
        );
        let here = outside(Method::GET, "http://127.0.0.1:4222/");
        assert!(here.is_some(), "another port of ours is not the bridge");
        let to = |host: &str, port| {
            Some(Outside {
                host: host.to_owned(),
                port,
            })
        };
        assert_eq!(
            outside(Method::GET, "http://example.com/x"),
            to("example.com", 80)
        );
        assert_eq!(
            outside(Method::GET, "https://example.com/x"),
            to("example.com", 443)
        );
        assert_eq!(
            outside(Method::CONNECT, "example.com:443"),
            to("example.com", 443)
        );
        assert_eq!(
            outside(Method::CONNECT, "127.0.0.1:4222"),
            to("127.0.0.1", 4222)
        );
        assert_eq!(outside(Method::CONNECT, "[::1]:80"), to("::1", 80));
    }
}
