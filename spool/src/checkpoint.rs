//! Writing checkpoints: what is live, and where, so that a start need not read the whole log.
//!
//! A checkpoint is fuzzy. It is begun at a sequence and written in slices while the log goes on; every row tells what
//! was so when its slice was gathered. As all records are absolute, replaying them from that sequence on repairs
//! whatever changed meanwhile. It counts once its header is durable, and that is written last: after all slices, and
//! after the commit of the newest record that a row can tell of. Else a crash could take back what the checkpoint
//! already says.
//!
//! Two checkpoints are kept and a third is being written, in three files that are allocated ahead, so that a full disk
//! can't keep the log from being emptied. How segments depend on them is in `retire.rs`; reading is in `load.rs`.
//!
//! Over 500 lines: each phase of a checkpoint goes on where the one before left it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::checkpoint_format::{
    BODY_ROW_BYTES, BodyRow, CheckpointHeader, MessageRow, PendingRow, RowContext, RowPlace, SEGMENT_ROW_BYTES,
    SegmentRow, SliceKind, SliceWriter,
};
use crate::commit::{Flight, Purpose};
use crate::directory::Durability;
use crate::error::Closed;
use crate::format::{FORMAT_VERSION, SEGMENT_HEADER_BYTES};
use crate::index::{Pending, Place};
use crate::limits::{
    BLOCK_BYTES, CHECKPOINT_FILE_BYTES_MIN, CHECKPOINT_FILE_HEADROOM_PERCENT, CHECKPOINT_FREED_RATIO,
    CHECKPOINT_RETRY_MS, CHECKPOINT_ROW_BYTES_MIN, CHECKPOINT_SEGMENTS_ABOVE, CHECKPOINT_SLICE_BYTES,
    CHECKPOINT_SLICE_INTERVAL_MS, CHECKPOINT_WRITE_BYTES, CHECKPOINT_WRITTEN_BYTES_MAX, CHECKPOINT_WRITTEN_RATIO,
    CHECKPOINT_WRITTEN_RATIO_HURRIED, CHECKPOINT_WRITTEN_SEGMENTS_HURRIED,
};
use crate::log::{Log, Progress, State};
use crate::record::{CommitNumber, MessageId, Sequence};
use crate::segment::Segment;
use crate::shortage::Shortage;
use crate::storage::{Operation, StorageFile, Work};

/// What a log's owner wants to have back at the next start for each live message, in place of reading it.
pub trait Summarize {
    /// A checkpoint begins: whatever summaries refer to is to be told anew in them.
    fn begin(&mut self);
    /// Appends what is to be told of a live message. With nothing, the message is read at the next start. `handle` is
    /// what [`Log::set_handle`] set.
    fn summarize(&mut self, id: MessageId, handle: u32, summary: &mut Vec<u8>);
}

/// No summaries: each start reads the live messages.
impl Summarize for () {
    fn begin(&mut self) {}
    fn summarize(&mut self, _: MessageId, _: u32, _: &mut Vec<u8>) {}
}

/// The checkpoints of a log.
#[derive(Debug, Default)]
pub(crate) struct Checkpoints {
    /// Complete ones, oldest first; at most two.
    pub(crate) kept: Vec<KeptCheckpoint>,
    pub(crate) files: [Option<CheckpointFile>; CHECKPOINT_FILES],
    running: Option<Running>,
    /// A write to a file is under way, perhaps of one that was given up.
    writing: bool,
    /// Of a file, or a larger one.
    shortage: Shortage,
    /// What a short write left over.
    rest: Option<Rest>,
    creating: bool,
    pub(crate) next_number: u64,
    /// What the log had written when the last one was begun.
    written_at_begin: u64,
    /// Messages below this sequence may have a row in some checkpoint.
    pub(crate) last_begin: u64,
    /// Nothing is begun before, because something failed.
    retry_at: Option<Duration>,
    /// What a message's row needed in the last one, for an estimate.
    row_bytes: u64,
    last_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KeptCheckpoint {
    pub(crate) file: usize,
    pub(crate) number: u64,
    pub(crate) begin_sequence: u64,
    pub(crate) begin_segment: u64,
}

#[derive(Debug)]
pub(crate) struct CheckpointFile {
    pub(crate) file: Arc<dyn StorageFile>,
    pub(crate) capacity: u64,
}

/// The one that is being written.
#[derive(Debug)]
struct Running {
    file: usize,
    header: CheckpointHeader,
    phase: Phase,
    /// Gathered and not written yet; goes to `offset`.
    buffer: Vec<u8>,
    offset: u64,
    /// Of the messages' rows.
    message_bytes: u64,
    next_slice: Duration,
}

#[derive(Debug)]
struct Rest {
    file: usize,
    /// Of the buffer.
    offset: u64,
    buffer: Vec<u8>,
    start: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The header that the file may still have must be gone before a slice is: one that was sealed, and not kept
    /// because the write was reported as failed, would tell of slices that are being written over.
    Blanking,
    /// Messages from this sequence on are still to be gathered.
    Gathering {
        next: u64,
    },
    /// All rows are gathered, the newest record that they can tell of is in this commit.
    Gathered {
        commit: CommitNumber,
    },
    Sealing,
}

impl Checkpoints {
    /// Whether neither of the two kept checkpoints' replay needs the segment: it and its last record are from before
    /// both. One without a record is told by its number alone.
    pub(crate) fn cover(&self, segment: &Segment) -> bool {
        self.kept.len() == 2 && self.known_cover(segment)
    }

    /// The same of those that could be read, of which there is one at least: while a checkpoint is written, its file
    /// holds none.
    pub(crate) fn known_cover(&self, segment: &Segment) -> bool {
        self.kept.first().is_some_and(|oldest| {
            segment.number < oldest.begin_segment && segment.last_sequence < oldest.begin_sequence
        })
    }

    /// Segments that were begun between the last two: about as many die at the next, and are begun until then.
    pub(crate) fn segments_begun_between(&self) -> u64 {
        match self.kept[..] {
            [older, newer] => newer.begin_segment.saturating_sub(older.begin_segment),
            _ => 0,
        }
    }

    /// The log has failed: what was gathered may not be so.
    pub(crate) fn give_up(&mut self) {
        self.running = None;
        self.rest = None;
    }

    /// Two of three files are kept, the other one is written; what a row tells is or will be durable. See `audit.rs`.
    #[cfg(any(feature = "sim", test))]
    pub(crate) fn audit(&self, is_open: bool, durable: CommitNumber, mut commits: impl Iterator<Item = CommitNumber>) {
        assert!(self.kept.len() <= CHECKPOINTS_KEPT);
        assert!(self.kept.is_sorted_by(|older, newer| older.number < newer.number && older.file != newer.file));
        let Some(running) = &self.running else { return };
        assert!(is_open, "what was gathered before a commit failed may not be so");
        assert!(self.kept.iter().all(|kept| kept.file != running.file), "{:?} {running:?}", self.kept);
        if let Phase::Gathered { commit } = running.phase {
            assert!(commit <= durable || commits.any(|waiting| waiting == commit), "{commit:?} is void");
        }
    }

    /// What a recovered log has read behind its checkpoint counts as written since.
    pub(crate) fn set_replayed(&mut self, bytes: u64, last_bytes: u64) {
        self.written_at_begin = 0_u64.wrapping_sub(bytes);
        self.last_bytes = last_bytes;
    }
}

impl Log {
    pub(crate) fn poll_checkpoint(&mut self, now: Duration, summaries: &mut dyn Summarize) -> Option<Operation> {
        if !matches!(self.state, State::Open) || self.checkpoints.retry_at.is_some_and(|at| now < at) {
            return None;
        }
        self.checkpoints.retry_at = None;
        if let Some(operation) = self.poll_create_checkpoint(now) {
            return Some(operation);
        }
        if self.checkpoints.running.is_none() && self.wants_checkpoint() {
            self.begin_checkpoint(now, summaries);
        }
        if let Some(Rest { file, offset, buffer, start }) = self.checkpoints.rest.take() {
            return Some(self.write_checkpoint(file, offset, buffer, start));
        }
        if self.checkpoints.writing {
            return None;
        }
        let mut running = self.checkpoints.running.take()?;
        let operation = self.advance_checkpoint(now, &mut running, summaries);
        if self.checkpoints.retry_at.is_none() {
            self.checkpoints.running = Some(running);
        }
        operation
    }

    fn advance_checkpoint(
        &mut self,
        now: Duration,
        running: &mut Running,
        summaries: &mut dyn Summarize,
    ) -> Option<Operation> {
        match running.phase {
            Phase::Blanking => {
                running.phase = Phase::Gathering { next: 0 };
                Some(self.write_checkpoint(running.file, 0, vec![0; BLOCK_BYTES as usize], 0))
            }
            Phase::Gathering { next } => {
                if now < running.next_slice {
                    return None;
                }
                running.next_slice = now + Duration::from_millis(CHECKPOINT_SLICE_INTERVAL_MS);
                running.phase = self.gather_slice(running, next, summaries);
                let is_full = running.buffer.len() >= CHECKPOINT_WRITE_BYTES;
                if !is_full && matches!(running.phase, Phase::Gathering { .. }) {
                    return None;
                }
                self.write_slices(now, running)
            }
            Phase::Gathered { commit } => {
                if self.durable < commit {
                    return None;
                }
                running.phase = Phase::Sealing;
                self.checkpoints.last_bytes = running.offset;
                Some(self.write_checkpoint(running.file, 0, running.header.encode(), 0))
            }
            Phase::Sealing => None,
        }
    }

    fn write_slices(&mut self, now: Duration, running: &mut Running) -> Option<Operation> {
        let end = running.offset + running.buffer.len() as u64;
        let capacity = self.checkpoints.files[running.file].as_ref().map_or(0, |file| file.capacity);
        if end > capacity {
            // Rows are longer than was expected. A larger file is made, unless enough ends before, and it begins anew.
            let measured = running.message_bytes.div_ceil(running.header.messages.max(1));
            self.checkpoints.row_bytes = measured.max(self.checkpoints.row_bytes + 1);
            self.checkpoints.retry_at = Some(now + Duration::from_millis(CHECKPOINT_SLICE_INTERVAL_MS));
            return None;
        }
        let buffer = std::mem::take(&mut running.buffer);
        let offset = std::mem::replace(&mut running.offset, end);
        Some(self.write_checkpoint(running.file, offset, buffer, 0))
    }

    /// Writes `buffer[start..]`; `offset` is the whole buffer's.
    fn write_checkpoint(&mut self, slot: usize, offset: u64, buffer: Vec<u8>, start: usize) -> Operation {
        self.checkpoints.writing = true;
        let file = self.checkpoints.files[slot].as_ref().expect("a file that is being written");
        let file = Arc::clone(&file.file);
        let sync = self.directory.options().durability == Durability::Fsync;
        let work = Work::Write { file, offset: offset + start as u64, buffer, start, sync };
        self.operation(work, Purpose::WriteCheckpoint { slot, offset })
    }

    pub(crate) fn handle_write_checkpoint(
        &mut self,
        now: Duration,
        (slot, offset): (usize, u64),
        buffer: Vec<u8>,
        start: usize,
        result: io::Result<usize>,
    ) {
        self.checkpoints.writing = false;
        let Some(written) = result.ok().filter(|written| *written > 0) else {
            // Mail does not wait for checkpoints: another one will do.
            self.checkpoints.running = None;
            self.checkpoints.retry_at = Some(now + Duration::from_millis(CHECKPOINT_RETRY_MS));
            return;
        };
        self.counters.bytes_written += written as u64;
        self.counters.bytes_checkpoints += written as u64;
        if self.checkpoints.running.is_none() {
            return;
        }
        if start + written < buffer.len() {
            self.checkpoints.rest = Some(Rest { file: slot, offset, buffer, start: start + written });
            return;
        }
        if let Some(running) = self.checkpoints.running.take_if(|running| running.phase == Phase::Sealing) {
            self.keep_checkpoint(&running);
        }
    }

    fn keep_checkpoint(&mut self, running: &Running) {
        let CheckpointHeader { number, begin_sequence, begin_segment, messages, .. } = running.header;
        let checkpoints = &mut self.checkpoints;
        checkpoints.kept.push(KeptCheckpoint { file: running.file, number, begin_sequence, begin_segment });
        if checkpoints.kept.len() > CHECKPOINTS_KEPT {
            checkpoints.kept.remove(0);
        }
        if let Some(row_bytes) = running.message_bytes.checked_div(messages) {
            checkpoints.row_bytes = row_bytes.max(1);
        }
        self.counters.checkpoints += 1;
    }

    fn wants_checkpoint(&self) -> bool {
        let checkpoints = &self.checkpoints;
        let needed = self.checkpoint_bytes(checkpoints.row_bytes, 0);
        let has_files = checkpoints.files.iter().flatten().all(|file| file.capacity >= needed);
        if checkpoints.writing || !has_files || checkpoints.files.iter().any(Option::is_none) {
            return false;
        }
        let mut interval = checkpoints.last_bytes * CHECKPOINT_WRITTEN_RATIO;
        if self.is_room_wanted() {
            // Dead segments do not wait for it then, but for those that tombstones can't stand for.
            let rare = self.directory.options().segment_bytes * CHECKPOINT_WRITTEN_SEGMENTS_HURRIED;
            interval = interval.max(rare.min(checkpoints.last_bytes * CHECKPOINT_WRITTEN_RATIO_HURRIED));
        }
        let interval = interval.min(CHECKPOINT_WRITTEN_BYTES_MAX).max(self.directory.options().segment_bytes);
        let written = self.counters.bytes_frames.wrapping_sub(checkpoints.written_at_begin);
        // Each start begins a segment, however little goes into it. None is used again before.
        let begun = self.next_number.saturating_sub(checkpoints.kept.last().map_or(0, |kept| kept.begin_segment));
        let taken = begun.saturating_sub(CHECKPOINT_SEGMENTS_ABOVE) * self.directory.options().segment_bytes;
        written.max(taken) >= interval || self.is_short_of_segments()
    }

    /// Whether checkpoints are what makes room, and there is need of it. They are worth it when they free a few times
    /// what they cost, or when nothing else is left to do.
    fn is_short_of_segments(&self) -> bool {
        let is_short = self.is_pressed() || self.spares_ready() == 0;
        if !is_short {
            return false;
        }
        let waiting = self.bytes_waiting_for_checkpoint();
        let is_worth_it = || waiting >= self.checkpoints.last_bytes * CHECKPOINT_FREED_RATIO || self.is_copying_idle();
        waiting > 0 && is_worth_it()
    }

    fn begin_checkpoint(&mut self, now: Duration, summaries: &mut dyn Summarize) {
        let generation = self.draw_generation();
        let checkpoints = &self.checkpoints;
        let is_kept = |file: &usize| checkpoints.kept.iter().any(|kept| kept.file == *file);
        let file = (0..CHECKPOINT_FILES).find(|file| !is_kept(file)).expect("there is one file more than are kept");
        let header = CheckpointHeader {
            version: FORMAT_VERSION,
            log: self.id(),
            number: checkpoints.next_number,
            generation,
            begin_sequence: self.next_sequence,
            begin_commit: self.next_commit,
            begin_segment: self.next_number,
            discarded: self.discarded,
            slices: 0,
            messages: 0,
        };
        let mut running = Running {
            file,
            header,
            phase: Phase::Blanking,
            buffer: Vec::new(),
            offset: BLOCK_BYTES,
            message_bytes: 0,
            next_slice: now,
        };
        self.gather_segments(&mut running);
        self.gather_bodies(&mut running);
        self.checkpoints.next_number += 1;
        self.checkpoints.written_at_begin = self.counters.bytes_frames;
        self.checkpoints.last_begin = self.next_sequence;
        self.checkpoints.running = Some(running);
        summaries.begin();
    }

    fn gather_segments(&self, running: &mut Running) {
        let mut slice = SliceWriter::begin(&mut running.buffer, SliceKind::Segments);
        for slot in &self.segments.in_use {
            let segment = self.segments.get(*slot);
            let has_frames_coming = || self.uncommitted_frames().any(|frame| frame.slot == *slot);
            let row = SegmentRow {
                number: segment.number,
                generation: segment.generation,
                chain: segment.chain,
                is_tail: self.tails.iter().flatten().any(|tail| tail.slot == *slot) || has_frames_coming(),
                // Its first frame may still be on its way, and hold records from before the begin.
                end: segment.end.max(SEGMENT_HEADER_BYTES as u64),
                first_sequence: segment.first_sequence,
                last_sequence: segment.last_sequence,
                last_commit: segment.last_commit,
                last_event: segment.last_event,
            };
            row.encode(&mut running.buffer);
            slice.count_row();
        }
        running.end_slice(slice);
    }

    fn gather_bodies(&self, running: &mut Running) {
        let mut slice = SliceWriter::begin(&mut running.buffer, SliceKind::Bodies);
        for (sequence, body) in self.bodies.iter().filter(|(_, body)| body.is_live()) {
            let place = self.row_place(body.place);
            BodyRow { sequence, place, bytes: body.bytes as u32 }.encode(&mut running.buffer);
            slice.count_row();
        }
        running.end_slice(slice);
    }

    fn gather_slice(&self, running: &mut Running, next: u64, summaries: &mut dyn Summarize) -> Phase {
        let start = running.buffer.len();
        let mut slice = SliceWriter::begin(&mut running.buffer, SliceKind::Messages);
        let mut context = RowContext::new(&running.header);
        let mut summary = Vec::new();
        let mut last = None;
        let mut is_full = false;
        // Messages from the begin on are replayed.
        let begin = running.header.begin_sequence;
        for entry in self.index.iter_from(next).take_while(|entry| entry.sequence() < begin) {
            is_full = running.buffer.len() - start >= CHECKPOINT_SLICE_BYTES;
            if is_full {
                break;
            }
            let id = MessageId::new(self.id(), Sequence(entry.sequence()));
            summary.clear();
            summaries.summarize(id, entry.handle, &mut summary);
            let row = self.index.row(entry);
            let row = MessageRow {
                sequence: row.sequence,
                record: self.row_place(row.record),
                states: row
                    .outcome
                    .into_iter()
                    .chain(row.older.into_iter().rev())
                    .map(|place| self.row_place(place))
                    .collect(),
                pending: match row.pending {
                    Pending::Few(bits) => PendingRow::Few(bits),
                    Pending::Many(words) => PendingRow::Many(words),
                },
                body: row.body,
                is_held: row.is_held,
                summary: &summary,
            };
            row.encode(&mut context, &mut running.buffer);
            slice.count_row();
            last = Some(entry.sequence());
        }
        running.header.messages += u64::from(slice.rows());
        running.message_bytes += (running.buffer.len() - start) as u64;
        running.end_slice(slice);
        match last {
            Some(last) if is_full => Phase::Gathering { next: last + 1 },
            _ => {
                let newest =
                    self.uncommitted_frames().filter(|frame| frame.is_wanted()).map(|frame| frame.commit).max();
                Phase::Gathered { commit: newest.unwrap_or(self.durable) }
            }
        }
    }

    fn row_place(&self, place: Place) -> RowPlace {
        let segment = self.segments.get(place.slot).number;
        let segment = u32::try_from(segment).expect("2^32 segments of 64 MiB outlast any disk");
        RowPlace { segment, offset16: place.offset16, length16: place.length16 }
    }

    pub(crate) fn uncommitted_frames(&self) -> impl Iterator<Item = &crate::frame::Frame> {
        self.flight.iter().map(Flight::frame).chain(&self.closed).chain(&self.open)
    }

    /// What a file for a checkpoint of what is live now should have, with `percent` more. Rows become longer when their
    /// messages are deferred, which must not find a full disk: a log without checkpoints can't be emptied.
    fn checkpoint_bytes_needed(&self, percent: u64) -> u64 {
        self.checkpoint_bytes(self.checkpoints.row_bytes.max(CHECKPOINT_ROW_BYTES_MIN), percent)
    }

    /// What a checkpoint needs in which a message's row has so many bytes.
    fn checkpoint_bytes(&self, row_bytes: u64, percent: u64) -> u64 {
        let rows = self.index.len() as u64 * row_bytes
            + (self.segments.in_use.len() * SEGMENT_ROW_BYTES + self.bodies.len() * BODY_ROW_BYTES) as u64;
        let needed = rows + rows / 8;
        // The header, and a slice of each kind that is not full.
        let needed = (needed + needed * percent / 100).next_multiple_of(BLOCK_BYTES) + 4 * BLOCK_BYTES;
        needed.max(CHECKPOINT_FILE_BYTES_MIN)
    }

    /// Makes the files, and makes them larger in time.
    fn poll_create_checkpoint(&mut self, now: Duration) -> Option<Operation> {
        if self.checkpoints.creating || self.checkpoints.shortage.retry_at().is_some_and(|at| now < at) {
            return None;
        }
        // A quarter of headroom is left when more is asked for.
        let needed = self.checkpoint_bytes_needed(CHECKPOINT_FILE_HEADROOM_PERCENT / 2);
        let is_written = |slot: usize| self.checkpoints.running.as_ref().is_some_and(|running| running.file == slot);
        let wanted = (0..CHECKPOINT_FILES).find(|slot| {
            let capacity = self.checkpoints.files[*slot].as_ref().map_or(0, |file| file.capacity);
            capacity < needed && !is_written(*slot)
        });
        let Some(slot) = wanted else {
            self.checkpoints.shortage.end();
            return None;
        };
        let bytes = self.checkpoint_bytes_needed(CHECKPOINT_FILE_HEADROOM_PERCENT);
        self.checkpoints.creating = true;
        let (storage, path) = (self.directory.storage(), self.directory.checkpoint_path(slot));
        Some(self.operation(Work::Create { storage, path, bytes }, Purpose::CreateCheckpoint { slot, bytes }))
    }

    pub(crate) fn handle_create_checkpoint(
        &mut self,
        now: Duration,
        slot: usize,
        bytes: u64,
        result: io::Result<Arc<dyn StorageFile>>,
    ) -> Progress {
        self.checkpoints.creating = false;
        match result {
            Ok(file) => {
                self.checkpoints.files[slot] = Some(CheckpointFile { file, capacity: bytes });
                self.checkpoints.shortage.made();
                Progress::Nothing
            }
            Err(error) => {
                match self.checkpoints.shortage.note(now + Duration::from_millis(CHECKPOINT_RETRY_MS), &error) {
                    true => Progress::NotMade { path: self.directory.checkpoint_path(slot), error },
                    false => Progress::Nothing,
                }
            }
        }
    }

    /// Whether what is live would not fit into a checkpoint any more, and why. Then the log could not be emptied, so
    /// mail has to wait for larger files, or for files at all.
    pub(crate) fn short_of_checkpoint(&self) -> Option<Closed> {
        let is_small = |file: &CheckpointFile| file.capacity < self.checkpoint_bytes_needed(0);
        let is_short = || self.checkpoints.files.iter().any(|file| file.as_ref().is_none_or(is_small));
        self.checkpoints.shortage.closed().filter(|_| is_short())
    }

    pub(crate) fn checkpoint_timeout(&self) -> Option<Duration> {
        if !matches!(self.state, State::Open) {
            return None;
        }
        if let Some(retry_at) = self.checkpoints.retry_at {
            return Some(retry_at);
        }
        let running = self.checkpoints.running.as_ref().filter(|_| !self.checkpoints.writing);
        let gathering = running.filter(|running| matches!(running.phase, Phase::Gathering { .. }));
        let create = self.checkpoints.shortage.retry_at().filter(|_| !self.checkpoints.creating);
        gathering.map(|running| running.next_slice).into_iter().chain(create).min()
    }
}

impl Running {
    fn end_slice(&mut self, slice: SliceWriter) {
        if slice.rows() == 0 {
            slice.give_up(&mut self.buffer);
            return;
        }
        slice.end(&mut self.buffer, self.header.generation, self.header.slices);
        self.header.slices += 1;
    }
}

pub(crate) const CHECKPOINT_FILES: usize = CHECKPOINTS_KEPT + 1;
const CHECKPOINTS_KEPT: usize = 2;
