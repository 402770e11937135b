//! The slow scrub: every live message is read from the medium again and again, and checked, so that damage is told
//! while there may still be another copy somewhere, and not when the message is due.
//!
//! It goes over the index in the order of sequences, one record at a time, at [`SCRUB_BYTES_PER_S`], and rests between
//! two rounds. What it finds damaged stays where it is; nobody but an operator can do better.

use std::io;
use std::time::Duration;

use crate::commit::Purpose;
use crate::error::ReadError;
use crate::index::Place;
use crate::limits::{SCRUB_BYTES_PER_S, SCRUB_REST_S};
use crate::log::{Log, Progress, State};
use crate::read::read_message;
use crate::record::{MessageId, Sequence};
use crate::storage::{Operation, ReadBuffer};

/// Where the scrub stands.
#[derive(Debug, Default)]
pub(crate) struct Scrub {
    next: u64,
    next_at: Duration,
    is_reading: bool,
}

impl Log {
    pub(crate) fn poll_scrub(&mut self, now: Duration) -> Option<Operation> {
        if self.scrub.is_reading || now < self.scrub.next_at || !matches!(self.state, State::Open) {
            return None;
        }
        let Some(entry) = self.index.iter_from(self.scrub.next).next().copied() else {
            self.scrub.next = 0;
            self.scrub.next_at = now + Duration::from_secs(SCRUB_REST_S);
            return None;
        };
        let place = entry.record();
        self.scrub.next = entry.sequence() + 1;
        self.scrub.next_at = now + Duration::from_nanos(place.length() * 1_000_000_000 / SCRUB_BYTES_PER_S);
        if place.offset() >= self.segments.get(place.slot).end {
            return None; // Not durable yet: the next round finds it.
        }
        self.scrub.is_reading = true;
        let id = MessageId::new(self.id(), Sequence(entry.sequence()));
        let generation = self.segments.get(place.slot).generation;
        Some(self.read(place, Purpose::Scrub { id, place, generation }))
    }

    pub(crate) fn handle_scrub(
        &mut self,
        id: MessageId,
        place: Place,
        generation: u64,
        buffer: ReadBuffer,
        result: io::Result<()>,
    ) -> Progress {
        self.scrub.is_reading = false;
        self.counters.scrubbed += 1;
        match read_message(id, place, generation, buffer, result) {
            Ok(_) => Progress::Nothing,
            Err(error @ (ReadError::Damaged { .. } | ReadError::Io { .. })) => {
                self.counters.damaged += 1;
                Progress::Damaged { id, error }
            }
            Err(_) => Progress::Nothing,
        }
    }

    pub(crate) fn scrub_timeout(&self) -> Option<Duration> {
        let is_due = matches!(self.state, State::Open) && !self.scrub.is_reading && self.index.len() > 0;
        is_due.then_some(self.scrub.next_at)
    }
}
