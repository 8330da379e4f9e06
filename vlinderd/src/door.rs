//! Who may pass the HTTP face: programs with the token as a bearer, browsers that signed in with it.
//!
//! A sign-in is a random name in a cookie that scripts cannot read and other sites cannot send; it is
//! good for the host that it was made on, for some hours, until the daemon ends. What a browser posts
//! must come from a page of that host, so that no other site can act through it, nor one that gave its
//! name to our address (DNS rebinding).

use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, COOKIE, HOST, ORIGIN, SET_COOKIE};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use serde::Deserialize;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vlinder_services::auth::{Gate, Refusal};

/// How long a sign-in is good.
const GOOD_FOR: Duration = Duration::from_secs(12 * 60 * 60);
/// Sign-ins at once; beyond that the oldest ends.
const SIGN_INS_MAX: usize = 1000;
const COOKIE_NAME: &str = "vlinder_console";
/// Longest token that is compared.
const TOKEN_MAX: usize = 4096;

/// The check in front of all routes.
pub struct Door {
    gate: Gate,
    sign_ins: Mutex<HashMap<String, Entry>>,
}

struct Entry {
    host: String,
    since: Instant,
}

/// What the sign-in page sends.
#[derive(Deserialize)]
pub struct SignIn {
    token: String,
    #[serde(default)]
    next: String,
}

impl Door {
    pub fn new(gate: Gate) -> Self {
        Self {
            gate,
            sign_ins: Mutex::default(),
        }
    }

    /// Whether a request may pass.
    pub fn check(&self, method: &Method, headers: &HeaderMap, from: IpAddr) -> Result<(), Refusal> {
        let bearer = text(headers, header::AUTHORIZATION);
        if bearer.is_none() && self.is_signed_in(headers) {
            if method.is_safe() || is_from_own_page(headers) {
                return Ok(());
            }
            return Err(Refusal {
                message: "the request does not come from a page of this console",
                delay: Duration::ZERO,
            });
        }
        // A browser that has not signed in yet has not failed to.
        if bearer.is_none() && wants_a_page(headers) {
            return Err(Refusal {
                message: "sign in first",
                delay: Duration::ZERO,
            });
        }
        self.gate.check(bearer, Some(from))
    }

    fn is_signed_in(&self, headers: &HeaderMap) -> bool {
        let (Some(name), Some(host)) = (cookie(headers), text(headers, HOST)) else {
            return false;
        };
        let mut sign_ins = self.lock();
        sign_ins.retain(|_, entry| entry.since.elapsed() < GOOD_FOR);
        sign_ins.get(name).is_some_and(|entry| entry.host == host)
    }

    /// Signs a browser in, or shows the page again.
    pub async fn sign_in(&self, headers: &HeaderMap, from: IpAddr, form: SignIn) -> Response {
        let next = own_path(&form.next);
        let token = form.token.trim();
        let bearer = format!("Bearer {}", token.get(..TOKEN_MAX).unwrap_or(token));
        if let Err(refusal) = self.gate.check(Some(&bearer), Some(from)) {
            tokio::time::sleep(refusal.delay).await;
            return sign_in(next, Some("That is not the token of this cluster."));
        }
        let Some(host) = text(headers, HOST) else {
            return (StatusCode::BAD_REQUEST, "a Host header is needed\n").into_response();
        };
        let name = format!(
            "{:032x}{:032x}",
            rand::random::<u128>(),
            rand::random::<u128>()
        );
        let mut sign_ins = self.lock();
        if sign_ins.len() >= SIGN_INS_MAX {
            let oldest = sign_ins.iter().min_by_key(|(_, entry)| entry.since);
            if let Some(oldest) = oldest.map(|(name, _)| name.clone()) {
                sign_ins.remove(&oldest);
            }
        }
        let entry = Entry {
            host: host.to_owned(),
            since: Instant::now(),
        };
        sign_ins.insert(name.clone(), entry);
        drop(sign_ins);
        let cookie = format!(
            "{COOKIE_NAME}={name}; HttpOnly; SameSite=Strict; Path=/; Max-Age={}",
            GOOD_FOR.as_secs()
        );
        ([(SET_COOKIE, cookie)], Redirect::to(next)).into_response()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.sign_ins.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a browser asks for something to show.
pub fn wants_a_page(headers: &HeaderMap) -> bool {
    text(headers, header::ACCEPT).is_some_and(|accept| accept.contains("text/html"))
}

/// Whether a browser says that one of our own pages sent this.
fn is_from_own_page(headers: &HeaderMap) -> bool {
    let origin = text(headers, ORIGIN).and_then(|origin| origin.split_once("://"));
    match (origin, text(headers, HOST)) {
        (Some((_, origin)), Some(host)) => origin == host,
        _ => false,
    }
}

/// A path on this host, whatever was asked for.
fn own_path(path: &str) -> &str {
    let is_own = path.starts_with('/')
        && !path.starts_with("//")
        && !path.contains(['\\', '\r', '\n'])
        && path.is_ascii();
    if is_own { path } else { "/" }
}

fn cookie(headers: &HeaderMap) -> Option<&str> {
    headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find_map(|(name, value)| (name == COOKIE_NAME).then_some(value))
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// The page that asks for the token.
pub fn sign_in(next: &str, problem: Option<&str>) -> Response {
    let escape = |text: &str| {
        text.replace('&', "&amp;")
            .replace('"', "&quot;")
            .replace('<', "&lt;")
            .replace('>', "&gt;")
    };
    let problem = problem.map_or(String::new(), |text| {
        format!("<p role=\"alert\">{}</p>", escape(text))
    });
    let page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta name=\"color-scheme\" content=\"light dark\"><title>Sign in · Vlinder</title></head>\
         <body><main><h1>Vlinder</h1>{problem}<form method=\"post\" action=\"/login\">\
         <p><label for=\"token\">Token of this cluster</label><br>\
         <input id=\"token\" name=\"token\" type=\"password\" autocomplete=\"current-password\" required autofocus>\
         <input type=\"hidden\" name=\"next\" value=\"{}\"></p><p><button>Sign in</button></p></form>\
         <p>It is in <code>run/token</code> of the data directory (<code>~/.vlinder</code>), or what \
         <code>auth.token</code> says.</p></main></body></html>\n",
        escape(own_path(next))
    );
    let headers = [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (
            CONTENT_SECURITY_POLICY,
            "default-src 'none'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
        ),
        (header::CACHE_CONTROL, "no-store"),
        (header::WWW_AUTHENTICATE, "Bearer"),
    ];
    (StatusCode::UNAUTHORIZED, headers, page).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn headers(pairs: &[(header::HeaderName, &str)]) -> HeaderMap {
        let pairs = pairs
            .iter()
            .map(|(name, value)| (name.clone(), value.parse().unwrap()));
        pairs.collect()
    }

    async fn signed_in(door: &Door) -> String {
        let form = SignIn {
            token: " right ".into(),
            next: "/cluster".into(),
        };
        let answer = door
            .sign_in(&headers(&[(HOST, "node:7777")]), HERE, form)
            .await;
        assert_eq!(answer.status(), StatusCode::SEE_OTHER);
        assert_eq!(answer.headers()[header::LOCATION], "/cluster");
        let set = answer.headers()[SET_COOKIE].to_str().unwrap().to_owned();
        assert!(
            set.contains("HttpOnly") && set.contains("SameSite=Strict") && !set.contains("right")
        );
        set.split(';').next().unwrap().to_owned()
    }

    #[tokio::test]
    async fn a_sign_in_is_good_for_its_host_and_its_own_pages() {
        let door = Door::new(Gate::new("right"));
        let cookie = signed_in(&door).await;
        let at = |host: &str, more: &[(header::HeaderName, &str)]| {
            let mut all = headers(&[(HOST, host), (COOKIE, &format!("a=b; {cookie}"))]);
            all.extend(headers(more));
            all
        };
        let pass = |method: Method, headers: &HeaderMap| door.check(&method, headers, HERE).is_ok();
        assert!(pass(Method::GET, &at("node:7777", &[])));
        assert!(
            !pass(Method::GET, &at("evil.example", &[])),
            "another name of our address"
        );
        assert!(
            !pass(Method::POST, &at("node:7777", &[])),
            "a post that does not say where it is from"
        );
        assert!(!pass(
            Method::POST,
            &at("node:7777", &[(ORIGIN, "http://evil.example")])
        ));
        assert!(!pass(Method::POST, &at("node:7777", &[(ORIGIN, "null")])));
        assert!(pass(
            Method::POST,
            &at("node:7777", &[(ORIGIN, "http://node:7777")])
        ));
        let forged = headers(&[(HOST, "node:7777"), (COOKIE, "vlinder_console=0123")]);
        assert!(!pass(Method::GET, &forged));
        assert!(!pass(Method::GET, &headers(&[(HOST, "node:7777")])));
    }

    #[tokio::test]
    async fn a_wrong_token_signs_nobody_in() {
        let door = Door::new(Gate::new("right"));
        for token in ["", "wrong", &"x".repeat(100_000)] {
            let form = SignIn {
                token: token.into(),
                next: "//evil.example".into(),
            };
            let answer = door.sign_in(&headers(&[(HOST, "node")]), HERE, form).await;
            assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
            assert!(!answer.headers().contains_key(SET_COOKIE));
        }
        assert!(door.lock().is_empty());
    }

    #[test]
    fn one_stays_on_this_host() {
        for path in ["//evil", "http://evil", "/\\evil", "", "/a\r\nb", "/ä"] {
            assert_eq!(own_path(path), "/");
        }
        assert_eq!(own_path("/sessions/a?b=c"), "/sessions/a?b=c");
    }
}
