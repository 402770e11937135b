//! What rates and a provider's limits let a pair do now, and when it is woken to go on.
//!
//! A transaction needs its units of the pair's message rate and, where a provider rolls sites up, of the provider's.
//! The pairs of a provider wait for that one in turn, and for its connections likewise.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use ahash::HashMap;

use super::{Order, Pair, Pools};
use crate::config::{LimitSettings, Rate, Shaping};
use crate::handover::{Attempt, Blocked, PairKey};
use crate::limits::{PACED_AHEAD, PACED_NOTICE_INTERVAL};
use crate::mail::time::Now;
use crate::pool::connection::{ConnectionKey, SlotState};
use crate::pool::rate::{Limiter, Past, PastLimits, Started};
use crate::pool::suspension::StricterLimits;

/// A pair's rates, and what it waits for.
#[derive(Debug, Default)]
pub(super) struct Pace {
    messages: Option<Limiter>,
    connections: Option<Limiter>,
    /// A rate that a rule has set, beside the configured one.
    stricter: Option<Limiter>,
    wakes_at: Option<Duration>,
    told_at: Option<Duration>,
    /// What homes were told, and until when it holds.
    told: Option<(Duration, Blocked)>,
    rollup: Option<u32>,
    /// It stands in its roll-up's queues.
    waits_for_turn: bool,
    waits_for_slot: bool,
}

impl Pace {
    pub(super) fn is_idle(&self, now: Duration) -> bool {
        self.wakes_at.is_none()
            && !self.waits_for_turn
            && !self.waits_for_slot
            && self.limiters().all(|limiter| limiter.is_idle(now))
    }

    pub(super) fn limiters(&self) -> impl Iterator<Item = &Limiter> {
        [&self.messages, &self.connections, &self.stricter].into_iter().flatten()
    }

    /// Stands and waits nowhere any more, and keeps what it has counted. Returns when it would have been woken.
    pub(super) fn leave(&mut self) -> Option<Duration> {
        (self.rollup, self.waits_for_turn, self.waits_for_slot) = (None, false, false);
        (self.told_at, self.told) = (None, None);
        self.wakes_at.take()
    }
}

/// What a provider's sites have in common, by one source.
#[derive(Debug)]
pub(super) struct Rollup {
    source: usize,
    name: Arc<str>,
    pub(super) connection_limit: Option<u32>,
    pub(super) messages: Option<Limiter>,
    /// Of all its pairs, in any state.
    pub(super) open: Vec<ConnectionKey>,
    /// Pairs that wait for the rate, and for a connection.
    pub(super) turns: VecDeque<u32>,
    pub(super) slots_wanted: VecDeque<u32>,
    pub(super) wakes_at: Option<Duration>,
}

/// Who is woken: the place of a pair or of a roll-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Wake {
    Pair(u32),
    Rollup(u32),
}

/// Whose limit, by its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LimitOf {
    Messages(u32),
    Connections(u32),
    /// Of messages, as a rule has set it.
    Stricter(u32),
    Rollup(u32),
    /// A day of a warm-up; the place is one of the pairs that share it.
    Day(u32),
}

impl Pools {
    /// Limits count from here on; to be called before anything else, and again as one likes.
    pub fn begin(&mut self, now: Now) {
        self.started.get_or_insert(Started { monotonic: now.monotonic, wall_ms: now.wall_ms });
        self.turn_began = now.monotonic;
    }

    /// What was reserved before this start, by limit; to be called before anything else.
    pub fn recall(&mut self, past: Arc<PastLimits>) {
        self.past = past;
    }

    /// What the next engine has to know, where this one sends nothing more: of each limit that is kept.
    pub fn past(&self, now: Now) -> Vec<(Arc<str>, Past)> {
        let of_pair = |&place: &u32| {
            let pace = &self.pairs[place as usize].pace;
            [
                (LimitOf::Messages(place), &pace.messages),
                (LimitOf::Connections(place), &pace.connections),
                (LimitOf::Stricter(place), &pace.stricter),
            ]
        };
        let of_rollup = |&place: &u32| (LimitOf::Rollup(place), &self.rollups[place as usize].messages);
        let limits = self.keys.values().flat_map(of_pair).chain(self.rollup_keys.values().map(of_rollup));
        let limits = limits.filter_map(|(of, limiter)| Some((self.limit_name(of), limiter.as_ref()?.past(now)?)));
        let days = self
            .days
            .iter()
            .map(|((source, rollup), day)| (self.name_of_quota(day.day, *source, rollup), day.past(now)));
        limits.chain(days).collect()
    }

    /// Units that [`Order::Reserve`] asked for are durably reserved.
    pub fn handle_reserved(&mut self, now: Now, random: &mut dyn FnMut(u64) -> u64, limit: &str, units: u32) {
        let Some(&of) = self.reserving.get(limit) else { return };
        // The place may be another pair's by now; what was reserved is then lost.
        if *self.limit_name(of) != *limit {
            self.reserving.remove(limit);
            return;
        }
        if let LimitOf::Day(place) = of {
            return self.handle_day_reserved(now, random, place, units);
        }
        if let Some(limiter) = self.limiter(of) {
            limiter.reserved(units);
        }
        match of {
            LimitOf::Day(_) => {}
            LimitOf::Messages(place) | LimitOf::Connections(place) | LimitOf::Stricter(place) => {
                self.advance(now, place, random);
            }
            LimitOf::Rollup(rollup) => self.serve_turns(now, rollup, random),
        }
    }

    /// These limits, by source and roll-up, hold from now on beside those configured, and no others.
    pub fn set_stricter(
        &mut self,
        now: Now,
        random: &mut dyn FnMut(u64) -> u64,
        stricter: HashMap<(usize, Arc<str>), StricterLimits>,
    ) {
        if stricter == self.stricter {
            return;
        }
        self.stricter = stricter;
        for place in 0..self.pairs.len() as u32 {
            let pair = &self.pairs[place as usize];
            // Places of forgotten pairs keep their last key.
            if pair.stricter != self.stricter_at(&pair.key) && self.keys.get(&pair.key) == Some(&place) {
                let configured = Arc::clone(&pair.configured);
                self.shape(place, &configured);
                self.advance(now, place, random);
            }
        }
    }

    /// What rules have put in force at a pair.
    pub fn stricter_at(&self, pair: &PairKey) -> LimitSettings {
        // Nearly always there is nothing.
        if self.stricter.is_empty() {
            return LimitSettings::default();
        }
        let limits = self.stricter.get(&(pair.source, Arc::clone(&pair.rollup)));
        limits.map_or_else(LimitSettings::default, |limits| limits.settings)
    }

    /// What is configured for a pair, as far as rules can halve it.
    pub fn configured_limits(&self, pair: &PairKey) -> LimitSettings {
        let configured = self.keys.get(pair).map(|&place| &self.pairs[place as usize].configured);
        let configured = configured.unwrap_or(&self.options.default);
        LimitSettings {
            connection_limit: Some(configured.connection_limit),
            max_deliveries_per_connection: None,
            max_message_rate: configured.max_message_rate,
        }
    }

    /// A pair's limits are those of its newest ticket, or stricter where rules say so.
    pub(super) fn shape(&mut self, place: u32, shaping: &Arc<Shaping>) {
        let is_new = self.pairs[place as usize].pace.rollup.is_none()
            && (shaping.provider_connection_limit.is_some() || shaping.provider_max_message_rate.is_some());
        let stricter = self.stricter_at(&self.pairs[place as usize].key);
        // Each home has made its own.
        let Pair { configured: known, stricter: known_stricter, .. } = &self.pairs[place as usize];
        let is_known = (Arc::ptr_eq(known, shaping) || **known == **shaping) && *known_stricter == stricter;
        if is_known && !is_new && !self.lacks_limiter(place) {
            return;
        }
        assert!(shaping.connection_limit > 0, "a pair may connect");
        let stricter_rate = self.limit(LimitOf::Stricter(place), stricter.max_message_rate);
        let messages = self.limit(LimitOf::Messages(place), shaping.max_message_rate);
        let connections = self.limit(LimitOf::Connections(place), shaping.max_connection_rate);
        if is_new {
            self.enter_rollup(place);
        }
        if let Some(rollup) = self.pairs[place as usize].pace.rollup {
            let shared = self.limit(LimitOf::Rollup(rollup), shaping.provider_max_message_rate);
            let rollup = &mut self.rollups[rollup as usize];
            rollup.messages = shared;
            rollup.connection_limit = shaping.provider_connection_limit;
        }
        let pair = &mut self.pairs[place as usize];
        pair.pace.messages = messages;
        pair.pace.connections = connections;
        pair.pace.stricter = stricter_rate;
        pair.configured = Arc::clone(shaping);
        pair.stricter = stricter;
        pair.shaping = stricter.applied_to(shaping);
        // What is too large for these limits is divided at home.
        let batch_max = pair.batch_max();
        let (fitting, large): (VecDeque<_>, VecDeque<_>) =
            pair.tickets.drain(..).partition(|attempt| attempt.recipients.len() <= batch_max);
        pair.tickets = fitting;
        self.orders.extend(large.into_iter().map(|attempt| pair.send_home(attempt)));
    }

    fn lacks_limiter(&self, place: u32) -> bool {
        let pair = &self.pairs[place as usize];
        pair.pace.messages.is_none() && pair.shaping.max_message_rate.is_some()
            || pair.pace.connections.is_none() && pair.shaping.max_connection_rate.is_some()
    }

    /// The limiter of this kind, with what it has counted, for another rate.
    fn limit(&mut self, of: LimitOf, rate: Option<Rate>) -> Option<Limiter> {
        let rate = rate?;
        let name = self.limit_name(of);
        let started = self.started.expect("limits began with the first turn");
        let past = Arc::clone(&self.past);
        let kept = match of {
            LimitOf::Messages(place) => self.pairs[place as usize].pace.messages.take(),
            LimitOf::Connections(place) => self.pairs[place as usize].pace.connections.take(),
            LimitOf::Stricter(place) => self.pairs[place as usize].pace.stricter.take(),
            LimitOf::Rollup(rollup) => self.rollups[rollup as usize].messages.take(),
            LimitOf::Day(_) => None,
        };
        match kept {
            Some(mut limiter) => {
                limiter.set_rate(self.turn_began, rate, started, past.get(&*name));
                Some(limiter)
            }
            None => Some(Limiter::new(rate, started, past.get(&*name))),
        }
    }

    fn limiter(&mut self, of: LimitOf) -> Option<&mut Limiter> {
        match of {
            LimitOf::Messages(place) => self.pairs[place as usize].pace.messages.as_mut(),
            LimitOf::Connections(place) => self.pairs[place as usize].pace.connections.as_mut(),
            LimitOf::Stricter(place) => self.pairs[place as usize].pace.stricter.as_mut(),
            LimitOf::Rollup(rollup) => self.rollups[rollup as usize].messages.as_mut(),
            LimitOf::Day(_) => None,
        }
    }

    /// The same over restarts, so that what was reserved is found again.
    fn limit_name(&self, of: LimitOf) -> Arc<str> {
        let (kind, source, name) = match of {
            LimitOf::Messages(place) | LimitOf::Connections(place) | LimitOf::Stricter(place) => {
                let kind = match of {
                    LimitOf::Connections(_) => "connections",
                    LimitOf::Stricter(_) => "stricter recipients",
                    _ => "recipients",
                };
                let key = &self.pairs[place as usize].key;
                (kind, key.source, &key.site)
            }
            LimitOf::Rollup(rollup) => {
                let rollup = &self.rollups[rollup as usize];
                ("provider recipients", rollup.source, &rollup.name)
            }
            LimitOf::Day(place) => return self.day_name(place),
        };
        format!("{kind} by {} at {name}", self.options.sources[source].name).into()
    }

    fn enter_rollup(&mut self, place: u32) {
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

    /// Whether a transaction of so many recipients may be written now. If not, the pair is woken once it may.
    pub(super) fn may_write(&mut self, now: Now, place: u32, units: u32) -> bool {
        if !self.has_quota(now, place, units) {
            return false;
        }
        let own = self.ready_at(LimitOf::Messages(place), units).max(self.ready_at(LimitOf::Stricter(place), units));
        if own > now.monotonic {
            self.wake_pair(now, place, own);
            return false;
        }
        let Some(rollup) = self.pairs[place as usize].pace.rollup else { return true };
        let shared = self.ready_at(LimitOf::Rollup(rollup), units);
        let is_its_turn = self.serving == Some(place) || self.rollups[rollup as usize].turns.is_empty();
        if is_its_turn && shared <= now.monotonic {
            return true;
        }
        if !std::mem::replace(&mut self.pairs[place as usize].pace.waits_for_turn, true) {
            self.rollups[rollup as usize].turns.push_back(place);
        }
        self.tell_paced(now, place, shared);
        self.wake_rollup(rollup, shared);
        false
    }

    /// MAIL is about to be written; [`Self::mail_written`] or [`Self::mail_not_written`] tells.
    pub(super) fn take_units(&mut self, now: Now, place: u32, units: u32) {
        for of in self.message_limits(place) {
            if let Some(limiter) = self.limiter(of) {
                limiter.lend(now.monotonic, units);
            }
        }
        self.take_quota(place, units);
        // What homes were told is over.
        self.pairs[place as usize].pace.told = None;
        if self.serving == Some(place) {
            self.serving = None;
        }
    }

    /// MAIL was written for an attempt on this connection; behind a RSET that is later than the attempt began.
    pub fn mail_written(&mut self, now: Now, connection: ConnectionKey, attempt: &mut Attempt) {
        let place = self.slots.get(connection).pair;
        for of in self.message_limits(place) {
            if let Some(limiter) = self.limiter(of) {
                limiter.settle(now.monotonic, attempt.recipients.len() as u32);
                self.wake_next(now, place, of);
            }
        }
        attempt.is_counted = true;
        self.spend(now, attempt);
    }

    /// Only now is it known when the limit lets the next pass.
    fn wake_next(&mut self, now: Now, place: u32, of: LimitOf) {
        let ready = self.ready_at(of, 1);
        match of {
            LimitOf::Rollup(rollup) if !self.rollups[rollup as usize].turns.is_empty() => {
                self.wake_rollup(rollup, ready);
            }
            LimitOf::Rollup(_) => {}
            _ if self.pairs[place as usize].tickets.is_empty() => {}
            _ => self.wake_pair(now, place, ready),
        }
    }

    /// An attempt that was given to a connection has come to nothing before its MAIL.
    pub fn mail_not_written(&mut self, now: Now, attempt: &mut Attempt) {
        if let Some(&place) = self.keys.get(&attempt.pair) {
            for of in self.message_limits(place) {
                if let Some(limiter) = self.limiter(of) {
                    limiter.give_back(attempt.recipients.len() as u32);
                    self.wake_next(now, place, of);
                }
            }
            self.pairs[place as usize].demand.refund(&attempt.flow, attempt.recipients.len() as u32);
        }
        if let Some(permit) = attempt.permit.take() {
            self.give_back(permit);
        }
    }

    fn message_limits(&self, place: u32) -> impl Iterator<Item = LimitOf> + use<> {
        let rollup = self.pairs[place as usize].pace.rollup.map(LimitOf::Rollup);
        [LimitOf::Messages(place), LimitOf::Stricter(place)].into_iter().chain(rollup)
    }

    /// Whether the pair may open one more connection now, as far as rates and its provider go.
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
        let ready = own.max(shared).max(self.ready_at(LimitOf::Connections(place), 1));
        if ready > now.monotonic {
            self.wake_pair(now, place, ready);
            return false;
        }
        !is_enough && rollup.is_none_or(|rollup| self.has_slot(place, rollup))
    }

    fn has_slot(&mut self, place: u32, rollup: u32) -> bool {
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
        let stays = |connection: &&ConnectionKey| self.slots.state(**connection) != SlotState::Closing;
        let limit = pair.shaping.connection_limit as usize;
        let rollup = pair.pace.rollup.map(|rollup| &self.rollups[rollup as usize]);
        let shared = rollup.and_then(|rollup| Some((&rollup.open, rollup.connection_limit? as usize)));
        let surplus =
            |open: &[ConnectionKey], limit: usize| open.len() > limit && open.iter().filter(stays).count() > limit;
        surplus(&pair.open, limit) || shared.is_some_and(|(open, limit)| surplus(open, limit))
    }

    /// Whether an idle connection of this pair is to go, because others wait for one, or there are too many.
    pub(super) fn gives_way(&self, place: u32) -> bool {
        let pair = &self.pairs[place as usize];
        self.is_surplus(place)
            || (self.has_to_give_way(place) || pair.tickets.is_empty()) && self.others_want_slots(place)
    }

    /// Whether no further transaction is to ride on this pair's connections.
    pub(super) fn has_to_give_way(&self, place: u32) -> bool {
        self.pairs[place as usize].open.len() > 1 && self.others_want_slots(place)
    }

    fn others_want_slots(&self, place: u32) -> bool {
        let Some(rollup) = self.pairs[place as usize].pace.rollup else { return false };
        let shared = &self.rollups[rollup as usize];
        let closing = |connection: &&ConnectionKey| self.slots.state(**connection) == SlotState::Closing;
        let others = shared.slots_wanted.iter().filter(|waiting| **waiting != place).count();
        others > 0 && shared.open.iter().filter(closing).count() < others
    }

    /// When so many units may be taken; never, as long as they wait for a reservation, which is asked for.
    fn ready_at(&mut self, of: LimitOf, units: u32) -> Duration {
        let Some(limiter) = self.limiter(of) else { return Duration::ZERO };
        let mut reservations = Vec::new();
        while let Some(units) = limiter.reserve() {
            reservations.push(units);
        }
        let ready = if limiter.is_reserved(units) { limiter.ready_at(units) } else { Duration::MAX };
        if !reservations.is_empty() {
            let limit = self.limit_name(of);
            self.reserving.insert(Arc::clone(&limit), of);
            let reserve = |units| Order::Reserve { limit: Arc::clone(&limit), units };
            self.orders.extend(reservations.into_iter().map(reserve));
        }
        ready
    }

    /// How long the pair's rates make one recipient follow another.
    pub(super) fn pace_of(&self, now: Now, place: u32) -> Duration {
        let pace = &self.pairs[place as usize].pace;
        let shared = pace.rollup.and_then(|rollup| self.rollups[rollup as usize].messages.as_ref());
        let limiters = pace.messages.iter().chain(&pace.stricter).chain(shared);
        // While a burst lasts, it does not.
        let pacing = limiters.filter(|limiter| limiter.rate().max_burst == 1 || limiter.ready_at(1) > now.monotonic);
        pacing.map(|limiter| limiter.rate().period / limiter.rate().count).max().unwrap_or_default()
    }

    /// When so many units may be taken, as far as the pair's rates and its provider's go.
    pub(super) fn own_ready_at(&mut self, place: u32, units: u32) -> Duration {
        let own = self.ready_at(LimitOf::Messages(place), units).max(self.ready_at(LimitOf::Stricter(place), units));
        let rollup = self.pairs[place as usize].pace.rollup;
        own.max(rollup.map_or(Duration::ZERO, |rollup| self.ready_at(LimitOf::Rollup(rollup), units)))
    }

    pub(super) fn wake_pair(&mut self, now: Now, place: u32, at: Duration) {
        self.tell_paced(now, place, at);
        let wakes_at = &mut self.pairs[place as usize].pace.wakes_at;
        set_wake(&mut self.wakes, wakes_at, Wake::Pair(place), at);
    }

    fn wake_rollup(&mut self, rollup: u32, at: Duration) {
        let wakes_at = &mut self.rollups[rollup as usize].wakes_at;
        set_wake(&mut self.wakes, wakes_at, Wake::Rollup(rollup), at);
    }

    /// Lets go on whose time has come.
    pub(super) fn wake(&mut self, now: Now, random: &mut dyn FnMut(u64) -> u64) {
        while let Some(&(at, wake)) = self.wakes.first()
            && at <= now.monotonic
        {
            self.wakes.pop_first();
            match wake {
                Wake::Pair(place) => {
                    self.pairs[place as usize].pace.wakes_at = None;
                    self.advance(now, place, random);
                }
                Wake::Rollup(rollup) => {
                    self.rollups[rollup as usize].wakes_at = None;
                    self.serve_turns(now, rollup, random);
                }
            }
        }
    }

    /// Pairs of a roll-up take what its rate allows, one transaction each in turn.
    fn serve_turns(&mut self, now: Now, rollup: u32, random: &mut dyn FnMut(u64) -> u64) {
        for _ in 0..self.rollups[rollup as usize].turns.len() {
            let at = self.ready_at(LimitOf::Rollup(rollup), 1);
            if at > now.monotonic {
                return self.wake_rollup(rollup, at);
            }
            let Some(place) = self.rollups[rollup as usize].turns.pop_front() else { return };
            self.pairs[place as usize].pace.waits_for_turn = false;
            let took = self.serve(now, place, random);
            if !took && self.pairs[place as usize].pace.waits_for_turn {
                // It needs more than is there yet, and keeps its turn.
                let turns = &mut self.rollups[rollup as usize].turns;
                turns.retain(|waiting| *waiting != place);
                turns.push_front(place);
                return;
            }
        }
        if !self.rollups[rollup as usize].turns.is_empty() {
            let at = self.ready_at(LimitOf::Rollup(rollup), 1).max(now.monotonic + Duration::from_millis(1));
            self.wake_rollup(rollup, at);
        }
    }

    /// It is this pair's turn. Whether it used it.
    fn serve(&mut self, now: Now, place: u32, random: &mut dyn FnMut(u64) -> u64) -> bool {
        let outer = self.serving.replace(place);
        self.advance(now, place, random);
        let took = self.serving != Some(place);
        self.serving = outer;
        took
    }

    /// How many tickets a paced pair has use for; None where no rate holds it.
    pub(super) fn paced_ahead(&self, place: u32) -> Option<usize> {
        let pace = &self.pairs[place as usize].pace;
        let shared = pace.rollup.and_then(|rollup| self.rollups[rollup as usize].messages.as_ref());
        let ahead = |limiter: &Limiter| {
            let Rate { count, period, .. } = limiter.rate();
            (u128::from(count) * PACED_AHEAD.as_nanos()).div_ceil(period.as_nanos()) as usize
        };
        let least = pace.messages.iter().chain(&pace.stricter).chain(shared).map(ahead).min();
        least.map(|ahead| ahead.max(2))
    }

    /// Homes learn why their mail waits, and until when; not more often than anybody could read it.
    fn tell_paced(&mut self, now: Now, place: u32, until: Duration) {
        let pace = &self.pairs[place as usize].pace;
        let is_told = pace.told_at.is_some_and(|told| now.monotonic < told + PACED_NOTICE_INTERVAL);
        // A wait that is much longer than what was said is told at once: until it is over, nothing may happen here.
        let is_news = until > now.monotonic + PACED_NOTICE_INTERVAL
            && pace.told.as_ref().is_none_or(|(told, _)| until > *told + PACED_NOTICE_INTERVAL);
        if is_told && !is_news || until == Duration::MAX {
            return;
        }
        let shared = pace.rollup.and_then(|rollup| self.rollups[rollup as usize].messages.as_ref());
        let pair = &self.pairs[place as usize];
        let stricter = self.stricter.get(&(pair.key.source, Arc::clone(&pair.key.rollup)));
        let stricter = pair.pace.stricter.as_ref().zip(stricter);
        let stricter = stricter.map(|(limiter, limits)| format!("{} by {}", limiter.rate(), limits.reason));
        let rates = pair.pace.messages.as_ref().into_iter().chain(shared).map(|limiter| limiter.rate().to_string());
        let rates: Vec<String> = rates.chain(stricter).collect();
        let reason: Arc<str> = match rates.as_slice() {
            [] => "rate limit of new connections".into(),
            rates => format!("rate limit of {}", rates.join(" and ")).into(),
        };
        let wait_ms = until.saturating_sub(now.monotonic).as_millis() as u64;
        let blocked = Blocked { until_ms: now.wall_ms + wait_ms, reason };
        let pair = &mut self.pairs[place as usize];
        pair.pace.told_at = Some(now.monotonic);
        pair.pace.told = Some((until, blocked.clone()));
        let mut homes: Vec<usize> = pair.tickets.iter().map(|attempt| attempt.ticket.home).collect();
        homes.extend(pair.demand.homes_with_mail());
        homes.sort_unstable();
        homes.dedup();
        let orders = homes.into_iter().map(|home| pair.paced(home, blocked.clone()));
        self.orders.extend(orders);
    }

    /// Something comes to a pair that a rate holds for longer than until it tells its homes again.
    pub(super) fn tell_newcomer(&mut self, now: Now, place: u32, home: usize) {
        let pair = &self.pairs[place as usize];
        if let Some((until, blocked)) = &pair.pace.told
            && *until > now.monotonic + PACED_NOTICE_INTERVAL
        {
            let order = pair.paced(home, blocked.clone());
            self.orders.push_back(order);
        }
    }
}

impl Pair {
    fn paced(&self, home: usize, blocked: Blocked) -> Order {
        let tickets = self.tickets.iter().map(|attempt| attempt.ticket);
        let waiting = tickets.filter(|ticket| ticket.home == home).collect();
        Order::Paced { home, pair: self.key.clone(), blocked, waiting }
    }
}

/// The earliest time counts; one that never comes needs no waking.
fn set_wake(wakes: &mut BTreeSet<(Duration, Wake)>, wakes_at: &mut Option<Duration>, wake: Wake, at: Duration) {
    if at == Duration::MAX || wakes_at.is_some_and(|earlier| earlier <= at) {
        return;
    }
    if let Some(later) = wakes_at.replace(at) {
        wakes.remove(&(later, wake));
    }
    wakes.insert((at, wake));
}
