//! Bodies: kept in the projection while small, else read from the log when somebody asks.

use crate::apply::Source;
use crate::error::Error;
use crate::projection::Projection;
use crate::query::NodeRow;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use vlinder_core::NodeHash;

/// Longest text of a body in an answer; the full length stands beside it.
pub const TEXT_BYTES_MAX: usize = 64 * 1024;
/// A body above this counts as large.
const LARGE_BYTES: u64 = 1024 * 1024;
/// Large bodies in memory at once: at 64 MiB each, what the service may take beside its normal size.
const LARGE_AT_ONCE: usize = 2;
/// How long a read waits for its turn to hold a large body.
const LARGE_DEADLINE: Duration = Duration::from_secs(10);
/// Bodies of one answer that are read from the log at once.
pub(crate) const READS_AT_ONCE: usize = 8;

/// Where a body is.
#[derive(Debug, Clone)]
pub(crate) struct BodyRef {
    source: Source,
    seq: u64,
    hash: NodeHash,
    kind: String,
    pub len: u64,
    kept: Option<Bytes>,
}

impl From<&NodeRow> for BodyRef {
    fn from(node: &NodeRow) -> Self {
        Self {
            source: node.source,
            seq: node.seq,
            hash: node.hash,
            kind: node.kind.clone(),
            len: node.body_len,
            kept: node.body.clone(),
        }
    }
}

/// Reads bodies; cheap to clone.
#[derive(Clone)]
pub(crate) struct Bodies {
    projection: Projection,
    large: Arc<Semaphore>,
}

impl Bodies {
    pub fn new(projection: Projection) -> Self {
        Self {
            projection,
            large: Arc::new(Semaphore::new(LARGE_AT_ONCE)),
        }
    }

    /// The whole body. A large one comes with a permit, to be dropped with it.
    pub async fn load(
        &self,
        body: &BodyRef,
    ) -> Result<(Bytes, Option<OwnedSemaphorePermit>), Error> {
        if let Some(kept) = &body.kept {
            return Ok((kept.clone(), None));
        }
        let permit = if body.len > LARGE_BYTES {
            let acquired =
                tokio::time::timeout(LARGE_DEADLINE, self.large.clone().acquire_owned()).await;
            let permit = acquired.map_err(|_| Error::Busy {
                what: "large bodies",
            })?;
            Some(permit.expect("the semaphore is never closed"))
        } else {
            None
        };
        let inner = &self.projection.0;
        let stream = body.source.stream(&inner.ns);
        let lacks = || Error::LogLacks {
            node: format!("{} {}", body.kind, body.hash),
            place: format!("{stream}:{}", body.seq),
        };
        let stored = inner.bus.get(&stream, body.seq).await?.ok_or_else(lacks)?;
        if stored.hash != body.hash {
            return Err(lacks());
        }
        Ok((inner.bus.load(&stored.body).await?, permit))
    }

    /// The beginning of a body, at most [`TEXT_BYTES_MAX`] bytes.
    pub async fn excerpt(&self, body: &BodyRef) -> Result<Bytes, Error> {
        let (bytes, _permit) = self.load(body).await?;
        if bytes.len() <= TEXT_BYTES_MAX {
            return Ok(bytes);
        }
        // A copy, so that the rest of a large body goes at once.
        Ok(Bytes::copy_from_slice(&bytes[..TEXT_BYTES_MAX]))
    }
}

/// The beginning of `bytes` as text; what is not UTF-8 is replaced.
pub(crate) fn text(bytes: &[u8], len: u64) -> String {
    match cut_text(bytes, len) {
        Some(text) => text.to_owned(),
        None => String::from_utf8_lossy(bytes).into_owned(),
    }
}

/// The beginning of `bytes` as text, or in base64 (`true`) when it is not UTF-8.
pub(crate) fn text_or_base64(bytes: &[u8], len: u64) -> (String, bool) {
    match cut_text(bytes, len) {
        Some(text) => (text.to_owned(), false),
        None => (STANDARD.encode(bytes), true),
    }
}

/// `bytes`, the beginning of a body of `len` bytes, as UTF-8; a character that the cut divided is left out.
fn cut_text(bytes: &[u8], len: u64) -> Option<&str> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Some(text),
        Err(error) if error.error_len().is_none() && (bytes.len() as u64) < len => {
            std::str::from_utf8(&bytes[..error.valid_up_to()]).ok()
        }
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_character_is_left_out_and_bytes_become_base64() {
        let long = "aé".as_bytes();
        assert_eq!(text_or_base64(long, 3), ("aé".to_owned(), false));
        assert_eq!(text_or_base64(&long[..2], 3), ("a".to_owned(), false));
        assert_eq!(text_or_base64(&long[..2], 2), ("YcM=".to_owned(), true));
        assert_eq!(text_or_base64(b"\xff", 9), ("/w==".to_owned(), true));
        assert_eq!(text(b"a\xff", 2), "a\u{fffd}");
        assert_eq!(text(b"", 0), "");
    }
}
