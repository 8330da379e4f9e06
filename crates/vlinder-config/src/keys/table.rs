//! Every key, section by section. The order is that of the sample and of `config show`.

use super::{Key, Standard};
use crate::addresses::Service;
use crate::elements::Kind;

const fn is(path: &'static str, kind: Kind, value: &'static str, about: &'static str) -> Key {
    Key {
        path,
        kind,
        standard: Standard::Is(value),
        about,
    }
}

const fn follows(
    path: &'static str,
    kind: Kind,
    rule: &'static str,
    example: &'static str,
    about: &'static str,
) -> Key {
    Key {
        path,
        kind,
        standard: Standard::Follows { rule, example },
        about,
    }
}

const fn unset(path: &'static str, kind: Kind, example: &'static str, about: &'static str) -> Key {
    Key {
        path,
        kind,
        standard: Standard::Unset { example },
        about,
    }
}

const COUNT: Kind = Kind::Number {
    min: 0,
    max: crate::check::WORKERS_PER_ROLE_MAX,
};
const PORT: Kind = Kind::Number { min: 0, max: 65535 };
const SECOND_MS: u64 = 1000;
const HOUR_MS: u64 = 3600 * SECOND_MS;
/// A deadline of the supervisor: long enough to be kept, short enough to be waited for.
const DEADLINE: Kind = Kind::Span {
    min_ms: 100,
    max_ms: HOUR_MS,
};
const BY_ADDRESS: &str =
    "the port of the address above when that names this node, else the usual one";
const LENT: &str = "the host of registry_addr when that is set, else this node";
const AS_REGISTRY: &str = "what registry is";

/// Every key, section by section.
pub(crate) static KEYS: &[Key] = &[
    follows(
        "node.name",
        Kind::NodeName,
        "the host name",
        "gpu-1",
        "How this node is listed.",
    ),
    is(
        "node.labels",
        Kind::Labels,
        "",
        "Free key = value pairs, used for placement. A layer that sets them replaces those of the layers below it.",
    ),
    is(
        "node.dead_after",
        Kind::Span {
            min_ms: SECOND_MS,
            max_ms: HOUR_MS,
        },
        "5s",
        "A node that was not heard of for this long counts as not ready.",
    ),
    is(
        "logging.level",
        Kind::Choice(&["error", "warn", "info", "debug", "trace"]),
        "info",
        "How much is logged. RUST_LOG wins on stderr.",
    ),
    is(
        "logging.format",
        Kind::Choice(&["text", "json"]),
        "text",
        "How stderr is written.",
    ),
    follows(
        "queue.backend",
        Kind::Choice(&["local", "nats"]),
        "local; nats when queue.nats_url is set",
        "nats",
        "local: embedded, one process with its workers as tasks. nats: a process for each worker, over NATS JetStream.",
    ),
    follows(
        "queue.nats_url",
        Kind::NatsUrls,
        "nats://localhost:4222; setting it sets queue.backend to nats",
        "nats://localhost:4222",
        "The NATS servers; a comma list for a cluster.",
    ),
    unset(
        "queue.nats_creds",
        Kind::Path,
        "/etc/vlinder/node.creds",
        "A NATS credentials file. At most one of nats_creds, nats_nkey and nats_token.",
    ),
    unset(
        "queue.nats_nkey",
        Kind::Secret,
        "{ file = \"/etc/vlinder/node.nk\" }",
        "The seed of a NATS user key (begins with SU).",
    ),
    unset(
        "queue.nats_token",
        Kind::Secret,
        "{ file = \"/etc/vlinder/nats-token\" }",
        "A NATS token.",
    ),
    unset(
        "queue.nats_ca",
        Kind::Path,
        "/etc/vlinder/nats-ca.pem",
        "Certificates (PEM) that the NATS servers' must chain to.",
    ),
    unset(
        "queue.nats_cert",
        Kind::Path,
        "/etc/vlinder/nats-client.pem",
        "The client certificate (PEM) shown to NATS; needs nats_key.",
    ),
    unset(
        "queue.nats_key",
        Kind::Path,
        "/etc/vlinder/nats-client.key",
        "The key (PEM) of nats_cert.",
    ),
    is(
        "queue.replicas",
        Kind::Number { min: 1, max: 5 },
        "1",
        "On how many NATS servers each message is kept.",
    ),
    is(
        "queue.max_bytes",
        Kind::Size { min: 1 << 20 },
        "10GiB",
        "Size of the log. A full log refuses new work, it does not forget.",
    ),
    is(
        "queue.sync",
        Kind::Choice(&["interval", "always"]),
        "interval",
        "interval: a confirmed message survives any kill. always: also a power cut.",
    ),
    follows(
        "state.backend",
        Kind::Choice(&["local", "grpc"]),
        "local with a local queue, else grpc",
        "grpc",
        "How workers reach the record's projection.",
    ),
    is(
        "distributed.bind",
        Kind::Listen,
        "127.0.0.1",
        "The address on which this node's services listen. Beyond loopback only with an auth.token of at least 16 characters.",
    ),
    follows(
        "distributed.registry_addr",
        Kind::ServiceUrls(Service::Registry),
        "this node",
        "http://127.0.0.1:9090",
        "Where to connect to the registry. A comma list fails over. Set alone, it lends its host to the four below.",
    ),
    follows(
        "distributed.harness_addr",
        Kind::ServiceUrls(Service::Harness),
        LENT,
        "http://127.0.0.1:9091",
        "Where to connect to the harness.",
    ),
    follows(
        "distributed.state_addr",
        Kind::ServiceUrls(Service::State),
        LENT,
        "http://127.0.0.1:9092",
        "Where to connect to the state service.",
    ),
    follows(
        "distributed.secret_addr",
        Kind::ServiceUrls(Service::Secret),
        LENT,
        "http://127.0.0.1:9093",
        "Where to connect to the secret service.",
    ),
    follows(
        "distributed.catalog_addr",
        Kind::ServiceUrls(Service::Catalog),
        LENT,
        "http://127.0.0.1:9094",
        "Where to connect to the catalog.",
    ),
    follows(
        "distributed.ports.registry",
        PORT,
        BY_ADDRESS,
        "9090",
        "Where the registry listens; 0 = any free port, shown by `vlinder worker list` and in run/addresses.json.",
    ),
    follows(
        "distributed.ports.harness",
        PORT,
        BY_ADDRESS,
        "9091",
        "Where the harness listens.",
    ),
    follows(
        "distributed.ports.state",
        PORT,
        BY_ADDRESS,
        "9092",
        "Where the state service listens.",
    ),
    follows(
        "distributed.ports.secret",
        PORT,
        BY_ADDRESS,
        "9093",
        "Where the secret service listens.",
    ),
    follows(
        "distributed.ports.catalog",
        PORT,
        BY_ADDRESS,
        "9094",
        "Where the catalog listens.",
    ),
    is(
        "distributed.ports.http",
        PORT,
        "7777",
        "Where the console, health, metrics, events and the OpenAI-compatible routes listen. VLINDER_SESSION_PORT is another name of it.",
    ),
    is(
        "distributed.ports.bridge",
        PORT,
        "3544",
        "Where the bridge listens that agents call.",
    ),
    is(
        "distributed.workers.registry",
        COUNT,
        "1",
        "How many workers know agents, models, fleets and nodes. 0 disables a worker type.",
    ),
    is(
        "distributed.workers.harness",
        COUNT,
        "1",
        "How many workers take turns from clients.",
    ),
    follows(
        "distributed.workers.infra",
        COUNT,
        AS_REGISTRY,
        "1",
        "How many workers stand ready to do what the cluster needs once, such as ending overdue turns.",
    ),
    follows(
        "distributed.workers.state",
        COUNT,
        AS_REGISTRY,
        "1",
        "How many workers project the record into SQLite and answer queries.",
    ),
    follows(
        "distributed.workers.secret",
        COUNT,
        AS_REGISTRY,
        "1",
        "How many workers hold secrets.",
    ),
    follows(
        "distributed.workers.catalog",
        COUNT,
        AS_REGISTRY,
        "1",
        "How many workers know which upstream offers which model.",
    ),
    is(
        "distributed.workers.dag_git",
        COUNT,
        "1",
        "How many workers project the record into a git repository.",
    ),
    is(
        "distributed.workers.session_viewer",
        COUNT,
        "1",
        "How many workers serve the console.",
    ),
    is(
        "distributed.workers.agent.container",
        COUNT,
        "1",
        "How many workers run agents in containers.",
    ),
    follows(
        "distributed.workers.agent.process",
        COUNT,
        "1 with a local queue, else 0",
        "1",
        "How many workers run agents as child processes.",
    ),
    is(
        "distributed.workers.agent.lambda",
        COUNT,
        "0",
        "How many workers invoke agents on AWS Lambda.",
    ),
    is(
        "distributed.workers.inference.ollama",
        COUNT,
        "1",
        "How many workers do inference through ollama.endpoint.",
    ),
    is(
        "distributed.workers.inference.openrouter",
        COUNT,
        "0",
        "How many workers do inference through OpenRouter; they need openrouter.api_key, or the secret of that name.",
    ),
    is(
        "distributed.workers.inference.openai",
        COUNT,
        "0",
        "How many workers do inference through openai.endpoint, which they need.",
    ),
    is(
        "distributed.workers.inference.anthropic",
        COUNT,
        "0",
        "How many workers do inference through anthropic.endpoint; they need anthropic.api_key, or the secret of that name.",
    ),
    is(
        "distributed.workers.inference.local",
        COUNT,
        "0",
        "How many workers do inference themselves; needs local.model or local.embedding_model.",
    ),
    is(
        "distributed.workers.storage.object.sqlite",
        COUNT,
        "1",
        "How many workers serve key-value storage in SQLite.",
    ),
    is(
        "distributed.workers.storage.vector.sqlite",
        COUNT,
        "1",
        "How many workers serve vector storage in SQLite.",
    ),
    follows(
        "auth.token",
        Kind::Secret,
        "made at first start in run/token",
        "{ file = \"/etc/vlinder/token\" }",
        "What every RPC and route asks for (`Authorization: Bearer`), on loopback too. The nodes of one cluster share it.",
    ),
    is(
        "ollama.endpoint",
        Kind::Url,
        "http://localhost:11434",
        "The Ollama server.",
    ),
    is(
        "openrouter.endpoint",
        Kind::Url,
        "https://openrouter.ai/api/v1",
        "OpenRouter, or what stands in for it.",
    ),
    unset(
        "openrouter.api_key",
        Kind::Secret,
        "${OPENROUTER_API_KEY}",
        "The key of the OpenRouter account; where it is not set, the secret openrouter.api_key.",
    ),
    unset(
        "openai.endpoint",
        Kind::Url,
        "http://localhost:8000/v1",
        "Any OpenAI-compatible server: vLLM, llama-server, LiteLLM and others.",
    ),
    unset(
        "openai.api_key",
        Kind::Secret,
        "${OPENAI_API_KEY}",
        "Its key, if it asks for one; where it is not set, the secret openai.api_key.",
    ),
    is(
        "anthropic.endpoint",
        Kind::Url,
        "https://api.anthropic.com",
        "Anthropic, or any server that speaks its format.",
    ),
    unset(
        "anthropic.api_key",
        Kind::Secret,
        "${ANTHROPIC_API_KEY}",
        "Its key; where it is not set, the secret anthropic.api_key.",
    ),
    unset(
        "local.model",
        Kind::Path,
        "/var/lib/vlinder/model.gguf",
        "A GGUF file for inference inside the worker.",
    ),
    unset(
        "local.embedding_model",
        Kind::Path,
        "/var/lib/vlinder/embedding.gguf",
        "A GGUF file for embeddings inside the worker.",
    ),
    unset(
        "s3.endpoint",
        Kind::Url,
        "http://localhost:9000",
        "The S3-compatible server of s3:// stores. Without it AWS_ENDPOINT_URL_S3 and AWS_ENDPOINT_URL count, then AWS itself.",
    ),
    unset(
        "s3.region",
        Kind::Text,
        "eu-central-1",
        "The region of the buckets. Without it AWS_REGION and AWS_DEFAULT_REGION count, then us-east-1.",
    ),
    unset(
        "s3.access_key_id",
        Kind::Text,
        "AKIAIOSFODNN7EXAMPLE",
        "The key id of the account; needs secret_access_key. Without it the AWS_ variables count, then the role of the machine.",
    ),
    unset(
        "s3.secret_access_key",
        Kind::Secret,
        "{ file = \"/etc/vlinder/s3-secret\" }",
        "The secret key of the account.",
    ),
    is(
        "runtime.image_policy",
        Kind::Choice(&["mutable", "pinned"]),
        "mutable",
        "mutable: run what the tag names now. pinned: resolve the tag to a digest at deploy and run that.",
    ),
    is(
        "runtime.docker_host",
        Kind::DockerHost,
        "auto",
        "auto, or a socket or URL of an engine on this machine; Podman's Docker-compatible socket works.",
    ),
    is(
        "runtime.lambda_region",
        Kind::Text,
        "us-east-1",
        "The AWS region of Lambda agents.",
    ),
    is(
        "runtime.lambda_memory_mb",
        Kind::Number {
            min: 128,
            max: 10240,
        },
        "512",
        "Memory of a Lambda agent, in MB.",
    ),
    is(
        "runtime.lambda_timeout_secs",
        Kind::Number { min: 1, max: 900 },
        "300",
        "Deadline of one Lambda invocation, in seconds.",
    ),
    is(
        "runtime.lambda_vpc_subnet_ids",
        Kind::Words,
        "",
        "Subnets of Lambda agents.",
    ),
    is(
        "runtime.lambda_vpc_security_group_ids",
        Kind::Words,
        "",
        "Security groups of Lambda agents.",
    ),
    unset(
        "runtime.lambda_endpoint",
        Kind::Url,
        "http://localhost:4566",
        "An AWS-compatible endpoint in place of AWS.",
    ),
    is(
        "supervisor.restart_initial",
        Kind::Span {
            min_ms: 1,
            max_ms: HOUR_MS,
        },
        "100ms",
        "The first restart is at once, the second after this long, then twice as long each time.",
    ),
    is(
        "supervisor.restart_max",
        Kind::Span {
            min_ms: 1,
            max_ms: HOUR_MS,
        },
        "30s",
        "The longest pause between two restarts.",
    ),
    is(
        "supervisor.restart_jitter_percent",
        Kind::Number { min: 0, max: 100 },
        "20",
        "By how much a pause varies at random, so that workers do not return in step.",
    ),
    is(
        "supervisor.restart_budget",
        Kind::Number { min: 1, max: 1000 },
        "5",
        "This many restarts within supervisor.restart_window, and a worker counts as crash-looping.",
    ),
    is(
        "supervisor.restart_window",
        Kind::Span {
            min_ms: SECOND_MS,
            max_ms: 24 * HOUR_MS,
        },
        "60s",
        "The window of the budget. A worker that lives this long starts again with a full budget and no pause.",
    ),
    is(
        "supervisor.crash_loop_retry",
        Kind::Span {
            min_ms: SECOND_MS,
            max_ms: 24 * HOUR_MS,
        },
        "60s",
        "How far apart the tries of a crash-looping worker are.",
    ),
    is(
        "supervisor.start_deadline",
        DEADLINE,
        "30s",
        "A worker that is not ready after this long is ended and tried again.",
    ),
    is(
        "supervisor.drain_deadline",
        DEADLINE,
        "20s",
        "How long running work may take to finish when a worker or the node stops.",
    ),
    is(
        "supervisor.kill_deadline",
        DEADLINE,
        "5s",
        "How long to wait for the end of a worker after it was killed, before it is given up as stuck.",
    ),
    is(
        "supervisor.unresponsive_deadline",
        DEADLINE,
        "5s",
        "A worker whose loop shows no progress for this long is replaced.",
    ),
    unset(
        "supervisor.memory_limit",
        Kind::Size { min: 16 << 20 },
        "512MiB",
        "Memory of each worker process; one that takes more is ended and restarted. Without it there is no limit.",
    ),
];
