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
    /// Lanes that leave others here: from which, to which, and whether to this row's own turn.
    forks: Vec<Fork>,
}

/// A lane's part in one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Line {
    lane: usize,
    above: bool,
    below: bool,
}

/// A lane that leaves another one in the row below the turn that it begins at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fork {
    from: usize,
    to: usize,
    /// It ends at this row's turn, not below it.
    ends_here: bool,
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
        let mut forks: Vec<Vec<Fork>> = vec![Vec::new(); turns.len()];
        for (row, turn) in turns.iter().enumerate() {
            let own = lanes_of[row];
            let parent = before.get(&turn.submission).and_then(|id| row_of.get(id));
            if let Some(&parent) = parent.filter(|parent| **parent < row)
                && lanes_of[parent] != own
            {
                // It leaves right below the turn that it begins at, however much later it goes on.
                forks[parent + 1].push(Fork {
                    from: lanes_of[parent],
                    to: own,
                    ends_here: parent + 1 == row,
                });
                extend(&mut reach, own, parent + 1);
            }
            extend(&mut reach, own, row);
        }
        let leaves = |row: usize, lane: usize| {
            let below = forks.get(row + 1);
            below.is_some_and(|forks| forks.iter().any(|fork| fork.from == lane))
        };
        let rows: Vec<Row> = turns
            .into_iter()
            .enumerate()
            .map(|(row, turn)| {
                let mut lines: Vec<Line> = reach
                    .iter()
                    .filter(|(_, (first, last))| (*first..=*last).contains(&row))
                    .filter(|(lane, _)| {
                        let drawn = |fork: &Fork| fork.to == **lane && !fork.ends_here;
                        !forks[row].iter().any(drawn)
                    })
                    .map(|(&lane, &(first, last))| Line {
                        lane,
                        above: first < row,
                        below: last > row || leaves(row, lane),
                    })
                    .collect();
                lines.sort_by_key(|line| line.lane);
                Row {
                    turn,
                    lane: lanes_of[row],
                    lines,
                    forks: forks[row].clone(),
                }
            })
            .collect();
        Self {
            rows,
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
                @for fork in &row.forks {
                    @let end = if fork.ends_here { middle } else { ROW };
                    path class={ "lane lane-" (fork.to % COLOURS) }
                        d={ "M " (x(fork.from)) " 0 C " (x(fork.from)) " " (end) ", " (x(fork.to)) " 0, " (x(fork.to)) " " (end) } {}
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
        let lanes: Vec<_> = graph.rows.iter().map(|row| row.lane).collect();
        assert_eq!(lanes, [0, 0, 1, 0, 1]);
        let line = |lane, above, below| Line { lane, above, below };
        assert_eq!(graph.rows[0].lines, [line(0, false, true)]);
        // It leaves below "a", passes "b", and has its first turn at "c".
        let fork = Fork {
            from: 0,
            to: 1,
            ends_here: false,
        };
        assert_eq!(graph.rows[1].forks, [fork]);
        assert_eq!(graph.rows[1].lines, [line(0, true, true)]);
        assert_eq!(
            graph.rows[2].lines,
            [line(0, true, true), line(1, true, true)]
        );
        assert_eq!(
            graph.rows[3].lines,
            [line(0, true, false), line(1, true, true)]
        );
        assert_eq!(graph.rows[4].lines, [line(1, true, false)]);
        let drawn = graph.draw(&graph.rows[1]).into_string();
        assert!(drawn.contains("<path") && drawn.contains("<circle"));
    }

    #[test]
    fn a_fork_of_the_last_turn_leaves_it_at_once() {
        let main = vec![turn("a", "main", 1)];
        let fork = vec![turn("a", "main", 1), turn("c", "alt", 3)];
        let graph = Graph::new(&[branch("main"), branch("alt")], vec![main, fork]);
        let (first, second) = (&graph.rows[0], &graph.rows[1]);
        assert!(first.lines[0].below, "its line reaches the fork");
        assert_eq!(
            second.forks,
            [Fork {
                from: 0,
                to: 1,
                ends_here: true
            }]
        );
        assert_eq!(
            second.lines,
            [Line {
                lane: 1,
                above: false,
                below: false
            }]
        );
    }

    #[test]
    fn nothing_is_a_graph_too() {
        assert!(Graph::new(&[], Vec::new()).rows.is_empty());
    }
}
