//! What a source in its warm-up has sent to a roll-up today.
//!
//! Units are reserved durably before they are used, as those of long rates are; the limit's name has the day in it, so
//! that what a start finds reserved counts for that day and no other. A start takes all that was reserved as used;
//! but an engine that stops leaves what was.
//!
//! See also: `rate.rs`, `runtime/limit_file.rs`.

use super::rate::Past;
use crate::mail::time::Now;

/// One day of one source at one roll-up.
#[derive(Debug)]
pub struct DayQuota {
    pub day: u64,
    pub quota: u32,
    used: u32,
    /// Durably, what is used included.
    reserved: u32,
    asked: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowance {
    Now,
    /// Once what was asked for is reserved.
    Reserving,
    /// The day's quota is used up, or has too little left.
    UsedUp,
}

impl DayQuota {
    pub fn new(day: u64, quota: u32, past: Option<&Past>) -> Self {
        let gone = past.into_iter().flat_map(|past| past.used.iter().chain(&past.reserved));
        let gone = gone.map(|&(_, units)| units).fold(0, u32::saturating_add);
        Self { day, quota, used: gone, reserved: gone, asked: 0 }
    }

    /// Whether so many units may be used.
    pub fn allowance(&self, units: u32) -> Allowance {
        if self.used.saturating_add(units) > self.quota {
            Allowance::UsedUp
        } else if self.used + units <= self.reserved {
            Allowance::Now
        } else {
            Allowance::Reserving
        }
    }

    /// What is to be reserved now, so that so many units can be used, and as a rule the next need not wait.
    pub fn reserve(&mut self, units: u32) -> Option<u32> {
        let promised = self.reserved.saturating_add(self.asked);
        let ahead = promised.saturating_sub(self.used);
        let slice = (self.quota / SLICES).max(1);
        let room = self.quota.saturating_sub(promised);
        if room == 0 || ahead >= units.saturating_add(slice) {
            return None;
        }
        let asked = units.max(slice).min(room);
        self.asked += asked;
        Some(asked)
    }

    pub fn reserved(&mut self, units: u32) {
        self.asked = self.asked.saturating_sub(units);
        self.reserved += units;
    }

    /// Whether something was asked for and is not reserved yet.
    pub fn is_reserving(&self) -> bool {
        self.asked > 0
    }

    pub fn take(&mut self, units: u32) {
        assert!(self.allowance(units) == Allowance::Now, "LIMITS-HOLD: no day has more than its quota");
        self.used += units;
    }

    /// What the next engine has to know, if no more of this day are used.
    pub fn past(&self, now: Now) -> Past {
        Past { used: vec![(now.wall_ms, self.used)], ..Past::default() }
    }

    /// The most recipients of one transaction, so that little is left over at the end of a day.
    pub fn batch_max(quota: u32) -> usize {
        (quota / 20).max(1) as usize
    }
}

/// Why a source is suspended whose day is used up.
pub fn spent_reason(quota: u32) -> String {
    format!("warm-up: {quota} recipients a day")
}

/// The quota that such a reason names.
pub fn spent_quota(reason: &str) -> Option<u32> {
    reason.strip_prefix("warm-up: ")?.strip_suffix(" recipients a day")?.parse().ok()
}

/// Of a quota so many slices are reserved at a time: a crash costs a hundredth of it, or two recipients.
const SLICES: u32 = 100;

pub const DAY_MS: u64 = 86_400_000;

#[cfg(test)]
mod tests {
    use super::*;

    use std::time::Duration;

    #[test]
    fn a_day_has_its_quota_and_no_more() {
        let mut day = DayQuota::new(1, 3, None);
        let mut sent = 0;
        for _ in 0..10 {
            while let Some(units) = day.reserve(1) {
                assert_eq!(
                    day.allowance(1),
                    if sent < 3 && day.reserved > sent { Allowance::Now } else { Allowance::Reserving }
                );
                day.reserved(units);
            }
            if day.allowance(1) == Allowance::Now {
                day.take(1);
                sent += 1;
            }
        }
        assert_eq!((sent, day.allowance(1), day.reserve(1)), (3, Allowance::UsedUp, None));
    }

    fn reserved(units: &[(u64, u32)]) -> Past {
        Past { reserved: units.to_vec(), ..Past::default() }
    }

    #[test]
    fn a_start_takes_what_was_reserved_as_used() {
        let day = DayQuota::new(1, 10, Some(&reserved(&[(5, 4), (7, 5)])));
        assert_eq!((day.allowance(1), day.allowance(2)), (Allowance::Reserving, Allowance::UsedUp));
        assert_eq!(DayQuota::new(1, 10, Some(&reserved(&[(5, 11)]))).allowance(1), Allowance::UsedUp);
    }

    #[test]
    fn a_stop_gives_back_what_was_not_used() {
        let mut day = DayQuota::new(1, 10, Some(&reserved(&[(5, 3)])));
        while let Some(units) = day.reserve(2) {
            day.reserved(units);
        }
        day.take(2);
        let past = day.past(Now { monotonic: Duration::ZERO, wall_ms: 9 });
        assert_eq!(past, Past { used: vec![(9, 5)], ..Past::default() });
        // Five are left; what is reserved from now on counts beside those used.
        let past = Past { reserved: vec![(11, 1)], ..past };
        let day = DayQuota::new(1, 10, Some(&past));
        assert_eq!((day.allowance(4), day.allowance(5)), (Allowance::Reserving, Allowance::UsedUp));
    }

    #[test]
    fn little_is_reserved_ahead() {
        let mut day = DayQuota::new(1, 1_000, None);
        let asked: u32 = std::iter::from_fn(|| day.reserve(1)).sum();
        assert_eq!(asked, 20);
        let mut day = DayQuota::new(1, 1_000, None);
        let asked: u32 = std::iter::from_fn(|| day.reserve(50)).sum();
        assert_eq!(asked, 100, "and as much as a transaction needs");
    }
}
