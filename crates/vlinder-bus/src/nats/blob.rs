//! Blobs: bytes by their SHA-256, in a stream of their own, cut into chunks.
//!
//! All chunks of a blob are on one subject. The last chunk is stored when all others are, so a
//! subject whose last message is the last chunk is complete. Several who put the same bytes at once
//! may store chunks twice; readers take the first of each, and the hash decides.

use super::link::{Link, refused};
use super::stream;
use crate::backend::{Raw, RawStored};
use crate::error::Error;
use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt};
use sha2::{Digest, Sha256};

const STREAM: &str = "VLINDER_BLOB";
/// Largest chunk. NATS takes 1 MiB by default; half of it leaves room and bounds a reader's steps.
const CHUNK_MAX: usize = 512 * 1024;
/// Kept free of a server's payload limit for headers.
const CHUNK_HEADROOM: usize = 4 * 1024;
/// Largest blob: the largest body there is (interfaces.md).
const BLOB_MAX: u64 = 64 * 1024 * 1024;
/// Chunks under way at once: 2 MiB.
const PUTS_IN_FLIGHT: usize = 4;
/// Chunks read at once: at most 8 MiB.
const READ_BATCH: usize = 16;
/// A blob whose chunks were stored more often than this on average is given up as damaged.
const COPIES_MAX: usize = 16;
/// Hashing more than this goes to another thread, so that the worker's loop goes on.
const HASH_INLINE_MAX: usize = 256 * 1024;

const PLACE: &str = "Blob-Chunk";

/// Where a chunk belongs: `<index>/<chunks>/<bytes of the blob>`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Place {
    index: usize,
    chunks: usize,
    len: u64,
}

impl Place {
    fn write(self) -> String {
        format!("{}/{}/{}", self.index, self.chunks, self.len)
    }

    /// `None` for what no put of ours wrote.
    fn read(stored: &RawStored) -> Option<Self> {
        let (_, text) = stored.headers.iter().find(|(name, _)| name == PLACE)?;
        let mut parts = text.split('/');
        let place = Self {
            index: parts.next()?.parse().ok()?,
            chunks: parts.next()?.parse().ok()?,
            len: parts.next()?.parse().ok()?,
        };
        let sane = place.index < place.chunks
            && place.len <= BLOB_MAX
            && place.chunks as u64 <= place.len.max(1);
        (sane && parts.next().is_none()).then_some(place)
    }

    fn is_last(self) -> bool {
        self.index + 1 == self.chunks
    }
}

/// Makes the stream.
pub(super) async fn ensure(link: &Link, max_bytes: u64, replicas: usize) -> Result<(), Error> {
    let config = stream::common(STREAM, vec!["blob.*".to_owned()], max_bytes, replicas);
    stream::ensure(link, config).await
}

fn subject_of(hash: &str) -> Result<String, Error> {
    let hex = hash.len() == 64 && hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    match hex {
        true => Ok(format!("blob.{hash}")),
        false => Err(refused("use a blob", format!("{hash:?} is no SHA-256"))),
    }
}

pub(super) async fn put(
    link: &Link,
    replicas: usize,
    hash: &str,
    bytes: Bytes,
) -> Result<(), Error> {
    let subject = subject_of(hash)?;
    let len = bytes.len() as u64;
    if len > BLOB_MAX {
        let max = BLOB_MAX;
        return Err(Error::TooLarge { len, max });
    }
    if sha256(bytes.clone()).await != hash {
        return Err(refused("store a blob", "the bytes do not hash to the name"));
    }
    let last = stream::last(link, STREAM, replicas, &subject).await?;
    if last
        .as_ref()
        .and_then(Place::read)
        .is_some_and(Place::is_last)
    {
        return Ok(());
    }
    let room = link.client.max_payload().saturating_sub(CHUNK_HEADROOM);
    let chunk = CHUNK_MAX.min(room.max(1));
    let chunks = bytes.len().div_ceil(chunk).max(1);
    let message = |index: usize| {
        let place = Place { index, chunks, len };
        let start = index * chunk;
        Raw {
            subject: subject.clone(),
            headers: vec![(PLACE.to_owned(), place.write())],
            body: bytes.slice(start..bytes.len().min(start + chunk)),
            id: format!("{hash}:{index}/{chunks}"),
            expect_last: None,
        }
    };
    futures::stream::iter(0..chunks - 1)
        .map(|index| {
            let raw = message(index);
            async move { stream::append(link, STREAM, &raw).await }
        })
        .buffer_unordered(PUTS_IN_FLIGHT)
        .try_for_each(|_| futures::future::ready(Ok(())))
        .await?;
    stream::append(link, STREAM, &message(chunks - 1)).await?;
    Ok(())
}

pub(super) async fn get(
    link: &Link,
    replicas: usize,
    hash: &str,
    len_max: u64,
) -> Result<Bytes, Error> {
    let subject = subject_of(hash)?;
    let damaged = || Error::BlobDamaged {
        hash: hash.to_owned(),
    };
    let mut chunks: Vec<Option<Bytes>> = Vec::new();
    let (mut missing, mut len, mut read) = (usize::MAX, 0, 0);
    let mut from = 1;
    while missing > 0 {
        let batch = stream::range(link, STREAM, replicas, &subject, from, READ_BATCH).await?;
        if batch.is_empty() {
            return Err(match read {
                0 => Error::Missing {
                    what: format!("blob {hash}"),
                },
                _ => damaged(),
            });
        }
        for stored in batch {
            from = stored.seq + 1;
            read += 1;
            let place = Place::read(&stored).ok_or_else(damaged)?;
            if place.len > len_max {
                let (len, max) = (place.len, len_max);
                return Err(Error::TooLarge { len, max });
            }
            if chunks.is_empty() {
                chunks.resize(place.chunks, None);
                (missing, len) = (place.chunks, place.len);
            }
            // Cut otherwise, by a server with another payload limit: the first cut is read.
            if place.chunks != chunks.len() || chunks[place.index].is_some() {
                continue;
            }
            chunks[place.index] = Some(stored.body);
            missing -= 1;
        }
        if read > COPIES_MAX * chunks.len() {
            return Err(damaged());
        }
    }
    let bytes = join(chunks, len);
    match sha256(bytes.clone()).await == hash {
        true => Ok(bytes),
        false => Err(damaged()),
    }
}

fn join(mut chunks: Vec<Option<Bytes>>, len: u64) -> Bytes {
    if let [Some(only)] = chunks.as_mut_slice() {
        return std::mem::take(only);
    }
    let mut bytes = BytesMut::with_capacity(len as usize);
    for chunk in chunks.into_iter().flatten() {
        bytes.extend_from_slice(&chunk);
    }
    bytes.freeze()
}

async fn sha256(bytes: Bytes) -> String {
    let small = bytes.len() <= HASH_INLINE_MAX;
    let hash = move || hex::encode(Sha256::digest(&bytes));
    if small {
        return hash();
    }
    tokio::task::spawn_blocking(hash)
        .await
        .expect("hashing does not panic")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn place(text: &str) -> Option<Place> {
        Place::read(&RawStored {
            subject: "blob.x".into(),
            headers: vec![(PLACE.into(), text.into())],
            body: Bytes::new(),
            seq: 1,
            time_ms: 1,
            previous_on_subject: 0,
        })
    }

    #[test]
    fn places() {
        let written = Place {
            index: 2,
            chunks: 3,
            len: 9,
        };
        assert_eq!(place(&written.write()), Some(written));
        for bad in [
            "",
            "1",
            "3/3/9",
            "0/0/0",
            "0/9/3",
            "0/1/99999999999",
            "0/1/1/1",
            "-1/1/1",
        ] {
            assert_eq!(place(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn hostile_places_do_not_panic(text in "[0-9/]{0,30}|\\PC{0,20}") {
            let _ = place(&text);
        }
    }
}
