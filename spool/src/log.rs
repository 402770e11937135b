//! One log: the core's state, and what its owner asks it.
//!
//! The log does no I/O once it is recovered (`recover.rs`). Calling order: append records (`append.rs`); call
//! [`Log::poll_operation`] until it yields nothing, and execute what it yields in any order; give each completion to
//! [`Log::handle_completion`] (`commit.rs`) and poll again; poll also at [`Log::next_timeout`]. Space is won back by
//! `retire.rs`.
//!
//! Changes to the index are made when a record is appended, and taken back if its frame fails; what is reused on disk
//! depends on durable changes only.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::append::Tail;
use crate::body::Bodies;
use crate::checkpoint::Checkpoints;
use crate::commit::{Flight, Purpose};
use crate::copy_forward::CopyForward;
use crate::directory::LogDirectory;
use crate::error::{Closed, ReadError};
use crate::format::{Chain, RECORD_HEADER_BYTES, RecordHeader, SEGMENT_HEADER_BYTES};
use crate::frame::{Change, Frame};
use crate::index::{Entry, Index, Place};
use crate::limits::{PENDING_OUTCOME_BYTES_MAX, READS_MAX, SPARES_RESERVED};
use crate::message::{Lease, Memory, Message};
use crate::record::{CommitNumber, LogId, MessageId, Sequence};
use crate::recover::RecoverOptions;
use crate::retire::Preallocation;
use crate::scrub::Scrub;
use crate::segment::SegmentTable;
use crate::statistics::Counters;
use crate::storage::{Operation, ReadBuffer, StorageFile, Work};

/// A log. See the module's documentation for the calling order.
#[derive(Debug)]
pub struct Log {
    pub(crate) directory: LogDirectory,
    pub(crate) state: State,
    pub(crate) random: u64,
    pub(crate) segments: SegmentTable,
    pub(crate) index: Index,
    pub(crate) bodies: Bodies,
    /// Messages whose shared body is to be read next.
    pub(crate) body_reads: VecDeque<Message>,
    /// Which segment each pinned message was in when it was pinned, and how often.
    pub(crate) pins: HashMap<u64, Vec<Pin>>,

    /// Frames that are closed and wait for their turn.
    pub(crate) closed: VecDeque<Frame>,
    /// The frame that gathers.
    pub(crate) open: Option<Frame>,
    pub(crate) flight: Option<Flight>,
    /// Bytes in all of these.
    pub(crate) pending_bytes: u64,
    /// The largest content that was refused because the spool is too large, since there was room for it.
    pub(crate) short_of: u64,
    /// Where each chain's next frame goes; `None` when it needs a new segment.
    pub(crate) tails: [Option<Tail>; 2],
    /// Memory of frames that are done, for the next ones.
    pub(crate) buffers: Vec<Vec<u8>>,
    pub(crate) change_lists: Vec<Vec<Change>>,

    pub(crate) durable: CommitNumber,
    pub(crate) next_commit: u64,
    pub(crate) next_sequence: u64,
    pub(crate) next_number: u64,
    /// The highest sequence in segments that were given up for use again.
    pub(crate) discarded: u64,
    pub(crate) event_cursor: u64,

    pub(crate) next_token: u64,
    pub(crate) purposes: HashMap<u64, Purpose>,
    pub(crate) reads: usize,
    /// Bytes of messages that were read and are in somebody's hands.
    pub(crate) read_bytes: Arc<AtomicU64>,
    pub(crate) preallocation: Preallocation,
    pub(crate) copy_forward: CopyForward,
    pub(crate) checkpoints: Checkpoints,
    pub(crate) scrub: Scrub,
    pub(crate) counters: Counters,
}

/// Whether the log takes records.
#[derive(Debug)]
pub(crate) enum State {
    Open,
    /// A write failed. `file` is what it was written to.
    Failed {
        file: Arc<dyn StorageFile>,
        chain: Chain,
    },
    /// Cached pages of the failed file are being dropped.
    DroppingCache {
        file: Option<Arc<dyn StorageFile>>,
        chain: Chain,
    },
    /// An empty frame is on its way: in a new segment, whose header voids the frame that failed; or, without a spare,
    /// in that one's place.
    Voiding {
        chain: Chain,
    },
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Pin {
    pub(crate) slot: u16,
    pub(crate) count: u32,
}

/// A message, or how to get it.
#[derive(Debug)]
pub enum Fetch {
    Ready(Message),
    /// Execute it and give the completion to [`Log::handle_completion`], which then answers [`Progress::Read`].
    Read(Operation),
}

/// What a completion meant.
#[derive(Debug)]
pub enum Progress {
    Nothing,
    /// Everything up to this commit is durable.
    Durable(CommitNumber),
    Read {
        id: MessageId,
        result: Result<Message, ReadError>,
    },
    /// The scrub found a live message that is not what was written. It is told again in each round.
    Damaged {
        id: MessageId,
        error: ReadError,
    },
    /// A commit failed: whatever was appended after [`Log::durable`] is void and its numbers are never used again. The
    /// log takes nothing until [`Log::begin_reopen`] has led to [`Progress::Reopened`].
    Failed {
        error: io::Error,
    },
    Reopened,
    /// A file that the log needs could not be made, for another reason than the time before. It is tried again by
    /// itself; [`Log::is_open_for_mail`] says whether mail has to wait for it.
    NotMade {
        path: PathBuf,
        error: io::Error,
    },
}

impl Log {
    /// Without segments: what recovery starts from.
    pub(crate) fn empty(directory: LogDirectory, options: RecoverOptions) -> Self {
        Self {
            directory,
            state: State::Open,
            random: options.seed,
            segments: SegmentTable::default(),
            index: Index::default(),
            bodies: Bodies::default(),
            body_reads: VecDeque::new(),
            pins: HashMap::new(),
            closed: VecDeque::new(),
            open: None,
            flight: None,
            pending_bytes: 0,
            short_of: 0,
            tails: [None; 2],
            buffers: Vec::new(),
            change_lists: Vec::new(),
            durable: CommitNumber(0),
            next_commit: 1,
            next_sequence: 1,
            next_number: 1,
            discarded: 0,
            event_cursor: options.event_cursor.0,
            next_token: 0,
            purposes: HashMap::new(),
            reads: 0,
            read_bytes: Arc::default(),
            preallocation: Preallocation::default(),
            copy_forward: CopyForward::default(),
            checkpoints: Checkpoints::default(),
            scrub: Scrub::default(),
            counters: Counters::default(),
        }
    }

    pub fn id(&self) -> LogId {
        self.directory.id()
    }

    /// Every commit up to this one is durable. After [`Progress::Failed`] those above it are void, also when this
    /// number passes theirs later.
    pub fn durable(&self) -> CommitNumber {
        self.durable
    }

    /// Whether anything appended is not durable yet.
    pub fn has_uncommitted(&self) -> bool {
        self.flight.is_some() || !self.closed.is_empty() || self.open.as_ref().is_some_and(Frame::is_wanted)
    }

    /// Whether a commit is under way; what was appended meanwhile goes with the next, and its completion wakes the
    /// caller.
    pub fn is_committing(&self) -> bool {
        self.flight.is_some()
    }

    /// Whether operations are out whose completions have not come back. Before a ring goes away this must be false.
    pub fn has_operations(&self) -> bool {
        !self.purposes.is_empty()
    }

    /// Whether mail would be taken now, and if not, why not.
    pub fn is_open_for_mail(&self) -> Result<(), Closed> {
        if !matches!(self.state, State::Open) {
            return Err(Closed::Failed);
        }
        if !self.directory.is_active() {
            return Err(Closed::Draining);
        }
        if self.pending_bytes >= self.directory.options().pending_bytes {
            return Err(Closed::Backlog);
        }
        let room = self.directory.options().segment_bytes / ROOM_SHARE;
        let spares = self.spares_ready();
        if !self.directory.budget().has_room_for_mail(self.pending_bytes + room) {
            return Err(Closed::MaxSize);
        }
        // Where an outcome had to begin the last spare, the rest of it is for outcomes, too.
        let has_room = spares > SPARES_RESERVED || spares == SPARES_RESERVED && self.tail_room(Chain::Mail) >= room;
        if let Some(closed) = self.short_of_checkpoint() {
            return Err(closed);
        }
        if !has_room {
            return Err(self.without_spare());
        }
        Ok(())
    }

    /// Whether outcomes will be taken for some time to come, and if not, why not. Then nothing should be begun of which
    /// an outcome would have to tell.
    pub fn is_open_for_outcomes(&self) -> Result<(), Closed> {
        if !matches!(self.state, State::Open) {
            return Err(Closed::Failed);
        }
        if self.pending_bytes > PENDING_OUTCOME_BYTES_MAX {
            return Err(Closed::Backlog);
        }
        let room = self.directory.options().segment_bytes / ROOM_SHARE;
        if self.spares_ready() == 0 && self.tail_room(Chain::Mail) < room {
            return Err(self.without_spare());
        }
        Ok(())
    }

    /// A live message whose commit is durable.
    pub fn message(&mut self, id: MessageId) -> Result<Fetch, ReadError> {
        if id.log() != self.id() {
            return Err(ReadError::Unknown);
        }
        let entry = *self.index.get(id.sequence().0).ok_or(ReadError::Unknown)?;
        let place = self.durable_place(&entry).ok_or(ReadError::NotDurable)?;
        let body = self.index.body(&entry);
        let segment = self.segments.get(place.slot);
        if let Some(map) = segment.map() {
            let start = place.offset() as usize;
            let header = RecordHeader::decode(map.bytes(start, RECORD_HEADER_BYTES));
            // Where the disk does not give it back to the map, the read tells why.
            if !map.is_lost() {
                check_header(&header, id, place)?;
                let message = Message::new(Memory::Mapped(Arc::clone(map)), start, segment.generation, header);
                return match body {
                    Some(body) => self.fetch_shared(message, body),
                    None => Ok(Fetch::Ready(message)),
                };
            }
        }
        let held = self.read_bytes.load(Ordering::Relaxed);
        if self.reads >= READS_MAX || held > 0 && held + place.length() > self.directory.options().read_bytes {
            return Err(ReadError::Busy);
        }
        let lease = Lease::new(&self.read_bytes, place.length());
        self.reads += 1;
        if let Some(body) = body {
            self.bodies.hold(body);
        }
        let generation = segment.generation;
        Ok(Fetch::Read(self.read(place, Purpose::ReadMessage { id, place, generation, body, lease })))
    }

    /// Keeps a number with a live message, in memory only, for its owner to find what it knows of it. False when the
    /// message is not live.
    pub fn set_handle(&mut self, id: MessageId, handle: u32) -> bool {
        id.log() == self.id() && self.index.set_handle(id.sequence().0, handle)
    }

    /// The number that was kept with a live message; 0 when none was.
    pub fn handle(&self, id: MessageId) -> Option<u32> {
        self.index.get(id.sequence().0).filter(|_| id.log() == self.id()).map(|entry| entry.handle)
    }

    /// Whether the message has recipients without a final fate.
    pub fn is_live(&self, id: MessageId) -> bool {
        id.log() == self.id() && self.index.get(id.sequence().0).is_some()
    }

    /// Keeps the segment that holds the message from being used again until [`Log::unpin`] was called as often,
    /// whatever becomes of the message meanwhile. Does nothing when the message is not live, or not durable yet.
    pub fn pin(&mut self, id: MessageId) {
        let entry = self.index.get(id.sequence().0).filter(|_| id.log() == self.directory.id());
        let Some(slot) = entry.and_then(|entry| self.durable_place(entry)).map(|place| place.slot) else {
            return;
        };
        self.segments.get_mut(slot).pins += 1;
        let pins = self.pins.entry(id.sequence().0).or_default();
        match pins.iter_mut().find(|pin| pin.slot == slot) {
            Some(pin) => pin.count += 1,
            None => pins.push(Pin { slot, count: 1 }),
        }
    }

    /// Takes one [`Log::pin`] back; the oldest place first, where the message was copied meanwhile.
    pub fn unpin(&mut self, id: MessageId) {
        let sequence = id.sequence().0;
        let Some(pins) = self.pins.get_mut(&sequence) else {
            return;
        };
        let pin = pins.first_mut().expect("no empty list of pins is kept");
        let slot = pin.slot;
        pin.count -= 1;
        if pin.count == 0 {
            pins.remove(0);
        }
        if pins.is_empty() {
            self.pins.remove(&sequence);
        }
        self.segments.get_mut(slot).pins -= 1;
    }

    /// All records up to this one have been turned into events durably, so that segments with them may be used again.
    pub fn set_event_cursor(&mut self, cursor: Sequence) {
        self.event_cursor = self.event_cursor.max(cursor.0);
    }

    /// Begins to reopen the log after [`Progress::Failed`]: drops cached pages, goes on behind the last durable commit
    /// in another segment if there is one, and voids what failed. False when the log has not failed.
    pub fn begin_reopen(&mut self) -> bool {
        let State::Failed { file, chain } = &self.state else {
            return false;
        };
        self.state = State::DroppingCache { file: Some(Arc::clone(file)), chain: *chain };
        true
    }

    /// Whether this is a log without a shard of its own that has nothing left to do.
    pub fn is_drained(&self) -> bool {
        !self.directory.is_active()
            && self.index.len() == 0
            && self.bodies.iter().all(|(_, body)| !body.is_live())
            && self.pins.is_empty()
            && self.purposes.is_empty()
            && !self.has_uncommitted()
            && self.segments.in_use.iter().all(|slot| self.segments.get(*slot).last_event <= self.event_cursor)
    }

    /// Removes a log that [is drained](Self::is_drained). Its id is never used again.
    pub fn remove(self) -> io::Result<()> {
        assert!(self.is_drained(), "only a drained log is removed");
        for slot in &self.segments.in_use {
            self.directory.budget().refund(self.segments.get(*slot).charged);
        }
        self.directory.remove()
    }

    /// When [`Log::poll_operation`] should be called even if nothing happens before; on the clock that `now` is read
    /// from.
    pub fn next_timeout(&self) -> Option<Duration> {
        self.preallocation_timeout()
            .into_iter()
            .chain(self.copy_timeout())
            .chain(self.checkpoint_timeout())
            .chain(self.scrub_timeout())
            .min()
    }

    /// Where the message can be read now. While a copy of it is on its way, that is where it was before.
    fn durable_place(&self, entry: &Entry) -> Option<Place> {
        let is_durable = |place: &Place| place.offset() < self.segments.get(place.slot).end;
        if is_durable(&entry.record()) {
            return Some(entry.record());
        }
        let befores = self.uncommitted_changes().filter_map(|change| match change {
            Change::Replaced(before) if before.entry.sequence() == entry.sequence() => Some(before.entry.record()),
            _ => None,
        });
        befores.into_iter().find(is_durable)
    }

    /// What has been changed by records that are not durable yet, oldest first.
    pub(crate) fn uncommitted_changes(&self) -> impl Iterator<Item = &Change> {
        let frames = self.flight.iter().map(Flight::frame).chain(&self.closed).chain(&self.open);
        frames.flat_map(|frame| &frame.changes)
    }

    pub(crate) fn read(&mut self, place: Place, purpose: Purpose) -> Operation {
        let segment = self.segments.get_mut(place.slot);
        segment.reads += 1;
        let file = Arc::clone(&segment.file);
        let mut buffer = ReadBuffer::new();
        buffer.resize(place.length() as usize, 0);
        self.operation(Work::Read { file, offset: place.offset(), buffer }, purpose)
    }

    pub(crate) fn operation(&mut self, work: Work, purpose: Purpose) -> Operation {
        let token = self.next_token;
        self.next_token += 1;
        self.purposes.insert(token, purpose);
        Operation { token, work }
    }

    /// Bytes that the present segment still takes, as far as is decided.
    pub(crate) fn tail_room(&self, chain: Chain) -> u64 {
        let Some(tail) = self.tails[chain as usize] else {
            return 0;
        };
        let gathered = self.open.as_ref().filter(|frame| frame.slot == tail.slot).map_or(0, Frame::padded);
        self.segments.get(tail.slot).capacity.saturating_sub(tail.offset + gathered)
    }

    /// The next of a sequence of numbers that nobody can guess who does not know the seed (SplitMix64).
    pub(crate) fn draw_generation(&mut self) -> u64 {
        loop {
            self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = self.random;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^= mixed >> 31;
            if mixed != 0 {
                return mixed;
            }
        }
    }

    pub(crate) fn segment_path(&self, slot: u16) -> PathBuf {
        self.directory.segment_path(slot)
    }

    /// The largest record that an empty segment takes.
    pub(crate) fn record_bytes_max(&self) -> u64 {
        self.directory.options().segment_bytes - SEGMENT_HEADER_BYTES as u64 - crate::format::FRAME_HEADER_BYTES as u64
    }
}

/// Whether a record header that was read at `place` can be that of message `id`. Its checksum is checked with the
/// envelope.
pub(crate) fn check_header(header: &RecordHeader, id: MessageId, place: Place) -> Result<(), ReadError> {
    if header.message != id.to_raw() {
        return Err(ReadError::Damaged { what: "another record is in its place" });
    }
    if header.checked_length().map(|length| length as u64) != Some(place.length()) {
        return Err(ReadError::Damaged { what: "the record's length differs" });
    }
    Ok(())
}

/// Less room than this part of a segment counts as none.
const ROOM_SHARE: u64 = 64;
