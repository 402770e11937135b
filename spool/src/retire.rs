//! Retiring dead segments, and making new ones.
//!
//! A segment is used again when nothing in it counts, is pinned, borrowed or being read; every change that made it so
//! is durable; the event cursor has passed its last message and outcome; and both kept checkpoints were begun after its
//! last record, so that whichever of them the next start reads, nothing in the segment is missed. The newest segment of
//! mail is never retired: it carries the log's numbers.
//!
//! See also `copy_forward.rs`, which empties segments, and `checkpoint.rs`.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::commit::Purpose;
use crate::directory::Durability;
use crate::error::Closed;
use crate::format::Chain;
use crate::limits::{
    BLOCK_BYTES, CHECKPOINT_WRITTEN_BYTES_MAX, PREALLOCATION_RETRY_MS, SEGMENTS_MAX, SPARES_KEPT_MIN, SPARES_WANTED,
    ZERO_STEP_BYTES, ZERO_STEP_INTERVAL_MS,
};
use crate::log::{Log, Progress};
use crate::segment::Segment;
use crate::shortage::Shortage;
use crate::storage::{Operation, StorageFile, Work};

/// Making new segments and filling them with zeros.
#[derive(Debug, Default)]
pub(crate) struct Preallocation {
    /// The spare that a step of zeroing is under way in.
    pub(crate) zeroing: Option<u16>,
    creating: bool,
    removing: bool,
    /// After one could not be removed, none is before.
    remove_at: Duration,
    /// No step is begun before.
    next_step: Duration,
    shortage: Shortage,
    zeros: Option<Arc<[u8]>>,
}

impl Log {
    pub(crate) fn poll_retire(&mut self, now: Duration) -> Option<Operation> {
        self.retire_dead();
        self.poll_remove(now).or_else(|| self.poll_create(now)).or_else(|| self.poll_zero(now))
    }

    fn retire_dead(&mut self) {
        let mut position = 0;
        while let Some(slot) = self.segments.dead.get(position).copied() {
            let is_in_use = self.segments.in_use.contains(&slot);
            if !is_in_use || self.segments.get(slot).live > 0 {
                // It is noted again when it dies.
                self.segments.dead.swap_remove(position);
            } else if self.is_dead(slot) && self.is_covered(slot) && !self.segments.get_mut(slot).is_borrowed() {
                self.segments.dead.swap_remove(position);
                self.retire(slot);
            } else {
                position += 1;
            }
        }
    }

    /// Whether nothing counts in a segment that is not needed for itself.
    pub(crate) fn is_dead(&self, slot: u16) -> bool {
        let segment = self.segments.get(slot);
        segment.end > 0
            && segment.live == 0
            && self.tails.iter().flatten().all(|tail| tail.slot != slot)
            && self.segments.newest(Chain::Mail).is_none_or(|newest| newest.number != segment.number)
    }

    /// Whether nobody needs a dead segment, but for checkpoints.
    pub(crate) fn is_unneeded(&self, slot: u16) -> bool {
        let segment = self.segments.get(slot);
        segment.pins == 0
            && segment.reads == 0
            && segment.changed_in <= self.durable
            && segment.last_event <= self.event_cursor
            && !segment.graves.is_covering()
    }

    pub(crate) fn is_covered(&self, slot: u16) -> bool {
        self.is_unneeded(slot) && self.checkpoints.cover(self.segments.get(slot))
    }

    /// Bytes in dead segments that wait for nothing but checkpoints.
    pub(crate) fn bytes_waiting_for_checkpoint(&self) -> u64 {
        let waits = |slot: &&u16| {
            self.is_dead(**slot)
                && self.is_unneeded(**slot)
                && !self.is_covered(**slot)
                && !self.can_be_given_up(**slot)
        };
        self.segments.dead.iter().filter(waits).map(|slot| self.segments.get(*slot).charged).sum()
    }

    fn retire(&mut self, slot: u16) {
        self.discarded = self.discarded.max(self.segments.get(slot).last_sequence);
        self.make_spare(slot);
    }

    pub(crate) fn make_spare(&mut self, slot: u16) {
        let segment = self.segments.get_mut(slot);
        self.directory.budget().refund(segment.charged);
        segment.charged = 0;
        self.segments.in_use.retain(|other| *other != slot);
        self.segments.spares.push_back(slot);
        self.counters.segments_retired += 1;
    }

    /// How many spares are worth their room.
    fn spares_kept(&self) -> usize {
        let begun_max = CHECKPOINT_WRITTEN_BYTES_MAX / self.directory.options().segment_bytes;
        let begun = self.checkpoints.segments_begun_between().min(begun_max);
        // The next interval may be a little longer.
        (begun as usize + begun as usize / 8 + SPARES_WANTED).max(SPARES_KEPT_MIN)
    }

    /// Gives a file back when there are too many.
    fn poll_remove(&mut self, now: Duration) -> Option<Operation> {
        if self.preallocation.removing || now < self.preallocation.remove_at || !self.has_too_many_spares() {
            return None;
        }
        let zeroing = self.preallocation.zeroing;
        let mut idle = self.segments.spares.iter().enumerate().filter(|(_, slot)| zeroing != Some(**slot));
        // Until a header tells what was discarded, what is still in a retired file can be read where no checkpoint can.
        let is_blank = |(_, slot): &(usize, &u16)| self.segments.get(**slot).graves.is_covered();
        let (position, _) = idle.clone().find(is_blank).or_else(|| idle.next())?;
        let slot = self.segments.spares.remove(position).expect("a position that was just found");
        self.preallocation.removing = true;
        let (storage, path) = (self.directory.storage(), self.segment_path(slot));
        Some(self.operation(Work::Remove { storage, path }, Purpose::Remove { slot }))
    }

    fn has_too_many_spares(&self) -> bool {
        self.segments.spares.len() > self.spares_kept()
    }

    pub(crate) fn handle_remove(&mut self, now: Duration, slot: u16, result: io::Result<()>) {
        self.preallocation.removing = false;
        match result {
            Ok(()) => {
                self.segments.take(slot);
            }
            Err(_) => {
                self.segments.spares.push_back(slot);
                self.preallocation.remove_at = now + Duration::from_millis(PREALLOCATION_RETRY_MS);
            }
        }
    }

    /// Why there is no spare: another can't be made, or is not ready yet.
    pub(crate) fn without_spare(&self) -> Closed {
        let is_nameable = self.segments.vacant(SEGMENTS_MAX).is_some();
        let otherwise = if is_nameable { Closed::Preparing } else { Closed::NoSpace };
        self.preallocation.shortage.closed().unwrap_or(otherwise)
    }

    fn wants_segment(&self) -> bool {
        self.segments.spares.len() < SPARES_WANTED
    }

    fn poll_create(&mut self, now: Duration) -> Option<Operation> {
        if self.preallocation.creating {
            return None;
        }
        if !self.wants_segment() {
            // What failed some time ago says nothing about the next time that one is wanted.
            self.preallocation.shortage.end();
            return None;
        }
        if self.preallocation.shortage.retry_at().is_some_and(|at| now < at) {
            return None;
        }
        let slot = self.segments.vacant(SEGMENTS_MAX)?;
        self.preallocation.creating = true;
        let (storage, path) = (self.directory.storage(), self.segment_path(slot));
        let bytes = self.directory.options().segment_bytes;
        Some(self.operation(Work::Create { storage, path, bytes }, Purpose::Create { slot }))
    }

    pub(crate) fn handle_create(
        &mut self,
        now: Duration,
        slot: u16,
        result: io::Result<Arc<dyn StorageFile>>,
    ) -> Progress {
        self.preallocation.creating = false;
        match result {
            Ok(file) => {
                self.preallocation.shortage.made();
                self.segments.put(slot, Segment::new(file, self.directory.options().segment_bytes));
                self.segments.spares.push_back(slot);
                Progress::Nothing
            }
            Err(error) => {
                let retry_at = now + Duration::from_millis(PREALLOCATION_RETRY_MS);
                match self.preallocation.shortage.note(retry_at, &error) {
                    true => Progress::NotMade { path: self.segment_path(slot), error },
                    false => Progress::Nothing,
                }
            }
        }
    }

    /// The spare whose zeroing is unfinished. One that was used before has written blocks.
    fn unzeroed(&self) -> Option<u16> {
        let unzeroed = |slot: &u16| {
            let segment = self.segments.get(*slot);
            segment.number == 0 && segment.zeroed < segment.capacity
        };
        self.segments.spares.iter().copied().find(unzeroed).filter(|_| self.preallocation.zeroing.is_none())
    }

    fn poll_zero(&mut self, now: Duration) -> Option<Operation> {
        let slot = self.unzeroed()?;
        if now < self.preallocation.next_step {
            return None;
        }
        self.preallocation.next_step = now + Duration::from_millis(ZERO_STEP_INTERVAL_MS);
        self.preallocation.zeroing = Some(slot);
        let segment = self.segments.get(slot);
        let (file, offset) = (Arc::clone(&segment.file), segment.zeroed);
        let bytes = (segment.capacity - offset).min(ZERO_STEP_BYTES);
        let zeros =
            self.preallocation.zeros.get_or_insert_with(|| vec![0; (ZERO_STEP_BYTES + BLOCK_BYTES) as usize].into());
        let work = Work::Zero {
            file,
            offset,
            zeros: Arc::clone(zeros),
            bytes: bytes as usize,
            sync: self.directory.options().durability == Durability::Fsync,
        };
        Some(self.operation(work, Purpose::Zero { slot, bytes }))
    }

    pub(crate) fn handle_zero(&mut self, slot: u16, bytes: u64, result: io::Result<usize>) {
        self.preallocation.zeroing = None;
        let segment = self.segments.get_mut(slot);
        if segment.number != 0 {
            return; // It was needed before it was finished.
        }
        match result {
            Ok(written) => segment.zeroed += (written as u64).min(bytes),
            // It serves unzeroed, if it serves; a commit to it will tell.
            Err(_) => segment.zeroed = segment.capacity,
        }
        if self.unzeroed().is_none() {
            self.preallocation.zeros = None;
        }
    }

    pub(crate) fn preallocation_timeout(&self) -> Option<Duration> {
        let can_create = self.wants_segment() && !self.preallocation.creating;
        let create = self.preallocation.shortage.retry_at().filter(|_| can_create);
        let zero = self.unzeroed().map(|_| self.preallocation.next_step);
        let can_remove = self.has_too_many_spares() && !self.preallocation.removing;
        let remove = can_remove.then_some(self.preallocation.remove_at);
        create.into_iter().chain(zero).chain(remove).min()
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::Path;
    use std::sync::Arc;
    use std::time::Duration;

    use crate::commit::Purpose;
    use crate::limits::{PREALLOCATION_RETRY_MS, SEGMENTS_MAX, SPARES_KEPT_MIN, ZERO_STEP_BYTES};
    use crate::segment::Segment;
    use crate::sim::SimDisk;
    use crate::{Log, RecoverOptions, Spool, SpoolOptions};

    /// A log with so many spares that were never used, none of them zeroed.
    fn with_spares(number: usize) -> Log {
        let options = SpoolOptions { segment_bytes: 1 << 20, ..SpoolOptions::default() };
        let mut spool = Spool::open_on(Arc::new(SimDisk::new(1)), Path::new("/spool"), options).expect("a disk");
        let directory = spool.assign(1).expect("a log").remove(0).remove(0);
        let mut log = Log::recover(directory, RecoverOptions::default(), &mut |_| {}).expect("a log");
        while log.segments.spares.len() < number {
            let slot = log.segments.vacant(SEGMENTS_MAX).expect("a slot");
            let path = log.segment_path(slot);
            let file = log.directory.storage().create(&path, options.segment_bytes).expect("room");
            log.segments.put(slot, Segment::new(file, options.segment_bytes));
            log.segments.spares.push_back(slot);
        }
        for slot in log.segments.spares.clone() {
            log.segments.get_mut(slot).zeroed = 0;
        }
        log
    }

    fn begin_zeroing(log: &mut Log) -> u16 {
        log.poll_zero(log.preallocation.next_step).expect("a step");
        log.preallocation.zeroing.expect("a spare")
    }

    /// A file in which zeros are being written is not given back meanwhile. One that can't be given back stays a spare.
    #[test]
    fn a_file_that_is_being_zeroed_is_kept() {
        let mut log = with_spares(SPARES_KEPT_MIN + 2);
        let slot = begin_zeroing(&mut log);
        assert_eq!(log.segments.spares.front(), Some(&slot), "it would be the first to go");
        log.poll_remove(Duration::ZERO).expect("one too many");
        log.audit();
        let removed = log.purposes.values().find_map(|purpose| match purpose {
            Purpose::Remove { slot } => Some(*slot),
            _ => None,
        });
        log.purposes.retain(|_, purpose| !matches!(purpose, Purpose::Remove { .. }));
        let second = Duration::from_millis(PREALLOCATION_RETRY_MS);
        log.handle_remove(second, removed.expect("a file that is removed"), Err(io::ErrorKind::Other.into()));
        log.audit();
        assert!(log.poll_remove(second).is_none(), "where the file system is read-only, that would go on and on");
        assert!(log.preallocation_timeout() <= Some(2 * second));
        assert!(log.poll_remove(2 * second).is_some());
    }

    /// Zeroing goes on where a short write ended, and is given up where it fails: such a file serves as it is.
    #[test]
    fn zeroing_goes_on_where_it_ended() {
        let mut log = with_spares(3);
        let slot = begin_zeroing(&mut log);
        log.handle_zero(slot, ZERO_STEP_BYTES, Ok(4_096));
        assert_eq!(log.segments.get(slot).zeroed, 4_096);
        assert_eq!(log.unzeroed(), Some(slot));
        assert_eq!(begin_zeroing(&mut log), slot);
        log.handle_zero(slot, ZERO_STEP_BYTES, Err(io::ErrorKind::Other.into()));
        assert_ne!(log.unzeroed(), Some(slot));
    }
}
