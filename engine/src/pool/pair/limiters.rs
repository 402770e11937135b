//! Which limits a pair is under: made from its shaping, recalled after a start, told to the next one.

use std::collections::VecDeque;
use std::sync::Arc;

use ahash::HashMap;

use super::{Pair, Pools};
use crate::config::{LimitSettings, Rate, Shaping};
use crate::handover::PairKey;
use crate::mail::time::Now;
use crate::pool::rate::{Limiter, Past, PastLimits, Started};
use crate::pool::suspension::StricterLimits;

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

    /// Units that [`Order::Reserve`](super::Order::Reserve) asked for are durably reserved.
    pub fn handle_reserved(&mut self, now: Now, random: &mut dyn FnMut(u64) -> u64, limit: &str, units: u32) {
        let Some(&of) = self.reserving.get(limit) else { return };
        // The place may be another pair's by now; what was reserved is then lost.
        if *self.limit_name(of) != *limit {
            self.reserving.remove(limit);
            return;
        }
        if let LimitOf::Day(place) = of {
            return self.handle_day_reserved(now, random, place, limit, units);
        }
        let is_reserving = self.limiter(of).is_some_and(|limiter| {
            limiter.reserved(units);
            limiter.is_reserving()
        });
        if !is_reserving {
            self.reserving.remove(limit);
        }
        match of {
            LimitOf::Day(_) => {}
            LimitOf::Messages(place) | LimitOf::Connections(place) | LimitOf::Stricter(place) => {
                self.advance(now, place, random);
            }
            LimitOf::Rollup(rollup) => {
                self.serve_turns(now, rollup, random);
                let at = self.ready_at(of, 1);
                self.wake_turns(now, rollup, at);
            }
        }
    }

    /// Limits that have asked for a reservation and wait for it.
    pub fn reservations_awaited(&self) -> usize {
        self.reserving.len()
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

    pub(super) fn lacks_limiter(&self, place: u32) -> bool {
        let pair = &self.pairs[place as usize];
        pair.pace.messages.is_none() && pair.shaping.max_message_rate.is_some()
            || pair.pace.connections.is_none() && pair.shaping.max_connection_rate.is_some()
    }

    /// The limiter of this kind, with what it has counted, for another rate.
    pub(super) fn limit(&mut self, of: LimitOf, rate: Option<Rate>) -> Option<Limiter> {
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

    pub(super) fn limiter(&mut self, of: LimitOf) -> Option<&mut Limiter> {
        match of {
            LimitOf::Messages(place) => self.pairs[place as usize].pace.messages.as_mut(),
            LimitOf::Connections(place) => self.pairs[place as usize].pace.connections.as_mut(),
            LimitOf::Stricter(place) => self.pairs[place as usize].pace.stricter.as_mut(),
            LimitOf::Rollup(rollup) => self.rollups[rollup as usize].messages.as_mut(),
            LimitOf::Day(_) => None,
        }
    }

    /// The same over restarts, so that what was reserved is found again.
    pub(super) fn limit_name(&self, of: LimitOf) -> Arc<str> {
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
}
