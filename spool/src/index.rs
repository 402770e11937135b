//! Where each live message is, and which of its recipients have no final fate yet. In memory only; recovery rebuilds
//! it.
//!
//! Entries are 36 bytes, sorted by sequence in chunks: appending is a push, and removing moves at most one chunk's
//! entries. A table hashed by sequence would need about half as much again. Looking up is a binary search for the
//! chunk and a guess in it, where each entry that is looked at is a cache miss. Who asks about a message asks again,
//! and most often about its neighbour next: so it is looked first where the last one was.

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};

use crate::limits::{INDEX_CHUNK_ENTRIES, INLINE_RECIPIENTS_MAX};

mod chunk;
mod cursor;
mod entry;

use chunk::Chunk;
pub(crate) use cursor::Cursor;
pub(crate) use entry::{Before, Entry, HELD, NOWHERE, Pending, Place, Row, Settles, TOUCHED};
use entry::{OLDER, SHARES, WIDE};

#[derive(Debug, Default)]
pub(crate) struct Index {
    chunks: VecDeque<Chunk>,
    length: usize,
    /// Chunk and position of the entry that was found last; it may have moved since.
    found_last: Cell<(usize, usize)>,
    /// Pending recipients of messages with more than [`INLINE_RECIPIENTS_MAX`], one bit each.
    wide: HashMap<u64, Box<[u64]>>,
    /// Outcomes before the newest that still tell the state of some recipient, oldest first.
    older: HashMap<u64, Box<[Place]>>,
    /// The bodies of messages that share one.
    bodies: HashMap<u64, u64>,
}

impl Index {
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// Adds a message with this many recipients, all pending but those in `finished`. False when none is pending; then
    /// nothing is added.
    pub(crate) fn insert(&mut self, sequence: u64, place: Place, recipients: u32, finished: &[u32]) -> bool {
        let pending = if recipients <= INLINE_RECIPIENTS_MAX {
            let mut bits = (1 << recipients) - 1;
            for index in finished.iter().filter(|index| **index < recipients) {
                bits &= !(1 << *index);
            }
            Pending::Few(bits)
        } else {
            let mut bits = vec![u64::MAX; (recipients as usize).div_ceil(64)].into_boxed_slice();
            if let (Some(last), rest @ 1..) = (bits.last_mut(), recipients % 64) {
                *last = (1 << rest) - 1;
            }
            for index in finished {
                clear(&mut bits, *index);
            }
            Pending::Many(bits)
        };
        self.insert_pending(Entry::new(sequence, place), pending)
    }

    /// Adds a message as a checkpoint told it. False when none of its recipients is pending.
    pub(crate) fn insert_row(&mut self, row: Row) -> bool {
        let mut entry = Entry::new(row.sequence, row.record);
        if let Some(outcome) = row.outcome {
            entry.set_outcome(outcome);
        }
        if row.is_held {
            entry.flags |= HELD;
        }
        if !row.older.is_empty() {
            entry.flags |= OLDER;
        }
        if row.body.is_some() {
            entry.flags |= SHARES;
        }
        if !self.insert_pending(entry, row.pending) {
            return false;
        }
        if let Some(body) = row.body {
            self.bodies.insert(row.sequence, body);
        }
        if !row.older.is_empty() {
            self.older.insert(row.sequence, row.older.into());
        }
        true
    }

    fn insert_pending(&mut self, mut entry: Entry, pending: Pending) -> bool {
        match pending {
            Pending::Few(0) => return false,
            Pending::Few(bits) => entry.pending = bits,
            Pending::Many(bits) if bits.iter().all(|word| *word == 0) => return false,
            Pending::Many(bits) => {
                entry.pending = WIDE;
                self.wide.insert(entry.sequence(), bits);
            }
        }
        self.put(entry);
        true
    }

    pub(crate) fn get(&self, sequence: u64) -> Option<&Entry> {
        let (chunk, position) = self.find(sequence)?;
        Some(&self.chunks[chunk].entries[position])
    }

    pub(crate) fn row(&self, entry: &Entry) -> Row {
        let sequence = entry.sequence();
        Row {
            sequence,
            record: entry.record(),
            outcome: entry.outcome(),
            older: self.older_of(entry).to_vec(),
            pending: match entry.pending {
                WIDE => Pending::Many(self.wide[&sequence].clone()),
                bits => Pending::Few(bits),
            },
            body: self.body(entry),
            is_held: entry.has(HELD),
        }
    }

    pub(crate) fn set_handle(&mut self, sequence: u64, handle: u32) -> bool {
        let Some((chunk, position)) = self.find(sequence) else {
            return false;
        };
        self.chunks[chunk].entries[position].handle = handle;
        true
    }

    pub(crate) fn set_flag(&mut self, sequence: u64, flag: u16, on: bool) {
        if let Some((chunk, position)) = self.find(sequence) {
            let flags = &mut self.chunks[chunk].entries[position].flags;
            *flags = if on { *flags | flag } else { *flags & !flag };
        }
    }

    /// The message's content is in a body that others share.
    pub(crate) fn set_body(&mut self, sequence: u64, body: u64) {
        self.bodies.insert(sequence, body);
        self.set_flag(sequence, SHARES, true);
    }

    pub(crate) fn body(&self, entry: &Entry) -> Option<u64> {
        entry.has(SHARES).then(|| self.bodies[&entry.sequence()])
    }

    /// Every outcome and state record that tells the present state of one of the message's recipients, newest first.
    pub(crate) fn states(&self, entry: &Entry) -> impl Iterator<Item = Place> {
        entry.outcome().into_iter().chain(self.older_of(entry).iter().rev().copied())
    }

    /// How many outcomes tell the message's state together.
    pub(crate) fn states_len(&self, entry: &Entry) -> usize {
        self.older_of(entry).len() + usize::from(entry.outcome().is_some())
    }

    /// Notes an outcome record: recipients whose fates are final with it, and those whose state it tells. The entry
    /// goes when none is left pending.
    ///
    /// Returns what was there before, and whether the entry is gone; `None` when the message is not live.
    pub(crate) fn settle(
        &mut self,
        sequence: u64,
        outcome: Place,
        results: impl Iterator<Item = (u32, Settles)>,
    ) -> Option<(Before, bool)> {
        let (chunk, position) = self.find(sequence)?;
        let before = self.before(chunk, position);
        let entry = &mut self.chunks[chunk].entries[position];
        let (gone, is_complete);
        // An outcome that tells of final fates only tells nothing that has to be kept.
        let mut tells = false;
        if entry.pending == WIDE {
            let bits = self.wide.get_mut(&sequence).expect("a message with many recipients has its bits");
            let mut untold = bits.clone();
            for (index, settles) in results {
                clear(&mut untold, index);
                match settles {
                    Settles::Finally => clear(bits, index),
                    Settles::ForNow => tells = true,
                }
            }
            gone = bits.iter().all(|word| *word == 0);
            is_complete = untold.iter().all(|word| *word == 0);
        } else {
            let mut untold = entry.pending;
            for (index, settles) in results.filter(|(index, _)| *index < INLINE_RECIPIENTS_MAX) {
                untold &= !(1 << index);
                match settles {
                    Settles::Finally => entry.pending &= !(1 << index),
                    Settles::ForNow => tells = true,
                }
            }
            gone = entry.pending == 0;
            is_complete = untold == 0;
        }
        let previous = entry.outcome();
        if gone {
            let entry = *entry;
            self.forget_beside(&entry);
            self.remove_at(chunk, position);
            return Some((before, true));
        }
        if !tells {
            return Some((before, false));
        }
        entry.set_outcome(outcome);
        if is_complete {
            self.forget_older(sequence, chunk, position);
        } else if let Some(previous) = previous {
            entry.flags |= OLDER;
            let older = self.older.entry(sequence).or_default();
            *older = older.iter().copied().chain([previous]).collect();
        }
        Some((before, false))
    }

    /// The message has been copied to another place; its outcomes so far are part of the copy.
    pub(crate) fn relocate(&mut self, sequence: u64, place: Place) -> Option<Before> {
        let (chunk, position) = self.find(sequence)?;
        let before = self.before(chunk, position);
        self.chunks[chunk].entries[position].set_record(place);
        self.forget_older(sequence, chunk, position);
        Some(before)
    }

    /// A state record tells the state of all pending recipients.
    pub(crate) fn restate(&mut self, sequence: u64, place: Place) -> Option<Before> {
        let (chunk, position) = self.find(sequence)?;
        let before = self.before(chunk, position);
        self.chunks[chunk].entries[position].set_outcome(place);
        self.forget_older(sequence, chunk, position);
        Some(before)
    }

    /// Takes a change back. Returns what was there until now.
    pub(crate) fn restore(&mut self, before: Before) -> Option<Before> {
        let sequence = before.entry.sequence();
        let present = self.find(sequence).map(|(chunk, position)| {
            let present = self.before(chunk, position);
            let handle = present.entry.handle;
            self.chunks[chunk].entries[position] = before.entry.with_handle(handle);
            present
        });
        if present.is_none() {
            self.put(before.entry);
        }
        self.older.remove(&sequence);
        if let Some(older) = before.older {
            self.older.insert(sequence, older);
        }
        if let Some(wide) = before.wide {
            self.wide.insert(sequence, wide);
        }
        if let Some(body) = before.body {
            self.bodies.insert(sequence, body);
        }
        present
    }

    /// Takes an entry away.
    pub(crate) fn remove(&mut self, sequence: u64) -> Option<Before> {
        let (chunk, position) = self.find(sequence)?;
        let before = self.before(chunk, position);
        self.forget_beside(&before.entry);
        self.remove_at(chunk, position);
        Some(before)
    }

    pub(crate) fn pending(&self, entry: &Entry) -> Vec<u32> {
        let mut pending = Vec::new();
        self.pending_into(entry, &mut pending);
        pending
    }

    /// The same into a buffer that is kept.
    pub(crate) fn pending_into(&self, entry: &Entry, pending: &mut Vec<u32>) {
        pending.clear();
        if entry.pending == WIDE {
            let bits = &self.wide[&entry.sequence()];
            let all = 0..bits.len() as u32 * 64;
            pending.extend(all.filter(|index| bits[*index as usize / 64] >> (index % 64) & 1 == 1));
        } else {
            let mut left = entry.pending;
            while left != 0 {
                pending.push(left.trailing_zeros());
                left &= left - 1;
            }
        }
    }

    /// Forgets the outcomes that told the message's state. Returns whether there were any.
    pub(crate) fn forget_states(&mut self, sequence: u64) -> bool {
        let Some((chunk, position)) = self.find(sequence) else {
            return false;
        };
        let had_any = self.chunks[chunk].entries[position].forget_outcome();
        self.forget_older(sequence, chunk, position);
        had_any
    }

    /// Forgets some of the outcomes that tell the message's state.
    pub(crate) fn retain_states(&mut self, entry: &Entry, stays: impl Fn(Place) -> bool) {
        let states: Vec<Place> = self.states(entry).filter(|state| stays(*state)).collect();
        let (outcome, older) = states.split_first().map_or((None, &[][..]), |(newest, older)| (Some(*newest), older));
        let row = Row { outcome, older: older.iter().rev().copied().collect(), ..self.row(entry) };
        let handle = entry.handle;
        self.remove(entry.sequence());
        self.insert_row(row);
        self.set_handle(entry.sequence(), handle);
    }

    /// The shared body of each message that has one.
    pub(crate) fn shared_bodies(&self) -> impl Iterator<Item = u64> {
        self.bodies.values().copied()
    }

    /// Looks entries up whose sequences ascend.
    pub(crate) fn cursor(&mut self) -> Cursor<'_> {
        Cursor { index: self, chunk: 0, position: 0 }
    }

    pub(crate) fn is_pending(&self, entry: &Entry, index: u32) -> bool {
        if entry.pending == WIDE {
            let bits = &self.wide[&entry.sequence()];
            bits.get(index as usize / 64).is_some_and(|word| word >> (index % 64) & 1 == 1)
        } else {
            index < INLINE_RECIPIENTS_MAX && entry.pending >> index & 1 == 1
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.chunks.iter().flat_map(|chunk| &chunk.entries)
    }

    /// Entries with sequences from `first` on, in order.
    pub(crate) fn iter_from(&self, first: u64) -> impl Iterator<Item = &Entry> {
        let chunk = self.chunks.partition_point(|chunk| chunk.first <= first).saturating_sub(1);
        let position = self.chunks.get(chunk).map_or(0, |chunk| chunk.position_of(first));
        self.chunks.range(chunk.min(self.chunks.len())..).flat_map(|chunk| &chunk.entries).skip(position)
    }

    fn before(&self, chunk: usize, position: usize) -> Before {
        let entry = self.chunks[chunk].entries[position];
        let sequence = entry.sequence();
        Before {
            entry,
            wide: (entry.pending == WIDE).then(|| self.wide[&sequence].clone()),
            older: entry.has(OLDER).then(|| self.older[&sequence].clone()),
            body: self.body(&entry),
        }
    }

    fn older_of(&self, entry: &Entry) -> &[Place] {
        if entry.has(OLDER) { &self.older[&entry.sequence()] } else { &[] }
    }

    fn forget_older(&mut self, sequence: u64, chunk: usize, position: usize) {
        let entry = &mut self.chunks[chunk].entries[position];
        if entry.has(OLDER) {
            entry.flags &= !OLDER;
            self.older.remove(&sequence);
        }
    }

    /// What is kept beside the entries is there where an entry says so, and nowhere else. See `audit.rs`.
    #[cfg(any(feature = "sim", test))]
    pub(crate) fn audit(&self) {
        assert_eq!(self.length, self.iter().count());
        assert!(self.iter().is_sorted_by(|before, after| before.sequence() < after.sequence()));
        let counted = |has: fn(&Entry) -> bool| self.iter().filter(|entry| has(entry)).count();
        assert_eq!(self.wide.len(), counted(|entry| entry.pending == WIDE));
        assert_eq!(self.older.len(), counted(|entry| entry.has(OLDER)));
        assert_eq!(self.bodies.len(), counted(|entry| entry.has(SHARES)));
        for entry in self.iter() {
            assert!(!entry.has(OLDER) || entry.outcome().is_some() && !self.older_of(entry).is_empty(), "{entry:?}");
            assert!(!self.pending(entry).is_empty(), "{entry:?}");
            assert!(!entry.has(TOUCHED), "{entry:?}");
        }
    }

    /// What is kept beside the entry goes with it.
    fn forget_beside(&mut self, entry: &Entry) {
        let sequence = entry.sequence();
        if entry.pending == WIDE {
            self.wide.remove(&sequence);
        }
        if entry.has(OLDER) {
            self.older.remove(&sequence);
        }
        if entry.has(SHARES) {
            self.bodies.remove(&sequence);
        }
    }

    fn find(&self, sequence: u64) -> Option<(usize, usize)> {
        let place = self.find_near_last(sequence).or_else(|| self.search(sequence))?;
        self.found_last.set(place);
        Some(place)
    }

    /// At the place that was found last, or close behind it.
    fn find_near_last(&self, sequence: u64) -> Option<(usize, usize)> {
        let (chunk, last) = self.found_last.get();
        let entries = self.chunks.get(chunk)?.entries.get(last..)?;
        let near = entries.iter().take(NEIGHBOURS).position(|entry| entry.sequence() == sequence)?;
        Some((chunk, last + near))
    }

    fn search(&self, sequence: u64) -> Option<(usize, usize)> {
        let after = self.chunks.partition_point(|chunk| chunk.first <= sequence);
        let chunk = after.checked_sub(1)?;
        let end = self.chunks.get(after).map(|next| next.first);
        let position = self.chunks[chunk].search(sequence, end)?;
        Some((chunk, position))
    }

    fn put(&mut self, entry: Entry) {
        self.length += 1;
        let sequence = entry.sequence();
        // Most often it is the newest.
        if let Some(last) = self.chunks.back_mut()
            && last.entries.len() < INDEX_CHUNK_ENTRIES
            && last.entries.last().is_some_and(|newest| newest.sequence() < sequence)
        {
            last.entries.push(entry);
            return;
        }
        let after = self.chunks.partition_point(|chunk| chunk.first <= sequence);
        let Some(chunk) = after.checked_sub(1) else {
            match self.chunks.front_mut() {
                Some(front) if front.entries.len() < INDEX_CHUNK_ENTRIES => {
                    front.first = sequence;
                    front.entries.insert(0, entry);
                }
                _ => self.chunks.push_front(Chunk { first: sequence, entries: vec![entry] }),
            }
            return;
        };
        let at_the_end = after == self.chunks.len();
        let position = self.chunks[chunk].position_of(sequence);
        let entries = &mut self.chunks[chunk].entries;
        assert!(entries.get(position).is_none_or(|other| other.sequence() != sequence));
        if entries.len() < INDEX_CHUNK_ENTRIES {
            entries.insert(position, entry);
            return;
        }
        if at_the_end && position == entries.len() {
            let mut entries = Vec::with_capacity(INDEX_CHUNK_ENTRIES);
            entries.push(entry);
            self.chunks.push_back(Chunk { first: sequence, entries });
            return;
        }
        let half = entries.len() / 2;
        let mut upper = entries.split_off(half);
        if position <= half {
            entries.insert(position, entry)
        } else {
            upper.insert(position - half, entry)
        }
        self.chunks.insert(chunk + 1, Chunk { first: upper[0].sequence(), entries: upper });
    }

    fn remove_at(&mut self, chunk: usize, position: usize) -> Entry {
        self.length -= 1;
        let entries = &mut self.chunks[chunk].entries;
        let entry = entries.remove(position);
        let (left, capacity) = (entries.len(), entries.capacity());
        if left == 0 {
            self.chunks.remove(chunk);
            return entry;
        }
        // The last chunk is being filled; others that have become sparse are joined or given back.
        if chunk + 1 < self.chunks.len() && left <= INDEX_CHUNK_ENTRIES / 4 {
            if chunk > 0 && self.chunks[chunk - 1].entries.len() + left <= INDEX_CHUNK_ENTRIES / 2 {
                let moved = self.chunks.remove(chunk).expect("the chunk that was just looked at");
                self.chunks[chunk - 1].entries.extend(moved.entries);
            } else if capacity > left * 4 {
                self.chunks[chunk].entries.shrink_to(left * 2);
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

/// Entries that are looked at where the last one was found: they lie in two or three cache lines.
const NEIGHBOURS: usize = 3;

#[cfg(test)]
mod tests;
