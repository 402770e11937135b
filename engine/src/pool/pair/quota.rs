//! Quotas of sources in their warm-up: all pairs of a source and a roll-up share one a day.

use std::sync::Arc;
use std::time::Duration;

use super::limiters::LimitOf;
use super::{Order, Pools};
use crate::limits::PAIRS_KEPT;
use crate::mail::time::Now;
use crate::pool::warmup::{Allowance, DAY_MS, DayQuota};

impl Pools {
    /// Whether the day's quota has so many units left, and they are reserved. Else the pair goes on when they are, or
    /// is suspended for the rest of the day.
    pub(super) fn has_quota(&mut self, now: Now, place: u32, units: u32) -> bool {
        if self.options.warmups.is_empty() || !self.meet_day(now, place) {
            return true;
        }
        let pair = &self.pairs[place as usize].key;
        let day = self.days.get_mut(&(pair.source, Arc::clone(&pair.rollup))).expect("it was just met");
        let allowance = day.allowance(units);
        let mut reservations = Vec::new();
        while let Some(units) = day.reserve(units) {
            reservations.push(units);
        }
        if allowance == Allowance::UsedUp {
            let (quota, until_ms) = (day.quota, (day.day + 1) * DAY_MS);
            self.orders.push_back(Order::WarmedUp { pair: pair.clone(), quota, until_ms });
        }
        if !reservations.is_empty() {
            let limit = self.day_name(place);
            self.reserving.insert(Arc::clone(&limit), LimitOf::Day(place));
            let period = Duration::from_millis(DAY_MS);
            let reserve = |units| Order::Reserve { limit: Arc::clone(&limit), units, period };
            self.orders.extend(reservations.into_iter().map(reserve));
        }
        allowance == Allowance::Now
    }

    /// Days that have begun go on under the quotas that there are now.
    pub(super) fn set_quotas(&mut self) {
        let warmups = &self.options.warmups;
        self.days.retain(|(source, rollup), day| {
            let warmup = warmups.iter().find(|warmup| warmup.source == *source);
            let quota = warmup.and_then(|warmup| warmup.quota(rollup, day.day));
            day.quota = quota.unwrap_or(day.quota);
            quota.is_some()
        });
    }

    pub(super) fn take_quota(&mut self, place: u32, units: u32) {
        if self.days.is_empty() {
            return;
        }
        let pair = &self.pairs[place as usize].key;
        if let Some(day) = self.days.get_mut(&(pair.source, Arc::clone(&pair.rollup))) {
            day.take(units);
        }
    }

    pub(super) fn handle_day_reserved(
        &mut self,
        now: Now,
        random: &mut dyn FnMut(u64) -> u64,
        place: u32,
        limit: &str,
        units: u32,
    ) {
        let pair = self.pairs[place as usize].key.clone();
        let day = self.days.get_mut(&(pair.source, Arc::clone(&pair.rollup)));
        let is_reserving = day.is_some_and(|day| {
            day.reserved(units);
            day.is_reserving()
        });
        if !is_reserving {
            self.reserving.remove(limit);
        }
        // A site that no provider rolls up shares its day with no other, and there may be many of them.
        if pair.rollup == pair.site {
            return self.advance(now, place, random);
        }
        for other in 0..self.pairs.len() as u32 {
            let key = &self.pairs[other as usize].key;
            // Places of forgotten pairs keep their last key.
            if key.source == pair.source && key.rollup == pair.rollup && self.keys.get(key) == Some(&other) {
                self.advance(now, other, random);
            }
        }
    }

    /// The same over restarts, and another each day.
    pub(super) fn day_name(&self, place: u32) -> Arc<str> {
        let pair = &self.pairs[place as usize].key;
        let day = self.days.get(&(pair.source, Arc::clone(&pair.rollup))).map_or(0, |day| day.day);
        self.name_of_day(place, day)
    }

    fn name_of_day(&self, place: u32, day: u64) -> Arc<str> {
        let pair = &self.pairs[place as usize].key;
        self.name_of_quota(day, pair.source, &pair.rollup)
    }

    pub(super) fn name_of_quota(&self, day: u64, source: usize, rollup: &str) -> Arc<str> {
        format!("warm-up of day {day} by {} at {rollup}", self.options.sources[source].name).into()
    }

    /// Days that are over are forgotten where there are many. The clock may be set back into yesterday.
    pub(super) fn forget_days(&mut self, now: Now) {
        let today = now.wall_ms / DAY_MS;
        if self.days.len() > PAIRS_KEPT && self.days_forgotten != today {
            self.days.retain(|_, known| known.day + 1 >= today);
            self.days_forgotten = today;
        }
    }

    /// Whether the pair's source has a quota today; then its count is there. A clock that is set back ends no day.
    fn meet_day(&mut self, now: Now, place: u32) -> bool {
        let pair = &self.pairs[place as usize].key;
        let Some(warmup) = self.options.warmups.iter().find(|warmup| warmup.source == pair.source) else {
            return false;
        };
        let key = (pair.source, Arc::clone(&pair.rollup));
        let known = self.days.get(&key).map(|day| day.day);
        let today = (now.wall_ms / DAY_MS).max(known.unwrap_or(0));
        let Some(quota) = warmup.quota(&pair.rollup, today) else {
            self.days.remove(&key);
            return false;
        };
        if known != Some(today) {
            let past = Arc::clone(&self.past);
            let name = self.name_of_day(place, today);
            self.days.insert(key, DayQuota::new(today, quota, past.get(&*name)));
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;
    use crate::config::{Config, Warmup};
    use crate::pool::pair::PoolOptions;
    use crate::pool::site::BackOff;

    fn pools() -> Pools {
        let text = "[spool]\nallow_filesystem = true\n";
        let config = Config::from_toml(text, "t.toml", Path::new("/nonexistent")).expect("a configuration");
        Pools::new(PoolOptions {
            default: Arc::new(config.shaping),
            sources: config.egress_sources,
            back_off: BackOff { first: Duration::ZERO, max: Duration::ZERO },
            warmups: Vec::new(),
            shared_limits: Arc::default(),
            homes: 1,
        })
    }

    /// A day without a quota any more is not counted on; another number holds at once.
    #[test]
    fn another_configuration_has_other_quotas() {
        let mut pools = pools();
        let names: [Arc<str>; 2] = ["google".into(), "other".into()];
        pools.days = names.iter().map(|name| ((0, Arc::clone(name)), DayQuota::new(7, 9, None))).collect();
        let warmup = |quotas| Warmup { source: 0, start_day: 7, daily: BTreeMap::new(), default: Some(quotas) };
        pools.options.warmups = vec![warmup(vec![4])];
        pools.set_quotas();
        let quotas = |pools: &Pools| pools.days.values().map(|day| day.quota).collect::<Vec<_>>();
        assert_eq!(quotas(&pools), [4, 4]);
        pools.options.warmups.clear();
        pools.set_quotas();
        assert!(pools.days.is_empty(), "{:?}", quotas(&pools));
    }

    #[test]
    fn days_that_are_over_are_forgotten_once_there_are_many() {
        let mut pools = pools();
        let at_day = |day| Now { monotonic: Duration::ZERO, wall_ms: day * DAY_MS + 5 };
        let begin = |pools: &mut Pools, day: u64, count: usize| {
            let name = |number: usize| Arc::from(format!("{day}-{number}.test"));
            pools.days.extend((0..count).map(|number| ((0, name(number)), DayQuota::new(day, 9, None))));
        };
        begin(&mut pools, 7, PAIRS_KEPT);
        pools.tick(at_day(9));
        assert_eq!(pools.days.len(), PAIRS_KEPT, "they are few");
        begin(&mut pools, 8, 2);
        begin(&mut pools, 9, 3);
        pools.tick(at_day(9));
        assert_eq!(pools.days.len(), 5, "those of yesterday are kept");
    }
}
