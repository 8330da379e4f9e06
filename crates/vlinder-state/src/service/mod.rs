//! The gRPC service: parse, wait for the barrier, query, answer.

mod body;
mod session;
mod turn;

use crate::bodies::Bodies;
use crate::error::Error;
use crate::projection::Projection;
use crate::query::{self, sessions};
use crate::verify::Verifier;
use body::in_pieces;
use futures::stream::BoxStream;
use rusqlite::Connection;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};
use vlinder_core::Namespace;
use vlinder_core::record::FIELD_BYTES_MAX;
use vlinder_proto::state as proto;
use vlinder_proto::state::state_server::State;

/// Rows of a list where the caller names no limit, and the most of one answer.
pub const LIST_ROWS: (usize, usize) = (100, 1000);
/// Texts of one answer, in bytes: with what is around them well below the limit of a gRPC message.
pub const ANSWER_BYTES_MAX: u64 = 24 * 1024 * 1024;
/// Sessions verified at once. Each reads its part of the log again.
const VERIFIES_AT_ONCE: usize = 2;

const _: () = assert!((ANSWER_BYTES_MAX as usize) * 2 < vlinder_proto::MESSAGE_BYTES_MAX);

/// The `State` service over a [`Projection`]; cheap to clone. It checks no credential: whoever
/// serves it puts that in front.
#[derive(Clone)]
pub struct StateService {
    projection: Projection,
    bodies: Bodies,
    verifies: Arc<Semaphore>,
}

impl StateService {
    /// The service. The projection's follower must run.
    pub fn new(projection: Projection) -> Self {
        Self {
            bodies: Bodies::new(projection.clone()),
            verifies: Arc::new(Semaphore::new(VERIFIES_AT_ONCE)),
            projection,
        }
    }

    fn ns(&self) -> &Namespace {
        self.projection.namespace()
    }

    /// Checks that a request is for the namespace that is projected here.
    fn check_namespace(&self, text: &str) -> Result<(), Error> {
        if text.is_empty() || text == self.ns().as_str() {
            return Ok(());
        }
        let ns = Namespace::new(text).map_err(|error| invalid("namespace", error))?;
        Err(Error::NotFound {
            what: format!("namespace {ns}"),
            hint: String::new(),
        })
    }

    /// Waits for the barrier, then queries.
    async fn query<T, F>(&self, query: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Connection, &Namespace) -> Result<T, Error> + Send + 'static,
    {
        self.projection.caught_up().await?;
        let ns = self.ns().clone();
        self.projection
            .read(move |connection| query(connection, &ns))
            .await
    }

    async fn verify(
        &self,
        request: proto::VerifySessionRequest,
    ) -> Result<proto::VerifySessionResponse, Error> {
        self.check_namespace(&request.namespace)?;
        let wanted = parse_session(&request.session)?;
        let busy = |_| Error::Busy {
            what: "verifications",
        };
        let _permit = self.verifies.try_acquire().map_err(busy)?;
        let session = self
            .query(move |connection, ns| sessions::find(connection, ns, &wanted))
            .await?;
        let verifier = Verifier::new(self.projection.clone(), self.bodies.clone());
        verifier.session(&session).await
    }

    async fn how_it_stands(
        &self,
        request: proto::StatusRequest,
    ) -> Result<proto::StatusResponse, Error> {
        // No barrier: who asks how far it is wants to know that, too, when it lags.
        let last = self.projection.last_in_log().await?;
        let ns = self.ns().clone();
        let (cursors, counts, digest) = self
            .projection
            .read(move |connection| {
                let digest = match request.digest {
                    true => query::digest::digest(connection)?,
                    false => String::new(),
                };
                let cursors = query::applied(connection, &ns)?;
                Ok((cursors, query::counts(connection)?, digest))
            })
            .await?;
        Ok(proto::StatusResponse {
            log_seq: cursors.log,
            log_last_seq: last.log,
            nodes: counts.nodes,
            digest,
            ctl_seq: cursors.ctl,
            ctl_last_seq: last.ctl,
            duplicates: counts.duplicates,
            skipped: counts.skipped,
            rebuilds: self.projection.0.rebuilds.load(Ordering::Relaxed),
        })
    }
}

#[tonic::async_trait]
impl State for StateService {
    async fn list_sessions(
        &self,
        request: Request<proto::ListSessionsRequest>,
    ) -> Result<Response<proto::ListSessionsResponse>, Status> {
        Ok(Response::new(self.sessions(request.into_inner()).await?))
    }

    async fn get_session(
        &self,
        request: Request<proto::GetSessionRequest>,
    ) -> Result<Response<proto::Session>, Status> {
        Ok(Response::new(self.session(request.into_inner()).await?))
    }

    async fn list_branches(
        &self,
        request: Request<proto::ListBranchesRequest>,
    ) -> Result<Response<proto::ListBranchesResponse>, Status> {
        Ok(Response::new(self.branches(request.into_inner()).await?))
    }

    async fn list_turns(
        &self,
        request: Request<proto::ListTurnsRequest>,
    ) -> Result<Response<proto::ListTurnsResponse>, Status> {
        Ok(Response::new(self.turns(request.into_inner()).await?))
    }

    async fn get_turn(
        &self,
        request: Request<proto::GetTurnRequest>,
    ) -> Result<Response<proto::TurnDetail>, Status> {
        Ok(Response::new(self.turn(request.into_inner()).await?))
    }

    async fn verify_session(
        &self,
        request: Request<proto::VerifySessionRequest>,
    ) -> Result<Response<proto::VerifySessionResponse>, Status> {
        Ok(Response::new(self.verify(request.into_inner()).await?))
    }

    type GetBodyStream = BoxStream<'static, Result<proto::BodyChunk, Status>>;

    async fn get_body(
        &self,
        request: Request<proto::GetBodyRequest>,
    ) -> Result<Response<Self::GetBodyStream>, Status> {
        let (body, permit) = self.body(request.into_inner()).await?;
        Ok(Response::new(in_pieces(body, permit)))
    }

    async fn status(
        &self,
        request: Request<proto::StatusRequest>,
    ) -> Result<Response<proto::StatusResponse>, Status> {
        Ok(Response::new(
            self.how_it_stands(request.into_inner()).await?,
        ))
    }
}

fn invalid(field: &'static str, error: impl std::fmt::Display) -> Error {
    Error::Invalid {
        field,
        reason: error.to_string(),
    }
}

/// The number of rows for a limit that a client asked for; 0 means the usual.
fn rows_of(limit: u32, (usual, most): (usize, usize)) -> usize {
    match limit as usize {
        0 => usual,
        limit => limit.min(most),
    }
}

/// An id, a name or the beginning of an id: any text without control characters.
fn parse_session(text: &str) -> Result<String, Error> {
    let reason = if text.is_empty() {
        "expected the id, the name or the beginning of the id of a session"
    } else if text.len() > FIELD_BYTES_MAX {
        "longer than any name of a session"
    } else if text.chars().any(char::is_control) {
        "has control characters, which no name has"
    } else {
        return Ok(text.to_owned());
    };
    Err(invalid("session", reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_bounded() {
        assert_eq!(rows_of(0, LIST_ROWS), 100);
        assert_eq!(rows_of(7, LIST_ROWS), 7);
        assert_eq!(rows_of(u32::MAX, LIST_ROWS), 1000);
    }
}
