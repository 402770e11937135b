//! The entries of a home, forty bytes each.
//!
//! A backlog is millions of entries, so each field has the bits that it needs and no more:
//!
//! | field | bits | beyond them |
//! |---|---|---|
//! | due time, expiry | 44 each, milliseconds | counts as the last one, in the year 2527 |
//! | attempts | 20 | stay at 1,048,575: at one a second, the shortest interval, twelve days |
//! | last answer | 20 | [`Answers`](super::answer::Answers) keeps fewer |
//! | recipients | 32 | [`RecipientLists`] |
//! | state | 3, and 29 for a place or a pair | there can be no more entries |
//!
//! Entries stand in chunks, so that growth neither copies nor leaves half of an allocation unused. The entries of one
//! message are a ring: each names the next.

use std::ops::{Index, IndexMut};

use postrider_spool::record::MessageId;

use super::answer::AnswerId;
use super::queue::QueueKey;
use super::recipients::{RecipientLists, RecipientSet, Recipients};

/// An entry's place in its home; reused after the entry is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EntryKey(pub u32);

/// Where an entry stands; see `queue.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// The place is its own among the due times.
    Due {
        place: u32,
    },
    Unrouted,
    Ready {
        pair: u32,
    },
    Out {
        pair: u32,
    },
    /// Taken from its place, about to be removed.
    Withdrawn,
}

/// An entry-to-be.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewEntry<'a> {
    pub(super) message: MessageId,
    pub(super) recipients: &'a [u32],
    pub(super) queue: QueueKey,
    pub(super) attempts: u32,
    pub(super) due_ms: u64,
    pub(super) expires_ms: u64,
    pub(super) answer: AnswerId,
}

/// An entry as it is stored.
#[derive(Debug)]
pub(super) struct Packed {
    pub(super) message: MessageId,
    due_and_attempts: TimeAndNumber,
    expires_and_answer: TimeAndNumber,
    recipients: RecipientSet,
    pub(super) queue: QueueKey,
    /// The next entry of the message, which may be this one; the next vacant place where this one is vacant.
    sibling: EntryKey,
    /// The state in the lower three bits, its number above.
    standing: u32,
}

const _: () = assert!(size_of::<Packed>() == 40);

#[derive(Debug)]
pub(super) struct Entries {
    /// All but the last are full, of entries and vacant places.
    chunks: Vec<Vec<Packed>>,
    /// The place that was vacated last.
    vacant: EntryKey,
    len: usize,
    /// Of all entries.
    recipients: u64,
    lists: RecipientLists,
}

impl Entries {
    /// Adds an entry behind another one of its message, if there is one. It is [`State::Unrouted`].
    pub(super) fn insert(&mut self, new: NewEntry<'_>, behind: Option<EntryKey>) -> EntryKey {
        let entry = Packed {
            message: new.message,
            due_and_attempts: TimeAndNumber::new(new.due_ms, new.attempts),
            expires_and_answer: TimeAndNumber::new(new.expires_ms, new.answer.number()),
            recipients: self.lists.pack(new.recipients),
            queue: new.queue,
            sibling: NOWHERE,
            standing: State::Unrouted.pack(),
        };
        let key = self.place(entry);
        let next = match behind {
            Some(other) => std::mem::replace(&mut self[other].sibling, key),
            None => key,
        };
        self[key].sibling = next;
        self.len += 1;
        self.recipients += self.recipients(key).len() as u64;
        key
    }

    /// Returns another entry of the same message, if one is left.
    pub(super) fn remove(&mut self, key: EntryKey) -> Option<EntryKey> {
        let next = self[key].sibling;
        let others = next != key;
        if others {
            // At most as many steps as a message has recipients.
            let before = self.ring(next).find(|&other| self[other].sibling == key).expect("a ring is closed");
            self[before].sibling = next;
        }
        let count = self.recipients(key).len() as u64;
        let vacant = self.vacant;
        let entry = &mut self[key];
        let recipients = entry.recipients;
        entry.standing = VACANT;
        entry.sibling = vacant;
        self.vacant = key;
        self.len -= 1;
        self.recipients -= count;
        self.lists.release(recipients);
        if self.len == 0 {
            // The memory of a backlog is given back when it is gone.
            self.chunks.truncate(1);
            self.chunks[0].clear();
            self.vacant = NOWHERE;
        }
        others.then_some(next)
    }

    /// The entries of a message, from any one of them on.
    pub(super) fn ring(&self, first: EntryKey) -> impl Iterator<Item = EntryKey> {
        std::iter::successors(Some(first), move |&key| {
            let next = self[key].sibling;
            (next != first).then_some(next)
        })
    }

    pub(super) fn get(&self, key: EntryKey) -> Option<&Packed> {
        let entry = self.chunks.get(key.chunk())?.get(key.place())?;
        (entry.standing != VACANT).then_some(entry)
    }

    pub(super) fn recipients(&self, key: EntryKey) -> Recipients<'_> {
        self.lists.recipients(self[key].recipients)
    }

    pub(super) fn set_recipients(&mut self, key: EntryKey, recipients: &[u32]) {
        self.recipients -= self.recipients(key).len() as u64;
        self.lists.release(self[key].recipients);
        self[key].recipients = self.lists.pack(recipients);
        self.recipients += self.recipients(key).len() as u64;
    }

    pub(super) fn recipient_count(&self) -> u64 {
        self.recipients
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// One more than the highest key that may be in use.
    pub(super) fn places(&self) -> usize {
        self.chunks.last().map_or(0, |last| (self.chunks.len() - 1) * CHUNK_ENTRIES + last.len())
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = EntryKey> {
        let entries = self.chunks.iter().flatten().enumerate();
        entries.filter(|(_, entry)| entry.standing != VACANT).map(|(place, _)| EntryKey(place as u32))
    }

    pub(super) fn allocated_bytes(&self) -> usize {
        let chunks: usize = self.chunks.iter().map(Vec::capacity).sum();
        chunks * size_of::<Packed>() + self.chunks.capacity() * size_of::<Vec<Packed>>() + self.lists.allocated_bytes()
    }

    fn place(&mut self, entry: Packed) -> EntryKey {
        if self.vacant != NOWHERE {
            let key = self.vacant;
            let place = &mut self.chunks[key.chunk()][key.place()];
            assert!(place.standing == VACANT, "a vacant place holds no entry");
            self.vacant = place.sibling;
            *place = entry;
            return key;
        }
        let key = self.places();
        assert!(key <= NUMBER_MAX as usize, "a home's entries fit into its memory");
        match self.chunks.last_mut() {
            Some(last) if last.len() < CHUNK_ENTRIES => last.push(entry),
            _ => {
                let mut chunk = Vec::with_capacity(CHUNK_ENTRIES);
                chunk.push(entry);
                self.chunks.push(chunk);
            }
        }
        EntryKey(key as u32)
    }
}

impl Default for Entries {
    fn default() -> Self {
        Self { chunks: Vec::new(), vacant: NOWHERE, len: 0, recipients: 0, lists: RecipientLists::default() }
    }
}

impl Index<EntryKey> for Entries {
    type Output = Packed;

    fn index(&self, key: EntryKey) -> &Packed {
        self.get(key).expect("the entry exists")
    }
}

impl IndexMut<EntryKey> for Entries {
    fn index_mut(&mut self, key: EntryKey) -> &mut Packed {
        let entry = &mut self.chunks[key.chunk()][key.place()];
        assert!(entry.standing != VACANT, "the entry exists");
        entry
    }
}

impl EntryKey {
    fn chunk(self) -> usize {
        self.0 as usize / CHUNK_ENTRIES
    }

    fn place(self) -> usize {
        self.0 as usize % CHUNK_ENTRIES
    }
}

impl Packed {
    pub(super) fn due_ms(&self) -> u64 {
        self.due_and_attempts.time_ms()
    }

    pub(super) fn attempts(&self) -> u32 {
        self.due_and_attempts.number()
    }

    /// Not while it waits for its due time, by which it has its place.
    pub(super) fn set_due(&mut self, due_ms: u64, attempts: u32) {
        assert!(!matches!(self.state(), State::Due { .. }), "it does not wait yet");
        self.due_and_attempts = TimeAndNumber::new(due_ms, attempts);
    }

    pub(super) fn expires_ms(&self) -> u64 {
        self.expires_and_answer.time_ms()
    }

    /// It may have left already, and waits for nothing but its end; see `Entry::is_held`.
    pub(super) fn is_held(&self) -> bool {
        self.attempts() > 0 && self.due_ms() >= self.expires_ms()
    }

    /// It waits for another attempt.
    pub(super) fn is_retry(&self) -> bool {
        self.attempts() > 0 && !self.is_held()
    }

    pub(super) fn answer(&self) -> AnswerId {
        AnswerId::from_number(self.expires_and_answer.number())
    }

    pub(super) fn set_answer(&mut self, answer: AnswerId) {
        self.expires_and_answer = TimeAndNumber::new(self.expires_ms(), answer.number());
    }

    pub(super) fn state(&self) -> State {
        let number = self.standing >> STATE_BITS;
        match self.standing & STATE_MASK {
            WITHDRAWN => State::Withdrawn,
            UNROUTED => State::Unrouted,
            DUE => State::Due { place: number },
            READY => State::Ready { pair: number },
            OUT => State::Out { pair: number },
            _ => unreachable!("a vacant place is not looked at"),
        }
    }

    pub(super) fn set_state(&mut self, state: State) {
        self.standing = state.pack();
    }
}

impl State {
    fn pack(self) -> u32 {
        let (state, number) = match self {
            Self::Withdrawn => (WITHDRAWN, 0),
            Self::Unrouted => (UNROUTED, 0),
            Self::Due { place } => (DUE, place),
            Self::Ready { pair } => (READY, pair),
            Self::Out { pair } => (OUT, pair),
        };
        assert!(number <= NUMBER_MAX, "there are fewer places and pairs than entries");
        number << STATE_BITS | state
    }
}

/// A time in the upper 44 bits, a number in the lower 20; what is larger counts as the largest.
#[derive(Debug, Clone, Copy)]
struct TimeAndNumber(u64);

impl TimeAndNumber {
    fn new(time_ms: u64, number: u32) -> Self {
        let largest = (1 << TIME_NUMBER_BITS) - 1;
        Self(time_ms.min(u64::MAX >> TIME_NUMBER_BITS) << TIME_NUMBER_BITS | u64::from(number.min(largest)))
    }

    fn time_ms(self) -> u64 {
        self.0 >> TIME_NUMBER_BITS
    }

    fn number(self) -> u32 {
        self.0 as u32 & ((1 << TIME_NUMBER_BITS) - 1)
    }
}

const TIME_NUMBER_BITS: u32 = 20;
const _: () = assert!(AnswerId::NUMBER_MAX < 1 << TIME_NUMBER_BITS);

const STATE_BITS: u32 = 3;
const STATE_MASK: u32 = (1 << STATE_BITS) - 1;
const VACANT: u32 = 0;
const WITHDRAWN: u32 = 1;
const UNROUTED: u32 = 2;
const DUE: u32 = 3;
const READY: u32 = 4;
const OUT: u32 = 5;
/// The largest place, pair or key.
const NUMBER_MAX: u32 = u32::MAX >> STATE_BITS;

/// 160 KiB a chunk.
const CHUNK_ENTRIES: usize = 4_096;
const NOWHERE: EntryKey = EntryKey(u32::MAX);

#[cfg(test)]
mod tests {
    use postrider_spool::record::{LogId, Sequence};

    use super::*;

    pub(in crate::schedule) fn new_entry(message: u64, due_ms: u64, attempts: u32) -> NewEntry<'static> {
        NewEntry {
            message: MessageId::new(LogId(0), Sequence(message)),
            recipients: &[0],
            queue: QueueKey(0),
            attempts,
            due_ms,
            expires_ms: due_ms + 1,
            answer: AnswerId::NONE,
        }
    }

    #[test]
    fn fields_do_not_touch_one_another() {
        let mut entries = Entries::default();
        let key = entries.insert(new_entry(1, 1_800_000_000_123, 7), None);
        entries[key].set_answer(AnswerId::from_number(AnswerId::NUMBER_MAX as u32));
        for state in [State::Out { pair: NUMBER_MAX }, State::Ready { pair: 9 }, State::Withdrawn, State::Unrouted] {
            entries[key].set_state(state);
            assert_eq!(entries[key].state(), state);
        }
        let entry = &entries[key];
        assert_eq!((entry.due_ms(), entry.expires_ms()), (1_800_000_000_123, 1_800_000_000_124));
        assert_eq!((entry.attempts(), entry.answer().number() as usize), (7, AnswerId::NUMBER_MAX));
        entries[key].set_due(u64::MAX, u32::MAX);
        assert_eq!((entries[key].due_ms(), entries[key].attempts()), ((1 << 44) - 1, (1 << 20) - 1));
        assert_eq!(entries[key].expires_ms(), 1_800_000_000_124);
    }

    #[test]
    fn a_message_is_a_ring_whichever_of_its_entries_go() {
        for gone in 0..4_usize {
            let mut entries = Entries::default();
            let alone = entries.insert(new_entry(1, 1, 0), None);
            let mut keys = vec![entries.insert(new_entry(2, 1, 0), None)];
            for _ in 0..3 {
                let behind = keys.last().copied();
                keys.push(entries.insert(new_entry(2, 1, 0), behind));
            }
            assert_eq!(entries.ring(keys[2]).collect::<Vec<_>>(), [keys[2], keys[3], keys[0], keys[1]]);
            let removed = keys.remove(gone);
            let other = entries.remove(removed).expect("three are left");
            assert_eq!(entries.ring(keys[0]).collect::<Vec<_>>(), keys);
            assert!(keys.contains(&other));
            assert_eq!(entries.insert(new_entry(3, 1, 0), None), removed, "the place is reused");
            assert_eq!(entries.ring(removed).count(), 1);
            assert_eq!(entries.remove(alone), None);
            assert_eq!(entries.keys().count(), entries.len());
        }
    }

    #[test]
    fn an_empty_home_has_given_its_memory_back() {
        let mut entries = Entries::default();
        let keys: Vec<EntryKey> =
            (0..3 * CHUNK_ENTRIES as u64).map(|i| entries.insert(new_entry(i, i, 0), None)).collect();
        assert_eq!(entries.places(), 3 * CHUNK_ENTRIES);
        let full = entries.allocated_bytes();
        for key in keys {
            entries.remove(key);
        }
        assert_eq!((entries.len(), entries.places()), (0, 0));
        assert!(entries.allocated_bytes() < full / 2);
        assert!(entries.get(EntryKey(5_000)).is_none());
        assert_eq!(entries.insert(new_entry(1, 1, 0), None), EntryKey(0));
    }
}
