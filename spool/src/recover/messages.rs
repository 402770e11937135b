//! The live messages: those that the checkpoint has summaries of, then the others, read and checked one after another.

use std::io;
use std::sync::Arc;

use super::Recovery;
use super::records::COPY;
use super::recovered::Recovered;
use crate::copy_forward::{add_older, read_state};
use crate::error::RecoverError;
use crate::format::{RECORD_HEADER_BYTES, RecordHeader};
use crate::index::{Entry, HELD, NOWHERE, Place, TOUCHED};
use crate::limits::RECOVERY_READ_BYTES;
use crate::load::Checkpoint;
use crate::log::check_header;
use crate::message::{Memory, Message};
use crate::packed;
use crate::record::{MessageId, RecipientResult, Sequence};
use crate::segment::Segment;
use crate::storage::{ReadBuffer, read_exact_at};

impl Recovery<'_> {
    pub(super) fn tell_summaries(&mut self, checkpoint: &Checkpoint) {
        let log = self.log.id();
        let visit = &mut *self.visit;
        if self.reads_everything {
            return;
        }
        checkpoint.tell_summaries(&mut self.log.index, |sequence, pending, summary| {
            let mut handle = None;
            let id = MessageId::new(log, Sequence(sequence));
            visit(Recovered::Summary { id, summary, pending, handle: &mut handle });
            handle
        });
    }

    /// Reads and tells the messages that no summary told.
    pub(super) fn tell_messages(&mut self) -> Result<(), RecoverError> {
        let place = |entry: &Entry| {
            let place = entry.record();
            (self.log.segments.get(place.slot).number, place.offset16, entry.sequence())
        };
        let is_told_now = |entry: &&Entry| self.reads_everything || entry.has(TOUCHED);
        let mut order: Vec<(u64, u32, u64)> = self.log.index.iter().filter(is_told_now).map(place).collect();
        order.sort_unstable();
        let mut records = Window::new(RECOVERY_READ_BYTES);
        let mut states = Window::new(STATES_WINDOW_BYTES);
        for (_, _, sequence) in order {
            self.log.index.set_flag(sequence, TOUCHED, false);
            let entry = *self.log.index.get(sequence).expect("an entry that was just listed");
            let place = entry.record();
            let id = MessageId::new(self.log.id(), Sequence(sequence));
            let segment = self.log.segments.get(place.slot);
            let (memory, start) = records.get(segment, place).map_err(|error| self.io_error(place.slot, error))?;
            let header = RecordHeader::decode(&memory[start..start + RECORD_HEADER_BYTES]);
            let mut message = Message::new(Memory::Owned(memory), start, segment.generation, header);
            let is_right = check_header(&header, id, place).is_ok()
                && message.envelope().is_ok()
                && (!self.reads_everything || message.content_matches());
            if !is_right {
                // Records behind the checkpoint were whole a moment ago; others are read only now.
                self.quarantine_record(&entry, id);
                continue;
            }
            if let Some(body) = self.log.index.body(&entry) {
                match self.read_shared_body(body) {
                    Some((memory, header)) => message = message.with_body(memory, 0, header),
                    None => {
                        self.quarantine_record(&entry, id);
                        continue;
                    }
                }
            }
            let pending = self.log.index.pending(&entry);
            let results = self.latest_results(&entry, &message, &pending, &mut states);
            if entry.has(HELD) {
                (self.visit)(Recovered::Held { id, message: &message, pending: &pending, results: &results });
                continue;
            }
            let mut handle = 0;
            let told =
                Recovered::Message { id, message: &message, pending: &pending, results: &results, handle: &mut handle };
            (self.visit)(told);
            self.log.index.set_handle(sequence, handle);
        }
        Ok(())
    }

    fn read_shared_body(&mut self, sequence: u64) -> Option<(Memory, RecordHeader)> {
        let place = self.log.bodies.get(sequence)?.place;
        if place.slot == NOWHERE {
            return None;
        }
        let segment = self.log.segments.get(place.slot);
        let memory = match self.log.bodies.read_lately(sequence) {
            Some(memory) => memory,
            None => {
                let mut memory = ReadBuffer::new();
                memory.resize(place.length() as usize, 0);
                read_exact_at(segment.file.as_ref(), &mut memory, place.offset()).ok()?;
                Arc::new(memory)
            }
        };
        let header = crate::read::check_body(sequence, place, segment.generation, &memory).ok()?;
        self.log.bodies.keep_read(sequence, &memory);
        Some((Memory::Owned(memory), header))
    }

    /// What the outcomes since the record, and the copied state in it, say of the pending recipients.
    fn latest_results(
        &self,
        entry: &Entry,
        message: &Message,
        pending: &[u32],
        window: &mut Window,
    ) -> Vec<RecipientResult> {
        let mut results = Vec::new();
        for place in self.log.index.states(entry) {
            let segment = self.log.segments.get(place.slot);
            let Ok((memory, start)) = window.get(segment, place) else { continue };
            let record = &memory[start..start + place.length() as usize];
            let told = read_state(message.id(), segment.generation, record);
            add_older(&mut results, told.into_iter().flatten());
        }
        let header = message.header();
        if header.kind == COPY {
            let state = packed::read_state(header.schema, message.bytes(header.state_range()));
            add_older(&mut results, state.into_iter().flat_map(|state| state.deferred));
        }
        results.retain(|result| pending.binary_search(&result.index).is_ok());
        results.sort_unstable_by_key(|result| result.index);
        results
    }
}

/// A piece of one segment, so that neighbouring records are read together.
struct Window {
    bytes: usize,
    /// Of the segment, so that a slot that is used again is not taken for the old one.
    number: u64,
    start: u64,
    memory: Arc<ReadBuffer>,
}

impl Window {
    fn new(bytes: usize) -> Self {
        Self { bytes, number: 0, start: 0, memory: Arc::default() }
    }

    /// The memory that holds the record, and where in it.
    fn get(&mut self, segment: &Segment, place: Place) -> io::Result<(Arc<ReadBuffer>, usize)> {
        let held = self.start..self.start + self.memory.len() as u64;
        let wanted = place.offset()..place.offset() + place.length();
        if self.number != segment.number || wanted.start < held.start || wanted.end > held.end {
            let end = (wanted.start + self.bytes as u64).min(segment.capacity).max(wanted.end);
            let mut memory = ReadBuffer::new();
            memory.resize((end - wanted.start) as usize, 0);
            read_exact_at(segment.file.as_ref(), &mut memory, wanted.start)?;
            self.memory = Arc::new(memory);
            self.number = segment.number;
            self.start = wanted.start;
        }
        Ok((Arc::clone(&self.memory), (place.offset() - self.start) as usize))
    }
}

const STATES_WINDOW_BYTES: usize = 256 << 10;
