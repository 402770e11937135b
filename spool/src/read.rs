//! Reading messages back, and checking what comes: a record's head and content, and a body that several share.

use std::io;
use std::sync::Arc;

use crate::commit::Purpose;
use crate::error::ReadError;
use crate::format::{RECORD_HEADER_BYTES, RecordHeader, RecordKind};
use crate::frame::Change;
use crate::index::Place;
use crate::limits::READS_MAX;
use crate::log::{Fetch, Log, Progress, check_header};
use crate::message::{Memory, Message};
use crate::record::MessageId;
use crate::storage::{Operation, ReadBuffer};

/// A message whose body is shared.
enum Shared {
    Ready(Message),
    /// The body is to be read first.
    Unread(Message),
}

impl Log {
    pub(crate) fn end_read(&mut self, slot: u16) {
        self.segments.get_mut(slot).reads -= 1;
    }

    /// A message's own record was read. The body that it shares, which is held meanwhile, comes next if it isn't at
    /// hand.
    pub(crate) fn handle_message_read(
        &mut self,
        id: MessageId,
        body: Option<u64>,
        result: Result<Message, ReadError>,
    ) -> Progress {
        let Some(sequence) = body else {
            self.reads -= 1;
            return Progress::Read { id, result };
        };
        match result.and_then(|message| self.with_shared_body(message, sequence)) {
            Ok(Shared::Ready(message)) => self.end_body_read(id, sequence, Ok(message)),
            Ok(Shared::Unread(message)) => {
                self.body_reads.push_back(message);
                Progress::Nothing
            }
            Err(error) => self.end_body_read(id, sequence, Err(error)),
        }
    }

    pub(crate) fn handle_body_read(
        &mut self,
        message: &Message,
        place: Place,
        generation: u64,
        buffer: ReadBuffer,
        result: io::Result<()>,
    ) -> Progress {
        let (id, sequence) = (message.id(), message.header().shared_body);
        let checked = result
            .map_err(|error| ReadError::from(&error))
            .and_then(|()| check_body(sequence, place, generation, &buffer));
        let message = checked.map(|header| {
            let memory = Arc::new(buffer);
            self.bodies.keep_read(sequence, &memory);
            message.with_body(Memory::Owned(memory), 0, header)
        });
        self.end_body_read(id, sequence, message)
    }

    fn end_body_read(&mut self, id: MessageId, sequence: u64, result: Result<Message, ReadError>) -> Progress {
        self.reads -= 1;
        self.bodies.release(&mut self.segments, sequence, self.durable);
        Progress::Read { id, result }
    }

    /// The read of a shared body that a message's own read has made necessary. [`Self::poll_operation`] tells it, too;
    /// who waits for the message asks here, at once.
    pub fn poll_read(&mut self) -> Option<Operation> {
        let message = self.body_reads.pop_front()?;
        Some(self.read_body(message))
    }

    fn read_body(&mut self, message: Message) -> Operation {
        let place = self.durable_body_place(message.header().shared_body).expect("a body that is read for is held");
        let generation = self.segments.get(place.slot).generation;
        self.read(place, Purpose::ReadBody { place, generation, message })
    }

    /// Joins a message with the body that it shares, if that is in memory.
    fn with_shared_body(&mut self, message: Message, sequence: u64) -> Result<Shared, ReadError> {
        let damaged = ReadError::Damaged { what: "the shared body is gone" };
        if message.header().shared_body != sequence {
            return Err(damaged);
        }
        let place = self.durable_body_place(sequence).ok_or(damaged)?;
        let segment = self.segments.get(place.slot);
        let memory = match segment.map() {
            Some(map) => Some((Memory::Mapped(Arc::clone(map)), place.offset() as usize)),
            None => self.bodies.read_lately(sequence).map(|memory| (Memory::Owned(memory), 0)),
        };
        let Some((memory, start)) = memory else {
            return Ok(Shared::Unread(message));
        };
        let header = RecordHeader::decode(memory.bytes(start, RECORD_HEADER_BYTES));
        if memory.is_lost() {
            return Ok(Shared::Unread(message));
        }
        if header.kind != RecordKind::Body as u8 || header.checked_length() != Some(place.length() as usize) {
            return Err(ReadError::Damaged { what: "another record is in the shared body's place" });
        }
        Ok(Shared::Ready(message.with_body(memory, start, header)))
    }

    /// Fetches the body that a message shares; the message itself is at hand.
    pub(crate) fn fetch_shared(&mut self, message: Message, sequence: u64) -> Result<Fetch, ReadError> {
        match self.with_shared_body(message, sequence)? {
            Shared::Ready(message) => Ok(Fetch::Ready(message)),
            Shared::Unread(_) if self.reads >= READS_MAX => Err(ReadError::Busy),
            Shared::Unread(message) => {
                self.reads += 1;
                self.bodies.hold(sequence);
                Ok(Fetch::Read(self.read_body(message)))
            }
        }
    }

    /// Where a shared body can be read now.
    fn durable_body_place(&self, sequence: u64) -> Option<Place> {
        let is_durable = |place: &Place| place.offset() < self.segments.get(place.slot).end;
        let present = self.bodies.get(sequence)?.place;
        if is_durable(&present) {
            return Some(present);
        }
        let moved_from = self.uncommitted_changes().filter_map(|change| match change {
            Change::BodyMoved { sequence: moved, from } if *moved == sequence => Some(*from),
            _ => None,
        });
        moved_from.into_iter().find(is_durable)
    }
}

/// Checks what was read for a shared body, every byte of it.
pub(crate) fn check_body(
    sequence: u64,
    place: Place,
    generation: u64,
    buffer: &[u8],
) -> Result<RecordHeader, ReadError> {
    let header = RecordHeader::decode(&buffer[..RECORD_HEADER_BYTES]);
    let is_right = header.kind == RecordKind::Body as u8
        && MessageId::from_raw(header.message).sequence().0 == sequence
        && header.checked_length().map(|length| length as u64) == Some(place.length())
        && header.head_matches(generation, &buffer[..header.head_bytes()])
        && header.content_matches(generation, &buffer[header.content_range()]);
    if is_right { Ok(header) } else { Err(ReadError::Damaged { what: "the shared body's checksum differs" }) }
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
    checked_message(id, place, generation, Memory::Owned(Arc::new(buffer)), 0)
}

/// The same where the record begins at `start` of what was read.
pub(crate) fn checked_message(
    id: MessageId,
    place: Place,
    generation: u64,
    memory: Memory,
    start: usize,
) -> Result<Message, ReadError> {
    let header = RecordHeader::decode(memory.bytes(start, RECORD_HEADER_BYTES));
    check_header(&header, id, place)?;
    let message = Message::new(memory, start, generation, header);
    message.envelope()?;
    if !message.content_matches() {
        return Err(ReadError::Damaged { what: "the content's checksum differs" });
    }
    Ok(message)
}
