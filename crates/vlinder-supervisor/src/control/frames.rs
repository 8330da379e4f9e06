//! Frames: a length of four bytes, big-endian, then that many bytes of JSON.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Error;

const LENGTH_BYTES: usize = 4;

/// Appends one frame.
pub(crate) fn encode(message: &impl Serialize, out: &mut Vec<u8>) {
    let at = out.len();
    out.extend_from_slice(&[0; LENGTH_BYTES]);
    serde_json::to_writer(&mut *out, message)
        .expect("control messages have string keys and a Vec takes every byte");
    let length = u32::try_from(out.len() - at - LENGTH_BYTES)
        .expect("frames are far below 4 GiB: their parts are bounded where they are made");
    out[at..at + LENGTH_BYTES].copy_from_slice(&length.to_be_bytes());
}

/// Cuts a byte stream into messages.
#[derive(Debug)]
pub(crate) struct FrameReader {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that have been handed on.
    taken: usize,
    frame_bytes_max: usize,
}

impl FrameReader {
    pub fn new(frame_bytes_max: usize) -> Self {
        Self {
            buffer: Vec::new(),
            taken: 0,
            frame_bytes_max,
        }
    }

    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next message that has arrived completely.
    pub fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Error> {
        let rest = &self.buffer[self.taken..];
        let Some((length, rest)) = rest.split_first_chunk::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length) as usize;
        if length > self.frame_bytes_max {
            let max = self.frame_bytes_max;
            return Err(Error::Control(format!(
                "a frame of {length} bytes, at most {max} are allowed"
            )));
        }
        let Some(frame) = rest.get(..length) else {
            return Ok(None);
        };
        let message =
            serde_json::from_slice(frame).map_err(|error| Error::Control(error.to_string()));
        self.taken += LENGTH_BYTES + length;
        message.map(Some)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::ToParent;
    use super::*;

    fn held(token: &str) -> ToParent {
        ToParent::Held {
            deliveries: vec![token.to_owned()],
        }
    }

    proptest! {
        #[test]
        fn messages_survive_any_chunking(tokens in prop::collection::vec(".{0,40}", 0..20), size in 1usize..50) {
            let mut bytes = Vec::new();
            for token in &tokens {
                encode(&held(token), &mut bytes);
            }
            let mut reader = FrameReader::new(1024);
            let mut received = Vec::new();
            for chunk in bytes.chunks(size) {
                reader.push(chunk);
                while let Some(message) = reader.next::<ToParent>().unwrap() {
                    received.push(message);
                }
            }
            let sent: Vec<_> = tokens.iter().map(|token| held(token)).collect();
            prop_assert_eq!(received, sent);
        }

        #[test]
        fn garbage_is_an_error_or_incomplete(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut reader = FrameReader::new(64);
            reader.push(&bytes);
            // Every message takes bytes away, so this ends; it must not panic.
            while let Ok(Some(_)) = reader.next::<ToParent>() {}
        }
    }

    #[test]
    fn a_huge_length_is_refused_before_it_is_buffered() {
        let mut reader = FrameReader::new(1024);
        reader.push(&u32::MAX.to_be_bytes());
        assert!(matches!(reader.next::<ToParent>(), Err(Error::Control(_))));
    }

    #[test]
    fn the_wire_form_is_fixed() {
        let mut bytes = Vec::new();
        encode(&held("$JS.ACK.1"), &mut bytes);
        assert_eq!(&bytes[4..], br#"{"held":{"deliveries":["$JS.ACK.1"]}}"#);
        assert_eq!(bytes[..4], [0, 0, 0, 37]);
    }
}
