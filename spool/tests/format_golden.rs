//! The bytes on disk, pinned: the meta file, a segment with a message and an outcome, each kind of record that is made
//! of older ones, and a checkpoint.
//!
//! A change here is a new format version. `UPDATE_GOLDEN=1` writes the files anew.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use postrider_spool::checkpoint_format::{CheckpointBlock, CheckpointHeader};
use postrider_spool::format::{
    FrameHeader, Meta, RECORD_HEADER_BYTES, RecordHeader, RecordKind, SEGMENT_HEADER_BYTES, Seal, SegmentBlock,
    SegmentHeader,
};
use postrider_spool::record::Answer;
use postrider_spool::sim::SimDisk;
use postrider_spool::{
    Envelope, Fate, Log, LogId, MessageId, Outcome, Recipient, RecipientResult, RecoverOptions, Sequence, Spool,
    SpoolOptions, Summarize, execute,
};

fn open(disk: &SimDisk) -> (Spool, Log) {
    let options = SpoolOptions { segment_bytes: 32 << 10, ..SpoolOptions::default() };
    let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), options).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let recover = RecoverOptions { seed: 42, event_cursor: Sequence(u64::MAX), ..RecoverOptions::default() };
    let log = Log::recover(directory, recover, &mut |_| {}).unwrap();
    (spool, log)
}

fn settle(log: &mut Log, now: Duration) {
    while let Some(operation) = log.poll_operation(now, &mut ()) {
        log.handle_completion(now, execute(operation));
    }
}

fn envelope() -> Envelope {
    Envelope {
        reverse_path: "sender@example.com".into(),
        recipients: vec![
            Recipient { address: "first@example.net".into() },
            Recipient { address: "second@example.net".into() },
        ],
        tenant: "acme".into(),
        campaign: "autumn".into(),
        egress_pool: "shared".into(),
        priority: 1,
        created_ms: 1_700_000_000_000,
        first_attempt_ms: 1_700_000_000_000,
        expires_ms: 1_700_432_000_000,
        dot_lines: true,
        reception_protocol: "ESMTP".into(),
        client_address: "192.0.2.1:4321".into(),
        client_name: "client.example.com".into(),
        session_id: 9,
        headers: vec![("Subject".into(), "Golden".into())],
        ..Envelope::default()
    }
}

fn outcome(id: MessageId, index: u32, fate: Fate) -> Outcome {
    let result = RecipientResult {
        index,
        recipient: "first@example.net".into(),
        queue: "example.net".into(),
        fate,
        attempts: 3,
        answer: Answer {
            code: 451,
            enhanced: Some((4, 7, 1)),
            text: "try again".into(),
            command: "RCPT TO:<first@example.net>".into(),
        },
    };
    Outcome { message: id.to_raw(), at_ms: 1_700_000_001_000, results: vec![result], ..Outcome::default() }
}

/// Sixteen bytes a line; lines of zeros are left out.
fn dump(bytes: &[u8]) -> String {
    let mut text = String::new();
    for (line, bytes) in bytes.chunks(16).enumerate().filter(|(_, bytes)| bytes.iter().any(|byte| *byte != 0)) {
        write!(text, "{:06x} ", line * 16).unwrap();
        bytes.iter().for_each(|byte| write!(text, " {byte:02x}").unwrap());
        let shown = bytes.iter().map(|byte| if byte.is_ascii_graphic() { char::from(*byte) } else { '.' });
        writeln!(text, "  {}", shown.collect::<String>()).unwrap();
    }
    text
}

fn compare(name: &str, bytes: &[u8]) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let found = dump(bytes);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &found).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap();
    assert!(golden == found, "{name} differs; expected\n{golden}\nfound\n{found}");
}

#[test]
fn the_bytes_are_these() {
    let disk = SimDisk::new(1);
    let (_spool, mut log) = open(&disk);
    let (id, _) = log.append_message(&envelope(), b"Received: here\r\n", b"Subject: Golden\r\n\r\n.dot\r\n").unwrap();
    settle(&mut log, Duration::ZERO);
    log.append_outcome(&outcome(id, 0, Fate::Deferred { due_ms: 1_700_000_300_000 })).unwrap();
    settle(&mut log, Duration::ZERO);
    let segment = disk.bytes(Path::new("/spool/log-0000/segment-0000"));
    compare("segment-v4.txt", &segment);
    compare("meta-v4.txt", &disk.bytes(Path::new("/spool/SPOOL")));

    // And they say what FORMAT.md says.
    let SegmentBlock::Header(header) = SegmentHeader::decode(&segment[..SEGMENT_HEADER_BYTES]) else { panic!() };
    assert_eq!((header.log, header.number, header.first_sequence, header.first_commit), (LogId(0), 1, 1, 1));
    assert_eq!((header.previous.number, header.tail, header.capacity), (0, 1, 32 << 10));
    assert_eq!(header.other, Seal::NOTHING);
    let frame = FrameHeader::decode(&segment[4096..]);
    assert_eq!((frame.segment, frame.commit, frame.first_sequence, frame.record_count), (1, 1, 1, 1));
    assert_eq!(frame.generation, header.generation);
    let records = frame.records(&segment[4096..]).unwrap();
    assert_eq!(records[0].1.kind, RecordKind::Message as u8);
    let second = FrameHeader::decode(&segment[8192..]);
    let (position, record) = second.records(&segment[8192..]).unwrap()[0];
    assert_eq!((second.commit, record.kind, record.message), (2, RecordKind::Outcome as u8, id.to_raw()));
    assert_eq!(position, 64);
    assert_eq!(Meta::decode(&disk.bytes(Path::new("/spool/SPOOL"))).unwrap(), Meta { next_log: 1 });
}

/// Records of one kind about one message or body, header and bytes.
fn records(disk: &SimDisk, kind: RecordKind, id: MessageId) -> Vec<(RecordHeader, Vec<u8>)> {
    let mut records = all_records(disk, kind);
    records.retain(|(record, _)| record.message == id.to_raw());
    records
}

fn all_records(disk: &SimDisk, kind: RecordKind) -> Vec<(RecordHeader, Vec<u8>)> {
    let mut found = Vec::new();
    for path in disk.paths().iter().filter(|path| path.to_str().unwrap().contains("segment-")) {
        let bytes = disk.bytes(path);
        for at in (4096..bytes.len()).step_by(4096).filter(|at| FrameHeader::has_magic(&bytes[*at..])) {
            for (position, record) in FrameHeader::decode(&bytes[at..]).records(&bytes[at..]).unwrap() {
                if record.kind == kind as u8 {
                    let length = record.checked_length().unwrap();
                    found.push((record, bytes[at + position..at + position + length].to_vec()));
                }
            }
        }
    }
    found
}

#[test]
fn a_copy_is_this() {
    let disk = SimDisk::new(1);
    let (_spool, mut log) = open(&disk);
    let (id, _) = log.append_message(&envelope(), b"Received: here\r\n", b"Subject: Golden\r\n\r\n.dot\r\n").unwrap();
    log.append_outcome(&outcome(id, 0, Fate::Deferred { due_ms: 1_700_000_300_000 })).unwrap();
    log.append_outcome(&outcome(id, 1, Fate::Delivered)).unwrap();
    let mut now = Duration::ZERO;
    let recipients = || vec![Recipient::default()];
    for round in 0..20 {
        // One that stays in each segment, and one that goes.
        let envelope = Envelope { recipients: recipients(), ..Envelope::default() };
        if round > 1 {
            log.append_message(&envelope, b"", &[1; 3_000]).unwrap();
        }
        let (filler, _) = log.append_message(&envelope, b"", &[0; 20_000]).unwrap();
        log.append_outcome(&outcome(filler, 0, Fate::Delivered)).unwrap();
        settle(&mut log, now);
        now += Duration::from_millis(100);
        settle(&mut log, now);
    }
    settle(&mut log, now + Duration::from_secs(1));
    let copies = records(&disk, RecordKind::Copy, id);
    assert_eq!(copies.len(), 1);
    let (record, bytes): &(RecordHeader, Vec<u8>) = &copies[0];
    assert_eq!(&bytes[record.body_range()], b"Subject: Golden\r\n\r\n.dot\r\n");
    assert_eq!(record.archive_range().start, RECORD_HEADER_BYTES);
    compare("copy-v3.txt", bytes);
}

/// A message whose state is spread over many outcomes gets it told by one record.
#[test]
fn a_state_is_this() {
    let disk = SimDisk::new(1);
    let (_spool, mut log) = open(&disk);
    let recipients = (0..20).map(|index| Recipient { address: format!("r{index}@example.net") }).collect();
    let (id, _) = log.append_message(&Envelope { recipients, ..Envelope::default() }, b"", b"x").unwrap();
    for index in 0..20 {
        log.append_outcome(&outcome(id, index, Fate::Deferred { due_ms: 1_700_000_300_000 })).unwrap();
    }
    log.append_outcome(&outcome(id, 3, Fate::Delivered)).unwrap();
    for second in 0..3 {
        settle(&mut log, Duration::from_secs(second));
    }
    let states = records(&disk, RecordKind::State, id);
    assert_eq!(states.len(), 1);
    let (record, bytes) = &states[0];
    assert_eq!((record.content_bytes(), record.state_length, record.shared_body), (0, 0, 0));
    compare("state-v3.txt", bytes);
}

/// A body, a message that names it, and both in a checkpoint, with all kinds of rows.
#[test]
fn a_shared_body_and_a_checkpoint_are_this() {
    struct Told;
    impl Summarize for Told {
        fn begin(&mut self) {}
        fn summarize(&mut self, _: MessageId, handle: u32, summary: &mut Vec<u8>) {
            summary.extend(vec![b's'; handle as usize]);
        }
    }
    let disk = SimDisk::new(1);
    let (_spool, mut log) = open(&disk);
    let settle = |log: &mut Log, now: u64| {
        let now = Duration::from_millis(now);
        while let Some(operation) = log.poll_operation(now, &mut Told) {
            log.handle_completion(now, execute(operation));
        }
    };
    let (body, _) = log.append_body(b"Subject: Golden\r\n\r\n.dot\r\n").unwrap();
    let (id, _) = log.append_message_sharing(&envelope(), b"Received: here\r\n", body).unwrap();
    log.set_handle(id, 5);
    log.append_outcome(&outcome(id, 0, Fate::Deferred { due_ms: 1_700_000_300_000 })).unwrap();
    let recipients = vec![Recipient::default(); 70];
    let (wide, _) = log.append_message(&Envelope { recipients, ..Envelope::default() }, b"", b"x").unwrap();
    log.append_outcome(&outcome(wide, 64, Fate::Delivered)).unwrap();
    settle(&mut log, 0);
    let bodies = records(&disk, RecordKind::Body, MessageId::new(body.log(), Sequence(1)));
    compare("body-v2.txt", &bodies[0].1);
    let messages = records(&disk, RecordKind::Message, id);
    let header = &messages[0].0;
    assert_eq!((header.shared_body, header.body_length, header.shared_body_length), (1, 0, 25));
    assert_eq!(messages[0].1[20..24], [25, 0, 0, 0]);

    let (filler, _) = log.append_message(&envelope(), b"", &[0; 20_000]).unwrap();
    log.append_outcome(&outcome(filler, 0, Fate::Delivered)).unwrap();
    log.append_outcome(&outcome(filler, 1, Fate::Delivered)).unwrap();
    for now in 0..20 {
        settle(&mut log, now);
    }
    assert_eq!(log.statistics().checkpoints, 1);
    let checkpoint = disk.bytes(Path::new("/spool/log-0000/checkpoint-0"));
    compare("checkpoint-v4.txt", &checkpoint);
    let CheckpointBlock::Header(header) = CheckpointHeader::decode(&checkpoint[..4096]) else { panic!() };
    assert_eq!((header.log, header.number, header.slices, header.messages), (LogId(0), 1, 3, 2));
    assert_eq!((header.begin_sequence, header.begin_segment, header.discarded), (9, 2, 0));
}

/// What the final outcomes in a segment told that was given up.
#[test]
fn tombstones_are_this() {
    let disk = SimDisk::new(1);
    let options = SpoolOptions { segment_bytes: 32 << 10, max_bytes: 8 * (32 << 10), ..SpoolOptions::default() };
    let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), options).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let recover = RecoverOptions { seed: 42, event_cursor: Sequence(u64::MAX), ..RecoverOptions::default() };
    let mut log = Log::recover(directory, recover, &mut |_| {}).unwrap();
    let recipients = |count: usize| Envelope { recipients: vec![Recipient::default(); count], ..Envelope::default() };
    let mut now = Duration::ZERO;
    let mut staying = Vec::new();
    for _ in 0..30 {
        staying.extend(log.append_message(&recipients(3), b"", &[0; 3_000]).ok().map(|(id, _)| id));
        settle(&mut log, now);
        now += Duration::from_millis(5);
    }
    for round in 0_usize..400 {
        if let Ok((filler, _)) = log.append_message(&recipients(1), b"", &[0; 6_000]) {
            log.append_outcome(&outcome(filler, 0, Fate::Delivered)).unwrap();
        }
        for index in [0, 2] {
            if let Some(id) = staying.get(round) {
                log.append_outcome(&outcome(*id, index, Fate::Bounced)).unwrap();
            }
        }
        now += Duration::from_millis(5);
        settle(&mut log, now);
        let found =
            all_records(&disk, RecordKind::Tombstones).into_iter().find(|(record, _)| record.archive_length > 1);
        if let Some((record, bytes)) = found {
            assert_eq!((record.schema, record.content_bytes(), record.state_length), (1, 0, 0));
            assert_eq!(MessageId::from_raw(record.message).log(), LogId(0));
            return compare("tombstones-v4.txt", &bytes);
        }
    }
    panic!("{:?}", log.statistics());
}

/// Two outcomes of one frame that tell of final fates, of which the second refers to the first.
#[test]
fn a_later_outcome_is_this() {
    let disk = SimDisk::new(1);
    let (_spool, mut log) = open(&disk);
    let first = log.append_message(&envelope(), b"", b"x").unwrap().0;
    let second = log.append_message(&envelope(), b"", b"y").unwrap().0;
    settle(&mut log, Duration::ZERO);
    log.append_outcome(&outcome(second, 1, Fate::Deferred { due_ms: 1_700_000_300_000 })).unwrap();
    log.append_outcome(&Outcome { tenant: "acme".into(), ..outcome(first, 0, Fate::Delivered) }).unwrap();
    log.append_outcome(&Outcome { site: "mx.example.net".into(), ..outcome(second, 0, Fate::Bounced) }).unwrap();
    settle(&mut log, Duration::ZERO);
    let schemas: Vec<(u8, u64)> =
        all_records(&disk, RecordKind::Outcome).iter().map(|(record, _)| (record.schema, record.base)).collect();
    assert_eq!(schemas, [(2, 0), (2, 0), (3, 4)]);
    compare("later-outcome-v4.txt", &records(&disk, RecordKind::Outcome, second)[1].1);
}
