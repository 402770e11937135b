//! Recovery from a damaged log: whatever was done to its bytes it ends, everything that it finds can be read, and the
//! log that it makes takes mail, which the next recovery finds.
//!
//! The octets are changes to the segments of a small spool: place (three octets), how, and with what.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use postrider_spool::record::{Answer, Envelope, Fate, MessageId, Outcome, Recipient, RecipientResult, Sequence};
use postrider_spool::sim::SimDisk;
use postrider_spool::{Log, Progress, RecoverOptions, Recovered, Spool, SpoolOptions, execute};

pub(crate) fn run(octets: &[u8]) {
    static SPOOL: OnceLock<SimDisk> = OnceLock::new();
    let disk = SPOOL.get_or_init(make_spool).restart();
    let damaged = octets.chunks_exact(CHANGE_OCTETS).map(|change| damage(&disk, change)).count() > 0;

    let Some((spool, mut log, found)) = recover(&disk) else {
        assert!(damaged, "what was left alone can be opened");
        return;
    };
    if !damaged {
        assert_eq!(found.len(), MESSAGES - FINISHED);
    }
    let id = append(&mut log, "after@example.net", 300);
    drop((log, spool));

    let (_spool, _log, found_again) = recover(&disk.crash(1)).expect("it was opened before");
    assert!(id.is_none_or(|id| found_again.contains(&id)), "what was made durable is there");
    assert!(found.is_subset(&found_again), "what was found once is found again");
}

/// Messages of one segment and the next, of which some are finished and some have been deferred.
fn make_spool() -> SimDisk {
    let disk = SimDisk::new(1);
    let (spool, mut log, _) = recover(&disk).expect("a new spool");
    let mut ids = Vec::new();
    for number in 0..MESSAGES {
        ids.extend(append(&mut log, &format!("r{number}@example.net"), 40 + number * 700));
    }
    for (number, id) in ids.iter().enumerate().take(2 * FINISHED) {
        let fate = if number < FINISHED { Fate::Delivered } else { Fate::Deferred { due_ms: 5_000 } };
        log.append_outcome(&outcome(*id, number, fate)).expect("there is room");
        run_operations(&mut log);
    }
    drop((log, spool));
    disk
}

fn damage(disk: &SimDisk, change: &[u8]) {
    let paths: Vec<_> =
        disk.paths().into_iter().filter(|path| path.display().to_string().contains("segment")).collect();
    let place = usize::from(change[0]) | usize::from(change[1]) << 8 | usize::from(change[2]) << 16;
    let path = &paths[place % paths.len()];
    let mut bytes = disk.bytes(path);
    if bytes.is_empty() {
        return;
    }
    let at = place / paths.len() % bytes.len();
    let with = change[4];
    match change[3] % 5 {
        0 => bytes[at] = with,
        1 => bytes[at] ^= 1 << (with % 8),
        // A block that never reached the medium, or did so twice.
        2 => bytes[at / 512 * 512..].iter_mut().take(512).for_each(|octet| *octet = with),
        3 => {
            let (from, to) = (usize::from(with) * 4096 % bytes.len(), at / 4096 * 4096);
            let length = 4096.min(bytes.len() - from).min(bytes.len() - to);
            bytes.copy_within(from..from + length, to);
        }
        _ => bytes.truncate(at),
    }
    disk.set_bytes(path, bytes);
}

/// The messages that are live. None: the spool says that it can't be opened.
fn recover(disk: &SimDisk) -> Option<(Spool, Log, BTreeSet<MessageId>)> {
    let mut spool = Spool::open_on(Arc::new(disk.clone()), Path::new("/spool"), OPTIONS).ok()?;
    let directory = spool.assign(1).ok()?.remove(0).remove(0);
    let mut found = BTreeSet::new();
    let options = RecoverOptions { seed: 7, event_cursor: Sequence(0), ..RecoverOptions::default() };
    let log = Log::recover(directory, options, &mut |recovered| match recovered {
        Recovered::Message { id, message, pending, .. } => {
            let envelope = message.envelope().expect("what is found can be read");
            assert!(pending.iter().all(|index| (*index as usize) < envelope.recipients.len()));
            assert_eq!(message.size(), (message.prefix().len() + message.body().len()) as u64);
            assert!(found.insert(id), "it is told once");
        }
        Recovered::Quarantined(quarantine) => assert!(!quarantine.to_string().is_empty()),
        Recovered::Cut(cut) => assert!(!cut.to_string().is_empty()),
        Recovered::Held { id, .. } => assert!(found.insert(id), "it is told once"),
        Recovered::Summary { .. } => unreachable!("nothing was summarised"),
        Recovered::Record { .. } => {}
    });
    Some((spool, log.ok()?, found))
}

/// None: it was refused.
fn append(log: &mut Log, recipient: &str, body_bytes: usize) -> Option<MessageId> {
    let envelope = Envelope {
        reverse_path: "sender@example.com".into(),
        recipients: vec![Recipient { address: recipient.into() }],
        ..Envelope::default()
    };
    let (id, commit) = log.append_message(&envelope, b"Received: here\r\n", &vec![b'x'; body_bytes]).ok()?;
    run_operations(log);
    (log.durable() >= commit).then_some(id)
}

/// A few turns: an operation may be due later.
fn run_operations(log: &mut Log) {
    for turn in 0..20 {
        let now = Duration::from_millis(turn * 20);
        while let Some(operation) = log.poll_operation(now, &mut ()) {
            if let Progress::Failed { error } = log.handle_completion(now, execute(operation)) {
                panic!("the disk is sound: {error}");
            }
        }
    }
}

fn outcome(id: MessageId, number: usize, fate: Fate) -> Outcome {
    let answer = Answer { code: 451, enhanced: None, text: "later".into(), command: "RCPT".into() };
    let recipient = format!("r{number}@example.net");
    let results = vec![RecipientResult { index: 0, recipient, queue: "example.net".into(), fate, attempts: 1, answer }];
    Outcome { message: id.to_raw(), results, ..Outcome::default() }
}

const CHANGE_OCTETS: usize = 5;
const MESSAGES: usize = 12;
const FINISHED: usize = 3;
const OPTIONS: SpoolOptions = SpoolOptions {
    durability: postrider_spool::Durability::Fsync,
    max_bytes: 4 << 20,
    segment_bytes: 64 << 10,
    hot_bytes: 64 << 10,
    ..SpoolOptions::DEFAULT
};
