//! The backends under test, each with what the contract needs to do to it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;
use vlinder_bus::backend::Backend;
use vlinder_bus::local::{LocalBus, LocalOptions};
use vlinder_bus::nats::{NatsBus, NatsOptions, connect};
use vlinder_testkit::{CURRENT, NatsCluster, NatsServer, OLDEST, StoreCopy};

/// How long a bus may take to be there: a cluster has to choose leaders first.
pub const CONNECT_WAIT: Duration = Duration::from_secs(30);
/// The log's limit unless a test wants another.
pub const LOG_BYTES: u64 = 256 * 1024 * 1024;

/// A backend with an empty store.
pub trait Fixture: Sized {
    /// Whether what was handed out before [`Fixture::crash`] goes on by itself afterwards.
    const SURVIVES_CRASH: bool;
    /// Whether [`Fixture::crash`] breaks every connection.
    const CRASH_CUTS_CONNECTIONS: bool = true;
    /// Starts it.
    async fn start() -> Self;
    /// Connects with that limit of the log. Another connection stands for another process where
    /// the backend knows more than one.
    async fn connect_with(&self, max_bytes: u64) -> Arc<dyn Backend>;
    /// Kills what stores the log, as hard as can be, and starts it again on the same store.
    async fn crash(&mut self);

    /// The store at some time.
    type Copy;
    /// What is stored by now. Connections break or end as in [`Fixture::crash`].
    async fn copy(&mut self) -> Self::Copy;
    /// Loses everything since the copy was made. As if the power had been cut, and more was gone than one
    /// would think.
    async fn roll_back(&mut self, copy: &Self::Copy);

    /// Connects with the usual limit.
    async fn connect(&self) -> Arc<dyn Backend> {
        self.connect_with(LOG_BYTES).await
    }
}

/// How tests connect to NATS.
pub fn nats_options(urls: Vec<String>, max_bytes: u64, replicas: usize) -> NatsOptions {
    NatsOptions {
        urls,
        replicas,
        max_bytes,
        name: "contract".to_owned(),
        ..NatsOptions::default()
    }
}

async fn nats(urls: Vec<String>, max_bytes: u64, replicas: usize) -> Arc<NatsBus> {
    connect(nats_options(urls, max_bytes, replicas), CONNECT_WAIT)
        .await
        .expect("the bus is there")
}

macro_rules! single_server {
    ($name:ident, $version:expr) => {
        pub struct $name {
            server: NatsServer,
        }

        impl Fixture for $name {
            const SURVIVES_CRASH: bool = true;

            async fn start() -> Self {
                let server = NatsServer::start($version).await;
                Self { server }
            }

            async fn connect_with(&self, max_bytes: u64) -> Arc<dyn Backend> {
                nats(vec![self.server.url()], max_bytes, 1).await
            }

            async fn crash(&mut self) {
                self.server.restart().await;
            }

            type Copy = StoreCopy;

            async fn copy(&mut self) -> StoreCopy {
                self.server.copy_store().await
            }

            async fn roll_back(&mut self, copy: &StoreCopy) {
                self.server.roll_back(copy).await;
            }
        }
    };
}

single_server!(NatsOldest, OLDEST);
single_server!(NatsCurrent, CURRENT);

/// Three servers, three replicas. A crash kills and restarts one after the other, so that leaders move.
pub struct NatsReplicated {
    cluster: NatsCluster,
    crashes: usize,
}

impl Fixture for NatsReplicated {
    const SURVIVES_CRASH: bool = true;
    const CRASH_CUTS_CONNECTIONS: bool = false;

    async fn start() -> Self {
        let cluster = NatsCluster::start(CURRENT).await;
        Self {
            cluster,
            crashes: 0,
        }
    }

    async fn connect_with(&self, max_bytes: u64) -> Arc<dyn Backend> {
        nats(self.cluster.urls(), max_bytes, 3).await
    }

    async fn crash(&mut self) {
        self.cluster.server(self.crashes % 3).restart().await;
        self.crashes += 1;
    }

    type Copy = Vec<StoreCopy>;

    async fn copy(&mut self) -> Vec<StoreCopy> {
        self.cluster.copy_stores().await
    }

    async fn roll_back(&mut self, copy: &Vec<StoreCopy>) {
        self.cluster.roll_back(copy).await;
    }
}

/// The embedded backend: everybody shares the one there is.
pub struct Local {
    directory: TempDir,
    open: Mutex<Option<(u64, Arc<LocalBus>)>>,
}

impl Local {
    fn file(&self) -> PathBuf {
        self.directory.path().join("bus.db")
    }

    /// The files as they are while the process still runs.
    fn files(&self) -> TempDir {
        copied(self.directory.path())
    }
}

fn copied(directory: &Path) -> TempDir {
    let copy = tempfile::tempdir().expect("a temporary directory");
    for entry in std::fs::read_dir(directory).expect("it is there") {
        let entry = entry.expect("it can be listed");
        let target = copy.path().join(entry.file_name());
        std::fs::copy(entry.path(), target).expect("it can be copied");
    }
    copy
}

impl Fixture for Local {
    const SURVIVES_CRASH: bool = false;

    async fn start() -> Self {
        Self {
            directory: tempfile::tempdir().expect("a temporary directory"),
            open: Mutex::new(None),
        }
    }

    async fn connect_with(&self, max_bytes: u64) -> Arc<dyn Backend> {
        let before = self.open.lock().expect("no holder panics").take();
        let bus = match before {
            Some((limit, bus)) if limit == max_bytes => bus,
            before => {
                // Another limit is another start of the process.
                if let Some((_, bus)) = before {
                    bus.close().await;
                }
                let options = LocalOptions {
                    max_bytes,
                    ..LocalOptions::new(self.file())
                };
                LocalBus::open(options).await.expect("it can be opened")
            }
        };
        *self.open.lock().expect("no holder panics") = Some((max_bytes, bus.clone()));
        bus
    }

    /// What a killed process leaves behind: the files as they are while it still runs.
    async fn crash(&mut self) {
        let left = self.files();
        drop(self.open.get_mut().expect("no holder panics").take());
        self.directory = left;
    }

    type Copy = TempDir;

    async fn copy(&mut self) -> TempDir {
        self.files()
    }

    async fn roll_back(&mut self, copy: &TempDir) {
        drop(self.open.get_mut().expect("no holder panics").take());
        self.directory = copied(copy.path());
    }
}
