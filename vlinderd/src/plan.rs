//! From configuration to the supervisor's plan.

use crate::worker::{self, WorkerConfig};
use crate::{listeners::Listeners, roles};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;
use vlinder_bus::Bus;
use vlinder_config::{Config, QueueBackend};
use vlinder_core::WorkerRole;
use vlinder_supervisor::{Limits, Plan, Policy, ProcessProgram, Program, RolePlan};

/// Stages of the start: each role waits for what it may need to answer its first call.
pub const START_ORDER: [&[WorkerRole]; 5] = [
    &[WorkerRole::Secret],
    &[WorkerRole::State],
    &[WorkerRole::Registry],
    &[WorkerRole::Catalog],
    &[WorkerRole::Harness],
];

/// Stages of the drain: first nobody takes new turns and those that run finish, then what turns call,
/// then the rest.
pub const DRAIN_ORDER: [&[WorkerRole]; 3] = [
    &[
        WorkerRole::Harness,
        WorkerRole::AgentContainer,
        WorkerRole::AgentProcess,
        WorkerRole::AgentLambda,
    ],
    &[
        WorkerRole::InferenceOllama,
        WorkerRole::InferenceOpenai,
        WorkerRole::InferenceOpenrouter,
        WorkerRole::InferenceAnthropic,
        WorkerRole::InferenceLocal,
        WorkerRole::StorageObjectSqlite,
        WorkerRole::StorageVectorSqlite,
    ],
    &[
        WorkerRole::Registry,
        WorkerRole::Catalog,
        WorkerRole::Secret,
        WorkerRole::State,
        WorkerRole::Infra,
    ],
];

/// Backoff, budgets and deadlines.
pub fn policy(config: &Config) -> Policy {
    let limits = &config.supervisor;
    Policy {
        backoff_first: limits.restart_initial,
        backoff_max: limits.restart_max,
        budget: limits.restart_budget,
        slow_retry: limits.crash_loop_retry,
        good_stretch: limits.restart_window,
        start_deadline: limits.start_deadline,
        drain_deadline: limits.drain_deadline,
        unresponsive: limits.unresponsive_deadline,
    }
}

/// What to run. `bus` is shared with the workers in embedded mode. `before` is the configuration
/// that runs now: workers that use nothing of what changed since are told the new one and stay.
pub fn plan(
    config: &Arc<Config>,
    before: Option<&Config>,
    data_dir: &Path,
    token: &str,
    listeners: &Listeners,
    bus: &Bus,
) -> Plan {
    let roles = roles::SUPPORTED.into_iter().map(|role| {
        let told = WorkerConfig {
            config: (**config).clone(),
            data_dir: data_dir.to_owned(),
            token: token.to_owned(),
        };
        RolePlan {
            role,
            count: config.workers.count(role),
            program: match config.queue.backend {
                QueueBackend::Nats => process(role),
                QueueBackend::Local => task(config, data_dir, token, bus),
            },
            config: worker_view(role, told),
            listeners: listeners.of(role).into_iter().collect(),
            limits: Limits {
                memory_bytes: config.supervisor.memory_limit,
                ..Limits::default()
            },
            reloads_live: before.is_some_and(|before| used(role, before) == used(role, config)),
        }
    });
    Plan {
        roles: roles.collect(),
    }
}

/// What a role is told. Counts concern the supervisor alone; a change of them is no news.
fn worker_view(_role: WorkerRole, mut told: WorkerConfig) -> serde_json::Value {
    told.config.workers = vlinder_config::Workers::default();
    serde_json::to_value(told).unwrap_or_default()
}

/// The settings that a worker of the role takes from its start to its end. All others it either
/// follows while it runs (the log level) or never looks at.
fn used(role: WorkerRole, config: &Config) -> serde_json::Value {
    match role {
        WorkerRole::Registry => json!([config.node.dead_after]),
        WorkerRole::AgentContainer | WorkerRole::AgentProcess | WorkerRole::AgentLambda => {
            json!([
                config.node.labels,
                config.runtime,
                config.supervisor.drain_deadline
            ])
        }
        WorkerRole::InferenceOllama => json!(config.ollama),
        WorkerRole::InferenceOpenrouter => json!(config.openrouter),
        WorkerRole::InferenceOpenai => json!(config.openai),
        WorkerRole::InferenceAnthropic => json!(config.anthropic),
        WorkerRole::InferenceLocal => json!(config.local),
        WorkerRole::StorageObjectSqlite | WorkerRole::StorageVectorSqlite => json!(config.s3),
        WorkerRole::Secret
        | WorkerRole::State
        | WorkerRole::Catalog
        | WorkerRole::Harness
        | WorkerRole::Infra
        | WorkerRole::DagGit
        | WorkerRole::SessionViewer => json!(null),
    }
}

fn process(role: WorkerRole) -> Program {
    Program::Process(ProcessProgram {
        program: "/proc/self/exe".into(),
        name: format!("vlinderd-{role}").into(),
        args: vec!["worker".into()],
        env: vec![],
    })
}

fn task(config: &Arc<Config>, data_dir: &Path, token: &str, bus: &Bus) -> Program {
    let (config, data_dir) = (config.clone(), data_dir.to_owned());
    let (token, bus) = (token.to_owned(), bus.clone());
    Program::Task(Arc::new(move |start, handle, events| {
        let (config, data_dir) = (config.clone(), data_dir.clone());
        let (token, bus) = (token.clone(), bus.clone());
        let span = tracing::error_span!("worker", role = start.role.as_str(), index = start.index);
        let work = worker::serve(start, handle, events, bus, config, data_dir, token);
        Box::pin(tracing::Instrument::instrument(work, span))
    }))
}
