//! When a commit begins: at once for one who is alone, a moment later where several come back together.

use super::*;
use crate::limits::COMMIT_GATHER;

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
