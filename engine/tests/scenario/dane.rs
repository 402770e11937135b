//! DANE (RFC 7672) from the resolver's AD bit to the peer's certificate. A name server of our own says here what a
//! validating resolver would; `interop/signed_zones.rs` has a real one.

use std::net::{IpAddr, SocketAddr};

use postrider::admin::{MessageRow, TlsReportRow};
use postrider::config::{Config, Dnssec, DomainPattern, Route, RouteTarget};
use postrider::outcome::event::EventKind;

use crate::support::dns_server::{DnsServer, Entry};
use crate::support::embedded::{Running, block_on, config};
use crate::support::policy_server::PolicyServer;
use crate::support::sink::{Sink, Verb};
use crate::support::tls_front::TlsFront;
use crate::support::{at_loopback, message, tlsa, token};

/// One MX host, whose certificate nobody vouches for, for `dane.test` and `plain.test`; the latter's MX set is not
/// proven.
struct World {
    sink: Sink,
    front: TlsFront,
    dns: DnsServer,
    directory: tempfile::TempDir,
}

type Zone = Vec<(&'static str, Entry)>;

impl World {
    /// The MX host has what `tlsa` makes of its certificate at [`TLSA`]. None where this user may not have the port.
    fn new(tlsa: impl Fn(&str) -> Vec<Entry>) -> Option<Self> {
        let sink = Sink::start();
        let front = at_loopback(25, |address| TlsFront::try_start_at(address, &["other.test"], sink.address()))?;
        let mut zone = zone(front.address());
        zone.extend(tlsa(front.certificate_pem()).into_iter().map(|entry| (TLSA, entry)));
        let dns = DnsServer::start(&zone);
        dns.set_authentic(true);
        Some(Self { sink, front, dns, directory: tempfile::tempdir().unwrap() })
    }

    fn engine(&self) -> Running {
        self.engine_with(&self.dns, true)
    }

    fn engine_with(&self, dns: &DnsServer, dane: bool) -> Running {
        let mut config = self.config(dns);
        config.shaping.dane = dane;
        Running::start(config)
    }

    fn config(&self, dns: &DnsServer) -> Config {
        let mut config = config(self.directory.path());
        config.shards = Some(1);
        config.dns.servers = vec![dns.address()];
        config.dns.dnssec = Dnssec::TrustAd;
        config.dns.prohibited_hosts.clear();
        config
    }
}

fn zone(address: SocketAddr) -> Zone {
    let IpAddr::V4(ip) = address.ip() else { unreachable!("it is at a loopback address") };
    vec![
        ("dane.test", Entry::Mx(10, "mx.test")),
        ("plain.test", Entry::Mx(20, "mx.test")),
        ("plain.test", Entry::Insecure),
        ("mx.test", Entry::A(ip.octets())),
    ]
}

fn record(kind: [u8; 3], data: Vec<u8>) -> Entry {
    Entry::Tlsa(kind, data.leak())
}

fn good(certificate_pem: &str) -> Vec<Entry> {
    vec![record([3, 1, 1], tlsa::data(certificate_pem, 1, 1))]
}

fn wrong(_: &str) -> Vec<Entry> {
    vec![record([3, 1, 1], vec![7; 32])]
}

fn dane_is_blocked(running: &Running, because: &str) {
    let blocked = |row: &MessageRow| row.blocked_by.as_ref().is_some_and(|blocked| blocked.contains(because));
    let rows = running.rows_when(because, |rows| rows.iter().any(blocked));
    assert_eq!((rows.len(), rows[0].num_attempts, &*rows[0].recipient), (1, 0, "a@dane.test"));
}

fn is_delivered(world: &World, running: &mut Running, recipient: &str, told: &str) {
    running.inject(&[recipient], &message(recipient));
    assert_eq!(token(&world.sink.next().content), recipient);
    let delivery = running.event_where("delivery", |event| event.kind == EventKind::Delivery);
    assert!(delivery.to_json().contains(told), "{told}: {}", delivery.to_json());
}

/// What TLS sessions came to: policy, its domain, the recipients', and counts.
fn sessions(running: &Running) -> Vec<String> {
    let rows = block_on(running.engine.tls_report()).expect("the engine answers").into_iter();
    let row = |row: TlsReportRow| {
        let TlsReportRow { policy_type, policy_domain, recipient_domain, successful_sessions, failed_sessions } = row;
        let failed: Vec<_> = failed_sessions.into_keys().collect();
        format!("{policy_type} {policy_domain} {recipient_domain} {successful_sessions} {failed:?}")
    };
    rows.map(row).collect()
}

const TLSA: &str = "_25._tcp.mx.test";
const BY_DANE: &str = r#""tls_protocol_version":"TLSv1.3","tls_verified_by":"dane""#;
const BY_NOBODY: &str = r#""tls_protocol_version":"TLSv1.3","tls_peer"#;

/// RFC 7672 §3.1.1: the certificate has another name, and no known root.
#[test]
fn a_certificate_that_the_record_names_is_good() {
    let Some(world) = World::new(good) else { return };
    let mut running = world.engine();
    is_delivered(&world, &mut running, "a@dane.test", BY_DANE);
    is_delivered(&world, &mut running, "b@dane.test", BY_DANE);
    // What is good enough for DANE is good enough for all.
    is_delivered(&world, &mut running, "a@plain.test", BY_DANE);
    assert_eq!(world.front.handshakes(), 1);
    assert_eq!(sessions(&running), ["tlsa mx.test dane.test 1 []"]);
}

/// RFC 7672 §2.2: it is no reason to send all the same, nor to hold up others; in either order.
#[test]
fn a_certificate_that_no_record_names_holds_up_its_own_domain_alone() {
    let Some(world) = World::new(wrong) else { return };
    let mut running = world.engine();
    running.inject(&["a@dane.test"], &message("first"));
    dane_is_blocked(&running, "no TLSA record (3 1 1) names the peer's certificate");
    is_delivered(&world, &mut running, "a@plain.test", BY_NOBODY);
    dane_is_blocked(&running, "no TLSA record");
    let expected = ["no-policy-found plain.test plain.test 1 []", r#"tlsa mx.test dane.test 0 ["tlsa-invalid"]"#];
    assert_eq!(sessions(&running), expected);
    running.shutdown();
    assert_eq!(world.sink.count(Verb::Content), 1);
}

#[test]
fn a_warm_connection_that_has_not_proved_the_records_carries_nothing_that_needs_it() {
    let Some(world) = World::new(good) else { return };
    let mut running = world.engine();
    is_delivered(&world, &mut running, "a@plain.test", BY_NOBODY);
    is_delivered(&world, &mut running, "a@dane.test", BY_DANE);
    assert_eq!(world.front.handshakes(), 2);
}

/// RFC 7672 §2.2.2: a host that a route names, at a port of its own, is as its own records say.
#[test]
fn a_host_that_a_route_names_is_checked_at_its_port() {
    for (records, is_good) in [(good as fn(&str) -> Vec<Entry>, true), (wrong, false)] {
        let sink = Sink::start();
        let front = TlsFront::try_start_at(SocketAddr::from(([127, 0, 0, 1], 0)), &["other.test"], sink.address());
        let front = front.expect("a port of its own");
        let port = front.address().port();
        let name: &'static str = format!("_{port}._tcp.smart.test").leak();
        let mut zone: Zone = vec![("smart.test", Entry::A([127, 0, 0, 1]))];
        zone.extend(records(front.certificate_pem()).into_iter().map(|entry| (name, entry)));
        let dns = DnsServer::start(&zone);
        dns.set_authentic(true);
        let world = World { sink, front, dns, directory: tempfile::tempdir().unwrap() };
        let mut config = world.config(&world.dns);
        let to = vec![RouteTarget::Host { name: "smart.test".to_owned(), port }];
        config.routes.push(Route::new(DomainPattern::Exact("dane.test".to_owned()), to));
        let mut running = Running::start(config);
        if is_good {
            is_delivered(&world, &mut running, "a@dane.test", BY_DANE);
        } else {
            running.inject(&["a@dane.test"], &message("dane"));
            dane_is_blocked(&running, "no TLSA record (3 1 1) names the peer's certificate");
            assert_eq!(world.sink.count(Verb::Mail), 0);
        }
    }
}

/// RFC 7672 §2.2: a host with TLSA records gets nothing in the clear, whoever stripped STARTTLS from its offers.
#[test]
fn without_starttls_nothing_is_sent() {
    for records in [good as fn(&str) -> Vec<Entry>, unusable] {
        let Some(world) = World::new(records) else { return };
        let Some((bare, ip)) = Sink::at_port_25() else { return };
        let mut zone = zone(SocketAddr::from((ip, 25)));
        zone.extend(records(world.front.certificate_pem()).into_iter().map(|entry| (TLSA, entry)));
        world.dns.set_zone(&zone);
        let running = world.engine();
        running.inject(&["a@dane.test"], &message("dane"));
        dane_is_blocked(&running, "STARTTLS");
        running.inject(&["a@plain.test"], &message("plain"));
        assert_eq!(token(&bare.next().content), "plain", "which may go in the clear");
        let expected = [
            r#"no-policy-found plain.test plain.test 0 ["starttls-not-supported"]"#,
            r#"tlsa mx.test dane.test 0 ["starttls-not-supported"]"#,
        ];
        assert_eq!(sessions(&running), expected);
        running.shutdown();
        assert_eq!(bare.count(Verb::Mail), 1);
    }
}

/// RFC 7672 §2.2, §3.1.3.
#[test]
fn records_that_cannot_be_used_ask_for_encryption_alone() {
    let Some(world) = World::new(unusable) else { return };
    let mut running = world.engine();
    is_delivered(&world, &mut running, "a@dane.test", BY_NOBODY);
}

fn unusable(certificate_pem: &str) -> Vec<Entry> {
    vec![record([1, 1, 1], tlsa::data(certificate_pem, 1, 1)), record([3, 1, 9], vec![1; 32])]
}

/// RFC 7672 §2.1.2: else whoever can suppress an answer could switch DANE off.
#[test]
fn a_host_whose_records_cannot_be_had_is_not_used() {
    let Some(world) = World::new(|_| vec![Entry::ServFail]) else { return };
    let mut running = world.engine();
    running.inject(&["a@dane.test"], &message("dane"));
    dane_is_blocked(&running, "mx.test must not be used: TLSA lookup of _25._tcp.mx.test");
    is_delivered(&world, &mut running, "a@plain.test", BY_NOBODY);
    let expected = ["no-policy-found plain.test plain.test 1 []", r#"tlsa mx.test dane.test 0 ["dnssec-invalid"]"#];
    assert_eq!(sessions(&running), expected);
    running.shutdown();
    assert_eq!(world.sink.count(Verb::Content), 1);
}

/// RFC 7672 §2.1.1, §2.2.1: what nobody vouches for requires nothing, on the MX set, the host, or the records.
#[test]
fn records_that_are_not_proven_do_not_count() {
    for insecure in ["dane.test", "mx.test", TLSA] {
        let Some(world) = World::new(wrong) else { return };
        let mut zone = zone(world.front.address());
        zone.extend(wrong("").into_iter().map(|entry| (TLSA, entry)));
        zone.push((insecure, Entry::Insecure));
        world.dns.set_zone(&zone);
        let mut running = world.engine();
        is_delivered(&world, &mut running, "a@dane.test", BY_NOBODY);
        let asked = world.dns.questions(TLSA, "TLSA");
        assert_eq!(asked > 0, insecure == TLSA, "nobody asks in vain: {insecure}");
    }
}

/// RFC 7672 §2.2.2: a domain without MX is a host itself.
#[test]
fn a_domain_without_mx_has_records_of_its_own() {
    let Some(world) = World::new(wrong) else { return };
    let IpAddr::V4(ip) = world.front.address().ip() else { unreachable!("it is at a loopback address") };
    let records = wrong("").into_iter().map(|entry| ("_25._tcp.dane.test", entry));
    world.dns.set_zone(&[("dane.test", Entry::A(ip.octets()))].into_iter().chain(records).collect::<Zone>());
    let running = world.engine();
    running.inject(&["a@dane.test"], &message("dane"));
    dane_is_blocked(&running, "no TLSA record (3 1 1)");
    assert_eq!(world.sink.count(Verb::Mail), 0);
}

#[test]
fn dane_can_be_switched_off() {
    let Some(world) = World::new(wrong) else { return };
    let mut running = world.engine_with(&world.dns, false);
    is_delivered(&world, &mut running, "a@dane.test", BY_NOBODY);
    assert_eq!(world.dns.questions(TLSA, "TLSA"), 0);
}

/// A bit that was not set says nothing, so an ordinary resolver switches DANE off.
#[test]
fn a_resolver_that_proves_nothing_changes_nothing() {
    let Some(world) = World::new(wrong) else { return };
    world.dns.set_authentic(false);
    let mut running = world.engine();
    is_delivered(&world, &mut running, "a@dane.test", BY_NOBODY);
}

/// RFC 8461 §2: a policy that the host doesn't meet neither helps nor hinders where it has TLSA records.
#[test]
fn dane_comes_before_mta_sts() {
    for (records, is_good) in [(good as fn(&str) -> Vec<Entry>, true), (wrong, false)] {
        let Some(world) = World::new(records) else { return };
        let Some(web) = at_loopback(443, |address| PolicyServer::try_start_at(address, &["mta-sts.dane.test"])) else {
            return;
        };
        web.policy("mode: enforce\nmx: another.test\nmax_age: 86400\n");
        let IpAddr::V4(ip) = web.address().ip() else { unreachable!("it is at a loopback address") };
        let mut zone = zone(world.front.address());
        zone.extend(records(world.front.certificate_pem()).into_iter().map(|entry| (TLSA, entry)));
        zone.push(("_mta-sts.dane.test", Entry::Txt("v=STSv1; id=1")));
        zone.push(("mta-sts.dane.test", Entry::A(ip.octets())));
        world.dns.set_zone(&zone);
        let mut config = world.config(&world.dns);
        config.tls.extra_roots_pem = std::sync::Arc::new(web.certificate_pem().as_bytes().to_vec());
        let mut running = Running::start(config);
        if is_good {
            is_delivered(&world, &mut running, "a@dane.test", BY_DANE);
        } else {
            running.inject(&["a@dane.test"], &message("dane"));
            dane_is_blocked(&running, "no TLSA record (3 1 1)");
            assert_eq!(world.sink.count(Verb::Mail), 0);
        }
        assert_eq!(web.requests().len(), 1, "the policy was there");
    }
}
