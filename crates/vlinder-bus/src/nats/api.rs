//! The JetStream API: JSON requests, and what its error codes mean to us.

use super::fitness::Account;
use super::link::{API_WAIT, Failure, Link, refused};
use crate::error::Error;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Error codes of the server that we tell apart (`err_code`; jetstream.md and nats-server's errors.json).
mod code {
    /// The expected last sequence does not hold.
    pub const WRONG_LAST_SEQUENCE: [u32; 2] = [10071, 10164];
    /// The same message id is being stored at this moment: the outcome is not known yet.
    pub const ID_IN_PROCESS: u32 = 10158;
    /// The account or the server has no room.
    pub const NO_ROOM: [u32; 3] = [10023, 10028, 10047];
    /// The store refused the message: a limit (`discard: new`) or a failure; the text says which.
    pub const STORE_FAILED: u32 = 10077;
    pub const STREAM_NOT_FOUND: u32 = 10059;
    pub const CONSUMER_NOT_FOUND: u32 = 10014;
    pub const MESSAGE_NOT_FOUND: u32 = 10037;
    /// JetStream is off, for the server or for this account.
    pub const OFF: [u32; 2] = [10039, 10076];
    /// The cluster is choosing a leader, or a peer is not there yet.
    pub const AWAY: [u32; 4] = [10004, 10005, 10008, 10009];
    /// More than one replica without a cluster.
    pub const NO_CLUSTER: u32 = 10074;
}

/// An error as the server sends it.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct ApiError {
    pub code: u16,
    #[serde(default)]
    pub err_code: u32,
    #[serde(default)]
    pub description: String,
}

impl ApiError {
    pub fn is_conflict(&self) -> bool {
        code::WRONG_LAST_SEQUENCE.contains(&self.err_code)
    }

    pub fn is_missing(&self) -> bool {
        let missing = [
            code::STREAM_NOT_FOUND,
            code::CONSUMER_NOT_FOUND,
            code::MESSAGE_NOT_FOUND,
        ];
        missing.contains(&self.err_code)
    }

    pub fn is_no_message(&self) -> bool {
        self.err_code == code::MESSAGE_NOT_FOUND
    }

    /// There is no room: in the stream itself, or in what the server may use.
    pub fn is_full(&self) -> bool {
        let limit = self.err_code == code::STORE_FAILED && self.description.contains("maximum");
        limit || code::NO_ROOM.contains(&self.err_code)
    }

    /// As an error of ours; `what` is the stream or queue that was asked for.
    pub fn into_error(self, link: &Link, operation: &'static str, what: &str) -> Error {
        if self.is_missing() {
            return Error::Missing {
                what: what.to_owned(),
            };
        }
        if self.is_full() {
            return Error::Full {
                stream: what.to_owned(),
            };
        }
        if code::OFF.contains(&self.err_code) {
            let reason = format!("JetStream is off for this account: {}", self.description);
            return link.unfit(reason);
        }
        if self.err_code == code::NO_CLUSTER {
            return link.unfit("queue.replicas above 1 needs a cluster of NATS servers".to_owned());
        }
        if self.err_code == code::ID_IN_PROCESS {
            return Error::Timeout { operation };
        }
        if code::AWAY.contains(&self.err_code) || self.code == 503 {
            return link.unreachable(&format!(
                "JetStream cannot {operation} now: {}",
                self.description
            ));
        }
        refused(operation, self.description)
    }
}

/// Either an error or what was asked for.
#[derive(Deserialize)]
#[serde(untagged)]
enum Answer<T> {
    Error { error: ApiError },
    Ok(T),
}

/// Reads an API answer.
pub(super) fn read<T: DeserializeOwned>(
    operation: &'static str,
    payload: &[u8],
) -> Result<Result<T, ApiError>, Error> {
    match serde_json::from_slice(payload) {
        Ok(Answer::Error { error }) => Ok(Err(error)),
        Ok(Answer::Ok(value)) => Ok(Ok(value)),
        Err(error) => Err(refused(operation, format!("unreadable answer: {error}"))),
    }
}

impl Link {
    /// One API request; the inner error is the server's.
    pub async fn api<T: DeserializeOwned>(
        &self,
        operation: &'static str,
        endpoint: &str,
        body: &impl Serialize,
    ) -> Result<Result<T, ApiError>, Error> {
        let payload = serde_json::to_vec(body).expect("our requests are plain JSON");
        let subject = format!("$JS.API.{endpoint}");
        let answer = self
            .request(operation, subject, None, payload.into(), API_WAIT)
            .await
            .map_err(|failure| match failure {
                Failure::NoResponders => self.unreachable("JetStream does not answer"),
                Failure::Other(error) => error,
            })?;
        read(operation, &answer.payload)
    }
}

/// The account: shows that JetStream answers, and its level.
pub(super) async fn account(link: &Link) -> Result<Account, Error> {
    let operation = "ask for the account";
    let answer: Result<Account, ApiError> = link.api(operation, "INFO", &()).await?;
    answer
        .map(Account::with_level)
        .map_err(|error| error.into_error(link, operation, "JetStream"))
}
