//! `vlinder agent run -p …`: one turn, from the prompt to the exit code.

use super::Cx;
use crate::args::RunArgs;
use crate::error::Error;
use crate::{json, text};
use serde_json::{Value, json};
use std::io::Read;
use std::pin::Pin;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;
use vlinder_client::TurnEvent;
use vlinder_core::BODY_BYTES_MAX;
use vlinder_proto::harness as proto;

/// How long after Ctrl-C the turn's end is waited for.
const CANCEL_WAIT: Duration = Duration::from_secs(10);
/// Longest error message that is taken from an agent's reply, in characters.
const MESSAGE_CHARS_MAX: usize = 2000;

/// A turn that has ended, whichever way.
pub struct Ended {
    pub accepted: proto::Accepted,
    pub end: proto::End,
    /// What was printed of the reply while it was made.
    printed: String,
}

/// SIGINT, one at a time.
pub struct Interrupts(Signal);

impl Interrupts {
    /// From here on Ctrl-C no longer ends the process by itself.
    pub fn catch() -> Result<Self, Error> {
        let caught = signal(SignalKind::interrupt());
        Ok(Self(caught.map_err(Error::io("cannot listen for Ctrl-C"))?))
    }

    /// Waits for the next one.
    pub async fn next(&mut self) {
        self.0.recv().await;
    }
}

/// `agent run` with a prompt.
pub async fn run(cx: &Cx<'_>, args: RunArgs) -> Result<(), Error> {
    let input = input_of(args.prompt.as_deref().unwrap_or_default())?;
    let request = request_of(&args, input);
    let mut interrupts = Interrupts::catch()?;
    let hint = args.session.is_none();
    let ended = follow(cx, request, &mut interrupts, hint).await?;
    show(cx, &ended, false)?;
    outcome(&ended.end)
}

/// The request that the arguments ask for.
pub fn request_of(args: &RunArgs, input: Vec<u8>) -> proto::RunRequest {
    let timeout = args.timeout.map_or(0, |timeout| timeout.as_millis() as u64);
    proto::RunRequest {
        agent: args.name.clone(),
        input,
        session: args.session.clone().unwrap_or_default(),
        branch: args.branch.clone().unwrap_or_default(),
        submission: args.submission.clone().unwrap_or_default(),
        timeout_ms: timeout,
        stream: args.stream,
        ..Default::default()
    }
}

fn input_of(prompt: &str) -> Result<Vec<u8>, Error> {
    if prompt != "-" {
        return Ok(prompt.as_bytes().to_vec());
    }
    let mut input = Vec::new();
    // One byte more than is taken tells too much from just enough.
    std::io::stdin()
        .lock()
        .take(BODY_BYTES_MAX + 1)
        .read_to_end(&mut input)
        .map_err(Error::io("cannot read stdin"))?;
    if input.len() as u64 > BODY_BYTES_MAX {
        let limit = BODY_BYTES_MAX / 1024 / 1024;
        return Err(Error::Usage(format!("stdin: expected at most {limit} MiB")));
    }
    if std::str::from_utf8(&input).is_err() {
        return Err(Error::Usage("stdin: expected text in UTF-8".to_owned()));
    }
    Ok(input)
}

type Cancelling<'a> =
    Pin<Box<dyn Future<Output = Result<proto::CancelResponse, vlinder_client::Error>> + 'a>>;

/// Follows a turn to its end. Ctrl-C asks for its cancellation; a second one stops waiting.
/// `hint`: say the session's id once it is known.
pub async fn follow(
    cx: &Cx<'_>,
    request: proto::RunRequest,
    interrupts: &mut Interrupts,
    hint: bool,
) -> Result<Ended, Error> {
    let mut turn = cx.client.run(request);
    let submission = turn.submission().to_owned();
    let mut accepted: Option<proto::Accepted> = None;
    let mut printed = String::new();
    let mut give_up: Option<Instant> = None;
    let mut cancelling: Option<Cancelling<'_>> = None;
    loop {
        tokio::select! {
            biased;
            event = turn.next() => match event? {
                Some(TurnEvent::Accepted(known)) => {
                    if hint && !cx.out.json {
                        cx.out.note(&format!("session {} (go on with --session)", known.session));
                    }
                    accepted = Some(known);
                    if give_up.is_some() {
                        cancelling = Some(cancel(cx, &submission));
                    }
                }
                Some(TurnEvent::Chunk(chunk)) => say(cx, &chunk, &mut printed)?,
                Some(TurnEvent::Waiting(reason)) => cx.out.note(&format!("waiting: {reason}")),
                Some(TurnEvent::Broken(cause)) => cx.out.note(&format!("waiting: {cause}; taking the turn up again")),
                Some(TurnEvent::End(end)) => {
                    let accepted = accepted.unwrap_or_default();
                    return Ok(Ended { accepted, end, printed });
                }
                None => return Err(Error::Failed(format!("turn {submission} ended without an end"))),
            },
            () = interrupts.next() => {
                if give_up.is_some() {
                    return Err(unknown(&submission));
                }
                cx.out.note("cancelling (again: stop waiting)");
                give_up = Some(Instant::now() + CANCEL_WAIT);
                if accepted.is_some() {
                    cancelling = Some(cancel(cx, &submission));
                }
            },
            answer = maybe(&mut cancelling) => {
                cancelling = None;
                // Where it succeeded, the end comes through the turn's own stream.
                if let Err(error) = answer {
                    cx.out.note(&format!("cannot cancel: {error}"));
                }
            },
            () = until(give_up) => return Err(unknown(&submission)),
        }
    }
}

fn cancel<'a>(cx: &'a Cx<'_>, submission: &str) -> Cancelling<'a> {
    let request = proto::CancelRequest {
        submission: submission.to_owned(),
        ..Default::default()
    };
    Box::pin(cx.client.cancel(request))
}

fn unknown(submission: &str) -> Error {
    Error::Cancelled(format!(
        "stopped waiting; whether turn {submission} has ended is unknown: `vlinder turn get {submission}` shows it"
    ))
}

async fn maybe(
    cancelling: &mut Option<Cancelling<'_>>,
) -> Result<proto::CancelResponse, vlinder_client::Error> {
    match cancelling {
        Some(cancelling) => cancelling.await,
        None => std::future::pending().await,
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// A piece of the reply goes to stdout, a remark of the agent to stderr.
fn say(cx: &Cx<'_>, chunk: &proto::Chunk, printed: &mut String) -> Result<(), Error> {
    let said = String::from_utf8_lossy(&chunk.text);
    if chunk.kind != "token" {
        cx.out
            .note(&format!("{}: {said}", text::or_dash(&chunk.kind)));
    } else if !cx.out.json {
        cx.out.foreign(said.as_bytes())?;
        printed.push_str(&said);
    }
    Ok(())
}

/// Prints what came of the turn. `line`: JSON on one line, for one of many.
pub fn show(cx: &Cx<'_>, ended: &Ended, line: bool) -> Result<(), Error> {
    if cx.out.json {
        let value = value(ended);
        return match (outcome(&ended.end), line) {
            (Err(error), _) => cx
                .out
                .failed_value(value, error_of(&ended.end, &error), line),
            (Ok(()), true) => cx.out.value_line(&value),
            (Ok(()), false) => cx.out.value(&value),
        };
    }
    if ended.end.outcome != "done" {
        // Half a reply may stand there; the error goes below it.
        return match ended.printed.is_empty() || ended.printed.ends_with('\n') {
            true => Ok(()),
            false => cx.out.raw(b"\n"),
        };
    }
    cx.out
        .foreign(&left_to_print(&ended.end.output, &ended.printed))
}

/// What is still to be printed of a reply of which pieces were: the rest of it, or all of it on a
/// line of its own where pieces are missing.
fn left_to_print(output: &[u8], printed: &str) -> Vec<u8> {
    let mut left = match output.strip_prefix(printed.as_bytes()) {
        Some(rest) => rest.to_vec(),
        None => [b"\n", output].concat(),
    };
    left.push(b'\n');
    left
}

fn value(ended: &Ended) -> Value {
    let Ended { accepted, end, .. } = ended;
    let mut value = json!({
        "agent": accepted.agent,
        "session": accepted.session,
        "branch": accepted.branch,
        "submission": accepted.submission,
    });
    json::put_bytes(&mut value, "output", &end.output);
    value["state"] = end.state.clone().into();
    value["node"] = end.node.clone().into();
    value["duration_ms"] = end.duration_ms.into();
    value["hash"] = end.hash.clone().into();
    value["status"] = end.outcome.clone().into();
    value["attached"] = accepted.attached.into();
    value
}

/// The error of a turn: what was recorded says more than the kind of our own error.
fn error_of(end: &proto::End, error: &Error) -> Value {
    let mut value = error.json();
    if !end.code.is_empty() {
        value["code"] = end.code.clone().into();
    }
    value["message"] = message_of(end).into();
    value
}

/// Whether the turn did what was asked, as an exit code says it.
pub fn outcome(end: &proto::End) -> Result<(), Error> {
    let message = message_of(end);
    match end.outcome.as_str() {
        "done" => Ok(()),
        _ if end.code == "no_worker" => Err(Error::NoWorker(format!(
            "no live worker could serve the turn: {message}"
        ))),
        // The reason on record mostly says by whom: `cancelled by a client`.
        "cancelled" if message.starts_with("cancelled") => {
            Err(Error::Cancelled(format!("the turn was {message}")))
        }
        "cancelled" => Err(Error::Cancelled(format!(
            "the turn was cancelled: {message}"
        ))),
        "deadline" => Err(Error::Deadline(message)),
        "failed" => Err(Error::AgentFailed {
            code: text::or_dash(&end.code).to_owned(),
            message,
        }),
        other => Err(Error::Failed(format!(
            "the turn ended as {other}: {message}"
        ))),
    }
}

fn message_of(end: &proto::End) -> String {
    let message: String = String::from_utf8_lossy(&end.output)
        .trim()
        .chars()
        .take(MESSAGE_CHARS_MAX)
        .collect();
    match message.is_empty() {
        true => "nothing was said".to_owned(),
        false => message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(outcome: &str, code: &str, output: &str) -> proto::End {
        proto::End {
            outcome: outcome.into(),
            code: code.into(),
            output: output.into(),
            ..Default::default()
        }
    }

    #[test]
    fn each_outcome_has_its_exit_code() {
        for (how, code, exit) in [
            ("done", "", 0),
            ("failed", "agent_error", 6),
            ("deadline", "deadline", 7),
            ("deadline", "no_worker", 3),
            ("failed", "no_worker", 3),
            ("cancelled", "cancelled", 10),
            ("exploded", "", 1),
        ] {
            let outcome = outcome(&end(how, code, "because"));
            assert_eq!(
                outcome.map_or_else(|error| error.exit_code(), |()| 0),
                exit,
                "{how} {code}"
            );
        }
    }

    #[test]
    fn a_cancelled_turn_is_told_once() {
        for (reason, told) in [
            (
                "cancelled by a client",
                "the turn was cancelled by a client",
            ),
            ("its client left", "the turn was cancelled: its client left"),
            ("", "the turn was cancelled: nothing was said"),
        ] {
            let error = outcome(&end("cancelled", "cancelled", reason)).unwrap_err();
            assert_eq!(error.to_string(), told);
        }
    }

    #[test]
    fn nothing_is_printed_twice() {
        let left = |output: &str, printed: &str| {
            String::from_utf8(left_to_print(output.as_bytes(), printed)).unwrap()
        };
        assert_eq!(left("hello", ""), "hello\n");
        assert_eq!(left("hello", "hello"), "\n");
        assert_eq!(left("hello", "hel"), "lo\n");
        assert_eq!(left("hello", "help"), "\nhello\n");
    }

    #[test]
    fn the_json_has_the_fields_of_the_interface() {
        let mut ended = Ended {
            accepted: proto::Accepted {
                agent: "notes".into(),
                ..Default::default()
            },
            end: end("done", "", "hi"),
            printed: String::new(),
        };
        let names =
            |value: &Value| -> Vec<String> { value.as_object().unwrap().keys().cloned().collect() };
        let done = value(&ended);
        let expected = [
            "agent",
            "session",
            "branch",
            "submission",
            "output",
            "state",
            "node",
            "duration_ms",
            "hash",
            "status",
            "attached",
        ];
        assert_eq!(names(&done), expected);
        assert_eq!(
            (&done["output"], &done["status"]),
            (&json!("hi"), &json!("done"))
        );

        ended.end = end("failed", "http_500", "boom");
        assert_eq!(value(&ended)["status"], "failed");
        let error = outcome(&ended.end).unwrap_err();
        assert_eq!(
            error_of(&ended.end, &error),
            json!({ "code": "http_500", "message": "boom", "exit": 6 })
        );
    }
}
