//! Three egress sources with weights 1, 2, 5: who connects, under which name, and how the mail is split.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use crate::support::client::Client;
use crate::support::process::{Postrider, to_sink};
use crate::support::sink::Sink;
use crate::support::{http, message, poll};
use crate::tools;

const CLIENTS: usize = 4;

/// The addresses of the loopback network need no setting up; 192.0.2.0/24 is on no machine (RFC 5737).
const PLUMBED: [&str; 3] = ["127.0.0.11", "127.0.0.12", "127.0.0.13"];
const NOT_PLUMBED: &str = "192.0.2.1";

#[test]
fn mail_is_split_by_weight() {
    shares(PLUMBED, [1, 2, 5]);
}

/// The share of a source whose address is gone goes to the others, by their weights.
#[test]
fn a_missing_address_leaves_its_share_to_the_others() {
    shares([PLUMBED[0], PLUMBED[1], NOT_PLUMBED], [1, 2, 0]);
    shares([NOT_PLUMBED, PLUMBED[1], PLUMBED[2]], [0, 2, 5]);
}

fn shares(addresses: [&str; 3], expected: [usize; 3]) {
    let count = tools::messages().next_multiple_of(CLIENTS);
    let directory = tempfile::tempdir().unwrap();
    let sink = Sink::start();
    let mut config = to_sink(sink.address());
    for (name, address) in ["a", "b", "c"].iter().zip(addresses) {
        config += &format!(
            "[[egress_source]]\nname = \"{name}\"\nsource_address = \"{address}\"\nehlo_domain = \"{name}.mta.test\"\n"
        );
    }
    let sources = "{ source = \"a\", weight = 1 }, { source = \"b\", weight = 2 }, { source = \"c\", weight = 5 }";
    config += &format!("[[egress_pool]]\nname = \"default\"\nsources = [{sources}]\n");
    let postrider = Postrider::start(directory.path(), &config);
    send(postrider.smtp(), count);

    let delivered = sink.take(count);
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for it in &delivered {
        let address = it.peer.ip().to_string();
        let place = addresses.iter().position(|source| *source == address).expect("one of the sources' addresses");
        assert_eq!(it.ehlo, format!("{}.mta.test", ["a", "b", "c"][place]), "the source's EHLO name");
        *seen.entry(address).or_default() += 1;
    }
    println!("{count} messages by source: {seen:?}");
    let total: usize = expected.iter().sum();
    for (address, weight) in addresses.iter().zip(expected) {
        let got = seen.get(*address).copied().unwrap_or_default() as f64 / count as f64;
        let wanted = weight as f64 / total as f64;
        assert!((got - wanted).abs() <= 0.02, "{address}: {got:.3} of the mail, {wanted:.3} by weight; {seen:?}");
    }
    let left = || http::messages(postrider.http(), "recipient=a@sink.test");
    poll("nothing is left", || left().is_empty().then_some(()));
    postrider.terminate();
    assert!(sink.taken_so_far().is_empty(), "each message arrived once");
}

fn send(smtp: SocketAddr, count: usize) {
    let each = count / CLIENTS;
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(move || {
                let mut client = Client::ready(smtp).unwrap();
                for _ in 0..each {
                    client.submit("sender@sender.test", &["a@sink.test"], &message("shares")).unwrap();
                }
            });
        }
    });
}
