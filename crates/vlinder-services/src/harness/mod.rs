//! The harness service: takes turns from clients and streams them back.
//!
//! Guarantees: once `Accepted` was sent the turn is stored and will end, whatever dies. The turns of
//! a branch are strictly one after another. The same submission sent again attaches to the same turn.
//! A client that leaves does not end its turn, unless it asked for that.

mod bench;
mod dead;
mod ends;
pub mod events;
mod points;
mod replay;
mod room;
mod run;
mod said;
pub mod sessions;

use crate::status;
use sessions::Sessions;
use std::pin::Pin;
use std::sync::Arc;
use tokio::sync::OwnedSemaphorePermit;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};
use vlinder_core::{BranchName, SessionId, SubmissionId};
use vlinder_proto::harness::harness_server::Harness;
use vlinder_proto::harness::{
    BenchEvent, BenchRequest, CancelRequest, CancelResponse, Event, EventsRequest, ForkRequest,
    ForkResponse, ListDeadRequest, ListDeadResponse, ListQueuesRequest, ListQueuesResponse,
    PromoteRequest, PromoteResponse, Queue, RedriveDeadRequest, RedriveDeadResponse, ReplayEvent,
    ReplayRequest, RunEvent, RunRequest, ShowDeadRequest, ShowDeadResponse,
};
use vlinder_worker::infra::InfraView;
use vlinder_worker::{Error, WorkerCx};

pub use bench::BenchOptions;
pub use ends::end_overdue;

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Turns that one harness waits for at once; more are refused until some end.
const TURNS_MAX: usize = 4096;

struct Shared {
    cx: WorkerCx,
    infra: InfraView,
    sessions: Sessions,
    bench: BenchOptions,
    places: Arc<tokio::sync::Semaphore>,
    room: room::Room,
}

/// The service; cheap to clone.
#[derive(Clone)]
pub struct HarnessService(Arc<Shared>);

impl HarnessService {
    /// A harness over the bus of `cx`.
    pub async fn start(cx: WorkerCx, bench: BenchOptions) -> Result<Self, Error> {
        let infra = InfraView::start(&cx).await?;
        let sessions = Sessions::new(cx.clone());
        let places = Arc::new(tokio::sync::Semaphore::new(TURNS_MAX));
        Ok(Self(Arc::new(Shared {
            cx,
            infra,
            sessions,
            bench,
            places,
            room: room::Room::default(),
        })))
    }

    /// A place for one more turn.
    fn place(&self) -> Result<OwnedSemaphorePermit, Status> {
        self.0.places.clone().try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!(
                "{TURNS_MAX} turns are in flight here; try again when some have ended"
            ))
        })
    }
}

#[tonic::async_trait]
impl Harness for HarnessService {
    type RunStream = Events<RunEvent>;
    type ReplayStream = Events<ReplayEvent>;
    type EventsStream = Events<Event>;
    type BenchStream = Events<BenchEvent>;

    async fn run(&self, request: Request<RunRequest>) -> Result<Response<Self::RunStream>, Status> {
        let place = self.place()?;
        let turn = run::accept(&self.0, request.into_inner()).await?;
        Ok(Response::new(Box::pin(
            turn.into_stream(self.0.clone(), place),
        )))
    }

    async fn cancel(
        &self,
        request: Request<CancelRequest>,
    ) -> Result<Response<CancelResponse>, Status> {
        let request = request.into_inner();
        status::namespace(&request.namespace)?;
        let submission = SubmissionId::new(&request.submission).map_err(status::of_id)?;
        let (end, already_ended) =
            ends::cancel(&self.0.cx, &submission, "cancelled by a client").await?;
        Ok(Response::new(CancelResponse {
            outcome: end.outcome.to_string(),
            already_ended,
        }))
    }

    async fn fork(&self, request: Request<ForkRequest>) -> Result<Response<ForkResponse>, Status> {
        let request = request.into_inner();
        status::namespace(&request.namespace)?;
        let session = SessionId::new(&request.session).map_err(status::of_id)?;
        let name = BranchName::new(&request.name).map_err(status::of_id)?;
        let turn = match request.turn.as_str() {
            "" => None,
            turn => Some(SubmissionId::new(turn).map_err(status::of_id)?),
        };
        let sessions = &self.0.sessions;
        let forked = sessions.fork(&session, &request.from, turn.as_ref(), &name);
        let from = forked.await?;
        Ok(Response::new(ForkResponse {
            branch: name.to_string(),
            from: from.to_string(),
        }))
    }

    async fn promote(
        &self,
        request: Request<PromoteRequest>,
    ) -> Result<Response<PromoteResponse>, Status> {
        let request = request.into_inner();
        status::namespace(&request.namespace)?;
        let session = SessionId::new(&request.session).map_err(status::of_id)?;
        let branch = BranchName::new(&request.branch).map_err(status::of_id)?;
        let sealed = self.0.sessions.promote(&session, &branch).await?;
        let (sealed, sealed_as) = match sealed {
            Some((name, dated)) => (name.to_string(), dated.to_string()),
            None => Default::default(),
        };
        Ok(Response::new(PromoteResponse {
            default_branch: branch.to_string(),
            sealed,
            sealed_as,
        }))
    }

    async fn replay(
        &self,
        request: Request<ReplayRequest>,
    ) -> Result<Response<Self::ReplayStream>, Status> {
        let place = self.place()?;
        let events = replay::stream(self.0.clone(), request.into_inner(), place).await?;
        Ok(Response::new(Box::pin(events)))
    }

    async fn list_queues(
        &self,
        request: Request<ListQueuesRequest>,
    ) -> Result<Response<ListQueuesResponse>, Status> {
        status::namespace(&request.into_inner().namespace)?;
        let queues = self
            .0
            .cx
            .bus
            .queues(&self.0.cx.log())
            .await
            .map_err(status::of_bus)?;
        let mut queues: Vec<Queue> = queues
            .into_iter()
            .map(|queue| Queue {
                name: queue.name,
                filter: queue.filter,
                waiting: queue.waiting,
                held: queue.held,
                oldest_ms: queue.oldest_ms,
            })
            .collect();
        queues.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Response::new(ListQueuesResponse { queues }))
    }

    async fn list_dead(
        &self,
        request: Request<ListDeadRequest>,
    ) -> Result<Response<ListDeadResponse>, Status> {
        dead::list(&self.0.cx.bus, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn show_dead(
        &self,
        request: Request<ShowDeadRequest>,
    ) -> Result<Response<ShowDeadResponse>, Status> {
        dead::show(&self.0.cx.bus, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn redrive_dead(
        &self,
        request: Request<RedriveDeadRequest>,
    ) -> Result<Response<RedriveDeadResponse>, Status> {
        dead::redrive(&self.0.cx.bus, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn events(
        &self,
        request: Request<EventsRequest>,
    ) -> Result<Response<Self::EventsStream>, Status> {
        let request = request.into_inner();
        status::namespace(&request.namespace)?;
        let events = events::stream(&self.0.cx, request.prefix).await?;
        let events = status::until(events, self.0.cx.drain.clone());
        Ok(Response::new(Box::pin(events)))
    }

    async fn bench(
        &self,
        request: Request<BenchRequest>,
    ) -> Result<Response<Self::BenchStream>, Status> {
        let events = bench::stream(self.0.clone(), request.into_inner())?;
        Ok(Response::new(Box::pin(events)))
    }
}
