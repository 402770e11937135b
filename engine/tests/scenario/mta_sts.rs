//! MTA-STS (RFC 8461) from the name server to the peer's certificate: a domain's policy is that domain's alone, though
//! its hosts are others' too.

use std::net::SocketAddr;
use std::sync::Arc;

use postrider::admin::MessageRow;
use postrider::outcome::event::EventKind;

use crate::support::dns_server::{DnsServer, Entry};
use crate::support::embedded::{Running, block_on, config};
use crate::support::policy_server::PolicyServer;
use crate::support::sink::{Sink, Verb};
use crate::support::tls_front::TlsFront;
use crate::support::{at_loopback, message, token};

/// One MX host, whose certificate nobody vouches for, for `plain.test` and `strict.test`; the latter has a policy.
struct World {
    sink: Sink,
    front: TlsFront,
    web: PolicyServer,
    dns: DnsServer,
    directory: tempfile::TempDir,
}

impl World {
    /// None where this user may not have the ports.
    fn new(policy: &str) -> Option<Self> {
        let sink = Sink::start();
        let front = at_loopback(25, |address| TlsFront::try_start_at(address, &["mx.test"], sink.address()))?;
        let web = at_loopback(443, |address| PolicyServer::try_start_at(address, &["mta-sts.strict.test"]))?;
        web.policy(policy);
        let octets = |address: SocketAddr| match address.ip() {
            std::net::IpAddr::V4(address) => address.octets(),
            std::net::IpAddr::V6(_) => unreachable!("it is at a loopback address"),
        };
        let dns = DnsServer::start(&[
            ("plain.test", Entry::Mx(10, "mx.test")),
            ("strict.test", Entry::Mx(20, "mx.test")),
            ("mx.test", Entry::A(octets(front.address()))),
            ("_mta-sts.strict.test", Entry::Txt("v=STSv1; id=1")),
            ("mta-sts.strict.test", Entry::A(octets(web.address()))),
        ]);
        Some(Self { sink, front, web, dns, directory: tempfile::tempdir().unwrap() })
    }

    fn engine(&self, roots: &[&str]) -> Running {
        let mut config = config(self.directory.path());
        config.shards = Some(1);
        config.dns.servers = vec![self.dns.address()];
        config.dns.prohibited_hosts.clear();
        config.tls.extra_roots_pem = Arc::new(roots.concat().into_bytes());
        Running::start(config)
    }

    fn untrusted(&self) -> Running {
        self.engine(&[self.web.certificate_pem()])
    }
}

fn strict_is_blocked(running: &Running, because: &str) {
    let blocked = |row: &MessageRow| row.blocked_by.as_ref().is_some_and(|blocked| blocked.contains(because));
    let rows = running.rows_when("the strict one is blocked", |rows| rows.iter().any(blocked));
    assert_eq!((rows.len(), rows[0].num_attempts, &*rows[0].recipient), (1, 0, "a@strict.test"));
}

const ENFORCE: &str = "mode: enforce\nmx: mx.test\nmax_age: 86400\n";

/// RFC 8461 §5.1: a certificate that is not good enough is no reason to send all the same, nor to hold up others.
#[test]
fn only_the_domain_with_the_policy_waits_when_it_comes_first() {
    let Some(world) = World::new(ENFORCE) else { return };
    let mut running = world.untrusted();
    running.inject(&["a@strict.test"], &message("strict"));
    strict_is_blocked(&running, "invalid peer certificate");
    running.inject(&["a@plain.test"], &message("plain"));
    assert_eq!(token(&world.sink.next().content), "plain");
    let delivery = running.event(EventKind::Delivery);
    assert!(delivery.to_json().contains("\"tls_protocol_version\":\"TLSv1.3\""), "{}", delivery.to_json());
    strict_is_blocked(&running, "invalid peer certificate");
    let sessions = block_on(running.engine.tls_report()).unwrap();
    let of_strict = sessions.iter().find(|row| row.policy_domain == "strict.test").unwrap();
    let failures: Vec<_> = of_strict.failed_sessions.keys().copied().collect();
    assert_eq!((of_strict.policy_type, &failures[..]), ("sts", &["certificate-not-trusted"][..]));
    running.shutdown();
    assert_eq!((world.sink.count(Verb::Content), world.front.handshakes()), (1, 1));
    assert!(world.front.refusals() >= 1);
}

/// The same on a connection that is warm, and was good enough for the other.
#[test]
fn only_the_domain_with_the_policy_waits_when_it_comes_second() {
    let Some(world) = World::new(ENFORCE) else { return };
    let mut running = world.untrusted();
    running.inject(&["a@plain.test"], &message("plain"));
    assert_eq!(token(&world.sink.next().content), "plain");
    running.event(EventKind::Delivery);
    running.inject(&["a@strict.test"], &message("strict"));
    strict_is_blocked(&running, "invalid peer certificate");
    running.inject(&["a@plain.test"], &message("again"));
    assert_eq!(token(&world.sink.next().content), "again");
    running.event(EventKind::Delivery);
    strict_is_blocked(&running, "invalid peer certificate");
    running.shutdown();

    // With a certificate that somebody vouches for all is well; the policy is remembered, its server is gone.
    world.web.answer("500 Down", "text/plain", "");
    let mut running = world.engine(&[world.web.certificate_pem(), world.front.certificate_pem()]);
    assert_eq!(token(&world.sink.next().content), "strict");
    let delivery = running.event(EventKind::Delivery);
    assert_eq!(delivery.attempts, 1, "waiting cost no attempt");
    assert!(delivery.to_json().contains("\"tls_peer_subject_name\":["), "{}", delivery.to_json());
    assert_eq!(world.web.requests().len(), 1);
}

/// RFC 8461 §10.2: a policy that is in force outlives both the server that gave it and the engine that fetched it.
#[test]
fn a_policy_survives_a_restart() {
    let Some(world) = World::new(ENFORCE) else { return };
    let running = world.untrusted();
    running.inject(&["a@strict.test"], &message("strict"));
    strict_is_blocked(&running, "invalid peer certificate");
    running.shutdown();
    world.web.answer("404 Not Found", "text/plain", "");
    let running = world.untrusted();
    strict_is_blocked(&running, "invalid peer certificate");
    assert_eq!((world.web.requests().len(), world.sink.count(Verb::Mail)), (1, 0));
}

/// RFC 8461 §4.1, §5.1: hosts that the policy doesn't name are no hosts of the domain.
#[test]
fn a_host_that_the_policy_does_not_name_gets_nothing() {
    let Some(world) = World::new("mode: enforce\nmx: *.other.test\nmax_age: 86400\n") else { return };
    let mut running = world.engine(&[world.web.certificate_pem(), world.front.certificate_pem()]);
    running.inject(&["a@strict.test"], &message("strict"));
    strict_is_blocked(&running, "names none of its MX hosts");
    running.inject(&["a@plain.test"], &message("plain"));
    assert_eq!(token(&world.sink.next().content), "plain");
    running.event(EventKind::Delivery);
    strict_is_blocked(&running, "names none of its MX hosts");
}

/// RFC 8461 §5: `testing` changes nothing for the mail.
#[test]
fn a_policy_in_testing_holds_nothing_back() {
    let Some(world) = World::new("mode: testing\nmx: *.other.test\nmax_age: 86400\n") else { return };
    let running = world.untrusted();
    running.inject(&["a@strict.test"], &message("strict"));
    assert_eq!(token(&world.sink.next().content), "strict");
    assert_eq!(world.web.requests().len(), 1, "it was asked for before the mail went");
}
