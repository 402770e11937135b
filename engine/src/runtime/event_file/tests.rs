//! Exactly once: whatever the disk kept of the newest file, and whatever failed on the way.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use postrider_spool::record::{Fate, MessageId};
use tempfile::TempDir;

use super::directory::WINDOW_BYTES;
use super::*;
use crate::outcome::event::EventId;
use crate::outcome::event::tests::{NODE, message, outcome};
use crate::outcome::event_log::EventItem;

/// In memory where there is such a place: these tests sync thousands of times and don't cut the power.
fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { TempDir::new_in(memory).unwrap() } else { TempDir::new().unwrap() }
}

fn options(directory: &Path) -> EventLogOptions {
    EventLogOptions::new(directory.join("events"), NODE)
}

/// A process that another test is just starting holds a copy of the lock's descriptor until its exec.
fn open(options: EventLogOptions) -> (EventWriter, OpenReport) {
    for _ in 0..100_000 {
        match EventWriter::open(options.clone()) {
            Err(EventLogError::Locked { .. }) => thread::yield_now(),
            opened => return opened.unwrap(),
        }
    }
    panic!("the lock was never given up");
}

/// Ten records of two logs, interleaved; every second one tells two events.
fn records() -> Vec<LoggedRecord> {
    let of_log = |log: u16| {
        (1..=5).map(move |sequence| match sequence % 2 {
            0 => message(log, sequence, &["a@b.example", "c@d.example"]),
            _ => outcome(log, sequence, MessageId::new(LogId(log), Sequence(1)), &[Fate::Delivered]),
        })
    };
    of_log(1).zip(of_log(2)).flat_map(|(first, second)| [first, second]).collect()
}

fn write(writer: &mut EventWriter, records: &[LoggedRecord]) {
    for record in records {
        writer.push(record);
    }
    writer.try_flush().unwrap();
}

/// How often each event stands in the files, as zstd tools read them.
fn told(options: &EventLogOptions) -> BTreeMap<EventId, usize> {
    let mut told = BTreeMap::new();
    for name in EventFileName::list(&options.path).unwrap() {
        let file = File::open(options.path.join(&name.file_name)).unwrap();
        let text = zstd::decode_all(file).unwrap_or_else(|error| panic!("{}: {error}", name.file_name));
        for line in String::from_utf8(text).unwrap().lines() {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            *told.entry(value["event_id"].as_str().unwrap().parse().unwrap()).or_default() += 1;
        }
    }
    told
}

fn assert_each_once(options: &EventLogOptions, case: impl fmt::Display) {
    let told = told(options);
    // 5 records a log: 3 with one event, 2 with two.
    assert_eq!(told.len(), 14, "{case}: lost");
    assert!(told.values().all(|&times| times == 1), "{case}: doubled: {told:?}");
}

fn newest(options: &EventLogOptions) -> PathBuf {
    let names = EventFileName::list(&options.path).unwrap();
    options.path.join(&names.last().unwrap().file_name)
}

/// What the spool hands after a start: everything above the cursors. Asserts that cursors and files agree.
fn replayed(cursors: &Cursors) -> Vec<LoggedRecord> {
    records().into_iter().filter(|record| record.sequence > cursors.get(record.log)).collect()
}

#[test]
fn a_crash_at_any_byte_of_the_newest_file_neither_loses_nor_doubles() {
    let records = records();
    for split in [0, 4] {
        let directory = scratch();
        let mut options = options(directory.path());
        let (mut writer, _) = open(options.clone());
        if split > 0 {
            write(&mut writer, &records[..split]);
            // So that the newest file is not the first.
            writer.options.file_bytes_max = 1;
        }
        write(&mut writer, &records[split..6]);
        writer.options.file_bytes_max = u64::MAX;
        write(&mut writer, &records[6..]);
        drop(writer);
        assert_each_once(&options, "before");
        options.file_bytes_max = u64::MAX;
        let path = newest(&options);
        let whole = fs::read(&path).unwrap();
        for length in 0..=whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let (mut writer, report) = open(options.clone());
            let cut = report.cut.map_or(0, |(_, bytes)| bytes);
            assert!(cut <= length as u64);
            // Before anything is written: the next frame could just cover what should have been cut.
            let left = fs::metadata(&path).map_or(0, |metadata| metadata.len());
            assert_eq!(left, length as u64 - cut, "cut at {length}");
            told(&options);
            let rest = replayed(&writer.synced);
            write(&mut writer, &rest);
            assert_each_once(&options, format_args!("cut at {length} of {}", whole.len()));
            drop(writer);
            // Records handed a second time change nothing.
            let (mut writer, report) = open(options.clone());
            assert_eq!(report.cut, None);
            write(&mut writer, &records);
            assert_each_once(&options, format_args!("again, cut at {length}"));
            remove_all_above(&options, &path);
        }
    }
}

fn remove_all_above(options: &EventLogOptions, path: &Path) {
    for name in EventFileName::list(&options.path).unwrap() {
        let other = options.path.join(&name.file_name);
        if other.as_path() > path {
            fs::remove_file(other).unwrap();
        }
    }
}

/// A power cut may keep a file's new length and lose some of the new blocks.
#[test]
fn a_frame_whose_middle_never_reached_the_disk_is_cut() {
    let records = records();
    let directory = scratch();
    let options = options(directory.path());
    let (mut writer, _) = open(options.clone());
    write(&mut writer, &records[..5]);
    let synced = writer.file.as_ref().unwrap().end as usize;
    write(&mut writer, &records[5..]);
    drop(writer);
    let path = newest(&options);
    let whole = fs::read(&path).unwrap();
    for hole in synced..whole.len() {
        let mut bytes = whole.clone();
        let end = (hole + 16).min(bytes.len());
        bytes[hole..end].fill(0);
        if bytes == whole {
            continue;
        }
        fs::write(&path, &bytes).unwrap();
        let (mut writer, report) = open(options.clone());
        assert_eq!(report.cut, Some((path.clone(), (whole.len() - synced) as u64)), "hole at {hole}");
        let rest = replayed(&writer.synced);
        write(&mut writer, &rest);
        assert_each_once(&options, format_args!("hole at {hole}"));
    }
}

#[test]
fn a_seal_is_found_across_windows_and_behind_garbage() {
    let directory = scratch();
    let options = options(directory.path());
    let (mut writer, _) = open(options.clone());
    write(&mut writer, &records());
    let end = writer.file.as_ref().unwrap().end;
    drop(writer);
    let path = newest(&options);
    for garbage in [WINDOW_BYTES - 100, 2 * WINDOW_BYTES - 40, 5 * WINDOW_BYTES + 1] {
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        // A tag alone is no seal.
        file.write_all_at(b"PRevents", end + garbage - 8).unwrap();
        let (writer, report) = open(options.clone());
        assert_eq!(report.cut, Some((path.clone(), garbage)));
        assert_eq!(fs::metadata(&path).unwrap().len(), end);
        assert_eq!(writer.file.as_ref().unwrap().end, end);
    }
}

#[test]
fn files_rotate_by_size_and_age_and_stay_in_order() {
    let directory = scratch();
    let mut options = options(directory.path());
    options.file_bytes_max = 1;
    let (mut writer, _) = open(options.clone());
    for record in records() {
        write(&mut writer, &[record]);
    }
    assert_eq!(EventFileName::list(&options.path).unwrap().len(), 10);
    assert_each_once(&options, "by size");
    drop(writer);

    options.file_bytes_max = u64::MAX;
    options.file_age_max = Duration::ZERO;
    let (mut writer, _) = open(options.clone());
    write(&mut writer, &[message(3, 1, &["a@b.example"])]);
    let names = EventFileName::list(&options.path).unwrap();
    assert_eq!(names.len(), 11);
    assert!(names.is_sorted_by_key(|name| name.number));
    assert_eq!(names[10].number, 11);
}

/// Who keeps a month's files removes the others: the next one still comes behind all that are left.
#[test]
fn old_files_that_are_removed_give_no_number_free() {
    let scratch = scratch();
    let mut options = options(scratch.path());
    options.file_bytes_max = 1;
    let names = |options: &EventLogOptions| EventFileName::list(&options.path).unwrap();
    let (mut writer, _) = open(options.clone());
    for sequence in 1..=4 {
        write(&mut writer, &[message(1, sequence, &["a@b.example"])]);
    }
    drop(writer);
    for name in &names(&options)[..3] {
        fs::remove_file(options.path.join(&name.file_name)).unwrap();
    }
    let (mut writer, _) = open(options.clone());
    write(&mut writer, &[message(1, 5, &["a@b.example"])]);
    let numbers: Vec<u64> = names(&options).iter().map(|name| name.number).collect();
    assert_eq!(numbers, [4, 5]);
}

#[test]
fn file_names_are_read_back() {
    let name = EventFileName::compose(7, 1_795_000_000_123);
    assert_eq!(name, "events-00000007-20261118T110640Z.jsonl.zst");
    let parsed = EventFileName::parse(&name).unwrap();
    assert_eq!((parsed.number, parsed.started_ms), (7, 1_795_000_000_000));
    for other in [".lock", "events-1.jsonl.zst", "events-x-20261118T090640Z.jsonl.zst", "events--.jsonl.zst"] {
        assert_eq!(EventFileName::parse(other), None, "{other}");
    }
}

#[test]
fn the_cursors_of_another_spool_are_not_taken() {
    let directory = scratch();
    let options = options(directory.path());
    let (mut writer, _) = open(options.clone());
    write(&mut writer, &records());
    drop(writer);
    let mut other = options.clone();
    other.node.0[0] ^= 1;
    let (log, cursors, report) = EventLog::open(other).unwrap();
    assert_eq!((cursors, report), (Cursors::default(), OpenReport::default()));
    let mut writer = log.writer;
    write(&mut writer, &records());
    drop(writer);
    assert!(told(&options).values().all(|&times| times == 2), "both spools' events are there");
    // The first one, back again, finds its own.
    let (_, cursors, _) = EventLog::open(options).unwrap();
    assert_eq!(cursors.get(LogId(2)), Sequence(5));
}

#[test]
fn two_engines_do_not_share_a_directory() {
    let directory = scratch();
    let options = options(directory.path());
    let first = open(options.clone());
    let Err(error) = EventLog::open(options.clone()) else { panic!("opened twice") };
    assert!(
        error
            .to_string()
            .ends_with("another engine writes its events here; give each engine an [events] path of its own")
    );
    drop(first);
    EventLog::open(options).unwrap();
}

/// Somebody removed the directory and made it anew: its lock went with it.
#[test]
fn a_directory_that_was_made_anew_is_locked_anew() {
    let directory = scratch();
    let options = options(directory.path());
    let (mut writer, _) = open(options.clone());
    let records = records();
    write(&mut writer, &records[..2]);
    fs::remove_dir_all(&options.path).unwrap();
    // Another engine is there first: it has the directory to itself.
    let (second, _) = open(options.clone());
    writer.push(&records[2]);
    assert!(matches!(writer.try_flush(), Err(EventLogError::Locked { .. })));
    assert_eq!(EventFileName::list(&options.path).unwrap(), []);
    drop(second);
    writer.try_flush().unwrap();
    assert!(matches!(EventLog::open(options.clone()), Err(EventLogError::Locked { .. })));
    drop(writer);
    EventLog::open(options).unwrap();
}

#[test]
fn a_failing_disk_keeps_the_frame_and_tells_it_once() {
    let directory = scratch();
    let options = options(directory.path());
    let (mut writer, _) = open(options.clone());
    let records = records();
    write(&mut writer, &records[..4]);
    let kept: Vec<_> = EventFileName::list(&options.path).unwrap();
    let away = directory.path().join("away");
    // The directory is gone and the file with it: nothing can be created.
    fs::rename(&options.path, &away).unwrap();
    fs::remove_file(away.join(&kept[0].file_name)).unwrap();
    for record in &records[4..] {
        writer.push(record);
    }
    for _ in 0..5 {
        assert!(matches!(writer.try_flush(), Err(EventLogError::Io { .. })));
        assert!(writer.shared.failing.load(Ordering::Relaxed));
    }
    fs::rename(&away, &options.path).unwrap();
    let moved = writer.try_flush().unwrap();
    assert_eq!(moved, [(LogId(1), Sequence(5)), (LogId(2), Sequence(5))]);
    assert!(!writer.shared.failing.load(Ordering::Relaxed));
    // The first four records' events went with the file that was removed.
    let told = told(&options);
    assert_eq!(told.len(), 14 - 6);
    assert!(told.values().all(|&times| times == 1));
}

/// As log rotation does it. Else what comes later would be missed here, and told once more by the next start.
#[test]
fn nothing_more_goes_into_a_file_that_was_moved_away() {
    let directory = scratch();
    let options = options(directory.path());
    let (mut writer, _) = open(options.clone());
    let records = records();
    write(&mut writer, &records[..4]);
    let before = told(&options);
    let away = directory.path().join("rotated");
    fs::rename(newest(&options), &away).unwrap();
    let length = fs::metadata(&away).unwrap().len();
    write(&mut writer, &records[4..]);
    assert_eq!(fs::metadata(&away).unwrap().len(), length);
    let after = told(&options);
    assert!(after.keys().all(|event| !before.contains_key(event)));
    assert_eq!(before.len() + after.len(), 14);
    // Another file under the old name is not the engine's.
    let path = newest(&options);
    fs::rename(&path, directory.path().join("rotated-too")).unwrap();
    fs::write(&path, b"").unwrap();
    write(&mut writer, &records[..1]);
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
}

/// A rotation that copies the file and then cuts it: what was written on at the old place was no frame of any file.
#[test]
fn nothing_more_goes_into_a_file_that_was_cut() {
    let directory = scratch();
    let options = options(directory.path());
    let (mut writer, _) = open(options.clone());
    let records = records();
    write(&mut writer, &records[..4]);
    let (path, before) = (newest(&options), told(&options));
    writer.file.as_ref().unwrap().file.set_len(0).unwrap();
    write(&mut writer, &records[4..]);
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    fs::remove_file(&path).unwrap();
    assert_eq!(before.len() + told(&options).len(), 14);
}

/// A write that failed half-way leaves bytes behind the last frame; the next try must not leave any.
#[test]
fn what_a_failed_write_left_is_overwritten_or_cut() {
    let directory = scratch();
    let options = options(directory.path());
    let (mut writer, _) = open(options.clone());
    let records = records();
    write(&mut writer, &records[..4]);
    let file = writer.file.as_mut().unwrap();
    let (path, end) = (file.path.clone(), file.end);
    // As if the disk refused: the descriptor can't write.
    let writable = std::mem::replace(&mut file.file, File::open(&path).unwrap());
    writable.write_all_at(&[0xff; 5_000], end).unwrap();
    for record in &records[4..] {
        writer.push(record);
    }
    assert!(writer.try_flush().is_err());
    let file = writer.file.as_mut().unwrap();
    assert!(file.dirty);
    // Old and large as it may be, it is not left with those bytes at its end.
    writer.options.file_bytes_max = 1;
    writer.file.as_mut().unwrap().file = writable;
    writer.note_failure(&EventLogError::io("try", &path)(io::ErrorKind::StorageFull.into()));
    assert_eq!(fs::metadata(&path).unwrap().len(), end);
    writer.try_flush().unwrap();
    assert_each_once(&options, "after a failed write");
}

#[test]
fn the_thread_reports_cursors_publishes_and_ends_with_everything_written() {
    let directory = scratch();
    let options = options(directory.path());
    let (log, _, _) = EventLog::open(options.clone()).unwrap();
    let (synced_in, synced) = std::sync::mpsc::channel();
    let handle = log.start(move |moved| synced_in.send(moved.to_vec()).unwrap()).unwrap();
    let mut stream = handle.subscribe();
    let sender = handle.sender();
    let records = records();
    sender.try_send(records[..6].to_vec()).unwrap();
    let mut cursors = Cursors::default();
    while cursors.get(LogId(2)) < Sequence(3) {
        for (log, sequence) in synced.recv_timeout(Duration::from_secs(30)).unwrap() {
            assert!(cursors.advance(log, sequence), "only what moved is reported");
        }
    }
    // Readable while the engine runs.
    assert_eq!(told(&options).len(), 8);
    sender.try_send(records[6..].to_vec()).unwrap();
    handle.shutdown().unwrap();
    assert_each_once(&options, "after shutdown");
    let mut published = 0;
    while let Some(EventItem::Event(_)) = stream.next_blocking() {
        published += 1;
    }
    assert_eq!(published, 14);
    assert!(sender.try_send(Vec::new()).is_err(), "the writer has ended");
}

#[test]
fn a_full_queue_gives_batches_back_and_a_stop_on_a_failing_disk_ends() {
    let directory = scratch();
    let options = options(directory.path());
    let (log, _, _) = EventLog::open(options.clone()).unwrap();
    let away = directory.path().join("away");
    fs::rename(&options.path, &away).unwrap();
    let handle = log.start(|_| panic!("nothing can be synced")).unwrap();
    let sender = handle.sender();
    let (mut sent, begun) = (0, Instant::now());
    // The writer takes what comes until its first flush fails; then the queue fills.
    let given_back = loop {
        sent += 1;
        assert!(begun.elapsed() < Duration::from_secs(60), "the queue never fills");
        match sender.try_send(vec![message(1, sent, &["a@b.example"])]) {
            Ok(()) => thread::yield_now(),
            Err(batch) => break batch,
        }
    };
    assert_eq!(given_back[0].sequence, Sequence(sent));
    assert!(sender.is_blocked());
    let error = handle.shutdown().unwrap_err().to_string();
    assert!(error.contains("can't create the event file"), "{error}");
    fs::rename(&away, &options.path).unwrap();
    let (_, cursors, _) = EventLog::open(options).unwrap();
    assert_eq!(cursors, Cursors::default(), "so the spool hands everything again");
}

#[test]
fn a_node_id_is_made_once() {
    let directory = scratch();
    let made = node_id(directory.path(), [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210]).unwrap();
    assert_eq!(made.to_string(), "01234567-89ab-4def-bedc-ba9876543210");
    assert_eq!(node_id(directory.path(), [1, 2]).unwrap(), made);
    fs::write(directory.path().join("nodeid"), "what?").unwrap();
    let error = node_id(directory.path(), [1, 2]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    assert!(error.to_string().starts_with(&format!("{}/nodeid: ", directory.path().display())), "{error}");
}

#[test]
fn errors_say_where_and_what() {
    let mut text = String::new();
    let error = EventLogError::io("write events to", Path::new("/e/x"))(io::ErrorKind::StorageFull.into());
    write!(text, "{error}").unwrap();
    assert_eq!(text, "/e/x: can't write events to: no storage space");
    let error = EventLogError::io("open", Path::new("/e/x"))(io::ErrorKind::PermissionDenied.into());
    let expected = "/e/x: can't open: permission denied; give the directory to the user that the engine runs as";
    assert_eq!(error.to_string(), expected);
}
