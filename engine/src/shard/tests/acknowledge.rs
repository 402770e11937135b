//! What comes in pieces is acknowledged at once where more is to come, and only there: it costs a packet.

use super::*;
use crate::limits::{OUTCOME_COMMIT_DELAY, SMALL_INPUT_BYTES};

/// How many acknowledgements were asked for since this was asked last.
fn acknowledged(world: &mut World) -> usize {
    std::mem::take(&mut world.acknowledged)
}

#[test]
fn a_peer_that_says_one_reply_at_a_time_is_told_to_go_on() {
    let mut world = World::new();
    accepted(&mut world);
    accepted(&mut world);
    let peer = world.accept_connection();
    assert!(world.peer_says(peer, "250-peer.example\r\n250 PIPELINING\r\n").contains("DATA\r\n"));
    assert_eq!(acknowledged(&mut world), 0, "the commands acknowledge what they answer");
    world.peer_says(peer, "250 sender ok\r\n");
    world.peer_says(peer, "250 recipient ok\r\n");
    assert_eq!(acknowledged(&mut world), 2);
    assert!(world.peer_says(peer, "354 go\r\n").contains("RSET\r\nMAIL FROM"), "the next rides behind the content");
    assert_eq!(acknowledged(&mut world), 0);
    world.peer_says(peer, "250 ta");
    world.peer_says(peer, "ken\r\n");
    assert_eq!(acknowledged(&mut world), 2, "four replies are still to come");
    world.peer_says(peer, "250 reset\r\n250 sender ok\r\n250 recipient ok\r\n354 go\r\n");
    world.peer_says(peer, "250 taken\r\n");
    assert_eq!(acknowledged(&mut world), 0, "nothing is to come");
    world.pass(OUTCOME_COMMIT_DELAY);
    assert_eq!(world.outcomes(), 2);
}

#[test]
fn a_client_that_writes_line_by_line_is_told_to_go_on() {
    let mut world = World::new();
    let session = world.connect_client();
    world.client_says(session, CLIENT);
    assert_eq!(acknowledged(&mut world), 0, "the replies acknowledge what they answer");
    world.client_says(session, "Subject: x\r\n");
    world.client_says(session, "\r\n");
    assert_eq!(acknowledged(&mut world), 2);
    world.client_says(session, &"x\r\n".repeat(SMALL_INPUT_BYTES));
    assert_eq!(acknowledged(&mut world), 0, "the kernel acknowledges so much by itself");
    world.client_says(session, ".\r\n");
    assert_eq!(acknowledged(&mut world), 0, "its reply comes with the commit");
    world.sync();
    world.client_says(session, "NO");
    assert_eq!(acknowledged(&mut world), 1);
    assert_eq!(world.client_says(session, "OP\r\n"), "250 2.0.0 OK\r\n");
    assert_eq!(acknowledged(&mut world), 0);
}
