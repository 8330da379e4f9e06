//! The lock on the data directory: one process at a time, until it ends in whatever way.

use crate::error::Error;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;

/// Takes the lock, which is held while the file is open. Its content names the holder.
pub(super) fn acquire(path: &Path) -> Result<File, Error> {
    let io_error = |error: std::io::Error| Error::Storage {
        reason: format!("{}: {error}", path.display()),
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(io_error)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(Error::Locked {
                path: path.display().to_string(),
                holder: holder(&mut file),
            });
        }
        Err(TryLockError::Error(error)) => return Err(io_error(error)),
    }
    // The content is only for people: a disk without room for it is no reason not to start.
    let _ = file
        .set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(file)
}

fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file.take(20).read_to_string(&mut text);
    match (read, text.trim().parse::<u32>()) {
        (Ok(_), Ok(pid)) => format!(" (pid {pid})"),
        _ => String::new(),
    }
}
