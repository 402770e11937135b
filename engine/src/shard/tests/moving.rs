//! Mail that a peer refuses for the address it came from goes by another source of its pool.

use super::*;
use crate::config::{EgressPool, EgressSource};

/// Sources named "a", "b", …, all in the default pool.
pub(super) fn config_with_sources(count: u8) -> Config {
    let mut config = Config::new("mta.example");
    let source = |number: u8| EgressSource {
        name: char::from(b'a' + number).to_string(),
        source_address: Some(std::net::IpAddr::from([127, 0, 0, 11 + number])),
        ehlo_domain: "mta.example".to_owned(),
        suspend_when_unplumbed: true,
        is_retired: false,
    };
    config.egress_sources = (0..count).map(source).collect();
    let sources = (0..usize::from(count)).map(|source| (source, 1)).collect();
    config.egress_pools = vec![EgressPool { name: "default".to_owned(), sources }];
    config
}

const BLOCKED: &str = "554 5.7.1 Service unavailable; Client host [192.0.2.1] blocked using zen.spamhaus.org\r\n";

fn outcome_fates(world: &World) -> Vec<Fate> {
    let outcome = |event: &LoggedRecord| match &event.record {
        Logged::Outcome(outcome) => Some(outcome.results[0].fate),
        _ => None,
    };
    world.events.iter().filter_map(outcome).collect()
}

#[test]
fn a_refused_address_moves_the_message_inside_the_pool() {
    let mut world = World::open(TempDir::new().unwrap(), START, config_with_sources(2));
    accepted(&mut world);
    let first = world.accept_connection();
    world.peer_says(first, "250 peer.example\r\n");
    world.peer_says(first, BLOCKED);
    let now_ms = world.now.wall_ms;
    world.pass(Duration::from_secs(1));
    assert_eq!(outcome_fates(&world), [Fate::Deferred { due_ms: now_ms }], "no hard bounce");
    assert_eq!(world.connect_sources, [0, 1], "at once from the other source");

    let second = world.accept_connection();
    world.peer_says(second, "250 peer.example\r\n");
    world.peer_says(second, BLOCKED);
    world.sync();
    let (key, entry) = world.shard.home.entries().next().expect("it waits");
    assert_eq!(entry.attempts, 2);
    assert!(entry.due_ms > world.now.wall_ms + 60_000, "no third source: as [retry] says");
    assert_eq!(world.shard.home.state_name(key), "scheduled");
    assert_eq!(world.connect_sources.len(), 2);

    // Another message to the same domain: it goes all the same, since no address is better than the other.
    accepted(&mut world);
    assert_eq!(world.shard.home.len(), 2);
}

#[test]
fn what_comes_later_for_that_domain_avoids_the_refused_source() {
    let mut world = World::open(TempDir::new().unwrap(), START, config_with_sources(2));
    accepted(&mut world);
    let first = world.accept_connection();
    world.peer_says(first, "250 peer.example\r\n");
    world.peer_says(first, BLOCKED);
    world.sync();
    for _ in 0..6 {
        accepted(&mut world);
    }
    let pairs: Vec<usize> = world
        .shard
        .home
        .entries()
        .filter_map(|(key, _)| world.shard.home.pair_of(key))
        .map(|pair| pair.source)
        .collect();
    assert_eq!(pairs, [1; 7]);
}

#[test]
fn other_recipients_of_the_message_keep_their_own_fate() {
    let mut world = World::open(TempDir::new().unwrap(), START, config_with_sources(2));
    let session = world.connect_client();
    world.client_says(
        session,
        "EHLO client.example\r\nMAIL FROM:<a@client.example>\r\nRCPT TO:<b@peer.example>\r\nRCPT TO:<c@peer.example>\r\n\
         RCPT TO:<d@peer.example>\r\nDATA\r\n",
    );
    world.client_says(session, CONTENT);
    world.sync();
    let peer = world.accept_connection();
    world.peer_says(peer, "250-peer.example\r\n250 PIPELINING\r\n");
    world.peer_says(peer, &format!("250 ok\r\n{BLOCKED}450 4.2.1 not now\r\n550 5.1.1 unknown\r\n503 no\r\n"));
    world.sync();
    let mut entries: Vec<(Vec<u32>, bool)> = world
        .shard
        .home
        .entries()
        .map(|(_, entry)| (entry.recipients.collect(), entry.due_ms <= world.now.wall_ms))
        .collect();
    entries.sort();
    assert_eq!(entries, [(vec![0], true), (vec![1], false)], "one moves, one waits, one has bounced");
    assert_eq!(world.connect_sources, [0, 1]);
}

/// What goes by another source and what waits are two entries from then on, each with its own answer.
#[test]
fn each_part_keeps_the_answer_that_it_had() {
    let mut world = World::open(TempDir::new().unwrap(), START, config_with_sources(2));
    let session = world.connect_client();
    let two = "RCPT TO:<b@peer.example>\r\nRCPT TO:<c@peer.example>\r\n";
    world.client_says(session, &CLIENT.replace("RCPT TO:<b@peer.example>\r\n", two));
    world.client_says(session, CONTENT);
    world.sync();
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    for reply in ["250 ok\r\n", "450 4.2.0 greylisted\r\n", BLOCKED] {
        world.peer_says(peer, reply);
    }
    world.sync();
    let home = &world.shard.home;
    let mut answers: Vec<(Vec<u32>, bool)> = home
        .entries()
        .map(|(_, entry)| (entry.recipients.collect(), entry.last_answer.is_some_and(|it| it.contains("greylisted"))))
        .collect();
    answers.sort();
    assert_eq!(answers, [(vec![0], true), (vec![1], false)]);
}
