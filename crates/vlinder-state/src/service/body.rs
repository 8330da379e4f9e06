//! `GetBody`: the bytes of a node's body, in pieces.

use super::{StateService, invalid};
use crate::bodies::BodyRef;
use crate::error::Error;
use crate::query;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tonic::Status;
use vlinder_core::NodeHash;
use vlinder_proto::state as proto;

/// Bytes of one piece of a body.
const CHUNK_BYTES: usize = 256 * 1024;
/// Pieces that are ready while the reader is busy with the one before.
const CHUNKS_AHEAD: usize = 2;
/// How long a reader may take for one piece before the body is let go.
const CHUNK_DEADLINE: Duration = Duration::from_secs(30);

impl StateService {
    pub(super) async fn body(
        &self,
        request: proto::GetBodyRequest,
    ) -> Result<(Bytes, Option<OwnedSemaphorePermit>), Error> {
        self.check_namespace(&request.namespace)?;
        let hash: NodeHash = request
            .hash
            .parse()
            .map_err(|error| invalid("hash", error))?;
        let node = self
            .query(move |connection, ns| query::node(connection, ns, &hash))
            .await?;
        let node = node.ok_or_else(|| Error::NotFound {
            what: format!("node {hash}"),
            hint: String::new(),
        })?;
        self.bodies.load(&BodyRef::from(&node)).await
    }
}

/// A body as a stream of pieces. A reader that stops reading does not keep it in memory.
pub(super) fn in_pieces(
    body: Bytes,
    permit: Option<OwnedSemaphorePermit>,
) -> BoxStream<'static, Result<proto::BodyChunk, Status>> {
    let (tx, rx) = mpsc::channel(CHUNKS_AHEAD);
    let left = body.len();
    // Ends with the body, with the reader, or at the deadline of a piece.
    tokio::spawn(async move {
        let _permit = permit;
        for piece in body.chunks(CHUNK_BYTES) {
            let chunk = proto::BodyChunk {
                data: piece.to_vec(),
            };
            match tokio::time::timeout(CHUNK_DEADLINE, tx.send(chunk)).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return,
            }
        }
    });
    let pieces = stream::unfold((rx, left), |(mut rx, left)| async move {
        if left == 0 {
            return None;
        }
        match rx.recv().await {
            Some(chunk) => {
                let left = left.saturating_sub(chunk.data.len());
                Some((Ok(chunk), (rx, left)))
            }
            None => {
                let late = Status::deadline_exceeded("the body was read too slowly");
                Some((Err(late), (rx, 0)))
            }
        }
    });
    pieces.boxed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tokio::sync::Semaphore;

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_stops_is_told_and_the_body_let_go() {
        let large = Arc::new(Semaphore::new(1));
        let permit = large.clone().try_acquire_owned().unwrap();
        let body = Bytes::from(vec![7; CHUNK_BYTES * 5]);
        let mut pieces = in_pieces(body, Some(permit));
        assert!(pieces.next().await.unwrap().is_ok());
        let free = tokio::time::timeout(CHUNK_DEADLINE * 2, large.acquire()).await;
        assert!(free.is_ok());
        let rest: Vec<_> = pieces.collect().await;
        let end = rest.last().unwrap().as_ref().unwrap_err();
        assert_eq!(end.code(), tonic::Code::DeadlineExceeded);
    }
}
