//! A limit that holds in every window of its own length.
//!
//! Two bounds, both exact. *Pacing*: units are due one interval after the other; as many as `max_burst` may go at once
//! after a pause. *The window*: what was taken in the last period is kept, so that never more than `count` is in any
//! half-open window of that length, whatever bursts and lateness did. It is kept in at most `SLICES` slices of the
//! period; a slice counts until its last unit is a period old, which costs at most one part in `SLICES` of the rate.
//!
//! A provider counts what arrives, and what is sent evenly does not arrive so: one MAIL is held up on its way and the
//! next is not. So a period is taken by `ARRIVAL_SPREAD` longer than it is written, in both bounds.
//!
//! **Over a crash.** What was taken before is unknown, so a short period begins as if all of it had been taken when the
//! engine started. From a minute on that would stop mail for too long: there units are reserved durably before they are
//! taken, a slice of the limit at a time, and at a start all that was reserved counts as taken, as late as it can have
//! been. An engine that stops leaves what was taken instead, and when, so the next goes on as if it were the same: see
//! [`Past`].
//!
//! Order of calls: [`Limiter::ready_at`]; [`Limiter::reserve`], whose amount is to be made durable and then given to
//! [`Limiter::reserved`]; [`Limiter::take`] once the time has come. Where MAIL is written elsewhere, [`Limiter::lend`]
//! stands for it: what is lent counts in every window until it is told when it was used, so no window has more than the
//! limit by those times.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::time::Duration;

use crate::config::Rate;
use crate::limits::{ARRIVAL_SPREAD, PACE_LATENESS_MAX, PACE_LATENESS_MIN, RESERVED_PERIOD_MIN};
use crate::mail::time::Now;

#[derive(Debug)]
pub struct Limiter {
    rate: Rate,
    /// By so much the period is longer than the rate's.
    spread: Duration,
    /// When the next unit is due, in nanoseconds times the rate's count: so no interval is rounded.
    next: u128,
    /// Oldest first.
    taken: VecDeque<Taken>,
    sum: u64,
    /// What is lent: it counts until it is told when it was used, and then for a period.
    lent: u32,
    reserve: Option<Reserve>,
}

/// What was taken in one slice of the period.
#[derive(Debug, Clone, Copy)]
struct Taken {
    /// None: before the engine started, which the scale of monotonic time does not reach.
    begun: Option<Duration>,
    /// The last of it is a period old.
    expires: Duration,
    units: u32,
}

/// Units that are durably reserved.
#[derive(Debug, Default)]
struct Reserve {
    available: u32,
    asked: u32,
}

/// What is known of a limit from before the engine started. Times are wall time in milliseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Past {
    /// When units were used, and how many.
    pub used: Vec<(u64, u32)>,
    /// When units were reserved after that, and how many, in the order in which they were. Nobody has told when they
    /// were used.
    pub reserved: Vec<(u64, u32)>,
    pub due: Option<Due>,
    /// The limit's; none was told by an earlier version.
    pub period: Option<Duration>,
}

impl Past {
    /// That of another limiter under the same name counts as well.
    pub fn add(&mut self, other: Self) {
        self.used.extend(other.used);
        self.reserved.extend(other.reserved);
        let later = |due: &Due| due.at_ms;
        self.due = self.due.into_iter().chain(other.due).max_by_key(later);
        self.period = self.period.max(other.period);
    }
}

/// When the next unit is due, and the interval of the rate that it is due by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    pub at_ms: u64,
    pub interval_us: u64,
}

/// The past of each limit that has one, by the name that it is reserved under.
pub type PastLimits = HashMap<String, Past>;

/// The moment from which a limiter knows what was taken.
#[derive(Debug, Clone, Copy, Default)]
pub struct Started {
    pub monotonic: Duration,
    pub wall_ms: u64,
}

impl Limiter {
    pub fn new(rate: Rate, started: Started, past: Option<&Past>) -> Self {
        assert!(rate.count > 0, "a rate lets something pass");
        let is_reserved = rate.period >= RESERVED_PERIOD_MIN;
        let mut limiter = Self {
            rate,
            spread: ARRIVAL_SPREAD,
            next: 0,
            taken: VecDeque::new(),
            sum: 0,
            lent: 0,
            reserve: is_reserved.then(Reserve::default),
        };
        if is_reserved {
            limiter.recall(started, past.unwrap_or(&Past::default()));
        } else {
            limiter.count(started.monotonic, started.monotonic + limiter.period(), rate.count);
        }
        limiter
    }

    /// One of what comes to us: it knows of nothing before, and reserves nothing.
    pub fn fresh(rate: Rate) -> Self {
        Self { rate, spread: Duration::ZERO, next: 0, taken: VecDeque::new(), sum: 0, lent: 0, reserve: None }
    }

    /// As it is configured.
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// That in which no more than the limit is used here.
    fn period(&self) -> Duration {
        self.rate.period + self.spread
    }

    /// What the next engine has to know, if none of this one's units are used from now on; what is still lent may have
    /// been. None: a limit of which nothing is kept.
    pub fn past(&self, now: Now) -> Option<Past> {
        self.reserve.as_ref()?;
        // Never earlier than it will be.
        let wall_ms =
            |at: Duration| now.wall_ms + at.saturating_sub(now.monotonic).as_nanos().div_ceil(1_000_000) as u64;
        let counting = self.taken.iter().filter(|taken| taken.expires > now.monotonic);
        // Monotonic time begins with the engine, and what was used may be older. So the period is taken from wall time.
        let period_ms = self.period().as_millis() as u64;
        let used = counting.map(|taken| (wall_ms(taken.expires).saturating_sub(period_ms), taken.units)).collect();
        let reserved = if self.lent > 0 { vec![(now.wall_ms, self.lent)] } else { Vec::new() };
        let next = duration(self.next.div_ceil(self.rate.count.into()));
        let due = Due { at_ms: wall_ms(next), interval_us: interval_us(self.rate) };
        let due = (next > now.monotonic).then_some(due);
        Some(Past { used, reserved, due, period: Some(self.rate.period) })
    }

    /// Another rate for what this one has counted. A longer period than before counts what this one still knows of.
    pub fn set_rate(&mut self, now: Duration, rate: Rate, started: Started, past: Option<&Past>) {
        self.become_rate(now, rate, |rate| Self::new(rate, started, past));
    }

    /// The same for [`Self::fresh`] ones.
    pub fn set_fresh_rate(&mut self, now: Duration, rate: Rate) {
        self.become_rate(now, rate, Self::fresh);
    }

    fn become_rate(&mut self, now: Duration, rate: Rate, begin: impl FnOnce(Rate) -> Self) {
        if rate == self.rate {
            return;
        }
        // What is due later than now comes as much earlier or later as the intervals are shorter or longer.
        let due = self.next / u128::from(self.rate.count);
        let now = now.as_nanos();
        let interval = |rate: Rate| (rate.period / rate.count).as_nanos().max(1);
        let ahead = due.saturating_sub(now).saturating_mul(interval(rate)) / interval(self.rate);
        let next = (due.min(now) + ahead).saturating_mul(u128::from(rate.count));
        if rate.period != self.rate.period {
            let mut other = begin(rate);
            other.lent = self.lent;
            other.count_taken_of(self);
            *self = other;
        } else if let Some(reserve) = &mut self.reserve {
            reserve.available = 0;
        }
        self.next = next;
        self.rate = rate;
    }

    /// What another limiter remembers counts for this one's period.
    fn count_taken_of(&mut self, other: &Self) {
        // What was before the start is known already, if it counts.
        let is_told = |taken: &Taken| taken.begun.is_some() || self.reserve.is_none();
        let period = self.period();
        let aged = |taken: &Taken| {
            let last = taken.expires.saturating_sub(other.period());
            Taken { expires: last + period, ..*taken }
        };
        let aged: Vec<Taken> = other.taken.iter().filter(|taken| is_told(taken)).map(aged).collect();
        self.sum += aged.iter().map(|taken| u64::from(taken.units)).sum::<u64>();
        self.taken.extend(aged);
        self.taken.make_contiguous().sort_by_key(|taken| taken.expires);
    }

    /// When `units` may be taken together, as far as time goes; it may be over. More than `count` never may.
    pub fn ready_at(&self, units: u32) -> Duration {
        let burst = u128::from(self.rate.max_burst - 1) * self.period().as_nanos();
        let paced = self.next.saturating_sub(burst).div_ceil(u128::from(self.rate.count));
        let mut ready = duration(paced);
        let counted = self.sum + u64::from(self.lent);
        let mut free = u64::from(self.rate.count).saturating_sub(counted);
        let mut excess = counted.saturating_sub(self.rate.count.into());
        for taken in &self.taken {
            if free >= u64::from(units) {
                return ready;
            }
            let units = u64::from(taken.units);
            free += units.saturating_sub(excess);
            excess = excess.saturating_sub(units);
            ready = ready.max(taken.expires);
        }
        if free >= u64::from(units) { ready } else { Duration::MAX }
    }

    /// Whether nothing but time stands in the way of `units`.
    pub fn is_reserved(&self, units: u32) -> bool {
        self.reserve.as_ref().is_none_or(|reserve| reserve.available >= units)
    }

    /// What is to be reserved now, so that what comes next need not wait.
    pub fn reserve(&mut self) -> Option<u32> {
        let slice = self.rate.batch_max();
        let reserve = self.reserve.as_mut()?;
        // With no more than a slice left, all but the last one reserved are used up: `recall` counts on it.
        if reserve.available + self.lent + reserve.asked > slice {
            return None;
        }
        reserve.asked += slice;
        Some(slice)
    }

    /// That much of what was asked for is durably reserved.
    pub fn reserved(&mut self, amount: u32) {
        if let Some(reserve) = &mut self.reserve {
            reserve.asked = reserve.asked.saturating_sub(amount);
            reserve.available += amount;
        }
    }

    /// Whether something was asked for and is not reserved yet.
    pub fn is_reserving(&self) -> bool {
        self.reserve.as_ref().is_some_and(|reserve| reserve.asked > 0)
    }

    /// Takes `units`, whose time has come.
    pub fn take(&mut self, now: Duration, units: u32) {
        self.lend(now, units);
        self.settle(now, units);
    }

    /// Gives away `units`, whose time has come, to be used soon: [`Self::settle`] or [`Self::give_back`] tells.
    pub fn lend(&mut self, now: Duration, units: u32) {
        assert!(self.ready_at(units) <= now, "nothing is taken before its time");
        if let Some(reserve) = &mut self.reserve {
            assert!(reserve.available >= units, "only what is reserved is taken");
            reserve.available -= units;
        }
        while let Some(taken) = self.taken.front()
            && taken.expires <= now
        {
            self.sum -= u64::from(taken.units);
            self.taken.pop_front();
        }
        // What is late by little keeps its place, so that lateness does not add up; a pause earns nothing.
        let interval = self.period() / self.rate.count;
        let lateness = (interval / 2).clamp(PACE_LATENESS_MIN, PACE_LATENESS_MAX);
        let count = u128::from(self.rate.count);
        let is_late = self.next < now.saturating_sub(lateness).as_nanos() * count;
        let due = if is_late { now.as_nanos() * count } else { self.next };
        self.next = due + u128::from(units) * self.period().as_nanos();
        self.lent += units;
        let counted = self.sum + u64::from(self.lent);
        assert!(counted <= self.rate.count.into(), "LIMITS-HOLD: no window has more than the limit");
    }

    /// What was lent was used then. What an earlier limiter had lent is none of this one's.
    pub fn settle(&mut self, at: Duration, units: u32) {
        let units = units.min(self.lent);
        self.lent -= units;
        self.count(at, at + self.period(), units);
    }

    /// What was lent is not used.
    pub fn give_back(&mut self, units: u32) {
        let units = units.min(self.lent);
        self.lent -= units;
        self.next = self.next.saturating_sub(u128::from(units) * self.period().as_nanos());
        if let Some(reserve) = &mut self.reserve {
            reserve.available += units;
        }
    }

    /// Whether it is as if nothing had ever been taken.
    pub fn is_idle(&self, now: Duration) -> bool {
        self.taken.back().is_none_or(|taken| taken.expires <= now)
            && self.next <= now.as_nanos() * u128::from(self.rate.count)
    }

    fn count(&mut self, begun: Duration, expires: Duration, units: u32) {
        self.sum += u64::from(units);
        let slice = self.period() / SLICES;
        match self.taken.back_mut() {
            Some(last) if last.begun.is_some_and(|first| begun < first + slice) => {
                last.expires = expires.max(last.expires);
                last.units += units;
            }
            _ => self.taken.push_back(Taken { begun: Some(begun), expires, units }),
        }
    }

    /// A reservation is asked for when at most the last one is left, so each is used up when the second after it is
    /// asked for. The last two may have been used until the engine started.
    fn recall(&mut self, started: Started, past: &Past) {
        let reserved = past.reserved.iter().enumerate().map(|(place, &(_, units))| {
            let used_ms = past.reserved.get(place + 2).map_or(started.wall_ms, |&(later_ms, _)| later_ms);
            (used_ms, units)
        });
        for (used_ms, units) in past.used.iter().copied().chain(reserved) {
            let age = Duration::from_millis(started.wall_ms.saturating_sub(used_ms));
            if age < self.period() {
                // Wall time was cut to milliseconds.
                let expires = started.monotonic + self.period() - age + Duration::from_millis(1);
                self.sum += u64::from(units);
                self.taken.push_back(Taken { begun: None, expires, units });
            }
        }
        self.taken.make_contiguous().sort_by_key(|taken| taken.expires);
        if let Some(Due { at_ms, interval_us: before_us }) = past.due {
            // By another rate it comes as much earlier or later as the intervals are shorter or longer.
            let ahead_us = u128::from(at_ms.saturating_sub(started.wall_ms)) * 1_000;
            let ahead_us = ahead_us * u128::from(interval_us(self.rate)) / u128::from(before_us.max(1));
            // A clock that was set back would stop it for long. What is taken together is all that pace can be ahead.
            let together = u128::from(self.rate.max_burst) + u128::from(self.rate.batch_max());
            let ahead = (ahead_us * 1_000).min(together * self.period().as_nanos() / u128::from(self.rate.count));
            self.next = (started.monotonic.as_nanos() + ahead) * u128::from(self.rate.count);
        }
    }
}

fn interval_us(rate: Rate) -> u64 {
    (rate.period / rate.count).as_micros().max(1) as u64
}

fn duration(nanoseconds: u128) -> Duration {
    u64::try_from(nanoseconds).map_or(Duration::MAX, Duration::from_nanos)
}

/// Slices in which a period is remembered.
const SLICES: u32 = 128;

#[cfg(test)]
mod tests;
