//! The console as a browser meets it, without the browser: sign-in, pages, actions, hostile content
//! (features K1, K2, K3, K5).

use crate::support::agents::{deploy_puppet, turn};
use crate::support::{Node, NodeSpec, faces};
use reqwest::{Response, StatusCode};
use serde_json::Value;
use std::time::Duration;
use vlinder_testkit::{CURRENT, NatsServer};

/// Markup, escape sequences and a change of the direction of writing, all said by an agent.
const HOSTILE: &str =
    "echo <script>alert(1)</script><img src=x onerror=alert(2)> \u{1b}[31mred \u{202e}txt";

/// A browser that signed in.
struct Browser {
    client: reqwest::Client,
    base: String,
    cookie: String,
}

impl Browser {
    async fn sign_in(node: &Node) -> Self {
        let client = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(Duration::from_secs(30))
            .build()
            .unwrap();
        let base = node.address("http").trim_end_matches('/').to_owned();
        let form = format!("token={}&next=%2Fcluster", node.token());
        let answer = client
            .post(format!("{base}/login"))
            .header("content-type", "application/x-www-form-urlencoded")
            .body(form);
        let answer = answer.send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::SEE_OTHER);
        assert_eq!(answer.headers()["location"], "/cluster");
        let cookie = answer.headers()["set-cookie"].to_str().unwrap();
        assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"));
        let cookie = cookie.split(';').next().unwrap().to_owned();
        Self {
            client,
            base,
            cookie,
        }
    }

    async fn get(&self, path: &str) -> Response {
        let request = self.client.get(format!("{}{path}", self.base));
        let request = request.header("accept", "text/html,*/*");
        request.header("cookie", &self.cookie).send().await.unwrap()
    }

    /// A page that must be there, with the headers that every page has.
    async fn page(&self, path: &str) -> String {
        let answer = self.get(path).await;
        assert_eq!(answer.status(), StatusCode::OK, "{path}");
        let policy = answer.headers()["content-security-policy"]
            .to_str()
            .unwrap();
        assert!(
            policy.contains("default-src 'none'") && !policy.contains("unsafe"),
            "{policy}"
        );
        assert_eq!(answer.headers()["x-content-type-options"], "nosniff");
        let page = answer.text().await.unwrap();
        assert!(
            !page.contains("<script>"),
            "{path} has a script that is not ours"
        );
        for outside in ["=\"http", "=\"//", " style=", " onclick="] {
            assert!(!page.contains(outside), "{path} has {outside}");
        }
        page
    }

    async fn post(&self, path: &str, form: &str, origin: &str) -> Response {
        let request = self.client.post(format!("{}{path}", self.base));
        let request = request
            .header("accept", "text/html,*/*")
            .header("content-type", "application/x-www-form-urlencoded")
            .header("cookie", &self.cookie)
            .header("origin", origin);
        request.body(form.to_owned()).send().await.unwrap()
    }

    /// Does what a form does; gives where it leads.
    async fn act(&self, path: &str, form: &str) -> String {
        let answer = self.post(path, form, &self.base).await;
        let status = answer.status();
        let led = answer
            .headers()
            .get("location")
            .map(|to| to.to_str().unwrap().to_owned());
        led.unwrap_or_else(|| panic!("{path}: {status}"))
    }
}

async fn branches(node: &Node, session: &str) -> Vec<(String, bool)> {
    let shown = node
        .cli(&["session", "branches", session, "-o", "json"])
        .await;
    let shown = shown.code(0).json();
    let rows = shown.as_array().unwrap().iter();
    rows.map(|row| {
        (
            row["name"].as_str().unwrap().to_owned(),
            row["sealed"] == Value::Bool(true),
        )
    })
    .collect()
}

async fn shows_and_acts(node: Node) {
    deploy_puppet(&node, "").await;
    let first = turn(&node, "puppet", "tour", HOSTILE).await;
    let second = turn(&node, "puppet", "tour", "count hits").await;
    let browser = Browser::sign_in(&node).await;

    let list = browser.page("/").await;
    assert!(list.contains("/sessions/tour") && list.contains("puppet"));
    assert!(browser.page("/?q=TOUR").await.contains("/sessions/tour"));
    let none = browser.page("/?q=%3Cscript%3E").await;
    assert!(!none.contains("/sessions/tour") && none.contains("&lt;script&gt;"));

    let session = browser.page("/sessions/tour").await;
    assert!(session.contains("<svg") && session.contains("&lt;script&gt;alert(1)"));
    for hidden in ['\u{1b}', '\u{202e}'] {
        assert!(!session.contains(hidden), "{hidden:?} came through");
    }
    let submission = second["submission"].as_str().unwrap();
    let shown = browser.page(&format!("/turns/{submission}")).await;
    assert!(
        shown.contains("kv.put") && shown.contains("kv.get"),
        "{shown}"
    );

    let first = first["submission"].as_str().unwrap();
    let first = node
        .cli(&["turn", "get", first, "-o", "json"])
        .await
        .code(0)
        .json();
    let hash = first["turn"]["hash"]
        .as_str()
        .or(first["hash"].as_str())
        .unwrap();
    let body = browser.get(&format!("/bodies/{hash}")).await;
    assert_eq!(body.headers()["content-type"], "application/octet-stream");
    assert_eq!(
        body.text().await.unwrap(),
        HOSTILE.trim_start_matches("echo ")
    );

    let fork = format!("from={hash}&name=what-if");
    let other_site = browser
        .post("/sessions/tour/fork", &fork, "http://evil.example")
        .await;
    assert_eq!(other_site.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(branches(&node, "tour").await.len(), 1, "another site acted");
    assert_eq!(
        browser.act("/sessions/tour/fork", &fork).await,
        "/sessions/tour"
    );
    let again = browser
        .post("/sessions/tour/fork", "from=00&name=x", &browser.base)
        .await;
    assert!(again.status().is_client_error(), "{}", again.status());
    let run = "agent=puppet&branch=what-if&input=count+hits";
    let turn_page = browser.act("/sessions/tour/run", run).await;
    assert!(turn_page.starts_with("/turns/"), "{turn_page}");
    let compared = browser
        .page("/sessions/tour/compare?a=main&b=what-if")
        .await;
    assert!(
        compared.contains("first turn in common") && compared.contains("count hits"),
        "{compared}"
    );
    browser
        .act("/sessions/tour/promote", "branch=what-if")
        .await;
    let after = branches(&node, "tour").await;
    assert!(
        after
            .iter()
            .any(|(name, sealed)| name != "what-if" && *sealed),
        "{after:?}"
    );

    let cluster = browser.page("/cluster").await;
    for role in ["session_viewer/0", "harness/0", "storage.object.sqlite/0"] {
        assert!(cluster.contains(role), "{role} is not shown");
    }
    assert!(browser.page("/agents").await.contains("puppet"));
    for path in [
        "/nowhere",
        "/sessions/unknown",
        "/turns/unknown",
        "/sessions/..%2f..%2fetc",
        "/turns/%00",
    ] {
        let answer = browser.get(path).await;
        assert!(
            answer.status().is_client_error(),
            "{path}: {}",
            answer.status()
        );
    }
    node.stop_cleanly().await;
}

#[tokio::test]
async fn the_console_shows_the_record_and_acts_on_it() {
    shows_and_acts(Node::embedded().await).await;
}

#[tokio::test]
async fn the_console_of_a_worker_process_comes_back_when_it_is_killed() {
    let nats = NatsServer::start(CURRENT).await;
    let node = NodeSpec::on(&nats).start().await;
    let viewer = |workers: Vec<crate::support::Worker>| {
        workers
            .into_iter()
            .find(|worker| worker.role == "session_viewer")
            .unwrap()
    };
    let before = viewer(node.workers().await);
    let browser = Browser::sign_in(&node).await;
    assert!(browser.page("/cluster").await.contains("session_viewer/0"));
    let pid = rustix::process::Pid::from_raw(before.pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    node.wait_replaced(&before, Duration::from_secs(10)).await;
    // The sign-in outlives the worker: it is the daemon's.
    assert!(browser.page("/cluster").await.contains("session_viewer/0"));
    node.stop_cleanly().await;
}

#[tokio::test]
async fn nobody_sees_a_page_without_signing_in() {
    let node = Node::embedded().await;
    let client = faces::client(false);
    let base = node.address("http");
    let base = base.trim_end_matches('/');
    for path in ["/", "/cluster", "/sessions/x", "/assets/console.js"] {
        let asked = client
            .get(format!("{base}{path}"))
            .header("accept", "text/html");
        let answer = asked.send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "{path}");
        let page = answer.text().await.unwrap();
        assert!(page.contains("Sign in") && !page.contains(&node.token()));
    }
    let wrong = client.post(format!("{base}/login"));
    let wrong = wrong
        .header("content-type", "application/x-www-form-urlencoded")
        .body("token=wrong");
    let answer = wrong.send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
    assert!(answer.headers().get("set-cookie").is_none());
    node.stop_cleanly().await;
}
