//! `[[egress_source]]` and `[[egress_pool]]`: the addresses that mail leaves from.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::error::{Place, Wrong};
use super::reader::Section;
use super::{Config, EgressPool, EgressSource, value};
use crate::limits;
use crate::mail::endpoint::Endpoint;

/// The name of the source that is bound to nothing. It is there without being configured.
pub(super) const UNBOUND_SOURCE: &str = "unspecified";

/// The pool that is used where nothing else says so.
pub(super) const DEFAULT_POOL: &str = "default";

impl EgressSource {
    /// Whether it can connect there: with an address of its own, only to the same family.
    pub fn reaches(&self, to: &Endpoint) -> bool {
        match (self.source_address, to) {
            (Some(own), Endpoint::Ip(to)) => own.is_ipv4() == to.is_ipv4(),
            (None, _) | (_, Endpoint::Unix(_)) => true,
        }
    }
}

impl Config {
    pub fn pool(&self, name: &str) -> Option<&EgressPool> {
        self.egress_pools.iter().find(|pool| pool.name == name)
    }

    /// The pool that is used where nothing else says so.
    pub fn default_pool(&self) -> &EgressPool {
        // Loading and `Config::new` both see to it; an embedder who removed it learns of it from `Config::check`.
        self.pool(DEFAULT_POOL).expect("a pool named \"default\"")
    }
}

/// Sources and pools, with the unbound source where it is used and a pool named "default" in any case.
pub(super) fn read(top: &Section<'_>, hostname: &str) -> (Vec<EgressSource>, Vec<EgressPool>) {
    let mut sources = Sources { list: Vec::new(), by_name: BTreeMap::new(), hostname };
    let mut sections = top.tables("egress_source", "[[egress_source]]");
    if let Some(beyond) = sections.get(limits::CONFIG_EGRESS_SOURCES_MAX) {
        let wrong = Wrong::new(format!("more than {} egress sources", limits::CONFIG_EGRESS_SOURCES_MAX));
        top.wrong(beyond.place, "egress_source", wrong.instead("use fewer"));
        sections.truncate(limits::CONFIG_EGRESS_SOURCES_MAX);
    }
    for section in sections {
        read_source(section, &mut sources);
    }
    let mut pools = Vec::new();
    let mut pool_names = BTreeMap::new();
    for section in top.tables("egress_pool", "[[egress_pool]]") {
        pools.extend(read_pool(section, &mut sources, &mut pool_names));
    }
    if !pools.iter().any(|pool: &EgressPool| pool.name == DEFAULT_POOL) {
        pools.push(EgressPool { name: DEFAULT_POOL.into(), sources: vec![(sources.unbound(), 1)] });
    }
    (sources.list, pools)
}

struct Sources<'a> {
    list: Vec<EgressSource>,
    by_name: BTreeMap<String, (usize, Place)>,
    hostname: &'a str,
}

impl Sources<'_> {
    /// The index of the unbound source, which is added when it is first needed.
    fn unbound(&mut self) -> usize {
        let position = self.list.iter().position(|source| source.name == UNBOUND_SOURCE);
        position.unwrap_or_else(|| {
            self.list.push(EgressSource::unbound(self.hostname));
            self.list.len() - 1
        })
    }
}

fn read_source(section: Section<'_>, sources: &mut Sources<'_>) {
    let name = section.text("name", "\"ip-a\"", name);
    let address = section.text("source_address", "\"192.0.2.1\"", source_address);
    let ehlo_domain = section.text("ehlo_domain", "\"a.mta.example.com\"", value::domain);
    let suspend = section.boolean("suspend_when_unplumbed");
    if address.is_none() && section.place_of("source_address").is_none() {
        section.missing("source_address", "\"192.0.2.1\"");
    }
    if let Some(name) = name {
        let source = EgressSource {
            name: name.value.clone(),
            source_address: address.map(|found| found.value),
            ehlo_domain: ehlo_domain.map_or_else(|| sources.hostname.into(), |found| found.value),
            suspend_when_unplumbed: suspend.unwrap_or(true),
            is_retired: false,
        };
        if name.value == UNBOUND_SOURCE {
            let wrong = Wrong::new(format!("{UNBOUND_SOURCE:?} is the name of the unbound source, always there"));
            section.wrong(name.place, "name", wrong.instead("write another name"));
        } else if let Some((_, other)) = sources.by_name.get(&name.value) {
            duplicate(&section, name.place, &name.value, *other);
        } else {
            sources.by_name.insert(name.value, (sources.list.len(), name.place));
            sources.list.push(source);
        }
    } else if section.place_of("name").is_none() {
        section.missing("name", "\"ip-a\"");
    }
    section.finish();
}

fn read_pool(
    section: Section<'_>,
    sources: &mut Sources<'_>,
    names: &mut BTreeMap<String, Place>,
) -> Option<EgressPool> {
    let example = "[{ source = \"ip-a\", weight = 1 }]";
    let name = section.text("name", "\"shared\"", name);
    match &name {
        Some(found) => {
            if let Some(other) = names.insert(found.value.clone(), found.place) {
                duplicate(&section, found.place, &found.value, other);
            }
        }
        None if section.place_of("name").is_none() => section.missing("name", "\"shared\""),
        None => {}
    }
    let mut members: Vec<(usize, u32)> = Vec::new();
    let elements = section.tables("sources", &format!("sources = {example}"));
    if elements.is_empty() && section.node("sources").is_none_or(|node| node.value.literal().as_deref() == Some("[]")) {
        let place = section.place_of("sources").unwrap_or(section.place);
        let wrong = Wrong::new("a pool needs at least one source");
        section.wrong(place, "sources", wrong.instead(format!("write sources = {example}")));
    }
    for element in elements {
        read_member(element, sources, &mut members);
    }
    section.finish();
    Some(EgressPool { name: name?.value, sources: members })
}

fn read_member(element: Section<'_>, sources: &mut Sources<'_>, members: &mut Vec<(usize, u32)>) {
    let weight = element.integer("weight", 1, 1..=limits::CONFIG_SOURCE_WEIGHT_MAX);
    let weight = weight.and_then(|found| u32::try_from(found.value).ok()).unwrap_or(1);
    let source = element.text("source", "\"ip-a\"", |text| {
        if text == UNBOUND_SOURCE {
            return Ok(sources.unbound());
        }
        sources.by_name.get(text).map(|(index, _)| *index).ok_or_else(|| {
            let names: Vec<&str> = sources.by_name.keys().map(String::as_str).collect();
            let meant = value::did_you_mean(text, names.iter().copied());
            let instead = match (meant, names.as_slice()) {
                (Some(meant), _) => format!("write {meant:?}"),
                (None, []) => format!("add [[egress_source]] with name = {text:?}"),
                (None, names) if names.len() <= 10 => format!("write {}", value::any_of(names.iter().copied())),
                (None, _) => "write the name of an [[egress_source]]".into(),
            };
            Wrong::new(format!("there is no egress source {text:?}")).instead(instead)
        })
    });
    match source {
        Some(found) if members.iter().any(|(index, _)| *index == found.value) => {
            let wrong = Wrong::new("is in this pool already");
            element.wrong(found.place, "source", wrong.instead("write it once, with the weight of both"));
        }
        Some(found) => members.push((found.value, weight)),
        None if element.place_of("source").is_none() => element.missing("source", "\"ip-a\""),
        None => {}
    }
    element.finish();
}

pub(super) fn duplicate(section: &Section<'_>, place: Place, name: &str, other: Place) {
    let wrong = Wrong::new(format!("{name:?} is already the name of the one at {}", section.report.describe(other)));
    section.wrong(place, "name", wrong.instead("write another name"));
}

/// Names appear in headers, metrics and addresses of the HTTP service.
pub(super) fn name(text: &str) -> Result<String, Wrong> {
    let fits = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:@".contains(&byte));
    if text.is_empty() || text.len() > 64 || !fits {
        let wrong = Wrong::new(format!("{text:?} is not a name"));
        return Err(wrong.instead("write 1 to 64 letters, digits or any of \"-_.:@\""));
    }
    Ok(text.into())
}

/// An address that a socket can be bound to and a peer can answer.
fn source_address(text: &str) -> Result<IpAddr, Wrong> {
    let Ok(address) = text.parse::<IpAddr>() else {
        let meant = text.parse::<SocketAddr>().map(|address| address.ip()).ok();
        let meant = meant.or_else(|| text.parse::<IpNet>().map(|network| network.addr()).ok());
        let instead =
            meant.map_or_else(|| "for example \"192.0.2.1\" or \"2001:db8::1\"".into(), |ip| format!("\"{ip}\""));
        return Err(Wrong::new(format!("{text:?} is not an IP address")).instead(format!("write {instead}")));
    };
    let what = match address {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
            let wrong = Wrong::new(format!("{text:?} is an IPv4 address written as IPv6"));
            return Err(wrong.instead(format!("write \"{}\"", address.to_canonical())));
        }
        _ if address.is_unspecified() => "the unspecified address",
        _ if address.is_multicast() => "a multicast address",
        IpAddr::V4(v4) if v4.is_broadcast() => "the broadcast address",
        IpAddr::V6(v6) if v6.is_unicast_link_local() => "a link-local address",
        _ => return Ok(address),
    };
    let mut wrong = Wrong::new(format!("{text:?} is {what}; nothing can be sent from it"));
    wrong = if address.is_unspecified() {
        let unbound = format!("{{ source = \"{UNBOUND_SOURCE}\", weight = 1 }}");
        wrong.instead(format!("write an address of this machine, or {unbound} in the pool to let the kernel choose"))
    } else {
        wrong.instead("write an address of this machine")
    };
    Err(wrong)
}
