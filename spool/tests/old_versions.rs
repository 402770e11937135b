//! Spools that earlier versions wrote are read, and go on: the golden dumps of those are turned back into files.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use postrider_spool::format::{
    Chain, FRAME_HEADER_BYTES, FrameHeader, RECORD_HEADER_BYTES, RecordHeader, SEGMENT_HEADER_BYTES, Seal,
    SegmentBlock, SegmentHeader,
};
use postrider_spool::record::Answer;
use postrider_spool::sim::SimDisk;
use postrider_spool::{
    Envelope, Fate, Log, LogId, MessageId, Outcome, Progress, Recipient, RecipientResult, RecoverOptions, Recovered,
    Sequence, Spool, SpoolOptions, Storage as _, execute,
};

const SEGMENT_BYTES: usize = 32 << 10;

/// Small messages in the disk of version 2.
const KEPT_OF_VERSION_2: [u64; 22] =
    [11, 14, 17, 20, 23, 31, 58, 63, 68, 72, 77, 81, 85, 89, 93, 97, 102, 106, 110, 115, 119, 125];

/// What recovery told of a message: pending recipients, and index, attempts and due time of those that were deferred.
type Told = (MessageId, Vec<u32>, Vec<(u32, u32, u64)>);

/// The file that a dump shows; lines of zeros are left out of one.
fn undump(name: &str, bytes: usize) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let mut file = vec![0; bytes];
    for line in std::fs::read_to_string(path).unwrap().lines() {
        let mut words = line[..line.len().min(56)].split_whitespace();
        let at = usize::from_str_radix(words.next().unwrap(), 16).unwrap();
        for (offset, word) in words.enumerate() {
            file[at + offset] = u8::from_str_radix(word, 16).unwrap();
        }
    }
    file
}

fn golden_disk() -> SimDisk {
    let disk = SimDisk::new(1);
    disk.create_directory(Path::new("/spool/log-0000")).unwrap();
    disk.set_bytes(Path::new("/spool/SPOOL"), undump("meta-v1.txt", 64));
    disk.set_bytes(Path::new("/spool/log-0000/segment-0000"), undump("segment-v1.txt", SEGMENT_BYTES));
    disk
}

fn open(disk: &SimDisk, seed: u64) -> (Spool, Log, Vec<Told>) {
    open_with(disk, RecoverOptions { seed, event_cursor: Sequence(u64::MAX), ..RecoverOptions::default() })
}

fn open_with(disk: &SimDisk, recover: RecoverOptions) -> (Spool, Log, Vec<Told>) {
    let options = SpoolOptions { segment_bytes: SEGMENT_BYTES as u64, ..SpoolOptions::default() };
    let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), options).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let mut told = Vec::new();
    let log = Log::recover(directory, recover, &mut |recovered| match recovered {
        Recovered::Message { id, message, pending, results, .. } => {
            assert!(message.content_matches());
            let states = results.iter().map(|result| match result.fate {
                Fate::Deferred { due_ms } => (result.index, result.attempts, due_ms),
                fate => panic!("{fate:?}"),
            });
            told.push((id, pending.to_vec(), states.collect()));
            if message.prefix() == b"Received: here\r\n" {
                let envelope = message.envelope().unwrap().to_envelope();
                assert_eq!(envelope.reverse_path, "sender@example.com");
                assert!(["second@example.net", "r1@example.net"].contains(&&*envelope.recipients[1].address));
                assert_eq!(message.body(), b"Subject: Golden\r\n\r\n.dot\r\n");
            }
        }
        other => panic!("{other:?}"),
    })
    .unwrap();
    told.sort_unstable();
    (spool, log, told)
}

fn settle(log: &mut Log, now: Duration) {
    while let Some(operation) = log.poll_operation(now, &mut ()) {
        let progress = log.handle_completion(now, execute(operation));
        assert!(!matches!(progress, Progress::Failed { .. }));
    }
}

/// The message in the golden segment.
fn first() -> MessageId {
    MessageId::new(LogId(0), Sequence(1))
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

fn version(disk: &SimDisk, segment: &str) -> u16 {
    let bytes = disk.bytes(&Path::new("/spool/log-0000").join(segment));
    u16::from_le_bytes(bytes[12..14].try_into().unwrap())
}

#[test]
fn a_spool_of_version_1_goes_on() {
    let disk = golden_disk();
    assert_eq!(version(&disk, "segment-0000"), 1);
    let golden = (first(), vec![0, 1], vec![(0, 3, 1_700_000_300_000)]);
    {
        let (_spool, mut log, told) = open(&disk, 1);
        assert_eq!(told, std::slice::from_ref(&golden));
        let recipients = vec![Recipient::default()];
        let (id, _) = log.append_message(&Envelope { recipients, ..Envelope::default() }, b"", b"new").unwrap();
        assert_eq!(id.sequence(), Sequence(3), "the numbers go on");
        settle(&mut log, Duration::ZERO);
    }
    assert_eq!((version(&disk, "segment-0000"), version(&disk, "segment-0001")), (1, 4));
    let second = (MessageId::new(LogId(0), Sequence(3)), vec![0], vec![]);
    let (spool, mut log, told) = open(&disk.restart(), 2);
    assert_eq!(told, [golden.clone(), second.clone()]);
    drop((spool, log));

    // State of today on top of state of then, and checkpoints.
    let disk = disk.restart();
    let spool;
    (spool, log, _) = open(&disk, 3);
    log.append_outcome(&outcome(first(), 1, Fate::Deferred { due_ms: 7 }, 1)).unwrap();
    let golden = (first(), vec![0, 1], vec![(0, 3, 1_700_000_300_000), (1, 1, 7)]);
    for round in 0..40 {
        let recipients = vec![Recipient::default()];
        let envelope = Envelope { recipients, ..Envelope::default() };
        if let Ok((id, _)) = log.append_message(&envelope, b"", &[b'x'; 7_000]) {
            log.append_outcome(&outcome(id, 0, Fate::Delivered, 1)).unwrap();
        }
        settle(&mut log, Duration::from_millis(round * 60));
        assert_eq!(open(&disk.restart(), 4).2, [golden.clone(), second.clone()]);
    }
    assert!(log.statistics().checkpoints > 2);
    assert!(log.statistics().segments_retired > 2);
    log.append_outcome(&outcome(first(), 0, Fate::Delivered, 4)).unwrap();
    log.append_outcome(&outcome(first(), 1, Fate::Bounced, 4)).unwrap();
    settle(&mut log, Duration::from_secs(9));
    drop((spool, log));
    assert_eq!(open(&disk.restart(), 5).2, [second]);
}

/// The golden copy, in a segment made for it: what it tells takes the place of message and outcome.
#[test]
fn a_copy_of_version_1_counts() {
    let disk = golden_disk();
    let length = 0x220;
    let record = undump("copy-v1.txt", length);
    let header = RecordHeader::decode(&record[..RECORD_HEADER_BYTES]);
    assert_eq!((header.checked_length(), header.message), (Some(length), first().to_raw()));
    let head = &record[..header.head_bytes()];
    let generation = generations(42).take(100).find(|generation| header.head_matches(*generation, head)).unwrap();
    let golden = undump("segment-v1.txt", SEGMENT_BYTES);
    let SegmentBlock::Header(before) = SegmentHeader::decode(&golden[..SEGMENT_HEADER_BYTES]) else { panic!() };
    let segment = SegmentHeader {
        log: LogId(0),
        number: 9,
        generation,
        first_sequence: header.sequence,
        first_commit: 20,
        tail: 1,
        previous: Seal { number: 1, generation: before.generation, end: 3 * 4_096, last_commit: 2 },
        capacity: SEGMENT_BYTES as u64,
        discarded: 0,
        chain: Chain::Mail,
        other: Seal::default(),
    };
    let mut bytes = vec![0; SEGMENT_BYTES];
    segment.encode(&mut bytes[..SEGMENT_HEADER_BYTES]);
    into_version_1(&mut bytes);
    let at = SEGMENT_HEADER_BYTES + FRAME_HEADER_BYTES;
    bytes[at..at + length].copy_from_slice(&record);
    let frame = FrameHeader {
        log: LogId(0),
        segment: 9,
        generation,
        commit: 20,
        first_sequence: header.sequence,
        record_count: 1,
        length: (FRAME_HEADER_BYTES + length) as u32,
        crc: 0,
    };
    frame.encode(crc32c(0, &record[..RECORD_HEADER_BYTES]), &mut bytes[SEGMENT_HEADER_BYTES..at]);
    disk.set_bytes(Path::new("/spool/log-0000/segment-0001"), bytes);
    let copied = (first(), vec![0], vec![(0, 3, 1_700_000_300_000)]);
    assert_eq!(open(&disk, 1).2, std::slice::from_ref(&copied));
    // Also when the segment of what was copied is used again.
    disk.set_bytes(Path::new("/spool/log-0000/segment-0000"), vec![0; SEGMENT_BYTES]);
    let path = Path::new("/spool/log-0000/segment-0001");
    let mut bytes = disk.bytes(path);
    bytes[48..56].copy_from_slice(&9_u64.to_le_bytes());
    into_version_1(&mut bytes);
    disk.set_bytes(path, bytes);
    assert_eq!(open(&disk, 2).2, [copied]);
}

/// Outcomes of version 1 named the one before. That is not taken for a shared body, nor for anything else.
#[test]
fn links_between_outcomes_are_ignored() {
    let disk = SimDisk::new(1);
    let (spool, mut log, _) = open(&disk, 1);
    let recipients = vec![Recipient::default(); 2];
    let (id, _) = log.append_message(&Envelope { recipients, ..Envelope::default() }, b"", b"x").unwrap();
    for index in 0..2 {
        settle(&mut log, Duration::ZERO);
        log.append_outcome(&outcome(id, index, Fate::Deferred { due_ms: 5 }, 4)).unwrap();
    }
    settle(&mut log, Duration::ZERO);
    drop((spool, log));
    let path = Path::new("/spool/log-0000/segment-0000");
    let mut bytes = disk.bytes(path);
    into_version_1(&mut bytes);
    // The third frame, and the record in it.
    let at = 3 * 4_096;
    let frame = FrameHeader::decode(&bytes[at..]);
    let (position, record) = frame.records(&bytes[at..]).unwrap()[0];
    let start = at + position;
    bytes[start + 20..start + 24].copy_from_slice(&9_u32.to_le_bytes());
    bytes[start + 40..start + 48].copy_from_slice(&1_u64.to_le_bytes());
    bytes[start + 48..start + 52].copy_from_slice(&0x204_u32.to_le_bytes());
    let seed = [frame.generation.to_le_bytes(), record.sequence.to_le_bytes()].concat();
    let crc = crc32c(crc32c(0, &seed), &bytes[start..start + 56]);
    let crc = crc32c(crc, &bytes[start + RECORD_HEADER_BYTES..start + record.head_bytes()]);
    bytes[start + 56..start + 60].copy_from_slice(&crc.to_le_bytes());
    let records = crc32c(0, &bytes[start..start + RECORD_HEADER_BYTES]);
    frame.encode(records, &mut bytes[at..at + FRAME_HEADER_BYTES]);
    disk.set_bytes(path, bytes);
    assert_eq!(open(&disk, 2).2, [(id, vec![0, 1], vec![(0, 4, 5), (1, 4, 5)])]);
}

/// Sets the version of a segment's header that has nothing of later ones but that there is no chain of copies.
fn into_version_1(segment: &mut [u8]) {
    segment[12..14].copy_from_slice(&1_u16.to_le_bytes());
    assert_eq!(segment[96..112], [0; 16]);
    assert_eq!(segment[112..120], [0; 8]);
    segment[112..144].fill(0);
    let crc = crc32c(0, &segment[12..SEGMENT_HEADER_BYTES]);
    segment[8..12].copy_from_slice(&crc.to_le_bytes());
}

/// Segment generations in the order in which a log with this seed draws them (SplitMix64).
fn generations(seed: u64) -> impl Iterator<Item = u64> {
    (1..).map(move |draw: u64| {
        let mut mixed = seed.wrapping_add(draw.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    })
}

/// CRC-32C bit by bit, going on from that of what came before.
fn crc32c(before: u32, bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!before, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & 0_u32.wrapping_sub(crc & 1)))
    })
}

/// The files of `spool-v2.txt`: each begins with a line of its path and length, and goes on as other dumps.
fn disk_of_version_2() -> SimDisk {
    let disk = SimDisk::new(1);
    disk.create_directory(Path::new("/spool/log-0000")).unwrap();
    let mut files: Vec<(&Path, Vec<u8>)> = Vec::new();
    let dump = include_str!("golden/spool-v2.txt");
    for line in dump.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap();
        if first.starts_with('/') {
            files.push((Path::new(first), vec![0; words.next().unwrap().parse().unwrap()]));
            continue;
        }
        let at = usize::from_str_radix(first, 16).unwrap();
        for (offset, word) in words.enumerate() {
            files.last_mut().unwrap().1[at + offset] = u8::from_str_radix(word, 16).unwrap();
        }
    }
    for (path, bytes) in files {
        disk.set_bytes(path, bytes);
    }
    disk
}

/// Of that disk: a message with two recipients that was copied and deferred again, one that shares a body, one with
/// many recipients whose state was told by one record, 22 small ones, and the last, with three recipients.
fn told_of_version_2() -> Vec<Told> {
    let id = |sequence| MessageId::new(LogId(0), Sequence(sequence));
    let wide_states = (0..20).filter(|index| *index != 3).map(|index| (index, 2, 1_700_000_400_000 + u64::from(index)));
    let mut told = vec![
        (id(1), vec![0], vec![(0, 2, 1_700_000_900_000)]),
        (id(5), vec![0], vec![]),
        (id(0x24), (0..40).filter(|index| *index != 3).collect(), wide_states.collect()),
        (id(0x81), vec![0, 1, 2], vec![(1, 1, 1_700_000_500_000)]),
    ];
    told.extend(KEPT_OF_VERSION_2.map(|sequence| (id(sequence), vec![0], vec![])));
    told.sort_unstable();
    told
}

/// Checkpoints, copies, states and shared bodies of version 2: by what a checkpoint tells, and by all segments.
#[test]
fn a_spool_of_version_2_goes_on() {
    let (_, _, told) = open_all(&disk_of_version_2(), 1);
    assert_eq!(told, told_of_version_2());

    // As a start would have it that believes the checkpoint.
    let mut summaries = 0;
    let disk = disk_of_version_2();
    {
        let (_spool, mut log) = open_counting(&disk, &mut summaries);
        assert_eq!(log.statistics().live_messages, told_of_version_2().len() as u64);
        log.append_outcome(&outcome(first(), 0, Fate::Delivered, 3)).unwrap();
        settle(&mut log, Duration::ZERO);
    }
    assert!(summaries > 10, "{summaries}");
    let (_, _, told) = open_all(&disk.restart(), 2);
    assert_eq!(told, told_of_version_2()[1..]);

    // Checkpoints, copies and states of today take the place of those of then.
    let disk = disk.restart();
    let (spool, mut log, _) = open_all(&disk, 3);
    let mut left = told_of_version_2()[1..].to_vec();
    for sequence in KEPT_OF_VERSION_2.iter().skip(1).step_by(2) {
        let id = MessageId::new(LogId(0), Sequence(*sequence));
        log.append_outcome(&outcome(id, 0, Fate::Delivered, 1)).unwrap();
        left.retain(|(told, ..)| *told != id);
    }
    for round in 0..60 {
        let envelope = Envelope { recipients: vec![Recipient::default()], ..Envelope::default() };
        if round % 2 == 0 {
            let (id, _) = log.append_message(&envelope, b"", &[b'x'; 1_000]).unwrap();
            left.push((id, vec![0], vec![]));
        }
        let (filler, _) = log.append_message(&envelope, b"", &[b'x'; 20_000]).unwrap();
        log.append_outcome(&outcome(filler, 0, Fate::Delivered, 1)).unwrap();
        for millis in 0..6 {
            settle(&mut log, Duration::from_millis(round * 200 + millis * 30));
        }
        assert_eq!(open_all(&disk.restart(), 4).2, left);
    }
    assert!(log.statistics().checkpoints > 2);
    assert!(log.statistics().messages_copied > 5);
    drop((spool, log));
}

/// Reads all records, whatever a checkpoint tells.
fn open_all(disk: &SimDisk, seed: u64) -> (Spool, Log, Vec<Told>) {
    let recover = RecoverOptions { seed, event_cursor: Sequence(u64::MAX), reads_everything: true };
    open_with(disk, recover)
}

/// Counts the messages that are told by summaries.
fn open_counting(disk: &SimDisk, summaries: &mut u32) -> (Spool, Log) {
    let options = SpoolOptions { segment_bytes: SEGMENT_BYTES as u64, ..SpoolOptions::default() };
    let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), options).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let recover = RecoverOptions { seed: 1, event_cursor: Sequence(u64::MAX), ..RecoverOptions::default() };
    let log = Log::recover(directory, recover, &mut |recovered| match recovered {
        Recovered::Summary { summary, pending, handle, .. } => {
            assert_eq!(summary, b"sss");
            *handle = pending.map(|_| 3);
            *summaries += 1;
        }
        Recovered::Message { .. } => {}
        other => panic!("{other:?}"),
    })
    .unwrap();
    (spool, log)
}
