//! Whose message it is, and what may stand in it.
//!
//! A trusted client names the tenant with X-Tenant. Else it is the one tenant that lists the MAIL FROM domain, or else
//! the From domain; of two that list a domain and one above it, the nearer. Where several list it, none can be chosen;
//! where none does, the message is the engine's own, which may say anything and go anywhere. Without any tenant in the
//! configuration all mail is, and X-Tenant means nothing.

use ahash::{HashMap, HashMapExt as _, HashSet};

use super::Refusal;
use crate::config::{Config, Priority};
use crate::mail::address::domain_of;
use crate::mail::header::FromDomains;

/// All tenants, for lookup.
#[derive(Debug)]
pub(super) struct Tenants {
    tenants: Vec<Tenant>,
    names: HashMap<String, usize>,
    /// Who lists a domain.
    listed: HashMap<String, Vec<usize>>,
    return_path_domains: HashSet<String>,
}

/// What a tenant's messages may say, and how they go.
#[derive(Debug)]
pub(super) struct Tenant {
    pub(super) name: String,
    pub(super) egress_pool: String,
    pub(super) priority: Priority,
    pub(super) max_age_ms: u64,
    /// The names by which a message may ask for another way than the whole pool: sources of it.
    sources: HashSet<String>,
    /// Empty: any.
    domains: HashSet<String>,
}

impl Tenants {
    pub(super) fn new(config: &Config) -> Self {
        let mut listed: HashMap<String, Vec<usize>> = HashMap::new();
        for (place, tenant) in config.tenants.iter().enumerate() {
            for domain in &tenant.domains {
                listed.entry(domain.clone()).or_default().push(place);
            }
        }
        Self {
            tenants: config.tenants.iter().map(|tenant| Tenant::new(config, tenant)).collect(),
            names: config.tenants.iter().enumerate().map(|(place, tenant)| (tenant.name.clone(), place)).collect(),
            listed,
            return_path_domains: config.return_path_domains.iter().cloned().collect(),
        }
    }

    /// The message's tenant; None: it is the engine's own. `named` is what a trusted client said.
    pub(super) fn choose(
        &self,
        named: Option<&str>,
        reverse_path: &str,
        from: &FromDomains,
    ) -> Result<Option<&Tenant>, Refusal> {
        let refused = |text: String| Refusal::new(550, (5, 7, 1), text);
        let tenant = if self.tenants.is_empty() {
            return Ok(None);
        } else if let Some(name) = named {
            let place = self.names.get(name).copied();
            place.ok_or_else(|| refused(format!("X-Tenant: no tenant is called {name}")))?
        } else {
            let sender = ascii(domain_of(reverse_path));
            let by_sender = self.who_lists(&sender);
            let by_from = from.domains.first().map_or(&[][..], |domain| self.who_lists(&ascii(domain)));
            match (by_sender, by_from) {
                ([one], _) | (_, [one]) => *one,
                ([], []) => return Ok(None),
                (several, _) if several.len() > 1 => return Err(refused(ambiguous("MAIL FROM", &sender))),
                _ => return Err(refused(ambiguous("From", from.domains.first().map_or("", String::as_str)))),
            }
        };
        let tenant = &self.tenants[tenant];
        self.check(tenant, reverse_path, from).map_err(refused)?;
        Ok(Some(tenant))
    }

    /// The null reverse path belongs to everybody (RFC 5321 §4.5.5).
    fn check(&self, tenant: &Tenant, reverse_path: &str, from: &FromDomains) -> Result<(), String> {
        if tenant.domains.is_empty() {
            return Ok(());
        }
        let name = &tenant.name;
        let sender = ascii(domain_of(reverse_path));
        if !reverse_path.is_empty()
            && !is_below(&tenant.domains, &sender)
            && !is_below(&self.return_path_domains, &sender)
        {
            return Err(format!("MAIL FROM: {sender} is no domain of tenant {name}"));
        }
        if from.unreadable {
            return Err(format!("From: not every address can be read, and tenant {name} may use its own domains only"));
        }
        match from.domains.iter().find(|domain| !is_below(&tenant.domains, &ascii(domain))) {
            Some(domain) => Err(format!("From: {domain} is no domain of tenant {name}")),
            None => Ok(()),
        }
    }

    /// Those that list the domain or, where none does, the nearest one above it.
    fn who_lists(&self, domain: &str) -> &[usize] {
        above(domain).find_map(|domain| self.listed.get(domain)).map_or(&[], Vec::as_slice)
    }
}

impl Tenant {
    fn new(config: &Config, tenant: &crate::config::Tenant) -> Self {
        let max_age = config.retry.with(&tenant.retry).max_age;
        // A pool of the same name would be meant, and it is not the tenant's.
        let is_free = |name: &String| config.pool(name).is_none();
        let sources = config.pool(&tenant.egress_pool).map_or(&[][..], |pool| &pool.sources);
        let sources = sources.iter().map(|&(source, _)| config.egress_sources[source].name.clone());
        Self {
            name: tenant.name.clone(),
            egress_pool: tenant.egress_pool.clone(),
            priority: tenant.priority,
            max_age_ms: u64::try_from(max_age.as_millis()).unwrap_or(u64::MAX),
            sources: sources.filter(is_free).collect(),
            domains: tenant.domains.iter().cloned().collect(),
        }
    }

    /// Whether X-Virtual-MTA may name this pool or source.
    pub(super) fn may_use(&self, name: &str) -> bool {
        name == self.egress_pool || self.sources.contains(name)
    }
}

fn ambiguous(what: &str, domain: &str) -> String {
    format!("{what}: several tenants list {domain}; name one with X-Tenant")
}

fn is_below(domains: &HashSet<String>, domain: &str) -> bool {
    above(domain).any(|domain| domains.contains(domain))
}

/// A domain and all those above it.
fn above(domain: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(domain), |domain| domain.split_once('.').map(|(_, above)| above))
}

/// As the configuration names domains (RFC 5890 §2.3.2.1); one that has no such form is listed nowhere.
fn ascii(domain: &str) -> String {
    if domain.is_ascii() {
        return domain.to_ascii_lowercase();
    }
    idna::domain_to_ascii(domain).unwrap_or_default()
}

#[cfg(test)]
mod tests;
