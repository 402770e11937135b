//! Reads an event log's files as any other program would: zstd, then JSON lines.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::path::Path;

use serde_json::Value;

/// All events, in the files' order. The engine must have ended, or have been killed and started again.
pub(crate) fn read(directory: &Path) -> Vec<Value> {
    let entries = fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.expect("a directory entry").path()).collect();
    files.retain(|path| path.to_string_lossy().ends_with(".jsonl.zst"));
    files.sort();
    let mut events = Vec::new();
    for path in files {
        let file = fs::File::open(&path).expect("an event file");
        let mut text = String::new();
        let decoder = zstd::stream::read::Decoder::new(file).and_then(|mut decoder| decoder.read_to_string(&mut text));
        decoder.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        events.extend(text.lines().map(|line| serde_json::from_str::<Value>(line).expect("a line is JSON")));
    }
    events
}

pub(crate) fn text<'a>(event: &'a Value, field: &str) -> &'a str {
    event[field].as_str().unwrap_or_else(|| panic!("{field} is text in {event}"))
}

pub(crate) fn is_final(event: &Value) -> bool {
    matches!(text(event, "type"), "Delivery" | "Bounce" | "Expiration" | "AdminBounce")
}

/// How many final records each (id, recipient) has.
pub(crate) fn finals(events: &[Value]) -> HashMap<(String, String), usize> {
    let mut finals = HashMap::new();
    for event in events.iter().filter(|event| is_final(event)) {
        *finals.entry((text(event, "id").to_owned(), text(event, "recipient").to_owned())).or_default() += 1;
    }
    finals
}
