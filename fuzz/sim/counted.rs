//! What the engine counts of itself, held against what came about: its metrics, and what it notes for the next start.

use postrider::progress::Progress;

use crate::checker::Counts;
use crate::world::World;

/// What the lives so far have come to.
#[derive(Debug, Default)]
pub(crate) struct Counted {
    /// When the present life began.
    at_start: Counts,
    /// Of all lives: deliveries that were told as possibly made twice.
    possible_duplicates: u64,
}

impl World {
    /// A life begins: the one before has left so many recipients sent to without a durable outcome.
    pub(crate) fn begin_counting(&mut self, unrecorded: u64) {
        self.counted.at_start = self.ledger.counts;
        self.counted.possible_duplicates += unrecorded;
    }

    /// A life is over, however it ended.
    pub(crate) fn end_counting(&mut self) {
        let of_life: u64 = self.metrics.iter().map(|metrics| metrics.possible_duplicates.get()).sum();
        self.counted.possible_duplicates += of_life;
    }

    /// COUNTED: nothing is under way, so all that came about in this life is counted, and nothing else.
    pub(crate) fn check_counted(&self) {
        let mut told = [0; 3];
        for metrics in &self.metrics {
            let counts = [&metrics.delivered, &metrics.transient_failures, &metrics.failures];
            told.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count.get());
        }
        let came_about = |counts: &Counts| {
            [counts.delivered, counts.deferred + counts.held, counts.bounced + counts.expired + counts.admin_bounced]
        };
        let (now, before) = (came_about(&self.ledger.counts), came_about(&self.counted.at_start));
        let of_life: Vec<u64> = now.iter().zip(before).map(|(now, before)| now - before).collect();
        assert_eq!(told[..], of_life, "COUNTED: deliveries, deferrals and failures of this life");
        let unrecorded = Progress::unrecorded(self.progress.iter().map(|progress| &***progress));
        assert_eq!(unrecorded, 0, "COUNTED: all that was sent is recorded");
    }

    /// COUNTED: what peers were sent again is among what was told as possible.
    pub(crate) fn check_duplicates(&self) {
        let (repeated, possible) = (self.ledger.counts.repeated, self.counted.possible_duplicates);
        assert!(repeated <= possible, "COUNTED: {repeated} deliveries were made again, and {possible} may have been");
    }
}
