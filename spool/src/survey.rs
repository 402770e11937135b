//! What files a log has, what each was last used for, and in which order they come: the begin of recovery.
//!
//! | the first block is | the file is |
//! |---|---|
//! | a header that the checkpoint lists, or one begun after it | in use |
//! | any other header from before the checkpoint | dead: a spare |
//! | a header below the highest tail | dead: a spare |
//! | a header that a later one of its chain passes over | void: its only frame failed; a spare |
//! | any header, where there is no checkpoint | in use |
//! | blank | a spare, never used |
//! | damaged, but whole frames of this log are behind it | in use, or dead, as the frames tell |
//! | damaged, behind it a frame without records, and no later file | void: a reopening that was never acknowledged |
//! | damaged, with none | a spare; its first block is kept and reported |
//!
//! A damaged first block is most often no damage but the begin of a use that was never acknowledged: the log went to
//! take a dead or a blank file for its next segment, and the power went. `recover/damage.rs` tells the two apart once
//! all is read.

use std::io;
use std::sync::Arc;

use crate::checkpoint_format::{CheckpointHeader, SegmentRow};
use crate::directory::{LogDirectory, parse_segment_name};
use crate::error::RecoverError;
use crate::format::{Chain, FORMAT_VERSION, SEGMENT_HEADER_BYTES, Seal, SegmentBlock, SegmentHeader};
use crate::limits::{BLOCK_BYTES, SEGMENT_BYTES_MIN};
use crate::record::LogId;
use crate::recover::Reason;
use crate::replay::SegmentBytes;
use crate::segment::Segment;
use crate::storage::{StorageFile, read_exact_at};

/// Which part of a log a block belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Below the end that a later header, or the checkpoint, tells.
    Sealed,
    /// In a segment whose end nothing tells: the last one, or one whose successor's header is damaged.
    Open,
}

/// The files of a log, as they are found.
pub(crate) struct Survey {
    /// By number.
    found: Vec<Found>,
    blank: Vec<(u16, Segment)>,
    pub(crate) damaged_headers: Vec<DamagedHeader>,
}

/// The files of a log, sorted out.
pub(crate) struct Sorted {
    /// Segments in use, by number.
    pub(crate) used: Vec<Used>,
    /// In the order in which they are to be used again.
    pub(crate) spares: Vec<(u16, Segment)>,
    pub(crate) damaged_headers: Vec<DamagedHeader>,
    /// Numbers of segments that a later one follows, and that are not there.
    pub(crate) missing: Vec<u64>,
    pub(crate) next_number: u64,
    pub(crate) discarded: u64,
}

/// A segment to be read.
pub(crate) struct Used {
    pub(crate) slot: u16,
    pub(crate) file: Arc<dyn StorageFile>,
    pub(crate) capacity: u64,
    pub(crate) chain: Chain,
    pub(crate) number: u64,
    pub(crate) generation: u64,
    pub(crate) first_sequence: u64,
    pub(crate) first_commit: u64,
    pub(crate) sealed_end: Option<u64>,
    pub(crate) is_truncated: bool,
    /// The first block is damaged.
    pub(crate) is_salvaged: bool,
    /// What the checkpoint tells of it.
    pub(crate) row: Option<SegmentRow>,
}

/// A first block to be reported.
pub(crate) struct DamagedHeader {
    pub(crate) slot: u16,
    pub(crate) file: Arc<dyn StorageFile>,
    pub(crate) capacity: u64,
    /// As the frames behind it tell; 0 where there are none.
    pub(crate) number: u64,
    pub(crate) reason: Reason,
}

struct Found {
    slot: u16,
    file: Arc<dyn StorageFile>,
    capacity: u64,
    header: SegmentHeader,
    /// The header was made up from the frames.
    is_salvaged: bool,
    /// In none of these frames is a record.
    is_empty: bool,
}

impl Survey {
    pub(crate) fn take(directory: &LogDirectory) -> Result<Self, RecoverError> {
        let mut survey = Self { found: Vec::new(), blank: Vec::new(), damaged_headers: Vec::new() };
        let storage = directory.storage();
        let names = storage
            .names(directory.path())
            .map_err(|error| RecoverError::Io { path: directory.path().to_owned(), error })?;
        let mut slots: Vec<u16> = names.iter().filter_map(|name| parse_segment_name(name)).collect();
        slots.sort_unstable();
        for slot in slots {
            let found = survey.look_at(directory, slot)?;
            survey.found.extend(found);
        }
        survey.found.sort_by_key(|found| found.header.number);
        Ok(survey)
    }

    /// The highest sequence in segments that had been given up before any of these headers was written.
    pub(crate) fn discarded(&self) -> u64 {
        self.found.iter().map(|found| found.header.discarded).max().unwrap_or(0)
    }

    fn look_at(&mut self, directory: &LogDirectory, slot: u16) -> Result<Option<Found>, RecoverError> {
        let storage = directory.storage();
        let path = directory.segment_path(slot);
        let failed = |error| RecoverError::Io { path: path.clone(), error };
        let mut file = storage.open(&path).map_err(failed)?;
        let mut capacity = file.length().map_err(failed)? / BLOCK_BYTES * BLOCK_BYTES;
        // What a failed write left in the cache looks written, and need not be on the medium.
        let _ = file.sync_and_drop_cache(0..SEGMENT_HEADER_BYTES as u64);
        let mut block = vec![0; SEGMENT_HEADER_BYTES];
        // A block that can't be read stays blank here, but what is behind it counts.
        let is_readable = capacity == 0 || read_exact_at(file.as_ref(), &mut block, 0).is_ok();
        match SegmentHeader::decode(&block) {
            SegmentBlock::Newer { version } => {
                Err(RecoverError::NewerVersion { path, found: version, known: FORMAT_VERSION })
            }
            SegmentBlock::Header(header) if header.log != directory.id() => {
                Err(RecoverError::ForeignSegment { path, log: header.log })
            }
            SegmentBlock::Header(header) => {
                Ok(Some(Found { slot, file, capacity, header, is_salvaged: false, is_empty: false }))
            }
            SegmentBlock::Blank if is_readable => {
                if capacity < SEGMENT_BYTES_MIN {
                    // Its creation was interrupted.
                    let bytes = directory.options().segment_bytes;
                    file = match storage.create(&path, bytes) {
                        Ok(file) => file,
                        Err(_) => return Ok(None),
                    };
                    capacity = bytes;
                }
                let mut segment = Segment::new(Arc::clone(&file), capacity);
                let written = file.written_prefix().map_err(failed)?;
                segment.zeroed = (written / BLOCK_BYTES * BLOCK_BYTES).min(capacity);
                self.blank.push((slot, segment));
                Ok(None)
            }
            SegmentBlock::Blank | SegmentBlock::Damaged => {
                let _ = file.sync_and_drop_cache(0..capacity);
                let salvaged = salvage(&file, capacity, directory.id());
                let header = salvaged.map(|(header, _)| header);
                self.damaged_headers.push(DamagedHeader {
                    slot,
                    file: Arc::clone(&file),
                    capacity,
                    number: header.map_or(0, |header| header.number),
                    reason: Reason::SegmentHeader,
                });
                match salvaged {
                    Some((header, is_empty)) => {
                        Ok(Some(Found { slot, file, capacity, header, is_salvaged: true, is_empty }))
                    }
                    None => {
                        self.blank.push((slot, Segment::new(file, capacity)));
                        Ok(None)
                    }
                }
            }
        }
    }

    /// Tells what is in use, given what the checkpoint lists. Up to `discarded`, records may be gone.
    pub(crate) fn sort_out(
        self,
        directory: &LogDirectory,
        checkpoint: Option<(&CheckpointHeader, &[SegmentRow])>,
        discarded: u64,
    ) -> Result<Sorted, RecoverError> {
        let Self { found, blank, damaged_headers } = self;
        let highest = found.last().map_or(1, |last| last.header.number + 1);
        let mut sorted = Sorted {
            used: Vec::new(),
            spares: Vec::new(),
            damaged_headers,
            missing: Vec::new(),
            next_number: checkpoint.map_or(1, |(header, _)| header.begin_segment).max(highest),
            discarded,
        };
        let begin = checkpoint.map_or(0, |(header, _)| header.begin_segment);
        let rows = checkpoint.map_or(&[][..], |(_, rows)| rows);
        let row_of = |header: &SegmentHeader| {
            let is_it = |row: &&SegmentRow| row.number == header.number && row.generation == header.generation;
            rows.iter().find(is_it).copied()
        };
        let tail = found.iter().map(|found| found.header.tail).max().unwrap_or(0);
        let headers: Vec<SegmentHeader> =
            found.iter().filter(|found| !found.is_salvaged).map(|found| found.header).collect();
        for found in found {
            let number = found.header.number;
            let row = row_of(&found.header);
            // Its header would tell where the one before ends, and nothing is in it that could be lost.
            let is_unfinished = || found.is_empty && number + 1 == highest;
            let is_dead = row.is_none()
                && (number < begin || number < tail || is_void(&headers, &found.header) || is_unfinished());
            if is_dead {
                let mut segment = Segment::new(found.file, found.capacity);
                segment.number = number;
                sorted.spares.push((found.slot, segment));
                continue;
            }
            if sorted.used.last().is_some_and(|last| last.number == number) {
                sorted.put_aside(directory, found)?;
                continue;
            }
            let closed = row.filter(|row| !row.is_tail).map(|row| row.end);
            sorted.used.push(Used {
                slot: found.slot,
                chain: row.map_or(found.header.chain, |row| row.chain),
                is_salvaged: found.is_salvaged,
                is_truncated: found.header.capacity > found.capacity,
                file: found.file,
                capacity: found.capacity,
                number,
                generation: found.header.generation,
                first_sequence: found.header.first_sequence,
                first_commit: found.header.first_commit,
                sealed_end: closed.or_else(|| sealed_end(&headers, &found.header)),
                row,
            });
        }
        // Without the checkpoint nothing tells what is missing and what was used again.
        let is_known = checkpoint.is_some() || discarded == 0;
        for header in headers.iter().filter(|header| is_known && header.number >= begin.max(tail)) {
            let before = header.previous.number;
            let is_there = sorted.used.binary_search_by_key(&before, |used| used.number).is_ok();
            if before != 0 && before >= begin.max(tail) && !is_there {
                sorted.missing.push(before);
            }
        }
        sorted.missing.dedup();
        sorted.spares.extend(blank);
        Ok(sorted)
    }
}

impl Sorted {
    /// A second file of the same number was put here by somebody: it goes to the side, unread.
    fn put_aside(&mut self, directory: &LogDirectory, found: Found) -> Result<(), RecoverError> {
        let storage = directory.storage();
        let path = directory.segment_path(found.slot);
        let kept = directory.kept_path();
        let aside = kept.join(format!("duplicate-{:08x}-{:04x}", found.header.number, found.slot));
        match storage.create_directory(&kept).and_then(|()| storage.rename(&path, &aside)) {
            // Whoever only looks leaves it where it is.
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {}
            moved => moved.map_err(|error| RecoverError::Io { path, error })?,
        }
        self.damaged_headers.push(DamagedHeader {
            slot: found.slot,
            file: found.file,
            capacity: found.capacity,
            number: found.header.number,
            reason: Reason::Duplicate,
        });
        Ok(())
    }
}

/// Whether a later header passes over this one: its segment's only frame failed.
fn is_void(headers: &[SegmentHeader], header: &SegmentHeader) -> bool {
    headers.iter().filter(|later| later.number > header.number).any(|later| {
        let seal = if later.chain == header.chain { &later.previous } else { &later.other };
        // Without a seal the other chain went on, but with none its own has nothing before.
        (later.chain == header.chain || *seal != Seal::default()) && seal.number < header.number
    })
}

/// Where a later header says that a segment ends.
fn sealed_end(headers: &[SegmentHeader], header: &SegmentHeader) -> Option<u64> {
    let is_it = |seal: &Seal| seal.number == header.number && seal.generation == header.generation;
    headers.iter().flat_map(|later| [later.previous, later.other]).find(is_it).map(|seal| seal.end)
}

/// Looks for whole frames behind a damaged first block. Those of the file's latest use count; what is left of earlier
/// uses is dead. Also tells whether they are without any record.
fn salvage(file: &Arc<dyn StorageFile>, capacity: u64, log: LogId) -> Option<(SegmentHeader, bool)> {
    let mut bytes = SegmentBytes::default();
    bytes.begin(Arc::clone(file), capacity);
    let mut salvaged: Option<SegmentHeader> = None;
    let mut is_empty = true;
    let mut at = SEGMENT_HEADER_BYTES as u64;
    while at < capacity {
        let frame = bytes.any_frame(log, at);
        let Some((frame, records)) = frame.and_then(|frame| Some((frame, bytes.records(&frame, at)?))) else {
            at += BLOCK_BYTES;
            continue;
        };
        if salvaged.is_none_or(|salvaged| salvaged.number < frame.segment) {
            is_empty = true;
            salvaged = Some(SegmentHeader {
                log,
                number: frame.segment,
                generation: frame.generation,
                first_sequence: frame.first_sequence,
                first_commit: frame.commit,
                tail: 0,
                previous: Seal::default(),
                capacity,
                discarded: 0,
                chain: Chain::Copies,
                other: Seal::default(),
            });
        }
        let is_mail = records.is_empty() || records.iter().any(|(_, record)| record.is_event());
        if let Some(salvaged) = salvaged.as_mut().filter(|salvaged| is_mail && salvaged.number == frame.segment) {
            salvaged.chain = Chain::Mail;
        }
        if salvaged.is_some_and(|salvaged| salvaged.number == frame.segment) {
            is_empty &= records.is_empty();
        }
        at += frame.padded();
    }
    salvaged.map(|salvaged| (salvaged, is_empty))
}
