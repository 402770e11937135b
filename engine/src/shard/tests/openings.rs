//! When connections are begun: not while the shard is behind, and not without sockets.

use super::*;
use crate::deliver::verdict::SESSION_RULES;
use crate::limits::{HOST_BACK_OFF_FIRST_MAX, PORT_PAUSE, SWEEP_INTERVAL, TURN_INPUTS};
use crate::shard::ConnectError;

/// Of the hundred that the shard may have; a quarter is for sessions.
const SOCKETS_OUT: usize = 75;

fn world() -> World {
    let route = |domain: &str, to: &str| {
        let domain = DomainPattern::Exact(domain.to_owned());
        let to = vec![RouteTarget::Address(to.parse().unwrap())];
        Route { tls: Some(TlsMode::Disabled), ..Route::new(domain, to) }
    };
    let mut config = Config::new("mta.example");
    config.shaping.connection_limit = 80;
    config.routes = vec![route("peer.example", "127.0.0.1:25"), route("other.example", "127.0.0.2:25")];
    World::open(TempDir::new().unwrap(), START, config)
}

fn send(world: &mut World, session: SessionKey, domain: &str) {
    world.client_says(session, &CLIENT.replace("peer.example", domain));
    world.client_says(session, CONTENT);
    world.sync();
}

#[test]
fn the_longest_idle_connection_makes_room_for_a_pair_that_has_none() {
    let mut world = world();
    let session = world.connect_client();
    for _ in 0..SOCKETS_OUT + 3 {
        send(&mut world, session, "peer.example");
    }
    assert_eq!(world.connects.len(), SOCKETS_OUT);
    world.connects.reverse();
    let mut connections = Vec::new();
    while !world.connects.is_empty() {
        connections.push(world.accept_connection());
    }
    for connection in &connections {
        assert!(world.peer_says(*connection, "250 peer.example\r\n").contains("MAIL FROM"));
    }
    for connection in &connections {
        world.pass(Duration::from_millis(10));
        while world.take_message(*connection).contains("MAIL FROM") {}
    }
    world.pass(Duration::from_millis(10));
    assert_eq!(world.outcomes(), SOCKETS_OUT + 3);
    assert_eq!(world.closed, []);

    world.to_peer.clear();
    send(&mut world, session, "other.example");
    assert!(world.connects.is_empty(), "there is no socket for it");
    world.pass(Duration::from_millis(10)); // The next turn.
    assert_eq!(world.to_peer, "QUIT\r\n", "one is asked to go");
    assert_eq!(world.peer_says(connections[0], "221 bye\r\n"), "");
    assert_eq!(world.closed, connections[..1]);
    world.shard.connection_gone(world.now, connections[0]);
    world.settle();
    let (_, to) = world.connects.pop().expect("its socket serves the other");
    assert_eq!(to.to_string(), "127.0.0.2:25");
    assert_eq!(world.closed, connections[..1], "one was enough");
}

#[test]
fn a_shard_that_is_behind_opens_no_further_connections_until_it_has_caught_up() {
    let mut world = world();
    let session = world.connect_client();
    send(&mut world, session, "peer.example");
    let first = world.accept_connection();
    world.client_says(session, CLIENT);
    world.client_says(session, CONTENT);
    let operations = std::mem::take(&mut world.operations);
    for (log, operation) in operations {
        let completion = postrider_spool::execute(operation);
        world.shard.spool_completed(world.now, log, completion);
    }
    for _ in 0..TURN_INPUTS {
        world.shard.connection_received(world.now, first, b"250-X\r\n");
    }
    world.shard.turn(world.now);
    while let Some(action) = world.shard.poll_action() {
        world.carry_out(action);
    }
    assert!(world.connects.is_empty() && world.shard.has_more());
    world.settle();
    assert_eq!(world.connects.len(), 1, "nothing more has come since");
}

/// The process has fewer descriptors than was thought: that is nobody's fault but its own.
#[test]
fn without_a_descriptor_no_host_is_blamed_and_the_mail_goes_later() {
    let mut world = world();
    let session = world.connect_client();
    send(&mut world, session, "peer.example");
    let (connection, _) = world.connects.pop().unwrap();
    world.shard.connect_failed(world.now, connection, &ConnectError::NoSocket);
    world.settle();
    assert!(world.connects.is_empty(), "it is not tried again and again");
    world.pass(SWEEP_INTERVAL);
    let connection = world.accept_connection();
    world.peer_says(connection, "250 peer.example\r\n");
    world.take_message(connection);
    world.pass(Duration::from_millis(10));
    assert_eq!(world.fates(), [Fate::Delivered]);
}

/// So long as all its ports are in use the source can't ask the host, which has no part in that: it is tried again in a
/// moment. Once the host was left alone for longer and longer.
#[test]
fn without_a_port_the_mail_goes_a_moment_later() {
    let mut world = world();
    let session = world.connect_client();
    send(&mut world, session, "peer.example");
    for _ in 0..6 {
        let (connection, _) = world.connects.pop().unwrap();
        world.shard.connect_failed(world.now, connection, &ConnectError::NoPort);
        world.settle();
        assert!(world.connects.is_empty(), "not at once");
        world.pass(PORT_PAUSE + SWEEP_INTERVAL);
        assert_eq!(world.connects.len(), 1);
    }
    let failures = &world.shard.metrics.session_failures;
    let counted = SESSION_RULES.iter().zip(failures).find(|(rule, _)| rule.name == "no_port").unwrap();
    assert_eq!(counted.1.get(), 6);
    let connection = world.accept_connection();
    world.peer_says(connection, "250 peer.example\r\n");
    world.take_message(connection);
    world.pass(Duration::from_millis(10));
    assert_eq!(world.fates(), [Fate::Delivered]);
}

/// Many connections fail together, one finds out whether the host is back, and then all that are wanted are begun.
#[test]
fn a_host_that_was_away_is_tried_by_one_connection_first() {
    let mut world = world();
    let session = world.connect_client();
    for _ in 0..5 {
        send(&mut world, session, "peer.example");
    }
    let refused = ConnectError::Failed(std::io::ErrorKind::ConnectionRefused.into());
    assert_eq!(world.connects.len(), 5);
    for (connection, _) in std::mem::take(&mut world.connects) {
        world.shard.connect_failed(world.now, connection, &refused);
    }
    world.pass(HOST_BACK_OFF_FIRST_MAX - Duration::from_secs(1));
    assert!(world.connects.is_empty());
    world.pass(Duration::from_secs(1));
    world.pass(SWEEP_INTERVAL);
    assert_eq!(world.connects.len(), 1, "it was one failure");
    let (connection, _) = world.connects.pop().unwrap();
    world.shard.connect_failed(world.now, connection, &ConnectError::NoSocket);
    world.pass(SWEEP_INTERVAL);
    assert_eq!(world.connects.len(), 1, "the host had no part in that");
    let connection = world.accept_connection();
    assert!(world.connects.is_empty());
    world.peer_says(connection, "250 peer.example\r\n");
    assert_eq!(world.connects.len(), 4, "it is back");
}
