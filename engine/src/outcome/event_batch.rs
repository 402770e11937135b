//! Events on their way from the shard where they happened to the event log's writer.
//!
//! They are lines already. So the few dozen strings of a record are freed by the thread that made them, which costs a
//! fraction of what it costs another one.

use std::sync::Arc;

use postrider_spool::record::{LogId, Sequence};

use super::event::{EventRecord, LoggedRecord, NodeId, events, write_line};

/// The lines of some records, in the order of their sequences for each log.
#[derive(Debug, Default)]
pub(crate) struct EventBatch {
    lines: Vec<u8>,
    records: Vec<Encoded>,
}

#[derive(Debug)]
struct Encoded {
    log: LogId,
    sequence: Sequence,
    /// Behind its last line.
    lines_end: usize,
    events: u32,
    copies: Vec<Arc<EventRecord>>,
}

/// A record's events. An intent has none, and counts all the same.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EncodedRecord<'a> {
    pub(crate) log: LogId,
    pub(crate) sequence: Sequence,
    pub(crate) lines: &'a [u8],
    pub(crate) events: u32,
    /// What subscribers get; none where nobody had subscribed.
    pub(crate) copies: &'a [Arc<EventRecord>],
}

impl EventBatch {
    /// With room for so many octets of lines.
    pub(crate) fn with_capacity(bytes: usize) -> Self {
        Self { lines: Vec::with_capacity(bytes), records: Vec::new() }
    }

    /// `with_copies`: somebody has subscribed.
    pub(crate) fn push(&mut self, record: &LoggedRecord, node: &NodeId, with_copies: bool) {
        let (mut count, mut copies) = (0, Vec::new());
        for event in events(record, node) {
            let start = self.lines.len();
            write_line(&event, &mut self.lines);
            count += 1;
            if with_copies {
                copies.push(Arc::new(EventRecord::new(&event, &self.lines[start..])));
            }
        }
        let &LoggedRecord { log, sequence, .. } = record;
        self.records.push(Encoded { log, sequence, lines_end: self.lines.len(), events: count, copies });
    }

    pub(crate) fn records(&self) -> impl Iterator<Item = EncodedRecord<'_>> {
        let mut begin = 0;
        self.records.iter().map(move |record| {
            let &Encoded { log, sequence, lines_end, events, ref copies } = record;
            let lines = &self.lines[begin..lines_end];
            begin = lines_end;
            EncodedRecord { log, sequence, lines, events, copies }
        })
    }

    /// Records.
    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }

    /// Of all lines.
    pub(crate) fn bytes(&self) -> usize {
        self.lines.len()
    }
}
