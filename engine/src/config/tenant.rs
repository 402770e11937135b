//! `[[tenant]]` and `[return_path]`: whose mail it is, what may stand in it, and by which pool it goes.

use std::collections::{BTreeMap, BTreeSet};

use super::egress::{DEFAULT_POOL, duplicate};
use super::error::{Place, Placed, Wrong};
use super::reader::Section;
use super::{Config, Priority, Rate, RetryRules, Tenant, retry, value};
use crate::limits;

/// The words of the `priority` key.
const PRIORITIES: [(&str, Priority); 3] =
    [("high", Priority::High), ("normal", Priority::Normal), ("bulk", Priority::Bulk)];

impl Config {
    pub fn tenant(&self, name: &str) -> Option<&Tenant> {
        self.tenants.iter().find(|tenant| tenant.name == name)
    }
}

impl Tenant {
    /// One with every default: it goes by the pool named `default`, and any domain may stand in its mail.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            egress_pool: DEFAULT_POOL.into(),
            domains: Vec::new(),
            priority: Priority::default(),
            max_message_rate: None,
            max_injection_rate: None,
            retry: RetryRules::default(),
        }
    }
}

/// Reads the tenants; the pools and the general `[retry]` in `config` are known.
pub(super) fn read(top: &Section<'_>, config: &Config) -> Vec<Tenant> {
    let mut tenants = Vec::new();
    let mut names = BTreeMap::new();
    let mut sections = top.tables("tenant", "[[tenant]]");
    if let Some(beyond) = sections.get(limits::CONFIG_TENANTS_MAX) {
        let wrong = Wrong::new(format!("more than {} tenants", limits::CONFIG_TENANTS_MAX));
        top.wrong(beyond.place, "tenant", wrong.instead("use fewer"));
        sections.truncate(limits::CONFIG_TENANTS_MAX);
    }
    for section in sections {
        tenants.extend(read_tenant(section, config, &mut names));
    }
    tenants
}

fn read_tenant(section: Section<'_>, config: &Config, names: &mut BTreeMap<String, Place>) -> Option<Tenant> {
    let name = section.text("name", "\"acme\"", name);
    match &name {
        Some(found) => {
            if let Some(other) = names.insert(found.value.clone(), found.place) {
                duplicate(&section, found.place, &found.value, other);
            }
        }
        None if section.place_of("name").is_none() => section.missing("name", "\"acme\""),
        None => {}
    }
    let egress_pool = section.text("egress_pool", "\"default\"", |text| pool(text, config));
    let domains = read_domains(&section);
    let priority = section.choice("priority", &PRIORITIES, &[]).unwrap_or(Priority::Normal);
    let retry = section.table("retry", "[tenant.retry]");
    let retry = retry.map_or_else(RetryRules::default, |section| retry::read(section, &config.retry));
    let max_message_rate = section.text("max_message_rate", "\"200/s\"", Rate::parse).and_then(|found| found.value);
    let max_injection_rate = section.text("max_injection_rate", "\"500/s\"", Rate::parse_unpaced);
    let max_injection_rate = max_injection_rate.and_then(|found| found.value);
    section.not_yet(&[("credentials", None), ("tokens", None)]);
    section.finish();
    Some(Tenant {
        name: name?.value,
        egress_pool: egress_pool.map_or_else(|| DEFAULT_POOL.into(), |found| found.value),
        domains,
        priority,
        max_message_rate,
        max_injection_rate,
        retry,
    })
}

pub(super) fn read_return_path(section: Section<'_>) -> Vec<String> {
    let domains = read_domains(&section);
    if section.place_of("domains").is_none() {
        section.missing("domains", "[\"bounces.example.com\"]");
    }
    section.finish();
    domains
}

fn read_domains(section: &Section<'_>) -> Vec<String> {
    let example = "[\"acme.example\"]";
    let Some(list) = section.list("domains", example, value::dns_name) else { return Vec::new() };
    if section.node("domains").is_some_and(|node| node.value.literal().as_deref() == Some("[]")) {
        let wrong = Wrong::new("has no domain");
        section.wrong(list.place, "domains", wrong.instead(format!("write for example domains = {example}")));
    }
    if list.value.len() > limits::CONFIG_TENANT_DOMAINS_MAX {
        let wrong = Wrong::new(format!("has more than {} domains", limits::CONFIG_TENANT_DOMAINS_MAX));
        section.wrong(list.place, "domains", wrong.instead("write parent domains; those below are included"));
    }
    let mut seen = BTreeSet::new();
    for Placed { value: domain, place } in &list.value {
        if !seen.insert(domain) {
            let wrong = Wrong::new(format!("{domain:?} is there twice"));
            section.wrong(*place, "domains", wrong.instead("write it once"));
        }
    }
    list.value.into_iter().map(|domain| domain.value).collect()
}

fn pool(text: &str, config: &Config) -> Result<String, Wrong> {
    if config.pool(text).is_some() {
        return Ok(text.into());
    }
    let meant = value::did_you_mean(text, config.egress_pools.iter().map(|pool| pool.name.as_str()));
    let instead = match meant {
        Some(meant) => format!("write {meant:?}"),
        None => format!("add [[egress_pool]] with name = {text:?}"),
    };
    Err(Wrong::new(format!("there is no egress pool {text:?}")).instead(instead))
}

/// Names stand in the names of queues (`campaign:tenant@domain`), in headers and in metrics.
fn name(text: &str) -> Result<String, Wrong> {
    let fits = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if text.is_empty() || text.len() > 64 || !fits {
        let wrong = Wrong::new(format!("{text:?} is not a name"));
        return Err(wrong.instead("write 1 to 64 letters, digits or any of \"-_.\""));
    }
    Ok(text.into())
}
