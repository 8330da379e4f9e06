//! The verbs of the five services, one method each.
//!
//! Requests are the wire types; a method fills in the namespace where the request leaves it empty.

use crate::error::Error;
use crate::pool::{Client, Conn, Repeat};
use futures::StreamExt;
use futures::stream::BoxStream;
use std::sync::Arc;
use std::time::Duration;
use tonic::Streaming;
use vlinder_config::Service;
use vlinder_proto::catalog::catalog_client::CatalogClient;
use vlinder_proto::harness::harness_client::HarnessClient;
use vlinder_proto::registry::registry_client::RegistryClient;
use vlinder_proto::secret::secret_client::SecretClient;
use vlinder_proto::state::state_client::StateClient;
use vlinder_proto::{MESSAGE_BYTES_MAX, catalog, harness, registry, secret, state};

/// Largest agent directory, packed, in bytes: what the registry takes.
pub const BUNDLE_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Size of the pieces in which a bundle is sent, in bytes.
const PIECE_BYTES: usize = 1024 * 1024;
/// Most rows that one answer about sessions or turns has: what the state service gives.
pub const SESSION_LIST_MAX: u32 = 1000;

macro_rules! connected {
    ($name:ident, $client:ident) => {
        pub(crate) fn $name(conn: Conn) -> $client<Conn> {
            $client::new(conn)
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX)
        }
    };
}
connected!(harness_client, HarnessClient);
connected!(registry_client, RegistryClient);
connected!(state_client, StateClient);
connected!(secret_client, SecretClient);
connected!(catalog_client, CatalogClient);

/// Requests that name a namespace take the client's where they name none.
trait InNamespace {
    fn in_namespace(self, namespace: &str) -> Self;
}

macro_rules! in_namespace {
    ($($request:ty),* $(,)?) => {$(
        impl InNamespace for $request {
            fn in_namespace(mut self, namespace: &str) -> Self {
                if self.namespace.is_empty() {
                    self.namespace = namespace.to_owned();
                }
                self
            }
        }
    )*};
}
macro_rules! in_no_namespace {
    ($($request:ty),* $(,)?) => {$(
        impl InNamespace for $request {
            fn in_namespace(self, _: &str) -> Self {
                self
            }
        }
    )*};
}
in_namespace!(
    harness::CancelRequest,
    harness::ForkRequest,
    harness::PromoteRequest,
    harness::ReplayRequest,
    harness::ListQueuesRequest,
    harness::EventsRequest,
    registry::ListAgentsRequest,
    registry::GetAgentRequest,
    registry::DeleteAgentRequest,
    registry::AgentLogsRequest,
    registry::PutFleetRequest,
    registry::ListFleetsRequest,
    registry::GetFleetRequest,
    registry::DeleteFleetRequest,
    registry::ListModelsRequest,
    state::ListSessionsRequest,
    state::GetSessionRequest,
    state::ListBranchesRequest,
    state::ListTurnsRequest,
    state::GetTurnRequest,
    state::VerifySessionRequest,
    state::GetBodyRequest,
    secret::PutRequest,
    secret::GetRequest,
    secret::ListRequest,
    secret::DeleteRequest,
);
in_no_namespace!(
    harness::ListDeadRequest,
    harness::ShowDeadRequest,
    harness::RedriveDeadRequest,
    harness::BenchRequest,
    registry::ListNodesRequest,
    registry::ListWorkersRequest,
    registry::ScaleRequest,
    registry::RestartWorkersRequest,
    registry::WorkerLogsRequest,
    state::StatusRequest,
    catalog::AvailableRequest,
);

/// How long one try and all tries of a kind of call may take.
#[derive(Clone, Copy)]
enum Pace {
    /// Answers at once.
    Quick,
    /// Does much first.
    Long,
}

impl Client {
    fn pace(&self, pace: Pace, repeat: Repeat) -> (Duration, Duration) {
        let limits = self.limits();
        match (pace, repeat) {
            (Pace::Quick, Repeat::Safe) => (limits.call, limits.retry),
            (Pace::Quick, Repeat::Never) => (limits.call, limits.call),
            (Pace::Long, _) => (limits.long, limits.long),
        }
    }
}

macro_rules! verbs {
    ($($(#[$doc:meta])* $name:ident: $service:ident, $connected:ident, $method:ident($request:ty) -> $answer:ty, $repeat:ident, $pace:ident;)*) => {
        impl Client {$(
            $(#[$doc])*
            pub async fn $name(&self, request: $request) -> Result<$answer, Error> {
                let request = request.in_namespace(self.namespace());
                let (each, whole) = self.pace(Pace::$pace, Repeat::$repeat);
                self.call_within(Service::$service, Repeat::$repeat, each, whole, |conn| {
                    let request = request.clone();
                    async move { $connected(conn).$method(request).await }
                })
                .await
            }
        )*}
    };
}

verbs! {
    /// Ends a turn; the answer says how it ended.
    cancel: Harness, harness_client, cancel(harness::CancelRequest) -> harness::CancelResponse, Safe, Quick;
    /// Makes a branch at the end of a turn.
    fork: Harness, harness_client, fork(harness::ForkRequest) -> harness::ForkResponse, Safe, Quick;
    /// Seals the default branch and makes another one the default.
    promote: Harness, harness_client, promote(harness::PromoteRequest) -> harness::PromoteResponse, Safe, Quick;
    /// The queues of the bus.
    list_queues: Harness, harness_client, list_queues(harness::ListQueuesRequest) -> harness::ListQueuesResponse, Safe, Quick;
    /// Messages that were given up, from an id on.
    list_dead: Harness, harness_client, list_dead(harness::ListDeadRequest) -> harness::ListDeadResponse, Safe, Quick;
    /// One of them with its bytes.
    show_dead: Harness, harness_client, show_dead(harness::ShowDeadRequest) -> harness::ShowDeadResponse, Safe, Quick;
    /// Sends dead letters again to where they came from.
    redrive_dead: Harness, harness_client, redrive_dead(harness::RedriveDeadRequest) -> harness::RedriveDeadResponse, Never, Long;

    /// All agents.
    list_agents: Registry, registry_client, list_agents(registry::ListAgentsRequest) -> registry::ListAgentsResponse, Safe, Quick;
    /// One agent.
    get_agent: Registry, registry_client, get_agent(registry::GetAgentRequest) -> registry::Agent, Safe, Quick;
    /// Deletes an agent; its sessions stay on record.
    delete_agent: Registry, registry_client, delete_agent(registry::DeleteAgentRequest) -> registry::DeleteAgentResponse, Never, Quick;
    /// Names agents that belong together.
    put_fleet: Registry, registry_client, put_fleet(registry::PutFleetRequest) -> registry::Fleet, Safe, Quick;
    /// Every fleet.
    list_fleets: Registry, registry_client, list_fleets(registry::ListFleetsRequest) -> registry::ListFleetsResponse, Safe, Quick;
    /// One fleet.
    get_fleet: Registry, registry_client, get_fleet(registry::GetFleetRequest) -> registry::Fleet, Safe, Quick;
    /// Forgets a fleet; its agents stay.
    delete_fleet: Registry, registry_client, delete_fleet(registry::DeleteFleetRequest) -> registry::DeleteFleetResponse, Never, Quick;
    /// Models that were added or are offered.
    list_models: Registry, registry_client, list_models(registry::ListModelsRequest) -> registry::ListModelsResponse, Safe, Quick;
    /// The nodes of the cluster.
    list_nodes: Registry, registry_client, list_nodes(registry::ListNodesRequest) -> registry::ListNodesResponse, Safe, Quick;
    /// The workers of a node, or of all.
    list_workers: Registry, registry_client, list_workers(registry::ListWorkersRequest) -> registry::ListWorkersResponse, Safe, Quick;
    /// Sets the live count of a role on a node.
    scale: Registry, registry_client, scale(registry::ScaleRequest) -> registry::ScaleResponse, Safe, Quick;
    /// Restarts the workers of a role on a node.
    restart_workers: Registry, registry_client, restart_workers(registry::RestartWorkersRequest) -> registry::RestartWorkersResponse, Never, Quick;

    /// Sessions, the last active first.
    list_sessions: State, state_client, list_sessions(state::ListSessionsRequest) -> state::ListSessionsResponse, Safe, Quick;
    /// One session with the turns of a branch.
    get_session: State, state_client, get_session(state::GetSessionRequest) -> state::Session, Safe, Quick;
    /// The branches of a session.
    list_branches: State, state_client, list_branches(state::ListBranchesRequest) -> state::ListBranchesResponse, Safe, Quick;
    /// Turns that run or wait, or all.
    list_turns: State, state_client, list_turns(state::ListTurnsRequest) -> state::ListTurnsResponse, Safe, Quick;
    /// One turn with every request and response.
    get_turn: State, state_client, get_turn(state::GetTurnRequest) -> state::TurnDetail, Safe, Quick;
    /// Recomputes every hash of a session.
    verify_session: State, state_client, verify_session(state::VerifySessionRequest) -> state::VerifySessionResponse, Safe, Long;
    /// Where the projection stands.
    state_status: State, state_client, status(state::StatusRequest) -> state::StatusResponse, Safe, Quick;

    /// Stores a secret.
    put_secret: Secret, secret_client, put(secret::PutRequest) -> secret::PutResponse, Safe, Quick;
    /// A secret's value.
    get_secret: Secret, secret_client, get(secret::GetRequest) -> secret::GetResponse, Safe, Quick;
    /// The names of all secrets.
    list_secrets: Secret, secret_client, list(secret::ListRequest) -> secret::ListResponse, Safe, Quick;
    /// Deletes a secret.
    delete_secret: Secret, secret_client, delete(secret::DeleteRequest) -> secret::DeleteResponse, Never, Quick;

    /// What every upstream of every node offers now.
    available_models: Catalog, catalog_client, available(catalog::AvailableRequest) -> catalog::AvailableResponse, Safe, Quick;
}

/// Items of a stream until it ends or fails.
pub(crate) type Items<T> = BoxStream<'static, Result<T, Error>>;

macro_rules! streams {
    ($($(#[$doc:meta])* $name:ident: $service:ident, $connected:ident, $method:ident($request:ty) -> $item:ty;)*) => {
        impl Client {$(
            $(#[$doc])*
            pub async fn $name(&self, request: $request) -> Result<Items<$item>, Error> {
                let request = request.in_namespace(self.namespace());
                let (each, whole) = self.pace(Pace::Quick, Repeat::Safe);
                let opened = self.call_somewhere(Service::$service, Repeat::Safe, each, whole, |conn| {
                    let request = request.clone();
                    async move { $connected(conn).$method(request).await }
                });
                let (stream, address) = opened.await?;
                Ok(items(Service::$service, address, stream))
            }
        )*}
    };
}

streams! {
    /// Node, worker, agent and turn changes as they happen. Ends with an error when the connection breaks.
    events: Harness, harness_client, events(harness::EventsRequest) -> harness::Event;
    /// Runs turns of a session again; the report is the last item. Ends with an error when the connection
    /// breaks; the same request, with the name that the first item gives, goes on.
    replay: Harness, harness_client, replay(harness::ReplayRequest) -> harness::ReplayEvent;
    /// Measures the installation; the report is the last item.
    bench: Harness, harness_client, bench(harness::BenchRequest) -> harness::BenchEvent;
    /// The bytes of a node's body.
    get_body: State, state_client, get_body(state::GetBodyRequest) -> state::BodyChunk;
    /// What an agent printed.
    agent_logs: Registry, registry_client, agent_logs(registry::AgentLogsRequest) -> registry::LogLine;
    /// What the workers of a role printed.
    worker_logs: Registry, registry_client, worker_logs(registry::WorkerLogsRequest) -> registry::LogLine;
}

fn items<T: Send + 'static>(service: Service, address: String, stream: Streaming<T>) -> Items<T> {
    let name = service.as_str();
    let items =
        stream.map(move |item| item.map_err(|status| Error::of_status(name, &address, &status)));
    items.boxed()
}

impl Client {
    /// Deploys an agent: the text of its manifest and, for process agents, its packed directory.
    ///
    /// The same deployment sent twice changes nothing, so a broken upload is sent again.
    pub async fn deploy_agent(
        &self,
        manifest: &str,
        bundle: Option<Arc<[u8]>>,
        bundle_sha256: &str,
    ) -> Result<registry::Agent, Error> {
        use registry::deploy_chunk::Part;
        if bundle
            .as_ref()
            .is_some_and(|bundle| bundle.len() > BUNDLE_BYTES_MAX)
        {
            let limit = BUNDLE_BYTES_MAX / 1024 / 1024;
            return Err(Error::Usage(format!(
                "the bundle is larger than {limit} MiB packed"
            )));
        }
        let head = registry::DeployHead {
            namespace: self.namespace().to_owned(),
            manifest: manifest.to_owned(),
            bundle_sha256: bundle_sha256.to_owned(),
        };
        let long = self.limits().long;
        self.call_within(Service::Registry, Repeat::Safe, long, long, |conn| {
            let head = Part::Head(head.clone());
            let bundle = bundle.clone().unwrap_or_default();
            let count = bundle.len().div_ceil(PIECE_BYTES);
            // Pieces are cut as they are sent: one of them is in memory beside the bundle.
            let pieces = (0..count).map(move |index| {
                let from = index * PIECE_BYTES;
                let to = (from + PIECE_BYTES).min(bundle.len());
                Part::Bundle(bundle[from..to].to_vec())
            });
            let parts = std::iter::once(head).chain(pieces);
            let chunks = parts.map(|part| registry::DeployChunk { part: Some(part) });
            async move {
                registry_client(conn)
                    .deploy_agent(futures::stream::iter(chunks))
                    .await
            }
        })
        .await
    }
}
