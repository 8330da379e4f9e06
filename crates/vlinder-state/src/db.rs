//! The file of the projection: opening it, throwing it away, reading it without blocking.
//!
//! One connection writes and belongs to the follower; up to [`READERS_MAX`] read, each in a thread
//! of the blocking pool. A file that is thrown away is unlinked: whoever reads it at that moment
//! finishes on the old one, and opens the new one next time.

use crate::error::Error;
use crate::schema;
use rusqlite::{Connection, OpenFlags};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;

/// Reads at once. More would only fight over the same two cores.
pub(crate) const READERS_MAX: usize = 4;
/// Reads that run or wait; further ones are refused.
const READS_WAITING_MAX: usize = 1024;
/// Longest a query may run. It is then interrupted.
const QUERY_DEADLINE: Duration = Duration::from_secs(30);
/// How long a connection waits for another one's lock. In WAL mode this is for opening only.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Page cache of one connection, in KiB (negative means KiB to SQLite).
const CACHE_KIB: i64 = -1024;
/// Prepared statements that a connection keeps: all of ours.
const STATEMENTS_KEPT: usize = 64;

/// The file, for readers; and what the follower needs to replace it.
pub(crate) struct Db {
    path: PathBuf,
    /// Counts the files that were at `path`; a connection of an earlier one is not used again.
    generation: AtomicU64,
    /// Readers of the present file that nobody uses.
    idle: Mutex<Vec<Connection>>,
    permits: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
}

/// The one connection that writes.
pub(crate) struct Writer(pub(crate) Connection);

impl Db {
    /// Opens `path` for writing, or begins a new file where what is there is not of this release.
    pub fn open(path: &Path) -> Result<(Self, Writer), Error> {
        let db = Self {
            path: path.to_owned(),
            generation: AtomicU64::new(0),
            idle: Mutex::default(),
            permits: Arc::new(Semaphore::new(READERS_MAX)),
            waiting: Arc::new(Semaphore::new(READS_WAITING_MAX)),
        };
        let writer = match open_existing(path) {
            Ok(Some(writer)) => writer,
            Ok(None) => db.start_over()?,
            Err(error) => {
                tracing::warn!(path = %path.display(), error = crate::error::chain(&error),
                    "the projection cannot be used; rebuilding it from the log");
                db.start_over()?
            }
        };
        Ok((db, writer))
    }

    /// Throws the file away and begins a new one. The old writer must be gone.
    pub fn start_over(&self) -> Result<Writer, Error> {
        let mut idle = self.idle();
        idle.clear();
        self.generation.fetch_add(1, Ordering::SeqCst);
        for suffix in ["", "-wal", "-shm", "-journal"] {
            let mut file = self.path.clone().into_os_string();
            file.push(suffix);
            remove(Path::new(&file))?;
        }
        let connection = connect(&self.path)?;
        connection.execute_batch(&format!(
            "BEGIN; {} PRAGMA application_id = {}; PRAGMA user_version = {}; COMMIT;",
            schema::TABLES,
            schema::APPLICATION_ID,
            schema::VERSION
        ))?;
        Ok(Writer(connection))
    }

    /// Counts the files that were at the path.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// The writer again, after a thread took it down with it.
    pub fn reopen(&self) -> Result<Writer, Error> {
        match open_existing(&self.path)? {
            Some(writer) => Ok(writer),
            None => self.start_over(),
        }
    }

    /// Runs a query in a thread of its own, in one read transaction.
    pub async fn read<T, F>(self: &Arc<Self>, query: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T, Error> + Send + 'static,
    {
        let busy = |_| Error::Busy {
            what: "queries of the record",
        };
        let _waiting = self.waiting.clone().try_acquire_owned().map_err(busy)?;
        let slow = |_| Error::Slow {
            seconds: QUERY_DEADLINE.as_secs(),
        };
        let permit = tokio::time::timeout(QUERY_DEADLINE, self.permits.clone().acquire_owned())
            .await
            .map_err(slow)?
            .expect("the semaphore is never closed");
        let interrupt = Arc::new(OnceLock::new());
        let (db, handle) = (self.clone(), interrupt.clone());
        let mut work = tokio::task::spawn_blocking(move || {
            // Held by the thread: a query that nobody waits for any more still counts.
            let _permit = permit;
            let (generation, connection) = db.take()?;
            let _ = handle.set(connection.get_interrupt_handle());
            let outcome = in_transaction(&connection, query);
            db.give_back(generation, connection);
            outcome
        });
        match tokio::time::timeout(QUERY_DEADLINE, &mut work).await {
            Ok(done) => done.map_err(|_| Error::Panicked)?,
            Err(elapsed) => {
                if let Some(interrupt) = interrupt.get() {
                    interrupt.interrupt();
                }
                Err(slow(elapsed))
            }
        }
    }

    fn take(&self) -> Result<(u64, Connection), Error> {
        // Held while opening, so that nobody opens a file whose tables are just being made.
        let mut idle = self.idle();
        let generation = self.generation.load(Ordering::SeqCst);
        if let Some(connection) = idle.pop() {
            return Ok((generation, connection));
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&self.path, flags)?;
        set_up(&connection)?;
        Ok((generation, connection))
    }

    fn give_back(&self, generation: u64, connection: Connection) {
        let mut idle = self.idle();
        if generation == self.generation.load(Ordering::SeqCst) {
            idle.push(connection);
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Connection>> {
        // A panic between push and pop leaves the list whole.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One snapshot for all statements of a query.
fn in_transaction<T>(
    connection: &Connection,
    query: impl FnOnce(&Connection) -> Result<T, Error>,
) -> Result<T, Error> {
    let transaction = connection.unchecked_transaction()?;
    let outcome = query(&transaction);
    // Nothing was written: rolling back is as good as committing, and needs no success.
    drop(transaction);
    outcome
}

/// The writer of an existing file; `None` when there is none or it is of another release.
fn open_existing(path: &Path) -> Result<Option<Writer>, Error> {
    match path.try_exists() {
        Ok(false) => return Ok(None),
        Ok(true) => {}
        Err(source) => {
            return Err(Error::Io {
                what: format!("cannot look for {}", path.display()),
                source,
            });
        }
    }
    let connection = connect(path)?;
    let number = |pragma: &str| connection.query_row(pragma, [], |row| row.get::<_, i64>(0));
    let ours = number("PRAGMA application_id")? == schema::APPLICATION_ID
        && number("PRAGMA user_version")? == schema::VERSION;
    if !ours {
        tracing::info!(path = %path.display(), "the projection is of another release; rebuilding it from the log");
        return Ok(None);
    }
    // Reads the schema and the cursors, so that a damaged head shows now; a damaged page further
    // on shows when it is read.
    number("SELECT count(*) FROM sqlite_master")?;
    number("SELECT count(*) FROM cursors")?;
    Ok(Some(Writer(connection)))
}

fn connect(path: &Path) -> Result<Connection, Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    set_up(&connection)?;
    // The log has everything: what a power cut takes from here is read again.
    connection.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;")?;
    Ok(connection)
}

fn set_up(connection: &Connection) -> Result<(), Error> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "cache_size", CACHE_KIB)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS_KEPT);
    Ok(())
}

fn remove(path: &Path) -> Result<(), Error> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(Error::Io {
            what: format!("cannot remove {}", path.display()),
            source,
        }),
    }
}
