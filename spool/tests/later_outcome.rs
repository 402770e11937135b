//! Outcomes that refer to another one in their frame: a start tells exactly what was appended, and what a damaged one
//! costs.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use postrider_spool::format::{FrameHeader, RecordHeader, RecordKind};
use postrider_spool::record::Answer;
use postrider_spool::sim::SimDisk;
use postrider_spool::{
    Envelope, Fate, Log, MessageId, Outcome, Reason, Recipient, RecipientResult, RecordRef, RecoverOptions, Recovered,
    Sequence, Spool, SpoolOptions, execute,
};

#[derive(Debug, Default)]
struct Found {
    outcomes: Vec<Outcome>,
    live: Vec<MessageId>,
    damaged: Vec<u64>,
}

fn open(disk: &SimDisk) -> (Spool, Log, Found) {
    let options = SpoolOptions { segment_bytes: 64 << 10, ..SpoolOptions::default() };
    let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), options).unwrap();
    let directory = spool.assign(1).unwrap().remove(0).remove(0);
    let recover = RecoverOptions { seed: 5, event_cursor: Sequence(0), ..RecoverOptions::default() };
    let mut found = Found::default();
    let log = Log::recover(directory, recover, &mut |recovered| match recovered {
        Recovered::Record { record: RecordRef::Outcome { outcome }, .. } => found.outcomes.push(outcome.clone()),
        Recovered::Record { record: RecordRef::Message { .. }, .. } => {}
        Recovered::Message { id, .. } => found.live.push(id),
        Recovered::Quarantined(quarantine) => match quarantine.reason {
            Reason::Record { sequence, .. } => found.damaged.push(sequence.0),
            reason => panic!("{reason}"),
        },
        other => panic!("{other:?}"),
    })
    .unwrap();
    (spool, log, found)
}

fn settle(log: &mut Log) {
    while let Some(operation) = log.poll_operation(Duration::ZERO, &mut ()) {
        log.handle_completion(Duration::ZERO, execute(operation));
    }
}

/// One of many that are alike, and yet each is another.
fn outcome(id: MessageId, number: u64) -> Outcome {
    let is = |every: u64| number.is_multiple_of(every);
    let result = RecipientResult {
        index: 0,
        recipient: format!("r{number}@example.net"),
        queue: if is(5) { "acme@example.org".into() } else { "acme@example.net".into() },
        fate: if is(3) { Fate::Bounced } else { Fate::Delivered },
        attempts: number as u32,
        answer: Answer {
            code: 250,
            enhanced: is(2).then_some((2, 0, 0)),
            text: if is(7) { "schön".into() } else { format!("2.0.0 Ok: queued as {number}") },
            command: if is(4) { "DATA".into() } else { String::new() },
        },
    };
    let fate = Fate::Deferred { due_ms: 9 };
    let other = RecipientResult { index: 1, fate, ..result.clone() };
    Outcome {
        message: id.to_raw(),
        at_ms: 1_700_000_000_000 + number,
        // Some tell of a deferral, too, and are told by themselves.
        results: if is(6) { vec![result, other] } else { vec![result] },
        reverse_path: "bounces@example.com".into(),
        tenant: "acme".into(),
        campaign: if is(8) { String::new() } else { "spring".into() },
        headers: if is(9) { vec![("Subject".into(), "x".into())] } else { Vec::new() },
        site: if is(4) { "mx2.example.net".into() } else { "mx.example.net".into() },
        peer_name: if is(3) { "mx.example.net".into() } else { "a.mx.example.net".into() },
        tls_cipher: "TLS13_AES_256_GCM_SHA384".into(),
        session_id: number,
        ..Outcome::default()
    }
}

/// So many messages in one commit, and what became of them in another.
fn prepare(disk: &SimDisk, count: u64) -> (Vec<MessageId>, Vec<Outcome>) {
    let (_spool, mut log, _) = open(disk);
    let recipients = vec![Recipient::default(); 2];
    let envelope = Envelope { recipients, ..Envelope::default() };
    let ids: Vec<MessageId> = (0..count).map(|_| log.append_message(&envelope, b"", b"x").unwrap().0).collect();
    settle(&mut log);
    let outcomes: Vec<Outcome> = ids.iter().zip(1..).map(|(id, number)| outcome(*id, number)).collect();
    for outcome in &outcomes {
        log.append_outcome(outcome).unwrap();
    }
    settle(&mut log);
    // What is damaged in the very last commit can't be told from one that was not finished.
    log.append_message(&envelope, b"", b"x").unwrap();
    settle(&mut log);
    (ids, outcomes)
}

/// Outcomes on the disk, and where.
fn records(disk: &SimDisk) -> Vec<(usize, RecordHeader)> {
    let bytes = disk.bytes(Path::new("/spool/log-0000/segment-0000"));
    let frames = (4096..bytes.len()).step_by(4096).filter(|at| FrameHeader::has_magic(&bytes[*at..]));
    let all = frames.flat_map(|at| {
        let records = FrameHeader::decode(&bytes[at..]).records(&bytes[at..]).unwrap();
        records.into_iter().map(move |(position, record)| (at + position, record))
    });
    all.filter(|(_, record)| record.kind == RecordKind::Outcome as u8).collect()
}

#[test]
fn a_start_tells_what_was_appended() {
    let disk = SimDisk::new(1);
    let (_, outcomes) = prepare(&disk, 60);
    assert_eq!(open(&disk.restart()).2.outcomes, outcomes);
    let lengths: Vec<usize> = records(&disk).iter().map(|(_, record)| record.checked_length().unwrap()).collect();
    let later = records(&disk).iter().filter(|(_, record)| record.schema == 3).count();
    assert_eq!(later, 60 - 60 / 6 - 1);
    assert!(lengths[1] + 90 < lengths[0], "{lengths:?}");
}

/// Nobody is sent twice what was delivered, and no event is made up.
#[test]
fn without_the_first_the_fates_of_the_others_count() {
    let disk = SimDisk::new(1);
    let (ids, outcomes) = prepare(&disk, 12);
    let whole = open(&disk.restart()).2;
    assert_eq!((&whole.damaged, &whole.outcomes), (&Vec::new(), &outcomes));

    let path = Path::new("/spool/log-0000/segment-0000");
    let (at, first) = records(&disk)[0];
    let mut bytes = disk.bytes(path);
    bytes[at + first.archive_range().start + 3] ^= 1;
    disk.set_bytes(path, bytes);
    let found = open(&disk.restart()).2;
    let reported =
        records(&disk).into_iter().filter(|(_, record)| record.schema == 3 || record.sequence == first.sequence);
    assert_eq!(found.damaged, reported.map(|(_, record)| record.sequence).collect::<Vec<_>>());
    let told: Vec<Outcome> = outcomes.iter().filter(|outcome| outcome.results.len() == 2).cloned().collect();
    assert_eq!(found.outcomes, told);
    // Each has a second recipient.
    assert_eq!(found.live.len(), ids.len() + 1);
    let (_spool, mut log, _) = open(&disk.restart());
    for (id, number) in ids[1..].iter().zip(2..) {
        let mut rest = outcome(*id, number);
        rest.results.truncate(1);
        rest.results[0].index = 1;
        log.append_outcome(&rest).unwrap();
        assert!(!log.is_live(*id), "{id}: the first recipient was done");
    }
    assert!(log.is_live(ids[0]));
}
