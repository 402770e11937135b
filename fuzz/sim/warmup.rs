//! Runs in which a source warms up: it has a quota a day at each site, what is above it goes by the pool's other
//! source, and midnight comes in the midst of the run.
//!
//! What is drawn here comes from a generator of its own.

use std::collections::BTreeMap;

use postrider::config::{Config, Warmup};

use crate::clock::{MINUTE, MS, Micros, WALL_MS_AT_START};
use crate::random::Random;
use crate::rates::Rates;

/// The source that warms up: one of two in the default pool.
const SOURCE: usize = 1;

/// Draws whether it does, and what time it is when the run begins, which lasts about so long.
pub(crate) fn draw(config: &mut Config, seed: u64, lasts: Micros) -> u64 {
    let mut random = Random::new(seed.rotate_left(32) ^ 0x7761_726d);
    if !random.one_in(RUNS_EVERY) {
        return WALL_MS_AT_START;
    }
    let today = WALL_MS_AT_START / DAY_MS;
    let quotas = (0..4).map(|_| 4 + random.below(40) as u32).collect();
    config.warmups = vec![Warmup { source: SOURCE, start_day: today, daily: BTreeMap::new(), default: Some(quotas) }];
    (today + 1) * DAY_MS - random.below(lasts) / MS
}

/// LIMITS-HOLD: on no day a site got more from the source than its quota. What was written just behind midnight may
/// have been begun before it.
pub(crate) fn check(config: &Config, rates: &Rates, wall_ms: impl Fn(Micros) -> u64) {
    let Some(warmup) = config.warmups.first() else { return };
    let mut sent: BTreeMap<(usize, u64), u32> = BTreeMap::new();
    for (at, site) in rates.by_source(SOURCE) {
        if wall_ms(at) % DAY_MS > UNDER_WAY_MAX / MS {
            *sent.entry((site, wall_ms(at) / DAY_MS)).or_default() += 1;
        }
    }
    for ((site, day), sent) in sent {
        let quota = warmup.quota("", day).unwrap_or(u32::MAX);
        assert!(sent <= quota, "LIMITS-HOLD: {sent} to site {site} on day {day}, by a source that may send {quota}");
    }
}

const RUNS_EVERY: u64 = 6;

pub(crate) const DAY_MS: u64 = 86_400_000;

/// Until the MAIL of what was begun is written.
const UNDER_WAY_MAX: Micros = 15 * MINUTE;
