//! Logs and shards: whose log is whose when the number of shards changes, who may have them open, and what is refused.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use postrider_spool::record::Answer;
use postrider_spool::sim::SimDisk;
use postrider_spool::{
    Envelope, Fate, Fetch, Log, LogId, MessageId, OpenError, Outcome, Progress, ReadError, Recipient, RecipientResult,
    RecoverError, RecoverOptions, Recovered, Sequence, Spool, SpoolOptions, Storage as _, execute,
};

const PATH: &str = "/spool";

fn options() -> SpoolOptions {
    SpoolOptions { segment_bytes: 32 << 10, ..SpoolOptions::default() }
}

fn settle(log: &mut Log) {
    while let Some(operation) = log.poll_operation(Duration::ZERO, &mut ()) {
        log.handle_completion(Duration::ZERO, execute(operation));
    }
}

fn delivered(id: MessageId) -> Outcome {
    let result = RecipientResult {
        index: 0,
        recipient: String::new(),
        queue: String::new(),
        fate: Fate::Delivered,
        attempts: 1,
        answer: Answer::default(),
    };
    Outcome { message: id.to_raw(), results: vec![result], ..Outcome::default() }
}

/// 1 → 4 → 2 → 3 → 1 shards with traffic between: nothing is lost, nothing comes twice, no log id comes again.
#[test]
fn the_number_of_shards_may_change() {
    let disk = SimDisk::new(1);
    let mut live = BTreeSet::new();
    let mut removed = BTreeSet::new();
    for (round, shards) in [1, 4, 2, 3, 1, 4].into_iter().enumerate() {
        let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new(PATH), options()).unwrap();
        let assigned = spool.assign(shards).unwrap();
        assert_eq!(assigned.len(), shards);
        let mut found = BTreeSet::new();
        for (shard, directories) in assigned.into_iter().enumerate() {
            assert!(directories[0].is_active());
            for (position, directory) in directories.into_iter().enumerate() {
                assert_eq!(usize::from(directory.id().0) % shards, shard);
                assert_eq!(directory.is_active(), position == 0);
                assert!(!removed.contains(&directory.id()));
                let recover = RecoverOptions {
                    seed: round as u64,
                    event_cursor: Sequence(u64::MAX),
                    ..RecoverOptions::default()
                };
                let mut log = Log::recover(directory, recover, &mut |recovered| match recovered {
                    Recovered::Message { id, .. } => assert!(found.insert(id)),
                    other => panic!("{other:?}"),
                })
                .unwrap();
                let mine: Vec<MessageId> = found.iter().copied().filter(|id| id.log() == log.id()).collect();
                if log.is_open_for_mail().is_ok() {
                    for _ in 0..5 {
                        let recipients = vec![Recipient::default()];
                        let envelope = Envelope { recipients, ..Envelope::default() };
                        live.insert(log.append_message(&envelope, b"", b"x").unwrap().0);
                    }
                }
                // Some are delivered; a log that drains empties in the third round.
                let done = if position > 0 && round > 2 { mine.len() } else { mine.len() / 2 };
                for id in &mine[..done] {
                    log.append_outcome(&delivered(*id)).unwrap();
                    assert!(live.remove(id));
                    assert!(found.remove(id));
                }
                settle(&mut log);
                if log.is_drained() {
                    removed.insert(log.id());
                    log.remove().unwrap();
                }
            }
        }
        // What was found is what had been there before this round, less what was delivered in it.
        assert!(found.is_subset(&live), "{found:?} {live:?}");
        assert_eq!(live.len() - found.len(), shards * 5);
    }
    assert!(!removed.is_empty());
}

#[test]
fn a_spool_is_open_once() {
    let directory = tempfile::tempdir().unwrap();
    let mut spool = Spool::open(directory.path(), options()).unwrap();
    let refusal = Spool::open(directory.path(), options()).err().unwrap();
    assert!(matches!(refusal, OpenError::Locked { .. }));
    let holder = format!("in use by process {}", std::process::id());
    assert!(refusal.to_string().contains(&holder), "{refusal}");
    let logs = spool.assign(2).unwrap();
    assert!(matches!(spool.assign(2), Err(OpenError::Locked { .. })));
    drop(spool);
    assert!(matches!(Spool::open(directory.path(), options()), Err(OpenError::Locked { .. })), "logs are still out");
    drop(logs);
    Spool::open(directory.path(), options()).unwrap();
}

#[test]
fn a_newer_format_is_refused_by_name() {
    let disk = SimDisk::new(1);
    let open = |disk: &SimDisk| Spool::open_on(Arc::new(disk.clone()), Path::new(PATH), options());
    {
        let mut spool = open(&disk).unwrap();
        let directory = spool.assign(1).unwrap().remove(0).remove(0);
        let recover = RecoverOptions { seed: 1, event_cursor: Sequence(0), ..RecoverOptions::default() };
        let mut log = Log::recover(directory, recover, &mut |_| {}).unwrap();
        let recipients = vec![Recipient::default()];
        log.append_message(&Envelope { recipients, ..Envelope::default() }, b"", b"x").unwrap();
        settle(&mut log);
    }
    let segment = Path::new("/spool/log-0000/segment-0000");
    let good = disk.bytes(segment);
    let mut newer = good.clone();
    newer[12..14].copy_from_slice(&9_u16.to_le_bytes());
    disk.set_bytes(segment, newer);
    let error = {
        let directory = open(&disk).unwrap().assign(1).unwrap().remove(0).remove(0);
        let recover = RecoverOptions { seed: 1, event_cursor: Sequence(0), ..RecoverOptions::default() };
        Log::recover(directory, recover, &mut |_| {}).unwrap_err()
    };
    assert!(matches!(error, RecoverError::NewerVersion { found: 9, known: 4, .. }));
    assert_eq!(
        error.to_string(),
        "/spool/log-0000/segment-0000: format version 9 is newer than 4, the newest that this program knows; \
         use the program that wrote it"
    );

    let mut foreign = good.clone();
    foreign[14] = 7;
    let crc = crc32c(&foreign[12..4096]);
    foreign[8..12].copy_from_slice(&crc.to_le_bytes());
    disk.set_bytes(segment, foreign);
    let directory = open(&disk).unwrap().assign(1).unwrap().remove(0).remove(0);
    let recover = RecoverOptions { seed: 1, event_cursor: Sequence(0), ..RecoverOptions::default() };
    let error = Log::recover(directory, recover, &mut |_| {}).unwrap_err();
    assert!(matches!(error, RecoverError::ForeignSegment { log: LogId(7), .. }));
    disk.set_bytes(segment, good);

    let meta = Path::new("/spool/SPOOL");
    let good = disk.bytes(meta);
    let mut newer = good.clone();
    newer[12] = 5;
    disk.set_bytes(meta, newer);
    assert!(matches!(open(&disk), Err(OpenError::NewerVersion { found: 5, known: 4, .. })));
    let mut damaged = good.clone();
    damaged[17] ^= 1;
    disk.set_bytes(meta, damaged);
    assert!(matches!(open(&disk), Err(OpenError::Meta { .. })));
    disk.set_bytes(meta, good);
    open(&disk).unwrap();
}

/// The checksum of the format, bit by bit: CRC-32C, reflected, polynomial 0x1EDC6F41.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & 0_u32.wrapping_sub(crc & 1)))
    })
}

/// A log with one message, which has no shard any more.
struct Left {
    spool: Spool,
    log: Log,
    id: MessageId,
}

/// `event_cursor` is what it is recovered with.
fn left_over(event_cursor: Sequence) -> Left {
    let disk = SimDisk::new(1);
    let recover = || RecoverOptions { seed: 1, event_cursor, ..RecoverOptions::default() };
    let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new(PATH), options()).unwrap();
    let second = spool.assign(2).unwrap().remove(1).remove(0);
    let mut log = Log::recover(second, recover(), &mut |_| {}).unwrap();
    let (body, _) = log.append_body(b"x").unwrap();
    let envelope = Envelope { recipients: vec![Recipient::default()], ..Envelope::default() };
    let (id, _) = log.append_message_sharing(&envelope, b"", body).unwrap();
    settle(&mut log);
    drop((spool, log));

    let mut spool = Spool::open_on(Arc::new(disk), Path::new(PATH), options()).unwrap();
    let mut directories = spool.assign(1).unwrap().remove(0);
    let log = Log::recover(directories.remove(1), recover(), &mut |_| {}).unwrap();
    Left { spool, log, id }
}

/// A log without a shard is there until the events of all that it holds are written, and nobody needs its segments; and
/// then it counts no more.
#[test]
fn a_log_is_drained_when_nobody_needs_it() {
    let Left { spool, mut log, id } = left_over(Sequence(0));
    assert!(!log.is_drained(), "a message is live");
    log.pin(id);
    let (last, _) = log.append_outcome(&delivered(id)).unwrap();
    settle(&mut log);
    log.unpin(id);
    assert!(!log.is_drained(), "there is no event yet");
    log.set_event_cursor(last);
    log.set_event_cursor(Sequence(0));
    assert!(log.is_drained(), "events do not go away");
    assert!(spool.used_bytes() > 0);
    log.remove().unwrap();
    assert_eq!(spool.used_bytes(), 0);
}

/// The same where the events are written, and somebody holds a message's place.
#[test]
fn a_log_with_a_pin_is_not_drained() {
    let Left { mut log, id, .. } = left_over(Sequence(u64::MAX));
    log.pin(id);
    log.append_outcome(&delivered(id)).unwrap();
    settle(&mut log);
    assert!(!log.is_drained(), "it is pinned");
    log.unpin(id);
    assert!(log.is_drained());
}

/// The same where a message is being read, and the body that it shares comes next.
#[test]
fn a_log_that_is_read_is_not_drained() {
    let Left { mut log, id, .. } = left_over(Sequence(u64::MAX));
    let Ok(Fetch::Read(operation)) = log.message(id) else { panic!("{id} is not mapped") };
    log.append_outcome(&delivered(id)).unwrap();
    while let Some(commit) = log.poll_operation(Duration::ZERO, &mut ()) {
        log.handle_completion(Duration::ZERO, execute(commit));
    }
    assert!(!log.is_drained(), "it is being read");
    log.handle_completion(Duration::ZERO, execute(operation));
    assert!(!log.is_drained(), "its body is to be read");
    let operation = log.poll_read().unwrap();
    let progress = log.handle_completion(Duration::ZERO, execute(operation));
    assert!(matches!(progress, Progress::Read { result: Ok(message), .. } if message.body() == b"x"));
    settle(&mut log);
    assert!(log.is_drained());
}

/// An id of another log's message names nothing here, though its sequence does.
#[test]
fn a_log_knows_its_own_messages_only() {
    let Left { mut log, id, .. } = left_over(Sequence(0));
    let other = MessageId::new(LogId(0), id.sequence());
    assert!(log.set_handle(id, 7));
    assert!(!log.set_handle(other, 8));
    assert_eq!((log.handle(id), log.handle(other)), (Some(7), None));
    assert_eq!((log.is_live(id), log.is_live(other)), (true, false));
    assert!(matches!(log.message(other), Err(ReadError::Unknown)));
    log.pin(other);
    log.unpin(other);
    log.audit();
}

#[test]
fn options_are_checked() {
    for segment_bytes in [0, 28 << 10, (32 << 10) + 512, 2 << 30] {
        let options = SpoolOptions { segment_bytes, ..SpoolOptions::default() };
        let error = Spool::open_on(Arc::new(SimDisk::new(1)), Path::new(PATH), options).unwrap_err();
        assert!(matches!(error, OpenError::Option { .. }), "{segment_bytes}: {error}");
    }
}

/// Without the meta file nothing tells which ids were given out, so it is not made anew beside logs.
#[test]
fn logs_without_a_meta_file_are_refused() {
    let disk = SimDisk::new(1);
    let open = || Spool::open_on(Arc::new(disk.clone()), Path::new(PATH), options());
    drop(open().unwrap().assign(2).unwrap());
    disk.remove(&Path::new(PATH).join("SPOOL")).unwrap();
    assert!(matches!(open().unwrap_err(), OpenError::Meta { .. }));
}
