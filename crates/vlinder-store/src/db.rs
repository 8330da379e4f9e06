//! The chunks of a namespace in one SQLite file, and how far the log was applied to them.
//!
//! Several processes of a node share the file: chunks are inserted by hash and never
//! changed, so they cannot disagree. A chunk is committed together with all it refers to. The file
//! is not synced on every commit: what a power cut takes, the log gives back.

use rusqlite::{Connection, ErrorCode, OptionalExtension, params};
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vlinder_core::merkle::{Chunks, References};
use vlinder_core::{ContentHash, NodeHash};

/// How long a write waits for another process that writes. Commits take well below a millisecond;
/// whoever holds the file longer is stopped or dying.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between two tries to set up a file that another process sets up.
const BUSY_PAUSE: Duration = Duration::from_millis(5);
/// Pages of the file that SQLite keeps in memory, in KiB.
const PAGE_CACHE_KIB: i64 = 4 * 1024;
/// Pages of the write-ahead log after which it is copied into the file, which syncs. 16 MiB: a few
/// milliseconds once in some hundred puts.
const CHECKPOINT_PAGES: i64 = 4096;
/// Version of the tables, in SQLite's `user_version`.
const SCHEMA_VERSION: i64 = 1;

const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS chunks (hash BLOB PRIMARY KEY, bytes BLOB NOT NULL) STRICT;
    -- Requests beyond the cursor that were applied when they were served.
    CREATE TABLE IF NOT EXISTS applied (seq INTEGER PRIMARY KEY, request BLOB NOT NULL) STRICT;
    -- All requests up to and with this one were applied.
    CREATE TABLE IF NOT EXISTS cursor (
        only INTEGER PRIMARY KEY CHECK (only = 1),
        created_ms INTEGER NOT NULL,
        seq INTEGER NOT NULL,
        request BLOB NOT NULL
    ) STRICT;
";

/// Chunks that are in a store's home with all below them, as far as this node knows. It came after
/// the first version of the file, which does not mind it.
const SCHEMA_HOMES: &str = "
    CREATE TABLE IF NOT EXISTS homes (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
    CREATE TABLE IF NOT EXISTS at_home (home INTEGER, hash BLOB, PRIMARY KEY (home, hash))
        STRICT, WITHOUT ROWID;
";

/// Why the file of a store failed.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// SQLite refused.
    #[error("{path}: {what}")]
    Sqlite {
        /// The file.
        path: String,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: rusqlite::Error,
    },
    /// The file or its directory cannot be used.
    #[error("{path}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A newer release wrote the file.
    #[error(
        "{path} has version {found}, this release knows {SCHEMA_VERSION}: delete it (it is rebuilt from the log) or use the newer release"
    )]
    Newer {
        /// The file.
        path: String,
        /// Its version.
        found: i64,
    },
}

impl DbError {
    /// Whether the file itself is damaged, so that only a fresh one helps.
    pub fn is_damage(&self) -> bool {
        let Self::Sqlite {
            source: rusqlite::Error::SqliteFailure(failure, _),
            ..
        } = self
        else {
            return false;
        };
        matches!(
            failure.code,
            ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase
        )
    }
}

/// A request in the log. The hash tells it from one that took its place, where the log lost its end
/// and went on differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Its sequence.
    pub seq: u64,
    /// Its node hash.
    pub request: NodeHash,
}

/// How far the log was applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    /// When the stream was created: tells another log of the same name.
    pub created_ms: u64,
    /// The last request that was applied with all before it.
    pub at: Position,
}

/// Chunks that are not committed yet.
pub(crate) type Fresh = HashMap<ContentHash, Vec<u8>>;

/// Device and inode: tells that somebody deleted or replaced a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileId(u64, u64);

impl FileId {
    /// Of the file that is there now, if there is one.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        let meta = fs::metadata(path).ok()?;
        Some(Self(meta.dev(), meta.ino()))
    }
}

/// The open file.
pub struct ChunkDb {
    conn: Connection,
    path: PathBuf,
    id: FileId,
}

impl ChunkDb {
    /// Opens the file, making it and its directory where missing.
    pub fn open(path: &Path) -> Result<Self, DbError> {
        let io = |source| DbError::Io {
            path: path.display().to_string(),
            source,
        };
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(io)?;
        }
        let failed = |what| {
            move |source| DbError::Sqlite {
                path: path.display().to_string(),
                what,
                source,
            }
        };
        let conn = Connection::open(path).map_err(failed("cannot open the store"))?;
        let set_up = || -> rusqlite::Result<i64> {
            conn.busy_timeout(BUSY_TIMEOUT)?;
            let found = conn.query_row("PRAGMA user_version", [], |row| row.get(0))?;
            if found > SCHEMA_VERSION {
                return Ok(found);
            }
            conn.pragma_update(None, "journal_mode", "wal")?;
            conn.pragma_update(None, "synchronous", "normal")?;
            conn.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES)?;
            conn.pragma_update(None, "cache_size", -PAGE_CACHE_KIB)?;
            if found < SCHEMA_VERSION {
                conn.execute_batch(&format!(
                    "BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
                ))?;
            }
            let has_homes = "SELECT 1 FROM sqlite_schema WHERE name = 'at_home'";
            if !conn.prepare(has_homes)?.exists([])? {
                conn.execute_batch(&format!("BEGIN IMMEDIATE; {SCHEMA_HOMES} COMMIT;"))?;
            }
            Ok(found)
        };
        // Where two workers meet at a new file, the change to WAL refuses one of them at once, whatever the
        // timeout.
        let until = Instant::now() + BUSY_TIMEOUT;
        let found = loop {
            match set_up() {
                Err(error) if is_busy(&error) && Instant::now() < until => {
                    std::thread::sleep(BUSY_PAUSE);
                }
                other => break other.map_err(failed("cannot set up the store"))?,
            }
        };
        if found > SCHEMA_VERSION {
            return Err(DbError::Newer {
                path: path.display().to_string(),
                found,
            });
        }
        let gone = || io(std::io::ErrorKind::NotFound.into());
        let id = FileId::of(path).ok_or_else(gone)?;
        Ok(Self {
            conn,
            path: path.to_owned(),
            id,
        })
    }

    /// Whether the file is still the one that was opened.
    pub fn is_in_place(&self) -> bool {
        FileId::of(&self.path).is_some_and(|id| id == self.id)
    }

    /// Moves a damaged file aside, so that the next [`Self::open`] makes a fresh one; but not a file
    /// that came into its place meanwhile, made by another process that saw the damage first.
    pub(crate) fn set_aside(path: &Path, damaged: Option<FileId>) -> Result<(), DbError> {
        if damaged.is_none() || FileId::of(path) != damaged {
            return Ok(());
        }
        let with = |suffix: &str| {
            let mut name = path.as_os_str().to_owned();
            name.push(suffix);
            PathBuf::from(name)
        };
        let io = |source| DbError::Io {
            path: path.display().to_string(),
            source,
        };
        // The file goes last: until then nobody makes a fresh one with files beside it of its own.
        for suffix in ["-wal", "-shm"] {
            match fs::remove_file(with(suffix)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(io(error));
                }
                _ => {}
            }
        }
        fs::rename(path, with(".damaged")).map_err(io)
    }

    fn failed(&self, what: &'static str) -> impl Fn(rusqlite::Error) -> DbError + use<> {
        let path = self.path.display().to_string();
        move |source| DbError::Sqlite {
            path: path.clone(),
            what,
            source,
        }
    }

    /// Runs `read` with one view of the file, which is cheaper than a view for each chunk.
    pub(crate) fn reading<T>(
        &self,
        read: impl FnOnce(&mut Overlay) -> T,
    ) -> Result<(T, Fresh), DbError> {
        let _view = self
            .conn
            .unchecked_transaction()
            .map_err(self.failed("cannot read"))?;
        let mut overlay = Overlay {
            db: self,
            fresh: Fresh::new(),
        };
        let outcome = read(&mut overlay);
        Ok((outcome, overlay.fresh))
    }

    /// Stores chunks, and that the requests at `applied` were applied. A chunk that is there but
    /// damaged is mended.
    pub(crate) fn commit(&mut self, fresh: &Fresh, applied: &[Position]) -> Result<(), DbError> {
        self.write("cannot store chunks", |tx| {
            let mut insert = tx.prepare_cached(INSERT_CHUNK)?;
            for (hash, bytes) in fresh {
                insert.execute(params![hash.as_bytes(), bytes])?;
            }
            let mut mark =
                tx.prepare_cached("INSERT OR REPLACE INTO applied (seq, request) VALUES (?1, ?2)")?;
            for position in applied {
                mark.execute(params![position.seq as i64, position.request.as_bytes()])?;
            }
            Ok(())
        })
    }

    /// Whether a chunk is here.
    pub(crate) fn has(&self, hash: &ContentHash) -> Result<bool, DbError> {
        let sql = "SELECT 1 FROM chunks WHERE hash = ?1";
        let found = self
            .conn
            .query_row(sql, [hash.as_bytes()], |_| Ok(()))
            .optional();
        Ok(found.map_err(self.failed("cannot read a chunk"))?.is_some())
    }

    /// The bytes of a chunk.
    pub(crate) fn chunk(&self, hash: &ContentHash) -> Result<Option<Vec<u8>>, DbError> {
        let read = || -> rusqlite::Result<Option<Vec<u8>>> {
            let mut find = self
                .conn
                .prepare_cached("SELECT bytes FROM chunks WHERE hash = ?1")?;
            find.query_row([hash.as_bytes()], |row| row.get(0))
                .optional()
        };
        read().map_err(self.failed("cannot read a chunk"))
    }

    /// Those of the chunks that are not here.
    pub(crate) fn absent(&self, chunks: &[ContentHash]) -> Result<Vec<ContentHash>, DbError> {
        let mut absent = Vec::new();
        for hash in chunks {
            if !self.has(hash)? {
                absent.push(*hash);
            }
        }
        Ok(absent)
    }

    /// Those of the chunks (and whether each is a node) that are here and not known to be at that home.
    /// A chunk that is not here came from there, by the one above it, and so did it.
    pub(crate) fn not_known_at(
        &self,
        home: &str,
        chunks: &[(ContentHash, bool)],
    ) -> Result<Vec<Lacking>, DbError> {
        let known = "SELECT 1 FROM at_home WHERE hash = ?2
                     AND home = (SELECT id FROM homes WHERE name = ?1)";
        let mut lacking = Vec::new();
        for &(hash, is_node) in chunks {
            let is_known = || -> rusqlite::Result<bool> {
                let mut find = self.conn.prepare_cached(known)?;
                find.exists(params![home, hash.as_bytes()])
            };
            if is_known().map_err(self.failed("cannot read what is at home"))? {
                continue;
            }
            let refers = match is_node {
                true => match self.chunk(&hash)? {
                    Some(bytes) => vlinder_core::merkle::references(&bytes).unwrap_or_default(),
                    None => continue,
                },
                false if self.has(&hash)? => References::default(),
                false => continue,
            };
            lacking.push(Lacking {
                hash,
                is_node,
                refers,
            });
        }
        Ok(lacking)
    }

    /// Notes that chunks are at that home, each with all below it.
    pub(crate) fn remember(&mut self, home: &str, chunks: &[ContentHash]) -> Result<(), DbError> {
        self.write("cannot note what is at home", |tx| {
            note(tx, home, chunks.iter())
        })
    }

    /// Stores chunks that came from that home.
    pub(crate) fn take_from(
        &mut self,
        home: &str,
        chunks: &[(ContentHash, bytes::Bytes)],
    ) -> Result<(), DbError> {
        self.write("cannot store chunks", |tx| {
            let mut insert = tx.prepare_cached(INSERT_CHUNK)?;
            for (hash, bytes) in chunks {
                insert.execute(params![hash.as_bytes(), bytes.as_ref()])?;
            }
            note(tx, home, chunks.iter().map(|(hash, _)| hash))
        })
    }

    /// How far the log was applied.
    pub fn cursor(&self) -> Result<Option<Cursor>, DbError> {
        let sql = "SELECT created_ms, seq, request FROM cursor";
        let read = |row: &rusqlite::Row| {
            let (created_ms, seq): (i64, i64) = (row.get(0)?, row.get(1)?);
            let at = Position {
                seq: seq as u64,
                request: NodeHash::from_bytes(row.get(2)?),
            };
            Ok(Cursor {
                created_ms: created_ms as u64,
                at,
            })
        };
        self.conn
            .query_row(sql, [], read)
            .optional()
            .map_err(self.failed("cannot read the cursor"))
    }

    /// Moves the cursor on; it never goes back within one log.
    pub(crate) fn advance(&mut self, to: Cursor) -> Result<(), DbError> {
        let (created_ms, seq) = (to.created_ms as i64, to.at.seq as i64);
        self.write("cannot move the cursor", |tx| {
            tx.execute(
                "INSERT INTO cursor (only, created_ms, seq, request) VALUES (1, ?1, ?2, ?3)
                 ON CONFLICT (only) DO UPDATE SET
                     created_ms = excluded.created_ms, seq = excluded.seq, request = excluded.request
                 WHERE created_ms <> excluded.created_ms OR seq < excluded.seq",
                params![created_ms, seq, to.at.request.as_bytes()],
            )?;
            tx.execute("DELETE FROM applied WHERE seq <= (SELECT seq FROM cursor)", [])?;
            Ok(())
        })
    }

    /// Starts over: nothing counts as applied. The chunks stay.
    pub(crate) fn start_over(&mut self) -> Result<(), DbError> {
        self.write("cannot reset the cursor", |tx| {
            tx.execute_batch("DELETE FROM cursor; DELETE FROM applied;")
        })
    }

    /// Which of these requests were not applied yet; by sequence.
    pub(crate) fn unapplied(&self, requests: &[Position]) -> Result<Vec<u64>, DbError> {
        let find = || -> rusqlite::Result<Vec<u64>> {
            let sql = "SELECT 1 FROM applied WHERE seq = ?1 AND request = ?2";
            let mut known = self.conn.prepare_cached(sql)?;
            let mut new = Vec::with_capacity(requests.len());
            for position in requests {
                if !known.exists(params![position.seq as i64, position.request.as_bytes()])? {
                    new.push(position.seq);
                }
            }
            Ok(new)
        };
        find().map_err(self.failed("cannot read what was applied"))
    }

    fn write(
        &mut self,
        what: &'static str,
        write: impl FnOnce(&rusqlite::Transaction) -> rusqlite::Result<()>,
    ) -> Result<(), DbError> {
        let failed = self.failed(what);
        let run = || -> rusqlite::Result<()> {
            let tx = self
                .conn
                .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
            write(&tx)?;
            tx.commit()
        };
        run().map_err(failed)
    }
}

fn is_busy(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy)
}

/// Stores a chunk; one that is there but damaged is mended.
const INSERT_CHUNK: &str = "INSERT INTO chunks (hash, bytes) VALUES (?1, ?2)
    ON CONFLICT (hash) DO UPDATE SET bytes = excluded.bytes WHERE bytes <> excluded.bytes";

/// A chunk that is here, and perhaps not at home.
pub(crate) struct Lacking {
    pub hash: ContentHash,
    pub is_node: bool,
    /// What it refers to, if it is a node.
    pub refers: References,
}

fn note<'a>(
    tx: &rusqlite::Transaction,
    home: &str,
    chunks: impl Iterator<Item = &'a ContentHash>,
) -> rusqlite::Result<()> {
    tx.execute("INSERT OR IGNORE INTO homes (name) VALUES (?1)", [home])?;
    let id: i64 = tx.query_row("SELECT id FROM homes WHERE name = ?1", [home], |row| {
        row.get(0)
    })?;
    let mut insert =
        tx.prepare_cached("INSERT OR IGNORE INTO at_home (home, hash) VALUES (?1, ?2)")?;
    for hash in chunks {
        insert.execute(params![id, hash.as_bytes()])?;
    }
    Ok(())
}

/// The chunks of the file and, above them, those that are not committed yet.
pub(crate) struct Overlay<'a> {
    db: &'a ChunkDb,
    fresh: Fresh,
}

impl Chunks for Overlay<'_> {
    type Error = DbError;

    fn get(&self, hash: &ContentHash) -> Result<Option<Vec<u8>>, DbError> {
        if let Some(bytes) = self.fresh.get(hash) {
            return Ok(Some(bytes.clone()));
        }
        self.db.chunk(hash)
    }

    fn put(&mut self, hash: ContentHash, bytes: &[u8]) -> Result<(), DbError> {
        self.fresh.entry(hash).or_insert_with(|| bytes.to_vec());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_that_meet_at_a_new_file_all_get_it() {
        for _ in 0..30 {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("stores/new.db");
            std::thread::scope(|scope| {
                let opening: Vec<_> = (0..8)
                    .map(|_| scope.spawn(|| ChunkDb::open(&path).map(|_| ())))
                    .collect();
                for opened in opening {
                    opened.join().unwrap().unwrap();
                }
            });
        }
    }
}
