//! Recovery: from the files of a log to its live messages, without trusting a byte that is not checked.
//!
//! Segments are read in order, with reads and not through a map, so that a bad sector is an error and not a signal.
//! What becomes of the bytes at each 4-KiB boundary is one table ([`TABLE`]). As one commit is in flight at a time,
//! only the last frame of a log may be unfinished: it is cut, and its bytes are kept in a side file. Anything wrong
//! before a later whole frame is damage: it is quarantined (kept and reported), and reading goes on behind it. Nothing
//! is ever appended to a segment that was found at the start: the next segment's header says where it ends.
//!
//! See also `survey.rs`, which finds the segments and their order, and `FORMAT.md` for the case analysis.
//!
//! Over 500 lines: the table, and what each of its rows does.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::{fmt, io};

use rkyv::rancor::Failure;

use crate::directory::LogDirectory;
use crate::error::RecoverError;
use crate::format::{FrameHeader, RECORD_HEADER_BYTES, RecordHeader, RecordKind, SEGMENT_HEADER_BYTES};
use crate::index::{Entry, Place};
use crate::limits::{BLOCK_BYTES, KEPT_FILES_MAX, RECOVERY_READ_BYTES, SEGMENTS_MAX, SPARES_WANTED, ZERO_STEP_BYTES};
use crate::log::{Log, check_header};
use crate::message::{Memory, Message};
use crate::record::{
    ArchivedCopiedState, ArchivedEnvelope, ArchivedOutcome, CommitNumber, LogId, MessageId, RecipientResult, Sequence,
};
use crate::retire::{merge_older, read_outcome};
use crate::segment::Segment;
use crate::storage::{ReadBuffer, StorageFile, read_exact_at};
use crate::survey::{DamagedHeader, Place as SurveyPlace, Survey, Used};

/// How a log is recovered.
#[derive(Debug, Clone, Copy)]
pub struct RecoverOptions {
    /// Random, and another one at each start: segment generations are drawn from it.
    pub seed: u64,
    /// Records up to this one are events already.
    pub event_cursor: Sequence,
}

/// What recovery tells, in this order: records and damage as they are met, then the live messages.
#[derive(Debug)]
pub enum Recovered<'a> {
    /// A message or an outcome behind the event cursor, in sequence order.
    Record {
        sequence: Sequence,
        record: RecordRef<'a>,
    },
    /// A live message.
    Message {
        id: MessageId,
        /// Shares its memory with neighbours: not to be kept for long.
        message: &'a Message,
        /// Recipients without a final fate, by index, ascending.
        pending: &'a [u32],
        /// The latest state of those among them that have been deferred. For others no attempt is on record.
        results: &'a [RecipientResult],
    },
    Quarantined(&'a Quarantine),
    Cut(&'a Cut),
}

/// A record in place.
#[derive(Debug, Clone, Copy)]
pub enum RecordRef<'a> {
    Message {
        id: MessageId,
        envelope: &'a ArchivedEnvelope,
        /// Octets of prefix and body.
        size: u64,
    },
    Outcome {
        outcome: &'a ArchivedOutcome,
    },
}

/// Damage: bytes that are not what was written, with whole frames behind them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quarantine {
    pub log: LogId,
    pub file: PathBuf,
    pub offset: u64,
    pub bytes: u64,
    pub reason: Reason,
    pub kept: Kept,
}

/// A commit that was never finished, hence never acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// Not so in the oldest segment when nothing live is in it: then it is most probably the begin of the segment's
    /// next use, but damage looks the same.
    pub is_certain: bool,
    pub log: LogId,
    pub file: PathBuf,
    pub offset: u64,
    pub bytes: u64,
    pub kept: Kept,
}

/// Where the bytes of a region were put aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    File(PathBuf),
    /// They are only where they were.
    Not {
        reason: String,
    },
}

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// No whole frame where one must be.
    Frame,
    /// One record in a whole frame; `message` is what its header says it is about.
    Record { sequence: Sequence, message: MessageId },
    /// The first block; the segment's frames were found all the same, if there are any.
    SegmentHeader,
    /// The file is shorter than it was.
    Truncated,
    /// A second file with the same segment number.
    Duplicate,
    /// A segment that was in use is not there.
    Missing { segment: u64 },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Frame => f.write_str("damaged frame"),
            Self::Record { sequence, message } => {
                write!(f, "damaged record {} about message {message}", sequence.0)
            }
            Self::SegmentHeader => f.write_str("damaged segment header"),
            Self::Truncated => f.write_str("the file is shorter than it was"),
            Self::Missing { segment } => write!(f, "segment {segment} is missing"),
            Self::Duplicate => f.write_str("a second file with the same segment number"),
        }
    }
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "kept in {}", path.display()),
            Self::Not { reason } => write!(f, "not kept ({reason})"),
        }
    }
}

impl fmt::Display for Quarantine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, offset, bytes, reason, kept, .. } = self;
        write!(f, "{}: {reason}: {bytes} bytes at {offset} quarantined, {kept}", file.display())
    }
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, offset, bytes, kept, is_certain, .. } = self;
        let doubt = if *is_certain { "" } else { " (or damage to a segment that holds nothing live)" };
        write!(f, "{}: unfinished commit{doubt}: {bytes} bytes at {offset} cut, {kept}", file.display())
    }
}

type Visit<'a> = &'a mut dyn FnMut(Recovered<'_>);

impl Log {
    /// Reads a log, tells what is in it, and gets it ready to run. This is the one place where a log does I/O itself.
    pub fn recover(
        directory: LogDirectory,
        options: RecoverOptions,
        visit: &mut dyn FnMut(Recovered<'_>),
    ) -> Result<Self, RecoverError> {
        let survey = Survey::take(&directory)?;
        let mut log = Self::empty(directory, options);
        let mut recovery = Recovery { log: &mut log, visit, kept_files: None, held: None };
        recovery.read_segments(survey);
        recovery.visit_messages()?;
        log.prepare_spares();
        Ok(log)
    }

    /// Makes sure that there is something to append to at once. The first segment is filled with zeros here (50 ms
    /// measured for 64 MiB), later ones by and by; without that each commit would also have to convert its extents.
    fn prepare_spares(&mut self) {
        let storage = self.directory.storage();
        let bytes = self.directory.options().segment_bytes;
        for slot in self.segments.spares.clone() {
            // Segments were smaller once.
            let path = self.segment_path(slot);
            let segment = self.segments.get_mut(slot);
            if segment.capacity < bytes && storage.create(&path, bytes).is_ok() {
                segment.capacity = bytes;
            }
        }
        while self.segments.spares.len() < SPARES_WANTED {
            let Some(slot) = self.segments.vacant(SEGMENTS_MAX) else { return };
            // Without room now, the log opens closed for mail and tries again while it runs.
            let Ok(file) = storage.create(&self.segment_path(slot), bytes) else { return };
            self.segments.put(slot, Segment::new(file, bytes));
            self.segments.spares.push_back(slot);
        }
        let Some(first) = self.segments.spares.front().copied() else { return };
        let segment = self.segments.get_mut(first);
        if segment.number == 0 && segment.zeroed < segment.capacity {
            segment.zeroed = fill_with_zeros(segment.file.as_ref(), segment.zeroed, segment.capacity);
        }
    }
}

/// Returns up to where it came; an error will show again when it matters.
fn fill_with_zeros(file: &dyn StorageFile, from: u64, to: u64) -> u64 {
    let zeros = vec![0; ZERO_STEP_BYTES as usize];
    let mut at = from;
    while at < to {
        let bytes = (to - at).min(ZERO_STEP_BYTES) as usize;
        match file.write_at(&zeros[..bytes], at, false) {
            Ok(written) if written > 0 => at += written as u64,
            _ => break,
        }
    }
    // The pages stay cached, so that commits need not make new ones.
    match file.sync_and_drop_cache(0..0) {
        Ok(()) => at,
        Err(_) => from,
    }
}

/// The state of one recovery.
struct Recovery<'a> {
    log: &'a mut Log,
    visit: Visit<'a>,
    /// Side files so far, once that is known.
    kept_files: Option<usize>,
    /// Damage in the oldest segment: perhaps it is no damage, but a dead segment that was about to be used again.
    held: Option<Vec<(Range<u64>, Reason)>>,
}

impl Recovery<'_> {
    fn read_segments(&mut self, survey: Survey) {
        let Survey { used, spares, damaged_headers, missing, next_number, durable_tail } = survey;
        for number in &missing {
            self.report(Quarantine {
                log: self.log.id(),
                file: self.log.directory.path().to_owned(),
                offset: 0,
                bytes: 0,
                reason: Reason::Missing { segment: *number },
                kept: Kept::Not { reason: "there is nothing".to_owned() },
            });
        }
        self.log.next_number = next_number;
        self.log.durable_tail = durable_tail;
        for spare in spares {
            let (slot, segment) = spare;
            self.log.segments.put(slot, segment);
            self.log.segments.spares.push_back(slot);
        }
        let mut bytes = SegmentBytes::default();
        let count = used.len();
        // Segments with a damaged first block that was the begin of a use which never was acknowledged.
        let mut unfinished: Vec<u64> = damaged_headers.iter().map(|found| found.number).collect();
        unfinished.retain(|number| used.binary_search_by_key(number, |used| used.number).is_err());
        let mut oldest = None;
        for (position, used) in used.into_iter().enumerate() {
            let is_last = position + 1 == count;
            if is_last && used.sealed_end.is_none() {
                // Pages of a write that failed may still be cached, as if they had been written. An error shows in
                // reads.
                let _ = used.file.sync_and_drop_cache(0..used.capacity);
            }
            bytes.begin(Arc::clone(&used.file), used.capacity);
            if position == 0 {
                self.held = Some(Vec::new());
            }
            let frames = self.read_segment(&used, &mut bytes, is_last);
            if used.is_salvaged && is_last && frames <= 1 {
                unfinished.push(used.number);
            }
            if let Some(held) = self.held.take() {
                oldest = Some((used, held));
            }
        }
        if let Some((used, held)) = oldest {
            let slot = self.log.segments.by_number(used.number);
            let is_dead = slot.is_none_or(|slot| self.log.segments.get(slot).live == 0);
            bytes.begin(Arc::clone(&used.file), used.capacity);
            if is_dead {
                unfinished.push(used.number);
            }
            for (region, reason) in held {
                if is_dead {
                    self.cut_at(used.slot, used.number, &mut bytes, region, false);
                } else {
                    self.quarantine(&used, &mut bytes, region, reason);
                }
            }
        }
        for found in &damaged_headers {
            let is_unfinished = found.number == 0 && missing.is_empty() || unfinished.contains(&found.number);
            self.report_header(found, is_unfinished);
        }
        self.log.durable = CommitNumber(self.log.next_commit - 1);
    }

    /// Returns how many frames were kept.
    fn read_segment(&mut self, used: &Used, bytes: &mut SegmentBytes, is_last: bool) -> usize {
        let slot = used.slot;
        let mut segment = Segment::new(Arc::clone(&used.file), used.capacity);
        segment.number = used.number;
        segment.generation = used.generation;
        segment.first_sequence = used.first_sequence;
        segment.last_commit = used.first_commit.saturating_sub(1);
        self.log.segments.put(slot, segment);
        self.log.segments.in_use.push_back(slot);
        self.log.next_sequence = self.log.next_sequence.max(used.first_sequence);
        self.log.next_commit = self.log.next_commit.max(used.first_commit);
        if used.is_truncated {
            self.quarantine_at(slot, used.number, bytes, used.capacity..used.capacity, Reason::Truncated);
        }
        let (end, frames) = self.read_frames(used, bytes, is_last);
        let segment = self.log.segments.get_mut(slot);
        if end == SEGMENT_HEADER_BYTES as u64 && is_last && segment.live == 0 {
            // Its first commit was never finished. It keeps its number, which the next header passes over.
            self.log.segments.in_use.pop_back();
            self.log.segments.spares.push_back(slot);
            return frames;
        }
        segment.end = end;
        segment.charged = end;
        self.log.directory.budget().charge(end);
        frames
    }

    /// Returns where the segment ends, and how many frames were kept.
    fn read_frames(&mut self, used: &Used, bytes: &mut SegmentBytes, is_last: bool) -> (u64, usize) {
        let limit = used.sealed_end.unwrap_or(used.capacity).min(used.capacity);
        let mut at = SEGMENT_HEADER_BYTES as u64;
        let mut last_commit = used.first_commit.saturating_sub(1);
        let mut frames = 0;
        while at < limit {
            let frame = bytes.presumed_frame(used, self.log.directory.id(), at, last_commit + 1);
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
                seen.is_in_order = header.commit > last_commit;
                seen.has_whole_records = found
                    .iter()
                    .all(|(position, record)| bytes.is_record_whole(used.generation, at + *position as u64, record));
                records = found;
            }
            let mut next_whole = None;
            if seen.needs_successor() {
                next_whole = bytes.next_whole_frame(used, self.log.directory.id(), at + BLOCK_BYTES, limit);
                seen.is_followed = next_whole.is_some() || (seen.is_ours && !is_last);
            }
            match decide(&seen) {
                Verdict::Keep | Verdict::KeepWholeRecords => {
                    let header = frame.expect("only a frame is kept");
                    self.apply_frame(used, bytes, at, &header, &records);
                    last_commit = header.commit;
                    frames += 1;
                    at += header.padded();
                }
                Verdict::Probe => {
                    let next = next_whole.unwrap_or(limit);
                    self.quarantine(used, bytes, at..next, Reason::Frame);
                    at = next;
                }
                Verdict::Cut => {
                    let length = frame.map_or(BLOCK_BYTES, |frame| frame.padded());
                    self.cut(used, bytes, at..(at + length.max(BLOCK_BYTES)).min(limit));
                    break;
                }
                Verdict::End => break,
            }
        }
        (used.sealed_end.map_or(at, |sealed| sealed.min(used.capacity)), frames)
    }

    fn apply_frame(
        &mut self,
        used: &Used,
        bytes: &mut SegmentBytes,
        at: u64,
        frame: &FrameHeader,
        records: &[(usize, RecordHeader)],
    ) {
        for (position, header) in records {
            let offset = at + *position as u64;
            let length = header.checked_length().expect("a length that was checked with the frame");
            let applied = bytes.is_record_whole(used.generation, offset, header)
                && self.apply_record(used, bytes.slice(offset, length), offset, header).is_some();
            if !applied {
                let reason = Reason::Record {
                    sequence: Sequence(header.sequence),
                    message: MessageId::from_raw(header.message),
                };
                self.quarantine(used, bytes, offset..offset + length as u64, reason);
            }
            self.log.next_sequence = self.log.next_sequence.max(header.sequence + 1);
        }
        let segment = self.log.segments.get_mut(used.slot);
        segment.last_commit = frame.commit;
        self.log.next_commit = self.log.next_commit.max(frame.commit + 1);
    }

    /// `None` when the record makes no sense, whole as it is.
    fn apply_record(&mut self, used: &Used, record: &[u8], offset: u64, header: &RecordHeader) -> Option<()> {
        let log = &mut *self.log;
        let id = MessageId::from_raw(header.message);
        if header.sequence < log.next_sequence || id.log() != log.directory.id() {
            return None;
        }
        let place = Place::new(used.slot, offset, record.len());
        let message = id.sequence().0;
        let archive = &record[header.archive_range()];
        let is_news = header.sequence > log.event_cursor;
        let mut news = None;
        match header.kind {
            MESSAGE => {
                let envelope = rkyv::access::<ArchivedEnvelope, Failure>(archive).ok()?;
                if message != header.sequence {
                    return None;
                }
                if log.index.insert(message, place, envelope.recipients.len() as u32, &[]) {
                    log.segments.get_mut(used.slot).add_live(place.length(), CommitNumber(0));
                }
                news = Some(RecordRef::Message { id, envelope, size: header.content_bytes() as u64 });
            }
            OUTCOME => {
                let outcome = rkyv::access::<ArchivedOutcome, Failure>(archive).ok()?;
                if outcome.message != header.message {
                    return None;
                }
                let finished = outcome.results.iter().filter(|result| result.is_final());
                let finished = finished.map(|result| result.index.to_native());
                if let Some((before, true)) = log.index.settle(message, place, finished) {
                    let record = before.entry.record();
                    log.segments.get_mut(record.slot).remove_live(record.length(), CommitNumber(0));
                }
                news = Some(RecordRef::Outcome { outcome });
            }
            COPY => {
                rkyv::access::<ArchivedEnvelope, Failure>(archive).ok()?;
                let state = rkyv::access::<ArchivedCopiedState, Failure>(&record[header.state_range()]).ok()?;
                let finished: Vec<u32> = state.finished.iter().map(|index| index.to_native()).collect();
                let is_live = if let Some(before) = log.index.relocate(message, place) {
                    let old = before.entry.record();
                    log.segments.get_mut(old.slot).remove_live(old.length(), CommitNumber(0));
                    true
                } else {
                    log.index.insert(message, place, state.recipients.to_native(), &finished)
                };
                if is_live {
                    let segment = log.segments.get_mut(used.slot);
                    segment.add_live(place.length(), CommitNumber(0));
                    segment.copies.push(message);
                }
            }
            _ => return None,
        }
        let segment = log.segments.get_mut(used.slot);
        segment.last_sequence = header.sequence;
        if let Some(record) = news {
            segment.last_event = header.sequence;
            if is_news {
                (self.visit)(Recovered::Record { sequence: Sequence(header.sequence), record });
            }
        }
        Some(())
    }

    fn visit_messages(&mut self) -> Result<(), RecoverError> {
        let mut order: Vec<(u64, u32, u64)> = self
            .log
            .index
            .iter()
            .map(|entry| {
                let place = entry.record();
                (self.log.segments.get(place.slot).number, place.offset16, entry.sequence)
            })
            .collect();
        order.sort_unstable();
        let mut records = Window::new(RECOVERY_READ_BYTES);
        let mut outcomes = Window::new(OUTCOME_WINDOW_BYTES);
        for (_, _, sequence) in order {
            let entry = *self.log.index.get(sequence).expect("an entry that was just listed");
            let place = entry.record();
            let id = MessageId::new(self.log.id(), Sequence(sequence));
            let segment = self.log.segments.get(place.slot);
            let (memory, start) = records.get(segment, place).map_err(|error| self.io_error(place.slot, error))?;
            let header = RecordHeader::decode(&memory[start..start + RECORD_HEADER_BYTES]);
            if check_header(&header, id, place).is_err() {
                continue; // It was whole a moment ago; whoever asks for it will be told.
            }
            let message = Message::new(Memory::Owned(memory), start, segment.generation, header);
            let pending = self.log.index.pending(&entry);
            let results = self.latest_results(&entry, &message, &pending, &mut outcomes);
            (self.visit)(Recovered::Message { id, message: &message, pending: &pending, results: &results });
        }
        Ok(())
    }

    /// What the outcomes since the record, and the copied state in it, say of the pending recipients.
    fn latest_results(
        &self,
        entry: &Entry,
        message: &Message,
        pending: &[u32],
        window: &mut Window,
    ) -> Vec<RecipientResult> {
        let mut results = Vec::new();
        let mut next = entry.outcome();
        while let Some(place) = next {
            let segment = self.log.segments.get(place.slot);
            let Ok((memory, start)) = window.get(segment, place) else { break };
            let record = &memory[start..start + place.length() as usize];
            let Some((header, outcome)) = read_outcome(message.id(), segment.generation, record) else { break };
            merge_older(&mut results, outcome);
            results.retain(|result| pending.binary_search(&result.index).is_ok());
            next = if results.len() < pending.len() { self.log.previous_outcome(&header) } else { None };
        }
        let header = message.header();
        if header.kind == COPY {
            let state = rkyv::access::<ArchivedCopiedState, Failure>(message.bytes(header.state_range()));
            for result in state.iter().flat_map(|state| state.deferred.iter()) {
                let index = result.index.to_native();
                let is_news = results.iter().all(|newer| newer.index != index);
                if is_news && pending.binary_search(&index).is_ok() {
                    results.push(result.to_result());
                }
            }
        }
        results.sort_unstable_by_key(|result| result.index);
        results
    }

    fn report_header(&mut self, found: &DamagedHeader, is_unfinished: bool) {
        let mut bytes = SegmentBytes::default();
        bytes.begin(Arc::clone(&found.file), found.capacity);
        let region = 0..(SEGMENT_HEADER_BYTES as u64).min(found.capacity);
        if is_unfinished && found.reason == Reason::SegmentHeader {
            self.cut_at(found.slot, found.number, &mut bytes, region, true);
        } else {
            self.quarantine_at(found.slot, found.number, &mut bytes, region, found.reason);
        }
    }

    fn report(&mut self, quarantine: Quarantine) {
        (self.visit)(Recovered::Quarantined(&quarantine));
    }

    fn quarantine(&mut self, used: &Used, bytes: &mut SegmentBytes, region: Range<u64>, reason: Reason) {
        if let Some(held) = &mut self.held {
            held.push((region, reason));
            return;
        }
        self.quarantine_at(used.slot, used.number, bytes, region, reason);
    }

    fn cut(&mut self, used: &Used, bytes: &mut SegmentBytes, region: Range<u64>) {
        self.cut_at(used.slot, used.number, bytes, region, true);
    }

    fn quarantine_at(&mut self, slot: u16, number: u64, bytes: &mut SegmentBytes, region: Range<u64>, reason: Reason) {
        let kept = self.keep("quarantine", number, bytes, region.clone());
        let quarantine = Quarantine {
            log: self.log.id(),
            file: self.log.segment_path(slot),
            offset: region.start,
            bytes: region.end - region.start,
            reason,
            kept,
        };
        self.report(quarantine);
    }

    fn cut_at(&mut self, slot: u16, number: u64, bytes: &mut SegmentBytes, region: Range<u64>, is_certain: bool) {
        let kept = self.keep("cut", number, bytes, region.clone());
        let cut = Cut {
            is_certain,
            log: self.log.id(),
            file: self.log.segment_path(slot),
            offset: region.start,
            bytes: region.end - region.start,
            kept,
        };
        (self.visit)(Recovered::Cut(&cut));
    }

    /// Puts bytes into a side file. The same region at a later start goes into the same file.
    fn keep(&mut self, what: &str, number: u64, bytes: &mut SegmentBytes, region: Range<u64>) -> Kept {
        let storage = self.log.directory.storage();
        let directory = self.log.directory.kept_path();
        let path = directory.join(format!("{what}-{number:08x}-{:08x}", region.start));
        let kept_files =
            *self.kept_files.get_or_insert_with(|| storage.names(&directory).map_or(0, |names| names.len()));
        if kept_files >= KEPT_FILES_MAX {
            return Kept::Not { reason: format!("{KEPT_FILES_MAX} files are kept already") };
        }
        let content = bytes.slice(region.start, (region.end - region.start) as usize);
        match storage.create_directory(&directory).and_then(|()| storage.replace(&path, content)) {
            Ok(()) => {
                self.kept_files = Some(kept_files + 1);
                Kept::File(path)
            }
            Err(error) => Kept::Not { reason: error.to_string() },
        }
    }

    fn io_error(&self, slot: u16, error: io::Error) -> RecoverError {
        RecoverError::Io { path: self.log.segment_path(slot), error }
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
    filled: usize,
}

impl SegmentBytes {
    pub(crate) fn begin(&mut self, file: Arc<dyn StorageFile>, length: u64) {
        self.file = Some(file);
        self.length = length as usize;
        self.filled = 0;
    }

    /// The bytes at `offset`; those behind the file's end, and those that the medium does not give back, read as zeros.
    pub(crate) fn slice(&mut self, offset: u64, length: usize) -> &[u8] {
        let end = offset as usize + length;
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
            self.buffer[start..stop].fill(0);
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
    /// are right. What earlier uses left behind has one or two.
    fn presumed_frame(&mut self, used: &Used, log: LogId, at: u64, commit: u64) -> Option<FrameHeader> {
        let block = self.slice(at, BLOCK_BYTES as usize);
        let has_magic = FrameHeader::has_magic(block);
        let header = FrameHeader::decode(block);
        let marks = [
            has_magic,
            header.log == log && header.segment == used.number,
            header.generation == used.generation,
            header.commit == commit,
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

    fn is_record_whole(&mut self, generation: u64, offset: u64, header: &RecordHeader) -> bool {
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

/// A piece of one segment, so that neighbouring records are read together.
struct Window {
    bytes: usize,
    /// Of the segment, so that a slot that is used again is not taken for the old one.
    number: u64,
    start: u64,
    memory: Arc<ReadBuffer>,
}

impl Window {
    fn new(bytes: usize) -> Self {
        Self { bytes, number: 0, start: 0, memory: Arc::default() }
    }

    /// The memory that holds the record, and where in it.
    fn get(&mut self, segment: &Segment, place: Place) -> io::Result<(Arc<ReadBuffer>, usize)> {
        let held = self.start..self.start + self.memory.len() as u64;
        let wanted = place.offset()..place.offset() + place.length();
        if self.number != segment.number || wanted.start < held.start || wanted.end > held.end {
            let end = (wanted.start + self.bytes as u64).min(segment.capacity).max(wanted.end);
            let mut memory = ReadBuffer::new();
            memory.resize((end - wanted.start) as usize, 0);
            read_exact_at(segment.file.as_ref(), &mut memory, wanted.start)?;
            self.memory = Arc::new(memory);
            self.number = segment.number;
            self.start = wanted.start;
        }
        Ok((Arc::clone(&self.memory), (place.offset() - self.start) as usize))
    }
}

const MESSAGE: u8 = RecordKind::Message as u8;
const OUTCOME: u8 = RecordKind::Outcome as u8;
const COPY: u8 = RecordKind::Copy as u8;

const OUTCOME_WINDOW_BYTES: usize = 256 << 10;

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
