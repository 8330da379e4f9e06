//! Unsigned numbers in SQLite, which has only signed ones.

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ValueRef};

/// A number as SQLite can hold it. Only a hostile node has larger ones.
pub(crate) fn int(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// A column that [`int`] wrote.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unsigned(pub u64);

impl FromSql for Unsigned {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        let signed = value.as_i64()?;
        let unsigned = u64::try_from(signed).map_err(|_| FromSqlError::OutOfRange(signed))?;
        Ok(Self(unsigned))
    }
}

/// The number in a column.
pub(crate) fn number(row: &rusqlite::Row<'_>, at: usize) -> rusqlite::Result<u64> {
    row.get::<_, Unsigned>(at).map(|number| number.0)
}

/// The number in a column, or nothing.
pub(crate) fn optional_number(row: &rusqlite::Row<'_>, at: usize) -> rusqlite::Result<Option<u64>> {
    let found: Option<Unsigned> = row.get(at)?;
    Ok(found.map(|number| number.0))
}
