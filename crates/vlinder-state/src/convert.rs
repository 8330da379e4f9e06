//! From rows to the messages of `proto/state.proto`.

use crate::query::NodeRow;
use crate::query::calls::Call;
use crate::query::line::{EndRow, TurnRow};
use crate::query::sessions::{BranchRow, SessionRow};
use vlinder_core::NodeHash;
use vlinder_proto::state as proto;

/// A list of hashes as text.
pub(crate) fn texts(hashes: &[NodeHash]) -> Vec<String> {
    hashes.iter().map(NodeHash::to_string).collect()
}

fn text_of(hash: Option<NodeHash>) -> String {
    hash.map(|hash| hash.to_string()).unwrap_or_default()
}

pub(crate) fn session_summary(session: SessionRow) -> proto::SessionSummary {
    let status = if session.open > 0 { "running" } else { "idle" };
    proto::SessionSummary {
        id: session.id,
        name: session.name,
        agent: session.agent,
        default_branch: session.default_branch,
        turns: session.turns,
        started_at: session.started_ms,
        last_active_at: session.active_ms,
        status: status.to_owned(),
    }
}

pub(crate) fn branch(branch: BranchRow) -> proto::Branch {
    proto::Branch {
        name: branch.name,
        head: text_of(branch.head),
        sealed: branch.sealed,
        forked_from: text_of(branch.forked_from),
    }
}

/// A turn without its texts; `open_status` is its status while it has no end.
pub(crate) fn turn(
    turn: &TurnRow,
    calls: &[Call],
    calls_total: u64,
    open_status: &str,
) -> proto::Turn {
    let end = turn.end.as_ref();
    let (status, hash, state) = match (end, &turn.left_at) {
        (Some(end), _) => (end.outcome.as_str(), Some(end.node.hash), end.state),
        (None, Some((node, state))) => ("cut", Some(*node), *state),
        (None, None) => (open_status, None, None),
    };
    let duration_ms = end.map_or(0, |end| since(&turn.invoke, &end.node));
    proto::Turn {
        submission: turn.submission.clone(),
        input: String::new(),
        output: String::new(),
        hash: text_of(hash),
        state: text_of(state),
        status: status.to_owned(),
        started_at: turn.invoke.time_ms,
        duration_ms,
        calls: calls.iter().map(call).collect(),
        branch: turn.branch.clone(),
        code: end.map(|end| end.code.clone()).unwrap_or_default(),
        input_len: turn.invoke.body_len,
        output_len: end.map_or(0, |end| end.node.body_len),
        invoke: turn.invoke.hash.to_string(),
        by: end.map(|end| end.node.by.clone()).unwrap_or_default(),
        calls_total,
        source: turn.source.clone(),
    }
}

pub(crate) fn end(end: EndRow) -> proto::EndDetail {
    proto::EndDetail {
        hash: end.node.hash.to_string(),
        outcome: end.outcome,
        code: end.code,
        time_ms: end.node.time_ms,
        parents: texts(&end.node.parents),
        by: end.node.by,
    }
}

pub(crate) fn call(call: &Call) -> proto::Call {
    let request = call.request.as_ref();
    let result = call.result.as_ref();
    let request_hash = text_of(request.map(|request| request.node.hash));
    let duration_ms = match (request, result) {
        (Some(request), Some(result)) => since(&request.node, &result.node),
        (None, Some(result)) => result.node.took_us.unwrap_or(0) / 1000,
        _ => 0,
    };
    let field = |read: fn(&crate::query::calls::RequestRow) -> &String| {
        request
            .map(|request| read(request).clone())
            .unwrap_or_default()
    };
    proto::Call {
        seq: call.seq,
        service: field(|request| &request.service),
        backend: field(|request| &request.backend),
        operation: field(|request| &request.operation),
        model: model(&field(|request| &request.selector)),
        hash: match result {
            Some(result) => result.node.hash.to_string(),
            None => request_hash.clone(),
        },
        duration_ms,
        tokens_in: result.and_then(|result| result.tokens_in),
        tokens_out: result.and_then(|result| result.tokens_out),
        status: call.status.as_str().to_owned(),
        request_hash,
        label: field(|request| &request.label),
        key: hex(&call.key),
        http: result.map_or(0, |result| result.http),
        state: text_of(result.and_then(|result| result.state)),
        replayed: text_of(result.and_then(|result| result.replayed)),
        repaired: result.is_some_and(|result| result.repaired),
    }
}

/// A selector for people: nothing where none was needed.
fn model(selector: &str) -> String {
    if selector == "_" {
        String::new()
    } else {
        selector.to_owned()
    }
}

/// A call without its texts.
pub(crate) fn call_detail(row: &Call) -> proto::CallDetail {
    let request = row.request.as_ref().map(|request| &request.node);
    let result = row.result.as_ref();
    let node = result.map(|result| &result.node);
    proto::CallDetail {
        call: Some(call(row)),
        request: String::new(),
        request_base64: false,
        request_len: request.map_or(0, |node| node.body_len),
        response: String::new(),
        response_base64: false,
        response_len: node.map_or(0, |node| node.body_len),
        requested_at: request.map_or(0, |node| node.time_ms),
        answered_at: node.map_or(0, |node| node.time_ms),
        parents: request.map(|node| texts(&node.parents)).unwrap_or_default(),
        by: node.map(|node| node.by.clone()).unwrap_or_default(),
        content_type: result
            .map(|result| result.content_type.clone())
            .unwrap_or_default(),
        result_parents: node.map(|node| texts(&node.parents)).unwrap_or_default(),
        attempt: node.map_or(0, |node| node.attempt),
    }
}

/// Milliseconds between two nodes, by the log's clock; 0 where it ran backwards.
fn since(from: &NodeRow, to: &NodeRow) -> u64 {
    to.time_ms.saturating_sub(from.time_ms)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
