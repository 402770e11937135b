//! Entries with an owner, and how they come back: untried, deferred, or in part.

use super::{EntryKey, Home, Intent};
use crate::schedule::entry::{NewEntry, State};

impl Home {
    pub fn is_out(&self, key: EntryKey) -> bool {
        matches!(self.entries[key].state(), State::Out { .. })
    }

    /// The ticket came back without an attempt: the entry keeps its attempts and due time, and is routed anew.
    pub fn take_back(&mut self, key: EntryKey) {
        self.leave_out(key);
        self.entries[key].set_state(State::Unrouted);
    }

    /// The same where the entry's turn had come, and its route had expired meanwhile or its permit came too early: it
    /// stays at its source, if it can.
    pub fn take_back_to(&mut self, key: EntryKey, source: usize) {
        self.take_back(key);
        self.stays_at.insert(key, source);
    }

    /// The source that the entry is to stay at.
    pub fn take_source(&mut self, key: EntryKey) -> Option<usize> {
        self.stays_at.remove(&key)
    }

    /// The entry is out, and so much of what happens to it goes on record first. It holds until the ticket comes back.
    pub fn intend(&mut self, key: EntryKey, intent: Intent) {
        assert!(matches!(self.entries[key].state(), State::Out { .. }), "only what is out can be in doubt");
        self.intents.insert(key, intent);
    }

    pub fn intent_of(&self, key: EntryKey) -> Option<&Intent> {
        self.intents.get(&key)
    }

    /// Part of the entry's recipients are settled.
    pub fn keep_only(&mut self, key: EntryKey, recipients: &[u32]) {
        let before = self.entries.recipients(key).len();
        self.entries.set_recipients(key, recipients);
        if matches!(self.entries[key].state(), State::Due { .. }) {
            self.due.recount(before, self.entries.recipients(key).len());
        }
    }

    /// An entry that [`Self::pop_due`], [`Self::take_unrouted`] or [`Self::sweep_expired`] gave out is about to end.
    pub fn withdraw_routed(&mut self, key: EntryKey) {
        let entry = &mut self.entries[key];
        assert!(matches!(entry.state(), State::Unrouted | State::Withdrawn), "it waits nowhere");
        entry.set_state(State::Withdrawn);
    }

    /// The ticket came back with an attempt made: what remains of the entry waits for a new due time.
    pub fn defer(&mut self, key: EntryKey, recipients: &[u32], attempts: u32, due_ms: u64, answer: &str) {
        self.leave_out(key);
        self.entries.set_recipients(key, recipients);
        self.set_answer(key, answer);
        self.entries[key].set_due(due_ms, attempts);
        self.due.insert(&mut self.entries, key);
    }

    /// An entry that [`Self::withdraw_one`] took waits for a new due time.
    pub fn put_back(&mut self, key: EntryKey, due_ms: u64, answer: &str) {
        // As the record has it: it was tried, though nothing may have come of it.
        let attempts = self.entries[key].attempts().max(1);
        assert!(matches!(self.entries[key].state(), State::Withdrawn), "it was taken from where it waited");
        self.set_answer(key, answer);
        self.entries[key].set_due(due_ms, attempts);
        self.due.insert(&mut self.entries, key);
    }

    /// Part of an entry's recipients go on by themselves: a new entry beside it, ready to be routed.
    pub fn split(&mut self, key: EntryKey, recipients: &[u32], attempts: u32, due_ms: u64) -> EntryKey {
        let entry = &self.entries[key];
        let part = NewEntry {
            message: entry.message,
            recipients,
            queue: entry.queue,
            attempts,
            due_ms,
            expires_ms: entry.expires_ms(),
            answer: self.answers.share(entry.answer()),
        };
        self.insert_entry(part, Some(key))
    }

    pub(super) fn leave_out(&mut self, key: EntryKey) {
        if let State::Out { pair } = self.entries[key].state() {
            self.intents.remove(&key);
            self.pair_mut(pair).out -= 1;
        }
    }
}
