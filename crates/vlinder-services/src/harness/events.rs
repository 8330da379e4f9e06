//! Changes as they happen: turns and deployments from the log, nodes, workers and healings from kv.
//!
//! Ids are `<stream>:<sequence>` for what the log stored, and `kv:<revision>` for the rest: each
//! grows and is unique. Live only; what is missed is in the log.

use crate::status;
use futures::{Stream, StreamExt};
use std::collections::HashMap;
use tonic::Status;
use vlinder_bus::heal::Healing;
use vlinder_bus::streams::{BUCKET_HEALING, BUCKET_NODES};
use vlinder_bus::{KvEvent, Stored, subjects};
use vlinder_core::Kind;
use vlinder_proto::harness::Event;
use vlinder_worker::WorkerCx;
use vlinder_worker::nodes::NodeReport;

/// Longest prefix, in bytes.
const PREFIX_BYTES_MAX: usize = 128;

/// All events whose name begins with `prefix`, from now on.
pub async fn stream(
    cx: &WorkerCx,
    prefix: String,
) -> Result<impl Stream<Item = Result<Event, Status>> + Send + 'static, Status> {
    if prefix.len() > PREFIX_BYTES_MAX {
        return Err(Status::invalid_argument(
            "prefix: expected at most 128 bytes",
        ));
    }
    let log = cx
        .bus
        .seen(&subjects::all_of(&cx.ns))
        .await
        .map_err(status::of_bus)?;
    let kv = cx
        .bus
        .kv_watch(BUCKET_NODES)
        .await
        .map_err(status::of_bus)?;
    let healings = cx
        .bus
        .kv_watch(BUCKET_HEALING)
        .await
        .map_err(status::of_bus)?;
    let mut told = Healings::default();
    let from_healings = healings.flat_map(move |event| {
        let events = match event {
            Ok(event) => told.take(event).into_iter().map(Ok).collect(),
            Err(error) => vec![Err(status::of_bus(error))],
        };
        futures::stream::iter(events)
    });
    let from_log = log
        .filter_map(|stored| async move { of_log(&stored) })
        .map(Ok);
    let mut known: HashMap<String, NodeReport> = HashMap::new();
    let mut current = false;
    let from_kv = kv.flat_map(move |event| {
        let events = match event {
            Ok(KvEvent::Current) => {
                current = true;
                vec![]
            }
            Ok(KvEvent::Put(entry)) => match serde_json::from_slice::<NodeReport>(&entry.value) {
                Ok(report) => {
                    let before = known.insert(report.node.clone(), report.clone());
                    let changes = if current {
                        changes(before.as_ref(), &report)
                    } else {
                        vec![]
                    };
                    let numbered = changes
                        .into_iter()
                        .enumerate()
                        .map(|(index, (name, data))| {
                            let id = format!("kv:{}.{index}", entry.revision);
                            Ok(Event {
                                id,
                                name,
                                time_ms: entry.time_ms,
                                data: data.to_string(),
                            })
                        });
                    numbered.collect()
                }
                Err(_) => vec![],
            },
            Ok(KvEvent::Gone { .. }) => vec![],
            Err(error) => vec![Err(status::of_bus(error))],
        };
        futures::stream::iter(events)
    });
    let both = futures::stream::select(from_log, from_kv);
    let all = futures::stream::select(both, from_healings);
    Ok(all.filter(move |event| {
        let keep = event
            .as_ref()
            .map_or(true, |event| event.name.starts_with(&prefix));
        futures::future::ready(keep)
    }))
}

/// What was told of healings: their beginning and their end, each once.
#[derive(Default)]
struct Healings {
    current: bool,
    known: HashMap<String, (u64, bool)>,
}

impl Healings {
    fn take(&mut self, event: KvEvent) -> Option<Event> {
        let entry = match event {
            KvEvent::Current => {
                self.current = true;
                return None;
            }
            KvEvent::Put(entry) => entry,
            KvEvent::Gone { .. } => return None,
        };
        let healing: Healing = serde_json::from_slice(&entry.value).ok()?;
        let state = (healing.epoch, healing.done);
        let known = self.known.insert(entry.key, state);
        if !self.current || known == Some(state) {
            return None;
        }
        let name = if healing.done {
            "log.healed"
        } else {
            "log.healing"
        };
        Some(Event {
            id: format!("heal:{}", entry.revision),
            name: name.to_owned(),
            time_ms: entry.time_ms,
            data: serde_json::to_string(&healing).unwrap_or_default(),
        })
    }
}

fn of_log(stored: &Stored) -> Option<Event> {
    let field = |name: &str| stored.node.field(name).unwrap_or_default().to_owned();
    let (name, stream) = match stored.node.kind {
        Kind::Invoke => ("turn.started".to_owned(), "log"),
        Kind::End => ("turn.ended".to_owned(), "log"),
        Kind::Session => (format!("session.{}", field("verb")), "ctl"),
        Kind::Infra => {
            let verb = if field("verb") == "delete" {
                "deleted"
            } else {
                "set"
            };
            (format!("{}.{verb}", field("what")), "ctl")
        }
        Kind::Seal => ("branch.sealed".to_owned(), "log"),
        Kind::Request | Kind::Result => return None,
    };
    let name = if name == "agent.set" {
        "agent.deployed".to_owned()
    } else {
        name
    };
    let mut data = serde_json::json!({ "hash": stored.hash.to_string() });
    for key in [
        "agent",
        "session",
        "branch",
        "submission",
        "outcome",
        "name",
    ] {
        if let Some(value) = stored.node.field(key) {
            data[key] = value.into();
        }
    }
    Some(Event {
        id: format!("{stream}:{}", stored.seq),
        name,
        time_ms: stored.time_ms,
        data: data.to_string(),
    })
}

/// What differs between two reports of a node, as event names and data.
fn changes(before: Option<&NodeReport>, now: &NodeReport) -> Vec<(String, serde_json::Value)> {
    let mut events = Vec::new();
    let node = &now.node;
    match before {
        None => events.push((
            "node.joined".to_owned(),
            serde_json::json!({ "node": node }),
        )),
        Some(old) if old.incarnation != now.incarnation => {
            events.push((
                "node.restarted".to_owned(),
                serde_json::json!({ "node": node }),
            ));
        }
        Some(old) if !old.left && now.left => {
            events.push(("node.left".to_owned(), serde_json::json!({ "node": node })));
        }
        Some(_) => {}
    }
    for worker in &now.workers {
        let same = |old: &&vlinder_worker::nodes::WorkerReport| {
            old.role == worker.role && old.index == worker.index
        };
        let old = before.and_then(|report| report.workers.iter().find(same));
        let changed = old.is_none_or(|old| old.state != worker.state || old.pid != worker.pid);
        if changed {
            let data = serde_json::json!({
                "node": node, "role": worker.role, "index": worker.index, "pid": worker.pid,
                "state": worker.state, "reason": worker.reason, "restarts": worker.restarts,
                "last_exit": worker.last_exit,
            });
            events.push((format!("worker.{}", worker.state), data));
        }
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;
    use vlinder_worker::nodes::WorkerReport;

    #[test]
    fn a_healing_is_told_when_it_begins_and_when_it_ends() {
        let mut told = Healings::default();
        let mut names = Vec::new();
        let states = [
            (1, true),
            (2, false),
            (2, false),
            (2, true),
            (2, true),
            (3, false),
        ];
        for (revision, (epoch, done)) in states.into_iter().enumerate() {
            let healing = Healing {
                epoch,
                done,
                ..Healing::default()
            };
            let put = KvEvent::Put(vlinder_bus::KvEntry {
                key: "LOG".to_owned(),
                value: serde_json::to_vec(&healing).unwrap().into(),
                revision: revision as u64,
                time_ms: 1,
            });
            names.extend(told.take(put).map(|event| event.name));
            assert!(told.take(KvEvent::Current).is_none());
        }
        assert_eq!(names, ["log.healing", "log.healed", "log.healing"]);
    }

    #[test]
    fn only_changes_are_told() {
        let worker = |state: &str| WorkerReport {
            role: "harness".into(),
            state: state.into(),
            ..Default::default()
        };
        let report = |state: &str, incarnation: &str| NodeReport {
            node: "hub".into(),
            incarnation: incarnation.into(),
            workers: vec![worker(state)],
            ..Default::default()
        };
        let names = |events: Vec<(String, serde_json::Value)>| {
            events.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert_eq!(
            names(changes(None, &report("ready", "a"))),
            ["node.joined", "worker.ready"]
        );
        assert!(changes(Some(&report("ready", "a")), &report("ready", "a")).is_empty());
        assert_eq!(
            names(changes(
                Some(&report("ready", "a")),
                &report("backoff", "a")
            )),
            ["worker.backoff"]
        );
        assert_eq!(
            names(changes(Some(&report("ready", "a")), &report("ready", "b"))),
            ["node.restarted"]
        );
    }
}
