//! The repository: objects, refs, and an index beside them in SQLite.
//!
//! The index (`vlinder/index.db` in the repository) knows which commit is which turn's, which refs
//! there shall be, and the cursor. It goes with the repository, and comes back with it.

use crate::error::{Error, git};
use gix_hash::{Kind as HashKind, ObjectId};
use gix_lock::acquire::Fail;
use gix_object::{Find as _, Kind, TreeRef, Write as _, WriteTo};
use gix_ref::transaction::{Change, LogChange, PreviousValue, RefEdit};
use gix_ref::{FullName, Target, file};
use rusqlite::{Connection, OptionalExtension, params};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The form of commits and index. Another one: the repository is made anew.
const VERSION: i64 = 1;
/// How long a ref waits for somebody else's lock, such as that of `git gc`.
const LOCK_WAIT: Duration = Duration::from_secs(5);
/// How long the index waits for another writer's transaction.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

const TABLES: &str = "
CREATE TABLE epoch (epoch INTEGER NOT NULL);
INSERT INTO epoch VALUES (0);
CREATE TABLE cursors (
    stream INTEGER PRIMARY KEY, created_ms INTEGER NOT NULL, seq INTEGER NOT NULL, hash TEXT,
    resume INTEGER NOT NULL     -- read from behind this one: what is before it is in commits
);
CREATE TABLE turns (
    submission TEXT PRIMARY KEY, end_hash TEXT NOT NULL,
    id TEXT NOT NULL, parent TEXT       -- commits
) WITHOUT ROWID;
CREATE INDEX turns_by_end ON turns (end_hash);
CREATE TABLE sessions (id TEXT PRIMARY KEY, name TEXT NOT NULL, ref TEXT NOT NULL UNIQUE) WITHOUT ROWID;
CREATE TABLE branches (
    session TEXT NOT NULL, name TEXT NOT NULL,
    from_hash TEXT, submission TEXT,    -- where it was forked
    head TEXT, dirty INTEGER NOT NULL,  -- commit; whether its ref is to be written
    PRIMARY KEY (session, name)
) WITHOUT ROWID;
CREATE INDEX branches_to_write ON branches (dirty) WHERE dirty;
CREATE INDEX branches_by_fork ON branches (submission) WHERE head IS NULL;
";

/// Objects; only for the thread that made it.
pub(crate) struct Objects {
    loose: gix_odb::loose::Store,
    directory: PathBuf,
}

impl Objects {
    /// Writes an object, if it is not there.
    pub fn write(&self, kind: Kind, object: &dyn WriteTo) -> Result<ObjectId, Error> {
        let mut bytes = Vec::new();
        object
            .write_to(&mut bytes)
            .map_err(git("cannot encode an object"))?;
        self.write_bytes(kind, &bytes)
    }

    /// Writes a blob, if it is not there.
    pub fn blob(&self, bytes: &[u8]) -> Result<ObjectId, Error> {
        self.write_bytes(Kind::Blob, bytes)
    }

    fn write_bytes(&self, kind: Kind, bytes: &[u8]) -> Result<ObjectId, Error> {
        let id = gix_object::compute_hash(HashKind::Sha1, kind, bytes)
            .map_err(git("cannot hash an object"))?;
        if self.loose.contains(&id) {
            return Ok(id);
        }
        self.loose
            .write_buf_with_known_id(kind, bytes, id)
            .map_err(git("cannot write an object"))
    }

    /// The entries of a tree.
    pub fn tree(&self, id: ObjectId) -> Result<Vec<gix_object::tree::Entry>, Error> {
        let bytes = self.read(id)?;
        let tree = TreeRef::from_bytes(&bytes, HashKind::Sha1).map_err(git("a tree is damaged"))?;
        let entries = tree.entries.into_iter();
        Ok(entries
            .map(|entry| gix_object::tree::Entry {
                mode: entry.mode,
                filename: entry.filename.into(),
                oid: entry.oid.into(),
            })
            .collect())
    }

    /// The tree of a commit.
    pub fn tree_of(&self, commit: ObjectId) -> Result<ObjectId, Error> {
        let bytes = self.read(commit)?;
        let commit = gix_object::CommitRef::from_bytes(&bytes, HashKind::Sha1)
            .map_err(git("a commit is damaged"))?;
        Ok(commit.tree())
    }

    fn read(&self, id: ObjectId) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        let found = self.loose.try_find(&id, &mut bytes);
        if found.map_err(git("cannot read an object"))?.is_some() {
            return Ok(bytes);
        }
        // Somebody has packed it.
        let all = gix_odb::at(&self.directory, HashKind::Sha1).map_err(git("cannot read packs"))?;
        let found = all.try_find(&id, &mut bytes);
        match found.map_err(git("cannot read an object"))? {
            Some(_) => Ok(bytes),
            None => Err(Error::StartOver("an object of the repository is missing")),
        }
    }
}

/// Where a stream is read up to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cursor {
    pub created_ms: u64,
    pub seq: u64,
    pub hash: Option<String>,
    /// Reading goes on behind this one.
    pub resume: u64,
}

/// A repository that is written.
pub(crate) struct Repo {
    path: PathBuf,
    index: Connection,
    /// Of the index, to notice that it was deleted.
    inode: u64,
    epoch: i64,
}

impl Repo {
    /// Opens the repository, or makes it where it is missing or of another release, and becomes its
    /// writer. The lease must be held.
    pub fn open(path: &Path) -> Result<Self, Error> {
        match Self::open_existing(path) {
            Ok(Some(repo)) => Ok(repo),
            Ok(None) => Self::create(path),
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "the repository cannot be used; it is made anew from the log");
                Self::create(path)
            }
        }
    }

    fn open_existing(path: &Path) -> Result<Option<Self>, Error> {
        let file = index_of(path);
        if !file.exists() || !path.join("HEAD").exists() {
            return Ok(None);
        }
        let index = connect(&file)?;
        let version: i64 = index.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        if version != VERSION {
            return Ok(None);
        }
        clear_locks(&path.join("refs"))?;
        for name in ["HEAD.lock", "packed-refs.lock"] {
            remove_file(&path.join(name))?;
        }
        Self::begin(path, index).map(Some)
    }

    /// Throws away what is there and begins an empty repository.
    pub fn create(path: &Path) -> Result<Self, Error> {
        let mut old = path.as_os_str().to_owned();
        old.push(".old");
        let old = PathBuf::from(old);
        // Renamed first: whoever reads it meanwhile finds all of it or nothing.
        for moved in [false, true] {
            if moved && path.exists() {
                std::fs::rename(path, &old).map_err(io("cannot move the old repository away"))?;
            }
            if old.exists() {
                std::fs::remove_dir_all(&old).map_err(io("cannot remove the old repository"))?;
            }
        }
        for dir in [
            "objects/info",
            "objects/pack",
            "refs/heads",
            "refs/tags",
            "info",
            "vlinder",
        ] {
            std::fs::create_dir_all(path.join(dir)).map_err(io("cannot make the repository"))?;
        }
        let index = connect(&index_of(path))?;
        index.execute_batch(&format!(
            "BEGIN; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;"
        ))?;
        let files = [
            (
                "config",
                "[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = true\n[gc]\n\tauto = 0\n",
            ),
            (
                "description",
                "Conversations, written by Vlinder from its record.\n",
            ),
            // Last: it makes this a repository.
            ("HEAD", "ref: refs/heads/main\n"),
        ];
        for (name, text) in files {
            std::fs::write(path.join(name), text).map_err(io("cannot make the repository"))?;
        }
        Self::begin(path, index)
    }

    fn begin(path: &Path, index: Connection) -> Result<Self, Error> {
        let epoch = index.query_row(
            "UPDATE epoch SET epoch = epoch + 1 RETURNING epoch",
            [],
            |row| row.get(0),
        )?;
        let inode = inode_of(&index_of(path)).ok_or(Error::Deleted)?;
        Ok(Self {
            path: path.to_owned(),
            index,
            inode,
            epoch,
        })
    }

    /// `Deleted` when the repository is no longer the one that was opened.
    pub fn check(&self) -> Result<(), Error> {
        let there = inode_of(&index_of(&self.path)) == Some(self.inode);
        if there && self.path.join("HEAD").exists() && self.path.join("objects").exists() {
            return Ok(());
        }
        Err(Error::Deleted)
    }

    /// Its objects.
    pub fn objects(&self) -> Objects {
        let directory = self.path.join("objects");
        Objects {
            loose: gix_odb::loose::Store::at(&directory, HashKind::Sha1),
            directory,
        }
    }

    pub fn cursor(&self, stream: i64) -> Result<Option<Cursor>, Error> {
        let mut query = self.index.prepare_cached(
            "SELECT created_ms, seq, hash, resume FROM cursors WHERE stream = ?1",
        )?;
        let found = query.query_row([stream], |row| {
            Ok(Cursor {
                created_ms: row.get::<_, i64>(0)? as u64,
                seq: row.get::<_, i64>(1)? as u64,
                hash: row.get(2)?,
                resume: row.get::<_, i64>(3)? as u64,
            })
        });
        Ok(found.optional()?)
    }

    /// A session, under the name that its refs begin with. The first one of a name gets it.
    pub fn add_session(&self, id: &str, name: &str) -> Result<(), Error> {
        let known = self
            .index
            .prepare_cached("SELECT 1 FROM sessions WHERE id = ?1")?
            .exists([id])?;
        if known {
            return Ok(());
        }
        let mut taken = self
            .index
            .prepare_cached("SELECT 1 FROM sessions WHERE ref = ?1")?;
        let mut wanted = if crate::names::is_ref_safe(name) {
            name.to_owned()
        } else {
            crate::names::word(id)
        };
        if taken.exists([&wanted])? {
            wanted = id.to_owned();
        }
        while taken.exists([&wanted])? {
            // Another session took this one's id for its name.
            wanted.push_str("-2");
        }
        self.index
            .prepare_cached("INSERT INTO sessions (id, name, ref) VALUES (?1, ?2, ?3)")?
            .execute([id, name, &wanted])?;
        Ok(())
    }

    /// The name of a session, if it is known.
    pub fn session_name(&self, id: &str) -> Result<Option<String>, Error> {
        let mut query = self
            .index
            .prepare_cached("SELECT name FROM sessions WHERE id = ?1")?;
        Ok(query.query_row([id], |row| row.get(0)).optional()?)
    }

    /// A branch that begins at a node of a turn.
    pub fn add_fork(
        &self,
        session: &str,
        branch: &str,
        from: &str,
        submission: Option<&str>,
    ) -> Result<(), Error> {
        let turn = match self.turn_by_end(from)? {
            Some(commit) => Some(commit),
            None => match submission {
                Some(submission) => self.turn(submission)?.and_then(|turn| turn.parent),
                None => None,
            },
        };
        self.index
            .prepare_cached(
                "INSERT INTO branches (session, name, from_hash, submission, head, dirty) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
                 ON CONFLICT (session, name) DO NOTHING",
            )?
            .execute(params![session, branch, from, submission, turn.map(|id| id.to_string()), turn.is_some()])?;
        Ok(())
    }

    /// The commit of the turn that ended with this node.
    pub fn turn_by_end(&self, end: &str) -> Result<Option<ObjectId>, Error> {
        let mut query = self
            .index
            .prepare_cached("SELECT id FROM turns WHERE end_hash = ?1")?;
        let found: Option<String> = query.query_row([end], |row| row.get(0)).optional()?;
        found.map(|id| object_id(&id)).transpose()
    }

    /// The commit of a turn.
    pub fn turn(&self, submission: &str) -> Result<Option<TurnCommit>, Error> {
        let mut query = self
            .index
            .prepare_cached("SELECT end_hash, id, parent FROM turns WHERE submission = ?1")?;
        let found = query
            .query_row([submission], |row| {
                Ok((
                    row.get::<_, String>(0)?,
                    row.get::<_, String>(1)?,
                    row.get::<_, Option<String>>(2)?,
                ))
            })
            .optional()?;
        let Some((end, id, parent)) = found else {
            return Ok(None);
        };
        let parent = parent.map(|id| object_id(&id)).transpose()?;
        Ok(Some(TurnCommit {
            end,
            id: object_id(&id)?,
            parent,
        }))
    }

    /// Notes the commit of a turn, and moves the branch to it unless `beside`.
    pub fn add_turn(
        &self,
        session: &str,
        branch: &str,
        submission: &str,
        turn: &TurnCommit,
        beside: bool,
    ) -> Result<(), Error> {
        let (id, parent) = (turn.id.to_string(), turn.parent.map(|id| id.to_string()));
        self.index
            .prepare_cached("INSERT OR REPLACE INTO turns (submission, end_hash, id, parent) VALUES (?1, ?2, ?3, ?4)")?
            .execute(params![submission, turn.end, id, parent])?;
        if !beside {
            self.index
                .prepare_cached(
                    "INSERT INTO branches (session, name, head, dirty) VALUES (?1, ?2, ?3, 1)
                     ON CONFLICT (session, name) DO UPDATE SET head = excluded.head, dirty = 1",
                )?
                .execute(params![session, branch, id])?;
        }
        // Branches that were forked from it before it was read.
        self.index
            .prepare_cached(
                "UPDATE branches SET head = CASE WHEN from_hash = ?2 THEN ?3 ELSE ?4 END, dirty = 1
                 WHERE submission = ?1 AND head IS NULL AND (from_hash = ?2 OR ?4 IS NOT NULL)",
            )?
            .execute(params![submission, turn.end, id, parent])?;
        Ok(())
    }

    /// Moves the refs of branches that changed and `HEAD` to that of `latest`, then the cursors. Refused
    /// when another writer has begun.
    pub fn flush(
        &mut self,
        latest: Option<(&str, &str)>,
        cursors: &[(i64, Cursor)],
    ) -> Result<(), Error> {
        self.check()?;
        let refs = file::Store::at_opts(
            self.path.clone(),
            HashKind::Sha1,
            gix_ref::store::init::Options {
                write_reflog: gix_ref::store::WriteReflog::Disable,
                ..Default::default()
            },
        );
        let transaction = self
            .index
            .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let epoch: i64 = transaction.query_row("SELECT epoch FROM epoch", [], |row| row.get(0))?;
        if epoch != self.epoch {
            return Err(Error::Fenced);
        }
        let (mut edits, mut head) = (Vec::new(), None);
        {
            let mut query = transaction.prepare_cached(
                "SELECT s.ref, b.name, b.head FROM branches b JOIN sessions s ON s.id = b.session WHERE b.dirty AND b.head IS NOT NULL",
            )?;
            let mut rows = query.query([])?;
            while let Some(row) = rows.next()? {
                let (session, branch, head): (String, String, String) =
                    (row.get(0)?, row.get(1)?, row.get(2)?);
                edits.push(edit(
                    ref_name(&session, &branch)?,
                    Target::Object(object_id(&head)?),
                ));
            }
        }
        if let Some((session, branch)) = latest {
            let mut query = transaction.prepare_cached("SELECT ref FROM sessions WHERE id = ?1")?;
            let session: Option<String> =
                query.query_row([session], |row| row.get(0)).optional()?;
            if let Some(session) = session {
                let name = FullName::try_from("HEAD").map_err(git("HEAD is no ref"))?;
                head = Some(edit(name, Target::Symbolic(ref_name(&session, branch)?)));
            }
        }
        // `HEAD` last: what it names is there.
        move_refs(&refs, edits)?;
        move_refs(&refs, head.into_iter().collect())?;
        transaction.execute("UPDATE branches SET dirty = 0 WHERE dirty", [])?;
        for (stream, cursor) in cursors {
            transaction
                .prepare_cached("INSERT OR REPLACE INTO cursors (stream, created_ms, seq, hash, resume) VALUES (?1, ?2, ?3, ?4, ?5)")?
                .execute(params![stream, cursor.created_ms as i64, cursor.seq as i64, cursor.hash, cursor.resume as i64])?;
        }
        transaction.commit()?;
        Ok(())
    }
}

/// The commit of a turn.
pub(crate) struct TurnCommit {
    /// The node that ended it.
    pub end: String,
    /// The commit.
    pub id: ObjectId,
    /// That of the turn before it.
    pub parent: Option<ObjectId>,
}

/// Moves refs: all of them or, if one cannot be locked, none.
fn move_refs(refs: &file::Store, edits: Vec<RefEdit>) -> Result<(), Error> {
    if edits.is_empty() {
        return Ok(());
    }
    let wait = Fail::AfterDurationWithBackoff(LOCK_WAIT);
    let prepared = refs
        .transaction()
        .prepare(edits, wait, wait)
        .map_err(git("cannot lock refs"))?;
    prepared.commit(None).map_err(git("cannot move refs"))?;
    Ok(())
}

fn edit(name: FullName, new: Target) -> RefEdit {
    RefEdit {
        change: Change::Update {
            log: LogChange::default(),
            expected: PreviousValue::Any,
            new,
        },
        name,
        deref: false,
    }
}

/// Names of branches have no dot and no slash, so each is a valid component of a ref.
fn ref_name(session: &str, branch: &str) -> Result<FullName, Error> {
    FullName::try_from(format!("refs/heads/{session}/{branch}"))
        .map_err(git("a branch has no valid ref"))
}

fn object_id(hex: &str) -> Result<ObjectId, Error> {
    ObjectId::from_hex(hex.as_bytes()).map_err(git("the index names no object"))
}

fn index_of(path: &Path) -> PathBuf {
    path.join("vlinder/index.db")
}

fn inode_of(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().map(|meta| meta.ino())
}

fn connect(file: &Path) -> Result<Connection, Error> {
    let connection = Connection::open(file)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    // What a power cut takes from here is read from the log again.
    connection.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;")?;
    connection.set_prepared_statement_cache_capacity(32);
    Ok(connection)
}

/// Lock files of a writer that died.
fn clear_locks(dir: &Path) -> Result<(), Error> {
    for entry in std::fs::read_dir(dir).map_err(io("cannot read refs"))? {
        let entry = entry.map_err(io("cannot read refs"))?;
        let is_dir = entry.file_type().map_err(io("cannot read refs"))?.is_dir();
        if is_dir {
            clear_locks(&entry.path())?;
        } else if entry.file_name().to_string_lossy().ends_with(".lock") {
            remove_file(&entry.path())?;
        }
    }
    Ok(())
}

fn remove_file(path: &Path) -> Result<(), Error> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(Error::Io {
            what: format!("cannot remove {}", path.display()),
            source,
        }),
        _ => Ok(()),
    }
}

fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::Io {
        what: what.to_owned(),
        source,
    }
}
