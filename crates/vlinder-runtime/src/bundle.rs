//! An agent's files: a gzipped tar in the blob store, unpacked once per version and node.
//!
//! `<data>/agents/<name>/<hash>/` appears by one rename and is therefore complete where it exists;
//! several workers of a node may unpack the same bundle at the same time. The bundle was made by
//! whoever may deploy, but nothing in it reaches beyond its own directory: absolute paths, `..`,
//! devices, hard links and links that lead out refuse the whole bundle.

use bytes::Bytes;
use flate2::read::GzDecoder;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use tar::EntryType;
use vlinder_bus::Bus;
use vlinder_core::{AgentName, ContentHash};

/// Largest bundle as it is stored, in bytes.
pub const PACKED_BYTES_MAX: u64 = 512 * 1024 * 1024;
/// Most bytes that a bundle may unpack to.
pub const UNPACKED_BYTES_MAX: u64 = 512 * 1024 * 1024;
/// Most files, directories and links in a bundle.
pub const FILES_MAX: u64 = 50_000;
/// Deepest path in a bundle.
const DEPTH_MAX: usize = 64;
/// Versions of an agent whose files are kept: those that may still run, and a few to go back to.
const VERSIONS_KEPT: usize = 5;
/// The agent's own directory beside its versions; never touched here.
const KEPT_DIR: &str = "data";
/// Where an agent without a bundle runs.
const NO_BUNDLE_DIR: &str = "none";

/// Why an agent's files are not here.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The blob store does not give the bundle.
    #[error("the bundle cannot be read from the blob store: {0}")]
    Blob(#[from] vlinder_bus::Error),
    /// The bundle holds something that is not allowed.
    #[error("the bundle is refused: {0}")]
    Refused(String),
    /// The files cannot be written.
    #[error("the bundle cannot be unpacked to {path}: {source}")]
    Io {
        /// Where.
        path: String,
        /// Why not.
        source: io::Error,
    },
}

/// The directory of everything that is kept of an agent on this node.
pub fn agent_dir(data_dir: &Path, agent: &AgentName) -> PathBuf {
    data_dir.join("agents").join(agent.as_str())
}

/// The directory with the files of a bundle; fetches and unpacks it where it is not there yet.
pub async fn ensure(
    bus: &Bus,
    data_dir: &Path,
    agent: &AgentName,
    bundle: Option<ContentHash>,
) -> Result<PathBuf, Error> {
    let home = agent_dir(data_dir, agent);
    let Some(hash) = bundle else {
        let empty = home.join(NO_BUNDLE_DIR);
        fs::create_dir_all(&empty).map_err(io_error(&empty))?;
        return Ok(empty);
    };
    let target = home.join(hash.to_string());
    if target.is_dir() {
        return Ok(target);
    }
    let packed = bus.blob_get(&hash, PACKED_BYTES_MAX).await?;
    let unpacked = target.clone();
    let work = tokio::task::spawn_blocking(move || {
        check_hash(&packed, hash)?;
        place(&home, &target, &packed)?;
        prune(&home, &target);
        Ok(())
    });
    match work.await {
        Ok(outcome) => outcome.map(|()| unpacked),
        Err(panic) => Err(Error::Refused(format!("unpacking it failed: {panic}"))),
    }
}

/// Removes the files of every version, but not the agent's data.
pub async fn remove(data_dir: &Path, agent: &AgentName) {
    let home = agent_dir(data_dir, agent);
    let work = tokio::task::spawn_blocking(move || {
        for (path, _) in versions(&home) {
            let _ = fs::remove_dir_all(path);
        }
        // Only where nothing else is in it.
        let _ = fs::remove_dir(home.join(NO_BUNDLE_DIR));
        let _ = fs::remove_dir(&home);
    });
    let _ = work.await;
}

fn check_hash(packed: &Bytes, hash: ContentHash) -> Result<(), Error> {
    if ContentHash::of(packed) == hash {
        return Ok(());
    }
    Err(Error::Refused(
        "it does not hash to its name; deploy the agent again".to_owned(),
    ))
}

/// Unpacks beside `target`, then renames.
fn place(home: &Path, target: &Path, packed: &[u8]) -> Result<(), Error> {
    let staging = home.join(format!(".unpack-{}", uuid::Uuid::new_v4().simple()));
    fs::create_dir_all(&staging).map_err(io_error(&staging))?;
    let outcome = unpack(packed, &staging).and_then(|()| {
        match fs::rename(&staging, target) {
            Ok(()) => Ok(()),
            // Another worker of this node was faster.
            Err(_) if target.is_dir() => Ok(()),
            Err(error) => Err(io_error(target)(error)),
        }
    });
    if staging.exists() {
        let _ = fs::remove_dir_all(&staging);
    }
    outcome
}

/// Unpacks a gzipped tar into an empty directory.
fn unpack(packed: &[u8], root: &Path) -> Result<(), Error> {
    // Headers and padding come on top of the contents; the exact sum is counted below.
    let stream_max = UNPACKED_BYTES_MAX + FILES_MAX * 2048;
    let mut archive = tar::Archive::new(GzDecoder::new(packed).take(stream_max));
    let damaged = |error: io::Error| Error::Refused(format!("it is damaged: {error}"));
    let (mut files, mut bytes) = (0, 0);
    for entry in archive.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        files += 1;
        if files > FILES_MAX {
            return Err(Error::Refused(format!(
                "it has more than {FILES_MAX} files"
            )));
        }
        let name = entry.path().map_err(damaged)?.into_owned();
        let relative = inner_path(&name)?;
        let kind = entry.header().entry_type();
        if matches!(kind, EntryType::XGlobalHeader | EntryType::XHeader) {
            continue;
        }
        if relative.as_os_str().is_empty() {
            if kind == EntryType::Directory {
                continue;
            }
            return Err(refused(&name, "it has no name"));
        }
        let path = root.join(&relative);
        make_parents(root, &relative)?;
        match kind {
            EntryType::Directory => match fs::create_dir(&path) {
                Err(error)
                    if error.kind() == io::ErrorKind::AlreadyExists && is_real_dir(&path) => {}
                outcome => outcome.map_err(io_error(&path))?,
            },
            EntryType::Regular | EntryType::Continuous => {
                bytes += entry.size();
                if bytes > UNPACKED_BYTES_MAX {
                    let limit = UNPACKED_BYTES_MAX / 1024 / 1024;
                    return Err(Error::Refused(format!(
                        "it unpacks to more than {limit} MiB"
                    )));
                }
                let executable = entry.header().mode().unwrap_or(0o644) & 0o111 != 0;
                write_file(&mut entry, &path, executable)?;
            }
            EntryType::Symlink => {
                let to = entry.link_name().map_err(damaged)?.unwrap_or_default();
                check_link(&relative, &to).map_err(|why| refused(&name, why))?;
                std::os::unix::fs::symlink(&to, &path).map_err(io_error(&path))?;
            }
            _ => {
                return Err(refused(
                    &name,
                    "only files, directories and symbolic links are taken",
                ));
            }
        }
    }
    Ok(())
}

/// `create_new`, so that a name that occurs twice, or a link, is never written through.
fn write_file(entry: &mut impl Read, path: &Path, executable: bool) -> Result<(), Error> {
    let mode = if executable { 0o755 } else { 0o644 };
    let mut options = fs::OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(io_error(path))?;
    io::copy(entry, &mut file).map_err(io_error(path))?;
    // The mode above went through the umask.
    file.set_permissions(fs::Permissions::from_mode(mode))
        .map_err(io_error(path))
}

/// The path within the bundle, without `.`; refuses what leads out of it.
fn inner_path(name: &Path) -> Result<PathBuf, Error> {
    let mut inner = PathBuf::new();
    for component in name.components() {
        match component {
            Component::Normal(part) => inner.push(part),
            Component::CurDir => {}
            _ => return Err(refused(name, "its path leads out of the bundle")),
        }
    }
    if inner.components().count() > DEPTH_MAX {
        return Err(refused(name, "its path is too deep"));
    }
    Ok(inner)
}

/// Makes the directories above a path; refuses where one of them is a link or a file.
fn make_parents(root: &Path, relative: &Path) -> Result<(), Error> {
    let mut path = root.to_owned();
    for part in relative.parent().into_iter().flat_map(Path::components) {
        path.push(part);
        match fs::create_dir(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if !is_real_dir(&path) {
                    return Err(refused(
                        relative,
                        "a directory above it is a link or a file",
                    ));
                }
            }
            Err(error) => return Err(io_error(&path)(error)),
        }
    }
    Ok(())
}

/// A link must be relative and stay within the bundle. `..` may only lead: the directories above the
/// link are real ones, while those that its target names may be links themselves.
fn check_link(at: &Path, to: &Path) -> Result<(), &'static str> {
    let mut above = at.components().count() - 1;
    let mut descended = false;
    for component in to.components() {
        match component {
            Component::Normal(_) => descended = true,
            Component::CurDir => {}
            Component::ParentDir if !descended && above > 0 => above -= 1,
            Component::ParentDir => return Err("its target may lead out of the bundle"),
            Component::RootDir | Component::Prefix(_) => {
                return Err("it links to an absolute path");
            }
        }
    }
    Ok(())
}

fn is_real_dir(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir())
}

fn refused(name: &Path, why: &str) -> Error {
    let shown: String = name.to_string_lossy().chars().take(200).collect();
    Error::Refused(format!("{shown:?}: {why}"))
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> Error + use<> {
    let path = path.display().to_string();
    move |source| Error::Io {
        path: path.clone(),
        source,
    }
}

/// The directories of versions with the time they were made, newest first.
fn versions(home: &Path) -> Vec<(PathBuf, std::time::SystemTime)> {
    let entries = fs::read_dir(home).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .filter(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name != KEPT_DIR && name.parse::<ContentHash>().is_ok()
        })
        .filter_map(|entry| Some((entry.path(), entry.metadata().ok()?.modified().ok()?)))
        .collect();
    found.sort_by_key(|(_, time)| std::cmp::Reverse(*time));
    found
}

fn prune(home: &Path, current: &Path) {
    let old = versions(home).into_iter().skip(VERSIONS_KEPT);
    for (path, _) in old.filter(|(path, _)| path != current) {
        if let Err(error) = fs::remove_dir_all(&path) {
            tracing::warn!(path = %path.display(), %error, "old files of an agent stay");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;

    /// A bundle with entries written raw, so that hostile names get in.
    fn bundle(entries: &[(EntryType, &str, &str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        for (kind, name, link, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o6755);
            header.set_size(content.len() as u64);
            let raw = header.as_gnu_mut().unwrap();
            raw.name[..name.len()].copy_from_slice(name.as_bytes());
            raw.linkname[..link.len()].copy_from_slice(link.as_bytes());
            header.set_cksum();
            builder.append(&header, *content).unwrap();
        }
        builder.into_inner().unwrap().finish().unwrap()
    }

    fn try_unpack(packed: &[u8]) -> (tempfile::TempDir, Result<(), Error>) {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("home");
        let outcome = place(&home, &home.join("v1"), packed);
        (dir, outcome)
    }

    #[test]
    fn files_directories_and_inner_links_are_unpacked() {
        let (dir, outcome) = try_unpack(&bundle(&[
            (EntryType::Directory, "./", "", b""),
            (EntryType::Regular, "./agent.py", "", b"print()"),
            (EntryType::Regular, "lib/a/b.py", "", b"x"),
            (EntryType::Symlink, "lib/link.py", "../agent.py", b""),
        ]));
        outcome.unwrap();
        let root = dir.path().join("home/v1");
        assert_eq!(fs::read(root.join("lib/link.py")).unwrap(), b"print()");
        let mode = fs::metadata(root.join("agent.py"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o7777, 0o755, "set-id bits must go");
    }

    #[test]
    fn hostile_bundles_are_refused_whole() {
        let f = EntryType::Regular;
        let l = EntryType::Symlink;
        for (what, entries) in [
            ("dots", vec![(f, "../evil", "", &b"x"[..])]),
            ("inner dots", vec![(f, "a/../../evil", "", b"x")]),
            ("absolute", vec![(f, "/tmp/evil", "", b"x")]),
            ("link out", vec![(l, "a", "../..", b"")]),
            (
                "link by a link",
                vec![(l, "b", ".", b""), (l, "a", "b/..", b"")],
            ),
            ("absolute link", vec![(l, "a", "/etc", b"")]),
            (
                "through a link",
                vec![
                    (l, "a", "b", b""),
                    (EntryType::Directory, "b", "", b""),
                    (f, "a/x", "", b"x"),
                ],
            ),
            ("over a link", vec![(l, "a", "b", b""), (f, "a", "", b"x")]),
            (
                "hard link",
                vec![(EntryType::Link, "a", "/etc/passwd", b"")],
            ),
            ("device", vec![(EntryType::Char, "a", "", b"")]),
            ("fifo", vec![(EntryType::Fifo, "a", "", b"")]),
            (
                "file as directory",
                vec![(f, "a", "", b""), (f, "a/b", "", b"")],
            ),
        ] {
            let (dir, outcome) = try_unpack(&bundle(&entries));
            assert!(outcome.is_err(), "{what} was accepted");
            let left: Vec<_> = fs::read_dir(dir.path().join("home"))
                .unwrap()
                .flatten()
                .collect();
            assert!(left.is_empty(), "{what} left {left:?}");
            assert!(!dir.path().join("evil").exists() && !dir.path().join("home/evil").exists());
        }
        assert!(try_unpack(b"not a gzip").1.is_err());
        let whole = bundle(&[(f, "a", "", &[7; 4000])]);
        assert!(try_unpack(&whole[..whole.len() / 2]).1.is_err());
    }

    #[test]
    fn a_bomb_is_refused() {
        let mut builder = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        let mut header = tar::Header::new_gnu();
        header.set_size(UNPACKED_BYTES_MAX + 1);
        header.set_path("zeros").unwrap();
        header.set_cksum();
        builder.append(&header, &b"0"[..]).unwrap();
        let packed = builder.into_inner().unwrap().finish().unwrap();
        let (_dir, outcome) = try_unpack(&packed);
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains("more than 512 MiB"), "{error}");
    }
}
