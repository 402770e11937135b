//! Looking at a spool: it finds what the engine would find, damage included, and changes nothing.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use postrider_spool::record::Answer;
use postrider_spool::{
    Envelope, Fate, Log, LogDirectory, LogId, OpenError, Outcome, ReadOnlyStorage, Recipient, RecipientResult,
    RecoverError, RecoverOptions, Recovered, Sequence, Spool, SpoolOptions, Storage as _, execute,
};

const SEGMENT_BYTES: u64 = 64 << 10;

fn options() -> SpoolOptions {
    SpoolOptions { segment_bytes: SEGMENT_BYTES, ..SpoolOptions::default() }
}

fn settle(log: &mut Log) {
    let mut now = Duration::ZERO;
    while let Some(operation) = log.poll_operation(now, &mut ()) {
        log.handle_completion(now, execute(operation));
        now += Duration::from_millis(1);
    }
}

/// What recovery tells, without where it put bytes aside, which only the engine does.
fn recover(directory: LogDirectory) -> Result<Vec<String>, RecoverError> {
    let mut told = Vec::new();
    let options = RecoverOptions { seed: 1, event_cursor: Sequence(u64::MAX), ..RecoverOptions::default() };
    let spool = directory.path().parent().unwrap().to_owned();
    let name = |file: &Path| file.strip_prefix(&spool).unwrap().display().to_string();
    Log::recover(directory, options, &mut |recovered| {
        told.push(match recovered {
            Recovered::Summary { .. } | Recovered::Held { .. } => panic!("no summaries were written"),
            Recovered::Record { sequence, .. } => format!("record {}", sequence.0),
            Recovered::Message { id, message, pending, results, .. } => {
                assert!(message.content_matches());
                let body = String::from_utf8_lossy(message.body());
                format!("{id} {:?} {pending:?} {results:?} {body}", message.envelope().unwrap())
            }
            Recovered::Quarantined(it) => format!("{} {} {} {}", name(&it.file), it.offset, it.bytes, it.reason),
            Recovered::Cut(it) => format!("{} {} {} cut", name(&it.file), it.offset, it.bytes),
        });
    })?;
    Ok(told)
}

fn inspected(path: &Path) -> Vec<Vec<String>> {
    let before = state(path);
    let inspection = Spool::inspect(path).unwrap();
    let logs = inspection.log_ids().iter();
    let told = logs.map(|id| recover(inspection.log_directory(*id).unwrap()).unwrap()).collect();
    inspection.check_undisturbed().unwrap();
    assert_eq!(state(path), before, "looking changed something");
    told
}

fn opened(path: &Path) -> Vec<Vec<String>> {
    let mut spool = Spool::open(path, options()).unwrap();
    let logs = spool.assign(2).unwrap().into_iter().flatten();
    logs.map(|directory| recover(directory).unwrap()).collect()
}

/// Every name with its time and its bytes.
fn state(path: &Path) -> BTreeMap<PathBuf, (SystemTime, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut folders = vec![path.to_owned()];
    while let Some(folder) = folders.pop() {
        found.insert(folder.clone(), (fs::metadata(&folder).unwrap().modified().unwrap(), Vec::new()));
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let modified = fs::metadata(&path).unwrap().modified().unwrap();
                found.insert(path.clone(), (modified, fs::read(&path).unwrap()));
            }
        }
    }
    found
}

/// Two logs of eight messages to two recipients each, in two segments; the first recipient of each second one was
/// deferred.
fn build(path: &Path) {
    for start in 0..2 {
        let mut spool = Spool::open(path, options()).unwrap();
        for directory in spool.assign(2).unwrap().into_iter().flatten() {
            let recover =
                RecoverOptions { seed: 10 + start, event_cursor: Sequence(u64::MAX), ..RecoverOptions::default() };
            let mut log = Log::recover(directory, recover, &mut |_| {}).unwrap();
            for number in 0..4 {
                let recipients = ["a@example.net", "b@example.net"].map(|to| Recipient { address: to.into() }).to_vec();
                let envelope = Envelope { reverse_path: "n@example.org".into(), recipients, ..Envelope::default() };
                let (id, _) =
                    log.append_message(&envelope, b"P: 1\r\n", format!("\r\nbody {number}\r\n").as_bytes()).unwrap();
                settle(&mut log);
                if number % 2 == 1 {
                    let answer = Answer { code: 451, text: "later".into(), ..Answer::default() };
                    let result = RecipientResult {
                        index: 0,
                        recipient: "a@example.net".into(),
                        queue: "example.net".into(),
                        fate: Fate::Deferred { due_ms: 5 },
                        attempts: 1,
                        answer,
                    };
                    let results = vec![result];
                    log.append_outcome(&Outcome { message: id.to_raw(), results, ..Outcome::default() }).unwrap();
                    settle(&mut log);
                }
            }
        }
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() { copy(&path, &target) } else { fs::copy(&path, &target).map(|_| ()).unwrap() }
    }
}

#[test]
fn looking_finds_what_the_engine_would_find() {
    let directory = tempfile::tempdir().unwrap();
    let good = directory.path().join("good");
    build(&good);
    let whole = inspected(&good);
    assert_eq!(whole.iter().map(Vec::len).collect::<Vec<_>>(), [8, 8]);
    assert!(whole[0][1].contains("attempts: 1"), "{}", whole[0][1]);
    let segment = Path::new("log-0000").join("segment-0000");
    let mut damaged = 0;
    for position in (0..7 * 4096).step_by(499).filter(|position| !(12..14).contains(position)) {
        let copied = directory.path().join(format!("flipped-{position}"));
        copy(&good, &copied);
        let mut bytes = fs::read(copied.join(&segment)).unwrap();
        bytes[position] ^= 4;
        fs::write(copied.join(&segment), bytes).unwrap();
        let looked = inspected(&copied);
        damaged += usize::from(looked != whole);
        assert_eq!(looked, opened(&copied), "{position}");
    }
    assert!(damaged > 5, "{damaged}");
    for length in [0, 100, 4096, 3 * 4096 + 5, 6 * 4096] {
        let copied = directory.path().join(format!("cut-{length}"));
        copy(&good, &copied);
        fs::File::options().write(true).open(copied.join(&segment)).unwrap().set_len(length).unwrap();
        let looked = inspected(&copied);
        assert_ne!(looked, whole);
        assert_eq!(looked, opened(&copied), "{length}");
    }
    let copied = directory.path().join("twice");
    copy(&good, &copied);
    fs::copy(copied.join(&segment), copied.join("log-0000/segment-0009")).unwrap();
    let looked = inspected(&copied);
    assert!(looked[0].iter().any(|line| line.ends_with("a second file with the same segment number")), "{looked:?}");
    assert_eq!(looked, opened(&copied));
}

#[test]
fn logs_are_found_without_the_meta_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("spool");
    build(&path);
    let whole = inspected(&path);
    let meta = path.join("SPOOL");
    assert!(Spool::inspect(&path).unwrap().meta_error().is_none());
    fs::write(&meta, [7; 64]).unwrap();
    let inspection = Spool::inspect(&path).unwrap();
    assert!(inspection.meta_error().unwrap().to_string().contains("/SPOOL: the meta file is damaged; restore it"));
    fs::remove_file(&meta).unwrap();
    let inspection = Spool::inspect(&path).unwrap();
    assert!(inspection.meta_error().unwrap().to_string().ends_with("/SPOOL: the meta file is missing"));
    assert_eq!(inspected(&path), whole);
    // Nor are locks needed: none is made.
    fs::remove_file(path.join("LOCK")).unwrap();
    fs::remove_file(path.join("log-0000/LOCK")).unwrap();
    assert_eq!(inspected(&path), whole);
}

#[test]
fn one_log_that_is_refused_does_not_hide_the_others() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("spool");
    build(&path);
    fs::copy(path.join("log-0001/segment-0000"), path.join("log-0000/segment-0009")).unwrap();
    let before = state(&path);
    let inspection = Spool::inspect(&path).unwrap();
    let read = |id| recover(inspection.log_directory(id).unwrap());
    assert!(matches!(read(LogId(0)), Err(RecoverError::ForeignSegment { log: LogId(1), .. })));
    assert_eq!(read(LogId(1)).unwrap().len(), 8);
    assert_eq!(state(&path), before);
}

#[test]
fn a_spool_in_use_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("spool");
    build(&path);
    let spool = Spool::open(&path, options()).unwrap();
    let Err(OpenError::Locked { holder: Some(holder), .. }) = Spool::inspect(&path) else { panic!("it is in use") };
    assert_eq!(holder, format!("process {}", std::process::id()));
    drop(spool);
    let inspection = Spool::inspect(&path).unwrap();
    // Looking keeps nobody out, and tells that somebody came.
    let spool = Spool::open(&path, options()).unwrap();
    assert!(matches!(inspection.check_undisturbed(), Err(OpenError::Locked { .. })));
    drop(spool);
    assert!(matches!(inspection.check_undisturbed(), Err(OpenError::Disturbed { .. })));
    let inspection = Spool::inspect(&path).unwrap();
    inspection.check_undisturbed().unwrap();
}

#[test]
fn what_is_no_spool_is_told_as_such() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let refusal = |path: &Path| Spool::inspect(path).unwrap_err().to_string();
    assert!(refusal(path).ends_with(": no spool: neither a meta file (SPOOL) nor logs (log-0000 and so on) are in it"));
    assert!(refusal(&path.join("none")).ends_with("/none: No such file or directory (os error 2)"));
    fs::write(path.join("file"), "").unwrap();
    assert!(refusal(&path.join("file")).ends_with("/file: no directory; a spool is one"));
    drop(Spool::open(&path.join("empty"), options()).unwrap());
    assert!(refusal(&path.join("empty")).contains("/empty: a spool without any log"));
    build(&path.join("spool"));
    assert!(refusal(&path.join("spool/log-0000")).contains("/log-0000: one log of a spool"));
}

#[test]
fn every_change_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (there, new) = (directory.path().join("there"), directory.path().join("new"));
    fs::write(&there, "x").unwrap();
    let before = state(directory.path());
    let storage = ReadOnlyStorage;
    let file = storage.open(&there).unwrap();
    for result in [
        storage.create_directory(&new),
        storage.create(&new, 4096).map(|_| ()),
        storage.replace(&there, b"y"),
        storage.rename(&there, &new),
        storage.remove(&there),
        storage.remove_directory(directory.path()),
        file.write_at(b"y", 0, true).map(|_| ()),
    ] {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
    }
    storage.lock(&new).unwrap();
    file.sync_and_drop_cache(0..1).unwrap();
    assert_eq!(state(directory.path()), before);
}
