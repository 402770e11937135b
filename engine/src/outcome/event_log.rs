//! The event log's bytes and its subscribers; the files are `runtime/event_file.rs`.
//!
//! An event file is a row of *sealed frames*. Each is a zstd frame of JSON lines followed by a zstd skippable frame,
//! the seal, which zstd tools pass over. The seal says how far each log of the spool has been told:
//!
//! ```text
//!  0  u32   0x184D2A50, a skippable frame of RFC 8878 §3.1.2
//!  4  u32   bytes that follow
//!  8  [u8;8] "PRevents"
//! 16  u16   version, 1
//! 18  u16   n, the number of logs
//! 20  u32   events in the data frame
//! 24  [u8;16] node id
//! 40  u64   where in the file the data frame begins
//! 48  u32   length of the data frame
//! 52  u32   CRC32C of the data frame
//! 56  n ×   (u16 log id, u16 zero, u64 last sequence told), 12 bytes each
//!     u32   length of the seal, all of it
//!     u32   CRC32C of the seal up to here
//! ```
//! All little-endian. A seal's cursors are complete, so the last one of the newest file is all that a start needs.
//!
//! Invariants: a record is encoded in the frame whose seal passes its sequence and in no other. A data frame without
//! its seal does not count: it is cut at the next start and derived again. A seal counts only where it was written
//! (its own offset), after the bytes it was written for (their CRC).
//!
//! Over 500 lines: frames, cursors and subscriptions share their numbers.

use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use postrider_spool::checksum::crc32c;
use postrider_spool::record::{LogId, Sequence};

use super::event::{EventRecord, LoggedRecord, NodeId, events, write_line};
use crate::limits::{EVENT_FRAME_BYTES_MAX, EVENT_STREAM_EVENTS_MAX, EVENT_STREAMS_MAX};

/// For each log the last sequence whose events are told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cursors(BTreeMap<LogId, Sequence>);

impl Cursors {
    /// Sequence 0, which no record has, where nothing of the log was told.
    pub fn get(&self, log: LogId) -> Sequence {
        self.0.get(&log).copied().unwrap_or_default()
    }

    pub fn iter(&self) -> impl Iterator<Item = (LogId, Sequence)> {
        self.0.iter().map(|(&log, &sequence)| (log, sequence))
    }

    /// Never goes back. Says whether it moved.
    pub fn advance(&mut self, log: LogId, sequence: Sequence) -> bool {
        let moves = sequence > self.get(log);
        if moves {
            self.0.insert(log, sequence);
        }
        moves
    }

    /// What of `self` is ahead of `earlier`.
    pub(crate) fn ahead_of(&self, earlier: &Self) -> Vec<(LogId, Sequence)> {
        self.iter().filter(|&(log, sequence)| sequence > earlier.get(log)).collect()
    }
}

/// Gathers records into one frame at a time: [`push`](Self::push) until full or due, [`compress`](Self::compress)
/// once, [`seal`](Self::seal) for the place where it will stand (again when the place changes), and when it is
/// durable [`clear`](Self::clear).
pub(crate) struct FrameEncoder {
    node: NodeId,
    cursors: Cursors,
    lines: Vec<u8>,
    events: u32,
    compressor: zstd::bulk::Compressor<'static>,
    /// The compressed data frame, then its seal.
    frame: Vec<u8>,
    data_bytes: usize,
}

impl FrameEncoder {
    pub(crate) fn new(node: NodeId, cursors: Cursors) -> io::Result<Self> {
        let mut compressor = zstd::bulk::Compressor::new(COMPRESSION_LEVEL)?;
        compressor.include_checksum(true)?;
        Ok(Self { node, cursors, lines: Vec::new(), events: 0, compressor, frame: Vec::new(), data_bytes: 0 })
    }

    /// Takes a record unless its log was told up to it or beyond. Records of one log come in the order of their
    /// sequences.
    pub(crate) fn push(&mut self, record: &LoggedRecord, subscribers: &Subscribers) -> bool {
        assert!(self.data_bytes == 0, "a compressed frame takes no more records");
        if !self.cursors.advance(record.log, record.sequence) {
            return false;
        }
        let wanted = subscribers.any();
        for event in events(record, &self.node) {
            let start = self.lines.len();
            write_line(&event, &mut self.lines);
            self.events += 1;
            if wanted {
                subscribers.publish(&Arc::new(EventRecord::new(&event, &self.lines[start..])));
            }
        }
        true
    }

    pub(crate) fn cursors(&self) -> &Cursors {
        &self.cursors
    }

    pub(crate) fn events(&self) -> u32 {
        self.events
    }

    pub(crate) fn is_full(&self) -> bool {
        self.lines.len() >= EVENT_FRAME_BYTES_MAX
    }

    pub(crate) fn compress(&mut self) -> io::Result<()> {
        if self.data_bytes > 0 {
            return Ok(());
        }
        self.frame.clear();
        self.frame.reserve(zstd::zstd_safe::compress_bound(self.lines.len()));
        self.data_bytes = self.compressor.compress_to_buffer(&self.lines, &mut self.frame)?;
        Ok(())
    }

    /// The bytes to write at `offset`.
    pub(crate) fn seal(&mut self, offset: u64) -> &[u8] {
        assert!(self.data_bytes > 0, "sealed before it was compressed");
        self.frame.truncate(self.data_bytes);
        let seal = Seal {
            events: self.events,
            node: self.node,
            data_offset: offset,
            data_bytes: u32::try_from(self.data_bytes).expect("a frame is far below 4 GiB"),
            data_crc: crc32c(&self.frame),
            cursors: self.cursors.clone(),
        };
        seal.write(&mut self.frame);
        &self.frame
    }

    pub(crate) fn clear(&mut self) {
        self.lines.clear();
        // One huge record must not hold its memory for ever.
        self.lines.shrink_to(2 * EVENT_FRAME_BYTES_MAX);
        self.events = 0;
        self.data_bytes = 0;
    }
}

/// What the skippable frame behind a data frame says; the module's head has its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seal {
    pub(crate) events: u32,
    pub(crate) node: NodeId,
    pub(crate) data_offset: u64,
    pub(crate) data_bytes: u32,
    pub(crate) data_crc: u32,
    pub(crate) cursors: Cursors,
}

impl Seal {
    fn write(&self, out: &mut Vec<u8>) {
        let start = out.len();
        let length = SEAL_BYTES_MIN + self.cursors.0.len() * CURSOR_BYTES;
        let length = u32::try_from(length).expect("a spool has at most 65,536 logs");
        out.extend_from_slice(&SKIPPABLE_MAGIC);
        out.extend_from_slice(&(length - 8).to_le_bytes());
        out.extend_from_slice(TAG);
        out.extend_from_slice(&VERSION.to_le_bytes());
        let logs = u16::try_from(self.cursors.0.len()).expect("a spool has fewer than 65,536 logs");
        out.extend_from_slice(&logs.to_le_bytes());
        out.extend_from_slice(&self.events.to_le_bytes());
        out.extend_from_slice(&self.node.0);
        out.extend_from_slice(&self.data_offset.to_le_bytes());
        out.extend_from_slice(&self.data_bytes.to_le_bytes());
        out.extend_from_slice(&self.data_crc.to_le_bytes());
        for (log, sequence) in self.cursors.iter() {
            out.extend_from_slice(&log.0.to_le_bytes());
            out.extend_from_slice(&[0, 0]);
            out.extend_from_slice(&sequence.0.to_le_bytes());
        }
        out.extend_from_slice(&length.to_le_bytes());
        let crc = crc32c(&out[start..]);
        out.extend_from_slice(&crc.to_le_bytes());
        assert!(out.len() - start == length as usize);
    }

    /// Reads the seal that begins where `bytes` begin, `offset` bytes into the file. `bytes` may go on behind it.
    /// Gives its length too.
    pub(crate) fn read(bytes: &[u8], offset: u64) -> Option<(Self, usize)> {
        let field = |at: usize| bytes.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let long = |at: usize| Some(u64::from(field(at)?) | u64::from(field(at + 4)?) << 32);
        if bytes.get(..4)? != SKIPPABLE_MAGIC || bytes.get(8..16)? != TAG {
            return None;
        }
        let version_and_logs = field(16)?;
        if version_and_logs & 0xffff != u32::from(VERSION) {
            return None;
        }
        let logs = (version_and_logs >> 16) as usize;
        let length = SEAL_BYTES_MIN + logs * CURSOR_BYTES;
        let lengths_agree = field(4)? as usize + 8 == length && field(length - 8)? as usize == length;
        if !lengths_agree || field(length - 4)? != crc32c(&bytes[..length - 4]) {
            return None;
        }
        let mut cursors = Cursors::default();
        for place in 0..logs {
            let at = CURSORS_AT + place * CURSOR_BYTES;
            cursors.advance(LogId((field(at)? & 0xffff) as u16), Sequence(long(at + 4)?));
        }
        let seal = Self {
            events: field(20)?,
            node: NodeId(bytes[24..40].try_into().ok()?),
            data_offset: long(40)?,
            data_bytes: field(48)?,
            data_crc: field(52)?,
            cursors,
        };
        // Elsewhere in the file, or in another one, it would say nothing about the bytes before it.
        let at_its_place = seal.data_offset.checked_add(u64::from(seal.data_bytes)) == Some(offset);
        at_its_place.then_some((seal, length))
    }

    /// The last seal that lies wholly in `window`, which begins `offset` bytes into the file; and where it begins.
    pub(crate) fn find_last(window: &[u8], offset: u64) -> Option<(Self, u64, usize)> {
        let mut end = window.len();
        while let Some(at) = memchr::memmem::rfind(&window[..end], TAG) {
            if let Some(begin) = at.checked_sub(8) {
                let place = offset + begin as u64;
                if let Some((seal, length)) = Self::read(&window[begin..], place) {
                    return Some((seal, place, length));
                }
            }
            end = at + TAG.len() - 1;
        }
        None
    }
}

/// Who gets events as they are encoded. Publishing never waits.
#[derive(Default)]
pub(crate) struct Subscribers {
    streams: Mutex<Vec<Arc<Stream>>>,
}

impl Subscribers {
    /// Beyond [`EVENT_STREAMS_MAX`] the stream has ended from the start.
    pub(crate) fn subscribe(&self) -> EventStream {
        let stream = Arc::new(Stream::default());
        let mut streams = lock(&self.streams);
        streams.retain(|stream| Arc::strong_count(stream) > 1);
        if streams.len() < EVENT_STREAMS_MAX {
            streams.push(Arc::clone(&stream));
        } else {
            lock(&stream.state).ended = true;
        }
        EventStream { stream }
    }

    fn any(&self) -> bool {
        !lock(&self.streams).is_empty()
    }

    fn publish(&self, event: &Arc<EventRecord>) {
        // A stream that only we hold has lost its reader.
        lock(&self.streams).retain(|stream| {
            let read = Arc::strong_count(stream) > 1;
            if read {
                stream.push(event);
            }
            read
        });
    }

    pub(crate) fn end(&self) {
        for stream in lock(&self.streams).drain(..) {
            lock(&stream.state).ended = true;
            stream.wake();
        }
    }
}

/// The events of an engine from the moment of subscription on, as they happen.
///
/// It holds at most `EVENT_STREAM_EVENTS_MAX` events; a reader that lags further loses the newer ones and finds
/// [`EventItem::Lagged`] in their place. What was missed is in the event files. After a crash some events may come a
/// second time, with the same `event_id`.
pub struct EventStream {
    stream: Arc<Stream>,
}

/// What an [`EventStream`] yields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventItem {
    Event(Arc<EventRecord>),
    /// So many events were dropped here.
    Lagged(u64),
}

impl EventStream {
    /// What is there already. None also when the engine has ended.
    pub fn try_next(&mut self) -> Option<EventItem> {
        lock(&self.stream.state).take()
    }

    /// Waits; None when the engine has ended and everything was read.
    pub fn next_blocking(&mut self) -> Option<EventItem> {
        let mut state = lock(&self.stream.state);
        loop {
            let item = state.take();
            if item.is_some() || state.ended {
                return item;
            }
            state = self.stream.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits no longer than `patience`; None when it ran out or the engine has ended.
    pub fn next_timeout(&mut self, patience: Duration) -> Option<EventItem> {
        let state = lock(&self.stream.state);
        let quiet = |state: &mut StreamState| state.waiting.is_empty() && state.lagged == 0 && !state.ended;
        let waited = self.stream.arrived.wait_timeout_while(state, patience, quiet);
        waited.unwrap_or_else(PoisonError::into_inner).0.take()
    }

    /// Like [`next_blocking`](Self::next_blocking) for a task of any async runtime.
    pub async fn next(&mut self) -> Option<EventItem> {
        poll_fn(|context| self.poll_next(context)).await
    }

    /// For stream adapters.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<EventItem>> {
        let mut state = lock(&self.stream.state);
        let item = state.take();
        if item.is_some() || state.ended {
            return Poll::Ready(item);
        }
        state.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

#[derive(Default)]
struct Stream {
    state: Mutex<StreamState>,
    arrived: Condvar,
}

#[derive(Default)]
struct StreamState {
    waiting: VecDeque<Arc<EventRecord>>,
    /// Dropped since `waiting` was full. While it is not 0 nothing is added, so its place is behind `waiting`.
    lagged: u64,
    ended: bool,
    waker: Option<Waker>,
}

impl StreamState {
    fn take(&mut self) -> Option<EventItem> {
        if let Some(event) = self.waiting.pop_front() {
            return Some(EventItem::Event(event));
        }
        let lagged = std::mem::take(&mut self.lagged);
        (lagged > 0).then_some(EventItem::Lagged(lagged))
    }
}

impl Stream {
    fn push(&self, event: &Arc<EventRecord>) {
        let mut state = lock(&self.state);
        if state.lagged > 0 || state.waiting.len() >= EVENT_STREAM_EVENTS_MAX {
            state.lagged += 1;
            return;
        }
        state.waiting.push_back(Arc::clone(event));
        drop(state);
        self.wake();
    }

    fn wake(&self) {
        self.arrived.notify_one();
        let waker = lock(&self.state).waker.take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// A panic ends the process, so a poisoned lock is met in tests only; the state behind these locks is whole anyway.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const SKIPPABLE_MAGIC: [u8; 4] = 0x184D_2A50_u32.to_le_bytes();
const TAG: &[u8; 8] = b"PRevents";
const VERSION: u16 = 1;
const CURSORS_AT: usize = 56;
const CURSOR_BYTES: usize = 12;
const SEAL_BYTES_MIN: usize = CURSORS_AT + 8;
/// No seal is longer.
pub(crate) const SEAL_BYTES_MAX: usize = SEAL_BYTES_MIN + u16::MAX as usize * CURSOR_BYTES;
/// Level 1 halves the size again compared to none at a third of level 3's cost.
const COMPRESSION_LEVEL: i32 = 1;

#[cfg(test)]
mod tests {
    use postrider_spool::record::{Fate, MessageId};

    use super::*;
    use crate::outcome::event::tests::{NODE, message, outcome};
    use crate::outcome::event::{EventKind, Logged};

    fn encoder() -> FrameEncoder {
        FrameEncoder::new(NODE, Cursors::default()).unwrap()
    }

    fn sealed(records: &[LoggedRecord], offset: u64) -> Vec<u8> {
        let mut encoder = encoder();
        for record in records {
            assert!(encoder.push(record, &Subscribers::default()));
        }
        encoder.compress().unwrap();
        encoder.seal(offset).to_vec()
    }

    #[test]
    fn a_frame_is_lines_for_zstd_and_cursors_for_us() {
        let records = [message(1, 7, &["a@b.example"]), message(0x102, 1 << 40, &["a@b.example", "c@d.example"])];
        let bytes = sealed(&records, 1_000);
        let text = String::from_utf8(zstd::decode_all(&bytes[..]).unwrap()).unwrap();
        assert_eq!(text.lines().count(), 3);

        let (seal, at, length) = Seal::find_last(&bytes, 1_000).unwrap();
        assert_eq!(at - 1_000 + length as u64, bytes.len() as u64);
        assert_eq!((seal.events, seal.node, seal.data_offset), (3, NODE, 1_000));
        assert_eq!(seal.data_crc, crc32c(&bytes[..seal.data_bytes as usize]));
        let cursors: Vec<_> = seal.cursors.iter().collect();
        assert_eq!(cursors, [(LogId(1), Sequence(7)), (LogId(0x102), Sequence(1 << 40))]);
    }

    #[test]
    fn the_seal_has_the_documented_bytes() {
        let mut cursors = Cursors::default();
        cursors.advance(LogId(0x0201), Sequence(0x1122_3344_5566));
        let seal = Seal { events: 5, node: NODE, data_offset: 3, data_bytes: 2, data_crc: 0xa1b2_c3d4, cursors };
        let mut bytes = Vec::new();
        seal.write(&mut bytes);
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            hex,
            "502a4d184400000050526576656e74730100010005000000557f3ad42c8c41ee976e782d7e12e173\
             030000000000000002000000d4c3b2a10102000066554433221100004c000000b645a96a"
        );
        assert_eq!(Seal::read(&bytes, 5), Some((seal, 76)));
    }

    #[test]
    fn a_seal_counts_only_whole_unchanged_and_at_its_place() {
        let bytes = sealed(&[message(1, 7, &["a@b.example"])], 50);
        let (_, at, length) = Seal::find_last(&bytes, 50).unwrap();
        let begin = (at - 50) as usize;
        assert!(Seal::read(&bytes[begin..], at).is_some());
        assert!(Seal::read(&bytes[begin..], at + 1).is_none(), "at another place");
        for cut in begin..begin + length {
            assert!(Seal::read(&bytes[begin..cut], at).is_none(), "cut at {cut}");
        }
        for place in begin..begin + length {
            for bit in 0..8 {
                let mut changed = bytes.clone();
                changed[place] ^= 1 << bit;
                assert!(Seal::read(&changed[begin..], at).is_none(), "bit {bit} of byte {place}");
            }
        }
    }

    #[test]
    fn a_record_told_before_is_passed_over() {
        let mut encoder = encoder();
        let nobody = Subscribers::default();
        assert!(encoder.push(&message(1, 7, &["a@b.example"]), &nobody));
        assert!(!encoder.push(&message(1, 7, &["a@b.example"]), &nobody));
        assert!(!encoder.push(&message(1, 3, &["a@b.example"]), &nobody));
        assert!(encoder.push(&message(2, 3, &["a@b.example"]), &nobody));
        assert_eq!(encoder.events(), 2);
    }

    #[test]
    fn subscribers_get_events_in_order_and_learn_what_they_missed() {
        let subscribers = Subscribers::default();
        let mut stream = subscribers.subscribe();
        let mut encoder = encoder();
        let record = message(1, 1, &["a@b.example"]);
        encoder.push(&record, &subscribers);
        let Some(EventItem::Event(event)) = stream.try_next() else { panic!("no event") };
        assert_eq!(event.kind, EventKind::Reception);
        assert_eq!(event.to_json(), crate::outcome::event::tests::lines(&record)[0]);
        assert_eq!(stream.try_next(), None);

        for _ in 0..EVENT_STREAM_EVENTS_MAX + 3 {
            subscribers.publish(&event);
        }
        for _ in 0..EVENT_STREAM_EVENTS_MAX {
            assert!(matches!(stream.try_next(), Some(EventItem::Event(_))));
            // While it lags nothing is slipped in before the marker.
            subscribers.publish(&event);
        }
        assert_eq!(stream.try_next(), Some(EventItem::Lagged(3 + EVENT_STREAM_EVENTS_MAX as u64)));
        subscribers.publish(&event);
        assert!(matches!(stream.try_next(), Some(EventItem::Event(_))));
        subscribers.end();
        assert_eq!(stream.next_blocking(), None);
    }

    #[test]
    fn a_dropped_stream_costs_nothing_and_streams_are_bounded() {
        let subscribers = Subscribers::default();
        let streams: Vec<_> = (0..EVENT_STREAMS_MAX).map(|_| subscribers.subscribe()).collect();
        assert_eq!(subscribers.subscribe().next_blocking(), None);
        drop(streams);
        let mut encoder = encoder();
        let mut another = subscribers.subscribe();
        encoder.push(&message(1, 1, &["a@b.example"]), &subscribers);
        assert!(another.try_next().is_some(), "those that are gone leave room");
        drop(another);
        encoder.push(&message(1, 2, &["a@b.example"]), &subscribers);
        assert!(!subscribers.any());
    }

    #[test]
    fn a_waiting_reader_is_woken() {
        let subscribers = Arc::new(Subscribers::default());
        let mut blocking = subscribers.subscribe();
        let mut asynchronous = subscribers.subscribe();
        let reader = std::thread::spawn(move || blocking.next_blocking());
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let task = std::thread::spawn(move || runtime.block_on(asynchronous.next()));
        let record = outcome(1, 2, MessageId::new(LogId(1), Sequence(1)), &[Fate::Delivered]);
        assert!(matches!(record.record, Logged::Outcome(_)));
        encoder().push(&record, &subscribers);
        assert!(matches!(reader.join().unwrap(), Some(EventItem::Event(_))));
        assert!(matches!(task.join().unwrap(), Some(EventItem::Event(_))));
    }
}
