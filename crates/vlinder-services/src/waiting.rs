//! Why a turn waits, as far as the log, the nodes' reports and the claims on replicas tell.
//!
//! Asked only of turns that have taken a while, so it may cost some reads; it changes nothing, and
//! where it cannot read it says nothing.

use std::collections::HashSet;
use std::time::Duration;
use vlinder_bus::Subject;
use vlinder_core::manifest::{AgentManifest, RuntimeKind};
use vlinder_core::record::{Invoke, Request};
use vlinder_core::{AgentName, CallKey, Selector, WorkerRole};
use vlinder_worker::infra::{Infra, InfraView, MODEL};
use vlinder_worker::service::answers_of;
use vlinder_worker::serving::Serving;
use vlinder_worker::{WorkerCx, replicas};

/// Services that nobody serves at the moment whose open calls are looked through for one of the turn;
/// those that the agent's manifest names come first.
const SERVICES_MAX: usize = 64;
/// Calls to one of them that are looked through: nobody serves it, so few can have come since the
/// turn began.
const CALLS_MAX: usize = 256;

/// A turn younger than this may be at work without the reports of nodes telling so yet.
const HELD_TOLD_WITHIN: Duration = Duration::from_millis(2500);

/// Why the turn that `invoke` began at `seq`, so long ago, has not ended; `None` when somebody can
/// work on it.
pub async fn why(
    cx: &WorkerCx,
    infra: &InfraView,
    invoke: &Invoke,
    seq: u64,
    age: Duration,
) -> Option<String> {
    match try_why(cx, &infra.now(), invoke, seq, age).await {
        Ok(reason) => reason,
        Err(error) => {
            tracing::debug!(%error, "why a turn waits cannot be found out");
            None
        }
    }
}

async fn try_why(
    cx: &WorkerCx,
    infra: &Infra,
    invoke: &Invoke,
    seq: u64,
    age: Duration,
) -> Result<Option<String>, vlinder_bus::Error> {
    let Some((version, _)) = infra.agent(&invoke.agent) else {
        return Ok(None);
    };
    let serving = Serving::read(&cx.bus).await?;
    let role = match version.manifest.runtime {
        RuntimeKind::Container => WorkerRole::AgentContainer,
        RuntimeKind::Process => WorkerRole::AgentProcess,
        RuntimeKind::Lambda => WorkerRole::AgentLambda,
    };
    if let Some(reason) = serving.why_no_worker(role) {
        return Ok(Some(reason));
    }
    if let Some(reason) = why_no_replica(cx, &invoke.agent).await? {
        return Ok(Some(reason));
    }
    if age > HELD_TOLD_WITHIN && !serving.holds(&format!("{}:{seq}", cx.log())) {
        let agent = &invoke.agent;
        return Ok(Some(format!("every replica of agent {agent} is busy")));
    }
    let mut answered = None;
    for service in unserved(infra, &version.manifest, &serving) {
        let calls = calls_to(cx, &service, invoke, seq).await?;
        if calls.is_empty() {
            continue;
        }
        let answered = match &answered {
            Some(answered) => answered,
            None => {
                let answers = answers_of(cx, &invoke.submission).await?;
                let keys = answers.into_iter().map(|(result, _)| result.key);
                answered.insert(keys.collect::<HashSet<CallKey>>())
            }
        };
        if calls.iter().any(|key| !answered.contains(key)) {
            return Ok(Some(service.reason));
        }
    }
    Ok(None)
}

async fn why_no_replica(
    cx: &WorkerCx,
    agent: &AgentName,
) -> Result<Option<String>, vlinder_bus::Error> {
    let claims = replicas::read_all(&cx.bus).await?;
    let of_agent: Vec<_> = claims.iter().filter(|(name, ..)| name == agent).collect();
    if of_agent.iter().any(|(.., claim)| claim.state == "ready") {
        return Ok(None);
    }
    let why = of_agent
        .iter()
        .map(|(.., claim)| claim.reason.as_str())
        .find(|reason| !reason.is_empty());
    let why = why.unwrap_or("it is starting");
    Ok(Some(format!("no replica of agent {agent} is ready: {why}")))
}

/// A service that nobody serves now.
struct Unserved {
    service: &'static str,
    backend: String,
    selector: Selector,
    reason: String,
}

/// What the agent may have called that nobody serves now.
fn unserved(infra: &Infra, manifest: &AgentManifest, serving: &Serving) -> Vec<Unserved> {
    let named = manifest.requirements.model_names();
    let stores = [
        ("kv", manifest.object_store()),
        ("vec", manifest.vector_store()),
    ];
    let stores = stores
        .into_iter()
        .filter_map(|(service, store)| store.map(|store| (service, store.scheme, store.path)));
    let mut models: Vec<(&str, &str)> = infra
        .all(MODEL)
        .filter_map(|(name, _)| name.split_once('/'))
        .collect();
    models.sort_by_key(|(_, model)| !named.contains(*model));
    let models = models.into_iter().flat_map(|(backend, model)| {
        ["infer", "embed"].map(|service| (service, backend.to_owned(), model.to_owned()))
    });
    stores
        .chain(models)
        .filter_map(|(service, backend, selector)| {
            Some(Unserved {
                reason: serving.why_call_waits(service, &backend, &selector)?,
                selector: Selector::new(&selector).ok()?,
                service,
                backend,
            })
        })
        .take(SERVICES_MAX)
        .collect()
}

/// The keys of the turn's calls to a service.
async fn calls_to(
    cx: &WorkerCx,
    service: &Unserved,
    invoke: &Invoke,
    seq: u64,
) -> Result<Vec<CallKey>, vlinder_bus::Error> {
    let subject = Subject::Req {
        ns: cx.ns.clone(),
        service: service.service.to_owned(),
        backend: service.backend.clone(),
        selector: service.selector.clone(),
    };
    let since = cx
        .bus
        .range(&cx.log(), &subject.to_string(), seq + 1, CALLS_MAX)
        .await?;
    let requests = since
        .iter()
        .filter_map(|stored| Request::try_from(&stored.node).ok());
    Ok(requests
        .filter(|request| request.submission == invoke.submission)
        .map(|request| request.key)
        .collect())
}
