//! The scrub reads live messages again and again, and tells what is not as it was written.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use postrider_spool::sim::SimDisk;
use postrider_spool::{
    Envelope, Fetch, Log, MessageId, Progress, ReadError, Recipient, RecoverOptions, Spool, SpoolOptions, execute,
};

fn open(disk: &SimDisk) -> (Spool, Log) {
    let options = SpoolOptions { segment_bytes: 1 << 20, ..SpoolOptions::default() };
    let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), options).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let log = Log::recover(directory, RecoverOptions { seed: 1, ..RecoverOptions::default() }, &mut |_| {}).unwrap();
    (spool, log)
}

/// Lets the log do what it does by itself until `end`, and returns the messages that it found damaged.
fn run(log: &mut Log, now: &mut Duration, end: Duration) -> BTreeSet<MessageId> {
    let mut damaged = BTreeSet::new();
    while *now < end {
        while let Some(operation) = log.poll_operation(*now, &mut ()) {
            match log.handle_completion(*now, execute(operation)) {
                Progress::Damaged { id, .. } => _ = damaged.insert(id),
                Progress::Failed { error } => panic!("{error}"),
                _ => {}
            }
        }
        *now = log.next_timeout().unwrap_or(end).max(*now + Duration::from_millis(1));
    }
    damaged
}

fn append(log: &mut Log, bytes: usize) -> MessageId {
    let recipients = vec![Recipient { address: "b@example.net".into() }];
    let envelope = Envelope { recipients, ..Envelope::default() };
    log.append_message(&envelope, b"", &vec![b'x'; bytes]).unwrap().0
}

#[test]
fn damage_is_told_before_the_message_is_wanted() {
    let disk = SimDisk::new(1);
    let (_spool, mut log) = open(&disk);
    let ids: Vec<MessageId> = (0..40).map(|_| append(&mut log, 10_000)).collect();
    let mut now = Duration::ZERO;
    assert_eq!(run(&mut log, &mut now, Duration::from_secs(60)), BTreeSet::new());
    assert_eq!(log.statistics().messages_scrubbed, 40, "each once, and then it rests");

    let path = Path::new("/spool/log-0000/segment-0000");
    let mut bytes = disk.bytes(path);
    let at = bytes.windows(9_000).position(|bytes| bytes == [b'x'; 9_000]).unwrap();
    bytes[at + 5_000] ^= 4;
    disk.set_bytes(path, bytes);
    assert_eq!(run(&mut log, &mut now, Duration::from_secs(2 * 3_600)), BTreeSet::from([ids[0]]));
    assert!(log.is_live(ids[0]), "it stays for the operator");
}

/// What is read counts until its last piece is gone: more than so much is not read.
#[test]
fn messages_in_memory_are_bounded() {
    let disk = SimDisk::new(1);
    let options = SpoolOptions { segment_bytes: 128 << 20, ..SpoolOptions::default() };
    let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), options).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let options = RecoverOptions { seed: 1, ..RecoverOptions::default() };
    let mut log = Log::recover(directory, options, &mut |_| {}).unwrap();
    let mut now = Duration::ZERO;
    let ids: Vec<MessageId> = (0..4).map(|_| append(&mut log, 25 << 20)).collect();
    run(&mut log, &mut now, Duration::from_secs(1));
    let read = |log: &mut Log, id| {
        let Fetch::Read(operation) = log.message(id)? else { panic!("the disk has no map") };
        let Progress::Read { result, .. } = log.handle_completion(Duration::ZERO, execute(operation)) else { panic!() };
        result
    };
    let mut held = Vec::new();
    for round in 0..10 {
        held.push(read(&mut log, ids[round % 4]).unwrap().body_piece());
    }
    assert_eq!(read(&mut log, ids[0]).unwrap_err(), ReadError::Busy);
    held.pop();
    held.push(read(&mut log, ids[0]).unwrap().body_piece());
    assert_eq!(read(&mut log, ids[1]).unwrap_err(), ReadError::Busy);
    assert!(held.iter().all(|piece| piece.len() == 25 << 20));
}
