//! `in_doubt = "hold"`: what may have been taken is not sent again, whatever happens in between.

use super::*;
use crate::admin::MessageState;
use crate::config::{InDoubt, RetrySchedule};
use crate::outcome::event::{EventKind, EventRecord, NodeId, events};

fn config() -> Config {
    let mut config = Config::new("mta.example");
    config.shaping.connection_limit = 1;
    config.shaping.in_doubt = InDoubt::Hold;
    config
}

fn world() -> World {
    World::open(TempDir::new().unwrap(), START, config())
}

const PIPELINING: &str = "250-peer.example\r\n250-CHUNKING\r\n250 PIPELINING\r\n";

/// The peer takes the envelope. Returns what it is sent before anything more is durable.
fn take_envelope(world: &mut World, peer: ConnectionKey) -> String {
    world.peer_says(peer, "250 ok\r\n250 ok\r\n354 go\r\n")
}

/// What the event log tells of attempts, in the order of the records.
fn told(world: &World) -> Vec<EventKind> {
    let node = NodeId([0; 16]);
    let kinds =
        world.events.iter().flat_map(|record| events(record, &node).map(|event| EventRecord::new(&event, b"").kind));
    kinds.filter(|kind| *kind != EventKind::Reception).collect()
}

fn rows(world: &mut World) -> Vec<MessageRow> {
    world.ask(MessageFilter { limit: 10, ..MessageFilter::default() });
    world.sync();
    world.rows.take().expect("the question is answered")
}

/// As after a kill: what was not written is gone.
fn restart(world: World) -> World {
    let World { directory, now, shard, _spool, .. } = world;
    drop((shard, _spool));
    World::open(directory, now, config())
}

#[test]
fn the_final_dot_waits_for_the_intents_commit() {
    let mut world = world();
    (0..2).for_each(|_| accepted(&mut world));
    let peer = world.accept_connection();
    world.peer_says(peer, PIPELINING);
    let said = take_envelope(&mut world, peer);
    assert!(said.ends_with("\r\nHello\r\n"), "all but the dot: {said}");
    assert!(!world.operations.is_empty(), "the intent's commit was begun at once");
    assert_eq!(told(&world), []);
    world.to_peer.clear();
    world.sync();
    assert_eq!(world.to_peer, format!(".\r\nRSET\r\n{ENVELOPE}DATA\r\n"), "and what rides goes with it");
    world.peer_says(peer, "250 taken\r\n250 reset\r\n250 ok\r\n250 ok\r\n");
    assert_eq!(world.peer_says(peer, "354 go\r\n").matches("\r\n.\r\n").count(), 0);
    world.sync();
    assert_eq!(world.peer_says(peer, "451 4.2.0 not now\r\n"), "");
    world.pass(Duration::from_secs(1));
    assert_eq!(told(&world), [EventKind::Delivery, EventKind::TransientFailure], "no event tells of an intent");
    let entries: Vec<_> = world.shard.home.entries().map(|(_, entry)| (entry.attempts, entry.is_held())).collect();
    assert_eq!(entries, [(1, false)], "what the peer put off is tried again");
}

/// The reply never came: held, told to the operator, and ended by its expiry with that mark. A restart changes nothing.
#[test]
fn what_is_in_doubt_is_held_until_it_expires() {
    let mut world = world();
    accepted(&mut world);
    let peer = world.accept_connection();
    world.peer_says(peer, PIPELINING);
    take_envelope(&mut world, peer);
    world.sync();
    world.shard.connection_closed(world.now, peer, "reset");
    world.settle();
    world.shard.connection_gone(world.now, peer);
    world.pass(Duration::from_secs(1));
    assert_eq!(told(&world), [EventKind::TransientFailure]);
    assert_eq!(world.shard.metrics.possible_duplicates.get(), 0);

    let mut world = restart(world);
    let rows = rows(&mut world);
    let [row] = &rows[..] else { panic!("{rows:?}") };
    assert_eq!((row.state, row.num_attempts, row.due), (MessageState::Held, 1, Some(row.expires)));
    assert!(row.blocked_by.as_ref().is_some_and(|why| why.starts_with("held: it may have been delivered")), "{row:?}");
    assert!(row.last_answer.as_ref().is_some_and(|last| last.contains("in doubt: ")), "{row:?}");
    world.events.clear();
    ends_as_in_doubt(&mut world, row.expires.0);
}

fn ends_as_in_doubt(world: &mut World, expires_ms: u64) {
    world.connects.clear();
    world.pass(Duration::from_millis(expires_ms - world.now.wall_ms - 1));
    assert_eq!((told(world), world.shard.home.len()), (vec![], 1), "not before its time");
    (0..2).for_each(|_| world.pass(Duration::from_secs(1)));
    assert_eq!((told(world), world.shard.home.len()), (vec![EventKind::Expiration], 0));
    assert!(world.connects.is_empty(), "it is never sent again");
    let Some(Logged::Outcome(outcome)) = world.events.last().map(|event| &event.record) else { panic!("an outcome") };
    let [result] = &outcome.results[..] else { panic!("{outcome:?}") };
    assert_eq!((result.recipient.as_str(), result.attempts), ("b@peer.example", 1));
    assert!(result.answer.text.contains("in doubt: "), "{result:?}");
}

/// The engine dies between the last octet and the reply. What it finds then is all that the intent's record says.
#[test]
fn a_crash_behind_the_final_dot_holds_the_message() {
    for is_answered in [false, true] {
        let mut world = world();
        accepted(&mut world);
        let peer = world.accept_connection();
        world.peer_says(peer, PIPELINING);
        take_envelope(&mut world, peer);
        world.sync();
        assert!(world.to_peer.ends_with(".\r\n"));
        if is_answered {
            // The outcome waits for a commit that never comes.
            world.peer_says(peer, "250 taken\r\n");
        }
        let mut world = restart(world);
        world.events.clear();
        world.pass(Duration::from_secs(10));
        let rows = rows(&mut world);
        let [row] = &rows[..] else { panic!("{rows:?}") };
        assert_eq!((row.state, row.num_attempts), (MessageState::Held, 1));
        let last = row.last_answer.as_deref();
        assert!(last.is_some_and(|last| last.starts_with("in doubt: the engine ended while 127.0.0.1 was")), "{row:?}");
        ends_as_in_doubt(&mut world, row.expires.0);
    }
}

/// Before the intent is durable the peer can't have the message, so that a crash leaves it as it was.
#[test]
fn a_crash_before_the_intents_commit_leaves_the_message_as_it_was() {
    let mut world = world();
    accepted(&mut world);
    let peer = world.accept_connection();
    world.peer_says(peer, PIPELINING);
    take_envelope(&mut world, peer);
    assert!(!world.to_peer.ends_with("\r\n.\r\n"));
    let mut world = restart(world);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.connects.len(), 1);
    assert!(world.shard.home.entries().all(|(_, entry)| entry.attempts == 0));
}

/// A transaction that ended before its intent was durable must not end the content of the next one by it.
#[test]
fn a_late_intent_ends_nobody_elses_content() {
    let mut config = config();
    config.retry.schedule = RetrySchedule::Listed(vec![Duration::from_secs(1)]);
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    (0..2).for_each(|_| accepted(&mut world));
    let peer = world.accept_connection();
    world.peer_says(peer, PIPELINING);
    take_envelope(&mut world, peer);
    let first = std::mem::take(&mut world.operations);
    world.shard.connection_closed(world.now, peer, "reset");
    world.shard.connection_gone(world.now, peer);
    world.pass_unsynced(Duration::from_secs(4));
    let peer = world.accept_connection();
    world.peer_says(peer, PIPELINING);
    let said = take_envelope(&mut world, peer);
    assert!(said.ends_with("\r\nHello\r\n"), "{said}");
    world.to_peer.clear();
    for (log, operation) in first {
        let completion = postrider_spool::execute(operation);
        world.shard.spool_completed(world.now, log, completion);
    }
    world.settle();
    assert_eq!(world.to_peer, "", "the first one's commit is not the second one's");
    world.sync();
    assert_eq!(world.to_peer.matches(".\r\n").count(), 1, "{}", world.to_peer);
}
