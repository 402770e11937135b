//! What a log has done and holds, in numbers.

use crate::log::Log;

#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Counters {
    pub(crate) messages: u64,
    pub(crate) outcomes: u64,
    pub(crate) copies: u64,
    pub(crate) commits: u64,
    pub(crate) bytes_written: u64,
    pub(crate) bytes_frames: u64,
    pub(crate) bytes_messages: u64,
    pub(crate) bytes_outcomes: u64,
    pub(crate) bytes_copied: u64,
    pub(crate) bytes_checkpoints: u64,
    pub(crate) checkpoints: u64,
    pub(crate) segments_retired: u64,
    pub(crate) segments_given_up: u64,
    pub(crate) damaged: u64,
    pub(crate) scrubbed: u64,
    pub(crate) failures: u64,
}

/// Figures of a log, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statistics {
    pub live_messages: u64,
    /// Bytes of the records that count: theirs, those of outcomes that tell where they stand, and of bodies that they
    /// share.
    pub live_bytes: u64,
    /// Bytes in segments that are in use, dead records included: what counts against the maximum size.
    pub used_bytes: u64,
    /// Bytes of all segment files.
    pub allocated_bytes: u64,
    pub segments_in_use: u64,
    pub segments_spare: u64,
    /// Waiting for their commit.
    pub pending_bytes: u64,
    /// Since the log was recovered:
    pub messages_appended: u64,
    pub outcomes_appended: u64,
    pub messages_copied: u64,
    pub commits: u64,
    /// Given to writes, padding, headers, copies and checkpoints included, zeroing excluded.
    pub bytes_written: u64,
    /// Of these, in records of messages, of outcomes, and of copies and states.
    pub bytes_messages: u64,
    pub bytes_outcomes: u64,
    pub bytes_copied: u64,
    pub bytes_checkpoints: u64,
    /// Checkpoints that were completed.
    pub checkpoints: u64,
    /// Segments that were made free for use again.
    pub segments_retired: u64,
    /// Those of them that did not wait for checkpoints, since tombstones stand for them.
    pub segments_given_up: u64,
    /// Times that copy-forward or the scrub found something that could not be read.
    pub damaged: u64,
    /// Messages that the scrub has checked.
    pub messages_scrubbed: u64,
    pub write_failures: u64,
}

impl Log {
    pub fn statistics(&self) -> Statistics {
        let in_use = || self.segments.in_use.iter().map(|slot| self.segments.get(*slot));
        Statistics {
            live_messages: self.index.len() as u64,
            live_bytes: in_use().map(|segment| segment.live_bytes).sum(),
            used_bytes: in_use().map(|segment| segment.charged).sum(),
            allocated_bytes: self.segments.allocated_bytes(),
            segments_in_use: self.segments.in_use.len() as u64,
            segments_spare: self.segments.spares.len() as u64,
            pending_bytes: self.pending_bytes,
            messages_appended: self.counters.messages,
            outcomes_appended: self.counters.outcomes,
            messages_copied: self.counters.copies,
            commits: self.counters.commits,
            bytes_written: self.counters.bytes_written,
            bytes_messages: self.counters.bytes_messages,
            bytes_outcomes: self.counters.bytes_outcomes,
            bytes_copied: self.counters.bytes_copied,
            bytes_checkpoints: self.counters.bytes_checkpoints,
            checkpoints: self.counters.checkpoints,
            segments_retired: self.counters.segments_retired,
            segments_given_up: self.counters.segments_given_up,
            damaged: self.counters.damaged,
            messages_scrubbed: self.counters.scrubbed,
            write_failures: self.counters.failures,
        }
    }
}
