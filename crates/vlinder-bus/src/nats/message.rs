//! Messages between our form and the client's.

use super::link::refused;
use crate::backend::{Headers, Raw, RawDelivery, RawStored};
use crate::error::Error;
use crate::streams::StreamName;
use async_nats::{HeaderMap, HeaderName, HeaderValue, Message, header, jetstream};
use base64::Engine;
use bytes::Bytes;

/// Headers of the server and the client; everything else is ours.
const THEIRS: &str = "Nats-";

/// Longest subject in bytes; ours stay below 400.
const SUBJECT_BYTES_MAX: usize = 1024;

/// Refuses what is no subject of that stream: the server would store a wildcard literally, and
/// answer nothing at all where no stream listens.
pub(super) fn check_subject(stream: &StreamName, subject: &str) -> Result<(), Error> {
    let clean = |byte: u8| byte.is_ascii_graphic() && byte != b'*' && byte != b'>';
    let well_formed = subject.len() <= SUBJECT_BYTES_MAX
        && subject.bytes().all(clean)
        && subject.split('.').all(|token| !token.is_empty());
    let belongs = |filter: &String| {
        let prefix = filter.trim_end_matches('>');
        subject.len() > prefix.len() && subject.starts_with(prefix)
    };
    if well_formed && stream.subjects().iter().any(belongs) {
        return Ok(());
    }
    let start: String = subject.chars().take(60).collect();
    Err(refused(
        "append",
        format!("{start:?} is no subject of {stream}"),
    ))
}

/// The headers of an append.
pub(super) fn encode_headers(stream: &str, raw: &Raw) -> Result<HeaderMap, Error> {
    let operation = "append";
    let mut map = HeaderMap::new();
    for (name, value) in &raw.headers {
        if name.starts_with(THEIRS) {
            return Err(refused(operation, format!("header {name} is reserved")));
        }
        let name: HeaderName = name
            .parse()
            .map_err(|_| refused(operation, format!("header name {name:?} is not valid")))?;
        let value: HeaderValue = value
            .parse()
            .map_err(|_| refused(operation, format!("header {name} breaks its line")))?;
        map.append(name, value);
    }
    let id: HeaderValue = raw
        .id
        .parse()
        .map_err(|_| refused(operation, "the message id breaks its line"))?;
    map.insert(header::NATS_MESSAGE_ID, id);
    map.insert(header::NATS_EXPECTED_STREAM, stream);
    if let Some(last) = raw.expect_last {
        map.insert(
            header::NATS_EXPECTED_LAST_SUBJECT_SEQUENCE,
            HeaderValue::from(last),
        );
    }
    Ok(map)
}

/// Our headers among all, sorted by name (the client does not keep their order).
fn our_headers(map: Option<&HeaderMap>) -> Headers {
    let mut headers: Headers = Vec::new();
    for (name, values) in map.into_iter().flat_map(HeaderMap::iter) {
        let name: &str = name.as_ref();
        if !name.starts_with(THEIRS) {
            headers.extend(
                values
                    .iter()
                    .map(|value| (name.to_owned(), value.as_str().to_owned())),
            );
        }
    }
    headers.sort_by(|a, b| a.0.cmp(&b.0));
    headers
}

pub(super) fn header_text<'a>(message: &'a Message, name: &HeaderName) -> Option<&'a str> {
    let value = message.headers.as_ref()?.get_last(name.clone())?;
    Some(value.as_str())
}

pub(super) fn header_number(message: &Message, name: &HeaderName) -> Option<u64> {
    header_text(message, name)?.parse().ok()
}

/// Milliseconds since the Unix epoch of an RFC 3339 time; `None` if it is none.
pub(super) fn time_ms(text: &str) -> Option<u64> {
    let time = async_nats::datetime::parse_rfc3339(text).ok()?;
    u64::try_from(time.unix_timestamp_nanos() / 1_000_000).ok()
}

fn undecodable(message: &Message, reason: &str) -> Error {
    Error::Undecodable {
        subject: message.subject.to_string(),
        seq: 0,
        reason: reason.to_owned(),
    }
}

/// A message that carries where it is stored in headers: a direct get, or a republished message.
pub(super) fn from_headers(message: Message, live: bool) -> Result<RawStored, Error> {
    let found = (|| {
        let subject = header_text(&message, &header::NATS_SUBJECT)?.to_owned();
        let seq = header_number(&message, &header::NATS_SEQUENCE)?;
        let time = time_ms(header_text(&message, &header::NATS_TIME_STAMP)?)?;
        Some((subject, seq, time))
    })();
    let Some((subject, seq, time_ms)) = found else {
        return Err(undecodable(&message, "it does not say where it is stored"));
    };
    let previous = header_number(&message, &header::NATS_LAST_SEQUENCE).filter(|_| live);
    Ok(RawStored {
        subject,
        headers: our_headers(message.headers.as_ref()),
        body: message.payload,
        seq,
        time_ms,
        previous_on_subject: previous.unwrap_or(0),
    })
}

/// What the reply subject of a consumed message says.
pub(super) struct Position {
    /// Sequence among the messages of this consumer, from 1.
    pub consumer_seq: u64,
    /// Messages of this consumer after it.
    pub pending: u64,
}

/// A message that a consumer delivered.
pub(super) fn from_consumer(
    context: &jetstream::Context,
    message: Message,
) -> Result<(RawDelivery, Position), Error> {
    let token = message.reply.as_ref().map(ToString::to_string);
    let message = jetstream::Message {
        message,
        context: context.clone(),
    };
    let read = message.info().ok().and_then(|info| {
        let time_ms = info.published.unix_timestamp_nanos() / 1_000_000;
        let position = Position {
            consumer_seq: info.consumer_sequence,
            pending: info.pending,
        };
        Some((
            info.stream_sequence,
            u64::try_from(time_ms).ok()?,
            u64::try_from(info.delivered).ok()?,
            position,
        ))
    });
    let (Some(token), Some((seq, time_ms, delivered, position))) = (token, read) else {
        return Err(undecodable(
            &message.message,
            "its reply subject is no acknowledgement",
        ));
    };
    let message = message.message;
    let delivery = RawDelivery {
        stored: RawStored {
            subject: message.subject.into_string(),
            headers: our_headers(message.headers.as_ref()),
            body: message.payload,
            seq,
            time_ms,
            previous_on_subject: 0,
        },
        delivered,
        token,
    };
    Ok((delivery, position))
}

/// What a token names.
pub(super) struct Token {
    pub stream: String,
    pub queue: String,
    pub seq: u64,
    /// When the message was stored, by the server's clock in milliseconds since the Unix epoch.
    pub stored_ms: u64,
}

/// Reads a token; `None` unless it is an acknowledgement subject, and nothing that would reach further.
pub(super) fn read_token(context: &jetstream::Context, token: &str) -> Option<Token> {
    let clean = |byte: u8| byte.is_ascii_graphic() && byte != b'*' && byte != b'>';
    let short = token.len() <= SUBJECT_BYTES_MAX;
    if !short || !token.bytes().all(clean) || token.split('.').any(str::is_empty) {
        return None;
    }
    let message = jetstream::Message {
        message: Message {
            subject: token.into(),
            reply: Some(token.into()),
            payload: Bytes::new(),
            headers: None,
            status: None,
            description: None,
            length: 0,
        },
        context: context.clone(),
    };
    let info = message.info().ok()?;
    Some(Token {
        stream: info.stream.to_owned(),
        queue: info.consumer.to_owned(),
        seq: info.stream_sequence,
        stored_ms: (info.published.unix_timestamp_nanos() / 1_000_000) as u64,
    })
}

/// The answer of `$JS.API.STREAM.MSG.GET`.
#[derive(serde::Deserialize)]
pub(super) struct MsgGet {
    message: MsgGetMessage,
}

#[derive(serde::Deserialize)]
struct MsgGetMessage {
    subject: String,
    seq: u64,
    time: String,
    #[serde(default)]
    hdrs: String,
    #[serde(default)]
    data: String,
}

impl MsgGet {
    /// With all its headers, those of the server too.
    pub fn read(self) -> Result<(RawStored, Headers), Error> {
        let message = self.message;
        let bad = |reason: &str| Error::Undecodable {
            subject: message.subject.clone(),
            seq: message.seq,
            reason: reason.to_owned(),
        };
        let base64 = base64::engine::general_purpose::STANDARD;
        let body = base64.decode(&message.data).map_err(|_| bad("its body"))?;
        let block = base64
            .decode(&message.hdrs)
            .map_err(|_| bad("its headers"))?;
        let all = header_lines(&block).ok_or_else(|| bad("its headers"))?;
        let mut ours: Headers = all
            .iter()
            .filter(|(name, _)| !name.starts_with(THEIRS))
            .cloned()
            .collect();
        ours.sort_by(|a, b| a.0.cmp(&b.0));
        let stored = RawStored {
            time_ms: time_ms(&message.time).ok_or_else(|| bad("its time"))?,
            headers: ours,
            body: body.into(),
            seq: message.seq,
            subject: message.subject,
            previous_on_subject: 0,
        };
        Ok((stored, all))
    }
}

/// The lines of a header block: `NATS/1.0`, then `Name: value`.
fn header_lines(block: &[u8]) -> Option<Headers> {
    if block.is_empty() {
        return Some(Vec::new());
    }
    let text = std::str::from_utf8(block).ok()?;
    let mut lines = text.split("\r\n");
    if !lines.next()?.starts_with("NATS/1.0") {
        return None;
    }
    lines
        .filter(|line| !line.is_empty())
        .map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_owned(), value.trim().to_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn header_blocks() {
        let lines = header_lines(b"NATS/1.0\r\nA: b: c\r\nNats-TTL:1\r\n\r\n").unwrap();
        assert_eq!(
            lines,
            [
                ("A".to_owned(), "b: c".to_owned()),
                ("Nats-TTL".to_owned(), "1".to_owned())
            ]
        );
        assert_eq!(header_lines(b"").unwrap(), []);
        assert!(header_lines(b"HTTP/1.1\r\nA: b\r\n\r\n").is_none());
        assert!(header_lines(b"NATS/1.0\r\nnonsense\r\n\r\n").is_none());
    }

    #[test]
    fn times() {
        assert_eq!(time_ms("1970-01-01T00:00:01.5Z"), Some(1500));
        assert_eq!(time_ms("1970-01-01T01:00:01.25+01:00"), Some(1250));
        assert_eq!(time_ms("1969-12-31T23:59:59Z"), None);
        assert_eq!(time_ms("yesterday"), None);
    }

    #[test]
    fn what_would_break_a_header_is_refused() {
        let raw = |name: &str, value: &str, id: &str| Raw {
            subject: "a".into(),
            headers: vec![(name.into(), value.into())],
            body: Bytes::new(),
            id: id.into(),
            expect_last: None,
        };
        assert!(encode_headers("S", &raw("A", "b", "id")).is_ok());
        assert!(encode_headers("S", &raw("A", "b\r\nNats-Rollup: all", "id")).is_err());
        assert!(encode_headers("S", &raw("A", "b", "id\nx")).is_err());
        assert!(encode_headers("S", &raw("A b", "c", "id")).is_err());
        assert!(encode_headers("S", &raw("Nats-Rollup", "all", "id")).is_err());
    }

    proptest! {
        #[test]
        fn hostile_blocks_do_not_panic(block in any::<Vec<u8>>(), text in "\\PC{0,60}") {
            let _ = header_lines(&block);
            let _ = header_lines(format!("NATS/1.0\r\n{text}\r\n").as_bytes());
            let _ = time_ms(&text);
        }
    }
}
