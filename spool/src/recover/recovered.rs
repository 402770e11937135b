//! What recovery tells, and the words of it for the operator.

use std::fmt;
use std::path::PathBuf;

use crate::message::Message;
use crate::record::{ArchivedEnvelope, LogId, MessageId, Outcome, RecipientResult, Sequence};

/// What recovery tells, in this order: records as they are met, and damage, then the summaries, then the live messages
/// that have none, and those that are held.
#[derive(Debug)]
pub enum Recovered<'a> {
    /// A message or an outcome behind the event cursor, in sequence order.
    Record {
        sequence: Sequence,
        record: RecordRef<'a>,
    },
    /// What [`crate::Summarize`] told of a message when the checkpoint was written.
    Summary {
        id: MessageId,
        summary: &'a [u8],
        /// Recipients without a final fate, by index, ascending. `None` when the message is gone, or is told by
        /// [`Recovered::Message`] because of newer records; but what later summaries refer to may be told here.
        pending: Option<&'a [u32]>,
        /// For [`crate::Log::set_handle`]. Where it stays `None`, the summary could not be used, and the message is
        /// told by [`Recovered::Message`].
        handle: &'a mut Option<u32>,
    },
    /// A live message.
    Message {
        id: MessageId,
        /// Shares its memory with neighbours: not to be kept for long.
        message: &'a Message,
        /// Recipients without a final fate, by index, ascending.
        pending: &'a [u32],
        /// The latest state of those among them that have been deferred. For others no attempt is on record.
        results: &'a [RecipientResult],
        /// For [`crate::Log::set_handle`].
        handle: &'a mut u32,
    },
    /// A message that may have been delivered: no checkpoint could be read, and the outcomes that would tell may have
    /// been in segments that were used again. It stays until somebody decides.
    Held {
        id: MessageId,
        message: &'a Message,
        /// As far as is known.
        pending: &'a [u32],
        results: &'a [RecipientResult],
    },
    Quarantined(&'a Quarantine),
    Cut(&'a Cut),
}

/// A record in place.
#[derive(Debug, Clone, Copy)]
pub enum RecordRef<'a> {
    Message {
        id: MessageId,
        envelope: &'a ArchivedEnvelope,
        /// Octets of prefix and body.
        size: u64,
    },
    Outcome {
        outcome: &'a Outcome,
    },
}

/// Damage: bytes that are not what was written, with whole frames behind them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quarantine {
    pub log: LogId,
    pub file: PathBuf,
    pub offset: u64,
    pub bytes: u64,
    pub reason: Reason,
    pub kept: Kept,
}

/// A commit that was never finished, hence never acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    pub log: LogId,
    pub file: PathBuf,
    pub offset: u64,
    pub bytes: u64,
    pub kept: Kept,
}

/// Where the bytes of a region were put aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    File(PathBuf),
    /// They are only where they were.
    Not {
        reason: String,
    },
}

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// No whole frame where one must be.
    Frame,
    /// One record in a whole frame; `message` is what its header says it is about.
    Record { sequence: Sequence, message: MessageId },
    /// The first block; the segment's frames were found all the same, if there are any.
    SegmentHeader,
    /// The file is shorter than it was.
    Truncated,
    /// A second file with the same segment number.
    Duplicate,
    /// A segment that was in use is not there.
    Missing { segment: u64 },
    /// A live message, or what is known of its recipients, was in a segment that is not there.
    Lost { message: MessageId },
    /// The newest records, up to the last that is an event already, are not there.
    EndMissing { from: Sequence, to: Sequence },
    /// A finished checkpoint.
    Checkpoint,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Frame => f.write_str("damaged frame"),
            Self::Record { sequence, message } => {
                write!(f, "damaged record {} about message {message}", sequence.0)
            }
            Self::SegmentHeader => f.write_str("damaged segment header"),
            Self::Truncated => f.write_str("the file is shorter than it was"),
            Self::Missing { segment } => write!(f, "segment {segment} is missing"),
            Self::Duplicate => f.write_str("a second file with the same segment number"),
            Self::Lost { message } => write!(f, "message {message} was in a segment that is missing"),
            Self::EndMissing { from, to } => {
                write!(f, "records {} to {} are missing; the event log has them", from.0, to.0)
            }
            Self::Checkpoint => f.write_str("damaged checkpoint"),
        }
    }
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "kept in {}", path.display()),
            Self::Not { reason } => write!(f, "not kept ({reason})"),
        }
    }
}

impl fmt::Display for Quarantine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, offset, bytes, reason, kept, .. } = self;
        write!(f, "{}: {reason}: {bytes} bytes at {offset} quarantined, {kept}", file.display())
    }
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, offset, bytes, kept, .. } = self;
        write!(f, "{}: unfinished commit: {bytes} bytes at {offset} cut, {kept}", file.display())
    }
}
