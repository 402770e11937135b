//! Without a checkpoint: messages that may have been finished by outcomes which are gone are held for the operator, and
//! never told as if they were to be sent. Newer ones are simply there.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use postrider_spool::checkpoint_format::{CheckpointBlock, CheckpointHeader};
use postrider_spool::format::{FrameHeader, SEGMENT_HEADER_BYTES, SegmentBlock, SegmentHeader};
use postrider_spool::record::Answer;
use postrider_spool::sim::SimDisk;
use postrider_spool::{
    Envelope, Fate, Log, MessageId, Outcome, Progress, Recipient, RecipientResult, RecoverOptions, Recovered, Sequence,
    Spool, SpoolOptions, Summarize, execute,
};

/// Model and pending recipients of each message.
type Model = BTreeMap<MessageId, (u32, Vec<u32>)>;

#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    live: Model,
    held: Model,
    damaged_checkpoints: usize,
}

fn open(disk: &SimDisk, seed: u64) -> (Spool, Log, Found) {
    let options = SpoolOptions { segment_bytes: 32 << 10, ..SpoolOptions::default() };
    let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), options).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let mut found = Found::default();
    let recover = RecoverOptions { seed, event_cursor: Sequence(u64::MAX), ..RecoverOptions::default() };
    let attempts_of = |results: &[RecipientResult]| results.first().map_or(0, |result| result.attempts);
    let log = Log::recover(directory, recover, &mut |recovered| match recovered {
        Recovered::Message { id, pending, results, handle, .. } => {
            *handle = attempts_of(results);
            assert!(found.live.insert(id, (attempts_of(results), pending.to_vec())).is_none());
        }
        Recovered::Held { id, message, pending, results } => {
            assert!(message.content_matches());
            assert!(found.held.insert(id, (attempts_of(results), pending.to_vec())).is_none());
        }
        Recovered::Summary { id, summary, pending: Some(pending), handle } => {
            let attempts = u32::from_le_bytes(summary.try_into().unwrap());
            *handle = Some(attempts);
            assert!(found.live.insert(id, (attempts, pending.to_vec())).is_none());
        }
        Recovered::Quarantined(quarantine) => {
            assert_eq!(quarantine.reason.to_string(), "damaged checkpoint");
            found.damaged_checkpoints += 1;
        }
        Recovered::Summary { .. } => {}
        other => panic!("{other:?}"),
    })
    .unwrap();
    (spool, log, found)
}

/// What the owner knows: it was told of live messages, and not of held ones. What it tells of those all the same is
/// never told in their place.
struct Owner<'a>(&'a Model);

impl Summarize for Owner<'_> {
    fn begin(&mut self) {}
    fn summarize(&mut self, id: MessageId, _: u32, summary: &mut Vec<u8>) {
        let attempts = self.0.get(&id).map_or(77, |(attempts, _)| *attempts);
        summary.extend_from_slice(&attempts.to_le_bytes());
    }
}

fn settle(log: &mut Log, now: Duration, live: &Model) {
    while let Some(operation) = log.poll_operation(now, &mut Owner(live)) {
        let progress = log.handle_completion(now, execute(operation));
        assert!(!matches!(progress, Progress::Failed { .. }));
    }
}

fn outcome(id: MessageId, index: u32, fate: Fate, attempts: u32) -> Outcome {
    let result = RecipientResult {
        index,
        recipient: String::new(),
        queue: String::new(),
        fate,
        attempts,
        answer: Answer::default(),
    };
    Outcome { message: id.to_raw(), results: vec![result], ..Outcome::default() }
}

/// Mail that comes and goes, and some that stays, of which the second recipient is done first, for the rounds given.
/// `then` is called after each.
fn pass(log: &mut Log, live: &mut Model, rounds: u32, then: &mut dyn FnMut(&mut Log, &Model)) {
    let mut fresh = Vec::new();
    let mut now = Duration::from_millis(u64::from(rounds));
    for round in 0..rounds {
        let stays = round % 4 == 0;
        let bytes = if stays { 200 } else { 1_000 + round as usize * 7_919 % 9_000 };
        let recipients = vec![Recipient::default(); if stays { 2 } else { 1 }];
        let envelope = Envelope { recipients, ..Envelope::default() };
        let Ok((id, _)) = log.append_message(&envelope, b"", &vec![b'x'; bytes]) else {
            now += Duration::from_millis(60);
            settle(log, now, live);
            continue;
        };
        if stays {
            log.append_outcome(&outcome(id, 0, Fate::Deferred { due_ms: 1 }, 1)).unwrap();
            live.insert(id, (1, vec![0, 1]));
        } else {
            live.insert(id, (0, vec![0]));
            fresh.push(id);
        }
        settle(log, now, live);
        let stayed: Vec<MessageId> = live.iter().filter(|(_, state)| state.0 > 0).map(|(id, _)| *id).collect();
        let both = stayed.iter().copied().find(|id| live[id].1.len() == 2).filter(|_| round % 4 == 3);
        if let Some(id) = both {
            log.append_outcome(&outcome(id, 1, Fate::Delivered, 1)).unwrap();
            live.insert(id, (1, vec![0]));
        }
        if stayed.len() > 30 && live[&stayed[0]].1 == [0] {
            fresh.push(stayed[0]);
        }
        for id in fresh.drain(..fresh.len() * 2 / 3) {
            log.append_outcome(&outcome(id, 0, Fate::Delivered, 2)).unwrap();
            live.remove(&id);
        }
        settle(log, now, live);
        now += Duration::from_millis(60);
        then(log, live);
    }
    for id in fresh {
        log.append_outcome(&outcome(id, 0, Fate::Delivered, 2)).unwrap();
        live.remove(&id);
    }
    settle(log, now, live);
}

fn paths(disk: &SimDisk, kind: &str) -> Vec<PathBuf> {
    let paths = disk.paths().into_iter();
    paths.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(kind)).collect()
}

/// What segments' and checkpoints' headers say.
fn discarded(disk: &SimDisk) -> u64 {
    let segments = paths(disk, "segment-").into_iter().filter_map(|path| {
        match SegmentHeader::decode(&disk.bytes(&path)[..SEGMENT_HEADER_BYTES]) {
            SegmentBlock::Header(header) => Some(header.discarded),
            _ => None,
        }
    });
    let checkpoints = finished(disk).into_iter().map(|(_, header)| header.discarded);
    segments.chain(checkpoints).max().unwrap()
}

/// Messages whose records are only in segments that a later header says are not in use any more.
fn only_below_the_tail(disk: &SimDisk) -> BTreeSet<MessageId> {
    let mut segments = Vec::new();
    for path in paths(disk, "segment-") {
        let bytes = disk.bytes(&path);
        if let SegmentBlock::Header(header) = SegmentHeader::decode(&bytes[..SEGMENT_HEADER_BYTES]) {
            segments.push((header, bytes));
        }
    }
    let tail = segments.iter().map(|(header, _)| header.tail).max().unwrap_or(0);
    let (mut below, mut above) = (BTreeSet::new(), BTreeSet::new());
    for (header, bytes) in &segments {
        let offsets = (SEGMENT_HEADER_BYTES..bytes.len()).step_by(4096);
        for at in offsets.filter(|at| FrameHeader::has_magic(&bytes[*at..])) {
            let frame = FrameHeader::decode(&bytes[at..]);
            let records = frame.records(&bytes[at..]).filter(|_| frame.generation == header.generation);
            let ids = records.into_iter().flatten().map(|(_, record)| MessageId::from_raw(record.message));
            if header.number < tail { below.extend(ids) } else { above.extend(ids) }
        }
    }
    below.difference(&above).copied().collect()
}

/// Finished checkpoints, the newest first.
fn finished(disk: &SimDisk) -> Vec<(PathBuf, CheckpointHeader)> {
    let mut found = Vec::new();
    for path in paths(disk, "checkpoint-") {
        if let CheckpointBlock::Header(header) = CheckpointHeader::decode(&disk.bytes(&path)[..4096]) {
            found.push((path, header));
        }
    }
    found.sort_by_key(|(_, header)| std::cmp::Reverse(header.number));
    found
}

/// How both kept checkpoints were lost.
#[derive(Debug, Clone, Copy)]
enum Loss {
    /// The files are blank.
    Blank,
    /// A slice is damaged in both, and what the third file holds is whole.
    TwoDamaged,
}

fn lose(disk: &SimDisk, loss: Loss) {
    match loss {
        Loss::Blank => {
            for path in paths(disk, "checkpoint-") {
                disk.set_bytes(&path, vec![0; disk.bytes(&path).len()]);
            }
        }
        Loss::TwoDamaged => {
            for (path, _) in finished(disk).into_iter().take(2) {
                let mut bytes = disk.bytes(&path);
                bytes[4096 + 30] ^= 1;
                disk.set_bytes(&path, bytes);
            }
        }
    }
}

/// Checks what is told once both checkpoints are lost.
fn check(found: &Found, live: &Model, discarded: u64, what: &str) {
    for (id, state) in &found.live {
        assert_eq!(live.get(id), Some(state), "{what}: {id} is sent again, or at another time");
    }
    for (id, (attempts, pending)) in live {
        let (told, known) = found.live.get(id).or(found.held.get(id)).unwrap_or_else(|| panic!("{what}: {id}"));
        assert_eq!(told, attempts, "{what}: {id}");
        assert!(pending.iter().all(|index| known.contains(index)), "{what}: {id}");
        assert!(id.sequence().0 <= discarded || found.live.contains_key(id), "{what}: {id} is newer than {discarded}");
    }
    assert!(found.held.keys().all(|id| id.sequence().0 <= discarded), "{what}");
}

/// At any time both checkpoints may turn out to be unreadable. Where the third file still has one, that is of no use:
/// once it was used, and mail that had been delivered was sent again.
#[test]
fn what_may_have_been_delivered_is_held() {
    for loss in [Loss::Blank, Loss::TwoDamaged] {
        let disk = SimDisk::new(1);
        let (_spool, mut log, _) = open(&disk, 1);
        let (mut all_held, mut thirds, mut undecided, mut all_gone) = (0, 0, 0, 0);
        pass(&mut log, &mut Model::new(), 300, &mut |_, live| {
            let copy = disk.restart();
            let discarded = discarded(&copy);
            let gone = only_below_the_tail(&copy);
            all_gone += gone.len();
            thirds += usize::from(finished(&copy).len() == 3);
            lose(&copy, loss);
            let (_, _, found) = open(&copy, 2);
            if discarded == 0 {
                assert_eq!((&found.live, found.held.len()), (live, 0));
            }
            check(&found, live, discarded, &format!("{loss:?}, {discarded} discarded"));
            assert!(gone.iter().all(|id| !found.live.contains_key(id) && !found.held.contains_key(id)), "{loss:?}");
            all_held += found.held.len();
            undecided += found.held.keys().filter(|id| !live.contains_key(id)).count();
        });
        assert!(log.statistics().segments_retired > 20);
        assert!(all_held > 100);
        assert!(undecided > 0, "none of them had been delivered");
        assert!(thirds > 30);
        assert!(all_gone > 0);
    }
}

/// Held messages stay held over checkpoints, copies, restarts and another loss of both checkpoints, until somebody
/// decides about them. Meanwhile the log goes on.
#[test]
fn what_is_held_stays_held() {
    let disk = SimDisk::new(1);
    let (spool, mut log, _) = open(&disk, 1);
    let mut live = Model::new();
    pass(&mut log, &mut live, 260, &mut |_, _| {});
    drop((spool, log));
    let disk = disk.restart();
    lose(&disk, Loss::Blank);
    let (spool, mut log, found) = open(&disk, 2);
    let Found { live: mut known, mut held, .. } = found;
    assert!(held.len() > 5, "{}", held.len());
    pass(&mut log, &mut known, 200, &mut |_, live| {
        let (_, _, found) = open(&disk.restart(), 3);
        assert_eq!(found, Found { live: live.clone(), held: held.clone(), damaged_checkpoints: 0 });
    });
    assert!(log.statistics().checkpoints > 10);
    assert!(log.statistics().messages_copied as usize > held.len() / 2);

    // An outcome ends it as it ends any message.
    let (first, (_, pending)) = held.pop_first().unwrap();
    assert!(log.is_live(first));
    for index in pending {
        log.append_outcome(&outcome(first, index, Fate::AdminBounced, 9)).unwrap();
    }
    settle(&mut log, Duration::from_secs(60), &known);
    drop((spool, log));

    let copy = disk.restart();
    assert_eq!(open(&copy, 4).2, Found { live: known.clone(), held: held.clone(), damaged_checkpoints: 0 });
    lose(&copy, Loss::Blank);
    let found = open(&copy, 5).2;
    let (again, before): (BTreeSet<_>, BTreeSet<_>) = (found.held.keys().collect(), held.keys().collect());
    assert!(again.is_superset(&before));
    assert!(!again.contains(&first) || first.sequence().0 <= discarded(&copy));
    assert!(found.live.iter().all(|(id, state)| known.get(id) == Some(state)));
}

/// A file that was retired last may be known to a checkpoint alone: what that tells was discarded counts, also when
/// none of its slices can be read.
#[test]
fn a_checkpoint_tells_what_was_discarded() {
    let disk = SimDisk::new(1);
    let (_spool, mut log, _) = open(&disk, 1);
    let mut live = Model::new();
    pass(&mut log, &mut live, 200, &mut |_, _| {});
    let checkpoints = finished(&disk);
    let segments = paths(&disk, "segment-").into_iter().filter_map(|path| {
        match SegmentHeader::decode(&disk.bytes(&path)[..SEGMENT_HEADER_BYTES]) {
            SegmentBlock::Header(header) => Some(header),
            _ => None,
        }
    });
    let segments: Vec<SegmentHeader> = segments.collect();
    for (_, checkpoint) in &checkpoints {
        let before = segments.iter().filter(|segment| segment.number < checkpoint.begin_segment);
        assert!(Some(checkpoint.discarded) >= before.map(|segment| segment.discarded).max());
    }
    let told_by_segments = segments.iter().map(|segment| segment.discarded).max().unwrap();
    let discarded = checkpoints[0].1.begin_sequence;
    assert!(discarded > self::discarded(&disk));
    for (path, header) in &checkpoints {
        let mut bytes = disk.bytes(path);
        let discarded = if *path == checkpoints[0].0 { discarded } else { header.discarded };
        bytes[..4096].copy_from_slice(&CheckpointHeader { discarded, ..*header }.encode());
        disk.set_bytes(path, bytes);
    }
    lose(&disk, Loss::TwoDamaged);
    let (_, _, found) = open(&disk.restart(), 2);
    assert!(found.held.keys().any(|id| id.sequence().0 > told_by_segments));
    check(&found, &live, discarded, "a checkpoint tells it");
}
