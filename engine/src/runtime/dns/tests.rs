//! Tests of DNS lookups against a server on loopback.

use super::dns_server::{DnsServer, Entry};
use super::*;
use crate::config::Dnssec;

const NOW: Now = Now { monotonic: Duration::from_secs(1_000), wall_ms: 0 };

fn config(server: &DnsServer) -> DnsConfig {
    DnsConfig {
        servers: vec![server.address()],
        prohibited_hosts: ["127.0.0.0/8", "::1/128"].map(|network| network.parse().unwrap()).into(),
        ..DnsConfig::default()
    }
}

fn resolver(server: &DnsServer) -> Resolver {
    let own = vec!["192.0.2.99:25".parse().unwrap(), "0.0.0.0:2500".parse().unwrap()];
    Resolver::new(&config(server), false, own).unwrap()
}

fn on_control<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn site(zone: &[(&str, Entry)], domain: &str) -> Result<Site, RouteFailure> {
    let server = DnsServer::start(zone);
    on_control(async { resolver(&server).resolve_site(NOW, domain).await })
}

fn hosts(site: &Site) -> Vec<(u16, &str, String)> {
    let addresses = |host: &Host| host.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    site.hosts.iter().map(|host| (host.preference, host.name.as_str(), addresses(host))).collect()
}

fn assert_bounces(result: &Result<Site, RouteFailure>, enhanced: (u8, u16, u16)) {
    let failure = result.as_ref().unwrap_err();
    assert_eq!((failure.kind, failure.enhanced), (RouteFailureKind::Bounce, enhanced), "{failure}");
    assert!(failure.expires > NOW.monotonic);
}

fn assert_defers(result: &Result<Site, RouteFailure>) {
    let failure = result.as_ref().unwrap_err();
    assert_eq!((failure.kind, failure.code, failure.enhanced), (RouteFailureKind::Defer, 451, (4, 4, 3)), "{failure}");
    assert!(failure.expires > NOW.monotonic && failure.expires <= NOW.monotonic + DEFER_TTL * 2);
}

/// RFC 5321 §5.1.
#[test]
fn mx_hosts_are_found_with_all_addresses() {
    let zone = [
        ("d.example", Entry::Mx(20, "b.d.example")),
        ("d.example", Entry::Mx(10, "A.d.example")),
        ("a.d.example", Entry::A([192, 0, 2, 1])),
        ("a.d.example", Entry::Aaaa("2001:db8::1".parse().unwrap())),
        ("b.d.example", Entry::A([192, 0, 2, 2])),
    ];
    let site = site(&zone, "D.Example").unwrap();
    assert_eq!(site.name, "a.d.example,b.d.example");
    let expected = [(10, "a.d.example", "192.0.2.1:25 [2001:db8::1]:25"), (20, "b.d.example", "192.0.2.2:25")];
    assert_eq!(hosts(&site), expected.map(|(preference, name, addresses)| (preference, name, addresses.to_owned())));
    let lifetime = site.expires - NOW.monotonic;
    assert!((Duration::from_secs(55)..=Duration::from_secs(61)).contains(&lifetime), "the zone's TTL: {lifetime:?}");
}

#[test]
fn domains_with_the_same_hosts_share_a_site() {
    let zone = [
        ("d.example", Entry::Mx(10, "mx.example")),
        ("e.example", Entry::Mx(99, "mx.example")),
        ("mx.example", Entry::A([192, 0, 2, 1])),
    ];
    assert_eq!(site(&zone, "d.example").unwrap().name, site(&zone, "e.example").unwrap().name);
}

/// RFC 5321 §5.1: no MX record, but an address: the implicit MX.
#[test]
fn the_implicit_mx_is_used() {
    let found = site(&[("d.example", Entry::A([192, 0, 2, 7]))], "d.example").unwrap();
    assert_eq!((found.name.as_str(), hosts(&found)), ("d.example", vec![(0, "d.example", "192.0.2.7:25".to_owned())]));
}

/// RFC 5321 §5.1: an alias is followed first, and then counts as the name.
#[test]
fn aliases_are_followed() {
    let zone = [
        ("alias.example", Entry::Cname("d.example")),
        ("d.example", Entry::Mx(10, "mx-alias.example")),
        ("mx-alias.example", Entry::Cname("mx.example")),
        ("mx.example", Entry::A([192, 0, 2, 1])),
        ("nowhere.example", Entry::Cname("missing.example")),
        ("bare.example", Entry::Cname("mx.example")),
    ];
    let found = site(&zone, "alias.example").unwrap();
    assert_eq!(hosts(&found), [(10, "mx-alias.example", "192.0.2.1:25".to_owned())]);
    assert_eq!(hosts(&site(&zone, "bare.example").unwrap()), [(0, "bare.example", "192.0.2.1:25".to_owned())]);
    assert_bounces(&site(&zone, "nowhere.example"), (5, 1, 2));
}

/// They are no host names (RFC 952), but there are some.
#[test]
fn names_with_an_underscore_are_looked_up() {
    let zone = [
        ("a_b.example", Entry::Mx(1, "mx_1.example")),
        ("mx_1.example", Entry::A([192, 0, 2, 1])),
        ("_c.xn--bcher-kva.example", Entry::A([192, 0, 2, 2])),
        ("c_d.xn--bcher-kva.example", Entry::A([192, 0, 2, 3])),
    ];
    assert_eq!(hosts(&site(&zone, "a_b.example").unwrap()), [(1, "mx_1.example", "192.0.2.1:25".to_owned())]);
    for (domain, address) in [("_c.b\u{fc}cher.example", "192.0.2.2:25"), ("c_d.b\u{fc}cher.example", "192.0.2.3:25")] {
        assert_eq!(hosts(&site(&zone, domain).unwrap())[0].2, address, "{domain}");
    }
}

#[test]
fn what_is_not_there_bounces() {
    assert_bounces(&site(&[("d.example", Entry::NullMx)], "d.example"), (5, 1, 10));
    assert_bounces(&site(&[], "d.example"), (5, 1, 2));
    assert_bounces(&site(&[("d.example", Entry::Mx(1, "gone.example"))], "d.example"), (5, 4, 4));
    let empty = [("d.example", Entry::Mx(1, "mx.example")), ("mx.example", Entry::Mx(1, "x.example"))];
    assert_bounces(&site(&empty, "d.example"), (5, 4, 4));
    assert_bounces(&site(&empty[1..], "x.mx.example"), (5, 1, 2));
    assert_bounces(&site(&[], "a..b"), (5, 1, 2));
    assert_bounces(&site(&[], ""), (5, 1, 2));
    assert_bounces(&site(&[], "."), (5, 1, 2));
    assert_bounces(&site(&[], &"a".repeat(70)), (5, 1, 2));
    assert_bounces(&site(&[], "localhost"), (5, 4, 4));
}

#[test]
fn what_nobody_could_say_defers() {
    assert_defers(&site(&[("d.example", Entry::ServFail)], "d.example"));
    let zone = [("d.example", Entry::Mx(1, "mx.example")), ("mx.example", Entry::ServFail)];
    assert_defers(&site(&zone, "d.example"));
    // One host that is known is enough, but for a short time only.
    let zone = [zone[0], zone[1], ("d.example", Entry::Mx(2, "ok.example")), ("ok.example", Entry::A([192, 0, 2, 1]))];
    let found = site(&zone, "d.example").unwrap();
    assert_eq!((found.name.as_str(), found.hosts.len()), ("mx.example,ok.example", 1));
    assert!(found.expires <= NOW.monotonic + DEFER_TTL * 2);
    // RFC 2308 §2.2: what a server answers that is not one of the domain's, and asks nobody.
    assert_defers(&site(&[("d.example", Entry::Referral)], "d.example"));
    let zone = [("d.example", Entry::Mx(1, "mx.example")), ("mx.example", Entry::Referral)];
    assert_defers(&site(&zone, "d.example"));
}

#[test]
fn a_server_that_is_silent_or_gone_defers() {
    let server = DnsServer::start(&[("d.example", Entry::Silent)]);
    let impatient = |config: &DnsConfig| {
        Resolver::with_port_and_timeout(config, false, Vec::new(), 25, Duration::from_millis(50)).unwrap()
    };
    on_control(async {
        assert_defers(&impatient(&config(&server)).resolve_site(NOW, "d.example").await);
        let config = config(&server);
        drop(server);
        assert_defers(&impatient(&config).resolve_site(NOW, "e.example").await);
    });
}

#[test]
fn truncated_answers_are_fetched_by_tcp() {
    let server = DnsServer::start(&[
        ("d.example", Entry::Mx(10, "mx.example")),
        ("d.example", Entry::Truncated),
        ("mx.example", Entry::A([192, 0, 2, 1])),
    ]);
    let found = on_control(async { resolver(&server).resolve_site(NOW, "d.example").await.unwrap() });
    assert_eq!(hosts(&found), [(10, "mx.example", "192.0.2.1:25".to_owned())]);
    assert_eq!(server.questions_by_tcp(), 1);
}

#[test]
fn answers_are_cached_also_negative_ones() {
    let server =
        DnsServer::start(&[("d.example", Entry::Mx(10, "mx.example")), ("mx.example", Entry::A([192, 0, 2, 1]))]);
    on_control(async {
        let resolver = resolver(&server);
        for _ in 0..3 {
            resolver.clone().resolve_site(NOW, "d.example").await.unwrap();
            resolver.resolve_site(NOW, "missing.example").await.unwrap_err();
        }
        assert_eq!(server.questions("d.example", "MX"), 1);
        assert_eq!(server.questions("mx.example", "A"), 1);
        assert_eq!(server.questions("mx.example", "AAAA"), 1);
        assert_eq!(server.questions("missing.example", "MX"), 1);
    });
}

#[test]
fn prohibited_hosts_are_never_chosen() {
    let zone = [
        ("d.example", Entry::Mx(1, "loop.example")),
        ("d.example", Entry::Mx(2, "mapped.example")),
        ("loop.example", Entry::A([127, 0, 0, 1])),
        ("mapped.example", Entry::Aaaa("::ffff:127.0.0.1".parse().unwrap())),
        ("e.example", Entry::Mx(1, "loop.example")),
        ("e.example", Entry::Mx(2, "mx.example")),
        ("mx.example", Entry::A([192, 0, 2, 1])),
    ];
    assert_bounces(&site(&zone, "d.example"), (5, 4, 4));
    assert_eq!(hosts(&site(&zone, "e.example").unwrap()), [(2, "mx.example", "192.0.2.1:25".to_owned())]);
    assert_bounces(&site(&[], "[127.0.0.1]"), (5, 4, 4));
}

#[test]
fn we_are_never_chosen() {
    let zone = [("d.example", Entry::Mx(1, "us.example")), ("us.example", Entry::A([192, 0, 2, 99]))];
    assert_bounces(&site(&zone, "d.example"), (5, 4, 6));
    assert_bounces(&site(&[], "[192.0.2.99]"), (5, 4, 6));
    // A listener on all addresses is each local address, also before it is a prohibited one.
    let server = DnsServer::start(&[("d.example", Entry::A([127, 0, 0, 1]))]);
    let own = vec!["0.0.0.0:2500".parse().unwrap()];
    let resolver = Resolver::with_port_and_timeout(&config(&server), false, own, 2500, QUERY_TIMEOUT).unwrap();
    assert_bounces(&on_control(async { resolver.resolve_site(NOW, "d.example").await }), (5, 4, 6));
}

/// RFC 5321 §4.1.3.
#[test]
fn address_literals_need_no_lookup() {
    let found = site(&[], "[192.0.2.5]").unwrap();
    let expected = vec![(0, "[192.0.2.5]", "192.0.2.5:25".to_owned())];
    assert_eq!((found.name.as_str(), hosts(&found)), ("[192.0.2.5]", expected));
    assert_eq!(hosts(&site(&[], "[IPv6:2001:db8::5]").unwrap())[0].2, "[2001:db8::5]:25");
    assert_bounces(&site(&[], "[nonsense]"), (5, 1, 3));
}

#[test]
fn static_routes_are_resolved_in_their_order() {
    let server = DnsServer::start(&[
        ("smart.example", Entry::A([192, 0, 2, 1])),
        ("d.example", Entry::Mx(7, "x.example")),
        ("d.example", Entry::Mx(7, "y.example")),
        ("d.example", Entry::Mx(9, "z.example")),
        ("x.example", Entry::A([192, 0, 2, 2])),
        ("y.example", Entry::A([192, 0, 2, 3])),
        ("z.example", Entry::A([192, 0, 2, 4])),
    ]);
    let host = |name: &str| RouteTarget::Host { name: name.to_owned(), port: 587 };
    let local = RouteTarget::Address("127.0.0.1:2526".parse().unwrap());
    on_control(async {
        let resolver = resolver(&server);
        let targets = [local, host("smart.example"), RouteTarget::Mx("d.example".to_owned()), host("localhost")];
        let found = resolver.resolve_targets(NOW, &targets).await.unwrap();
        assert_eq!(found.name, "127.0.0.1:2526,localhost:587,mx:d.example,smart.example:587");
        let expected = [
            (0, "[127.0.0.1]", "127.0.0.1:2526"),
            (1, "smart.example", "192.0.2.1:587"),
            (2, "x.example", "192.0.2.2:25"),
            (2, "y.example", "192.0.2.3:25"),
            (3, "z.example", "192.0.2.4:25"),
        ];
        let found = hosts(&found);
        assert_eq!(found[..5], expected.map(|(preference, name, address)| (preference, name, address.to_owned())));
        assert_eq!((found[5].0, found[5].1), (4, "localhost"));
        // A mistake in our own configuration costs nobody's mail.
        assert_defers(&resolver.resolve_targets(NOW, &[host("missing.example")]).await);
        assert_defers(&resolver.resolve_targets(NOW, &[RouteTarget::Mx("missing.example".to_owned())]).await);
        let partly = resolver.resolve_targets(NOW, &[host("missing.example"), host("smart.example")]).await.unwrap();
        assert_eq!(partly.hosts.len(), 1);
        assert!(partly.expires <= NOW.monotonic + DEFER_TTL * 2);
    });
}

mod dane {
    use super::*;

    const ZONE: [(&str, Entry); 3] =
        [("d.example", Entry::Mx(1, "mx.d.example")), ("mx.d.example", Entry::A([192, 0, 2, 1])), RECORD];
    const RECORD: (&str, Entry) = ("_25._tcp.mx.d.example", Entry::Tlsa([3, 1, 1], &[1; 32]));

    /// What the first host's records require, as a resolver says that has checked all but what is marked.
    fn ask(zone: &[(&str, Entry)]) -> HostDane {
        asked(zone, async |resolver| resolver.resolve_site(NOW, "d.example").await)
    }

    /// The same of a host that a route names.
    fn ask_route(zone: &[(&str, Entry)], host: &str, port: u16) -> HostDane {
        let targets = [RouteTarget::Host { name: host.to_owned(), port }];
        asked(zone, async |resolver| resolver.resolve_targets(NOW, &targets).await)
    }

    fn asked(zone: &[(&str, Entry)], ask: impl AsyncFnOnce(Resolver) -> Result<Site, RouteFailure>) -> HostDane {
        let server = DnsServer::start(zone);
        server.set_authentic(true);
        let config = DnsConfig { dnssec: Dnssec::TrustAd, ..config(&server) };
        on_control(async {
            let timeout = Duration::from_millis(50);
            let resolver = Resolver::with_port_and_timeout(&config, true, Vec::new(), 25, timeout).unwrap();
            ask(resolver).await.unwrap().hosts.remove(0).dane
        })
    }

    fn with(zone: &[(&'static str, Entry)]) -> HostDane {
        ask(&ZONE.iter().chain(zone).copied().collect::<Vec<_>>())
    }

    #[test]
    fn proven_records_count() {
        let HostDane::Usable(policy) = ask(&ZONE) else { panic!("they are usable") };
        assert_eq!((policy.to_string().as_str(), policy.base.as_str()), ("3 1 1", "mx.d.example"));
        assert_eq!(ask(&ZONE[..2]), HostDane::Absent);
        assert_eq!(with(&[(RECORD.0, Entry::Insecure)]), HostDane::Absent);
    }

    /// RFC 7672 §2.1.2.
    #[test]
    fn a_name_server_that_does_not_answer_says_neither_yes_nor_no() {
        for failure in [Entry::ServFail, Entry::Silent] {
            let HostDane::Unknown(why) = with(&[(RECORD.0, failure)]) else { panic!("nobody can know") };
            assert!(why.starts_with("TLSA lookup of _25._tcp.mx.d.example: "), "{why}");
        }
    }

    /// RFC 7672 §2.2.2: an alias that is proven, to a name that is not, leaves the records of the host's own name.
    #[test]
    fn an_alias_into_the_unknown_keeps_its_own_name() {
        let zone = |alias: &[(&'static str, Entry)]| {
            let mut zone = vec![ZONE[0], RECORD, ("mx.d.example", Entry::Cname("other.example"))];
            zone.push(("other.example", Entry::A([192, 0, 2, 1])));
            zone.extend(alias);
            ask(&zone)
        };
        let unproven = ("other.example", Entry::Insecure);
        let HostDane::Usable(policy) = zone(&[unproven]) else { panic!("they are usable") };
        assert_eq!(policy.base, "mx.d.example");
        let forged = ("mx.d.example", Entry::Insecure);
        assert_eq!(zone(&[forged, unproven]), HostDane::Absent);
        assert_eq!(zone(&[forged]), HostDane::Absent, "what an alias leads to proves nothing of the alias");
    }

    /// RFC 7672 §2.2.2: no MX set has to be proven for it, and the records are those of the route's port.
    #[test]
    fn a_host_that_a_route_names_has_records_at_its_own_port() {
        let own = ("_587._tcp.mx.d.example", Entry::Tlsa([2, 1, 1], &[2; 32]));
        let zone = [ZONE[1], RECORD, own];
        let HostDane::Usable(policy) = ask_route(&zone, "MX.d.example", 587) else { panic!("they are usable") };
        assert_eq!((policy.to_string().as_str(), policy.base.as_str()), ("2 1 1", "mx.d.example"));
        assert_eq!(ask_route(&zone, "mx.d.example", 465), HostDane::Absent);
        let unproven = [ZONE[1], own, (ZONE[1].0, Entry::Insecure)];
        assert_eq!(ask_route(&unproven, "mx.d.example", 587), HostDane::Absent);
        let silent = [ZONE[1], (own.0, Entry::ServFail)];
        assert!(matches!(ask_route(&silent, "mx.d.example", 587), HostDane::Unknown(_)));
    }

    /// The hosts file is nobody's signed zone.
    #[test]
    fn what_the_hosts_file_says_is_not_proven() {
        let zone = [("localhost", Entry::A([192, 0, 2, 1])), ("_25._tcp.localhost", RECORD.1)];
        assert_eq!(ask_route(&zone, "localhost", 25), HostDane::Absent);
    }
}
