//! The turn that a turn runs again, as far as it counts as a record.
//!
//! A recorded answer holds for a call with the same key. A call to a store is a pure function of the state
//! that it works on and its body, so its answer holds exactly where that state is the same, too. What the
//! agent then does differently has other keys or other states, and runs.

use super::answers::Answered;
use std::collections::HashMap;
use std::sync::Arc;
use vlinder_bus::wire::NOTE_SOURCE;
use vlinder_bus::{Body, Error, Stored, Subject};
use vlinder_core::record::{Invoke, SessionEvent, SessionVerb, Source};
use vlinder_core::{CallKey, NodeHash, Selector, StateRoot};
use vlinder_worker::WorkerCx;
use vlinder_worker::turns::{self, SESSION_EVENTS_MAX, TurnRecord};

/// What is answered from the record of another turn.
#[derive(Default)]
pub(crate) struct SourceRecord {
    answers: HashMap<CallKey, Recorded>,
    /// The model that answers instead of those that the agent asks.
    pub model: Option<Selector>,
}

/// A recorded answer.
pub(crate) struct Recorded {
    pub answered: Answered,
    /// What the call worked on; `None` where its request is not known.
    state: Option<Option<StateRoot>>,
    /// What the agent is given instead.
    pub repair: Option<Replacement>,
}

/// A repaired answer.
pub(crate) struct Replacement {
    /// The session event that has it.
    pub event: NodeHash,
    pub body: Body,
    pub http: Option<u16>,
    pub content_type: Option<String>,
}

impl SourceRecord {
    /// Reads what `invoke` names as its source; the inner error says in words why there is none.
    pub async fn read(
        cx: &WorkerCx,
        stored: &Stored,
        invoke: &Invoke,
    ) -> Result<Result<Option<Arc<Self>>, String>, Error> {
        let Some(source) = &invoke.source else {
            return Ok(Ok(None));
        };
        let hint = stored.notes.get(NOTE_SOURCE);
        let hint = hint.and_then(|text| text.parse().ok());
        let Some((of, turn)) = turns::find(cx, &source.submission, hint).await? else {
            let why = format!("turn {} is not in the log", source.submission);
            return Ok(Err(why));
        };
        let mut record = Self {
            model: source.model.clone(),
            ..Self::default()
        };
        if source.until != Some(of.hash) {
            let read = TurnRecord::read(cx, &of, turn, false).await?;
            if let Some(until) = source.until.filter(|until| !read.has(until)) {
                let why = format!("turn {} has no node {until}", source.submission);
                return Ok(Err(why));
            }
            record.answers = counted(&read, source);
        }
        if let Some(event) = source.repair
            && let Err(why) = record.repair(cx, invoke, event).await?
        {
            return Ok(Err(why));
        }
        Ok(Ok(Some(Arc::new(record))))
    }

    /// Replaces the answer that a session event repairs.
    async fn repair(
        &mut self,
        cx: &WorkerCx,
        invoke: &Invoke,
        event: NodeHash,
    ) -> Result<Result<(), String>, Error> {
        let subject = Subject::Session {
            ns: cx.ns.clone(),
            session: invoke.session.clone(),
        };
        let events = cx
            .bus
            .all_on(&cx.ctl(), &subject, SESSION_EVENTS_MAX)
            .await?;
        let found = events.into_iter().find(|stored| stored.hash == event);
        let Some(stored) = found else {
            return Ok(Err(format!("the repair {event} is not in the log")));
        };
        let repair = match SessionEvent::try_from(&stored.node).map(|event| event.verb) {
            Ok(SessionVerb::Repair(_, repair)) => repair,
            _ => return Ok(Err(format!("the event {event} is no repair"))),
        };
        let mut answers = self.answers.values_mut();
        let wanted = answers.find(|recorded| recorded.answered.request == Some(repair.request));
        // Where the repaired call is behind what counts as record, it runs like the rest.
        if let Some(recorded) = wanted {
            recorded.repair = Some(Replacement {
                event,
                body: stored.body,
                http: repair.http,
                content_type: repair.content_type,
            });
        }
        Ok(Ok(()))
    }

    /// The recorded answer to a call, if it holds. `state`: what a call to a store works on.
    pub fn answer_to(
        &self,
        key: &CallKey,
        store: Option<(Option<StateRoot>, bool)>,
    ) -> Option<&Recorded> {
        let recorded = self.answers.get(key)?;
        let holds = match store {
            None => true,
            // What a read answers instead is the same whatever it would have read.
            Some((_, false)) if recorded.repair.is_some() => true,
            Some((state, _)) => recorded.state == Some(state),
        };
        holds.then_some(recorded)
    }
}

fn counted(read: &TurnRecord, source: &Source) -> HashMap<CallKey, Recorded> {
    let until = source.until.map(|until| read.ancestors(until));
    let counts = |hash: &NodeHash| until.as_ref().is_none_or(|until| until.contains(hash));
    let answers = read.answers(counts).into_iter().map(|given| {
        let recorded = Recorded {
            answered: Answered::new(given.result.clone(), given.stored.clone(), false),
            state: read.asked(given).map(|asked| asked.request.state),
            repair: None,
        };
        (given.result.key, recorded)
    });
    answers.collect()
}
