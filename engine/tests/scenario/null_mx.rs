//! A domain that says it takes no mail (RFC 7505 §4.1): the message bounces at once, without an attempt.

use postrider::outcome::event::EventKind;

use crate::support::dns_server::{DnsServer, Entry};
use crate::support::embedded::{Running, config};
use crate::support::message;

#[test]
fn a_null_mx_bounces() {
    let directory = tempfile::tempdir().unwrap();
    let server = DnsServer::start(&[("d.test", Entry::NullMx), ("d.test", Entry::A([127, 0, 0, 1]))]);
    let mut config = config(directory.path());
    config.dns.servers = vec![server.address()];
    config.dns.prohibited_hosts.clear();
    let mut running = Running::start(config);
    let id = running.inject(&["a@d.test", "b@d.test"], &message("null"));
    for event in running.finals(2) {
        assert_eq!((event.kind, event.message.to_string()), (EventKind::Bounce, id.clone()));
        assert_eq!((event.enhanced, event.attempts), (Some((5, 1, 10)), 0), "{}", event.to_json());
    }
    assert!(running.rows().is_empty());
    assert!(running.shutdown().is_empty(), "one record each");
}
