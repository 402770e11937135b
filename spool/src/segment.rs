//! The segments of one log in memory: which file each slot is, what it is used for, and what keeps it from being used
//! again.
//!
//! | from | to | when |
//! |---|---|---|
//! | – | spare | a file was created, or found blank or dead at the start |
//! | spare | in use | the first frame for it is begun (`append.rs`) |
//! | in use | spare | it is retired (`retire.rs`), or its first frame failed (`commit.rs`) |
//! | spare | – | it is one too many, and the file is removed |

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Weak};

use crate::file::Map;
use crate::format::{Chain, Seal};
use crate::index::{NOWHERE, Place};
use crate::record::CommitNumber;
use crate::storage::StorageFile;
use crate::tombstone::Graves;

/// One segment file.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) file: Arc<dyn StorageFile>,
    pub(crate) capacity: u64,
    /// Of the present use, or of the last one while spare; 0 for a file that was never used.
    pub(crate) number: u64,
    pub(crate) generation: u64,
    pub(crate) chain: Chain,
    /// Where acknowledged frames end; 0 when there are none.
    pub(crate) end: u64,
    pub(crate) first_sequence: u64,
    pub(crate) last_sequence: u64,
    pub(crate) last_commit: u64,
    /// Sequence of the last record that an event is derived from.
    pub(crate) last_event: u64,
    /// Records that count, and their bytes: of live messages, of shared bodies, and of the outcomes and states that
    /// tell where a live message stands.
    pub(crate) live: u32,
    pub(crate) live_bytes: u64,
    /// The commit that last took a record from what counts here, or gave it back.
    pub(crate) changed_in: CommitNumber,
    pub(crate) pins: u32,
    /// Reads under way.
    pub(crate) reads: u32,
    /// Bytes of it that count against the spool's size.
    pub(crate) charged: u64,
    /// Of a file that was never used: up to where its blocks are written, so that a commit need not convert them.
    pub(crate) zeroed: u64,
    pub(crate) graves: Graves,
    map: MapState,
}

/// The map of what this process appended.
#[derive(Debug)]
enum MapState {
    None,
    Hot(Arc<Map>),
    /// No longer handed out, but messages may still be held.
    Cooled(Weak<Map>),
}

impl Segment {
    pub(crate) fn new(file: Arc<dyn StorageFile>, capacity: u64) -> Self {
        Self {
            file,
            capacity,
            number: 0,
            generation: 0,
            chain: Chain::Mail,
            end: 0,
            first_sequence: 0,
            last_sequence: 0,
            last_commit: 0,
            last_event: 0,
            live: 0,
            live_bytes: 0,
            changed_in: CommitNumber(0),
            pins: 0,
            reads: 0,
            charged: 0,
            zeroed: 0,
            graves: Graves::Unknown,
            map: MapState::None,
        }
    }

    /// Begins a use of the file.
    pub(crate) fn begin(&mut self, chain: Chain, number: u64, generation: u64, first_sequence: u64) {
        assert_eq!(self.live, 0);
        assert_eq!(self.pins, 0);
        assert_eq!(self.charged, 0);
        let fresh = Self::new(Arc::clone(&self.file), self.capacity);
        *self = Self { chain, number, generation, first_sequence, graves: Graves::Noted(Vec::new()), ..fresh };
    }

    fn add_live(&mut self, bytes: u64, commit: CommitNumber) {
        self.live += 1;
        self.live_bytes += bytes;
        self.changed_in = self.changed_in.max(commit);
    }

    fn remove_live(&mut self, bytes: u64, commit: CommitNumber) {
        assert!(self.live > 0);
        self.live -= 1;
        self.live_bytes -= bytes;
        self.changed_in = self.changed_in.max(commit);
    }

    /// What a later header tells of it.
    pub(crate) fn seal(&self) -> Seal {
        Seal { number: self.number, generation: self.generation, end: self.end, last_commit: self.last_commit }
    }

    pub(crate) fn heat(&mut self) {
        // Without a map, messages are read.
        if let (MapState::None, Ok(Some(map))) = (&self.map, self.file.map()) {
            self.map = MapState::Hot(Arc::new(map));
        }
    }

    pub(crate) fn cool(&mut self) {
        if let MapState::Hot(map) = &self.map {
            self.map = MapState::Cooled(Arc::downgrade(map));
        }
    }

    pub(crate) fn map(&self) -> Option<&Arc<Map>> {
        match &self.map {
            MapState::Hot(map) if !map.is_lost() => Some(map),
            MapState::Hot(_) | MapState::None | MapState::Cooled(_) => None,
        }
    }

    /// Whether a message or a piece of one somewhere still points into the map. A segment that is not mapped any more
    /// can't become so again in the same use.
    pub(crate) fn is_borrowed(&mut self) -> bool {
        self.cool();
        match &self.map {
            MapState::None => false,
            MapState::Hot(_) => unreachable!("it was just cooled"),
            MapState::Cooled(map) => {
                let borrowed = map.strong_count() > 0;
                // Whoever dropped the last reference has read all that it wanted before; see that here, too.
                fence(Ordering::Acquire);
                borrowed
            }
        }
    }
}

/// All segment files of a log. A slot is a file's number in its name.
#[derive(Debug, Default)]
pub(crate) struct SegmentTable {
    slots: Vec<Option<Segment>>,
    /// Oldest first, which is by number.
    pub(crate) in_use: VecDeque<u16>,
    /// In the order in which they are to be used: those retired first, first.
    pub(crate) spares: VecDeque<u16>,
    /// Segments in which nothing counted at some time; it is looked at again whether they can be retired.
    pub(crate) dead: Vec<u16>,
}

impl SegmentTable {
    pub(crate) fn get(&self, slot: u16) -> &Segment {
        self.slots[usize::from(slot)].as_ref().expect("a slot that is in use or spare has its file")
    }

    pub(crate) fn get_mut(&mut self, slot: u16) -> &mut Segment {
        self.slots[usize::from(slot)].as_mut().expect("a slot that is in use or spare has its file")
    }

    /// A slot without a file; `None` where `slots_max` are taken.
    pub(crate) fn vacant(&self, slots_max: usize) -> Option<u16> {
        let slot = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        (slot < slots_max).then_some(slot as u16)
    }

    pub(crate) fn put(&mut self, slot: u16, segment: Segment) {
        let index = usize::from(slot);
        if self.slots.len() <= index {
            self.slots.resize_with(index + 1, || None);
        }
        assert!(self.slots[index].is_none());
        self.slots[index] = Some(segment);
    }

    pub(crate) fn take(&mut self, slot: u16) -> Option<Segment> {
        self.slots[usize::from(slot)].take()
    }

    pub(crate) fn by_number(&self, number: u64) -> Option<u16> {
        let position = self.in_use.binary_search_by_key(&number, |slot| self.get(*slot).number).ok()?;
        Some(self.in_use[position])
    }

    /// A record counts from now on. Where it is nowhere (as recovery may find), nothing is counted.
    pub(crate) fn add_live(&mut self, place: Place, commit: CommitNumber) {
        if place.slot != NOWHERE {
            self.get_mut(place.slot).add_live(place.length(), commit);
        }
    }

    /// A record does not count any more.
    pub(crate) fn remove_live(&mut self, place: Place, commit: CommitNumber) {
        if place.slot == NOWHERE {
            return;
        }
        let segment = self.get_mut(place.slot);
        segment.remove_live(place.length(), commit);
        if segment.live == 0 {
            self.note_dead(place.slot);
        }
    }

    /// Perhaps the segment can be retired.
    pub(crate) fn note_dead(&mut self, slot: u16) {
        if !self.dead.contains(&slot) {
            self.dead.push(slot);
        }
    }

    /// Puts a segment that was taken for a spare back to its place.
    pub(crate) fn use_again(&mut self, slot: u16) {
        let number = self.get(slot).number;
        let place = self.in_use.iter().position(|other| self.get(*other).number > number);
        self.in_use.insert(place.unwrap_or(self.in_use.len()), slot);
    }

    /// The newest segment of a chain that holds acknowledged frames.
    pub(crate) fn newest(&self, chain: Chain) -> Option<&Segment> {
        let in_use = self.in_use.iter().rev().map(|slot| self.get(*slot));
        in_use.into_iter().find(|segment| segment.chain == chain && segment.end > 0)
    }

    /// All that have a file.
    #[cfg(any(feature = "sim", test))]
    pub(crate) fn slots(&self) -> Vec<u16> {
        (0..self.slots.len() as u16).filter(|slot| self.slots[usize::from(*slot)].is_some()).collect()
    }

    pub(crate) fn allocated_bytes(&self) -> u64 {
        self.slots.iter().flatten().map(|segment| segment.capacity).sum()
    }
}

/// What all logs of a spool together may hold.
#[derive(Debug)]
pub(crate) struct Budget {
    used: AtomicU64,
    mail_bytes_max: u64,
}

impl Budget {
    /// An eighth, at most a segment's worth, is kept for outcomes.
    pub(crate) fn new(max_bytes: u64, segment_bytes: u64) -> Self {
        Self { used: AtomicU64::new(0), mail_bytes_max: max_bytes - (max_bytes / 8).min(segment_bytes) }
    }

    pub(crate) fn charge(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn refund(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether more than so many percent of what mail may take are used.
    pub(crate) fn is_used_above(&self, percent: u64) -> bool {
        self.used() / 100 >= self.mail_bytes_max / 10_000 * percent
    }

    /// Of what mail may take.
    pub(crate) fn used_percent(&self) -> u64 {
        self.used() / (self.mail_bytes_max / 100).max(1)
    }

    pub(crate) fn has_room_for_mail(&self, bytes: u64) -> bool {
        self.used().saturating_add(bytes) <= self.mail_bytes_max
    }
}
