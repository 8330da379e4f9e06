//! Services that do what a test scripts, on real sockets.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};
use vlinder_client::{Client, Limits};
use vlinder_config::Service;
use vlinder_proto::secret::secret_server::{Secret, SecretServer};
use vlinder_proto::secret::{
    DeleteRequest, DeleteResponse, GetRequest, GetResponse, ListRequest, ListResponse, PutRequest,
    PutResponse,
};

pub const TOKEN: &str = "0123456789abcdef";

/// Short enough for tests, long enough for a loaded machine.
pub fn limits() -> Limits {
    Limits {
        call: Duration::from_secs(5),
        retry: Duration::from_secs(8),
        long: Duration::from_secs(8),
        reattach: Duration::from_secs(5),
    }
}

/// A client of one service at these addresses.
pub fn client(service: Service, urls: &[&str]) -> Client {
    let urls = urls.iter().map(|url| (*url).to_owned()).collect();
    let client = Client::of([(service, urls)], Some(TOKEN), "default").unwrap();
    client.with_limits(limits())
}

/// An address where nothing listens.
pub async fn nowhere() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

/// An address that takes connections and never says a word.
pub async fn silent() -> (String, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    (
        format!("http://{}", listener.local_addr().unwrap()),
        listener,
    )
}

/// What the secret service answers next.
#[derive(Clone)]
pub enum Answer {
    Ok,
    Refuse(tonic::Code),
    Hang,
}

/// A secret service that follows a script, then answers well.
#[derive(Clone, Default)]
pub struct Scripted {
    script: Arc<Mutex<VecDeque<Answer>>>,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Scripted {
    pub fn new(script: impl IntoIterator<Item = Answer>) -> Self {
        Self {
            script: Arc::new(Mutex::new(script.into_iter().collect())),
            seen: Arc::default(),
        }
    }

    /// The calls so far, as `method token`.
    pub fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }

    /// Serves on a free port until the handle is aborted.
    pub async fn serve(&self) -> (String, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let service = SecretServer::new(self.clone());
        let task = tokio::spawn(async move {
            let incoming = TcpListenerStream::new(listener);
            let server = Server::builder().add_service(service);
            server.serve_with_incoming(incoming).await.unwrap();
        });
        (url, task)
    }

    async fn next<T>(&self, method: &str, request: &Request<T>) -> Result<(), Status> {
        let token = request.metadata().get("authorization");
        let token = token.map_or("none", |value| value.to_str().unwrap());
        self.seen.lock().unwrap().push(format!("{method} {token}"));
        let answer = self.script.lock().unwrap().pop_front();
        match answer.unwrap_or(Answer::Ok) {
            Answer::Ok => Ok(()),
            Answer::Refuse(code) => Err(Status::new(code, "as scripted")),
            Answer::Hang => std::future::pending().await,
        }
    }
}

#[tonic::async_trait]
impl Secret for Scripted {
    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        self.next("put", &request).await?;
        Ok(Response::new(PutResponse { version: 1 }))
    }
    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        self.next("get", &request).await?;
        let value = request.into_inner().namespace.into_bytes();
        Ok(Response::new(GetResponse { value, version: 1 }))
    }
    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        self.next("list", &request).await?;
        Ok(Response::new(ListResponse::default()))
    }
    async fn delete(
        &self,
        request: Request<DeleteRequest>,
    ) -> Result<Response<DeleteResponse>, Status> {
        self.next("delete", &request).await?;
        Ok(Response::new(DeleteResponse {}))
    }
}
