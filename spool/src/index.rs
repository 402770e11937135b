//! Where each live message is, and which of its recipients have no final fate yet. In memory only; recovery rebuilds
//! it.
//!
//! Entries are 36 bytes, sorted by sequence in chunks: appending is a push, and removing moves at most one chunk's
//! entries. A table hashed by sequence would need about half as much again. Looking up is a binary search for the
//! chunk and a guess in it, where each entry that is looked at is a cache miss. Who asks about a message asks again,
//! and most often about its neighbour next: so it is looked first where the last one was.

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::mem::size_of;

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
    sequence_low: u32,
    sequence_high: u16,
    flags: u16,
    record_offset16: u32,
    record_length16: u32,
    outcome_offset16: u32,
    /// 0: no outcome since the record was written.
    outcome_length16: u32,
    record_slot: u16,
    outcome_slot: u16,
    /// Bit i: recipient i has no final fate. All ones: there are more recipients, see [`Index::wide`].
    pending: u32,
    /// What the log's owner keeps with the message.
    pub(crate) handle: u32,
}

const _: () = assert!(size_of::<Entry>() == 36);

impl Entry {
    fn new(sequence: u64, record: Place) -> Self {
        let mut entry = Self {
            sequence_low: sequence as u32,
            sequence_high: (sequence >> 32) as u16,
            flags: 0,
            record_offset16: 0,
            record_length16: 0,
            outcome_offset16: 0,
            outcome_length16: 0,
            record_slot: 0,
            outcome_slot: 0,
            pending: WIDE,
            handle: 0,
        };
        entry.set_record(record);
        entry
    }

    pub(crate) fn sequence(&self) -> u64 {
        u64::from(self.sequence_high) << 32 | u64::from(self.sequence_low)
    }

    pub(crate) fn record(&self) -> Place {
        Place { slot: self.record_slot, offset16: self.record_offset16, length16: self.record_length16 }
    }

    /// The newest outcome or state record about this message since the message or its copy was written.
    pub(crate) fn outcome(&self) -> Option<Place> {
        (self.outcome_length16 != 0).then_some(Place {
            slot: self.outcome_slot,
            offset16: self.outcome_offset16,
            length16: self.outcome_length16,
        })
    }

    pub(crate) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    pub(crate) fn set_touched(&mut self) {
        self.flags |= TOUCHED;
    }

    /// Without the owner's handle, which no record tells.
    pub(crate) fn is_same_state(&self, other: &Self) -> bool {
        Self { handle: 0, ..*self } == Self { handle: 0, ..*other }
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
    older: Option<Box<[Place]>>,
    pub(crate) body: Option<u64>,
}

impl Before {
    /// The outcome and state records that told the recipients' state.
    pub(crate) fn states(&self) -> impl Iterator<Item = Place> {
        self.entry.outcome().into_iter().chain(self.older.iter().flatten().copied())
    }
}

/// All that is known of a live message, as a checkpoint holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) sequence: u64,
    pub(crate) record: Place,
    pub(crate) outcome: Option<Place>,
    /// Oldest first.
    pub(crate) older: Vec<Place>,
    pub(crate) pending: Pending,
    pub(crate) body: Option<u64>,
    pub(crate) is_held: bool,
}

/// Recipients without a final fate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Pending {
    /// Bit i: recipient i, of at most [`INLINE_RECIPIENTS_MAX`].
    Few(u32),
    Many(Box<[u64]>),
}

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
            self.chunks[chunk].entries[position] = Entry { handle, ..before.entry };
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
        let had_any = self.chunks[chunk].entries[position].outcome_length16 != 0;
        self.chunks[chunk].entries[position].outcome_length16 = 0;
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

/// Neighbouring entries, by sequence; never empty.
#[derive(Debug)]
struct Chunk {
    /// No entry in it is below, and none in those before is above. Kept here, so that looking for a chunk reads
    /// neighbouring memory.
    first: u64,
    entries: Vec<Entry>,
}

impl Chunk {
    /// Of the first entry that is not below.
    fn position_of(&self, sequence: u64) -> usize {
        self.entries.partition_point(|entry| entry.sequence() < sequence)
    }

    /// Finds an entry whose sequence is not below the chunk's first. `end` is above all in it, `None` in the last one.
    ///
    /// What stays long is a sample of all that came, so its sequences lie about evenly: a guess comes close, and from
    /// there the search goes in steps that double.
    fn search(&self, sequence: u64, end: Option<u64>) -> Option<usize> {
        let entries = &self.entries;
        let end = end.or_else(|| entries.last().map(|last| last.sequence() + 1))?;
        if sequence >= end {
            return None;
        }
        let share = (sequence - self.first) as f64 / (end - self.first) as f64;
        let guess = ((share * entries.len() as f64) as usize).min(entries.len() - 1);
        let (mut low, mut high, mut step) = (0, entries.len(), SEARCH_STEP);
        if entries[guess].sequence() < sequence {
            low = guess + 1;
            while low + step < high {
                if entries[low + step].sequence() > sequence {
                    high = low + step;
                    break;
                }
                low += step;
                step *= 2;
            }
        } else {
            high = guess + 1;
            while high > step {
                if entries[high - step - 1].sequence() < sequence {
                    low = high - step;
                    break;
                }
                high -= step;
                step *= 2;
            }
        }
        let position = low + entries[low..high].binary_search_by_key(&sequence, Entry::sequence).ok()?;
        Some(position)
    }
}

/// A place in the index that only goes forward.
#[derive(Debug)]
pub(crate) struct Cursor<'a> {
    index: &'a mut Index,
    chunk: usize,
    position: usize,
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

fn clear(bits: &mut [u64], index: u32) {
    if let Some(word) = bits.get_mut(index as usize / 64) {
        *word &= !(1 << (index % 64));
    }
}

/// The slot of a place in a segment that is not there. Only recovery meets it.
pub(crate) const NOWHERE: u16 = u16::MAX;

/// How an outcome leaves a recipient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Settles {
    Finally,
    ForNow,
}

const WIDE: u32 = u32::MAX;
/// Entries that are looked at where the last one was found: they lie in two or three cache lines.
const NEIGHBOURS: usize = 3;
/// The first step away from a guess, in entries.
const SEARCH_STEP: usize = 4;

/// Flags of an entry: older outcomes count, see [`Index::older`].
const OLDER: u16 = 1;
/// The body is shared, see [`Index::bodies`].
const SHARES: u16 = 2;
/// For the operator: it may have been delivered already.
pub(crate) const HELD: u16 = 4;
/// During recovery: a record behind the checkpoint is about it.
pub(crate) const TOUCHED: u16 = 8;

const _: () = assert!((1_u64 << INLINE_RECIPIENTS_MAX) - 1 < WIDE as u64);

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::collections::btree_map;

    use super::{Entry, Index, NOWHERE, Pending, Place, Row, Settles};

    fn place(number: u32) -> Place {
        Place { slot: 1, offset16: number, length16: 1 }
    }

    fn finally(index: u32) -> impl Iterator<Item = (u32, Settles)> {
        [(index, Settles::Finally)].into_iter()
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
                    if let btree_map::Entry::Vacant(vacant) = model.entry(sequence) {
                        index.insert(sequence, place(step), 2, &[1]);
                        vacant.insert(step);
                    }
                }
                6..9 => {
                    let sequence = draw(next);
                    let gone = index.settle(sequence, place(0), finally(0));
                    assert_eq!(gone.map(|(before, gone)| (before.entry.record_offset16, gone)), {
                        model.remove(&sequence).map(|offset| (offset, true))
                    });
                }
                _ => {
                    let sequence = draw(next);
                    if let Some((before, _)) = index.settle(sequence, place(0), finally(0)) {
                        assert!(index.restore(before).is_none());
                    }
                }
            }
        }
        assert_eq!(index.len(), model.len());
        assert!(index.iter().map(|entry| (entry.sequence(), entry.record_offset16)).eq(model.clone()));
        for first in [0, 100, 3_000, next] {
            let range = index.iter_from(first).map(Entry::sequence);
            assert!(range.eq(model.range(first..).map(|(sequence, _)| *sequence)), "from {first}");
        }
        let allocated: usize = index.chunks.iter().map(|chunk| chunk.entries.capacity() * size_of::<Entry>()).sum();
        assert!(allocated <= 4 * size_of::<Entry>() * index.len(), "{allocated} bytes for {} entries", index.len());
    }

    /// All else that is known of the message stays: who is pending, its content's place, its body, the owner's handle.
    #[test]
    fn some_of_the_outcomes_can_be_forgotten() {
        for pending in [Pending::Few(6), Pending::Many([6, 1].into())] {
            let nowhere = Place { slot: NOWHERE, ..place(9) };
            let row = |outcome, older: &[Place]| Row {
                sequence: 5,
                record: place(1),
                outcome,
                older: older.to_vec(),
                pending: pending.clone(),
                body: Some(2),
                is_held: true,
            };
            let cases = [
                (
                    row(Some(place(4)), &[nowhere, place(2), nowhere, place(3)]),
                    row(Some(place(4)), &[place(2), place(3)]),
                ),
                (row(Some(nowhere), &[place(2), place(3)]), row(Some(place(3)), &[place(2)])),
                (row(Some(nowhere), &[nowhere]), row(None, &[])),
            ];
            for (before, after) in cases {
                let mut index = Index::default();
                for sequence in [1, 9] {
                    index.insert(sequence, place(8), 1, &[]);
                }
                assert!(index.insert_row(before));
                index.set_handle(5, 77);
                let entry = *index.get(5).unwrap();
                index.retain_states(&entry, |state| state.slot != NOWHERE);
                let entry = *index.get(5).unwrap();
                assert_eq!((index.row(&entry), entry.handle), (after, 77));
                assert!(index.get(1).is_some() && index.get(9).is_some());
            }
        }
    }

    /// Guesses go wrong where sequences lie unevenly; what is found does not.
    #[test]
    fn finds_what_is_there_however_it_lies() {
        let even: Vec<u64> = (0..3_000).map(|number| 100 + number * 20).collect();
        let close: Vec<u64> = (0..3_000).map(|number| 7 + number).collect();
        let squares: Vec<u64> = (0..3_000).map(|number| number * number * 5).collect();
        let late: Vec<u64> = (0..3_000).map(|number| (1 << 40) - (3_000 - number) * (3_000 - number)).collect();
        let far: Vec<u64> = (0..3_000_u64).map(|number| (number / 200) << 40 | number).collect();
        for sequences in [even, close, squares, late, far] {
            let mut index = Index::default();
            for sequence in &sequences {
                index.insert(*sequence, place(1), 1, &[]);
            }
            // Backwards, so that nothing is near what was found last.
            for (number, sequence) in sequences.iter().enumerate().rev() {
                assert_eq!(index.get(*sequence).map(Entry::sequence), Some(*sequence));
                let next = sequences.get(number + 1).copied();
                assert_eq!(index.get(sequence + 1).map(Entry::sequence), next.filter(|next| *next == sequence + 1));
            }
        }
    }

    #[test]
    fn counts_each_recipient_once() {
        for recipients in [1, 2, 31, 32, 33, 64, 65, 1000] {
            let mut index = Index::default();
            assert!(index.insert(7, place(1), recipients, &[]));
            for recipient in 0..recipients {
                let settled = [recipient, recipient, 5000].map(|recipient| (recipient, Settles::Finally));
                let (_, gone) = index.settle(7, place(2), settled.into_iter()).unwrap();
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
        let all = (0..40).map(|index| (index, Settles::Finally));
        let (before, gone) = index.settle(7, place(2), all).unwrap();
        assert!(gone);
        assert_eq!(index.len(), 0);
        index.restore(before);
        let entry = *index.get(7).unwrap();
        assert_eq!(index.pending(&entry).len(), 39);
        assert_eq!(entry.outcome(), None);
        let before = index.relocate(7, place(9)).unwrap();
        assert_eq!(index.restore(before).unwrap().entry.record(), place(9));
        assert_eq!(index.get(7).unwrap().record(), place(1));
    }

    /// What outcomes told before is told by the copy, so none of them counts any more.
    #[test]
    fn a_copy_takes_the_place_of_outcomes() {
        let mut index = Index::default();
        index.insert(7, place(1), 3, &[]);
        for (number, recipient) in [(2, 0), (3, 1)] {
            index.settle(7, place(number), [(recipient, Settles::ForNow)].into_iter()).unwrap();
        }
        let before = index.relocate(7, place(9)).unwrap();
        assert_eq!(before.states().count(), 2);
        assert_eq!(index.states(index.get(7).unwrap()).count(), 0);
        index.audit();
        index.restore(before);
        assert_eq!(index.states(index.get(7).unwrap()).count(), 2);
        index.audit();
    }

    /// An outcome counts for as long as it tells the newest state of some pending recipient.
    #[test]
    fn outcomes_count_while_they_tell_something() {
        for recipients in [3, 40] {
            let mut index = Index::default();
            index.insert(7, place(1), recipients, &[]);
            let states = |index: &Index| -> Vec<u32> {
                let entry = index.get(7).unwrap();
                index.states(entry).map(|place| place.offset16).collect()
            };
            let some = |index, settles| [(index, settles)].into_iter();
            index.settle(7, place(2), some(0, Settles::ForNow)).unwrap();
            index.settle(7, place(3), some(1, Settles::ForNow)).unwrap();
            let (before, _) = index.settle(7, place(4), some(0, Settles::ForNow)).unwrap();
            assert_eq!(states(&index), [4, 3, 2]);
            assert_eq!(before.states().map(|place| place.offset16).collect::<Vec<_>>(), [3, 2]);
            index.restore(before);
            assert_eq!(states(&index), [3, 2]);
            let (before, _) = index.settle(7, place(5), (0..recipients).map(|index| (index, Settles::ForNow))).unwrap();
            assert_eq!(states(&index), [5]);
            index.restore(before);
            index.settle(7, place(9), some(2, Settles::Finally)).unwrap();
            assert_eq!(states(&index), [3, 2], "a final fate alone tells nothing of the others");
            index.restate(7, place(6)).unwrap();
            assert_eq!(states(&index), [6]);
            assert!(index.older.is_empty());
        }
    }
}
