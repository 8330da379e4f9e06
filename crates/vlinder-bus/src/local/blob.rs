//! Blobs: bytes under their SHA-256, in rows of 1 MiB, checked when they are stored and when they are
//! read. A blob exists once its last row and its name are committed together.

use super::shared::{Shared, off_thread};
use super::store;
use super::writer::Op;
use crate::error::Error;
use bytes::Bytes;
use sha2::{Digest, Sha256};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vlinder_core::BODY_BYTES_MAX;

/// Bytes in one row: what the writer commits at once stays small.
const PART_BYTES: usize = 1024 * 1024;

/// Parts that are on their way. Dropped unless the blob is finished.
struct Unfinished<'a> {
    shared: &'a Shared,
    blob: i64,
    bytes: u64,
    finished: bool,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        self.shared
            .blob_bytes
            .fetch_sub(self.bytes, Ordering::Relaxed);
        let state = self.shared.lock();
        if state.check().is_ok() {
            state.ops.push(Op::BlobDropped { blob: self.blob });
        }
    }
}

impl Shared {
    /// Stores bytes under their name; returns when they are on disk.
    pub(super) async fn blob_put(self: &Arc<Self>, hash: &str, bytes: Bytes) -> Result<(), Error> {
        check_name(hash)?;
        let len = bytes.len() as u64;
        if len > BODY_BYTES_MAX {
            return Err(Error::TooLarge {
                len,
                max: BODY_BYTES_MAX,
            });
        }
        let (name, to_check) = (hash.to_owned(), bytes.clone());
        let exists = self
            .read_blobs(move |conn| Ok(store::find_blob(conn, &name)?.is_some()))
            .await?;
        if exists {
            return Ok(());
        }
        let name = hash.to_owned();
        off_thread(move || verify(&name, &to_check)).await?;
        let total = self.blob_bytes.fetch_add(len, Ordering::Relaxed) + len;
        let mut unfinished = Unfinished {
            shared: self,
            blob: self.next_blob.fetch_add(1, Ordering::Relaxed),
            bytes: len,
            finished: false,
        };
        if total > self.max_bytes {
            return Err(Error::Full {
                stream: "of blobs".to_owned(),
            });
        }
        for (number, start) in (0..bytes.len()).step_by(PART_BYTES).enumerate() {
            let part = bytes.slice(start..bytes.len().min(start + PART_BYTES));
            let permit = self.admit(part.len()).await?;
            let state = self.lock();
            state.check()?;
            self.disk.admit()?;
            state.ops.push(Op::BlobPart {
                blob: unfinished.blob,
                number: number as i64,
                bytes: part,
            });
            permit.forget();
        }
        let stored = {
            let mut state = self.lock();
            state.check()?;
            state.ops.push(Op::BlobDone {
                blob: unfinished.blob,
                hash: hash.to_owned(),
                len,
            });
            unfinished.finished = true;
            state.wait_all()
        };
        self.durable(stored, "blob_put").await
    }

    /// Reads bytes by their name, and checks them.
    pub(super) async fn blob_get(
        self: &Arc<Self>,
        hash: &str,
        len_max: u64,
    ) -> Result<Bytes, Error> {
        check_name(hash)?;
        let name = hash.to_owned();
        let bytes = self
            .read_blobs(move |conn| {
                let missing = || Error::Missing {
                    what: format!("blob {name}"),
                };
                let (blob, len) = store::find_blob(conn, &name)?.ok_or_else(missing)?;
                if len > len_max {
                    return Err(Error::TooLarge { len, max: len_max });
                }
                let bytes = Bytes::from(store::read_blob(conn, blob, len)?);
                verify(&name, &bytes)?;
                Ok(bytes)
            })
            .await?;
        Ok(bytes)
    }
}

fn verify(hash: &str, bytes: &[u8]) -> Result<(), Error> {
    if hex::encode(Sha256::digest(bytes)) == hash {
        return Ok(());
    }
    Err(Error::BlobDamaged {
        hash: hash.to_owned(),
    })
}

fn check_name(hash: &str) -> Result<(), Error> {
    let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if hash.len() == 64 && hash.bytes().all(hex) {
        return Ok(());
    }
    let start: String = hash.chars().take(70).collect();
    Err(Error::Refused {
        operation: "blob",
        reason: format!("{start:?} is not a SHA-256 in lower-case hex"),
    })
}
