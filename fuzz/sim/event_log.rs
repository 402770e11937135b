//! The event log: records wait in memory, are on its disk after a while, and the cursor follows.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use postrider::outcome::event::LoggedRecord;
use postrider_spool::record::{LogId, Sequence};

use crate::checker::Ledger;

#[derive(Debug, Clone, Default)]
pub(crate) struct EventLog {
    waiting: VecDeque<Arc<LoggedRecord>>,
    /// The last record of each log that is on the disk.
    written: BTreeMap<LogId, Sequence>,
}

impl EventLog {
    pub(crate) fn take(&mut self, record: Arc<LoggedRecord>) {
        self.waiting.push_back(record);
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Writes up to so many records durably; tells the cursors that have moved.
    pub(crate) fn write(&mut self, records: usize, ledger: &mut Ledger) -> BTreeMap<LogId, Sequence> {
        let mut moved = BTreeMap::new();
        for _ in 0..records {
            let Some(record) = self.waiting.pop_front() else { break };
            let LoggedRecord { log, sequence, .. } = *record;
            let last = self.written.insert(log, sequence);
            assert!(last.is_none_or(|last| last < sequence), "EVENTS-ONCE: {sequence:?} follows {last:?} of {log:?}");
            ledger.write(log, sequence);
            moved.insert(log, sequence);
        }
        moved
    }

    pub(crate) fn cursor(&self, log: LogId) -> Sequence {
        self.written.get(&log).copied().unwrap_or_default()
    }

    /// What was only in memory is gone.
    pub(crate) fn crash(&mut self) {
        self.waiting.clear();
    }
}
