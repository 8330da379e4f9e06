//! S3-compatible storage: one bucket, below one prefix.
//!
//! It says of every failure who can do something about it ([`ErrorKind`]), in words that name the
//! bucket and the server and no credential. Requests that can be repeated are, within
//! [`RETRY_FOR`]; every request has a deadline.
//!
//! It knows nothing of stores, agents or mounts.

mod access;
mod error;

pub use access::Access;
pub use error::{Error, ErrorKind};

use bytes::{Bytes, BytesMut};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey};
use object_store::path::Path;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, ObjectStoreExt, RetryConfig};
use std::time::Duration;

/// For how long a request that failed is tried again.
pub const RETRY_FOR: Duration = Duration::from_secs(8);
/// How often at most; the pauses between grow.
const RETRIES_MAX: usize = 6;
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// How long one try may take, with its body.
const REQUEST_MAX: Duration = Duration::from_secs(60);
/// How long a connection may take to be made.
const CONNECT_MAX: Duration = Duration::from_secs(3);

/// One bucket below one prefix. Cheap to use from many tasks.
#[derive(Debug)]
pub struct Bucket {
    store: AmazonS3,
    prefix: Path,
    place: String,
}

/// An object that a listing found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its name below the prefix.
    pub name: String,
    /// Its length, in bytes.
    pub len: u64,
    /// Its version as the server tells it: changes with the contents.
    pub etag: Option<String>,
}

impl Bucket {
    /// A bucket, by its name and a prefix (parts divided by `/`, none at all for the whole bucket).
    /// Nothing is sent yet.
    pub fn open(access: &Access, bucket: &str, prefix: &str) -> Result<Self, Error> {
        // Only the first in a process counts; all of ours install the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let place = access.place(bucket, prefix);
        let unusable = |source| Error::new(ErrorKind::Unusable, &place, source);
        let prefix = Path::parse(prefix).map_err(|error| unusable(error.into()))?;
        let mut builder = AmazonS3Builder::new();
        for (name, value) in access.variables() {
            if let Ok(key) = name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() {
                builder = builder.with_config(key, value);
            }
        }
        let client = ClientOptions::new()
            .with_allow_http(access.is_plain_http())
            .with_timeout(REQUEST_MAX)
            .with_connect_timeout(CONNECT_MAX);
        let retry = RetryConfig {
            backoff: BackoffConfig {
                init_backoff: BACKOFF_FIRST,
                max_backoff: BACKOFF_MAX,
                base: 2.0,
            },
            max_retries: RETRIES_MAX,
            retry_timeout: RETRY_FOR,
        };
        let store = builder
            .with_bucket_name(bucket)
            .with_client_options(client)
            .with_retry(retry)
            .build()
            .map_err(|error| unusable(error.into()))?;
        Ok(Self {
            store,
            prefix,
            place,
        })
    }

    /// Where it is, for people: `s3://bucket/prefix at SERVER`.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// An object of at most `len_max` bytes; `None` if there is none of that name.
    pub async fn get(&self, name: &str, len_max: u64) -> Result<Option<Bytes>, Error> {
        let path = self.path(name)?;
        let got = match self.store.get(&path).await {
            Ok(got) => got,
            Err(error) => return self.none_if_absent(error),
        };
        if got.meta.size > len_max {
            return Err(self.too_large(name, got.meta.size, len_max));
        }
        let mut body = got.into_stream();
        let mut bytes = BytesMut::new();
        while let Some(piece) = body.try_next().await.map_err(|error| self.failed(error))? {
            if bytes.len() as u64 + piece.len() as u64 > len_max {
                return Err(self.too_large(name, (bytes.len() + piece.len()) as u64, len_max));
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(Some(bytes.freeze()))
    }

    /// Whether there is an object of that name.
    pub async fn has(&self, name: &str) -> Result<bool, Error> {
        let path = self.path(name)?;
        match self.store.head(&path).await {
            Ok(_) => Ok(true),
            Err(error) => Ok(self.none_if_absent::<()>(error)?.is_some()),
        }
    }

    /// Stores an object; replaces what was there.
    pub async fn put(&self, name: &str, bytes: Bytes) -> Result<(), Error> {
        let path = self.path(name)?;
        let stored = self.store.put(&path, bytes.into()).await;
        stored.map(|_| ()).map_err(|error| self.failed(error))
    }

    /// What is below the prefix, in no order that could be relied upon. An absent bucket is an error.
    pub fn list(&self) -> BoxStream<'_, Result<Found, Error>> {
        let whole = self.prefix.as_ref().is_empty();
        let listed = self.store.list((!whole).then_some(&self.prefix));
        let found = listed.map(|listed| {
            let meta = listed.map_err(|error| self.failed(error))?;
            let path = meta.location.as_ref();
            let below = path.strip_prefix(self.prefix.as_ref()).unwrap_or(path);
            Ok(Found {
                name: below.trim_start_matches('/').to_owned(),
                len: meta.size,
                etag: meta.e_tag,
            })
        });
        found.boxed()
    }

    fn path(&self, name: &str) -> Result<Path, Error> {
        let whole = match self.prefix.as_ref() {
            "" => name.to_owned(),
            prefix => format!("{prefix}/{name}"),
        };
        Path::parse(whole)
            .map_err(|error| Error::new(ErrorKind::Unusable, &self.place, error.into()))
    }

    fn failed(&self, error: object_store::Error) -> Error {
        Error::of(&self.place, error)
    }

    /// An absent object is no error; an absent bucket is one.
    fn none_if_absent<T>(&self, error: object_store::Error) -> Result<Option<T>, Error> {
        let is_object = matches!(error, object_store::Error::NotFound { .. });
        let error = self.failed(error);
        match is_object && !error.names_bucket() {
            true => Ok(None),
            false => Err(error),
        }
    }

    fn too_large(&self, name: &str, len: u64, len_max: u64) -> Error {
        let what = format!("{name} has {len} bytes, at most {len_max} are taken");
        Error::new(ErrorKind::Unusable, &self.place, what.into())
    }
}
