//! The JSON Schema (draft 2020-12) of `config.toml`, from the table of keys.

use serde_json::{Map, Value, json};

use crate::elements::{Kind, LIST_LEN_MAX, Raw};
use crate::keys::{KEYS, Key, Standard};

/// The JSON Schema of `config.toml`: every key with description, type, bounds and default.
pub fn json_schema() -> Value {
    let mut root = section();
    for key in KEYS {
        put(
            &mut root,
            &key.path.split('.').collect::<Vec<_>>(),
            property(key),
        );
    }
    let mut schema = Map::new();
    schema.insert(
        "$schema".into(),
        "https://json-schema.org/draft/2020-12/schema".into(),
    );
    schema.insert("title".into(), "vlinderd configuration".into());
    schema.append(&mut root);
    let file = json!({
        "description": "The value is read from this file.",
        "type": "object",
        "properties": { "file": { "type": "string" } },
        "required": ["file"],
        "additionalProperties": false,
    });
    schema.insert("$defs".into(), json!({ "file": file }));
    schema.into()
}

fn section() -> Map<String, Value> {
    let mut section = Map::new();
    section.insert("type".into(), "object".into());
    section.insert("additionalProperties".into(), false.into());
    section.insert("properties".into(), json!({}));
    section
}

fn put(schema: &mut Map<String, Value>, path: &[&str], property: Value) {
    let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) else {
        return;
    };
    match path {
        [] => {}
        [name] => drop(properties.insert((*name).to_owned(), property)),
        [name, rest @ ..] => {
            let inner = properties.entry(*name).or_insert_with(|| section().into());
            if let Some(inner) = inner.as_object_mut() {
                put(inner, rest, property);
            }
        }
    }
}

fn property(key: &Key) -> Value {
    let mut property = Map::new();
    let about = match key.standard {
        Standard::Follows { rule, .. } => format!("{} Default: {rule}.", key.about),
        _ => key.about.to_owned(),
    };
    let variables = key.variables().join(" or ");
    let expects = key.kind.expectation();
    let description = format!("{about} Expects {expects}. Variable: {variables}.");
    property.insert("description".into(), description.into());
    let file = json!({ "$ref": "#/$defs/file" });
    match key.kind {
        // A label may be called `file`.
        Kind::Labels => drop(property.insert("allOf".into(), json!([shape(key.kind)]))),
        kind => drop(property.insert("anyOf".into(), json!([shape(kind), file]))),
    }
    if let Standard::Is(text) = key.standard
        && let Ok(value) = key.kind.check(&Raw::Argument(text.to_owned()))
    {
        let default = match key.kind {
            Kind::Size { .. } => key.kind.to_toml(&value).as_str().into(),
            _ => value.to_json(),
        };
        property.insert("default".into(), default);
    }
    property.into()
}

fn shape(kind: Kind) -> Value {
    match kind {
        Kind::Choice(choices) => json!({ "enum": choices }),
        Kind::Number { min, max } => json!({ "type": "integer", "minimum": min, "maximum": max }),
        Kind::Size { min } => json!({
            "anyOf": [
                { "type": "integer", "minimum": min },
                { "type": "string", "pattern": "^[0-9]+ *([KkMmGgTt]?[Ii]?[Bb])?$" },
            ],
        }),
        Kind::Words => {
            json!({ "type": "array", "items": { "type": "string" }, "maxItems": LIST_LEN_MAX })
        }
        Kind::Labels => json!({
            "type": "object",
            "additionalProperties": { "type": "string", "maxLength": 63 },
            "maxProperties": LIST_LEN_MAX,
        }),
        _ => json!({ "type": "string", "minLength": 1 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_described() {
        let schema = json_schema();
        for key in KEYS {
            let pointer = key
                .path
                .split('.')
                .fold(String::new(), |p, n| p + "/properties/" + n);
            let property = schema
                .pointer(&pointer)
                .unwrap_or_else(|| panic!("no {}", key.path));
            let description = property["description"].as_str().unwrap();
            assert!(description.contains(&key.variables()[0]), "{description}");
        }
        assert_eq!(
            schema.pointer("/properties/queue/additionalProperties"),
            Some(&json!(false))
        );
        let bytes = schema.pointer("/properties/queue/properties/max_bytes/default");
        assert_eq!(bytes, Some(&json!("10GiB")));
    }
}
