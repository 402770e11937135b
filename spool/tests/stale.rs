//! Stale octets: what earlier uses of a file left behind, and frames that somebody copied from elsewhere, are never
//! taken for what was written last.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use postrider_spool::checkpoint_format::{CheckpointBlock, CheckpointHeader};
use postrider_spool::format::{
    FRAME_HEADER_BYTES, FrameHeader, RECORD_HEADER_BYTES, SEGMENT_HEADER_BYTES, SegmentBlock, SegmentHeader,
};
use postrider_spool::record::Answer;
use postrider_spool::sim::SimDisk;
use postrider_spool::{
    Envelope, Fate, Log, LogId, MessageId, Outcome, Progress, Reason, Recipient, RecipientResult, RecoverOptions,
    Recovered, Sequence, Spool, SpoolOptions, execute,
};

const BLOCK: usize = 4_096;

/// Two logs of one spool, that number their records alike.
struct Rig {
    disk: SimDisk,
    _spool: Spool,
    logs: Vec<Log>,
    live: BTreeSet<MessageId>,
    now: Duration,
}

/// What recovery told.
#[derive(Debug, Default)]
struct Found {
    live: BTreeSet<MessageId>,
    cuts: usize,
    quarantines: usize,
    /// Of these, damaged frames.
    frames: usize,
}

fn open(disk: &SimDisk, seed: u64) -> (Spool, Vec<Log>, Found) {
    let options = SpoolOptions { segment_bytes: 32 << 10, ..SpoolOptions::default() };
    let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), options).unwrap();
    let mut found = Found::default();
    let logs = spool.assign(2).unwrap().into_iter().flatten().map(|directory| {
        // Not the same generations in both.
        let seed = seed << 16 | u64::from(directory.id().0);
        let recover = RecoverOptions { seed, event_cursor: Sequence(u64::MAX), ..RecoverOptions::default() };
        Log::recover(directory, recover, &mut |recovered| match recovered {
            Recovered::Message { id, message, .. } => {
                assert!(message.content_matches());
                assert!(found.live.insert(id));
            }
            Recovered::Cut(_) => found.cuts += 1,
            Recovered::Quarantined(quarantine) => {
                found.quarantines += 1;
                found.frames += usize::from(quarantine.reason == Reason::Frame);
            }
            other => panic!("{other:?}"),
        })
        .unwrap()
    });
    let logs = logs.collect();
    (spool, logs, found)
}

impl Rig {
    fn new() -> Self {
        let disk = SimDisk::new(1);
        let (spool, logs, _) = open(&disk, 1);
        Self { disk, _spool: spool, logs, live: BTreeSet::new(), now: Duration::ZERO }
    }

    /// The same in both logs: a message that stays once in a while, and others that are done soon.
    fn pass(&mut self, rounds: usize, then: &mut dyn FnMut(&SimDisk, &BTreeSet<MessageId>)) {
        for round in 0..rounds {
            for log in &mut self.logs {
                let envelope = Envelope { recipients: vec![Recipient::default()], ..Envelope::default() };
                let Ok((id, _)) = log.append_message(&envelope, b"", &vec![b'x'; 100 + round % 3 * 2_000]) else {
                    continue;
                };
                settle(log, self.now);
                if round % 16 == 0 {
                    self.live.insert(id);
                } else {
                    log.append_outcome(&delivered(id)).unwrap();
                }
                let first = self.live.iter().copied().find(|id| id.log() == log.id());
                if let Some(first) = first.filter(|_| round % 64 == 63) {
                    log.append_outcome(&delivered(first)).unwrap();
                    self.live.remove(&first);
                }
                settle(log, self.now);
            }
            self.now += Duration::from_millis(60);
            then(&self.disk, &self.live);
        }
    }
}

fn settle(log: &mut Log, now: Duration) {
    while let Some(operation) = log.poll_operation(now, &mut ()) {
        let progress = log.handle_completion(now, execute(operation));
        assert!(!matches!(progress, Progress::Failed { .. }));
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

/// A segment file with its header.
struct Segment {
    path: PathBuf,
    header: SegmentHeader,
    bytes: Vec<u8>,
}

impl Segment {
    /// Whole frames with their offsets, of whatever use.
    fn frames(&self) -> Vec<(usize, FrameHeader)> {
        let offsets = (SEGMENT_HEADER_BYTES..self.bytes.len()).step_by(BLOCK);
        let heads = offsets.filter(|at| FrameHeader::has_magic(&self.bytes[*at..]));
        let frames = heads.map(|at| (at, FrameHeader::decode(&self.bytes[at..])));
        frames.filter(|(at, frame)| frame.records(&self.bytes[*at..]).is_some()).collect()
    }

    fn is_of_this_use(&self, frame: &FrameHeader) -> bool {
        (frame.log, frame.segment, frame.generation) == (self.header.log, self.header.number, self.header.generation)
    }

    /// Where the frames of this use end.
    fn end(&self) -> usize {
        let own = self.frames().into_iter().filter(|(_, frame)| self.is_of_this_use(frame));
        own.map(|(at, frame)| at + frame.padded() as usize).max().unwrap_or(SEGMENT_HEADER_BYTES)
    }
}

/// The segments of both logs, the newest first.
fn segments(disk: &SimDisk) -> Vec<Segment> {
    let mut segments = Vec::new();
    for path in disk.paths() {
        if path.file_name().unwrap().to_str().unwrap().starts_with("segment-") {
            let bytes = disk.bytes(&path);
            if let SegmentBlock::Header(header) = SegmentHeader::decode(&bytes[..SEGMENT_HEADER_BYTES]) {
                segments.push(Segment { path, header, bytes });
            }
        }
    }
    segments.sort_by_key(|segment| std::cmp::Reverse(segment.header.number));
    segments
}

/// Files are used again and again, and behind their present end are whole frames of the same log, with sound checksums.
#[test]
fn what_an_earlier_use_left_is_not_found() {
    let mut rig = Rig::new();
    let mut stale = 0;
    rig.pass(200, &mut |disk, live| {
        for segment in segments(disk) {
            stale += segment.frames().iter().filter(|(_, frame)| !segment.is_of_this_use(frame)).count();
        }
        let (_, _, found) = open(&disk.restart(), 2);
        assert_eq!(&found.live, live);
        assert_eq!((found.cuts, found.quarantines), (0, 0));
    });
    assert!(stale > 1_000, "{stale}");
    assert!(rig.logs.iter().all(|log| log.statistics().segments_retired > 10));
}

/// Any frame of another log, of another segment or of an earlier generation, put right behind the end or further on:
/// nothing of it is found, and whoever goes on from there overwrites it.
#[test]
fn a_frame_from_elsewhere_is_not_found() {
    let mut rig = Rig::new();
    let mut early = Vec::new();
    rig.pass(30, &mut |disk, _| early.extend(segments(disk)));
    rig.pass(120, &mut |_, _| {});
    let now = segments(&rig.disk);
    let mut tried = 0;
    for target in &now {
        let end = target.end();
        let sources = early.iter().step_by(9).chain(&now);
        for (source, at, frame) in
            sources.flat_map(|source| source.frames().into_iter().map(move |(at, frame)| (source, at, frame)))
        {
            let bytes = &source.bytes[at..at + frame.padded() as usize];
            // Not too many, and all kinds of them.
            tried += 1;
            if tried % 13 != 0 || target.is_of_this_use(&frame) {
                continue;
            }
            for place in [end, end + BLOCK].into_iter().filter(|place| place + bytes.len() <= target.bytes.len()) {
                let disk = rig.disk.restart();
                let mut changed = target.bytes.clone();
                changed[place..place + bytes.len()].copy_from_slice(bytes);
                disk.set_bytes(&target.path, changed);
                let what = format!("{frame:?} in {}", target.path.display());
                let (spool, mut logs, found) = open(&disk, 3);
                assert_eq!((&found.live, found.quarantines), (&rig.live, 0), "{what}");
                assert_eq!(found.cuts, 0, "{what}");
                let recipients = vec![Recipient::default()];
                let (new, _) =
                    logs[0].append_message(&Envelope { recipients, ..Envelope::default() }, b"", b"").unwrap();
                settle(&mut logs[0], Duration::ZERO);
                drop((spool, logs));
                let (_, _, mut found) = open(&disk, 4);
                assert!(found.live.remove(&new));
                assert_eq!(found.live, rig.live, "{what}");
            }
        }
    }
    assert!(tried > 2_000, "{tried}");
}

/// A frame of the same use, once more further on: its commit is no new one. That is no rest but damage, and is told.
#[test]
fn an_own_frame_does_not_count_twice() {
    let mut rig = Rig::new();
    rig.pass(150, &mut |_, _| {});
    let newest = segments(&rig.disk).into_iter().find(|segment| segment.header.log == LogId(0)).unwrap();
    let end = newest.end();
    let mut tried = 0;
    for (at, frame) in newest.frames().into_iter().filter(|(_, frame)| newest.is_of_this_use(frame)) {
        let length = frame.padded() as usize;
        if end + length > newest.bytes.len() {
            continue;
        }
        let disk = rig.disk.restart();
        let mut changed = newest.bytes.clone();
        changed.copy_within(at..at + length, end);
        disk.set_bytes(&newest.path, changed);
        let (_, _, found) = open(&disk, 3);
        assert_eq!((&found.live, found.quarantines, found.frames), (&rig.live, 1, 1));
        tried += 1;
    }
    assert!(tried > 0);
}

/// Even with a frame header made for its new place, an old record does not count: its own checksums know where it was.
#[test]
fn a_record_counts_only_where_it_was_written() {
    let mut rig = Rig::new();
    let mut early = Vec::new();
    rig.pass(30, &mut |disk, _| early.extend(segments(disk)));
    rig.pass(120, &mut |_, _| {});
    let newest = segments(&rig.disk).into_iter().find(|segment| segment.header.log == LogId(0)).unwrap();
    let (end, last) = (newest.end(), newest.frames());
    let last = last.into_iter().filter(|(_, frame)| newest.is_of_this_use(frame)).map(|(_, frame)| frame.commit).max();
    let mut tried = 0;
    for source in early.iter().filter(|source| source.header.log == LogId(0)).step_by(7) {
        for (at, frame) in source.frames() {
            let mut bytes = source.bytes[at..at + frame.padded() as usize].to_vec();
            let records = frame.records(&bytes).unwrap();
            if end + bytes.len() > newest.bytes.len() || records.is_empty() {
                continue;
            }
            let forged = FrameHeader {
                segment: newest.header.number,
                generation: newest.header.generation,
                commit: last.unwrap() + 1,
                ..frame
            };
            let heads = records.iter().map(|(position, _)| &bytes[*position..*position + RECORD_HEADER_BYTES]);
            let crc = crc32c(&heads.collect::<Vec<_>>().concat());
            forged.encode(crc, &mut bytes[..FRAME_HEADER_BYTES]);
            assert!(FrameHeader::decode(&bytes).records(&bytes).is_some(), "the frame is sound");
            let disk = rig.disk.restart();
            let mut changed = newest.bytes.clone();
            changed[end..end + bytes.len()].copy_from_slice(&bytes);
            disk.set_bytes(&newest.path, changed);
            let (_, _, found) = open(&disk, 3);
            assert_eq!(found.live, rig.live);
            assert!(found.cuts + found.quarantines > 0, "it is told");
            tried += 1;
        }
    }
    assert!(tried > 10, "{tried}");
}

/// A checkpoint of another log, put in the place of one: it is not used, however new it is.
#[test]
fn a_checkpoint_of_another_log_is_not_used() {
    let mut rig = Rig::new();
    rig.pass(120, &mut |_, _| {});
    for slot in 0..3 {
        let [own, other] = ["log-0000", "log-0001"].map(|log| format!("/spool/{log}/checkpoint-{slot}"));
        let mut bytes = rig.disk.bytes(Path::new(&other));
        let CheckpointBlock::Header(header) = CheckpointHeader::decode(&bytes[..BLOCK]) else { panic!("{other}") };
        bytes[..BLOCK].copy_from_slice(&CheckpointHeader { number: header.number + 1_000, ..header }.encode());
        let disk = rig.disk.restart();
        disk.set_bytes(Path::new(&own), bytes);
        let (_, _, found) = open(&disk, 3);
        assert_eq!((found.live, found.cuts, found.quarantines), (rig.live.clone(), 0, 0));
    }
}

/// The checksum of the format, bit by bit: CRC-32C, reflected, polynomial 0x1EDC6F41.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & 0_u32.wrapping_sub(crc & 1)))
    })
}
