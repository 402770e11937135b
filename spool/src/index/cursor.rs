//! Going through the index along with something that is sorted the same way.

use super::{Entry, Index};

/// A place in the index that only goes forward.
#[derive(Debug)]
pub(crate) struct Cursor<'a> {
    pub(super) index: &'a mut Index,
    pub(super) chunk: usize,
    pub(super) position: usize,
}

impl Cursor<'_> {
    /// The entry with this sequence, which is not below any that was asked for before.
    pub(crate) fn seek(&mut self, sequence: u64) -> Option<&mut Entry> {
        while self.index.chunks.get(self.chunk)?.entries.last().is_none_or(|last| last.sequence() < sequence) {
            self.chunk += 1;
            self.position = 0;
        }
        let entries = &mut self.index.chunks[self.chunk].entries;
        while entries[self.position].sequence() < sequence {
            self.position += 1;
        }
        Some(&mut entries[self.position]).filter(|entry| entry.sequence() == sequence)
    }

    pub(crate) fn index(&self) -> &Index {
        self.index
    }
}
