//! The bytes of a checkpoint file: a header block, then slices with rows. `FORMAT.md` is the description.
//!
//! Like `format.rs`, nothing here does I/O or trusts what it decodes.

use crate::format::{Chain, FORMAT_VERSION, seed, u16_at, u32_at, u64_at};
use crate::limits::{ALIGN_BYTES, BLOCK_BYTES, SEGMENT_BYTES_MAX};
use crate::record::LogId;

/// The first block of a checkpoint file; written last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointHeader {
    pub log: LogId,
    /// Numbers only grow.
    pub number: u64,
    /// Random, seeds the slices' checksums.
    pub generation: u64,
    /// Records with this sequence and above are to be replayed.
    pub begin_sequence: u64,
    /// What the log would have numbered next when the checkpoint was begun.
    pub begin_commit: u64,
    pub begin_segment: u64,
    /// As in segment headers.
    pub discarded: u64,
    pub slices: u32,
    pub messages: u64,
}

/// What the first block of a checkpoint file was found to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckpointBlock {
    Header(CheckpointHeader),
    /// Only zeros: none was ever finished here since the last was given up.
    Blank,
    Damaged,
    Newer {
        version: u16,
    },
}

impl CheckpointHeader {
    pub fn encode(&self) -> Vec<u8> {
        let mut block = vec![0; BLOCK_BYTES as usize];
        block[0..8].copy_from_slice(&CHECKPOINT_MAGIC);
        block[12..14].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        block[14..16].copy_from_slice(&self.log.0.to_le_bytes());
        let fields = [
            self.number,
            self.generation,
            self.begin_sequence,
            self.begin_commit,
            self.begin_segment,
            self.discarded,
            self.messages,
            u64::from(self.slices),
        ];
        for (place, field) in block[16..80].chunks_exact_mut(8).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        let crc = crc32c::crc32c(&block[12..]);
        block[8..12].copy_from_slice(&crc.to_le_bytes());
        block
    }

    pub fn decode(block: &[u8]) -> CheckpointBlock {
        if block.iter().all(|byte| *byte == 0) {
            return CheckpointBlock::Blank;
        }
        if block.len() != BLOCK_BYTES as usize || block[0..8] != CHECKPOINT_MAGIC {
            return CheckpointBlock::Damaged;
        }
        let version = u16_at(block, 12..14);
        if version > FORMAT_VERSION {
            return CheckpointBlock::Newer { version };
        }
        if u32_at(block, 8..12) != crc32c::crc32c(&block[12..]) {
            return CheckpointBlock::Damaged;
        }
        let field = |index: usize| u64_at(block, 16 + index * 8..24 + index * 8);
        CheckpointBlock::Header(Self {
            log: LogId(u16_at(block, 14..16)),
            number: field(0),
            generation: field(1),
            begin_sequence: field(2),
            begin_commit: field(3),
            begin_segment: field(4),
            discarded: field(5),
            messages: field(6),
            slices: u32::try_from(field(7)).unwrap_or(u32::MAX),
        })
    }
}

/// What a slice's rows are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SliceKind {
    Segments = 1,
    Bodies = 2,
    Messages = 3,
}

/// Gathers rows.
#[derive(Debug)]
pub(crate) struct SliceWriter {
    start: usize,
    kind: SliceKind,
    rows: u32,
}

impl SliceWriter {
    /// Begins a slice at the end of `buffer`, which is at a block's boundary.
    pub(crate) fn begin(buffer: &mut Vec<u8>, kind: SliceKind) -> Self {
        let start = buffer.len();
        assert!((start as u64).is_multiple_of(BLOCK_BYTES));
        buffer.resize(start + SLICE_HEADER_BYTES, 0);
        Self { start, kind, rows: 0 }
    }

    pub(crate) fn count_row(&mut self) {
        self.rows += 1;
    }

    pub(crate) fn rows(&self) -> u32 {
        self.rows
    }

    /// Takes back what was gathered.
    pub(crate) fn give_up(self, buffer: &mut Vec<u8>) {
        buffer.truncate(self.start);
    }

    /// Fills in the header and pads to a block.
    pub(crate) fn end(self, buffer: &mut Vec<u8>, generation: u64, slice: u32) {
        let length = (buffer.len() - self.start) as u32;
        let bytes = &mut buffer[self.start..];
        bytes[4..8].copy_from_slice(&length.to_le_bytes());
        bytes[8..12].copy_from_slice(&(self.kind as u32).to_le_bytes());
        bytes[12..16].copy_from_slice(&self.rows.to_le_bytes());
        let crc = crc32c::crc32c_append(seed(generation, u64::from(slice)), &bytes[4..]);
        bytes[0..4].copy_from_slice(&crc.to_le_bytes());
        let padded = buffer.len().next_multiple_of(BLOCK_BYTES as usize);
        buffer.resize(padded, 0);
    }
}

/// A slice's length with its padding, as its first octets tell; `None` where it can't be true.
pub(crate) fn slice_length(head: &[u8]) -> Option<u64> {
    let length = u64::from(u32_at(head, 4..8));
    (length >= SLICE_HEADER_BYTES as u64 && length <= SLICE_BYTES_MAX).then(|| length.next_multiple_of(BLOCK_BYTES))
}

/// A slice whose checksum is right.
#[derive(Debug)]
pub(crate) struct Slice<'a> {
    pub(crate) kind: SliceKind,
    /// How many rows there are.
    pub(crate) count: u32,
    pub(crate) rows: Rows<'a>,
}

pub(crate) fn read_slice(slice: &[u8], generation: u64, number: u32) -> Option<Slice<'_>> {
    let length = u32_at(slice, 4..8) as usize;
    let bytes = slice.get(..length)?;
    if u32_at(bytes, 0..4) != crc32c::crc32c_append(seed(generation, u64::from(number)), &bytes[4..]) {
        return None;
    }
    let kind = match u32_at(bytes, 8..12) {
        1 => SliceKind::Segments,
        2 => SliceKind::Bodies,
        3 => SliceKind::Messages,
        _ => return None,
    };
    Some(Slice { kind, count: u32_at(bytes, 12..16), rows: Rows(&bytes[SLICE_HEADER_BYTES..]) })
}

/// A segment that was in use when the checkpoint was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentRow {
    pub(crate) number: u64,
    pub(crate) generation: u64,
    pub(crate) chain: Chain,
    /// More may have been appended to it since.
    pub(crate) is_tail: bool,
    pub(crate) end: u64,
    pub(crate) first_sequence: u64,
    pub(crate) last_sequence: u64,
    pub(crate) last_commit: u64,
    pub(crate) last_event: u64,
}

impl SegmentRow {
    pub(crate) fn encode(&self, buffer: &mut Vec<u8>) {
        let kind = u64::from(self.chain as u16) | u64::from(self.is_tail) << 16;
        let fields = [
            kind,
            self.number,
            self.generation,
            self.end,
            self.first_sequence,
            self.last_sequence,
            self.last_commit,
            self.last_event,
        ];
        for field in fields {
            buffer.extend_from_slice(&field.to_le_bytes());
        }
    }

    pub(crate) fn decode(rows: &mut Rows<'_>) -> Option<Self> {
        let kind = rows.u64()?;
        Some(Self {
            chain: if kind as u16 == 0 { Chain::Mail } else { Chain::Copies },
            is_tail: kind >> 16 & 1 == 1,
            number: rows.u64()?,
            generation: rows.u64()?,
            end: rows.u64()?,
            first_sequence: rows.u64()?,
            last_sequence: rows.u64()?,
            last_commit: rows.u64()?,
            last_event: rows.u64()?,
        })
    }
}

/// Where a record is: its segment's number, and place and length there in units of 16 octets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowPlace {
    pub(crate) segment: u32,
    pub(crate) offset16: u32,
    pub(crate) length16: u32,
}

impl RowPlace {
    pub(crate) fn encode(&self, buffer: &mut Vec<u8>) {
        for field in [self.segment, self.offset16, self.length16] {
            buffer.extend_from_slice(&field.to_le_bytes());
        }
    }

    pub(crate) fn decode(rows: &mut Rows<'_>) -> Option<Self> {
        let place = Self { segment: rows.u32()?, offset16: rows.u32()?, length16: rows.u32()? };
        let end = (u64::from(place.offset16) + u64::from(place.length16)) * ALIGN_BYTES;
        (end <= SEGMENT_BYTES_MAX).then_some(place)
    }
}

/// A shared body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BodyRow {
    pub(crate) sequence: u64,
    pub(crate) place: RowPlace,
    /// Of the content.
    pub(crate) bytes: u32,
}

impl BodyRow {
    pub(crate) fn encode(&self, buffer: &mut Vec<u8>) {
        buffer.extend_from_slice(&self.sequence.to_le_bytes());
        self.place.encode(buffer);
        buffer.extend_from_slice(&self.bytes.to_le_bytes());
    }

    pub(crate) fn decode(rows: &mut Rows<'_>) -> Option<Self> {
        Some(Self { sequence: rows.u64()?, place: RowPlace::decode(rows)?, bytes: rows.u32()? })
    }
}

/// A live message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MessageRow<'a> {
    pub(crate) sequence: u64,
    pub(crate) record: RowPlace,
    /// Newest first.
    pub(crate) states: Vec<RowPlace>,
    pub(crate) pending: PendingRow,
    pub(crate) body: Option<u64>,
    pub(crate) is_held: bool,
    pub(crate) summary: &'a [u8],
}

/// As [`crate::index::Pending`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum PendingRow {
    Few(u32),
    Many(Box<[u64]>),
}

impl<'a> MessageRow<'a> {
    /// Appends the row with an empty summary; returns where the summary's length stands, which follows the row.
    pub(crate) fn encode(&self, buffer: &mut Vec<u8>) -> usize {
        assert!(self.sequence < 1 << FLAGS_SHIFT);
        let flag = |is_set: bool, flag: u64| if is_set { flag } else { 0 };
        let flags = flag(self.is_held, HELD)
            | flag(self.body.is_some(), SHARES)
            | flag(matches!(self.pending, PendingRow::Many(_)), MANY)
            | flag(!self.states.is_empty(), STATES);
        buffer.extend_from_slice(&(self.sequence | flags << FLAGS_SHIFT).to_le_bytes());
        self.record.encode(buffer);
        let pending = match &self.pending {
            PendingRow::Few(bits) => *bits,
            PendingRow::Many(words) => words.len() as u32,
        };
        buffer.extend_from_slice(&pending.to_le_bytes());
        let summary_length = buffer.len();
        buffer.extend_from_slice(&0_u32.to_le_bytes());
        if !self.states.is_empty() {
            buffer.extend_from_slice(&(self.states.len() as u32).to_le_bytes());
        }
        for state in &self.states {
            state.encode(buffer);
        }
        if let Some(body) = self.body {
            buffer.extend_from_slice(&body.to_le_bytes());
        }
        if let PendingRow::Many(words) = &self.pending {
            for word in words {
                buffer.extend_from_slice(&word.to_le_bytes());
            }
        }
        summary_length
    }

    pub(crate) fn decode(rows: &mut Rows<'a>) -> Option<Self> {
        let first = rows.u64()?;
        let (sequence, flags) = (first & ((1 << FLAGS_SHIFT) - 1), first >> FLAGS_SHIFT);
        let record = RowPlace::decode(rows)?;
        let bits = rows.u32()?;
        let summary_length = rows.u32()? as usize;
        let states = if flags & STATES == 0 { 0 } else { rows.u32()? };
        let states = (0..states).map(|_| RowPlace::decode(rows)).collect::<Option<Vec<_>>>()?;
        let body = if flags & SHARES == 0 { None } else { Some(rows.u64()?) };
        let pending = if flags & MANY == 0 {
            PendingRow::Few(bits)
        } else {
            PendingRow::Many((0..bits).map(|_| rows.u64()).collect::<Option<_>>()?)
        };
        let summary = rows.take(summary_length)?;
        Some(Self { sequence, record, states, pending, body, is_held: flags & HELD != 0, summary })
    }
}

/// Reads fields from the front of a slice's rows.
#[derive(Debug)]
pub(crate) struct Rows<'a>(pub(crate) &'a [u8]);

impl<'a> Rows<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take(4).map(|bytes| u32_at(bytes, 0..4))
    }

    fn u64(&mut self) -> Option<u64> {
        self.take(8).map(|bytes| u64_at(bytes, 0..8))
    }
}

pub const CHECKPOINT_MAGIC: [u8; 8] = *b"PRCHKPNT";
pub(crate) const SLICE_HEADER_BYTES: usize = 16;
/// No slice is larger: one with a single message that has very many recipients comes nearest.
const SLICE_BYTES_MAX: u64 = 1 << 30;

/// The upper 16 bits of a message row's first field are flags.
const FLAGS_SHIFT: u32 = 48;
const MANY: u64 = 1;
const SHARES: u64 = 2;
const HELD: u64 = 4;
const STATES: u64 = 8;
