//! `[[limit]]`: a rate over many sources and sites at once; and which limits some mail is under.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

use super::egress::duplicate;
use super::error::Wrong;
use super::reader::Section;
use super::value::{did_you_mean, domain};
use super::{Config, Limit, Rate};
use crate::limits;

/// A limit's place in [`SharedLimits`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LimitId(pub u32);

/// What a limit may ask about some mail.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    pub tenant: &'a str,
    pub campaign: &'a str,
    /// Empty where no limit asks for it; so is the domain.
    pub pool: &'a str,
    pub domain: &'a str,
    pub site: &'a str,
    /// Index into [`Config::egress_sources`].
    pub source: usize,
    /// The provider that the mail's site belongs to.
    pub provider: Option<&'a str>,
}

/// All limits that hold over sources and sites, those of tenants among them.
#[derive(Debug, Default)]
pub struct SharedLimits {
    limits: Vec<SharedLimit>,
    of_tenants: HashMap<String, Vec<LimitId>>,
    of_all: Vec<LimitId>,
    /// What limits ask for, beside tenants and campaigns.
    pools: BTreeSet<Arc<str>>,
    domains: BTreeSet<Arc<str>>,
    injection: HashMap<String, Rate>,
}

#[derive(Debug, Clone)]
struct SharedLimit {
    /// The same over restarts and changes of the configuration, so that what was reserved is found again.
    name: Arc<str>,
    rate: Rate,
    campaign: Option<String>,
    source: Option<usize>,
    provider: Option<String>,
    pool: Option<String>,
    site: Option<String>,
    domain: Option<String>,
}

impl SharedLimits {
    pub fn new(config: &Config) -> Self {
        let mut all = Self::default();
        for tenant in &config.tenants {
            all.injection.extend(tenant.max_injection_rate.map(|rate| (tenant.name.clone(), rate)));
            if let Some(rate) = tenant.max_message_rate {
                let name = format!("tenant {}", tenant.name).into();
                all.add(SharedLimit::new(name, rate), Some(&tenant.name));
            }
        }
        for limit in &config.limits {
            let Limit { name, tenant, campaign, provider, source, egress_pool: pool, site, domain, max_message_rate } =
                limit.clone();
            all.pools.extend(pool.as_deref().map(Arc::from));
            all.domains.extend(domain.as_deref().map(Arc::from));
            let any = SharedLimit::new(format!("limit {name}").into(), max_message_rate);
            all.add(SharedLimit { campaign, source, provider, pool, site, domain, ..any }, tenant.as_ref());
        }
        all
    }

    /// Those of another configuration, in which a known name keeps its id. What is gone keeps it too, and no mail is
    /// under it.
    pub fn replaced_by(&self, config: &Config) -> Self {
        let new = Self::new(config);
        let mut ids: HashMap<Arc<str>, LimitId> = HashMap::new();
        let mut limits: Vec<SharedLimit> = self.limits.clone();
        ids.extend(self.limits.iter().enumerate().map(|(id, limit)| (Arc::clone(&limit.name), LimitId(id as u32))));
        let mut places = Vec::with_capacity(new.limits.len());
        for limit in new.limits {
            let next = LimitId(limits.len() as u32);
            let id = *ids.entry(Arc::clone(&limit.name)).or_insert(next);
            places.push(id);
            if id == next {
                limits.push(limit);
            } else {
                limits[id.0 as usize] = limit;
            }
        }
        let placed = |ids: Vec<LimitId>| ids.into_iter().map(|id| places[id.0 as usize]).collect::<Vec<_>>();
        let of_tenants = new.of_tenants.into_iter().map(|(tenant, ids)| (tenant, placed(ids))).collect();
        Self { limits, of_tenants, of_all: placed(new.of_all), ..new }
    }

    /// How many there are that no mail is under any more.
    pub fn retired(&self) -> usize {
        self.limits.len() - self.of_all.len() - self.of_tenants.values().map(Vec::len).sum::<usize>()
    }

    fn add(&mut self, limit: SharedLimit, tenant: Option<&String>) {
        let id = LimitId(self.limits.len() as u32);
        self.limits.push(limit);
        match tenant {
            Some(tenant) => self.of_tenants.entry(tenant.clone()).or_default().push(id),
            None => self.of_all.push(id),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.limits.is_empty()
    }

    /// The limits that some mail is under.
    pub fn of<'a>(&'a self, subject: Subject<'a>) -> impl Iterator<Item = LimitId> + 'a {
        // Nearly always there is none.
        let of_tenant = if self.of_tenants.is_empty() { None } else { self.of_tenants.get(subject.tenant) };
        let candidates = of_tenant.into_iter().flatten().chain(&self.of_all).copied();
        candidates.filter(move |id| self.limits[id.0 as usize].covers(subject))
    }

    /// A flow's egress pool, as far as limits ask for it.
    pub fn told_pool(&self, pool: &str) -> Arc<str> {
        self.pools.get(pool).cloned().unwrap_or_default()
    }

    /// The same of its recipients' domain, in lower case.
    pub fn told_domain(&self, domain: &str) -> Arc<str> {
        self.domains.get(domain).cloned().unwrap_or_default()
    }

    /// How many recipients are accepted of a tenant's mail.
    pub fn injection(&self, tenant: &str) -> Option<Rate> {
        // Nearly always there is none.
        if self.injection.is_empty() { None } else { self.injection.get(tenant).copied() }
    }

    pub fn name(&self, id: LimitId) -> &Arc<str> {
        &self.limits[id.0 as usize].name
    }

    pub fn rate(&self, id: LimitId) -> Rate {
        self.limits[id.0 as usize].rate
    }

    /// The most recipients of one transaction under these limits.
    pub fn batch_max(&self, ids: impl IntoIterator<Item = LimitId>) -> u32 {
        ids.into_iter().map(|id| self.rate(id).batch_max()).min().unwrap_or(u32::MAX)
    }
}

impl SharedLimit {
    /// Of all mail.
    fn new(name: Arc<str>, rate: Rate) -> Self {
        Self { name, rate, campaign: None, source: None, provider: None, pool: None, site: None, domain: None }
    }

    fn covers(&self, subject: Subject<'_>) -> bool {
        self.campaign.as_ref().is_none_or(|campaign| campaign == subject.campaign)
            && self.source.is_none_or(|source| source == subject.source)
            && self.provider.as_deref().is_none_or(|provider| Some(provider) == subject.provider)
            && self.pool.as_deref().is_none_or(|pool| pool == subject.pool)
            && self.site.as_deref().is_none_or(|site| site == subject.site)
            && self.domain.as_deref().is_none_or(|domain| domain == subject.domain)
    }
}

/// `tenant acme, provider google: 200/s`.
impl Limit {
    pub(super) fn write(&self, config: &Config, out: &mut String) -> fmt::Result {
        use fmt::Write;
        let source = self.source.and_then(|source| config.egress_sources.get(source)).map(|source| &source.name);
        let selectors = [
            ("tenant", self.tenant.as_ref()),
            ("campaign", self.campaign.as_ref()),
            ("provider", self.provider.as_ref()),
            ("source", source),
            ("pool", self.egress_pool.as_ref()),
            ("site", self.site.as_ref()),
            ("domain", self.domain.as_ref()),
        ];
        let selectors = selectors.into_iter().filter_map(|(kind, value)| Some(format!("{kind} {}", value?)));
        let whom: Vec<String> = selectors.collect();
        let whom = if whom.is_empty() { "all mail".to_owned() } else { whom.join(", ") };
        writeln!(out, "  {}{whom}: {}", super::describe::column(&self.name), self.max_message_rate)
    }
}

/// Reads all limits; sources, tenants and providers in `config` are known.
pub(super) fn read(top: &Section<'_>, config: &Config) -> Vec<Limit> {
    let mut found = Vec::new();
    let mut names = BTreeMap::new();
    let mut sections = top.tables("limit", "[[limit]]");
    if let Some(beyond) = sections.get(limits::CONFIG_SHARED_LIMITS_MAX) {
        let wrong = Wrong::new(format!("more than {} limits", limits::CONFIG_SHARED_LIMITS_MAX));
        top.wrong(beyond.place, "limit", wrong.instead("give tenants a max_message_rate of their own"));
        sections.truncate(limits::CONFIG_SHARED_LIMITS_MAX);
    }
    for section in sections {
        let name = section.text("name", "\"acme at google\"", line);
        match &name {
            Some(found) => {
                if let Some(other) = names.insert(found.value.clone(), found.place) {
                    duplicate(&section, found.place, &found.value, other);
                }
            }
            None if section.place_of("name").is_none() => section.missing("name", "\"acme at google\""),
            None => {}
        }
        found.extend(read_limit(section, name.map(|name| name.value), config));
    }
    found
}

fn read_limit(section: Section<'_>, name: Option<String>, config: &Config) -> Option<Limit> {
    let tenants = config.tenants.iter().map(|tenant| tenant.name.as_str());
    let tenant = section.text("tenant", "\"acme\"", |text| one_of(text, "tenant", "[[tenant]]", tenants));
    let campaign = section.text("campaign", "\"spring\"", line);
    let providers = config.shaping_rules.providers.iter().map(|provider| provider.name.as_str());
    let provider = section.text("provider", "\"google\"", |text| one_of(text, "provider", "[provider]", providers));
    let sources = || config.egress_sources.iter().map(|source| source.name.as_str());
    let source =
        section.text("egress_source", "\"ip-a\"", |text| one_of(text, "egress source", "[[egress_source]]", sources()));
    let source = source.and_then(|found| sources().position(|name| name == found.value));
    let pools = config.egress_pools.iter().map(|pool| pool.name.as_str());
    let egress_pool =
        section.text("egress_pool", "\"shared\"", |text| one_of(text, "egress pool", "[[egress_pool]]", pools));
    let site = section.text("site", "\"mx1.example.net\"", site);
    let domain = section.text("domain", "\"example.net\"", domain);
    let rate = section.text("max_message_rate", "\"200/s\"", Rate::parse);
    match &rate {
        None if section.place_of("max_message_rate").is_none() => section.missing("max_message_rate", "\"200/s\""),
        _ => {}
    }
    section.not_yet(&[("connection_limit", None)]);
    section.finish();
    Some(Limit {
        name: name?,
        tenant: tenant.map(|found| found.value),
        campaign: campaign.map(|found| found.value),
        provider: provider.map(|found| found.value),
        source,
        egress_pool: egress_pool.map(|found| found.value),
        site: site.map(|found| found.value),
        domain: domain.map(|found| found.value),
        // "unlimited" limits nothing.
        max_message_rate: rate?.value?,
    })
}

fn one_of<'a>(
    text: &str,
    what: &str,
    table: &str,
    mut names: impl Iterator<Item = &'a str> + Clone,
) -> Result<String, Wrong> {
    if names.clone().any(|name| name == text) {
        return Ok(text.into());
    }
    let instead = match did_you_mean(text, &mut names) {
        Some(meant) => format!("write {meant:?}"),
        None => format!("write the name of a {table}"),
    };
    Err(Wrong::new(format!("there is no {what} {text:?}")).instead(instead))
}

/// It stands in rows and in the spool's file of what is reserved, one line each.
fn line(text: &str) -> Result<String, Wrong> {
    let fits = text.chars().all(|c| !c.is_control());
    if text.is_empty() || text.len() > 64 || !fits || text.trim() != text {
        let wrong = Wrong::new(format!("{text:?} is not a name"));
        return Err(wrong.instead("write 1 to 64 octets in one line, for example \"acme at google\""));
    }
    Ok(text.into())
}

/// As events name it: the hosts of an MX set, or a static route's.
fn site(text: &str) -> Result<String, Wrong> {
    if text.is_empty() || text.len() > limits::SITE_NAME_BYTES_MAX || text.chars().any(char::is_control) {
        let wrong = Wrong::new(format!("{text:?} is no site"));
        return Err(wrong.instead("write what events and `postctl queue list` show as \"site\""));
    }
    Ok(text.into())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn limits(text: &str) -> SharedLimits {
        let text = format!("{text}\n[spool]\nallow_filesystem = true\n");
        SharedLimits::new(&Config::from_toml(&text, "t.toml", Path::new("/nonexistent")).unwrap())
    }

    #[test]
    fn a_known_limit_keeps_its_id() {
        let tenant = |name: &str| format!("[[tenant]]\nname = \"{name}\"\nmax_message_rate = \"9/s\"\n");
        let limit = |name: &str, rate: &str| format!("[[limit]]\nname = \"{name}\"\nmax_message_rate = \"{rate}\"\n");
        let config = |text: String| {
            let text = format!("{text}[spool]\nallow_filesystem = true\n");
            Config::from_toml(&text, "t.toml", Path::new("/nonexistent")).unwrap()
        };
        let first = limits(&(tenant("a") + &limit("x", "1/s") + &limit("y", "2/s")));
        let second = first.replaced_by(&config(tenant("b") + &limit("y", "3/s") + &limit("z", "4/s")));
        let of = |limits: &SharedLimits, tenant| {
            let (campaign, pool, domain, site) = ("", "", "", "mx.test");
            let subject = Subject { tenant, campaign, pool, domain, site, source: 0, provider: None };
            let found = limits.of(subject).map(|id| (id.0, limits.name(id).to_string(), limits.rate(id).count));
            found.collect::<Vec<_>>()
        };
        let named = |id, name: &str, count| (id, name.to_owned(), count);
        let all = [named(2, "limit y", 3), named(4, "limit z", 4)];
        assert_eq!(of(&second, "a"), all, "neither its tenant's nor x are there any more");
        assert_eq!(of(&second, "b")[0], named(3, "tenant b", 9));
        assert_eq!((first.retired(), second.retired()), (0, 2));
        let third = second.replaced_by(&config(limit("x", "5/s")));
        assert_eq!((of(&third, "a"), third.retired()), (vec![named(1, "limit x", 5)], 4));
    }

    #[test]
    fn limits_cover_what_they_name() {
        let limits = limits(
            "[[egress_source]]\nname = \"ip-a\"\nsource_address = \"192.0.2.1\"\n[[tenant]]\nname = \"acme\"\n\
             max_message_rate = \"9/s\"\n[[tenant]]\nname = \"zeta\"\n[[limit]]\nname = \"all of a campaign\"\n\
             campaign = \"c\"\nmax_message_rate = \"8/s\"\n[[limit]]\nname = \"acme at google\"\ntenant = \"acme\"\n\
             provider = \"google\"\nmax_message_rate = \"7/s\"\n[[limit]]\nname = \"by ip-a\"\n\
             egress_source = \"ip-a\"\nmax_message_rate = \"6/s\"\n[[egress_pool]]\nname = \"fast\"\n\
             sources = [{ source = \"ip-a\" }]\n[[limit]]\nname = \"by pool\"\negress_pool = \"fast\"\n\
             max_message_rate = \"5/s\"\n[[limit]]\nname = \"to site\"\nsite = \"mx.test\"\n\
             max_message_rate = \"4/s\"\n[[limit]]\nname = \"to domain\"\ndomain = \"Shop.test\"\n\
             max_message_rate = \"3/s\"\n[[limit]]\nname = \"none\"\n\
             max_message_rate = \"unlimited\"\n",
        );
        let of = |tenant, campaign, source, provider| {
            let (pool, domain, site) = ("", "", "mx.other");
            let subject = Subject { tenant, campaign, source, provider, pool, domain, site };
            limits.of(subject).map(|id| limits.name(id).to_string()).collect::<Vec<_>>()
        };
        let (ip_a, other) = (0, 1);
        assert_eq!(of("zeta", "", other, None), Vec::<String>::new());
        assert_eq!(of("acme", "", other, None), ["tenant acme"]);
        assert_eq!(of("acme", "c", other, Some("yahoo")), ["tenant acme", "limit all of a campaign"]);
        assert_eq!(of("acme", "", ip_a, Some("google")), ["tenant acme", "limit acme at google", "limit by ip-a"]);
        assert_eq!(of("", "", ip_a, Some("google")), ["limit by ip-a"]);
        let any = Subject {
            tenant: "",
            campaign: "",
            source: other,
            provider: None,
            pool: &limits.told_pool("fast"),
            domain: &limits.told_domain("shop.test"),
            site: "mx.test",
        };
        let found: Vec<String> = limits.of(any).map(|id| limits.name(id).to_string()).collect();
        assert_eq!(found, ["limit by pool", "limit to site", "limit to domain"]);
        assert_eq!((&*limits.told_pool("slow"), &*limits.told_domain("test")), ("", ""), "nobody asks for them");
        assert!(!limits.is_empty() && SharedLimits::default().is_empty());
    }
}
