//! Delivery by MX lookup. The port of an MX host is always 25, so the sinks have loopback addresses of their own.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};

use postrider::admin::MessageRow;
use postrider::config::Config;
use postrider::outcome::event::EventKind;

use crate::support::dns_server::{DnsServer, Entry};
use crate::support::embedded::{Running, config};
use crate::support::sink::{Sink, Verb};
use crate::support::{message, token};

/// A sink at port 25 of some loopback address; none where this user may not have such a port.
fn sink_at_port_25() -> Option<(Sink, [u8; 4])> {
    loop {
        let address = [127, fastrand::u8(1..255), fastrand::u8(..), fastrand::u8(1..255)];
        match Sink::try_start_at(SocketAddr::from((Ipv4Addr::from(address), 25))) {
            Ok(sink) => return Some((sink, address)),
            Err(error) if error.kind() == ErrorKind::AddrInUse => {}
            Err(error) => {
                eprintln!("skipped: a sink at port 25 of {address:?}: {error}");
                return None;
            }
        }
    }
}

fn engine(directory: &tempfile::TempDir, zone: &[(&str, Entry)]) -> (Running, DnsServer) {
    let server = DnsServer::start(zone);
    let mut config = config(directory.path());
    config.dns.servers = vec![server.address()];
    config.dns.prohibited_hosts.clear();
    (Running::start(config), server)
}

/// d.test has two hosts, the first preferred.
fn two_hosts(first: [u8; 4], second: [u8; 4]) -> [(&'static str, Entry); 4] {
    [
        ("d.test", Entry::Mx(20, "mx2.d.test")),
        ("d.test", Entry::Mx(10, "mx1.d.test")),
        ("mx1.d.test", Entry::A(first)),
        ("mx2.d.test", Entry::A(second)),
    ]
}

#[test]
fn the_preferred_host_gets_the_mail_and_the_next_one_when_it_is_down() {
    let directory = tempfile::tempdir().unwrap();
    let Some((first, first_address)) = sink_at_port_25() else { return };
    let Some((second, second_address)) = sink_at_port_25() else { return };
    let zone = two_hosts(first_address, second_address);
    let (mut running, server) = engine(&directory, &zone);
    running.inject(&["a@d.test"], &message("preferred"));
    assert_eq!(token(&first.next().content), "preferred");
    let delivery = running.event(EventKind::Delivery);
    assert_eq!((delivery.attempts, &*delivery.site), (1, "mx1.d.test,mx2.d.test"));
    assert!(server.questions("d.test", "MX") >= 1);

    first.always(Verb::Connect, "421 4.3.2 Closing down");
    running.shutdown();
    let (mut running, _server) = engine(&directory, &zone);
    running.inject(&["a@d.test"], &message("next"));
    assert_eq!(token(&second.next().content), "next", "RFC 5321 §5.1: the next host in order");
    let delivery = running.event(EventKind::Delivery);
    assert_eq!(delivery.attempts, 1, "the host that was down counts no attempt");
    assert!(first.taken_so_far().is_empty());
}

/// RFC 5321 §5.1: another address is tried, though the first host answers each time.
#[test]
fn the_next_host_gets_what_the_preferred_one_has_no_room_for() {
    let directory = tempfile::tempdir().unwrap();
    let Some((first, first_address)) = sink_at_port_25() else { return };
    let Some((second, second_address)) = sink_at_port_25() else { return };
    let zone = two_hosts(first_address, second_address);
    first.always(Verb::Mail, "452 4.3.1 Insufficient system storage");
    let (mut running, _server) = engine(&directory, &zone);
    running.inject(&["a@d.test"], &message("no room"));
    assert_eq!(token(&second.next().content), "no room");
    let delivery = running.event(EventKind::Delivery);
    assert_eq!(delivery.attempts, 2);
}

/// RFC 5321 §5.1: no MX record, but an address.
#[test]
fn the_implicit_mx() {
    let directory = tempfile::tempdir().unwrap();
    let Some((sink, address)) = sink_at_port_25() else { return };
    let (running, _server) = engine(&directory, &[("d.test", Entry::A(address))]);
    running.inject(&["a@d.test"], &message("implicit"));
    assert_eq!(token(&sink.next().content), "implicit");
}

#[test]
fn a_domain_that_does_not_exist_bounces() {
    let directory = tempfile::tempdir().unwrap();
    let (mut running, _server) = engine(&directory, &[("other.test", Entry::A([192, 0, 2, 1]))]);
    running.inject(&["a@nowhere.test"], &message("nowhere"));
    let bounce = running.event_where("final", |event| event.kind.is_final());
    assert_eq!((bounce.kind, bounce.enhanced), (EventKind::Bounce, Some((5, 1, 2))), "{}", bounce.to_json());
}

/// A name server's failure says nothing about the domain: the mail waits, without an attempt, and goes afterwards.
#[test]
fn a_failing_name_server_defers() {
    let directory = tempfile::tempdir().unwrap();
    let Some((sink, address)) = sink_at_port_25() else { return };
    let (mut running, server) = engine(&directory, &[("d.test", Entry::ServFail)]);
    running.inject(&["a@d.test"], &message("deferred"));
    // Before the answer it waits for that, and nobody knows how long.
    let is_blocked = |row: &MessageRow| row.blocked_by.as_deref().is_some_and(|why| why.contains("next try"));
    let rows = running.rows_when("blocked", |rows| rows.iter().any(is_blocked));
    assert_eq!((rows.len(), rows[0].num_attempts), (1, 0));
    server.set_zone(&[("d.test", Entry::A(address))]);
    assert_eq!(token(&sink.next().content), "deferred");
    assert_eq!(running.event(EventKind::Delivery).attempts, 1);
}

/// `[shaping."a.test"]` holds for every domain with a.test's MX set, also before any mail for a.test was seen.
#[test]
fn a_domains_shaping_holds_for_its_whole_site() {
    let directory = tempfile::tempdir().unwrap();
    let Some((shaped, shaped_address)) = sink_at_port_25() else { return };
    let Some((other, other_address)) = sink_at_port_25() else { return };
    let zone = [
        ("a.test", Entry::Mx(10, "mx.a.test")),
        ("b.test", Entry::Mx(20, "mx.a.test")),
        ("c.test", Entry::Mx(10, "mx.c.test")),
        ("mx.a.test", Entry::A(shaped_address)),
        ("mx.c.test", Entry::A(other_address)),
    ];
    let server = DnsServer::start(&zone);
    let rules = "[shaping.\"a.test\"]\nmax_recipients_per_batch = 1\n[spool]\nallow_filesystem = true\n";
    let mut config = config(directory.path());
    config.shaping_rules = Config::from_toml(rules, "rules.toml", directory.path()).unwrap().shaping_rules;
    config.dns.servers = vec![server.address()];
    config.dns.prohibited_hosts.clear();
    let running = Running::start(config);
    running.inject(&["x@b.test", "y@b.test", "z@b.test"], &message("shaped"));
    running.inject(&["x@c.test", "y@c.test", "z@c.test"], &message("other"));
    let mut recipients: Vec<Vec<String>> = shaped.take(3).into_iter().map(|it| it.recipients).collect();
    recipients.sort();
    assert_eq!(recipients, [["x@b.test"], ["y@b.test"], ["z@b.test"]]);
    assert_eq!(other.next().recipients.len(), 3);
    assert_eq!(running.shutdown().iter().filter(|event| event.kind == EventKind::Delivery).count(), 6);
}

/// INTERFACE `prohibited_hosts`: loopback is never connected to by MX.
#[test]
fn a_prohibited_host_bounces() {
    let directory = tempfile::tempdir().unwrap();
    let server = DnsServer::start(&[("d.test", Entry::A([127, 0, 0, 1]))]);
    let mut config = config(directory.path());
    config.dns.servers = vec![server.address()];
    let mut running = Running::start(config);
    running.inject(&["a@d.test"], &message("prohibited"));
    let bounce = running.event_where("final", |event| event.kind.is_final());
    assert_eq!((bounce.kind, bounce.enhanced), (EventKind::Bounce, Some((5, 4, 4))), "{}", bounce.to_json());
}
