//! Shared bodies: stored once, there for as long as a live message names them or their owner holds them, and gone after
//! that, with the segment that they were in.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use postrider_spool::record::Answer;
use postrider_spool::sim::{Faults, SimDisk};
use postrider_spool::{
    AppendError, BodyId, Envelope, Fate, Fetch, Log, MessageId, Outcome, Progress, ReadError, Recipient,
    RecipientResult, RecordRef, RecoverOptions, Recovered, Sequence, Spool, SpoolOptions, execute,
};

const SEGMENT_BYTES: u64 = 64 << 10;

fn open(disk: &SimDisk) -> (Spool, Log, BTreeMap<MessageId, Vec<u8>>) {
    let options = SpoolOptions { segment_bytes: SEGMENT_BYTES, hot_bytes: 0, ..SpoolOptions::default() };
    let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), options).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let mut bodies = BTreeMap::new();
    let recover = RecoverOptions { seed: 1, event_cursor: Sequence(u64::MAX), ..RecoverOptions::default() };
    let log = Log::recover(directory, recover, &mut |recovered| match recovered {
        Recovered::Message { id, message, .. } => assert!(bodies.insert(id, message.body().to_vec()).is_none()),
        other => panic!("{other:?}"),
    })
    .unwrap();
    (spool, log, bodies)
}

fn settle(log: &mut Log, now: Duration) {
    while let Some(operation) = log.poll_operation(now, &mut ()) {
        let progress = log.handle_completion(now, execute(operation));
        assert!(!matches!(progress, Progress::Failed { .. }));
    }
}

fn envelope() -> Envelope {
    Envelope { recipients: vec![Recipient::default()], ..Envelope::default() }
}

fn share(log: &mut Log, body: BodyId) -> MessageId {
    log.append_message_sharing(&envelope(), b"P", body).unwrap().0
}

fn deliver(log: &mut Log, id: MessageId) {
    let result = RecipientResult {
        index: 0,
        recipient: String::new(),
        queue: String::new(),
        fate: Fate::Delivered,
        attempts: 1,
        answer: Answer::default(),
    };
    let outcome = Outcome { message: id.to_raw(), results: vec![result], ..Outcome::default() };
    log.append_outcome(&outcome).unwrap();
}

/// Mail that comes and goes, until everything that can be used again was.
fn churn(log: &mut Log, now: &mut Duration) {
    for _ in 0..60 {
        if let Ok((id, _)) = log.append_message(&envelope(), b"", &[b'x'; 12_000]) {
            deliver(log, id);
        }
        settle(log, *now);
        *now += Duration::from_millis(60);
    }
}

fn read(log: &mut Log, id: MessageId) -> Vec<u8> {
    let mut operation = match log.message(id).unwrap() {
        Fetch::Ready(message) => return message.body().to_vec(),
        Fetch::Read(operation) => operation,
    };
    // First the message's record, then the body's.
    loop {
        match log.handle_completion(Duration::ZERO, execute(operation)) {
            Progress::Read { result, .. } => return result.unwrap().body().to_vec(),
            Progress::Nothing => operation = log.poll_operation(Duration::ZERO, &mut ()).unwrap(),
            other => panic!("{other:?}"),
        }
    }
}

/// How often the octets are in the segments.
fn copies_of(disk: &SimDisk, octets: &[u8]) -> usize {
    let segments = disk.paths().into_iter().filter(|path| path.to_str().unwrap().contains("segment-"));
    segments.map(|path| disk.bytes(&path).windows(octets.len()).filter(|window| *window == octets).count()).sum()
}

/// Recognised wherever it is.
fn content(fill: u8) -> Vec<u8> {
    let mut content = vec![fill; 9_000];
    content[0] = b'<';
    content
}

#[test]
fn a_body_goes_with_the_last_that_needs_it() {
    let disk = SimDisk::new(1);
    let (spool, mut log, _) = open(&disk);
    let mut now = Duration::ZERO;
    let (held, _) = log.append_body(&content(1)).unwrap();
    let (shared, _) = log.append_body(&content(2)).unwrap();
    let ids: Vec<MessageId> = (0..5).map(|_| share(&mut log, shared)).collect();
    settle(&mut log, now);
    assert_eq!((copies_of(&disk, &content(1)), copies_of(&disk, &content(2))), (1, 1));
    log.release_body(shared);
    for id in &ids[..4] {
        deliver(&mut log, *id);
        churn(&mut log, &mut now);
        assert_eq!(read(&mut log, ids[4]), content(2));
        assert!(copies_of(&disk, &content(1)) > 0, "its owner holds it");
    }
    // As long as one message is live, another may name it, too.
    let last = share(&mut log, shared);
    deliver(&mut log, ids[4]);
    churn(&mut log, &mut now);
    assert_eq!(read(&mut log, last), content(2));
    deliver(&mut log, last);
    settle(&mut log, now);
    let refusal = log.append_message_sharing(&envelope(), b"", shared);
    assert_eq!(refusal.unwrap_err(), AppendError::UnknownBody);
    churn(&mut log, &mut now);
    assert_eq!(log.statistics().live_bytes, 64 + 9_008, "only the other one counts");
    let late = share(&mut log, held);
    settle(&mut log, now);
    log.release_body(held);
    churn(&mut log, &mut now);
    assert_eq!(read(&mut log, late), content(1));
    drop((spool, log));
    assert_eq!(open(&disk.restart()).2, BTreeMap::from([(late, content(1))]));
}

/// A start counts anew who names a body, from a checkpoint and what came after it. What was only held is gone.
#[test]
fn a_start_counts_again() {
    for rounds in 0..3 {
        let disk = SimDisk::new(1);
        let (spool, mut log, _) = open(&disk);
        let mut now = Duration::ZERO;
        let (held, _) = log.append_body(&content(1)).unwrap();
        let (shared, _) = log.append_body(&content(2)).unwrap();
        let mut ids: Vec<MessageId> = (0..6).map(|_| share(&mut log, shared)).collect();
        settle(&mut log, now);
        // In the replay only; or in the checkpoint, where some end behind it.
        for _ in 0..rounds {
            churn(&mut log, &mut now);
        }
        for id in ids.drain(..3) {
            deliver(&mut log, id);
        }
        settle(&mut log, now);
        drop((spool, log));
        let disk = disk.restart();
        let (spool, mut log, found) = open(&disk);
        assert_eq!(found, ids.iter().map(|id| (*id, content(2))).collect());
        let refusal = log.append_message_sharing(&envelope(), b"", held);
        assert_eq!(refusal.unwrap_err(), AppendError::UnknownBody);
        ids.push(share(&mut log, shared));
        settle(&mut log, now);
        while let Some(id) = ids.pop() {
            assert_eq!(read(&mut log, id), content(2));
            churn(&mut log, &mut now);
            assert_eq!(read(&mut log, id), content(2));
            deliver(&mut log, id);
            settle(&mut log, now);
        }
        churn(&mut log, &mut now);
        churn(&mut log, &mut now);
        assert_eq!((copies_of(&disk, &content(1)), copies_of(&disk, &content(2))), (0, 0), "{rounds}");
        assert_eq!(log.statistics().live_bytes, 0);
        drop((spool, log));
        assert_eq!(open(&disk.restart()).2, BTreeMap::new());
    }
}

/// A commit that failed takes back who names a body, and a body that came with it.
#[test]
fn a_failed_commit_is_not_counted() {
    let disk = SimDisk::new(1);
    let (_spool, mut log, _) = open(&disk);
    let mut now = Duration::ZERO;
    let (body, _) = log.append_body(&content(1)).unwrap();
    let first = share(&mut log, body);
    settle(&mut log, now);
    log.release_body(body);
    for round in 0..3 {
        // One message ends, and others begin with the same body and with one that was never there.
        let (other, _) = log.append_body(&content(2)).unwrap();
        share(&mut log, other);
        share(&mut log, body);
        deliver(&mut log, first);
        if round == 1 {
            log.release_body(other);
        }
        disk.set_faults(Faults { operations_left: Some(0), ..Faults::default() });
        let operation = log.poll_operation(now, &mut ()).unwrap();
        assert!(matches!(log.handle_completion(now, execute(operation)), Progress::Failed { .. }));
        log.begin_reopen();
        settle(&mut log, now);
        let refusal = log.append_message_sharing(&envelope(), b"", other);
        assert_eq!(refusal.unwrap_err(), AppendError::UnknownBody);
        churn(&mut log, &mut now);
        assert_eq!(read(&mut log, first), content(1));
    }
    deliver(&mut log, first);
    churn(&mut log, &mut now);
    assert_eq!(copies_of(&disk, &content(1)), 0);
    assert_eq!(log.statistics().live_bytes, 0);
}

/// The last message's end is not durable when the owner lets go of the body, an earlier commit completes, and then the
/// one with that end fails: the message lives on, and so must the body. It was forgotten with the earlier commit.
#[test]
fn a_body_that_is_let_go_waits_for_the_last_end_to_be_durable() {
    let disk = SimDisk::new(1);
    let (spool, mut log, _) = open(&disk);
    let mut now = Duration::ZERO;
    let (body, _) = log.append_body(&content(1)).unwrap();
    let message = share(&mut log, body);
    settle(&mut log, now);
    log.append_message(&envelope(), b"", b"another").unwrap();
    let earlier = log.poll_awaited(now).unwrap();
    deliver(&mut log, message);
    log.release_body(body);
    assert!(matches!(log.handle_completion(now, execute(earlier)), Progress::Durable(_)));
    disk.set_faults(Faults { operations_left: Some(0), ..Faults::default() });
    let end = log.poll_awaited(now).unwrap();
    assert!(matches!(log.handle_completion(now, execute(end)), Progress::Failed { .. }));
    log.begin_reopen();
    settle(&mut log, now);
    churn(&mut log, &mut now);
    assert_eq!(read(&mut log, message), content(1));
    drop((spool, log));
    assert_eq!(open(&disk.restart()).2[&message], content(1));
}

/// A body that does not fit into the rest of a segment goes into the next one, and its messages with it or elsewhere.
#[test]
fn a_body_may_fill_a_segment() {
    let disk = SimDisk::new(1);
    let (spool, mut log, _) = open(&disk);
    let mut now = Duration::ZERO;
    let mut expected = BTreeMap::new();
    for (round, bytes) in [30_000, 50_000, SEGMENT_BYTES as usize - 4_096 - 128, 1, 0].into_iter().enumerate() {
        let fill = vec![round as u8; bytes];
        let (body, _) = log.append_body(&fill).unwrap();
        for _ in 0..2 {
            settle(&mut log, now);
            now += Duration::from_millis(60);
            settle(&mut log, now);
            expected.insert(share(&mut log, body), fill.clone());
        }
        settle(&mut log, now);
    }
    let refusal = log.append_body(&vec![0; SEGMENT_BYTES as usize - 4_096 - 127]);
    assert!(matches!(refusal, Err(AppendError::TooLarge { .. })));
    drop((spool, log));
    assert_eq!(open(&disk.restart()).2, expected);
}

/// Each octet of a shared body is checked before it is given to anybody: by a read, and by a start.
#[test]
fn a_damaged_body_is_told() {
    let disk = SimDisk::new(1);
    let (spool, mut log, _) = open(&disk);
    let (body, _) = log.append_body(&content(1)).unwrap();
    let id = share(&mut log, body);
    settle(&mut log, Duration::ZERO);
    log.append_message(&envelope(), b"", b"What is damaged in the last commit was never finished.").unwrap();
    settle(&mut log, Duration::ZERO);
    assert_eq!(read(&mut log, id), content(1));
    let segment = disk.paths().into_iter().find(|path| path.to_str().unwrap().ends_with("segment-0000")).unwrap();
    let mut bytes = disk.bytes(&segment);
    let at = bytes.windows(9_000).position(|window| window == content(1)).unwrap();
    bytes[at + 5_000] ^= 1;
    disk.set_bytes(&segment, bytes);

    let Ok(Fetch::Read(mut operation)) = log.message(id) else { panic!() };
    let result = loop {
        match log.handle_completion(Duration::ZERO, execute(operation)) {
            Progress::Read { result, .. } => break result,
            _ => operation = log.poll_operation(Duration::ZERO, &mut ()).unwrap(),
        }
    };
    assert!(matches!(result, Err(ReadError::Damaged { .. })), "{result:?}");
    drop((spool, log));

    let mut spool = Spool::open_on(Arc::new(disk), Path::new("/spool"), SpoolOptions::default()).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let recover = RecoverOptions { seed: 2, event_cursor: Sequence(u64::MAX), ..RecoverOptions::default() };
    let (mut told, mut quarantined) = (Vec::new(), 0);
    Log::recover(directory, recover, &mut |recovered| match recovered {
        Recovered::Message { id, .. } => told.push(id),
        Recovered::Quarantined(_) => quarantined += 1,
        _ => {}
    })
    .unwrap();
    assert!(quarantined > 0 && told.len() == 1 && told[0] != id, "{told:?} {quarantined}");
}

/// The event of a message is told again with its size, though the body is gone that nobody needs any more.
#[test]
fn a_message_whose_body_is_gone_keeps_its_size() {
    let disk = SimDisk::new(1);
    let (spool, mut log, _) = open_behind(&disk, Sequence(0));
    let mut now = Duration::ZERO;
    let (body, _) = log.append_body(&content(1)).unwrap();
    churn(&mut log, &mut now);
    let id = share(&mut log, body);
    let told = Sequence(id.sequence().0 - 1);
    log.set_event_cursor(told);
    deliver(&mut log, id);
    log.release_body(body);
    churn(&mut log, &mut now);
    assert_eq!(copies_of(&disk, &content(1)), 0, "it is gone");
    drop((spool, log));
    let (_, _, sizes) = open_behind(&disk.restart(), told);
    assert_eq!(sizes.get(&id), Some(&(1 + content(1).len() as u64)));
}

/// With the sizes of the messages whose events are still to be told.
fn open_behind(disk: &SimDisk, event_cursor: Sequence) -> (Spool, Log, BTreeMap<MessageId, u64>) {
    let options = SpoolOptions { segment_bytes: SEGMENT_BYTES, hot_bytes: 0, ..SpoolOptions::default() };
    let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), options).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let mut sizes = BTreeMap::new();
    let recover = RecoverOptions { seed: 1, event_cursor, ..RecoverOptions::default() };
    let log = Log::recover(directory, recover, &mut |recovered| {
        if let Recovered::Record { record: RecordRef::Message { id, size, .. }, .. } = recovered {
            assert!(sizes.insert(id, size).is_none());
        }
    })
    .unwrap();
    (spool, log, sizes)
}
