//! What is not as it was written: judged, reported, and put aside before anything goes over it.
//!
//! A commit that was never acknowledged is *cut*, and closed so that no later start has to judge it again; all else is
//! *quarantined*. What can't be put aside is told as such, and does not stop the start.

use std::mem;
use std::ops::Range;
use std::sync::Arc;

use super::recovered::{Cut, Kept, Quarantine, Reason, Recovered};
use super::{Damage, DoubtfulHeaders, Recovery};
use crate::format::{
    FRAME_HEADER_BYTES, FrameHeader, RECORD_HEADER_BYTES, RecordHeader, SEGMENT_HEADER_BYTES, Seal, SegmentHeader,
};
use crate::index::{Entry, NOWHERE, Place, TOUCHED};
use crate::limits::{BLOCK_BYTES, KEPT_FILES_MAX};
use crate::log::Log;
use crate::record::{CommitNumber, MessageId, Sequence};
use crate::replay::SegmentBytes;
use crate::segment::Segment;
use crate::survey::DamagedHeader;

impl Recovery<'_> {
    /// Only what was durable became an event, so a log that ends before the event cursor has lost its end: the files
    /// themselves can't tell when the newest segment is gone. Its numbers stay used, because ids that were given out
    /// must not name other mail, and what lies below the cursor would have no events.
    pub(super) fn check_end(&mut self) {
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
    pub(super) fn judge_headers(&mut self, doubtful: &DoubtfulHeaders) {
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

    /// What is damaged in a segment that was given up, or retired, was written over by the begin of its file's next
    /// use, whose header is torn or was not written at all. What counts in each segment is known by now.
    pub(super) fn report_damages(&mut self) {
        for Damage { slot, segment, region, reason } in mem::take(&mut self.damages) {
            let log = &self.log;
            let is_retired = || {
                let segment = log.segments.get(slot);
                segment.live == 0 && segment.last_event <= log.event_cursor && log.checkpoints.known_cover(segment)
            };
            if !self.given_up.contains(&segment) && !is_retired() {
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

    /// Reports what was in segments that are not there, and forgets it.
    pub(super) fn find_lost(&mut self) {
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

    pub(super) fn quarantine_record(&mut self, entry: &Entry, message: MessageId) {
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

    pub(super) fn report(&mut self, quarantine: Quarantine) {
        (self.visit)(Recovered::Quarantined(&quarantine));
    }

    pub(super) fn quarantine_at(
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

    pub(super) fn cut_at(&mut self, slot: u16, number: u64, bytes: &mut SegmentBytes, region: Range<u64>) -> Kept {
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
}

impl Log {
    /// Puts an empty frame in the place of one that was cut, also where its bytes could not be put aside: nobody was
    /// told of them. The next header will tell that the segment ends there, but that header may be torn while its frame
    /// is whole, and then a start would take the unfinished frame for damage before a later one. Who only looks leaves
    /// all as it is, and a disk that refuses is no worse than before.
    pub(super) fn close_cut(&mut self, slot: u16, commit: u64, begin: u64) -> bool {
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
