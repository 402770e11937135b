//! Reading checkpoints: which of them can be used, and what its rows tell.
//!
//! The newest whose slices are all whole is used. One with a whole header and a damaged slice is damage, since the
//! header is written last; then the other kept one takes over, behind which everything is still there to be replayed.
//! The third file may hold an older one. That is of no use once segments with records from behind its begin were used
//! again, since the replay would miss outcomes.

use std::io;
use std::sync::Arc;

use crate::checkpoint::{CHECKPOINT_FILES, CheckpointFile, KeptCheckpoint};
use crate::checkpoint_format::{
    BodyRow, CheckpointBlock, CheckpointHeader, MessageRow, PendingRow, RowContext, RowPlace, SegmentRow, Slice,
    SliceKind, read_slice, slice_length,
};
use crate::directory::LogDirectory;
use crate::error::RecoverError;
use crate::format::FORMAT_VERSION;
use crate::index::{HELD, Index, NOWHERE, Pending, Place, Row, TOUCHED};
use crate::limits::BLOCK_BYTES;
use crate::log::Log;
use crate::record::CommitNumber;
use crate::storage::{StorageFile, read_exact_at};

/// The checkpoint files of a log.
#[derive(Default)]
pub(crate) struct CheckpointSurvey {
    /// The one to be used.
    pub(crate) newest: Option<Checkpoint>,
    /// Complete ones that can be used, oldest first, as far as is known.
    pub(crate) kept: Vec<KeptCheckpoint>,
    pub(crate) files: [Option<CheckpointFile>; CHECKPOINT_FILES],
    /// Files of checkpoints that were finished and can't be read, with their sizes.
    pub(crate) damaged: Vec<(usize, u64)>,
    pub(crate) next_number: u64,
    /// The highest sequence in segments that were given up for use again, as far as any header tells.
    pub(crate) discarded: u64,
}

/// A checkpoint whose slices are whole.
pub(crate) struct Checkpoint {
    pub(crate) header: CheckpointHeader,
    pub(crate) segments: Vec<SegmentRow>,
    pub(crate) bytes: u64,
    file: Arc<dyn StorageFile>,
}

impl CheckpointSurvey {
    /// `discarded` is what the segments' headers tell.
    pub(crate) fn take(directory: &LogDirectory, discarded: u64) -> Result<Self, RecoverError> {
        let storage = directory.storage();
        let mut survey = Self { next_number: 1, discarded, ..Self::default() };
        let mut found = Vec::new();
        for slot in 0..CHECKPOINT_FILES {
            let path = directory.checkpoint_path(slot);
            let failed = |error| RecoverError::Io { path: path.clone(), error };
            let file = match storage.open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(error)),
            };
            let capacity = file.length().map_err(failed)? / BLOCK_BYTES * BLOCK_BYTES;
            // What a failed write left in the cache looks written, and need not be on the medium.
            let _ = file.sync_and_drop_cache(0..BLOCK_BYTES);
            let mut block = vec![0; BLOCK_BYTES as usize];
            if read_exact_at(file.as_ref(), &mut block, 0).is_ok() {
                match CheckpointHeader::decode(&block) {
                    CheckpointBlock::Newer { version } => {
                        return Err(RecoverError::NewerVersion { path, found: version, known: FORMAT_VERSION });
                    }
                    CheckpointBlock::Header(header) if header.log == directory.id() => {
                        survey.next_number = survey.next_number.max(header.number + 1);
                        survey.discarded = survey.discarded.max(header.discarded);
                        found.push((slot, header, Arc::clone(&file)));
                    }
                    CheckpointBlock::Header(_) | CheckpointBlock::Blank | CheckpointBlock::Damaged => {}
                }
            }
            survey.files[slot] = Some(CheckpointFile { file, capacity });
        }
        found.retain(|(_, header, _)| survey.discarded < header.begin_sequence);
        found.sort_by_key(|(_, header, _)| std::cmp::Reverse(header.number));
        for (slot, header, file) in found {
            let CheckpointHeader { number, begin_sequence, begin_segment, .. } = header;
            let kept = KeptCheckpoint { file: slot, number, begin_sequence, begin_segment };
            if survey.newest.is_some() {
                survey.kept.insert(0, kept);
                break;
            }
            match check(file, header) {
                Some(checkpoint) => {
                    survey.newest = Some(checkpoint);
                    survey.kept.push(kept);
                }
                None => {
                    let capacity = survey.files[slot].as_ref().map_or(0, |file| file.capacity);
                    survey.damaged.push((slot, capacity));
                }
            }
        }
        Ok(survey)
    }
}

/// Reads all of a checkpoint, and keeps the segments' rows.
fn check(file: Arc<dyn StorageFile>, header: CheckpointHeader) -> Option<Checkpoint> {
    let mut segments = Vec::new();
    let mut messages = 0;
    let mut reader = SliceReader::new(&file, &header);
    while let Some(Slice { kind, count, mut rows }) = reader.next().ok()? {
        match kind {
            SliceKind::Segments => {
                for _ in 0..count {
                    segments.push(SegmentRow::decode(&mut rows)?);
                }
            }
            SliceKind::Bodies => {}
            SliceKind::Messages => messages += u64::from(count),
        }
    }
    let bytes = reader.offset;
    (messages == header.messages).then_some(Checkpoint { header, segments, bytes, file })
}

impl Checkpoint {
    /// Fills the index. `false` when a row makes no sense, or can't be read any more.
    ///
    /// The segments must be there: places in others are nowhere until a replayed record tells better.
    pub(crate) fn load(&self, log: &mut Log) -> bool {
        let mut reader = SliceReader::new(&self.file, &self.header);
        loop {
            let Slice { kind, count, mut rows } = match reader.next() {
                Ok(Some(slice)) => slice,
                Ok(None) => return true,
                Err(Unreadable) => return false,
            };
            let mut context = RowContext::new(&self.header);
            for _ in 0..count {
                let loaded = match kind {
                    SliceKind::Segments => break,
                    SliceKind::Bodies => BodyRow::decode(&mut rows).map(|row| load_body(log, row)),
                    SliceKind::Messages => {
                        MessageRow::decode(&mut context, &mut rows).map(|row| load_message(log, row))
                    }
                };
                if loaded.is_none() {
                    return false;
                }
            }
        }
    }

    /// Goes over the summaries in the order in which they were written. `visit` is given the message's sequence, its
    /// pending recipients unless it is gone or was touched since, and the summary; it returns the handle to set, or
    /// nothing when the message is to be told otherwise.
    pub(crate) fn tell_summaries(
        &self,
        index: &mut Index,
        mut visit: impl FnMut(u64, Option<&[u32]>, &[u8]) -> Option<u32>,
    ) {
        let mut reader = SliceReader::new(&self.file, &self.header);
        let mut cursor = index.cursor();
        let mut pending = Vec::new();
        while let Ok(Some(Slice { kind, count, mut rows })) = reader.next() {
            if kind != SliceKind::Messages {
                continue;
            }
            let mut context = RowContext::new(&self.header);
            for _ in 0..count {
                let Some(row) = MessageRow::decode(&mut context, &mut rows) else { return };
                if row.summary.is_empty() {
                    continue;
                }
                let entry = cursor.seek(row.sequence).filter(|entry| !entry.has(TOUCHED | HELD)).copied();
                if let Some(entry) = &entry {
                    cursor.index().pending_into(entry, &mut pending);
                }
                let handle = visit(row.sequence, entry.is_some().then_some(&pending[..]), row.summary);
                if entry.is_some()
                    && let Some(entry) = cursor.seek(row.sequence)
                {
                    match handle {
                        Some(handle) => entry.handle = handle,
                        None => entry.set_touched(),
                    }
                }
            }
        }
    }
}

fn load_body(log: &mut Log, row: BodyRow) {
    let place = place_of(log, row.place);
    log.bodies.insert(&mut log.segments, row.sequence, place, u64::from(row.bytes), CommitNumber(0));
}

fn load_message(log: &mut Log, row: MessageRow<'_>) {
    let sequence = row.sequence;
    let mut states = row.states.iter().map(|state| state_place_of(log, *state));
    let (outcome, older) = (states.next(), states.rev().collect::<Vec<_>>());
    let is_told_by_message = row.summary.is_empty() || row.is_held;
    let row = Row {
        sequence,
        record: place_of(log, row.record),
        outcome,
        older,
        pending: match row.pending {
            PendingRow::Few(bits) => Pending::Few(bits),
            PendingRow::Many(words) => Pending::Many(words),
        },
        body: row.body,
        is_held: row.is_held,
    };
    let record = row.record;
    if !log.index.insert_row(row) {
        return;
    }
    log.segments.add_live(record, CommitNumber(0));
    if let Some(entry) = log.index.get(sequence).copied().filter(|entry| entry.outcome().is_some()) {
        for state in log.index.states(&entry) {
            log.segments.add_live(state, CommitNumber(0));
        }
    }
    if is_told_by_message {
        log.index.set_flag(sequence, TOUCHED, true);
    }
}

fn place_of(log: &Log, place: RowPlace) -> Place {
    let slot = log.segments.by_number(u64::from(place.segment));
    let slot = slot.filter(|slot| {
        let end = (u64::from(place.offset16) + u64::from(place.length16)) * crate::limits::ALIGN_BYTES;
        end <= log.segments.get(*slot).capacity
    });
    Place { slot: slot.unwrap_or(NOWHERE), offset16: place.offset16, length16: place.length16 }
}

/// One that is nowhere tells by its offset which segment it was in.
fn state_place_of(log: &Log, place: RowPlace) -> Place {
    let found = place_of(log, place);
    if found.slot == NOWHERE { Place { offset16: place.segment, ..found } } else { found }
}

/// The slices of a checkpoint, one after the other.
struct SliceReader<'a> {
    file: &'a Arc<dyn StorageFile>,
    header: &'a CheckpointHeader,
    offset: u64,
    slice: u32,
    buffer: Vec<u8>,
}

/// A slice is not what was written, or can't be read.
struct Unreadable;

impl<'a> SliceReader<'a> {
    fn new(file: &'a Arc<dyn StorageFile>, header: &'a CheckpointHeader) -> Self {
        Self { file, header, offset: BLOCK_BYTES, slice: 0, buffer: Vec::new() }
    }

    fn next(&mut self) -> Result<Option<Slice<'_>>, Unreadable> {
        if self.slice == self.header.slices {
            return Ok(None);
        }
        let block = BLOCK_BYTES as usize;
        self.buffer.resize(block.max(self.buffer.len()), 0);
        self.read(0..block)?;
        let length = slice_length(&self.buffer).ok_or(Unreadable)? as usize;
        if length > self.buffer.len() {
            // A length from damaged octets must not make us allocate what the file does not hold.
            let left = self.file.length().map_err(|_| Unreadable)?.saturating_sub(self.offset);
            if length as u64 > left {
                return Err(Unreadable);
            }
            self.buffer.resize(length, 0);
        }
        if length > block {
            self.read(block..length)?;
        }
        let slice = read_slice(&self.buffer[..length], self.header.generation, self.slice).ok_or(Unreadable)?;
        self.offset += length as u64;
        self.slice += 1;
        Ok(Some(slice))
    }

    fn read(&mut self, range: std::ops::Range<usize>) -> Result<(), Unreadable> {
        let offset = self.offset + range.start as u64;
        read_exact_at(self.file.as_ref(), &mut self.buffer[range], offset).map_err(|_| Unreadable)
    }
}
