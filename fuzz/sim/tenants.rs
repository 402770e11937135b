//! In runs with rates, a tenant may inject so much, and has retries of its own.
//!
//! What is drawn here comes from a generator of its own.

use std::collections::BTreeMap;
use std::time::Duration;

use postrider::config::{Config, Rate, RetryInterval, RetrySchedule};

use crate::checker::Ledger;
use crate::random::Random;

/// One whose shares nobody compares.
const TENANT: &str = "limited";

/// Draws both, each in every other run. Tells the retries of tenants that have their own.
pub(crate) fn draw(seed: u64, config: &mut Config) -> BTreeMap<String, RetrySchedule> {
    let mut random = Random::new(seed.rotate_left(20) ^ 0x7465_6e61);
    let tenant = config.tenants.iter_mut().find(|tenant| tenant.name == TENANT).expect("it is there");
    if random.one_in(2) {
        let count = 8 + random.below(12) as u32;
        tenant.max_injection_rate = Some(Rate { count, period: Duration::from_secs(60), max_burst: count });
    }
    if !random.one_in(2) {
        return BTreeMap::new();
    }
    let intervals = [70, 200].map(Duration::from_secs).to_vec();
    tenant.retry.interval = Some(RetryInterval::Listed(intervals.clone()));
    BTreeMap::from([(TENANT.to_owned(), RetrySchedule::Listed(intervals))])
}

/// LIMITS-HOLD: in no window of a life more was accepted of a tenant than it may inject. `lives` are when each began.
pub(crate) fn check(config: &Config, ledger: &Ledger, lives: &[u64]) {
    let Some(rate) = config.tenant(TENANT).and_then(|tenant| tenant.max_injection_rate) else { return };
    let of_tenant = ledger.durable.values().filter(|durable| durable.told.tenant == TENANT);
    let mut taken: Vec<(u64, usize)> =
        of_tenant.map(|durable| (durable.told.created_ms, durable.recipients.len())).collect();
    taken.sort_unstable();
    let window_ms = rate.period.as_millis() as u64 - LATE_MAX_MS;
    for (place, (first, _)) in taken.iter().enumerate() {
        // A start knows nothing of what was injected before.
        let end = lives.iter().copied().find(|life| life > first).unwrap_or(u64::MAX).min(first + window_ms);
        let within: usize = taken[place..].iter().take_while(|(at, _)| *at < end).map(|(_, count)| count).sum();
        assert!(
            within <= rate.count as usize,
            "LIMITS-HOLD: {within} recipients of {TENANT} were taken from {first} on, of {rate}"
        );
    }
}

/// From when a message is made until it is counted: it goes to its shard, and the question to another.
const LATE_MAX_MS: u64 = 35_000;
