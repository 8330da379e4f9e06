//! Where a message counts in the order of its stream: the one rule that decides who came first.
//!
//! A log can lose its tail (a power cut, a restored copy). What was lost is given back at the end, behind
//! what was appended meanwhile, and yet it was first. So a message that was given back carries the place
//! that it had: a path of sequences, compared from the left. A message at sequence `s` that was never
//! lost has the path `[s]`; one that stood at `s` and was lost behind `c`, the last message that was left,
//! has the path `[c, s]`: after everything that was left, before everything that was appended since.
//! What is lost once more keeps its path where that begins with what is still there, and otherwise gets the new
//! `c` before it, so the order among all that was ever appended stays what it was.

use std::fmt;
use std::str::FromStr;

/// Losses on top of each other that a place can tell apart; deeper ones keep the order of the log.
const DEPTH_MAX: usize = 32;

/// The place of a message; a lesser one came first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place(Vec<u64>);

impl Place {
    /// Of a message that was never lost.
    pub fn at(seq: u64) -> Self {
        Self(vec![seq])
    }

    /// The place of the same message when it is given back after a loss of everything behind `common`.
    pub fn lost_behind(&self, common: u64) -> Self {
        let anchored = self.0.len() > 1 && self.0[0] < common;
        if anchored || self.0.len() >= DEPTH_MAX {
            return self.clone();
        }
        let mut path = Vec::with_capacity(self.0.len() + 1);
        path.push(common);
        path.extend_from_slice(&self.0);
        Self(path)
    }

    /// Whether the message was lost and given back.
    pub fn is_healed(&self) -> bool {
        self.0.len() > 1
    }

    /// The sequence that it had at first.
    pub fn first_seq(&self) -> u64 {
        *self.0.last().expect("a place has at least one sequence")
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, seq) in self.0.iter().enumerate() {
            let dot = if index == 0 { "" } else { "." };
            write!(f, "{dot}{seq}")?;
        }
        Ok(())
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path: Result<Vec<u64>, _> = text.split('.').map(str::parse).collect();
        match path {
            Ok(path) if path.len() <= DEPTH_MAX => Ok(Self(path)),
            _ => Err(format!(
                "expected at most {DEPTH_MAX} sequences joined by dots"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_lost_stands_between_what_was_left_and_what_came_since() {
        let (left, new) = (Place::at(6), Place::at(7));
        let (one, two) = (Place::at(7).lost_behind(6), Place::at(8).lost_behind(6));
        assert!(left < one && one < two && two < new);
        assert_eq!(one.to_string(), "6.7");
        assert_eq!("6.7".parse(), Ok(one.clone()));
        assert_eq!((one.is_healed(), one.first_seq()), (true, 7));
        assert!(!new.is_healed());
        for bad in ["", ".", "1.", "a", "-1", &"1.".repeat(40)] {
            assert!(bad.parse::<Place>().is_err(), "{bad}");
        }
    }

    /// A log is cut again and again, healed each time after some others were faster; the order of the
    /// places must stay that in which the messages were made, but for what was made after a loss.
    #[test]
    fn losses_on_top_of_losses_keep_the_order() {
        // (path, when it was made)
        let mut log: Vec<(Place, u32)> = (1..=8).map(|seq| (Place::at(seq), seq as u32)).collect();
        let mut made = 8;
        let mut expected: Vec<u32> = (1..=8).collect();
        for cut in [6usize, 7, 4, 4, 9, 2, 6] {
            let common = cut as u64;
            let lost = log.split_off(cut);
            for _ in 0..2 {
                made += 1;
                log.push((Place::at(log.len() as u64 + 1), made));
                expected.push(made);
            }
            for (place, id) in lost {
                log.push((place.lost_behind(common), id));
            }
            let mut order = log.clone();
            order.sort();
            let order: Vec<u32> = order.into_iter().map(|(_, id)| id).collect();
            assert_eq!(order, expected, "after the cut at {cut}");
        }
    }
}
