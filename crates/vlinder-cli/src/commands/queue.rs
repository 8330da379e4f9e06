//! `vlinder queue` with its dead letters.

use super::Cx;
use crate::args::{Dead, Queue};
use crate::error::Error;
use crate::table::{Column, Table};
use crate::{json, text};
use vlinder_proto::harness as proto;

/// Most dead letters that a list shows.
const DEAD_MAX: usize = 10_000;

/// Runs one of them.
pub async fn run(cx: &Cx<'_>, command: Queue) -> Result<(), Error> {
    match command {
        Queue::List => {
            let queues = cx
                .client
                .list_queues(proto::ListQueuesRequest::default())
                .await?
                .queues;
            cx.out
                .list(|| json::of(&queues), table(&queues), "no queue exists yet")
        }
        Queue::Dead(command) => dead(cx, command).await,
    }
}

/// Queues as `queue list` and `status` show them.
pub fn table(queues: &[proto::Queue]) -> Table {
    let mut table = Table::new(&[
        ("queue", Column::Whole),
        ("waiting", Column::Number),
        ("held", Column::Number),
        ("oldest", Column::Number),
        ("filter", Column::Cut),
    ]);
    for queue in queues {
        table.row([
            queue.name.clone(),
            queue.waiting.to_string(),
            queue.held.to_string(),
            queue.oldest_ms.map(text::span).unwrap_or_default(),
            queue.filter.clone(),
        ]);
    }
    table
}

/// Runs one of those about dead letters.
pub async fn dead(cx: &Cx<'_>, command: Dead) -> Result<(), Error> {
    match command {
        Dead::List => dead_list(cx).await,
        Dead::Show { id } => dead_show(cx, id).await,
        Dead::Redrive { ids, all } => {
            let request = proto::RedriveDeadRequest { ids, all };
            let answer = match cx.client.redrive_dead(request).await {
                // All of none is done.
                Err(error) if all && error.is_not_found() => proto::RedriveDeadResponse::default(),
                answer => answer?,
            };
            let ids: Vec<String> = answer.redriven.iter().map(u64::to_string).collect();
            let ids = match ids.is_empty() {
                true => "none".to_owned(),
                false => ids.join(", "),
            };
            cx.out
                .done(json::of(&answer), &format!("sent again: {ids}"))
        }
    }
}

/// All dead letters, oldest first, up to [`DEAD_MAX`].
pub async fn all_dead(cx: &Cx<'_>) -> Result<Vec<proto::DeadLetter>, vlinder_client::Error> {
    let mut letters: Vec<proto::DeadLetter> = Vec::new();
    let mut from = 1;
    loop {
        let page = cx
            .client
            .list_dead(proto::ListDeadRequest { from })
            .await?
            .letters;
        let Some(last) = page.iter().map(|letter| letter.id).max() else {
            return Ok(letters);
        };
        letters.extend(page);
        if last < from || letters.len() >= DEAD_MAX {
            letters.truncate(DEAD_MAX);
            return Ok(letters);
        }
        from = last + 1;
    }
}

async fn dead_list(cx: &Cx<'_>) -> Result<(), Error> {
    let letters = all_dead(cx).await?;
    let mut table = Table::new(&[
        ("id", Column::Number),
        ("when", Column::Whole),
        ("tries", Column::Number),
        ("size", Column::Number),
        ("reason", Column::Cut),
        ("subject", Column::Cut),
    ]);
    let now = text::now_ms();
    for letter in &letters {
        table.row([
            letter.id.to_string(),
            text::ago(letter.time_ms, now),
            letter.deliveries.to_string(),
            text::size(letter.bytes),
            letter.reason.clone(),
            letter.subject.clone(),
        ]);
    }
    cx.out
        .list(|| json::of(&letters), table, "no message was given up")
}

async fn dead_show(cx: &Cx<'_>, id: u64) -> Result<(), Error> {
    let shown = cx.client.show_dead(proto::ShowDeadRequest { id }).await?;
    let letter = shown.letter.clone().unwrap_or_default();
    if cx.out.json {
        let mut value = json::of(&letter);
        value["headers"] = json::of(&shown)["headers"].take();
        json::put_bytes(&mut value, "body", &shown.body);
        return cx.out.value(&value);
    }
    let mut lines = vec![
        ("id".to_owned(), letter.id.to_string()),
        ("when".to_owned(), text::timestamp(letter.time_ms)),
        ("reason".to_owned(), letter.reason),
        ("tries".to_owned(), letter.deliveries.to_string()),
        (
            "from".to_owned(),
            format!("{} {} {}", letter.stream, letter.seq, letter.subject),
        ),
    ];
    let mut headers: Vec<_> = shown.headers.into_iter().collect();
    headers.sort();
    lines.extend(headers);
    for (name, value) in lines {
        cx.out.line(&text::safe_line(&format!("{name}: {value}")))?;
    }
    cx.out.line("")?;
    cx.out.foreign(&shown.body)?;
    cx.out.raw(b"\n")
}
