//! A disk that does not answer, and an event log that can't be written: who asks is told so in time, and nothing is
//! begun that could not be recorded.

use std::path::Path;

use postrider_spool::sim::{Faults, SimDisk};

use super::*;
use crate::limits::{COMMIT_PATIENCE, OUTCOME_COMMIT_DELAY, REOPEN_PAUSE_MAX, UNRECORDED_RETRY, WRITE_PATIENCE};

const REFUSED: &str = "452 4.3.1 Spool takes no mail now: the spool's disk does not keep up\r\n";

#[test]
fn no_mail_is_taken_until_the_disk_answers() {
    let mut world = World::new();
    let [first, second] = [world.connect_client(), world.connect_client()];
    world.client_says(first, CLIENT);
    assert_eq!(world.client_says(first, CONTENT), "");
    world.pass_unsynced(COMMIT_PATIENCE - Duration::from_secs(2));
    world.client_says(second, CLIENT);
    assert_eq!(world.client_says(second, CONTENT), "", "it waits, like the first");
    world.pass_unsynced(Duration::from_secs(3));
    assert_eq!(world.shard.metrics.spool_closed.get(), 1);
    let third = world.connect_client();
    world.client_says(third, CLIENT);
    assert_eq!(world.client_says(third, CONTENT), REFUSED);
    world.pass(Duration::from_secs(2));
    assert_eq!(world.to_client.matches("250 2.0.0 OK id=").count(), 2, "{}", world.to_client);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.shard.metrics.spool_closed.get(), 0);
    accepted(&mut world);
}

/// A liveness probe is told that no log works, but not of a disk that is only slow.
#[test]
fn a_log_that_takes_no_write_for_long_is_broken() {
    let mut world = World::new();
    let client = world.connect_client();
    world.client_says(client, CLIENT);
    world.client_says(client, CONTENT);
    world.pass_unsynced(WRITE_PATIENCE - Duration::from_secs(1));
    assert_eq!(world.shard.metrics.spool_broken.get(), 0);
    world.pass_unsynced(Duration::from_secs(1));
    assert_eq!(world.shard.metrics.spool_broken.get(), 1);
    world.pass(Duration::from_secs(1));
    world.pass(Duration::from_secs(1));
    assert_eq!(world.shard.metrics.spool_broken.get(), 0);
}

#[test]
fn nothing_is_begun_until_the_disk_answers() {
    let mut world = World::new();
    accepted(&mut world);
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    world.peer_says(peer, "450 4.2.0 later\r\n");
    world.pass(OUTCOME_COMMIT_DELAY);
    assert!(matches!(world.fates()[..], [Fate::Deferred { .. }]));
    world.shard.connection_closed(world.now, peer, "gone");
    world.shard.connection_gone(world.now, peer);
    let client = world.connect_client();
    world.client_says(client, &CLIENT.replace("peer.example", "other.example"));
    world.client_says(client, CONTENT);
    world.connects.clear();
    world.pass_unsynced(Duration::from_secs(7_200));
    assert!(world.connects.is_empty(), "what becomes of it can't be written");
    world.sync();
    world.pass(UNRECORDED_RETRY + Duration::from_secs(1));
    assert_eq!(world.connects.len(), 2, "the one that was due, and the one that was just taken");
}

/// Memory holds only so many events.
#[test]
fn nothing_is_begun_while_too_many_events_wait() {
    let mut world = World::new();
    world.shard.set_events_full(true);
    accepted(&mut world);
    world.pass(Duration::from_secs(7_200));
    assert!(world.connects.is_empty());
    let home = &world.shard.home;
    let waits =
        |key| home.blocked_by(key).is_some_and(|blocked| &*blocked.reason == "the event log can not be written");
    assert!(home.len() == 1 && home.entries().all(|(key, _)| waits(key)));
    world.shard.set_events_full(false);
    world.pass(UNRECORDED_RETRY + Duration::from_secs(1));
    assert_eq!(world.connects.len(), 1);
}

/// A write that fails at last is not waited for any more.
#[test]
fn a_commit_that_fails_late_is_over() {
    let disk = SimDisk::new(1);
    let spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), SpoolOptions::default()).unwrap();
    let mut world = World::open_spool(TempDir::new().unwrap(), spool, START, Config::new("mta.example"), &[]);
    world.sync();
    let client = world.connect_client();
    world.client_says(client, CLIENT);
    world.client_says(client, CONTENT);
    world.pass_unsynced(COMMIT_PATIENCE + Duration::from_secs(1));
    world.to_client.clear();
    disk.set_faults(Faults { operations_left: Some(0), ..Faults::default() });
    world.sync();
    disk.set_faults(Faults::default());
    assert_eq!(world.to_client, "451 4.3.0 Spool failed, try again later\r\n");
    world.pass(Duration::from_secs(10));
    accepted(&mut world);
}

/// A disk that is gone fails every write, at once. It was tried again as fast as that went: a core and a log file were
/// filled, and no stop came to its end, since an operation was always under way.
#[test]
fn a_disk_that_is_gone_is_tried_now_and_then() {
    let disk = SimDisk::new(1);
    let spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), SpoolOptions::default()).unwrap();
    let mut world = World::open_spool(TempDir::new().unwrap(), spool, START, Config::new("mta.example"), &[]);
    accepted(&mut world);
    let gone = Faults { operations_left: Some(0), ..Faults::default() };
    disk.set_faults(gone);
    let client = world.connect_client();
    world.client_says(client, CLIENT);
    world.client_says(client, CONTENT);
    let mut failures = 0;
    for _ in 0..600 {
        // Each is one failure: so many operations end at this time.
        for _ in 0..1_000 {
            world.settle();
            let operations = std::mem::take(&mut world.operations);
            if operations.is_empty() {
                break;
            }
            for (log, operation) in operations {
                failures += 1;
                disk.set_faults(gone);
                let completion = postrider_spool::execute(operation);
                world.shard.spool_completed(world.now, log, completion);
            }
        }
        world.pass_unsynced(Duration::from_millis(100));
    }
    assert!(failures < 60, "{failures} operations in a minute");
    assert_eq!(world.shard.metrics.spool_closed.get(), 1);
    assert_eq!(world.shard.metrics.spool_broken.get(), 1, "no log works, so the process is not alive");
    disk.set_faults(Faults::default());
    world.pass(REOPEN_PAUSE_MAX);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.shard.metrics.spool_closed.get(), 0);
    assert_eq!(world.shard.metrics.spool_broken.get(), 0);
    accepted(&mut world);
}

/// What is no want of space is not told as such.
#[test]
fn a_file_that_cannot_be_made_is_told_apart() {
    let disk = SimDisk::new(1);
    let spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), SpoolOptions::default()).unwrap();
    let broken = Faults { operations_left: Some(0), is_permanent: true, only: Some("checkpoint"), ..Faults::default() };
    disk.set_faults(broken);
    let mut world = World::open_spool(TempDir::new().unwrap(), spool, START, Config::new("mta.example"), &[]);
    world.pass(Duration::from_secs(5));
    let client = world.connect_client();
    world.client_says(client, CLIENT);
    let refused = "451 4.3.0 Spool takes no mail now: a file of the spool can't be made\r\n";
    assert_eq!(world.client_says(client, CONTENT), refused);
    world.pass(Duration::from_secs(1));
    let metrics = &world.shard.metrics;
    assert_eq!(metrics.spool_closed_reason().as_deref(), Some("a file of the spool can't be made"));
    assert_eq!(metrics.spool_files_not_made.get(), 1, "each cause counts once");
    disk.set_faults(Faults::default());
    world.pass(Duration::from_secs(3));
    world.pass(Duration::from_secs(1));
    assert_eq!(world.shard.metrics.spool_closed_reason(), None);
    accepted(&mut world);
}

/// What goes into a directory that somebody has moved away is durable, and no next start finds it.
#[test]
fn no_mail_is_taken_while_the_spool_is_gone() {
    let mut world = World::new();
    accepted(&mut world);
    world.shard.handle_message(ShardMessage::SpoolGone { gone: true });
    let client = world.connect_client();
    world.client_says(client, CLIENT);
    let refused = "452 4.3.1 Spool takes no mail now: the spool's directory is no longer in its place\r\n";
    assert_eq!(world.client_says(client, CONTENT), refused);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.shard.metrics.spool_closed.get(), 1);
    let peer = world.accept_connection();
    world.peer_says(peer, "250 peer.example\r\n");
    world.take_message(peer);
    world.pass(OUTCOME_COMMIT_DELAY);
    assert_eq!(world.fates(), [Fate::Delivered], "what was taken goes out");
    world.shard.handle_message(ShardMessage::SpoolGone { gone: false });
    accepted(&mut world);
}
