//! What a provider's sites have in common by one source: the pairs of a roll-up take turns at its rate and connections.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::Pools;
use super::limiters::LimitOf;
use crate::limits::DELIVERIES_IN_A_ROW;
use crate::mail::time::Now;
use crate::pool::connection::{ConnectionKey, Slot, SlotState};
use crate::pool::rate::Limiter;

/// What a provider's sites have in common, by one source.
#[derive(Debug)]
pub(super) struct Rollup {
    pub(super) source: usize,
    pub(super) name: Arc<str>,
    pub(super) connection_limit: Option<u32>,
    pub(super) messages: Option<Limiter>,
    /// Of all its pairs, in any state.
    pub(super) open: Vec<ConnectionKey>,
    /// Pairs that wait for the rate, and for a connection.
    pub(super) turns: VecDeque<u32>,
    pub(super) slots_wanted: VecDeque<u32>,
    pub(super) wakes_at: Option<Duration>,
}

impl Pools {
    pub(super) fn enter_rollup(&mut self, place: u32) {
        let key = &self.pairs[place as usize].key;
        let (source, name) = (key.source, Arc::clone(&key.rollup));
        let rollup = self.rollup_at(source, &name);
        let pair = &mut self.pairs[place as usize];
        pair.pace.rollup = Some(rollup);
        self.rollups[rollup as usize].open.extend(&pair.open);
    }

    /// The place of what a provider's sites have in common.
    pub(super) fn rollup_at(&mut self, source: usize, name: &Arc<str>) -> u32 {
        if let Some(&rollup) = self.rollup_keys.get(&(source, Arc::clone(name))) {
            return rollup;
        }
        self.rollups.push(Rollup {
            source,
            name: Arc::clone(name),
            connection_limit: None,
            messages: None,
            open: Vec::new(),
            turns: VecDeque::new(),
            slots_wanted: VecDeque::new(),
            wakes_at: None,
        });
        let rollup = self.rollups.len() as u32 - 1;
        self.rollup_keys.insert((source, Arc::clone(name)), rollup);
        rollup
    }

    /// Whether the pair may open one more connection now, as far as rates go.
    pub(super) fn may_connect(&mut self, now: Now, place: u32) -> bool {
        let pair = &self.pairs[place as usize];
        let next = &pair.tickets[pair.opening as usize];
        let units = next.recipients.len() as u32;
        if !self.has_quota(now, place, units) {
            return false;
        }
        let pair = &self.pairs[place as usize];
        // A connection is opened for what may be written now; as many as a burst may be opened at once.
        let rates = pair.pace.messages.iter().chain(&pair.pace.stricter);
        let burst = rates.map(|limiter| limiter.rate().max_burst).min().unwrap_or(u32::MAX);
        let rollup = pair.pace.rollup;
        let is_enough = pair.opening >= burst;
        let own = self.ready_at(LimitOf::Messages(place), units).max(self.ready_at(LimitOf::Stricter(place), units));
        let shared = rollup.map_or(Duration::ZERO, |rollup| self.ready_at(LimitOf::Rollup(rollup), units));
        // Nothing but a reservation or another pair's MAIL tells when that will be.
        if let (Some(rollup), Duration::MAX) = (rollup, shared) {
            self.await_turn(now, place, rollup, shared);
            return false;
        }
        let ready = own.max(shared).max(self.ready_at(LimitOf::Connections(place), 1));
        if ready > now.monotonic {
            self.wake_pair(now, place, ready);
            return false;
        }
        !is_enough
    }

    /// Whether its provider lets it have one more; if not, the pair stands in line. Only a pair that has a host to
    /// connect to may ask: others make room for it.
    pub(super) fn has_slot(&mut self, place: u32) -> bool {
        let Some(rollup) = self.pairs[place as usize].pace.rollup else { return true };
        let shared = &self.rollups[rollup as usize];
        let Some(limit) = shared.connection_limit else { return true };
        let is_its_turn = self.serving == Some(place) || shared.slots_wanted.is_empty();
        if is_its_turn && shared.open.len() < limit as usize {
            return true;
        }
        if !std::mem::replace(&mut self.pairs[place as usize].pace.waits_for_slot, true) {
            self.rollups[rollup as usize].slots_wanted.push_back(place);
        }
        // An idle connection of another site makes room, one for each that waits.
        let shared = &self.rollups[rollup as usize];
        let states = shared.open.iter().map(|&connection| (connection, self.slots.state(connection)));
        let closing = states.clone().filter(|(_, state)| *state == SlotState::Closing).count();
        let idle =
            states.filter(|(_, state)| matches!(state, SlotState::Idle { .. })).map(|(connection, _)| connection);
        let idle: Vec<ConnectionKey> = idle.take(shared.slots_wanted.len().saturating_sub(closing)).collect();
        for connection in idle {
            self.quit(connection);
        }
        false
    }

    /// A connection counts for the provider too, from here on.
    pub(super) fn join_rollup(&mut self, now: Now, place: u32, connection: ConnectionKey) {
        if let Some(limiter) = self.limiter(LimitOf::Connections(place)) {
            limiter.take(now.monotonic, 1);
        }
        if let Some(rollup) = self.pairs[place as usize].pace.rollup {
            let rollup = &mut self.rollups[rollup as usize];
            rollup.open.push(connection);
            let limit = rollup.connection_limit.map_or(usize::MAX, |limit| limit as usize);
            assert!(rollup.open.len() <= limit, "LIMITS-HOLD: a provider's connections");
            if self.serving == Some(place) {
                self.serving = None;
            }
        }
    }

    /// The peer has closed: who waits for a connection of the provider is served before the pair that had it.
    pub(super) fn leave_rollup(
        &mut self,
        now: Now,
        place: u32,
        connection: ConnectionKey,
        random: &mut dyn FnMut(u64) -> u64,
    ) {
        let Some(rollup) = self.pairs[place as usize].pace.rollup else { return };
        self.rollups[rollup as usize].open.retain(|&open| open != connection);
        for _ in 0..self.rollups[rollup as usize].slots_wanted.len() {
            let shared = &mut self.rollups[rollup as usize];
            if shared.connection_limit.is_some_and(|limit| shared.open.len() >= limit as usize) {
                return;
            }
            let Some(waiting) = shared.slots_wanted.pop_front() else { return };
            self.pairs[waiting as usize].pace.waits_for_slot = false;
            self.serve(now, waiting, random);
        }
    }

    /// Whether the pair has more connections than it may have by now, those that are ending left aside.
    pub(super) fn is_surplus(&self, place: u32) -> bool {
        let pair = &self.pairs[place as usize];
        let limit = pair.shaping.connection_limit as usize;
        let rollup = pair.pace.rollup.map(|rollup| &self.rollups[rollup as usize]);
        let shared = rollup.and_then(|rollup| Some((&rollup.open, rollup.connection_limit? as usize)));
        let surplus = |open: &[ConnectionKey], limit: usize| open.len() > limit && self.staying_of(open) > limit;
        surplus(&pair.open, limit) || shared.is_some_and(|(open, limit)| surplus(open, limit))
    }

    /// Whether an idle connection is to go, because others wait for one, or there are too many. A new one is used
    /// first: else sites whose other connections are slow would pass it to and fro, and send nothing by it.
    pub(super) fn gives_way(&self, connection: ConnectionKey, is_new: bool) -> bool {
        let place = self.slots.get(connection).pair;
        self.is_surplus(place)
            || match self.pairs[place as usize].tickets.is_empty() {
                true => self.others_want_slots(place, |_| true),
                false => !is_new && self.has_to_give_way(connection),
            }
    }

    /// Whether no further transaction is to ride on this connection: its pair has one for another pair, which then has
    /// no more than are left; once this one has had its share, for any that has fewer.
    pub(super) fn has_to_give_way(&self, connection: ConnectionKey) -> bool {
        let &Slot { pair, deliveries, .. } = self.slots.get(connection);
        let ahead = if deliveries < DELIVERIES_IN_A_ROW { 1 } else { 0 };
        self.pairs[pair as usize].open.len() > ahead
            && self.others_want_slots(pair, |other| self.staying(other) + ahead < self.staying(pair))
    }

    /// Whether more of these others wait for a connection than are about to get one. Thousands may wait, each domain of
    /// a provider at hosts of its own: few of them are looked at.
    fn others_want_slots(&self, place: u32, is_meant: impl Fn(u32) -> bool) -> bool {
        let Some(rollup) = self.pairs[place as usize].pace.rollup else { return false };
        let shared = &self.rollups[rollup as usize];
        if shared.slots_wanted.is_empty() {
            return false;
        }
        let closing = shared.open.len() - self.staying_of(&shared.open);
        shared.slots_wanted.iter().filter(|&&waiting| waiting != place && is_meant(waiting)).nth(closing).is_some()
    }

    /// How many connections a pair has that are not ending.
    fn staying(&self, place: u32) -> usize {
        self.staying_of(&self.pairs[place as usize].open)
    }

    fn staying_of(&self, open: &[ConnectionKey]) -> usize {
        open.iter().filter(|&&connection| self.slots.state(connection) != SlotState::Closing).count()
    }
}
