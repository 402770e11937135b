//! Entries that wait for a time.
//!
//! Times are wall-clock milliseconds, because due times survive a restart. The order is exact: an entry is handed out
//! at the first look at or after its due time, oldest due first.

use std::collections::BTreeSet;

use super::queue::EntryKey;

/// Due times of the entries of one home.
#[derive(Debug, Default)]
pub struct DueTimes {
    entries: BTreeSet<(u64, EntryKey)>,
}

impl DueTimes {
    pub fn insert(&mut self, due_ms: u64, entry: EntryKey) {
        let new = self.entries.insert((due_ms, entry));
        assert!(new, "an entry waits once");
    }

    /// Forgets an entry; false where it did not wait for that time.
    pub fn remove(&mut self, due_ms: u64, entry: EntryKey) -> bool {
        self.entries.remove(&(due_ms, entry))
    }

    /// The next entry whose time has come.
    pub fn pop_due(&mut self, wall_ms: u64) -> Option<EntryKey> {
        let &(due_ms, _) = self.entries.first()?;
        if due_ms > wall_ms {
            return None;
        }
        self.entries.pop_first().map(|(_, entry)| entry)
    }

    /// Wall milliseconds of the next due entry.
    pub fn next_ms(&self) -> Option<u64> {
        self.entries.first().map(|&(due_ms, _)| due_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_out_oldest_first_and_never_early() {
        let mut due = DueTimes::default();
        due.insert(300, EntryKey(1));
        due.insert(100, EntryKey(2));
        due.insert(200, EntryKey(3));
        assert_eq!(due.next_ms(), Some(100));
        assert_eq!(due.pop_due(99), None);
        assert_eq!(due.pop_due(200), Some(EntryKey(2)));
        assert_eq!(due.pop_due(200), Some(EntryKey(3)));
        assert_eq!(due.pop_due(200), None);
        assert!(due.remove(300, EntryKey(1)));
        assert!(!due.remove(300, EntryKey(1)));
        assert_eq!(due.next_ms(), None);
    }
}
