//! When to try again.

use ahash::HashMap;

use crate::config::{Config, RetryConfig, RetrySchedule};

/// Everybody's retries, prepared once.
#[derive(Debug)]
pub struct Retries {
    general: RetryConfig,
    /// Of the tenants that have their own.
    tenants: HashMap<String, RetryConfig>,
}

impl Retries {
    pub fn new(config: &Config) -> Self {
        let own = config.tenants.iter().filter(|tenant| !tenant.retry.is_empty());
        let own = own.map(|tenant| (tenant.name.clone(), config.retry.with(&tenant.retry)));
        Self { general: config.retry.clone(), tenants: own.collect() }
    }

    /// Of a tenant's messages. One that the configuration no longer has, and the engine's own, have the general ones.
    pub fn of_tenant(&self, tenant: &str) -> &RetryConfig {
        self.tenants.get(tenant).unwrap_or(&self.general)
    }
}

/// Wall milliseconds of the next attempt after `attempts` failed ones (≥ 1).
///
/// `jitter` is uniform over all of `u64`. A doubling interval is shortened or lengthened by up to an eighth, so that
/// messages deferred together do not come back together; a listed one is kept exactly.
pub fn next_attempt_ms(retry: &RetryConfig, attempts: u32, now_ms: u64, jitter: u64) -> u64 {
    assert!(attempts > 0, "a retry follows an attempt");
    let interval_ms = match &retry.schedule {
        RetrySchedule::Listed(intervals) => {
            let place = (attempts as usize - 1).min(intervals.len() - 1);
            intervals[place].as_millis() as u64
        }
        RetrySchedule::Doubling { first, max } => {
            let doublings = (attempts - 1).min(32);
            let plain_ms = (first.as_millis() << doublings).min(max.as_millis()) as u64;
            let spread_ms = plain_ms / 4;
            plain_ms - spread_ms / 2 + jitter % (spread_ms + 1)
        }
    };
    now_ms + interval_ms
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn who_has_no_retries_of_its_own_has_the_general_ones() {
        let toml = "[spool]\nallow_filesystem = true\n[retry]\nmax_age = \"9h\"\n[[tenant]]\nname = \"plain\"\n\
                    [[tenant]]\nname = \"own\"\nretry = { max_age = \"1h\" }\n[[tenant]]\nname = \"other\"\n\
                    retry = { max_age = \"2h\" }\n";
        let config = Config::from_toml(toml, "t.toml", std::path::Path::new(".")).unwrap();
        let retries = Retries::new(&config);
        let hours = |tenant| retries.of_tenant(tenant).max_age.as_secs() / 3_600;
        assert_eq!(["", "plain", "own", "other", "gone"].map(hours), [9, 9, 1, 2, 9]);
    }

    fn retry(schedule: RetrySchedule) -> RetryConfig {
        RetryConfig { schedule, max_age: Duration::from_secs(432_000) }
    }

    #[test]
    fn a_list_is_kept_exactly_and_its_last_interval_repeats() {
        let minutes = |m: u64| Duration::from_secs(60 * m);
        let retry = retry(RetrySchedule::Listed(vec![minutes(1), minutes(5), minutes(20)]));
        let due = |attempts| next_attempt_ms(&retry, attempts, 1_000_000, 0xdead_beef);
        assert_eq!(due(1), 1_000_000 + 60_000);
        assert_eq!(due(2), 1_000_000 + 300_000);
        for attempts in 3..10 {
            assert_eq!(due(attempts), 1_000_000 + 1_200_000, "{attempts}");
        }
    }

    #[test]
    fn doubling_stays_within_an_eighth_and_below_its_maximum() {
        let schedule = RetrySchedule::Doubling { first: Duration::from_secs(1200), max: Duration::from_secs(14_400) };
        let retry = retry(schedule);
        for (attempts, plain_ms) in [(1, 1_200_000), (2, 2_400_000), (4, 9_600_000), (5, 14_400_000), (400, 14_400_000)]
        {
            let mut seen = (u64::MAX, 0);
            for jitter in (0..1000).map(|i| i * 0x9e37_79b9_7f4a) {
                let due = next_attempt_ms(&retry, attempts, 0, jitter);
                seen = (seen.0.min(due), seen.1.max(due));
            }
            assert!(seen.0 >= plain_ms - plain_ms / 8, "{attempts}: {seen:?}");
            assert!(seen.1 <= plain_ms + plain_ms / 8, "{attempts}: {seen:?}");
            assert!(seen.1 - seen.0 > plain_ms / 8, "jitter spreads: {seen:?}");
        }
    }
}
