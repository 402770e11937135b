//! Bodies that messages share: a campaign's content is stored and hashed once, and its messages name it.
//!
//! How many messages name a body is never stored but counted, here while records are appended and anew at each start.
//! A body counts while a live message names it, or while its owner holds it because more such messages are coming;
//! a hold ends with the process.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};

use crate::append::RoomFor;
use crate::error::AppendError;
use crate::format::{BODY_SCHEMA, Chain, RecordHeader, RecordKind};
use crate::frame::Change;
use crate::index::Place;
use crate::log::Log;
use crate::record::{BodyId, CommitNumber, MessageId, Sequence};
use crate::segment::SegmentTable;
use crate::storage::ReadBuffer;

/// One shared body.
#[derive(Debug)]
pub(crate) struct Body {
    pub(crate) place: Place,
    /// Of the content.
    pub(crate) bytes: u64,
    /// Live messages that name it.
    references: u32,
    /// Its owner, and reads under way.
    holds: u32,
    /// The newest commit that lowers one of the two: unless it is durable, they may rise again.
    lowered: CommitNumber,
    /// The record as it was read last, for as long as somebody uses it.
    read: Weak<ReadBuffer>,
}

impl Body {
    pub(crate) fn is_live(&self) -> bool {
        self.references > 0 || self.holds > 0
    }

    #[cfg(any(feature = "sim", test))]
    pub(crate) fn references(&self) -> u32 {
        self.references
    }
}

/// The shared bodies of a log, by sequence.
#[derive(Debug, Default)]
pub(crate) struct Bodies {
    bodies: HashMap<u64, Body>,
    /// Bodies that nobody named any more from a commit on; forgotten once that is durable.
    dying: VecDeque<(CommitNumber, u64)>,
}

impl Bodies {
    pub(crate) fn get(&self, sequence: u64) -> Option<&Body> {
        self.bodies.get(&sequence)
    }

    pub(crate) fn len(&self) -> usize {
        self.bodies.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &Body)> {
        self.bodies.iter().map(|(sequence, body)| (*sequence, body))
    }

    /// A body's record was appended or found; it counts from now on, held once.
    pub(crate) fn insert(
        &mut self,
        segments: &mut SegmentTable,
        sequence: u64,
        place: Place,
        bytes: u64,
        commit: CommitNumber,
    ) {
        self.bodies.insert(
            sequence,
            Body { place, bytes, references: 0, holds: 1, lowered: CommitNumber(0), read: Weak::new() },
        );
        segments.add_live(place, commit);
    }

    pub(crate) fn remove(&mut self, segments: &mut SegmentTable, sequence: u64, commit: CommitNumber) {
        if let Some(body) = self.bodies.remove(&sequence)
            && body.is_live()
        {
            segments.remove_live(body.place, commit);
        }
    }

    /// The body is elsewhere now. Returns where it was.
    pub(crate) fn relocate(
        &mut self,
        segments: &mut SegmentTable,
        sequence: u64,
        place: Place,
        commit: CommitNumber,
    ) -> Option<Place> {
        let body = self.bodies.get_mut(&sequence)?;
        let old = std::mem::replace(&mut body.place, place);
        if body.is_live() {
            segments.remove_live(old, commit);
            segments.add_live(place, commit);
        }
        Some(old)
    }

    /// A live message names it.
    pub(crate) fn reference(&mut self, segments: &mut SegmentTable, sequence: u64, commit: CommitNumber) {
        if let Some(body) = self.bodies.get_mut(&sequence) {
            if !body.is_live() {
                segments.add_live(body.place, commit);
            }
            body.references += 1;
        }
    }

    /// A message that named it is not live any more.
    pub(crate) fn unreference(&mut self, segments: &mut SegmentTable, sequence: u64, commit: CommitNumber) {
        self.lower(segments, sequence, commit, |body| &mut body.references);
    }

    /// A live body is held once more.
    pub(crate) fn hold(&mut self, sequence: u64) {
        if let Some(body) = self.bodies.get_mut(&sequence) {
            assert!(body.is_live());
            body.holds += 1;
        }
    }

    pub(crate) fn keep_read(&mut self, sequence: u64, memory: &Arc<ReadBuffer>) {
        if let Some(body) = self.bodies.get_mut(&sequence) {
            body.read = Arc::downgrade(memory);
        }
    }

    pub(crate) fn read_lately(&self, sequence: u64) -> Option<Arc<ReadBuffer>> {
        self.bodies.get(&sequence)?.read.upgrade()
    }

    pub(crate) fn release(&mut self, segments: &mut SegmentTable, sequence: u64, commit: CommitNumber) {
        self.lower(segments, sequence, commit, |body| &mut body.holds);
    }

    fn lower(
        &mut self,
        segments: &mut SegmentTable,
        sequence: u64,
        commit: CommitNumber,
        count: impl FnOnce(&mut Body) -> &mut u32,
    ) {
        let Some(body) = self.bodies.get_mut(&sequence) else {
            return;
        };
        let count = count(body);
        assert!(*count > 0);
        *count -= 1;
        body.lowered = body.lowered.max(commit);
        if !body.is_live() {
            segments.remove_live(body.place, body.lowered);
            self.dying.push_back((body.lowered, sequence));
        }
    }

    /// Forgets what nobody names any more, durably.
    pub(crate) fn forget_dead(&mut self, durable: CommitNumber) {
        while let Some((_, sequence)) = self.dying.pop_front_if(|(commit, _)| *commit <= durable) {
            if self.bodies.get(&sequence).is_some_and(|body| !body.is_live() && body.lowered <= durable) {
                self.bodies.remove(&sequence);
            }
        }
    }

    /// Whatever nobody names any more is going to be forgotten. See `audit.rs`.
    #[cfg(any(feature = "sim", test))]
    pub(crate) fn audit(&self, durable: CommitNumber) {
        assert!(self.dying.front().is_none_or(|(commit, _)| *commit >= durable), "{:?}", self.dying);
        for (sequence, body) in &self.bodies {
            let goes = || self.dying.contains(&(body.lowered, *sequence));
            assert!(body.is_live() || goes(), "body {sequence} is never forgotten: {body:?}");
        }
    }

    /// Recovery has counted: nobody holds a body any more.
    pub(crate) fn release_all(&mut self, segments: &mut SegmentTable) {
        for sequence in self.bodies.keys().copied().collect::<Vec<_>>() {
            self.release(segments, sequence, CommitNumber(0));
        }
        self.forget_dead(CommitNumber(0));
    }
}

impl Log {
    /// Appends a body for messages to share, and holds it until [`Log::release_body`] is called. It is durable with
    /// the first message that names it, at the latest.
    pub fn append_body(&mut self, content: &[u8]) -> Result<(BodyId, CommitNumber), AppendError> {
        self.check_room_for_mail(content.len() as u64)?;
        let id = MessageId::new(self.id(), Sequence(self.next_sequence));
        let header = RecordHeader {
            kind: RecordKind::Body as u8,
            schema: BODY_SCHEMA,
            message: id.to_raw(),
            ..RecordHeader::default()
        };
        let written = self.append_record(RoomFor::Mail, Chain::Mail, header, None, None, [&[], content])?;
        let bytes = content.len() as u64;
        self.bodies.insert(&mut self.segments, written.sequence, written.place, bytes, written.commit);
        self.note(Change::Body { sequence: written.sequence });
        Ok((BodyId::new(id), written.commit))
    }

    /// No more messages will name the body. It stays for as long as one that does is live.
    pub fn release_body(&mut self, body: BodyId) {
        let sequence = body.message_id().sequence().0;
        if self.bodies.get(sequence).is_some_and(|body| body.holds > 0) {
            let commit = self.durable;
            self.bodies.release(&mut self.segments, sequence, commit);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::Bodies;
    use crate::index::Place;
    use crate::record::CommitNumber;
    use crate::segment::{Segment, SegmentTable};
    use crate::sim::SimDisk;
    use crate::storage::Storage as _;

    fn table() -> SegmentTable {
        let mut segments = SegmentTable::default();
        for slot in 0..2 {
            let file = SimDisk::new(1).create(Path::new("/segment"), 4096).expect("a file in memory");
            segments.put(slot, Segment::new(file, 4096));
        }
        segments
    }

    fn place(slot: u16) -> Place {
        Place { slot, offset16: 10, length16: 4 }
    }

    /// A body may be named again until the latest commit that let it go is durable, also when an earlier one let it go
    /// for good. Until then its segment waits, and it is not forgotten; and then it is.
    #[test]
    fn a_body_waits_for_all_that_let_it_go() {
        let (mut bodies, mut segments) = (Bodies::default(), table());
        bodies.insert(&mut segments, 1, place(0), 64, CommitNumber(1));
        bodies.reference(&mut segments, 1, CommitNumber(1));
        bodies.unreference(&mut segments, 1, CommitNumber(7));
        bodies.release(&mut segments, 1, CommitNumber(3));
        assert_eq!((segments.get(0).live, segments.get(0).changed_in), (0, CommitNumber(7)));
        bodies.forget_dead(CommitNumber(3));
        bodies.audit(CommitNumber(3));
        // That commit fails, and a later one lets go again.
        bodies.reference(&mut segments, 1, CommitNumber(7));
        assert_eq!(segments.get(0).live, 1);
        bodies.unreference(&mut segments, 1, CommitNumber(9));
        assert_eq!((segments.get(0).live, segments.get(0).changed_in), (0, CommitNumber(9)));
        bodies.forget_dead(CommitNumber(8));
        assert!(bodies.get(1).is_some());
        bodies.audit(CommitNumber(8));
        bodies.forget_dead(CommitNumber(9));
        assert_eq!((bodies.len(), bodies.dying.len()), (0, 0));
    }

    /// What counts nowhere counts nowhere after it was moved, and where it is once it counts again.
    #[test]
    fn a_body_counts_where_it_is() {
        let (mut bodies, mut segments) = (Bodies::default(), table());
        let live = |segments: &SegmentTable| [0, 1].map(|slot| segments.get(slot).live);
        bodies.insert(&mut segments, 1, place(0), 64, CommitNumber(1));
        assert_eq!(bodies.relocate(&mut segments, 1, place(1), CommitNumber(2)), Some(place(0)));
        assert_eq!(live(&segments), [0, 1]);
        bodies.release(&mut segments, 1, CommitNumber(3));
        assert_eq!(live(&segments), [0, 0]);
        assert_eq!(bodies.relocate(&mut segments, 1, place(0), CommitNumber(4)), Some(place(1)));
        assert_eq!(live(&segments), [0, 0]);
        bodies.reference(&mut segments, 1, CommitNumber(5));
        bodies.hold(1);
        assert_eq!(live(&segments), [1, 0]);
        bodies.remove(&mut segments, 1, CommitNumber(6));
        assert_eq!(live(&segments), [0, 0]);
    }
}
