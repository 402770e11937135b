//! Committing: frames go to the medium one at a time, and what comes of each operation is taken in here.
//!
//! A commit is one write that is durable when it completes. A short one is continued before anything is reported. After
//! a failed one the pages in the cache are clean and may lie, so the log stops: everything above the last durable
//! commit is taken back, and reopening goes on in another segment, whose header says where the one before ends; without
//! one it puts an empty frame in the failed one's place.

use std::sync::Arc;
use std::time::Duration;
use std::{io, mem};

use crate::checkpoint::Summarize;
use crate::directory::Durability;
use crate::format::{Chain, SEGMENT_HEADER_BYTES, Seal, SegmentHeader};
use crate::frame::{Change, Frame};
use crate::index::Place;
use crate::limits::{BUFFER_KEPT_BYTES_MAX, BUFFERS_KEPT_MAX};
use crate::log::{Log, Progress, State};
use crate::message::{Lease, Message};
use crate::read::read_message;
use crate::record::{CommitNumber, MessageId};
use crate::segment::Segment;
use crate::storage::{Completion, Done, Operation, Work};

/// The frame whose write is under way.
#[derive(Debug)]
pub(crate) struct Flight {
    frame: Frame,
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
    /// Of a segment that is given up: its header.
    Cover {
        slot: u16,
    },
    DropCache,
    ReadMessage {
        id: MessageId,
        place: Place,
        generation: u64,
        /// The body that it shares; held meanwhile.
        body: Option<u64>,
        lease: Lease,
    },
    /// A part of the segment that is being emptied.
    CopyWindow {
        place: Place,
        attempt: u64,
    },
    /// Of the message that is being copied forward: its record.
    CopyRecord {
        place: Place,
        generation: u64,
        attempt: u64,
    },
    /// An outcome or state record about it.
    CopyState {
        place: Place,
        generation: u64,
        attempt: u64,
    },
    /// Of a message that is being read: the body that it shares.
    ReadBody {
        place: Place,
        generation: u64,
        message: Message,
    },
    Scrub {
        id: MessageId,
        place: Place,
        generation: u64,
    },
    CreateCheckpoint {
        slot: usize,
        bytes: u64,
    },
    WriteCheckpoint {
        slot: usize,
        offset: u64,
    },
}

impl Log {
    /// What to do next, until there is nothing. Operations may complete in any order. `summaries` is asked while a
    /// checkpoint is written.
    pub fn poll_operation(&mut self, now: Duration, summaries: &mut dyn Summarize) -> Option<Operation> {
        self.poll_awaited(now)
            .or_else(|| self.poll_copy(now))
            .or_else(|| self.poll_checkpoint(now, summaries))
            .or_else(|| self.poll_scrub(now))
    }

    /// The same without upkeep, which takes some time of the caller's. Who hands a commit over to the medium before he
    /// polls for the rest lets both go on at once.
    pub fn poll_awaited(&mut self, now: Duration) -> Option<Operation> {
        self.poll_commit().or_else(|| self.poll_read()).or_else(|| self.poll_retire(now))
    }

    /// Takes in what came of an operation of this log.
    pub fn handle_completion(&mut self, now: Duration, completion: Completion) -> Progress {
        let Completion { token, done } = completion;
        let purpose = self.purposes.remove(&token).expect("a completion of this log, given once");
        match (purpose, done) {
            (Purpose::Commit, Done::Write { buffer, start, result }) => self.handle_commit(buffer, start, result),
            (Purpose::ReadMessage { id, place, generation, body, lease }, Done::Read { buffer, result }) => {
                self.end_read(place.slot);
                let result = read_message(id, place, generation, buffer, result);
                let result = result.map(|message| message.with_lease(Arc::new(lease)));
                self.handle_message_read(id, body, result)
            }
            (Purpose::ReadBody { place, generation, message }, Done::Read { buffer, result }) => {
                self.end_read(place.slot);
                self.handle_body_read(&message, place, generation, buffer, result)
            }
            (Purpose::Scrub { id, place, generation }, Done::Read { buffer, result }) => {
                self.end_read(place.slot);
                self.handle_scrub(id, place, generation, buffer, result)
            }
            (Purpose::CopyWindow { place, attempt }, Done::Read { buffer, result }) => {
                self.end_read(place.slot);
                if let Some(current) = self.take_copy(attempt) {
                    self.handle_copy_window(now, current, place, buffer, result);
                }
                Progress::Nothing
            }
            (Purpose::CopyRecord { place, generation, attempt }, Done::Read { buffer, result }) => {
                self.end_read(place.slot);
                if let Some(current) = self.take_copy(attempt) {
                    self.handle_copy_record(now, current, place, generation, buffer, result);
                }
                Progress::Nothing
            }
            (Purpose::CopyState { place, generation, attempt }, Done::Read { buffer, result }) => {
                self.end_read(place.slot);
                if let Some(current) = self.take_copy(attempt) {
                    self.handle_copy_state(now, current, place, generation, &buffer, result);
                }
                Progress::Nothing
            }
            (Purpose::CreateCheckpoint { slot, bytes }, Done::Create { result }) => {
                self.handle_create_checkpoint(now, slot, bytes, result)
            }
            (Purpose::WriteCheckpoint { slot, offset }, Done::Write { buffer, start, result }) => {
                self.handle_write_checkpoint(now, (slot, offset), buffer, start, result);
                Progress::Nothing
            }
            (Purpose::Zero { slot, bytes }, Done::Zero { result }) => {
                self.handle_zero(slot, bytes, result);
                Progress::Nothing
            }
            (Purpose::Create { slot }, Done::Create { result }) => self.handle_create(now, slot, result),
            (Purpose::Cover { slot }, Done::Write { result, .. }) => {
                self.handle_cover(slot, result);
                Progress::Nothing
            }
            (Purpose::Remove { slot }, Done::Remove { result }) => {
                self.handle_remove(now, slot, result);
                Progress::Nothing
            }
            (Purpose::DropCache, Done::DropCache) => {
                if let State::DroppingCache { chain, .. } = self.state {
                    self.state = State::Voiding { chain };
                }
                Progress::Nothing
            }
            (purpose, done) => panic!("{purpose:?} completed as {done:?}"),
        }
    }

    pub(crate) fn poll_commit(&mut self) -> Option<Operation> {
        match &mut self.state {
            State::Failed { .. } => return None,
            State::DroppingCache { file, .. } => {
                let file = file.take()?;
                return Some(self.operation(Work::DropCache { file }, Purpose::DropCache));
            }
            State::Voiding { chain } => {
                let chain = *chain;
                let is_idle = self.flight.is_none() && self.closed.is_empty() && self.open.is_none();
                if is_idle && !self.begin_voiding(chain) {
                    return None;
                }
            }
            State::Open => {}
        }
        if self.flight.is_none() {
            if self.closed.is_empty() {
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

    /// Voids the frame that failed in this chain: by the header of a new segment, or, where there was none to go to, by
    /// another frame in its place. That one has a higher commit number and is durable before anything is appended.
    fn begin_voiding(&mut self, chain: Chain) -> bool {
        let goes_on = self.tails[chain as usize].is_some();
        if goes_on { self.force_frame(chain) } else { self.force_segment() }
    }

    /// Completes the segment header, which tells what is known only now: where the segments before end.
    fn take_off(&mut self, mut frame: Frame) -> Flight {
        let mut buffer = mem::take(&mut frame.buffer);
        let segment = self.segments.get(frame.slot);
        if frame.begins_segment {
            assert_eq!(segment.end, 0);
            let oldest = self.segments.in_use.front().expect("the frame's segment is in use");
            // Frames are written in the order of their commits, so the segment before has all of its own.
            let previous = self.segments.newest(segment.chain).map(Segment::seal).unwrap_or_default();
            let header = SegmentHeader {
                log: self.directory.id(),
                number: segment.number,
                generation: segment.generation,
                first_sequence: segment.first_sequence,
                first_commit: frame.commit.0,
                tail: self.segments.get(*oldest).number,
                previous,
                capacity: segment.capacity,
                discarded: self.discarded,
                chain: segment.chain,
                other: self.seal_of_left(segment.chain.other()),
            };
            header.encode(&mut buffer[..SEGMENT_HEADER_BYTES]);
            self.note_header(frame.slot, &header);
        }
        Flight { frame, rest: Some((buffer, 0)) }
    }

    /// The end of a chain that nothing more is appended to, for now.
    fn seal_of_left(&self, chain: Chain) -> Seal {
        if self.tails[chain as usize].is_some() {
            return Seal::default();
        }
        let Some(newest) = self.segments.newest(chain) else { return Seal::NOTHING };
        let mut frames = self.closed.iter().chain(&self.open);
        let waits = frames.any(|frame| self.segments.get(frame.slot).number == newest.number);
        if waits { Seal::default() } else { newest.seal() }
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
        self.counters.bytes_frames += written as u64;
        if start + written < buffer.len() {
            flight.rest = Some((buffer, start + written));
            return Progress::Nothing;
        }
        let Flight { mut frame, .. } = self.flight.take().expect("it was just looked at");
        let segment = self.segments.get_mut(frame.slot);
        let bytes = buffer.len() as u64;
        segment.end = frame.offset + bytes;
        segment.charged += bytes;
        segment.last_commit = frame.commit.0;
        segment.last_sequence = segment.last_sequence.max(frame.last_sequence);
        segment.last_event = segment.last_event.max(frame.last_event);
        segment.graves.extend(&mut frame.finals, segment.capacity);
        self.directory.budget().charge(bytes);
        assert!(self.durable < frame.commit);
        self.durable = frame.commit;
        self.pending_bytes -= frame.record_bytes;
        self.counters.commits += 1;
        if frame.begins_segment {
            self.segments.get_mut(frame.slot).heat();
            self.cool_segments();
        }
        self.bodies.forget_dead(self.durable);
        frame.changes.clear();
        self.keep_buffers(buffer, frame.changes);
        if matches!(self.state, State::Voiding { .. }) {
            self.state = State::Open;
            return Progress::Reopened;
        }
        Progress::Durable(self.durable)
    }

    /// Takes everything back that is not durable, latest first, and stops.
    fn fail(&mut self, error: io::Error) -> Progress {
        self.counters.failures += 1;
        let flight = self.flight.take().expect("a commit failed while in flight");
        let segment = self.segments.get(flight.frame.slot);
        self.state = State::Failed { file: Arc::clone(&segment.file), chain: segment.chain };
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
        self.copy_forward.forget();
        self.checkpoints.give_up();
        // Segments that no acknowledged frame is in. The first may have its header on the medium all the same; the next
        // segment's header passes over its number.
        while let Some(slot) = self.segments.in_use.back().copied().filter(|slot| self.segments.get(*slot).end == 0) {
            self.segments.in_use.pop_back();
            self.segments.spares.push_back(slot);
        }
        self.end_tails();
        for slot in self.segments.in_use.clone() {
            self.segments.get_mut(slot).graves.take_back(self.durable);
            self.segments.note_dead(slot);
        }
        Progress::Failed { error }
    }

    /// The log goes on in other segments than the one that failed. Without a spare it goes on where acknowledged frames
    /// end: no header that seals these segments has been written, since each would have begun another one.
    fn end_tails(&mut self) {
        if self.spares_ready() > 0 {
            self.tails = [None; 2];
            return;
        }
        for tail in self.tails.iter_mut().flatten() {
            tail.offset = self.segments.get(tail.slot).end;
            assert!(tail.offset > 0);
        }
    }

    fn take_back(&mut self, change: Change, commit: CommitNumber) {
        match change {
            Change::Inserted { sequence } => {
                if let Some(before) = self.index.remove(sequence) {
                    self.segments.remove_live(before.entry.record(), commit);
                    if let Some(body) = before.body {
                        self.bodies.unreference(&mut self.segments, body, commit);
                    }
                }
            }
            Change::Replaced(before) => {
                let (states, record): (Vec<Place>, Place) = (before.states().collect(), before.entry.record());
                let body = before.body;
                let present = self.index.restore(before);
                for place in states.into_iter().chain([record]) {
                    self.segments.add_live(place, commit);
                }
                match present {
                    Some(present) => {
                        for place in present.states().chain([present.entry.record()]) {
                            self.segments.remove_live(place, commit);
                        }
                    }
                    None => {
                        if let Some(body) = body {
                            self.bodies.reference(&mut self.segments, body, commit);
                        }
                    }
                }
            }
            Change::Body { sequence } => self.bodies.remove(&mut self.segments, sequence, commit),
            Change::BodyMoved { sequence, from } => {
                self.bodies.relocate(&mut self.segments, sequence, from, commit);
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
        for position in 0..self.segments.in_use.len().saturating_sub(hot) {
            let slot = self.segments.in_use[position];
            if !self.tails.iter().flatten().any(|tail| tail.slot == slot) {
                self.segments.get_mut(slot).cool();
            }
        }
    }
}
