//! Reading a table by asking for its keys.
//!
//! A [`Section`] remembers every key that was asked for, whether it was there or not; [`Section::finish`] reports the
//! keys that nobody asked for, with the nearest known one. So the code that reads a key is the only list of keys.
//! A value of the wrong kind is reported and then treated as absent, so that reading goes on to the next error.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::document::{Entry, Node, Table, Value, key_text};
use super::error::{Place, Placed, Report, Wrong};
use super::value;

pub(super) struct Section<'a> {
    /// Dotted; empty for the top of the file.
    path: String,
    pub(super) place: Place,
    table: &'a Table,
    pub(super) report: &'a Report,
    asked: RefCell<BTreeSet<&'static str>>,
    /// Of those asked for, the ones that are refused whatever they hold.
    refused: RefCell<BTreeSet<&'static str>>,
}

/// The keys that stand above the first `[section]`; below one they belong to that section, a frequent mistake.
const KEYS_AT_THE_TOP: [&str; 7] =
    ["hostname", "shards", "pin", "include", "shutdown_grace", "feedback_reference", "shipped_providers"];

impl<'a> Section<'a> {
    pub(super) fn new(path: impl Into<String>, place: Place, table: &'a Table, report: &'a Report) -> Self {
        Self { path: path.into(), place, table, report, asked: RefCell::default(), refused: RefCell::default() }
    }

    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// The dotted path of a key of this section.
    pub(super) fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() { key_text(key) } else { format!("{}.{}", self.path, key_text(key)) }
    }

    pub(super) fn wrong(&self, place: Place, key: &str, wrong: Wrong) {
        self.report.add(place, self.path_of(key), wrong);
    }

    /// Where a key is, to complain about it in relation to others; does not count as asking for it.
    pub(super) fn place_of(&self, key: &str) -> Option<Place> {
        self.table.entries.get(key).map(|entry| entry.key_place)
    }

    /// `example` is a whole TOML value.
    pub(super) fn missing(&self, key: &str, example: &str) {
        self.wrong(self.place, key, Wrong::new("is missing").instead(format!("write {key} = {example}")));
    }

    fn entry(&self, key: &'static str) -> Option<&'a Entry> {
        self.asked.borrow_mut().insert(key);
        self.table.entries.get(key)
    }

    /// `Value::literal` of a key that may be of several kinds is of no use; this is the node itself.
    pub(super) fn node(&self, key: &'static str) -> Option<&'a Node> {
        self.entry(key).map(|entry| &entry.node)
    }

    pub(super) fn wrong_kind(&self, key: &str, node: &Node, wanted: &str, example: &str) {
        let wrong = Wrong::new(format!("is {}, not {wanted}", node.value.kind()));
        self.wrong(node.place, key, wrong.instead(format!("write {key} = {example}")));
    }

    /// A string that `parse` understands.
    pub(super) fn text<T>(
        &self,
        key: &'static str,
        example: &str,
        parse: impl FnOnce(&str) -> Result<T, Wrong>,
    ) -> Option<Placed<T>> {
        let node = self.node(key)?;
        let Value::Text(text) = &node.value else {
            self.wrong_kind(key, node, "a string", example);
            return None;
        };
        match parse(text) {
            Ok(value) => Some(Placed { value, place: node.place }),
            Err(wrong) => {
                self.wrong(node.place, key, wrong);
                None
            }
        }
    }

    /// A string with a unit, within `range`; a bare number gets an answer of its own.
    fn quantity<T: PartialOrd + Copy>(
        &self,
        key: &'static str,
        example: &str,
        range: RangeInclusive<T>,
        parse: impl FnOnce(&str, &str) -> Result<T, Wrong>,
        show: impl Fn(T) -> String,
    ) -> Option<Placed<T>> {
        let node = self.node(key)?;
        if let Value::Integer(number, _) | Value::Float(number) = &node.value {
            let wrong = Wrong::new(format!("{number} has no unit"));
            self.wrong(node.place, key, wrong.instead(format!("write for example {key} = \"{example}\"")));
            return None;
        }
        let found = self.text(key, &format!("\"{example}\""), |text| parse(text, example))?;
        let bound = if found.value < *range.start() {
            format!("is less than {}", show(*range.start()))
        } else if found.value > *range.end() {
            format!("is more than {}", show(*range.end()))
        } else {
            return Some(found);
        };
        let wrong = Wrong::new(format!("{} {bound}", show(found.value)));
        self.wrong(found.place, key, wrong.instead(format!("write for example {key} = \"{example}\"")));
        None
    }

    pub(super) fn duration(
        &self,
        key: &'static str,
        example: &str,
        range: RangeInclusive<Duration>,
    ) -> Option<Placed<Duration>> {
        self.quantity(key, example, range, value::duration, value::duration_text)
    }

    /// In bytes.
    pub(super) fn size(&self, key: &'static str, example: &str, range: RangeInclusive<u64>) -> Option<Placed<u64>> {
        self.quantity(key, example, range, value::size, value::size_text)
    }

    pub(super) fn boolean(&self, key: &'static str) -> Option<bool> {
        let node = self.node(key)?;
        match (&node.value, node.value.literal().as_deref()) {
            (Value::Boolean(boolean), _) => return Some(*boolean),
            (Value::Text(_), Some("\"true\"" | "\"yes\"" | "\"on\"")) => {
                self.wrong_kind(key, node, "a boolean", "true")
            }
            (Value::Text(_), Some("\"false\"" | "\"no\"" | "\"off\"")) => {
                self.wrong_kind(key, node, "a boolean", "false");
            }
            _ => {
                let wrong = Wrong::new(format!("is {}, not a boolean", node.value.kind()));
                self.wrong(node.place, key, wrong.instead(format!("write {key} = true or {key} = false")));
            }
        }
        None
    }

    pub(super) fn integer(&self, key: &'static str, example: u64, range: RangeInclusive<u64>) -> Option<Placed<u64>> {
        let node = self.node(key)?;
        let Value::Integer(written, number) = &node.value else {
            self.wrong_kind(key, node, "an integer", &example.to_string());
            return None;
        };
        match number {
            Some(number) if range.contains(number) => Some(Placed { value: *number, place: node.place }),
            _ => {
                let wrong = Wrong::new(format!("{written} is not between {} and {}", range.start(), range.end()));
                self.wrong(node.place, key, wrong.instead(format!("write for example {key} = {example}")));
                None
            }
        }
    }

    /// One of a few words. `later`: words that are planned and this version has not.
    pub(super) fn choice<T: Copy>(&self, key: &'static str, choices: &[(&str, T)], later: &[&str]) -> Option<T> {
        let words = value::any_of(choices.iter().map(|(word, _)| *word));
        let found = self.text(key, &words, |text| {
            if later.contains(&text) {
                return Err(Wrong::not_yet(&format!("{text:?}")).instead(format!("write {words}")));
            }
            choices.iter().find(|(word, _)| *word == text).map(|(_, value)| *value).ok_or_else(|| {
                let meant = value::did_you_mean(text, choices.iter().map(|(word, _)| *word));
                let instead = meant.map_or_else(|| words.clone(), |word| format!("\"{word}\""));
                Wrong::new(format!("{text:?} is not known here")).instead(format!("write {instead}"))
            })
        });
        Some(found?.value)
    }

    /// A list of strings that `parse` understands; those it does not are reported and left out.
    pub(super) fn list<T>(
        &self,
        key: &'static str,
        example: &str,
        parse: impl Fn(&str) -> Result<T, Wrong>,
    ) -> Option<Placed<Vec<Placed<T>>>> {
        let node = self.node(key)?;
        let list = match &node.value {
            Value::List(list) => list,
            Value::Text(text) => {
                self.wrong_kind(key, node, "a list", &format!("[{text:?}]"));
                return None;
            }
            _ => {
                self.wrong_kind(key, node, "a list", example);
                return None;
            }
        };
        let elements = list.iter().filter_map(|element| {
            let Value::Text(text) = &element.value else {
                let wrong = Wrong::new(format!("an element is {}, not a string", element.value.kind()));
                self.wrong(element.place, key, wrong.instead(format!("write for example {key} = {example}")));
                return None;
            };
            match parse(text) {
                Ok(value) => Some(Placed { value, place: element.place }),
                Err(wrong) => {
                    self.wrong(element.place, key, wrong);
                    None
                }
            }
        });
        Some(Placed { value: elements.collect(), place: node.place })
    }

    /// A table; `example` is a whole TOML value or a header.
    pub(super) fn table(&self, key: &'static str, example: &str) -> Option<Self> {
        let node = self.node(key)?;
        let Value::Table(table) = &node.value else {
            let wrong = Wrong::new(format!("is {}, not a table", node.value.kind()));
            self.wrong(node.place, key, wrong.instead(format!("write {example}")));
            return None;
        };
        Some(Self::new(self.path_of(key), node.place, table, self.report))
    }

    /// The tables of `[[key]]`, or of an inline list of tables, which `example` then shows.
    pub(super) fn tables(&self, key: &'static str, example: &str) -> Vec<Self> {
        let Some(node) = self.node(key) else { return Vec::new() };
        let Value::List(list) = &node.value else {
            let wrong = Wrong::new(format!("is {}, not a list of tables", node.value.kind()));
            self.wrong(node.place, key, wrong.instead(format!("write {example}")));
            return Vec::new();
        };
        let sections = list.iter().filter_map(|element| {
            let Value::Table(table) = &element.value else {
                let wrong = Wrong::new(format!("an element is {}, not a table", element.value.kind()));
                self.wrong(element.place, key, wrong.instead(format!("write {example}")));
                return None;
            };
            Some(Self::new(self.path_of(key), element.place, table, self.report))
        });
        sections.collect()
    }

    /// The keys not asked for so far.
    pub(super) fn others(&self) -> Vec<(&'a str, &'a Entry)> {
        let asked = self.asked.borrow();
        let others = self.table.entries.iter().filter(|(key, _)| !asked.contains(key.as_str()));
        others.map(|(key, entry)| (key.as_str(), entry)).collect()
    }

    /// Refuses keys that are planned and this version does not do. A value that states what is done anyway passes:
    /// `as_done` is that value as TOML.
    pub(super) fn not_yet(&self, keys: &[(&'static str, Option<&str>)]) {
        for (key, as_done) in keys {
            self.refused.borrow_mut().insert(key);
            let Some(entry) = self.entry(key) else { continue };
            if as_done.is_some() && entry.node.value.literal().as_deref() == *as_done {
                continue;
            }
            let instead = match as_done {
                Some(as_done) => format!("write {key} = {as_done} or leave it out"),
                None => "leave it out".into(),
            };
            self.wrong(entry.key_place, key, Wrong::new("is not available yet").instead(instead));
        }
    }

    /// Refuses keys that belong to another kind of this section.
    pub(super) fn inapplicable(&self, keys: &[&'static str], why: &str) {
        for key in keys {
            self.refused.borrow_mut().insert(key);
            let Some(entry) = self.entry(key) else { continue };
            self.wrong(entry.key_place, key, Wrong::new(format!("has no meaning {why}")).instead("leave it out"));
        }
    }

    /// Where a name with dots was not quoted, it has become tables in tables: what should have been written.
    fn name_in_pieces(&self, key: &str, node: &Node) -> Option<String> {
        let (kind, first) = self.path.split_once('.')?;
        if !matches!(kind, "shaping" | "provider" | "warmup") || first == "default" || first.contains('.') {
            return None;
        }
        let mut name = format!("{first}.{key}");
        let Value::Table(table) = &node.value else { return None };
        let mut table = table;
        while let Some((piece, Entry { node: Node { value: Value::Table(inner), .. }, .. })) =
            table.entries.iter().next()
            && table.entries.len() == 1
            && !matches!(&**piece, "sources" | "automation" | "retry" | "timeouts")
        {
            name = format!("{name}.{piece}");
            table = inner;
        }
        Some(format!("[{kind}.\"{name}\"]"))
    }

    /// Reports the keys that nobody asked for.
    pub(super) fn finish(self) {
        for (key, entry) in self.others() {
            let asked = self.asked.borrow();
            let instead = if let Some(meant) = value::did_you_mean(key, asked.iter().copied()) {
                format!("did you mean {meant}?")
            } else if KEYS_AT_THE_TOP.contains(&key) {
                "write it at the top of the file, above the first [section]".into()
            } else if let Some(name) = self.name_in_pieces(key, &entry.node) {
                format!("a name with dots is quoted: write {name}")
            } else {
                let usable: Vec<&str> = asked.difference(&self.refused.borrow()).copied().collect();
                format!("the keys here are {}", usable.join(", "))
            };
            self.wrong(entry.key_place, key, Wrong::new("is not a known key").instead(instead));
        }
    }
}
