//! A shard's way to the event writer.

use std::collections::VecDeque;

use super::EventSender;
use crate::limits::EVENT_BATCH_BYTES_MAX;
use crate::outcome::event::LoggedRecord;
use crate::outcome::event_batch::EventBatch;

/// Makes lines of a shard's records, and keeps in their order what finds the writer's queue full.
pub(crate) struct EventOutbox {
    sender: EventSender,
    /// It found the queue full.
    batch: Option<EventBatch>,
    /// Behind it. Not made into lines before they can go: after a start there may be any number.
    records: VecDeque<LoggedRecord>,
    /// Of the last batch: the next is about as large.
    bytes_typical: usize,
}

impl EventOutbox {
    pub(crate) fn new(sender: EventSender) -> Self {
        Self { sender, batch: None, records: VecDeque::new(), bytes_typical: 0 }
    }

    /// Never waits. Records of one log come in the order of their sequences, and after they are durable.
    pub(crate) fn send(&mut self, records: Vec<LoggedRecord>) {
        if self.records.is_empty() {
            self.records = records.into();
        } else {
            self.records.extend(records);
        }
        self.send_waiting();
    }

    /// Tries again what found the queue full.
    pub(crate) fn send_waiting(&mut self) {
        while let Some(batch) = self.batch.take().or_else(|| self.encode()) {
            if let Err(back) = self.sender.try_send(batch) {
                self.batch = Some(back);
                return;
            }
        }
    }

    /// The records that wait, here.
    pub(crate) fn len(&self) -> usize {
        self.batch.as_ref().map_or(0, EventBatch::len) + self.records.len()
    }

    /// The event disk fails: what is sent now waits for it.
    pub(crate) fn is_failing(&self) -> bool {
        self.sender.is_failing()
    }

    fn encode(&mut self) -> Option<EventBatch> {
        if self.records.is_empty() {
            return None;
        }
        let with_copies = self.sender.has_subscribers();
        let mut batch = EventBatch::with_capacity(self.bytes_typical);
        while batch.bytes() < EVENT_BATCH_BYTES_MAX
            && let Some(record) = self.records.pop_front()
        {
            batch.push(&record, &self.sender.node, with_copies);
        }
        self.bytes_typical = batch.bytes();
        Some(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::event::tests::{NODE, message};
    use crate::runtime::event_file::{EventLog, EventLogOptions};

    #[test]
    fn so_much_is_handed_over_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let (log, _, _) = EventLog::open(EventLogOptions::new(directory.path().join("events"), NODE)).unwrap();
        let handle = log.start(|_| {}).unwrap();
        let mut outbox = EventOutbox::new(handle.sender());
        outbox.records = (1..=1_000).map(|sequence| message(1, sequence, &["a@b.example"])).collect();
        let batches: Vec<EventBatch> = std::iter::from_fn(|| outbox.encode()).collect();
        assert_eq!(batches.iter().map(EventBatch::len).sum::<usize>(), 1_000);
        assert!(batches.len() > 1);
        // But for the last line.
        assert!(batches.iter().all(|batch| batch.bytes() < EVENT_BATCH_BYTES_MAX + 2_000));
        handle.shutdown().unwrap();
    }
}
