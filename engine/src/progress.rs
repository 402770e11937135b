//! What a shard is at, noted where it outlives the process.
//!
//! The runtime keeps this in a mapped file, so that a start finds what the end of the process left: the message that
//! each shard had in its hands, and how many recipients' messages had gone out whose outcome was not durable. Noting is
//! a few plain stores. See `runtime/progress_file.rs` for the file and what a start makes of it.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use postrider_spool::record::MessageId;

use crate::limits::UNCLEAN_STARTS_MAX;

/// One shard's. Only that shard writes it, but for a start, which does so before there is one.
///
/// Two counters instead of one, since a message is sent by its pair's owner and recorded by its home; only the sum over
/// all shards means something.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct Progress {
    /// [`MessageId::to_raw`]; 0 is none, as no log has a sequence 0.
    working_on: AtomicU64,
    sent: AtomicU64,
    recorded: AtomicU64,
}

/// Where a shard's progress is kept.
pub trait KeepsProgress: Deref<Target = Progress> + fmt::Debug + Send + Sync {}

impl<T: Deref<Target = Progress> + fmt::Debug + Send + Sync> KeepsProgress for T {}

pub type SharedProgress = Arc<dyn KeepsProgress>;

/// A message that shards had in their hands when the process died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Suspect {
    pub message: MessageId,
    /// Starts that found it so, since the last clean end.
    pub starts: u64,
}

/// Progress that does not outlive the process.
pub fn in_memory() -> SharedProgress {
    Arc::new(Box::new(Progress::default()))
}

impl Suspect {
    /// It has been found so often that it is not worked on again.
    pub(crate) fn is_quarantined(&self) -> bool {
        self.starts >= UNCLEAN_STARTS_MAX
    }
}

impl Progress {
    /// What follows is about this message, until [`Self::end_work`].
    pub(crate) fn begin_work(&self, message: MessageId) {
        self.working_on.store(message.to_raw(), Ordering::Relaxed);
    }

    pub(crate) fn end_work(&self) {
        self.working_on.store(0, Ordering::Relaxed);
    }

    /// A message's last octets go out, for so many recipients. Told before they do.
    pub(crate) fn add_sent(&self, recipients: u64) {
        add(&self.sent, recipients);
    }

    /// What became of so many of these is durable.
    pub(crate) fn add_recorded(&self, recipients: u64) {
        add(&self.recorded, recipients);
    }

    /// The message that was being worked on.
    pub fn working_on(&self) -> Option<MessageId> {
        Some(self.working_on.load(Ordering::Relaxed)).filter(|raw| *raw != 0).map(MessageId::from_raw)
    }

    /// Recipients whose messages went out without a durable outcome, over all shards. With `in_doubt = "hold"` none:
    /// these are held, and not sent again.
    pub fn unrecorded<'a>(all: impl IntoIterator<Item = &'a Self>) -> u64 {
        let total = |sum: u64, progress: &Self| {
            let sent = progress.sent.load(Ordering::Relaxed);
            sum.wrapping_add(sent).wrapping_sub(progress.recorded.load(Ordering::Relaxed))
        };
        all.into_iter().fold(0, total)
    }

    /// As if nothing had been done.
    pub fn reset(&self) {
        for word in [&self.working_on, &self.sent, &self.recorded] {
            word.store(0, Ordering::Relaxed);
        }
    }
}

/// There is one writer, so this need not be one step.
fn add(word: &AtomicU64, count: u64) {
    word.store(word.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
}
