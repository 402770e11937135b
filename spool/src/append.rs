//! Appending: records are serialised straight into the frame that gathers, and their checksums made there.
//!
//! A frame knows its place from the start, because checksums are seeded with the segment's generation; one that finds
//! the segment full moves to the next one. At most one frame gathers; closed ones wait in order. Copies go into frames,
//! and segments, of their own, which are filled and closed at once ([`Log::begin_copies`]).

use crate::body::Body;
use crate::checksum::crc32c_append;
use crate::error::{AppendError, Closed};
use crate::format::{
    Chain, FRAME_HEADER_BYTES, LATER_OUTCOME_SCHEMA, MESSAGE_SCHEMA, OUTCOME_SCHEMA, RECORD_HEADER_BYTES, RecordHeader,
    RecordKind, SEGMENT_HEADER_BYTES,
};
use crate::frame::{Base, Change, Frame};
use crate::index::{Before, Entry, Place, Settles};
use crate::limits::{
    BLOCK_BYTES, FRAME_BYTES_TARGET, PENDING_OUTCOME_BYTES_MAX, SPARES_RESERVED, SPARES_RESERVED_FROM_COPIES,
    STATES_MAX,
};
use crate::log::{Log, State};
use crate::record::{BodyId, CommitNumber, CopiedState, Envelope, MessageId, Outcome, Sequence};
use crate::write_record::{Later, WriteArchive, write_record};

/// Where the next frame goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tail {
    pub(crate) slot: u16,
    pub(crate) offset: u64,
}

/// For whose sake room is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RoomFor {
    /// Messages and bodies.
    Mail,
    /// A copy wins room back only when its whole segment is copied, so it leaves the last spare, too.
    Copy,
    /// What empties the spool, and what reopens a log, may take the last spare.
    Outcome,
}

impl Log {
    /// Appends a message; it is durable when [`Log::durable`] reaches the commit. `prefix` and `body` together are what
    /// is sent.
    pub fn append_message(
        &mut self,
        envelope: &Envelope,
        prefix: &[u8],
        body: &[u8],
    ) -> Result<(MessageId, CommitNumber), AppendError> {
        self.append_message_with(envelope, [prefix, body], None)
    }

    /// The same for a message whose body others share: `prefix` and that body together are what is sent.
    pub fn append_message_sharing(
        &mut self,
        envelope: &Envelope,
        prefix: &[u8],
        body: BodyId,
    ) -> Result<(MessageId, CommitNumber), AppendError> {
        let sequence = body.message_id().sequence().0;
        let is_known = body.message_id().log() == self.id() && self.bodies.get(sequence).is_some_and(Body::is_live);
        if !is_known {
            return Err(AppendError::UnknownBody);
        }
        self.append_message_with(envelope, [prefix, &[]], Some(sequence))
    }

    fn append_message_with(
        &mut self,
        envelope: &Envelope,
        content: [&[u8]; 2],
        body: Option<u64>,
    ) -> Result<(MessageId, CommitNumber), AppendError> {
        self.check_room_for_mail(content[0].len() as u64 + content[1].len() as u64)?;
        let shared = body.and_then(|body| self.bodies.get(body));
        let header = RecordHeader {
            kind: RecordKind::Message as u8,
            schema: MESSAGE_SCHEMA,
            message: MessageId::new(self.id(), Sequence(self.next_sequence)).to_raw(),
            shared_body_length: shared.map_or(0, |body| u32::try_from(body.bytes).expect("a body is in one segment")),
            shared_body: body.unwrap_or(0),
            ..RecordHeader::default()
        };
        let written = self.append_record(RoomFor::Mail, Chain::Mail, header, Some(envelope), None, content)?;
        let recipients = u32::try_from(envelope.recipients.len()).unwrap_or(u32::MAX);
        if self.index.insert(written.sequence, written.place, recipients, &[]) {
            self.segments.add_live(written.place, written.commit);
            if let Some(body) = body {
                self.index.set_body(written.sequence, body);
                self.bodies.reference(&mut self.segments, body, written.commit);
            }
            self.note(Change::Inserted { sequence: written.sequence });
        }
        self.counters.messages += 1;
        self.counters.bytes_messages += written.place.length();
        Ok((MessageId::new(self.id(), Sequence(written.sequence)), written.commit))
    }

    pub(crate) fn check_room_for_mail(&mut self, content: u64) -> Result<(), AppendError> {
        self.is_open_for_mail().map_err(|closed| match closed {
            Closed::Failed => AppendError::Failed,
            closed => AppendError::Full(closed),
        })?;
        if !self.directory.budget().has_room_for_mail(self.pending_bytes + content) {
            self.short_of = self.short_of.max(content);
            return Err(AppendError::Full(Closed::MaxSize));
        }
        // Alone, any message is taken.
        if self.pending_bytes > 0 && self.pending_bytes + content > self.directory.options().pending_bytes {
            return Err(AppendError::Full(Closed::Backlog));
        }
        Ok(())
    }

    /// Appends what became of some recipients. The message is gone, as soon as this is durable, when it has no
    /// recipient left without a final fate.
    pub fn append_outcome(&mut self, outcome: &Outcome) -> Result<(Sequence, CommitNumber), AppendError> {
        if !matches!(self.state, State::Open) {
            return Err(AppendError::Failed);
        }
        if self.pending_bytes > PENDING_OUTCOME_BYTES_MAX {
            return Err(AppendError::Full(Closed::Backlog));
        }
        let id = MessageId::from_raw(outcome.message);
        assert_eq!(id.log(), self.id(), "an outcome goes into the log that holds its message");
        let header = RecordHeader {
            kind: RecordKind::Outcome as u8,
            schema: OUTCOME_SCHEMA,
            message: outcome.message,
            ..RecordHeader::default()
        };
        let written = self.append_record(RoomFor::Outcome, Chain::Mail, header, Some(outcome), None, [&[], &[]])?;
        let results = outcome.results.iter().map(|result| (result.index, Settles::from(result.fate.is_final())));
        if let Some((before, is_gone)) = self.index.settle(id.sequence().0, written.place, results) {
            // Looking for a message among a million takes longer than all else that an outcome does to the index.
            let present = if is_gone { None } else { self.index.get(id.sequence().0).copied() };
            self.recount_to(&before, present, written.commit);
            if let Some(body) = before.body.filter(|_| is_gone) {
                self.bodies.unreference(&mut self.segments, body, written.commit);
            }
            self.note(Change::Replaced(before));
            self.note_finals(written.place.slot, outcome);
            if present.is_some_and(|entry| self.index.states_len(&entry) > STATES_MAX) {
                self.copy_forward.restate_soon(id.sequence().0);
            }
        }
        self.counters.outcomes += 1;
        self.counters.bytes_outcomes += written.place.length();
        Ok((Sequence(written.sequence), written.commit))
    }

    /// The records that tell about a message have changed: what counts in the segments follows. Who names a shared body
    /// is counted apart.
    pub(crate) fn recount(&mut self, before: &Before, commit: CommitNumber) {
        let present = self.index.get(before.entry.sequence()).copied();
        self.recount_to(before, present, commit);
    }

    /// The same where the message's entry is known, if it is still live.
    fn recount_to(&mut self, before: &Before, present: Option<Entry>, commit: CommitNumber) {
        if let Some(entry) = &present {
            for state in self.index.states(entry) {
                self.segments.add_live(state, commit);
            }
        }
        let (from, to) = (before.entry.record(), present.map(|entry| entry.record()));
        if to != Some(from) {
            if let Some(to) = to {
                self.segments.add_live(to, commit);
            }
            self.segments.remove_live(from, commit);
        }
        for state in before.states() {
            self.segments.remove_live(state, commit);
        }
    }

    pub(crate) fn append_record(
        &mut self,
        room_for: RoomFor,
        chain: Chain,
        header: RecordHeader,
        archive: Option<&dyn WriteArchive>,
        state: Option<&CopiedState>,
        content: [&[u8]; 2],
    ) -> Result<Written, AppendError> {
        let bytes_max = self.record_bytes_max();
        let bytes = (RECORD_HEADER_BYTES + content[0].len() + content[1].len()) as u64;
        if bytes > bytes_max {
            return Err(AppendError::TooLarge { bytes, bytes_max });
        }
        loop {
            self.ensure_open_frame(room_for, chain)?;
            let frame = self.open.as_mut().expect("a frame was just made sure of");
            let segment = self.segments.get(frame.slot);
            assert_eq!(segment.chain, chain);
            let start = frame.buffer.len();
            let mut header = RecordHeader { sequence: self.next_sequence, ..header };
            let settled = archive.and_then(WriteArchive::as_settled);
            let base = settled.and_then(|_| frame.take_base());
            let later = settled.zip(base.as_ref()).map(|(outcome, (_, base))| Later { outcome, base });
            if let Some((sequence, _)) = &base {
                header.schema = LATER_OUTCOME_SCHEMA;
                header.base = *sequence;
            }
            let archive_here = later.as_ref().map(|later| later as &dyn WriteArchive).or(archive);
            write_record(&mut frame.buffer, &mut header, archive_here, state, content);
            frame.base = match base {
                Some((sequence, outcome)) => Some(Base::Read { sequence, outcome }),
                None if settled.is_some() => Some(Base::Written { sequence: header.sequence, start }),
                None => frame.base.take(),
            };
            if frame.offset + frame.padded() <= segment.capacity {
                let record = &mut frame.buffer[start..];
                header.seal(segment.generation, record);
                frame.records_crc = crc32c_append(frame.records_crc, &record[..RECORD_HEADER_BYTES]);
                if frame.record_count == 0 {
                    frame.first_sequence = header.sequence;
                    if !frame.is_forced {
                        frame.commit = CommitNumber(self.next_commit);
                        self.next_commit += 1;
                    }
                }
                frame.record_count += 1;
                frame.last_sequence = header.sequence;
                if header.is_event() {
                    frame.last_event = header.sequence;
                }
                let place = Place::new(frame.slot, frame.offset + start as u64, record.len());
                frame.record_bytes += record.len() as u64;
                self.pending_bytes += record.len() as u64;
                let commit = frame.commit;
                let full = frame.buffer.len() >= FRAME_BYTES_TARGET;
                self.next_sequence += 1;
                if full {
                    self.close_frame();
                }
                return Ok(Written { sequence: header.sequence, commit, place });
            }
            let bytes = (frame.buffer.len() - start) as u64;
            frame.buffer.truncate(start);
            if frame.begins_segment && frame.record_count == 0 {
                return Err(AppendError::TooLarge { bytes, bytes_max });
            }
            self.leave_segment(room_for, chain)?;
        }
    }

    /// Notes how a change of the index is taken back, with the record that was appended last.
    pub(crate) fn note(&mut self, change: Change) {
        self.last_frame().changes.push(change);
    }

    /// The frame of the record that was appended last.
    pub(crate) fn last_frame(&mut self) -> &mut Frame {
        match &mut self.open {
            Some(frame) if frame.record_count > 0 => frame,
            // The record filled its frame.
            _ => self.closed.back_mut().expect("the frame of the last record"),
        }
    }

    /// Segments that could be begun at once.
    pub(crate) fn spares_ready(&self) -> usize {
        self.segments.spares.len()
    }

    /// Closes the frame that gathers, if it is wanted, and lets the next one go behind it.
    pub(crate) fn close_frame(&mut self) {
        let Some(mut frame) = self.open.take_if(|frame| frame.is_wanted()) else {
            return;
        };
        let segment = self.segments.get(frame.slot);
        frame.close(self.directory.id(), segment.number, segment.generation);
        self.tails[segment.chain as usize] =
            Some(Tail { slot: frame.slot, offset: frame.offset + frame.buffer.len() as u64 });
        self.closed.push_back(frame);
    }

    /// Lets the frame that gathers mail wait, and a frame for copies gather until [`Log::end_copies`]. Nothing else may
    /// be appended in between.
    pub(crate) fn begin_copies(&mut self) -> Option<Frame> {
        self.close_frame();
        self.open.take()
    }

    pub(crate) fn end_copies(&mut self, waiting: Option<Frame>) {
        self.close_frame();
        // Without a copy its frame is of no use; its segment keeps its place.
        if let Some(frame) = self.open.take() {
            self.drop_frame(frame);
        }
        self.open = waiting;
    }

    /// Begins a new segment for mail with a frame that is written even if nothing is appended to it. False without a
    /// spare.
    pub(crate) fn force_segment(&mut self) -> bool {
        if let Some(tail) = self.tails[Chain::Mail as usize].take() {
            self.segments.note_dead(tail.slot);
        }
        self.force_frame(Chain::Mail)
    }

    /// The same without a new segment, where there is room in the present one.
    pub(crate) fn force_frame(&mut self, chain: Chain) -> bool {
        assert!(self.open.is_none());
        if self.ensure_open_frame(RoomFor::Outcome, chain).is_err() {
            return false;
        }
        let frame = self.open.as_mut().expect("a frame was just made sure of");
        frame.is_forced = true;
        frame.commit = CommitNumber(self.next_commit);
        frame.first_sequence = self.next_sequence;
        self.next_commit += 1;
        true
    }

    /// The record does not fit into the rest of the segment: the next frame goes to another one.
    fn leave_segment(&mut self, room_for: RoomFor, chain: Chain) -> Result<(), AppendError> {
        // Checked first, so that what is left of the segment stays usable for smaller records.
        if !self.may_take_spare(room_for) {
            return Err(AppendError::Full(self.without_spare()));
        }
        self.close_frame();
        if let Some(frame) = self.open.take() {
            self.drop_frame(frame);
        }
        if let Some(tail) = self.tails[chain as usize].take() {
            self.segments.note_dead(tail.slot);
        }
        Ok(())
    }

    /// Gives up a frame without a record: nothing was numbered for it.
    fn drop_frame(&mut self, frame: Frame) {
        assert!(!frame.is_wanted());
        self.keep_buffers(frame.buffer, frame.changes);
    }

    fn may_take_spare(&self, room_for: RoomFor) -> bool {
        match room_for {
            RoomFor::Mail => self.spares_ready() > SPARES_RESERVED,
            RoomFor::Copy => self.spares_ready() > SPARES_RESERVED_FROM_COPIES,
            RoomFor::Outcome => self.spares_ready() > 0,
        }
    }

    fn ensure_open_frame(&mut self, room_for: RoomFor, chain: Chain) -> Result<(), AppendError> {
        if self.open.is_some() {
            return Ok(());
        }
        let tail = match self.tails[chain as usize] {
            Some(tail) if tail.offset + BLOCK_BYTES <= self.segments.get(tail.slot).capacity => tail,
            _ if !self.may_take_spare(room_for) => return Err(AppendError::Full(self.without_spare())),
            full => {
                if let Some(tail) = full {
                    self.segments.note_dead(tail.slot);
                }
                let slot = self.segments.spares.pop_front().expect("a spare, as was just checked");
                let generation = self.draw_generation();
                self.segments.get_mut(slot).begin(chain, self.next_number, generation, self.next_sequence);
                self.next_number += 1;
                self.segments.in_use.push_back(slot);
                Tail { slot, offset: 0 }
            }
        };
        self.tails[chain as usize] = Some(tail);
        let mut buffer = self.buffers.pop().unwrap_or_default();
        let begins_segment = tail.offset == 0;
        let base = if begins_segment { SEGMENT_HEADER_BYTES } else { 0 };
        buffer.resize(base + FRAME_HEADER_BYTES, 0);
        self.open = Some(Frame {
            commit: CommitNumber(0),
            slot: tail.slot,
            offset: tail.offset,
            buffer,
            begins_segment,
            is_forced: false,
            record_count: 0,
            first_sequence: 0,
            last_sequence: 0,
            last_event: 0,
            records_crc: 0,
            record_bytes: 0,
            changes: self.change_lists.pop().unwrap_or_default(),
            finals: Vec::new(),
            base: None,
        });
        Ok(())
    }
}

impl From<bool> for Settles {
    fn from(is_final: bool) -> Self {
        if is_final { Self::Finally } else { Self::ForNow }
    }
}

/// Where a record went.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Written {
    pub(crate) sequence: u64,
    pub(crate) commit: CommitNumber,
    pub(crate) place: Place,
}

/// Whether it tells of final fates only.
pub(crate) fn is_settled(outcome: &Outcome) -> bool {
    outcome.results.iter().all(|result| result.fate.is_final())
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::RoomFor;
    use crate::error::{AppendError, Closed};
    use crate::format::{Chain, RecordHeader, RecordKind};
    use crate::limits::{SPARES_RESERVED, SPARES_RESERVED_FROM_COPIES, SPARES_WANTED};
    use crate::sim::SimDisk;
    use crate::{Log, RecoverOptions, Spool, SpoolOptions};

    /// Mail leaves spares for copies and outcomes, copies leave one for outcomes; in either chain. What does not fit
    /// any more leaves the rest of the segment to what is smaller.
    #[test]
    fn each_leaves_what_others_need() {
        let cases =
            [(RoomFor::Mail, SPARES_RESERVED), (RoomFor::Copy, SPARES_RESERVED_FROM_COPIES), (RoomFor::Outcome, 0)];
        for ((room_for, left), chain) in cases.into_iter().flat_map(|case| Chain::ALL.map(|chain| (case, chain))) {
            let options = SpoolOptions { segment_bytes: 32 << 10, ..SpoolOptions::default() };
            let mut spool = Spool::open_on(Arc::new(SimDisk::new(1)), Path::new("/spool"), options).expect("a disk");
            let directory = spool.assign(1).expect("a log").remove(0).remove(0);
            let mut log = Log::recover(directory, RecoverOptions::default(), &mut |_| {}).expect("a log");
            let header = RecordHeader { kind: RecordKind::Message as u8, ..RecordHeader::default() };
            let mut append =
                |bytes: usize| log.append_record(room_for, chain, header, None, None, [&[], &vec![0; bytes]]);
            for _ in left..SPARES_WANTED {
                append(20_000).expect("a segment for it");
            }
            let refusal = append(20_000).expect_err("too few spares");
            assert_eq!(refusal, AppendError::Full(Closed::Preparing), "{room_for:?}");
            append(100).expect("room behind the others");
            log.audit();
            assert_eq!(log.spares_ready(), left, "{room_for:?}");
        }
    }
}
