//! When a commit begins: at once for one who is alone, a moment later where several come back together; for outcomes,
//! which nobody waits for, when they are many or a while has gone by.

use super::*;
use crate::limits::{COMMIT_GATHER, OUTCOME_COMMIT_DELAY, OUTCOMES_GATHERED_MAX};

/// Sends a message on each of these sessions, up to the commit.
fn send(world: &mut World, sessions: &[SessionKey]) {
    for session in sessions {
        world.client_says(*session, CLIENT);
    }
    for session in sessions {
        world.shard.session_received(world.now, *session, CONTENT.as_bytes());
    }
    world.settle();
}

fn is_committing(world: &World) -> bool {
    world.shard.logs[0].log.is_committing()
}

#[test]
fn behind_a_shared_commit_the_next_gathers_for_a_moment() {
    let mut world = World::new();
    let sessions = [world.connect_client(), world.connect_client()];
    send(&mut world, &sessions);
    assert!(is_committing(&world), "both go with one commit, at once");
    world.sync();
    send(&mut world, &sessions[..1]);
    assert!(!is_committing(&world));
    assert_eq!(world.shard.next_timeout(world.now), world.now.monotonic + COMMIT_GATHER);
    world.pass_unsynced(COMMIT_GATHER / 2);
    send(&mut world, &sessions[1..]);
    assert!(!is_committing(&world));
    world.pass_unsynced(COMMIT_GATHER / 2);
    assert!(is_committing(&world), "both again");
}

#[test]
fn who_is_alone_waits_for_nobody() {
    let mut world = World::new();
    let session = world.connect_client();
    for _ in 0..3 {
        send(&mut world, &[session]);
        assert!(is_committing(&world));
        world.sync();
    }
}

/// A world in which so many messages were delivered just now, all over one connection.
fn delivered(messages: usize) -> World {
    let mut config = Config::new("mta.example");
    config.shaping.connection_limit = 1;
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    for _ in 0..messages {
        accepted(&mut world);
    }
    world.operations.clear();
    let peer = world.accept_connection();
    let mut said = world.peer_says(peer, "250 peer.example\r\n");
    for _ in 0..messages {
        assert!(said.starts_with("MAIL"), "{said}");
        said = world.take_message(peer);
    }
    world
}

#[test]
fn a_lone_outcome_waits_for_others_but_not_for_long() {
    let mut world = delivered(1);
    assert!(world.operations.is_empty(), "it is not written at once");
    let deadline = world.shard.next_timeout(world.now);
    assert!(deadline <= world.now.monotonic + OUTCOME_COMMIT_DELAY, "and nobody has to come for it to be written");
    world.pass(OUTCOME_COMMIT_DELAY);
    assert_eq!(world.outcomes(), 1);
    assert!(world.shard.is_committed());
}

/// A crash repeats the deliveries whose outcomes are not written: so many of a log at most, at any rate.
#[test]
fn so_many_outcomes_wait_no_longer() {
    let mut world = delivered(OUTCOMES_GATHERED_MAX - 1);
    assert!(world.operations.is_empty());
    drop(world);
    world = delivered(OUTCOMES_GATHERED_MAX);
    assert!(!world.operations.is_empty(), "no time has gone by");
    world.sync();
    assert_eq!(world.outcomes(), OUTCOMES_GATHERED_MAX);
}

#[test]
fn outcomes_ride_with_a_messages_commit() {
    let mut world = delivered(3);
    assert_eq!(world.outcomes(), 0);
    accepted_for(&mut world, "other.example");
    assert_eq!(world.outcomes(), 3, "no time has gone by");
}
