//! What the parts of a log say of one another, counted again. For tests and simulators, which ask after each step: a
//! count that is wrong, or room that nothing would ever win back, shows here long before it costs a message.

use std::collections::HashMap;

use crate::commit::Purpose;
use crate::frame::Change;
use crate::index::{NOWHERE, Place};
use crate::log::{Log, State};
use crate::record::CommitNumber;
use crate::tombstone::Graves;

impl Log {
    /// Panics where two parts of the log disagree.
    pub fn audit(&self) {
        self.index.audit();
        self.bodies.audit(self.durable);
        self.audit_files();
        self.audit_counts();
        self.audit_operations();
        self.audit_frames();
        self.audit_changes();
        self.audit_graves();
        let is_open = matches!(self.state, State::Open);
        self.checkpoints.audit(is_open, self.durable, self.uncommitted_frames().map(|frame| frame.commit));
    }

    /// Each file is in use, a spare, or being removed; and of those in use each that may be used again is known.
    fn audit_files(&self) {
        let removed = self.purposes.values().filter_map(|purpose| match purpose {
            Purpose::Remove { slot } => Some(slot),
            _ => None,
        });
        let mut slots: Vec<u16> =
            self.segments.in_use.iter().chain(&self.segments.spares).chain(removed).copied().collect();
        slots.sort_unstable();
        assert_eq!(slots, self.segments.slots(), "in use, spare or being removed");
        let numbers: Vec<u64> = self.segments.in_use.iter().map(|slot| self.segments.get(*slot).number).collect();
        assert!(numbers.is_sorted_by(|before, after| before < after), "{numbers:?}");
        assert!(numbers.last().is_none_or(|last| *last < self.next_number));
        for slot in &self.segments.in_use {
            let segment = self.segments.get(*slot);
            assert_eq!(segment.charged, segment.end, "segment {}", segment.number);
            let is_tail = self.tails.iter().flatten().any(|tail| tail.slot == *slot);
            let is_done = segment.live == 0 && segment.end > 0 && !is_tail;
            assert!(!is_done || self.segments.dead.contains(slot), "segment {} is forgotten", segment.number);
        }
        for slot in &self.segments.spares {
            let segment = self.segments.get(*slot);
            let counts = (segment.live, segment.live_bytes, segment.pins, segment.reads, segment.charged);
            assert_eq!(counts, (0, 0, 0, 0, 0), "spare {slot}");
        }
        for tail in self.tails.iter().flatten() {
            assert!(self.segments.in_use.contains(&tail.slot));
        }
    }

    /// What counts in each segment is what the index and the bodies name there, and it is in a frame.
    fn audit_counts(&self) {
        let mut counted: HashMap<u16, (u32, u64)> = HashMap::new();
        let mut count = |place: Place| {
            if place.slot != NOWHERE {
                assert!(self.segments.in_use.contains(&place.slot), "{place:?} is in no segment in use");
                assert!(self.is_in_a_frame(place), "{place:?} is in no frame");
                let (records, bytes) = counted.entry(place.slot).or_default();
                *records += 1;
                *bytes += place.length();
            }
        };
        let mut references: HashMap<u64, u32> = HashMap::new();
        for entry in self.index.iter() {
            count(entry.record());
            self.index.states(entry).for_each(&mut count);
            if let Some(body) = self.index.body(entry) {
                *references.entry(body).or_default() += 1;
            }
            if entry.record().slot != NOWHERE {
                let segment = self.segments.get(entry.record().slot);
                let is_durable = entry.record().offset() < segment.end;
                assert!(!is_durable || entry.sequence() <= segment.last_sequence, "segment {}", segment.number);
            }
        }
        for (sequence, body) in self.bodies.iter() {
            if body.is_live() {
                count(body.place);
            }
            assert_eq!(body.references(), references.get(&sequence).copied().unwrap_or(0), "body {sequence}");
        }
        for slot in &self.segments.in_use {
            let segment = self.segments.get(*slot);
            let expected = counted.get(slot).copied().unwrap_or_default();
            assert_eq!((segment.live, segment.live_bytes), expected, "segment {}", segment.number);
        }
    }

    fn is_in_a_frame(&self, place: Place) -> bool {
        let end = place.offset() + place.length();
        let is_in = |frame: &crate::frame::Frame| frame.slot == place.slot && frame.offset <= place.offset();
        end <= self.segments.get(place.slot).end || self.uncommitted_frames().any(is_in)
    }

    /// Reads, pins and zeroing keep what they concern.
    fn audit_operations(&self) {
        let mut reads: HashMap<u16, u32> = HashMap::new();
        let mut owners_reads = self.body_reads.len();
        for purpose in self.purposes.values() {
            match purpose {
                Purpose::ReadMessage { place, .. } | Purpose::ReadBody { place, .. } => {
                    owners_reads += 1;
                    *reads.entry(place.slot).or_default() += 1;
                }
                Purpose::CopyWindow { place, .. }
                | Purpose::CopyRecord { place, .. }
                | Purpose::CopyState { place, .. }
                | Purpose::Scrub { place, .. } => *reads.entry(place.slot).or_default() += 1,
                Purpose::Zero { slot, .. } => {
                    let flight = self.flight.as_ref().map(|flight| flight.frame().slot);
                    assert_ne!(flight, Some(*slot), "it is being zeroed");
                    assert_eq!(self.preallocation.zeroing, Some(*slot));
                }
                Purpose::Remove { slot } => assert_ne!(self.preallocation.zeroing, Some(*slot)),
                Purpose::Cover { slot } => {
                    assert!(self.segments.in_use.contains(slot), "a spare's header is being covered");
                    assert!(self.segments.get(*slot).graves.is_covering());
                }
                Purpose::Commit
                | Purpose::Create { .. }
                | Purpose::DropCache
                | Purpose::CreateCheckpoint { .. }
                | Purpose::WriteCheckpoint { .. } => {}
            }
        }
        assert_eq!(self.reads, owners_reads);
        let mut pins: HashMap<u16, u32> = HashMap::new();
        for pin in self.pins.values().flatten() {
            *pins.entry(pin.slot).or_default() += pin.count;
        }
        for slot in self.segments.slots() {
            let segment = self.segments.get(slot);
            let expected = (reads.get(&slot).copied().unwrap_or(0), pins.get(&slot).copied().unwrap_or(0));
            assert_eq!((segment.reads, segment.pins), expected, "slot {slot}");
        }
    }

    /// Frames that are not durable follow one another, and what they hold is what waits.
    fn audit_frames(&self) {
        let commits: Vec<CommitNumber> =
            self.uncommitted_frames().filter(|frame| frame.is_wanted()).map(|frame| frame.commit).collect();
        assert!(commits.is_sorted_by(|before, after| before < after), "{commits:?}");
        assert!(commits.first().is_none_or(|first| self.durable < *first), "{commits:?} {:?}", self.durable);
        assert!(commits.last().is_none_or(|last| last.0 < self.next_commit));
        let bytes: u64 = self.uncommitted_frames().map(|frame| frame.record_bytes).sum();
        assert_eq!(self.pending_bytes, bytes);
    }

    /// Whatever a commit changes can be taken back until it is durable: what counted before it is still there.
    fn audit_changes(&self) {
        for frame in self.uncommitted_frames() {
            for change in &frame.changes {
                match change {
                    Change::Inserted { .. } | Change::Body { .. } => {}
                    Change::BodyMoved { from, .. } => self.audit_kept(*from, frame.commit),
                    Change::Replaced(before) => {
                        let present = self.index.get(before.entry.sequence());
                        let counts = |place: &Place| {
                            present.is_some_and(|entry| {
                                entry.record() == *place || self.index.states(entry).any(|state| state == *place)
                            })
                        };
                        for place in before.states().chain([before.entry.record()]).filter(|place| !counts(place)) {
                            self.audit_kept(place, frame.commit);
                        }
                        if let (Some(body), None) = (before.body, present) {
                            let body = self.bodies.get(body).expect("a body that may be named again");
                            if !body.is_live() {
                                self.audit_kept(body.place, frame.commit);
                            }
                        }
                    }
                }
            }
        }
    }

    fn audit_kept(&self, place: Place, commit: CommitNumber) {
        if place.slot != NOWHERE {
            assert!(self.segments.in_use.contains(&place.slot), "{place:?} may count again");
            let segment = self.segments.get(place.slot);
            assert!(segment.changed_in >= commit, "segment {} does not wait for {commit:?}", segment.number);
        }
    }

    /// Nothing is told of a segment that goes on, and nothing that is not written down, or being so.
    fn audit_graves(&self) {
        for slot in self.segments.in_use.iter().copied() {
            let segment = self.segments.get(slot);
            let is_given_up = match &segment.graves {
                Graves::Unknown | Graves::Noted(_) => false,
                Graves::Told { commit, .. } => {
                    let is_coming = || self.uncommitted_frames().any(|frame| frame.commit == *commit);
                    assert!(*commit <= self.durable || is_coming(), "{commit:?} is void");
                    true
                }
                Graves::Covering => true,
                Graves::Covered => panic!("segment {} is in use", segment.number),
            };
            if is_given_up {
                assert_eq!(segment.live, 0, "segment {}", segment.number);
                assert!(segment.end > 0, "segment {}", segment.number);
                // Nobody can come to need what nothing names.
                assert!(segment.changed_in <= self.durable, "segment {}", segment.number);
                assert_eq!((segment.pins, segment.reads), (0, 0), "segment {}", segment.number);
                assert!(segment.last_event <= self.event_cursor, "segment {}", segment.number);
                assert!(self.uncommitted_frames().all(|frame| frame.slot != slot), "segment {}", segment.number);
            }
        }
    }
}
