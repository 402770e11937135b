//! The order among entries that are ready for one (egress source, roll-up) pair.
//!
//! Three priority classes share a busy pair 16:4:1; within a class the flows (tenant and campaign) take turns by
//! deficit round robin, so that a small queue is not buried by another's bulk. A flow's cost is counted in recipients,
//! which is what a peer's limits count.

use std::collections::{HashMap, VecDeque};

use super::queue::EntryKey;

/// Who shares: a tenant's campaign, numbered by the home.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FlowId(pub u32);

/// Ready entries of one pair at one home.
#[derive(Debug, Default)]
pub struct FairQueue {
    classes: [Class; CLASS_WEIGHTS.len()],
    len: usize,
}

#[derive(Debug, Default)]
struct Class {
    flows: HashMap<FlowId, Flow>,
    /// Flows with entries, the one whose turn it is in front.
    turns: VecDeque<FlowId>,
    /// What the class may still take of the present round.
    credit: u32,
}

#[derive(Debug, Default)]
struct Flow {
    entries: VecDeque<(EntryKey, u32)>,
    deficit: u32,
}

impl FairQueue {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `priority` is 0 high, 1 normal, 2 bulk; `recipients` is the entry's cost.
    pub fn push(&mut self, priority: u8, flow: FlowId, entry: EntryKey, recipients: u32) {
        let class = &mut self.classes[usize::from(priority).min(CLASS_WEIGHTS.len() - 1)];
        let queued = class.flows.entry(flow).or_default();
        if queued.entries.is_empty() {
            queued.deficit = 0;
            class.turns.push_back(flow);
        }
        queued.entries.push_back((entry, recipients.max(1)));
        self.len += 1;
    }

    /// The entry whose turn it is.
    pub fn pop(&mut self) -> Option<EntryKey> {
        if self.len == 0 {
            return None;
        }
        let class = self.next_class();
        let entry = self.classes[class].pop();
        self.len -= 1;
        Some(entry)
    }

    /// Empties the queue, in no promised order.
    pub fn drain(&mut self) -> Vec<EntryKey> {
        let mut all = Vec::with_capacity(self.len);
        while let Some(entry) = self.pop() {
            all.push(entry);
        }
        all
    }

    /// A class takes its weight's worth of entries a round; the round ends when no class with entries has credit.
    fn next_class(&mut self) -> usize {
        for _ in 0..2 {
            for (place, class) in self.classes.iter_mut().enumerate() {
                if !class.turns.is_empty() && class.credit > 0 {
                    class.credit -= 1;
                    return place;
                }
            }
            for (class, weight) in self.classes.iter_mut().zip(CLASS_WEIGHTS) {
                class.credit = weight;
            }
        }
        unreachable!("a queue with entries has a class with entries, and a new round gives it credit")
    }
}

impl Class {
    fn pop(&mut self) -> EntryKey {
        loop {
            let turn = self.turns.front().copied().expect("the class has entries");
            let flow = self.flows.get_mut(&turn).expect("a flow with a turn exists");
            let &(entry, cost) = flow.entries.front().expect("a flow with a turn has entries");
            if flow.deficit < cost {
                flow.deficit += QUANTUM;
                self.turns.rotate_left(1);
                continue;
            }
            flow.deficit -= cost;
            flow.entries.pop_front();
            if flow.entries.is_empty() {
                self.flows.remove(&turn);
                self.turns.pop_front();
            }
            return entry;
        }
    }
}

/// High, normal, bulk.
const CLASS_WEIGHTS: [u32; 3] = [16, 4, 1];
/// Recipients that a flow may send more each time its turn comes.
const QUANTUM: u32 = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_flow_is_not_buried_by_bulk() {
        let mut queue = FairQueue::default();
        for entry in 0..10_000 {
            queue.push(1, FlowId(1), EntryKey(entry), 1);
        }
        for entry in 10_000..10_100 {
            queue.push(1, FlowId(2), EntryKey(entry), 1);
        }
        let order: Vec<u32> = std::iter::from_fn(|| queue.pop()).map(|entry| entry.0).collect();
        assert_eq!(order.len(), 10_100);
        let last_of_small = order.iter().rposition(|&entry| entry >= 10_000).expect("they are there");
        assert!(last_of_small < 220, "the small flow's last left at {last_of_small}");
        let bulk: Vec<u32> = order.iter().copied().filter(|&entry| entry < 10_000).collect();
        assert!(bulk.is_sorted(), "a flow keeps its own order");
    }

    #[test]
    fn classes_share_sixteen_four_one() {
        let mut queue = FairQueue::default();
        for entry in 0..3000 {
            queue.push((entry % 3) as u8, FlowId(0), EntryKey(entry), 1);
        }
        let first: Vec<u32> = std::iter::from_fn(|| queue.pop()).take(210).map(|entry| entry.0 % 3).collect();
        let share = |class| first.iter().filter(|&&c| c == class).count();
        assert_eq!((share(0), share(1), share(2)), (160, 40, 10));
    }

    #[test]
    fn a_lone_class_is_not_held_back() {
        let mut queue = FairQueue::default();
        for entry in 0..50 {
            queue.push(2, FlowId(0), EntryKey(entry), 1);
        }
        assert_eq!(std::iter::from_fn(|| queue.pop()).count(), 50);
        assert!(queue.is_empty());
    }

    #[test]
    fn cost_counts_recipients() {
        let mut queue = FairQueue::default();
        for entry in 0..20 {
            queue.push(1, FlowId(1), EntryKey(entry), 16);
            queue.push(1, FlowId(2), EntryKey(100 + entry), 1);
        }
        let first: Vec<u32> = std::iter::from_fn(|| queue.pop()).take(18).map(|entry| entry.0).collect();
        let large = first.iter().filter(|&&entry| entry < 100).count();
        assert!(large <= 2, "{large} entries of sixteen recipients went before eighteen of one");
    }
}
