//! Lines of a log on stdout, for agents and workers alike.

use crate::error::Error;
use crate::out::Out;
use crate::{json, text};
use futures::{Stream, StreamExt};
use serde_json::Value;
use vlinder_proto::registry::LogLine;

/// Prints lines as they come. JSON: an array, or one value a line where more may come for ever.
pub async fn print(
    out: &Out,
    mut lines: impl Stream<Item = Result<LogLine, vlinder_client::Error>> + Unpin,
    follow: bool,
) -> Result<(), Error> {
    let mut all = Vec::new();
    while let Some(line) = lines.next().await {
        let line = line?;
        match (out.json, follow) {
            (true, true) => out.value_line(&json::of(&line))?,
            // Bounded: the service sends 10,000 past lines at most.
            (true, false) => all.push(json::of(&line)),
            (false, _) => out.foreign(format!("{}\n", of_people(&line)).as_bytes())?,
        }
    }
    match out.json && !follow {
        true => out.value(&Value::Array(all)),
        false => Ok(()),
    }
}

fn of_people(line: &LogLine) -> String {
    let time = text::timestamp(line.time_ms);
    let from = [&line.node, &line.source];
    let from: Vec<&str> = from
        .into_iter()
        .map(String::as_str)
        .filter(|part| !part.is_empty())
        .collect();
    match from.is_empty() {
        true => format!("{time}  {}", line.line),
        false => format!("{time} {}  {}", from.join(" "), line.line),
    }
}
