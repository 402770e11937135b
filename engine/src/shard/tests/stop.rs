//! An orderly stop: what is on the wire comes to its end, and what is idle is not waited for.

use super::*;
use crate::limits::{QUIT_PATIENCE_STOPPING, SWEEP_INTERVAL};

fn with_idle_connection() -> (World, ConnectionKey) {
    let mut world = World::new();
    let client = world.connect_client();
    world.client_says(client, CLIENT);
    world.client_says(client, CONTENT);
    world.sync();
    world.shard.session_closed(client);
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    world.take_message(peer);
    world.pass(Duration::from_millis(10));
    assert_eq!(world.fates(), [Fate::Delivered]);
    world.to_peer.clear();
    (world, peer)
}

/// They were waited for as long as the time limit of QUIT lets them, ten seconds.
#[test]
fn a_peer_that_does_not_answer_quit_is_soon_left() {
    let (mut world, peer) = with_idle_connection();
    world.shard.handle_message(ShardMessage::Stop);
    world.settle();
    assert_eq!((world.to_peer.as_str(), world.closed.as_slice()), ("QUIT\r\n", &[][..]));
    world.pass(QUIT_PATIENCE_STOPPING + SWEEP_INTERVAL);
    assert_eq!(world.closed, [peer]);
    world.shard.connection_gone(world.now, peer);
    world.pass(Duration::from_millis(1));
    assert!(world.shard.stopped);
}

#[test]
fn nor_is_one_that_was_asked_before_the_stop_waited_for_and_one_that_answers_is_heard() {
    for answers in [false, true] {
        let (mut world, peer) = with_idle_connection();
        world.pass(Config::new("mta.example").shaping.idle_timeout);
        world.pass(SWEEP_INTERVAL);
        assert_eq!((world.to_peer.as_str(), world.closed.as_slice()), ("QUIT\r\n", &[][..]));
        world.shard.handle_message(ShardMessage::Stop);
        world.settle();
        if answers {
            world.peer_says(peer, "221 bye\r\n");
            assert_eq!(world.closed, [peer]);
        }
        world.pass(QUIT_PATIENCE_STOPPING + SWEEP_INTERVAL);
        assert_eq!(world.closed, [peer]);
    }
}
