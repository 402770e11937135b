//! Which hosts take mail for a domain, and in what order they are tried. Pure: the lookups are `runtime/dns.rs`.
//!
//! A static route is the first whose pattern fits the domain. Otherwise the domain's MX set counts (RFC 5321 §5.1),
//! with the implicit MX where there is none, and the null MX (RFC 7505). A [`Site`] is that set under a name that all
//! domains with the same set share, because limits belong to the hosts, not to the domains.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use crate::config::{DomainPattern, Route};
use crate::deliver::dane::HostDane;
use crate::limits::MX_HOSTS_MAX;
use crate::mail::endpoint::Endpoint;

/// The hosts that take mail for one or more domains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// The host names, sorted, joined by commas. Preferences don't count.
    pub name: String,
    /// Sorted by preference and name; each has an address. Not empty.
    pub hosts: Vec<Host>,
    /// Look again after this time, on the scale of [`crate::mail::time::Now::monotonic`].
    pub expires: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// In lower case, without the final dot; an address literal is in brackets, and a Unix socket is `unix:/path`.
    pub name: String,
    /// The lowest is tried first.
    pub preference: u16,
    pub addresses: Vec<Endpoint>,
    /// As the domain may rely on it: what is behind an MX set that nobody vouches for counts for nothing.
    pub dane: HostDane,
}

impl Site {
    pub fn addresses(&self) -> impl Iterator<Item = Endpoint> {
        self.hosts.iter().flat_map(|host| host.addresses.iter().copied())
    }

    /// The addresses in the order in which one connection attempt tries them, each with its host's index.
    ///
    /// Hosts of equal preference are shuffled, so that each gets its share (RFC 5321 §5.1), and so are the addresses of
    /// each host. `random(n)` gives a number below n.
    pub fn attempt_order(&self, random: &mut dyn FnMut(u64) -> u64) -> Vec<(usize, Endpoint)> {
        let mut order: Vec<usize> = (0..self.hosts.len()).collect();
        shuffle(&mut order, random);
        order.sort_by_key(|&host| self.hosts[host].preference);
        let mut attempts = Vec::new();
        for host in order {
            let mut addresses = self.hosts[host].addresses.clone();
            shuffle(&mut addresses, random);
            attempts.extend(addresses.into_iter().map(|address| (host, address)));
        }
        attempts
    }
}

/// Why a domain has no site. Nothing was connected, so no attempt is counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteFailure {
    pub kind: RouteFailureKind,
    /// The reply code that stands for it in records.
    pub code: u16,
    /// RFC 3463.
    pub enhanced: (u8, u16, u16),
    pub text: String,
    /// The failure may be remembered until then, on the scale of [`crate::mail::time::Now::monotonic`].
    pub expires: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteFailureKind {
    /// The domain takes no mail, as far as its owner says.
    Bounce,
    /// Nobody could say.
    Defer,
}

impl RouteFailure {
    pub fn bounce(code: u16, enhanced: (u8, u16, u16), text: String) -> Self {
        Self { kind: RouteFailureKind::Bounce, code, enhanced, text, expires: Duration::ZERO }
    }

    /// No answer from the DNS: 4.4.3, directory server failure.
    pub fn defer(text: String) -> Self {
        Self { kind: RouteFailureKind::Defer, code: 451, enhanced: (4, 4, 3), text, expires: Duration::ZERO }
    }

    #[must_use]
    pub fn until(mut self, expires: Duration) -> Self {
        self.expires = expires;
        self
    }
}

impl fmt::Display for RouteFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (class, subject, detail) = self.enhanced;
        write!(f, "{} {class}.{subject}.{detail} {}", self.code, self.text)
    }
}

/// The first route whose pattern fits the domain, in whatever case.
pub fn route_for<'a>(routes: &'a [Route], domain: &str) -> Option<&'a Route> {
    routes.iter().find(|route| fits(&route.domain, domain))
}

fn fits(pattern: &DomainPattern, domain: &str) -> bool {
    match pattern {
        DomainPattern::Any => true,
        DomainPattern::Exact(name) => name.eq_ignore_ascii_case(domain),
        // ".example.com" fits what ends so with something before it.
        DomainPattern::Suffix(suffix) => {
            let (domain, suffix) = (domain.as_bytes(), suffix.as_bytes());
            domain.len() > suffix.len() && domain[domain.len() - suffix.len()..].eq_ignore_ascii_case(suffix)
        }
    }
}

/// A record of a domain's MX set, or the implicit one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MxRecord {
    pub preference: u16,
    /// "." is the null MX.
    pub exchange: String,
}

/// The hosts of an MX answer, in lower case and without final dots, each once with its lowest preference, sorted by
/// preference and name, at most `MX_HOSTS_MAX`. No record at all means the domain itself (RFC 5321 §5.1).
pub fn mail_hosts(domain: &str, records: &[MxRecord]) -> Result<Vec<(u16, String)>, RouteFailure> {
    let name_of = |exchange: &str| exchange.trim_end_matches('.').to_ascii_lowercase();
    let named = records.iter().map(|record| (record.preference, name_of(&record.exchange)));
    // RFC 7505 §3: a null MX stands alone. Beside others it is an error of the domain's, and skipped.
    let mut hosts: Vec<(u16, String)> = named.filter(|(_, name)| !name.is_empty()).collect();
    if hosts.is_empty() && !records.is_empty() {
        let text = format!("{domain} does not accept mail (null MX)");
        return Err(RouteFailure::bounce(556, (5, 1, 10), text));
    }
    if hosts.is_empty() {
        hosts.push((0, name_of(domain)));
    }
    hosts.sort();
    let mut seen = std::collections::HashSet::new();
    hosts.retain(|(_, name)| seen.insert(name.clone()));
    hosts.truncate(MX_HOSTS_MAX);
    Ok(hosts)
}

/// A site's name: it is the same for the same set of hosts, whatever their preferences.
pub fn site_name<'a>(hosts: impl Iterator<Item = &'a str>) -> String {
    let mut names: Vec<&str> = hosts.collect();
    names.sort_unstable();
    names.dedup();
    names.join(",")
}

/// What became of looking up one host's addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Addresses {
    Found(Vec<IpAddr>),
    /// The DNS says that there is none.
    None,
    /// The DNS could not say.
    Unknown(String),
}

/// Whether an address may be connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressVerdict {
    Usable,
    Prohibited,
    /// One of our own listeners.
    Ourselves,
}

/// Chooses the hosts that may be connected to.
///
/// If we are among the hosts ourselves, only better ones are left: mail must not go around in circles (RFC 5321 §5.1).
pub fn choose_hosts(
    domain: &str,
    looked_up: Vec<(u16, String, Addresses)>,
    port: u16,
    judge: &dyn Fn(SocketAddr) -> AddressVerdict,
) -> Result<Vec<Host>, RouteFailure> {
    let (mut hosts, mut ourselves, mut prohibited, mut unknown) = (Vec::new(), None::<u16>, None, None);
    for (preference, name, addresses) in looked_up {
        let found = match addresses {
            Addresses::Found(found) => found,
            Addresses::None => continue,
            Addresses::Unknown(why) => {
                unknown.get_or_insert(format!("{name}: {why}"));
                continue;
            }
        };
        let mut usable = Vec::new();
        for address in found.into_iter().map(|ip| SocketAddr::new(ip, port)) {
            match judge(address) {
                AddressVerdict::Usable => usable.push(address.into()),
                AddressVerdict::Prohibited => prohibited = prohibited.or(Some((name.clone(), address.ip()))),
                AddressVerdict::Ourselves => {
                    ourselves = Some(ourselves.map_or(preference, |least| least.min(preference)));
                }
            }
        }
        if !usable.is_empty() {
            hosts.push(Host { name, preference, addresses: usable, dane: HostDane::default() });
        }
    }
    if let Some(own_preference) = ourselves {
        hosts.retain(|host| host.preference < own_preference);
    }
    if !hosts.is_empty() {
        return Ok(hosts);
    }
    if let Some(why) = unknown {
        return Err(RouteFailure::defer(format!("no address known of the hosts that take mail for {domain}: {why}")));
    }
    if ourselves.is_some() {
        let text = format!("mail for {domain} would come back to this server");
        return Err(RouteFailure::bounce(554, (5, 4, 6), text));
    }
    if let Some((name, address)) = prohibited {
        let text = format!("{name}, which takes mail for {domain}, is at {address}, where mail is never sent");
        return Err(RouteFailure::bounce(550, (5, 4, 4), text));
    }
    let text = format!("no host that takes mail for {domain} has an address");
    Err(RouteFailure::bounce(550, (5, 4, 4), text))
}

/// The address in an address literal `[192.0.2.1]` or `[IPv6:2001:db8::1]` (RFC 5321 §4.1.3). None: not a literal.
pub fn address_literal(domain: &str) -> Option<Result<IpAddr, RouteFailure>> {
    let inner = domain.strip_prefix('[')?.strip_suffix(']')?;
    let address = match inner.get(..5) {
        Some(tag) if tag.eq_ignore_ascii_case("IPv6:") => inner[5..].parse::<Ipv6Addr>().map(IpAddr::V6).ok(),
        _ => inner.parse::<Ipv4Addr>().map(IpAddr::V4).ok(),
    };
    let failure = || RouteFailure::bounce(550, (5, 1, 3), format!("{domain} is not an address literal"));
    Some(address.ok_or_else(failure))
}

fn shuffle<T>(items: &mut [T], random: &mut dyn FnMut(u64) -> u64) {
    for last in (1..items.len()).rev() {
        items.swap(last, random(last as u64 + 1) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mx(preference: u16, exchange: &str) -> MxRecord {
        MxRecord { preference, exchange: exchange.to_owned() }
    }

    fn found(preference: u16, name: &str, address: &str) -> (u16, String, Addresses) {
        (preference, name.to_owned(), Addresses::Found(vec![address.parse().unwrap()]))
    }

    fn names(hosts: &[Host]) -> Vec<&str> {
        hosts.iter().map(|host| host.name.as_str()).collect()
    }

    /// 127/8 is prohibited, 192.0.2.99 is us.
    fn judge(address: SocketAddr) -> AddressVerdict {
        match address.ip() {
            ip if ip.is_loopback() => AddressVerdict::Prohibited,
            ip if ip.to_string() == "192.0.2.99" => AddressVerdict::Ourselves,
            _ => AddressVerdict::Usable,
        }
    }

    #[test]
    fn the_first_route_that_fits_is_taken() {
        let route = |domain| Route::new(domain, Vec::new());
        let routes = [
            route(DomainPattern::Exact("mail.example.com".to_owned())),
            route(DomainPattern::Suffix(".example.com".to_owned())),
            route(DomainPattern::Any),
        ];
        let chosen = |domain| {
            let chosen = route_for(&routes, domain).unwrap();
            routes.iter().position(|route| std::ptr::eq(route, chosen)).unwrap()
        };
        assert_eq!(chosen("Mail.Example.com"), 0);
        assert_eq!(chosen("a.EXAMPLE.com"), 1);
        assert_eq!(chosen("example.com"), 2, "*.example.com is only what is below");
        assert_eq!(chosen("badexample.com"), 2);
        assert_eq!(chosen(".example.com"), 2);
        assert!(route_for(&routes[..2], "example.net").is_none());
        assert!(route_for(&routes[..2], "é.com").is_none(), "no slicing inside a character");
    }

    /// RFC 5321 §5.1.
    #[test]
    fn hosts_are_sorted_and_unique() {
        let records = [mx(20, "B.example."), mx(10, "c.example."), mx(10, "a.example"), mx(5, "b.example.")];
        let hosts = mail_hosts("d.example", &records).unwrap();
        let expected = [(5, "b.example"), (10, "a.example"), (10, "c.example")];
        assert_eq!(hosts, expected.map(|(preference, name)| (preference, name.to_owned())));
        let many: Vec<_> = (0..500).map(|number| mx(number, &format!("mx{number}.example."))).collect();
        assert_eq!(mail_hosts("d.example", &many).unwrap().len(), MX_HOSTS_MAX);
    }

    /// RFC 5321 §5.1: without MX records the domain itself is treated as its only host.
    #[test]
    fn no_record_is_the_implicit_one() {
        assert_eq!(mail_hosts("D.example", &[]).unwrap(), [(0, "d.example".to_owned())]);
    }

    /// RFC 7505 §3 and §4.
    #[test]
    fn the_null_mx_is_a_bounce() {
        let failure = mail_hosts("d.example", &[mx(0, ".")]).unwrap_err();
        assert_eq!((failure.kind, failure.code, failure.enhanced), (RouteFailureKind::Bounce, 556, (5, 1, 10)));
        assert_eq!(failure.to_string(), "556 5.1.10 d.example does not accept mail (null MX)");
        assert_eq!(mail_hosts("d.example", &[mx(0, "."), mx(5, "a.example.")]).unwrap().len(), 1);
    }

    #[test]
    fn a_site_is_its_set_of_hosts() {
        assert_eq!(site_name(["b", "a", "b"].into_iter()), "a,b");
    }

    #[test]
    fn prohibited_addresses_are_left_out() {
        let hosts = vec![found(1, "loop", "127.0.0.1"), found(2, "good", "192.0.2.1")];
        let chosen = choose_hosts("d.example", hosts, 25, &judge).unwrap();
        assert_eq!((names(&chosen), chosen[0].addresses[0].to_string().ends_with(":25")), (vec!["good"], true));
        let failure = choose_hosts("d.example", vec![found(1, "loop", "127.0.0.1")], 25, &judge).unwrap_err();
        assert_eq!((failure.kind, failure.enhanced), (RouteFailureKind::Bounce, (5, 4, 4)));
        assert!(failure.text.contains("loop") && failure.text.contains("127.0.0.1"), "{failure}");
    }

    /// RFC 5321 §5.1: a host that is itself in the list drops itself and all that are not better.
    #[test]
    fn mail_does_not_go_in_circles() {
        let list = || vec![found(5, "a", "192.0.2.1"), found(10, "we", "192.0.2.99"), found(10, "b", "192.0.2.2")];
        assert_eq!(names(&choose_hosts("d.example", list(), 25, &judge).unwrap()), ["a"]);
        let failure = choose_hosts("d.example", list().split_off(1), 25, &judge).unwrap_err();
        assert_eq!((failure.kind, failure.code, failure.enhanced), (RouteFailureKind::Bounce, 554, (5, 4, 6)));
    }

    #[test]
    fn an_unknown_address_is_no_reason_to_bounce() {
        let unknown = || (5, "b".to_owned(), Addresses::Unknown("SERVFAIL".to_owned()));
        let missing = || (5, "c".to_owned(), Addresses::None);
        let mixed = vec![found(1, "loop", "127.0.0.1"), missing(), unknown()];
        let failure = choose_hosts("d.example", mixed, 25, &judge).unwrap_err();
        assert_eq!((failure.kind, failure.enhanced), (RouteFailureKind::Defer, (4, 4, 3)));
        let chosen = choose_hosts("d.example", vec![unknown(), found(9, "a", "192.0.2.1")], 25, &judge).unwrap();
        assert_eq!(names(&chosen), ["a"]);
        let failure = choose_hosts("d.example", vec![missing()], 25, &judge).unwrap_err();
        assert_eq!((failure.kind, failure.enhanced), (RouteFailureKind::Bounce, (5, 4, 4)));
    }

    /// RFC 5321 §5.1: equal preferences share the load, better ones come first.
    #[test]
    fn equal_preferences_are_shuffled() {
        let host = |name: &str, preference, last: u8| Host {
            name: name.to_owned(),
            preference,
            addresses: [last, last + 1].map(|last| SocketAddr::from(([192, 0, 2, last], 25)).into()).to_vec(),
            dane: HostDane::default(),
        };
        let hosts = vec![host("a", 5, 1), host("b", 10, 3), host("c", 10, 5)];
        let site = Site { name: "a,b,c".to_owned(), hosts, expires: Duration::ZERO };
        let mut random = fastrand::Rng::with_seed(3);
        let mut second = [0; 3];
        for _ in 0..400 {
            let order = site.attempt_order(&mut |bound| random.u64(0..bound));
            assert_eq!(order.len(), 6);
            assert_eq!((order[0].0, order[1].0), (0, 0), "the best host first, with all its addresses");
            second[order[2].0] += 1;
        }
        assert!(second[1] > 150 && second[2] > 150, "{second:?}");
    }

    /// RFC 5321 §4.1.3.
    #[test]
    fn address_literals_are_read() {
        let read = |domain| address_literal(domain).map(|result| result.map_err(|failure| failure.enhanced));
        assert_eq!(read("[192.0.2.1]"), Some(Ok("192.0.2.1".parse().unwrap())));
        assert_eq!(read("[IPv6:2001:db8::1]"), Some(Ok("2001:db8::1".parse().unwrap())));
        assert_eq!(read("[ipv6:::1]"), Some(Ok("::1".parse().unwrap())));
        assert_eq!(read("[2001:db8::1]"), Some(Err((5, 1, 3))));
        assert_eq!(read("[é€]"), Some(Err((5, 1, 3))));
        assert_eq!(read("[]"), Some(Err((5, 1, 3))));
        assert_eq!(read("example.com"), None);
    }
}
