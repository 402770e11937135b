//! Configuration errors: where, which key, what is wrong, what to write instead.
//!
//! A [`Report`] collects all of them, so that one run of `postrider check` shows everything. It also holds the texts
//! that were read, because a place in a text becomes a line and a column only here.

use std::cell::RefCell;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::limits;

/// One error, displayed as `FILE:LINE:COLUMN: KEY: what is wrong; what to write instead`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    pub file: String,
    /// Line and column, both from 1; a column counts characters, not bytes.
    pub position: Option<(usize, usize)>,
    /// Empty where the error is not about a key.
    pub key: String,
    pub wrong: String,
    pub instead: Option<String>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file)?;
        if let Some((line, column)) = self.position {
            write!(f, "{line}:{column}:")?;
        }
        if !self.key.is_empty() {
            write!(f, " {}:", OnOneLine(&self.key))?;
        }
        write!(f, " {}", OnOneLine(&self.wrong))?;
        if let Some(instead) = &self.instead {
            write!(f, "; {}", OnOneLine(instead))?;
        }
        Ok(())
    }
}

/// A text with what a configuration may have in it, such as a path with a line break.
struct OnOneLine<'a>(&'a str);

impl fmt::Display for OnOneLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .chars()
            .try_for_each(|c| if c.is_control() { write!(f, "{}", c.escape_default()) } else { write!(f, "{c}") })
    }
}

/// All errors of a configuration, in the order of files and lines; never empty. Displays one a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors {
    errors: Vec<ConfigError>,
    /// Errors beyond [`limits::CONFIG_ERRORS_MAX`], counted only.
    omitted: usize,
}

impl ConfigErrors {
    pub fn iter(&self) -> impl Iterator<Item = &ConfigError> {
        self.errors.iter()
    }

    /// How many there are, those not kept included.
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        self.errors.len() + self.omitted
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.errors.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{error}")?;
        }
        if self.omitted > 0 {
            write!(f, "\nand {} more errors", self.omitted)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// A byte offset in one of the report's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) file: usize,
    pub(super) offset: usize,
}

/// A value and where it stands.
#[derive(Debug, Clone)]
pub(super) struct Placed<T> {
    pub(super) value: T,
    pub(super) place: Place,
}

/// What is wrong with a value, before it is known where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wrong {
    pub(super) what: String,
    pub(super) instead: Option<String>,
}

impl Wrong {
    pub(super) fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), instead: None }
    }

    /// `instead` is a whole phrase: `write "x"`, `leave it out`.
    pub(super) fn instead(self, instead: impl Into<String>) -> Self {
        Self { instead: Some(instead.into()), ..self }
    }

    /// For what INTERFACE promises and this version does not do.
    pub(super) fn not_yet(what: &str) -> Self {
        Self::new(format!("{what} is not available yet")).instead("leave it out")
    }
}

struct SourceFile {
    name: String,
    text: String,
    base_dir: PathBuf,
}

/// The files read so far and the errors found in them.
#[derive(Default)]
pub(super) struct Report {
    files: Vec<SourceFile>,
    errors: RefCell<Vec<(usize, ConfigError)>>,
    /// What is allowed but seldom meant, and can only be told while files are read.
    pub(super) warnings: Vec<String>,
}

impl Report {
    /// Remembers a file's text; relative paths in it are relative to `base_dir`. Returns what [`Place::file`] takes.
    pub(super) fn add_file(&mut self, name: &str, text: &str, base_dir: &Path) -> usize {
        self.files.push(SourceFile { name: name.into(), text: text.into(), base_dir: base_dir.into() });
        self.files.len() - 1
    }

    pub(super) fn base_dir(&self, place: Place) -> &Path {
        &self.files[place.file].base_dir
    }

    pub(super) fn add(&self, place: Place, key: impl Into<String>, wrong: Wrong) {
        let file = &self.files[place.file];
        self.errors.borrow_mut().push((
            place.file,
            ConfigError {
                file: file.name.clone(),
                position: Some(position(&file.text, place.offset)),
                key: key.into(),
                wrong: wrong.what,
                instead: wrong.instead,
            },
        ));
    }

    /// An error about a file as a whole, e.g. one that cannot be read; comes after those in files that can.
    pub(super) fn add_whole_file(&self, name: &str, wrong: Wrong) {
        let error = ConfigError {
            file: name.into(),
            position: None,
            key: String::new(),
            wrong: wrong.what,
            instead: wrong.instead,
        };
        self.errors.borrow_mut().push((usize::MAX, error));
    }

    /// `FILE:LINE:COLUMN`, for errors that name a second place.
    pub(super) fn describe(&self, place: Place) -> String {
        let file = &self.files[place.file];
        let (line, column) = position(&file.text, place.offset);
        format!("{}:{line}:{column}", file.name)
    }

    pub(super) fn warn(&mut self, warning: String) {
        self.warnings.push(warning);
    }

    pub(super) fn has_errors(&self) -> bool {
        !self.errors.borrow().is_empty()
    }

    /// Ok if nothing was wrong.
    pub(super) fn into_result(self) -> Result<(), ConfigErrors> {
        let mut found = self.errors.into_inner();
        if found.is_empty() {
            return Ok(());
        }
        found.sort_by_key(|(file, error)| (*file, error.position));
        found.dedup();
        let omitted = found.len().saturating_sub(limits::CONFIG_ERRORS_MAX);
        found.truncate(limits::CONFIG_ERRORS_MAX);
        Err(ConfigErrors { errors: found.into_iter().map(|(_, error)| error).collect(), omitted })
    }
}

/// Line and column of a byte offset, both from 1. An offset inside a character counts as its beginning.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let mut offset = offset.min(text.len());
    while !text.is_char_boundary(offset) {
        offset -= 1;
    }
    let before = &text[..offset];
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let line = before.bytes().filter(|byte| *byte == b'\n').count() + 1;
    (line, before[line_start..].chars().count() + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_count_characters() {
        let text = "ä = 1\nöö€ = 2\r\nx";
        assert_eq!(position(text, 0), (1, 1));
        assert_eq!(position(text, 1), (1, 1), "inside the first character");
        assert_eq!(position(text, text.find("= 1").unwrap()), (1, 3));
        assert_eq!(position(text, text.find("= 2").unwrap()), (2, 5));
        assert_eq!(position(text, text.find('x').unwrap()), (3, 1));
        assert_eq!(position(text, 999), (3, 2));
    }

    #[test]
    fn errors_come_in_order_once_and_bounded() {
        let mut report = Report::default();
        let file = report.add_file("a.toml", &"x\n".repeat(500), Path::new("."));
        for line in (0..300).rev() {
            report.add(Place { file, offset: line * 2 }, "k", Wrong::new("is bad"));
            report.add(Place { file, offset: line * 2 }, "k", Wrong::new("is bad"));
        }
        let errors = report.into_result().unwrap_err();
        assert_eq!(errors.len(), 300);
        let text = errors.to_string();
        assert_eq!(text.lines().count(), limits::CONFIG_ERRORS_MAX + 1);
        assert!(text.starts_with("a.toml:1:1: k: is bad\na.toml:2:1: k: is bad\n"));
        assert!(text.ends_with("\nand 200 more errors"));
    }
}
