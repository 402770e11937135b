//! Messages that find no room in the spool because it is being made ready.

use super::*;
use crate::limits::UNPLACED_PATIENCE;

/// A segment takes a while to be made ready: whoever fills them faster waits, and is not told that there is no room.
#[test]
fn mail_waits_for_room_that_is_being_made() {
    let mut world = World::open_with(TempDir::new().unwrap(), START, Config::new("mta.example"), 32 << 10);
    let sessions: Vec<SessionKey> = (0..12).map(|_| world.connect_client()).collect();
    let content = format!("Subject: x\r\n\r\n{}.\r\n", format!("{}\r\n", "y".repeat(78)).repeat(250));
    let mut told = String::new();
    for &session in &sessions {
        world.client_says(session, CLIENT);
        told += &world.client_says(session, &content);
    }
    assert_eq!(told, "", "each waits, be it for its commit");
    world.pass_unsynced(Duration::from_secs(2));
    assert_eq!((&*world.to_client, world.shard.metrics.spool_closed.get()), ("", 0), "and mail is taken");
    // One gives up; it will send its message again.
    world.shard.session_closed(sessions[11]);
    for _ in 0..100 {
        world.pass(Duration::from_millis(100));
    }
    assert_eq!(world.to_client.matches("250 2.0.0 OK id=").count(), 11, "{}", world.to_client);
    assert_eq!(world.to_client.matches("\r\n").count(), 11);
    assert_eq!(world.shard.metrics.received_smtp.get(), 11);
}

/// Room that came is for who waits, also where somebody else's message ends before the next turn.
#[test]
fn who_comes_later_does_not_get_the_room_that_others_wait_for() {
    let mut world = World::open_with(TempDir::new().unwrap(), START, Config::new("mta.example"), 32 << 10);
    let content = format!("Subject: x\r\n\r\n{}.\r\n", format!("{}\r\n", "y".repeat(78)).repeat(250));
    let mut early = Vec::new();
    for _ in 0..12 {
        early.push(world.connect_client());
        world.client_says(early[early.len() - 1], CLIENT);
        world.client_says(early[early.len() - 1], &content);
    }
    let late: Vec<SessionKey> = (0..12).map(|_| world.connect_client()).collect();
    for &session in &late {
        world.client_says(session, CLIENT);
    }
    world.to_client.clear();
    let (mut answered, mut still_to_come) = (Vec::new(), late.iter());
    for _ in 0..200 {
        world.now.monotonic += Duration::from_millis(10);
        // The shard hears what the disk has done, and a client, before it takes its turn.
        for (log, operation) in std::mem::take(&mut world.operations) {
            let completion = postrider_spool::execute(operation);
            world.shard.spool_completed(world.now, log, completion);
        }
        if let Some(&session) = still_to_come.next() {
            world.shard.session_received(world.now, session, content.as_bytes());
        }
        world.shard.turn(world.now);
        while let Some(action) = world.shard.poll_action() {
            match action {
                Action::SessionSend { session, .. } => answered.push(session),
                other => world.carry_out(other),
            }
        }
    }
    assert_eq!(answered, [early, late].concat());
}

/// With the engine's end, and after its time, it is refused as it would have been.
#[test]
fn mail_waits_for_room_no_longer_than_it_may() {
    let content = format!("Subject: x\r\n\r\n{}.\r\n", format!("{}\r\n", "y".repeat(78)).repeat(250));
    let full = |world: &mut World| {
        for _ in 0..12 {
            let session = world.connect_client();
            world.client_says(session, CLIENT);
            assert_eq!(world.client_says(session, &content), "");
        }
        world.to_client.clear();
    };
    let open = || World::open_with(TempDir::new().unwrap(), START, Config::new("mta.example"), 32 << 10);
    let mut world = open();
    full(&mut world);
    // A disk that does nothing at all is another matter: what it is to write is not given up.
    world.pass_unsynced(UNPLACED_PATIENCE);
    assert!(world.to_client.contains("452 4.3.1 Spool takes no mail now: room in the spool is being made ready\r\n"));
    let mut world = open();
    full(&mut world);
    world.shard.handle_message(ShardMessage::Stop);
    world.settle();
    assert!(world.to_client.contains("451 4.3.2 System is shutting down\r\n"), "{}", world.to_client);
}
