//! Reading a chain of segments: from block boundaries to whole frames, without trusting a byte that is not checked.
//!
//! What becomes of the bytes at each 4-KiB boundary is one table ([`TABLE`]). As one commit is in flight at a time,
//! only the last frame of a log may be unfinished: it is cut, and its bytes are kept in a side file. Anything wrong
//! before a later whole frame is damage: it is quarantined (kept and reported), and reading goes on behind it.
//!
//! Over 500 lines: the table, and what each of its rows does.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use crate::format::{FrameHeader, RecordHeader, SEGMENT_HEADER_BYTES};
use crate::limits::{BLOCK_BYTES, RECOVERY_READ_BYTES};
use crate::record::LogId;
use crate::storage::{ReadBuffer, StorageFile, read_exact_at};
use crate::survey::{Place as SurveyPlace, Used};

/// One chain's segments, read in order, one frame at a time.
pub(crate) struct ChainReader {
    log: LogId,
    left: VecDeque<(Used, u64)>,
    current: Option<Current>,
    pub(crate) bytes: SegmentBytes,
    /// Bytes that were read.
    pub(crate) read_bytes: u64,
}

struct Current {
    used: Used,
    at: u64,
    limit: u64,
    last_commit: u64,
    frames: usize,
    /// Of the chain.
    is_last: bool,
}

/// What a chain yields.
pub(crate) enum Step {
    /// A whole frame; the next one comes only after it was dealt with.
    Frame(Frame),
    /// These bytes are damaged.
    Damaged(u64, Range<u64>),
    /// A commit that was not finished, if no later one is found anywhere.
    Unfinished(Unfinished),
    /// The segment has been read.
    Ended(Ended),
}

pub(crate) struct Frame {
    pub(crate) segment: u64,
    pub(crate) generation: u64,
    pub(crate) slot: u16,
    pub(crate) at: u64,
    pub(crate) header: FrameHeader,
    pub(crate) records: Vec<(usize, RecordHeader)>,
}

/// A region at the end of a segment that nothing seals.
pub(crate) struct Unfinished {
    pub(crate) segment: u64,
    /// `None` where its header is torn before that.
    pub(crate) commit: Option<u64>,
    pub(crate) region: Range<u64>,
}

pub(crate) struct Ended {
    pub(crate) used: Used,
    pub(crate) end: u64,
    pub(crate) frames: usize,
    pub(crate) is_last: bool,
}

impl ChainReader {
    /// Each segment with the offset from which it is to be read.
    pub(crate) fn new(log: LogId, segments: Vec<(Used, u64)>) -> Self {
        Self { log, left: segments.into(), current: None, bytes: SegmentBytes::default(), read_bytes: 0 }
    }

    /// The next thing that is found; `None` at the end of the chain.
    pub(crate) fn next(&mut self) -> Option<Step> {
        if self.current.is_none() {
            self.current = Some(self.open()?);
        }
        let current = self.current.as_mut()?;
        if current.at < current.limit
            && let Some(step) = current.step(self.log, &mut self.bytes)
        {
            return Some(step);
        }
        let Current { used, at, frames, is_last, .. } = self.current.take()?;
        self.read_bytes += at.saturating_sub(SEGMENT_HEADER_BYTES as u64);
        let end = used.sealed_end.map_or(at, |sealed| sealed.min(used.capacity));
        Some(Step::Ended(Ended { used, end, frames, is_last }))
    }

    fn open(&mut self) -> Option<Current> {
        let (used, from) = self.left.pop_front()?;
        let is_last = self.left.is_empty();
        if is_last && used.sealed_end.is_none() {
            // Pages of a write that failed may still be cached, as if they had been written. An error shows in reads.
            let _ = used.file.sync_and_drop_cache(0..used.capacity);
        }
        self.bytes.begin_at(Arc::clone(&used.file), used.capacity, from);
        let limit = used.sealed_end.unwrap_or(used.capacity).min(used.capacity);
        let last_commit = match &used.row {
            Some(row) if from >= row.end => row.last_commit,
            _ => used.first_commit.saturating_sub(1),
        };
        Some(Current { used, at: from, limit, last_commit, frames: 0, is_last })
    }
}

impl Current {
    /// Goes on at the next block boundary. `None` when nothing more is in the segment.
    fn step(&mut self, log: LogId, bytes: &mut SegmentBytes) -> Option<Step> {
        let at = self.at;
        let used = &self.used;
        let frame = bytes.presumed_frame(used, log, at, self.last_commit + 1);
        let mut seen = Seen {
            place: if used.sealed_end.is_some() { SurveyPlace::Sealed } else { SurveyPlace::Open },
            is_first: at == SEGMENT_HEADER_BYTES as u64,
            is_ours: frame.is_some(),
            is_whole: false,
            is_in_order: false,
            has_whole_records: false,
            is_followed: false,
        };
        let mut records = Vec::new();
        if let Some(header) = &frame
            && let Some(found) = bytes.records(header, at)
        {
            seen.is_whole = true;
            seen.is_in_order = header.commit > self.last_commit;
            seen.has_whole_records = found
                .iter()
                .all(|(position, record)| bytes.is_record_whole(used.generation, at + *position as u64, record));
            records = found;
        }
        let mut next_whole = None;
        if seen.needs_successor() {
            next_whole = bytes.next_whole_frame(used, log, at + BLOCK_BYTES, self.limit);
            seen.is_followed = next_whole.is_some() || (seen.is_ours && !self.is_last);
        }
        match decide(&seen) {
            Verdict::Keep | Verdict::KeepWholeRecords => {
                let header = frame.expect("only a frame is kept");
                self.last_commit = header.commit;
                self.frames += 1;
                self.at += header.padded();
                let (segment, generation, slot) = (used.number, used.generation, used.slot);
                Some(Step::Frame(Frame { segment, generation, slot, at, header, records }))
            }
            Verdict::Probe => {
                self.at = next_whole.unwrap_or(self.limit);
                Some(Step::Damaged(used.number, at..self.at))
            }
            Verdict::Cut => {
                let length = frame.map_or(BLOCK_BYTES, |frame| frame.padded()).max(BLOCK_BYTES);
                let region = at..(at + length).min(self.limit);
                self.limit = at;
                // The first frame's commit is in the segment's header too.
                let told = frame.map(|frame| frame.commit).filter(|commit| *commit > self.last_commit);
                let commit = told.or(seen.is_first.then_some(self.last_commit + 1));
                Some(Step::Unfinished(Unfinished { segment: used.number, commit, region }))
            }
            Verdict::End => {
                self.limit = at;
                None
            }
        }
    }
}

/// What recovery found at a block boundary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) place: SurveyPlace,
    /// The segment's first frame, which its header was written with.
    pub(crate) is_first: bool,
    /// A frame header of this segment's present use, perhaps with one field damaged.
    pub(crate) is_ours: bool,
    /// The header and all record headers are as they were written.
    pub(crate) is_whole: bool,
    /// Its commit number is above all before.
    pub(crate) is_in_order: bool,
    pub(crate) has_whole_records: bool,
    /// A whole frame comes later.
    pub(crate) is_followed: bool,
}

impl Seen {
    /// Whether it matters what comes later, which costs reading it.
    fn needs_successor(&self) -> bool {
        !(self.is_ours && self.is_whole && self.is_in_order && self.has_whole_records)
    }
}

/// What is done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Apply all records.
    Keep,
    /// Apply those that are whole, quarantine the others.
    KeepWholeRecords,
    /// Quarantine up to the next whole frame, or the segment's end.
    Probe,
    /// An unfinished commit: keep its bytes aside, and end here.
    Cut,
    /// Nothing was written here in the present use.
    End,
}

/// A row of the table; `None` means that it does not matter.
pub(crate) struct Row {
    place: Option<SurveyPlace>,
    is_first: Option<bool>,
    is_ours: Option<bool>,
    is_whole: Option<bool>,
    is_in_order: Option<bool>,
    has_whole_records: Option<bool>,
    is_followed: Option<bool>,
    verdict: Verdict,
}

impl Row {
    fn matches(&self, seen: &Seen) -> bool {
        fn fits<T: PartialEq>(wanted: Option<T>, found: T) -> bool {
            wanted.is_none_or(|wanted| wanted == found)
        }
        fits(self.place, seen.place)
            && fits(self.is_first, seen.is_first)
            && fits(self.is_ours, seen.is_ours)
            && fits(self.is_whole, seen.is_whole)
            && fits(self.is_in_order, seen.is_in_order)
            && fits(self.has_whole_records, seen.has_whole_records)
            && fits(self.is_followed, seen.is_followed)
    }
}

fn decide(seen: &Seen) -> Verdict {
    TABLE.iter().find(|row| row.matches(seen)).expect("the table covers everything, which a test shows").verdict
}

const fn row(
    place: Option<SurveyPlace>,
    [is_first, is_ours, is_whole, is_in_order, has_whole_records, is_followed]: [Option<bool>; 6],
    verdict: Verdict,
) -> Row {
    Row { place, is_first, is_ours, is_whole, is_in_order, has_whole_records, is_followed, verdict }
}

const ANY: Option<bool> = None;
const YES: Option<bool> = Some(true);
const NO: Option<bool> = Some(false);
const SEALED: Option<SurveyPlace> = Some(SurveyPlace::Sealed);
const OPEN: Option<SurveyPlace> = Some(SurveyPlace::Open);

/// From what was found to what is done; exactly one row fits anything that can be found.
#[rustfmt::skip]
pub(crate) const TABLE: [Row; 13] = [
    //           first ours whole order records followed
    row(None,   [ANY, YES, YES, YES, YES, ANY], Verdict::Keep),
    // Below the end that the next segment's header tells, whatever is wrong is damage.
    row(SEALED, [ANY, NO,  ANY, ANY, ANY, ANY], Verdict::Probe),
    row(SEALED, [ANY, YES, NO,  ANY, ANY, ANY], Verdict::Probe),
    row(SEALED, [ANY, YES, YES, NO,  ANY, ANY], Verdict::Probe),
    row(SEALED, [ANY, YES, YES, YES, NO,  ANY], Verdict::KeepWholeRecords),
    // In the last segment, it is damage when a whole frame comes later, and else the end of what was written.
    row(OPEN,   [ANY, NO,  ANY, ANY, ANY, YES], Verdict::Probe),
    row(OPEN,   [NO,  NO,  ANY, ANY, ANY, NO],  Verdict::End),
    row(OPEN,   [YES, NO,  ANY, ANY, ANY, NO],  Verdict::Cut),
    row(OPEN,   [ANY, YES, NO,  ANY, ANY, YES], Verdict::Probe),
    row(OPEN,   [ANY, YES, NO,  ANY, ANY, NO],  Verdict::Cut),
    row(OPEN,   [ANY, YES, YES, NO,  ANY, ANY], Verdict::Probe),
    row(OPEN,   [ANY, YES, YES, YES, NO,  YES], Verdict::KeepWholeRecords),
    row(OPEN,   [ANY, YES, YES, YES, NO,  NO],  Verdict::Cut),
];

/// A segment's bytes, read as far as they were asked for.
#[derive(Default)]
pub(crate) struct SegmentBytes {
    file: Option<Arc<dyn StorageFile>>,
    length: usize,
    buffer: ReadBuffer,
    /// Read are the bytes in between.
    from: usize,
    filled: usize,
}

impl SegmentBytes {
    pub(crate) fn begin(&mut self, file: Arc<dyn StorageFile>, length: u64) {
        self.begin_at(file, length, 0);
    }

    /// What lies before `from`, a block's boundary, is not read unless it is asked for.
    pub(crate) fn begin_at(&mut self, file: Arc<dyn StorageFile>, length: u64, from: u64) {
        self.file = Some(file);
        self.length = length as usize;
        self.from = from as usize;
        self.filled = from as usize;
    }

    /// The bytes at `offset`; those behind the file's end, and those that the medium does not give back, read as zeros.
    pub(crate) fn slice(&mut self, offset: u64, length: usize) -> &[u8] {
        let end = offset as usize + length;
        if (offset as usize) < self.from {
            self.from = 0;
            self.filled = 0;
        }
        self.fill(end);
        &self.buffer[offset as usize..end]
    }

    fn fill(&mut self, end: usize) {
        if self.buffer.len() < end {
            self.buffer.resize(end.next_multiple_of(RECOVERY_READ_BYTES).min(self.length.max(end)), 0);
        }
        while self.filled < end {
            let start = self.filled;
            let stop = self.buffer.len().min(start + RECOVERY_READ_BYTES);
            let readable = stop.min(self.length).max(start);
            self.buffer[readable..stop].fill(0);
            let file = self.file.as_ref().expect("a file was begun");
            if read_exact_at(file.as_ref(), &mut self.buffer[start..readable], start as u64).is_err() {
                self.buffer[start..stop].fill(0);
                for block in (start..readable).step_by(BLOCK_BYTES as usize) {
                    let block = block..(block + BLOCK_BYTES as usize).min(readable);
                    let at = block.start as u64;
                    if read_exact_at(file.as_ref(), &mut self.buffer[block.clone()], at).is_err() {
                        self.buffer[block].fill(0);
                    }
                }
            }
            self.filled = stop;
        }
    }

    /// The frame header that was written at `at` in this use of the segment, perhaps damaged: three of its four marks
    /// are right. What earlier uses left behind has one or two. `commit` is the lowest that it can have; the other
    /// chain may have had some in between.
    fn presumed_frame(&mut self, used: &Used, log: LogId, at: u64, commit: u64) -> Option<FrameHeader> {
        let block = self.slice(at, BLOCK_BYTES as usize);
        let has_magic = FrameHeader::has_magic(block);
        let header = FrameHeader::decode(block);
        let marks = [
            has_magic,
            header.log == log && header.segment == used.number,
            header.generation == used.generation,
            (commit..commit + COMMITS_SKIPPED_MAX).contains(&header.commit),
        ];
        (marks.into_iter().filter(|mark| *mark).count() >= 3).then_some(header)
    }

    /// The frame header at `at`, if it is one of this log and of this use of the segment.
    fn frame(&mut self, used: &Used, log: LogId, at: u64) -> Option<FrameHeader> {
        let header = self.any_frame(log, at)?;
        (header.segment == used.number && header.generation == used.generation).then_some(header)
    }

    /// The frame header at `at`, if it is one of this log.
    pub(crate) fn any_frame(&mut self, log: LogId, at: u64) -> Option<FrameHeader> {
        let block = self.slice(at, BLOCK_BYTES as usize);
        FrameHeader::has_magic(block).then(|| FrameHeader::decode(block)).filter(|header| header.log == log)
    }

    /// The frame's record headers with their positions in it, if the frame is whole.
    pub(crate) fn records(&mut self, header: &FrameHeader, at: u64) -> Option<Vec<(usize, RecordHeader)>> {
        let length = header.length as usize;
        if at as usize + length > self.length {
            return None;
        }
        header.records(self.slice(at, length))
    }

    pub(crate) fn is_record_whole(&mut self, generation: u64, offset: u64, header: &RecordHeader) -> bool {
        let Some(length) = header.checked_length() else { return false };
        let record = self.slice(offset, length);
        header.head_matches(generation, &record[..header.head_bytes()])
            && header.content_matches(generation, &record[header.content_range()])
    }

    fn next_whole_frame(&mut self, used: &Used, log: LogId, from: u64, limit: u64) -> Option<u64> {
        let mut at = from;
        while at < limit {
            if let Some(header) = self.frame(used, log, at)
                && self.records(&header, at).is_some()
            {
                return Some(at);
            }
            at += BLOCK_BYTES;
        }
        None
    }
}

/// A higher commit number is no mark of a frame.
const COMMITS_SKIPPED_MAX: u64 = 1 << 32;

#[cfg(test)]
mod tests {
    use super::*;

    /// Every combination that can be found fits exactly one row.
    #[test]
    fn the_table_covers_everything_once() {
        for bits in 0..128_u32 {
            let bit = |number: u32| bits >> number & 1 == 1;
            let seen = Seen {
                place: if bit(0) { SurveyPlace::Sealed } else { SurveyPlace::Open },
                is_ours: bit(1),
                is_whole: bit(2),
                is_in_order: bit(3),
                has_whole_records: bit(4),
                is_followed: bit(5),
                is_first: bit(6),
            };
            assert_eq!(TABLE.iter().filter(|row| row.matches(&seen)).count(), 1, "{seen:?}");
        }
    }

    /// Nothing that may have been acknowledged is cut: neither what a later frame follows, nor what the next segment's
    /// header vouches for. And nothing is applied that is not whole.
    #[test]
    fn the_table_keeps_the_promises() {
        for bits in 0..128_u32 {
            let bit = |number: u32| bits >> number & 1 == 1;
            let seen = Seen {
                place: if bit(0) { SurveyPlace::Sealed } else { SurveyPlace::Open },
                is_ours: bit(1),
                is_whole: bit(2),
                is_in_order: bit(3),
                has_whole_records: bit(4),
                is_followed: bit(5),
                is_first: bit(6),
            };
            let verdict = decide(&seen);
            if seen.place == SurveyPlace::Sealed || seen.is_followed {
                assert!(!matches!(verdict, Verdict::Cut | Verdict::End), "{seen:?}");
            }
            if matches!(verdict, Verdict::Keep | Verdict::KeepWholeRecords) {
                assert!(seen.is_ours && seen.is_whole && seen.is_in_order, "{seen:?}");
            }
            if verdict == Verdict::Keep {
                assert!(seen.has_whole_records, "{seen:?}");
            }
        }
    }
}
