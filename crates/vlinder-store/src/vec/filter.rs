//! Which metadata a search is for (docs/vectors.md).

use serde_json::{Map, Number, Value};
use std::cmp::Ordering;

/// Most conditions of one filter, those inside `$or` counted.
const CONDITIONS_MAX: usize = 64;
/// Most values of one `$in`.
const VALUES_MAX: usize = 1000;
/// How deep `$or` may lie within `$or`.
const DEPTH_MAX: usize = 4;
/// What may be asked of a field.
const OPERATORS: &str = "$eq, $ne, $gt, $gte, $lt, $lte, $in, $exists";

/// Conditions that must all hold.
#[derive(Debug, PartialEq)]
pub(super) struct Filter(Vec<Condition>);

#[derive(Debug, PartialEq)]
enum Condition {
    /// All of this must be true of a field.
    Field(String, Vec<Test>),
    /// One of these must hold.
    Any(Vec<Filter>),
}

#[derive(Debug, PartialEq)]
enum Test {
    Equal(Value),
    NotEqual(Value),
    /// The field compared with the value is one of the two.
    Order(Value, [Ordering; 2]),
    In(Vec<Value>),
    Exists(bool),
}

impl Filter {
    /// Reads a filter; the error says what is wrong with it.
    pub(super) fn parse(value: &Value) -> Result<Self, String> {
        let mut left = CONDITIONS_MAX;
        Self::parse_within(value, DEPTH_MAX, &mut left)
    }

    fn parse_within(value: &Value, depth: usize, left: &mut usize) -> Result<Self, String> {
        let Value::Object(fields) = value else {
            return Err("filter must be an object: field names with values or tests".to_owned());
        };
        let mut conditions = Vec::with_capacity(fields.len());
        for (name, wanted) in fields {
            *left = left
                .checked_sub(1)
                .ok_or_else(|| format!("a filter may have {CONDITIONS_MAX} conditions"))?;
            let condition = match name.as_str() {
                "$or" => any(wanted, depth, left)?,
                _ if name.starts_with('$') => {
                    return Err(format!(
                        "unknown condition {name:?}: expected a field or $or"
                    ));
                }
                _ => Condition::Field(name.clone(), tests(name, wanted)?),
            };
            conditions.push(condition);
        }
        Ok(Self(conditions))
    }

    /// Whether metadata, as it was stored, is wanted.
    pub(super) fn wants(&self, metadata: &[u8]) -> bool {
        // Whatever `store` wrote is JSON; a forged tree may hold something else, which has no fields.
        let metadata = serde_json::from_slice(metadata).unwrap_or(Value::Null);
        self.holds(&metadata)
    }

    fn holds(&self, metadata: &Value) -> bool {
        self.0.iter().all(|condition| match condition {
            Condition::Field(path, tests) => {
                let found = find(metadata, path);
                tests.iter().all(|test| test.holds(found))
            }
            Condition::Any(filters) => filters.iter().any(|filter| filter.holds(metadata)),
        })
    }
}

fn any(wanted: &Value, depth: usize, left: &mut usize) -> Result<Condition, String> {
    let depth = depth
        .checked_sub(1)
        .ok_or_else(|| format!("$or may lie within $or {DEPTH_MAX} deep"))?;
    let choices = wanted
        .as_array()
        .filter(|choices| !choices.is_empty())
        .ok_or("$or must be a list of filters")?;
    let filters = choices
        .iter()
        .map(|choice| Filter::parse_within(choice, depth, left));
    Ok(Condition::Any(filters.collect::<Result<_, _>>()?))
}

/// An object of operators is a list of tests, anything else a value that the field must equal.
fn tests(field: &str, wanted: &Value) -> Result<Vec<Test>, String> {
    match wanted {
        Value::Object(tests) if tests.keys().any(|key| key.starts_with('$')) => {
            operators(field, tests)
        }
        value => Ok(vec![Test::Equal(value.clone())]),
    }
}

fn operators(field: &str, tests: &Map<String, Value>) -> Result<Vec<Test>, String> {
    use Ordering::{Equal, Greater, Less};
    let order = |value: &Value, operator: &str, accepted| match value {
        Value::Number(_) | Value::String(_) => Ok(Test::Order(value.clone(), accepted)),
        _ => Err(format!(
            "{operator} of {field:?} must be a number or a text"
        )),
    };
    let test = |(operator, value): (&String, &Value)| match operator.as_str() {
        "$eq" => Ok(Test::Equal(value.clone())),
        "$ne" => Ok(Test::NotEqual(value.clone())),
        "$gt" => order(value, operator, [Greater, Greater]),
        "$gte" => order(value, operator, [Greater, Equal]),
        "$lt" => order(value, operator, [Less, Less]),
        "$lte" => order(value, operator, [Less, Equal]),
        "$in" => match value {
            Value::Array(values) if values.len() <= VALUES_MAX => Ok(Test::In(values.clone())),
            _ => Err(format!(
                "$in of {field:?} must be a list of at most {VALUES_MAX} values"
            )),
        },
        "$exists" => value
            .as_bool()
            .map(Test::Exists)
            .ok_or_else(|| format!("$exists of {field:?} must be true or false")),
        _ => {
            let shown: String = operator.chars().take(40).collect();
            Err(format!(
                "unknown test {shown:?} of {field:?}: expected one of {OPERATORS}"
            ))
        }
    };
    tests.iter().map(test).collect()
}

impl Test {
    fn holds(&self, found: Option<&Value>) -> bool {
        match self {
            Self::Equal(value) => found.is_some_and(|found| is_or_has(found, value)),
            Self::NotEqual(value) => !found.is_some_and(|found| is_or_has(found, value)),
            Self::In(values) => {
                found.is_some_and(|found| values.iter().any(|value| is_or_has(found, value)))
            }
            Self::Exists(wanted) => found.is_some() == *wanted,
            Self::Order(value, accepted) => found
                .and_then(|found| compare(found, value))
                .is_some_and(|order| accepted.contains(&order)),
        }
    }
}

/// The field of that name; else, where the name has dots, what lies that deep.
fn find<'a>(metadata: &'a Value, path: &str) -> Option<&'a Value> {
    let object = metadata.as_object()?;
    if let Some(found) = object.get(path) {
        return Some(found);
    }
    path.match_indices('.').find_map(|(dot, _)| {
        let inside = object.get(&path[..dot])?;
        find(inside, &path[dot + 1..])
    })
}

/// Whether the field is the value, or a list that contains it.
fn is_or_has(found: &Value, value: &Value) -> bool {
    is(found, value)
        || found
            .as_array()
            .is_some_and(|elements| elements.iter().any(|element| is(element, value)))
}

/// Numbers are equal by what they mean: 1 is 1.0.
fn is(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => compare_numbers(a, b) == Some(Ordering::Equal),
        _ => a == b,
    }
}

/// Numbers with numbers, texts with texts (by their bytes, so that ISO dates are in order).
fn compare(a: &Value, b: &Value) -> Option<Ordering> {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => compare_numbers(a, b),
        (Value::String(a), Value::String(b)) => Some(a.cmp(b)),
        _ => None,
    }
}

fn compare_numbers(a: &Number, b: &Number) -> Option<Ordering> {
    match (a.as_i128(), b.as_i128()) {
        (Some(a), Some(b)) => Some(a.cmp(&b)),
        _ => a.as_f64()?.partial_cmp(&b.as_f64()?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn a_filter_wants_what_its_conditions_say() {
        let metadata = json!({
            "kind": "note", "year": 2024, "score": 0.5, "tags": ["a", "b"], "read": false,
            "author": {"name": "Ada", "born": 1815}, "dotted.name": 1, "nothing": null,
            "at": "2024-05-01T10:00:00Z", "large": u64::MAX,
        });
        let check = |filter: Value, expected: bool| {
            let parsed = Filter::parse(&filter).unwrap();
            let found = parsed.wants(metadata.to_string().as_bytes());
            assert_eq!(found, expected, "{filter}");
        };
        check(json!({}), true);
        check(json!({"kind": "note"}), true);
        check(json!({"kind": "note", "year": 2023}), false);
        check(json!({"year": 2024.0}), true);
        check(json!({"year": "2024"}), false);
        check(json!({"year": {"$gte": 2024, "$lt": 2025}}), true);
        check(json!({"year": {"$gt": 2024}}), false);
        check(json!({"year": {"$lte": 2023.9}}), false);
        check(json!({"large": {"$gt": u64::MAX - 1}}), true);
        check(json!({"score": {"$gt": 0}}), true);
        check(json!({"score": {"$gt": "0"}}), false);
        check(json!({"tags": "b"}), true);
        check(json!({"tags": ["a", "b"]}), true);
        check(json!({"tags": ["b"]}), false);
        check(json!({"tags": {"$in": ["x", "a"]}}), true);
        check(json!({"tags": {"$ne": "a"}}), false);
        check(json!({"kind": {"$in": []}}), false);
        check(json!({"read": false}), true);
        check(json!({"read": {"$ne": true}}), true);
        check(json!({"absent": {"$ne": 1}}), true);
        check(json!({"absent": {"$exists": false}}), true);
        check(json!({"nothing": {"$exists": true}}), true);
        check(json!({"nothing": null}), true);
        check(json!({"absent": null}), false);
        check(json!({"author.name": "Ada"}), true);
        check(json!({"author.born": {"$lt": 1900}}), true);
        check(json!({"author": {"name": "Ada", "born": 1815}}), true);
        check(json!({"author.name.first": "Ada"}), false);
        check(json!({"dotted.name": 1}), true);
        check(
            json!({"at": {"$gte": "2024-05-01", "$lt": "2024-06"}}),
            true,
        );
        check(json!({"$or": [{"kind": "x"}, {"year": 2024}]}), true);
        check(json!({"$or": [{"kind": "x"}, {"year": 1}]}), false);
        check(json!({"$or": [{"year": 2024}], "kind": "x"}), false);
        assert!(!Filter::parse(&json!({"a": 1})).unwrap().wants(b"\"text\""));
        assert!(!Filter::parse(&json!({"a": 1})).unwrap().wants(b"\xff"));
    }

    #[test]
    fn a_filter_that_cannot_be_meant_is_refused() {
        let many: Map<String, Value> = (0..=64).map(|n| (n.to_string(), json!(1))).collect();
        let mut deep = json!({"a": 1});
        for _ in 0..5 {
            deep = json!({"$or": [deep]});
        }
        for (filter, part) in [
            (json!([]), "must be an object"),
            (json!("a = 1"), "must be an object"),
            (json!({"$and": []}), "$and"),
            (json!({"a": {"$near": 1}}), "$near"),
            (json!({"a": {"$gt": 1, "b": 2}}), "\"b\""),
            (json!({"a": {"$gt": [1]}}), "number or a text"),
            (json!({"a": {"$in": 1}}), "list"),
            (json!({"a": {"$in": vec![0; 1001]}}), "1000"),
            (json!({"a": {"$exists": 1}}), "true or false"),
            (json!({"$or": []}), "list of filters"),
            (json!({"$or": [1]}), "object"),
            (Value::Object(many), "64 conditions"),
            (deep, "deep"),
        ] {
            let error = Filter::parse(&filter).unwrap_err();
            assert!(error.contains(part), "{filter}: {error}");
        }
    }

    proptest! {
        #[test]
        fn hostile_names_do_not_panic(path in "[a.$é]{0,12}", key in "[a.é]{0,4}") {
            let filter = json!({path: 1});
            if let Ok(filter) = Filter::parse(&filter) {
                filter.wants(json!({key: {"a": {"a": 1}}}).to_string().as_bytes());
            }
        }
    }
}
