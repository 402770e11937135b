//! The segments that were found: taken up with what the checkpoint tells of them, and read as far as they are needed,
//! both chains in the order of commits.

use std::sync::Arc;

use super::recovered::{Kept, Quarantine, Reason};
use super::{Damage, DoubtfulHeaders, Recovery};
use crate::format::{Chain, SEGMENT_HEADER_BYTES};
use crate::load::Checkpoint;
use crate::record::CommitNumber;
use crate::replay::{ChainReader, Ended, Frame, SegmentBytes, Step, Unfinished};
use crate::segment::Segment;
use crate::survey::{Sorted, Used};

impl Recovery<'_> {
    pub(super) fn read_segments(&mut self, sorted: Sorted, checkpoint: Option<&Checkpoint>) -> DoubtfulHeaders {
        let Sorted { used, spares, damaged_headers, mut missing, next_number, discarded } = sorted;
        self.log.next_number = next_number;
        self.log.discarded = discarded;
        for (slot, segment) in spares {
            self.log.segments.put(slot, segment);
            self.log.segments.spares.push_back(slot);
        }
        for used in &used {
            self.put_segment(used);
        }
        match checkpoint {
            Some(checkpoint) => {
                let header = &checkpoint.header;
                self.begin_sequence = header.begin_sequence;
                self.log.next_sequence = self.log.next_sequence.max(header.begin_sequence);
                self.log.next_commit = self.log.next_commit.max(header.begin_commit);
                let loaded = checkpoint.load(self.log);
                // Its slices were whole a moment ago: what can't be read now is told when it is asked for.
                debug_assert!(loaded);
            }
            None => self.held_below = discarded,
        }
        // Segments with a damaged first block that was the begin of a use which never was acknowledged.
        let mut unfinished: Vec<u64> = damaged_headers.iter().map(|found| found.number).collect();
        unfinished.retain(|number| used.binary_search_by_key(number, |used| used.number).is_err());
        let first_sequence = used.iter().map(|used| used.first_sequence).max().unwrap_or(1);
        let first_commit = used.iter().map(|used| used.first_commit).max().unwrap_or(1);
        let salvaged: Vec<(u16, u64)> =
            used.iter().filter(|used| used.is_salvaged).map(|used| (used.slot, used.first_commit)).collect();
        let replayed = self.replay(used, &mut unfinished);
        missing.retain(|number| !self.given_up.contains(number));
        for number in &missing {
            self.report(Quarantine {
                log: self.log.id(),
                file: self.log.directory.path().to_owned(),
                offset: 0,
                bytes: 0,
                reason: Reason::Missing { segment: *number },
                kept: Kept::Not { reason: "there is nothing".to_owned() },
            });
        }
        // Nothing of a segment may be left but its header.
        self.log.next_sequence = self.log.next_sequence.max(first_sequence);
        self.log.next_commit = self.log.next_commit.max(first_commit);
        let bytes = checkpoint.map_or(0, |checkpoint| checkpoint.bytes);
        self.log.checkpoints.set_replayed(replayed, bytes);
        self.log.durable = CommitNumber(self.log.next_commit - 1);
        DoubtfulHeaders {
            damaged: damaged_headers,
            unfinished,
            salvaged,
            is_any_missing: !missing.is_empty(),
            has_checkpoint: checkpoint.is_some(),
        }
    }

    fn put_segment(&mut self, used: &Used) {
        let mut segment = Segment::new(Arc::clone(&used.file), used.capacity);
        segment.chain = used.chain;
        segment.number = used.number;
        segment.generation = used.generation;
        segment.first_sequence = used.first_sequence;
        segment.last_commit = used.first_commit.saturating_sub(1);
        if let Some(row) = &used.row {
            segment.end = row.end;
            segment.last_sequence = row.last_sequence;
            segment.last_commit = row.last_commit;
            segment.last_event = row.last_event;
            segment.charged = row.end;
            self.log.directory.budget().charge(row.end);
        }
        self.log.segments.put(used.slot, segment);
        self.log.segments.in_use.push_back(used.slot);
    }

    /// Where a segment is to be read from; `None` when nothing in it is needed.
    fn read_from(&self, used: &Used) -> Option<u64> {
        let from_begin = Some(SEGMENT_HEADER_BYTES as u64);
        match &used.row {
            None => from_begin,
            Some(_) if self.reads_everything => from_begin,
            Some(row) if row.last_event > self.log.event_cursor => from_begin,
            Some(row) => row.is_tail.then_some(row.end),
        }
    }

    /// Reads both chains in the order of commits. Returns how many bytes were read.
    fn replay(&mut self, used: Vec<Used>, unfinished_headers: &mut Vec<u64>) -> u64 {
        let mut chains: [Vec<(Used, u64)>; 2] = [Vec::new(), Vec::new()];
        for used in used {
            if let Some(from) = self.read_from(&used) {
                chains[used.chain as usize].push((used, from));
            }
        }
        let mut readers = chains.map(|segments| ChainReader::new(self.log.id(), segments));
        let mut next: [Option<Frame>; 2] = [None, None];
        let mut ends = Vec::new();
        for chain in Chain::ALL {
            next[chain as usize] = self.next_frame(&mut readers[chain as usize], &mut ends, unfinished_headers);
        }
        loop {
            let chain = match &next {
                [None, None] => break,
                [Some(_), None] => Chain::Mail,
                [None, Some(_)] => Chain::Copies,
                [Some(mail), Some(copies)] if mail.header.commit < copies.header.commit => Chain::Mail,
                [Some(_), Some(_)] => Chain::Copies,
            };
            let reader = &mut readers[chain as usize];
            if let Some(frame) = next[chain as usize].take() {
                self.apply_frame(&mut reader.bytes, &frame);
            }
            next[chain as usize] = self.next_frame(reader, &mut ends, unfinished_headers);
        }
        let next_commit = self.log.next_commit;
        for Unfinished { segment, commit, region } in ends {
            let Some(slot) = self.log.segments.by_number(segment).or_else(|| self.spare_of(segment)) else { continue };
            let segment_of = self.log.segments.get(slot);
            let mut bytes = SegmentBytes::default();
            bytes.begin_at(Arc::clone(&segment_of.file), segment_of.capacity, region.start);
            if commit.is_some_and(|commit| commit < next_commit) {
                // A later commit was finished, so this one was, too.
                self.quarantine_at(slot, segment, &mut bytes, region, Reason::Frame);
            } else {
                let begin = region.start;
                self.cut_at(slot, segment, &mut bytes, region);
                self.open_ends.has_cuts |= !self.log.close_cut(slot, commit.unwrap_or(0), begin);
            }
        }
        readers.iter().map(|reader| reader.read_bytes).sum()
    }

    fn spare_of(&self, number: u64) -> Option<u16> {
        self.log.segments.spares.iter().copied().find(|slot| self.log.segments.get(*slot).number == number)
    }

    fn next_frame(
        &mut self,
        reader: &mut ChainReader,
        ends: &mut Vec<Unfinished>,
        unfinished_headers: &mut Vec<u64>,
    ) -> Option<Frame> {
        loop {
            match reader.next()? {
                Step::Frame(frame) => return Some(frame),
                Step::Unfinished(unfinished) => ends.push(unfinished),
                Step::Damaged(segment, region) => {
                    let slot = self.log.segments.by_number(segment).expect("a segment that is being read is in use");
                    self.damages.push(Damage { slot, segment, region, reason: Reason::Frame });
                }
                Step::Ended(ended) => self.end_segment(ended, unfinished_headers),
            }
        }
    }

    fn end_segment(&mut self, ended: Ended, unfinished_headers: &mut Vec<u64>) {
        let Ended { used, end, frames, is_last } = ended;
        let slot = used.slot;
        if used.is_truncated {
            let mut bytes = SegmentBytes::default();
            bytes.begin(Arc::clone(&used.file), used.capacity);
            self.quarantine_at(slot, used.number, &mut bytes, used.capacity..used.capacity, Reason::Truncated);
        }
        if used.is_salvaged && is_last && frames <= 1 {
            unfinished_headers.push(used.number);
        }
        if is_last && used.sealed_end.is_none() && !used.is_salvaged && !used.is_truncated {
            self.open_ends.slots[used.chain as usize] = Some(slot);
        }
        let segment = self.log.segments.get_mut(slot);
        if end == SEGMENT_HEADER_BYTES as u64 && is_last && segment.live == 0 {
            // Its first commit was never finished. It keeps its number, which the next header passes over.
            self.log.directory.budget().refund(segment.charged);
            segment.charged = 0;
            segment.end = 0;
            self.log.segments.in_use.retain(|other| *other != slot);
            self.log.segments.spares.push_back(slot);
            return;
        }
        let charged = end.max(segment.charged);
        self.log.directory.budget().charge(charged - segment.charged);
        segment.end = end.max(segment.end);
        segment.charged = charged;
    }
}
