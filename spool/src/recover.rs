//! Recovery: from the files of a log to its live messages, without trusting a byte that is not checked.
//!
//! The checkpoint is loaded (`load.rs`), and what was written since it was begun is replayed in the order of commits,
//! with reads and not through a map, so that a bad sector is an error and not a signal. Without a checkpoint all
//! segments are. Nothing is appended to a segment that was found at the start while there are others: later headers say
//! where it ends.
//!
//! See also `survey.rs`, which finds the segments and their order, `replay.rs`, which reads them, and `FORMAT.md` for
//! the case analysis.
//!
//! Over 500 lines: what recovery tells, and each step of it.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::{fmt, io, mem};

use rkyv::rancor::Failure;

use crate::append::{Tail, is_settled};
use crate::checkpoint::{CHECKPOINT_FILES, CheckpointFile};
use crate::copy_forward::{add_older, read_state};
use crate::directory::LogDirectory;
use crate::error::RecoverError;
use crate::format::{
    Chain, FRAME_HEADER_BYTES, FrameHeader, LATER_OUTCOME_SCHEMA, RECORD_HEADER_BYTES, RecordHeader, RecordKind,
    SEGMENT_HEADER_BYTES, Seal, SegmentHeader,
};
use crate::index::{Entry, HELD, NOWHERE, Place, Settles, TOUCHED};
use crate::limits::{
    BLOCK_BYTES, CHECKPOINT_FILE_BYTES_MIN, KEPT_FILES_MAX, RECOVERY_READ_BYTES, SEGMENTS_MAX, SPARES_RESERVED,
    SPARES_WANTED, ZERO_STEP_BYTES,
};
use crate::load::{Checkpoint, CheckpointSurvey};
use crate::log::{Log, check_header};
use crate::message::{Memory, Message};
use crate::packed;
use crate::record::{ArchivedEnvelope, CommitNumber, Fate, LogId, MessageId, Outcome, RecipientResult, Sequence};
use crate::replay::{ChainReader, Ended, Frame, SegmentBytes, Step, Unfinished};
use crate::segment::Segment;
use crate::storage::{ReadBuffer, StorageFile, read_exact_at};
use crate::survey::{DamagedHeader, Sorted, Survey, Used};

/// How a log is recovered.
#[derive(Debug, Clone, Copy, Default)]
pub struct RecoverOptions {
    /// Random, and another one at each start: segment generations are drawn from it.
    pub seed: u64,
    /// Records up to this one are events already, so they were durable. `u64::MAX`: nobody wants events.
    pub event_cursor: Sequence,
    /// Reads and checks all that is in segments in use, and each live message, instead of what is needed only.
    /// Summaries are not told then.
    pub reads_everything: bool,
}

/// What recovery tells, in this order: records as they are met, and damage, then the summaries, then the live messages
/// that have none, and those that are held.
#[derive(Debug)]
pub enum Recovered<'a> {
    /// A message or an outcome behind the event cursor, in sequence order.
    Record {
        sequence: Sequence,
        record: RecordRef<'a>,
    },
    /// What [`crate::Summarize`] told of a message when the checkpoint was written.
    Summary {
        id: MessageId,
        summary: &'a [u8],
        /// Recipients without a final fate, by index, ascending. `None` when the message is gone, or is told by
        /// [`Recovered::Message`] because of newer records; but what later summaries refer to may be told here.
        pending: Option<&'a [u32]>,
        /// For [`Log::set_handle`]. Where it stays `None`, the summary could not be used, and the message is told by
        /// [`Recovered::Message`].
        handle: &'a mut Option<u32>,
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
        /// For [`Log::set_handle`].
        handle: &'a mut u32,
    },
    /// A message that may have been delivered: no checkpoint could be read, and the outcomes that would tell may have
    /// been in segments that were used again. It stays until somebody decides.
    Held {
        id: MessageId,
        message: &'a Message,
        /// As far as is known.
        pending: &'a [u32],
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
        outcome: &'a Outcome,
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
    /// A live message, or what is known of its recipients, was in a segment that is not there.
    Lost { message: MessageId },
    /// The newest records, up to the last that is an event already, are not there.
    EndMissing { from: Sequence, to: Sequence },
    /// A finished checkpoint.
    Checkpoint,
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
            Self::Lost { message } => write!(f, "message {message} was in a segment that is missing"),
            Self::EndMissing { from, to } => {
                write!(f, "records {} to {} are missing; the event log has them", from.0, to.0)
            }
            Self::Checkpoint => f.write_str("damaged checkpoint"),
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
        let Self { file, offset, bytes, kept, .. } = self;
        write!(f, "{}: unfinished commit: {bytes} bytes at {offset} cut, {kept}", file.display())
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
        let checkpoints = CheckpointSurvey::take(&directory, survey.discarded())?;
        let begin = checkpoints.newest.as_ref().map(|checkpoint| (&checkpoint.header, &checkpoint.segments[..]));
        let sorted = survey.sort_out(&directory, begin, checkpoints.discarded)?;
        let mut log = Self::empty(directory, options);
        let mut recovery = Recovery {
            log: &mut log,
            visit,
            kept_files: None,
            reads_everything: options.reads_everything,
            begin_sequence: 0,
            held_below: 0,
            given_up: Vec::new(),
            damages: Vec::new(),
            base: None,
            open_ends: OpenEnds::default(),
        };
        let newest = recovery.take_checkpoints(checkpoints);
        let doubtful = recovery.read_segments(sorted, newest.as_ref());
        recovery.check_end();
        recovery.find_lost();
        recovery.count_bodies();
        recovery.judge_headers(&doubtful);
        if let Some(checkpoint) = &newest {
            recovery.tell_summaries(checkpoint);
        }
        recovery.tell_messages()?;
        let open_ends = recovery.open_ends;
        for slot in log.segments.in_use.clone() {
            log.segments.note_dead(slot);
        }
        log.prepare_spares();
        if doubtful.damaged.is_empty() && !doubtful.is_any_missing && log.spares_ready() <= SPARES_RESERVED {
            log.go_on_in(&open_ends);
        }
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
        for slot in 0..CHECKPOINT_FILES {
            if self.checkpoints.files[slot].is_none()
                && let Ok(file) = storage.create(&self.directory.checkpoint_path(slot), CHECKPOINT_FILE_BYTES_MIN)
            {
                self.checkpoints.files[slot] = Some(CheckpointFile { file, capacity: CHECKPOINT_FILE_BYTES_MIN });
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

impl Log {
    /// Goes on in segments whose end nothing tells, since there are no others: else each start would use up one that
    /// outcomes need. What is behind the end is from an earlier use, or the rest of an unfinished commit.
    fn go_on_in(&mut self, open_ends: &OpenEnds) {
        let OpenEnds { slots, has_cuts } = open_ends;
        if *has_cuts {
            return;
        }
        for chain in Chain::ALL {
            let newest = self.segments.newest(chain).map(|newest| newest.number);
            let slot = slots[chain as usize].filter(|slot| newest == Some(self.segments.get(*slot).number));
            self.tails[chain as usize] = slot.map(|slot| Tail { slot, offset: self.segments.get(slot).end });
        }
    }

    /// Puts an empty frame in the place of one that was cut, also where its bytes could not be put aside: nobody was
    /// told of them. The next header will tell that the segment ends there, but that header may be torn while its frame
    /// is whole, and then a start would take the unfinished frame for damage before a later one. Who only looks leaves
    /// all as it is, and a disk that refuses is no worse than before.
    fn close_cut(&mut self, slot: u16, commit: u64, begin: u64) -> bool {
        let commit = commit.max(self.next_commit);
        let segment = self.segments.get_mut(slot);
        let frame = FrameHeader {
            log: self.directory.id(),
            segment: segment.number,
            generation: segment.generation,
            commit,
            first_sequence: self.next_sequence,
            record_count: 0,
            length: FRAME_HEADER_BYTES as u32,
            crc: 0,
        };
        let mut block = vec![0; BLOCK_BYTES as usize];
        frame.encode(0, &mut block[..FRAME_HEADER_BYTES]);
        let written = segment.file.write_at(&block, begin, true);
        if !matches!(written, Ok(written) if written == block.len()) {
            return false;
        }
        self.next_commit = commit + 1;
        self.durable = CommitNumber(commit);
        segment.end = begin + BLOCK_BYTES;
        segment.last_commit = commit;
        let charged = segment.end.max(segment.charged);
        self.directory.budget().charge(charged - segment.charged);
        segment.charged = charged;
        // It was the only one.
        if let Some(position) = self.segments.spares.iter().position(|spare| *spare == slot) {
            self.segments.spares.remove(position);
            self.segments.use_again(slot);
        }
        true
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
    reads_everything: bool,
    /// Records from here on are applied; those before are in the checkpoint.
    begin_sequence: u64,
    /// Without a checkpoint, messages up to here may be finished, and what told so be gone.
    held_below: u64,
    /// Numbers of segments that tombstones stand for.
    given_up: Vec<u64>,
    /// Found, and not reported yet.
    damages: Vec<Damage>,
    /// Of the frame: its first outcome with final fates only.
    base: Option<(u64, Outcome)>,
    open_ends: OpenEnds,
}

/// A region of a segment that is not what was written.
struct Damage {
    slot: u16,
    segment: u64,
    region: Range<u64>,
    reason: Reason,
}

/// Segments whose end no header tells, and no checkpoint.
#[derive(Default)]
struct OpenEnds {
    /// Of each chain, its last one, if it is such.
    slots: [Option<u16>; 2],
    /// An unfinished commit is still where it was.
    has_cuts: bool,
}

impl Recovery<'_> {
    fn take_checkpoints(&mut self, survey: CheckpointSurvey) -> Option<Checkpoint> {
        let CheckpointSurvey { newest, kept, files, damaged, next_number, .. } = survey;
        self.log.checkpoints.kept = kept;
        self.log.checkpoints.files = files;
        self.log.checkpoints.next_number = next_number;
        for (slot, bytes) in damaged {
            self.report(Quarantine {
                log: self.log.id(),
                file: self.log.directory.checkpoint_path(slot),
                offset: 0,
                bytes,
                reason: Reason::Checkpoint,
                kept: Kept::Not { reason: "it is only where it was, until it is written again".to_owned() },
            });
        }
        newest
    }

    fn read_segments(&mut self, sorted: Sorted, checkpoint: Option<&Checkpoint>) -> DoubtfulHeaders {
        let Sorted { used, spares, damaged_headers, mut missing, next_number, discarded } = sorted;
        self.log.next_number = next_number;
        self.log.discarded = discarded;
        for (slot, segment) in spares {
            self.log.segments.put(slot, segment);
            self.log.segments.spares.push_back(slot);
        }
        for used in &used {
            self.put_segment(used);
        }
        match checkpoint {
            Some(checkpoint) => {
                let header = &checkpoint.header;
                self.begin_sequence = header.begin_sequence;
                self.log.next_sequence = self.log.next_sequence.max(header.begin_sequence);
                self.log.next_commit = self.log.next_commit.max(header.begin_commit);
                let loaded = checkpoint.load(self.log);
                // Its slices were whole a moment ago: what can't be read now is told when it is asked for.
                debug_assert!(loaded);
            }
            None => self.held_below = discarded,
        }
        // Segments with a damaged first block that was the begin of a use which never was acknowledged.
        let mut unfinished: Vec<u64> = damaged_headers.iter().map(|found| found.number).collect();
        unfinished.retain(|number| used.binary_search_by_key(number, |used| used.number).is_err());
        let first_sequence = used.iter().map(|used| used.first_sequence).max().unwrap_or(1);
        let first_commit = used.iter().map(|used| used.first_commit).max().unwrap_or(1);
        let salvaged: Vec<(u16, u64)> =
            used.iter().filter(|used| used.is_salvaged).map(|used| (used.slot, used.first_commit)).collect();
        let replayed = self.replay(used, &mut unfinished);
        missing.retain(|number| !self.given_up.contains(number));
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
        // Nothing of a segment may be left but its header.
        self.log.next_sequence = self.log.next_sequence.max(first_sequence);
        self.log.next_commit = self.log.next_commit.max(first_commit);
        let bytes = checkpoint.map_or(0, |checkpoint| checkpoint.bytes);
        self.log.checkpoints.set_replayed(replayed, bytes);
        self.log.durable = CommitNumber(self.log.next_commit - 1);
        DoubtfulHeaders {
            damaged: damaged_headers,
            unfinished,
            salvaged,
            is_any_missing: !missing.is_empty(),
            has_checkpoint: checkpoint.is_some(),
        }
    }

    /// Only what was durable became an event, so a log that ends before the event cursor has lost its end: the files
    /// themselves can't tell when the newest segment is gone. Its numbers stay used, because ids that were given out
    /// must not name other mail, and what lies below the cursor would have no events.
    fn check_end(&mut self) {
        let (from, to) = (self.log.next_sequence, self.log.event_cursor);
        if to == u64::MAX || to < from {
            return;
        }
        self.log.next_sequence = to + 1;
        self.report(Quarantine {
            log: self.log.id(),
            file: self.log.directory.path().to_owned(),
            offset: 0,
            bytes: 0,
            reason: Reason::EndMissing { from: Sequence(from), to: Sequence(to) },
            kept: Kept::Not { reason: "there is nothing".to_owned() },
        });
    }

    /// Tells damaged first blocks from those that a use left which was never acknowledged. What counts in each segment
    /// is known by now.
    fn judge_headers(&mut self, doubtful: &DoubtfulHeaders) {
        let DoubtfulHeaders { damaged, unfinished, salvaged, is_any_missing, has_checkpoint } = doubtful;
        for found in damaged {
            let slot = self.log.segments.by_number(found.number);
            let is_dead = || *has_checkpoint && slot.is_none_or(|slot| self.log.segments.get(slot).live == 0);
            // Its header was being covered.
            let is_given_up = self.given_up.contains(&found.number);
            let is_unfinished =
                found.number == 0 && !is_any_missing || unfinished.contains(&found.number) || is_given_up || is_dead();
            let kept = self.report_header(found, is_unfinished);
            let first_commit = salvaged.iter().find(|(slot, _)| *slot == found.slot).map(|(_, commit)| *commit);
            if let (Kept::File(_), Some(first_commit)) = (kept, first_commit) {
                self.mend_header(found.slot, first_commit);
            }
        }
    }

    fn put_segment(&mut self, used: &Used) {
        let mut segment = Segment::new(Arc::clone(&used.file), used.capacity);
        segment.chain = used.chain;
        segment.number = used.number;
        segment.generation = used.generation;
        segment.first_sequence = used.first_sequence;
        segment.last_commit = used.first_commit.saturating_sub(1);
        if let Some(row) = &used.row {
            segment.end = row.end;
            segment.last_sequence = row.last_sequence;
            segment.last_commit = row.last_commit;
            segment.last_event = row.last_event;
            segment.charged = row.end;
            self.log.directory.budget().charge(row.end);
        }
        self.log.segments.put(used.slot, segment);
        self.log.segments.in_use.push_back(used.slot);
    }

    /// Where a segment is to be read from; `None` when nothing in it is needed.
    fn read_from(&self, used: &Used) -> Option<u64> {
        let from_begin = Some(SEGMENT_HEADER_BYTES as u64);
        match &used.row {
            None => from_begin,
            Some(_) if self.reads_everything => from_begin,
            Some(row) if row.last_event > self.log.event_cursor => from_begin,
            Some(row) => row.is_tail.then_some(row.end),
        }
    }

    /// Reads both chains in the order of commits. Returns how many bytes were read.
    fn replay(&mut self, used: Vec<Used>, unfinished_headers: &mut Vec<u64>) -> u64 {
        let mut chains: [Vec<(Used, u64)>; 2] = [Vec::new(), Vec::new()];
        for used in used {
            if let Some(from) = self.read_from(&used) {
                chains[used.chain as usize].push((used, from));
            }
        }
        let mut readers = chains.map(|segments| ChainReader::new(self.log.id(), segments));
        let mut next: [Option<Frame>; 2] = [None, None];
        let mut ends = Vec::new();
        for chain in Chain::ALL {
            next[chain as usize] = self.next_frame(&mut readers[chain as usize], &mut ends, unfinished_headers);
        }
        loop {
            let chain = match &next {
                [None, None] => break,
                [Some(_), None] => Chain::Mail,
                [None, Some(_)] => Chain::Copies,
                [Some(mail), Some(copies)] if mail.header.commit < copies.header.commit => Chain::Mail,
                [Some(_), Some(_)] => Chain::Copies,
            };
            let reader = &mut readers[chain as usize];
            if let Some(frame) = next[chain as usize].take() {
                self.apply_frame(&mut reader.bytes, &frame);
            }
            next[chain as usize] = self.next_frame(reader, &mut ends, unfinished_headers);
        }
        self.report_damages();
        let next_commit = self.log.next_commit;
        for Unfinished { segment, commit, region } in ends {
            let Some(slot) = self.log.segments.by_number(segment).or_else(|| self.spare_of(segment)) else { continue };
            let segment_of = self.log.segments.get(slot);
            let mut bytes = SegmentBytes::default();
            bytes.begin_at(Arc::clone(&segment_of.file), segment_of.capacity, region.start);
            if commit.is_some_and(|commit| commit < next_commit) {
                // A later commit was finished, so this one was, too.
                self.quarantine_at(slot, segment, &mut bytes, region, Reason::Frame);
            } else {
                let begin = region.start;
                self.cut_at(slot, segment, &mut bytes, region);
                self.open_ends.has_cuts |= !self.log.close_cut(slot, commit.unwrap_or(0), begin);
            }
        }
        readers.iter().map(|reader| reader.read_bytes).sum()
    }

    /// What is damaged in a segment that was given up was written over by the begin of its file's next use, whose
    /// header is torn.
    fn report_damages(&mut self) {
        for Damage { slot, segment, region, reason } in mem::take(&mut self.damages) {
            if !self.given_up.contains(&segment) {
                let segment_of = self.log.segments.get(slot);
                let mut bytes = SegmentBytes::default();
                bytes.begin_at(
                    Arc::clone(&segment_of.file),
                    segment_of.capacity,
                    region.start / BLOCK_BYTES * BLOCK_BYTES,
                );
                self.quarantine_at(slot, segment, &mut bytes, region, reason);
            }
        }
    }

    fn spare_of(&self, number: u64) -> Option<u16> {
        self.log.segments.spares.iter().copied().find(|slot| self.log.segments.get(*slot).number == number)
    }

    fn next_frame(
        &mut self,
        reader: &mut ChainReader,
        ends: &mut Vec<Unfinished>,
        unfinished_headers: &mut Vec<u64>,
    ) -> Option<Frame> {
        loop {
            match reader.next()? {
                Step::Frame(frame) => return Some(frame),
                Step::Unfinished(unfinished) => ends.push(unfinished),
                Step::Damaged(segment, region) => {
                    let slot = self.log.segments.by_number(segment).expect("a segment that is being read is in use");
                    self.damages.push(Damage { slot, segment, region, reason: Reason::Frame });
                }
                Step::Ended(ended) => self.end_segment(ended, unfinished_headers),
            }
        }
    }

    fn end_segment(&mut self, ended: Ended, unfinished_headers: &mut Vec<u64>) {
        let Ended { used, end, frames, is_last } = ended;
        let slot = used.slot;
        if used.is_truncated {
            let mut bytes = SegmentBytes::default();
            bytes.begin(Arc::clone(&used.file), used.capacity);
            self.quarantine_at(slot, used.number, &mut bytes, used.capacity..used.capacity, Reason::Truncated);
        }
        if used.is_salvaged && is_last && frames <= 1 {
            unfinished_headers.push(used.number);
        }
        if is_last && used.sealed_end.is_none() && !used.is_salvaged && !used.is_truncated {
            self.open_ends.slots[used.chain as usize] = Some(slot);
        }
        let segment = self.log.segments.get_mut(slot);
        if end == SEGMENT_HEADER_BYTES as u64 && is_last && segment.live == 0 {
            // Its first commit was never finished. It keeps its number, which the next header passes over.
            self.log.directory.budget().refund(segment.charged);
            segment.charged = 0;
            segment.end = 0;
            self.log.segments.in_use.retain(|other| *other != slot);
            self.log.segments.spares.push_back(slot);
            return;
        }
        let charged = end.max(segment.charged);
        self.log.directory.budget().charge(charged - segment.charged);
        segment.end = end.max(segment.end);
        segment.charged = charged;
    }

    fn apply_frame(&mut self, bytes: &mut SegmentBytes, frame: &Frame) {
        let Frame { segment: number, generation, slot, at, header: frame_header, records } = frame;
        self.base = None;
        for (position, header) in records {
            let offset = at + *position as u64;
            let length = header.checked_length().expect("a length that was checked with the frame");
            let is_whole = bytes.is_record_whole(*generation, offset, header);
            let applied = is_whole && self.apply_record(*slot, bytes.slice(offset, length), offset, header).is_some();
            if !applied {
                let reason = Reason::Record {
                    sequence: Sequence(header.sequence),
                    message: MessageId::from_raw(header.message),
                };
                let region = offset..offset + length as u64;
                self.damages.push(Damage { slot: *slot, segment: *number, region, reason });
            }
            self.log.next_sequence = self.log.next_sequence.max(header.sequence + 1);
        }
        let segment = self.log.segments.get_mut(*slot);
        segment.last_commit = segment.last_commit.max(frame_header.commit);
        self.log.next_commit = self.log.next_commit.max(frame_header.commit + 1);
    }

    /// `None` when the record makes no sense, whole as it is.
    fn apply_record(&mut self, slot: u16, record: &[u8], offset: u64, header: &RecordHeader) -> Option<()> {
        let id = MessageId::from_raw(header.message);
        let is_applied = header.sequence >= self.begin_sequence;
        if id.log() != self.log.directory.id() || is_applied && header.sequence < self.log.next_sequence {
            return None;
        }
        let place = Place::new(slot, offset, record.len());
        let message = id.sequence().0;
        let archive = &record[header.archive_range()];
        let outcome;
        let mut news = None;
        match header.kind {
            MESSAGE => {
                let envelope = rkyv::access::<ArchivedEnvelope, Failure>(archive).ok()?;
                if message != header.sequence {
                    return None;
                }
                if is_applied {
                    self.apply_message(header, place, envelope.recipients.len() as u32, &[]);
                }
                let size = header.content_bytes() as u64 + self.shared_body_bytes(header);
                news = Some(RecordRef::Message { id, envelope, size });
            }
            OUTCOME => {
                let read = self.read_outcome(header, archive);
                if is_applied && let Some(outcome) = &read {
                    self.settle(message, place, outcome.results.iter().map(|result| (result.index, result.fate)));
                } else if is_applied {
                    // What it refers to is damaged: its fates count, but no event can tell of them.
                    let fates = packed::read_later_fates(header.schema, archive)?;
                    self.settle(message, place, fates.into_iter());
                }
                outcome = read?;
                news = Some(RecordRef::Outcome { outcome: &outcome });
            }
            COPY => {
                rkyv::access::<ArchivedEnvelope, Failure>(archive).ok()?;
                let state = packed::read_state(header.schema, &record[header.state_range()])?;
                if is_applied && self.log.index.get(message).is_some() {
                    self.apply_copy(header, place, &state.finished);
                } else if is_applied {
                    self.apply_message(header, place, state.recipients, &state.finished);
                }
            }
            STATE => {
                packed::read_state(header.schema, archive)?;
                if is_applied && let Some(before) = self.log.index.restate(message, place) {
                    self.log.recount(&before, CommitNumber(0));
                    self.log.index.set_flag(message, TOUCHED, true);
                }
            }
            BODY => {
                if is_applied {
                    let Log { bodies, segments, .. } = &mut *self.log;
                    let moved = bodies.relocate(segments, message, place, CommitNumber(0));
                    if moved.is_none() {
                        let bytes = header.content_bytes() as u64;
                        bodies.insert(segments, message, place, bytes, CommitNumber(0));
                    }
                }
            }
            TOMBSTONES => {
                let finals = packed::read_tombstones(header.schema, archive)?;
                self.given_up.push(message);
                if is_applied {
                    self.apply_tombstones(place, finals);
                }
            }
            _ => return None,
        }
        let segment = self.log.segments.get_mut(slot);
        segment.last_sequence = segment.last_sequence.max(header.sequence);
        if let Some(record) = news {
            segment.last_event = segment.last_event.max(header.sequence);
            if header.sequence > self.log.event_cursor {
                (self.visit)(Recovered::Record { sequence: Sequence(header.sequence), record });
            }
        }
        Some(())
    }

    fn settle(&mut self, message: u64, place: Place, fates: impl Iterator<Item = (u32, Fate)>) {
        let fates = fates.map(|(index, fate)| (index, Settles::from(fate.is_final())));
        if let Some((before, _)) = self.log.index.settle(message, place, fates) {
            self.log.recount(&before, CommitNumber(0));
            self.log.index.set_flag(message, TOUCHED, true);
        }
    }

    /// One that refers to another makes no sense without that one.
    fn read_outcome(&mut self, header: &RecordHeader, archive: &[u8]) -> Option<Outcome> {
        if header.schema == LATER_OUTCOME_SCHEMA {
            let (_, base) = self.base.as_ref().filter(|(sequence, _)| *sequence == header.base)?;
            return packed::read_later_outcome(header.message, archive, base);
        }
        let outcome = packed::read_outcome(header.schema, header.message, archive)?;
        if self.base.is_none() && is_settled(&outcome) {
            self.base = Some((header.sequence, outcome.clone()));
        }
        Some(outcome)
    }

    /// A message or a copy of one that the index does not know.
    fn apply_message(&mut self, header: &RecordHeader, place: Place, recipients: u32, finished: &[u32]) {
        let message = MessageId::from_raw(header.message).sequence().0;
        if !self.log.index.insert(message, place, recipients, finished) {
            return;
        }
        self.log.segments.add_live(place, CommitNumber(0));
        if header.shared_body != 0 {
            self.log.index.set_body(message, header.shared_body);
        }
        self.mark(header, message);
    }

    /// A copy of a message that the index knows. Outcomes that told of final fates before it may be gone by now.
    fn apply_copy(&mut self, header: &RecordHeader, place: Place, finished: &[u32]) {
        let message = MessageId::from_raw(header.message).sequence().0;
        let finals = finished.iter().map(|index| (*index, Settles::Finally));
        if let Some((before, _)) = self.log.index.settle(message, place, finals) {
            self.log.recount(&before, CommitNumber(0));
        }
        if let Some(before) = self.log.index.relocate(message, place) {
            self.log.recount(&before, CommitNumber(0));
            self.mark(header, message);
        }
    }

    /// Fates that outcomes told which are gone by now.
    fn apply_tombstones(&mut self, place: Place, finals: Vec<(u64, Vec<u32>)>) {
        for (message, recipients) in finals {
            let finals = recipients.into_iter().map(|index| (index, Settles::Finally));
            if let Some((before, _)) = self.log.index.settle(message, place, finals) {
                self.log.recount(&before, CommitNumber(0));
                self.log.index.set_flag(message, TOUCHED, true);
            }
        }
    }

    /// A record that holds the message's whole state was found.
    fn mark(&mut self, header: &RecordHeader, message: u64) {
        let is_held = header.flags & RecordHeader::HELD != 0 || header.sequence <= self.held_below;
        self.log.index.set_flag(message, HELD, is_held);
        self.log.index.set_flag(message, TOUCHED, true);
    }

    fn shared_body_bytes(&self, header: &RecordHeader) -> u64 {
        let body = self.log.bodies.get(header.shared_body).filter(|_| header.shared_body != 0);
        body.map_or(0, |body| body.bytes)
    }

    /// Counts who names each shared body; those that nobody names are dead.
    fn count_bodies(&mut self) {
        let Log { index, bodies, segments, .. } = &mut *self.log;
        for body in index.shared_bodies() {
            bodies.reference(segments, body, CommitNumber(0));
        }
        bodies.release_all(segments);
    }

    /// Reports what was in segments that are not there, and forgets it.
    fn find_lost(&mut self) {
        let log = &*self.log;
        let is_nowhere = |place: Place| place.slot == NOWHERE;
        let is_lost = |entry: &&Entry| is_nowhere(entry.record()) || log.index.states(entry).any(is_nowhere);
        let lost: Vec<Entry> = log.index.iter().filter(is_lost).copied().collect();
        for entry in lost {
            // What was in a segment that was given up counted no more: newer records tell it. They were replayed before
            // the tombstones, so that what they took the place of is still here.
            let is_given_up = |place: Place| self.given_up.contains(&u64::from(place.offset16));
            let tells_nothing = self.log.index.states(&entry).filter(|place| is_nowhere(*place)).all(is_given_up);
            if !is_nowhere(entry.record()) && tells_nothing {
                self.log.index.retain_states(&entry, |place| !is_nowhere(place));
                self.log.index.set_flag(entry.sequence(), TOUCHED, true);
                continue;
            }
            let message = MessageId::new(self.log.id(), Sequence(entry.sequence()));
            self.report(Quarantine {
                log: self.log.id(),
                file: self.log.directory.path().to_owned(),
                offset: entry.record().offset(),
                bytes: entry.record().length(),
                reason: Reason::Lost { message },
                kept: Kept::Not { reason: "there is nothing".to_owned() },
            });
            if is_nowhere(entry.record()) {
                if let Some(before) = self.log.index.remove(entry.sequence()) {
                    self.log.recount(&before, CommitNumber(0));
                }
            } else {
                let states: Vec<Place> = self.log.index.states(&entry).collect();
                self.log.index.forget_states(entry.sequence());
                for state in states {
                    self.log.segments.remove_live(state, CommitNumber(0));
                }
                self.log.index.set_flag(entry.sequence(), TOUCHED, true);
            }
        }
    }

    fn tell_summaries(&mut self, checkpoint: &Checkpoint) {
        let log = self.log.id();
        let visit = &mut *self.visit;
        if self.reads_everything {
            return;
        }
        checkpoint.tell_summaries(&mut self.log.index, |sequence, pending, summary| {
            let mut handle = None;
            let id = MessageId::new(log, Sequence(sequence));
            visit(Recovered::Summary { id, summary, pending, handle: &mut handle });
            handle
        });
    }

    /// Reads and tells the messages that no summary told.
    fn tell_messages(&mut self) -> Result<(), RecoverError> {
        let place = |entry: &Entry| {
            let place = entry.record();
            (self.log.segments.get(place.slot).number, place.offset16, entry.sequence())
        };
        let is_told_now = |entry: &&Entry| self.reads_everything || entry.has(TOUCHED);
        let mut order: Vec<(u64, u32, u64)> = self.log.index.iter().filter(is_told_now).map(place).collect();
        order.sort_unstable();
        let mut records = Window::new(RECOVERY_READ_BYTES);
        let mut states = Window::new(STATES_WINDOW_BYTES);
        for (_, _, sequence) in order {
            self.log.index.set_flag(sequence, TOUCHED, false);
            let entry = *self.log.index.get(sequence).expect("an entry that was just listed");
            let place = entry.record();
            let id = MessageId::new(self.log.id(), Sequence(sequence));
            let segment = self.log.segments.get(place.slot);
            let (memory, start) = records.get(segment, place).map_err(|error| self.io_error(place.slot, error))?;
            let header = RecordHeader::decode(&memory[start..start + RECORD_HEADER_BYTES]);
            let mut message = Message::new(Memory::Owned(memory), start, segment.generation, header);
            let is_right = check_header(&header, id, place).is_ok()
                && message.envelope().is_ok()
                && (!self.reads_everything || message.content_matches());
            if !is_right {
                // Records behind the checkpoint were whole a moment ago; others are read only now.
                self.quarantine_record(&entry, id);
                continue;
            }
            if let Some(body) = self.log.index.body(&entry) {
                match self.read_shared_body(body) {
                    Some((memory, header)) => message = message.with_body(memory, 0, header),
                    None => {
                        self.quarantine_record(&entry, id);
                        continue;
                    }
                }
            }
            let pending = self.log.index.pending(&entry);
            let results = self.latest_results(&entry, &message, &pending, &mut states);
            if entry.has(HELD) {
                (self.visit)(Recovered::Held { id, message: &message, pending: &pending, results: &results });
                continue;
            }
            let mut handle = 0;
            let told =
                Recovered::Message { id, message: &message, pending: &pending, results: &results, handle: &mut handle };
            (self.visit)(told);
            self.log.index.set_handle(sequence, handle);
        }
        Ok(())
    }

    fn quarantine_record(&mut self, entry: &Entry, message: MessageId) {
        let place = entry.record();
        let segment = self.log.segments.get(place.slot);
        let number = segment.number;
        let mut bytes = SegmentBytes::default();
        bytes.begin_at(Arc::clone(&segment.file), segment.capacity, place.offset());
        let region = place.offset()..place.offset() + place.length();
        let sequence = RecordHeader::decode(bytes.slice(region.start, RECORD_HEADER_BYTES)).sequence;
        let reason = Reason::Record { sequence: Sequence(sequence), message };
        self.quarantine_at(place.slot, number, &mut bytes, region, reason);
    }

    fn read_shared_body(&mut self, sequence: u64) -> Option<(Memory, RecordHeader)> {
        let place = self.log.bodies.get(sequence)?.place;
        if place.slot == NOWHERE {
            return None;
        }
        let segment = self.log.segments.get(place.slot);
        let memory = match self.log.bodies.read_lately(sequence) {
            Some(memory) => memory,
            None => {
                let mut memory = ReadBuffer::new();
                memory.resize(place.length() as usize, 0);
                read_exact_at(segment.file.as_ref(), &mut memory, place.offset()).ok()?;
                Arc::new(memory)
            }
        };
        let header = crate::commit::check_body(sequence, place, segment.generation, &memory).ok()?;
        self.log.bodies.keep_read(sequence, &memory);
        Some((Memory::Owned(memory), header))
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
        for place in self.log.index.states(entry) {
            let segment = self.log.segments.get(place.slot);
            let Ok((memory, start)) = window.get(segment, place) else { continue };
            let record = &memory[start..start + place.length() as usize];
            let told = read_state(message.id(), segment.generation, record);
            add_older(&mut results, told.into_iter().flatten());
        }
        let header = message.header();
        if header.kind == COPY {
            let state = packed::read_state(header.schema, message.bytes(header.state_range()));
            add_older(&mut results, state.into_iter().flat_map(|state| state.deferred));
        }
        results.retain(|result| pending.binary_search(&result.index).is_ok());
        results.sort_unstable_by_key(|result| result.index);
        results
    }

    fn report_header(&mut self, found: &DamagedHeader, is_unfinished: bool) -> Kept {
        let mut bytes = SegmentBytes::default();
        bytes.begin(Arc::clone(&found.file), found.capacity);
        let region = 0..(SEGMENT_HEADER_BYTES as u64).min(found.capacity);
        if is_unfinished && found.reason == Reason::SegmentHeader {
            self.cut_at(found.slot, found.number, &mut bytes, region)
        } else {
            self.quarantine_at(found.slot, found.number, &mut bytes, region, found.reason)
        }
    }

    fn report(&mut self, quarantine: Quarantine) {
        (self.visit)(Recovered::Quarantined(&quarantine));
    }

    fn quarantine_at(
        &mut self,
        slot: u16,
        number: u64,
        bytes: &mut SegmentBytes,
        region: Range<u64>,
        reason: Reason,
    ) -> Kept {
        let kept = self.keep("quarantine", number, bytes, region.clone());
        let quarantine = Quarantine {
            log: self.log.id(),
            file: self.log.segment_path(slot),
            offset: region.start,
            bytes: region.end - region.start,
            reason,
            kept: kept.clone(),
        };
        self.report(quarantine);
        kept
    }

    fn cut_at(&mut self, slot: u16, number: u64, bytes: &mut SegmentBytes, region: Range<u64>) -> Kept {
        let kept = self.keep("cut", number, bytes, region.clone());
        let cut = Cut {
            log: self.log.id(),
            file: self.log.segment_path(slot),
            offset: region.start,
            bytes: region.end - region.start,
            kept,
        };
        (self.visit)(Recovered::Cut(&cut));
        cut.kept
    }

    /// Writes a header for frames that were found without a whole one, so that a later start need not guess again. What
    /// it can't say of the other chain it leaves open.
    fn mend_header(&mut self, slot: u16, first_commit: u64) {
        let segments = &self.log.segments;
        let Some(place) = segments.in_use.iter().position(|other| *other == slot) else { return };
        let segment = segments.get(slot);
        let before = segments.in_use.range(..place).rev().map(|slot| segments.get(*slot));
        let previous = before.into_iter().find(|before| before.chain == segment.chain);
        let header = SegmentHeader {
            log: self.log.directory.id(),
            number: segment.number,
            generation: segment.generation,
            first_sequence: segment.first_sequence,
            first_commit,
            tail: segments.get(segments.in_use[0]).number,
            previous: previous.map(Segment::seal).unwrap_or_default(),
            capacity: segment.capacity,
            discarded: self.log.discarded,
            chain: segment.chain,
            other: Seal::default(),
        };
        let mut block = vec![0; SEGMENT_HEADER_BYTES];
        header.encode(&mut block);
        // Where it can't be written, the next start guesses as this one did.
        let _ = segment.file.write_at(&block, 0, true);
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

/// Damaged first blocks, and what tells what they were.
struct DoubtfulHeaders {
    damaged: Vec<DamagedHeader>,
    /// Numbers of segments whose only commit was never acknowledged.
    unfinished: Vec<u64>,
    /// Segments that are read without a header, with their first commits.
    salvaged: Vec<(u16, u64)>,
    is_any_missing: bool,
    has_checkpoint: bool,
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
const STATE: u8 = RecordKind::State as u8;
const BODY: u8 = RecordKind::Body as u8;
const TOMBSTONES: u8 = RecordKind::Tombstones as u8;

const STATES_WINDOW_BYTES: usize = 256 << 10;
