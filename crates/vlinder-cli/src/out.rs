//! Where a command's words go: stdout carries what was asked for, stderr everything else.

use crate::args::Format;
use crate::error::Error;
use crate::table::Table;
use crate::text;
use serde_json::{Value, json};
use std::cell::Cell;
use std::io::{IsTerminal, Write};

/// The output of one command.
#[derive(Debug)]
pub struct Out {
    /// Whether JSON is wanted.
    pub json: bool,
    /// Whether stdout is a terminal.
    pub terminal: bool,
    colours: bool,
    /// Whether the last value on stdout carries the error that the command is about to end with.
    told: Cell<bool>,
}

impl Out {
    /// The output as asked for. `no_colours`: by flag or by `NO_COLOR`.
    pub fn new(format: Format, no_colours: bool) -> Self {
        let terminal = std::io::stdout().is_terminal();
        Self {
            json: format == Format::Json,
            terminal,
            colours: terminal && !no_colours,
            told: Cell::new(false),
        }
    }

    /// Bytes on stdout as they are, at once.
    pub fn raw(&self, bytes: &[u8]) -> Result<(), Error> {
        let mut stdout = std::io::stdout().lock();
        stdout
            .write_all(bytes)
            .and_then(|()| stdout.flush())
            .map_err(Error::io("cannot write to stdout"))
    }

    /// A line on stdout, of our own making.
    pub fn line(&self, line: &str) -> Result<(), Error> {
        self.raw(format!("{line}\n").as_bytes())
    }

    /// Text that somebody else wrote: bytes as they are, but made safe on a terminal.
    pub fn foreign(&self, bytes: &[u8]) -> Result<(), Error> {
        match self.terminal {
            true => self.raw(text::safe(&String::from_utf8_lossy(bytes)).as_bytes()),
            false => self.raw(bytes),
        }
    }

    /// The one JSON value of a command.
    pub fn value(&self, value: &Value) -> Result<(), Error> {
        self.line(&format!("{value:#}"))
    }

    /// One JSON value of many, on a line of its own.
    pub fn value_line(&self, value: &Value) -> Result<(), Error> {
        self.line(&value.to_string())
    }

    /// The one JSON value of a command that has something to show and fails all the same: the value
    /// carries the error, so that [`Out::error`] prints no second one. `line`: one of many.
    pub fn failed_value(&self, mut value: Value, error: Value, line: bool) -> Result<(), Error> {
        value["error"] = error;
        self.told.set(true);
        match line {
            true => self.value_line(&value),
            false => self.value(&value),
        }
    }

    /// A table, or a sentence where it has no rows (on stderr: stdout stays empty).
    pub fn table(&self, table: &Table, none: &str) -> Result<(), Error> {
        if table.is_empty() {
            self.note(none);
            return Ok(());
        }
        self.raw(table.render(self.terminal, self.colours).as_bytes())
    }

    /// JSON where it is wanted, else the table.
    pub fn list(
        &self,
        json: impl FnOnce() -> Value,
        table: Table,
        none: &str,
    ) -> Result<(), Error> {
        match self.json {
            true => self.value(&json()),
            false => self.table(&table, none),
        }
    }

    /// JSON where it is wanted, else a sentence.
    pub fn done(&self, json: Value, sentence: &str) -> Result<(), Error> {
        match self.json {
            true => self.value(&json),
            false => self.line(&text::safe_line(sentence)),
        }
    }

    /// A remark for people, on stderr.
    pub fn note(&self, remark: &str) {
        // Where stderr is closed there is nobody to tell.
        let _ = writeln!(std::io::stderr(), "{}", text::safe(remark));
    }

    /// The error that ends a command: for people on stderr, and with `-o json` also as a value on
    /// stdout, `{"error": {code, message, exit}}`, unless one that was just printed carries it.
    pub fn error(&self, error: &Error) {
        if matches!(error, Error::OutputClosed) {
            return;
        }
        self.note(&format!("error: {error}"));
        if self.json && !self.told.take() {
            // Where stdout is closed there is nobody to tell.
            let _ = self.value_line(&json!({ "error": error.json() }));
        }
    }
}
