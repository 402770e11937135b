//! Entries that wait for a time.
//!
//! Times are wall-clock milliseconds, because due times survive a restart. The order is exact: an entry is handed out
//! at the first look at or after its due time, oldest due first, and of several due at once the one of the lowest key.
//!
//! A heap of keys is four bytes an entry: the due time is the entry's own, and the entry knows its place in the heap,
//! so one that goes another way is taken out at once. Retries have a heap of their own, or each new message would pay
//! for sinking through a backlog of millions.

use super::entry::{Entries, EntryKey, State};

/// Due times of the entries of one home.
#[derive(Debug, Default)]
pub(super) struct DueTimes {
    first_attempts: Heap,
    retries: Heap,
    /// Of the entries that wait.
    recipients: u64,
}

/// Each key's entry is due no earlier than the one of its parent, which is at a quarter of its place.
#[derive(Debug, Default)]
struct Heap {
    keys: Vec<EntryKey>,
}

impl DueTimes {
    /// The entry waits for its due time: it is [`State::Due`] from here on.
    pub(super) fn insert(&mut self, entries: &mut Entries, key: EntryKey) {
        assert!(!matches!(entries[key].state(), State::Due { .. }), "an entry waits once");
        self.recipients += entries.recipients(key).len() as u64;
        self.heap_of(entries, key).push(entries, key);
    }

    /// Takes an entry out that waits. It is to get another state.
    pub(super) fn remove(&mut self, entries: &mut Entries, key: EntryKey) {
        let State::Due { place } = entries[key].state() else { unreachable!("only an entry that waits is taken out") };
        self.recipients -= entries.recipients(key).len() as u64;
        self.heap_of(entries, key).remove(entries, place as usize, key);
    }

    /// The next entry whose time has come. It is to get another state.
    pub(super) fn pop_due(&mut self, entries: &mut Entries, wall_ms: u64) -> Option<EntryKey> {
        let (due_ms, key) = self.next(entries)?;
        if due_ms > wall_ms {
            return None;
        }
        self.recipients -= entries.recipients(key).len() as u64;
        self.heap_of(entries, key).remove(entries, 0, key);
        Some(key)
    }

    /// All entries that wait, in no order, so that they can get other due times. Each is to get another state, or to be
    /// inserted again.
    pub(super) fn take_all(&mut self) -> Vec<EntryKey> {
        let mut keys = std::mem::take(&mut self.first_attempts.keys);
        keys.append(&mut self.retries.keys);
        self.recipients = 0;
        keys
    }

    /// An entry that waits has other recipients now.
    pub(super) fn recount(&mut self, before: usize, after: usize) {
        self.recipients = self.recipients - before as u64 + after as u64;
    }

    pub(super) fn recipient_count(&self) -> u64 {
        self.recipients
    }

    /// Wall milliseconds of the next due entry.
    pub(super) fn next_ms(&self, entries: &Entries) -> Option<u64> {
        self.next(entries).map(|(due_ms, _)| due_ms)
    }

    pub(super) fn allocated_bytes(&self) -> usize {
        (self.first_attempts.keys.capacity() + self.retries.keys.capacity()) * size_of::<EntryKey>()
    }

    fn next(&self, entries: &Entries) -> Option<(u64, EntryKey)> {
        let heaps = [&self.first_attempts, &self.retries];
        heaps.into_iter().filter_map(|heap| heap.keys.first()).map(|&key| rank(entries, key)).min()
    }

    /// Attempts don't change while an entry waits.
    fn heap_of(&mut self, entries: &Entries, key: EntryKey) -> &mut Heap {
        if entries[key].attempts() == 0 { &mut self.first_attempts } else { &mut self.retries }
    }
}

impl Heap {
    fn push(&mut self, entries: &mut Entries, key: EntryKey) {
        self.keys.push(key);
        self.rise(entries, self.keys.len() - 1, key);
    }

    fn remove(&mut self, entries: &mut Entries, place: usize, key: EntryKey) {
        let removed = self.keys.swap_remove(place);
        assert!(removed == key, "an entry knows its place");
        if let Some(&moved) = self.keys.get(place) {
            self.sink(entries, place, moved);
        }
        if self.keys.len() < self.keys.capacity() / 4 {
            self.keys.shrink_to((2 * self.keys.len()).max(CAPACITY_MIN));
        }
    }

    /// Finds the key's place among those above it.
    fn rise(&mut self, entries: &mut Entries, mut place: usize, key: EntryKey) {
        let own = rank(entries, key);
        while place > 0 {
            let parent = (place - 1) / CHILDREN;
            let above = self.keys[parent];
            if rank(entries, above) < own {
                break;
            }
            self.put(entries, place, above);
            place = parent;
        }
        self.put(entries, place, key);
    }

    /// Finds the key's place among those below it, or, as it may come from another branch, above it.
    fn sink(&mut self, entries: &mut Entries, mut place: usize, key: EntryKey) {
        let own = rank(entries, key);
        loop {
            let first = place * CHILDREN + 1;
            let last = (first + CHILDREN).min(self.keys.len());
            let children = (first..last).map(|child| (rank(entries, self.keys[child]), child));
            match children.min() {
                Some(((due_ms, below), child)) if (due_ms, below) < own => {
                    self.put(entries, place, below);
                    place = child;
                }
                _ => return self.rise(entries, place, key),
            }
        }
    }

    fn put(&mut self, entries: &mut Entries, place: usize, key: EntryKey) {
        self.keys[place] = key;
        entries[key].set_state(State::Due { place: place as u32 });
    }
}

fn rank(entries: &Entries, key: EntryKey) -> (u64, EntryKey) {
    (entries[key].due_ms(), key)
}

/// Their keys share a cache line, so a level costs little more than with two.
const CHILDREN: usize = 4;
/// Keys for which memory is kept.
const CAPACITY_MIN: usize = 1_024;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use postrider_spool::record::{LogId, MessageId, Sequence};

    use super::*;
    use crate::schedule::answer::AnswerId;
    use crate::schedule::entry::NewEntry;
    use crate::schedule::queue::QueueKey;

    #[derive(Default)]
    struct World {
        entries: Entries,
        due: DueTimes,
    }

    impl World {
        fn insert(&mut self, due_ms: u64, attempts: u32) -> EntryKey {
            let new = NewEntry {
                message: MessageId::new(LogId(0), Sequence(1)),
                recipients: &[0],
                queue: QueueKey(0),
                attempts,
                due_ms,
                expires_ms: u64::MAX,
                answer: AnswerId::NONE,
            };
            let key = self.entries.insert(new, None);
            self.due.insert(&mut self.entries, key);
            key
        }

        fn pop_due(&mut self, wall_ms: u64) -> Option<EntryKey> {
            let key = self.due.pop_due(&mut self.entries, wall_ms)?;
            self.entries[key].set_state(State::Unrouted);
            Some(key)
        }

        fn next_ms(&self) -> Option<u64> {
            self.due.next_ms(&self.entries)
        }
    }

    #[test]
    fn entries_come_out_oldest_first_and_never_early() {
        let mut world = World::default();
        let (last, first, second) = (world.insert(300, 0), world.insert(100, 1), world.insert(200, 0));
        assert_eq!(world.next_ms(), Some(100));
        assert_eq!(world.pop_due(99), None);
        assert_eq!(world.pop_due(200), Some(first));
        assert_eq!(world.pop_due(200), Some(second));
        assert_eq!(world.pop_due(200), None);
        world.due.remove(&mut world.entries, last);
        assert_eq!(world.next_ms(), None);
    }

    /// Against a sorted set: entries come and go, wait again for another time, and leave their keys to others.
    #[test]
    fn the_order_is_that_of_a_sorted_set() {
        let mut random = fastrand::Rng::with_seed(11);
        for spread_ms in [1, 20, 5_000, 500_000_000] {
            let mut world = World::default();
            let mut model = BTreeSet::new();
            let mut idle: Vec<EntryKey> = Vec::new();
            let mut wall_ms = 1_800_000_000_000;
            for step in 0..20_000 {
                let due_ms = wall_ms - 10 + random.u64(0..spread_ms);
                match random.u32(0..if step < 10_000 { 6 } else { 12 }) {
                    0..=2 => _ = model.insert((due_ms, world.insert(due_ms, random.u32(0..2)))),
                    3 if !idle.is_empty() => {
                        let key = idle.swap_remove(random.usize(..idle.len()));
                        world.entries[key].set_due(due_ms, random.u32(0..3));
                        world.due.insert(&mut world.entries, key);
                        model.insert((world.entries[key].due_ms(), key));
                    }
                    4 if !model.is_empty() => {
                        let nth = random.usize(..model.len().min(50));
                        let &(due_ms, key) = model.iter().nth(nth).expect("there are more");
                        model.remove(&(due_ms, key));
                        world.due.remove(&mut world.entries, key);
                        world.entries.remove(key);
                    }
                    5 => wall_ms += random.u64(0..spread_ms),
                    _ => {
                        let due = model.first().filter(|(due_ms, _)| *due_ms <= wall_ms).copied();
                        assert_eq!(world.pop_due(wall_ms), due.map(|(_, key)| key));
                        if let Some(due) = due {
                            model.remove(&due);
                            if random.bool() { idle.push(due.1) } else { _ = world.entries.remove(due.1) }
                        }
                    }
                }
                assert_eq!(world.next_ms(), model.first().map(|&(due_ms, _)| due_ms));
            }
            while let Some((_, key)) = model.pop_first() {
                assert_eq!(world.pop_due(u64::MAX), Some(key));
            }
            assert_eq!(world.next_ms(), None);
        }
    }
}
