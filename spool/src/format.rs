//! The bytes on disk: encoding and decoding of every header, and the checksums. `FORMAT.md` is the description; the
//! constants below are asserted against it at compile time, and golden bytes pin it (`tests/format_golden.rs`).
//!
//! All integers are little-endian. Nothing here does I/O, and nothing trusts what it decodes: lengths are checked
//! against the bytes at hand before they are used.
//!
//! Over 500 lines: every header's bytes stand here, beside the asserts that tie them to `FORMAT.md`.

use std::ops::Range;

use crate::checksum::{crc32c, crc32c_append};
use crate::limits::{ALIGN_BYTES, BLOCK_BYTES};
use crate::record::LogId;

/// The format that this program writes, and the newest that it reads.
pub const FORMAT_VERSION: u16 = 4;

/// Which records a segment takes. Mail and outcomes die soon, copies late, so they do not share segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Chain {
    /// Messages, bodies and outcomes as they come.
    Mail = 0,
    /// What was copied out of older segments.
    Copies = 1,
}

impl Chain {
    pub const ALL: [Self; 2] = [Self::Mail, Self::Copies];

    pub fn other(self) -> Self {
        match self {
            Self::Mail => Self::Copies,
            Self::Copies => Self::Mail,
        }
    }
}

/// Where a segment ended: frames there from `end` on are void.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Seal {
    /// 0: there is no such segment.
    pub number: u64,
    pub generation: u64,
    pub end: u64,
    pub last_commit: u64,
}

/// The first block of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    pub log: LogId,
    /// The segment's place in the log: numbers only grow, in the order of use.
    pub number: u64,
    /// Random, drawn at each use of the file; seeds all checksums in it.
    pub generation: u64,
    pub first_sequence: u64,
    pub first_commit: u64,
    /// Segments below this number are dead, whatever they hold.
    pub tail: u64,
    /// The segment before this one in its chain.
    pub previous: Seal,
    pub capacity: u64,
    /// The highest sequence in segments that have been used again: of outcomes up to it some may be gone.
    pub discarded: u64,
    pub chain: Chain,
    /// The last segment of the other chain, if nothing more will be appended to that one; [`Seal::NOTHING`] where that
    /// chain has no segment. The default says that it goes on.
    pub other: Seal,
}

/// What the first block of a file was found to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentBlock {
    Header(SegmentHeader),
    /// Only zeros: allocated, never used.
    Blank,
    /// Neither blank nor a header with a right checksum.
    Damaged,
    /// A header of a newer version.
    Newer {
        version: u16,
    },
}

impl SegmentHeader {
    pub fn encode(&self, block: &mut [u8]) {
        assert_eq!(block.len(), SEGMENT_HEADER_BYTES);
        block.fill(0);
        block[segment::MAGIC].copy_from_slice(&SEGMENT_MAGIC);
        block[segment::VERSION].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        block[segment::LOG].copy_from_slice(&self.log.0.to_le_bytes());
        for (range, value) in [
            (segment::NUMBER, self.number),
            (segment::GENERATION, self.generation),
            (segment::FIRST_SEQUENCE, self.first_sequence),
            (segment::FIRST_COMMIT, self.first_commit),
            (segment::TAIL, self.tail),
            (segment::CAPACITY, self.capacity),
            (segment::DISCARDED, self.discarded),
        ] {
            block[range].copy_from_slice(&value.to_le_bytes());
        }
        block[segment::CHAIN].copy_from_slice(&(self.chain as u16).to_le_bytes());
        self.previous.encode(&mut block[segment::PREVIOUS]);
        self.other.encode(&mut block[segment::OTHER]);
        let crc = crc32c(&block[segment::CRC.end..]);
        block[segment::CRC].copy_from_slice(&crc.to_le_bytes());
    }

    pub fn decode(block: &[u8]) -> SegmentBlock {
        assert_eq!(block.len(), SEGMENT_HEADER_BYTES);
        if block.iter().all(|byte| *byte == 0) {
            return SegmentBlock::Blank;
        }
        // The version is read before the checksum is, so that a newer format may change all that follows.
        if block[segment::MAGIC] == SEGMENT_MAGIC {
            let version = u16_at(block, segment::VERSION);
            if version > FORMAT_VERSION {
                return SegmentBlock::Newer { version };
            }
        }
        let crc = crc32c(&block[segment::CRC.end..]);
        if block[segment::MAGIC] != SEGMENT_MAGIC || u32_at(block, segment::CRC) != crc {
            return SegmentBlock::Damaged;
        }
        SegmentBlock::Header(Self {
            log: LogId(u16_at(block, segment::LOG)),
            number: u64_at(block, segment::NUMBER),
            generation: u64_at(block, segment::GENERATION),
            first_sequence: u64_at(block, segment::FIRST_SEQUENCE),
            first_commit: u64_at(block, segment::FIRST_COMMIT),
            tail: u64_at(block, segment::TAIL),
            previous: Seal::decode(&block[segment::PREVIOUS]),
            capacity: u64_at(block, segment::CAPACITY),
            discarded: u64_at(block, segment::DISCARDED),
            chain: match u16_at(block, segment::CHAIN) {
                0 => Chain::Mail,
                _ => Chain::Copies,
            },
            other: Seal::decode(&block[segment::OTHER]),
        })
    }
}

impl Seal {
    /// The end of a chain that has no segment: all of its headers with lower numbers are void.
    pub const NOTHING: Self = Self { number: 0, generation: 0, end: SEGMENT_HEADER_BYTES as u64, last_commit: 0 };

    fn encode(&self, bytes: &mut [u8]) {
        let fields = [self.number, self.generation, self.end, self.last_commit];
        for (place, field) in bytes.chunks_exact_mut(8).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
    }

    fn decode(bytes: &[u8]) -> Self {
        let field = |index: usize| u64_at(bytes, index * 8..index * 8 + 8);
        Self { number: field(0), generation: field(1), end: field(2), last_commit: field(3) }
    }
}

/// The head of a frame: one commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    pub log: LogId,
    /// The number of the segment that it was written to.
    pub segment: u64,
    pub generation: u64,
    pub commit: u64,
    pub first_sequence: u64,
    pub record_count: u32,
    /// Bytes from the frame header's begin to the last record's end, padding excluded.
    pub length: u32,
    pub crc: u32,
}

impl FrameHeader {
    /// `records_crc` is the checksum of all record headers, one behind the other; `crc` is computed, not taken.
    pub fn encode(&self, records_crc: u32, bytes: &mut [u8]) {
        assert_eq!(bytes.len(), FRAME_HEADER_BYTES);
        bytes.fill(0);
        bytes[frame::MAGIC].copy_from_slice(&FRAME_MAGIC);
        bytes[frame::LOG].copy_from_slice(&self.log.0.to_le_bytes());
        bytes[frame::SEGMENT].copy_from_slice(&self.segment.to_le_bytes());
        bytes[frame::GENERATION].copy_from_slice(&self.generation.to_le_bytes());
        bytes[frame::COMMIT].copy_from_slice(&self.commit.to_le_bytes());
        bytes[frame::FIRST_SEQUENCE].copy_from_slice(&self.first_sequence.to_le_bytes());
        bytes[frame::RECORD_COUNT].copy_from_slice(&self.record_count.to_le_bytes());
        bytes[frame::LENGTH].copy_from_slice(&self.length.to_le_bytes());
        let crc = crc32c_append(records_crc, &bytes[frame::CRC.end..]);
        bytes[frame::CRC].copy_from_slice(&crc.to_le_bytes());
    }

    pub fn has_magic(bytes: &[u8]) -> bool {
        bytes.starts_with(&FRAME_MAGIC)
    }

    /// Reads the fields, whatever they are. Whether the checksum is right shows only with the record headers.
    pub fn decode(bytes: &[u8]) -> Self {
        assert!(bytes.len() >= FRAME_HEADER_BYTES);
        Self {
            log: LogId(u16_at(bytes, frame::LOG)),
            segment: u64_at(bytes, frame::SEGMENT),
            generation: u64_at(bytes, frame::GENERATION),
            commit: u64_at(bytes, frame::COMMIT),
            first_sequence: u64_at(bytes, frame::FIRST_SEQUENCE),
            record_count: u32_at(bytes, frame::RECORD_COUNT),
            length: u32_at(bytes, frame::LENGTH),
            crc: u32_at(bytes, frame::CRC),
        }
    }

    /// Bytes that the frame takes in the segment.
    pub fn padded(&self) -> u64 {
        u64::from(self.length).next_multiple_of(BLOCK_BYTES)
    }

    /// Where the frame's records begin, if the frame is whole: `bytes` begin with its header and hold all its records.
    ///
    /// A frame is whole when its header and all record headers are those that were written; the records' own checksums
    /// are checked apart.
    pub fn records(&self, bytes: &[u8]) -> Option<Vec<(usize, RecordHeader)>> {
        let frame = bytes.get(..self.length as usize)?;
        let head = frame.get(frame::CRC.end..FRAME_HEADER_BYTES)?;
        let mut records = Vec::new();
        let mut crc = 0;
        let mut position = FRAME_HEADER_BYTES;
        for _ in 0..self.record_count {
            let raw = frame.get(position..position.checked_add(RECORD_HEADER_BYTES)?)?;
            let header = RecordHeader::decode(raw);
            crc = crc32c_append(crc, raw);
            records.push((position, header));
            position = position.checked_add(header.checked_length()?)?;
        }
        let crc = crc32c_append(crc, head);
        (position == frame.len() && crc == self.crc).then_some(records)
    }
}

/// What a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordKind {
    /// Envelope and content.
    Message = 1,
    /// What became of some recipients.
    Outcome = 2,
    /// A message again, with its recipients' present state, under its old id.
    Copy = 3,
    /// A message's recipients' present state alone: its earlier outcomes are of no use any more.
    State = 4,
    /// A body that messages share; also when it is copied, under its old id.
    Body = 5,
    /// What the final outcomes in a segment of mail told that is being given up.
    Tombstones = 6,
}

/// The head of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RecordHeader {
    pub kind: u8,
    /// Of the archive's layout, per kind.
    pub schema: u8,
    pub flags: u16,
    pub archive_length: u32,
    /// Of the second archive of a copy; 0 in others.
    pub state_length: u32,
    pub prefix_length: u32,
    pub body_length: u32,
    /// Of the body that a message or its copy shares; 0 where it has one of its own, or where an earlier release wrote.
    pub shared_body_length: u32,
    pub sequence: u64,
    /// The message or body that it is, or is about; of tombstones, log and segment number in the same form.
    pub message: u64,
    /// The sequence of the body that a message or its copy shares; 0 where it has one of its own.
    pub shared_body: u64,
    /// The sequence of the outcome in the same frame that an outcome of schema 3 refers to; 0 in all others.
    pub base: u64,
    /// Over the header up to here and both archives.
    pub head_crc: u32,
    /// Over prefix and body.
    pub content_crc: u32,
}

impl RecordHeader {
    /// A flag: the message waits for the operator, because it may have been delivered already.
    pub const HELD: u16 = 1;

    /// Writes everything but the checksums, which stay zero.
    pub(crate) fn encode_unsealed(&self, bytes: &mut [u8]) {
        assert_eq!(bytes.len(), RECORD_HEADER_BYTES);
        bytes.fill(0);
        bytes[record::KIND] = self.kind;
        bytes[record::SCHEMA] = self.schema;
        bytes[record::FLAGS].copy_from_slice(&self.flags.to_le_bytes());
        bytes[record::ARCHIVE_LENGTH].copy_from_slice(&self.archive_length.to_le_bytes());
        bytes[record::STATE_LENGTH].copy_from_slice(&self.state_length.to_le_bytes());
        bytes[record::PREFIX_LENGTH].copy_from_slice(&self.prefix_length.to_le_bytes());
        bytes[record::BODY_LENGTH].copy_from_slice(&self.body_length.to_le_bytes());
        bytes[record::SHARED_BODY_LENGTH].copy_from_slice(&self.shared_body_length.to_le_bytes());
        bytes[record::SEQUENCE].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[record::MESSAGE].copy_from_slice(&self.message.to_le_bytes());
        bytes[record::SHARED_BODY].copy_from_slice(&self.shared_body.to_le_bytes());
        bytes[record::BASE].copy_from_slice(&self.base.to_le_bytes());
    }

    /// Completes a record: `bytes` begin with the unsealed header and hold the whole record.
    pub(crate) fn seal(&self, generation: u64, bytes: &mut [u8]) {
        let head = self.head_crc_of(generation, &bytes[..self.head_bytes()]);
        let content = content_crc(generation, self.sequence, &bytes[self.content_range()]);
        bytes[record::HEAD_CRC].copy_from_slice(&head.to_le_bytes());
        bytes[record::CONTENT_CRC].copy_from_slice(&content.to_le_bytes());
    }

    pub fn decode(bytes: &[u8]) -> Self {
        assert_eq!(bytes.len(), RECORD_HEADER_BYTES);
        Self {
            kind: bytes[record::KIND],
            schema: bytes[record::SCHEMA],
            flags: u16_at(bytes, record::FLAGS),
            archive_length: u32_at(bytes, record::ARCHIVE_LENGTH),
            state_length: u32_at(bytes, record::STATE_LENGTH),
            prefix_length: u32_at(bytes, record::PREFIX_LENGTH),
            body_length: u32_at(bytes, record::BODY_LENGTH),
            sequence: u64_at(bytes, record::SEQUENCE),
            message: u64_at(bytes, record::MESSAGE),
            // In outcomes, version 1 had other numbers here.
            shared_body_length: match bytes[record::KIND] {
                OUTCOME_KIND => 0,
                _ => u32_at(bytes, record::SHARED_BODY_LENGTH),
            },
            shared_body: match bytes[record::KIND] {
                OUTCOME_KIND => 0,
                _ => u64_at(bytes, record::SHARED_BODY),
            },
            base: match (bytes[record::KIND], bytes[record::SCHEMA]) {
                (OUTCOME_KIND, LATER_OUTCOME_SCHEMA) => u64_at(bytes, record::BASE),
                _ => 0,
            },
            head_crc: u32_at(bytes, record::HEAD_CRC),
            content_crc: u32_at(bytes, record::CONTENT_CRC),
        }
    }

    /// Whether an event is derived from the record.
    pub fn is_event(&self) -> bool {
        self.kind == RecordKind::Message as u8 || self.kind == RecordKind::Outcome as u8
    }

    /// The record's whole length, padding included; `None` where the lengths can't be true.
    pub fn checked_length(&self) -> Option<usize> {
        let sum = u64::from(self.archive_length).next_multiple_of(ALIGN_BYTES)
            + u64::from(self.state_length).next_multiple_of(ALIGN_BYTES)
            + (u64::from(self.prefix_length) + u64::from(self.body_length)).next_multiple_of(ALIGN_BYTES);
        (sum <= crate::limits::SEGMENT_BYTES_MAX).then(|| RECORD_HEADER_BYTES + sum as usize)
    }

    /// Bytes of header and archives with their padding: what the head checksum covers.
    pub fn head_bytes(&self) -> usize {
        self.state_start() + (self.state_length as usize).next_multiple_of(ALIGN_BYTES as usize)
    }

    pub fn archive_range(&self) -> Range<usize> {
        RECORD_HEADER_BYTES..RECORD_HEADER_BYTES + self.archive_length as usize
    }

    pub fn state_range(&self) -> Range<usize> {
        self.state_start()..self.state_start() + self.state_length as usize
    }

    pub fn content_range(&self) -> Range<usize> {
        let start = self.head_bytes();
        start..start + self.content_bytes()
    }

    pub fn prefix_range(&self) -> Range<usize> {
        let start = self.head_bytes();
        start..start + self.prefix_length as usize
    }

    pub fn body_range(&self) -> Range<usize> {
        let start = self.head_bytes() + self.prefix_length as usize;
        start..start + self.body_length as usize
    }

    pub fn content_bytes(&self) -> usize {
        self.prefix_length as usize + self.body_length as usize
    }

    /// `head` is [`Self::head_bytes`] long.
    pub fn head_matches(&self, generation: u64, head: &[u8]) -> bool {
        self.head_crc == self.head_crc_of(generation, head)
    }

    pub fn content_matches(&self, generation: u64, content: &[u8]) -> bool {
        self.content_crc == content_crc(generation, self.sequence, content)
    }

    fn head_crc_of(&self, generation: u64, head: &[u8]) -> u32 {
        let crc = crc32c_append(seed(generation, self.sequence), &head[..record::HEAD_CRC.start]);
        crc32c_append(crc, &head[RECORD_HEADER_BYTES..])
    }

    fn state_start(&self) -> usize {
        RECORD_HEADER_BYTES + (self.archive_length as usize).next_multiple_of(ALIGN_BYTES as usize)
    }
}

/// The spool's meta file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meta {
    /// The id of the next log to be made; those below were all given out.
    pub next_log: u32,
}

/// Why a meta file can't be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetaError {
    Damaged,
    Newer { version: u16 },
}

impl Meta {
    pub fn encode(self) -> [u8; META_BYTES] {
        let mut bytes = [0; META_BYTES];
        bytes[meta::MAGIC].copy_from_slice(&META_MAGIC);
        bytes[meta::VERSION].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes[meta::NEXT_LOG].copy_from_slice(&self.next_log.to_le_bytes());
        let crc = crc32c(&bytes[meta::CRC.end..]);
        bytes[meta::CRC].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, MetaError> {
        if bytes.len() < META_BYTES || bytes[meta::MAGIC] != META_MAGIC {
            return Err(MetaError::Damaged);
        }
        let version = u16_at(bytes, meta::VERSION);
        if version > FORMAT_VERSION {
            return Err(MetaError::Newer { version });
        }
        let crc = crc32c(&bytes[meta::CRC.end..META_BYTES]);
        if u32_at(bytes, meta::CRC) != crc {
            return Err(MetaError::Damaged);
        }
        Ok(Self { next_log: u32_at(bytes, meta::NEXT_LOG) })
    }
}

/// Where the checksums of a record start from, so that one from an earlier use of the same place can't be right.
pub(crate) fn seed(generation: u64, sequence: u64) -> u32 {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&generation.to_le_bytes());
    bytes[8..].copy_from_slice(&sequence.to_le_bytes());
    crc32c(&bytes)
}

fn content_crc(generation: u64, sequence: u64, content: &[u8]) -> u32 {
    crc32c_append(seed(generation, sequence), content)
}

pub(crate) fn u16_at(bytes: &[u8], range: Range<usize>) -> u16 {
    u16::from_le_bytes(bytes[range].try_into().expect("a range of two bytes"))
}

pub(crate) fn u32_at(bytes: &[u8], range: Range<usize>) -> u32 {
    u32::from_le_bytes(bytes[range].try_into().expect("a range of four bytes"))
}

pub(crate) fn u64_at(bytes: &[u8], range: Range<usize>) -> u64 {
    u64::from_le_bytes(bytes[range].try_into().expect("a range of eight bytes"))
}

pub const SEGMENT_MAGIC: [u8; 8] = *b"PRSEGMNT";
pub const FRAME_MAGIC: [u8; 8] = *b"PRFRAME\n";
pub const META_MAGIC: [u8; 8] = *b"PRSPOOL\n";

pub const SEGMENT_HEADER_BYTES: usize = 4096;
pub const FRAME_HEADER_BYTES: usize = 64;
pub const RECORD_HEADER_BYTES: usize = 64;
pub const META_BYTES: usize = 64;

const OUTCOME_KIND: u8 = RecordKind::Outcome as u8;

/// The layout of each kind's archives that this program writes; earlier ones are read.
pub const MESSAGE_SCHEMA: u8 = 1;
pub const OUTCOME_SCHEMA: u8 = 2;
pub const LATER_OUTCOME_SCHEMA: u8 = 3;
pub const COPY_SCHEMA: u8 = 2;
pub const STATE_SCHEMA: u8 = 2;
pub const BODY_SCHEMA: u8 = 1;
pub const TOMBSTONES_SCHEMA: u8 = 1;

mod segment {
    use std::ops::Range;
    pub(super) const MAGIC: Range<usize> = 0..8;
    pub(super) const CRC: Range<usize> = 8..12;
    pub(super) const VERSION: Range<usize> = 12..14;
    pub(super) const LOG: Range<usize> = 14..16;
    pub(super) const NUMBER: Range<usize> = 16..24;
    pub(super) const GENERATION: Range<usize> = 24..32;
    pub(super) const FIRST_SEQUENCE: Range<usize> = 32..40;
    pub(super) const FIRST_COMMIT: Range<usize> = 40..48;
    pub(super) const TAIL: Range<usize> = 48..56;
    /// Number, generation, end, last commit.
    pub(super) const PREVIOUS: Range<usize> = 56..88;
    pub(super) const CAPACITY: Range<usize> = 88..96;
    pub(super) const DISCARDED: Range<usize> = 96..104;
    pub(super) const CHAIN: Range<usize> = 104..106;
    pub(super) const _ZERO: Range<usize> = 106..112;
    /// As `PREVIOUS`.
    pub(super) const OTHER: Range<usize> = 112..144;
    pub(super) const _REST: Range<usize> = 144..4096;
}

mod frame {
    use std::ops::Range;
    pub(super) const MAGIC: Range<usize> = 0..8;
    pub(super) const CRC: Range<usize> = 8..12;
    pub(super) const _ZERO: Range<usize> = 12..14;
    pub(super) const LOG: Range<usize> = 14..16;
    pub(super) const SEGMENT: Range<usize> = 16..24;
    pub(super) const GENERATION: Range<usize> = 24..32;
    pub(super) const COMMIT: Range<usize> = 32..40;
    pub(super) const FIRST_SEQUENCE: Range<usize> = 40..48;
    pub(super) const RECORD_COUNT: Range<usize> = 48..52;
    pub(super) const LENGTH: Range<usize> = 52..56;
    pub(super) const _REST: Range<usize> = 56..64;
}

mod record {
    use std::ops::Range;
    pub(super) const KIND: usize = 0;
    pub(super) const SCHEMA: usize = 1;
    pub(super) const FLAGS: Range<usize> = 2..4;
    pub(super) const ARCHIVE_LENGTH: Range<usize> = 4..8;
    pub(super) const STATE_LENGTH: Range<usize> = 8..12;
    pub(super) const PREFIX_LENGTH: Range<usize> = 12..16;
    pub(super) const BODY_LENGTH: Range<usize> = 16..20;
    pub(super) const SHARED_BODY_LENGTH: Range<usize> = 20..24;
    pub(super) const SEQUENCE: Range<usize> = 24..32;
    pub(super) const MESSAGE: Range<usize> = 32..40;
    pub(super) const SHARED_BODY: Range<usize> = 40..48;
    pub(super) const BASE: Range<usize> = 48..56;
    pub(super) const HEAD_CRC: Range<usize> = 56..60;
    pub(super) const CONTENT_CRC: Range<usize> = 60..64;
}

mod meta {
    use std::ops::Range;
    pub(super) const MAGIC: Range<usize> = 0..8;
    pub(super) const CRC: Range<usize> = 8..12;
    pub(super) const VERSION: Range<usize> = 12..14;
    pub(super) const _ZERO: Range<usize> = 14..16;
    pub(super) const NEXT_LOG: Range<usize> = 16..20;
    pub(super) const _REST: Range<usize> = 20..64;
}

/// Whether fields follow one another from 0 to `end`, as the tables of `FORMAT.md` tell.
pub(crate) const fn are_adjacent(fields: &[Range<usize>], end: usize) -> bool {
    let mut at = 0;
    let mut index = 0;
    while index < fields.len() {
        if fields[index].start != at || fields[index].end <= at {
            return false;
        }
        at = fields[index].end;
        index += 1;
    }
    at == end
}

const _: () = assert!(SEGMENT_HEADER_BYTES as u64 == BLOCK_BYTES);
const _: () = assert!((FRAME_HEADER_BYTES as u64).is_multiple_of(ALIGN_BYTES));
const _: () = assert!((RECORD_HEADER_BYTES as u64).is_multiple_of(ALIGN_BYTES));
const _: () = assert!(are_adjacent(
    &[
        segment::MAGIC,
        segment::CRC,
        segment::VERSION,
        segment::LOG,
        segment::NUMBER,
        segment::GENERATION,
        segment::FIRST_SEQUENCE,
        segment::FIRST_COMMIT,
        segment::TAIL,
        segment::PREVIOUS,
        segment::CAPACITY,
        segment::DISCARDED,
        segment::CHAIN,
        segment::_ZERO,
        segment::OTHER,
        segment::_REST,
    ],
    SEGMENT_HEADER_BYTES
));
const _: () = assert!(are_adjacent(
    &[
        frame::MAGIC,
        frame::CRC,
        frame::_ZERO,
        frame::LOG,
        frame::SEGMENT,
        frame::GENERATION,
        frame::COMMIT,
        frame::FIRST_SEQUENCE,
        frame::RECORD_COUNT,
        frame::LENGTH,
        frame::_REST,
    ],
    FRAME_HEADER_BYTES
));
const _: () = assert!(are_adjacent(
    &[
        record::KIND..record::KIND + 1,
        record::SCHEMA..record::SCHEMA + 1,
        record::FLAGS,
        record::ARCHIVE_LENGTH,
        record::STATE_LENGTH,
        record::PREFIX_LENGTH,
        record::BODY_LENGTH,
        record::SHARED_BODY_LENGTH,
        record::SEQUENCE,
        record::MESSAGE,
        record::SHARED_BODY,
        record::BASE,
        record::HEAD_CRC,
        record::CONTENT_CRC,
    ],
    RECORD_HEADER_BYTES
));
const _: () = assert!(are_adjacent(
    &[meta::MAGIC, meta::CRC, meta::VERSION, meta::_ZERO, meta::NEXT_LOG, meta::_REST],
    META_BYTES
));
const _: () = assert!(segment::PREVIOUS.end - segment::PREVIOUS.start == 4 * 8);
const _: () = assert!(segment::OTHER.end - segment::OTHER.start == 4 * 8);

#[cfg(test)]
mod tests {
    use super::{RECORD_HEADER_BYTES, RecordHeader};

    /// A record counts only in the use of the segment, and at the sequence, that it was written for.
    #[test]
    fn checksums_are_seeded() {
        let header = RecordHeader { kind: 1, body_length: 5, sequence: 7, message: 7, ..RecordHeader::default() };
        let mut bytes = vec![0; header.checked_length().unwrap()];
        header.encode_unsealed(&mut bytes[..RECORD_HEADER_BYTES]);
        bytes[header.body_range()].copy_from_slice(b"hello");
        header.seal(99, &mut bytes);
        let sealed = RecordHeader::decode(&bytes[..RECORD_HEADER_BYTES]);
        let matches = |header: &RecordHeader, generation| {
            let head = header.head_matches(generation, &bytes[..header.head_bytes()]);
            let content = header.content_matches(generation, &bytes[header.content_range()]);
            assert_eq!(head, content);
            head
        };
        assert!(matches(&sealed, 99));
        assert!(!matches(&sealed, 98));
        assert!(!matches(&RecordHeader { sequence: 8, ..sealed }, 99));
    }
}
