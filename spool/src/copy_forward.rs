//! Copying what counts out of mostly dead segments, so that they can be used again.
//!
//! The emptiest segment is chosen. What counts in it is found by going over the index, a slice at a time: messages and
//! shared bodies whose record is there are copied; of messages whose record is elsewhere, but whose state an outcome
//! there tells, the state is written again. All of that is taken in the order in which it stands in the segment, from
//! windows that are read at once; what else belongs to a message is read by itself. Copies are checked, each octet of
//! them. They are gathered and then written as one frame into segments of their own, since what was copied once will
//! stay for long. On a full disk without a segment for them they go where outcomes go: what is won is one more.
//!
//! How much is read depends on how much room is left ([`Urgency`]). A slice of the work is bounded too, and the next
//! one comes a little later, so that commits go out between.
//!
//! Over 500 lines: what is found, read and written for one segment is one lifecycle.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use std::{io, mem};

use crate::append::RoomFor;
use crate::body::Body;
use crate::commit::Purpose;
use crate::error::Closed;
use crate::format::{
    BODY_SCHEMA, COPY_SCHEMA, Chain, FRAME_HEADER_BYTES, RECORD_HEADER_BYTES, RecordHeader, RecordKind,
    SEGMENT_HEADER_BYTES, STATE_SCHEMA,
};
use crate::frame::Change;
use crate::index::{Entry, HELD, Place};
use crate::limits::{
    BLOCK_BYTES, COPY_FORWARD_BYTES_PER_S, COPY_FORWARD_EARNED_BYTES_MAX, COPY_FORWARD_EARNED_RATIO,
    COPY_FORWARD_GATHER_BYTES, COPY_FORWARD_GATHER_CALM_BYTES, COPY_FORWARD_HURRIED_PERCENT_MAX,
    COPY_FORWARD_HURRIED_PERCENT_MIN, COPY_FORWARD_HURRIED_PERCENT_STEP, COPY_FORWARD_HURRIED_USED_PERCENT,
    COPY_FORWARD_LIVE_PERCENT_MAX, COPY_FORWARD_PAUSE_MS, COPY_FORWARD_PRESSED_PERCENT_MAX, COPY_FORWARD_READS_MAX,
    COPY_FORWARD_RETRY_MS, COPY_FORWARD_SCAN_ENTRIES, COPY_FORWARD_SCAN_INTERVAL_MS, COPY_FORWARD_SEGMENTS_MIN,
    COPY_FORWARD_SLICE_INTERVAL_US, COPY_FORWARD_SLICE_ITEMS, COPY_FORWARD_WINDOW_BYTES, RESTATES_WAITING_MAX,
    SPARES_RESERVED_FROM_COPIES,
};
use crate::log::{Log, State};
use crate::message::{Memory, Message};
use crate::packed;
use crate::read::{check_body, checked_message};
use crate::record::{CopiedState, LogId, MessageId, RecipientResult, Sequence};
use crate::segment::Segment;
use crate::storage::{Operation, ReadBuffer};
use crate::write_record::Verbatim;

/// Where copying stands.
#[derive(Debug, Default)]
pub(crate) struct CopyForward {
    /// The segment that is being emptied.
    source: Option<Source>,
    /// What is to be copied or restated, in the order of its places in the segment; while that is gone over, in none.
    left: VecDeque<Found>,
    /// What is being read.
    running: Vec<Current>,
    /// The part of the segment that was read last.
    window: Option<Window>,
    /// What has been read and waits to be written with others.
    ready: Vec<Ready>,
    ready_bytes: usize,
    attempts: u64,
    /// The attempt that waits for a window.
    window_attempt: Option<u64>,
    /// Items that the present slice may still begin, and when the next one comes: commits go out between.
    slice_left: usize,
    next_slice: Duration,
    /// While there is room, nothing is read before: the rate is bounded.
    next_read: Duration,
    /// Bytes that may be read although it is earlier than that, because so much was appended.
    earned: u64,
    /// Bytes that had been appended when that was last brought up to date.
    appended: u64,
    next_scan: Duration,
    /// No segment is chosen before.
    next_choice: Duration,
    /// It was too early for a choice.
    choice_waits: bool,
    /// Segments with something that can't be read are left alone until then; by number.
    avoided: HashMap<u64, Duration>,
    /// Messages whose state is spread over too many outcomes.
    restates: VecDeque<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Source {
    slot: u16,
    number: u64,
    /// The index has been gone over up to this sequence; `None`: all of it.
    scanned: Option<u64>,
    /// Messages from this sequence on are younger than all that is in the segment.
    scan_end: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Item {
    Message(u64),
    Body(u64),
}

/// What counts in the segment that is being emptied.
#[derive(Debug, Clone, Copy)]
struct Found {
    /// Where in the segment.
    start: u64,
    end: u64,
    item: Item,
}

/// A part of the segment that is being emptied.
#[derive(Debug)]
struct Window {
    slot: u16,
    number: u64,
    bytes: Range<u64>,
    memory: Arc<ReadBuffer>,
}

/// How much copying is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Urgency {
    /// There is room: at most [`COPY_FORWARD_BYTES_PER_S`] are read.
    Calm,
    /// It is getting less: also [`COPY_FORWARD_EARNED_RATIO`] times what is appended, so that mail is not refused.
    Hurried,
    /// Mail is refused for want of space: nearly anything.
    Pressed,
}

/// One message or body on its way.
#[derive(Debug)]
pub(crate) struct Current {
    /// What is read for an earlier attempt, which ended when the log failed, is not taken for this one's.
    attempt: u64,
    item: Subject,
    reading: bool,
}

#[derive(Debug)]
enum Subject {
    Message {
        /// As it was at the begin; the message is given up for now when it has changed meanwhile.
        entry: Entry,
        /// The record is to be copied, and not the state alone.
        moves: bool,
        /// Outcomes and states that are still to be read, the newest first.
        states: VecDeque<Place>,
        deferred: Vec<RecipientResult>,
        /// The window that the record is in. The next one may be there before all states have been read.
        window: Option<(Arc<ReadBuffer>, usize)>,
        message: Option<Message>,
    },
    Body {
        sequence: u64,
        place: Place,
    },
}

/// What is to be written.
#[derive(Debug)]
enum Ready {
    Copy { entry: Entry, message: Message, deferred: Vec<RecipientResult> },
    State { entry: Entry, deferred: Vec<RecipientResult> },
    Body { sequence: u64, place: Place, record: ReadBuffer },
}

impl CopyForward {
    /// The log has failed: nothing of what is under way counts.
    pub(crate) fn forget(&mut self) {
        *self = Self {
            attempts: self.attempts,
            next_slice: self.next_slice,
            next_read: self.next_read,
            appended: self.appended,
            avoided: mem::take(&mut self.avoided),
            restates: mem::take(&mut self.restates),
            ..Self::default()
        };
    }

    /// Whether the segment that is being emptied has not been gone over yet.
    fn is_scanning(&self) -> bool {
        self.source.is_some_and(|source| source.scanned.is_some())
    }

    fn has_items(&self) -> bool {
        !self.restates.is_empty() || !self.left.is_empty() && !self.is_scanning()
    }

    /// The message's state should be told by one record again.
    pub(crate) fn restate_soon(&mut self, sequence: u64) {
        if self.restates.len() < RESTATES_WAITING_MAX && self.restates.back() != Some(&sequence) {
            self.restates.push_back(sequence);
        }
    }
}

impl Log {
    pub(crate) fn poll_copy(&mut self, now: Duration) -> Option<Operation> {
        if !matches!(self.state, State::Open) {
            return None;
        }
        self.leave_dead_copies();
        if let Some(operation) = self.poll_tombstones() {
            return Some(operation);
        }
        if self.leaves_present_segment() {
            self.force_segment();
            return self.poll_commit();
        }
        if let Some(operation) = self.poll_running(now) {
            return Some(operation);
        }
        self.earn();
        if now >= self.copy_forward.next_slice {
            self.copy_forward.next_slice = now + Duration::from_micros(COPY_FORWARD_SLICE_INTERVAL_US);
            self.copy_forward.slice_left = COPY_FORWARD_SLICE_ITEMS;
        }
        while self.may_begin(now) {
            self.copy_forward.slice_left -= 1;
            let Some(item) = self.next_item() else {
                self.find_more(now);
                if self.copy_forward.has_items() {
                    continue;
                }
                break;
            };
            if let Some(operation) = self.begin_item(now, item) {
                return Some(operation);
            }
        }
        let more_to_scan = self.copy_forward.source.is_some_and(|source| source.scanned.is_some());
        let none_left = self.copy_forward.running.is_empty() && self.copy_forward.left.is_empty() && !more_to_scan;
        let gathered =
            if self.urgency() == Urgency::Calm { COPY_FORWARD_GATHER_CALM_BYTES } else { COPY_FORWARD_GATHER_BYTES };
        let is_full = self.copy_forward.ready_bytes >= gathered;
        if !self.copy_forward.ready.is_empty() && (is_full || none_left) {
            self.write_copies(now);
            return self.poll_commit();
        }
        None
    }

    /// Later copies go elsewhere when nothing counts any more in the segment that they would go to, or little under
    /// pressure, so that it can be retired.
    fn leave_dead_copies(&mut self) {
        let Some(tail) = self.tails[Chain::Copies as usize] else {
            return;
        };
        let segment = self.segments.get(tail.slot);
        let is_dead = segment.live == 0 && segment.end > 0;
        let is_sparse = is_worth_leaving(segment, 0);
        let has_frames_coming = || self.uncommitted_frames().any(|frame| frame.slot == tail.slot);
        if (is_dead || is_sparse && self.is_pressed()) && !has_frames_coming() {
            self.tails[Chain::Copies as usize] = None;
            self.segments.note_dead(tail.slot);
        }
    }

    /// The same for mail, under pressure. A frame has to begin the next segment, which then carries the log's numbers.
    fn leaves_present_segment(&self) -> bool {
        let is_idle = self.flight.is_none() && self.closed.is_empty() && self.open.is_none();
        let Some(tail) = self.tails[Chain::Mail as usize].filter(|_| is_idle) else {
            return false;
        };
        let segment = self.segments.get(tail.slot);
        // The next one begins with a frame for its own sake.
        is_worth_leaving(segment, BLOCK_BYTES)
            && segment.last_event <= self.event_cursor
            && self.is_pressed()
            && self.spares_ready() > 0
    }

    /// Whether nothing is being copied, and nothing would be worth it.
    pub(crate) fn is_copying_idle(&self) -> bool {
        let CopyForward { source, left, running, ready, .. } = &self.copy_forward;
        let is_idle = source.is_none() && left.is_empty() && running.is_empty() && ready.is_empty();
        is_idle && self.emptiest().is_none()
    }

    /// What was appended since the last time allows so much more to be read.
    fn earn(&mut self) {
        let appended = self.counters.bytes_messages + self.counters.bytes_outcomes;
        let since = appended - self.copy_forward.appended;
        self.copy_forward.appended = appended;
        let earned = self.copy_forward.earned + since * COPY_FORWARD_EARNED_RATIO;
        self.copy_forward.earned = earned.min(COPY_FORWARD_EARNED_BYTES_MAX);
    }

    /// When more may be read; zero: at once.
    fn read_due(&self) -> Duration {
        match self.urgency() {
            Urgency::Pressed => Duration::ZERO,
            Urgency::Hurried if self.copy_forward.earned > 0 => Duration::ZERO,
            Urgency::Hurried | Urgency::Calm => self.copy_forward.next_read,
        }
    }

    fn charge_read(&mut self, now: Duration, bytes: u64) {
        if self.urgency() > Urgency::Calm && self.copy_forward.earned > 0 {
            self.copy_forward.earned = self.copy_forward.earned.saturating_sub(bytes);
        } else {
            let pause = Duration::from_nanos(bytes * 1_000_000_000 / COPY_FORWARD_BYTES_PER_S);
            self.copy_forward.next_read = self.copy_forward.next_read.max(now) + pause;
        }
    }

    fn may_begin(&self, now: Duration) -> bool {
        let CopyForward { running, window_attempt, slice_left, .. } = &self.copy_forward;
        *slice_left > 0 && running.len() < COPY_FORWARD_READS_MAX && window_attempt.is_none() && now >= self.read_due()
    }

    fn next_item(&mut self) -> Option<Found> {
        // What has no place in the segment is not read with others.
        let restate = |sequence| Found { start: 0, end: 0, item: Item::Message(sequence) };
        if let Some(sequence) = self.copy_forward.restates.pop_front() {
            return Some(restate(sequence));
        }
        if self.copy_forward.is_scanning() { None } else { self.copy_forward.left.pop_front() }
    }

    /// Begins with an item, if there is still something to do about it.
    fn begin_item(&mut self, now: Duration, found: Found) -> Option<Operation> {
        let subject = match found.item {
            Item::Body(sequence) => {
                let body = self.bodies.get(sequence).filter(|body| body.is_live())?;
                if !self.is_written(body.place) || !self.is_source(body.place) {
                    return None;
                }
                Subject::Body { sequence, place: body.place }
            }
            Item::Message(sequence) => {
                let entry = *self.index.get(sequence)?;
                let states: VecDeque<Place> = self.index.states(&entry).collect();
                let moves = self.is_source(entry.record());
                let is_wanted = moves || states.len() > 1 || states.iter().any(|state| self.is_source(*state));
                // What is not durable yet can't be read; the next round finds it again.
                let is_settled = self.is_written(entry.record()) && states.iter().all(|state| self.is_written(*state));
                if !is_wanted || !is_settled {
                    return None;
                }
                Subject::Message { entry, moves, states, deferred: Vec::new(), window: None, message: None }
            }
        };
        self.copy_forward.attempts += 1;
        let current = Current { attempt: self.copy_forward.attempts, item: subject, reading: false };
        let source = self.copy_forward.source.filter(|_| found.end > 0 && matches!(found.item, Item::Message(_)));
        let place = source.map(|source| Place::new(source.slot, found.start, (found.end - found.start) as usize));
        match place.filter(|place| self.in_window(*place).is_none()) {
            Some(place) => Some(self.read_window(now, place, current)),
            None => self.advance(now, current),
        }
    }

    /// Reads what counts in the segment from an item on, as far as a window goes.
    fn read_window(&mut self, now: Duration, first: Place, mut current: Current) -> Operation {
        let start = first.offset();
        // What is not durable yet would stay in the window as it is now.
        let last = (start + COPY_FORWARD_WINDOW_BYTES).min(self.segments.get(first.slot).end);
        let fitting = self.copy_forward.left.iter().take_while(|found| found.start < last);
        let end = fitting.map(|found| found.end).filter(|end| *end <= last).max().unwrap_or(0);
        let place = Place::new(first.slot, start, (end.max(start + first.length()) - start) as usize);
        self.charge_read(now, place.length());
        let attempt = current.attempt;
        self.copy_forward.window = None;
        self.copy_forward.window_attempt = Some(attempt);
        current.reading = true;
        self.copy_forward.running.push(current);
        self.read(place, Purpose::CopyWindow { place, attempt })
    }

    pub(crate) fn handle_copy_window(
        &mut self,
        now: Duration,
        mut current: Current,
        place: Place,
        buffer: ReadBuffer,
        result: io::Result<()>,
    ) {
        self.copy_forward.window_attempt = None;
        if result.is_err() {
            return self.avoid(now, place);
        }
        let bytes = place.offset()..place.offset() + place.length();
        let number = self.segments.get(place.slot).number;
        self.copy_forward.window = Some(Window { slot: place.slot, number, bytes, memory: Arc::new(buffer) });
        current.reading = false;
        self.copy_forward.running.push(current);
    }

    /// Where a record is in the window, if it is there.
    fn in_window(&self, place: Place) -> Option<(Arc<ReadBuffer>, usize)> {
        let window = self.copy_forward.window.as_ref()?;
        let is_it = window.slot == place.slot && window.number == self.segments.get(place.slot).number;
        let is_in = window.bytes.start <= place.offset() && place.offset() + place.length() <= window.bytes.end;
        (is_it && is_in).then(|| (Arc::clone(&window.memory), (place.offset() - window.bytes.start) as usize))
    }

    fn is_written(&self, place: Place) -> bool {
        place.offset() < self.segments.get(place.slot).end
    }

    fn is_source(&self, place: Place) -> bool {
        self.copy_forward.source.is_some_and(|source| source.slot == place.slot)
    }

    fn poll_running(&mut self, now: Duration) -> Option<Operation> {
        let mut position = 0;
        while position < self.copy_forward.running.len() {
            if self.copy_forward.running[position].reading {
                position += 1;
                continue;
            }
            let current = self.copy_forward.running.swap_remove(position);
            if let Some(operation) = self.advance(now, current) {
                return Some(operation);
            }
        }
        None
    }

    /// Takes what is still needed about an item from the window, or reads it, until the item is ready.
    fn advance(&mut self, now: Duration, mut current: Current) -> Option<Operation> {
        let attempt = current.attempt;
        loop {
            let (place, is_state) = match &mut current.item {
                Subject::Body { place, .. } => (*place, false),
                Subject::Message { entry, moves, states, deferred, window, message } => {
                    let present = self.index.get(entry.sequence()).filter(|present| present.is_same_state(entry));
                    // It went on, or ended: the next round finds it as it is then, if it still counts here.
                    let entry = *present?;
                    if window.is_none() {
                        *window = self.in_window(entry.record());
                    }
                    deferred.retain(|result| self.index.is_pending(&entry, result.index));
                    let is_told = deferred.len() >= self.index.pending(&entry).len();
                    match states.pop_front() {
                        Some(state) if !is_told => (state, true),
                        _ if message.is_none() && (*moves || !is_told) => (entry.record(), false),
                        _ => {
                            let deferred = mem::take(deferred);
                            let ready = match message.take() {
                                Some(message) if *moves => Ready::Copy { entry, message, deferred },
                                _ => Ready::State { entry, deferred },
                            };
                            self.add_ready(ready);
                            return None;
                        }
                    }
                }
            };
            let generation = self.segments.get(place.slot).generation;
            let is_body = matches!(current.item, Subject::Body { .. });
            let kept = match &current.item {
                Subject::Message { window, .. } if !is_state => window.clone(),
                _ => None,
            };
            let Some((memory, start)) = kept.or_else(|| self.in_window(place)).filter(|_| !is_body) else {
                self.charge_read(now, place.length());
                current.reading = true;
                self.copy_forward.running.push(current);
                let purpose = if is_state { copy_state } else { copy_record };
                return Some(self.read(place, purpose(place, generation, attempt)));
            };
            let taken = if is_state {
                let record = &memory[start..start + place.length() as usize];
                current.item.take_state(self.directory.id(), generation, record)
            } else {
                let memory = Memory::Owned(memory);
                current.item.take_record(self.directory.id(), place, generation, memory, start)
            };
            if taken.is_none() {
                self.avoid(now, place);
                return None;
            }
        }
    }

    fn add_ready(&mut self, ready: Ready) {
        self.copy_forward.ready_bytes += match &ready {
            Ready::Copy { message, .. } => message.header().checked_length().unwrap_or(0),
            Ready::State { .. } => RECORD_HEADER_BYTES,
            Ready::Body { record, .. } => record.len(),
        };
        self.copy_forward.ready.push(ready);
    }

    /// The item that something was read for, if what was read is for this attempt.
    pub(crate) fn take_copy(&mut self, attempt: u64) -> Option<Current> {
        let position = self.copy_forward.running.iter().position(|current| current.attempt == attempt)?;
        Some(self.copy_forward.running.swap_remove(position))
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
        if let Subject::Body { sequence, place } = current.item {
            let is_right = result.is_ok() && check_body(sequence, place, generation, &buffer).is_ok();
            if !is_right {
                return self.avoid(now, place);
            }
            return self.add_ready(Ready::Body { sequence, place, record: buffer });
        }
        let memory = Memory::Owned(Arc::new(buffer));
        let taken = result.ok().and_then(|()| current.item.take_record(self.id(), place, generation, memory, 0));
        if taken.is_none() {
            return self.avoid(now, place);
        }
        current.reading = false;
        self.copy_forward.running.push(current);
    }

    pub(crate) fn handle_copy_state(
        &mut self,
        now: Duration,
        mut current: Current,
        place: Place,
        generation: u64,
        buffer: &ReadBuffer,
        result: io::Result<()>,
    ) {
        let taken = result.ok().and_then(|()| current.item.take_state(self.id(), generation, buffer));
        if taken.is_none() {
            return self.avoid(now, place);
        }
        current.reading = false;
        self.copy_forward.running.push(current);
    }

    /// Something in a segment can't be read: that one is left alone for a while, and not for its sake the others.
    fn avoid(&mut self, now: Duration, place: Place) {
        self.counters.damaged += 1;
        let until = now + Duration::from_millis(COPY_FORWARD_RETRY_MS);
        self.copy_forward.avoided.insert(self.segments.get(place.slot).number, until);
        if let Some(source) = self.copy_forward.source.take() {
            self.copy_forward.avoided.insert(source.number, until);
        }
        self.copy_forward.left.clear();
        self.copy_forward.window = None;
    }

    /// Writes what is ready, as one frame.
    fn write_copies(&mut self, now: Duration) {
        let bytes = mem::take(&mut self.copy_forward.ready_bytes) as u64;
        if self.has_room_for_copies(bytes) {
            let waiting = self.begin_copies();
            self.append_ready(now, Chain::Copies);
            self.end_copies(waiting);
        } else {
            self.append_ready(now, Chain::Mail);
        }
    }

    /// Whether there is a segment that copies of so many bytes can go to. A full disk may have none, but where mail and
    /// outcomes go there may be room.
    pub(crate) fn has_room_for_copies(&self, bytes: u64) -> bool {
        self.fits_behind_copies(bytes) || self.spares_ready() > SPARES_RESERVED_FROM_COPIES
    }

    /// Whether the present segment of copies takes so many bytes more.
    fn fits_behind_copies(&self, bytes: u64) -> bool {
        self.tail_room(Chain::Copies) >= bytes + bytes / 8 + 2 * BLOCK_BYTES
    }

    fn append_ready(&mut self, now: Duration, chain: Chain) {
        for ready in mem::take(&mut self.copy_forward.ready) {
            let written = match ready {
                Ready::Copy { entry, message, deferred } => self.append_copy(chain, &entry, &message, deferred),
                Ready::State { entry, deferred } => self.append_state(chain, &entry, deferred),
                Ready::Body { sequence, place, record } => self.append_body_copy(chain, sequence, place, &record),
            };
            if written.is_none() {
                self.pause_copy(now);
                break;
            }
        }
    }

    /// `None` when there is no room.
    fn append_copy(
        &mut self,
        chain: Chain,
        entry: &Entry,
        message: &Message,
        deferred: Vec<RecipientResult>,
    ) -> Option<()> {
        let sequence = entry.sequence();
        let Some(present) = self.index.get(sequence).copied().filter(|present| present.is_same_state(entry)) else {
            return Some(());
        };
        let pending = self.index.pending(&present);
        let recipients = message.envelope().ok()?.recipients.len() as u32;
        let archive = Verbatim(message.bytes(message.header().archive_range()));
        let state = CopiedState {
            recipients,
            finished: (0..recipients).filter(|index| pending.binary_search(index).is_err()).collect(),
            deferred,
        };
        let header = RecordHeader {
            kind: RecordKind::Copy as u8,
            schema: COPY_SCHEMA,
            flags: if present.has(HELD) { RecordHeader::HELD } else { 0 },
            message: message.id().to_raw(),
            shared_body_length: message.header().shared_body_length,
            shared_body: message.header().shared_body,
            ..RecordHeader::default()
        };
        let content = [message.bytes(message.header().prefix_range()), message.bytes(message.header().body_range())];
        let written = self.append_record(RoomFor::Copy, chain, header, Some(&archive), Some(&state), content).ok()?;
        if let Some(before) = self.index.relocate(sequence, written.place) {
            self.recount(&before, written.commit);
            self.note(Change::Replaced(before));
        }
        self.counters.copies += 1;
        self.counters.bytes_copied += written.place.length();
        Some(())
    }

    fn append_state(&mut self, chain: Chain, entry: &Entry, deferred: Vec<RecipientResult>) -> Option<()> {
        let sequence = entry.sequence();
        let present = self.index.get(sequence).filter(|present| present.is_same_state(entry));
        if present.is_none() {
            return Some(());
        }
        let state = CopiedState { recipients: 0, finished: Vec::new(), deferred };
        let header = RecordHeader {
            kind: RecordKind::State as u8,
            schema: STATE_SCHEMA,
            message: MessageId::new(self.id(), Sequence(sequence)).to_raw(),
            ..RecordHeader::default()
        };
        let written = self.append_record(RoomFor::Copy, chain, header, Some(&state), None, [&[], &[]]).ok()?;
        if let Some(before) = self.index.restate(sequence, written.place) {
            self.recount(&before, written.commit);
            self.note(Change::Replaced(before));
        }
        self.counters.bytes_copied += written.place.length();
        Some(())
    }

    fn append_body_copy(&mut self, chain: Chain, sequence: u64, place: Place, record: &ReadBuffer) -> Option<()> {
        let is_current = self.bodies.get(sequence).is_some_and(|body| body.is_live() && body.place == place);
        if !is_current {
            return Some(());
        }
        let read = RecordHeader::decode(&record[..RECORD_HEADER_BYTES]);
        let header = RecordHeader {
            kind: RecordKind::Body as u8,
            schema: BODY_SCHEMA,
            message: read.message,
            ..RecordHeader::default()
        };
        let content: [&[u8]; 2] = [&[], &record[read.body_range()]];
        let written = self.append_record(RoomFor::Copy, chain, header, None, None, content).ok()?;
        if let Some(from) = self.bodies.relocate(&mut self.segments, sequence, written.place, written.commit) {
            self.note(Change::BodyMoved { sequence, from });
        }
        self.counters.bytes_copied += written.place.length();
        Some(())
    }

    /// Finds more to copy: in the index, or in another segment.
    fn find_more(&mut self, now: Duration) {
        let source = self.copy_forward.source.filter(|source| {
            let slot = self.segments.by_number(source.number);
            slot.is_some_and(|slot| self.segments.get(slot).live > 0) && source.scanned.is_some()
        });
        let Some(mut source) = source else {
            // It has been gone over, or nothing counts in it any more.
            self.copy_forward.source = None;
            self.copy_forward.left.clear();
            self.copy_forward.window = None;
            // What was found in the last one goes first.
            if self.copy_forward.running.is_empty() && self.copy_forward.ready.is_empty() {
                self.choose_source(now);
            }
            return;
        };
        if now < self.copy_forward.next_scan {
            return;
        }
        if self.urgency() == Urgency::Calm {
            self.copy_forward.next_scan = now + Duration::from_millis(COPY_FORWARD_SCAN_INTERVAL_MS);
        } else {
            self.copy_forward.next_scan = self.copy_forward.next_slice;
        }
        let from = source.scanned.expect("a source that has been gone over is not gone over again");
        let mut last = None;
        let older = self.index.iter_from(from).take_while(|entry| entry.sequence() < source.scan_end);
        for entry in older.take(COPY_FORWARD_SCAN_ENTRIES) {
            let is_here = |place: &Place| place.slot == source.slot;
            // The record stands before what tells of its state.
            let place = Some(entry.record()).filter(is_here).or_else(|| self.index.states(entry).find(is_here));
            if let Some(place) = place {
                let (start, end) = (place.offset(), place.offset() + place.length());
                self.copy_forward.left.push_back(Found { start, end, item: Item::Message(entry.sequence()) });
            }
            last = Some(entry.sequence());
        }
        source.scanned = last.map(|last| last + 1);
        if source.scanned.is_none() {
            self.copy_forward.left.make_contiguous().sort_unstable_by_key(|found| found.start);
        }
        self.copy_forward.source = Some(source);
    }

    fn choose_source(&mut self, now: Duration) {
        self.copy_forward.source = None;
        self.copy_forward.choice_waits = now < self.copy_forward.next_choice && self.urgency() == Urgency::Calm;
        if self.copy_forward.choice_waits {
            return;
        }
        self.copy_forward.next_choice = now + Duration::from_millis(COPY_FORWARD_PAUSE_MS);
        self.copy_forward.avoided.retain(|_, until| now < *until);
        let Some(slot) = self.emptiest() else {
            return;
        };
        let number = self.segments.get(slot).number;
        let bodies = self.bodies.iter().filter(|(_, body)| body.is_live() && body.place.slot == slot);
        let found = |(sequence, body): (u64, &Body)| {
            let (start, end) = (body.place.offset(), body.place.offset() + body.place.length());
            Found { start, end, item: Item::Body(sequence) }
        };
        self.copy_forward.left = bodies.map(found).collect();
        self.copy_forward.source = Some(Source { slot, number, scanned: Some(0), scan_end: self.next_sequence });
        self.copy_forward.next_scan = now;
    }

    /// The segment that it is best to empty, if it is worth it.
    fn emptiest(&self) -> Option<u16> {
        let urgency = self.urgency();
        let is_sparse = || {
            let counting = self.segments.in_use.iter().map(|slot| self.segments.get(*slot));
            let counting: Vec<_> = counting.filter(|segment| segment.live > 0).collect();
            let live: u64 = counting.iter().map(|segment| segment.live_bytes).sum();
            let charged: u64 = counting.iter().map(|segment| segment.charged).sum();
            counting.len() > COPY_FORWARD_SEGMENTS_MIN && live * 100 <= charged * COPY_FORWARD_LIVE_PERCENT_MAX
        };
        let calm_percent_max =
            if urgency < Urgency::Pressed && is_sparse() { COPY_FORWARD_LIVE_PERCENT_MAX } else { 0 };
        let percent_max = match urgency {
            Urgency::Calm if calm_percent_max == 0 => return None,
            Urgency::Calm => calm_percent_max,
            Urgency::Hurried => self.hurried_percent_max().max(calm_percent_max),
            Urgency::Pressed => COPY_FORWARD_PRESSED_PERCENT_MAX,
        };
        let is_candidate = |slot: &&u16| {
            let segment = self.segments.get(**slot);
            segment.live > 0
                && segment.live_bytes * 100 <= written(segment) * percent_max
                && self.is_worth_emptying(segment)
                && self.tails.iter().flatten().all(|tail| tail.slot != **slot)
                // What holds it back otherwise would hold it back afterwards as well.
                && segment.pins == 0
                && segment.last_event <= self.event_cursor
                && !self.copy_forward.avoided.contains_key(&segment.number)
        };
        let share = |slot: &&u16| {
            let segment = self.segments.get(**slot);
            segment.live_bytes * 1_000 / segment.charged.max(1)
        };
        let slot = *self.segments.in_use.iter().filter(is_candidate).min_by_key(share)?;
        // All of it must fit, or nothing is won; where outcomes go, as much again must be left to them.
        let live_bytes = self.segments.get(slot).live_bytes;
        let has_room = self.has_room_for_copies(live_bytes) || self.tail_room(Chain::Mail) / 2 >= live_bytes;
        has_room.then_some(slot)
    }

    /// Whether a segment is won by copying what counts in it: because that takes less, or no other segment.
    fn is_worth_emptying(&self, segment: &Segment) -> bool {
        // What is hardly begun fits behind others of its kind.
        let is_merged = written(segment) * 4 <= segment.capacity || self.fits_behind_copies(segment.live_bytes);
        wins_room(segment, 0) || is_merged
    }

    /// What is worth copying while room gets less: the less there is, the fuller a segment. What is copied too early
    /// would have died by itself, or would have been copied out of an emptier one.
    fn hurried_percent_max(&self) -> u64 {
        let used = self.directory.budget().used_percent();
        let beyond = used.saturating_sub(COPY_FORWARD_HURRIED_USED_PERCENT);
        let percent = COPY_FORWARD_HURRIED_PERCENT_MIN + beyond * COPY_FORWARD_HURRIED_PERCENT_STEP;
        percent.min(COPY_FORWARD_HURRIED_PERCENT_MAX)
    }

    pub(crate) fn urgency(&self) -> Urgency {
        if self.is_pressed() {
            Urgency::Pressed
        } else if self.directory.budget().is_used_above(COPY_FORWARD_HURRIED_USED_PERCENT) {
            Urgency::Hurried
        } else {
            Urgency::Calm
        }
    }

    /// Whether mail is refused for want of space, so that copying is worth nearly anything.
    pub(crate) fn is_pressed(&self) -> bool {
        let is_short =
            || self.short_of > 0 && !self.directory.budget().has_room_for_mail(self.pending_bytes + self.short_of);
        match self.is_open_for_mail() {
            Err(Closed::MaxSize | Closed::NoSpace | Closed::NoFile | Closed::Preparing) => true,
            Ok(()) => is_short(),
            Err(_) => false,
        }
    }

    fn pause_copy(&mut self, now: Duration) {
        let until = now + Duration::from_millis(COPY_FORWARD_PAUSE_MS);
        self.copy_forward.next_read = self.copy_forward.next_read.max(until);
        self.copy_forward.next_choice = until;
        self.copy_forward.left.clear();
        self.copy_forward.source = None;
    }

    pub(crate) fn copy_timeout(&self) -> Option<Duration> {
        if !matches!(self.state, State::Open) {
            return None;
        }
        let CopyForward { source, running, next_slice, next_scan, next_choice, choice_waits, .. } = &self.copy_forward;
        if !running.is_empty() {
            return None;
        }
        let due = self.read_due().max(*next_slice);
        if self.copy_forward.has_items() {
            return Some(due);
        }
        if source.is_some() {
            return Some(due.max(*next_scan));
        }
        choice_waits.then_some(due.max(*next_choice))
    }
}

impl Subject {
    /// Takes in what an outcome or state record tells; `None` when it is damaged.
    fn take_state(&mut self, log: LogId, generation: u64, record: &[u8]) -> Option<()> {
        let Self::Message { entry, deferred, .. } = self else {
            unreachable!("a body has no state");
        };
        let id = MessageId::new(log, Sequence(entry.sequence()));
        add_older(deferred, read_state(id, generation, record)?);
        Some(())
    }

    /// Takes in the message's own record, which begins at `start` of `memory`; `None` when it is damaged.
    fn take_record(&mut self, log: LogId, place: Place, generation: u64, memory: Memory, start: usize) -> Option<()> {
        let Self::Message { entry, states, deferred, message, .. } = self else {
            unreachable!("a body is read by itself");
        };
        let id = MessageId::new(log, Sequence(entry.sequence()));
        let read = checked_message(id, place, generation, memory, start).ok()?;
        if read.header().kind == RecordKind::Copy as u8 {
            let state = packed::read_state(read.header().schema, read.bytes(read.header().state_range()))?;
            add_older(deferred, state.deferred);
        }
        // It is older than all outcomes, so nothing more is to be read.
        *message = Some(read);
        states.clear();
        Some(())
    }
}

/// Whether what comes next should go elsewhere, which takes `besides`, so that the present segment can be emptied.
fn is_worth_leaving(segment: &Segment, besides: u64) -> bool {
    segment.end * 4 > segment.capacity && segment.live_bytes * 2 <= segment.end && wins_room(segment, besides)
}

/// Whether less is used when what counts in a segment has been copied and `besides` was written. Without this what was
/// just copied could be copied again, on and on.
fn wins_room(segment: &Segment, besides: u64) -> bool {
    copied_bytes_max(segment.live_bytes) + besides < written(segment)
}

/// Bytes of a segment's frames.
fn written(segment: &Segment) -> u64 {
    segment.end.saturating_sub(SEGMENT_HEADER_BYTES as u64)
}

/// What copies take at the most where they begin another segment: a few frames, each padded to a block. Of a small
/// segment that may be as much again.
fn copied_bytes_max(live_bytes: u64) -> u64 {
    if live_bytes == 0 {
        return 0;
    }
    let frames = 2 + live_bytes / COPY_FORWARD_GATHER_BYTES as u64;
    live_bytes + frames * (BLOCK_BYTES + FRAME_HEADER_BYTES as u64)
}

fn copy_record(place: Place, generation: u64, attempt: u64) -> Purpose {
    Purpose::CopyRecord { place, generation, attempt }
}

fn copy_state(place: Place, generation: u64, attempt: u64) -> Purpose {
    Purpose::CopyState { place, generation, attempt }
}

/// What an outcome or state record, which was read alone, tells of recipients without a final fate; `None` where it is
/// damaged.
pub(crate) fn read_state(id: MessageId, generation: u64, buffer: &[u8]) -> Option<Vec<RecipientResult>> {
    let header = RecordHeader::decode(buffer.get(..RECORD_HEADER_BYTES)?);
    let is_right = header.message == id.to_raw()
        && header.checked_length() == Some(buffer.len())
        && header.head_matches(generation, &buffer[..header.head_bytes()]);
    if !is_right {
        return None;
    }
    let archive = &buffer[header.archive_range()];
    if header.kind == RecordKind::Outcome as u8 {
        let mut results = packed::read_outcome(header.schema, header.message, archive)?.results;
        results.retain(|result| !result.fate.is_final());
        Some(results)
    } else if header.kind == RecordKind::State as u8 {
        packed::read_state(header.schema, archive).map(|state| state.deferred)
    } else {
        None
    }
}

/// Adds results of recipients that newer records did not mention.
pub(crate) fn add_older(deferred: &mut Vec<RecipientResult>, older: impl IntoIterator<Item = RecipientResult>) {
    for result in older {
        if deferred.iter().all(|newer| newer.index != result.index) {
            deferred.push(result);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::CopyForward;

    /// Reads of earlier attempts may still come back, so their numbers are not given again. What is to be avoided, and
    /// what is to be restated, is so after a failure, too.
    #[test]
    fn a_failure_ends_what_is_under_way_and_no_more() {
        let mut copies = CopyForward { attempts: 7, ready_bytes: 9, ..CopyForward::default() };
        copies.restate_soon(5);
        copies.avoided.insert(3, Duration::from_secs(1));
        copies.forget();
        assert_eq!((copies.attempts, copies.ready_bytes), (7, 0));
        assert_eq!((copies.restates.len(), copies.avoided.len()), (1, 1));
    }
}
