//! A frame in the making: what one commit writes, and what is taken back if it fails.

use crate::format::{FRAME_HEADER_BYTES, FrameHeader, RECORD_HEADER_BYTES, RecordHeader, SEGMENT_HEADER_BYTES};
use crate::index::{Before, Place};
use crate::limits::BLOCK_BYTES;
use crate::packed;
use crate::record::{CommitNumber, LogId, Outcome};
use crate::tombstone::Final;

/// One commit in the making.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) commit: CommitNumber,
    pub(crate) slot: u16,
    /// Where `buffer` goes.
    pub(crate) offset: u64,
    /// The segment's header block, if this is its first frame, then the frame.
    pub(crate) buffer: Vec<u8>,
    pub(crate) begins_segment: bool,
    /// Written even without a record: it begins a segment for its own sake.
    pub(crate) is_forced: bool,
    pub(crate) record_count: u32,
    pub(crate) first_sequence: u64,
    pub(crate) last_sequence: u64,
    pub(crate) last_event: u64,
    pub(crate) records_crc: u32,
    pub(crate) record_bytes: u64,
    pub(crate) changes: Vec<Change>,
    /// For the segment's tombstones.
    pub(crate) finals: Vec<Final>,
    /// The first outcome with final fates only. Later ones refer to it.
    pub(crate) base: Option<Base>,
}

#[derive(Debug)]
pub(crate) enum Base {
    /// Nothing has referred to it yet; where in the buffer its record begins.
    Written {
        sequence: u64,
        start: usize,
    },
    Read {
        sequence: u64,
        outcome: Box<Outcome>,
    },
}

/// A change of the index, as it is taken back.
#[derive(Debug)]
pub(crate) enum Change {
    Inserted { sequence: u64 },
    Replaced(Before),
    Body { sequence: u64 },
    BodyMoved { sequence: u64, from: Place },
}

impl Frame {
    pub(crate) fn is_wanted(&self) -> bool {
        self.is_forced || self.record_count > 0
    }

    /// The outcome that later ones may refer to.
    pub(crate) fn take_base(&mut self) -> Option<(u64, Box<Outcome>)> {
        match self.base.take()? {
            Base::Read { sequence, outcome } => Some((sequence, outcome)),
            Base::Written { sequence, start } => {
                let record = &self.buffer[start..];
                let header = RecordHeader::decode(&record[..RECORD_HEADER_BYTES]);
                let outcome = packed::read_outcome(header.schema, header.message, &record[header.archive_range()]);
                Some((sequence, Box::new(outcome.expect("an outcome as it was just written"))))
            }
        }
    }

    /// Bytes that the buffer will have when it is written.
    pub(crate) fn padded(&self) -> u64 {
        (self.buffer.len() as u64).next_multiple_of(BLOCK_BYTES)
    }

    pub(crate) fn start(&self) -> usize {
        if self.begins_segment { SEGMENT_HEADER_BYTES } else { 0 }
    }

    /// Fills in the frame header and the padding.
    pub(crate) fn close(&mut self, log: LogId, segment: u64, generation: u64) {
        let start = self.start();
        let header = FrameHeader {
            log,
            segment,
            generation,
            commit: self.commit.0,
            first_sequence: self.first_sequence,
            record_count: self.record_count,
            length: (self.buffer.len() - start) as u32,
            crc: 0,
        };
        header.encode(self.records_crc, &mut self.buffer[start..start + FRAME_HEADER_BYTES]);
        let padded = self.padded() as usize;
        self.buffer.resize(padded, 0);
    }
}
