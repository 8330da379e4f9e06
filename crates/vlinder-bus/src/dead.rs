//! Dead letters: messages that nobody could work on, kept with their bytes, the reason and the count.

use crate::backend::{Raw, RawDelivery, RawStored};
use crate::bus::Bus;
use crate::error::Error;
use crate::streams::StreamName;
use crate::subjects::Subject;
use bytes::Bytes;

/// Most dead letters that one listing returns.
pub const LIST_MAX: usize = 1000;

/// A message that was given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// Its id: the sequence in the dead-letter stream.
    pub id: u64,
    /// When it was given up: milliseconds since the Unix epoch, by the log's clock.
    pub time_ms: u64,
    /// The stream it was in.
    pub stream: String,
    /// Its subject there.
    pub subject: String,
    /// Its sequence there.
    pub seq: u64,
    /// Why it was given up.
    pub reason: String,
    /// How often it was delivered.
    pub deliveries: u64,
    /// Its headers.
    pub headers: Vec<(String, String)>,
    /// Its body.
    pub body: Bytes,
}

impl DeadLetter {
    /// The message that records the end of `delivery`.
    pub(crate) fn of(stream: &StreamName, delivery: &RawDelivery, reason: &str) -> Raw {
        let stored = &delivery.stored;
        let clean: String = reason
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .take(1000)
            .collect();
        let mut headers = vec![
            ("Dead-Stream".to_owned(), stream.as_text()),
            ("Dead-Subject".to_owned(), stored.subject.clone()),
            ("Dead-Seq".to_owned(), stored.seq.to_string()),
            ("Dead-Reason".to_owned(), clean.escape_default().to_string()),
            ("Dead-Deliveries".to_owned(), delivery.delivered.to_string()),
        ];
        let original = stored
            .headers
            .iter()
            .map(|(name, value)| (format!("Was-{name}"), value.clone()));
        headers.extend(original);
        Raw {
            subject: Subject::Dead.to_string(),
            headers,
            body: stored.body.clone(),
            id: format!("dead:{}:{}", stream, stored.seq),
            expect_last: None,
        }
    }

    fn read(raw: RawStored) -> Self {
        let find = |name: &str| {
            let hit = raw.headers.iter().find(|(key, _)| key == name);
            hit.map(|(_, value)| value.clone()).unwrap_or_default()
        };
        Self {
            id: raw.seq,
            time_ms: raw.time_ms,
            stream: find("Dead-Stream"),
            subject: find("Dead-Subject"),
            seq: find("Dead-Seq").parse().unwrap_or(0),
            reason: find("Dead-Reason"),
            deliveries: find("Dead-Deliveries").parse().unwrap_or(0),
            headers: raw
                .headers
                .iter()
                .filter_map(|(name, value)| {
                    Some((name.strip_prefix("Was-")?.to_owned(), value.clone()))
                })
                .collect(),
            body: raw.body,
        }
    }
}

impl Bus {
    /// Dead letters from id `from` on, oldest first, at most [`LIST_MAX`].
    pub async fn dead_letters(&self, from: u64) -> Result<Vec<DeadLetter>, Error> {
        let subject = Subject::Dead.to_string();
        let raw = self
            .range_plain(&StreamName::Sys, &subject, from, LIST_MAX)
            .await?;
        Ok(raw.into_iter().map(DeadLetter::read).collect())
    }

    /// One dead letter.
    pub async fn dead_letter(&self, id: u64) -> Result<Option<DeadLetter>, Error> {
        let found = self.dead_letters(id).await?;
        Ok(found.into_iter().next().filter(|letter| letter.id == id))
    }

    /// Sends the message of a dead letter again, to where it came from. The letter stays on record.
    /// Returns the new sequence.
    pub async fn redrive(&self, letter: &DeadLetter) -> Result<u64, Error> {
        let undecodable = || Error::Undecodable {
            subject: letter.subject.clone(),
            seq: letter.seq,
            reason: "its subject is not one of ours".to_owned(),
        };
        let stream = match Subject::parse(&letter.subject).ok_or_else(undecodable)? {
            Subject::Session { ns, .. } | Subject::Infra { ns, .. } => StreamName::Ctl(ns),
            Subject::Invoke { ns, .. }
            | Subject::Req { ns, .. }
            | Subject::Call { ns, .. }
            | Subject::End { ns, .. } => StreamName::Log(ns),
            Subject::Dead => return Err(undecodable()),
        };
        let raw = Raw {
            subject: letter.subject.clone(),
            headers: letter.headers.clone(),
            body: letter.body.clone(),
            id: format!("redrive:{}:{}", letter.id, uniquifier()),
            expect_last: None,
        };
        self.append_plain(&stream, &raw).await
    }
}

/// Makes two redrives of one letter two messages.
fn uniquifier() -> u64 {
    rand::random()
}
