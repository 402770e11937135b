//! Tombstones: what the final outcomes in a segment of mail told, so that it can be used again before checkpoints pass
//! it.
//!
//! A start replays what came after a checkpoint was begun, so a segment from behind that is needed although nothing in
//! it counts: without its final outcomes, messages would come back to life that a checkpoint, or another segment, still
//! has. Two checkpoints have to pass such a segment before it can be used again. Where room is short, one record in the
//! chain of copies tells of those fates instead, a few octets each; once it is durable, the segment's header is covered
//! with zeros, and the file is a spare. What else a replay would find in the segment is told by newer records (copies,
//! states, later outcomes), or not at all, because message and final outcome are gone together.
//!
//! They are so where the message is not older than the segment, and no checkpoint was begun between the two. Other
//! fates are noted as outcomes are appended, up to a bound; a segment with more of them, or from before the last start,
//! waits for checkpoints as ever.
//!
//! A segment's header also tells where the one before it ends, which shows by itself where no frame failed. One that
//! tells of more, of a failed frame or segment or of the end of the other chain, waits for checkpoints, too.
//!
//! See also `retire.rs`.

use std::io;
use std::sync::Arc;

use crate::append::RoomFor;
use crate::commit::Purpose;
use crate::directory::Durability;
use crate::format::{
    Chain, RECORD_HEADER_BYTES, RecordHeader, RecordKind, SEGMENT_HEADER_BYTES, Seal, SegmentHeader, TOMBSTONES_SCHEMA,
};
use crate::limits::{TOMBSTONES_SEGMENT_PART, TOMBSTONES_USED_PERCENT};
use crate::log::Log;
use crate::record::{CommitNumber, MessageId, Outcome, Sequence};
use crate::storage::{Operation, Work};

/// A recipient's final fate: the message's sequence, and the recipient's index.
pub(crate) type Final = (u64, u32);

/// What a segment's tombstones are to tell, and how far that has come.
#[derive(Debug, Default)]
pub(crate) enum Graves {
    /// Not all is known, or it is too much: the segment waits for checkpoints.
    #[default]
    Unknown,
    /// In the order of outcomes.
    Noted(Vec<Final>),
    /// They are told in this commit.
    Told { finals: Vec<Final>, commit: CommitNumber },
    /// The header is being covered.
    Covering,
    /// It is covered, and the file a spare in which nothing can be found.
    Covered,
}

impl Graves {
    /// Takes in what a durable frame told.
    pub(crate) fn extend(&mut self, finals: &mut Vec<Final>, capacity: u64) {
        match self {
            Self::Noted(noted) if (noted.len() + finals.len()) as u64 <= capacity / TOMBSTONES_SEGMENT_PART => {
                noted.append(finals);
            }
            _ => *self = Self::Unknown,
        }
        finals.clear();
    }

    pub(crate) fn is_covering(&self) -> bool {
        matches!(self, Self::Covering)
    }

    pub(crate) fn is_covered(&self) -> bool {
        matches!(self, Self::Covered)
    }

    /// A commit failed. Those above `durable` are void.
    pub(crate) fn take_back(&mut self, durable: CommitNumber) {
        if let Self::Told { finals, commit } = self
            && *commit > durable
        {
            *self = Self::Noted(std::mem::take(finals));
        }
    }
}

impl Log {
    /// The final fates of an outcome that something else than its segment may take back.
    pub(crate) fn note_finals(&mut self, slot: u16, outcome: &Outcome) {
        let sequence = MessageId::from_raw(outcome.message).sequence().0;
        if sequence >= self.segments.get(slot).first_sequence.max(self.checkpoints.last_begin) {
            return;
        }
        let finals = outcome.results.iter().filter(|result| result.fate.is_final()).map(|result| result.index);
        self.last_frame().finals.extend(finals.map(|index| (sequence, index)));
    }

    /// What a segment's header is about to tell of others decides whether it can be given up early.
    pub(crate) fn note_header(&mut self, slot: u16, header: &SegmentHeader) {
        // Numbers in between are those of the other chain, or of segments whose only frame failed, which this header
        // says. After a failure and after a start, when there can be such, it tells of the other chain, too: of what
        // failed nothing else is needed than the first condition. The second makes sure, and costs a wait at the most.
        let mut between = header.previous.number + 1..header.number;
        let tells_nothing_else =
            header.other == Seal::default() && between.all(|number| self.segments.by_number(number).is_some());
        if header.chain != Chain::Mail || !tells_nothing_else {
            self.segments.get_mut(slot).graves = Graves::Unknown;
        }
    }

    /// Whether a dead segment need not wait for checkpoints.
    pub(crate) fn can_be_given_up(&self, slot: u16) -> bool {
        let segment = self.segments.get(slot);
        match &segment.graves {
            Graves::Unknown => false,
            Graves::Noted(_) => self.is_room_wanted(),
            Graves::Told { .. } | Graves::Covering | Graves::Covered => true,
        }
    }

    /// Whether so much is used that dead segments should not wait for checkpoints, which are rarer in return.
    pub(crate) fn is_room_wanted(&self) -> bool {
        self.directory.budget().is_used_above(TOMBSTONES_USED_PERCENT) || self.is_pressed()
    }

    /// Gives dead segments up, one step at a time.
    pub(crate) fn poll_tombstones(&mut self) -> Option<Operation> {
        let mut is_told = false;
        for position in 0..self.segments.dead.len() {
            let slot = self.segments.dead[position];
            let waits = self.segments.in_use.contains(&slot)
                && self.is_dead(slot)
                && self.is_unneeded(slot)
                && !self.is_covered(slot)
                && self.can_be_given_up(slot);
            if !waits {
                continue;
            }
            match &self.segments.get(slot).graves {
                Graves::Noted(_) => is_told |= self.tell_tombstones(slot),
                Graves::Told { commit, .. } if *commit <= self.durable => {
                    if !self.segments.get_mut(slot).is_borrowed() {
                        return Some(self.cover_header(slot));
                    }
                }
                Graves::Unknown | Graves::Told { .. } | Graves::Covering | Graves::Covered => {}
            }
        }
        if is_told { self.poll_commit() } else { None }
    }

    /// False without room for them.
    fn tell_tombstones(&mut self, slot: u16) -> bool {
        let segment = self.segments.get_mut(slot);
        let number = segment.number;
        let Graves::Noted(finals) = &mut segment.graves else { return false };
        finals.sort_unstable();
        finals.dedup();
        let bytes = (RECORD_HEADER_BYTES + finals.len() * TOMBSTONE_BYTES_MAX) as u64;
        if !self.has_room_for_copies(bytes) {
            return false;
        }
        let Graves::Noted(finals) = std::mem::take(&mut self.segments.get_mut(slot).graves) else { return false };
        let header = RecordHeader {
            kind: RecordKind::Tombstones as u8,
            schema: TOMBSTONES_SCHEMA,
            message: MessageId::new(self.id(), Sequence(number)).to_raw(),
            ..RecordHeader::default()
        };
        let waiting = self.begin_copies();
        let written = self.append_record(RoomFor::Copy, Chain::Copies, header, Some(&finals), None, [&[], &[]]);
        self.end_copies(waiting);
        let segment = self.segments.get_mut(slot);
        match written {
            Ok(written) => {
                segment.graves = Graves::Told { finals, commit: written.commit };
                self.counters.bytes_copied += written.place.length();
                true
            }
            Err(_) => {
                segment.graves = Graves::Noted(finals);
                false
            }
        }
    }

    /// A header that stays while the file's next use is begun would tell of damage that is none.
    fn cover_header(&mut self, slot: u16) -> Operation {
        let segment = self.segments.get_mut(slot);
        segment.graves = Graves::Covering;
        let work = Work::Write {
            file: Arc::clone(&segment.file),
            offset: 0,
            buffer: vec![0; SEGMENT_HEADER_BYTES],
            start: 0,
            sync: self.directory.options().durability == Durability::Fsync,
        };
        self.operation(work, Purpose::Cover { slot })
    }

    pub(crate) fn handle_cover(&mut self, slot: u16, result: io::Result<usize>) {
        self.segments.get_mut(slot).graves = Graves::Unknown;
        if matches!(result, Ok(SEGMENT_HEADER_BYTES)) {
            self.counters.bytes_written += SEGMENT_HEADER_BYTES as u64;
            self.segments.dead.retain(|dead| *dead != slot);
            // What its outcomes told is there: nothing is discarded.
            self.make_spare(slot);
            self.segments.get_mut(slot).graves = Graves::Covered;
            self.counters.segments_given_up += 1;
        }
        // Else the header may be torn, which a start takes for the begin of another use; checkpoints will pass it.
    }
}

/// What a tombstone takes at most: two varints, and a list of one.
const TOMBSTONE_BYTES_MAX: usize = 10 + 1 + 5;
