//! Vectors in a quarter of their size, and how far from the truth a distance between them can be.
//!
//! A vector is kept as one signed byte a number, times a scale of its own, together with the distance
//! between it and what the bytes say: its error. By the triangle inequality the true distance to a
//! query differs from the one between the codes by at most the two errors. So a search over codes
//! knows which vectors cannot be among the nearest, and only the others need to be read: what it
//! finds is what a search over the vectors themselves finds.
//!
//! The products of codes are summed as whole numbers and are exact; everything else is computed with
//! 64 bits and widened by far more than it can be off.

/// Highest code of a stored number: one signed byte, the same on both sides.
const CODE_MAX: f64 = 127.0;
/// Highest code of a number of the query, which is there once and may be finer.
const QUERY_CODE_MAX: f64 = 2047.0;
/// Products that are summed with 32 bits.
const BLOCK: usize = 4096;
/// By how much computed errors and bounds are widened, as a part of what they are: 64 bits compute
/// with 16 digits, of which a sum over the highest dimension loses at most five.
const SLACK: f64 = 1e-9;
/// The same for the square of a distance, as a part of the squared lengths that it is the difference of.
const SQUARE_SLACK: f64 = 1e-10;

const _: () = assert!(BLOCK as f64 * CODE_MAX * QUERY_CODE_MAX < i32::MAX as f64);

/// What is kept of a stored vector beside its codes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Coded {
    /// What a code of 1 stands for.
    scale: f64,
    /// The squared length of what the codes say.
    squared: f64,
    /// At most so far is the vector from what its codes say.
    error: f64,
}

impl Coded {
    /// Appends the codes of a vector of finite numbers to `codes`.
    pub(super) fn encode(numbers: &[f32], codes: &mut Vec<i8>) -> Self {
        let scale = scale_of(numbers, CODE_MAX);
        let from = codes.len();
        codes.extend(numbers.iter().map(|number| code(*number, scale) as i8));
        let kept = codes[from..].iter().map(|code| f64::from(*code));
        Self::new(scale, numbers, kept)
    }

    fn new(scale: f64, numbers: &[f32], codes: impl Iterator<Item = f64>) -> Self {
        let (mut squared, mut error) = (0.0, 0.0);
        for (number, code) in numbers.iter().zip(codes) {
            let said = code * scale;
            squared += said * said;
            error += (f64::from(*number) - said).powi(2);
        }
        Self {
            scale,
            squared,
            error: error.sqrt() * (1.0 + SLACK),
        }
    }
}

/// What a code of 1 stands for, so that the largest number has the highest code; 0 where all are 0.
fn scale_of(numbers: &[f32], code_max: f64) -> f64 {
    let largest = numbers
        .iter()
        .fold(0.0f64, |max, number| max.max(f64::from(*number).abs()));
    largest / code_max
}

fn code(number: f32, scale: f64) -> f64 {
    if scale == 0.0 {
        return 0.0;
    }
    (f64::from(number) / scale).round()
}

/// A vector whose distance to many others is wanted.
pub(super) struct Query {
    codes: Vec<i16>,
    coded: Coded,
}

/// Between these two lies the true distance.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Bounds {
    pub(super) lower: f64,
    pub(super) upper: f64,
}

impl Query {
    /// Of finite numbers.
    pub(super) fn new(numbers: &[f32]) -> Self {
        let scale = scale_of(numbers, QUERY_CODE_MAX);
        let codes: Vec<i16> = numbers
            .iter()
            .map(|number| code(*number, scale) as i16)
            .collect();
        let coded = Coded::new(scale, numbers, codes.iter().map(|code| f64::from(*code)));
        Self { codes, coded }
    }

    /// How far the stored vector is, as far as its codes tell.
    pub(super) fn bounds(&self, codes: &[i8], stored: &Coded) -> Bounds {
        let product = dot(codes, &self.codes) as f64 * self.coded.scale * stored.scale;
        let lengths = self.coded.squared + stored.squared;
        let squared = lengths - 2.0 * product;
        let slack = lengths * SQUARE_SLACK;
        let error = self.coded.error + stored.error;
        let lower = (squared - slack).max(0.0).sqrt() * (1.0 - SLACK) - error;
        let upper = (squared + slack).max(0.0).sqrt() * (1.0 + SLACK) + error;
        Bounds { lower, upper }
    }
}

/// In blocks that 32 bits can hold, so that the compiler can use the machine's instruction for it.
fn dot(codes: &[i8], query: &[i16]) -> i64 {
    let blocks = codes.chunks(BLOCK).zip(query.chunks(BLOCK));
    let sums = blocks.map(|(codes, query)| {
        let products = codes.iter().zip(query);
        let sum: i32 = products
            .map(|(code, query)| i32::from(*code) * i32::from(*query))
            .sum();
        i64::from(sum)
    });
    sums.sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vec::search::squared_distance;
    use proptest::prelude::*;

    fn numbers() -> impl Strategy<Value = Vec<f32>> {
        let any = any::<f32>().prop_filter("finite", |number| number.is_finite());
        let usual = -1.0f32..1.0;
        let one = prop_oneof![8 => usual, 1 => any, 1 => Just(0.0f32)];
        prop::collection::vec(one, 1..300)
    }

    proptest! {
        #[test]
        fn the_true_distance_lies_within_the_bounds(pair in numbers().prop_flat_map(|a| {
            let len = a.len();
            (Just(a), prop::collection::vec(-2.0f32..2.0, len), 0..3u8)
        })) {
            let (stored, other, kind) = pair;
            // Far away, the same, and close by.
            let query: Vec<f32> = match kind {
                0 => other,
                1 => stored.clone(),
                _ => stored.iter().zip(&other).map(|(a, b)| a * (1.0 + b * 1e-4)).collect(),
            };
            prop_assume!(query.iter().all(|number| number.is_finite()));
            let mut codes = Vec::new();
            let coded = Coded::encode(&stored, &mut codes);
            let bounds = Query::new(&query).bounds(&codes, &coded);
            let distance = squared_distance(&query, &stored).sqrt();
            prop_assert!(bounds.lower <= distance && distance <= bounds.upper, "{bounds:?} {distance}");
        }
    }

    #[test]
    fn the_longest_and_largest_vectors_do_not_overflow() {
        let stored = vec![f32::MAX; crate::vec::DIMENSION_MAX];
        let query = vec![f32::MIN; crate::vec::DIMENSION_MAX];
        let mut codes = Vec::new();
        let coded = Coded::encode(&stored, &mut codes);
        let bounds = Query::new(&query).bounds(&codes, &coded);
        let distance = squared_distance(&query, &stored).sqrt();
        assert!(bounds.lower <= distance && distance <= bounds.upper && bounds.upper.is_finite());
        assert!(bounds.upper - bounds.lower < distance * 1e-6, "{bounds:?}");
    }
}
