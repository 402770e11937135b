//! BOUNDED-MEMORY: what sessions are receiving takes only so much, however many they are.

use super::*;
use crate::limits::RECEIVING_BYTES_MAX;

const TOO_MUCH: &str = "452 4.3.1 too much is being received at once, try again later\r\n";

/// Each sends a part of a large message, and its end only when all have.
#[test]
fn large_messages_at_once_take_only_so_much_memory() {
    let mut world = World::new();
    let part = format!("{}\r\n", "y".repeat(78)).repeat(250_000);
    let sessions: Vec<SessionKey> =
        (0..RECEIVING_BYTES_MAX / part.len() as u64 + 10).map(|_| world.connect_client()).collect();
    for &session in &sessions {
        world.client_says(session, CLIENT);
        world.shard.session_received(world.now, session, b"Subject: x\r\n\r\n");
        world.shard.session_received(world.now, session, part.as_bytes());
        assert!(world.shard.receiving_bytes <= RECEIVING_BYTES_MAX);
    }
    // A small one goes on.
    let small = world.connect_client();
    world.client_says(small, CLIENT);
    world.client_says(small, CONTENT);
    world.sync();
    assert_eq!(world.to_client.matches("250 2.0.0 OK id=").count(), 1, "{}", world.to_client);
    world.to_client.clear();
    // One is gone, and what it held with it.
    let held = world.shard.receiving_bytes;
    world.shard.session_closed(sessions[0]);
    assert!(world.shard.receiving_bytes < held);
    let said: Vec<String> = sessions[1..].iter().map(|&session| world.client_says(session, ".\r\n")).collect();
    let refused = said.iter().filter(|said| *said == TOO_MUCH).count();
    // The others were received; this spool's segments are too small for them.
    let received = said.iter().filter(|said| said.starts_with("552 5.3.4 Message of 20000")).count();
    assert!(refused >= 10 && received >= 10, "{said:?}");
    assert_eq!(refused + received, said.len());
    assert_eq!(world.shard.receiving_bytes, 0);
    // And again, by BDAT.
    let session = world.connect_client();
    world.client_says(session, &CLIENT.replace("DATA\r\n", ""));
    world.shard.receiving_bytes = RECEIVING_BYTES_MAX;
    let (first, rest) = part.split_at(100_000);
    assert_eq!(world.client_says(session, &format!("BDAT {} LAST\r\n{first}", part.len())), "");
    assert_eq!(world.client_says(session, rest), TOO_MUCH);
    assert_eq!(world.shard.receiving_bytes, RECEIVING_BYTES_MAX);
}

/// In a small machine there is less of it, and what was received and is not in the spool yet takes it, too.
#[test]
fn what_waits_to_be_let_in_takes_of_the_same_memory() {
    let mut world = World::new();
    world.shard.memory = MemoryBounds::of(128 << 20, 2);
    let most = world.shard.memory.receiving_bytes;
    assert!(most < RECEIVING_BYTES_MAX / 16);
    let part = format!("{}\r\n", "y".repeat(78)).repeat(most as usize / 100);
    let session = world.connect_client();
    world.client_says(session, CLIENT);
    world.shard.held_bytes = most - (64 << 10);
    world.client_says(session, &format!("Subject: x\r\n\r\n{part}"));
    assert_eq!(world.client_says(session, ".\r\n"), TOO_MUCH);
    world.shard.held_bytes = 0;
    let session = world.connect_client();
    world.client_says(session, CLIENT);
    world.client_says(session, &format!("Subject: x\r\n\r\n{part}"));
    let said = world.client_says(session, ".\r\n");
    assert!(said.starts_with("552 5.3.4 "), "this spool's segments are too small for it: {said}");
    assert_eq!((world.shard.receiving_bytes, world.shard.held_bytes), (0, 0));
}
