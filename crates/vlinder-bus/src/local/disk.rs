//! How much room the disk has, so that the bus refuses before SQLite fails.

use crate::error::Error;
use rusqlite::ffi;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The disk is looked at after so many bytes written: far below the reserve.
const LOOK_EVERY: usize = 4 * 1024 * 1024;
/// And before a write when the last look is older: others fill disks too.
const LOOK_AFTER: Duration = Duration::from_millis(50);
/// With less free than this, a failed write is taken for a full disk whatever SQLite called it, in bytes.
const NEARLY_NOTHING: u64 = 1024 * 1024;

/// See the module.
pub(super) struct Disk {
    path: PathBuf,
    /// New messages are refused below so many free bytes; acknowledgements and ends still fit.
    reserve: u64,
    since_look: AtomicUsize,
    low: AtomicBool,
    began: Instant,
    /// When it was looked at last, in milliseconds after `began`.
    looked_ms: AtomicU64,
    /// The writer could not write its last batch for want of space.
    stuck: AtomicBool,
}

impl Disk {
    /// The disk under `path`.
    pub(super) fn new(path: &Path, reserve: u64) -> Self {
        let disk = Self {
            path: path.to_owned(),
            reserve,
            since_look: AtomicUsize::new(0),
            low: AtomicBool::new(false),
            began: Instant::now(),
            looked_ms: AtomicU64::new(0),
            stuck: AtomicBool::new(false),
        };
        disk.look();
        disk
    }

    /// The file that the bus writes.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn free(&self) -> Option<u64> {
        let parent = self.path.parent().filter(|p| !p.as_os_str().is_empty());
        let stat = rustix::fs::statvfs(parent.unwrap_or(Path::new("."))).ok()?;
        Some(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Looks now; a disk that does not tell is taken to have room, since SQLite still will.
    fn look(&self) -> bool {
        let low = self.free().is_some_and(|free| free < self.reserve);
        self.low.store(low, Ordering::Relaxed);
        self.looked_ms.store(self.now_ms(), Ordering::Relaxed);
        low
    }

    fn now_ms(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }

    fn is_due(&self) -> bool {
        let age = self
            .now_ms()
            .saturating_sub(self.looked_ms.load(Ordering::Relaxed));
        u128::from(age) >= LOOK_AFTER.as_millis()
    }

    /// So much was written.
    pub(super) fn wrote(&self, bytes: usize) {
        let since = self.since_look.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if since >= LOOK_EVERY {
            self.since_look.store(0, Ordering::Relaxed);
            self.look();
        }
    }

    /// Notes whether the writer is stuck; returns whether that changed.
    pub(super) fn set_stuck(&self, stuck: bool) -> bool {
        self.stuck.swap(stuck, Ordering::Relaxed) != stuck
    }

    /// Whether the writer waits for space.
    pub(super) fn is_stuck(&self) -> bool {
        self.stuck.load(Ordering::Relaxed)
    }

    /// Refuses new data when there is no room for it.
    pub(super) fn admit(&self) -> Result<(), Error> {
        // While it is low nothing is written that would look, so the one who asks looks.
        let may_be_low = self.low.load(Ordering::Relaxed) || self.is_due();
        if self.is_stuck() || (may_be_low && self.look()) {
            return Err(self.full());
        }
        Ok(())
    }

    /// What a failed write means.
    pub(super) fn trouble(&self, error: &rusqlite::Error) -> Trouble {
        let rusqlite::Error::SqliteFailure(failure, _) = error else {
            return Trouble::Broken;
        };
        match failure.extended_code {
            ffi::SQLITE_FULL => Trouble::NoSpace,
            // After a failed sync nobody knows what is on the disk: never to be tried again.
            ffi::SQLITE_IOERR_FSYNC | ffi::SQLITE_IOERR_DIR_FSYNC => Trouble::Broken,
            code => match code & 0xff {
                ffi::SQLITE_BUSY | ffi::SQLITE_LOCKED => Trouble::Busy,
                ffi::SQLITE_IOERR | ffi::SQLITE_CANTOPEN if self.is_empty() => Trouble::NoSpace,
                _ => Trouble::Broken,
            },
        }
    }

    /// Whether there is no space to speak of.
    pub(super) fn is_empty(&self) -> bool {
        self.free().is_some_and(|free| free < NEARLY_NOTHING)
    }

    /// The error of whoever wants to write then.
    pub(super) fn full(&self) -> Error {
        Error::DiskFull {
            path: self.path.display().to_string(),
        }
    }
}

/// What a failed write means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trouble {
    /// There was no space: to be tried again when there is.
    NoSpace,
    /// Somebody else writes to the file, e.g. a person with the `sqlite3` command: to be tried again.
    Busy,
    /// The store cannot be relied upon any more.
    Broken,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_write_is_seen_before_the_next_message() {
        const MIB: u64 = 1024 * 1024;
        let dir = tempfile::tempdir().unwrap();
        let free = Disk::new(&dir.path().join("bus.db"), 0).free().unwrap();
        let disk = Disk::new(&dir.path().join("bus.db"), free.saturating_sub(256 * MIB));
        assert!(disk.admit().is_ok());
        let other = std::fs::File::create(dir.path().join("other")).unwrap();
        let flags = rustix::fs::FallocateFlags::empty();
        rustix::fs::fallocate(&other, flags, 0, 512 * MIB).unwrap();
        std::thread::sleep(LOOK_AFTER);
        assert!(matches!(disk.admit(), Err(Error::DiskFull { .. })));
        other.set_len(0).unwrap();
        assert!(disk.admit().is_ok(), "room that came back is used at once");
    }
}
