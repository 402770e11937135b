//! Winning back space: retiring dead segments, copying live messages out of mostly dead ones, and preallocation.
//!
//! Segments are retired strictly in order, the oldest first, when nothing in them is live, pinned, borrowed or being
//! read, every change that made it so is durable, and the event cursor has passed them. So a record that later ones
//! depend on (an outcome that finished a message in an older segment) never goes before what depends on it. Fuzzy
//! checkpoints will relax the order; see `FORMAT.md`.
//!
//! The newest segment with acknowledged frames is never retired: it carries the log's numbers.
//!
//! Over 500 lines: retiring, copying forward and preallocating take turns on one budget.

use std::sync::Arc;
use std::time::Duration;
use std::{io, mem};

use crate::append::{Change, RoomFor, Verbatim};
use crate::commit::{Purpose, read_message};
use crate::directory::Durability;
use crate::error::Closed;
use crate::format::{COPY_SCHEMA, RECORD_HEADER_BYTES, RecordHeader, RecordKind, SEGMENT_HEADER_BYTES};
use crate::index::{Entry, Place};
use crate::limits::{
    BLOCK_BYTES, COPY_FORWARD_BYTES_PER_S, COPY_FORWARD_GATHER_BYTES, COPY_FORWARD_GATHER_MS,
    COPY_FORWARD_LIVE_PERCENT_MAX, COPY_FORWARD_PAUSE_MS, COPY_FORWARD_PRESSED_PERCENT_MAX, COPY_FORWARD_RETRY_MS,
    COPY_FORWARD_SEGMENTS_MIN, PREALLOCATION_RETRY_MS, SEGMENTS_MAX, SPARES_KEPT_MAX, SPARES_RESERVED, SPARES_WANTED,
    ZERO_STEP_BYTES, ZERO_STEP_INTERVAL_MS,
};
use crate::log::{Log, State};
use crate::message::Message;
use crate::record::{ArchivedCopiedState, ArchivedOutcome, CopiedState, MessageId, RecipientResult, Sequence};
use crate::segment::Segment;
use crate::storage::{Operation, ReadBuffer, StorageFile, Work};

/// Making new segments and filling them with zeros.
#[derive(Debug, Default)]
pub(crate) struct Preallocation {
    /// The spare that a step of zeroing is under way in.
    pub(crate) zeroing: Option<u16>,
    creating: bool,
    removing: bool,
    /// No step is begun before.
    next_step: Duration,
    /// After a failure, no file is created before.
    retry_at: Option<Duration>,
    zeros: Option<Arc<[u8]>>,
}

/// Copying the live messages of the oldest segment into the newest.
#[derive(Debug, Default)]
pub(crate) struct CopyForward {
    /// The segment's number, and those of its messages that are still to be copied, by sequence, last first.
    segment: u64,
    left: Vec<u64>,
    current: Option<Current>,
    attempts: u64,
    /// Nothing is read before: the rate is bounded.
    next_read: Duration,
    /// Copies wait this long for company, since each commit is padded to a block.
    pub(crate) gathers_until: Option<Duration>,
    /// After a message could not be read or written, or none was left to copy, nothing is begun before.
    retry_at: Option<Duration>,
}

/// One message on its way: its record is read, then the outcomes about it from the newest to the oldest.
#[derive(Debug)]
pub(crate) struct Current {
    /// What is read for an earlier attempt, which ended when the log failed, is not taken for this one's.
    attempt: u64,
    /// As it was at the begin; the message is given up for now when it has changed meanwhile.
    entry: Entry,
    message: Option<Message>,
    /// From outcomes, the newest first.
    deferred: Vec<RecipientResult>,
    /// From the state that came with the record, where that is a copy itself: older than all outcomes.
    copied: Vec<RecipientResult>,
    next_outcome: Option<Place>,
    reading: bool,
}

impl CopyForward {
    pub(crate) fn forget(&mut self) {
        self.left.clear();
        self.segment = 0;
        self.current = None;
        self.gathers_until = None;
    }
}

impl Log {
    pub(crate) fn poll_retire(&mut self, now: Duration) -> Option<Operation> {
        while self.retire_oldest() {}
        self.poll_remove()
            .or_else(|| self.poll_create(now))
            .or_else(|| self.poll_zero(now))
            .or_else(|| self.poll_copy(now))
    }

    fn retire_oldest(&mut self) -> bool {
        let Some(slot) = self.segments.in_use.front().copied() else {
            return false;
        };
        // The one behind must hold acknowledged frames, since it takes over as the newest.
        let has_successor = self.segments.in_use.get(1).is_some_and(|next| self.segments.get(*next).end > 0);
        let segment = self.segments.get(slot);
        let dead = has_successor
            && segment.live == 0
            && segment.pins == 0
            && segment.reads == 0
            && segment.changed_in <= self.durable
            && segment.last_event <= self.event_cursor;
        if !dead || self.segments.get_mut(slot).is_borrowed() {
            return false;
        }
        let segment = self.segments.get_mut(slot);
        self.directory.budget().refund(segment.charged);
        segment.charged = 0;
        segment.copies = Vec::new();
        self.segments.in_use.pop_front();
        self.segments.spares.push_back(slot);
        self.counters.segments_retired += 1;
        true
    }

    /// Gives a file back when there are too many. Only one that no recovery could take for live, should the others
    /// survive it: its number is below a durable header's tail.
    fn poll_remove(&mut self) -> Option<Operation> {
        if self.preallocation.removing || self.segments.spares.len() <= SPARES_KEPT_MAX {
            return None;
        }
        let position = self.segments.spares.iter().position(|slot| {
            self.segments.get(*slot).number < self.durable_tail && self.preallocation.zeroing != Some(*slot)
        })?;
        let slot = self.segments.spares.remove(position).expect("a position that was just found");
        self.preallocation.removing = true;
        let (storage, path) = (self.directory.storage(), self.segment_path(slot));
        Some(self.operation(Work::Remove { storage, path }, Purpose::Remove { slot }))
    }

    pub(crate) fn handle_remove(&mut self, slot: u16, result: io::Result<()>) {
        self.preallocation.removing = false;
        match result {
            Ok(()) => {
                self.segments.take(slot);
            }
            Err(_) => self.segments.spares.push_back(slot),
        }
    }

    fn wants_segment(&self) -> bool {
        !self.preallocation.creating && self.segments.spares.len() < SPARES_WANTED
    }

    fn poll_create(&mut self, now: Duration) -> Option<Operation> {
        if !self.wants_segment() || self.preallocation.retry_at.is_some_and(|at| now < at) {
            return None;
        }
        let slot = self.segments.vacant(SEGMENTS_MAX)?;
        self.preallocation.creating = true;
        let (storage, path) = (self.directory.storage(), self.segment_path(slot));
        let bytes = self.directory.options().segment_bytes;
        Some(self.operation(Work::Create { storage, path, bytes }, Purpose::Create { slot }))
    }

    pub(crate) fn handle_create(&mut self, now: Duration, slot: u16, result: io::Result<Arc<dyn StorageFile>>) {
        self.preallocation.creating = false;
        match result {
            Ok(file) => {
                self.preallocation.retry_at = None;
                self.segments.put(slot, Segment::new(file, self.directory.options().segment_bytes));
                self.segments.spares.push_back(slot);
            }
            Err(_) => self.preallocation.retry_at = Some(now + Duration::from_millis(PREALLOCATION_RETRY_MS)),
        }
    }

    /// The spare whose zeroing is unfinished. One that was used before has written blocks.
    fn unzeroed(&self) -> Option<u16> {
        let unzeroed = |slot: &u16| {
            let segment = self.segments.get(*slot);
            segment.number == 0 && segment.zeroed < segment.capacity
        };
        self.segments.spares.iter().copied().find(unzeroed).filter(|_| self.preallocation.zeroing.is_none())
    }

    fn poll_zero(&mut self, now: Duration) -> Option<Operation> {
        let slot = self.unzeroed()?;
        if now < self.preallocation.next_step {
            return None;
        }
        self.preallocation.next_step = now + Duration::from_millis(ZERO_STEP_INTERVAL_MS);
        self.preallocation.zeroing = Some(slot);
        let segment = self.segments.get(slot);
        let (file, offset) = (Arc::clone(&segment.file), segment.zeroed);
        let bytes = (segment.capacity - offset).min(ZERO_STEP_BYTES);
        let zeros = self.preallocation.zeros.get_or_insert_with(|| vec![0; ZERO_STEP_BYTES as usize].into());
        let work = Work::Zero {
            file,
            offset,
            zeros: Arc::clone(zeros),
            bytes: bytes as usize,
            sync: self.directory.options().durability == Durability::Fsync,
        };
        Some(self.operation(work, Purpose::Zero { slot, bytes }))
    }

    pub(crate) fn handle_zero(&mut self, slot: u16, bytes: u64, result: io::Result<usize>) {
        self.preallocation.zeroing = None;
        let segment = self.segments.get_mut(slot);
        if segment.number != 0 {
            return; // It was needed before it was finished.
        }
        match result {
            Ok(written) => segment.zeroed += (written as u64).min(bytes),
            // It serves unzeroed, if it serves; a commit to it will tell.
            Err(_) => segment.zeroed = segment.capacity,
        }
        if self.unzeroed().is_none() {
            self.preallocation.zeros = None;
        }
    }

    pub(crate) fn preallocation_timeout(&self) -> Option<Duration> {
        let create = self.preallocation.retry_at.filter(|_| self.wants_segment());
        let zero = self.unzeroed().map(|_| self.preallocation.next_step);
        create.into_iter().chain(zero).min()
    }

    /// Whether mail is refused for want of space, so that copying is worth nearly anything.
    fn is_pressed(&self) -> bool {
        let is_short =
            || self.short_of > 0 && !self.directory.budget().has_room_for_mail(self.pending_bytes + self.short_of);
        match self.is_open_for_mail() {
            Err(Closed::MaxSize | Closed::NoSpace) => true,
            Ok(()) => is_short(),
            Err(_) => false,
        }
    }

    /// The oldest segment, if its live messages should be copied out of it.
    fn copy_source(&self) -> Option<u16> {
        if !matches!(self.state, State::Open) {
            return None;
        }
        let slot = *self.segments.in_use.front()?;
        if self.tail.is_some_and(|tail| tail.slot == slot) {
            return None;
        }
        let segment = self.segments.get(slot);
        let is_worth_it = if self.is_pressed() {
            // Any real gain counts. What was packed by copying is never worth it again, or this would go on for ever.
            let written = segment.charged.saturating_sub(SEGMENT_HEADER_BYTES as u64);
            segment.live_bytes * 100 <= written * COPY_FORWARD_PRESSED_PERCENT_MAX
        } else {
            // Of segments that were filled one record after the other, each is more than half full. So this ends, too.
            let is_sparse = |live: u64, capacity: u64| live * 100 <= capacity * COPY_FORWARD_LIVE_PERCENT_MAX;
            let whole_log = || {
                let in_use = self.segments.in_use.iter().map(|slot| self.segments.get(*slot));
                in_use
                    .fold((0, 0), |(live, capacity), segment| (live + segment.live_bytes, capacity + segment.capacity))
            };
            self.segments.in_use.len() > COPY_FORWARD_SEGMENTS_MIN
                && is_sparse(segment.live_bytes, segment.capacity)
                && {
                    let (live, capacity) = whole_log();
                    is_sparse(live, capacity)
                }
        };
        let wanted = segment.live > 0
            && is_worth_it
            // What holds it back otherwise would hold it back afterwards as well.
            && segment.pins == 0
            && segment.last_event <= self.event_cursor;
        // All of it must fit, or nothing is won.
        let needed = segment.live_bytes + segment.live_bytes / 8 + 2 * BLOCK_BYTES;
        let has_room = self.tail_room() >= needed || self.spares_ready() > SPARES_RESERVED;
        (wanted && has_room).then_some(slot)
    }

    fn poll_copy(&mut self, now: Duration) -> Option<Operation> {
        if self.copy_forward.current.is_some() {
            return self.poll_current();
        }
        if self.copy_forward.retry_at.is_some_and(|at| now < at) {
            return None;
        }
        if self.leaves_present_segment() {
            self.force_segment();
            return self.poll_operation(now);
        }
        let slot = self.copy_source()?;
        if now < self.copy_forward.next_read && !self.is_pressed() {
            return None;
        }
        let number = self.segments.get(slot).number;
        if self.copy_forward.segment != number || self.copy_forward.left.is_empty() {
            self.copy_forward.segment = number;
            self.copy_forward.left = self.live_messages_of(slot);
        }
        while let Some(sequence) = self.copy_forward.left.pop() {
            let Some(entry) = self.index.get(sequence).copied().filter(|entry| entry.record().slot == slot) else {
                continue;
            };
            let settled = entry.outcome().is_none_or(|place| place.offset() < self.segments.get(place.slot).end);
            if !settled {
                continue; // Its newest outcome is not durable yet; the next round finds it again.
            }
            let outcome = entry.outcome();
            self.copy_forward.attempts += 1;
            self.copy_forward.current = Some(Current {
                attempt: self.copy_forward.attempts,
                entry,
                message: None,
                deferred: Vec::new(),
                copied: Vec::new(),
                next_outcome: outcome,
                reading: false,
            });
            return self.poll_current();
        }
        self.pause_copy(now, COPY_FORWARD_PAUSE_MS);
        None
    }

    /// Under pressure, a present segment that is mostly dead is left early, so that it can be retired.
    fn leaves_present_segment(&self) -> bool {
        let idle = self.flight.is_none() && self.closed.is_empty() && self.open.is_none();
        let Some(tail) = self.tail.filter(|_| idle && matches!(self.state, State::Open)) else {
            return false;
        };
        let segment = self.segments.get(tail.slot);
        self.segments.in_use.front() == Some(&tail.slot)
            && segment.end > 0
            && segment.live_bytes * 2 <= segment.end
            && segment.last_event <= self.event_cursor
            && self.is_pressed()
            && self.spares_ready() > 0
    }

    fn live_messages_of(&self, slot: u16) -> Vec<u64> {
        let segment = self.segments.get(slot);
        let mut left: Vec<u64> = self
            .index
            .range(segment.first_sequence..=segment.last_sequence)
            .filter(|entry| entry.record().slot == slot)
            .map(|entry| entry.sequence)
            .collect();
        left.extend(&segment.copies);
        left.sort_unstable();
        left.dedup();
        left.reverse();
        left
    }

    fn poll_current(&mut self) -> Option<Operation> {
        let current = self.copy_forward.current.as_mut()?;
        if current.reading {
            return None;
        }
        current.reading = true;
        let (place, is_record) = match (&current.message, current.next_outcome) {
            (None, _) => (current.entry.record(), true),
            (Some(_), Some(outcome)) => (outcome, false),
            (Some(_), None) => unreachable!("a message with all its outcomes is copied at once"),
        };
        let attempt = current.attempt;
        let generation = self.segments.get(place.slot).generation;
        let purpose = if is_record {
            Purpose::CopyRecord { place, generation, attempt }
        } else {
            Purpose::CopyOutcome { place, generation, attempt }
        };
        Some(self.read(place, purpose))
    }

    /// The message that is being copied, if what was read is for this attempt.
    pub(crate) fn take_copy(&mut self, attempt: u64) -> Option<Current> {
        self.copy_forward.current.take_if(|current| current.attempt == attempt)
    }

    pub(crate) fn handle_copy_record(
        &mut self,
        now: Duration,
        mut current: Current,
        place: Place,
        generation: u64,
        buffer: ReadBuffer,
        result: io::Result<()>,
    ) {
        let pause = Duration::from_nanos(place.length() * 1_000_000_000 / COPY_FORWARD_BYTES_PER_S);
        self.copy_forward.next_read = self.copy_forward.next_read.max(now) + pause;
        let id = MessageId::new(self.id(), Sequence(current.entry.sequence));
        match read_message(id, place, generation, buffer, result) {
            Ok(message) => {
                let header = *message.header();
                let state = message.bytes(header.state_range());
                if header.kind == RecordKind::Copy as u8 {
                    match rkyv::access::<ArchivedCopiedState, rkyv::rancor::Failure>(state) {
                        Ok(state) => current.copied.extend(state.deferred.iter().map(|result| result.to_result())),
                        Err(_) => return self.give_up_copy(now),
                    }
                }
                current.message = Some(message);
                current.reading = false;
                self.continue_copy(now, current);
            }
            Err(_) => self.give_up_copy(now),
        }
    }

    pub(crate) fn handle_copy_outcome(
        &mut self,
        now: Duration,
        mut current: Current,
        generation: u64,
        buffer: &ReadBuffer,
        result: io::Result<()>,
    ) {
        let id = MessageId::new(self.id(), Sequence(current.entry.sequence));
        let Some((header, outcome)) = result.ok().and_then(|()| read_outcome(id, generation, buffer)) else {
            return self.give_up_copy(now);
        };
        merge_older(&mut current.deferred, outcome);
        current.next_outcome = self.previous_outcome(&header);
        current.reading = false;
        self.continue_copy(now, current);
    }

    /// Where the outcome record before the given one about the same message is.
    pub(crate) fn previous_outcome(&self, header: &RecordHeader) -> Option<Place> {
        let slot = self.segments.by_number(header.previous_segment).filter(|_| header.previous_length16 != 0)?;
        let place = Place { slot, offset16: header.previous_offset16, length16: header.previous_length16 };
        (place.offset() + place.length() <= self.segments.get(slot).end).then_some(place)
    }

    /// Goes on to the next outcome, or appends the copy.
    fn continue_copy(&mut self, now: Duration, mut current: Current) {
        if !matches!(self.state, State::Open) {
            return;
        }
        let sequence = current.entry.sequence;
        if self.index.get(sequence) != Some(&current.entry) {
            return; // It went on, or ended: the next round finds it as it is then, if it is still here.
        }
        current.deferred.retain(|result| self.index.is_pending(&current.entry, result.index));
        let pending = self.index.pending(&current.entry);
        if current.next_outcome.is_some() && current.deferred.len() < pending.len() {
            self.copy_forward.current = Some(current);
            return;
        }
        for result in mem::take(&mut current.copied) {
            let is_news = current.deferred.iter().all(|newer| newer.index != result.index);
            if is_news && self.index.is_pending(&current.entry, result.index) {
                current.deferred.push(result);
            }
        }
        if self.append_copy(now, &current, &pending).is_none() {
            self.pause_copy(now, COPY_FORWARD_PAUSE_MS);
        }
    }

    fn append_copy(&mut self, now: Duration, current: &Current, pending: &[u32]) -> Option<()> {
        let message = current.message.as_ref()?;
        let recipients = message.envelope().ok()?.recipients.len() as u32;
        let archive = Verbatim(message.bytes(message.header().archive_range()));
        let state = CopiedState {
            recipients,
            finished: (0..recipients).filter(|index| pending.binary_search(index).is_err()).collect(),
            deferred: current.deferred.clone(),
        };
        let header = RecordHeader {
            kind: RecordKind::Copy as u8,
            schema: COPY_SCHEMA,
            message: message.id().to_raw(),
            ..RecordHeader::default()
        };
        let content = [message.prefix(), message.body()];
        let written = self.append_record(RoomFor::Copy, header, &archive, Some(&state), content).ok()?;
        let until = now + Duration::from_millis(COPY_FORWARD_GATHER_MS);
        self.copy_forward.gathers_until.get_or_insert(until);
        let old = current.entry.record();
        let before = self.index.relocate(current.entry.sequence, written.place)?;
        self.segments.get_mut(old.slot).remove_live(old.length(), written.commit);
        let segment = self.segments.get_mut(written.place.slot);
        segment.add_live(written.place.length(), written.commit);
        segment.copies.push(current.entry.sequence);
        self.note(Change::Replaced(before));
        self.counters.copies += 1;
        self.counters.bytes_copied += written.place.length();
        Some(())
    }

    fn give_up_copy(&mut self, now: Duration) {
        self.counters.damaged += 1;
        self.pause_copy(now, COPY_FORWARD_RETRY_MS);
    }

    fn pause_copy(&mut self, now: Duration, ms: u64) {
        self.copy_forward.retry_at = Some(now + Duration::from_millis(ms));
    }

    /// Until when the frame that gathers may wait, because it holds copies only and more are coming.
    pub(crate) fn patience(&self) -> Option<Duration> {
        let frame = self.open.as_ref().filter(|frame| frame.is_patient && !frame.is_forced && frame.is_wanted())?;
        let more = self.copy_forward.current.is_some() || !self.copy_forward.left.is_empty();
        let is_small = frame.buffer.len() < COPY_FORWARD_GATHER_BYTES;
        self.copy_forward.gathers_until.filter(|_| more && is_small)
    }

    pub(crate) fn copy_timeout(&self) -> Option<Duration> {
        if self.copy_forward.current.is_some() {
            return None;
        }
        let at = self.copy_forward.retry_at.unwrap_or_default().max(self.copy_forward.next_read);
        self.copy_source().map(|_| at)
    }
}

/// Checks an outcome record that was read alone.
pub(crate) fn read_outcome(id: MessageId, generation: u64, buffer: &[u8]) -> Option<(RecordHeader, &ArchivedOutcome)> {
    let header = RecordHeader::decode(buffer.get(..RECORD_HEADER_BYTES)?);
    let is_right = header.kind == RecordKind::Outcome as u8
        && header.message == id.to_raw()
        && header.checked_length() == Some(buffer.len())
        && header.head_matches(generation, &buffer[..header.head_bytes()]);
    if !is_right {
        return None;
    }
    let outcome = rkyv::access::<ArchivedOutcome, rkyv::rancor::Failure>(&buffer[header.archive_range()]).ok()?;
    Some((header, outcome))
}

/// Adds what an older outcome record says of recipients that newer ones did not mention.
pub(crate) fn merge_older(deferred: &mut Vec<RecipientResult>, outcome: &ArchivedOutcome) {
    for result in outcome.results.iter().filter(|result| !result.is_final()) {
        if deferred.iter().all(|newer| newer.index != result.index.to_native()) {
            deferred.push(result.to_result());
        }
    }
}
