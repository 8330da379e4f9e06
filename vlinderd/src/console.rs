//! From the HTTP face to the console, which a worker serves on a socket below `run/`.

use axum::body::Body;
use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;

/// How long the console may take until it begins to answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// No console of this node takes connections.
pub struct Away;

/// Where the `index`-th worker of the console listens.
pub fn socket_of(data_dir: &Path, index: u32) -> PathBuf {
    data_dir.join("run").join(format!("console-{index}.sock"))
}

/// Passes a request that was let in on to the first of these workers that takes it. The credential stays here.
pub async fn forward(
    data_dir: &Path,
    indexes: impl Iterator<Item = u32>,
    mut request: Request,
) -> Result<Response, Away> {
    for index in indexes {
        let Ok(stream) = UnixStream::connect(socket_of(data_dir, index)).await else {
            continue;
        };
        let Ok((mut sender, connection)) = http1::handshake(TokioIo::new(stream)).await else {
            continue;
        };
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to the console broke");
            }
        });
        request.headers_mut().remove(header::AUTHORIZATION);
        request.headers_mut().remove(header::COOKIE);
        let answer = tokio::time::timeout(ANSWER_DEADLINE, sender.send_request(request)).await;
        return Ok(match answer {
            Ok(Ok(response)) => response.map(Body::new),
            Ok(Err(error)) => bad(
                StatusCode::BAD_GATEWAY,
                &format!("the console broke off: {error}"),
            ),
            Err(_) => bad(
                StatusCode::GATEWAY_TIMEOUT,
                "the console did not answer in time",
            ),
        });
    }
    Err(Away)
}

fn bad(status: StatusCode, message: &str) -> Response {
    (
        status,
        format!("{message}; `vlinder worker list` may say why\n"),
    )
        .into_response()
}
