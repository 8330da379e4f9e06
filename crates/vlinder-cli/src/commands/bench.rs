//! `vlinder bench`: the installation against its own bus, beside the budgets of design.md §9.

use super::Cx;
use crate::error::Error;
use crate::table::{Column, Table};
use futures::StreamExt;
use serde_json::Value;
use std::time::Duration;
use vlinder_proto::harness::BenchRequest;
use vlinder_proto::harness::bench_event::Event;

/// Longest silence: no measure takes longer than 120 s.
const SILENCE_MAX: Duration = Duration::from_secs(150);

/// A ratio of the report with what it must be and what we want it to be.
struct Budget {
    what: &'static str,
    ratio: &'static str,
    must: f64,
    want: f64,
    /// Whether a greater figure is a better one.
    more_is_better: bool,
}

/// Towards the raw hop of the same run. They are made for `nats`, where a hop costs more than the turn.
const BUDGETS: [Budget; 3] = [
    Budget {
        what: "service hop, p50 / raw hop",
        ratio: "service_hop",
        must: 2.0,
        want: 1.3,
        more_is_better: false,
    },
    Budget {
        what: "echo turn without the agent, p50 / raw hop",
        ratio: "echo_turn",
        must: 3.0,
        want: 2.0,
        more_is_better: false,
    },
    Budget {
        what: "turns in flight, rate / raw rate",
        ratio: "in_flight_64",
        must: 0.4,
        want: 0.7,
        more_is_better: true,
    },
];

impl Budget {
    fn verdict(&self, ratio: f64) -> &'static str {
        let within = |bound: f64| match self.more_is_better {
            true => ratio >= bound,
            false => ratio <= bound,
        };
        match (within(self.must), within(self.want)) {
            (_, true) => "as wanted",
            (true, false) => "within budget",
            (false, false) => "over budget",
        }
    }

    fn bound(&self, bound: f64) -> String {
        let sign = if self.more_is_better { "≥" } else { "≤" };
        format!("{sign} {bound:.1}")
    }
}

/// Measures, with progress on stderr.
pub async fn run(cx: &Cx<'_>, hops: u32, in_flight: u32) -> Result<(), Error> {
    let mut events = cx.client.bench(BenchRequest { hops, in_flight }).await?;
    loop {
        let event = tokio::time::timeout(SILENCE_MAX, events.next()).await;
        let event = event.map_err(|_| {
            Error::Deadline(format!(
                "the bench said nothing for {} s",
                SILENCE_MAX.as_secs()
            ))
        })?;
        match event.transpose()?.and_then(|event| event.event) {
            Some(Event::Progress(text)) => cx.out.note(&text),
            Some(Event::Report(report)) => return show(cx, &report),
            None => return Err(Error::Failed("the bench ended without a report".to_owned())),
        }
    }
}

fn show(cx: &Cx<'_>, report: &str) -> Result<(), Error> {
    let report: Value = serde_json::from_str(report)
        .map_err(|error| Error::Failed(format!("the report of the bench is no JSON: {error}")))?;
    if cx.out.json {
        return cx.out.value(&report);
    }
    let backend = report["backend"].as_str().unwrap_or("unknown");
    cx.out.line(&format!("bus {backend}"))?;
    let mut times = Table::new(&[
        ("measure", Column::Whole),
        ("p50", Column::Number),
        ("p99", Column::Number),
    ]);
    let us = |value: &Value| {
        value
            .as_u64()
            .map_or_else(String::new, |us| format!("{us} µs"))
    };
    for (what, part) in [
        ("raw hop", &report["raw_hop"]),
        ("service hop", &report["service_hop"]),
        ("echo turn without the agent", &report["echo_turn"]),
    ] {
        times.row([what.to_owned(), us(&part["p50_us"]), us(&part["p99_us"])]);
    }
    let agent = &report["echo_turn"]["agent_http_p50_us"];
    times.row(["the agent's own HTTP".to_owned(), us(agent), String::new()]);
    cx.out.table(&times, "")?;
    let many = &report["in_flight_64"];
    let rate = |name: &str| many[name].as_f64().unwrap_or_default();
    cx.out.line(&format!(
        "\n{} in flight: {:.0} turns/s, {:.0} raw hops/s\n",
        many["in_flight"].as_u64().unwrap_or(64),
        rate("turns_per_s"),
        rate("raw_per_s"),
    ))?;
    let mut ratios = Table::new(&[
        ("ratio", Column::Whole),
        ("is", Column::Number),
        ("must", Column::Number),
        ("want", Column::Number),
        ("verdict", Column::Whole),
    ]);
    for budget in &BUDGETS {
        let Some(ratio) = report["ratios"][budget.ratio].as_f64() else {
            continue;
        };
        ratios.row([
            budget.what.to_owned(),
            format!("{ratio:.2}"),
            budget.bound(budget.must),
            budget.bound(budget.want),
            // The budgets are ratios to a hop over the network; an embedded hop is far cheaper.
            if backend == "nats" {
                budget.verdict(ratio)
            } else {
                "made for nats"
            }
            .to_owned(),
        ]);
    }
    cx.out.table(&ratios, "the report has no ratios")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts() {
        let [hop, _, rate] = &BUDGETS;
        assert_eq!(
            [1.3, 1.31, 2.0, 2.01].map(|r| hop.verdict(r)),
            ["as wanted", "within budget", "within budget", "over budget"]
        );
        assert_eq!(
            [0.7, 0.69, 0.4, 0.39].map(|r| rate.verdict(r)),
            ["as wanted", "within budget", "within budget", "over budget"]
        );
        assert_eq!(
            (hop.bound(2.0), rate.bound(0.4)),
            ("≤ 2.0".to_owned(), "≥ 0.4".to_owned())
        );
    }
}
