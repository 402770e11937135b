//! Where each live message is, and which of its recipients have no final fate yet. In memory only; recovery rebuilds
//! it.
//!
//! Entries are 32 bytes, sorted by sequence in chunks: appending is a push, looking up two binary searches, and
//! removing moves at most one chunk's entries. A table hashed by sequence would need about half as much again.

use std::collections::{HashMap, VecDeque};
use std::mem::size_of;
use std::ops::RangeInclusive;

use crate::limits::{ALIGN_BYTES, INDEX_CHUNK_ENTRIES, INLINE_RECIPIENTS_MAX};

/// A record's place: a slot of the segment table, and units of 16 bytes in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) slot: u16,
    pub(crate) offset16: u32,
    pub(crate) length16: u32,
}

impl Place {
    pub(crate) fn new(slot: u16, offset: u64, length: usize) -> Self {
        assert!(offset.is_multiple_of(ALIGN_BYTES));
        assert!((length as u64).is_multiple_of(ALIGN_BYTES));
        Self { slot, offset16: (offset / ALIGN_BYTES) as u32, length16: (length as u64 / ALIGN_BYTES) as u32 }
    }

    pub(crate) fn offset(self) -> u64 {
        u64::from(self.offset16) * ALIGN_BYTES
    }

    pub(crate) fn length(self) -> u64 {
        u64::from(self.length16) * ALIGN_BYTES
    }
}

/// A live message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) sequence: u64,
    record_offset16: u32,
    record_length16: u32,
    outcome_offset16: u32,
    /// 0: no outcome since the record was written.
    outcome_length16: u32,
    record_slot: u16,
    outcome_slot: u16,
    /// Bit i: recipient i has no final fate. All ones: there are more recipients, see [`Index::wide`].
    pending: u32,
}

const _: () = assert!(size_of::<Entry>() == 32);

impl Entry {
    pub(crate) fn record(&self) -> Place {
        Place { slot: self.record_slot, offset16: self.record_offset16, length16: self.record_length16 }
    }

    /// The newest outcome record about this message since the message or its copy was written.
    pub(crate) fn outcome(&self) -> Option<Place> {
        (self.outcome_length16 != 0).then_some(Place {
            slot: self.outcome_slot,
            offset16: self.outcome_offset16,
            length16: self.outcome_length16,
        })
    }

    fn set_record(&mut self, place: Place) {
        self.record_slot = place.slot;
        self.record_offset16 = place.offset16;
        self.record_length16 = place.length16;
        self.outcome_length16 = 0;
    }

    fn set_outcome(&mut self, place: Place) {
        self.outcome_slot = place.slot;
        self.outcome_offset16 = place.offset16;
        self.outcome_length16 = place.length16;
    }
}

/// What an entry was before a change, so that the change can be taken back.
#[derive(Debug, Clone)]
pub(crate) struct Before {
    pub(crate) entry: Entry,
    wide: Option<Box<[u64]>>,
}

#[derive(Debug, Default)]
pub(crate) struct Index {
    chunks: VecDeque<Vec<Entry>>,
    length: usize,
    /// Pending recipients of messages with more than [`INLINE_RECIPIENTS_MAX`], one bit each.
    wide: HashMap<u64, Box<[u64]>>,
}

impl Index {
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// Adds a message with this many recipients, all pending but those in `finished`. False when none is pending; then
    /// nothing is added.
    pub(crate) fn insert(&mut self, sequence: u64, place: Place, recipients: u32, finished: &[u32]) -> bool {
        let mut entry = Entry {
            sequence,
            record_offset16: 0,
            record_length16: 0,
            outcome_offset16: 0,
            outcome_length16: 0,
            record_slot: 0,
            outcome_slot: 0,
            pending: WIDE,
        };
        entry.set_record(place);
        if recipients <= INLINE_RECIPIENTS_MAX {
            entry.pending = (1 << recipients) - 1;
            for index in finished.iter().filter(|index| **index < recipients) {
                entry.pending &= !(1 << *index);
            }
            if entry.pending == 0 {
                return false;
            }
        } else {
            let mut bits = vec![u64::MAX; (recipients as usize).div_ceil(64)].into_boxed_slice();
            if let (Some(last), rest @ 1..) = (bits.last_mut(), recipients % 64) {
                *last = (1 << rest) - 1;
            }
            for index in finished {
                clear(&mut bits, *index);
            }
            if bits.iter().all(|word| *word == 0) {
                return false;
            }
            self.wide.insert(sequence, bits);
        }
        self.put(entry);
        true
    }

    pub(crate) fn get(&self, sequence: u64) -> Option<&Entry> {
        let (chunk, position) = self.find(sequence)?;
        Some(&self.chunks[chunk][position])
    }

    /// Notes an outcome record and the recipients whose fates are final with it. The entry goes when none is left.
    ///
    /// Returns what was there before, and whether the entry is gone; `None` when the message is not live.
    pub(crate) fn settle(
        &mut self,
        sequence: u64,
        outcome: Place,
        finished: impl Iterator<Item = u32>,
    ) -> Option<(Before, bool)> {
        let (chunk, position) = self.find(sequence)?;
        let entry = &mut self.chunks[chunk][position];
        let mut before = Before { entry: *entry, wide: None };
        entry.set_outcome(outcome);
        let gone = if entry.pending == WIDE {
            let bits = self.wide.get_mut(&sequence).expect("a message with many recipients has its bits");
            before.wide = Some(bits.clone());
            for index in finished {
                clear(bits, index);
            }
            bits.iter().all(|word| *word == 0)
        } else {
            for index in finished.filter(|index| *index < INLINE_RECIPIENTS_MAX) {
                entry.pending &= !(1 << index);
            }
            entry.pending == 0
        };
        if gone {
            self.wide.remove(&sequence);
            self.remove_at(chunk, position);
        }
        Some((before, gone))
    }

    /// The message has been copied to another place; its outcomes so far are part of the copy.
    pub(crate) fn relocate(&mut self, sequence: u64, place: Place) -> Option<Before> {
        let (chunk, position) = self.find(sequence)?;
        let entry = &mut self.chunks[chunk][position];
        let before = Before { entry: *entry, wide: None };
        entry.set_record(place);
        Some(before)
    }

    /// Takes a change back. Returns where the entry was until now, if it was there.
    pub(crate) fn restore(&mut self, before: Before) -> Option<Place> {
        let sequence = before.entry.sequence;
        if let Some(wide) = before.wide {
            self.wide.insert(sequence, wide);
        }
        match self.find(sequence) {
            Some((chunk, position)) => {
                let entry = &mut self.chunks[chunk][position];
                let place = entry.record();
                *entry = before.entry;
                Some(place)
            }
            None => {
                self.put(before.entry);
                None
            }
        }
    }

    /// Takes an insertion back.
    pub(crate) fn remove(&mut self, sequence: u64) -> Option<Entry> {
        let (chunk, position) = self.find(sequence)?;
        self.wide.remove(&sequence);
        Some(self.remove_at(chunk, position))
    }

    pub(crate) fn pending(&self, entry: &Entry) -> Vec<u32> {
        if entry.pending == WIDE {
            let bits = &self.wide[&entry.sequence];
            (0..bits.len() as u32 * 64).filter(|index| bits[*index as usize / 64] >> (index % 64) & 1 == 1).collect()
        } else {
            (0..INLINE_RECIPIENTS_MAX).filter(|index| entry.pending >> index & 1 == 1).collect()
        }
    }

    pub(crate) fn is_pending(&self, entry: &Entry, index: u32) -> bool {
        if entry.pending == WIDE {
            self.wide[&entry.sequence].get(index as usize / 64).is_some_and(|word| word >> (index % 64) & 1 == 1)
        } else {
            index < INLINE_RECIPIENTS_MAX && entry.pending >> index & 1 == 1
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.chunks.iter().flatten()
    }

    pub(crate) fn range(&self, range: RangeInclusive<u64>) -> impl Iterator<Item = &Entry> {
        let (first, last) = range.into_inner();
        let chunk = self.chunks.partition_point(|chunk| chunk[0].sequence <= first).saturating_sub(1);
        self.chunks
            .range(chunk..)
            .flatten()
            .skip_while(move |entry| entry.sequence < first)
            .take_while(move |entry| entry.sequence <= last)
    }

    fn find(&self, sequence: u64) -> Option<(usize, usize)> {
        let chunk = self.chunks.partition_point(|chunk| chunk[0].sequence <= sequence).checked_sub(1)?;
        let position = self.chunks[chunk].binary_search_by_key(&sequence, |entry| entry.sequence).ok()?;
        Some((chunk, position))
    }

    fn put(&mut self, entry: Entry) {
        self.length += 1;
        let after = self.chunks.partition_point(|chunk| chunk[0].sequence <= entry.sequence);
        let Some(chunk) = after.checked_sub(1) else {
            match self.chunks.front_mut() {
                Some(front) if front.len() < INDEX_CHUNK_ENTRIES => front.insert(0, entry),
                _ => self.chunks.push_front(vec![entry]),
            }
            return;
        };
        let at_the_end = after == self.chunks.len();
        let entries = &mut self.chunks[chunk];
        let position = entries.partition_point(|other| other.sequence < entry.sequence);
        assert!(entries.get(position).is_none_or(|other| other.sequence != entry.sequence));
        if entries.len() < INDEX_CHUNK_ENTRIES {
            entries.insert(position, entry);
            return;
        }
        if at_the_end && position == entries.len() {
            let mut next = Vec::with_capacity(INDEX_CHUNK_ENTRIES);
            next.push(entry);
            self.chunks.push_back(next);
            return;
        }
        let half = entries.len() / 2;
        let mut upper = entries.split_off(half);
        if position <= half {
            entries.insert(position, entry)
        } else {
            upper.insert(position - half, entry)
        }
        self.chunks.insert(chunk + 1, upper);
    }

    fn remove_at(&mut self, chunk: usize, position: usize) -> Entry {
        self.length -= 1;
        let entry = self.chunks[chunk].remove(position);
        if self.chunks[chunk].is_empty() {
            self.chunks.remove(chunk);
            return entry;
        }
        // The last chunk is being filled; others that have become sparse are joined or given back.
        if chunk + 1 < self.chunks.len() && self.chunks[chunk].len() <= INDEX_CHUNK_ENTRIES / 4 {
            if chunk > 0 && self.chunks[chunk - 1].len() + self.chunks[chunk].len() <= INDEX_CHUNK_ENTRIES / 2 {
                let moved = self.chunks.remove(chunk).expect("the chunk that was just looked at");
                self.chunks[chunk - 1].extend(moved);
            } else if self.chunks[chunk].capacity() > self.chunks[chunk].len() * 4 {
                let wanted = self.chunks[chunk].len() * 2;
                self.chunks[chunk].shrink_to(wanted);
            }
        }
        entry
    }
}

fn clear(bits: &mut [u64], index: u32) {
    if let Some(word) = bits.get_mut(index as usize / 64) {
        *word &= !(1 << (index % 64));
    }
}

const WIDE: u32 = u32::MAX;

const _: () = assert!((1_u64 << INLINE_RECIPIENTS_MAX) - 1 < WIDE as u64);

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::collections::btree_map::Entry;

    use super::{Index, Place};

    fn place(number: u32) -> Place {
        Place { slot: 1, offset16: number, length16: 1 }
    }

    /// Random insertions, removals and restorations, against a map.
    #[test]
    fn behaves_like_a_map() {
        let mut index = Index::default();
        let mut model = BTreeMap::new();
        let mut random = 12345_u64;
        let mut draw = |bound: u64| {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (random >> 33) % bound
        };
        let mut next = 1_u64;
        for step in 0..60_000_u32 {
            match draw(10) {
                0..5 => {
                    index.insert(next, place(step), 1, &[]);
                    model.insert(next, step);
                    next += 1 + draw(3);
                }
                5 => {
                    let sequence = draw(next);
                    if let Entry::Vacant(vacant) = model.entry(sequence) {
                        index.insert(sequence, place(step), 2, &[1]);
                        vacant.insert(step);
                    }
                }
                6..9 => {
                    let sequence = draw(next);
                    let gone = index.settle(sequence, place(0), [0].into_iter());
                    assert_eq!(gone.map(|(before, gone)| (before.entry.record_offset16, gone)), {
                        model.remove(&sequence).map(|offset| (offset, true))
                    });
                }
                _ => {
                    let sequence = draw(next);
                    if let Some((before, _)) = index.settle(sequence, place(0), [0].into_iter()) {
                        assert_eq!(index.restore(before), None);
                    }
                }
            }
        }
        assert_eq!(index.len(), model.len());
        assert!(index.iter().map(|entry| (entry.sequence, entry.record_offset16)).eq(model.clone()));
        let range: Vec<u64> = index.range(100..=3000).map(|entry| entry.sequence).collect();
        assert_eq!(range, model.range(100..=3000).map(|(sequence, _)| *sequence).collect::<Vec<_>>());
        let allocated: usize = index.chunks.iter().map(|chunk| chunk.capacity() * size_of::<super::Entry>()).sum();
        assert!(
            allocated <= 4 * size_of::<super::Entry>() * index.len(),
            "{allocated} bytes for {} entries",
            index.len()
        );
    }

    #[test]
    fn counts_each_recipient_once() {
        for recipients in [1, 2, 31, 32, 33, 64, 65, 1000] {
            let mut index = Index::default();
            assert!(index.insert(7, place(1), recipients, &[]));
            for recipient in 0..recipients {
                let (_, gone) = index.settle(7, place(2), [recipient, recipient, 5000].into_iter()).unwrap();
                assert_eq!(gone, recipient + 1 == recipients);
                if !gone {
                    let left = index.pending(index.get(7).unwrap());
                    assert_eq!(left, (recipient + 1..recipients).collect::<Vec<_>>());
                }
            }
            assert!(index.wide.is_empty());
            assert!(!index.insert(8, place(1), recipients, &(0..recipients).collect::<Vec<_>>()));
        }
    }

    #[test]
    fn a_change_can_be_taken_back() {
        let mut index = Index::default();
        index.insert(7, place(1), 40, &[3]);
        let (before, gone) = index.settle(7, place(2), 0..40).unwrap();
        assert!(gone);
        assert_eq!(index.len(), 0);
        index.restore(before);
        let entry = *index.get(7).unwrap();
        assert_eq!(index.pending(&entry).len(), 39);
        assert_eq!(entry.outcome(), None);
        let before = index.relocate(7, place(9)).unwrap();
        assert_eq!(index.restore(before), Some(place(9)));
        assert_eq!(index.get(7).unwrap().record(), place(1));
    }
}
