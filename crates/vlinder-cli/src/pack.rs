//! An agent's directory as one gzipped tar. The same files give the same bytes: sorted, without times
//! and owners, so that deploying again what is deployed changes nothing.
//!
//! What it refuses: links that lead out of the directory, sockets and the like, more than fits.

use crate::error::Error;
use crate::ignore::Ignore;
use flate2::Compression;
use flate2::write::GzEncoder;
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use tar::{EntryType, Header};
use vlinder_client::BUNDLE_BYTES_MAX;

/// Most files, directories and links: what a runtime worker unpacks.
const FILES_MAX: usize = 50_000;
/// Most bytes before packing: what a runtime worker unpacks.
const UNPACKED_BYTES_MAX: u64 = 512 * 1024 * 1024;
/// Deepest path: what a runtime worker unpacks.
const DEPTH_MAX: usize = 64;
/// The file with the patterns of what stays behind.
const IGNORE_FILE: &str = ".vlinderignore";

/// A packed directory.
#[derive(Debug)]
pub struct Bundle {
    /// The gzipped tar.
    pub bytes: Arc<[u8]>,
    /// How many files, directories and links it has.
    pub entries: usize,
}

/// Packs a directory.
pub fn pack(root: &Path) -> Result<Bundle, Error> {
    let ignore = match fs::read_to_string(root.join(IGNORE_FILE)) {
        Ok(text) => {
            Ignore::parse(&text).map_err(|why| Error::Usage(format!("{IGNORE_FILE}: {why}")))?
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ignore::default(),
        Err(error) => return Err(Error::io(format!("cannot read {IGNORE_FILE}"))(error)),
    };
    let gzip = GzEncoder::new(Capped(Vec::new()), Compression::default());
    let mut packer = Packer {
        root,
        ignore,
        tar: tar::Builder::new(gzip),
        entries: 0,
        bytes: 0,
    };
    packer.directory(Path::new(""), 0)?;
    let entries = packer.entries;
    let finished = packer.tar.into_inner().and_then(GzEncoder::finish);
    let bytes = finished
        .map_err(|error| packing(Path::new("the directory"), error))?
        .0;
    Ok(Bundle {
        bytes: bytes.into(),
        entries,
    })
}

struct Packer<'a> {
    root: &'a Path,
    ignore: Ignore,
    tar: tar::Builder<GzEncoder<Capped>>,
    entries: usize,
    bytes: u64,
}

impl Packer<'_> {
    fn directory(&mut self, inner: &Path, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(refused(inner, "it is too deep"));
        }
        let path = self.root.join(inner);
        let cannot = || Error::io(format!("cannot read {}", path.display()));
        let mut names = Vec::new();
        for entry in fs::read_dir(&path).map_err(cannot())? {
            names.push(entry.map_err(cannot())?.file_name());
        }
        names.sort();
        for name in names {
            let inner = inner.join(name);
            let path = self.root.join(&inner);
            let meta = fs::symlink_metadata(&path)
                .map_err(Error::io(format!("cannot read {}", path.display())))?;
            let stays = self
                .ignore
                .leaves_out(inner.as_os_str().as_bytes(), meta.is_dir());
            if stays || inner == Path::new(IGNORE_FILE) {
                continue;
            }
            self.entries += 1;
            if self.entries > FILES_MAX {
                return Err(Error::Usage(format!(
                    "the directory has more than {FILES_MAX} files; name what the agent does not need in {IGNORE_FILE}"
                )));
            }
            if meta.is_dir() {
                self.add(&inner, EntryType::Directory, 0o755, &[])?;
                self.directory(&inner, depth + 1)?;
            } else if meta.is_symlink() {
                self.link(&inner, &path)?;
            } else if meta.is_file() {
                self.file(&inner, &path, &meta)?;
            } else {
                return Err(refused(
                    &inner,
                    "only files, directories and symbolic links can be deployed",
                ));
            }
        }
        Ok(())
    }

    fn file(&mut self, inner: &Path, path: &Path, meta: &fs::Metadata) -> Result<(), Error> {
        let too_much = || {
            let limit = UNPACKED_BYTES_MAX / 1024 / 1024;
            Error::Usage(format!(
                "the directory has more than {limit} MiB; name what the agent does not need in {IGNORE_FILE}"
            ))
        };
        // Asked before reading, so that a huge file is never in memory.
        if self.bytes + meta.len() > UNPACKED_BYTES_MAX {
            return Err(too_much());
        }
        let content =
            fs::read(path).map_err(Error::io(format!("cannot read {}", path.display())))?;
        self.bytes += content.len() as u64;
        if self.bytes > UNPACKED_BYTES_MAX {
            return Err(too_much());
        }
        let executable = meta.permissions().mode() & 0o111 != 0;
        let mode = if executable { 0o755 } else { 0o644 };
        self.add(inner, EntryType::Regular, mode, &content)
    }

    fn link(&mut self, inner: &Path, path: &Path) -> Result<(), Error> {
        let to =
            fs::read_link(path).map_err(Error::io(format!("cannot read {}", path.display())))?;
        check_link(inner, &to).map_err(|why| refused(inner, why))?;
        let mut header = header(EntryType::Symlink, 0o777, 0);
        self.tar
            .append_link(&mut header, inner, &to)
            .map_err(|error| packing(inner, error))
    }

    fn add(
        &mut self,
        inner: &Path,
        kind: EntryType,
        mode: u32,
        content: &[u8],
    ) -> Result<(), Error> {
        let mut header = header(kind, mode, content.len() as u64);
        self.tar
            .append_data(&mut header, inner, content)
            .map_err(|error| packing(inner, error))
    }
}

fn header(kind: EntryType, mode: u32, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

/// A link must be relative and stay within the directory. `..` may only lead: the directories above
/// the link are real ones, while those that its target names may be links themselves.
fn check_link(at: &Path, to: &Path) -> Result<(), &'static str> {
    let mut above = at.components().count().saturating_sub(1);
    let mut descended = false;
    for component in to.components() {
        match component {
            Component::Normal(_) => descended = true,
            Component::CurDir => {}
            Component::ParentDir if !descended && above > 0 => above -= 1,
            Component::ParentDir => return Err("it is a link that may lead out of the directory"),
            Component::RootDir | Component::Prefix(_) => {
                return Err("it is a link to an absolute path, which is not there on other nodes");
            }
        }
    }
    Ok(())
}

fn refused(inner: &Path, why: &str) -> Error {
    let name = PathBuf::from(inner);
    Error::Usage(format!(
        "{:?} cannot be deployed: {why}; remove it or name it in {IGNORE_FILE}",
        name.display().to_string()
    ))
}

fn packing(inner: &Path, error: io::Error) -> Error {
    if error.kind() == io::ErrorKind::FileTooLarge {
        let limit = BUNDLE_BYTES_MAX / 1024 / 1024;
        return Error::Usage(format!(
            "the directory is larger than {limit} MiB packed; name what the agent does not need in {IGNORE_FILE}"
        ));
    }
    Error::Io {
        what: format!("cannot pack {}", inner.display()),
        source: error,
    }
}

/// Bytes up to the largest bundle.
struct Capped(Vec<u8>);

impl Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > BUNDLE_BYTES_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::read::GzDecoder;
    use std::os::unix::fs::symlink;
    use tempfile::TempDir;

    fn agent() -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("agent.py"), "print()").unwrap();
        fs::write(at("run"), "#!/bin/sh").unwrap();
        fs::set_permissions(at("run"), PermissionsExt::from_mode(0o700)).unwrap();
        for name in ["lib/deep", "empty", ".git", "lib/__pycache__", ".venv"] {
            fs::create_dir_all(at(name)).unwrap();
        }
        for name in [
            "lib/deep/x.txt",
            ".git/config",
            "lib/__pycache__/x.pyc",
            ".venv/pyvenv.cfg",
        ] {
            fs::write(at(name), name).unwrap();
        }
        symlink("lib/deep/x.txt", at("link")).unwrap();
        symlink("../../agent.py", at("lib/deep/up")).unwrap();
        dir
    }

    fn names(bundle: &Bundle) -> Vec<String> {
        let mut archive = tar::Archive::new(GzDecoder::new(&bundle.bytes[..]));
        let entries = archive.entries().unwrap().map(Result::unwrap);
        entries
            .map(|entry| entry.path().unwrap().display().to_string())
            .collect()
    }

    #[test]
    fn the_same_files_give_the_same_bytes() {
        let (one, two) = (agent(), agent());
        let file = fs::File::options()
            .write(true)
            .open(two.path().join("run"))
            .unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH)
            .unwrap();
        fs::set_permissions(two.path().join("run"), PermissionsExt::from_mode(0o755)).unwrap();
        assert_eq!(
            pack(one.path()).unwrap().bytes,
            pack(two.path()).unwrap().bytes
        );
        fs::write(two.path().join("agent.py"), "print( )").unwrap();
        assert_ne!(
            pack(one.path()).unwrap().bytes,
            pack(two.path()).unwrap().bytes
        );
    }

    #[test]
    fn everything_that_belongs_to_it_is_in_it() {
        let dir = agent();
        let bundle = pack(dir.path()).unwrap();
        let expected = [
            ".venv/",
            ".venv/pyvenv.cfg",
            "agent.py",
            "empty/",
            "lib/",
            "lib/deep/",
            "lib/deep/up",
            "lib/deep/x.txt",
            "link",
            "run",
        ];
        let found = names(&bundle);
        let trimmed = |names: &[&str]| -> Vec<String> {
            names
                .iter()
                .map(|name| name.trim_end_matches('/').to_owned())
                .collect()
        };
        let found: Vec<&str> = found.iter().map(String::as_str).collect();
        assert_eq!(trimmed(&found), trimmed(&expected));
        assert_eq!(bundle.entries, expected.len());

        let mut archive = tar::Archive::new(GzDecoder::new(&bundle.bytes[..]));
        for entry in archive.entries().unwrap() {
            let entry = entry.unwrap();
            let header = entry.header();
            let owner = (
                header.uid().unwrap(),
                header.gid().unwrap(),
                header.mtime().unwrap(),
            );
            assert_eq!(owner, (0, 0, 0));
            match entry.path().unwrap().to_str().unwrap() {
                "run" => assert_eq!(header.mode().unwrap(), 0o755),
                "agent.py" => assert_eq!(header.mode().unwrap(), 0o644),
                "link" => {
                    let to = entry.link_name().unwrap().unwrap();
                    assert_eq!(to.to_str(), Some("lib/deep/x.txt"));
                }
                _ => {}
            }
        }
    }

    #[test]
    fn what_is_ignored_stays_behind() {
        let dir = agent();
        fs::write(dir.path().join(".vlinderignore"), "/lib/\n*.cfg\nlink\n").unwrap();
        let bundle = pack(dir.path()).unwrap();
        let found = names(&bundle);
        let found: Vec<&str> = found
            .iter()
            .map(|name| name.trim_end_matches('/'))
            .collect();
        assert_eq!(found, [".venv", "agent.py", "empty", "run"]);
    }

    #[test]
    fn links_that_lead_out_are_refused() {
        for (at, to) in [
            ("out", "/etc/passwd"),
            ("out", "../secret"),
            ("lib/deep/out", "../../../secret"),
            ("out", "lib/../../secret"),
            ("out", "lib/.."),
        ] {
            let dir = agent();
            symlink(to, dir.path().join(at)).unwrap();
            let error = pack(dir.path()).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{at} -> {to}");
            assert!(error.to_string().contains("out"), "{error}");
        }
    }

    #[test]
    fn sockets_are_refused() {
        let dir = agent();
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("sock")).unwrap();
        let error = pack(dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("sock") && error.contains(".vlinderignore"),
            "{error}"
        );
    }

    #[test]
    fn long_names_survive() {
        let dir = tempfile::tempdir().unwrap();
        let deep = (0..4).map(|_| "d".repeat(90)).collect::<Vec<_>>().join("/");
        fs::create_dir_all(dir.path().join(&deep)).unwrap();
        let name = format!("{deep}/{}", "f".repeat(200));
        fs::write(dir.path().join(&name), "x").unwrap();
        assert!(names(&pack(dir.path()).unwrap()).contains(&name));
    }

    #[test]
    fn too_much_is_refused() {
        let mut capped = Capped(vec![0; BUNDLE_BYTES_MAX - 1]);
        capped.write_all(b"x").unwrap();
        let error = packing(Path::new("x"), capped.write_all(b"x").unwrap_err());
        assert!(error.to_string().contains("64 MiB"), "{error}");
        assert_eq!(error.exit_code(), 2);

        let dir = agent();
        let huge = fs::File::create(dir.path().join("huge")).unwrap();
        // Sparse: it takes no room here.
        huge.set_len(UNPACKED_BYTES_MAX + 1).unwrap();
        let error = pack(dir.path()).unwrap_err();
        assert!(error.to_string().contains("512 MiB"), "{error}");
    }
}
