//! A session as a graph: one row a turn, in the order of time, one lane a branch.
//!
//! Pure: from turns and branches to what is drawn in each row.

use maud::{Markup, html};
use std::collections::HashMap;
use vlinder_proto::state::{Branch, Turn};

/// Width of a lane and height of a row, in pixels.
const LANE: usize = 18;
const ROW: usize = 36;
/// Colours that the style has for lanes; they repeat.
const COLOURS: usize = 6;

/// A turn in its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub turn: Turn,
    pub lane: usize,
    /// Lanes that pass or begin or end here.
    lines: Vec<Line>,
    /// The lane from which this one branches off here.
    from: Option<usize>,
}

/// A lane's part in one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Line {
    lane: usize,
    above: bool,
    below: bool,
}

/// All rows of a session.
#[derive(Debug, Default)]
pub struct Graph {
    pub rows: Vec<Row>,
    lanes: usize,
}

impl Graph {
    /// `lines` are the turns of each branch back to the session's start, oldest first; a turn that several
    /// branches share stands in each. `branches` gives the order of the lanes.
    pub fn new(branches: &[Branch], lines: Vec<Vec<Turn>>) -> Self {
        let lane_of: HashMap<&str, usize> = branches
            .iter()
            .enumerate()
            .map(|(lane, branch)| (branch.name.as_str(), lane))
            .collect();
        let mut before: HashMap<String, String> = HashMap::new();
        let mut turns: HashMap<String, Turn> = HashMap::new();
        for line in lines {
            for pair in line.windows(2) {
                let (earlier, later) = (&pair[0].submission, &pair[1].submission);
                before.insert(later.clone(), earlier.clone());
            }
            for turn in line {
                turns.entry(turn.submission.clone()).or_insert(turn);
            }
        }
        let mut turns: Vec<Turn> = turns.into_values().collect();
        turns.sort_by(|a, b| (a.started_at, &a.submission).cmp(&(b.started_at, &b.submission)));
        let row_of: HashMap<String, usize> = turns
            .iter()
            .enumerate()
            .map(|(row, turn)| (turn.submission.clone(), row))
            .collect();
        let lane = |turn: &Turn| lane_of.get(turn.branch.as_str()).copied().unwrap_or(0);
        let lanes_of: Vec<usize> = turns.iter().map(lane).collect();
        let mut reach: HashMap<usize, (usize, usize)> = HashMap::new();
        let mut from: Vec<Option<usize>> = vec![None; turns.len()];
        for (row, turn) in turns.iter().enumerate() {
            let own = lanes_of[row];
            extend(&mut reach, own, row);
            let parent = before.get(&turn.submission).and_then(|id| row_of.get(id));
            if let Some(&parent) = parent.filter(|parent| **parent < row)
                && lanes_of[parent] != own
            {
                // The line that it leaves goes on to here.
                extend(&mut reach, lanes_of[parent], row);
                from[row] = Some(lanes_of[parent]);
            }
        }
        let rows = turns.into_iter().enumerate().map(|(row, turn)| {
            let mut lines: Vec<Line> = reach
                .iter()
                .filter(|(_, (first, last))| (*first..=*last).contains(&row))
                .map(|(&lane, &(first, last))| Line {
                    lane,
                    above: first < row && (last > row || from[row] != Some(lane)),
                    below: last > row,
                })
                .collect();
            lines.sort_by_key(|line| line.lane);
            Row {
                turn,
                lane: lanes_of[row],
                lines,
                from: from[row],
            }
        });
        Self {
            rows: rows.collect(),
            lanes: branches.len().max(1),
        }
    }

    /// The drawing of one row.
    pub fn draw(&self, row: &Row) -> Markup {
        let width = self.lanes.min(24) * LANE;
        let x = |lane: usize| lane.min(23) * LANE + LANE / 2;
        let middle = ROW / 2;
        html! {
            svg.lanes width=(width) height=(ROW) viewBox={ "0 0 " (width) " " (ROW) } aria-hidden="true" {
                @for line in &row.lines {
                    @let top = if line.above { 0 } else { middle };
                    @let bottom = if line.below { ROW } else { middle };
                    @if top < bottom {
                        line class={ "lane lane-" (line.lane % COLOURS) } x1=(x(line.lane)) y1=(top) x2=(x(line.lane)) y2=(bottom) {}
                    }
                }
                @if let Some(from) = row.from {
                    path class={ "lane lane-" (row.lane % COLOURS) }
                        d={ "M " (x(from)) " 0 C " (x(from)) " " (middle) ", " (x(row.lane)) " 0, " (x(row.lane)) " " (middle) } {}
                }
                circle class={ "dot lane-" (row.lane % COLOURS) } cx=(x(row.lane)) cy=(middle) r="5" {}
            }
        }
    }
}

fn extend(reach: &mut HashMap<usize, (usize, usize)>, lane: usize, row: usize) {
    let (first, last) = reach.entry(lane).or_insert((row, row));
    *first = (*first).min(row);
    *last = (*last).max(row);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(submission: &str, branch: &str, at: u64) -> Turn {
        Turn {
            submission: submission.into(),
            branch: branch.into(),
            started_at: at,
            ..Turn::default()
        }
    }

    fn branch(name: &str) -> Branch {
        Branch {
            name: name.into(),
            ..Branch::default()
        }
    }

    #[test]
    fn a_fork_leaves_the_line_that_it_comes_from() {
        let main = vec![
            turn("a", "main", 1),
            turn("b", "main", 2),
            turn("d", "main", 4),
        ];
        let fork = vec![
            turn("a", "main", 1),
            turn("c", "alt", 3),
            turn("e", "alt", 5),
        ];
        let graph = Graph::new(&[branch("main"), branch("alt")], vec![main, fork]);
        let order: Vec<_> = graph
            .rows
            .iter()
            .map(|row| row.turn.submission.as_str())
            .collect();
        assert_eq!(order, ["a", "b", "c", "d", "e"]);
        let lanes: Vec<_> = graph.rows.iter().map(|row| (row.lane, row.from)).collect();
        assert_eq!(
            lanes,
            [(0, None), (0, None), (1, Some(0)), (0, None), (1, None)]
        );
        let line = |lane, above, below| Line { lane, above, below };
        assert_eq!(graph.rows[0].lines, [line(0, false, true)]);
        assert_eq!(
            graph.rows[2].lines,
            [line(0, true, true), line(1, false, true)]
        );
        assert_eq!(
            graph.rows[3].lines,
            [line(0, true, false), line(1, true, true)]
        );
        assert_eq!(graph.rows[4].lines, [line(1, true, false)]);
        let drawn = graph.draw(&graph.rows[2]).into_string();
        assert!(drawn.contains("<path") && drawn.contains("<circle"));
    }

    #[test]
    fn a_line_that_ended_reaches_the_fork_that_leaves_it() {
        let main = vec![turn("a", "main", 1)];
        let fork = vec![turn("a", "main", 1), turn("c", "alt", 3)];
        let other = vec![turn("x", "other", 2)];
        let branches = [branch("main"), branch("alt"), branch("other")];
        let graph = Graph::new(&branches, vec![main, fork, other]);
        let between = &graph.rows[1];
        assert_eq!(between.turn.submission, "x");
        assert!(
            between
                .lines
                .iter()
                .any(|line| line.lane == 0 && line.above && line.below)
        );
    }

    #[test]
    fn nothing_is_a_graph_too() {
        assert!(Graph::new(&[], Vec::new()).rows.is_empty());
    }
}
