//! `progress` in the spool's directory: what each shard is at, in a file that is mapped and never synced.
//!
//! It tells what a process that died was doing, whatever killed it: a panic (all of ours abort), a signal, the kernel's
//! want of memory. It need not outlive the machine: when that stops, no message was the cause, and what the file then
//! tells of deliveries is older than it was.
//!
//! ```text
//!      0  "PRprogr1"
//!     64  32 suspects of 16 octets: message id, starts that found it (u64 each, in the machine's order)
//!   1024  a line of 64 octets for each shard (`Progress`)
//! ```
//!
//! What can fail: making the file. Then the engine runs without one, and says so. Where its disk goes later, the engine
//! goes on in memory (the spool's `file/bus_error.rs`), and the file tells what it told.

#![expect(unsafe_code, reason = "the file's octets are read as what they are in memory")]

use std::fs::{self, OpenOptions};
use std::io;
use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use memmap2::MmapRaw;
use postrider_spool::Guarded;
use postrider_spool::record::MessageId;

use crate::limits::SUSPECTS_MAX;
use crate::progress::{self, Progress, SharedProgress, Suspect};

/// The mapped file of a running engine.
struct ProgressFile {
    map: Arc<Guarded>,
}

/// The progress of all shards, and what the process before left.
pub(crate) fn take_up(directory: &Path, shards: usize) -> (Vec<SharedProgress>, Left) {
    match ProgressFile::open(directory, shards) {
        Ok((file, left)) => ((0..shards).map(|shard| file.line(shard)).collect(), left),
        Err(error) => {
            let path = directory.join("progress");
            tracing::warn!(%error, "{} can not be made: a crash will not be told apart", path.display());
            ((0..shards).map(|_| progress::in_memory()).collect(), Left::default())
        }
    }
}

/// What the process before left.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Left {
    pub(crate) suspects: Vec<Suspect>,
    /// Recipients whose messages may have arrived, and are sent again.
    pub(crate) unrecorded: u64,
}

/// One shard's part of the map.
#[derive(Debug)]
struct Line {
    map: Arc<Guarded>,
    offset: usize,
}

impl Deref for Line {
    type Target = Progress;

    fn deref(&self) -> &Progress {
        // SAFETY: the map is as long as `file_bytes` says, which the line was counted in, and begins on a page, so that
        // a multiple of 64 is aligned. Any octets are a `Progress`, it is changed through atomics only, and the map
        // lives as long as `self`; where the file can't be written any more, memory takes its place.
        unsafe { &*self.map.as_ptr().add(self.offset).cast::<Progress>() }
    }
}

impl ProgressFile {
    /// Opens the file, or makes it, and takes out what it tells.
    fn open(directory: &Path, shards: usize) -> io::Result<(Self, Left)> {
        let path = directory.join("progress");
        let bytes = fs::read(&path).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(Vec::new()),
            _ => Err(error),
        })?;
        let left = Left::read(&bytes);
        // All blocks are there before it is mapped: a store into one that the disk has no room for would be a SIGBUS.
        let mut fresh = vec![0; file_bytes(shards)];
        fresh[..MAGIC.len()].copy_from_slice(MAGIC);
        for (place, suspect) in left.suspects.iter().enumerate() {
            let at = SUSPECTS_AT + place * SUSPECT_BYTES;
            fresh[at..at + 8].copy_from_slice(&suspect.message.to_raw().to_ne_bytes());
            fresh[at + 8..at + 16].copy_from_slice(&suspect.starts.to_ne_bytes());
        }
        let beside = directory.join("progress.new");
        fs::write(&beside, &fresh)?;
        fs::rename(&beside, &path)?;
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        let map = Arc::new(Guarded::new(MmapRaw::map_raw(&file)?)?);
        Ok((Self { map }, left))
    }

    fn line(&self, shard: usize) -> SharedProgress {
        let offset = LINES_AT + shard * LINE_BYTES;
        assert!(offset + LINE_BYTES <= self.map.len(), "the file was made for so many shards");
        Arc::new(Line { map: Arc::clone(&self.map), offset })
    }
}

/// The process ends as it should: what was found in its hands earlier is no suspect any more.
pub(crate) fn forget_suspects(directory: &Path) -> io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let file = OpenOptions::new().write(true).open(directory.join("progress"))?;
    file.write_all_at(&[0; SUSPECTS_MAX * SUSPECT_BYTES], SUSPECTS_AT as u64)
}

impl Left {
    /// Anything that isn't such a file tells nothing.
    fn read(bytes: &[u8]) -> Self {
        if !bytes.starts_with(MAGIC) || bytes.len() < LINES_AT {
            return Self::default();
        }
        let word = |bytes: &[u8], at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight octets"));
        let mut suspects: Vec<Suspect> = (0..SUSPECTS_MAX)
            .map(|place| SUSPECTS_AT + place * SUSPECT_BYTES)
            .map(|at| Suspect { message: MessageId::from_raw(word(bytes, at)), starts: word(bytes, at + 8) })
            .filter(|suspect| suspect.starts > 0)
            .collect();
        let mut in_hands = Vec::new();
        let mut unrecorded = 0u64;
        for line in bytes[LINES_AT..].chunks_exact(LINE_BYTES) {
            let (working_on, sent, recorded) = (word(line, 0), word(line, 8), word(line, 16));
            unrecorded = unrecorded.wrapping_add(sent).wrapping_sub(recorded);
            if working_on == 0 {
                continue;
            }
            let message = MessageId::from_raw(working_on);
            // A message's home and its pair's owner may both have had it.
            if in_hands.contains(&message) {
                continue;
            }
            in_hands.push(message);
            match suspects.iter_mut().find(|suspect| suspect.message == message) {
                Some(suspect) => suspect.starts += 1,
                None => suspects.push(Suspect { message, starts: 1 }),
            }
        }
        suspects.sort_by_key(|suspect| std::cmp::Reverse(suspect.starts));
        suspects.truncate(SUSPECTS_MAX);
        // A file of which the machine's end kept only a part may tell of more recorded than sent.
        let unrecorded = if unrecorded > u64::MAX / 2 { 0 } else { unrecorded };
        Self { suspects, unrecorded }
    }
}

const MAGIC: &[u8] = b"PRprogr1";
const SUSPECTS_AT: usize = 64;
const SUSPECT_BYTES: usize = 16;
const LINES_AT: usize = 1024;
const LINE_BYTES: usize = size_of::<Progress>();

fn file_bytes(shards: usize) -> usize {
    (LINES_AT + shards * LINE_BYTES).next_multiple_of(4096)
}

const _: () = assert!(LINE_BYTES == 64);
const _: () = assert!(SUSPECTS_AT + SUSPECTS_MAX * SUSPECT_BYTES <= LINES_AT);

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    const POISON: MessageId = MessageId::from_raw(7);

    /// An engine of two shards that dies with these messages in its hands; what it had found.
    fn life(directory: &TempDir, in_hands: [Option<MessageId>; 2], sent: u64, recorded: u64) -> Left {
        let (progress, left) = take_up(directory.path(), 2);
        for (progress, message) in progress.iter().zip(in_hands) {
            if let Some(message) = message {
                progress.begin_work(message);
            }
        }
        progress[0].add_sent(sent);
        progress[1].add_recorded(recorded);
        left
    }

    #[test]
    fn a_start_finds_what_the_one_before_was_doing() {
        let directory = TempDir::new().unwrap();
        assert_eq!(life(&directory, [Some(POISON), None], 5, 3), Left::default());
        let first = Suspect { message: POISON, starts: 1 };
        assert_eq!(life(&directory, [None, None], 0, 0), Left { suspects: vec![first], unrecorded: 2 });
        assert_eq!(life(&directory, [None, None], 0, 0), Left { suspects: vec![first], unrecorded: 0 }, "once");
    }

    #[test]
    fn a_message_that_is_found_again_and_again_is_quarantined_until_a_clean_end() {
        let directory = TempDir::new().unwrap();
        let other = MessageId::from_raw(8);
        life(&directory, [None, Some(POISON)], 0, 0);
        life(&directory, [Some(other), None], 0, 0);
        life(&directory, [Some(POISON), Some(POISON)], 0, 0);
        let left = life(&directory, [None, None], 0, 0);
        let starts = |message| left.suspects.iter().find(|suspect| suspect.message == message).unwrap().starts;
        assert_eq!((starts(POISON), starts(other)), (2, 1), "once a start, whatever was in between");
        life(&directory, [Some(POISON), None], 0, 0);
        let left = life(&directory, [None, None], 0, 0);
        assert_eq!(left.suspects[0], Suspect { message: POISON, starts: 3 });
        assert!(left.suspects[0].is_quarantined() && !left.suspects[1].is_quarantined());
        forget_suspects(directory.path()).unwrap();
        assert_eq!(life(&directory, [None, None], 0, 0), Left::default());
    }

    /// The number of shards may be another, and the file anything.
    #[test]
    fn what_is_no_such_file_tells_nothing() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("progress");
        life(&directory, [Some(POISON), None], 9, 0);
        let whole = fs::read(&path).unwrap();
        for length in [0, 7, 8, 1_000, 1_024, whole.len() - 1] {
            fs::write(&path, &whole[..length]).unwrap();
            let (progress, left) = take_up(directory.path(), 200);
            assert_eq!(progress.len(), 200);
            assert!(left.suspects.len() <= 1, "{left:?}");
        }
        let mut other = whole;
        other[0] ^= 1;
        fs::write(&path, &other).unwrap();
        assert_eq!(take_up(directory.path(), 1).1, Left::default());
    }

    /// The machine's end keeps what it likes of a file that is not synced.
    #[test]
    fn more_recorded_than_sent_is_nothing() {
        let directory = TempDir::new().unwrap();
        life(&directory, [None, None], 3, 5);
        assert_eq!(life(&directory, [None, None], 0, 0).unrecorded, 0);
    }

    /// Without the file the engine runs, and only says so.
    #[test]
    fn a_directory_that_cannot_be_written_is_no_reason_not_to_start() {
        let (progress, left) = take_up(Path::new("/nonexistent"), 1);
        assert_eq!((progress.len(), left), (1, Left::default()));
    }
}
