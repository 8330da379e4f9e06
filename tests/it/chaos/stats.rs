//! What happened, in figures.

use super::client::{Talk, Told};
use super::killer::{Deed, Kind};
use crate::support::Node;
use std::collections::BTreeMap;
use std::time::{Duration, Instant, UNIX_EPOCH};
use vlinder_proto::state::GetTurnRequest;
use vlinder_proto::state::state_client::StateClient;

/// How long after a deed a turn still counts as hit by it.
const AFTERMATH: Duration = Duration::from_millis(500);
/// Slowest turns that are shown with what hit them.
const SLOWEST_SHOWN: usize = 8;

/// Median, 99th percentile and maximum.
fn spread(mut times: Vec<Duration>) -> String {
    times.sort();
    let at = |part: f64| times[((times.len() - 1) as f64 * part).round() as usize];
    match times.len() {
        0 => "none".to_owned(),
        count => format!(
            "{count:>6}: p50 {:>8.1?}, p99 {:>8.1?}, max {:>8.1?}",
            at(0.5),
            at(0.99),
            at(1.0)
        ),
    }
}

fn hit<'a>(told: &'a Told, deeds: &'a [Deed]) -> impl Iterator<Item = &'a Deed> {
    let overlaps = |deed: &&Deed| deed.at <= told.ended && told.sent <= deed.over + AFTERMATH;
    deeds.iter().filter(overlaps)
}

/// The kind, and the role where it matters.
fn group(deed: &Deed) -> String {
    match deed.kind {
        Kind::KillWorker | Kind::FreezeWorker => {
            let role = deed.victim.split(' ').next().unwrap_or_default();
            format!("{:?} {role}", deed.kind)
        }
        kind => format!("{kind:?}"),
    }
}

/// The second of its minute, as logs have it.
pub fn second(at: Instant) -> f64 {
    let since_epoch = UNIX_EPOCH.elapsed().unwrap_or_default() - at.elapsed();
    since_epoch.as_secs_f64() % 60.0
}

pub fn print(talks: &[Talk], deeds: &[Deed]) {
    let turns: Vec<&Told> = talks.iter().flat_map(|talk| &talk.turns).collect();
    let took = |turns: &[&Told]| turns.iter().map(|told| told.ended - told.sent).collect();
    println!("turns    {}", spread(took(&turns)));
    let calm: Vec<&Told> = turns
        .iter()
        .copied()
        .filter(|told| hit(told, deeds).next().is_none())
        .collect();
    println!("  calm   {}", spread(took(&calm)));
    println!(
        "turns under way when something died, from that moment on (from its return for a server), hit by nothing else:"
    );
    let mut recoveries: BTreeMap<String, (usize, Vec<Duration>)> = BTreeMap::new();
    for deed in deeds {
        let (count, times) = recoveries.entry(group(deed)).or_default();
        *count += 1;
        let from = match deed.kind {
            Kind::KillNats | Kind::KillDaemon => deed.over,
            Kind::KillWorker | Kind::FreezeWorker | Kind::KillAgent => deed.at,
        };
        let under_way = turns
            .iter()
            .filter(|told| told.sent <= from && from <= told.ended);
        let alone = under_way.filter(|told| hit(told, deeds).count() == 1);
        times.extend(alone.map(|told| told.ended - from));
    }
    for (group, (count, times)) in recoveries {
        println!("{count:>4} {group:<35} {}", spread(times));
    }
    let again = turns.iter().filter(|told| told.tries > 1).count();
    println!("turns sent more than once: {again}");
    let mut failed: BTreeMap<&str, Vec<&Told>> = BTreeMap::new();
    for told in turns.iter().filter(|told| told.end.outcome != "done") {
        failed.entry(&told.end.code).or_default().push(told);
    }
    println!(
        "failed turns: {}",
        failed.values().map(Vec::len).sum::<usize>()
    );
    for (code, turns) in failed {
        let why = String::from_utf8_lossy(&turns[0].end.output);
        println!(
            "  {code}: {}, such as {}: {why}",
            turns.len(),
            turns[0].submission
        );
    }
}

/// The slowest turns: what hit them, and on what they waited, in milliseconds since their start.
pub async fn print_slowest(node: &Node, talks: &[Talk], deeds: &[Deed]) {
    let mut client = StateClient::new(node.grpc("state"));
    let mut slowest: Vec<&Told> = talks.iter().flat_map(|talk| &talk.turns).collect();
    slowest.sort_by_key(|told| std::cmp::Reverse(told.ended - told.sent));
    for told in slowest.iter().take(SLOWEST_SHOWN) {
        println!(
            "slow: {} {:?} in {} tries until :{:06.3}",
            told.submission,
            told.ended - told.sent,
            told.tries,
            second(told.ended)
        );
        for deed in hit(told, deeds) {
            let at = deed.at.saturating_duration_since(told.sent);
            println!("    {at:>8.1?} {:?} {}", deed.kind, deed.victim);
        }
        let request = GetTurnRequest {
            submission: told.submission.clone(),
            ..GetTurnRequest::default()
        };
        let turn = client.get_turn(request).await.expect("it is on record");
        let turn = turn.into_inner();
        let began = turn.turn.map_or(0, |turn| turn.started_at);
        let calls = turn.calls.iter().map(|call| {
            let operation = call.call.as_ref().map_or("", |call| &call.operation);
            let (asked, told) = (call.requested_at - began, call.answered_at - began);
            format!(
                "{operation} {asked} to {told} at try {} by {}",
                call.attempt, call.by
            )
        });
        let ends = turn
            .ends
            .iter()
            .map(|end| format!("end {} by {}", end.time_ms - began, end.by));
        let steps: Vec<String> = calls.chain(ends).collect();
        println!("    {}", steps.join(", "));
    }
}
