//! In which order a pair's tickets are begun.

use std::cmp::Ordering;
use std::collections::BTreeSet;

use super::Pair;
use crate::fair::{CLASSES, class_ratio};
use crate::handover::Attempt;

/// Tickets of a lower one go first.
pub(super) type Rank = (u8, bool);

impl Pair {
    /// Puts a ticket in front of those that it may pass.
    pub(super) fn insert(&mut self, attempt: Box<Attempt>) {
        let place = self.place_of(rank(&attempt));
        let passed: BTreeSet<Rank> = self.tickets.range(place..).map(|other| rank(other)).collect();
        for other in passed {
            *self.passes.entry(other).or_default() += 1;
        }
        self.tickets.insert(place, attempt);
    }

    /// Where a ticket of this rank would stand.
    pub(super) fn place_of(&self, own: Rank) -> usize {
        let behind = self.tickets.iter().rev().take_while(|other| self.may_pass(own, rank(other)));
        self.tickets.len() - behind.count()
    }

    /// A higher class passes by the classes' weights, so that a lower one waits, but not for ever: one that has been
    /// passed so often passes in turn, with one ticket. What has a permit has waited for it: it passes one of its
    /// class, and nothing passes it, because whose the permit is was decided when it came.
    fn may_pass(&self, own: Rank, other: Rank) -> bool {
        let (has_permit, other_has_permit) = (!own.1, !other.1);
        let class = |rank: Rank| usize::from(rank.0).min(CLASSES - 1);
        let passes = self.passes.get(&other).copied().unwrap_or_default();
        match own.0.cmp(&other.0) {
            _ if other_has_permit => false,
            Ordering::Less => passes.max(self.waits[class(other)]) < class_ratio(own.0, other.0),
            Ordering::Equal => has_permit && passes < 1,
            Ordering::Greater => {
                self.waits[class(own)] >= class_ratio(other.0, own.0)
                    && !self.tickets.iter().any(|ticket| ticket.flow.class() == class(own))
            }
        }
    }

    /// A ticket is begun. That passes the mail of lower classes wherever it waits, for its turn, for a permit or with
    /// its ticket: else it would wait for the same share at each of them.
    pub(super) fn begin(&mut self, attempt: &Attempt) {
        self.carried.now += 1;
        self.demand.started(&attempt.flow);
        self.passes.remove(&rank(attempt));
        let class = attempt.flow.class();
        self.waits[class] = 0;
        for lower in class + 1..CLASSES {
            self.waits[lower] = self.waits[lower].saturating_add(u32::from(self.demand.has_class(lower)));
        }
    }
}

/// A ticket's class, and whether it has no permit.
fn rank(attempt: &Attempt) -> Rank {
    (attempt.flow.priority, attempt.permit.is_none())
}
