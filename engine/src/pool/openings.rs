//! When a shard begins a connection: while it can serve one more, and has a socket for it.
//!
//! A shard is *behind* when peers have brought as much since its last turn as may be served between two. They are
//! served in the order in which they come, so one more connection would bring nothing then, and let all others wait
//! longer. A pair that has a connection makes do with it until the shard has caught up; of those that have none a few
//! may open their first.

use std::collections::VecDeque;

use ahash::HashSet;

use crate::limits::{DISMISSED_PER_TURN, OPENINGS_BEHIND, TURN_INPUTS};

/// What may be begun, and which pairs, by their place, wait for it.
#[derive(Debug)]
pub(super) struct Openings {
    /// What this turn allows pairs that have no connection, and those that have.
    first_left: usize,
    further_left: usize,
    /// Sockets that are left.
    room: usize,
    /// A pair may stand in both: its connection may end while it waits for another.
    first: Line,
    further: Line,
}

/// Each pair stands in it once.
#[derive(Debug, Default)]
struct Line {
    order: VecDeque<u32>,
    members: HashSet<u32>,
}

impl Line {
    fn enter(&mut self, place: u32) {
        if self.members.insert(place) {
            self.order.push_back(place);
        }
    }

    fn pop(&mut self) -> Option<u32> {
        let place = self.order.pop_front()?;
        self.members.remove(&place);
        Some(place)
    }

    fn is_empty(&self) -> bool {
        self.order.is_empty()
    }
}

impl Default for Openings {
    /// Without bounds until [`Self::begin`] is called.
    fn default() -> Self {
        let (first, further) = (Line::default(), Line::default());
        Self { first_left: usize::MAX, further_left: usize::MAX, room: usize::MAX, first, further }
    }
}

impl Openings {
    /// A turn begins, since the last one peers have brought so much, and so many more sockets may be open.
    pub(super) fn begin(&mut self, inputs: usize, room: usize) {
        self.further_left = TURN_INPUTS.saturating_sub(inputs);
        self.first_left = self.further_left.max(OPENINGS_BEHIND);
        self.room = room;
    }

    /// There is no socket left after all.
    pub(super) fn out_of_room(&mut self) {
        self.room = 0;
    }

    /// Takes leave for one connection, if there is one.
    pub(super) fn take(&mut self, is_first: bool) -> bool {
        let left = if is_first { self.first_left } else { self.further_left };
        if left == 0 || self.room == 0 {
            return false;
        }
        self.first_left -= 1;
        self.further_left = self.further_left.saturating_sub(1);
        self.room -= 1;
        true
    }

    /// A pair that got none stands in line.
    pub(super) fn wait(&mut self, place: u32, is_first: bool) {
        if is_first { &mut self.first } else { &mut self.further }.enter(place);
    }

    /// Whose turn it is.
    pub(super) fn next(&mut self) -> Option<u32> {
        if self.room == 0 {
            return None;
        }
        let first = if self.first_left > 0 { self.first.pop() } else { None };
        first.or_else(|| if self.further_left > 0 { self.further.pop() } else { None })
    }

    /// How many of those in front wait for a socket and still want it; the others leave the line.
    pub(super) fn short_of_room(&mut self, wants: impl Fn(u32) -> bool) -> usize {
        let mut short = 0;
        if self.room > 0 {
            return short;
        }
        for line in [&mut self.first, &mut self.further] {
            let front: Vec<u32> = line.order.drain(..line.order.len().min(DISMISSED_PER_TURN)).collect();
            for place in front.into_iter().rev() {
                if wants(place) {
                    line.order.push_front(place);
                    short += 1;
                } else {
                    line.members.remove(&place);
                }
            }
        }
        short.min(DISMISSED_PER_TURN)
    }

    /// Whether somebody waits for no more than the next turn.
    pub(super) fn has_more(&self) -> bool {
        self.room > 0 && !(self.first.is_empty() && self.further.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_that_is_behind_opens_a_few_first_connections_and_no_further_ones() {
        let mut openings = Openings::default();
        openings.begin(TURN_INPUTS, 1_000);
        assert!(!openings.take(false));
        assert_eq!((0..1_000).take_while(|_| openings.take(true)).count(), OPENINGS_BEHIND);
        openings.begin(TURN_INPUTS - 2, 1_000);
        assert!(openings.take(true) && openings.take(false) && !openings.take(false) && openings.take(true));
    }

    #[test]
    fn first_ones_go_first_and_each_line_in_its_order() {
        let mut openings = Openings::default();
        openings.begin(TURN_INPUTS, 1_000);
        openings.wait(1, false);
        openings.wait(2, true);
        openings.wait(3, true);
        assert_eq!([openings.next(), openings.next(), openings.next()], [Some(2), Some(3), None]);
        assert!(openings.has_more(), "the next turn may do more");
        openings.begin(0, 1_000);
        assert_eq!(openings.next(), Some(1));
        assert!(!openings.has_more());
    }

    /// It had a connection, waits for another, and loses the one that it had: it need not wait until the shard has
    /// caught up.
    #[test]
    fn a_pair_that_waits_for_a_further_one_may_wait_for_its_first_too() {
        let mut openings = Openings::default();
        openings.begin(TURN_INPUTS, 1_000);
        openings.wait(1, false);
        openings.wait(1, true);
        openings.wait(1, true);
        assert_eq!([openings.next(), openings.next()], [Some(1), None]);
        openings.begin(0, 1_000);
        assert_eq!([openings.next(), openings.next()], [Some(1), None]);
    }

    #[test]
    fn without_sockets_all_wait() {
        let mut openings = Openings::default();
        openings.begin(0, 1);
        assert!(openings.take(true) && !openings.take(true) && !openings.take(false));
        openings.wait(1, true);
        openings.wait(2, false);
        openings.wait(3, true);
        assert_eq!((openings.next(), openings.short_of_room(|_| true)), (None, 3));
        assert_eq!(openings.short_of_room(|place| place != 1), 2, "one was served by what there is");
        assert!(!openings.has_more(), "a turn brings no socket");
        openings.wait(1, true);
        assert_eq!(openings.short_of_room(|_| true), 3, "who has left the line may come again");
    }
}
