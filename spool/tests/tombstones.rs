//! Tombstones: where room is short, a segment in which nothing counts is used again before checkpoints pass it, and
//! what its final outcomes told stays told.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use postrider_spool::format::{FrameHeader, RecordHeader, RecordKind, SegmentBlock, SegmentHeader};
use postrider_spool::record::Answer;
use postrider_spool::sim::{Faults, SimDisk};
use postrider_spool::{
    Envelope, Fate, Log, MessageId, Outcome, Progress, Reason, Recipient, RecipientResult, RecoverOptions, Recovered,
    Sequence, Spool, SpoolOptions, execute,
};

const SEGMENT_BYTES: u64 = 64 << 10;

/// Each live message's pending recipients.
type Live = BTreeMap<MessageId, BTreeSet<u32>>;

/// By message and recipient.
type Attempts = BTreeMap<(MessageId, u32), u32>;

struct Rig {
    disk: SimDisk,
    _spool: Spool,
    log: Log,
    live: Live,
    /// Delivered soon.
    passing: VecDeque<MessageId>,
    now: Duration,
}

#[derive(Debug, Default)]
struct Found {
    live: Live,
    /// Of who has been deferred.
    attempts: Attempts,
    held: usize,
    reasons: Vec<Reason>,
    cuts: usize,
}

fn open(disk: &SimDisk, seed: u64) -> (Spool, Log, Found) {
    let options =
        SpoolOptions { segment_bytes: SEGMENT_BYTES, max_bytes: 16 * SEGMENT_BYTES, ..SpoolOptions::default() };
    let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), options).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let recover = RecoverOptions { seed, event_cursor: Sequence(u64::MAX), ..RecoverOptions::default() };
    let mut found = Found::default();
    let log = Log::recover(directory, recover, &mut |recovered| match recovered {
        Recovered::Message { id, pending, results, .. } => {
            found.attempts.extend(results.iter().map(|result| ((id, result.index), result.attempts)));
            found.live.insert(id, pending.iter().copied().collect());
        }
        Recovered::Held { .. } => found.held += 1,
        Recovered::Quarantined(quarantine) => found.reasons.push(quarantine.reason),
        Recovered::Cut(_) => found.cuts += 1,
        Recovered::Record { .. } | Recovered::Summary { .. } => panic!("{recovered:?}"),
    })
    .unwrap();
    (spool, log, found)
}

impl Rig {
    fn new(seed: u64) -> Self {
        let disk = SimDisk::new(seed);
        let (spool, log, _) = open(&disk, seed);
        Self { disk, _spool: spool, log, live: Live::new(), passing: VecDeque::new(), now: Duration::ZERO }
    }

    /// The same with so many messages of three recipients that room is short.
    fn short_of_room(seed: u64) -> (Self, Vec<MessageId>) {
        let mut rig = Self::new(seed);
        let staying = (0..120).map(|_| rig.append(3, 4_000)).collect();
        rig.settle();
        (rig, staying)
    }

    fn settle(&mut self) {
        self.now += Duration::from_millis(5);
        while let Some(operation) = self.log.poll_operation(self.now, &mut ()) {
            self.log.handle_completion(self.now, execute(operation));
        }
        self.log.audit();
    }

    fn append(&mut self, recipients: u32, bytes: usize) -> MessageId {
        let addresses = (0..recipients).map(|index| Recipient { address: format!("r{index}@example.net") });
        let envelope = Envelope { recipients: addresses.collect(), ..Envelope::default() };
        for _ in 0..100 {
            if let Ok((id, _)) = self.log.append_message(&envelope, b"", &vec![b'x'; bytes]) {
                self.live.insert(id, (0..recipients).collect());
                return id;
            }
            // The next segments are made ready.
            self.settle();
        }
        panic!("{:?}", self.log.statistics());
    }

    fn finish(&mut self, id: MessageId, index: u32) {
        self.tell(id, index, Fate::Delivered, 1);
        let pending = self.live.get_mut(&id).unwrap();
        pending.remove(&index);
        if pending.is_empty() {
            self.live.remove(&id);
        }
    }

    fn tell(&mut self, id: MessageId, index: u32, fate: Fate, attempts: u32) {
        let result = RecipientResult {
            index,
            recipient: format!("r{index}@example.net"),
            queue: "example.net".into(),
            fate,
            attempts,
            answer: Answer::default(),
        };
        let outcome = Outcome { message: id.to_raw(), results: vec![result], ..Outcome::default() };
        self.log.append_outcome(&outcome).unwrap();
    }

    /// A message comes, and the one that came a few before it is delivered.
    fn pass(&mut self, bytes: usize) {
        let id = self.append(1, bytes);
        self.passing.push_back(id);
        if self.passing.len() > 3 {
            let id = self.passing.pop_front().unwrap();
            self.finish(id, 0);
        }
    }

    /// Mail passes by what stays, of which now and then a recipient is done with, until so many segments have been
    /// given up.
    fn pass_by(&mut self, staying: &[MessageId], given_up: u64) {
        let mut stays = staying.iter().flat_map(|id| (0..3).map(|index| (*id, index))).step_by(2);
        for round in 0..4_000 {
            self.pass(2_000);
            if round % 9 == 0
                && let Some((id, index)) = stays.next()
            {
                self.finish(id, index);
            }
            self.settle();
            if self.log.statistics().segments_given_up >= given_up {
                return;
            }
        }
        panic!("{:?}", self.log.statistics());
    }

    /// What a start finds.
    fn found(&self) -> Found {
        open(&self.disk.restart(), 99).2
    }

    /// Of all segments, the records of a kind, and where they are.
    fn records(&self, kind: RecordKind) -> Vec<(PathBuf, usize, RecordHeader)> {
        let mut found = Vec::new();
        for path in self.disk.paths().into_iter().filter(|path| path.to_str().unwrap().contains("segment-")) {
            let bytes = self.disk.bytes(&path);
            let SegmentBlock::Header(segment) = SegmentHeader::decode(&bytes[..4096]) else { continue };
            for at in (4096..bytes.len()).step_by(4096).filter(|at| FrameHeader::has_magic(&bytes[*at..])) {
                let frame = FrameHeader::decode(&bytes[at..]);
                let records = frame.records(&bytes[at..]).filter(|_| frame.generation == segment.generation);
                let records = records.into_iter().flatten().filter(|(_, record)| record.kind == kind as u8);
                found.extend(records.map(|(position, record)| (path.clone(), at + position, record)));
            }
        }
        found
    }

    /// Checkpoint files, the newest first.
    fn checkpoints(&self) -> Vec<PathBuf> {
        let mut files: Vec<(u64, PathBuf)> = Vec::new();
        for path in self.disk.paths().into_iter().filter(|path| path.to_str().unwrap().contains("checkpoint-")) {
            let number = u64::from_le_bytes(self.disk.bytes(&path)[16..24].try_into().unwrap());
            files.push((number, path));
        }
        files.sort_unstable_by_key(|(number, _)| std::cmp::Reverse(*number));
        files.into_iter().filter(|(number, _)| *number > 0).map(|(_, path)| path).collect()
    }

    fn flip(&self, path: &Path, at: usize) {
        let mut bytes = self.disk.bytes(path);
        bytes[at] ^= 1;
        self.disk.set_bytes(path, bytes);
    }
}

/// Two thirds of what stays is half done, by outcomes in segments that are gone: none of it comes back, whichever
/// checkpoint is read.
#[test]
fn what_ended_stays_ended() {
    for seed in 0..8 {
        let (mut rig, staying) = Rig::short_of_room(seed);
        let mut tombstones = 0;
        for round in 1..12 {
            rig.pass_by(&staying, 2 * round);
            tombstones += rig.records(RecordKind::Tombstones).len();
            let found = rig.found();
            assert_eq!(found.live, rig.live, "seed {seed}, round {round}");
            assert_eq!((found.reasons, found.held), (vec![], 0), "seed {seed}, round {round}");

            let newest = rig.checkpoints().remove(0);
            rig.flip(&newest, 4_096 + 20);
            let found = rig.found();
            assert_eq!(found.reasons, [Reason::Checkpoint]);
            assert_eq!((found.live, found.held), (rig.live.clone(), 0), "seed {seed}, round {round}, the one before");
            rig.flip(&newest, 4_096 + 20);
        }
        assert!(tombstones > 0);
    }
}

/// Some recipients are deferred again and again, while others end by outcomes in segments that are given up: a replay
/// meets the last deferral before the tombstones that make it tell of all who are left.
#[test]
fn who_is_deferred_keeps_his_attempts() {
    for seed in 0..4 {
        let mut rig = Rig::new(seed);
        // So many that room is short.
        let _filling: Vec<MessageId> = (0..120).map(|_| rig.append(1, 4_000)).collect();
        let mut staying: Vec<MessageId> = (0..3).map(|_| rig.append(8, 100)).collect();
        let mut attempts = Attempts::new();
        let mut random = seed + 1;
        let mut draw = |bound: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % bound
        };
        for round in 0..1_500 {
            rig.pass(4_000);
            let chosen = draw(3) as usize;
            let id = staying[chosen];
            let pending: Vec<u32> = rig.live[&id].iter().copied().collect();
            let index = pending[draw(pending.len() as u64) as usize];
            if draw(4) == 0 {
                rig.finish(id, index);
                attempts.remove(&(id, index));
            } else {
                let made = attempts.entry((id, index)).or_default();
                *made += 1;
                rig.tell(id, index, Fate::Deferred { due_ms: 1 }, *made);
            }
            rig.settle();
            if !rig.live.contains_key(&id) {
                staying[chosen] = rig.append(8, 100);
            }
            if round % 5 == 0 {
                rig.settle();
                let mut found = rig.found();
                found.attempts.retain(|(id, index), _| found.live[id].contains(index));
                assert_eq!((found.live, found.reasons), (rig.live.clone(), vec![]), "seed {seed}, round {round}");
                assert_eq!(found.attempts, attempts, "seed {seed}, round {round}");
            }
        }
        assert!(rig.log.statistics().segments_given_up > 20, "{:?}", rig.log.statistics());
    }
}

/// A commit failed, and all of it is on the medium all the same: the header of the next segment makes it void. So that
/// segment is not given up before checkpoints tell where the one before ends, also when nothing in it counts.
#[test]
fn what_failed_stays_void() {
    let mut given_up = 0;
    for seed in 0..6 {
        let (mut rig, staying) = Rig::short_of_room(seed);
        rig.pass_by(&staying, 4);
        // The segment in which it fails stays.
        rig.append(3, 100);
        rig.settle();
        let envelope = Envelope { recipients: vec![Recipient::default()], ..Envelope::default() };
        rig.log.append_message(&envelope, b"", b"refused").unwrap();
        rig.disk.set_faults(Faults { operations_left: Some(0), sectors_written: 1_000, ..Faults::default() });
        let commit = rig.log.poll_awaited(rig.now).unwrap();
        assert!(matches!(rig.log.handle_completion(rig.now, execute(commit)), Progress::Failed { .. }));
        rig.disk.set_faults(Faults::default());
        assert!(rig.log.begin_reopen());
        rig.settle();
        let before = rig.log.statistics().segments_given_up;
        for round in 0..300 {
            rig.pass(2_000);
            rig.settle();
            let newest = rig.checkpoints().remove(0);
            for is_damaged in [false, true] {
                if is_damaged {
                    rig.flip(&newest, 4_096 + 20);
                }
                let found = open(&rig.disk.crash(seed), 99).2;
                let wrong = found.reasons.iter().filter(|reason| **reason != Reason::Checkpoint).count();
                assert_eq!((found.live, wrong, found.held), (rig.live.clone(), 0, 0), "seed {seed}, round {round}");
            }
            rig.flip(&newest, 4_096 + 20);
        }
        given_up += rig.log.statistics().segments_given_up - before;
    }
    assert!(given_up > 6, "{given_up}");
}

/// Tombstones that can't be read are reported, and what is live all the same is there.
#[test]
fn damaged_tombstones_are_reported() {
    let (mut rig, staying) = Rig::short_of_room(1);
    rig.pass_by(&staying, 6);
    // What is damaged in the very last commit can't be told from one that was not finished.
    rig.append(1, 10);
    rig.settle();
    let tombstones = rig.records(RecordKind::Tombstones);
    let (path, at, record) = tombstones.into_iter().max_by_key(|(_, _, record)| record.sequence).unwrap();
    assert!(record.archive_length > 1, "it tells of something");
    assert_eq!(rig.found().reasons, []);
    rig.flip(&path, at + record.archive_range().start);
    let found = rig.found();
    let is_it = |reason: &Reason| matches!(reason, Reason::Record { sequence, .. } if sequence.0 == record.sequence);
    assert!(found.reasons.iter().any(|reason| is_it(reason) || *reason == Reason::Frame), "{:?}", found.reasons);
    assert!(rig.live.keys().all(|id| found.live.contains_key(id)));
}

/// A segment that is full of final fates waits for checkpoints: it would take too much memory to keep them in mind.
#[test]
fn with_too_many_fates_a_segment_waits() {
    let mut rig = Rig::new(1);
    let mut staying: VecDeque<MessageId> = (0..3_000).map(|_| rig.append(1, 10)).collect();
    rig.settle();
    let given_up = rig.log.statistics().segments_given_up;
    while let Some(id) = staying.pop_front() {
        rig.finish(id, 0);
        if staying.len().is_multiple_of(20) {
            rig.settle();
        }
    }
    let statistics = rig.log.statistics();
    assert!(statistics.segments_retired > 10, "{statistics:?}");
    assert_eq!(statistics.segments_given_up, given_up);
    assert_eq!(rig.found().live, rig.live);
}

/// Whatever is written while segments are given up may fail: tombstones, a header that is covered, or what comes
/// between. Then nothing is given up for which tombstones are not durable, and no file is used again whose header may
/// still be there.
#[test]
fn what_fails_while_segments_are_given_up_gives_nothing_up() {
    let mut kinds = BTreeSet::new();
    for failing in 0..60 {
        let (mut rig, staying) = Rig::short_of_room(failing);
        rig.pass_by(&staying, 2);
        let given_up = rig.log.statistics().segments_given_up;
        rig.disk.set_faults(Faults { operations_left: Some(failing), ..Faults::default() });
        let mut rounds = 0;
        while rig.disk.failures() == 0 || rounds < 12 {
            rig.pass(2_000);
            rig.now += Duration::from_millis(5);
            while let Some(operation) = rig.log.poll_operation(rig.now, &mut ()) {
                let (failures, before) = (rig.disk.failures(), rig.log.statistics().segments_given_up);
                let describes = operation.describe();
                let progress = rig.log.handle_completion(rig.now, execute(operation));
                if rig.disk.failures() > failures {
                    assert_eq!(rig.log.statistics().segments_given_up, before);
                    let has_failed = matches!(progress, Progress::Failed { .. });
                    kinds.insert((describes.0, has_failed, describes.1 == 4_096));
                }
                if matches!(progress, Progress::Failed { .. }) {
                    rig.log.audit();
                    // What was not durable is void.
                    rig.live.retain(|id, _| rig.log.is_live(*id));
                    rig.passing.retain(|id| rig.log.is_live(*id));
                    let found = rig.found();
                    rig.live.extend(found.live.into_iter().filter(|(id, _)| rig.log.is_live(*id)));
                    assert_eq!(found.reasons, []);
                    assert!(rig.log.begin_reopen());
                }
            }
            rig.log.audit();
            rounds += 1;
        }
        rig.pass_by(&[], given_up + 3);
        let found = rig.found();
        assert_eq!((found.live, found.reasons, found.held), (rig.live.clone(), vec![], 0), "{failing}");
    }
    assert!(kinds.contains(&("write", true, false)) || kinds.contains(&("write", true, true)), "{kinds:?}");
    assert!(kinds.contains(&("write", false, true)), "{kinds:?}");
}
