//! Which models the upstream has, and what follows from it: what the cluster is told, and which
//! queues are pulled.
//!
//! No upstream tells by itself, so it is asked: at the start, every [`LOOK_EVERY`], and at once when
//! a call finds that the upstream is away or lacks its model. This is the one poll of the worker,
//! one small GET. The list decides over the upstream's health too: where it cannot be had, the
//! upstream is away, nothing is offered and nothing is pulled until it can be had again.

use crate::Backend;
use crate::call::Calls;
use crate::circuit::Circuits;
use crate::queues::Queues;
use crate::upstream::Upstream;
use serde_json::json;
use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use vlinder_bus::streams::BUCKET_OFFERS;
use vlinder_core::Selector;
use vlinder_worker::infra::{Infra, InfraView, MODEL};
use vlinder_worker::offers::{self, Offer, OfferedModel};
use vlinder_worker::{Error, ServiceHandler, WorkerCx};

/// How often the upstream is asked. A change must show everywhere within 5 s.
const LOOK_EVERY: Duration = Duration::from_secs(4);
/// How soon an upstream that is away is asked again: first, doubling up to [`LOOK_EVERY`].
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// The least time between two looks, however many calls ask for one.
const LOOK_FLOOR: Duration = Duration::from_millis(100);
/// An offer is written again so often even without news: kv may lose it.
const OFFER_AGAIN: Duration = Duration::from_secs(60);
/// Most models that one worker pulls the work of: each costs the bus two durable queues and each
/// worker two open pulls. Where an upstream has more (OpenRouter has hundreds), those that deployed
/// agents name come first; the others are listed, but no agent can use them.
const MODELS_SERVED_MAX: usize = 64;
/// How long a call waits for a look that it asked for.
const LOOK_DEADLINE: Duration = Duration::from_secs(5);

/// What the worker knows of its upstream; shared by discovery, which writes it, and the calls.
pub struct Health {
    known: watch::Sender<Known>,
    look: Notify,
}

#[derive(Debug, Clone, Default)]
struct Known {
    /// Counts the looks.
    round: u64,
    /// Why it is away.
    away: Option<String>,
    /// What it is served for.
    models: Arc<BTreeSet<Selector>>,
}

impl Health {
    /// Nothing is known yet.
    pub fn new() -> Self {
        Self {
            known: watch::Sender::new(Known::default()),
            look: Notify::new(),
        }
    }

    /// Asks the upstream again soon.
    pub fn look_now(&self) {
        self.look.notify_one();
    }

    /// Ready when the upstream is away; says why.
    pub async fn away(&self) -> String {
        let mut known = self.known.subscribe();
        let away = known.wait_for(|known| known.away.is_some()).await;
        // The sender is a field of `self`: there is always a value.
        away.ok()
            .and_then(|known| known.away.clone())
            .unwrap_or_default()
    }

    /// Looks again and says whether `model` is still offered. If the look takes too long: yes, so
    /// that the answer that raised the question is kept.
    pub async fn still_offers(&self, model: &str) -> bool {
        let mut known = self.known.subscribe();
        let round = known.borrow().round;
        self.look_now();
        let looked = known.wait_for(|known| known.round > round);
        match tokio::time::timeout(LOOK_DEADLINE, looked).await {
            Ok(Ok(known)) => known.models.iter().any(|name| name.as_str() == model),
            Ok(Err(_)) | Err(_) => true,
        }
    }

    fn learn(&self, away: Option<String>, models: BTreeSet<Selector>) {
        self.known.send_modify(|known| {
            known.round += 1;
            known.away = away;
            known.models = Arc::new(models);
        });
    }
}

/// Looks, tells and pulls until the worker drains.
pub async fn run(
    cx: WorkerCx,
    upstream: Arc<Upstream>,
    health: Arc<Health>,
    circuits: Arc<Circuits>,
    calls: Arc<Calls>,
    slots: usize,
) -> Result<(), Error> {
    let infra = InfraView::start(&cx).await?;
    let handler = ServiceHandler::new(cx.clone(), calls);
    let queues = Queues::new(cx.clone(), upstream.backend(), handler, slots);
    cx.control.note("upstream", &upstream.shown());
    let mut discovery = Discovery {
        cx,
        upstream,
        health,
        circuits,
        infra,
        queues,
        offered: None,
        told: None,
        away_for: 0,
    };
    let ended = discovery.look_until_drained().await;
    discovery.withdraw().await;
    discovery.queues.finish().await?;
    ended
}

struct Discovery {
    cx: WorkerCx,
    upstream: Arc<Upstream>,
    health: Arc<Health>,
    circuits: Arc<Circuits>,
    infra: InfraView,
    queues: Queues,
    /// What the cluster was told last, and when.
    offered: Option<(Offer, Instant)>,
    /// What the supervisor was told last: why the worker waits, if it does.
    told: Option<Option<String>>,
    /// Looks in a row that failed.
    away_for: u32,
}

impl Discovery {
    async fn look_until_drained(&mut self) -> Result<(), Error> {
        let drain = self.cx.drain.clone();
        loop {
            tokio::select! {
                biased;
                () = drain.cancelled() => return Ok(()),
                () = self.look() => {}
            }
            let looked = Instant::now();
            let next = looked + self.pause();
            loop {
                tokio::select! {
                    () = drain.cancelled() => return Ok(()),
                    () = tokio::time::sleep_until(next) => break,
                    () = self.upstream.key_changed() => break,
                    () = self.health.look.notified() => {
                        tokio::time::sleep_until(looked + LOOK_FLOOR).await;
                        break;
                    }
                    ended = self.queues.ended() => ended?,
                }
            }
        }
    }

    fn pause(&self) -> Duration {
        match self.away_for {
            0 => LOOK_EVERY,
            looks => (LOOK_AGAIN * 2u32.pow((looks - 1).min(8))).min(LOOK_EVERY),
        }
    }

    async fn look(&mut self) {
        match self.upstream.list().await {
            Ok(models) => self.upstream_has(models).await,
            Err(error) => self.upstream_is_away(error.to_string()).await,
        }
    }

    async fn upstream_has(&mut self, models: Vec<OfferedModel>) {
        let backend = self.upstream.backend();
        let names = selectors(backend, &models);
        let served = within_limit(names, &named_by_agents(&self.infra.now()));
        self.away_for = 0;
        self.health.learn(None, served.clone());
        self.queues.serve(&served);
        self.make_known(&served).await;
        let failing = self.circuits.open();
        self.note_circuits(failing.len());
        // Its work is still pulled, so that whoever asks is told, and one call may probe; but it is not
        // offered, so that others who have it are asked first.
        let offered = models.into_iter().filter(|model| {
            !failing
                .keys()
                .any(|failing| is_named(backend, &model.name, failing))
        });
        let offered = offered.collect();
        let failing: Vec<String> = failing.into_values().collect();
        let problem = (!failing.is_empty())
            .then(|| format!("{}: {}", self.upstream.shown(), failing.join("; ")));
        self.tell(problem);
        self.offer(offered, None).await;
    }

    /// For `worker list` and the metrics.
    fn note_circuits(&self, open: usize) {
        let control = &self.cx.control;
        control.note("circuits_open", &open.to_string());
        control.note("circuits_opened_total", &self.circuits.opened().to_string());
    }

    async fn upstream_is_away(&mut self, problem: String) {
        self.away_for = self.away_for.saturating_add(1);
        self.health.learn(Some(problem.clone()), BTreeSet::new());
        self.queues.serve(&BTreeSet::new());
        self.tell(Some(problem.clone()));
        self.offer(vec![], Some(problem)).await;
    }

    /// Tells the supervisor, if it is news.
    fn tell(&mut self, problem: Option<String>) {
        if self.told.as_ref() == Some(&problem) {
            return;
        }
        match &problem {
            Some(problem) => {
                tracing::info!(problem, "the upstream is away or fails");
                self.cx.control.waiting(problem);
            }
            None => {
                tracing::info!(upstream = self.upstream.shown(), "the upstream is there");
                self.cx.control.ready();
            }
        }
        self.told = Some(problem);
    }

    /// Records models that nobody has ever offered, so that agents are told at once about names
    /// that nobody knows. What fails is tried again with the next look.
    async fn make_known(&self, served: &BTreeSet<Selector>) {
        let backend = self.upstream.backend().as_str();
        let known = self.infra.now();
        for model in served {
            if known.model_known(backend, model.as_str()) {
                continue;
            }
            let name = format!("{backend}/{model}");
            let value = json!({ "backend": backend, "model": model.as_str() });
            match self.infra.append(MODEL, &name, Some(&value)).await {
                // Another worker was first, which is as good.
                Ok(_) | Err(vlinder_bus::Error::Conflict { .. }) => {}
                Err(error) => {
                    tracing::warn!(name, %error, "a new model could not be made known");
                    return;
                }
            }
        }
    }

    /// Tells the cluster, if there is news or nothing was said for long.
    async fn offer(&mut self, models: Vec<OfferedModel>, problem: Option<String>) {
        let offer = Offer {
            node: self.cx.id.node.to_string(),
            backend: self.upstream.backend().to_string(),
            endpoint: self.upstream.shown(),
            models,
            problem,
        };
        if let Some((told, when)) = &self.offered
            && *told == offer
            && when.elapsed() < OFFER_AGAIN
        {
            return;
        }
        self.cx
            .control
            .note("models", &offer.models.len().to_string());
        match offers::publish(&self.cx, &offer).await {
            Ok(()) => self.offered = Some((offer, Instant::now())),
            Err(error) => tracing::warn!(%error, "could not tell which models are offered"),
        }
    }

    /// This worker offers nothing any more.
    async fn withdraw(&self) {
        let key = offers::offer_key(&self.cx, self.upstream.backend().as_str());
        if let Err(error) = self.cx.bus.kv_delete(BUCKET_OFFERS, &key, None).await {
            tracing::debug!(%error, "the offer was not withdrawn");
        }
    }
}

/// The names under which the models may be asked for: as the upstream spells them, and with Ollama
/// also without the tag `latest`.
fn selectors(backend: Backend, models: &[OfferedModel]) -> BTreeSet<Selector> {
    let mut selectors = BTreeSet::new();
    for model in models {
        let names = [Some(model.name.as_str()), alias(backend, &model.name)];
        let names = names.into_iter().flatten();
        selectors.extend(names.filter_map(|name| Selector::new(name).ok()));
    }
    selectors
}

/// With Ollama the tag `latest` may be left out.
fn alias(backend: Backend, name: &str) -> Option<&str> {
    match backend {
        Backend::Ollama => name.strip_suffix(":latest"),
        Backend::Openai | Backend::Openrouter | Backend::Anthropic => None,
    }
}

/// Whether the model of that name may be asked for as `selector`.
pub fn is_named(backend: Backend, name: &str, selector: &Selector) -> bool {
    name == selector.as_str() || alias(backend, name) == Some(selector.as_str())
}

/// The models that deployed agents name.
fn named_by_agents(infra: &Infra) -> HashSet<String> {
    let mut named = HashSet::new();
    for (version, _) in infra.agents() {
        let names = version.manifest.requirements.model_names();
        named.extend(names.into_iter().map(str::to_owned));
    }
    named
}

/// At most [`MODELS_SERVED_MAX`] of the models, those with a `named` one first.
fn within_limit(models: BTreeSet<Selector>, named: &HashSet<String>) -> BTreeSet<Selector> {
    if models.len() <= MODELS_SERVED_MAX {
        return models;
    }
    let (first, second): (Vec<_>, Vec<_>) = models
        .into_iter()
        .partition(|model| named.contains(model.as_str()));
    first
        .into_iter()
        .chain(second)
        .take(MODELS_SERVED_MAX)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_too_many_models_those_that_agents_name_are_served() {
        let many = |count: usize| -> BTreeSet<Selector> {
            let name = |n| Selector::new(format!("m{n:03}")).unwrap();
            (0..count).map(name).collect()
        };
        let named = HashSet::from(["m399".to_owned(), "elsewhere".to_owned()]);
        assert_eq!(within_limit(many(64), &named), many(64));
        let served = within_limit(many(400), &named);
        assert_eq!(served.len(), MODELS_SERVED_MAX);
        assert!(served.contains(&Selector::new("m399").unwrap()));
        assert!(!served.contains(&Selector::new("m398").unwrap()));
    }

    #[test]
    fn the_tag_latest_may_be_left_out_with_ollama_only() {
        let offered = |name: &str| OfferedModel {
            name: name.to_owned(),
            size: None,
        };
        let models = [offered("a:latest"), offered("b:7b"), offered(":latest")];
        let names = |backend| -> Vec<String> {
            let selectors = selectors(backend, &models);
            selectors.iter().map(ToString::to_string).collect()
        };
        assert_eq!(names(Backend::Ollama), [":latest", "a", "a:latest", "b:7b"]);
        assert_eq!(names(Backend::Openai), [":latest", "a:latest", "b:7b"]);
    }
}
