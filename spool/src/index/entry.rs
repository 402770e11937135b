//! What the index keeps of a message, and where its records are.

use std::mem::size_of;

use crate::limits::{ALIGN_BYTES, INLINE_RECIPIENTS_MAX};

/// A record's place: a slot of the segment table, and units of 16 bytes in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) slot: u16,
    pub(crate) offset16: u32,
    pub(crate) length16: u32,
}

impl Place {
    pub(crate) fn new(slot: u16, offset: u64, length: usize) -> Self {
        assert!(offset.is_multiple_of(ALIGN_BYTES));
        assert!((length as u64).is_multiple_of(ALIGN_BYTES));
        Self { slot, offset16: (offset / ALIGN_BYTES) as u32, length16: (length as u64 / ALIGN_BYTES) as u32 }
    }

    pub(crate) fn offset(self) -> u64 {
        u64::from(self.offset16) * ALIGN_BYTES
    }

    pub(crate) fn length(self) -> u64 {
        u64::from(self.length16) * ALIGN_BYTES
    }
}

/// A live message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    sequence_low: u32,
    sequence_high: u16,
    pub(super) flags: u16,
    record_offset16: u32,
    record_length16: u32,
    outcome_offset16: u32,
    /// 0: no outcome since the record was written.
    outcome_length16: u32,
    record_slot: u16,
    outcome_slot: u16,
    /// Bit i: recipient i has no final fate. All ones: there are more recipients, see [`Index::wide`](super::Index).
    pub(super) pending: u32,
    /// What the log's owner keeps with the message.
    pub(crate) handle: u32,
}

const _: () = assert!(size_of::<Entry>() == 36);

impl Entry {
    pub(super) fn new(sequence: u64, record: Place) -> Self {
        let mut entry = Self {
            sequence_low: sequence as u32,
            sequence_high: (sequence >> 32) as u16,
            flags: 0,
            record_offset16: 0,
            record_length16: 0,
            outcome_offset16: 0,
            outcome_length16: 0,
            record_slot: 0,
            outcome_slot: 0,
            pending: WIDE,
            handle: 0,
        };
        entry.set_record(record);
        entry
    }

    pub(crate) fn sequence(&self) -> u64 {
        u64::from(self.sequence_high) << 32 | u64::from(self.sequence_low)
    }

    pub(crate) fn record(&self) -> Place {
        Place { slot: self.record_slot, offset16: self.record_offset16, length16: self.record_length16 }
    }

    /// The newest outcome or state record about this message since the message or its copy was written.
    pub(crate) fn outcome(&self) -> Option<Place> {
        (self.outcome_length16 != 0).then_some(Place {
            slot: self.outcome_slot,
            offset16: self.outcome_offset16,
            length16: self.outcome_length16,
        })
    }

    pub(crate) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    pub(crate) fn set_touched(&mut self) {
        self.flags |= TOUCHED;
    }

    /// Without the owner's handle, which no record tells.
    pub(crate) fn is_same_state(&self, other: &Self) -> bool {
        Self { handle: 0, ..*self } == Self { handle: 0, ..*other }
    }

    pub(super) fn with_handle(self, handle: u32) -> Self {
        Self { handle, ..self }
    }

    pub(super) fn set_record(&mut self, place: Place) {
        self.record_slot = place.slot;
        self.record_offset16 = place.offset16;
        self.record_length16 = place.length16;
        self.outcome_length16 = 0;
    }

    pub(super) fn set_outcome(&mut self, place: Place) {
        self.outcome_slot = place.slot;
        self.outcome_offset16 = place.offset16;
        self.outcome_length16 = place.length16;
    }

    /// Returns whether there was one.
    pub(super) fn forget_outcome(&mut self) -> bool {
        std::mem::take(&mut self.outcome_length16) != 0
    }
}

/// What an entry was before a change, so that the change can be taken back.
#[derive(Debug, Clone)]
pub(crate) struct Before {
    pub(crate) entry: Entry,
    pub(super) wide: Option<Box<[u64]>>,
    pub(super) older: Option<Box<[Place]>>,
    pub(crate) body: Option<u64>,
}

impl Before {
    /// The outcome and state records that told the recipients' state.
    pub(crate) fn states(&self) -> impl Iterator<Item = Place> {
        self.entry.outcome().into_iter().chain(self.older.iter().flatten().copied())
    }
}

/// All that is known of a live message, as a checkpoint holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) sequence: u64,
    pub(crate) record: Place,
    pub(crate) outcome: Option<Place>,
    /// Oldest first.
    pub(crate) older: Vec<Place>,
    pub(crate) pending: Pending,
    pub(crate) body: Option<u64>,
    pub(crate) is_held: bool,
}

/// Recipients without a final fate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Pending {
    /// Bit i: recipient i, of at most [`INLINE_RECIPIENTS_MAX`].
    Few(u32),
    Many(Box<[u64]>),
}

/// How an outcome leaves a recipient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Settles {
    Finally,
    ForNow,
}

/// The slot of a place in a segment that is not there. Only recovery meets it.
pub(crate) const NOWHERE: u16 = u16::MAX;

pub(super) const WIDE: u32 = u32::MAX;

/// Flags of an entry: older outcomes count, see [`Index::older`](super::Index).
pub(super) const OLDER: u16 = 1;
/// The body is shared, see [`Index::bodies`](super::Index).
pub(super) const SHARES: u16 = 2;
/// For the operator: it may have been delivered already.
pub(crate) const HELD: u16 = 4;
/// During recovery: a record behind the checkpoint is about it.
pub(crate) const TOUCHED: u16 = 8;

const _: () = assert!((1_u64 << INLINE_RECIPIENTS_MAX) - 1 < WIDE as u64);
