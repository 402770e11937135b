//! What each record changes: whole frames are applied to the index, the segments' counts and the shared bodies.
//!
//! A record that makes no sense is damage, whole as it is. Those that the checkpoint covers are only told.

use rkyv::rancor::Failure;

use super::recovered::{Reason, RecordRef, Recovered};
use super::{Damage, Recovery};
use crate::append::is_settled;
use crate::format::{LATER_OUTCOME_SCHEMA, RecordHeader, RecordKind};
use crate::index::{HELD, Place, Settles, TOUCHED};
use crate::log::Log;
use crate::packed;
use crate::record::{ArchivedEnvelope, CommitNumber, Fate, MessageId, Outcome, Sequence};
use crate::replay::{Frame, SegmentBytes};

impl Recovery<'_> {
    pub(super) fn apply_frame(&mut self, bytes: &mut SegmentBytes, frame: &Frame) {
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

    /// The body may be gone, where nobody needs the message any more and only its event is still to be told.
    fn shared_body_bytes(&self, header: &RecordHeader) -> u64 {
        if header.shared_body == 0 || header.shared_body_length > 0 {
            return header.shared_body_length.into();
        }
        self.log.bodies.get(header.shared_body).map_or(0, |body| body.bytes)
    }

    /// Counts who names each shared body; those that nobody names are dead.
    pub(super) fn count_bodies(&mut self) {
        let Log { index, bodies, segments, .. } = &mut *self.log;
        for body in index.shared_bodies() {
            bodies.reference(segments, body, CommitNumber(0));
        }
        bodies.release_all(segments);
    }
}

const MESSAGE: u8 = RecordKind::Message as u8;
const OUTCOME: u8 = RecordKind::Outcome as u8;
pub(super) const COPY: u8 = RecordKind::Copy as u8;
const STATE: u8 = RecordKind::State as u8;
const BODY: u8 = RecordKind::Body as u8;
const TOMBSTONES: u8 = RecordKind::Tombstones as u8;
