//! `vlinder events`: what changes, as it changes.

use super::Cx;
use crate::error::Error;
use crate::{json, text};
use futures::StreamExt;
use serde_json::Value;
use std::time::Duration;
use tokio::time::Instant;
use vlinder_proto::harness::{Event, EventsRequest};

/// First pause before a stream that broke is opened again; each further one is twice as long …
const PAUSE_FIRST: Duration = Duration::from_millis(50);
/// … up to this one.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Prints events. A stream that breaks is opened again, while the node is back within
/// `Limits::reattach`; what happened meanwhile is not shown, and that is said.
pub async fn run(cx: &Cx<'_>, prefix: String) -> Result<(), Error> {
    let request = EventsRequest {
        prefix,
        ..Default::default()
    };
    let mut events = cx.client.events(request.clone()).await?;
    let mut pause = PAUSE_FIRST;
    loop {
        let cause = loop {
            match events.next().await {
                Some(Ok(event)) => show(cx, &event)?,
                Some(Err(error)) if error.is_transient() => break error.to_string(),
                Some(Err(error)) => return Err(error.into()),
                None => break "the harness ended the stream: it drains".to_owned(),
            }
            pause = PAUSE_FIRST;
        };
        cx.out.note(&format!(
            "waiting: {cause}; events are missed until it is back"
        ));
        let until = Instant::now() + cx.client.limits().reattach;
        events = loop {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
            match cx.client.events(request.clone()).await {
                Ok(events) => break events,
                Err(error) if error.is_transient() && Instant::now() < until => {}
                Err(error) => return Err(error.into()),
            }
        };
    }
}

fn show(cx: &Cx<'_>, event: &Event) -> Result<(), Error> {
    match cx.out.json {
        true => cx.out.value_line(&value(event)),
        false => cx.out.line(&text::safe_line(&of_people(event))),
    }
}

/// `{id, name, time_ms, data: {…}}`
fn value(event: &Event) -> Value {
    let mut value = json::of(event);
    value["data"] = json::embedded(&event.data);
    value
}

fn of_people(event: &Event) -> String {
    let mut line = format!("{}  {:<16}", text::timestamp(event.time_ms), event.name);
    if let Value::Object(fields) = json::embedded(&event.data) {
        for (name, field) in &fields {
            let field = match field {
                Value::Null => continue,
                Value::String(text) if text.is_empty() => continue,
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            line.push_str(&format!(" {name}={}", text::brief(&field, 80)));
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn data_is_no_string() {
        let event = Event {
            id: "log:7".into(),
            name: "turn.ended".into(),
            time_ms: 1,
            data: r#"{"outcome":"done","reason":"","n":3}"#.into(),
        };
        let shown = value(&event);
        let expected = json!({"id": "log:7", "name": "turn.ended", "time_ms": 1, "data": {"outcome": "done", "reason": "", "n": 3}});
        assert_eq!(shown, expected);
        assert!(of_people(&event).ends_with("turn.ended       outcome=done n=3"));
    }
}
