//! Where the chunks of a store are kept beside the node's own file: in the bus (`nats://`) or in
//! S3-compatible storage (`s3://`), so that any node can serve what it never saw.
//!
//! A home holds a chunk only together with all that the chunk refers to, because chunks are brought
//! there from below (`replicate`). Chunks are content-addressed and never change: whoever writes one
//! twice, or at the same time as another node, changes nothing. What a home gives out is checked
//! against its hash; what it lacks or has lost, the log still leads to.

use bytes::Bytes;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use vlinder_bus::{Bus, StreamName};
use vlinder_core::merkle::NODE_BYTES_MAX;
use vlinder_core::record::Request;
use vlinder_core::{BODY_BYTES_MAX, ContentHash, Namespace};
use vlinder_objects::{Access, Bucket, ErrorKind};

/// The scheme of stores that the node's file and the log alone keep.
pub(crate) const SQLITE: &str = "sqlite";
/// The scheme of stores whose chunks are in the bus as well.
pub(crate) const NATS: &str = "nats";
/// The scheme of stores whose chunks are in S3-compatible storage as well.
pub(crate) const S3: &str = "s3";

// Every node and every content fits what is read back at once.
const _: () = assert!(NODE_BYTES_MAX as u64 <= BODY_BYTES_MAX);

/// Why the home of a store cannot be used now.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// S3-compatible storage failed.
    #[error("{0}")]
    S3(#[from] vlinder_objects::Error),
    /// The bus failed.
    #[error("the bus cannot keep the store's chunks")]
    Bus(#[source] vlinder_bus::Error),
    /// This node was told nothing about S3.
    #[error(
        "s3://{0}: this node has no access to S3: set s3.endpoint, s3.region, s3.access_key_id and \
         s3.secret_access_key, or the AWS_ variables of the same meaning"
    )]
    NoAccess(String),
}

impl HomeError {
    /// How the agent is told: HTTP status and code.
    pub(crate) fn told(&self) -> (u16, &'static str) {
        let kind = match self {
            Self::S3(error) => error.kind(),
            Self::Bus(_) => ErrorKind::Away,
            Self::NoAccess(_) => ErrorKind::Refused,
        };
        match kind {
            ErrorKind::NoBucket => (502, "store_bucket_missing"),
            ErrorKind::Refused => (502, "store_refused"),
            ErrorKind::Away => (503, "store_unavailable"),
            ErrorKind::Unusable => (502, "store_unusable"),
        }
    }
}

/// The home of some stores.
pub(crate) enum Home {
    /// Blobs of the bus: replicated as the log is, shared by all `nats://` stores.
    Bus { bus: Bus, name: String },
    /// Objects `<namespace>/<first two digits>/<hash>` below the store's prefix.
    S3 { bucket: Bucket, ns: Namespace },
}

impl Home {
    /// What tells it from others, also after a restart: by this the node remembers what is there.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Bus { name, .. } => name,
            Self::S3 { bucket, .. } => bucket.place(),
        }
    }

    /// A chunk; `None` if it is not there, or not what its hash says.
    pub(crate) async fn get(&self, hash: &ContentHash) -> Result<Option<Bytes>, HomeError> {
        let found = match self {
            Self::Bus { bus, .. } => match bus.blob_get(hash, BODY_BYTES_MAX).await {
                Ok(bytes) => Some(bytes),
                Err(
                    vlinder_bus::Error::Missing { .. } | vlinder_bus::Error::BlobDamaged { .. },
                ) => None,
                Err(error) => return Err(HomeError::Bus(error)),
            },
            Self::S3 { bucket, ns } => bucket.get(&object(ns, hash), BODY_BYTES_MAX).await?,
        };
        let Some(bytes) = found else { return Ok(None) };
        if ContentHash::of(&bytes) != *hash {
            tracing::error!(home = self.name(), %hash, "a chunk in the store's home is damaged");
            return Ok(None);
        }
        Ok(Some(bytes))
    }

    /// Whether a chunk is there, and with it all that it refers to.
    pub(crate) async fn has(&self, hash: &ContentHash, is_node: bool) -> Result<bool, HomeError> {
        match self {
            // A blob that is there is not stored again, so asking first would only cost.
            Self::Bus { .. } if !is_node => Ok(false),
            Self::Bus { .. } => Ok(self.get(hash).await?.is_some()),
            Self::S3 { bucket, ns } => Ok(bucket.has(&object(ns, hash)).await?),
        }
    }

    /// Stores a chunk. All that it refers to must be there.
    pub(crate) async fn put(&self, hash: &ContentHash, bytes: Bytes) -> Result<(), HomeError> {
        match self {
            Self::Bus { bus, .. } => bus.blob_put(bytes).await.map(drop).map_err(HomeError::Bus),
            Self::S3 { bucket, ns } => Ok(bucket.put(&object(ns, hash), bytes).await?),
        }
    }
}

/// The first digits keep listings and servers that store objects as files from one huge directory.
fn object(ns: &Namespace, hash: &ContentHash) -> String {
    let hash = hash.to_string();
    format!("{ns}/{}/{hash}", &hash[..2])
}

/// The homes that this worker has used.
pub(crate) struct Homes {
    bus: Bus,
    ns: Namespace,
    access: Access,
    open: Mutex<HashMap<String, Arc<Home>>>,
}

impl Homes {
    pub(crate) fn new(bus: Bus, ns: Namespace, access: Access) -> Self {
        Self {
            bus,
            ns,
            access,
            open: Mutex::default(),
        }
    }

    /// The home of the store that a request is for; `None` for `sqlite://`.
    pub(crate) async fn of(&self, request: &Request) -> Result<Option<Arc<Home>>, HomeError> {
        let key = match request.backend.as_str() {
            NATS => NATS.to_owned(),
            S3 => format!("{S3}://{}", request.selector),
            _ => return Ok(None),
        };
        let known = self.lock().get(&key).cloned();
        if known.is_some() {
            return Ok(known);
        }
        let home = match request.backend.as_str() {
            NATS => self.in_bus().await?,
            _ => self.in_s3(request.selector.as_str())?,
        };
        let home = self.lock().entry(key).or_insert(Arc::new(home)).clone();
        Ok(Some(home))
    }

    async fn in_bus(&self) -> Result<Home, HomeError> {
        // Another log of the same name is another bus: what was in the old one is not in it.
        let log = StreamName::Log(self.ns.clone());
        let info = self.bus.stream_info(&log).await.map_err(HomeError::Bus)?;
        Ok(Home::Bus {
            bus: self.bus.clone(),
            name: format!("bus of {}", info.created_ms),
        })
    }

    fn in_s3(&self, path: &str) -> Result<Home, HomeError> {
        if !self.access.is_set() {
            return Err(HomeError::NoAccess(path.to_owned()));
        }
        let (bucket, prefix) = path.split_once('/').unwrap_or((path, ""));
        Ok(Home::S3 {
            bucket: Bucket::open(&self.access, bucket, prefix)?,
            ns: self.ns.clone(),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Home>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
