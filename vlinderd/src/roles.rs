//! Which code serves which role: the one place that knows all of them.

use crate::listeners::GRPC;
use crate::peers::{FollowedSecret, SecretReader, WorkerPeers};
use std::ffi::OsString;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use vlinder_config::{Config, Service};
use vlinder_core::WorkerRole;
use vlinder_inference::Backend;
use vlinder_proto::MESSAGE_BYTES_MAX;
use vlinder_proto::catalog::catalog_server::CatalogServer;
use vlinder_proto::harness::harness_server::HarnessServer;
use vlinder_proto::registry::registry_server::RegistryServer;
use vlinder_proto::secret::secret_server::SecretServer;
use vlinder_proto::state::state_server::StateServer;
use vlinder_services::auth::Gate;
use vlinder_services::{catalog, grpc, harness, infra, registry, secret};
use vlinder_worker::infra::InfraView;
use vlinder_worker::{Error, WorkerCx};

/// Longest path of a socket in the file system that Linux takes, in bytes (unix(7)).
const SOCKET_PATH_MAX: usize = 107;

/// The roles that this release can run, or hold a place for.
pub const SUPPORTED: [WorkerRole; 16] = [
    WorkerRole::Secret,
    WorkerRole::State,
    WorkerRole::Registry,
    WorkerRole::Catalog,
    WorkerRole::Harness,
    WorkerRole::Infra,
    WorkerRole::StorageObjectSqlite,
    WorkerRole::StorageVectorSqlite,
    WorkerRole::InferenceOllama,
    WorkerRole::InferenceOpenrouter,
    WorkerRole::InferenceOpenai,
    WorkerRole::InferenceAnthropic,
    WorkerRole::AgentContainer,
    WorkerRole::AgentProcess,
    WorkerRole::DagGit,
    WorkerRole::SessionViewer,
];

/// The roles that really run agents.
const RUNTIMES: [WorkerRole; 2] = [WorkerRole::AgentContainer, WorkerRole::AgentProcess];

/// Whatever a role needs beside its context.
pub struct Setup {
    /// The node's configuration.
    pub config: Arc<Config>,
    /// The credential of RPCs.
    pub token: String,
    /// The inherited gRPC listener of a service.
    pub listener: Option<TcpListener>,
}

/// Runs a worker of the role in `cx` until it drains.
pub async fn run(cx: WorkerCx, setup: Setup) -> Result<(), Error> {
    let config = setup.config.clone();
    match cx.id.role {
        WorkerRole::Secret => {
            let key = secret::MasterKey::from_file(&cx.data_dir.join("secret.key"))
                .map_err(|error| Error::Config(format!("the key of the secrets: {error}")))?;
            let service = secret::SecretService::new(InfraView::start(&cx).await?, key);
            let server = SecretServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX);
            serve(cx, setup, Routes::new(server), "vlinder.secret.v1.Secret").await
        }
        WorkerRole::State => {
            let path = vlinder_state::StateWorker::db_path(&cx.data_dir, cx.id.index);
            let worker = vlinder_state::StateWorker::start(&cx, path)
                .await
                .map_err(|error| {
                    Error::Other(format!("the projection cannot be opened: {error}"))
                })?;
            let server = StateServer::new(worker.service())
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX);
            let stop = CancellationToken::new();
            let following = worker.run(stop.clone());
            let serving = serve(cx, setup, Routes::new(server), "vlinder.state.v1.State");
            tokio::pin!(following);
            tokio::select! {
                // Reads that run until the end of the drain still follow the log.
                served = serving => {
                    stop.cancel();
                    following.await?;
                    served
                }
                ended = &mut following => ended.and(Err(Error::Other("the projection stopped following the log".to_owned()))),
            }
        }
        WorkerRole::Registry => {
            let service = registry::RegistryService::start(cx.clone(), &registry_roles()).await?;
            let server = RegistryServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX);
            serve(
                cx,
                setup,
                Routes::new(server),
                "vlinder.registry.v1.Registry",
            )
            .await
        }
        WorkerRole::Catalog => {
            let server = CatalogServer::new(catalog::CatalogService::new(cx.clone()));
            serve(cx, setup, Routes::new(server), "vlinder.catalog.v1.Catalog").await
        }
        WorkerRole::Harness => {
            let service = harness::HarnessService::start(cx.clone(), bench_options()?).await?;
            let server = HarnessServer::new(service)
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX);
            serve(cx, setup, Routes::new(server), "vlinder.harness.v1.Harness").await
        }
        WorkerRole::Infra => infra::run(cx).await,
        WorkerRole::StorageObjectSqlite => {
            vlinder_store::run(cx, vlinder_store::Service::Kv, s3_access(&config)).await
        }
        WorkerRole::StorageVectorSqlite => {
            vlinder_store::run(cx, vlinder_store::Service::Vec, s3_access(&config)).await
        }
        WorkerRole::InferenceOllama => {
            let provider = Provider {
                backend: Backend::Ollama,
                endpoint: Some(config.ollama.endpoint.clone()),
                endpoint_key: "ollama.endpoint",
                api_key: None,
                api_key_name: None,
            };
            infer(cx, setup, provider).await
        }
        WorkerRole::InferenceOpenai => {
            let provider = Provider {
                backend: Backend::Openai,
                endpoint: config.openai.endpoint.clone(),
                endpoint_key: "openai.endpoint",
                api_key: config.openai.api_key.clone(),
                api_key_name: Some("openai.api_key"),
            };
            infer(cx, setup, provider).await
        }
        WorkerRole::InferenceAnthropic => {
            let provider = Provider {
                backend: Backend::Anthropic,
                endpoint: Some(config.anthropic.endpoint.clone()),
                endpoint_key: "anthropic.endpoint",
                api_key: config.anthropic.api_key.clone(),
                api_key_name: Some("anthropic.api_key"),
            };
            infer(cx, setup, provider).await
        }
        WorkerRole::InferenceOpenrouter => {
            let provider = Provider {
                backend: Backend::Openrouter,
                endpoint: Some(config.openrouter.endpoint.clone()),
                endpoint_key: "openrouter.endpoint",
                api_key: config.openrouter.api_key.clone(),
                api_key_name: Some("openrouter.api_key"),
            };
            infer(cx, setup, provider).await
        }
        WorkerRole::AgentProcess => {
            // Each runtime worker needs a bridge of its own: a replica's secret is known to one alone.
            let bridge = TcpListener::bind("127.0.0.1:0").map_err(|source| Error::Io {
                what: "cannot listen for agents' calls".to_owned(),
                source,
            })?;
            let options = vlinder_runtime::Options {
                labels: config.node.labels.clone(),
                bridge: Some(bridge),
                drain_within: config.supervisor.drain_deadline * 3 / 4,
                secrets: Arc::new(SecretReader::new(config.clone(), &cx, &setup.token)),
            };
            let boxed = [own_command().as_str(), "box", "--fd", "0", "--"].map(OsString::from);
            let process = vlinder_runtime::process::ProcessOptions {
                box_command: boxed.into(),
                // Agents find their interpreters where this daemon would.
                path: vlinder_config::Env::from_process()
                    .get("PATH")
                    .unwrap_or_default()
                    .into(),
            };
            vlinder_runtime::run_process(cx, options, process).await
        }
        WorkerRole::AgentContainer => {
            let options = vlinder_runtime::Options {
                labels: config.node.labels.clone(),
                bridge: None,
                drain_within: config.supervisor.drain_deadline * 3 / 4,
                secrets: Arc::new(SecretReader::new(config.clone(), &cx, &setup.token)),
            };
            let container = vlinder_runtime::container::ContainerOptions {
                docker_host: config.runtime.docker_host.clone(),
                pinned: config.runtime.image_policy == vlinder_config::ImagePolicy::Pinned,
            };
            vlinder_runtime::run_container(cx, options, container).await
        }
        WorkerRole::DagGit => vlinder_git::run(cx).await,
        WorkerRole::SessionViewer => {
            let services = &[Service::State, Service::Registry, Service::Harness];
            let peers = WorkerPeers::new(config.clone(), &cx, &setup.token, services);
            let path = crate::console::socket_of(&cx.data_dir, cx.id.index);
            if path.as_os_str().len() > SOCKET_PATH_MAX {
                let reason = format!("the path of its socket is too long: {}", path.display());
                return wait(cx, &reason).await;
            }
            let clients: vlinder_console::Clients = Arc::new(move || peers.client());
            vlinder_console::serve(&path, clients, || cx.control.ready(), cx.drain.clone())
                .await
                .map_err(|source| Error::Io {
                    what: format!("cannot serve the console on {}", path.display()),
                    source,
                })
        }
        role @ (WorkerRole::AgentLambda | WorkerRole::InferenceLocal) => Err(Error::Config(
            format!("this release cannot run workers of role {role}"),
        )),
    }
}

/// The runtimes whose agents may be deployed.
fn registry_roles() -> Vec<WorkerRole> {
    let services = SUPPORTED
        .into_iter()
        .filter(|role| !role.as_str().starts_with("agent."));
    services.chain(RUNTIMES).collect()
}

async fn serve(
    cx: WorkerCx,
    setup: Setup,
    routes: Routes,
    name: &'static str,
) -> Result<(), Error> {
    let listener = setup
        .listener
        .ok_or_else(|| Error::Other(format!("no listener named {GRPC} was inherited")))?;
    cx.control.ready();
    grpc::serve(
        listener,
        routes,
        name,
        Gate::new(&setup.token),
        cx.drain.clone(),
    )
    .await
}

/// Where models come from.
struct Provider {
    backend: Backend,
    endpoint: Option<url::Url>,
    /// The key of the configuration that names the endpoint.
    endpoint_key: &'static str,
    api_key: Option<vlinder_config::Secret>,
    /// The key of the configuration that holds the credential, and the name of the secret that
    /// holds it where the configuration does not.
    api_key_name: Option<&'static str>,
}

async fn infer(cx: WorkerCx, setup: Setup, provider: Provider) -> Result<(), Error> {
    let Some(endpoint) = provider.endpoint else {
        let reason = format!("{} is not configured", provider.endpoint_key);
        return wait(cx, &reason).await;
    };
    let options = |key| vlinder_inference::Options::new(provider.backend, endpoint, key);
    let configured = provider.api_key.map(|key| key.expose().to_owned());
    let (None, Some(name)) = (&configured, provider.api_key_name) else {
        let key = vlinder_inference::ApiKey::from(configured);
        return vlinder_inference::run(cx, options(key)).await;
    };
    let reader = SecretReader::new(setup.config.clone(), &cx, &setup.token);
    let (followed, key) = FollowedSecret::start(&cx, reader, name).await?;
    tokio::select! {
        ended = vlinder_inference::run(cx, options(key.into())) => ended,
        never = followed.follow() => match never {},
    }
}

/// What this node may use S3-compatible storage with.
fn s3_access(config: &Config) -> vlinder_objects::Access {
    let env = vlinder_config::Env::from_process();
    vlinder_objects::Access::of(vlinder_config::aws::s3_variables(config, &env))
}

/// Holds the place of a role that cannot work here, and says why.
async fn wait(cx: WorkerCx, reason: &str) -> Result<(), Error> {
    cx.control.waiting(reason);
    cx.drain.cancelled().await;
    Ok(())
}

/// This binary, also after it was replaced on disk.
pub fn own_command() -> String {
    let exe = std::env::current_exe().ok().filter(|path| path.exists());
    exe.map_or("/proc/self/exe".to_owned(), |path| {
        path.display().to_string()
    })
}

fn bench_options() -> Result<harness::BenchOptions, Error> {
    let io = |source| Error::Io {
        what: "cannot pack the bench agent's empty directory".to_owned(),
        source,
    };
    let packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let bundle = tar::Builder::new(packer)
        .into_inner()
        .map_err(io)?
        .finish()
        .map_err(io)?;
    Ok(harness::BenchOptions {
        agent_command: format!("{} bench-agent", own_command()),
        empty_bundle: bundle.into(),
    })
}

/// How long workers may take to connect to the bus at their start.
pub const BUS_DEADLINE: Duration = Duration::from_secs(20);
