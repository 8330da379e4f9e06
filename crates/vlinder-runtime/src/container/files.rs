//! What a container shares with this machine, below `<data>/run/containers`: for each the directory with
//! its socket, which is mounted into it, and beside it the mark of whether it has a turn. And the
//! program that is the first process of all.

use crate::launcher::Marker;
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The first process of containers (`init/main.rs`), as a program.
static INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/init"));

const IDLE: u8 = b'0';
const BUSY: u8 = b'1';

#[derive(Debug, Clone)]
pub(super) struct Files {
    base: PathBuf,
    init: PathBuf,
    id: String,
}

impl Files {
    /// Makes what is missing. Only the user of the daemon gets below the base directory; containers
    /// get what is mounted into them.
    pub fn prepare(data_dir: &Path) -> io::Result<Self> {
        let base = data_dir.join("run").join("containers");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&base)?;
        let base = base.canonicalize()?;
        let id = hex::encode(&Sha256::digest(base.as_os_str().as_bytes())[..8]);
        let init = base.join(format!("init-{}", hex::encode(&Sha256::digest(INIT)[..8])));
        if !init.exists() {
            // Several workers may do this at the same time.
            let fresh = base.join(format!("new-{:016x}", rand::random::<u64>()));
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o755)
                .open(&fresh)?;
            io::Write::write_all(&mut file, INIT)?;
            drop(file);
            fs::set_permissions(&fresh, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
            fs::rename(&fresh, &init)?;
        }
        Ok(Self { base, init, id })
    }

    /// Tells this data directory from others that use the same engine.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The program.
    pub fn init(&self) -> &Path {
        &self.init
    }

    /// What is mounted into a container.
    pub fn directory(&self, name: &str) -> PathBuf {
        self.base.join(name)
    }

    fn mark(&self, name: &str) -> PathBuf {
        self.base.join(format!("{name}.turns"))
    }

    /// Makes the files of a new container.
    pub fn make(&self, name: &str) -> io::Result<()> {
        let directory = self.directory(name);
        fs::create_dir(&directory)?;
        // Whoever the agent runs as.
        fs::set_permissions(
            &directory,
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )?;
        fs::write(self.mark(name), [IDLE])
    }

    /// Whether a container had no turn when this was last known. It is not where nothing is known.
    pub fn is_idle(&self, name: &str) -> bool {
        fs::read(self.mark(name)).is_ok_and(|mark| mark == [IDLE])
    }

    /// Where to mark that it has one.
    pub fn marker(&self, name: &str) -> io::Result<Arc<dyn Marker>> {
        let file = OpenOptions::new().write(true).open(self.mark(name))?;
        let is_spoilt = AtomicBool::new(false);
        Ok(Arc::new(Mark { file, is_spoilt }))
    }

    /// Removes the files of a container that is gone.
    pub fn remove(&self, name: &str) {
        let gone = |outcome: io::Result<()>| match outcome {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                tracing::warn!(container = name, %error, "a container's files could not be removed");
            }
            _ => {}
        };
        gone(fs::remove_dir_all(self.directory(name)));
        gone(fs::remove_file(self.mark(name)));
    }

    /// Removes the files of containers that are not known.
    pub fn sweep(&self, is_known: impl Fn(&str) -> bool) {
        let Ok(entries) = fs::read_dir(&self.base) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str().map(|name| name.trim_end_matches(".turns")) else {
                continue;
            };
            if name.starts_with("vlinder-") && !is_known(name) {
                self.remove(name);
            }
        }
    }
}

/// One byte in a file: it outlives this process, and writing it costs a microsecond.
struct Mark {
    file: File,
    is_spoilt: AtomicBool,
}

impl Mark {
    fn write(&self, mark: u8) {
        if let Err(error) = self.file.write_all_at(&[mark], 0) {
            tracing::warn!(%error, "whether a container has a turn cannot be noted");
        }
    }
}

impl Marker for Mark {
    fn turns(&self, turns: usize) {
        let is_idle = turns == 0 && !self.is_spoilt.load(Ordering::Relaxed);
        self.write(if is_idle { IDLE } else { BUSY });
    }

    fn spoil(&self) {
        self.is_spoilt.store(true, Ordering::Relaxed);
        self.write(BUSY);
    }
}
