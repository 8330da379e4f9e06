//! Stands between the worker and the model: keeps the bytes of both directions, and can list other
//! models than there are or not be there at all.

use crate::model::client;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::response::Response;
use futures::StreamExt;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinHandle;

/// One call as it passed.
#[derive(Clone, Default)]
pub struct Passed {
    pub path: String,
    pub key: Option<String>,
    pub authorization: Option<String>,
    pub request: Vec<u8>,
    pub answer: Vec<u8>,
}

#[derive(Default)]
struct Shared {
    target: String,
    listed: Mutex<Option<Vec<String>>>,
    passed: Mutex<Vec<Passed>>,
}

pub struct Front {
    address: SocketAddr,
    shared: Arc<Shared>,
    serving: Option<JoinHandle<()>>,
}

impl Front {
    pub async fn start(target: &str) -> Self {
        let shared = Arc::new(Shared {
            target: target.to_owned(),
            ..Shared::default()
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut front = Self {
            address,
            shared,
            serving: None,
        };
        front.serve(listener);
        front
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Lists these Ollama models from now on.
    pub fn list(&self, models: &[&str]) {
        let models = models.iter().map(ToString::to_string).collect();
        *self.shared.listed.lock().unwrap() = Some(models);
    }

    /// Nobody listens any more, and open connections are cut.
    pub async fn stop(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.abort();
            let _ = serving.await;
        }
    }

    /// Listens again on the same port.
    pub fn start_again(&mut self) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(self.address).unwrap();
        self.serve(socket.listen(64).unwrap());
    }

    /// The last call to a path of the model.
    pub fn last(&self) -> Passed {
        let passed = self.shared.passed.lock().unwrap();
        passed.last().expect("a call has passed").clone()
    }

    fn serve(&mut self, listener: TcpListener) {
        let app = Router::new()
            .fallback(pass)
            .layer(axum::extract::DefaultBodyLimit::disable())
            .with_state(self.shared.clone());
        self.serving = Some(tokio::spawn(async move {
            let _ = axum::serve(listener, app).await;
        }));
    }
}

async fn pass(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let path = head.uri.path().to_owned();
    let listed = shared.listed.lock().unwrap().clone();
    if let (Some(names), "/api/tags") = (listed, path.as_str()) {
        let models: Vec<Value> = names.iter().map(|name| json!({ "name": name })).collect();
        return Response::new(Body::from(json!({ "models": models }).to_string()));
    }
    let header = |name: &str| {
        head.headers
            .get(name)
            .map(|value| value.to_str().unwrap().to_owned())
    };
    let authorization = header("authorization");
    let key = header("idempotency-key");
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    let is_call = head.method == "POST";
    if is_call {
        shared.passed.lock().unwrap().push(Passed {
            path: path.clone(),
            key,
            authorization: authorization.clone(),
            request: body.to_vec(),
            answer: vec![],
        });
    }
    let mut sent = client().request(head.method, format!("{}{path}", shared.target));
    if let Some(authorization) = authorization {
        sent = sent.header("authorization", authorization);
    }
    let Ok(answer) = sent.body(body).send().await else {
        return Response::builder().status(502).body(Body::empty()).unwrap();
    };
    let mut response = Response::builder().status(answer.status());
    for name in ["content-type", "retry-after"] {
        if let Some(value) = answer.headers().get(name) {
            response = response.header(name, value);
        }
    }
    let kept = answer.bytes_stream().inspect(move |chunk| {
        if let (true, Ok(chunk)) = (is_call, chunk) {
            keep(&shared, chunk);
        }
    });
    response.body(Body::from_stream(kept)).unwrap()
}

fn keep(shared: &Shared, chunk: &Bytes) {
    let mut passed = shared.passed.lock().unwrap();
    passed.last_mut().unwrap().answer.extend_from_slice(chunk);
}
