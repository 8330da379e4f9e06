//! Small files: bounded reads, writes in one step.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The text of a file of at most `bytes_max` bytes; `None` when there is no such file.
pub(crate) fn read(path: &Path, bytes_max: u64) -> Result<Option<String>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        return Err(Error::other(format!("is larger than {bytes_max} bytes")));
    }
    String::from_utf8(bytes)
        .map(Some)
        .map_err(|_| Error::other("is not UTF-8"))
}

/// Writes a new file beside `path`, with `mode`, synced to disk; the caller moves it into place.
/// Makes the directory (readable by its owner only) where it is missing.
pub(crate) fn write_beside(path: &Path, bytes: &[u8], mode: u32) -> Result<PathBuf> {
    let parent = path.parent().unwrap_or(Path::new("."));
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(parent)?;
    let mut name = path.file_name().unwrap_or_default().to_owned();
    // Two processes never share a name; two threads of one would, hence the thread's id.
    let thread = format!("{:?}", std::thread::current().id());
    let thread: String = thread.chars().filter(char::is_ascii_digit).collect();
    name.push(format!(".{}-{thread}.new", std::process::id()));
    let new = parent.join(name);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&new)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    if let Err(error) = written {
        // The write failed already; what remains of it is of no use to anyone.
        let _ = std::fs::remove_file(&new);
        return Err(error);
    }
    Ok(new)
}

/// Writes `path` in one step: readers see the old content or the new one.
pub(crate) fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let new = write_beside(path, bytes, mode)?;
    std::fs::rename(&new, path)
}

/// Removes a file; fine when there is none.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
