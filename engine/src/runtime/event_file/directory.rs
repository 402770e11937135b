//! What lies in an event directory: its lock, its files' names, and how far the newest of them can be trusted.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use postrider_spool::checksum::crc32c_append;

use super::EventLogError;
use crate::outcome::event::{NodeId, WallTime};
use crate::outcome::event_log::{SEAL_BYTES_MAX, Seal};

/// The node id of the spool in `directory`, made from `random` when there is none.
pub(crate) fn node_id(directory: &Path, random: [u64; 2]) -> io::Result<NodeId> {
    let path = directory.join("nodeid");
    match fs::read_to_string(&path) {
        Ok(text) => {
            let damaged = |error| format!("{}: {error}; restore it, or remove it and get a new one", path.display());
            return text.trim().parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, damaged(error)));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&random[0].to_be_bytes());
    bytes[8..].copy_from_slice(&random[1].to_be_bytes());
    // RFC 9562 §5.4: version 4, variant 10.
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let node = NodeId(bytes);
    let unfinished = directory.join("nodeid.new");
    let mut file = File::create(&unfinished)?;
    writeln!(file, "{node}")?;
    file.sync_all()?;
    fs::rename(&unfinished, &path)?;
    File::open(directory)?.sync_all()?;
    Ok(node)
}

/// `events-NUMBER-START.jsonl.zst`: eight digits or more, and a UTC time to the second.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct EventFileName {
    pub(super) number: u64,
    pub(super) started_ms: u64,
    pub(super) file_name: String,
}

impl EventFileName {
    pub(super) fn compose(number: u64, started_ms: u64) -> String {
        let digits: String = WallTime(started_ms).to_string().chars().filter(char::is_ascii_alphanumeric).collect();
        // 20261118T090640123Z, without the milliseconds.
        format!("events-{number:08}-{}Z.jsonl.zst", &digits[..15])
    }

    pub(super) fn parse(file_name: &str) -> Option<Self> {
        let (number, start) = file_name.strip_prefix("events-")?.strip_suffix(".jsonl.zst")?.split_once('-')?;
        let number = number.bytes().all(|b| b.is_ascii_digit()).then(|| number.parse().ok())??;
        let start: jiff::civil::DateTime = start.strip_suffix('Z')?.parse().ok()?;
        let started = jiff::tz::Offset::UTC.to_timestamp(start).ok()?;
        let started_ms = u64::try_from(started.as_millisecond()).ok()?;
        Some(Self { number, started_ms, file_name: file_name.to_owned() })
    }

    /// Oldest first. Other files in the directory are left alone.
    pub(super) fn list(directory: &Path) -> io::Result<Vec<Self>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(directory)? {
            names.extend(entry?.file_name().to_str().and_then(Self::parse));
        }
        names.sort();
        Ok(names)
    }
}

/// Whoever has it is the only one who writes there.
pub(super) struct DirectoryLock(File);

impl DirectoryLock {
    /// Whether it is the directory's that has this path now.
    pub(super) fn is_of(&self, path: &Path) -> bool {
        let place = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let there = fs::metadata(path.join(LOCK)).map(place);
        matches!((self.0.metadata().map(place), there), (Ok(own), Ok(there)) if own == there)
    }
}

impl Drop for DirectoryLock {
    /// Closing it is not enough: a child that was just forked for a program has the descriptor too, until its exec.
    fn drop(&mut self) {
        // What can't be unlocked is when it is closed.
        let _ = self.0.unlock();
    }
}

pub(super) fn lock_directory(path: &Path) -> Result<DirectoryLock, EventLogError> {
    let lock_path = path.join(LOCK);
    let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o640).open(&lock_path);
    let lock = lock.map_err(EventLogError::io("open", &lock_path))?;
    match lock.try_lock() {
        Ok(()) => Ok(DirectoryLock(lock)),
        Err(TryLockError::WouldBlock) => Err(EventLogError::Locked { path: path.to_owned() }),
        Err(TryLockError::Error(error)) => Err(EventLogError::io("lock", &lock_path)(error)),
    }
}

/// The last seal of a file whose data frame is whole, and where it ends.
pub(super) fn last_seal(path: &Path) -> io::Result<Option<(Seal, u64)>> {
    let file = File::open(path)?;
    let mut limit = file.metadata()?.len();
    let mut window = Vec::new();
    // Windows overlap by more than a seal, so that each lies wholly in one.
    let mut window_end = limit;
    while window_end > 0 {
        let begin = window_end.saturating_sub(2 * WINDOW_BYTES);
        let length = (window_end.min(limit) - begin.min(limit)) as usize;
        window.resize(length, 0);
        file.read_exact_at(&mut window, begin)?;
        match Seal::find_last(&window, begin) {
            Some((seal, place, length)) if data_is_whole(&file, &seal)? => {
                return Ok(Some((seal, place + length as u64)));
            }
            // Its data did not reach the disk; the frame before it did. The tag need not be found again.
            Some((_, place, _)) => {
                limit = place + 8;
                window_end = limit;
            }
            None if begin == 0 => break,
            None => window_end = begin + WINDOW_BYTES,
        }
    }
    Ok(None)
}

fn data_is_whole(file: &File, seal: &Seal) -> io::Result<bool> {
    let mut chunk = vec![0; 64 << 10];
    let mut crc = 0;
    let mut at = seal.data_offset;
    let end = seal.data_offset + u64::from(seal.data_bytes);
    while at < end {
        let length = chunk.len().min((end - at) as usize);
        file.read_exact_at(&mut chunk[..length], at)?;
        crc = crc32c_append(crc, &chunk[..length]);
        at += length as u64;
    }
    Ok(crc == seal.data_crc)
}

/// Cuts the file to where its last whole frame ends, or removes it where it has none. Says what was cut.
pub(super) fn cut(path: &Path, end: Option<u64>) -> io::Result<Option<(PathBuf, u64)>> {
    let length = fs::metadata(path)?.len();
    if let Some(end) = end {
        if length > end {
            let file = OpenOptions::new().write(true).open(path)?;
            file.set_len(end)?;
            file.sync_all()?;
        }
    } else {
        // An empty file would be an error to zstdcat.
        fs::remove_file(path)?;
    }
    let bytes = length.saturating_sub(end.unwrap_or(0));
    Ok((bytes > 0).then(|| (path.to_owned(), bytes)))
}

const LOCK: &str = ".lock";
pub(super) const WINDOW_BYTES: u64 = 1 << 20;
const _: () = assert!(SEAL_BYTES_MAX < WINDOW_BYTES as usize);
