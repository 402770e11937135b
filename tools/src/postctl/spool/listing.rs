//! Rows that are shown while they are found: a table for people, or the first member of a JSON object.

use std::io::{self, Write};

use serde_json::Value;

use crate::render::{Cell, Table};

pub(crate) struct Listing {
    rows: u64,
    form: Form,
}

enum Form {
    Table(Table),
    /// The array's name.
    Json(&'static str),
}

impl Listing {
    pub(crate) fn begin(json: bool, name: &'static str, heads: &[&'static str]) -> Self {
        let form = if json { Form::Json(name) } else { Form::Table(Table::new(heads)) };
        Self { rows: 0, form }
    }

    pub(crate) fn push(
        &mut self,
        out: &mut impl Write,
        json: impl FnOnce() -> Value,
        cells: impl FnOnce() -> Vec<Cell>,
    ) -> io::Result<()> {
        self.rows += 1;
        match &mut self.form {
            Form::Table(table) => {
                table.push(cells());
                if self.rows.is_multiple_of(PAGE_ROWS) { table.write(out) } else { Ok(()) }
            }
            Form::Json(name) if self.rows == 1 => write!(out, "{{\"{name}\": [\n{}", json()),
            Form::Json(_) => write!(out, ",\n{}", json()),
        }
    }

    /// Returns how many rows there were. A JSON object goes on with [`write_rest`].
    pub(crate) fn end(self, out: &mut impl Write) -> io::Result<u64> {
        match self.form {
            Form::Table(mut table) if !self.rows.is_multiple_of(PAGE_ROWS) => table.write(out)?,
            Form::Table(_) => {}
            Form::Json(name) if self.rows == 0 => write!(out, "{{\"{name}\": []")?,
            Form::Json(_) => write!(out, "\n]")?,
        }
        Ok(self.rows)
    }
}

/// The other members of the object, and its end.
pub(crate) fn write_rest(rest: &Value, out: &mut impl Write) -> io::Result<()> {
    for (name, value) in rest.as_object().into_iter().flatten() {
        write!(out, ",\n\"{name}\": {value}")?;
    }
    writeln!(out, "}}")
}

/// Rows that are held to see how wide a table's columns are.
const PAGE_ROWS: u64 = 1_000;
