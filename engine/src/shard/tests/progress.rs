//! What is noted for the next start: the message in hand, what went out unrecorded; and what a start holds for it.

use postrider_spool::record::MessageId;

use super::*;
use crate::admin::{MailChoice, MessageState};
use crate::config::InDoubt;
use crate::limits::UNCLEAN_STARTS_MAX;
use crate::progress::Progress;

const PIPELINING: &str = "250-peer.example\r\n250 PIPELINING\r\n";

fn unrecorded(world: &World) -> u64 {
    assert_eq!(world.shard.progress.working_on(), None, "between two inputs no message is worked on");
    Progress::unrecorded([&**world.shard.progress])
}

/// A world whose peer has just been sent a whole message.
fn sent(in_doubt: InDoubt) -> (World, ConnectionKey) {
    let mut config = Config::new("mta.example");
    config.shaping.connection_limit = 1;
    config.shaping.in_doubt = in_doubt;
    let mut world = World::open(TempDir::new().unwrap(), START, config);
    accepted(&mut world);
    let peer = world.accept_connection();
    world.peer_says(peer, PIPELINING);
    assert_eq!(unrecorded(&world), 0, "an envelope alone delivers nothing");
    world.peer_says(peer, "250 ok\r\n250 ok\r\n354 go\r\n");
    world.sync();
    (world, peer)
}

/// A crash may repeat a delivery only while its outcome is not committed, and that is counted.
#[test]
fn what_went_out_counts_until_its_outcome_is_durable() {
    let (mut world, peer) = sent(InDoubt::Retry);
    assert_eq!(unrecorded(&world), 1);
    world.peer_says(peer, "250 taken\r\n");
    assert_eq!(unrecorded(&world), 1, "the outcome is not durable yet");
    world.pass(Duration::from_secs(1));
    assert_eq!((world.outcomes(), unrecorded(&world)), (1, 0));
}

#[test]
fn what_is_held_when_in_doubt_is_no_duplicate() {
    let (mut world, peer) = sent(InDoubt::Hold);
    assert!(world.to_peer.ends_with(".\r\n"));
    assert_eq!(unrecorded(&world), 0);
    world.peer_says(peer, "250 taken\r\n");
    world.pass(Duration::from_secs(1));
    assert_eq!(unrecorded(&world), 0);
}

#[test]
fn a_lost_reply_ends_the_count_with_its_outcome() {
    let (mut world, peer) = sent(InDoubt::Retry);
    world.shard.connection_closed(world.now, peer, "reset");
    world.settle();
    assert_eq!(unrecorded(&world), 1);
    world.shard.connection_gone(world.now, peer);
    world.pass(Duration::from_secs(1));
    assert_eq!((world.outcomes(), unrecorded(&world)), (1, 0));
}

/// RFC 5321 §4.2.1: after a 421 in place of the final reply nothing was taken, and the message goes at once again.
#[test]
fn what_goes_on_at_once_is_not_counted_twice() {
    let (mut world, peer) = sent(InDoubt::Retry);
    world.peer_says(peer, "421 4.3.2 going down\r\n");
    world.pass(Duration::from_secs(1));
    assert_eq!(unrecorded(&world), 0);
}

fn rows(world: &mut World) -> Vec<MessageRow> {
    world.ask(MessageFilter { limit: 10, ..MessageFilter::default() });
    world.sync();
    world.rows.take().expect("the question is answered")
}

fn restart(world: World, quarantined: &[Suspect]) -> World {
    let World { directory, now, shard, _spool, .. } = world;
    drop((shard, _spool));
    World::open_after(directory, now, Config::new("mta.example"), 1 << 20, quarantined)
}

fn suspect(message: MessageId, starts: u64) -> Suspect {
    Suspect { message, starts }
}

/// The engine would die of it for ever: it is held, the rest goes, and so it stays until an operator says otherwise.
#[test]
fn a_message_that_the_engine_dies_of_is_held() {
    let mut world = World::new();
    accepted(&mut world);
    let poison = world.shard.home.entries().next().map(|(_, entry)| entry.message).unwrap();
    accepted(&mut world);
    let mut world = restart(world, &[suspect(poison, UNCLEAN_STARTS_MAX)]);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.shard.metrics.quarantined_messages.get(), 1);
    let held = |rows: &[MessageRow]| {
        let held: Vec<_> = rows.iter().filter(|row| row.state == MessageState::Held).cloned().collect();
        let [row] = &held[..] else { panic!("{rows:?}") };
        row.clone()
    };
    let row = held(&rows(&mut world));
    assert_eq!((row.id, row.num_attempts), (poison.to_string(), 1));
    assert!(row.blocked_by.is_some_and(|why| why.starts_with("held: the engine died")), "{:?}", row.last_answer);
    let peer = world.accept_connection();
    world.peer_says(peer, PIPELINING);
    world.peer_says(peer, "250 ok\r\n250 ok\r\n354 go\r\n");
    assert!(!world.peer_says(peer, "250 taken\r\n").contains("MAIL"), "the other is all that goes");
    world.pass(Duration::from_secs(1));

    // It is found once more, and held already: nothing is added to its record.
    let mut world = restart(world, &[suspect(poison, UNCLEAN_STARTS_MAX)]);
    world.pass(Duration::from_secs(1));
    assert_eq!((world.shard.metrics.quarantined_messages.get(), world.shard.metrics.transient_failures.get()), (0, 0));
    assert_eq!(held(&rows(&mut world)).num_attempts, 1);

    // Nothing of it is remembered but by its record.
    let mut world = restart(world, &[]);
    world.pass(Duration::from_secs(100));
    assert_eq!(held(&rows(&mut world)).id, poison.to_string());
    assert!(world.connects.is_empty());
    world.shard.release_chosen(world.now, &MailChoice::default(), "mended");
    world.pass(Duration::from_secs(1));
    assert_eq!(world.connects.len(), 1, "released, it is tried");
}

/// It died even while it was about to hold it: now the message is not touched at all.
#[test]
fn a_message_that_cannot_even_be_held_is_left_in_the_spool() {
    let mut world = World::new();
    accepted(&mut world);
    let poison = world.shard.home.entries().next().map(|(_, entry)| entry.message).unwrap();
    let mut world = restart(world, &[suspect(poison, UNCLEAN_STARTS_MAX + 1)]);
    world.pass(Duration::from_secs(100));
    assert_eq!((world.shard.home.len(), world.connects.len()), (0, 0));
    let mut world = restart(world, &[]);
    world.pass(Duration::from_secs(1));
    assert_eq!((world.shard.home.len(), world.connects.len()), (1, 1), "it is still there");
}
