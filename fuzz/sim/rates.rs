//! Rates, as they show outside: when the engine wrote each MAIL, and for how many recipients. The network may hold it
//! up and bunch it together, so what counts is when it was given to the network; the peer reads what it was.
//!
//! All that was seen is looked at in the end, over all lives: no window of a limit's own length has more than it may.
//! Shares of one pair are compared likewise, where nothing is wrong in the world.

use std::collections::BTreeSet;
use std::time::Duration;

use postrider::config::{Config, Limit, Priority, Rate, RetryRules, Tenant};
use postrider::deliver::route::site_name;

use crate::checker::{Ledger, Marker, marker_of};
use crate::clock::{Micros, SECOND};
use crate::peer::Host;
use crate::providers::ROLLED_UP;
use crate::random::Random;
use crate::reload::Epoch;
use crate::shares::Share;
use crate::world::{OTHER_POOL, SITES};

/// One recipient of a transaction.
#[derive(Debug, Clone, Copy)]
struct Recipient {
    at: Micros,
    source: usize,
    site: usize,
    /// Place in [`Rates::domains`].
    domain: usize,
    marker: Marker,
}

/// All that was seen of a run.
#[derive(Debug, Default)]
pub(crate) struct Rates {
    seen: Vec<Recipient>,
    domains: Vec<String>,
}

impl Rates {
    /// RCPT came, for the MAIL with this reverse path that was written at that time.
    pub(crate) fn see(&mut self, at: Micros, source: usize, site: usize, reverse_path: &str, recipient: &str) {
        let domain = recipient.rsplit_once('@').map_or("", |(_, domain)| domain);
        let domain = self.domains.iter().position(|known| known == domain).unwrap_or_else(|| {
            self.domains.push(domain.to_owned());
            self.domains.len() - 1
        });
        self.seen.push(Recipient { at, source, site, domain, marker: marker_of(reverse_path) });
    }

    /// When each recipient was written to by a source, and at which site.
    pub(crate) fn by_source(&self, source: usize) -> impl Iterator<Item = (Micros, usize)> {
        self.seen.iter().filter(move |seen| seen.source == source).map(|seen| (seen.at, seen.site))
    }

    /// Of how many recipients of these messages a source has told a peer.
    pub(crate) fn count(&self, source: usize, markers: &[Marker]) -> usize {
        self.seen.iter().filter(|seen| seen.source == source && markers.contains(&seen.marker)).count()
    }

    /// LIMITS-HOLD, for all limits that the operator has configured over time. The pairs of the first `sites` are known
    /// by them.
    pub(crate) fn check(&mut self, epochs: &[Epoch], ledger: &Ledger, hosts: &[Host], sites: usize) {
        self.seen.sort_by_key(|recipient| recipient.at);
        let rates = |of: &dyn Fn(&Config) -> Option<Rate>| -> Vec<InForce> {
            let in_force = |epoch: &Epoch| InForce { from: epoch.from, until: epoch.until, rate: of(&epoch.config) };
            epochs.iter().map(in_force).collect()
        };
        let of_pair = rates(&|config| config.shaping.max_message_rate);
        for source in 0..epochs.iter().map(|epoch| epoch.config.egress_sources.len()).max().unwrap_or_default() {
            for site in 0..sites {
                let seen = self.seen.iter().filter(|seen| (seen.source, seen.site) == (source, site));
                check(&format!("source {source} at site {site}"), &of_pair, seen);
            }
        }
        for tenant in &epochs[0].config.tenants {
            let of_tenant = rates(&|config| config.tenant(&tenant.name)?.max_message_rate);
            check(&tenant.name, &of_tenant, self.seen.iter().filter(|seen| is_of_tenant(seen, &tenant.name, ledger)));
        }
        for limit in &epochs[0].config.limits {
            let covered = self.seen.iter().filter(|seen| self.is_under(limit, seen, &epochs[0].config, ledger, hosts));
            let named = |config: &Config| config.limits.iter().find(|it| it.name == limit.name).cloned();
            check(&limit.name, &rates(&|config| Some(named(config)?.max_message_rate)), covered);
        }
    }

    /// Whether a limit over a minute or more has been used up nearly, and most of it in the last half of its period.
    pub(crate) fn is_used_up(&self, now: Micros, config: &Config, ledger: &Ledger, hosts: &[Host]) -> bool {
        let is_used_up = |rate: Option<Rate>, is_covered: &dyn Fn(&Recipient) -> bool| {
            let Some(rate) = rate.filter(|rate| rate.period >= Duration::from_secs(60)) else { return false };
            let since = now.saturating_sub(micros(rate.period) / 2);
            // They come about in the order of their times.
            let lately = self.seen.iter().rev().take_while(|seen| seen.at + LATE_MAX > since);
            let used = lately.filter(|seen| seen.at > since && is_covered(seen)).count();
            used as u64 * 4 >= u64::from(rate.count) * 3
        };
        let sources = 0..config.egress_sources.len();
        let mut pairs = sources.flat_map(|source| (0..SITES).map(move |site| (source, site)));
        pairs.any(|pair| is_used_up(config.shaping.max_message_rate, &|seen| (seen.source, seen.site) == pair))
            || config
                .tenants
                .iter()
                .any(|tenant| is_used_up(tenant.max_message_rate, &|seen| is_of_tenant(seen, &tenant.name, ledger)))
            || config.limits.iter().any(|limit| {
                is_used_up(Some(limit.max_message_rate), &|seen| self.is_under(limit, seen, config, ledger, hosts))
            })
    }

    fn is_under(&self, limit: &Limit, seen: &Recipient, config: &Config, ledger: &Ledger, hosts: &[Host]) -> bool {
        limit.tenant.as_ref().is_none_or(|tenant| is_of_tenant(seen, tenant, ledger))
            && limit.campaign.as_ref().is_none_or(|campaign| is_of(seen, "X-Campaign", campaign, ledger))
            && limit.source.is_none_or(|source| source == seen.source)
            && limit.egress_pool.as_ref().is_none_or(|name| {
                // No source belongs to two pools.
                let pool = config.egress_pools.iter().find(|other| other.name == *name);
                pool.is_some_and(|pool| pool.sources.iter().any(|(source, _)| *source == seen.source))
            })
            && limit.site.as_ref().is_none_or(|name| *name == name_of(hosts, seen.site))
            && (limit.provider.is_none() || ROLLED_UP.contains(&seen.site))
            && limit.domain.as_ref().is_none_or(|domain| *domain == self.domains[seen.domain])
    }

    /// FAIR: at each source, of what was written to a site from `since` until the last of `small`, no more was others'
    /// than the share, beside what was under way already.
    pub(crate) fn check_share(
        &self,
        what: &str,
        site: usize,
        since: Micros,
        small: &[Marker],
        share: Share,
        under_way: usize,
    ) {
        let sources = 1 + self.seen.iter().map(|seen| seen.source).max().unwrap_or_default();
        for source in 0..sources {
            let mut of_pair: Vec<&Recipient> = self.seen.iter().filter(|seen| seen.at >= since).collect();
            of_pair.retain(|seen| (seen.source, seen.site) == (source, site));
            of_pair.sort_by_key(|seen| seen.at);
            let of_small = of_pair.iter().enumerate().filter(|(_, seen)| small.contains(&seen.marker));
            let of_small: Vec<(usize, Marker)> = of_small.map(|(place, seen)| (place, seen.marker)).collect();
            // The one that was queued last: what goes behind it has come from another source, and had no claim before.
            let Some(&(last, _)) = of_small.iter().max_by_key(|(_, marker)| *marker) else { continue };
            let own = of_small.iter().filter(|(place, _)| *place <= last).count();
            let others = last + 1 - own;
            assert!(
                others <= share.of_others(own) + under_way,
                "FAIR: {what}: by source {source}, {others} others went before the last of {own}"
            );
        }
    }
}

fn micros(period: Duration) -> Micros {
    period.as_micros() as Micros
}

fn is_of_tenant(seen: &Recipient, tenant: &str, ledger: &Ledger) -> bool {
    is_of(seen, "X-Tenant", tenant, ledger)
}

fn is_of(seen: &Recipient, field: &str, value: &str, ledger: &Ledger) -> bool {
    ledger.sent(seen.marker).steering.contains(&format!("{field}: {value}\r\n"))
}

/// A limit as a configuration has it, while that may be in force. None: it has none.
#[derive(Debug, Clone, Copy)]
struct InForce {
    from: Micros,
    until: Micros,
    rate: Option<Rate>,
}

/// Of recipients in the order of their times. In a window into which a change falls the larger limit counts.
fn check<'a>(whose: &str, rates: &[InForce], seen: impl Iterator<Item = &'a Recipient>) {
    let times: Vec<Micros> = seen.map(|seen| seen.at).collect();
    let known: BTreeSet<(u32, Micros)> =
        rates.iter().filter_map(|it| Some((it.rate?.count, micros(it.rate?.period)))).collect();
    for (count, period) in known {
        for window in times.windows(count as usize + 1) {
            let [first, .., last] = *window else { continue };
            if last - first >= period {
                continue;
            }
            let in_force = |is_shorter: bool| {
                let in_force = rates.iter().filter(move |it| it.from <= last && it.until >= first);
                in_force.filter(move |it| it.rate.is_some_and(|rate| micros(rate.period) < period) == is_shorter)
            };
            let units = |it: &InForce| {
                it.rate.map_or(u64::MAX, |rate| u64::from(rate.count) * ((last - first) / micros(rate.period) + 1))
            };
            // One of a shorter period remembers no more than that of what was used before it.
            let [most, of_shorter] = [false, true].map(|is_shorter| in_force(is_shorter).map(units).max().unwrap_or(0));
            assert!(
                most.saturating_add(of_shorter) > count.into(),
                "LIMITS-HOLD: more than {count} of {whose}, from {first} to {last}"
            );
        }
    }
}

/// Tenants of all classes, and rates of pairs, tenants and others, such that a run's mail can go in an hour.
pub(crate) fn draw(config: &mut Config, random: &mut Random) {
    config.shaping.max_message_rate = Some(rate(random, 30));
    let classes = [("large", Priority::Normal), ("small", Priority::Normal), ("high", Priority::High)];
    for (name, priority) in classes.into_iter().chain([("bulk", Priority::Bulk), ("limited", Priority::Normal)]) {
        let is_limited = name == "limited" || random.one_in(4);
        config.tenants.push(Tenant {
            name: name.to_owned(),
            egress_pool: "default".to_owned(),
            domains: Vec::new(),
            priority,
            max_message_rate: is_limited.then(|| rate(random, 60)),
            max_injection_rate: None,
            retry: RetryRules::default(),
        });
    }
    if random.one_in(2) {
        let source = Some(random.below(2) as usize);
        config.limits.push(Limit { source, ..any("a source", rate(random, 60)) });
    }
    if random.one_in(2) {
        let campaign = Some("c1".to_owned());
        let tenant = random.one_in(2).then(|| "large".to_owned());
        config.limits.push(Limit { campaign, tenant, ..any("a campaign", rate(random, 60)) });
    }
    if random.one_in(3) {
        config.limits.push(any("all", rate(random, 120)));
    }
}

/// In every other run a pair may send most of a minute's worth at once. Even pacing would hide that what was counted is
/// forgotten: then a window has hardly more than it may.
pub(crate) fn draw_bursts(config: &mut Config, random: &mut Random) {
    let Some(rate) = config.shaping.max_message_rate.as_mut() else { return };
    if random.one_in(2) {
        let count = 8 + random.below(24);
        let max_burst = count - random.below(count / 2);
        *rate = Rate { count: count as u32, period: Duration::from_secs(60), max_burst: max_burst as u32 };
    }
}

/// In most runs one of the limits over many pairs, a tenant's or another, is used up in bursts, too.
pub(crate) fn draw_shared_bursts(config: &mut Config, random: &mut Random) {
    // What much mail is under has to let it pass in the end.
    let of_tenants = config.tenants.iter_mut().filter_map(|tenant| Some((tenant.max_message_rate.as_mut()?, 6)));
    let limits = config.limits.iter_mut().map(|limit| {
        let is_wide = limit.name == "all" || limit.source.is_some();
        (&mut limit.max_message_rate, if is_wide { 20 } else { 6 })
    });
    let mut rates: Vec<(&mut Rate, u64)> = of_tenants.chain(limits).collect();
    if !random.one_in(4) {
        let place = random.below(rates.len() as u64) as usize;
        let (rate, least) = &mut rates[place];
        let count = *least + random.below(2 * *least);
        let max_burst = count - random.below(count / 2);
        **rate = Rate { count: count as u32, period: Duration::from_secs(60), max_burst: max_burst as u32 };
    }
}

/// Limits of a pool, a domain and a site, beside those; no share is compared there.
pub(crate) fn draw_narrow(config: &mut Config, hosts: &[Host], random: &mut Random) {
    if random.one_in(2) {
        config.limits.push(Limit { egress_pool: Some(OTHER_POOL.to_owned()), ..any("a pool", rate(random, 60)) });
    }
    let domain = format!("d{}.example", random.below(SITES as u64));
    if random.one_in(2) {
        config.limits.push(Limit { domain: Some(domain), ..any("a domain", rate(random, 60)) });
    }
    let site = name_of(hosts, random.below(SITES as u64 - 1) as usize);
    if random.one_in(2) {
        config.limits.push(Limit { site: Some(site), ..any("a site", rate(random, 60)) });
    }
}

/// The name of a site with an MX set.
pub(crate) fn name_of(hosts: &[Host], site: usize) -> String {
    site_name(hosts.iter().filter(|host| host.site == site).map(|host| host.name.as_str()))
}

/// Of all mail.
pub(crate) fn any(name: &str, max_message_rate: Rate) -> Limit {
    Limit {
        name: name.to_owned(),
        tenant: None,
        campaign: None,
        provider: None,
        source: None,
        egress_pool: None,
        site: None,
        domain: None,
        max_message_rate,
    }
}

/// So many a minute or some times as many, over a second, a minute or an hour.
fn rate(random: &mut Random, per_minute_min: u64) -> Rate {
    let per_minute = per_minute_min + random.below(per_minute_min * 8);
    let (count, seconds) = match random.below(5) {
        0 => (per_minute * 60, 3_600),
        1 | 2 => (per_minute, 60),
        _ => (per_minute.div_ceil(60), 1),
    };
    // An hour's burst would leave nothing for the rest of it.
    let burst_max = if seconds == 3_600 { count / 20 } else { count };
    let max_burst = if random.one_in(3) { 1 + random.below(burst_max) } else { 1 };
    Rate { count: count as u32, period: Duration::from_secs(seconds), max_burst: max_burst as u32 }
}

/// As if the operator had written twice as much.
pub(crate) fn double(config: &mut Config) {
    let double = |rate: &mut Rate| rate.count *= 2;
    config.shaping.max_message_rate.iter_mut().for_each(double);
    config.tenants.iter_mut().filter_map(|tenant| tenant.max_message_rate.as_mut()).for_each(double);
    config.limits.iter_mut().for_each(|limit| double(&mut limit.max_message_rate));
}

/// For most mail by the default pool, whose it is.
pub(crate) fn tenant(random: &mut Random) -> Option<&'static str> {
    let names = [None, Some("large"), Some("large"), Some("small"), Some("high"), Some("bulk"), Some("limited")];
    names[random.below(names.len() as u64) as usize]
}

/// MAIL may be that late at its peer, so that the next one is seen before it.
const LATE_MAX: Micros = 60 * SECOND;
