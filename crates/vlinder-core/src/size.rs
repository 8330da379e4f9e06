//! Sizes in bytes, with decimal (`MB`) and binary (`MiB`) units.

/// Largest size in bytes: what a TOML integer holds.
pub const SIZE_MAX: u64 = i64::MAX as u64;

const UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("B", 1),
];

/// `10GiB`, `64 MB`, `1024`: a whole number and an optional unit, in any case.
pub fn parse(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let unit = unit.trim();
    let factor = match unit {
        "" => 1,
        _ => {
            UNITS
                .iter()
                .find(|(name, _)| name.eq_ignore_ascii_case(unit))?
                .1
        }
    };
    number
        .checked_mul(factor)
        .filter(|bytes| *bytes <= SIZE_MAX)
}

/// The shortest exact form with a binary unit.
pub fn format(bytes: u64) -> String {
    let binary = UNITS
        .iter()
        .take(4)
        .find(|(_, factor)| bytes >= *factor && bytes.is_multiple_of(*factor));
    match binary {
        Some((name, factor)) => format!("{}{name}", bytes / factor),
        None => format!("{bytes}B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("10GiB", Some(10 << 30)),
            ("64 mib", Some(64 << 20)),
            ("1KB", Some(1000)),
            ("7", Some(7)),
            ("7B", Some(7)),
            ("", None),
            ("GiB", None),
            ("-1", None),
            ("1.5GiB", None),
            ("10G", None),
            ("10 GiB x", None),
            ("99999999999TiB", None),
        ] {
            assert_eq!(parse(text), bytes, "{text:?}");
        }
        for bytes in [0, 1, 1023, 1024, 1 << 30, (10 << 30) + 1, SIZE_MAX] {
            assert_eq!(parse(&format(bytes)), Some(bytes));
        }
    }
}
