//! The stores of one namespace on one node: serves calls, and fetches from the log what the file
//! lacks.

use crate::db::{ChunkDb, Cursor, DbError, FileId, Position};
use crate::home::{Homes, NATS, S3, SQLITE};
use crate::{Answer, Call, Error, Service, apply, vec};
use bytes::Bytes;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Mutex;
use vlinder_bus::{Bus, Stored, StreamName};
use vlinder_core::merkle;
use vlinder_core::record::Request;
use vlinder_core::{ContentHash, Namespace, Selector, StateRoot};
use vlinder_objects::Access;

/// Requests read from the log at once while catching up.
const BATCH_MESSAGES: usize = 256;
/// Bodies held at once while catching up, in bytes; one more of any size may come on top.
const BATCH_BYTES: usize = 16 * 1024 * 1024;
/// After so many calls that changed a state the cursor is moved on, which keeps the list of
/// requests beyond it (and so the next catching up) short.
const CHANGES_PER_CHECKPOINT: u32 = 4096;
/// The whole log is read again at most so often: it helps only where chunks were lost or damaged,
/// and a state that it does not lead to will not appear by reading it once more.
const REBUILD_EVERY: Duration = Duration::from_secs(60);

/// The stores of a namespace. See the crate's header.
pub struct Stores {
    bus: Bus,
    ns: Namespace,
    path: PathBuf,
    homes: Homes,
    /// Calls wait for it here and not on threads: one thread works at the file at a time.
    opened: Arc<Mutex<Option<Opened>>>,
    changes: AtomicU32,
    /// Held while catching up, so that calls that lack the same do it once. When the whole log was
    /// read last.
    rebuilt: Mutex<Option<Instant>>,
}

/// A call that was done: its answer, and the chunks that it made.
pub(crate) struct Done {
    pub answer: Answer,
    pub fresh: HashSet<ContentHash>,
}

/// The inner error says what is lacking.
pub(crate) type Outcome = Result<Done, merkle::Error<DbError>>;

pub(crate) struct Opened {
    pub db: ChunkDb,
    vectors: vec::Cache,
}

/// A request as it is applied; owns what a [`Call`] borrows.
pub(crate) struct Work {
    service: Service,
    operation: String,
    store: Selector,
    state: Option<StateRoot>,
    body: Bytes,
    /// Where it is in the log.
    at: Position,
}

impl Work {
    /// `None` for a request of another service.
    fn new(request: &Request, at: Position, body: Bytes) -> Option<Self> {
        Some(Self {
            service: Service::from_name(&request.service)?,
            operation: request.operation.clone(),
            store: request.selector.clone(),
            state: request.state,
            body,
            at,
        })
    }

    pub(crate) fn service(&self) -> Service {
        self.service
    }

    fn call(&self) -> Call<'_> {
        Call {
            service: self.service,
            operation: &self.operation,
            store: &self.store,
            state: self.state,
            body: &self.body,
        }
    }
}

impl Stores {
    /// The stores of `ns`, in `<data_dir>/stores/<ns>.db`. One file for all of them, because the
    /// state of a session is one tree over all stores that it uses.
    pub fn new(bus: Bus, ns: Namespace, data_dir: &Path) -> Self {
        let path = data_dir.join("stores").join(format!("{ns}.db"));
        Self {
            homes: Homes::new(bus.clone(), ns.clone(), Access::default()),
            bus,
            ns,
            path,
            opened: Arc::default(),
            changes: AtomicU32::new(0),
            rebuilt: Mutex::new(None),
        }
    }

    /// The same with access to S3-compatible storage.
    pub fn with_s3(mut self, access: Access) -> Self {
        self.homes = Homes::new(self.bus.clone(), self.ns.clone(), access);
        self
    }

    /// Opens the file now, so that a worker that says it is ready can do its job.
    pub async fn check(&self) -> Result<(), Error> {
        self.on_file(|_| Ok(())).await
    }

    /// Serves a request that stands at `at` in the log. `None` if it is for another service.
    pub async fn serve(
        &self,
        request: &Request,
        at: Position,
        body: Bytes,
    ) -> Result<Option<Answer>, Error> {
        let Some(work) = Work::new(request, at, body) else {
            return Ok(None);
        };
        let work = Arc::new(work);
        let home = self.homes.of(request).await?;
        let mut outcome = self.try_once(&work).await?;
        if let Some(home) = &home {
            outcome = self.with_home(home, &work, outcome).await?;
        }
        if let Err(merkle::Error::Missing(chunk)) = outcome {
            self.fetch(chunk).await?;
            outcome = self.try_once(&work).await?;
        }
        if let Err(lack) = outcome {
            self.rebuild(&lack).await?;
            outcome = self.try_once(&work).await?;
        }
        let done = outcome.map_err(Error::State)?;
        if work.call().may_change_state() {
            if let Some(home) = home.filter(|_| done.answer.is_ok()) {
                self.bring_home(&home, &done).await?;
            }
            self.checkpoint_sometimes().await;
        }
        Ok(Some(done.answer))
    }

    /// Does the work with what is here.
    pub(crate) async fn try_once(&self, work: &Arc<Work>) -> Result<Outcome, Error> {
        let work = work.clone();
        self.on_file(move |opened| {
            let Opened { db, vectors } = opened;
            let call = work.call();
            let (outcome, fresh) = db.reading(|chunks| apply(chunks, &call, vectors))?;
            match outcome {
                Ok(answer) => {
                    if call.may_change_state() {
                        db.commit(&fresh, &[work.at])?;
                    }
                    let fresh = fresh.into_keys().collect();
                    Ok(Ok(Done { answer, fresh }))
                }
                Err(merkle::Error::Chunks(error)) => Err(error),
                Err(lack) => Ok(Err(lack)),
            }
        })
        .await
    }

    /// Catches up, unless another call just did and brought the chunk.
    async fn fetch(&self, chunk: ContentHash) -> Result<(), Error> {
        let _one_at_a_time = self.rebuilt.lock().await;
        if self.on_file(move |opened| opened.db.has(&chunk)).await? {
            return Ok(());
        }
        self.read_log().await
    }

    /// Moves the cursor on, once in [`CHANGES_PER_CHECKPOINT`] changes.
    async fn checkpoint_sometimes(&self) {
        let changes = self.changes.fetch_add(1, Ordering::Relaxed) + 1;
        if !changes.is_multiple_of(CHANGES_PER_CHECKPOINT) {
            return;
        }
        let _one_at_a_time = self.rebuilt.lock().await;
        if let Err(error) = self.read_log().await {
            tracing::warn!(%error, "the cursor could not be moved on; it is tried again later");
        }
    }

    /// Applies the whole log again, which also mends damaged chunks: each is written before any
    /// that refers to it is read. Does nothing if that was done just now.
    async fn rebuild(&self, lack: &merkle::Error<DbError>) -> Result<(), Error> {
        let mut rebuilt = self.rebuilt.lock().await;
        if rebuilt.is_some_and(|at| at.elapsed() < REBUILD_EVERY) {
            return Ok(());
        }
        tracing::warn!(store = %self.path.display(), %lack, "applying the whole log again");
        self.on_file(|opened| opened.db.start_over()).await?;
        self.read_log().await?;
        *rebuilt = Some(Instant::now());
        Ok(())
    }

    /// Applies the requests behind the cursor, in order, and moves the cursor.
    async fn read_log(&self) -> Result<(), Error> {
        let log = StreamName::Log(self.ns.clone());
        let created_ms = self.bus.stream_info(&log).await?.created_ms;
        let (began, mut applied) = (Instant::now(), 0);

        // The request at the cursor is read again: it must still be what it was.
        let cursor = self.on_file(|opened| opened.db.cursor()).await?;
        let mut from = cursor.map_or(1, |cursor| cursor.at.seq);
        let mut batch = self.requests(&log, from).await?;
        if let Some(cursor) = cursor {
            let holds =
                cursor.created_ms == created_ms && batch.first().map(position) == Some(cursor.at);
            if holds {
                batch.remove(0);
                from += 1;
            } else {
                tracing::warn!(store = %self.path.display(), "the log is not the one that was applied, beginning anew");
                self.on_file(|opened| opened.db.start_over()).await?;
                (from, batch) = (1, Vec::new());
            }
        }
        loop {
            if batch.is_empty() {
                batch = self.requests(&log, from).await?;
            }
            let Some(last) = batch.last() else { break };
            let at = position(last);
            from = at.seq + 1;
            applied += self.apply_batch(&batch).await?;
            self.on_file(move |opened| opened.db.advance(Cursor { created_ms, at }))
                .await?;
            batch.clear();
        }
        tracing::info!(store = %self.path.display(), applied, took = ?began.elapsed(), "caught up with the log");
        Ok(())
    }

    /// The next requests to stores of every kind from `from` on, in log order; none when there are no
    /// more.
    async fn requests(&self, log: &StreamName, from: u64) -> Result<Vec<Stored>, Error> {
        let filters = storage_requests(&self.ns);
        let reads = filters
            .iter()
            .map(|filter| self.bus.range(log, filter, from, BATCH_MESSAGES));
        let reads = futures::future::try_join_all(reads).await?;
        // Behind the last of a kind there may be more of that kind, so none may be taken from beyond.
        let ends = reads.iter().filter_map(|read| read.last());
        let end = ends.map(|stored| stored.seq).min().unwrap_or_default();
        let mut all: Vec<Stored> = reads.into_iter().flatten().collect();
        all.retain(|stored| stored.seq <= end);
        all.sort_unstable_by_key(|stored| stored.seq);
        Ok(all)
    }

    /// Applies what was not applied yet and returns how much that was.
    async fn apply_batch(&self, batch: &[Stored]) -> Result<usize, Error> {
        let positions: Vec<Position> = batch.iter().map(position).collect();
        let new = self
            .on_file(move |opened| opened.db.unapplied(&positions))
            .await?;
        let (mut works, mut bytes, mut applied) = (Vec::new(), 0, 0);
        for stored in batch
            .iter()
            .filter(|stored| new.binary_search(&stored.seq).is_ok())
        {
            let Some(work) = self.load(stored).await? else {
                continue;
            };
            bytes += work.body.len();
            applied += 1;
            works.push(work);
            if bytes > BATCH_BYTES {
                self.apply_all(std::mem::take(&mut works)).await?;
                bytes = 0;
            }
        }
        self.apply_all(works).await?;
        Ok(applied)
    }

    /// The work of a logged request; `None` if it changes no state or its body is lost.
    async fn load(&self, stored: &Stored) -> Result<Option<Work>, Error> {
        let Ok(request) = Request::try_from(&stored.node) else {
            return Ok(None);
        };
        let without_body = Work::new(&request, position(stored), Bytes::new());
        let Some(work) = without_body.filter(|work| work.call().may_change_state()) else {
            return Ok(None);
        };
        match self.bus.load(&stored.body).await {
            Ok(body) => Ok(Some(Work { body, ..work })),
            Err(error) if error.is_retryable() => Err(error.into()),
            Err(error) => {
                // Later states that do not build on this one can still be had.
                tracing::error!(seq = stored.seq, %error, "the body of a request is lost");
                Ok(None)
            }
        }
    }

    async fn apply_all(&self, works: Vec<Work>) -> Result<(), Error> {
        if works.is_empty() {
            return Ok(());
        }
        self.on_file(move |opened| {
            let Opened { db, vectors } = opened;
            let (outcome, fresh) = db.reading(|chunks| {
                for work in &works {
                    match apply(chunks, &work.call(), vectors) {
                        Ok(_) => {}
                        Err(merkle::Error::Chunks(error)) => return Err(error),
                        Err(error) => {
                            tracing::warn!(seq = work.at.seq, %error, "cannot apply a request")
                        }
                    }
                }
                Ok(())
            })?;
            outcome?;
            let applied: Vec<Position> = works.iter().map(|work| work.at).collect();
            db.commit(&fresh, &applied)
        })
        .await
    }

    /// Runs `work` with the open file on a thread that may block. Opens the file where it is not
    /// open or not in place any more; a damaged one is set aside.
    pub(crate) async fn on_file<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Opened) -> Result<T, DbError> + Send + 'static,
    ) -> Result<T, Error> {
        let mut slot = self.opened.clone().lock_owned().await;
        let path = self.path.clone();
        let run = move || {
            // Taken out while at work: after a panic, file and cache are opened afresh.
            let mut current = slot.take().filter(|opened| opened.db.is_in_place());
            let file = FileId::of(&path);
            let outcome = match &mut current {
                Some(opened) => work(opened),
                None => open(&path).and_then(|opened| work(current.insert(opened))),
            };
            match &outcome {
                Err(error) if error.is_damage() => {
                    drop(current);
                    tracing::error!(%error, "the store's file is damaged; it is rebuilt from the log");
                    ChunkDb::set_aside(&path, file)?;
                }
                _ => *slot = current,
            }
            outcome
        };
        match tokio::task::spawn_blocking(run).await {
            Ok(outcome) => Ok(outcome?),
            Err(_) => Err(Error::Ended),
        }
    }
}

fn open(path: &Path) -> Result<Opened, DbError> {
    Ok(Opened {
        db: ChunkDb::open(path)?,
        vectors: vec::Cache::default(),
    })
}

fn position(stored: &Stored) -> Position {
    Position {
        seq: stored.seq,
        request: stored.hash,
    }
}

/// Filters of all requests to stores of a namespace, of both services: one for each kind of store.
fn storage_requests(ns: &Namespace) -> [String; 3] {
    [SQLITE, NATS, S3].map(|backend| format!("vlinder.v1.{ns}.req.*.{backend}.*"))
}
