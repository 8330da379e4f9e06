//! Columns for people: aligned, nothing in a cell can act on the terminal, and on a terminal at most
//! [`WIDTH`] wide. What goes into a pipe or a file is not cut: somebody will search it.

use crate::text;

/// Widest table, in characters. Columns of names and ids are never cut, so one may be wider.
pub const WIDTH: usize = 100;
/// Blanks between two columns.
const GAP: usize = 2;
/// A column is not made narrower than this.
const NARROWEST: usize = 8;

/// How a column takes too much text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Column {
    /// What is copied out of the table: never cut.
    Whole,
    /// Prose: cut where the table would be too wide for a terminal.
    Cut,
    /// A figure: never cut, on the right.
    Number,
    /// A word of [`colour_of`]: never cut.
    State,
}

/// A table that is filled row by row.
pub struct Table {
    columns: Vec<(&'static str, Column)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns and no rows.
    pub fn new(columns: &[(&'static str, Column)]) -> Self {
        Self {
            columns: columns.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row; it has a cell for every column.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        assert_eq!(N, self.columns.len(), "a row has a cell for every column");
        let cells = cells.map(|cell| match cell.is_empty() {
            true => "-".to_owned(),
            false => text::safe_line(&cell),
        });
        self.rows.push(cells.into());
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The table as text, with a line of headings. `terminal`: it is to fit there.
    pub fn render(&self, terminal: bool, colours: bool) -> String {
        let widths = self.widths(if terminal { WIDTH } else { usize::MAX });
        let mut out = String::new();
        let headings: Vec<String> = self
            .columns
            .iter()
            .map(|(name, _)| name.to_uppercase())
            .collect();
        self.line(&mut out, &headings, &widths, false);
        for row in &self.rows {
            self.line(&mut out, row, &widths, colours);
        }
        out
    }

    fn widths(&self, most: usize) -> Vec<usize> {
        let wanted = |index: usize| {
            let cells = self.rows.iter().map(|row| row[index].chars().count());
            cells
                .max()
                .unwrap_or(0)
                .max(self.columns[index].0.chars().count())
        };
        let mut widths: Vec<usize> = (0..self.columns.len()).map(wanted).collect();
        let gaps = GAP * self.columns.len().saturating_sub(1);
        loop {
            let total = widths.iter().sum::<usize>() + gaps;
            if total <= most {
                return widths;
            }
            let cuttable = (0..widths.len())
                .filter(|&index| self.columns[index].1 == Column::Cut && widths[index] > NARROWEST);
            let Some(widest) = cuttable.max_by_key(|&index| widths[index]) else {
                return widths;
            };
            widths[widest] -= 1;
        }
    }

    fn line(&self, out: &mut String, cells: &[String], widths: &[usize], colours: bool) {
        let mut line = String::new();
        for (index, cell) in cells.iter().enumerate() {
            let (width, kind) = (widths[index], self.columns[index].1);
            let cell = match kind {
                Column::Cut if cell.chars().count() > width => text::brief(cell, width),
                _ => cell.clone(),
            };
            let blanks = " ".repeat(width.saturating_sub(cell.chars().count()));
            let cell = match colour_of(&cell).filter(|_| colours && kind == Column::State) {
                Some(colour) => format!("\u{1b}[{colour}m{cell}\u{1b}[0m"),
                None => cell,
            };
            match kind {
                Column::Number => line.push_str(&format!("{blanks}{cell}")),
                _ => line.push_str(&format!("{cell}{blanks}")),
            }
            if index + 1 < cells.len() {
                line.push_str(&" ".repeat(GAP));
            }
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
}

/// The colour of a state (an SGR code): green is well, yellow is on its way, red needs a look.
fn colour_of(state: &str) -> Option<u8> {
    match state {
        "ready" | "done" | "ok" | "idle" => Some(32),
        "starting" | "waiting" | "running" | "draining" | "backoff" => Some(33),
        "failed" | "crash-looping" | "stopped" | "not-ready" | "lost" | "deadline"
        | "cancelled" | "error" => Some(31),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&[
            ("name", Column::Whole),
            ("n", Column::Number),
            ("state", Column::State),
        ]);
        table.row(["a".into(), "1".into(), "ready".into()]);
        table.row(["longer".into(), "1000".into(), String::new()]);
        let text = "NAME       N  STATE\na          1  ready\nlonger  1000  -\n";
        assert_eq!(table.render(true, false), text);
        let coloured = table.render(true, true);
        assert!(
            coloured.contains("\u{1b}[32mready\u{1b}[0m"),
            "{coloured:?}"
        );
    }

    #[test]
    fn it_fits_and_keeps_ids() {
        let mut table = Table::new(&[
            ("id", Column::Whole),
            ("said", Column::Cut),
            ("why", Column::Cut),
        ]);
        let id = "t-".to_owned() + &"0".repeat(32);
        table.row([id.clone(), "x".repeat(500), "why not".into()]);
        let text = table.render(true, false);
        assert!(
            text.lines().all(|line| line.chars().count() <= WIDTH),
            "{text}"
        );
        assert!(
            text.contains(&id) && text.contains("xx…  why not"),
            "{text}"
        );
        // Into a pipe it goes whole.
        let text = table.render(false, false);
        assert!(
            text.contains(&"x".repeat(500)) && !text.contains('…'),
            "{text}"
        );
    }

    #[test]
    fn a_cell_cannot_act_on_the_terminal() {
        let mut table = Table::new(&[("line", Column::Whole)]);
        table.row(["\u{1b}[2Jboo\nNEXT\u{9b}".into()]);
        let text = table.render(true, false);
        assert_eq!(text, "LINE\n\\u{1b}[2Jboo\\nNEXT\\u{9b}\n");
    }
}
