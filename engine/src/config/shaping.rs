//! `[shaping.default]`, `[provider."name"]` and `[shaping."domain"]`: how an (egress source, site) is treated.
//!
//! Each table is a list of [`Settings`] over what holds already. Later wins: default, provider, provider and source,
//! site, site and source, domain, domain and source.
//!
//! Over 500 lines: each key stands once, with its default, its bounds and how it merges.

use std::borrow::Cow;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use super::automation::{self, AutomationRule};
use super::document::{Entry, Value};
use super::error::Wrong;
use super::rate::Rate;
use super::reader::Section;
use super::route::TLS_MODES;
use super::value::{did_you_mean, dns_name};
use super::{
    Chunking, Config, Dnssec, DomainShaping, EgressSource, EightBit, InDoubt, Layer, Provider, ProviderMatch,
    RetryConfig, RetryRules, Shaping, ShapingRules, Timeouts, egress, retry, shipped,
};
use crate::limits;

/// The words of the `chunking` key.
const CHUNKING: [(&str, Chunking); 3] =
    [("on", Chunking::On), ("off", Chunking::Off), ("back_to_back", Chunking::BackToBack)];
const TIMEOUT_MIN: Duration = Duration::from_millis(1);
const TIMEOUT_MAX: Duration = Duration::from_secs(86_400);

/// What one table says, in the order in which it is applied.
#[derive(Debug, Clone, Default)]
pub struct Settings(Vec<Setting>);

#[derive(Clone)]
struct Setting {
    key: String,
    /// The value as it was written.
    text: String,
    apply: Arc<dyn Fn(&mut Shaping) + Send + Sync>,
}

impl Settings {
    pub fn apply(&self, shaping: &mut Shaping) {
        for setting in &self.0 {
            (setting.apply)(shaping);
        }
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Both; where they speak of the same key, `later` wins.
    #[must_use]
    pub(super) fn followed_by(mut self, later: Self) -> Self {
        self.0.extend(later.0);
        self
    }

    /// Takes what was found at `key`, if anything.
    fn take<T: Copy + Send + Sync + 'static>(
        &mut self,
        section: &Section<'_>,
        key: &'static str,
        found: Option<T>,
        set: fn(&mut Shaping, T),
    ) {
        let Some(value) = found else { return };
        let text = section.node(key).and_then(|node| node.value.literal()).unwrap_or_default();
        self.0.push(Setting { key: section.path_of(key), text, apply: Arc::new(move |shaping| set(shaping, value)) });
    }

    fn count(&mut self, section: &Section<'_>, key: &'static str, example: u64, max: u64, set: fn(&mut Shaping, u32)) {
        let found = section.integer(key, example, 1..=max);
        self.take(section, key, found.and_then(|found| u32::try_from(found.value).ok()), set);
    }

    fn rate(&mut self, section: &Section<'_>, key: &'static str, set: fn(&mut Shaping, Option<Rate>)) {
        let found = section.text(key, "\"100/s\"", Rate::parse);
        self.take(section, key, found.map(|found| found.value), set);
    }

    /// Rules stand before those of the tables that this one wins over.
    fn automation(&mut self, section: &Section<'_>) {
        let rules: Vec<Arc<AutomationRule>> = automation::read(section, section.path());
        if rules.is_empty() {
            return;
        }
        let text = if rules.len() == 1 { "1 rule".to_owned() } else { format!("{} rules", rules.len()) };
        let apply = Arc::new(move |shaping: &mut Shaping| {
            shaping.automation = rules.iter().chain(&*shaping.automation).cloned().collect();
        });
        self.0.push(Setting { key: section.path_of("automation"), text, apply });
    }

    fn timeout(
        &mut self,
        section: &Section<'_>,
        key: &'static str,
        example: &'static str,
        set: fn(&mut Timeouts, Duration),
    ) {
        let range: RangeInclusive<Duration> = TIMEOUT_MIN..=TIMEOUT_MAX;
        let Some(found) = section.duration(key, example, range) else { return };
        let text = section.node(key).and_then(|node| node.value.literal()).unwrap_or_default();
        let apply = Arc::new(move |shaping: &mut Shaping| set(&mut shaping.timeouts, found.value));
        self.0.push(Setting { key: section.path_of(key), text, apply });
    }
}

impl PartialEq for Settings {
    /// Whether they say the same of the same keys.
    fn eq(&self, other: &Self) -> bool {
        let words = |settings: &Self| settings.0.iter().map(|it| (it.key.clone(), it.text.clone())).collect::<Vec<_>>();
        let effect = |settings: &Self| {
            let mut shaping = Shaping::default();
            settings.apply(&mut shaping);
            shaping
        };
        // Only rules are not in the words.
        words(self) == words(other) && effect(self) == effect(other)
    }
}

impl fmt::Debug for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {}", self.key, self.text)
    }
}

impl fmt::Display for Settings {
    /// As `key = value, …`, with the keys' last part. Of what is said twice, the last; rules add up.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name =
            |setting: &Setting| setting.key.rsplit_once('.').map_or(setting.key.clone(), |(_, key)| key.to_owned());
        let is_last = |place: usize| {
            let name_here = name(&self.0[place]);
            name_here == "automation" || self.0[place + 1..].iter().all(|later| name(later) != name_here)
        };
        let last = self.0.iter().enumerate().filter(|(place, _)| is_last(*place)).map(|(_, setting)| setting);
        for (place, setting) in last.enumerate() {
            let key = match setting.key.rsplit_once('.') {
                Some((rest, key)) if rest.ends_with("timeouts") => format!("timeouts.{key}"),
                Some((_, key)) => key.to_owned(),
                None => setting.key.clone(),
            };
            write!(f, "{}{key} = {}", if place == 0 { "" } else { ", " }, setting.text)?;
        }
        if self.is_empty() { f.write_str("nothing of its own") } else { Ok(()) }
    }
}

impl Layer {
    fn apply(&self, source: usize, shaping: &mut Shaping) {
        self.settings.apply(shaping);
        for (_, settings) in self.sources.iter().filter(|(name, _)| *name == source) {
            settings.apply(shaping);
        }
    }
}

impl ShapingRules {
    /// Whether every mail is treated by `[shaping.default]` alone.
    pub fn is_empty(&self) -> bool {
        self.default_sources.is_empty() && self.providers.is_empty() && self.domains.is_empty()
    }

    /// The rules of one domain's table, by the domain in lower case.
    pub fn of_domain(&self, domain: &str) -> Option<usize> {
        self.domains.binary_search_by(|rule| (*rule.domain).cmp(domain)).ok()
    }

    /// The provider that all of a domain's hosts belong to. A name of the domain itself is closest, then the longest
    /// suffix that all its hosts have; of equals, the first by name.
    pub fn provider_of(&self, domain: &str, site: &str) -> Option<usize> {
        let mut closest: Option<(usize, usize)> = None;
        for (place, provider) in self.providers.iter().enumerate() {
            let Some(closeness) = provider.closeness(domain, site) else { continue };
            if closest.is_none_or(|(_, best)| closeness > best) {
                closest = Some((place, closeness));
            }
        }
        closest.map(|(place, _)| place)
    }

    /// What holds for a source at a provider's site: `site_rules` are the tables of the domains whose site it is,
    /// `domain_rule` that of the domain where it stands for the domain only.
    pub fn resolve(
        &self,
        default: &Shaping,
        source: usize,
        provider: Option<usize>,
        site_rules: impl Iterator<Item = usize>,
        domain_rule: Option<usize>,
    ) -> Shaping {
        let mut shaping = default.clone();
        for (_, settings) in self.default_sources.iter().filter(|(name, _)| *name == source) {
            settings.apply(&mut shaping);
        }
        if let Some(provider) = provider {
            self.providers[provider].layer.apply(source, &mut shaping);
        }
        for rule in site_rules.chain(domain_rule) {
            self.domains[rule].layer.apply(source, &mut shaping);
        }
        shaping
    }

    /// What provider and site make of a tenant's retries; the order is that of [`Self::resolve`].
    pub fn retry<'a>(
        &self,
        tenants: &'a RetryConfig,
        provider: Option<usize>,
        site_rules: impl Iterator<Item = usize>,
        domain_rule: Option<usize>,
    ) -> Cow<'a, RetryConfig> {
        let provider = provider.map(|provider| &self.providers[provider].layer);
        let of_sites = site_rules.chain(domain_rule).map(|rule| &self.domains[rule].layer);
        let mut retry = Cow::Borrowed(tenants);
        for layer in provider.into_iter().chain(of_sites).filter(|layer| !layer.retry.is_empty()) {
            retry = Cow::Owned(retry.with(&layer.retry));
        }
        retry
    }

    fn all(&self) -> impl Iterator<Item = &Settings> {
        let providers = self.providers.iter().map(|provider| &provider.layer);
        let layers = providers.chain(self.domains.iter().map(|domain| &domain.layer));
        let of_layers = layers.flat_map(|layer| {
            let sources = layer.sources.iter().map(|(_, settings)| settings);
            std::iter::once(&layer.settings).chain(sources)
        });
        self.default_sources.iter().map(|(_, settings)| settings).chain(of_layers)
    }
}

impl Config {
    /// The most recipients that a transaction may have anywhere.
    pub fn recipients_per_batch_max(&self) -> usize {
        let max = self.of_all_shaping(|shaping| shaping.max_recipients_per_batch);
        max.fold(self.shaping.max_recipients_per_batch, u32::max) as usize
    }

    /// Whether MTA-STS policies count for any mail.
    pub fn uses_mta_sts(&self) -> bool {
        self.shaping.mta_sts || self.of_all_shaping(|shaping| shaping.mta_sts).any(|uses| uses)
    }

    /// Whether TLSA records count for any mail.
    pub fn uses_dane(&self) -> bool {
        let anywhere = self.shaping.dane || self.of_all_shaping(|shaping| shaping.dane).any(|uses| uses);
        anywhere && self.dns.dnssec != Dnssec::Off
    }

    /// What each single table would make of the default.
    fn of_all_shaping<T>(&self, take: impl Fn(&Shaping) -> T) -> impl Iterator<Item = T> {
        self.shaping_rules.all().map(move |settings| {
            let mut shaping = self.shaping.clone();
            settings.apply(&mut shaping);
            take(&shaping)
        })
    }
}

impl Shaping {
    /// The most recipients of one transaction: the rates must let it pass.
    pub fn batch_max(&self) -> usize {
        let rates = [self.max_message_rate, self.provider_max_message_rate];
        let max = rates.into_iter().flatten().map(|rate| rate.batch_max());
        max.fold(self.max_recipients_per_batch, u32::min) as usize
    }
}

impl Provider {
    /// None: it is another's. Else how closely it is named.
    fn closeness(&self, domain: &str, site: &str) -> Option<usize> {
        let named = |known: &ProviderMatch| matches!(known, ProviderMatch::Domain(name) if **name == *domain);
        if self.matches.iter().any(named) {
            return Some(usize::MAX);
        }
        let of_host = |host: &str| {
            let fitting = self.matches.iter().filter_map(|known| match known {
                ProviderMatch::MxSuffix(suffix) => has_suffix(host, suffix).then_some(suffix.len()),
                ProviderMatch::Domain(_) => None,
            });
            fitting.max()
        };
        let mut least = None;
        for host in host_names(site) {
            let fitting = of_host(host)?;
            least = Some(least.map_or(fitting, |least: usize| least.min(fitting)));
        }
        least
    }
}

/// `.example.com` is what every host below example.com ends with; `example.com` is that host as well.
fn has_suffix(host: &str, suffix: &str) -> bool {
    if suffix.starts_with('.') {
        return host.len() > suffix.len() && host.ends_with(suffix);
    }
    host == suffix || host.strip_suffix(suffix).is_some_and(|below| below.len() > 1 && below.ends_with('.'))
}

/// The hosts that a site's name consists of, without a static route's `mx:` and ports.
fn host_names(site: &str) -> impl Iterator<Item = &str> {
    site.split(',').map(|label| {
        let label = label.strip_prefix("mx:").unwrap_or(label);
        match label.rsplit_once(':') {
            Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
            _ => label,
        }
    })
}

/// What tables stand on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Base<'a> {
    pub(super) sources: &'a [EgressSource],
    pub(super) retry: &'a RetryConfig,
}

impl<'a> Base<'a> {
    fn of(config: &'a Config) -> Self {
        Self { sources: &config.egress_sources, retry: &config.retry }
    }
}

/// `[shaping]`: the default, what single sources have of their own, and what single domains have.
pub(super) fn read(section: Section<'_>, config: &mut Config) {
    if let Some(default) = section.table("default", "[shaping.default]") {
        let layer = read_layer(&default, Base::of(config), no_provider_limits);
        layer.settings.apply(&mut config.shaping);
        config.shaping_rules.default_sources = layer.sources;
        default.inapplicable(&["mx_rollup"], "for all domains");
        default.inapplicable(&["retry"], "here: [retry] is for all domains");
        default.finish();
    }
    for (name, entry) in section.others() {
        let Value::Table(table) = &entry.node.value else {
            let wrong = Wrong::new("is not a known key").instead("write it below [shaping.default]");
            section.wrong(entry.key_place, name, wrong);
            continue;
        };
        let domain = match dns_name(name) {
            Ok(domain) if domain.contains('.') || did_you_mean(name, ["default"]).is_none() => domain,
            Ok(_) => {
                let wrong = Wrong::new("is not a known key").instead("write it below [shaping.default]");
                section.wrong(entry.key_place, name, wrong);
                continue;
            }
            Err(wrong) => {
                section.wrong(entry.key_place, name, wrong);
                continue;
            }
        };
        let own = Section::new(section.path_of(name), entry.node.place, table, section.report);
        let layer = read_layer(&own, Base::of(config), no_provider_limits);
        let mx_rollup = own.boolean("mx_rollup").unwrap_or(true);
        own.finish();
        let rules = &mut config.shaping_rules.domains;
        if rules.iter().any(|rule| rule.domain == domain) {
            let wrong = Wrong::new("is the same domain in another case").instead("write its table once");
            section.wrong(entry.key_place, name, wrong);
        } else {
            rules.push(DomainShaping { domain, mx_rollup, layer });
        }
    }
    config.shaping_rules.domains.sort_by(|a, b| a.domain.cmp(&b.domain));
}

/// `[provider]`: tables by their names, over the shipped ones.
pub(super) fn read_providers(section: Section<'_>, config: &mut Config) {
    let shipped = std::mem::take(&mut config.shaping_rules.providers);
    let own = read_provider_tables(&section, Base::of(config), &shipped);
    config.shaping_rules.providers = shipped::merge(own, shipped);
}

/// Each with whether it stands on the shipped one of its name, where there is one.
pub(super) fn read_provider_tables(
    section: &Section<'_>,
    base: Base<'_>,
    shipped: &[Provider],
) -> Vec<(Provider, bool)> {
    let mut providers = Vec::new();
    for (name, entry) in section.others() {
        let Entry { node, key_place } = entry;
        let Value::Table(table) = &node.value else {
            let wrong = Wrong::new(format!("is {}, not a table", node.value.kind()));
            section.wrong(*key_place, name, wrong.instead("write [provider.\"name\"]"));
            continue;
        };
        if let Err(wrong) = egress::name(name) {
            section.wrong(*key_place, name, wrong);
            continue;
        }
        let own = Section::new(section.path_of(name), node.place, table, section.report);
        let layer = read_layer(&own, base, read_provider_limits);
        let is_known = shipped.iter().any(|shipped| shipped.name == name);
        let stands_on_shipped = if is_known {
            own.boolean("shipped").unwrap_or(true)
        } else {
            own.inapplicable(&["shipped"], "here, as no provider of this name is shipped");
            false
        };
        let matches = read_matches(&own, stands_on_shipped);
        own.inapplicable(&["mx_rollup"], "in a provider");
        own.finish();
        let provider = Provider { name: name.to_owned(), matches, layer, is_shipped: false };
        providers.push((provider, stands_on_shipped));
    }
    providers
}

fn read_matches(section: &Section<'_>, may_be_missing: bool) -> Vec<ProviderMatch> {
    let example = "match = [{ mx_suffix = \".example.com\" }]";
    let elements = section.tables("match", example);
    if may_be_missing && section.node("match").is_none() {
        return Vec::new();
    }
    if elements.is_empty() && section.node("match").is_none_or(|node| node.value.literal().as_deref() == Some("[]")) {
        let place = section.place_of("match").unwrap_or(section.place);
        let wrong = Wrong::new("a provider needs something that it is known by");
        section.wrong(place, "match", wrong.instead(format!("write {example}")));
    }
    let mut matches = Vec::new();
    for element in elements {
        let suffix = element.text("mx_suffix", "\".example.com\"", |text| {
            let name = dns_name(text.strip_prefix('.').unwrap_or(text))?;
            Ok(if text.starts_with('.') { format!(".{name}") } else { name })
        });
        let domain = element.text("domain", "\"example.com\"", dns_name);
        match (&suffix, &domain) {
            (Some(_), Some(domain)) => {
                let wrong = Wrong::new("stands beside mx_suffix");
                element.wrong(domain.place, "domain", wrong.instead("write each in braces of its own"));
            }
            (None, None) if element.place_of("mx_suffix").or(element.place_of("domain")).is_none() => {
                element.missing("mx_suffix", "\".example.com\"");
            }
            _ => {}
        }
        matches.extend(suffix.map(|found| ProviderMatch::MxSuffix(found.value)));
        matches.extend(domain.map(|found| ProviderMatch::Domain(found.value)));
        element.finish();
    }
    matches
}

/// A table's settings, and those of `.sources."name"` below it. What else may stand in it is asked for afterwards.
fn read_layer(section: &Section<'_>, base: Base<'_>, read_more: fn(&Section<'_>, &mut Settings)) -> Layer {
    let mut settings = Settings::default();
    read_settings(section, &mut settings);
    read_more(section, &mut settings);
    let retry = section.table("retry", "retry = { retry_interval = \"20m\" }");
    let retry = retry.map_or_else(RetryRules::default, |own| retry::read_of_site(own, base.retry));
    let mut sources = Vec::new();
    let Some(by_name) = section.table("sources", "[….sources.\"ip-a\"]") else {
        return Layer { settings, retry, sources };
    };
    for (name, entry) in by_name.others() {
        let Some(source) = base.sources.iter().position(|source| source.name == name) else {
            let names = base.sources.iter().map(|source| source.name.as_str());
            let instead = match did_you_mean(name, names) {
                Some(meant) => format!("write {meant:?}"),
                None => "write the name of an [[egress_source]]".into(),
            };
            let wrong = Wrong::new(format!("there is no egress source {name:?}"));
            by_name.wrong(entry.key_place, name, wrong.instead(instead));
            continue;
        };
        let Value::Table(table) = &entry.node.value else {
            let wrong = Wrong::new(format!("is {}, not a table", entry.node.value.kind()));
            by_name.wrong(entry.node.place, name, wrong.instead("write its keys below it"));
            continue;
        };
        let own = Section::new(by_name.path_of(name), entry.node.place, table, by_name.report);
        let mut settings = Settings::default();
        read_settings(&own, &mut settings);
        read_more(&own, &mut settings);
        own.finish();
        sources.push((source, settings));
    }
    Layer { settings, retry, sources }
}

fn read_settings(section: &Section<'_>, settings: &mut Settings) {
    use limits::{CONFIG_CONNECTION_LIMIT_MAX, CONFIG_DELIVERIES_PER_CONNECTION_MAX, CONFIG_RECIPIENTS_PER_BATCH_MAX};
    settings.count(section, "connection_limit", 10, CONFIG_CONNECTION_LIMIT_MAX, |s, n| s.connection_limit = n);
    let key = "max_deliveries_per_connection";
    settings.count(section, key, 100, CONFIG_DELIVERIES_PER_CONNECTION_MAX, |s, n| s.max_deliveries_per_connection = n);
    let key = "max_recipients_per_batch";
    settings.count(section, key, 100, CONFIG_RECIPIENTS_PER_BATCH_MAX, |s, n| s.max_recipients_per_batch = n);
    settings.rate(section, "max_message_rate", |shaping, rate| shaping.max_message_rate = rate);
    settings.rate(section, "max_connection_rate", |shaping, rate| shaping.max_connection_rate = rate);
    let idle = section.duration("idle_timeout", "60s", TIMEOUT_MIN..=TIMEOUT_MAX).map(|found| found.value);
    settings.take(section, "idle_timeout", idle, |shaping, timeout| shaping.idle_timeout = timeout);
    let pipelining = section.boolean("pipelining");
    settings.take(section, "pipelining", pipelining, |shaping, pipelining| shaping.pipelining = pipelining);
    let chunking = section.choice("chunking", &CHUNKING, &[]);
    settings.take(section, "chunking", chunking, |shaping, chunking| shaping.chunking = chunking);
    settings.count(section, "max_in_flight", 8, limits::CONFIG_IN_FLIGHT_MAX, |s, n| s.max_in_flight = n);
    let in_doubt = section.choice("in_doubt", &[("retry", InDoubt::Retry), ("hold", InDoubt::Hold)], &[]);
    settings.take(section, "in_doubt", in_doubt, |shaping, in_doubt| shaping.in_doubt = in_doubt);
    let eight_bit = section.choice("eight_bit", &[("fail", EightBit::Fail), ("send", EightBit::Send)], &[]);
    settings.take(section, "eight_bit", eight_bit, |shaping, eight_bit| shaping.eight_bit = eight_bit);
    let tls = section.choice("tls", &TLS_MODES, &[]);
    settings.take(section, "tls", tls, |shaping, tls| shaping.tls = tls);
    if let Some(timeouts) = section.table("timeouts", "timeouts = { connect = \"30s\" }") {
        settings.timeout(&timeouts, "connect", "30s", |timeouts, time| timeouts.connect = time);
        settings.timeout(&timeouts, "banner", "5m", |timeouts, time| timeouts.banner = time);
        settings.timeout(&timeouts, "ehlo", "5m", |timeouts, time| timeouts.ehlo = time);
        settings.timeout(&timeouts, "mail", "5m", |timeouts, time| timeouts.mail = time);
        settings.timeout(&timeouts, "rcpt", "5m", |timeouts, time| timeouts.rcpt = time);
        settings.timeout(&timeouts, "data", "2m", |timeouts, time| timeouts.data = time);
        settings.timeout(&timeouts, "data_block", "3m", |timeouts, time| timeouts.data_block = time);
        settings.timeout(&timeouts, "data_end", "10m", |timeouts, time| timeouts.data_end = time);
        settings.timeout(&timeouts, "quit", "10s", |timeouts, time| timeouts.quit = time);
        timeouts.finish();
    }
    let mta_sts = section.boolean("mta_sts");
    settings.take(section, "mta_sts", mta_sts, |shaping, mta_sts| shaping.mta_sts = mta_sts);
    let dane = section.boolean("dane");
    settings.take(section, "dane", dane, |shaping, dane| shaping.dane = dane);
    settings.automation(section);
}

/// What a route may say instead.
pub(super) fn read_chunking(section: &Section<'_>) -> (Option<Chunking>, Option<u32>) {
    let chunking = section.choice("chunking", &CHUNKING, &[]);
    let max = section.integer("max_in_flight", 8, 1..=limits::CONFIG_IN_FLIGHT_MAX);
    (chunking, max.and_then(|found| u32::try_from(found.value).ok()))
}

fn read_provider_limits(section: &Section<'_>, settings: &mut Settings) {
    let max = limits::CONFIG_CONNECTION_LIMIT_MAX;
    settings.count(section, "provider_connection_limit", 20, max, |s, n| s.provider_connection_limit = Some(n));
    settings.rate(section, "provider_max_message_rate", |shaping, rate| shaping.provider_max_message_rate = rate);
}

fn no_provider_limits(section: &Section<'_>, _: &mut Settings) {
    section.inapplicable(
        &["match", "shipped", "provider_connection_limit", "provider_max_message_rate"],
        "outside [provider]",
    );
}

#[cfg(test)]
mod tests;
