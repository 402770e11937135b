//! Checkpoints: a start from one tells what a start from all segments would, whatever part of a file is damaged, torn,
//! missing or too small.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use postrider_spool::checkpoint_format::{CheckpointBlock, CheckpointHeader};
use postrider_spool::format::{Chain, FRAME_HEADER_BYTES, FrameHeader, SegmentBlock, SegmentHeader};
use postrider_spool::record::Answer;
use postrider_spool::sim::{Faults, SimDisk};
use postrider_spool::{
    AppendError, Closed, Envelope, Fate, Log, MessageId, Outcome, Progress, Recipient, RecipientResult, RecoverOptions,
    Recovered, Sequence, Spool, SpoolOptions, Storage as _, Summarize, execute,
};

const SEGMENT_BYTES: u64 = 32 << 10;

/// Attempts of each live message.
type Model = BTreeMap<MessageId, u32>;

/// A log whose owner keeps each message's attempts as its handle, and tells them in summaries.
struct Rig {
    disk: SimDisk,
    _spool: Spool,
    log: Log,
    now: Duration,
    live: Model,
    round: u64,
}

/// Of messages that were never tried nothing is told, of others the more the more often they were.
struct Attempts;

impl Summarize for Attempts {
    fn begin(&mut self) {}
    fn summarize(&mut self, _: MessageId, handle: u32, summary: &mut Vec<u8>) {
        if handle > 0 {
            summary.extend_from_slice(&handle.to_le_bytes());
            summary.resize(summary.len() + handle as usize * 20, 0);
        }
    }
}

/// What recovery told.
#[derive(Debug, Default)]
struct Found {
    live: Model,
    /// With what was said of each: whether it is pending, and its attempts.
    summaries: Vec<(MessageId, Option<Vec<u32>>, u32)>,
    quarantines: Vec<String>,
    cuts: usize,
}

fn options() -> SpoolOptions {
    SpoolOptions { segment_bytes: SEGMENT_BYTES, ..SpoolOptions::default() }
}

fn open(disk: &SimDisk, cursor: u64, seed: u64) -> (Spool, Log, Found) {
    open_with(disk, options(), cursor, seed)
}

fn open_with(disk: &SimDisk, options: SpoolOptions, cursor: u64, seed: u64) -> (Spool, Log, Found) {
    let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), options).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let mut found = Found::default();
    let recover = RecoverOptions { seed, event_cursor: Sequence(cursor), ..RecoverOptions::default() };
    let log = Log::recover(directory, recover, &mut |recovered| match recovered {
        Recovered::Message { id, message, pending, results, handle } => {
            assert!(message.content_matches());
            assert_eq!(pending, [0]);
            *handle = results.first().map_or(0, |result| result.attempts);
            assert!(found.live.insert(id, *handle).is_none(), "{id} twice");
        }
        Recovered::Summary { id, summary, pending, handle } => {
            let attempts = u32::from_le_bytes(summary[..4].try_into().unwrap());
            assert_eq!(summary.len(), 4 + attempts as usize * 20);
            found.summaries.push((id, pending.map(<[u32]>::to_vec), attempts));
            if pending.is_some() {
                *handle = Some(attempts);
                assert!(found.live.insert(id, attempts).is_none(), "{id} twice");
            }
        }
        Recovered::Quarantined(quarantine) => found.quarantines.push(quarantine.reason.to_string()),
        Recovered::Record { .. } => assert_ne!(cursor, u64::MAX),
        Recovered::Cut(_) => found.cuts += 1,
        other @ Recovered::Held { .. } => panic!("{other:?}"),
    })
    .unwrap();
    (spool, log, found)
}

fn recover(disk: &SimDisk) -> Found {
    let found = recover_torn(disk);
    assert_eq!(found.cuts, 0);
    found
}

/// After the power went in the midst of a write.
fn recover_torn(disk: &SimDisk) -> Found {
    open(disk, u64::MAX, 7).2
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

impl Rig {
    fn new(cursor: u64) -> Self {
        Self::on(SimDisk::new(1), cursor)
    }

    fn on(disk: SimDisk, cursor: u64) -> Self {
        Self::on_with(disk, options(), cursor)
    }

    fn on_with(disk: SimDisk, options: SpoolOptions, cursor: u64) -> Self {
        let (spool, log, found) = open_with(&disk, options, cursor, 1);
        Self { disk, _spool: spool, log, now: Duration::ZERO, live: found.live, round: 0 }
    }

    fn settle(&mut self) {
        self.settle_with(&mut |_, _| {});
    }

    /// `executed` is called after each operation.
    fn settle_with(&mut self, executed: &mut dyn FnMut(&SimDisk, &Model)) {
        while let Some(operation) = self.log.poll_operation(self.now, &mut Attempts) {
            let completion = execute(operation);
            executed(&self.disk, &self.live);
            assert!(!matches!(self.log.handle_completion(self.now, completion), Progress::Failed { .. }));
        }
    }

    fn append(&mut self, bytes: usize) -> Result<MessageId, AppendError> {
        let recipients = vec![Recipient { address: "b@example.net".into() }];
        let envelope = Envelope { recipients, ..Envelope::default() };
        let (id, _) = self.log.append_message(&envelope, b"P", &vec![self.round as u8; bytes])?;
        self.live.insert(id, 0);
        Ok(id)
    }

    /// Lets time pass on a disk that has room for one segment more, and not for a larger checkpoint file.
    fn leave_room_for_a_segment(&mut self) {
        let used: u64 = self.disk.paths().iter().map(|path| self.disk.bytes(path).len() as u64).sum();
        self.disk.set_faults(Faults { capacity: Some(used + SEGMENT_BYTES), ..Faults::default() });
        self.settle();
        self.now += Duration::from_millis(1_100);
    }

    /// Waits for another segment where it has to.
    fn append_in_time(&mut self, bytes: usize) -> MessageId {
        for _ in 0..50 {
            match self.append(bytes) {
                Ok(id) => return id,
                Err(error) => assert_eq!(error, AppendError::Full(Closed::NoSpace)),
            }
            self.now += Duration::from_millis(50);
            self.settle();
        }
        panic!("there is no room, and there comes none: {:?}", self.log.statistics());
    }

    fn defer(&mut self, id: MessageId) {
        let attempts = self.live.get_mut(&id).unwrap();
        *attempts += 1;
        self.log.append_outcome(&outcome(id, Fate::Deferred { due_ms: 1 }, *attempts)).unwrap();
        assert!(self.log.set_handle(id, *attempts));
    }

    fn deliver(&mut self, id: MessageId) {
        self.log.append_outcome(&outcome(id, Fate::Delivered, 1)).unwrap();
        self.live.remove(&id);
    }

    /// Mail that comes and goes, and some that stays for a while.
    fn pass(&mut self, rounds: u64) {
        self.pass_with(rounds, &mut |_, _| {});
    }

    fn pass_with(&mut self, rounds: u64, executed: &mut dyn FnMut(&SimDisk, &Model)) {
        for _ in 0..rounds {
            self.round += 1;
            let stays = self.round.is_multiple_of(4);
            let bytes = if stays { 300 } else { 500 + self.round as usize * 7_919 % 9_000 };
            let id = self.append_in_time(bytes);
            if stays {
                self.defer(id);
            }
            self.settle_with(executed);
            let deferred = self.live.iter().filter(|(_, attempts)| **attempts > 0).map(|(id, _)| *id);
            let deferred: Vec<MessageId> = deferred.collect();
            let again = deferred.get(self.round as usize % 13).copied();
            if let Some(again) = again {
                self.defer(again);
            }
            let oldest = deferred.first().filter(|_| deferred.len() > 40);
            let fresh = self.live.iter().filter(|(_, attempts)| **attempts == 0).map(|(id, _)| *id);
            let fresh = fresh.take(self.round as usize % 4);
            for gone in fresh.chain(oldest.copied()).collect::<Vec<_>>() {
                self.deliver(gone);
            }
            self.settle_with(executed);
            self.now += Duration::from_millis(60);
        }
    }
}

/// A segment that was begun for its own sake may hold nothing, so no sequence tells whether a checkpoint knows of it.
/// Used again too early, it was reported as missing after a crash.
#[test]
fn a_segment_without_a_record_waits_for_checkpoints_as_well() {
    let mut rig = Rig::new(u64::MAX);
    rig.pass(60);
    assert!(finished(&rig.disk).len() >= 2, "else nothing would be retired");
    for _ in 0..12 {
        // The commit fails, and reopening begins another segment.
        rig.append(100).unwrap();
        rig.live.pop_last();
        rig.disk.set_faults(Faults { operations_left: Some(0), ..Faults::default() });
        let mut has_failed = false;
        while let Some(operation) = rig.log.poll_operation(rig.now, &mut Attempts) {
            let progress = rig.log.handle_completion(rig.now, execute(operation));
            has_failed |= matches!(progress, Progress::Failed { .. });
        }
        assert!(has_failed);
        rig.disk.set_faults(Faults::default());
        assert!(rig.log.begin_reopen());
        rig.settle();
        rig.now += Duration::from_millis(60);
        rig.settle();
        let found = recover(&rig.disk.restart());
        assert_eq!(found.quarantines, Vec::<String>::new());
        assert_eq!(found.live, rig.live);
    }
}

/// The first segment that copies begin may be the one whose only frame fails. The next header, of mail, passes over it,
/// though that chain has no segment whose end it could tell. It was reported as damage.
#[test]
fn a_first_copy_that_fails_is_not_damage() {
    let mut passed_over = 0;
    for operations in 0..60 {
        let mut rig = Rig::new(u64::MAX);
        for _ in 0..40 {
            rig.append_in_time(3_000);
            rig.settle();
        }
        for id in rig.live.keys().copied().filter(|id| id.sequence().0 % 8 > 0).collect::<Vec<_>>() {
            rig.deliver(id);
        }
        // Without upkeep.
        while let Some(operation) = rig.log.poll_awaited(rig.now) {
            rig.log.handle_completion(rig.now, execute(operation));
        }
        assert!(headers(&rig.disk).iter().all(|header| header.chain == Chain::Mail));
        rig.disk.set_faults(Faults { operations_left: Some(operations), sectors_written: 40, ..Faults::default() });
        let mut has_failed = false;
        for _ in 0..20 {
            while let Some(operation) = rig.log.poll_operation(rig.now, &mut Attempts) {
                let progress = rig.log.handle_completion(rig.now, execute(operation));
                has_failed |= matches!(progress, Progress::Failed { .. });
            }
            rig.now += Duration::from_millis(60);
        }
        rig.disk.set_faults(Faults::default());
        if !has_failed {
            continue;
        }
        let began_copies = headers(&rig.disk).iter().any(|header| header.chain == Chain::Copies);
        assert!(rig.log.begin_reopen());
        while let Some(operation) = rig.log.poll_awaited(rig.now) {
            rig.log.handle_completion(rig.now, execute(operation));
        }
        passed_over += u64::from(began_copies);
        let found = recover(&rig.disk.restart());
        assert_eq!(found.quarantines, Vec::<String>::new(), "after {operations} operations");
        assert_eq!(found.live, rig.live);
    }
    assert!(passed_over > 0);
}

/// A seal whose write was reported as failed may be on the medium, and the next checkpoint may be written over the same
/// file. Its header was covered by the same write as the first new slices: torn, that was reported as damage.
#[test]
fn a_seal_that_failed_does_not_tell_of_what_is_written_over() {
    let mut sealed = 0;
    for failing in 0..60 {
        let mut rig = Rig::new(u64::MAX);
        rig.pass(30);
        let (mut blocks, mut before) = (0, None);
        'rounds: for _ in 0..40 {
            let id = rig.append_in_time(2_000);
            while let Some(operation) = rig.log.poll_operation(rig.now, &mut Attempts) {
                if operation.describe() == ("write", 4_096) {
                    if blocks == failing {
                        before = finished(&rig.disk).first().map(|(_, header)| header.number);
                        let faults = Faults { operations_left: Some(0), sectors_written: 400, ..Faults::default() };
                        rig.disk.set_faults(faults);
                    }
                    blocks += 1;
                }
                rig.disk.hold_syncs(true);
                let completion = execute(operation);
                rig.disk.set_faults(Faults::default());
                for seed in 0..4 {
                    let found = recover_torn(&rig.disk.crash(seed));
                    assert_eq!(found.quarantines, Vec::<String>::new(), "block {failing} failed");
                }
                rig.disk.hold_syncs(false);
                if blocks == failing + 1
                    && let Some(before) = before.take()
                {
                    sealed += u64::from(finished(&rig.disk)[0].1.number > before);
                }
                if matches!(rig.log.handle_completion(rig.now, completion), Progress::Failed { .. }) {
                    break 'rounds;
                }
            }
            rig.deliver(id);
            rig.now += Duration::from_millis(60);
        }
    }
    assert!(sealed > 0);
}

/// A commit of mail behind one of copies, torn before its number: that it comes later shows in nothing else. It was
/// taken for an older one, and reported as damage.
#[test]
fn a_commit_torn_before_its_number_is_cut() {
    let mut rig = Rig::new(u64::MAX);
    for _ in 0..40 {
        rig.append_in_time(3_000);
        rig.settle();
    }
    for id in rig.live.keys().copied().filter(|id| id.sequence().0 % 8 > 0).collect::<Vec<_>>() {
        rig.deliver(id);
    }
    for _ in 0..20 {
        rig.settle();
        rig.now += Duration::from_millis(60);
    }
    assert!(headers(&rig.disk).iter().any(|header| header.chain == Chain::Copies));
    let before = rig.disk.restart();
    let live = rig.live.clone();
    rig.append(100).unwrap();
    while let Some(operation) = rig.log.poll_awaited(rig.now) {
        rig.log.handle_completion(rig.now, execute(operation));
    }
    let mut paths = rig.disk.paths().into_iter().filter(|path| before.bytes(path) != rig.disk.bytes(path));
    let path = paths.next().unwrap();
    let after = rig.disk.bytes(&path);
    let frame = (0..after.len()).step_by(4_096).find(|at| before.bytes(&path)[*at..*at + 64] != after[*at..*at + 64]);
    let frame = frame.unwrap();
    assert!(frame > 4_096, "it is not the first one");
    for torn in 32..64 {
        let image = before.restart();
        let mut bytes = before.bytes(&path);
        bytes[frame..frame + torn].copy_from_slice(&after[frame..frame + torn]);
        image.set_bytes(&path, bytes);
        let found = recover_torn(&image);
        assert_eq!(found.quarantines, Vec::<String>::new(), "torn behind octet {torn}");
        assert_eq!((found.cuts, found.live), (1, live.clone()), "torn behind octet {torn}");
    }
}

/// Those of all segments that were ever used.
fn headers(disk: &SimDisk) -> Vec<SegmentHeader> {
    let paths = disk.paths().into_iter().filter(|path| path.to_string_lossy().contains("segment-"));
    let headers = paths.filter_map(|path| match SegmentHeader::decode(disk.bytes(&path).get(..4096)?) {
        SegmentBlock::Header(header) => Some(header),
        _ => None,
    });
    headers.collect()
}

fn checkpoint_path(slot: usize) -> PathBuf {
    Path::new("/spool/log-0000").join(format!("checkpoint-{slot}"))
}

fn header(bytes: &[u8]) -> Option<CheckpointHeader> {
    match CheckpointHeader::decode(&bytes[..4096]) {
        CheckpointBlock::Header(header) => Some(header),
        _ => None,
    }
}

/// Finished checkpoints, the newest first.
fn finished(disk: &SimDisk) -> Vec<(PathBuf, CheckpointHeader)> {
    let paths = (0..3).map(checkpoint_path);
    let mut found: Vec<_> = paths.filter_map(|path| Some((path.clone(), header(&disk.bytes(&path))?))).collect();
    found.sort_by_key(|(_, header)| std::cmp::Reverse(header.number));
    found
}

/// Where each slice begins and what its header says of its length.
fn slices(bytes: &[u8], header: &CheckpointHeader) -> Vec<(usize, usize)> {
    let mut at = 4096;
    let mut slices = Vec::new();
    for _ in 0..header.slices {
        let length = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
        slices.push((at, length));
        at += length.next_multiple_of(4096);
    }
    slices
}

fn with_flipped(disk: &SimDisk, path: &Path, position: usize) -> SimDisk {
    let copy = disk.restart();
    let mut bytes = disk.bytes(path);
    bytes[position] ^= 1 << (position % 8);
    copy.set_bytes(path, bytes);
    copy
}

/// Damage anywhere in one of the two kept checkpoints costs nothing: the other one and what came after it tell all.
#[test]
fn one_of_two_is_enough() {
    let mut rig = Rig::new(u64::MAX);
    // It is held, so it has a row.
    rig.log.append_body(&[b'b'; 900]).unwrap();
    rig.pass(150);
    let statistics = rig.log.statistics();
    assert!(statistics.segments_retired > 5, "{statistics:?}");
    assert!(statistics.messages_copied > 0, "{statistics:?}");
    let newest = finished(&rig.disk);
    for (age, (path, header)) in newest[..2].iter().enumerate() {
        let bytes = rig.disk.bytes(path);
        let mut positions = vec![0, 8, 14, 16, 25, 33, 41, 49, 57, 65, 73, 100, 4095];
        for (at, length) in slices(&bytes, header) {
            let offsets = [0, 4, 7, 8, 12, 16, 24, 32, length / 2, length - 1];
            positions.extend(offsets.map(|offset| at + offset));
        }
        for position in positions {
            let found = recover(&with_flipped(&rig.disk, path, position));
            assert_eq!(found.live, rig.live, "{} at {position}", path.display());
            // A header that is not right is one that was never finished.
            let reported = usize::from(age == 0 && position >= 4096);
            assert_eq!(found.quarantines, vec!["damaged checkpoint"; reported], "{} at {position}", path.display());
        }
    }
}

/// The older checkpoint is enough at any time, and so is what the log does after it was.
#[test]
fn the_older_one_is_enough_at_any_time() {
    let mut rig = Rig::new(u64::MAX);
    let mut seen = 0;
    for round in 0..250 {
        rig.pass(1);
        let newest = finished(&rig.disk);
        if newest.len() < 2 {
            continue;
        }
        seen += 1;
        let (path, _) = &newest[0];
        let copy = with_flipped(&rig.disk, path, 4096 + 5);
        assert_eq!(recover(&copy.restart()).live, rig.live, "round {round}");
        if round % 25 == 0 {
            let mut other = Rig::on(copy, u64::MAX);
            other.pass(40);
            assert!(other.log.statistics().checkpoints > 1);
            assert_eq!(recover(&other.disk.restart()).live, other.live, "round {round}");
            assert_eq!(recover(&with_flipped(&other.disk, &finished(&other.disk)[0].0, 4096)).live, other.live);
        }
    }
    assert!(seen > 200, "{seen}");
}

/// With nothing discarded, everything is in the segments.
#[test]
fn none_is_needed_while_nothing_is_discarded() {
    // Segments wait for the event cursor.
    let mut rig = Rig::new(0);
    rig.pass(60);
    assert!(rig.log.statistics().checkpoints > 5);
    let blank = rig.disk.restart();
    let damaged = rig.disk.restart();
    for slot in 0..3 {
        let path = checkpoint_path(slot);
        blank.set_bytes(&path, vec![0; rig.disk.bytes(&path).len()]);
        let mut bytes = rig.disk.bytes(&path);
        bytes[4096 + 20] ^= 1;
        damaged.set_bytes(&path, bytes);
    }
    for disk in [blank, damaged] {
        let found = open(&disk, 0, 3).2;
        assert_eq!(found.live, rig.live);
        assert_eq!(found.summaries, []);
    }
}

/// Until the last octet of the header is there, a checkpoint does not count; from then on it does.
#[test]
fn a_torn_seal_does_not_count() {
    let mut rig = Rig::new(u64::MAX);
    let mut before = [None; 3];
    let (mut seals, mut wholes) = (0, 0);
    rig.pass_with(90, &mut |disk, live| {
        for (slot, before) in before.iter_mut().enumerate() {
            let path = checkpoint_path(slot);
            let bytes = disk.bytes(&path);
            let last = std::mem::replace(before, header(&bytes));
            let Some(sealed) = header(&bytes).filter(|header| last != Some(*header)) else { continue };
            seals += 1;
            for length in (0..=120).step_by(3).chain([512, 4095, 4096]) {
                let copy = disk.restart();
                let mut torn = bytes.clone();
                torn[length..4096].fill(0);
                copy.set_bytes(&path, torn);
                wholes += usize::from(header(&copy.bytes(&path)) == Some(sealed));
                let found = recover(&copy);
                assert_eq!(&found.live, live, "{length}");
                assert_eq!(found.quarantines, Vec::<String>::new());
            }
        }
    });
    assert!(seals > 8, "{seals}");
    assert!((3 * seals..30 * seals).contains(&wholes), "{wholes} of {seals}");
}

/// A commit that fails while a checkpoint is written takes back what the rows may already tell.
#[test]
fn a_failed_commit_gives_a_checkpoint_up() {
    let mut given_up = 0;
    for steps in 0..40 {
        let mut rig = Rig::new(u64::MAX);
        rig.pass(40 + steps % 7);
        let checkpoints = rig.log.statistics().checkpoints;
        // Enough for the next one to be due. Its commit is in flight while rows are gathered and written.
        let durable = rig.live.clone();
        for _ in 0..4 {
            let _ = rig.append(7_000);
        }
        rig.deliver(*durable.keys().next().unwrap());
        let mut waiting = Vec::new();
        for _ in 0..steps {
            rig.now += Duration::from_millis(1);
            waiting.extend(rig.log.poll_operation(rig.now, &mut Attempts));
            if waiting.len() > 1 {
                // The first is the commit.
                rig.log.handle_completion(rig.now, execute(waiting.remove(1)));
            }
        }
        if waiting.is_empty() {
            waiting.extend(rig.log.poll_operation(rig.now, &mut Attempts));
        }
        assert_eq!(rig.log.statistics().checkpoints, checkpoints, "what it tells is not durable");
        rig.disk.set_faults(Faults { operations_left: Some(0), ..Faults::default() });
        let progress = rig.log.handle_completion(rig.now, execute(waiting.remove(0)));
        assert!(matches!(progress, Progress::Failed { .. }));
        for operation in waiting {
            rig.log.handle_completion(rig.now, execute(operation));
        }
        rig.live = durable;
        assert_eq!(recover(&rig.disk.crash(1)).live, rig.live);
        rig.log.begin_reopen();
        rig.settle();
        given_up += u64::from(rig.log.statistics().checkpoints == checkpoints);
        assert_eq!(recover(&rig.disk.crash(1)).live, rig.live);
        rig.pass(10);
        assert_eq!(recover(&rig.disk.crash(1)).live, rig.live);
    }
    assert!(given_up > 0);
}

/// Summaries come in the order of sequences. Where a newer record changed what one told, it comes without recipients,
/// and the message is told by its record; so it is where nothing was summarised.
#[test]
fn summaries_are_told_in_order() {
    let mut rig = Rig::new(u64::MAX);
    rig.pass(50);
    // All is in the checkpoint that comes now.
    let ids: Vec<MessageId> = (0..6).map(|_| rig.append(10).unwrap()).collect();
    ids[..5].iter().for_each(|id| rig.defer(*id));
    rig.settle();
    let before = rig.log.statistics().checkpoints;
    while rig.log.statistics().checkpoints == before {
        let filler = rig.append(7_000).unwrap();
        rig.deliver(filler);
        rig.settle();
        rig.now += Duration::from_millis(5);
    }
    rig.deliver(ids[1]);
    rig.defer(ids[3]);
    rig.settle();

    let (_spool, log, found) = open(&rig.disk.restart(), u64::MAX, 3);
    assert_eq!(found.live, rig.live);
    assert!(found.summaries.is_sorted_by_key(|(id, ..)| *id));
    let told: BTreeMap<MessageId, (Option<Vec<u32>>, u32)> =
        found.summaries.into_iter().map(|(id, pending, attempts)| (id, (pending, attempts))).collect();
    for index in [0, 2, 4] {
        assert_eq!(told[&ids[index]], (Some(vec![0]), 1));
    }
    assert_eq!(told[&ids[1]], (None, 1), "it is gone");
    assert_eq!(told[&ids[3]], (None, 1), "it was deferred again");
    assert!(!told.contains_key(&ids[5]), "nothing was told of it");
    for (id, attempts) in &rig.live {
        assert_eq!(log.handle(*id), Some(*attempts), "{id}");
    }
}

/// A start that reads all segments, as for lost events, tells the same as one that reads what it needs.
#[test]
fn reading_everything_tells_the_same() {
    let mut rig = Rig::new(u64::MAX);
    for _ in 0..40 {
        rig.pass(3);
        assert_eq!(recover(&rig.disk.restart()).live, rig.live);
        assert_eq!(open(&rig.disk.restart(), 0, 3).2.live, rig.live);
    }
}

/// Without files for checkpoints nothing can be used again. Mail waits for them, outcomes don't, and it all goes on as
/// soon as there is room.
#[test]
fn without_room_for_a_file_outcomes_go_on() {
    // Nothing is discarded, so nothing is held without a checkpoint.
    let mut rig = Rig::new(0);
    rig.pass(20);
    let Rig { disk, live, .. } = rig;
    let disk = disk.restart();
    (0..3).for_each(|slot| disk.remove(&checkpoint_path(slot)).unwrap());
    disk.set_faults(Faults { capacity: Some(0), ..Faults::default() });
    let mut rig = Rig::on(disk, u64::MAX);
    assert_eq!(rig.live, live);
    rig.settle();
    assert_eq!(rig.append(10), Err(AppendError::Full(Closed::NoSpace)));
    live.keys().for_each(|id| rig.defer(*id));
    rig.settle();
    rig.deliver(*live.keys().next().unwrap());
    rig.settle();
    assert_eq!(recover(&rig.disk.restart()).live, rig.live);
    rig.disk.set_faults(Faults::default());
    for _ in 0..3 {
        rig.now = rig.log.next_timeout().unwrap().max(rig.now);
        rig.settle();
    }
    rig.pass(40);
    assert!(rig.log.statistics().checkpoints > 1);
    assert_eq!(recover(&rig.disk.restart()).live, rig.live);
}

/// With more live than the files can tell of, mail waits until they have grown or enough has gone; outcomes don't wait.
#[test]
fn a_file_that_cannot_grow_stops_mail_only() {
    for is_given_room in [false, true] {
        let mut rig = Rig::new(u64::MAX);
        let mut result = Ok(());
        while result.is_ok() {
            rig.leave_room_for_a_segment();
            for _ in 0..10 {
                result = rig.append(1).map(|id| rig.defer(id));
            }
            assert!(rig.live.len() < 20_000, "it never fills");
        }
        assert_eq!(result, Err(AppendError::Full(Closed::NoSpace)));
        let bytes = rig.disk.bytes(&checkpoint_path(0)).len();
        assert!(rig.live.len() > 100, "{}", rig.live.len());
        for ids in rig.live.keys().copied().collect::<Vec<_>>().chunks(10) {
            // What is told of them grows, too.
            (0..4).for_each(|_| ids.iter().for_each(|id| rig.defer(*id)));
            rig.leave_room_for_a_segment();
        }
        assert_eq!(recover(&rig.disk.restart()).live, rig.live);
        if is_given_room {
            rig.disk.set_faults(Faults::default());
        } else {
            for ids in rig.live.keys().copied().skip(50).collect::<Vec<_>>().chunks(10) {
                ids.iter().for_each(|id| rig.deliver(*id));
                rig.leave_room_for_a_segment();
            }
        }
        for _ in 0..60 {
            rig.now += Duration::from_millis(100);
            rig.settle();
        }
        assert_eq!(rig.log.is_open_for_mail(), Ok(()), "{is_given_room} {:?}", rig.log.statistics());
        rig.pass(20);
        assert_eq!(recover(&rig.disk.restart()).live, rig.live);
        assert!(!is_given_room || rig.disk.bytes(&checkpoint_path(0)).len() > bytes);
    }
}

/// Any write to a checkpoint file fails: the next checkpoint is begun anew, and none counts that is not whole.
#[test]
fn a_checkpoint_that_fails_is_begun_anew() {
    for failing in 0..8 {
        for sectors_written in [0, 1_000] {
            let mut rig = Rig::new(u64::MAX);
            rig.pass(30);
            let only = Some("checkpoint-");
            let faults = Faults { operations_left: Some(failing), sectors_written, only, ..Faults::default() };
            rig.disk.set_faults(faults);
            for _ in 0..2 {
                let before = rig.log.statistics().checkpoints;
                rig.pass(60);
                assert!(rig.log.statistics().checkpoints > before, "{failing}: there are no more");
                let found = recover(&rig.disk.restart());
                assert_eq!((found.live, found.quarantines), (rig.live.clone(), vec![]), "{failing}");
            }
            assert_eq!(rig.disk.failures(), 1);
        }
    }
}

/// The rows turn out much longer than the file was made for: a larger one is made, and the checkpoint written.
#[test]
fn a_file_that_is_too_small_is_made_larger() {
    let mut rig = Rig::new(u64::MAX);
    rig.pass(60);
    let before = rig.log.statistics().checkpoints;
    assert!(before > 0, "else a row's length is not known yet");
    let lengths = |rig: &Rig| (0..3).map(|slot| rig.disk.bytes(&checkpoint_path(slot)).len()).collect::<Vec<_>>();
    let longest = lengths(&rig).into_iter().max().unwrap();
    for round in 0..60 {
        // Some follow one another closely.
        for _ in 0..if round % 10 == 0 { 20 } else { 0 } {
            rig.append_in_time(100);
        }
        for id in rig.live.keys().copied().collect::<Vec<_>>() {
            rig.log.set_handle(id, 300);
        }
        rig.pass(1);
        let found = recover(&rig.disk.restart());
        assert!(found.live.keys().eq(rig.live.keys()), "round {round}");
        assert_eq!(found.quarantines, Vec::<String>::new());
    }
    assert!(rig.live.len() * 300 * 20 > 2 * longest);
    assert!(rig.log.statistics().checkpoints > before);
    assert!(lengths(&rig).into_iter().max() > Some(longest));
    // A row for each message, over several slices.
    let (_, newest) = finished(&rig.disk).remove(0);
    assert!(newest.slices > 2);
}

/// A header that tells of other rows than there are is damage, and so is its checkpoint; the one before is used.
#[test]
fn a_checkpoint_without_some_of_its_rows_is_damaged() {
    let mut rig = Rig::new(u64::MAX);
    rig.pass(60);
    let (path, header) = finished(&rig.disk).remove(0);
    for messages in [header.messages - 1, header.messages + 1] {
        let disk = rig.disk.restart();
        let mut bytes = disk.bytes(&path);
        bytes[..4096].copy_from_slice(&CheckpointHeader { messages, ..header }.encode());
        disk.set_bytes(&path, bytes);
        let found = recover(&disk);
        assert_eq!((found.live, found.quarantines), (rig.live.clone(), vec!["damaged checkpoint".to_owned()]));
    }
}

/// A copy is the last in its chain, and no header tells where that ends. But a later commit is whole, in the other
/// chain, so it had been acknowledged: it is no unfinished commit, and what it held is told as damaged.
#[test]
fn a_damaged_frame_before_a_later_one_of_the_other_chain_is_told() {
    let mut tried = 0;
    let mut rig = Rig::new(u64::MAX);
    rig.pass(30);
    while tried < 5 {
        let before = rig.log.statistics();
        rig.pass(1);
        let after = rig.log.statistics();
        assert!(rig.round < 1_000, "nothing is copied");
        if after.messages_copied == before.messages_copied || after.checkpoints > before.checkpoints {
            continue;
        }
        rig.append_in_time(10);
        while let Some(operation) = rig.log.poll_awaited(rig.now) {
            rig.log.handle_completion(rig.now, execute(operation));
        }
        let disk = rig.disk.restart();
        let last = headers(&disk).into_iter().filter(|header| header.chain == Chain::Copies);
        let last = last.max_by_key(|header| header.number).unwrap();
        let mut paths = disk.paths().into_iter().filter(|path| path.to_string_lossy().contains("segment-"));
        let path = paths.rfind(|path| {
            matches!(SegmentHeader::decode(&disk.bytes(path)[..4096]), SegmentBlock::Header(header) if header == last)
        });
        let path = path.unwrap();
        let mut bytes = disk.bytes(&path);
        let is_its = |at: &usize| {
            FrameHeader::has_magic(&bytes[*at..]) && FrameHeader::decode(&bytes[*at..]).generation == last.generation
        };
        let at = (4096..bytes.len()).step_by(4096).rfind(is_its).unwrap();
        // In the first record's header.
        bytes[at + FRAME_HEADER_BYTES + 20] ^= 1;
        disk.set_bytes(&path, bytes);
        let found = recover_torn(&disk);
        assert_eq!((found.quarantines, found.cuts), (vec!["damaged frame".to_owned()], 0));
        tried += 1;
    }
}

/// The file of the highest number is gone, and a checkpoint was begun after it. That number is not given out again: the
/// segment would pass for an old one.
#[test]
fn numbers_go_on_from_the_checkpoint() {
    let mut rig = Rig::new(u64::MAX);
    rig.pass(40);
    let highest = loop {
        rig.pass(1);
        let (_, checkpoint) = finished(&rig.disk).remove(0);
        let highest = headers(&rig.disk).iter().map(|segment| segment.number).max().unwrap();
        if highest < checkpoint.begin_segment {
            break highest;
        }
        assert!(rig.round < 1_000);
    };
    let disk = rig.disk.restart();
    for path in disk.paths().into_iter().filter(|path| path.to_string_lossy().contains("segment-")) {
        let bytes = disk.bytes(&path);
        let header = SegmentHeader::decode(&bytes[..4096]);
        if matches!(header, SegmentBlock::Header(header) if header.number == highest) {
            disk.set_bytes(&path, vec![0; bytes.len()]);
        }
    }
    let mut next = Rig::on(disk.clone(), u64::MAX);
    assert!(next.live.len() < rig.live.len());
    let id = next.append(100).unwrap();
    next.settle();
    assert!(recover(&disk.restart()).live.contains_key(&id));
}

/// Each start begins a segment. None of them was used again before a whole one's octets had been written: starts that
/// did little, as in a loop of crashes, filled the disk with nothing.
#[test]
fn starts_that_write_little_do_not_fill_the_disk() {
    let options = SpoolOptions { segment_bytes: 1 << 20, ..SpoolOptions::default() };
    let mut disk = SimDisk::new(1);
    for _ in 0..60 {
        let mut rig = Rig::on_with(disk.clone(), options, u64::MAX);
        let id = rig.append_in_time(100);
        rig.settle();
        rig.deliver(id);
        for _ in 0..20 {
            rig.settle();
            rig.now += Duration::from_millis(60);
        }
        disk = disk.restart();
    }
    let files = disk.paths().into_iter().filter(|path| path.to_string_lossy().contains("segment-")).count();
    assert!(files < 30, "{files} segments for nothing");
}
