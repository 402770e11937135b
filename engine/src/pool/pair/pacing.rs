//! What its limits let a pair do now, and when it is woken to go on.
//!
//! A transaction needs its units of the pair's message rate and, where a provider rolls sites up, of the provider's.
//! The pairs of a provider wait for that one in turn, and for its connections likewise.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::limiters::LimitOf;
use super::{Order, Pair, Pools};
use crate::config::Rate;
use crate::handover::{Attempt, Blocked};
use crate::limits::{PACED_AHEAD, PACED_NOTICE_INTERVAL};
use crate::mail::time::Now;
use crate::pool::connection::ConnectionKey;
use crate::pool::rate::Limiter;

/// A pair's rates, and what it waits for.
#[derive(Debug, Default)]
pub(super) struct Pace {
    pub(super) messages: Option<Limiter>,
    pub(super) connections: Option<Limiter>,
    /// A rate that a rule has set, beside the configured one.
    pub(super) stricter: Option<Limiter>,
    pub(super) wakes_at: Option<Duration>,
    pub(super) told_at: Option<Duration>,
    /// What homes were told, and until when it holds.
    pub(super) told: Option<(Duration, Blocked)>,
    pub(super) rollup: Option<u32>,
    /// It stands in its roll-up's queues.
    pub(super) waits_for_turn: bool,
    pub(super) waits_for_slot: bool,
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

/// Who is woken: the place of a pair or of a roll-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Wake {
    Pair(u32),
    Rollup(u32),
}

impl Pools {
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
        self.await_turn(now, place, rollup, shared);
        false
    }

    /// The pair is served in its turn, once the provider's rate lets it.
    pub(super) fn await_turn(&mut self, now: Now, place: u32, rollup: u32, at: Duration) {
        if !std::mem::replace(&mut self.pairs[place as usize].pace.waits_for_turn, true) {
            self.rollups[rollup as usize].turns.push_back(place);
        }
        self.tell_paced(now, place, at);
        self.wake_rollup(rollup, at);
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
                self.wake_turns(now, rollup, ready);
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

    /// When so many units may be taken; never, as long as they wait for a reservation, which is asked for.
    pub(super) fn ready_at(&mut self, of: LimitOf, units: u32) -> Duration {
        let Some(limiter) = self.limiter(of) else { return Duration::ZERO };
        let mut reservations = Vec::new();
        while let Some(units) = limiter.reserve() {
            reservations.push(units);
        }
        let ready = if limiter.is_reserved(units) { limiter.ready_at(units) } else { Duration::MAX };
        let period = limiter.rate().period;
        if !reservations.is_empty() {
            let limit = self.limit_name(of);
            self.reserving.insert(Arc::clone(&limit), of);
            let reserve = |units| Order::Reserve { limit: Arc::clone(&limit), units, period };
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

    /// It is known now until when those wait whose turn it is not yet.
    pub(super) fn wake_turns(&mut self, now: Now, rollup: u32, at: Duration) {
        if at > now.monotonic + PACED_NOTICE_INTERVAL {
            for place in self.rollups[rollup as usize].turns.clone() {
                self.tell_paced(now, place, at);
            }
        }
        self.wake_rollup(rollup, at);
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
    pub(super) fn serve_turns(&mut self, now: Now, rollup: u32, random: &mut dyn FnMut(u64) -> u64) {
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
    pub(super) fn serve(&mut self, now: Now, place: u32, random: &mut dyn FnMut(u64) -> u64) -> bool {
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
        let homes_with_mail: Vec<usize> = pair.demand.homes_with_mail().collect();
        self.tell_homes(place, homes_with_mail, &blocked);
    }

    /// Tickets that were in hand when their homes were told stand among those that wait by now.
    pub(super) fn tell_again(&mut self, now: Now, place: u32) {
        let pace = &self.pairs[place as usize].pace;
        if pace.told_at == Some(now.monotonic)
            && let Some((_, blocked)) = pace.told.clone()
        {
            self.tell_homes(place, Vec::new(), &blocked);
        }
    }

    /// These homes, and those of tickets that wait.
    fn tell_homes(&mut self, place: u32, mut homes: Vec<usize>, blocked: &Blocked) {
        let pair = &self.pairs[place as usize];
        homes.extend(pair.tickets.iter().map(|attempt| attempt.ticket.home));
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
