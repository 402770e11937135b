//! Name lookups, on the control thread: which hosts take mail for a domain, and at which addresses.
//!
//! What an answer means for mail is decided in `deliver/route.rs`; this file asks, and tells "there is none" (the DNS
//! said so, which may bounce mail) from "nobody could say" (which never does). Answers are kept as long as their time
//! to live says, in hickory-resolver's cache, which is bounded. What DNSSEC has to do with it is in `dns/dnssec.rs`.
//!
//! Over 500 lines: what each lookup asks and what its failures are called belong together.

mod dnssec;

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_resolver::config::{ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::dnssec::Proof;
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::domain::Label;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use hickory_resolver::system_conf;
use ipnet::IpNet;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use self::dnssec::{Names, TlsaBases};
use super::net::is_local_address;
use crate::config::{DnsConfig, RouteTarget};
use crate::deliver::dane::HostDane;
use crate::deliver::mta_sts::policy_id;
use crate::deliver::route::{
    AddressVerdict, Addresses, Host, MxRecord, RouteFailure, RouteFailureKind, Site, address_literal, choose_hosts,
    mail_hosts, site_name,
};
use crate::limits::{DNS_CACHE_ANSWERS_MAX, HOST_ADDRESSES_MAX, ROUTE_LOOKUPS_MAX};
use crate::mail::endpoint::Endpoint;
use crate::mail::time::Now;

/// Looks up routes. Clones share the cache.
#[derive(Clone)]
pub(crate) struct Resolver {
    names: Names,
    policy: Arc<Policy>,
}

struct Policy {
    prohibited: Vec<IpNet>,
    own_listeners: Vec<SocketAddr>,
    mx_port: u16,
    lookups: Semaphore,
}

impl Resolver {
    /// Asks the configured servers, otherwise those of the system. At `own_listeners` mail would come back to us.
    /// TLSA records are looked up where somebody follows them.
    pub(crate) fn new(
        config: &DnsConfig,
        uses_dane: bool,
        own_listeners: Vec<SocketAddr>,
    ) -> Result<Self, ResolverError> {
        Self::with_port_and_timeout(config, uses_dane, own_listeners, SMTP_PORT, QUERY_TIMEOUT)
    }

    /// MX hosts listen on port 25, but for tests.
    pub(crate) fn with_port_and_timeout(
        config: &DnsConfig,
        uses_dane: bool,
        own_listeners: Vec<SocketAddr>,
        mx_port: u16,
        timeout: Duration,
    ) -> Result<Self, ResolverError> {
        let (servers, mut options) = servers(config);
        options.timeout = timeout;
        options.attempts = QUERY_ATTEMPTS;
        options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
        options.cache_size = DNS_CACHE_ANSWERS_MAX;
        options.positive_max_ttl = Some(TTL_MAX);
        options.negative_max_ttl = Some(NEGATIVE_TTL_MAX);
        // Beyond it lookups would fail as busy; how many there are is bounded by the semaphore below.
        options.max_active_requests = usize::MAX;
        let policy = Policy {
            prohibited: config.prohibited_hosts.clone(),
            own_listeners,
            mx_port,
            lookups: Semaphore::new(ROUTE_LOOKUPS_MAX),
        };
        Ok(Self { names: Names::new(config, uses_dane, servers, options)?, policy: Arc::new(policy) })
    }

    /// The site of a domain by its MX set (RFC 5321 §5.1), or of an address literal.
    pub(crate) async fn resolve_site(&self, now: Now, domain: &str) -> Result<Site, RouteFailure> {
        let _turn = self.policy.lookups.acquire().await;
        let expiry = Expiry::start(now);
        let result = match address_literal(domain) {
            Some(literal) => literal.and_then(|address| self.literal_site(&expiry, domain, address)),
            None => self.mx_site(&expiry, domain).await,
        };
        result.map_err(|failure| expiry.of_failure(failure))
    }

    /// The site of a static route. Its targets are preferred in their order. Their addresses were chosen by the
    /// operator, so that none is prohibited but those that an `mx:` target leads to; no error of theirs bounces mail.
    pub(crate) async fn resolve_targets(&self, now: Now, targets: &[RouteTarget]) -> Result<Site, RouteFailure> {
        let _turn = self.policy.lookups.acquire().await;
        let mut expiry = Expiry::start(now);
        let (mut hosts, mut labels, mut failed) = (Vec::new(), Vec::new(), Vec::new());
        for target in targets {
            let (label, found) = self.resolve_target(&mut expiry, target).await;
            labels.push(label);
            match found {
                Ok(found) => append_behind(&mut hosts, found),
                Err(why) => failed.push(why),
            }
        }
        if hosts.is_empty() {
            return Err(expiry.of_failure(RouteFailure::defer(failed.join("; "))));
        }
        let expires = if failed.is_empty() { expiry.of_site() } else { expiry.soon() };
        Ok(Site { name: site_name(labels.iter().map(String::as_str)), hosts, expires })
    }

    async fn resolve_target(&self, expiry: &mut Expiry, target: &RouteTarget) -> (String, Result<Vec<Host>, String>) {
        match target {
            RouteTarget::Address(address) => {
                let name = format!("[{}]", address.ip());
                (address.to_string(), Ok(vec![plain_host(name, vec![(*address).into()])]))
            }
            RouteTarget::Unix(path) => {
                let name = target.to_string();
                (name.clone(), Ok(vec![plain_host(name, vec![Endpoint::Unix(*path)])]))
            }
            RouteTarget::Host { name, port } => {
                let found = self.named_host(expiry, name, *port).await;
                (format!("{name}:{port}"), found.map(|host| vec![host]))
            }
            RouteTarget::Mx(name) => {
                let found = self.mx_hosts(expiry, name).await;
                let found = found.map(|(_, hosts)| hosts).map_err(|failure| format!("the route's {failure}"));
                (format!("mx:{name}"), found)
            }
            RouteTarget::Discard => ("discard".to_owned(), Err("the route sends nothing".to_owned())),
        }
    }

    /// A host that the operator named. RFC 7672 §2.2.2: its TLSA records are those of its name at this port.
    async fn named_host(&self, expiry: &mut Expiry, name: &str, port: u16) -> Result<Host, String> {
        let (addresses, bases) = self.lookup_named(expiry, name).await;
        let addresses = match addresses {
            Addresses::Found(found) => found.into_iter().map(|ip| SocketAddr::new(ip, port).into()).collect(),
            Addresses::None => return Err(format!("the route's host {name} has no address")),
            Addresses::Unknown(why) => return Err(format!("the route's host {name}: {why}")),
        };
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        let dane = self.names.lookup_dane(expiry, bases, port, std::slice::from_ref(&name)).await;
        Ok(Host { name, preference: 0, addresses, dane })
    }

    fn literal_site(&self, expiry: &Expiry, domain: &str, address: IpAddr) -> Result<Site, RouteFailure> {
        let name = domain.to_ascii_lowercase();
        let host = (0, name.clone(), Addresses::Found(vec![address]));
        let hosts = choose_hosts(domain, vec![host], self.policy.mx_port, &|address| self.policy.judge(address))?;
        Ok(Site { name, hosts, expires: expiry.of_site() })
    }

    async fn mx_site(&self, expiry: &Expiry, domain: &str) -> Result<Site, RouteFailure> {
        let mut expiry = expiry.clone();
        let result = self.mx_hosts(&mut expiry, domain).await;
        let (name, hosts) = result.map_err(|failure| expiry.of_failure(failure))?;
        Ok(Site { name, hosts, expires: expiry.of_site() })
    }

    /// The site's name, which the addresses don't change, and the hosts that may be connected to.
    async fn mx_hosts(&self, expiry: &mut Expiry, domain: &str) -> Result<(String, Vec<Host>), RouteFailure> {
        let MxAnswer { records, secure, next_hop } = self.lookup_mx(expiry, domain).await?;
        let implicit = records.is_empty();
        let hosts = mail_hosts(domain, &records)?;
        let name = site_name(hosts.iter().map(|(_, name)| name.as_str()));
        let (looked_up, bases) = self.lookup_all(expiry, hosts).await;
        if implicit && looked_up.iter().all(|(_, _, addresses)| *addresses == Addresses::None) {
            let text = format!("{domain} has neither MX nor address records");
            return Err(RouteFailure::bounce(550, (5, 1, 2), text));
        }
        if looked_up.iter().any(|(_, _, addresses)| matches!(addresses, Addresses::Unknown(_))) {
            expiry.limit_to(DEFER_TTL);
        }
        let mut hosts = choose_hosts(domain, looked_up, self.policy.mx_port, &|address| self.policy.judge(address))?;
        // RFC 7672 §2.2.1: behind an MX set that nobody vouches for, TLSA records prove nothing.
        if secure {
            self.lookup_tlsa(expiry, &mut hosts, bases, &next_hop).await;
        }
        Ok((name, hosts))
    }

    /// The MX records; none is the implicit MX.
    async fn lookup_mx(&self, expiry: &mut Expiry, domain: &str) -> Result<MxAnswer, RouteFailure> {
        let Some(name) = absolute_name(domain) else {
            return Err(RouteFailure::bounce(550, (5, 1, 2), format!("{domain} is not a domain name")));
        };
        match self.names.lookup(&name, RecordType::MX).await {
            Ok(lookup) => {
                expiry.limit_to_answer(&lookup);
                let (secure, next_hop) = self.names.judge_mx(&name, &lookup);
                let record = |data: &RData| match data {
                    RData::MX(mx) => Some(MxRecord { preference: mx.preference, exchange: mx.exchange.to_ascii() }),
                    _ => None,
                };
                let records = lookup.answers().iter().filter_map(|answer| record(&answer.data)).collect();
                Ok(MxAnswer { records, secure, next_hop })
            }
            Err(error) => match absence(&error) {
                Some(Absence { exists: true, ttl }) => {
                    expiry.limit_to(ttl);
                    // RFC 7672 §2.2.2: then the addresses decide.
                    let secure = self.names.uses_dane();
                    Ok(MxAnswer { records: Vec::new(), secure, next_hop: vec![text_of(&name)] })
                }
                Some(Absence { exists: false, ttl }) => {
                    expiry.limit_to(ttl);
                    Err(RouteFailure::bounce(550, (5, 1, 2), format!("there is no domain {domain}")))
                }
                None => Err(RouteFailure::defer(format!("MX lookup of {domain}: {error}"))),
            },
        }
    }

    /// The addresses of all hosts, asked for at once.
    async fn lookup_all(
        &self,
        expiry: &mut Expiry,
        hosts: Vec<(u16, String)>,
    ) -> (Vec<(u16, String, Addresses)>, HashMap<String, TlsaBases>) {
        let mut lookups = JoinSet::new();
        for (index, (_, name)) in hosts.iter().enumerate() {
            let (resolver, name, mut expiry) = (self.clone(), name.clone(), expiry.clone());
            lookups.spawn(async move {
                let (addresses, bases) = resolver.lookup_addresses(&mut expiry, &name).await;
                (index, addresses, bases, expiry)
            });
        }
        let mut found = vec![Addresses::None; hosts.len()];
        let mut all_bases = HashMap::new();
        while let Some(ended) = lookups.join_next().await {
            let (index, addresses, bases, theirs) = ended.expect("a lookup does not panic");
            found[index] = addresses;
            all_bases.insert(hosts[index].1.clone(), bases);
            expiry.join(&theirs);
        }
        let found = hosts.into_iter().zip(found).map(|((preference, name), addresses)| (preference, name, addresses));
        (found.collect(), all_bases)
    }

    /// What the hosts' TLSA records require, asked for at once.
    async fn lookup_tlsa(
        &self,
        expiry: &mut Expiry,
        hosts: &mut [Host],
        mut bases: HashMap<String, TlsaBases>,
        next_hop: &[String],
    ) {
        let mut lookups = JoinSet::new();
        for (index, host) in hosts.iter().enumerate() {
            let bases = bases.remove(&host.name).unwrap_or_default();
            let (resolver, next_hop, mut expiry) = (self.clone(), next_hop.to_vec(), expiry.clone());
            lookups.spawn(async move {
                let port = resolver.policy.mx_port;
                (index, resolver.names.lookup_dane(&mut expiry, bases, port, &next_hop).await, expiry)
            });
        }
        while let Some(ended) = lookups.join_next().await {
            let (index, dane, theirs) = ended.expect("a lookup does not panic");
            hosts[index].dane = dane;
            expiry.join(&theirs);
        }
    }

    /// A and AAAA of a mail host, from the DNS alone, and where its TLSA records would be.
    async fn lookup_addresses(&self, expiry: &mut Expiry, name: &str) -> (Addresses, TlsaBases) {
        let Some(name) = absolute_name(name) else { return (Addresses::None, TlsaBases::default()) };
        let lookup = |kind| self.names.lookup(&name, kind);
        let (four, six) = tokio::join!(lookup(RecordType::A), lookup(RecordType::AAAA));
        let bases = self.names.tlsa_bases(&name, [&four, &six].into_iter().flatten()).await;
        let (mut addresses, mut unknown) = (Vec::new(), None);
        for result in [four, six] {
            match result {
                Ok(lookup) => {
                    expiry.limit_to_answer(&lookup);
                    addresses.extend(lookup.answers().iter().filter_map(|answer| answer.data.ip_addr()));
                }
                Err(error) => match absence(&error) {
                    Some(absence) => expiry.limit_to(absence.ttl),
                    None => unknown = Some(error.to_string()),
                },
            }
        }
        addresses.truncate(HOST_ADDRESSES_MAX);
        let addresses = match unknown {
            _ if !addresses.is_empty() => Addresses::Found(addresses),
            Some(why) => Addresses::Unknown(why),
            None => Addresses::None,
        };
        (addresses, bases)
    }

    /// The same of a host that the operator named. What is in the hosts file comes first, and nobody vouches for it.
    async fn lookup_named(&self, expiry: &mut Expiry, name: &str) -> (Addresses, TlsaBases) {
        let mut addresses = absolute_name(name).map(|name| self.names.in_hosts_file(&name)).unwrap_or_default();
        if addresses.is_empty() {
            return self.lookup_addresses(expiry, name).await;
        }
        addresses.truncate(HOST_ADDRESSES_MAX);
        (Addresses::Found(addresses), TlsaBases::default())
    }
}

impl Resolver {
    /// What a domain announces of an MTA-STS policy (RFC 8461 §3.1).
    pub(crate) async fn policy_record(&self, now: Now, domain: &str) -> PolicyRecord {
        let mut expiry = Expiry::start(now);
        let Some(name) = absolute_name(&format!("_mta-sts.{domain}")) else {
            return PolicyRecord { id: None, expires: expiry.of_site() };
        };
        let id = match self.names.lookup(&name, RecordType::TXT).await {
            Ok(lookup) => {
                expiry.limit_to_answer(&lookup);
                let texts = lookup.answers().iter().filter_map(|answer| match &answer.data {
                    // RFC 8461 §3.1: the strings of a record are one text.
                    RData::TXT(txt) => Some(txt.txt_data.concat()),
                    _ => None,
                });
                let texts: Vec<Vec<u8>> = texts.collect();
                policy_id(texts.iter().map(Vec::as_slice))
            }
            Err(error) => {
                expiry.limit_to(absence(&error).map_or(DEFER_TTL, |absence| absence.ttl));
                None
            }
        };
        PolicyRecord { id, expires: expiry.of_site() }
    }

    /// Where a policy's server is (RFC 8461 §3.3), but for addresses where nothing is sent to.
    pub(crate) async fn policy_host(&self, now: Now, host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
        let addresses = match self.lookup_addresses(&mut Expiry::start(now), host).await.0 {
            Addresses::Found(addresses) => addresses,
            Addresses::None => return Err(format!("{host} has no address")),
            Addresses::Unknown(why) => return Err(format!("{host}: {why}")),
        };
        let addresses = addresses.into_iter().map(|ip| SocketAddr::new(ip, port));
        let usable: Vec<_> =
            addresses.filter(|address| self.policy.judge(*address) == AddressVerdict::Usable).collect();
        if usable.is_empty() { Err(format!("{host} is where nothing is sent to")) } else { Ok(usable) }
    }
}

/// What the DNS says of a domain's MX set.
struct MxAnswer {
    records: Vec<MxRecord>,
    /// It is proven, or there is none.
    secure: bool,
    /// The domain, and what it is an alias of.
    next_hop: Vec<String>,
}

/// What the TXT records at `_mta-sts` say.
#[derive(Debug)]
pub(crate) struct PolicyRecord {
    /// None: nothing that counts, or nobody could say.
    pub(crate) id: Option<String>,
    /// On the scale of [`Now::monotonic`].
    pub(crate) expires: Duration,
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Resolver")
    }
}

impl Policy {
    fn judge(&self, address: SocketAddr) -> AddressVerdict {
        // ::ffff:127.0.0.1 leads to 127.0.0.1.
        let (ip, port) = (address.ip().to_canonical(), address.port());
        let is_us = |own: &SocketAddr| {
            let everywhere = own.ip().is_unspecified();
            own.port() == port && (own.ip().to_canonical() == ip || everywhere && is_local_address(ip))
        };
        if self.own_listeners.iter().any(is_us) {
            AddressVerdict::Ourselves
        } else if self.prohibited.iter().any(|network| network.contains(&ip)) {
            AddressVerdict::Prohibited
        } else {
            AddressVerdict::Usable
        }
    }
}

/// The resolver can't be set up.
#[derive(Debug)]
pub(crate) struct ResolverError(NetError);

impl fmt::Display for ResolverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot set up name lookups: {}", self.0)
    }
}

impl std::error::Error for ResolverError {}

impl From<NetError> for ResolverError {
    fn from(error: NetError) -> Self {
        Self(error)
    }
}

/// Who is asked, and how.
fn servers(config: &DnsConfig) -> (ResolverConfig, ResolverOpts) {
    if config.servers.is_empty() {
        match system_conf::read_system_conf() {
            Ok(found) => return found,
            // resolv.conf(5): without a file, or without a server in it, the server on this machine is asked.
            Err(error) => tracing::warn!(%error, "no system resolver configuration; asking 127.0.0.1"),
        }
    }
    let local = [SocketAddr::from(([127, 0, 0, 1], DNS_PORT))];
    let servers = if config.servers.is_empty() { &local[..] } else { &config.servers };
    let servers = servers.iter().map(|server| {
        let mut connections = vec![ConnectionConfig::udp(), ConnectionConfig::tcp()];
        connections.iter_mut().for_each(|connection| connection.port = server.port());
        NameServerConfig::new(server.ip(), true, connections)
    });
    (ResolverConfig::from_name_servers(servers.collect()), ResolverOpts::default())
}

/// With a final dot, so that no search list applies. None: not a name.
fn absolute_name(text: &str) -> Option<Name> {
    // `from_utf8` refuses an underscore behind a label's first letter. There are hosts and domains that have one.
    let label = |text: &str| if text.is_ascii() { Label::from_ascii(text) } else { Label::from_utf8(text) };
    let labels: Result<Vec<Label>, _> = text.strip_suffix('.').unwrap_or(text).split('.').map(label).collect();
    let mut name = Name::from_labels(labels.ok()?).ok()?;
    name.set_fqdn(true);
    Some(name)
}

/// In lower case, without the final dot.
fn text_of(name: &Name) -> String {
    name.to_ascii().trim_end_matches('.').to_ascii_lowercase()
}

/// What the DNS said is not there, and for how long it isn't.
struct Absence {
    /// The name exists, but without such records.
    exists: bool,
    ttl: Duration,
}

/// None: the DNS did not say that something isn't there; it did not say anything.
fn absence(error: &NetError) -> Option<Absence> {
    let (code, negative_ttl) = match error {
        NetError::Dns(DnsError::NoRecordsFound(none)) => {
            // RFC 2308 §2.2: a referral to other servers, and not "there is none". A server that does not resolve for
            // us gives it about every name.
            if none.soa.is_none() && none.ns.is_some() {
                return None;
            }
            (none.response_code, none.negative_ttl)
        }
        // Nobody vouches for it, and nobody has to.
        NetError::Dns(DnsError::Nsec { response, proof: Proof::Insecure, .. }) => {
            (response.response_code, response.negative_ttl())
        }
        _ => return None,
    };
    let exists = match code {
        ResponseCode::NoError => true,
        ResponseCode::NXDomain => false,
        _ => return None,
    };
    let ttl = negative_ttl.map_or(NEGATIVE_TTL_DEFAULT, |seconds| Duration::from_secs(seconds.into()));
    Some(Absence { exists, ttl: ttl.min(NEGATIVE_TTL_MAX) })
}

/// Until when a result made of several answers is good: until the first of them ends.
#[derive(Debug, Clone)]
struct Expiry {
    now: Now,
    started: Instant,
    valid_until: Instant,
}

impl Expiry {
    fn start(now: Now) -> Self {
        let started = Instant::now();
        Self { now, started, valid_until: started + TTL_MAX }
    }

    fn limit_to_answer(&mut self, lookup: &Lookup) {
        self.valid_until = self.valid_until.min(lookup.valid_until());
    }

    fn limit_to(&mut self, time_to_live: Duration) {
        self.valid_until = self.valid_until.min(Instant::now() + time_to_live);
    }

    fn join(&mut self, other: &Self) {
        self.valid_until = self.valid_until.min(other.valid_until);
    }

    /// On the scale of [`Now::monotonic`].
    fn of_site(&self) -> Duration {
        self.now.monotonic + self.valid_until.saturating_duration_since(self.started).max(TTL_MIN)
    }

    fn soon(&self) -> Duration {
        self.of_site().min(self.now.monotonic + self.started.elapsed() + DEFER_TTL)
    }

    fn of_failure(&self, failure: RouteFailure) -> RouteFailure {
        if failure.expires > Duration::ZERO {
            return failure;
        }
        match failure.kind {
            RouteFailureKind::Bounce => failure.until(self.of_site()),
            RouteFailureKind::Defer => failure.until(self.soon()),
        }
    }
}

/// A host that its route gives an address of: without a name it has no TLSA records.
fn plain_host(name: String, addresses: Vec<Endpoint>) -> Host {
    Host { name, preference: 0, addresses, dane: HostDane::Absent }
}

/// Appends hosts so that they are tried after all that are there.
fn append_behind(hosts: &mut Vec<Host>, more: Vec<Host>) {
    let base = hosts.last().map_or(0, |host| host.preference + 1);
    let mut previous = None;
    let mut rank = base;
    for mut host in more {
        // Equal preferences stay equal.
        if previous.is_some_and(|preference| preference != host.preference) {
            rank += 1;
        }
        previous = Some(host.preference);
        host.preference = rank;
        hosts.push(host);
    }
}

const SMTP_PORT: u16 = 25;
const DNS_PORT: u16 = 53;
/// For one question to one server.
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);
const QUERY_ATTEMPTS: usize = 2;
const TTL_MAX: Duration = Duration::from_secs(86_400);
/// Shorter times to live would have us ask more often than mail can use.
const TTL_MIN: Duration = Duration::from_secs(5);
const NEGATIVE_TTL_MAX: Duration = Duration::from_secs(900);
/// For a negative answer without SOA.
const NEGATIVE_TTL_DEFAULT: Duration = Duration::from_secs(60);
/// How long a lookup that failed is not repeated.
const DEFER_TTL: Duration = Duration::from_secs(30);

#[cfg(test)]
#[path = "../../tests/support/dns_server.rs"]
pub(super) mod dns_server;

#[cfg(test)]
mod tests;
