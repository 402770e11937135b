//! What a recovered log appends to: spares and checkpoint files, allocated ahead, or the segments that it found.

use super::OpenEnds;
use crate::append::Tail;
use crate::checkpoint::{CHECKPOINT_FILES, CheckpointFile};
use crate::format::Chain;
use crate::limits::{CHECKPOINT_FILE_BYTES_MIN, SEGMENTS_MAX, SPARES_WANTED, ZERO_STEP_BYTES};
use crate::log::Log;
use crate::segment::Segment;
use crate::storage::StorageFile;

impl Log {
    /// Makes sure that there is something to append to at once. The first segment is filled with zeros here (50 ms
    /// measured for 64 MiB), later ones by and by; without that each commit would also have to convert its extents.
    pub(super) fn prepare_spares(&mut self) {
        let storage = self.directory.storage();
        let bytes = self.directory.options().segment_bytes;
        for slot in self.segments.spares.clone() {
            // Segments were smaller once.
            let path = self.segment_path(slot);
            let segment = self.segments.get_mut(slot);
            if segment.capacity < bytes && storage.create(&path, bytes).is_ok() {
                segment.capacity = bytes;
            }
        }
        for slot in 0..CHECKPOINT_FILES {
            if self.checkpoints.files[slot].is_none()
                && let Ok(file) = storage.create(&self.directory.checkpoint_path(slot), CHECKPOINT_FILE_BYTES_MIN)
            {
                self.checkpoints.files[slot] = Some(CheckpointFile { file, capacity: CHECKPOINT_FILE_BYTES_MIN });
            }
        }
        while self.segments.spares.len() < SPARES_WANTED {
            let Some(slot) = self.segments.vacant(SEGMENTS_MAX) else { return };
            // Without room now, the log opens closed for mail and tries again while it runs.
            let Ok(file) = storage.create(&self.segment_path(slot), bytes) else { return };
            self.segments.put(slot, Segment::new(file, bytes));
            self.segments.spares.push_back(slot);
        }
        let Some(first) = self.segments.spares.front().copied() else { return };
        let segment = self.segments.get_mut(first);
        if segment.number == 0 && segment.zeroed < segment.capacity {
            segment.zeroed = fill_with_zeros(segment.file.as_ref(), segment.zeroed, segment.capacity);
        }
    }

    /// Goes on in segments whose end nothing tells, since there are no others: else each start would use up one that
    /// outcomes need. What is behind the end is from an earlier use, or the rest of an unfinished commit.
    pub(super) fn go_on_in(&mut self, open_ends: &OpenEnds) {
        let OpenEnds { slots, has_cuts } = open_ends;
        if *has_cuts {
            return;
        }
        for chain in Chain::ALL {
            let newest = self.segments.newest(chain).map(|newest| newest.number);
            let slot = slots[chain as usize].filter(|slot| newest == Some(self.segments.get(*slot).number));
            self.tails[chain as usize] = slot.map(|slot| Tail { slot, offset: self.segments.get(slot).end });
        }
    }
}

/// Returns up to where it came; an error will show again when it matters.
fn fill_with_zeros(file: &dyn StorageFile, from: u64, to: u64) -> u64 {
    let zeros = vec![0; ZERO_STEP_BYTES as usize];
    let mut at = from;
    while at < to {
        let bytes = (to - at).min(ZERO_STEP_BYTES) as usize;
        match file.write_at(&zeros[..bytes], at, false) {
            Ok(written) if written > 0 => at += written as u64,
            _ => break,
        }
    }
    // The pages stay cached, so that commits need not make new ones.
    match file.sync_and_drop_cache(0..0) {
        Ok(()) => at,
        Err(_) => from,
    }
}
