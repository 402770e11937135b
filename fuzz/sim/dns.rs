//! What the DNS says, as the control thread would find it out: MX sets that change, fail, and are not there.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use postrider::config::{Credentials, DeliveryProtocol, Terms, TlsMode};
use postrider::deliver::route::{
    AddressVerdict, Addresses, MxRecord, RouteFailure, Site, choose_hosts, mail_hosts, site_name,
};
use postrider::handover::Route;
use postrider::mail::time::Now;

use crate::mix::{Fault, Mix, spread};
use crate::peer::Host;
use crate::random::Random;
use crate::world::SITES;

/// All domains that mail goes to.
#[derive(Debug)]
pub(crate) struct Dns {
    zones: Vec<Zone>,
    /// A canary: the highest preference is told as the lowest.
    pub(crate) is_reversed: bool,
}

#[derive(Debug)]
struct Zone {
    domain: String,
    kind: Kind,
    /// The site whose hosts are its MX set.
    site: usize,
    /// What its hosts want to hear.
    terms: Arc<Terms>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Mx,
    /// No MX record: the domain's own address.
    Implicit,
    NullMx,
    NoDomain,
}

impl Dns {
    /// A domain for each site, two for the first, and two that take no mail. The last site's host is the domain itself.
    pub(crate) fn new(sites: usize, random: &mut Random) -> Self {
        let zone = |place: usize, site: usize, kind| Zone {
            domain: format!("d{place}.example"),
            kind,
            site,
            terms: Arc::default(),
        };
        let mut zones: Vec<Zone> = (0..=sites).map(|place| zone(place, place.saturating_sub(1), Kind::Mx)).collect();
        zones[sites] = Zone { domain: IMPLICIT.to_owned(), ..zone(0, sites - 1, Kind::Implicit) };
        // The first site's second domain, as if a route led there.
        if random.one_in(2) {
            let auth = Credentials { username: "user".to_owned(), password: "secret".to_owned(), without_tls: true };
            zones[1].terms = Arc::new(Terms { auth: Some(auth), ..Terms::default() });
        }
        zones.push(Zone { domain: "null.example".to_owned(), ..zone(0, 0, Kind::NullMx) });
        zones.push(Zone { domain: "nowhere.example".to_owned(), ..zone(0, 0, Kind::NoDomain) });
        Self { zones, is_reversed: false }
    }

    /// As if a route led to the domain's hosts.
    pub(crate) fn speak_lmtp(&mut self, domain: &str) {
        let zone = self.zones.iter_mut().find(|zone| zone.domain == domain).expect("it is there");
        zone.terms = Arc::new(Terms { protocol: DeliveryProtocol::Lmtp, ..Terms::default() });
    }

    /// The domain whose route has some.
    pub(crate) fn with_credentials(&self) -> Option<&str> {
        let zone = self.zones.iter().find(|zone| zone.terms.auth.is_some());
        zone.map(|zone| zone.domain.as_str())
    }

    pub(crate) fn domains(&self) -> impl Iterator<Item = &str> {
        self.zones.iter().map(|zone| zone.domain.as_str())
    }

    pub(crate) fn that_take_mail(&self) -> impl Iterator<Item = &str> {
        let takes = |zone: &&Zone| matches!(zone.kind, Kind::Mx | Kind::Implicit);
        self.zones.iter().filter(takes).map(|zone| zone.domain.as_str())
    }

    /// Whose hosts take a domain's mail, in the end.
    pub(crate) fn site_of(&self, domain: &str) -> Option<usize> {
        self.zones.iter().find(|zone| zone.domain == domain).map(|zone| zone.site)
    }

    /// Those with an MX record.
    pub(crate) fn with_mx(&self) -> impl Iterator<Item = &str> {
        self.zones.iter().filter(|zone| zone.kind == Kind::Mx).map(|zone| zone.domain.as_str())
    }

    /// All domains with an MX record have one of so many sites.
    pub(crate) fn share_sites(&mut self, sites: u64, random: &mut Random) {
        for zone in self.zones.iter_mut().filter(|zone| zone.kind == Kind::Mx) {
            zone.site = random.below(sites) as usize;
        }
    }

    pub(crate) fn resolve(
        &mut self,
        domain: &str,
        now: Now,
        hosts: &[Host],
        random: &mut Random,
        mix: &mut Mix,
    ) -> Result<Route, RouteFailure> {
        let expires = now.monotonic + Duration::from_secs(5 + spread(random, 1, 13));
        let zone = self.zones.iter_mut().find(|zone| zone.domain == domain).expect("mail goes to known domains");
        if mix.strikes(Fault::DnsFails, random) {
            return Err(RouteFailure::defer("no name server answered".to_owned()).until(expires));
        }
        if zone.kind == Kind::Mx && mix.strikes(Fault::MxChanged, random) {
            zone.site = random.below(SITES as u64) as usize;
        }
        let mut kind = zone.kind;
        for (fault, other) in [(Fault::NoDomain, Kind::NoDomain), (Fault::NullMx, Kind::NullMx)] {
            if mix.strikes(fault, random) {
                kind = other;
            }
        }
        let preference = |host: &Host| if self.is_reversed { 100 - host.preference } else { host.preference };
        let exchange = |host: &Host| MxRecord { preference: preference(host), exchange: host.name.clone() };
        let of_site = hosts.iter().filter(|host| host.site == zone.site);
        let records = match kind {
            Kind::NoDomain => {
                let failure = RouteFailure::bounce(550, (5, 1, 2), format!("there is no domain {domain}"));
                return Err(failure.until(expires));
            }
            Kind::NullMx => vec![MxRecord { preference: 0, exchange: ".".to_owned() }],
            Kind::Implicit => Vec::new(),
            Kind::Mx => of_site.map(exchange).collect(),
        };
        let found = mail_hosts(domain, &records).map_err(|failure| failure.until(expires))?;
        let name = site_name(found.iter().map(|(_, name)| name.as_str()));
        let address = |name: &str| {
            let host = hosts.iter().find(|host| host.name == name);
            host.map_or(Addresses::None, |host| Addresses::Found(host.addresses().map(|it| it.ip()).collect()))
        };
        let looked_up = found.into_iter().map(|(preference, name)| {
            let addresses = address(&name);
            (preference, name, addresses)
        });
        let hosts = choose_hosts(domain, looked_up.collect(), SMTP_PORT, &|_: SocketAddr| AddressVerdict::Usable)?;
        let site = Site { name, hosts, expires };
        Ok(Route {
            site: Arc::new(site),
            tls: TlsMode::Opportunistic,
            terms: Arc::clone(&zone.terms),
            sts: None,
            dane: false,
        })
    }
}

/// A domain without MX records.
pub(crate) const IMPLICIT: &str = "implicit.example";

pub(crate) const SMTP_PORT: u16 = 25;
