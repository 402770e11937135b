//! Recovery: from the files of a log to its live messages, without trusting a byte that is not checked.
//!
//! The checkpoint is loaded (`load.rs`), and what was written since it was begun is replayed in the order of commits,
//! with reads and not through a map, so that a bad sector is an error and not a signal. Without a checkpoint all
//! segments are. Nothing is appended to a segment that was found at the start while there are others: later headers say
//! where it ends.
//!
//! Here are the steps, in their order, and what they share. Each has a file of its own:
//!
//! | file | what |
//! |---|---|
//! | `segments.rs` | takes up the segments, and reads their frames in the order of commits |
//! | `records.rs` | applies each record to the index |
//! | `damage.rs` | judges and reports what is lost or was never finished, and puts it aside |
//! | `messages.rs` | tells the live messages |
//! | `tails.rs` | makes sure that there is something to append to |
//! | `recovered.rs` | the types of all that recovery tells |
//!
//! See also `survey.rs`, which finds the segments and their order, `replay.rs`, which reads them, and `FORMAT.md` for
//! the case analysis.

mod damage;
mod messages;
mod records;
mod recovered;
mod segments;
mod tails;

use std::io;
use std::ops::Range;

pub use self::recovered::{Cut, Kept, Quarantine, Reason, RecordRef, Recovered};
use crate::directory::LogDirectory;
use crate::error::RecoverError;
use crate::limits::SPARES_RESERVED;
use crate::load::{Checkpoint, CheckpointSurvey};
use crate::log::Log;
use crate::record::{Outcome, Sequence};
use crate::survey::{DamagedHeader, Survey};

/// How a log is recovered.
#[derive(Debug, Clone, Copy, Default)]
pub struct RecoverOptions {
    /// Random, and another one at each start: segment generations are drawn from it.
    pub seed: u64,
    /// Records up to this one are events already, so they were durable. `u64::MAX`: nobody wants events.
    pub event_cursor: Sequence,
    /// Reads and checks all that is in segments in use, and each live message, instead of what is needed only.
    /// Summaries are not told then.
    pub reads_everything: bool,
}

impl Log {
    /// Reads a log, tells what is in it, and gets it ready to run. This is the one place where a log does I/O itself.
    pub fn recover(
        directory: LogDirectory,
        options: RecoverOptions,
        visit: &mut dyn FnMut(Recovered<'_>),
    ) -> Result<Self, RecoverError> {
        let survey = Survey::take(&directory)?;
        let checkpoints = CheckpointSurvey::take(&directory, survey.discarded())?;
        let begin = checkpoints.newest.as_ref().map(|checkpoint| (&checkpoint.header, &checkpoint.segments[..]));
        let sorted = survey.sort_out(&directory, begin, checkpoints.discarded)?;
        let mut log = Self::empty(directory, options);
        let mut recovery = Recovery {
            log: &mut log,
            visit,
            kept_files: None,
            reads_everything: options.reads_everything,
            begin_sequence: 0,
            held_below: 0,
            given_up: Vec::new(),
            damages: Vec::new(),
            base: None,
            open_ends: OpenEnds::default(),
        };
        let newest = recovery.take_checkpoints(checkpoints);
        let doubtful = recovery.read_segments(sorted, newest.as_ref());
        recovery.check_end();
        recovery.find_lost();
        recovery.count_bodies();
        recovery.report_damages();
        recovery.judge_headers(&doubtful);
        if let Some(checkpoint) = &newest {
            recovery.tell_summaries(checkpoint);
        }
        recovery.tell_messages()?;
        let open_ends = recovery.open_ends;
        for slot in log.segments.in_use.clone() {
            log.segments.note_dead(slot);
        }
        log.prepare_spares();
        if doubtful.damaged.is_empty() && !doubtful.is_any_missing && log.spares_ready() <= SPARES_RESERVED {
            log.go_on_in(&open_ends);
        }
        Ok(log)
    }
}

/// The state of one recovery.
struct Recovery<'a> {
    log: &'a mut Log,
    visit: Visit<'a>,
    /// Side files so far, once that is known.
    kept_files: Option<usize>,
    reads_everything: bool,
    /// Records from here on are applied; those before are in the checkpoint.
    begin_sequence: u64,
    /// Without a checkpoint, messages up to here may be finished, and what told so be gone.
    held_below: u64,
    /// Numbers of segments that tombstones stand for.
    given_up: Vec<u64>,
    /// Found, and not reported yet.
    damages: Vec<Damage>,
    /// Of the frame: its first outcome with final fates only.
    base: Option<(u64, Outcome)>,
    open_ends: OpenEnds,
}

/// A region of a segment that is not what was written.
struct Damage {
    slot: u16,
    segment: u64,
    region: Range<u64>,
    reason: Reason,
}

/// Segments whose end no header tells, and no checkpoint.
#[derive(Default)]
struct OpenEnds {
    /// Of each chain, its last one, if it is such.
    slots: [Option<u16>; 2],
    /// An unfinished commit is still where it was.
    has_cuts: bool,
}

/// Damaged first blocks, and what tells what they were.
struct DoubtfulHeaders {
    damaged: Vec<DamagedHeader>,
    /// Numbers of segments whose only commit was never acknowledged.
    unfinished: Vec<u64>,
    /// Segments that are read without a header, with their first commits.
    salvaged: Vec<(u16, u64)>,
    is_any_missing: bool,
    has_checkpoint: bool,
}

impl Recovery<'_> {
    fn take_checkpoints(&mut self, survey: CheckpointSurvey) -> Option<Checkpoint> {
        let CheckpointSurvey { newest, kept, files, damaged, next_number, .. } = survey;
        self.log.checkpoints.kept = kept;
        self.log.checkpoints.files = files;
        self.log.checkpoints.next_number = next_number;
        for (slot, bytes) in damaged {
            self.report(Quarantine {
                log: self.log.id(),
                file: self.log.directory.checkpoint_path(slot),
                offset: 0,
                bytes,
                reason: Reason::Checkpoint,
                kept: Kept::Not { reason: "it is only where it was, until it is written again".to_owned() },
            });
        }
        newest
    }

    fn io_error(&self, slot: u16, error: io::Error) -> RecoverError {
        RecoverError::Io { path: self.log.segment_path(slot), error }
    }
}

type Visit<'a> = &'a mut dyn FnMut(Recovered<'_>);
