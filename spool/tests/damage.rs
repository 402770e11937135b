//! Damage: any flipped bit, any truncation costs at most the records that it hits, is reported, and stops nothing else.
//!
//! `SPOOL_DAMAGE_STEP` sets how many bytes are passed over between two that are damaged (1: every byte).

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use postrider_spool::record::Answer;
use postrider_spool::sim::SimDisk;
use postrider_spool::{
    Envelope, Fate, Fetch, Log, MessageId, Outcome, Progress, Reason, Recipient, RecipientResult, RecoverOptions,
    Recovered, Sequence, Spool, SpoolOptions, Summarize, execute,
};

const SEGMENT_BYTES: u64 = 32 << 10;

fn open(disk: &SimDisk, visit: &mut dyn FnMut(Recovered<'_>)) -> (Spool, Log) {
    let options = SpoolOptions { segment_bytes: SEGMENT_BYTES, ..SpoolOptions::default() };
    let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), options).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let options = RecoverOptions { seed: 3, event_cursor: Sequence(0), reads_everything: true };
    let log = Log::recover(directory, options, visit).unwrap();
    log.audit();
    (spool, log)
}

/// What an owner that keeps nothing to itself tells of its messages.
struct Told;

impl Summarize for Told {
    fn begin(&mut self) {}
    fn summarize(&mut self, _: MessageId, _: u32, summary: &mut Vec<u8>) {
        summary.push(1);
    }
}

fn commit(log: &mut Log) {
    while let Some(operation) = log.poll_operation(Duration::ZERO, &mut Told) {
        log.handle_completion(Duration::ZERO, execute(operation));
    }
}

fn body(number: usize) -> Vec<u8> {
    vec![number as u8; 300 + number * 40]
}

/// What a disk with damage gave back: the bodies by message, and whether anything was reported.
#[derive(Debug, Default)]
struct Found {
    bodies: BTreeMap<MessageId, (Vec<u8>, Option<u32>)>,
    cuts: usize,
    quarantines: usize,
}

fn recover(disk: &SimDisk) -> Found {
    let mut found = Found::default();
    open(disk, &mut |recovered| match recovered {
        Recovered::Message { id, message, results, .. } => {
            assert_eq!(message.envelope().unwrap().recipients.len(), 1);
            let attempts = results.first().map(|result| result.attempts);
            assert!(found.bodies.insert(id, (message.body().to_vec(), attempts)).is_none());
        }
        Recovered::Cut(_) => found.cuts += 1,
        Recovered::Quarantined(_) => found.quarantines += 1,
        Recovered::Record { .. } => {}
        other @ (Recovered::Summary { .. } | Recovered::Held { .. }) => panic!("{other:?}"),
    });
    found
}

/// Two segments: in the first five commits of two messages and one of outcomes, in the second one more commit.
fn prepare() -> (SimDisk, Vec<Vec<MessageId>>) {
    prepare_parts(2)
}

fn prepare_parts(parts: usize) -> (SimDisk, Vec<Vec<MessageId>>) {
    let disk = SimDisk::new(1);
    let (mut commits, mut all) = (Vec::new(), Vec::<MessageId>::new());
    for part in 0..parts {
        let (_spool, mut log) = open(&disk, &mut |_| {});
        for _ in 0..[5, 1][part] {
            let mut ids = Vec::new();
            for _ in 0..2 {
                let recipients = vec![Recipient { address: "b@example.net".into() }];
                let envelope = Envelope { recipients, ..Envelope::default() };
                ids.push(log.append_message(&envelope, b"P", &body(all.len())).unwrap().0);
                all.extend(ids.last());
            }
            commit(&mut log);
            commits.push(ids);
        }
        if part == 0 {
            for id in &all {
                let result = RecipientResult {
                    index: 0,
                    recipient: "b@example.net".into(),
                    queue: "example.net".into(),
                    fate: Fate::Deferred { due_ms: 5 },
                    attempts: 1,
                    answer: Answer::default(),
                };
                log.append_outcome(&Outcome { message: id.to_raw(), results: vec![result], ..Outcome::default() })
                    .unwrap();
            }
            commit(&mut log);
        }
    }
    (disk, commits)
}

fn check(found: &Found, commits: &[Vec<MessageId>], what: &str) {
    let all: Vec<MessageId> = commits.iter().flatten().copied().collect();
    for (id, (bytes, _)) in &found.bodies {
        let number = all.iter().position(|other| other == id).unwrap_or_else(|| panic!("{what}: {id} out of nothing"));
        assert_eq!(*bytes, body(number), "{what}");
    }
    let hit: Vec<usize> =
        (0..commits.len()).filter(|commit| commits[*commit].iter().any(|id| !found.bodies.contains_key(id))).collect();
    assert!(hit.len() <= 1, "{what}: commits {hit:?} lost messages");
    if !hit.is_empty() {
        assert!(found.cuts + found.quarantines > 0, "{what}: lost without a word");
    }
}

#[test]
fn a_flipped_bit_costs_what_it_hits() {
    let step = std::env::var("SPOOL_DAMAGE_STEP").map_or(31, |step| step.parse().unwrap());
    let (disk, commits) = prepare();
    let whole = recover(&disk);
    assert_eq!((whole.bodies.len(), whole.cuts, whole.quarantines), (12, 0, 0));
    let (mut lost, mut reported) = (0, 0);
    for (name, used) in [("segment-0000", 7 * 4096), ("segment-0001", 2 * 4096)] {
        let path = Path::new("/spool/log-0000").join(name);
        let good = disk.bytes(&path);
        for position in (0..used + 4096).step_by(step) {
            // The version is the one field that may refuse the whole: another one is not ours to judge.
            if (12..14).contains(&position) {
                continue;
            }
            let copy = disk.restart();
            let mut bytes = good.clone();
            bytes[position] ^= 1 << (position % 8);
            copy.set_bytes(&path, bytes);
            let found = recover(&copy);
            check(&found, &commits, &format!("{name} at {position}"));
            lost += usize::from(found.bodies.len() < 12);
            reported += found.cuts + found.quarantines;
            // Retry state is lost only with the record that held it.
            let stateless = found.bodies.values().filter(|(_, attempts)| attempts.is_none()).count();
            assert!(stateless <= 2 + 10 * usize::from(position / 4096 == 6), "{name} at {position}");
        }
    }
    assert!(lost > 0);
    assert!(reported >= lost);
}

/// Its frames say all that a header needs, so a damaged one is reported once, and written anew.
#[test]
fn a_damaged_header_is_mended() {
    let (disk, _) = prepare();
    for name in ["segment-0000", "segment-0001"] {
        let path = Path::new("/spool/log-0000").join(name);
        let copy = disk.restart();
        let good = disk.bytes(&path);
        let mut bytes = good.clone();
        bytes[30] ^= 1;
        copy.set_bytes(&path, bytes);
        let found = recover(&copy);
        assert_eq!((found.bodies.len(), found.cuts + found.quarantines), (12, 1), "{name}");
        // Only what it told of the other chain is gone.
        assert_eq!(copy.unsynced(), 0);
        let (mended, mut good) = (copy.bytes(&path), good);
        good[112..144].fill(0);
        assert_eq!(mended[12..], good[12..], "{name}");
        let found = recover(&copy);
        assert_eq!((found.bodies.len(), found.cuts + found.quarantines), (12, 0), "{name}");
    }
}

#[test]
fn a_truncated_segment_costs_what_is_gone() {
    let (disk, commits) = prepare();
    let path = Path::new("/spool/log-0000/segment-0000");
    let good = disk.bytes(path);
    for length in (0..good.len()).step_by(512) {
        let copy = disk.restart();
        copy.set_bytes(path, good[..length].to_vec());
        let found = recover(&copy);
        // Frames begin at the second block, one a block.
        let whole = (length / 4096).saturating_sub(1).min(5);
        let expected: Vec<MessageId> = commits[..whole].iter().chain(&commits[5..]).flatten().copied().collect();
        assert_eq!(found.bodies.keys().copied().collect::<Vec<_>>(), expected, "{length}");
        assert!(found.quarantines > 0, "{length}");
    }
}

/// A whole segment that is gone is noticed.
#[test]
fn a_missing_segment_is_reported() {
    let (disk, commits) = prepare();
    let found = {
        let copy = disk.restart();
        copy.set_bytes(Path::new("/spool/log-0000/segment-0000"), vec![0; SEGMENT_BYTES as usize]);
        recover(&copy)
    };
    assert_eq!(found.bodies.keys().copied().collect::<Vec<_>>(), commits[5]);
    assert_eq!(found.quarantines, commits[..5].iter().flatten().count(), "the checkpoint knows each of them");
}

/// Nothing of a segment is left but its header: that tells of numbers before its own, which are not given out again.
#[test]
fn a_header_alone_tells_of_numbers() {
    let (disk, commits) = prepare();
    let path = Path::new("/spool/log-0000/segment-0001");
    let mut bytes = disk.bytes(path);
    bytes[4096..].fill(0);
    disk.set_bytes(path, bytes);
    for name in ["segment-0000", "checkpoint-0", "checkpoint-1", "checkpoint-2"] {
        disk.set_bytes(&Path::new("/spool/log-0000").join(name), Vec::new());
    }
    let (_spool, mut log) = open(&disk, &mut |_| {});
    let (next, commit) = log.append_message(&Envelope::default(), b"P", b"B").unwrap();
    assert!(next.sequence().0 > commits[4][1].sequence().0 + 10, "{next}");
    assert!(commit.0 > 6, "{commit:?}");
}

/// Nothing in a log names its newest segment, but the event log has told of what was in it. No id is given out again.
#[test]
fn a_missing_end_is_reported() {
    let (disk, commits) = prepare();
    let last = commits[5][1].sequence();
    for gone in [&["segment-0001"][..], &["segment-0000", "segment-0001"]] {
        let copy = disk.restart();
        // A checkpoint that was begun later would tell of it.
        for name in gone.iter().chain(&["checkpoint-0", "checkpoint-1", "checkpoint-2"]) {
            copy.set_bytes(&Path::new("/spool/log-0000").join(name), Vec::new());
        }
        let options = SpoolOptions { segment_bytes: SEGMENT_BYTES, ..SpoolOptions::default() };
        let mut spool = Spool::open_on(Arc::new(copy), Path::new("/spool"), options).unwrap();
        let directory = spool.assign(1).unwrap().remove(0).remove(0);
        let options = RecoverOptions { seed: 3, event_cursor: last, reads_everything: true };
        let (mut live, mut missing) = (0, Vec::new());
        let mut log = Log::recover(directory, options, &mut |recovered| match recovered {
            Recovered::Message { .. } => live += 1,
            Recovered::Quarantined(quarantine) => missing.push(quarantine.reason),
            other => panic!("{other:?}"),
        })
        .unwrap();
        assert_eq!(live, 10 * usize::from(gone.len() == 1));
        let [Reason::EndMissing { from, to }] = missing[..] else { panic!("{missing:?}") };
        assert_eq!((from.0 <= commits[5][0].sequence().0, to), (true, last));
        let (next, _) = log.append_message(&Envelope::default(), b"P", b"B").unwrap();
        assert_eq!(next.sequence().0, last.0 + 1);
    }
}

/// The same where it is a single record.
#[test]
fn one_missing_record_is_reported() {
    let (disk, commits) = prepare();
    let gone = Sequence(commits[5][1].sequence().0 + 1);
    let options = SpoolOptions { segment_bytes: SEGMENT_BYTES, ..SpoolOptions::default() };
    let mut spool = Spool::open_on(Arc::new(disk), Path::new("/spool"), options).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let mut missing = Vec::new();
    let options = RecoverOptions { seed: 3, event_cursor: gone, ..RecoverOptions::default() };
    let mut log = Log::recover(directory, options, &mut |recovered| {
        if let Recovered::Quarantined(quarantine) = recovered {
            missing.push(quarantine.reason);
        }
    })
    .unwrap();
    assert_eq!(missing, [Reason::EndMissing { from: gone, to: gone }]);
    let (next, _) = log.append_message(&Envelope::default(), b"P", b"B").unwrap();
    assert_eq!(next.sequence().0, gone.0 + 1);
}

/// A start that reads only what it needs finds less damage by itself, but what it did not read is checked when it is
/// wanted: then a message is what was written, or there is an error.
#[test]
fn damage_that_a_quick_start_passes_over_is_found_in_time() {
    let step = std::env::var("SPOOL_DAMAGE_STEP").map_or(31, |step| step.parse().unwrap());
    let (disk, commits) = prepare();
    let all: Vec<MessageId> = commits.iter().flatten().copied().collect();
    let names = ["segment-0000", "segment-0001", "checkpoint-0", "checkpoint-1", "checkpoint-2"];
    let mut summaries = 0_u64;
    for name in names {
        let path = Path::new("/spool/log-0000").join(name);
        let good = disk.bytes(&path);
        for position in (0..good.len()).step_by(step).filter(|position| !(12..14).contains(position)) {
            let what = format!("{name} at {position}");
            let copy = disk.restart();
            let mut bytes = good.clone();
            bytes[position] ^= 1 << (position % 8);
            copy.set_bytes(&path, bytes);
            let (mut live, mut reports) = (Vec::new(), 0);
            let options = SpoolOptions { segment_bytes: SEGMENT_BYTES, ..SpoolOptions::default() };
            let mut spool = Spool::open_on(Arc::new(copy), Path::new("/spool"), options).unwrap();
            let directory = spool.assign(1).unwrap().remove(0).remove(0);
            let options = RecoverOptions { seed: 3, ..RecoverOptions::default() };
            let mut log = Log::recover(directory, options, &mut |recovered| match recovered {
                Recovered::Message { id, .. } => live.push(id),
                Recovered::Summary { id, pending: Some(_), handle, .. } => {
                    *handle = Some(0);
                    summaries += 1;
                    live.push(id);
                }
                Recovered::Quarantined(_) | Recovered::Cut(_) => reports += 1,
                Recovered::Record { .. } | Recovered::Summary { .. } => {}
                Recovered::Held { .. } => panic!("{what}"),
            })
            .unwrap();
            let mut lost = all.len() - live.len();
            for id in live {
                let Ok(Fetch::Read(operation)) = log.message(id) else { panic!("{what}") };
                let completion = execute(operation);
                let Progress::Read { result, .. } = log.handle_completion(Duration::ZERO, completion) else { panic!() };
                match result {
                    Ok(message) => {
                        let number = all.iter().position(|other| *other == id).unwrap();
                        assert_eq!(message.body(), body(number), "{what}");
                    }
                    Err(_) => {
                        lost += 1;
                        reports += 1;
                    }
                }
            }
            assert!(lost <= 2 * usize::from(name.starts_with("segment")), "{what}: {lost} lost");
            assert!(lost == 0 || reports > 0, "{what}: lost without a word");
        }
    }
    assert!(summaries > 0);
}

/// Behind a damaged first block several commits are found, or one, or none. Only the last two may be a use that was
/// begun and never acknowledged, and are told as such: all that is known to have been acknowledged is told as damage.
#[test]
fn a_damaged_header_is_told_as_what_it_is() {
    let name = Path::new("/spool/log-0000/segment-0000");
    for (parts, cuts, quarantines) in [(1, 0, 1), (2, 0, 1)] {
        let (disk, commits) = prepare_parts(parts);
        // Without checkpoints, which know better.
        for slot in 0..3 {
            disk.set_bytes(&Path::new("/spool/log-0000").join(format!("checkpoint-{slot}")), Vec::new());
        }
        let mut bytes = disk.bytes(name);
        bytes[30] ^= 1;
        disk.set_bytes(name, bytes);
        let found = recover(&disk);
        assert_eq!((found.cuts, found.quarantines), (cuts, quarantines), "{parts} segments");
        assert_eq!(found.bodies.len(), commits.iter().flatten().count());
    }
}
