//! How the pairs of one egress source and roll-up move to another shard, with all that their owner knows of them.
//!
//! Limits are exact because one shard keeps them, so nothing may be under way at two: an owner lets a roll-up go when
//! it has no connection there (each counts until the peer's FIN), no ticket, no credit, no permit and no reservation
//! that is not answered. Under load it comes to that only if it gives out nothing more; so a move is:
//!
//! | # | from → to | message | what it means |
//! |---|---|---|---|
//! | 1 | control → owner | `Release` | It winds down: see below. |
//! | 2 | owner → every home | `Withdraw` | All credits are void, and the home sends nothing more. |
//! | 2 | owner → keeper | `Unwant` | What it wants there under limits over many pairs, and waits, does not any more. |
//! | 3 | home, keeper → owner | `Withdrawn`, `Unwanted` | Nothing of it is under way: messages keep their order. |
//! | 4 | owner → control | `Released` | The state, in one piece; the owner has forgotten all. |
//! | 5 | control → new owner | `TakeOver` | It has the state from now on. |
//! | 6 | new owner → control | `TookOver` | The directory names the new owner from now on. |
//! | 7 | control → every home | `Moved` | The home tells the new owner what it has ready, and sends tickets. |
//!
//! To wind down it gives no more credits, sends tickets that aren't begun home (no attempt is counted), closes idle
//! connections, and lets the rest finish.
//!
//! **Giving up.** If the owner isn't at 4 after [`MOVE_PATIENCE`], because of a long transaction or a shard that stands
//! still, it goes on as before: it sends every home `Moved` with its own number instead, behind the `Withdraw`, and
//! tells control so. Homes that had not answered do so later; the number of the attempt tells which one is meant.
//!
//! **Races.**
//! * A home that asks for an owner meanwhile is told the old one. It keeps to `Withdraw` until `Moved` comes; and what
//!   control told before comes before `Moved`, because between the two threads order is kept as well. Whoever hears of
//!   the old owner before `Withdraw` is one more home that sends to it, and answers `Withdraw` behind that.
//! * A new owner's `Withdraw` comes behind the `Moved` that names it: control has told all homes that before it begins
//!   another move, and a shard takes what comes from all threads out of one queue.
//! * A ticket whose message is being read when `Withdraw` comes is taken back when it has been read.
//! * A suspension that the old owner knows of is known to the new one before `TakeOver`, because both come by way of
//!   control. Each goes by its own list when a ticket comes, not by what its pairs were.
//! * Nothing tells homes of a block once the owner has withdrawn: it could come behind the new owner's credits.
//! * Trust in hosts, suspensions and the limits that rules have set are every shard's already.
//!
//! What is not kept: who has had how many turns. Each flow begins at the new owner where the others do.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::limiters::LimitOf;
use super::pacing::Wake;
use super::{Carried, Order, Pair, Pools};
use crate::handover::{Attempt, RollupKey};
use crate::limits::{MOVE_PATIENCE, ROLLUPS_TOLD_MAX};
use crate::mail::time::Now;
use crate::pool::automation::Counted;
use crate::pool::connection::SlotState;
use crate::pool::demand::Demand;
use crate::pool::rate::Limiter;
use crate::pool::warmup::DayQuota;

/// All that an owner knows of a roll-up: limits with what they have counted, back-off, quotas, thresholds.
#[derive(Debug)]
pub struct OwnerState {
    rollup: RollupKey,
    /// Without tickets, connections and demand.
    pairs: Vec<Pair>,
    /// What its sites have in common, where a provider rolls them up.
    shared: Option<Shared>,
    day: Option<DayQuota>,
    /// What rules with a threshold have seen.
    pub(crate) counted: Vec<Counted>,
}

#[derive(Debug)]
struct Shared {
    connection_limit: Option<u32>,
    messages: Option<Limiter>,
}

/// A roll-up that is being let go.
#[derive(Debug)]
pub(super) struct Leaving {
    rollup: RollupKey,
    number: u64,
    /// Until then.
    until: Duration,
    /// Who has not answered yet.
    homes: Vec<usize>,
    keeper: bool,
}

impl OwnerState {
    pub fn rollup(&self) -> &RollupKey {
        &self.rollup
    }
}

impl Pools {
    /// The roll-up is to be let go; [`Self::poll_released`] tells when it is. Only one at a time.
    pub fn release(&mut self, now: Now, rollup: RollupKey) {
        assert!(self.leaving.is_none(), "one move at a time");
        self.releases += 1;
        let number = self.releases;
        let homes: Vec<usize> = (0..self.options.homes).collect();
        for &home in &homes {
            self.orders.push_back(Order::Withdraw { home, rollup: rollup.clone(), number });
        }
        let keeper = !self.options.shared_limits.is_empty();
        if keeper {
            self.orders.push_back(Order::Unwant { rollup: rollup.clone(), number });
        }
        let until = now.monotonic + MOVE_PATIENCE;
        self.leaving = Some(Leaving { rollup, number, until, homes, keeper });
        for place in self.leaving_places() {
            self.wind_down(place);
        }
    }

    /// A home has heard of it.
    pub fn handle_withdrawn(&mut self, home: usize, number: u64) {
        let Some(leaving) = self.leaving.as_mut().filter(|leaving| leaving.number == number) else { return };
        leaving.homes.retain(|&waited| waited != home);
        for place in self.leaving_places() {
            let permits = self.pairs[place as usize].demand.leave(home);
            permits.into_iter().for_each(|permit| self.give_back(permit));
        }
    }

    /// The keeper has forgotten what waited there; also where the move was given up since.
    pub fn handle_unwanted(&mut self, now: Now, rollup: &RollupKey, number: u64) {
        if let Some(leaving) = self.leaving.as_mut().filter(|leaving| leaving.number == number) {
            leaving.keeper = false;
        }
        for place in self.places_of(rollup) {
            self.pairs[place as usize].demand.unwanted();
            self.grant(now, place);
        }
    }

    /// The roll-up that was let go, with its state; without one where it would have taken too long.
    pub fn poll_released(
        &mut self,
        now: Now,
        random: &mut dyn FnMut(u64) -> u64,
    ) -> Option<(RollupKey, Option<Box<OwnerState>>)> {
        let leaving = self.leaving.as_ref()?;
        if leaving.homes.is_empty() && !leaving.keeper && self.orders.is_empty() && self.has_wound_down() {
            let rollup = self.leaving.take().expect("it was just there").rollup;
            let state = self.take_out(&rollup);
            return Some((rollup, Some(Box::new(state))));
        }
        if now.monotonic < leaving.until {
            return None;
        }
        let rollup = self.leaving.take().expect("it was just there").rollup;
        for home in 0..self.options.homes {
            self.orders.push_back(Order::Keep { home, rollup: rollup.clone() });
        }
        for place in self.places_of(&rollup) {
            for home in 0..self.options.homes {
                let permits = self.pairs[place as usize].demand.leave(home);
                permits.into_iter().for_each(|permit| self.give_back(permit));
            }
            self.advance(now, place, random);
        }
        Some((rollup, None))
    }

    /// What another shard has let go.
    pub fn take_over(&mut self, now: Now, random: &mut dyn FnMut(u64) -> u64, state: OwnerState) {
        let OwnerState { rollup: RollupKey { source, rollup }, pairs, shared, day, counted: _ } = state;
        if let Some(day) = day {
            self.days.insert((source, Arc::clone(&rollup)), day);
        }
        if let Some(Shared { connection_limit, messages }) = shared {
            let shared = self.rollup_at(source, &rollup);
            let shared = &mut self.rollups[shared as usize];
            shared.connection_limit = connection_limit;
            shared.messages = messages;
        }
        for mut pair in pairs {
            // Homes are met anew.
            pair.demand = Demand::new(self.options.homes, Arc::clone(&self.options.shared_limits));
            let configured = Arc::clone(&pair.configured);
            let known = self.keys.contains_key(&pair.key);
            assert!(!known, "LIMITS-HOLD: a pair has one owner");
            let place = self.put(pair);
            self.shape(place, &configured);
            self.advance(now, place, random);
        }
    }

    /// What was carried lately, in transactions a second, by roll-up: those with the most.
    pub fn carried(&self) -> Vec<(RollupKey, f64)> {
        let mut sums: BTreeMap<RollupKey, f64> = BTreeMap::new();
        for pair in &self.pairs {
            if pair.carried.lately >= CARRIED_MIN {
                *sums.entry(pair.key.rollup_key()).or_default() += pair.carried.lately;
            }
        }
        let mut carried: Vec<(RollupKey, f64)> = sums.into_iter().collect();
        carried.sort_by(|(_, a), (_, b)| b.total_cmp(a));
        carried.truncate(ROLLUPS_TOLD_MAX);
        carried
    }

    /// When [`Self::poll_released`] gives up.
    pub(super) fn leaving_until(&self) -> Option<Duration> {
        self.leaving.as_ref().map(|leaving| leaving.until)
    }

    pub(super) fn is_leaving(&self, place: u32) -> bool {
        self.leaving.as_ref().is_some_and(|leaving| leaving.rollup.covers(&self.pairs[place as usize].key))
    }

    /// Nothing more is begun: tickets go home, and stay at the source, where their turn had come; idle connections end.
    pub(super) fn wind_down(&mut self, place: u32) {
        let pair = &mut self.pairs[place as usize];
        for attempt in std::mem::take(&mut pair.tickets) {
            self.send_back(place, attempt);
        }
        for connection in self.pairs[place as usize].open.clone() {
            if matches!(self.slots.state(connection), SlotState::Idle { .. }) {
                self.quit(connection);
            }
        }
    }

    pub(super) fn send_back(&mut self, place: u32, attempt: Box<Attempt>) {
        let demand = &mut self.pairs[place as usize].demand;
        demand.send_home(&attempt.flow, attempt.recipients.len() as u32);
        self.orders.push_back(Order::Return { attempt, stays: true });
    }

    fn leaving_places(&self) -> Vec<u32> {
        self.leaving.as_ref().map(|leaving| self.places_of(&leaving.rollup)).unwrap_or_default()
    }

    fn places_of(&self, rollup: &RollupKey) -> Vec<u32> {
        let mut places: Vec<u32> =
            self.keys.iter().filter(|(key, _)| rollup.covers(key)).map(|(_, &place)| place).collect();
        // A map has no order, but what comes next must not depend on chance.
        places.sort_unstable();
        places
    }

    /// No connection, no ticket, and nothing that others may still answer.
    fn has_wound_down(&self) -> bool {
        let Some(Leaving { rollup, .. }) = &self.leaving else { return false };
        let is_quiet = |&place: &u32| {
            let pair = &self.pairs[place as usize];
            let is_reserving = pair.pace.limiters().any(Limiter::is_reserving);
            pair.open.is_empty() && pair.tickets.is_empty() && pair.demand.is_idle() && !is_reserving
        };
        let key = (rollup.source, Arc::clone(&rollup.rollup));
        let shared = self.rollup_keys.get(&key).map(|&shared| &self.rollups[shared as usize]);
        let is_reserving = shared.and_then(|shared| shared.messages.as_ref()).is_some_and(Limiter::is_reserving)
            || self.days.get(&key).is_some_and(DayQuota::is_reserving);
        !is_reserving && self.places_of(rollup).iter().all(is_quiet)
    }

    fn take_out(&mut self, rollup: &RollupKey) -> OwnerState {
        let key = (rollup.source, Arc::clone(&rollup.rollup));
        let shared_place = self.rollup_keys.get(&key).copied();
        let places = self.places_of(rollup);
        self.reserving.retain(|_, of| match of {
            LimitOf::Messages(place) | LimitOf::Connections(place) | LimitOf::Stricter(place) | LimitOf::Day(place) => {
                !places.contains(place)
            }
            LimitOf::Rollup(place) => Some(*place) != shared_place,
        });
        let shared = shared_place.map(|place| {
            let shared = &mut self.rollups[place as usize];
            if let Some(at) = shared.wakes_at.take() {
                self.wakes.remove(&(at, Wake::Rollup(place)));
            }
            shared.turns.clear();
            shared.slots_wanted.clear();
            assert!(shared.open.is_empty(), "a roll-up moves without connections");
            Shared { connection_limit: shared.connection_limit.take(), messages: shared.messages.take() }
        });
        let pairs = places.into_iter().map(|place| self.take_out_pair(place)).collect();
        OwnerState { rollup: rollup.clone(), pairs, shared, day: self.days.remove(&key), counted: Vec::new() }
    }

    fn take_out_pair(&mut self, place: u32) -> Pair {
        let key = self.pairs[place as usize].key.clone();
        self.keys.remove(&key);
        let mut pair = self.vacate(place, key);
        self.free.sort_unstable();
        if let Some(until) = pair.blocked_until.take() {
            self.blocked.remove(&(until, place));
        }
        if let Some(at) = pair.pace.leave() {
            self.wakes.remove(&(at, Wake::Pair(place)));
        }
        assert!(pair.open.is_empty() && pair.tickets.is_empty(), "a pair moves without connections and tickets");
        // Blocks are found out about by the back-off that is kept, and suspensions by each shard's list.
        pair.suspended = false;
        pair
    }
}

impl Carried {
    /// A second has gone by.
    pub(super) fn tick(&mut self) {
        let now = f64::from(std::mem::take(&mut self.now));
        self.lately += (now - self.lately) / CARRIED_SECONDS;
    }
}

/// Over how many seconds it is averaged what a pair carries, and what counts as nothing.
const CARRIED_SECONDS: f64 = 4.0;
const CARRIED_MIN: f64 = 0.1;
