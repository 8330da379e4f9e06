//! How many tokens an answer says it took. Reads, never changes; what it cannot read it leaves out.

use bytes::Bytes;
use serde::Deserialize;

/// A streamed answer says it in one of its last lines.
const LINES_MAX: usize = 16;
/// Larger answers are read on a thread of their own, so that no other work waits.
const READ_HERE_MAX: usize = 1024 * 1024;

/// Tokens of one call, where the upstream says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Read by the model.
    pub tokens_in: Option<u64>,
    /// Written by the model.
    pub tokens_out: Option<u64>,
}

impl Usage {
    fn found(self) -> Option<Self> {
        (self != Self::default()).then_some(self)
    }
}

/// What the known formats say, side by side: Ollama on top, OpenAI's chat and responses and Anthropic's
/// messages in `usage`, the last event of a responses stream and the first of a messages stream one
/// level deeper.
#[derive(Deserialize)]
struct Said {
    prompt_eval_count: Option<u64>,
    eval_count: Option<u64>,
    usage: Option<SaidUsage>,
    response: Option<SaidInside>,
    /// Of the first event of a messages stream; in Ollama's chat it has no usage.
    message: Option<SaidInside>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum SaidInside {
    /// `response` of a responses stream.
    Object { usage: Option<SaidUsage> },
    /// `response` of Ollama's generate is the text.
    Other(serde::de::IgnoredAny),
}

#[derive(Deserialize)]
struct SaidUsage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
    /// Anthropic counts what came from its cache, or went there, apart.
    cache_creation_input_tokens: Option<u64>,
    cache_read_input_tokens: Option<u64>,
}

impl From<SaidUsage> for Usage {
    fn from(said: SaidUsage) -> Self {
        Self {
            tokens_in: said.prompt_tokens.or_else(|| {
                let cached = [
                    said.cache_creation_input_tokens,
                    said.cache_read_input_tokens,
                ];
                let cached = cached.into_iter().flatten();
                Some(cached.fold(said.input_tokens?, u64::saturating_add))
            }),
            tokens_out: said.completion_tokens.or(said.output_tokens),
        }
    }
}

/// The usage in a whole answer.
pub async fn of(body: &Bytes, is_stream: bool) -> Usage {
    let read = move |body: &[u8]| {
        if is_stream {
            of_stream(body)
        } else {
            of_json(body).unwrap_or_default()
        }
    };
    if body.len() <= READ_HERE_MAX {
        return read(body);
    }
    let body = body.clone();
    let task = tokio::task::spawn_blocking(move || read(&body));
    task.await.unwrap_or_default()
}

fn of_json(body: &[u8]) -> Option<Usage> {
    let said: Said = serde_json::from_slice(body).ok()?;
    let inside = |said: Option<SaidInside>| match said {
        Some(SaidInside::Object { usage }) => usage,
        Some(SaidInside::Other(_)) | None => None,
    };
    let inside = inside(said.response).or_else(|| inside(said.message));
    if let Some(usage) = said.usage.or(inside) {
        return Usage::from(usage).found();
    }
    let usage = Usage {
        tokens_in: said.prompt_eval_count,
        tokens_out: said.eval_count,
    };
    usage.found()
}

/// Looks at the last lines, from the end: NDJSON, or `data:` lines of server-sent events.
fn of_stream(body: &[u8]) -> Usage {
    let lines = body.rsplit(|byte| *byte == b'\n');
    let payloads = lines.map(|line| {
        let line = line.trim_ascii();
        line.strip_prefix(b"data:").unwrap_or(line).trim_ascii()
    });
    let objects = payloads.filter(|payload| payload.first() == Some(&b'{'));
    let last = objects.take(LINES_MAX).find_map(of_json);
    match last {
        // Anthropic says at the beginning what it has read, and at the end what it has written.
        Some(Usage {
            tokens_in: None,
            tokens_out,
        }) => Usage {
            tokens_in: of_first_event(body).and_then(|usage| usage.tokens_in),
            tokens_out,
        },
        found => found.unwrap_or_default(),
    }
}

fn of_first_event(body: &[u8]) -> Option<Usage> {
    let lines = body.split(|byte| *byte == b'\n').take(LINES_MAX);
    let mut payloads = lines.filter_map(|line| line.trim_ascii().strip_prefix(b"data:"));
    payloads.find_map(|payload| of_json(payload.trim_ascii()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[tokio::test]
    async fn every_known_format_is_read() {
        let check = async |body: &str, is_stream, expected: Option<(u64, Option<u64>)>| {
            let expected = expected.map_or_else(Usage::default, |(tokens_in, tokens_out)| Usage {
                tokens_in: Some(tokens_in),
                tokens_out,
            });
            let found = of(&Bytes::copy_from_slice(body.as_bytes()), is_stream).await;
            assert_eq!(found, expected, "{body}");
        };
        check(
            r#"{"response":"hi","done":true,"prompt_eval_count":3,"eval_count":2}"#,
            false,
            Some((3, Some(2))),
        )
        .await;
        check(
            r#"{"usage":{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12}}"#,
            false,
            Some((5, Some(7))),
        )
        .await;
        check(
            r#"{"data":[],"usage":{"prompt_tokens":5,"total_tokens":5}}"#,
            false,
            Some((5, None)),
        )
        .await;
        check(
            r#"{"usage":{"input_tokens":1,"output_tokens":2}}"#,
            false,
            Some((1, Some(2))),
        )
        .await;
        check(
            "{\"message\":{}}\n{\"done\":true,\"prompt_eval_count\":1,\"eval_count\":4}\n",
            true,
            Some((1, Some(4))),
        )
        .await;
        check(
            "data: {\"usage\":null}\n\ndata: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":8}}\r\n\r\ndata: [DONE]\n\n",
            true,
            Some((9, Some(8))),
        )
        .await;
        check(
            "event: response.completed\ndata: {\"response\":{\"usage\":{\"input_tokens\":3,\"output_tokens\":4}}}\n\n",
            true,
            Some((3, Some(4))),
        )
        .await;
        check(
            "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":2,\"cache_read_input_tokens\":5,\"output_tokens\":1}}}\n\nevent: message_delta\ndata: {\"type\":\"message_delta\",\"usage\":{\"output_tokens\":9}}\n\nevent: message_stop\ndata: {\"type\":\"message_stop\"}\n\n",
            true,
            Some((7, Some(9))),
        )
        .await;
        check(
            r#"{"type":"message","usage":{"input_tokens":3,"output_tokens":4}}"#,
            false,
            Some((3, Some(4))),
        )
        .await;
        check("", true, None).await;
        check("\0<html>", false, None).await;
        check(r#"{"usage":"none"}"#, false, None).await;
        check(r#"{"usage":{"prompt_tokens":-1}}"#, false, None).await;
        let long = format!(
            r#"{{"text":"{}","usage":{{"prompt_tokens":1,"completion_tokens":1}}}}"#,
            "x".repeat(READ_HERE_MAX)
        );
        check(&long, false, Some((1, Some(1)))).await;
    }

    proptest! {
        #[test]
        fn hostile_answers_do_not_panic(body in any::<Vec<u8>>()) {
            let _ = of_stream(&body);
            let _ = of_json(&body);
        }
    }
}
