//! Tables for people.
//!
//! Much of what is shown was said by peers and senders, so control characters never reach the terminal.

use std::io::{self, Write};

/// Columns as wide as their widest cell; numbers to the right; no trailing blanks.
pub(crate) struct Table {
    heads: Vec<&'static str>,
    /// Not written yet.
    rows: Vec<Vec<Cell>>,
    /// Of the columns, as far as rows have been written.
    widths: Vec<usize>,
}

pub(crate) enum Cell {
    Text(String),
    Number(String),
}

impl Cell {
    pub(crate) fn text(text: &str) -> Self {
        Self::Text(if text.is_empty() { ABSENT.into() } else { printable(text) })
    }

    pub(crate) fn maybe(text: Option<&str>) -> Self {
        Self::text(text.unwrap_or_default())
    }

    pub(crate) fn number(number: impl ToString) -> Self {
        Self::Number(number.to_string())
    }

    fn content(&self) -> &str {
        match self {
            Self::Text(text) | Self::Number(text) => text,
        }
    }
}

impl Table {
    pub(crate) fn new(heads: &[&'static str]) -> Self {
        Self { heads: heads.to_vec(), rows: Vec::new(), widths: Vec::new() }
    }

    pub(crate) fn push(&mut self, row: Vec<Cell>) {
        assert!(row.len() == self.heads.len(), "a row has a cell for each head");
        self.rows.push(row);
    }

    /// Writes the rows so far, below the heads the first time. A long table is written in parts; its columns only grow.
    pub(crate) fn write(&mut self, out: &mut impl Write) -> io::Result<()> {
        let is_begun = !self.widths.is_empty();
        if !is_begun {
            self.widths = self.heads.iter().map(|head| head.chars().count()).collect();
        }
        for row in &self.rows {
            for (width, cell) in self.widths.iter_mut().zip(row) {
                *width = (*width).max(cell.content().chars().count());
            }
        }
        if !is_begun {
            let is_number = |column: usize| matches!(self.rows.first().map(|row| &row[column]), Some(Cell::Number(_)));
            let heads = self.heads.iter().zip(&self.widths).enumerate();
            write_line(out, heads.map(|(column, (head, &width))| (*head, width, is_number(column))))?;
        }
        for row in self.rows.drain(..) {
            let cells = row.iter().zip(&self.widths);
            write_line(out, cells.map(|(cell, &width)| (cell.content(), width, matches!(cell, Cell::Number(_)))))?;
        }
        Ok(())
    }
}

fn write_line<'a>(out: &mut impl Write, cells: impl Iterator<Item = (&'a str, usize, bool)>) -> io::Result<()> {
    let mut line = String::new();
    for (place, (text, width, to_the_right)) in cells.enumerate() {
        if place > 0 {
            line.push_str("  ");
        }
        line.push_str(&if to_the_right { format!("{text:>width$}") } else { format!("{text:<width$}") });
    }
    writeln!(out, "{}", line.trim_end())
}

/// Name and value, one pair a line, values aligned.
pub(crate) fn write_pairs(out: &mut impl Write, indent: &str, pairs: &[(&str, String)]) -> io::Result<()> {
    let width = pairs.iter().map(|(name, _)| name.chars().count()).max().unwrap_or_default() + 1;
    for (name, value) in pairs {
        writeln!(out, "{indent}{:<width$} {}", format!("{name}:"), printable(value))?;
    }
    Ok(())
}

/// Replaces what could move the cursor, change colours or turn the writing direction.
pub(crate) fn printable(text: &str) -> String {
    let turns = |c| matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.chars().map(|c| if c.is_control() || turns(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// `1.5 GiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1_023.95 && unit + 1 < UNITS.len() {
        value /= 1_024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// `3 d 4 h`, `5 min 6 s`: the two largest units.
pub(crate) fn duration(seconds: u64) -> String {
    let parts = [(seconds / 86_400, "d"), (seconds / 3_600 % 24, "h"), (seconds / 60 % 60, "min"), (seconds % 60, "s")];
    let first = parts.iter().position(|part| part.0 > 0).unwrap_or(parts.len() - 1);
    let shown = parts[first..].iter().take(2).filter(|part| part.0 > 0 || parts[first].0 == 0);
    shown.map(|(number, unit)| format!("{number} {unit}")).collect::<Vec<_>>().join(" ")
}

/// `1 recipient`, `2 recipients`.
pub(crate) fn count(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

const ABSENT: &str = "-";
