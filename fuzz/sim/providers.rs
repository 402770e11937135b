//! Runs in which a provider rolls two sites up: what they have in common is limited together, by each source, and they
//! have retries of their own; and pairs have a rate of connections.
//!
//! What is drawn here comes from a generator of its own.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use postrider::config::{Config, Limit, Rate, RetrySchedule};

use crate::clock::Micros;
use crate::peer::Host;
use crate::random::Random;
use crate::rates::{self, Rates};
use crate::world::{SITES, World};

/// Of every so manieth seed.
const EVERY: u64 = 3;

/// The provider's name, and its sites.
pub(crate) const PROVIDER: &str = "both";
pub(crate) const ROLLED_UP: [usize; 2] = [0, 1];

/// What holds for its sites together, by each source, and for the connections of each pair.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rollup {
    connection_limit: Option<usize>,
    rate: Option<Rate>,
    connection_rate: Option<Rate>,
    /// When connections were begun, by source and site.
    connected: BTreeMap<(usize, usize), Vec<Micros>>,
}

/// Draws whether there is one.
pub(crate) fn draw(seed: u64, config: &mut Config, has_rates: bool) -> Rollup {
    let mut random = Random::new(seed.rotate_left(12) ^ 0x726f_6c6c);
    if !random.one_in(EVERY) {
        return Rollup::default();
    }
    let limit = 1 + random.below(2 * u64::from(config.shaping.connection_limit));
    let (count, seconds) = [(15 + random.below(60), 60), (900 + random.below(2_000), 3_600)][random.below(2) as usize];
    let burst = if random.one_in(2) { 1 } else { 1 + random.below(count / 2).min(20) };
    let unit = if seconds == 60 { "min" } else { "h" };
    let suffixes = ROLLED_UP.map(|site| format!("{{ mx_suffix = \".s{site}.example\" }}")).join(", ");
    let text = format!(
        "[spool]\nallow_filesystem = true\n[provider.{PROVIDER}]\nmatch = [{suffixes}]\n\
         provider_connection_limit = {limit}\nprovider_max_message_rate = \"{count}/{unit},max_burst={burst}\"\n\
         retry = {{ retry_interval = [\"90s\", \"100s\"] }}\n"
    );
    let read = Config::from_toml(&text, "provider", Path::new(".")).expect("a provider as it is described");
    config.shaping_rules = read.shaping_rules;
    let rate = |count: u64, seconds, max_burst: u64| Rate {
        count: count as u32,
        period: Duration::from_secs(seconds),
        max_burst: max_burst as u32,
    };
    if random.one_in(2) {
        let (count, seconds) = [(10 + random.below(20), 60), (3, 10)][random.below(2) as usize];
        config.shaping.max_connection_rate = Some(rate(count, seconds, 1 + random.below(count)));
    }
    if has_rates {
        let count = 30 + random.below(60);
        let limit = rate(count, 60, 1 + random.below(count));
        config.limits.push(Limit { provider: Some(PROVIDER.to_owned()), ..rates::any("a provider", limit) });
    }
    Rollup {
        connection_limit: Some(limit as usize),
        rate: Some(rate(count, seconds, burst)),
        connection_rate: config.shaping.max_connection_rate,
        connected: BTreeMap::new(),
    }
}

impl Rollup {
    pub(crate) fn is_there(&self) -> bool {
        self.connection_limit.is_some()
    }

    /// Whether the provider has this site.
    pub(crate) fn has(&self, site: usize) -> bool {
        self.is_there() && ROLLED_UP.contains(&site)
    }

    /// When its mail is tried again, by the names of its sites.
    pub(crate) fn retries(&self, hosts: &[Host]) -> BTreeMap<String, RetrySchedule> {
        let schedule = RetrySchedule::Listed([90, 100].map(Duration::from_secs).to_vec());
        let sites = ROLLED_UP.into_iter().filter(|site| self.has(*site));
        sites.map(|site| (rates::name_of(hosts, site), schedule.clone())).collect()
    }

    /// LIMITS-HOLD: of a provider's sites together, and of connections.
    pub(crate) fn check(&self, rates: &Rates) {
        for source in 0..3 {
            let of_both = rates.by_source(source).filter(|(_, site)| self.has(*site)).map(|(at, _)| at);
            let mut times: Vec<Micros> = of_both.collect();
            times.sort_unstable();
            check_steady(&format!("the provider by source {source}"), self.rate, &times);
        }
        for (pair, times) in &self.connected {
            check_steady(&format!("connections of {pair:?}"), self.connection_rate, times);
        }
    }
}

impl World {
    /// A connection is begun.
    pub(crate) fn watch_rollup(&mut self, source: usize, site: usize) {
        let now = self.clock.micros();
        self.rollup.connected.entry((source, site)).or_default().push(now);
        if !self.rollup.has(site) {
            return;
        }
        let is_of = |site: usize| self.rollup.has(site) && site < SITES;
        let open = self.links.values().filter(|link| link.is_open && link.source == source && is_of(link.site)).count();
        let limit = self.rollup.connection_limit.expect("a provider is there");
        assert!(open <= limit, "LIMITS-HOLD: {open} connections of source {source} to a provider, of {limit}");
    }
}

/// No window of the rate's period has more than it may.
fn check_steady(what: &str, rate: Option<Rate>, times: &[Micros]) {
    let Some(rate) = rate else { return };
    for window in times.windows(rate.count as usize + 1) {
        let [first, .., last] = *window else { continue };
        let period = rate.period.as_micros() as Micros;
        assert!(last - first >= period, "LIMITS-HOLD: more than {} of {what}, from {first} to {last}", rate.count);
    }
}
