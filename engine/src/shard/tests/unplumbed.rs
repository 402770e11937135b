//! A source whose address is gone: its mail goes by others, whenever its owner and its home learn of it.

use super::moving::config_with_sources;
use super::*;
use crate::shard::ConnectError;

fn world() -> World {
    World::open(TempDir::new().unwrap(), START, config_with_sources(2))
}

fn sources_of_entries(world: &World) -> Vec<usize> {
    let home = &world.shard.home;
    home.entries().map(|(key, _)| home.pair_of(key).expect("each stands at a pair").source).collect()
}

/// The ticket was on its way when the owner learned that the address is gone. It once made the owner connect again and
/// again, each time failing at once, so that nothing else had a turn.
#[test]
fn a_ticket_that_comes_after_the_address_is_gone_goes_home() {
    let mut world = world();
    (0..2).for_each(|_| accepted(&mut world));
    assert_eq!(world.connect_sources, [0, 1], "one by each, so the first source's turn is next");
    let session = world.connect_client();
    world.client_says(session, CLIENT);
    world.client_says(session, CONTENT);
    for (log, operation) in std::mem::take(&mut world.operations) {
        let completion = postrider_spool::execute(operation);
        world.shard.spool_completed(world.now, log, completion);
    }
    // The owner hears of it before the ticket, which the next turn makes, is there.
    world.shard.handle_message(ShardMessage::SourcePlumbed { source: 0, plumbed: false });
    world.sync();
    assert_eq!(sources_of_entries(&world), [1; 3], "all of it goes by the other source");
    assert!(world.connect_sources[1..].iter().all(|source| *source == 1), "{:?}", world.connect_sources);
    let (connection, _) = world.connects[0];
    world.shard.connect_failed(world.now, connection, &ConnectError::Unplumbed);
    world.pass(Duration::from_secs(60));
    assert!(world.connect_sources[1..].iter().all(|source| *source == 1), "{:?}", world.connect_sources);
}

/// Connections that were begun together fail one after the other; none of them is begun anew.
#[test]
fn what_waits_for_connections_that_fail_for_their_address_goes_by_another() {
    let mut world = world();
    (0..8).for_each(|_| accepted(&mut world));
    let begun: Vec<ConnectionKey> = world.connects.iter().map(|(connection, _)| *connection).collect();
    let sources = std::mem::take(&mut world.connect_sources);
    let gone = begun.into_iter().zip(sources).filter(|(_, source)| *source == 0).collect::<Vec<_>>();
    assert_eq!(gone.len(), 4);
    for (connection, _) in gone {
        world.shard.connect_failed(world.now, connection, &ConnectError::Unplumbed);
        world.sync();
        assert!(!world.connect_sources.contains(&0), "{:?}", world.connect_sources);
    }
    assert_eq!(sources_of_entries(&world), [1; 8]);
    assert!(world.shard.home.entries().all(|(_, entry)| entry.attempts == 0));
}
