//! Committing: frames go to the medium one at a time, and what comes of each operation is taken in here.
//!
//! A commit is one write that is durable when it completes. A short one is continued before anything is reported. After
//! a failed one the pages in the cache are clean and may lie, so the log stops: everything above the last durable
//! commit is taken back, and reopening goes on in another segment, whose header says where the one before ends.

use std::sync::Arc;
use std::time::Duration;
use std::{io, mem};

use crate::append::{Change, Frame};
use crate::directory::Durability;
use crate::error::ReadError;
use crate::format::{RECORD_HEADER_BYTES, RecordHeader, SEGMENT_HEADER_BYTES, SegmentHeader};
use crate::index::Place;
use crate::limits::{BUFFER_KEPT_BYTES_MAX, BUFFERS_KEPT_MAX};
use crate::log::{Log, Progress, State, check_header};
use crate::message::{Memory, Message};
use crate::record::{CommitNumber, MessageId};
use crate::storage::{Completion, Done, Operation, ReadBuffer, Work};

/// The frame whose write is under way.
#[derive(Debug)]
pub(crate) struct Flight {
    frame: Frame,
    /// Of the segment header in it, if it begins one.
    tail: u64,
    /// What a short write left over, to be written next.
    rest: Option<(Vec<u8>, usize)>,
}

impl Flight {
    pub(crate) fn frame(&self) -> &Frame {
        &self.frame
    }
}

/// What an operation was for.
#[derive(Debug)]
pub(crate) enum Purpose {
    Commit,
    Zero {
        slot: u16,
        bytes: u64,
    },
    Create {
        slot: u16,
    },
    Remove {
        slot: u16,
    },
    DropCache,
    ReadMessage {
        id: MessageId,
        place: Place,
        generation: u64,
    },
    /// Of the message that is being copied forward: its record.
    CopyRecord {
        place: Place,
        generation: u64,
        attempt: u64,
    },
    /// An outcome record about it.
    CopyOutcome {
        place: Place,
        generation: u64,
        attempt: u64,
    },
}

impl Log {
    /// What to do next, until there is nothing. Operations may complete in any order.
    pub fn poll_operation(&mut self, now: Duration) -> Option<Operation> {
        self.poll_commit(now).or_else(|| self.poll_retire(now))
    }

    /// Takes in what came of an operation of this log.
    pub fn handle_completion(&mut self, now: Duration, completion: Completion) -> Progress {
        let Completion { token, done } = completion;
        let purpose = self.purposes.remove(&token).expect("a completion of this log, given once");
        match (purpose, done) {
            (Purpose::Commit, Done::Write { buffer, start, result }) => self.handle_commit(buffer, start, result),
            (Purpose::ReadMessage { id, place, generation }, Done::Read { buffer, result }) => {
                self.reads -= 1;
                self.segments.get_mut(place.slot).reads -= 1;
                Progress::Read { id, result: read_message(id, place, generation, buffer, result) }
            }
            (Purpose::CopyRecord { place, generation, attempt }, Done::Read { buffer, result }) => {
                self.segments.get_mut(place.slot).reads -= 1;
                if let Some(current) = self.take_copy(attempt) {
                    self.handle_copy_record(now, current, place, generation, buffer, result);
                }
                Progress::Nothing
            }
            (Purpose::CopyOutcome { place, generation, attempt }, Done::Read { buffer, result }) => {
                self.segments.get_mut(place.slot).reads -= 1;
                if let Some(current) = self.take_copy(attempt) {
                    self.handle_copy_outcome(now, current, generation, &buffer, result);
                }
                Progress::Nothing
            }
            (Purpose::Zero { slot, bytes }, Done::Zero { result }) => {
                self.handle_zero(slot, bytes, result);
                Progress::Nothing
            }
            (Purpose::Create { slot }, Done::Create { result }) => {
                self.handle_create(now, slot, result);
                Progress::Nothing
            }
            (Purpose::Remove { slot }, Done::Remove { result }) => {
                self.handle_remove(slot, result);
                Progress::Nothing
            }
            (Purpose::DropCache, Done::DropCache) => {
                self.state = State::Voiding;
                Progress::Nothing
            }
            (purpose, done) => panic!("{purpose:?} completed as {done:?}"),
        }
    }

    fn poll_commit(&mut self, now: Duration) -> Option<Operation> {
        match &mut self.state {
            State::Failed { .. } => return None,
            State::DroppingCache { file } => {
                let file = file.take()?;
                return Some(self.operation(Work::DropCache { file }, Purpose::DropCache));
            }
            State::Voiding => {
                if self.flight.is_none() && self.closed.is_empty() && self.open.is_none() && !self.force_segment() {
                    return None;
                }
            }
            State::Open => {}
        }
        if self.flight.is_none() {
            if self.closed.is_empty() && self.patience().is_none_or(|until| until <= now) {
                self.close_frame();
            }
            // A step of zeroing may still be under way in a spare that was needed early; it must not come after the
            // frame.
            let slot = self.closed.front()?.slot;
            if self.preallocation.zeroing == Some(slot) {
                return None;
            }
            let frame = self.closed.pop_front().expect("the frame that was just looked at");
            self.flight = Some(self.take_off(frame));
        }
        let flight = self.flight.as_mut().expect("a frame was just put there");
        let (buffer, start) = flight.rest.take()?;
        let (slot, offset) = (flight.frame.slot, flight.frame.offset + start as u64);
        let file = Arc::clone(&self.segments.get(slot).file);
        let sync = self.directory.options().durability == Durability::Fsync;
        Some(self.operation(Work::Write { file, offset, buffer, start, sync }, Purpose::Commit))
    }

    /// Completes the segment header, which tells what is known only now: where the segment before ends.
    fn take_off(&mut self, mut frame: Frame) -> Flight {
        let mut buffer = mem::take(&mut frame.buffer);
        let segment = self.segments.get(frame.slot);
        let oldest = self.segments.in_use.front().expect("the frame's segment is in use");
        let tail = self.segments.get(*oldest).number;
        if frame.begins_segment {
            assert_eq!(segment.end, 0);
            let position = self.segments.in_use.iter().position(|slot| *slot == frame.slot);
            let before =
                position.and_then(|position| position.checked_sub(1)).map(|before| self.segments.in_use[before]);
            let before = before.map(|slot| self.segments.get(slot));
            let header = SegmentHeader {
                log: self.directory.id(),
                number: segment.number,
                generation: segment.generation,
                first_sequence: segment.first_sequence,
                first_commit: frame.commit.0,
                tail,
                previous_number: before.map_or(0, |before| before.number),
                previous_generation: before.map_or(0, |before| before.generation),
                previous_end: before.map_or(0, |before| before.end),
                previous_commit: before.map_or(0, |before| before.last_commit),
                capacity: segment.capacity,
            };
            header.encode(&mut buffer[..SEGMENT_HEADER_BYTES]);
        }
        Flight { frame, tail, rest: Some((buffer, 0)) }
    }

    fn handle_commit(&mut self, buffer: Vec<u8>, start: usize, result: io::Result<usize>) -> Progress {
        let flight = self.flight.as_mut().expect("a commit completes while it is in flight");
        let written = match result {
            Ok(0) => return self.fail(io::ErrorKind::WriteZero.into()),
            Ok(written) => written,
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => 0,
            Err(error) => return self.fail(error),
        };
        assert!(start + written <= buffer.len());
        self.counters.bytes_written += written as u64;
        if start + written < buffer.len() {
            flight.rest = Some((buffer, start + written));
            return Progress::Nothing;
        }
        let Flight { mut frame, tail, .. } = self.flight.take().expect("it was just looked at");
        let segment = self.segments.get_mut(frame.slot);
        let bytes = buffer.len() as u64;
        segment.end = frame.offset + bytes;
        segment.charged += bytes;
        segment.last_commit = frame.commit.0;
        segment.last_sequence = segment.last_sequence.max(frame.last_sequence);
        segment.last_event = segment.last_event.max(frame.last_event);
        self.directory.budget().charge(bytes);
        assert!(self.durable < frame.commit);
        self.durable = frame.commit;
        self.pending_bytes -= frame.record_bytes;
        self.counters.commits += 1;
        if frame.begins_segment {
            self.durable_tail = self.durable_tail.max(tail);
            self.segments.get_mut(frame.slot).heat();
            self.cool_segments();
        }
        frame.changes.clear();
        self.keep_buffers(buffer, frame.changes);
        if matches!(self.state, State::Voiding) {
            self.state = State::Open;
            return Progress::Reopened;
        }
        Progress::Durable(self.durable)
    }

    /// Takes everything back that is not durable, latest first, and stops.
    fn fail(&mut self, error: io::Error) -> Progress {
        self.counters.failures += 1;
        let flight = self.flight.take().expect("a commit failed while in flight");
        let file = Arc::clone(&self.segments.get(flight.frame.slot).file);
        self.state = State::Failed { file };
        let mut frames: Vec<Frame> = vec![flight.frame];
        frames.extend(self.closed.drain(..));
        frames.extend(self.open.take());
        for mut frame in frames.into_iter().rev() {
            for change in frame.changes.drain(..).rev() {
                self.take_back(change, frame.commit);
            }
            self.keep_buffers(frame.buffer, frame.changes);
        }
        self.pending_bytes = 0;
        self.tail = None;
        self.copy_forward.forget();
        // Segments that no acknowledged frame is in. The first may have its header on the medium all the same; the next
        // segment's header passes over its number.
        while let Some(slot) = self.segments.in_use.back().copied().filter(|slot| self.segments.get(*slot).end == 0) {
            self.segments.in_use.pop_back();
            self.segments.spares.push_back(slot);
        }
        Progress::Failed { error }
    }

    fn take_back(&mut self, change: Change, commit: CommitNumber) {
        match change {
            Change::Inserted { sequence } => {
                if let Some(entry) = self.index.remove(sequence) {
                    let place = entry.record();
                    self.segments.get_mut(place.slot).remove_live(place.length(), commit);
                }
            }
            Change::Replaced(before) => {
                let place = before.entry.record();
                if let Some(present) = self.index.restore(before) {
                    self.segments.get_mut(present.slot).remove_live(present.length(), commit);
                }
                self.segments.get_mut(place.slot).add_live(place.length(), commit);
            }
        }
    }

    pub(crate) fn keep_buffers(&mut self, mut buffer: Vec<u8>, changes: Vec<Change>) {
        if self.buffers.len() < BUFFERS_KEPT_MAX && buffer.capacity() <= BUFFER_KEPT_BYTES_MAX {
            buffer.clear();
            self.buffers.push(buffer);
        }
        if self.change_lists.len() < BUFFERS_KEPT_MAX {
            self.change_lists.push(changes);
        }
    }

    /// Only the newest segments, up to the configured bytes, are served from the map.
    fn cool_segments(&mut self) {
        let options = self.directory.options();
        let hot = (options.hot_bytes / options.segment_bytes).max(1) as usize;
        if let Some(newest_cold) = self.segments.in_use.len().checked_sub(hot + 1) {
            let slot = self.segments.in_use[newest_cold];
            self.segments.get_mut(slot).cool();
        }
    }
}

/// Checks what was read for a message, every byte of it.
pub(crate) fn read_message(
    id: MessageId,
    place: Place,
    generation: u64,
    buffer: ReadBuffer,
    result: io::Result<()>,
) -> Result<Message, ReadError> {
    result.map_err(|error| ReadError::from(&error))?;
    let header = RecordHeader::decode(&buffer[..RECORD_HEADER_BYTES]);
    check_header(&header, id, place)?;
    let message = Message::new(Memory::Owned(Arc::new(buffer)), 0, generation, header);
    message.envelope()?;
    if !message.content_matches() {
        return Err(ReadError::Damaged { what: "the content's checksum differs" });
    }
    Ok(message)
}
