//! Space: a full spool refuses mail, takes outcomes, empties and opens again; nothing that somebody holds is written
//! over.
//!
//! Over 500 lines: all of it is about the few spares that are left, and shares how a spool is filled and emptied.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use postrider_spool::limits::{
    FRAME_BYTES_TARGET, PENDING_MAIL_BYTES_MAX, PENDING_OUTCOME_BYTES_MAX, READS_MAX, SEGMENT_BYTES_DEFAULT,
};
use postrider_spool::record::Answer;
use postrider_spool::sim::{Faults, SimDisk};
use postrider_spool::{
    AppendError, Closed, Durability, Envelope, Fate, Fetch, FileStorage, Log, MessageId, Outcome, Progress, ReadError,
    Recipient, RecipientResult, RecoverOptions, Recovered, Sequence, Spool, SpoolOptions, Storage, Summarize, execute,
};

const SEGMENT_BYTES: u64 = 64 << 10;

fn options() -> SpoolOptions {
    SpoolOptions { segment_bytes: SEGMENT_BYTES, ..SpoolOptions::default() }
}

fn open(storage: Arc<dyn Storage>, path: &Path, options: SpoolOptions) -> (Spool, Log) {
    let mut spool = Spool::open_on(storage, path, options).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let recover = RecoverOptions { seed: 1, event_cursor: Sequence(u64::MAX), ..RecoverOptions::default() };
    let log = Log::recover(directory, recover, &mut |_| {}).unwrap();
    (spool, log)
}

fn envelope() -> Envelope {
    Envelope { recipients: vec![Recipient { address: "b@example.net".into() }], ..Envelope::default() }
}

fn outcome(id: MessageId, fate: Fate, attempts: u32) -> Outcome {
    let result = RecipientResult {
        index: 0,
        recipient: "b@example.net".into(),
        queue: "example.net".into(),
        fate,
        attempts,
        answer: Answer::default(),
    };
    Outcome { message: id.to_raw(), results: vec![result], ..Outcome::default() }
}

/// Runs what there is to do at `now`.
fn settle(log: &mut Log, now: Duration) {
    while let Some(operation) = log.poll_operation(now, &mut ()) {
        let progress = log.handle_completion(now, execute(operation));
        assert!(!matches!(progress, Progress::Failed { .. }));
    }
}

/// The same without upkeep.
fn commit(log: &mut Log, now: Duration) {
    while let Some(operation) = log.poll_awaited(now) {
        log.handle_completion(now, execute(operation));
    }
}

/// Lets time pass, and the log do what it does by itself.
fn rest(log: &mut Log, now: &mut Duration) {
    for _ in 0..30 {
        *now += Duration::from_millis(50);
        settle(log, *now);
    }
}

fn fill(log: &mut Log, now: Duration, ids: &mut VecDeque<MessageId>) -> Closed {
    for _ in 0..10_000 {
        match log.append_message(&envelope(), b"", &[b'x'; 3_000]) {
            Ok((id, _)) => ids.push_back(id),
            Err(AppendError::Full(closed)) => {
                settle(log, now);
                return closed;
            }
            Err(error) => panic!("{error}"),
        }
        settle(log, now);
    }
    panic!("it never filled");
}

#[test]
fn at_its_maximum_size_it_refuses_mail_and_empties() {
    for max_bytes in [100_000, 300_000, 1_000_000] {
        let (_spool, mut log) =
            open(Arc::new(SimDisk::new(1)), Path::new("/spool"), SpoolOptions { max_bytes, ..options() });
        let (mut ids, mut now) = (VecDeque::new(), Duration::ZERO);
        for round in 0..5 {
            assert_eq!(fill(&mut log, now, &mut ids), Closed::MaxSize, "round {round}");
            assert!(log.statistics().used_bytes <= max_bytes);
            assert!(ids.len() as u64 * 4_096 > max_bytes / 3, "{} messages in {max_bytes}", ids.len());
            while let Some(id) = ids.pop_front() {
                log.append_outcome(&outcome(id, Fate::Delivered, 1)).unwrap();
                settle(&mut log, now);
            }
            rest(&mut log, &mut now);
            assert_eq!(log.is_open_for_mail(), Ok(()), "round {round}");
        }
    }
}

#[test]
fn without_space_on_the_device_it_refuses_mail_takes_outcomes_and_recovers() {
    let disk = SimDisk::new(1);
    let (_spool, mut log) = open(Arc::new(disk.clone()), Path::new("/spool"), options());
    let (mut ids, mut now) = (VecDeque::new(), Duration::ZERO);
    disk.set_faults(Faults { capacity: Some(8 * SEGMENT_BYTES), ..Faults::default() });
    assert_eq!(fill(&mut log, now, &mut ids), Closed::NoSpace);
    assert!(log.next_timeout().is_some(), "it tries again by itself");
    for id in ids.drain(..) {
        log.append_outcome(&outcome(id, Fate::Delivered, 1)).unwrap();
        settle(&mut log, now);
    }
    rest(&mut log, &mut now);
    assert_eq!(log.is_open_for_mail(), Ok(()));
    assert_eq!(fill(&mut log, now, &mut ids), Closed::NoSpace);
    disk.set_faults(Faults::default());
    // What is due first need not be that, but copying, which there is room for.
    for _ in 0..10 {
        now = log.next_timeout().unwrap().max(now);
        settle(&mut log, now);
    }
    assert_eq!(log.is_open_for_mail(), Ok(()));
}

/// Writes down what became of a message; where there is no room for that, the log is given time to make some.
fn deliver(log: &mut Log, now: &mut Duration, id: MessageId) {
    for _ in 0..40 {
        match log.append_outcome(&outcome(id, Fate::Delivered, 1)) {
            Ok(_) => return settle(log, *now),
            Err(AppendError::Full(Closed::NoSpace)) => rest(log, now),
            Err(error) => panic!("{error}"),
        }
    }
    panic!("outcomes find no room any more: {:?}", log.statistics());
}

/// A log on a disk that is full of mail, and the mail in an order in which it ends all over the segments: none of them
/// is dead before the outcomes have filled more than one.
fn full_log(disk: &SimDisk) -> (Spool, Log, Vec<MessageId>) {
    let (spool, mut log) = open(Arc::new(disk.clone()), Path::new("/spool"), options());
    let mut ids = VecDeque::new();
    disk.set_faults(FULL);
    assert_eq!(fill(&mut log, Duration::ZERO, &mut ids), Closed::NoSpace);
    let ids: Vec<_> =
        (0..13).flat_map(|first| ids.iter().skip(first).step_by(13).copied().collect::<Vec<_>>()).collect();
    assert!(ids.len() > 80);
    (spool, log, ids)
}

const FULL: Faults = Faults {
    capacity: Some(10 * SEGMENT_BYTES),
    operations_left: None,
    is_permanent: false,
    sectors_written: 0,
    write_bytes_max: None,
    is_interruption: false,
    only: None,
};

/// What outcomes fill holds nothing that counts, but it is the newest segment. Once it was the only one that they could
/// take of a full disk, and where it did not suffice nothing was ever written down again.
#[test]
fn a_full_disk_empties_in_any_order() {
    let disk = SimDisk::new(1);
    let (_spool, mut log, ids) = full_log(&disk);
    let mut now = Duration::ZERO;
    for id in ids {
        deliver(&mut log, &mut now, id);
    }
    rest(&mut log, &mut now);
    assert_eq!(log.statistics().live_messages, 0);
    assert_eq!(log.is_open_for_mail(), Ok(()));
}

fn defer(log: &mut Log, now: Duration, id: MessageId) {
    log.append_outcome(&outcome(id, Fate::Deferred { due_ms: 1 }, 1)).unwrap();
    settle(log, now);
}

/// Tells more of a message that was deferred, as an engine does.
struct Summaries {
    octets: usize,
}

impl Summarize for Summaries {
    fn begin(&mut self) {}
    fn summarize(&mut self, _: MessageId, _: u32, summary: &mut Vec<u8>) {
        summary.resize(self.octets, 1);
    }
}

/// Checkpoints take more when much is deferred, and then the disk may be full. Once they had no room any more, and
/// without them no segment was used again.
#[test]
fn a_full_disk_has_room_for_checkpoints_of_what_is_deferred() {
    let disk = SimDisk::new(1);
    let options = SpoolOptions { segment_bytes: 256 << 10, ..options() };
    let (_spool, mut log) = open(Arc::new(disk.clone()), Path::new("/spool"), options);
    let (mut now, mut ids, mut summaries) = (Duration::ZERO, Vec::new(), Summaries { octets: 8 });
    let run = |log: &mut Log, now: &mut Duration, summaries: &mut Summaries| {
        for _ in 0..30 {
            *now += Duration::from_millis(50);
            while let Some(operation) = log.poll_operation(*now, summaries) {
                log.handle_completion(*now, execute(operation));
            }
        }
    };
    disk.set_faults(Faults { capacity: Some(2 << 20), ..Faults::default() });
    while log.is_open_for_mail().is_ok() {
        for _ in 0..100 {
            ids.extend(log.append_message(&envelope(), b"", b"small").ok().map(|(id, _)| id));
        }
        run(&mut log, &mut now, &mut summaries);
    }
    assert!(ids.len() > 2_000, "{}", ids.len());
    summaries.octets = 30;
    for fate in [Fate::Deferred { due_ms: 1 }, Fate::Delivered] {
        for some in ids.chunks(100) {
            let mut rests = 0;
            for id in some {
                while log.append_outcome(&outcome(*id, fate, 1)).is_err() {
                    rests += 1;
                    assert!(rests < 40, "outcomes find no room any more: {:?}", log.statistics());
                    run(&mut log, &mut now, &mut summaries);
                }
            }
            run(&mut log, &mut now, &mut summaries);
        }
    }
    run(&mut log, &mut now, &mut summaries);
    assert_eq!(log.is_open_for_mail(), Ok(()));
}

/// Each start went on in another segment, and on a full disk the last one was soon begun. Then what became of messages
/// could not be written down, so that none was sent and the disk stayed full.
#[test]
fn starts_on_a_full_disk_use_nothing_up() {
    let mut disk = SimDisk::new(1);
    let (spool, log, ids) = full_log(&disk);
    drop((spool, log));
    let mut now = Duration::ZERO;
    let restart = |disk: &SimDisk| {
        let disk = disk.restart();
        disk.set_faults(FULL);
        let (spool, log) = open(Arc::new(disk.clone()), Path::new("/spool"), options());
        (disk, spool, log)
    };
    // What counts in the segment that a start went on in keeps it from being used again.
    for id in &ids[..12] {
        let (next, _spool, mut log) = restart(&disk);
        disk = next;
        defer(&mut log, now, *id);
        rest(&mut log, &mut now);
    }
    for some in ids.chunks(4) {
        let (next, _spool, mut log) = restart(&disk);
        disk = next;
        for id in some {
            assert!(log.is_live(*id));
            deliver(&mut log, &mut now, *id);
        }
    }
    let (_, _spool, mut log) = restart(&disk);
    rest(&mut log, &mut now);
    assert_eq!(log.statistics().live_messages, 0);
    assert_eq!(log.is_open_for_mail(), Ok(()));
}

/// Where a checkpoint tells a segment's end, nothing behind it is read. So nothing is appended there either.
#[test]
fn a_start_does_not_go_on_behind_an_end_that_a_checkpoint_tells() {
    let disk = SimDisk::new(1);
    let (spool, mut log) = open(Arc::new(disk.clone()), Path::new("/spool"), options());
    let mut now = Duration::ZERO;
    let mut ids = Vec::new();
    // Enough for a checkpoint, which the next process writes.
    for _ in 0..25 {
        ids.push(log.append_message(&envelope(), b"", &[b'x'; 3_000]).unwrap().0);
        commit(&mut log, now);
    }
    drop((spool, log));
    let (spool, mut log) = open(Arc::new(disk.clone()), Path::new("/spool"), options());
    rest(&mut log, &mut now);
    let statistics = log.statistics();
    assert_eq!((statistics.checkpoints, statistics.commits, statistics.segments_spare), (1, 0, 3));
    drop((spool, log));
    // Somebody else takes the place of a spare.
    let is_spare = |path: &std::path::PathBuf| {
        path.to_str().unwrap().contains("segment-") && disk.bytes(path).iter().all(|byte| *byte == 0)
    };
    let spare = disk.paths().into_iter().find(is_spare).unwrap();
    disk.remove(&spare).unwrap();
    disk.set_faults(Faults { capacity: Some(0), ..Faults::default() });
    // For the events' sake it is read from its begin all the same.
    let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), options()).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let recover = RecoverOptions { seed: 2, event_cursor: Sequence(0), ..RecoverOptions::default() };
    let mut log = Log::recover(directory, recover, &mut |_| {}).unwrap();
    assert_eq!(log.statistics().segments_spare, 2);
    log.append_outcome(&outcome(ids[0], Fate::Delivered, 1)).unwrap();
    commit(&mut log, now);
    drop((spool, log));
    let (_spool, log) = open(Arc::new(disk), Path::new("/spool"), options());
    assert!(!log.is_live(ids[0]));
    assert!(log.is_live(ids[1]));
}

/// The same where writes fail: each time the log was reopened in another segment.
#[test]
fn reopening_on_a_full_disk_uses_nothing_up() {
    let disk = SimDisk::new(1);
    let (_spool, mut log, ids) = full_log(&disk);
    let mut now = Duration::ZERO;
    for id in &ids[..5] {
        disk.set_faults(Faults { operations_left: Some(0), sectors_written: 8, ..FULL });
        log.append_outcome(&outcome(*id, Fate::Delivered, 1)).unwrap();
        let operation = log.poll_operation(now, &mut ()).unwrap();
        assert!(matches!(log.handle_completion(now, execute(operation)), Progress::Failed { .. }));
        disk.set_faults(FULL);
        assert!(log.begin_reopen());
        settle(&mut log, now);
        assert!(log.is_live(*id));
        defer(&mut log, now, *id);
        rest(&mut log, &mut now);
    }
    for id in ids {
        deliver(&mut log, &mut now, id);
    }
    rest(&mut log, &mut now);
    assert_eq!(log.statistics().live_messages, 0);
    assert_eq!(log.is_open_for_mail(), Ok(()));
}

/// What an outcome took of the reserve stays a reserve. Once mail filled up the segment that an outcome had begun, and
/// then nothing was left to write a delivery down in.
#[test]
fn mail_takes_nothing_of_what_outcomes_have_left() {
    let disk = SimDisk::new(1);
    let (_spool, mut log) = open(Arc::new(disk.clone()), Path::new("/spool"), options());
    let (mut ids, mut now) = (VecDeque::new(), Duration::ZERO);
    disk.set_faults(Faults { capacity: Some(8 * SEGMENT_BYTES), ..Faults::default() });
    assert_eq!(fill(&mut log, now, &mut ids), Closed::NoSpace);
    let in_use = log.statistics().segments_in_use;
    while log.statistics().segments_in_use == in_use {
        log.append_outcome(&outcome(ids[0], Fate::Deferred { due_ms: 1 }, 1)).unwrap();
        settle(&mut log, now);
    }
    assert_eq!(fill(&mut log, now, &mut VecDeque::new()), Closed::NoSpace);
    for id in ids.drain(..) {
        log.append_outcome(&outcome(id, Fate::Delivered, 1)).unwrap();
    }
    rest(&mut log, &mut now);
    assert_eq!(log.is_open_for_mail(), Ok(()));
}

/// Messages that are deferred for long are copied out of the way, with their attempts and their due times; what they
/// need on the disk stays in proportion to them.
#[test]
fn messages_that_stay_do_not_hold_the_log_back() {
    let disk = SimDisk::new(1);
    let (spool, mut log) = open(Arc::new(disk.clone()), Path::new("/spool"), options());
    let mut now = Duration::ZERO;
    let mut stay = Vec::new();
    for round in 0..1_000_u64 {
        // Of many lengths, so that what stays behind it begins anywhere.
        let (gone, _) = log.append_message(&envelope(), b"", &vec![b'x'; 3_000 + round as usize / 3 % 9 * 16]).unwrap();
        if round % 3 == 0 && round < 180 {
            let (id, _) = log.append_message(&envelope(), b"P", b"stays").unwrap();
            log.append_outcome(&outcome(id, Fate::Deferred { due_ms: round }, 3)).unwrap();
            stay.push((id, round));
        }
        settle(&mut log, now);
        log.append_outcome(&outcome(gone, Fate::Delivered, 1)).unwrap();
        now += Duration::from_millis(50);
        settle(&mut log, now);
        assert!(log.statistics().segments_in_use <= 12, "{:?}", log.statistics());
    }
    let statistics = log.statistics();
    assert!(statistics.messages_copied >= 40);
    assert_eq!(statistics.damaged, 0, "what is copied is read whole");
    // Copies go into segments of their own, so hardly any is copied twice.
    assert!(statistics.messages_copied <= 90, "{statistics:?}");
    assert!(statistics.allocated_bytes <= 16 * SEGMENT_BYTES);
    drop((spool, log));
    let mut spool = Spool::open_on(Arc::new(disk), Path::new("/spool"), options()).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let mut found = Vec::new();
    let recover = RecoverOptions { seed: 2, event_cursor: Sequence(u64::MAX), ..RecoverOptions::default() };
    Log::recover(directory, recover, &mut |recovered| match recovered {
        Recovered::Message { id, message, pending, results, .. } => {
            assert_eq!((message.prefix(), message.body()), (&b"P"[..], &b"stays"[..]));
            assert_eq!((pending, results[0].attempts), (&[0][..], 3));
            let Fate::Deferred { due_ms } = results[0].fate else { panic!() };
            found.push((id, due_ms));
        }
        other => panic!("{other:?}"),
    })
    .unwrap();
    found.sort_unstable();
    assert_eq!(found, stay);
}

/// Mail that keeps coming, and a segment in which nothing counts any more before all of it has been copied, do not keep
/// copies from being written. Once the search for what is to be copied went on for as long as it met newer messages.
#[test]
fn copying_comes_to_an_end_while_mail_keeps_coming() {
    let (_spool, mut log) = open(Arc::new(SimDisk::new(1)), Path::new("/spool"), options());
    let (mut now, mut stay) = (Duration::ZERO, VecDeque::new());
    for round in 0..400 {
        let (id, _) = log.append_message(&envelope(), b"", &vec![b'x'; 300 + round % 7 * 1_000]).unwrap();
        if round % 4 == 0 {
            stay.push_back(id);
        }
        let gone = match round % 4 {
            0 if stay.len() > 30 => stay.pop_front(),
            0 => None,
            _ => Some(id),
        };
        settle(&mut log, now);
        if let Some(gone) = gone {
            log.append_outcome(&outcome(gone, Fate::Delivered, 1)).unwrap();
        }
        settle(&mut log, now);
        now += Duration::from_millis(60);
    }
    let statistics = log.statistics();
    assert!(statistics.messages_copied > 20, "{statistics:?}");
    assert!(statistics.segments_in_use < 16, "{statistics:?}");
}

/// What is copied of a segment is read in windows. Where a message's state stands elsewhere and is read by itself, the
/// next window may be there before that has come.
#[test]
fn a_record_is_not_read_again_for_its_state() {
    let options = SpoolOptions { segment_bytes: 1 << 20, ..options() };
    let (_spool, mut log) = open(Arc::new(SimDisk::new(1)), Path::new("/spool"), options);
    let mut now = Duration::ZERO;
    // The scrub, which reads as well, finds nothing and rests.
    settle(&mut log, now);
    let mut ids = Vec::new();
    for _ in 0..2_400 {
        let (id, _) = log.append_message(&envelope(), b"", &[b'x'; 3_000]).unwrap();
        settle(&mut log, now);
        ids.push(id);
    }
    let (stay, go): (Vec<_>, Vec<_>) = ids.into_iter().enumerate().partition(|(place, _)| place % 10 == 0);
    for (_, id) in &stay {
        log.append_outcome(&outcome(*id, Fate::Deferred { due_ms: u64::MAX }, 1)).unwrap();
    }
    settle(&mut log, now);
    for (_, id) in go {
        log.append_outcome(&outcome(id, Fate::Delivered, 1)).unwrap();
    }
    let (mut windows, mut records, mut states) = (0, 0, 0);
    let (mut slow, mut is_slow) = (Vec::new(), false);
    for _ in 0..20_000 {
        now += Duration::from_millis(1);
        // As on a ring, nothing completes before all has been begun; and of two states that are read, one is slow.
        let begun: Vec<_> = slow.drain(..).chain(std::iter::from_fn(|| log.poll_operation(now, &mut ()))).collect();
        for operation in begun {
            let is_state = matches!(operation.describe(), ("read", ..1_000));
            is_slow = is_state && !is_slow;
            if is_slow {
                slow.push(operation);
                continue;
            }
            match operation.describe() {
                ("read", _) if is_state => states += 1,
                ("read", 16_000..) => windows += 1,
                // The last record in a segment may be a window of its own.
                ("read", _) => records += 1,
                _ => {}
            }
            log.handle_completion(now, execute(operation));
        }
    }
    let statistics = log.statistics();
    assert_eq!(statistics.live_messages, stay.len() as u64);
    assert!(statistics.messages_copied > 100, "{statistics:?}");
    assert!(windows > 5 && states > 100, "{windows} windows, {states} states by themselves");
    assert!(records <= 5, "{records} records were read by themselves");
    assert_eq!(statistics.damaged, 0);
}

/// A read for a copy that was begun before the log failed comes back after it was begun anew. Once the state that it
/// brought was taken for the newest.
#[test]
fn a_copy_takes_no_reads_of_an_earlier_attempt() {
    let disk = SimDisk::new(1);
    let (spool, mut log) = open(Arc::new(disk.clone()), Path::new("/spool"), options());
    let mut now = Duration::ZERO;
    // The scrub, which reads as well, finds nothing and rests.
    settle(&mut log, now);
    let three = Envelope { recipients: vec![Recipient::default(); 3], ..Envelope::default() };
    let (stays, _) = log.append_message(&three, b"", b"stays").unwrap();
    for (attempts, recipients) in [(1, 3), (2, 2), (3, 1)] {
        let mut deferred = outcome(stays, Fate::Deferred { due_ms: 1 }, attempts);
        let result = deferred.results.remove(0);
        deferred.results.extend((0..recipients).map(|index| RecipientResult { index, ..result.clone() }));
        log.append_outcome(&deferred).unwrap();
    }
    // Until copying begins, with the segment where it is; then a read that is under way is kept back.
    let mut round = 0;
    let late = 'late: loop {
        round += 1;
        assert!(round < 1_000, "it is never copied");
        if round % 20 == 0 {
            log.append_message(&envelope(), b"", b"others stay as well").unwrap();
        }
        let (id, _) = log.append_message(&envelope(), b"", &[b'x'; 3_000]).unwrap();
        log.append_outcome(&outcome(id, Fate::Delivered, 1)).unwrap();
        now += Duration::from_millis(50);
        while let Some(operation) = log.poll_operation(now, &mut ()) {
            if operation.describe().0 == "read" {
                break 'late operation;
            }
            log.handle_completion(now, execute(operation));
        }
    };
    settle(&mut log, now);
    log.append_message(&envelope(), b"", b"fails").unwrap();
    disk.set_faults(Faults { operations_left: Some(0), ..Faults::default() });
    let operation = log.poll_operation(now, &mut ()).unwrap();
    assert!(matches!(log.handle_completion(now, execute(operation)), Progress::Failed { .. }));
    assert!(log.begin_reopen());
    let record = loop {
        now += Duration::from_millis(50);
        assert!(now < Duration::from_secs(3_600), "it is never copied");
        let Some(operation) = log.poll_operation(now, &mut ()) else { continue };
        if operation.describe().0 == "read" {
            break operation;
        }
        log.handle_completion(now, execute(operation));
    };
    log.handle_completion(now, execute(late));
    log.handle_completion(now, execute(record));
    for _ in 0..5 {
        now += Duration::from_secs(1);
        settle(&mut log, now);
    }
    assert!(log.statistics().messages_copied > 0);
    drop((spool, log));
    let mut found = Vec::new();
    let mut spool = Spool::open_on(Arc::new(disk), Path::new("/spool"), options()).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let recover = RecoverOptions { seed: 2, event_cursor: Sequence(u64::MAX), ..RecoverOptions::default() };
    Log::recover(directory, recover, &mut |recovered| {
        if let Recovered::Message { id, results, .. } = recovered
            && id == stays
        {
            found.extend(results.iter().map(|result| (result.index, result.attempts)));
        }
    })
    .unwrap();
    assert_eq!(found, [(0, 3), (1, 2), (2, 1)]);
}

/// Messages that somebody holds point into the map of a segment, so that one is not used again before they are gone;
/// nor is one with a pin, nor one that the event cursor has not passed.
#[test]
fn what_is_held_is_not_written_over() {
    let directory = tempfile::tempdir().unwrap();
    let (_spool, mut log) = open(Arc::new(FileStorage), directory.path(), options());
    let mut now = Duration::ZERO;
    let mut append = |log: &mut Log, fill: u8| {
        let (id, _) = log.append_message(&envelope(), b"", &[fill; 20_000]).unwrap();
        settle(log, now);
        now += Duration::from_millis(100);
        settle(log, now);
        id
    };
    let first = append(&mut log, 1);
    let Ok(Fetch::Ready(message)) = log.message(first) else { panic!() };
    let piece = message.body_piece();
    drop(message);
    log.append_outcome(&outcome(first, Fate::Delivered, 1)).unwrap();
    let pinned = append(&mut log, 2);
    log.pin(pinned);
    log.pin(pinned);
    log.append_outcome(&outcome(pinned, Fate::Bounced, 1)).unwrap();
    let is_on_disk = |fill: u8| {
        let files = std::fs::read_dir(directory.path().join("log-0000")).unwrap();
        let files = files.map(|file| file.unwrap().path()).filter(|path| path.is_file());
        files.into_iter().any(|path| std::fs::read(path).unwrap().windows(20_000).any(|bytes| bytes == [fill; 20_000]))
    };
    let mut rounds = |log: &mut Log| {
        for _ in 0..60 {
            let id = append(log, 3);
            log.append_outcome(&outcome(id, Fate::Delivered, 1)).unwrap();
        }
    };
    rounds(&mut log);
    assert!(log.statistics().segments_retired > 10);
    assert_eq!(piece.as_ref(), [1; 20_000]);
    assert!(is_on_disk(2));
    log.unpin(pinned);
    rounds(&mut log);
    assert!(is_on_disk(2), "it was pinned twice");
    log.unpin(pinned);
    assert_eq!(piece.as_ref(), [1; 20_000]);
    drop(piece);
    rounds(&mut log);
    assert!(!is_on_disk(1));
    assert!(!is_on_disk(2));
}

#[test]
fn segments_wait_for_the_event_cursor() {
    let mut spool = Spool::open_on(Arc::new(SimDisk::new(1)), Path::new("/spool"), options()).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let recover = RecoverOptions { seed: 1, event_cursor: Sequence(0), ..RecoverOptions::default() };
    let mut log = Log::recover(directory, recover, &mut |_| {}).unwrap();
    let (mut last, mut now) = (Sequence(0), Duration::ZERO);
    for _ in 0..50 {
        let (id, _) = log.append_message(&envelope(), b"", &[0; 20_000]).unwrap();
        last = log.append_outcome(&outcome(id, Fate::Delivered, 1)).unwrap().0;
        settle(&mut log, now);
        now += Duration::from_millis(10);
    }
    assert_eq!(log.statistics().segments_retired, 0);
    log.set_event_cursor(last);
    settle(&mut log, Duration::ZERO);
    let statistics = log.statistics();
    assert!(statistics.segments_in_use <= 5, "but for what the last checkpoints did not know: {statistics:?}");
}

/// A log with a message of 20,000 octets, alone in a segment that both checkpoints have passed: it is used again as
/// soon as nothing holds it back.
fn with_one_old_message(storage: Arc<dyn Storage>, path: &Path) -> (Spool, Log, MessageId, Duration) {
    let (spool, mut log) = open(storage, path, SpoolOptions { hot_bytes: 1 << 30, ..options() });
    let (id, _) = log.append_message(&envelope(), b"", &[7; 20_000]).unwrap();
    let mut now = Duration::ZERO;
    for _ in 0..30 {
        let (filler, _) = log.append_message(&envelope(), b"", &[0; 40_000]).unwrap();
        log.append_outcome(&outcome(filler, Fate::Delivered, 1)).unwrap();
        settle(&mut log, now);
        now += Duration::from_millis(10);
    }
    let statistics = log.statistics();
    assert!(statistics.checkpoints >= 2 && statistics.segments_retired > 2, "{statistics:?}");
    assert_eq!(statistics.messages_copied, 0);
    (spool, log, id, now)
}

/// Many live messages make checkpoints rare, so that many segments become free at once, and are all needed before the
/// next: none is given back to be made, and filled with zeros, again.
#[test]
fn files_that_are_needed_again_are_kept() {
    let (_spool, mut log) = open(Arc::new(SimDisk::new(1)), Path::new("/spool"), options());
    let mut now = Duration::ZERO;
    for sent in 0..8_000 {
        log.append_message(&envelope(), b"", &[b'x'; 300]).unwrap();
        if sent % 100 == 99 {
            settle(&mut log, now);
        }
    }
    let mut made = Vec::new();
    for _ in 0..4_000 {
        let (id, _) = log.append_message(&envelope(), b"", &[b'x'; 3_000]).unwrap();
        log.append_outcome(&outcome(id, Fate::Delivered, 1)).unwrap();
        now += Duration::from_millis(1);
        while let Some(operation) = log.poll_operation(now, &mut ()) {
            if let ("create" | "remove", _) = operation.describe() {
                made.push(log.statistics().segments_retired);
            }
            log.handle_completion(now, execute(operation));
        }
    }
    let statistics = log.statistics();
    assert!(statistics.checkpoints < statistics.segments_retired / 8, "{statistics:?}");
    assert!(statistics.segments_retired > 150 && statistics.messages_copied == 0, "{statistics:?}");
    let late = made.iter().filter(|retired| **retired > 40).count() as u64;
    assert!(late * 16 < statistics.segments_retired, "files came or went when so many had been used again: {made:?}");
}

/// The message's only outcome is being written when the log looks for what can be used again, and then the write fails:
/// the message is live, so its segment must still be its own.
#[test]
fn a_segment_waits_for_the_commit_that_made_it_dead() {
    let disk = SimDisk::new(1);
    let (_spool, mut log, id, now) = with_one_old_message(Arc::new(disk.clone()), Path::new("/spool"));
    let retired = log.statistics().segments_retired;
    log.append_outcome(&outcome(id, Fate::Delivered, 1)).unwrap();
    let commit = log.poll_operation(now, &mut ()).unwrap();
    assert!(log.is_committing());
    while let Some(operation) = log.poll_operation(now, &mut ()) {
        log.handle_completion(now, execute(operation));
    }
    assert_eq!(log.statistics().segments_retired, retired);
    disk.set_faults(Faults { operations_left: Some(0), ..Faults::default() });
    let Progress::Failed { .. } = log.handle_completion(now, execute(commit)) else { panic!() };
    disk.set_faults(Faults::default());
    assert!(log.begin_reopen());
    settle(&mut log, now);
    assert!(log.is_live(id));
    // The same again, and this time it is written.
    log.append_outcome(&outcome(id, Fate::Delivered, 1)).unwrap();
    settle(&mut log, now);
    assert!(log.statistics().segments_retired > retired);
}

/// A message is being read when it ends: others' mail must not be written to where it is read from.
#[test]
fn a_segment_waits_for_reads_from_it() {
    let (_spool, mut log, id, now) = with_one_old_message(Arc::new(SimDisk::new(1)), Path::new("/spool"));
    let retired = log.statistics().segments_retired;
    let Ok(Fetch::Read(read)) = log.message(id) else { panic!() };
    log.append_outcome(&outcome(id, Fate::Delivered, 1)).unwrap();
    settle(&mut log, now);
    assert_eq!(log.statistics().segments_retired, retired);
    let Progress::Read { result, .. } = log.handle_completion(now, execute(read)) else { panic!() };
    assert_eq!(result.unwrap().body(), [7; 20_000]);
    settle(&mut log, now);
    assert!(log.statistics().segments_retired > retired);
}

/// The same for a message, and for a piece of one, that points into the map of a segment.
#[test]
fn a_segment_waits_for_who_holds_a_piece_of_its_map() {
    let directory = tempfile::tempdir().unwrap();
    let (_spool, mut log, id, now) = with_one_old_message(Arc::new(FileStorage), directory.path());
    let retired = log.statistics().segments_retired;
    let Ok(Fetch::Ready(message)) = log.message(id) else { panic!() };
    log.append_outcome(&outcome(id, Fate::Delivered, 1)).unwrap();
    settle(&mut log, now);
    assert_eq!(log.statistics().segments_retired, retired);
    let piece = message.body_piece();
    drop(message);
    settle(&mut log, now);
    assert_eq!(log.statistics().segments_retired, retired);
    assert_eq!(piece.as_ref(), [7; 20_000]);
    drop(piece);
    settle(&mut log, now);
    assert!(log.statistics().segments_retired > retired);
}

/// Any message up to what a segment holds goes in, one octet more does not, and the log goes on after that.
#[test]
fn the_largest_message_fills_a_segment() {
    let (_spool, mut log) = open(Arc::new(SimDisk::new(1)), Path::new("/spool"), options());
    let mut length = SEGMENT_BYTES as usize;
    let largest = loop {
        match log.append_message(&envelope(), b"", &vec![1; length]) {
            Ok((id, _)) => {
                settle(&mut log, Duration::ZERO);
                break id;
            }
            Err(AppendError::TooLarge { .. }) => length -= 1,
            Err(error) => panic!("{error}"),
        }
    };
    assert!(length as u64 > SEGMENT_BYTES - 4096 - 64 - 64 - 300);
    let (small, _) = log.append_message(&envelope(), b"", b"small").unwrap();
    settle(&mut log, Duration::ZERO);
    for (id, bytes) in [(largest, vec![1; length]), (small, b"small".to_vec())] {
        let Ok(Fetch::Read(operation)) = log.message(id) else { panic!() };
        let Progress::Read { result, .. } = log.handle_completion(Duration::ZERO, execute(operation)) else { panic!() };
        assert_eq!(result.unwrap().body(), bytes);
    }
}

/// Two outcomes about one message wait in two commits, and the first one fails: they are taken back latest first, so
/// that nothing counts of either. What the owner keeps with the message is his, and stays.
#[test]
fn what_failed_is_taken_back_latest_first() {
    let disk = SimDisk::new(1);
    let (_spool, mut log) = open(Arc::new(disk.clone()), Path::new("/spool"), options());
    let now = Duration::ZERO;
    let (id, _) = log.append_message(&envelope(), b"", b"x").unwrap();
    settle(&mut log, now);
    let live_bytes = log.statistics().live_bytes;
    log.append_outcome(&outcome(id, Fate::Deferred { due_ms: 1 }, 1)).unwrap();
    let commit = log.poll_awaited(now).unwrap();
    assert!(log.is_committing());
    log.append_outcome(&outcome(id, Fate::Deferred { due_ms: 2 }, 2)).unwrap();
    assert!(log.set_handle(id, 5));
    disk.set_faults(Faults { operations_left: Some(0), ..Faults::default() });
    assert!(matches!(log.handle_completion(now, execute(commit)), Progress::Failed { .. }));
    disk.set_faults(Faults::default());
    assert_eq!((log.statistics().live_bytes, log.handle(id)), (live_bytes, Some(5)));
    assert!(log.begin_reopen());
    settle(&mut log, now);
    log.append_outcome(&outcome(id, Fate::Delivered, 1)).unwrap();
    settle(&mut log, now);
    assert_eq!(log.statistics().live_bytes, 0);
}

/// Files are given back before any header tells what was discarded with them. Whenever the power goes, what had ended
/// has ended, because both checkpoints were begun after it: only where neither can be read something would be missed.
#[test]
fn a_file_is_given_back_when_checkpoints_have_passed_it() {
    let disk = SimDisk::new(1);
    let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), options()).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let recover = RecoverOptions { seed: 1, event_cursor: Sequence(0), ..RecoverOptions::default() };
    let mut log = Log::recover(directory, recover, &mut |_| {}).unwrap();
    let mut now = Duration::ZERO;
    let two = Envelope { recipients: vec![Recipient::default(); 2], ..Envelope::default() };
    let mut stay = Vec::new();
    for _ in 0..40 {
        stay.push(log.append_message(&two, b"", &[b's'; 3_000]).unwrap().0);
        settle(&mut log, now);
    }
    let mut last = Sequence(0);
    for round in 0..120 {
        let (id, _) = log.append_message(&envelope(), b"", &[b'x'; 20_000]).unwrap();
        log.append_outcome(&outcome(id, Fate::Delivered, 1)).unwrap();
        // One recipient of each that stays is done with, in segments that are given back.
        let partly = stay.get(round).map(|id| outcome(*id, Fate::Delivered, 1));
        last = partly.map_or(last, |outcome| log.append_outcome(&outcome).unwrap().0);
        now += Duration::from_millis(5);
        settle(&mut log, now);
    }
    let checkpoints: Vec<_> = (0..3).map(|file| format!("/spool/log-0000/checkpoint-{file}").into()).collect();
    let newest_of = |disk: &SimDisk| -> std::path::PathBuf {
        let number = |path: &std::path::PathBuf| u64::from_le_bytes(disk.bytes(path)[16..24].try_into().unwrap());
        checkpoints.iter().max_by_key(|path| number(path)).cloned().unwrap()
    };
    log.set_event_cursor(Sequence(u64::MAX));
    let mut removed = 0;
    while let Some(operation) = log.poll_operation(now, &mut ()) {
        removed += u64::from(operation.describe().0 == "remove");
        log.handle_completion(now, execute(operation));
        for is_damaged in [false, true] {
            let image = disk.crash(removed);
            if is_damaged {
                let newest = newest_of(&image);
                let mut bytes = image.bytes(&newest);
                bytes[4_096 + 20] ^= 1;
                image.set_bytes(&newest, bytes);
            }
            let mut found = Vec::new();
            let mut spool = Spool::open_on(Arc::new(image), Path::new("/spool"), options()).unwrap();
            let directory = spool.assign(1).unwrap().remove(0).remove(0);
            let recover = RecoverOptions { seed: 2, event_cursor: Sequence(u64::MAX), ..RecoverOptions::default() };
            Log::recover(directory, recover, &mut |recovered| match recovered {
                Recovered::Message { id, pending, .. } => found.push((id, pending.to_vec())),
                Recovered::Quarantined(quarantine) => assert!(is_damaged, "{quarantine}"),
                other => panic!("{other:?}"),
            })
            .unwrap();
            found.sort_unstable();
            assert_eq!(found, stay.iter().map(|id| (*id, vec![1])).collect::<Vec<_>>(), "{removed} {is_damaged}");
        }
    }
    assert!(removed > 20 && last > Sequence(0), "{removed} of {:?}", log.statistics());
}

/// A medium that takes long: what waits for it is bounded, less for mail than for outcomes, and so is what is written
/// at once. Nothing of it is lost.
#[test]
fn what_waits_for_the_medium_is_bounded() {
    let options = SpoolOptions { segment_bytes: SEGMENT_BYTES_DEFAULT, ..SpoolOptions::default() };
    let (_spool, mut log) = open(Arc::new(SimDisk::new(1)), Path::new("/spool"), options);
    let body = vec![b'x'; FRAME_BYTES_TARGET - 1_000_000];
    let mut commit = None;
    let (mut refusal, mut last) = (None, None);
    while refusal.is_none() {
        match log.append_message(&envelope(), b"", &body) {
            Ok((id, _)) => last = Some(id),
            Err(error) => refusal = Some(error),
        }
        // Other files are made meanwhile.
        while let Some(operation) = log.poll_operation(Duration::ZERO, &mut ()) {
            match operation.describe().0 {
                "write" => commit = Some(operation),
                _ => _ = log.handle_completion(Duration::ZERO, execute(operation)),
            }
        }
    }
    assert_eq!(refusal, Some(AppendError::Full(Closed::Backlog)));
    let pending = log.statistics().pending_bytes;
    assert!(pending <= PENDING_MAIL_BYTES_MAX + body.len() as u64);
    assert!(pending + body.len() as u64 > PENDING_MAIL_BYTES_MAX - 4_096, "{pending}");
    // A small one goes in, until the last octet is taken.
    while log.append_message(&envelope(), b"", &[b'x'; 60_000]).is_ok() {}
    assert!(log.statistics().pending_bytes < PENDING_MAIL_BYTES_MAX + 1_000);
    while log.append_message(&envelope(), b"", b"").is_ok() {}
    assert_eq!(log.is_open_for_mail(), Err(Closed::Backlog));
    assert_eq!(log.is_open_for_outcomes(), Ok(()));

    let mut told = outcome(last.unwrap(), Fate::Deferred { due_ms: 1 }, 1);
    told.results[0].answer.text = "x".repeat(2_000_000);
    let refusal = loop {
        match log.append_outcome(&told) {
            Ok(_) => {}
            Err(error) => break error,
        }
        assert!(log.statistics().pending_bytes < PENDING_OUTCOME_BYTES_MAX + 3_000_000);
    };
    assert_eq!(refusal, AppendError::Full(Closed::Backlog));
    assert_eq!(log.is_open_for_outcomes(), Err(Closed::Backlog));
    assert!(log.statistics().pending_bytes > PENDING_OUTCOME_BYTES_MAX);

    while let Some(operation) = commit.take() {
        let (what, bytes) = operation.describe();
        assert!(what != "write" || bytes < 2 * FRAME_BYTES_TARGET as u64, "{bytes} at once");
        log.handle_completion(Duration::ZERO, execute(operation));
        commit = log.poll_awaited(Duration::ZERO);
    }
    assert_eq!(log.statistics().pending_bytes, 0);
    assert_eq!(log.is_open_for_mail(), Ok(()));
    log.audit();
}

/// Only so many reads are under way at once, whoever wants more comes again.
#[test]
fn reads_are_bounded() {
    let (_spool, mut log) = open(Arc::new(SimDisk::new(1)), Path::new("/spool"), options());
    let (body, _) = log.append_body(&[b'b'; 100]).unwrap();
    let mut ids = Vec::new();
    for number in 0..READS_MAX + 20 {
        let appended = match number % 2 {
            0 => log.append_message(&envelope(), b"", b"x"),
            _ => log.append_message_sharing(&envelope(), b"", body),
        };
        ids.push(appended.unwrap().0);
        settle(&mut log, Duration::ZERO);
    }
    let mut reads = Vec::new();
    for id in &ids {
        match log.message(*id) {
            Ok(Fetch::Read(operation)) => reads.push(operation),
            other => assert!(matches!(other, Err(ReadError::Busy)), "{other:?}"),
        }
    }
    assert_eq!(reads.len(), READS_MAX);
    let mut done = 0;
    while let Some(operation) = reads.pop() {
        match log.handle_completion(Duration::ZERO, execute(operation)) {
            Progress::Read { result, .. } => done += u32::from(result.is_ok()),
            _ => reads.extend(log.poll_read()),
        }
        log.audit();
    }
    assert_eq!(done as usize, READS_MAX);
    assert!(matches!(log.message(ids[0]), Ok(Fetch::Read(_))));
}

/// Segments were smaller at an earlier start: those that are there and hold nothing are made larger, so that whatever
/// fits into a segment as it is now is taken.
#[test]
fn spares_of_another_size_are_made_larger() {
    let disk = SimDisk::new(1);
    let small = SpoolOptions { segment_bytes: SEGMENT_BYTES / 2, ..options() };
    drop(open(Arc::new(disk.clone()), Path::new("/spool"), small));
    let (_spool, mut log) = open(Arc::new(disk.clone()), Path::new("/spool"), options());
    for _ in 0..2 {
        log.append_message(&envelope(), b"", &vec![b'x'; 50_000]).unwrap();
        settle(&mut log, Duration::ZERO);
    }
    assert_eq!(log.statistics().allocated_bytes % SEGMENT_BYTES, 0);
}

/// Outcomes take the last spare and fill it. Meanwhile a commit fails: the log is reopened where it was, since there is
/// nowhere else. When nothing more fits, it says so before somebody begins what he could not write down.
#[test]
fn without_a_spare_a_log_is_reopened_where_it_was() {
    let disk = SimDisk::new(1);
    let (_spool, mut log, ids) = full_log(&disk);
    let (now, mut reopened, mut told) = (Duration::ZERO, 0, 0);
    loop {
        if log.is_open_for_outcomes().is_err() {
            break;
        }
        log.append_outcome(&outcome(ids[told % 20], Fate::Deferred { due_ms: 1 }, 1)).unwrap();
        told += 1;
        if log.statistics().segments_spare > 0 || told % 4 > 0 {
            commit(&mut log, now);
            continue;
        }
        disk.set_faults(Faults { operations_left: Some(0), sectors_written: 8, ..FULL });
        let operation = log.poll_awaited(now).unwrap();
        assert!(matches!(log.handle_completion(now, execute(operation)), Progress::Failed { .. }));
        disk.set_faults(FULL);
        assert!(log.begin_reopen());
        let mut last = None;
        while let Some(operation) = log.poll_awaited(now) {
            last = Some(log.handle_completion(now, execute(operation)));
        }
        assert!(matches!(last, Some(Progress::Reopened)), "{last:?}");
        log.audit();
        reopened += 1;
    }
    assert!(reopened > 1);
    assert_eq!(log.is_open_for_outcomes(), Err(Closed::NoSpace));
    assert_eq!(log.statistics().segments_spare, 0);
}

/// What waits for its commit counts against the maximum as well.
#[test]
fn what_waits_counts_against_the_maximum() {
    let max_bytes = 200_000;
    let (_spool, mut log) =
        open(Arc::new(SimDisk::new(1)), Path::new("/spool"), SpoolOptions { max_bytes, ..options() });
    let mut commit = None;
    loop {
        assert!(log.statistics().used_bytes + log.statistics().pending_bytes <= max_bytes);
        if log.is_open_for_mail().is_err() {
            break;
        }
        let refused = log.append_message(&envelope(), b"", &[b'x'; 600]);
        assert!(refused.is_ok(), "{refused:?}");
        while let Some(operation) = log.poll_operation(Duration::ZERO, &mut ()) {
            match operation.describe().0 {
                "write" => commit = Some(operation),
                _ => _ = log.handle_completion(Duration::ZERO, execute(operation)),
            }
        }
    }
    assert!(commit.is_some());
    assert_eq!(log.is_open_for_mail(), Err(Closed::MaxSize));
    assert!(log.statistics().pending_bytes > max_bytes / 3);
}

/// A segment that is given up early waits for who holds a piece of its map, like one that checkpoints have passed.
#[test]
fn a_segment_that_somebody_holds_is_not_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let options = SpoolOptions {
        max_bytes: 16 * SEGMENT_BYTES,
        hot_bytes: 64 * SEGMENT_BYTES,
        durability: Durability::None,
        ..options()
    };
    let (_spool, mut log) = open(Arc::new(FileStorage), directory.path(), options);
    let (mut now, mut passing) = (Duration::ZERO, VecDeque::new());
    let mut append = |log: &mut Log, body: &[u8]| {
        for _ in 0..100 {
            now += Duration::from_millis(5);
            settle(log, now);
            if let Ok((id, _)) = log.append_message(&envelope(), b"", body) {
                settle(log, now);
                return id;
            }
        }
        panic!("{:?}", log.statistics());
    };
    let mut pass = |log: &mut Log, id: MessageId| {
        passing.push_back(id);
        if passing.len() > 3 {
            log.append_outcome(&outcome(passing.pop_front().unwrap(), Fate::Delivered, 1)).unwrap();
        }
    };
    for _ in 0..120 {
        append(&mut log, &[b'x'; 4_000]);
    }
    let mut held = Vec::new();
    for round in 0..160 {
        let id = append(&mut log, &[b'h'; 2_000]);
        if round % 40 == 39 {
            let Ok(Fetch::Ready(message)) = log.message(id) else { panic!("{id} is not mapped") };
            held.push(message.body_piece());
        }
        pass(&mut log, id);
    }
    let given_up = log.statistics().segments_given_up;
    for _ in 0..300 {
        let id = append(&mut log, &[b'x'; 2_000]);
        pass(&mut log, id);
    }
    assert!(log.statistics().segments_given_up > given_up + 3, "{:?}", log.statistics());
    assert!(held.iter().all(|piece| piece.as_ref() == [b'h'; 2_000]));
}
