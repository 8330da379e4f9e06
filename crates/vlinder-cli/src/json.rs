//! From wire types to the JSON shapes of interfaces.md §3. Bytes become text (base64 beside it where
//! they are none), JSON in a string becomes JSON, maps are sorted.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::{Map, Value};
use vlinder_proto::registry::Agent;
use vlinder_proto::state::{CallDetail, TurnDetail};

/// Fields that are maps: their order on the wire is random.
const MAPS: [&str; 3] = ["labels", "notes", "headers"];

/// A wire type as JSON.
pub fn of<T: Serialize>(value: &T) -> Value {
    // The generated types have string keys and no failing serializers.
    let mut value = serde_json::to_value(value).expect("wire types are JSON");
    sort_maps(&mut value);
    value
}

fn sort_maps(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(sort_maps),
        Value::Object(fields) => {
            for (name, field) in fields {
                match field {
                    Value::Object(map) if MAPS.contains(&name.as_str()) => map.sort_keys(),
                    other => sort_maps(other),
                }
            }
        }
        _ => {}
    }
}

/// Puts bytes into an object: as text under `name`, and, where they are no UTF-8, also as they are
/// under `<name>_base64`.
pub fn put_bytes(object: &mut Value, name: &str, bytes: &[u8]) {
    object[name] = String::from_utf8_lossy(bytes).into();
    if std::str::from_utf8(bytes).is_err() {
        object[format!("{name}_base64")] = STANDARD.encode(bytes).into();
    }
}

/// JSON in a string, or the string where it is none.
pub fn embedded(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| text.into())
}

/// An agent; its manifest as an object.
pub fn agent(agent: &Agent) -> Value {
    let mut value = of(agent);
    value["manifest"] = embedded(&agent.manifest);
    value
}

/// A call with what was asked and answered, on one level.
pub fn call(detail: &CallDetail) -> Value {
    let mut whole = detail
        .call
        .as_ref()
        .map_or_else(|| Value::Object(Map::new()), of);
    let mut rest = of(detail);
    if let (Value::Object(whole), Value::Object(rest)) = (&mut whole, &mut rest) {
        rest.shift_remove("call");
        whole.append(rest);
    }
    whole
}

/// A turn with its calls, on one level: the fields of a turn in `session get`, and then some.
pub fn turn(detail: &TurnDetail) -> Value {
    let mut whole = detail
        .turn
        .as_ref()
        .map_or_else(|| Value::Object(Map::new()), of);
    let mut rest = of(detail);
    if let (Value::Object(whole), Value::Object(rest)) = (&mut whole, &mut rest) {
        rest.shift_remove("turn");
        rest.insert("calls".to_owned(), detail.calls.iter().map(call).collect());
        for (name, value) in std::mem::take(rest) {
            whole.insert(name, value);
        }
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use vlinder_proto::registry::{Node, Worker};
    use vlinder_proto::state::{Branch, Call, Session, Turn};

    fn has(value: &Value, names: &[&str]) {
        for name in names {
            assert!(value.get(name).is_some(), "{name} is missing in {value}");
        }
    }

    #[test]
    fn lists_have_the_fields_of_the_interface() {
        has(
            &of(&Worker::default()),
            &[
                "node",
                "role",
                "index",
                "pid",
                "state",
                "restarts",
                "uptime_ms",
                "last_exit",
                "reason",
            ],
        );
        has(
            &of(&Node::default()),
            &[
                "name",
                "state",
                "labels",
                "version",
                "workers",
                "last_seen_ms",
            ],
        );
        has(
            &of(&Branch::default()),
            &["name", "head", "sealed", "forked_from"],
        );
    }

    #[test]
    fn a_session_has_the_fields_of_the_interface() {
        let call = Call {
            tokens_in: Some(7),
            ..Default::default()
        };
        let session = Session {
            turns: vec![Turn {
                calls: vec![call],
                ..Default::default()
            }],
            ..Default::default()
        };
        let value = of(&session);
        has(&value, &["id", "name", "agent", "default_branch", "turns"]);
        let turn = &value["turns"][0];
        has(
            turn,
            &[
                "submission",
                "input",
                "output",
                "hash",
                "state",
                "status",
                "started_at",
                "duration_ms",
                "calls",
            ],
        );
        let call = &turn["calls"][0];
        has(
            call,
            &[
                "seq",
                "service",
                "backend",
                "operation",
                "model",
                "hash",
                "duration_ms",
                "status",
            ],
        );
        assert_eq!(
            (&call["tokens_in"], &call["tokens_out"]),
            (&json!(7), &Value::Null)
        );
    }

    #[test]
    fn maps_are_sorted() {
        let labels = ["z", "a", "m"].map(|key| (key.to_owned(), "1".to_owned()));
        let node = Node {
            labels: labels.into_iter().collect(),
            ..Default::default()
        };
        assert_eq!(
            of(&node)["labels"].to_string(),
            r#"{"a":"1","m":"1","z":"1"}"#
        );
    }

    #[test]
    fn bytes_are_text_and_never_numbers() {
        let mut object = json!({});
        put_bytes(&mut object, "output", "hällo".as_bytes());
        assert_eq!(object, json!({ "output": "hällo" }));
        put_bytes(&mut object, "output", &[0xff, b'a']);
        assert_eq!(
            object,
            json!({ "output": "\u{fffd}a", "output_base64": "/2E=" })
        );
    }

    #[test]
    fn a_turn_is_on_one_level() {
        let detail = TurnDetail {
            turn: Some(Turn {
                submission: "t".into(),
                calls: vec![Call::default()],
                ..Default::default()
            }),
            session: "s".into(),
            calls: vec![CallDetail {
                call: Some(Call {
                    service: "kv".into(),
                    ..Default::default()
                }),
                request: "get".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let value = turn(&detail);
        assert_eq!(
            (&value["submission"], &value["session"]),
            (&json!("t"), &json!("s"))
        );
        assert_eq!(value["calls"][0]["service"], "kv");
        assert_eq!(value["calls"][0]["request"], "get");
        assert!(value["calls"][0].get("call").is_none());
    }

    #[test]
    fn a_manifest_is_an_object() {
        let known = Agent {
            manifest: r#"{"name":"a"}"#.into(),
            ..Default::default()
        };
        assert_eq!(agent(&known)["manifest"]["name"], "a");
        assert_eq!(agent(&Agent::default())["manifest"], "");
    }
}
