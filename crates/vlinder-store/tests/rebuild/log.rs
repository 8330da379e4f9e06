//! A log in memory: what catching up needs of a bus, with counters and with ways to break it.

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;
use vlinder_bus::backend::{
    Backend, BucketSpec, KvEntry, KvEvent, QueueInfo, QueueSpec, Raw, RawAppended, RawPuller,
    RawStored, Signal, StreamInfo, Verdict,
};
use vlinder_bus::{Error, StreamName};

#[derive(Default)]
pub struct MemoryLog {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    created_ms: u64,
    messages: Vec<RawStored>,
    blobs: HashMap<String, Bytes>,
    /// Messages that `range` gave out.
    read: usize,
}

impl MemoryLog {
    /// How many messages were read since the last call.
    pub fn take_read(&self) -> usize {
        std::mem::take(&mut self.inner.lock().unwrap().read)
    }

    /// Loses what is behind `keep`; perhaps by being made anew.
    pub fn replace(&self, keep: usize, created_anew: bool) {
        let mut inner = self.inner.lock().unwrap();
        inner.created_ms += u64::from(created_anew);
        inner.messages.truncate(keep);
    }

    /// Loses the bodies in the blob store.
    pub fn lose_blobs(&self) {
        self.inner.lock().unwrap().blobs.clear();
    }

    /// Stores a message that no release ever wrote.
    pub fn append_rubbish(&self, subject: &str) {
        let mut inner = self.inner.lock().unwrap();
        let seq = inner.messages.len() as u64 + 1;
        let (subject, headers, body) =
            (subject.to_owned(), Vec::new(), Bytes::from_static(b"\xff"));
        inner.messages.push(RawStored {
            subject,
            headers,
            body,
            seq,
            time_ms: 1,
            previous_on_subject: 0,
        });
    }
}

fn matches(filter: &str, subject: &str) -> bool {
    let (filter, subject): (Vec<_>, Vec<_>) =
        (filter.split('.').collect(), subject.split('.').collect());
    filter.len() == subject.len()
        && filter
            .iter()
            .zip(&subject)
            .all(|(f, s)| *f == "*" || f == s)
}

fn unused<T>(operation: &'static str) -> Result<T, Error> {
    Err(Error::Refused {
        operation,
        reason: "the log in memory has no such thing".to_owned(),
    })
}

#[async_trait]
impl Backend for MemoryLog {
    fn name(&self) -> &'static str {
        "memory"
    }

    async fn stream_info(&self, _: &StreamName) -> Result<StreamInfo, Error> {
        let inner = self.inner.lock().unwrap();
        let messages = inner.messages.len() as u64;
        let created_ms = inner.created_ms;
        Ok(StreamInfo {
            created_ms,
            first_seq: 1,
            last_seq: messages,
            messages,
            bytes: 0,
            max_bytes: u64::MAX,
        })
    }

    async fn append(&self, _: &StreamName, raw: &Raw) -> Result<RawAppended, Error> {
        let mut inner = self.inner.lock().unwrap();
        let seq = inner.messages.len() as u64 + 1;
        inner.messages.push(RawStored {
            subject: raw.subject.clone(),
            headers: raw.headers.clone(),
            body: raw.body.clone(),
            seq,
            time_ms: 1,
            previous_on_subject: 0,
        });
        Ok(RawAppended {
            seq,
            duplicate: false,
        })
    }

    async fn range(
        &self,
        _: &StreamName,
        filter: &str,
        from: u64,
        max: usize,
    ) -> Result<Vec<RawStored>, Error> {
        let mut inner = self.inner.lock().unwrap();
        let found = inner
            .messages
            .iter()
            .filter(|m| m.seq >= from && matches(filter, &m.subject));
        let found: Vec<_> = found.take(max).cloned().collect();
        inner.read += found.len();
        Ok(found)
    }

    async fn blob_put(&self, hash: &str, bytes: Bytes) -> Result<(), Error> {
        self.inner
            .lock()
            .unwrap()
            .blobs
            .insert(hash.to_owned(), bytes);
        Ok(())
    }

    async fn blob_get(&self, hash: &str, _: u64) -> Result<Bytes, Error> {
        let found = self.inner.lock().unwrap().blobs.get(hash).cloned();
        found.ok_or(Error::Missing {
            what: hash.to_owned(),
        })
    }

    async fn ensure_stream(&self, _: &StreamName) -> Result<(), Error> {
        Ok(())
    }
    async fn settled(&self, _: &StreamName, _: u64) -> Result<(), Error> {
        Ok(())
    }
    async fn get(&self, _: &StreamName, _: u64) -> Result<Option<RawStored>, Error> {
        unused("get")
    }
    async fn last(&self, _: &StreamName, _: &str) -> Result<Option<RawStored>, Error> {
        unused("last")
    }
    async fn follow(
        &self,
        _: &StreamName,
        _: &str,
        _: u64,
    ) -> Result<BoxStream<'static, Result<RawStored, Error>>, Error> {
        unused("follow")
    }
    async fn seen(&self, _: &str) -> Result<BoxStream<'static, RawStored>, Error> {
        unused("seen")
    }
    async fn ensure_queue(&self, _: &QueueSpec) -> Result<(), Error> {
        unused("queue")
    }
    async fn delete_queue(&self, _: &StreamName, _: &str) -> Result<(), Error> {
        unused("queue")
    }
    async fn queues(&self, _: &StreamName) -> Result<Vec<QueueInfo>, Error> {
        unused("queue")
    }
    async fn mend_queues(&self, _: &StreamName, _: u64) -> Result<Vec<String>, Error> {
        unreachable!("the stores have no queues to mend")
    }
    async fn puller(&self, _: &StreamName, _: &str) -> Result<Box<dyn RawPuller>, Error> {
        unused("queue")
    }
    async fn verdict(&self, _: &str, _: Verdict) -> Result<(), Error> {
        unused("queue")
    }
    async fn ensure_bucket(&self, _: &BucketSpec) -> Result<(), Error> {
        unused("kv")
    }
    async fn kv_get(&self, _: &str, _: &str) -> Result<Option<KvEntry>, Error> {
        unused("kv")
    }
    async fn kv_put(&self, _: &str, _: &str, _: Bytes, _: Option<u64>) -> Result<u64, Error> {
        unused("kv")
    }
    async fn kv_delete(&self, _: &str, _: &str, _: Option<u64>) -> Result<(), Error> {
        unused("kv")
    }
    async fn kv_watch(&self, _: &str) -> Result<BoxStream<'static, Result<KvEvent, Error>>, Error> {
        unused("kv")
    }
    async fn signal(&self, _: &str, _: Bytes) -> Result<(), Error> {
        unused("signal")
    }
    async fn signals(&self, _: &str) -> Result<BoxStream<'static, Signal>, Error> {
        unused("signal")
    }
    async fn ping(&self) -> Result<Duration, Error> {
        Ok(Duration::ZERO)
    }
    async fn close(&self) {}
}
