//! A server that answers as AWS does (moto), in a process of its own. It keeps everything in memory.

use crate::free_port;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

/// Names another executable than that of `scripts/tools aws`.
const VARIABLE: &str = "VLINDER_TEST_MOTO";
/// Python and its libraries on a busy machine.
const START_WAIT: Duration = Duration::from_secs(60);
/// No request to it takes a tenth of this.
const REQUEST_WAIT: Duration = Duration::from_secs(20);

/// A server on loopback, killed when dropped.
pub struct AwsServer {
    port: u16,
    open_requests: Option<u32>,
    child: Option<Child>,
}

impl AwsServer {
    /// Starts one that takes any credential.
    pub async fn start() -> Self {
        Self::launch(None).await
    }

    /// Starts one that takes no credential but those it was told of, after `open_requests` requests.
    pub async fn start_strict(open_requests: u32) -> Self {
        Self::launch(Some(open_requests)).await
    }

    async fn launch(open_requests: Option<u32>) -> Self {
        let mut server = Self {
            port: free_port(),
            open_requests,
            child: None,
        };
        server.restart().await;
        server
    }

    /// `kill -9`, and all that it kept is gone.
    pub async fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().await.expect("it can be killed");
        }
    }

    /// Starts it again, empty, on the same port.
    pub async fn restart(&mut self) {
        self.kill().await;
        let mut command = Command::new(binary());
        command
            .args(["-H", "127.0.0.1", "-p", &self.port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        if let Some(open) = self.open_requests {
            command.env("INITIAL_NO_AUTH_ACTION_COUNT", open.to_string());
        }
        self.child = Some(command.spawn().expect("moto_server can be started"));
        let deadline = Instant::now() + START_WAIT;
        while TcpStream::connect(("127.0.0.1", self.port)).await.is_err() {
            assert!(
                Instant::now() < deadline,
                "moto_server did not listen within {START_WAIT:?}"
            );
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Where clients find it.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Makes a bucket.
    pub async fn make_bucket(&self, name: &str) {
        let answer = self.request("PUT", &format!("/{name}"), b"").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    /// Stores an object. The path is made of characters that need no escape.
    pub async fn put(&self, bucket: &str, path: &str, content: &[u8]) {
        let answer = self
            .request("PUT", &format!("/{bucket}/{path}"), content)
            .await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    /// How many objects a bucket has (of up to a thousand).
    pub async fn count(&self, bucket: &str) -> usize {
        let answer = self
            .request("GET", &format!("/{bucket}?list-type=2"), b"")
            .await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        answer.matches("<Key>").count()
    }

    /// A bare request; the answer with its head, as text.
    pub async fn request(&self, method: &str, target: &str, body: &[u8]) -> String {
        let exchange = async {
            let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await?;
            let head = format!(
                "{method} {target} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nContent-Length: {}\r\n\
                 Connection: close\r\n\r\n",
                self.port,
                body.len()
            );
            stream.write_all(head.as_bytes()).await?;
            stream.write_all(body).await?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await?;
            std::io::Result::Ok(String::from_utf8_lossy(&answer).into_owned())
        };
        timeout(REQUEST_WAIT, exchange)
            .await
            .expect("moto_server answers")
            .expect("moto_server can be asked")
    }
}

fn binary() -> PathBuf {
    let tools = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../.tools/aws/bin/moto_server"
    );
    let found = std::env::var_os(VARIABLE).map_or(tools.into(), PathBuf::from);
    assert!(
        found.is_file(),
        "moto_server is not installed: run scripts/tools aws, or let {VARIABLE} name it"
    );
    found
}
