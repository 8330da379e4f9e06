//! Giving back what a log has lost: a power cut or a restored copy took its tail, and somebody who had
//! read it still has the messages.
//!
//! One healer at a time, by a lease, with an epoch that goes up with each: a healer that stalled finds
//! its record changed and stops. Messages go back to the end in their old order, with their old message
//! ids and a note of the [`Place`](vlinder_core::record::Place) they had, so that readers count them where
//! they were. Giving back is idempotent: what the log has again (by node hash) is left alone, so another
//! healer may go on where one died.
//!
//! What was appended after the loss stays. Where only one message can have a place (the next turn of a
//! branch, the state of an agent or a secret), and a new one has it, the lost one does not come back to it: a
//! turn is given back beside its branch ([`NOTE_DISPLACED`]), a superseded setting is only counted.

use crate::backend::{KvEvent, Raw};
use crate::bus::Bus;
use crate::error::Error;
use crate::streams::{BUCKET_HEALING, BUCKET_LEASES, LEASE_TTL, StreamName};
use crate::subjects;
use crate::wire::{self, Body, NOTE_DISPLACED, NOTE_HEALED, Stored};
use bytes::Bytes;
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use vlinder_core::record::{SessionEvent, SessionVerb};
use vlinder_core::{Kind, Namespace, Node, NodeHash};

/// How long somebody waits for another healer to finish, or to be given up for dead.
const LEASE_WAIT: Duration = Duration::from_secs(60);
/// A lease that is held is asked for again this often; its end is told by no event that is not lost in an outage.
const LEASE_RETRY: Duration = Duration::from_millis(500);
/// The record is written again after so many messages, which is when a healer learns that it was replaced.
const MESSAGES_PER_CHECK: u64 = 64;
/// Messages of the log that are looked through at once.
const SCAN_BATCH: usize = 512;
/// Longest that work which was given back waits for the end of the healing.
pub const HEALED_WAIT_MAX: Duration = Duration::from_secs(60);

/// Longest that work waits for a log to be healed that came back shorter than it was. A healer begins within a
/// second; where there is none, nothing is to be waited for.
pub const WHOLE_WAIT_MAX: Duration = Duration::from_secs(10);
/// How far the clocks of healer and waiter may differ, in milliseconds; both are corrected by the log's.
const CLOCK_SLACK_MS: u64 = 2000;

/// How far each stream was seen to reach by this process, and on which connection that was last compared
/// with what the server has.
#[derive(Default)]
pub(crate) struct Heights(Mutex<HashMap<StreamName, Height>>);

#[derive(Clone, Copy, Default)]
struct Height {
    seq: u64,
    checked: u64,
}

impl Heights {
    /// A message was seen there.
    pub(crate) fn saw(&self, stream: &StreamName, seq: u64) {
        let mut heights = self.lock();
        match heights.get_mut(stream) {
            Some(height) => height.seq = height.seq.max(seq),
            None => {
                heights.insert(stream.clone(), Height { seq, checked: 0 });
            }
        }
    }

    /// How far the stream reached, if that was not compared on this connection.
    fn unchecked(&self, stream: &StreamName, connection: u64) -> Option<u64> {
        let height = self.lock().get(stream).copied()?;
        (height.checked != connection).then_some(height.seq)
    }

    fn checked(&self, stream: &StreamName, connection: u64, last: u64) {
        if let Some(height) = self.lock().get_mut(stream) {
            height.checked = connection;
            height.seq = height.seq.min(last);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<StreamName, Height>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is known of a healing; one record for each stream, that of the latest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Healing {
    /// Goes up with each healer.
    pub epoch: u64,
    /// The stream.
    pub stream: String,
    /// Who heals or healed.
    pub by: String,
    /// Everything that could be given back is.
    pub done: bool,
    /// The last message that was left.
    pub common: u64,
    /// The last message that had been there.
    pub lost_to: u64,
    /// Given back, displaced ones included.
    pub healed: u64,
    /// There again already.
    pub present: u64,
    /// Turns given back beside their branch, because another turn had their place.
    pub displaced: u64,
    /// Settings that were not given back, because a later one had their place.
    pub superseded: u64,
    /// Not given back because nobody had kept them.
    pub gone: u64,
    /// Given back, but their large bodies are lost.
    pub bodies_missing: u64,
    /// When it began and ended, bus time, milliseconds since the Unix epoch.
    pub began_ms: u64,
    /// See `began_ms`; 0 while it runs.
    pub ended_ms: u64,
}

impl Healing {
    /// In one line, for people.
    pub fn describe(&self) -> String {
        format!(
            "{} had lost {} to {}: {} messages given back ({} beside their branch, {} without their body), {} there again already, {} superseded, {} lost for good",
            self.stream,
            self.common + 1,
            self.lost_to,
            self.healed,
            self.displaced,
            self.bodies_missing,
            self.present,
            self.superseded,
            self.gone
        )
    }
}

/// What was lost, as far as its reader knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loss {
    /// The last message that is as it was read.
    pub common: u64,
    /// The last message that had been read.
    pub to: u64,
    /// Messages between the two that nobody has kept.
    pub gone: u64,
}

/// What became of one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GivenBack {
    /// It is at the end of the log.
    Healed,
    /// It is at the end of the log, beside its branch.
    Displaced,
    /// The log had it again.
    Present,
    /// A later one has its place.
    Superseded,
}

/// The one who heals a stream.
pub struct Healer {
    bus: Bus,
    stream: StreamName,
    record: Healing,
    revision: u64,
    lease: u64,
    renewed: Instant,
    since_check: u64,
    /// Nodes that the log has behind `common`.
    present: HashSet<NodeHash>,
    /// Subjects with messages behind `common` that were never lost.
    taken: HashSet<String>,
    /// The last sequence on subjects, as far as it was asked for.
    last_on: HashMap<String, u64>,
}

impl Bus {
    /// What is known of the latest healing of a stream.
    pub async fn healing(&self, stream: &StreamName) -> Result<Option<Healing>, Error> {
        let entry = self.kv_get(BUCKET_HEALING, &stream.as_text()).await?;
        Ok(entry.and_then(|entry| serde_json::from_slice(&entry.value).ok()))
    }

    /// Returns when nobody heals the stream, at latest after [`HEALED_WAIT_MAX`].
    pub async fn healed(&self, stream: &StreamName) -> Result<(), Error> {
        let is_over = |known: Option<&Healing>| known.is_none_or(|healing| healing.done);
        let waiting = self.healing_until(stream, is_over);
        match tokio::time::timeout(HEALED_WAIT_MAX, waiting).await {
            Ok(done) => done,
            Err(_) => {
                tracing::warn!(%stream, "the healing takes too long: going on without its end");
                Ok(())
            }
        }
    }

    /// Returns when the stream has, as far as can be told here, all that this process has seen of it: at once,
    /// but after a lost connection that came back to a shorter log, which is to be healed first. Waits no longer
    /// than [`WHOLE_WAIT_MAX`]; then what is lost is taken for gone.
    pub async fn whole(&self, stream: &StreamName) -> Result<(), Error> {
        let connection = self.connection();
        let Some(seen) = self.heights.unchecked(stream, connection) else {
            return Ok(());
        };
        let connected_ms = self.connected_at_ms();
        let last = self.stream_info(stream).await?.last_seq;
        if last < seen {
            tracing::warn!(%stream, last, seen, "the log is shorter than what was seen of it: waiting until it is healed");
            let is_over = |known: Option<&Healing>| {
                known.is_some_and(|healing| {
                    healing.done && healing.began_ms + CLOCK_SLACK_MS >= connected_ms
                })
            };
            let waiting = self.healing_until(stream, is_over);
            match tokio::time::timeout(WHOLE_WAIT_MAX, waiting).await {
                Ok(done) => done?,
                Err(_) => {
                    tracing::warn!(%stream, "nobody has healed the log: going on with what is left")
                }
            }
        }
        self.heights.checked(stream, connection, last);
        Ok(())
    }

    /// Returns when what is known of the healing of a stream satisfies `is_over`.
    async fn healing_until(
        &self,
        stream: &StreamName,
        is_over: impl Fn(Option<&Healing>) -> bool,
    ) -> Result<(), Error> {
        let name = stream.as_text();
        let mut watch = self.kv_watch(BUCKET_HEALING).await?;
        let (mut known, mut all_told) = (None, false);
        while let Some(event) = watch.next().await {
            match event? {
                KvEvent::Put(entry) if entry.key == name => {
                    known = serde_json::from_slice::<Healing>(&entry.value).ok();
                }
                KvEvent::Gone { key } if key == name => known = None,
                KvEvent::Current => all_told = true,
                KvEvent::Put(_) | KvEvent::Gone { .. } => {}
            }
            if all_told && is_over(known.as_ref()) {
                return Ok(());
            }
        }
        Err(Error::Closed)
    }

    /// Becomes the healer of a stream, waiting for another one if there is one. Queues that stand past
    /// what is left are made again before anything is appended.
    pub async fn heal(
        &self,
        stream: &StreamName,
        ns: &Namespace,
        by: &str,
        loss: Loss,
    ) -> Result<Healer, Error> {
        let lease = self.take_healer_lease(stream, by).await?;
        let before = self.kv_get(BUCKET_HEALING, &stream.as_text()).await?;
        let earlier: Option<Healing> = before
            .as_ref()
            .and_then(|entry| serde_json::from_slice(&entry.value).ok());
        let record = Healing {
            epoch: earlier.map_or(0, |earlier| earlier.epoch) + 1,
            stream: stream.as_text(),
            by: by.to_owned(),
            common: loss.common,
            lost_to: loss.to,
            gone: loss.gone,
            began_ms: self.now_ms(),
            ..Healing::default()
        };
        let mut healer = Healer {
            bus: self.clone(),
            stream: stream.clone(),
            record,
            revision: before.map_or(0, |entry| entry.revision),
            lease,
            renewed: Instant::now(),
            since_check: 0,
            present: HashSet::new(),
            taken: HashSet::new(),
            last_on: HashMap::new(),
        };
        healer.check().await?;
        let mended = self.backend.mend_queues(stream, loss.common).await?;
        if !mended.is_empty() {
            tracing::warn!(%stream, queues = ?mended, "queues stood past the end of the log: made again");
        }
        healer.look_through(ns).await?;
        Ok(healer)
    }

    async fn take_healer_lease(&self, stream: &StreamName, by: &str) -> Result<u64, Error> {
        let key = format!("healer.{}", stream.as_text());
        let until = Instant::now() + LEASE_WAIT;
        loop {
            let value = Bytes::from(by.to_owned());
            match self.kv_put(BUCKET_LEASES, &key, value, Some(0)).await {
                Ok(revision) => return Ok(revision),
                Err(error) => {
                    let again = matches!(error, Error::KvConflict { .. }) || error.is_retryable();
                    if !again || Instant::now() + LEASE_RETRY >= until {
                        return Err(error);
                    }
                }
            }
            tokio::time::sleep(LEASE_RETRY).await;
        }
    }
}

impl Healer {
    /// The epoch of this healer.
    pub fn epoch(&self) -> u64 {
        self.record.epoch
    }

    /// Gives one message back; to be called in their old order. `KvConflict` when another healer has
    /// taken over.
    pub async fn give_back(&mut self, lost: &Stored) -> Result<GivenBack, Error> {
        self.since_check += 1;
        if self.since_check >= MESSAGES_PER_CHECK || self.renewed.elapsed() > LEASE_TTL / 3 {
            self.check().await?;
        }
        let given = self.decide(lost).await?;
        match given {
            GivenBack::Healed => self.record.healed += 1,
            GivenBack::Displaced => {
                self.record.healed += 1;
                self.record.displaced += 1;
            }
            GivenBack::Present => self.record.present += 1,
            GivenBack::Superseded => self.record.superseded += 1,
        }
        Ok(given)
    }

    /// Says that all is done, and lets the next one go.
    pub async fn finish(mut self) -> Result<Healing, Error> {
        self.record.done = true;
        self.record.ended_ms = self.bus.now_ms();
        self.check().await?;
        let key = format!("healer.{}", self.stream.as_text());
        let freed = self.bus.kv_delete(BUCKET_LEASES, &key, Some(self.lease));
        if let Err(error) = freed.await {
            tracing::debug!(%error, "the healer's lease will expire");
        }
        Ok(self.record)
    }

    /// Renews the lease and writes the record; fails when another healer has begun.
    async fn check(&mut self) -> Result<(), Error> {
        let key = format!("healer.{}", self.stream.as_text());
        let who = Bytes::from(self.record.by.clone());
        let renewed = self.bus.kv_put(BUCKET_LEASES, &key, who, Some(self.lease));
        self.lease = renewed.await?;
        self.renewed = Instant::now();
        self.since_check = 0;
        let value = serde_json::to_vec(&self.record).expect("the record is plain JSON");
        let name = self.stream.as_text();
        let expected = Some(self.revision);
        let written = self
            .bus
            .kv_put(BUCKET_HEALING, &name, value.into(), expected);
        self.revision = written.await?;
        Ok(())
    }

    /// Reads what the log has behind the last message that was left.
    async fn look_through(&mut self, ns: &Namespace) -> Result<(), Error> {
        let filter = subjects::all_of(ns);
        let mut from = self.record.common + 1;
        loop {
            let batch = self
                .bus
                .range_plain(&self.stream, &filter, from, SCAN_BATCH)
                .await?;
            let Some(last) = batch.last() else {
                return Ok(());
            };
            from = last.seq + 1;
            for raw in &batch {
                self.last_on.insert(raw.subject.clone(), raw.seq);
                match wire::decode(raw) {
                    Ok(stored) => {
                        self.present.insert(stored.hash);
                        if !stored.is_healed() {
                            self.taken.insert(stored.subject);
                        }
                    }
                    Err(_) => {
                        self.taken.insert(raw.subject.clone());
                    }
                }
            }
            if self.renewed.elapsed() > LEASE_TTL / 3 {
                self.check().await?;
            }
        }
    }

    async fn decide(&mut self, lost: &Stored) -> Result<GivenBack, Error> {
        if self.present.contains(&lost.hash) {
            return Ok(GivenBack::Present);
        }
        if let Body::Blob { hash, len } = &lost.body
            && let Err(error) = self.bus.blob_get(hash, *len).await
        {
            if error.is_retryable() {
                return Err(error);
            }
            tracing::warn!(%hash, %error, "a large body was lost with the log");
            self.record.bodies_missing += 1;
        }
        if !has_one_place(lost) {
            return self.append(lost, None, false).await;
        }
        loop {
            if self.taken.contains(&lost.subject) {
                return match lost.node.kind {
                    Kind::Invoke => self.append(lost, None, true).await,
                    _ => Ok(GivenBack::Superseded),
                };
            }
            let last = match self.last_on.get(&lost.subject) {
                Some(seq) => *seq,
                None => self.bus.last_seq(&self.stream, &lost.subject).await?,
            };
            match self.append(lost, Some(last), false).await {
                // Somebody was faster just now.
                Err(Error::Conflict { .. }) => {
                    self.taken.insert(lost.subject.clone());
                }
                other => return other,
            }
        }
    }

    async fn append(
        &mut self,
        lost: &Stored,
        expect_last: Option<u64>,
        displaced: bool,
    ) -> Result<GivenBack, Error> {
        let place = lost.place().lost_behind(self.record.common).to_string();
        let mut notes = lost.notes.clone();
        notes.insert(NOTE_HEALED.to_owned(), place.clone());
        if displaced {
            notes.insert(NOTE_DISPLACED.to_owned(), "1".to_owned());
        }
        let (in_blob, body) = match &lost.body {
            Body::Inline(bytes) => (false, bytes.clone()),
            Body::Blob { .. } => (true, Bytes::new()),
        };
        let mut raw = Raw {
            subject: lost.subject.clone(),
            headers: wire::encode(&lost.node, &lost.hash, &notes, in_blob),
            body,
            id: message_id(&lost.node, &lost.hash),
            expect_last,
        };
        let mut done = self.bus.append_raw(&self.stream, &raw, lost.hash).await?;
        if done.duplicate {
            let there = self.bus.get(&self.stream, done.seq).await?;
            if there.is_some_and(|there| there.hash == lost.hash) {
                self.present.insert(lost.hash);
                return Ok(GivenBack::Present);
            }
            // Another node took the id meanwhile (a client sent its turn again). Both are on record.
            raw.id = format!("healed:{place}:{}", lost.hash);
            done = self.bus.append_raw(&self.stream, &raw, lost.hash).await?;
        }
        self.present.insert(lost.hash);
        self.last_on.insert(lost.subject.clone(), done.seq);
        Ok(if displaced {
            GivenBack::Displaced
        } else {
            GivenBack::Healed
        })
    }
}

/// Whether only one message can follow another on its subject: the last one there says how things are.
fn has_one_place(stored: &Stored) -> bool {
    match stored.node.kind {
        Kind::Invoke | Kind::Seal | Kind::Infra => true,
        // A fork or repair only adds a branch, wherever it stands.
        Kind::Session => !SessionEvent::try_from(&stored.node).is_ok_and(|event| {
            matches!(event.verb, SessionVerb::Fork(_) | SessionVerb::Repair(..))
        }),
        Kind::Request | Kind::Result | Kind::End => false,
    }
}

/// The message id that a node is appended under (ADR 1).
pub fn message_id(node: &Node, hash: &NodeHash) -> String {
    let field = |name: &str| node.field(name).unwrap_or_default();
    match node.kind {
        Kind::Invoke => format!("invoke:{}", field("submission")),
        Kind::Request => format!("request:{}:{}", field("submission"), field("key")),
        kind => format!("{kind}:{hash}"),
    }
}
