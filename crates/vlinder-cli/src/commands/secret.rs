//! `vlinder secret`. A value comes from stdin and leaves on stdout; it is never an argument.

use super::Cx;
use crate::args::Secret;
use crate::error::Error;
use crate::json;
use crate::table::{Column, Table};
use crate::text;
use serde_json::json;
use std::io::{IsTerminal, Read};
use vlinder_proto::secret as proto;

/// Largest value, in bytes: what the service takes.
const VALUE_BYTES_MAX: u64 = 64 * 1024;

/// Runs one of them.
pub async fn run(cx: &Cx<'_>, command: Secret) -> Result<(), Error> {
    match command {
        Secret::Put { name, exact } => put(cx, name, exact).await,
        Secret::Get { name } => get(cx, name).await,
        Secret::List => list(cx).await,
        Secret::Delete { name } => delete(cx, name).await,
    }
}

async fn put(cx: &Cx<'_>, name: String, exact: bool) -> Result<(), Error> {
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        return Err(Error::Usage(format!(
            "the value comes from stdin, and stdin is a terminal, which would show it; try: \
             printf %s \"$VALUE\" | vlinder secret put {name}"
        )));
    }
    let mut value = Vec::new();
    // Room for one line end and one byte more, which tells too much from just enough.
    stdin
        .lock()
        .take(VALUE_BYTES_MAX + 3)
        .read_to_end(&mut value)
        .map_err(Error::io("cannot read stdin"))?;
    if !exact {
        value.truncate(without_line_end(&value).len());
    }
    if value.is_empty() || value.len() as u64 > VALUE_BYTES_MAX {
        return Err(Error::Usage(format!(
            "stdin: expected a value of 1 byte to {} KiB",
            VALUE_BYTES_MAX / 1024
        )));
    }
    let request = proto::PutRequest {
        name: name.clone(),
        value,
        ..Default::default()
    };
    let version = cx.client.put_secret(request).await?.version;
    let sentence = format!("stored secret {name} as version {version}");
    cx.out
        .done(json!({ "name": name, "version": version }), &sentence)
}

/// A value of one line without its end; anything else as it is. `echo` adds a line end that nobody
/// means, and a key with one in it breaks headers; the last line end of a PEM file belongs to it.
fn without_line_end(value: &[u8]) -> &[u8] {
    let Some(line) = value.strip_suffix(b"\n") else {
        return value;
    };
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    match line.contains(&b'\n') {
        true => value,
        false => line,
    }
}

async fn get(cx: &Cx<'_>, name: String) -> Result<(), Error> {
    let request = proto::GetRequest {
        name: name.clone(),
        ..Default::default()
    };
    let found = cx.client.get_secret(request).await?;
    if cx.out.json {
        let mut value = json!({ "name": name, "version": found.version });
        json::put_bytes(&mut value, "value", &found.value);
        return cx.out.value(&value);
    }
    cx.out.foreign(&found.value)?;
    match cx.out.terminal {
        true => cx.out.raw(b"\n"),
        false => Ok(()),
    }
}

async fn list(cx: &Cx<'_>) -> Result<(), Error> {
    let secrets = cx
        .client
        .list_secrets(proto::ListRequest::default())
        .await?
        .secrets;
    let mut table = Table::new(&[
        ("name", Column::Whole),
        ("version", Column::Number),
        ("updated", Column::Whole),
    ]);
    let now = text::now_ms();
    for secret in &secrets {
        table.row([
            secret.name.clone(),
            secret.version.to_string(),
            text::ago(secret.updated_at, now),
        ]);
    }
    cx.out
        .list(|| json::of(&secrets), table, "no secret is stored")
}

async fn delete(cx: &Cx<'_>, name: String) -> Result<(), Error> {
    let request = proto::DeleteRequest {
        name: name.clone(),
        ..Default::default()
    };
    cx.client.delete_secret(request).await?;
    let sentence = format!("deleted secret {name}");
    cx.out
        .done(json!({ "name": name, "deleted": true }), &sentence)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_end_goes() {
        for (given, kept) in [
            ("key", "key"),
            ("key\n", "key"),
            ("key\r\n", "key"),
            ("key\n\n", "key\n\n"),
            ("a\nb\n", "a\nb\n"),
            ("\n", ""),
            ("", ""),
        ] {
            assert_eq!(
                without_line_end(given.as_bytes()),
                kept.as_bytes(),
                "{given:?}"
            );
        }
    }
}
