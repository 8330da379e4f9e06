//! What every page has: the frame, the headers that keep it harmless, and what is shown when it fails.

use crate::text::{clock, iso, short, span};
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use maud::{DOCTYPE, Markup, html};
use tonic::Code;
use vlinder_client::Error;

/// Nothing but our own style and script, nothing inline, nobody's frame.
const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; \
    img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

/// The headers of every page.
pub const HEADERS: [(HeaderName, &str); 4] = [
    (header::CONTENT_SECURITY_POLICY, POLICY),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "same-origin"),
    (header::CACHE_CONTROL, "no-store"),
];

/// Which of the main pages one is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Sessions,
    Agents,
    Cluster,
    Elsewhere,
}

/// A page in its frame.
pub fn page(title: &str, place: Place, content: Markup) -> Response {
    let link = |here: Place, path: &str, name: &str| {
        html! {
            a href=(path) aria-current=[(here == place).then_some("page")] { (name) }
        }
    };
    let markup = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (title) " · Vlinder" }
                link rel="stylesheet" href="/assets/console.css";
                script src="/assets/console.js" defer {}
            }
            body {
                a.skip href="#main" { "Skip to content" }
                header.top {
                    a.brand href="/" { "Vlinder" }
                    nav aria-label="Main" {
                        (link(Place::Sessions, "/", "Sessions"))
                        (link(Place::Agents, "/agents", "Agents"))
                        (link(Place::Cluster, "/cluster", "Cluster"))
                    }
                }
                main id="main" { (content) }
            }
        }
    };
    (HEADERS, markup).into_response()
}

/// Why a page cannot be shown.
#[derive(Debug)]
pub struct Failure {
    status: StatusCode,
    message: String,
}

impl Failure {
    /// The request makes no sense.
    pub fn bad(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            message: message.into(),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::Service { code, .. } => match code {
                Code::NotFound => StatusCode::NOT_FOUND,
                Code::InvalidArgument | Code::OutOfRange => StatusCode::BAD_REQUEST,
                Code::Aborted | Code::AlreadyExists | Code::FailedPrecondition => {
                    StatusCode::CONFLICT
                }
                Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
                Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
                _ => StatusCode::INTERNAL_SERVER_ERROR,
            },
            Error::Unreachable { .. } | Error::Broken { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Error::NoAnswer { .. } | Error::TurnLost { .. } => StatusCode::GATEWAY_TIMEOUT,
            Error::Usage(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self {
            status,
            message: error.to_string(),
        }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let title = match self.status {
            StatusCode::NOT_FOUND => "Not found",
            StatusCode::CONFLICT => "Not possible now",
            StatusCode::BAD_REQUEST => "Not understood",
            _ => "Not available",
        };
        let content = html! {
            h1 { (title) }
            p.problem role="alert" { (self.message) }
            p { a href="/" { "All sessions" } }
        };
        (self.status, page(title, Place::Elsewhere, content)).into_response()
    }
}

/// The answer to any other path.
pub async fn nothing_here() -> Failure {
    Failure {
        status: StatusCode::NOT_FOUND,
        message: "There is no such page.".to_owned(),
    }
}

/// How something is, as a word with a colour.
pub fn state(word: &str) -> Markup {
    let tone = match word {
        "done" | "ok" | "ready" | "idle" => "good",
        "running" | "waiting" | "starting" | "draining" => "busy",
        "cancelled" | "abandoned" | "sealed" | "stopped" => "faint",
        _ => "bad",
    };
    html! { span class={ "state " (tone) } { (word) } }
}

/// A moment.
pub fn when(ms: u64) -> Markup {
    html! {
        @if ms == 0 { "–" } @else { time datetime=(iso(ms)) title={ (clock(ms)) " UTC" } { (clock(ms)) } }
    }
}

/// A span of time.
pub fn lasted(ms: u64) -> Markup {
    html! { span.number { (span(ms)) } }
}

/// A hash, shortened; the whole is in its title.
pub fn hash(hash: &str) -> Markup {
    html! { code.hash title=(hash) { (short(hash)) } }
}

/// A path segment from any text.
pub fn segment(text: &str) -> String {
    url::form_urlencoded::byte_serialize(text.as_bytes())
        .collect::<String>()
        .replace('+', "%20")
}
