//! The follower: reads both streams, gathers turns, and writes each when its end is there.
//!
//! The cursor of `LOG` stays behind the first message of every turn that has no commit yet, so whoever
//! goes on reads those again. What was lost and given back ([`vlinder_bus::heal`]) may change who came
//! first: the repository is then made anew.

use crate::error::Error;
use crate::files::Dir;
use crate::repo::{Cursor, Repo};
use crate::turn::{BODY_BYTES_MAX, Loaded, OpenTurn, Part, Wanted, file_of};
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, stream};
use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;
use vlinder_bus::lease::Lease;
use vlinder_bus::streams::INLINE_BODY_MAX;
use vlinder_bus::{Body, Stored, StreamName, Subject, subjects};
use vlinder_core::{Kind, SubmissionId};
use vlinder_worker::WorkerCx;

/// Messages between two moves of the refs.
const BATCH_ITEMS_MAX: usize = 512;
/// How long a batch gathers: nobody waits for this projection, and turns need the processor more.
const LINGER: Duration = Duration::from_millis(50);
/// Bytes of bodies of open turns that are kept; others are read again when their turn ends.
const KEPT_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Bytes of bodies that are loaded before they are written.
const CHUNK_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Messages of `CTL` read at once.
const CTL_BATCH: usize = 256;

const LOG: i64 = 0;
const CTL: i64 = 1;

/// A message of one of the streams; `None` for the node when it has none that can be read.
type Item = (i64, u64, Option<Box<Stored>>);

/// Writes the repository while it is driven by [`Follower::round`].
pub(crate) struct Follower {
    cx: WorkerCx,
    path: PathBuf,
    /// Absent while a thread has it, and after that thread panicked.
    repo: Option<Repo>,
    open: HashMap<String, OpenTurn>,
    kept_bytes: usize,
    log: Cursor,
    ctl: Cursor,
    /// What the log held when the round began: up to here, an invoke may come after what follows from it.
    built_to: u64,
    latest: Option<(String, String)>,
}

impl Follower {
    pub async fn open(cx: &WorkerCx, path: PathBuf) -> Result<Self, Error> {
        let mut follower = Self {
            cx: cx.clone(),
            path: path.clone(),
            repo: None,
            open: HashMap::new(),
            kept_bytes: 0,
            log: start(0),
            ctl: start(0),
            built_to: 0,
            latest: None,
        };
        let opened = tokio::task::spawn_blocking(move || Repo::open(&path)).await;
        follower.repo = Some(opened.map_err(|_| Error::Panicked)??);
        Ok(follower)
    }

    /// Throws the repository away and begins an empty one.
    pub async fn start_over(&mut self, reason: &str) -> Result<(), Error> {
        tracing::warn!(reason, "the git repository is made anew from the log");
        self.repo = None;
        let path = self.path.clone();
        let made = tokio::task::spawn_blocking(move || Repo::create(&path)).await;
        self.repo = Some(made.map_err(|_| Error::Panicked)??);
        Ok(())
    }

    /// `Deleted` when the repository is gone.
    pub async fn check(&mut self) -> Result<(), Error> {
        self.with(|repo| repo.check()).await
    }

    /// Follows until something fails, or the cursors must be compared with the log again. Dropping the
    /// future loses nothing that is not read again.
    pub async fn round(&mut self, lease: &mut Lease, every: Duration) -> Result<(), Error> {
        let mut gaps = self.cx.bus.gaps();
        self.fit().await?;
        self.catch_up_ctl().await?;
        let mut items = self.items().await?;
        let mut ticks = tokio::time::interval(every);
        // Outside of the loop: what a tick interrupts goes on gathering behind it.
        let mut batch = Vec::new();
        loop {
            tokio::select! {
                biased;
                () = gaps.next() => return Ok(()),
                _ = ticks.tick() => {
                    renew(lease).await?;
                    self.check().await?;
                    continue;
                }
                gathered = gather(&mut items, &mut batch) => gathered?,
            }
            for (index, item) in batch.drain(..).enumerate() {
                self.item(item).await?;
                if index % 64 == 63
                    && tokio::time::timeout(Duration::ZERO, ticks.tick())
                        .await
                        .is_ok()
                {
                    renew(lease).await?;
                }
            }
            self.flush().await?;
        }
    }

    /// Makes sure that the repository is one of this log.
    async fn fit(&mut self) -> Result<(), Error> {
        self.open.clear();
        self.kept_bytes = 0;
        for (code, stream) in [(LOG, self.cx.log()), (CTL, self.cx.ctl())] {
            self.cx.bus.healed(&stream).await?;
            let info = self.cx.bus.stream_info(&stream).await?;
            let found = self.with(move |repo| repo.cursor(code)).await?;
            let cursor = match found {
                Some(cursor) => {
                    if let Some(reason) = self.misfit(&stream, &info, &cursor).await? {
                        return Err(Error::StartOver(reason));
                    }
                    cursor
                }
                None => start(info.created_ms),
            };
            match code {
                LOG => {
                    self.built_to = info.last_seq;
                    self.log = cursor;
                }
                _ => self.ctl = cursor,
            }
        }
        Ok(())
    }

    async fn misfit(
        &mut self,
        stream: &StreamName,
        info: &vlinder_bus::StreamInfo,
        cursor: &Cursor,
    ) -> Result<Option<&'static str>, Error> {
        if info.created_ms != cursor.created_ms {
            return Ok(Some("the log was made anew"));
        }
        if info.last_seq < cursor.seq {
            return Ok(Some("the log is shorter than what was read from it"));
        }
        if cursor.seq < info.first_seq || cursor.hash.is_none() {
            return Ok(None);
        }
        let there = match self.cx.bus.get(stream, cursor.seq).await {
            Ok(stored) => stored.map(|stored| stored.hash.to_string()),
            Err(vlinder_bus::Error::Undecodable { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok((there != cursor.hash).then_some("the log has another node at the cursor"))
    }

    async fn items(&mut self) -> Result<BoxStream<'static, Result<Item, Error>>, Error> {
        let filter = subjects::all_of(&self.cx.ns);
        let mut both = Vec::new();
        for (code, stream, from) in [
            (LOG, self.cx.log(), self.log.resume),
            (CTL, self.cx.ctl(), self.ctl.seq),
        ] {
            let nodes = self.cx.bus.follow(&stream, &filter, from + 1).await?;
            let items = nodes.map(move |node| match node {
                Ok(stored) => Ok((code, stored.seq, Some(Box::new(stored)))),
                Err(vlinder_bus::Error::Undecodable { seq, .. }) => Ok((code, seq, None)),
                Err(error) => Err(Error::Bus(error)),
            });
            let ended = stream::once(async { Err(stream_ended()) });
            both.push(items.chain(ended).boxed());
        }
        Ok(stream::select_all(both).boxed())
    }

    async fn item(&mut self, (code, seq, stored): Item) -> Result<(), Error> {
        let hash = stored.as_ref().map(|stored| stored.hash.to_string());
        if code == CTL {
            if seq > self.ctl.seq {
                if let Some(stored) = stored {
                    self.session_event(&stored).await?;
                }
                self.ctl.seq = seq;
                self.ctl.hash = hash;
            }
            return Ok(());
        }
        if let Some(stored) = stored {
            if stored.is_healed() && seq > self.built_to {
                return Err(Error::StartOver("messages were lost and given back"));
            }
            self.log_node(*stored).await?;
        }
        if seq > self.log.seq {
            self.log.seq = seq;
            self.log.hash = hash;
        }
        if seq == self.built_to {
            // Whatever is not here yet does not come.
            let ended: Vec<String> = self.ended();
            for submission in ended {
                self.commit_if_ready(submission).await?;
            }
        }
        Ok(())
    }

    async fn log_node(&mut self, mut stored: Stored) -> Result<(), Error> {
        let node = &stored.node;
        let Some(submission) = node.field("submission").map(str::to_owned) else {
            return Ok(());
        };
        let known = self.open.contains_key(&submission);
        if !known && node.kind != Kind::Invoke && stored.seq > self.built_to {
            return Ok(());
        }
        if let Body::Inline(bytes) = &stored.body {
            if self.kept_bytes + bytes.len() > KEPT_BYTES_MAX {
                stored.body = Body::Blob {
                    hash: node.body_hash,
                    len: node.body_len,
                };
            } else {
                self.kept_bytes += bytes.len();
            }
        }
        match stored.node.kind {
            Kind::Invoke => {
                let named = stored.node.field("session").unwrap_or_default().to_owned();
                self.know_session(&named).await?;
                let turn = self.open.entry(submission.clone()).or_default();
                if turn.invoke.is_none() {
                    turn.invoke = Some(Part::new(stored));
                }
                self.commit_if_ready(submission).await
            }
            Kind::End => {
                let Ok(id) = SubmissionId::new(&submission) else {
                    return Ok(());
                };
                let subject = Subject::End {
                    ns: self.cx.ns.clone(),
                    submission: id,
                };
                let first = self.cx.bus.first(&self.cx.log(), &subject).await?;
                if first.is_some_and(|first| first.hash != stored.hash) {
                    return Ok(());
                }
                self.open.entry(submission.clone()).or_default().end = Some(Part::new(stored));
                self.commit_if_ready(submission).await
            }
            Kind::Request | Kind::Result => {
                let turn = self.open.entry(submission).or_default();
                turn.parts
                    .entry(stored.hash)
                    .or_insert_with(|| Part::new(stored));
                Ok(())
            }
            Kind::Seal | Kind::Session | Kind::Infra => Ok(()),
        }
    }

    /// Turns that wait for what they follow from.
    fn ended(&self) -> Vec<String> {
        let mut ended: Vec<(u64, String)> = self
            .open
            .iter()
            .filter_map(|(name, turn)| Some((turn.end.as_ref()?.stored.seq, name.clone())))
            .collect();
        ended.sort();
        ended.into_iter().map(|(_, name)| name).collect()
    }

    /// Writes the commit of a turn, and of those that waited for it.
    async fn commit_if_ready(&mut self, submission: String) -> Result<(), Error> {
        let mut ready = vec![submission];
        while let Some(submission) = ready.pop() {
            let Some(turn) = self.open.get(&submission) else {
                continue;
            };
            let (Some(invoke), Some(end)) = (&turn.invoke, &turn.end) else {
                continue;
            };
            let end_hash = end.stored.hash.to_string();
            let previous = invoke.stored.node.field("previous").map(str::to_owned);
            let parents: Vec<String> = invoke
                .stored
                .node
                .parents
                .iter()
                .map(ToString::to_string)
                .collect();
            let (name, before) = (submission.clone(), previous.clone());
            let (done, parent) = self
                .with(move |repo| {
                    let done = repo.turn(&name)?.is_some_and(|turn| turn.end == end_hash);
                    for parent in &parents {
                        if let Some(commit) = repo.turn_by_end(parent)? {
                            return Ok((done, Some(Some(commit))));
                        }
                    }
                    let Some(before) = before else {
                        return Ok((done, Some(None)));
                    };
                    // The line leaves that turn before its end, so it does not hold what it said.
                    Ok((done, repo.turn(&before)?.map(|cut| cut.parent)))
                })
                .await?;
            if done {
                // Its writer may have died before it moved the refs.
                if let Some(invoke) = self.forget(&submission).and_then(|turn| turn.invoke) {
                    let [session, branch] = ["session", "branch"].map(|name| invoke.field(name));
                    self.latest = Some((session.to_owned(), branch.to_owned()));
                }
                continue;
            }
            if let (Some(previous), None) = (&previous, parent) {
                let comes = self.open.contains_key(previous) || self.log.seq < self.built_to;
                if comes && *previous != submission {
                    continue;
                }
            }
            self.write_turn(&submission, parent.flatten()).await?;
            let waiting = self.open.iter().filter(|(_, turn)| {
                let previous = turn
                    .invoke
                    .as_ref()
                    .and_then(|invoke| invoke.stored.node.field("previous"));
                turn.end.is_some() && previous == Some(&submission)
            });
            ready.extend(waiting.map(|(name, _)| name.clone()));
        }
        Ok(())
    }

    fn forget(&mut self, submission: &str) -> Option<OpenTurn> {
        let turn = self.open.remove(submission)?;
        for part in turn.parts.values().chain(&turn.invoke).chain(&turn.end) {
            if let Body::Inline(bytes) = &part.stored.body {
                self.kept_bytes = self.kept_bytes.saturating_sub(bytes.len());
            }
        }
        Some(turn)
    }

    async fn write_turn(
        &mut self,
        submission: &str,
        parent: Option<gix_hash::ObjectId>,
    ) -> Result<(), Error> {
        let Some(turn) = self.open.get(submission) else {
            return Ok(());
        };
        let (Some(invoke), Some(end)) = (&turn.invoke, &turn.end) else {
            return Ok(());
        };
        let session = invoke.field("session").to_owned();
        let branch = invoke.field("branch").to_owned();
        let beside = invoke.stored.is_displaced();
        let wanted = turn.wanted(invoke, end);
        let (mut dir, mut said) = (Dir::default(), Vec::new());
        let (mut chunk, mut bytes) = (Vec::new(), 0);
        for body in wanted {
            let loaded = self.load(&body).await?;
            if let Loaded::Bytes(loaded) = &loaded {
                bytes += loaded.len();
            }
            if body.path.is_empty() {
                said.push(match &loaded {
                    Loaded::Bytes(bytes) => bytes.slice(..bytes.len().min(16 * 1024)),
                    Loaded::TooLarge | Loaded::Missing => {
                        Bytes::from_static(b"(large, see the record)")
                    }
                });
            }
            chunk.push((body, loaded));
            if bytes > CHUNK_BYTES_MAX {
                dir = self.write_files(dir, std::mem::take(&mut chunk)).await?;
                bytes = 0;
            }
        }
        dir = self.write_files(dir, chunk).await?;
        let Some(turn) = self.forget(submission) else {
            return Ok(());
        };
        let name = submission.to_owned();
        if !beside {
            self.latest = Some((session.clone(), branch.clone()));
        }
        self.with(move |repo| {
            let label = repo
                .session_name(&session)?
                .unwrap_or_else(|| session.clone());
            let [input, output] =
                [0, 1].map(|at| said.get(at).map_or(&b""[..], |bytes| &bytes[..]));
            let commit = turn.commit(&repo.objects(), dir, [input, output], &label, parent)?;
            repo.add_turn(&session, &branch, &name, &commit, beside)
        })
        .await
    }

    async fn write_files(
        &mut self,
        mut dir: Dir,
        files: Vec<(Wanted, Loaded)>,
    ) -> Result<Dir, Error> {
        self.with(move |repo| {
            let objects = repo.objects();
            for (wanted, loaded) in &files {
                let (path, blob) = file_of(&objects, wanted, loaded)?;
                dir.put(&path, blob);
            }
            Ok(dir)
        })
        .await
    }

    async fn load(&mut self, wanted: &Wanted) -> Result<Loaded, Error> {
        use vlinder_bus::Error as BusError;
        let loaded = match &wanted.body {
            Body::Inline(bytes) => return Ok(Loaded::Bytes(bytes.clone())),
            Body::Blob { len, .. } if *len > BODY_BYTES_MAX => return Ok(Loaded::TooLarge),
            Body::Blob { len, .. } if *len <= INLINE_BODY_MAX as u64 => {
                // It was let go for the sake of memory.
                match self.cx.bus.get(&self.cx.log(), wanted.seq).await? {
                    Some(stored) => self.cx.bus.load(&stored.body).await,
                    None => return Ok(Loaded::Missing),
                }
            }
            body => self.cx.bus.load(body).await,
        };
        match loaded {
            Ok(bytes) => Ok(Loaded::Bytes(bytes)),
            Err(BusError::Missing { .. } | BusError::BlobDamaged { .. }) => Ok(Loaded::Missing),
            Err(error) => Err(error.into()),
        }
    }

    /// Sessions are named in `CTL`; whatever stands in `LOG` about one was stored after its start there.
    async fn know_session(&mut self, session: &str) -> Result<(), Error> {
        let id = session.to_owned();
        let known = self.with(move |repo| repo.session_name(&id)).await?;
        if known.is_some() {
            return Ok(());
        }
        self.catch_up_ctl().await?;
        let id = session.to_owned();
        self.with(move |repo| repo.add_session(&id, &id)).await
    }

    async fn catch_up_ctl(&mut self) -> Result<(), Error> {
        let (stream, filter) = (self.cx.ctl(), subjects::all_of(&self.cx.ns));
        loop {
            let batch = self
                .cx
                .bus
                .range(&stream, &filter, self.ctl.seq + 1, CTL_BATCH)
                .await?;
            let full = batch.len() == CTL_BATCH;
            for stored in batch {
                self.session_event(&stored).await?;
                self.ctl.seq = stored.seq;
                self.ctl.hash = Some(stored.hash.to_string());
            }
            if !full {
                return Ok(());
            }
        }
    }

    /// Whatever event names a node to begin at makes a branch; verbs of later releases too.
    async fn session_event(&mut self, stored: &Stored) -> Result<(), Error> {
        if stored.node.kind != Kind::Session {
            return Ok(());
        }
        let Some(Subject::Session { session, .. }) = Subject::parse(&stored.subject) else {
            return Ok(());
        };
        let node = stored.node.clone();
        self.with(move |repo| {
            let field = |name: &str| node.field(name);
            repo.add_session(session.as_str(), field("name").unwrap_or(session.as_str()))?;
            // A promote names the new default as its branch, and the old line by another field.
            let branch = field("sealed").or(field("branch"));
            if let (Some(branch), Some(from)) = (branch, field("from")) {
                repo.add_fork(session.as_str(), branch, from, field("submission"))?;
            }
            Ok(())
        })
        .await
    }

    async fn flush(&mut self) -> Result<(), Error> {
        if self.log.seq > self.built_to {
            let open = std::mem::take(&mut self.open);
            self.open = open
                .into_iter()
                .filter(|(_, turn)| turn.invoke.is_some())
                .collect();
        }
        let first_open = self.open.values().filter_map(OpenTurn::first_seq).min();
        self.log.resume = first_open
            .map_or(self.log.seq, |seq| seq - 1)
            .min(self.log.seq);
        let cursors = [(LOG, self.log.clone()), (CTL, self.ctl.clone())];
        let latest = self.latest.take();
        self.with(move |repo| {
            let latest = latest
                .as_ref()
                .map(|(session, branch)| (session.as_str(), branch.as_str()));
            repo.flush(latest, &cursors)
        })
        .await
    }

    /// Works on the repository in a thread.
    async fn with<T, F>(&mut self, work: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&mut Repo) -> Result<T, Error> + Send + 'static,
    {
        let mut repo = self.repo.take().ok_or(Error::Panicked)?;
        let done = tokio::task::spawn_blocking(move || {
            let outcome = work(&mut repo);
            (repo, outcome)
        });
        let (repo, outcome) = done.await.map_err(|_| Error::Panicked)?;
        self.repo = Some(repo);
        outcome
    }
}

/// Renews the lease, as far as that can be said now.
async fn renew(lease: &mut Lease) -> Result<(), Error> {
    match lease.renew().await {
        Ok(()) => Ok(()),
        // An outage: nobody else can have it before it ends.
        Err(error) if error.is_retryable() && lease.is_held() => Ok(()),
        Err(vlinder_bus::Error::KvConflict { .. }) => Err(Error::Fenced),
        Err(error) => Err(error.into()),
    }
}

fn start(created_ms: u64) -> Cursor {
    Cursor {
        created_ms,
        seq: 0,
        hash: None,
        resume: 0,
    }
}

/// Waits for a message and takes what else comes until the batch is full or [`LINGER`] has passed.
/// Cancelled: what was taken is in the batch, and the next call adds to it.
async fn gather(
    items: &mut BoxStream<'static, Result<Item, Error>>,
    batch: &mut Vec<Item>,
) -> Result<(), Error> {
    if batch.is_empty() {
        batch.push(items.next().await.ok_or_else(stream_ended)??);
    }
    let linger = tokio::time::sleep(LINGER);
    tokio::pin!(linger);
    while batch.len() < BATCH_ITEMS_MAX {
        tokio::select! {
            biased;
            next = items.next() => batch.push(next.ok_or_else(stream_ended)??),
            () = &mut linger => return Ok(()),
        }
    }
    Ok(())
}

fn stream_ended() -> Error {
    Error::Bus(vlinder_bus::Error::Timeout {
        operation: "following the log",
    })
}
