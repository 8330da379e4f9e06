//! From errors to gRPC statuses, in one place.

use futures::{Stream, StreamExt, stream};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use vlinder_core::{IdError, Namespace};

/// What a bus error means to a client.
pub fn of_bus(error: vlinder_bus::Error) -> Status {
    use vlinder_bus::Error;
    let text = error.to_string();
    match error {
        Error::Conflict { .. } | Error::KvConflict { .. } => Status::aborted(text),
        Error::Full { .. } | Error::DiskFull { .. } => Status::resource_exhausted(text),
        Error::TooLarge { .. } => Status::invalid_argument(text),
        Error::Missing { .. } => Status::not_found(text),
        Error::Timeout { .. } | Error::Unreachable { .. } | Error::Closed => {
            Status::unavailable(text)
        }
        Error::Unfit { .. } | Error::Locked { .. } => Status::failed_precondition(text),
        Error::Undecodable { .. } | Error::BlobDamaged { .. } => Status::data_loss(text),
        Error::Storage { .. } | Error::Refused { .. } => Status::internal(text),
    }
}

/// What a worker error means to a client.
pub fn of_worker(error: vlinder_worker::Error) -> Status {
    match error {
        vlinder_worker::Error::Bus(error) => of_bus(error),
        other => Status::unavailable(other.to_string()),
    }
}

/// A name that is none.
pub fn of_id(error: IdError) -> Status {
    Status::invalid_argument(error.to_string())
}

/// The namespace of a request; this release has `default` alone.
pub fn namespace(text: &str) -> Result<Namespace, Status> {
    let default = Namespace::default_ns();
    if text.is_empty() || text == default.as_str() {
        return Ok(default);
    }
    let asked = Namespace::new(text).map_err(of_id)?;
    Err(Status::not_found(format!(
        "namespace {asked} does not exist; this release has only `default`"
    )))
}

/// A stream without an end of its own, for as long as the service takes calls: then it says so, and
/// clients go on elsewhere.
pub fn until<T: Send + 'static>(
    stream: impl Stream<Item = Result<T, Status>> + Send + 'static,
    drain: CancellationToken,
) -> impl Stream<Item = Result<T, Status>> + Send + 'static {
    let stopped = drain.clone();
    let farewell = stream::once(async move { stopped.is_cancelled() })
        .filter(|stopped| std::future::ready(*stopped))
        .map(|_| Err(Status::unavailable("the service stops; connect again")));
    stream.take_until(drain.cancelled_owned()).chain(farewell)
}
