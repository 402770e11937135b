//! TOML text → a tree of values that know where they stand, and the merging of several files into one tree.
//!
//! A syntax error leaves the rest of that file unread: what the parser guesses behind it would only give false errors.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as MapEntry;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::{Place, Report, Wrong};

#[derive(Debug, Clone)]
pub(super) enum Value {
    Text(String),
    /// As written, e.g. for a number beyond 64 bits; and its value where it fits.
    Integer(String, Option<u64>),
    Float(String),
    Boolean(bool),
    Datetime(String),
    List(Vec<Node>),
    Table(Table),
}

/// A value and its place.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) place: Place,
    pub(super) value: Value,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Table {
    pub(super) entries: BTreeMap<String, Entry>,
}

/// A key's place and its value.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) key_place: Place,
    pub(super) node: Node,
}

impl Value {
    /// The type, with its article, as error texts name it.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) => "a string",
            Self::Integer(..) => "an integer",
            Self::Float(_) => "a float",
            Self::Boolean(_) => "a boolean",
            Self::Datetime(_) => "a date-time",
            Self::List(list) if is_list_of_tables(list) => "a list of tables",
            Self::List(_) => "a list",
            Self::Table(_) => "a table",
        }
    }

    /// As it would be written, for scalars and for the empty list.
    pub(super) fn literal(&self) -> Option<String> {
        match self {
            Self::Text(text) => Some(format!("{text:?}")),
            Self::Integer(text, _) | Self::Float(text) | Self::Datetime(text) => Some(text.clone()),
            Self::Boolean(boolean) => Some(boolean.to_string()),
            Self::List(list) if list.is_empty() => Some("[]".into()),
            Self::List(_) | Self::Table(_) => None,
        }
    }
}

/// Parses one file; syntax errors go to the report.
pub(super) fn parse(text: &str, file: usize, report: &Report) -> Option<Table> {
    let (root, errors) = DeTable::parse_recoverable(text);
    for error in &errors {
        let place = Place { file, offset: error.span().map_or(text.len(), |span| span.start) };
        // "string values must be quoted, expected literal string" → one sentence of ours around the parser's words.
        report.add(place, "", Wrong::new(format!("not valid TOML: {}", error.message().replace('\n', " "))));
    }
    errors.is_empty().then(|| table(root.get_ref(), file))
}

/// Adds `from` to `into`: tables merge, lists of tables append, anything else may be given once.
pub(super) fn merge(into: &mut Table, from: Table, path: &str, report: &Report) {
    for (key, entry) in from.entries {
        let path = if path.is_empty() { key_text(&key) } else { format!("{path}.{}", key_text(&key)) };
        let mut present = match into.entries.entry(key) {
            MapEntry::Vacant(vacant) => {
                vacant.insert(entry);
                continue;
            }
            MapEntry::Occupied(occupied) => occupied,
        };
        let present = present.get_mut();
        match (&mut present.node.value, entry.node.value) {
            (Value::Table(present), Value::Table(more)) => merge(present, more, &path, report),
            (Value::List(present), Value::List(more)) if is_list_of_tables(present) && is_list_of_tables(&more) => {
                present.extend(more);
            }
            _ => {
                let wrong = Wrong::new(format!("is already given at {}", report.describe(present.key_place)));
                report.add(entry.key_place, path, wrong.instead("leave one of them out"));
            }
        }
    }
}

/// A key as TOML writes it: bare if it can be.
pub(super) fn key_text(key: &str) -> String {
    let bare = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
    if bare { key.into() } else { format!("{key:?}") }
}

fn is_list_of_tables(list: &[Node]) -> bool {
    !list.is_empty() && list.iter().all(|node| matches!(node.value, Value::Table(_)))
}

fn table(table: &DeTable<'_>, file: usize) -> Table {
    let entries = table.iter().map(|(key, value)| {
        let key_place = Place { file, offset: key.span().start };
        (key.get_ref().to_string(), Entry { key_place, node: node(value, file) })
    });
    Table { entries: entries.collect() }
}

/// Recursion is bounded by the parser, which refuses deep nesting.
fn node(spanned: &Spanned<DeValue<'_>>, file: usize) -> Node {
    let value = match spanned.get_ref() {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Integer(integer) => {
            Value::Integer(integer.to_string(), u64::from_str_radix(integer.as_str(), integer.radix()).ok())
        }
        DeValue::Float(float) => Value::Float(float.as_str().into()),
        DeValue::Boolean(boolean) => Value::Boolean(*boolean),
        DeValue::Datetime(datetime) => Value::Datetime(datetime.to_string()),
        DeValue::Array(array) => Value::List(array.iter().map(|element| node(element, file)).collect()),
        DeValue::Table(inner) => Value::Table(table(inner, file)),
    };
    Node { place: Place { file, offset: spanned.span().start }, value }
}
