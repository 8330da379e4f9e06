//! The pieces of a reply on their way to one client.
//!
//! Pieces are signals: they may be lost, and a turn that is tried again says its reply from the beginning.
//! A client gets none of it twice. What it was sent when the turn ends is completed from the reply on
//! record, unless pieces before it were lost or the record has another reply; the end has it all anyway.

use sha2::{Digest, Sha256};
use vlinder_bus::Signal;
use vlinder_proto::harness::Chunk;

/// How much of the reply a client was sent.
#[derive(Default)]
pub struct Said {
    bytes: u64,
    hasher: Sha256,
}

impl Said {
    /// What of a signal is news to the client.
    pub fn take(&mut self, signal: &Signal) -> Option<Chunk> {
        let value: serde_json::Value = serde_json::from_slice(&signal.body).ok()?;
        let mut text = value["text"].as_str()?.as_bytes();
        let kind = value["kind"].as_str().unwrap_or("token");
        if let Some(offset) = value["offset"].as_u64() {
            let known = self.bytes.saturating_sub(offset);
            text = text.get(usize::try_from(known).ok()?..)?;
            if text.is_empty() {
                return None;
            }
            self.bytes = offset.checked_add(known + text.len() as u64)?;
            self.hasher.update(text);
        }
        Some(Chunk {
            text: text.to_vec(),
            kind: kind.to_owned(),
        })
    }

    /// What is missing when the turn has ended with `reply`; `None` if nothing is, or nothing was sent,
    /// or what was sent is not how the reply begins.
    pub fn rest(&self, reply: &[u8]) -> Option<Chunk> {
        let sent = usize::try_from(self.bytes).ok().filter(|sent| *sent > 0)?;
        let (begin, rest) = reply.split_at_checked(sent)?;
        let is_same = Sha256::digest(begin) == self.hasher.clone().finalize();
        (is_same && !rest.is_empty()).then(|| Chunk {
            text: rest.to_vec(),
            kind: "token".to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn take(said: &mut Said, value: &Value) -> Option<String> {
        let signal = Signal {
            subject: String::new(),
            body: value.to_string().into(),
        };
        let text = said.take(&signal).map(|chunk| chunk.text);
        text.map(|text| String::from_utf8(text).unwrap())
    }

    fn token(offset: u64, text: &str) -> Value {
        json!({ "kind": "token", "offset": offset, "text": text })
    }

    #[test]
    fn a_client_is_sent_each_piece_of_a_reply_once() {
        let mut said = Said::default();
        let said = &mut said;
        assert_eq!(take(said, &token(0, "abc")).as_deref(), Some("abc"));
        assert_eq!(take(said, &token(3, "de")).as_deref(), Some("de"));
        let progress = json!({ "kind": "progress", "text": "half" });
        assert_eq!(take(said, &progress).as_deref(), Some("half"));
        assert_eq!(
            take(said, &token(0, "abc")),
            None,
            "the turn is tried again"
        );
        assert_eq!(take(said, &token(3, "def")).as_deref(), Some("f"));
        let rest = |said: &Said, reply: &str| said.rest(reply.as_bytes()).map(|chunk| chunk.text);
        assert_eq!(rest(said, "abcdefgh"), Some(b"gh".to_vec()));
        assert_eq!(rest(said, "abcdef"), None, "nothing is missing");
        assert_eq!(rest(said, "abc"), None);
        assert_eq!(rest(said, "aXcdefgh"), None, "another reply");
        assert_eq!(
            take(said, &token(9, "x")).as_deref(),
            Some("x"),
            "one was lost"
        );
        assert_eq!(rest(said, "abcdef...xyz"), None);
        assert_eq!(take(said, &token(u64::MAX, "x")), None);
        assert_eq!(take(said, &json!({ "kind": "token" })), None);
        assert_eq!(rest(&Said::default(), "all"), None, "not streamed at all");
    }
}
