//! The bytes of a checkpoint file: a header block, then slices with rows. `FORMAT.md` is the description.
//!
//! Like `format.rs`, nothing here does I/O or trusts what it decodes.
//!
//! Over 500 lines: as there, all bytes of such a file, beside their asserts.

use crate::checksum::{crc32c, crc32c_append};
use crate::format::{Chain, FORMAT_VERSION, are_adjacent, seed, u16_at, u32_at, u64_at};
use crate::limits::{ALIGN_BYTES, BLOCK_BYTES, SEGMENT_BYTES_MAX};
use crate::record::LogId;

/// The first block of a checkpoint file; written last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointHeader {
    /// The format that its rows have.
    pub version: u16,
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
        block[header::MAGIC].copy_from_slice(&CHECKPOINT_MAGIC);
        block[header::VERSION].copy_from_slice(&self.version.to_le_bytes());
        block[header::LOG].copy_from_slice(&self.log.0.to_le_bytes());
        for (range, value) in [
            (header::NUMBER, self.number),
            (header::GENERATION, self.generation),
            (header::BEGIN_SEQUENCE, self.begin_sequence),
            (header::BEGIN_COMMIT, self.begin_commit),
            (header::BEGIN_SEGMENT, self.begin_segment),
            (header::DISCARDED, self.discarded),
            (header::MESSAGES, self.messages),
        ] {
            block[range].copy_from_slice(&value.to_le_bytes());
        }
        block[header::SLICES].copy_from_slice(&self.slices.to_le_bytes());
        let crc = crc32c(&block[header::CRC.end..]);
        block[header::CRC].copy_from_slice(&crc.to_le_bytes());
        block
    }

    pub fn decode(block: &[u8]) -> CheckpointBlock {
        if block.iter().all(|byte| *byte == 0) {
            return CheckpointBlock::Blank;
        }
        if block.len() != BLOCK_BYTES as usize || block[header::MAGIC] != CHECKPOINT_MAGIC {
            return CheckpointBlock::Damaged;
        }
        let version = u16_at(block, header::VERSION);
        if version > FORMAT_VERSION {
            return CheckpointBlock::Newer { version };
        }
        if u32_at(block, header::CRC) != crc32c(&block[header::CRC.end..]) {
            return CheckpointBlock::Damaged;
        }
        CheckpointBlock::Header(Self {
            version,
            log: LogId(u16_at(block, header::LOG)),
            number: u64_at(block, header::NUMBER),
            generation: u64_at(block, header::GENERATION),
            begin_sequence: u64_at(block, header::BEGIN_SEQUENCE),
            begin_commit: u64_at(block, header::BEGIN_COMMIT),
            begin_segment: u64_at(block, header::BEGIN_SEGMENT),
            discarded: u64_at(block, header::DISCARDED),
            messages: u64_at(block, header::MESSAGES),
            slices: u32_at(block, header::SLICES),
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
    pub(crate) fn end(self, buffer: &mut Vec<u8>, generation: u64, number: u32) {
        let length = (buffer.len() - self.start) as u32;
        let bytes = &mut buffer[self.start..];
        bytes[slice::LENGTH].copy_from_slice(&length.to_le_bytes());
        bytes[slice::KIND].copy_from_slice(&(self.kind as u32).to_le_bytes());
        bytes[slice::ROWS].copy_from_slice(&self.rows.to_le_bytes());
        let crc = crc32c_append(seed(generation, u64::from(number)), &bytes[slice::CRC.end..]);
        bytes[slice::CRC].copy_from_slice(&crc.to_le_bytes());
        let padded = buffer.len().next_multiple_of(BLOCK_BYTES as usize);
        buffer.resize(padded, 0);
    }
}

/// A slice's length with its padding, as its first octets tell; `None` where it can't be true.
pub(crate) fn slice_length(head: &[u8]) -> Option<u64> {
    let length = u64::from(u32_at(head, slice::LENGTH));
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

pub(crate) fn read_slice(padded: &[u8], generation: u64, number: u32) -> Option<Slice<'_>> {
    let length = u32_at(padded, slice::LENGTH) as usize;
    let bytes = padded.get(..length)?;
    let crc = crc32c_append(seed(generation, u64::from(number)), &bytes[slice::CRC.end..]);
    if u32_at(bytes, slice::CRC) != crc {
        return None;
    }
    let kind = match u32_at(bytes, slice::KIND) {
        1 => SliceKind::Segments,
        2 => SliceKind::Bodies,
        3 => SliceKind::Messages,
        _ => return None,
    };
    Some(Slice { kind, count: u32_at(bytes, slice::ROWS), rows: Rows(&bytes[SLICE_HEADER_BYTES..]) })
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
        let mut row = [0; SEGMENT_ROW_BYTES];
        row[segment_row::CHAIN].copy_from_slice(&(self.chain as u16).to_le_bytes());
        row[segment_row::FLAGS].copy_from_slice(&u16::from(self.is_tail).to_le_bytes());
        for (range, value) in [
            (segment_row::NUMBER, self.number),
            (segment_row::GENERATION, self.generation),
            (segment_row::END, self.end),
            (segment_row::FIRST_SEQUENCE, self.first_sequence),
            (segment_row::LAST_SEQUENCE, self.last_sequence),
            (segment_row::LAST_COMMIT, self.last_commit),
            (segment_row::LAST_EVENT, self.last_event),
        ] {
            row[range].copy_from_slice(&value.to_le_bytes());
        }
        buffer.extend_from_slice(&row);
    }

    pub(crate) fn decode(rows: &mut Rows<'_>) -> Option<Self> {
        let row = rows.take(SEGMENT_ROW_BYTES)?;
        Some(Self {
            chain: if u16_at(row, segment_row::CHAIN) == 0 { Chain::Mail } else { Chain::Copies },
            is_tail: u16_at(row, segment_row::FLAGS) & IS_TAIL != 0,
            number: u64_at(row, segment_row::NUMBER),
            generation: u64_at(row, segment_row::GENERATION),
            end: u64_at(row, segment_row::END),
            first_sequence: u64_at(row, segment_row::FIRST_SEQUENCE),
            last_sequence: u64_at(row, segment_row::LAST_SEQUENCE),
            last_commit: u64_at(row, segment_row::LAST_COMMIT),
            last_event: u64_at(row, segment_row::LAST_EVENT),
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
        let mut bytes = [0; PLACE_BYTES];
        bytes[place::SEGMENT].copy_from_slice(&self.segment.to_le_bytes());
        bytes[place::OFFSET16].copy_from_slice(&self.offset16.to_le_bytes());
        bytes[place::LENGTH16].copy_from_slice(&self.length16.to_le_bytes());
        buffer.extend_from_slice(&bytes);
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let place = Self {
            segment: u32_at(bytes, place::SEGMENT),
            offset16: u32_at(bytes, place::OFFSET16),
            length16: u32_at(bytes, place::LENGTH16),
        };
        place.is_possible().then_some(place)
    }

    fn is_possible(&self) -> bool {
        (u64::from(self.offset16) + u64::from(self.length16)) * ALIGN_BYTES <= SEGMENT_BYTES_MAX
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
        // The fields in the order of `body_row`.
        buffer.extend_from_slice(&self.sequence.to_le_bytes());
        self.place.encode(buffer);
        buffer.extend_from_slice(&self.bytes.to_le_bytes());
    }

    pub(crate) fn decode(rows: &mut Rows<'_>) -> Option<Self> {
        let row = rows.take(BODY_ROW_BYTES)?;
        Some(Self {
            sequence: u64_at(row, body_row::SEQUENCE),
            place: RowPlace::decode(&row[body_row::PLACE])?,
            bytes: u32_at(row, body_row::BYTES),
        })
    }
}

/// What the rows of messages in one slice refer to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowContext {
    version: u16,
    begin_segment: u64,
    /// The sequence of the row before.
    sequence: u64,
}

impl RowContext {
    /// At the begin of a slice.
    pub(crate) fn new(header: &CheckpointHeader) -> Self {
        Self { version: header.version, begin_segment: header.begin_segment, sequence: 0 }
    }

    /// By how much a segment's number is below the checkpoint's begin: most are near it. The lowest bit is the sign.
    fn encode_place(&self, place: RowPlace, buffer: &mut Vec<u8>) {
        let below = self.begin_segment.cast_signed() - i64::from(place.segment);
        push_varint(buffer, (below << 1 ^ below >> 63).cast_unsigned());
        push_varint(buffer, u64::from(place.offset16));
        push_varint(buffer, u64::from(place.length16));
    }

    fn decode_place(&self, rows: &mut Rows<'_>) -> Option<RowPlace> {
        let code = rows.varint()?;
        let below = (code >> 1).cast_signed() ^ -(code & 1).cast_signed();
        let segment = u32::try_from(self.begin_segment.checked_add_signed(below.checked_neg()?)?).ok()?;
        let place = RowPlace {
            segment,
            offset16: u32::try_from(rows.varint()?).ok()?,
            length16: u32::try_from(rows.varint()?).ok()?,
        };
        place.is_possible().then_some(place)
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
    /// Appends the row. Its sequence is above that of the row before.
    pub(crate) fn encode(&self, context: &mut RowContext, buffer: &mut Vec<u8>) {
        let flag = |is_set: bool, flag: u8| if is_set { flag } else { 0 };
        let flags = flag(self.is_held, HELD)
            | flag(self.body.is_some(), SHARES)
            | flag(matches!(self.pending, PendingRow::Many(_)), MANY)
            | flag(!self.states.is_empty(), STATES);
        push_varint(buffer, self.sequence - context.sequence);
        context.sequence = self.sequence;
        buffer.push(flags);
        context.encode_place(self.record, buffer);
        push_varint(
            buffer,
            match &self.pending {
                PendingRow::Few(bits) => u64::from(*bits),
                PendingRow::Many(words) => words.len() as u64,
            },
        );
        push_varint(buffer, self.summary.len() as u64);
        if !self.states.is_empty() {
            push_varint(buffer, self.states.len() as u64);
        }
        for state in &self.states {
            context.encode_place(*state, buffer);
        }
        if let Some(body) = self.body {
            push_varint(buffer, body);
        }
        if let PendingRow::Many(words) = &self.pending {
            words.iter().for_each(|word| buffer.extend_from_slice(&word.to_le_bytes()));
        }
        buffer.extend_from_slice(self.summary);
    }

    pub(crate) fn decode(context: &mut RowContext, rows: &mut Rows<'a>) -> Option<Self> {
        if context.version < 3 {
            return Self::decode_v2(rows);
        }
        let step = rows.varint().filter(|step| *step > 0)?;
        let sequence = context.sequence.checked_add(step)?;
        context.sequence = sequence;
        let flags = rows.take(1)?[0];
        let record = context.decode_place(rows)?;
        let bits = rows.varint()?;
        let summary_length = usize::try_from(rows.varint()?).ok()?;
        let states = if flags & STATES == 0 { 0 } else { rows.varint()? };
        let states = (0..states).map(|_| context.decode_place(rows)).collect::<Option<Vec<_>>>()?;
        let body = if flags & SHARES == 0 { None } else { Some(rows.varint()?) };
        let pending = if flags & MANY == 0 {
            PendingRow::Few(u32::try_from(bits).ok()?)
        } else {
            PendingRow::Many((0..bits).map(|_| rows.u64()).collect::<Option<_>>()?)
        };
        let summary = rows.take(summary_length)?;
        Some(Self { sequence, record, states, pending, body, is_held: flags & HELD != 0, summary })
    }

    fn decode_v2(rows: &mut Rows<'a>) -> Option<Self> {
        let row = rows.take(MESSAGE_ROW_BYTES)?;
        let first = u64_at(row, message_row::SEQUENCE_AND_FLAGS);
        let (sequence, flags) = (first & ((1 << FLAGS_SHIFT) - 1), (first >> FLAGS_SHIFT) as u8);
        let record = RowPlace::decode(&row[message_row::RECORD])?;
        let bits = u32_at(row, message_row::PENDING);
        let summary_length = u32_at(row, message_row::SUMMARY_LENGTH) as usize;
        let states = if flags & STATES == 0 { 0 } else { rows.u32()? };
        let states = (0..states).map(|_| RowPlace::decode(rows.take(PLACE_BYTES)?)).collect::<Option<Vec<_>>>()?;
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

    /// As [`push_varint`] wrote it; `None` where it would be above 64 bits.
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..u64::BITS).step_by(7) {
            let octet = self.take(1)?[0];
            let bits = u64::from(octet & 0x7f);
            if bits.leading_zeros() < shift {
                return None;
            }
            value |= bits << shift;
            if octet < 0x80 {
                return Some(value);
            }
        }
        None
    }
}

/// Seven bits an octet, the lowest first; all octets but the last have the highest bit.
fn push_varint(buffer: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        buffer.push(value as u8 | 0x80);
        value >>= 7;
    }
    buffer.push(value as u8);
}

pub const CHECKPOINT_MAGIC: [u8; 8] = *b"PRCHKPNT";
pub(crate) const SLICE_HEADER_BYTES: usize = slice::ROWS.end;
/// No slice is larger: one with a single message that has very many recipients comes nearest.
const SLICE_BYTES_MAX: u64 = 1 << 30;

pub(crate) const SEGMENT_ROW_BYTES: usize = segment_row::LAST_EVENT.end;
pub(crate) const BODY_ROW_BYTES: usize = body_row::BYTES.end;
/// In version 2, without what follows as its flags tell.
const MESSAGE_ROW_BYTES: usize = message_row::SUMMARY_LENGTH.end;
const PLACE_BYTES: usize = place::LENGTH16.end;

/// A flag of a segment's row.
const IS_TAIL: u16 = 1;

/// Flags of a message's row; in version 2, the upper 16 bits of its first field.
const FLAGS_SHIFT: u32 = 48;
const MANY: u8 = 1;
const SHARES: u8 = 2;
const HELD: u8 = 4;
const STATES: u8 = 8;

mod header {
    use std::ops::Range;
    pub(super) const MAGIC: Range<usize> = 0..8;
    pub(super) const CRC: Range<usize> = 8..12;
    pub(super) const VERSION: Range<usize> = 12..14;
    pub(super) const LOG: Range<usize> = 14..16;
    pub(super) const NUMBER: Range<usize> = 16..24;
    pub(super) const GENERATION: Range<usize> = 24..32;
    pub(super) const BEGIN_SEQUENCE: Range<usize> = 32..40;
    pub(super) const BEGIN_COMMIT: Range<usize> = 40..48;
    pub(super) const BEGIN_SEGMENT: Range<usize> = 48..56;
    pub(super) const DISCARDED: Range<usize> = 56..64;
    pub(super) const MESSAGES: Range<usize> = 64..72;
    pub(super) const SLICES: Range<usize> = 72..76;
    pub(super) const _ZERO: Range<usize> = 76..4096;
}

mod slice {
    use std::ops::Range;
    pub(super) const CRC: Range<usize> = 0..4;
    pub(super) const LENGTH: Range<usize> = 4..8;
    pub(super) const KIND: Range<usize> = 8..12;
    pub(super) const ROWS: Range<usize> = 12..16;
}

mod segment_row {
    use std::ops::Range;
    pub(super) const CHAIN: Range<usize> = 0..2;
    pub(super) const FLAGS: Range<usize> = 2..4;
    pub(super) const _ZERO: Range<usize> = 4..8;
    pub(super) const NUMBER: Range<usize> = 8..16;
    pub(super) const GENERATION: Range<usize> = 16..24;
    pub(super) const END: Range<usize> = 24..32;
    pub(super) const FIRST_SEQUENCE: Range<usize> = 32..40;
    pub(super) const LAST_SEQUENCE: Range<usize> = 40..48;
    pub(super) const LAST_COMMIT: Range<usize> = 48..56;
    pub(super) const LAST_EVENT: Range<usize> = 56..64;
}

mod body_row {
    use std::ops::Range;
    pub(super) const SEQUENCE: Range<usize> = 0..8;
    pub(super) const PLACE: Range<usize> = 8..20;
    pub(super) const BYTES: Range<usize> = 20..24;
}

mod message_row {
    use std::ops::Range;
    /// 48 bits and 16 bits.
    pub(super) const SEQUENCE_AND_FLAGS: Range<usize> = 0..8;
    pub(super) const RECORD: Range<usize> = 8..20;
    pub(super) const PENDING: Range<usize> = 20..24;
    pub(super) const SUMMARY_LENGTH: Range<usize> = 24..28;
}

mod place {
    use std::ops::Range;
    pub(super) const SEGMENT: Range<usize> = 0..4;
    pub(super) const OFFSET16: Range<usize> = 4..8;
    pub(super) const LENGTH16: Range<usize> = 8..12;
}

const _: () = assert!(are_adjacent(
    &[
        header::MAGIC,
        header::CRC,
        header::VERSION,
        header::LOG,
        header::NUMBER,
        header::GENERATION,
        header::BEGIN_SEQUENCE,
        header::BEGIN_COMMIT,
        header::BEGIN_SEGMENT,
        header::DISCARDED,
        header::MESSAGES,
        header::SLICES,
        header::_ZERO,
    ],
    BLOCK_BYTES as usize
));
const _: () = assert!(are_adjacent(&[slice::CRC, slice::LENGTH, slice::KIND, slice::ROWS], 16));
const _: () = assert!(are_adjacent(
    &[
        segment_row::CHAIN,
        segment_row::FLAGS,
        segment_row::_ZERO,
        segment_row::NUMBER,
        segment_row::GENERATION,
        segment_row::END,
        segment_row::FIRST_SEQUENCE,
        segment_row::LAST_SEQUENCE,
        segment_row::LAST_COMMIT,
        segment_row::LAST_EVENT,
    ],
    64
));
const _: () = assert!(are_adjacent(&[body_row::SEQUENCE, body_row::PLACE, body_row::BYTES], 24));
const _: () = assert!(are_adjacent(
    &[message_row::SEQUENCE_AND_FLAGS, message_row::RECORD, message_row::PENDING, message_row::SUMMARY_LENGTH],
    28
));
const _: () = assert!(are_adjacent(&[place::SEGMENT, place::OFFSET16, place::LENGTH16], 12));
const _: () = assert!(body_row::PLACE.end - body_row::PLACE.start == PLACE_BYTES);
const _: () = assert!(message_row::RECORD.end - message_row::RECORD.start == PLACE_BYTES);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(version: u16, begin_segment: u64) -> CheckpointHeader {
        CheckpointHeader {
            version,
            log: LogId(0),
            number: 1,
            generation: 1,
            begin_sequence: 1,
            begin_commit: 1,
            begin_segment,
            discarded: 0,
            slices: 0,
            messages: 0,
        }
    }

    fn place() -> impl Strategy<Value = RowPlace> {
        let units = (SEGMENT_BYTES_MAX / ALIGN_BYTES) as u32;
        (any::<u32>(), 0..=units, 0..=units).prop_map(move |(segment, offset16, length16)| RowPlace {
            segment,
            offset16,
            length16: length16.min(units - offset16),
        })
    }

    proptest! {
        #[test]
        fn rows_come_out_as_they_went_in(
            begin_segment in 0..1_u64 << 33,
            steps in prop::collection::vec(1..1_u64 << 40, 1..6),
            record in place(),
            states in prop::collection::vec(place(), 0..4),
            words in prop::collection::vec(any::<u64>(), 0..4),
            (bits, body, is_held) in any::<(u32, Option<u64>, bool)>(),
            summary in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let header = header(FORMAT_VERSION, begin_segment);
            let mut sequence = 0;
            let rows: Vec<_> = steps.iter().map(|step| {
                sequence += step;
                let pending =
                    if words.is_empty() { PendingRow::Few(bits) } else { PendingRow::Many(words.clone().into()) };
                MessageRow { sequence, record, states: states.clone(), pending, body, is_held, summary: &summary }
            }).collect();
            let (mut buffer, mut context) = (Vec::new(), RowContext::new(&header));
            rows.iter().for_each(|row| row.encode(&mut context, &mut buffer));
            let (mut left, mut context) = (Rows(&buffer), RowContext::new(&header));
            for row in rows {
                prop_assert_eq!(MessageRow::decode(&mut context, &mut left), Some(row));
            }
            prop_assert!(left.0.is_empty());
        }

        /// A disk may say anything.
        #[test]
        fn bytes_are_not_trusted(bytes in prop::collection::vec(any::<u8>(), 0..80), version in 2_u16..4) {
            let (mut left, mut context) = (Rows(&bytes), RowContext::new(&header(version, 5)));
            while let Some(row) = MessageRow::decode(&mut context, &mut left) {
                prop_assert!(row.record.is_possible());
            }
        }

        #[test]
        fn numbers_take_seven_bits_an_octet(value: u64, shift in 0..64_u32) {
            let value = value >> shift;
            let mut buffer = Vec::new();
            push_varint(&mut buffer, value);
            prop_assert_eq!(buffer.len() as u32, (u64::BITS - value.leading_zeros()).div_ceil(7).max(1));
            prop_assert_eq!(Rows(&buffer).varint(), Some(value));
            prop_assert_eq!(Rows(&buffer[..buffer.len() - 1]).varint(), None);
        }
    }

    #[test]
    fn a_number_of_more_than_64_bits_is_none() {
        let largest = [&[0xff; 9][..], &[1]].concat();
        assert_eq!(Rows(&largest).varint(), Some(u64::MAX));
        for above in [[&[0xff; 9][..], &[2]].concat(), vec![0x80; 10], [&[0x80; 10][..], &[0]].concat()] {
            assert_eq!(Rows(&above).varint(), None);
        }
    }
}
