//! Whose limits a domain's mail belongs to, and what shaping holds there.
//!
//! A domain's site is known from its route. A table `[shaping."domain"]` holds for that domain's whole site, so the
//! control thread tells which site each such domain has.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;

use ahash::{HashMap, HashMapExt as _};

use crate::config::{Config, RetryConfig, RouteIndex, Shaping, TlsMode};
use crate::handover::{PairKey, Route, RouteKey};
use crate::limits::ROUTES_CACHED_MAX;
use crate::pool::suspension::Destination;

/// Where a domain's mail is counted.
#[derive(Debug)]
pub(super) struct Place {
    /// The site's name by its hosts, from which the rest was found.
    hosts: String,
    provider: Option<usize>,
    /// The provider's name, else the site's.
    rollup: Arc<str>,
    /// The site's name; of a domain that is a site of its own, with the domain's in front.
    site: Arc<str>,
    /// The table that stands for this domain only.
    domain_rule: Option<usize>,
    /// The static route, in the order of the configuration.
    route: Option<usize>,
}

impl Place {
    pub(super) fn pair(&self, source: usize) -> PairKey {
        PairKey { source, rollup: Arc::clone(&self.rollup), site: Arc::clone(&self.site) }
    }

    pub(super) fn destination(&self) -> Destination<'_> {
        Destination { rollup: &self.rollup, site: &self.site }
    }

    pub(super) fn is_of(&self, pair: &PairKey) -> bool {
        self.site == pair.site && self.rollup == pair.rollup
    }
}

/// Places and shapings that were found lately.
#[derive(Debug)]
pub(super) struct Shapings {
    config: Arc<Config>,
    routes: Arc<RouteIndex>,
    default: Arc<Shaping>,
    places: HashMap<RouteKey, Arc<Place>>,
    /// By source, site and provider: a provider may have some of a site's domains only.
    merged: HashMap<(usize, Arc<str>, Option<usize>), Arc<Shaping>>,
    /// The site of each domain that has a table, by the table's index.
    rule_sites: Vec<Option<Arc<str>>>,
    site_rules: HashMap<Arc<str>, BTreeSet<usize>>,
}

impl Shapings {
    pub(super) fn new(config: &Arc<Config>, routes: Arc<RouteIndex>) -> Self {
        Self {
            config: Arc::clone(config),
            routes,
            default: Arc::new(config.shaping.clone()),
            places: HashMap::new(),
            merged: HashMap::new(),
            rule_sites: vec![None; config.shaping_rules.domains.len()],
            site_rules: HashMap::new(),
        }
    }

    /// Those of another configuration. What is known of domains' sites is known still.
    pub(super) fn replaced_by(&self, config: &Arc<Config>, routes: Arc<RouteIndex>) -> Self {
        let mut new = Self::new(config, routes);
        for (rule, site) in self.config.shaping_rules.domains.iter().zip(&self.rule_sites) {
            if let Some(site) = site {
                new.learn_site(&rule.domain, site);
            }
        }
        new
    }

    /// What holds at an owner's pair, as far as its names tell. None: no mail has such a pair now.
    pub(super) fn of_pair(&self, pair: &PairKey) -> Option<Arc<Shaping>> {
        let rules = &self.config.shaping_rules;
        let of_domain = pair.site.split_once('@').and_then(|(domain, hosts)| Some((rules.of_domain(domain)?, hosts)));
        let of_domain = of_domain.filter(|(rule, _)| !rules.domains[*rule].mx_rollup);
        let hosts = of_domain.map_or(&*pair.site, |(_, hosts)| hosts);
        let named = |name: &str| rules.providers.iter().position(|provider| provider.name == name);
        let provider = if pair.rollup == pair.site { None } else { Some(named(&pair.rollup)?) };
        let site_rules = self.site_rules.get(hosts).into_iter().flatten().copied();
        let domain_rule = of_domain.map(|(rule, _)| rule);
        Some(Arc::new(rules.resolve(&self.config.shaping, pair.source, provider, site_rules, domain_rule)))
    }

    /// Where mail is counted when it goes by this route.
    pub(super) fn place(&mut self, key: &RouteKey, route: &Route) -> Arc<Place> {
        if let Some(place) = self.places.get(key)
            && place.hosts == route.site.name
        {
            return Arc::clone(place);
        }
        let place = Arc::new(self.find_place(key, &route.site.name));
        if self.places.len() >= ROUTES_CACHED_MAX {
            self.places.clear();
        }
        self.places.insert(key.clone(), Arc::clone(&place));
        place
    }

    fn find_place(&mut self, key: &RouteKey, hosts: &str) -> Place {
        let (config, domain) = (Arc::clone(&self.config), &*key.domain);
        let rules = &config.shaping_rules;
        let own_rule = rules.of_domain(domain);
        let domain_rule = own_rule.filter(|rule| !rules.domains[*rule].mx_rollup);
        if let Some(rule) = own_rule.filter(|rule| rules.domains[*rule].mx_rollup) {
            self.set_rule_site(rule, hosts);
        }
        let provider = rules.provider_of(domain, hosts);
        let site: Arc<str> = match domain_rule {
            Some(_) => format!("{domain}@{hosts}").into(),
            None => hosts.into(),
        };
        let rollup = provider.map_or_else(|| Arc::clone(&site), |place| Arc::from(&*rules.providers[place].name));
        let route = self.routes.place_of(domain, key.matched);
        Place { hosts: hosts.to_owned(), provider, rollup, site, domain_rule, route }
    }

    /// The site of a domain that has a table.
    pub(super) fn learn_site(&mut self, domain: &str, hosts: &str) {
        let rules = &self.config.shaping_rules;
        if let Some(rule) = rules.of_domain(domain).filter(|rule| rules.domains[*rule].mx_rollup) {
            self.set_rule_site(rule, hosts);
        }
    }

    fn set_rule_site(&mut self, rule: usize, hosts: &str) {
        if self.rule_sites[rule].as_deref() == Some(hosts) {
            return;
        }
        if let Some(rules) = self.rule_sites[rule].take().and_then(|before| self.site_rules.get_mut(&before)) {
            rules.remove(&rule);
        }
        let hosts: Arc<str> = hosts.into();
        self.site_rules.entry(Arc::clone(&hosts)).or_default().insert(rule);
        self.rule_sites[rule] = Some(hosts);
        self.site_rules.retain(|_, rules| !rules.is_empty());
        self.merged.clear();
    }

    /// When mail to a domain is tried again, where its tenant's retries are these.
    pub(super) fn retry<'a>(
        &mut self,
        tenants: &'a RetryConfig,
        key: &RouteKey,
        route: &Route,
    ) -> Cow<'a, RetryConfig> {
        let place = self.place(key, route);
        let site_rules = self.site_rules.get(&*place.hosts).into_iter().flatten().copied();
        self.config.shaping_rules.retry(tenants, place.provider, site_rules, place.domain_rule)
    }

    /// What is asked of TLS there: by its static route, where that says so, else by what shaping holds.
    pub(super) fn tls(&self, place: &Place, shaping: &Shaping) -> TlsMode {
        let route = place.route.and_then(|route| self.config.routes.get(route));
        route.map_or(shaping.tls, |route| route.tls_beside(shaping.tls))
    }

    /// What holds for a source there.
    pub(super) fn shaping(&mut self, source: usize, place: &Place) -> Arc<Shaping> {
        let rules = &self.config.shaping_rules;
        if rules.is_empty() {
            return Arc::clone(&self.default);
        }
        let key = (source, Arc::clone(&place.site), place.provider);
        if let Some(shaping) = self.merged.get(&key) {
            return Arc::clone(shaping);
        }
        let site_rules = self.site_rules.get(&*place.hosts).into_iter().flatten().copied();
        let merged = rules.resolve(&self.config.shaping, source, place.provider, site_rules, place.domain_rule);
        let shaping = Arc::new(merged);
        if self.merged.len() >= ROUTES_CACHED_MAX {
            self.merged.clear();
        }
        self.merged.insert(key, Arc::clone(&shaping));
        shaping
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;
    use crate::deliver::route::Site;

    fn shapings(rules: &str) -> Shapings {
        let text = format!("{rules}\n[spool]\nallow_filesystem = true\n");
        let config = Config::from_toml(&text, "t.toml", Path::new("/nonexistent")).unwrap();
        let routes = Arc::new(RouteIndex::new(&config.routes));
        Shapings::new(&Arc::new(config), routes)
    }

    fn route(site: &str) -> Route {
        let site = Site { name: site.to_owned(), hosts: Vec::new(), expires: Duration::MAX };
        Route { site: Arc::new(site), tls: TlsMode::Opportunistic, sts: None, dane: true, terms: Arc::default() }
    }

    fn limit(shapings: &mut Shapings, domain: &str, site: &str) -> u32 {
        let place = shapings.place(&RouteKey::of_domain(domain), &route(site));
        shapings.shaping(0, &place).connection_limit
    }

    #[test]
    fn a_domains_table_holds_for_its_whole_site() {
        let mut shapings = shapings("[shaping.\"a.test\"]\nconnection_limit = 3\n");
        assert_eq!(limit(&mut shapings, "b.test", "mx.test"), 10, "nobody knows yet whose site it is");
        shapings.learn_site("a.test", "mx.test");
        assert_eq!(limit(&mut shapings, "b.test", "mx.test"), 3);
        assert_eq!(limit(&mut shapings, "b.test", "other.test"), 10);
        shapings.learn_site("a.test", "other.test");
        assert_eq!([limit(&mut shapings, "b.test", "mx.test"), limit(&mut shapings, "b.test", "other.test")], [10, 3]);
        assert_eq!(limit(&mut shapings, "a.test", "third.test"), 3, "its own mail tells too");
        assert_eq!(limit(&mut shapings, "b.test", "other.test"), 10);
    }

    #[test]
    fn a_domain_alone_is_a_site_of_its_own() {
        let mut shapings = shapings("[shaping.\"a.test\"]\nmx_rollup = false\nconnection_limit = 3\n");
        assert_eq!([limit(&mut shapings, "a.test", "mx.test"), limit(&mut shapings, "b.test", "mx.test")], [3, 10]);
        let pair = |shapings: &mut Shapings, domain: &str| {
            shapings.place(&RouteKey::of_domain(domain), &route("mx.test")).pair(0)
        };
        let (a, b) = (pair(&mut shapings, "a.test"), pair(&mut shapings, "b.test"));
        assert_eq!((&*a.site, &*a.rollup), ("a.test@mx.test", "a.test@mx.test"));
        assert_eq!((&*b.site, &*b.rollup), ("mx.test", "mx.test"));
    }

    #[test]
    fn a_providers_limits_are_not_those_of_other_domains_at_the_same_hosts() {
        let mut shapings = shapings("[provider.p]\nmatch = [{ domain = \"a.test\" }]\nconnection_limit = 3\n");
        assert_eq!(limit(&mut shapings, "a.test", "mx.test"), 3);
        assert_eq!(limit(&mut shapings, "b.test", "mx.test"), 10);
    }

    #[test]
    fn a_provider_rolls_sites_up() {
        let rules = "[provider.p]\nmatch = [{ mx_suffix = \".p.test\" }]\n";
        let mut shapings = shapings(rules);
        let pair =
            |shapings: &mut Shapings, site: &str| shapings.place(&RouteKey::of_domain(site), &route(site)).pair(0);
        let (a, b) = (pair(&mut shapings, "a.p.test"), pair(&mut shapings, "b.p.test"));
        assert_eq!([&*a.rollup, &*b.rollup], ["p", "p"]);
        assert_ne!(a.site, b.site);
        assert_eq!(&*pair(&mut shapings, "a.p.test,c.test").rollup, "a.p.test,c.test");
    }
}
